"""State that torch.amp's GradScaler sets on an optimizer for its step.

Most optimizers get unscaled gradients, and their step is skipped if a gradient is infinite. A fused optimizer does both
inside its step: its hooks see scaled gradients, and also steps that change nothing.
"""

import torch


def gradient_scale(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Return the factor by which the present gradients are multiplied, or ``None``."""
    return getattr(optimizer, "grad_scale", None)


def step_is_void(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the present step changes nothing because a gradient is infinite or NaN."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def add_unscaled(gradient: torch.Tensor, term: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Add a term to a gradient that will be divided by ``scale``, if that is not ``None``."""
    if scale is None:
        gradient.add_(term)
    else:
        gradient.add_(term * scale.to(term))
