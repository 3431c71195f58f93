"""Epsilons of Google's dp-accounting, as JSON lines.

``python -m bench.peers.accountant`` runs this in an environment of its own.
The Skellam mechanism is given to its privacy loss distributions as two explicit lists of probabilities.
"""

import json
import math

import numpy as np
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from scipy import special

DELTA = 1e-5
# Sensitivity in steps (one coordinate, so its L1 and L2 norms are equal), noise multiplier, rounds.
CASES = [
    (sensitivity, noise, rounds)
    for sensitivity in (1, 8, 64)
    for noise, rounds in ((1.0, 1), (2.0, 10), (4.0, 1), (4.0, 30), (4.0, 100), (10.0, 300))
    if sensitivity * noise >= 4
]
STEP = 1e-4  # of the discretised privacy losses


def skellam(sensitivity: int, noise: float) -> pld.PrivacyLossDistribution:
    """Return the losses of noise with a variance of (noise * sensitivity)^2."""
    variance = (noise * sensitivity) ** 2
    reach = math.ceil(14 * math.sqrt(variance))
    values = np.arange(-reach, reach + 1)
    logs = np.log(special.ive(np.abs(values), variance))
    moved = {int(value) + sensitivity: float(log) for value, log in zip(values, logs, strict=True)}
    still = {int(value): float(log) for value, log in zip(values, logs, strict=True)}
    return pld.from_two_probability_mass_functions(still, moved, value_discretization_interval=STEP)


def main() -> None:
    """Print a line for each case."""
    for sensitivity, noise, rounds in CASES:
        gaussian = pld.from_gaussian_mechanism(noise, value_discretization_interval=STEP)
        renyi = RdpAccountant().compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
        line = {
            "sensitivity": sensitivity,
            "noise_multiplier": noise,
            "rounds": rounds,
            "delta": DELTA,
            "skellam_losses": skellam(sensitivity, noise).self_compose(rounds).get_epsilon_for_delta(DELTA),
            "gaussian_losses": gaussian.self_compose(rounds).get_epsilon_for_delta(DELTA),
            "gaussian_renyi": renyi.get_epsilon(DELTA),
        }
        print(json.dumps({name: round(value, 6) for name, value in line.items()}), flush=True)


if __name__ == "__main__":
    main()
