"""What layer-wise solving leaves: scales learned by gradient descent, per layer or end to end.

The solver fits one linear after the other. `refine_layer` adjusts all scales of a decoder layer
together until its output, given what the quantized model feeds it, is as near as possible to that
of the full-precision model. `refine_model` does so for the logits of the whole model, and may move
the norm weights too. Codes stay, and nothing is stored beyond what the format has anyway.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marlin_kernel.errors import ConfigError
from marlin_kernel.reference import scale_values
from marlin_kernel.weight_types import WeightType

from .grid import decode_points, storable_scales
from .models import Stages, StreamedModel
from .solver import Solution, dequantize

# hidden states of one sample, or of several of the same length: [B, T, hidden] -> [B, T, hidden]
Forward = Callable[[Tensor], Tensor]
_LOGIT_ROWS = 1024  # tokens whose logits are held at once
_BETAS = 0.9, 0.99
_WARMUP = 2  # steps until the full rate


@dataclass(frozen=True)
class RefineOptions:
    """How long and how fast.

    steps: of the optimizer; tokens: of a step, in whole samples; rate: first relative change of a
    value per step, falling linearly to 0; heldout: every how many-th sample judges instead of
    teaching; checks: how often it does; seed: of the order of the samples.
    """

    steps: int
    tokens: int = 4096
    rate: float = 1e-3
    heldout: int = 8
    checks: int = 10
    seed: int = 0


@dataclass(frozen=True)
class StoredLinear:
    """What refinement needs of a `solver.Solution`, in the same form."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    wtype: WeightType
    global_scale: Tensor | None = None

    @staticmethod
    def of(tensors: Mapping[str, Tensor], wtype: WeightType, device: torch.device) -> StoredLinear:
        """From the stored tensors of a finished layer (`storage.FinishedLayers`)."""
        t = {name: tensor.to(device) for name, tensor in tensors.items()}
        common = t.get("global_scale")
        scales = scale_values(t["scales"], wtype, common)
        own = t["zeros"].float(), t["g_idx"].long(), wtype, common
        return StoredLinear(t["codes"], scales, *own)

    def points(self) -> Tensor:
        """As `Solution.points`."""
        return decode_points(self.codes, self.wtype)

    def weight(self, scales: Tensor | None = None) -> Tensor:
        """The dequantized weight, float32 [K, N]; with other scales [G, N] if they are given."""
        scales = self.scales if scales is None else scales
        return dequantize(self.points(), scales, self.zeros, self.g_idx)


@dataclass(frozen=True)
class Refinement:
    """Loss on the held-out samples before and after. best_step: whose state was kept; 0 = none."""

    before: float
    after: float
    best_step: int


def refine_layer(
    forward: Forward,
    linears: Mapping[str, nn.Linear],
    solutions: Mapping[str, Solution],
    sample: Callable[[int], tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    options: RefineOptions,
) -> tuple[dict[str, Solution], Refinement]:
    """Learn the scales of the linears of one decoder layer together.

    forward: the layer that holds `linears`; their weights are overwritten. solutions: by the same
    names. sample: (input of the quantized model, output of the full-precision model), [1, T,
    hidden] each, of calibration sample i; lengths: T of each. Parameters of the layer are float32;
    on a GPU products are bfloat16.
    The loss is ‖output - target‖² / ‖target‖² per token, mean over tokens: relative, because the
    next layer normalizes, and a few tokens with enormous activations would else be all that counts.
    Returns the solutions with the scales of the step that was best on the held-out samples, and
    never worse there than before. Their statistics remain those of the solver.
    """
    device = next(iter(linears.values())).weight.device
    learned = {name: _Scales(linears[name], solutions[name]) for name in linears}

    def loss(indices: Sequence[int], share: float) -> Tensor:
        pairs = [sample(i) for i in indices]
        x = torch.cat([x for x, _ in pairs]).float()
        y = torch.cat([y for _, y in pairs]).float()
        with _half_products(device):
            output = forward(x)
        square = (output.float() - y).square().sum(-1)
        return share * (square / y.square().sum(-1).clamp(min=1e-30)).mean()

    def measure(indices: Sequence[int], backward: bool) -> float:
        total, tokens = 0.0, sum(lengths[i] for i in indices)
        for group in _equal(indices, lengths):
            part = loss(group, sum(lengths[i] for i in group) / tokens)
            if backward:
                part.backward()
            total += float(part.detach())
        return total

    refinement = _descend(measure, list(learned.values()), lengths, options)
    found = {name: replace(solutions[name], scales=learned[name].value()) for name in linears}
    return found, refinement


def refine_model(
    model: StreamedModel,
    layers: Callable[[int], Mapping[str, Solution | StoredLinear]],
    samples: Sequence[Tensor],
    target: Callable[[int], Tensor],
    options: RefineOptions,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Refinement]:
    """Learn all scales and norm weights of the quantized model from the original's logits.

    layers: solutions of layer i, by path inside the layer. samples: token ids, int64 [T] each.
    target: last hidden state of the full-precision model, before the final norm, [1, T, hidden].
    on_step: called after every step. The loss is KL(original || quantized) per token. The whole
    model is held on the device.
    Returns (scales float32 [G, N] by name of the linear, norm weights by tensor name, loss).
    """
    device = model.device
    stages: list[Stages] = []
    learned: dict[str, _Scales | _Norm] = {}
    for index in range(model.num_layers):
        layer, prefix = model.layer(index), model.layer_name(index)
        for path, solution in layers(index).items():
            linear = layer.get_submodule(path)
            if device.type == "cuda":  # what autocast would make of it in every step
                linear.weight.data = linear.weight.data.bfloat16()
            else:
                linear.weight.data = linear.weight.data.float()
            learned[f"{prefix}.{path}"] = _Scales(linear, solution)
        for name, parameter in layer.named_parameters():
            if name.endswith("norm.weight"):
                learned[f"{prefix}.{name}"] = _Norm(parameter, model)
            elif f"{prefix}.{name.removesuffix('.weight')}" not in learned:
                parameter.data = parameter.data.float()
        stages.append(Stages(layer, model.family))
    original_norm, norm = model.final_norm(), model.final_norm().float()
    learned[model.final_norm_name] = _Norm(norm.weight, model)
    lengths = [ids.numel() for ids in samples]
    head = model.head_weight().to(torch.bfloat16 if device.type == "cuda" else torch.float32)

    def final_hidden(ids: Tensor) -> Tensor:
        x = model.embed(ids).float()
        for index, stage in enumerate(stages):
            arguments = as_float(model.layer_arguments(x.shape[1], index))
            x = checkpoint(
                stage.forward, x, arguments, use_reentrant=False, preserve_rng_state=False
            )
        return norm(x).flatten(0, 1)

    def measure(indices: Sequence[int], backward: bool) -> float:
        total, tokens = 0.0, sum(lengths[i] for i in indices)
        for group in _equal(indices, lengths):
            with _half_products(device):
                hidden = final_hidden(torch.stack([samples[i] for i in group]))
            leaf = hidden.detach().requires_grad_(backward)
            with torch.no_grad():
                wanted = original_norm(torch.cat([target(i) for i in group])).flatten(0, 1)
            for start in range(0, hidden.shape[0], _LOGIT_ROWS):
                rows = slice(start, start + _LOGIT_ROWS)
                with torch.no_grad():
                    p = torch.log_softmax((wanted[rows].to(head.dtype) @ head.T).float(), -1)
                q = torch.log_softmax((leaf[rows].to(head.dtype) @ head.T).float(), -1)
                part = (p.exp() * (p - q)).sum() / tokens
                if backward:
                    part.backward()
                total += float(part.detach())
            if backward:
                hidden.backward(leaf.grad)
        return total

    refinement = _descend(measure, list(learned.values()), lengths, options, on_step)
    model.drop_embedding()
    values = {name: part.value() for name, part in learned.items()}
    scales = {n: v for n, v in values.items() if isinstance(learned[n], _Scales)}
    norms = {n: v for n, v in values.items() if isinstance(learned[n], _Norm)}
    return scales, norms, refinement


def check_samples(count: int) -> None:
    """Raise ConfigError if `count` calibration samples cannot both teach and judge."""
    if count < 2:
        raise ConfigError(
            f"refinement needs at least 2 calibration samples, one of them to judge; there is "
            f"{count}: raise --nsamples, or leave out --refine and --refine-norms"
        )


class _Learned:
    """A tensor that learns as a factor near 1 on its first value, by Adam (arXiv 1412.6980)."""

    def __init__(self, parameter: nn.Parameter, first: Tensor) -> None:
        self.parameter, self.first = parameter, first
        self.factor = torch.ones_like(first)
        self._best = self.factor.clone()
        self._mean, self._square = torch.zeros_like(first), torch.zeros_like(first)

    def value(self) -> Tensor:
        """The tensor as it will be stored."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        """Of the loss with respect to `factor`; rounding counts as the identity."""
        raise NotImplementedError

    def write(self) -> None:
        """Let the module compute with `value`."""
        raise NotImplementedError

    def move(self, rate: float, step: int) -> None:
        gradient = self.gradient()
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient.square(), 1 - _BETAS[1])
        mean = self._mean / (1 - _BETAS[0] ** step)
        square = self._square / (1 - _BETAS[1] ** step)
        self.factor.sub_(rate * mean / square.sqrt_().add_(1e-30))

    def keep(self) -> None:
        self._best.copy_(self.factor)

    def restore(self) -> None:
        self.factor.copy_(self._best)


class _Scales(_Learned):
    """Scales [G, N] of a quantized linear. Their gradient is summed from that of the weight."""

    def __init__(self, linear: nn.Linear, solution: Solution | StoredLinear) -> None:
        super().__init__(linear.weight, solution.scales)
        self._solution, self._points = solution, solution.points()
        groups = solution.g_idx
        self._size = int((groups == 0).sum())  # only the last group may be smaller
        moved = bool((groups[1:] < groups[:-1]).any())
        self._order = torch.argsort(groups, stable=True) if moved else None

    def value(self) -> Tensor:
        s = self._solution
        return storable_scales(self.first * self.factor, s.wtype, s.global_scale)

    def write(self) -> None:
        s = self._solution
        self.parameter.data.copy_(dequantize(self._points, self.value(), s.zeros, s.g_idx).T)

    def gradient(self) -> Tensor:
        s = self._solution
        product = self.parameter.grad.T.float() * (self._points - s.zeros[s.g_idx])
        if self._order is not None:  # moved groups: bring the rows of each together
            product = product[self._order]
        k, n = product.shape
        product = nn.functional.pad(product, (0, 0, 0, -k % self._size))
        return product.reshape(-1, self._size, n).sum(1) * self.first


class _Norm(_Learned):
    """Weights of a norm, in the precision in which they will be stored."""

    def __init__(self, parameter: nn.Parameter, model: StreamedModel) -> None:
        super().__init__(parameter, parameter.data.float())
        self._as_stored = model.as_stored

    def value(self) -> Tensor:
        return self._as_stored(self.first * self.factor)

    def write(self) -> None:
        self.parameter.data = self.value()

    def gradient(self) -> Tensor:
        return self.parameter.grad * self.first


def _descend(
    measure: Callable[[Sequence[int], bool], float],
    learned: Sequence[_Learned],
    lengths: Sequence[int],
    options: RefineOptions,
    on_step: Callable[[], None] = lambda: None,
) -> Refinement:
    """Adam on `learned`; keeps the state that was best on held-out samples, or the first one.

    measure: mean loss over samples, and whether to add its gradient to the parameters' own.
    """
    count = len(lengths)
    check_samples(count)
    held = list(range(0, count, options.heldout))
    batches = _batches([i for i in range(count) if i % options.heldout], lengths, options)
    every = max(options.steps // options.checks, 1)
    for part in learned:
        part.write()
    with torch.no_grad():
        before = best = measure(held, False)
    best_step = 0
    for part in learned:
        part.parameter.requires_grad_(True)
    for step in range(1, options.steps + 1):
        for part in learned:
            part.parameter.grad = None
        with torch.enable_grad():
            measure(next(batches), True)
        rate = options.rate * min(step / _WARMUP, 1) * (1 - (step - 1) / options.steps)
        with torch.no_grad():
            for part in learned:
                part.move(rate, step)
                part.write()
            if step % every == 0 or step == options.steps:
                now = measure(held, False)
                if now < best:
                    best, best_step = now, step
                    for part in learned:
                        part.keep()
        on_step()
    for part in learned:
        part.parameter.grad = None
        part.parameter.requires_grad_(False)
        part.restore()
        part.write()
    return Refinement(before, best, best_step)


def _batches(
    indices: Sequence[int], lengths: Sequence[int], options: RefineOptions
) -> Iterator[list[int]]:
    """Endless steps of about `options.tokens` tokens; every sample comes before any comes again."""
    draw = random.Random(options.seed)
    queue: list[int] = []
    while True:
        batch: list[int] = []
        while sum(lengths[i] for i in batch) < options.tokens:
            queue = queue or draw.sample(list(indices), len(indices))
            if queue[-1] in batch:  # all samples together have fewer tokens
                break
            batch.append(queue.pop())
        yield batch


def _equal(indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Samples of equal length together: they pass a layer as one tensor."""
    groups: dict[int, list[int]] = {}
    for i in indices:
        groups.setdefault(lengths[i], []).append(i)
    return list(groups.values())


def as_float(arguments: Mapping) -> dict:
    """Keyword arguments of a layer with all floating-point tensors in float32."""

    def convert(value):
        if isinstance(value, Tensor):
            return value.float() if value.is_floating_point() else value
        return tuple(map(convert, value)) if isinstance(value, tuple) else value

    return {name: convert(value) for name, value in arguments.items()}


def _half_products(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
