"""Models and what is known about them on disk, for evaluation."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from marlin_kernel.errors import CheckpointError, ConfigError
from marlin_kernel.layer import Layer
from marlin_kernel.weight_types import WEIGHT_TYPES

log = logging.getLogger(__name__)

QUANTIZATION_REPORT = "quantization_report.json"
WEIGHT_FILES = ("*.safetensors", "*.bin")


def load(
    path: str, *, device: str = "cpu", dtype: torch.dtype | None = None, verify: bool = False
) -> nn.Module:
    """Load a packed or plain checkpoint as a causal language model in eval mode.

    Raises CheckpointError if the checkpoint is missing or damaged, or if it is packed and its
    quantizer was not applied: transformers then only warns, and leaves random weights behind.
    """
    from marlin_kernel import hf

    local = Path(path).expanduser()
    if not local.exists() and (local.is_absolute() or path.startswith(("./", "../", "~"))):
        raise CheckpointError(f"{path} does not exist")
    name = str(local) if local.exists() else path
    try:
        model = hf.load_model(name, device=device, dtype=dtype, verify=verify)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_first_line(error)}") from error
    except SafetensorError as error:
        raise _damaged(path, error) from error
    check_quantizer_applied(model, name)
    return model


def is_packed(path: str) -> bool:
    """Whether `path` is a local folder whose config announces packed layers we read."""
    from marlin_kernel import hf

    return hf.is_packed(Path(path).expanduser())


def check_quantizer_applied(model: nn.Module, path: str) -> None:
    """Raise CheckpointError if `path` announces packed layers that the model does not have."""
    if not is_packed(path):
        return
    if not any(isinstance(module, Layer) for module in model.modules()):
        raise CheckpointError(
            f"{path} is a packed checkpoint, but none of its packed layers is in the model: its "
            "weights would be random. Import marlin_kernel.hf before transformers loads it, or use "
            "marlin_kernel.hf.load_model"
        )


def load_tokenizer(*paths: str | None) -> Any:
    """The tokenizer of the first checkpoint that has one. Raises CheckpointError if none does."""
    from marlin_kernel import hf

    reasons = []
    for path in paths:
        if path is None:
            continue
        try:
            return hf.load_tokenizer(str(Path(path).expanduser()) if Path(path).exists() else path)
        except (OSError, ValueError) as error:
            reasons.append(f"{path}: {_first_line(error)}")
    raise CheckpointError(f"no tokenizer found: {'; '.join(reasons)}")


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from "float16", "bfloat16", "float32"; "auto" and None give None.

    Raises ConfigError for any other name.
    """
    if name is None or isinstance(name, torch.dtype) or name == "auto":
        return None if name == "auto" else name
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={name!r} is not one of auto, float16, bfloat16, float32")
    return dtype


def choose_device(name: str | None) -> str:
    """The device asked for; by default a GPU if torch sees one, else the CPU.

    Raises ConfigError if torch does not know it, or sees no GPU.
    """
    cuda = torch.cuda.is_available()
    if name is None:
        return "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a torch device such as cpu or cuda:0") from error
    if device.type == "cuda" and not cuda:
        raise ConfigError(f"device={name!r}, but torch sees no GPU; use --device cpu")
    return name


def checkpoint_bytes(path: str) -> int | None:
    """Bytes of the weight files of a local folder; None for a hub name.

    None for a GGUF file too: its weights are quantized already, which is no size to compare with.
    """
    local = Path(path).expanduser()
    if not local.is_dir():
        return None
    for pattern in WEIGHT_FILES:
        found = list(local.glob(pattern))
        if found:
            return sum(file.stat().st_size for file in found)
    return None


def weights_dtype(path: str) -> str | None:
    """The dtype of most weights in a local folder's safetensors; None if packed or not local.

    Raises CheckpointError if a file is damaged.
    """
    local = Path(path).expanduser()
    if not local.is_dir() or is_packed(path):
        return None
    sizes: dict[str, int] = {}
    for file in local.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                for stored in map(tensors.get_slice, tensors.keys()):
                    dtype = stored.get_dtype()
                    sizes[dtype] = sizes.get(dtype, 0) + math.prod(stored.get_shape())
        except SafetensorError as error:
            raise _damaged(path, error) from error
    most = max(sizes, key=sizes.__getitem__, default=None)
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most, most)


def quantization_report(path: str | None) -> dict[str, Any] | None:
    """What the quantizer wrote beside the packed checkpoint, or None."""
    file = Path(path).expanduser() / QUANTIZATION_REPORT if path else None
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        log.warning("%s is not valid JSON (%s): left out of the report", file, error)
        return None


def row_name(path: str, report: dict[str, Any] | None) -> str | None:
    """Label of a quantized folder in tables, such as "GPTQ INT4"; None for a plain checkpoint.

    report: its quantization report, if it has one; without, its config tells what it can.
    """
    if report and "config" in report:
        return quantized_name(report["config"])
    if not is_packed(path):
        return None
    file = Path(path).expanduser() / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))["quantization_config"]
    method = {"gptq": "GPTQ", "awq": "AWQ"}.get(stored["quant_method"], "packed")
    group = next(iter((stored.get("config_groups") or {}).values()), {}).get("weights") or {}
    bits = stored.get("bits") or group.get("num_bits", 4)
    weights = f"{'FP' if group.get('type') == 'float' else 'INT'}{bits}"
    known = WEIGHT_TYPES.get(stored.get("weight_type"))
    return f"{method} {known.name if known and known.is_float else weights}"


def quantized_name(settings: Mapping[str, Any]) -> str:
    """Label of what the quantizer makes with these settings: "RTN INT4", "SparseGPT 2:4", ..."""
    nearest, bits = settings.get("nearest"), settings.get("wbits", 4)
    name = f"{'RTN' if nearest else 'GPTQ'} {settings.get('weight_type') or f'INT{bits}'}"
    sparsity = settings.get("sparsity")
    if not sparsity:
        return name
    if bits == 16:
        name = "magnitude" if nearest else "SparseGPT"
    return f"{name} {sparsity}"


def context_length(path: str) -> int | None:
    """Tokens that the checkpoint's model was made for, or None if its config does not say.

    Raises CheckpointError if transformers cannot read the config.
    """
    from transformers import AutoConfig

    local = Path(path).expanduser()
    try:
        if local.suffix == ".gguf":
            config = AutoConfig.from_pretrained(str(local.parent), gguf_file=local.name)
        else:
            config = AutoConfig.from_pretrained(str(local) if local.exists() else path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_first_line(error)}") from error
    return getattr(config, "max_position_embeddings", None)


def _damaged(path: str, error: SafetensorError) -> CheckpointError:
    return CheckpointError(
        f"{path}: a weight file is cut short or damaged ({_first_line(error)}); copy it again"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
