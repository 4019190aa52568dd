"""Costs counted without running anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.plugins import build_plugins
from hpdm_core.sampling import sample
from hpdm_core.training import cost
from hpdm_core.training.batches import TrainingBatches
from hpdm_core.training.step import joint_loss

D, E, M, N, HEADS, WIDE, K = 12, 8, 5, 8, 2, 6, 2
"""Token and latent width, latents, tokens, heads, inner width of latent attention, condition tokens."""

TINY_RIN = {
    "latent_dim": E,
    "latent_layers": 1,
    "latent_heads": 2,
    "latent_head_dim": WIDE // 2,
    "heads": HEADS,
}


@pytest.fixture(scope="module")
def assemble() -> Callable[..., Assembly]:
    plugins = build_plugins()

    def make(
        *, levels: int = 3, blocks: int = 3, training: dict[str, Any] | None = None, fusion: str = "deep"
    ) -> Assembly:
        q = 2 ** (levels - 1)
        config = {
            "model": {
                "video": (2 * q, 4 * q, 6 * q),
                "patch": (2, 4, 6),
                "token": (1, 2, 3),
                "levels": levels,
                "classes": 4,
                "token_dim": D,
                "blocks": blocks,
                "context_fusion": fusion,
                "backbone": {
                    "use": "rin",
                    "latent_dim": E,
                    "latents": M,
                    "latent_layers": 1,
                    "latent_heads": 2,
                    "latent_head_dim": WIDE // 2,
                    "heads": HEADS,
                },
            },
            "data": {"dataset": "synthetic"},
            "training": {"steps": 10, "batch": 3, "learning_rate": 0.001, **(training or {})},
            "evaluation": {"samples": 7},
        }
        return Assembly(CellConfig.model_validate(config), plugins)

    return make


def attention(queries: int, keys: int, *, width: int, source: int, inner: int) -> int:
    """Multiply-adds of one attention with its four projections."""
    projections = queries * width * inner + 2 * keys * source * inner + queries * inner * width
    return projections + 2 * queries * keys * inner


def forward_by_hand() -> int:
    """Multiply-adds of one video through one level and one block, without noise embedding and recall."""
    block = attention(M, K, width=E, source=D, inner=D) + 2 * M * E * 4 * E
    block += attention(M, N, width=E, source=D, inner=D) + 2 * M * E * 4 * E
    block += attention(M, M, width=E, source=E, inner=WIDE) + 2 * M * E * 4 * E
    block += attention(N, M, width=D, source=E, inner=D) + 2 * N * D * 2 * D
    return block + 2 * N * 18 * D


def test_forward_operations_by_hand_attention_included(assemble: Callable[..., Assembly]) -> None:
    recall, embedding = 2 * M * E * 4 * E, 256 * D + D * D
    flops = {
        share: cost.training_flops(
            assemble(levels=1, blocks=1, training={"self_conditioning": share, "batch": 3})
        )
        for share in (0.5, 1.0)
    }
    # The zeros that the first pass recalls are one row for all videos.
    first_pass = 2 * (3 * (forward_by_hand() + embedding) + recall)
    assert flops[1.0] - flops[0.5] == first_pass // 2
    # Backward makes two products for each of the forward's, but none for the gradients of inputs and latents.
    second_pass = 2 * 3 * (forward_by_hand() + embedding + recall)
    assert (flops[1.0] - first_pass) / second_pass == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("fusion", ["none", "shallow_concat", "deep", "deep_pixels", "deep_levels"])
def test_the_real_step_on_the_cpu_counts_the_same(assemble: Callable[..., Assembly], fusion: str) -> None:
    assert_counted(assemble(training={"self_conditioning": 1.0}, fusion=fusion))


EVER_MORE = """
import torch
from hpdm_core import ContextFusion, hookimpl

class EverMore(ContextFusion):
    def __init__(self, shape):
        super().__init__()
        self.mix = torch.nn.Linear(shape.token_dim, shape.token_dim)

    def token_context(self, block, level, coords, sources):
        made = sources[-1].tokens
        for _ in range(1 + block):
            made = self.mix(made)
        return made

    def fuse(self, block, level, tokens, context, coords, sigma):
        return tokens + context

@hookimpl
def register_context_fusions(register):
    register("ever_more", EverMore, source="a test: every block makes one product more than the one before")
"""


def test_blocks_of_a_fusion_that_says_nothing_of_their_kinds_are_counted_one_by_one(
    assemble: Callable[..., Assembly], tmp_path: Path
) -> None:
    file = tmp_path / "ever_more.py"
    file.write_text(EVER_MORE)
    usual = assemble(training={"self_conditioning": 1.0}, fusion="ever_more")
    assert_counted(Assembly(usual.config, build_plugins([str(file)])))


def assert_counted(assembly: Assembly) -> None:
    """The operations of a training step are those of a real one."""
    model, batch = assembly.build_model(), TrainingBatches(assembly)(1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        joint_loss(assembly, model, batch).total.backward()
    assert cost.training_flops(assembly) == counter.get_total_flops()


def test_operations_grow_with_the_batch_and_the_share_of_self_conditioning(
    assemble: Callable[..., Assembly],
) -> None:
    flops = {
        (batch, share): cost.training_flops(
            assemble(levels=1, blocks=1, training={"batch": batch, "self_conditioning": share})
        )
        for batch, share in ((3, 0.0), (3, 0.5), (3, 1.0), (6, 0.5))
    }
    assert flops[3, 0.0] < flops[3, 0.5] < flops[3, 1.0]
    assert flops[6, 0.5] == pytest.approx(2 * flops[3, 0.5], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "petaflops"), [("s", 5.61), ("m", 6.93), ("l", 10.66)])
def test_the_papers_models_cost_what_an_estimate_by_hand_says(preset: str, petaflops: float) -> None:
    """Three forward passes and 0.9 of a fourth, of 1.90, 2.34 and 3.56 TFLOP, for each of 768 videos, less
    what deep fusion saves by mapping the covered cells of parents only: 0.04 TFLOP of each pass.
    """
    assert cost.training_flops(load_cell(f"ucf101_hpdm_{preset}")) == pytest.approx(
        petaflops * 1e15, rel=0.01
    )


def test_parameters_and_disk(assemble: Callable[..., Assembly]) -> None:
    assembly = assemble(training={"keep": (5,)})
    parameters = sum(p.numel() for p in assembly.build_model().parameters())
    assert cost.count_parameters(assembly) == parameters
    pixels = 3 * sum(2 * 4 * 6 * 8**level for level in range(3))
    # Four checkpoints (two newest, one in the writing, one kept) of four float32 per weight; the final one.
    assert cost.disk_bytes(assembly) == 4 * 16 * parameters + 4 * parameters + 7 * pixels


def test_sampling_operations_are_those_of_the_real_cascade(assemble: Callable[..., Assembly]) -> None:
    """One video with and without a cache, every product counted while it is sampled."""
    apart = cost.sampling_flops(assemble(), cached=False) / cost.sampling_flops(assemble())
    assert apart > 1.5
    for cache, cached in (("contexts", True), ("none", False)):
        assembly = assemble()
        sampling = {"overlap": ("h", "w"), "solver": {"use": "edm", "steps": (2,), "churn": (0.0,)}}
        config = CellConfig.model_validate(
            assembly.config.model_dump() | {"sampling": sampling, "runtime": {"cache": cache}}
        )
        assembly = Assembly(config, assembly.plugins)
        denoiser = assembly.denoiser(assembly.build_model())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sample(assembly, denoiser, [0], [1])
        # Recall from nothing is once per call of the network, whatever its batch: we count it per tile.
        assert cost.sampling_flops(assembly, cached=cached) == pytest.approx(
            counter.get_total_flops(), rel=0.05
        )


def test_memory_of_training_is_counted_with_what_the_machine_is_told(
    assemble: Callable[..., Assembly],
) -> None:
    def memory(**runtime: Any) -> int:
        assembly = assemble(training={"batch": 8})
        config = CellConfig.model_validate(assembly.config.model_dump() | {"runtime": runtime})
        return cost.training_memory(Assembly(config, assembly.plugins))

    weights = 5 * 4 * cost.count_parameters(assemble())
    whole, parts = memory() - weights, memory(micro_batch=4) - weights
    assert whole == pytest.approx(2 * parts, rel=0.05)
    assert memory(activation_checkpointing=True) - weights < 0.5 * whole


def test_predictions_rest_on_the_stated_rate(assemble: Callable[..., Assembly]) -> None:
    assembly = assemble()
    flops = cost.training_flops(assembly)
    made = cost.predicted_training(assembly, flops)
    assert made["flops_per_second"] == pytest.approx(0.4 * 156e12)
    assert made["train_seconds"] == pytest.approx(10 * flops / 62.4e12)
    assert cost.predicted_sampling(assembly) == pytest.approx(7 * cost.sampling_flops(assembly) / 62.4e12)


def test_memory_is_what_a_real_step_keeps_for_its_backward_pass(assemble: Callable[..., Assembly]) -> None:
    """Attention keeps no weights of pairs there, whatever form of it the meta device would run."""
    assembly = assemble()
    many = assembly.config.model_copy(
        update={
            "model": assembly.config.model.model_copy(
                update={
                    "token": (1, 1, 1),
                    "backbone": Part(use="rin", options={**TINY_RIN, "latents": 64}),
                }
            )
        }
    )
    assembly = Assembly(many, assembly.plugins)
    model, batch = assembly.build_model(), TrainingBatches(assembly)(1)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = joint_loss(assembly, model, batch)
    real = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    assert loss.total.requires_grad
    predicted = cost.training_memory(assembly) - 5 * 4 * cost.count_parameters(assembly)
    assert predicted == pytest.approx(real, rel=0.1)
