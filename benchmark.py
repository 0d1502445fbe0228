"""Measure every stage of the job against its plain formulation, in one process.

    python benchmark.py --json results/benchmark.json

Two sides are measured in turn, so that a noisy machine is noisy for both; medians are printed.
Nothing else should be running.
"""
import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import sim
from data import Parser, TaskLoader, TaskSet, command, generate, number, write_atomically
from evaluate import run_trials
from tecnets import Settings, TecNets, control_loss, embedding_loss, sentence
from train import has_bfloat16, keep_freed_memory, to_tensors

B, SAMPLES = 64, 4  # tasks a step, control samples of the support and of the query set together


def medians(repeats, **sides):
    """The median seconds of each side, the sides run in turn; each runs once before."""
    seconds = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_batch(tasks, samples=SAMPLES):
    """A batch of the official shapes: one support and one query demo a task."""
    images = lambda *shape: torch.randint(0, 256, (*shape, 125, 125, 3), dtype=torch.uint8)
    return {"ends_U": images(tasks, 1, 2), "ends_q": images(tasks, 1, 2), "images": images(tasks, 2, samples // 2),
            "states": torch.randn(tasks, 2, samples // 2, 20), "actions": torch.randn(tasks, 2, samples // 2, 7)}


def plain_control(net, images, states, s):
    """The control network as written in the paper: the sentence tiled over the image."""
    planes = images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # (N, 3, H, W)
    tiled = s[..., None, None].expand(-1, -1, *planes.shape[2:])  # (N, E, H, W)
    return net.head(torch.cat([net.convolutions(torch.cat([planes, tiled], 1)), states], 1))


def plain_step(model, batch):
    """The training step as written in the paper, one backward of the sum of all losses."""
    c, tasks = model.settings, len(batch["ends_U"])
    ends = torch.cat([batch["ends_U"], batch["ends_q"]], 1).flatten(0, 1)  # (2 B, 2, H, W, 3)
    planes = ends.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 127.5 - 1  # (2 B, 6, H, W)
    net = model.embedding_net
    f = net.head(net.convolutions(planes)).unflatten(0, (tasks, 2))
    s_U, s_q = sentence(f[:, :1]), torch.nn.functional.normalize(f[:, 1:], dim=-1)
    loss = c.lambda_emb * embedding_loss(s_U, s_q, c.margin)[0]
    for i, weight in enumerate((c.lambda_U, c.lambda_q)):
        images, states = batch["images"][:, i].flatten(0, 1), batch["states"][:, i].flatten(0, 1)
        prediction = plain_control(model.control_net, images, states, s_U.repeat_interleave(SAMPLES // 2, 0))
        loss = loss + weight * control_loss(prediction, batch["actions"][:, i].flatten(0, 1))
    loss.backward()


def ceilings():
    """This machine's largest matrix-product rates (FLOP/s) and copy bandwidth (bytes/s, read and write)."""
    n, block = 4096, torch.zeros(2 ** 27, dtype=torch.uint8)
    sides = {str(dtype).split(".")[1]: (lambda m: lambda: m @ m)(torch.randn(n, n).to(dtype))
             for dtype in (torch.float32, torch.bfloat16)}
    rates = {name: 2 * n ** 3 / seconds for name, seconds in medians(5, **sides).items()}
    return {**rates, "copy": 2 * block.numel() / medians(9, copy=lambda: block.clone())["copy"]}


def traffic(model, batch, size=2):
    """Bytes that a step must move if every activation is written once and read once, forward and backward.

    Of each convolution's output: written, normalised (read, written), activated (read, written), read
    by the next layer; the backward pass moves the gradients likewise and reads what was kept.
    """
    frames = batch["images"].shape[:3].numel() + 2 * len(batch["ends_U"])
    outputs = sum(model.settings.filters * side ** 2 for side in (63, 32, 16, 8))
    inputs = sum(batch[name].numel() for name in ("ends_U", "ends_q", "images"))
    return inputs * (1 + 2 * size) + frames * outputs * size * (6 + 8)


def training_step(report, repeats):
    torch.manual_seed(0)
    batch, model = random_batch(B), TecNets()
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    rounded = copy.deepcopy(model)
    rounded.bfloat16 = has_bfloat16("cpu")
    seconds = medians(repeats, plain=lambda: plain_step(plain, batch), float32=lambda: model.backward(batch),
                      bfloat16=lambda: rounded.backward(batch))
    with FlopCounterMode(display=False) as counter:
        model.backward(batch)
    limit = max(counter.get_total_flops() / report["ceilings"]["bfloat16"],
                traffic(model, batch) / report["ceilings"]["copy"])
    report["training step"] = {**seconds, "flop": counter.get_total_flops(), "bytes": traffic(model, batch),
                               "roofline": limit, "times roofline": seconds["bfloat16"] / limit,
                               "float32 speed-up": seconds["plain"] / seconds["float32"],
                               "bfloat16 speed-up": seconds["plain"] / seconds["bfloat16"]}


def one_action(report, repeats):
    torch.set_num_threads(1)
    batch, model = random_batch(1), TecNets().eval()
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    image, state = batch["images"][0, 0, 0], batch["states"][0, 0, 0]
    with torch.no_grad():
        s = model.embed(batch["ends_U"])[0]
        seconds = medians(20 * repeats, plain=lambda: plain_control(plain.control_net, image[None], state[None], s[None]),
                          ours=lambda: model.act(image, state, s))
    report["act"] = {**seconds, "speed-up": seconds["plain"] / seconds["ours"]}
    torch.set_num_threads(os.cpu_count())


def loading(report, repeats, folder):
    generate(folder, {"train": 64, "val": 1, "test": 1}, demos=2, seed=0)
    loader = TaskLoader(TaskSet(folder, "train"), B, 1, 1, SAMPLES // 2, seed=0)
    model = TecNets()
    model.bfloat16 = has_bfloat16("cpu")
    ready = to_tensors(loader.batch(0), "cpu")
    seconds = medians(repeats, batch=lambda: loader.batch(1))
    seconds |= medians(repeats, step=lambda: model.backward(ready),
                       **{"step with loader": lambda: model.backward(to_tensors(next(loader), "cpu"))})
    report["loader"] = {**seconds, "batches a step": seconds["step"] / seconds["batch"],
                        "slow-down": seconds["step with loader"] / seconds["step"]}


def simulation(report, repeats):
    task = sim.make_task("val", 0)
    for name, render in (("without rendering", False), ("rendered", True)):
        env = sim.PushEnv(render=render)
        env.reset(seed=0, options={"task": task})
        seconds = []
        for _ in range(sim.HORIZON):
            action = sim.expert_action(env)
            start = time.perf_counter()
            env.step(action)
            seconds.append(time.perf_counter() - start)
        env.close()
        report.setdefault("simulator", {})[name] = statistics.mean(seconds)


def evaluation(report, folder):
    checkpoint = Path(folder) / "untrained.pt"
    model = TecNets()
    torch.save({"format": 1, "settings": vars(model.settings), "model": model.state_dict()}, checkpoint)
    data = TaskSet(folder, "train", 4)
    for workers in (1, os.cpu_count()):
        start = time.perf_counter()
        rows = run_trials("tecnets", "train", 4, 6, 1, 0, workers, checkpoint, data)
        report.setdefault("evaluation", {})[f"trials a second, {workers} workers"] = len(rows) / (time.perf_counter() - start)


def peak_memory(report):
    for tasks in (64, 512):
        output = subprocess.run([sys.executable, __file__, "--peak", str(tasks)], check=True, capture_output=True, text=True)
        report.setdefault("memory", {})[f"B = {tasks}"] = int(output.stdout)
    report["memory"]["ratio"] = report["memory"]["B = 512"] / report["memory"]["B = 64"]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for all figures, in seconds, bytes and FLOP")
    parser.add_argument("--repeats", type=number(int, 1), default=9, help="runs of each side")
    parser.add_argument("--peak", type=number(int, 1), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.peak:
        model, batch = TecNets(), random_batch(args.peak)
        model.backward(batch)
        return print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    report = {"ceilings": ceilings()}
    with tempfile.TemporaryDirectory() as folder:
        for stage in (training_step, one_action, simulation):
            stage(report, args.repeats)
        loading(report, args.repeats, folder)
        evaluation(report, folder)
    peak_memory(report)
    for stage, values in report.items():
        print(stage)
        for name, value in values.items():
            print(f"  {name:28} {value:.4g}")
    if args.json:
        write_atomically(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    command(main)
