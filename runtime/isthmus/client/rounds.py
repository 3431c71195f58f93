"""``isthmus.rounds``: the iterator over rounds that a training script loops over."""

import logging
import os
import threading
from collections.abc import Iterator

from isthmus_contracts.identities import ENV_STEP

from .context import context
from .errors import FederationError, ScriptError
from .evaluation import Evaluate, numbers_of
from .loop.child_processes import refuse_children
from .loop.client_loop import ClientLoop
from .loop.process_watch import hide_federation_tracebacks
from .loop.rank_follower import RankFollower
from .loop.ranks import RankGroup, Ranks, find_ranks
from .round import Round
from .script_values import shown
from .state.shared_state import Model, Parameters, SharedState

log = logging.getLogger("isthmus")


def rounds(model: Model, evaluate: Evaluate | None = None, parameters: Parameters = None) -> Iterator[Round]:
    """Iterate over the rounds of the federation; the global weights are loaded into ``model`` at the start of each.

    ``evaluate`` measures each new global model, including the final one: it is called without arguments, with the
    weights loaded into ``model``, and returns named numbers. An entry ``num_examples`` is their weight.
    ``parameters`` chooses the tensors that are sent and received, by default all of them: ``"trainable"`` for the
    parameters that require a gradient, a list of patterns such as ``"*.lora_*"``, or a function from a name to a bool.
    Outside a federation there is one round. Raises :class:`FederationError` if the federation ends with an error or
    ``evaluate`` returns anything else, :class:`ScriptError` (also a ``ValueError``) for a model that cannot be sent
    and ``parameters`` that choose nothing, and ``SystemExit`` (143) if the process receives SIGTERM while it waits.

    With secure aggregation only masked sums of updates can be read by the aggregator, but for the initial weights: one
    client sends those that ``model`` has when this is called, in clear.

    In an initialised torch.distributed process group every rank loops through the same rounds; only rank 0 is
    connected, and its numbers count.
    """
    try:
        yield from _rounds(model, evaluate, parameters)
    except FederationError:
        hide_federation_tracebacks()
        raise


def _rounds(model: Model, evaluate: Evaluate | None, parameters: Parameters) -> Iterator[Round]:
    refuse_children()
    if evaluate is not None and not callable(evaluate):
        raise ScriptError(
            "evaluate must be a function without arguments that returns named numbers, not"
            f" {shown(evaluate)}: pass the function itself, not what it returns"
        )
    ranks = find_ranks(stopping := threading.Event())
    if isinstance(ranks, RankGroup) and ranks.rank:
        if ranks.join():
            yield from RankFollower(model, evaluate, parameters, ranks).rounds()
        else:
            ranks.close(0.0)
            yield from _alone(model, evaluate, parameters, prints=False)
        return
    try:
        here = context()
        if here.federated:
            _show_log()
            _require_group(ranks)
            loop = ClientLoop(model, evaluate, parameters, here, ranks, stopping)
    except Exception as error:
        ranks.fail(error)
        ranks.close(timeout=5.0)
        raise
    if here.federated:
        ranks.send_command("federated")
        yield from loop.rounds()
    else:
        ranks.send_command("alone")
        ranks.close(timeout=60.0)
        yield from _alone(model, evaluate, parameters, prints=True)


def _alone(model: Model, evaluate: Evaluate | None, parameters: Parameters, *, prints: bool) -> Iterator[Round]:
    """Yield the only round of a script outside a federation, in which nothing is sent."""
    SharedState(model, parameters)
    yield Round(number=1, config={})
    if evaluate is not None:
        measured = numbers_of(evaluate)
        if prints:
            print("  ".join(f"{name}={value:.4f}" for name, value in measured.items()))


def _require_group(ranks: Ranks) -> None:
    """Raise :class:`FederationError` if a launcher started several processes that are not in one process group."""
    if isinstance(ranks, RankGroup):
        return
    environ = os.environ
    sizes = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    if ENV_STEP in environ and environ[ENV_STEP] != environ.get("SLURM_STEP_ID", ""):
        # This is an srun within the client. In the step that holds several clients, each task is a client.
        sizes.append("SLURM_STEP_NUM_TASKS")
    for name in sizes:
        if int(environ.get(name) or 1) > 1:
            raise FederationError(
                f"this is one of {name}={environ[name]} processes:"
                " call torch.distributed.init_process_group() before isthmus.rounds(), so that they are one client"
            )


def _show_log() -> None:
    """Write the library's few log lines to stderr, unless the script has configured logging."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s isthmus: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
