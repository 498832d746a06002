"""The accuracy benchmark: variants resolve, seeds draw, and docs/accuracy.md is generated."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import yaml

from scripts import bench_accuracy as bench

BENCHES = ["accuracy.yaml", "accuracy_small.yaml", "sparsity.yaml"]


@pytest.mark.parametrize("name", BENCHES)
def test_every_variant_is_a_valid_run(name):
    recipe = yaml.safe_load((bench.ROOT / "configs" / "bench" / name).read_text())
    tasks = bench.tasks(argparse.Namespace(only=None), recipe)
    assert {task.name for task in tasks} == set(recipe["variants"])
    assert all(task.config.seed == task.seed for task in tasks)
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)


def test_seed_0_takes_the_first_rows_and_others_draw_without_repeats():
    rows = torch.arange(64)[:, None]
    assert torch.equal(bench.calibration(rows, 32, 0), rows[:32])
    drawn = [bench.calibration(rows, 32, seed).flatten().tolist() for seed in (1, 2)]
    assert drawn[0] != drawn[1]
    assert all(len(set(found)) == 32 for found in drawn)


def test_means_and_standard_errors_over_seeds():
    runs = {
        seed: {"wiki": {"kl": kl, "perplexity": 20.0, "top1": 0.5}, "seconds": 2.0 * seed}
        for seed, kl in enumerate((0.1, 0.2, 0.3))
    }
    found = bench.summarized("fast", runs)
    assert found["wiki"]["kl"] == pytest.approx(0.2)
    assert found["wiki"]["kl_seed_se"] == pytest.approx(0.1 / 3**0.5, abs=1e-6)
    assert (found["seconds"], found["seeds"]) == (2.0, [0, 1, 2])
    assert "kl_seed_se" not in bench.summarized("fast", {0: runs[0]})["wiki"]


def test_tables_of_the_document_are_generated(tmp_path: Path, monkeypatch):
    """A number typed by hand would not survive the generator."""
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    for file in (bench.ROOT / "docs" / "results").glob("accuracy*.json"):
        (results / file.name).write_text(file.read_text())
    document = tmp_path / "docs" / "accuracy.md"
    text = (bench.ROOT / "docs" / "accuracy.md").read_text()
    document.write_text(text)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    bench.write_tables()
    assert document.read_text() == text
    assert text.count("<!-- table: ") >= 2
