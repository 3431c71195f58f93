"""Bounds of the next round's changes and weights, from what the last round made public."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...tensors import State

FIRST_CLIP = 1.0
"""Largest change of a trained weight in the first round."""
FIRST_SLOPE = 10.0
"""Largest mean gradient that SCAFFOLD derives from a client's change in the first round."""
FIRST_BUFFER_CLIP = 1000.0
"""Largest change of a statistic, such as a running variance, in the first round."""
LEAST_SHARE = 2.0**-10
"""Smallest clip, as a share of that in the first round: a tensor that has rested may move again."""
# A client's change may be larger than the global one, in which other clients' changes cancel it. Over many clients of
# unequal data, a single one may be the only one that moves a coordinate.
_MARGIN = {32: 64.0, 16: 8.0}
_MOST_MARGIN = 4096.0
# Above this share of clipped coordinates, the margin is doubled.
_TOLERATED = 1e-5
# A clip falls by no more than this factor from round to round.
_FALL = 8.0
_MOST_CLIP = 2.0**60
_KEY = "SecureAggregation"


@dataclass(frozen=True)
class History:
    """Public results of the rounds so far. Everything in it follows from opened sums."""

    clips: Mapping[str, float] = field(default_factory=dict)
    """Clip of the next round, by the masked tensor's name."""
    weight: float = 0.0
    """Largest weight that one client may have in the next round; 0: as in the manifest."""
    margin: float = 0.0
    """Ratio of a clip to the largest coordinate of the last global change; 0: the default."""

    def after(
        self, bits: int, moved: Mapping[str, float], firsts: Mapping[str, float], clipped_share: float, weight: float,
        capped: float,
    ) -> "History":  # fmt: skip
        """Return the history after one more round.

        ``moved``: largest absolute coordinate of the mean of each masked tensor. ``firsts``: each one's clip in a
        first round. ``clipped_share``: share of all clients' coordinates that were clipped. ``weight``: sum of the
        clients' weights. ``capped``: number of clients whose weight was cut.
        """
        usual = _MARGIN[bits]
        margin = self.margin or usual
        if clipped_share > _TOLERATED:
            margin = min(2 * margin, _MOST_MARGIN)
        elif not clipped_share:
            margin = max(margin / 2, usual)
        clips = {}
        for name, most in moved.items():
            least = max(firsts[name] * LEAST_SHARE, self.clips.get(name, firsts[name]) / _FALL)
            clips[name] = min(max(margin * most, least), _MOST_CLIP)
        # No single weight exceeded the sum.
        bound = 2.0 ** math.ceil(math.log2(weight)) if weight > 0 else 0.0
        if capped:
            bound = max(bound, 4 * self.weight)
        return History(clips, bound, margin)

    def state(self) -> State:
        """Return the history as tensors, for a checkpoint."""
        if not self.margin:
            return {}
        names = "\0".join(self.clips).encode()
        return {
            f"{_KEY}/names": torch.frombuffer(bytearray(names or b"\0"), dtype=torch.uint8),
            f"{_KEY}/clips": torch.tensor(list(self.clips.values()), dtype=torch.float64, device="cpu"),
            f"{_KEY}/weight": torch.tensor([self.weight, self.margin], dtype=torch.float64, device="cpu"),
        }

    @classmethod
    def of_state(cls, state: State) -> "History":
        """Return the history in a checkpoint's tensors; an empty one if there is none."""
        if f"{_KEY}/weight" not in state:
            return cls()
        clips = state[f"{_KEY}/clips"].tolist()
        names = bytes(state[f"{_KEY}/names"].tolist()).decode().split("\0") if clips else []
        weight, margin = state[f"{_KEY}/weight"].tolist()
        return cls(dict(zip(names, clips, strict=True)), weight, margin)
