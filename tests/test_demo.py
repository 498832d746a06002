"""The demo's script, without its model."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from marlin_kernel.errors import CheckpointError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_other_files_of_the_folder_stay(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="the embedded model is missing"):
        demo.demo(tmp_path, 128)
    assert (tmp_path / "mine.txt").read_text() == "precious"
