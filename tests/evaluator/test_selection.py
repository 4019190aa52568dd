"""Which clips a rule takes: order, offsets, reach, randomness keyed by names."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from hpdm_core.data.readers import VideoInfo
from hpdm_core.evaluation.folders.selection import candidates, needed_frames
from hpdm_core.evaluation.folders.sources import Video
from hpdm_core.metrics.protocols.records import SideRule


def videos(*lengths: int) -> dict[str, int]:
    return {f"v{index}.avi": length for index, length in enumerate(lengths)}


def choices(
    lengths: dict[str, int], frames: int = 4, *, seed: int = 0, **rule: object
) -> list[tuple[str, range]]:
    side = SideRule.model_validate({"count": "all", **rule})

    def probe(video: Video) -> VideoInfo | None:
        length = lengths[video.name]
        return VideoInfo(length, 8, 8, 25.0) if length >= needed_frames(side, frames) else None

    listed = [Video(Path(name), name, "video") for name in lengths]
    return [
        (choice.video.name, choice.frames) for choice in candidates(side, frames, listed, probe, seed=seed)
    ]


def test_files_are_taken_by_their_characters_or_by_their_numbers():
    lengths = dict.fromkeys(["v10.avi", "v9.avi", "v1.avi"], 4)
    assert [name for name, _ in choices(lengths, order="name")] == ["v1.avi", "v10.avi", "v9.avi"]
    assert [name for name, _ in choices(lengths, order="natural")] == ["v1.avi", "v9.avi", "v10.avi"]


def test_a_clip_begins_at_the_start_and_takes_every_so_many_th_frame():
    assert choices(videos(20), stride=3) == [("v0.avi", range(0, 10, 3))]


def test_random_starts_are_those_of_the_published_code():
    """random.randint(0, N - n * s + s - 1): every start that it can give, and no other."""
    frames, stride, length = 4, 3, 15
    bound = length - frames * stride + stride - 1
    possible = {random.Random(0).randint(0, bound) for _ in range(1)} | set(range(bound + 1))
    rule = {"offset": "random", "stride": stride, "reach": "frames_times_stride"}
    starts = {choices(videos(length), frames, seed=seed, **rule)[0][1].start for seed in range(200)}
    assert starts == possible
    assert all(choices(videos(length), frames, seed=seed, **rule)[0][1][-1] < length for seed in range(50))


def test_published_reach_drops_a_little_more_than_needed():
    lengths = videos(9, 10, 11, 12)
    assert len(choices(lengths, 4, stride=3)) == 3  # (4 - 1) * 3 + 1 = 10
    assert len(choices(lengths, 4, stride=3, reach="frames_times_stride")) == 1  # 4 * 3


def test_a_window_leaves_room_behind_the_clip():
    lengths = videos(63, 64, 70)
    taken = [choices(lengths, 16, seed=seed, offset="random", window=64) for seed in range(100)]
    assert {name for found in taken for name, _ in found} == {"v1.avi", "v2.avi"}
    assert {found[1][1].start for found in taken} == set(range(7))
    assert {found[0][1].start for found in taken} == {0}


def test_averaged_frames_are_read_too():
    assert choices(videos(20), 4, prepare={"average": [2, 1, 1]}) == [("v0.avi", range(0, 8))]
    assert choices(videos(7), 4, prepare={"average": [2, 1, 1]}) == []


def test_random_files_and_offsets_hang_on_seed_and_name_alone():
    lengths = videos(*[30] * 20)
    rule = {"choose": "random", "offset": "random"}
    first = choices(lengths, **rule)
    assert first == choices(dict(reversed(lengths.items())), **rule)
    assert [name for name, _ in first] != list(lengths)
    assert choices(lengths, seed=1, **rule) != first
    fewer = {name: length for name, length in lengths.items() if name != first[0][0]}
    assert choices(fewer, **rule) == first[1:]  # the others do not move
    assert len({frames.start for _, frames in first}) > 5


def test_random_windows_are_all_windows_once():
    lengths = videos(6, 4, 3, 5)
    found = choices(lengths, 4, choose="random_windows")
    expected = [("v0.avi", 0), ("v0.avi", 1), ("v0.avi", 2), ("v1.avi", 0), ("v3.avi", 0), ("v3.avi", 1)]
    assert sorted((name, frames.start) for name, frames in found) == expected
    assert [(name, frames.start) for name, frames in found] != expected
    assert choices(videos(3), 4, choose="random_windows") == []


def test_only_as_many_videos_are_probed_as_are_taken():
    probed = []

    def probe(video: Video) -> VideoInfo:
        probed.append(video.name)
        return VideoInfo(9, 8, 8, 25.0)

    listed = [Video(Path(name), name, "video") for name in videos(*[9] * 50)]
    rule = SideRule(count=3)
    assert len(list(itertools.islice(candidates(rule, 4, listed, probe, seed=0), 3))) == 3
    assert len(probed) == 3


@pytest.mark.parametrize("choose", ["first", "random", "random_windows"])
def test_no_videos_give_no_clips(choose):
    assert choices({}, choose=choose) == []
