"""Launcher: `python eval/eval.py --model hf --model_args pretrained=CKPT --tasks mmlu ...`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the folder of this file must not shadow packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> None:
    from eval.cli import main as run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
