"""Walk the decoder layer by layer: collect statistics, solve, and carry the activations on.

Every sample passes every linear once: a layer is run stage by stage (q/k/v, attention, o, gate/up,
down), and each stage is quantized before the samples go on, so that later stages see the quantized
earlier ones ("true sequential"). Without `true_sequential` all statistics of a layer come from its
unquantized weights, in a pass of their own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from marlin_kernel.errors import NumericalError

from .activations import Activations, Store
from .calibration import make_batches
from .distributed import Workers
from .grid import find_global_scale
from .hessian import Hessian
from .models import Stages, StreamedModel
from .refine import Refinement, RefineOptions, as_float, refine_layer
from .solver import Columns, Solution, SolverOptions, solve_columns

STEP_TOKENS = 8192  # that pass a layer together on a GPU: enough to fill its matrix units


@dataclass
class Clock:
    """Seconds spent per kind of work, over the whole run; on a GPU, of the device's stream.

    parts: of which, by name ("solve.factor"); pending: pairs of events on a GPU that `settle` turns
    into seconds.
    """

    forward: float = 0.0
    hessian: float = 0.0
    solve: float = 0.0
    refine: float = 0.0
    io: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, kind: str, seconds: float) -> None:
        if "." in kind:
            self.parts[kind] = self.parts.get(kind, 0.0) + seconds
        else:
            setattr(self, kind, getattr(self, kind) + seconds)

    def seconds(self) -> dict[str, float]:
        """All of it, by name."""
        kinds = ("forward", "hessian", "solve", "refine")
        return {kind: getattr(self, kind) for kind in kinds} | {
            "io_waited_for": self.io,
            **self.parts,
        }

    def settle(self) -> None:
        """Wait for the device and count what it has done."""
        if self.pending:
            self.pending[-1][2].synchronize()
        for kind, began, ended in self.pending:
            self.add(kind, began.elapsed_time(ended) / 1e3)
        self.pending.clear()


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear: its name in the checkpoint, the solution, the seconds it took.

    refinement: of the whole decoder layer, after the statistics of the solution were taken.
    """

    name: str
    solution: Solution
    bias: Tensor | None
    seconds: float
    refinement: Refinement | None = None


class Walker:
    """Activations of all calibration samples, carried from layer to layer.

    model: the streamed source. samples: token ids, int64 [T] each; with several workers, those of
    this one. options.asymmetric: also carry the activations of the unquantized model, as targets
    (needs true_sequential: a correction that looks at the inputs must see those that the layer will
    really get). skip: linears that stay as they are, by path inside the layer. probe: token ids
    that go through the quantized model, with all other tensors as they will be stored, and count
    nowhere. step_tokens: tokens that pass a layer together. offload: where activations lie between
    two uses, by default on the device. refine: learn the scales of each layer together (needs
    asymmetric, and one worker).
    """

    def __init__(
        self,
        model: StreamedModel,
        samples: Sequence[Tensor],
        options: SolverOptions,
        *,
        true_sequential: bool = True,
        skip: Collection[str] = (),
        probe: Tensor | None = None,
        step_tokens: int = 1,
        offload: Store | None = None,
        workers: Workers | None = None,
        refine: RefineOptions | None = None,
    ) -> None:
        self.model, self.options = model, options
        self.true_sequential = true_sequential
        self.skip = frozenset(skip)
        self.workers = workers or Workers()
        self.refine = refine
        self.probe = None if probe is None else model.as_stored(model.embed(probe))
        self.asymmetric = options.asymmetric and not options.nearest
        # Sums exact enough to be told apart: those of half precision on tensor cores are cut.
        self._exact = model.dtype == torch.float32
        self.clock = Clock()
        self.workers.timed = self.timed
        self.batches = make_batches(samples, step_tokens)
        self.places = [  # batch, row and length of each sample, in the order they are carried
            (i, row, length)
            for i, batch in enumerate(self.batches)
            for row, length in enumerate(batch.lengths)
        ]
        self._valid = [
            None if batch.valid is None else batch.valid.to(model.device) for batch in self.batches
        ]
        self.hidden = Activations(len(self.batches), offload)
        for i, batch in enumerate(self.batches):
            self.hidden[i] = model.embed(batch.ids)
        self.target = self.hidden.copy() if self.asymmetric else None
        self.tokens = sum(batch.tokens for batch in self.batches)
        model.drop_embedding()

    # --- one layer -----------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self, index: int, weights: dict[str, Tensor]) -> None:
        """Pass layer `index` with given (already quantized) weights: what resuming does."""
        layer = self._read(index)
        if self.asymmetric:
            self._forward_all(layer, self.target, index)
        for path, weight in weights.items():
            _set_weight(layer, path, weight)
        if not self.options.nearest:
            self._forward_all(layer, self.hidden, index)
        self._forward_probe(layer, index)
        self.clock.settle()

    @torch.no_grad()
    def quantize_layer(self, index: int, on_stage: Callable[[str], None]) -> list[LinearResult]:
        """Quantize all linears of layer `index` and move the activations behind it."""
        model = self.model
        layer = self._read(index)
        prefix = model.layer_name(index)
        if self.options.nearest:
            results = []
            for stage in model.family.stages:
                results += self._solve_stage(layer, prefix, stage, None)
                on_stage(stage[-1])
        elif self.true_sequential:
            inputs = self.hidden.copy() if self.refine else None
            results = self._staged(layer, prefix, index, on_stage)
            if inputs is not None:
                results = self._refine(layer, prefix, index, inputs, results)
        else:
            hessians = self._collect(layer, index)
            results = []
            for stage in model.family.stages:
                results += self._solve_stage(layer, prefix, stage, hessians.pop(0))
                on_stage(stage[-1])
            self._forward_all(layer, self.hidden, index)
        self._forward_probe(layer, index)
        self.clock.settle()
        return results

    def _staged(
        self, layer: nn.Module, prefix: str, index: int, on_stage: Callable[[str], None]
    ) -> list[LinearResult]:
        family = self.model.family
        main = _Stream(Stages(layer, family), self.hidden, self._arguments(index))
        twin = None
        if self.asymmetric:
            original = Stages(copy.deepcopy(layer), family)
            twin = _Stream(original, self.target, self._arguments(index))
        results: list[LinearResult] = []
        for number, stage in enumerate(family.stages):
            weight = layer.get_submodule(stage[0]).weight
            h = Hessian(weight.shape[1], self.model.device)
            for i in range(len(self.batches)):
                with self.timed("forward"):
                    x = main.enter(number, i)
                    y = twin.enter(number, i) if twin is not None else None
                    behind = None
                    if twin is not None and family.adds_to_residual(number) and self._exact:
                        behind = twin.pass_early(number, i)
                with self.timed("hessian"):
                    if behind is not None:
                        bias = layer.get_submodule(stage[0]).bias
                        self._add_behind(h, i, x, behind, bias)
                        continue
                    self._add(h, i, x, y, weight if family.adds_to_residual(number) else None)
            self._complete(h, f"{prefix}.{stage[0]}")
            if h.lack is not None and self._exact:
                with self.timed("hessian"):
                    h.lack.addmm_(weight.float(), h.matrix(), alpha=-1)
            del x, y, behind
            results += self._solve_stage(layer, prefix, stage, h)
            del h
            on_stage(stage[-1])
        with self.timed("forward"):
            for i in range(len(self.batches)):
                main.leave(i)
                if twin is not None:
                    twin.leave(i)
        return results

    def _refine(
        self,
        layer: nn.Module,
        prefix: str,
        index: int,
        inputs: Activations,
        results: list[LinearResult],
    ) -> list[LinearResult]:
        """Learn the scales of the layer's linears together; `inputs` pass it once more."""
        solutions = {result.name.removeprefix(f"{prefix}."): result.solution for result in results}
        stages, arguments = Stages(layer, self.model.family), self.model.layer_arguments
        with self.timed("refine"):
            layer.float()
            found, refinement = refine_layer(
                lambda x: stages.forward(x, as_float(arguments(x.shape[1], index))),
                {path: layer.get_submodule(path) for path in solutions},
                solutions,
                lambda i: (self.sample(inputs, i), self.sample(self.target, i)),
                [place[2] for place in self.places],
                self.refine,
            )
            layer.to(self.model.dtype)
        for path, solution in found.items():
            _set_weight(layer, path, solution.weight().T.contiguous())
        for i in range(len(inputs)):
            self.hidden[i] = inputs[i]
        self._forward_all(layer, self.hidden, index)
        return [
            replace(result, solution=solution, refinement=refinement)
            for result, solution in zip(results, found.values(), strict=True)
        ]

    def sample(self, states: Activations, i: int) -> Tensor:
        """States [1, T, hidden] of sample i."""
        batch, row, length = self.places[i]
        return states[batch][row : row + 1, :length]

    def _add(
        self, h: Hessian, i: int, x: Tensor, target: Tensor | None, weight: Tensor | None
    ) -> None:
        """Add batch i to the statistics. weight: of a layer that adds to the residual stream."""
        if target is None:
            h.add(self._real(x, i))
            return
        delta = target - x
        if weight is None:
            h.add(self._real(x, i), self._real(delta, i))
        else:  # what its outputs lack: D = R̃ - R + W (X̃ - X); N products instead of K
            lack = self.target[i] - self.hidden[i] + nn.functional.linear(delta, weight)
            h.add(self._real(x, i), lack=self._real(lack, i))

    def _add_behind(
        self, h: Hessian, i: int, x: Tensor, behind: Tensor, bias: Tensor | None
    ) -> None:
        """As `_add` with `weight`, but leaves W X to the end, when W X Xᵀ is W H.

        behind: R̃ + W X̃ + bias, which the original model needs anyway.
        """
        lack = behind - self.hidden[i]
        if bias is not None:
            lack -= bias
        h.add(self._real(x, i), lack=self._real(lack, i))

    def _real(self, x: Tensor, i: int) -> Tensor:
        """Rows [tokens, ...] of batch i that are no padding."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self._valid[i] is None else flat[self._valid[i]]

    def _collect(self, layer: nn.Module, index: int) -> list[Hessian]:
        """Statistics of all stages from the layer as it is."""
        family = self.model.family
        stages = Stages(layer, family)
        device = self.model.device
        hessians = [
            Hessian(layer.get_submodule(stage[0]).in_features, device) for stage in family.stages
        ]
        arguments = self._arguments(index)
        for i in range(len(self.batches)):
            with self.timed("forward"):
                inputs = _stage_inputs(stages, self.hidden[i], arguments(i))
            with self.timed("hessian"):
                for h, x in zip(hessians, inputs, strict=True):
                    h.add(self._real(x, i))
        for stage, h in zip(family.stages, hessians, strict=True):
            self._complete(h, f"{self.model.layer_name(index)}.{stage[0]}")
        return hessians

    def _complete(self, h: Hessian, name: str) -> None:
        """Sum over all workers; raise NumericalError if an input was not finite."""
        with self.timed("hessian"):
            for part in h.sums():
                self.workers.sum(part)
            tokens = torch.tensor([h.tokens], device=self.model.device)
            self.workers.sum(tokens)
            h.tokens = int(tokens)
        if not h.finite():
            raise NumericalError(
                f"{name}: its inputs hold NaN or Inf: activations overflow in {self.model.dtype}; "
                "use --dtype bfloat16 or float32"
            )

    def _solve_stage(
        self, layer: nn.Module, prefix: str, stage: tuple[str, ...], h: Hessian | None
    ) -> list[LinearResult]:
        """Solve the linears of one stage together (they share the Hessian) and put Q in place."""
        stage = tuple(path for path in stage if path not in self.skip)
        linears = [layer.get_submodule(path) for path in stage]
        sizes = [linear.out_features for linear in linears]
        with self.timed("solve"):
            began = time.perf_counter()
            weight = torch.cat([linear.weight for linear in linears])
            columns = self._solve(weight, h, f"{prefix}.{stage[0]}")
            solutions = columns.split(sizes, 1 if h is None else h.tokens)
            for linear, solution in zip(linears, solutions, strict=True):
                quantized = solution.weight().T.to(linear.weight.dtype)
                linear.weight = nn.Parameter(quantized.contiguous(), requires_grad=False)
        self.clock.settle()
        seconds = time.perf_counter() - began
        return [
            LinearResult(
                f"{prefix}.{path}",
                solution,
                linear.bias,
                seconds * linear.out_features / sum(sizes),
            )
            for path, linear, solution in zip(stage, linears, solutions, strict=True)
        ]

    def _solve(self, weight: Tensor, h: Hessian | None, name: str) -> Columns:
        """Quantize the outputs of `weight` [N, K], every worker a share of them."""
        if h is None:
            h = Hessian(weight.shape[1], weight.device)
            h.matrix().fill_diagonal_(1.0)
        shares = self.workers.share(weight.shape[0])
        first = sum(shares[: self.workers.rank])
        own = slice(first, first + shares[self.workers.rank])
        common = None
        if self.options.wtype is not None:  # of the whole stage, whoever solves its outputs
            common = find_global_scale(weight, self.options.wtype)
        part = solve_columns(
            weight[own],
            h.matrix(),
            self.options,
            name=name,
            shift=h.shift,
            lack=None if h.lack is None else h.lack[own],
            global_scale=common,
            workers=self.workers,
            timed=self.timed,
        )
        if self.workers.count == 1:
            return part
        gathered = {
            key: self.workers.gather(getattr(part, key), shares)
            for key in ("codes", "scales", "zeros", "measures")
        }
        return replace(part, **gathered)

    def _read(self, index: int) -> nn.Module:
        with self.timed("io"), self.timed("io.read"):
            layer = self.model.layer(index)
            self.model.read_ahead(index + 1)
            return layer

    def _arguments(self, index: int) -> Callable[[int], dict]:
        """Keyword arguments of layer `index` for each batch."""
        return lambda i: self.model.layer_arguments(self.batches[i].ids.shape[1], index)

    def _forward_all(self, layer: nn.Module, states: Activations, index: int) -> None:
        stages, arguments = Stages(layer, self.model.family), self._arguments(index)
        with self.timed("forward"):
            for i in range(len(states)):
                states[i] = stages.forward(states[i], arguments(i))

    @torch.no_grad()
    def restart_probe(self, probe: Tensor) -> None:
        self.probe = self.model.as_stored(self.model.embed(probe))
        self.model.drop_embedding()

    @torch.no_grad()
    def pass_probe(self, index: int, weights: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        """The probe alone passes layer `index` with given weights, by path, and norms, by name."""
        layer = self._read(index)
        for path, weight in weights.items():
            _set_weight(layer, path, weight)
        for name, norm in norms.items():
            layer.get_parameter(name).data = norm.to(self.model.dtype)
        self._forward_probe(layer, index)

    def _forward_probe(self, layer: nn.Module, index: int) -> None:
        """Last thing done with a layer: it rounds what is not quantized, as storing will."""
        if self.probe is not None:
            linears = self.model.family.linears
            quantized = {f"{path}.weight" for path in linears if path not in self.skip}
            for name, parameter in layer.named_parameters():
                if name not in quantized:
                    parameter.data = self.model.as_stored(parameter.data)
            arguments = self.model.layer_arguments(self.probe.shape[1], index)
            self.probe = Stages(layer, self.model.family).forward(self.probe, arguments)

    def timed(self, kind: str) -> _Timer:
        """Context that adds its seconds to one field, or to one of the parts, of `clock`."""
        return _Timer(self.clock, kind, self.model.device)


class _Stream:
    """The activations of one model, quantized or original, on their way through one layer.

    Between two stages each batch is kept as the input of the next linears, so that norms and
    attention are computed once.
    """

    def __init__(
        self, stages: Stages, hidden: Activations, arguments: Callable[[int], dict]
    ) -> None:
        self._stages, self._hidden, self._arguments = stages, hidden, arguments
        self._inputs = hidden.like()
        self._passed: set[int] = set()  # batches that are already behind the linear of their stage

    def enter(self, stage: int, i: int) -> Tensor:
        """Move batch i to the inputs of stage 0, 1, 2 or 3 (of one further than it was)."""
        stages, hidden = self._stages, self._hidden
        if stage == 0:
            x = stages.attention_input(hidden[i])
        elif stage == 1:
            x = stages.attend(self._inputs.take(i), self._arguments(i))
        elif stage == 2:
            x = stages.mlp_input(self.pass_linear(1, i))
        else:
            x = stages.activate(self._inputs.take(i))
        self._inputs[i] = x
        return x

    def pass_linear(self, stage: int, i: int) -> Tensor:
        """Residual stream of batch i behind the linear of stage 1 or 3, which it passes once."""
        if i in self._passed:
            self._passed.remove(i)
            return self._hidden[i]
        linear = self._stages.project if stage == 1 else self._stages.descend
        self._hidden[i] = behind = self._hidden[i] + linear(self._inputs.take(i))
        return behind

    def pass_early(self, stage: int, i: int) -> Tensor:
        """`pass_linear`, before `enter` or `leave` asks for it."""
        behind = self.pass_linear(stage, i)
        self._passed.add(i)
        return behind

    def leave(self, i: int) -> None:
        """Move batch i from the inputs of the last stage behind the layer."""
        self.pass_linear(3, i)


class _Timer:
    """Adds the seconds of a block to a Clock: the host's for I/O and on the CPU, else
    those of the device's stream, measured without waiting for it."""

    def __init__(self, clock: Clock, kind: str, device: torch.device) -> None:
        self.clock, self.kind = clock, kind
        self.stream = None
        if device.type == "cuda" and not kind.startswith("io"):
            self.stream = torch.cuda.current_stream(device)

    def __enter__(self) -> None:
        if self.stream is None:
            self.began = time.perf_counter()
        else:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(self.stream)

    def __exit__(self, *_) -> None:
        if self.stream is None:
            self.clock.add(self.kind, time.perf_counter() - self.began)
        else:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record(self.stream)
            self.clock.pending.append((self.kind, self.event, ended))


def _stage_inputs(stages: Stages, hidden: Tensor, arguments: dict) -> tuple[Tensor, ...]:
    first = stages.attention_input(hidden)
    second = stages.attend(first, arguments)
    hidden = hidden + stages.project(second)
    third = stages.mlp_input(hidden)
    return first, second, third, stages.activate(third)


def _set_weight(layer: nn.Module, path: str, weight: Tensor) -> None:
    linear = layer.get_submodule(path)
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
