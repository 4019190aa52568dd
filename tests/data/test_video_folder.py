"""Folders of files: layouts, split, skipping by name, and what happens when the folder goes away."""

import json
import logging
import shutil
import threading

import pytest
import torch

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.randomness import generator
from hpdm_core.data import file_clips
from hpdm_core.data.dataset import ClipDataset, ClipShape
from hpdm_core.data.file_clips import FrameCache
from hpdm_core.data.readers import ReadError
from hpdm_plugins.data.video_folder import video_folder

SHAPE = ClipShape(4, 8, 12)


@pytest.fixture
def classes(tmp_path, frames, write):
    """Two classes of five lossless files, 9 frames of 12 x 20 pixels."""
    root = tmp_path / "videos"
    for label, name in enumerate(("apples", "pears")):
        for number in range(5):
            write(root / name / f"{number}.mkv", frames(9, 12, 20, seed=10 * label + number))
    return root


def draws(dataset, split, count=40):
    return [dataset.draw(split, generator("test", index)) for index in range(count)]


def test_class_folders(classes, pyav):
    dataset = video_folder(SHAPE, pyav, root=classes)
    assert isinstance(dataset, ClipDataset)
    assert dataset.classes == ("apples", "pears")
    drawn = draws(dataset, "train")
    assert {clip.label for clip in drawn} == {0, 1}
    assert drawn[0].video.shape == (3, 4, 8, 12)
    assert {clip.pixels.dtype for clip in drawn} == {torch.uint8}  # float32 only what is cut out of them
    described = json.loads(json.dumps(dataset.describe()))
    assert described["splits"] == {
        "train": {"clips": 8, "windows": 48},
        "held_out": {"clips": 2, "windows": 12},
    }
    train, held_out = (set(described["files"][split]) for split in ("train", "held_out"))
    assert len(train | held_out) == 10
    assert {name.split("/")[0] for name in held_out} == {"apples", "pears"}
    assert len(set(described["files"]["train"].values())) == 8


def test_a_flat_folder_has_no_labels(tmp_path, frames, write, pyav):
    for number in range(3):
        write(tmp_path / f"{number}.mkv", frames(5, seed=number))
    (tmp_path / "notes.txt").write_text("not a video")
    dataset = video_folder(SHAPE, pyav, root=tmp_path)
    assert dataset.classes == ()
    assert {clip.label for clip in draws(dataset, "train", 5)} == {-1}
    assert dataset.describe()["splits"]["held_out"]["clips"] == 1


def test_labels_can_be_hidden(classes, pyav):
    dataset = video_folder(SHAPE, pyav, root=classes, labels=False)
    assert dataset.classes == ()
    assert {clip.label for clip in draws(dataset, "train", 10)} == {-1}


def test_clips_are_crops_of_consecutive_frames(tmp_path, frames, write, pyav):
    made = frames(9, 12, 20)
    write(tmp_path / "only.mkv", made)
    dataset = video_folder(ClipShape(3, 12, 15), pyav, root=tmp_path, held_out=0, stride=2, flip=False)
    assert dataset.describe()["stride"] == 2
    scaled = made.permute(3, 0, 1, 2).float() / 127.5 - 1
    found = set()
    for clip in draws(dataset, "train", 60):
        matches = [
            (start, left)
            for start in range(5)
            for left in range(6)
            if torch.equal(scaled[:, start : start + 5 : 2, :, left : left + 15], clip.video)
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert {start for start, _ in found} == set(range(5))
    assert {left for _, left in found} == set(range(6))


def test_held_out_clips_are_not_mirrored_and_training_is(tmp_path, frames, write, pyav):
    made = {}
    for number in range(2):
        made[f"{number}.mkv"] = frames(4, 8, 12, seed=number)
        write(tmp_path / f"{number}.mkv", made[f"{number}.mkv"])
    dataset = video_folder(SHAPE, pyav, root=tmp_path)
    for split, expected in [("train", {True, False}), ("held_out", {False})]:
        (name,) = dataset.describe()["files"][split]
        straight = made[name].permute(3, 0, 1, 2).float() / 127.5 - 1
        mirrored = set()
        for clip in draws(dataset, split, 12):
            assert torch.equal(clip.video, straight) or torch.equal(clip.video, straight.flip(-1))
            mirrored.add(not torch.equal(clip.video, straight))
        assert mirrored == expected


def test_the_split_does_not_depend_on_files_of_other_classes(classes, pyav):
    before = video_folder(SHAPE, pyav, root=classes).describe()["files"]["held_out"]
    shutil.copytree(classes / "pears", classes / "zebras")
    after = video_folder(SHAPE, pyav, root=classes).describe()["files"]["held_out"]
    assert {name for name in after if not name.startswith("zebras")} == set(before)


def test_a_draw_hangs_on_its_generator_alone(classes, pyav):
    dataset = video_folder(SHAPE, pyav, root=classes)
    first = dataset.draw("train", generator("test", 7)).video
    draws(dataset, "train", 10)
    assert torch.equal(dataset.draw("train", generator("test", 7)).video, first)


def test_unusable_files_are_named_once(classes, write, frames, pyav, caplog):
    (classes / "apples" / "broken.mp4").write_text("not a video")
    write(classes / "pears" / "short.mkv", frames(3))
    with caplog.at_level(logging.WARNING):
        dataset = video_folder(SHAPE, pyav, root=classes)
        draws(dataset, "train", 10)
    assert dataset.describe()["skipped"] == [
        {"file": "apples/broken.mp4", "reason": "Invalid data found when processing input"},
        {"file": "pears/short.mkv", "reason": "has 3 frames; a window reaches over 4"},
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "video_folder: skipped apples/broken.mp4: Invalid data found when processing input",
        "video_folder: skipped pears/short.mkv: has 3 frames; a window reaches over 4",
    ]


def test_a_file_damaged_inside_is_named_once_and_leaves_other_draws_alone(classes, pyav, caplog, monkeypatch):
    whole = video_folder(SHAPE, pyav, root=classes)
    read = pyav.read
    expected = [clip.video for clip in draws(whole, "train", 20)]
    (bad, *_) = whole.describe()["files"]["train"]

    def failing(path, numbers, *, short_side=None):
        if f"{path.parent.name}/{path.name}" == bad:
            raise ReadError(path, "is damaged")
        return read(path, numbers, short_side=short_side)

    monkeypatch.setattr(pyav, "read", failing)
    damaged = video_folder(SHAPE, pyav, root=classes)
    with caplog.at_level(logging.WARNING):
        drawn = [clip.video for clip in draws(damaged, "train", 20)]
    same = [torch.equal(*pair) for pair in zip(expected, drawn, strict=True)]
    assert 0 < same.count(False) < 10
    assert [record.getMessage() for record in caplog.records] == [f"video_folder: skipped {bad}: is damaged"]
    assert damaged.describe()["skipped"] == [{"file": bad, "reason": "is damaged"}]
    # History does not matter: a fresh dataset gives the same clip for the same stream.
    fresh = video_folder(SHAPE, pyav, root=classes)
    assert torch.equal(fresh.draw("train", generator("test", 19)).video, drawn[19])


def test_nothing_but_damaged_files_is_trouble(classes, pyav, monkeypatch):
    dataset = video_folder(SHAPE, pyav, root=classes)

    def failing(path, numbers, *, short_side=None):
        raise ReadError(path, "is damaged")

    monkeypatch.setattr(pyav, "read", failing)
    with pytest.raises(TroubleError, match=r"100 draws in a row .* the last one is .*\.mkv: is damaged$"):
        dataset.draw("train", generator("test"))


def test_a_vanished_folder_is_trouble(classes, pyav):
    dataset = video_folder(SHAPE, pyav, root=classes)
    shutil.rmtree(classes)
    with pytest.raises(TroubleError, match=r"the folder '.*videos' has vanished while running$") as caught:
        dataset.draw("train", generator("test"))
    assert not isinstance(caught.value, ReadError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "'.*nothing' does not exist; allowed is an existing folder"),
        (lambda root: root.write_text(""), "'.*nothing' is a file; allowed is an existing folder"),
        (lambda root: root.mkdir(), "'.*nothing' and its immediate subfolders contain no video file"),
        (
            lambda root: (root.mkdir(), (root / "a.mp4").write_text("x")),
            "no file in '.*nothing' can be used for clips of 4 frames, 1 apart: a.mp4: Invalid data",
        ),
    ],
)
def test_a_useless_root_is_named(tmp_path, pyav, make, message):
    make(tmp_path / "nothing")
    with pytest.raises(InputError, match=message):
        video_folder(SHAPE, pyav, root=tmp_path / "nothing")


def test_mixed_layouts_are_refused(classes, write, frames, pyav):
    write(classes / "stray.mkv", frames(9))
    with pytest.raises(InputError, match=r"holds video files \('stray.mkv'\) beside folders .*\('apples'\)"):
        video_folder(SHAPE, pyav, root=classes)


def test_a_class_without_a_usable_file_is_named(classes, pyav):
    (classes / "figs").mkdir()
    (classes / "figs" / "a.mp4").write_text("x")
    with pytest.raises(
        InputError, match=r"class 'figs' in '.*' has no usable file for training; skipped were figs/a.mp4"
    ):
        video_folder(SHAPE, pyav, root=classes)


def test_too_few_files_to_hold_one_out(tmp_path, write, frames, pyav):
    write(tmp_path / "only.mkv", frames(9))
    with pytest.raises(InputError, match="so none can be held out; add files, or set held_out: 0"):
        video_folder(SHAPE, pyav, root=tmp_path)
    dataset = video_folder(SHAPE, pyav, root=tmp_path, held_out=0)
    with pytest.raises(InputError, match="no file is in the split 'held_out'"):
        dataset.draw("held_out", generator("test"))


def test_threads_may_draw_at_once(classes, pyav):
    dataset = video_folder(SHAPE, pyav, root=classes)
    expected = [clip.video for clip in draws(dataset, "train", 24)]
    fresh = video_folder(SHAPE, pyav, root=classes)
    drawn = {}

    def work(part):
        for index in range(part, 24, 3):
            drawn[index] = fresh.draw("train", generator("test", index)).video

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(drawn[index], video) for index, video in enumerate(expected))


class CountingReader:
    def __init__(self):
        self.asked = []

    def read(self, path, frames, *, short_side=None):
        self.asked.append(list(frames))
        return (
            torch.tensor(list(frames), dtype=torch.uint8)
            .reshape(-1, 1, 1, 1)
            .expand(-1, 2, 2, 3)
            .contiguous()
        )


def test_frames_are_decoded_once_and_forgotten_when_too_many(tmp_path):
    cache, reader = FrameCache(limit=4 * 12), CountingReader()  # four frames of 12 bytes

    def numbers(frames):
        read = cache.read(reader, tmp_path, frames, short_side=2)
        return [int(frame[0, 0, 0]) for frame in read]

    assert numbers([0, 1, 2]) == [0, 1, 2]
    assert numbers([1, 2, 3]) == [1, 2, 3]
    assert reader.asked == [[0, 1, 2], [3]]
    assert numbers([0]) == [0]
    assert numbers([4]) == [4]  # 1, the longest unused, goes
    assert numbers([3, 0, 1]) == [3, 0, 1]
    assert reader.asked == [[0, 1, 2], [3], [4], [1]]
    assert len(cache._frames) == 4
    assert file_clips.CACHE_BYTES == 2**28
