"""What the programs share and no method needs: one-line errors, argument types, progress, workers, safe files."""
import argparse
import contextlib
import fcntl
import hashlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

TEMPORARY = ".unfinished"  # ends the names of files that are being written


class UserError(Exception):
    """A mistake that one line can tell a user how to mend."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated options and reports an error in one line, with exit code 2."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        fail(f"{message} (see --help)")


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def command(main):
    """Run a command-line program: a UserError or a failing disk is one line and exit code 2.

    Ctrl-C and SIGTERM end it and its workers at once; what was done is on the disk.
    """
    signal.signal(signal.SIGTERM, lambda signal_number, _: sys.exit(128 + signal_number))
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
    except MemoryError:
        fail("not enough memory: take less at a time (see --help)")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def number(kind, low, high=1e9):
    """An argparse type: a number of a kind within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def choice(*words):
    """An argparse type: one of some words."""
    def parse(text):
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(words)}")
        return text
    return parse


def progress(line, end=False):
    """Show a line in place of the last one, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\n" if end else "", file=sys.stderr, flush=True)


def cores():
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(function, jobs, workers, initializer=None, initargs=()):
    """Yield `function(*job)` for all jobs as they finish, in fresh processes that end with this one.

    Raises UserError if a process dies, as it does for lack of memory.
    """
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # inherited: a core for every process
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(workers, len(jobs))), context, _start_worker, (initializer, initargs))
    try:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C reaches all, this process decides
        futures = [pool.submit(function, *job) for job in jobs]
        signal.signal(signal.SIGINT, interrupt)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for lack of memory: run the same command with fewer --workers")
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(initializer, initargs):
    def follow():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
    if initializer:
        initializer(*initargs)


@contextlib.contextmanager
def locked(folder):
    """Make a folder and keep other processes from writing to it. Raises UserError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being written by another process: wait for it or choose another folder")
        remove_stale(folder)
        yield


def remove_stale(folder):
    """Delete the temporary files that killed processes left in a folder."""
    for stale in folder.glob("*" + TEMPORARY):
        stale.unlink(missing_ok=True)


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then give it its name."""
    temporary = Path(f"{path}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checked(path, write):
    """As write_atomically, and the SHA-256 of what was written as the last 32 bytes (zip readers skip them)."""
    buffer = io.BytesIO()
    write(buffer)
    content = buffer.getbuffer()
    write_atomically(path, lambda file: file.writelines((content, hashlib.sha256(content).digest())))


def checked(content):
    """What write_checked was given to write, of the bytes of its file. Raises ValueError if a single bit differs."""
    content = memoryview(content)
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError("checksum")
    return content[:-32]


def read_arrays(path, shapes):
    """The arrays of an npz file that write_checked wrote; `shapes` maps their names to (shape, dtype), None is any length.

    Takes no more memory than the file has bytes, whatever its headers promise. Raises ValueError, which says what is wrong.
    """
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(checked(content))) as archive:
            return {name: _read_array(archive, name, *shapes[name]) for name in shapes}
    except WrongArray as error:
        raise ValueError(f"is of another data set: {error}")
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
        raise ValueError("is damaged")


class WrongArray(Exception):
    """An intact array of another shape or type than was asked for."""


def _read_array(archive, name, shape, dtype):
    if archive.getinfo(name + ".npy").compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    with archive.open(name + ".npy") as file:
        np.lib.format.read_magic(file)
        found, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
        wanted = len(found) == len(shape) and all(n in (None, m) for n, m in zip(shape, found))
        if not wanted or found_dtype != dtype or fortran_order:
            raise WrongArray(f"{name} {found_dtype} {found}, not {dtype} {shape}")
        return np.frombuffer(file.read(), dtype).reshape(found)
