"""report.html: one page without scripts or external resources, for desktop, phone and paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eval.plots import legend, line_plot, series_of_layers
from eval.report import Report, show
from eval.tables import (
    Cell,
    Table,
    cost_table,
    divergence_table,
    find_perplexity,
    format_bytes,
    format_kl,
    format_perplexity,
    format_seconds,
    is_share,
    perplexity_table,
    protocols,
    task_notes,
    task_table,
    text_key,
)

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5b6878;--line:#e2e6ec;
--accent:#1f6feb;--tint:#eaf1fd;--good:#157347;--goodbg:#e3f4ea;--bad:#a8410b;--badbg:#fcebdf;
--s0:#1f6feb;--s1:#d9480f;--s2:#2b8a3e;--s3:#9c36b5;--s4:#0b7285;--s5:#c2255c;--s6:#997404;
--s7:#5c677d}
@media(prefers-color-scheme:dark){:root{--bg:#0f141b;--card:#171e28;--ink:#e7ecf3;--soft:#98a5b6;
--line:#2a3442;--accent:#6ea8fe;--tint:#1a2a44;--good:#63d297;--goodbg:#143325;--bad:#ffa26b;
--badbg:#3b2416;--s0:#6ea8fe;--s1:#ff922b;--s2:#69db7c;--s3:#da77f2;--s4:#3bc9db;--s5:#f783ac;
--s6:#ffd43b;--s7:#adb5bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 .2em;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 4px;letter-spacing:-.005em}
.kicker{color:var(--accent);font-weight:600;font-size:.86rem;letter-spacing:.06em;
text-transform:uppercase;margin:0 0 6px}
.sub{color:var(--soft);margin:0 0 16px;font-size:.94rem}
.chips{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0 26px;padding:0;list-style:none}
.chips li{background:var(--tint);color:var(--accent);border-radius:14px;padding:3px 12px;
font-size:.86rem;font-weight:500;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(var(--n),minmax(0,1fr));gap:16px;
margin:0 0 20px}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:14px}
.tile{padding:16px 20px;overflow-wrap:anywhere}
.tile b{display:block;font-size:1.75rem;line-height:1.2;letter-spacing:-.02em;font-weight:650;
font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.88rem;display:block}
.tile .what{font-weight:600;color:var(--ink);margin-bottom:4px}
section{padding:22px 24px 24px;margin:0 0 20px}
.scroll{overflow-x:auto;margin:0 -24px;padding:0 24px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:10px 14px;text-align:right;border-top:1px solid var(--line);vertical-align:top;
white-space:nowrap}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.88rem;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody th{font-weight:600}
th span{display:block;width:max-content;max-width:15em;white-space:normal;overflow-wrap:anywhere}
th:first-child span{max-width:28em}
thead span{margin-left:auto}
td b{font-weight:600;font-size:1.05rem}
td small{color:var(--soft);font-size:.82rem;margin-left:5px}
td em{font-style:normal;font-size:.84rem;display:block;width:fit-content;margin:3px 0 0 auto;
padding:0 8px;border-radius:6px;color:var(--soft);background:var(--bg)}
td em.bad{color:var(--bad);background:var(--badbg)}
td em.good{color:var(--good);background:var(--goodbg)}
.best td:first-child,.best th{color:var(--accent)}
.left td{text-align:left}
.notes{color:var(--soft);font-size:.86rem;margin:14px 0 0;padding-left:1.1em}
.notes li{margin:2px 0;overflow-wrap:anywhere}
.bars{display:grid;grid-template-columns:fit-content(45%) minmax(3em,1fr) max-content;
gap:9px 14px;align-items:center;font-size:.92rem;margin-top:20px;overflow-wrap:anywhere}
.bars h3{grid-column:1/-1;font-size:.9rem;margin:8px 0 0;color:var(--soft);font-weight:600}
.bars i{display:block;height:14px;border-radius:4px;min-width:2px}
.bars span{font-variant-numeric:tabular-nums}
svg.plot{display:block;width:100%;min-width:640px;height:auto}
svg text{fill:var(--soft);font-size:12.5px}
svg .label{font-size:13px}
svg .grid{stroke:var(--line);stroke-width:1}
svg polyline{fill:none;stroke-width:1.6;opacity:.55;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:10px 0 4px;font-size:.9rem}
.legend i{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:7px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px;
align-items:start;margin-bottom:20px}
.two section{margin:0}
dl{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);margin:10px 0 0;font-size:.92rem}
dt,dd{margin:0;padding:5px 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
dt{color:var(--soft);padding-right:12px}
pre{background:var(--bg);border:1px solid var(--line);border-radius:10px;padding:13px 16px;
margin:12px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:.86rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
details summary{cursor:pointer;font-weight:600;font-size:1.05rem}
details[open] summary{margin-bottom:10px}
footer{color:var(--soft);font-size:.86rem;text-align:center;margin-top:32px}
@media(max-width:640px){main{padding:24px 14px 40px}h1{font-size:1.55rem}
section{padding:18px 16px 20px}.scroll{margin:0 -16px;padding:0 16px 0 0}.tile{padding:13px 15px}
.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile b{font-size:1.35rem}
th,td{padding:9px 10px}th:first-child span{max-width:8.5em}
.scroll th:first-child{position:sticky;left:0;background:var(--card);padding-left:16px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def render_html(report: Report) -> str:
    """The report as one HTML document."""
    body = [
        _header(report),
        _tiles(report),
        _quality(report),
        _tasks(report),
        _cost(report),
        _layers(report.quantization),
        _facts(report),
        _command(report),
    ]
    title = escape(f"{report.title}: {report.model}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n<footer>The same numbers are in report.json and report.md.</footer>\n"
        "</main></body></html>\n"
    )


def _header(report: Report) -> str:
    config = (report.quantization or {}).get("config", {})
    chips = []
    if config.get("weight_type"):
        chips.append(f"{config['weight_type']} weights")
    elif config.get("wbits"):
        chips.append(f"{config['wbits']}-bit weights")
    if config.get("groupsize"):
        size = config["groupsize"]
        chips.append("one scale per column" if size == -1 else f"group size {size}")
    if "sym" in config and not config.get("weight_type"):
        chips.append("symmetric" if config["sym"] else "asymmetric")
    if config.get("sparsity"):
        chips.append(f"{config['sparsity']} sparse")
    if config.get("nearest"):
        chips.append("round to nearest")
    elif config.get("nsamples"):
        for key, text in (
            ("act_order", "activation order"),
            ("true_sequential", "true sequential"),
        ):
            if config.get(key):
                chips.append(text)
        chips.append(f"{config['nsamples']} calibration samples from {config.get('dataset', '?')}")
    items = "".join(f"<li>{escape(str(chip))}</li>" for chip in chips)
    notes = "".join(f'<p class="sub">{escape(note)}</p>' for note in report.notes)
    return (
        f'<header><p class="kicker">{escape(report.title)}</p><h1>{escape(report.model)}</h1>'
        f"{f'<ul class=chips>{items}</ul>' if items else ''}{notes}</header>"
    )


def _tiles(report: Report) -> str:
    """The few numbers that a reader wants first, for the last row (the newest model)."""
    if not report.rows:
        return ""
    row = report.rows[-1]
    baseline, itself = report.compared_with(row), report.baseline_row() is row
    tiles: list[tuple[str, str, str]] = []
    if row.perplexity:
        result = row.perplexity[0]
        base = find_perplexity(baseline, text_key(result))
        note = f"{result.dataset}, {row.name}"
        if base is not None and math.isfinite(base.perplexity):
            change = 100 * (result.perplexity / base.perplexity - 1)
            before = format_perplexity(base.perplexity)
            note = f"{result.dataset}, from {before} ({change:+.1f}\u00a0%)"
        tiles.append(("Perplexity", format_perplexity(result.perplexity), note))
        if result.kl is not None and not itself:
            tiles.append(
                ("KL divergence", format_kl(result.kl), f"nats per token, {result.dataset}")
            )
        if result.top1 is not None and not itself:
            tiles.append(
                ("Same top token", f"{100 * result.top1:.1f} %", "of predictions, as the original")
            )
    leading = next((t for t in row.tasks if t.group is None), None)
    if leading is not None and is_share(leading.metric):
        tiles.append((leading.task, f"{100 * leading.value:.2f} %", leading.metric))
    if row.bytes:
        if baseline is not None and baseline.bytes:
            ratio = f"{baseline.bytes / row.bytes:.2f}×"
            before = " ".join(filter(None, (format_bytes(baseline.bytes), baseline.dtype)))
            sizes = f"{before} → {format_bytes(row.bytes)}"
            tiles.append(("Smaller", ratio, sizes))
        else:
            tiles.append(("Weights", format_bytes(row.bytes), "weight files"))
    if row.seconds is not None:
        memory = f"peak memory {format_bytes(row.peak_bytes)}" if row.peak_bytes else "quantization"
        tiles.append(("Time to quantize", format_seconds(row.seconds), memory))
    cells = "".join(
        f'<div class="tile"><span class="what">{escape(what)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for what, value, note in tiles
    )
    columns = len(tiles) if len(tiles) <= 4 else 3
    return f'<div class="tiles" style="--n:{columns}">{cells}</div>' if tiles else ""


def _quality(report: Report) -> str:
    table = perplexity_table(report)
    if not table.lines or not table.columns:
        return ""
    parts = [
        '<section><h2>Perplexity</h2><p class="sub">Held-out text; lower is better. '
        "± is one standard error over windows; all rows read the same tokens.</p>",
        _table(table),
        _bars(report),
        _list(protocols(report)),
        "</section>",
    ]
    distance = divergence_table(report)
    if distance.lines:
        parts.append(
            '<section><h2>Distance from the original</h2><p class="sub">Token by token against the '
            "original model: KL divergence in nats (0 is identical), and how often both rank the "
            "same token first.</p>" + _table(distance) + "</section>"
        )
    return "".join(parts)


def _bars(report: Report) -> str:
    """Increase of perplexity over the baseline, one bar per row and data set."""
    baseline = report.baseline_row()
    if baseline is None:
        return ""
    parts = []
    for base in baseline.perplexity:
        changes = [
            (index, row, 100 * (p.perplexity / base.perplexity - 1))
            for index, row in enumerate(report.rows)
            for p in row.perplexity
            if row is not baseline and text_key(p) == text_key(base)
        ]
        changes = [c for c in changes if math.isfinite(c[2])]
        if len(changes) < 2:
            continue
        longest = max(abs(change) for _, _, change in changes) or 1.0
        parts.append(f"<h3>Increase over {escape(baseline.name)}, {escape(base.dataset)}</h3>")
        for index, row, change in changes:
            parts.append(
                f"<span>{escape(row.name)}</span>"
                f'<i style="width:{max(0.5, 100 * abs(change) / longest):.1f}%;'
                f'background:var(--s{_bar_colour(index)})"></i><span>{change:+.1f} %</span>'
            )
    return f'<div class="bars">{"".join(parts)}</div>' if parts else ""


def _bar_colour(index: int) -> int:
    return {1: 7, 2: 0}.get(index, index % 8)  # the first after the baseline in grey


def _tasks(report: Report) -> str:
    table = task_table(report)
    if not table.lines:
        return ""
    parts = [
        '<section><h2>Tasks</h2><p class="sub">Accuracies in percent; ± is one standard error. '
        "Differences within two standard errors are grey, larger ones green if better.</p>",
        _table(table),
        _list(task_notes(report)),
    ]
    detail = task_table(report, subtasks=True)
    if detail.lines:
        parts.append(
            f"<details style='margin-top:16px'><summary>{len(detail.columns)} subtasks</summary>"
            + _table(_transposed(detail), models=False)
            + "</details>"
        )
    return "".join(parts) + "</section>"


def _cost(report: Report) -> str:
    table = cost_table(report)
    if not table.lines or not table.columns:
        return ""
    return f"<section><h2>Size and cost</h2>{_table(table)}{_totals(report.quantization)}</section>"


def _totals(quantization: Mapping[str, Any] | None) -> str:
    totals = (quantization or {}).get("totals", {})
    names = {
        "seconds_forward": "forward passes",
        "seconds_hessian": "Hessians",
        "seconds_solve": "solver",
        "seconds_io": "reading and writing",
    }
    spent = [
        f"{label} {format_seconds(totals[key])}"
        for key, label in names.items()
        if isinstance(totals.get(key), (int, float)) and totals[key] > 0
    ]
    lines = [f"Quantization time: {', '.join(spent)}"] if spent else []
    if totals.get("calibration_tokens"):
        lines.append(f"Calibration: {totals['calibration_tokens']:,} tokens")
    if totals.get("parameters_quantized"):
        lines.append(f"Quantized parameters: {totals['parameters_quantized']:,}")
    if totals.get("peak_device_bytes"):
        lines.append(f"Peak GPU memory: {format_bytes(totals['peak_device_bytes'])}")
    return _list(lines)


def _layers(quantization: Mapping[str, Any] | None) -> str:
    """Error of every layer as a plot, and the worst ones as a table."""
    layers = (quantization or {}).get("layers", [])
    series = series_of_layers(layers, "relative_error")
    plot = line_plot(series, x_label="decoder layer", y_label="relative error")
    if not plot:
        return ""
    usable = [x for x in layers if isinstance(x.get("relative_error"), (int, float))]
    worst = sorted(usable, key=lambda x: -x["relative_error"])[:8]
    columns = [
        ("Relative error", "of the layer's output on calibration text"),
        ("Weight error", "relative, of the weights alone"),
        ("Clipped", "share of groups whose range was shrunk"),
        ("Damping", "of the Hessian's diagonal; raised when it was not positive definite"),
        ("Time", ""),
    ]
    lines: list[tuple[str, list[Cell | None]]] = []
    for layer in worst:
        retries = layer.get("damping_retries")
        lines.append(
            (
                layer["name"],
                [
                    Cell(f"{layer['relative_error']:.4f}"),
                    _optional(layer.get("relative_weight_error"), "{:.4f}"),
                    _optional(layer.get("clip_fraction"), "{:.1%}"),
                    _optional(
                        layer.get("damping"), "{:.3g}", f"raised {retries}×" if retries else ""
                    ),
                    _optional(layer.get("seconds"), "{:.2f} s"),
                ],
            )
        )
    retried = sum(1 for x in layers if x.get("damping_retries"))
    dead = sum(int(x.get("dead_inputs") or 0) for x in layers)
    remarks = []
    if retried:
        remarks.append(
            f"{retried} layer{'s' if retried > 1 else ''} needed more damping than asked for"
        )
    if dead:
        remarks.append(f"{dead} inputs were never active in the calibration text")
    if (quantization or {}).get("totals", {}).get("calibration_tokens") == 0:
        meaning = "‖Q − W‖ / ‖W‖ of the weights: no calibration text was used."
    else:
        meaning = (
            "‖(Q − W)X‖ / ‖WX‖ on the calibration text: how far the quantized layer's output is "
            "from the original's."
        )
    return (
        f'<section><h2>Error of each layer</h2><p class="sub">{meaning} Hover a point for its '
        "name.</p>"
        f'{legend(list(series))}<div class="scroll">{plot}</div>'
        f"<details style='margin-top:16px'><summary>The {len(worst)} worst layers</summary>"
        f"{_table(Table(columns, lines), models=False)}</details>{_list(remarks)}</section>"
    )


def _facts(report: Report) -> str:
    sections = []
    for heading, values in (("Settings", report.settings), ("Environment", report.environment)):
        items = "".join(
            f"<dt>{escape(str(key))}</dt><dd>{escape(show(value))}</dd>"
            for key, value in values.items()
        )
        if items:
            sections.append(f"<section><h2>{heading}</h2><dl>{items}</dl></section>")
    return f'<div class="two">{"".join(sections)}</div>' if sections else ""


def _command(report: Report) -> str:
    if not report.command:
        return ""
    return f"<section><h2>Command</h2><pre>{escape(report.command)}</pre></section>"


def _table(table: Table, *, models: bool = True) -> str:
    """models: each line is a model, and the last one, the newest, is marked."""
    head = "".join(
        f'<th scope="col" title="{escape(why)}"><span>{escape(name)}</span></th>'
        for name, why in table.columns
    )
    body = []
    for index, (name, cells) in enumerate(table.lines):
        newest = models and 0 < index == len(table.lines) - 1
        mark = ' class="best"' if newest else ""
        values = "".join(_cell(cell) for cell in cells)
        body.append(f'<tr{mark}><th scope="row"><span>{escape(name)}</span></th>{values}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td>–</td>"
    error = f"<small>{escape(cell.error)}</small>" if cell.error else ""
    kind = {-1: ' class="bad"', 1: ' class="good"'}.get(cell.quality, "")
    delta = f"<em{kind}>{escape(cell.delta)}</em>" if cell.delta else ""
    return f"<td><b>{escape(cell.value)}</b>{error}{delta}</td>"


def _transposed(table: Table) -> Table:
    lines = [
        (name, [cells[i] for _, cells in table.lines]) for i, (name, _) in enumerate(table.columns)
    ]
    return Table([(name, "") for name, _ in table.lines], lines)


def _optional(value: Any, pattern: str, error: str = "") -> Cell | None:
    return Cell(pattern.format(value), error) if isinstance(value, (int, float)) else None


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""
