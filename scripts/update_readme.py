"""Write the tables of the README from docs/results/*.json, so that no number is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
SHOWN = {
    "full precision": "full precision",
    "round to nearest": "round to nearest",
    "GPTQ as first published": "GPTQ as first published (`configs/quantize/gptq.yaml`)",
    "Marlin": "Marlin's recipe (`configs/quantize/marlin.yaml`)",
    "all but asymmetric calibration": "the default without asymmetric calibration",
    "default": "**the default**",
}


def accuracy() -> str:
    content = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))
    found = {result["name"]: result for result in content["results"]}
    lines = [
        "| recipe | WikiText-2 PPL | KL | top-1 | C4 PPL | KL |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in SHOWN.items():
        wiki, c4 = found[name]["wiki"], found[name]["C4"]
        kl = [f"{part['kl']:.4f}" if "kl" in part else "" for part in (wiki, c4)]
        top1 = f"{100 * wiki['top1']:.1f} %" if "top1" in wiki else ""
        ppl = [f"{part['perplexity']:.2f}" for part in (wiki, c4)]
        lines.append(f"| {label} | {ppl[0]} | {kl[0]} | {top1} | {ppl[1]} | {kl[1]} |")
    where = content["environment"]
    device = where.get("gpu", "a CPU")
    lines.append(f"\nMeasured on {device}, torch {where['torch']}: `{content['command']}`.")
    return "\n".join(lines)


def quantize() -> str:
    content = json.loads((RESULTS / "bench_quantize.json").read_text(encoding="utf-8"))
    seconds, where = content["seconds"], content["environment"]
    ratios = content["ratio_with_target_products"], content["ratio"]
    rows = {
        "quantize, from reading to the packed folder": f"{seconds['quantize']:.0f} s",
        "of it forward passes": f"{seconds['quantize_forward']:.0f} s",
        "of it Hessian and target products": f"{seconds['quantize_hessian']:.0f} s",
        "of it solver": f"{seconds['quantize_solve']:.0f} s",
        "over two forward passes + the same products": f"{ratios[0]:.2f}x",
        "over two forward passes + Hessians alone": f"{ratios[1]:.2f}x",
        "peak memory beyond torch itself": f"{content['peak_bytes_over_torch'] / 1e9:.2f} GB",
    }
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    lines.append(
        f"\n{content['calibration_tokens']:,} calibration tokens, {where['threads']} CPU threads, "
        f"torch {where['torch']}: `{content['command']}`."
    )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy, "quantize": quantize}


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        table = make()
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}, expected 1")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
