"""Recipes: YAML files of settings, those of configs/ by their names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from marlin_kernel.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def read_recipe(recipe: str | Path, kind: str, known: Collection[str]) -> dict[str, Any]:
    """Settings of a recipe: a YAML file, or the name of one in configs/`kind` ("quantize", "eval").

    known: every key it may hold. Raises ConfigError if there is no such file, and if it cannot be
    read, is no YAML mapping, or holds unknown keys.
    """
    path = _find(str(recipe), CONFIGS / kind)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config={str(recipe)!r} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(recipe)!r} is not a mapping of settings")
    unknown = sorted(set(map(str, content)) - set(known))
    if unknown:
        raise ConfigError(
            f"config={str(recipe)!r} holds unknown keys {unknown}; known are {sorted(known)}"
        )
    return content


def _find(recipe: str, folder: Path) -> Path:
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    named = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if recipe in named:
        return named[recipe]
    names = f", or one of {', '.join(named)}" if named else ""
    raise ConfigError(f"config={recipe!r}: no such recipe; give a YAML file{names}")
