"""Measure what the parts of the job cost, in seconds.

    python results/benchmark.py    # writes benchmark.json beside it

Needs data/push. Nothing else should be running.
"""
import sys
import timeit
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import baselines
import sim
import tecnets
from common import write_json
from data import TaskLoader, TaskSet
from tecnets import TecNets
from train import keep_freed_memory

B = 64  # tasks of a step


def random_batch(tasks, samples=2, frames=2):
    """A batch of random images with one support and one query demo a task."""
    def images(*shape):
        return torch.randint(0, 256, (tasks, *shape, 125, 125, 3), dtype=torch.uint8)

    return {"frames_U": images(1, frames), "frames_q": images(1, 2), "images": images(2, samples),
            "states": torch.randn(tasks, 2, samples, 20),
            "actions": torch.randn(tasks, 2, samples, 7)}


def plain_step(model, batch):
    """The training step as the paper writes it, with tiled sentences."""
    with mock.patch.object(tecnets, "first_convolution", tecnets.plain_first_convolution):
        model.backward(batch)


def main():
    keep_freed_memory()
    model, bfloat16, mil = TecNets(), TecNets(), baselines.MIL()
    bfloat16.use_bfloat16 = True
    batch, mil_batch, one = random_batch(B), random_batch(15, 10, 10), random_batch(1)
    image, state, sentence = one["images"][0, 0, 0], one["states"][0, 0, 0], torch.ones(20)
    loader = TaskLoader(TaskSet("data/push", "train", B), B, K=1, M=2)
    blind, env = sim.PushEnv(images=False), sim.PushEnv()
    for each in (blind, env):
        each.reset(seed=0, options={"task": sim.make_task("train", 0)})
    still = np.zeros(sim.ACTION_DIM)
    sides = {
        "step, float32": lambda: model.backward(batch),
        "step, float32, plain": lambda: plain_step(model, batch),
        "step, bfloat16": lambda: bfloat16.backward(batch),
        "MIL step, 15 tasks, 10 + 10 frames": lambda: mil.backward(mil_batch),
        "action": lambda: model.act(image, state, sentence),
        "preparing a batch": lambda: loader.batch(0),
        "simulator step": lambda: blind.step(still),
        "simulator step, rendered": lambda: env.step(still)}
    write_json(HERE / "benchmark.json", {name: np.median(timeit.repeat(side, repeat=20, number=1))
                                         for name, side in sides.items()})


if __name__ == "__main__":
    main()
