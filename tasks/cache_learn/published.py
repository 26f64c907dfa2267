"""Routers that the authors of Learning-to-Cache released (arXiv 2406.01733), turned into our cache plan.

    python -m tasks.cache_learn.published DDIM20_router.pt --steps 20 --theta 0.1 --out plan.json

A file holds one vector of logits, `<n>.prob`, for each of its N steps; two values a block: attention at the even positions,
feed-forward at the odd ones. A sublayer is computed where sigmoid(logit) > theta (algorithm 2 prints the reverse); elsewhere
its output of the step before is reused. Published theta: 0.1 for DiT at 256 x 256, 0.9 at 512 x 512 and for U-ViT. Which n is
which step follows their code, github.com/horseee/learning-to-cache:

DiT (`load_ranking` and `forward` in DiT/models/dynamic_models.py; DiT/train_router.py saves {"routers", "opt", "args"}): n
counts the sampling timesteps from the lowest noise, so step s, from the noise down, is n = N - 1 - s. Even n, every second
step, are cache steps; odd n are computed in full and their logits never used. An odd N fails in their code and is refused here.
Their timesteps are N numbers evenly spaced from 999 to 0, rounded (diffusers' "linspace").

U-ViT (`load_ranking` and `forward` in U-ViT/libs/uvit_dynamic.py; the state dict alone): n counts the steps of singlestep
DPM-Solver-2 from the highest noise, two evaluations each, so only n < N / 2 are used. A second evaluation, at the midpoint, is
computed in full; the first one of the next step reuses it (table 6, "shifted"). n = 0 has nothing to reuse. The plan names the
modules of their own U-ViT; its times are no whole timesteps, so none are given.

Guidance: one plan for both halves, in one batch. The files are pickles: read by torch's restricted unpickler, which here knows
tensors and argparse.Namespace and nothing else.
"""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, safe_globals

from tasks.core.artifacts import write_json
from tasks.core.params import check_range
from tasks.core.recipe import CachePlan
from tasks.core.shell import complaint

TRAINED_ON = 1000  # timesteps of DiT's own diffusion
KEY = re.compile(r"\d+\.prob")


@dataclass(frozen=True, kw_only=True)
class PublishedRouter:
    """Steps count from 0, the noisiest; those without scores are computed in full."""

    steps: int
    sublayers: tuple[str, ...]
    scores: dict[int, Tensor]           # cache step -> (S,) fp32 in [0, 1]
    timesteps: tuple[int, ...] | None   # (steps,) those it was trained for; None where they are no whole numbers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a released file of one architecture is to be read."""

    blocks: int                                             # of the released model
    sublayers: Callable[[int], list[str]]                   # blocks -> module paths, in the order of the logits
    cache_steps: Callable[[int], dict[int, int]]            # N -> {step: n}
    timesteps: Callable[[int], tuple[int, ...] | None]


def dit_sublayers(blocks: int) -> list[str]:
    """As `Denoiser.sublayers` names them in diffusers' DiT, whose blocks are in the order of the original's."""
    return [f"transformer_blocks.{i}.{part}" for i in range(blocks) for part in ("attn1", "ff")]


def uvit_sublayers(blocks: int) -> list[str]:
    """Half of the blocks before the middle one, half after it."""
    if blocks % 2 == 0:
        raise ValueError(f"blocks: {blocks} is even, a U-ViT has one in the middle")
    side = range(blocks // 2)
    paths = [*(f"in_blocks.{i}" for i in side), "mid_block", *(f"out_blocks.{i}" for i in side)]
    return [f"{path}.{part}" for path in paths for part in ("attn", "mlp")]


def dit_timesteps(steps: int) -> tuple[int, ...]:
    return tuple(np.rint(np.linspace(TRAINED_ON - 1, 0, steps)).astype(int).tolist())


DIT = Layout(blocks=28, sublayers=dit_sublayers, timesteps=dit_timesteps,
             cache_steps=lambda steps: {s: steps - 1 - s for s in range(1, steps, 2)})
UVIT = Layout(blocks=29, sublayers=uvit_sublayers, timesteps=lambda steps: None,
              cache_steps=lambda steps: {2 * n: n for n in range(1, steps // 2)})


def read_router(path: str | Path, steps: int, blocks: int | None = None) -> PublishedRouter:
    """A released file, DiT's or U-ViT's as its layout says.

    steps: evaluations of the network that it was trained for, an even number; blocks: of the model, None for the released
    DiT-XL/2 (28) and U-ViT-H/2 (29). Raises ValueError naming the file, what was found and what was expected.
    """
    check_range("steps", steps, 2, TRAINED_ON)
    if steps % 2:
        raise ValueError(f"steps: {steps} is odd; published routers pair a step computed in full with one that reuses it")
    routers, layout = routers_in(load_restricted(path), path)
    blocks = layout.blocks if blocks is None else blocks
    check_range("blocks", blocks, 1, 1000)
    sublayers = layout.sublayers(blocks)
    check_routers(routers, steps, blocks, path)
    scores = {step: torch.sigmoid(routers[f"{n}.prob"].float()) for step, n in layout.cache_steps(steps).items()}
    return PublishedRouter(steps=steps, sublayers=tuple(sublayers), scores=scores, timesteps=layout.timesteps(steps))


def published_plan(router: PublishedRouter, theta: float) -> CachePlan:
    """Computed where the score > theta, in fp32 as theirs, and wherever there is no score. theta in [0, 1]: 0 computes all."""
    check_range("theta", theta, 0, 1)
    full = (True,) * len(router.sublayers)
    compute = tuple(tuple((router.scores[s] > theta).tolist()) if s in router.scores else full for s in range(router.steps))
    return CachePlan(sublayers=router.sublayers, compute=compute)


@contextlib.contextmanager
def allowing_only(*classes: type) -> Iterator[None]:
    """torch's restricted unpickler knows tensors and `classes`, not what other libraries have allowed in this process."""
    others = get_safe_globals()
    clear_safe_globals()
    try:
        with safe_globals(list(classes)):
            yield
    finally:
        add_safe_globals(others)


def load_restricted(path: str | Path) -> Any:
    """The file's tensors and plain containers; nothing in it is ever called."""
    try:
        with allowing_only(argparse.Namespace):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file raises half a dozen kinds, KeyError among them
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        why = (f"refused: it names {foreign.group(1)}, but only tensors and argparse.Namespace are read; nothing was run"
               if foreign else f"not a whole file of torch.save's ({type(error).__name__})")
        raise ValueError(f"{path}: {why}") from error


def routers_in(data: Any, path: str | Path) -> tuple[dict, Layout]:
    """What torch.load gave -> {"<n>.prob": logits}, and which architecture keeps them there."""
    if isinstance(data, dict) and isinstance(data.get("routers"), dict):
        return data["routers"], DIT
    if isinstance(data, dict) and data and all(isinstance(key, str) and KEY.fullmatch(key) for key in data):
        return data, UVIT
    found = f"a dict of {', '.join(map(repr, list(data)[:4])) or 'nothing'}" if isinstance(data, dict) else type(data).__name__
    raise ValueError(f"{path}: holds {found}, expected a dict `routers` (DiT) or `<n>.prob` alone (U-ViT)")


def check_routers(routers: dict, steps: int, blocks: int, path: str | Path) -> None:
    """One vector of 2 x blocks finite numbers for every step, and no other."""
    wanted = [f"{n}.prob" for n in range(steps)]
    for key in [key for key in routers if key not in wanted][:1]:
        raise ValueError(f"{path}: holds {key!r}, expected 0.prob to {steps - 1}.prob: was it trained for {steps} steps?")
    for key in wanted:
        if key not in routers:
            raise ValueError(f"{path}: {key} is missing; expected one for each of {steps} steps")
        logits = routers[key]
        if not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.layout == torch.strided
                and not logits.is_meta):
            raise ValueError(f"{path}: {key} is {describe(logits)}, expected a dense vector of floats")
        if logits.shape != (2 * blocks,):
            raise ValueError(f"{path}: {key} is {describe(logits)}, expected shape ({2 * blocks},): attention and feed-forward "
                             f"of {blocks} blocks")
        wrong = [value for value in logits.tolist() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{path}: {key} holds {wrong[0]}, expected finite numbers")


def describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def main(arguments: list[str] | None = None) -> None:
    """Write plan.json as the stage does, without timesteps where they are no whole numbers."""
    parser = argparse.ArgumentParser(prog="python -m tasks.cache_learn.published",
                                     description="A released Learning-to-Cache router -> plan.json")
    parser.add_argument("router", type=Path, help="file of the authors', DiT's or U-ViT's")
    parser.add_argument("--steps", type=int, required=True, help="evaluations of the network it was trained for")
    parser.add_argument("--theta", type=float, required=True, help="computed where sigmoid(logit) > theta")
    parser.add_argument("--blocks", type=int, help="of the model; default: 28 (DiT-XL/2) or 29 (U-ViT-H/2)")
    parser.add_argument("--out", type=Path, required=True, help="the plan's file")
    given = parser.parse_args(arguments)
    try:
        router = read_router(given.router, given.steps, given.blocks)
        plan = published_plan(router, given.theta)
        write_json(given.out, ({"timesteps": router.timesteps} if router.timesteps else {}) | asdict(plan))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {complaint(error, given.out)}")
    total = router.steps * len(router.sublayers)
    print(f"{given.out}: {total - sum(map(sum, plan.compute))} of {total} sublayer evaluations removed "
          f"({plan.removed_share:.1%}), {len(plan.masks)} distinct masks")


if __name__ == "__main__":
    main()
