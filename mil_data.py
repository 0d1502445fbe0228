"""Import of MIL's published demonstrations of simulated pushing, the benchmark of the paper.

    python mil_data.py data/sim_push data/sim_push_test --out data/mil
    python train.py --data data/mil

The data of github.com/tianheyu927/mil (Finn et al., CoRL 2017) hold for every task I a pickle,
`demos_I.pkl` in the folder of training tasks and `I.pkl` in that of test tasks, beside its GIFs
`object_I/condJ.samp0.gif`. Networks normalise states and actions, as those of all data of one's
own; the official code leaves both raw. An interrupted import is begun anew in another folder.
"""
import pickle
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common import UserError, option_parser, run_program
from data import FULL_DATA, write_data_set

HORIZON, IMAGE_SIZE = 100, 125
MIL_DEMOS = range(6, 18)  # of 24: those that the papers use, the target on either side
MIL_SHAPES = {"demoX": (24, HORIZON, 20), "demoU": (24, HORIZON, 7)}  # states, actions


def number_of(path):
    return int(path.stem.removeprefix("demos_"))


def import_mil(train_folder, test_folder, folder, val):
    """Turn MIL's folders into a data set; the last `val` training tasks are to validate on.

    If no number is missing, tasks 2k and 2k + 1 are a pair; where one would be split, one task
    more is to validate on.
    Raises UserError for missing tasks or other shapes than those of pushing.
    """
    train = sorted(Path(train_folder).glob("demos_*.pkl"), key=number_of)
    test = sorted(Path(test_folder).glob("[0-9]*.pkl"), key=number_of)
    if not (test and 0 < val < len(train)):
        raise UserError(f"{train_folder} holds {len(train)} training tasks (demos_*.pkl) and "
                        f"{test_folder} {len(test)} test tasks: give MIL's folders, and a --val "
                        "below the number of training tasks")
    paired = [*map(number_of, train)] == [*range(len(train))]
    if paired:
        val += (len(train) - val) % 2
    paths = {"train": train[:-val], "val": train[-val:], "test": test}
    write_data_set(folder, {split: map(read_task, paths[split]) for split in paths}, pairs=paired)


def read_task(path):
    """The demonstrations of a task's pickle, as data.write_data_set takes them."""
    arrays = read_pickle(path)
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes != MIL_SHAPES:
        raise UserError(f"{path} is not of pushing: it has {shapes}, not {MIL_SHAPES}")
    gifs = path.parent / f"object_{number_of(path)}"
    return [{"states": arrays["demoX"][i], "actions": arrays["demoU"][i],
             "frames": read_gif(gifs / f"cond{i}.samp0.gif")} for i in MIL_DEMOS]


class ArraysUnpickler(pickle.Unpickler):
    """A pickle of strangers is code: only what builds arrays and plain containers is admitted."""

    ADMITTED = {
        "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": np._core.multiarray._reconstruct,
        "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,
        "_codecs.encode": lambda text, _: text.encode("latin1")}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return self.ADMITTED[f"{module}.{name}"]


def read_pickle(path):
    """The float32 arrays of one of MIL's pickles."""
    with open(path, "rb") as file:
        content = ArraysUnpickler(file, encoding="latin1").load()
    return {name: np.asarray(content[name], np.float32) for name in MIL_SHAPES}


def read_gif(path):
    """The frames (100, 125, 125, 3) uint8 of one of MIL's GIFs.

    An encoder merges equal frames into one that is shown as much longer: that one counts as often.
    """
    frames, shown = [], []
    with Image.open(path) as gif:
        for frame in ImageSequence.Iterator(gif):
            frames.append(np.array(frame.convert("RGB")))
            shown.append(frame.info.get("duration", 0))
    if len(frames) < HORIZON:
        frames = np.repeat(frames, [round(time / (min(shown) or 1)) for time in shown], 0)
    frames = np.array(frames)
    if frames.shape != (HORIZON, IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UserError(f"{path} has frames of the shape {frames.shape}: download it again")
    return frames


def main():
    parser = option_parser(__doc__, "%(prog)s TRAIN TEST --out FOLDER [--val N]")
    add = parser.add_argument
    add("train", metavar="TRAIN", help="MIL's folder of training tasks")
    add("test", metavar="TEST", help="MIL's folder of test tasks")
    add("--out", required=True, help="folder of the data set")
    add("--val", type=int, default=FULL_DATA["tasks"]["val"],
        help="the last training tasks, to validate on; one more where a pair would be split")
    args = parser.parse_args()
    import_mil(args.train, args.test, args.out, args.val)
    print(f"{args.out}: all tasks there")


if __name__ == "__main__":
    run_program(main)
