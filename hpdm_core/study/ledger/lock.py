"""The lock that allows one controller per study, and the error when the study's folder vanishes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import disk_trouble, read_json
from hpdm_core.store.lease import STALE_SECONDS, Held, Lease, Process, Watch
from hpdm_core.study.backends.interface import Clock

__all__ = ["LOCK", "folder_trouble", "locked"]

LOCK = "controller.lock"
PATIENCE_SECONDS = STALE_SECONDS + 30
LOOK_SECONDS = 1.0


@contextlib.contextmanager
def folder_trouble(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk, or of a read-only or vanished ``folder``, into a one-line `TroubleError`."""
    try:
        with disk_trouble(folder):
            yield
    except OSError as error:
        if folder.is_dir():
            raise
        raise TroubleError(
            f"{folder}: the study's folder has vanished ({error.strerror}); its workers were ended as far as "
            "they could be found; put the folder back and give the same command again"
        ) from error


@contextlib.contextmanager
def locked(folder: Path, study: str, *, clock: Clock, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lock of the study in ``folder``. Raises `TroubleError` naming the controller that has it.

    Whether a holder on this host is alive can be asked directly. A holder on another host is watched: it is alive if
    its counter moves, and is replaced once the counter has not moved for `STALE_SECONDS`.
    """
    lease = Lease(folder / LOCK)
    watch = Watch(clock.monotonic)
    begin = clock.monotonic()
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lease)
                break
            except Held as held:
                waited = clock.monotonic() - begin
                lock = read_json(lease.path) or {}
                moved = watch.silent("lock", (lock.get("token"), lock.get("beat"))) == 0.0 and waited > 0.0
                if (held.holder is not None and held.holder.alive()) or moved or waited > PATIENCE_SECONDS:
                    raise TroubleError(_refusal(folder, study, held.holder)) from None
                if waited == 0.0:
                    who = held.holder or "another process"
                    say(
                        f"study '{study}' is locked by {who}: checking if it is alive (up to {STALE_SECONDS:.0f} s)"
                    )
                clock.sleep(LOOK_SECONDS)
        yield lease


def _refusal(folder: Path, study: str, holder: Process | None) -> str:
    return (
        f"study '{study}' in {folder} is being run by {holder or 'another process'}; only one controller may run a "
        "study: end that one, or wait for it"
    )
