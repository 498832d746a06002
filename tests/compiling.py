"""What the tests of compiled kernels share: the compiler's presence, a cache of their own, SASS."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from marlin_kernel import compiler
from marlin_kernel.compiler import CompileError, Cubin

REGISTERS = 65536  # of a multiprocessor


def _nvrtc_missing() -> str:
    try:
        compiler._compiler_fingerprint()
    except (CompileError, RuntimeError) as error:
        return str(error)
    return ""


_MISSING = _nvrtc_missing()
needs_nvrtc = pytest.mark.skipif(bool(_MISSING), reason=f"no NVRTC: {_MISSING}")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of the importing module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MARLIN_KERNEL_CACHE", str(tmp_path_factory.mktemp("cubins")))
    patch.delenv("MARLIN_KERNEL_PREBUILT", raising=False)
    yield
    patch.undo()


def _disassembler() -> str | None:
    """That of the package beside NVRTC, which knows what NVRTC writes; else the one on the PATH."""
    packages = importlib.util.find_spec("nvidia")
    for root in packages.submodule_search_locations if packages else ():
        for found in Path(root).rglob("bin/cuobjdump"):
            return str(found)
    return shutil.which("cuobjdump")


def sass(cubin: Cubin, path: Path) -> str:
    """Disassembly of a cubin, which is written to `path`; skips without the tools."""
    tool = _disassembler()
    if tool is None:
        pytest.skip("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump)")
    path.write_bytes(cubin.image)
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}
    result = subprocess.run(
        [tool, "-sass", str(path)], capture_output=True, text=True, env=environment
    )
    if result.returncode != 0:
        pytest.skip(f"cuobjdump failed (nvidia-cuda-nvdisasm missing?): {result.stderr[:200]}")
    return result.stdout
