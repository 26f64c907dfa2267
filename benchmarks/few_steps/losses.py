"""Which loss trains few-step weights best in equal time: of the picture (ours), of the trajectory (SFD), of consistency (ECT).

All start from the teacher's weights and learn from the teacher's images alone, with the same optimiser, rate, batch and EMA.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.few_steps.lab import BATCH, JUDGED, Lab, any_step, read_rows, read_weights, write_learned
from benchmarks.few_steps.students import Student, network_of, recipe_of
from benchmarks.results import kept_features, made
from tasks.core import quality
from tasks.core.artifacts import read_json, write_json
from tasks.core.denoiser import Denoiser
from tasks.core.learned import SPREAD, LearnedSolver, opening_images, schedule_bars
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, spaced_timesteps, to_uint8, trajectory
from tasks.core.schedule import Schedule
from tasks.core.training import Ema, optimise, step_generator, warmup_cosine
from tasks.core.unroll import How, Training, bounded, predicting, train_along
from tasks.runtime.solver import Predict, SolverStep, clip_bound, data_prediction, solver_steps
from tasks.solver_learn.start import Start, rows_of

NUMBERS = (2, 4)               # of evaluations
LOSSES = ("picture", "trajectory", "consistency")
INSERTED = 3                   # points of the teacher's trajectory between two of the student's (SFD)
STAGES, Q = 8, 2.0             # of ECT: how often r comes nearer to t, and by what factor
K, B = 8.0, 1.0                # of ECT: how much farther r is where there is little noise
P_MEAN, P_STD = -1.1, 2.0      # of ECT: of the logarithm of the noise levels that it trains at
RATE, SOLVER_RATE, DECAY, SIZE, WARMUP = 1.5e-4, 0.003, 0.98, 32, 50
TIMED = 3                      # steps by which a training is fitted into its minutes

Step = Callable[[Denoiser, int, int], Iterator[Tensor]]  # student, step, of how many -> losses; an update follows each


# ---- the loss of the trajectory: SFD, arXiv 2409.19681 ----

@torch.no_grad()
def teacher_states(teacher: Denoiser, timesteps: Sequence[int], noise: Tensor, labels: Tensor | None) -> list[Tensor]:
    """What the student's steps are to lead to, the last one to the image: DPM-Solver++ 3M on a finer list."""
    parts = [np.linspace(high, low, INSERTED + 2)[:-1].round().astype(int) for high, low in pairwise([*timesteps, 0])]
    recipe = Recipe(timesteps=tuple(int(t) for part in parts for t in part), solver="dpm3m")
    steps = list(trajectory(network(teacher), teacher.schedule, recipe, noise, labels))
    return [*(x for _, x, _ in steps[INSERTED + 1::INSERTED + 1]), steps[-1][2]]


def along_trajectory(lab: Lab, timesteps: Sequence[int], student: Denoiser, i: int, steps: int) -> Iterator[Tensor]:
    """Each of the student's DDIM steps starts from where its last one led; no gradient passes from one to another."""
    pairs, clip = lab.pairs(), clip_bound(student.schedule.config)
    noise, labels, _ = pairs.take(torch.randint(len(pairs), (SIZE,), generator=step_generator(0, i)))
    predict, x = predicting(student, lab.distill.bf16), noise
    rows = solver_steps(student.schedule.config, timesteps, "ddim")
    for step, (row, wanted) in enumerate(zip(rows, teacher_states(lab.teacher, timesteps, noise, labels), strict=True)):
        prediction = predict(x, torch.full((len(x),), row.t), labels, step).float()
        after = row.a * x + row.b[0] * bounded(row.p * x + row.q * prediction, clip)
        yield (after - wanted).abs().mean()
        x = after.detach()


# ---- the loss of consistency: ECT, arXiv 2406.14548; noise levels are sigma / alpha ----

def nearer(sigma: Tensor, stage: int) -> Tensor:
    """The level r <= sigma whose x0 is the target, 0 at first: section 3.3, as its code has it."""
    return (sigma * (1 - (1 + K * torch.sigmoid(-B * sigma)) / Q ** (stage + 1))).clamp(min=0)


def estimate(predict: Predict, schedule: Schedule, x0: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """x0 as the network has it from x0 + sigma noise; sigma: (N,), above 0."""
    bars = schedule_bars(schedule)
    known = (0.5 * ((1 - bars) / bars).log()).numpy()
    t = torch.from_numpy(np.interp(sigma.log().double().numpy(), known, np.arange(len(known)))).float()
    alpha = (1 + sigma.square()).rsqrt()
    p, q = (torch.tensor(part).view(-1, 1, 1, 1) for part in zip(
        *(data_prediction(a, a * s, schedule.prediction_type) for a, s in zip(alpha.tolist(), sigma.tolist(), strict=True)),
        strict=True))
    x = alpha.view(-1, 1, 1, 1) * (x0 + sigma.view(-1, 1, 1, 1) * noise)
    return p * x + q * predict(x, t, labels, 0).float()


def along_levels(lab: Lab, student: Denoiser, i: int, steps: int) -> Iterator[Tensor]:
    pairs, rng, bars = lab.pairs(), step_generator(1, i), schedule_bars(student.schedule)
    _, labels, images = pairs.take(torch.randint(len(pairs), (SIZE,), generator=rng))
    lowest, highest = (((1 - bars[place]) / bars[place]).sqrt().item() for place in (0, -1))
    sigma = (P_MEAN + P_STD * torch.randn(SIZE, generator=rng)).exp().clamp(2 * lowest, highest)
    r, noise = nearer(sigma, STAGES * i // steps), torch.randn(images.shape, generator=rng)
    predict = predicting(student, lab.distill.bf16)
    with torch.no_grad():
        target = estimate(predict, student.schedule, images, noise, r.clamp(min=lowest), labels)
        target = torch.where((r > lowest).view(-1, 1, 1, 1), target, images)
    far = estimate(predict, student.schedule, images, noise, sigma, labels) - target
    yield (far.flatten(1).norm(dim=1) / (sigma - r)).mean()


def consistent_samples(predict: Predict, schedule: Schedule, timesteps: Sequence[int], shape: tuple[int, ...], n: int,
                       num_classes: int) -> Iterator[np.ndarray]:
    """uint8 chunks: x0 at each timestep, with fresh noise down to the next one (multistep consistency sampling)."""
    bars, clip = schedule_bars(schedule)[list(timesteps)], clip_bound(schedule.config)
    alphas, sigmas = bars.sqrt().tolist(), (1 - bars).sqrt().tolist()
    for start in range(0, n, BATCH):
        indices = range(start, start + BATCH)
        labels, x0 = labels_for(indices, num_classes), torch.zeros(BATCH, *shape)
        for i, (t, alpha, sigma) in enumerate(zip(timesteps, alphas, sigmas, strict=True)):
            fresh = initial_noise(shape, indices, JUDGED + 1000 * i)
            x = fresh if i == 0 else alpha * x0 + sigma * fresh
            p, q = data_prediction(alpha, sigma, schedule.prediction_type)
            x0 = bounded(p * x + q * predict(x, torch.full((BATCH,), float(t)), labels, 0), clip)
        yield to_uint8(x0)[: n - start]


# ---- training in so many minutes ----

def steps_within(minutes: float, step: Callable[[int], object], path: Path) -> int:
    """By the CPU time of a few steps, which are thrown away; kept at `path`, so that a killed training goes on as it began."""
    if not path.exists():
        step(0)
        began = time.process_time()
        for i in range(TIMED):
            step(i + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, max(TIMED, int(60 * minutes * TIMED / (time.process_time() - began))))
    return read_json(path)


class Plain:
    """Training of all weights by a `Step`, as `unroll.Training` is one of pictures."""

    def __init__(self, teacher: Denoiser, losses: Step, steps: int):
        self.losses, self.steps = losses, steps
        self.student = Denoiser(copy.deepcopy(teacher.model).requires_grad_(True), teacher.schedule)
        self.optimiser = torch.optim.AdamW(self.student.model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = Ema(self.student.model, DECAY)

    def step(self, i: int) -> float:
        found = []
        for loss in self.losses(self.student, i, self.steps):
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.model.parameters(), 1.0)
            for group in self.optimiser.param_groups:
                group["lr"] = RATE * warmup_cosine(i, self.steps, min(WARMUP, max(1, self.steps // 5)))
            self.optimiser.step()
            self.optimiser.zero_grad()
            found.append(loss.item())
        self.ema.update(self.student.model, i)
        return sum(found) / len(found)

    def state(self) -> dict:
        return {"live": self.student.model.state_dict(), "mean": self.ema.module.state_dict(),
                "optimiser": self.optimiser.state_dict()}

    def restore(self, saved: dict) -> None:
        self.student.model.load_state_dict(saved["live"])
        self.ema.module.load_state_dict(saved["mean"])
        self.optimiser.load_state_dict(saved["optimiser"])


def trained(lab: Lab, loss: str, nfe: int, out: Path) -> None:
    """Writes the weights, and the rows that they are sampled by, if there are any."""
    name = f"{loss}-{nfe}-{lab.sizes.minutes:g}"
    fitted = lab.folder / "steps" / f"{name}.json"
    if loss == "picture":
        picture(lab, nfe, name, fitted, out)
        return
    losses = partial(along_levels, lab) if loss == "consistency" else partial(along_trajectory, lab, list_of(lab, nfe))
    steps = steps_within(lab.sizes.minutes, Plain(lab.teacher, losses, 10**6).step, fitted)
    training = Plain(lab.teacher, losses, steps)
    optimise(training.step, training.state, training.restore, steps, lab.checkpoint(name, steps), f"{lab.name} {name}")
    save_file({key: value.contiguous() for key, value in training.ema.module.state_dict().items()}, out / "weights.safetensors")


def picture(lab: Lab, nfe: int, name: str, fitted: Path, out: Path) -> None:
    """Weights and solver together, as distill trains them, but from a classical solver on: no time went into another one."""
    images, spread = opening_images(lab.teacher, solver_noises(lab), 1)
    rows = rows_of(lab.teacher.schedule, nfe, Start("dpm2m", "uniform", spread <= SPREAD), images)
    learn, held = lab.pairs().split(lab.sizes.held)

    def how(steps: int) -> How:
        return How(steps=steps, batch=SIZE, lr=RATE, images_lr=3 * RATE, solver_lr=SOLVER_RATE, warmup=WARMUP, ema_decay=DECAY,
                   judge_every=10**6, bf16=lab.distill.bf16, seed=0, loss=lab.how.loss)

    def fresh() -> tuple[Denoiser, LearnedSolver]:
        return (Denoiser(copy.deepcopy(lab.teacher.model), lab.teacher.schedule), LearnedSolver(lab.teacher.schedule, rows))

    trial = Training(*fresh(), learn, held.part(0, 2), lab.search_net, how(10**6), {}, None)
    steps = steps_within(lab.sizes.minutes, trial.step, fitted)
    found = train_along(*fresh(), learn, held, lab.search_net, how(steps), lab.checkpoint(name, steps), f"{lab.name} {name}")
    write_learned(found, out, weights=True)


def solver_noises(lab: Lab) -> int:
    """For each label, of an opening's images."""
    return 32 if lab.teacher.num_classes else 320


def list_of(lab: Lab, nfe: int) -> tuple[int, ...]:
    """Of trajectory and consistency. With two evaluations the second noise level is 1; ECT has 0.8."""
    return spaced_timesteps(lab.teacher.schedule, nfe)


def judged(lab: Lab, loss: str, nfe: int) -> dict[str, float]:
    """FID of a student of the loss, and steps that its minutes were enough for."""
    name = f"{loss}-{nfe}-{lab.sizes.minutes:g}"
    folder = made(lab.folder / "losses" / name, partial(trained, lab, loss, nfe))
    rows: tuple[SolverStep, ...] = read_rows(folder) if loss == "picture" else ()
    student = Student(weights=read_weights(folder), rows=rows, masks={}, grain=None)
    found = features_of(lab, name, loss, nfe, student)
    return {quality.fid_name(len(found)): quality.fid(found, lab.judge.reference),
            "steps": read_json(lab.folder / "steps" / f"{name}.json")}


def features_of(lab: Lab, name: str, loss: str, nfe: int, student: Student) -> np.ndarray:
    denoiser, n = network_of(lab, student), lab.sizes.loss_samples
    if loss == "picture":
        return lab.features(name, recipe_of(student), n, denoiser)
    timesteps = list_of(lab, nfe)
    if loss == "trajectory":
        return lab.features(name, Recipe(timesteps=timesteps), n, denoiser)

    def draw() -> np.ndarray:
        chunks = consistent_samples(any_step(denoiser), denoiser.schedule, timesteps, denoiser.sample_shape, n,
                                    denoiser.num_classes)
        return np.concatenate([quality.features(lab.judge.net, chunk) for chunk in track(chunks, -(-n // BATCH), name)])

    return kept_features(lab.folder, f"{name}-{n}", draw)
