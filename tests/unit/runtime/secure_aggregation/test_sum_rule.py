"""Results of rules over secure sums, beside those over the single updates."""

import pytest
import torch

from isthmus.secure_aggregation.fixed_point import quantisation_bound

from .secure_rounds import model, plain_round, rule, secure, secure_round, trained

LINEAR = ("FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedNova", "SCAFFOLD")
CLIENTS = 5


@pytest.mark.parametrize("algorithm", ["FedAvg", "FedProx"])
def test_the_mean_is_the_plain_one_within_the_stated_bound(algorithm: str) -> None:
    plain, hidden = rule(algorithm, CLIENTS), secure(algorithm, CLIENTS)
    base = model()
    for number in range(4):
        updates = trained(base, CLIENTS, seed=number)
        expected = plain_round(plain, base, updates)
        result = secure_round(hidden, base, updates, ["frozen"])
        weight = sum(update.weight for update in updates)
        assert hidden.sums.weight == weight
        assert hidden.sums.clipped_share == 0
        assert hidden.sums.metrics["loss"].mean == pytest.approx(1.0, abs=1e-6)
        bounds = quantisation_bound(hidden.layout, CLIENTS, weight)
        for name, tensor in expected.items():
            assert result[name].dtype == tensor.dtype
            if not tensor.is_floating_point() or name == "frozen":
                assert torch.equal(result[name], tensor), name
            elif tensor.numel():
                error = float((result[name].double() - tensor.double()).abs().max())
                rounding = 4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
                assert error <= bounds[name] + rounding, name
        base = expected
