"""Rounds of FedAvg without training, for Flower's SuperLink; runs in Flower's environment.

After each aggregation the server appends the time, in seconds, to a file.
"""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that records the end of each round."""

    times = Path("/dev/null")

    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        with self.times.open("a") as file:
            file.write(f"{time.time()}\n")
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=config["clients"],
                     min_available_nodes=config["clients"])  # fmt: skip
    strategy.times = Path(config["times"])
    model = ArrayRecord([np.zeros(config["parameters"], dtype=np.float32)])
    strategy.start(grid, model, num_rounds=config["rounds"], train_config=ConfigRecord({}), timeout=3600)
