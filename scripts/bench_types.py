"""Time every weight and activation type beside torch.matmul in the dtype of the outputs.

    python scripts/bench_types.py --json docs/results/types.json
    python scripts/bench_types.py --paths sm90 --json docs/results/types_sm90.json
    python scripts/bench_types.py --act_order --json docs/results/act_order.json --table H200.json

--act_order times uint4b8, FP16, group size 128 on Hopper with and without act-order side by side,
each way of gathering the activations included: inside the small-batch kernel and in front. --table
writes the fastest ones, which kernel_configs.act_order_path names the place for.

On Hopper 16-bit activations have two paths: "sm80" (mma.sync) and "sm90" (wgmma), with a
kernel that only reads the same bytes (scripts/bench.py, read_floor) as the yardstick of the second.
Protocol of gpu_timing: CUDA-graph replay, every launch on another copy of the weights. Activations
of 8 bits are timed as quantized ones; quantizing them is a row of its own. Results are checked in
tests/test_marlin_gpu_types.py, and roughly here, before they are timed. 8-bit activations by wgmma
on Hopper have a benchmark of their own: scripts/bench_w4a8.py.

Up to 64 tokens everything, the floor too, is timed a second time after the larger numbers, and the
faster time counts: for seconds at a time an H200 takes an eighth longer to read the same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from bench import read_floor
from torch import Tensor

from marlin_kernel import (
    WEIGHT_TYPES,
    formats,
    kernel_configs,
    launch,
    sm80_layout,
    sm80_path,
    sm90_layout,
)
from marlin_kernel.compiler import KernelSource
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.layout import packed_shape
from marlin_kernel.packing import pack
from marlin_kernel.repack import repack, unpack_source
from marlin_kernel.sm80_layout import KernelTensors
from scripts.command_line import command, make_parser, require_gpu, shape, write_json
from scripts.gpu_timing import (
    REST_OPTION,
    ROTATE_BYTES,
    RotatingWeights,
    circumstances,
    compile_first,
    graph_time,
    launch_count,
    let_rest,
)

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [*map(shape, yaml.safe_load((ROOT / "configs/bench/anchors.yaml").read_text())["shapes"])]
PROBED_SHAPES = ((4096, 4096), (8192, 8192))  # of launches in front that gather
ORDERED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ALTERNATIVES = 10  # kernels that gather, and others, timed beside the chosen one
TUNED_TOKENS = 64  # beside which others are timed
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
PASSES = (TOKENS, [m for m in TOKENS if m <= 64])  # of timing
EIGHT_BIT = ("int8", "float8_e4m3fn")
PATHS = {"sm80": sm80_layout, "sm90": sm90_layout}
# weight type, activation, output, group size, act-order
CASES = (
    ("uint4b8", "float16", "float16", 128, False),
    ("uint4b8", "float16", "float16", 128, True),
    ("uint4", "float16", "float16", 128, False),
    ("uint4_hqq", "float16", "float16", 64, False),
    ("uint8b128", "float16", "float16", 128, False),
    ("uint8b128", "float16", "float16", -1, False),
    ("uint8", "float16", "float16", 128, False),
    ("float8_e4m3fn", "float16", "float16", -1, False),
    ("float8_e4m3fn", "float16", "float16", 128, False),
    ("nvfp4", "float16", "float16", 16, False),
    ("nvfp4", "bfloat16", "bfloat16", 16, False),
    ("mxfp4", "bfloat16", "bfloat16", 32, False),
    ("uint8b128", "bfloat16", "bfloat16", 128, False),
    ("uint8", "bfloat16", "bfloat16", 128, False),
    ("float8_e4m3fn", "bfloat16", "bfloat16", 128, False),
    ("uint4b8", "int8", "float16", 128, False),
    ("uint4b8", "int8", "float16", -1, False),
    ("uint4", "int8", "float16", 128, False),
    ("uint8b128", "int8", "float16", -1, False),
    ("uint4b8", "float8_e4m3fn", "float16", 128, False),
    ("float8_e4m3fn", "float8_e4m3fn", "float16", -1, False),
)
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def copies_of(held: KernelTensors) -> list[KernelTensors]:
    """The layer in so many places that none of its weights is in the L2 cache when it is read."""
    names = ("weights", "scales", "zeros")
    tensors = {name: getattr(held, name) for name in names if getattr(held, name) is not None}
    nbytes = sum(t.nbytes for t in tensors.values())
    rest = {"perm": held.perm, "global_scale": held.global_scale, "group_size": held.group_size}
    return [
        KernelTensors(**{"zeros": None} | {n: t.clone() for n, t in tensors.items()} | rest)
        for _ in range(max(2, -(-ROTATE_BYTES // nbytes)))
    ]


def product(
    path: str,
    held: KernelTensors,
    a: Tensor,
    out: Tensor,
    weight_type: str,
    token_scales: Tensor | None,
) -> None:
    n = out.shape[1]
    if path == "sm90":
        launch.gemm(
            *(a, held.weights, held.scales, None, out, a.shape[1], n),
            *(held.k_padded, -(-n // 64) * 64, held.group_size or -1),
            weight_type=weight_type,
            global_scale=held.global_scale,
            perm=held.perm,
        )
        return
    sm80_path.gemm(
        *(a, held.weights, held.scales, None, out, a.shape[1], out.shape[1]),
        *(held.k_padded, held.n_padded, held.group_size),
        weight_type=weight_type,
        zeros=held.zeros,
        perm=held.perm,
        token_scales=token_scales,
        global_scale=held.global_scale,
    )


def layer_of(case: tuple[str, str, str, int, bool], k: int, n: int) -> QuantizedLinear:
    name, _, _, group_size, act_order = case
    weight = torch.randn(k, n, device="cuda") / k**0.5
    layer = QuantizedLinear.quantize(weight, WEIGHT_TYPES[name], group_size)
    if not act_order:
        return layer
    order = torch.randperm(k, device="cuda")
    g_idx = torch.empty(k, dtype=torch.int32, device="cuda")
    g_idx[order] = (torch.arange(k, device="cuda") // group_size).int()
    return QuantizedLinear.of(layer.codes, layer.scales, layer.weight_type, group_size, g_idx=g_idx)


def measure(
    case: tuple[str, str, str, int, bool], k: int, n: int, path: str, rest: float
) -> list[dict]:
    name, activation, output, group_size, act_order = case
    layer = layer_of(case, k, n)
    dense = layer.dequantize(torch.float32)
    copies = copies_of(PATHS[path].kernel_tensors(formats.write(layer, "marlin"), layer.spec))
    torch.cuda.synchronize()
    time.sleep(rest)  # what made the layer has lowered the clock
    floor = math.inf
    times = dict.fromkeys(TOKENS, math.inf)
    for tokens in PASSES:
        if path == "sm90":
            yardstick = RotatingWeights.make(k, n, copies[0].group_size or -1, weight_type=name)
            floor = min(floor, read_floor(yardstick.nbytes, yardstick.copies, True))
            del yardstick
        for m in tokens:
            a = torch.randn(m, k, device="cuda", dtype=DTYPES[output])
            out, scales, operand = a.new_empty(m, n), None, a
            if activation in EIGHT_BIT:
                dtype = DTYPES[activation]
                operand, scales = sm80_path.quantize_activations(a, dtype, copies[0].k_padded)
            product(path, copies[0], operand, out, name, scales)
            error = float((out.float() - a.float() @ dense).norm() / (a.float() @ dense).norm())
            limit = 0.05 if scales is not None else 0.01
            assert error < limit, f"{case} at {k} x {n}, M={m}: error {error}"
            count = launch_count(m, len(copies))
            launches = [
                partial(product, path, held, operand, out, name, scales) for held in copies[:count]
            ]
            let_rest(m, rest)
            times[m] = min(times[m], graph_time(launches))
    return [
        {
            "weight_type": name,
            "activation": activation,
            "output": output,
            "group_size": group_size,
            "act_order": act_order,
            "k": k,
            "n": n,
            "m": m,
            "us": round(us, 2),
            "path": path,
            "read_floor_us": round(floor, 2) if path == "sm90" else None,
        }
        for m, us in times.items()
    ]


def sources(
    cases: Iterable[tuple[str, str, str, int, bool]], shapes: Iterable[tuple[int, int]]
) -> set[KernelSource]:
    """The products of the path "sm90", of 16-bit activations."""
    found = set()
    gpu = kernel_configs.gpu_key(torch.cuda.get_device_name())
    for name, _, output, group_size, act_order in cases:
        select = kernel_configs.select_for_act_order if act_order else kernel_configs.select_config
        for (k, n), m in itertools.product(shapes, TOKENS):
            sizes = (m, k // 64, n // 64, group_size)
            config = select(*sizes, gpu=gpu, weight_type=name, dtype=output)
            found.add(config.source(output, group_size, name))
    return found


def baseline(k: int, n: int, dtype: str, rest: float) -> list[dict]:
    """torch.matmul, the faster of both layouts of the weights."""
    copies = max(2, -(-ROTATE_BYTES // (2 * k * n)))
    w = [torch.randn(k, n, device="cuda", dtype=DTYPES[dtype]) for _ in range(copies)]
    times = dict.fromkeys(TOKENS, math.inf)
    for m in itertools.chain(*PASSES):
        a = torch.randn(m, k, device="cuda", dtype=DTYPES[dtype])
        out = a.new_empty(m, n)
        for order in (lambda x: x, lambda x: x.view(n, k).T):
            let_rest(m, rest)
            launches = [partial(torch.mm, a, order(x), out=out) for x in w]
            times[m] = min(times[m], graph_time(launches))
    row = {"weight_type": "torch.matmul", "activation": dtype, "k": k, "n": n}
    return [row | {"m": m, "us": round(us, 2)} for m, us in times.items()]


def quantizing(k: int, n: int) -> list[dict]:
    """Rounding FP16 activations to INT8."""
    rows = []
    for m in TOKENS:
        a = torch.randn(m, k, device="cuda", dtype=torch.float16)
        launches = [partial(sm80_path.quantize_activations, a, torch.int8, k)] * 32
        row = {"weight_type": "quantize_activations", "activation": "int8", "k": k, "n": n, "m": m}
        rows.append(row | {"us": round(graph_time(launches), 2)})
    return rows


def repacking() -> list[dict]:
    """Packed codes of checkpoints to the Marlin layout, each launch with another source."""
    rows = []
    for k, n in ((4096, 4096), (8192, 57344)):
        shape = packed_shape(k, n, 128)
        sources = {"gptq": (k // 8, n), "awq": (k, n // 8), "compressed-tensors": (n, k // 8)}
        for source, size in sources.items():
            wtype = WEIGHT_TYPES["uint4" if source == "awq" else "uint4b8"]
            copies = max(2, -(-ROTATE_BYTES // (k * n // 2)))
            words = [
                torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device="cuda")
                for _ in range(copies)
            ]
            codes = unpack_source(words[0], source, k, n, 4)
            assert torch.equal(repack(words[0], source, wtype, shape), pack(codes, wtype))
            for order in (None, torch.randperm(k, device="cuda").int()):
                if source == "awq" and order is not None:
                    continue
                launches = [partial(repack, w, source, wtype, shape, perm=order) for w in words]
                rows.append(
                    {
                        "weight_type": f"repack {source}",
                        "act_order": order is not None,
                        "k": k,
                        "n": n,
                        "us": round(graph_time(launches), 2),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def act_order(sizes: Iterable[tuple[int, int]], rest: float) -> list[dict]:
    """With and without act-order, of layers of `sizes`.

    ratio: of the way that `launch.gemm` chooses to the product without act-order, the faster of two
    times each, in turn, with `rest` seconds before more than 64 tokens; ways: us of "front" (a
    launch that gathers), of other kernels behind such a launch and of small-batch kernels that
    gather; gather_us: that launch alone; front_us: both launches, for other shapes of the first.
    Results are compared with the product of gathered activations, bit for bit.
    """
    few = [m for m in ORDERED_TOKENS if m <= 64]  # first: large products lower the clock
    many = [m for m in ORDERED_TOKENS if m > 64]
    problems = [(k, n, m) for tokens in (few, many) for k, n in sizes for m in tokens]
    ways = {problem: _ways(*problem) for problem in problems}
    sources = {c.source("float16", 128) for found in ways.values() for c in found}
    sources |= {plan.source() for k, _, m in problems for plan in _gather_plans(m, k).values()}
    compile_first(sources)
    rows = []
    weights = None
    for k, n, m in problems:
        if weights is None or (weights.k, weights.n) != (k, n):
            weights = RotatingWeights.make(k, n, 128)
        perm = torch.randperm(k, device="cuda").int()
        a = torch.randn(m, k, device="cuda", dtype=torch.float16)
        gathered = a[:, perm.long()].contiguous()
        plain, front, chosen, *others = ways[k, n, m]

        def launches(config, a: Tensor, perm: Tensor | None, plan=None, weights=weights) -> list:
            out = a.new_empty(a.shape[0], weights.n)
            sizes = (weights.k, weights.n, weights.k, weights.n, 128)
            pairs = zip(weights.codes, weights.scales, strict=True)
            if plan is not None:
                return [
                    partial(_in_two_launches, config, a, perm, plan, *pair, None, out, *sizes)
                    for pair in pairs
                ]
            return [
                partial(launch.launch_config, config, a, *pair, None, out, *sizes, perm=perm)
                for pair in pairs
            ]

        def result(config, a: Tensor, perm: Tensor | None, launches=launches) -> Tensor:
            first = launches(config, a, perm)[0]
            first()
            return first.args[5]

        times = {}
        for config in (chosen, *others):
            same = replace(config, gathers=False) if config.gathers else config
            exact = torch.equal(result(config, a, perm), result(same, gathered, None))
            assert exact, f"{config} at {k} x {n}, M={m}"
            let_rest(m, rest)
            name = "front" if config == front else str(config)
            times[name] = round(graph_time(launches(config, a, perm)), 2)
        pairs = []
        for _ in range(2):
            let_rest(m, rest)
            before = graph_time(launches(plain, gathered, None))
            let_rest(m, rest)
            pairs.append((before, graph_time(launches(chosen, a, perm))))
        before, us = (min(both) for both in zip(*pairs, strict=True))
        us = times[next(iter(times))] = round(us, 2)
        row = {"k": k, "n": n, "m": m, "us": round(before, 2), "act_order_us": us}
        row |= {"ratio": round(us / before, 3), "chosen": next(iter(times)), "ways": times}
        if (k, n) in PROBED_SHAPES:
            row["front_us"] = {
                name: round(graph_time(launches(front, a, perm, plan)), 2)
                for name, plan in _gather_plans(m, k).items()
            }
        row["gather_us"] = round(graph_time([partial(launch.gather, a, perm)] * 32), 2)
        rows.append(row)
        best = min(times, key=times.get)
        shown = (
            f"{k} x {n} M={m}: {before:.2f} -> {us:.2f} ({us / before - 1:+.1%}), {row['chosen']}"
        )
        print(
            shown + (f"; best {times[best]:.2f} {best}" if best != row["chosen"] else ""),
            flush=True,
        )
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    """The fastest way for each number of tokens with several; "front" where it is within 1 %."""
    configs = map(kernel_configs.leaving_room, kernel_configs.supported_configs())
    found = {str(c): c for c in (*configs, *kernel_configs.gathering_configs())}
    table: dict[tuple[int, int], list[dict]] = {}
    for row in rows:
        ways = row["ways"]
        if len(ways) == 1:
            continue
        name = min(ways, key=ways.get)
        if ways["front"] <= 1.01 * ways[name]:
            name = "front"
        choice = {"m": row["m"], "us": ways[name], "kind": None, "config": None}
        if name != "front":
            kind = "decode" if isinstance(found[name], kernel_configs.DecodeConfig) else "gemm"
            choice |= {"kind": kind, "config": asdict(found[name])}
        table.setdefault((row["k"], row["n"]), []).append(choice)
    lines = []
    for (k, n), choices in sorted(table.items()):
        text = ",\n   ".join(map(json.dumps, choices))
        lines.append(f' {{"k": {k}, "n": {n}, "choices": [\n   {text}]}}')
    head = {
        "command": command("scripts/bench_types.py"),
        "weight_type": "uint4b8",
        "group_size": 128,
        "dtype": "float16",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def _in_two_launches(config, a: Tensor, perm: Tensor, plan, *rest) -> None:
    launch.launch_config(config, launch.gather(a, perm, plan), *rest)


def _gather_plans(m: int, k: int) -> dict[str, kernel_configs.GatherPlan]:
    """Shapes of the launch in front, by their blocks: of a token, and of different tokens."""
    plans = [kernel_configs.gather_plan(m, k, k, picks=True)] if m <= 8 else []
    plans += [
        kernel_configs.gather_plan(m, k, k, picks=False, threads=threads, blocks=blocks)
        for threads in (128, 256)
        for blocks in (1, 2, 4)
    ]
    if m > 512:
        plans += [replace(plans[0], grid=(1, blocks, 1)) for blocks in (132, 264, 1056)]
    return {
        f"{plan.grid[0]} x {plan.grid[1]} of {plan.threads}, {plan.rows} rows": plan
        for plan in plans
    }


def _ways(k: int, n: int, m: int) -> list[kernel_configs.KernelConfig]:
    """Without act-order; the same behind a launch that gathers; what is chosen; other ways."""
    sizes = (m, k // 64, n // 64)
    plain = kernel_configs.select_config(*sizes, 128)
    chosen = kernel_configs.select_for_act_order(*sizes, 128)
    front, others = plain, []
    if m <= TUNED_TOKENS:
        front = kernel_configs.leaving_room(plain)
        for configs in (kernel_configs.gathering_configs(), kernel_configs.supported_configs()):
            fitting = [c for c in configs if c.fits(m, k // 64, 128)]
            fitting.sort(key=lambda c: kernel_configs.estimate(c, *sizes))
            others += map(kernel_configs.leaving_room, fitting[:ALTERNATIVES])
    return [plain, front, chosen, *(c for c in dict.fromkeys([front, *others]) if c != chosen)]


def report(what: str, measured: list[dict], rows: list[dict]) -> None:
    """Print times in the order of TOKENS, and keep them."""
    rows += measured
    times = " ".join(f"{row['us']:8.2f}" for row in measured)
    floor = measured[0].get("read_floor_us")
    print(f"{what}: {times}" + (f"  read floor {floor}" if floor else ""), flush=True)
    torch.cuda.empty_cache()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--json", type=Path, help="JSON file for rows and circumstances")
    parser.add_argument(
        "--paths", nargs="+", choices=PATHS, default=["sm80"], help="kernels: see above"
    )
    parser.add_argument(
        "--types", nargs="+", choices=WEIGHT_TYPES, help="only these weights (default: all)"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=shape, metavar="KxN", default=SHAPES,
        help="default: the fused linears of Llama-2-7B and 70B",
    )  # fmt: skip
    parser.add_argument("--act_order", action="store_true", help="only that: see above")
    parser.add_argument("--rest", **REST_OPTION)
    parser.add_argument("--table", type=Path, help="write the fastest ways of act-order here")
    options = parser.parse_args()
    if options.table and not options.act_order:
        parser.error("--table goes with --act_order")
    hopper = options.act_order or "sm90" in options.paths
    require_gpu("scripts/bench_types.py", capability=(9, 0) if hopper else None)
    rows = act_order(options.shapes, options.rest) if options.act_order else []
    cases = [case for case in CASES if options.types is None or case[0] in options.types]
    if hopper and not options.act_order:
        served = [case for case in cases if case[1] not in EIGHT_BIT]
        compile_first(sources(served, options.shapes))
        cases = cases if "sm80" in options.paths else served
    for k, n in () if options.act_order else options.shapes:
        for dtype in dict.fromkeys(output for _, _, output, _, _ in cases):
            what = f"{k} x {n} torch.matmul {dtype}"
            report(what, baseline(k, n, dtype, options.rest), rows)
        if any(activation in EIGHT_BIT for _, activation, *_ in cases):
            report(f"{k} x {n} quantize_activations", quantizing(k, n), rows)
        for case in cases:
            for path in options.paths:
                if path == "sm90" and case[1] in EIGHT_BIT:
                    continue
                found = measure(case, k, n, path, options.rest)
                report(f"{k} x {n} {case} {path}", found, rows)
    if "sm80" in options.paths and not options.act_order:
        rows += repacking()
    if options.table:
        write_table(options.table, rows)
    if options.json:
        result = {"circumstances": circumstances("scripts/bench_types.py", options), "rows": rows}
        write_json(options.json, result)


if __name__ == "__main__":
    main()
