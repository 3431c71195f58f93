"""Modules that only wrap another one, and the prefixes that they add to the names of a model's state.

A wrapper is recognised by its class, not by the name of its attribute: a model may have a submodule ``module`` too.
"""

import sys

import torch

_Kind = tuple[str, str, str]

# The module that defines each class, the class's name, and the attribute that holds the inner module. A class whose
# module has not been imported has no instances.
_WRAPPERS: tuple[_Kind, ...] = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("opacus.grad_sample.gsm_base", "AbstractGradSampleModule", "_module"),
    ("apex.parallel.distributed", "DistributedDataParallel", "module"),
)


def wrapped_in(module: object) -> tuple[str, torch.nn.Module] | None:
    """Return a wrapper's attribute for its inner module, and that module; ``None`` if the object is no wrapper."""
    if not isinstance(module, torch.nn.Module):
        return None
    for home, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(home), name, None)
        if isinstance(kind, type) and isinstance(module, kind):
            inner = getattr(module, attribute, None)
            return (attribute, inner) if isinstance(inner, torch.nn.Module) else None
    return None


def plain_names(model: object, names: list[str]) -> dict[str, str]:
    """Map names in a model's state to their names without wrappers, at any depth."""
    if not isinstance(model, torch.nn.Module) or not any(wrapped_in(module) for module in model.modules()):
        return {name: name for name in names}
    return {name: _plain(model, name) for name in names}


def _plain(model: torch.nn.Module, name: str) -> str:
    kept: list[str] = []
    module: torch.nn.Module | None = model
    parts = name.split(".")
    while parts:
        while module is not None and (found := wrapped_in(module)) is not None:
            attribute, module = found
            # Some wrappers remove their prefix from the names themselves.
            if parts[0] == attribute:
                parts.pop(0)
        if not parts:
            break
        part = parts.pop(0)
        kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(kept)
