"""Write tables of the README and of docs from docs/results, so that no number is typed by hand.

python scripts/update_readme.py             # what stands between <!-- table: NAME --> marks
python scripts/update_readme.py --check     # changes nothing; exits with 1 if a table is stale
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from marlin_kernel import WEIGHT_TYPES  # noqa: E402
from scripts.command_line import make_parser  # noqa: E402

RESULTS = ROOT / "docs" / "results"
# Rows of the accuracy table: name in the file, what the README calls it
SHOWN = {
    "full precision": "full precision",
    "round to nearest": "round to nearest",
    "GPTQ as first published": "GPTQ as first published (`configs/quantize/gptq.yaml`)",
    "Marlin": "Marlin's recipe (`configs/quantize/marlin.yaml`)",
    "GPTQ of llm-compressor": "GPTQ of {version}",
    "AutoRound, 200 iterations": "{version}, 200 iterations (learned rounding)",
    "all but shrinkage": "the default with `--shrinkage 0`",
    "fast": "**the default** (`configs/quantize/fast.yaml`)",
    "best": "learned scales (`configs/quantize/best.yaml`)",
}
OTHERS = {
    "AutoRound, 200 iterations": "AutoRound has",
    "GPTQ of llm-compressor": "llm-compressor's GPTQ",
    "Marlin": "Marlin's own recipe",
    "round to nearest": "rounding",
}
SHAPES = "the eight fused linears of Llama-2 7B and 70B"


def _results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _accuracy() -> dict[str, dict]:
    """Rows by name; those of other quantizers come from a run of the same protocol."""
    peers = {r["name"]: r for r in _results("accuracy_peers.json")["results"] if "version" in r}
    return peers | {r["name"]: r for r in _results("accuracy.json")["results"]}


def summary() -> str:
    """The claims in one glance."""
    found, kl = _accuracy(), {}
    for name in ("fast", *OTHERS):
        kl[name] = found[name]["wiki"]["kl"]
    rows = _bench("float16")["rows"]

    def mean(column: str, m: int) -> float:
        return geometric_mean([r[column] / r["us"] for r in rows if r["m"] == m])

    few, many = mean("cublas", 1), mean("cublas", 1024)
    slow = [str(m) for m in sorted({r["m"] for r in rows if r["cublas"] < 0.99 * r["us"]})]
    listed = " and ".join(filter(None, (", ".join(slow[:-1]), *slow[-1:])))
    losing = f"At {listed} tokens some shapes lose" if listed else "None loses"
    losing += " to torch.matmul"
    generated = _results("generate_h200.json")["runs"][0]
    decode = {
        r["model"]: r["ms_per_token"]
        for r in generated["rows"]
        if (r["batch"], r["variant"]) == (1, "compile")
    }
    pdl = " with dependent launch" if generated["circumstances"]["options"].get("pdl") else ""
    layers = _results("bench_quantize_llama2-7b_fast.json")["seconds_of_each_layer"][1:]
    cpu = _results("bench_quantize_fast.json")["seconds"]["quantize"]
    lines = [
        f"- **Accurate**: a KL divergence of {kl['fast']:.3f} from the original on SmolLM2-135M; "
        + ", ".join(f"{label} {kl[name]:.3f}" for name, label in OTHERS.items())
        + ", in the same format and with the same calibration text ([Accuracy](#accuracy)).",
        f"- **Fast to serve**: for one token a 4-bit linear is {few:.1f} times as fast as "
        f"torch.matmul in FP16 and {mean('us_peer', 1):.2f} times as fast as the best public "
        f"kernel, for 1024 tokens {many:.2f} and {mean('us_peer', 1024):.2f} times, on an H200. A "
        f"model of Llama-2-7B's sizes decodes in {decode['packed']:.2f} instead of "
        f"{decode['plain']:.2f} ms a token (torch.compile{pdl}). {losing} ([Speed](#speed)).",
        f"- **Fast to make**: {sum(layers) / len(layers):.1f} s for a decoder layer of "
        f"Llama-2-7B's sizes on an H200; all of SmolLM2-135M in {cpu:.0f} s on two CPU cores "
        "([Time and memory](#time-and-memory-of-quantizing)).",
    ]
    return "\n".join(lines)


def accuracy() -> str:
    content, found = _results("accuracy.json"), _accuracy()
    lines = [
        "| recipe | WikiText-2 PPL | KL | top-1 | C4 PPL | KL | code KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in SHOWN.items():
        wiki, c4, code = (found[name][text] for text in ("wiki", "C4", "code"))
        kl = [f"{part['kl']:.4f}" if "kl" in part else "" for part in (wiki, c4, code)]
        top1 = f"{100 * wiki['top1']:.1f} %" if "top1" in wiki else ""
        ppl = [f"{part['perplexity']:.2f}" for part in (wiki, c4)]
        label = label.format(version=found[name].get("version"))
        lines.append(f"| {label} | {ppl[0]} | {kl[0]} | {top1} | {ppl[1]} | {kl[1]} | {kl[2]} |")
    where, commit = content["environment"], content["commit"]
    device = where.get("gpu", "a CPU")
    lines.append(
        f"\n{device}, torch {where['torch']}, transformers {where['transformers']}, commits "
        f"{commit}: `{content['command']}`."
    )
    return "\n".join(lines)


# What the default is made of: the row of accuracy.json without it, and what it does
INGREDIENTS = {
    "all but asymmetric calibration": "**Asymmetric calibration.** Each linear is fitted to the "
    "outputs of the *unquantized* model, given the inputs that the *quantized* model feeds it, and "
    "the error already in the residual stream is part of the target. The least-squares solution "
    "moves the target; the rest is ordinary GPTQ on it (`gptq/solver.py`, `_target_move`; after "
    "GPTAQ, arXiv 2504.02692)",
    "all but signed scales": "**Signed scales**: a symmetric 4-bit grid has 16 levels, one more on "
    "its negative side; a negative scale puts the extra level where the larger weight is",
    "all but clipping": "**Hessian-weighted clipping** of every group, as in Marlin",
    "all but shrinkage": "**Shrinkage**: a tenth of the correlations between inputs is left out, "
    "since they differ from text to text more than the energies of single inputs do",
    "all but act-order": "**Activation order with static groups**: the important inputs are "
    "rounded first, at no run-time cost",
    "all but refit and sweep": "**After rounding**, scales are refitted by least squares, and "
    "codes that no longer fit are moved",
}


def ingredients() -> str:
    """What the default's stages gain, largest first."""
    found, texts = _accuracy(), ("wiki", "C4", "code")

    def losses(name: str) -> list[float]:
        return [found[name][text]["kl"] for text in texts]

    def shown(name: str) -> str:
        return " / ".join(f"{kl:.3f}" for kl in losses(name))

    order = sorted(INGREDIENTS, key=lambda name: -sum(losses(name)))
    lines = [f"KL on WikiText-2 / C4 / code is {shown('fast')} with all of them.", ""]
    lines += [
        f"{number}. {INGREDIENTS[name]}. Without it: {shown(name)}."
        for number, name in enumerate(order, 1)
    ]
    return "\n".join(lines)


def quantize() -> str:
    runs = [_results(f"bench_quantize_{recipe}.json") for recipe in ("fast", "marlin")]
    rows = {
        "quantize, from reading to the packed folder": _seconds("quantize"),
        "of it forward passes": _seconds("quantize_forward"),
        "of it Hessian and target products": _seconds("quantize_hessian"),
        "of it solver": _seconds("quantize_solve"),
        "over two forward passes + the same products": lambda run: (
            f"{run['ratio_with_target_products']:.2f}x"
        ),
        "over two forward passes + Hessians alone": lambda run: f"{run['ratio']:.2f}x",
        "peak memory beyond torch itself": lambda run: (
            f"{run['peak_bytes_over_torch'] / 1e9:.2f} GB"
        ),
    }
    lines = ["| | the default | Marlin's recipe |", "|---|---|---|"]
    for label, shown in rows.items():
        lines.append(f"| {label} | {' | '.join(shown(run) for run in runs)} |")
    where = runs[0]["environment"]
    commits = " and ".join(dict.fromkeys(run["commit"] for run in runs))
    for peer in runs[0]["peers"].values():
        lines.append(f"| {peer['version']} (GPTQ), in the same run | {peer['seconds']:.0f} s | |")
    lines.append(
        f"\n{runs[0]['calibration_tokens']:,} calibration tokens, {where['threads']} CPU threads, "
        f"torch {where['torch']}, commit {commits}: `{runs[0]['command']}`, and with `--config "
        "configs/quantize/marlin.yaml`."
    )
    return "\n".join(lines)


def _seconds(of: str) -> Callable[[dict], str]:
    return lambda run: f"{run['seconds'][of]:.0f} s"


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
        'tokens, group size 128. Seconds are those of the layers timed; "a layer" leaves out the '
        "first, which waits for libraries, kernels and pinned memory. Weights are random. Command "
        "and commit of each row: `docs/results/bench_quantize_*.json`; of the second: `python "
        "scripts/bench_quantize.py --from_config configs/bench/llama2-7b.json --config "
        "configs/quantize/marlin.yaml --true-sequential`."
    )
    return "\n".join(lines)


RECIPES = {
    "marlin": "Marlin's recipe in one pass (`--true-sequential`)",
    "marlin twopass": "Marlin's recipe as published",
    "marlin offload": "Marlin's recipe in one pass, `--offload_activations`",
    "fast": "the default",
    "fp8": "8-bit floats (`configs/quantize/fp8.yaml`)",
    "nvfp4": "NVFP4 (`configs/quantize/nvfp4.yaml`)",
    "sparse": "2:4 pruning and rounding (`configs/quantize/sparse.yaml`)",
}


def _size_first(path: Path) -> tuple[int, str]:
    return int(re.search(r"-(\d+)b", path.stem)[1]), path.stem


def kernels() -> str:
    lines = [
        "| tokens | FP16: times as fast as torch.matmul | as the best public kernel | as Humming, "
        "same run | BF16: as torch.matmul | FP16: time over the read floor |",
        "|---|---|---|---|---|---|",
    ]
    half, brain = (_bench(dtype) for dtype in ("float16", "bfloat16"))
    beside = _results("bench_h200_float16_peers.json")
    for m in sorted({row["m"] for row in half["rows"]}):
        rows, others, same = ([r for r in c["rows"] if r["m"] == m] for c in (half, brain, beside))
        floor = [r["us"] / r["floor"] for r in rows]
        cells = [
            _mean_and_least([r["cublas"] / r["us"] for r in rows]),
            _mean_and_least([r["us_peer"] / r["us"] for r in rows]),
            _mean_and_least([r["us_peer"] / r["us"] for r in same]),
            _mean_and_least([r["cublas"] / r["us"] for r in others]),
            f"{geometric_mean(floor):.2f} ({max(floor):.2f})",
        ]
        lines.append(f"| {m} | {' | '.join(cells)} |")
    where = [content["circumstances"] for content in (half, beside, brain)]
    commits = " and ".join(dict.fromkeys(w["commit"] for w in where))
    names = sorted({PEERS[r["peer"]] for r in half["rows"]})
    lines.append(
        f"\nGeometric means over {SHAPES}, in brackets the worst of them. Public kernels: of every "
        f"entry the fastest of {', '.join(names)}, measured before under the same protocol, but "
        f"without rests before many tokens (`docs/results/h200_peers.csv`). Humming: "
        f"{beside['peers']['humming']} with the configuration that it chooses, beside our kernel "
        "in a run of their own, without rests either. The read floor is a kernel that only reads "
        f"the same bytes. {where[0]['gpu'].split(',')[0]}, torch {where[0]['torch']}, "
        f"group size 128, commit {commits}: "
        + ", ".join(f"`python {w['command']}`" for w in where)
        + "."
    )
    return "\n".join(lines)


PEERS = {
    "humming": "Humming",
    "humming-best": "Humming",
    "machete": "Machete",
    "machete-best": "Machete",
    "marlin-nohint": "Marlin",
    "tinygemm": "tinygemm",
    "vllm-marlin": "vLLM-Marlin",
}


def _mean_and_least(ratios: list[float]) -> str:
    """Empty if there are none."""
    return f"{geometric_mean(ratios):.2f}x ({min(ratios):.2f}x)" if ratios else ""


def _bench(dtype: str) -> dict:
    path = RESULTS / f"bench_h200_{dtype}_g128.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _types() -> list[dict]:
    """Times of weight types on Hopper, and of torch.matmul beside them."""
    files = sorted(path.name for path in RESULTS.glob("types_sm90_h200_*.json"))
    return [_results(name) for name in files]


def types() -> str:
    """Of every weight type its times against torch.matmul's of the same run."""
    contents = _types()
    rows = [row for content in contents for row in content["rows"]]
    tokens = (1, 4, 16, 64, 256, 1024, 4096)
    lines = [
        f"| weights, by tokens | {' | '.join(map(str, tokens))} |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    dense, kinds = {}, {}
    for row in rows:
        problem = (row["k"], row["n"], row["m"])
        if row["weight_type"] == "torch.matmul":
            dense[(row["activation"], *problem)] = row["us"]
        elif not row.get("act_order", True):
            kind = (row["weight_type"], row["activation"], row["group_size"])
            kinds.setdefault(kind, {}).setdefault(row["m"], []).append((problem, row["us"]))
    order = list(WEIGHT_TYPES)
    for kind in sorted(kinds, key=lambda kind: order.index(kind[0])):
        name, activation, group_size = kind
        cells = [f"{name}, {'one group' if group_size < 0 else f'groups of {group_size}'}"]
        cells[0] += ", BF16" if activation == "bfloat16" else ""
        for m in tokens:
            ratios = [dense[(activation, *problem)] / us for problem, us in kinds[kind][m]]
            cells.append(_mean_and_least(ratios))
        lines.append(f"| {' | '.join(cells)} |")
    where = [content["circumstances"] for content in contents]
    commits = " and ".join(dict.fromkeys(w["commit"] for w in where))
    lines.append(
        f"\nTimes as fast as torch.matmul in the dtype of the activations, FP16 unless said: "
        f"geometric means over {SHAPES}, in brackets the worst. "
        f"{where[0]['gpu'].split(',')[0]}, torch {where[0]['torch']}, commit {commits}: "
        + ", ".join(f"`python {w['command']}`" for w in where)
        + "."
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Duel:
    """Times against those of other kernels.

    rows: (K, N, M, us, theirs in the same run); peers: (kernel, dtype) in h200_peers.csv, the
    fastest of any group size, where the rows do not have theirs.
    """

    ours: str
    theirs: str
    rows: list[tuple[int, int, int, float, float | None]]
    peers: tuple[tuple[str, str], ...] = ()


def _duels() -> list[Duel]:
    four_bit = _results("w4a8_h200.json")["rows"]
    others = [row for content in _types() for row in content["rows"]]
    sparse = _results("sparse_marlin_h200.json")["rows"]
    kernels = _results("sparse_fp8_h200.json")["rows"]
    scaled = {(r["kernel"], r["k"], r["n"], r["m"]): r["us"] for r in kernels}

    def ours(
        rows: list[dict], dense: str = "", **wanted: object
    ) -> list[tuple[int, int, int, float, float | None]]:
        """Of `rows` those that have what is wanted; dense: of them, the time of another kernel."""
        chosen = [row for row in rows if wanted.items() <= row.items()]
        return [
            (row["k"], row["n"], row["m"], row["us"], row.get(dense))
            for row in chosen
            if not dense or dense in row
        ]

    def wide(weight_type: str) -> list[tuple[int, int, int, float, None]]:
        kind = {"weight_type": weight_type, "activation": "float16", "act_order": False}
        return ours(others, group_size=128, **kind)

    def beside(theirs: str) -> list[tuple[int, int, int, float, float]]:
        return [
            (*problem, us, scaled[(theirs, *problem)])
            for (kernel, *problem), us in scaled.items()
            if kernel == "ours_sparse_token-channel"
        ]

    int8 = {"weight_type": "uint4b8", "activation": "int8", "group_size": 0}
    fp8 = {"weight_type": "uint4b8", "activation": "float8_e4m3fn", "group_size": 128}
    vllm, scaled_mm = ("vllm-marlin", "vLLM-Marlin"), "`torch._scaled_mm`, dense"
    machete = ("machete", "w8a16-int8"), ("machete-best", "w8a16-int8")
    int8_peers = ("humming", "w4a8-int8"), (vllm[0], "w4a8-int8")
    fp8_peers = ("humming", "w4a8-fp8"), ("vllm-cutlass-w4a8", "w4a8-fp8")
    fp8_exact = ours(four_bit, "us_scaled_mm_slow", **fp8)
    four_sparse, sparse_peer = ours(sparse, bits=4), (("sparse-marlin-2:4", "sp-w4a16"),)
    return [
        Duel("uint8b128 x FP16", vllm[1], wide("uint8b128"), ((vllm[0], "w8a16-int8"),)),
        Duel("uint8b128 x FP16", "Machete", wide("uint8b128"), machete),
        Duel("float8_e4m3fn x FP16", vllm[1], wide("float8_e4m3fn"), ((vllm[0], "w8a16-fp8"),)),
        Duel("uint4b8 x INT8", "Humming, vLLM-Marlin", ours(four_bit, **int8), int8_peers),
        Duel("uint4b8 x INT8", "`torch._int_mm`, dense", ours(four_bit, "us_int_mm", **int8)),
        Duel("uint4b8 x FP8", "CUTLASS of vLLM, Humming", ours(four_bit, **fp8), fp8_peers),
        Duel("uint4b8 x FP8", f"{scaled_mm}, exact sums", fp8_exact),
        Duel("uint4b8 2:4 x FP16", "sparse Marlin", four_sparse, sparse_peer),
        Duel("FP8 2:4 x FP8", "cuSPARSELt", beside("cusparselt")),
        Duel("FP8 2:4 x FP8", f"{scaled_mm}, row-wise", beside("torch_fp8_token-channel")),
    ]


def peers() -> str:
    """Types and operands beside 4-bit weights with 16-bit activations, against other kernels."""
    tokens = (1, 4, 16, 64, 256, 1024, 4096)
    best: dict[tuple, float] = {}
    with (RESULTS / "h200_peers.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sizes = (int(row["K"]), int(row["N"]), int(row["M"]))
            key = (row["kernel"], row["dtype"], *sizes)
            best[key] = min(best.get(key, math.inf), float(row["us_median_of_passes"]))
    lines = [
        f"| weights x activations | against, by tokens | {' | '.join(map(str, tokens))} |",
        "|---" * (len(tokens) + 2) + "|",
    ]
    for duel in _duels():
        ratios: dict[int, list[float]] = {m: [] for m in tokens}
        for k, n, m, us, beside in duel.rows:
            theirs = [best[(*peer, k, n, m)] for peer in duel.peers if (*peer, k, n, m) in best]
            theirs += [beside] if beside is not None else []
            if theirs and m in ratios:
                ratios[m].append(min(theirs) / us)
        cells = [_mean_and_least(found) for found in ratios.values()]
        lines.append(f"| {duel.ours} | {duel.theirs} | {' | '.join(cells)} |")
    lines.append(
        f"\nTimes as fast as the fastest of the kernels named: geometric means over {SHAPES}, in "
        "brackets the worst; empty: not measured. uint4b8 x "
        "INT8 has one group of weights per column, FP8 2:4 one scale per token and feature, the "
        "others have groups of 128; other kernels count with whichever group size is faster. "
        "torch's products and cuSPARSELt ran beside ours, the others before: "
        "`docs/results/h200_peers.csv`. Ours: `types_sm90_h200_*.json`, `w4a8_h200.json`, "
        "`sparse_marlin_h200.json` and `sparse_fp8_h200.json` there. All on an H200, torch 2.11."
    )
    return "\n".join(lines)


def _grid(rows: list[dict], columns: Mapping[str, Callable[[list[dict]], str]]) -> list[str]:
    """Lines of a table: microseconds `us` by tokens and shape, then columns made of all of them."""
    shapes = list(dict.fromkeys((row["k"], row["n"]) for row in rows))
    head = ["M", *(f"{k}x{n}" for k, n in shapes), *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for m in sorted({row["m"] for row in rows}):
        mine = {(row["k"], row["n"]): row for row in rows if row["m"] == m}
        cells = [f"{mine[shape]['us']:.4g}" for shape in shapes]
        cells += [make(list(mine.values())) for make in columns.values()]
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return lines


def _ratio(over: str, under: str, worst: Callable = min) -> Callable[[list[dict]], str]:
    def cell(rows: list[dict]) -> str:
        found = [row[over] / row[under] for row in rows if over in row and under in row]
        return f"{geometric_mean(found):.2f} ({worst(found):.2f})" if found else ""

    return cell


def sparse_marlin(bits: int) -> str:
    """2:4 Marlin beside reading its bytes, the dense kernel and sparse Marlin."""
    content = _results("sparse_marlin_h200.json")
    rows = [row for row in content["rows"] if row["bits"] == bits]
    columns = {"x floor (worst)": _ratio("us", "floor", max)}
    if bits == 4:
        columns["x dense (least)"] = _ratio("us_dense", "us")
        columns["x sparse Marlin (least)"] = _ratio("us_peer", "us")
    where = content["circumstances"]
    return "\n".join(_grid(rows, columns)) + (
        f"\n\n{where['gpu'].split(',')[0]}, torch {where['torch']}, commit {where['commit']}: "
        f"`python {where['command']}`."
    )


def scaled(dtype: str) -> str:
    """Products of 8-bit operands beside torch's and cuSPARSELt's, all of one run."""
    content = _results(f"sparse_{dtype}_h200.json")
    times: dict[tuple, dict[str, float]] = {}
    for row in content["rows"]:
        times.setdefault((row["m"], row["k"], row["n"]), {})[row["kernel"]] = row["us"]

    def fastest(found: dict[str, float], family: str) -> dict[str, float]:
        us = [t for name, t in found.items() if name.startswith(family) and "bias" not in name]
        return {family: min(us)} if us else {}

    rows = [
        {"m": m, "k": k, "n": n}
        | {name: us for f in ("ours_sparse", "ours_dense", f"torch_{dtype}", "cusparselt")
           for name, us in fastest(found, f).items()}
        for (m, k, n), found in times.items()
    ]  # fmt: skip
    torch_name = {"fp8": "torch's FP8", "int8": "`torch._int_mm`"}[dtype]
    parts = []
    for label, ours, others in (
        ("2:4 sparse", "ours_sparse", {"cuSPARSELt": "cusparselt", torch_name: f"torch_{dtype}"}),
        ("Dense", "ours_dense", {torch_name: f"torch_{dtype}"}),
    ):
        mine = [row | {"us": row[ours]} for row in rows]
        columns = {f"x {name} (least)": _ratio(key, "us") for name, key in others.items()}
        parts.append("\n".join([f"{label}:\n", *_grid(mine, columns)]))
    parts.append(
        f"{content['gpu'].split(',')[0]}, torch {content['torch']}, commit {content['commit']}; "
        "the faster of one scale and scales per token and feature, without bias: "
        f"`{content['command']}`."
    )
    return "\n\n".join(parts)


def sweep(half_sums: bool) -> str:
    """Every kind of product that benchmark_marlin.py times; half_sums: those that add in FP16."""
    contents = [_results(path.name) for path in sorted(RESULTS.glob("benchmark_marlin_*.json"))]
    repacking, kinds = {}, {}
    for row in (row for content in contents for row in content["rows"]):
        if row["speedup"] is None:
            repacking.setdefault(row["what"].removeprefix("repack "), []).append(row["us"])
        elif row["what"] != "torch.matmul" and row["what"].endswith("-reduce16") == half_sums:
            kinds.setdefault(row["what"], {}).setdefault(row["m"], []).append(row["speedup"])
    tokens = sorted({m for times in kinds.values() for m in times})
    lines = [f"| | {' | '.join(f'M = {m}' for m in tokens)} | repacking |"]
    lines.append(f"|---|{'---|' * (len(tokens) + 1)}")
    for kind, times in kinds.items():
        cells = [_mean_and_least(times[m]) for m in tokens]
        repack = f"{geometric_mean(repacking[kind]):.0f} us" if kind in repacking else ""
        lines.append(f"| `{kind}` | {' | '.join(cells)} | {repack} |")
    where = contents[0]["circumstances"]
    commits = " and ".join(dict.fromkeys(c["circumstances"]["commit"] for c in contents))
    lines.append(
        f"\n{where['gpu'].split(',')[0]}, torch {where['torch']}, commit {commits}; two of four "
        f"shapes beside each other, on a GPU each, one by `python {where['command']}`."
    )
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "summary": summary,
        "accuracy": accuracy,
        "ingredients": ingredients,
        "quantize": quantize,
        "large": large,
        "kernels": kernels,
        "types": types,
        "peers": peers,
    },
    "docs/sparsity.md": {
        "sparse_marlin 4 bits": partial(sparse_marlin, 4),
        "sparse_marlin 8 bits": partial(sparse_marlin, 8),
        "scaled fp8": partial(scaled, "fp8"),
        "scaled int8": partial(scaled, "int8"),
    },
    "docs/weight-types.md": {
        "sweep": partial(sweep, False),
        "sweep of sums in FP16": partial(sweep, True),
    },
}


def main() -> int:
    """Write the files of TABLES. Returns the process exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    stale = 0
    for file, tables in TABLES.items():
        path = ROOT / file
        before = text = path.read_text(encoding="utf-8")
        for name, make in tables.items():
            pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            table = make()
            text, count = re.subn(
                pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
            )
            if count != 1:
                raise SystemExit(f"{file} has {count} places for the table {name!r}, expected 1")
        if options.check:
            print(f"{file} " + ("is up to date" if text == before else "has stale tables"))
            stale += text != before
        else:
            path.write_text(text, encoding="utf-8")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
