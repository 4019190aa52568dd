"""LAMB: Adam whose step on each matrix is rescaled to a fixed share of the matrix's norm.

You et al. 2020 (arXiv 1904.00962), in the version of TensorFlow Addons, as in the paper's recipe: moments are
bias-corrected, weight decay is part of the rescaled update, the trust ratio is not clamped. Vectors (biases,
gains) have neither decay nor rescaling and get plain Adam steps. Not here: gradient clipping
(`hpdm_core.training.trainer` does it).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError
from hpdm_core.training.shards import local

__all__ = ["Lamb"]

PART = 2**25
"""Number of values that are updated together: 128 MiB of float32."""


class Lamb(Optimizer):
    """Layer-wise adaptive Adam over ``named_parameters``.

    With ``u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w`` a parameter of two or more axes moves by ``-lr
    * (|w| / |u|) * u`` (``-lr * u`` where a norm is 0), any other by ``-lr * m_hat / (sqrt(v_hat) + eps)``.
    Moments are float32 (float64 for float64 weights). The norm is taken over the whole tensor, even if it is
    sharded or a fused projection.

    Raises `InputError` when a parameter of two or more axes has norm 0: a step that is a fixed share of its norm
    would never move it.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        named = list(named_parameters)
        _refuse_zeros([(name, parameter) for name, parameter in named if parameter.ndim > 1])
        matrices = [parameter for _, parameter in named if parameter.ndim > 1]
        vectors = [parameter for _, parameter in named if parameter.ndim <= 1]
        groups = [
            {"params": matrices, "adapt": True, "weight_decay": weight_decay},
            {"params": vectors, "adapt": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update of every parameter that has a gradient; return what ``closure`` returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for part in _parts(parameters):
                self._update(group, part)
        return result

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                wide = torch.promote_types(parameter.dtype, torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
            state["step"] += 1
        states = [self.state[parameter] for parameter in parameters]
        # Each process updates its own part of sharded tensors; only the norms need communication.
        first = [local(state["exp_avg"]) for state in states]
        second = [local(state["exp_avg_sq"]) for state in states]
        weights = [local(parameter) for parameter in parameters]
        gradients = [
            local(cast(Tensor, parameter.grad)).to(moment.dtype)
            for parameter, moment in zip(parameters, first, strict=True)
        ]
        beta1, beta2 = group["betas"]

        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        # u = (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * w
        updates = torch._foreach_sqrt(second)
        torch._foreach_div_(updates, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
        torch._foreach_add_(updates, group["eps"])
        updates = torch._foreach_div(first, updates)
        torch._foreach_div_(updates, [1 - beta1 ** state["step"] for state in states])
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            sharded = weights[0] is not parameters[0]
            torch._foreach_mul_(updates, _trust_ratios(tuple(weights), tuple(updates), sharded=sharded))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split ``parameters`` into groups of about `PART` values, so that temporary tensors of an update stay small.

    The size of a sharded parameter is that of the whole tensor, so that every process makes the same groups.
    """
    part: list[Tensor] = []
    for parameter in parameters:
        part.append(parameter)
        if sum(each.numel() for each in part) >= PART:
            yield part
            part = []
    if part:
        yield part


def _refuse_zeros(matrices: list[tuple[str, Parameter]]) -> None:
    known = [(name, parameter) for name, parameter in matrices if parameter.device.type != "meta"]
    if not known:
        return
    counts = torch.stack([local(parameter.detach()).any().float() for _, parameter in known])
    for (name, parameter), count in zip(known, distributed.total(counts).tolist(), strict=True):
        if not count:
            raise InputError(
                f"training.optimizer: 'lamb' cannot train '{name}' (shape {list(parameter.shape)}), which "
                "starts with norm 0: LAMB moves a matrix by a share of its norm; give it non-zero weights or "
                "use 'adamw'"
            )


def _trust_ratios(weights: tuple[Tensor, ...], updates: tuple[Tensor, ...], *, sharded: bool) -> list[Tensor]:
    """Return |w| / |u| per whole tensor, 1 where either norm is 0, without a device synchronisation.

    ``sharded``: the tensors are this process's parts; norms are taken over the parts of all processes.
    """
    norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(updates)])
    if sharded:
        norms = distributed.total(norms.square()).sqrt()
    weight, update = norms.chunk(2)
    defined = (weight > 0) & (update > 0)
    ratio = torch.where(defined, weight / torch.where(defined, update, 1.0), 1.0)
    return list(ratio.unbind())
