"""Settings of a quantization run: the only home of their defaults, and the rules they must obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from marlin_kernel.errors import ConfigError
from marlin_kernel.formats import FORMATS, check_type
from marlin_kernel.sparse_format import SPARSE_FORMAT, SPARSE_TYPES
from marlin_kernel.weight_types import (
    GROUP_SIZES,
    INTEGER_TYPES,
    WEIGHT_TYPES,
    WeightType,
    integer_type,
)

from .grid import GridOptions
from .recipes import read_recipe
from .refine import RefineOptions
from .solver import SolverOptions
from .sparsity import SPARSITIES

WBITS = (4, 8, 16)
DTYPES = ("float32", "float16", "bfloat16")
_GROUPSIZE = 128


@dataclass(frozen=True)
class QuantizeConfig:
    """One run. Names are those of the command line; its --help explains each."""

    checkpoint: str = ""
    from_config: str | None = None
    # calibration
    dataset: str = "red"
    data_dir: str | None = None
    seed: int = 0
    nsamples: int = 256
    seqlen: int | None = None
    # format
    wbits: int = 16
    groupsize: int = _GROUPSIZE
    sym: bool = True
    weight_type: str | None = None
    sparsity: str | None = None
    format: str = "marlin"
    # method
    nearest: bool = False
    percdamp: float = 0.1
    blocksize: int = 128
    true_sequential: bool = True
    act_order: bool = True
    static_groups: bool = True
    asymmetric: bool = True
    target_damp: float = 1.0
    shrinkage: float = 0.1
    no_clip: bool = False
    clip_steps: int = 16
    clip_min: float = 0.25
    signed_scales: bool = True
    refit: int = 1
    sweeps: int = 1
    refine: int = 0
    refine_norms: int = 0
    skip_gq: bool = False
    # run
    save: str | None = None
    overwrite: bool = False
    resume: bool | None = None
    eval: tuple[str, ...] = ("wikitext2", "red")
    eval_tokens: int | None = None
    report: str | None = None
    device: str | None = None
    dtype: str | None = None
    offload_activations: str | None = None

    def __post_init__(self) -> None:
        _choice("wbits", self.wbits, WBITS)
        _choice("format", self.format, FORMATS)
        if self.weight_type is not None:
            _choice("weight_type", self.weight_type, tuple(WEIGHT_TYPES))
            _check_implied(self.weight_type, {"wbits": self.wbits, "sym": self.sym})
        sizes = GROUP_SIZES if self.wtype is None else self.wtype.group_sizes
        if self.groupsize not in sizes:
            of = "" if self.wtype is None else f", the sizes of {self.wtype.name}"
            raise ConfigError(
                f"groupsize={self.groupsize} is not one of {', '.join(map(str, sizes))}{of}"
            )
        if self.save == "":
            raise ConfigError("save='' names no folder; give one, or leave it out")
        if self.sparsity is not None:
            _choice("sparsity", self.sparsity, SPARSITIES)
        if self.dtype is not None:
            _choice("dtype", self.dtype, DTYPES)
        _at_least("nsamples", self.nsamples, 1)
        _at_least("blocksize", self.blocksize, 1)
        _at_least("clip_steps", self.clip_steps, 2)
        _at_least("refit", self.refit, 0)
        _at_least("sweeps", self.sweeps, 0)
        _at_least("refine", self.refine, 0)
        _at_least("refine_norms", self.refine_norms, 0)
        if self.seqlen is not None:
            _at_least("seqlen", self.seqlen, 2)
        if self.eval_tokens is not None:
            _at_least("eval_tokens", self.eval_tokens, 1)
        if not 0 <= self.percdamp <= 10:
            raise ConfigError(f"percdamp={self.percdamp} is not in [0, 10]; 0.01 to 0.1 is usual")
        if not 0 < self.target_damp <= 100:
            raise ConfigError(f"target_damp={self.target_damp} is not in (0, 100]; 1 is usual")
        if not 0 <= self.shrinkage < 1:
            raise ConfigError(f"shrinkage={self.shrinkage} is not in [0, 1); 0 to 0.1 is usual")
        if not 0 < self.clip_min <= 1:
            raise ConfigError(f"clip_min={self.clip_min} is not in (0, 1]; 0.25 is usual")
        if self.checkpoint and self.from_config:
            raise ConfigError(
                f"checkpoint={self.checkpoint!r} and from_config={self.from_config!r}: one model "
                "at a time; leave one out"
            )
        if self.wbits == 16:
            if self.from_config:
                raise ConfigError(
                    f"from_config={self.from_config!r} with wbits=16: random weights have nothing "
                    "to evaluate; add --wbits 4"
                )
            if self.save and not self.sparsity:
                raise ConfigError(
                    f"save={self.save!r} with wbits=16: there is nothing to pack; add --wbits 4"
                )
            if not self.sparsity:
                return
        if self.asymmetric and not self.true_sequential and not self.nearest:
            raise ConfigError(
                "asymmetric calibration corrects each stage for the quantized stages before it, "
                "which needs true_sequential; add --true-sequential, or --no-asymmetric"
            )
        for name in ("refine", "refine_norms"):
            if getattr(self, name) and (self.nearest or not self.asymmetric or self.wbits == 16):
                raise ConfigError(
                    f"{name}={getattr(self, name)} learns scales from the unquantized model's "
                    "activations, which only asymmetric calibration carries along; leave it out, "
                    "or use --asymmetric with --wbits 4|8 and without --nearest"
                )
        if self.sparsity and self.wbits != 16 and self.wtype.name not in SPARSE_TYPES:
            raise ConfigError(
                f"sparsity={self.sparsity!r} with weight_type={self.wtype.name}, sym={self.sym}: a "
                "pruned weight is the zero of a symmetric integer grid; add --sym, or leave out "
                "--weight_type"
            )
        if self.wtype is not None:
            check_type(self.format, self.wtype)
        if self.refine and self.wtype.scale != "float16":
            raise ConfigError(
                f"refine={self.refine} learns scales, and those of {self.wtype.name} are too "
                "coarse to move by small steps; leave it out"
            )
        moves_groups = self.act_order and not self.static_groups and not self.nearest
        if moves_groups and self.wtype is not None and self.wtype.name not in INTEGER_TYPES:
            raise ConfigError(
                "act_order without static_groups stores a group index per input, which layers of "
                f"{self.wtype.name} do not have; add --static-groups"
            )
        if self.sparsity and moves_groups:
            raise ConfigError(
                f"sparsity={self.sparsity!r} counts consecutive inputs, which act_order without "
                "static_groups tears apart; add --static-groups"
            )
        if moves_groups and self.format == "compressed-tensors":
            raise ConfigError(
                "act_order without static_groups stores a group index per input, which "
                "compressed-tensors no longer reads; add --static-groups, or use --format "
                "marlin|gptq"
            )

    @property
    def wtype(self) -> WeightType | None:
        """Type of the codes; None with 16 bits, whose weights are not rounded."""
        if self.weight_type is not None:
            return WEIGHT_TYPES[self.weight_type]
        return None if self.wbits == 16 else integer_type(self.wbits, self.sym)

    @property
    def stored_format(self) -> str:
        """Format of the tensors: Marlin has a 2:4 form of its own."""
        return SPARSE_FORMAT if self.sparsity and self.format == "marlin" else self.format

    @property
    def moves_groups(self) -> bool:
        """Whether inputs end up in groups other than ``k // groupsize``."""
        return (
            self.act_order and not self.static_groups and not self.nearest and self.groupsize != -1
        )

    def solver_options(self) -> SolverOptions:
        """What of these settings concerns one linear."""
        grid = GridOptions(
            clip=not self.no_clip and not self.nearest,
            clip_min=self.clip_min,
            clip_steps=self.clip_steps,
            signed=self.signed_scales,
        )
        return SolverOptions(
            wtype=self.wtype,
            group_size=self.groupsize,
            grid=grid,
            blocksize=self.blocksize,
            percdamp=self.percdamp,
            act_order=self.act_order,
            static_groups=self.static_groups,
            nearest=self.nearest,
            refit=self.refit,
            sweeps=self.sweeps,
            asymmetric=self.asymmetric,
            target_damp=self.target_damp,
            shrinkage=self.shrinkage,
            sparsity=self.sparsity,
        )

    def refine_options(self, steps: int) -> RefineOptions | None:
        """Of a refinement of so many steps; None for 0."""
        return RefineOptions(steps, seed=self.seed) if steps else None

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON and YAML can hold them."""
        return {**asdict(self), "eval": list(self.eval)}

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the codes: two runs that agree here may continue each other."""
        left_out = {
            "checkpoint", "data_dir", "save", "overwrite", "resume", "eval", "eval_tokens",
            "report", "format", "from_config", "offload_activations",
        }  # fmt: skip
        facts = {key: value for key, value in self.as_dict().items() if key not in left_out}
        return facts | {"weight_type": None if self.wtype is None else self.wtype.name}


def _check_implied(name: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError if `wbits` or `sym` among the values contradict the weight type `name`."""
    implied = _implied(name)
    for key, value in values.items():
        if key in implied and value != implied[key]:
            raise ConfigError(
                f"{key}={value} with weight_type={name!r}, which means {key}={implied[key]}; leave "
                "one out"
            )


def _implied(name: str) -> dict[str, Any]:
    """Settings that a weight type decides."""
    wtype = WEIGHT_TYPES[name]
    return {"wbits": wtype.bits, "sym": wtype.symmetric}


def _choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is too small; it must be at least {least}")


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """Settings of a recipe: a YAML file, or the name of one in configs/quantize (`recipes`).

    Raises ConfigError as `recipes.read_recipe` does.
    """
    return read_recipe(recipe, "quantize", {field.name for field in fields(QuantizeConfig)})


def resolve(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> QuantizeConfig:
    """Defaults, then the recipe, then the flags that were given (None = not given).

    Raises ConfigError for a value of another type than its setting has.
    """
    values: dict[str, Any] = {}
    for level in (recipe, {key: value for key, value in flags.items() if value is not None}):
        _add_level(values, level)
    if "eval" in values:
        names = values["eval"]
        names = names.split(",") if isinstance(names, str) else names
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"eval={names!r} is not a list of data sets")
        values["eval"] = tuple(n.strip() for n in names if n.strip() and n.strip() != "none")
    where = values.get("offload_activations")
    if where in (True, False, "none"):  # as a switch: in host memory, or not at all
        values["offload_activations"] = "host" if where is True else None
    for field in fields(QuantizeConfig):
        if field.name in values:
            values[field.name] = _typed(field.name, str(field.type), values[field.name])
    return replace(QuantizeConfig(), **values)


def _add_level(values: dict[str, Any], level: Mapping[str, Any]) -> None:
    """Let settings override those of the levels before, and `weight_type` decide what it implies.

    A type that a lower level named gives way to wbits or sym of this one, and to another type.
    """
    name = level.get("weight_type")
    if name is None:
        if "wbits" in level or "sym" in level:
            values.pop("weight_type", None)
        values.update(level)
        return
    _choice("weight_type", name, tuple(WEIGHT_TYPES))
    _check_implied(name, level)
    values.update({**level, **_implied(name)})
    sizes = WEIGHT_TYPES[name].group_sizes
    if "groupsize" not in level and values.get("groupsize", _GROUPSIZE) not in sizes:
        values["groupsize"] = sizes[-1]


def _typed(name: str, annotation: str, value: Any) -> Any:
    """`value`, if it has the type of a field's annotation ("int", "str | None", ...)."""
    kind, _, optional = annotation.partition(" | ")
    if kind == "float":  # YAML reads 1e-2 as a string, 1 as an int
        return _number(name, value)
    words = {"int": "an integer", "str": "a text", "bool": "true or false"}
    if kind in words and type(value).__name__ != kind and not (optional and value is None):
        raise ConfigError(f"{name}={value!r} is not {words[kind]}")
    return value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={value!r} is not a number") from None
