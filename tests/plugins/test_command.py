import pytest

from hpdm_core.__main__ import main as hpdm
from hpdm_core.plugins import __main__ as command

FUSION = """
class Halved(ContextFusion):
    def __init__(self, shape: FusionShape, *, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = gain

    def fuse(self, block, level, tokens, context, coords, sigma):
        return tokens * self.gain

@hookimpl
def register_context_fusions(register):
    register("halved", Halved, source="this test")
"""
HEAD = "from hpdm_core import ContextFusion, FusionShape, hookimpl\n"


@pytest.fixture
def file(plugin_file) -> str:
    return plugin_file(FUSION, head=HEAD)


def test_list(capsys, file) -> None:
    assert command.main(["list", "--plugin", file]) == 0
    lines = dict(line.split("\t", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["mine"].startswith("sha256:") and "context_fusions/halved" in lines["mine"]
    assert "context_fusions/deep" in lines["hpdm_plugins.model.fusions"]


def test_list_names_what_is_skipped(capsys, install) -> None:
    install("broken_listed", "1 / 0")
    assert command.main(["list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken_listed")]
    assert "skipped" in line and "ZeroDivisionError" in line


def test_list_in_a_terminal(capsys, monkeypatch, file) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    assert command.main(["list", "--plugin", file]) == 0
    assert "─" in capsys.readouterr().out


def test_why(capsys, file) -> None:
    assert command.main(["why", "context_fusions/halved", "--plugin", file]) == 0
    text = capsys.readouterr().out
    for words in ("mine", file, "this test", "model.context_fusion", "gain  float, default 0.5"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["why", "context_fusions/haved"], "did you mean 'halved'?"),
        (["why", "halved"], "should be FAMILY/KEY - did you mean 'context_fusions/halved'?"),
        (["why", "context_fusion/halved"], "'context_fusion' - did you mean 'context_fusions'?"),
        (["check", "haved"], "no part and no plugin is called 'haved' - did you mean 'halved'?"),
        (["check", "halved", "--option", "gain"], "should be KEY=VALUE"),
        (["check", "halved", "--option", "gian=1"], "--option gian: unknown key - did you mean 'gain'?"),
        (["check", "halved", "--option", "gain=x"], "--option gain: should be a valid number, got 'x'"),
    ],
)
def test_wrong_input(capsys, file, arguments, words: str) -> None:
    assert command.main([*arguments, "--plugin", file]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_a_file_that_does_not_import(capsys, plugin_file) -> None:
    assert command.main(["check", "halved", "--plugin", plugin_file("1 / 0", head="")]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["halved", "context_fusions/halved", "mine"])
def test_check_runs_the_conformance_of_every_part(capsys, monkeypatch, file, name: str) -> None:
    import hpdm_core.testing

    asked = []

    def run(plugins, family, key, options):
        asked.append((family, key, dict(options)))
        return [("shapes", None), ("copies", "not equal")]

    monkeypatch.setattr(hpdm_core.testing, "run_conformance", run)
    assert command.main(["check", name, "--plugin", file, "--option", "gain=2"]) == 1
    assert asked == [("context_fusions", "halved", {"gain": 2})]
    text = capsys.readouterr().out
    assert "ok      shapes" in text and "FAILED  copies: not equal" in text and "1 failed" in text


def test_check_of_a_skipped_plugin_fails(capsys, install) -> None:
    install("broken_checked", "1 / 0")
    assert command.main(["check", "broken_checked"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_fusion_from_a_file_passes(capsys, file) -> None:
    assert command.main(["check", "halved", "--plugin", file]) == 0, capsys.readouterr().out
    assert "all checks passed" in capsys.readouterr().out


def test_hpdm_delegates(capsys) -> None:
    assert hpdm(["plugins", "why", "objectives/snap_v"]) == 0
    assert "hpdm_plugins.diffusion.objectives" in capsys.readouterr().out


def test_hpdm_alone_says_how_it_is_used(capsys) -> None:
    assert hpdm([]) == 0
    assert "usage: hpdm COMMAND" in capsys.readouterr().out


def test_hpdm_with_an_unknown_command(capsys) -> None:
    assert hpdm(["plugin"]) == 2
    assert "did you mean 'plugins'?" in capsys.readouterr().err
