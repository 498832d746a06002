"""Read checkpoint folders and their manifest, and the state dicts of the original Marlin."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from . import formats
from .errors import CheckpointError
from .formats import QuantizedLinear
from .layout import unpermute_columns
from .packing import unpack
from .schemes import Scheme, scheme_of
from .weight_types import weight_type

MANIFEST = "marlin_manifest.json"
# Safetensors inside, but not by name: servers load every *.safetensors of a folder as weights.
PROBE = "marlin_probe.st"
MANIFEST_VERSION = 1
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        return read_json(self.path / "config.json")

    def _handle(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = open_safetensors(file)
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
    if (path / INDEX).is_file():
        entries = read_json(path / INDEX).get("weight_map", {})
        files = {name: path / file for name, file in entries.items()}
    elif (path / SINGLE).is_file():
        return dict.fromkeys(open_safetensors(path / SINGLE).keys(), path / SINGLE)
    else:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise CheckpointError(
                f"{path} holds pickled weights only; convert them to safetensors first, for "
                "example by loading and saving the model with transformers (save_pretrained)"
            )
        raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}")
    present: dict[Path, set[str]] = {}
    for name, file in files.items():
        if file not in present:
            present[file] = set(open_safetensors(file).keys())
        if name not in present[file]:
            raise CheckpointError(f"{INDEX} says that {name} is in {file}, which lacks it")
    return files


def open_safetensors(file: Path) -> Any:
    """A handle on a file's tensors. Raises CheckpointError if it is missing or unreadable."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete")
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own type, OSError or ValueError
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises CheckpointError if it is missing or no JSON."""
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
    manifest = read_json(file)
    if manifest.get("format_version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{file} has format_version={manifest.get('format_version')}, this version reads "
            f"{MANIFEST_VERSION}; update marlin_kernel"
        )
    if "tensors" not in manifest:
        raise CheckpointError(f"{file} lacks the key 'tensors'; write the checkpoint again")
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
    """(token_ids int64 [T], logits [T, V]) stored with a checkpoint, or None.

    The dtype of the logits is that in which the model computed them. Raises CheckpointError if the
    file is not the one that was written.
    """
    facts = read_manifest(path).get("probe")
    if facts is None:
        return None
    with open_safetensors(Path(path) / PROBE) as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    different = {name for name, value in facts["sha256"].items() if hashes.get(name) != value}
    if different:
        raise CheckpointError(
            f"{', '.join(sorted(different))} of {Path(path) / PROBE} differ from the manifest; the "
            "checkpoint is damaged, write or copy it again"
        )
    return tensors["token_ids"], tensors["logits"]


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
        raise CheckpointError(
            f"{path} is not a state dict of plain tensors; other pickles are not opened, because "
            "they can run code"
        ) from error
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
