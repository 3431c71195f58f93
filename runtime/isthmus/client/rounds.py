"""``isthmus.rounds``: the loop that a training script writes."""

import logging
import os
import threading
from collections.abc import Iterator

from isthmus_contracts.identities import ENV_STEP

from .context import context
from .errors import FederationError, ScriptError
from .evaluation import Evaluate, numbers_of
from .loop.child_processes import refuse_children
from .loop.client_loop import Participation
from .loop.process import end_without_trace
from .loop.rank_follower import Follower
from .loop.ranks import Group, Replicas, replicas_here
from .round import Round
from .script_values import shown
from .state.shared_state import Model, Parameters, SharedState

log = logging.getLogger("isthmus")


def rounds(model: Model, evaluate: Evaluate | None = None, parameters: Parameters = None) -> Iterator[Round]:
    """The rounds of the federation, the global weights loaded into ``model`` at the start of each.

    ``evaluate`` measures the global model whenever a new one is there, the final one included: it is called without
    arguments, its weights loaded into ``model``, and returns named numbers. An entry ``num_examples`` is their weight.
    ``parameters`` chooses the tensors that travel, all of them if it is not given: ``"trainable"``, those parameters
    that require a gradient; a list of patterns such as ``"*.lora_*"``; or a function from a name to a bool.
    Outside a federation there is one round. Raises :class:`FederationError` where the federation ends badly, or
    ``evaluate`` returns something else, :class:`ScriptError` (which is a ``ValueError`` too) for a model that cannot
    travel and ``parameters`` that choose nothing, and ``SystemExit`` (143) where the process is told to stop while it
    waits.

    In an initialised torch.distributed process group every rank loops through the same rounds; rank 0 alone is
    connected, and its numbers count.
    """
    try:
        yield from _rounds(model, evaluate, parameters)
    except FederationError:
        end_without_trace()
        raise


def _rounds(model: Model, evaluate: Evaluate | None, parameters: Parameters) -> Iterator[Round]:
    refuse_children()
    if evaluate is not None and not callable(evaluate):
        raise ScriptError(
            "evaluate must be a function without arguments that returns named numbers, not"
            f" {shown(evaluate)}: pass the function itself, not what it returns"
        )
    replicas = replicas_here(stopping := threading.Event())
    if isinstance(replicas, Group) and replicas.rank:
        if replicas.join():
            yield from Follower(model, evaluate, parameters, replicas).rounds()
        else:
            replicas.close(0.0)
            yield from _alone(model, evaluate, parameters, prints=False)
        return
    try:
        place = context()
        if place.federated:
            _show_log()
            _require_group(replicas)
            participation = Participation(model, evaluate, parameters, place, replicas, stopping)
    except Exception as error:
        replicas.fail(error)
        replicas.close(patience=5.0)
        raise
    if place.federated:
        replicas.say("federated")
        yield from participation.rounds()
    else:
        replicas.say("alone")
        replicas.close(patience=60.0)
        yield from _alone(model, evaluate, parameters, prints=True)


def _alone(model: Model, evaluate: Evaluate | None, parameters: Parameters, *, prints: bool) -> Iterator[Round]:
    """The one round of a script outside a federation, where nothing travels."""
    SharedState(model, parameters)
    yield Round(number=1, config={})
    if evaluate is not None:
        measured = numbers_of(evaluate)
        if prints:
            print("  ".join(f"{name}={value:.4f}" for name, value in measured.items()))


def _require_group(replicas: Replicas) -> None:
    """Raise :class:`FederationError` for one of a launcher's processes that would speak as if it were the only one."""
    if isinstance(replicas, Group):
        return
    environ = os.environ
    sizes = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    if ENV_STEP in environ and environ[ENV_STEP] != environ.get("SLURM_STEP_ID", ""):
        # An srun within the client: in the step that holds several clients, each task is one of them.
        sizes.append("SLURM_STEP_NUM_TASKS")
    for name in sizes:
        if int(environ.get(name) or 1) > 1:
            raise FederationError(
                f"this is one of {name}={environ[name]} processes:"
                " call torch.distributed.init_process_group() before isthmus.rounds(), so that they are one client"
            )


def _show_log() -> None:
    """Our few lines belong into the client's log, unless the script has set up logging of its own."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s isthmus: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
