"""What a script's evaluation function says of a global model."""

import math
from collections.abc import Callable, Mapping

from isthmus_contracts.pb import federation_pb2 as pb

from ..framing import MOST_EXAMPLES
from ..metric_names import problem_with
from .errors import FederationError
from .script_values import as_number, shown

_WEIGHT = "num_examples"
Evaluate = Callable[[], Mapping[str, float]]


def numbers_of(evaluate: Evaluate) -> dict[str, float]:
    """Return what the function returns. Raises :class:`FederationError` where that is not named numbers."""
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
        if not (math.isfinite(weight) and 0 <= weight <= MOST_EXAMPLES):
            raise ValueError(f"{_WEIGHT} must be from 0 (nothing to measure on) to 2**53, not {shown(weight)}")
    except ValueError as error:
        raise FederationError(f"the evaluation function must return named numbers: {error}") from None
    return numbers


def measure(evaluate: Evaluate, offer: pb.Offer) -> pb.Evaluation:
    """Measure the model that an offer names, which the script's model holds. Raises as :func:`numbers_of` does.

    What is not finite travels as well: a client whose metric is NaN has measured the model, and found it bad.
    """
    metrics = numbers_of(evaluate)
    weight = metrics.pop(_WEIGHT, 1.0)
    return pb.Evaluation(
        model_round=offer.base_round,
        model_digest=offer.base_digest,
        num_examples=weight,
        metrics=metrics,
    )
