"""Launcher: `python eval/eval.py --model hf --model_args pretrained=CKPT --tasks mmlu ...`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the folder of this file must not shadow packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> None:
    """The command `marlin-eval`; exits with the code of `eval.cli.main`."""
    from eval.cli import main as run

    raise SystemExit(run())


def lm_eval() -> None:
    """lm-eval's own command, which finds no foreign models, with "marlin" among them."""
    from eval.cli import has_lm_eval

    if not has_lm_eval():
        raise SystemExit("lm_eval: lm-eval is not installed; pip install 'marlin-gptq[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import eval.harness  # noqa: F401  registers the model

    cli_evaluate()


if __name__ == "__main__":
    main()
