"""Measure how well sentences tell look-alike tasks apart.

    python results/look_alikes.py runs/*/last.pt    # writes look_alikes.json beside each

Of 2 x 63 look-alike tasks made of validation meshes, 4 demonstrations each, it is the share of
demonstrations that are nearer to the sentence of their own task, made without them, than to that of
the pair's other task: a number for each pair.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sim
from common import cores, make_files, write_atomically, write_json
from readme import look_alike
from train import load_model

TASKS = range(76, 480)  # those below are of the validation split
N_DEMOS = 4


def record(path, index):
    """Write the first and last frames (D, 2, H, W, 3) of a task's demonstrations."""
    env, task = sim.PushEnv(), sim.make_task("val", index)
    demos = [sim.record_demo(env, task, number, 0)["frames"] for number in range(N_DEMOS)]
    ends = np.array(demos)[:, [0, -1]]
    write_atomically(path, lambda file: np.save(file, ends))


@torch.no_grad()
def shares(model, ends):
    """Of pairs, from their frames (2 P, D, 2, H, W, 3): a list of P."""
    f = torch.cat([model.embeddings(task[None]) for task in ends])  # (2 P, D, E)
    total = f.sum(1, keepdim=True)
    partner = normalize(total, dim=-1).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    nearer = (f * normalize(total - f, dim=-1)).sum(-1) > (f * partner).sum(-1)  # (2 P, D)
    return nearer.float().unflatten(0, (-1, 2)).mean((1, 2)).tolist()


def main():
    indices = [index for index in TASKS if look_alike("val", index)]
    jobs = [(Path(f"data/look_alikes/{index:05d}.npy"), index) for index in indices]
    make_files(record, jobs, cores())
    ends = torch.from_numpy(np.stack([np.load(path) for path, _ in jobs]))
    for path in map(Path, sys.argv[1:]):
        model, _ = load_model(path.read_bytes(), path)
        found = shares(model, ends)
        write_json(path.with_name("look_alikes.json"), found)
        error = np.std(found) / len(found) ** 0.5
        print(f"{path}: {100 * np.mean(found):.1f} +- {100 * error:.1f} %")


if __name__ == "__main__":
    import look_alikes  # so that workers find its function under this name
    look_alikes.main()
