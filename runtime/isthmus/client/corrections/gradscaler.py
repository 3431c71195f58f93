"""What torch.amp's GradScaler has told an optimizer of the step that it takes.

Most optimizers see unscaled gradients, and no step at all where one is infinite. A fused one does both by itself,
inside its step: its hooks see scaled gradients, and steps that change nothing.
"""

import torch


def gradient_scale(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """What the present gradients have been multiplied by; ``None``: nothing."""
    return getattr(optimizer, "grad_scale", None)


def step_is_void(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the present step changes nothing, since a gradient is infinite or NaN."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def add_unscaled(gradient: torch.Tensor, term: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Adds a term to a gradient that is, or is yet to be, divided by ``scale``."""
    if scale is None:
        gradient.add_(term)
    else:
        gradient.add_(term * scale.to(term))
