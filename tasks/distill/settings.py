"""How a student is trained, whatever its grain: one frozen block, checked where it is made."""

from dataclasses import dataclass

from tasks.core.params import check_choice, check_range

METHODS = ("dense", "fixed", "ste", "sr_ste", "progressive")  # what each does: tasks/distill/masking.py
DECAYS = ("gradient", "decoupled")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The same for every method and grain; shares are of the steps."""

    steps: int                   # optimiser steps; 0 leaves the start under the given masks
    batch: int                   # images an optimiser step
    accumulate: int              # parts that a batch is computed in, one after the other; divides it
    lr: float                    # peak, after the warm-up; a cosine to 0 follows
    warmup: int                  # steps
    weight_decay: float          # AdamW's, decoupled
    ema_decay: float
    sr_ste: float                # decay of pruned weights, methods sr_ste and progressive
    decay: str                   # gradient: inside the gradient (SR-STE, eq. 9) | decoupled: w -= lr sr_ste w, as AdamW's own
    prune_at: tuple[float, ...]  # shares after which `progressive` prunes further, by equal parts of what is to go
    freeze_at: float             # share after which masks are no longer recomputed
    precondition: float          # share trained dense, after which Adam's variance is frozen (STEP); 0: plain AdamW
    data: float                  # weight of the data's target
    lam: float                   # weight of the teacher's prediction
    features: float              # weight of the teacher's sublayer outputs
    bank_share: float            # share of a batch that are teacher samples; 1: no real image is touched
    label_dropout: float         # share of labels replaced by the null label
    bf16: bool                   # autocast
    log_every: int               # steps between two rows of the curve
    seed: int

    def __post_init__(self):
        for key, low, high in (("steps", 0, 10**7), ("batch", 1, 65_536), ("accumulate", 1, 65_536), ("warmup", 0, 10**6),
                               ("log_every", 1, 10**6), ("lr", 0, 1), ("weight_decay", 0, 1), ("ema_decay", 0, 1),
                               ("sr_ste", 0, 1000), ("freeze_at", 0, 1), ("precondition", 0, 1), ("data", 0, 1e6),
                               ("lam", 0, 1e6), ("features", 0, 1e6), ("bank_share", 0, 1), ("label_dropout", 0, 1),
                               ("seed", 0, 2**31)):
            check_range(f"distill.{key}", getattr(self, key), low, high)
        check_choice("distill.decay", self.decay, DECAYS)
        self._check_together()

    def _check_together(self):
        if not (self.data or self.lam or self.features):
            raise ValueError("distill.data: 0, as distill.lam and distill.features are: there would be nothing to learn")
        if self.batch % self.accumulate:
            raise ValueError(f"distill.accumulate: {self.accumulate} does not divide distill.batch, {self.batch}")
        if list(self.prune_at) != sorted(set(self.prune_at)):
            raise ValueError(f"distill.prune_at: {list(self.prune_at)} does not rise")
        for share in self.prune_at:
            check_range("distill.prune_at", share, 0, 1)
        if self.precondition > self.freeze_at:
            raise ValueError(f"distill.precondition: {self.precondition} is more than distill.freeze_at, {self.freeze_at}")
        if self.decay == "decoupled" and self.lr * self.sr_ste > 1:
            raise ValueError(f"distill.sr_ste: {self.sr_ste} times distill.lr, {self.lr}, is more than 1: it would overshoot 0")


def check_method(method: str, settings: Settings) -> None:
    """Raises ValueError for an unknown method, and for a schedule that the freeze cuts short of the final density."""
    check_choice("distill.method", method, METHODS)
    if method == "progressive" and max(settings.prune_at, default=0) > settings.freeze_at:
        raise ValueError(f"distill.freeze_at: {settings.freeze_at} is before the last of distill.prune_at, "
                         f"{max(settings.prune_at)}: what ships would not have its density")
