"""Training batches: keyed draws that depend on nothing but their keys."""

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator, normal
from hpdm_core.data.dataset import Clip
from hpdm_core.pyramid import downsample
from hpdm_core.training import batches as batches_module
from hpdm_core.training.batches import Batch, TrainingBatches, in_thread, loaded

Make = Callable[..., Assembly]
MANY = {"video": (2, 4, 6), "patch": (2, 4, 6), "token": (2, 4, 6), "levels": 1}


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    found = {"label": batch.label, "conditioned": batch.conditioned}
    for name in ("clean", "noise", "sigma", "in_loss", "offsets"):
        found |= {f"{name}.{slot}": tensor for slot, tensor in enumerate(getattr(batch, name))}
    return found


def test_a_video_is_the_same_in_any_batch(assemble: Make) -> None:
    noise = {"noise_sampling": "clean_parents"}
    small = TrainingBatches(assemble(training={"batch": 4}, diffusion=noise))(7)
    large = TrainingBatches(assemble(training={"batch": 8}, diffusion=noise))(7)
    for name, tensor in tensors(small).items():
        other = tensors(large)[name]
        expected = other[other < 4] if name == "conditioned" else other[:4]
        assert torch.equal(tensor, expected), name


def test_a_batch_does_not_depend_on_those_before(assemble: Make) -> None:
    fresh, used = TrainingBatches(assemble()), TrainingBatches(assemble())
    for step in (1, 2, 5):
        used(step)
    torch.manual_seed(3)
    for name, tensor in tensors(fresh(6)).items():
        assert torch.equal(tensor, tensors(used(6))[name]), name


def test_videos_steps_seeds_and_slots_differ(assemble: Make) -> None:
    batches = TrainingBatches(assemble())
    first = batches(1)
    assert not torch.equal(first.clean[0][0], first.clean[0][1])
    assert not torch.equal(first.noise[0], first.noise[1])
    for other in (batches(2), TrainingBatches(assemble(seed=1))(1)):
        for name in ("clean", "noise", "sigma", "offsets"):
            assert not torch.equal(getattr(first, name)[2], getattr(other, name)[2]), name


def test_the_streams_have_the_names_that_other_parts_rely_on(assemble: Make) -> None:
    assembly = assemble(seed=5)
    batch = TrainingBatches(assembly)(3)
    clip = assembly.dataset.draw("train", generator(5, "clip", 3, 2))
    offsets = assembly.coordinate_sampler.sample(generator(5, "offsets", 3, 2))
    sigma, _ = assembly.noise_sampler.draw(generator(5, "sigma", 3, 2))
    for level in range(3):
        assert torch.equal(batch.offsets[level][2], offsets[level])
        assert torch.equal(batch.sigma[level][2], sigma[level])
        assert torch.equal(batch.noise[level][2], normal((3, 2, 4, 6), 5, "noise", 3, 2, level))
        whole = downsample(clip.video, assembly.pyramid.pitch(level), "area")
        f, h, w = offsets[level].tolist()
        assert torch.equal(batch.clean[level][2], whole[:, f : f + 2, h : h + 4, w : w + 6])


def test_slots_of_one_level_share_the_crop_and_not_the_noise(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpdm_core.diffusion import Slot

    assembly = assemble()
    sampler = assembly.noise_sampler
    sampler.slots = (*sampler.slots, Slot(level=1, sources=(0,)))
    monkeypatch.setattr(sampler, "draw", lambda generator: (torch.rand(4), torch.ones(4, dtype=torch.bool)))
    batch = TrainingBatches(assembly)(1)
    assert torch.equal(batch.clean[1], batch.clean[3])
    assert torch.equal(batch.offsets[1], batch.offsets[3])
    assert not torch.equal(batch.noise[1], batch.noise[3])


def test_what_a_clean_stream_trains_is_what_independent_noise_trains(assemble: Make) -> None:
    """Sampler against sampler, only parents differ; `paired: false` keeps the numbers from before."""
    independent, paired, apart = (
        TrainingBatches(assemble(diffusion={"noise_sampling": sampler}))(3)
        for sampler in ("independent", "clean_stream", {"use": "clean_stream", "paired": False})
    )
    own = [1, 3, 4]  # of the slots 0 clean, 0, 1 clean, 1, 2
    for level, slot in enumerate(own):
        assert torch.equal(paired.noise[slot], independent.noise[level])
        assert torch.equal(paired.sigma[slot], independent.sigma[level])
        assert not torch.equal(apart.sigma[slot], independent.sigma[level])
        assert torch.equal(apart.noise[slot], normal_noise(apart, slot))
    assert not torch.equal(paired.noise[0], paired.noise[1])


def normal_noise(batch: Batch, number: int) -> torch.Tensor:
    """The noise of a slot whose stream is its number."""
    return torch.stack(
        [
            normal(each.shape, 0, "noise", batch.step, index, number)
            for index, each in enumerate(batch.noise[number])
        ]
    )


def test_clips_cut_up_one_by_one_make_the_batch_of_clips_cut_up_together(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = TrainingBatches(assemble())(2)
    monkeypatch.setattr(batches_module, "SMALL_CLIP", 0)
    for name, tensor in tensors(TrainingBatches(assemble())(2)).items():
        expected = tensors(together)[name]
        assert torch.equal(tensor, expected) and tensor.stride() == expected.stride(), name


@pytest.mark.parametrize("small", [0, 2**18])
def test_a_clip_of_bytes_makes_the_same_batch_and_a_large_one_is_never_whole_in_float32(
    assemble: Make, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(batches_module, "SMALL_CLIP", small)
    assembly = assemble()
    shape = (3, *assembly.pyramid.video)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    given, batches = [Clip(pixels), Clip(Clip(pixels).video)], []
    for clip in given:
        assembly.__dict__["dataset"] = OneClip(label=-1)
        assembly.dataset.clip = clip  # type: ignore[attr-defined]
        batches.append(TrainingBatches(assembly)(1))
    for bytewise, real in zip(batches[0].clean, batches[1].clean, strict=True):
        assert torch.equal(bytewise, real) and bytewise.stride() == real.stride()
    assert "video" not in vars(given[0])


def test_label_dropout_hides_a_tenth_and_the_rest_keep_their_own(assemble: Make) -> None:
    size = 10_000
    assembly = assemble(model=MANY, training={"batch": 1})
    assembly.__dict__["dataset"] = OneClip(label=3)
    batches = TrainingBatches(assembly)
    labels = torch.cat([batches(step).label for step in range(1, size + 1)])
    assert set(labels.tolist()) == {-1, 3}
    assert (labels == -1).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_self_conditioning_keeps_nine_tenths_apart_from_label_dropout(assemble: Make) -> None:
    assembly = assemble(model=MANY, training={"batch": 2000, "label_dropout": 0.5})
    assembly.__dict__["dataset"] = OneClip(label=3)
    batch = TrainingBatches(assembly)(1)
    assert len(batch.conditioned) / 2000 == pytest.approx(0.9, abs=0.025)
    kept = torch.zeros(2000)
    kept[batch.conditioned] = 1.0
    both = torch.corrcoef(torch.stack([kept, (batch.label == -1).float()]))
    assert abs(both[0, 1].item()) < 0.07


@pytest.mark.parametrize(("rate", "expected"), [(0.0, set()), (1.0, {0, 1, 2})])
def test_rates_at_their_ends(assemble: Make, rate: float, expected: set[int]) -> None:
    batch = TrainingBatches(assemble(training={"label_dropout": rate, "self_conditioning": rate}))(1)
    assert {index for index, label in enumerate(batch.label.tolist()) if label == -1} == expected
    assert set(batch.conditioned.tolist()) == expected


class OneClip:
    """A dataset of one grey clip."""

    classes = ("a", "b", "c", "d")

    def __init__(self, label: int) -> None:
        self.clip = Clip(torch.zeros(3, 2, 4, 6), label)

    def draw(self, split: str, generator: torch.Generator) -> Clip:
        assert split == "train"
        return self.clip

    def distinct(self, split: str) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}


def test_labels_without_classes_are_none_and_labels_out_of_range_are_refused(assemble: Make) -> None:
    assert TrainingBatches(assemble(model={"classes": 0}))(1).label.tolist() == [-1, -1, -1]
    assembly = assemble(model={**MANY, "classes": 3}, training={"label_dropout": 0.0})
    assembly.__dict__["dataset"] = OneClip(label=3)
    with pytest.raises(
        InputError, match=r"'synthetic' gives label 3; allowed by model\.classes=3 are 0 to 2"
    ):
        TrainingBatches(assembly)(1)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetched_batches_are_the_same_in_order(assemble: Make, ahead: int) -> None:
    batches = TrainingBatches(assemble())
    made = list(in_thread(map(batches, range(3, 8)), ahead=ahead))
    assert [batch.step for batch in made] == [3, 4, 5, 6, 7]
    for batch in made:
        for name, tensor in tensors(batches(batch.step)).items():
            assert torch.equal(tensor, tensors(batch)[name]), name


def test_an_error_in_the_thread_is_raised_and_the_thread_ends(assemble: Make) -> None:
    batches = TrainingBatches(assemble())

    def make(step: int) -> Batch:
        if step == 3:
            raise RuntimeError("no clip")
        return batches(step)

    running = in_thread(map(make, range(1, 9)), ahead=2)
    assert next(running).step == 1
    assert next(running).step == 2
    with pytest.raises(RuntimeError, match="no clip"):
        next(running)
    assert "hpdm-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_closing_early_ends_the_thread(assemble: Make) -> None:
    running = in_thread(map(TrainingBatches(assemble()), range(1, 1000)), ahead=2)
    next(running)
    assert "hpdm-prefetch" in {thread.name for thread in threading.enumerate()}
    running.close()
    assert "hpdm-prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_from_any_number_of_worker_processes(workers: int) -> None:
    def batches(count: int) -> list[Batch]:
        sets = ["data.dataset=synthetic", "training.batch=2", f"runtime.workers={count}"]
        sets += ["model.classes=0", "model.video=[4,8,8]", "model.patch=[1,2,2]", "model.token=[1,1,1]"]
        return list(loaded(load_cell("tiny_clips", sets=sets), range(1, 6), rows=[0, 1]))

    for made, expected in zip(batches(workers), batches(0), strict=True):
        assert made.step == expected.step
        for name, tensor in tensors(expected).items():
            assert torch.equal(tensors(made)[name], tensor), name


def test_batches_for_cuda_are_pinned_in_a_thread_that_uses_the_same_card(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, str]] = []
    kept: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor.clone()

    monkeypatch.setattr("hpdm_core.training.batches.pinned", pin)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr(
        "torch.cuda.set_device", lambda device: used.append((device, threading.current_thread().name))
    )
    plain = list(loaded(assemble(), range(1, 4)))
    assert not kept and not used
    made = list(loaded(assemble(runtime={"device": "cuda"}), range(1, 4)))
    assert used == [(3, "hpdm-prefetch")]
    slots = len(plain[0].clean)
    assert len(kept) == 3 * (4 * slots + 1)  # all but offsets and rows, which stay on the CPU
    for one, other in zip(made, plain, strict=True):
        assert torch.equal(one.clean[-1], other.clean[-1]) and torch.equal(one.label, other.label)


def test_a_thread_that_is_closed_closes_what_it_takes_from() -> None:
    closed: list[bool] = []

    def endless() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    for ahead in (0, 2):
        running = in_thread(endless(), ahead=ahead)
        assert [next(running), next(running)] == [0, 1]
        running.close()
        assert closed.pop()
