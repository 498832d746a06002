"""Llama-family decoders: a table of their parts, and a model whose layers stay on disk."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_kernel.checkpoint import open_checkpoint
from marlin_kernel.errors import CheckpointError, ConfigError, NumericalError

from .background import background_thread
from .hessian import is_finite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps its parts. Paths are relative to the causal LM, or to a decoder layer.

    stages: linears in the order of computation; those of one stage share their input.
    """

    base: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    stages: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage)

    @staticmethod
    def adds_to_residual(stage: int) -> bool:
        """Whether the outputs of a stage are added to the residual stream as they are."""
        return stage in (1, 3)


_LLAMA = Family()
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
_HUB_COPIES = ["consolidated*", "original/*"]  # the same weights again, as their authors keep them
FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def family_of(config) -> Family:
    """The table row of a transformers config. Raises ConfigError for an unknown architecture."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise ConfigError(
            f"model_type={config.model_type!r} is not a supported decoder; "
            f"choose a checkpoint of one of: {', '.join(sorted(FAMILIES))}"
        ) from None


def read_config(folder: Path) -> Any:
    """The transformers config of a folder, or of a config's file.

    Raises CheckpointError if it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # no JSON, an unknown model_type, a value of the wrong type
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers cannot read its config.json: {reason}"
        ) from error


def cache_dir() -> Path:
    """Folder for converted sources: $MARLIN_CACHE, else ~/.cache/marlin-gptq."""
    return Path(os.environ.get("MARLIN_CACHE", Path.home() / ".cache" / "marlin-gptq"))


def resolve_source(checkpoint: str) -> Path:
    """A local folder with safetensors for `checkpoint`.

    checkpoint: a Hugging Face folder, a hub name, or a GGUF file. A hub name is fetched by
    huggingface_hub into its own cache; a GGUF file is dequantized once into `cache_dir()`.
    Raises CheckpointError if it is none of these.
    """
    path = Path(checkpoint).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"checkpoint={checkpoint!r}: no such GGUF file")
        return _convert_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"checkpoint={checkpoint!r} holds no config.json; give the folder of a Hugging "
                "Face model"
            )
        return path
    if path.exists() or checkpoint.count("/") > 1 or checkpoint.startswith((".", "/", "~")):
        raise CheckpointError(
            f"checkpoint={checkpoint!r} is no folder and no .gguf file; "
            "give a Hugging Face folder, a hub name (owner/model) or a GGUF file"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(checkpoint, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES)
        )
    except Exception as error:  # the hub client raises many types; all mean "not to be had"
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint={checkpoint!r} is no local folder, and the hub did not provide it "
            f"({type(error).__name__}: {reason}); without network access give a local folder"
        ) from error


def config_folder(config: str) -> Path:
    """A folder that holds `config` (a transformers config file) as config.json, and no weights.

    Raises ConfigError if there is no such file, CheckpointError if transformers cannot read it.
    """
    path = Path(config).expanduser()
    if not path.is_file():
        raise ConfigError(f"from_config={config!r}: no such file; give a model's config.json")
    read_config(path)  # an error names this file, not the copy of it
    content = path.read_bytes()
    folder = cache_dir() / "configs" / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"config.json.{os.getpid()}.partial"
    partial.write_bytes(content)
    os.replace(partial, folder / "config.json")
    return folder


class RandomTensors(Mapping[str, Tensor]):
    """Weights of a model that exists only as a config: each is made when it is asked for.

    shapes: of all tensors; dtype: of the tensors; device: where they are made; seed: with a
    tensor's name, decides its values (which differ between kinds of device). Weights are normal
    with variance 1 / inputs, embeddings with variance 1, norms are one and biases zero.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self._shapes, self._dtype, self._device, self._seed = dict(shapes), dtype, device, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, fill, dtype=self._dtype, device=self._device)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7], "big"))
        drawn = torch.randn(shape, generator=generator, dtype=self._dtype, device=self._device)
        return drawn if "embed" in name else drawn.mul_(shape[1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def _convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file into a safetensors folder, once; keyed by the file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    target = cache_dir() / "gguf" / f"{path.stem}-{digest.hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"checkpoint={str(path)!r}: reading GGUF needs the package gguf; pip install gguf"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s once into %s", path.name, target)
    file = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**file)
        loaded = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    except Exception as error:  # of every type, from the reader of the format and from transformers
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint={str(path)!r}: transformers cannot read this GGUF file ({reason}); copy "
            "it again, or give the Hugging Face folder that it was made from"
        ) from error
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save what it read from GGUF: a fresh model takes the weights
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    if loaded.generation_config is not None:
        fresh.generation_config = loaded.generation_config
    del loaded
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    fresh.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        os.replace(partial, target)
    except OSError:  # another process was faster
        if not (target / "config.json").is_file():
            raise
    return target


class StreamedModel:
    """A causal LM on the meta device whose decoder layers are read from disk one at a time.

    folder: a Hugging Face folder with safetensors. dtype, device: of weights and activations.
    storage: dtype in which tensors that are not quantized will be stored (the source's own; float32
    becomes float16). random_seed: the folder holds a config only; weights are `RandomTensors`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        random_seed: int | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.folder, self.dtype, self.device = folder, dtype, device
        self.config = read_config(folder)
        if getattr(self.config, "quantization_config", None):
            raise CheckpointError(
                f"checkpoint={str(folder)!r} is already quantized; give the full-precision model"
            )
        self.family = family_of(self.config)
        if random_seed is None:
            self.tensors = open_checkpoint(folder)
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        if random_seed is not None:
            self.tensors = RandomTensors(self._shapes(), dtype, device, random_seed)
        self.base = self.skeleton.get_submodule(self.family.base)
        self._layers = list(getattr(self.base, self.family.layers))
        self.num_layers = len(self._layers)
        self._check_tensors()
        if random_seed is None:
            self._drop_unknown()
        first = self.tensors[f"{self.layer_name(0)}.{self.family.linears[0]}.weight"]
        self.storage = torch.bfloat16 if first.dtype == torch.bfloat16 else torch.float16
        # rotary frequencies are computed, not stored: build that module where it will be used
        rotary = self.base.rotary_emb
        self.base.rotary_emb = type(rotary)(config=self.config).to(device)
        self._arguments: dict[int, list[dict]] = {}
        self._reader = background_thread("read-ahead")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a checkpoint of this model holds."""
        shapes = {name: tuple(t.shape) for name, t in self.skeleton.state_dict().items()}
        if self.config.tie_word_embeddings:
            shapes.pop(f"{self.family.head}.weight", None)
        return shapes

    def _check_tensors(self) -> None:
        """Raise CheckpointError naming a tensor that is missing or has another shape than it
        must."""
        head = f"{self.family.head}.weight"
        for name, expected in self.skeleton.state_dict().items():
            if name not in self.tensors:
                if name == head and self.config.tie_word_embeddings:
                    continue
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} is missing from the checkpoint; copy it again"
                )
            shape = list(self.tensors.shape(name))
            if shape != list(expected.shape):
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} has shape {shape}, the config says "
                    f"{list(expected.shape)}; weights and config.json do not belong together"
                )

    def _drop_unknown(self) -> None:
        """Forget tensors that the model does not have: readers of a packed folder would stumble."""
        known = self.skeleton.state_dict().keys()
        unknown = [name for name in self.tensors if name not in known]
        for name in unknown:
            del self.tensors.files[name]
        told = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
        if told:
            log.warning(
                "%s: %d tensors are none of a %s with this config.json, and are left out: %s",
                self.folder,
                len(told),
                self.config.model_type,
                ", ".join(told[:3]) + (", ..." if len(told) > 3 else ""),
            )

    def quantizable(self) -> list[str]:
        """Names of all linears of all decoder layers."""
        return [
            f"{self.layer_name(i)}.{path}"
            for i in range(self.num_layers)
            for path in self.family.linears
        ]

    def stored(self, name: str) -> Tensor:
        """A tensor of the source in `storage`, on the CPU.

        Raises NumericalError if `storage` cannot hold its values.
        """
        tensor = self.tensors[name].cpu()
        rounded = tensor.to(self.storage) if tensor.is_floating_point() else tensor
        if not bool(torch.isfinite(rounded).all()):
            raise NumericalError(
                f"{name} holds NaN or Inf, or values beyond {self.storage}: the checkpoint is "
                "damaged"
            )
        return rounded

    def tensor(self, name: str) -> Tensor:
        """A tensor as the quantizer computes with it: in `dtype` on `device`.

        Raises CheckpointError if the source lacks it.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing from the checkpoint")
        return self.tensors[name].to(device=self.device, dtype=self.dtype)

    def as_stored(self, tensor: Tensor) -> Tensor:
        """The values that a reader of the checkpoint will get for an unquantized tensor."""
        return tensor.to(self.storage).to(tensor.dtype)

    def layer_name(self, index: int) -> str:
        return f"{self.family.base}.{self.family.layers}.{index}"

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, on `device`; drop the reference to free it."""
        layer = copy.deepcopy(self._layers[index])
        prefix = self.layer_name(index)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            read = ahead[1].result()
            _assign(layer, lambda name: read[name].to(self.device, non_blocking=True))
        else:
            _assign(layer, lambda name: self.tensor(f"{prefix}.{name}"))
        for name, parameter in layer.named_parameters():
            if not is_finite(parameter):
                raise NumericalError(
                    f"{prefix}.{name}: the weights hold NaN or Inf in {self.dtype}; the "
                    "checkpoint is "
                    "damaged, or --dtype bfloat16 / float32 is needed"
                )
        return layer

    def read_ahead(self, index: int) -> None:
        """Start reading layer `index` into pinned host memory, beside what the GPU does now.

        Does nothing where that would not help: on the CPU, and behind the last layer.
        """
        if self.device.type != "cuda" or index >= self.num_layers:
            return
        if isinstance(self.tensors, RandomTensors):
            return
        names = list(self._layers[index].state_dict())
        prefix = self.layer_name(index)

        def read() -> dict[str, Tensor]:
            return {
                name: self.tensors[f"{prefix}.{name}"].to(self.dtype).pin_memory() for name in names
            }

        self._ahead = index, self._reader.submit(read)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, hidden] of token ids [B, T]; [1, T, hidden] of [T]."""
        if not hasattr(self, "_embedding"):
            name = f"{self.family.base}.{self.family.embed}.weight"
            self._embedding = self.tensor(name)
        ids = input_ids.to(self.device)
        return nn.functional.embedding(ids if ids.dim() == 2 else ids[None], self._embedding)

    def drop_embedding(self) -> None:
        """Free the embedding table once all samples are embedded."""
        self.__dict__.pop("_embedding", None)

    @property
    def final_norm_name(self) -> str:
        return f"{self.family.base}.{self.family.norm}.weight"

    def final_norm(self) -> nn.Module:
        """The norm before the head, as it will be stored."""
        norm = copy.deepcopy(getattr(self.base, self.family.norm))
        prefix = f"{self.family.base}.{self.family.norm}"
        _assign(norm, lambda name: self.as_stored(self.tensor(f"{prefix}.{name}")))
        return norm

    def head_weight(self) -> Tensor:
        """Weight of the head [vocabulary, hidden], as it will be stored."""
        name = f"{self.family.head}.weight"
        if name not in self.tensors:
            name = f"{self.family.base}.{self.family.embed}.weight"
        return self.as_stored(self.tensor(name))

    def head(self, norm_weight: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Final norm, with another weight if given, and head, as they will be stored.

        The result makes logits [..., vocabulary] of hidden states [..., hidden].
        """
        norm, weight = self.final_norm(), self.head_weight()
        if norm_weight is not None:
            norm.weight.data = norm_weight.to(norm.weight)
        return lambda hidden: norm(hidden) @ weight.T

    def layer_arguments(self, length: int, index: int) -> dict:
        """Keyword arguments the model itself passes to layer `index` for a sequence of `length`.

        Found by running the model's own forward with recording layers, so masks and position
        embeddings are whatever this architecture and transformers version want.
        """
        if length not in self._arguments:
            if len(self._arguments) >= 64:  # documents have many lengths; keep memory bounded
                self._arguments.clear()
            recorded: list[dict] = []

            class Recorder(nn.Module):
                def __init__(self, layer: nn.Module) -> None:
                    super().__init__()
                    if hasattr(layer, "attention_type"):
                        self.attention_type = layer.attention_type

                def forward(self, hidden, *args, **kwargs):
                    recorded.append(kwargs)
                    return hidden

            layers, norm = (
                getattr(self.base, self.family.layers),
                getattr(self.base, self.family.norm),
            )
            setattr(self.base, self.family.layers, nn.ModuleList(map(Recorder, self._layers)))
            setattr(self.base, self.family.norm, nn.Identity())
            try:
                hidden = torch.zeros(1, length, 8, dtype=self.dtype, device=self.device)
                with torch.no_grad():
                    self.base(inputs_embeds=hidden, use_cache=False)
            finally:
                setattr(self.base, self.family.layers, layers)
                setattr(self.base, self.family.norm, norm)
            self._arguments[length] = recorded
        return self._arguments[length][index]


def _assign(module: nn.Module, tensor_of: Callable[[str], Tensor]) -> None:
    """Replace every meta parameter and persistent buffer of `module` by its loaded tensor."""
    for name in [*module.state_dict().keys()]:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        tensor = tensor_of(name)
        if isinstance(getattr(owner, leaf), nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(owner, leaf, tensor)


class Stages:
    """A decoder layer cut at the inputs of its linears, so that each is computed once.

    The four cuts are where the quantizer looks: attention input, output projection input, MLP
    input, down projection input. The layer's own attention and MLP modules do the work in between.
    """

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.layer = layer
        self.attention = layer.get_submodule(family.attention)
        self.mlp = layer.get_submodule(family.mlp)
        self.attention_norm = layer.get_submodule(family.attention_norm)
        self.mlp_norm = layer.get_submodule(family.mlp_norm)
        self._output = family.stages[1][0]
        self._down = family.stages[3][0]

    def attention_input(self, hidden: Tensor) -> Tensor:
        return _normalize(self.attention_norm, hidden)

    def attend(self, normed: Tensor, arguments: dict) -> Tensor:
        """Input of the output projection, from the attention input."""
        with _replaced(self.layer, self._output, nn.Identity()):
            return self.attention(hidden_states=normed, **arguments)[0]

    def project(self, attended: Tensor) -> Tensor:
        return self.layer.get_submodule(self._output)(attended)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        return _normalize(self.mlp_norm, hidden)

    def activate(self, normed: Tensor) -> Tensor:
        """Input of the down projection, from the MLP input."""
        with _replaced(self.layer, self._down, nn.Identity()):
            return self.mlp(normed)

    def descend(self, activated: Tensor) -> Tensor:
        return self.layer.get_submodule(self._down)(activated)

    def forward(self, hidden: Tensor, arguments: dict) -> Tensor:
        """The whole layer through its cuts; equals ``layer(hidden, **arguments)``."""
        hidden = hidden + self.project(self.attend(self.attention_input(hidden), arguments))
        return hidden + self.descend(self.activate(self.mlp_input(hidden)))


def _normalize(norm: nn.Module, hidden: Tensor) -> Tensor:
    """``norm(hidden)``; RMS norms on a GPU by one kernel that reads and writes 16-bit tensors once.

    The module's own six operations move ten times the bytes; it also rounds once more, before it
    multiplies by the weight.
    """
    eps = getattr(norm, "variance_epsilon", None)
    if eps is None or not hidden.is_cuda or hidden.dtype not in (torch.float16, torch.bfloat16):
        return norm(hidden)
    return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, eps)


class _replaced:
    """Context: `module.<path>` is `substitute` inside, itself again outside."""

    def __init__(self, module: nn.Module, path: str, substitute: nn.Module) -> None:
        parent, _, self.leaf = path.rpartition(".")
        self.owner = module.get_submodule(parent)
        self.substitute = substitute

    def __enter__(self) -> None:
        self.original = getattr(self.owner, self.leaf)
        setattr(self.owner, self.leaf, self.substitute)

    def __exit__(self, *_) -> None:
        setattr(self.owner, self.leaf, self.original)
