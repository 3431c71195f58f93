"""How a client passes from one attempt to the next while both run: the older hands in what it is at work on first."""

import asyncio
import time
from collections.abc import Callable

from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import Client, Membership
from ..state.round_decision import RoundState
from ..state.training_state import TrainingState

# One that was not heard of for so long is not waited for. Seconds: three heartbeats.
SILENCE = 30.0
_LOOK = 0.2  # seconds


class Handover:
    """An HPC pool's next attempt may start before the time limit ends the present one."""

    def __init__(self, members: Membership, training: TrainingState, ask_again: Callable[[Client], None]) -> None:
        self._members = members
        self._training = training
        self._ask_again = ask_again

    async def wait(self, hello: pb.Hello) -> None:
        """Returns when a newly started process may take over."""
        client, state = self._members.predecessor(hello), self._training.round
        if client is None or state is None:
            return
        client.successors += 1
        try:
            while client is self._members.predecessor(hello) and self._at_work(client, state):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK)  # silence ends it too, and rings no bell
        except asyncio.CancelledError:
            if client.successors == 1 and client.connected:
                # The heir is gone again: what it would have been asked for, this one is.
                client.successors = 0
                self._ask_again(client)
                client.successors = 1
            raise
        finally:
            client.successors -= 1

    def _at_work(self, client: Client, state: RoundState) -> bool:
        """Whether a client has an update of that round in hand."""
        pending = client.id in state.selected - state.accepted - state.rejected
        return self._training.round is state and pending and time.monotonic() - client.last_heard <= SILENCE
