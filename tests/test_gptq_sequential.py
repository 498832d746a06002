"""The one-pass walk against whole models of transformers, run again for every stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq.activations import DiskOffload, Offload
from gptq.grid import GridOptions
from gptq.models import StreamedModel
from gptq.sequential import Walker
from gptq.solver import Columns, Solution, SolverOptions, solve_columns
from marlin_kernel import WEIGHT_TYPES, NumericalError
from tests.gptq_models import SOURCES, Source, token_samples, write_source

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = SolverOptions(
    WEIGHT_TYPES["uint4b8"],
    64,
    grid=GridOptions(clip_steps=6),
    refit=1,
    sweeps=1,
)
KINDS = ("llama", "llama-biases", "mistral-window", "qwen2-window", "qwen3")
SAMPLES = token_samples()


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_source(path, SOURCES[request.param])
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_source(path, replace(SOURCES["llama"], layers=3))
    return path


def stream(folder: Path) -> StreamedModel:
    return StreamedModel(folder, torch.float32, torch.device("cpu"))


def walker(folder: Path, options: SolverOptions, **settings) -> Walker:
    return Walker(stream(folder), SAMPLES, options, **settings)


def quantize(walk: Walker, layers: int | None = None) -> dict[str, Solution]:
    """Solutions of the first `layers` layers (default: all), by name."""
    found = {}
    for index in range(walk.model.num_layers if layers is None else layers):
        for result in walk.quantize_layer(index, lambda path: None):
            found[result.name] = result.solution
    return found


# ---- the naive walk ------------------------------------------------------------------------------


def whole_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def inputs_of(model, paths: list[str]) -> dict[str, Tensor]:
    """What modules receive when the whole model reads every sample: float32 [tokens, K]."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: seen[path].append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for path in paths
    ]
    for ids in SAMPLES:
        model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat([t[0] for t in parts]) for path, parts in seen.items()}


@dataclass(frozen=True)
class Statistics:
    """What the solver is given for one stage, and how many tokens it was summed over."""

    weight: Tensor
    h: Tensor
    shift: Tensor | None
    lack: Tensor | None
    tokens: int


def recorded(walk: Walker, monkeypatch) -> tuple[list[Statistics], dict[str, Solution]]:
    """What the walk gives the solver, stage by stage, and what it gets."""
    calls: list[tuple[Tensor, ...]] = []
    tokens: list[int] = []

    def spy(weight, h, options, *, shift, lack, **others):
        calls.append((weight.clone(), h.clone(), shift, lack))
        return solve_columns(weight, h, options, shift=shift, lack=lack, **others)

    def count(self, parts, summed):
        tokens.append(summed)
        return split(self, parts, summed)

    split = Columns.split
    monkeypatch.setattr("gptq.sequential.solve_columns", spy)
    monkeypatch.setattr(Columns, "split", count)
    solutions = quantize(walk)
    monkeypatch.undo()
    return [Statistics(*c, t) for c, t in zip(calls, tokens, strict=True)], solutions


@torch.no_grad()
def naive(
    folder: Path, solutions: dict[str, Solution], *, asymmetric: bool, true_sequential: bool
) -> list[Statistics]:
    """The same from whole models: before each stage, run the whole model from the tokens on.

    The given solutions are put in place stage after stage; asymmetric calibration compares with a
    second, untouched model.
    """
    model, original = whole_model(folder), whole_model(folder)
    found: list[Statistics] = []
    for index in range(model.config.num_hidden_layers):
        layer = f"model.layers.{index}"
        stages = [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
        # where the residual stream that o_proj and down_proj add to can be seen
        streams = {1: f"{layer}.input_layernorm", 3: f"{layer}.post_attention_layernorm"}
        before = inputs_of(model, [f"{layer}.{stage[0]}" for stage in stages])
        for number, stage in enumerate(stages):
            first = f"{layer}.{stage[0]}"
            watched = [first, *([streams[number]] if number in streams else [])]
            now = inputs_of(model, watched)
            x = now[first] if true_sequential else before[first]
            linears = [model.get_submodule(f"{layer}.{path}") for path in stage]
            weight = torch.cat([linear.weight for linear in linears])
            shift = lack = None
            if asymmetric:
                aim = inputs_of(original, watched)
                if number in streams:
                    behind = aim[streams[number]] - now[streams[number]]
                    lack = 2 * (behind + aim[first] @ weight.T - x @ weight.T).T @ x
                else:
                    shift = 2 * (aim[first] - x).T @ x
            found.append(Statistics(weight, 2 * x.T @ x, shift, lack, x.shape[0]))
            for path, linear in zip(stage, linears, strict=True):
                linear.weight.data = solutions[f"{layer}.{path}"].weight().T.contiguous()
    return found


def check_same(found: list[Statistics], wanted: list[Statistics]) -> None:
    """Equal up to the order of float32 sums, relative to the largest entry of each matrix."""
    for stage, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(ours.weight, theirs.weight)
        assert ours.tokens == theirs.tokens
        for name in ("h", "shift", "lack"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), (stage, name)
            if a is not None:
                scale = max(float(b.abs().max()), float(theirs.h.abs().max()) * 1e-3)
                assert float((a - b).abs().max()) < 1e-4 * scale, (stage, name)


@pytest.mark.parametrize("step_tokens", [1, 60])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_one_pass_equals_the_naive_true_sequential_walk(
    folder, asymmetric, step_tokens, monkeypatch
):
    """Catches stale inputs, a twin that was quantized too, and a residual of the wrong place.

    With 60 tokens a step, samples of different length pass together, padded.
    """
    walk = walker(folder, replace(OPTIONS, asymmetric=asymmetric), step_tokens=step_tokens)
    assert any(b.valid is not None for b in walk.batches) == (step_tokens > 1)
    found, solutions = recorded(walk, monkeypatch)
    check_same(found, naive(folder, solutions, asymmetric=asymmetric, true_sequential=True))
    assert {s.lack is not None for s in found[1::2]} == {asymmetric}


def test_without_true_sequential_statistics_come_from_the_layer_as_it_was(folder, monkeypatch):
    found, solutions = recorded(walker(folder, OPTIONS, true_sequential=False), monkeypatch)
    check_same(found, naive(folder, solutions, asymmetric=False, true_sequential=False))
    with pytest.raises(AssertionError):  # guards `check_same`
        check_same(found, naive(folder, solutions, asymmetric=False, true_sequential=True))


# ---- activations ---------------------------------------------------------------------------------


@torch.no_grad()
def fake_quantized(folder: Path, solutions: dict[str, Solution]):
    model = whole_model(folder)
    for name, solution in solutions.items():
        model.get_submodule(name).weight.data = solution.weight().T.contiguous()
    return model


@pytest.mark.parametrize("settings", [
    dict(asymmetric=True),
    dict(asymmetric=False),
    dict(nearest=True),
], ids=["asymmetric", "symmetric", "nearest"])  # fmt: skip
@torch.no_grad()
def test_activations_behind_the_last_layer_are_the_models(llama, settings):
    """Hidden states, targets and probe are what whole models compute."""
    probe = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    walk = walker(llama, replace(OPTIONS, **settings), probe=probe)
    model = fake_quantized(llama, quantize(walk))
    head = walk.model.head()
    wanted = model(probe[None], use_cache=False).logits
    torch.testing.assert_close(head(walk.probe), wanted, rtol=1e-4, atol=1e-4)
    if settings.get("nearest"):
        return
    original = whole_model(llama)
    for ids, hidden in zip(SAMPLES, walk.hidden, strict=True):
        wanted = model(ids[None], use_cache=False).logits
        torch.testing.assert_close(head(hidden), wanted, rtol=1e-4, atol=1e-4)
    if settings["asymmetric"]:
        for ids, target in zip(SAMPLES, walk.target, strict=True):
            wanted = original(ids[None], use_cache=False).logits
            torch.testing.assert_close(head(target), wanted, rtol=1e-4, atol=1e-4)
    else:
        assert walk.target is None


@pytest.mark.parametrize(
    ("asymmetric", "true_sequential"), [(True, True), (False, True), (False, False)]
)
def test_advancing_over_finished_layers_gives_the_same_bits(llama, asymmetric, true_sequential):
    """What --resume relies on: not one bit of the activations may depend on the interruption."""
    options = replace(OPTIONS, asymmetric=asymmetric)
    settings = dict(true_sequential=true_sequential, probe=torch.tensor([5, 6, 7]))
    straight = walker(llama, options, **settings)
    solutions = quantize(straight, layers=2)
    resumed = walker(llama, options, **settings)
    for index in range(2):
        prefix = resumed.model.layer_name(index) + "."
        resumed.advance(
            index,
            {
                name.removeprefix(prefix): solution.weight().T.contiguous()
                for name, solution in solutions.items()
                if name.startswith(prefix)
            },
        )
    assert all(map(torch.equal, straight.hidden, resumed.hidden))
    assert torch.equal(straight.probe, resumed.probe)
    if asymmetric:
        assert all(map(torch.equal, straight.target, resumed.target))
    last = [w.quantize_layer(2, lambda path: None) for w in (straight, resumed)]
    for a, b in zip(*last, strict=True):
        assert torch.equal(a.solution.codes, b.solution.codes)
        assert torch.equal(a.solution.scales, b.solution.scales)


def test_the_probe_counts_nowhere(llama):
    """The probe must not enter a Hessian."""
    alone = quantize(walker(llama, OPTIONS), layers=1)
    beside = quantize(walker(llama, OPTIONS, probe=torch.arange(3, 30)), layers=1)
    for name, solution in alone.items():
        assert torch.equal(solution.codes, beside[name].codes)


# ---- details -------------------------------------------------------------------------------------


def test_skipped_linears_stay_as_they_are(llama):
    skip = ("self_attn.k_proj", "self_attn.v_proj")
    walk = walker(llama, OPTIONS, skip=skip)
    found = quantize(walk)
    assert not any(name.endswith(skip) for name in found)
    assert len(found) == 3 * 5
    model = fake_quantized(llama, found)
    wanted = model(SAMPLES[0][None], use_cache=False).logits
    with torch.no_grad():
        logits = walk.model.head()(walk.hidden[0])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_every_stage_is_reported_once_and_in_order(llama):
    seen: list[str] = []
    for settings in (dict(), dict(true_sequential=False)):
        walker(llama, OPTIONS, **settings).quantize_layer(0, seen.append)
    walker(llama, replace(OPTIONS, nearest=True)).quantize_layer(0, seen.append)
    stages = ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    assert seen == 3 * stages


def test_biases_come_along(tmp_path):
    write_source(tmp_path, SOURCES["qwen2"])
    walk = walker(tmp_path, replace(OPTIONS, nearest=True))
    source = stream(tmp_path)
    for result in walk.quantize_layer(0, lambda path: None):
        bias = f"{result.name}.bias"
        assert (result.bias is not None) == (bias in source.tensors)
        if result.bias is not None:
            assert torch.equal(result.bias, source.tensors[bias].float())


def test_overflowing_activations_name_their_layer(tmp_path):
    """float16 activations that reach Inf must stop the run, not zero the layer."""
    write_source(tmp_path, Source(layers=1))
    model = StreamedModel(tmp_path, torch.float16, torch.device("cpu"))
    walk = Walker(model, SAMPLES, replace(OPTIONS, asymmetric=False))
    layer = model.layer(0)
    layer.post_attention_layernorm.weight.data.fill_(6e3)
    model.layer = lambda index: layer
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj.*overflow.*--dtype"):
        walk.quantize_layer(0, lambda path: None)


@pytest.mark.gpu
@pytest.mark.parametrize("asymmetric", [False, True])
def test_offloaded_activations_give_the_same_bits(llama, asymmetric, tmp_path):
    """Copies beside the computation must neither come late nor be overwritten early."""
    options = replace(OPTIONS, asymmetric=asymmetric)
    found = []
    device = torch.device("cuda")
    stores = (None, Offload(device), DiskOffload(tmp_path / "activations", device))
    for offload in stores:
        model = StreamedModel(llama, torch.float16, device)
        samples = token_samples(count=64, length=60)
        walk = Walker(model, samples, options, step_tokens=100, offload=offload)
        found.append(quantize(walk))
        hidden = [x.cpu() for x in walk.hidden]
        found.append(hidden)
    for other in (2, 4):
        for name, solution in found[0].items():
            assert torch.equal(solution.codes, found[other][name].codes)
        assert all(map(torch.equal, found[1], found[other + 1]))


@pytest.mark.gpu
def test_the_gpu_walk_agrees_with_the_cpu(llama):
    """float16 activations, tensor-core sums and the kernels: nearly the same errors."""
    options = replace(OPTIONS, asymmetric=True)
    gpu = StreamedModel(llama, torch.float16, torch.device("cuda"))
    found = quantize(Walker(gpu, SAMPLES, options, step_tokens=100))
    wanted = quantize(walker(llama, options))
    for name, solution in found.items():
        error = wanted[name].statistics.relative_error
        assert solution.statistics.relative_error == pytest.approx(error, rel=0.05, abs=1e-3), name


def test_target_products_from_the_hessian_are_those_of_the_inputs(tmp_path, monkeypatch):
    """W X̃ is taken from the original's own pass and W X Xᵀ from H; biases cancel."""
    write_source(tmp_path, SOURCES["llama-biases"])
    lacks: list[Tensor] = []

    def spy(weight, h, options, *, lack, **others):
        if lack is not None:
            lacks.append(lack.clone())
        return solve_columns(weight, h, options, lack=lack, **others)

    monkeypatch.setattr("gptq.sequential.solve_columns", spy)
    for exact in (True, False):
        walk = walker(tmp_path, replace(OPTIONS, asymmetric=True))
        assert walk._exact
        walk._exact = exact
        quantize(walk, 1)
    assert len(lacks) == 4  # o and down, twice
    for found, wanted in zip(lacks[:2], lacks[2:], strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4
