"""Payload of the baselines."""


def payload(size: int) -> bytes:
    """Return bytes that occupy memory.

    With ``bytes(size)``, the kernel maps one page of zeros for all of it. That page stays in the processor's first
    cache, unlike a model.
    """
    return b"\x01" * size
