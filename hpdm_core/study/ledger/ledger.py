"""The ledger: one Optuna trial per cell, as an index for people and dashboards. The store decides what is done.

Trials carry attributes only (cell, arm, seed, state) and no parameters, so that arms can be added later. The trials
of a search are in Optuna studies of their own (`hpdm_core.study.search.search`). A cell that is run again after a
failure gets a new trial with ``retry_of``. The trial's value is the seconds of work in its stages. The controller is
the only writer, under its lock, and keeps the records in memory, so a change costs the same with ten cells as with
ten thousand. Within `Ledger.batch` changes are written together.

The ledger uses neither Optuna's ask and tell, which read all trials at each call, nor its heartbeats: the store's
leases take their place.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import write_bytes
from hpdm_core.study.ledger.storage import JOURNAL, Storage, open_storage, storage_trouble

__all__ = ["Ledger", "LedgerCell", "State", "mend_journal"]

State = Literal["planned", "waiting", "queued", "running", "interrupted", "done", "failed", "cancelled"]

CHUNK = 500
"""How many cells are written together when a command begins; a kill in between loses at most so many."""

TRIAL_STATES: Mapping[State, str] = {
    "planned": "WAITING",
    "waiting": "WAITING",
    "queued": "WAITING",
    "running": "RUNNING",
    "done": "COMPLETE",
    "failed": "FAIL",
    "interrupted": "FAIL",
    "cancelled": "FAIL",
}
"""A cell's state -> the name of its trial's state."""
PLAIN_STATES: Mapping[str, State] = {
    "WAITING": "planned",
    "RUNNING": "running",
    "COMPLETE": "done",
    "FAIL": "failed",
    "PRUNED": "cancelled",
}
"""Name of a trial's state -> the cell's state, unless the trial's attribute ``state`` says more."""


@dataclass(frozen=True, kw_only=True)
class LedgerCell:
    """A cell in the ledger: its hash, its arm and its seed."""

    identity: str
    arm: str
    seed: int


@dataclass
class _Record:
    """The newest trial of a cell."""

    trial_id: int
    optuna: str
    state: State
    cause: str | None

    @property
    def closed(self) -> bool:
        return self.optuna not in ("WAITING", "RUNNING")


class Ledger:
    """The trials of one study in ``storage`` (any Optuna URL), or in ``folder``/journal.log when that is None.

    ``notices`` holds a line for the user about each damaged journal that was repaired. Raises InputError when the
    storage cannot be opened, TroubleError when it fails later.
    """

    def __init__(self, folder: Path, *, study: str, storage: str | None = None) -> None:
        self.notices: list[str] = []
        self._study_name = study
        if storage is not None:
            self.storage = open_storage(storage, folder)
            self._load()
            return
        journal = folder / JOURNAL
        notice = mend_journal(journal)
        if notice is not None:
            self.notices.append(notice)
        try:
            self.storage = open_storage(None, folder)
            self._load()
        except OSError as error:
            raise TroubleError(f"{journal}: {error.strerror or error}; the work done is kept") from error
        except (
            Exception
        ) as error:  # lines that are JSON but no valid records: Optuna raises many kinds of error
            kept = _set_aside(journal)
            self.notices.append(_damage(journal, f"{type(error).__name__}: {error}", kept))
            self.storage = open_storage(None, folder)
            self._load()

    storage: Storage
    """The open storage, which a search uses too: it keeps its proposals there."""

    def _load(self) -> None:
        optuna = self.storage.optuna
        with storage_trouble(self.storage.journal):
            try:
                self._study_id = optuna.get_study_id_from_name(self._study_name)
            except KeyError:
                from optuna.study import StudyDirection

                self._study_id = optuna.create_new_study([StudyDirection.MINIMIZE], self._study_name)
            self._records: dict[str, _Record] = {}
            for trial in self._trials():  # in the order of their numbers: a cell's newest trial is kept
                if "cell" in trial.user_attrs:
                    name, attributes = trial.state.name, trial.user_attrs
                    self._records[attributes["cell"]] = _Record(
                        trial._trial_id, name, _label(name, attributes), attributes.get("cause")
                    )

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Write the changes made in the block together, at its end."""
        with storage_trouble(self.storage.journal), self.storage.batch():
            yield

    def sync(self, cells: Sequence[tuple[LedgerCell, State, float]]) -> None:
        """Update the ledger from the store: ``cells`` are (cell, state, seconds of work).

        Missing cells get records in this order. Records that a killed controller left as running are kept and
        updated.
        """
        for start in range(0, len(cells), CHUNK):
            with self.batch():
                for cell, state, seconds in cells[start : start + CHUNK]:
                    known = self._records.get(cell.identity)
                    if known is None:
                        self._create(cell, state, seconds)
                    elif TRIAL_STATES[state] != "WAITING":
                        self.set(cell, state, seconds=seconds)

    def set(self, cell: LedgerCell, state: State, *, seconds: float = 0.0, cause: str | None = None) -> None:
        """Record that ``cell`` is now in ``state``, because of ``cause``.

        If the cell's record is closed, a new one is written with ``retry_of``. ``seconds`` of work are recorded only
        for the state done.
        """
        with self.batch():
            target = TRIAL_STATES[state]
            if cause == "pruned":
                target = "PRUNED"
            record = self._records.get(cell.identity)
            if (
                record is not None
                and (record.state, record.cause) == (state, cause)
                and record.optuna == target
            ):
                return
            if record is None or record.closed:
                record = self._create(cell, "planned", 0.0, retry_of=record)
            # Optuna forbids setting attributes of a finished trial: they go first.
            if PLAIN_STATES[target] != state:
                self._attribute(record, "state", state)
            if cause is not None:
                self._attribute(record, "cause", cause)
            if record.optuna == "WAITING" and target != "WAITING":
                self._tell(record, "RUNNING")
            if target not in ("WAITING", "RUNNING"):
                self._tell(record, target, [seconds] if target == "COMPLETE" else None)
            record.state, record.cause = state, cause

    def states(self) -> dict[str, State]:
        """Return cell hash -> state of its newest record."""
        return {identity: record.state for identity, record in self._records.items()}

    def records(self) -> list[Mapping[str, Any]]:
        """Return each record's attributes and state, oldest first; ``optuna`` is the name of its Optuna state."""
        return [
            {
                **trial.user_attrs,
                "state": _label(trial.state.name, trial.user_attrs),
                "optuna": trial.state.name,
            }
            for trial in self._trials()
        ]

    def close(self) -> None:
        """Close the storage."""
        self.storage.close()

    def _trials(self) -> list[Any]:
        return self.storage.optuna.get_all_trials(self._study_id, deepcopy=False)

    def _create(
        self, cell: LedgerCell, state: State, seconds: float, *, retry_of: _Record | None = None
    ) -> _Record:
        """Write a new record in one operation, also one that is done already."""
        from optuna.trial import TrialState, create_trial

        target = TRIAL_STATES[state]
        if target == "RUNNING":  # a running worker whose ledger was lost
            target, state = "WAITING", "planned"
        attributes: dict[str, Any] = {"cell": cell.identity, "arm": cell.arm, "seed": cell.seed}
        if PLAIN_STATES[target] != state:
            attributes["state"] = state
        if retry_of is not None:
            attributes["retry_of"] = self.storage.optuna.get_trial(retry_of.trial_id).number
        template = create_trial(
            state=TrialState[target],
            value=seconds if target == "COMPLETE" else None,
            user_attrs=attributes,
        )
        if target == "WAITING":
            template.datetime_start = None
        with storage_trouble(self.storage.journal):
            trial_id = self.storage.optuna.create_new_trial(self._study_id, template_trial=template)
        record = _Record(trial_id, target, state, None)
        self._records[cell.identity] = record
        return record

    def _attribute(self, record: _Record, name: str, value: Any) -> None:
        with storage_trouble(self.storage.journal):
            self.storage.optuna.set_trial_user_attr(record.trial_id, name, value)

    def _tell(self, record: _Record, target: str, values: Sequence[float] | None = None) -> None:
        from optuna.trial import TrialState

        with storage_trouble(self.storage.journal):
            self.storage.optuna.set_trial_state_values(record.trial_id, TrialState[target], values)
        record.optuna = target


def _label(optuna: str, attributes: Mapping[str, Any]) -> State:
    """Return the state of the cell whose trial is in state ``optuna``.

    The trial's attribute ``state`` counts only when it agrees with ``optuna``: they are written one after the other,
    and a kill may come in between.
    """
    said: Any = attributes.get("state")
    agrees = said in TRIAL_STATES and (
        TRIAL_STATES[said] == optuna or (optuna, said) == ("PRUNED", "cancelled")
    )
    state: State = said if agrees else PLAIN_STATES[optuna]
    return state


def mend_journal(path: Path) -> str | None:
    """Make a journal readable. Return a line for the user if more than its last line was damaged.

    A last line that is incomplete or not JSON is what a kill or a full disk leaves: it is cut off silently. With any
    other damage the file is renamed to ``journal.log.damaged-<n>``, and the ledger is rebuilt from the store.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TroubleError(f"{path}: cannot be read: {error.strerror}; the work done is kept") from error
    lines = data.splitlines(keepends=True)
    # Parse only the last line, which may be torn; the others are parsed when Optuna reads them.
    bad = [number for number, line in enumerate(lines[:-1], 1) if not _RECORD.fullmatch(line)]
    bad += [len(lines)] if lines and not _is_record(lines[-1]) else []
    if not bad:
        return None
    if bad == [len(lines)]:
        with storage_trouble(path):
            write_bytes(path, b"".join(lines[:-1]))
        return None
    kept = _set_aside(path)
    return _damage(path, f"line {bad[0]} is not a record", kept)


_RECORD = re.compile(rb'\{"op_code": ?\d.*\}\n')


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
