"""Measure every stage of the job, the fast form beside the plain one, in one process.

    python benchmark.py --json results/benchmark.json

Sides are measured in turn; medians are printed, in seconds. Nothing else should be running.
"""
import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import baselines
import sim
import tecnets
from common import Parser, command, cores, parallel, say, write_atomically
from data import TaskLoader, TaskSet
from evaluate import SHIPPED, run_trials
from tecnets import TecNets
from train import add_up, has_bfloat16, keep_freed_memory, to_tensors

B, SAMPLES = 64, 2  # tasks a step; control samples of the support and of the query demo


def medians(repeats=9, **sides):
    """The median seconds of every side, the sides run in turn after one round to warm up."""
    seconds = {name: [] for name in sides}
    for _, (name, side) in itertools.product(range(repeats + 1), sides.items()):
        start = time.perf_counter()
        side()
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def random_batch(tasks, size=125, samples=SAMPLES, frames=2):
    """A batch of random images with one support and one query demo a task."""
    images = lambda *shape: torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8)
    return {"frames_U": images(tasks, 1, frames), "frames_q": images(tasks, 1, 2), "images": images(tasks, 2, samples),
            "states": torch.randn(tasks, 2, samples, 20), "actions": torch.randn(tasks, 2, samples, 7)}


@contextlib.contextmanager
def plain_form():
    """Within it the networks tile the sentence over the image, as the paper writes it."""
    with mock.patch.object(tecnets, "first_convolution", tecnets.plain_first_convolution):
        yield


def plain_step(model, batch):
    """The training step as the paper writes it: one backward of the sum of all losses."""
    with plain_form():
        model.losses(batch)["loss"].backward()


def plain_act(model, image, state, s):
    with plain_form():
        return model.act(image, state, s)


def training_step(data):
    n, block = 4096, torch.zeros(2, 2 ** 28, dtype=torch.uint8)
    a, b = torch.randn(n, n), torch.randn(n, n).bfloat16()
    t = medians(float32=lambda: a @ a, bfloat16=lambda: b @ b, copy=lambda: block[0].copy_(block[1]))
    limits = {"copied bytes/s": block.numel() / t.pop("copy"), **{f"{name} FLOP/s": 2 * n ** 3 / t[name] for name in t}}
    batch, model, bfloat16, plain = random_batch(B), TecNets(), TecNets(), TecNets().to(memory_format=torch.contiguous_format)
    bfloat16.use_bfloat16 = True
    t = medians(4, plain=lambda: plain_step(plain, batch))  # first, not in turn: the next line cannot be undone
    keep_freed_memory()
    t |= medians(float32=lambda: model.backward(batch), bfloat16=lambda: bfloat16.backward(batch),
                 **{"plain, memory kept": lambda: plain_step(plain, batch)})
    with FlopCounterMode(display=False) as counter:
        model.backward(batch)
    # Least traffic in bfloat16: a layer's output is written by the convolution, read and written by the norm and by the
    # ELU, read by the next layer (6); backward reads what three layers kept and reads and writes their gradients (9).
    frames, outputs = B * 2 * (SAMPLES + 1), sum(model.settings.filters * side ** 2 for side in (63, 32, 16, 8))
    pixels = sum(batch[name].numel() for name in ("frames_U", "frames_q", "images"))  # read; written, read twice as 2 bytes
    flop, traffic = counter.get_total_flops(), 7 * pixels + (6 + 9) * 2 * frames * outputs
    roofline = max(flop / limits["bfloat16 FLOP/s"], traffic / limits["copied bytes/s"])
    ratios = {f"{p} / {name}": t[p] / t[name] for name in ("float32", "bfloat16") for p in t if p.startswith("plain")}
    return {**limits, **t, **ratios, "FLOP": flop, "bytes": traffic, "roofline": roofline,
            "bfloat16 / roofline": t["bfloat16"] / roofline}


def mil_step(data):
    """A training step of MIL on 15 tasks, with as many frames of the support demo as control samples of the query."""
    keep_freed_memory()
    model, seconds = baselines.MIL(), {}
    for frames in (10, 20):
        batch = random_batch(15, samples=frames, frames=frames)

        def plain():
            with mock.patch.object(baselines, "mil_vision", baselines.plain_mil_vision):
                model.backward(batch)
        t = medians(3, ours=lambda: model.backward(batch), plain=plain)
        seconds |= {f"{frames} + {frames} frames, {name}": value for name, value in t.items()}
    return seconds


def act(data):
    batch, model, plain = random_batch(1), TecNets(), TecNets().to(memory_format=torch.contiguous_format)
    image, state, s = batch["images"][0, 0, 0], batch["states"][0, 0, 0], torch.ones(20)
    torch.set_num_threads(1)
    with torch.no_grad():
        t = medians(180, ours=lambda: model.act(image, state, s), plain=lambda: plain_act(plain, image, state, s))
    torch.set_num_threads(cores())
    return {**t, "plain / ours": t["plain"] / t["ours"]}


def loader(data):
    keep_freed_memory()
    model, batches = TecNets(), TaskLoader(data, B, 1, 1, SAMPLES, seed=0)
    model.use_bfloat16 = has_bfloat16("cpu")
    t, ready = medians(batch=lambda: batches.batch(0)), itertools.repeat(batches.batch(0))
    for name, source in (("step", ready), ("step with loader", batches)):
        t |= medians(36, **{name: lambda: model.backward(to_tensors(next(source), "cpu"))})
    return {**t, "step / batch": t["step"] / t["batch"], "slow-down": t["step with loader"] / t["step"]}


def feeding(data):
    """Batches a second against the number of threads that prepare them, without a training step beside."""
    keep_freed_memory()
    rates, batches = {}, 36
    for threads in (1, 2, 4, 8):
        source = TaskLoader(data, B, 1, 1, SAMPLES, seed=0, threads=threads)
        next(source)
        start = time.perf_counter()
        for _ in range(batches):
            next(source)
        rates[f"batches/s, {threads} threads"] = batches / (time.perf_counter() - start)
    return rates


def steps_of(part, parts, threads, store, repeats=9):
    """The median seconds of a training step whose tasks `parts` processes share, on `threads` threads each."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if parts > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=part, world_size=parts)
    model, batch = TecNets(), random_batch(B // parts)
    model.use_bfloat16 = has_bfloat16("cpu")

    def step():
        model.zero_grad()
        losses = model.backward(batch)
        add_up([*(p.grad for p in model.parameters()), *losses.values()])
    return medians(repeats, step=step)["step"]


def processes(data):
    """The same training step by two threads of one process and by two processes of one thread, in turn."""
    seconds = {"one process, two threads": [], "two processes, one thread": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn, (name, times) in itertools.product(range(3), seconds.items()):
            parts = 2 if name.startswith("two") else 1
            jobs = [(part, parts, 2 // parts, f"{folder}/{turn}") for part in range(parts)]
            times.append(max(parallel(steps_of, jobs, workers=2)))
    return {name: statistics.median(times) for name, times in seconds.items()}


def simulator(data):
    sides = {}
    for name, env in (("step", sim.PushEnv(render_mode=None)), ("rendered step", sim.PushEnv())):
        env.reset(seed=0, options={"task": sim.make_task("train", 0), "side": -1})
        sides[name] = lambda env=env, actions=iter(data.actions[0, 0]): env.step(next(actions))
    return medians(sim.HORIZON - 1, **sides)


def evaluation(data):
    trials = lambda workers: run_trials("tecnets", "train", range(6), 6, 1, 0, workers, SHIPPED.read_bytes(), data)
    t = medians(1, one=lambda: trials(1), all=lambda: trials(cores()))
    return {"trials/s, one core": 36 / t["one"], f"trials/s, {cores()} cores": 36 / t["all"]}


def peak(tasks):
    keep_freed_memory()
    TecNets().backward(random_batch(tasks))
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def memory(data):
    (small,), (large,) = (parallel(peak, [(tasks,)], workers=1) for tasks in (B, 8 * B))
    return {f"bytes, B = {B}": small, f"bytes, B = {8 * B}": large, "ratio": large / small}


STAGES = {stage.__name__: stage for stage in (
    training_step, mil_step, act, loader, feeding, processes, simulator, evaluation, memory)}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/push", help="data set of 64 training tasks or more")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    args = parser.parse_args()
    data, report = TaskSet(args.data, "train", B), {}
    for stage in (STAGES[name] for name in args.stages):
        report[stage.__name__] = values = stage(data)
        say("\n".join([stage.__name__, *(f"  {name:28} {value:.4g}" for name, value in values.items())]))
    if args.json:
        write_atomically(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    command(main)
