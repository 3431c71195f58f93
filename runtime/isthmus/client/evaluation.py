"""Evaluation of a global model by the script's function."""

import math
from collections.abc import Callable, Mapping

from isthmus_contracts.pb import federation_pb2 as pb

from ..framing import MAX_EXAMPLES
from ..metric_names import problem_with
from .errors import FederationError
from .script_values import as_number, shown

_WEIGHT = "num_examples"
Evaluate = Callable[[], Mapping[str, float]]


def numbers_of(evaluate: Evaluate) -> dict[str, float]:
    """Call the function and return its metrics. Raises :class:`FederationError` if they are not named numbers."""
    returned = evaluate()
    if not isinstance(returned, Mapping):
        raise FederationError(
            f'the evaluation function must return named numbers, like {{"accuracy": 0.93}}, not {shown(returned)}'
        )
    try:
        numbers = {str(name): as_number(str(name), value) for name, value in returned.items()}
        if (problem := problem_with(numbers)) is not None:
            raise ValueError(problem)
        weight = numbers.get(_WEIGHT, 1.0)
        if not (math.isfinite(weight) and 0 <= weight <= MAX_EXAMPLES):
            raise ValueError(f"{_WEIGHT} must be from 0 (nothing to measure on) to 2**53, not {shown(weight)}")
    except ValueError as error:
        raise FederationError(f"the evaluation function must return named numbers: {error}") from None
    return numbers


def measure(evaluate: Evaluate, offer: pb.Offer) -> pb.Evaluation:
    """Evaluate an offer's model, which is loaded into the script's. Raises as :func:`numbers_of` does.

    Values that are not finite are sent too: a client whose metric is NaN did evaluate the model, and found it bad.
    """
    metrics = numbers_of(evaluate)
    weight = metrics.pop(_WEIGHT, 1.0)
    return pb.Evaluation(
        model_round=offer.base_round,
        model_digest=offer.base_digest,
        num_examples=weight,
        metrics=metrics,
    )
