"""Draw the sentences of the test tasks, each by the last frame of one of its demonstrations.

    python results/embedding_map.py --out results/embedding-map.png

They stand at the first two principal components of their sentences. OUT.json gets the share of
demonstrations that are nearest (largest dot product) to the sentence of their own task, made
without them, and the nearest training task of each task. Needs the data set.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run_program, write_atomically, write_json
from data import TaskSet
from evaluate import SHIPPED
from train import load_model

SIDE, THUMBNAIL = 1600, 120  # pixels


@torch.no_grad()
def compare(model, data, train_data):
    """(the sentences of all demonstrations alone (N, D, E), the figures)."""
    s_q = model.embed(torch.from_numpy(data.ends)[:, :, None])  # (N, D, E)
    N, D, _ = s_q.shape
    others = s_q.sum(1, keepdim=True) - s_q  # (N, D, E), of each demonstration
    similarity = torch.einsum("nde,me->ndm", s_q, F.normalize(s_q.sum(1), dim=-1))
    own = (s_q * F.normalize(others, dim=-1)).sum(-1)  # (N, D)
    similarity[torch.arange(N), :, torch.arange(N)] = own
    found = similarity.argmax(-1) == torch.arange(N)[:, None]
    s_U, s_train = (model.embed(torch.from_numpy(tasks.ends)) for tasks in (data, train_data))
    nearness, nearest = (s_U @ s_train.T).max(-1)
    return s_q, {"tasks": N, "demos": N * D, "retrieval": found.float().mean().item(),
                 "nearest_training_task": nearest.tolist(),
                 "nearest_similarity": nearness.tolist()}


def draw(path, sentences, frames):
    """Frames (N, H, W, 3) at the principal components of sentences (N, E)."""
    points = sentences - sentences.mean(0)
    points = points @ torch.linalg.svd(points).Vh[:2].T  # (N, 2)
    low, high = points.amin(0), points.amax(0)
    points = (points - low) / (high - low) * (SIDE - THUMBNAIL)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    for frame, (x, y) in zip(frames, points.round().int().tolist()):
        canvas.paste(Image.fromarray(frame).resize((THUMBNAIL, THUMBNAIL)), (x, y))
    write_atomically(path, lambda file: canvas.save(file, "png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="of TecNets")
    parser.add_argument("--data", default="data/push", help="data set")
    parser.add_argument("--out", required=True, help="PNG file; figures go to OUT.json")
    args = parser.parse_args()
    model, _ = load_model(args.checkpoint.read_bytes(), args.checkpoint)
    data = TaskSet(args.data, "test")
    s_q, figures = compare(model, data, TaskSet(args.data, "train"))
    draw(args.out, s_q[:, 0], data.ends[:, 0, 1])
    write_json(f"{args.out}.json", figures)
    print(f"{figures['retrieval']:.1%} of {figures['demos']} demonstrations are nearest to their own "
          f"among {figures['tasks']} tasks")


if __name__ == "__main__":
    run_program(main)
