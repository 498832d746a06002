"""What README and docs name exists: flags, files, scripts and make targets."""

from __future__ import annotations

import importlib
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
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAG = r"(?<![\w-])--[a-z][\w-]*"
ROOMS = "gptq|marlin_kernel|eval|configs|scripts|docs|tests"
MADE = {"marlin_kernel/cubins"}  # by a command that the text shows


def named_paths(text: str) -> set[str]:
    return set(re.findall(rf"(?<![\w/.])(?:{ROOMS})/[\w./*-]*[\w*]", text))


def commands(text: str) -> list[str]:
    """``python scripts/...`` as they stand in a block or between backticks, lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"```\w*\n(.*?)```", joined, flags=re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", joined, flags=re.S))
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(text.split()) for text in inline]
    return [line.split("#")[0] for line in lines if re.match(r"\S*(python|torchrun)\b", line)]


def test_flags_exist() -> None:
    """Those of commands of scripts/ exist there, the others are flags of the quantizer."""
    known = set(parser()._option_string_actions)
    known |= {"--model", "--model_args", "--tasks", "--marlin_checkpoint", "--nproc-per-node"}
    text = README
    for command in re.findall(r"python scripts/[^`#\n]*", README):
        script = (ROOT / command.split()[1]).read_text(encoding="utf-8")
        missing = [name for name in re.findall(FLAG, command) if f'"{name}"' not in script]
        # bench_quantize.py passes what it does not know on to the quantizer
        missing = [name for name in missing if name not in known]
        assert not missing, (command, missing)
        text = text.replace(command, "")
    named = set(re.findall(FLAG, text))
    assert named and named <= known, named - known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_take_the_flags_that_documents_show(document: Path) -> None:
    for command in commands(document.read_text(encoding="utf-8")):
        names = re.findall(r"scripts/\w+\.py", command)
        if not names:
            continue
        source = (ROOT / names[0]).read_text(encoding="utf-8")
        quantizer = set(parser()._option_string_actions) if "parse_known_args" in source else set()
        quantizer |= {"--nproc-per-node"}
        for flag in re.findall(FLAG, command.split(names[0], 1)[1]):
            shown = f'"{flag}"' in source or f'"{flag[2:]}"' in source
            assert shown or flag in quantizer, (document.name, command, flag)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    named = named_paths(document.read_text(encoding="utf-8"))
    missing = [path for path in named - MADE if not any(ROOT.glob(path.rstrip("/")))]
    assert named and not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, section = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if section:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert section in slugs, link


def test_every_result_is_listed_with_its_script() -> None:
    text = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([\w*.-]+\.(?:json|csv|svg))`", text)
    files = [path for path in (ROOT / "docs" / "results").iterdir() if path.suffix != ".md"]
    unlisted = [path.name for path in files if not any(path.match(name) for name in listed)]
    assert files and not unlisted


def test_tables_are_generated(tmp_path: Path) -> None:
    """A number typed by hand would not survive the generator."""
    for name in ("README.md", "scripts", "docs"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    script = [sys.executable, str(tmp_path / "scripts" / "update_readme.py")]
    subprocess.run(script, check=True)
    assert subprocess.run([*script, "--check"]).returncode == 0
    pages = importlib.import_module("scripts.update_readme").TABLES
    for page in pages:
        assert (tmp_path / page).read_text("utf-8") == (ROOT / page).read_text("utf-8"), page
    (tmp_path / "README.md").write_text(README.replace("| 1 | 3.", "| 1 | 4."), encoding="utf-8")
    assert subprocess.run([*script, "--check"]).returncode == 1


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
