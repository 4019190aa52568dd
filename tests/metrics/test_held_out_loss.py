from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import Clip
from hpdm_core.metrics.held_out_loss import HeldOutLoss
from hpdm_core.pyramid import Pyramid

PYRAMID = Pyramid(video=(8, 16, 24), patch=(2, 4, 6), token=(1, 2, 2), levels=3)
SIGMA_IN = (1.0, 2.0, 4.0)


class FakeDenoiser:
    """Says what it was asked; ``answer(level, z, sigma)`` is its estimate."""

    sigma_in = SIGMA_IN

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.encoded: list[tuple[int, Tensor, Tensor, Any, int]] = []
        self.calls: list[tuple[int, Tensor, Tensor, Any, Any, Tensor]] = []

    def encode(self, level: int, z: Tensor, sigma: Tensor, coords: Any, label: Any, sources: Any) -> str:
        self.encoded.append((level, z, sigma, coords, len(sources)))
        return f"encoded{level}"

    def contexts(self, level: int, coords: Any, sources: Any) -> tuple[int, list[str]]:
        return level, list(sources)

    def __call__(
        self, level: int, z: Tensor, sigma: Tensor, coords: Any, label: Tensor, contexts: Any, latents: Any
    ) -> tuple[Tensor, str]:
        self.calls.append((level, z, sigma, contexts, latents, label))
        return self.answer(level, z, sigma), f"latents of {len(self.calls)}"


class FakeContext:
    device = torch.device("cpu")

    def __init__(self, denoiser: FakeDenoiser, classes: int = 0) -> None:
        self.denoiser = denoiser
        self.details: dict[str, Any] = {}
        config = SimpleNamespace(
            model=SimpleNamespace(levels=3, classes=classes), data=SimpleNamespace(downsampling="area")
        )
        self.assembly = SimpleNamespace(pyramid=PYRAMID, config=config)

    def clip(self, stream: str, split: str, number: int) -> Clip:
        drawn = generator("test", split, number)
        return Clip(video=torch.rand(3, *PYRAMID.video, generator=drawn) * 2 - 1, label=number % 5)


def metric(**options: Any) -> HeldOutLoss:
    defaults = {"patches": 3, "split": "held_out", "sigmas": (0.1, 2.0), "self_conditioning": True}
    return HeldOutLoss(**{**defaults, **options})


def values(rows: Any, **wanted: Any) -> list[float]:
    return [row["value"] for row in rows if all(row[name] == value for name, value in wanted.items())]


def unchanged(level: int, z: Tensor, sigma: Tensor) -> Tensor:
    return SIGMA_IN[level] * z


def test_the_noisy_patch_itself_is_wrong_by_sigma_eff_squared_on_every_level() -> None:
    rows = metric(patches=40).evaluate(FakeContext(FakeDenoiser(unchanged)))  # type: ignore[arg-type]
    for level in range(3):
        for sigma in (0.1, 2.0):
            (value,) = values(rows, level=level, sigma_eff=sigma, parents="clean")
            assert value == pytest.approx(sigma**2, rel=0.05)


def test_the_mean_is_over_the_noise_levels() -> None:
    rows = metric().evaluate(FakeContext(FakeDenoiser(unchanged)))  # type: ignore[arg-type]
    singles = values(rows, level=1, parents="noisy")[1:]
    assert values(rows, level=1, parents="noisy", sigma_eff=None) == [pytest.approx(sum(singles) / 2)]
    assert len(rows) == 2 * 3 * 3


def test_every_patch_has_its_error_in_the_details(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpdm_core.metrics.held_out_loss._ROWS", 2)
    context = FakeContext(FakeDenoiser(unchanged))
    rows = metric(patches=5).evaluate(context)  # type: ignore[arg-type]
    assert context.details["sigma_eff"] == [0.1, 2.0]
    found = {(each["parents"], each["level"]): each["patches"] for each in context.details["errors"]}
    assert set(found) == {(kind, level) for kind in ("clean", "noisy") for level in range(3)}
    for (kind, level), patches in found.items():
        assert len(patches) == 5 and len({tuple(errors) for errors in patches}) == 5
        for index, sigma in enumerate((0.1, 2.0)):
            (value,) = values(rows, level=level, sigma_eff=sigma, parents=kind)
            assert value == pytest.approx(sum(errors[index] for errors in patches) / 5, rel=1e-12)
    # A patch's error does not depend on how many there are.
    fewer = FakeContext(FakeDenoiser(unchanged))
    metric(patches=3).evaluate(fewer)  # type: ignore[arg-type]
    assert fewer.details["errors"][1]["patches"] == found["clean", 1][:3]


def test_what_is_not_finite_stays_json() -> None:
    context = FakeContext(FakeDenoiser(lambda level, z, sigma: z / 0))
    metric().evaluate(context)  # type: ignore[arg-type]
    assert context.details["errors"][0]["patches"] == [[None, None]] * 3


def test_patches_and_noise_are_fixed_and_extend() -> None:
    def answer(level: int, z: Tensor, sigma: Tensor) -> Tensor:
        return torch.zeros_like(z)

    few = metric(patches=16).evaluate(FakeContext(FakeDenoiser(answer)))  # type: ignore[arg-type]
    seen = FakeDenoiser(answer)
    many = metric(patches=18).evaluate(FakeContext(seen))  # type: ignore[arg-type]
    rest = FakeContext(seen).clip("", "held_out", 16), FakeContext(seen).clip("", "held_out", 17)
    # Level 0 shows whole videos: the two more patches are the two more clips.
    added = sum(
        float(torch.nn.functional.avg_pool3d(clip.video[None], 4).square().mean(dtype=torch.float64))
        for clip in rest
    )
    one, two = values(few, level=0, sigma_eff=0.1)[0], values(many, level=0, sigma_eff=0.1)[0]
    assert two * 18 == pytest.approx(one * 16 + added, rel=1e-6)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(level: int, z: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(SIGMA_IN[level] * z)

    whole = metric(patches=7).evaluate(FakeContext(FakeDenoiser(answer)))  # type: ignore[arg-type]
    monkeypatch.setattr("hpdm_core.metrics.held_out_loss._ROWS", 3)
    parts = metric(patches=7).evaluate(FakeContext(FakeDenoiser(answer)))  # type: ignore[arg-type]
    assert [row["value"] for row in parts] == pytest.approx([row["value"] for row in whole], rel=1e-12)


def test_parents_are_noised_at_their_own_level_and_share_nothing_with_the_patch() -> None:
    denoiser = FakeDenoiser(unchanged)
    metric(patches=16).evaluate(FakeContext(denoiser))  # type: ignore[arg-type]
    assert [(level, depth) for level, _, _, _, depth in denoiser.encoded] == [(0, 0), (1, 1), (0, 0), (1, 1)]
    for (level, _, low, coords, _), (_, _, high, _, _) in zip(
        denoiser.encoded[:2], denoiser.encoded[2:], strict=True
    ):
        assert torch.allclose(low, torch.tensor(0.05 / SIGMA_IN[level]))
        assert torch.allclose(high, torch.tensor(1.0 / SIGMA_IN[level]))
        assert coords.offset.shape == (16, 3)
    # One noise field per patch and level serves both kinds: it can be solved for, and leaves the clean patch.
    (_, clean, *_), _, (_, noisy, *_), _ = denoiser.encoded
    field = (noisy - clean) / 0.95
    clips = torch.stack([FakeContext(denoiser).clip("", "held_out", number).video for number in range(16)])
    assert torch.allclose(clean - 0.05 * field, torch.nn.functional.avg_pool3d(clips, 4), atol=1e-5)
    assert float(field.std()) == pytest.approx(1.0, abs=0.05)


def test_each_level_sees_all_coarser_ones_and_level_0_none() -> None:
    denoiser = FakeDenoiser(unchanged)
    metric(sigmas=(1.0,)).evaluate(FakeContext(denoiser))  # type: ignore[arg-type]
    contexts = [call[3] for call in denoiser.calls[::2]]
    parents = (1, ["encoded0"]), (2, ["encoded0", "encoded1"])
    assert contexts == [None, *parents, *parents]


def test_the_second_pass_gets_the_latents_of_the_first() -> None:
    denoiser = FakeDenoiser(unchanged)
    metric(sigmas=(1.0,)).evaluate(FakeContext(denoiser))  # type: ignore[arg-type]
    assert [call[4] for call in denoiser.calls[:4]] == [None, "latents of 1", None, "latents of 3"]
    single = FakeDenoiser(unchanged)
    metric(sigmas=(1.0,), self_conditioning=False).evaluate(FakeContext(single))  # type: ignore[arg-type]
    assert {call[4] for call in single.calls} == {None}
    assert len(single.calls) == len(denoiser.calls) / 2


def test_without_latents_a_second_pass_is_left_out() -> None:
    class Stateless(FakeDenoiser):
        def __call__(self, *arguments: Any) -> Any:
            return super().__call__(*arguments)[0], None

    denoiser, single = Stateless(unchanged), FakeDenoiser(unchanged)
    found = metric().evaluate(FakeContext(denoiser))  # type: ignore[arg-type]
    assert found == metric(self_conditioning=False).evaluate(FakeContext(single))  # type: ignore[arg-type]
    assert len(denoiser.calls) == len(single.calls)


def test_labels_are_the_clips_own_or_none() -> None:
    for classes, wanted in ((0, [-1, -1, -1]), (5, [0, 1, 2])):
        denoiser = FakeDenoiser(unchanged)
        metric().evaluate(FakeContext(denoiser, classes))  # type: ignore[arg-type]
        assert denoiser.calls[0][5].tolist() == wanted


def test_level_0_is_the_same_under_both_kinds_of_parents() -> None:
    rows = metric().evaluate(FakeContext(FakeDenoiser(unchanged)))  # type: ignore[arg-type]
    assert values(rows, level=0, parents="clean") == values(rows, level=0, parents="noisy")


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match="patches=0"):
        metric(patches=0)
