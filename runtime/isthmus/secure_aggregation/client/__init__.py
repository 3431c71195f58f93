"""The client's side of the protocol."""

from .instance import Masks
from .protocol import ClientProtocol

__all__ = ["ClientProtocol", "Masks"]
