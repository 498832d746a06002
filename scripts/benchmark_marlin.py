"""Time every kind of low-bit product against torch.matmul, on the layer shapes of real models.

    python scripts/benchmark_marlin.py --models Llama-2-7B Llama-2-70B/TP4 --batch-sizes 1 16 256
    python scripts/benchmark_marlin.py --types uint4b8 --limit-group-size 128 --json out.json
    python scripts/benchmark_marlin.py --dry-run          # what would be timed; needs no GPU

Sweeps weight types x activations x group sizes x act-order x k_full x reductions (every valid
combination of marlin_kernel/validity.py that a kernel serves on this GPU) x layer shapes x batch
sizes. MODEL/TPn takes the shard of one of n GPUs: N / n of layers split by columns, K / n of layers
split by rows. Options given as --limit-... keep only the values listed. --others: what is not in
the type table, dense and 2:4 products of 8-bit operands and 2:4 sparse 4- and 8-bit weights.

Every result is compared with float64 before it is timed; a wrong one ends the run, and --json holds
what was measured until then. Times are torch.utils.benchmark's blocked_autorange over replays of a
CUDA graph, in which every launch reads another copy of the weights (--rotate-mb in all, so that
none comes from the L2 cache); with --no-graph calls are timed as a program makes them. The GPU
rests before many tokens (--rest). Speed-ups are over torch.matmul with FP16 weights, the faster of
[K, N] and [N, K] transposed.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.utils.benchmark as benchmark
import yaml
from torch import Tensor
from tqdm import tqdm

from marlin_kernel import (
    launch,
    prebuilt,
    reference,
    scaled_mm,
    sm80_layout,
    sm80_path,
    sm90_8bit_layout,
    sm90_8bit_path,
    sm90_layout,
    sparse,
)
from marlin_kernel.compiler import KernelSource
from marlin_kernel.errors import ConfigError
from marlin_kernel.formats import QuantizedLinear, write
from marlin_kernel.sparse_layer import SparseLayer
from marlin_kernel.validity import (
    ACTIVATIONS,
    OUTPUTS,
    REDUCTIONS,
    Combination,
    combinations,
    violated_rule,
)
from marlin_kernel.weight_types import WEIGHT_TYPES
from scripts import plot_bench
from scripts.command_line import make_parser, positive, require_gpu, write_json
from scripts.gpu_timing import (
    CHECKED_TOKENS,
    REST_OPTION,
    captured,
    circumstances,
    compile_first,
    let_rest,
    relative_error,
)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "configs" / "bench" / "marlin.yaml"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# ||out - reference|| / ||reference|| by the dtypes of output and reduction: that of one rounding of
# the output and one of each weight is about a third of it
ERROR_LIMITS = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3}
# Products outside the type table: activations, and the type of 2:4 sparse 16-bit-activation weights
OTHERS = {
    "scaled float8_e4m3fn": (torch.float8_e4m3fn, None),
    "scaled int8": (torch.int8, None),
    "2:4 scaled float8_e4m3fn": (torch.float8_e4m3fn, None),
    "2:4 scaled int8": (torch.int8, None),
    "2:4 float16-u4b8-float16-g128": (torch.float16, "uint4b8"),
    "2:4 float16-u8b128-float16-g128": (torch.float16, "uint8b128"),
}
# Options that choose from the type table, and so leave out what is not in it
NARROWING = ("types", "activations", "limit_group_size", "limit_num_bits", "limit_act_order")
NARROWING += ("limit_k_full",)
BASELINE, REPACK = "torch.matmul", "repack"


Timings = dict[int, tuple[benchmark.Measurement, float]]  # M -> time and error; 0: repacking


@dataclass(frozen=True)
class Shape:
    """A layer: K inputs, N outputs; name: where it comes from."""

    name: str
    k: int
    n: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the process exit status."""
    options = parse(arguments)
    try:
        shapes = [s for s in layer_shapes(options.models) if kept(s, options)]
        cases = list(wanted_combinations(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not shapes or not cases:
        print("nothing is left to time; loosen the --limit options", file=sys.stderr)
        return 2
    if options.dry_run:
        for shape in shapes:
            print(f"{shape.name}: K={shape.k} N={shape.n}, M={options.batch_sizes}")
        print("\n".join([*map(str, cases), *options.others]))
        kinds = len(cases) + len(options.others)
        sizes = f"{len(shapes)} shapes x {len(options.batch_sizes)} batch sizes"
        print(f"{sizes} x {kinds} kinds of product")
        return 0
    if options.device == "cuda":
        require_gpu("scripts/benchmark_marlin.py", hint="; --dry-run lists what it would time")
    facts = circumstances("scripts/benchmark_marlin.py", options)
    report = {"circumstances": facts, "rows": [], "skipped": []}
    for shape in shapes:
        bench_shape(shape, cases, options, report)
    for line in dict.fromkeys(report["skipped"]):
        print(f"skipped: {line}")
    if options.plot:
        plot_bench.draw(report, options.plot)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    flag = {"type": int, "choices": (0, 1), "nargs": "+"}
    models = ", ".join(yaml.safe_load(MODELS.read_text())["models"])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["Llama-2-7B"],
        help=f"NAME or NAME/TPn; names: {models} (default: Llama-2-7B)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, metavar="M", default=BATCH_SIZES, help="tokens"
    )
    parser.add_argument("--limit-k", nargs="+", type=int, help="inputs")
    parser.add_argument("--limit-n", nargs="+", type=int, help="outputs")
    parser.add_argument("--limit-group-size", nargs="+", type=int, help="-1: one group")
    parser.add_argument("--limit-num-bits", nargs="+", type=int, help="bits of a weight")
    parser.add_argument("--limit-act-order", **flag, help="1: inputs belong to groups by an index")
    parser.add_argument("--limit-k-full", **flag, help="0: a shard of K that cuts groups anywhere")
    of = {
        "types": (WEIGHT_TYPES, "weights"),
        "activations": (ACTIVATIONS, "activations"),
        "outputs": (OUTPUTS, "results of 8-bit activations; other results are as activations"),
        "reductions": (REDUCTIONS, "sums that blocks exchange"),
    }
    for name, (known, text) in of.items():
        default = ["float16"] if name == "outputs" else list(known)
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, metavar="TYPE", default=default,
            help=f"of {text}: {' '.join(known)} (default: "
            + ("all)" if len(default) == len(known) else f"{' '.join(default)})"),
        )  # fmt: skip
    parser.add_argument(
        "--others", nargs="*", choices=OTHERS, metavar="NAME",
        help="outside the table (default: all, none with --types, --activations or a --limit on "
        "them): " + ", ".join(f"{name!r}" for name in OTHERS),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write every row to this file")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file (needs matplotlib)")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and stop")
    parser.add_argument("--min-run-time", type=float, default=0.1, help="seconds per case")
    parser.add_argument("--rest", **REST_OPTION)
    parser.add_argument(
        "--rotate-mb", type=positive, default=400, help="megabytes of copies of the weights"
    )
    parser.add_argument("--no-graph", action="store_true", help="time calls, not graph replays")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where")
    options = parser.parse_args(arguments)
    if options.others is None:
        chosen = any(getattr(options, name) != parser.get_default(name) for name in NARROWING)
        options.others = [] if chosen else list(OTHERS)
    return options


# ---- what to time --------------------------------------------------------------------------------


def layer_shapes(models: Sequence[str]) -> list[Shape]:
    """Layers of the models, equal sizes once. Raises ConfigError for a model that is not known."""
    table = yaml.safe_load(MODELS.read_text())["models"]
    found: dict[tuple[int, int], Shape] = {}
    for text in models:
        match = re.fullmatch(r"(.+?)(?:/TP(\d+))?", text)
        name, shards = match[1], int(match[2] or 1)
        if name not in table:
            raise ConfigError(
                f"model {name!r} is not in {MODELS.name}; choose from {', '.join(table)}, "
                "with /TPn for one of n tensor-parallel shards"
            )
        for layer, (k, n, split) in table[name].items():
            whole = k if split == "K" else n
            if shards < 1 or whole % shards:
                raise ConfigError(
                    f"{text}: {layer} has {split}={whole}, which {shards} GPUs cannot share equally"
                )
            size = (k // shards, n) if split == "K" else (k, n // shards)
            found.setdefault(size, Shape(f"{text} {layer}", *size))
    return list(found.values())


def kept(shape: Shape, options: argparse.Namespace) -> bool:
    return _among(shape.k, options.limit_k) and _among(shape.n, options.limit_n)


def wanted_combinations(options: argparse.Namespace) -> Iterator[Combination]:
    """Valid combinations that the options leave. Raises ConfigError for an unknown group size."""
    known = sorted({g for t in WEIGHT_TYPES.values() for g in t.group_sizes})
    for value in options.limit_group_size or ():
        if value not in known:
            raise ConfigError(f"--limit-group-size {value} is not one of {known}")
    selection = {
        "types": options.types,
        "activations": options.activations,
        "reductions": options.reductions,
    }
    for c in combinations(**selection):
        outputs = options.outputs if c.activation not in OUTPUTS else OUTPUTS
        if (
            c.output in outputs
            and _among(c.group_size, options.limit_group_size)
            and _among(c.weight_type.bits, options.limit_num_bits)
            and _among(int(c.act_order), options.limit_act_order)
            and _among(int(c.k_full), options.limit_k_full)
        ):
            yield c


def _among(value: int, limits: Sequence[int] | None) -> bool:
    return limits is None or value in limits


# ---- operands and their check --------------------------------------------------------------------


def make_layer(c: Combination, shape: Shape, device: str) -> QuantizedLinear:
    """A layer of random weights, rounded to the type's grid.

    k_full=False: groups have any number of inputs, as in a shard of K of an act-order layer.
    """
    weight = torch.randn(shape.k, shape.n, device=device)
    layer = QuantizedLinear.quantize(weight, c.weight_type, c.group_size)
    if not c.act_order:
        return layer
    groups = layer.scales.shape[0]
    if c.k_full:
        index = layer.group_index[torch.randperm(shape.k, device=device)]
    else:
        index = torch.randint(0, groups, (shape.k,), device=device)
    return QuantizedLinear.of(
        *(layer.codes, layer.scales, c.weight_type, c.group_size),
        g_idx=index,
        shard_groups=None if c.k_full else groups,
    )


class Product:
    """Products with one layer on one device, over copies of its weights.

    The family of kernels is the one that the package would choose; on the CPU weights are
    dequantized. A layer is prepared once, as after loading.
    """

    def __init__(self, c: Combination, layer: QuantizedLinear, copies: int) -> None:
        """copies: of the prepared weights, for `__call__` to choose from."""
        self.name, self.weight = str(c), layer.dequantize(torch.float32)
        self.error_limit = max(ERROR_LIMITS[c.output], ERROR_LIMITS[c.reduction])
        self.c, self.device = c, layer.codes.device
        self.family = family_of(c, self.device)
        self.spec = layer.spec
        self.stored = write(layer, "marlin", act_order=self.spec.act_order)
        held = self.repack()
        self.held = [held]
        for _ in range(copies - 1):
            self.held.append(tuple(t.clone() if isinstance(t, Tensor) else t for t in held))

    def repack(self) -> tuple:
        """What is done once after loading: the on-disk tensors in the order of the kernels."""
        spec = self.spec
        if self.family == "cpu":
            return (self.weight.to(_dtype(self.c.output)),)
        if self.family == "sm90_8bit":
            records = sm90_8bit_layout.records(self.stored, spec, self.c.activation)
            return (records.weights, records.scales)
        layout = sm90_layout if self.family == "sm90" else sm80_layout
        t = layout.kernel_tensors(self.stored, spec)
        return (t.weights, t.scales, t.zeros, t.perm, t.global_scale, t.group_size)

    def activations(self, a: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """float32 [M, K] as the kernel takes it: values, token scales, and what they stand for.

        The last as float64, of the first CHECKED_TOKENS only.
        """
        if self.c.activation in OUTPUTS:
            x = a.to(_dtype(self.c.activation))
            return x, None, x[:CHECKED_TOKENS].double()
        codes, scales = reference.quantize_activations(a, _dtype(self.c.activation))
        exact = codes[:CHECKED_TOKENS].double() * scales[:CHECKED_TOKENS].double()[:, None]
        if self.family == "cpu":
            return (codes.float() * scales[:, None]).to(_dtype(self.c.output)), None, exact
        k_padded = -(-self.spec.k // 16) * 16
        if self.family == "sm80":
            k_padded = self.held[0][0].shape[0] * 16
        return sm80_layout.kernel_activations(codes, k_padded), scales, exact

    def __call__(self, a: Tensor, token_scales: Tensor | None, number: int = 0) -> Tensor:
        """a, token_scales: from `activations`. Returns [M, N] in the output dtype."""
        spec = self.spec
        if self.family == "cpu":
            return a @ self.held[number][0]
        out = torch.empty(a.shape[0], spec.n, dtype=_dtype(self.c.output), device=self.device)
        if self.family == "sm90_8bit":
            types = sm90_8bit_layout.types_of(spec, self.c.activation, self.c.output)
            sm90_8bit_path.gemm(a, token_scales, *self.held[number], None, out, types)
            return out
        weights, scales, zeros, perm, global_scale, group_size = self.held[number]
        k, k_padded, n_padded = spec.k, weights.shape[0] * 16, spec.packed.n_padded
        typed = {"weight_type": self.c.weight_type.name, "global_scale": global_scale}
        if self.family == "sm90":
            sizes = (k, spec.n, k_padded, n_padded, group_size or -1)
            launch.gemm(a, weights, scales, None, out, *sizes, perm=perm, **typed)
            return out
        k = k_padded if token_scales is not None else k
        sm80_path.gemm(
            *(a, weights, scales, None, out, k, spec.n, k_padded, n_padded, group_size),
            zeros=zeros,
            perm=perm,
            token_scales=token_scales,
            reduce_half=self.c.reduction == "float16",
            **typed,
        )
        return out


class OtherProduct:
    """Products outside the type table: 8-bit operands ("scaled"), and 2:4 sparse weights."""

    def __init__(self, name: str, shape: Shape, options: argparse.Namespace) -> None:
        """name: one of OTHERS. Raises ConfigError where it has no kernel."""
        device = torch.device(options.device)
        self.name, self.sparse = name, name.startswith("2:4")
        self.dtype, self.weight_type = OTHERS[name]
        if device.type == "cuda":
            version = torch.cuda.get_device_capability(device)
            if self.weight_type is None and version != (9, 0):
                raise ConfigError(f"{name}: needs compute capability 9.0, not {version}")
            if version < (8, 0):
                raise ConfigError(f"{name}: needs compute capability 8.0, not {version}")
        weight = torch.randn(shape.n, shape.k, device=device)
        if self.sparse:
            weight = sparse.prune_2_4(weight)
        if self.weight_type is not None:
            t = WEIGHT_TYPES[self.weight_type]
            layer = QuantizedLinear.quantize(weight.t().contiguous(), t, 128)
            self.error_limit, self.weight = ERROR_LIMITS["float16"], layer.dequantize()
            made = [SparseLayer.from_quantized(layer).prepare(self.dtype)]
        else:
            codes, scales = reference.quantize_activations(weight, self.dtype)  # per feature
            self.error_limit = 8e-3  # FP8 sums of the tensor cores keep fewer bits than float32
            self.weight = (codes.float() * scales[:, None]).t()
            stored = sparse.compress_2_4(codes) if self.sparse else (codes.t(),)
            made = [(*stored, scales)]
        nbytes = shape.k * shape.n // (2 if self.sparse else 1)
        for _ in range(copies_of(nbytes, options) - 1):
            made.append(copy.deepcopy(made[0]))
        self.held = made

    def activations(self, a: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `Product.activations`."""
        if self.weight_type is not None:
            return a.to(self.dtype), None, a.to(self.dtype)[:CHECKED_TOKENS].double()
        codes, scales = reference.quantize_activations(a, self.dtype)
        exact = codes[:CHECKED_TOKENS].double() * scales[:CHECKED_TOKENS].double()[:, None]
        return codes, scales, exact

    def __call__(self, a: Tensor, token_scales: Tensor | None, number: int = 0) -> Tensor:
        """As `Product.__call__`; float16 [M, N]."""
        if token_scales is None:
            return self.held[number](a)
        *stored, scales = self.held[number]
        multiply = scaled_mm.scaled_sparse_mm if self.sparse else scaled_mm.scaled_mm
        return multiply(a, *stored, token_scales, scales, torch.float16, None)


def family_of(c: Combination, device: torch.device) -> str:
    """The family of kernels that serves a combination. Raises ConfigError if there is none."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    rule = violated_rule(c, f"{major}.{minor}")
    if rule is not None:
        raise ConfigError(f"{c}: {rule}")
    if c.reduction == "float16":
        return "sm80"  # the only kernels whose blocks exchange float16
    kernels = prebuilt.kernels_of(c, prebuilt.architecture(f"{major}.{minor}"))
    if not kernels:
        raise ConfigError(f"{c}: no kernel serves it on capability {major}.{minor}")
    return kernels[0][0]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


# ---- timing --------------------------------------------------------------------------------------


def timed(
    calls: Sequence[Callable[[], object]], labels: dict[str, str], options: argparse.Namespace
) -> benchmark.Measurement:
    """Time of one of `calls`, which are run one after the other."""

    def run() -> None:
        for call in calls:
            call()

    if options.device == "cuda" and not options.no_graph:
        run = captured(calls).replay
    timer = benchmark.Timer("run()", globals={"run": run}, **labels)
    measured = timer.blocked_autorange(min_run_time=options.min_run_time)
    return benchmark.Measurement(
        measured.number_per_run * len(calls), measured.raw_times, measured.task_spec
    )


def rest_before(m: int, options: argparse.Namespace) -> None:
    """Before a product of m tokens is timed: checking its result has lowered the clock, too."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        let_rest(m, options.rest)


def copies_of(nbytes: int, options: argparse.Namespace) -> int:
    if options.device == "cpu" or options.no_graph:
        return 1
    return max(2, -(-options.rotate_mb * 10**6 // nbytes))


def bench_shape(
    shape: Shape, cases: Sequence[Combination], options: argparse.Namespace, report: dict
) -> None:
    """Time one shape: the baseline, then every combination; print tables, extend the report."""
    if options.device == "cuda":
        compile_first(sources_of(shape, cases, options))
    results: list[benchmark.Measurement] = []
    batch_sizes = sorted(options.batch_sizes)  # few first: large products heat the chip
    activations = {
        m: torch.randn(m, shape.k, device=options.device, dtype=torch.float32) for m in batch_sizes
    }
    baseline = matmul_times(shape, activations, options)
    results += baseline.values()
    for m, measured in baseline.items():
        report["rows"].append(row(shape, BASELINE, m, measured, measured))

    def keep() -> None:  # a sweep takes hours: whatever ends it leaves what was measured
        if options.json:
            write_json(options.json, report)

    keep()

    def add(timings: Timings, name: str) -> None:
        for m, (measured, error) in timings.items():
            what = name if m else f"{REPACK} {name}"
            report["rows"].append(row(shape, what, m, measured, baseline.get(m), error))
            results.append(measured)
        keep()

    for c in tqdm(cases, desc=f"K={shape.k} N={shape.n}", unit="type"):
        try:
            add(bench_combination(c, shape, activations, options), str(c))
        except ConfigError as error:
            report["skipped"].append(str(error))
    for name in options.others:
        try:
            product = OtherProduct(name, shape, options)
        except ConfigError as error:
            report["skipped"].append(str(error))
        else:
            add(bench_product(product, shape, activations, options), name)
    keep()
    print(f"\n{shape.name}: K={shape.k} N={shape.n}")
    table = benchmark.Compare(results)
    table.trim_significant_figures()
    table.print()


def sources_of(
    shape: Shape, cases: Sequence[Combination], options: argparse.Namespace
) -> Iterator[KernelSource]:
    """What the cases of the type table will launch; others compile when they are reached."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    arch = prebuilt.architecture(capability)
    for c in cases:
        if c.reduction == "float32" and violated_rule(c, capability) is None:
            yield from prebuilt.layer_kernels(c, arch, shape.k, shape.n, options.batch_sizes)


def matmul_times(
    shape: Shape, activations: dict[int, Tensor], options: argparse.Namespace
) -> dict[int, benchmark.Measurement]:
    """torch.matmul in float16, the faster of weights [K, N] and [N, K] transposed."""
    best: dict[int, benchmark.Measurement] = {}
    copies = copies_of(2 * shape.k * shape.n, options)
    for transposed in (False, True):
        size = (shape.n, shape.k) if transposed else (shape.k, shape.n)
        weights = torch.randn(copies, *size, device=options.device, dtype=torch.float16)
        for m, a in activations.items():
            x = a.half()
            views = [w.t() if transposed else w for w in weights]
            calls = [lambda w=w, x=x: torch.matmul(x, w) for w in views]
            rest_before(m, options)
            measured = timed(calls, labels(shape, BASELINE, m), options)
            if m not in best or measured.median < best[m].median:
                best[m] = measured
        del weights, views, calls
    return best


def bench_combination(
    c: Combination, shape: Shape, activations: dict[int, Tensor], options: argparse.Namespace
) -> Timings:
    """Times of a combination and of its repacking. Raises ConfigError if no kernel serves it."""
    family_of(c, torch.device(options.device))
    layer = make_layer(c, shape, options.device)
    nbytes = layer.codes.numel() * c.weight_type.bits // 8
    product = Product(c, layer, copies_of(nbytes, options))
    found = bench_product(product, shape, activations, options)
    eager = argparse.Namespace(**{**vars(options), "no_graph": True})
    found[0] = (timed([product.repack], labels(shape, f"{REPACK} {c}", 0), eager), math.nan)
    return found


def bench_product(
    product: Product | OtherProduct,
    shape: Shape,
    activations: dict[int, Tensor],
    options: argparse.Namespace,
) -> Timings:
    """M -> (time, error) of products with one layer. Raises ArithmeticError for a wrong result."""
    found: Timings = {}
    for m, a in activations.items():
        x, token_scales, exact = product.activations(a)
        error = relative_error(product(x, token_scales)[:CHECKED_TOKENS], exact, product.weight)
        if not error < product.error_limit:
            text = f"{product.name} at M={m}, K={shape.k}, N={shape.n}: error {error:.2g}"
            raise ArithmeticError(text)
        calls = [partial(product, x, token_scales, i) for i in range(len(product.held))]
        rest_before(m, options)
        found[m] = (timed(calls, labels(shape, product.name, m), options), error)
    return found


def labels(shape: Shape, name: str, m: int) -> dict[str, str]:
    return {
        "label": f"K={shape.k} N={shape.n}",
        "sub_label": name,
        "description": f"M={m}" if m else "once",
    }


def row(
    shape: Shape,
    name: str,
    m: int,
    measured: benchmark.Measurement,
    baseline: benchmark.Measurement | None,
    error: float = math.nan,
) -> dict:
    """One row of the JSON report; times in microseconds."""
    us = measured.median * 1e6
    return {
        "layer": shape.name,
        "k": shape.k,
        "n": shape.n,
        "m": m,
        "what": name,
        "us": us,
        "us_iqr": measured.iqr * 1e6,
        "speedup": None if baseline is None else baseline.median * 1e6 / us,
        "tflops": 2 * m * shape.k * shape.n / us * 1e-6,
        "error": None if math.isnan(error) else error,
    }


if __name__ == "__main__":
    sys.exit(main())
