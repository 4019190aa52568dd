"""Each conformance check is held against a part that breaks what it guards, and must say so."""

import itertools
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import nn

from hpdm_core import Content, ContextFusion
from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import DataConfig
from hpdm_core.data.dataset import Clip
from hpdm_core.data.readers import ReadError, VideoInfo
from hpdm_core.diffusion import Slot, plan
from hpdm_core.plugins import build_plugins
from hpdm_core.testing import (
    BackboneCases,
    ComputationAllocationCases,
    ContextFusionCases,
    CoordinateSamplerCases,
    DatasetCases,
    FeatureExtractorCases,
    MetricCases,
    NoiseSamplerCases,
    NoiseScalingCases,
    ObjectiveCases,
    OptimizerCases,
    SolverCases,
    VideoReaderCases,
    run_conformance,
)

# Each part below is sound but for what its name says.


class Sound(ContextFusion):
    """The parents' mean token through one map per block."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.maps = nn.ModuleDict(
            {str(b): nn.Linear(shape.token_dim, shape.token_dim) for b in shape.fused_blocks}
        )

    def token_context(self, block, level, coords, sources):
        mean = torch.stack([source.tokens.mean(1) for source in sources]).mean(0)
        return self.maps[str(block)](mean)

    def fuse(self, block, level, tokens, context, coords, sigma):
        return tokens + context[:, None]


class MixesRowsOfContext(Sound):
    def token_context(self, block, level, coords, sources):
        made = super().token_context(block, level, coords, sources)
        return made - made.mean(0)


class MixesRowsOfTokens(Sound):
    def fuse(self, block, level, tokens, context, coords, sigma):
        return super().fuse(block, level, tokens, context, coords, sigma) - tokens.mean((0, 1))


class MixesRowsOfPixels(Sound):
    def __init__(self, shape):
        super().__init__(shape)
        self.extra_channels = shape.channels

    def pixel_context(self, level, coords, sources):
        return sources[-1].noisy - sources[-1].noisy.mean(0)


class SeesTheChild(Sound):
    """The context remembers the child of the call before."""

    child = 0.0

    def token_context(self, block, level, coords, sources):
        return super().token_context(block, level, coords, sources) + self.child

    def fuse(self, block, level, tokens, context, coords, sigma):
        self.child = tokens.mean((1, 2)).mean()
        return super().fuse(block, level, tokens, context, coords, sigma)


class SharesBetweenTiles(Sound):
    """fuse reads what token_context last left, not what it is handed."""

    last = None

    def token_context(self, block, level, coords, sources):
        self.last = super().token_context(block, level, coords, sources)
        return self.last

    def fuse(self, block, level, tokens, context, coords, sigma):
        return tokens + (context if self.last is None else self.last)[:, None]


class LeaksToParents(Sound):
    """Parents are shifted by what their children's tokens were, in the pass before or in this one."""

    seen = None

    def token_context(self, block, level, coords, sources):
        if self.seen is not None and level < self.shape.levels - 1:
            return super().token_context(block, level, coords, sources) + self.seen
        return super().token_context(block, level, coords, sources)

    def fuse(self, block, level, tokens, context, coords, sigma):
        if level == self.shape.levels - 1:
            self.seen = tokens.mean((1, 2)).mean()
        return super().fuse(block, level, tokens, context, coords, sigma)


class NotFiniteAtLargeSigma(Sound):
    def fuse(self, block, level, tokens, context, coords, sigma):
        return tokens + (context * sigma.exp()[:, None] / sigma.exp()[:, None])[:, None]


class NotFiniteWithoutNoise(Sound):
    def token_context(self, block, level, coords, sources):
        return super().token_context(block, level, coords, sources) + 0 * sources[0].sigma.log()[:, None]


class CutsGradients(Sound):
    def token_context(self, block, level, coords, sources):
        return super().token_context(block, level, coords, sources).detach()


class Draws(Sound):
    """Dropout that does not ask whether it is training."""

    def fuse(self, block, level, tokens, context, coords, sigma):
        return super().fuse(block, level, nn.functional.dropout(tokens), context, coords, sigma)


class HidesWeights(Sound):
    """Weights in a list: not in the state dict, and never trained."""

    def __init__(self, shape):
        super().__init__(shape)
        self.hidden = [torch.randn(shape.token_dim)]

    def fuse(self, block, level, tokens, context, coords, sigma):
        return super().fuse(block, level, tokens, context, coords, sigma) + self.hidden[0]


class WrongWidth(Sound):
    def fuse(self, block, level, tokens, context, coords, sigma):
        return super().fuse(block, level, tokens, context, coords, sigma)[..., :-1]


class ChangesTokensInPlace(Sound):
    def fuse(self, block, level, tokens, context, coords, sigma):
        return tokens.mul_(2)


class WrongChannels(Sound):
    extra_channels = 1

    def pixel_context(self, level, coords, sources):
        return sources[-1].noisy.repeat(1, 2, 1, 1, 1)


class NeedsTwoLevels(Sound):
    def __init__(self, shape):
        super().__init__(shape)
        self.first = shape.fused_blocks[0]


class SwapsAxes(Sound):
    """Takes height for width: right for cubic sizes only."""

    def fuse(self, block, level, tokens, context, coords, sigma):
        f, h, w = self.shape.grid
        places = coords.centres((f, w, h)).view(len(tokens), 3, f, h, w)[:, 0].flatten(1)
        return tokens.view(len(tokens), f, w, h, -1).flatten(1, 3)[:, : f * h * h] + places[:, :, None]


class StaysOnTheCPU(Sound):
    """Asks a tensor for its value, which only the CPU has."""

    def fuse(self, block, level, tokens, context, coords, sigma):
        scale = 1.0 if float(sigma.max()) > 0 else 0.0
        return super().fuse(block, level, tokens * scale, context, coords, sigma)


def failing(cases, factory, **attributes):
    """Return check -> message of the checks that fail."""
    case = type("Under", (cases,), {"factory": staticmethod(factory), **attributes})()
    found = {}
    for check in case.checks():
        try:
            getattr(case, check)()
        except pytest.skip.Exception:
            raise
        except Exception as error:
            found[check.removeprefix("test_")] = str(error)
    return found


def test_a_sound_fusion_passes():
    assert failing(ContextFusionCases, Sound) == {}


@pytest.mark.parametrize(
    ("fusion", "check", "message"),
    [
        (MixesRowsOfContext, "rows_are_independent", "token_context of row 0 alone"),
        (MixesRowsOfTokens, "rows_are_independent", "fuse of row 0 alone"),
        (MixesRowsOfPixels, "rows_are_independent", "pixel_context of row 0 alone"),
        (SeesTheChild, "keeps_no_state", "token_context after calls for other patches"),
        (SharesBetweenTiles, "keeps_no_state", "fuse after calls for other patches"),
        (LeaksToParents, "coarse_to_fine", "level 1's output"),
        (NotFiniteAtLargeSigma, "finite_at_the_ends_of_sigma", "not finite at sigma 1000"),
        (NotFiniteWithoutNoise, "finite_at_the_ends_of_sigma", "with parents at sigma 0.0"),
        (CutsGradients, "gradients_reach_used_parameters", "no gradient reaches it"),
        (Draws, "deterministic", "random numbers"),
        (HidesWeights, "state_dict_round_trip", "loaded from a state dict"),
        (WrongWidth, "shapes", "fuse gives"),
        (ChangesTokensInPlace, "shapes", "in place"),
        (WrongChannels, "shapes", "pixel_context gives"),
        (NeedsTwoLevels, "single_level", "index out of range"),
        (SwapsAxes, "shapes", "size of tensor"),
        (StaysOnTheCPU, "meta_device", "meta"),
        (lambda shape: nn.Identity(), "is_a_fusion", "does not extend ContextFusion"),
    ],
)
def test_broken_fusions_are_found(fusion, check, message):
    case = type("Under", (ContextFusionCases,), {"factory": staticmethod(fusion)})()
    with pytest.raises(Exception, match=message):
        getattr(case, f"test_{check}")()


def test_a_fusion_that_reads_its_own_memory_in_a_joint_pass_differs_from_the_cached_one():
    """`joint_equals_cached` sees a context that depends on which blocks ran before."""

    class CountsCalls(Sound):
        def __init__(self, shape):
            super().__init__(shape)
            self.calls = itertools.count()

        def token_context(self, block, level, coords, sources):
            return super().token_context(block, level, coords, sources) + next(self.calls)

    assert "joint_equals_cached" in failing(ContextFusionCases, CountsCalls)


# The other families


def falling(blocks, levels):
    return [levels, *[1] * (blocks - 1)]


class Escapes:
    """Offsets that are not nested."""

    def __init__(self, pyramid):
        self.pyramid = pyramid

    def sample(self, generator):
        rows = [
            [
                int(torch.randint(size - patch + 1, (), generator=generator))
                for size, patch in zip(*sizes, strict=True)
            ]
            for sizes in (
                (self.pyramid.size(level), self.pyramid.patch) for level in range(self.pyramid.levels)
            )
        ]
        return torch.tensor(rows)


class Stuck(Escapes):
    def sample(self, generator):
        return torch.zeros(self.pyramid.levels, 3, dtype=torch.int64)


class Fractional(Escapes):
    def sample(self, generator):
        return torch.zeros(self.pyramid.levels, 3)


class GlobalOffsets(Escapes):
    def sample(self, generator):
        return torch.zeros(self.pyramid.levels, 3, dtype=torch.int64) + int(torch.rand(()) * 0)


class Noise:
    def __init__(self, sigma_in):
        self.slots = plan(len(sigma_in))

    def draw(self, generator):
        return torch.randn(len(self.slots), generator=generator).exp(), torch.ones(
            len(self.slots), dtype=torch.bool
        )


class NegativeSigma(Noise):
    def draw(self, generator):
        sigma, in_loss = super().draw(generator)
        return sigma.log(), in_loss


class IntegerMask(Noise):
    def draw(self, generator):
        sigma, in_loss = super().draw(generator)
        return sigma, in_loss.long()


class NeverTrainsTheFinest(Noise):
    def draw(self, generator):
        sigma, in_loss = super().draw(generator)
        in_loss[1:] = False
        return sigma, in_loss


class TrainsWhatIsOnlyContext(Noise):
    def __init__(self, sigma_in):
        super().__init__(sigma_in)
        self.slots = tuple(Slot(slot.level, slot.sources, context_only=True) for slot in self.slots)


class SourcesFromFine(Noise):
    def __init__(self, sigma_in):
        super().__init__(sigma_in)
        self.slots = tuple(Slot(level=slot.level, sources=slot.sources[::-1]) for slot in self.slots)


class GlobalNoise(Noise):
    def draw(self, generator):
        return torch.randn(len(self.slots)).exp(), super().draw(generator)[1]


class Velocity:
    """Variant A: exact v at sigma_eff."""

    def target(self, clean, noise, sigma, sigma_in):
        s = (sigma * sigma_in).view(-1, 1, 1, 1, 1)
        return (noise - s * clean) / (1 + s**2).sqrt()

    def denoised(self, noisy, prediction, sigma, sigma_in):
        s = (sigma * sigma_in).view(-1, 1, 1, 1, 1)
        return sigma_in * noisy / (1 + s**2) - s / (1 + s**2).sqrt() * prediction

    def weight(self, sigma, sigma_in):
        return torch.ones_like(sigma)


class ForgetsInputScale(Velocity):
    def denoised(self, noisy, prediction, sigma, sigma_in):
        return super().denoised(noisy / sigma_in, prediction, sigma, sigma_in)


class Clips(Velocity):
    def denoised(self, noisy, prediction, sigma, sigma_in):
        return super().denoised(noisy, prediction, sigma, sigma_in).clamp(-1, 1)


class WeightsNothing(Velocity):
    def weight(self, sigma, sigma_in):
        return (sigma - 1).clamp(min=0)


class MixesRows(Velocity):
    def weight(self, sigma, sigma_in):
        return sigma / sigma.mean()


class Euler:
    def __init__(self, sigma_in, *, steps: int = 40):
        self.sigma_in = sigma_in
        top, end = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
        self.sigmas = [(top + i / (steps - 1) * (end - top)) ** 7 for i in range(steps)] + [0.0]

    def calls(self, level):
        return len(self.sigmas) - 1

    def solve(self, level, denoise, noise):
        z = noise(0) * self.sigmas[0]
        for now, then in itertools.pairwise(self.sigmas):
            z = z + (then - now) * (z - denoise(z, now) / self.sigma_in[level]) / now
        return z * self.sigma_in[level]


class ForgetsToScaleBack(Euler):
    def solve(self, level, denoise, noise):
        return super().solve(level, denoise, noise) / self.sigma_in[level]


class StopsEarly(Euler):
    def __init__(self, sigma_in):
        super().__init__(sigma_in)
        self.sigmas = self.sigmas[:30]


class OwnNoise(Euler):
    def solve(self, level, denoise, noise):
        return super().solve(level, denoise, lambda index: torch.randn_like(noise(index)))


class AsksTwice(Euler):
    def solve(self, level, denoise, noise):
        noise(0)
        return super().solve(level, denoise, noise)


class Miscounts(Euler):
    def calls(self, level):
        return 1


class Ascends(torch.optim.SGD):
    def __init__(self, named_parameters, lr):
        super().__init__([p for _, p in named_parameters], lr=lr, maximize=True)


class IgnoresTheSchedule(torch.optim.SGD):
    def __init__(self, named_parameters, lr):
        super().__init__([p for _, p in named_parameters], lr=lr)
        self.fixed = lr

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.fixed
        return super().step(closure)


class ForgetsItsState(torch.optim.SGD):
    def __init__(self, named_parameters, lr):
        super().__init__([p for _, p in named_parameters], lr=lr, momentum=0.9)

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class Wobbles(torch.optim.SGD):
    def __init__(self, named_parameters, lr):
        super().__init__([p for _, p in named_parameters], lr=lr * (1 + 0.1 * float(torch.rand(()))))
        self.seed = next(SEEDS)

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1e-3 * self.seed)


SEEDS = itertools.count()


class Blocks(nn.Module):
    """A backbone of linear maps, with one latent."""

    def __init__(self, token_dim, blocks):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, token_dim))
        self.maps = nn.ModuleList(nn.Linear(token_dim, token_dim) for _ in range(blocks))

    def start(self, previous, batch):
        first = self.first[None].expand(batch, -1, -1)
        return first if previous is None else first + previous

    def run(self, block, tokens, latents, condition):
        latents = latents + self.maps[block](tokens.mean(1, keepdim=True) + condition.mean(1, keepdim=True))
        return tokens + latents, latents


class StartsElsewhere(Blocks):
    def start(self, previous, batch):
        return super().start(previous, batch) + (0 if previous is None else 1)


class MixesTheBatch(Blocks):
    def run(self, block, tokens, latents, condition):
        return super().run(block, tokens, latents - latents.mean(0), condition)


class IgnoresTheCondition(Blocks):
    def run(self, block, tokens, latents, condition):
        return super().run(block, tokens, latents, 0 * condition)


class Grows(Blocks):
    def run(self, block, tokens, latents, condition):
        tokens, latents = super().run(block, tokens, latents, condition)
        return tokens, torch.cat([latents, latents], dim=1)


class Stateless(Blocks):
    """No latents, and it asks for the grid."""

    def __init__(self, token_dim, blocks, grid):
        super().__init__(token_dim, blocks)
        del self.first
        self.place = nn.Parameter(torch.randn(*grid, token_dim))

    def start(self, previous, batch):
        return None

    def run(self, block, tokens, latents, condition):
        places = self.place.flatten(0, 2)
        return tokens + self.maps[block](tokens + places + condition.mean(1, keepdim=True)), latents


class ForgetsItsLatents(Blocks):
    def run(self, block, tokens, latents, condition):
        return super().run(block, tokens, latents, condition)[0], None


class MakesLatents(Stateless):
    def run(self, block, tokens, latents, condition):
        tokens, _ = super().run(block, tokens, latents, condition)
        return tokens, tokens


class Data:
    classes = ("one", "two")

    def __init__(self, clip, reader):
        self.shape = (clip.channels, clip.frames, clip.height, clip.width)
        self.drawn = 0

    def draw(self, split, generator):
        self.drawn += 1
        return Clip(
            torch.rand(self.shape, generator=generator) * 2 - 1,
            int(torch.randint(2, (), generator=generator)),
        )

    def distinct(self, split):
        return None

    def describe(self):
        return {"name": "data"}


class Unscaled(Data):
    def draw(self, split, generator):
        clip = super().draw(split, generator)
        return Clip(clip.video * 127, clip.label)


class LabelTooLarge(Data):
    classes = ("one",)


class DependsOnHistory(Data):
    def draw(self, split, generator):
        clip = super().draw(split, generator)
        return Clip(clip.video * (0.5 if self.drawn > 3 else 1.0), clip.label)


class OneFrameForAll(Data):
    def draw(self, split, generator):
        return Clip(torch.zeros(self.shape), 0)


class LendsItsMemory(Data):
    def __init__(self, clip, reader):
        super().__init__(clip, reader)
        self.memory = torch.rand(self.shape)

    def draw(self, split, generator):
        return Clip(self.memory, 0)


class TensorInDescription(Data):
    def describe(self):
        return {"name": torch.zeros(1)}


class CountsInDescription(Data):
    def describe(self):
        return {"drawn": self.drawn}


class ListsTooFew(Data):
    def distinct(self, split):
        return [Clip(torch.zeros(self.shape), 0)]


class Reader:
    """Wraps the installed reader, so that one thing at a time can be wrong."""

    def __init__(self):
        self.inner = INSTALLED.make("video_readers", PYAV)

    def probe(self, path):
        return self.inner.probe(path)

    def read(self, path, frames, *, short_side=None):
        return self.inner.read(path, frames, short_side=short_side)

    def describe(self):
        return self.inner.describe()


class OffByOne(Reader):
    def read(self, path, frames, *, short_side=None):
        return self.inner.read(path, [max(0, number - 1) for number in frames], short_side=short_side)


class BGR(Reader):
    def read(self, path, frames, *, short_side=None):
        return super().read(path, frames, short_side=short_side).flip(-1)


class IgnoresShortSide(Reader):
    def read(self, path, frames, *, short_side=None):
        return super().read(path, frames)


class SaysNothing(Reader):
    def read(self, path, frames, *, short_side=None):
        try:
            return super().read(path, frames, short_side=short_side)
        except ReadError:
            return torch.zeros(len(frames), 48, 80, 3, dtype=torch.uint8)


class SwapsSides(Reader):
    def probe(self, path):
        info = super().probe(path)
        return VideoInfo(info.frames, info.width, info.height, info.fps)


class Means:
    name = "means"

    def features(self, videos):
        return videos.double().mean((1, 2, 3))

    def describe(self):
        return {"extractor": self.name}


class StandardisesTheBatch(Means):
    def features(self, videos):
        made = super().features(videos)
        return made - made.mean(0)


class DividesByContrast(Means):
    def features(self, videos):
        flat = videos.double().flatten(1)
        return (flat.mean(1) / flat.std(1))[:, None]


class SizeDecidesWidth(Means):
    def features(self, videos):
        return videos.double().mean((2, 3, 4))


class AllAlike(Means):
    def features(self, videos):
        return torch.zeros(len(videos), 3)


class RandomProjection(Means):
    def __init__(self):
        self.map = torch.randn(3, 2, dtype=torch.float64)

    def features(self, videos):
        return super().features(videos) @ self.map


class Rows:
    name = "rows"
    needs = "samples"

    def __init__(self, *, count: int = 2):
        self.count = count

    def protocol(self, assembly):
        return {"metric": self.name, "count": self.count}

    def evaluate(self, context):
        return [{"metric": self.name, "level": 0, "value": 1.0}]


class UnknownNeed(Rows):
    needs = "everything"


class HidesAnOption(Rows):
    def protocol(self, assembly):
        return {"metric": self.name}


class TensorInProtocol(Rows):
    def protocol(self, assembly):
        return {"count": torch.tensor(self.count)}


class NoSuchLevel(Rows):
    def evaluate(self, context):
        return [{"metric": self.name, "level": 3, "value": 1.0}]


class Counts(Rows):
    total = itertools.count()

    def evaluate(self, context):
        return [{"metric": self.name, "level": None, "value": float(next(self.total))}]


INSTALLED = build_plugins()
PYAV = DataConfig.model_fields["reader"].default

SOUND = [
    (NoiseSamplerCases, Noise),
    (ObjectiveCases, Velocity),
    (SolverCases, Euler),
    (BackboneCases, Blocks),
    (BackboneCases, Stateless),
    (DatasetCases, Data),
    (VideoReaderCases, Reader),
    (FeatureExtractorCases, Means),
    (MetricCases, Rows),
]
BROKEN = [
    (ComputationAllocationCases, falling, "allocation_is_valid", "must not fall"),
    (ComputationAllocationCases, lambda blocks, levels: [1] * blocks, "allocation_is_valid", "every level"),
    (
        ComputationAllocationCases,
        lambda blocks, levels: [0, *[levels] * (blocks - 1)],
        "other_shapes",
        "from 1",
    ),
    (CoordinateSamplerCases, Escapes, "nested", "leaves its parent's"),
    (CoordinateSamplerCases, Stuck, "reaches_more_than_one_place", "always offset 0"),
    (CoordinateSamplerCases, Fractional, "integers_on_the_lattice", "wanted int64"),
    (CoordinateSamplerCases, GlobalOffsets, "keyed", "global random numbers"),
    (NoiseScalingCases, lambda levels: [1.0], "one_positive_number_per_level", "1 numbers"),
    (NoiseScalingCases, lambda levels: range(levels), "one_positive_number_per_level", "above 0"),
    (NoiseScalingCases, lambda levels: torch.rand(levels).tolist(), "deterministic", "differ"),
    (NoiseSamplerCases, NegativeSigma, "sigma_is_positive", "above 0"),
    (NoiseSamplerCases, IntegerMask, "in_loss_is_boolean", "wanted torch.bool"),
    (NoiseSamplerCases, NeverTrainsTheFinest, "in_loss_is_boolean", "never trained"),
    (NoiseSamplerCases, TrainsWhatIsOnlyContext, "in_loss_is_boolean", "context_only"),
    (NoiseSamplerCases, SourcesFromFine, "slots_are_valid", "coarsest first"),
    (NoiseSamplerCases, GlobalNoise, "keyed", "random numbers"),
    (ObjectiveCases, ForgetsInputScale, "perfect_prediction_decodes_to_clean", "differs"),
    (ObjectiveCases, Clips, "loss_identity", "affine"),
    (ObjectiveCases, WeightsNothing, "weight_is_positive", "above 0"),
    (ObjectiveCases, MixesRows, "rows_and_types", "weight of row 0 alone"),
    (SolverCases, ForgetsToScaleBack, "gaussian_denoiser", "standard deviation"),
    (SolverCases, ForgetsToScaleBack, "constant_denoiser", "level 1"),
    (SolverCases, StopsEarly, "constant_denoiser", "differs"),
    (SolverCases, OwnNoise, "keyed", "random numbers"),
    (SolverCases, AsksTwice, "noise_indices", "each once"),
    (SolverCases, Miscounts, "calls", "calls\\(\\) says 1"),
    (OptimizerCases, Ascends, "reduces_a_quadratic", "goes from"),
    (OptimizerCases, IgnoresTheSchedule, "learning_rate_is_read_from_the_groups", "learning rate 0"),
    (OptimizerCases, ForgetsItsState, "state_dict_round_trip", "these differ"),
    (OptimizerCases, Wobbles, "deterministic", "two equal runs differ"),
    (BackboneCases, StartsElsewhere, "no_previous_latents_equal_zeros", "start"),
    (BackboneCases, MixesTheBatch, "rows_are_independent", "row 0 alone"),
    (BackboneCases, IgnoresTheCondition, "gradients", "the gradient of condition is 0"),
    (BackboneCases, Grows, "shapes", "latents"),
    (BackboneCases, ForgetsItsLatents, "shapes", "latents None, wanted"),
    (BackboneCases, MakesLatents, "shapes", "latents .*, wanted None"),
    (DatasetCases, Unscaled, "clips", "wanted -1 to 1"),
    (DatasetCases, LabelTooLarge, "clips", "label 1"),
    (DatasetCases, DependsOnHistory, "keyed", "the same generator"),
    (DatasetCases, OneFrameForAll, "keyed", "one and the same clip"),
    (DatasetCases, OneFrameForAll, "splits_differ", "appears in"),
    (DatasetCases, LendsItsMemory, "clips_are_the_callers", "in place"),
    (DatasetCases, DependsOnHistory, "threads", "drawn alone"),
    (DatasetCases, TensorInDescription, "describe", "is not JSON"),
    (DatasetCases, CountsInDescription, "describe", "changes by drawing"),
    (DatasetCases, ListsTooFew, "distinct", "does not list"),
    (VideoReaderCases, OffByOne, "reads_the_frames_asked_for", "wrong frame"),
    (VideoReaderCases, OffByOne, "frames_of_a_container_without_their_times", "wrong frame"),
    (VideoReaderCases, BGR, "reads_the_frames_asked_for", "colour"),
    (VideoReaderCases, IgnoresShortSide, "short_side", "wanted"),
    (VideoReaderCases, SaysNothing, "unreadable_files", "wanted ReadError"),
    (VideoReaderCases, SwapsSides, "probe", "wanted"),
    (FeatureExtractorCases, StandardisesTheBatch, "clips_are_independent", "clip 0 alone"),
    (FeatureExtractorCases, DividesByContrast, "flat_videos", "not finite"),
    (FeatureExtractorCases, SizeDecidesWidth, "features", "widths"),
    (FeatureExtractorCases, AllAlike, "tells_clips_apart", "the same"),
    (FeatureExtractorCases, RandomProjection, "deterministic", "second extractor"),
    (MetricCases, UnknownNeed, "name_and_needs", "allowed: configuration, data"),
    (MetricCases, HidesAnOption, "options_are_in_the_protocol", "count = 2"),
    (MetricCases, TensorInProtocol, "protocol", "is not JSON"),
    (MetricCases, NoSuchLevel, "rows", "level 3"),
    (MetricCases, Counts, "rows", "measured twice"),
]


def case_of(cases, factory):
    made = type("Under", (cases,), {"factory": staticmethod(factory)})()
    made.plugins = INSTALLED if cases in (DatasetCases, MetricCases) else None
    return made


@pytest.mark.parametrize(("cases", "factory"), SOUND, ids=lambda value: value.__name__)
def test_sound_parts_pass(cases, factory):
    case = case_of(cases, factory)
    for check in case.checks():
        getattr(case, check)()


@pytest.mark.parametrize(("cases", "factory", "check", "message"), BROKEN)
def test_broken_parts_are_found(cases, factory, check, message):
    with pytest.raises(AssertionError, match=message):
        getattr(case_of(cases, factory), f"test_{check}")()


class Folder(Data):
    """Clips that hang on the bytes of the files in a folder."""

    def __init__(self, clip, reader, *, root: Annotated[Path, Content()]):
        super().__init__(clip, reader)
        self.root = root
        self.seed = sum(sum(file.read_bytes()) for file in root.iterdir())

    def draw(self, split, generator):
        clip = super().draw(split, generator)
        return Clip(clip.video * (self.seed % 97 / 97), clip.label)


class Unmarked(Folder):
    def __init__(self, clip, reader, *, root: Path):
        super().__init__(clip, reader, root=root)


class KeyedByPlace(Folder):
    def __init__(self, clip, reader, *, root: Annotated[Path, Content(str)]):
        super().__init__(clip, reader, root=root)


class KeyedByNothing(Folder):
    def __init__(self, clip, reader, *, root: Annotated[Path, Content(lambda path: "always")]):
        super().__init__(clip, reader, root=root)


def names(path):
    return " ".join(sorted(file.name for file in path.iterdir()))


class KeyedByNames(Folder):
    def __init__(self, clip, reader, *, root: Annotated[Path, Content(names)]):
        super().__init__(clip, reader, root=root)


class TellsItsPlace(Folder):
    def describe(self):
        return {"name": "data", "root": str(self.root)}


class DrawsByItsPlace(Folder):
    def __init__(self, clip, reader, *, root: Annotated[Path, Content()]):
        super().__init__(clip, reader, root=root)
        self.seed = sum(str(root).encode())


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (Folder, None, ""),
        (Unmarked, "places", "the path in option root would be part of the key"),
        (KeyedByPlace, "elsewhere", "differs for the same content"),
        (KeyedByNothing, "changes_show", "every file there has changed"),
        (KeyedByNames, "changes_show", "every file there has changed"),
        (TellsItsPlace, "elsewhere", "describe: depends on the path in option root"),
        (DrawsByItsPlace, "elsewhere", "at another place gives another clip"),
    ],
)
def test_a_dataset_that_lies_somewhere(tmp_path, factory, check, message):
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / name).write_bytes(name.encode() * 7)
    case = case_of(DatasetCases, factory)
    case.options = {"root": str(tmp_path / "folder")}
    if check is None:
        for each in case.checks():
            getattr(case, each)()
        return
    with pytest.raises(AssertionError, match=message):
        getattr(case, f"test_{check}")()


def test_run_conformance_reports_each_failure_in_one_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        "from hpdm_core import ContextFusion, hookimpl\n"
        "class Broken(ContextFusion):\n"
        "    def __init__(self, shape):\n"
        "        super().__init__()\n"
        "    def fuse(self, block, level, tokens, context, coords, sigma):\n"
        "        return tokens / nothing\n"
        "@hookimpl\n"
        "def register_context_fusions(register):\n"
        "    register('broken', Broken, source='a test')\n"
    )
    results = dict(run_conformance(build_plugins([str(file)]), "context_fusions", "broken"))
    assert results["is a fusion"] is None
    assert results["shapes"] == f"NameError: name 'nothing' is not defined ({file}:6)"


def test_run_conformance_says_which_options_are_needed():
    results = run_conformance(INSTALLED, "computation_allocations", "explicit")
    assert [error for _, error in results] == ["needs options: levels_per_block (they have no default)"]
    given = {"levels_per_block": [1, 1, 2, 2, 3, 3]}
    assert all(
        error is None for _, error in run_conformance(INSTALLED, "computation_allocations", "explicit", given)
    )


def test_run_conformance_refuses_unknown_names():
    with pytest.raises(InputError, match="did you mean 'solvers'"):
        run_conformance(INSTALLED, "solver", "edm")
    with pytest.raises(InputError, match="did you mean 'edm'"):
        run_conformance(INSTALLED, "solvers", "edn")
