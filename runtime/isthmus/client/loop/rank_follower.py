"""The loop of a client's other ranks, which follow rank 0 and have no connection of their own."""

import base64
from collections.abc import Callable, Iterator

from isthmus_contracts.pb import federation_pb2 as pb

from ..corrections.factory import CorrectionInputs, make_correction
from ..evaluation import Evaluate
from ..round import Round, open_round
from ..state.shared_state import Model, Parameters, SharedState
from .process_watch import EXIT_TERMINATED, ProcessWatch
from .ranks import RankGroup


class RankFollower:
    """Loop of a rank other than 0, over the same rounds with the same weights."""

    def __init__(self, model: Model, evaluate: Evaluate | None, parameters: Parameters, group: RankGroup) -> None:
        self._model = model
        self._evaluate = evaluate
        self._parameters = parameters
        self._group = group

    def rounds(self) -> Iterator[Round]:
        """Yield the rounds that rank 0 trains, until training is complete."""
        watch = ProcessWatch(self._group.stopping, self._report, self._close, self._group.abandon)
        try:
            self._shared = SharedState(self._model, self._parameters)
            self._group.use_device_of(self._shared.live().values())
            kinds = ("model", "train", "complete", "terminated")
            while (command := self._group.receive_command(*kinds))["kind"] != "complete":
                match command["kind"]:
                    case "model":
                        self._shared.load(self._group.receive())
                        if command["measuring"] and self._evaluate is not None:
                            self._evaluate()
                    case "train":
                        yield from self._train(pb.Offer.FromString(base64.b64decode(command["offer"])))
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
        inputs = CorrectionInputs(self._group.receive(), self._group.receive())
        correction = make_correction(offer, self._shared.names(), {}, inputs)

        def finish(num_examples: int, metrics: dict[str, float]) -> Callable[[], object]:
            return lambda: self._group.receive_command("submitted")

        told_to_stop = lambda: self._group.told_to_stop(self._group.stopping.is_set())  # noqa: E731
        yield from open_round(offer, correction, finish, told_to_stop)

    def _end(self, watch: ProcessWatch) -> None:
        watch.end()
        self._group.close(0.0)

    def _report(self, error: BaseException) -> None:
        self._group.fail(error)

    def _close(self) -> None:
        """Close the group after the script has left its loop."""
        self._group.fail(None)
        self._group.close(0.0)
