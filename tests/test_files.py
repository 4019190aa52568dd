"""Files that are whole or absent, whatever ends the process or the disk."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_core.base import files
from hpdm_core.base.errors import TroubleError


def failing(number: int, *, call: int = 0):
    """Return an ``os.fsync`` that fails with ``number`` at its ``call``-th call."""
    calls = iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))

    return fsync


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(TroubleError, match="No space left"), files.disk_trouble(path):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.whole_or_absent(tmp_path / "a") as handle:
        handle.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_durable_write_waits_for_the_file_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    files.write_bytes(tmp_path / "a", b"1", durable=False)
    assert synced == []
    files.write_bytes(tmp_path / "a", b"2")
    file, folder = synced
    assert Path(file).parent == tmp_path and file.endswith(".tmp") and folder == str(tmp_path)


def test_a_folder_that_refuses_to_be_synced_is_no_trouble_but_a_full_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, call=1))
    files.write_bytes(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, call=1))
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"


KILLED = """
import os, signal, sys
from pathlib import Path
from hpdm_core.base.files import write_bytes
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_bytes(Path(sys.argv[1]), b"new")
"""


def test_kill_nine_leaves_the_old_file_and_a_half_that_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    (tmp_path / ".other").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 3
    files.clear_temporaries(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other", "a.safetensors"]


@pytest.mark.parametrize("number", sorted(files.DISK_ERRNOS))
def test_a_full_or_failing_disk_is_one_line(number: int) -> None:
    said = r"^file: could not be written: .*free some space"
    with pytest.raises(TroubleError, match=said) as caught, files.disk_trouble("file"):
        raise OSError(number, os.strerror(number))
    assert len(caught.value.messages) == 1 and "\n" not in str(caught.value)
    assert files.of_the_disk(caught.value)


def test_a_mistake_of_ours_is_trouble_only_where_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a"
    with pytest.raises(FileNotFoundError), files.disk_trouble(path):
        files.write_bytes(path, b"")
    said = "nowhere/a: could not be written: No such file"
    with pytest.raises(TroubleError, match=said) as caught, files.trouble_when_unwritable(path):
        files.write_bytes(path, b"")
    assert not files.of_the_disk(caught.value)
