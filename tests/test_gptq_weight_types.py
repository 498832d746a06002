"""`--weight_type`: real checkpoints of every type, from the grid to the loaded model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq.cli import main
from gptq.config import QuantizeConfig, resolve
from gptq.grid import GridOptions, find_global_scale, round_to_float, search_grid, storable_scales
from gptq.sequential import Walker
from gptq.solver import SolverOptions, solve, solve_columns
from gptq.storage import quantized_linear, stored_tensors
from marlin_kernel import INTEGER_TYPES, WEIGHT_TYPES, ConfigError, read_manifest
from marlin_kernel.formats import QuantizedLinear, check_type, write
from marlin_kernel.hf import load_model
from marlin_kernel.layer import Layer
from marlin_kernel.reference import decode, encode, quantize_stored
from tests import plain_gptq
from tests.gptq_models import prose, write_source, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "model.safetensors"
FLOATS = [t for t in WEIGHT_TYPES.values() if t.is_float]
OTHERS = [t for t in WEIGHT_TYPES.values() if t.name not in INTEGER_TYPES]
TYPES = pytest.mark.parametrize("wtype", WEIGHT_TYPES.values(), ids=lambda t: t.name)
PLAIN = dict(act_order=False, refit=0, sweeps=0, grid=GridOptions(clip=False, signed=False))


def problem(k: int = 192, n: int = 24) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and a Hessian of correlated inputs of unequal energy."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.eye(k) + 0.6 * torch.randn(k, k, generator=draw) / k**0.5
    x = torch.randn(4 * k, k, generator=draw) @ mix * (torch.rand(k, generator=draw) + 0.2)
    return torch.randn(n, k, generator=draw), 2 * x.T @ x


def loss(weight: Tensor, h: Tensor, found: Tensor) -> float:
    d = (found - weight.T).double()
    return float((d * (h.double() @ d)).sum())


# ---- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wtype", FLOATS, ids=lambda t: t.name)
def test_rounding_to_floats_is_that_of_the_reference(wtype):
    """Ties, subnormals, saturation, both signs."""
    points = decode(torch.arange(wtype.levels), wtype)
    points = points[~points.isnan()].unique()
    middles = (points[1:] + points[:-1]) / 2
    near = torch.cat([points, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    values = torch.cat([near, torch.randn(4096), torch.randn(999) * 300, torch.tensor([0.0, 1e9])])
    values = torch.cat([values, -values, values * 2.0**-8])
    assert torch.equal(round_to_float(values, wtype), decode(encode(values, wtype), wtype))


@pytest.mark.parametrize("wtype", OTHERS, ids=lambda t: t.name)
def test_unclipped_and_unsigned_is_the_kernels_own_rounding(wtype):
    weight, h = problem()
    group = wtype.group_sizes[-1]
    options = SolverOptions(wtype, group, nearest=True, **PLAIN)
    found = solve(weight, h, options)[0]
    wanted = quantize_stored(weight.T, wtype, group, found.global_scale)
    mine = stored_tensors(found)
    same = mine["scales"].view(torch.uint8) == wanted.scales.view(torch.uint8)
    assert float(same.float().mean()) > 0.99
    assert float((found.codes == wanted.codes).float().mean()) > 0.99


@TYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_clipping_is_never_worse_than_no_clipping(wtype, weighted):
    draw = torch.Generator().manual_seed(0)
    g = wtype.group_sizes[-1]
    w = torch.randn(3, g, 40, generator=draw)
    w[:, 5, ::3] *= 4
    factor = torch.randn(3, g, g, generator=draw).triu() * 0.3 + torch.eye(g)
    factor = factor if weighted else None
    common = find_global_scale(w, wtype)

    def error(clip: bool) -> Tensor:
        scales, zeros = search_grid(w, factor, wtype, GridOptions(clip=clip), common)
        assert torch.equal(storable_scales(scales, wtype, common), scales)
        s, z = scales[:, None], zeros[:, None]
        if wtype.is_float:
            e = (decode(encode(w / s, wtype), wtype) * s - w).double()
        else:
            e = ((((w / s) + z).round().clamp(0, wtype.levels - 1) - z) * s - w).double()
        return (e if factor is None else factor.double().transpose(1, 2) @ e).square().sum(1)

    before, after = error(False), error(True)
    assert bool((after <= before * (1 + 1e-5)).all())
    if wtype.bits == 4:
        assert float(after.sum()) < 0.98 * float(before.sum())


# ---- the solver ----------------------------------------------------------------------------------


@TYPES
def test_plain_gptq_is_the_short_reference(wtype):
    """Natural order, no clipping: `plain_gptq` does the same, input by input."""
    weight, h = problem()
    group = wtype.group_sizes[-1]
    options = SolverOptions(wtype, group, percdamp=0.01, **PLAIN)
    ours = solve(weight, h, options)[0].weight()
    reference = plain_gptq.solve(weight.T, h, wtype, group, 0.01).dequantize()
    limit = 0.2 if wtype.global_scale else 0.03  # another global scale rounds the others elsewhere
    assert abs(loss(weight, h, ours) / loss(weight, h, reference) - 1) < limit


@TYPES
def test_every_refinement_of_the_method_helps_every_type(wtype):
    weight, h = problem()
    group = wtype.group_sizes[-1]
    nearest = SolverOptions(wtype, group, nearest=True, **PLAIN)
    plain = SolverOptions(wtype, group, **PLAIN)
    whole = SolverOptions(wtype, group, refit=1, sweeps=1)
    losses = [loss(weight, h, solve(weight, h, o)[0].weight()) for o in (nearest, plain, whole)]
    assert losses[1] < 0.9 * losses[0] and losses[2] < losses[1]


@TYPES
def test_what_is_stored_is_what_was_solved(wtype):
    weight, h = problem(200, 24)
    for group in wtype.group_sizes:
        found = solve(weight, h, SolverOptions(wtype, group, refit=1, sweeps=1))[0]
        layer = quantized_linear(stored_tensors(found), wtype, group)
        assert torch.equal(layer.dequantize(), found.weight())


def test_shares_of_the_outputs_have_one_global_scale():
    wtype = WEIGHT_TYPES["nvfp4"]
    weight, h = problem()
    weight[:8] *= 8
    options = SolverOptions(wtype, 16)
    common = find_global_scale(weight, wtype)
    whole = solve_columns(weight, h, options)
    assert torch.equal(whole.global_scale, common)
    for own in (slice(0, 10), slice(10, 24)):
        part = solve_columns(weight[own], h, options, global_scale=common)
        assert torch.equal(part.codes, whole.codes[:, own])
        assert torch.equal(part.scales, whole.scales[:, own])


# ---- settings ------------------------------------------------------------------------------------


@TYPES
def test_a_type_implies_its_settings(wtype):
    config = resolve({}, {"weight_type": wtype.name})
    assert config.wtype == wtype and config.wbits == wtype.bits
    assert config.groupsize in wtype.group_sizes
    assert config.groupsize == (128 if 128 in wtype.group_sizes else wtype.group_sizes[-1])
    assert resolve(config.as_dict(), {}) == config


@pytest.mark.parametrize(
    ("recipe", "flags", "name", "groupsize"),
    [
        ({"wbits": 4, "groupsize": 128}, {"weight_type": "nvfp4"}, "nvfp4", 16),
        ({"wbits": 4, "sym": True}, {"weight_type": "uint8"}, "uint8", 128),
        ({"wbits": 4}, {"weight_type": "uint4", "groupsize": 32}, "uint4", 32),
        ({"weight_type": "mxfp4"}, {"weight_type": "uint4b8", "groupsize": 64}, "uint4b8", 64),
        ({"weight_type": "uint4"}, {"wbits": 8, "sym": True}, "uint8b128", 128),
        ({}, {"wbits": 8, "weight_type": "float8_e4m3fn"}, "float8_e4m3fn", 128),
    ],
)
def test_flags_override_recipes(recipe, flags, name, groupsize):
    config = resolve(recipe, flags)
    assert (config.wtype.name, config.groupsize) == (name, groupsize)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"wbits": 8, "weight_type": "uint4"}, "wbits=8 with weight_type='uint4'.*wbits=4; leave"),
        ({"wbits": 16, "weight_type": "nvfp4"}, "wbits=16 with weight_type='nvfp4'"),
        ({"sym": True, "weight_type": "uint4_hqq"}, "sym=True with weight_type='uint4_hqq'"),
        ({"weight_type": "nvfp4", "groupsize": 64}, "groupsize=64 is not one of 16.*nvfp4"),
        ({"weight_type": "int4"}, "weight_type='int4' is not one of uint4b8"),
        ({"weight_type": "mxfp4", "sparsity": "2:4"}, "sparsity='2:4' with weight_type=mxfp4"),
        ({"weight_type": "nvfp4", "static_groups": False}, "nvfp4 do not have; add --static-gr"),
        ({"weight_type": "nvfp4", "refine": 3}, "refine=3.*nvfp4"),
        ({"weight_type": "nvfp4", "format": "gptq"}, "'gptq' holds uint4b8.*not nvfp4.*marlin"),
        ({"weight_type": "uint4_hqq", "format": "compressed-tensors"}, "not uint4_hqq"),
        ({"wbits": 4, "groupsize": 16}, "groupsize=16 is not one of -1, 32, 64, 128.*uint4b8"),
    ],
)
def test_contradictions_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve({}, flags)


def test_runs_of_one_type_continue_each_other_however_it_was_named():
    by_bits, by_name = resolve({}, {"wbits": 4}), resolve({}, {"weight_type": "uint4b8"})
    assert by_bits.fingerprint() == by_name.fingerprint()
    other = resolve({}, {"weight_type": "float8_e4m3fn"})
    assert other.fingerprint() != resolve({}, {"wbits": 8}).fingerprint()


def test_which_format_holds_which_type():
    held = {
        fmt: {name for name, wtype in WEIGHT_TYPES.items() if _holds(fmt, wtype)}
        for fmt in ("marlin", "gptq", "compressed-tensors")
    }
    assert held["marlin"] == set(WEIGHT_TYPES) and held["gptq"] == set(INTEGER_TYPES)
    assert held["compressed-tensors"] == {*INTEGER_TYPES, "nvfp4", "mxfp4"}


def _holds(fmt: str, wtype) -> bool:
    try:
        check_type(fmt, wtype)
    except ConfigError:
        return False
    return True


# ---- end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def flags(source, tmp_path_factory) -> list[str]:
    text = write_text(tmp_path_factory.mktemp("text") / "calibration.txt")
    return [str(source), "--dataset", str(text), "--nsamples", "8", "--seqlen", "32"]


@torch.no_grad()
def divergence(source: Path, packed: Path, device: str = "cpu") -> float:
    """KL(original || packed) per token, on text of the calibration's distribution."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [tokenizer(t, return_tensors="pt").input_ids.to(device) for t in prose(12, 40, seed=9)]

    def log_probabilities(model) -> Tensor:
        found = [model(ids, use_cache=False).logits[0].float().log_softmax(-1) for ids in texts]
        return torch.cat(found)

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().to(device)
    wanted = log_probabilities(original)
    got = log_probabilities(load_model(packed, device=device, verify=True))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@TYPES
def test_checkpoints_of_every_type(wtype, source, flags, tmp_path, capsys):
    """Quantize, save, load with verification; GPTQ is nearer to the original than rounding."""
    found = {}
    for method in ("--nearest", "--no-nearest"):
        out = tmp_path / method
        named = ["--weight_type", wtype.name, method, "--save", str(out)]
        assert main([*flags, *named]) == 0
        found[method] = divergence(source, out)
        manifest = read_manifest(out)
        assert (manifest["weight_type"], manifest["format"]) == (wtype.name, "marlin")
        assert wtype.name in capsys.readouterr().out
        report = json.loads((out / "quantization_report.json").read_text())
        assert report["config"]["weight_type"] == wtype.name and len(report["layers"]) == 14
        errors = [row["relative_error"] for row in report["layers"]]
        assert all(0 < error < 0.5 for error in errors)
    assert found["--no-nearest"] < (0.8 if wtype.bits == 4 else 1.0) * found["--nearest"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float8_e4m3fn", "nvfp4"])
def test_checkpoints_of_other_types_on_a_gpu(name, source, flags, tmp_path):
    found = {}
    for method in ("--nearest", "--no-nearest"):
        out = tmp_path / method
        named = ["--weight_type", name, method, "--save", str(out), "--device", "cuda"]
        assert main([*flags, *named]) == 0
        found[method] = divergence(source, out, "cuda")
    assert found["--no-nearest"] < found["--nearest"]


@pytest.mark.parametrize("name", ["nvfp4", "uint4_hqq", "mxfp4", "float8_e4m3fn"])
def test_resuming_gives_the_same_bytes(name, flags, tmp_path, monkeypatch):
    named = [*flags, "--weight_type", name]
    assert main([*named, "--save", str(tmp_path / "whole")]) == 0
    solve_layer = Walker.quantize_layer

    def quantize_layer(self, index, on_stage):
        if index == 1:
            raise KeyboardInterrupt
        return solve_layer(self, index, on_stage)

    monkeypatch.setattr(Walker, "quantize_layer", quantize_layer)
    assert main([*named, "--save", str(tmp_path / "out")]) == 130
    monkeypatch.undo()
    assert main([*named, "--save", str(tmp_path / "out"), "--resume"]) == 0
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_learned_norms_with_another_type(source, flags, tmp_path):
    out = tmp_path / "out"
    more = ["--weight_type", "nvfp4", "--refine-norms", "2", "--save", str(out)]
    assert main([*flags, *more]) == 0
    load_model(out, verify=True)
    hqq = ["--weight_type", "uint4_hqq", "--refine", "2", "--save", str(tmp_path / "hqq")]
    assert main([*flags, *hqq]) == 0
    load_model(tmp_path / "hqq", verify=True)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_compressed_tensors_holds_4_bit_floats(name, flags, tmp_path):
    """The same values as in our format, by our reader and by the package itself."""
    ids = torch.arange(3, 30)[None]
    found = []
    for fmt in ("marlin", "compressed-tensors"):
        named = ["--weight_type", name, "--format", fmt, "--save", str(tmp_path / fmt)]
        assert main([*flags, *named]) == 0
        with torch.no_grad():
            found.append(load_model(tmp_path / fmt, verify=True)(ids, use_cache=False).logits)
    assert torch.equal(*found)
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "compressed-tensors"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits.float()  # unpacks weights, always to bfloat16
    torch.testing.assert_close(logits, found[0], rtol=0.1, atol=0.1 * float(logits.abs().max()))
    for path, layer in load_model(folder).named_modules():
        if isinstance(layer, Layer):
            weight = layer.quantized().dequantize().T.bfloat16()
            assert torch.equal(theirs.get_submodule(path).weight, weight), path


def test_a_format_without_the_type_is_refused_before_the_work(flags, tmp_path, capsys):
    out = tmp_path / "out"
    named = ["--weight_type", "nvfp4", "--format", "gptq", "--save", str(out)]
    assert main([*flags, *named]) == 2
    assert "--format marlin" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_reciprocal_that_rounds_is_refused():
    layer = QuantizedLinear.quantize(torch.randn(32, 8), WEIGHT_TYPES["nvfp4"], 16)
    candidates = torch.linspace(1.0, 2.0, 1000)
    odd = candidates[1 / (1 / candidates) != candidates][:1]
    with pytest.raises(ConfigError, match="not exact.*power of two"):
        write(replace(layer, global_scale=odd), "compressed-tensors")


def test_direct_settings_are_checked():
    with pytest.raises(ConfigError, match="wbits=16 with weight_type='nvfp4'"):
        QuantizeConfig(weight_type="nvfp4")
