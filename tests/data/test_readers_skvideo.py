"""The optional reader. Its adapter is tested with stand-ins for ffmpeg and ffprobe, and with the real ones if
there.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.data.readers import ReadError, VideoReader
from hpdm_plugins.data.readers_skvideo import SkvideoReader, needs_aliases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None, reason="the package scikit-video is not installed"
)

# Frame n of the stand-in's only video, 6 x 4 pixels, has the value n everywhere.
FFMPEG = """#!{python} -S
import sys
if "-version" in sys.argv: print("ffmpeg version 7.1 stand-in"); sys.exit()
frames = int(sys.argv[sys.argv.index("-vframes") + 1]) if "-vframes" in sys.argv else 5
assert "passthrough" in sys.argv
for number in range(min(frames, 5)): sys.stdout.buffer.write(bytes([number]) * 72)
"""
FFPROBE = """#!{python} -S
import sys
if "bad" in sys.argv[-1]: sys.exit(1)
print('<?xml version="1.0"?><ffprobe><streams><stream codec_type="video" width="6" height="4" '
      'pix_fmt="yuv420p" r_frame_rate="25/1" nb_frames="5"/></streams></ffprobe>')
"""


@pytest.fixture
def skvideo_afresh():
    """The package looks for programs when it is imported: import it anew, now and later."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "skvideo"]:
            del sys.modules[name]

    forget()
    yield
    forget()


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, skvideo_afresh):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ffmpeg", FFMPEG), ("ffprobe", FFPROBE)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    (tmp_path / "clip.mp4").write_bytes(b"x")
    (tmp_path / "bad.mp4").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("version", "needed"),
    [("1.1.11", True), ("1.1.12", False), ("1.3.0", False), ("1.1.9.post1", True), ("2.0", False)],
)
def test_only_old_versions_get_aliases(version, needed):
    assert needs_aliases(version) is needed


@pytest.mark.filterwarnings("ignore")
def test_frames_by_number(stand_ins):
    reader = SkvideoReader()
    assert isinstance(reader, VideoReader)
    clip: Path = stand_ins / "clip.mp4"
    info = reader.probe(clip)
    assert (info.frames, info.height, info.width, info.fps) == (5, 4, 6, 25.0)
    read = reader.read(clip, [3, 0, 3])
    assert (read.shape, read.dtype) == ((3, 4, 6, 3), torch.uint8)
    assert read[:, 0, 0, 0].tolist() == [3, 0, 3]
    assert reader.read(clip, [1], short_side=2).shape == (1, 2, 3, 3)
    with pytest.raises(ReadError, match=r"clip\.mp4: has 5 frames; frame number 7 was asked for"):
        reader.read(clip, [7])
    with pytest.raises(ReadError, match=r"bad\.mp4: No way to determine width or height"):
        reader.probe(stand_ins / "bad.mp4")
    with pytest.raises(ReadError, match=r"none\.mp4: No such file or directory$"):
        reader.read(stand_ins / "none.mp4", [0])
    assert reader.describe()["ffmpeg"] == "ffmpeg version 7.1 stand-in"
    assert reader.describe()["scikit-video"]
    assert not hasattr(np, "int"), "the aliases are gone when the reader has finished"


@pytest.mark.parametrize("present", [(), ("ffmpeg",)])
def test_missing_programs_are_named(tmp_path, monkeypatch, present):
    for name in present:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "ffprobe" if present else "ffmpeg"
    with pytest.raises(InputError, match=rf"data.reader 'skvideo': the program '{missing}' is not on PATH"):
        SkvideoReader()


@pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="ffmpeg and ffprobe are not on PATH"
)
@pytest.mark.filterwarnings("ignore")
def test_equals_the_default_reader(tmp_path, frames, write, pyav, skvideo_afresh):
    made = frames(7, 12, 20)
    path = write(tmp_path / "clip.mkv", made)
    assert torch.equal(SkvideoReader().read(path, [1, 4, 6]), made[[1, 4, 6]])
    assert torch.equal(pyav.read(path, [1, 4, 6]), made[[1, 4, 6]])
