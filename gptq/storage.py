"""Finished layers on disk while a run is under way; then the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marlin_kernel.checkpoint import CheckpointWriter
from marlin_kernel.errors import CheckpointError, ConfigError
from marlin_kernel.formats import QuantizedLinear, zero_dtype
from marlin_kernel.schemes import Scheme
from marlin_kernel.weight_types import WeightType

from .background import background_thread
from .config import QuantizeConfig
from .distributed import Workers
from .grid import stored_scales
from .models import StreamedModel
from .refine import StoredLinear
from .sequential import LinearResult
from .solver import Solution, dequantize

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
_BUFFER = 32 << 20  # bytes that go to a file at once
_SAFETENSORS_DTYPES = {
    torch.uint8: "U8", torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def fingerprint(config: QuantizeConfig, source: str, samples: Sequence[Tensor], dtype: str) -> str:
    """sha256 of everything that decides the codes: settings, source, tokens, dtype."""
    digest = hashlib.sha256()
    facts = {"settings": config.fingerprint(), "source": source, "dtype": dtype}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for ids in samples:
        digest.update(ids.to(torch.int64).numpy().tobytes() + b"|")
    return digest.hexdigest()


class FinishedLayers:
    """Folder of finished decoder layers: integer codes and scales, and the layer's report rows.

    Each file is written under a temporary name and renamed, so what is there is whole. Several
    processes may each write a part of the linears of every layer, to a file of its own; a layer is
    finished when all parts of it are there.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        resume: bool | None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """key: fingerprint of the run. resume: True continues, False discards, None refuses to
        choose. settings: JSON values by name, to say what differs. Raises ConfigError if what lies
        there belongs to another run or needs a decision."""
        self._open(folder)
        settings = dict(settings or {})
        stamp = folder / "run.json"
        if stamp.is_file():
            found = json.loads(stamp.read_text(encoding="utf-8"))
            if resume is None and self.count():
                raise ConfigError(
                    f"an unfinished run with {self.count()} finished layers lies in {folder}; "
                    "continue it with --resume, or discard it with --no-resume"
                )
            if resume and found["fingerprint"] != key:
                before = found.get("settings", {})
                changed = [
                    f"{name} {before[name]!r} there, {settings[name]!r} here"
                    for name in sorted(before.keys() & settings.keys())
                    if before[name] != settings[name]
                ]
                other = (
                    f"other settings ({', '.join(changed)})"
                    if changed
                    else "another source or another calibration text"
                )
                raise ConfigError(
                    f"--resume: the unfinished run in {folder} has {other}; repeat its options, or "
                    "discard it with --no-resume"
                )
            if not resume:
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not stamp.is_file():
            _write(stamp, json.dumps({"fingerprint": key, "settings": settings}).encode())

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self.part, self.parts = 0, 1
        self._buffer: Tensor | None = None

    @classmethod
    def shared(
        cls, first: FinishedLayers | None, folder: Path, workers: Workers
    ) -> FinishedLayers | None:
        """The folder as one of `workers` uses it: those that see what the first one writes there
        share the writing. first: what the first process has opened, None in the others. Returns
        None where the folder is not to be seen. All processes must call this together."""
        mark = None
        if first is not None:
            mark = f"seen-{uuid.uuid4().hex}"
            (folder / mark).touch()
        mark = workers.agree(mark)
        sees = workers.collect((folder / mark).is_file())
        if first is not None:
            (folder / mark).unlink()
        if not sees[workers.rank]:
            return None
        opened = first
        if opened is None:
            opened = cls.__new__(cls)
            opened._open(folder)
        opened.part, opened.parts = sum(sees[: workers.rank]), sum(sees)
        return opened

    def count(self) -> int:
        """Number of leading layers that are finished."""
        index = 0
        while self._files(index):
            index += 1
        return index

    def save(
        self, index: int, results: Sequence[LinearResult], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write layer `index`, or this process's part of it: the linears of `results` that fall to
        it, and `rows` (the first part's are those of the whole layer)."""
        tensors = {}
        for result in _share(results, self.parts)[self.part]:
            for part, tensor in stored_tensors(result.solution).items():
                if part == "codes" and _fits_nibbles(result.solution):
                    part, tensor = "nibbles", tensor[0::2] | tensor[1::2] << 4
                tensors[f"{result.name}:{part}"] = tensor
        if self._buffer is None:
            pinned = any(tensor.is_cuda for tensor in tensors.values())
            self._buffer = torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=pinned)
        file = self._file(index, self.part, self.parts)
        partial = file.with_suffix(".partial")
        try:
            _write_tensors(partial, tensors, {"rows": json.dumps(list(rows))}, self._buffer)
            os.replace(partial, file)
        except OSError as error:
            raise ConfigError(
                f"{self.folder} does not take finished layer {index} ({error}); earlier ones are "
                "kept: make room there, and continue with --resume"
            ) from error

    def load(self, index: int) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
        """(tensors of each linear by name, report rows) of layer `index`.

        Raises CheckpointError if its file is damaged.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        rows: list[dict[str, Any]] = []
        for path in self._files(index):
            try:
                with safe_open(path, "pt") as file:
                    rows += json.loads(file.metadata()["rows"])
                    for key in file.keys():  # noqa: SIM118 (no mapping)
                        name, _, part = key.rpartition(":")
                        tensor = file.get_tensor(key)
                        if part == "nibbles":
                            part, tensor = (
                                "codes",
                                torch.stack([tensor & 15, tensor >> 4], 1).flatten(0, 1),
                            )
                        layers.setdefault(name, {})[part] = tensor
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path}: the record of a finished layer is damaged ({error}); "
                    "discard the unfinished run with --no-resume"
                ) from error
        return {name: layers[name] for name in sorted(layers)}, rows

    def remove(self) -> None:
        """Delete the folder with all that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int, part: int = 0, parts: int = 1) -> Path:
        own = "" if parts == 1 else f"-part-{part + 1}-of-{parts}"
        return self.folder / f"layer-{index:04d}{own}.safetensors"

    def _files(self, index: int) -> list[Path]:
        """The files of layer `index`; none if it is not finished."""
        if self._file(index).is_file():
            return [self._file(index)]
        for first in self.folder.glob(f"layer-{index:04d}-part-1-of-*.safetensors"):
            parts = int(first.stem.rpartition("-")[2])
            files = [self._file(index, part, parts) for part in range(parts)]
            if all(file.is_file() for file in files):
                return files
        return []


class BackgroundWriter:
    """Saves finished layers on a thread of its own, one at a time, in order.

    As a context manager it waits for the last one, also when the block ends with an exception.
    """

    def __init__(self, finished: FinishedLayers, device: torch.device) -> None:
        self._finished, self._device = finished, device
        self._thread = background_thread("write-behind")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: Future[None] | None = None

    def save(
        self, index: int, results: Sequence[LinearResult], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Hand a layer over; waits for the one before. Raises what saving that one raised."""
        self.wait()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        self._pending = self._thread.submit(self._save, ready, index, results, rows)

    def _save(self, ready: Any, index: int, results: Any, rows: Any) -> None:
        if self._stream is None:
            self._finished.save(index, results, rows)
            return
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):  # the GPU goes on with the next layer
            self._finished.save(index, results, rows)

    def wait(self) -> None:
        """Until the layer handed over last is saved. Raises what saving it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _share(results: Sequence[LinearResult], parts: int) -> list[list[LinearResult]]:
    """The linears of a layer in parts of about the same size: the largest first, each to the part
    that has least."""
    shares: list[list[LinearResult]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for result in sorted(results, key=lambda r: -r.solution.codes.numel()):
        least = sizes.index(min(sizes))
        shares[least].append(result)
        sizes[least] += result.solution.codes.numel()
    return shares


def _write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], buffer: Tensor
) -> None:
    """A safetensors file, flushed to disk. Tensors on any device go through `buffer`, uint8 and on
    the host: new pages for copies of a large layer would take longer than the writing."""
    named = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in named:  # aligned, since larger elements come first
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = _SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as stream:
        _write_all(stream, len(text).to_bytes(8, "little") + text)
        view = memoryview(buffer.numpy())
        for _, tensor in named:
            for part in tensor.contiguous().view(-1).view(torch.uint8).split(buffer.numel()):
                buffer[: part.numel()].copy_(part)
                _write_all(stream, view[: part.numel()])
        os.fsync(stream.fileno())


def _write_all(stream: Any, content: bytes | memoryview) -> None:
    while len(content):
        content = content[stream.write(content) :]


def _fits_nibbles(solution: Solution) -> bool:
    """Whether the record of a layer may hold two codes a byte."""
    wtype = solution.wtype
    return wtype is not None and wtype.bits == 4 and solution.codes.shape[0] % 2 == 0


def stored_tensors(solution: Solution) -> dict[str, Tensor]:
    """The tensors of a finished linear: codes, and scales and zeros as the checkpoint has them."""
    wtype, common = solution.wtype, solution.global_scale
    tensors = {
        "codes": solution.codes,
        "scales": solution.scales.half(),
        "zeros": solution.zeros.to(torch.uint8),
        "g_idx": solution.g_idx.to(torch.int32),
    }
    if wtype is not None:
        tensors["scales"] = stored_scales(solution.scales, wtype, common)
        tensors["zeros"] = solution.zeros.to(zero_dtype(wtype))
    return tensors if common is None else tensors | {"global_scale": common.clone()}


def quantized_linear(
    tensors: Mapping[str, Tensor], wtype: WeightType, group_size: int
) -> QuantizedLinear:
    """A finished linear as the checkpoint formats take it. tensors: `stored_tensors`, and a bias if
    it has one."""
    return QuantizedLinear.of(
        tensors["codes"],
        tensors["scales"],
        wtype,
        group_size,
        zeros=None if wtype.is_float else tensors["zeros"],
        g_idx=tensors["g_idx"],
        bias=tensors.get("bias"),
        global_scale=tensors.get("global_scale"),
    )


def layer_weights(
    layers: Mapping[str, Mapping[str, Tensor]],
    wtype: WeightType | None,
    prefix: str,
    device: torch.device,
) -> dict[str, Tensor]:
    """Dequantized weights float32 [N, K] of a loaded layer, by path inside the layer."""
    weights = {}
    for name, tensors in layers.items():
        if wtype is None:
            t = {part: tensor.to(device) for part, tensor in tensors.items()}
            weight = dequantize(t["codes"], t["scales"], t["zeros"], t["g_idx"].long())
        else:
            weight = StoredLinear.of(tensors, wtype, device).weight()
        weights[name.removeprefix(f"{prefix}.")] = weight.T.contiguous()
    return weights


def write_checkpoint(
    out: Path,
    config: QuantizeConfig,
    model: StreamedModel,
    finished: FinishedLayers,
    *,
    probe: tuple[Tensor, Tensor],
    source: Mapping[str, Any],
    report: Mapping[str, Any],
    changed: Mapping[str, Tensor] | None = None,
) -> Path:
    """Assemble the packed folder from the finished layers and the source's other tensors.

    changed: tensors that replace those of the same name, ``NAME.scales`` the scales of a layer.
    probe: token ids int [T] and the logits [T, vocabulary] the packed model must give.
    Nothing appears at `out` before it is complete.
    """
    wtype = config.wtype
    scheme = None  # pruned weights are plain tensors
    if wtype is not None:
        scheme = Scheme(
            config.stored_format,
            wtype,
            config.groupsize,
            act_order=config.moves_groups,
            gptq_version=1 if wtype.symmetric else 2,  # v1 cannot express a zero point of 0
        )
    linears = set(model.quantizable())
    changed = changed or {}
    with CheckpointWriter(out, scheme, overwrite=config.overwrite) as writer:
        quantized: set[str] = set()
        pruned_names: set[str] = set()
        for index in range(model.num_layers):
            for name, found in finished.load(index)[0].items():
                t = {part: tensor.to(model.device) for part, tensor in found.items()}
                bias = f"{name}.bias"
                if wtype is None:
                    pruned = t["codes"].T.to(model.storage).contiguous()
                    writer.add(f"{name}.weight", pruned)
                    pruned_names.add(f"{name}.weight")
                    continue
                if f"{name}.scales" in changed:
                    scales, common = changed[f"{name}.scales"], t.get("global_scale")
                    t["scales"] = stored_scales(scales, wtype, common)
                if bias in model.tensors:
                    t["bias"] = model.stored(bias).to(model.device)
                writer.add_layer(name, quantized_linear(t, wtype, config.groupsize))
                quantized.add(name)
        prefixes = tuple(f"{name}." for name in quantized)
        for name in model.tensors:
            if name in pruned_names or name.startswith(prefixes):
                continue
            new = changed.get(name)
            writer.add(name, model.stored(name) if new is None else new.to(model.storage).cpu())
        for name in TOKENIZER_FILES:
            if (model.folder / name).is_file():
                writer.add_file(name, model.folder / name)
        writer.add_file("quantization_report.json", (json.dumps(report, indent=2) + "\n").encode())
        recipe = json.dumps(config.as_dict(), indent=2) + "\n"
        writer.add_file("quantization_recipe.json", recipe.encode())
        writer.add_probe(*probe)
        description = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
        for key in ("torch_dtype", "dtype"):
            description.pop(key, None)
        description["dtype"] = str(model.storage).removeprefix("torch.")
        ignore = ["lm_head", *sorted(linears - quantized)]
        return writer.finish(description, ignore=ignore, source=source, settings=config.as_dict())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
