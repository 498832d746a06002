"""Time every weight and activation type beside torch.matmul in FP16.

    python scripts/bench_types.py --json docs/results/types.json
    python scripts/bench_types.py --paths sm90 --json docs/results/types_sm90.json

On Hopper 16-bit activations have two paths: "sm80" (mma.sync) and "sm90" (wgmma), with a
kernel that only reads the same bytes (scripts/bench.py, read_floor) as the yardstick of the second.
Protocol of gpu_timing: CUDA-graph replay, every launch on another copy of the weights. Activations
of 8 bits are timed as quantized ones; quantizing them is a row of its own. Results are checked in
tests/test_marlin_gpu_types.py, and roughly here, before they are timed. 8-bit activations by wgmma
on Hopper have a benchmark of their own: scripts/bench_w4a8.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench import read_floor
from gpu_timing import ROTATE_BYTES, RotatingWeights, circumstances, graph_time
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, formats, launch, sm80_layout, sm80_path, sm90_layout
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.layout import packed_shape
from marlin_kernel.packing import pack
from marlin_kernel.repack import repack, unpack_source
from marlin_kernel.sm80_layout import KernelTensors

SHAPES = ((4096, 4096), (8192, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
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
        if held.perm is not None:
            a = sm80_path.gather(a, held.perm)
        launch.gemm(
            *(a, held.weights, held.scales, None, out, a.shape[1], n),
            *(held.k_padded, -(-n // 64) * 64, held.group_size or -1),
            weight_type=weight_type,
            global_scale=held.global_scale,
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


def measure(case: tuple[str, str, str, int, bool], k: int, n: int, path: str) -> list[dict]:
    name, activation, output, group_size, act_order = case
    layer = layer_of(case, k, n)
    dense = layer.dequantize(torch.float32)
    copies = copies_of(PATHS[path].kernel_tensors(formats.write(layer, "marlin"), layer.spec))
    rows = []
    floor = None
    if path == "sm90":
        yardstick = RotatingWeights.make(k, n, copies[0].group_size or -1, weight_type=name)
        floor = round(read_floor(yardstick, True), 2)
        del yardstick
    for m in TOKENS:
        a = torch.randn(m, k, device="cuda", dtype=DTYPES[output])
        out, scales, operand = a.new_empty(m, n), None, a
        if activation in EIGHT_BIT:
            dtype = DTYPES[activation]
            operand, scales = sm80_path.quantize_activations(a, dtype, copies[0].k_padded)
        product(path, copies[0], operand, out, name, scales)
        error = float((out.float() - a.float() @ dense).norm() / (a.float() @ dense).norm())
        limit = 0.05 if scales is not None else 0.01
        assert error < limit, f"{case} at {k} x {n}, M={m}: error {error}"
        launches = [partial(product, path, held, operand, out, name, scales) for held in copies]
        rows.append(
            {
                "weight_type": name,
                "activation": activation,
                "output": output,
                "group_size": group_size,
                "act_order": act_order,
                "k": k,
                "n": n,
                "m": m,
                "us": round(graph_time(launches), 2),
                "path": path,
                "read_floor_us": floor,
            }
        )
    return rows


def baseline(k: int, n: int) -> list[dict]:
    """torch.matmul in FP16, the faster of both layouts of the weights; and rounding activations."""
    rows = []
    copies = max(2, -(-ROTATE_BYTES // (2 * k * n)))
    w = [torch.randn(k, n, device="cuda", dtype=torch.float16) for _ in range(copies)]
    for m in TOKENS:
        a = torch.randn(m, k, device="cuda", dtype=torch.float16)
        out = a.new_empty(m, n)
        times = [
            graph_time([partial(torch.mm, a, x, out=out) for x in w]),
            graph_time([partial(torch.mm, a, x.view(n, k).T, out=out) for x in w]),
        ]
        row = {"weight_type": "torch.matmul", "activation": "float16", "k": k, "n": n, "m": m}
        rows.append(row | {"us": round(min(times), 2)})
        row = {"weight_type": "quantize_activations", "activation": "int8", "k": k, "m": m}
        launches = [partial(sm80_path.quantize_activations, a, torch.int8, k)] * 32
        rows.append(row | {"n": n, "us": round(graph_time(launches), 2)})
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


def report(what: str, measured: list[dict], rows: list[dict]) -> None:
    """Print times in the order of TOKENS, and keep them."""
    rows += measured
    times = " ".join(f"{row['us']:8.2f}" for row in measured)
    floor = measured[0].get("read_floor_us")
    print(f"{what}: {times}" + (f"  read floor {floor}" if floor else ""), flush=True)
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write rows and circumstances here")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["sm80"])
    parser.add_argument("--types", nargs="+", choices=WEIGHT_TYPES, help="only these weights")
    options = parser.parse_args()
    rows = []
    for k, n in SHAPES:
        report(f"{k} x {n} torch.matmul", baseline(k, n), rows)
        for case in CASES:
            if options.types is not None and case[0] not in options.types:
                continue
            for path in options.paths:
                if path == "sm90" and case[1] in EIGHT_BIT:
                    continue
                report(f"{k} x {n} {case} {path}", measure(case, k, n, path), rows)
    if "sm80" in options.paths:
        rows += repacking()
    if options.json:
        result = {"circumstances": circumstances("scripts/bench_types.py", options), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
