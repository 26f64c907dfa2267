"""The arms of the study: which weights go, and how the rest is trained. Tables of arguments."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from tasks.core.artifacts import digest
from tasks.core.sparsity import GRAINS

LONG_STEPS = 2000  # of the finalists
EQUAL_STEPS = {"mnist_dit": 600, "mnist_unet": LONG_STEPS}  # of all baselines; the claim `plateau` says what half would cost
LAYERS_STEPS = {"mnist_dit": 600, "mnist_unet": 1200}
SHORT_STEPS = 300  # of every arm of the study of Mao et al.
STEPS = 20         # DDIM on a uniform list: what the arms are sampled with
BATCH = 64
COMMON = {"batch": BATCH, "accumulate": 1, "lr": 3e-4, "warmup": 100, "weight_decay": 0.01, "ema_decay": 0.999, "sr_ste": 2e-4,
          "decay": "gradient", "prune_at": (0.25,), "freeze_at": 1.0, "precondition": 0.0, "data": 1.0, "lam": 1.0,
          "features": 0.0, "bank_share": 0.25, "label_dropout": 0.1, "bf16": True, "log_every": 100}

DENSITIES = (0.75, 0.5, 0.25)
PATTERNS = {0.25: "1:4", 0.5: "2:4", 0.75: "3:4"}
BETWEEN = {0.125: "1:8", 0.375: "3:8", 0.625: "5:8"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """name: unique. grain: one of `tasks.core.sparsity`, None: nothing is pruned. method: of `tasks.distill.train`, None: the
    masks alone. settings: what differs from COMMON.

    allocation of the density: uniform; as_uniform, chosen one by one, together saving as much; exact, chosen one by one, saving
    what the density says, where one density, in whole granules, saves more. What is chosen by: what each alone changes in
    images. Blocks' units save MACs, layers' N:M (of that M, or none) stored bits.
    """

    name: str
    grain: str | None = "2:4"
    density: float | None = None     # of every covered layer or block; an N:M pattern says it itself
    allocation: str = "uniform"      # uniform | as_uniform | exact
    saliency: str = "magnitude"
    permute: bool = False            # hidden units are reordered first, for N:M to keep more
    made_up: bool = False            # training starts from weights that make up for the masked ones
    method: str | None = "sr_ste"
    steps: int = EQUAL_STEPS["mnist_dit"]
    settings: Mapping = field(default_factory=dict)
    int8: bool = False               # judged in int8, too
    attention: bool = False          # of grain unit: heads of attentions go, too


TAUGHT = {"data": 0.0, "features": 0.1, "lr": 2e-3}  # by the teacher alone: its predictions and its sublayers' outputs
OURS = Arm(name="ours", saliency="second_order", made_up=True, method="fixed", settings=TAUGHT)

BASELINES = (
    Arm(name="dense", grain=None, method="dense"),
    OURS,
    Arm(name="teacher", grain=None, method=None),
    Arm(name="one_shot", method=None),
    Arm(name="fixed", method="fixed"),
    Arm(name="ste", method="ste"),
    Arm(name="sr_ste"),
    Arm(name="progressive", method="progressive"),
    Arm(name="data_free", settings={"bank_share": 1.0}),
)
ONE_SHOTS = (
    Arm(name="one_shot_permuted", method=None, permute=True),
    Arm(name="one_shot_activation", method=None, saliency="activation"),
    Arm(name="one_shot_second_order", method=None, saliency="second_order"),
    Arm(name="one_shot_made_up", method=None, made_up=True),
)
# What ours is made of, one part at a time, and what it was before its first result was seen.
PARTS_OF_OURS = (
    Arm(name="sr_ste_taught", settings=TAUGHT),
    Arm(name="fixed_taught", method="fixed", settings=TAUGHT),
    Arm(name="made_up", made_up=True, method="fixed"),
    replace(OURS, name="ours_data_free", settings={**TAUGHT, "bank_share": 1.0}),
    replace(OURS, name="ours_at_first", saliency="activation", settings={"data": 0.0, "lr": 1e-3}),
)
HALF = replace(OURS, name="ours_half")  # the plateau test, at half the steps: what does the second half still bring?
LAYERS = replace(OURS, name="ours_as_uniform", allocation="as_uniform")
UNIT = Arm(name="unit_uniform", grain="unit", density=0.6, made_up=True, method="fixed", settings=TAUGHT)
EXACT = replace(UNIT, name="unit_exact", allocation="exact")
BLOCKS = (replace(UNIT, name="one_density", density=0.5, attention=True),
          replace(UNIT, name="chosen", density=0.5, attention=True, allocation="as_uniform"))
LONGER = replace(OURS, steps=2 * LONG_STEPS)


def pruned(density: float, grains: Iterable[str]) -> Iterator[Arm]:
    """Under a fixed mask (Mao et al. prune and retrain), in fp32 and in int8."""
    for grain in grains:
        yield Arm(name=f"{grain.replace(':', '_of_')}_{round(100 * density)}", grain=grain, density=density, method="fixed",
                  steps=SHORT_STEPS, int8=True)


# Grains x densities, each trained as long.
MAO = (Arm(name="dense", grain=None, method="dense", steps=SHORT_STEPS, int8=True),
       *(arm for density in DENSITIES for arm in pruned(density, (PATTERNS[density], *GRAINS, "unit"))))
# What of it lay on the frontier of fidelity and stored bits, at more densities.
FRONTIER = tuple(arm for density, pattern in sorted((PATTERNS | BETWEEN).items()) for arm in pruned(density, ("fine", pattern)))
COARSE = tuple(arm for arm in MAO if arm.density == 0.5 and arm not in FRONTIER)


def key(arm: Arm, seed: int) -> str:
    """What an arm's files are called: an arm whose settings change is another one."""
    settings = asdict(arm)
    if not arm.attention:
        del settings["attention"]  # arms of before there was the choice keep their files
    return f"{arm.name}-{seed}-{digest([settings, COMMON])[:8]}"
