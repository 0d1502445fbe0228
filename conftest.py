"""What both test files use: random batches and data sets, small networks, programs to run."""
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"  # read by torch: threads that spin slow other processes

import numpy as np
import torch

from tecnets import Settings, TecNets

HERE = Path(__file__).parent


def batch_of(B=5, K=2, Q=1, M=2, n=2, H=13, W=13, dtype=torch.float64):
    """A random batch; tecnets.TecNets explains the letters."""
    torch.manual_seed(0)

    def images(*shape):
        return torch.randint(0, 256, (*shape, H, W, 3), dtype=torch.uint8)

    return {"frames_U": images(B, K, n), "frames_q": images(B, Q, n), "images": images(B, 2, M),
            "states": torch.randn(B, 2, M, 20, dtype=dtype),
            "actions": torch.randn(B, 2, M, 7, dtype=dtype)}


def small_model(network=TecNets, settings=Settings, size=13, statistics={}, **chosen):
    """An untrained network of small square images, in float64."""
    torch.manual_seed(0)
    chosen = settings(image_height=size, image_width=size, **chosen)
    return network(chosen, **statistics).double()


def random_demos(lengths=(7,), H=16, W=16, S=20, A=7, **counts):
    """Tasks for data.write_data_set: counts[split] of them, with a demonstration of each length."""
    rng = np.random.default_rng(0)

    def task():
        return [{"frames": rng.integers(0, 256, (T, H, W, 3), np.uint8),
                 "states": rng.random((T, S), np.float32),
                 "actions": rng.random((T, A), np.float32)} for T in lengths]

    return {split: [task() for _ in range(n)] for split, n in counts.items()}


@contextlib.contextmanager
def started(*words, **settings):
    """Python with these words, such as HERE / "train.py"; killed at the end with all it started.

    It gets Ctrl-C, which a job in the background ignores and would hand down.
    """
    with subprocess.Popen(
            [sys.executable, *map(str, words)], start_new_session=True, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **settings) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(name, *words, code=0, timeout=200, **settings):
    """Run a program of this project: (what it printed, what it complained of)."""
    with started(HERE / name, *words, stdout=-1, stderr=-1, **settings) as process:  # -1: a pipe
        printed, complaint = process.communicate(timeout=timeout)
    assert process.returncode == code, complaint
    return printed, complaint
