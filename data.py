"""The data set of demonstrations, and the loader that draws few-shot batches from it.

    python data.py --out data/push

writes one `SPLIT/INDEX.npz` a task: states, clean expert actions, and frames that are compressed
one by one (so that any frame is read alone), beside a `manifest.json`. An interrupted run is
finished by the same command; a larger `--train` adds tasks. The bytes depend on the seed only.
"""
import argparse
import collections
import fcntl
import json
import multiprocessing
import os
import sys
import time
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

import sim

VERSION = 1
NOISE = 0.1  # std of the noise on a demonstration's executed actions; the clean ones are recorded
CLEAN_ATTEMPTS = 20  # from here on a demo may end up to SUCCESS_DISTANCE off or move the distractor
ATTEMPTS = 40
STATE_STD_FLOOR = 1e-3  # as in MIL


class UserError(Exception):
    """A mistake that one line can tell a user how to mend."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, with exit code 2."""

    def error(self, message):
        fail(f"{message} (see --help)")


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def command(main):
    """Run a command-line program: a UserError or a failing disk is one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)


def number(kind, low, high=1e9):
    """An argparse type: a number of a kind within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def choice(*words):
    """An argparse type: one of some words."""
    def parse(text):
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(words)}")
        return text
    return parse


def progress(line, end=False):
    """Show a line in place of the last one, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\n" if end else "", file=sys.stderr, flush=True)


def parallel(function, jobs, workers, **options):
    """Yield `function(job)` for all jobs as they finish, in fresh processes; `options` go to the executor.

    Raises UserError if a process dies, as it does for lack of memory.
    """
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # inherited: a core for every process
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(jobs))), mp_context=context, **options) as pool:
        try:
            for future in as_completed([pool.submit(function, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for lack of memory: run the same command with fewer --workers")
        finally:
            pool.shutdown(cancel_futures=True)


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then give it its name."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Recording ------------------------------------------------------------------------------------

def record_demo(env, task, number_, seed):
    """Demonstration number `number_` of a task: the target starts on alternate sides.

    The expert's action plus noise is executed, the clean action is recorded. An attempt that fails,
    moves the distractor or leaves the target off the disc is redrawn, up to ATTEMPTS times.
    Returns a dict of `frames` (100, H, W, 3) uint8 (absent without rendering), `states` (100, 20)
    and `actions` (100, 7) float32; it depends on (task, number_, seed) only.
    """
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, sim.SPLITS.index(task.split), task.index, number_, attempt])
        start = {"task": task, "side": 1 if number_ % 2 else -1}
        obs, info = env.reset(seed=int(rng.integers(2 ** 31)), options=start)
        observations, actions = [], []
        for _ in range(sim.HORIZON):
            observations.append(obs)
            actions.append(sim.expert_action(env))
            obs, _, _, _, info = env.step(actions[-1] + rng.normal(0, NOISE, sim.ACTION_DIM))
        clean = info["distance"] < sim.STRICT_DISTANCE and info["distractor_displacement"] < sim.MOVED_DISTANCE
        if info["success"] and (clean or attempt >= CLEAN_ATTEMPTS):
            demo = {"states": np.stack([o["state"] for o in observations]),
                    "actions": np.array(actions, np.float32)}
            if env.render:
                demo["frames"] = np.stack([o["image"] for o in observations])
            return demo
    raise RuntimeError(f"the expert failed {ATTEMPTS} times on {task}")


def _write_task(job):
    folder, split, index, demos, seed = job
    env = sim.PushEnv()
    states, actions, frames = [], [], []
    for number_ in range(demos):
        demo = record_demo(env, sim.make_task(split, index), number_, seed)
        states.append(demo["states"])
        actions.append(demo["actions"])
        frames += [zlib.compress(frame.tobytes(), 1) for frame in demo["frames"]]
    env.close()
    arrays = {"states": np.stack(states), "actions": np.stack(actions),
              "frames": np.frombuffer(b"".join(frames), np.uint8),
              "offsets": np.cumsum([0] + [len(frame) for frame in frames])}
    write_atomically(task_path(folder, split, index), lambda file: np.savez(file, **arrays))
    return split, index


def task_path(folder, split, index):
    return Path(folder) / split / f"{index:05d}.npz"


def generate(folder, counts, demos, seed, workers=None):
    """Write (or finish, or extend) the data set; `counts` maps a split to its number of tasks.

    Raises UserError if the folder holds data of other settings or is being written by another process.
    """
    folder = Path(folder)
    for split in counts:
        (folder / split).mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is being written by another process: wait for it or choose another --out")
        manifest = dict(version=VERSION, seed=seed, demos=demos, noise=NOISE, horizon=sim.HORIZON,
                        image_size=sim.IMAGE_SIZE, tasks=counts)
        if (folder / "manifest.json").exists():
            old = read_manifest(folder)
            manifest["tasks"] = {split: max(counts.get(split, 0), old["tasks"].get(split, 0)) for split in sim.SPLITS}
            if {**old, "tasks": manifest["tasks"]} != manifest:
                raise UserError(f"{folder} holds data with other settings (seed {old['seed']}, {old['demos']} demos): "
                                "give the same, or choose another --out")
        write_atomically(folder / "manifest.json",
                         lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        for stale in folder.glob("*/*.tmp"):
            stale.unlink()
        jobs = [(folder, split, index, demos, seed) for split in counts for index in range(counts[split])
                if not task_path(folder, split, index).exists()]
        start = time.monotonic()
        for done, (split, index) in enumerate(parallel(_write_task, jobs, workers or os.cpu_count()), 1):
            seconds = time.monotonic() - start
            progress(f"{split} {index}: {done}/{len(jobs)} tasks, {done * demos * sim.HORIZON / seconds:.0f} "
                     f"frames/s, {seconds / done * (len(jobs) - done) / 60:.1f} min left", end=done == len(jobs))


def data_command(folder, manifest):
    """The command that makes or finishes a data set."""
    tasks = " ".join(f"--{split} {count}" for split, count in manifest["tasks"].items())
    return f"python data.py --out {folder} {tasks} --demos {manifest['demos']} --seed {manifest['seed']}"


def read_manifest(folder):
    """The manifest of a data folder. Raises UserError if there is none, or not one of ours."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version = manifest["version"]
    except FileNotFoundError:
        raise UserError(f"no data set in {folder}: make one with python data.py --out {folder}")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete {folder} and make it anew with python data.py")
    if version != VERSION:
        raise UserError(f"{folder} has format version {version}, this program reads {VERSION}: make it anew")
    return manifest


# Reading --------------------------------------------------------------------------------------

class TaskSet:
    """All demonstrations of a split, in memory: frames compressed, first and last ones ready.

    `states` (N, D, T, 20) and `actions` (N, D, T, 7) float32; `ends` (N, D, 2, H, W, 3) uint8 the
    first and last frames. Raises UserError for missing or damaged files.
    """

    def __init__(self, folder, split, tasks=None):
        self.manifest = read_manifest(folder)
        size, available = self.manifest["image_size"], self.manifest["tasks"].get(split, 0)
        count = available if tasks is None else tasks
        if count > available:
            raise UserError(f"{folder} has {available} {split} tasks, not {count}: add more with "
                            f"{data_command(folder, {**self.manifest, 'tasks': {**self.manifest['tasks'], split: count}})}")
        self.frame_shape = (size, size, 3)
        self._frames, self._offsets, states, actions = [], [], [], []
        for index in range(count):
            arrays = self._read(task_path(folder, split, index))
            self._frames.append(arrays["frames"].data)
            self._offsets.append(arrays["offsets"].reshape(-1))
            states.append(arrays["states"])
            actions.append(arrays["actions"])
        self.states, self.actions = np.array(states), np.array(actions)
        self.n_tasks, self.n_demos = count, self.manifest["demos"]
        self.horizon = self.manifest["horizon"]
        self.ends = np.empty((count, self.n_demos, 2, *self.frame_shape), np.uint8)
        for task in range(count):
            for demo in range(self.n_demos):
                for end, time_ in enumerate((0, self.horizon - 1)):
                    self.ends[task, demo, end] = self.frame(task, demo, time_)

    def _read(self, path):
        """A task's arrays, their checksums verified."""
        demos, horizon = self.manifest["demos"], self.manifest["horizon"]
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            shapes = {name: arrays[name].shape for name in ("states", "actions", "offsets")}
        except FileNotFoundError:
            raise UserError(f"{path} is missing: finish the data set with {data_command(path.parents[1], self.manifest)}")
        except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            damaged, shapes = error, None
        if damaged or shapes != {"states": (demos, horizon, sim.STATE_DIM), "actions": (demos, horizon, sim.ACTION_DIM),
                                 "offsets": (demos * horizon + 1,)}:
            raise UserError(f"{path} is damaged: delete it and run {data_command(path.parents[1], self.manifest)}")
        return arrays

    def frame(self, task, demo, time_):
        """The frame (H, W, 3) uint8 at one time of one demo."""
        at = demo * self.horizon + time_
        start, stop = self._offsets[task][at:at + 2]
        pixels = zlib.decompress(self._frames[task][start:stop], bufsize=int(np.prod(self.frame_shape)))
        return np.frombuffer(pixels, np.uint8).reshape(self.frame_shape)

    def state_statistics(self):
        """Mean and standard deviation (20,) of the states, the latter at least STATE_STD_FLOOR."""
        states = self.states.reshape(-1, self.states.shape[-1]).astype(np.float64)
        return states.mean(0).astype(np.float32), np.maximum(states.std(0), STATE_STD_FLOOR).astype(np.float32)


class TaskLoader:
    """An endless iterator of few-shot batches; batch i depends on (seed, i) only.

    A batch has B different tasks; of each K support and Q query demos, all different, and F control
    samples of each of the two sets, every one at a random time of a random demo of its set: uniform
    for early = 1, else T u^early with a uniform u, which favours the demo's beginning. With
    `random_support` every batch draws its K from 1 to the K given. With `mirror` half of the tasks
    are seen in a mirror, all their demos alike.

    It is a dict of uint8 and float32 arrays, U for support and q for query:
    `ends_U` (B, K, 2, H, W, 3), `ends_q` (B, Q, 2, H, W, 3), `images` (B, 2, F, H, W, 3),
    `states` (B, 2, F, 20), `actions` (B, 2, F, 7), with U before q on axis 1. And `tasks` (B,),
    `mirrored` (B,), `demos` (B, K + Q), `control_demos` (B, 2, F), `times` (B, 2, F) tell what was
    drawn. Batches are prepared ahead on a background thread. Raises UserError if B or K + Q are too many.
    """

    def __init__(self, task_set, B, K, Q, F, seed, early=1.0, random_support=False, mirror=False, ahead=3):
        if B > task_set.n_tasks:
            raise UserError(f"a batch of {B} tasks needs as many, the data set has {task_set.n_tasks}: lower --batch")
        if K + Q > task_set.n_demos:
            raise UserError(f"K + Q = {K} + {Q} demos are more than the {task_set.n_demos} of a task: "
                            "lower --support or --query")
        self.task_set, self.B, self.K, self.Q, self.F, self.seed, self.early = task_set, B, K, Q, F, seed, early
        self.random_support, self.mirror = random_support, mirror
        self.position = 0
        self._pool, self._ahead, self._queue = ThreadPoolExecutor(1), ahead, collections.deque()

    def batch(self, position):
        """The batch at a position of the sequence."""
        data, B, K, Q, F = self.task_set, self.B, self.K, self.Q, self.F
        rng = np.random.default_rng([self.seed, position])
        if self.random_support:
            K = int(rng.integers(1, K + 1))
        tasks = rng.choice(data.n_tasks, B, replace=False)
        mirrored = rng.random(B) < 0.5 * self.mirror
        demos = np.stack([rng.choice(data.n_demos, K + Q, replace=False) for _ in tasks])
        picks = np.stack([rng.integers(0, K, (B, F)), rng.integers(K, K + Q, (B, F))], 1)  # (B, 2, F)
        control_demos = np.take_along_axis(demos[:, None], picks, 2)  # (B, 2, F)
        times = (data.horizon * rng.random((B, 2, F)) ** self.early).astype(int)
        at = tasks[:, None, None], control_demos, times
        images = np.empty((B, 2, F, *data.frame_shape), np.uint8)
        for i, j, k in np.ndindex(B, 2, F):
            images[i, j, k] = data.frame(tasks[i], control_demos[i, j, k], times[i, j, k])
        batch = {"ends_U": data.ends[tasks[:, None], demos[:, :K]], "ends_q": data.ends[tasks[:, None], demos[:, K:]],
                 "images": images, "states": data.states[at], "actions": data.actions[at]}
        for name in ("ends_U", "ends_q", "images"):
            batch[name][mirrored] = batch[name][mirrored][..., ::-1, :]
        batch["states"][mirrored] *= sim.MIRRORED_STATE
        batch["actions"][mirrored] *= sim.MIRRORED_ACTION
        return {**batch, "tasks": tasks, "mirrored": mirrored, "demos": demos, "control_demos": control_demos,
                "times": times}

    def __iter__(self):
        return self

    def __next__(self):
        while len(self._queue) < self._ahead:
            self._queue.append(self._pool.submit(self.batch, self.position + len(self._queue)))
        batch = self._queue.popleft().result()
        self.position += 1
        return batch

    def state_dict(self):
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state):
        self.seed, self.position = state["seed"], state["position"]
        self._queue.clear()


def main():
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the data set")
    parser.add_argument("--train", type=number(int, 1), default=693, help="training tasks")
    parser.add_argument("--val", type=number(int, 1), default=76, help="validation tasks")
    parser.add_argument("--test", type=number(int, 1), default=74, help="test tasks")
    parser.add_argument("--demos", type=number(int, 2), default=12, help="demonstrations a task")
    parser.add_argument("--workers", type=number(int, 1), default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of all demonstrations")
    args = parser.parse_args()
    counts = {"test": args.test, "val": args.val, "train": args.train}
    generate(args.out, counts, args.demos, args.seed, args.workers)
    tasks = read_manifest(args.out)["tasks"]
    size = sum(path.stat().st_size for path in Path(args.out).glob("*/*.npz"))
    print(f"{args.out}: {tasks['train']} + {tasks['val']} + {tasks['test']} tasks, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    command(main)
