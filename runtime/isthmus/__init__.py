"""Isthmus: the API for training scripts.

import isthmus

for rnd in isthmus.rounds(model, evaluate=lambda: {"accuracy": accuracy(model, held_out)}):
    loss = train(model, loader, rnd.config)
    rnd.submit(num_examples=len(data), loss=loss)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.context import Context, context
    from .client.errors import FederationError, ScriptError
    from .client.round import Round
    from .client.rounds import rounds

__version__ = version("isthmus")
__all__ = ["Context", "FederationError", "Round", "ScriptError", "context", "rounds"]

# torch takes seconds to import, so these modules are imported on first use: the command line needs few of them.
_MODULES = {
    "Context": ".client.context",
    "context": ".client.context",
    "FederationError": ".client.errors",
    "Round": ".client.round",
    "ScriptError": ".client.errors",
    "rounds": ".client.rounds",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value
