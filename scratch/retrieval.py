"""Look-alike retrieval on validation pairs: python retrieval.py CHECKPOINT..."""
import sys; import os; sys.path.insert(0, os.environ.get("CODE", "/root/long"))
import numpy as np, torch, glob
from torch.nn.functional import normalize
from pathlib import Path
import train
torch.set_grad_enabled(False); torch.set_num_threads(1)
files = sorted(glob.glob("/root/alike/*.npy"))
ends = torch.from_numpy(np.stack([np.load(f) for f in files]))  # (N, 4, 2, H, W, 3)
try:
    sys.path.insert(1, "/root"); from look_alikes import alike
    import data
    val = data.TaskSet("/root/long/data/push", "val"); ve = torch.from_numpy(val.ends)
    al = torch.tensor([alike("val", p) for p in range(38)]).repeat_interleave(2)
except Exception as e: ve = None; print(e)
def measure(model, ends):
    f = torch.cat([model.embeddings(e) for e in ends.split(20)])  # (N, D, E)
    s = normalize(f, dim=-1); tot = s.sum(1)
    own = (s * normalize(tot[:, None] - s, dim=-1)).sum(-1)
    partner = normalize(tot, dim=-1).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)[:, None]
    part = (s * partner).sum(-1)
    m = normalize(tot, dim=-1).unflatten(0, (-1, 2)); cos = (m[:, 0] * m[:, 1]).sum(-1)
    hit = (own > part).float()
    return hit.mean().item(), hit.mean(1).unflatten(0, (-1, 2)).mean(1), cos.mean().item(), (own - part).mean().item(), f.norm(dim=-1).median().item()
for path in sys.argv[1:]:
    model, _ = train.load_model(Path(path).read_bytes(), path)
    h, per, cos, gap, norm = measure(model, ends)
    se = per.std().item() / len(per) ** .5
    line = f"{path}: alike {100*h:.1f} +- {100*se:.1f} (pairs {len(per)}, cos {cos:.3f}, gap {gap:.3f}, norm {norm:.0f})"
    if ve is not None:
        a, pa, c, g, n = measure(model, ve[al]); b, *_ = measure(model, ve[~al])
        line += f"  val alike {100*a:.1f} other {100*b:.1f}"
    print(line, flush=True)
