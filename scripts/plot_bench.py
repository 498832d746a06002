"""Plot what a benchmark has stored: a .json of scripts/bench.py, benchmark_marlin.py or
sparse_benchmarks.py, or a .pkl of the last.

    python scripts/plot_bench.py docs/results/bench_h200_float16_g128.json --output plots
    python scripts/plot_bench.py model_bench-fp8-1767225600.pkl --output plots --format svg

Products of packed weights: the speed-up over torch.matmul against the number of tokens, one panel
for each dtype and group size (bench.py) or shape (benchmark_marlin.py), in one file. Sparse
products: TFLOP/s of every kernel over the size that varies, a file for each pair of the others.
Below stand device, versions, commit and command, as far as the file has them. Needs matplotlib.
"""

from __future__ import annotations

import json
import pickle
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command_line import make_parser

NAMES = ("m", "k", "n")
STYLES = ("-", "--", ":", "-.")
SPEED_UP, RATE = "speed-up over torch.matmul", "TFLOP/s"


@dataclass
class Panel:
    """Axes: lines by name, each [(x, y)]."""

    title: str
    x: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))


def read(path: Path) -> dict[str, Any]:
    """The content of a stored run: `rows`, and what was noted of its circumstances.

    A pickle is read with torch.utils.benchmark's own Measurements in it and nothing else. Raises
    ValueError if the file is no stored run.
    """
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.get("rows"):
            raise ValueError(f"{path} holds no rows of a benchmark")
        return content
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
    return {"rows": rows}


class _Measurements(pickle.Unpickler):
    """Loads nothing but the classes that a stored run consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.utils.benchmark.utils.common" and name in ("Measurement", "TaskSpec"):
            return super().find_class(module, name)
        raise ValueError(f"the pickle holds {module}.{name}, which no stored run does")


def panels(rows: Iterable[Mapping[str, Any]]) -> tuple[str, list[Panel]]:
    """What is plotted upwards, and the panels. Raises ValueError for rows of another kind."""
    rows = list(rows)
    if all("kernel" in row for row in rows):
        return RATE, _of_sparse(rows)
    found: dict[str, Panel] = {}
    for row in rows:
        if "what" in row:  # benchmark_marlin.py; M = 0: repacking
            title, name, y = f"K={row['k']} N={row['n']}", row["what"], row["speedup"]
            if not row["m"] or name == "torch.matmul":
                continue
        elif {"cublas", "us"} <= row.keys():  # bench.py
            title = f"{row['dtype']}, group size {row['group_size']}"
            name, y = f"{row['k']} x {row['n']}", row["cublas"] / row["us"]
        else:
            raise ValueError(f"rows with {', '.join(row)} are of no benchmark that is plotted")
        found.setdefault(title, Panel(title, "tokens (M)")).lines[name].append((row["m"], y))
    return SPEED_UP, list(found.values())


def _of_sparse(rows: list[Mapping[str, Any]]) -> list[Panel]:
    values = {name: {row[name] for row in rows} for name in NAMES}
    if len(values["m"]) > 1 and any(row["k"] != row["m"] for row in rows):
        varies, fixed = "m", ("k", "n")
    else:
        varies = max(NAMES, key=lambda name: len(values[name]))
        fixed = tuple(n for n in NAMES if n != varies and values[n] != values[varies])
    found: dict[str, Panel] = {}
    for row in rows:
        title = " ".join(f"{name.upper()}={row[name]}" for name in fixed) or "square"
        panel = found.setdefault(title, Panel(title, varies.upper()))
        panel.lines[row["kernel"]].append((row[varies], row["tflops"]))
    return list(found.values())


def caption(content: Mapping[str, Any]) -> str:
    """Device, versions, commit and command of a stored run."""
    facts = content.get("circumstances", content)
    parts = [facts["gpu"].split(",")[0]] if facts.get("gpu", "unknown") != "unknown" else []
    parts += [f"{name} {facts[name]}" for name in ("torch", "cuda", "commit") if facts.get(name)]
    command = facts.get("command", "")
    return ": ".join(part for part in (", ".join(parts), command) if part)


def draw(content: Mapping[str, Any], path: Path, chosen: list[Panel] | None = None) -> None:
    """Plot a stored run (or some of its panels) side by side into a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "plot_bench"  # the same file from the same rows
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    upwards, found = panels(content["rows"])
    found = chosen or found
    names = list(dict.fromkeys(name for panel in found for name in panel.lines))
    beside = 0 if len(names) <= 12 else -(-len(names) // 40)  # columns of a legend of its own
    width = 6.5 * len(found) + 2.5 * beside
    figure, all_axes = pyplot.subplots(
        1, len(found), figsize=(width, 5), squeeze=False, sharey=True, layout="constrained"
    )
    drawn = {}
    for axes, panel in zip(all_axes[0], found, strict=True):
        for name, points in panel.lines.items():
            number = names.index(name)
            style = {"color": f"C{number % 10}", "linestyle": STYLES[number // 10 % len(STYLES)]}
            points = zip(*sorted(points), strict=True)
            (drawn[name],) = axes.plot(*points, **style, marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        sizes = sorted({x for points in panel.lines.values() for x, _ in points})
        if len(sizes) <= 16:
            axes.set_xticks(sizes, labels=map(str, sizes), fontsize=8)
        axes.set(xlabel=panel.x, title=panel.title)
        axes.grid(alpha=0.3)
        if upwards == SPEED_UP:
            axes.axhline(1.0, color="black", linewidth=0.8)
    all_axes[0][0].set_ylabel(upwards)
    lines = [drawn[name] for name in names]
    if beside:
        figure.legend(lines, names, loc="outside right upper", fontsize=5, ncols=beside)
    else:
        title = "K x N" if "cublas" in content["rows"][0] else None
        all_axes[0][-1].legend(lines, names, fontsize=7, title=title)
    text = textwrap.fill(caption(content), int(15 * width))
    figure.supxlabel(text.replace("$", r"\$"), fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Write the figures. Returns the process exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("file", type=Path, help="a stored run, .json or .pkl")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the figures")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401

        content = read(options.file)
        upwards, found = panels(content["rows"])
    except ImportError:
        print("error: plots need matplotlib (pip install matplotlib)", file=sys.stderr)
        return 2
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for chosen in [[panel] for panel in found] if upwards == RATE else [found]:
        title = f"-{chosen[0].title.replace(' ', '-').replace('=', '')}" if upwards == RATE else ""
        path = options.output / f"{options.file.stem}{title}.{options.format}"
        draw(content, path, chosen)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
