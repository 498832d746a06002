"""What the README names exists: flags, files and make targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptq.cli import parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_flags_exist() -> None:
    """Those of commands of scripts/ exist there, the others are flags of the quantizer."""
    known = set(parser()._option_string_actions)
    known |= {"--model", "--model_args", "--tasks", "--marlin_checkpoint", "--nproc-per-node"}
    flag = r"(?<![\w-])--[a-z][\w-]*"
    text = README
    for command in re.findall(r"python scripts/[^`#\n]*", README):
        script = (ROOT / command.split()[1]).read_text(encoding="utf-8")
        missing = [name for name in re.findall(flag, command) if f'"{name}"' not in script]
        # bench_quantize.py passes what it does not know on to the quantizer
        missing = [name for name in missing if name not in known]
        assert not missing, (command, missing)
        text = text.replace(command, "")
    named = set(re.findall(flag, text))
    assert named and named <= known, named - known


def test_paths_exist() -> None:
    named = re.findall(r"\b(?:gptq|marlin_kernel|eval|configs|scripts|docs)/[\w./-]*\w", README)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert named and not missing


def test_tables_are_generated(tmp_path: Path) -> None:
    """A number typed by hand would not survive the generator."""
    for name in ("README.md", "scripts", "docs"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    script = tmp_path / "scripts" / "update_readme.py"
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_exist(target: str) -> None:
    shown = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python" in shown.stdout


def test_tests_run_from_any_folder(tmp_path: Path) -> None:
    """Those that import helpers of tests/, without `python -m pytest` in the repository's root."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command.append(str(ROOT / "tests" / "test_marlin_packing.py"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
