import sys; sys.path.insert(0,"/root/run")
import numpy as np, json
from pathlib import Path
src, dst = Path("/root/long/data/push"), Path("/root/long/data/quick")
for split, n in (("train",320),("val",16)):
    (dst/split).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        a = dict(np.load(src/split/f"{i:05d}.npz")); k = 4
        rows = a["lengths"][:k].sum()
        off = a["offsets"][:rows+1]
        raw = open(src/split/f"{i:05d}.frames","rb").read(int(off[-1]))
        (dst/split/f"{i:05d}.frames").write_bytes(raw)
        np.savez(dst/split/f"{i:05d}.npz", states=a["states"][:rows], actions=a["actions"][:rows], lengths=a["lengths"][:k], offsets=off)
