"""Is what racecheck reports of the wgmma kernels (csrc/sm90, csrc/sm90_8bit, csrc/sparse) a race?

    compute-sanitizer --tool racecheck python tests/racecheck.py                # reports refills
    compute-sanitizer --tool racecheck python tests/racecheck.py --all_lanes    # expected: none

A stage of the ring is refilled when all warps have released it. One lane arrives at the barrier for
its warp, after warp-wide products that consumed what all 32 lanes have read; racecheck follows the
arrival of a thread, and reports the refill against the reads of the 31 others. With --all_lanes
copies of the kernels are run in which every lane arrives and the barrier counts them all: nothing
else differs, so if nothing is reported of them, these arrivals are all that the reports are about.
The small-batch kernels of dense and of 2:4 sparse weights run too; nothing is reported of them.

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
from marlin_kernel.kernel_configs import DecodeConfig, GemmConfig
from marlin_kernel.sm90_8bit_configs import EightBitConfig, EightBitTypes
from marlin_kernel.sm90_8bit_layout import records
from marlin_kernel.sm90_layout import kernel_tensors
from marlin_kernel.sparse import prune_2_4
from marlin_kernel.sparse_configs import SparseConfig, SparseDecodeConfig

_ARRIVAL = (
    "if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);",
    "ptx::mbarrier_arrive(&shared_.empty[stage]);",
)
ALL_LANES = {  # header: its text, and what every lane does instead
    "sm90/gemm.cuh": (
        _ARRIVAL,
        (
            "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp);",
            "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * kWarpSize);",
        ),
    ),
    "sparse/kernel.cuh": (
        _ARRIVAL,
        (
            "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp);",
            "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * kWarpSize);",
        ),
    ),
    "sm90_8bit/kernel.cuh": (  # without multicast
        _ARRIVAL,
        (
            "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * Config::MULTICAST);",
            "ptx::mbarrier_init(&shared.empty[stage], kFeedingWarp * kWarpSize);",
        ),
    ),
}
CONFIGS = (  # scales on sums and weights, one and two tiles of 64 k in a stage, three warpgroups
    GemmConfig(16, 1, 6, 2, 2, True),
    GemmConfig(32, 1, 4, 2, 2, False),
    GemmConfig(64, 2, 8, 1, 1, False),
    GemmConfig(64, 2, 5, 1, 2, True),
    GemmConfig(128, 1, 3, 1, 2, False, warpgroups=3),
    GemmConfig(128, 1, 3, 1, 2, False, split=0, tail=True),
    GemmConfig(256, 1, 4, 1, 1, False),  # whose output is written in turns
)
DECODE_CONFIG = DecodeConfig(1, 2, 4, 2, 4, 1)
NVFP4_CONFIG = DecodeConfig(2, 1, 4, 2, 2, 1)  # in BF16: scales on weights
SPARSE_CONFIGS = (
    SparseConfig(16, 1, 2, 4, 1),
    SparseConfig(64, 2, 1, 3, 1),
    SparseDecodeConfig(1, 2, 4, 2, 2, 1),
)
EIGHT_BIT_CONFIGS = (EightBitConfig(16, 1, 1, 1, 11, 3), EightBitConfig(128, 2, 1, 1, 8, 1))
K, N = 4096, 256  # several rounds of every ring
GROUP_SIZE = 128
TYPES = EightBitTypes("uint4b8", "int8", "float16", GROUP_SIZE)


def write_variant(directory: Path) -> Path:
    """Device code in which every lane arrives; returns its folder."""
    csrc = directory / "csrc"
    shutil.copytree(compiler.SOURCE_ROOT, csrc)
    for header, edits in ALL_LANES.items():
        text = (csrc / header).read_text()
        for old, new in edits:
            if text.count(old) != 1:
                raise ValueError(f"{header} has {text.count(old)} times {old!r}, not once")
            text = text.replace(old, new)
        (csrc / header).write_text(text)
    return csrc


def main(arguments: Sequence[str] | None = None) -> int:
    """Multiply with each configuration. Returns the process exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all_lanes", action="store_true", help="every lane arrives")
    options = parser.parse_args(arguments)
    from marlin_kernel import launch, sm80_path, sm90_8bit_path, sparse_marlin

    wtype = WEIGHT_TYPES["uint4b8"]
    quantized = QuantizedLinear.quantize(torch.randn(K, N), wtype, GROUP_SIZE)
    tensors = formats.write(quantized.to("cuda"), "marlin")
    pruned = prune_2_4(torch.randn(N, K)).t().contiguous()
    sparse = QuantizedLinear.quantize(pruned, wtype, GROUP_SIZE)
    stored = formats.write(sparse.to("cuda"), "marlin-24")
    sparse_weights = sparse_marlin.device_weights(
        stored["B_24"], stored["B_meta"], stored["s"], GROUP_SIZE
    )
    held = kernel_tensors(tensors, quantized.spec)
    nvfp4 = QuantizedLinear.quantize(torch.randn(K, N), WEIGHT_TYPES["nvfp4"], 16)
    held_nvfp4 = kernel_tensors(formats.write(nvfp4.to("cuda"), "marlin"), nvfp4.spec)
    packed = records(tensors, quantized.spec, TYPES.activation)
    good = True
    with tempfile.TemporaryDirectory() as directory:
        if options.all_lanes:
            compiler.SOURCE_ROOT = write_variant(Path(directory))
        dense = (*CONFIGS, DECODE_CONFIG, NVFP4_CONFIG)
        for config in (*dense, *SPARSE_CONFIGS, *EIGHT_BIT_CONFIGS):
            m = getattr(config, "tokens", 8)
            a = torch.randint(-127, 128, (m, K)) / 128
            a[:, 0] = 127 / 128  # so that rounding to 8 bits changes nothing
            out = torch.empty(m, N, dtype=torch.float16, device="cuda")
            x, layer, limit = a.half().cuda(), quantized, 1e-3
            if config == NVFP4_CONFIG:
                layer, limit = nvfp4, 8e-3
                out = out.bfloat16()
                operands = (x.bfloat16(), held_nvfp4.weights, held_nvfp4.scales, None, out)
                typed = {"weight_type": "nvfp4", "global_scale": held_nvfp4.global_scale}
                launch.launch_config(config, *operands, K, N, K, N, 16, **typed)
            elif isinstance(config, SparseConfig | SparseDecodeConfig):
                layer = sparse
                sparse_marlin.launch_config(config, x, *sparse_weights, None, out, 4, GROUP_SIZE)
            elif isinstance(config, GemmConfig | DecodeConfig):
                operands = (x, held.weights, held.scales, None, out)
                launch.launch_config(config, *operands, K, N, K, N, GROUP_SIZE)
            else:
                codes = sm80_path.quantize_activations(x, torch.int8, K)
                operands = (*codes, packed.weights, packed.scales, None, out)
                sm90_8bit_path.launch_config(config, TYPES, *operands)
            expected = a.double() @ layer.dequantize(torch.float64)
            error = float((out.cpu().double() - expected).norm() / expected.norm())
            good = good and error < limit
            print(f"{config}: relative error {error:.5f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
