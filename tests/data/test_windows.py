import pytest

from hpdm_core.data.windows import Windows, shots, span, split_end, split_inside, spread


def test_span_counts_first_to_last():
    assert span(16) == 16
    assert span(4, 3) == 10
    assert span(1, 5) == 1


def test_shots_end_with_the_frame_before_a_cut():
    assert shots(range(0, 10), [3, 7]) == [range(0, 4), range(4, 8), range(8, 10)]
    assert shots(range(5, 10), [3, 9]) == [range(5, 10)]
    assert shots(range(0), [3]) == []


@pytest.mark.parametrize(
    ("frames", "train", "held_out"),
    [
        (132, range(0, 89), range(105, 132)),
        (250, range(0, 184), range(200, 250)),
        (30, range(0, 8), range(24, 30)),
    ],
)
def test_the_last_fifth_is_held_out_behind_a_gap(frames, train, held_out):
    assert split_end(frames, held_out=0.2, gap=16) == {"train": train, "held_out": held_out}


def test_shares_are_not_rounded_up_by_floating_point():
    assert split_end(100, held_out=0.07, gap=0)["held_out"] == range(93, 100)


def test_windows_never_straddle_a_shot():
    windows = Windows([range(0, 5), range(5, 7), range(7, 10)], 3)
    assert [windows[index] for index in range(len(windows))] == [0, 1, 2, 7]
    assert windows.longest == 5
    with pytest.raises(IndexError):
        windows[4]


def test_spread_is_even_and_distinct():
    assert spread(3, 9) == [1, 4, 7]
    assert spread(4, 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="cannot spread"):
        spread(5, 4)


def test_the_middle_of_a_shot_is_held_out_and_seen_from_both_sides():
    made = split_inside(range(100, 150), held_out=0.2, span=8)
    assert made == {"train": [range(100, 120), range(130, 150)], "held_out": [range(120, 130)]}
    # A window at least, where a fifth is less.
    made = split_inside(range(0, 30), held_out=0.2, span=8)
    assert made == {"train": [range(0, 11), range(19, 30)], "held_out": [range(11, 19)]}


def test_a_shot_without_room_for_three_windows_trains_as_a_whole():
    assert split_inside(range(5, 28), held_out=0.2, span=8) == {"train": [range(5, 28)], "held_out": []}
    assert split_inside(range(5, 29), held_out=0.2, span=8)["held_out"] == [range(13, 21)]
