"""Parts of secure aggregation in one process, without a network: ``python -m bench.secure_parts``.

A JSON line for each number of clients, size of model and share of dropouts. The protocol runs with all its messages,
for all clients in turn; tensors are masked for one client, and unmasked as the aggregator does it.
"""

import argparse
import itertools
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from isthmus.secure_aggregation.client import ClientProtocol, Masks
from isthmus.secure_aggregation.fixed_point import Contribution, quantise
from isthmus.secure_aggregation.layout import Parameters, make_layout
from isthmus.secure_aggregation.parameters import ClientId, Participant, Phase, UpdateKey
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.server import ServerProtocol
from isthmus.strategies.base import Update
from isthmus.tensors import State
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import Signer, Trust, issue, new_root

from .harness.noop_clients import Weights

JOB, POOL, PARTY, BASE = "bench", "pool", "bench", "base"
CASES = ((8, 10_000, 0.0), (16, 2_500_000, 0.0), (4, 100_000_000, 0.0), (64, 2_500_000, 0.1), (1000, 10_000, 0.1))
_T = TypeVar("_T")


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(prog="python -m bench.secure_parts", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", help="numbers of clients; default: those of bench.secure")
    parser.add_argument("--parameters", type=int, default=2_500_000, help="float32 parameters of the model")
    parser.add_argument("--dropouts", type=float, default=0.0, help="share of the clients that send no update")
    parser.add_argument("--bits", type=int, choices=[16, 32], default=32)
    parser.add_argument("--threads", type=int, default=2, help="threads that remove the masks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(clients, options.parameters, options.dropouts) for clients in options.clients or ()] or CASES
    for clients, parameters, dropouts in cases:
        line = measure(clients, parameters, dropouts, options.bits, options.threads)
        print(json.dumps({"bench": "secure_parts"} | line), flush=True)


def measure(clients: int, parameters: int, dropouts: float, bits: int, threads: int) -> dict[str, Any]:
    """Return the processor seconds of one case: of one client, and of the aggregator for all clients."""
    model: State = dict(Weights(parameters).tensors)
    for tensor in model.values():
        tensor.fill_(0.5)
    trained = {name: tensor + 0.001 for name, tensor in model.items()}
    settings = Parameters(max_clients=clients, max_examples=1000, bits=bits)
    layout = make_layout(settings, model)
    lost = round(clients * dropouts)
    times, masks, plan = protocol(layout, clients, lost)
    removals = [(key, -sign) for key, sign in plan]
    contribution = Contribution(1000, metrics={"loss": 1.0})
    quantise_seconds, quantised = timed(lambda: quantise(layout, model, trained, contribution))
    vector = quantised.tensors
    mask_seconds, _ = timed(lambda: add_masks(vector, masks.keys))
    total = {name: torch.zeros_like(tensor) for name, tensor in vector.items()}
    add_seconds, _ = timed(lambda: accept(total, Update("one", 1, vector)))
    unmask_seconds, _ = timed(lambda: add_masks(total, removals, threads))
    size = parameters * 4
    return {
        "clients": clients,
        "model_bytes": size,
        "dropouts": lost,
        "bits": bits,
        "neighbours": len(masks.pairwise),
        "client_protocol_seconds": round(times["client"] / clients, 6),
        "client_open_seconds": round(times["client open"] / clients, 6),
        "quantise_seconds": round(quantise_seconds, 5),
        "mask_seconds": round(mask_seconds, 5),
        "mask_GBps": round(size * bits / 32 * len(masks.keys) / mask_seconds / 1e9, 2),
        "server_protocol_seconds": round(times["server"], 4),
        "recover_seconds": round(times["server open"] + times["plan"], 4),
        "add_seconds": round(add_seconds, 5),
        "masks_removed": len(removals),
        "unmask_threads": threads,
        "unmask_seconds": round(unmask_seconds, 4),
    }


def protocol(
    layout: pb.SecureLayout, clients: int, lost: int
) -> tuple[dict[str, float], Masks, list[tuple[bytes, int]]]:
    """Run one instance; return seconds by part, one client's masks, and the masks to remove at the end."""
    root, public = new_root()
    signer = Signer(*issue(root, PARTY, JOB, POOL))
    trust = Trust(roots={PARTY: public})
    participants = [Participant(POOL, index, 0, str(index)) for index in range(clients)]
    begin = pb.SecureBegin(round=1, incarnation=1, purpose=pb.SecureBegin.TRAIN, base_digest=BASE, layout=layout,
                           phase_seconds=600)  # fmt: skip
    server = ServerProtocol(JOB, begin, participants)
    those = {each.id: ClientProtocol(JOB, POOL, each.index, 0, each.instance, signer, trust) for each in participants}
    times: dict[str, float] = defaultdict(float)

    def run(outgoing: list[Any], stage: str) -> None:
        """Pass messages on, as bytes, until none is left."""
        queue = deque(outgoing)
        while queue:
            who, message = queue.popleft()
            sent = message.SerializeToString()
            seconds, answers = timed(partial(reply, those[who], sent))
            times["client" + stage] += seconds
            for answer in answers:
                seconds, more = timed(partial(take, server, who, answer))
                times["server" + stage] += seconds
                queue.extend(more)

    run(server.start(), "")
    for client in those.values():
        client.contributed(UpdateKey(1, BASE, 0, "update"))
    keys = those[(POOL, 0)].masks
    assert keys is not None
    survivors: list[ClientId] = [each.id for each in itertools.islice(participants, clients - lost)]
    run(server.freeze(survivors), " open")
    if server.phase is not Phase.DONE:
        raise RuntimeError(server.failure)
    times["plan"], plan = timed(server.plan)
    return times, keys, plan


def reply(client: ClientProtocol, sent: bytes) -> list[bytes]:
    return [answer.SerializeToString() for answer in client.receive(pb.SecureServerMessage.FromString(sent))]


def take(server: ServerProtocol, who: ClientId, sent: bytes) -> list[Any]:
    return server.receive(who, pb.SecureClientMessage.FromString(sent))


def accept(total: State, update: Update) -> None:
    """Add an update as ``SecureSum`` does."""
    for name, tensor in total.items():
        tensor.add_(update.tensors[name])


def timed(work: Callable[[], _T]) -> tuple[float, _T]:
    """Return the processor time of a call, which other programs do not change much, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


if __name__ == "__main__":
    main()
