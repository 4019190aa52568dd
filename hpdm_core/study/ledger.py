"""The ledger: one Optuna trial per cell, an index for people and dashboards. The store stays the truth.

Trials are asked and told, never optimized; they carry attributes only (cell, arm, seed, state), no
parameters, so that arms can be added later. A cell that is run again after a failure gets a new trial with
``retry_of``. The trial's value is the seconds of work in its stages. The controller is the only writer, under
its lock; the default storage is a journal file beside the study.

Not here: samplers (`GridSampler` and its like raise at the last cell, see `optuna.study.Study.tell`),
heartbeats (the leases of the store are that).
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpdm_core.errors import InputError, TroubleError
from hpdm_core.files import disk_trouble, write_bytes
from hpdm_core.study.storage import without_password

__all__ = ["Ledger", "LedgerCell", "State", "mend_journal"]

State = Literal["waiting", "running", "done", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class LedgerCell:
    """What the ledger knows of a cell: its hash, where it stands in the design."""

    identity: str
    arm: str
    seed: int


class Ledger:
    """The trials of one study in ``storage`` (any Optuna URL), or in ``folder``/journal.log when that is
    None.

    ``notices`` holds a line for each thing that a person should know: damage that was mended.
    """

    def __init__(self, folder: Path, *, study: str, storage: str | None = None) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.notices: list[str] = []
        self._journal = None if storage is not None else folder / "journal.log"
        self._study_name = study
        if self._journal is None:
            self._open(storage)
            return
        notice = mend_journal(self._journal)
        if notice is not None:
            self.notices.append(notice)
        try:
            self._open(None)
            self._trials()
        except OSError as error:
            raise TroubleError(
                f"{self._journal}: {error.strerror or error}; the work done is kept"
            ) from error
        except (
            Exception
        ) as error:  # lines that are JSON and make no sense: Optuna raises what it stumbles upon
            kept = _set_aside(self._journal)
            self.notices.append(_damage(self._journal, f"{type(error).__name__}: {error}", kept))
            self._open(None)

    def _open(self, url: str | None) -> None:
        import optuna
        from optuna.storages import BaseStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if self._journal is not None:
            # Ours alone (the controller's lock): a lock that a killed controller left would cost 30 s.
            self._journal.with_name(self._journal.name + ".lock").unlink(missing_ok=True)
            self._storage: BaseStorage = JournalStorage(JournalFileBackend(str(self._journal)))
        else:
            assert url is not None
            try:
                self._storage = optuna.storages.get_storage(url)
            except Exception as error:
                first = str(error).strip().partition("\n")[0]
                raise InputError(f"storage: '{without_password(url)}' cannot be opened: {first}") from error
        with _as_trouble(self._journal):
            sampler = optuna.samplers.RandomSampler(seed=0)
            try:
                self._study = optuna.load_study(
                    storage=self._storage, study_name=self._study_name, sampler=sampler
                )
            except KeyError:
                self._study = optuna.create_study(
                    storage=self._storage, study_name=self._study_name, sampler=sampler
                )
        self._study_id = self._storage.get_study_id_from_name(self._study_name)

    def sync(self, cells: Sequence[tuple[LedgerCell, State, float]]) -> None:
        """Bring the ledger to what the store says: (cell, state, seconds of work).

        Missing cells are enqueued; records that a killed controller left running are taken over.
        """
        known = self._latest()
        for cell, _, _ in cells:
            trial = known.get(cell.identity)
            if trial is None:
                self._enqueue(cell)
        for cell, state, seconds in cells:
            if state != "waiting":
                self.set(cell, state, seconds=seconds)

    def set(self, cell: LedgerCell, state: State, *, seconds: float = 0.0) -> None:
        """Record that ``cell`` is now in ``state``; a closed record is followed by a new one, a retry."""
        from optuna.trial import TrialState

        with _as_trouble(self._journal):
            trial = self._latest().get(cell.identity)
            closed = {"done": TrialState.COMPLETE, "failed": TrialState.FAIL, "interrupted": TrialState.FAIL}
            if (
                trial is not None
                and trial.state == closed.get(state)
                and trial.user_attrs.get("state") == state
            ):
                return
            if trial is None or trial.state.is_finished():
                trial = self._enqueue(cell, retry_of=None if trial is None else trial.number)
            if trial.state == TrialState.WAITING:
                self._start(trial.number)
            number = trial.number
            # Attributes cannot be set once a trial is told: they go first.
            self._attribute(number, "state", state)
            if state == "done":
                self._study.tell(number, seconds)
            elif state in ("failed", "interrupted"):
                self._study.tell(number, state=TrialState.FAIL)

    def states(self) -> dict[str, State]:
        """Return cell hash -> state of its newest record."""
        return {
            identity: trial.user_attrs.get("state", "waiting") for identity, trial in self._latest().items()
        }

    def records(self) -> list[Mapping[str, Any]]:
        """Return every record's attributes, oldest first, with its Optuna state's name under ``optuna``."""
        return [{**trial.user_attrs, "optuna": trial.state.name} for trial in self._trials()]

    def _trials(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False))

    def _latest(self) -> dict[str, Any]:
        return {
            trial.user_attrs["cell"]: trial for trial in self._trials() if "cell" in trial.user_attrs
        }  # trials come in the order of their numbers: the newest of a cell stays

    def _enqueue(self, cell: LedgerCell, *, retry_of: int | None = None) -> Any:
        attributes: dict[str, Any] = {
            "cell": cell.identity,
            "arm": cell.arm,
            "seed": cell.seed,
            "state": "waiting",
        }
        if retry_of is not None:
            attributes["retry_of"] = retry_of
        with _as_trouble(self._journal):
            self._study.enqueue_trial({}, user_attrs=attributes)
        return self._latest()[cell.identity]

    def _start(self, number: int) -> None:
        """Make the waiting trial ``number`` a running one. Asking hands out the oldest, so others start with
        it.
        """
        from optuna.trial import TrialState

        while any(trial.number == number and trial.state == TrialState.WAITING for trial in self._trials()):
            self._study.ask()

    def _attribute(self, number: int, name: str, value: Any) -> None:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        self._storage.set_trial_user_attr(trial_id, name, value)


def mend_journal(path: Path) -> str | None:
    """Make a journal readable. Return a line for people when it was worse than a torn end.

    A last line without its end, or one that is no JSON, is what a kill or a full disk leaves: it is cut off
    silently. Any other damage sets the file aside as ``journal.log.damaged-<n>``, for the ledger to be
    rebuilt from the store.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TroubleError(f"{path}: cannot be read: {error.strerror}; the work done is kept") from error
    lines = data.splitlines(keepends=True)
    bad = [number for number, line in enumerate(lines, 1) if not _is_record(line)]
    if not bad:
        return None
    if bad == [len(lines)]:
        with _as_trouble(path):
            write_bytes(path, b"".join(lines[:-1]))
        return None
    kept = _set_aside(path)
    return _damage(path, f"line {bad[0]} is not a record", kept)


def _is_record(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("op_code"), int)


def _set_aside(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.replace(kept)
    return kept


def _damage(path: Path, what: str, kept: Path) -> str:
    first = what.partition("\n")[0]
    kept_as = f"the old file is kept as {kept.name}"
    return f"{path}: damaged ({first}); the ledger is rebuilt from the store, {kept_as}"


@contextlib.contextmanager
def _as_trouble(path: Path | None) -> Iterator[None]:
    """A disk or a database that fails, as one line."""
    from optuna.exceptions import StorageInternalError

    try:
        with disk_trouble(path or "storage"):
            yield
    except StorageInternalError as error:
        first = str(error.__cause__ or error).strip().partition("\n")[0]
        raise TroubleError(f"storage: {first}; the work done is kept, give the same command again") from error
