"""Tables of a report: which numbers are compared with which, and how each is written.

Shared by the Markdown, the HTML page and the terminal, so that all three say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.perplexity import PerplexityResult
    from eval.report import Report, Row, TaskResult

# How the names of lm-eval's metrics begin that are shares of 0..1; others keep their own unit
SHARES = ("acc", "exact", "f1", "mcc", "em", "mc1", "mc2", "pass", "prompt_level", "inst_level")


@dataclass(frozen=True)
class Cell:
    """One measurement as text: value, standard error and difference from the baseline.

    quality: -1 worse, +1 better, 0 neither: no baseline, a task's difference within two standard
    errors, a perplexity's below half a percent.
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
    texts = _texts(report)
    columns = [
        (name, f"perplexity at length {seqlen}, lower is better")
        for (_, seqlen, _), name in texts.items()
    ]
    lines = []
    for row in report.rows:
        baseline = report.compared_with(row)
        cells: list[Cell | None] = []
        for key in texts:
            result, base = find_perplexity(row, key), find_perplexity(baseline, key)
            cells.append(None if result is None else _perplexity_cell(result, base))
        lines.append((row.name, cells))
    return Table(columns, lines)


def divergence_table(report: Report) -> Table:
    """KL divergence and top-1 agreement with the reference, for the rows that have them."""
    compared = {text_key(p) for row in report.rows for p in row.perplexity if p.kl is not None}
    texts = {key: name for key, name in _texts(report).items() if key in compared}
    columns, lines = [], []
    for name in texts.values():
        columns.append((f"KL {name}", "nats per token from the reference, lower is better"))
        columns.append((f"Top-1 {name}", "same most likely token as the reference"))
    for row in report.rows:
        cells: list[Cell | None] = []
        for key in texts:
            found = find_perplexity(row, key)
            if found is None or found.kl is None or found.top1 is None:
                cells += [None, None]
                continue
            if found.kl == 0 and found.top1 == 1:  # compared with itself: says nothing
                cells += [None, None]
                continue
            kl_error = "" if found.kl_se is None else f"± {format_kl(found.kl_se)}"
            top1_error = "" if found.top1_se is None else f"± {100 * found.top1_se:.2f}"
            cells.append(Cell(format_kl(found.kl), kl_error))
            cells.append(Cell(f"{100 * found.top1:.2f} %", top1_error))
        lines.append((row.name, cells))
    return Table(columns, [line for line in lines if any(line[1])])


def task_table(report: Report, *, subtasks: bool = False) -> Table:
    """Task results in percent; subtasks=False shows groups and single tasks only."""
    keys = _unique(
        task_key(t) for row in report.rows for t in row.tasks if (t.group is not None) == subtasks
    )
    shown = [f"{task} {metric}" for task, metric, _, _ in keys]
    columns = []
    for name, key in zip(shown, keys, strict=True):
        how = _how_asked(key)
        heading = f"{name}, {how}" if shown.count(name) > 1 and how else name
        columns.append((heading, ", ".join(part for part in (key[1], how) if part)))
    lines = []
    for row in report.rows:
        baseline = report.compared_with(row)
        cells: list[Cell | None] = []
        for key in keys:
            result, base = _find_task(row, key), _find_task(baseline, key)
            cells.append(None if result is None else _task_cell(result, base))
        if any(cells):
            lines.append((row.name, cells))
    return Table(columns, lines)


def cost_table(report: Report) -> Table:
    """Size, compression ratio, time and memory of making each model."""
    columns = [
        ("Weights", "weight files"),
        ("Compression", "of the weight files"),
        ("Time", "to quantize"),
        ("Peak memory", "host memory while quantizing"),
    ]
    lines = []
    for row in report.rows:
        ratio, baseline = None, report.compared_with(row)
        if baseline is not None and baseline.bytes and row.bytes:
            ratio = Cell(f"{baseline.bytes / row.bytes:.2f}×")
        lines.append(
            (
                row.name,
                [
                    Cell(format_bytes(row.bytes), row.dtype or "") if row.bytes else None,
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


def format_perplexity(value: float) -> str:
    """22.5312 → "22.531"; 33123.4 → "3.312e+04"."""
    return f"{value:.3f}" if value < 1000 else f"{value:.4g}"


def format_kl(nats: float) -> str:
    """0.0442 → "0.0442"; 0.000023 → "2.3e-05": small ones keep two digits."""
    return f"{nats:.4f}" if abs(nats) >= 0.001 or nats == 0 else f"{nats:.1e}"


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
            found[text_key(p)] = (
                f"{p.dataset}: {p.protocol}; length {p.seqlen}; {p.tokens:,} predicted tokens"
            )
    return list(found.values())


def task_notes(report: Report) -> list[str]:
    """How the tasks of the main table were asked, and what is not standard about any."""
    results = [t for row in report.rows for t in row.tasks]
    asked = [
        f"{t.task}: {_how_asked(task_key(t))}"
        for t in results
        if t.group is None and _how_asked(task_key(t))
    ]
    return _unique([*asked, *(f"{t.task}: {t.note}" for t in results if t.note)])


def _perplexity_cell(result: PerplexityResult, base: PerplexityResult | None) -> Cell:
    error = "" if result.nll_se is None else f"± {result.perplexity * result.nll_se:.2g}"
    value = format_perplexity(result.perplexity)
    if base is None or not math.isfinite(result.perplexity) or not math.isfinite(base.perplexity):
        return Cell(value, error)
    delta = result.perplexity - base.perplexity
    relative = 100 * delta / base.perplexity
    # Both read the same tokens, so their errors are not independent: colour by the relative change.
    quality = 0 if abs(relative) < 0.5 else (-1 if delta > 0 else 1)
    return Cell(value, error, f"{delta:+.3f}, {relative:+.1f} %", quality)


def is_share(metric: str) -> bool:
    """Whether lm-eval's metric is a share of 0..1, which is shown in percent."""
    return metric.startswith(SHARES)


def _task_cell(result: TaskResult, base: TaskResult | None) -> Cell:
    scale, digits = (100, 2) if is_share(result.metric) else (1, 4)
    known = result.stderr is not None and math.isfinite(result.stderr)
    error = f"± {scale * result.stderr:.{digits}f}" if known else ""
    value = f"{scale * result.value:.{digits}f}"
    if base is None or not math.isfinite(result.value - base.value):
        return Cell(value, error)
    delta = result.value - base.value
    noise = 2 * math.hypot(result.stderr or 0.0, base.stderr or 0.0)
    better = (delta > 0) == result.higher_is_better
    quality = 0 if abs(delta) <= noise or delta == 0 else (1 if better else -1)
    return Cell(value, error, f"{scale * delta:+.{digits}f}", quality)


TextKey = tuple[str, int, int]  # data set, length of a window, predicted tokens
TaskKey = tuple[str, str, int | None, int | None]  # task, metric, examples in prompt, questions


def text_key(result: PerplexityResult) -> TextKey:
    """What two perplexities must share to be compared: other tokens are another measurement."""
    return result.dataset, result.seqlen, result.tokens


def task_key(result: TaskResult) -> TaskKey:
    return result.task, result.metric, result.fewshot, result.examples


def _how_asked(key: TaskKey) -> str:
    _, _, fewshot, examples = key
    parts = [] if fewshot is None else [f"{fewshot}-shot"]
    return ", ".join(parts if examples is None else [*parts, f"{examples:,} questions"])


def _texts(report: Report) -> dict[TextKey, str]:
    """Every measured text and its heading: the data set, and what tells two of one name apart."""
    keys = _unique(text_key(p) for row in report.rows for p in row.perplexity)
    headings = {}
    for dataset, seqlen, tokens in keys:
        alike = [key for key in keys if key[0] == dataset]
        parts = [dataset]
        if len({key[1] for key in alike}) > 1:
            parts.append(f"length {seqlen}")
        if sum(key[1] == seqlen for key in alike) > 1:
            parts.append(f"{tokens:,} tokens")
        headings[dataset, seqlen, tokens] = ", ".join(parts)
    return headings


def find_perplexity(row: Row | None, key: TextKey) -> PerplexityResult | None:
    """What a row measured on a text; None if it did not, or if there is no row."""
    return next((p for p in row.perplexity if text_key(p) == key), None) if row else None


def _find_task(row: Row | None, key: TaskKey) -> TaskResult | None:
    return next((t for t in row.tasks if task_key(t) == key), None) if row else None


def _unique(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))
