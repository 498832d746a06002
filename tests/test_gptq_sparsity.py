"""2:4 pruning inside the GPTQ update."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq import sparsity
from gptq.cli import main
from gptq.hessian import factorize
from gptq.sequential import Walker
from gptq.solver import SolverOptions, solve
from marlin_kernel.checkpoint import open_checkpoint, packed_scheme, read_layer
from marlin_kernel.errors import ConfigError
from marlin_kernel.hf import load_model
from marlin_kernel.sparse import positions_2_4
from marlin_kernel.weight_types import weight_type
from tests.gptq_models import write_source, write_text

U4 = weight_type("uint4b8")


def layer(n: int = 24, k: int = 64, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, K] and H = 2 X Xᵀ of correlated inputs."""
    mix = torch.randn(k, k) / k**0.5 + torch.eye(k)
    x = mix @ (torch.randn(k, tokens) * (torch.rand(k, 1) * 3 + 0.1))
    return torch.randn(n, k), 2 * x @ x.T


def loss(difference: torch.Tensor, h: torch.Tensor) -> float:
    """tr(D H Dᵀ) of [N, K]."""
    return float((difference @ h * difference).sum())


def test_pairs_cost_least() -> None:
    """Against the loss left when all inputs after the pair compensate by least squares."""
    _, h = layer(k=12)
    factor = factorize(h, 0.01, "layer")
    damped = torch.linalg.inv(factor.u.double().T @ factor.u.double())
    w = torch.randn(4, 50)
    stays = sparsity.choose_pairs(w, sparsity.pair_costs(factor.u)[0])
    assert bool((stays.sum(0) == 2).all())
    for column in range(w.shape[1]):
        best = torch.inf, None
        for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            fixed, free = list(pair), [i for i in range(12) if i not in pair]
            removed = w[fixed, column].double()
            schur = damped[fixed][:, fixed] - damped[fixed][:, free] @ torch.linalg.solve(
                damped[free][:, free], damped[free][:, fixed]
            )
            best = min(best, (float(removed @ schur @ removed), pair))
        assert set((~stays[:, column]).nonzero().flatten().tolist()) == set(best[1])


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("group_size", (-1, 32))
@pytest.mark.parametrize("polish", (0, 1))
def test_joint_solution_is_2_4_and_beats_magnitude(
    act_order: bool, group_size: int, polish: int
) -> None:
    weight, h = layer()
    options = SolverOptions(
        U4, group_size, act_order=act_order, refit=polish, sweeps=polish, sparsity="2:4"
    )
    (joint,) = solve(weight, h, options)
    (rounded,) = solve(weight, h, replace(options, nearest=True))
    for solution in (joint, rounded):
        values = solution.weight().T
        positions_2_4(values)  # raises if it is not 2:4
        assert bool((solution.codes[values.T == 0] == 8).all())
    assert loss(joint.weight().T - weight, h) < 0.6 * loss(rounded.weight().T - weight, h)


def test_equal_magnitudes_keep_the_last() -> None:
    w = torch.tensor([[1.0, -2, 0, 3], [-1, 2, 0, 0], [1, 2, 0, 4], [1, 1, 0, -0.5]])
    kept = torch.tensor([[0.0, 0, 0, 3], [0, 2, 0, 0], [1, 2, 0, 4], [1, 0, 0, 0]])
    assert torch.equal(sparsity.keep_largest(w), kept)


def test_blocksize_has_no_effect() -> None:
    weight, h = layer()
    options = SolverOptions(U4, 32, sparsity="2:4", blocksize=6)
    (a,) = solve(weight, h, options)
    (b,) = solve(weight, h, replace(options, blocksize=64))
    assert float((a.codes != b.codes).float().mean()) < 0.01


def test_pruning_alone_beats_magnitude() -> None:
    weight, h = layer()
    factor = factorize(h, 0.01, "layer")
    w = weight.T.contiguous()
    pruned = sparsity.prune(w, factor, None, 16)
    positions_2_4(pruned.T.contiguous())
    least = sparsity.keep_largest(w)
    assert loss((pruned - w).T, h) < 0.7 * loss((least - w).T, h)
    order = sparsity.quad_order(h.diagonal())
    ordered = sparsity.prune(w, factorize(h[order][:, order], 0.01, "layer"), order, 16)
    positions_2_4(ordered.T.contiguous())
    assert loss((ordered - w).T, h) < loss((least - w).T, h)


def test_order_keeps_quads_together() -> None:
    order = sparsity.quad_order(torch.rand(32)).view(-1, 4)
    assert bool((order[:, 0] % 4 == 0).all())
    assert torch.equal(order - order[:, :1], torch.arange(4).expand(8, 4))


def test_movable_codes_keep_the_pattern() -> None:
    codes = torch.tensor([[8, 3], [8, 8], [8, 8], [1, 8], [8, 8], [8, 8], [8, 8], [8, 8]])
    allowed = sparsity.movable(codes, torch.full_like(codes, 8))
    assert bool((allowed.view(2, 4, 2).sum(1) == 2).all())
    assert bool(allowed[codes != 8].all())


def test_inputs_must_come_in_quads() -> None:
    weight, h = layer(k=62)
    with pytest.raises(ConfigError, match="q_proj: 62 inputs are no multiple of 4"):
        solve(weight, h, SolverOptions(U4, -1, sparsity="2:4"), name="q_proj")


# ---- end to end ----


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder)
    write_text(folder / "calibration.txt")
    return folder


def quantize(source: Path, out: Path, *flags: str) -> int:
    few = ["--groupsize", "32", "--nsamples", "8", "--seqlen", "32", "--sparsity", "2:4"]
    text = ["--dataset", str(source / "calibration.txt"), "--save", str(out)]
    return main([str(source), *few, *text, *flags])


def logits(folder: Path, **options: bool) -> torch.Tensor:
    model = load_model(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None] * 11 % 200, use_cache=False).logits


@pytest.mark.parametrize(
    "flags",
    (
        ("--wbits", "4"),
        ("--wbits", "8", "--nearest"),
        ("--wbits", "4", "--no-act-order", "--groupsize", "-1"),
        ("--wbits", "4", "--format", "gptq"),
        ("--wbits", "4", "--refine", "2"),
        ("--wbits", "4", "--groupsize", "128"),  # more than a layer has
    ),
    ids=" ".join,
)
def test_checkpoint_is_sparse_and_loads(flags, source, tmp_path) -> None:
    assert quantize(source, tmp_path / "out", *flags) == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    scheme = packed_scheme(checkpoint)
    assert scheme.fmt == ("gptq" if "gptq" in flags else "marlin-24")
    model = load_model(source, dtype=torch.float32)
    for name in scheme.modules:
        weight = read_layer(checkpoint, scheme, name).dequantize().T.contiguous()
        positions_2_4(weight)
        model.get_submodule(name).weight.data = weight
    with torch.no_grad():
        expected = model(torch.arange(3, 40)[None] * 11 % 200, use_cache=False).logits
    served = logits(tmp_path / "out", verify=True)
    assert float((served - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("flags", ((), ("--nearest",)), ids=str)
def test_pruning_alone_writes_a_plain_checkpoint(flags, source, tmp_path) -> None:
    assert quantize(source, tmp_path / "out", "--wbits", "16", *flags) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    checkpoint, original = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    assert set(checkpoint) == set(original)
    for name in checkpoint:
        if "proj" in name:
            positions_2_4(checkpoint[name])
            kept = checkpoint[name] != 0
            moved = (checkpoint[name] != original[name])[kept].any()
            assert bool(moved) != bool(flags)  # only the update moves what stays
        else:
            assert torch.equal(checkpoint[name], original[name])
    assert bool(logits(tmp_path / "out").isfinite().all())


@pytest.mark.parametrize("flags", (("--wbits", "4"), ("--wbits", "16")), ids=" ".join)
def test_a_damaged_tensor_is_found_before_the_work(flags, source, tmp_path, capsys) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert quantize(copied, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert "model.norm.weight" in error and "quantize:" not in error  # no progress yet


@pytest.mark.gpu
@pytest.mark.parametrize("wbits", (4, 8, 16))
def test_checkpoints_pruned_on_a_gpu(wbits, source, tmp_path) -> None:
    """The CUDA solver's checkpoint is 2:4 and as near to the source as that of the CPU."""
    model, found = load_model(source, dtype=torch.float32), []
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        flags = ("--wbits", str(wbits), "--device", device, "--dtype", "float32")
        assert quantize(source, out, *flags) == 0
        checkpoint = open_checkpoint(out)
        scheme = None if wbits == 16 else packed_scheme(checkpoint)
        error = 0.0
        for name, linear in model.named_modules():
            if not name.endswith("proj"):
                continue
            if scheme is None:
                weight = checkpoint[f"{name}.weight"].float()
            else:
                weight = read_layer(checkpoint, scheme, name).dequantize().T.contiguous()
            positions_2_4(weight)
            error += float((weight - linear.weight).square().sum())
        found.append(error)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_an_interrupted_run_goes_on(source, tmp_path, monkeypatch) -> None:
    assert quantize(source, tmp_path / "whole", "--wbits", "4") == 0
    real, calls = Walker.quantize_layer, []

    def stop_at_the_second(self, *arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Walker, "quantize_layer", stop_at_the_second)
    assert quantize(source, tmp_path / "out", "--wbits", "4") == 130
    monkeypatch.undo()
    assert quantize(source, tmp_path / "out", "--wbits", "4", "--resume") == 0
    whole, resumed = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "flags, message",
    (
        (("--wbits", "4", "--no-sym"), "add --sym"),
        (("--wbits", "4", "--no-static-groups"), "add --static-groups"),
    ),
)
def test_settings_that_cannot_work(flags, message, source, tmp_path, capsys) -> None:
    assert quantize(source, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
