"""The data set of demonstrations, and the loader that draws few-shot batches from it.

    python data.py --out data/push
    python data.py --out data/push --share 3/8   # on each of 8 machines with a common folder, 0/8 to 7/8

writes one `SPLIT/INDEX.npz` a task: states, clean expert actions, and frames that are compressed
one by one (so that any frame is read alone), beside a `manifest.json`. An interrupted run is
finished by the same command; a larger `--train` adds tasks. The bytes depend on the seed only.
"""
import argparse
import collections
import hashlib
import json
import math
import operator
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from common import (TEMPORARY, Parser, UserError, command, cores, installed_packages, launched, locked, number, parallel, progress,
                    read_arrays, say, share, warn_of_packages, write_atomically, write_checked)

# The simulator is imported where demonstrations are recorded: to read a data set takes no PyBullet.

VERSION = 4
FULL_DATA = {"tasks": {"train": 693, "val": 76, "test": 74}, "demos": 12, "seed": 0}  # the benchmark's size
SPLITS = tuple(FULL_DATA["tasks"])
NOISE = 0.1  # std of the noise on a demonstration's executed actions; the clean ones are recorded
CLEAN_ATTEMPTS = 20  # from here on a demo may end up to SUCCESS_DISTANCE off or move the distractor
ATTEMPTS = 40
STATE_STD_FLOOR = 1e-3  # as in MIL


# Recording ------------------------------------------------------------------------------------

def record_demo(env, task, demo_number, seed):
    """Record one demonstration of a task; those with even and odd numbers start on different sides.

    The expert's action plus noise is executed, the clean action is recorded. An attempt that fails,
    moves the distractor or leaves the target off the disc is redrawn, up to ATTEMPTS times.
    Returns a dict of `frames` (100, H, W, 3) uint8 (absent without rendering), `states` (100, 20)
    and `actions` (100, 7) float32; it depends on (task, demo_number, seed) only. Raises RuntimeError
    if the expert cannot do the task.
    """
    import sim
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, sim.split_key(task.split), task.index, demo_number, attempt])
        start = {"task": task, "side": 1 if demo_number % 2 else -1}
        obs, info = env.reset(seed=int(rng.integers(2 ** 31)), options=start)
        observations, actions = [], []
        for _ in range(sim.HORIZON):
            observations.append(obs)
            actions.append(sim.expert_action(env))
            obs, _, _, _, info = env.step(actions[-1] + rng.normal(0, NOISE, sim.ACTION_DIM))
        clean = info["distance"] < sim.STRICT_DISTANCE and info["distractor_displacement"] < sim.MOVED_DISTANCE
        if info["success"] and (clean or attempt >= CLEAN_ATTEMPTS):
            demo = {"states": np.stack([o["state"] for o in observations]), "actions": np.array(actions, np.float32)}
            if env.render_mode:
                demo["frames"] = np.stack([o["image"] for o in observations])
            return demo
    raise RuntimeError(f"the expert failed {ATTEMPTS} times on {task}")


def _record_task(folder, manifest, split, index):
    import sim
    env, task = sim.PushEnv(), sim.make_task(split, index)
    write_task(folder, manifest, split, index, [record_demo(env, task, i, manifest["seed"]) for i in range(manifest["demos"])])
    env.close()


def generate(folder, counts, demos, seed, workers=None, part=0, parts=1):
    """Write (or finish, or extend) a data set of the simulator; `counts` maps a split to its number of tasks.

    Of a job in several `parts`, on one machine or many, this makes one. Returns how many tasks of the set are missing.
    Raises ValueError for an unknown split, UserError if the folder holds data of other settings or is being written
    by another process.
    """
    import sim
    if not counts.keys() <= set(SPLITS) or min(demos, *counts.values()) < 1:
        raise ValueError(f"a data set has tasks of {', '.join(SPLITS)}, 1 or more, and as many demos, not {counts} and {demos}")
    manifest = dict(version=VERSION, seed=seed, demos=demos, noise=NOISE, horizon=sim.HORIZON, image_size=sim.IMAGE_SIZE,
                    state_dim=sim.STATE_DIM, action_dim=sim.ACTION_DIM, mirror=sim.MIRROR, recolour=True, pairs=True,
                    tasks=counts)
    return make_tasks(Path(folder), manifest, _record_task, workers, part, parts)


def write_data_set(folder, tasks, mirror=None, recolour=False, pairs=False):
    """Write a data set of your own from arrays.

    `tasks` maps the splits "train" and "val" to their tasks. A task is a list of demonstrations, a demonstration a dict
    of `frames` (T, H, H, 3) uint8, `states` (T, S) and `actions` (T, A), as record_demo returns it. All demonstrations
    have equal sizes, all tasks equally many. `mirror` is a dict of `states` (S,) and `actions` (A,): factors 1 or -1 that
    turn them into those of the scene seen in a mirror; without it batches cannot be mirrored. `recolour` says that a
    picture whose green and blue are exchanged shows a valid scene, too; `pairs` that tasks 2k and 2k + 1 have the same
    objects in exchanged roles.
    Raises ValueError for other shapes, types or values and UserError if the folder holds a data set.
    """
    if not (tasks.get("train") and tasks.get("val") and tasks.keys() <= set(SPLITS)):
        raise ValueError(f"a data set needs tasks in the splits train and val, and may have test, not {', '.join(tasks)}")
    folder, first = Path(folder), tasks["train"][0][0]
    T, H = first["frames"].shape[:2]
    if T < 2:
        raise ValueError(f"a demonstration has a first and a last frame, not {T}")
    manifest = dict(
        version=VERSION, seed=None, demos=len(tasks["train"][0]), noise=None, horizon=T, image_size=H,
        state_dim=np.shape(first["states"])[-1], action_dim=np.shape(first["actions"])[-1],
        mirror=mirror and {name: np.float64(mirror[name]).tolist() for name in mirror}, recolour=bool(recolour),
        pairs=bool(pairs), tasks={split: len(tasks[split]) for split in tasks}, packages=installed_packages())
    for name, length in (("states", manifest["state_dim"]), ("actions", manifest["action_dim"])) if mirror else ():
        if np.shape(mirror[name]) != (length,) or (np.abs(mirror[name]) != 1).any():
            raise ValueError(f"mirror needs {length} signs, 1 or -1, of {name}")
    digest = hashlib.sha256()
    for demos in (task for split in sorted(tasks) for task in tasks[split]):
        check_demos(manifest, demos)
        for array in (demo[name] for demo in demos for name in ("frames", "states", "actions")):
            digest.update(np.ascontiguousarray(array))
    manifest["source"] = digest.hexdigest()
    with locked(folder):
        if (folder / "manifest.json").exists():
            raise UserError(f"{folder} holds a data set: choose another folder, or delete it")
        for split, index in ((split, index) for split in tasks for index in range(len(tasks[split]))):
            write_task(folder, manifest, split, index, tasks[split][index])
        write_manifest(folder, manifest)


def check_demos(manifest, demos):
    """Raise ValueError unless a task's demonstrations are as its data set's manifest says."""
    T, H = manifest["horizon"], manifest["image_size"]
    shapes = {"frames": (T, H, H, 3), "states": (T, manifest["state_dim"]), "actions": (T, manifest["action_dim"])}
    for name, array in ((name, np.asarray(demo[name])) for demo in demos for name in shapes):
        if array.shape != shapes[name] or (array.dtype != np.uint8 if name == "frames" else not np.isfinite(array).all()):
            raise ValueError(f"{name} must be {'uint8' if name == 'frames' else 'finite'} and of shape {shapes[name]}, "
                             f"as the first are, not {array.dtype} of shape {array.shape}")
    if len(demos) != manifest["demos"]:
        raise ValueError(f"a task has {manifest['demos']} demonstrations, not {len(demos)}")


def write_task(folder, manifest, split, index, demos):
    """Write one task's file; `demos` is a list of dicts as record_demo returns them. Raises ValueError for others."""
    check_demos(manifest, demos)
    frames = [zlib.compress(frame.tobytes(), 1) for demo in demos for frame in demo["frames"]]
    arrays = {**{name: np.array([demo[name] for demo in demos], np.float32) for name in ("states", "actions")},
              "frames": np.frombuffer(b"".join(frames), np.uint8),
              "offsets": np.cumsum([0] + [len(frame) for frame in frames])}
    path = task_path(folder, split, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, lambda file: (np.savez(file, **arrays), file.write(task_identity(manifest, split, index))))


def same_data(manifest):
    """What of a manifest makes a data set the same: not how many tasks there are, nor which packages made them."""
    return {name: value for name, value in manifest.items() if name not in ("tasks", "packages")}


def task_identity(manifest, split, index):
    """32 bytes that end a task's file, so that one of another task or data set is not taken for it."""
    return bytes.fromhex(digest_of([same_data(manifest), split, index]))


def evenly_spaced(horizon, count):
    """`count` times of a demonstration, evenly spaced, the first and the last included. Raises ValueError for too many."""
    if not 2 <= count <= horizon:
        raise ValueError(f"{count} frames of a demonstration that has {horizon}: at least 2, and no more than there are")
    return np.linspace(0, horizon - 1, count).round().astype(int)


def task_path(folder, split, index):
    return Path(folder) / split / f"{index:05d}.npz"


def make_tasks(folder, manifest, write, workers, part, parts, *arguments):
    """Call `write(folder, manifest, split, index, *arguments)` in parallel for a part's tasks that are not there yet.

    A manifest that is there must agree. Returns how many tasks of the whole set are missing in the end.
    """
    with locked(folder, part, parts):
        counts, old = manifest["tasks"], {"tasks": {}}
        if (folder / "manifest.json").exists():
            old = read_manifest(folder)
            if same_data(old) != same_data(manifest):
                raise UserError(f"{folder} holds data with other settings (seed {old['seed']}, {old['demos']} demos): "
                                "give the same, or choose another --out")
            warn_of_packages(old["packages"], folder)
        tasks = {split: max(counts.get(split, 0), old["tasks"].get(split, 0)) for split in SPLITS}
        manifest = {**manifest, "packages": installed_packages(), **old, "tasks": tasks}
        write_manifest(folder, manifest)
        paths = {(split, index): task_path(folder, split, index) for split in counts for index in range(counts[split])}
        mine = list(paths)[part::parts]
        for stale in folder.glob("*/*" + TEMPORARY):  # left by killed processes
            if str(stale).startswith(tuple(f"{paths[task]}." for task in mine)):
                stale.unlink(missing_ok=True)
        jobs = [(folder, manifest, *task, *arguments) for task in mine if not paths[task].exists()]
        start = time.monotonic()
        for done, _ in enumerate(parallel(write, jobs, workers or cores()), 1):
            seconds = time.monotonic() - start
            progress(f"{done}/{len(jobs)} tasks, {done * manifest['demos'] * manifest['horizon'] / seconds:.0f} frames/s, "
                     f"{seconds / done * (len(jobs) - done) / 60:.1f} min left", end=done == len(jobs))
        return sum(not path.exists() for path in paths.values())


def write_manifest(folder, manifest):
    text = json.dumps({**manifest, "sha256": digest_of(manifest)}, indent=1)
    write_atomically(folder / "manifest.json", lambda file: file.write(text.encode()))


def digest_of(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def data_command(folder, manifest):
    """How to make or finish a data set."""
    if manifest["seed"] is None:
        return "what made it (mil_data.py, or write_data_set) again"
    tasks = " ".join(f"--{split} {count}" for split, count in manifest["tasks"].items())
    return f"python data.py --out {folder} {tasks} --demos {manifest['demos']} --seed {manifest['seed']}"


def read_manifest(folder):
    """The manifest of a data folder. Raises UserError if there is none, or not one of ours."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version, digest = manifest["version"], manifest.pop("sha256", None)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no data set in {folder}: make one with python data.py --out {folder}")
    except (ValueError, KeyError, TypeError):
        version = digest = None
    if isinstance(version, int) and version != VERSION:
        raise UserError(f"{folder} has format version {version}, this program reads {VERSION}: make it anew")
    if version is None or digest != digest_of(manifest):
        raise UserError(f"{path} is damaged: delete it and run the same python data.py again")
    return manifest


# Reading --------------------------------------------------------------------------------------

class TaskSet:
    """All demonstrations of a split: in memory but for the frames, of which only the first and last ones are.

    The others are read when they are wanted: the system keeps in memory, once for all processes, what there is room for.

    N tasks with D demonstrations of T steps: `states` (N, D, T, S) and `actions` (N, D, T, A) float32;
    `ends` (N, D, 2, H, W, 3) uint8, the first and last frames; `mirror`, the signs of a mirrored state and
    action, or None; `manifest`. Raises ValueError for an unknown split, UserError for missing, damaged or foreign files.
    """

    def __init__(self, folder, split, tasks=None):
        if split not in SPLITS:
            raise ValueError(f"the splits are {', '.join(SPLITS)}, not {split!r}")
        self.manifest = read_manifest(folder)
        size, available = self.manifest["image_size"], self.manifest["tasks"].get(split, 0)
        count = available if tasks is None else tasks
        if not 0 < count <= available:
            wanted = max(1, count)
            raise UserError(f"{folder} has {available} {split} tasks, not {wanted}: ask for fewer, or add more by "
                            f"{data_command(folder, {**self.manifest, 'tasks': {**self.manifest['tasks'], split: wanted}})}")
        self.frame_shape = (size, size, 3)
        arrays = [self._read(folder, split, index) for index in range(count)]
        self._paths = [task_path(folder, split, index) for index in range(count)]
        self._offsets = [task["frames"].start + task["offsets"] for task in arrays]
        self.states, self.actions = (np.array([task[name] for task in arrays]) for name in ("states", "actions"))
        self.mirror = self.manifest["mirror"] and {name: np.float32(signs) for name, signs in self.manifest["mirror"].items()}
        self.n_tasks, self.n_demos, self.horizon = count, self.manifest["demos"], self.manifest["horizon"]
        self.ends = self.frames(np.arange(count)[:, None, None], np.arange(self.n_demos)[:, None], evenly_spaced(self.horizon, 2))

    def _read(self, folder, split, index):
        """A task's arrays, checked: `states`, `actions`, `offsets`, and the place of `frames`."""
        path = task_path(folder, split, index)
        D, T, S, A = (self.manifest[name] for name in ("demos", "horizon", "state_dim", "action_dim"))
        shapes = {"states": ((D, T, S), "<f4"), "actions": ((D, T, A), "<f4"), "offsets": ((D * T + 1,), "<i8"),
                  "frames": ((None,), "|u1")}
        remedy = data_command(folder, self.manifest)
        try:
            arrays = read_arrays(path, shapes, task_identity(self.manifest, split, index))
            if (np.diff(arrays["offsets"], prepend=0) < 0).any() or len(arrays["frames"]) != arrays["offsets"][-1]:
                raise ValueError("is damaged")
            if not all(np.isfinite(arrays[name]).all() for name in ("states", "actions")):
                raise ValueError("holds numbers that are not finite")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: finish the data set by {remedy}")
        except ValueError as error:
            raise UserError(f"{path} {error}: delete it and run {remedy}")
        return arrays

    def frame(self, task, demo, time):
        """The frame (H, W, 3) uint8 at one time of one demo. Raises IndexError where there is none."""
        if not (0 <= task < self.n_tasks and 0 <= demo < self.n_demos and 0 <= time < self.horizon):
            raise IndexError(f"no frame of task {task}, demo {demo}, time {time}: there are {self.n_tasks} tasks of "
                             f"{self.n_demos} demos of {self.horizon} frames")
        at = demo * self.horizon + time
        start, stop = self._offsets[task][at:at + 2].tolist()
        with open(self._paths[task], "rb", buffering=0) as file:
            compressed = os.pread(file.fileno(), stop - start, start)
        try:
            pixels = zlib.decompressobj().decompress(compressed, math.prod(self.frame_shape))
            return np.frombuffer(pixels, np.uint8).reshape(self.frame_shape)
        except (zlib.error, ValueError):
            raise UserError(f"task {task}, demo {demo}, time {time}: not a frame of {self.frame_shape}; make the data anew")

    def frames(self, tasks, demos, times):
        """The frames (..., H, W, 3) at indices that are broadcast against each other."""
        at = np.broadcast_arrays(tasks, demos, times)
        frames = np.empty((*at[0].shape, *self.frame_shape), np.uint8)
        for index in np.ndindex(at[0].shape):
            frames[index] = self.frame(*(indices[index] for indices in at))
        return frames

    def state_statistics(self):
        """Mean and standard deviation (S,) of the states, the latter at least STATE_STD_FLOOR."""
        states = self.states.reshape(-1, self.states.shape[-1]).astype(np.float64)
        return states.mean(0).astype(np.float32), np.maximum(states.std(0), STATE_STD_FLOOR).astype(np.float32)


def turn_hue(frames, angle):
    """Frames (..., W, 3) uint8 with all colours turned by `angle` radians about the axis of greys, which stay as they are."""
    c, s = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same, next_, last = (1 + 2 * c) / 3, (1 - c) / 3 - s, (1 - c) / 3 + s  # Rodrigues' rotation about (1, 1, 1)
    matrix = (same, next_, last, 0, last, same, next_, 0, next_, last, same, 0)
    picture = Image.fromarray(frames.reshape(-1, *frames.shape[-2:])).convert("RGB", matrix)  # cuts what leaves 0 to 255
    return np.asarray(picture).reshape(frames.shape)


class TaskLoader:
    """An endless iterator of few-shot batches; batch i depends on (seed, i) only.

    A batch has B different tasks; of each K support and Q query demos, all different, and F control samples of each
    of the two sets, every one at a random time of a random demo of its set: T u^early with a uniform u, so early = 1
    is uniform and more favours a demo's beginning. With `random_support` every batch draws its K from 1 to the K given.
    With `mirror` half of the tasks are seen in a mirror, with `recolour` half of them with green and blue exchanged, and all
    of them with their hues turned by up to `hue` radians, all demos of a task alike. With `pairs` tasks 2k and 2k + 1, which
    show the same objects in exchanged roles, are drawn together and seen alike: a batch in which no task has its partner
    hardly teaches to tell the two apart. The last of an odd number of tasks is then never drawn. Of N processes that have a
    `share` (i, N) each, the i-th gets the i-th part of every batch's tasks.

    It is a dict of uint8 and float32 arrays, U for support and q for query, before one another on axis 1 where both
    are in one, and n the `demo_frames` of a support demo, evenly spaced: `frames_U` (B, K, n, H, W, 3), `frames_q`
    (B, Q, 2, H, W, 3), `images` (B, 2, F, H, W, 3), `states` (B, 2, F, S), `actions` (B, 2, F, A). What was drawn is
    told by `tasks` (B,), `mirrored` (B,), `recoloured` (B,), `hues` (B,), `demos` (B, K + Q), `control_demos` (B, 2, F) and
    `times` (B, 2, F).
    Batches are prepared ahead on background `threads`, at most two more than there are threads. Raises UserError if
    B or K + Q are too many, ValueError for numbers that make no sense.
    """

    def __init__(self, task_set, B, K, Q, F, seed, early=1.0, random_support=False, mirror=False, recolour=False,
                 hue=0.0, pairs=False, demo_frames=2, threads=1, share=(0, 1)):
        for name, value in dict(B=B, K=K, Q=Q, F=F, early=early, threads=threads).items():
            if (value if name == "early" else operator.index(value)) < 1 or not math.isfinite(value):
                raise ValueError(f"{name} is a number from 1 on, not {value}")
        if not 0 <= hue <= math.pi:
            raise ValueError(f"hue is an angle from 0 to pi, not {hue}")
        self.demo_times = evenly_spaced(task_set.horizon, demo_frames)
        if B > task_set.n_tasks:
            raise UserError(f"a batch of {B} tasks needs as many, there are {task_set.n_tasks}: lower --batch, or take more tasks")
        if B < share[1]:
            raise UserError(f"a batch of {B} tasks cannot be shared by {share[1]} processes: raise --batch, or start fewer")
        if K + Q > task_set.n_demos:
            raise UserError(f"K + Q = {K} + {Q} demos are more than the {task_set.n_demos} of a task: lower --support or --query")
        if mirror and not task_set.mirror:
            raise UserError("nothing tells how these data look in a mirror: give write_data_set its signs, or use --mirror 0")
        if recolour and not task_set.manifest["recolour"]:
            raise UserError("nothing says that green and blue of these data may be exchanged: tell write_data_set, or use --recolour 0")
        if pairs and not task_set.manifest["pairs"]:
            raise UserError("nothing says that these tasks come in pairs: tell write_data_set, or use --pairs 0")
        if pairs and B % 2:
            raise UserError(f"a batch of {B} tasks has no whole pairs: choose an even --batch, or use --pairs 0")
        self.task_set, self.B, self.K, self.Q, self.F, self.seed, self.early = task_set, B, K, Q, F, seed, early
        self.random_support, self.mirror, self.recolour, self.hue = random_support, mirror, recolour, hue
        self.group = 2 if pairs else 1
        self.share = slice(*(B * (share[0] + i) // share[1] for i in (0, 1)))
        self.position = 0
        self._pool, self._ahead, self._queue = ThreadPoolExecutor(threads), threads + 2, collections.deque()

    def batch(self, position):
        """The batch at a position of the sequence."""
        data, B, K, Q, F = self.task_set, self.B, self.K, self.Q, self.F
        rng = np.random.default_rng([self.seed, position])
        if self.random_support:
            K = int(rng.integers(1, K + 1))
        groups = B // self.group
        tasks = rng.choice(data.n_tasks // self.group, groups, replace=False)[:, None] * self.group + np.arange(self.group)
        tasks = tasks.ravel()
        mirrored, recoloured = (np.repeat(rng.random(groups) < 0.5 * on, self.group) for on in (self.mirror, self.recolour))
        demos = np.stack([rng.choice(data.n_demos, K + Q, replace=False) for _ in tasks])
        picks = np.stack([rng.integers(0, K, (B, F)), rng.integers(K, K + Q, (B, F))], 1)  # (B, 2, F)
        control_demos = np.take_along_axis(demos[:, None], picks, 2)  # (B, 2, F)
        times = (data.horizon * rng.random((B, 2, F)) ** self.early).astype(int)
        hues = np.repeat(rng.uniform(-self.hue, self.hue, groups), self.group)
        tasks, mirrored, recoloured, hues, demos, control_demos, times = (
            drawn[self.share] for drawn in (tasks, mirrored, recoloured, hues, demos, control_demos, times))
        at = tasks[:, None, None], control_demos, times
        if len(self.demo_times) == 2:
            frames_U = data.ends[tasks[:, None], demos[:, :K]]
        else:
            frames_U = data.frames(tasks[:, None, None], demos[:, :K, None], self.demo_times)
        batch = {"frames_U": frames_U, "frames_q": data.ends[tasks[:, None], demos[:, K:]],
                 "images": data.frames(*at), "states": data.states[at], "actions": data.actions[at]}
        for name in ("frames_U", "frames_q", "images"):
            pixels = batch[name].view("V3")  # moved whole: twice as fast as numpy's loop over their 3 bytes
            pixels[mirrored] = pixels[mirrored][..., ::-1, :]
            frames = batch[name][recoloured]
            frames[..., 1], frames[..., 2] = frames[..., 2].copy(), frames[..., 1].copy()
            batch[name][recoloured] = frames
            for task in hues.nonzero()[0]:
                batch[name][task] = turn_hue(batch[name][task], hues[task])
        for name in ("states", "actions") if self.mirror else ():
            batch[name][mirrored] *= data.mirror[name]
        return {**batch, "tasks": tasks, "mirrored": mirrored, "recoloured": recoloured, "hues": hues, "demos": demos,
                "control_demos": control_demos, "times": times}

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
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        parser.add_argument(f"--{split}", type=number(int, 1, 10 ** 7), default=FULL_DATA["tasks"][split], help=f"{name} tasks")
    parser.add_argument("--demos", type=number(int, 2), default=FULL_DATA["demos"], help="demonstrations a task")
    parser.add_argument("--workers", type=number(int, 1), default=cores(), help="processes")
    parser.add_argument("--seed", type=number(int, 0), default=FULL_DATA["seed"], help="seed of all demonstrations")
    parser.add_argument("--share", type=share, default=launched()[:2], metavar="I/N", help="make the I-th of N shares only, "
                        "I from 0 (default: the rank that torchrun or srun gives, else all)")
    args = parser.parse_args()
    missing = generate(args.out, {"test": args.test, "val": args.val, "train": args.train}, args.demos, args.seed,
                       args.workers, *args.share)
    say(f"{args.out}: {read_manifest(args.out)['tasks']} tasks, {f'{missing} of them still to come' if missing else 'all there'}")


if __name__ == "__main__":
    command(main, "lower --workers")
