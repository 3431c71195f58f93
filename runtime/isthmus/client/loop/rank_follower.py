"""A client's other ranks: they go where rank 0 goes, without a connection of their own."""

import base64
from collections.abc import Callable, Iterator

from isthmus_contracts.pb import federation_pb2 as pb

from ..corrections.factory import Ingredients, correction_of
from ..errors import FederationError
from ..evaluation import Evaluate
from ..round import Round
from ..state.shared_state import Model, Parameters, SharedState
from .process import EXIT_TERMINATED, ProcessWatch
from .ranks import Group


class Follower:
    """Goes through the same rounds as rank 0, with the same weights."""

    def __init__(self, model: Model, evaluate: Evaluate | None, parameters: Parameters, group: Group) -> None:
        self._model = model
        self._evaluate = evaluate
        self._parameters = parameters
        self._group = group

    def rounds(self) -> Iterator[Round]:
        watch = ProcessWatch(self._group.stopping, self._report, self._close, self._group.abandon)
        try:
            self._shared = SharedState(self._model, self._parameters)
            self._group.place(self._shared.live().values())
            while (word := self._group.hear("model", "train", "complete", "terminated"))["kind"] != "complete":
                match word["kind"]:
                    case "model":
                        self._shared.load(self._group.receive())
                        if word["measuring"] and self._evaluate is not None:
                            self._evaluate()
                    case "train":
                        yield from self._train(pb.Offer.FromString(base64.b64decode(word["offer"])))
                    case _:
                        raise SystemExit(EXIT_TERMINATED)
        except GeneratorExit:
            watch.leave()
            raise
        except BaseException as error:
            if not isinstance(error, SystemExit):
                self._report(error)
            self._end(watch)
            raise
        self._end(watch)

    def _train(self, offer: pb.Offer) -> Iterator[Round]:
        aids = Ingredients(self._group.receive(), self._group.receive())
        correction = correction_of(offer, self._shared.names(), {}, aids)

        def finish(num_examples: int, metrics: dict[str, float]) -> Callable[[], object]:
            return lambda: self._group.hear("submitted")

        told = lambda: self._group.told_to_stop(self._group.stopping.is_set())  # noqa: E731
        rnd = Round(offer.round, dict(offer.config), correction, finish, told)
        try:
            yield rnd
        finally:
            correction.close()
        if not rnd.submitted:
            raise FederationError(f"round {rnd.number} ended without rnd.submit(num_examples=...)")

    def _end(self, watch: ProcessWatch) -> None:
        watch.end()
        self._group.close(0.0)

    def _report(self, error: BaseException) -> None:
        self._group.fail(error)

    def _close(self) -> None:
        """The script is not in its loop any more."""
        self._group.fail(None)
        self._group.close(0.0)
