"""The README's tables, made of the rows of results.csv. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.few_steps import losses, solvers, students

BEGIN, END = "<!-- results.csv: python -m benchmarks.few_steps --table -->", "<!-- end of results.csv -->"
BLOCK = re.compile(f"({BEGIN}\n).*?({END})", re.DOTALL)

Values = Mapping[tuple[str, str, str, str], str]  # teacher, variant, seed, metric -> value


def values_of(rows: Iterable[Mapping]) -> Values:
    return {(row["teacher"], row["variant"], row["seed"], row["metric"]): row["value"] for row in rows}


def replaced(readme: str, rows: Iterable[Mapping]) -> str:
    """The text with the tables between its markers."""
    return BLOCK.sub(lambda found: f"{found[1]}{tables(values_of(rows))}{found[2]}", readme)


def tables(values: Values) -> str:
    parts = [solver_table(values), student_table(values), composition_table(values), loss_table(values)]
    return "".join(f"{part}\n" for part in parts if part)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Nothing without a row."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if body else ""


def shown(value: str | None) -> str:
    return "–" if value is None else f"{float(value):.4f}"


def percent(value: str | None) -> str:
    return "–" if value is None else f"{100 * float(value):+.1f} %"


def fid_of(values: Values, teacher: str, variant: str, seed: str = "0") -> tuple[str, str] | None:
    """Of the most samples: metric, value."""
    found = [(metric, value) for (*name, metric), value in values.items()
             if name == [teacher, variant, seed] and re.fullmatch(r"fid_\d+k?", metric)]
    return max(found, key=lambda pair: size(pair[0]), default=None)


def size(metric: str) -> int:
    """Samples that a FID is named after."""
    return int(metric.removeprefix("fid_").replace("k", "000"))


def solver_table(values: Values) -> str:
    body = []
    for teacher, nfe in teachers_and(values, "learned_(\\d+)"):
        names = {variant for one, variant, _, metric in values
                 if one == teacher and variant.endswith(f"_{nfe}") and metric == "learned_over_this"}
        found = {name: fid_of(values, teacher, name) for name in names}
        most = max(size(metric) for metric, _ in found.values())
        best = min((name for name in names if size(found[name][0]) == most), key=lambda name: float(found[name][1]))
        own, more = f"learned_{nfe}", solvers.more_evaluations(int(nfe))
        over_more = [values.get((teacher, own, "0", f"learned_over_best_at_1.5x{end}")) for end in ("", "_upper95")]
        body.append([f"`{teacher}`", nfe, shown(fid_of(values, teacher, own)[1]), f"`{best}` {shown(found[best][1])}",
                     percent(values.get((teacher, own, "0", "learned_over_classical_upper95"))), str(more),
                     *map(percent, over_more)])
    return markdown(["teacher", "evaluations", "FID, learned", "best classical", "worst of all eight, bound (Holm)",
                     "1.5 times as many", "learned over the best of them", "bound"], body)


def teachers_and(values: Values, pattern: str) -> list[tuple[str, str]]:
    """Teachers and what the pattern's group says, of variants that have a FID of many samples."""
    found = {(teacher, match[1]) for teacher, variant, _, metric in values
             if (match := re.fullmatch(pattern, variant)) and metric.startswith("fid_")}
    return sorted(found, key=lambda pair: (pair[0], len(pair[1]), pair[1]))


def student_table(values: Values) -> str:
    name, (solver, nfe) = students.NAME, students.BASE
    over = f"{name}_over_{solver}_{nfe}"
    keys = sorted((teacher, seed) for teacher, variant, seed, metric in values if (variant, metric) == (name, over))
    body = [[f"`{teacher}`", seed, shown(fid_of(values, teacher, name, seed)[1]),
             shown(values[teacher, name, seed, f"fid_{solver}_{nfe}"]), percent(values[teacher, name, seed, over]),
             percent(values[teacher, name, seed, f"{over}_upper95"])] for teacher, seed in keys]
    return markdown(["teacher", "seed", f"FID, `{name}`", f"`{solver}` at {nfe}", "over it", "bound"], body)


def composition_table(values: Values) -> str:
    keys = sorted((teacher, variant) for teacher, variant, _, metric in values if metric == "over_few_steps")
    body = [[f"`{teacher}`", f"`{variant}`", shown(fid_of(values, teacher, variant)[1]),
             *(percent(values[teacher, variant, "0", f"over_few_steps{end}"]) for end in ("", "_upper95")),
             shown(values[teacher, variant, "0", "held_loss"])] for teacher, variant in keys]
    return markdown(["teacher", "student", "FID", f"over `{students.NAME}`", "bound", "loss on held noises"], body)


def loss_table(values: Values) -> str:
    body = []
    for teacher in sorted({teacher for teacher, variant, *_ in values if variant.rpartition("_")[0] in losses.LOSSES}):
        for loss in losses.LOSSES:
            found = [(fid_of(values, teacher, f"{loss}_{nfe}"), values.get((teacher, f"{loss}_{nfe}", "0", "steps")))
                     for nfe in losses.NUMBERS]
            body.append([f"`{teacher}`", loss, *(shown(fid and fid[1]) for fid, _ in found),
                         *("–" if steps is None else f"{float(steps):.0f}" for _, steps in found)])
    return markdown(["teacher", "loss", *(f"FID at {nfe}" for nfe in losses.NUMBERS),
                     *(f"steps at {nfe}" for nfe in losses.NUMBERS)], body)
