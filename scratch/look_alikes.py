"""More look-alike validation pairs: the first and last frames of demonstrations -> npz."""
import sys; sys.path.append("/root/long")
import numpy as np, sim
from pathlib import Path
from common import make_files
OUT = Path("/root/alike")
def alike(split, pair):
    a = sim.make_task(split, 2 * pair); x, y = a.target.appearance, a.distractor.appearance
    return x.pattern == y.pattern and np.abs(np.subtract(x.colours, y.colours)).max() < 0.3
def record(path, index, n):
    env, task = sim.PushEnv(), sim.make_task("val", index)
    ends = []
    for k in range(n):
        f = sim.record_demo(env, task, k, 0)["frames"]; ends.append(f[[0, -1]])
    env.close()
    path.parent.mkdir(exist_ok=True)
    with open(str(path) + ".tmp", "wb") as file: np.save(file, np.stack(ends))
    import os; os.rename(str(path) + ".tmp", path)
if __name__ == "__main__":
    sys.path.insert(0, "/root")
    import look_alikes as m
    pairs = [p for p in range(38, 240) if alike("val", p)]
    print(len(pairs))
    make_files(m.record, [(OUT / f"{2*p+s:05d}.npy", 2*p+s, 4) for p in pairs for s in (0, 1)], 2)
