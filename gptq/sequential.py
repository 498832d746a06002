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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlin_kernel.errors import NumericalError

from .hessian import Hessian
from .models import Stages, StreamedModel
from .solver import Solution, SolverOptions, solve


@dataclass
class Clock:
    """Seconds spent per kind of work, over the whole run."""

    forward: float = 0.0
    hessian: float = 0.0
    solve: float = 0.0
    io: float = 0.0


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear: its name in the checkpoint, the solution, the seconds it took."""

    name: str
    solution: Solution
    bias: Tensor | None
    seconds: float


class Walker:
    """Activations of all calibration samples, carried from layer to layer.

    model: the streamed source. samples: token ids, int64 [T] each. options.asymmetric: also carry
    the activations of the unquantized model, as targets (needs true_sequential: a correction that
    looks at the inputs must see those that the layer will really get). skip: linears that stay as
    they are, by path inside the layer. probe: token ids that go through the quantized model, with
    all other tensors as they will be stored, and count nowhere.
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
    ) -> None:
        self.model, self.options = model, options
        self.true_sequential = true_sequential
        self.skip = frozenset(skip)
        self.probe = None if probe is None else model.as_stored(model.embed(probe))
        self.asymmetric = options.asymmetric and not options.nearest
        self.clock = Clock()
        self.hidden = [model.embed(ids) for ids in samples]
        self.target = list(self.hidden) if self.asymmetric else None
        self.tokens = sum(int(ids.numel()) for ids in samples)
        model.drop_embedding()

    @property
    def sync(self) -> Callable[[], None]:
        device = self.model.device
        return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)

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
            results = self._staged(layer, prefix, index, on_stage)
        else:
            hessians = self._collect(layer, index)
            results = []
            for stage, h in zip(model.family.stages, hessians, strict=True):
                results += self._solve_stage(layer, prefix, stage, h)
                on_stage(stage[-1])
            self._forward_all(layer, self.hidden, index)
        self._forward_probe(layer, index)
        return results

    def _staged(
        self, layer: nn.Module, prefix: str, index: int, on_stage: Callable[[str], None]
    ) -> list[LinearResult]:
        family = self.model.family
        stages = Stages(layer, family)
        target = self.target
        twin = Stages(copy.deepcopy(layer), family) if self.asymmetric else None
        results: list[LinearResult] = []

        def collect(
            stage: tuple[str, ...],
            inputs: Callable[[int], Tensor],
            targets: Callable[[int], Tensor] | None,
            residual: Callable[[int], Tensor] | None = None,
        ) -> None:
            first = layer.get_submodule(stage[0])
            h = Hessian(first.in_features, self.model.device, asymmetric=self.asymmetric)
            for i in range(len(self.hidden)):
                with self.timed("forward"):
                    x = inputs(i)
                    y = targets(i) if targets is not None else None
                with self.timed("hessian"):
                    h.add(x, y, None if residual is None else residual(i))
            self._check(h, f"{prefix}.{stage[0]}")
            results.extend(self._solve_stage(layer, prefix, stage, h))
            on_stage(stage[-1])

        hidden = self.hidden
        arguments = [self.model.layer_arguments(x.shape[1], index) for x in hidden]

        collect(
            family.stages[0],
            lambda i: stages.attention_input(hidden[i]),
            (lambda i: twin.attention_input(target[i])) if twin else None,
        )

        attended: list[Tensor] = []
        attended_target: list[Tensor] = []

        def attend(i: int) -> Tensor:
            attended.append(stages.attend(stages.attention_input(hidden[i]), arguments[i]))
            return attended[-1]

        def attend_target(i: int) -> Tensor:
            attended_target.append(twin.attend(twin.attention_input(target[i]), arguments[i]))
            return attended_target[-1]

        behind = (lambda i: target[i] - hidden[i]) if self.asymmetric else None
        collect(family.stages[1], attend, attend_target if twin else None, behind)

        def enter_mlp(i: int) -> Tensor:
            hidden[i] = hidden[i] + stages.project(attended[i])
            attended[i] = None  # freed as soon as it is consumed
            return stages.mlp_input(hidden[i])

        def enter_mlp_target(i: int) -> Tensor:
            target[i] = target[i] + twin.project(attended_target[i])
            attended_target[i] = None
            return twin.mlp_input(target[i])

        collect(family.stages[2], enter_mlp, enter_mlp_target if twin else None)

        activated: list[Tensor] = []
        activated_target: list[Tensor] = []

        def activate(i: int) -> Tensor:
            activated.append(stages.activate(stages.mlp_input(hidden[i])))
            return activated[-1]

        def activate_target(i: int) -> Tensor:
            activated_target.append(twin.activate(twin.mlp_input(target[i])))
            return activated_target[-1]

        collect(family.stages[3], activate, activate_target if twin else None, behind)

        with self.timed("forward"):
            for i in range(len(hidden)):
                hidden[i] = hidden[i] + stages.descend(activated[i])
                activated[i] = None
                if twin:
                    target[i] = target[i] + twin.descend(activated_target[i])
                    activated_target[i] = None
        return results

    def _collect(self, layer: nn.Module, index: int) -> list[Hessian]:
        """Statistics of all stages from the layer as it is."""
        family = self.model.family
        stages = Stages(layer, family)
        device = self.model.device
        hessians = [
            Hessian(layer.get_submodule(stage[0]).in_features, device) for stage in family.stages
        ]
        for hidden in self.hidden:
            with self.timed("forward"):
                arguments = self.model.layer_arguments(hidden.shape[1], index)
                inputs = _stage_inputs(stages, hidden, arguments)
            with self.timed("hessian"):
                for h, x in zip(hessians, inputs, strict=True):
                    h.add(x)
        for stage, h in zip(family.stages, hessians, strict=True):
            self._check(h, f"{self.model.layer_name(index)}.{stage[0]}")
        return hessians

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
            if h is None:
                matrix = torch.eye(weight.shape[1], device=weight.device)
                shift, residual, tokens = None, None, 1
            else:
                matrix, shift, residual, tokens = h.matrix(), h.shift, h.residual, h.tokens
            solutions = solve(
                weight,
                matrix,
                self.options,
                name=f"{prefix}.{stage[0]}",
                shift=shift,
                residual=residual,
                tokens=tokens,
                parts=sizes,
            )
            results = []
            for path, linear, solution in zip(stage, linears, solutions, strict=True):
                quantized = solution.weight().T.to(linear.weight.dtype)
                linear.weight = nn.Parameter(quantized.contiguous(), requires_grad=False)
                results.append(
                    LinearResult(
                        f"{prefix}.{path}",
                        solution,
                        linear.bias,
                        (time.perf_counter() - began) * linear.out_features / sum(sizes),
                    )
                )
        return results

    def _read(self, index: int) -> nn.Module:
        with self.timed("io"):
            return self.model.layer(index)

    def _forward_all(self, layer: nn.Module, states: list[Tensor], index: int) -> None:
        stages = Stages(layer, self.model.family)
        with self.timed("forward"):
            for i, x in enumerate(states):
                states[i] = stages.forward(x, self.model.layer_arguments(x.shape[1], index))

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

    def _check(self, h: Hessian, name: str) -> None:
        if not h.finite():
            raise NumericalError(
                f"{name}: its inputs hold NaN or Inf: activations overflow in {self.model.dtype}; "
                "use --dtype bfloat16 or float32"
            )

    def timed(self, kind: str) -> _Timer:
        """Context that adds its seconds to one field of `clock`."""
        return _Timer(self.clock, kind, self.sync)


class _Timer:
    """Adds the seconds of a block to one field of a Clock; waits for the device at both ends."""

    def __init__(self, clock: Clock, kind: str, sync: Callable[[], None]) -> None:
        self.clock, self.kind, self.sync = clock, kind, sync

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.sync()
        spent = time.perf_counter() - self.began
        setattr(self.clock, self.kind, getattr(self.clock, self.kind) + spent)


def _stage_inputs(stages: Stages, hidden: Tensor, arguments: dict) -> tuple[Tensor, ...]:
    first = stages.attention_input(hidden)
    second = stages.attend(first, arguments)
    hidden = hidden + stages.project(second)
    third = stages.mlp_input(hidden)
    return first, second, third, stages.activate(third)


def _set_weight(layer: nn.Module, path: str, weight: Tensor) -> None:
    linear = layer.get_submodule(path)
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
