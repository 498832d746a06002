"""Is what racecheck reports of the wgmma kernel (csrc/sm90/gemm.cuh) a race?

    compute-sanitizer --tool racecheck python tests/racecheck.py                # reports refills
    compute-sanitizer --tool racecheck python tests/racecheck.py --all_lanes    # expected: none

A stage of the ring is refilled when all warps have released it. One lane arrives at the barrier for
its warp, after warp-wide products that consumed what all 32 lanes have read; racecheck follows the
arrival of a thread, and reports the refill against the reads of the 31 others. With --all_lanes a
copy of the kernel is run in which every lane arrives and the barrier counts them all: nothing else
differs, so if nothing is reported of it, these arrivals are all that the reports are about.

Exit status: 0 if the products are right, 1 if not. compute-sanitizer prints what it found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from marlin_kernel import WEIGHT_TYPES, QuantizedLinear, compiler, formats
from marlin_kernel.kernel_configs import GemmConfig
from marlin_kernel.sm90_layout import kernel_tensors

HEADER = "sm90/gemm.cuh"
ALL_LANES = (  # text of the header, and what every lane does instead
    (
        "if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);",
        "ptx::mbarrier_arrive(&shared_.empty[stage]);",
    ),
    (
        "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp);",
        "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * kWarpSize);",
    ),
)
CONFIGS = (  # scales on sums and on weights, one and two tiles of 64 k in a stage
    GemmConfig(16, 1, 6, 2, 2, True),
    GemmConfig(32, 1, 4, 2, 2, False),
    GemmConfig(64, 2, 8, 1, 1, False),
)
K, N = 4096, 256  # several rounds of every ring
GROUP_SIZE = 128


def write_variant(directory: Path) -> Path:
    """Device code in which every lane arrives; returns its folder."""
    csrc = directory / "csrc"
    shutil.copytree(compiler.SOURCE_ROOT, csrc)
    text = (csrc / HEADER).read_text()
    for old, new in ALL_LANES:
        if text.count(old) != 1:
            raise ValueError(f"{HEADER} has {text.count(old)} times {old!r}, not once")
        text = text.replace(old, new)
    (csrc / HEADER).write_text(text)
    return csrc


def main(arguments: Sequence[str] | None = None) -> int:
    """Multiply with each of CONFIGS. Returns the process exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all_lanes", action="store_true", help="every lane arrives")
    options = parser.parse_args(arguments)
    from marlin_kernel import launch

    quantized = QuantizedLinear.quantize(torch.randn(K, N), WEIGHT_TYPES["uint4b8"], GROUP_SIZE)
    held = kernel_tensors(formats.write(quantized.to("cuda"), "marlin"), quantized.spec)
    good = True
    with tempfile.TemporaryDirectory() as directory:
        if options.all_lanes:
            compiler.SOURCE_ROOT = write_variant(Path(directory))
        for config in CONFIGS:
            a = torch.randn(config.tokens, K).half()
            out = torch.empty(config.tokens, N, dtype=torch.float16, device="cuda")
            operands = (a.cuda(), held.weights, held.scales, None, out)
            launch.launch_config(config, *operands, K, N, K, N, GROUP_SIZE)
            expected = a.double() @ quantized.dequantize(torch.float64)
            error = float((out.cpu().double() - expected).norm() / expected.norm())
            good = good and error < 1e-3
            print(f"{config}: relative error {error:.5f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
