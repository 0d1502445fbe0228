"""Import of MIL's published demonstrations of simulated pushing, the benchmark of the paper.

    python mil_data.py FOLDER --out data/mil
    python train.py --data data/mil

The data of github.com/tianheyu927/mil (Finn et al., CoRL 2017) hold for every task I a pickle, `demos_I.pkl`
of a training task and `I.pkl` of a test task, beside its GIFs `object_I/condJ.samp0.gif`.
"""
import argparse
import hashlib
import itertools
import pickle
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common import Parser, UserError, command, cores, number, say
from data import FULL_DATA, VERSION, digest_of, make_tasks, read_manifest, write_task

HORIZON, IMAGE_SIZE, STATE_DIM, ACTION_DIM = 100, 125, 20, 7
MIL_DEMOS = range(6, 18)  # of 24: those that the papers use, the target on either side
MIL_SHAPES = {"demoX": (24, 100, STATE_DIM), "demoU": (24, 100, ACTION_DIM)}


def import_mil(source, folder, val, workers=None):
    """Turn MIL's folders (or folders of them) into a data set; the last `val` training tasks validate.

    MIL's archive has other tasks, of the same file names, beside pushing: a folder is taken if its first pickle has the
    shapes of pushing, and left otherwise. Raises UserError for missing, damaged or ambiguous files and for pickles
    that hold more than arrays.
    """
    folders, report = {"train": {}, "test": {}}, []
    for place in sorted({path.resolve().parent for pattern in ("*.pkl", "*/*.pkl") for path in Path(source).glob(pattern)}):
        for split, prefix in (("train", "demos_"), ("test", "")):
            found = sorted((int(path.stem.removeprefix(prefix)), path) for path in place.glob(prefix + "*.pkl")
                           if path.stem.removeprefix(prefix).isdecimal())
            if not found:
                continue
            shapes = {name: values.shape for name, values in _read_pickle(found[0][1]).items()}
            report.append(f"{place} holds {len(found)} {split} tasks" + f", not of pushing: {shapes}" * (shapes != MIL_SHAPES))
            for task, path in found if shapes == MIL_SHAPES else ():
                other = folders[split].setdefault(task, path)
                if other != path:
                    raise UserError(f"{split} task {task} is both {other} and {path}: give a folder that holds it once")
    say(*report, sep="\n")
    if not 0 < val < len(folders["train"]):
        raise UserError(f"{source} holds {len(folders['train'])} training tasks of pushing (demos_*.pkl): "
                        "give the folder of MIL's data, and a --val below that number")
    train, test = ([tasks[task] for task in sorted(tasks)] for tasks in folders.values())
    paths = {"train": train[:-val], "val": train[-val:], "test": test}
    pairs = sorted(folders["train"]) == list(range(len(train))) and val % 2 == len(train) % 2
    manifest = dict(version=VERSION, seed=None, demos=len(MIL_DEMOS), noise=None, horizon=HORIZON, image_size=IMAGE_SIZE,
                    state_dim=STATE_DIM, action_dim=ACTION_DIM, mirror=None, recolour=False, pairs=pairs,
                    tasks={split: len(paths[split]) for split in paths},
                    source=digest_of({split: [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[split]]
                                      for split in paths}))
    make_tasks(Path(folder), manifest, _import_task, workers, 0, 1, paths)


def _read_pickle(path):
    """The float32 arrays of a pickle of MIL's."""
    try:
        with open(path, "rb") as file:
            content = _ArraysUnpickler(file, encoding="latin1").load()
        return {name: content[name].values.astype(np.float32) for name in MIL_SHAPES}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(f"{path} does not hold MIL's demoX and demoU ({error}): download it again")


def _import_task(folder, manifest, split, index, paths):
    path = paths[split][index]
    arrays = _read_pickle(path)
    if any(arrays[name].shape != shape or not np.isfinite(arrays[name]).all() for name, shape in MIL_SHAPES.items()):
        raise UserError(f"{path} does not hold MIL's demoX and demoU, finite and of the shape {MIL_SHAPES}: download it again")
    gifs = path.parent / f"object_{path.stem.removeprefix('demos_')}"
    write_task(folder, manifest, split, index, [{"states": arrays["demoX"][i], "actions": arrays["demoU"][i],
                                                 "frames": _read_gif(gifs / f"cond{i}.samp0.gif")} for i in MIL_DEMOS])


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


def _from_buffer(raw, dtype, shape, order):
    """Stands in for numpy's function of protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


class _ArraysUnpickler(pickle._Unpickler):  # the one in C takes as much memory as a pickle asks for
    """A pickle of strangers is code: only what builds arrays and plain containers is admitted."""

    ADMITTED = {"numpy.ndarray": _Array, "numpy.dtype": _Dtype, "numpy.core.multiarray._reconstruct": _Array,
                "numpy._core.multiarray._reconstruct": _Array, "numpy.core.numeric._frombuffer": _from_buffer,
                "numpy._core.numeric._frombuffer": _from_buffer, "_codecs.encode": lambda text, _: text.encode("latin1")}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return self.ADMITTED[f"{module}.{name}"]


def _read_gif(path):
    """The frames (100, 125, 125, 3) uint8 of one of MIL's GIFs.

    An encoder merges equal frames into one that is shown as much longer: that one counts as often.
    """
    size, frames, shown = (IMAGE_SIZE, IMAGE_SIZE), [], []
    try:
        with Image.open(path, formats=["GIF"]) as gif:
            for frame in itertools.islice(ImageSequence.Iterator(gif), HORIZON + 1):
                if frame.size != size:  # before any pixel is read
                    raise ValueError(f"{frame.size} pixels")
                frames.append(np.array(frame.convert("RGB")))
                shown.append(frame.info.get("duration", 0))
        times = [round(duration / (min(shown) or 1)) if len(frames) < HORIZON else 1 for duration in shown]
        if sum(times) != HORIZON:
            raise ValueError(f"{len(frames)} frames" + " or more" * (len(frames) > HORIZON))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download it again")
    except Exception as error:  # Pillow raises whatever the damaged bytes lead to
        raise UserError(f"{path} is not a GIF of {HORIZON} frames of {size} pixels ({error}): download it again")
    return np.repeat(frames, times, 0)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", help="MIL's folder, or one that holds its folders")
    parser.add_argument("--out", required=True, help="folder of the data set")
    parser.add_argument("--val", type=number(int, 1), default=FULL_DATA["tasks"]["val"], help="last training tasks, to validate on")
    parser.add_argument("--workers", type=number(int, 1), default=cores(), help="processes")
    args = parser.parse_args()
    import_mil(args.folder, args.out, args.val, args.workers)
    say(f"{args.out}: {read_manifest(args.out)['tasks']} tasks")


if __name__ == "__main__":
    command(main, "lower --workers")
