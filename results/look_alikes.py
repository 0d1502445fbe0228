"""Measure how well sentences tell look-alike tasks apart.

    python results/look_alikes.py runs/*/last.pt    # writes two files beside each

A demonstration's *margin* is its cosine similarity to the sentence of its own task, made without
it, less that to the sentence of the pair's other task. look_alikes.json has the share of positive
margins in each of 63 look-alike pairs made of validation meshes, 4 demonstrations a task;
margins.json the margins of the validation split's demonstrations, (76, 12). Where the run has the
trials of `evaluate.py --redraw --split val --shots 1` in val-redrawn, it prints their success after
small margins and after others.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sim
from common import cores, make_files, write_atomically, write_json
from data import TaskSet
from readme import look_alike
from train import load_model

TASKS = range(76, 480)  # those below are of the validation split
N_DEMOS = 4
SMALL = 0.1  # the embedding loss's margin


def record(path, index):
    """Write the first and last frames (D, 2, H, W, 3) of a task's demonstrations."""
    env, task = sim.PushEnv(), sim.make_task("val", index)
    demos = [sim.record_demo(env, task, number, 0)["frames"] for number in range(N_DEMOS)]
    ends = np.array(demos)[:, [0, -1]]
    write_atomically(path, lambda file: np.save(file, ends))


@torch.no_grad()
def margins(model, ends):
    """The margins (T, D) of demonstrations with frames (T, D, 2, H, W, 3); T is even."""
    f = torch.stack([model.embeddings(torch.from_numpy(task)) for task in ends])  # (T, D, E)
    total = f.sum(1, keepdim=True)
    partner = normalize(total, dim=-1).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # (T, 1, E)
    own = normalize(total - f, dim=-1)
    return (normalize(f, dim=-1) * (own - partner)).sum(-1).double().numpy()


def show_success(rows, margin):
    """Print the success of trials after demonstrations of small margins, and of the others."""
    small = np.array([margin[row["task"], row["demos"][0]] < SMALL for row in rows])
    success = np.array([row["success"] for row in rows])
    for name, chosen in ((f"below {SMALL}", small), ("others", ~small)):
        print(f"    margin {name}: {success[chosen].sum()} of {chosen.sum()} trials succeed")


def main():
    indices = [index for index in TASKS if look_alike("val", index)]
    jobs = [(Path(f"data/look_alikes/{index:05d}.npy"), index) for index in indices]
    make_files(record, jobs, cores())
    alike = np.stack([np.load(path) for path, _ in jobs])
    validation = TaskSet(Path("data/push"), "val").ends
    for path in map(Path, sys.argv[1:]):
        model, _ = load_model(path.read_bytes(), path)
        found = (margins(model, alike) > 0).reshape(len(jobs) // 2, -1).mean(1)
        write_json(path.with_name("look_alikes.json"), found.tolist())
        margin = margins(model, validation)
        write_json(path.with_name("margins.json"), margin.round(3).tolist())
        error = np.std(found) / len(found) ** 0.5
        print(f"{path}: {100 * np.mean(found):.1f} +- {100 * error:.1f} %")
        trials = path.parent / "val-redrawn" / "results.json"
        if trials.exists():
            show_success(json.loads(trials.read_text())["results"][0]["trials"], margin)


if __name__ == "__main__":
    import look_alikes  # so that workers find its function under this name
    look_alikes.main()
