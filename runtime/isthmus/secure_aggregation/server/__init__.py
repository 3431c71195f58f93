"""The server's side of the protocol."""

from .protocol import ServerProtocol
from .recovery import UnmaskPlan

__all__ = ["ServerProtocol", "UnmaskPlan"]
