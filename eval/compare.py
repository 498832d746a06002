"""Several checkpoints on the same tokens: rows for a report, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from eval import loading
from eval.loading import load, load_tokenizer
from eval.perplexity import evaluate_models
from eval.report import Report, Row
from eval.tables import Cell, Table, divergence_table, perplexity_table

BASELINE = "original"


def compare(
    checkpoints: Mapping[str, str | PathLike[str]],
    sources: Sequence[str],
    *,
    seqlen: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    data_dir: str | None = None,
    max_tokens: int | None = None,
    quantization: Mapping[str, Mapping[str, Any]] | None = None,
    verify: bool = False,
    tokenizer: str | None = None,
) -> list[Row]:
    """Perplexity of every checkpoint; KL and top-1 against the one named BASELINE, if it is there.

    checkpoints: row name -> packed or plain folder, hub name or GGUF file. quantization: the
    quantization report of packed ones, by row name (seconds and peak memory of the row). verify:
    check hashes and probe logits of packed ones. tokenizer: its path or hub name (default: that of
    the first checkpoint that has one).
    Raises DataError, CheckpointError before the first forward pass where it can.
    """
    names = {name: str(path) for name, path in checkpoints.items()}
    words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(*names.values())
    models = {
        name: load(path, device=str(device), dtype=dtype, verify=verify and loading.is_packed(path))
        for name, path in names.items()
    }
    results = evaluate_models(
        models,
        words,
        sources,
        seqlen=seqlen,
        reference=BASELINE if BASELINE in models and len(models) > 1 else None,
        data_dir=data_dir,
        max_tokens=max_tokens,
    )
    return [
        replace(row_of(name, path, (quantization or {}).get(name)), perplexity=results[name])
        for name, path in names.items()
    ]


def row_of(name: str, path: str | None, quantization: Mapping[str, Any] | None) -> Row:
    """What is known of a checkpoint without running it; path None: a model without a folder."""
    totals = (quantization or {}).get("totals", {})
    return Row(
        name=name,
        bytes=path and loading.checkpoint_bytes(path),
        dtype=path and loading.weights_dtype(path),
        seconds=totals.get("seconds"),
        peak_bytes=totals.get("peak_host_bytes"),
        path=path,
    )


def print_table(rows: Sequence[Row]) -> None:
    """Perplexities, and divergences where there are several rows, as plain text."""
    report = Report(model="", rows=rows)
    for title, table in (
        ("perplexity", perplexity_table(report)),
        ("against the original", divergence_table(report)),
    ):
        if table.lines:
            print("\n" + _text(title, table))
    print()
    for result in rows[0].perplexity:
        print(
            f"{result.dataset}: {result.protocol}; length {result.seqlen}; {result.tokens:,} tokens"
        )


def _text(title: str, table: Table) -> str:
    grid = [[title, *(heading for heading, _ in table.columns)]]
    for name, cells in table.lines:
        grid.append([name, *(" ".join(_parts(cell)) for cell in cells)])
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in grid
    )


def _parts(cell: Cell | None) -> list[str]:
    return [] if cell is None else [part for part in (cell.value, cell.error, cell.delta) if part]
