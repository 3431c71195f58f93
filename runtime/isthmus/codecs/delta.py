"""Delta: the difference from a model that both sides hold.

Konecny et al., "Federated Learning: Strategies for Improving Communication Efficiency" (2016), section 1: the update
is compressed, which is small compared with the weights, so the same relative error is a small absolute one.
"""

import torch


def difference(values: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """Return the values minus the base, or without a base the values, in float32. Never a view of the arguments."""
    if base is None:
        return values.to(torch.float32, copy=True)
    # Half precision is subtracted in single precision, which holds the difference exactly.
    if values.dtype == torch.float64:
        return (values - base).to(torch.float32)
    return values.float() - base.float()


def applied(change: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write the base plus the change to ``out``, which may be the base itself."""
    if base is None:
        out.copy_(change)
    elif out.dtype in (torch.float32, torch.float64):
        torch.add(base, change, out=out)
    else:
        out.copy_(base.float() + change)


def landed(change: torch.Tensor, base: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the change of a receiver's tensor of this dtype: half precision rounds the sum of base and change."""
    if base is None or dtype not in (torch.float16, torch.bfloat16):
        return change
    out = torch.empty_like(base, dtype=dtype)
    applied(change, base, out)
    return difference(out, base)
