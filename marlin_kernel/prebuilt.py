"""Which kernels are worth building ahead of time: the type table times the configurations.

`specializations` lists them for one architecture; the generator writes them out, and the command
line of `compiler` builds them. Rules that keep the number low:

1. Each valid combination of types is served by one family, the one that `backends` prefers: on
   sm_90a sm90 for activations of 16 bits and sm90_8bit for those of 8 bits, elsewhere sm80.
2. Combinations share kernels where only a launch differs: act-order for many tokens gathers the
   activations before the product (for few, sm_90a may take another kernel behind that), a shard
   of an act-order layer is an ordinary layer with groups of 32, one group with zero points is
   repeated groups (sm80_configs.kernel_types; sm90_8bit takes it as it is), and blocks of the
   sm_90a kernels exchange sums in float32 for either reduction.
3. sm80: only rows that the selection returns for some number of tokens on some GPU of the
   architecture: one for few tokens, one for many, some between, those for little shared memory.
4. sm90, sm90_8bit: only configurations that the selection returns for a grid of layer shapes and
   numbers of tokens (`GRID`, `TOKENS`, the tuned shapes, and shapes that the caller adds). With
   other shapes the package may select one outside of it, which is then compiled at first use;
   `complete` lists every configuration that exists.
5. Besides the table: kernels that prepare activations and repack weights; those of 2:4 sparse
   weights from sm_80 on, and on sm_90a those of scaled 8-bit products, both chosen as in 4.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from marlin_kernel import (
    kernel_configs,
    repack,
    scaled_configs,
    sm80_configs,
    sm90_8bit_configs,
    sparse_configs,
    sparse_sm80,
)
from marlin_kernel.compiler import KernelSource
from marlin_kernel.errors import ConfigError
from marlin_kernel.kernel_configs import KernelConfig
from marlin_kernel.sm80_configs import GATHER_TOKENS, KernelTypes, Sm80Config, kernel_types
from marlin_kernel.sm90_8bit_configs import EightBitConfig, EightBitTypes
from marlin_kernel.sparse_format import SPARSE_TYPES
from marlin_kernel.validity import ARCHITECTURES, Combination, combinations
from marlin_kernel.weight_types import WEIGHT_TYPES

# Shared memory in bytes that a block may have, over all GPUs that run code of an architecture.
SHARED_LIMITS = {arch: (limit,) for arch, limit in sm80_configs.SHARED_LIMITS.items()}
SHARED_LIMITS["sm_80"] += SHARED_LIMITS["sm_86"]  # which runs the code of sm_80
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_INPUTS = (512, 1024, 2048, 4096, 8192, 14336, 28672)
_OUTPUTS = (512, 1024, 2048, 4096, 8192, 16384, 28672, 57344)
GRID = tuple((k, n) for k in _INPUTS for n in _OUTPUTS)
ANY = 1 << 30  # tokens without limit

GPU = "h200"  # whose tuned tables decide on sm_90a

_ACTIVATIONS_HEADER = "sm80/activations.cuh"

Config = Sm80Config | KernelConfig | EightBitConfig


@dataclass(frozen=True)
class Choice:
    """Up to `tokens` tokens, and for layers like k x n (0 x 0: all), `config` is selected."""

    k: int
    n: int
    tokens: int
    config: Config


@dataclass(frozen=True)
class Variant:
    """Kernels for one set of types on one architecture.

    arch: "sm_80", ...; family: "sm80", "sm90" or "sm90_8bit"; types: what they are compiled for;
    batch_invariant: a row's bits do not depend on the number of tokens; choices: in the order they
    are to be tried.
    """

    arch: str
    family: str
    types: KernelTypes
    batch_invariant: bool
    choices: tuple[Choice, ...]

    @property
    def configs(self) -> tuple[Config, ...]:
        """Without repetition, in order of first use."""
        return tuple(dict.fromkeys(choice.config for choice in self.choices))

    def source(self, config: Config) -> KernelSource:
        """What to compile for one of `configs`."""
        t = self.types
        if self.family == "sm80":
            return config.source(t)
        if self.family == "sm90_8bit":
            return config.source(eight_bit_types(t))
        return config.source(t.activation, t.group_size or -1, t.weight_type)


@dataclass(frozen=True)
class Specialization:
    """One kernel to build: for which architecture, under which name, and what.

    name: kernels with the same one belong together: activation, weight and output types, as in
    "float16_u4b8_float16", or what else they do.
    """

    arch: str
    name: str
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


def variants(
    arch: str,
    shapes: Iterable[tuple[int, int]] = (),
    wanted: Callable[[KernelTypes], bool] = lambda types: True,
) -> list[Variant]:
    """Everything that has kernels on `arch`.

    shapes: (k, n) of layers besides those of `GRID`; wanted: which types. Raises ConfigError for an
    unknown architecture.
    """
    found: dict[tuple[str, KernelTypes, bool], Variant] = {}
    extra = tuple(shapes)
    for combination in combinations(_capability(arch)):
        for family, types in filter(lambda k: wanted(k[1]), kernels_of(combination, arch)):
            for batch_invariant in (False, True):
                key = (family, types, batch_invariant)
                if key not in found:
                    choices = _choices(arch, *key, extra)
                    found[key] = Variant(arch, *key, choices)
    return list(found.values())


def missing(arch: str) -> list[Combination]:
    """Valid combinations on `arch` that no kernel serves."""
    return [c for c in combinations(_capability(arch)) if not kernels_of(c, arch)]


def specializations(
    arch: str, shapes: Iterable[tuple[int, int]] = (), *, complete: bool = False
) -> list[Specialization]:
    """Kernels to build for `arch`, each once.

    shapes: as in `variants`; complete: every configuration, also those that are hardly ever chosen.
    Raises ConfigError for an unknown architecture.
    """
    shapes = tuple(shapes)
    return [
        *kernels_to_build(variants(arch, shapes), complete=complete),
        *other_kernels(arch, shapes, complete=complete),
    ]


def layer_kernels(
    c: Combination, arch: str, k: int, n: int, tokens: Iterable[int]
) -> list[KernelSource]:
    """Kernels that products with a k x n layer launch on `arch` for these numbers of tokens; of
    family sm80 for all numbers."""
    found: list[KernelSource] = []
    for family, types in kernels_of(c, arch):
        v = Variant(arch, family, types, False, ())
        if family == "sm80":
            v = replace(v, choices=_choices(arch, family, types, False, ()))
            chosen = list(v.configs)
        else:
            chosen = [_select_sm90(family, types, False, m, k, n) for m in tokens]
        found += [*map(v.source, chosen), *_activation_sources(v)]
    return list(dict.fromkeys(found))


def kernels_to_build(
    variants: Sequence[Variant], *, complete: bool = False
) -> list[Specialization]:
    """Kernels of some variants, each once; complete: as in `specializations`."""
    found: dict[tuple[str, KernelSource], Specialization] = {}
    for v in variants:
        for config in _all_configs(v) if complete else v.configs:
            source = v.source(config)
            t = v.types
            name = f"{t.activation}_{t.weight.short}_{t.output}"
            found.setdefault((v.arch, source), Specialization(v.arch, name, source))
        for source in _activation_sources(v):
            found.setdefault((v.arch, source), Specialization(v.arch, "activations", source))
    return list(found.values())


def other_kernels(
    arch: str, shapes: Iterable[tuple[int, int]] = (), *, complete: bool = False
) -> list[Specialization]:
    """Kernels outside the type table: repacking, sparse and (sm_90a) scaled products."""
    named = [("repack", source) for source in _repack_sources()]
    if arch == "sm_90a":
        grid = tuple(dict.fromkeys((*shapes, *GRID)))
        named += [*_scaled_sources(grid, complete), *_sparse_sources(grid, complete)]
    elif arch != "sm_75":
        named += _sparse_sm80_sources()
    return [Specialization(arch, name, source) for name, source in dict.fromkeys(named)]


def _repack_sources() -> list[KernelSource]:
    return [
        repack.kernel_source(source, bits, permuted)
        for source in repack.SOURCES
        for bits, permuted in itertools.product((4, 8), (False, True))
        if source != "awq" or (bits == 4 and not permuted)
    ]


def _scaled_sources(
    grid: tuple[tuple[int, int], ...], complete: bool
) -> Iterable[tuple[str, KernelSource]]:
    for sparse in (False, True):
        configs = {scaled_configs.select(m, n, k, sparse) for m in TOKENS for k, n in grid}
        if complete:
            configs.update(scaled_configs.supported_configs(sparse))
        for operand, output, config in itertools.product(
            ("float8_e4m3fn", "int8"), ("float16", "bfloat16"), sorted(configs, key=str)
        ):
            name = f"scaled_{'sparse_' if sparse else ''}{operand}_{output}"
            yield name, config.source(operand, output, sparse)


def _sparse_sources(
    grid: tuple[tuple[int, int], ...], complete: bool
) -> Iterable[tuple[str, KernelSource]]:
    for weight, group_size in itertools.product(SPARSE_TYPES, sparse_configs.GROUP_SIZES):
        t = WEIGHT_TYPES[weight]
        select = functools.partial(sparse_configs.select, bits=t.bits, group_size=group_size)
        configs = {select(m, n, k) for m in TOKENS for k, n in grid}
        if complete:
            configs.update(sparse_configs.supported_configs(t.bits, group_size))
        for scalar, config in itertools.product(("float16", "bfloat16"), sorted(configs, key=str)):
            name = f"sparse_{scalar}_{t.short}_{scalar}"
            yield name, config.source(scalar, t.bits, group_size)


def _activation_sources(v: Variant) -> list[KernelSource]:
    """Kernels of `sm80_path` that prepare activations for products of a variant."""
    if v.types.eight_bit:
        return [quantizer(v.types)]
    if not v.types.permuted:
        return []
    sources = [KernelSource(_ACTIVATIONS_HEADER, "sm80::gather_activations<8>")]
    if v.family == "sm90":
        plans = (kernel_configs.gather_plan(m, k, k) for m in TOKENS for k in _INPUTS)
        sources += [plan.source() for plan in plans]
    return list(dict.fromkeys(sources))


def quantizer(types: KernelTypes) -> KernelSource:
    """The kernel that rounds activations of the type of the output to `types.activation`."""
    scalar = {"float16": "__half", "bfloat16": "__nv_bfloat16"}[types.output]
    code = {"int8": "int8_t", "float8_e4m3fn": "float8_e4m3"}[types.activation]
    return KernelSource(_ACTIVATIONS_HEADER, f"sm80::quantize_activations<{scalar}, {code}>")


def _sparse_sm80_sources() -> list[tuple[str, KernelSource]]:
    types = itertools.product(SPARSE_TYPES, sparse_configs.GROUP_SIZES, ("float16", "bfloat16"))
    return [
        (
            f"sparse_{scalar}_{WEIGHT_TYPES[weight].short}_{scalar}",
            config.source(getattr(torch, scalar), WEIGHT_TYPES[weight].bits, group_size),
        )
        for weight, group_size, scalar in types
        for config in sparse_sm80.CONFIGS
    ]


# ---- the families --------------------------------------------------------------------------------


def kernels_of(c: Combination, arch: str) -> list[tuple[str, KernelTypes]]:
    """(family, types) of the kernels that serve a combination on `arch`."""
    if arch == "sm_90a":
        types = replace(kernel_types(c), reduce_half=False)
        if c.activation in kernel_configs.SCALARS:
            gathered = (True, False) if c.act_order else (False,)
            return [("sm90", replace(types, permuted=permuted)) for permuted in gathered]
        if c.activation in sm90_8bit_configs.TYPES.get(c.weight_type.name, ()):
            return [("sm90_8bit", replace(types, group_size=max(c.group_size, 0)))]
    if arch not in SHARED_LIMITS:
        return []
    gathered = (True, False) if c.act_order else (False,)
    sm75 = arch == "sm_75"
    return [("sm80", kernel_types(c, permuted=permuted, sm75=sm75)) for permuted in gathered]


def _choices(
    arch: str,
    family: str,
    types: KernelTypes,
    batch_invariant: bool,
    shapes: tuple[tuple[int, int], ...],
) -> tuple[Choice, ...]:
    if family != "sm80":
        return _sm90_choices(family, types, batch_invariant, shapes)
    choices: list[Choice] = []
    last = GATHER_TOKENS if types.permuted else ANY
    borders = sorted(
        {min(tokens, last) for tokens, _ in sm80_configs.choices(types, batch_invariant)}
    )
    for limit in SHARED_LIMITS[arch]:
        rows: list[Choice] = []
        for tokens in borders:
            config = sm80_configs.select_config(tokens, types, limit, batch_invariant)
            if rows and rows[-1].config == config:
                rows.pop()
            rows.append(Choice(0, 0, tokens, config))
        choices += rows
    return tuple(dict.fromkeys(choices))


def _sm90_choices(
    family: str, types: KernelTypes, batch_invariant: bool, shapes: tuple[tuple[int, int], ...]
) -> tuple[Choice, ...]:
    if family == "sm90":
        table = kernel_configs._tuned_rows(GPU, types.weight_type, types.activation)
        tuned = [(k * kernel_configs.TILE_K, n * kernel_configs.TILE_N) for k, n in table]
    else:
        key = sm90_8bit_configs.tuned_key(eight_bit_types(types))
        tuned = [(k, n) for name, k, n in sm90_8bit_configs._tuned(GPU) if name == key]
    grid = dict.fromkeys((*tuned, *shapes, *GRID))
    types = replace(types, output="float16")  # it does not matter
    rows = [_sm90_rows(family, types, batch_invariant, k, n) for k, n in grid]
    return tuple(itertools.chain.from_iterable(rows))


@functools.cache
def _sm90_rows(
    family: str, types: KernelTypes, batch_invariant: bool, k: int, n: int
) -> tuple[Choice, ...]:
    """The choices of one shape; for act-order those that differ from the others."""
    rows: list[Choice] = []
    in_order = replace(types, permuted=False)
    for tokens in TOKENS:
        config = _select_sm90(family, types, batch_invariant, tokens, k, n)
        if types.permuted and config == _select_sm90(
            family, in_order, batch_invariant, tokens, k, n
        ):
            continue
        if rows and rows[-1].config == config:
            rows.pop()
        rows.append(Choice(k, n, tokens, config))
    if types.permuted:
        return tuple(rows)
    return (*rows[:-1], replace(rows[-1], tokens=ANY))


def _select_sm90(
    family: str, types: KernelTypes, batch_invariant: bool, m: int, k: int, n: int
) -> KernelConfig | EightBitConfig:
    if family == "sm90_8bit":
        return sm90_8bit_configs.select_config(
            m, n, k, eight_bit_types(types), batch_invariant, gpu=GPU
        )
    k_tiles, column_tiles = -(-k // kernel_configs.TILE_K), -(-n // kernel_configs.TILE_N)
    select = kernel_configs.select_config
    if types.permuted:
        select = kernel_configs.select_for_act_order
    return select(
        m,
        k_tiles,
        column_tiles,
        types.group_size or -1,
        batch_invariant=batch_invariant,
        gpu=GPU,
        weight_type=types.weight_type,
        dtype=types.activation,
    )


def eight_bit_types(types: KernelTypes) -> EightBitTypes:
    """The types of a variant of family sm90_8bit as its configurations take them."""
    return EightBitTypes(types.weight_type, types.activation, types.output, types.group_size)


def _all_configs(variant: Variant) -> tuple[Config, ...]:
    t = variant.types
    if variant.family == "sm80" or t.permuted:
        return variant.configs
    if variant.family == "sm90_8bit":
        return sm90_8bit_configs.supported_configs(eight_bit_types(t))
    group_size = t.group_size or -1
    configs = kernel_configs.supported_configs(t.weight_type)
    return tuple(c for c in configs if c.fits(1, 64, group_size, t.weight_type))
