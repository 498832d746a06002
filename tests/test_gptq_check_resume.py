"""scripts/check_resume.py: a killed run continued, on the CPU and at real widths on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_resume
from tests.gptq_models import Source, tiny_config

ROOT = Path(__file__).parent.parent


def check(folder: Path, *flags: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "check_resume.py"), "--scratch", str(folder),
         *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_on_the_cpu(processes, tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_text(tiny_config(Source()).to_json_string())
    result = check(
        tmp_path, "--from_config", str(shape), "--layers", "4", "--processes", processes,
        "--groupsize", "32", "--nsamples", "4", "--seqlen", "32", "--device", "cpu",
    )  # fmt: skip
    assert result["differ"] == [] and 1 <= result["layers_kept_by_the_killed_run"] < 4
    assert result["bytes"] > 0 and result["seconds_of_assembling"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["shape.json"]


def test_a_folder_that_is_renamed_while_it_is_read(tmp_path, monkeypatch):
    def renamed(self, pattern):
        raise FileNotFoundError(str(self))

    assert check_resume.finished(tmp_path) == 0
    monkeypatch.setattr(Path, "glob", renamed)
    assert check_resume.finished(tmp_path) == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama2-7b", "llama2-70b"])
def test_at_real_widths_on_a_gpu(shape, tmp_path):
    """Also assembles the packed checkpoint of these layers and of the embeddings."""
    config = ROOT / "configs" / "bench" / f"{shape}.json"
    recipe = ROOT / "configs" / "quantize" / "fast.yaml"
    result = check(
        tmp_path, "--from_config", str(config), "--config", str(recipe), "--layers", "2",
        "--nsamples", "8", "--seqlen", "1024", "--device", "cuda",
    )  # fmt: skip
    assert result["differ"] == [] and result["bytes"] > 5e8
