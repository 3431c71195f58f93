"""The server's side of the protocol."""

from .protocol import ServerProtocol

__all__ = ["ServerProtocol"]
