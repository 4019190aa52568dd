"""One controller per study, and a folder that stays where it is."""

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
    """Turn what a full disk, a read-only or a vanished ``folder`` raises into a `TroubleError` of one line."""
    try:
        with disk_trouble(folder):
            yield
    except OSError as error:
        if folder.is_dir():
            raise
        raise TroubleError(
            f"{folder}: the study's folder has vanished ({error.strerror}); its workers were ended as far as "
            "they could be found: put the folder back, and give the same command again"
        ) from error


@contextlib.contextmanager
def locked(folder: Path, study: str, *, clock: Clock, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lock of the study in ``folder``. Raises `TroubleError` naming the controller that has it.

    One on this host is known to live or not. One elsewhere is watched: it lives when its counter moves, and is
    replaced when that has stood still for long enough.
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
                        f"study '{study}' is locked by {who}: looking whether that lives (up to {STALE_SECONDS:.0f} s)"
                    )
                clock.sleep(LOOK_SECONDS)
        yield lease


def _refusal(folder: Path, study: str, holder: Process | None) -> str:
    return (
        f"study '{study}' in {folder} is being run by {holder or 'another process'}; one at a time: end that "
        "one, or wait for it"
    )
