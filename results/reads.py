"""Find out what each method reads of a demonstration, by exchanging frames of it.

    python results/reads.py    # writes reads.json and two GIFs beside it

In each test scene a policy's first action is compared with the expert's first actions for the two
tasks of that scene: it heads for the demonstrated object if it lies on that side of their middle.
reads.json has, for each method and each kind of demonstration, a 1 or a 0 for every trial, task by
task. A GIF shows one scene after three demonstrations; they are framed green where the object of
the first is pushed.
"""
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sim
from common import progress, write_json
from data import evenly_spaced
from evaluate import SHIPPED, policy_of, rollout, save_gif, scene_seed
from train import load_model

N_TASKS, N_TRIALS = 74, 6
WEIGHTS = {"lstm": HERE / "methods/lstm/weights.pt", "mil": HERE / "methods/mil/weights.pt",
           "contextual": HERE / "methods/contextual/weights.pt", "tecnets": SHIPPED}
MIXED = "its own, the last frame the partner's"
GIVEN = {  # made of the n frames of the task's own demonstration and of its partner's
    "its own": lambda own, other: own,
    MIXED: lambda own, other: [*own[:-1], other[-1]],
    "the partner's, the last frame its own": lambda own, other: [*other[:-1], own[-1]],
    "its last frame, repeated": lambda own, other: own[-1:] * len(own),
    "its first frame, repeated": lambda own, other: own[:1] * len(own),
}
FILMED_METHODS, FILMED_TASK = ("lstm", "tecnets"), 2  # in its first trial


def scene(index, trial):
    """The arguments of a reset that starts a trial of a test task."""
    return {"seed": scene_seed({"seed": 0, "split": "test"}, index, trial),
            "options": {"task": sim.make_task("test", index), "swap": index % 2 == 1}}


def given_policy(model, kind, own, other):
    """The policy after a demonstration of a kind, made of two."""
    times = evenly_spaced(sim.HORIZON, model.settings.demo_frames)
    frames = GIVEN[kind](*(list(demo["frames"][times]) for demo in (own, other)))
    return policy_of(model, [{"frames": frames}])


def film(env, model, own, other, path):
    """Three rollouts of one scene: after its own demonstration, its partner's and a mixed one."""
    films = []
    for kind, *demos in (("its own", own, other), ("its own", other, own), (MIXED, own, other)):
        frames = []
        info = rollout(env, given_policy(model, kind, *demos), **scene(FILMED_TASK, 0), film=frames)
        films.append((frames, info["success"]))
    save_gif(path, [own, other], films)


def main():
    torch.set_num_threads(1)
    models = {name: load_model(path.read_bytes(), path)[0] for name, path in WEIGHTS.items()}
    env, heads = sim.PushEnv(), {name: dict.fromkeys(GIVEN, "") for name in models}
    for index, trial in itertools.product(range(N_TASKS), range(N_TRIALS)):
        demos, starts, actions = [], [], []
        for task in (index, index ^ 1):  # itself and its partner
            demos.append(sim.record_demo(env, sim.make_task("test", task), trial, 0))
            starts.append(env.reset(**scene(task, trial))[0])
            actions.append(sim.expert_action(env))
        middle = np.mean(actions, 0)
        for name, kind in itertools.product(models, GIVEN):
            policy = given_policy(models[name], kind, *demos)
            nearer = (policy(starts[0]) - middle) @ (actions[0] - middle) > 0
            heads[name][kind] += str(int(nearer))
        if (index, trial) == (FILMED_TASK, 0):
            for name in FILMED_METHODS:
                film(env, models[name], *demos, HERE / f"reads-{name}.gif")
        progress(f"task {index} of {N_TASKS}")
    write_json(HERE / "reads.json", heads)


if __name__ == "__main__":
    main()
