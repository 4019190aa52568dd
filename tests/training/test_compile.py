"""runtime.compile: the whole step in one graph, the numbers of the step as it is, and machines without a compiler."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.runtime import compiler_problem
from hpdm_core.training import Trainer
from hpdm_core.training.batches import TrainingBatches
from hpdm_core.training.step import joint_loss, rows_in_loss

Make = Callable[..., Assembly]

SMALL = {
    "model": {"video": (4, 8, 12), "levels": 2, "blocks": 2},
    "training": {"batch": 4, "self_conditioning": 0.5, "steps": 2, "warmup": 0},
}
SMALLEST = {
    "model": {"video": (2, 4, 6), "levels": 1, "blocks": 1, "context_fusion": "none", "classes": 0},
    "training": {"batch": 2, "self_conditioning": 0.0, "steps": 2, "warmup": 0},
}
"""Making code takes a second or two per kernel."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpdm_core.training.cost.training_flops", lambda assembly: 1)


@pytest.mark.slow
def test_forward_and_backward_are_one_graph_whatever_rows_are_conditioned(assemble: Make) -> None:
    """fullgraph raises at the first break of the graph; aot_eager traces forward and backward, and makes no code."""
    assembly = assemble(**SMALL)
    model = assembly.build_model()
    torch.nn.init.ones_(model.backbone.recall_gain.weight)
    assert assembly.objective and assembly.noise_sampler and assembly.sigma_in  # as the trainer builds them
    compiled = torch.compile(joint_loss, fullgraph=True, backend="aot_eager")
    make, kept = TrainingBatches(assembly), set()
    for step in (1, 2, 3):
        batch = make(step)
        counts = rows_in_loss(batch)
        kept.add(len(batch.conditioned))
        gradients = []
        for function in (joint_loss, compiled):
            model.zero_grad()
            loss = function(assembly, model, batch, counts)
            loss.total.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 50
        for expected, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected)
    assert len(kept) > 1


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_compiled_training_goes_as_training_as_it_is(assemble: Make) -> None:
    rows: list[list[dict[str, Any]]] = [[], []]
    for compile_it, noted in zip((False, True), rows, strict=True):
        trainer = Trainer(assemble(**SMALLEST, runtime={"compile": compile_it}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            trainer.run(noted.append)
    # Not the weights one by one: a key's bias has no gradient but rounding, which Adam scales up.
    for one, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


def test_without_a_compiler_training_goes_on_and_says_so_once(
    assemble: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING, logger="hpdm_core"):
        trainer = Trainer(assemble(**SMALL, runtime={"compile": True}))
        assert trainer.run()["steps"] == 2
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hpdm_core")]
    assert (
        message.startswith("runtime.compile: No working C++ compiler")
        and "training continues without compilation" in message
    )
    assert "\n" not in message
