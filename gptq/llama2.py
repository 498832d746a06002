"""Launcher: `python gptq/llama2.py CKPT --wbits 4 --save OUT`. Quantizes, then evaluates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: the folder of this file must not shadow packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from gptq.config import QuantizeConfig


def evaluate(config: QuantizeConfig, packed: Path | None, quantization: dict[str, Any] | None):
    """Perplexity of the packed model (of the original with wbits=16); with --report, of both."""
    from eval.compare import compare, print_table
    from eval.loading import quantized_name
    from gptq.models import read_config, resolve_source
    from gptq.run import choose_device, choose_dtype, choose_seqlen
    from marlin_kernel import open_checkpoint

    if not config.eval:
        return
    device = choose_device(config)
    folder = resolve_source(config.checkpoint)
    open_checkpoint(folder)  # names a missing or damaged file, which transformers does not
    models = {}
    if packed is None or config.report is not None:
        models["original"] = folder
    if packed is not None:
        models[quantized_name(config.as_dict())] = packed
    rows = compare(
        models,
        config.eval,
        seqlen=choose_seqlen(config, read_config(folder)),
        device=device,
        dtype=choose_dtype(config, folder, device),
        data_dir=config.data_dir,
        max_tokens=config.eval_tokens,
        quantization={} if quantization is None else {list(models)[-1]: quantization},
    )
    print_table(rows)
    if config.report is not None:
        from eval.environment import command_line
        from eval.report import Report, write_report
        from gptq.run import environment

        beside = packed if packed is not None and config.save else Path()  # not in a temporary OUT
        target = Path(config.report or beside / "report")
        paths = write_report(
            target,
            Report(
                model=Path(config.checkpoint).name,
                rows=rows,
                quantization=quantization,
                settings=config.as_dict(),
                environment=environment(device),
                command=command_line(),
            ),
        )
        print(f"report: {paths['html']}")


def main() -> None:
    """The command `marlin-quantize`; exits with the code of `gptq.cli.main`."""
    from gptq.cli import main as run

    raise SystemExit(run(evaluate=evaluate))


if __name__ == "__main__":
    main()
