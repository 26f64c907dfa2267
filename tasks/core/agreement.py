"""What no block of params.yaml can check alone: blocks that must agree, and goals that no setting of them can reach."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.params import check_choice, check_keys
from tasks.core.sampler import pipeline_timesteps
from tasks.core.schedule import Schedule
from tasks.core.shipped import learned_from

# One evaluation against dense at fp32, at best: int8 is at most 16 times as fast (AMX on AVX-512), 3 bits are 9/1024 of the
# BitOPs and 3/32 of the bytes; 2:4 halves that, units remove `mask_search.unit_share` of it.
MOST_SPEEDUP, LEAST_BITOPS, LEAST_BYTES = 16, 9 / 1024, 3 / 32
BACKENDS = ("openvino", "eager")
NODE = ("cpus", "gpus")  # what a stage may ask of its node


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is known of the images before they are read."""

    side: int         # pixels
    channels: int
    num_classes: int  # 0: without labels
    images: int


def check(params: dict, stages: tuple[str, ...]) -> None:
    """params: resolved, every block of a stage valid by itself. Raises ValueError with key, value and bound."""
    check_resources(params["resources"], stages)
    check_backends(params)
    check_batches(params)
    check_pairs(params)
    check_noise(params)
    check_goal(params["goal"], params)


def check_backends(params: dict) -> None:
    """Those that profile and benchmark time."""
    for stage in ("mask_search", "evolve", "report"):
        check_choice(f"{stage}.backend", params[stage]["backend"], BACKENDS)


def check_batches(params: dict) -> None:
    timed, measured = params["profile"]["batches"], params["benchmark"]["batches"]
    wanted = {"mask_search.batch": params["mask_search"]["batch"], "evolve.batch": params["evolve"]["batch"],
              "fid.dull.batch": params["fid"]["dull"]["batch"]}
    for key, batch in wanted.items():
        if batch not in timed:
            raise ValueError(f"{key}: {batch} is not one of profile.batches: {timed}")
    if (batch := params["report"]["batch"]) not in measured:
        raise ValueError(f"report.batch: {batch} is not one of benchmark.batches: {measured}")
    for key in ("backend", "batch"):
        if (judged := params["report"][key]) != (timed := params["benchmark"][key]):
            raise ValueError(f"report.{key}: {judged} is not benchmark.{key}: {timed}, where a close verdict is timed on; "
                             "make them equal")


def check_pairs(params: dict) -> None:
    """Few steps learn from the teacher's images of solver_learn, made with more steps, and hold some of them out."""
    learn, few = params["solver_learn"], params["distill"]["few_steps"]
    held = {"finish.held": params["finish"]["held"]}
    held |= {"distill.few_steps.held": few["held"]} if few["evaluations"] else {}
    for key, count in held.items():
        if count >= learn["noises"]:
            raise ValueError(f"{key}: {count} is not below solver_learn.noises: {learn['noises']}, of which it is a part")
    for key, evaluations in (("solver_learn", learn["evaluations"]), ("distill.few_steps", few["evaluations"])):
        if (most := max(evaluations, default=1)) >= learn["teacher"]["steps"]:
            raise ValueError(f"{key}.evaluations: {most} is not below solver_learn.teacher.steps: {learn['teacher']['steps']}, "
                             "by which it learns")


def check_noise(params: dict) -> None:
    """Nothing is judged on noise that another stage learned or chose with; fid itself knows of its dull front's."""
    def seeds(*keys: str) -> dict[str, int]:
        return {key: functools.reduce(dict.__getitem__, key.split("."), params) for key in keys}

    learned = seeds("solver_learn.seed")
    guided = learned | seeds("pretrain_load.seed", "mask_search.seed", "cache_learn.seed", "evolve.protocol.seed")
    chosen = guided | seeds("evolve.finals.seed", "finish.seed", "package.seed")
    for key, others in (("evolve.protocol.seed", learned), ("evolve.finals.seed", guided), ("fid.seed", chosen)):
        for other, seed in others.items():
            if seeds(key)[key] == seed:
                raise ValueError(f"{key}: {seed} is {other}, too: samples would be judged on noise that something was chosen "
                                 "with")


def check_learned(params: dict, seeds: dict[str, list]) -> None:
    """seeds: of the noises that students which ship beside the teacher learned from, by file."""
    judges = {"fid.seed": params["fid"]["seed"],
              **{f"evolve.{block}.seed": params["evolve"][block]["seed"] for block in ("protocol", "finals")}}
    for key, seed in judges.items():
        for other in (other for other, learned in seeds.items() if seed in learned):
            raise ValueError(f"{key}: {seed} is that of pairs in {other}: samples would be judged on noise that the student "
                             "learned from")


def check_goal(goal: dict, params: dict) -> None:
    """Bounds that are generous on purpose: what passes may still not be reached, what does not never is."""
    evolve, kept = params["evolve"], least_kept(params)
    steps = min(evolve["steps"][0], *params["solver_learn"]["evaluations"], *params["distill"]["few_steps"]["evaluations"])
    budget = max(evolve["cache_budgets"])
    share = steps / evolve["dense_steps"] * (1 - budget) * kept
    by = f"nothing reaches with {steps} steps (evolve, solver_learn, distill.few_steps) and cache_budgets up to {budget}"
    if goal["target"] == "latency" and goal["min_speedup"] > (most := MOST_SPEEDUP / share):
        raise ValueError(f"goal.min_speedup: {goal['min_speedup']} is above {most:.0f}, which {by}")
    if goal["target"] == "bitops" and goal["max_bitops"] < (least := share * LEAST_BITOPS):
        raise ValueError(f"goal.max_bitops: {goal['max_bitops']} is below {least:.2g}, which {by}")


def check_known(params: dict, known: dict) -> None:
    """known: stage -> what its preflight returned; a teacher (a Denoiser) that is still to be fetched is None."""
    teacher = known["pretrain_load"]
    if params["pretrain_load"]["source"] == "folder":
        check_learned(params, learned_from(Path(params["pretrain_load"]["path"])))
    if teacher is not None:
        check_size(params, sum(p.numel() for p in teacher.model.parameters()))
        check_samples(params["fid"], teacher.num_classes)
        check_steps(params, teacher.schedule)


def check_size(params: dict, parameters: int) -> None:
    """parameters: of the teacher, whose layers take LEAST_BYTES of fp32 at 3 bits."""
    goal, dense = params["goal"], 4 * parameters
    if goal["target"] == "size" and goal["max_size"] < (least := int(dense * LEAST_BYTES * least_kept(params))):
        raise ValueError(f"goal.max_size: {goal['max_size']} is below {least} bytes, which nothing reaches with a teacher of "
                         f"{dense} bytes at 3 bits and mask_search.unit_share as it is")


def check_samples(fid: dict, num_classes: int) -> None:
    """The KID compares pairs of one class, and label i is i mod classes."""
    for key, samples in (("fid.samples", fid["samples"]), ("fid.dull.rounds", fid["dull"]["rounds"][0])):
        if samples < 2 * num_classes:
            raise ValueError(f"{key}: {samples} is below {2 * num_classes}, two samples of each of the teacher's {num_classes} "
                             "classes")


def least_kept(params: dict) -> float:
    return min(0.5, 1 - params["mask_search"]["unit_share"])


def check_steps(params: dict, schedule: Schedule) -> None:
    """No list has more steps than the teacher's noise schedule has timesteps, and dense leaves room for twice its own: the
    distance between the two is the unit of fidelity. schedule: the teacher's."""
    wanted, total = asked_steps(params), schedule.steps
    for key, steps in wanted.items():
        if steps > total:
            raise ValueError(f"{key}: {steps} is above {total}, the teacher's num_train_timesteps")
    if 2 * wanted["package.dense_steps"] > total:
        raise ValueError(f"package.dense_steps: {wanted['package.dense_steps']} is above {total // 2}, half of the teacher's "
                         "num_train_timesteps: what twice its steps change is the unit of fidelity")
    for key, times in (("pretrain_load.bank_steps", 1), ("evolve.dense_steps", 1), ("package.dense_steps", 1),
                       ("package.dense_steps", 2)):
        try:
            pipeline_timesteps(schedule, times * wanted[key])
        except ValueError as error:  # of steps_offset
            raise ValueError(f"{key}: {wanted[key]}: {error}") from None


def asked_steps(params: dict) -> dict[str, int]:
    """Every number of timesteps that a list is made of, by its key."""
    evolve = params["evolve"]
    return {**{f"{stage}.{key}": params[stage][key] for stage, key in (
        ("pretrain_load", "bank_steps"), ("mask_search", "steps"),
        ("cache_learn", "base_steps"), ("cache_learn", "grid"),
        ("evolve", "dense_steps"), ("package", "dense_steps"))},
        "solver_learn.teacher.steps": params["solver_learn"]["teacher"]["steps"],
        "evolve.steps": evolve["steps"][-1], "evolve.protocol.calibration_steps": evolve["protocol"]["calibration_steps"],
        "fid.dull.steps": max(params["fid"]["dull"]["steps"])}


def check_resources(resources: Any, stages: tuple[str, ...]) -> None:
    """{stage: {cpus, gpus}}, or null."""
    if not isinstance(resources or {}, dict):
        raise ValueError(f"resources: {resources!r} is not a block of keys")
    for stage, asked in (resources or {}).items():
        check_choice("resources", stage, stages)
        if not isinstance(asked, dict):
            raise ValueError(f"resources.{stage}: {asked!r} is not a block of {', '.join(NODE)}")
        check_keys(f"resources.{stage}", {**dict.fromkeys(NODE), **asked}, NODE)
        for name, value in asked.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1024:
                raise ValueError(f"resources.{stage}.{name}: {value!r} is not between 0 and 1024")
