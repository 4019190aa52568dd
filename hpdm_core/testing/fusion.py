"""Contract of context fusions.

The checks call the fusion's methods directly, and run it in a small network (`hpdm_core.testing.small`).
Most add a small random perturbation to its initial parameters, because gates that start at zero would hide errors.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hpdm_core.base.randomness import normal
from hpdm_core.model.fusion import ContextFusion
from hpdm_core.model.hpdm import HPDM, Patches
from hpdm_core.testing.case import Case, expect, expect_close, leaves_global_rng_alone
from hpdm_core.testing.small import (
    BATCH,
    SETTINGS,
    SINGLE_LEVEL,
    TOKEN_DIM,
    Setting,
    call_fuse,
    call_pixel_context,
    call_token_context,
    entries,
    network,
)

__all__ = ["ContextFusionCases"]

SIGMAS = (0.002, 80.0, 1000.0)
"""Both ends of the usual range, and a value that occurs with an input scale below 1."""


class ContextFusionCases(Case):
    """``factory(shape, *, ...) -> ContextFusion``."""

    family: ClassVar[str] = "context_fusions"
    settings: Sequence[Setting] = SETTINGS

    # The fusion alone

    def test_is_a_fusion(self) -> None:
        """It is a ContextFusion with an integer number of extra channels, also for a single level."""
        for setting in (*self.settings, SINGLE_LEVEL):
            fusion = self.make(setting.shape)
            expect(
                isinstance(fusion, ContextFusion), f"{type(fusion).__name__} does not extend ContextFusion"
            )
            count = fusion.extra_channels
            expect(isinstance(count, int) and count >= 0, f"extra_channels: {count!r}, wanted 0 or more")

    @torch.no_grad()
    def test_shapes(self) -> None:
        """For every block and level: pixel context [B, extra_channels, F, H, W] or None, token context batch-first or
        None, and the shape and dtype of tokens unchanged.
        """
        for setting in self.settings:
            fusion, patches = self._moved(setting), entries(setting)
            for level in range(1, setting.pyramid.levels):
                made = call_pixel_context(setting, patches, level, fusion)
                wanted = [BATCH, fusion.extra_channels, *setting.pyramid.patch]
                if made is not None:
                    given = list(made.shape)
                    expect(given == wanted, f"level {level}: pixel_context gives {given}, wanted {wanted}")
                    expect(made.dtype == torch.float32, f"level {level}: pixel_context gives {made.dtype}")
            for block, level in setting.calls:
                where = f"block {block}, level {level}"
                tokens = self._tokens(setting)
                context = call_token_context(setting, patches, block, level, fusion)
                if context is not None:
                    batched = isinstance(context, Tensor) and context.shape[:1] == (BATCH,)
                    what = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
                    expect(
                        batched,
                        f"{where}: token_context gives {what}, wanted a tensor of {BATCH} rows or None",
                    )
                kept = tokens.clone()
                fused = call_fuse(patches, block, level, tokens, context, fusion)
                expect(
                    torch.equal(tokens, kept), f"{where}: fuse changes the tokens that it is handed in place"
                )
                expect(
                    fused.shape == tokens.shape,
                    f"{where}: fuse gives {list(fused.shape)}, wanted {list(tokens.shape)}",
                )
                expect(
                    fused.dtype == tokens.dtype, f"{where}: fuse gives {fused.dtype}, wanted {tokens.dtype}"
                )

    @torch.no_grad()
    def test_rows_are_independent(self) -> None:
        """Row i of every result depends on row i only: each row computed alone is the same."""
        for setting in self.settings:
            fusion, patches = self._moved(setting), entries(setting)
            for row in range(BATCH):
                one = torch.tensor([row])
                for level in range(1, setting.pyramid.levels):
                    together = call_pixel_context(setting, patches, level, fusion)
                    if together is not None:
                        alone = call_pixel_context(setting, patches, level, fusion, rows=one)
                        what = f"level {level}: pixel_context of row {row} alone"
                        expect_close(self._present(alone, what), together[one], what, tolerance=1e-5)
                for block, level in setting.calls:
                    where = f"block {block}, level {level}"
                    context = call_token_context(setting, patches, block, level, fusion)
                    if context is not None:
                        alone = call_token_context(setting, patches, block, level, fusion, rows=one)
                        what = f"{where}: token_context of row {row} alone"
                        expect_close(self._present(alone, what), context[one], what, tolerance=1e-5)
                    tokens = self._tokens(setting)
                    together = call_fuse(patches, block, level, tokens, context, fusion)
                    kept = None if context is None else context[one]
                    alone = call_fuse(patches, block, level, tokens[one], kept, fusion, rows=one)
                    expect_close(alone, together[one], f"{where}: fuse of row {row} alone", tolerance=1e-5)

    @torch.no_grad()
    def test_keeps_no_state(self) -> None:
        """No call changes the result of a later one: contexts do not depend on a child, nor tiles on other tiles."""
        for setting in self.settings:
            mine, others = self._calls(setting, seed=0), self._calls(setting, seed=1)
            used = self._moved(setting)
            for what, call in mine:
                wanted = call(self._moved(setting))  # never called before
                for _, other in others:
                    other(used)
                given = call(used)
                if wanted is None or given is None:
                    expect(wanted is given, f"{what}: None depends on earlier calls")
                else:
                    expect_close(given, wanted, f"{what} after calls for other patches", tolerance=1e-6)

    @torch.no_grad()
    def test_deterministic(self) -> None:
        """Built twice with one seed, its parameters are bitwise equal; called twice, its results are."""
        for setting in self.settings:
            first, second = self.make(setting.shape), self.make(setting.shape)
            for (name, one), (_, two) in zip(
                first.state_dict().items(), second.state_dict().items(), strict=True
            ):
                expect(torch.equal(one, two), f"built twice under one seed, {name} differs")
            one, two = network(setting, first), network(setting, second)
            wanted = self._outputs(one, entries(setting))
            with leaves_global_rng_alone("the fusion"):
                again, rebuilt = self._outputs(one, entries(setting)), self._outputs(two, entries(setting))
            for level, each in enumerate(wanted):
                expect(torch.equal(again[level], each), f"level {level}: called twice, the result differs")
                expect(torch.equal(rebuilt[level], each), f"level {level}: built twice, the result differs")

    # The fusion in a network

    def test_coarse_to_fine(self) -> None:
        """Coarse outputs do not depend on finer levels: checked by gradients, by changing and dropping finer levels."""
        for setting in self.settings:
            model = network(setting, self._moved(setting))
            patches = entries(setting)
            inputs = [entry.noisy.clone().requires_grad_() for entry in patches]
            outputs = self._outputs(
                model, [replace(e, noisy=x) for e, x in zip(patches, inputs, strict=True)]
            )
            for level, output in enumerate(outputs):
                finer = inputs[level + 1 :]
                if finer:
                    gradients = torch.autograd.grad(
                        output.square().sum(), finer, retain_graph=True, allow_unused=True
                    )
                    for above, gradient in enumerate(gradients, start=level + 1):
                        leak = gradient is not None and bool((gradient != 0).any())
                        expect(not leak, f"level {level}'s output has a gradient to level {above}'s input")
            with torch.no_grad():
                wanted = self._outputs(model, patches)
                for level in range(1, setting.pyramid.levels):
                    other = entries(setting, seed=1)[level]
                    changed = replace(other, coords=patches[level].coords, label=torch.tensor([1, 0, 0]))
                    given = self._outputs(model, [*patches[:level], changed, *patches[level + 1 :]])
                    fewer = self._outputs(model, patches[:level])
                    for below in range(level):
                        what = f"level {below}'s output with another patch on level {level}"
                        expect_close(given[below], wanted[below], what, tolerance=1e-6)
                        what = f"level {below}'s output without levels from {level} on"
                        expect_close(fewer[below], wanted[below], what, tolerance=1e-5)

    @torch.no_grad()
    def test_joint_equals_cached(self) -> None:
        """The joint pass of all levels equals a pass of one level with precomputed contexts, also for selected rows."""
        for setting in self.settings:
            model = network(setting, self._moved(setting))
            patches = entries(setting)
            rows = torch.tensor([2, 0, 0, 1])
            encoded: list[Any] = []
            ready = []  # the entries of the second pass of self-conditioning, in which parents are encoded
            cached = []
            for level, entry in enumerate(patches):
                contexts = model.contexts(level, entry.coords, encoded) if level else None
                alone = replace(entry, sources=())
                ((_, latents),) = model([alone], [contexts])
                alone = replace(alone, latents=latents)
                ((output, _),) = model([alone], [contexts])
                cached.append(output)
                ready.append(replace(entry, latents=latents))
                encoded.append(model.encode(entry, encoded))
                if contexts is not None:
                    taken = replace(
                        alone,
                        noisy=alone.noisy[rows],
                        sigma=alone.sigma[rows],
                        coords=alone.coords.take(rows),
                        label=None if alone.label is None else alone.label[rows],
                        latents=latents[rows],
                    )
                    ((again, _),) = model([taken], [contexts.take(rows)])
                    expect_close(again, output[rows], f"level {level} from taken contexts", tolerance=1e-5)
            for level, output in enumerate(self._outputs(model, ready)):
                expect_close(
                    cached[level], output, f"level {level} from contexts computed before", tolerance=1e-5
                )

    def test_finite_at_the_ends_of_sigma(self) -> None:
        """Outputs and gradients are finite at sigma .002, 80 and 1000, also with parents without noise."""
        for setting in self.settings:
            for sigma in SIGMAS:
                for parents in (sigma, 0.0):
                    model = network(setting, self.make(setting.shape))
                    patches = entries(setting, sigma=parents)
                    patches[-1] = replace(patches[-1], sigma=torch.full((BATCH,), sigma))
                    outputs = self._outputs(model, patches)
                    what = f"at sigma {sigma} with parents at sigma {parents}"
                    for level, output in enumerate(outputs):
                        expect(
                            bool(torch.isfinite(output).all()),
                            f"level {level}: the output is not finite {what}",
                        )
                    torch.stack([output.square().mean() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    for name, parameter in model.fusion.named_parameters():
                        gradient = parameter.grad
                        finite = gradient is None or bool(torch.isfinite(gradient).all())
                        expect(finite, f"the gradient of {name} is not finite {what}")

    def test_gradients_reach_used_parameters(self) -> None:
        """Every parameter that affects an output has a gradient."""
        for setting in self.settings:
            model = network(setting, self._moved(setting))
            patches = entries(setting)
            outputs = self._outputs(model, patches)
            torch.stack([output.square().mean() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            for name, parameter in model.fusion.named_parameters():
                if not parameter.requires_grad:
                    continue
                before = parameter.detach().clone()
                with torch.no_grad():
                    parameter.add_(0.1 * normal(parameter.shape, 2, "conformance", name))
                    moved = self._outputs(model, patches)
                    parameter.copy_(before)
                used = any(not torch.equal(one, two) for one, two in zip(moved, outputs, strict=True))
                reached = parameter.grad is not None and bool((parameter.grad != 0).any())
                expect(reached or not used, f"{name} changes the output, but no gradient reaches it")

    @torch.no_grad()
    def test_state_dict_round_trip(self) -> None:
        """Its state dict, saved and loaded into a fusion of another seed, gives bitwise equal outputs."""
        for setting in self.settings:
            first = network(setting, self._moved(setting))
            second = network(setting, self.make(setting.shape, seed=7), seed=7)
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
            wanted, given = (self._outputs(model, entries(setting)) for model in (first, second))
            for level, (one, two) in enumerate(zip(given, wanted, strict=True)):
                expect(torch.equal(one, two), f"level {level}: loaded from a state dict, the output differs")

    @torch.no_grad()
    def test_single_level(self) -> None:
        """A model with a single level, without any context, runs."""
        model = network(SINGLE_LEVEL, self.make(SINGLE_LEVEL.shape))
        (output,) = self._outputs(model, entries(SINGLE_LEVEL))
        expect(bool(torch.isfinite(output).all()), "the output of a model of one level is not finite")

    @torch.no_grad()
    def test_copies(self) -> None:
        """A deep copy, as the weight average needs one, gives the same outputs and shares no parameters."""
        setting = self.settings[0]
        fusion = self._moved(setting)
        twin = copy.deepcopy(fusion)
        wanted = self._outputs(network(setting, fusion), entries(setting))
        for parameter in fusion.parameters():
            parameter.fill_(float("nan"))
        given = self._outputs(network(setting, twin), entries(setting))
        for level, (one, two) in enumerate(zip(given, wanted, strict=True)):
            expect_close(one, two, f"level {level}: the output of a deep copy", tolerance=1e-6)

    def test_meta_device(self) -> None:
        """It is built and run on the meta device, where parameters and FLOPs are counted."""
        setting = self.settings[0]
        with torch.device("meta"):
            fusion = self.make(setting.shape)
        model = network(setting, fusion, device="meta")
        patches = [self._to_meta(entry) for entry in entries(setting)]
        for level, output in enumerate(self._outputs(model, patches)):
            expect(output.is_meta, f"level {level}: on the meta device the output is on {output.device}")

    # How the checks call a fusion

    def _moved(self, setting: Setting) -> ContextFusion:
        """Return a fusion with slightly perturbed initial parameters."""
        fusion: ContextFusion = self.make(setting.shape)
        with torch.no_grad():
            for name, parameter in fusion.named_parameters():
                parameter.add_(0.1 * normal(parameter.shape, 1, "conformance", name))
        return fusion

    @staticmethod
    def _outputs(model: HPDM, patches: Sequence[Patches]) -> list[Tensor]:
        return [output for output, _ in model(patches)]

    @staticmethod
    def _present(made: Tensor | None, what: str) -> Tensor:
        if made is None:
            raise AssertionError(f"{what}: None, but not for all rows together")
        return made

    @staticmethod
    def _tokens(setting: Setting, *, seed: int = 0) -> Tensor:
        f, h, w = setting.pyramid.grid
        return normal((BATCH, f * h * w, TOKEN_DIM), seed, "conformance", "child")

    @staticmethod
    def _to_meta(entry: Patches) -> Patches:
        moved = {name: getattr(entry, name) for name in ("noisy", "sigma", "coords", "label")}
        return replace(
            entry, **{name: value.to("meta") for name, value in moved.items() if value is not None}
        )

    def _calls(
        self, setting: Setting, *, seed: int
    ) -> list[tuple[str, Callable[[ContextFusion], Tensor | None]]]:
        """Return (name, call) for every call that a pass over the patches of ``seed`` makes."""
        patches = entries(setting, seed=seed)
        tokens = self._tokens(setting, seed=seed)
        made: list[tuple[str, Callable[[ContextFusion], Tensor | None]]] = []
        for level in range(1, setting.pyramid.levels):
            made.append(
                (f"level {level}: pixel_context", partial(call_pixel_context, setting, patches, level))
            )
        for block, level in setting.calls:
            where = f"block {block}, level {level}"
            made.append(
                (f"{where}: token_context", partial(call_token_context, setting, patches, block, level))
            )
            context = call_token_context(setting, patches, block, level, self._moved(setting))
            made.append((f"{where}: fuse", partial(call_fuse, patches, block, level, tokens, context)))
        return made
