"""Codecs: bytes per parameter and speed of each chain and, with ``--accuracy``, the accuracy on Fashion-MNIST.

``python -m bench.codecs`` prints a JSON line for each chain; ``python -m bench.codecs --accuracy`` trains by federated
averaging in this process, every update and model through the real codecs (``--download`` too), without gRPC.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from isthmus.codecs import Chain, Decoder, Encoded, Residual, download_seed, encode, parse_chain, upload_seed
from isthmus.tensors import State
from isthmus_contracts.api.compression import Compression
from isthmus_examples.fashion_mnist import DEBIAN_DIRECTORY, load
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, Settings, evaluate, train

CHAINS = (
    "None", "Zstd", "Float16", "BFloat16", "Int8", "Int8+Zstd", "Rotation+Int8", "Int4", "Rotation+Int4", "TopK",
    "TopK+Int8",
)  # fmt: skip
TRAINED = ("None", "Float16", "Int8", "Int4", "Rotation+Int4", "TopK", "TopK+Int8")
# With such different data, the accuracy varies more from round to round than between codecs.
LAST_ROUNDS = 10


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=4_000_000, help="size of the encoded float32 tensor")
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions; the fastest counts")
    parser.add_argument("--chains", nargs="*", default=None)
    parser.add_argument("--top-k", default="0.01", help="TopK's fraction")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--download", action="store_true", help="also encode the global model (except with TopK)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--examples", type=int, default=5000, help="examples of training data, over all clients")
    parser.add_argument("--alpha", type=float, default=0.5, help="alpha of the Dirichlet partition")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure: Callable[[str, argparse.Namespace], dict[str, object]] = accuracy if options.accuracy else speed
    kind = "codec_accuracy" if options.accuracy else "codecs"
    for name in options.chains or (TRAINED if options.accuracy else CHAINS):
        print(json.dumps({"bench": kind, "chain": name, **measure(name, options)}), flush=True)


def chain_of(name: str, top_k: str) -> Chain:
    """Return the chain with this name in a manifest."""
    return parse_chain(Compression(upload=name, top_k_fraction=top_k).upload_codecs)


def decoded(encoded: Encoded, seed: str, base: State | None) -> State:
    """Return the tensors after encoding and decoding."""
    decoder = Decoder(encoded.specs, encoded.chain, seed, base)
    for chunk in encoded.chunks:
        decoder.write(chunk)
    return decoder.finish(encoded.checksum)


def speed(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return bytes, and raw gigabytes per second of processor time in one thread (less sensitive to other load)."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(options.parameters, generator=generator) * 0.1}
    state = {"w": base["w"] + torch.randn(options.parameters, generator=generator) * 0.001}
    chain, seed = chain_of(name, options.top_k), upload_seed(1, "pool", 0)
    encoding, decoding = [], []
    for _ in range(options.repeat):
        started = time.thread_time()
        encoded = encode(state, chain, seed, base)
        between = time.thread_time()
        decoded(encoded, seed, base)
        encoding.append(between - started)
        decoding.append(time.thread_time() - between)
    raw = state["w"].nbytes / 1e9
    return {
        "bytes_per_parameter": round(encoded.size / options.parameters, 4),
        "stated": round(chain.bytes_per_parameter, 4),
        "encode_GBps": round(raw / min(encoding), 3),
        "decode_GBps": round(raw / min(decoding), 3),
    }


def accuracy(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the accuracy on the whole test set (last rounds, last round) and the bytes of an update."""
    everyone, test = load(Path(os.environ.get("FASHION_MNIST_DIR", DEBIAN_DIRECTORY)))
    settled, final, size, raw = [], [], 0, 0
    for seed in range(options.seeds):
        chosen = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))[: options.examples]
        data = Examples(everyone.inputs[chosen], everyone.labels[chosen])
        shares = dirichlet_partition(data.labels.numpy(), options.clients, options.alpha, seed=seed)
        clients = [Examples(data.inputs[share], data.labels[share]) for share in shares]
        accuracies, size, raw = federate(name, options, clients, test, seed)
        settled.append(statistics.mean(accuracies))
        final.append(accuracies[-1])
    return {
        "accuracy": round(statistics.mean(settled), 4),
        "accuracies": [round(result, 4) for result in settled],
        "final_accuracy": round(statistics.mean(final), 4),
        "upload_bytes": size,
        "of_raw": round(size / raw, 4),
        "rounds": options.rounds,
        "clients": options.clients,
        "examples": options.examples,
        "alpha": options.alpha,
        "download": name if options.download else "None",
    }


def federate(
    name: str, options: argparse.Namespace, shares: list[Examples], test: Examples, seed: int
) -> tuple[list[float], int, int]:
    """Run federated averaging; return the accuracies of the last rounds, and an update's encoded and raw bytes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    upload = chain_of(name, options.top_k)
    # Error feedback applies to updates of clients only: models are not sent through TopK.
    download = parse_chain(()) if upload.sparse or not options.download else upload
    settings = Settings(epochs=1, learning_rate=0.05, batch_size=32)
    state: State = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    residuals: list[Residual | None] = [None] * len(shares)
    total, size = sum(map(len, shares)), 0
    accuracies: list[float] = []
    for number in range(1, options.rounds + 1):
        mean = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        for client, share in enumerate(shares):
            model.load_state_dict(state)
            optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)
            train(model, share, optimizer, settings, seed=(seed * 1000 + number) * 1000 + client)
            text = upload_seed(number, f"pool{seed}", client)
            encoded = encode(model.state_dict(), upload, text, state, residuals[client])
            residuals[client], size = encoded.residual, encoded.size
            for key, tensor in decoded(encoded, text, state).items():
                mean[key].add_(tensor, alpha=len(share) / total)
        text = download_seed(number) + str(seed)
        state = decoded(encode(mean, download, text, state), text, state)
        if number > options.rounds - LAST_ROUNDS:
            model.load_state_dict(state)
            accuracies.append(evaluate(model, test)["accuracy"])
    return accuracies, size, sum(tensor.nbytes for tensor in state.values())


if __name__ == "__main__":
    main()
