"""Initial weights, keyed by (seed, parameter name).

Therefore, in all arms of a seed, parameters of equal name and shape have equal initial values. A plugin's own
layers keep the values that their constructors drew; the assembly runs these constructors with torch's global
generator seeded from a keyed stream.
"""

from __future__ import annotations

import torch
from torch import nn

from hpdm_core.base.randomness import generator
from hpdm_core.model.layers import MLP, TABLE_STD, Attention, Initialised, Table

__all__ = ["initialise"]


@torch.no_grad()
def initialise(
    model: nn.Module, *, seed: int, table_std: float = TABLE_STD, zero_residual: bool = False
) -> None:
    """Set, in place, every parameter of an `Initialised` module to its initial value, drawn from its own stream.

    The stream is (seed, "parameter", full name). Values are drawn on the CPU, so they are the same on every
    device. ``table_std``: standard deviation of learned tables; ``zero_residual``: the weights of the last linear
    layer of every attention and MLP, and of the network's output layer, start at zero.
    """
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not isinstance(module, Initialised):
            continue
        for name, parameter in own.items():
            full = f"{prefix}.{name}" if prefix else name
            parameter.copy_(module.initial(name, generator(seed, "parameter", full)))
        if isinstance(module, Table):
            module.rows.mul_(table_std / TABLE_STD)
    if zero_residual:
        for module in model.modules():
            if isinstance(module, Attention):
                module.o.weight.zero_()
            elif isinstance(module, MLP):
                module.down.weight.zero_()
        output = getattr(model, "output", None)
        if isinstance(output, nn.Linear):
            output.weight.zero_()
