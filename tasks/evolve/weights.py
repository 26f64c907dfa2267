"""The weights that may be chosen: the teacher's and those that distill left, with the solvers that were learned for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from tasks.core.artifacts import Inputs, read_json
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.sparsity import kept_shares

TEACHER = "teacher"
DENSE = "dense"  # the teacher's name in solvers.json
STUDENTS = {"unit": "student_unit", "2:4": "student_2_4"}  # that any list samples, by their grain


@dataclass(frozen=True, kw_only=True)
class Weights:
    file: str | None = None          # of distill; None: the teacher's own
    masks: str | None = None         # of distill: those that are live
    sparsity: Mapping | None = None  # as in a recipe
    own: Mapping[str, Recipe] = field(default_factory=dict)  # solvers that were learned for them, by name
    tied: bool = False               # whether they were trained for their own solvers alone

    def to_json(self, name: str) -> dict:
        return {"name": name, "file": self.file, "masks": self.masks, "grain": self.sparsity and self.sparsity["grain"]}


def read_weights(inputs: Inputs, teacher: Denoiser, grain: str | None) -> dict[str, Weights]:
    """By name. grain: of the student for any list that pays on the target, None: none does."""
    solvers, students = dict(learned_solvers(inputs)), dict(few_step_students(inputs["distill"]))
    if grain is not None:
        name = STUDENTS[grain]
        students = {name: {"file": f"{name}.safetensors", "masks": f"{name.replace('student', 'masks')}.safetensors",
                           "grain": grain, "own": solvers.get(DENSE, {})}} | students
    found = {TEACHER: Weights(own=solvers.get(DENSE, {}))}
    for name, student in students.items():
        own = student["own"] | solvers.get(name, {})
        found[name] = Weights(file=student["file"], masks=student["masks"], own=own, tied=student.get("tied", False),
                              sparsity=sparsity_of(teacher, student["grain"], inputs["distill"], student["masks"]))
    return found


def learned_solvers(inputs: Inputs) -> Iterator[tuple[str, dict[str, Recipe]]]:
    """Weights' name, their solvers by name, of solver_learn's solvers.json; nothing where there is no such stage."""
    if "solver_learn" not in inputs.folders:
        return
    path = inputs["solver_learn"] / "solvers.json"
    for weights, by_steps in read_json(path).items():
        yield weights, {f"learned_{nfe}": learned(path, f"{weights}, {nfe}", entry) for nfe, entry in by_steps.items()}


def few_step_students(distill: Path) -> Iterator[tuple[str, dict]]:
    """Name and facts of distill's students.json; nothing where it trained none."""
    path = distill / "students.json"
    for entry in read_json(path) if path.exists() else []:
        own = {entry["name"]: learned(path, entry["name"], entry)} if entry["rows"] else {}
        yield entry["name"], {**entry, "own": own, "tied": bool(own)}


def learned(path: Path, what: str, entry: Mapping) -> Recipe:
    """Raises ValueError naming the file and the entry that means nothing."""
    try:
        return Recipe.from_json({"timesteps": entry["timesteps"], "solver": "learned", "rows": entry["rows"], "cache": None,
                                 "precision": {}, "sparsity": None})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {what}: {error}") from None


def sparsity_of(teacher: Denoiser, grain: str | None, distill: Path, masks: str | None) -> dict | None:
    """The recipe's entry for the masks that are live in a student."""
    if masks is None:
        return None
    found = {name: mask.bool() for name, mask in load_file(distill / masks).items()}
    return {"grain": grain, "density": kept_shares(teacher.model, grain, found)}
