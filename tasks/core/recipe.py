"""How a compressed model samples: solver, timesteps, cache plan, precision plan, sparsity plan. Data, stored as JSON."""

import copy
import functools
import json
import re
from dataclasses import dataclass, field

from tasks.runtime.cache import check_forecast
from tasks.runtime.meaning import check_recipe, check_rows, check_timesteps
from tasks.runtime.solver import KNOWN, SolverStep

PRECISION = re.compile(r"fp32|bf16|w([3-8])a([3-8])")
TOKENS = ("fp32", "bf16", *(f"w{w}a{a}" for w in range(3, 9) for a in range(3, 9)))  # what it matches
VARIANTS = ("dense", "few_steps_ddim", "few_steps_dpm", "sparse", "sparse_distilled", "cache", "precision", "timesteps",
            "dull_best", "compressed")  # what is packaged and measured, in the order of every table


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Which sublayers are computed at which step, and what a skipped one returns, made of its last computed outputs."""

    sublayers: tuple[str, ...]
    compute: tuple[tuple[bool, ...], ...]  # [step][sublayer]
    forecast: str = "none"                 # none | taylor | learned, see runtime/cache.py
    weights: tuple[tuple[tuple[float, ...], ...], ...] | None = None  # of `learned`: [step][sublayer], last output first

    def __post_init__(self):
        for step, row in enumerate(self.compute):
            if len(row) != len(self.sublayers):
                raise ValueError(f"cache plan: step {step} has {len(row)} entries for {len(self.sublayers)} sublayers")
        if not self.compute or not all(self.compute[0]):
            raise ValueError("cache plan: the first step computes every sublayer; there is nothing to reuse yet")
        check_forecast(self.compute, self.forecast, range(len(self.compute)), self.weights)  # the timesteps are the recipe's

    @classmethod
    def from_json(cls, data: dict) -> "CachePlan":
        """Plans written before there were forecasts have none."""
        weights = data.get("weights")
        return cls(sublayers=tuple(data["sublayers"]), compute=tuple(tuple(row) for row in data["compute"]),
                   forecast=data.get("forecast", "none"),
                   weights=weights and tuple(tuple(map(tuple, row)) for row in weights))

    @property
    def masks(self) -> list[tuple[bool, ...]]:
        """Distinct step masks, in order of first use; a graph backend compiles one or two graphs for each."""
        return list(dict.fromkeys(self.compute))

    @property
    def removed_share(self) -> float:
        """Share of all sublayer evaluations of the trajectory that are skipped."""
        cells = [cell for row in self.compute for cell in row]
        return 1 - sum(cells) / len(cells)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """precision: layer path -> fp32 | bf16 | w<bits>a<bits>, a missing layer is fp32.
    sparsity: {"grain": "2:4" | "unit", "density": {layer: kept share}} or None.
    rows: of the solver `learned`, one a step; None for all others. Its timesteps are the rows' times, rounded."""

    timesteps: tuple[int, ...]
    solver: str = "ddim"
    rows: tuple[SolverStep, ...] | None = None
    cache: CachePlan | None = None
    precision: dict[str, str] = field(default_factory=dict)
    sparsity: dict | None = None

    def __post_init__(self):
        if self.solver not in KNOWN:
            raise ValueError(f"recipe: solver {self.solver!r} is not one of {', '.join(KNOWN)}")
        check_timesteps(self.timesteps)
        check_rows(self.rows and [row.to_json() for row in self.rows], self.solver, self.timesteps)
        if self.cache is not None and len(self.cache.compute) != self.nfe:
            raise ValueError(f"recipe: the cache plan has {len(self.cache.compute)} steps, the timestep list {self.nfe}")
        if not all(map(is_precision, set(self.precision.values()))):
            layer, token = next((layer, token) for layer, token in self.precision.items() if not is_precision(token))
            raise ValueError(f"recipe: precision {token!r} of {layer} is not fp32, bf16 or w3..8a3..8")

    @property
    def nfe(self) -> int:
        """Evaluations of the network per image, without guidance."""
        return len(self.timesteps)

    def to_json(self) -> dict:
        """As dataclasses.asdict, which takes a millisecond for it: a search asks twice for every candidate."""
        plan = self.cache
        cache = plan and {"sublayers": plan.sublayers, "compute": plan.compute, "forecast": plan.forecast,
                          "weights": plan.weights}
        return {"timesteps": self.timesteps, "solver": self.solver, "rows": self.rows and [row.to_json() for row in self.rows],
                "cache": cache, "precision": dict(self.precision), "sparsity": copy.deepcopy(self.sparsity)}

    @classmethod
    def from_json(cls, data: dict) -> "Recipe":
        """Raises ValueError for an unknown or missing key and for a value that means nothing (`runtime/meaning.py`)."""
        data = json.loads(json.dumps(data))
        check_recipe(data, KNOWN)
        cache, rows = data.pop("cache"), data.pop("rows", None)
        return cls(**{**data, "timesteps": tuple(data["timesteps"])}, cache=CachePlan.from_json(cache) if cache else None,
                   rows=rows and tuple(map(SolverStep.from_json, rows)))

    @property
    def sampling(self) -> dict:
        """What is left where nothing is compressed: arguments of a Recipe."""
        return {"timesteps": self.timesteps, "solver": self.solver, "rows": self.rows}


@functools.cache
def is_precision(token: str) -> bool:
    return PRECISION.fullmatch(token) is not None


@functools.cache
def bits(token: str) -> tuple[int, int]:
    """Weight and activation bits of a precision token."""
    if token in ("fp32", "bf16"):
        return (32, 32) if token == "fp32" else (16, 16)
    weight, activation = PRECISION.fullmatch(token).groups()
    return int(weight), int(activation)
