"""Measure what each stage of the job costs, the fast form beside the plain one.

    python results/benchmark.py --json results/benchmark.json
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 results/benchmark.py --json results/benchmark.json \
        --stages processes

Sides are measured in turn, and medians count. Nothing else should be running. Figures are seconds,
trials a second (evaluation) and bytes (memory); readme.py puts them into the tables.
"""
import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
from common import cores, make_files, run_program, write_json
from data import TaskLoader, TaskSet
from evaluate import SHIPPED, NetworkPolicy, try_task
from tecnets import TecNets

B, SAMPLES = 64, 2  # tasks of a step; control samples of the support and of the query demo


def medians(sides, repeats=9):
    """The median seconds of each side, the sides run in turn after one round to warm up."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def random_batch(tasks, size=125, samples=SAMPLES, frames=2):
    """A batch of random images with one support and one query demo a task."""
    def images(*shape):
        return torch.randint(0, 256, (tasks, *shape, size, size, 3), dtype=torch.uint8)

    return {"frames_U": images(1, frames), "frames_q": images(1, 2), "images": images(2, samples),
            "states": torch.randn(tasks, 2, samples, 20),
            "actions": torch.randn(tasks, 2, samples, 7)}


def plain(side):
    """A function that computes the same as the papers write it, without our shortcuts."""
    def run():
        with (mock.patch.object(tecnets, "first_convolution", tecnets.plain_first_convolution),
              mock.patch.object(baselines, "mil_vision", baselines.plain_mil_vision)):
            return side()
    return run


# Stages, each given the folder of the data ----------------------------------------------------

def steps(data):
    batch, model, bfloat16 = random_batch(B), TecNets(), TecNets()
    bfloat16.use_bfloat16 = True
    return medians({
        "step, float32": lambda: model.backward(batch),
        "step, bfloat16": lambda: bfloat16.backward(batch),
        "step, float32, plain": plain(lambda: model.losses(batch)["loss"].backward())})


def mil_step(data):
    model, batch = baselines.MIL(), random_batch(15, samples=10, frames=10)
    step = lambda: model.backward(batch)
    name = "MIL step, 15 tasks, 10 + 10 frames"
    return medians({name: step, f"{name}, plain": plain(step)}, 3)


def loader(data):
    batches, model = TaskLoader(TaskSet(data, "train"), B, K=1, M=SAMPLES), TecNets()
    model.use_bfloat16 = True
    step = lambda: model.backward(train.to_tensors(next(batches), "cpu"))
    return medians({"preparing a batch": lambda: batches.batch(0),
                    "step, bfloat16, beside the loader": step}, 36)


def processes(data):
    """A step that the processes of torchrun share, on all cores together."""
    n, model = tecnets.processes(), TecNets()
    batch = random_batch(B // n)
    model.use_bfloat16 = True

    def step():
        losses = model.backward(batch)
        train.add_up([*(p.grad for p in model.parameters()), *losses.values()])

    return medians({f"step, bfloat16, processes: {n}": step})


def simulator(data):
    sides = {}
    for name, mode in (("simulator step", None), ("simulator step, rendered", "rgb_array")):
        env, actions = sim.PushEnv(render_mode=mode), iter(TaskSet(data, "train", 1).actions)
        env.reset(seed=0, options={"task": sim.make_task("train", 0)})
        sides[name] = lambda env=env, actions=actions: env.step(next(actions))
    return medians(sides, sim.HORIZON - 1)


def evaluation(data):
    settings = dict(policy="tecnets", split="train", trials=6, seed=0, redraw=False,
                    film_failures=False, demos=(0, 12))
    rates = {}
    for workers in (1, cores()):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{index}.json" for index in range(6)]
            jobs = [(path, settings, index, 1, SHIPPED.read_bytes(), data, False)
                    for index, path in enumerate(paths)]
            start = time.perf_counter()
            make_files(try_task, jobs, workers)
            rates[f"evaluation, cores: {workers}"] = 36 / (time.perf_counter() - start)
    return rates


def peak(tasks):
    train.keep_freed_memory()
    TecNets().backward(random_batch(tasks))
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def memory(data):
    sizes = {}
    for tasks in (B, 8 * B):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            sizes[f"peak memory, {tasks} tasks"] = pool.submit(peak, tasks).result()
    return sizes


def act(data):
    torch.set_num_threads(1)
    model, batch = TecNets(), random_batch(1)
    side = lambda: model.act(batch["images"][0, 0, 0], batch["states"][0, 0, 0], torch.ones(20))
    return medians({"action, one core": side, "action, one core, plain": plain(side)}, 180)


def methods(data):
    """Parameters, and the costs on one core of an adaptation to a demonstration and an action."""
    torch.set_num_threads(1)
    env = sim.PushEnv()
    obs, _ = env.reset(seed=0, options={"task": sim.make_task("train", 0)})
    demo = {"frames": np.stack([obs["image"]] * sim.HORIZON)}
    figures = {}
    for path in (*sorted(HERE.glob("methods/*/weights.pt")), SHIPPED):
        model, content = train.load_model(path.read_bytes(), path)
        policy = NetworkPolicy(model)
        seconds = medians({"adapt": lambda: policy.adapt([demo]), "act": lambda: policy.act(obs)})
        figures[content["options"]["method"]] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "adapt_ms": 1000 * seconds["adapt"], "act_ms": 1000 * seconds["act"]}
    return figures


STAGES = {stage.__name__: stage for stage in (
    steps, mil_step, loader, processes, simulator, evaluation, memory, act, methods)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="data/push", help="data set of 64 training tasks or more")
    parser.add_argument("--json", type=Path, required=True, help="file to add the figures to")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    train.join("cpu")
    train.keep_freed_memory()
    report = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.stages:
        report.setdefault(name, {}).update(STAGES[name](args.data))
        write_json(args.json, report)


if __name__ == "__main__":
    run_program(main)
