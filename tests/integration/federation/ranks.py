"""Training script for tests: linear regression on a client's data, by one process or by the ranks of a gloo group.

RANK, RANKS: this process's rank in a group; without them it is alone. TIMEOUT: of the group's collectives,
seconds, once they are set up. SILENCE: seconds after which a rank counts as dead. PLAIN: trains without
DistributedDataParallel. BREAK: "rank:round" raises there. LEAVE: "rank:round" breaks out of the loop there. ENDLESS:
rounds that continue until the script should stop. Each rank writes the sums of its initial weights in each round,
and the number of steps that it took.
"""

import datetime as dt
import os
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import isthmus
from isthmus.client.loop import ranks

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("RANKS", "1"))
ROWS = 24


def join_group() -> None:
    """Join the group, whose store rank 0 serves on a free port."""
    address = Path("store")
    if RANK == 0:
        store = distributed.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
        Path("store.partial").write_text(str(store.port))
        Path("store.partial").rename(address)
    else:
        until = time.monotonic() + 180
        while not address.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        store = distributed.TCPStore("127.0.0.1", int(address.read_text()), RANKS, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS)
    if "SILENCE" in os.environ:
        ranks._HEARTBEAT_TIMEOUT, ranks._HEARTBEAT_SECONDS = float(os.environ["SILENCE"]), 0.5
    if "TIMEOUT" in os.environ:
        distributed.barrier()
        timeout = dt.timedelta(seconds=float(os.environ["TIMEOUT"]))
        distributed.distributed_c10d._set_pg_timeout(timeout, distributed.group.WORLD)


def data(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's share of the client's rows, of the same size for every rank."""
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(ROWS, 5, generator=generator)
    targets = inputs @ torch.arange(5.0) + client
    return inputs[RANK::RANKS], targets[RANK::RANKS]


def at(name: str, number: int) -> bool:
    return os.environ.get(name) == f"{RANK}:{number}"


def main() -> None:
    torch.set_num_threads(1)
    client = int(os.environ["DATA"])
    torch.manual_seed(RANK)  # the ranks' initial weights differ
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    if RANKS > 1:
        join_group()
        if "PLAIN" not in os.environ:
            model = DistributedDataParallel(model)
    inputs, targets = data(client)

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            total = (model(inputs).squeeze(1) - targets).square().sum()
        if RANKS > 1:
            distributed.all_reduce(total)
        return {"loss": float(total) / ROWS, "num_examples": ROWS, "rank": float(RANK)}

    record = Path(f"client-{client}-rank-{RANK}-of-{RANKS}")
    for rnd in isthmus.rounds(model, evaluate=evaluate):
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        begun = "".join(str(weight.sum().item()) for weight in plain.parameters())
        with record.open("a") as file:
            file.write(f"{rnd.number} {rnd.config['rate']} {begun}\n")
        if at("BREAK", rnd.number):
            raise ValueError("no such column: age")
        if at("LEAVE", rnd.number):
            break
        optimizer = rnd.wrap(torch.optim.SGD(plain.parameters(), lr=float(rnd.config["rate"])))
        steps = 0
        while steps < 3 or (os.environ.get("ENDLESS") and not rnd.should_stop):
            optimizer.zero_grad()
            loss = (model(inputs).squeeze(1) - targets).square().mean()
            loss.backward()
            optimizer.step()
            steps += 1
        with record.open("a") as file:
            file.write(f"{rnd.number} {steps} steps\n")
        rnd.submit(num_examples=ROWS, loss=loss.item())


if __name__ == "__main__":
    main()
