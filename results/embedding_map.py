"""Draw the sentences of the test tasks, each by the last frame of one of its demonstrations.

    python results/embedding_map.py --out results/embedding-map.png

They stand at the first two principal components of their sentences. OUT.json gets the share of
demonstrations that are nearest (largest dot product) to the sentence of their own task, made
without them, and how near each task is to the nearest training task. Needs data/push.
"""
import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import write_json
from data import TaskSet
from evaluate import SHIPPED
from train import load_model

SIDE = 1600  # pixels
torch.set_grad_enabled(False)
parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
out = parser.parse_args().out
model, _ = load_model(SHIPPED.read_bytes())
test, train = (torch.from_numpy(TaskSet("data/push", split).ends) for split in ("test", "train"))

f = model.embeddings(test)  # (N, D, E)
s, total = normalize(f, dim=-1), f.sum(1)  # each demonstration alone; (N, E)
own = (s * normalize(total[:, None] - f, dim=-1)).sum(-1)  # (N, D), with its task without it
others = s @ normalize(total).T - 2 * torch.eye(len(s))[:, None]  # (N, D, N), its own put last
retrieved = (own > others.amax(-1)).float().mean().item()
nearest = (model.embed(test) @ model.embed(train).T).amax(1).tolist()
write_json(f"{out}.json", dict(
    tasks=len(s), demos=own.numel(), retrieval=retrieved, nearest_similarity=nearest))

points = torch.linalg.svd(s[:, 0] - s[:, 0].mean(0)).U[:, :2]
points -= points.amin(0)
points *= (SIDE - 125) / points.amax(0)  # 125: a picture's side
canvas = Image.new("RGB", (SIDE, SIDE), "white")
for frames, place in zip(test, points.int().tolist()):
    canvas.paste(Image.fromarray(frames[0, 1].numpy()), place)
canvas.save(out)
