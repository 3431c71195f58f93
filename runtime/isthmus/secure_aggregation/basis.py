"""Digest of all that decides what a client's training makes of its data, apart from the data and the script."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus_contracts.wire.parties import canonical

_DOMAIN = "isthmus.dev/secure-aggregation/v1/basis"


@dataclass(frozen=True)
class Settings:
    """The part of an offer beside the model."""

    algorithm: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the strategy."""
    config: Mapping[str, str] = field(default_factory=dict)
    """Configuration of the script in this round."""


def basis_digest(model: str, settings: Settings, companion: str = "") -> str:
    """Return the SHA-256 of what all clients of an instance must have alike, as 64 hexadecimal digits.

    A server that gives the others another model, a learning rate of 0 or an endless proximal term receives no change
    from them, and a sum of the one update that it wants (Pasquini et al., "Eluding Secure Aggregation in Federated
    Learning via Model Inconsistency", CCS 2022). Each client signs the digest of what it was given itself.

    ``model``: SHA-256 of the model's tensors (``tensors.sha256_of``). ``companion``: that of the strategy's auxiliary
    tensors, or an empty string if it has none.
    """
    parts: list[str | int] = [model, settings.algorithm]
    for names in (settings.parameters, settings.config):
        parts.append(len(names))
        for name in sorted(names):
            parts += [name, names[name]]
    return hashlib.sha256(canonical(_DOMAIN, *parts, companion)).hexdigest()
