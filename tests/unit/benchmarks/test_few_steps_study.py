"""What the study of few steps computes: Holm's bounds, who is judged on how many samples, the two other losses, what is due."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import norm

from benchmarks import results
from benchmarks.few_steps import __main__ as study
from benchmarks.few_steps import losses, solvers, students, table
from benchmarks.few_steps.lab import FEW, Lab
from tasks.core.pairs import Pairs
from tasks.core.quality import Difference, Gaussian, holm
from tasks.core.recipe import Recipe
from tasks.core.sampler import SPACINGS, network, sample, spaced_timesteps, trajectory
from tasks.core.schedule import Schedule
from tasks.fid.measure import Judge
from tasks.runtime.solver import SOLVERS
from tests.unit.distill.toy import tiny_dit

SCHEDULE = Schedule.from_config({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
                                 "prediction_type": "v_prediction"})


# ---- learned solvers beside classical ones ----

@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_below_zero_together_just_where_all_of_holms_p_values_are_small(seed):
    rng = np.random.default_rng(seed)
    found = {name: Difference(float(rng.normal(-0.09, 0.02)), 0.03) for name in range(6)}
    adjusted = holm({name: norm.cdf(d.estimate / d.error) for name, d in found.items()})
    assert (max(solvers.bounds(found).values()) < 0) == (max(adjusted.values()) < 0.05)


def test_one_bound_is_the_usual_one():
    assert solvers.bounds({"a": Difference(-0.1, 0.02)})["a"] == pytest.approx(Difference(-0.1, 0.02).upper95, abs=1e-5)


def test_half_as_many_evaluations_again_are_rounded_in_favour_of_the_classical_solver():
    assert [solvers.more_evaluations(nfe) for nfe in solvers.NUMBERS] == [8, 9, 12, 15]


def test_a_spacing_is_chosen_for_each_solver_and_the_best_solver_comes_first(monkeypatch):
    """By FID, where features of a spread of their own are off by a number of their own."""
    rng = np.random.default_rng(0)
    cells = [(solver, spacing) for solver in SOLVERS for spacing in SPACINGS]
    off = dict(zip(cells, 0.5 + rng.permutation(len(cells)) / 16, strict=True))
    real, few = rng.normal(size=(300, 3)), rng.normal(size=(100, 3))
    monkeypatch.setattr(solvers, "judged", lambda lab, cell, n: few + off[cell.solver, cell.spacing])
    lab = SimpleNamespace(judge=SimpleNamespace(reference=Gaussian.of(real)), sizes=FEW)
    found = solvers.chosen(lab, 6)
    order = sorted({cell.solver: off[cell.solver, cell.spacing] for cell in found}.items(), key=lambda item: item[1])
    assert [cell.solver for cell in found] == [solver for solver, _ in order] and len(order) == len(SOLVERS)
    assert all(off[cell.solver, cell.spacing] == min(off[cell.solver, spacing] for spacing in SPACINGS) for cell in found)
    assert {cell.solver for cell in solvers.ranked(lab, 6, ["dpm2m"])} == {"dpm2m"}


def test_all_samples_judge_the_best_classical_solver_and_those_that_few_do_not_tell_apart(monkeypatch):
    cells = [solvers.Classical(solver=solver, spacing="uniform", nfe=6) for solver in ("unipc", "deis", "ddim")]
    above = dict(zip(cells, (-0.5, -0.02, -0.5), strict=True))  # of the learned solver's FID; its error is 0.01
    lab = SimpleNamespace(sizes=FEW, difference=lambda own, cell: Difference(above[cell], 0.01))
    monkeypatch.setattr(solvers, "judged_learned", lambda lab, nfe: None)
    monkeypatch.setattr(solvers, "chosen", lambda lab, nfe: cells)
    monkeypatch.setattr(solvers, "judged", lambda lab, cell, n: cell)
    assert list(solvers.field(lab, 6).values()) == [FEW.samples, FEW.samples, FEW.fewer]


# ---- losses ----

def exact(x0):
    """The prediction of a network that knows the images: v = alpha noise - sigma x0, of x = alpha x0 + sigma noise."""
    bars = SCHEDULE.alphas_cumprod.double()

    def predict(x, t, labels, step):
        below = t.floor().long().clamp(max=998)
        lam = torch.lerp(*((0.5 * (bars[at] / (1 - bars[at])).log()) for at in (below, below + 1)), (t - below).double())
        alpha, sigma = (torch.sigmoid(sign * 2 * lam).sqrt().float().view(-1, 1, 1, 1) for sign in (1, -1))
        return alpha * (x - alpha * x0) / sigma - sigma * x0

    return predict


def test_the_estimate_at_a_noise_level_is_that_of_the_network_at_its_timestep():
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 1, 4, 4, generator=rng) for _ in range(2))
    sigma = torch.tensor([0.05, 0.3, 1.0, 4.0, 50.0])
    found = losses.estimate(exact(x0), SCHEDULE, x0, noise, sigma, None)
    assert torch.allclose(found, x0, atol=1e-3)


def test_the_time_of_a_noise_level_is_where_the_schedule_has_it():
    told = []
    levels = [100, 500, 900]
    bars = DDIMScheduler.from_config(SCHEDULE.config).alphas_cumprod[levels]
    x = torch.zeros(3, 1, 2, 2)
    losses.estimate(lambda x, t, labels, step: told.append(t) or x, SCHEDULE, x, x, ((1 - bars) / bars).sqrt(), None)
    assert torch.allclose(told[0], torch.tensor([float(t) for t in levels]), atol=1e-2)


def test_the_level_of_the_target_is_zero_at_first_and_comes_nearer_with_each_stage():
    sigma = torch.tensor([0.02, 1.0, 30.0])
    by_stage = [losses.nearer(sigma, stage) for stage in range(losses.STAGES)]
    assert (by_stage[0][:2] == 0).all()
    assert all((before <= after).all() for before, after in pairwise(by_stage))
    # by hand, t = 1, stage 7: 1 - (1 + 8 / (1 + e)) / 2^8
    assert by_stage[7][1] == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 256, abs=1e-6)


def test_consistent_samples_of_a_network_that_knows_the_image_are_that_image():
    x0, seen, network = torch.full((losses.BATCH, 1, 4, 4), 0.2), [], exact(torch.full((losses.BATCH, 1, 4, 4), 0.2))

    def predict(x, t, labels, step):
        seen.append(x)
        return network(x, t, labels, step)

    chunks = list(losses.consistent_samples(predict, SCHEDULE, (999, 499), (1, 4, 4), 30, 0))
    assert [len(chunk) for chunk in chunks] == [25, 5]
    assert np.abs(np.concatenate(chunks).astype(int) - 153).max() <= 1
    bar = DDIMScheduler.from_config(SCHEDULE.config).alphas_cumprod[499]
    fresh = (seen[1] - bar.sqrt() * x0) / (1 - bar).sqrt()
    assert abs(fresh.std() - 1) < 0.1 and abs(torch.corrcoef(torch.stack([seen[0].flatten(), fresh.flatten()]))[0, 1]) < 0.2


def test_the_targets_of_a_trajectory_are_the_states_of_the_finer_one():
    """Against the same solver on the finer list, written out."""
    teacher = tiny_dit()
    noise = torch.randn(3, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    labels, recipe = torch.tensor([0, 1, 2]), Recipe(timesteps=(48, 42, 36, 30, 24, 18, 12, 6), solver="dpm3m")
    wanted = {recipe.timesteps[i]: x for i, x, _ in trajectory(network(teacher), teacher.schedule, recipe, noise, labels)}
    middle, last = losses.teacher_states(teacher, (48, 24), noise, labels)
    assert torch.equal(middle, wanted[24])
    assert torch.equal(last, sample(network(teacher), teacher.schedule, recipe, noise, labels))


@pytest.fixture
def toy_lab(tmp_path):
    teacher = tiny_dit()
    images = np.random.default_rng(0).integers(0, 256, (12, *teacher.sample_shape), dtype=np.uint8)
    pairs = Pairs(images, 7, teacher.num_classes)
    return SimpleNamespace(teacher=teacher, pairs=lambda: pairs, distill=SimpleNamespace(bf16=False))


@pytest.mark.parametrize("kind", ["trajectory", "consistency"])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(toy_lab, kind):
    along = {"trajectory": partial(losses.along_trajectory, toy_lab, spaced_timesteps(toy_lab.teacher.schedule, 2)),
             "consistency": partial(losses.along_levels, toy_lab)}
    step = along[kind]
    whole, first, second = (losses.Plain(toy_lab.teacher, step, 4) for _ in range(3))
    for i in range(4):
        whole.step(i)
    for i in range(2):
        first.step(i)
    second.restore(first.state())
    for i in range(2, 4):
        second.step(i)
    both = [one.ema.module.state_dict() for one in (whole, second)]
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())
    assert any(not torch.equal(value, toy_lab.teacher.model.state_dict()[name]) for name, value in both[0].items())


def test_no_gradient_passes_from_one_step_of_a_trajectory_to_another(toy_lab):
    timesteps = spaced_timesteps(toy_lab.teacher.schedule, 2)
    student = losses.Plain(toy_lab.teacher, None, 1).student
    first, second = list(losses.along_trajectory(toy_lab, timesteps, student, 0, 1))
    second.backward()
    first.backward()  # its graph is its own: the second one's gradient freed nothing of it


# ---- what is due, and how it is written ----

def lab_of(name):
    return SimpleNamespace(name=name, sizes=FEW, judge=SimpleNamespace(features=[0] * 9),
                           how=SimpleNamespace(steps=1, batch=2), teacher=None)


def test_each_job_is_asked_for_once_and_other_seeds_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(students, "ships", lambda lab: lab.name == "mnist_dit")
    plain, more = (study.jobs(lab_of("mnist_dit"), seeds) for seeds in ((), (1, 2)))
    names = [(job.variant, job.seed, job.done) for job in more]
    assert len(set(names)) == len(names) == len(plain) + 2
    assert [job.seed for job in more if job.part == "student"] == [0, 1, 2]
    assert not [job for job in study.jobs(lab_of("mnist_unet"), ()) if job.part in ("student", "composition")]


def test_what_is_there_is_not_due_and_a_new_value_takes_the_old_ones_place(tmp_path, monkeypatch):
    monkeypatch.setattr(students, "ships", lambda lab: True)
    own = study.Study(few=True)
    own.results = tmp_path / "results.csv"
    lab = lab_of("mnist_dit")
    job = next(job for job in study.jobs(lab, ()) if job.part == "student")
    assert not own.has(lab, job)
    for value in (0.5, 0.25):
        own.put(lab, job, {job.variant: {job.done: value}})
    assert own.has(lab, job) and [row["value"] for row in results.read(own.results)] == ["0.25"]
    assert not own.has(lab_of("mnist_unet"), job)


def test_the_composition_that_counts_is_the_better_one_on_held_noises_whatever_its_fid_is(tmp_path, monkeypatch):
    monkeypatch.setattr(students, "ships", lambda lab: True)
    own = study.Study(few=True)
    own.results, lab = tmp_path / "results.csv", lab_of("mnist_dit")
    jobs = {job.variant: job for job in study.jobs(lab, ()) if job.part == "composition"}
    own.conclude(lab)
    assert not own.results.exists()
    for variant, held, fid in zip(study.BOTH, (0.04, 0.05), (0.02, 0.01), strict=True):
        own.put(lab, jobs[variant], {variant: {"held_loss": held, "over_few_steps": fid}})
    own.conclude(lab)
    own.conclude(lab)
    found = [row for row in results.read(own.results) if row["metric"] == study.TOGETHER]
    assert [(row["variant"], row["value"]) for row in found] == [("few_4_2of4_w8a8", "0.02")]


def test_the_readme_has_the_tables_of_the_rows():
    text = study.README.read_text()
    assert table.BLOCK.search(text) and table.replaced(text, results.read(study.HOME / "results.csv")) == text


def test_the_best_classical_solver_of_a_table_is_one_of_those_with_most_samples():
    def row(variant, metric, value):
        return {"teacher": "t", "variant": variant, "seed": "0", "metric": metric, "value": str(value)}

    rows = [row("learned_6", "fid_10k", 0.25), row("learned_6", "learned_over_classical_upper95", -0.04),
            *(row(name, "learned_over_this", -0.1) for name in ("ddim_karras_6", "unipc_karras_6", "deis_uniform_6")),
            row("ddim_karras_6", "fid_1k", 0.1), row("unipc_karras_6", "fid_10k", 0.3), row("deis_uniform_6", "fid_10k", 0.4)]
    assert table.tables(table.values_of(rows)).splitlines()[2] == (
        "| `t` | 6 | 0.2500 | `unipc_karras_6` 0.3000 | -4.0 % | 9 | – | – |")


def test_the_bootstrap_is_paired():
    """The same features have no difference, with no error."""
    rng = np.random.default_rng(0)
    seen, found = rng.normal(size=(80, 3)), rng.normal(size=(50, 3))
    teacher = SimpleNamespace(num_classes=0)
    lab = Lab(name="x", folder=None, data=None, teacher=teacher, judge=Judge(None, seen, None, Gaussian.of(seen)), sizes=FEW)
    assert lab.difference(found, found.copy()) == Difference(0.0, 0.0)
    shifted = lab.difference(found + 1.0, found)
    assert shifted.estimate > 0 and shifted.error > 0
    assert lab.difference(found[:30], found) == Difference(0.0, 0.0)  # as many as both have
