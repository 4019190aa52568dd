"""Context fusions: none, shallow (the parent's pixels), deep (the parents' features), and two beyond the paper.

The first three are HPDM's, section 4.2, Eq 7 and Fig 11, compared in Table 3. Eq 7 averages the features over levels,
which loses detail within a token of a parent. `deep_levels` replaces the mean by a separate linear map for each coarser
level; `deep_pixels` adds the parent's pixels. All fusions add coordinates through a Linear before the same blocks, so
that two arms differ in the context alone.
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
    """Linear(width + extra -> width) that starts near the identity on the first ``width`` inputs, with small weights on
    the rest.
    """

    def reset_parameters(self) -> None:
        """Draw the initial values from the global generator (called by the constructor)."""
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
        """Apply, without bias, the part of the map that acts on the inputs from index ``first`` on.

        self([a, b]) = part(a, 0) + part(b, width of a) + bias, so that inputs need not be concatenated.
        """
        return F.linear(features, self.weight[:, first : first + features.shape[-1]])

    def constant(self, places: Tensor, first: int) -> Tensor:
        """Return `part` of ``places`` plus the bias."""
        return F.linear(places, self.weight[:, first : first + places.shape[-1]], self.bias)


def _linears(shape: FusionShape, extra: Callable[[int], int]) -> nn.ModuleDict:
    """Return one linear map per block that runs more than one level, named by the block's index.

    ``extra``: the number of inputs in addition to the tokens' own features, given the number of levels that the block
    runs.
    """
    width = shape.token_dim
    return nn.ModuleDict(
        {
            str(block): FusionLinear(width + extra(shape.levels_per_block[block]), width)
            for block in shape.fused_blocks
        }
    )


def _coordinates(coords: Coords, shape: FusionShape) -> Tensor:
    """Return absolute positions (f, h, w) of the token centres in [-1, 1]: [B, N, 3]."""
    return rearrange(coords.centres(shape.grid), "b a n -> b n a")


def _parent_pixels(shape: FusionShape, coords: Coords, parent: Source) -> Tensor:
    """Return the parent's noisy pixels, sampled trilinearly at the child's pixel centres: [B, C, F, H, W]."""
    cells = rearrange(parent.noisy, "b c f h w -> b f h w c")
    sampled = sample_cells(cells, coords.within(parent.coords, shape.patch), coords.share_of(parent.coords))
    return rearrange(sampled, "b f h w c -> b c f h w")


class NoFusion(ContextFusion):
    """No context. With ``coordinates``, a Linear(D+3 -> D) per block adds the position of the patch."""

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
    """Concatenates the immediate parent's noisy pixels, sampled at the child's pixel centres, to the tokenizer input.

    The parent's noise embedding is added to the child's tokens once, before the first block that runs the level.
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
    """Base of the deep fusions: Linear(concat[own tokens, features from the parents' block inputs, coordinates]).

    The map is applied in parts. The parts for context and coordinates are computed with the context, so that a
    denoising step only needs a Linear(D -> D). The part for the context is applied to the parents' covered cells
    before they are sampled, if there are fewer of them than child tokens (in a pyramid, about a quarter).
    """

    def __init__(
        self, shape: FusionShape, features: Callable[[int], int], *, coordinates: bool, detach: bool
    ) -> None:
        """``features``: the number of inputs from the parents, given the number of levels that the block runs."""
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
        """Return, for each source, the cells and weights that the child needs, and the source's tokens [B, N, D]."""
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
        """See `ContextFusion`: the cost depends only on the number of levels that the block runs."""
        return self.shape.levels_per_block[block]

    def _rest(self, layer: FusionLinear, coords: Coords, like: Tensor) -> Tensor:
        """Return the contribution of the bias and, if ``coordinates`` is set, of the coordinates."""
        if not self.coordinates:
            return layer.bias
        places = _coordinates(coords, self.shape).to(like.dtype)
        return layer.constant(places, layer.in_features - 3)


class DeepFusion(_FromFeatures):
    """Deep context fusion: Linear(concat[own tokens, mean over coarser levels of their block inputs, coordinates]).

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
    """Deep context fusion, with the immediate parent's noisy pixels concatenated to the tokenizer input.

    Features that are interpolated between tokens lose detail within a token; pixels do not. Unlike shallow fusion,
    it does not add the parent's noise embedding, because the parent's features already depend on the noise level. So
    it differs from `DeepFusion` in the pixels alone.
    """

    def __init__(self, shape: FusionShape, *, coordinates: bool = True, detach: bool = False) -> None:
        super().__init__(shape, coordinates=coordinates, detach=detach)
        self.extra_channels = shape.channels

    def pixel_context(self, level: int, coords: Coords, sources: Sequence[Source]) -> Tensor | None:
        """See `ContextFusion`."""
        return _parent_pixels(self.shape, coords, sources[-1])


class DeepLevels(_FromFeatures):
    """Deep context fusion with a separate map for each coarser level.

    Linear(concat[own tokens, parent's features, grandparent's features, ..., coordinates]). Features are sampled as in
    `DeepFusion`, but concatenated instead of averaged. They are ordered by the distance in levels, nearest first, so
    that the same weights apply to the immediate parent of children of all levels. A block that runs n levels has
    weights for n - 1 ancestors; a child with fewer ancestors uses the first ones.
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
