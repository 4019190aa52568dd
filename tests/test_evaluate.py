"""The evaluate stage, with a small dataset of its own and no model."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hpdm_core.base.errors import InputError, TroubleError, report_errors
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.data.dataset import Clip
from hpdm_core.evaluate import main
from hpdm_core.evaluation.context import CellContext
from hpdm_core.evaluation.stage import evaluate_metric
from hpdm_core.metrics.distances.kernel import kernel_distance
from hpdm_core.metrics.distances.metric import floor_spread
from hpdm_core.plugins import build_plugins
from hpdm_core.pyramid import Pyramid, downsample
from hpdm_core.sampling.files import write_sample

SIZE = (4, 8, 12)
FIGURES = {
    "videos_per_second": 3.5,
    "seconds": 9,
    "peak_memory_bytes": 8,
    "parameters": 7,
    "flops_per_step": 6,
}


class Noise:
    """Clips of noise: training ones of half the contrast. ``held_out`` may be absent."""

    classes = ("a", "b")

    def __init__(self, held_out: bool = True) -> None:
        self.held_out = held_out
        self.draws = 0

    def draw(self, split: str, generator: torch.Generator) -> Clip:
        if split == "held_out" and not self.held_out:
            raise InputError("no held-out clips")
        self.draws += 1
        video = torch.rand(3, *SIZE, generator=generator) * 2 - 1
        return Clip(video=video * (0.5 if split == "train" else 0.6), label=self.draws % 2)

    def describe(self) -> dict[str, Any]:
        return {"name": "noise"}


class Strided(Noise):
    def describe(self) -> dict[str, Any]:
        return {"name": "noise", "stride": 3}


class Bench:
    """What a metric needs of an assembly, on `Noise`."""

    def __init__(self, dataset: Noise | None = None, samples: int = 6) -> None:
        self.dataset = dataset or Noise()
        self.plugins = build_plugins(())
        self.config = CellConfig.model_validate(
            {
                "model": {"video": SIZE, "patch": (2, 4, 6), "token": (1, 2, 2), "levels": 2}
                | {"token_dim": 16, "blocks": 2},
                "data": {"dataset": "sample_clips"},
                "training": {"steps": 1, "batch": 1, "learning_rate": 0.1},
                "evaluation": {"samples": samples, "reals": 20},
            }
        )
        self.pyramid = Pyramid(video=SIZE, patch=(2, 4, 6), token=(1, 2, 2), levels=2)

    def make(self, family: str, part: Part, *positional: Any) -> Any:
        return self.plugins.make(family, part, *positional)


def part(**options: Any) -> Part:
    return Part(use=options.pop("use"), options=options)


def write_fakes(folder: Path, bench: Bench, *, split: str = "train", count: int = 6) -> Path:
    folder.mkdir()
    for index in range(count):
        video = bench.dataset.draw(split, torch.Generator().manual_seed(index)).video
        levels = [downsample(video, bench.pyramid.pitch(level), "area") for level in range(2)]
        write_sample(folder, index, levels, label=index % 2)
    return folder


def values(result: dict[str, Any], metric: str) -> list[float]:
    return [row["value"] for row in result["rows"] if row["metric"] == metric]


@pytest.mark.parametrize("use", ["frechet", "kvd"])
@pytest.mark.parametrize("extractor", ["random3d", "statistics"])
def test_a_distance_stands_beside_its_floor_on_every_level(tmp_path: Path, use: str, extractor: str) -> None:
    bench = Bench()
    fakes = write_fakes(tmp_path / "s", bench)
    result = evaluate_metric(bench, part(use=use, extractor=extractor), samples_folder=fakes)  # type: ignore[arg-type]
    name = f"{use}[{extractor}]"
    assert [(row["metric"], row["level"], row["resolution"]) for row in result["rows"]] == [
        (name, 0, "2x4x6"),
        (f"{name}.floor", 0, "2x4x6"),
        (name, 1, "4x8x12"),
        (f"{name}.floor", 1, "4x8x12"),
    ]
    # Fakes are training clips here, the held-out ones have more contrast.
    assert values(result, name)[1] < values(result, f"{name}.floor")[1]


def test_spoiled_training_clips_stand_beside_a_distance_where_they_are_asked_for(tmp_path: Path) -> None:
    bench = Bench()
    fakes = write_fakes(tmp_path / "s", bench)
    asked = part(use="frechet", extractor="statistics", controls=True)
    result = evaluate_metric(bench, asked, samples_folder=fakes)  # type: ignore[arg-type]
    usual = evaluate_metric(bench, part(use="frechet", extractor="statistics"), samples_folder=fakes)  # type: ignore[arg-type]
    name = "frechet[statistics]"
    assert values(result, name) == values(usual, name)
    found = {
        (row["control"], row["level"]): row["value"]
        for row in result["rows"]
        if row["metric"] == f"{name}.control"
    }
    assert list(dict.fromkeys(control for control, _ in found)) == ["level 0 upsampled", "frozen", "shuffled"]
    # The clips are noise, so shuffled ones are like others; level 0 upsampled is level 0, and blurred on level 1.
    assert found["level 0 upsampled", 0] < 4 and found["shuffled", 1] < 4
    assert found["level 0 upsampled", 1] > 20 and found["frozen", 1] > 20
    assert "spoiled" in result["protocol"]["controls"]


def test_every_number_carries_its_protocol(tmp_path: Path) -> None:
    bench = Bench()
    fakes = write_fakes(tmp_path / "s", bench)
    found = evaluate_metric(bench, part(use="frechet"), samples_folder=fakes)["protocol"]  # type: ignore[arg-type]
    assert len(found["extractor"]["weights"]) == 64
    assert (found["fakes"], found["reals"], found["dimensions"], found["ddof"]) == (6, 20, 24, 0)
    assert found["levels"] == ["2x4x6", "4x8x12"]
    assert found["labels_of_fakes"] == {"0": 3, "1": 3}
    assert found["downsampling"] == "area"
    assert len(found["data_fingerprint"]) == 64
    json.dumps(found)


@pytest.mark.parametrize(("dataset", "stride"), [(Noise(), 1), (Strided(), 3)])
def test_the_stride_is_the_datas_own(tmp_path: Path, dataset: Noise, stride: int) -> None:
    bench = Bench(dataset)
    fakes = write_fakes(tmp_path / "s", bench)
    assert evaluate_metric(bench, part(use="kvd"), samples_folder=fakes)["protocol"]["stride"] == stride  # type: ignore[arg-type]


def test_fakes_that_are_missing_are_named(tmp_path: Path) -> None:
    bench = Bench(samples=7)
    fakes = write_fakes(tmp_path / "s", bench, count=6)
    with pytest.raises(TroubleError, match="sample 6"):
        evaluate_metric(bench, part(use="frechet"), samples_folder=fakes)  # type: ignore[arg-type]


def test_features_of_real_clips_are_computed_once_and_are_the_same_bits(tmp_path: Path) -> None:
    first = Bench()
    fakes = write_fakes(tmp_path / "s", first)
    folder = tmp_path / "store" / "evaluations" / "k"
    once = evaluate_metric(first, part(use="frechet"), samples_folder=fakes, store_folder=folder)  # type: ignore[arg-type]
    second = Bench()
    again = evaluate_metric(second, part(use="frechet"), samples_folder=fakes, store_folder=folder)  # type: ignore[arg-type]
    assert second.dataset.draws == 1  # whether there is a held-out split
    assert again["rows"] == once["rows"]
    assert again["protocol"] == once["protocol"] | {
        "labels_of_reals_train": again["protocol"]["labels_of_reals_train"]
    }


def test_features_are_done_without_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    bench = Bench()
    fakes = write_fakes(tmp_path / "s", bench)
    (tmp_path / "store").write_text("no folder")
    folder = tmp_path / "store" / "evaluations" / "k"
    assert evaluate_metric(bench, part(use="frechet"), samples_folder=fakes, store_folder=folder)["rows"]  # type: ignore[arg-type]


EXTRACTOR = """
import torch
from hpdm_core import hookimpl


class Grey:
    name, scaling = "grey", "none"

    def __init__(self, *, gain: float = 1.0):
        self.gain = gain

    def features(self, videos):
        return videos.double().flatten(1)[:, :3] * self.gain

    def describe(self):
        return {"name": "grey", "dimension": 3}


@hookimpl
def register_feature_extractors(register):
    register("grey", Grey, source="this test")
"""


def test_features_follow_the_extractors_options_and_its_plugin_file(tmp_path: Path) -> None:
    file = tmp_path / "grey.py"

    def features(source: str, **options: Any) -> Any:
        file.write_text(source)
        bench = Bench()
        bench.plugins = build_plugins([str(file)])
        context = CellContext(bench, cache=tmp_path / "features")  # type: ignore[arg-type]
        return context.real_features(part(use="grey", **options), split="train", count=3)[0]

    once = features(EXTRACTOR, gain=1.0)
    assert np.array_equal(features(EXTRACTOR, gain=2.0), 2 * once)  # described alike
    assert np.array_equal(features(EXTRACTOR.replace("* self.gain", "* self.gain * 3"), gain=1.0), 3 * once)


PLACED = EXTRACTOR.replace("gain: float = 1.0", "file: str, gain: float = 1.0").replace(
    "        self.gain = gain",
    "        self.gain, self.places = (gain if file == 'here' else 0.0), ('file',)",
)


def test_features_are_found_again_when_the_extractors_files_have_moved(tmp_path: Path) -> None:
    (tmp_path / "placed.py").write_text(PLACED)
    bench = Bench()
    bench.plugins = build_plugins([str(tmp_path / "placed.py")])
    context = CellContext(bench, cache=tmp_path / "features")  # type: ignore[arg-type]
    here = context.real_features(part(use="grey", file="here"), split="train", count=3)[0]
    context = CellContext(bench, cache=tmp_path / "features")  # type: ignore[arg-type]
    assert np.array_equal(
        context.real_features(part(use="grey", file="there"), split="train", count=3)[0], here
    )
    other = context.real_features(part(use="grey", file="there", gain=2.0), split="train", count=3)[0]
    assert not np.array_equal(other, here)


def test_a_damaged_feature_file_is_made_again(tmp_path: Path) -> None:
    bench = Bench()
    fakes = write_fakes(tmp_path / "s", bench)
    folder = tmp_path / "store" / "evaluations" / "k"
    once = evaluate_metric(bench, part(use="frechet"), samples_folder=fakes, store_folder=folder)  # type: ignore[arg-type]
    for path in (tmp_path / "store" / "features").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    again = evaluate_metric(bench, part(use="frechet"), samples_folder=fakes, store_folder=folder)  # type: ignore[arg-type]
    assert again["rows"] == once["rows"]


def test_without_a_held_out_split_there_is_no_floor(tmp_path: Path) -> None:
    bench = Bench(Noise(held_out=False))
    fakes = write_fakes(tmp_path / "s", bench)
    result = evaluate_metric(bench, part(use="frechet"), samples_folder=fakes)  # type: ignore[arg-type]
    assert [row["metric"] for row in result["rows"]] == ["frechet[random3d]"] * 2
    assert evaluate_metric(bench, part(use="sensitivity"))["rows"] == []  # type: ignore[arg-type]


def test_real_clips_do_not_depend_on_batches_and_are_rounded() -> None:
    context = CellContext(Bench())  # type: ignore[arg-type]
    levels, _ = context.reals("train", range(3))
    alone, _ = context.reals("train", range(2, 3))
    for level, videos in enumerate(levels):
        assert videos.dtype == torch.uint8
        assert tuple(videos.shape) == (3, *context.assembly.pyramid.size(level), 3)
        assert torch.equal(videos[2:], alone[level])
    full = context.clip("reals", "train", 0).video
    assert torch.equal(levels[1][0], ((full + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0))


def test_corruptions_are_measured_in_floors_from_the_data_alone() -> None:
    bench = Bench()
    result = evaluate_metric(bench, part(use="sensitivity", extractor="statistics"))  # type: ignore[arg-type]
    assert result["needs"] == "data"
    assert {row["corruption"] for row in result["rows"]} == {
        "blur",
        "noise",
        "shuffle",
        "freeze",
        "swap_tiles",
    }
    for row in result["rows"]:
        assert row["value"] == pytest.approx(row["distance"] / row["floor"])
    frozen = [row["value"] for row in result["rows"] if row["corruption"] == "freeze"]
    assert frozen[-1] > 3  # noise that stands still, at the finest level


@pytest.mark.parametrize(("shift", "most"), [(1.0, 1.25), (0.0, 2.0)])
def test_the_floors_spread_is_that_of_other_draws_of_real_clips(shift: float, most: float) -> None:
    """Against the standard deviation over fresh draws; where both sides have one law it may be too large."""
    rng = np.random.default_rng(3)
    floors, spreads = [], []
    for _ in range(60):
        first, second = rng.normal(size=(60, 5)), rng.normal(size=(24, 5)) + shift
        floors.append(kernel_distance(first, second))
        spreads.append(floor_spread(kernel_distance, first, second))
        assert spreads[-1] == floor_spread(kernel_distance, first, second)
    assert 0.8 < np.mean(spreads) / np.std(floors) < most
    assert np.std(spreads) < 0.6 * np.mean(spreads)
    if not shift:
        assert min(floors) < 0  # no unit


def test_too_few_clips_have_no_spread() -> None:
    clips = np.random.default_rng(0).normal(size=(4, 2))
    assert floor_spread(kernel_distance, clips, clips + 1) > 0
    assert math.isnan(floor_spread(kernel_distance, clips[:3], clips))
    assert math.isnan(floor_spread(kernel_distance, clips, clips[:3]))


def test_an_unbiased_distance_has_the_spread_beside_its_floor(tmp_path: Path) -> None:
    bench = Bench()
    fakes = write_fakes(tmp_path / "s", bench)
    for name in ("kvd", "frechet"):
        result = evaluate_metric(bench, part(use=name, extractor="statistics"), samples_folder=fakes)  # type: ignore[arg-type]
        for row in result["rows"]:
            assert ("spread" in row) == (name == "kvd" and row["metric"].endswith(".floor"))
            assert row.get("spread", 1.0) > 0
        assert ("floor_spread" in result["protocol"]) == (name == "kvd")


def test_corruptions_are_shown_to_every_distance_by_one_look(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "evaluations" / "k"
    first, second = Bench(), Bench()
    evaluate_metric(first, part(use="sensitivity", extractor="statistics"), store_folder=folder)  # type: ignore[arg-type]
    result = evaluate_metric(
        second,  # type: ignore[arg-type]
        part(use="sensitivity", distance="kvd", extractor="statistics"),
        store_folder=folder,
    )
    assert second.dataset.draws == 1  # whether there is a held-out split
    assert "random halves" in result["protocol"]["unit"]
    assert {row["metric"] for row in result["rows"]} == {"kvd[statistics].sensitivity"}
    for row in result["rows"]:
        assert row["value"] == pytest.approx((row["distance"] - row["floor"]) / row["unit"])
        assert row["unit"] != pytest.approx(abs(row["floor"]))


def test_throughput_is_the_training_results_own() -> None:
    result = evaluate_metric(Bench(), part(use="throughput"), train_result=FIGURES)  # type: ignore[arg-type]
    assert {row["metric"]: row["value"] for row in result["rows"]} == {
        f"throughput.{name}": value for name, value in FIGURES.items()
    }
    with pytest.raises(TroubleError, match="videos_per_second"):
        evaluate_metric(Bench(), part(use="throughput"), train_result={})  # type: ignore[arg-type]


def test_throughput_says_where_it_was_taken_by_the_training_result() -> None:
    told = FIGURES | {"device": "cuda:1", "threads": 3, "peak_memory_bytes": None}
    result = evaluate_metric(Bench(), part(use="throughput"), train_result=told)  # type: ignore[arg-type]
    assert (result["protocol"]["device"], result["protocol"]["threads"]) == ("cuda:1", 3)
    assert len(result["rows"]) == len(FIGURES) - 1  # a system that cannot tell the memory


def test_a_value_that_is_not_finite_is_stored_as_none() -> None:
    bench = Bench()
    metric = SimpleNamespace(
        name="m",
        needs="data",
        protocol=lambda assembly: {},
        evaluate=lambda context: [{"metric": "m", "value": np.inf}],
    )
    bench.make = lambda *given: metric  # type: ignore[method-assign]
    assert evaluate_metric(bench, part(use="m"))["rows"] == [
        {"metric": "m", "value": None, "resolution": None}
    ]  # type: ignore[arg-type]


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    context = CellContext(Bench(), model_path=tmp_path / "model.safetensors")  # type: ignore[arg-type]
    with pytest.raises(TroubleError, match="train the cell first"):
        _ = context.denoiser


def test_the_command_measures_a_train_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = tmp_path / "store" / "train" / "k"
    cell.mkdir(parents=True)
    spec = {"config": Bench().config.model_dump(mode="json"), "plugins": []}
    (cell / "spec.json").write_text(json.dumps(spec))
    (cell / "result.json").write_text(json.dumps(FIGURES))
    prepared: list[int | None] = []
    monkeypatch.setattr(
        "hpdm_core.evaluation.trained_cell.prepare_torch", lambda runtime, _: prepared.append(runtime.threads)
    )
    assert main([str(cell), "--metric", "throughput", "--out", str(tmp_path / "out.json")]) == 0
    assert prepared == [None]
    assert "metric=throughput.videos_per_second\tvalue=3.5" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert result["metric"] == "throughput"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "throughputs"], "did you mean 'throughput'"),
        (["--metric", "[1]"], "is not a part"),
        (["--out", "/nope/x.json"], "--out /nope/x.json: allowed is a file in a folder that exists"),
        (["--out", "/"], "--out /: is a folder; allowed is a file"),
        (["--metric", "{use: frechet, extractor: statistic}"], "did you mean 'statistics'"),
    ],
)
def test_wrong_metrics_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    spec = {"config": Bench().config.model_dump(mode="json"), "plugins": []}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert report_errors(main, [str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_cell_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(main, [str(tmp_path)]) == 2
    assert "allowed is a train stage, STORE/train/KEY" in capsys.readouterr().err
