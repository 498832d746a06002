"""One quantization run: plan, walk the layers, write the checkpoint. Composition only."""

from __future__ import annotations

import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import marlin_kernel
from marlin_kernel.checkpoint import check_target, source_hash
from marlin_kernel.checkpoint_files import read_json
from marlin_kernel.errors import CheckpointError, ConfigError

from . import preflight
from .activations import remove_left_over, store_of
from .calibration import sample_documents, sample_windows
from .config import QuantizeConfig
from .distributed import join, local_device
from .lock import lock, unfinished_folder
from .models import StreamedModel, config_folder, resolve_source
from .refine import StoredLinear, refine_model
from .sequential import STEP_TOKENS, LinearResult, Walker
from .storage import (
    BackgroundWriter,
    FinishedLayers,
    fingerprint,
    layer_weights,
    write_checkpoint,
)
from .texts import documents

log = logging.getLogger(__name__)
PROBE_TOKENS = 16
MAX_SEQLEN = 4096


def choose_device(config: QuantizeConfig) -> torch.device:
    """`--device`, or the first GPU, or the CPU. Raises ConfigError if it is not there."""
    name = local_device(config.device)
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(
            f"device={config.device!r} is no device of torch; use cpu, cuda, or cuda:1"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={config.device!r} is not supported; use cpu, cuda, or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ConfigError(
            f"device={config.device!r}: torch sees {torch.cuda.device_count()} GPUs, counted from 0"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={config.device!r}: torch sees no GPU; use --device cpu, or install a CUDA "
            "build"
        )
    where = config.offload_activations
    if where == "host" and device.type != "cuda":
        raise ConfigError(
            f"offload_activations with device={str(device)!r}: they are in host memory already; "
            "leave it out, or keep them on disk (--offload_activations disk)"
        )
    if where not in (None, "host", "disk") and not Path(where).expanduser().is_dir():
        raise ConfigError(
            f"offload_activations={where!r} is neither host nor disk nor a folder; make it first"
        )
    return device


def choose_dtype(config: QuantizeConfig, folder: Path, device: torch.device) -> torch.dtype:
    """`--dtype`, or float32 on the CPU, or the checkpoint's half precision on a GPU."""
    if config.dtype:
        return getattr(torch, config.dtype)
    if device.type == "cpu":
        return torch.float32
    description = read_json(folder / "config.json")
    stored = description.get("dtype") or description.get("torch_dtype")
    return torch.bfloat16 if stored == "bfloat16" else torch.float16


def choose_seqlen(config: QuantizeConfig, model_config: Any) -> int:
    """`--seqlen`, or the model's context, at most 4096. Raises ConfigError beyond the context."""
    context = getattr(model_config, "max_position_embeddings", None) or MAX_SEQLEN
    if config.seqlen is None:
        return min(context, MAX_SEQLEN)
    if config.seqlen > context:
        raise ConfigError(f"seqlen={config.seqlen} exceeds the model's context of {context}")
    return config.seqlen


def calibration_samples(config: QuantizeConfig, tokenizer: Any, seqlen: int) -> list[Tensor]:
    """Token sequences of the calibration text, int64 [T] each."""
    source = documents(config.dataset, "calibration", data_dir=config.data_dir)
    draw = {"nsamples": config.nsamples, "seqlen": seqlen, "seed": config.seed}
    if source.joined:
        return sample_windows(source.text(), tokenizer, **draw)
    return sample_documents(source.texts, tokenizer, **draw)


def run(
    config: QuantizeConfig, out: Path, say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Quantize `config.checkpoint` into the packed folder `out`.

    say: receives the plan as text. Returns the report (quantization_report.json); where torchrun
    started several processes, all but the first return None when it has written everything.
    Raises MarlinError subclasses; finished layers of an interrupted run stay beside `out` for
    --resume.
    """
    with ExitStack() as held:
        return _run(config, out, say, held)


def _run(
    config: QuantizeConfig, out: Path, say: Callable[[str], None], held: ExitStack
) -> dict[str, Any] | None:
    """`run`; held: what must be given back however it ends."""
    began = time.perf_counter()
    check_target(out, config.overwrite)
    device = choose_device(config)
    workers = join(device)
    first = workers.rank == 0
    if first:
        held.enter_context(lock(out))
    random = config.from_config is not None
    folder = config_folder(config.from_config) if random else resolve_source(config.checkpoint)
    dtype = choose_dtype(config, folder, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = StreamedModel(folder, dtype, device, random_seed=config.seed if random else None)
    seqlen = choose_seqlen(config, model.config)
    skip = _skipped(config, model)
    linears = _linear_sizes(model, skip)
    if random:
        samples, probe = random_samples(config, seqlen, model.config.vocab_size)
    else:
        tokenizer = load_tokenizer(folder)
        samples = [] if config.nearest else calibration_samples(config, tokenizer, seqlen)
        probe = _probe_tokens(tokenizer, model.config.vocab_size)
    _check_vocabulary(samples, model)
    own = samples[workers.rank :: workers.count]
    if not own and not config.nearest:
        raise ConfigError(
            f"{workers.count} processes for {len(samples)} calibration samples; start fewer, or "
            "raise --nsamples"
        )

    if workers.count > 1 and (config.refine or config.refine_norms):
        raise ConfigError(
            f"refine={config.refine}, refine_norms={config.refine_norms} with {workers.count} "
            "processes: scales are learned on one device; start one process, or leave them out"
        )

    planned = preflight.plan(model, config, linears, own, workers.count)
    if first:
        say(_table(planned.rows(config, model)))
        preflight.check_room(planned, config, model, out)
        log.info("the largest linear passes the whole path once")
        preflight.rehearse(model, config, linears)

    log.info("hashing the source")
    origin = {"path": config.from_config or config.checkpoint, "sha256": source_hash(folder)}
    key = fingerprint(config, origin["sha256"], samples, str(dtype))
    finished, unfinished = None, unfinished_folder(out)
    if first:
        settings = config.fingerprint() | {"dtype": str(dtype).removeprefix("torch.")}
        finished = FinishedLayers(unfinished, key, config.resume, settings)
        remove_left_over(config.offload_activations, out)
    finished = FinishedLayers.shared(finished, unfinished, workers)  # folders are as they must be
    store = held.enter_context(store_of(config.offload_activations, device, out, workers.rank))
    walker = Walker(
        model,
        own,
        config.solver_options(),
        true_sequential=config.true_sequential,
        skip=skip,
        probe=probe,
        step_tokens=STEP_TOKENS if device.type == "cuda" else 1,
        offload=store,
        workers=workers,
        refine=config.refine_options(config.refine),
    )
    rows = _walk(model, walker, finished)
    ranks = workers.collect(spent(walker))  # and all have written their layers
    if not first:
        workers.agree(None)  # the first process has written the checkpoint
        return None

    changed, refinement = {}, None
    if config.refine_norms:
        changed, refinement = _refine_end_to_end(model, walker, finished, config, probe)
    with torch.no_grad():
        logits = model.head(changed.get(model.final_norm_name))(walker.probe)[0].cpu()
    totals = {
        "seconds": time.perf_counter() - began,
        "seconds_forward": walker.clock.forward,
        "seconds_hessian": walker.clock.hessian,
        "seconds_solve": walker.clock.solve,
        "seconds_refine": walker.clock.refine,
        "seconds_io": walker.clock.io,
        "peak_host_bytes": peak_host(),
        "peak_device_bytes": _peak_device(device),
        "source_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "packed_bytes": planned.packed_bytes,
        "calibration_tokens": sum(ids.numel() for ids in samples),
        "processes": workers.count,
        "ranks": ranks,
        "parameters_quantized": planned.parameters,
    }
    report = {
        "format_version": 1,
        "tool": f"marlin-gptq {marlin_kernel.__version__}",
        "source": origin,
        "config": config.as_dict() | {"seqlen": seqlen, "dtype": str(dtype).removeprefix("torch.")},
        "environment": environment(device),
        "totals": totals,
        "layers": rows,
        "refinement": refinement,
    }
    log.info("writing the checkpoint")
    try:
        write_checkpoint(
            out,
            config,
            model,
            finished,
            probe=(probe, logits),
            source=origin,
            report=report,
            changed=changed,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"save={str(out)!r}: the checkpoint cannot be written ({error}); all layers are "
            "finished and kept: make room there, and continue with --resume"
        ) from error
    finished.remove()
    workers.agree(None)
    return report


def _walk(
    model: StreamedModel, walker: Walker, finished: FinishedLayers | None
) -> list[dict[str, Any]]:
    """Advance over finished layers, quantize the others; returns the report rows of all.

    finished: where they are kept; None in a process that does not see the folder.
    """
    rows: list[dict[str, Any]] = []
    agree, first = walker.workers.agree, walker.workers.rank == 0
    done = agree(finished.count() if first else None)
    stages = len(model.family.stages)
    total = model.num_layers * stages
    with (
        tqdm(total=total, unit="stage", desc="quantize", disable=not first) as bar,
        BackgroundWriter(finished, model.device) if finished else nullcontext() as writer,
        logging_redirect_tqdm(),
    ):
        for index in range(model.num_layers):
            if index < done:
                if finished is not None and finished.parts == walker.workers.count:
                    layers, added = finished.load(index)
                else:  # some do not see the folder
                    layers, added = agree(finished.load(index) if first else None)
                prefix = model.layer_name(index)
                wtype = walker.options.wtype
                walker.advance(index, layer_weights(layers, wtype, prefix, model.device))
                log.info("layer %d of %d was finished before", index, model.num_layers)
                rows += added
                bar.update(stages)
                continue

            def on_stage(path: str) -> None:
                bar.update(1)

            began = time.perf_counter()
            results = walker.quantize_layer(index, on_stage)
            if writer is None:
                continue
            added = [_row(result, model.device) for result in results] if first else []
            with walker.timed("io"), walker.timed("io.write"):
                writer.save(index, results, added)
            if not first:
                continue
            rows += added
            _log_layer(model.layer_name(index), added)
            worst = max(row["relative_error"] for row in added)
            note = f"layer {index}: error up to {worst:.3f}"
            if walker.tokens:
                note += f", {walker.tokens / (time.perf_counter() - began):,.0f} tokens/s"
            bar.set_postfix_str(note, refresh=False)
    return rows


def _log_layer(prefix: str, rows: Sequence[dict[str, Any]]) -> None:
    parts = [
        f"{row['name'].removeprefix(prefix + '.')} {row['relative_error']:.4f} ({row['loss']:.3g})"
        for row in rows
    ]
    parts.append(f"damping up to {max(row['damping'] for row in rows):.3g}")
    if refined := rows[0]["refinement"]:
        learned = f"{refined['before']:.4g} -> {refined['after']:.4g}"
        parts.append(f"held-out loss by learning {learned}")
    log.info("%s: relative error (loss): %s", prefix, ", ".join(parts))


def _refine_end_to_end(
    model: StreamedModel,
    walker: Walker,
    finished: FinishedLayers,
    config: QuantizeConfig,
    probe: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Learn scales and norm weights of all layers; `probe` passes the model they make.

    Returns the tensors to store (see `write_checkpoint`), and the loss before and after.
    """

    def layers(index: int) -> dict[str, StoredLinear]:
        prefix = f"{model.layer_name(index)}."
        return {
            name.removeprefix(prefix): StoredLinear.of(t, config.wtype, model.device)
            for name, t in finished.load(index)[0].items()
        }

    steps = config.refine_norms
    log.info("learning scales and norm weights end to end, %d steps", steps)
    with (
        walker.timed("refine"),
        tqdm(total=steps, unit="step", desc="learn scales, norms") as bar,
        logging_redirect_tqdm(),
    ):
        scales, norms, refinement = refine_model(
            model,
            layers,
            [walker.batches[batch].ids[row, :length] for batch, row, length in walker.places],
            lambda i: walker.sample(walker.target, i),
            config.refine_options(steps),
            bar.update,
        )
    walker.clock.settle()
    walker.restart_probe(probe)
    for index in range(model.num_layers):
        prefix = f"{model.layer_name(index)}."
        weights = {
            path: linear.weight(scales[prefix + path]) for path, linear in layers(index).items()
        }
        walker.pass_probe(
            index,
            {path: weight.T.contiguous() for path, weight in weights.items()},
            {
                name.removeprefix(prefix): norm
                for name, norm in norms.items()
                if name.startswith(prefix)
            },
        )
    changed = {f"{name}.scales": value for name, value in scales.items()}
    return changed | norms, asdict(refinement)


def spent(walker: Walker) -> dict[str, Any]:
    """Of this process: seconds by kind of work (on a GPU those of its stream), and peak memory."""
    device = walker.model.device
    return {
        "rank": walker.workers.rank,
        "device": str(device),
        "tokens": walker.tokens,
        "seconds": walker.clock.seconds(),
        "peak_device_bytes": _peak_device(device),
        "peak_host_bytes": peak_host(),
    }


def _row(result: LinearResult, device: torch.device) -> dict[str, Any]:
    k, n = result.solution.codes.shape
    return {
        "name": result.name,
        "in_features": k,
        "out_features": n,
        **asdict(result.solution.statistics),
        "seconds": result.seconds,
        "refinement": asdict(result.refinement) if result.refinement else None,
        "peak_host_bytes": peak_host(),
        "peak_device_bytes": _peak_device(device),
    }


def random_samples(
    config: QuantizeConfig, seqlen: int, vocabulary: int
) -> tuple[list[Tensor], Tensor]:
    """Calibration samples int64 [seqlen] and probe tokens of a model without a tokenizer."""
    draw = torch.Generator().manual_seed(config.seed)
    count = 0 if config.nearest else config.nsamples
    samples = torch.randint(vocabulary, (count, seqlen), generator=draw)
    return list(samples), torch.randint(vocabulary, (PROBE_TOKENS,), generator=draw)


def _skipped(config: QuantizeConfig, model: StreamedModel) -> frozenset[str]:
    """--skip_gq: key and value projections of models with grouped queries stay unquantized."""
    heads = model.config.num_attention_heads
    if not config.skip_gq or getattr(model.config, "num_key_value_heads", heads) == heads:
        return frozenset()
    return frozenset(model.family.stages[0][1:])


def _linear_sizes(model: StreamedModel, skip: frozenset[str]) -> dict[str, tuple[int, int]]:
    sizes = {}
    for name in model.quantizable():
        if any(name.endswith(f".{path}") for path in skip):
            continue
        module = model.skeleton.get_submodule(name)
        sizes[name] = (module.in_features, module.out_features)
    return sizes


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a checkpoint. Raises CheckpointError if there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} holds no tokenizer that transformers can load ({reason}); copy the model's "
            "tokenizer files beside its weights"
        ) from error


def _check_vocabulary(samples: Sequence[Tensor], model: StreamedModel) -> None:
    largest = max((int(ids.max()) for ids in samples), default=0)
    if largest >= model.config.vocab_size:
        raise CheckpointError(
            f"{model.folder}: its tokenizer gives the token {largest}, the embedding has "
            f"{model.config.vocab_size} rows; copy the tokenizer files of this very model there"
        )


def _probe_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    ids = tokenizer("The quick brown fox jumps over the lazy dog, then writes code: x = 4 + 4.")
    return torch.tensor(ids.input_ids[:PROBE_TOKENS], dtype=torch.int64).clamp(max=vocabulary - 1)


def reset_peak_host() -> None:
    """Start counting `peak_host` anew, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("the peak of resident memory cannot be reset here")


def peak_host() -> int:
    """Peak resident memory of this process, bytes."""
    try:  # unlike getrusage, this can be reset
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _peak_device(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for reports; the commit, where this is a checkout."""
    import transformers

    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    if commit := _commit():
        facts["commit"] = commit
    return facts


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside another project's checkout
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        return None


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)
