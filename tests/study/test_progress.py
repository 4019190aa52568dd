import io

from rich.console import Console

from hpdm_core.study.controller.display import (
    LiveDisplay,
    PlainDisplay,
    Row,
    make_display,
    seconds_left,
    span,
)

TRAINING = {
    "stage": "train",
    "step": 30,
    "steps": 50,
    "loss": [0.5, None],
    "first": 10,
    "first_time": 100.0,
    "time": 140.0,
}


def plain(clock: list[float]) -> tuple[PlainDisplay, io.StringIO]:
    text = io.StringIO()
    return PlainDisplay(Console(file=text, width=40), clock=lambda: clock[0]), text


def test_time_left_is_at_the_pace_of_this_attempt() -> None:
    assert seconds_left(TRAINING) == 40.0  # 20 steps in 40 s, 20 to go
    assert seconds_left({**TRAINING, "step": 10}) is None
    assert seconds_left({"stage": "train"}) is None and seconds_left(None) is None


def test_spans_are_said_as_people_do() -> None:
    assert [span(value) for value in (None, 45.2, 61, 12000)] == ["", "45 s", "1 min", "3 h 20 min"]


def test_plain_lines_come_at_changes_only() -> None:
    display, text = plain([0.0])
    rows = [Row(name="a", state="running", progress={"stage": "train", "step": 1, "steps": 9})]
    display.update([Row(name="a", state="planned")], "0 of 1 cells done")
    display.update(rows, "0 of 1 cells done")
    display.update([Row(name="a", state="running", progress={"stage": "train", "step": 2, "steps": 9})], "s")
    display.update([Row(name="a", state="failed", reason="no data")], "s")
    assert text.getvalue().splitlines() == ["0 of 1 cells done", "a: train", "a: failed: no data"]


def test_plain_lines_come_every_half_minute() -> None:
    clock = [0.0]
    display, text = plain(clock)
    rows = [Row(name="a", state="running", progress=TRAINING)]
    display.update(rows, "none done")
    clock[0] = 29.0
    display.update(rows, "none done")
    assert text.getvalue().splitlines() == ["a: train", "none done"]
    clock[0] = 31.0
    display.update(rows, "none done")
    assert text.getvalue().splitlines()[2:] == ["a: train, 30/50, loss 0.5 -, 40 s left", "none done"]


def test_lines_are_not_broken_or_coloured() -> None:
    display, text = plain([0.0])
    line = "failed: a [bold] " + "x" * 100
    display.line(line)
    assert text.getvalue() == line + "\n"


def test_the_last_word_is_the_summary() -> None:
    display, text = plain([0.0])
    display.update([Row(name="a", state="planned")], "0 of 1 cells done")
    display.update([Row(name="a", state="done")], "1 of 1 cells done")
    display.close()
    assert text.getvalue().splitlines()[-1] == "1 of 1 cells done"


def test_a_terminal_gets_a_table() -> None:
    text = io.StringIO()
    display = make_display(Console(file=text, width=100, height=20, force_terminal=True))
    assert isinstance(display, LiveDisplay)
    display.update([Row(name="a, seed 0", state="running", progress=TRAINING)], "0 of 1 cells done")
    display.close()
    for shown in ("a, seed 0", "running", "train", "30/50", "0.5", "40 s", "0 of 1 cells done"):
        assert shown in text.getvalue()


def test_a_table_that_does_not_fit_shows_what_matters() -> None:
    text = io.StringIO()
    display = LiveDisplay(Console(file=text, width=100, height=12, force_terminal=True))
    rows = [Row(name=f"done {number}", state="done") for number in range(50)]
    display.update([*rows, Row(name="the running one", state="running")], "50 of 51")
    display.close()
    assert "the running one" in text.getvalue() and "and 45 more cells" in text.getvalue()


def test_other_than_a_terminal_gets_lines() -> None:
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay)
