"""Re-export packed checkpoints without rounding anything.

    python -m marlin_kernel.export PACKED OUT --format gptq
    python -m marlin_kernel.export model.marlin.g128 OUT --model FOLDER

The second form reads a state dict of the original Marlin repository, which holds no configuration:
config.json and the tokenizer come from FOLDER, the unquantized model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import CheckpointWriter, convert, read_original, source_hash
from .errors import CheckpointError, ConfigError, MarlinError
from .formats import FORMATS
from .schemes import Scheme

_NOT_COPIED = {"config.json", "quantize_config.json"}


def import_original(
    path: Path, out: Path, model: Path, fmt: str = "marlin", *, overwrite: bool = False
) -> Path:
    """Write a `*.marlin` state dict as a packed folder. Returns `out`.

    model: folder of the unquantized model, for config.json and tokenizer files.
    Raises CheckpointError if the file is no such state dict or the config is missing.
    """
    if not (model / "config.json").is_file():
        raise CheckpointError(f"--model {model} holds no config.json")
    layers, others = read_original(path)
    first = next(iter(layers.values()))
    k = first.codes.shape[0]
    group_size = -1 if first.group_size == k else first.group_size
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    with CheckpointWriter(
        out, Scheme(fmt, first.weight_type, group_size), overwrite=overwrite
    ) as writer:
        for name, layer in layers.items():
            writer.add_layer(name, layer)
        for name, tensor in others.items():
            tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
            if not tied and not name.endswith("rotary_emb.inv_freq"):
                writer.add(name, tensor)
        for file in sorted(model.iterdir()):
            plain = file.suffix in (".json", ".model", ".txt", ".jinja")
            index = file.name.endswith(".index.json")
            if plain and not index and file.is_file() and file.name not in _NOT_COPIED:
                writer.add_file(file.name, file)
        return writer.finish(
            {**config, "dtype": "float16"},
            source={"path": path.name, "sha256": source_hash(path)},
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 with one line about what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m marlin_kernel.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packed", type=Path, help="packed folder, or a *.marlin state dict")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--format", choices=FORMATS, default="marlin")
    parser.add_argument("--model", type=Path, help="unquantized model, for a *.marlin state dict")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    args = parser.parse_args(argv)
    try:
        if not args.packed.exists():
            raise CheckpointError(f"{args.packed} does not exist")
        if args.packed.is_dir():
            out = convert(args.packed, args.out, args.format, overwrite=args.overwrite)
        elif args.model is None:
            raise ConfigError(
                f"{args.packed} is a file without configuration; add --model FOLDER with the "
                "config.json and tokenizer of the unquantized model"
            )
        else:
            out = import_original(
                args.packed, args.out, args.model, args.format, overwrite=args.overwrite
            )
    except (MarlinError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
