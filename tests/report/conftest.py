"""A study's result files, written as the study engine writes them, with numbers that are known in advance."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

LEVELS = ("2x6x8", "4x12x16", "8x24x32")
SIGMAS = (0.1, 1.0)
MADE = {"machine": {"processor": "abacus", "cores": 2}, "git": "0123456789abcdef"}
FUSIONS = {"default": {"use": "deep", "detach": False}, "no_context": {"use": "none"}}


def protocol(metric: str) -> dict[str, Any]:
    return {"metric": metric, "extractor": {"weights": "ab" * 32}, "reals": 256, "note": "50% of a_b & c"}


def loss_of(arm: str, seed: int, level: int) -> float:
    """default .10 + seed/1000, no_context .20 + 2 seed/1000; finer levels + .01 each."""
    start, slope = {"default": (0.10, 0.001), "no_context": (0.20, 0.002)}.get(arm, (0.15, 0.0))
    return start + slope * seed + 0.01 * level


def evaluations(arm: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    loss: list[dict[str, Any]] = []
    for parents, extra in (("clean", 0.0), ("noisy", 0.5)):
        for level, name in enumerate(LEVELS):
            mean = loss_of(arm, seed, level) + (extra if level else 0.0)
            for sigma, value in ((None, mean), *((sigma, mean * sigma) for sigma in SIGMAS)):
                loss.append(
                    {"metric": "held_out_loss", "level": level, "value": value, "parents": parents}
                    | {"sigma_eff": sigma, "resolution": name}
                )
    distance = [
        {"metric": f"frechet[random3d]{part}", "level": level, "value": value, "resolution": name}
        for level, name in enumerate(LEVELS)
        for part, value in (("", 20.0 + 40.0 * level), (".floor", 10.0))
    ]
    seen = [
        {"metric": "frechet[random3d].sensitivity", "level": level, "resolution": name}
        | {"value": value, "corruption": corruption, "distance": 10 * value, "floor": 10.0}
        for corruption, values in {"blur": (9.0, 9.0, 9.0), "shuffle": (1.0, 1.0, 5.0)}.items()
        for level, (name, value) in enumerate(zip(LEVELS, values, strict=True))
    ]
    return {"held_out_loss": loss, "frechet[random3d]": distance, "frechet[random3d].sensitivity": seen}


def write_study(
    root: Path,
    *,
    arms: Sequence[str] = ("default", "no_context"),
    seeds: Sequence[int] = (0, 1, 2),
    states: Mapping[tuple[str, int], str] | None = None,
    samples: bool = True,
) -> Path:
    """Write ``root``/demo and ``root``/store; cells whose state is not "done" get no files at all."""
    states = states or {}
    lines = ["arm,seed,train,samples,evaluations,state"]
    for arm in arms:
        for seed in seeds:
            state = states.get((arm, seed), "done")
            train, sample = f"t{arm}{seed}", f"s{arm}{seed}"
            made = evaluations(arm, seed)
            keys = {metric: f"e{arm}{seed}{number}" for number, metric in enumerate(made)}
            lines.append(f"{arm},{seed},{train},{sample},{';'.join(keys.values())},{state}")
            if state != "done":
                continue
            for metric, rows in made.items():
                folder = root / "store" / "evaluations" / keys[metric]
                folder.mkdir(parents=True)
                result = {"metric": metric, "rows": rows, "protocol": protocol(metric)}
                (folder / "result.json").write_text(
                    json.dumps({**result, "versions": {"torch": "2.13"}, **MADE})
                )
            _train(root / "store" / "train" / train, arm)
            if samples:
                _samples(root / "store" / "samples" / sample, arm)
    study = root / "demo"
    study.mkdir()
    (study / "index.csv").write_text("\n".join(lines) + "\n")
    plan = {
        "name": "demo",
        "baseline": arms[0],
        "arms": {arm: {"model.context_fusion": FUSIONS.get(arm, "none")} for arm in arms},
        "sampling": {"overlap": []},
    }
    plan["arms"][arms[-1]]["sampling.overlap"] = ["h"]
    (study / "study.yaml").write_text(yaml.safe_dump(plan))
    return study


def _train(folder: Path, arm: str) -> None:
    folder.mkdir(parents=True)
    figures = {"videos_per_second": 10.0 if arm == "default" else 12.0, "parameters": 1234567}
    (folder / "result.json").write_text(json.dumps(figures))
    config = {
        "model": {"context_fusion": FUSIONS.get(arm, {"use": "none"}), "blocks": 6},
        "training": {"steps": 5},
    }
    (folder / "spec.json").write_text(json.dumps({"config": config}))
    weights = {"block.weight": np.zeros((2, 3), np.float32)}
    if arm == "default":
        weights["fusion.weight"] = np.zeros((4, 5), np.float32)
    save_file(weights, folder / "model.safetensors")


def _samples(folder: Path, arm: str) -> None:
    folder.mkdir(parents=True)
    for index in range(5):
        video = np.zeros((8, 24, 32, 3), np.uint8)
        video[..., 0] = 255 if arm == "default" else 0
        video[..., 1] = 50 * index
        video[..., 2] = np.linspace(0, 255, 8).astype(np.uint8)[:, None, None]
        coarse = np.zeros((2, 6, 8, 3), np.uint8)
        save_file({"level0": coarse, "level1": video}, folder / f"{index:06d}.safetensors")


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Path]:
    """``study(arms=..., seeds=..., states=..., samples=...)`` writes a study and returns its folder."""
    return lambda **options: write_study(tmp_path, **options)
