"""What the programs share and no method needs: one-line errors, files, parallel jobs, progress."""
import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PACKAGES = ("torch", "numpy", "pillow", "pybullet", "pybullet-arm64")  # numbers depend on them
_last_line = -60.0  # when progress printed a line


class UserError(Exception):
    """A mistake that one line can tell a user how to mend."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A program's docstring as it is, and the default of every option that has a value."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def option_parser(description, usage="%(prog)s [options]", **settings):
    """An argument parser for a program with this docstring."""
    return argparse.ArgumentParser(
        description=description, usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False,
        **settings)


def run_program(main):
    """Run a command-line program: a UserError or a failing disk is one line and exit code 2.

    Ctrl-C and SIGTERM end it and its workers at once. Finished files stay.
    """
    signals = []

    def stop(number, _):
        signals.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a script's background job has it
            signal.signal(number, stop)
    try:
        main()
    except BaseException as error:
        if signals:  # whatever became of the KeyboardInterrupt: torch.save makes it a RuntimeError
            sys.exit(128 + signals[0])
        if not isinstance(error, (UserError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def launched():
    """(rank, number of processes, rank on this machine), as torchrun, srun or mpirun say.

    (0, 1, 0) without them; the rank on this machine is 0 if a launcher does not tell it.
    """
    for rank, size, local_rank in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")):
        if rank in os.environ and size in os.environ:
            return tuple(int(os.environ.get(name, 0)) for name in (rank, size, local_rank))
    return 0, 1, 0


def cores():
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def installed_packages():
    """The version of every package on which the numbers depend."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name).partition("+")[0]
    return versions


def progress(line, end=False):
    """Show a line in place of the last one; where the output is no terminal, one a minute."""
    global _last_line
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\n" if end else "", file=sys.stderr, flush=True)
    elif end or time.monotonic() - _last_line >= 60:
        print(line, file=sys.stderr, flush=True)
        _last_line = time.monotonic()


# Files that are whole or absent ---------------------------------------------------------------

def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then give it its name.

    A kill leaves the temporary file, NAME.*.unfinished, which can be deleted.
    """
    temporary = Path(f"{path}.{secrets.token_hex(4)}.unfinished")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, values):
    write_atomically(path, lambda file: file.write(json.dumps(values, indent=1).encode()))


def claim(path, settings, free=()):
    """Note in the JSON file `path` the settings of its folder's files.

    Raises UserError, which names what differs, if the folder was made with other settings; those
    that are `free` may change.
    """
    found = json.loads(path.read_text()) if path.exists() else None
    if found:
        differing = [name for name in {**found, **settings}
                     if name not in free and found.get(name) != settings.get(name)]
        if differing:
            raise UserError(f"{path.parent} has other settings ({', '.join(differing)}): "
                            "give the same, choose another folder, or delete it")
    if found != settings:
        write_json(path, settings)


def make_files(make, jobs, workers, shard=(0, 1)):
    """Make the files that are missing: call `make(path, *arguments)` in parallel for each job.

    A job is a tuple (path, *arguments); `make`, a module's own function, writes the file whole. The
    shard (i, N) is every N-th job from the i-th on. Returns how many files of all shards are
    missing in the end. The same call goes on after a kill.
    """
    missing = [job for job in jobs[shard[0]::shard[1]] if not job[0].exists()]
    start, others = time.monotonic(), multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker)
    try:
        futures = [pool.submit(make, *job) for job in missing]
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            pace = (time.monotonic() - start) / done
            left = len(missing) - done
            progress(f"{done}/{len(missing)} tasks, {60 / pace:.1f} a minute, "
                     f"{pace * left / 60:.1f} min left", end=not left)
    except BaseException as error:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        pool.shutdown(cancel_futures=True)  # its thread ends before the interpreter does
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise UserError("a worker process was killed, perhaps for lack of memory: "
                            "try fewer --workers; the same command goes on")
        raise
    pool.shutdown()
    return sum(not job[0].exists() for job in jobs)


def _start_worker():
    """Ctrl-C is left to the parent, and the worker ends when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shard(text):
    """An argparse type: I/N, the I-th of N shards of a job, I from 0 to N - 1."""
    part, _, parts = text.partition("/")
    if not 0 <= int(part) < int(parts):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1")
    return int(part), int(parts)


# A picture of curves --------------------------------------------------------------------------

def chart(path, lines, x_label, x_ticks, y_ticks, scale=float, legend="top"):
    """Draw lines [(label, colour, [(x, y), ...]), ...] between the first and the last tick.

    `scale` is applied to y and its ticks; the legend stands on the right, "top" or "bottom".
    """
    width, height, margin = 900, 420, 60
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)

    def at(x, y):
        right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (scale(y) - scale(y_ticks[0])) / (scale(y_ticks[-1]) - scale(y_ticks[0]))
        down = min(1, max(0, 1 - up))
        return margin + (width - 2 * margin) * right, margin / 2 + (height - 1.5 * margin) * down

    for y in y_ticks:
        start = at(x_ticks[0], y)
        draw.line([start, at(x_ticks[-1], y)], "#dddddd")
        draw.text((margin - 8, start[1]), f"{y:g}", "black", font, "rm")
    for x in x_ticks:
        draw.text((at(x, y_ticks[0])[0], height - margin + 8), f"{x:,}", "black", font, "mt")
    draw.text((width / 2, height - 22), x_label, "black", font, "mt")
    labels = {label: colour for label, colour, _ in lines}
    for _, colour, points in lines:
        draw.line([at(*point) for point in points], colour, 2)
    y = margin / 2 + 8 if legend == "top" else height - margin - 20 * len(labels)
    for number, (label, colour) in enumerate(labels.items()):
        draw.text((width - margin - 8, y + 20 * number), label, colour, font, "rt")
    write_atomically(path, lambda file: picture.save(file, "png"))


def learning_curves(path, logs):
    """Draw the control losses on training and validation tasks against steps, of some runs.

    A log is the list of rows of a log.jsonl.
    """
    lines = []
    for colour, key, tasks in (("#9ab8dd", "loss_q", "training"),
                               ("#c0392b", "val_loss_q", "validation")):
        for log in logs:
            points = [(row["step"], row[key]) for row in log if key in row]
            lines.append((f"control loss, {tasks} tasks", colour, points))
    steps, losses = zip(*(point for _, _, points in lines for point in points))
    x_ticks = range(0, max(steps) + 1, max(1, max(steps) // 5))
    low, high = (math.log10(max(loss, 1e-9)) for loss in (min(losses), max(losses)))
    y_ticks = [10.0 ** power for power in range(math.floor(low), math.floor(high) + 2)]
    chart(path, lines, "steps", x_ticks, y_ticks, lambda y: math.log10(max(y, 1e-9)))
