"""Measure how often a policy imitates a demonstration of a task never seen in training.

    python evaluate.py                                     # the weights in results/
    python evaluate.py --checkpoint runs/ours/last.pt --out runs/ours/test --gif 8
    python evaluate.py --policy expert --out runs/expert
    python evaluate.py --only 52 --film-failures           # what goes wrong in test task 52
    python evaluate.py --embedding-map map.png             # where the sentences of the test tasks lie
    python evaluate.py --out runs/shared --share 3/8       # on each of 8 machines with a common folder, 0/8 to 7/8

The default protocol is the paper's: 74 test tasks x 6 trials, one demonstration and five. Prints a
table and writes DIR/results.json with a row for every trial. With the same weights, demonstrations and
seed the rows are the same, whatever the number of workers. An interrupted evaluation goes on with the same
command: every finished trial is in DIR/trials.jsonl. Of several shares the last to finish writes the
results. Demonstrations come from the data set, or are recorded on the fly.
"""
import argparse
import collections
import functools
import hashlib
import itertools
import json
import statistics
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import sim
from common import (Parser, UserError, command, cores, installed_packages, launched, locked, number, parallel, progress,
                    say, share, warn_of_packages, write_atomically, writing)
from data import FULL_DATA, TaskSet, evenly_spaced, record_demo
from train import METHODS, load_model

POLICIES = (*METHODS, "no-demo", "expert", "random")
SHIPPED = Path(__file__).parent / "results" / "weights.pt"
FILMED_TRIALS = 3  # of a task, beside each other in one GIF
FAILURE_SIZE = 500  # pixels of a failing trial's own GIF


# A policy: adapt(demos) before a trial, then act(obs) at every step. `demos` is a list of dicts with
# the `frames` (T, H, W, 3) uint8 of a demonstration, of which a policy may use what it likes.

class NetworkPolicy:
    """A network of any method, which reads `demo_frames` evenly spaced frames of a demonstration."""

    def __init__(self, model, demo_frames):
        self.model, self.demo_frames = model, demo_frames

    def adapt(self, demos):
        frames = np.stack([demo["frames"][evenly_spaced(len(demo["frames"]), self.demo_frames)] for demo in demos])
        with torch.no_grad():
            self.context = self.model.embed(torch.from_numpy(frames))  # of (K, n, H, W, 3); TecNets' sentence

    def act(self, obs):
        return self.model.act(torch.from_numpy(obs["image"]), torch.from_numpy(obs["state"]), self.context).numpy()


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


def rollout(env, policy, task, seed, film=None, film_size=None):
    """One trial: a dict with success, final_distance, distractor_displacement and lost.

    Every second frame is appended to `film`, the policy's own or one of `film_size` pixels.
    """
    obs, info = env.reset(seed=seed, options={"task": task, "swap": task.index % 2 == 1})
    for step in range(sim.HORIZON):
        if film is not None and step % 2 == 0:
            film.append(env.picture(film_size) if film_size else obs["image"])
        obs, _, _, _, info = env.step(policy.act(obs))
    return {"success": bool(info["success"]), "final_distance": round(info["distance"], 5),
            "distractor_displacement": round(info["distractor_displacement"], 5), "lost": bool(info["lost"])}


# Trials ---------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def _load_network(checkpoint):
    model, content = load_model("the checkpoint", content=checkpoint)
    return model, content["options"]["demo_frames"]


def _run_task(policy_name, checkpoint, split, index, trials, shots, seed, demos, demo_seed, films, film_failures, record):
    """The trials of one task with one number of shots: rows, each also appended to the record."""
    out, task = record and record.parent, sim.make_task(split, index)
    pictures = policy_name not in ("expert", "random") or films or film_failures
    env = sim.PushEnv(render_mode="rgb_array" if pictures else None)
    demos = [record_demo(env, task, demo, demo_seed) if isinstance(demo, int) else demo for demo in demos]
    special = {"no-demo": lambda trial: NoDemoPolicy(*_load_network(checkpoint)), "expert": lambda trial: ExpertPolicy(env),
               "random": lambda trial: RandomPolicy([seed, index, trial])}

    def run(trial, *film):
        policy = special.get(policy_name, lambda trial: NetworkPolicy(*_load_network(checkpoint)))(trial)
        policy.adapt(demos)
        scene = [seed, sim.split_key(split), index // 2, trial]  # the same for both tasks of a pair
        return rollout(env, policy, task, int(np.random.default_rng(scene).integers(2 ** 31)), *film)

    rows, filmed, recorded = [], [], 0
    for trial in trials:
        film = [] if films and trial < FILMED_TRIALS else None
        outcome = run(trial, film)
        rows.append({"shots": shots, "task": index, "trial": trial, **outcome})
        if film_failures and not outcome["success"]:
            large = []
            run(trial, large, FAILURE_SIZE)  # the same trial again
            save_gif(out / f"task{index:02d}-shots{shots}-trial{trial}.gif", [demo["frames"] for demo in demos[:1]],
                     [(large, False)], FAILURE_SIZE)
        if film:
            filmed.append((film, outcome["success"]))
            if trial < min(FILMED_TRIALS, len(trials)) - 1:
                continue  # these trials are recorded together, with their GIF
            save_gif(out / f"task{index:02d}-shots{shots}.gif", [demo["frames"] for demo in demos[:1]], filmed)
        if record:
            with writing(record), open(record, "a") as file:
                file.write("".join(_line(row) for row in rows[recorded:]))
            recorded = len(rows)  # of a last line that a kill has cut the trial is run again
    env.close()
    return rows


def run_trials(policy, split, tasks, trials, shots, seed, workers, checkpoint=None, data=None, films=0,
               film_failures=False, record=None, done=(), part=0, parts=1):
    """The rows of `trials` trials of each of the `tasks` (a list of numbers), sorted by task and trial.

    Of several `parts` this tries every parts-th task, from the number `part` of the list on.

    `checkpoint` is the content of one, for the networks. Demonstrations are a seeded choice of
    a task's, from the TaskSet `data` or, without one, recorded.
    `done` are rows of trials that need not be run again. Every row is appended to the file `record`; in its folder
    the first trials of the first `films` tasks become a GIF, and, with `film_failures`, every failure.
    """
    jobs, demo_frames = [], _load_network(checkpoint)[1] if checkpoint else 2
    demo_seed, n_demos = (data.manifest["seed"], data.n_demos) if data else (FULL_DATA["seed"], FULL_DATA["demos"])
    if shots > n_demos:
        raise UserError(f"{shots} shots need as many demonstrations, a task has {n_demos}: lower --shots")
    rows = [row for row in done if row["shots"] == shots]
    finished, planned = {(row["task"], row["trial"]) for row in rows}, len(tasks[part::parts]) * trials
    for order, index in list(enumerate(tasks))[part::parts]:
        missing = [trial for trial in range(trials) if (index, trial) not in finished]
        chosen = np.random.default_rng([seed, index]).permutation(n_demos)[:shots].tolist()
        filmed = order < films and 0 in missing
        if data and missing:
            times = range(data.horizon) if filmed or film_failures else evenly_spaced(data.horizon, demo_frames)
            chosen = [{"frames": data.frames(index, demo, times)} for demo in chosen]
        if missing:
            jobs.append((policy, checkpoint, split, index, missing, shots, seed, chosen, demo_seed, filmed, film_failures, record))
    start, before = time.monotonic(), len(rows)
    for task_rows in parallel(_run_task, jobs, workers):
        rows += task_rows
        left = planned - len(rows)
        progress(f"{policy}, {shots} shots: {len(rows)}/{planned} trials, "
                 f"{100 * sum(row['success'] for row in rows) / len(rows):.1f} % success, "
                 f"{(time.monotonic() - start) / (len(rows) - before) * left:.0f} s left", end=not left)
    return sorted(rows, key=lambda row: (row["task"], row["trial"]))


def _line(values):
    text = json.dumps(values)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def plan(evaluation):
    """The set of (shots, task, trial) of an evaluation."""
    tasks = evaluation["tasks"]
    tasks = tasks if isinstance(tasks, list) else range(tasks)
    return set(itertools.product(evaluation["shots"], tasks, range(evaluation["trials"])))


def keyed(rows):
    return {(row["shots"], row["task"], row["trial"]): row for row in rows}


def read_record(record, evaluation):
    """(the packages, the rows, each once) of the trials.jsonl of an interrupted evaluation, or of one of its shares.

    Raises UserError if it is damaged or belongs to another evaluation.
    """
    lines = []
    for line in record.read_text(errors="replace").split("\n")[:-1]:  # without a torn last line
        try:
            lines.append(json.loads(line[9:]))
        except ValueError:
            lines.append(None)
        if _line(lines[-1]) != line + "\n":
            raise UserError(f"{record} is damaged: delete it to evaluate anew")
    header = lines[0] if lines else dict(evaluation)
    packages, rows = header.pop("packages", installed_packages()), keyed(lines[1:])
    if header != evaluation or not rows.keys() <= plan(evaluation) or len(set(map(_line, lines[1:]))) > len(rows):
        raise UserError(f"{record} belongs to another evaluation: choose another --out, or delete it")
    return packages, list(rows.values())


def resume(record, evaluation):
    """Begin the record of an evaluation, or make the one that is there whole."""
    packages, rows = read_record(record, evaluation) if record.exists() else (installed_packages(), [])
    warn_of_packages(packages, record)
    lines = [{**evaluation, "packages": packages}, *rows]
    write_atomically(record, lambda file: file.writelines(_line(values).encode() for values in lines))


def recorded(out, evaluation):
    """The rows of all records in a folder, each trial once, sorted."""
    rows = keyed(row for record in out.glob("trials*.jsonl") for row in read_record(record, evaluation)[1])
    return [rows[key] for key in sorted(rows)]


# Results --------------------------------------------------------------------------------------

def interval(rows, resamples=10_000):
    """The 95 % interval [low, high] of the success rate of rows: a seeded bootstrap that draws pairs of tasks.

    The trials of a task share its objects, and so do the two tasks of a pair: to take trials for independent would
    give too narrow an interval.
    """
    pairs = collections.defaultdict(list)
    for row in rows:
        pairs[row["task"] // 2].append(row["success"])
    counts = np.array([(sum(pairs[pair]), len(pairs[pair])) for pair in sorted(pairs)])
    drawn = counts[np.random.default_rng(0).integers(len(counts), size=(resamples, len(counts)))].sum(1)
    return np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975)).tolist()


def summary(policy, split, shots, seed, rows, seconds):
    """One entry of results.json."""
    successes, n = sum(row["success"] for row in rows), len(rows)
    return {"policy": policy, "split": split, "shots": shots, "n_tasks": len({row["task"] for row in rows}),
            "n_trials": n, "successes": successes, "success_rate": successes / n,
            "ci95": interval(rows),
            "strict_success_rate": sum(row["final_distance"] < sim.STRICT_DISTANCE for row in rows) / n,
            "distractor_moved_rate": sum(row["distractor_displacement"] > sim.MOVED_DISTANCE for row in rows) / n,
            "seconds": round(seconds, 1), "seed": seed, "trials": rows}


def table(results):
    """The results as lines of text."""
    lines = [f"{'policy':10} {'shots':>5} {'trials':>6}  {'success %':>9}  {'95 % interval':>13}  "
             f"{'final < 5 cm':>12}  {'distractor moved':>16}"]
    for r in results:
        low, high = r["ci95"]
        interval = f"{100 * low:.1f} - {100 * high:.1f}"
        lines.append(f"{r['policy']:10} {r['shots']:5} {r['n_trials']:6}  {100 * r['success_rate']:9.1f}  {interval:>13}  "
                     f"{100 * r['strict_success_rate']:12.1f}  {100 * r['distractor_moved_rate']:16.1f}")
    return "\n".join(lines)


def save_gif(path, demo, films, size=250):
    """The demonstration's frames, if there is one, beside (film, success) of rollouts, framed green or red; 10 a second."""
    pictures = []
    for moment in range(len(films[0][0])):
        picture = Image.new("RGB", (size * (len(demo) + len(films)), size))
        parts = [*(frames[2 * moment] for frames in demo), *(film[moment] for film, _ in films)]
        for column, part in enumerate(parts):
            picture.paste(Image.fromarray(part).resize((size, size), Image.Resampling.NEAREST), (size * column, 0))
        draw = ImageDraw.Draw(picture)
        if demo:
            draw.text((6, 4), "demonstration", "black")
        for column, (_, success) in enumerate(films, len(demo)):
            left = size * column
            draw.rectangle((left, 0, left + size - 1, size - 1), outline="green" if success else "red", width=3)
            draw.text((left + 6, 4), f"rollout {'succeeds' if success else 'fails'}", "black")
        pictures.append(picture)
    write_atomically(path, lambda file: pictures[0].save(
        file, "gif", save_all=True, append_images=pictures[1:], duration=100, loop=0))


def measure_costs(checkpoint, repeats=20):
    """Number of parameters, and milliseconds of an adaptation to one demonstration and of an action, on one core."""
    model, demo_frames = _load_network(checkpoint)
    policy, seconds = NetworkPolicy(model, demo_frames), {"adapt": [], "act": []}
    size, state = model.settings.image_size, np.zeros(sim.STATE_DIM, np.float32)
    frames = np.random.default_rng(0).integers(0, 256, (sim.HORIZON, size, size, 3), np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats):
        for name, call in (("adapt", lambda: policy.adapt([{"frames": frames}])),
                           ("act", lambda: policy.act({"image": frames[0], "state": state}))):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {"parameters": sum(p.numel() for p in model.parameters()),
            **{f"{name}_ms": round(1000 * statistics.median(values), 2) for name, values in seconds.items()}}


# The embedding --------------------------------------------------------------------------------

@torch.no_grad()
def embedding_map(path, model, data, train_data, side=1600, thumbnail=120):
    """Draw the last frames of demonstrations at the first two principal components of their sentences.

    Returns retrieval figures: the share of demos whose sentence is nearest (largest dot product) to that of
    their own task, and the nearest training task of each task. A task's sentence is the normalised mean of
    its demos' sentences, for retrieval; the demo itself is left out of its own task's.
    """
    s_q = model.embed(torch.from_numpy(data.ends)[:, :, None])  # (N, D, E), every demo alone
    N, D, E = s_q.shape
    totals = s_q.sum(1)
    similarity = torch.einsum("nde,me->ndm", s_q, F.normalize(totals, dim=-1))
    own = (s_q * F.normalize(totals[:, None] - s_q, dim=-1)).sum(-1)  # (N, D), without the demo itself
    similarity[torch.arange(N), :, torch.arange(N)] = own
    found = similarity.argmax(-1) == torch.arange(N)[:, None]
    s_U, s_train = (model.embed(torch.from_numpy(set_.ends)) for set_ in (data, train_data))
    nearness, nearest = (s_U @ s_train.T).max(-1)

    points = s_q[:, 0] - s_q[:, 0].mean(0)  # one demo a task is drawn
    points = points @ torch.linalg.svd(points).Vh[:2].T
    points = (points - points.amin(0)) / (points.amax(0) - points.amin(0)).clamp(min=1e-9) * (side - thumbnail)
    canvas = Image.new("RGB", (side, side), "white")
    for task, (x, y) in enumerate(points.round().int().tolist()):
        canvas.paste(Image.fromarray(data.ends[task, 0, 1]).resize((thumbnail, thumbnail)), (x, y))
    write_atomically(path, lambda file: canvas.save(file, "png"))
    return {"tasks": N, "demos": N * D, "retrieval": found.float().mean().item(),
            "nearest_training_task": nearest.tolist(), "nearest_similarity": nearness.tolist()}


# The program ----------------------------------------------------------------------------------

def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=SHIPPED, help="of a network (default: the weights in results/)")
    parser.add_argument("--data", default="data/push", help="data set to take demonstrations from, if it is there")
    parser.add_argument("--split", choices=sim.SPLITS, default="test")
    parser.add_argument("--tasks", type=number(int, 1, 10 ** 6), default=FULL_DATA["tasks"]["test"],
                        help="the first tasks of the split")
    parser.add_argument("--only", type=number(int, 0), nargs="+", metavar="TASK", help="these tasks in place of --tasks")
    parser.add_argument("--trials", type=number(int, 1, 10 ** 6), default=6, help="trials a task")
    parser.add_argument("--shots", type=number(int, 1), nargs="+", default=[1, 5], help="demonstrations a task")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the trials and the choice of demonstrations")
    parser.add_argument("--workers", type=number(int, 1), default=cores(), help="processes")
    parser.add_argument("--policy", "--method", choices=POLICIES,
                        help="by default the checkpoint's; no-demo: TecNets with a zero sentence")
    parser.add_argument("--out", default="runs/evaluation", help="folder of results.json and the GIFs")
    parser.add_argument("--share", type=share, default=launched()[:2], metavar="I/N", help="try the I-th of N shares of the "
                        "tasks, I from 0; the last to finish writes the results (default: as torchrun or srun says, else all)")
    parser.add_argument("--gif", type=number(int, 0), default=0, help="film the first trials of this many tasks")
    parser.add_argument("--film-failures", action="store_true", help="film every failing trial, one large GIF each")
    parser.add_argument("--embedding-map", metavar="PNG", help="draw the tasks' sentences, write figures to PNG.json, and end")
    return parser.parse_args()


def read_network(args):
    """(the model, its checkpoint's dict, the checkpoint's bytes), checked against the arguments and the simulator."""
    model, content = load_model(args.checkpoint)
    method, c = content["options"]["method"], model.settings
    if content["options"]["demo_frames"] > sim.HORIZON:
        raise UserError(f"{args.checkpoint} reads {content['options']['demo_frames']} frames of a demonstration, which has "
                        f"{sim.HORIZON}: take another checkpoint")
    if args.policy not in (None, method) and (args.policy, method) != ("no-demo", "tecnets"):
        raise UserError(f"{args.checkpoint} is of the method {method}: leave --policy out or take another checkpoint")
    if (c.image_size, c.state_dim, c.action_dim) != (sim.IMAGE_SIZE, sim.STATE_DIM, sim.ACTION_DIM):
        raise UserError(f"{args.checkpoint} was trained on images of {c.image_size} pixels, {c.state_dim} states and "
                        f"{c.action_dim} actions; there is a simulator here for the benchmark's {sim.IMAGE_SIZE}, "
                        f"{sim.STATE_DIM} and {sim.ACTION_DIM} only: take another checkpoint")
    return model, content, Path(args.checkpoint).read_bytes()  # bytes once: all trials are of the same weights


def draw_map(args, policy, model):
    """The program with --embedding-map."""
    if policy != "tecnets":
        raise UserError(f"only tecnets has sentences to draw, not {policy}: take another checkpoint")
    figures = embedding_map(args.embedding_map, model, TaskSet(args.data, args.split, args.tasks), TaskSet(args.data, "train"))
    write_atomically(f"{args.embedding_map}.json", lambda file: file.write(json.dumps(figures, indent=1).encode()))
    say(f"{figures['retrieval']:.1%} of {figures['demos']} demonstrations are nearest to their own among "
        f"{figures['tasks']} tasks; figures in {args.embedding_map}.json")


def read_demonstrations(args, policy, tasks):
    """The TaskSet that demonstrations come from; None if they are to be recorded, or the policy needs none."""
    if policy not in METHODS:
        return None
    if not (Path(args.data) / "manifest.json").exists():
        say(f"no data set in {args.data}: recording the demonstrations on the fly")
        return None
    data = TaskSet(args.data, args.split, max(tasks) + 1)
    if data.manifest["seed"] is None:
        raise UserError(f"{args.data} was not made by data.py: there is no simulator here for its tasks; give another --data")
    return data


def finished_report(path, evaluation):
    """The report of the same evaluation, None if there is none. Raises UserError for another one's."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
        rows = [row for result in report["results"] for row in result["trials"]]
        same = report["evaluation"] == evaluation and keyed(rows).keys() == plan(evaluation) and \
            len(rows) == len(keyed(rows)) == sum(result["n_trials"] for result in report["results"])
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{path} is of another evaluation: choose another --out, or delete it")
    return report


def main():
    args = parse()
    model = content = checkpoint = method = None
    if args.policy not in ("expert", "random"):
        model, content, checkpoint = read_network(args)
        method = content["options"]["method"]
    policy = args.policy or method
    if args.embedding_map:
        return draw_map(args, policy, model)
    tasks = sorted(set(args.only)) if args.only else list(range(args.tasks))
    data = read_demonstrations(args, policy, tasks)
    out, shots = Path(args.out), list(dict.fromkeys(args.shots)) if policy in METHODS else [0]
    evaluation = {"benchmark": sim.VERSION, "policy": policy, "split": args.split,
                  "tasks": args.only and tasks or args.tasks, "trials": args.trials, "seed": args.seed, "gif": args.gif,
                  "film_failures": args.film_failures, "shots": shots,
                  "checkpoint": checkpoint is not None and hashlib.sha256(checkpoint).hexdigest(),
                  "demos": data and [data.manifest["seed"], data.n_demos]}
    part, parts = args.share
    record = out / ("trials.jsonl" if parts == 1 else f"trials-{part}-of-{parts}.jsonl")
    with locked(out, part, parts):
        report = finished_report(out / "results.json", evaluation)
        if report is None:
            resume(record, evaluation)
            seconds, done = {}, recorded(out, evaluation)
            for k in shots:
                start = time.monotonic()
                run_trials(policy, args.split, tasks, args.trials, k, args.seed, args.workers, checkpoint, data,
                           args.gif, args.film_failures, record, done, part, parts)
                seconds[k] = time.monotonic() - start
            rows = recorded(out, evaluation)
            report = finished_report(out / "results.json", evaluation)  # perhaps another share has just finished
            if report is None and len(rows) < len(plan(evaluation)):
                return say(f"{out}: {len(rows)} of {len(plan(evaluation))} trials, the other shares are still to come")
        if report is None:
            results = [summary(policy, args.split, k, args.seed, [row for row in rows if row["shots"] == k], seconds[k])
                       for k in shots]
            report = {"evaluation": evaluation, "packages": installed_packages(), "results": results}
            if checkpoint:
                trained = {name: content[name] for name in ("step", "seconds", "options")}
                report["network"] = {**measure_costs(checkpoint), **trained}
            write_atomically(out / "results.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
        for record in out.glob("trials*.jsonl"):
            record.unlink(missing_ok=True)
    say(table(report["results"]))
    if films := sorted(str(path) for path in out.glob("*.gif")):
        say("films:", *films)


if __name__ == "__main__":
    command(main, "lower --workers")
