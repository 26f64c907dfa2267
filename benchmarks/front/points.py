"""The points of the study: whose network, in which precision, sampled how, called by whom. Tables of arguments."""

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.cache.arms import DBCACHE, DIT
from benchmarks.front.factorial import FACTORS, design
from tasks.fid import dull

SOLVERS = ("ddim", "dpm2m", "dpm3m", "unipc", "unipc3", "deis3", "ipndm")
SPACINGS = ("uniform", "logsnr", "quadratic", "karras")
STEPS = (4, 5, 6, 8, 10, 12, 16, 20)
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "int8": "w8a8"}  # name in a point -> token in a recipe
FASTEST = "bf16"            # of heats and trials
LEARNED = (4, 5, 6, 8)      # evaluations of learned solvers
STUDENT = "few_4"           # ships beside mnist_dit
FACTORIAL_STEPS = 4         # evaluations of every package of the factorial
OURS, EAGER = "ours", "eager"  # who calls the network where it is no peer: our graphs in OpenVINO; eager torch


@dataclass(frozen=True, kw_only=True)
class Point:
    """sampler: solver_spacing_steps | best_<steps>: the best dull one of so many steps | learned_<steps> | few_4: the rows that
    the weights have. caller: who calls the network: `ours`, or a peer of `benchmarks.front.peers`."""

    name: str                 # variant in results.csv
    sampler: str
    weights: str = "teacher"  # whose network: see `benchmarks.front.networks`
    precision: str = "fp32"   # token of a recipe
    cached: bool = False
    caller: str = OURS
    settings: dict[str, Any] = field(default_factory=dict, hash=False)  # of a peer

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def backend(self) -> str:
        return "openvino" if self.caller in (OURS, "nncf") else EAGER

    @property
    def file(self) -> str:
        return self.name.replace("/", "-")


DENSE = Point(name="dense", sampler="ddim_diffusers_50")


def dull_point(found: dull.Point) -> Point:
    """Of the dull front's own grid."""
    return Point(name=f"dull/{found.name}", sampler=f"{found.solver}_{found.spacing}_{found.steps}",
                 precision=PRECISIONS[found.precision])


def heat(steps: int) -> list[Point]:
    """All solvers and spacings of one number of steps, at the fastest precision."""
    return [dull_point(found) for found in dull.grid((FASTEST,), SOLVERS, SPACINGS, (steps,))]


def steps_of(point: Point) -> int:
    return int(point.sampler.rpartition("_")[2])


def at(point: Point, precision: str) -> Point:
    """The same of the dull front at another precision."""
    base = point.name.rpartition("_")[0]
    return replace(point, name=f"{base}_{precision}", precision=PRECISIONS[precision])


# ---- peers ----

def peer(name: str, steps: int, **how: Any) -> Point:
    return Point(name=f"peer/{name}_{steps}", sampler=f"best_{steps}", **how)


def peers(teacher: str) -> list[Point]:
    """Each under the best dull solver and spacing of its number of steps."""
    both = [
        *(peer("nncf", n, caller="nncf") for n in (8, 12)),
        peer("torchao_int8", 12, caller="torchao"),
        peer("torchao_int8_compiled", 12, caller="torchao", settings={"compiled": True}),
        peer("taylorseer", 20, caller="taylorseer", settings={"cache_interval": 2, "max_order": 1}),
        peer("pab", 20, caller="pab", settings={"spatial_attention_block_skip_range": 2,
                                                "spatial_attention_timestep_skip_range": (0, 1000)}),
        peer("torch_pruning+nncf", 12, weights="torch_pruning", caller="nncf"),
        peer("torch_pruning", 12, weights="torch_pruning", precision="bf16"),
        peer("modelopt_2of4", 12, weights="modelopt", precision="bf16"),
    ]
    if teacher == DIT:
        return [*both, peer("first_block", 20, caller="first_block", settings={"threshold": 0.1}),
                peer("cache_dit", 20, caller="dbcache", settings={**DBCACHE, "residual_diff_threshold": 0.1}),
                peer("cache_dit+torchao", 20, caller="dbcache_torchao",
                     settings={**DBCACHE, "residual_diff_threshold": 0.1})]
    return [*both, peer("deepcache", 20, caller="deepcache", settings={"cache_interval": 2, "cache_branch_id": 0})]


# ---- ours ----

def ours(teacher: str) -> list[Point]:
    """Learned solvers of the frozen teacher, and the student that ships beside it. `few_4_w8a8` is what evolve hands over in
    the committed quick run: four evaluations of the student, every layer in w8a8."""
    learned = [Point(name=f"ours/learned_{n}_w8a8", sampler=f"learned_{n}", precision="w8a8") for n in LEARNED]
    if teacher != DIT:
        return learned
    return [*(Point(name=f"ours/{STUDENT}_{token}", sampler=STUDENT, weights=STUDENT, precision=token)
              for token in ("w8a8", "fp32", "bf16")),
            Point(name=f"ours/{STUDENT}_units_w8a8", sampler=STUDENT, weights=f"{STUDENT}_units", precision="w8a8"), *learned]


# ---- the factorial ----

def factors(teacher: str) -> tuple[str, ...]:
    """No student ships beside the UNet."""
    return FACTORS if teacher == DIT else tuple(name for name in FACTORS if name != "weights")


def factorial(teacher: str) -> list[Point]:
    """In the order of `design`."""
    return [package(dict(zip(factors(teacher), row, strict=True))) for row in design(len(factors(teacher)))]


def package(on: dict[str, bool]) -> Point:
    """One of the packages: which factors are on."""
    few = on.get("weights", False)
    weights = {(False, False): "teacher", (False, True): "teacher_units", (True, False): STUDENT,
               (True, True): f"{STUDENT}_units"}[few, on["sparsity"]]
    learned = STUDENT if few else f"learned_{FACTORIAL_STEPS}"
    return Point(name=f"factorial/{'+'.join(name for name, is_on in on.items() if is_on) or 'none'}", weights=weights,
                 sampler=learned if on["solver"] else f"best_{FACTORIAL_STEPS}", cached=on["cache"],
                 precision="w8a8" if on["precision"] else "fp32")
