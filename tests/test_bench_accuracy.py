"""The accuracy benchmark: variants resolve, seeds draw, and docs/accuracy.md is generated."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from scripts import bench_accuracy as bench
from scripts import peers

BENCHES = ["accuracy.yaml", "accuracy_stages.yaml", "accuracy_family.yaml", "sparsity.yaml"]


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


def test_questions_come_from_csv_files_in_an_order_of_their_own(tmp_path: Path):
    for subject in ("b", "a"):
        rows = "".join(f'"{subject}{i}?",w,x,y,z,{i % 4}\n' for i in range(3))
        (tmp_path / f"{subject}_test.csv").write_text(
            "question,choice0,choice1,choice2,choice3,answer\n" + rows
        )
    found = bench._questions(tmp_path).split("\n\n")
    assert sorted(text[:3] for text in found) == ["a0?", "a1?", "a2?", "b0?", "b1?", "b2?"]
    assert "a1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B" in found
    with pytest.raises(SystemExit, match="holds no \\*_test.csv"):
        bench._questions(tmp_path / "none")


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
    document = tmp_path / "docs" / "accuracy.md"
    text = (bench.ROOT / "docs" / "accuracy.md").read_text()
    for name in re.findall(r"<!-- table: (.+) -->", text):
        (results / name).write_text((bench.ROOT / "docs" / "results" / name).read_text())
    document.write_text(text)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    bench.write_tables()
    assert document.read_text() == text
    assert text.count("<!-- table: ") >= 2


def test_peers_run_with_all_their_seeds_and_only_when_asked_for():
    recipe = yaml.safe_load((bench.ROOT / "configs" / "bench" / "accuracy.yaml").read_text())
    assert {options["peer"] for options in recipe["peers"].values()} == set(peers.PEERS)
    assert bench.peer_tasks(argparse.Namespace(peers=[]), recipe) == []
    found = bench.peer_tasks(argparse.Namespace(peers=["autoround"]), recipe)
    assert {task.peer for task in found} == {"autoround"}
    assert all(task.options["iters"] in (20, 200) for task in found)
    assert [task.seed for task in found] == sorted(task.seed for task in found)


def test_a_peer_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="'quip' is unknown; choose from autoround"):
        peers.version("quip")
    with pytest.raises(SystemExit, match="cannot import auto_round .*--peer_python"):
        peers.version("autoround", python=shutil.which("false"))


def fake_weight(k=128, n=64, group=64):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) - 0.5).half().float()
    weight = (codes - 8) * scales.repeat_interleave(group, 1)
    return codes, scales, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_peer_become_codes(dtype):
    codes, scales, weight = fake_weight()
    layer = peers.read_back("linear", weight.to(dtype), scales, 64)
    assert torch.equal(layer.codes.T, codes.to(torch.uint8))
    assert torch.equal(layer.dequantize().T, weight)


def test_weights_in_another_format_are_refused():
    _, scales, weight = fake_weight()
    with pytest.raises(ValueError, match="steps from the nearest code"):
        peers.read_back("linear", weight * 0.95, scales, 64)
    with pytest.raises(ValueError, match=r"codes span .*outside 0\.\.15"):
        peers.read_back("linear", 2 * weight, scales, 64)
    with pytest.raises(ValueError, match="one scale per group and row"):
        peers.read_back("linear", weight, scales[:, :1], 64)
    with pytest.raises(ValueError, match="zero or not finite"):
        peers.read_back("linear", weight, torch.zeros_like(scales), 64)
