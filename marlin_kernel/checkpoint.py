"""Checkpoint folders: write packed ones atomically, convert between formats; reads are re-exported.

A packed folder is an ordinary Hugging Face folder (config.json, tokenizer files, safetensors) plus
`marlin_manifest.json`, which is written last and carries the hash of every tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import formats
from .checkpoint_files import (
    INDEX,
    MANIFEST,
    MANIFEST_VERSION,
    PROBE,
    SINGLE,
    Checkpoint,
    layer_tensors,
    open_checkpoint,
    packed_scheme,
    read_layer,
    read_manifest,
    read_original,
    read_probe,
    source_hash,
    tensor_hash,
    verify_tensors,
)
from .errors import CheckpointError, ConfigError
from .formats import LayerSpec, QuantizedLinear
from .schemes import Scheme, quantization_config
from .sparse_format import SPARSE_FORMAT

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "INDEX",
    "MANIFEST",
    "MANIFEST_VERSION",
    "PROBE",
    "SINGLE",
    "check_target",
    "convert",
    "layer_tensors",
    "open_checkpoint",
    "packed_scheme",
    "read_layer",
    "read_manifest",
    "read_original",
    "read_probe",
    "source_hash",
    "tensor_hash",
    "verify_tensors",
]

PADDING_RULE = (
    "marlin: K to a multiple of max(64, group size), N to a multiple of 64; added codes equal the "
    "zero point, added scales are 0, so padding weighs exactly zero; other formats: none"
)
_GIB = 1 << 30


class CheckpointWriter:
    """Writes a packed folder that appears complete or not at all.

    Tensors are collected into shards inside a temporary sibling of `out_dir`; `finish` writes
    config.json and the manifest, flushes everything to disk and renames the folder. At most one
    shard is held in memory. As a context manager it removes the temporary folder unless finished.

        with CheckpointWriter(out, Scheme("marlin", weight_type("uint4b8"), 128)) as writer:
            writer.add("model.embed_tokens.weight", tensor)
            writer.add_layer("model.layers.0.self_attn.q_proj", quantized)
            writer.finish(config)
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        scheme: Scheme | None,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = _GIB,
    ) -> None:
        """scheme: format and grid of the layers to come (its `modules` are filled in by
        `add_layer`); None for a folder of plain tensors.

        overwrite: replace a checkpoint that is already at `out_dir`; max_shard_bytes: of one
        safetensors file. Raises ConfigError if `out_dir` exists and must not be replaced.
        """
        self.out = Path(out_dir).absolute()
        self.overwrite = overwrite
        check_target(self.out, overwrite)
        self.scheme = None if scheme is None else replace(scheme, modules={})
        self._max_shard_bytes = max_shard_bytes
        self._hashes: dict[str, str] = {}
        self._specs: dict[str, LayerSpec] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._probe: dict[str, Any] | None = None
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.out)
        unique = f"{_partial_prefix(self.out)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._folder = self.out.parent / unique
        self._folder.mkdir()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # gone already if finish() succeeded

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a plain tensor under its full name. Its values must not change until `finish`."""
        if name in self._hashes:
            raise CheckpointError(f"tensor {name} was added twice")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._write_shard()
        self._hashes[name] = tensor_hash(tensor)
        self._pending[name] = tensor
        self._pending_bytes += size

    def add_layer(self, name: str, layer: QuantizedLinear) -> None:
        """Add a quantized layer at module path `name`, in the format of the scheme.

        Raises ConfigError if the layer is not of the scheme, or the format cannot hold it.
        """
        scheme = replace(self.scheme, modules={**self.scheme.modules, name: layer.codes.shape})
        expected = scheme.layer(name, layer.bias is not None)
        act_order = expected.act_order or layer.g_idx is not None
        if replace(layer.spec, act_order=act_order) != expected:
            raise ConfigError(f"layer {name} is {layer.spec}, which is not of the {self.scheme}")
        foreign = scheme.fmt not in ("marlin", SPARSE_FORMAT)
        if foreign and scheme.group_size > layer.spec.k:
            raise ConfigError(
                f"group_size={scheme.group_size} is larger than the {layer.spec.k} inputs of "
                f"{name}, which readers of {scheme.fmt} refuse; use --format marlin, or a smaller "
                "group"
            )
        tensors = formats.write(
            layer, scheme.fmt, act_order=act_order, gptq_version=scheme.gptq_version
        )
        for suffix, tensor in tensors.items():
            self.add(f"{name}.{suffix}", tensor)
        self.scheme = scheme
        self._specs[name] = expected

    def add_file(self, name: str, content: bytes | str | os.PathLike[str]) -> None:
        """Add a file: bytes as they are, or the path of a file to copy."""
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)

    def add_probe(self, token_ids: Tensor, logits: Tensor) -> None:
        """Add the logits that the model must give: token_ids int [T], logits float [T, V].

        The dtype of `logits` is stored as it is: it says how exactly they were computed.
        """
        tensors = {
            "token_ids": token_ids.detach().cpu().to(torch.int64).contiguous(),
            "logits": logits.detach().cpu().contiguous(),
        }
        _save_tensors(tensors, self._folder / PROBE)
        self._probe = {"file": PROBE, "sha256": {n: tensor_hash(t) for n, t in tensors.items()}}

    def finish(
        self,
        config: Mapping[str, Any],
        *,
        ignore: Sequence[str] = ("lm_head",),
        source: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Path:
        """Complete the folder and put it in place. Returns its path.

        config: content of config.json, whose quantization_config is set here; ignore, meta: see
        `schemes.quantization_config`; source: name and hash of the source checkpoint; settings: of
        the quantizer. Both go into the manifest as they are.
        """
        from . import __version__

        if self._pending:
            self._write_shard()
        self._name_shards()
        meta = {"quantizer": [f"marlin_kernel:{__version__}"], **(meta or {})}
        scheme, quantization = self.scheme, None
        if scheme is not None:
            quantization = quantization_config(scheme, ignore=ignore, meta=meta)
            config = {**config, "quantization_config": quantization}
        self._write_json("config.json", config)
        if scheme is not None and scheme.fmt == "gptq":
            self._write_json("quantize_config.json", quantization)
        manifest = {
            "format_version": MANIFEST_VERSION,
            "tool": f"marlin_kernel {__version__}",
            **self._scheme_facts(),
            "layers": {name: self._layer_facts(spec) for name, spec in self._specs.items()},
            "source": dict(source or {}),
            "settings": dict(settings or {}),
            "ignore": list(ignore),
            "tensors": self._hashes,
            **({"probe": self._probe} if self._probe else {}),
        }
        for file in sorted(f for f in self._folder.rglob("*") if f.is_file()):
            _flush(file)
        self._write_json(MANIFEST, manifest)
        _flush(self._folder / MANIFEST)
        _flush(self._folder)
        check_target(self.out, self.overwrite)
        _put_in_place(self._folder, self.out)
        return self.out

    def _scheme_facts(self) -> dict[str, Any]:
        if self.scheme is None:
            return {"format": "plain"}
        return {
            "format": self.scheme.fmt,
            "weight_type": self.scheme.weight_type.name,
            "group_size": self.scheme.group_size,
            "act_order": self.scheme.act_order,
            "padding": PADDING_RULE,
        }

    def _layer_facts(self, spec: LayerSpec) -> dict[str, Any]:
        padded = self.scheme.fmt == "marlin"
        return {
            "k": spec.k,
            "n": spec.n,
            "k_padded": spec.packed.k_padded if padded else spec.k,
            "n_padded": spec.packed.n_padded if padded else spec.n,
            "group_size": spec.group_size,
            "act_order": spec.act_order,
            "bias": spec.bias,
        }

    def _write_shard(self) -> None:
        seen: set[int] = set()
        for name, tensor in self._pending.items():
            storage = tensor.untyped_storage().data_ptr()
            if storage in seen:  # safetensors refuses tensors that share memory
                self._pending[name] = tensor.clone()
            seen.add(storage)
        _save_tensors(self._pending, self._folder / f"shard-{len(self._shards)}")
        self._shards.append(list(self._pending))
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Give shards their final names, which hold their number, and write the index."""
        count = len(self._shards)
        if count == 1:
            os.rename(self._folder / "shard-0", self._folder / SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._folder / f"shard-{i}", self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._bytes}
        self._write_json(INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        (self._folder / name).write_text(text, encoding="utf-8")


def check_target(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise ConfigError if a checkpoint must not be written to `out`; cheap, for early checks."""
    out = Path(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise ConfigError(
            f"{out} exists and is no checkpoint of this tool; choose another folder, or remove it"
        )
    if not overwrite:
        raise ConfigError(f"{out} already holds a checkpoint; pass --overwrite to replace it")


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fmt: str,
    *,
    overwrite: bool = False,
    gptq_version: int | None = None,
) -> Path:
    """Write a packed folder in another format: the same codes, scales and zero points.

    path: a folder in any format that is read here; fmt: one of formats.FORMATS; gptq_version: how
    "gptq" stores zero points, by default as 1 (minus one) for symmetric types, and as 2 for others,
    since 1 cannot express a zero point of 0. Files that are neither weights nor configuration are
    copied. Returns `out`.
    Raises ConfigError if the format cannot hold a layer, CheckpointError if `path` is damaged.
    """
    checkpoint = Checkpoint(path)
    scheme = packed_scheme(checkpoint)
    manifest = read_manifest(path) if (Path(path) / MANIFEST).is_file() else {}
    if gptq_version is None:
        gptq_version = 1 if scheme.weight_type.symmetric else 2
    target = replace(scheme, fmt=fmt, gptq_version=gptq_version)
    for name in scheme.modules:
        formats.check_exportable(fmt, scheme.layer(name, bias=False))
    config = checkpoint.config()
    old = config.pop("quantization_config")
    with CheckpointWriter(out, target, overwrite=overwrite) as writer:
        prefixes = tuple(f"{name}." for name in scheme.modules)
        for name in checkpoint:
            if not name.startswith(prefixes):
                writer.add(name, checkpoint[name])
        for name in scheme.modules:
            writer.add_layer(name, read_layer(checkpoint, scheme, name))
        skipped = ("config.json", "quantize_config.json", INDEX, MANIFEST)
        for file in sorted(checkpoint.path.iterdir()):
            if file.is_file() and file.name not in skipped and file.suffix != ".safetensors":
                writer.add_file(file.name, file)
        writer._probe = manifest.get("probe")
        return writer.finish(
            config,
            ignore=old.get("ignore") or manifest.get("ignore") or ("lm_head",),
            source=manifest.get("source"),
            settings=manifest.get("settings"),
            meta=old.get("meta"),
        )


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of an ordinary new file."""
    save_file(tensors, path, {"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`, swapping with a checkpoint that is already there."""
    if out.exists() and any(out.iterdir()):
        _exchange(folder, out)
        _flush(out.parent)
        shutil.rmtree(folder)
    else:
        os.rename(folder, out)
        _flush(out.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step (Linux renameat2), or in two renames where that is missing."""
    at_fdcwd, rename_exchange = -100, 2
    with contextlib.suppress(AttributeError, OSError):  # no such function: not Linux, or old libc
        rename = ctypes.CDLL(None).renameat2
        if rename(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
            return
    aside = a.with_name(a.name + ".old")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)


def _partial_prefix(out: Path) -> str:
    return f".{out.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(out: Path) -> None:
    """Delete temporary folders of runs on this host that were killed."""
    prefix = _partial_prefix(out)
    for folder in out.parent.glob(prefix + "*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
