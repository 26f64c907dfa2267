"""Reuse of sublayer outputs across the steps of one trajectory, live on a model.

    handle = apply_cache(model, plan.sublayers, plan.compute)
    for step, t in enumerate(timesteps):
        handle.step = step
        ... model(x, t) ...
    remove_cache(model)

Shipped inside packages. What is kept is the raw output of the sublayer's module, before a DiT block's gate, which uses the
current timestep (Learning-to-Cache, arXiv 2406.01733, as its code does). A skipped sublayer returns a weighted sum of its last
outputs: the last one as it is, a first-order forecast in time, or weights that were learned for the plan. All blocks together,
the `trunk`, may be cached as one: its output is what the last block leaves less what the first one was given, so one tensor is
kept, and a step that skips it runs nothing but what lies before and after the blocks. Classifier-free guidance with both halves
in one batch needs nothing special: a row sees what was kept of that row alone.

`step` counts evaluations of the network. Our solvers evaluate it once a step, so a plan has one row for each timestep.
Learning-to-Cache moves its plan by one evaluation for DPM-Solver-2, a singlestep solver of two evaluations a step: the second
one is the midpoint's derivative, which the first pair must not take from a cache. DPM-Solver++(2M) gets its second order from
the x0 of the step before, so no evaluation is of another kind and nothing is moved.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

ATTRIBUTE = "_sublayer_cache"
TRUNK = "trunk"  # in the place of a sublayer's path: all blocks as one
FORECASTS = {"none": 1, "taylor": 2, "learned": 3}  # what a skipped output is made of: how many computed ones, the last

Weights = Sequence[Sequence[Sequence[float]]]  # [step][sublayer] -> weights of its sources, last first; () where it is computed


def sources(compute: Sequence[bool], forecast: str) -> list[tuple[int, ...]]:
    """For every step of one sublayer the computed steps, last first, that a skipped output is made of; () where it is computed
    itself. The first reuses of a trajectory may have fewer of them."""
    found: list[tuple[int, ...]] = []
    computed: list[int] = []
    for step, computes in enumerate(compute):
        if computes:
            computed.insert(0, step)
        found.append(() if computes else tuple(computed[: FORECASTS[forecast]]))
    return found


def forecast_weights(t: float, times: Sequence[float]) -> tuple[float, ...]:
    """Weights at timestep t of the outputs at t1 or t1, t0, last computed first: 1, or TaylorSeer's first order (arXiv
    2503.06923), y1 + (t - t1) (y1 - y0) / (t1 - t0), in timesteps instead of steps: gaps may be uneven."""
    if len(times) == 1:
        return (1.0,)
    t1, t0 = times
    slope = (t - t1) / (t1 - t0)
    return 1 + slope, -slope


def weights_of(compute: Sequence[Sequence[bool]], forecast: str, timesteps: Sequence[float]) -> Weights:
    """Of a plan whose weights are a formula, forecast none or taylor."""
    columns = [sources(column, forecast) for column in zip(*compute, strict=True)]
    return [[forecast_weights(t, [timesteps[source] for source in column[step]]) if column[step] else () for column in columns]
            for step, t in enumerate(timesteps)]


def combined(weights: Sequence[float], outputs: Sequence[Tensor]) -> Tensor:
    """Weighted sum; a single output of weight 1 is returned as it is. Weights may be a tensor that is being trained."""
    if len(outputs) == 1 and not isinstance(weights, Tensor) and weights[0] == 1:
        return outputs[0]
    total = weights[0] * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output
    return total


class CachedUnit:
    """What is kept of one sublayer, or of the trunk, and what a step that skips it gets instead."""

    def __init__(self, name: str, found: list[tuple[int, ...]], weights: list[Sequence[float]], handle: "CacheHandle"):
        """found: `sources` of every step. weights: of these."""
        self.name, self.handle = name, handle
        self.sources, self.weights = found, weights
        self.needed = [{source for later in found[step:] for source in later} for step in range(len(found))]
        self.kept: dict[int, tuple[tuple, Tensor]] = {}  # step -> kind of its input, output

    @property
    def skipped(self) -> bool:
        return bool(self.sources[self.handle.step])

    def weigh(self, step: int, outputs: Sequence[Tensor]) -> Sequence[float]:
        """Weights of the outputs that a skipped step is made of."""
        return self.weights[step]

    def keep(self, x: Tensor, output: Tensor) -> Tensor:
        """The output that this step has computed from x, as it came."""
        self.kept[self.handle.step] = kind_of(x), output
        self.forget()
        return output

    def reuse(self, x: Tensor) -> Tensor:
        """The output that this step, which skips, has for x."""
        step = self.handle.step
        for source in self.sources[step]:
            if source not in self.kept:
                raise ValueError(f"{self.name}: step {step} reuses the output of step {source}, but none is kept; a trajectory "
                                 "starts at step 0")
            kind = self.kept[source][0]
            if kind != kind_of(x):
                raise ValueError(f"{self.name}: step {step} got {describe(kind_of(x))}, but would reuse the output for "
                                 f"{describe(kind)}; start the new trajectory at step 0")
        outputs = [self.kept[source][1] for source in self.sources[step]]
        output = combined(self.weigh(step, outputs), outputs)
        self.forget()
        return output

    def forget(self) -> None:
        """What neither this step nor a later one needs."""
        needed = self.needed[self.handle.step]
        self.kept = {source: kept for source, kept in self.kept.items() if source in needed}


class CachedSublayer:
    """Stands in for a sublayer's `forward`. An object, so that a deep copy of the model has its own."""

    def __init__(self, unit: CachedUnit, module: nn.Module):
        self.unit, self.computed = unit, module.forward

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.unit.reuse(x) if self.unit.skipped else self.unit.keep(x, self.computed(x, *args, **kwargs))


class CachedBlock:
    """Stands in for the `forward` of one of the trunk's blocks. A skipped trunk is added by its first block; the others pass
    on what they get."""

    def __init__(self, unit: CachedUnit, block: nn.Module, entered: list[Tensor], first: bool, last: bool):
        """entered: shared by all blocks, what the first one was given in this evaluation."""
        self.unit, self.computed, self.entered, self.first, self.last = unit, block.forward, entered, first, last
        self.connects = hasattr(block, "downsamplers")  # on a UNet's way down: it returns its skip connections, too

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, tuple]:
        x = hidden_states
        if self.unit.skipped:
            output = x + self.unit.reuse(x) if self.first else x
            return (output, ()) if self.connects else output
        if self.first:
            self.entered[:] = [x]
        output = self.computed(x, *args, **kwargs)
        if self.last:
            entered = self.entered.pop()
            self.unit.keep(entered, output - entered)
        return output


class CacheHandle:
    """The position in the trajectory, shared by all sublayers of one model. step 0 forgets everything kept."""

    def __init__(self, steps: int):
        self.steps = steps
        self.units: dict[str, CachedUnit] = {}
        self.patched: list[tuple[nn.Module, Callable | None]] = []  # and another wrapper's forward, to be put back on removal
        self._step = 0

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise ValueError(f"cache: step {step} is not between 0 and {self.steps - 1}, the last step of the plan")
        if step == 0:
            self.reset()
        self._step = step

    def reset(self) -> None:
        """Back to step 0 with nothing kept: the start of a new trajectory."""
        self._step = 0
        for unit in self.units.values():
            unit.kept = {}

    def patch(self, module: nn.Module, forward: Callable) -> None:
        self.patched.append((module, vars(module).get("forward")))
        module.forward = forward


def apply_cache(model: nn.Module, sublayers: Sequence[str], compute: Sequence[Sequence[bool]], forecast: str = "none",
                timesteps: Sequence[int] | None = None, weights: Weights | None = None) -> CacheHandle:
    """Make a cache plan live: where compute[step][sublayer] is False, that module is skipped, its last outputs answer.

    sublayers: module paths in `model`, as `Denoiser.sublayers()` names them, or `trunk` alone. forecast: none | taylor, which
    needs the timestep of every step | learned, which needs weights. Replaces a plan applied before. Sublayers that every step
    computes are left untouched. Raises ValueError for an unknown path or a plan of the wrong shape.
    """
    check_plan(model, sublayers, compute)
    check_forecast(compute, forecast, timesteps, weights)
    remove_cache(model)
    handle = CacheHandle(len(compute))
    table = weights or weights_of(compute, forecast, range(len(compute)) if timesteps is None else timesteps)
    for i, (name, column) in enumerate(zip(sublayers, zip(*compute, strict=True), strict=True)):
        if not all(column):
            unit = handle.units[name] = CachedUnit(name, sources(column, forecast), [row[i] for row in table], handle)
            if name == TRUNK:
                cache_trunk(model, unit)
            else:
                module = model.get_submodule(name)
                handle.patch(module, CachedSublayer(unit, module))
    setattr(model, ATTRIBUTE, handle)
    return handle


def cache_trunk(model: nn.Module, unit: CachedUnit) -> None:
    blocks, entered = trunk(model), []
    for i, block in enumerate(blocks):
        unit.handle.patch(block, CachedBlock(unit, block, entered, first=i == 0, last=i == len(blocks) - 1))


def trunk(model: nn.Module) -> list[nn.Module]:
    """The blocks of a DiT or a UNet, in the order of computation. Raises ValueError where more than one tensor passes from
    block to block."""
    if hasattr(model, "transformer_blocks"):
        return list(model.transformer_blocks)
    blocks = unet_blocks(model)
    if not has_trunk(model):
        skip = next(type(block).__name__ for block in blocks if hasattr(block, "skip_conv"))
        raise ValueError(f"cache plan: {skip} hands on an image beside its output, so the blocks are no {TRUNK}; plan for "
                         "sublayers")
    return blocks


def has_trunk(model: nn.Module) -> bool:
    """Whether a single tensor passes from block to block."""
    return hasattr(model, "transformer_blocks") or not any(hasattr(block, "skip_conv") for block in unet_blocks(model))


def unet_blocks(model: nn.Module) -> list[nn.Module]:
    middle = [] if model.mid_block is None else [model.mid_block]
    return [*model.down_blocks, *middle, *model.up_blocks]


def remove_cache(model: nn.Module) -> None:
    """Undo `apply_cache` and leave no trace; nothing happens if no plan is applied."""
    handle = vars(model).pop(ATTRIBUTE, None)
    if handle is None:
        return
    for module, shadowed in handle.patched:
        del module.forward
        if shadowed is not None:
            module.forward = shadowed


def check_plan(model: nn.Module, sublayers: Sequence[str], compute: Sequence[Sequence[bool]]) -> None:
    if TRUNK in sublayers and len(sublayers) > 1:
        raise ValueError(f"cache plan: {TRUNK} holds all other sublayers, it is cached alone")
    known = {TRUNK, *(name for name, _ in model.named_modules())}
    for name in sublayers:
        if name not in known:
            raise ValueError(f"cache plan: the model has no sublayer {name!r}")
    for step, row in enumerate(compute):
        if len(row) != len(sublayers):
            raise ValueError(f"cache plan: step {step} has {len(row)} entries for {len(sublayers)} sublayers")
    if not compute or not all(compute[0]):
        raise ValueError("cache plan: step 0 computes every sublayer; there is nothing to reuse yet")


def check_forecast(compute: Sequence[Sequence[bool]], forecast: str, timesteps: Sequence[int] | None,
                   weights: Weights | None) -> None:
    if forecast not in FORECASTS:
        raise ValueError(f"cache plan: forecast {forecast!r} is not one of {', '.join(FORECASTS)}")
    if forecast == "taylor" and timesteps is None:
        raise ValueError(f"cache plan: forecast taylor needs the timesteps of the {len(compute)} steps")
    if timesteps is not None and len(timesteps) != len(compute):
        raise ValueError(f"cache plan: {len(timesteps)} timesteps for {len(compute)} steps")
    if (forecast == "learned") != (weights is not None):
        raise ValueError(f"cache plan: forecast {forecast} {'has no weights' if weights is None else 'takes no weights'}")
    if weights is not None:
        check_weights(compute, forecast, weights)


def check_weights(compute: Sequence[Sequence[bool]], forecast: str, weights: Weights) -> None:
    if len(weights) != len(compute):
        raise ValueError(f"cache plan: weights of {len(weights)} steps for {len(compute)}")
    for step, (row, given) in enumerate(zip(compute, weights, strict=True)):
        if len(given) != len(row):
            raise ValueError(f"cache plan: step {step} has weights of {len(given)} sublayers for {len(row)}")
    for i, column in enumerate(zip(*compute, strict=True)):
        for step, found in enumerate(sources(column, forecast)):
            if len(weights[step][i]) != len(found):
                raise ValueError(f"cache plan: step {step}, sublayer {i} has {len(weights[step][i])} weights for {len(found)} "
                                 "outputs")


def kind_of(x: Tensor) -> tuple:
    """What must agree between the input an output was computed for and the input it is reused for."""
    return tuple(x.shape), x.dtype, x.device


def describe(kind: tuple) -> str:
    shape, dtype, device = kind
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} on {device}"
