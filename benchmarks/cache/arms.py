"""The arms of the study: who skips what, and how strongly. Tables of arguments, no code of their own."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

TEACHERS = ("mnist_dit", "mnist_unet")
DIT, UNET = TEACHERS
SOLVERS, NFES = ("ddim", "dpm2m"), (20, 50)
STEPS = {DIT: NFES, UNET: NFES[:1]}
TIMED = SOLVERS[0]  # the solver under which speed is measured: its own arithmetic takes no time beside the network's
BUDGETS = (0.1, 0.25, 0.4, 0.6)  # shares of all sublayer evaluations to remove
HALVES = BUDGETS[:3]             # by what computes every second step in full


@dataclass(frozen=True, kw_only=True)
class Arm:
    """name: unique. make: a function of `study.MAKERS`, called with `strength`, one of `values`, and `fixed`."""

    name: str
    make: str
    strength: str
    values: tuple
    fixed: Mapping = field(default_factory=dict, hash=False)
    teachers: tuple[str, ...] = TEACHERS
    nfes: tuple[int, ...] = NFES
    backends: tuple[str, ...] = ("eager",)  # on which it is timed


OURS = "refined"
TABLE = {"unit": "trunk", "max_masks": 4}
PLANS = (
    Arm(name=OURS, make="refined", strength="budget", values=(0.1, 0.25, 0.35, 0.4, 0.6),
        fixed={"unit": "trunk", "learned": True}, backends=("eager", "openvino")),
    Arm(name="table", make="refined", strength="budget", values=BUDGETS, fixed={"unit": "trunk", "learned": False}),
    Arm(name="errors", make="errors", strength="budget", values=BUDGETS, fixed={**TABLE, "forecast": "learned"}),
    Arm(name="errors_taylor", make="errors", strength="budget", values=BUDGETS, fixed={**TABLE, "forecast": "taylor"}),
    Arm(name="errors_reuse", make="errors", strength="budget", values=BUDGETS, fixed={**TABLE, "forecast": "none"}),
    Arm(name="errors_ungrown", make="errors", strength="budget", values=BUDGETS,
        fixed={**TABLE, "forecast": "learned", "grown": False}, nfes=NFES[:1]),
    Arm(name="refined_sublayers", make="refined", strength="budget", values=BUDGETS,
        fixed={"unit": "sublayer", "learned": True}, teachers=(DIT,), nfes=NFES[:1]),
    Arm(name="router", make="router", strength="budget", values=HALVES, fixed={"max_masks": 4}),
)
RULES = (
    Arm(name="fewer_steps", make="fewer_steps", strength="budget", values=BUDGETS),
    Arm(name="uniform_interval", make="uniform_interval", strength="budget", values=BUDGETS),
    Arm(name="time_threshold", make="time_threshold", strength="budget", values=HALVES),
    Arm(name="time_threshold_clean", make="time_threshold", strength="budget", values=HALVES, fixed={"end": "clean"}),
    *(Arm(name=f"{order}_layers", make="layers", strength="budget", values=HALVES, fixed={"order": order})
      for order in ("top", "bottom", "random")),
)

# Strengths of what decides by a threshold were placed on the shipped teachers, from removing little on. Early steps are dear to
# skip there, so what has a setting for it is also tried with a late start.
SUBLAYERS = {DIT: (r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"),
             UNET: (r".*\.resnets\.\d+", r".*\.attentions\.\d+")}
DBCACHE = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2}
PACKAGES = (
    Arm(name="first_block", make="first_block", strength="threshold", values=(0.05, 0.1, 0.15, 0.2, 0.3), teachers=(DIT,)),
    Arm(name="mag", make="mag", strength="threshold", values=(0.06, 0.12, 0.24, 0.5), teachers=(DIT,)),
    Arm(name="pab", make="pab", strength="spatial_attention_block_skip_range", values=(2, 3, 5),
        fixed={"spatial_attention_timestep_skip_range": (100, 800)}),
    Arm(name="pab_always", make="pab", strength="spatial_attention_block_skip_range", values=(2, 3, 5),
        fixed={"spatial_attention_timestep_skip_range": (-1, 1000)}),
    *(Arm(name=f"taylorseer_{order}", make="taylorseer", strength="cache_interval", values=(2, 3, 4, 6),
          fixed={"max_order": order}) for order in (1, 2)),
    *(Arm(name=f"taylorseer_{order}_late", make="taylorseer", strength="start", values=(0.7, 0.5, 0.3),
          fixed={"max_order": order, "cache_interval": 2}) for order in (1, 2)),
    Arm(name="dbcache", make="dbcache", strength="residual_diff_threshold", values=(0.05, 0.1, 0.15, 0.2, 0.3),
        fixed=DBCACHE, teachers=(DIT,)),
    Arm(name="dbcache_taylorseer", make="dbcache", strength="residual_diff_threshold", values=(0.05, 0.1, 0.15, 0.2, 0.3),
        fixed={**DBCACHE, "taylorseer_order": 1}, teachers=(DIT,)),
    Arm(name="dbcache_warm", make="dbcache", strength="residual_diff_threshold", values=(0.1, 0.2, 0.3, 0.5),
        fixed={**DBCACHE, "max_warmup_steps": 8}, teachers=(DIT,)),
    *(Arm(name=f"deepcache_{branch}", make="deepcache", strength="cache_interval", values=(2, 3, 5),
          fixed={"cache_branch_id": branch}, teachers=(UNET,)) for branch in (0, 3)),
)
ARMS = (*PLANS, *RULES, *PACKAGES)
OPPONENTS = tuple(arm for arm in ARMS if arm not in PLANS)
FINALISTS = {20: 0.25, 50: 0.4}  # steps -> budget at which quality is judged on many samples, on DIT


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm at one strength, under one solver and number of steps; value None is the uncached run itself."""

    teacher: str
    solver: str
    nfe: int
    arm: Arm | None = None
    value: float | int | None = None

    @property
    def setting(self) -> str:
        return f"{self.solver}{self.nfe}"

    @property
    def variant(self) -> str:
        return f"{self.setting}/{self.arm.name}/{self.value:g}" if self.arm else f"{self.setting}/uncached"


def cells() -> Iterator[Cell]:
    """All of them; what a claim rests on most comes first."""
    for teacher in TEACHERS:
        for nfe in STEPS[teacher]:
            for solver in SOLVERS:
                yield from (Cell(teacher=teacher, solver=solver, nfe=nfe, arm=arm, value=value)
                            for arm in ARMS if teacher in arm.teachers and nfe in arm.nfes
                            for value in arm.values)


def arm(name: str) -> Arm:
    return next(one for one in ARMS if one.name == name)


CONVERGED = Cell(teacher=DIT, solver="dpm2m", nfe=50)  # what both ways to a cheaper image are measured against
FEWEST = (4, 8, 12, 16, 20)                            # steps from which they start; a quarter of each is whole
SAVED = 0.25                                           # of the evaluations of all sublayers, or of the steps


def break_even() -> list[Cell]:
    """DPM-Solver++ at few steps, a quarter of its work saved by our cache, or by taking that many steps fewer."""
    return [Cell(teacher=DIT, solver="dpm2m", nfe=nfe, arm=arm(name), value=SAVED)
            for nfe in FEWEST for name in (OURS, "fewer_steps")]


UNSEEN = ("errors", OURS)  # what the table has for a list that it never saw, and what is searched and trained for this list


def unseen() -> list[Cell]:
    """At the more steps and the table's budgets."""
    return [cell for cell in cells() if (cell.teacher, cell.nfe) == (DIT, NFES[1]) and cell.arm.name in UNSEEN
            and cell.value in arm(UNSEEN[0]).values]


def further(left_open: Collection[tuple[str, str]]) -> list[Cell]:
    """What is judged again by other pairs, more of them: opponents that the first pairs leave open, (teacher, variant), with
    ours under the same settings."""
    settings = {(teacher, variant.split("/")[0]) for teacher, variant in left_open}
    return [cell for cell in cells() if (cell.teacher, cell.variant) in left_open
            or cell.arm.name == OURS and (cell.teacher, cell.setting) in settings]


def trained() -> list[Cell]:
    """The router whose training is timed, at the steps that it is published for."""
    return [Cell(teacher=DIT, solver="ddim", nfe=NFES[0], arm=arm("router"), value=SAVED)]


def finalists() -> list[Cell]:
    """Ours at the strengths whose quality is claimed."""
    return [cell for cell in cells() if (cell.teacher, cell.arm.name, cell.value) == (DIT, OURS, FINALISTS[cell.nfe])]


def timed() -> list[Cell]:
    """Whose speed is measured: ours, and opponents at the fewer steps."""
    return [cell for cell in cells() if cell.solver == TIMED
            and (cell.arm.name == OURS or cell.arm in OPPONENTS and cell.nfe == NFES[0])]
