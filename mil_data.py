"""Import of MIL's published demonstrations of simulated pushing, the benchmark of the paper.

    python mil_data.py FOLDER --out data/mil
    python train.py --data data/mil

The data of github.com/tianheyu927/mil (Finn et al., CoRL 2017) hold for every task I a pickle, `demos_I.pkl`
of a training task and `I.pkl` of a test task, beside its GIFs `object_I/condJ.samp0.gif`.
"""
import argparse
import functools
import itertools
import pickle
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common import Parser, UserError, command, cores, number
from data import FULL_DATA, VERSION, digest_of, make_tasks, read_manifest, write_task

HORIZON, IMAGE_SIZE, STATE_DIM, ACTION_DIM = 100, 125, 20, 7
MIL_DEMOS = range(6, 18)  # of 24: those that the papers use, the target on either side
MIL_SHAPES = {"demoX": (24, 100, STATE_DIM), "demoU": (24, 100, ACTION_DIM)}


def import_mil(source, folder, val, workers=None):
    """Turn MIL's folders (or folders of them) into a data set; the last `val` training tasks validate.

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
    paths = {"train": paths["train"][:-val], "val": paths["train"][-val:], "test": paths["test"]}
    manifest = dict(version=VERSION, seed=None, demos=len(MIL_DEMOS), noise=None, horizon=HORIZON, image_size=IMAGE_SIZE,
                    state_dim=STATE_DIM, action_dim=ACTION_DIM, mirror=None, tasks={split: len(paths[split]) for split in paths},
                    source=digest_of({split: [path.name for path in paths[split]] for split in paths}))
    make_tasks(Path(folder), manifest, functools.partial(_import_task, folder, paths), workers)


def _import_task(folder, paths, split, index):
    path = paths[split][index]
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
    gifs = path.parent / f"object_{path.stem.removeprefix('demos_')}"
    write_task(folder, split, index, [{"states": arrays["demoX"][i], "actions": arrays["demoU"][i],
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
    size, frames = (IMAGE_SIZE, IMAGE_SIZE), []
    try:
        with Image.open(path, formats=["GIF"]) as gif:
            for frame in itertools.islice(ImageSequence.Iterator(gif), HORIZON + 1):
                if frame.size != size:  # before any pixel is read
                    raise ValueError(f"{frame.size} pixels")
                frames.append(np.array(frame.convert("RGB")))
        if len(frames) != HORIZON:
            raise ValueError(f"{len(frames)} frames or more")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download it again")
    except Exception as error:  # Pillow raises whatever the damaged bytes lead to
        raise UserError(f"{path} is not a GIF of {HORIZON} frames of {size} pixels ({error}): download it again")
    return np.stack(frames)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", help="MIL's folder, or one that holds its folders")
    parser.add_argument("--out", required=True, help="folder of the data set")
    parser.add_argument("--val", type=number(int, 1), default=FULL_DATA["tasks"]["val"], help="last training tasks, to validate on")
    parser.add_argument("--workers", type=number(int, 1), default=cores(), help="processes")
    args = parser.parse_args()
    import_mil(args.folder, args.out, args.val, args.workers)
    print(f"{args.out}: {read_manifest(args.out)['tasks']} tasks")


if __name__ == "__main__":
    command(main)
