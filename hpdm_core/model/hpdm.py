"""The network: it runs entries (batches of patches of one level each) through shared blocks, with context fusion.

Paper: section 4.2 (deep context fusion, Eq 7, Fig 11) and 4.3 (adaptive computation, Listing 1). Before each
block, every active entry above level 0 is fused with the block inputs of its sources. Then one call of the
block runs all active entries, folded into the batch. Joint training (the sources are other entries) and tiled
inference (one entry with `Contexts` computed beforehand) use the same code and give the same numbers.

The network holds no state: latents of self-conditioning are passed in with an entry and returned with its result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from hpdm_core.config.schema import ModelConfig
from hpdm_core.model.backbone import Backbone
from hpdm_core.model.conditioning import ClassEmbedding, PositionEmbedding, SigmaEmbedding
from hpdm_core.model.execution import Execution
from hpdm_core.model.fusion import ContextFusion, Source
from hpdm_core.model.layers import LayerNorm, Linear
from hpdm_core.pyramid import Coords, Pyramid

__all__ = ["HPDM", "Contexts", "Encoded", "Patches"]


@dataclass(frozen=True)
class Patches:
    """One entry: a batch of patches of one level.

    ``noisy`` [B, C, F, H, W] = c_in * z; ``sigma`` [B]; ``label`` int64 [B], -1 for none; ``sources``: indices
    of the entries of levels 0..level-1 that are context for this one, coarsest first; ``latents`` [B, M, E] of an
    earlier pass, None for none and for a backbone without state. ``context_only``: the entry only serves as context;
    it has no prediction, and is run only up to the last block before which another entry reads its tokens.
    """

    level: int
    noisy: Tensor
    sigma: Tensor
    coords: Coords
    label: Tensor | None = None
    sources: tuple[int, ...] = ()
    latents: Tensor | None = None
    context_only: bool = False


@dataclass(frozen=True)
class Encoded:
    """A patch encoded as context for finer ones: the fields of `Source`, with the token inputs of several blocks."""

    level: int
    coords: Coords
    sigma: Tensor
    sigma_embedding: Tensor
    noisy: Tensor
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Encoded:
        """Return the given rows (int64)."""
        return Encoded(
            level=self.level,
            coords=self.coords.take(rows),
            sigma=self.sigma[rows],
            sigma_embedding=self.sigma_embedding[rows],
            noisy=self.noisy[rows],
            tokens={block: tokens[rows] for block, tokens in self.tokens.items()},
        )

    def to(self, device: torch.device | str) -> Encoded:
        """Return a copy on ``device``."""
        return Encoded(
            level=self.level,
            coords=self.coords.to(device),
            sigma=self.sigma.to(device),
            sigma_embedding=self.sigma_embedding.to(device),
            noisy=self.noisy.to(device),
            tokens={block: tokens.to(device) for block, tokens in self.tokens.items()},
        )

    @property
    def nbytes(self) -> int:
        """Memory of pixels and tokens, in bytes."""
        return self.noisy.nbytes + sum(tokens.nbytes for tokens in self.tokens.values())

    @classmethod
    def cat(cls, parts: Sequence[Encoded]) -> Encoded:
        """Concatenate the rows of all ``parts``, which must have one level and tokens of the same blocks."""
        first = parts[0]
        return cls(
            level=first.level,
            coords=replace(first.coords, offset=torch.cat([part.coords.offset for part in parts])),
            sigma=torch.cat([part.sigma for part in parts]),
            sigma_embedding=torch.cat([part.sigma_embedding for part in parts]),
            noisy=torch.cat([part.noisy for part in parts]),
            tokens={block: torch.cat([part.tokens[block] for part in parts]) for block in first.tokens},
        )

    def source(self, block: int | None) -> Source:
        """Return this patch as a source, with its tokens before ``block`` if they were recorded."""
        return Source(
            level=self.level,
            coords=self.coords,
            sigma=self.sigma,
            sigma_embedding=self.sigma_embedding,
            noisy=self.noisy,
            tokens=None if block is None else self.tokens.get(block),
        )


@dataclass(frozen=True)
class Contexts:
    """All that depends on a patch's parents alone: the pixel context, and the fusion's token context per block."""

    pixel: Tensor | None = None
    tokens: dict[int, Tensor | None] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Contexts:
        """Return the given rows (int64)."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Contexts:
        """Return a copy on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Contexts:
        """Return a copy with ``change`` applied to every tensor."""
        return Contexts(
            pixel=None if self.pixel is None else change(self.pixel),
            tokens={block: None if made is None else change(made) for block, made in self.tokens.items()},
        )

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        made = [self.pixel, *self.tokens.values()]
        return sum(tensor.nbytes for tensor in made if tensor is not None)


@dataclass
class _State:
    """The state of an entry while it runs through the blocks."""

    entry: Patches
    sources: tuple[int, ...]
    contexts: Contexts | None
    sigma_embedding: Tensor
    condition: Tensor
    tokens: Tensor
    end: int
    """The first block that does not run the entry any more."""
    latents: Tensor | None = None

    def as_source(self, *, with_tokens: bool) -> Source:
        entry = self.entry
        return Source(
            level=entry.level,
            coords=entry.coords,
            sigma=entry.sigma,
            sigma_embedding=self.sigma_embedding,
            noisy=entry.noisy,
            tokens=self.tokens if with_tokens else None,
        )


class HPDM(nn.Module):
    """The hierarchical patch diffusion network.

    ``levels_per_block[b]``: how many levels block b runs, counted from the coarsest; ``sigma_range``: the noise
    levels that the embedding maps to 0 and 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backbone: Backbone,
        fusion: ContextFusion,
        levels_per_block: Sequence[int],
        pyramid: Pyramid,
        sigma_range: tuple[float, float],
    ) -> None:
        super().__init__()
        width = config.token_dim
        self.pyramid = pyramid
        self.levels_per_block = tuple(levels_per_block)
        self.sigma_on_tokens = config.sigma_on_tokens
        f, h, w = pyramid.token
        volume = f * h * w
        self.tokenizer = Linear(volume * (pyramid.channels + fusion.extra_channels), width)
        self.tokenizer_norm = LayerNorm(width)
        self.positions = PositionEmbedding(pyramid.grid, width)
        self.sigma_embedding = SigmaEmbedding(width, levels=pyramid.levels, sigma_range=sigma_range)
        self.class_embedding = ClassEmbedding(config.classes, width) if config.classes else None
        self.backbone = backbone
        self.execution = Execution()
        self.fusion = fusion
        self.output_norm = LayerNorm(width)
        self.output = Linear(width, volume * pyramid.channels)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.levels_per_block)

    def forward(
        self, entries: Sequence[Patches], contexts: Sequence[Contexts | None] | None = None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return, per entry, the prediction [B, C, F, H, W] and the latents [B, M, E] after the last block.

        Latents are None for a backbone without state; both are None for an entry that is ``context_only``. An
        entry with contexts is fused with them; one without, with its sources. Raises ValueError if an entry
        above level 0 has neither, or has sources of other levels than 0..level-1.
        """
        states = self._begin(entries, contexts)
        self._run(states, range(self.blocks))
        return [
            (None, None) if state.entry.context_only else (self._detokenize(state.tokens), state.latents)
            for state in states
        ]

    def child_blocks(self, level: int) -> tuple[int, ...]:
        """Return the blocks that run a child of ``level``; the inputs of these blocks serve the child as context."""
        return tuple(block for block, count in enumerate(self.levels_per_block) if count > level + 1)

    def encode(
        self, entry: Patches, sources: Sequence[Encoded] = (), *, blocks: Collection[int] | None = None
    ) -> Encoded:
        """Return ``entry`` as context for finer levels, with its tokens before each of ``blocks``.

        ``blocks`` defaults to `child_blocks`. There are always two passes, the second self-conditioned on the
        latents of the first, so that the result does not depend on earlier calls; for a backbone without state
        there is one. The last pass stops before the last of ``blocks``. If the fusion reads no tokens, the
        blocks are not run at all.
        """
        wanted = self.child_blocks(entry.level) if blocks is None else tuple(sorted(blocks))
        outside = [b for b in wanted if not 0 <= b < self.blocks or self.levels_per_block[b] <= entry.level]
        if outside:
            raise ValueError(f"blocks {outside} do not run level {entry.level}")
        if not self.fusion.reads_tokens or not wanted:
            embedding = self.sigma_embedding(entry.sigma, entry.level)
            return Encoded(entry.level, entry.coords, entry.sigma, embedding, entry.noisy)
        contexts = self.contexts(entry.level, entry.coords, sources) if entry.level else None
        (last,) = self._begin([replace(entry, sources=(), latents=None)], [contexts])
        last.latents = self._latents(last)
        if last.latents is not None:
            self._run([last], range(self.blocks))
            (last,) = self._begin([replace(entry, sources=(), latents=last.latents)], [contexts])
        notes = self._run([last], range(wanted[-1]), noted=wanted)
        notes[wanted[-1]] = last.tokens
        return Encoded(
            level=entry.level,
            coords=entry.coords,
            sigma=entry.sigma,
            sigma_embedding=last.sigma_embedding,
            noisy=entry.noisy,
            tokens=notes,
        )

    def contexts(self, level: int, coords: Coords, sources: Sequence[Encoded]) -> Contexts:
        """Return the contexts of patches at ``coords`` from ``sources`` (levels 0..level-1, rows matching)."""
        self._check_sources(level, [source.level for source in sources])
        if level == 0:
            return Contexts()
        pixel = self.fusion.pixel_context(level, coords, [source.source(None) for source in sources])
        tokens = {
            block: self.fusion.token_context(
                block, level, coords, [source.source(block) for source in sources]
            )
            for block, count in enumerate(self.levels_per_block)
            if count > level
        }
        return Contexts(pixel=pixel, tokens=tokens)

    def _begin(self, entries: Sequence[Patches], contexts: Sequence[Contexts | None] | None) -> list[_State]:
        """Embed every entry and turn it into tokens."""
        given = [None] * len(entries) if contexts is None else list(contexts)
        if len(given) != len(entries):
            raise ValueError(f"{len(given)} contexts for {len(entries)} entries")
        embeddings = [self.sigma_embedding(entry.sigma, entry.level) for entry in entries]
        ends = self._ends(entries, given)
        states = []
        for entry, context, embedding, end in zip(entries, given, embeddings, ends, strict=True):
            pixel = None
            if context is not None:
                pixel = context.pixel
            elif entry.level or entry.sources:
                self._check_sources(entry.level, [entries[index].level for index in entry.sources])
                feeding = [_source(entries[index], embeddings[index]) for index in entry.sources]
                pixel = self.fusion.pixel_context(entry.level, entry.coords, feeding)
            tokens = self._tokenize(entry.noisy, pixel)
            if self.sigma_on_tokens:
                tokens = tokens + embedding[:, None]
            states.append(
                _State(
                    entry=entry,
                    sources=entry.sources,
                    contexts=context,
                    sigma_embedding=embedding,
                    condition=self._condition(embedding, entry.label),
                    tokens=tokens,
                    end=end,
                )
            )
        return states

    def _ends(self, entries: Sequence[Patches], contexts: Sequence[Contexts | None]) -> list[int]:
        """Return, for each entry, the first block that does not run it any more.

        For an entry that is ``context_only``, that is the last block before which another entry reads its tokens.
        """
        ends = [0 if entry.context_only else self.blocks for entry in entries]
        for index in reversed(range(len(entries))):  # sources are earlier entries
            entry = entries[index]
            read = [b for b in range(ends[index]) if self.levels_per_block[b] > entry.level]
            if contexts[index] is None and self.fusion.reads_tokens and read:
                for source in entry.sources:
                    ends[source] = max(ends[source], read[-1])
        return ends

    def _run(
        self, states: Sequence[_State], blocks: Iterable[int], *, noted: Collection[int] = ()
    ) -> dict[int, Tensor]:
        """Run ``blocks``, updating ``states`` in place; return the first state's tokens before the blocks ``noted``."""
        notes = {}
        for block in blocks:
            count = self.levels_per_block[block]
            active = [state for state in states if state.entry.level < count and block < state.end]
            if not active:
                continue
            if block in noted:
                notes[block] = states[0].tokens
            # Fuse all entries before updating any: context is the sources' block input before their own fusion.
            fused = [self._fuse(block, state, states) for state in active]
            started = [self._latents(state) for state in active]
            latents = [made for made in started if made is not None]  # all entries have latents, or none has
            rows = [tokens.shape[0] for tokens in fused]
            condition = _fold([state.condition for state in active])
            folded_tokens, folded_latents = self.execution.run(
                self.backbone, block, _fold(fused), _fold(latents) if latents else None, condition
            )
            for state, tokens in zip(active, torch.split(folded_tokens, rows), strict=True):
                state.tokens = tokens
            if folded_latents is not None:
                for state, own in zip(active, torch.split(folded_latents, rows), strict=True):
                    state.latents = own
        return notes

    def _latents(self, state: _State) -> Tensor | None:
        """Return an entry's latents; before its first block, those that the backbone starts from. None for a backbone
        without state.
        """
        if state.latents is None:
            return self.backbone.start(state.entry.latents, state.entry.noisy.shape[0])
        return state.latents

    def _fuse(self, block: int, state: _State, states: Sequence[_State]) -> Tensor:
        """Return an entry's tokens for ``block``, fused with its context."""
        entry = state.entry
        if entry.level == 0:
            return state.tokens
        if state.contexts is not None:
            context = state.contexts.tokens[block]
        else:
            feeding = [
                states[index].as_source(with_tokens=self.fusion.reads_tokens) for index in state.sources
            ]
            context = self.fusion.token_context(block, entry.level, entry.coords, feeding)
        return self.fusion.fuse(block, entry.level, state.tokens, context, entry.coords, entry.sigma)

    def _check_sources(self, level: int, levels: list[int]) -> None:
        if levels != list(range(level)):
            raise ValueError(f"level {level} has sources of levels {levels}; allowed is {list(range(level))}")

    def _condition(self, embedding: Tensor, label: Tensor | None) -> Tensor:
        """Return the condition tokens [B, K, D]: noise level, and the class if the model has classes."""
        if self.class_embedding is None:
            return embedding[:, None]
        if label is None:
            label = torch.full(embedding.shape[:1], -1, device=embedding.device, dtype=torch.long)
        return torch.stack([embedding, self.class_embedding(label)], dim=1)

    def _tokenize(self, noisy: Tensor, pixel: Tensor | None) -> Tensor:
        """Turn pixels [B, C, F, H, W] and the fusion's extra channels into tokens [B, N, D]."""
        extra = self.fusion.extra_channels
        if extra:
            if pixel is None:
                pixel = noisy.new_zeros(noisy.shape[0], extra, *noisy.shape[2:])
            noisy = torch.cat([noisy, pixel], dim=1)
        f, h, w = self.pyramid.token
        volumes = rearrange(noisy, "b c (f i) (h j) (w k) -> b (f h w) (i j k c)", i=f, j=h, k=w)
        positions: Tensor = self.positions()
        normalised: Tensor = self.tokenizer_norm(self.tokenizer(volumes))
        return normalised + positions

    def _detokenize(self, tokens: Tensor) -> Tensor:
        """Turn tokens [B, N, D] into a prediction [B, C, F, H, W]."""
        (f, h, w), (i, j, k) = self.pyramid.grid, self.pyramid.token
        volumes: Tensor = self.output(self.output_norm(tokens))
        return rearrange(
            volumes, "b (f h w) (i j k c) -> b c (f i) (h j) (w k)", f=f, h=h, w=w, i=i, j=j, k=k
        )


def _source(entry: Patches, embedding: Tensor) -> Source:
    """Return an entry as a source without tokens: pixels and noise level only."""
    return Source(
        level=entry.level,
        coords=entry.coords,
        sigma=entry.sigma,
        sigma_embedding=embedding,
        noisy=entry.noisy,
    )


def _fold(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, without a copy when there is only one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
