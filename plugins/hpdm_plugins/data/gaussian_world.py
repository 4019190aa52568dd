"""A data distribution with a known optimal denoiser: a stationary Gaussian field with a video-like spectrum.

The dataset `gaussian_world` draws exact samples of it. `GaussianDenoiser` computes the Bayes-optimal denoiser of
an HPDM, E[patch | noisy patch, noisy parents], by linear algebra. So the samples of a sampler can be compared
with a known covariance, and the loss of a trained model with the lowest possible loss; a lower loss shows a leak.

The field is periodic with twice the clip's size on every axis, and a clip is a window of it, so that opposite
borders of a clip are far apart. Its power decreases with the frequency f (cycles per clip length, the same on all
axes) as (1 + f^2) ** (-exponent / 2). Channels are independent and identically distributed. A level is the `area`
downsampling of the clip, which is linear: all covariances between patches of any levels are exact.

Shapes: B rows, C channels, N pixels of a patch (row-major f, h, w). Arithmetic in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor

from hpdm_core.data.dataset import Clip, ClipShape, Split
from hpdm_core.data.readers import VideoReader
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.pyramid import Coords, Pyramid

__all__ = ["GaussianContexts", "GaussianDenoiser", "GaussianEncoded", "GaussianField", "GaussianWorld"]

Triple = tuple[int, int, int]

# Added to the noise variance of parents, relative to the field's variance. A coarser patch is a linear function of a
# finer one that covers it, so that the covariance of noise-free parents is singular.
_JITTER = 1e-10


class GaussianField:
    """The distribution of the field: mean 0, standard deviation ``std`` of a pixel; windows (clips) of ``size``."""

    def __init__(self, size: Triple, *, exponent: float, std: float) -> None:
        self.size = size
        self.exponent = exponent
        self.std = std
        self.torus: Triple = (2 * size[0], 2 * size[1], 2 * size[2])
        frequencies = [
            torch.fft.fftfreq(period, dtype=torch.float64) * length  # cycles per clip
            for period, length in zip(self.torus, size, strict=True)
        ]
        f, h, w = torch.meshgrid(*frequencies, indexing="ij")
        power = (1 + f**2 + h**2 + w**2) ** (-exponent / 2)
        self.power = power * (std**2 / power.mean())  # eigenvalues of the covariance on the torus

    def draw(self, generator: torch.Generator, channels: int) -> Tensor:
        """Return one window, float64 [C, F, H, W]; not clipped."""
        white = torch.randn(channels, *self.torus, generator=generator, dtype=torch.float64)
        dims = (-3, -2, -1)
        field: Tensor = torch.fft.ifftn(torch.fft.fftn(white, dim=dims) * self.power.sqrt(), dim=dims).real
        frames, height, width = self.size
        return field[:, :frames, :height, :width].contiguous()

    def covariance(self, first: Triple, second: Triple) -> Tensor:
        """Return Cov(mean over a box ``first`` at p, mean over a box ``second`` at q) as a function of the lag p - q.

        Boxes are in pixels and start at p and q; the result has the size of the torus, with negative lags wrapped.
        """
        product = self.power * self._box(first) * self._box(second).conj()
        lags: Tensor = torch.fft.ifftn(product, dim=(-3, -2, -1)).real
        return lags

    def _box(self, box: Triple) -> Tensor:
        """Return the transfer function of y[p] = mean of x[p + d] over d in ``box``."""
        axes = []
        for period, width in zip(self.torus, box, strict=True):
            angle = 2 * math.pi * torch.arange(period, dtype=torch.float64) / period
            steps = torch.arange(width, dtype=torch.float64)
            axes.append(torch.exp(1j * angle[:, None] * steps).mean(dim=1))
        f, h, w = axes
        return f[:, None, None] * h[None, :, None] * w[None, None, :]


class GaussianWorld:
    """The dataset: every draw is a new clip, from the same distribution for both splits, without labels.

    Values are clamped to [-1, 1], as in all clips. At the default ``std`` this affects one pixel in 16,000 and
    changes the variance by a relative 1e-4; a smaller ``std`` makes the distribution more exact.

    Args:
        clip: size of the clips.
        reader: not used, because there are no files.
        exponent: how fast the power decreases with the frequency; 3 gives every octave equal power, larger values
            are smoother.
        std: standard deviation of a pixel.
    """

    def __init__(
        self,
        clip: ClipShape,
        reader: VideoReader,
        *,
        exponent: Annotated[float, Field(ge=0, le=12)] = 4.0,
        std: Annotated[float, Field(gt=0, le=0.5)] = 0.25,
    ) -> None:
        self.clip = clip
        self.field = GaussianField((clip.frames, clip.height, clip.width), exponent=exponent, std=std)

    @property
    def classes(self) -> tuple[str, ...]:
        """No classes."""
        return ()

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return a new clip; it depends on ``generator`` alone."""
        return Clip(self.field.draw(generator, self.clip.channels).clamp(-1, 1).float())

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return None, because every clip is new."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the parameters as JSON; there are no files, and the number of clips is infinite (null)."""
        endless = {"clips": None, "windows": None}
        return {
            "name": "gaussian_world",
            "exponent": self.field.exponent,
            "std": self.field.std,
            "splits": {"train": endless, "held_out": endless},
            "files": {},
            "skipped": {},
        }


@dataclass(frozen=True)
class GaussianEncoded:
    """Noisy parents: ``values`` [B, C, N] in data units, their noise ``sigma_eff`` [B], and their positions."""

    level: int
    values: Tensor
    sigma_eff: Tensor
    corner: Tensor  # [B, 3] long, full-resolution pixels

    def take(self, rows: Tensor) -> GaussianEncoded:
        """Return the given rows, in that order."""
        return GaussianEncoded(self.level, self.values[rows], self.sigma_eff[rows], self.corner[rows])

    def to(self, device: torch.device | str) -> GaussianEncoded:
        """Return self, because everything stays on the CPU."""
        return self

    @classmethod
    def cat(cls, parts: Sequence[GaussianEncoded]) -> GaussianEncoded:
        """Return the rows of all ``parts``, one after the other."""
        return cls(
            parts[0].level,
            torch.cat([part.values for part in parts]),
            torch.cat([part.sigma_eff for part in parts]),
            torch.cat([part.corner for part in parts]),
        )


@dataclass(frozen=True)
class _Posterior:
    """A patch given noisy parents has mean = gain @ parents, covariance = basis @ diag(variances) @ basis.T."""

    gain: Tensor  # [N, K * N] for K parents
    basis: Tensor  # [N, N], orthonormal columns
    variances: Tensor  # [N]


@dataclass(frozen=True)
class GaussianContexts:
    """The patch's distribution given its parents: ``mean`` [B, C, N], and for each row its index in ``posteriors``."""

    mean: Tensor
    which: Tensor  # [B] long
    posteriors: tuple[_Posterior, ...]

    def take(self, rows: Tensor) -> GaussianContexts:
        """Return the given rows, in that order."""
        return GaussianContexts(self.mean[rows], self.which[rows], self.posteriors)


class GaussianDenoiser:
    """E[patch | noisy patch, noisy parents] for ``field``; has the interface of `hpdm_core.assembly.denoiser.Denoiser`.

    Exact for `area` downsampling and any noise level of each patch. It has no latents (it returns a tensor
    [B, 0, 0]) and ignores labels. Posteriors depend on the patches' relative positions and the parents' noise
    levels; the 1024 most recently used ones are cached.
    """

    def __init__(self, field: GaussianField, pyramid: Pyramid, sigma_in: Sequence[float]) -> None:
        if field.size != pyramid.video:
            raise ValueError(f"the field's window {field.size} is not the pyramid's video {pyramid.video}")
        self.field = field
        self.pyramid = pyramid
        self.sigma_in = tuple(sigma_in)
        self._posterior = lru_cache(maxsize=1024)(self._solve)
        self._lags = lru_cache(maxsize=None)(self._lag_covariance)

    def encode(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        sources: Sequence[GaussianEncoded],
        *,
        blocks: int | None = None,
    ) -> GaussianEncoded:
        """Return z [B, C, F, H, W] of ``level`` as parents. ``sources`` are unused: a child gets them itself."""
        values = rearrange(z.double() * self.sigma_in[level], "b c f h w -> b c (f h w)")
        return GaussianEncoded(level, values, self._sigma_eff(level, sigma), self._corner(level, coords))

    def contexts(self, level: int, coords: Coords, sources: Sequence[GaussianEncoded]) -> GaussianContexts:
        """Return the distribution of the patches at ``coords`` given ``sources`` (any levels, rows matching)."""
        corner = self._corner(level, coords)
        rows = len(corner)
        keys = [
            tuple(
                (
                    source.level,
                    tuple((corner[row] - source.corner[row]).tolist()),
                    source.sigma_eff[row].item(),
                )
                for source in sources
            )
            for row in range(rows)
        ]
        distinct = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        posteriors = tuple(self._posterior(level, key) for key in distinct)
        which = torch.tensor([distinct[key] for key in keys], dtype=torch.long)
        channels, pixels = self.pyramid.channels, math.prod(self.pyramid.patch)
        mean = torch.zeros(rows, channels, pixels, dtype=torch.float64)
        if sources:
            parents = torch.cat([source.values for source in sources], dim=-1)  # [B, C, K * N]
            for index, posterior in enumerate(posteriors):
                mine = which == index
                mean[mine] = parents[mine] @ posterior.gain.T
        return GaussianContexts(mean, which, posteriors)

    def __call__(
        self,
        level: int,
        z: Tensor,
        sigma: Tensor,
        coords: Coords,
        label: Tensor | None,
        contexts: GaussianContexts | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [B, C, F, H, W] given z at ``sigma`` [B], in the dtype of z, and empty latents."""
        if contexts is None:
            contexts = self.contexts(level, coords, ())
        noisy = rearrange(z.double() * self.sigma_in[level], "b c f h w -> b c (f h w)")
        variance = self._sigma_eff(level, sigma)[:, None, None] ** 2
        denoised = torch.empty_like(noisy)
        for index, posterior in enumerate(contexts.posteriors):
            mine = contexts.which == index
            mean = contexts.mean[mine]
            shrink = posterior.variances / (posterior.variances + variance[mine])
            denoised[mine] = mean + (((noisy[mine] - mean) @ posterior.basis) * shrink) @ posterior.basis.T
        f, h, w = self.pyramid.patch
        made = rearrange(denoised, "b c (f h w) -> b c f h w", f=f, h=h, w=w).to(z)
        return made, torch.empty(len(z), 0, 0, device=z.device)

    def bayes_loss(
        self, level: int, offset: Triple, *, sigma_eff: float, context_sigma_eff: float | None
    ) -> float:
        """Return the lowest possible mean squared error per pixel, in data units, of the patch at ``offset``.

        ``offset`` is in the level's own pixels. ``sigma_eff``: noise of the patch; ``context_sigma_eff``: noise of
        all its ancestors (`Pyramid.chain`); None for no parents.
        """
        corner = torch.tensor(offset) * torch.tensor(self.pyramid.pitch(level))
        chain = self.pyramid.chain(level, offset) if context_sigma_eff is not None else ()
        key = tuple(
            (k, tuple((corner - torch.tensor(parent) * torch.tensor(self.pyramid.pitch(k))).tolist()), noise)
            for k, parent in enumerate(chain)
            for noise in [float(context_sigma_eff or 0.0)]
        )
        variances = self._posterior(level, key).variances
        return float((variances * sigma_eff**2 / (variances + sigma_eff**2)).mean())

    def covariance(self, first: tuple[int, Triple], second: tuple[int, Triple]) -> Tensor:
        """Return Cov [N, N] between the pixels of two patches, each (level, corner in full-resolution px)."""
        (level, corner), (other, other_corner) = first, second
        lags = self._lags(level, other)
        places = []
        for axis in range(3):
            count = self.pyramid.patch[axis]
            mine = corner[axis] + torch.arange(count) * self.pyramid.pitch(level)[axis]
            theirs = other_corner[axis] + torch.arange(count) * self.pyramid.pitch(other)[axis]
            places.append((mine[:, None] - theirs) % self.field.torus[axis])
        f, h, w = places
        full = lags[
            rearrange(f, "f g -> f 1 1 g 1 1"),
            rearrange(h, "h i -> 1 h 1 1 i 1"),
            rearrange(w, "w j -> 1 1 w 1 1 j"),
        ]
        return rearrange(full, "f h w g i j -> (f h w) (g i j)")

    def _lag_covariance(self, level: int, other: int) -> Tensor:
        return self.field.covariance(self.pyramid.pitch(level), self.pyramid.pitch(other))

    def _solve(self, level: int, parents: tuple[tuple[int, Triple, float], ...]) -> _Posterior:
        """Return a patch's posterior given parents, each (level, child's corner minus parent's corner, sigma_eff)."""
        own = (level, (0, 0, 0))
        prior = self.covariance(own, own)
        if not parents:
            variances, basis = torch.linalg.eigh(prior)
            return _Posterior(prior.new_zeros(len(prior), 0), basis, variances.clamp(min=0))
        places = [(k, (-f, -h, -w)) for k, (f, h, w), _ in parents]
        joint = torch.cat(
            [torch.cat([self.covariance(a, b) for b in places], dim=1) for a in places], dim=0
        )  # [K * N, K * N]
        noise = repeat(
            torch.tensor([sigma_eff**2 for _, _, sigma_eff in parents], dtype=torch.float64),
            "k -> (k n)",
            n=len(prior),
        )
        joint = joint + torch.diag(noise + _JITTER * self.field.std**2)
        cross = torch.cat([self.covariance(own, place) for place in places], dim=1)  # [N, K * N]
        gain = torch.linalg.solve(joint, cross.T).T
        left = prior - gain @ cross.T
        variances, basis = torch.linalg.eigh((left + left.T) / 2)
        return _Posterior(gain, basis, variances.clamp(min=0))

    def _sigma_eff(self, level: int, sigma: Tensor) -> Tensor:
        return sigma.detach().cpu().double() * self.sigma_in[level]

    def _corner(self, level: int, coords: Coords) -> Tensor:
        """Return the lower corners of patches, [B, 3] long, in full-resolution pixels."""
        size = torch.tensor(self.pyramid.size(level), dtype=torch.float64)
        own = (coords.offset.detach().cpu().double() * size).round().long()
        return own * torch.tensor(self.pyramid.pitch(level))


@hookimpl
def register_datasets(register: Register) -> None:
    """Register ``gaussian_world``."""
    register(
        "gaussian_world",
        GaussianWorld,
        source="a world of known answers, made for testing; spectrum as in natural video",
    )
