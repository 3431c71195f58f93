"""Names that share memory with another tensor (tied weights, a transposed decoder), of which only one is sent."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from isthmus_contracts.pb import federation_pb2 as pb

from .tensors import MAX_DIMENSIONS, State, flat


@dataclass(frozen=True)
class View:
    """Name whose values are some, or all, of another tensor's.

    Offset and strides are those of the view in that tensor's contiguous form, counted in elements.
    """

    name: str
    of: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the view's values from those of the whole tensor, in its memory if that is contiguous."""
        values = flat(whole)
        return values.as_strided(self.shape, self.stride, values.storage_offset() + self.offset)

    @classmethod
    def from_message(cls, message: pb.View) -> Self:
        return cls(message.name, message.of, message.offset, tuple(message.shape), tuple(message.stride))

    def message(self) -> pb.View:
        return pb.View(name=self.name, of=self.of, offset=self.offset, shape=self.shape, stride=self.stride)


def views_of(messages: Iterable[pb.View]) -> tuple[View, ...]:
    """Return the views in a header."""
    return tuple(map(View.from_message, messages))


def expanded(state: Mapping[str, torch.Tensor], views: Iterable[View]) -> State:
    """Return a state with all names: views share the memory of the tensors that they are views of."""
    return {**state, **{view.name: view.within(state[view.of]) for view in views}}


def to_text(views: Iterable[View]) -> str:
    """Serialize views for a checkpoint's metadata."""
    return json.dumps([[view.name, view.of, view.offset, view.shape, view.stride] for view in views])


def from_text(text: str) -> tuple[View, ...]:
    """Parse the output of :func:`to_text`."""
    return tuple(
        View(name, of, offset, tuple(shape), tuple(stride)) for name, of, offset, shape, stride in json.loads(text)
    )


def invalid_views(views: Iterable[View], specs: Sequence[pb.TensorSpec]) -> str | None:
    """Return why tensors with these specs cannot have these views, or ``None``."""
    sizes = {spec.name: math.prod(spec.shape) for spec in specs}
    seen = set(sizes)
    for view in views:
        if view.name in seen:
            return f"{view.name} is announced twice"
        seen.add(view.name)
        if view.of not in sizes:
            return f"{view.name} is announced as a view of {view.of}, which does not exist"
        if len(view.shape) != len(view.stride) or not 0 < math.prod(view.shape) <= sizes[view.of]:
            return f"{view.name} is announced as a view of {view.of}, which does not fit its shape"
        if len(view.shape) > MAX_DIMENSIONS or any(
            stride != 1 for size, stride in zip(view.shape, view.stride, strict=True) if size == 1
        ):
            return f"{view.name} is announced as a view of {view.of}, with impossible strides"
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride, strict=True))
        if view.offset + last >= sizes[view.of]:
            return f"{view.name} is announced as a view of {view.of}, but does not lie within it"
    return None


def difference(expected: Iterable[View], offered: Iterable[View]) -> str | None:
    """Return how a client's sharing of memory differs from the global model's, in one line, or ``None``."""
    wanted, given = ({view.name: view for view in views} for views in (expected, offered))
    for name in sorted(wanted.keys() | given.keys()):
        theirs, own = wanted.get(name), given.get(name)
        if theirs == own:
            continue
        if theirs is not None and own is not None:
            return (
                f"{name} shares memory in another way than in the global model: with {own.of}, there with {theirs.of}"
            )
        view = theirs or own
        assert view is not None
        here, there = ("does", "does not") if theirs is None else ("does not", "does")
        return (
            f"{name} {here} share memory with {view.of} (tied weights) at this client, and {there} in the global model:"
            " build the model in the same way at all clients"
        )
    return None
