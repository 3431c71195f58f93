"""FedAvg: federated averaging."""

from .averages import Averaging


class FedAvg(Averaging):
    """Mean of the clients' weights, weighted by their numbers of examples.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), algorithm 1.
    """
