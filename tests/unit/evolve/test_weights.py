"""Which weights there are to choose from, as the stages before leave them."""

import pytest

from tasks.core.artifacts import Inputs, read_json, write_json
from tasks.core.denoiser import load
from tasks.evolve.fitness import Protocol, base_of, calibration_states
from tasks.evolve.weights import Weights, read_weights
from tests.unit.evolve.toy import artifacts


@pytest.fixture
def inputs(tmp_path):
    return Inputs(artifacts(tmp_path), "key")


def read(inputs, grain="unit"):
    return read_weights(inputs, load(inputs["pretrain_load"] / "teacher"), grain)


def test_students_for_any_list_have_the_teachers_solvers_and_those_of_few_steps_their_own(inputs):
    found = read(inputs)
    assert [*found] == ["teacher", "student_unit", "few_2", "few_4"]
    assert [[*weights.own] for weights in found.values()] == [["learned_3", "learned_5"]] * 2 + [["few_2"], ["few_4"]]
    assert [name for name, weights in found.items() if weights.tied] == ["few_2", "few_4"]
    assert found["teacher"] == Weights(own=found["student_unit"].own)
    assert found["few_4"].sparsity["grain"] == "unit" and found["few_4"].sparsity == found["student_unit"].sparsity
    assert found["few_2"].sparsity is None and found["few_2"].own["few_2"].timesteps == (98, 40)
    assert [*read(inputs, None)] == ["teacher", "few_2", "few_4"]


def test_a_student_may_have_learned_solvers_besides(inputs):
    path = inputs["solver_learn"] / "solvers.json"
    solvers = read_json(path)
    write_json(path, solvers | {"few_2": {"3": solvers["dense"]["3"]}})
    assert [*read(inputs)["few_2"].own] == ["few_2", "learned_3"]


def test_without_the_stage_or_students_there_are_the_teachers(inputs):
    (inputs["distill"] / "students.json").unlink()
    folders = {name: path for name, path in inputs.folders.items() if name != "solver_learn"}
    found = read(Inputs(folders, "key"), None)
    assert found == {"teacher": Weights()}


@pytest.mark.parametrize("stage, name, path, wrong, said", [
    ("solver_learn", "solvers.json", ("dense", "3", "rows"), None, "solvers.json: dense, 3: recipe: rows are missing"),
    ("solver_learn", "solvers.json", ("dense", "3", "timesteps"), [60, 95, 25], "dense, 3: recipe: timesteps .* not strictly"),
    ("distill", "students.json", (0, "timesteps"), [98], "students.json: few_2: recipe: rows .* is not a list of one object"),
    ("distill", "students.json", (1, "rows", 0), {"t": 3.0}, "students.json: few_4: recipe: rows: step 0: key 'p' is missing")])
def test_an_entry_that_means_nothing_is_named(inputs, stage, name, path, wrong, said):
    file = inputs[stage] / name
    data = whole = read_json(file)
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = wrong
    write_json(file, whole)
    with pytest.raises(ValueError, match=said):
        read(inputs)


def test_weights_of_few_steps_are_calibrated_on_the_states_that_they_know(inputs):
    """As many states, of more images."""
    found, protocol = read(inputs), Protocol(images=4, seed=1, chunk=4, calibration_steps=4, calibration_images=6, prefix_mb=0)
    teacher = load(inputs["pretrain_load"] / "teacher")
    for name, times, images in (("few_2", [97.5, 40.0], 12), ("teacher", [99, 74, 49, 24], 6)):
        states = [(t[0].item(), len(x)) for x, t, _ in calibration_states(teacher, protocol, base_of(found[name]))]
        assert states == [(t, images) for t in times]
