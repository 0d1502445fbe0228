"""The data set of demonstrations, and the loader that draws few-shot batches from it.

    python data.py --out data/push
    python data.py --out data/push --shard 3/8   # on each of 8 machines with a common folder
    python data.py --out data/looks --looks random    # every demonstration in a look of its own

A task is two files: `SPLIT/INDEX.frames`, its frames, compressed one by one, so that any frame is
read alone, and `SPLIT/INDEX.npz`, states, actions, lengths of the demonstrations and offsets of the
frames. `manifest.json` says what the data are. An interrupted run is finished by the same command;
a larger `--train` adds tasks. The bytes depend on `--seed`, `--demos` and `--looks` only.
"""
import json
import math
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common import (UserError, claim, cores, launched, make_files, option_parser, run_program,
                    shard, write_atomically, write_json)

# The simulator is imported where demonstrations are recorded: to read data takes no PyBullet.

FORMAT = 5
FULL_DATA = {"tasks": {"train": 693, "val": 76, "test": 74}, "demos": 12, "seed": 0}  # benchmark
SPLITS = tuple(FULL_DATA["tasks"])
STD_FLOOR = 1e-3  # of the benchmark's states, as in MIL


# Writing --------------------------------------------------------------------------------------

def task_path(folder, split, index):
    return Path(folder) / split / f"{index:05d}.npz"


def generate(folder, tasks, demos, seed, workers=None, shard=(0, 1), looks=None):
    """Record, finish or extend a data set of the simulator; `tasks` maps splits to their numbers.

    With looks="random" every demonstration has a look of its own, else the default one. Of N
    shards, (i, N), this makes the i-th. Returns how many tasks of all shards are missing.
    Raises UserError if the folder holds other data.
    """
    import sim
    folder, counts = Path(folder), dict(tasks)
    if (folder / "manifest.json").exists():
        for split, count in read_manifest(folder)["tasks"].items():
            counts[split] = max(count, tasks.get(split, 0))
    elif any((folder / split).exists() for split in SPLITS):
        raise UserError(f"{folder} holds tasks, but no manifest.json, perhaps of an unfinished "
                        "write_data_set: choose another folder, or delete it")
    manifest = dict(
        format=FORMAT, benchmark=sim.VERSION, seed=seed, demos=demos, image_height=sim.IMAGE_SIZE,
        image_width=sim.IMAGE_SIZE, state_dim=sim.STATE_DIM, action_dim=sim.ACTION_DIM,
        mirror=sim.MIRROR, recolour=not looks, pairs=True, looks=looks, tasks=counts)
    claim(folder / "manifest.json", manifest, free=("tasks",))
    jobs = [(task_path(folder, split, index), split, index, demos, seed, looks)
            for split in tasks for index in range(tasks[split])]
    return make_files(_record_task, jobs, workers or cores(), shard)


def _record_task(path, split, index, demos, seed, looks):
    import sim
    env, task, recorded = sim.PushEnv(), sim.make_task(split, index), []
    for number in range(demos):
        key = seed, sim.split_key(split), index, number, sim.ATTEMPTS  # recording's are below it
        look = sim.random_look(np.random.default_rng(key)) if looks else sim.Look()
        recorded.append(sim.record_demo(env, task, number, seed, look))
    write_task(path, recorded)


def write_data_set(folder, tasks, mirror=None, recolour=False, pairs=False):
    """Write a data set of your own.

    `tasks` maps the splits "train" and "val" (and "test", if wanted) to their tasks, a list or a
    generator. A task is a list of demonstrations, a demonstration a dict of `frames` (T, H, W, 3)
    uint8, `states` (T, S) and `actions` (T, A), each anything that np.asarray takes; T may differ.
    All tasks have equally many demonstrations. Numbers may be in any units; they are stored as
    float32, so large offsets, as those of time stamps, are to be subtracted first.
    `mirror` is a dict of `states` (S,) and `actions` (A,), factors 1 or -1 that turn them into
    those of the scene seen in a mirror; without it batches cannot be mirrored. `recolour` says that
    a picture shows a valid scene, too, with green and blue exchanged or its hues turned; `pairs`
    that tasks 2k and 2k + 1 have the same objects in exchanged roles.
    Raises UserError if the folder is not empty, and ValueError, which names split, task,
    demonstration and key, for arrays that do not fit.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files: choose another folder, or delete it")
    if not {"train", "val"} <= set(tasks) <= set(SPLITS):
        raise ValueError(f"the splits are train, val and perhaps test, not {[*tasks]}")
    manifest, counts = None, dict.fromkeys(tasks, 0)
    for split in tasks:
        for index, demos in enumerate(tasks[split]):
            demos = [{name: np.asarray(demo[name]) for name in ("frames", "states", "actions")}
                     for demo in demos]
            manifest = manifest or _manifest_of(demos, mirror, recolour, pairs)
            _check_demos(manifest, demos, f"{split} task {index}")
            write_task(task_path(folder, split, index), demos)
            counts[split] += 1
    if not (counts["train"] and counts["val"]):
        raise ValueError(f"there are no tasks to train or to validate on: {counts}")
    write_json(folder / "manifest.json", {**manifest, "tasks": counts})  # last: now it is whole


def _manifest_of(demos, mirror, recolour, pairs):
    """The manifest of a data set that has these as its first demonstrations."""
    shapes = {name: (*array.shape, 0, 0, 0) for name, array in demos[0].items()}  # checked later
    height, width = shapes["frames"][1:3]
    sizes = {name: shapes[name][1] for name in ("states", "actions")}
    if mirror:
        mirror = {name: np.float64(mirror[name]).tolist() for name in sizes}
        for name, size in sizes.items():
            if len(mirror[name]) != size or not set(mirror[name]) <= {1, -1}:
                raise ValueError(f"mirror[{name!r}] has {size} factors, 1 or -1")
    return dict(format=FORMAT, benchmark=None, seed=None, demos=len(demos), image_height=height,
                image_width=width, state_dim=sizes["states"], action_dim=sizes["actions"],
                mirror=mirror, recolour=recolour, pairs=pairs)


def _check_demos(manifest, demos, task):
    """Raise ValueError unless a task's demonstrations are as the first ones."""
    picture = manifest["image_height"], manifest["image_width"], 3
    if len(demos) != manifest["demos"]:
        raise ValueError(f"{task} has {len(demos)} demonstrations, the first task has "
                         f"{manifest['demos']}: give all tasks equally many")
    for number, demo in enumerate(demos):
        T = len(demo["frames"])
        wanted = {"frames": (T, *picture), "states": (T, manifest["state_dim"]),
                  "actions": (T, manifest["action_dim"])}
        for name, shape in wanted.items():
            array, place = demo[name], f"{task}, demonstration {number}, {name}"
            if array.shape != shape or T < 2:
                raise ValueError(f"{place} have the shape {array.shape}, not {shape} with at least "
                                 "2 frames: one row a frame, sizes as in the first demonstration")
            if name == "frames" and array.dtype != np.uint8:
                raise ValueError(f"{place} are {array.dtype}: convert them to uint8, 0 to 255")
            if name != "frames" and not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{place} hold numbers that are not finite: leave these rows out")


def write_task(path, demos):
    """Write the two files of a task; `demos` is a list of dicts as sim.record_demo returns them."""
    frames = [zlib.compress(frame.tobytes(), 1) for demo in demos for frame in demo["frames"]]
    arrays = {name: np.concatenate([demo[name] for demo in demos]).astype(np.float32)
              for name in ("states", "actions")}
    arrays["lengths"] = np.array([len(demo["frames"]) for demo in demos])
    arrays["offsets"] = np.cumsum([0] + [len(frame) for frame in frames])
    write_atomically(path.with_suffix(".frames"), lambda file: file.writelines(frames))
    write_atomically(path, lambda file: np.savez(file, **arrays))  # last: now the task is whole


def read_manifest(folder):
    """The manifest of a data set. Raises UserError if there is none, or one of another format."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} has no manifest.json: check the name, or make the benchmark's "
                        f"data with python data.py --out {folder}")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder} has data format {manifest.get('format')}, this program reads "
                        f"{FORMAT}: make the data anew in another folder")
    return manifest


# Reading --------------------------------------------------------------------------------------

def evenly_spaced(length, count):
    """`count` of the times 0 to length - 1, evenly spaced, the first and the last included.

    Of an array of lengths (...) it is (..., count).
    """
    if count < 2:
        raise ValueError(f"{count} frames of a demonstration: at least 2, the first and the last")
    return np.linspace(0, length - 1, count, axis=-1).round().astype(int)


class TaskSet:
    """The demonstrations of N tasks of a split, D of each, with T steps (which may differ).

    `lengths` (N, D) are the T. `states` (R, S) and `actions` (R, A) float32 are the rows of all
    demonstrations after one another; `row(task, demo, time)` says which. `ends` (N, D, 2, H, W, 3)
    uint8 are the first and last frames. These are in memory. All other frames are read when they
    are wanted: the system keeps in memory, once for all processes, what there is room for.
    `manifest` says what the data are, whatever the number of tasks. `tasks` is how many tasks are
    read, all by default. Raises UserError for missing or damaged files.
    """

    def __init__(self, folder, split, tasks=None):
        self.manifest = manifest = read_manifest(folder)
        available = manifest.pop("tasks").get(split, 0)
        if tasks is None:
            tasks = available
        if not 0 < tasks <= available:
            raise UserError(f"{folder} has {available} {split} tasks, not {tasks}: ask for fewer, "
                            f"or add more with data.py --out {folder} --{split}")
        self.frame_shape = manifest["image_height"], manifest["image_width"], 3
        self.n_tasks, self.n_demos = tasks, manifest["demos"]
        self._paths = [task_path(folder, split, index) for index in range(tasks)]
        arrays = [self._read(path) for path in self._paths]
        self._offsets = [task["offsets"] for task in arrays]
        self.states, self.actions = (np.concatenate([task[name] for task in arrays])
                                     for name in ("states", "actions"))
        self.lengths = np.array([task["lengths"] for task in arrays])  # (N, D)
        self._first_rows = np.cumsum([0, *self.lengths.flat])[:-1].reshape(self.lengths.shape)
        tasks, demos, _ = np.ogrid[:self.n_tasks, :self.n_demos, :2]
        self.ends = self.frames(tasks, demos, evenly_spaced(self.lengths, 2))

    def _read(self, path):
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in ("states", "actions", "lengths", "offsets")}
        except FileNotFoundError:
            raise UserError(f"{path} is missing: finish the data set with the command that made it")
        except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it and make the data again")

    def row(self, tasks, demos, times):
        """The rows of `states` and `actions` at indices that are broadcast against each other."""
        if np.any((times < 0) | (times >= self.lengths[tasks, demos])):
            raise IndexError(f"times {times} are not all within the demonstrations")
        return self._first_rows[tasks, demos] + times

    def frame(self, task, demo, time):
        """The frame (H, W, 3) uint8 at one time of one demonstration."""
        at = self.row(task, demo, time) - self._first_rows[task, 0]
        start, stop = self._offsets[task][at:at + 2].tolist()
        path = self._paths[task].with_suffix(".frames")
        with open(path, "rb", buffering=0) as file:
            compressed = os.pread(file.fileno(), stop - start, start)
        try:
            pixels = zlib.decompress(compressed)
        except zlib.error as error:
            raise UserError(f"{path} is damaged ({error}): delete it and the .npz beside it, and "
                            "make the data again")
        return np.frombuffer(pixels, np.uint8).reshape(self.frame_shape)

    def frames(self, tasks, demos, times):
        """The frames (..., H, W, 3) at indices that are broadcast against each other."""
        indices = np.broadcast(tasks, demos, times)
        frames = np.empty((indices.size, *self.frame_shape), np.uint8)
        for i, index in enumerate(indices):
            frames[i] = self.frame(*index)
        return frames.reshape(*indices.shape, *self.frame_shape)

    def demo_frames(self, tasks, demos, n):
        """`n` evenly spaced frames (..., n, H, W, 3) of demonstrations; the indices broadcast."""
        if n == 2:
            return self.ends[tasks, demos]
        tasks, demos = np.broadcast_arrays(tasks, demos)
        times = evenly_spaced(self.lengths[tasks, demos], n)  # (..., n)
        return self.frames(tasks[..., None], demos[..., None], times)

    def statistics(self, mirrored=True):
        """Mean and deviation of states (S,) and actions (A,), for a network of these tasks.

        Data that tell how they are mirrored count with their mirror images, if `mirrored`. The
        deviation of what is constant, up to rounding, is 1. The benchmark's scenes lie on both
        sides and count as they are; its states have deviations of at least STD_FLOOR, and its
        actions, fractions of limits, stay raw.
        """
        values, own, mirror = {}, not self.manifest["benchmark"], self.manifest["mirror"]
        for name, rows in (("state", self.states), ("action", self.actions)):
            rows = rows.astype(np.float64)
            if own and mirrored and mirror:
                rows = np.concatenate([rows, rows * mirror[f"{name}s"]])
            mean, std = rows.mean(0), rows.std(0)
            if own:
                rounding = np.maximum(1e-6 * np.abs(mean), 1e-12 * std.max(initial=0))
                std = np.where(std > rounding, std, 1)
            elif name == "state":
                std = np.maximum(std, STD_FLOOR)
            else:
                mean, std = np.zeros_like(mean), np.ones_like(std)
            values |= {f"{name}_mean": mean, f"{name}_std": std}
        return {name: array.astype(np.float32) for name, array in values.items()}


def turn_hue(frames, angle):
    """Frames (..., W, 3) uint8 with colours turned by `angle` radians about the axis of greys."""
    c, s = math.cos(angle), math.sin(angle) / math.sqrt(3)
    # Rodrigues' rotation about (1, 1, 1):
    same, following, last = (1 + 2 * c) / 3, (1 - c) / 3 - s, (1 - c) / 3 + s
    matrix = (same, following, last, 0, last, same, following, 0, following, last, same, 0)
    picture = Image.fromarray(frames.reshape(-1, *frames.shape[-2:]))
    turned = picture.convert("RGB", matrix)  # cuts what leaves 0 to 255
    return np.asarray(turned).reshape(frames.shape)


@dataclass(eq=False)
class TaskLoader:
    """An endless iterator of few-shot batches; batch i depends on the data, the fields and i only.

    The next batch is that at `position`, which may be set.
    A batch has B different tasks; of each K support and Q query demos, all different, and M control
    samples of each of the two sets, every one at a random time of a random demo of its set. It is a
    dict of arrays, U for support and q for query, before one another on axis 1 where both are in
    one, n the `demo_frames`: `frames_U` (B, K, n, H, W, 3), `frames_q` (B, Q, n, H, W, 3), `images`
    (B, 2, M, H, W, 3), all uint8, `states` (B, 2, M, S) and `actions` (B, 2, M, A), float32. What
    was drawn is told by `tasks`, `mirrored`, `recoloured` and `hues` (B,), `demos` (B, K + Q),
    `control_demos` and `times` (B, 2, M).

    With pairs, every task's partner is in its batch, and the last of an odd number is never drawn.
    Batches are prepared ahead in background threads. Raises UserError if the data do not allow what
    is asked for.
    """
    task_set: TaskSet
    B: int = 16
    K: int = 5
    Q: int = 1
    M: int = 4
    seed: int = 0
    time_exponent: float = 3.0  # times are T u^this, u uniform: more than 1 favours the start
    random_support: bool = True  # K is drawn anew for every batch, from 1 to this
    # Half of the tasks are seen in a mirror, half with green and blue exchanged, all demos of a
    # task alike. None: where the data allow it.
    mirror: bool | None = None
    recolour: bool | None = None
    # Radians by which the colours of a task are turned at most. None: 0.6 if recolour is allowed.
    hue_jitter: float | None = None
    pairs: bool = False  # tasks 2k and 2k + 1, the same objects, are drawn together and seen alike
    demo_frames: int = 2
    query_frames: bool = True  # whether frames_q are read
    threads: int = 1
    shard: tuple = (0, 1)  # (i, N): of N processes this is the i-th, and gets its part of the tasks

    def __post_init__(self):
        data = self.task_set
        for name in ("mirror", "recolour", "pairs"):
            allowed, value = bool(data.manifest[name]), getattr(self, name)
            if value and not allowed:
                raise UserError(f"nothing says that these data allow {name}: use --{name} 0, or "
                                "tell write_data_set")
            setattr(self, name, allowed if value is None else bool(value))
        if self.hue_jitter is None:
            self.hue_jitter = 0.6 if data.manifest["recolour"] else 0.0
        self.group = 2 if self.pairs else 1
        rank, size = self.shard
        if self.B > data.n_tasks or self.B % self.group or self.B % size:
            raise UserError(f"a batch of {self.B} tasks: there are {data.n_tasks}, drawn "
                            f"{self.group} at a time and shared by {size} processes; choose "
                            "another --batch")
        if self.K + self.Q > data.n_demos:
            raise UserError(f"K + Q = {self.K} + {self.Q} demonstrations are more than the "
                            f"{data.n_demos} of a task: lower --support or --query")
        self.own = slice(self.B * rank // size, self.B * (rank + 1) // size)
        self.position = 0
        self._pool, self._ahead = ThreadPoolExecutor(self.threads), {}

    def batch(self, position):
        """The batch at a position of the sequence."""
        K, drawn = self._draw(np.random.default_rng([self.seed, position]))
        drawn = {name: values[self.own] for name, values in drawn.items()}
        return self._augment({**self._read(K, drawn), **drawn})

    def _draw(self, rng):
        data, B, K, Q, M, group = self.task_set, self.B, self.K, self.Q, self.M, self.group
        if self.random_support:
            K = int(rng.integers(1, K + 1))
        groups = B // group
        tasks = rng.choice(data.n_tasks // group, groups, replace=False)
        tasks = (tasks[:, None] * group + np.arange(group)).ravel()  # (B,)
        mirrored = np.repeat((rng.random(groups) < 0.5) & self.mirror, group)
        recoloured = np.repeat((rng.random(groups) < 0.5) & self.recolour, group)
        demos = np.stack([rng.choice(data.n_demos, K + Q, replace=False) for _ in tasks])
        picks = np.stack([rng.integers(0, K, (B, M)), rng.integers(K, K + Q, (B, M))], 1)
        control_demos = np.take_along_axis(demos[:, None], picks, 2)  # (B, 2, M)
        lengths = data.lengths[tasks[:, None, None], control_demos]
        times = (lengths * rng.random((B, 2, M)) ** self.time_exponent).astype(int)
        hues = np.repeat(rng.uniform(-self.hue_jitter, self.hue_jitter, groups), group)
        return K, dict(tasks=tasks, mirrored=mirrored, recoloured=recoloured, hues=hues,
                       demos=demos, control_demos=control_demos, times=times)

    def _read(self, K, drawn):
        data, tasks, demos = self.task_set, drawn["tasks"][:, None], drawn["demos"]
        at = tasks[..., None], drawn["control_demos"], drawn["times"]
        rows = data.row(*at)
        batch = {"frames_U": data.demo_frames(tasks, demos[:, :K], self.demo_frames),
                 "images": data.frames(*at), "states": data.states[rows],
                 "actions": data.actions[rows]}
        if self.query_frames:
            batch["frames_q"] = data.demo_frames(tasks, demos[:, K:], self.demo_frames)
        return batch

    def _augment(self, batch):
        mirrored, recoloured, hues = (batch[name] for name in ("mirrored", "recoloured", "hues"))
        for name in batch.keys() & {"frames_U", "frames_q", "images"}:
            frames = batch[name]
            pixels = frames.view("V3")  # moved whole: twice as fast as their 3 bytes
            pixels[mirrored] = pixels[mirrored][..., ::-1, :]
            plain = frames[recoloured]
            frames[recoloured, ..., 1], frames[recoloured, ..., 2] = plain[..., 2], plain[..., 1]
            for task in hues.nonzero()[0]:
                frames[task] = turn_hue(frames[task], hues[task])
        if self.mirror:
            for name, signs in self.task_set.manifest["mirror"].items():
                batch[name][mirrored] *= np.float32(signs)
        return batch

    def __iter__(self):
        return self

    def __next__(self):
        for position in range(self.position, self.position + self.threads + 2):
            if position not in self._ahead:
                self._ahead[position] = self._pool.submit(self.batch, position)
        batch = self._ahead.pop(self.position).result()  # after an error the next call tries again
        self.position += 1
        return batch


def main():
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder of the data set")
    for split, number in FULL_DATA["tasks"].items():
        add(f"--{split}", type=int, default=number, help=f"tasks of the split {split}")
    add("--demos", type=int, default=FULL_DATA["demos"], help="demonstrations of a task")
    add("--seed", type=int, default=FULL_DATA["seed"], help="seed of all demonstrations")
    add("--looks", choices=("random",),
        help="give every demonstration a random look; the default look without it")
    add("--workers", type=int, default=cores(), help="processes")
    add("--shard", type=shard, default=launched()[:2], metavar="I/N",
        help="make the I-th of N shards only, I from 0; the rank by default under torchrun or srun")
    args = parser.parse_args()
    tasks = {split: getattr(args, split) for split in reversed(SPLITS)}
    missing = generate(args.out, tasks, args.demos, args.seed, args.workers, args.shard,
                       args.looks)
    state = f"{missing} of them still to come" if missing else "all there"
    print(f"{args.out}: {sum(tasks.values())} tasks, {state}")


if __name__ == "__main__":
    import data  # so that workers find its functions under this name
    run_program(data.main)
