"""Rounds of FedAvg without training under SecAgg+, for Flower's SuperLink; runs in Flower's environment.

SecAgg+ is a workflow for Flower's older strategies, as in its example ``flower-secure-aggregation``. Its settings are
those that Isthmus has: all clients hold shares, and more than two thirds recover a secret. After each aggregation the
server appends the time, in seconds, to a file.
"""

import time
from pathlib import Path

import numpy as np
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp

server = ServerApp()


class Idle(NumPyClient):
    """Client that returns the parameters that it gets."""

    def fit(self, parameters, config):
        return parameters, 1, {}


client = ClientApp(client_fn=lambda context: Idle().to_client(), mods=[secaggplus_mod])


class Timed(FedAvg):
    """FedAvg that records the end of each round."""

    times = Path("/dev/null")

    def aggregate_fit(self, server_round, results, failures):
        result = super().aggregate_fit(server_round, results, failures)
        with self.times.open("a") as file:
            file.write(f"{time.time()}\n")
        return result


@server.main()
def main(grid, context) -> None:
    config = context.run_config
    clients = config["clients"]
    model = ndarrays_to_parameters([np.zeros(config["parameters"], dtype=np.float32)])
    strategy = Timed(fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=clients, min_available_clients=clients,
                     initial_parameters=model)  # fmt: skip
    strategy.times = Path(config["times"])
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=config["rounds"]), strategy=strategy)
    workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.67, max_weight=1)
    DefaultWorkflow(fit_workflow=workflow)(grid, legacy)
