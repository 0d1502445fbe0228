"""What the programs share and no method needs: one-line errors, argument types, progress, workers, safe files."""
import argparse
import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import io
import itertools
import multiprocessing.connection
import os
import queue
import re
import secrets
import signal
import struct
import subprocess
import sys
import threading
import traceback
import zipfile
from pathlib import Path

import numpy as np

TEMPORARY = ".unfinished"  # ends the names of files that are being written
PACKAGES = ("torch", "numpy", "pillow", "pybullet", "pybullet-arm64")  # on which the numbers depend


class UserError(Exception):
    """A mistake that one line can tell a user how to mend."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated options and reports an error in one line, with exit code 2."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        fail(f"{message} (see --help)")


def fail(message):
    say(f"{Path(sys.argv[0]).name}: {message}", stream="stderr")
    raise SystemExit(2)


def say(*words, stream="stdout", **form):
    """Print to a standard stream. Where nobody reads it any more the work goes on."""
    with contextlib.suppress(OSError):
        print(*words, file=getattr(sys, stream), flush=True, **form)


def command(main, less="take less at a time"):
    """Run a command-line program: a UserError, a failing disk or a lack of memory is one line and exit code 2.

    `less` says what to change for want of memory. Ctrl-C and SIGTERM end a program and its workers at once; what was
    done is on the disk. A standard stream that is closed, or whose reader has gone, ends nothing.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: no file may take its number
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.dup2(descriptor, number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a name that the terminal cannot show
    signal.signal(signal.SIGTERM, lambda signal_number, _: sys.exit(128 + signal_number))
    try:
        pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (Path(__file__).parent / "requirements.txt").read_text(), re.M))
        warn_of_packages(pinned, "requirements.txt")
        main()
    except (UserError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|bad_alloc", str(error)):
            fail(f"not enough memory: {less}")
        if re.search("(closed|reset) by peer|NCCL|gloo", str(error)):
            fail("another process of this job has ended, and with it this one: go on with --resume")
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python, too, flushes when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def installed_packages():
    """The version of every package on which the numbers depend, as manifests, checkpoints and results note it."""
    found = ((name, [*importlib.metadata.distributions(name=name)]) for name in PACKAGES)
    return {name: distributions[0].version.partition("+")[0] for name, distributions in found if distributions}


def warn_of_packages(versions, source, warned=set()):
    """Say in one line, once a package, that others are installed than those `versions` that `source` names."""
    others = {name: version for name, version in installed_packages().items()
              if versions.get(name, version) != version and name not in warned}
    warned.update(others)
    if others:
        wanted = ", ".join(f"{name} {versions[name]}, not {version}" for name, version in others.items())
        say(f"warning: numbers may differ: {source} has {wanted}, which is installed here", stream="stderr")


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


def launched():
    """(rank, number of processes, rank on this machine) as torchrun, srun and mpirun tell; (0, 1, 0) without them."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
                  ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")):
        if all(name in os.environ for name in names):
            return tuple(int(os.environ[name]) for name in names)
    return 0, 1, 0


def progress(line, end=False):
    """Show a line in place of the last one, on a terminal only."""
    if sys.stderr and sys.stderr.isatty():
        say(f"\r{line}\033[K", stream="stderr", end="\n" if end else "")


def cores():
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


WORKER = "import sys; sys.path[:] = sys.argv[2:]; import common; common.work(int(sys.argv[1]))"


def parallel(function, jobs, workers):
    """Yield `function(*job)` for all jobs as they finish, in fresh processes of one core that end with this one.

    `function` is a module's own: workers import that module and never run the calling script, which needs no guard.
    Nothing of this process changes: environment, signals, streams, other children. Raises what the function
    raises, and UserError, with the cause, if a process dies.
    """
    module = function.__module__
    if module == "__main__":
        module = Path(sys.modules[module].__file__).stem
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    jobs, processes = ((module, function.__name__, job) for job in jobs), {}
    try:
        for job in itertools.islice(jobs, max(1, workers)):
            ours, theirs = multiprocessing.Pipe()
            words = [sys.executable, "-c", WORKER, str(theirs.fileno()), *map(str, sys.path)]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for this process
            try:
                with theirs:
                    process = processes[ours] = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()])
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            ours.send(job)
        while processes:
            for connection in multiprocessing.connection.wait(list(processes)):
                process = processes[connection]
                result, error = connection.recv()
                if error:
                    raise error
                if job := next(jobs, None):
                    connection.send(job)
                else:
                    connection.close()
                    processes.pop(connection).wait()
                yield result
    except (EOFError, ConnectionError):
        code = process.wait()
        cause = f"ended with exit code {code}, its own message says why" if code >= 0 else f"was ended by signal {-code}"
        cause += ", perhaps for lack of memory: try fewer --workers" * (code == -signal.SIGKILL)
        raise UserError(f"a worker process {cause}; the same command goes on")
    finally:
        for connection, process in processes.items():
            process.kill()
            process.wait()
            connection.close()


def work(descriptor):
    """What a worker process does: the jobs that come, until its parent has no more or ends."""
    connection, jobs = multiprocessing.connection.Connection(descriptor), queue.SimpleQueue()

    def receive():
        try:
            while True:
                jobs.put(connection.recv())
        except (EOFError, ConnectionError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        module, name, job = jobs.get()
        try:
            outcome = getattr(importlib.import_module(module), name)(*job), None
        except Exception as error:
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            outcome = None, error
        connection.send(outcome)


def share(text):
    """An argparse type: I/N, the I-th of N shares of a job, I from 0 to N - 1."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1")
    return int(part), int(parts)


@contextlib.contextmanager
def locked(folder, part=0, parts=1):
    """Make a folder and keep other processes from writing to it, but for those of other parts of the same job.

    Raises UserError if one does. On a file system without locks it only warns: what a program goes on from is checked
    in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    locks = [(".lock", fcntl.LOCK_SH), (f".lock-{part}-of-{parts}", fcntl.LOCK_EX)] if parts > 1 else [(".lock", fcntl.LOCK_EX)]
    with contextlib.ExitStack() as stack:
        for file, kind in [(stack.enter_context(open(folder / name, "w")), kind) for name, kind in locks]:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is being written by another process: wait for it or choose another folder")
            except OSError as error:
                say(f"warning: {file.name} cannot be locked ({error}): see to it that no other process writes there, or "
                    "choose a folder on another disk", stream="stderr")
        for stale in folder.glob("*" + TEMPORARY) if parts == 1 else ():  # left by killed processes
            stale.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def writing(path):
    """Raises UserError, which names the file, if the disk fails within."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room or mend that, and run the same again")


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then give it its name. Raises UserError if the disk fails."""
    temporary = Path(f"{path}.{secrets.token_hex(4)}{TEMPORARY}")  # other machines may write the same
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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


def read_arrays(path, shapes, identity):
    """The arrays of an npz file that write_checked wrote; `shapes` maps their names to (shape, dtype).

    Of an array of bytes of any length, of the shape (None,), only the place is returned, a range of the file's bytes. The
    last bytes of what was written are its `identity`. Takes no more memory than the file has bytes, whatever its headers
    promise. Raises ValueError, which says what is wrong.
    """
    content = path.read_bytes()
    try:
        content = checked(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = {name: _read_array(content, archive, name, *shapes[name]) for name in shapes}
    except WrongArray as error:
        raise ValueError(f"is of another data set: {error}")
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
        raise ValueError("is damaged")
    if content[-len(identity):] != identity:
        raise ValueError("is of another data set, or of another task")
    return arrays


class WrongArray(Exception):
    """An intact array of another shape or type than was asked for."""


def _read_array(content, archive, name, shape, dtype):
    info = archive.getinfo(name + ".npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    with archive.open(name + ".npy") as file:
        np.lib.format.read_magic(file)
        found, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
        wanted = len(found) == len(shape) and all(n in (None, m) for n, m in zip(shape, found))
        if not wanted or found_dtype != dtype or fortran_order:
            raise WrongArray(f"{name} {found_dtype} {found}, not {dtype} {shape}")
        if None in shape:  # after a header of the zip file, with two parts of variable length, and one of numpy's
            start = info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26)) + file.tell()
            if found[0] != info.file_size - file.tell():
                raise ValueError("length")
            return range(start, start + found[0])
        return np.frombuffer(file.read(), dtype).reshape(found)
