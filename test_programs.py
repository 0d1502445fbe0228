"""The programs as a user runs them: data, training, evaluation, kills, own data. Takes minutes.

KILLS=100 python -m pytest test_programs.py -k "kill or interrupted", for more random moments.
"""
import contextlib
import fcntl
import io
import itertools
import json
import os
import pickle
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import common
import data
import evaluate
import mil_data
import sim
import train
from conftest import HERE, random_demos, run, small_model, started

os.environ["OMP_NUM_THREADS"] = "1"  # of programs; sums depend on it
KILLS = int(os.environ.get("KILLS", 2))  # of each program
COUNTS = {"train": 2, "val": 2, "test": 2}
TINY = ("--batch 4 --support 2 --query 1 --samples 1 --steps 60 --lr 3e-3 --validate-every 20 "
        "--validation-batches 1 --snapshots 3").split()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pushes(tmp_path_factory):
    """A data set of the benchmark, made by two workers."""
    folder = tmp_path_factory.mktemp("pushes")
    data.generate(folder, COUNTS, demos=3, seed=3, workers=2)
    return folder


def own_tasks(shift=(0, 0), factor=1000):
    """Tasks that can be learned: actions are states in other units, two states are shifted."""
    tasks = random_demos([40] * 4, H=32, W=32, train=4, val=2)
    for demo in (demo for split in tasks.values() for task in split for demo in task):
        demo["actions"] = factor * demo["states"][:, :7]
        demo["states"][:, 3:5] += shift
    return tasks


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    data.write_data_set(folder, own_tasks(), sim.MIRROR, recolour=True, pairs=True)
    return folder


@pytest.fixture(scope="session")
def trained(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run("train.py", *TINY, "--data", own, "--name", "whole", cwd=folder)
    return folder / "runs" / "whole"


@pytest.fixture(scope="session")
def saving(tmp_path_factory):
    """train.py, but with a checkpoint after every step."""
    path = tmp_path_factory.mktemp("saving") / "train.py"
    path.write_text(f"import sys\nsys.path[0] = {str(HERE)!r}\nimport train\n"
                    "train.CHECKPOINT_SECONDS = 0\ntrain.run_program(train.main)\n")
    return path


def call(module, *words):
    """A program in this process."""
    with mock.patch.object(sys, "argv", [module.__file__, *map(str, words)]):
        module.main()


def begin(folder, name, *words, until=None):
    """A training run in this process, in the current folder, to its end or killed after a step."""
    path = Path("runs", name)
    path.mkdir(parents=True, exist_ok=True)
    job = train.start(path, train.parse([*TINY, "--data", str(folder), *map(str, words)]))
    job.loader = itertools.islice(job.loader, until and until - job.step)
    with contextlib.suppress(StopIteration):
        job.train()
        return job
    job.save("last.pt")
    return job


def load(path):
    return train.load_checkpoint(path.read_bytes(), path)


def same_weights(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def assert_same_run(one, other):
    one, other = load(one / "last.pt"), load(other / "last.pt")
    logs = [[{**row, "seconds": 0} for row in content["log"]] for content in (one, other)]
    assert logs[0] == logs[1] and same_weights(one, other)


def contents(folder):
    """Its files, without what a kill has left unfinished."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".unfinished"}


def written(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, process):
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def kill_often(marks, *words, numbers=KILLS * [signal.SIGKILL], **settings):
    """Stop a program by signals, soon after `marks()` has changed; yields after each.

    In the end, or when its work is done, the program may end.
    """
    rng = np.random.default_rng(0)
    for number in numbers:
        before = marks()
        with started(*words, stderr=subprocess.DEVNULL, **settings) as process:
            wait_for(lambda: marks() != before or process.poll() is not None, process)
            time.sleep(rng.uniform(0, 0.2))
            if process.poll() is not None:
                break
            process.send_signal(number)
            assert process.wait(20) in (-signal.SIGKILL, 128 + number)
        yield
    run(*words, **settings)


def flipped(content, count):
    """A file's content with one bit changed, `count` times."""
    for bit in np.random.default_rng(0).integers(8 * len(content), size=count).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


# Common ---------------------------------------------------------------------------------------

def test_a_failing_disk_is_one_line():
    _, complaint = run("data.py", "--out", "/proc/none", code=2)
    assert complaint.splitlines()[-1].startswith("data.py: ") and "/proc/none" in complaint
    assert "Traceback" not in complaint


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    monkeypatch.setattr(common, "_last_line", -60)
    for second in range(130):
        with mock.patch.object(common.time, "monotonic", return_value=second):
            common.progress(f"second {second}")
    common.progress("the end", end=True)
    assert capsys.readouterr().err.split("\n") == ["second 0", "second 60", "second 120",
                                                   "the end", ""]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    common.write_json(tmp_path / "a.json", 1)
    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(tmp_path / "a.json", write)
    assert contents(tmp_path) == {"a.json": b"1"} and len(list(tmp_path.iterdir())) == 1


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(path):
    raise ZeroDivisionError(path.name)


@pytest.mark.parametrize("make, error, message", [
    (die, common.UserError, "lack of memory"), (fail, ZeroDivisionError, "a.json")])
def test_a_failing_worker_is_named_with_its_cause(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        common.make_files(make, [(tmp_path / "a.json",)], workers=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(number, tmp_path):
    """At once, and Ctrl-C, which a terminal sends to all of them, without a word."""
    def made():
        return written(tmp_path, "*/*.npz")

    def ended():
        return all(not path.exists() or not path.read_bytes() for path in workers)  # or a zombie

    with started(HERE / "data.py", "--out", tmp_path, "--workers", 2, "--demos", 3,
                 stderr=subprocess.PIPE) as process:
        wait_for(made, process)
        workers = [Path(f"/proc/{pid}/cmdline") for pid in children(process.pid)]
        assert len(workers) > 1 and not ended()
        send = os.killpg if number == signal.SIGINT else os.kill
        send(process.pid, number)
        before, complaint = made(), process.communicate(timeout=10)[1]
        assert process.returncode in (-signal.SIGKILL, 128 + number)
        time.sleep(1)
        assert ended() and made() == before and "Traceback" not in complaint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_written(number, tmp_path):
    """It has the exit code of a signal, and the file that was there stays the only one."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"as before")
    program = f"""
import io, os, common, torch
class Interrupted(io.BytesIO):
    def write(self, content):
        if self.tell():
            os.kill(os.getpid(), {number.value})
        return super().write(content)
def main():
    common.write_atomically({str(path)!r}, lambda _: torch.save(torch.zeros(9), Interrupted()))
common.run_program(main)"""
    with started("-c", program, cwd=HERE, stderr=subprocess.PIPE) as process:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 128 + number
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"as before"


# Data -----------------------------------------------------------------------------------------

def test_demonstrations(pushes):
    tasks, env = data.TaskSet(pushes, "train"), sim.PushEnv()
    demo = sim.record_demo(env, sim.make_task("train", 1), 2, seed=3)
    at = 1, 2, np.arange(sim.HORIZON)
    assert (tasks.frames(*at) == demo["frames"]).all()
    assert (tasks.states[tasks.row(*at)] == demo["states"]).all()
    assert (tasks.actions[tasks.row(*at)] == demo["actions"]).all()


def test_data_after_kills_by_shards_and_extended(pushes, tmp_path):
    """The bytes of two undisturbed workers; no finished task is made again."""
    def marks():
        return written(tmp_path, "*/*.npz")

    finished, job = {}, (tmp_path, COUNTS, 3, 3, 2)
    words = "--demos 3 --seed 3 --workers 1 --train 2 --val 1 --test 0".split()
    for _ in kill_often(marks, HERE / "data.py", "--out", tmp_path, *words):
        assert finished.items() < marks().items()
        finished = marks()
    assert finished and len(marks()) == 3
    assert data.generate(*job, shard=(0, 2)) == 2
    assert data.generate(*job, shard=(1, 2)) == 0
    data.generate(tmp_path, {"train": 1, "val": 1}, 3, 3)  # fewer than there are
    assert finished.items() < marks().items()
    assert contents(tmp_path) == contents(pushes)
    with pytest.raises(common.UserError, match=r"other settings \(demos\)"):
        data.generate(tmp_path, COUNTS, 4, 3)


def test_data_of_many_looks(pushes, tmp_path):
    """The states and actions are those of one look."""
    data.generate(tmp_path, {"train": 1}, 3, 3, looks="random")
    many, one = data.TaskSet(tmp_path, "train"), data.TaskSet(pushes, "train", 1)
    assert (many.states == one.states).all() and (many.actions == one.actions).all()
    assert many.manifest["mirror"] and not many.manifest["recolour"]
    assert len(np.unique(many.ends[0, :, 0, -1, 0], axis=0)) == 3  # colours of a corner
    data.generate(tmp_path / "again", {"train": 1}, 3, 3, looks="random")
    assert (data.TaskSet(tmp_path / "again", "train").ends == many.ends).all()
    with pytest.raises(common.UserError, match=r"settings \(recolour, looks\)"):
        data.generate(tmp_path, {"train": 1}, 3, 3)


def test_data_of_an_older_program(tmp_path):
    common.write_json(tmp_path / "manifest.json", {"format": 3})
    with pytest.raises(common.UserError, match="format 3.* anew"):
        data.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["00001.npz", "00001.frames"])
def test_flipped_bits_in_data(name, own, tmp_path):
    """They give an error or change nothing."""
    def read():
        tasks = data.TaskSet(tmp_path / "d", "val")
        return tasks.states, tasks.actions, tasks.frames(*np.ogrid[:2, :4, :40])

    shutil.copytree(own, tmp_path / "d")
    path, expected, refused = tmp_path / "d" / "val" / name, read(), 0
    for content in flipped(path.read_bytes(), 20):
        path.write_bytes(content)
        try:
            found = read()
        except common.UserError as error:
            refused += "damaged" in str(error)
        else:
            assert all(map(np.array_equal, found, expected))
    assert refused > 10


# MIL's data -----------------------------------------------------------------------------------

class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which a reader decodes as latin-1."""
    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def test_import_of_mil(tmp_path, monkeypatch):
    """Python 2's pickles, GIFs with merged frames; other tasks than pushing are refused."""
    monkeypatch.chdir(tmp_path)
    rng, states = np.random.default_rng(0), {}
    frames = rng.integers(0, 256, (100, 5, 5, 1), np.uint8)
    frames = frames.repeat(25, 1).repeat(25, 2).repeat(3, 3)
    frames[40:44] = frames[40]
    first, *rest = map(Image.fromarray, frames)
    first.save("film.gif", save_all=True, append_images=rest, duration=50)
    assert Image.open("film.gif").n_frames == 97
    for stem in ("push/demos_3", "push/demos_10", "push/demos_4", "push_test/0", *(
            f"whole/demos_{index}" for index in range(4))):
        path = tmp_path / "mil" / f"{stem}.pkl"
        films = path.parent / f"object_{path.stem.removeprefix('demos_')}"
        films.mkdir(parents=True)
        for i in range(6, 18):
            os.link("film.gif", films / f"cond{i}.samp0.gif")
        states[stem], file = rng.normal(size=(24, 100, 20)), io.BytesIO()
        Python2Pickler(file, 2).dump({b"demoX": states[stem], b"demoU": rng.random((24, 100, 7)),
                                      b"xml": b"pusher\xe9.xml"})
        path.write_bytes(file.getvalue().replace(b"numpy._core", b"numpy.core"))
    run("mil_data.py", "mil/push", "mil/push_test", "--out", "d", "--val", 1)
    tasks, at = data.TaskSet("d", "train"), (1, 3, np.arange(100))
    assert data.read_manifest("d")["tasks"] == {"train": 2, "val": 1, "test": 1}
    expected = states["push/demos_4"][6 + 3].astype(np.float32)
    assert (tasks.states[tasks.row(*at)] == expected).all()
    assert (tasks.frames(*at) == frames).all()
    assert not tasks.manifest["pairs"]
    begin("d", "mil", "--batch", 2, until=1)
    mil_data.import_mil("mil/whole", "mil/push_test", "paired", val=1)
    manifest = data.read_manifest("paired")
    assert manifest["pairs"] and manifest["tasks"] == {"train": 2, "val": 2, "test": 1}
    reach = {"demoX": np.zeros((24, 50, 10)), "demoU": np.zeros((24, 50, 2))}
    Path("mil/push/demos_4.pkl").write_bytes(pickle.dumps(reach, 2))
    with pytest.raises(common.UserError, match="demos_4.pkl is not of pushing"):
        mil_data.import_mil("mil/push", "mil/push_test", "again", val=1)


class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


def test_a_malicious_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("0.pkl").write_bytes(pickle.dumps({"demoX": Malice()}))
    with pytest.raises(pickle.UnpicklingError, match="posix.system is not admitted"):
        mil_data.read_pickle("0.pkl")
    assert not Path("malice").exists()


# Training -------------------------------------------------------------------------------------

def test_what_a_run_leaves(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {".lock", "curves.png", "last.pt", "log.jsonl",
                     "step-20.pt", "step-40.pt", "step-60.pt"}
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert log[0]["machine"] == train.machine()
    first, last = (row["loss_q"] for row in log if "loss_q" in row)
    assert last < 0.2 < first
    assert len(Image.open(trained / "curves.png").getcolors(2 ** 24)) > 3
    kept, last = load(trained / "step-60.pt"), load(trained / "last.pt")
    assert same_weights(kept, last) and not same_weights(kept, load(trained / "step-40.pt"))
    assert "optimiser" not in kept and last["log"] == log


def test_interrupted_training_equals_uninterrupted(saving, own, trained, tmp_path, monkeypatch):
    """Signals and kills; one command begins the run and goes on with it."""
    folder, steps = tmp_path / "runs" / "cut", [0]
    words = saving, *TINY, "--data", own, "--name", "cut", "--resume"
    numbers = [signal.SIGTERM, signal.SIGINT] + KILLS * [signal.SIGKILL]
    for _ in kill_often(lambda: written(folder, "last.pt"), *words, numbers=numbers, cwd=tmp_path):
        steps.append(load(folder / "last.pt")["step"])
    assert steps == sorted(set(steps)) and 0 < steps[1] < 60
    assert_same_run(folder, trained)
    finished = contents(folder)
    monkeypatch.chdir(tmp_path)
    begin(own, "cut", "--resume")
    assert contents(folder) == finished


@pytest.mark.parametrize("method", ["contextual", "lstm", "mil"])
def test_an_interrupted_baseline_goes_on(method, own, tmp_path, monkeypatch):
    """The data may have moved."""
    monkeypatch.chdir(tmp_path)
    words = "--method", method, "--steps", 12
    begin(own, "whole", *words)
    begin(own, "cut", *words, until=5)
    shutil.copytree(own, "moved")
    begin("moved", "cut", *words, "--resume")
    assert_same_run(Path("runs/cut"), Path("runs/whole"))


def test_going_on_otherwise(own, pushes, tmp_path, monkeypatch, capsys):
    """Other threads are said and logged; other options, data or a second process are refused."""
    monkeypatch.chdir(tmp_path)
    begin(own, "a", until=2)
    data.write_data_set("new", own_tasks(factor=999), sim.MIRROR, recolour=True, pairs=True)
    shutil.copytree(pushes, "pushes")
    for words, message in (([], "holds a run"), (["--resume", "--lr", 1], "another --lr"),
                           (["--resume", "--data", "data/push"], "no manifest"),
                           (["--resume", "--data", "pushes"], "not the data"),
                           (["--resume", "--data", "new"], "not the data")):
        with pytest.raises(common.UserError, match=message):
            begin(own, "a", *words)
    begin(own, "a", "--resume", until=2)
    assert "other numbers" not in capsys.readouterr().out
    torch.set_num_threads(2)
    log = begin(own, "a", "--resume", until=2).log
    assert log[-1] == {"step": 2, "machine": train.machine()}
    printed = capsys.readouterr().out
    assert "goes on to other numbers" in printed and printed.endswith("threads 2, not 1\n")
    with open("runs/a/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(common.UserError, match="another process"):
            call(train, "--name", "a", "--resume")
    assert contents(Path("pushes")) == contents(pushes)  # left alone


def test_two_processes_equal_one(saving, own, tmp_path, monkeypatch):
    """Up to rounding, killed under torchrun, gone on with by RANK and WORLD_SIZE alone."""
    monkeypatch.chdir(tmp_path)
    words = "--steps", 20, "--bfloat16", 0
    begin(own, "one", *words)
    words = saving, *TINY, "--data", own, *words, "--name", "two", "--resume"
    folder = tmp_path / "runs" / "two"
    with started("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *words,
                 stderr=subprocess.DEVNULL) as process:
        wait_for((folder / "last.pt").exists, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(60) == 1
    assert load(folder / "last.pt")["step"] < 20
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = [{**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "localhost",
              "MASTER_PORT": port} for rank in range(2)]
    with started(*words, env=ranks[1], stdout=subprocess.PIPE) as other:
        printed, _ = run(*words, env=ranks[0])
        assert other.communicate(timeout=60)[0] == "" and other.returncode == 0
    assert "other numbers" not in printed
    one, two = (load(Path("runs", name, "last.pt")) for name in ("one", "two"))
    for name, values in one["model"].items():
        assert (two["model"][name] - values).norm() <= 1e-5 * values.norm()
    for row, other in zip(one["log"][1:], two["log"][1:], strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-4)


@pytest.mark.parametrize("method", train.METHODS)
def test_validation_tells_whether_demonstrations_count(method, own):
    """By the loss after the partner's; to a network that ignores them it is the same.

    Dropout is for training only.
    """
    network, settings, _ = train.METHODS[method]
    model = small_model(network, settings, size=32)
    embed = model.embed
    model.embed = lambda frames: torch.dropout(embed(frames), 0.5, model.training)
    loader = data.TaskLoader(data.TaskSet(own, "train"), 4, K=1, random_support=False,
                             pairs=True, demo_frames=model.settings.demo_frames)
    options = {"validation_batches": 1, "device": "cpu"}
    values, batch = train.validate(model, loader, options), train.to_tensors(loader.batch(0), "cpu")
    assert model.training
    context = model.eval().embed(batch["frames_U"])
    images, states, actions = (batch[name][:, 1] for name in ("images", "states", "actions"))
    for name, given in (("val_loss_q", context), ("val_loss_partner", context[[1, 0, 3, 2]])):
        error = model.predict(images, states, given) - actions
        assert values[name] == pytest.approx(error.square().mean().item(), rel=1e-9)
    assert values["val_loss_q"] != values["val_loss_partner"]
    assert values["val_loss_constant"] == pytest.approx(actions.numpy().var((0, 1)).mean())
    model.embed = lambda frames: context[0].expand(*frames.shape[:-5], *context.shape[1:])
    values = train.validate(model, loader, options)
    assert values["val_loss_q"] == values["val_loss_partner"]


def test_help_names_the_defaults_that_are_values():
    printed, _ = run("train.py", "--help")
    assert "(default: 16)" in printed and "None" not in printed and "True" not in printed


def test_validation_retrieves_by_the_queries_of_the_loss(own):
    """Those of the official code are raw: a long one hides the other task's."""
    model = small_model(size=32, normalise_queries=False, negatives="queries")
    embeddings, factors = model.embeddings, torch.tensor([1, 100])[:, None, None]
    model.embeddings = lambda frames, chunk=None: factors * embeddings(frames, chunk)
    loader = data.TaskLoader(data.TaskSet(own, "val"), 2, K=1)
    values = train.validate(model, loader, {"validation_batches": 1, "device": "cpu"})
    batch = train.to_tensors(loader.batch(0), "cpu")
    assert values["val_accuracy"] == model.losses(batch)["accuracy"]


def test_schedules_of_the_learning_rate(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = {}
    for schedule in ("constant", "hold", "one-cycle"):
        job = begin(own, schedule, "--schedule", schedule, "--lr", 0.5, until=0)
        rates[schedule] = []
        for _ in range(60):
            rates[schedule] += job.scheduler.get_last_lr()
            job.optimiser.step()
            job.scheduler.step()
    assert rates["constant"] == [0.5] * 60
    falling = [0.5 * left / 12 for left in range(12, 0, -1)]
    assert rates["hold"] == pytest.approx([0.5] * 48 + falling)
    assert rates["one-cycle"][0] == pytest.approx(0.5 / 25)
    assert rates["one-cycle"][6] == pytest.approx(0.5, rel=0.01) and rates["one-cycle"][-1] < 0.001


def test_fine_tuning(own, trained, tmp_path, monkeypatch, capsys):
    """--init takes the weights; statistics are the new data's, and what differs is named."""
    monkeypatch.chdir(tmp_path)
    data.write_data_set("new", own_tasks(shift=(6, 2)), sim.MIRROR, recolour=True, pairs=True)
    capsys.readouterr()
    model = begin("new", "tuned", "--init", trained / "last.pt", "--margin", 0.2, until=0).model
    assert capsys.readouterr().out.endswith(
        "; it was trained with margin 0.1; more than 10 old deviations away: state 3\n")
    weights = load(trained / "last.pt")["model"]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    statistics = data.TaskSet("new", "train").statistics()
    assert all((model.get_buffer(name).numpy() == statistics[name]).all() for name in statistics)
    # Without mirrored batches their mirror images do not count:
    plain = begin("new", "plain", "--mirror", 0, until=0).model
    statistics = data.TaskSet("new", "train").statistics(mirrored=False)
    assert all((plain.get_buffer(name).numpy() == statistics[name]).all() for name in statistics)
    with pytest.raises(common.UserError, match="other sizes"):
        begin("new", "other", "--init", trained / "last.pt", "--filters", 4)


class Counting(baselines.Contextual):
    """A method with a buffer of its own."""
    def __init__(self, settings, **statistics):
        super().__init__(settings, **statistics)
        self.register_buffer("count", torch.zeros(()))


def test_fine_tuning_keeps_a_methods_own_buffers(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.METHODS, "contextual", (Counting, baselines.Settings, {}))
    job = begin(own, "one", "--method", "contextual", until=0)
    job.model.count.fill_(5)
    job.save("last.pt")
    words = "--method", "contextual", "--init", "runs/one/last.pt"
    assert begin(own, "two", *words, until=0).model.count == 5


def test_flipped_bits_in_a_checkpoint(trained):
    """They give an error or change nothing; what torch.save saves again is as good."""
    content, expected, refused = (trained / "step-60.pt").read_bytes(), load(trained / "last.pt"), 0
    for damaged in (*flipped(content, 40), content[:-1], b""):
        try:
            found = train.load_checkpoint(damaged, "damaged.pt")
        except common.UserError as error:
            refused += "damaged" in str(error)
        else:
            assert same_weights(found, expected)
    assert refused > 30
    again = io.BytesIO()
    torch.save(torch.load(trained / "step-60.pt", weights_only=True), again)
    model, _ = train.load_model(again.getvalue())
    assert same_weights({"model": model.state_dict()}, expected)


def test_a_loss_that_is_not_finite_stops_the_run(own, tmp_path):
    words = "--data", own, "--lr", 1e30, "--schedule", "constant"
    _, complaint = run("train.py", *TINY, *words, cwd=tmp_path, code=2)
    assert complaint.count("\n") == 1 and "not finite" in complaint


def test_settings_are_options(own, tmp_path, monkeypatch, capsys):
    """Those that a method lacks are refused."""
    monkeypatch.chdir(tmp_path)
    model = begin(own, "a", "--filters", 4, "--embedding-dim", 5, "--margin", 0.2, until=0).model
    assert model.embedding_net.convolutions[0].out_channels == 4
    assert model.embed(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8)).shape == (5,)
    assert model.settings.margin == 0.2
    model = begin(own, "b", "--method", "mil", "--inner-lr", 0.5, until=0).model
    assert model.settings.inner_lr == 0.5
    with pytest.raises(SystemExit, match="2"):
        train.parse(["--method", "mil", "--margin", "0.2"])
    assert "--margin" in capsys.readouterr().err


def test_own_data_need_no_simulator(tmp_path):
    """Demonstrations of unlike lengths and wide pictures; five files, without requirements.txt."""
    for name in ("common", "data", "tecnets", "baselines", "train"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    tasks = random_demos([5, 9, 7], H=20, W=32, S=5, A=3, train=4, val=2)
    data.write_data_set(tmp_path / "d", tasks)
    run(tmp_path / "train.py", *TINY, "--data", "d", "--steps", 2, cwd=tmp_path)
    content = (tmp_path / "runs" / "ours" / "last.pt").read_bytes()
    c = train.load_model(content)[0].settings
    assert (c.image_height, c.image_width, c.state_dim, c.action_dim) == (20, 32, 5, 3)


def test_missing_data_are_made(pushes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"tasks": {"train": 2, "val": 1}, "demos": 3, "seed": 3}
    monkeypatch.setitem(train.MADE_DATA, "data/push", sizes)
    begin("data/push", "a", "--batch", 2, until=1)
    made = contents(Path("data/push"))
    assert json.loads(made.pop("manifest.json"))["tasks"] == sizes["tasks"]
    assert len(made) == 6 and made.items() < contents(pushes).items()


# Evaluation -----------------------------------------------------------------------------------

EVALUATION = dict(policy="tecnets", split="test", trials=1, seed=0, redraw=True,
                  film_failures=False, look="default", demo_look="default")


def trials(folder):
    results = json.loads(Path(folder, "results.json").read_text())["results"]
    return [row for result in results for row in result["trials"]]


def row_of(folder, index, shots, **changes):
    """The row of one trial, tried in this process."""
    path = Path(folder, "trials", f"{index}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluate.try_task(path, {**EVALUATION, **changes}, index, shots,
                      evaluate.SHIPPED.read_bytes(), bool(shots))
    return json.loads(path.read_text())["trials"][0]


def test_killed_evaluation_equals_uninterrupted(tmp_path):
    """Rows and films, with one worker and with two; no finished task is tried again."""
    def marks():
        return written(tmp_path, "cut/trials/*.json")

    words = HERE / "evaluate.py", *"--tasks 2 --trials 1 --shots 1 2 --gif 1 --out".split()
    finished = {}
    for _ in kill_often(marks, *words, tmp_path / "cut", "--workers", 1):
        assert finished.items() < marks().items()
        finished = marks()
    run(*words, tmp_path / "whole", "--workers", 2)
    assert finished and finished.items() <= marks().items()
    rows = trials(tmp_path / "whole")
    assert trials(tmp_path / "cut") == rows
    assert [row["shots"] for row in rows] == [1, 1, 2, 2]
    films = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.gif")}
             for name in ("cut", "whole")]
    assert films[0] == films[1] and set(films[0]) == {"task00-shots1.gif", "task00-shots2.gif"}


def test_shards_chosen_tasks_and_filmed_failures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--policy", "random", "--trials", 1, "--workers", 1
    three = *words, "--tasks", 3, "--out"
    call(evaluate, *three, "one")
    call(evaluate, *three, "shared", "--shard", "0/2")
    assert not Path("shared/results.json").exists()
    with mock.patch.dict(os.environ, RANK="1", WORLD_SIZE="2"):
        call(evaluate, *three, "shared")
    assert trials("shared") == trials("one")
    call(evaluate, *words, "--only", 2, 0, "--film-failures", "--out", "some")
    some = trials("some")
    assert some == [row for row in trials("one") if row["task"] != 1]
    failing = {f"task{row['task']:02d}-shots0-trial0.gif" for row in some if not row["success"]}
    assert failing and {path.name for path in Path("some").glob("*.gif")} == failing
    assert Image.open(Path("some", failing.pop())).n_frames > 10
    with pytest.raises(common.UserError, match=r"other settings \(seed\)"):
        call(evaluate, *three, "one", "--seed", 1)
    with pytest.raises(SystemExit, match="2"):
        call(evaluate, *three, "one", "--shard", "2/2")


def test_redrawn_demonstrations():
    """Other ones for every trial, whose seeds are not those of the published draw."""
    def draws(redraw, trial):
        evaluation = {**EVALUATION, "redraw": redraw}
        return [evaluate.choose_demos(evaluation, task, trial, 5) for task in range(74)]

    published, first, second = draws(False, 0), draws(True, 0), draws(True, 1)
    assert published == draws(False, 1)
    for one, other in ((published, first), (first, second)):
        assert sum(map(list.__eq__, one, other)) == 0
    assert all(len(set(numbers)) == 5 and max(numbers) < 12 for numbers in first)


def test_trials_in_another_look(tmp_path):
    """A purple table, in the demonstration only if it is not said to be grey."""
    words = "--tasks 1 --trials 1 --shots 1 --gif 1 --workers 1 --look table --out".split()
    call(evaluate, *words, tmp_path / "a")
    call(evaluate, *words, tmp_path / "b", "--demo-look", "default")
    for name, demo in (("a", True), ("b", False)):
        film = Image.open(tmp_path / name / "task00-shots1.gif").convert("RGB")
        purple = [red > 1.2 * green for red, green, _ in map(film.getpixel, ((9, 240), (259, 240)))]
        assert purple == [demo, True]


def test_policies_without_demonstrations(tmp_path):
    assert row_of(tmp_path, 0, 0, policy="expert")["success"]
    assert not row_of(tmp_path, 0, 0, policy="random")["success"]
    model, _ = train.load_model(evaluate.SHIPPED.read_bytes())

    def policy(obs):
        image, state = torch.from_numpy(obs["image"]), torch.from_numpy(obs["state"])
        return model.act(image, state, torch.zeros(20)).numpy()

    scene = int(np.random.default_rng([0, 2, 0, 0]).integers(2 ** 31))  # seed, test, pair, trial
    options = {"task": sim.make_task("test", 1), "swap": True}
    info = evaluate.rollout(sim.PushEnv(), policy, scene, options)
    row = row_of(tmp_path, 1, 0, policy="no-demo")
    assert row["final_distance"] == round(info["distance"], 5)


class Robot:
    """An environment of one's own, of two steps."""
    obs = {"image": np.zeros((125, 125, 3), np.uint8), "state": np.zeros(20, np.float32)}

    def reset(self, seed, options):
        self.actions = []
        return self.obs, {}

    def step(self, action):
        self.actions.append(action.shape)
        return self.obs, 0.0, len(self.actions) == 2, False, {"actions": self.actions}


def test_a_network_of_other_data(tmp_path):
    """It is not scored on the benchmark, though its sizes agree; rollout takes it anywhere."""
    content = torch.load(evaluate.SHIPPED, weights_only=True)
    content["data"]["benchmark"] = None
    torch.save(content, tmp_path / "own.pt")
    with pytest.raises(common.UserError, match="not trained on this benchmark"):
        call(evaluate, "--checkpoint", tmp_path / "own.pt", "--tasks", 1)
    model, _ = train.load_model((tmp_path / "own.pt").read_bytes())
    bodies, env = sim.make_task("val", 0), sim.PushEnv()
    task = sim.Task("mine", 0, bodies.target, bodies.distractor)
    policy = evaluate.policy_of(model, [sim.record_demo(env, task, 0, seed=0)])
    assert evaluate.rollout(env, policy, seed=0, options={"task": task})["success"]
    assert evaluate.rollout(Robot(), policy)["actions"] == [(7,), (7,)]


def test_the_shipped_weights_from_any_folder(tmp_path):
    """And with tecnets.py alone."""
    run("evaluate.py", *"--only 0 --trials 1 --shots 1".split(), cwd=tmp_path)
    assert len(trials(tmp_path / "runs" / "evaluation")) == 1
    for path in (HERE / "tecnets.py", evaluate.SHIPPED):
        shutil.copy(path, tmp_path)
    (tmp_path / "alone.py").write_text("""
import torch
from tecnets import Settings, TecNets
content = torch.load("weights.pt", weights_only=True)
model = TecNets(Settings(**content["settings"]))
model.load_state_dict(content["model"])
print(model.embed(torch.ones(1, 2, 125, 125, 3, dtype=torch.uint8)).norm().item())
""")
    printed, _ = run(tmp_path / "alone.py", cwd=tmp_path)
    assert float(printed) == pytest.approx(1, abs=1e-5)


# Tools ----------------------------------------------------------------------------------------

NOTEBOOK = f"""
import io, runpy, sys
sys.path[0], sys.stdout, sys.stderr = {str(HERE)!r}, io.StringIO(), io.StringIO()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("words", [["-m", "cProfile", "-o", os.devnull, HERE / "data.py"],
                                   ["-OO", "link.py"], ["-c", NOTEBOOK, HERE / "data.py"]])
def test_profilers_optimisation_links_and_notebooks(words, tmp_path):
    """Workers find their functions all the same."""
    os.symlink(HERE / "data.py", tmp_path / "link.py")
    words += "--out d --train 1 --val 0 --test 0 --demos 1 --workers 1".split()
    with started(*words, cwd=tmp_path) as process:
        assert process.wait(60) == 0
    assert len(written(tmp_path, "d/train/*")) == 2


# Results --------------------------------------------------------------------------------------

def test_tables_are_those_of_the_rows(tmp_path):
    program = runpy.run_path(str(HERE / "results" / "readme.py"))
    for path, text in program["filled"]().items():
        assert path.read_text() == text, path
    report = json.loads((HERE / "results" / "expert" / "results.json").read_text())
    report["results"][0]["trials"][0]["success"] ^= True
    common.write_json(tmp_path / "results.json", report)
    with pytest.raises(SystemExit, match="other figures"):
        program["load"](tmp_path)
    report = json.loads((HERE / "results" / "expert" / "results.json").read_text())
    report["evaluation"]["look"] = "table"
    common.write_json(tmp_path / "expert" / "results.json", report)
    program["evaluations"].__globals__["HERE"] = tmp_path
    with pytest.raises(SystemExit, match="expert has other trials"):
        program["evaluations"]("expert")


def test_embedding_map(tmp_path):
    """Retrieval and nearness are those of a plain loop; pictures of noise look nearly alike."""
    folder = tmp_path / "data" / "push"
    data.write_data_set(folder, random_demos([2] * 4, H=125, W=125, train=2, val=1, test=3))
    run("results/embedding_map.py", "--out", "map.png", cwd=tmp_path)
    figures = json.loads((tmp_path / "map.png.json").read_text())
    tests, trains = data.TaskSet(folder, "test"), data.TaskSet(folder, "train")
    model, _ = train.load_model(evaluate.SHIPPED.read_bytes())

    def s(task_set, task, demos):
        return model.embed(torch.from_numpy(task_set.ends[task, demos])).detach()

    found, every = [], [0, 1, 2, 3]
    for task, demo in np.ndindex(3, 4):
        demos = {i: [d for d in every if (i, d) != (task, demo)] for i in range(3)}
        near = [s(tests, task, [demo]) @ s(tests, i, demos[i]) for i in demos]
        found.append(np.argmax(near) == task)
    assert figures["retrieval"] == pytest.approx(np.mean(found)) and not all(found)
    for task, nearness in enumerate(figures["nearest_similarity"]):
        near = max(s(tests, task, every) @ s(trains, i, every) for i in range(2))
        assert nearness == pytest.approx(near.item(), abs=1e-5)
    assert len(Image.open(tmp_path / "map.png").getcolors(2 ** 24)) > 100


def test_margins_of_look_alikes(monkeypatch):
    """They are those of a plain loop; tasks 0 and 1, 2 and 3 are partners."""
    monkeypatch.syspath_prepend(HERE / "results")
    from look_alikes import margins
    model, _ = train.load_model(evaluate.SHIPPED.read_bytes())
    ends = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 125, 125, 3), np.uint8)
    with torch.no_grad():
        for (task, demo), margin in np.ndenumerate(margins(model, ends)):
            own, partner = np.delete(ends[task], demo, axis=0), ends[task ^ 1]
            s, s_own, s_partner = (model.embed(torch.from_numpy(demos))
                                   for demos in (ends[task, [demo]], own, partner))
            assert margin == pytest.approx((s @ (s_own - s_partner)).item(), abs=1e-5)


def test_defaults_are_those_of_the_shipped_weights():
    report = json.loads((HERE / "results" / "seed2" / "test" / "results.json").read_text())
    trained = report["network"]["options"]
    changed = {name for name, value in train.parse([]).items()
               if value not in (None, trained[name])}
    assert changed - {*train.CHANGEABLE} == {"seed", "snapshots"}, changed
