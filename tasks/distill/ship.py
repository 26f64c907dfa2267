"""`python -m tasks.distill.ship NAME`: few-step students that were just trained become those that ship beside teacher NAME.

Reads artifacts/distill, params.yaml and the stage's report; writes teachers/NAME/few_steps: of each dense student its weights
in fp16, its rows, and how it was trained. `distill.few_steps.start: shipped` starts from them.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tasks.core.artifacts import ARTIFACTS, REPORTS, read_json, validate, write_json
from tasks.core.params import read_params
from tasks.core.shipped import FOLDER

COMMAND = "dvc repro distill with distill.few_steps.start: teacher and these values"
VALUES = ("steps", "batch", "lr", "solver_lr", "warmup", "ema_decay", "loss")  # of distill.few_steps


def ship(folder: Path, distill: Path, params: dict, report: dict) -> list[str]:
    """folder: the teacher's. -> names of the students that it has now. Raises ValueError where there is none to ship."""
    entries = [entry for entry in read_json(distill / "students.json") if entry["grain"] is None]
    if not entries:
        raise ValueError(f"{distill / 'students.json'}: holds no few-step student with all of its weights")
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for entry in entries:
        halves = {name: value.to(torch.float16).contiguous() for name, value in load_file(distill / entry["file"]).items()}
        save_file(halves, folder / FOLDER / f"{entry['name']}.safetensors")
        write_json(folder / FOLDER / f"{entry['name']}.json", {
            "timesteps": entry["timesteps"], "rows": entry["rows"], "command": COMMAND,
            "values": {name: params["distill"]["few_steps"][name] for name in VALUES}, "seed": params["distill"]["seed"],
            "pairs": {name: params["solver_learn"][name] for name in ("noises", "teacher", "seed")},
            "losses": report["few_steps"][entry["name"]]})
    return [entry["name"] for entry in entries]


def main() -> None:
    try:
        [name] = sys.argv[1:]
        folder = Path(__file__).parents[1] / "pretrain_load" / "teachers" / name
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such teacher")
        print(*ship(folder, validate(ARTIFACTS / "distill"), read_params(), read_json(REPORTS / "distill.json")))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
