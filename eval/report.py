"""Results → report.json (documented schema) → report.md and one self-contained report.html.

Everything here works on plain numbers: it loads no model and imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    name: "FP16", "RTN INT4", "GPTQ INT4", ... bytes: size of its weight files; seconds: what it
    took to make it (quantization); peak_bytes: peak host memory while it was made.
    """

    name: str
    perplexity: Sequence[PerplexityResult] = ()
    tasks: Sequence[TaskResult] = ()
    bytes: int | None = None
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
                    "tasks": tuple(TaskResult(**t) for t in row["tasks"]),
                }
            )
            for row in content["rows"]
        ]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a report.json of this program: {error!r}") from error


# ---- tables: shared by the Markdown and the HTML page -------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One measurement as text: value, standard error and difference from the baseline.

    quality: -1 worse, +1 better, 0 neither (no baseline, or within two standard errors).
    """

    value: str
    error: str = ""
    delta: str = ""
    quality: int = 0


@dataclass(frozen=True)
class Table:
    """columns: (heading, explanation); one list of cells per row name; None: not measured."""

    columns: list[tuple[str, str]]
    lines: list[tuple[str, list[Cell | None]]]


def perplexity_table(report: Report) -> Table:
    """Perplexity per data set, with the relative change from the baseline."""
    baseline = report.baseline_row()
    names = _unique((p.dataset, p.seqlen) for row in report.rows for p in row.perplexity)
    columns, lines = [], []
    for dataset, seqlen in names:
        columns.append((dataset, f"perplexity at length {seqlen}, lower is better"))
    for row in report.rows:
        cells: list[Cell | None] = []
        for key in names:
            result = _find_perplexity(row, key)
            base = None if baseline is None or row is baseline else _find_perplexity(baseline, key)
            cells.append(None if result is None else _perplexity_cell(result, base))
        lines.append((row.name, cells))
    return Table(columns, lines)


def divergence_table(report: Report) -> Table:
    """KL divergence and top-1 agreement with the reference, for the rows that have them."""
    names = _unique(
        (p.dataset, p.seqlen) for row in report.rows for p in row.perplexity if p.kl is not None
    )
    columns, lines = [], []
    for dataset, _ in names:
        columns.append((f"KL {dataset}", "nats per token from the reference, lower is better"))
        columns.append((f"Top-1 {dataset}", "same most likely token as the reference"))
    for row in report.rows:
        cells: list[Cell | None] = []
        for key in names:
            found = _find_perplexity(row, key)
            if found is None or found.kl is None or found.top1 is None:
                cells += [None, None]
                continue
            kl_error = "" if found.kl_se is None else f"± {found.kl_se:.4f}"
            top1_error = "" if found.top1_se is None else f"± {100 * found.top1_se:.2f}"
            cells.append(Cell(f"{found.kl:.4f}", kl_error))
            cells.append(Cell(f"{100 * found.top1:.2f} %", top1_error))
        # A row compared with itself says nothing.
        itself = all(c is None or c.value in ("0.0000", "100.00 %") for c in cells)
        lines.append((row.name, [None] * len(cells) if itself else cells))
    return Table(columns, [line for line in lines if any(line[1])])


def task_table(report: Report, *, subtasks: bool = False) -> Table:
    """Task results in percent; subtasks=False shows groups and single tasks only."""
    baseline = report.baseline_row()
    keys = _unique(
        (t.task, t.metric)
        for row in report.rows
        for t in row.tasks
        if (t.group is not None) == subtasks
    )
    columns = []
    for task, metric in keys:
        found = next(f for f in (_find_task(row, (task, metric)) for row in report.rows) if f)
        shots = "" if found.fewshot is None else f", {found.fewshot}-shot"
        examples = "" if found.examples is None else f", {found.examples} questions"
        columns.append((f"{task} {metric}", f"{metric}{shots}{examples}"))
    lines = []
    for row in report.rows:
        cells: list[Cell | None] = []
        for key in keys:
            result = _find_task(row, key)
            base = None if baseline is None or row is baseline else _find_task(baseline, key)
            cells.append(None if result is None else _task_cell(result, base))
        if any(cells):
            lines.append((row.name, cells))
    return Table(columns, lines)


def cost_table(report: Report) -> Table:
    """Size, compression ratio, time and memory of making each model."""
    baseline = report.baseline_row()
    columns = [
        ("Weights", "weight files"),
        ("Compression", "of the weight files"),
        ("Time", "to quantize"),
        ("Peak memory", "host memory while quantizing"),
    ]
    lines = []
    for row in report.rows:
        ratio = None
        if baseline is not None and row is not baseline and baseline.bytes and row.bytes:
            ratio = Cell(f"{baseline.bytes / row.bytes:.2f}×")
        lines.append(
            (
                row.name,
                [
                    Cell(format_bytes(row.bytes)) if row.bytes else None,
                    ratio,
                    Cell(format_seconds(row.seconds)) if row.seconds is not None else None,
                    Cell(format_bytes(row.peak_bytes)) if row.peak_bytes else None,
                ],
            )
        )
    used = [i for i in range(len(columns)) if any(cells[i] for _, cells in lines)]
    return Table(
        [columns[i] for i in used], [(name, [cells[i] for i in used]) for name, cells in lines]
    )


def format_bytes(count: float | None) -> str:
    """1234567 → "1.23 MB" (decimal units, as disks and downloads count)."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """75.3 → "1 min 15 s"; 3.21 → "3.2 s"."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def protocols(report: Report) -> list[str]:
    """One line per data set: how its perplexity was measured."""
    found = {}
    for row in report.rows:
        for p in row.perplexity:
            found[(p.dataset, p.seqlen)] = (
                f"{p.dataset}: {p.protocol}; length {p.seqlen}; {p.tokens:,} predicted tokens"
            )
    return list(found.values())


def task_notes(report: Report) -> list[str]:
    """What is not standard about task results, once per task."""
    return _unique(f"{t.task}: {t.note}" for row in report.rows for t in row.tasks if t.note)


def render_tables(report: Report) -> str:
    """The main tables as Markdown, for a terminal: perplexity, distance, tasks, cost."""
    parts = _markdown_table("Perplexity", perplexity_table(report))
    parts += _markdown_table("Distance from the original", divergence_table(report))
    parts += _markdown_table("Tasks", task_table(report))
    parts += task_notes(report)
    parts += _markdown_table("Size and cost", cost_table(report))
    return "\n\n".join(parts)


def render_markdown(report: Report) -> str:
    """The whole report as GitHub Markdown."""
    parts = [f"# {report.title}: {report.model}", *report.notes]
    parts += _markdown_table("Perplexity", perplexity_table(report))
    parts += [f"- {line}" for line in protocols(report)]
    parts += _markdown_table("Distance from the original", divergence_table(report))
    parts += _markdown_table("Tasks", task_table(report))
    parts += [f"- {line}" for line in task_notes(report)]
    parts += _markdown_table("Size and cost", cost_table(report))
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
    # List items of one list stand together; everything else is a block of its own.
    text = ""
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        text += part + ("\n" if part.startswith("- ") and following.startswith("- ") else "\n\n")
    return text.rstrip() + "\n"


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


def _perplexity_cell(result: PerplexityResult, base: PerplexityResult | None) -> Cell:
    error = "" if result.nll_se is None else f"± {result.perplexity * result.nll_se:.2g}"
    value = f"{result.perplexity:.3f}" if result.perplexity < 1000 else f"{result.perplexity:.4g}"
    if base is None or not math.isfinite(result.perplexity) or not math.isfinite(base.perplexity):
        return Cell(value, error)
    delta = result.perplexity - base.perplexity
    relative = 100 * delta / base.perplexity
    # Both read the same tokens, so their errors are not independent: colour by the relative change.
    quality = 0 if abs(relative) < 0.5 else (-1 if delta > 0 else 1)
    return Cell(value, error, f"{delta:+.3f}, {relative:+.1f} %", quality)


def _task_cell(result: TaskResult, base: TaskResult | None) -> Cell:
    percent = 0 <= result.value <= 1 and (
        result.metric.startswith(("acc", "exact", "f1", "mcc")) or (result.stderr or 0) < 0.2
    )
    scale, digits = (100, 2) if percent else (1, 4)
    error = "" if result.stderr is None else f"± {scale * result.stderr:.{digits}f}"
    value = f"{scale * result.value:.{digits}f}"
    if base is None:
        return Cell(value, error)
    delta = result.value - base.value
    noise = 2 * math.hypot(result.stderr or 0.0, base.stderr or 0.0)
    better = (delta > 0) == result.higher_is_better
    quality = 0 if abs(delta) <= noise or delta == 0 else (1 if better else -1)
    return Cell(value, error, f"{scale * delta:+.{digits}f}", quality)


def _find_perplexity(row: Row, key: tuple[str, int]) -> PerplexityResult | None:
    return next((p for p in row.perplexity if (p.dataset, p.seqlen) == key), None)


def _find_task(row: Row, key: tuple[str, str]) -> TaskResult | None:
    return next((t for t in row.tasks if (t.task, t.metric) == key), None)


def _unique(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
