"""Context fusions: none, shallow (the parent's pixels), deep (the parents' features), and two beyond the paper.

The first three are HPDM's, section 4.2, Eq 7 and Fig 11, and the arms of Table 3. The mean over levels of Eq 7
blurs by a token what a parent's token shows of its pixels: `deep_levels` has a map for each coarser level in
its place, `deep_pixels` adds the parent's pixels. All take coordinates through a Linear before the same blocks,
so that an arm changes one thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.model.fusion import ContextFusion, FusionShape, Source
from hpdm_core.model.interpolation import Cover, cover, sample_cells
from hpdm_core.pyramid import Coords

__all__ = ["DeepFusion", "DeepLevels", "DeepPixels", "NoFusion", "ShallowConcat"]

START_STD = 0.02


class FusionLinear(nn.Linear):
    """Linear(width + extra -> width) that starts near a no-op: identity on the own features, rest small."""

    def reset_parameters(self) -> None:
        """Draw the start from the global generator (called by the constructor)."""
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(self.initial("weight", None))
        nn.init.zeros_(self.bias)

    def initial(self, name: str, generator: torch.Generator | None) -> Tensor:
        """See `hpdm_core.model.layers.Initialised`."""
        if name == "bias":
            return torch.zeros(self.out_features, device="cpu")
        width = self.out_features
        weight = torch.empty(width, self.in_features, device="cpu")
        weight.normal_(std=START_STD, generator=generator)
        weight[:, :width] = torch.eye(width, device="cpu")
        return weight

    def part(self, features: Tensor, first: int) -> Tensor:
        """Apply, without bias, the part of the map that sees its inputs from number ``first`` on.

        self([a, b]) = part(a, 0) + part(b, width of a) + bias: nothing needs to be concatenated.
        """
        return F.linear(features, self.weight[:, first : first + features.shape[-1]])

    def constant(self, places: Tensor, first: int) -> Tensor:
        """Return `part` of ``places`` with the bias."""
        return F.linear(places, self.weight[:, first : first + places.shape[-1]], self.bias)


def _linears(shape: FusionShape, extra: Callable[[int], int]) -> nn.ModuleDict:
    """One map per block that runs more than one level, named by its block; ``extra``: inputs beside the own
    features, by the number of levels that the block runs."""
    width = shape.token_dim
    return nn.ModuleDict(
        {
            str(block): FusionLinear(width + extra(shape.levels_per_block[block]), width)
            for block in shape.fused_blocks
        }
    )


def _coordinates(coords: Coords, shape: FusionShape) -> Tensor:
    """Absolute positions (f, h, w) of the token centres in [-1, 1]: [B, N, 3]."""
    return rearrange(coords.centres(shape.grid), "b a n -> b n a")


def _parent_pixels(shape: FusionShape, coords: Coords, parent: Source) -> Tensor:
    """The parent's noisy pixels sampled trilinearly at the child's: [B, C, F, H, W]."""
    cells = rearrange(parent.noisy, "b c f h w -> b f h w c")
    sampled = sample_cells(cells, coords.within(parent.coords, shape.patch), coords.share_of(parent.coords))
    return rearrange(sampled, "b f h w c -> b c f h w")


class NoFusion(ContextFusion):
    """No context. With ``coordinates`` a Linear(D+3 -> D) per block still tells a patch where it lies."""

    reads_tokens = False

    def __init__(self, shape: FusionShape, *, coordinates: bool = True) -> None:
        super().__init__(shape)
        self.maps = _linears(shape, lambda levels: 3) if coordinates else None

    def fuse(
        self, block: int, level: int, tokens: Tensor, context: Tensor | None, coords: Coords, sigma: Tensor
    ) -> Tensor:
        """See `ContextFusion`."""
        if self.maps is None:
            return tokens
        layer = _map(self.maps, block)
        places = _coordinates(coords, self.shape).to(tokens.dtype)
        return layer.part(tokens, 0) + layer.constant(places, self.shape.token_dim)


class ShallowConcat(NoFusion):
    """The immediate parent's noisy pixels, sampled at the child's, stand beside the child's in the tokenizer.

    The parent's noise embedding is added to the child's tokens, once, before the first block that runs the
    level.
    """

    def __init__(self, shape: FusionShape, *, coordinates: bool = True) -> None:
        super().__init__(shape, coordinates=coordinates)
        self.extra_channels = shape.channels

    def pixel_context(self, level: int, coords: Coords, sources: Sequence[Source]) -> Tensor | None:
        """See `ContextFusion`."""
        return _parent_pixels(self.shape, coords, sources[-1])

    def token_context(
        self, block: int, level: int, coords: Coords, sources: Sequence[Source]
    ) -> Tensor | None:
        """See `ContextFusion`."""
        return sources[-1].sigma_embedding if block == self.shape.first_block(level) else None

    def fuse(
        self, block: int, level: int, tokens: Tensor, context: Tensor | None, coords: Coords, sigma: Tensor
    ) -> Tensor:
        """See `ContextFusion`."""
        if context is not None:
            tokens = tokens + context[:, None]
        return super().fuse(block, level, tokens, None, coords, sigma)


class _FromFeatures(ContextFusion):
    """Base of the deep fusions: Linear(concat[own, something of the parents' block inputs, coordinates]).

    The map is applied part by part. What context and coordinates give is made with the context, so that a
    denoising step pays for Linear(D -> D) only; and the context's part is applied to the parents' covered
    cells before they are sampled, wherever these are fewer than the child's tokens, as they are in a pyramid
    (about a quarter of them).
    """

    def __init__(
        self, shape: FusionShape, features: Callable[[int], int], *, coordinates: bool, detach: bool
    ) -> None:
        """``features``: inputs of the map that come from the parents, by the levels that its block runs."""
        super().__init__(shape)
        self.coordinates = coordinates
        self.detach = detach
        places = 3 if coordinates else 0
        self.maps = _linears(shape, lambda levels: features(levels) + places)

    def fuse(
        self, block: int, level: int, tokens: Tensor, context: Tensor | None, coords: Coords, sigma: Tensor
    ) -> Tensor:
        """See `ContextFusion`."""
        if context is None:
            raise ValueError("deep fusion was given no context")
        return _map(self.maps, block).part(tokens, 0) + context

    def _covers(self, coords: Coords, sources: Sequence[Source]) -> list[tuple[Cover, Tensor]]:
        """Return what the child needs of each source, and the source's tokens [B, N, D]."""
        if not sources:
            raise ValueError("deep fusion was given no sources")
        made = []
        for source in sources:
            if source.tokens is None:
                raise ValueError(f"deep fusion was given no tokens of level {source.level}")
            positions = coords.within(source.coords, self.shape.grid)
            found = cover(positions, self.shape.grid, coords.share_of(source.coords))
            made.append((found, source.tokens.detach() if self.detach else source.tokens))
        return made

    def kind(self, block: int) -> Hashable:
        """See `ContextFusion`: maps differ in size only, by the levels that a block runs."""
        return self.shape.levels_per_block[block]

    def _rest(self, layer: FusionLinear, coords: Coords, like: Tensor) -> Tensor:
        """Return what the bias and, where they are taken, the coordinates give."""
        if not self.coordinates:
            return layer.bias
        places = _coordinates(coords, self.shape).to(like.dtype)
        return layer.constant(places, layer.in_features - 3)


class DeepFusion(_FromFeatures):
    """Deep context fusion: Linear(concat[own, mean over coarser levels of their block inputs, coordinates]).

    The parents' block inputs are sampled trilinearly at the child's token centres (Eq 8) and averaged over
    levels. With ``detach`` no gradient flows into the parents.
    """

    def __init__(self, shape: FusionShape, *, coordinates: bool = True, detach: bool = False) -> None:
        super().__init__(shape, lambda levels: shape.token_dim, coordinates=coordinates, detach=detach)

    def token_context(
        self, block: int, level: int, coords: Coords, sources: Sequence[Source]
    ) -> Tensor | None:
        """See `ContextFusion`."""
        layer, width = _map(self.maps, block), self.shape.token_dim
        covers = self._covers(coords, sources)
        if sum(found.cells for found, _ in covers) < math.prod(self.shape.grid):
            mapped = _total(found.sample(layer.part(found.cut(tokens), width)) for found, tokens in covers)
        else:
            mapped = layer.part(_total(found.sample(found.cut(tokens)) for found, tokens in covers), width)
        return torch.add(self._rest(layer, coords, mapped), mapped, alpha=1 / len(sources))

    def mean(self, coords: Coords, sources: Sequence[Source]) -> Tensor:
        """Return the parents' features at the child's token centres, averaged over levels (Eq 7)."""
        covers = self._covers(coords, sources)
        return _total(found.sample(found.cut(tokens)) for found, tokens in covers) / len(sources)


class DeepPixels(DeepFusion):
    """Deep context fusion, and the immediate parent's noisy pixels beside the child's in the tokenizer.

    Features that are interpolated between tokens have lost what lies within one; pixels have not. The parent's
    noise level is not added, as shallow fusion does: it comes with the parent's features, whose blocks are
    conditioned on it. So this differs from `DeepFusion` in the pixels alone.
    """

    def __init__(self, shape: FusionShape, *, coordinates: bool = True, detach: bool = False) -> None:
        super().__init__(shape, coordinates=coordinates, detach=detach)
        self.extra_channels = shape.channels

    def pixel_context(self, level: int, coords: Coords, sources: Sequence[Source]) -> Tensor | None:
        """See `ContextFusion`."""
        return _parent_pixels(self.shape, coords, sources[-1])


class DeepLevels(_FromFeatures):
    """Deep context fusion with a map of its own for each coarser level: Linear(concat[own, the parent's, the
    grandparent's, ..., coordinates]).

    Features are sampled as in `DeepFusion`, and stand side by side where that takes their mean. Maps go by the
    distance of the levels, nearest first: to be the parent means the same to children of all levels. A map has
    as many as the levels that its block runs allow, less one; a child with fewer ancestors uses the first.
    """

    def __init__(self, shape: FusionShape, *, coordinates: bool = True, detach: bool = False) -> None:
        width = shape.token_dim
        super().__init__(shape, lambda levels: (levels - 1) * width, coordinates=coordinates, detach=detach)

    def token_context(
        self, block: int, level: int, coords: Coords, sources: Sequence[Source]
    ) -> Tensor | None:
        """See `ContextFusion`."""
        layer, width, samples = _map(self.maps, block), self.shape.token_dim, math.prod(self.shape.grid)
        parts = []
        for distance, (found, tokens) in enumerate(reversed(self._covers(coords, sources)), start=1):
            box = found.cut(tokens)
            if found.cells < samples:
                parts.append(found.sample(layer.part(box, distance * width)))
            else:
                parts.append(layer.part(found.sample(box), distance * width))
        mapped = _total(parts)
        return self._rest(layer, coords, mapped) + mapped


def _map(maps: nn.ModuleDict, block: int) -> FusionLinear:
    layer = maps[str(block)]
    assert isinstance(layer, FusionLinear), "the maps are made by this module"
    return layer


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    first, *others = parts
    for each in others:
        first = first + each
    return first


@hookimpl
def register_context_fusions(register: Register) -> None:
    """Add the built-in context fusions."""
    register("none", NoFusion, source="HPDM, section 4.2: no context between levels")
    register(
        "shallow_concat", ShallowConcat, source="HPDM, Table 3, shallow fusion: cascaded diffusion's concat"
    )
    register("deep", DeepFusion, source="HPDM, section 4.2, Eq 7 and 8, Fig 11")
    register("deep_pixels", DeepPixels, source="beyond the paper: deep, and the pixels of shallow fusion")
    register("deep_levels", DeepLevels, source="beyond the paper: deep, without Eq 7's mean over levels")
