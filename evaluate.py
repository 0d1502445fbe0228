"""Measure how often a policy imitates a demonstration of a task never seen in training.

    python evaluate.py                                     # the weights in results/
    python evaluate.py --checkpoint runs/ours/last.pt --out runs/ours/test --gif 8
    python evaluate.py --policy expert --out runs/expert
    python evaluate.py --redraw --out runs/redrawn         # other demonstrations for every trial
    python evaluate.py --only 52 --film-failures           # what goes wrong in test task 52
    python evaluate.py --out runs/shared --shard 3/8       # on each of 8 machines, common folder

The default protocol is the paper's: 74 test tasks x 6 trials, one demonstration and five. Prints a
table and writes OUT/evaluation.json (the settings), OUT/trials (a file for each task and number of
shots) and, put together from these, OUT/results.json with a row for every trial. With the same
weights, demonstrations and seed the rows are the same. An interrupted evaluation goes on with the
same command. Demonstrations come from the data set, or are recorded on the fly.
"""
import argparse
import collections
import functools
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import sim
from common import (UserError, claim, cores, installed_packages, launched, make_files, run_program,
                    shard, write_atomically, write_json)
from data import FULL_DATA, TaskSet, evenly_spaced, read_manifest
from train import METHODS, load_model, machine

POLICIES = (*METHODS, "no-demo", "expert", "random")
SHIPPED = Path(__file__).resolve().parent / "results" / "weights.pt"
FILMED_TRIALS = 3  # of a task, beside each other in one GIF
FAILURE_SIZE = 500  # pixels of a failing trial's own GIF
REDRAW = 7919  # ends the seeds of redrawn demonstrations, which no other seed does


# A policy: adapt(demos) before a trial, then act(obs) at every step. `demos` is a list of dicts
# with the `frames` (T, H, W, 3) uint8 of a demonstration.

class NetworkPolicy:
    """A network of any method."""

    def __init__(self, model):
        self.model = model

    def adapt(self, demos):
        n = self.model.settings.demo_frames
        frames = [demo["frames"][evenly_spaced(len(demo["frames"]), n)] for demo in demos]
        with torch.no_grad():
            self.context = self.model.embed(torch.from_numpy(np.stack(frames)))  # (K, n, H, W, 3)

    def act(self, obs):
        image, state = (torch.from_numpy(obs[name]) for name in ("image", "state"))
        return self.model.act(image, state, self.context).numpy()


class NoDemoPolicy(NetworkPolicy):
    """TecNets with a zero sentence: what it does without being told the task."""

    def adapt(self, demos):
        self.context = torch.zeros(self.model.settings.embedding_dim)


class ExpertPolicy:
    def __init__(self, env):
        self.env = env

    def adapt(self, demos):
        pass

    def act(self, obs):
        return sim.expert_action(self.env)


class RandomPolicy:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def adapt(self, demos):
        pass

    def act(self, obs):
        return self.rng.uniform(-1, 1, sim.ACTION_DIM)


def rollout(env, policy, seed=None, options=None, film=None, film_size=None):
    """One episode of any environment with Gymnasium's calls, whose observations are dicts of an
    `image` (H, W, 3) uint8 and a `state` (S,) float32; the last info.

    Every second frame is appended to `film`, the policy's own or one of `film_size` pixels.
    """
    obs, info = env.reset(seed=seed, options=options)
    step, over = 0, False
    while not over:
        if film is not None and step % 2 == 0:
            film.append(env.picture(film_size) if film_size else obs["image"])
        obs, _, terminated, truncated, info = env.step(policy.act(obs))
        step, over = step + 1, terminated or truncated
    return info


# Trials ---------------------------------------------------------------------------------------

def choose_demos(evaluation, index, trial, shots):
    """The numbers of the demonstrations that a trial is given: a seeded choice."""
    key = [evaluation["seed"], index]
    if evaluation["redraw"]:
        key += [trial, REDRAW]
    _, n_demos = evaluation["demos"]
    return np.random.default_rng(key).permutation(n_demos)[:shots].tolist()


@functools.lru_cache(maxsize=1)
def _load_network(checkpoint):
    return load_model(checkpoint)[0]


def try_task(path, evaluation, index, shots, checkpoint, data_folder, filmed):
    """Write the file of a task's trials with a number of shots, after their GIFs if `filmed`.

    `checkpoint` is the content of a network's file; demonstrations come from `data_folder`, or are
    recorded if it is None.
    """
    start, split, name = time.perf_counter(), evaluation["split"], evaluation["policy"]
    task, out = sim.make_task(split, index), path.parent.parent
    failures = evaluation["film_failures"]
    pictures = name not in ("expert", "random") or filmed or failures
    env = sim.PushEnv(render_mode="rgb_array" if pictures else None)
    data = TaskSet(data_folder, split, [index]) if data_folder else None

    @functools.cache
    def demo(number):
        if data:
            return {"frames": data.frames(0, number, np.arange(data.lengths[0, number]))}
        return sim.record_demo(env, task, number, evaluation["demos"][0])

    def run(trial, film=None, film_size=None):
        """The row of a trial and its demonstrations."""
        numbers = choose_demos(evaluation, index, trial, shots)
        demos = [demo(number) for number in numbers]
        if name == "expert":
            policy = ExpertPolicy(env)
        elif name == "random":
            policy = RandomPolicy([evaluation["seed"], index, trial])
        else:
            kind = NoDemoPolicy if name == "no-demo" else NetworkPolicy
            policy = kind(_load_network(checkpoint))
        policy.adapt(demos)
        # The same scene for both tasks of a pair, with the roles swapped:
        scene = [evaluation["seed"], sim.split_key(split), index // 2, trial]
        seed = int(np.random.default_rng(scene).integers(2 ** 31))
        options = {"task": task, "swap": index % 2 == 1}
        info = rollout(env, policy, seed, options, film, film_size)
        row = {"shots": shots, "task": index, "trial": trial, "success": bool(info["success"]),
               "final_distance": round(info["distance"], 5),
               "distractor_displacement": round(info["distractor_displacement"], 5),
               "lost": bool(info["lost"])}
        if evaluation["redraw"]:
            row["demos"] = numbers
        return row, [demo["frames"] for demo in demos[:1]]

    rows, films = [], []
    for trial in range(evaluation["trials"]):
        film = [] if filmed and trial < FILMED_TRIALS else None
        row, shown = run(trial, film)
        rows.append(row)
        if film:
            films.append((film, row["success"]))
        if failures and not row["success"]:
            large = []
            run(trial, large, FAILURE_SIZE)  # the same trial again
            save_gif(out / f"task{index:02d}-shots{shots}-trial{trial}.gif", shown,
                     [(large, False)], FAILURE_SIZE)
    if films:
        save_gif(out / f"task{index:02d}-shots{shots}.gif", shown, films)
    env.close()
    write_json(path, {"seconds": time.perf_counter() - start, "trials": rows})


# Results --------------------------------------------------------------------------------------

def interval(rows, resamples=10_000):
    """The 95 % interval [low, high] of the success rate of rows: a seeded bootstrap over pairs.

    The trials of a task share its objects, and so do the two tasks of a pair: to take trials for
    independent would give too narrow an interval.
    """
    pairs = collections.defaultdict(list)
    for row in rows:
        pairs[row["task"] // 2].append(row["success"])
    counts = np.array([(sum(pairs[pair]), len(pairs[pair])) for pair in sorted(pairs)])
    draws = np.random.default_rng(0).integers(len(counts), size=(resamples, len(counts)))
    drawn = counts[draws].sum(1)
    return np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975)).tolist()


def summary(policy, split, shots, seed, rows, seconds):
    """One entry of results.json; `seconds` of one core's time."""
    successes, n = sum(row["success"] for row in rows), len(rows)
    strict = sum(row["final_distance"] < sim.STRICT_DISTANCE for row in rows)
    moved = sum(row["distractor_displacement"] > sim.MOVED_DISTANCE for row in rows)
    return {"policy": policy, "split": split, "shots": shots,
            "n_tasks": len({row["task"] for row in rows}), "n_trials": n, "successes": successes,
            "success_rate": successes / n, "ci95": interval(rows),
            "strict_success_rate": strict / n, "distractor_moved_rate": moved / n,
            "seconds": round(seconds, 1), "seed": seed, "trials": rows}


def table(results):
    """The results as lines of text."""
    lines = [f"{'policy':10} {'shots':>5} {'trials':>6}  {'success %':>9}  {'95 % interval':>13}  "
             f"{'final < 5 cm':>12}  {'distractor moved':>16}"]
    for r in results:
        low, high = r["ci95"]
        interval = f"{100 * low:.1f} - {100 * high:.1f}"
        lines.append(f"{r['policy']:10} {r['shots']:5} {r['n_trials']:6}  "
                     f"{100 * r['success_rate']:9.1f}  {interval:>13}  "
                     f"{100 * r['strict_success_rate']:12.1f}  "
                     f"{100 * r['distractor_moved_rate']:16.1f}")
    return "\n".join(lines)


def save_gif(path, demo, films, size=250):
    """A demonstration, if there is one, beside (film, success) of rollouts; 10 frames a second.

    `demo` is a list of none or one (T, H, W, 3); rollouts are framed green or red.
    """
    pictures = []
    for moment in range(len(films[0][0])):
        picture = Image.new("RGB", (size * (len(demo) + len(films)), size))
        parts = [frames[2 * moment] for frames in demo] + [film[moment] for film, _ in films]
        for column, part in enumerate(parts):
            part = Image.fromarray(part).resize((size, size), Image.Resampling.NEAREST)
            picture.paste(part, (size * column, 0))
        draw = ImageDraw.Draw(picture)
        if demo:
            draw.text((6, 4), "demonstration", "black")
        for column, (_, success) in enumerate(films, len(demo)):
            left, colour = size * column, "green" if success else "red"
            draw.rectangle((left, 0, left + size - 1, size - 1), outline=colour, width=3)
            draw.text((left + 6, 4), f"rollout {'succeeds' if success else 'fails'}", "black")
        pictures.append(picture)
    write_atomically(path, lambda file: pictures[0].save(
        file, "gif", save_all=True, append_images=pictures[1:], duration=100, loop=0))


# The program ----------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=SHIPPED, help="of a network (default: the weights in results/)")
    add("--data", default="data/push", help="data set with the demonstrations, if it is there")
    add("--split", choices=sim.SPLITS, default="test", help="(default: test)")
    add("--tasks", type=int, default=FULL_DATA["tasks"]["test"],
        help="the first tasks of the split (default: 74)")
    add("--only", type=int, nargs="+", metavar="TASK", help="these tasks in place of --tasks")
    add("--trials", type=int, default=6, help="trials of a task (default: 6)")
    add("--shots", type=int, nargs="+", default=[1, 5], help="demonstrations (default: 1 5)")
    add("--redraw", action="store_true",
        help="draw other demonstrations for every trial, not once for all trials of a task")
    add("--seed", type=int, default=0, help="of trials and choice of demonstrations (default: 0)")
    add("--workers", type=int, default=cores(), help="processes (default: one for each core)")
    add("--policy", choices=POLICIES,
        help="the checkpoint's by default; no-demo: TecNets with a zero sentence")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder of results and GIFs")
    add("--shard", type=shard, default=launched()[:2], metavar="I/N",
        help="try the I-th of N shards of the tasks, I from 0; the last one to finish writes the "
        "results (default: the rank under torchrun or srun, else all)")
    add("--gif", type=int, default=0, metavar="N", help="film trials of the first N tasks")
    add("--film-failures", action="store_true", help="film every failing trial, a large GIF each")
    return parser.parse_args()


def check_network(args, content):
    """Raise UserError if the checkpoint is not of the policy, or not of the benchmark."""
    method = content["options"]["method"]
    if args.policy not in (None, method) and (args.policy, method) != ("no-demo", "tecnets"):
        raise UserError(f"{args.checkpoint} is of the method {method}: leave --policy out, or take "
                        "another checkpoint")
    if content["data"]["benchmark"] != sim.VERSION:
        raise UserError(f"{args.checkpoint} was not trained on this benchmark's data, and its "
                        "success here would mean nothing: try it by evaluate.rollout in an "
                        "environment of its own data (README.md)")


def main():
    args = parse()
    checkpoint = content = data_folder = None
    seed, n_demos = FULL_DATA["seed"], FULL_DATA["demos"]
    if args.policy not in ("expert", "random"):
        checkpoint = Path(args.checkpoint).read_bytes()  # once: all trials are of the same weights
        _, content = load_model(checkpoint, args.checkpoint)
        check_network(args, content)
    policy = args.policy or content["options"]["method"]
    shots = sorted(set(args.shots)) if policy in METHODS else [0]
    if shots != [0] and (Path(args.data) / "manifest.json").exists():
        data_folder, manifest = args.data, read_manifest(args.data)
        seed, n_demos = manifest["seed"], manifest["demos"]
        if manifest["benchmark"] != sim.VERSION:
            raise UserError(f"{args.data} is not data of this benchmark: give another --data")
    if max(shots) > n_demos:
        raise UserError(f"{max(shots)} shots need as many demonstrations, a task has {n_demos}: "
                        "lower --shots")
    tasks = sorted(set(args.only)) if args.only else list(range(args.tasks))
    evaluation = {
        "benchmark": sim.VERSION, "policy": policy, "split": args.split,
        "tasks": tasks if args.only else args.tasks, "trials": args.trials, "seed": args.seed,
        "redraw": args.redraw, "gif": args.gif, "film_failures": args.film_failures,
        "shots": shots, "demos": [seed, n_demos],
        "checkpoint": checkpoint and hashlib.sha256(checkpoint).hexdigest()}
    claim(args.out / "evaluation.json", evaluation)
    (args.out / "trials").mkdir(exist_ok=True)
    paths = {(k, index): args.out / "trials" / f"task{index:02d}-shots{k}.json"
             for k in shots for index in tasks}
    jobs = [(path, evaluation, index, k, checkpoint, data_folder, index in tasks[:args.gif])
            for (k, index), path in paths.items()]
    if missing := make_files(try_task, jobs, args.workers, args.shard, "tasks"):
        return print(f"{args.out}: {missing} of {len(jobs)} files still to come from other shards")
    results = []
    for k in shots:
        parts = [json.loads(paths[k, index].read_text()) for index in tasks]
        rows = [row for part in parts for row in part["trials"]]
        seconds = sum(part["seconds"] for part in parts)
        results.append(summary(policy, args.split, k, args.seed, rows, seconds))
    report = {"evaluation": evaluation, "packages": installed_packages(), "machine": machine(),
              "results": results}
    if content:
        names = "step", "seconds", "options", "machine"
        report["network"] = {name: content[name] for name in names}
    write_json(args.out / "results.json", report)
    print(table(results))
    if films := sorted(str(path) for path in args.out.glob("*.gif")):
        print("films:", *films)


if __name__ == "__main__":
    import evaluate  # so that workers find its functions under this name
    run_program(evaluate.main)
