"""A training step of HPDM-S on a pretended GPU: devices, types, and what the host waits for.

The whole of `hpdm_core.training.trainer.Trainer._step` runs: batch, both passes, clipping, optimizer, average. Its
backward pass can not be pretended (`tests.gpu_ready.conftest`): gradients are put where it would leave them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.model.layers import Attention
from hpdm_core.training.probe import _random_batch
from hpdm_core.training.step import joint_loss
from hpdm_core.training.trainer import Trainer

MOST = 3
"""What the host may wait for in a step: its loss, the losses per level, the norm of the gradient."""


def attention_types(trainer: Trainer) -> set[torch.dtype]:
    """Note the types of what attention gives, from now on."""
    found: set[torch.dtype] = set()
    for part in trainer.model.modules():
        if isinstance(part, Attention):
            part.o.register_forward_pre_hook(lambda _, given: found.add(given[0].dtype))
    return found


@pytest.mark.parametrize(
    ("precision", "optimizer", "checkpointing", "parts"),
    [("tf32", "lamb", False, 1), ("bf16", "adamw", True, 2)],
)
def test_a_step_stays_on_the_gpu_and_waits_for_three_numbers(
    precision: str,
    optimizer: str,
    checkpointing: bool,
    parts: int,
    hpdm_s: Callable[..., Assembly],
    pretend: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assembly = hpdm_s(
        f"training.precision={precision}",
        f"training.optimizer={optimizer}",
        f"runtime.activation_checkpointing={str(checkpointing).lower()}",
        f"runtime.micro_batch={2 // parts}",
    )
    trainer = Trainer(assembly)
    types = attention_types(trainer)
    losses: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        assert loss.grad_fn is not None
        losses.append(loss)
        for _, parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    batch = _random_batch(assembly, 1)
    assert len(batch.conditioned) == len(batch.label) == 2
    pretend.found.clear()
    figures = trainer.step(batch)

    assert pretend.found.total() <= MOST, pretend.found
    assert len(losses) == parts and len(figures["loss"]) == 3
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(loss.device.type == "cuda" and loss.dtype == torch.float32 for loss in losses)
    moments = [each for state in trainer.optimizer.state.values() for each in state.values()]
    tensors = [each for each in moments if isinstance(each, Tensor) and each.ndim]
    assert len(tensors) >= 2 * sum(parameter.ndim > 0 for _, parameter in trainer.parameters)
    for each in (*tensors, *trainer.model.parameters(), *trainer.ema_model.parameters()):
        assert each.device.type == "cuda" and each.dtype == torch.float32


@pytest.mark.parametrize(
    ("fusion", "noise"),
    [("deep", "clean_stream"), ("shallow_concat", "independent"), ("none", "independent")],
)
def test_the_joint_loss_waits_for_nothing(
    fusion: str, noise: str, hpdm_s: Callable[..., Assembly], pretend: Any
) -> None:
    assembly = hpdm_s(f"model.context_fusion={fusion}", f"diffusion.noise_sampling={noise}")
    model = assembly.build_model(device="cuda")
    batch = _random_batch(assembly, 1).to(torch.device("cuda"))
    pretend.found.clear()
    loss = joint_loss(assembly, model, batch)
    assert not pretend.found.total(), pretend.found
    assert loss.total.device.type == loss.levels.device.type == "cuda"
    assert loss.total.dtype == torch.float32 and loss.levels.shape == (3,)
