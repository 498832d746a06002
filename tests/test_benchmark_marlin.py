"""scripts/benchmark_marlin.py: what it would time, and one small sweep on the CPU."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from marlin_kernel import backends, prebuilt, sm90_8bit_layout
from marlin_kernel.errors import ConfigError
from marlin_kernel.formats import LayerSpec, read
from marlin_kernel.layout import unpermute_columns
from marlin_kernel.packing import unpack
from marlin_kernel.sm80_layout import K_ORDER
from marlin_kernel.validity import combinations
from marlin_kernel.weight_types import WEIGHT_TYPES
from scripts import benchmark_marlin as script

SMALL = ["--models", "SmolLM2-135M", "--limit-k", "576", "--limit-n", "576"]


def listed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert script.main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_shards_divide_the_side_that_is_split() -> None:
    whole = {s.name: (s.k, s.n) for s in script.layer_shapes(["Llama-2-70B"])}
    shard = {s.name: (s.k, s.n) for s in script.layer_shapes(["Llama-2-70B/TP4"])}
    assert whole["Llama-2-70B gate_up"] == (8192, 57344)
    assert shard["Llama-2-70B/TP4 gate_up"] == (8192, 14336)
    assert shard["Llama-2-70B/TP4 down"] == (7168, 8192)
    assert shard["Llama-2-70B/TP4 o"] == (2048, 8192)


def test_equal_layers_are_timed_once() -> None:
    names = [s.name for s in script.layer_shapes(["Llama-2-70B", "Llama-3-70B"])]
    assert len(names) == 4


def test_models_and_shards_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="'GPT-2' is not in marlin.yaml; choose from Llama-2-7B"):
        script.layer_shapes(["GPT-2"])
    with pytest.raises(ConfigError, match="which 7 GPUs cannot share equally"):
        script.layer_shapes(["Llama-2-7B/TP7"])


def test_without_limits_every_valid_combination_is_listed(capsys: pytest.CaptureFixture) -> None:
    printed = listed(capsys, "--outputs", "float16", "bfloat16").splitlines()
    for c in combinations():
        assert str(c) in printed


def test_limits(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--limit-group-size", "128", "--limit-num-bits", "4", "--limit-act-order", "1"]
    printed = listed(capsys, *SMALL, *arguments, "--limit-k-full", "1", "--batch-sizes", "1", "32")
    lines = printed.splitlines()
    assert lines[0] == "SmolLM2-135M o: K=576 N=576, M=[1, 32]"
    assert lines[1:-1] and all("-u4b8-" in c and "-g128-act_order" in c for c in lines[1:-1])
    assert "shard" not in printed
    only = listed(capsys, *SMALL, "--types", "mxfp4").splitlines()[1:-1]
    assert only == ["bfloat16-mxfp4-bfloat16-g32"]


def test_what_is_outside_the_table_is_left_out_by_choices_from_it(capsys) -> None:
    """2:4 sparse and scaled products belong to the whole sweep, not to one of named types."""
    whole = listed(capsys, *SMALL, "--reductions", "float32").splitlines()
    assert whole[-7:-1] == list(script.OTHERS)
    for narrowed in (["--types", "uint4b8"], ["--limit-num-bits", "4"], ["--others"]):
        assert "2:4" not in listed(capsys, *SMALL, *narrowed)
    added = listed(capsys, *SMALL, "--types", "uint4b8", "--others", "2:4 scaled int8")
    assert added.splitlines()[-2] == "2:4 scaled int8"


def test_options_that_leave_nothing(capsys: pytest.CaptureFixture) -> None:
    assert script.main([*SMALL, "--types", "uint8", "--limit-num-bits", "4"]) == 2
    assert "nothing is left to time" in capsys.readouterr().err
    assert script.main([*SMALL, "--limit-group-size", "48"]) == 2
    assert "--limit-group-size 48 is not one of" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu() -> None:
    with pytest.raises(SystemExit, match="torch finds none; --dry-run lists what it would time"):
        script.main(SMALL)


def test_sweep_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "results.json"
    small = [*SMALL, "--batch-sizes", "1", "3", "--device", "cpu", "--min-run-time", "0.001"]
    limits = ["--limit-group-size", "16", "32", "64", "--reductions", "float32"]
    types = ["--types", "uint4b8", "uint4_hqq", "nvfp4", "--others", *script.OTHERS]
    assert script.main([*small, *limits, *types, "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "K=576 N=576" in printed and "Times are in" in printed
    report = json.loads(output.read_text())
    assert report["circumstances"]["torch"] == torch.__version__ and not report["skipped"]
    names = {r["what"] for r in report["rows"]}
    assert {"torch.matmul", "float16-u4b8-float16-g64", "int8-u4b8-float16-g32"} <= names
    assert {"float16-u4b8-float16-g64-act_order_shard", "repack float16-nvfp4-float16-g16"} <= names
    assert set(script.OTHERS) <= names
    for r in report["rows"]:
        assert r["us"] > 0
        if r["m"] and r["what"] != "torch.matmul":
            assert r["error"] < script.ERROR_LIMITS["bfloat16"] and r["speedup"] > 0


def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave what was measured before them."""
    multiply = script.Product.__call__
    monkeypatch.setattr(
        script.Product, "__call__", lambda *a: multiply(*a).mul_(1.01), raising=True
    )
    output = tmp_path / "results.json"
    arguments = [*SMALL, "--device", "cpu", "--batch-sizes", "2", "--types", "uint4b8"]
    arguments += ["--limit-group-size", "64", "--min-run-time", "0.001", "--json", str(output)]
    with pytest.raises(ArithmeticError, match="M=2, K=576, N=576: error 0.01"):
        script.main(arguments)
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["what"], row["m"]) == ("torch.matmul", 2)


def test_each_kind_is_kept_once_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed says nothing: the file must hold what came before."""
    output = tmp_path / "results.json"
    bench, seen = script.bench_combination, []

    def observed(c, *arguments):
        seen.append((str(c), {row["what"] for row in json.loads(output.read_text())["rows"]}))
        return bench(c, *arguments)

    monkeypatch.setattr(script, "bench_combination", observed)
    arguments = [*SMALL, "--device", "cpu", "--batch-sizes", "2", "--types", "uint4b8"]
    arguments += ["--limit-group-size", "64", "--limit-act-order", "0", "--activations", "float16"]
    assert script.main([*arguments, "--min-run-time", "0.001", "--json", str(output)]) == 0
    (first, before_first), (_, before_second) = seen
    assert before_first == {"torch.matmul"}
    assert before_second == {"torch.matmul", first, f"repack {first}"}
    assert not list(tmp_path.glob("*.partial"))


# ---- what a GPU's kernels are called with, checked by plain multiplication ----


def sm80_gemm(
    a, weights, scales, bias, out, k, n, k_padded, n_padded, group_size, *, weight_type, zeros,
    perm, token_scales, global_scale, reduce_half,
) -> None:  # fmt: skip
    """Stands in for sm80_path.gemm; symmetric integer types."""
    assert (zeros, global_scale, bias) == (None, None, None) and scales.shape[1] == n_padded
    wtype = WEIGHT_TYPES[weight_type]
    codes = unpack(weights, wtype).float() - wtype.bias
    if group_size:
        natural = unpermute_columns(scales, grouped=True).float()
        weight = codes * natural.repeat_interleave(group_size, 0)[:k_padded]
    else:
        weight = codes * scales.float()
    x = a.float() if token_scales is None else natural_order(a) * token_scales[:, None]
    if perm is not None:
        x = gather(x, perm)
    x = torch.nn.functional.pad(x, (0, k_padded - x.shape[1]))
    assert k in (a.shape[1], k_padded)
    out.copy_((x @ weight)[:, :n])


def sm90_gemm(
    a, weights, scales, bias, out, k, n, k_padded, n_padded, group_size, *, weight_type,
    global_scale, perm,
) -> None:  # fmt: skip
    """Stands in for launch.gemm; symmetric integer types."""
    if perm is not None:
        a, k = gather(a, perm), k_padded
    spec = LayerSpec(k, n, WEIGHT_TYPES[weight_type], k if group_size == -1 else group_size)
    stored = backends.restore(backends.Prepared("sm90", weights, scales, None, None), spec)
    assert (k_padded, n_padded) == (spec.packed.k_padded, spec.packed.n_padded)
    out.copy_(a.float() @ read(stored, "marlin", spec).dequantize())


def sm90_8bit_gemm(a, token_scales, weights, scales, bias, out, types) -> None:
    """Stands in for sm90_8bit_path.gemm."""
    k, n = a.shape[1], out.shape[1]
    spec = LayerSpec(k, n, WEIGHT_TYPES[types.weight_type], types.group_size or k)
    assert sm90_8bit_layout.types_of(spec, types.activation, types.output) == types
    records = sm90_8bit_layout.Records(weights, scales)
    stored = sm90_8bit_layout.stored_tensors(records, spec, types.activation)
    x = natural_order(a) * token_scales[:, None]
    out.copy_(x @ read(stored, "marlin", spec).dequantize(torch.float32))


def gather(a, perm):
    """Columns in the order of an index, -1 for zeros."""
    return torch.where(perm >= 0, a[:, perm.clamp(min=0).long()], 0)


def natural_order(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of sm80_layout.kernel_activations, as float32."""
    blocks = codes.float().view(codes.shape[0], -1, 16)
    return blocks[:, :, torch.argsort(torch.tensor(K_ORDER))].reshape(codes.shape)


@pytest.mark.parametrize("family", ["sm80", "sm90", "sm90_8bit"])
def test_kernels_get_what_they_take(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = [c for c in combinations() if c.weight_type.name in ("uint4b8", "uint8b128")]
    if family != "sm80":
        served = [c for c in served if prebuilt.kernels_of(c, "sm_90a")[0][0] == family]
    called = []

    def stand_in(function, original):
        signature = inspect.signature(original)

        def gemm(*arguments, **options) -> None:
            called.append(signature.bind(*arguments, **options))
            function(*arguments, **options)

        return gemm

    monkeypatch.setattr(script, "family_of", lambda c, device: family)
    for module, function in (
        (script.sm80_path, sm80_gemm),
        (script.launch, sm90_gemm),
        (script.sm90_8bit_path, sm90_8bit_gemm),
    ):
        monkeypatch.setattr(module, "gemm", stand_in(function, module.gemm))
    shape = script.Shape("layer", 192, 128)
    for c in served:
        product = script.Product(c, script.make_layer(c, shape, "cpu"), 2)
        x, token_scales, exact = product.activations(torch.randn(3, 192))
        for number in range(2):
            error = script.relative_error(product(x, token_scales, number), exact, product.weight)
            assert error < script.ERROR_LIMITS[c.output], str(c)
    assert len(called) == 2 * len(served) > 0


def test_relative_error() -> None:
    a, weight = torch.eye(3).double(), torch.ones(3, 5000)
    assert script.relative_error(torch.ones(3, 5000), a, weight) == 0
    assert math.isclose(script.relative_error(2 * torch.ones(3, 5000), a, weight), 1)
