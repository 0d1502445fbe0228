"""The data set of demonstrations, and the loader that draws few-shot batches from it.

    python data.py --out data/push

writes one `SPLIT/INDEX.npz` a task: states, clean expert actions, and frames that are compressed
one by one (so that any frame is read alone), beside a `manifest.json`. An interrupted run is
finished by the same command; a larger `--train` adds tasks. The bytes depend on the seed only.
"""
import argparse
import collections
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

import sim

VERSION = 2
NOISE = 0.1  # std of the noise on a demonstration's executed actions; the clean ones are recorded
CLEAN_ATTEMPTS = 20  # from here on a demo may end up to SUCCESS_DISTANCE off or move the distractor
ATTEMPTS = 40
STATE_STD_FLOOR = 1e-3  # as in MIL
TEMPORARY = ".unfinished"  # ends the names of files that are being written


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
    """Run a command-line program: a UserError or a failing disk is one line and exit code 2.

    Ctrl-C and SIGTERM end it and its workers at once; what was done is on the disk.
    """
    signal.signal(signal.SIGTERM, lambda number_, _: sys.exit(128 + number_))
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
    except MemoryError:
        fail("not enough memory: take less at a time (see --help)")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


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


def parallel(function, jobs, workers, initializer=None, initargs=()):
    """Yield `function(job)` for all jobs as they finish, in fresh processes that end with this one.

    Raises UserError if a process dies, as it does for lack of memory.
    """
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # inherited: a core for every process
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(workers, len(jobs))), context, _start_worker, (initializer, initargs))
    try:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C reaches all, this process decides
        futures = [pool.submit(function, job) for job in jobs]
        signal.signal(signal.SIGINT, interrupt)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for lack of memory: run the same command with fewer --workers")
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(initializer, initargs):
    def follow():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
    if initializer:
        initializer(*initargs)


@contextlib.contextmanager
def locked(folder):
    """Make a folder and keep other processes from writing to it. Raises UserError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being written by another process: wait for it or choose another folder")
        remove_stale(folder)
        yield


def remove_stale(folder):
    """Delete the temporary files that killed processes left in a folder."""
    for stale in folder.glob("*" + TEMPORARY):
        stale.unlink(missing_ok=True)


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then give it its name."""
    temporary = Path(f"{path}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checked(path, write):
    """As write_atomically, and the SHA-256 of what was written as the last 32 bytes (zip readers skip them)."""
    buffer = io.BytesIO()
    write(buffer)
    content = buffer.getbuffer()
    write_atomically(path, lambda file: file.writelines((content, hashlib.sha256(content).digest())))


def checked(content):
    """What write_checked was given to write, of the bytes of its file. Raises ValueError if a single bit differs."""
    content = memoryview(content)
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError("checksum")
    return content[:-32]


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


def _record_task(job):
    folder, split, index, demos, seed = job
    env = sim.PushEnv()
    _write_task(folder, split, index, [record_demo(env, sim.make_task(split, index), i, seed) for i in range(demos)])
    env.close()
    return split, index


def _write_task(folder, split, index, demos):
    frames = [zlib.compress(frame.tobytes(), 1) for demo in demos for frame in demo["frames"]]
    arrays = {"states": np.stack([demo["states"] for demo in demos]),
              "actions": np.stack([demo["actions"] for demo in demos]),
              "frames": np.frombuffer(b"".join(frames), np.uint8),
              "offsets": np.cumsum([0] + [len(frame) for frame in frames])}
    write_checked(task_path(folder, split, index), lambda file: np.savez(file, **arrays))


def evenly(horizon, count):
    """`count` times of a demonstration, evenly spaced, the first and the last included."""
    return np.linspace(0, horizon - 1, count).round().astype(int)


def task_path(folder, split, index):
    return Path(folder) / split / f"{index:05d}.npz"


def generate(folder, counts, demos, seed, workers=None):
    """Write (or finish, or extend) the data set; `counts` maps a split to its number of tasks.

    Raises UserError if the folder holds data of other settings or is being written by another process.
    """
    manifest = dict(version=VERSION, seed=seed, demos=demos, noise=NOISE, horizon=sim.HORIZON,
                    image_size=sim.IMAGE_SIZE, tasks=counts)
    _make(Path(folder), manifest, _record_task, lambda split, index: (folder, split, index, demos, seed), workers)


def _make(folder, manifest, write, job, workers):
    """Call `write(job(split, index))` in parallel for the manifest's tasks that are not there yet.

    A manifest that is there must have the same settings; the new one has the larger number of tasks.
    """
    with locked(folder):
        counts, old = manifest["tasks"], {"tasks": {}}
        if (folder / "manifest.json").exists():
            old = read_manifest(folder)
            if {**old, "tasks": counts} != manifest:
                raise UserError(f"{folder} holds data with other settings (seed {old['seed']}, {old['demos']} demos): "
                                "give the same, or choose another --out")
        tasks = {split: max(counts.get(split, 0), old["tasks"].get(split, 0)) for split in sim.SPLITS}
        write_manifest(folder, {**manifest, "tasks": tasks})
        for split in counts:
            remove_stale(folder / split)
        jobs = [job(split, index) for split in counts for index in range(counts[split])
                if not task_path(folder, split, index).exists()]
        start = time.monotonic()
        for done, (split, index) in enumerate(parallel(write, jobs, workers or os.cpu_count()), 1):
            seconds = time.monotonic() - start
            progress(f"{split} {index}: {done}/{len(jobs)} tasks, "
                     f"{done * manifest['demos'] * manifest['horizon'] / seconds:.0f} frames/s, "
                     f"{seconds / done * (len(jobs) - done) / 60:.1f} min left", end=done == len(jobs))


def write_manifest(folder, manifest):
    for split in manifest["tasks"]:
        (folder / split).mkdir(exist_ok=True)
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    write_atomically(folder / "manifest.json", lambda file: file.write(text.encode()))


def _digest(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def data_command(folder, manifest):
    """The command that makes or finishes a data set."""
    if manifest["seed"] is None:
        return f"python data.py --out {folder} --from-mil DIR --val {manifest['tasks']['val']}"
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
    if version is None or digest != _digest(manifest):
        raise UserError(f"{path} is damaged: delete it and run the same python data.py again")
    return manifest


# The MIL benchmark's published folders ---------------------------------------------------------

MIL_DEMOS = range(6, 18)  # of 24: those that the papers use, the target on either side
MIL_SHAPES = {"demoX": (24, 100, sim.STATE_DIM), "demoU": (24, 100, sim.ACTION_DIM)}


def import_mil(source, folder, val, workers=None):
    """Turn MIL's folders (or folders of them) into a data set; the last `val` training tasks validate.

    A training task is `demos_I.pkl`, a test task `I.pkl`, each beside its `object_I/condJ.samp0.gif`.
    Raises UserError for missing or damaged files and for pickles that hold more than arrays.
    """
    found = [path for pattern in ("*.pkl", "*/*.pkl") for path in Path(source).glob(pattern)]
    found = sorted((int(path.stem.removeprefix("demos_")), path) for path in found
                   if path.stem.removeprefix("demos_").isdecimal())
    paths = {"train": [path for _, path in found if path.stem.startswith("demos_")],
             "test": [path for _, path in found if not path.stem.startswith("demos_")]}
    if not 0 < val < len(paths["train"]):
        raise UserError(f"{source} holds {len(paths['train'])} training tasks (demos_*.pkl): "
                        "give the folder of MIL's data, and a --val below that number")
    paths["train"], paths["val"] = paths["train"][:-val], paths["train"][-val:]
    manifest = dict(version=VERSION, seed=None, demos=len(MIL_DEMOS), noise=None, horizon=sim.HORIZON,
                    image_size=sim.IMAGE_SIZE, tasks={split: len(paths[split]) for split in sim.SPLITS},
                    source=_digest({split: [path.name for path in paths[split]] for split in sim.SPLITS}))
    _make(Path(folder), manifest, _import_task, lambda split, index: (folder, split, index, paths[split][index]), workers)


def _import_task(job):
    folder, split, index, path = job
    try:
        with open(path, "rb") as file:
            content = _ArraysUnpickler(file, encoding="latin1").load()
        arrays = {name: content[name].values.astype(np.float32) for name in MIL_SHAPES}
        if any(arrays[name].shape != shape or not np.isfinite(arrays[name]).all() for name, shape in MIL_SHAPES.items()):
            raise ValueError("shape")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(f"{path} does not hold MIL's demoX and demoU ({error}): download it again")
    folder_ = path.parent / f"object_{path.stem.removeprefix('demos_')}"
    _write_task(folder, split, index, [{"states": arrays["demoX"][i], "actions": arrays["demoU"][i],
                                        "frames": _read_gif(folder_ / f"cond{i}.samp0.gif")} for i in MIL_DEMOS])
    return split, index


class _Dtype:
    """Stands in for numpy.dtype in a pickle: floating-point numbers only."""

    def __init__(self, name, *_):
        if name not in ("f4", "f8"):
            raise pickle.UnpicklingError(f"numbers of type {name}")
        self.name = name

    def __setstate__(self, state):
        self.name = {"<": "<", ">": ">"}[state[1]] + self.name


class _Array:
    """Stands in for numpy.ndarray in a pickle; numpy's own would believe whatever state it is given."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.values = np.frombuffer(raw, dtype.name).reshape(shape, order="F" if fortran else "C")


class _ArraysUnpickler(pickle._Unpickler):  # the one in C takes as much memory as a pickle asks for
    """A pickle of strangers is code: only what builds arrays and plain containers is admitted."""

    ADMITTED = {"numpy.ndarray": _Array, "numpy.dtype": _Dtype, "numpy.core.multiarray._reconstruct": _Array,
                "numpy._core.multiarray._reconstruct": _Array, "_codecs.encode": lambda text, _: text.encode("latin1")}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return self.ADMITTED[f"{module}.{name}"]


def _read_gif(path):
    """The frames (100, 125, 125, 3) uint8 of one of MIL's GIFs."""
    size, frames = (sim.IMAGE_SIZE, sim.IMAGE_SIZE), []
    try:
        with Image.open(path, formats=["GIF"]) as gif:
            for frame in itertools.islice(ImageSequence.Iterator(gif), sim.HORIZON + 1):
                if frame.size != size:  # before any pixel is read
                    raise ValueError(f"{frame.size} pixels")
                frames.append(np.array(frame.convert("RGB")))
        if len(frames) != sim.HORIZON:
            raise ValueError(f"{len(frames)} frames or more")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download it again")
    except Exception as error:  # Pillow raises whatever the damaged bytes lead to
        raise UserError(f"{path} is not a GIF of {sim.HORIZON} frames of {size} pixels ({error}): download it again")
    return np.stack(frames)


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
                for end, time_ in enumerate(evenly(self.horizon, 2)):
                    self.ends[task, demo, end] = self.frame(task, demo, time_)

    def _read(self, path):
        """A task's arrays, checked: `states`, `actions`, `offsets`, `frames`."""
        demos, horizon = self.manifest["demos"], self.manifest["horizon"]
        shapes = {"states": ((demos, horizon, sim.STATE_DIM), "<f4"), "actions": ((demos, horizon, sim.ACTION_DIM), "<f4"),
                  "offsets": ((demos * horizon + 1,), "<i8")}
        remedy = data_command(path.parents[1], self.manifest)
        try:
            content = checked(path.read_bytes())
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                arrays = {name: _read_array(archive, name, *shapes[name]) for name in shapes}
                arrays["frames"] = _read_array(archive, "frames", (int(arrays["offsets"][-1]),), "|u1")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: finish the data set with {remedy}")
        except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
            raise UserError(f"{path} is damaged: delete it and run {remedy}")
        return arrays

    def frame(self, task, demo, time_):
        """The frame (H, W, 3) uint8 at one time of one demo."""
        at = demo * self.horizon + time_
        start, stop = self._offsets[task][at:at + 2]
        try:
            pixels = zlib.decompressobj().decompress(self._frames[task][start:stop], math.prod(self.frame_shape))
            return np.frombuffer(pixels, np.uint8).reshape(self.frame_shape)
        except (zlib.error, ValueError):
            raise UserError(f"task {task}, demo {demo}, time {time_}: not a frame of {self.frame_shape}; make the data anew")

    def frames(self, tasks, demos, times):
        """The frames (..., H, W, 3) at indices that are broadcast against each other."""
        at = np.broadcast_arrays(tasks, demos, times)
        frames = np.empty((*at[0].shape, *self.frame_shape), np.uint8)
        for index in np.ndindex(at[0].shape):
            frames[index] = self.frame(*(indices[index] for indices in at))
        return frames

    def state_statistics(self):
        """Mean and standard deviation (20,) of the states, the latter at least STATE_STD_FLOOR."""
        states = self.states.reshape(-1, self.states.shape[-1]).astype(np.float64)
        return states.mean(0).astype(np.float32), np.maximum(states.std(0), STATE_STD_FLOOR).astype(np.float32)


def _read_array(archive, name, shape, dtype):
    """An array of an npz archive; no memory is taken unless its header promises this shape and type."""
    if archive.getinfo(name + ".npy").compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    with archive.open(name + ".npy") as file:
        np.lib.format.read_magic(file)
        if np.lib.format.read_array_header_1_0(file) != (shape, False, np.dtype(dtype)):
            raise ValueError("shape")
        return np.frombuffer(file.read(), dtype).reshape(shape)


class TaskLoader:
    """An endless iterator of few-shot batches; batch i depends on (seed, i) only.

    A batch has B different tasks; of each K support and Q query demos, all different, and F control
    samples of each of the two sets, every one at a random time of a random demo of its set: uniform
    for early = 1, else T u^early with a uniform u, which favours the demo's beginning. With
    `random_support` every batch draws its K from 1 to the K given. With `mirror` half of the tasks
    are seen in a mirror, all their demos alike.

    It is a dict of uint8 and float32 arrays, U for support and q for query, with n the `demo_frames` of
    a support demo, evenly spaced, first and last for two:
    `ends_U` (B, K, n, H, W, 3), `ends_q` (B, Q, 2, H, W, 3), `images` (B, 2, F, H, W, 3),
    `states` (B, 2, F, 20), `actions` (B, 2, F, 7), with U before q on axis 1. And `tasks` (B,),
    `mirrored` (B,), `demos` (B, K + Q), `control_demos` (B, 2, F), `times` (B, 2, F) tell what was
    drawn. Batches are prepared ahead on a background thread. Raises UserError if B or K + Q are too many.
    """

    def __init__(self, task_set, B, K, Q, F, seed, early=1.0, random_support=False, mirror=False,
                 demo_frames=2, ahead=3):
        if B > task_set.n_tasks:
            raise UserError(f"a batch of {B} tasks needs as many, the data set has {task_set.n_tasks}: lower --batch")
        if K + Q > task_set.n_demos:
            raise UserError(f"K + Q = {K} + {Q} demos are more than the {task_set.n_demos} of a task: "
                            "lower --support or --query")
        self.task_set, self.B, self.K, self.Q, self.F, self.seed, self.early = task_set, B, K, Q, F, seed, early
        self.random_support, self.mirror, self.demo_frames = random_support, mirror, demo_frames
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
        if self.demo_frames == 2:
            ends_U = data.ends[tasks[:, None], demos[:, :K]]
        else:
            ends_U = data.frames(tasks[:, None, None], demos[:, :K, None], evenly(data.horizon, self.demo_frames))
        batch = {"ends_U": ends_U, "ends_q": data.ends[tasks[:, None], demos[:, K:]],
                 "images": data.frames(*at), "states": data.states[at], "actions": data.actions[at]}
        for name in ("ends_U", "ends_q", "images"):
            pixels = batch[name].view("V3")  # moved whole: twice as fast as numpy's loop over their 3 bytes
            pixels[mirrored] = pixels[mirrored][..., ::-1, :]
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
    parser.add_argument("--from-mil", metavar="DIR", help="import MIL's published data; the last --val tasks validate")
    args = parser.parse_args()
    if args.from_mil:
        import_mil(args.from_mil, args.out, args.val, args.workers)
    else:
        counts = {"test": args.test, "val": args.val, "train": args.train}
        generate(args.out, counts, args.demos, args.seed, args.workers)
    paths = list(Path(args.out).glob("*/*.npz"))
    counts = " + ".join(str(sum(path.parent.name == split for path in paths)) for split in sim.SPLITS)
    print(f"{args.out}: {counts} tasks, {sum(path.stat().st_size for path in paths) / 1e9:.2f} GB")


if __name__ == "__main__":
    command(main)
