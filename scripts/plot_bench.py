"""Plot measurements of scripts/sparse_benchmarks.py, from its .pkl or .json.

    python scripts/plot_bench.py model_bench-fp8-1767225600.json --output plots

One figure per pair of constant sizes (K x N, or what does not vary): TFLOP/s of every kernel over
the size that varies. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAMES = ("m", "k", "n")


def read(path: Path) -> list[dict[str, Any]]:
    """Rows (m, k, n, kernel, us, tflops) of a stored run.

    A pickle is read with torch.utils.benchmark's own Measurements in it and nothing else. Raises
    ValueError if the file is neither kind.
    """
    if path.suffix == ".json":
        return json.loads(path.read_text())["rows"]
    if path.suffix != ".pkl":
        raise ValueError(f"{path} is neither .pkl nor .json")
    with open(path, "rb") as file:
        measurements = _Measurements(file).load()
    rows = []
    for measurement in measurements:
        sizes = measurement.task_spec.sub_label.removeprefix("MKN=(").removesuffix(")").split("x")
        m, k, n = map(int, sizes)
        rows.append(
            {
                **{"m": m, "k": k, "n": n, "kernel": measurement.task_spec.description},
                "us": measurement.median * 1e6,
                "tflops": 2 * m * k * n / measurement.median / 1e12,
            }
        )
    return rows


class _Measurements(pickle.Unpickler):
    """Loads nothing but the classes that a stored run consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.utils.benchmark.utils.common" and name in ("Measurement", "TaskSpec"):
            return super().find_class(module, name)
        raise ValueError(f"the pickle holds {module}.{name}, which no stored run does")


def figures(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[str, dict[str, list]]]:
    """Title -> (size that varies, kernel -> [(size, TFLOP/s)]) of every figure."""
    rows = list(rows)
    values = {name: {row[name] for row in rows} for name in NAMES}
    if len(values["m"]) > 1 and any(row["k"] != row["m"] for row in rows):
        varies, fixed = "m", ("k", "n")
    else:
        varies = max(NAMES, key=lambda name: len(values[name]))
        fixed = tuple(n for n in NAMES if n != varies and values[n] != values[varies])
    found: dict[str, tuple[str, dict[str, list]]] = {}
    for row in rows:
        title = " ".join(f"{name.upper()}={row[name]}" for name in fixed) or "square"
        _, lines = found.setdefault(title, (varies, defaultdict(list)))
        lines[row["kernel"]].append((row[varies], row["tflops"]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the figures")
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        print("error: plots need matplotlib (pip install matplotlib)", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    from matplotlib import pyplot

    options.output.mkdir(parents=True, exist_ok=True)
    for title, (varies, lines) in figures(read(options.file)).items():
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for kernel, points in sorted(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kernel)
        axes.set(xlabel=varies.upper(), ylabel="TFLOP/s", xscale="log", title=title)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        name = f"{options.file.stem}-{title.replace(' ', '-').replace('=', '')}.png"
        figure.savefig(options.output / name, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        print(options.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
