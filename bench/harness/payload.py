"""The bytes that the bare sides carry."""


def payload(size: int) -> bytes:
    """So many bytes that are really in memory. ``bytes(size)`` is not: the kernel shows one page of zeros for all of
    it, which the processor then has in its nearest cache, and no model is that small."""
    return b"\x01" * size
