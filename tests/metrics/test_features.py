import numpy as np
import pytest
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.features import FeatureBuffer, extract
from hpdm_core.metrics.networks.random3d import Random3D


class Sums:
    """The sum of each clip's pixels; remembers the batches."""

    name = "sums"
    scaling = "none"

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def features(self, videos):
        self.batches.append(tuple(videos.shape))
        return videos.double().flatten(1).sum(dim=1, keepdim=True)

    def describe(self):
        return {"extractor": self.name}


def clips(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_rows_stand_in_the_order_of_the_clips(size: int) -> None:
    given = clips(7, 2, 3, 4, 3)
    extractor = Sums()
    made = extract(iter(given), extractor, batch_size=size)
    assert made.dtype == np.float64
    assert made[:, 0].tolist() == given.reshape(7, -1).sum(axis=1).tolist()
    assert [shape[0] for shape in extractor.batches] == [size] * (7 // size) + [7 % size] * (7 % size > 0)


def test_the_batch_changes_a_networks_features_by_rounding_alone() -> None:
    given = clips(6, 5, 16, 16, 3)
    one = extract(given, Random3D(), batch_size=1)
    assert np.allclose(extract(given, Random3D(), batch_size=6), one, rtol=1e-5, atol=1e-5)


def test_a_batch_holds_one_shape() -> None:
    given = [*clips(3, 2, 4, 4, 3), *clips(1, 2, 6, 4, 3), *clips(2, 2, 4, 4, 3)]
    extractor = Sums()
    made = extract(given, extractor, batch_size=2)
    assert made[:, 0].tolist() == [clip.sum() for clip in given]
    assert [shape[:3] for shape in extractor.batches] == [(2, 2, 4), (1, 2, 4), (1, 2, 6), (2, 2, 4)]


def test_clips_are_taken_one_batch_at_a_time() -> None:
    """None is asked for before those before it have been turned into features."""
    extractor = Sums()
    alive: list[int] = []

    def source():
        for number in range(10):
            alive.append(number - sum(shape[0] for shape in extractor.batches))
            yield clips(1, 2, 4, 4, 3)[0]

    extract(source(), extractor, batch_size=4)
    assert max(alive) == 3


def test_progress_is_told_after_each_batch() -> None:
    told: list[int] = []
    extract(clips(7, 2, 4, 4, 3), Sums(), batch_size=3, progress=told.append)
    assert told == [3, 6, 7]


def test_what_is_no_clip_is_named() -> None:
    good = clips(1, 2, 4, 4, 3)[0]
    with pytest.raises(InputError, match=r"clip 1 is torch.float64"):
        extract([good, good / 255], Sums())
    with pytest.raises(InputError, match=r"clip 0 is torch.uint8 of shape \[4, 4, 3\]"):
        extract([good[0]], Sums())
    with pytest.raises(InputError, match="no clips"):
        extract([], Sums())
    with pytest.raises(InputError, match="batch size: 0"):
        extract([good], Sums(), batch_size=0)
    assert extract([torch.from_numpy(good)], Sums()).shape == (1, 1)


def test_slabs_keep_copies_that_do_not_touch_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpdm_core.metrics.features.SLAB", 10)
    held = FeatureBuffer()
    given = [
        torch.full(shape, float(number)) for number, shape in enumerate([(2, 3), (4,), (1, 5), (30,), (2,)])
    ]
    kept = [held.keep(values) for values in given]
    for values, copy in zip(given, kept, strict=True):
        assert copy.dtype == np.float64
        assert np.array_equal(copy, values.numpy())
    assert kept[0].base is kept[1].base  # one piece of memory
    assert kept[1].base is not kept[2].base
    given[0].zero_().add_(7)
    assert kept[0].max() == 0.0
