"""The report: schema, tables, self-contained page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from eval.perplexity import PerplexityResult
from eval.plots import Point, line_plot, series_of_layers
from eval.report import (
    Report,
    Row,
    TaskResult,
    join_rows,
    read_rows,
    render_markdown,
    render_tables,
    to_json,
    write_report,
)
from eval.tables import (
    divergence_table,
    format_bytes,
    format_seconds,
    perplexity_table,
    task_table,
)
from marlin_kernel.errors import DataError


def result(value, kl=None):
    top1 = None if kl is None else 0.75
    error = None if kl is None else 0.01
    return PerplexityResult(
        "pydoc", "joined", 1024, 5000, value, math.log(value), 0.02, kl, error, top1, error, 1.0
    )


@pytest.fixture
def report():
    layers = [
        {
            "name": f"model.layers.{i}.{kind}",
            "relative_error": 0.1 + 0.01 * i,
            "relative_weight_error": 0.1,
            "clip_fraction": 0.5,
            "damping": 0.1,
            "damping_retries": 1 if i == 1 else 0,
            "dead_inputs": 0,
            "seconds": 0.5,
        }
        for i in range(3)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    return Report(
        model="<b>tiny & model</b>",
        rows=(
            Row(
                "FP16",
                (result(20.0, 0.0),),
                (TaskResult("mmlu", "acc", 0.5, 0.004, 100, 5),),
                200,
                "float32",
            ),
            Row(
                "RTN INT4",
                (result(28.0, 0.4),),
                (TaskResult("mmlu", "acc", 0.4, 0.004, 100, 5),),
                60,
            ),
            Row(
                "GPTQ INT4",
                (result(22.0, 0.2),),
                (
                    TaskResult("mmlu", "acc", 0.499, 0.004, 100, 5, note="partial: 2 of 57"),
                    TaskResult("mmlu_virology", "acc", 0.4, 0.1, group="mmlu"),
                ),
                60,
                None,
                75.0,
                10**9,
            ),
        ),
        quantization={
            "config": {"wbits": 4, "groupsize": 64, "sym": True, "sparsity": "2:4"},
            "totals": {"seconds_solve": 3.0, "calibration_tokens": 4096},
            "layers": layers,
        },
        settings={"seqlen": 1024, "sources": ["a", "b"], "on": True, "nothing": None},
        environment={"torch": "2"},
        command="python eval/eval.py --x '<y>'",
    )


class Page(HTMLParser):
    """Collects tags and attributes, and checks that elements close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("circle", "line", "polyline"):
            return
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(report, tmp_path):
    paths = write_report(tmp_path / "out", report)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    text = paths["html"].read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "svg" in page.tags and "script" not in page.tags and "link" not in page.tags
    assert not [v for k, v in page.attributes if k in ("src", "href", "srcset")]
    assert not re.search(r"url\(|@import|https?://", text)
    assert "<li>2:4 sparse</li>" in text
    assert "<b>tiny" not in text and "&lt;y&gt;" in text  # escaped
    assert "+40.0 %" in text and "3.33×" in text and "200 B float32 → 60 B" in text
    assert text.count("<circle") == 6
    marked = re.findall(r'class="best"><th scope="row"><span>([^<]*)', text)
    assert set(marked) == {"GPTQ INT4"}  # neither a subtask nor a layer


def test_json_schema(report):
    content = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert content["format_version"] == 1
    assert content["baseline"] == "FP16"
    assert set(content) == {
        "format_version", "model", "rows", "baseline", "title", "quantization", "settings",
        "environment", "command", "notes",
    }  # fmt: skip
    assert set(content["rows"][0]) == {
        "name", "perplexity", "tasks", "bytes", "dtype", "seconds", "peak_bytes", "path",
    }  # fmt: skip
    assert content["rows"][1]["perplexity"][0]["kl"] == 0.4


def test_rows_survive_the_file(report, tmp_path):
    path = write_report(tmp_path, report)["json"]
    assert read_rows(path) == list(report.rows)
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(DataError, match="report format 99"):
        read_rows(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="is not a report.json"):
        read_rows(path)


def test_deltas_and_their_meaning(report):
    cells = {name: cells[0] for name, cells in perplexity_table(report).lines}
    assert cells["FP16"].delta == ""
    assert cells["GPTQ INT4"].delta == "+2.000, +10.0 %" and cells["GPTQ INT4"].quality == -1
    tasks = {name: cells[0] for name, cells in task_table(report).lines}
    assert tasks["RTN INT4"].delta == "-10.00" and tasks["RTN INT4"].quality == -1
    assert tasks["GPTQ INT4"].quality == 0  # within two standard errors
    assert task_table(report, subtasks=True).columns[0][0] == "mmlu_virology acc"


def test_markdown_has_the_same_numbers(report):
    text = render_markdown(report)
    assert "| **GPTQ INT4** | 22.000 ± 0.44 (+2.000, +10.0 %) |" in text
    assert "mmlu: partial: 2 of 57" in text
    assert "| sources | a, b |" in text


def test_only_shares_are_shown_in_percent():
    """Bits per byte below one are no share, and one column has one unit."""
    rows = [
        Row(name, tasks=(TaskResult("wikitext", "bits_per_byte", value, higher_is_better=False),))
        for name, value in (("FP16", 0.98), ("INT4", 1.02))
    ]
    lines = task_table(Report(model="m", rows=rows)).lines
    assert [cells[0].value for _, cells in lines] == ["0.9800", "1.0200"]
    assert lines[1][1][0].delta == "+0.0400" and lines[1][1][0].quality == -1


def test_small_distances_are_not_hidden():
    """Only a row compared with itself is left out: 8-bit weights come close, but differ."""
    near = replace(result(20.0, 0.00002), kl_se=0.000001, top1=0.99999)
    rows = (Row("FP16", (replace(result(20.0, 0.0), top1=1.0),)), Row("INT8", (near,)))
    lines = divergence_table(Report(model="m", rows=rows)).lines
    assert [name for name, _ in lines] == ["INT8"]
    assert lines[0][1][0].value == "2.0e-05" and lines[0][1][0].error == "± 1.0e-06"


def test_only_equal_measurements_are_compared():
    """Another length, fewer tokens, another number of shots: columns of their own, no deltas."""
    full, part = result(20.0), replace(result(24.0), tokens=4000)
    longer = replace(result(19.0), seqlen=2048)
    rows = (
        Row("FP16", (full, longer), (TaskResult("mmlu", "acc", 0.5, 0.01, 100, 5),)),
        Row("INT4", (part,), (TaskResult("mmlu", "acc", 0.4, 0.01, 100, 0),)),
    )
    report = Report(model="m", rows=rows)
    table = perplexity_table(report)
    assert [name for name, _ in table.columns] == [
        "pydoc, length 1024, 5,000 tokens",
        "pydoc, length 2048",
        "pydoc, length 1024, 4,000 tokens",
    ]
    assert [cell and cell.delta for cell in table.lines[1][1]] == [None, None, ""]
    tasks = task_table(report)
    assert [name for name, _ in tasks.columns] == [
        "mmlu acc, 5-shot, 100 questions",
        "mmlu acc, 0-shot, 100 questions",
    ]
    assert "- mmlu: 5-shot, 100 questions" in render_markdown(report)


def test_rows_of_an_earlier_run_lose_nothing(tmp_path):
    def row(path, **changes):
        return Row("original", path=str(path), **changes)

    a, b = tmp_path / "a" / "model", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir(parents=True)
    task, text = TaskResult("mmlu", "acc", 0.5), result(20.0)
    again = replace(text, perplexity=21.0)
    joined = join_rows([row(a, tasks=(task,))], [row(f"{a}/", perplexity=(text,))])
    assert [(r.name, r.tasks, r.perplexity) for r in joined] == [("original", (task,), (text,))]
    joined = join_rows([row(a, perplexity=(text,))], [row(a, perplexity=(again,))])
    assert joined[0].perplexity == (again,)
    joined = join_rows([row(a, tasks=(task,)), Row("INT4")], [row(b)])
    assert [r.name for r in joined] == ["original (model)", "INT4", "original (b)"]
    (tmp_path / "b" / "model").mkdir()
    joined = join_rows([row(a)], [row(b / "model")])
    assert [r.name for r in joined] == [f"original ({a})", f"original ({b / 'model'})"]


def test_results_that_are_no_numbers_survive_the_file(tmp_path):
    broken = TaskResult("wikitext", "word_perplexity", math.inf, math.nan, higher_is_better=False)
    rows = (Row("FP16", tasks=(broken,)), Row("INT4", tasks=(broken,)))
    path = write_report(tmp_path, Report(model="m", rows=rows))["json"]
    again = Report(model="m", rows=read_rows(path))
    for name, cells in task_table(again).lines:
        assert cells[0].value == "nan" and cells[0].delta == cells[0].error == "", name


def test_the_terminal_shows_protocols_too(report):
    text = render_tables(report)
    assert "\n\n- pydoc: joined; length 1024; 5,000 predicted tokens\n\n## Distance" in text
    assert "\n- mmlu: 5-shot, 100 questions\n- mmlu: partial: 2 of 57\n" in text


def test_a_single_row_and_infinite_numbers(tmp_path):
    bad = PerplexityResult("d", "p", 8, 7, math.inf, 800.0, None, None, None, None, None, 0.1)
    paths = write_report(tmp_path, Report(model="m", rows=(Row("FP16", (bad,)),)))
    assert json.loads(paths["json"].read_text())["rows"][0]["perplexity"][0]["perplexity"] is None
    assert "inf" in paths["html"].read_text()
    assert read_rows(paths["json"])[0].perplexity[0] == bad
    empty = write_report(tmp_path / "empty", Report(model="m", rows=()))
    assert empty["html"].is_file()


def test_layer_plot():
    layers = [{"name": f"model.layers.{i}.mlp.up_proj", "relative_error": 10.0**-i}
              for i in range(4)]  # fmt: skip
    layers += [{"name": "lm_head", "relative_error": 0.1}, {"name": "model.layers.0.x"}]
    series = series_of_layers(layers, "relative_error")
    assert list(series) == ["up_proj"] and len(series["up_proj"]) == 4
    assert "log scale" in line_plot(series, x_label="x", y_label="y")
    assert line_plot({}, x_label="x", y_label="y") == ""
    flat = line_plot({"a": [Point(0, 0.0, "t")]}, x_label="x", y_label="y")
    assert "nan" not in flat


def test_units():
    assert format_bytes(113_000_000) == "113 MB" and format_bytes(1.9e9) == "1.9 GB"
    assert format_bytes(None) == "–"
    assert format_seconds(3.21) == "3.2 s" and format_seconds(75.3) == "1 min 15 s"
    assert format_seconds(3661) == "1 h 01 min"
