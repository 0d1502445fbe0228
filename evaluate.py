"""Measure how often a policy imitates a demonstration of a task never seen in training.

    python evaluate.py                                     # the weights in results/
    python evaluate.py --checkpoint runs/ours/last.pt --out runs/ours/test --gif 8
    python evaluate.py --policy expert --out runs/expert
    python evaluate.py --redraw --out runs/redrawn         # other demonstrations for every trial
    python evaluate.py --look table --out runs/table       # in a look that training never showed
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
from common import (HelpFormatter, UserError, claim, cores, launched, make_files, run_program,
                    shard, write_atomically, write_json)
from data import FULL_DATA, TaskSet, evenly_spaced, read_manifest
from train import METHODS, load_model, machine

LOOKS = {"default": sim.Look(), **sim.HELD_OUT_LOOKS}
POLICIES = (*METHODS, "no-demo", "expert", "random")
SHIPPED = Path(__file__).resolve().parent / "results" / "weights.pt"
FILMED_TRIALS = 3  # of a task, beside each other in one GIF
REDRAW = 7919  # ends the seeds of redrawn demonstrations, which no other seed does


# A policy is a function from an observation to an action (A,).

def policy_of(model, demos=(), context=None):
    """The policy of a network given demonstrations, dicts of `frames` (T, H, W, 3) uint8.

    Or given a context, what `model.embed` makes of them.
    """
    device = model.state_mean.device
    if context is None:
        n, frames = model.settings.demo_frames, []
        for demo in demos:
            whole = np.asarray(demo["frames"])
            frames.append(whole[evenly_spaced(len(whole), n)])
        frames = torch.as_tensor(np.stack(frames), device=device)  # (K, n, H, W, 3)
        model.check_sizes(frames)
        with torch.no_grad():
            context = model.embed(frames)

    def policy(obs):
        image = torch.as_tensor(np.ascontiguousarray(obs["image"]), device=device)
        state = torch.as_tensor(obs["state"], dtype=torch.float32, device=device)
        return model.act(image, state, context).cpu().numpy()

    return policy


def make_policy(name, env, demos, weights, seed):
    """The policy of a name in POLICIES for one trial."""
    if name == "expert":
        return lambda obs: sim.expert_action(env)
    if name == "random":
        rng = np.random.default_rng(seed)
        return lambda obs: rng.uniform(-1, 1, sim.ACTION_DIM)
    model = _load_network(weights)
    if name == "no-demo":  # a zero sentence: what TecNets does without being told the task
        return policy_of(model, context=torch.zeros(model.settings.embedding_dim))
    return policy_of(model, demos)


@functools.lru_cache(maxsize=1)
def _load_network(weights):
    return load_model(weights)[0]


def rollout(env, policy, seed=None, options=None, film=None):
    """One episode of an environment with Gymnasium's calls; the last info.

    Observations are dicts of an `image` (H, W, 3) uint8 and a `state` (S,) float32. The images are
    appended to `film`, every second one.
    """
    obs, info = env.reset(seed=seed, options=options)
    step, over = 0, False
    while not over:
        if film is not None and step % 2 == 0:
            film.append(obs["image"])
        obs, _, terminated, truncated, info = env.step(policy(obs))
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


def scene_seed(evaluation, index, trial):
    """The seed of a trial's scene, the same for both tasks of a pair."""
    key = [evaluation["seed"], sim.split_key(evaluation["split"]), index // 2, trial]
    return int(np.random.default_rng(key).integers(2 ** 31))


def try_task(path, evaluation, index, shots, weights, data_folder, filmed):
    """Write the file of a task's trials with a number of shots, after their GIFs if `filmed`.

    `weights` are the bytes of a checkpoint's file; demonstrations come from `data_folder`, or are
    recorded if it is None.
    """
    start, failures = time.perf_counter(), evaluation["film_failures"]
    name, split, seed = (evaluation[key] for key in ("policy", "split", "seed"))
    # Without images an environment is faster, and the expert looks at none.
    pictures = filmed or failures or name not in ("expert", "random")
    env = sim.PushEnv(render_mode="rgb_array" if pictures else None)
    task = sim.make_task(split, index)
    task_set = TaskSet(data_folder, split, [index]) if data_folder else None

    @functools.cache
    def demo(number):
        if task_set:
            times = np.arange(task_set.lengths[0, number])
            return {"frames": task_set.frames(0, number, times)}
        look = LOOKS[evaluation["demo_look"]]
        return sim.record_demo(env, task, number, evaluation["demos"][0], look)

    rows, films = [], []
    for trial in range(evaluation["trials"]):
        numbers = choose_demos(evaluation, index, trial, shots)
        demos = [demo(number) for number in numbers]
        policy = make_policy(name, env, demos, weights, [seed, index, trial])
        # A task and its partner have the same scene with the roles swapped.
        options = {"task": task, "swap": index % 2 == 1, "look": LOOKS[evaluation["look"]]}
        film = [] if pictures else None
        info = rollout(env, policy, scene_seed(evaluation, index, trial), options, film)
        row = {"shots": shots, "task": index, "trial": trial, "success": bool(info["success"]),
               "final_distance": round(info["distance"], 5),
               "distractor_displacement": round(info["distractor_displacement"], 5),
               "lost": bool(info["lost"])}
        rows.append({**row, "demos": numbers} if evaluation["redraw"] else row)
        films.append((film, row["success"]))
        gif = path.parent.parent / f"task{index:02d}-shots{shots}"
        if failures and not row["success"]:
            save_gif(f"{gif}-trial{trial}.gif", demos[:1], films[-1:])
    if filmed:
        save_gif(f"{gif}.gif", demos[:1], films[:FILMED_TRIALS])
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
        ci95 = f"{100 * low:.1f} - {100 * high:.1f}"
        lines.append(f"{r['policy']:10} {r['shots']:5} {r['n_trials']:6}  "
                     f"{100 * r['success_rate']:9.1f}  {ci95:>13}  "
                     f"{100 * r['strict_success_rate']:12.1f}  "
                     f"{100 * r['distractor_moved_rate']:16.1f}")
    return "\n".join(lines)


def save_gif(path, demos, films, size=250):
    """The demonstrations beside (film, success) of rollouts, framed green or red; 10 a second."""
    pictures = []
    for moment in range(len(films[0][0])):
        parts = [demo["frames"][2 * moment] for demo in demos] + [film[moment] for film, _ in films]
        picture = Image.new("RGB", (size * len(parts), size))
        for column, part in enumerate(parts):
            part = Image.fromarray(part).resize((size, size), Image.Resampling.NEAREST)
            picture.paste(part, (size * column, 0))
        draw = ImageDraw.Draw(picture)
        if demos:
            draw.text((6, 4), "demonstration", "black")
        for column, (_, success) in enumerate(films, len(demos)):
            left, colour = size * column, "green" if success else "red"
            draw.rectangle((left, 0, left + size - 1, size - 1), outline=colour, width=3)
            draw.text((left + 6, 4), f"rollout {'succeeds' if success else 'fails'}", "black")
        pictures.append(picture)
    write_atomically(path, lambda file: pictures[0].save(
        file, "gif", save_all=True, append_images=pictures[1:], duration=100, loop=0))


# The program ----------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s [options]", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=SHIPPED, help="of a network")
    add("--data", default="data/push", help="data set with the demonstrations; they are recorded "
        "if it is not there, or of other looks")
    add("--split", choices=sim.SPLITS, default="test", help="of the tasks")
    add("--tasks", type=int, default=FULL_DATA["tasks"]["test"], help="the first ones of the split")
    add("--only", type=int, nargs="+", metavar="TASK", help="these tasks in place of --tasks")
    add("--trials", type=int, default=6, help="trials of a task")
    add("--shots", type=int, nargs="+", default=[1, 5], help="demonstrations that a trial is given")
    add("--redraw", action="store_true",
        help="draw other demonstrations for every trial, not once for all trials of a task")
    add("--look", choices=LOOKS, default="default", help="of demonstrations and trials")
    add("--demo-look", choices=LOOKS, help="of demonstrations, if another than that of the trials")
    add("--seed", type=int, default=0, help="of the trials and the choice of demonstrations")
    add("--workers", type=int, default=cores(), help="processes")
    add("--policy", choices=POLICIES,
        help="the checkpoint's by default; no-demo is TecNets with a zero sentence")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder of results and GIFs")
    add("--shard", type=shard, default=launched()[:2], metavar="I/N",
        help="try the I-th of N shards of the tasks, I from 0; the last one to finish writes the "
        "results; by default the rank under torchrun or srun, else all")
    add("--gif", type=int, default=0, metavar="N", help="film trials of the first N tasks")
    add("--film-failures", action="store_true", help="film every failing trial, a GIF each")
    return parser.parse_args()


def read_network(path, policy):
    """(the bytes of a checkpoint's file, its dict): once, so that all trials have the same weights.

    Raises UserError if it is not of the policy, or not of the benchmark.
    """
    weights = Path(path).read_bytes()
    _, checkpoint = load_model(weights, path)
    method = checkpoint["options"]["method"]
    if policy not in (None, method) and (policy, method) != ("no-demo", "tecnets"):
        raise UserError(f"{path} is of the method {method}: leave --policy out, or take another "
                        "checkpoint")
    if checkpoint["data"]["benchmark"] != sim.VERSION:
        raise UserError(f"{path} was not trained on this benchmark's data, and its success here "
                        "would mean nothing: try it by evaluate.rollout in an environment of its "
                        "own data (README.md)")
    return weights, checkpoint


def main():
    args = parse()
    policy, weights, checkpoint = args.policy, None, None
    if policy not in ("expert", "random"):
        weights, checkpoint = read_network(args.checkpoint, policy)
        policy = policy or checkpoint["options"]["method"]
    tasks = sorted(set(args.only)) if args.only else list(range(args.tasks))
    demo_look = args.demo_look or args.look
    shots, data_folder, demos = [0], None, [FULL_DATA["seed"], FULL_DATA["demos"]]
    if policy in METHODS:
        shots = sorted(set(args.shots))
        if (Path(args.data) / "manifest.json").exists():
            manifest = read_manifest(args.data)
            demos = [manifest["seed"], manifest["demos"]]
            if manifest["benchmark"] != sim.VERSION:
                raise UserError(f"{args.data} is not data of this benchmark: give another --data")
            usable = demo_look == "default" and not manifest.get("looks")
            if usable and max(tasks) < manifest["tasks"].get(args.split, 0):  # else recorded
                data_folder = args.data
        if max(shots) > demos[1]:
            raise UserError(f"{max(shots)} shots need as many demonstrations, a task has "
                            f"{demos[1]}: lower --shots")
    evaluation = {
        "benchmark": sim.VERSION, "policy": policy, "split": args.split,
        "tasks": tasks if args.only else args.tasks, "trials": args.trials, "seed": args.seed,
        "redraw": args.redraw, "gif": args.gif, "film_failures": args.film_failures,
        "look": args.look, "demo_look": demo_look,
        "shots": shots, "demos": demos,
        "checkpoint": weights and hashlib.sha256(weights).hexdigest()}
    claim(args.out / "evaluation.json", evaluation)
    jobs = []
    for k in shots:
        for index in tasks:
            path = args.out / "trials" / f"task{index:02d}-shots{k}.json"
            filmed = index in tasks[:args.gif]
            jobs.append((path, evaluation, index, k, weights, data_folder, filmed))
    if missing := make_files(try_task, jobs, args.workers, args.shard):
        return print(f"{args.out}: {missing} of {len(jobs)} files still to come from other shards")
    results = []
    for k in shots:
        files = [json.loads(job[0].read_text()) for job in jobs if job[3] == k]
        rows = [row for file in files for row in file["trials"]]
        seconds = sum(file["seconds"] for file in files)
        results.append(summary(policy, args.split, k, args.seed, rows, seconds))
    report = {"evaluation": evaluation, "machine": machine(), "results": results}
    if checkpoint:
        names = "step", "seconds", "options", "machine"
        report["network"] = {name: checkpoint[name] for name in names}
    write_json(args.out / "results.json", report)
    print(table(results))
    if films := sorted(map(str, args.out.glob("*.gif"))):
        print("films:", *films)


if __name__ == "__main__":
    import evaluate  # so that workers find its functions under this name
    run_program(evaluate.main)
