"""Settings of one evaluation run that lm-eval does not know: the only home of their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from marlin_kernel.errors import ConfigError

MAX_SEQLEN = 4096  # longest default window; the model's context if that is shorter


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate besides lm-eval's own options.

    marlin_checkpoint: packed folder to evaluate. data_dir: folder of local copies of texts and
    task data (docs/evaluation.md). perplexity: text sources. seqlen: tokens per window (None: the
    model's context, at most 4096). max_tokens: per text source (None: all). compare: also run the
    original checkpoint on the same tokens, for KL divergence and top-1 agreement. verify: check
    the packed checkpoint's hashes and probe logits. report: folder for the report. baseline:
    report.json of an earlier run whose rows are shown first.
    """

    marlin_checkpoint: str | None = None
    data_dir: str | None = None
    perplexity: tuple[str, ...] = ()
    seqlen: int | None = None
    max_tokens: int | None = None
    compare: bool = True
    verify: bool = False
    report: str | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("seqlen", 2), ("max_tokens", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in ("marlin_checkpoint", "data_dir"):
            value = getattr(self, name)
            if value is not None and not Path(value).expanduser().is_dir():
                raise ConfigError(f"{name}={value!r} is not an existing folder")
        if self.report is not None and Path(self.report).expanduser().is_file():
            raise ConfigError(f"report={self.report!r} is a file; give a folder for the report")
        if self.baseline is not None and not Path(self.baseline).expanduser().is_file():
            raise ConfigError(
                f"baseline={self.baseline!r} is no file; give the report.json of an earlier run"
            )


OWN_KEYS = tuple(field.name for field in fields(EvalConfig))


def resolve(values: Mapping[str, Any]) -> EvalConfig:
    """Defaults, then `values` (None = not given). Raises ConfigError naming the bad setting."""
    given = {key: value for key, value in values.items() if value is not None}
    sources = given.get("perplexity", ())
    if isinstance(sources, str):
        sources = sources.split(",")
    names = [name.strip() for source in sources for name in str(source).split(",")]
    given["perplexity"] = tuple(name for name in names if name and name != "none")
    return replace(EvalConfig(), **given)


def choose_seqlen(config: EvalConfig, context: int | None) -> int:
    """The length asked for, or the model's context (tokens), at most 4096.

    Raises ConfigError beyond the model's context.
    """
    if config.seqlen is None:
        return min(context or MAX_SEQLEN, MAX_SEQLEN)
    if context is not None and config.seqlen > context:
        raise ConfigError(f"seqlen={config.seqlen} exceeds the model's context of {context} tokens")
    return config.seqlen
