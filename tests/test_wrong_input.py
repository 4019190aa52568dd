"""Whatever is wrong with what a user gives, or goes wrong while a study runs, is one line each, end to end.

Wrong input: exit code 2, lines that begin with ``error: ``, nothing written. Trouble: exit code 1, the work kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
import torch

from hpdm_core.base.errors import report_errors
from hpdm_core.base.randomness import generator
from hpdm_core.study.__main__ import main

TINY = """name: tiny
model:
  video: [4, 8, 8]
  patch: [2, 4, 4]
  token: [1, 2, 2]
  levels: 2
  token_dim: 8
  blocks: 2
  backbone: {use: rin, latent_dim: 8, latents: 2, latent_layers: 1, latent_heads: 2, latent_head_dim: 4, heads: 2}
data: {dataset: synthetic}
training: {steps: 3, batch: 2, learning_rate: 1e-3}
sampling: {solver: {use: edm, steps: [1]}}
evaluation: {samples: 1, reals: 1, metrics: [throughput]}
runtime: {threads: 1, checkpoint_every: 1, log_every: 1, prefetch: 0}
arms:
  default: {}
  bare: {model.context_fusion: none}
seeds: [0]
backend: inline
"""
HOOK = "from hpdm_core import hookimpl\n\n\n@hookimpl\n"
FUSION = """from hpdm_core import ContextFusion, hookimpl


@hookimpl
def register_context_fusions(register):
    register("mine", Mine, source="me")


class Mine(ContextFusion):
    def __init__(self, shape):
        super().__init__()
"""
OBJECTIVE = """from hpdm_core import hookimpl
from hpdm_plugins.diffusion.objectives import SnapV


class Bad(SnapV):
    calls = 0

    def weight(self, sigma, sigma_in):
        Bad.calls += 1
        return super().weight(sigma, sigma_in) * (float("nan") if Bad.calls > 4 else 1.0)  # 2 levels: step 3


@hookimpl
def register_objectives(register):
    register("bad", Bad, source="me")
"""


@dataclass(frozen=True)
class Said:
    """What a command said and did."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()

    def lines(self, word: str) -> list[str]:
        return [line for line in (self.out + self.err).splitlines() if word in line]


Command = Callable[..., Said]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command on ``tiny.yaml`` in its own working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, file: str = "tiny.yaml") -> Said:
        capsys.readouterr()
        code = report_errors(main, [file, *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(code, said.out, said.err)

    return run


def changed(old: str, new: str) -> str:
    assert TINY.count(old) == 1, f"'{old}' should stand once in the study"
    return TINY.replace(old, new)


@dataclass(frozen=True)
class Wrong:
    """A wrong input, and words of each line that it is to give: where, what was given, what is allowed."""

    name: str
    lines: Sequence[Sequence[str]]
    text: str | bytes | None = TINY
    arguments: Sequence[str] = ()
    files: Sequence[tuple[str, str]] = ()


def plugin(name: str, source: str, *words: str) -> tuple[Wrong, Wrong]:
    """A plugin that is wrong, given by the flag and in the file."""
    files = (("mine.py", source),)
    return (
        Wrong(f"plugin: {name}", [words], arguments=("--plugin", "mine.py"), files=files),
        Wrong(
            f"plugin in the file: {name}",
            [("tiny.yaml:1: ", *words)],
            text="plugins: [./mine.py]\n" + TINY,
            files=files,
        ),
    )


def flags(*arguments: str, lines: Sequence[Sequence[str]]) -> Wrong:
    """A flag that is wrong; its lines begin with it."""
    given = " ".join(arguments)
    return Wrong(given, [(f"error: {given}: ", *words) for words in lines], arguments=arguments)


WRONG = [
    Wrong(
        "missing file",
        [("error: tiny.yaml: no such file - did you mean 'tinny.yaml'?",)],
        text=None,
        files=(("tinny.yaml", TINY),),
    ),
    Wrong("empty file", [("error: tiny.yaml: empty", "extends: PRESET")], text=""),
    Wrong("comments only", [("error: tiny.yaml: empty",)], text="# nothing yet\n"),
    Wrong("no mapping", [("error: tiny.yaml: should be a mapping", "list")], text="- a\n"),
    Wrong("no text", [("error: tiny.yaml: not a text file in UTF-8",)], text=b"\xff\xfe\x00"),
    Wrong(
        "YAML syntax",
        [("error: tiny.yaml:7: not valid YAML: ", "expected ',' or ']'")],
        text=changed("levels: 2", "levels: [2"),
    ),
    Wrong(
        "tab", [("error: tiny.yaml:6: not valid YAML: ", "'\\t'")], text=changed("  levels: 2", "\tlevels: 2")
    ),
    Wrong(
        "unknown key",
        [("tiny.yaml:20: bassline: unknown key", "did you mean 'baseline'?")],
        text=TINY + "bassline: bare\n",
    ),
    Wrong(
        "unknown key of a section",
        [("tiny.yaml:11: training.step: unknown key", "'steps'")],
        text=changed("steps: 3", "step: 3"),
    ),
    Wrong(
        "unknown key of an arm",
        [("tiny.yaml:17: training.stepz: unknown key", "'steps'")],
        text=changed("{model.context_fusion: none}", "{training.stepz: 2}"),
    ),
    Wrong(
        "wrong type",
        [("tiny.yaml:11: training.steps: should be a valid integer, got 'three'",)],
        text=changed("steps: 3", "steps: three"),
    ),
    Wrong(
        "no section",
        [("tiny.yaml:10: data: should be a mapping of keys to values, got 3",)],
        text=changed("data: {dataset: synthetic}", "data: 3"),
    ),
    Wrong(
        "not finite",
        [("tiny.yaml:11: training.learning_rate: should be a finite number, got inf",)],
        text=changed("1e-3", ".inf"),
    ),
    Wrong(
        "unknown part",
        [
            (
                "tiny.yaml:10: data.dataset.use: unknown part 'syntetic' of datasets",
                "did you mean 'synthetic'?",
                "registered: gaussian_world",
            )
        ],
        text=changed("dataset: synthetic", "dataset: syntetic"),
    ),
    Wrong(
        "unknown option",
        [("tiny.yaml:9: model.backbone.latent: unknown key", "'latents'", "'rin'")],
        text=changed("latents: 2", "latent: 2"),
    ),
    Wrong(
        "option out of range",
        [("tiny.yaml:9: model.backbone.latents: should be greater than 0, got -2",)],
        text=changed("latents: 2", "latents: -2"),
    ),
    Wrong(
        "unknown preset",
        [
            (
                "tiny.yaml:1: unknown preset 'hpdm_x'",
                "did you mean 'hpdm_s'?",
                "hpdm_l, hpdm_m, hpdm_s",
            )
        ],
        text="extends: hpdm_x\n" + TINY,
    ),
    Wrong(
        "missing base",
        [("tiny.yaml:1: extends: no such file './bas.yaml'", "did you mean 'base.yaml'?")],
        text="extends: ./bas.yaml\n" + TINY,
        files=(("base.yaml", TINY),),
    ),
    Wrong(
        "extends itself",
        [("tiny.yaml:1: extends loop: tiny.yaml -> tiny.yaml",)],
        text="extends: ./tiny.yaml\n",
    ),
    Wrong(
        "extends loop",
        [("b.yaml:1: extends loop: tiny.yaml -> b.yaml -> tiny.yaml",)],
        text="extends: ./b.yaml\n",
        files=(("b.yaml", "extends: ./tiny.yaml\n"),),
    ),
    Wrong(
        "duplicate key",
        [("tiny.yaml:7: duplicate key 'model.levels', first given in line 6",)],
        text=changed("  levels: 2", "  levels: 2\n  levels: 3"),
    ),
    Wrong(
        "equal arms",
        [("tiny.yaml:17: arms 'default' and 'bare' have the same configuration",)],
        text=changed("{model.context_fusion: none}", "{training.steps: 3}"),
    ),
    Wrong(
        "empty seeds",
        [("tiny.yaml:18: seeds: should have at least 1 items, got []",)],
        text=changed("[0]", "[]"),
    ),
    Wrong(
        "video and patch",
        [("tiny.yaml:3: model.video: w = 10 is not a multiple of patch 4",)],
        text=changed("[4, 8, 8]", "[4, 8, 10]"),
    ),
    Wrong(
        "patch and token",
        [("tiny.yaml:4: model.patch: h = 4 is not a multiple of token 3",)],
        text=changed("[1, 2, 2]", "[1, 3, 2]"),
    ),
    Wrong(
        "allocation",
        [
            (
                "tiny.yaml:9: model.computation_allocation: 'explicit' gives [1, 1]",
                "2 (all levels) in the last",
            )
        ],
        text=changed(
            "blocks: 2", "blocks: 2\n  computation_allocation: {use: explicit, levels_per_block: [1, 1]}"
        ),
    ),
    Wrong(
        "negative steps",
        [("tiny.yaml:11: training.steps: should be greater than 0, got -3",)],
        text=changed("steps: 3", "steps: -3"),
    ),
    Wrong(
        "negative warm-up",
        [("tiny.yaml:11: training.warmup: should be greater than or equal to 0, got -1",)],
        text=changed("steps: 3", "steps: 3, warmup: -1"),
    ),
    Wrong(
        "negative sampling steps",
        [("tiny.yaml:12: sampling.solver.steps: [-2]; allowed is a positive integer",)],
        text=changed("steps: [1]", "steps: [-2]"),
    ),
    Wrong(
        "heads",
        [("tiny.yaml:9: model.backbone.heads: 3 does not divide model.token_dim 8; allowed is a divisor",)],
        text=changed("heads: 2}", "heads: 3}"),
    ),
    Wrong(
        "unknown backend",
        [
            (
                "tiny.yaml:19: backend.use: unknown backend 'lokal'",
                "'local'?",
                "inline, local, simulated, slurm",
            )
        ],
        text=changed("backend: inline", "backend: lokal"),
    ),
    Wrong(
        "unknown option of a backend",
        [("tiny.yaml:19: backend.slotz: unknown key", "'slots'")],
        text=changed("backend: inline", "backend: {use: local, slotz: 3}"),
    ),
    Wrong(
        "unknown storage",
        [("tiny.yaml:20: storage: 'nonsense://...' is no storage", "sqlite:///")],
        text=TINY + "storage: nonsense://me:secret@host\n",
    ),
    *(
        Wrong(
            f"storage: {name}",
            [(f"storage: 'sqlite:///{file}' cannot be opened: ", reason, "allowed is null for a journal")],
            text=TINY + f"storage: sqlite:///{file}\n",
            files=(("notes.txt", "no database at all, though it is long enough to be looked into\n" * 40),),
        )
        for name, file, reason in (
            ("missing folder", "missing/ledger.db", "No such file or directory"),
            ("no database", "notes.txt", "file is not a database"),
            ("below a file", "notes.txt/ledger.db", "Not a directory"),
            ("a folder", ".", "unable to open database file"),
        )
    ),
    Wrong(
        "data that were never there",
        [("data.dataset 'video_folder', option root: 'videoz' does not exist; allowed is an existing",)],
        text=changed("dataset: synthetic", "dataset: {use: video_folder, root: videoz}"),
    ),
    Wrong(
        "storage: nobody answers",
        [("storage: 'redis://***@localhost:1/0' cannot be opened: ",)],
        text=TINY + "storage: redis://me:secret@localhost:1/0\n",
    ),
    Wrong(
        "several problems",
        [
            ("tiny.yaml:19: backend.use: ",),
            ("tiny.yaml:10: data.dataset.use: ",),
            ("tiny.yaml:11: training.steps: ",),
        ],
        text=changed("backend: inline", "backend: lokal")
        .replace("synthetic", "x")
        .replace("steps: 3", "steps: -3"),
    ),
    flags(
        "--backend",
        "slrum",
        lines=[("unknown 'slrum'", "did you mean 'slurm'?", "allowed: inline, local, simulated, slurm")],
    ),
    flags("--only", "bear", lines=[("no such arm", "did you mean 'bare'?")]),
    flags("--only", ",", lines=[("names no arm", "arms: default, bare")]),
    flags("--results", "tiny.yaml", lines=[("not writable", "Not a directory", "allowed: a folder")]),
    flags("--results", "tiny.yaml/below", lines=[("not writable", "Not a directory")]),
    flags("--set", "training.steps", lines=[("should be KEY=VALUE, for example --set training.steps=100",)]),
    flags("--set", "=3", lines=[("'' is not a path such as training.steps",)]),
    flags("--set", "training.steps=", lines=[("training.steps: should be a valid integer, got null",)]),
    flags("--set", "training.steps=[1", lines=[("not valid YAML: ",)]),
    flags("--set", "training.steps=-1", lines=[("training.steps: should be greater than 0, got -1",)]),
    flags(
        "--set", "model.token_dim=9", lines=[("model.backbone.heads: 2 does not divide model.token_dim 9",)]
    ),
    flags(
        "--set",
        "model.levels=1",
        lines=[(f"model.video: {axis} = ", "with 1 level(s) it must be 1") for axis in "fhw"],
    ),
    flags(
        "--set", "runtime.device=cudaa", lines=[("runtime.device: should be a device such as cpu", "'cudaa'")]
    ),
    flags("--set", "name=../x", lines=[("name: letters, digits and ._- only, got '../x'",)]),
    flags("--arm", ":training.steps=2", lines=[("should be NAME:KEY=VALUE,...",)]),
    flags("--arm", "mine:training.steps", lines=[("'training.steps' should be KEY=VALUE",)]),
    flags("--arm", "mine:training.steps=[1", lines=[("not valid YAML: ",)]),
    flags("--arm", "mine", lines=[("arms 'default' and 'mine' have the same configuration",)]),
    flags("--arm", "bare:training.steps=9", lines=[("the study has an arm 'bare' already",)]),
    flags("--arm", "../mine:training.steps=9", lines=[("'../mine' should begin with a letter or digit",)]),
    flags(
        "--arm", "mine:model.context_fusion=dep", lines=[("unknown part 'dep' of context_fusions", "'deep'?")]
    ),
    Wrong(
        "missing plugin",
        [("mine.py': no such file - did you mean 'mime.py'?",)],
        arguments=("--plugin", "mine.py"),
        files=(("mime.py", FUSION),),
    ),
    Wrong(
        "missing module",
        [("plugin 'hpdm_plugin': no module", "did you mean 'hpdm_plugins'?")],
        arguments=("--plugin", "hpdm_plugin"),
    ),
    *plugin("syntax", "def f(:\n", "mine.py' does not import: ", "mine.py:1: SyntaxError: "),
    *plugin(
        "import",
        "\nimport nosuch\n",
        "mine.py' does not import: ",
        "mine.py:2: ModuleNotFoundError: No module named 'nosuch'",
    ),
    *plugin(
        "raises",
        "raise RuntimeError('a\\nb')\n",
        "mine.py' does not import: ",
        "mine.py:1: RuntimeError: a b",
    ),
    *plugin("exits", "import sys; sys.exit(3)\n", "mine.py' does not import: ", "mine.py:1: SystemExit: 3"),
    *plugin(
        "misspelt hook",
        HOOK + "def register_context_fusion(register): ...\n",
        "plugin 'mine' (",
        "no hook 'register_context_fusion'",
        "did you mean 'register_context_fusions'? (line 4)",
    ),
    *plugin(
        "misspelt argument",
        HOOK + "def register_context_fusions(regster): ...\n",
        "plugin 'mine' (",
        "argument 'regster'",
        "did you mean 'register'?",
    ),
    *plugin("no hooks", "x = 1\n", "plugin 'mine' (", "has no hooks; mark a function with @hookimpl"),
    *plugin(
        "name collision",
        FUSION.replace('"mine"', '"deep"'),
        "plugin 'mine' (",
        "registers context_fusions/deep, which plugin 'hpdm_plugins.model.fusions'",
        "choose another key",
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_input_is_a_line_per_problem_and_nothing_is_written(
    command: Command, tmp_path: Path, wrong: Wrong
) -> None:
    for name, source in wrong.files:
        (tmp_path / name).write_text(source)
    if wrong.text is not None:
        text = wrong.text if isinstance(wrong.text, bytes) else wrong.text.encode()
        (tmp_path / "tiny.yaml").write_bytes(text)
    before = snapshot(tmp_path)
    said = command(*wrong.arguments)
    assert said.code == 2
    assert len(said.errors) == len(wrong.lines), said.err
    for line, words in zip(said.errors, wrong.lines, strict=True):
        assert line.startswith("error: ")
        for word in words:
            assert word in line, line
    assert said.out == ""
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc: a folder where nobody may write")
def test_a_folder_that_is_not_writable_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    said = command("--results", "/proc/hpdm_results")
    assert said.code == 2 and len(said.errors) == 1
    assert said.err.startswith("error: --results /proc/hpdm_results: not writable (/proc: ")


def test_as_a_command_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(changed("steps: 3", "steps: -3"))
    path = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-m", "hpdm_core.study", "tiny.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: tiny.yaml:11: training.steps: should be greater than 0, got -3\n"
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.yaml"]


# Trouble at run time


def failed(said: Said) -> str:
    """Return the one line at the end that says what failed; exit code 1."""
    assert said.code == 1, said
    (line,) = [line for line in said.out.splitlines() if line.startswith("failed: ")]
    return line


def trained(folder: Path) -> list[Path]:
    return sorted(folder.glob("store/train/*/result.json"))


def test_a_loss_that_is_no_number_names_step_and_checkpoint_and_the_others_go_on(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "bad.py").write_text(OBJECTIVE)
    said = command("--plugin", "bad.py", "--arm", "nan:diffusion.objective=bad")
    line = failed(said)
    assert line.startswith("failed: nan, seed 0: training: the loss of level 0, 1 is not finite at step 3")
    assert "checkpoints/00000002; try a lower training.learning_rate" in line
    checkpoint = Path(line.partition("last good checkpoint is ")[2].partition(";")[0])
    assert (checkpoint / "model.safetensors").is_file()
    assert len(trained(tmp_path / "results")) == 2  # the other two arms
    assert said.err == ""


def test_a_learning_rate_that_is_too_high_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = failed(command("--only", "bare", "--set", "training.learning_rate=1e30"))
    assert "is not finite at step 2 (seed 0); the last good checkpoint is " in line


@pytest.mark.parametrize("classes", [3, 5])
def test_labels_that_the_data_does_not_have_are_one_line(
    command: Command, tmp_path: Path, classes: int
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = failed(command("--only", "bare", "--set", f"model.classes={classes}"))
    assert f"model.classes: {classes} was given, and data.dataset 'synthetic' has 4 classes" in line
    assert "allowed is 4, or 0 for a model without labels" in line


def test_an_error_of_several_lines_is_shown_by_its_first(command: Command, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    raising = 'if level: raise RuntimeError("first\\nsecond")\n        return None'
    source = FUSION + f"\n    def pixel_context(self, level, coords, sources):\n        {raising}\n"
    (tmp_path / "mine.py").write_text(source)
    arguments = ("--plugin", "mine.py", "--arm", "mine:model.context_fusion=mine", "--only", "mine")
    said = command(*arguments)
    assert failed(said).startswith("failed: mine, seed 0: RuntimeError: first (log: ")
    assert not said.lines("second")


def test_a_damaged_journal_is_rebuilt_and_the_study_goes_on(command: Command, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert command("--only", "default").code == 0
    journal = tmp_path / "results" / "tiny" / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], "\0rubbish {\n", *lines[2:]]))
    said = command()
    assert said.code == 1  # something that a person should look at
    (line,) = said.lines("journal.log: damaged (line 3 is not a record)")
    assert "the ledger is rebuilt from the store, the old file is kept as journal.log.damaged-1" in line
    assert "2 of 2 cells done" in said.out and len(trained(tmp_path / "results")) == 2
    assert [json.loads(each)["op_code"] for each in journal.read_text().splitlines()]
    assert not list(tmp_path.glob("results/store/train/*/attempts/2"))
    assert command().code == 0


def write_videos(folder: Path) -> None:
    folder.mkdir()
    for number in range(2):
        stream = generator("test_wrong_input", number)
        with av.open(str(folder / f"{number}.mkv"), "w") as container:
            video = container.add_stream("ffv1", rate=25)
            video.width, video.height, video.pix_fmt = 16, 16, "bgr0"
            for _ in range(6):
                pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=stream)
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")))
            container.mux(video.encode(None))


def test_a_data_folder_that_vanished_is_one_line_and_the_work_is_kept(
    command: Command, tmp_path: Path
) -> None:
    write_videos(tmp_path / "videos")
    text = changed("dataset: synthetic", "dataset: {use: video_folder, root: videos, held_out: 0.5}")
    (tmp_path / "tiny.yaml").write_text(text)
    assert command("--only", "default").code == 0
    shutil.move(tmp_path / "videos", tmp_path / "elsewhere")
    said = command()
    line = failed(said)
    assert line.startswith("failed: bare, seed 0: data.dataset 'video_folder', option root: 'videos'")
    assert "does not exist" in line and "1 of 2 cells done, 1 failed" in said.out
    (kept,) = trained(tmp_path / "results")
    shutil.move(tmp_path / "elsewhere", tmp_path / "videos")
    assert command("--retry-failed").code == 0
    assert len(trained(tmp_path / "results")) == 2
    assert not (kept.parent / "attempts" / "2").exists()


def test_a_data_folder_that_moved_trains_nothing_and_another_folder_does(
    command: Command, tmp_path: Path
) -> None:
    """Where data lie is no part of a key, what lies there is."""
    write_videos(tmp_path / "videos")
    text = changed("dataset: synthetic", "dataset: {use: video_folder, root: videos, held_out: 0.5}")
    (tmp_path / "tiny.yaml").write_text(text.replace("  bare: {model.context_fusion: none}\n", ""))
    assert command().code == 0
    (kept,) = trained(tmp_path / "results")
    shutil.move(tmp_path / "videos", tmp_path / "elsewhere")
    there = ("--set", f"data.dataset.root={tmp_path / 'elsewhere'}")
    assert "1 of 1 cells done" in command(*there).out
    assert trained(tmp_path / "results") == [kept] and not (kept.parent / "attempts" / "2").exists()
    shutil.copy(tmp_path / "elsewhere" / "0.mkv", tmp_path / "elsewhere" / "2.mkv")
    assert "0 models to train" not in command(*there, "--dry-run").out
    assert command(*there).code == 0
    assert len(trained(tmp_path / "results")) == 2
    (tmp_path / "elsewhere" / "2.mkv").unlink()
    assert "0 models to train" in command(*there, "--dry-run").out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here: that takes root on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("left", [250_000, 20_000, 0])
def test_a_full_disk_is_one_line_and_the_next_command_goes_on(
    command: Command, tmp_path: Path, small_disk: Path, left: int
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    results = small_disk / "results"
    assert command("--only", "default", "--results", str(results)).code == 0
    (kept,) = trained(results)
    before = kept.read_bytes()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    said = command("--results", str(results))
    assert said.code == 1
    last = [
        line for line in said.lines("No space left on device") if line.startswith(("failed: ", "error: "))
    ]
    assert len(last) == 1 and "free some space" in last[0]
    assert kept.read_bytes() == before
    ballast.unlink()
    assert command("--results", str(results)).code == 0
    assert len(trained(results)) == 2 and not (kept.parent / "attempts" / "2").exists()


# What a plugin's source has to do with cells


def test_editing_a_plugin_makes_the_cells_new_that_use_it(command: Command, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    file = tmp_path / "mine.py"
    file.write_text(FUSION)
    arguments = ("--plugin", "mine.py", "--arm", "mine:model.context_fusion=mine,training.steps=1")
    only = (*arguments, "--only", "mine,bare", "--set", "training.steps=1")

    def to_do() -> set[str]:
        rows = command(*only, "--dry-run").out.splitlines()
        columns = [re.split(r"\s{2,}", row.strip()) for row in rows]
        return {each[0] for each in columns if each[-1].startswith("train, ")}

    assert to_do() == {"mine", "bare"}
    assert command(*only).code == 0
    assert to_do() == set()
    file.write_text(FUSION + "# edited\n")
    assert to_do() == {"mine"}
    assert command(*only).code == 0
    assert len(trained(tmp_path / "results")) == 3
    file.write_text(FUSION)  # as it was: its results are still there
    assert to_do() == set()
