"""Write the tables of the README from docs/results, so that no number is typed by hand.

python scripts/update_readme.py             # what stands between <!-- table: NAME --> marks
python scripts/update_readme.py --check     # changes nothing; exits with 1 if a table is stale
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from marlin_kernel import WEIGHT_TYPES, kernel_configs  # noqa: E402
from scripts.command_line import make_parser  # noqa: E402

RESULTS = ROOT / "docs" / "results"
SHOWN = {
    "full precision": "full precision",
    "round to nearest": "round to nearest",
    "GPTQ as first published": "GPTQ as first published (`configs/quantize/gptq.yaml`)",
    "Marlin": "Marlin's recipe (`configs/quantize/marlin.yaml`)",
    "all but shrinkage": "the default with `--shrinkage 0`",
    "fast": "**the default** (`configs/quantize/fast.yaml`)",
    "best": "learned scales (`configs/quantize/best.yaml`)",
}


def accuracy() -> str:
    content = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))
    found = {result["name"]: result for result in content["results"]}
    lines = [
        "| recipe | WikiText-2 PPL | KL | top-1 | C4 PPL | KL | code KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in SHOWN.items():
        wiki, c4, code = (found[name][text] for text in ("wiki", "C4", "code"))
        kl = [f"{part['kl']:.4f}" if "kl" in part else "" for part in (wiki, c4, code)]
        top1 = f"{100 * wiki['top1']:.1f} %" if "top1" in wiki else ""
        ppl = [f"{part['perplexity']:.2f}" for part in (wiki, c4)]
        lines.append(f"| {label} | {ppl[0]} | {kl[0]} | {top1} | {ppl[1]} | {kl[1]} | {kl[2]} |")
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


def large() -> str:
    """Models whose weights are random and made on the spot: only time and memory mean something."""
    lines = [
        "| model, recipe | layers timed | seconds | a layer | GPU memory | host memory |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("bench_quantize_llama2-*.json"), key=_size_first):
        content = json.loads(path.read_text(encoding="utf-8"))
        stem = re.sub(r"_\d+gpus$", "", path.stem)
        model, *recipe = stem.removeprefix("bench_quantize_llama2-").split("_")
        gpus = f", on {content['processes']} GPUs" if content["processes"] > 1 else ""
        later = content["seconds_of_each_layer"][1:]
        device, host = (content[f"peak_{side}_bytes"] / 2**30 for side in ("device", "host"))
        lines.append(
            f"| Llama-2-{model.upper()}, {RECIPES[' '.join(recipe)]}{gpus} "
            f"| {content['layers']} of {content['layers_of_model']} | {content['seconds']:.1f} "
            f"| {sum(later) / len(later):.2f} | {device:.1f} GiB | {host:.1f} GiB |"
        )
    where = content["environment"]
    lines.append(
        f"\n{where['gpu']}, torch {where['torch']}, {content['calibration_tokens']:,} calibration "
        "tokens, group size 128: `python scripts/bench_quantize.py --from_config "
        "configs/bench/llama2-7b.json --config configs/quantize/marlin.yaml --true-sequential`."
    )
    return "\n".join(lines)


RECIPES = {
    "marlin": "Marlin's recipe in one pass (`--true-sequential`)",
    "marlin twopass": "Marlin's recipe as published",
    "marlin offload": "Marlin's recipe in one pass, `--offload_activations`",
    "fast": "the default",
    "sparse": "2:4 pruning and rounding (`configs/quantize/sparse.yaml`)",
}


def _size_first(path: Path) -> tuple[int, str]:
    return int(re.search(r"-(\d+)b", path.stem)[1]), path.stem


def kernels() -> str:
    lines = [
        "| tokens | FP16: faster than torch.matmul | least | times the read floor | most "
        "| BF16: faster than torch.matmul | least |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = {dtype: _bench(dtype) for dtype in ("float16", "bfloat16")}
    for m in sorted({row["m"] for row in measured["bfloat16"]["rows"]}):
        faster, floor = {}, []
        for dtype, content in measured.items():
            rows = [row for row in content["rows"] if row["m"] == m]
            faster[dtype] = [row["cublas"] / row["us"] for row in rows]
            floor = floor or [row["us"] / row["floor"] for row in rows]
        cells = [f"{geometric_mean(f):.2f}x | {min(f):.2f}x" for f in faster.values()]
        cells.insert(1, f"{geometric_mean(floor):.2f} | {max(floor):.2f}")
        lines.append(f"| {m} | {' | '.join(cells)} |")
    where = [content["circumstances"] for content in measured.values()]
    commits = " and ".join(dict.fromkeys(w["commit"] for w in where))
    lines.append(
        f"\n{where[0]['gpu'].split(',')[0]}, torch {where[0]['torch']}, group size 128, geometric "
        f"means over eight layer shapes of Llama-2 7B and 70B, at commit {commits}: "
        + " and ".join(f"`python {w['command']}`" for w in where)
        + "."
    )
    return "\n".join(lines)


def _bench(dtype: str) -> dict:
    path = RESULTS / f"bench_h200_{dtype}_g128.json"
    return json.loads(path.read_text(encoding="utf-8"))


def types() -> str:
    """Of every weight type with a tuned table, its times against torch.matmul's of `kernels`."""
    tokens = (1, 4, 16, 64, 256, 1024)
    lines = [
        f"| weights, by tokens | {' | '.join(map(str, tokens))} |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    for name, weight_type in WEIGHT_TYPES.items():
        path = kernel_configs.tuning_path("h200", name, weight_type.activations[0])
        if name == "uint4b8" or not path.is_file():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        dense = {(r["k"], r["n"], r["m"]): r["cublas"] for r in _bench(table["dtype"])["rows"]}
        cells = [f"{name}, {'one group' if (g := table['group_size']) < 0 else f'groups of {g}'}"]
        cells[0] += ", BF16" if weight_type.activations[0] == "bfloat16" else ""
        for m in tokens:
            times = [
                (dense[row["k"], row["n"], m], choice["us"])
                for row in table["rows"]
                for choice in row["choices"]
                if choice["m"] == m and choice["us"] and (row["k"], row["n"], m) in dense
            ]
            faster = [matmul / us for matmul, us in times]
            cells.append(f"{geometric_mean(faster):.2f}x ({min(faster):.2f}x)" if faster else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        "\nFaster than torch.matmul (least), geometric means over the same shapes: the tuned "
        "tables' times (`python scripts/tune.py --type NAME`) against torch.matmul's of the table "
        "above."
    )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "quantize": quantize,
    "large": large,
    "kernels": kernels,
    "types": types,
}


def main() -> int:
    """Write the README. Returns the process exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = text = path.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        table = make()
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}, expected 1")
    if options.check:
        print("README.md " + ("is up to date" if text == before else "has stale tables"))
        return int(text != before)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
