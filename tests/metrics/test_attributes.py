"""The metric attributes: right on real clips at every level, and seen by it: blur, noise, order, motion, tiles."""

import math
from types import SimpleNamespace

import pytest
import torch

from hpdm_core import load_cell
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import ClipShape
from hpdm_core.data.shapes import ATTRIBUTES, CLASSES, COLOURS, DIRECTIONS, GROUND, SHAPES, Attributes
from hpdm_core.metrics.corruptions import CORRUPTIONS
from hpdm_core.pyramid import Pyramid, downsample
from hpdm_core.sampling.files import from_uint8, to_uint8
from hpdm_plugins.data.shapes import Shapes
from hpdm_plugins.metrics.attributes import ReadBack, Reader, figures, spread

SMALL = Pyramid(video=(8, 32, 32), patch=(8, 8, 8), token=(8, 1, 1), levels=3, channels=3)
LARGE = Pyramid(video=(16, 64, 64), patch=(4, 16, 16), token=(1, 2, 2), levels=3, channels=3)
WIDE = Pyramid(video=(8, 32, 48), patch=(4, 16, 24), token=(1, 2, 2), levels=2, channels=3)
CLIPS = 48


def real(pyramid, numbers):
    """Held-out clips, uint8 [n, F, H, W, C] per level, and their labels."""
    dataset = Shapes(ClipShape(*pyramid.video), None)
    clips = [dataset.draw("held_out", generator("clips", number)) for number in numbers]
    videos = torch.stack([clip.video for clip in clips])
    levels = [to_uint8(downsample(videos, pyramid.pitch(level), "area")) for level in range(pyramid.levels)]
    return levels, [clip.label for clip in clips]


def measured(pyramid, levels, labels, *, downsampling="area"):
    readings = [
        Reader(pyramid, level, downsampling).read(from_uint8(videos)) for level, videos in enumerate(levels)
    ]
    return figures(readings, labels, min(pyramid.video[1:]))


@pytest.fixture(scope="module")
def clips():
    """Two sets of real clips, and the figures of the first."""
    first, second = (real(SMALL, range(start, start + CLIPS)) for start in (0, CLIPS))
    return SimpleNamespace(figures=measured(SMALL, *first), other=second)


@pytest.mark.parametrize(
    ("pyramid", "number"), [(SMALL, 360), (LARGE, 36), (WIDE, 36)], ids=["small", "large", "wide"]
)
def test_real_clips_are_read_right_on_every_level(pyramid, number):
    found = measured(pyramid, *real(pyramid, range(number)))
    for level, values in enumerate(found):
        assert values["wrong"].mean() <= 0.01, level
        assert values["unsteady"].mean() <= 0.01, level
    finest = found[-1]
    assert finest["disagree"].mean() <= 0.01 and finest["apart"].mean() < 0.3
    assert finest["off_path"].mean() < 0.15 and finest["residual"].mean() < 0.1


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_what_people_see_is_seen_on_every_level(clips, corruption):
    """Beyond three spreads by at least one figure; which one says what went wrong."""
    levels, labels = clips.other
    spoil = CORRUPTIONS[corruption]
    spoiled = [
        torch.stack([spoil(clip, generator(corruption, level, index)) for index, clip in enumerate(videos)])
        for level, videos in enumerate(levels)
    ]
    wanted = {
        "blur": {"residual"},
        "noise": {"residual"},
        "shuffle": {"wrong", "wrong_direction", "off_path"},
        "freeze": {"wrong", "wrong_direction"},
        "swap_tiles": {"wrong", "wrong_direction", "off_path", "residual"},
    }[corruption]
    for found, before in zip(measured(SMALL, spoiled, labels), clips.figures, strict=True):
        moved = {
            name
            for name, values in found.items()
            if values.mean() - before[name].mean() > 3 * spread(name, before[name], CLIPS)
        }
        assert wanted <= moved
        if corruption in ("shuffle", "freeze"):
            assert not moved & {"wrong_shape", "wrong_colour", "unsteady"}


def test_other_real_clips_are_not_seen(clips):
    """Three spreads are rare by chance: none of 22 figures is beyond four, and at most one beyond three."""
    found = measured(SMALL, *clips.other)
    far = [
        abs(float(values.mean() - before[name].mean())) / spread(name, before[name], CLIPS)
        for here, before in zip(found, clips.figures, strict=True)
        for name, values in here.items()
    ]
    assert len(far) == 25 and max(far) < 4 and sum(value > 3 for value in far) <= 1


@pytest.mark.parametrize("level", range(3))
def test_places_and_directions_are_those_of_the_clip(level):
    reader = Reader(SMALL, level, "area")
    for index, label in enumerate(range(0, 36, 5)):
        attributes = ATTRIBUTES[label]
        middle = (0.45 + 0.01 * index, 0.55 - 0.01 * index)
        video = attributes.video(middle, torch.tensor(GROUND), SMALL.video)
        reading = reader.read(downsample(video, SMALL.pitch(level), "area")[None])
        found = [
            list(names)[at]
            for names, at in zip((SHAPES, COLOURS, DIRECTIONS), reading.labels[0].tolist(), strict=True)
        ]
        assert Attributes(*found) == attributes
        times = (torch.arange(8) + 0.5) / 8 - 0.5
        wanted = torch.tensor(middle) + 0.3 * times[:, None] * torch.tensor(DIRECTIONS[attributes.direction])
        assert (reading.places[0] - wanted).abs().max() < 0.35 / 32
        assert reading.steady.item() == 1 and reading.residual.item() < 0.03


def test_frames_are_averaged_where_the_data_average_them():
    """Coarse levels of LARGE have a quarter of the frames; read by the middle frame alone, a template is sharper."""
    videos = torch.stack(
        [ATTRIBUTES[label].video((0.5, 0.5), torch.tensor(GROUND), LARGE.video) for label in range(4)]
    )
    averaged = downsample(videos, LARGE.pitch(0), "area")
    right, wrong = (
        Reader(LARGE, 0, mode).read(averaged).residual.mean() for mode in ("area", "centre_frame")
    )
    assert right < 0.003 and wrong > 3 * right


def test_the_residual_is_the_distance_to_the_clearest_clip_over_the_contrast():
    video = ATTRIBUTES[0].video((0.5, 0.5), torch.tensor(GROUND), SMALL.video)[None]
    reader = Reader(SMALL, 2, "area")
    lifted, contrast = reader.read(video + 0.3), torch.tensor(COLOURS["red"]) - GROUND
    assert lifted.residual.item() == pytest.approx(0.3 / contrast.square().mean().sqrt().item(), rel=0.01)
    assert lifted.labels.tolist() == reader.read(video).labels.tolist()


@pytest.mark.parametrize(
    ("frames", "moves"), [([3] * 8, False), ([2, 2, 3, 3, 4, 4, 5, 5], False), (range(8), True)]
)
def test_what_moves_less_than_half_the_way_has_no_direction(frames, moves):
    video = Attributes("cross", "green", "down").video((0.5, 0.5), torch.tensor(GROUND), SMALL.video)
    reading = Reader(SMALL, 2, "area").read(video[None, :, list(frames)])
    assert reading.direction.tolist() == [list(DIRECTIONS).index("down") if moves else -1]


def test_a_shape_that_changes_is_unsteady():
    one, other = (
        Attributes(shape, "blue", "right").video((0.5, 0.5), torch.tensor(GROUND), SMALL.video)
        for shape in ("circle", "cross")
    )
    mixed = torch.cat([one[:, :6], other[:, 6:]], dim=1)[None]
    reading = Reader(SMALL, 2, "area").read(mixed)
    assert reading.steady.item() == 0.75
    assert list(SHAPES)[reading.shape.item()] == "circle"


def test_the_spread_is_that_of_a_difference_of_means():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spread("residual", values, 12) == pytest.approx(math.sqrt(5 / 3) * math.sqrt(1 / 4 + 1 / 12))
    assert math.isnan(spread("off_path", values[:1], 12))
    wrong = torch.tensor([0.0, 0.0, 1.0])
    assert spread("wrong", wrong, 3) == pytest.approx(math.sqrt(0.4 * 0.6 * 2 / 3))
    assert spread("wrong", torch.zeros(3), 3) == pytest.approx(math.sqrt(0.2 * 0.8 * 2 / 3))


def cell(*sets):
    return load_cell("small_shapes", sets=["evaluation.samples=20", *sets])


def rows_of(assembly, levels):
    """The metric's rows where the stored samples are ``levels``."""
    context = SimpleNamespace(
        assembly=assembly,
        samples=lambda level, indices: levels[level][list(indices)],
        reals=lambda split, numbers: real(SMALL, [1000 + number for number in numbers]),
    )
    return {
        (row["metric"].removeprefix("attributes."), row["level"]): row for row in ReadBack().evaluate(context)
    }


def sampled(labels):
    """Clips with ``labels``, uint8 per level."""
    videos = torch.stack(
        [ATTRIBUTES[label].video((0.5, 0.5), torch.tensor(GROUND), SMALL.video) for label in labels]
    )
    return [to_uint8(downsample(videos, SMALL.pitch(level), "area")) for level in range(3)]


def test_samples_are_held_against_their_own_labels():
    rows = rows_of(cell(), sampled(range(20)))
    for level in range(3):
        assert rows["wrong", level]["value"] == 0
        assert rows["wrong.floor", level]["value"] == 0
        assert rows["wrong.floor", level]["spread"] > 0
    turned = rows_of(
        cell(), sampled([label ^ 1 for label in range(20)])
    )  # the neighbouring class: the other way
    assert turned["wrong", 2]["value"] == turned["wrong_direction", 2]["value"] == 1
    assert turned["wrong_shape", 2]["value"] == turned["wrong_colour", 2]["value"] == 0


def test_levels_that_show_something_else_disagree():
    levels = sampled(range(20))
    levels[1] = levels[1].roll(1, dims=0)  # label 0 shows 19, any other the one before
    rows = rows_of(cell(), levels)
    assert rows["disagree", 1]["value"] == rows["disagree", 2]["value"] == 1
    assert rows["wrong", 1]["value"] == 1 and rows["wrong", 2]["value"] == 0
    assert ("disagree", 0) not in rows


def test_without_labels_nothing_is_wrong():
    rows = rows_of(cell("model.classes=0"), sampled(range(20)))
    assert not any(name.startswith("wrong") for name, _ in rows)
    assert rows["unsteady", 2]["value"] == 0


def test_other_data_are_refused():
    with pytest.raises(InputError, match=r"metric attributes: model.classes is 3; .* allowed is 36, or 0"):
        ReadBack().protocol(load_cell("tiny_clips"))
    other = cell("data.dataset={use: synthetic, classes: 36}")
    with pytest.raises(InputError, match=r"data.dataset 'synthetic' has no attributes to read"):
        ReadBack().evaluate(SimpleNamespace(assembly=other))
    assert cell().dataset.classes == CLASSES
