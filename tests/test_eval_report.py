"""The report: schema, tables, self-contained page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from eval.perplexity import PerplexityResult
from eval.plots import Point, line_plot, series_of_layers
from eval.report import (
    Report,
    Row,
    TaskResult,
    format_bytes,
    format_seconds,
    perplexity_table,
    read_rows,
    render_markdown,
    task_table,
    to_json,
    write_report,
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
                "FP16", (result(20.0, 0.0),), (TaskResult("mmlu", "acc", 0.5, 0.004, 100, 5),), 200
            ),
            Row("RTN INT4", (result(28.0, 0.4),), (TaskResult("mmlu", "acc", 0.4, 0.004),), 60),
            Row(
                "GPTQ INT4",
                (result(22.0, 0.2),),
                (
                    TaskResult("mmlu", "acc", 0.499, 0.004, note="partial: 2 of 57"),
                    TaskResult("mmlu_virology", "acc", 0.4, 0.1, group="mmlu"),
                ),
                60,
                75.0,
                10**9,
            ),
        ),
        quantization={
            "config": {"wbits": 4, "groupsize": 64, "sym": True},
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
    assert "<b>tiny" not in text and "&lt;y&gt;" in text  # escaped
    assert "+40.0 %" in text and "3.33×" in text
    assert text.count("<circle") == 6


def test_json_schema(report):
    content = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert content["format_version"] == 1
    assert content["baseline"] == "FP16"
    assert set(content) == {
        "format_version", "model", "rows", "baseline", "title", "quantization", "settings",
        "environment", "command", "notes",
    }  # fmt: skip
    assert set(content["rows"][0]) == {
        "name", "perplexity", "tasks", "bytes", "seconds", "peak_bytes", "path",
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
