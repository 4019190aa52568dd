"""What a study file may say, and every way in which it may be wrong: one line each, with its place."""

from pathlib import Path

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.study.plan.study_file import load_study

FUSION = """
from hpdm_core import ContextFusion, hookimpl

class Mine(ContextFusion):
    def __init__(self, shape, *, gain: float = 1.0):
        super().__init__()

@hookimpl
def register_context_fusions(register):
    register("mine", Mine, source="me")
"""


def lines_of(file: str, **options) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_study(file, **options)
    messages = list(caught.value.messages)
    assert not any("\n" in message for message in messages)
    return messages


def test_arms_in_order_with_the_baseline(study) -> None:
    file = study(
        """
name: my_study
arms:
  full: {model.computation_allocation: full}
  linear:
  nested: {model: {context_fusion: {use: none}}, training.steps: 20}
baseline: linear
seeds: [3, 1]
backend: {use: local, slots: 2}
"""
    )
    made = load_study(file)
    assert (made.name, made.baseline, made.seeds) == ("my_study", "linear", (3, 1))
    assert made.arms == {
        "full": {"model.computation_allocation": "full"},
        "linear": {},
        "nested": {"model": {"context_fusion": {"use": "none"}}, "training.steps": 20},
    }
    assert made.configs["nested"].model.context_fusion.use == "none"
    assert made.configs["nested"].training.steps == 20
    assert (made.backend.use, made.backend.options) == ("local", {"slots": 2})
    assert made.selected == ("full", "linear", "nested")


def test_without_arms_there_is_one_and_the_name_is_the_files(study) -> None:
    made = load_study(study(""))
    assert (made.name, list(made.arms), made.baseline, made.seeds) == ("study", ["default"], "default", (0,))


def test_a_study_does_not_take_the_name_of_what_it_extends(folder, study) -> None:
    (folder / "base.yaml").write_text("name: basis\n" + (folder / "base.yaml").read_text())
    assert load_study(study("")).name == "study"


def test_precedence(folder, study) -> None:
    file = study(
        "training: {steps: 20, batch: 20}\narms: {a: {training.batch: 40}, b: {training.batch: 50}}\n"
    )
    made = load_study(file, sets=["training.batch=30", "training.warmup=3"])
    training = made.configs["a"].training
    # base.yaml: steps 10, batch 2, learning rate 1e-3
    assert (training.steps, training.batch, training.warmup, training.learning_rate) == (20, 40, 3, 1e-3)


def test_factors_are_a_grid(study) -> None:
    made = load_study(
        study(
            "factors:\n  training.steps: [1, 2]\n  model.context_fusion: [none, {use: deep, detach: true}]\n"
        )
    )
    assert list(made.arms) == [
        "steps=1+context_fusion=none",
        'steps=1+context_fusion={"detach"_true_"use"_"deep"}',
        "steps=2+context_fusion=none",
        'steps=2+context_fusion={"detach"_true_"use"_"deep"}',
    ]
    assert made.configs["steps=2+context_fusion=none"].training.steps == 2


def test_an_arm_from_the_command_line_with_a_plugin(folder, study) -> None:
    (folder / "mine.py").write_text(FUSION)
    made = load_study(
        study("arms: {a: {}}\n"),
        arms=["b:model.context_fusion={use: mine, gain: 2},training.steps=3"],
        plugins=["mine.py"],
    )
    assert made.configs["b"].model.context_fusion.model_dump() == {"use": "mine", "gain": 2.0}
    assert made.configs["b"].training.steps == 3 and made.baseline == "a"


def test_only_keeps_the_order_of_the_file(study) -> None:
    file = study("arms: {a: {}, b: {training.steps: 1}, c: {training.steps: 2}}\n")
    assert load_study(file, only=["c,a"]).selected == ("a", "c")
    assert load_study(file, only=["c", "b"]).selected == ("b", "c")


def test_a_file_called_store_needs_a_name(folder, study) -> None:
    text = Path(study("")).read_text()
    (folder / "store.yaml").write_text(text)
    assert lines_of("store.yaml") == [
        "store.yaml: name: 'store' is where all studies keep their work; choose another name for the file, or "
        "give one in it"
    ]
    (folder / "store.yaml").write_text(text + "name: mine\n")
    assert load_study("store.yaml").name == "mine"


def test_every_problem_of_a_file_at_once(study) -> None:
    file = study(
        """
modle: {}
training: {step: 5, batch: -1}
model: {context_fusion: dep, blocks: two}
sampling: {solver: {use: edm, steeps: 3}, overlap: [x]}
evaluation: {metrics: [{use: frechet, extractor: random3}]}
seeds: []
backend: slrum
"""
    )
    found = lines_of(file)
    assert [line.partition(" - ")[0].partition("; ")[0].partition(", got")[0] for line in found] == [
        "study.yaml:8: seeds: should have at least 1 items",
        "study.yaml:3: modle: unknown key",
        "study.yaml:5: model.context_fusion.use: unknown part 'dep' of context_fusions",
        "study.yaml:5: model.blocks: should be a valid integer",
        "study.yaml:4: training.batch: should be greater than 0",
        "study.yaml:4: training.step: unknown key",
        "study.yaml:6: sampling.solver.steeps: unknown key",
        "study.yaml:6: sampling.overlap[0]: should be 'f', 'h' or 'w'",
        "study.yaml:7: evaluation.metrics[0].extractor.use: unknown part 'random3' of feature_extractors",
    ]
    for suggestion in ("'deep'", "'steps'", "'model'", "'random3d'"):
        assert any(f"did you mean {suggestion}" in line for line in found), suggestion


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training: {steps: -5}", "study.yaml:2: training.steps: should be greater than 0, got -5"),
        ("training: {steps: ten}", "study.yaml:2: training.steps: should be a valid integer, got 'ten'"),
        ("training: {steps: true}", "study.yaml:2: training.steps: should be a valid integer, got true"),
        ("training: 5", "study.yaml:2: training: should be a mapping of keys to values, got 5"),
        ("training: {clip: .nan}", "study.yaml:2: training.clip: should be "),
        ("model: {video: [4, 8]}", "study.yaml:2: model.video[2]: missing, and it has no default"),
        ("model: {context_fusion: 5}", "study.yaml:2: model.context_fusion: should be NAME or {use: NAME"),
        ("evaluation: {metrics: [5]}", "study.yaml:2: evaluation.metrics[0]: should be NAME or {use: NAME"),
        ("data: {dataset: null}", "study.yaml:2: data.dataset: missing; give one of "),
        ("seeds: [1, 1]", "study.yaml:2: seeds: each seed once, got [1, 1]"),
        ("seeds: [-1]", "study.yaml:2: seeds[0]: should be greater than or equal to 0, got -1"),
        (
            "sampling: {overlap: [h, w, h]}",
            "study.yaml:2: sampling.overlap: should name each axis once, got ['h', 'w', 'h']",
        ),
        ("name: store", "study.yaml:2: name: 'store' is where all studies keep their work; choose another"),
        ("training: {keep: [4, 11]}", "study.yaml:2: training.keep[1]: should be at most training.steps 10"),
        (
            "evaluation: {metrics: [{use: held_out_loss, sigmas: []}]}",
            "study.yaml:2: evaluation.metrics[0].sigmas: should have at least 1 items, got []",
        ),
        ("seeds: 3", "study.yaml:2: seeds: should be a valid array, got 3"),
        (
            "training: {learning_rate: .inf}",
            "study.yaml:2: training.learning_rate: should be a finite number",
        ),
        (
            "storage: nonsense://me@x",
            "study.yaml:2: storage: 'nonsense://...' is no storage that is known here",
        ),
        ("name: a/b", "study.yaml:2: name: letters, digits and ._- only, got 'a/b'"),
        ("backend: slrum", "study.yaml:2: backend.use: unknown backend 'slrum' - did you mean 'slurm'?"),
        ("seed: 3", "study.yaml:2: seed: unknown key - did you mean 'seeds'?"),
        ("baseline: defalt", "study.yaml:2: baseline: no arm 'defalt' - did you mean 'default'?"),
        ("arms: {a b: {}}", "study.yaml:2: arms: 'a b' should begin with a letter or digit and hold no"),
        ("arms: {a: {seeds: [1]}}", "study.yaml:2: seeds: not a key of arm 'a'; an arm may set: model"),
        ("arms: {a: {training.step: 1}}", "study.yaml:2: training.step: unknown key"),
        ("arms: {a: {training..steps: 1}}", "study.yaml:2: 'training..steps' is not a path"),
        (
            "arms: {a: {}}\nfactors: {training.steps: [1]}",
            "study.yaml:3: factors: a study has arms or",
        ),
        (
            "factors: {training.steps: []}",
            "study.yaml:2: factors.training.steps: should have at",
        ),
        (
            "factors: {training.steps: [1, x]}",
            "study.yaml:2: training.steps: should be a valid int",
        ),
        (
            "diffusion: {sigma_max: 0.001}",
            "study.yaml:2: diffusion.sigma_min: should be below",
        ),
    ],
)
def test_wrong_values(study, text: str, line: str) -> None:
    (found,) = lines_of(study(text + "\n"))
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {video: [5, 8, 16]}", ("study.yaml:2: model.video: f = 5 is not a multiple of patch",)),
        ("model: {token: [1, 3, 2]}", ("study.yaml:2: model.patch: h = 4 is not a multiple of token 3",)),
        ("model: {video: [4, 8, 24], levels: 3}", ("study.yaml:2: model.video: ",)),
        (
            "model: {token_dim: 9}",
            ("study.yaml:2: model.backbone.heads: 16 does not divide model.token_dim 9; allowed is",),
        ),
        ("model: {levels: 1}", ("study.yaml:2: model.video: f = 4 is 2 times patch 2; with 1 level(s)",)),
        ("runtime: {device: cudaa}", ("study.yaml:2: runtime.device: should be a device such as cpu",)),
        ("sampling: {solver: {steps: [0]}}", ("study.yaml:2: sampling.solver.steps: [0]; allowed is a",)),
        (
            "model: {computation_allocation: {use: explicit, levels_per_block: [1, 1]}}",
            (
                "study.yaml:2: model.computation_allocation: 'explicit' gives [1, 1]",
                "2 (all levels) in the last",
            ),
        ),
        (
            "diffusion: {noise_scaling: {use: constant, value: -1.0}}",
            ("study.yaml:2: diffusion.noise_scaling", "-1"),
        ),
    ],
)
def test_values_that_do_not_fit_together(study, text: str, words: tuple[str, ...]) -> None:
    found = lines_of(study(text + "\n"))
    assert found[0].startswith(words[0]), found
    for word in words:
        assert any(word in line for line in found), found


def test_an_arm_is_not_blamed_for_sizes_that_it_does_not_set(study) -> None:
    file = study("model:\n  video: [5, 8, 16]\narms:\n  a: {}\n  b: {model.context_fusion: none}\n")
    assert lines_of(file) == ["study.yaml:3: model.video: f = 5 is not a multiple of patch 2"]


@pytest.mark.parametrize("explicit", [True, False])
def test_self_conditioning_needs_a_backbone_with_latents(study, explicit: bool) -> None:
    """The default share was given by nobody: the arm that chose the backbone is to blame."""
    share = "training: {self_conditioning: 0.5}" if explicit else "training: {}"
    arms = "arms:\n  a: {}\n  b:\n    model.backbone: {use: dit, heads: 2}"
    (line,) = lines_of(study(f"{share}\n{arms}\n"))
    assert line == (
        f"study.yaml:6: training.self_conditioning: {0.5 if explicit else 0.9} of the videos would take latents "
        "from a first pass, and model.backbone 'dit' has none; allowed is 0, or a backbone with latents"
    )
    load_study(study(f"{share}\n{arms}\n    training.self_conditioning: 0\n"))


def test_a_misspelt_key_is_one_problem(folder, study) -> None:
    base = folder / "base.yaml"
    base.write_text(base.read_text().replace("steps: 10", "step: 10"))
    assert lines_of(study("")) == [f"{base}:12: training.step: unknown key - did you mean 'steps'?"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"sets": ["training.step=3"]},
            "--set training.step=3: training.step: unknown key",
        ),
        (
            {"sets": ["training.steps=-3"]},
            "--set training.steps=-3: training.steps: should be",
        ),
        ({"sets": ["seeds=[]"]}, "--set seeds=[]: seeds: should have at least 1 items"),
        ({"arms": ["m:model.context_fusion=dep"]}, "--arm m:model.context_fusion=dep: model.cont"),
        (
            {"arms": ["default:training.steps=3"]},
            "--arm default:training.steps=3: the study has",
        ),
        ({"arms": ["m:"]}, "--arm m:: arms 'default' and 'm' have the same configuration"),
        ({"arms": ["m m:training.steps=3"]}, "--arm m m:training.steps=3: 'm m' should begin with"),
        ({"only": ["defualt"]}, "--only defualt: no such arm - did you mean 'default'?"),
        ({"only": [","]}, "--only ,: names no arm; arms: default"),
        ({"plugins": ["nope.py"]}, "plugin '"),
    ],
)
def test_flags_name_themselves(study, options, line: str) -> None:
    (found,) = lines_of(study(""), **options)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "text",
    [
        "arms: {a: {}, b: {training.steps: 10}}",
        "arms: {a: {}, b: {runtime.threads: 1}}",
        "arms: {a: {model.context_fusion: deep}, b: {model.context_fusion: {use: deep, detach: false}}}",
    ],
)
def test_two_arms_with_the_same_configuration(study, text: str) -> None:
    (line,) = lines_of(study(text + "\n"))
    assert line == "study.yaml:2: arms 'a' and 'b' have the same configuration; change or drop one"


def test_a_missing_study(folder) -> None:
    (folder / "study.yaml").write_text("")
    assert lines_of("studi.yaml") == ["studi.yaml: no such file - did you mean 'study.yaml'?"]
    assert lines_of("tiny_clips") == ["tiny_clips: no such file"]  # a preset is no study


def test_a_missing_section(folder) -> None:
    (folder / "x.yaml").write_text("name: x\n")
    assert lines_of("x.yaml") == [
        f"x.yaml: {section}: missing, and it has no default" for section in ("model", "data", "training")
    ]


def test_the_options_of_a_backend_are_checked(study) -> None:
    (line,) = lines_of(study("backend: {use: local, slotz: 2}\n"))
    assert line.startswith("study.yaml:2: backend.slotz: unknown key - did you mean 'slots'?")


def test_options_without_use_are_those_of_the_default_part(study) -> None:
    made = load_study(study("model: {context_fusion: {detach: true}}\n"))
    assert made.configs["default"].model.context_fusion.use == "deep"
    assert made.configs["default"].model.context_fusion.options["detach"] is True


def test_a_part_that_cannot_be_built_is_blamed(folder, study) -> None:
    (folder / "mine.py").write_text(
        "from hpdm_core import hookimpl\n@hookimpl\ndef register_objectives(register):\n"
        "    def broken():\n        raise RuntimeError('no')\n    register('broken', broken, source='me')\n"
    )
    found = lines_of(study("diffusion: {objective: broken}\n"), plugins=["mine.py"])
    assert found == ["study.yaml:2: diffusion.objective: 'broken' cannot be built: RuntimeError: no"]


def test_nothing_is_written(folder, study) -> None:
    file = study("training: {step: 1}\n")
    before = sorted(folder.rglob("*"))
    lines_of(file)
    load_study(study("x: 1\n".replace("x: 1", "")))
    assert sorted(folder.rglob("*")) == before
