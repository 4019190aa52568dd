"""The built-in optimizers: LAMB (the paper's) and AdamW (for short runs)."""

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.training.optimizer.lamb import Lamb

__all__ = ["adamw", "lamb", "register_optimizers"]

Beta = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def lamb(
    named_parameters: Iterable[tuple[str, Parameter]],
    lr: float,
    *,
    betas: tuple[Beta, Beta] = (0.9, 0.99),
    eps: NotNegative = 1e-8,
    weight_decay: NotNegative = 0.01,
) -> Optimizer:
    """Return LAMB with the paper's weight decay; see `hpdm_core.training.optimizer.lamb.Lamb`."""
    return Lamb(named_parameters, lr, betas=betas, eps=eps, weight_decay=weight_decay)


def adamw(
    named_parameters: Iterable[tuple[str, Parameter]],
    lr: float,
    *,
    betas: tuple[Beta, Beta] = (0.9, 0.99),
    eps: NotNegative = 1e-8,
    weight_decay: NotNegative = 0.01,
) -> Optimizer:
    """Return AdamW; weight decay applies only to parameters of two or more axes.

    The fused kernel is used if the device has one.
    """
    parameters = [parameter for _, parameter in named_parameters]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED_DEVICES and torch.is_floating_point(p) for p in parameters)
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=fused)


@hookimpl
def register_optimizers(register: Register) -> None:
    """Add lamb and adamw."""
    register("lamb", lamb, source="You et al. 2020, arXiv 1904.00962; HPDM, arXiv 2406.07792, table 8")
    register("adamw", adamw, source="Loshchilov & Hutter 2019, arXiv 1711.05101")
