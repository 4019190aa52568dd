"""Contract of backbones: blocks that process tokens, with or without latents."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from hpdm_core.base.randomness import generator, normal
from hpdm_core.model.initialise import initialise
from hpdm_core.testing.case import Case, expect, expect_close, leaves_global_rng_alone

if TYPE_CHECKING:
    from hpdm_core.model.backbone import Backbone

__all__ = ["BackboneCases"]


class BackboneCases(Case):
    """``factory(token_dim, blocks, *, ...)`` or ``factory(token_dim, blocks, grid, *, ...) -> Backbone``.

    A backbone without latent state returns None from ``start`` and None as latents from ``run``. Most checks add a
    small random perturbation to the initial parameters, because gates that start at zero would hide errors.
    """

    family: ClassVar[str] = "backbones"
    token_dim = 16
    blocks = 2
    batch = 2
    grid = (2, 3, 4)
    tokens = 24
    conditions = 2

    def _inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        stream = generator(seed, "conformance", "backbone")
        tokens = torch.randn(self.batch, self.tokens, self.token_dim, generator=stream)  # [B, N, D]
        condition = torch.randn(self.batch, self.conditions, self.token_dim, generator=stream)  # [B, K, D]
        return tokens, condition

    def _run(
        self, backbone: Backbone, tokens: Tensor, condition: Tensor, previous: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs of the last block by name; without latents if the backbone has no state."""
        latents = backbone.start(previous, len(tokens))
        for block in range(self.blocks):
            tokens, latents = backbone.run(block, tokens, latents, condition)
        return {"tokens": tokens} if latents is None else {"tokens": tokens, "latents": latents}

    def _previous(self, backbone: Backbone) -> Tensor | None:
        """Return random latents of an earlier pass; None if the backbone has no state."""
        started = backbone.start(None, self.batch)
        return None if started is None else torch.randn(started.shape, generator=generator(3, "latents"))

    def _make(self, seed: int = 0) -> Backbone:
        made: Backbone = self.make(self.token_dim, self.blocks, self.grid, seed=seed)
        expect(isinstance(made, nn.Module), f"{type(made).__name__} is not a torch.nn.Module")
        if not any(parameter.is_meta for parameter in made.parameters()):
            initialise(made, seed=seed)  # as in a cell
        return made

    def _moved(self, seed: int = 0) -> Backbone:
        """Return a backbone with slightly perturbed initial parameters."""
        made = self._make(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.add_(0.1 * normal(parameter.shape, seed, "conformance", name))
        return made

    @torch.no_grad()
    def test_shapes(self) -> None:
        """Tokens keep [B, N, D] and latents [B, M, E], or None, through every block; everything is finite."""
        backbone = self._moved()
        tokens, condition = self._inputs()
        latents = backbone.start(None, self.batch)
        shape = _shape(latents)
        if latents is not None:
            expect(
                latents.ndim == 3 and len(latents) == self.batch,
                f"start: {shape}, wanted [{self.batch}, M, E], or None for a backbone without state",
            )
        for block in range(self.blocks):
            tokens, latents = backbone.run(block, tokens, latents, condition)
            wanted = [self.batch, self.tokens, self.token_dim]
            expect(
                list(tokens.shape) == wanted, f"block {block}: tokens {list(tokens.shape)}, wanted {wanted}"
            )
            expect(_shape(latents) == shape, f"block {block}: latents {_shape(latents)}, wanted {shape}")
            finite = all(bool(torch.isfinite(x).all()) for x in (tokens, latents) if x is not None)
            expect(finite, f"block {block}: not finite")

    @torch.no_grad()
    def test_no_previous_latents_equal_zeros(self) -> None:
        """start(None) equals start(zeros): the first pass of self-conditioning has no latents of an earlier pass."""
        backbone = self._moved()
        nothing = backbone.start(None, self.batch)
        if nothing is None:
            return  # a backbone without state
        zeros = backbone.start(torch.zeros_like(nothing), self.batch)
        expect(zeros is not None, "start gives latents for None, and None for latents")
        assert zeros is not None
        expect_close(zeros, nothing, "start(zeros) against start(None)", tolerance=1e-6)

    @torch.no_grad()
    def test_rows_are_independent(self) -> None:
        """Row i of every result depends on row i of the inputs only, including the previous latents."""
        backbone = self._moved()
        tokens, condition = self._inputs()
        previous = self._previous(backbone)
        together = self._run(backbone, tokens, condition, previous)
        for row in range(self.batch):
            one = slice(row, row + 1)
            before = None if previous is None else previous[one]
            alone = self._run(backbone, tokens[one], condition[one], before)
            for name, wanted in together.items():
                expect_close(alone[name], wanted[one], f"{name} of row {row} alone", tolerance=1e-5)

    @torch.no_grad()
    def test_deterministic(self) -> None:
        """Building and calling it twice with one seed gives bitwise equal results, without global random numbers."""
        first, second = self._moved(), self._moved()
        tokens, condition = self._inputs()
        wanted = self._run(first, tokens, condition)
        with leaves_global_rng_alone("run"):
            again, rebuilt = self._run(first, tokens, condition), self._run(second, tokens, condition)
        for what, given in (("called twice", again), ("built twice", rebuilt)):
            same = all(torch.equal(given[name], wanted[name]) for name in wanted)
            expect(same, f"{what}, the result differs")

    @torch.no_grad()
    def test_state_dict_round_trip(self) -> None:
        """Its state dict, saved and loaded into a backbone of another seed, gives the same results."""
        first, second = self._moved(seed=0), self._moved(seed=1)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        tokens, condition = self._inputs()
        wanted, given = self._run(first, tokens, condition), self._run(second, tokens, condition)
        same = all(torch.equal(given[name], wanted[name]) for name in wanted)
        expect(same, "loaded into a fresh backbone, the state dict gives another result")

    def test_gradients(self) -> None:
        """Gradients reach tokens, condition and every parameter, and are finite."""
        backbone = self._moved()
        tokens, condition = (each.requires_grad_() for each in self._inputs())
        made = self._run(backbone, tokens, condition, self._previous(backbone))
        torch.stack([each.square().mean() for each in made.values()]).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        inputs = (("tokens", tokens), ("condition", condition))
        for name, each in (*inputs, *backbone.named_parameters()):
            expect(each.grad is not None, f"no gradient reaches {name}")
            expect(
                each.grad is None or bool(torch.isfinite(each.grad).all()),
                f"the gradient of {name} is not finite",
            )
        for name, each in inputs:
            expect(each.grad is not None and bool((each.grad != 0).any()), f"the gradient of {name} is 0")

    def test_meta_device(self) -> None:
        """It is built and run on the meta device, where parameters and FLOPs are counted."""
        with torch.device("meta"):
            backbone = self._make()
        tokens, condition = (each.to("meta") for each in self._inputs())
        for name, made in self._run(backbone, tokens, condition).items():
            expect(made.is_meta, f"on the meta device the {name} are on {made.device}")


def _shape(latents: Tensor | None) -> list[int] | None:
    return None if latents is None else list(latents.shape)
