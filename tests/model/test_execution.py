"""bf16 for the products of the blocks alone, and blocks that are run again instead of kept."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpdm_core.model.execution import Execution
from hpdm_core.model.hpdm import HPDM
from hpdm_core.model.layers import Attention, LayerNorm, Linear
from hpdm_core.testing.small import SETTINGS, entries, network
from hpdm_plugins.fusions import DeepFusion

SETTING = SETTINGS[0]


def build() -> HPDM:
    return network(SETTING, DeepFusion(SETTING.shape))


def loss_of(model: HPDM) -> Tensor:
    return torch.stack([made.square().mean() for made, _ in model(entries(SETTING))]).sum()


def gradients(model: HPDM) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_bf16_is_for_products_in_blocks_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    exact = [made.detach() for made, _ in model(entries(SETTING))]
    model.execution = Execution(matmul_dtype=torch.bfloat16)
    seen: dict[str, set[Any]] = {}

    def note(name: str, tensors: Any) -> None:
        seen.setdefault(name, set()).update(t.dtype for t in tensors if isinstance(t, Tensor))

    for name, module in model.named_modules():
        if isinstance(module, LayerNorm):
            module.register_forward_hook(lambda m, i, o: note("norm", (*i, o)))
        elif isinstance(module, Linear):
            inside = name.startswith("backbone.blocks")
            module.register_forward_hook(
                lambda m, i, o, kind="inside" if inside else "outside": note(kind, (o,))
            )
        elif isinstance(module, Attention):
            module.register_forward_hook(lambda m, i, o: note("attention", (o,)))
    run = model.backbone.run

    def noted(block: int, tokens: Tensor, latents: Tensor, condition: Tensor) -> Any:
        made = run(block, tokens, latents, condition)
        note("residuals", (tokens, latents, *made))
        return made

    monkeypatch.setattr(model.backbone, "run", noted)
    rough = model(entries(SETTING))
    half, full = {torch.bfloat16}, {torch.float32}
    assert seen == {"norm": full, "inside": half, "outside": full, "attention": half, "residuals": full}
    errors = [
        float((made.detach() - other).abs().max()) for (made, _), other in zip(rough, exact, strict=True)
    ]
    assert 1e-5 < max(errors) < 0.1
    assert {gradient.dtype for gradient in gradients(model).values()} == full


def test_blocks_that_are_run_again_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    calls: list[int] = []
    run = model.backbone.run

    def counted(block: int, *tensors: Tensor) -> Any:
        calls.append(block)
        return run(block, *tensors)

    monkeypatch.setattr(model.backbone, "run", counted)
    expected = gradients(model)
    assert calls == [0, 1, 2]
    calls.clear()
    model.execution = Execution(checkpointing=True)
    got = gradients(model)
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    with torch.no_grad():
        calls.clear()
        model(entries(SETTING))
        assert calls == [0, 1, 2]


def test_a_backbone_that_ends_with_a_product_keeps_float32_streams() -> None:
    class Product(nn.Linear):
        def run(
            self, block: int, tokens: Tensor, latents: Tensor, condition: Tensor
        ) -> tuple[Tensor, Tensor]:
            return self(tokens), self(latents)

    tokens, latents = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    made = Execution(matmul_dtype=torch.bfloat16).run(Product(3, 3), 0, tokens, latents, tokens)  # type: ignore[arg-type]
    assert [tensor.dtype for tensor in made] == [torch.float32] * 2
