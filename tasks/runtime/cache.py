"""Reuse of sublayer outputs across the steps of one trajectory, live on a model.

    handle = apply_cache(model, plan.sublayers, plan.compute)
    for step, t in enumerate(timesteps):
        handle.step = step
        ... model(x, t) ...
    remove_cache(model)

Shipped inside packages. What is kept is the raw output of the sublayer's module, before a DiT block's gate, which uses the
current timestep (Learning-to-Cache, arXiv 2406.01733, as its code does). Classifier-free guidance with both halves in one
batch needs nothing special.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

ATTRIBUTE = "_sublayer_cache"


class CachedForward:
    """Stands in for one sublayer's `forward`: returns what it kept, or computes, and keeps that if the next step reuses it."""

    def __init__(self, name: str, module: nn.Module, compute: tuple[bool, ...], handle: "CacheHandle"):
        self.name, self.compute, self.handle = name, compute, handle
        self.forward: Callable[..., Tensor] = module.forward
        self.shadowed = vars(module).get("forward")  # another wrapper's, to be put back on removal
        self.kept: tuple[tuple, Tensor] | None = None

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        step = self.handle.step
        if not self.compute[step]:
            return self.reuse(x, step)
        output = self.forward(x, *args, **kwargs)
        reused = step + 1 < len(self.compute) and not self.compute[step + 1]
        self.kept = (kind_of(x), output) if reused else None
        return output

    def reuse(self, x: Tensor, step: int) -> Tensor:
        if self.kept is None:
            raise ValueError(f"{self.name}: step {step} reuses an output, but none is kept; a trajectory starts at step 0")
        kind, output = self.kept
        if kind != kind_of(x):
            raise ValueError(f"{self.name}: step {step} got {describe(kind_of(x))}, but would reuse the output for "
                             f"{describe(kind)}; start the new trajectory at step 0")
        return output


class CacheHandle:
    """The position in the trajectory, shared by all sublayers of one model. step 0 forgets everything kept."""

    def __init__(self, steps: int):
        self.steps = steps
        self.forwards: dict[str, CachedForward] = {}
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
        for forward in self.forwards.values():
            forward.kept = None


def apply_cache(model: nn.Module, sublayers: Sequence[str], compute: Sequence[Sequence[bool]]) -> CacheHandle:
    """Make a cache plan live: where compute[step][sublayer] is False, that module is skipped and its last output returned.

    sublayers: module paths in `model`, as `Denoiser.sublayers()` names them. Replaces a plan applied before. Sublayers that
    every step computes are left untouched. Raises ValueError for an unknown path or a plan of the wrong shape.
    """
    check_plan(model, sublayers, compute)
    remove_cache(model)
    handle = CacheHandle(len(compute))
    for name, column in zip(sublayers, zip(*compute, strict=True), strict=True):
        if not all(column):
            module = model.get_submodule(name)
            module.forward = handle.forwards[name] = CachedForward(name, module, tuple(map(bool, column)), handle)
    setattr(model, ATTRIBUTE, handle)
    return handle


def remove_cache(model: nn.Module) -> None:
    """Undo `apply_cache` and leave no trace; nothing happens if no plan is applied."""
    handle = vars(model).pop(ATTRIBUTE, None)
    if handle is None:
        return
    for name, cached in handle.forwards.items():
        module = model.get_submodule(name)
        del module.forward
        if cached.shadowed is not None:
            module.forward = cached.shadowed


def check_plan(model: nn.Module, sublayers: Sequence[str], compute: Sequence[Sequence[bool]]) -> None:
    known = {name for name, _ in model.named_modules()}
    for name in sublayers:
        if name not in known:
            raise ValueError(f"cache plan: the model has no sublayer {name!r}")
    for step, row in enumerate(compute):
        if len(row) != len(sublayers):
            raise ValueError(f"cache plan: step {step} has {len(row)} entries for {len(sublayers)} sublayers")
    if not compute or not all(compute[0]):
        raise ValueError("cache plan: step 0 computes every sublayer; there is nothing to reuse yet")


def kind_of(x: Tensor) -> tuple:
    """What must agree between the input an output was computed for and the input it is reused for."""
    return tuple(x.shape), x.dtype, x.device


def describe(kind: tuple) -> str:
    shape, dtype, device = kind
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} on {device}"
