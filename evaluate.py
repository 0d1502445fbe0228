"""Measure how often a policy imitates a demonstration of a task never seen in training.

    python evaluate.py                                     # the weights in results/
    python evaluate.py --checkpoint runs/ours/last.pt --out runs/ours/test --gif 8
    python evaluate.py --policy expert --out runs/expert
    python evaluate.py --redraw --out runs/redrawn         # demonstrations drawn for every trial
    python evaluate.py --look table --out runs/table       # in a look that training never showed
    python evaluate.py --only 52 --film-failures           # what goes wrong in test task 52
    python evaluate.py --out runs/shared --shard 3/8       # on each of 8 machines, common folder

The default protocol is the paper's: 74 test tasks x 6 trials, one demonstration and five. Prints a
table and writes OUT/evaluation.json (the settings), OUT/trials (a file for each task and number of
shots) and, put together from these, OUT/results.json with a row for every trial. With the same
weights, seed and processor the rows are the same. An interrupted evaluation goes on with the same
command. The demonstrations are those of the benchmark's data set, recorded here.
"""
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
from common import (UserError, claim, cores, launched, make_files, option_parser, run_program,
                    shard, write_atomically, write_json)
from data import FULL_DATA, evenly_spaced
from train import load_model, machine

LOOKS = {"default": sim.Look(), **sim.HELD_OUT_LOOKS}
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
        n, films = model.settings.demo_frames, [np.asarray(demo["frames"]) for demo in demos]
        frames = np.stack([film[evenly_spaced(len(film), n)] for film in films])
        frames = torch.as_tensor(frames, device=device)  # (K, n, H, W, 3)
        with torch.no_grad():
            context = model.embed(frames)

    def policy(obs):
        image = torch.as_tensor(np.ascontiguousarray(obs["image"]), device=device)
        state = torch.as_tensor(obs["state"], dtype=torch.float32, device=device)
        return model.act(image, state, context).cpu().numpy()

    return policy


def make_policy(name, env, demos, model, seed):
    """The policy of one trial: "expert", "random", "no-demo" or a method's."""
    if name == "expert":
        return lambda obs: sim.expert_action(env)
    if name == "random":
        rng = np.random.default_rng(seed)
        return lambda obs: rng.uniform(-1, 1, sim.ACTION_DIM)
    if name == "no-demo":  # a zero sentence: what TecNets does without being told the task
        return policy_of(model, context=torch.zeros(model.settings.embedding_dim))
    return policy_of(model, demos)


def rollout(env, policy, seed=None, options=None, film=None):
    """One episode of an environment with Gymnasium's calls; the last info.

    Observations are dicts of an `image` (H, W, 3) uint8 and a `state` (S,) float32. The images are
    appended to `film`, every second one.
    """
    obs, info = env.reset(seed=seed, options=options)
    step, over = 0, False
    while not over:
        if film is not None and step % 2 == 0:
            film.append(np.array(obs["image"]))  # an environment may use its array again
        obs, _, terminated, truncated, info = env.step(policy(obs))
        step, over = step + 1, terminated or truncated
    return info


# Trials ---------------------------------------------------------------------------------------

def choose_demos(evaluation, index, trial, shots):
    """The numbers of the demonstrations that a trial is given: a seeded choice."""
    key = [evaluation["seed"], index]
    if evaluation["redraw"]:
        key += [trial, REDRAW]
    return np.random.default_rng(key).permutation(FULL_DATA["demos"])[:shots].tolist()


def scene_seed(evaluation, index, trial):
    """The seed of a trial's scene, the same for both tasks of a pair."""
    key = [evaluation["seed"], sim.split_key(evaluation["split"]), index // 2, trial]
    return int(np.random.default_rng(key).integers(2 ** 31))


def try_task(path, evaluation, index, shots, weights, filmed):
    """Write the file of a task's trials with a number of shots, after their GIFs if `filmed`.

    `weights` are the bytes of a checkpoint's file, None for a policy that needs none.
    """
    torch.set_num_threads(1)
    start, failures = time.perf_counter(), evaluation["film_failures"]
    name, split, seed = (evaluation[key] for key in ("policy", "split", "seed"))
    env, task = sim.PushEnv(), sim.make_task(split, index)
    model = load_model(weights)[0] if weights else None

    @functools.cache
    def demo(number):
        look = LOOKS[evaluation["demo_look"]]
        return sim.record_demo(env, task, number, FULL_DATA["seed"], look)

    rows, films = [], []
    for trial in range(evaluation["trials"]):
        numbers = choose_demos(evaluation, index, trial, shots)
        demos = [demo(number) for number in numbers]
        policy = make_policy(name, env, demos, model, [seed, index, trial])
        # A task and its partner have the same scene with the roles swapped.
        options = {"task": task, "swap": index % 2 == 1, "look": LOOKS[evaluation["look"]]}
        film = []
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
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=SHIPPED, help="of a network")
    add("--split", choices=sim.SPLITS, default="test", help="of the tasks")
    add("--tasks", type=int, default=FULL_DATA["tasks"]["test"], help="the first ones of the split")
    add("--only", type=int, nargs="+", metavar="TASK", help="these tasks in place of --tasks")
    add("--trials", type=int, default=6, help="trials of a task")
    add("--shots", type=int, nargs="+", default=[1, 5], metavar="K",
        choices=range(1, FULL_DATA["demos"] + 1), help="demonstrations that a trial is given")
    add("--redraw", action="store_true",
        help="draw demonstrations anew for every trial, not once for all trials of a task")
    add("--look", choices=LOOKS, default="default", help="of demonstrations and trials")
    add("--demo-look", choices=LOOKS, help="of demonstrations, if another than that of the trials")
    add("--seed", type=int, default=0, help="of the trials and the choice of demonstrations")
    add("--workers", type=int, default=cores(), help="processes")
    add("--policy", choices=("no-demo", "expert", "random"),
        help="in place of the checkpoint's; no-demo is TecNets with a zero sentence")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder of results and GIFs")
    add("--shard", type=shard, default=launched()[:2], metavar="I/N",
        help="try the I-th of N shards of the tasks, I from 0; the last one to finish writes the "
        "results; by default the rank under torchrun or srun, else all")
    add("--gif", type=int, default=0, metavar="N", help="film trials of the first N tasks")
    add("--film-failures", action="store_true", help="film every failing trial, a GIF each")
    return parser.parse_args()


def main():
    args = parse()
    policy, weights, checkpoint = args.policy, None, None
    if policy not in ("expert", "random"):
        weights = Path(args.checkpoint).read_bytes()  # once: all trials have the same
        _, checkpoint = load_model(weights, args.checkpoint)
        if checkpoint["data"]["benchmark"] != sim.VERSION:
            raise UserError(f"{args.checkpoint} was not trained on this benchmark's data, and its "
                            "success here would mean nothing: try it by evaluate.rollout in an "
                            "environment of its own data (README.md)")
        method = checkpoint["options"]["method"]
        if policy and method != "tecnets":
            raise UserError(f"no-demo is TecNets without a sentence, {args.checkpoint} is {method}")
        policy = policy or method
    tasks = sorted(set(args.only)) if args.only else list(range(args.tasks))
    shots = [0] if args.policy else sorted(set(args.shots))
    evaluation = {
        "benchmark": sim.VERSION, "policy": policy, "split": args.split,
        "tasks": tasks if args.only else args.tasks, "trials": args.trials, "seed": args.seed,
        "redraw": args.redraw, "gif": args.gif, "film_failures": args.film_failures,
        "look": args.look, "demo_look": args.demo_look or args.look, "shots": shots,
        "checkpoint": weights and hashlib.sha256(weights).hexdigest()}
    claim(args.out / "evaluation.json", evaluation)
    jobs = []
    for k in shots:
        for index in tasks:
            path = args.out / "trials" / f"task{index:02d}-shots{k}.json"
            filmed = index in tasks[:args.gif]
            jobs.append((path, evaluation, index, k, weights, filmed))
    if missing := make_files(try_task, jobs, args.workers, args.shard):
        return print(f"{args.out}: {missing} of {len(jobs)} files still to come from other shards")
    results = []
    for k in shots:
        files = [json.loads(job[0].read_text()) for job in jobs if job[3] == k]
        rows = [row for file in files for row in file["trials"]]
        seconds = sum(file["seconds"] for file in files)
        results.append(summary(policy, args.split, k, args.seed, rows, seconds))
    report = {"evaluation": evaluation, "machine": {**machine(), "threads": 1}, "results": results}
    if checkpoint:
        names = "step", "seconds", "options", "machine"
        report["network"] = {name: checkpoint[name] for name in names}
    write_json(args.out / "results.json", report)
    print(table(results))


if __name__ == "__main__":
    import evaluate  # so that workers find its functions under this name
    run_program(evaluate.main)
