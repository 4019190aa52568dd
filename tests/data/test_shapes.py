import math

import pytest
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import ClipDataset, ClipShape
from hpdm_core.data.shapes import (
    ATTRIBUTES,
    CLASSES,
    COLOURS,
    DIRECTIONS,
    GROUND,
    MARGIN,
    RADIUS,
    SHAPES,
    TRAVEL,
    Attributes,
    coverage,
)
from hpdm_core.pyramid import downsample
from hpdm_plugins.data.shapes import Shapes, is_held_out

SHAPE = ClipShape(8, 32, 40)


def drawn(dataset, split, number):
    return [dataset.draw(split, generator("test", index)) for index in range(number)]


def centres(covered):
    """The middles of mass of ``covered`` [F, H, W], in short sides."""
    size = covered.shape[1:]
    mass = covered.sum(dim=(1, 2))
    down, right = ((torch.arange(length) + 0.5) / min(size) for length in size)
    return torch.stack(
        [(covered.sum(dim=2) * down).sum(dim=1) / mass, (covered.sum(dim=1) * right).sum(dim=1) / mass], dim=1
    )


def seen(attributes, middle, size):
    """How much of each pixel [F, H, W] the clip's shape covers, found in its pixels."""
    video = attributes.video(middle, torch.tensor(GROUND), size)
    return (video[0] - GROUND) / (COLOURS[attributes.colour][0] - GROUND)


def test_clips_have_the_range_shape_and_classes(pyav):
    dataset = Shapes(SHAPE, pyav)
    assert isinstance(dataset, ClipDataset)
    assert len(set(dataset.classes)) == 36
    clips = drawn(dataset, "train", 300)
    assert {clip.label for clip in clips} == set(range(36))
    videos = torch.stack([clip.video for clip in clips])
    assert videos.dtype == torch.float32 and videos.shape == (300, 3, 8, 32, 40)
    assert -1 <= videos.min() < -0.9 and videos.max() == pytest.approx(0.9)
    assert (videos < -0.4).float().mean() > 0.85  # dark


def test_labels_names_and_captions_belong_together(pyav):
    dataset = Shapes(SHAPE, pyav)
    label = ATTRIBUTES.index(Attributes("circle", "red", "left"))
    assert dataset.classes[label] == "red circle moving left"
    assert dataset.captions[label] == "a red circle moving left on a dark ground"
    assert len(dataset.captions) == 36


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", math.pi), ("triangle", 2.0), ("cross", 4 * (0.35 * 2 - 0.35**2))]
)
def test_shapes_have_their_areas_wherever_they_lie(shape, area):
    """In squared radii; also where pixels are coarse."""
    for short, tolerance in ((32, 0.02), (128, 0.003)):
        places = 0.5 + torch.rand(20, 2, generator=generator("places")) / 8
        covered = coverage(shape, places, (short, short + 8))
        radii = (short * RADIUS) ** 2
        torch.testing.assert_close(
            covered.sum(dim=(1, 2)) / radii, torch.full((20,), area), rtol=tolerance, atol=0
        )


@pytest.mark.parametrize("label", [0, 7, 14, 21, 26, 35])
def test_the_shape_moves_as_its_class_says_and_stays_inside(label):
    attributes = ATTRIBUTES[label]
    size = (10, 48, 64)
    covered = seen(attributes, (0.45, 0.7), size)
    places = centres(covered)
    ways = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
    sign = torch.tensor(ways[attributes.direction])
    torch.testing.assert_close(places[1:] - places[:-1], sign.expand(9, 2) * TRAVEL / 10, atol=2e-3, rtol=0)
    if attributes.shape != "triangle":  # whose middle is not its middle of mass
        torch.testing.assert_close(places.mean(dim=0), torch.tensor([0.45, 0.7]), atol=2e-3, rtol=0)
    area = covered.sum(dim=(1, 2))
    torch.testing.assert_close(area, area.mean().expand(10), rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_cut_off_at_the_border(shape):
    ends = torch.tensor([MARGIN, 1 - MARGIN])
    places = torch.cartesian_prod(ends, ends)
    covered = coverage(shape, places, (32, 32))
    middle = coverage(shape, torch.tensor([[0.5, 0.5]]), (32, 32))
    torch.testing.assert_close(covered.sum(dim=(1, 2)), middle.sum().expand(4), rtol=0.02, atol=0)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_paths_fill_the_picture_and_stay_inside(pyav, split):
    dataset = Shapes(ClipShape(8, 48, 32), pyav)
    for direction, sign in DIRECTIONS.items():
        stream = generator("middles", direction)
        middles = torch.tensor([dataset._middle(split, direction, stream) for _ in range(300)])
        reach = MARGIN + TRAVEL / 2 * torch.tensor(sign).abs()
        room = torch.tensor([1.5, 1.0]) - 2 * reach
        assert (middles >= reach).all() and (middles <= reach + room).all()
        assert (middles.amax(dim=0) - middles.amin(dim=0) > 0.85 * room).all()


def test_held_out_paths_and_their_middles_are_never_drawn_in_training(pyav):
    dataset = Shapes(SHAPE, pyav)
    for direction, sign in DIRECTIONS.items():
        stream = generator("middles", direction)
        across = sign.index(0)
        for _ in range(300):
            assert not is_held_out(dataset._middle("train", direction, stream)[across])
            assert all(map(is_held_out, dataset._middle("held_out", direction, stream)))
    assert [is_held_out(lane / 16 + 0.01) for lane in (5, 6, 7, 8, 9)] == [False, True, False, False, True]


def test_another_size_shows_the_same_clip(pyav):
    """Made small by area, the finer clip is the coarser one, but for the texture of the ground and slanted edges."""
    fine = Shapes(ClipShape(4, 64, 96), pyav)
    coarse = Shapes(ClipShape(4, 32, 48), pyav)
    for index in range(12):
        one, two = (dataset.draw("train", generator("test", index)) for dataset in (fine, coarse))
        assert one.label == two.label
        difference = (downsample(one.video, (1, 2, 2), "area") - two.video).abs()
        assert difference.mean() < 0.002 and difference.max() < 0.3


def test_the_seed_changes_the_ground_and_the_generator_the_clip(pyav):
    first, same, other = (Shapes(SHAPE, pyav, seed=seed).draw("train", generator("a")) for seed in (0, 0, 1))
    assert torch.equal(first.video, same.video)
    assert first.label == other.label
    difference = (first.video - other.video).abs()
    assert (
        0.05 < difference.mean() < 0.15 and (difference > 0.6).sum() == 0
    )  # the same shape at the same place
    assert not torch.equal(first.video, Shapes(SHAPE, pyav).draw("train", generator("b")).video)


def test_ground_is_dark_low_in_contrast_and_still(pyav):
    videos = torch.stack([clip.video for clip in drawn(Shapes(SHAPE, pyav), "train", 200)])
    corners = videos[:, :, :, 0, [0, -1]]  # above, where no shape covers them
    assert corners.mean() == pytest.approx(GROUND, abs=0.02)
    assert corners.std() == pytest.approx(0.07, abs=0.015)
    assert torch.equal(corners[:, :, 0], corners[:, :, -1])


def test_classes_can_be_left_out_of_training(pyav):
    out = ("red circle moving left", "blue cross moving up")
    dataset = Shapes(SHAPE, pyav, hold_out=out)
    assert dataset.classes == CLASSES
    trained = {CLASSES[clip.label] for clip in drawn(dataset, "train", 400)}
    assert trained == set(CLASSES) - set(out)
    assert {CLASSES[clip.label] for clip in drawn(dataset, "held_out", 400)} == set(CLASSES)
    assert dataset.describe()["never_trained"] == list(out)


def test_wrong_options_are_refused(pyav):
    with pytest.raises(
        InputError, match=r"'red circle going left' is not a class.*did you mean 'red circle moving left'"
    ):
        Shapes(SHAPE, pyav, hold_out=("red circle going left",))
    with pytest.raises(InputError, match="all 36 classes were given"):
        Shapes(SHAPE, pyav, hold_out=CLASSES)
    with pytest.raises(InputError, match=r"model.channels: 1 was given; the dataset 'shapes' has 3"):
        Shapes(ClipShape(8, 32, 32, channels=1), pyav)
