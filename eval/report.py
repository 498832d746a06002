"""Results → report.json (documented schema) → report.md and one self-contained report.html.

Everything here works on plain numbers: it loads no model and imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tables import (
    Cell,
    Table,
    cost_table,
    divergence_table,
    perplexity_table,
    protocols,
    task_key,
    task_notes,
    task_table,
    text_key,
)
from marlin_kernel.errors import DataError

if TYPE_CHECKING:
    from eval.perplexity import PerplexityResult

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task or group. value and stderr in the metric's unit (accuracy: 0..1).

    examples: questions asked; fewshot: examples in the prompt; group: the group it is part of;
    note: what is not standard about the run.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    examples: int | None = None
    fewshot: int | None = None
    group: str | None = None
    higher_is_better: bool = True
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One model of the report.

    name: "FP16", "RTN INT4", "GPTQ INT4", ... bytes: size of its weight files; dtype: of weights
    that are not packed, "float32", ...; seconds: what it took to make it (quantization);
    peak_bytes: peak host memory while it was made.
    """

    name: str
    perplexity: Sequence[PerplexityResult] = ()
    tasks: Sequence[TaskResult] = ()
    bytes: int | None = None
    dtype: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    path: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything the report shows.

    model: name of the original. rows: in order of display; `baseline` names the one that deltas
    refer to (default: the first). quantization: the quantizer's quantization_report.json as read,
    or None. settings, environment: flat mappings to display. notes: sentences shown above the
    tables. command: what reproduces it.
    """

    model: str
    rows: Sequence[Row]
    baseline: str | None = None
    title: str = "Quantization report"
    quantization: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    notes: Sequence[str] = ()

    def baseline_row(self) -> Row | None:
        """The row that the others are compared with, or None if there is only one row."""
        if len(self.rows) < 2:
            return None
        return next((row for row in self.rows if row.name == self.baseline), self.rows[0])

    def compared_with(self, row: Row) -> Row | None:
        """The row that `row` is compared with: the baseline, unless it is that itself."""
        baseline = self.baseline_row()
        return None if baseline is row else baseline


def write_report(out_dir: str | os.PathLike[str], report: Report) -> dict[str, Path]:
    """Write report.html, report.md and report.json; returns their paths by "html", "md", "json".

    Each file is written under a temporary name and renamed, so that none is ever half written.
    """
    from eval.page import render_html

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "html": render_html(report),
        "md": render_markdown(report),
        "json": json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    paths = {}
    for kind, text in contents.items():
        path = folder / f"report.{kind}"
        partial = path.with_suffix(f".{kind}.tmp")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
        paths[kind] = path
    return paths


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON-ready data, schema version FORMAT_VERSION (docs/evaluation.md).

    Infinities and NaN become None (JSON has no word for them), a Path its string.
    """
    content = asdict(report)
    baseline = report.baseline_row()
    content["baseline"] = baseline.name if baseline else None
    return _finite({"format_version": FORMAT_VERSION, **content})


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of an earlier report.json. Raises DataError if it is none of this version."""
    from eval.perplexity import PerplexityResult

    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path} has report format {content['format_version']}, this program reads "
                f"{FORMAT_VERSION}; run the evaluation again"
            )
        return [
            Row(
                **{
                    **row,
                    "perplexity": tuple(
                        PerplexityResult(**p | {k: _number(p[k]) for k in ("perplexity", "nll")})
                        for p in row["perplexity"]
                    ),
                    "tasks": tuple(
                        TaskResult(**t | {"value": _number(t["value"], math.nan)})
                        for t in row["tasks"]
                    ),
                }
            )
            for row in content["rows"]
        ]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a report.json of this program: {error!r}") from error


def join_rows(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Earlier rows, then new ones; nothing that was measured is lost.

    A checkpoint in both (same name and path) is one row: the new numbers, and the earlier ones
    that were not measured again. Different checkpoints of one name get their path behind it.
    """
    joined = {(row.name, _place(row.path)): row for row in earlier}
    for row in rows:
        key = row.name, _place(row.path)
        joined[key] = _renewed(joined[key], row) if key in joined else row
    names = [name for name, _ in joined]
    short = [(name, Path(path).name) for name, path in joined]
    return [
        row
        if names.count(row.name) == 1
        else replace(row, name=f"{row.name} ({last if short.count((name, last)) == 1 else path})")
        for row, (name, last), (_, path) in zip(joined.values(), short, joined, strict=True)
    ]


def _place(path: str | None) -> str:
    """One spelling of a local path; a hub name as it is."""
    local = Path(path or "").expanduser()
    return str(local.resolve()) if path and local.exists() else path or ""


def _renewed(earlier: Row, row: Row) -> Row:
    texts = {text_key(p): p for p in (*earlier.perplexity, *row.perplexity)}
    tasks = {task_key(t): t for t in (*earlier.tasks, *row.tasks)}
    return replace(row, perplexity=tuple(texts.values()), tasks=tuple(tasks.values()))


# ---- Markdown -----------------------------------------------------------------------------------


def render_tables(report: Report) -> str:
    """The main tables as Markdown, for a terminal: perplexity, distance, tasks, cost."""
    return _blocks(_main_tables(report))


def render_markdown(report: Report) -> str:
    """The whole report as GitHub Markdown."""
    parts = [f"# {report.title}: {report.model}", *report.notes, *_main_tables(report)]
    parts += _markdown_table("Subtasks", task_table(report, subtasks=True), transpose=True)
    for heading, values in (("Settings", report.settings), ("Environment", report.environment)):
        if values:
            parts.append(f"## {heading}")
            parts.append(
                "| | |\n|---|---|\n"
                + "\n".join(
                    f"| {_escape(key)} | {_escape(show(value))} |" for key, value in values.items()
                )
            )
    if report.command:
        parts.append(f"## Command\n```\n{report.command}\n```")
    return _blocks(parts) + "\n"


def _main_tables(report: Report) -> list[str]:
    parts = _markdown_table("Perplexity", perplexity_table(report))
    parts += [f"- {line}" for line in protocols(report)]
    parts += _markdown_table("Distance from the original", divergence_table(report))
    parts += _markdown_table("Tasks", task_table(report))
    parts += [f"- {line}" for line in task_notes(report)]
    return parts + _markdown_table("Size and cost", cost_table(report))


def _blocks(parts: Sequence[str]) -> str:
    """Markdown of blocks: items of one list stand together, a blank line is between others."""
    text = ""
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        text += part + ("\n" if part.startswith("- ") and following.startswith("- ") else "\n\n")
    return text.rstrip()


def show(value: Any) -> str:
    """A setting or environment value as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(v) for v in value) or "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={show(v)}" for k, v in value.items()) or "–"
    return str(value)


def _markdown_table(heading: str, table: Table, *, transpose: bool = False) -> list[str]:
    if not table.lines or not table.columns:
        return []
    body = [[_markdown_cell(cell) for cell in cells] for _, cells in table.lines]
    top = [_escape(name) for name, _ in table.columns]
    side = [f"**{_escape(name)}**" for name, _ in table.lines]
    if transpose:
        top, side, body = side, top, [list(column) for column in zip(*body, strict=True)]
    lines = ["| | " + " | ".join(top) + " |", "|---|" + "---:|" * len(top)]
    lines += [
        f"| {name} | " + " | ".join(cells) + " |" for name, cells in zip(side, body, strict=True)
    ]
    return [f"## {heading}", "\n".join(lines)]


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return " ".join(
        part for part in (cell.value, cell.error, cell.delta and f"({cell.delta})") if part
    )


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, absent: float = math.inf) -> float:
    return absent if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
