"""One, two and three processes, replicated and sharded, train the same weights; any number goes on from any."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import CellConfig, RuntimeConfig
from hpdm_core.model.rin import RIN
from hpdm_core.plugins import build_plugins
from hpdm_core.training.checkpoint import checkpoint_folders, newest_intact
from hpdm_core.training.strategy import STRATEGIES, Strategy, _has_idle, make_strategy, share_of

JOB = Path(__file__).parent / "training_job.py"
Succeed = Callable[..., list[str]]


def job_module() -> Any:
    spec = importlib.util.spec_from_file_location("training_job", JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    """Counting operations takes longer than a tiny run; it has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpdm_core.training.cost.training_flops", lambda assembly: 1)
        yield


@pytest.fixture(scope="module")
def alone() -> Callable[[dict[str, Any]], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Train in this process; each cell once."""
    module, done = job_module(), {}

    def train(changes: dict[str, Any]) -> Any:
        key = json.dumps(changes)
        if key not in done:
            done[key] = module.train(changes)
        return done[key]

    return train


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, succeed: Succeed) -> Callable[..., list[Any]]:
    """Train several cells, one after the other, in so many processes: per cell its weights and each one's facts."""

    def run(jobs: Sequence[dict[str, Any]], *, processes: int) -> list[Any]:
        folder = tmp_path_factory.mktemp("jobs")
        asked = [{**job, "out": str(folder / str(number))} for number, job in enumerate(jobs)]
        (folder / "jobs.json").write_text(json.dumps(asked))
        succeed([str(JOB), str(folder / "jobs.json")], processes=processes)
        return [
            (
                safetensors.torch.load_file(folder / f"{number}.safetensors"),
                json.loads((folder / f"{number}.json").read_text()),
            )
            for number in range(len(jobs))
        ]

    return run


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(got) == set(expected) and len(got) > 100
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def with_(strategy: str, optimizer: str, **runtime: Any) -> dict[str, Any]:
    # A low limit, so that every step is clipped; a LAMB with a rate at which trust ratios matter.
    return {
        "training": {"optimizer": optimizer, "clip": 0.1},
        "runtime": {"strategy": strategy, **runtime},
    }


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same_weights(
    processes: int, alone: Any, together: Callable[..., list[Any]]
) -> None:
    kinds = [(s, o) for s in ("ddp", "fsdp") for o in ("adamw", "lamb")]
    jobs = [{"changes": with_(strategy, optimizer)} for strategy, optimizer in kinds]
    for (strategy, optimizer), (weights, facts) in zip(
        kinds, together(jobs, processes=processes), strict=True
    ):
        expected, reference = alone(with_("single", optimizer))
        assert_equal(weights, expected, 1e-9)
        numbers = [here["own_numbers"] for here in facts]
        assert len(facts) == processes
        # Replicas are whole; shards add up to one network.
        assert (sum(numbers) if strategy == "fsdp" else numbers[0]) == reference["own_numbers"]
        for here in facts:
            assert here["average_off"] < 1e-12
            assert here["norms"] == pytest.approx(reference["norms"], rel=1e-9)
            assert min(here["norms"]) > 0.1  # clipping had something to do
            for got, wanted in zip(here["losses"], reference["losses"], strict=True):
                assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_parts_of_a_batch_and_activation_checkpointing_change_nothing(
    strategy: str, alone: Any, together: Callable[..., list[Any]]
) -> None:
    changed = with_(strategy, "lamb", micro_batch=2, activation_checkpointing=True)
    ((weights, _),) = together([{"changes": changed}], processes=2)
    expected, _ = alone(with_("single", "lamb"))
    assert_equal(weights, expected, 1e-9)


@pytest.mark.parametrize(
    "runtime", [{"micro_batch": 5}, {"activation_checkpointing": True}, {"micro_batch": 12}]
)
def test_in_one_process_too(runtime: dict[str, Any], alone: Any) -> None:
    expected, _ = alone(with_("single", "lamb"))
    weights, _ = alone(with_("single", "lamb", **runtime))
    assert_equal(weights, expected, 1e-9)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        pytest.param("ddp", [("fsdp", 2)], marks=pytest.mark.slow),
        ("fsdp", [("ddp", 2)]),
        pytest.param("ddp", [("ddp", 3), ("fsdp", 3)], marks=pytest.mark.slow),
        pytest.param("fsdp", [("ddp", 3), ("fsdp", 3)], marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_on_two_processes_goes_on_on_any_number(
    first: str,
    others: list[tuple[str, int]],
    alone: Any,
    together: Callable[..., list[Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def short(strategy: str) -> dict[str, Any]:
        changes = with_(strategy, "lamb", checkpoint_every=2)
        return {**changes, "training": {**changes["training"], "steps": 7}}

    together([{"changes": short(first), "folder": str(tmp_path), "stop_after": 5}], processes=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["00000002", "00000004"]
    expected, _ = alone(short("single"))
    # On one process
    weights, facts = job_module().train(short("single"), previous=(str(tmp_path),))
    assert facts["resumed_from"] == [4]
    assert_equal(weights, expected, 1e-9)
    for strategy, processes in others:
        again = {"changes": short(strategy), "previous": [str(tmp_path)]}
        ((weights, everybody),) = together([again], processes=processes)
        assert [here["resumed_from"] for here in everybody] == [[4]] * processes
        assert_equal(weights, expected, 1e-9)
    if first == "fsdp":
        (shard,) = (tmp_path / "checkpoints" / "00000004").glob("shards/__1_0.distcp")
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        found = newest_intact([tmp_path])
        assert found is not None and found.step == 2
        assert "shards/__1_0.distcp does not match its SHA-256" in caplog.text


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_killed_and_started_again_ends_with_the_same_bits(
    strategy: str, together: Callable[..., list[Any]], tmp_path: Path
) -> None:
    changes = with_(strategy, "adamw", checkpoint_every=3, precision="fp32", log_every=4)
    changes["training"]["steps"] = 7
    folder = str(tmp_path / "1")
    straight, stopped, again = together(
        [
            {"changes": changes},
            {"changes": changes, "folder": folder, "stop_after": 5},
            {"changes": changes, "folder": str(tmp_path / "2"), "previous": [folder]},
        ],
        processes=2,
    )
    assert stopped[1][0]["stopped"] == 5 and again[1][0]["resumed_from"] == [3]
    assert set(again[0]) == set(straight[0])
    for name, tensor in straight[0].items():
        assert torch.equal(again[0][name], tensor), name
    saved = safetensors.torch.load_file(tmp_path / "2" / "model.safetensors")
    assert all(torch.equal(saved[name], again[0][f"ema.{name}"]) for name in saved)
    # The main process alone wrote figures, each once.
    lines = (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 7]


def test_parameters_without_a_part_in_a_step_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = job_module()
    assembly = Assembly(CellConfig.model_validate(module.TINY), build_plugins())
    assert not _has_idle(assembly)
    build = Assembly.build_model

    def with_idle(self: Assembly, **options: Any) -> Any:
        model = build(self, **options)
        model.idle = torch.nn.Linear(2, 2, device="meta")
        return model

    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "build_model", with_idle)
        assert _has_idle(assembly)
    begin = RIN.start

    def blind(self: RIN, previous: Any, batch: int) -> torch.Tensor:
        return self.latents().expand(batch, -1, -1) if previous is None else begin(self, previous, batch)

    monkeypatch.setattr(RIN, "start", blind)  # what recalls has no part where no video is conditioned
    assert _has_idle(assembly)


def test_strategies_are_those_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(STRATEGIES) == set(get_args(RuntimeConfig.model_fields["strategy"].annotation))
    for name in STRATEGIES:
        assert type(make_strategy(name)) is Strategy  # one process alone
    monkeypatch.setattr("hpdm_core.base.distributed.size", lambda: 2)
    assert make_strategy("fsdp").name == "fsdp"
    with pytest.raises(InputError, match="'single' was given to 2 processes; allowed for several: ddp, fsdp"):
        make_strategy("single")


def test_a_batch_that_does_not_come_out_even_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpdm_core.base.distributed.size", lambda: 3)
    monkeypatch.setattr("hpdm_core.base.distributed.rank", lambda: 1)
    assert share_of(12) == range(4, 8)
    for batch, allowed in ((8, "1, 2, 4, 8"), (2, "1, 2")):
        with pytest.raises(
            InputError, match=f"{batch} videos do not split over 3 processes.*: {allowed} pro"
        ):
            share_of(batch)
