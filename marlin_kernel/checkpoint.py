"""Checkpoint folders: read any safetensors folder lazily, write a packed one atomically.

A packed folder is an ordinary Hugging Face folder (config.json, tokenizer files, safetensors) plus
`marlin_manifest.json`, which is written last and carries the hash of every tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import formats
from .errors import CheckpointError, ConfigError
from .formats import LayerSpec, QuantizedLinear
from .layout import unpermute_columns
from .packing import unpack
from .schemes import Scheme, quantization_config, scheme_of
from .weight_types import weight_type

MANIFEST = "marlin_manifest.json"
# Safetensors inside, but not by name: servers load every *.safetensors of a folder as weights.
PROBE = "marlin_probe.st"
MANIFEST_VERSION = 1
PADDING_RULE = (
    "marlin: K to a multiple of max(64, group size), N to a multiple of 64; added codes equal the "
    "zero point, added scales are 0, so padding weighs exactly zero; other formats: none"
)
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_GIB = 1 << 30


# ---- reading -------------------------------------------------------------------------------------


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors folder by name; an access maps that tensor alone into memory.

    path: the folder; files: tensor name -> file. Tensors are on the CPU, in their stored dtype.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _tensor_files(self.path)
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._handle(name).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, without reading them."""
        return {name: self.shape(name) for name in self}

    def config(self) -> dict[str, Any]:
        """Content of config.json. Raises CheckpointError if there is none."""
        return _read_json(self.path / "config.json")

    def _handle(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = _open_safetensors(file)
        return self._open[file]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a local safetensors folder, sharded or not, packed or plain.

    Raises CheckpointError if the folder, an indexed shard or a tensor is missing, or if it holds
    pickled weights only.
    """
    return Checkpoint(path)


def _tensor_files(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder; a checkpoint is a Hugging Face model folder"
        )
    if (path / _INDEX).is_file():
        entries = _read_json(path / _INDEX).get("weight_map", {})
        files = {name: path / file for name, file in entries.items()}
    elif (path / _SINGLE).is_file():
        return dict.fromkeys(_open_safetensors(path / _SINGLE).keys(), path / _SINGLE)
    else:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise CheckpointError(
                f"{path} holds pickled weights only; convert them to safetensors first, for example "
                "by loading and saving the model with transformers (save_pretrained)"
            )
        raise CheckpointError(f"{path} holds neither {_SINGLE} nor {_INDEX}")
    present: dict[Path, set[str]] = {}
    for name, file in files.items():
        if file not in present:
            present[file] = set(_open_safetensors(file).keys())
        if name not in present[file]:
            raise CheckpointError(f"{_INDEX} says that {name} is in {file}, which lacks it")
    return files


def _open_safetensors(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete")
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own type, OSError or ValueError
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def packed_scheme(checkpoint: Checkpoint) -> Scheme:
    """Scheme of a packed folder. Raises CheckpointError if the folder is not quantized."""
    config = checkpoint.config().get("quantization_config")
    if config is None:
        raise CheckpointError(f"{checkpoint.path}/config.json has no quantization_config")
    return scheme_of(config, checkpoint.shapes())


def layer_tensors(checkpoint: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors of the layer at path `name`, keyed by suffix."""
    prefix = name + "."
    return {n[len(prefix) :]: checkpoint[n] for n in checkpoint if n.startswith(prefix)}


def read_layer(checkpoint: Checkpoint, scheme: Scheme, name: str) -> QuantizedLinear:
    """The quantized layer at path `name` of a packed folder."""
    spec = scheme.layer(name, bias=f"{name}.bias" in checkpoint)
    tensors = layer_tensors(checkpoint, name)
    return formats.read(tensors, scheme.fmt, spec, gptq_version=scheme.gptq_version, name=name)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a packed folder (FORMAT.md lists its keys).

    Raises CheckpointError if there is none or if it is of another version.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: not a complete checkpoint of this tool")
    manifest = _read_json(file)
    if manifest.get("format_version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{file} has format_version={manifest.get('format_version')}, this version reads "
            f"{MANIFEST_VERSION}; update marlin_kernel"
        )
    return manifest


def verify_tensors(path: str | os.PathLike[str]) -> list[str]:
    """Names of tensors that differ from the manifest's hashes, are missing, or are not listed."""
    expected = read_manifest(path)["tensors"]
    checkpoint = Checkpoint(path)
    different = set(expected) ^ set(checkpoint)
    different |= {
        n for n in expected.keys() & checkpoint if tensor_hash(checkpoint[n]) != expected[n]
    }
    return sorted(different)


def read_probe(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor] | None:
    """(token_ids int64 [T], logits float32 [T, V]) stored with a checkpoint, or None."""
    if "probe" not in read_manifest(path):
        return None
    with _open_safetensors(Path(path) / PROBE) as tensors:
        return tensors.get_tensor("token_ids"), tensors.get_tensor("logits")


def tensor_hash(tensor: Tensor) -> str:
    """sha256 over dtype, shape and the bytes of a tensor in row-major order."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{dtype} {list(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def source_hash(path: str | os.PathLike[str]) -> str:
    """sha256 that identifies a source checkpoint: a file, or the config and weights of a folder."""
    path = Path(path)
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json")
    files = [path] if path.is_file() else sorted(f for p in patterns for f in path.glob(p))
    if not files:
        raise CheckpointError(f"{path} holds no checkpoint to hash")
    total = hashlib.sha256()
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        total.update(f"{file.name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


def read_original(
    path: str | os.PathLike[str],
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """Read a `*.marlin` or `*.marlin.g128` state dict of the original Marlin repository.

    Returns (quantized layers by module path, all other tensors by name). Sizes come from the
    shapes: ``B`` int32 [K / 16, 2 N], ``s`` float16 [G, N], symmetric 4-bit codes. The file is read
    with ``weights_only=True``, so it cannot run code.
    Raises CheckpointError if it is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is not a state dict of plain tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} is not a state dict of plain tensors")
    names = [name.removesuffix(".B") for name in state if name.endswith(".B")]
    if not names:
        raise CheckpointError(f"{path} holds no Marlin layer (no tensor named *.B)")
    layers = {}
    for name in names:
        words, scales = state.pop(f"{name}.B"), state.pop(f"{name}.s", None)
        state.pop(f"{name}.workspace", None)
        if scales is None or words.dim() != 2 or words.shape[1] != 2 * scales.shape[1]:
            raise CheckpointError(f"{name}.B and {name}.s do not belong together")
        k, groups = 16 * words.shape[0], scales.shape[0]
        wtype = weight_type("uint4b8")
        layers[name] = QuantizedLinear.of(
            unpack(words, wtype),
            unpermute_columns(scales, grouped=groups > 1),
            wtype,
            k // groups,
            bias=state.pop(f"{name}.bias", None),
        )
    return layers, state


# ---- writing -------------------------------------------------------------------------------------


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
        scheme: Scheme,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = _GIB,
    ) -> None:
        """scheme: format and grid of the layers to come (its `modules` are filled in by
        `add_layer`).

        overwrite: replace a checkpoint that is already at `out_dir`; max_shard_bytes: of one
        safetensors file. Raises ConfigError if `out_dir` exists and must not be replaced.
        """
        self.out = Path(out_dir).absolute()
        self.overwrite = overwrite
        check_target(self.out, overwrite)
        self.scheme = replace(scheme, modules={})
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
        self._folder = self.out.parent / f"{_partial_prefix(self.out)}{os.getpid()}"
        self._folder.mkdir()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # gone already if finish() succeeded

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a plain tensor under its full name."""
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
        """Add a quantized layer at module path `name`, in the format of the scheme."""
        scheme = replace(self.scheme, modules={**self.scheme.modules, name: layer.codes.shape})
        expected = scheme.layer(name, layer.bias is not None)
        act_order = expected.act_order or layer.g_idx is not None
        if replace(layer.spec, act_order=act_order) != expected:
            raise ConfigError(f"layer {name} is {layer.spec}, which is not of the {self.scheme}")
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
        """Add the logits that the model must give: token_ids int [T], logits float [T, V]."""
        tensors = {
            "token_ids": token_ids.detach().cpu().to(torch.int64).contiguous(),
            "logits": logits.detach().cpu().float().contiguous(),
        }
        save_file(tensors, self._folder / PROBE, {"format": "pt"})
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
        quantization = quantization_config(self.scheme, ignore=ignore, meta=meta)
        self._write_json("config.json", {**config, "quantization_config": quantization})
        if self.scheme.fmt == "gptq":
            self._write_json("quantize_config.json", quantization)
        manifest = {
            "format_version": MANIFEST_VERSION,
            "tool": f"marlin_kernel {__version__}",
            "format": self.scheme.fmt,
            "weight_type": self.scheme.weight_type.name,
            "group_size": self.scheme.group_size,
            "act_order": self.scheme.act_order,
            "padding": PADDING_RULE,
            "layers": {name: self._layer_facts(spec) for name, spec in self._specs.items()},
            "source": dict(source or {}),
            "settings": dict(settings or {}),
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
        save_file(self._pending, self._folder / f"shard-{len(self._shards)}", {"format": "pt"})
        self._shards.append(list(self._pending))
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Give shards their final names, which hold their number, and write the index."""
        count = len(self._shards)
        if count == 1:
            os.rename(self._folder / "shard-0", self._folder / _SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._folder / f"shard-{i}", self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._bytes}
        self._write_json(_INDEX, {"metadata": metadata, "weight_map": weight_map})

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
            f"{out} exists and is not a checkpoint of this tool; choose another folder, or remove it"
        )
    if not overwrite:
        raise ConfigError(f"{out} already holds a checkpoint; pass overwrite to replace it")


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fmt: str,
    *,
    overwrite: bool = False,
    gptq_version: int = 1,
) -> Path:
    """Write a packed folder in another format: the same codes, scales and zero points.

    path: a folder in any of the three formats; fmt: one of formats.FORMATS. Files that are neither
    weights nor configuration are copied. Returns `out`.
    Raises ConfigError if the format cannot hold a layer, CheckpointError if `path` is damaged.
    """
    checkpoint = Checkpoint(path)
    scheme = packed_scheme(checkpoint)
    manifest = read_manifest(path) if (Path(path) / MANIFEST).is_file() else {}
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
        skipped = ("config.json", "quantize_config.json", _INDEX, MANIFEST)
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
        pid = folder.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
