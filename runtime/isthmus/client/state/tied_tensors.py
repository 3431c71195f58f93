"""Detection of tensors that share memory, wholly or in part, by the addresses of their values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ...views import View
from ..errors import ScriptError

# A dimension: stride in memory, size, stride in the contiguous form.
_Dimension = tuple[int, int, int]


def views_in(state: Mapping[str, Any]) -> tuple[View, ...]:
    """Return the names that are views of other tensors: of the largest one, or of the first by name among equals.

    Raises ``ValueError`` for tensors that share a part of their memory without one being a view of the other.
    """
    names = list(state)
    views = []
    for group in overlapping([state[name] for name in names]):
        roots: list[str] = []
        for name in sorted((names[index] for index in group), key=lambda name: _rank(name, state[name])):
            for root in roots:
                if (view := _view(name, state[name], root, state[root])) is not None:
                    views.append(view)
                    break
                if overlap(state[name], state[root]):
                    raise ScriptError(
                        f"{name} and {root} share a part of their memory, and neither is a plain view of the other:"
                        " give one of them memory of its own (.clone()), or leave it out with"
                        " isthmus.rounds(..., parameters=...)"
                    )
            else:
                roots.append(name)
    return tuple(sorted(views, key=lambda view: view.name))


def _rank(name: str, tensor: torch.Tensor) -> tuple[int, bool, str]:
    return -tensor.numel(), not tensor.is_contiguous(), name


def overlapping(tensors: Sequence[Any]) -> Iterator[list[int]]:
    """Yield groups of two or more tensors, by index, whose memory may overlap."""
    spans = sorted((*span, index) for index, tensor in enumerate(tensors) if (span := _span(tensor)) is not None)
    group: list[int] = []
    place, reached = "", 0
    for where, start, end, index in spans:
        if where != place or start >= reached:
            if len(group) > 1:
                yield group
            group, place, reached = [], where, end
        group.append(index)
        reached = max(reached, end)
    if len(group) > 1:
        yield group


def overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors have an element in common."""
    here, there = _span(left), _span(right)
    if here is None or there is None:
        return False
    (one, start, end), (other, begin, stop) = here, there
    if one != other or start >= stop or begin >= end:
        return False
    size = left.element_size()
    if left is right or right.element_size() != size or (begin - start) % size:
        return True
    # One byte for each element of their common span.
    first = min(start, begin)
    touched = torch.zeros((max(end, stop) - first) // size, dtype=torch.bool, device="cpu")
    touched.as_strided(left.shape, left.stride(), (start - first) // size).fill_(True)
    return bool(touched.as_strided(right.shape, right.stride(), (begin - first) // size).any())


def _span(tensor: object) -> tuple[str, int, int] | None:
    """Return the device of a tensor's values, and their start and end address; ``None`` if it has no such values."""
    if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # for tensors without memory of their own
        start = 0
    if not start:  # on XLA, for example, where only the object identifies the tensor
        return f"object {id(tensor)}", 0, 1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()


def _view(name: str, tensor: torch.Tensor, root: str, whole: torch.Tensor) -> View | None:
    """Return the tensor as a view of ``whole``, if it is one."""
    if tensor.dtype != whole.dtype:
        return None
    shape = tuple(tensor.shape)
    if tensor is whole or (_place(tensor) == _place(whole) and tensor.data_ptr() == whole.data_ptr()):
        strides = (stride if size > 1 else 1 for size, stride in zip(shape, _contiguous(shape), strict=True))
        return View(name, root, 0, shape, tuple(strides))
    distance, rest = divmod(tensor.data_ptr() - whole.data_ptr(), whole.element_size())
    dimensions = _dimensions(whole)
    if rest or distance < 0 or (first := _steps(distance, dimensions)) is None:
        return None
    last, stride = list(first), []
    for size, step in zip(shape, tensor.stride(), strict=True):
        if size == 1:
            stride.append(1)
            continue
        if (steps := _steps(step, dimensions)) is None:
            return None
        last = [at + (size - 1) * each for at, each in zip(last, steps, strict=True)]
        stride.append(_travelled(steps, dimensions))
    if any(at >= size for at, (_, size, _) in zip(last, dimensions, strict=True)):
        return None
    return View(name, root, _travelled(first, dimensions), shape, tuple(stride))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1][: len(shape)]


def _dimensions(tensor: torch.Tensor) -> list[_Dimension]:
    """Return a tensor's dimensions, largest stride first; those contiguous in memory and on the wire are merged."""
    dimensions = zip(tensor.stride(), tensor.shape, _contiguous(tensor.shape), strict=True)
    merged: list[_Dimension] = []
    for stride, size, travelled in sorted((each for each in dimensions if each[1] > 1), reverse=True):
        if merged and (merged[-1][0], merged[-1][2]) == (size * stride, size * travelled):
            merged[-1] = (stride, size * merged[-1][1], travelled)
        else:
            merged.append((stride, size, travelled))
    return merged


def _steps(distance: int, dimensions: Iterable[_Dimension]) -> list[int] | None:
    """Convert a distance in memory to steps along each dimension; ``None`` if there is no such position."""
    steps = []
    for stride, size, _ in dimensions:
        step, distance = divmod(distance, stride) if stride else (0, distance)
        if step >= size:
            return None
        steps.append(step)
    return None if distance else steps


def _travelled(steps: Iterable[int], dimensions: Iterable[_Dimension]) -> int:
    return sum(step * travelled for step, (_, _, travelled) in zip(steps, dimensions, strict=True))
