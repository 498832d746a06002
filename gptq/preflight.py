"""Promises before the work: what it takes, and one layer through the whole path."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_kernel import formats, reference
from marlin_kernel.errors import ConfigError, MarlinError
from marlin_kernel.formats import LayerSpec
from marlin_kernel.layer import Layer
from marlin_kernel.weight_types import normalize_group_size

from .activations import disk_folder
from .config import QuantizeConfig
from .models import StreamedModel
from .sequential import STEP_TOKENS
from .solver import SolverOptions, refits, solve
from .sparsity import check_inputs
from .storage import quantized_linear, stored_tensors

_SOLVER_MATRICES = 6  # H, its damped copy, R, U, and two temporaries of the factorization, float32
_MIB = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run will do and need. Bytes, parameters, tokens; seconds is an estimate.

    samples, tokens and bytes of memory are those of one process.
    """

    linears: int
    parameters: int
    samples: int
    tokens: int
    packed_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    disk_bytes: int
    seconds: float
    activation_bytes: int = 0  # on disk, of all processes
    processes: int = 1

    def rows(self, config: QuantizeConfig, model: StreamedModel) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        wtype = "16 bits" if config.wtype is None else config.wtype.name
        wtype += f", {config.sparsity} sparse" if config.sparsity else ""
        group = "one per column" if config.groupsize == -1 else str(config.groupsize)
        device = model.device.type
        verb = "pruned" if config.wtype is None else "quantized"
        rows = [
            (verb, f"{self.linears} linears, {self.parameters / 1e6:,.1f} M weights"),
            ("type", wtype)
            if config.wtype is None
            else ("type", f"{wtype}, group size {group}, format {config.stored_format}"),
            ("method", _method(config)),
            ("calibration", self._calibration(config)),
            ("compute", f"{device}, {str(model.dtype).removeprefix('torch.')}"),
            ("peak host memory", f"about {_size(self.peak_host_bytes)}"),
            ("packed size", _size(self.packed_bytes)),
            ("free disk needed", self._disk(config)),
            ("estimated time", _duration(self.seconds)),
        ]
        if device == "cuda":
            rows.insert(5, ("peak GPU memory", f"about {_size(self.peak_device_bytes)}"))
        return rows

    def _calibration(self, config: QuantizeConfig) -> str:
        if config.nearest:
            return "none"
        source = "random ids" if config.from_config else config.dataset
        each = "" if self.processes == 1 else f" in each of {self.processes} processes"
        few = self.samples < config.nsamples // self.processes
        note = f" (it has no more; nsamples is {config.nsamples})" if few else ""
        return f"{self.samples} samples, {self.tokens:,} tokens of {source}{each}{note}"

    def _disk(self, config: QuantizeConfig) -> str:
        """Room for the checkpoint, and for activations that are kept on disk."""
        if not self.activation_bytes:
            return _size(self.disk_bytes)
        place = "" if config.offload_activations == "disk" else f" in {config.offload_activations}"
        needed = f"{_size(self.activation_bytes)} for activations{place}"
        return f"{_size(self.disk_bytes)}, and {needed} while the run lasts"


def _method(config: QuantizeConfig) -> str:
    if config.nearest:
        return "magnitude pruning" if config.wtype is None else "round to nearest"
    parts = ["GPTQ" if config.wtype is not None else "SparseGPT"]
    parts += ["asymmetric calibration"] if config.asymmetric else []
    parts += ["true-sequential"] if config.true_sequential else []
    if config.act_order:
        parts.append("act-order" + (" with static groups" if config.static_groups else ""))
    parts += [] if config.no_clip or config.wtype is None else ["Hessian clipping"]
    parts += ["scale refit"] if config.refit and refits(config.wtype) else []
    parts += [f"{config.refine} steps per layer"] if config.refine else []
    parts += [f"{config.refine_norms} steps end to end"] if config.refine_norms else []
    return ", ".join(parts)


def plan(
    model: StreamedModel,
    config: QuantizeConfig,
    linears: dict[str, tuple[int, int]],
    samples: Sequence[Tensor],
    processes: int = 1,
) -> Plan:
    """Estimate memory, disk and time.

    linears: (inputs, outputs) of every linear that will be quantized, by name. samples: those of
    this process, one of so many. The time is the
    counted operations over the rate of a short matrix product measured now.
    """
    tokens = 0 if config.nearest else sum(int(ids.numel()) for ids in samples)
    parameters = sum(k * n for k, n in linears.values())
    first = model.layer_name(0) + "."
    one_layer = [size for name, size in linears.items() if name.startswith(first)]
    layer_parameters = sum(k * n for k, n in one_layer)
    widest = max(k for k, _ in linears.values())
    element = torch.finfo(model.dtype).bits // 8
    streams = 2 if config.asymmetric and not config.nearest else 1
    hidden = model.config.hidden_size
    activations = tokens * (hidden + widest) * element * streams
    matrices = _SOLVER_MATRICES + streams - 1 + bool(config.shrinkage)
    hessian = 0 if config.nearest else 4 * widest**2 * matrices
    stacked = max((n for _, n in linears.values()), default=0) * 2 * widest
    work = layer_parameters * element * (streams + 1) + hessian + 6 * 4 * stacked
    packed = sum(_packed_bytes(k, n, config) for k, n in linears.values())
    unquantized = sum(_tensor_bytes(model, name) for name in model.tensors) - parameters * 2
    group = 64 if config.groupsize == -1 else min(config.groupsize, 64)
    codes = parameters + parameters // group * 4
    embedding = model.config.vocab_size * hidden * element
    gpu = model.device.type == "cuda"
    where = config.offload_activations
    offloaded = activations if where else 0
    in_flight = min(activations, 8 * STEP_TOKENS * widest * element * streams) if gpu else 0
    on_disk = offloaded if where != "host" else 0
    lengths = [ids.numel() for ids in samples]
    if on_disk and not gpu:
        in_flight = min(activations, 8 * max(lengths, default=0) * widest * element)
    memory = activations - offloaded + in_flight + work + embedding
    memory += _refining(config, parameters, layer_parameters, tokens * hidden * element, gpu)
    shard = min(packed + max(unquantized, 0), 1 << 30)
    return Plan(
        linears=len(linears),
        parameters=parameters,
        samples=len(samples),
        tokens=tokens,
        packed_bytes=packed + max(unquantized, 0),
        peak_device_bytes=memory if gpu else 0,
        peak_host_bytes=_resident()
        + (2 * layer_parameters * 4 + offloaded - on_disk if gpu else memory)
        + 2 * shard,
        disk_bytes=codes + packed + max(unquantized, 0),
        activation_bytes=on_disk * processes,
        seconds=_seconds(model, config, one_layer, tokens, streams, parameters),
        processes=processes,
    )


def _refining(config: QuantizeConfig, parameters: int, layer: int, states: int, gpu: bool) -> int:
    """Bytes that learning scales adds: weights and their gradients, codes, and a layer's inputs.

    layer: parameters of one decoder layer, which also has float32 products on the way.
    """
    if config.refine_norms:  # the whole model, in half precision on a GPU
        return parameters * (1 + 2 * (2 if gpu else 4)) + layer * 8
    return layer * 16 + states if config.refine else 0


def _packed_bytes(k: int, n: int, config: QuantizeConfig) -> int:
    if config.wtype is None:
        return 2 * k * n
    g = normalize_group_size(config.groupsize, k)
    spec = LayerSpec(k, n, config.wtype, g, config.moves_groups and g < k, False)
    stored = formats.tensor_shapes(config.stored_format, spec).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)


def _tensor_bytes(model: StreamedModel, name: str) -> int:
    return 2 * model.tensors[name].numel()


_STEP_BYTES = 450  # moved per weight by a step of learning its scale; found on an H200


def _seconds(
    model: StreamedModel,
    config: QuantizeConfig,
    layer: list[tuple[int, int]],
    tokens: int,
    streams: int,
    parameters: int,
) -> float:
    forward, moved = 2.0 * parameters * tokens * streams, 0.0
    for steps, passes in ((config.refine, 3), (config.refine_norms, 4)):
        if steps:  # of gradient descent: forward, twice that backward, and what is recomputed
            forward += 2.0 * parameters * passes * steps * config.refine_options(steps).tokens
            moved += _STEP_BYTES * parameters * steps
    stages = {k for k, _ in layer}
    widths = [k for k, _ in layer]
    # q/k/v share a Hessian, and so do gate/up: four products a layer, of which H needs half
    shared = sum(sorted(widths)[::2]) if stages else 0
    mean = shared / max(len(widths[::2]), 1)
    hessian = model.num_layers * 4 * tokens * mean**2 * (1 + 2 * (streams - 1))
    solve_work = 0.0 if config.nearest else parameters * mean * 8
    gpu = model.device.type == "cuda"
    columns = 0 if gpu or config.nearest else model.num_layers * sum(k for k, _ in layer)
    overhead = columns * 2e-4 + 0.05 * model.num_layers
    rate = _rate(model.device, model.dtype)
    slow = _rate(model.device, torch.float32)
    if gpu and moved:  # where products are so fast that reading and writing weights counts
        overhead += moved / _copy_rate(model.device)
    return (forward + hessian) / rate + solve_work / slow + overhead


def _copy_rate(device: torch.device) -> float:
    """Measured bytes per second that a GPU reads and writes."""
    source = torch.empty(1 << 26, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize(device)
    return 2 * source.nbytes / (time.perf_counter() - began)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of a matrix product, FLOP/s."""
    size = 768 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def check_room(plan: Plan, config: QuantizeConfig, model: StreamedModel, folder: Path) -> None:
    """Raise ConfigError if disk or GPU memory cannot hold the run; warn if host memory may not."""
    _check_disk("save", folder, plan.disk_bytes)
    if plan.activation_bytes:
        place = disk_folder(config.offload_activations, folder)
        shared = config.offload_activations == "disk"
        needed = plan.activation_bytes + (plan.disk_bytes if shared else 0)
        _check_disk("offload_activations", place, needed)
    if model.device.type == "cuda":
        available = torch.cuda.mem_get_info(model.device)[0]
        if available < plan.peak_device_bytes:
            raise ConfigError(
                f"{model.device} has {_size(available)} free, the run needs about "
                f"{_size(plan.peak_device_bytes)}; lower --nsamples or --seqlen"
                + ("" if config.offload_activations else ", or add --offload_activations")
            )
    needed, available = plan.peak_host_bytes - _resident(), _available()
    if available is not None and available < needed:
        log.warning(
            "this machine has %s of memory free, the run needs about %s more; if it does not fit, "
            "lower --nsamples or --seqlen%s",
            _size(available),
            _size(needed),
            "" if config.offload_activations == "disk" else ", or use --offload_activations disk",
        )


def _resident() -> int:
    """Memory that this process holds now, bytes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available() -> int | None:
    """Host memory that programs may still take, bytes; None where the system does not say."""
    try:
        facts = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB", facts, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _check_disk(setting: str, folder: Path, needed: int) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{setting}={str(folder)!r}: {_size(free)} free, the run needs {_size(needed)}; choose "
            "another disk"
        )


@torch.no_grad()
def rehearse(
    model: StreamedModel, config: QuantizeConfig, linears: dict[str, tuple[int, int]]
) -> None:
    """Push the largest linear through quantize, pack, save, load and multiply.

    Raises what that raises, before hours of work are at stake, and MarlinError if the loaded layer
    does not multiply like the quantized weights.
    """
    name = max(linears, key=lambda n: linears[n][0] * linears[n][1])
    k, n = linears[name]
    options = config.solver_options()
    wtype = config.wtype
    if config.sparsity:
        for linear, (inputs, _) in linears.items():
            check_inputs(inputs, linear)
    quantized = {f"{linear}.weight" for linear in linears}
    for other in model.tensors:
        if other not in quantized:
            model.stored(other)  # raises if the checkpoint's dtype cannot hold it
    if wtype is None:
        return
    for inputs, outputs in set(linears.values()):
        if config.format != "marlin" and config.groupsize > inputs:
            raise ConfigError(
                f"groupsize={config.groupsize} is larger than the {inputs} inputs of a linear, "
                "which "
                f"readers of {config.format} refuse; use --format marlin, or a smaller group"
            )
        group = normalize_group_size(config.groupsize, inputs)
        spec = LayerSpec(inputs, outputs, wtype, group, config.moves_groups and group < inputs)
        formats.check_exportable(config.stored_format, spec)
    weight = model.tensor(f"{name}.weight")
    identity = torch.eye(k, device=model.device)
    nearest = SolverOptions(wtype, config.groupsize, grid=options.grid, nearest=True)
    nearest = replace(nearest, sparsity=config.sparsity)
    solution = solve(weight, identity, nearest, name=name)[0]
    tensors = {part: tensor.cpu() for part, tensor in stored_tensors(solution).items()}
    layer = quantized_linear(tensors, wtype, config.groupsize)
    version = 1 if wtype.symmetric else 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.safetensors"
        save_file(formats.write(layer, config.stored_format, gptq_version=version), file)
        stored = load_file(file)
    loaded = formats.read(stored, config.stored_format, layer.spec, gptq_version=version)
    x = torch.randn(3, k, device=model.device, dtype=model.dtype)
    served = Layer.from_quantized(loaded).to(model.device).prepare(model.dtype)
    expected = reference.matmul(x, solution.weight())
    error = float((served(x).double() - expected.double()).norm() / expected.double().norm())
    limit = {torch.float32: 1e-4, torch.float16: 5e-3}.get(model.dtype, 3e-2)
    if not error < limit:
        raise MarlinError(
            f"rehearsal of {name}: the packed layer multiplies with relative error {error:.2g} "
            f"(limit {limit:.2g}); this machine's kernels cannot be trusted, please report it"
        )


def _size(count: float) -> str:
    if count >= 1 << 30:
        return f"{count / _MIB / 1024:.2f} GiB"
    return f"{count / _MIB:.0f} MiB" if count >= 10 * _MIB else f"{count / 1024:,.0f} KiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
