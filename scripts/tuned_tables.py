"""Tables of one row per entry, as tune_scaled.py, tune_sparse.py and tune_w4a8.py keep them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.command_line import command

Rows = dict[tuple, dict[str, Any]]


def read_rows(path: Path, *names: str) -> Rows:
    """Rows of an earlier table by what `names` say of them; none if there is no table."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {tuple(row[name] for name in names): row for row in rows}


def write_rows(path: Path, gpu: str, script: str, rows: Mapping[tuple, Mapping[str, Any]]) -> None:
    """Write the table, one row a line, in the order of `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"gpu": gpu, "torch": torch.__version__, "command": command(script)}
    lines = ",\n".join(map(json.dumps, rows.values()))
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')
