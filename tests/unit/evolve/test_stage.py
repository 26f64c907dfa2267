"""The whole stage on a tiny random DiT: what it writes, that it repeats itself, and that a killed search pays nothing twice."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from tasks.core.artifacts import read_json, write_json
from tasks.core.recipe import Recipe
from tasks.core.sampler import sample_in_chunks
from tasks.evolve import fitness, lab, rounded
from tasks.evolve.lab import EvaluationLog
from tasks.evolve.problem import kinds_of_reuse
from tasks.evolve.promote import Promotion
from tasks.runtime.precision import WIDTHS
from tasks.runtime.rounding import read_integers
from tests.unit.evolve.toy import PARAMS, artifacts, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return artifacts(tmp_path_factory.mktemp("artifacts"))


def test_where_all_blocks_are_skipped_at_once_one_limit_on_masks_is_enough(tmp_path):
    for sublayers, limits in (["trunk"], [4]), (["a", "b"], [2, 4]):
        write_json(tmp_path / "grid.json", {"sublayers": sublayers, "forecast": "taylor"})
        kinds = kinds_of_reuse(tmp_path, (2, 4))
        assert kinds == tuple((limit, forecast) for limit in limits for forecast in ("taylor", "none"))


@pytest.fixture(scope="module")
def first(folders, tmp_path_factory):
    """One run: its working directory, its output folder, its report."""
    room = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        report = run(PARAMS, folders, room / "out")
    return room, report


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_writes_what_package_reads(first):
    room, report = first
    best = Recipe.from_json(read_json(room / "out" / "recipe.json"))
    single = {k: Recipe.from_json(v) for k, v in read_json(room / "out" / "single.json").items()}
    weights = read_json(room / "out" / "weights.json")
    assert weights["name"] == report.numbers["best"]["weights"] and weights["grain"] == (best.sparsity or {}).get("grain")
    assert single["timesteps"].nfe == best.nfe and not single["timesteps"].precision
    assert single["precision"].timesteps == (99, 74, 49, 24) and single["precision"].sparsity is None
    assert set(contents(room / "out")) == {"recipe.json", "weights.json", "single.json", "pareto.csv", "evaluations.jsonl"}


def test_finals_choose_by_fid_and_judge_the_chosen_at_every_one_precision(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finals = replace(PARAMS.finals, images=100)
    numbers = run(replace(PARAMS, evaluations=4, single_evaluations=1, finals=finals), folders, tmp_path / "out").numbers
    found, best = numbers["finals"], numbers["best"]
    bound, rule = PARAMS.goal.max_quality_loss, numbers["choice"]["rule"]
    held = {"certain": [f for f in found if f["loss_upper95"] <= bound], "likely": [f for f in found if f["loss"] <= bound]}
    key = "loss" if rule == "nearest" else "cost"
    chosen = next(f for f in found if (f["cost"], f["distance"]) == (best["cost"], best["distance"]))
    assert chosen[key] == min(f[key] for f in held.get(rule, found))
    assert all({"loss", "loss_upper95", "cost", "weights"} <= f.keys() for f in found) and 2 <= len(found) <= 4 + 3


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_every_evaluation_is_within_the_bound_and_the_nearest_is_the_nearest(first):
    room, report = first
    rows = rows_of(room / "out")
    assert len(rows) == report.numbers["evaluations"] > 16 and report.numbers["failed"] == 0
    assert all(row["cost"] <= 1 / 8 for row in rows)
    grains = [row["recipe"]["sparsity"] for row in rows]
    assert None in grains, "the dense weights compete"
    assert all(g["density"]["transformer_blocks.0.ff.net.0.proj"] == 0.5 for g in grains if g) and any(grains)
    assert report.numbers["choice"]["nearest"]["distance"] == min(row["distance"] for row in rows)
    assert sorted(rows, key=lambda row: row["cost"]) == rows
    volumes = [volume for _, volume in report.numbers["hypervolume"]]
    assert volumes == sorted(volumes) and volumes[-1] > 0


def sampling(row: dict) -> tuple[str, int, str]:
    precision = row["recipe"]["precision"]
    return row["weights"], len(row["recipe"]["timesteps"]), " ".join(sorted(set(precision.values()))) if precision else "fp32"


def test_every_learned_solver_and_student_is_seen_at_every_precision(first):
    """Where a precision is faster than all that are more accurate, which in this profile each is."""
    room, _ = first
    learned = {sampling(row) for row in rows_of(room / "out") if row["recipe"]["solver"] == "learned" and
               row["recipe"]["cache"] is None}
    wanted = {(weights, steps, token) for weights, steps in (("teacher", 3), ("teacher", 5), ("few_2", 2), ("few_4", 4),
                                                             ("student_unit", 3), ("student_unit", 5))
              for token in ("fp32", "bf16", "w8a8")}
    assert wanted <= learned
    few = [row["recipe"] for row in rows_of(room / "out") if row["weights"] == "few_4"]
    assert all(recipe["solver"] == "learned" and recipe["rows"][3]["t"] == 12.25 and recipe["sparsity"] for recipe in few)


def with_log_of(first, room, monkeypatch) -> None:
    """What the first run evaluated is known in `room`, too."""
    shutil.copytree(first[0] / "runs" / "evolve", room / "runs" / "evolve")
    monkeypatch.chdir(room)


def test_where_nothing_holds_the_quality_the_nearest_ships_and_dull_rivals_were_tried(first, folders, tmp_path, monkeypatch):
    with_log_of(first, tmp_path, monkeypatch)
    numbers, rows = run(replace(PARAMS, distance_per_loss=0.1), folders, tmp_path / "out").numbers, rows_of(tmp_path / "out")
    assert numbers["choice"]["rule"] == "nearest" and numbers["choice"]["cheapest"] is None
    assert not numbers["goal"]["met_by_proxy"] and numbers["goal"]["least_cost_within_tolerance"] is None
    best, dull = numbers["best"], numbers["dull"]
    rivals = [row for row in rows if row["weights"] == "teacher" and row["cost"] <= best["cost"] and
              row["recipe"]["solver"] != "learned" and row["recipe"]["cache"] is None]
    assert dull["nearest_at_its_cost"]["distance"] >= min(row["distance"] for row in rivals)
    assert dull["ahead"] == (dull["nearest_at_its_cost"]["distance"] > best["distance"])


def test_where_much_is_tolerated_the_cheapest_ships(first, folders, tmp_path, monkeypatch):
    """It is one of the students of fewest steps, and package finds its weights."""
    with_log_of(first, tmp_path, monkeypatch)
    numbers = run(replace(PARAMS, distance_per_loss=1e5), folders, tmp_path / "out").numbers
    rows = rows_of(tmp_path / "out")
    assert numbers["choice"]["rule"] == "cheapest" and numbers["goal"]["met_by_proxy"]
    assert numbers["best"] == numbers["choice"]["cheapest"] and numbers["best"]["cost"] == min(row["cost"] for row in rows)
    assert numbers["choice"]["nearest"]["distance"] == min(row["distance"] for row in rows)
    assert read_json(tmp_path / "out" / "weights.json") == {
        "name": "few_2", "file": "student_few_2.safetensors", "masks": None, "grain": None}
    recipe = Recipe.from_json(read_json(tmp_path / "out" / "recipe.json"))
    assert recipe.solver == "learned" and [row.t for row in recipe.rows] == [97.5, 40.0]


def test_proxies_of_distributions_share_a_log_and_add_up(first, folders, tmp_path, monkeypatch):
    """What searches by `frechet` and by `sum` both ask, which is all that they start from, is sampled once."""
    with_log_of(first, tmp_path, monkeypatch)
    few, distances, counts = replace(PARAMS, evaluations=1, single_evaluations=1), {}, {}
    for proxy in ("paired", "frechet", "sum"):
        sampled = []
        monkeypatch.setattr(fitness, "sample_in_chunks", counted(sample_in_chunks, sampled))
        run(replace(few, proxy=proxy), folders, tmp_path / proxy)
        counts[proxy] = len(sampled)
        distances[proxy] = {json.dumps(row["recipe"]): row["distance"] for row in rows_of(tmp_path / proxy)}
    assert len([*(tmp_path / "runs" / "evolve").iterdir()]) == 2 and counts["sum"] < 10 < counts["frechet"]
    both = set.intersection(*(set(found) for found in distances.values()))
    paired, frechet, added = ([found[key] for key in both] for found in distances.values())
    assert len(both) > 30 and added == pytest.approx(np.add(paired, frechet)) and min(frechet) > 0


def test_repeats_itself_and_pays_nothing_twice(first, folders, tmp_path, monkeypatch):
    """The second run finds the first one's log, less its last lines, as after a kill: only those are evaluated again."""
    room, report = first
    monkeypatch.chdir(tmp_path)
    (log,) = (room / "runs" / "evolve").iterdir()
    lines = log.read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "evolve").mkdir(parents=True)
    (tmp_path / "runs" / "evolve" / log.name).write_text("".join(lines[:-3]) + lines[-3][:20])
    sampled = []
    monkeypatch.setattr(fitness, "sample_in_chunks", counted(fitness.sample_in_chunks, sampled))
    assert run(PARAMS, folders, tmp_path / "out") == report
    assert contents(tmp_path / "out") == contents(room / "out") and len(sampled) == 3
    assert sorted((tmp_path / "runs" / "evolve" / log.name).read_text().splitlines()) == sorted(line.strip() for line in lines)


def counted(function, calls: list):
    def wrapper(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)
    return wrapper


def test_other_seed_other_search(first, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(first[0])  # the log is shared: evaluations of equal recipes are found there
    report = run(replace(PARAMS, seed=1), folders, tmp_path / "out")
    assert contents(tmp_path / "out")["evaluations.jsonl"] != contents(first[0] / "out")["evaluations.jsonl"]
    assert report.numbers["evaluations"] > 16


@pytest.mark.parametrize("target", ["bitops", "size"])
def test_other_targets_search_bits(folders, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    params = replace(PARAMS, goal=replace(PARAMS.goal, target=target, max_bitops=0.02, max_size=8000), evaluations=6,
                     single_evaluations=2)
    report = run(params, folders, tmp_path / "out")
    precision = Recipe.from_json(read_json(tmp_path / "out" / "recipe.json")).precision
    assert all(token[0] == "w" for token in precision.values()) and len(precision) > 10
    assert report.numbers["best"]["cost"] <= report.numbers["goal"]["bound"]


def test_the_first_and_the_last_layer_have_the_fewest_bits_that_are_asked_for(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    goal = replace(PARAMS.goal, target="bitops", max_bitops=0.02)
    run(replace(PARAMS, goal=goal, edge_bits=8, evaluations=32, single_evaluations=2), folders, tmp_path / "out")
    lines = (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line)["recipe"]["precision"] for line in lines]
    assert {row[layer] for row in rows for layer in ("pos_embed.proj", "proj_out_2")} == {"w8a8"}
    assert len({token for row in rows for token in row.values()}) > 5


def test_learned_rounding_is_learned_once_and_found_by_the_workers(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = replace(PARAMS, goal=replace(PARAMS.goal, target="bitops", max_bitops=0.02), evaluations=4, single_evaluations=1)
    run(params, folders, tmp_path / "nearest")
    learned, calls = replace(params, rounding_steps=3), []
    monkeypatch.setattr(rounded, "learn_rounding", counted(rounded.learn_rounding, calls))
    run(learned, folders, tmp_path / "out")
    assert len(calls) == 4 * len(WIDTHS), "teacher and students, every width"
    run(learned, folders, tmp_path / "again")
    assert len(calls) == 4 * len(WIDTHS) and contents(tmp_path / "again") == contents(tmp_path / "out")
    distances = [{json.dumps(row["recipe"]): row["distance"] for row in map(json.loads, path.read_text().splitlines())}
                 for path in (tmp_path / name / "evaluations.jsonl" for name in ("nearest", "out"))]
    seeds = distances[0].keys() & distances[1].keys()
    assert seeds and all(distances[0][seed] != distances[1][seed] for seed in seeds)
    student, teacher = (read_integers(tmp_path / "out" / "rounding" / file)
                        for file in ("student_unit.safetensors", "teacher.safetensors"))
    mask = load_file(folders["distill"] / "masks_unit.safetensors")["transformer_blocks.0.ff.net.0.proj.weight"].bool()
    assert all(not student["transformer_blocks.0.ff.net.0.proj", bits][~mask].any() for bits in WIDTHS), "zeros stay"
    assert student.keys() == teacher.keys() and not (tmp_path / "nearest" / "rounding").exists()


def test_with_promotion_fewer_images_are_evaluated_and_nothing_is_paid_twice(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = replace(PARAMS, protocol=replace(PARAMS.protocol, images=12), promotion=Promotion(images=4, z=0.5), evaluations=40)
    sampled = []
    monkeypatch.setattr(fitness, "sample_in_chunks", counted(fitness.sample_in_chunks, sampled))
    report = run(params, folders, tmp_path / "out")
    images = [args[4] for args in sampled]
    (log,) = (tmp_path / "runs" / "evolve").iterdir()
    lines = log.read_text().splitlines(keepends=True)
    counts = [len(kept["paired"]) for _, kept in map(json.loads, lines[2:])]  # the teacher's own features come first
    assert set(counts) == {4, 12} and sum(images) == sum(counts) + 2 * 12
    log.write_text("".join(lines[:-3]) + lines[-3][:20])
    sampled.clear()
    assert run(params, folders, tmp_path / "again") == report and contents(tmp_path / "again") == contents(tmp_path / "out")
    assert 3 <= len(sampled) <= 6, "three evaluations, in one or two parts each"


def test_promotion_from_a_part_of_a_chunk_is_one_line():
    for images in (1, 3, 12):
        with pytest.raises(ValueError, match=f"promotion.images: {images} is neither 0 nor a multiple of protocol.chunk, 4, "
                                             "from 2 to below protocol.images, 12"):
            replace(PARAMS, protocol=replace(PARAMS.protocol, images=12), promotion=Promotion(images=images, z=1.0))


@pytest.mark.parametrize("proxy", ["frechet", "sum"])
def test_a_proxy_of_distributions_wants_images_and_no_promotion(proxy):
    with pytest.raises(ValueError, match=f"evolve.protocol.images: 2 is below 3, which proxy {proxy} needs"):
        replace(PARAMS, proxy=proxy, protocol=replace(PARAMS.protocol, images=2))
    with pytest.raises(ValueError, match=f"promotion.images: 4 is not 0: by proxy {proxy} an image has no loss of its own"):
        replace(PARAMS, proxy=proxy, protocol=replace(PARAMS.protocol, images=8), promotion=Promotion(images=4, z=1.0))


def test_goal_out_of_reach_is_one_line_with_the_nearest(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = replace(PARAMS, goal=replace(PARAMS.goal, min_speedup=5000.0))
    with pytest.raises(ValueError, match=r"goal.min_speedup: 5000.0 is out of reach; .* feasible is \d+.* with 2 steps"):
        run(params, folders, tmp_path / "out")
    assert not (tmp_path / "runs").exists()


def test_more_groups_than_timesteps_is_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"evolve.steps: \[2, 101\] wants up to 101 timesteps, .* schedule has 100$"):
        run(replace(PARAMS, steps=(2, 101)), folders, tmp_path / "out")


@pytest.mark.slow
def test_two_workers_write_the_same_files(first, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(PARAMS, folders, tmp_path / "out", workers=2) == first[1]
    assert contents(tmp_path / "out") == contents(first[0] / "out")


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "log.jsonl"
    log = EvaluationLog(path)
    log.add("a", 1.5)
    log.add("b", [[0.1, 0.2]])
    path.write_bytes(path.read_bytes()[:-4])
    again = EvaluationLog(path)
    assert again.known == {"a": 1.5}
    again.add("c", 2.5)
    assert EvaluationLog(path).known == {"a": 1.5, "c": 2.5}


def test_a_log_waits_for_the_disk_once_a_second_and_writes_at_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(lab.os, "fsync", synced.append)
    log = EvaluationLog(tmp_path / "log.jsonl")
    for i in range(50):
        log.add(str(i), float(i))
        assert len(EvaluationLog(tmp_path / "log.jsonl").known) == i + 1
    assert 1 <= len(synced) < 25
    log.synced -= lab.SYNC_S
    before = len(synced)
    log.add("later", 1.0)
    assert len(synced) == before + 1


@pytest.mark.parametrize("key, value", [("steps", (5, 3)), ("cache_budgets", (0.5, 0.2)), ("solvers", ("euler",)),
                                        ("proxy", "pairs"), ("evaluations", 0)])
def test_params_name_the_bad_value(key, value):
    with pytest.raises(ValueError, match=key):
        replace(PARAMS, **{key: value})


@pytest.mark.parametrize("change", [{"kind": "tmpq_dm"}, {"kind": "random"}, {"offspring": 4}])
def test_every_strategy_stays_within_the_bound(first, folders, tmp_path, monkeypatch, change):
    """More evaluations than the surrogate waits for."""
    monkeypatch.chdir(first[0])  # the log is shared
    strategy = replace(PARAMS.strategy, **change)
    report = run(replace(PARAMS, evaluations=30, single_evaluations=2, strategy=strategy), folders, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert len(rows) == report.numbers["evaluations"] > 30 and all(row["cost"] <= 1 / 8 for row in rows)


def test_the_finalist_learns_weights_for_its_list(folders, tmp_path, monkeypatch):
    """Where every candidate caches, and few steps leave errors to make up for: what ships has the weights, what was searched
    has not."""
    copy = tmp_path / "cache_learn"
    shutil.copytree(folders["cache_learn"], copy)
    grid = read_json(copy / "grid.json")
    write_json(copy / "grid.json", grid | {"learn": {"images": 4, "steps": 3, "batch": 2, "lr": 0.01, "window": 20}})
    monkeypatch.chdir(tmp_path)
    few = replace(PARAMS, cache_budgets=(0.3,), steps=(2, 6), evaluations=4, single_evaluations=1, distance_per_loss=0.1)
    found = run(few, folders | {"cache_learn": copy}, tmp_path / "out").numbers
    shipped = Recipe.from_json(read_json(tmp_path / "out" / "recipe.json"))
    nearer = found["distance_with_learned_weights"] < found["best"]["distance"]
    assert nearer and shipped.cache.forecast == "learned", "plain reuse is far from the best weights"
    rows = [json.loads(line) for line in (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert all(row["recipe"]["cache"]["forecast"] == "none" for row in rows)
