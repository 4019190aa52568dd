"""bf16 for the products of the blocks alone, and blocks that are run again instead of kept."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpdm_core.model.execution import Execution
from hpdm_core.model.hpdm import HPDM
from hpdm_core.model.layers import Attention, LayerNorm, Linear
from hpdm_core.testing.small import SETTINGS, entries, network
from hpdm_plugins.model.fusions import DeepFusion

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


PRECISIONS = {
    "attention alone in bf16": (None, torch.bfloat16, {torch.float32}, {torch.bfloat16}),
    "products in bf16, attention in fp32": (torch.bfloat16, torch.float32, {torch.bfloat16}, {torch.float32}),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", PRECISIONS)
def test_attention_has_a_precision_of_its_own(
    case: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul, attention, products, inside = PRECISIONS[case]
    model = build()
    exact = [made.detach() for made, _ in model(entries(SETTING))]
    model.execution = Execution(matmul, attention, checkpointing)
    seen: dict[str, set[torch.dtype]] = {"products": set(), "attended": set()}
    for module in model.modules():
        if isinstance(module, Attention):
            module.q.register_forward_hook(lambda m, i, o: seen["products"].add(o.dtype))
            module.o.register_forward_pre_hook(lambda m, i: seen["products"].add(i[0].dtype))
    with AttentionSeen(seen["attended"]):
        rough = model(entries(SETTING))
        found = gradients(model)
    assert seen == {"products": products, "attended": inside}
    errors = [
        float((made.detach() - other).abs().max()) for (made, _), other in zip(rough, exact, strict=True)
    ]
    assert 1e-6 < max(errors) < 0.1
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    unchanged = F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4)] * 3)
    assert unchanged.dtype == torch.float32  # outside the blocks


class AttentionSeen(TorchDispatchMode):
    """Notes in which type the kernels of fused attention work."""

    def __init__(self, seen: set[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_scaled_dot_product" in str(func) and "backward" not in str(func):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_a_mask_of_booleans_stays_one_and_a_mask_of_numbers_goes_along() -> None:
    class Masked(nn.Module):
        def run(
            self, block: int, tokens: Tensor, latents: Tensor, condition: Tensor
        ) -> tuple[Tensor, Tensor]:
            seen = torch.ones(2, 2, dtype=torch.bool).tril()
            made = F.scaled_dot_product_attention(tokens, key=tokens, value=tokens, attn_mask=seen)
            bias = torch.zeros(2, 2).masked_fill(~seen, -torch.inf)
            return made, F.scaled_dot_product_attention(tokens, tokens, tokens, bias)

    tokens = torch.randn(1, 2, 4)
    execution = Execution(attention_dtype=torch.bfloat16)
    made, other = execution.run(Masked(), 0, tokens, tokens, tokens)  # type: ignore[arg-type]
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, other)
    torch.testing.assert_close(made[0, 0], tokens[0, 0], rtol=1e-2, atol=1e-2)  # sees itself alone
