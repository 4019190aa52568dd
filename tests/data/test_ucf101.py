"""UCF-101's official layout, in small: lists, labels, folds, and lines that are wrong."""

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import ClipShape
from hpdm_plugins.data.ucf101 import ucf101

SHAPE = ClipShape(4, 12, 16)
CLASSES = ("ApplyEyeMakeup", "YoYo")


@pytest.fixture
def root(tmp_path, frames, write):
    """Two classes, three groups each; fold n tests on group n."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\r\n" for i, name in enumerate(CLASSES, start=1)))
    names = {}
    for label, name in enumerate(CLASSES):
        for group in (1, 2, 3):
            file = f"{name}/v_{name}_g{group:02d}_c01.avi"
            names[file] = (label + 1, group)
            write(
                tmp_path / "UCF-101" / file,
                frames(8, 24, 32, seed=10 * label + group),
                codec="mpeg4",
                pix_fmt="yuv420p",
            )
    for fold in (1, 2, 3):
        train = [f"{file} {label}\n" for file, (label, group) in names.items() if group != fold]
        (lists / f"trainlist{fold:02d}.txt").write_text("".join(train))
        (lists / f"testlist{fold:02d}.txt").write_text(
            "".join(f"{file}\n" for file, (_, group) in names.items() if group == fold)
        )
    return tmp_path


@pytest.mark.parametrize("fold", [1, 3])
def test_the_lists_make_the_splits(root, pyav, fold):
    dataset = ucf101(SHAPE, pyav, root=root, fold=fold)
    assert dataset.classes == CLASSES
    described = dataset.describe()
    assert described["splits"] == {
        "train": {"clips": 4, "windows": 20},
        "held_out": {"clips": 2, "windows": 10},
    }
    assert set(described["files"]["held_out"]) == {f"{name}/v_{name}_g{fold:02d}_c01.avi" for name in CLASSES}
    clip = dataset.draw("held_out", generator("test"))
    assert clip.video.shape == (3, 4, 12, 16)
    assert {dataset.draw("train", generator("test", index)).label for index in range(12)} == {0, 1}


def test_labels_can_be_hidden(root, pyav):
    dataset = ucf101(SHAPE, pyav, root=root, labels=False)
    assert dataset.classes == ()
    assert dataset.draw("train", generator("test")).label == -1


def test_listed_files_that_are_missing_or_short_are_skipped(root, pyav, write, frames):
    (root / "UCF-101" / "YoYo" / "v_YoYo_g02_c01.avi").unlink()
    write(
        root / "UCF-101" / "YoYo" / "v_YoYo_g03_c01.avi", frames(3, 24, 32), codec="mpeg4", pix_fmt="yuv420p"
    )
    dataset = ucf101(SHAPE, pyav, root=root)
    assert dataset.describe()["splits"]["train"]["clips"] == 2
    assert dataset.describe()["skipped"] == [
        {"file": "YoYo/v_YoYo_g02_c01.avi", "reason": "No such file or directory"},
        {"file": "YoYo/v_YoYo_g03_c01.avi", "reason": "has 3 frames; a window reaches over 4"},
    ]


def test_clips_longer_than_every_file(root, pyav):
    with pytest.raises(
        InputError,
        match=r"no file of .*trainlist01.txt can be used for clips of 9 frames, 1 apart: "
        r"ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.avi: has 8 frames; a window reaches over 9; ",
    ):
        ucf101(ClipShape(9, 12, 16), pyav, root=root)


def test_another_layout_is_refused(tmp_path, pyav):
    with pytest.raises(InputError, match="has no folder 'UCF-101'; the official layout is"):
        ucf101(SHAPE, pyav, root=tmp_path)
    with pytest.raises(InputError, match=r"'.*nowhere' does not exist"):
        ucf101(SHAPE, pyav, root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "classInd.txt",
            "1 ApplyEyeMakeup\n3 YoYo\n",
            r"classInd.txt:2: '3 YoYo' was read; expected is '2 CLASSNAME'",
        ),
        (
            "trainlist01.txt",
            "\nNoClass/v.avi 1\n",
            r"trainlist01.txt:2: 'NoClass/v.avi 1' was read; expected is",
        ),
        ("testlist01.txt", "YoYo\n", r"testlist01.txt:1: 'YoYo' was read; expected is 'CLASS/FILE.avi'"),
        ("trainlist01.txt", "YoYo/v.avi 1\n", r"trainlist01.txt:1: .* classInd.txt gives YoYo the number 2"),
    ],
)
def test_wrong_lines_are_named(root, pyav, file, text, message):
    (root / "ucfTrainTestlist" / file).write_text(text)
    with pytest.raises(InputError, match=message):
        ucf101(SHAPE, pyav, root=root)


def test_a_missing_list_is_named(root, pyav):
    (root / "ucfTrainTestlist" / "testlist02.txt").unlink()
    with pytest.raises(InputError, match=r"testlist02.txt cannot be read: .*No such file"):
        ucf101(SHAPE, pyav, root=root, fold=2)
