"""Which kernels are worth building ahead of time: the type table times the configurations.

`specializations` lists them for one architecture; the generator writes them out, and the command
line of `compiler` builds them. Rules that keep the number low:

1. Each valid combination of types is served by one family: sm90 on sm_90a where it can, else sm80.
2. sm80: only rows that the selection returns for some number of tokens on some GPU of the
   architecture (one for few tokens, one for many, one between, and those for little shared memory).
3. sm90: only configurations that the selection returns for a grid of layer shapes and numbers of
   tokens (`GRID`, `TOKENS`, the tuned shapes, and shapes that the caller adds). With other shapes
   the package may select one outside of it, which is then compiled at first use; `complete` lists
   every configuration that exists.
4. Combinations that differ only in what a launch passes (act-order gathers activations before the
   product) share kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from marlin_kernel import kernel_configs, sm80_configs
from marlin_kernel.compiler import KernelSource
from marlin_kernel.errors import ConfigError
from marlin_kernel.kernel_configs import KernelConfig
from marlin_kernel.sm80_configs import Sm80Config
from marlin_kernel.validity import ARCHITECTURES, Combination, combinations

# Shared memory in bytes that a block may have, over all GPUs that run code of an architecture.
SHARED_LIMITS = {
    "sm_80": (163 << 10, 99 << 10),  # A100, and sm_86 and sm_89 that run its code
    "sm_86": (99 << 10,),
    "sm_89": (99 << 10,),
    "sm_90a": (227 << 10,),
    "sm_120": (99 << 10,),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_INPUTS = (512, 1024, 2048, 4096, 8192, 14336, 28672)
_OUTPUTS = (512, 1024, 2048, 4096, 8192, 16384, 28672, 57344)
GRID = tuple((k, n) for k in _INPUTS for n in _OUTPUTS)


@dataclass(frozen=True)
class Choice:
    """Up to `tokens` tokens, and for layers like k x n (0 x 0: all), `config` is selected."""

    k: int
    n: int
    tokens: int
    config: Sm80Config | KernelConfig


@dataclass(frozen=True)
class Variant:
    """Kernels of one combination of types on one architecture.

    arch: "sm_80", ...; family: "sm80" or "sm90"; batch_invariant: a row's bits do not depend on the
    number of tokens; choices: in the order they are to be tried.
    """

    arch: str
    family: str
    combination: Combination
    batch_invariant: bool
    choices: tuple[Choice, ...]

    @property
    def configs(self) -> tuple[Sm80Config | KernelConfig, ...]:
        """Without repetition, in order of first use."""
        return tuple(dict.fromkeys(choice.config for choice in self.choices))

    def source(self, config: Sm80Config | KernelConfig) -> KernelSource:
        """What to compile for one of `configs`."""
        return _source(self.family, self.combination, config)


@dataclass(frozen=True)
class Specialization:
    """One kernel to build: what, for which architecture, and for which types."""

    arch: str
    combination: Combination
    source: KernelSource


def architecture(capability: str) -> str:
    """Compiler target of a compute capability: "8.0" -> "sm_80", "9.0" -> "sm_90a".

    Raises ConfigError for one that the table of architectures does not list.
    """
    if capability not in ARCHITECTURES:
        raise ConfigError(
            f"capability {capability!r} is not one of {', '.join(ARCHITECTURES)}; "
            'give a list such as "8.0,9.0"'
        )
    return ARCHITECTURES[capability]


def _capability(arch: str) -> str:
    for capability, target in ARCHITECTURES.items():
        if target == arch:
            return capability
    raise ConfigError(f"architecture {arch!r} is not one of {', '.join(ARCHITECTURES.values())}")


def variants(arch: str, shapes: Iterable[tuple[int, int]] = ()) -> list[Variant]:
    """Everything that has kernels on `arch`; shapes: (k, n) of layers besides those of `GRID`.

    Raises ConfigError for an unknown architecture.
    """
    found: dict[tuple[Combination, bool], Variant] = {}
    extra = tuple(shapes)
    for combination in combinations(_capability(arch)):
        family = family_of(combination, arch)
        if family is None:
            continue
        kernels = kernel_combination(combination)
        for batch_invariant in (False, True):
            if (kernels, batch_invariant) not in found:
                choices = _CHOICES[family](arch, kernels, batch_invariant, extra)
                found[kernels, batch_invariant] = Variant(
                    arch, family, kernels, batch_invariant, choices
                )
    return list(found.values())


def missing(arch: str) -> list[Combination]:
    """Valid combinations on `arch` that no kernel serves."""
    return [c for c in combinations(_capability(arch)) if family_of(c, arch) is None]


def specializations(
    arch: str, shapes: Iterable[tuple[int, int]] = (), *, complete: bool = False
) -> list[Specialization]:
    """Kernels to build for `arch`, each once.

    shapes: as in `variants`; complete: every configuration, also those that are hardly ever chosen.
    Raises ConfigError for an unknown architecture.
    """
    kernels: dict[KernelSource, Specialization] = {}
    for variant in variants(arch, shapes):
        configs = _all_configs(variant) if complete else variant.configs
        for config in configs:
            source = variant.source(config)
            kernels.setdefault(source, Specialization(arch, variant.combination, source))
    return list(kernels.values())


# ---- the two families ----------------------------------------------------------------------------


def family_of(c: Combination, arch: str) -> str | None:
    """The family that serves a combination on `arch`, or None."""
    if c.reduction != "float32" or not c.k_full or c.weight_type.name != "uint4b8":
        return None
    if c.activation not in ("float16", "bfloat16") or arch not in SHARED_LIMITS:
        return None
    return "sm90" if arch == "sm_90a" else "sm80"


def kernel_combination(c: Combination) -> Combination:
    """The combination whose kernels serve `c`."""
    return Combination(c.weight_type, c.activation, c.output, c.group_size)


def _source(family: str, c: Combination, config: Sm80Config | KernelConfig) -> KernelSource:
    if family == "sm90":
        return config.source(c.activation, c.group_size)
    return config.source(sm80_configs.kernel_types(c))


def _sm80_choices(
    arch: str, c: Combination, batch_invariant: bool, shapes: tuple[tuple[int, int], ...]
) -> tuple[Choice, ...]:
    choices: list[Choice] = []
    types = sm80_configs.kernel_types(c)
    for limit in SHARED_LIMITS[arch]:
        rows: list[Choice] = []
        for tokens in (*range(1, 257), 1 << 30):
            config = sm80_configs.select_config(tokens, types, limit, batch_invariant)
            if rows and rows[-1].config == config:
                rows.pop()
            rows.append(Choice(0, 0, tokens, config))
        choices += rows
    return tuple(dict.fromkeys(choices))


@functools.cache
def _sm90_choices_of_group(
    group_size: int, batch_invariant: bool, shapes: tuple[tuple[int, int], ...]
) -> tuple[Choice, ...]:
    choices: list[Choice] = []
    tuned = tuple(
        (k_tiles * kernel_configs.TILE_K, column_tiles * kernel_configs.TILE_N)
        for k_tiles, column_tiles in kernel_configs._tuned_rows("h200")
    )
    for k, n in dict.fromkeys((*tuned, *shapes, *GRID)):
        k_tiles, column_tiles = -(-k // kernel_configs.TILE_K), -(-n // kernel_configs.TILE_N)
        rows: list[Choice] = []
        for tokens in TOKENS:
            config = kernel_configs.select_config(
                tokens, k_tiles, column_tiles, group_size, batch_invariant=batch_invariant
            )
            if rows and rows[-1].config == config:
                rows.pop()
            rows.append(Choice(k, n, tokens, config))
        rows.append(Choice(k, n, 1 << 30, rows.pop().config))
        choices += rows
    return tuple(choices)


def _sm90_choices(
    arch: str, c: Combination, batch_invariant: bool, shapes: tuple[tuple[int, int], ...]
) -> tuple[Choice, ...]:
    return _sm90_choices_of_group(c.group_size, batch_invariant, shapes)


_CHOICES = {"sm80": _sm80_choices, "sm90": _sm90_choices}


def _all_configs(variant: Variant) -> tuple[Sm80Config | KernelConfig, ...]:
    if variant.family == "sm80":
        return variant.configs
    group_size = variant.combination.group_size
    return tuple(c for c in kernel_configs.supported_configs() if c.fits(1, 64, group_size))
