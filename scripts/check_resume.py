"""Kill a quantization in the middle, continue it, and compare every byte with a run left alone.

    python scripts/check_resume.py --from_config configs/bench/llama2-7b.json --layers 3

Random weights of a shape, cut to its first --layers; the run is killed (SIGKILL, all its processes)
when --killed_after layers are on disk, continued with --resume until the packed checkpoint stands,
and then verified against the hashes in its manifest. Prints one line of JSON: the seconds of each
run, and of assembling the checkpoint (from the last finished layer on), and its bytes. With
--processes N on N GPUs. Exits with 1 if anything differs. Other flags are those of
gptq/llama2.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from marlin_kernel.checkpoint_files import verify_tensors  # noqa: E402
from scripts.command_line import make_parser, positive  # noqa: E402

POLL = 0.005  # seconds


def finished(folder: Path) -> int:
    """Decoder layers on disk, whose files come in order."""
    try:
        names = {file.name.split(".")[0] for file in folder.glob("layer-*.safetensors")}
    except FileNotFoundError:  # renamed while it was read: the run is complete
        names = set()
    if not names:
        return 0
    last = max(int(name.split("-")[1]) for name in names)
    own = [name for name in names if name.startswith(f"layer-{last:04d}")]
    parts = int(own[0].rpartition("-of-")[2]) if "-of-" in own[0] else 1
    return last + (len(own) == parts)


def start(command: list[str], processes: int) -> list[subprocess.Popen]:
    """The processes of one run, as torchrun starts them, but all of them ours to kill."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | group for rank in range(processes)]
    return [
        subprocess.Popen(
            command, env=os.environ | (own if processes > 1 else {}), stdout=subprocess.DEVNULL
        )
        for own in each
    ]


def quantize(
    command: list[str], out: Path, processes: int, until: Callable[[int], bool]
) -> tuple[int | None, float, float | None]:
    """Run `command`, and kill it as soon as `until` holds of the number of finished layers.

    Returns its exit status, None if it was killed; seconds; and those since the last layer came.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    began, count, reached = time.perf_counter(), 0, None
    children = start([*command, "--save", str(out)], processes)
    while any(child.poll() is None for child in children):
        now = finished(folder)
        if now > count:
            count, reached = now, time.perf_counter()
        if until(count) or any(child.returncode for child in children):
            for child in children:
                child.kill()
        time.sleep(POLL)
    ended = time.perf_counter()
    codes = [child.wait() for child in children]
    code = None if -signal.SIGKILL in codes and until(count) else max(codes, key=abs)
    return code, ended - began, None if reached is None else ended - reached


def different(one: Path, other: Path) -> list[str]:
    """Names of the tensor files that are not equal, byte by byte."""
    names = sorted(
        {file.name for out in (one, other) for kind in ("*.safetensors", "*.st", "*.index.json")
         for file in out.glob(kind)}
    )  # fmt: skip
    return [
        name
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--from_config", required=True, help="config.json: the model's shape")
    parser.add_argument(
        "--layers", type=positive, default=3, help="of the shape that are quantized"
    )
    parser.add_argument("--killed_after", type=positive, default=1, help="finished layers")
    parser.add_argument("--processes", type=positive, default=1, help="that share the run")
    parser.add_argument("--scratch", help="folder for the checkpoints (default: the system's)")
    args, flags = parser.parse_known_args()
    if not 0 < args.killed_after < args.layers:
        parser.error(f"--killed_after {args.killed_after} must lie in 1..{args.layers - 1}")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        shape = json.loads(Path(args.from_config).read_text(encoding="utf-8"))
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(shape | {"num_hidden_layers": args.layers}))
        flags = ["--from_config", str(config), "--wbits", "4", *flags]
        command = [sys.executable, str(ROOT / "gptq" / "llama2.py"), *flags]
        out, whole = Path(scratch) / "out", Path(scratch) / "whole"

        count = args.processes
        code, killed, _ = quantize(command, out, count, lambda layers: layers >= args.killed_after)
        if code is not None:
            print(f"it ended with status {code} before it could be killed", file=sys.stderr)
            return 1
        kept = finished(out.with_name(".out.unfinished"))
        resume = [*command, "--resume"]
        resumed_code, resumed, _ = quantize(resume, out, count, lambda layers: False)
        code, alone, assembling = quantize(command, whole, count, lambda layers: False)
        if code or resumed_code:
            print(f"exit status {resumed_code} resumed, {code} alone", file=sys.stderr)
            return 1
        unequal = different(out, whole) + verify_tensors(out)
        result = {
            "layers": args.layers,
            "layers_kept_by_the_killed_run": kept,
            "processes": args.processes,
            "seconds": {"until_killed": killed, "resumed": resumed, "alone": alone},
            "seconds_of_assembling": assembling,
            "bytes": sum(file.stat().st_size for file in out.glob("*") if file.is_file()),
            "differ": unequal,
        }
    print(json.dumps(result))
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
