"""Learning scales by gradient descent: gradients, what is kept, and the way into the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from gptq import refine
from gptq.cli import main
from gptq.config import QuantizeConfig
from gptq.models import StreamedModel
from gptq.refine import RefineOptions, StoredLinear, refine_layer, refine_model
from gptq.sequential import Walker
from gptq.solver import Solution, SolverOptions, dequantize, solve
from gptq.storage import FinishedLayers
from marlin_kernel import WEIGHT_TYPES, ConfigError
from marlin_kernel.hf import load_model
from marlin_kernel.reference import round_scales
from tests.gptq_models import SOURCES, token_samples, write_source, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = QuantizeConfig(wbits=4, groupsize=64, clip_steps=4).solver_options()
SAMPLES = token_samples(12, 24)
FEW = RefineOptions(4, tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    write_source(path, SOURCES["qwen3"])
    return path


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(folder, dtype, torch.device("cpu"))


def walked(folder: Path, refine_options: RefineOptions | None = None, **settings):
    """A walker behind the last layer, and what every layer gave."""
    dtype = settings.pop("dtype", torch.float32)
    walk = Walker(stream(folder, dtype), SAMPLES, OPTIONS, refine=refine_options, **settings)
    results = [walk.quantize_layer(i, lambda path: None) for i in range(walk.model.num_layers)]
    return walk, results


def by_path(walk: Walker, results) -> list[dict[str, Solution]]:
    return [
        {r.name.removeprefix(walk.model.layer_name(i) + "."): r.solution for r in layer}
        for i, layer in enumerate(results)
    ]


def spoiled(solution: Solution, seed: int) -> Solution:
    """The same codes with scales that are up to 10 % off."""
    draw = torch.Generator().manual_seed(seed)
    factor = 1 + 0.2 * (torch.rand(solution.scales.shape, generator=draw) - 0.5)
    return replace(solution, scales=round_scales(solution.scales * factor))


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("k", "group"), [(128, 64), (160, 64), (40, 64)])
def test_gradient_of_scales_is_autograds(k, group, moved):
    draw = torch.Generator().manual_seed(0)
    groups = torch.arange(k) // group
    if moved:
        groups = groups[torch.randperm(k, generator=draw)]
    count = int(groups.max()) + 1
    linear = StoredLinear(
        torch.randint(0, 16, (k, 6), generator=draw).to(torch.uint8),
        round_scales(torch.rand(count, 6, generator=draw) + 0.5),
        torch.full((count, 6), 8.0),
        groups,
        WEIGHT_TYPES["uint4b8"],
    )
    module = nn.Linear(k, 6, bias=False)
    learned = refine._Scales(module, linear)
    learned.write()
    x = torch.randn(5, k, generator=draw)
    module(x).square().sum().backward()
    scales = linear.scales.clone().requires_grad_()
    weight = dequantize(linear.codes, scales, linear.zeros, groups)
    (x @ weight).square().sum().backward()
    torch.testing.assert_close(
        learned.gradient(), scales.grad * linear.scales, rtol=1e-4, atol=1e-2
    )


# ---- one layer -----------------------------------------------------------------------------------


def toy(seed: int = 0):
    """A linear with spoiled scales, its samples of different lengths, and exact targets."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 96, generator=draw)
    inputs = [torch.randn(1, 5 + i % 3, 96, generator=draw) for i in range(16)]
    options = SolverOptions(WEIGHT_TYPES["uint4b8"], 64)
    solution = spoiled(solve(weight, torch.eye(96), options)[0], seed)
    module = nn.Linear(96, 24, bias=False)
    module.weight.requires_grad_(False)

    def run(options: RefineOptions):
        return refine_layer(
            module,
            {"linear": module},
            {"linear": solution},
            lambda i: (inputs[i], inputs[i] @ weight.T),
            [x.shape[1] for x in inputs],
            options,
        )

    return run, solution, module


def test_spoiled_scales_are_repaired():
    run, solution, module = toy()
    found, refinement = run(RefineOptions(60, tokens=40, rate=5e-3))
    better = found["linear"]
    assert refinement.after < 0.8 * refinement.before
    assert refinement.best_step > 0
    assert torch.equal(better.codes, solution.codes)
    assert torch.equal(better.scales, round_scales(better.scales))
    torch.testing.assert_close(module.weight.data, better.weight().T)  # left in place
    assert not module.weight.requires_grad and module.weight.grad is None


def test_a_refinement_that_fails_changes_nothing():
    run, solution, module = toy()
    found, refinement = run(RefineOptions(6, tokens=40, rate=3.0))
    assert (refinement.best_step, refinement.after) == (0, refinement.before)
    assert torch.equal(found["linear"].scales, solution.scales)
    torch.testing.assert_close(module.weight.data, solution.weight().T)


def test_the_seed_decides_the_bits():
    run = toy()[0]
    options = RefineOptions(9, tokens=40, rate=5e-3)
    first, again = run(options)[0]["linear"], run(options)[0]["linear"]
    assert torch.equal(first.scales, again.scales)
    assert not torch.equal(first.scales, run(replace(options, seed=1))[0]["linear"].scales)


def test_every_sample_teaches_before_any_does_again():
    lengths = [3, 5, 4, 6, 2]
    steps = refine._batches([0, 1, 3, 4], lengths, RefineOptions(1, tokens=8))
    drawn = [next(steps) for _ in range(4)]
    assert all(sum(lengths[i] for i in batch) >= 8 for batch in drawn)
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:4]) == [0, 1, 3, 4]
    few = refine._batches([0, 1], lengths, RefineOptions(1, tokens=99))
    assert sorted(next(few)) == [0, 1]  # fewer tokens than a step takes


def test_one_sample_is_refused():
    with pytest.raises(ConfigError, match="at least 2 calibration samples.*raise --nsamples"):
        refine.check_samples(1)


# ---- the walk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walk_with_refinement_goes_on_with_the_learned_scales(folder, dtype, monkeypatch):
    """What resuming relies on: advancing over the refined layers gives the same bits."""
    spoil = lambda *given: [  # noqa: E731
        replace(r, solution=spoiled(r.solution, 0)) for r in staged(*given)
    ]
    staged = Walker._staged
    monkeypatch.setattr(Walker, "_staged", spoil)  # so that there is something to learn
    options = RefineOptions(4, tokens=64, rate=1e-2)
    walk, results = walked(folder, options, dtype=dtype, step_tokens=50)
    assert all(r.refinement.after <= r.refinement.before for layer in results for r in layer)
    assert any(r.refinement.best_step for layer in results for r in layer)
    resumed = Walker(stream(folder, dtype), SAMPLES, OPTIONS, step_tokens=50)
    for index, layer in enumerate(by_path(walk, results)):
        resumed.advance(index, {p: s.weight().T.contiguous() for p, s in layer.items()})
    assert all(map(torch.equal, walk.hidden, resumed.hidden))
    assert all(map(torch.equal, walk.target, resumed.target))


def test_samples_come_without_padding(folder):
    walk = Walker(stream(folder), SAMPLES, OPTIONS, step_tokens=50)
    assert any(batch.valid is not None for batch in walk.batches)
    seen = []
    for i, (batch, row, length) in enumerate(walk.places):
        ids = walk.batches[batch].ids[row, :length]
        seen.append(ids.tolist())
        assert torch.equal(walk.sample(walk.hidden, i), walk.model.embed(ids))
    assert sorted(seen) == sorted(ids.tolist() for ids in SAMPLES)


# ---- the whole model -----------------------------------------------------------------------------


@torch.no_grad()
def divergence(folder: Path, weights: dict[str, Tensor], samples: list[Tensor]) -> float:
    """Mean KL per token of whole models of transformers: the obvious way."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    changed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, weight in weights.items():
        changed.get_parameter(name).copy_(weight)
    total = 0.0
    for ids in samples:
        p, q = (m(ids[None]).logits[0].log_softmax(-1) for m in (original, changed))
        total += float((p.exp() * (p - q)).sum())
    return total / sum(ids.numel() for ids in samples)


def test_end_to_end_loss_is_that_of_whole_models_and_falls(folder):
    walk, results = walked(folder, step_tokens=50)
    layers = [
        {path: spoiled(solution, 1) for path, solution in layer.items()}
        for layer in by_path(walk, results)
    ]
    samples = [walk.batches[b].ids[row, :length] for b, row, length in walk.places]
    held = samples[::8]
    scales, norms, found = refine_model(
        walk.model,
        lambda i: layers[i],
        samples,
        lambda i: walk.sample(walk.target, i),
        RefineOptions(8, tokens=64, rate=1e-2),
    )
    prefixes = [walk.model.layer_name(i) for i in range(len(layers))]
    before = {
        f"{prefix}.{path}.weight": s.weight().T
        for prefix, layer in zip(prefixes, layers, strict=True)
        for path, s in layer.items()
    }
    after = {
        f"{prefix}.{path}.weight": replace(s, scales=scales[f"{prefix}.{path}"]).weight().T
        for prefix, layer in zip(prefixes, layers, strict=True)
        for path, s in layer.items()
    }
    assert found.before == pytest.approx(divergence(folder, before, held), rel=1e-3)
    assert found.after == pytest.approx(divergence(folder, after | norms, held), rel=1e-3)
    assert found.after < found.before
    names = {name for name in walk.model.tensors if name.endswith("norm.weight")}
    assert set(norms) == names
    assert all(torch.equal(norm, norm.half().float()) for norm in norms.values())


def run(folder: Path, tmp_path: Path, *more: str) -> Path:
    tmp_path.mkdir(exist_ok=True)
    text = write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    few = ["--wbits", "4", "--groupsize", "64", "--nsamples", "8", "--seqlen", "24"]
    flags = [str(folder), *few, "--dataset", str(text), "--eval", "none", "--save", str(out)]
    assert main([*flags, *more]) == 0
    return out


def test_command_line_to_loaded_model(folder, tmp_path, monkeypatch):
    """The probe logits of the checkpoint are those of the learned scales and norms."""
    ends = {}

    def learn(*given):
        scales, norms, found = refine_model(*given)
        scales = {name: round_scales(value * 1.02) for name, value in scales.items()}
        norms = {name: (value * 1.01).half().float() for name, value in norms.items()}
        ends.update(norms)
        return scales, norms, found

    monkeypatch.setattr("gptq.run.refine_model", learn)
    out = run(folder, tmp_path, "--refine", "2", "--refine-norms", "1")
    load_model(out, device="cpu", verify=True)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(n).float(), value) for n, value in ends.items())
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["refinement"]["after"] <= report["refinement"]["before"]
    assert report["totals"]["seconds_refine"] > 0
    assert all(
        set(row["refinement"]) == {"before", "after", "best_step"} for row in report["layers"]
    )


def test_an_interrupted_run_continues_bit_for_bit(folder, tmp_path, monkeypatch):
    more = ["--refine", "2", "--refine-norms", "2"]
    whole = run(folder, tmp_path / "whole", *more)
    save = FinishedLayers.save

    def interrupted(self, index, *given):
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *given)

    monkeypatch.setattr(FinishedLayers, "save", interrupted)
    with pytest.raises(AssertionError):
        run(folder, tmp_path / "parts", *more)
    monkeypatch.undo()
    parts = run(folder, tmp_path / "parts", "--resume", *more)
    same = [(out / "model.safetensors").read_bytes() for out in (whole, parts)]
    assert same[0] == same[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_half_precision(folder, tmp_path):
    out = run(folder, tmp_path, "--refine", "3", "--refine-norms", "3", "--device", "cuda")
    load_model(out, device="cpu", verify=True)
