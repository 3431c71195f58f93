"""The digest of what an update is made from."""

from isthmus.secure_aggregation.basis import Settings, basis_digest


def test_it_depends_on_everything_and_on_no_order() -> None:
    one = Settings("FedProx", {"mu": "0.1", "a": "b"}, {"rate": "0.1", "epochs": "3"})
    again = Settings("FedProx", {"a": "b", "mu": "0.1"}, {"epochs": "3", "rate": "0.1"})
    assert basis_digest("ab", one) == basis_digest("ab", again)
    assert len(basis_digest("ab", one)) == 64
    others = [
        basis_digest("ac", one),
        basis_digest("ab", one, "cd"),
        basis_digest("ab", Settings("FedAvg", one.parameters, one.config)),
        basis_digest("ab", Settings("FedProx", {"mu": "0.2", "a": "b"}, one.config)),
        basis_digest("ab", Settings("FedProx", one.parameters, {"rate": "0", "epochs": "3"})),
        basis_digest("ab", Settings("FedProx", one.parameters, {"rate": "0.1"})),
        # What is a parameter of the strategy is not one of the script, and names are not values.
        basis_digest("ab", Settings("FedProx", one.config, one.parameters)),
        basis_digest("ab", Settings("FedProx", {"mu": "0.1", "ab": ""}, one.config)),
        basis_digest("ab", Settings("FedProx", {}, {**one.parameters, **one.config})),
    ]
    assert len({basis_digest("ab", one), *others}) == 1 + len(others)
