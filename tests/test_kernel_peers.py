"""Other kernels beside ours in scripts/bench.py: what is there, and that results are checked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import bench, kernel_peers
from scripts.gpu_timing import ERROR_LIMITS, relative_error
from scripts.kernel_peers import NotInstalled, Packed, Weights

SIZES = (64, 96, 32)  # K, N, group size


def weights(group_size: int = SIZES[2]) -> Weights:
    return Weights.random(*SIZES[:2], group_size, torch.float16, "cpu")


@pytest.mark.parametrize("group_size", [32, -1])
def test_weights_are_codes_times_scales(group_size):
    w = weights(group_size)
    assert w.scales.shape == (64 // w.group_size, 96) and w.grouped == (group_size == 32)
    assert w.exact()[63, 95] == (w.codes[63, 95] - 8) * w.scales[-1, 95].float()


def test_words_hold_eight_codes_along_k():
    codes = torch.randint(0, 16, (64, 5), dtype=torch.int32)
    words = kernel_peers._words_along_k(codes)
    assert words.shape == (8, 5) and words.dtype == torch.int32
    for i in range(8):
        assert torch.equal(words >> 4 * i & 15, codes[i::8])


@pytest.fixture
def toy(monkeypatch):
    """A peer with three ways, of which the last is the fastest; returns how it is timed."""
    timed = []

    def slow(a, held):
        return (a.float() @ held[0]).half()

    def refuses(a, held):
        raise RuntimeError("no such tile")

    def fast(a, held):
        return slow(a, held)

    def graph_time(launches):
        for launch in launches:
            launch()
        timed.append(len(launches))
        return [9.0, 5.0][len(timed) % 2 == 0]

    monkeypatch.setattr(kernel_peers, "graph_time", graph_time)
    monkeypatch.setattr(kernel_peers, "ROTATE_BYTES", 10 * (64 * 96 // 2 + 2 * 2 * 96))
    ways = [slow, refuses, fast]
    monkeypatch.setitem(kernel_peers.PEERS, "toy", lambda w: Packed((w.exact(),), ways))
    return SimpleNamespace(timed=timed, ways=ways)


def test_the_fastest_way_counts(toy):
    us = kernel_peers.times("toy", *SIZES[:2], [3, 300], 32, torch.float16, "cpu")
    assert us == {3: 5.0, 300: 5.0}
    assert toy.timed == [10, 10, 2, 2]  # copies of the weights, fewer for many tokens


def test_wrong_results_are_not_timed(toy):
    toy.ways.insert(0, lambda a, held: 1.01 * (a.float() @ held[0]))
    with pytest.raises(ValueError, match=r"toy: relative error 0.01\d+ at 64x96, M = 3"):
        kernel_peers.times("toy", *SIZES[:2], [3], 32, torch.float16, "cpu")
    assert toy.timed == []


def test_a_peer_that_takes_no_way_says_why(toy):
    del toy.ways[2], toy.ways[0]
    with pytest.raises(NotInstalled, match="64x96, M = 3: no such tile"):
        kernel_peers.times("toy", *SIZES[:2], [3], 32, torch.float16, "cpu")


@pytest.mark.parametrize("name", ["humming", "vllm-marlin", "machete"])
def test_what_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel_peers._vllm.cache_clear()
    with pytest.raises(NotInstalled, match="pip install (humming-kernels|vllm)"):
        kernel_peers.PEERS[name](weights())
    with pytest.raises(NotInstalled, match="takes BF16 and groups"):
        kernel_peers.tinygemm(weights())


def test_vllm_of_another_torch_is_named(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    kernel_peers._vllm.cache_clear()
    with pytest.raises(NotInstalled, match="vllm holds no _C"):
        kernel_peers.vllm_marlin(weights())
    (tmp_path / "vllm" / "_C.abi3.so").write_text("no library")
    with pytest.raises(NotInstalled, match=r"_C\.abi3\.so"):
        kernel_peers.machete(weights())
    assert kernel_peers.version("machete") == "vllm"


def test_rows_get_the_times_of_peers(monkeypatch, capsys):
    def times(name, k, n, tokens, group_size, dtype, rest):
        if name == "tinygemm":
            raise NotInstalled("BF16 only")
        assert (k, n, group_size, dtype, rest) == (64, 96, 32, torch.float16, 0.25)
        return {m: m * {"humming": 2.0, "machete": 3.0 - m / 4}[name] for m in tokens}

    monkeypatch.setattr(kernel_peers, "times", times)
    monkeypatch.setattr(kernel_peers, "version", lambda name: f"{name} 1.0")
    problem = {"k": 64, "n": 96, "group_size": 32, "dtype": "float16"}
    rows, report = [problem | {"m": m, "us_peer": 0.5} for m in (1, 8)], {}
    for _ in range(2):
        bench.run_peers(rows, ["tinygemm", "humming", "machete"], report, rest=0.25)
    assert capsys.readouterr().out == "tinygemm is not timed: BF16 only\n"
    assert [(r["peer"], r["us_peer"]) for r in rows] == [("humming", 2.0), ("machete", 8.0)]
    assert rows[0]["peers"] == {"humming": 2.0, "machete": 2.75}
    assert report["peers"] == {"humming": "humming 1.0", "machete": "machete 1.0"}
    assert report["not_timed"] == {"tinygemm": "BF16 only"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", kernel_peers.PEERS)
@pytest.mark.parametrize("dtype", ERROR_LIMITS, ids=str)
def test_peers_that_are_installed_multiply(name, dtype):
    w = Weights.random(1024, 512, 128, dtype, "cuda")
    try:
        packed = kernel_peers.PEERS[name](w)
    except NotInstalled as reason:
        pytest.skip(str(reason))
    for m in (1, 16, 100):
        a = torch.randn(m, 1024, device="cuda").to(dtype)
        errors = []
        for way in packed.ways:
            try:
                errors.append(relative_error(way(a, packed.weights), a, w.exact()))
            except RuntimeError:  # this way does not take the shape
                continue
        assert errors and max(errors) < ERROR_LIMITS[dtype]


def test_the_option_names_all_peers():
    options = bench.parser().parse_args(["--run_peers"])
    assert options.run_peers == [] and bench.parser().parse_args([]).run_peers is None
    assert bench.parser().parse_args(["--run_peers", "humming"]).run_peers == ["humming"]
    described = Path(kernel_peers.__file__).read_text().split('"""')[1]
    assert all(f"    {name} " in described for name in kernel_peers.PEERS)
