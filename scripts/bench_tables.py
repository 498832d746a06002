"""Tables of scripts/bench.py's rows, and the peers' entries that they are compared with.

A row is a dictionary: k, n, m, dtype, group_size; microseconds `us`, `us_alone`, `floor`,
`floor_pdl`, `cublas` and, if asked for, `us_invariant`, `us_sustained`, `us_peer`; `peer`,
`tflops`, `gb_per_s`, `error`, `config`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Entry = tuple[int, int, int, int]  # group size, K, N, M
PEER_COLUMNS = ("kernel", "dtype", "group_size", "K", "N", "M")

HEADER = (
    f"{'K x N':>12} {'M':>5} {'us':>9} {'alone':>9} {'floor':>8} {'fl_pdl':>8} {'cublas':>9} "
    f"{'x floor':>8} {'x cublas':>9} {'TFLOP/s':>8} {'GB/s':>6} {'error':>8} configuration"
)


def print_row(r: Row) -> None:
    shape = f"{r['k']}x{r['n']}"
    line = (
        f"{shape:>12} {r['m']:5} {r['us']:9.2f} {r['us_alone']:9.2f} {r['floor']:8.2f} "
        f"{r['floor_pdl']:8.2f} {r['cublas']:9.2f} {r['us'] / r['floor']:8.2f} "
        f"{r['cublas'] / r['us']:9.2f} {r['tflops']:8.0f} {r['gb_per_s']:6.0f} "
        f"{r['error']:8.5f} {r['config']}"
    )
    if "us_invariant" in r:
        line += f" | batch-invariant {r['us_invariant']:.2f} ({r['us_invariant'] / r['us']:.2f}x)"
    if "us_sustained" in r:
        line += f" | sustained {r['us_sustained']:.2f}"
    if "us_peer" in r:
        line += f" | {r['peer']} {r['us_peer']:.2f} ({r['us_peer'] / r['us']:.2f}x)"
    print(line, flush=True)


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Print geometric means over shapes, and the worst shape, for each number of tokens.

    Returns what it prints: dtype, group_size, m, and mean and worst of every ratio that can be
    formed. Ratios over the floor and of `us_invariant` are slow-downs, the others speed-ups.
    """
    ratios: dict[str, tuple[Callable[[Row], float], Callable]] = {
        "x floor": (lambda r: r["us"] / r["floor"], max),
        "x cublas": (lambda r: r["cublas"] / r["us"], min),
        "x peer": (lambda r: r["us_peer"] / r["us"], min),
        "invariant": (lambda r: r["us_invariant"] / r["us"], max),
    }
    needs = {"x cublas": "cublas", "x peer": "us_peer", "invariant": "us_invariant"}
    summary = []
    for dtype, group_size, m in sorted({(r["dtype"], r["group_size"], r["m"]) for r in rows}):
        mine = [r for r in rows if (r["dtype"], r["group_size"], r["m"]) == (dtype, group_size, m)]
        entry: Row = {"dtype": dtype, "group_size": group_size, "m": m}
        for name, (ratio, worst) in ratios.items():
            need = needs.get(name, "floor")
            found = [ratio(r) for r in mine if not math.isnan(r.get(need, math.nan))]
            if found:
                entry[name], entry[f"worst {name}"] = geometric_mean(found), worst(found)
        summary.append(entry)
    shown = [name for name in ratios if any(name in entry for entry in summary)]
    print(f"\n{'dtype':>9} {'group':>5} {'M':>5}" + "".join(f" {n:>9} {'worst':>6}" for n in shown))
    for e in summary:
        line = f"{e['dtype']:>9} {e['group_size']:5} {e['m']:5}"
        for name in shown:
            line += f" {e[name]:9.3f} {e['worst ' + name]:6.2f}" if name in e else f"{'':17}"
        print(line)
    return summary


def print_models(models: dict[str, list[str]], rows: Sequence[Row]) -> None:
    """Sums over the linears of one decoder layer."""
    for dtype, group_size in sorted({(r["dtype"], r["group_size"]) for r in rows}):
        for name, shapes in models.items():
            for m in sorted({r["m"] for r in rows}):
                key = (dtype, group_size, m)
                found = {
                    f"{r['k']}x{r['n']}": r
                    for r in rows
                    if (r["dtype"], r["group_size"], r["m"]) == key
                }
                parts = [found[shape] for shape in shapes]
                us, cublas = (sum(r[column] for r in parts) for column in ("us", "cublas"))
                print(
                    f"{name:>12} {dtype} group {group_size} M={m}: {us:.1f} us a layer, "
                    f"{cublas / us:.2f}x of torch.matmul"
                )


# ---- peers ---------------------------------------------------------------------------------------


def read_peers(path: Path, dtype: str = "w4a16") -> dict[Entry, tuple[str, float]]:
    """The fastest kernel of each entry in a CSV file, among those whose dtype begins so.

    Columns: kernel, dtype, group_size (-1: per column), K, N, M, then the microseconds under any
    name. Raises SystemExit if columns are missing.
    """
    best: dict[Entry, tuple[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        if names[: len(PEER_COLUMNS)] != list(PEER_COLUMNS) or len(names) <= len(PEER_COLUMNS):
            raise SystemExit(
                f"--peers {path}: columns are {names}, expected {', '.join(PEER_COLUMNS)} and "
                "microseconds"
            )
        for row in reader:
            if not row["dtype"].startswith(dtype):
                continue
            entry = (int(row["group_size"]), int(row["K"]), int(row["N"]), int(row["M"]))
            us = float(row[names[len(PEER_COLUMNS)]])
            if entry not in best or us < best[entry][1]:
                best[entry] = (row["kernel"], us)
    return best


def add_peers(rows: Sequence[Row], peers: dict[Entry, tuple[str, float]]) -> None:
    """Give each row the best peer's name and microseconds, where there is one."""
    for row in rows:
        found = peers.get((row["group_size"], row["k"], row["n"], row["m"]))
        if found:
            row["peer"], row["us_peer"] = found
