"""optuna-dashboard opens a study's storage: through its own application, without a browser."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.study.ledger.ledger import Ledger, LedgerCell
from hpdm_core.study.search.arm import ArmSearch


def ask(app: Any, path: str) -> Any:
    """Ask the dashboard's application for ``path``, as its page does."""
    said: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    body = b"".join(app(environ, lambda status, headers, *more: said.append(status)))
    assert said == ["200 OK"], (said, body)
    return json.loads(body)


@pytest.mark.filterwarnings("default")
def test_cells_and_proposals_are_shown(opened: Any, storage: str | None, tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    from hpdm_core.config.search import SearchKeys
    from hpdm_core.study.ledger.storage import open_storage

    ledger: Ledger = opened()
    ledger.sync([(LedgerCell(identity="aaaa", arm="default", seed=0), "done", 3.0)])
    ledger.set(LedgerCell(identity="bbbb", arm="none", seed=1), "failed", cause="diverged")
    search = SearchKeys.model_validate(
        {
            "space": {"training.learning_rate": {"float": [1e-4, 1e-2], "log": True}},
            "sampler": "random",
            "proposals": 2,
            "objective": {"metric": "held_out_loss"},
        }
    )
    arm = ArmSearch(search, arm="default", name="tiny/default 0", steps=10, storage=ledger.storage)
    value = arm.propose().values["training.learning_rate"]
    arm.tell(0, "done", [0.5])
    ledger.close()

    reader = open_storage(storage, tmp_path)
    app = dashboard.wsgi(reader.optuna)
    studies = {each["study_name"]: each["study_id"] for each in ask(app, "/api/studies")["study_summaries"]}
    assert set(studies) == {"tiny", "tiny/default 0"}
    cells = ask(app, f"/api/studies/{studies['tiny']}")["trials"]
    assert [trial["state"] for trial in cells] == ["Complete", "Fail"]
    assert {each["key"]: each["value"] for each in cells[1]["user_attrs"]}["cause"] == "diverged"
    (proposal,) = ask(app, f"/api/studies/{studies['tiny/default 0']}")["trials"]
    assert proposal["values"] == [0.5]
    assert float(proposal["params"][0]["param_external_value"]) == value
    reader.close()
