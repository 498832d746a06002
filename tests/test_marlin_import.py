"""Importing the package is cheap and has no side effects; the rooms' import borders hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marlin_kernel

ROOM = Path(marlin_kernel.__file__).parent
FORBIDDEN = {"transformers", "datasets", "lm_eval", "gptq", "eval", "accelerate"}


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOM.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_touches_no_gpu_and_loads_no_frameworks():
    output = run(
        """
import sys
import torch
import safetensors.torch
before = set(sys.modules)

def forbidden(*args, **kwargs):
    raise AssertionError("import marlin_kernel touched the GPU")

torch.cuda.init = torch.cuda._lazy_init = torch.cuda.get_device_capability = forbidden
torch._C._cuda_init = torch.cuda.is_available = forbidden
import marlin_kernel
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print([name for name in sys.modules if name.startswith("marlin_kernel.")])
"""
    )
    new, own = output.splitlines()
    assert not FORBIDDEN & set(ast.literal_eval(new))
    assert "cuda" not in ast.literal_eval(new) and "triton" not in ast.literal_eval(new)
    assert not {f"marlin_kernel.{m}" for m in ("compiler", "launch", "sm80_path", "hf")} & set(
        ast.literal_eval(own)
    )


def test_import_writes_nothing(tmp_path):
    run(
        f"""
import os
os.environ.update(HOME={str(tmp_path)!r}, MARLIN_KERNEL_CACHE={str(tmp_path / "cache")!r})
import marlin_kernel
"""
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", marlin_kernel.__all__)
def test_public_names_exist(name):
    assert hasattr(marlin_kernel, name)


def test_packages_carry_their_data_files():
    """What is no module lies in a wheel only if pyproject.toml names it."""
    text = (ROOM.parent / "pyproject.toml").read_text()
    (table,) = re.findall(r"\[tool.setuptools.package-data\]\n(.*?)\n\n", text, re.DOTALL)
    patterns = {
        room: ast.literal_eval(globs)
        for room, globs in re.findall(r"^(\w+) = (\[.*?\])$", table, re.DOTALL | re.MULTILINE)
    }
    assert "cubins/*" in patterns["marlin_kernel"]  # compiler.PREBUILT_PLACES
    for room in ("gptq", "marlin_kernel", "eval"):
        root = ROOM.parent / room
        named = {file for glob in patterns.get(room, ()) for file in root.glob(glob)}
        files = {file for file in root.rglob("*") if file.is_file()}
        data = {file for file in files if file.suffix not in (".py", ".pyc")}
        assert data <= named, room


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
            names |= {"." * node.level + alias.name for alias in node.names if not node.module}
    return names


def test_only_hf_knows_transformers():
    files = sorted(ROOM.glob("*.py"))
    assert len(files) > 10
    for file in files:
        names = imports_of(file)
        tops = {name.split(".")[0] for name in names}
        allowed = {"transformers"} if file.name == "hf.py" else set()
        assert not (tops & FORBIDDEN) - allowed, file
        if file.name != "hf.py":
            assert not {".hf", "marlin_kernel.hf"} & names, file
    assert "transformers" in {n.split(".")[0] for n in imports_of(ROOM / "hf.py")}
