"""Measure what the stages of the job cost.

    python results/benchmark.py --json results/benchmark.json

Stages are seconds and evaluation, both by default. Figures are medians in seconds, and trials of
evaluation a second. Needs data/push. Nothing else should be running.
"""
import argparse
import json
import subprocess
import sys
import tempfile
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
import train
from common import HelpFormatter, cores, run_program, write_json
from data import TaskLoader, TaskSet
from evaluate import policy_of
from tecnets import TecNets

B = 64  # tasks of a step


def medians(sides):
    """The median seconds of each side."""
    return {name: np.median(timeit.repeat(side, repeat=20, number=1))
            for name, side in sides.items()}


def random_batch(tasks, samples=2, frames=2):
    """A batch of random images with one support and one query demo a task."""
    def images(*shape):
        return torch.randint(0, 256, (tasks, *shape, 125, 125, 3), dtype=torch.uint8)

    return {"frames_U": images(1, frames), "frames_q": images(1, 2), "images": images(2, samples),
            "states": torch.randn(tasks, 2, samples, 20),
            "actions": torch.randn(tasks, 2, samples, 7)}


def plain_step(model, batch):
    """The training step as the paper writes it: tiled sentences, one backward of all losses."""
    with mock.patch.object(tecnets, "first_convolution", tecnets.plain_first_convolution):
        model.losses(batch)["loss"].backward()


# Stages ---------------------------------------------------------------------------------------

def seconds():
    model, bfloat16, mil = TecNets(), TecNets(), baselines.MIL()
    bfloat16.use_bfloat16 = True
    batch, mil_batch = random_batch(B), random_batch(15, 10, 10)
    loader = TaskLoader(TaskSet("data/push", "train", B), B, K=1, M=2)
    blind, env = sim.PushEnv(render_mode=None), sim.PushEnv()
    options = {"task": sim.make_task("train", 0)}
    blind.reset(seed=0, options=options)
    env.reset(seed=0, options=options)
    action = np.zeros(sim.ACTION_DIM)
    one = random_batch(1)
    image, state, sentence = one["images"][0, 0, 0], one["states"][0, 0, 0], torch.ones(20)
    return medians({
        "action": lambda: model.act(image, state, sentence),
        "step, float32": lambda: model.backward(batch),
        "step, float32, plain": lambda: plain_step(model, batch),
        "step, bfloat16": lambda: bfloat16.backward(batch),
        "MIL step, 15 tasks, 10 + 10 frames": lambda: mil.backward(mil_batch),
        "preparing a batch": lambda: loader.batch(0),
        "simulator step": lambda: blind.step(action),
        "simulator step, rendered": lambda: env.step(action)})


def evaluation():
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "evaluate.py", "--shots", "1", "--out", out]
        took = timeit.timeit(lambda: subprocess.run(command, check=True), number=1)
    return {f"evaluation, cores: {cores()}": 444 / took}


STAGES = {stage.__name__: stage for stage in (seconds, evaluation)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    train.keep_freed_memory()
    report = json.load(open(args.json))
    for name in args.stages or STAGES:
        report.setdefault(name, {}).update(STAGES[name]())
        write_json(args.json, report)


if __name__ == "__main__":
    run_program(main)
