"""The report of a study, made from its result files only, at any time, also while the study runs."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import disk_trouble, write_bytes
from hpdm_core.report.curves import curves_figure
from hpdm_core.report.differences import configuration_differences, pair_lines, parameter_differences
from hpdm_core.report.figures import arms_figure
from hpdm_core.report.frame import StudyResults, load_results, provenance_of, versions_of
from hpdm_core.report.search import pareto_figure, search_tables
from hpdm_core.report.tables import blind_spots, headline, metric_tables
from hpdm_core.report.text import HOLE, Table, to_latex, to_markdown

__all__ = ["load_results", "write_report"]

_WIDTH = 110
_NAMED = 12  # most cells that a sentence names


def write_report(folder: Path) -> str:
    """Write results.{parquet,csv}, table.{md,tex} and, where there is data for them, arms.png, fakes.png and pareto.png
    into ``folder``/report, and return the tables as text.

    ``folder`` is RESULTS_DIR/NAME of a study. Raises InputError when it is not a study's folder, TroubleError when
    nothing can be written there. A missing value is shown as a hole (`HOLE`).
    """
    results = load_results(folder)
    target = folder / "report"
    lead, tables = _lead(results), [*search_tables(folder), *metric_tables(results)]
    text = "\n\n".join(
        [
            lead[0],
            f"# {results.study}",
            *lead[1:],
            *(to_markdown(table) for table in tables),
            *_arms(results),
            *_provenance(results),
        ]
    )
    try:
        with disk_trouble(target):  # reports a full disk with its own message
            _write_files(target, results, text, tables, first=lead[0])
    except OSError as error:
        raise TroubleError(f"{target}: the report cannot be written: {error.strerror or error}") from error
    wrapped = "\n".join(
        line if line.startswith(("|", " ")) else textwrap.fill(line, _WIDTH, break_long_words=False)
        for line in text.splitlines()
    )
    return f"{wrapped}\n\nreport: {target}"


def _write_files(
    target: Path, results: StudyResults, text: str, tables: Sequence[Table], *, first: str
) -> None:
    target.mkdir(exist_ok=True)
    parquet = io.BytesIO()
    results.frame.to_parquet(parquet, index=False)
    write_bytes(target / "results.parquet", parquet.getvalue())
    write_bytes(target / "results.csv", results.frame.to_csv(index=False).encode())
    write_bytes(target / "table.md", (text + "\n").encode())
    latex = [f"% {line}" for line in first.splitlines()]
    latex += ["% needs: \\usepackage{booktabs}", "", *(to_latex(table) for table in tables)]
    write_bytes(target / "table.tex", ("\n".join(latex) + "\n").encode())
    pictures = {
        "arms.png": arms_figure(results),
        "fakes.png": curves_figure(results),
        "pareto.png": pareto_figure(results.folder),
    }
    for name, picture in pictures.items():
        if picture is None:
            (target / name).unlink(missing_ok=True)  # an old figure whose data no longer exist
        else:
            write_bytes(target / name, picture)


def _lead(results: StudyResults) -> list[str]:
    """Return the paragraphs before the tables: missing cells, the headline, and what the distances are blind to."""
    total, missing = len(results.cells), results.missing
    if missing:
        named = ", ".join(f"{cell.arm} seed {cell.seed} ({cell.state})" for cell in missing[:_NAMED])
        more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        first = f"{len(missing)} of {total} cells missing: {named}{more}. Holes are shown as {HOLE}."
    else:
        seeds = ", ".join(map(str, results.seeds))
        first = f"All {total} cells are done: {len(results.arms)} arms, seeds {seeds}."
    if any((cell.train or {}).get("simulated") for cell in results.cells):
        first = f"SIMULATED: every number is made up, nothing was computed. {first}"
    paragraphs = [first]
    mixed = {name: found for name, found in versions_of(results.cells).items() if len(found) > 1}
    if mixed:
        listed = "; ".join(f"{name} {', '.join(sorted(found))}" for name, found in mixed.items())
        paragraphs.append(f"Cells were computed with different versions: {listed}.")
    stale = [cell for cell in results.cells if cell.stale]
    if stale:
        named = ", ".join(f"{cell.arm} seed {cell.seed}" for cell in stale[:_NAMED])
        more = f", and {len(stale) - _NAMED} more" if len(stale) > _NAMED else ""
        changes = "; ".join(dict.fromkeys(change for cell in stale for change in cell.stale))
        paragraphs.append(
            f"{len(stale)} of {total} cells are stale, computed with other versions than the study was last "
            f"planned with ({changes}): {named}{more}."
        )
    lines = headline(results)
    if len(lines) > 1:
        paragraphs.append("\n".join(["```", *lines, "```"]))
    blind = blind_spots(results)
    if blind:
        paragraphs.append("\n".join(blind))
    return paragraphs


def _arms(results: StudyResults) -> list[str]:
    """Return paragraphs on what each arm changes against the baseline, and how every other pair of arms differs."""
    others = [arm for arm in results.arms if arm != results.baseline]
    if not others:
        return []
    paragraphs = [f"## What each arm changes, against {results.baseline}"]
    for arm in others:
        lines = configuration_differences(results, arm) or ["no difference found in the configuration"]
        lines.append(parameter_differences(results, arm) or f"parameters: {HOLE} (no weights to compare)")
        paragraphs.append("\n".join([f"{arm}:", "", *(f"- {line}" for line in lines)]))
    pairs = pair_lines(results)
    if pairs:
        paragraphs.append("## In what the other pairs of arms differ")
        paragraphs.append("\n".join(f"- {line}" for line in pairs))
    return paragraphs


def _provenance(results: StudyResults) -> list[str]:
    """Return paragraphs on the machines and versions that computed the numbers."""
    found = provenance_of(results.cells)
    if not found:
        return []
    lines = [f"- {name}: {'; '.join(values)}" for name, values in found.items()]
    return ["## What these were computed with", "\n".join(lines)]
