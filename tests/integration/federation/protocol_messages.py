"""Hypothesis strategies for the federation protocol: messages with arbitrary fields, messages that are nearly good, and
bytes that are neither."""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_NUMBERS = [
    0,
    1,
    2,
    3,
    4,
    63,
    64,
    65,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
_DOUBLES = [0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
_TEXTS = [
    "", "x", "w", "v", "__metadata__", "loss", "steps", "F32", "F64", "BOOL", "F31", "Zstd", "Delta", "Int8",
    "TopK=nan", "a\nb", "\x1b[2J", "\x1b]0;owned\x07", "\u202e", "[/bold]", "\x00", "\U0001f600" * 40, "n" * 129,
    "n" * 600, "n" * 70_000,
]  # fmt: skip
_Field = st.SearchStrategy[Any]


def words(*, known: list[str]) -> st.SearchStrategy[str]:
    """Generate strings: meaningful ones, invalid ones, and arbitrary ones."""
    return st.sampled_from(known) | st.sampled_from(_TEXTS) | st.text(max_size=20)


def arbitrary(descriptor: Descriptor, known: list[str], depth: int = 3) -> st.SearchStrategy[Message]:
    """Generate messages of a type with random fields of arbitrary values."""
    make: Callable[..., Message] = GetMessageClass(descriptor)
    fields = {field.name: field for field in descriptor.fields if depth or field.message_type is None}
    some = st.dictionaries(st.sampled_from(sorted(fields)), st.none(), max_size=6) if fields else st.just({})
    return some.flatmap(
        lambda chosen: st.fixed_dictionaries({name: _value(fields[name], known, depth) for name in chosen})
    ).map(lambda values: make(**values))


def nearly(good: Message, known: list[str]) -> st.SearchStrategy[Message]:
    """Generate the valid message, or one that differs from it in a few fields."""

    def changed(other: Message) -> Message:
        result = type(good)()
        result.CopyFrom(good)
        for field, _ in other.ListFields():
            result.ClearField(field.name)
        result.MergeFrom(other)
        return result

    return mostly(st.just(good), arbitrary(good.DESCRIPTOR, known).map(changed))


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Generate the usual value three times in four, so that the handling after a valid message is reached, too."""
    return st.integers(0, 3).flatmap(lambda number: usual if number else other)


Edit = tuple[int, str, bytes]
_KINDS = st.sampled_from(["replace", "insert", "cut", "repeat"])
EDITS: st.SearchStrategy[list[Edit]] = mostly(
    st.just([]), st.lists(st.tuples(st.integers(0, 2**16), _KINDS, st.binary(min_size=1, max_size=9)), max_size=4)
)
"""Generate changes of a message's bytes; for most messages none."""


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """Return the bytes after changes: some are replaced, inserted, removed or repeated."""
    result = bytearray(data)
    for place, kind, new in edits:
        at = place % (len(result) + 1)
        match kind:
            case "replace":
                result[at : at + len(new)] = new
            case "insert":
                result[at:at] = new
            case "cut":
                del result[at : at + 1 + place % 50]
            case _:
                result[at:at] = result[at : at + 1 + place % 200]
    return bytes(result)


def resolved(message: Message, meanings: Mapping[str, str]) -> Message:
    """Return the message with placeholders replaced, such as the digest of the current model."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            for each in [value] if not _repeated(field) else value:
                resolved(each, meanings)
        elif field.type == FieldDescriptor.TYPE_STRING:
            if _repeated(field):
                value[:] = [meanings.get(each, each) for each in value]
            else:
                setattr(message, field.name, meanings.get(value, value))
    return message


def _value(field: FieldDescriptor, known: list[str], depth: int) -> _Field:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(_single(key, known, depth), _single(value, known, depth), max_size=5) | st.just(
            {str(number): 1.0 for number in range(300)}
        )
    single = _single(field, known, depth)
    return st.lists(single, max_size=4) if _repeated(field) else single


def _single(field: FieldDescriptor, known: list[str], depth: int) -> _Field:
    kinds: dict[int, Callable[[], _Field]] = {
        FieldDescriptor.TYPE_STRING: lambda: words(known=known),
        FieldDescriptor.TYPE_BYTES: lambda: st.binary(max_size=200),
        FieldDescriptor.TYPE_BOOL: st.booleans,
        FieldDescriptor.TYPE_DOUBLE: lambda: st.sampled_from(_DOUBLES) | st.floats(),
        FieldDescriptor.TYPE_UINT32: lambda: st.sampled_from([number for number in _NUMBERS if number < 2**32]),
        FieldDescriptor.TYPE_UINT64: lambda: st.sampled_from(_NUMBERS),
        FieldDescriptor.TYPE_MESSAGE: lambda: arbitrary(field.message_type, known, depth - 1),
        FieldDescriptor.TYPE_ENUM: lambda: st.integers(0, 7),
    }
    return kinds[field.type]()


def _repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)
