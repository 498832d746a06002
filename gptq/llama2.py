"""Launcher: `python gptq/llama2.py CKPT --wbits 4 --save OUT`. Composes quantizer and evaluation."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the folder of this file must not shadow packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> None:
    from eval.compare import evaluate
    from gptq.cli import main as run

    raise SystemExit(run(evaluate=evaluate))


if __name__ == "__main__":
    main()
