"""The programs as a user runs them: data, training, evaluation, kills, own and foreign data, bad input. Takes minutes.

KILLS=100 EPISODES=10000 python -m pytest -s test_programs.py, for more of the random tests.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import pickle
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is imported: two threads that spin are slow beside workers

import numpy as np
import pytest
import torch

import baselines
import common
import data
import evaluate
import mil_data
import sim
import train
from tecnets import Settings, TecNets
from test_tecnets import batch_of, random_demos

HERE = Path(__file__).parent
COUNTS = {"train": 4, "val": 2, "test": 2}
THREADS = 2  # sums depend on their number
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
TINY = ("--batch", 4, "--support", 2, "--samples", 1, "--steps", 60, "--validate-every", 20, "--validation-batches", 1)


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def started(*words, **settings):
    """A process that is killed at the end, whatever happens, together with all that it has started.

    It gets Ctrl-C, which a job in the background ignores and would hand down.
    """
    settings = {"text": True, "env": ENVIRONMENT, **settings}
    process = subprocess.Popen([*map(str, words)], start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **settings)
    with process:  # closes its pipes
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def program(name, *words, **settings):
    """A program of this project, started."""
    return started(sys.executable, HERE / name, *words, **settings)


def run(*words, cwd, code=0, env=ENVIRONMENT, timeout=200):
    """Run a program of this project as a user does: what it printed."""
    with program(*words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, complaint = process.communicate(timeout=timeout)
    assert process.returncode == code, complaint
    return subprocess.CompletedProcess(words, code, printed, complaint)


def one_line(*words, cwd):
    """The one line with which a program that cannot do what it is asked ends."""
    line = run(*words, cwd=cwd, code=2).stderr
    assert line.count("\n") == 1, line
    return line


@pytest.fixture(scope="session")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "push"
    data.generate(folder, COUNTS, demos=4, seed=3, workers=2)
    return folder


@pytest.fixture(scope="session")
def trained(data_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run("train.py", "--data", data_set, "--name", "whole", *TINY, cwd=folder)
    return folder / "runs" / "whole"


# The simulator --------------------------------------------------------------------------------

EPISODES = int(os.environ.get("EPISODES", 30))


def body_corners(env, body, id_):
    """(V, 3) where the vertices of a body are."""
    _, vertices, _ = sim._mesh(body.mesh_id)
    scale, centre, _ = sim.body_shape(body)
    place, turn = env.client.getBasePositionAndOrientation(id_)
    return (vertices - centre) * scale @ np.reshape(env.client.getMatrixFromQuaternion(turn), (3, 3)).T + place


def random_episodes(numbers):
    """What some episodes of random actions, each held for 1, 5 or 25 steps, came to at worst; seeds are `numbers`."""
    env, memory = sim.PushEnv(render_mode=None), []
    speed = overshoot = depth = -np.inf
    lost, unsaid = set(), set()
    for number in numbers:
        rng = np.random.default_rng(number)
        obs, info = env.reset(seed=number, options={"task": sim.make_task("train", number % 800)})
        joints = [env.client.getJointInfo(env.arm, joint) for joint in range(7)]
        low, high = (np.array([joint[i] for joint in joints]) for i in (8, 9))
        for step in range(sim.HORIZON):
            if step % (1, 5, 25)[number % 3] == 0:
                action = rng.choice((-1, 1), 7) if rng.random() < 0.5 else rng.uniform(-1, 1, 7)
            obs, *_, info = env.step(action)
            assert np.isfinite(obs["state"]).all(), (number, step)
            speed, overshoot = max(speed, np.abs(env.dq).max()), max(overshoot, (low - env.q).max(), (env.q - high).max())
            for body, id_ in ((env.task.target, env.target), (env.task.distractor, env.distractor)):
                corners = body_corners(env, body, id_)
                assert np.isfinite(corners).all(), (number, step)
                if corners[:, 2].max() < 0 or np.abs(corners[:, :2]).min(0).max() > sim.TABLE_EDGE:
                    (lost if info["lost"] else unsaid).add(number)
                elif not info["lost"]:
                    depth = max(depth, -corners[:, 2].min())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    env.close()
    return {"episodes": len(numbers), "speed": speed, "overshoot": math.degrees(overshoot), "depth": depth,
            "lost": sorted(lost), "unsaid": sorted(unsaid), "memory": memory[::max(1, len(memory) // 20)] + memory[-1:]}


def test_random_actions_stay_within_physics():
    """EPISODES=10000 pytest -s -k random_actions_stay, for more of them."""
    jobs = [(range(EPISODES)[i::2],) for i in range(2)]
    for result in common.parallel(random_episodes, jobs, workers=2):
        print(result)
        assert result["speed"] <= sim.MAX_SPEED and result["overshoot"] < 1
        assert result["depth"] < 0.01 and not result["unsaid"]
        first, last = result["memory"][len(result["memory"]) // 2], result["memory"][-1]  # settled by then
        assert last - first < 10


# The data -------------------------------------------------------------------------------------

def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


KILLS = int(os.environ.get("KILLS", 2))  # of each program


def kill_often(command, cwd, written):
    """Start a program and SIGKILL it with its workers at random moments, up to KILLS times; yields after each.

    Every second kill comes soon after `written()`, what there is on the disk, has changed. Then the program may end.
    """
    rng = np.random.default_rng(0)
    for kill in range(KILLS):
        with program(*command(), cwd=cwd, stdout=subprocess.DEVNULL) as process:
            before, deadline = written(), time.monotonic() + (100 if kill % 2 == 0 else rng.uniform(0, 5))
            while process.poll() is None and written() == before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is not None:
                assert process.returncode == 0
                return
        print(f"{command()[0]}: kill {kill}")
        yield
    run(*command(), cwd=cwd)


def test_data_are_the_same_for_one_worker_and_after_kills(tmp_path):
    def written():
        return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npz")}
    folder, finished, counts = tmp_path / "push", {}, {"train": 3, "val": 1, "test": 1}
    data.generate(tmp_path / "two", counts, demos=2, seed=3, workers=2)
    words = ["--out", folder, "--demos", 2, "--seed", 3, "--workers", 1]
    words += [word for split, n in counts.items() for word in (f"--{split}", n)]
    for _ in kill_often(lambda: ("data.py", *words), tmp_path, written):
        assert finished.items() <= written().items()  # no finished task is made again
        finished = written()
        for path in finished:
            common.checked(path.read_bytes())
    assert finished and finished.items() <= written().items()
    assert contents(folder) == contents(tmp_path / "two")


def test_demonstrations(data_set):
    tasks = data.TaskSet(data_set, "train")
    assert tasks.states.shape == (4, 4, 100, 20) and tasks.actions.shape == (4, 4, 100, 7)
    env = sim.PushEnv()
    demo = data.record_demo(env, sim.make_task("train", 2), 1, seed=3)
    env.close()
    assert (tasks.states[2, 1] == demo["states"]).all() and (tasks.actions[2, 1] == demo["actions"]).all()
    assert all((tasks.frame(2, 1, t) == demo["frames"][t]).all() for t in (0, 1, 57, 99))
    assert (tasks.ends[2, 1] == demo["frames"][[0, 99]]).all()
    mean, std = tasks.state_statistics()
    np.testing.assert_allclose(mean, tasks.states.mean((0, 1, 2), dtype=np.float64), rtol=1e-5, atol=1e-6)
    assert (std[17:] == data.STATE_STD_FLOOR).all()  # the goal never moves


# Workers and locks ----------------------------------------------------------------------------

LIBRARY = """
import data, os, signal, sys, threading
before = dict(os.environ), signal.getsignal(signal.SIGINT)
thread = threading.Thread(target=data.generate, args=(sys.argv[1], {"train": 1, "val": 1}, 1, 0, 2))
thread.start()
thread.join()
assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == before
print(data.TaskSet(sys.argv[1], "val").n_tasks)
"""


def test_workers_as_a_library(tmp_path):
    """From a thread of a script without a guard: the work is done and nothing of the process changes."""
    (tmp_path / "script.py").write_text(LIBRARY)
    with started(sys.executable, tmp_path / "script.py", tmp_path / "d", env={**ENVIRONMENT, "PYTHONPATH": HERE},
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.communicate(timeout=100) == ("1\n", "")


@pytest.mark.parametrize("function, job, message", [
    (signal.raise_signal, (signal.SIGKILL,), "lack of memory"), (os._exit, (3,), "exit code 3"),
    (math.sqrt, (-1,), "domain error")])
def test_a_failing_worker_is_named_with_its_cause(function, job, message):
    with started("sleep", 60) as bystander:
        with pytest.raises((common.UserError, ValueError), match=message):
            list(common.parallel(function, [job], workers=1))
        assert bystander.poll() is None
    assert list(common.parallel(math.sqrt, [(4,)] * 3, workers=2)) == [2, 2, 2]


def test_without_locks_every_trial_counts_once(tmp_path):
    """Two evaluations into one folder, both killed, one resumed, where flock does nothing."""
    (tmp_path / "sitecustomize.py").write_text("import fcntl\nfcntl.flock = lambda *_: None\n")
    settings = dict(cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.DEVNULL)
    words = "evaluate.py", "--policy", "random", "--tasks", 2, "--trials", 4, "--out", "e"
    record = tmp_path / "e" / "trials.jsonl"
    with program(*words, **settings), program(*words, **settings):
        deadline = time.monotonic() + 60
        while not record.exists() or len(record.read_text().splitlines()) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines + lines[1:3]))  # as if both had run these
    run(*words, cwd=tmp_path)
    results = json.loads((tmp_path / "e" / "results.json").read_text())["results"][0]
    assert results["n_trials"] == len({(row["task"], row["trial"]) for row in results["trials"]}) == 8


def test_a_disk_without_locks_is_a_warning(tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    with common.locked(tmp_path / "d"):
        line = capsys.readouterr().err
    assert str(tmp_path / "d") in line and "Errno 37" in line and line.count("\n") == 1


def test_other_packages_are_one_warning(data_set, tmp_path, capsys, monkeypatch):
    shutil.copytree(data_set, tmp_path / "d")
    manifest = data.read_manifest(tmp_path / "d")
    assert manifest["packages"] == common.installed_packages() and "torch" in manifest["packages"]
    data.write_manifest(tmp_path / "d", {**manifest, "packages": {**manifest["packages"], "numpy": "1.0"}})
    monkeypatch.setattr(common.warn_of_packages, "__defaults__", (set(),))
    for _ in range(2):
        data.generate(tmp_path / "d", COUNTS, demos=4, seed=3)
    assert capsys.readouterr().err.count("warning") == 1
    assert data.read_manifest(tmp_path / "d")["packages"]["numpy"] == "1.0"  # of those that made them


# Several processes ----------------------------------------------------------------------------

METHOD_SETTINGS = [("tecnets", {}), ("tecnets", dict(negatives="queries", hinge_mean="violated", lambda_U=0.3)),
                   ("contextual", {}), ("lstm", {}), ("mil", {})]


def gradients_of_a_share(store=None, rank=0):
    """Gradients and terms of every method in one of two processes, added up over both, or in one process alone."""
    share = slice(0, 5)
    if store:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
        share = slice(0, 2) if rank == 0 else slice(2, 5)
    results = []
    for method, settings in METHOD_SETTINGS:
        torch.manual_seed(0)
        network, settings_, *_ = train.METHODS[method]
        model = network(settings_(image_size=32, **settings)).double()
        terms = model.backward({name: values[share] for name, values in batch_of(size=32).items()})
        values = [p.grad for p in model.parameters()] + list(terms.values())
        train.add_up(values)
        results.append([value.numpy() for value in values])
    return results


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    expected = gradients_of_a_share()
    for results in common.parallel(gradients_of_a_share, [(tmp_path / "store", rank) for rank in range(2)], workers=2):
        for values, wanted in zip(results, expected, strict=True):
            for value, one in zip(values, wanted, strict=True):
                np.testing.assert_allclose(value, one, rtol=1e-7, atol=1e-9)


def torchrun(processes, *words, **settings):
    return started(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
                   HERE / "train.py", *words, **settings)


def test_a_run_killed_under_two_processes_goes_on_under_three(data_set, tmp_path, monkeypatch):
    """Its log and weights are those of one process, up to the order of summation; the death of one ends both, in one line."""
    monkeypatch.chdir(tmp_path)
    words = *TINY, "--steps", 20, "--validate-every", 5, "--bfloat16", 0
    start_run(data_set, "one", *words).train(stop=lambda: False)
    record = tmp_path / "runs" / "shared" / "best.pt"
    with torchrun(2, "--data", data_set, "--name", "shared", *words, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not record.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        complaint = process.communicate(timeout=10)[1]
    assert complaint.count("another process of this job has ended") == 1 and 5 <= train.load_checkpoint(record)["step"] < 20
    with torchrun(3, "--resume", "--name", "shared", cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert not process.communicate(timeout=60)[1] and process.returncode == 0
    one, shared = (train.load_checkpoint(tmp_path / "runs" / name / "last.pt") for name in ("one", "shared"))
    for name, values in one["model"].items():
        assert (shared["model"][name] - values).norm() <= 1e-5 * values.norm()
    for row, other in zip(one["log"], shared["log"], strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-4)


def test_shares_of_a_data_set_make_the_data_set(tmp_path):
    """In any order, and after a kill, which leaves half a file: the bytes of one machine."""
    job = {"train": 2, "val": 1}, 1, 3, 2
    assert data.generate(tmp_path / "one", *job) == 0 < data.generate(tmp_path / "shared", *job, part=1, parts=2)
    mine, other = (data.task_path(tmp_path / "shared", "train", index) for index in (0, 1))
    for path in (mine, other):
        Path(f"{path}.7{common.TEMPORARY}").write_text("half")
    with common.locked(tmp_path / "shared", 1, 2):  # one machine still works on its share
        assert data.generate(tmp_path / "shared", *job, part=0, parts=2) == 0
        with pytest.raises(common.UserError, match="another process"):
            data.generate(tmp_path / "shared", *job)
    stale = f"train/00001.npz.7{common.TEMPORARY}"
    shared = {name: content for name, content in contents(tmp_path / "shared").items() if ".lock-" not in name}
    assert shared.pop(stale) == b"half"  # the other's to delete
    assert shared == contents(tmp_path / "one")


def test_shares_of_an_evaluation_make_the_evaluation(tmp_path):
    words = "evaluate.py", "--policy", "random", "--tasks", 3, "--trials", 1
    run(*words, "--out", "one", cwd=tmp_path)
    assert "2 of 3 trials" in run(*words, "--out", "shared", "--share", "0/2", cwd=tmp_path).stdout
    assert not (tmp_path / "shared" / "results.json").exists()
    run(*words, "--out", "shared", cwd=tmp_path, env={**ENVIRONMENT, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    one, shared = (json.loads((tmp_path / name / "results.json").read_text())["results"][0] for name in ("one", "shared"))
    assert one["trials"] == shared["trials"] and shared["n_trials"] == 3
    assert not list((tmp_path / "shared").glob("trials*"))


# Own data ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A data set that was written from arrays, of sizes of its own."""
    folder = tmp_path_factory.mktemp("own") / "own"
    data.write_data_set(folder, random_demos(7, 32, 5, 3, train=(4, 3), val=(2, 3)))
    return folder


def without(module, folder):
    """An environment in which a module cannot be imported."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(f"raise ImportError('no {module} here')\n")
    return {**ENVIRONMENT, "PYTHONPATH": str(folder)}


def test_training_on_own_data_takes_no_simulator(own, tmp_path):
    environment = without("pybullet", tmp_path / "stub")
    with started(sys.executable, "-c", "import pybullet", env=environment, stderr=subprocess.DEVNULL) as process:
        assert process.wait(60) == 1
    run("train.py", "--data", own, "--name", "own", *TINY, "--steps", 20, cwd=tmp_path, env=environment)
    model, content = train.load_model(tmp_path / "runs" / "own" / "last.pt")
    c = model.settings
    assert (c.image_size, c.state_dim, c.action_dim, content["step"]) == (32, 5, 3, 20) and not content["options"]["mirror"]
    np.testing.assert_allclose(model.state_mean, data.TaskSet(own, "train").state_statistics()[0])
    words = "evaluate.py", "--checkpoint", "runs/own/last.pt", "--out", "e"
    assert "32" in one_line(*words, cwd=tmp_path)
    one_line(*words, "--data", own, cwd=tmp_path)
    assert "--mirror" in one_line("train.py", "--data", own, "--name", "b", *TINY, "--mirror", 1, cwd=tmp_path)


def test_another_shape_is_not_damage(own, tmp_path):
    """Of two good data sets of different sizes: a file in the wrong place is not one to be downloaded again."""
    shutil.copytree(own, tmp_path / "own")
    data.write_data_set(tmp_path / "other", random_demos(7, 32, 6, 3, train=(1, 3), val=(1, 3)))
    path = data.task_path(tmp_path / "own", "train", 2)
    shutil.copy(data.task_path(tmp_path / "other", "train", 0), path)
    with pytest.raises(common.UserError) as error:
        data.TaskSet(tmp_path / "own", "train")
    message = str(error.value)
    assert str(path) in message and "damaged" not in message and "(3, 7, 6)" in message and "(3, 7, 5)" in message
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(common.UserError, match="damaged"):
        data.TaskSet(tmp_path / "own", "train")


# MIL's folders ---------------------------------------------------------------------------------

class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which a reader decodes as latin-1."""
    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)
    dispatch[bytes] = save_bytes


@pytest.fixture(scope="session")
def mil(tmp_path_factory):
    """Three training tasks and a test task in MIL's format."""
    folder, rng = tmp_path_factory.mktemp("mil"), np.random.default_rng(0)
    for stem, place in (("demos_3", "sim_push"), ("demos_10", "sim_push"), ("demos_4", "sim_push"), ("0", "sim_push_test")):
        demos = {b"demoX": rng.normal(size=(24, 100, 20)), b"demoU": rng.normal(size=(24, 100, 7)), b"xml": b"pusher\xe9.xml"}
        objects = folder / place / f"object_{stem.removeprefix('demos_')}"
        objects.mkdir(parents=True)
        with open(folder / place / f"{stem}.pkl", "wb") as file:
            Python2Pickler(file, protocol=2).dump(demos)
        pictures = [evaluate.Image.fromarray(frame, "P") for frame in rng.integers(0, 4, (100, 125, 125), dtype=np.uint8)]
        for picture in pictures:
            picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tolist())
        pictures[0].save(objects / "cond6.samp0.gif", save_all=True, append_images=pictures[1:])
        for i in range(7, 18):
            shutil.copy(objects / "cond6.samp0.gif", objects / f"cond{i}.samp0.gif")
    return folder


def test_the_fixture_is_as_python_2_wrote_it(mil):
    content = (mil / "sim_push" / "demos_3.pkl").read_bytes()
    assert content.startswith(b"\x80\x02") and b"_codecs" not in content and b"T" + struct.pack("<i", 24 * 100 * 20 * 8) in content


def test_import_and_train_on_it(mil, tmp_path):
    run("mil_data.py", mil, "--out", "mil", "--val", 1, cwd=tmp_path)
    tasks = data.TaskSet(tmp_path / "mil", "train")
    assert tasks.manifest["tasks"] == {"train": 2, "val": 1, "test": 1} and tasks.n_demos == 12
    with open(mil / "sim_push" / "demos_4.pkl", "rb") as file:
        demos = pickle.load(file, encoding="latin1")
    np.testing.assert_array_equal(tasks.states[1], demos["demoX"][6:18].astype(np.float32))
    np.testing.assert_array_equal(tasks.actions[1], demos["demoU"][6:18].astype(np.float32))
    with evaluate.Image.open(mil / "sim_push" / "object_4" / "cond9.samp0.gif") as gif:
        gif.seek(37)
        np.testing.assert_array_equal(tasks.frame(1, 3, 37), np.array(gif.convert("RGB")))
    contents_ = contents(tmp_path / "mil")
    data.task_path(tmp_path / "mil", "train", 0).unlink()
    run("mil_data.py", mil, "--out", "mil", "--val", 1, cwd=tmp_path)
    assert contents(tmp_path / "mil") == contents_
    run("train.py", "--data", "mil", "--name", "a", *TINY, "--batch", 2, "--val-tasks", 1, "--steps", 20, cwd=tmp_path)
    message = one_line("evaluate.py", "--data", "mil", "--split", "test", "--tasks", 1, "--checkpoint", "runs/a/last.pt",
                       "--out", "e", cwd=tmp_path)
    assert "simulator" in message
    assert "--mirror" in one_line("train.py", "--data", "mil", "--name", "b", *TINY, "--batch", 2, "--mirror", 1, cwd=tmp_path)


def test_tasks_beside_pushing_are_left_alone(mil, tmp_path, capsys):
    """MIL's archive has reaching beside pushing, with the same file names; a copy of pushing is ambiguous."""
    shutil.copytree(mil, tmp_path / "mil", copy_function=os.link)
    reach = tmp_path / "mil" / "sim_vision_reach"
    reach.mkdir()
    for number in (3, 4):
        demos = {"demoX": np.zeros((24, 50, 10)), "demoU": np.zeros((24, 50, 2))}
        (reach / f"demos_{number}.pkl").write_bytes(pickle.dumps(demos, 2))
    mil_data.import_mil(tmp_path / "mil", tmp_path / "out", val=1)
    assert data.read_manifest(tmp_path / "out")["tasks"] == {"train": 2, "val": 1, "test": 1}
    assert "sim_vision_reach holds 2 train tasks, not of pushing" in capsys.readouterr().out
    shutil.copytree(tmp_path / "mil" / "sim_push", tmp_path / "mil" / "copy")
    with pytest.raises(common.UserError, match="train task 3 is both .*copy/demos_3.pkl and .*sim_push/demos_3.pkl"):
        mil_data.import_mil(tmp_path / "mil", tmp_path / "again", val=1)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_todays_numpy(protocol, tmp_path):
    arrays = {"demoX": np.random.default_rng(0).normal(size=(2, 3, 4)), "demoU": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(arrays, protocol))
    got = mil_data._read_pickle(tmp_path / "p.pkl")
    assert all((got[name] == arrays[name].astype(np.float32)).all() for name in arrays)


def test_merged_frames_are_repeated(tmp_path):
    rng = np.random.default_rng(0)
    frames = [np.repeat(rng.integers(0, 256, (125, 125, 1), np.uint8), 3, 2) for _ in range(96)]
    frames[40:40] = [frames[40]] * 4
    first, *rest = map(evaluate.Image.fromarray, frames)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=50)
    with evaluate.Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 96
    assert (mil_data._read_gif(tmp_path / "a.gif") == frames).all()
    first.save(tmp_path / "b.gif", save_all=True, append_images=rest[:-1], duration=50)
    with pytest.raises(common.UserError, match="95 frames"):
        mil_data._read_gif(tmp_path / "b.gif")


class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


@pytest.mark.parametrize("damage, message", [
    (lambda pkl, gif: pkl.write_bytes(pkl.read_bytes()[:1000]), "demoX"),
    (lambda pkl, gif: pkl.write_bytes(b""), "demoX"),
    (lambda pkl, gif: pkl.write_bytes(pickle.dumps({"demoX": np.zeros((24, 99, 20)), "demoU": np.zeros((24, 100, 7))}, 2)), "shape"),
    (lambda pkl, gif: pkl.write_bytes(pickle.dumps({"demoX": np.zeros((24, 100, 20))}, 2)), "demoU"),
    (lambda pkl, gif: pkl.write_bytes(pickle.dumps({"demoX": Malice()}, 2)), "posix.system is not admitted"),
    (lambda pkl, gif: pkl.write_bytes(b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR."), "demoX"),  # an array of 2 GB
    (lambda pkl, gif: pkl.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f."), "demoX"),  # a memo of 34 GB
    (lambda pkl, gif: pkl.write_bytes(pickle.dumps({"demoX": np.array([Malice()])}, 2)), "numbers of type O"),
    (lambda pkl, gif: gif.unlink(), "missing"),
    (lambda pkl, gif: gif.write_bytes(gif.read_bytes()[:9000]), "not a GIF"),
    (lambda pkl, gif: gif.write_bytes(b"GIF89a"), "not a GIF"),
    (lambda pkl, gif: evaluate.Image.new("P", (125, 125)).save(gif), "1 frames"),
    *((lambda pkl, gif, side=side: gif.write_bytes(gif.read_bytes()[:6] + struct.pack("<HH", side, side) + gif.read_bytes()[10:]),
       message) for side, message in ((126, r"\(126, 126\) pixels"), (65535, "exceeds limit"))),
    (lambda pkl, gif: evaluate.Image.new("RGB", (125, 125)).save(gif, "png"), "not a GIF"),
])
def test_damaged_mil_data(damage, message, mil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "mil"
    shutil.copytree(mil / "sim_push" / "object_4", source / "object_4")
    shutil.copy(mil / "sim_push" / "demos_4.pkl", source)
    damage(source / "demos_4.pkl", source / "object_4" / "cond8.samp0.gif")
    with pytest.raises(common.UserError, match=message):
        mil_data._import_task(tmp_path / "out", {}, "train", 0, {"train": [source / "demos_4.pkl"]})
    assert not (tmp_path / "malice").exists() and not (tmp_path / "out").exists()


# Training and evaluation ----------------------------------------------------------------------

@pytest.mark.parametrize("method", ["contextual", "lstm", "mil"])
def test_a_baseline_from_training_to_evaluation(method, data_set, tmp_path):
    frames = [] if method == "contextual" else ["--demo-frames", 3]
    run("train.py", "--data", data_set, "--method", method, *TINY, "--query", 2, "--steps", 20, *frames, cwd=tmp_path)
    words = ["--data", data_set, "--tasks", 1, "--trials", 1, "--shots", 2, "--checkpoint", f"runs/{method}/last.pt"]
    run("evaluate.py", *words, "--gif", 1, "--out", "filmed", cwd=tmp_path)  # frames picked from whole demonstrations
    run("evaluate.py", *words, "--method", method, "--out", "e", cwd=tmp_path)
    filmed, report = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("filmed", "e"))
    assert [r["trials"] for r in filmed["results"]] == [r["trials"] for r in report["results"]]
    network = report["network"]
    assert report["results"][0]["policy"] == method and network["adapt_ms"] > 0 and network["step"] == 20
    assert network["options"]["method"] == method and network["options"]["batch"] == 4


def log_without_seconds(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_training_lowers_the_loss(trained):
    rows = [row for row in log_without_seconds(trained) if "loss_q" in row]
    assert rows[-1]["step"] == 60 and rows[-1]["loss_q"] < rows[0]["loss_q"]


def start_run(data_set, name, *words):
    """A training run in this process, in runs/NAME of the current folder."""
    folder, *arguments = train.parse(["--data", str(data_set), "--name", name, *map(str, (*TINY, *words))])
    folder.mkdir(parents=True)
    return train.start(folder, *arguments)


def assert_same_run(one, other):
    assert log_without_seconds(one) == log_without_seconds(other)
    for name in ("last.pt", "best.pt"):
        a, b = (train.load_checkpoint(folder / name)["model"] for folder in (one, other))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_interrupted_training_equals_uninterrupted(data_set, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = start_run(data_set, "cut")
    job.train(stop=lambda: job.step == 23)
    run("train.py", "--name", "cut", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "cut", trained)
    finished = (tmp_path / "runs" / "cut" / "last.pt").read_bytes()
    run("train.py", "--name", "cut", "--resume", cwd=tmp_path)
    assert (tmp_path / "runs" / "cut" / "last.pt").read_bytes() == finished


@pytest.mark.parametrize("method", train.METHODS)
def test_validation_tells_whether_demonstrations_count(method, data_set):
    """The loss with the partner's demonstrations; a network that does not heed them has the same with its own."""
    tasks = data.TaskSet(data_set, "val")
    network, settings, changed, _ = train.METHODS[method]
    torch.manual_seed(0)
    model = network(settings(), *tasks.state_statistics())
    loader = data.TaskLoader(tasks, B=2, K=1, Q=1, F=2, seed=0, pairs=True, demo_frames=changed.get("demo_frames", 2))
    options = {"validation_batches": 1, "device": "cpu", "method": method}
    values, batch = train.validate(model, loader, options), train.to_tensors(loader.batch(0), "cpu")
    own, partners = (model.embed(batch["frames_U"][order]) for order in ([0, 1], [1, 0]))
    for name, context in (("val_loss_q", own), ("val_loss_partner", partners)):
        prediction = model.predict(batch["images"][:, 1], batch["states"][:, 1], context)
        assert values[name] == pytest.approx((prediction - batch["actions"][:, 1]).square().mean().item(), rel=1e-4)
    model.embed = lambda frames: partners[0].expand(*frames.shape[:-5], *partners.shape[1:])
    values = train.validate(model, loader, options)
    assert values["val_loss_q"] == values["val_loss_partner"]


def test_weights_are_kept_along_the_run(data_set, trained, tmp_path, monkeypatch):
    """They are small and load by themselves; those of the last step are last.pt's."""
    monkeypatch.chdir(tmp_path)
    job = start_run(data_set, "kept", "--keep", 3)
    job.train(stop=lambda: job.step == 45)
    assert sorted(path.name for path in job.folder.glob("step-*.pt")) == ["step-20.pt", "step-40.pt"]
    assert train.load_checkpoint(job.folder / "step-40.pt")["step"] == 40
    last, kept = (train.load_model(trained / name)[0].state_dict() for name in ("last.pt", "step-60.pt"))
    assert all(torch.equal(last[name], kept[name]) for name in last) and not list(trained.glob("step-[!6]*"))
    assert (trained / "step-60.pt").stat().st_size < (trained / "last.pt").stat().st_size / 2.5


def test_schedules_of_the_learning_rate(data_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = {}
    for schedule in ("constant", "hold", "one-cycle"):
        job, rates[schedule] = start_run(data_set, schedule, "--schedule", schedule, "--lr", 0.5), []
        for step in range(60):
            rates[schedule] += job.scheduler.get_last_lr()
            job.optimiser.step()
            job.scheduler.step()
            if step == 50:  # as a resumed run does
                state = job.scheduler.state_dict()
                job.build_scheduler()
                job.scheduler.load_state_dict(state)
    assert rates["constant"] == [0.5] * 60
    assert rates["hold"] == pytest.approx([0.5] * 48 + [0.5 * left / 12 for left in range(12, 0, -1)])
    assert rates["one-cycle"][6] == pytest.approx(0.5, rel=0.01) and rates["one-cycle"][-1] < 0.001 < rates["one-cycle"][0]


def test_training_goes_on_from_given_weights(data_set, trained, tmp_path, monkeypatch):
    """--init starts a run of its own, whose first loss is that of the weights; the seed may be another."""
    monkeypatch.chdir(tmp_path)
    job = start_run(data_set, "tuned", "--init", trained / "best.pt", "--seed", 1)
    weights = train.load_model(trained / "best.pt")[0]
    assert job.step == 0 and all(torch.equal(p, weights.state_dict()[name]) for name, p in job.model.state_dict().items())
    batch, seen = train.to_tensors(job.loader.batch(0), "cpu"), []
    backward = job.model.backward
    job.model.backward = lambda *words: seen.append(backward(*words)) or seen[-1]
    job.train(stop=lambda: job.step == 2)
    weights.use_bfloat16 = job.model.use_bfloat16
    assert seen[0]["loss"].item() == pytest.approx(weights.losses(batch)["loss"].item(), rel=0.02 if weights.use_bfloat16 else 1e-4)
    assert len(seen) == 2 and not any(torch.equal(p, weights.state_dict()[name]) for name, p in job.model.named_parameters())
    assert start_run(data_set, "anew", "--seed", 1).model.state_dict().keys() == weights.state_dict().keys()
    run("train.py", "--name", "tuned", "--resume", cwd=tmp_path)
    assert train.load_checkpoint(tmp_path / "runs" / "tuned" / "last.pt")["step"] == 60


def test_options_that_an_older_program_lacked(trained, tmp_path):
    """Its checkpoint loads with what it did, which need not be what is done by default today."""
    older = train.load_checkpoint(trained / "last.pt")
    assert older["options"]["hinge_mean"] == "violated" and older["options"]["pairs"] == 1
    older["options"] = {name: value for name, value in older["options"].items() if name not in ("hinge_mean", "pairs")}
    common.write_checked(tmp_path / "older.pt", lambda file: torch.save(older, file))
    options = train.load_checkpoint(tmp_path / "older.pt")["options"]
    assert options["hinge_mean"] == "all" and options["pairs"] == 0


def test_killed_training_equals_uninterrupted(data_set, trained, tmp_path):
    folder, steps = tmp_path / "runs" / "cut", [0]

    def command():
        if (folder / "last.pt").exists():
            return "train.py", "--name", "cut", "--resume"
        return "train.py", "--data", data_set, "--name", "cut", *TINY

    def written():
        return [path.stat().st_mtime_ns for path in folder.glob("best.pt")]
    for _ in kill_often(command, tmp_path, written):
        if (folder / "last.pt").exists():
            steps.append(train.load_checkpoint(folder / "last.pt")["step"])
    assert steps == sorted(steps) and steps[-1] > 0
    assert_same_run(folder, trained)


def test_killed_evaluation_equals_uninterrupted(data_set, trained, tmp_path):
    words = ["--checkpoint", trained / "best.pt", "--data", data_set, "--tasks", 2, "--trials", 3, "--shots", 1, 2]
    words += ["--gif", 1]
    lines, record = [], tmp_path / "cut" / "trials.jsonl"

    def written():
        with contextlib.suppress(FileNotFoundError):  # before the beginning, and from the end on
            return len(record.read_text().splitlines())
    for _ in kill_often(lambda: ("evaluate.py", *words, "--out", "cut"), tmp_path, written):
        if record.exists():
            now = record.read_text().split("\n")[:-1]
            assert now[:len(lines)] == lines and len(set(now)) == len(now)  # nothing lost, nothing run twice
            lines = now
    run("evaluate.py", *words, "--out", "whole", cwd=tmp_path)
    cut, whole = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("cut", "whole"))
    assert lines and [r["trials"] for r in cut] == [r["trials"] for r in whole] and cut[0]["n_trials"] == 6
    gifs = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.gif")} for name in ("cut", "whole")]
    assert gifs[0] == gifs[1] and len(gifs[0]) == 2
    assert "6 " in run("evaluate.py", *words, "--out", "cut", cwd=tmp_path).stdout  # the table again


def test_a_run_goes_on_elsewhere(data_set, trained, tmp_path, monkeypatch):
    """Begun on a GPU, with data that have moved since: --device and --data may change, and the numbers do not."""
    monkeypatch.chdir(tmp_path)
    job = start_run(data_set, "gpu")
    job.train(stop=lambda: job.step == 7)
    state = train.load_checkpoint(job.folder / "last.pt")
    state["options"] |= {"device": "cuda", "data": "gone"}
    common.write_checked(job.folder / "last.pt", lambda file: torch.save(state, file))
    assert state["packages"] == common.installed_packages()
    folder, *arguments = train.parse(["--resume", "--name", "gpu", "--data", str(data_set), "--device", "cpu"])
    train.start(folder, *arguments).train(stop=lambda: False)
    assert_same_run(tmp_path / "runs" / "gpu", trained)


@pytest.mark.parametrize("words, closed, result", [
    ("evaluate.py --policy random --tasks 1 --trials 1 --out e", "<&- >&- 2>&-", "e/results.json"),
    (f"train.py --data {{data}} --name a {' '.join(map(str, TINY))}", "2>&1 | true", "runs/a/best.pt")])
def test_streams_that_are_closed(words, closed, result, data_set, tmp_path):
    """The work is done and saved whoever reads."""
    line = f"({sys.executable} {HERE}/{words.format(data=data_set)}; echo $? > code) {closed}"
    with started("bash", "-c", line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        process.wait(100)
        deadline = time.monotonic() + 100  # a pipe's last program may end first
        while not (tmp_path / "code").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert (tmp_path / result).exists() and (tmp_path / "code").read_text() == "0\n"


def test_a_lack_of_memory_names_the_remedy(data_set, tmp_path):
    words = f"train.py --data {data_set} --batch 4 --support 2 --samples 1000 --chunk 100000 --steps 20"
    with started("bash", "-c", f"ulimit -v 4500000; exec {sys.executable} {HERE}/{words}", cwd=tmp_path,
                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        message = process.communicate(timeout=100)[1]
    assert process.returncode == 2 and message.count("\n") == 1 and "--chunk" in message


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid):
    """Whether there is such a process, and not only its remains, whose command line is empty."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(signal_, tmp_path):
    with program("data.py", "--out", tmp_path / "d", "--workers", "2", stderr=subprocess.PIPE) as process:
        start = time.monotonic()
        while len(workers := children(process.pid)) < 2:
            time.sleep(0.1)
            assert process.poll() is None and time.monotonic() < start + 60
        time.sleep(2)
        assert all(map(running, workers))
        process.send_signal(signal_)
        start = time.monotonic()
        while any(map(running, workers)):
            assert time.monotonic() < start + 5
            time.sleep(0.1)
        assert process.wait(5) == (-signal_ if signal_ == signal.SIGKILL else 128 + signal_)
        assert signal_ == signal.SIGKILL or process.stderr.read() == ""


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_run_saves_and_says_how_to_go_on(signal_, data_set, tmp_path):
    with program("train.py", "--data", data_set, *TINY, "--steps", 9999, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # says that it begins
        process.send_signal(signal_)
        assert "--resume" in process.communicate(timeout=5)[0] and process.returncode == 128 + signal_
    assert train.load_checkpoint(tmp_path / "runs" / "ours" / "last.pt")["step"] < 9999


def test_background_jobs_take_ctrl_c():
    """What `started` does for a test run that was itself begun with `&`."""
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with started(sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)",
                     stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(5) != 0
    finally:
        signal.signal(signal.SIGINT, ignored)


def test_evaluation_depends_on_the_seed_only(data_set, trained, tmp_path):
    arguments = ("--checkpoint", trained / "best.pt", "--tasks", 2, "--trials", 1, "--shots", 1, 2)
    for workers in (1, 2):
        run("evaluate.py", *arguments, "--data", data_set, "--workers", workers, "--out", tmp_path / str(workers),
            "--gif", 1, cwd=tmp_path)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("1", "2"))
    assert [r["trials"] for r in one] == [r["trials"] for r in two] and [r["shots"] for r in one] == [1, 2]
    assert one[0]["n_trials"] == 2 and len(list((tmp_path / "1").glob("*.gif"))) == 2
    with evaluate.Image.open(tmp_path / "1" / "task00-shots1.gif") as gif:
        assert gif.n_frames > 10 and gif.size == (500, 250)


def test_chosen_tasks_and_filmed_failures(tmp_path):
    """--only tries the tasks that it names as the whole evaluation does; --film-failures films each failing trial."""
    words = "evaluate.py", "--policy", "random", "--trials", 1
    run(*words, "--tasks", 3, "--out", "all", cwd=tmp_path)
    run(*words, "--only", 2, 0, "--gif", 1, "--film-failures", "--out", "some", cwd=tmp_path)
    whole, some = (json.loads((tmp_path / name / "results.json").read_text())["results"][0] for name in ("all", "some"))
    assert [row for row in whole["trials"] if row["task"] in (0, 2)] == some["trials"] and some["n_tasks"] == 2
    failing = [f"task{row['task']:02d}-shots0-trial{row['trial']}.gif" for row in some["trials"] if not row["success"]]
    assert failing and sorted(path.name for path in (tmp_path / "some").glob("*trial*.gif")) == failing
    assert (tmp_path / "some" / "task00-shots0.gif").exists()
    with evaluate.Image.open(tmp_path / "some" / failing[0]) as gif:
        assert gif.n_frames > 10 and gif.height >= 250
    run("evaluate.py", "--policy", "expert", "--trials", 1, "--only", 1, "--film-failures", "--out", "expert", cwd=tmp_path)
    assert not list((tmp_path / "expert").glob("*.gif"))  # it does not fail


def test_the_shipped_weights_from_any_folder(tmp_path):
    """`python path/to/evaluate.py` finds them beside the program."""
    run("evaluate.py", "--only", 0, "--trials", 1, "--shots", 1, "--out", "e", cwd=tmp_path)
    report = json.loads((tmp_path / "e" / "results.json").read_text())
    digest = hashlib.sha256((HERE / "results" / "weights.pt").read_bytes()).hexdigest()
    assert report["evaluation"]["checkpoint"] == digest and report["results"][0]["n_trials"] == 1


def test_the_shipped_weights_load_with_tecnets_alone(tmp_path):
    for path in (HERE / "tecnets.py", HERE / "results" / "weights.pt"):
        shutil.copy(path, tmp_path)
    lines = """import torch, tecnets
checkpoint = torch.load("weights.pt", weights_only=True)
model = tecnets.TecNets(tecnets.Settings(**checkpoint["settings"]))
model.load_state_dict(checkpoint["model"])
print(model.embed(torch.ones(1, 2, 125, 125, 3, dtype=torch.uint8)).norm().item())"""
    with started(sys.executable, "-c", lines, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert float(process.communicate(timeout=60)[0]) == pytest.approx(1, abs=1e-5)


def test_demonstrations_on_the_fly_are_those_of_the_data_set(data_set, trained, monkeypatch):
    """The same rows with the demonstrations of the data set and with those recorded by the evaluation."""
    monkeypatch.setattr(evaluate, "FULL_DATA", {"demos": 4, "seed": 3})
    arguments = ("tecnets", "test", [0], 1, 2, 0, 1, (trained / "best.pt").read_bytes())
    assert evaluate.run_trials(*arguments) == evaluate.run_trials(*arguments, data.TaskSet(data_set, "test"))


def test_embedding_map(data_set, trained, tmp_path):
    model, tasks, others = train.load_model(trained / "best.pt")[0], *(data.TaskSet(data_set, name) for name in ("train", "val"))
    figures = evaluate.embedding_map(tmp_path / "map.png", model, tasks, others)
    found, s = [], lambda set_, task, demos: model.embed(torch.from_numpy(set_.ends[task, demos])).detach()
    for task, demo in np.ndindex(4, 4):
        rest = [i for i in range(4) if i != demo]
        near = [s(tasks, task, [demo]) @ s(tasks, i, rest if i == task else range(4)) for i in range(4)]
        found.append(np.argmax(near) == task)
    assert figures["retrieval"] == pytest.approx(np.mean(found))
    near = [[s(tasks, i, range(4)) @ s(others, j, range(4)) for j in range(2)] for i in range(4)]
    assert figures["nearest_training_task"] == np.argmax(near, 1).tolist()
    with evaluate.Image.open(tmp_path / "map.png") as picture:
        assert len(picture.getcolors(2 ** 24)) > 100
    assert evaluate.embedding_map(tmp_path / "one.png", model, data.TaskSet(data_set, "train", 1), others)["retrieval"] == 1


def test_bfloat16_trains_alike(data_set, tmp_path, monkeypatch):
    """It ends with nearly the losses of float32, not the same."""
    monkeypatch.chdir(tmp_path)
    ends = []
    for bfloat16 in (0, 1):
        start_run(data_set, str(bfloat16), "--bfloat16", bfloat16, "--steps", 20).train(stop=lambda: False)
        ends.append([row for row in log_without_seconds(tmp_path / "runs" / str(bfloat16)) if "loss_q" in row][-1]["loss_q"])
    assert ends[0] != ends[1] == pytest.approx(ends[0], rel=0.1)


# Bad input ------------------------------------------------------------------------------------

def refuse(capsys, monkeypatch, module, *words):
    """The one line with which a program refuses its arguments, before any work; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("began to work"))  # that of every worker
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("began to train"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.command(module.main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1, line
    return line


NUMBERS = [(data, "--out d", flag, "-1") for flag in ("--train", "--val", "--test", "--demos", "--workers", "--seed")]
NUMBERS += [(mil_data, "mil --out d", flag, "-1") for flag in ("--val", "--workers")]
NUMBERS += [(evaluate, "--out e", flag, "-1")
            for flag in ("--tasks", "--trials", "--shots", "--workers", "--gif", "--seed", "--only")]
NUMBERS += [(train, "", "--" + name.replace("_", "-"), "-1") for name, (kind, *_) in train.OPTIONS.items()
            if kind.__name__ in ("int", "float")]
NUMBERS += [(train, "", flag, value) for flag, values in (("--batch", ("1", "1e300", "many", "", "2.5")),
                                                          ("--lr", ("2", "nan", "inf", "many"))) for value in values]
NUMBERS += [(data, "--out d", flag, "0") for flag in ("--train", "--demos", "--workers")]
NUMBERS += [(evaluate, "--out e", flag, "0") for flag in ("--tasks", "--trials", "--shots", "--workers")]
NUMBERS += [(train, "", flag, "0") for flag in ("--steps", "--support", "--query", "--samples", "--chunk", "--validate-every")]


@pytest.mark.parametrize("module, words, flag, value", NUMBERS)
def test_numbers_out_of_range(module, words, flag, value, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert flag in refuse(capsys, monkeypatch, module, *words.split(), flag, value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bad_files(trained, data_set, tmp_path_factory):
    """A folder of checkpoints, runs and evaluations that some program must refuse."""
    folder, checkpoint = tmp_path_factory.mktemp("bad"), train.load_checkpoint(trained / "last.pt")
    small, mil = TecNets(Settings(image_size=64)), baselines.MIL()
    options, model = checkpoint["options"], checkpoint["model"]
    files = {"nan.pt": {**checkpoint, "model": {name: values / 0 for name, values in model.items()}},
             "flat.pt": {**checkpoint, "model": {**model, "state_std": 0 * model["state_std"]}},
             "frames.pt": {**checkpoint, "options": {**options, "demo_frames": 3}},
             "options.pt": {**checkpoint, "options": {**options, "demo_frames": 0}},
             "negative.pt": {**checkpoint, "settings": {**checkpoint["settings"], "embedding_dim": -20}},
             "runs/gpu/last.pt": {**checkpoint, "options": {**options, "device": "cuda"}},
             "runs/torn/last.pt": {**checkpoint, "step": checkpoint["step"] - 1},
             "small.pt": {**checkpoint, "settings": vars(small.settings), "model": small.state_dict()},
             "mixed.pt": {**checkpoint, "settings": vars(small.settings)}, "strange.pt": [1, 2], "malice.pt": Malice(),
             "mil.pt": {**checkpoint, "settings": vars(mil.settings), "model": mil.state_dict(),
                        "options": {**options, "method": "mil"}},
             "old.pt": {**checkpoint, "format": 1}, "runs/run/last.pt": checkpoint,
             "runs/weights/last.pt": {name: checkpoint[name] for name in ("format", "settings", "model", "options")},
             "runs/moved/last.pt": {**checkpoint, "options": {**options, "data": "moved-data"}},
             "runs/changed/last.pt": {**checkpoint, "manifest": {**checkpoint["manifest"], "seed": 4}}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        common.write_checked(folder / name, lambda file: torch.save(content, file))
    evaluation = dict(benchmark=sim.VERSION, policy="expert", split="test", tasks=2, trials=1, seed=0, gif=0, film_failures=False, shots=[0],
                      checkpoint=False, demos=None, packages=common.installed_packages())
    rows = [dict(shots=0, task=0, trial=trial, success=True, final_distance=0.0, distractor_displacement=0.0) for trial in (0, 1)]
    for name, text in {"foreign-rows/trials.jsonl": "".join(map(evaluate._line, [evaluation, *rows])),
                       "conflict/trials.jsonl": "".join(map(evaluate._line, [evaluation, rows[0], {**rows[0], "success": False}])),
                       "done/results.json": "{}", "other/trials.jsonl": evaluate._line({"policy": "random"}),
                       "torn/trials.jsonl": "{\n{}\n"}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    shutil.copytree(data_set, folder / "foreign")
    shutil.copy(folder / "foreign" / "train" / "00001.npz", folder / "foreign" / "train" / "00002.npz")
    manifest = data.read_manifest(data_set)
    (folder / "empty").mkdir()
    data.write_manifest(folder / "empty", {**manifest, "tasks": {split: 0 for split in manifest["tasks"]}})
    return folder


def stamps(folder):
    """What tells whether a file was written, deleted or replaced, without reading it; of all but locks."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("module, words, message", [
    (data, "", "--out"),
    (data, "--out {data} --demos 7", "other settings"),
    (data, "--out {data} --demos 4 --seed 4", "other settings"),
    (data, "--out /proc/none", "/proc/none"),
    (data, "--out {trained}", "File exists"),
    (data, "--out d --tra 3", "--tra"),
    (mil_data, "{data} --out d --val 1", "0 training tasks"),
    (mil_data, "none --out d --val 1", "0 training tasks"),
    (mil_data, "{data} --val 1", "--out"),
    (data, "--out d --speed 3", "--speed"),
    (data, "--out d --share 2/2", "--share"),
    (evaluate, "--out e --share half", "--share"),
    (train, "--data {data} --support 3 --query 2 --batch 2", "K + Q = 3 + 2"),
    (train, "--data {data} --support 2 --batch 9", "lower --batch"),
    (train, "--data {data} --tasks 999 --batch 2 --support 2", "4 train tasks, not 999"),
    (train, "--data {data} --val-tasks 999 --batch 2 --support 2", "2 val tasks, not 999"),
    (train, "--data {data} --batch 2 --lr 2", "--lr"),
    (train, "--data {data} --batch 2 --device cuda", "--device cpu"),
    (train, "--data {data} --batch 2 --device tpu", "cpu, cuda"),
    (train, "--data {data} --batch 2 --support-mean none", "mean-norm"),
    (train, "--data {data} --batch 2 --negatives none", "sentences"),
    (train, "--data {data} --batch 2 --schedule none", "one-cycle"),
    (train, "--data {data} --batch 2 --method none", "contextual"),
    (train, "--data {data} --batch 2 --ends none", "first"),
    (train, "--data {data} --batch 2 --demo-frames 3", "--demo-frames"),
    (train, "--data {data} --batch 2 --demo-frames 101 --method mil", "--demo-frames"),
    (train, "--data {data} --batch 2 --method contextual --demo-frames 3", "--demo-frames"),
    (train, "--data {data} --batch 2 --method mil --margin 0.2", "--margin"),
    (train, "--data {data} --batch 2 --method lstm --lambda-emb 1", "--lambda-emb"),
    (train, "--data {data} --batch 2 --second-order 0", "--second-order"),
    (train, "--data {data} --batch 2 --method lstm --second-order 1", "--second-order"),
    (train, "--data {data} --batch 2 --step 20", "--step"),
    (train, "--data {data} --batch 2 --init none.pt", "no checkpoint none.pt"),
    (train, "--data {data} --batch 2 --init strange.pt", "not a checkpoint"),
    (train, "--data {data} --batch 2 --init mil.pt", "mil"),
    (train, "--data {data} --batch 2 --init small.pt", "small.pt"),
    (train, "--data {data} --steps 20 --minutes 1", "not both"),
    (train, "--data {data} --steps 5", "5 is not within 20"),
    (train, "--data {data} --minutes inf", "--minutes"),
    (train, "--data /proc/none", "/proc/none"),
    (train, "--data {trained}", "data.py --out"),
    (train, "--preset smoke --data data/smock", "no data set in data/smock"),
    (train, "--preset none", "--preset"),
    (train, "--preset paper --method mil", "leave it out"),
    (train, "--resume --name none", "no checkpoint"),
    (train, "--resume --name run --lr 0.1", "another --lr"),
    (train, "--resume --name run --method mil", "another --method"),
    (train, "--resume --name run --steps 70", "another --steps"),
    (train, "--resume --name run --data other", "no data set in other"),
    (train, "--resume --name run --preset paper", "another --preset (ours)"),
    (train, "--resume --name run --init best.pt", "another --init (None)"),
    (train, "--resume --name gpu", "choose --device cpu"),
    (train, "--resume --name torn", "does not hold the state"),
    (train, "--data {data} --name run", "holds a run"),
    (train, "--resume --name weights", "weights only"),
    (train, "--resume --name moved", "no data set in moved-data"),
    (train, "--resume --name changed", "not the data set"),
    (evaluate, "--embedding-map none/map.png --data {data} --tasks 2 --checkpoint {trained}", "none/map.png"),
    (evaluate, "--out e --data {data} --checkpoint {trained}", "2 test tasks, not 74"),
    (evaluate, "--out e --data {data} --tasks 2 --shots 5 --checkpoint {trained}", "5 shots"),
    (evaluate, "--out e --checkpoint none.pt", "no checkpoint none.pt"),
    (evaluate, "--out e --checkpoint {data}/manifest.json", "not a checkpoint"),
    (evaluate, "--out e --checkpoint {data}/train/00000.npz", "not a checkpoint"),
    (evaluate, "--out e --checkpoint {data}", "Is a directory"),
    (evaluate, "--out e --checkpoint small.pt", "trained on images of 64 pixels"),
    (evaluate, "--out e --checkpoint mixed.pt", "usable weights"),
    (evaluate, "--out e --checkpoint strange.pt", "not a checkpoint"),
    (evaluate, "--out e --checkpoint nan.pt", "usable weights"),
    (evaluate, "--out e --checkpoint flat.pt", "usable weights"),
    (evaluate, "--out e --checkpoint frames.pt", "usable weights"),
    (evaluate, "--out e --checkpoint options.pt", "not a checkpoint"),
    (evaluate, "--out e --checkpoint negative.pt", "usable weights"),
    (train, "--data empty --batch 2", "0 train tasks"),
    (train, "--data foreign --batch 2 --support 2", "of another task"),
    (evaluate, "--out foreign-rows --policy expert --tasks 2 --trials 1", "another evaluation"),
    (evaluate, "--out conflict --policy expert --tasks 2 --trials 1", "another evaluation"),
    (evaluate, "--out e --checkpoint malice.pt", "not a checkpoint"),
    (evaluate, "--out e --checkpoint old.pt", "format 1"),
    (evaluate, "--out e --policy nobody", "--policy"),
    (evaluate, "--out e --task 52", "--task 52"),
    (evaluate, "--out e --only 2 --data {data} --checkpoint {trained}", "2 test tasks"),
    (evaluate, "--out e --checkpoint {trained} --method mil", "of the method tecnets"),
    (evaluate, "--out e --checkpoint mil.pt --policy no-demo", "of the method mil"),
    (evaluate, "--embedding-map map.png --data {data} --tasks 2 --checkpoint mil.pt", "only tecnets"),
    (evaluate, "--embedding-map map.png --policy expert", "only tecnets"),
    (evaluate, "--out e --split holdout", "--split"),
    (evaluate, "--out /proc/none --policy expert", "/proc/none"),
    (evaluate, "--out done --policy expert", "another evaluation"),
    (evaluate, "--out other --policy expert", "another evaluation"),
    (evaluate, "--out torn --policy expert", "trials.jsonl is damaged"),
])
def test_bad_input(module, words, message, bad_files, data_set, trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(bad_files, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    before, stored = stamps(Path()), stamps(data_set)
    places = {"data": data_set, "trained": trained / "best.pt"}
    assert message.format(**places) in refuse(capsys, monkeypatch, module, *words.format(**places).split())
    after = stamps(Path())
    assert before.items() <= after.items() and stored == stamps(data_set)  # nothing lost
    assert {path.name for path in after.keys() - before.keys()} <= {"trials.jsonl"}  # nothing run: that one is begun


def flipped(content, bit):
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def test_every_bit_that_is_stored_is_checked(data_set, trained, tmp_path):
    folder, rng = tmp_path / "push", np.random.default_rng(0)
    shutil.copytree(data_set, folder)
    shutil.copy(trained / "best.pt", tmp_path)
    for path, read in ((folder / "manifest.json", lambda: data.read_manifest(folder)),
                       (data.task_path(folder, "train", 2), lambda: data.TaskSet(folder, "train")),
                       (tmp_path / "best.pt", lambda: train.load_model(tmp_path / "best.pt"))):
        content = path.read_bytes()
        bits = [0, 8 * len(content) - 1, *rng.integers(8 * len(content), size=50).tolist()]
        for damaged in (content[:len(content) // 2], content[:-1], b"", b"hello", content[1:],
                        *(flipped(content, bit) for bit in bits)):
            path.write_bytes(damaged)
            with pytest.raises(common.UserError, match="damaged|version"):
                read()
        path.write_bytes(content)
        read()


def test_crafted_archives_take_no_memory(data_set, tmp_path):
    """Files whose checksum fits, but whose headers promise more than there is."""
    shutil.copytree(data_set, tmp_path / "push")
    path, identity = data.task_path(tmp_path / "push", "train", 0), data.task_identity(data.read_manifest(data_set), "train", 0)
    with np.load(path) as archive:
        arrays = dict(archive)
    for name, array in (("states", np.zeros((4, 100, 21), np.float32)), ("offsets", arrays["offsets"] * 10 ** 9),
                        ("offsets", arrays["offsets"] - 1), ("actions", np.array([[Malice()]])),
                        ("frames", arrays["frames"][:-1]), ("frames", arrays["frames"][:, None])):
        common.write_checked(path, lambda file: (np.savez(file, **{**arrays, name: array}), file.write(identity)))
        with pytest.raises(common.UserError, match="damaged|another data set"):
            data.TaskSet(tmp_path / "push", "train")
    common.write_checked(path, lambda file: (np.savez_compressed(file, **arrays), file.write(identity)))
    with pytest.raises(common.UserError, match="damaged"):
        data.TaskSet(tmp_path / "push", "train")


def test_a_full_disk_is_one_line(tmp_path):
    """A file system of 1 MB, in a mount namespace of the test's own."""
    script = f"mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} {HERE}/data.py --out {tmp_path}/d --workers 1"
    with started("unshare", "-rm", "true", stderr=subprocess.DEVNULL) as process:
        if process.wait(10):
            pytest.skip("no user namespaces here")
    with started("unshare", "-rm", "sh", "-c", script, stderr=subprocess.PIPE) as process:
        message = process.communicate(timeout=200)[1]
    assert process.returncode == 2 and "No space left" in message and "make room" in message and message.count("\n") == 1


ROUNDS = """
import locale, sys, threading, sim
locale.setlocale(locale.LC_ALL, "")
sums = [0] * 3
def rounds(index):
    env = sim.PushEnv()
    for seed in range(2):
        obs, _ = env.reset(seed=seed, options={"task": sim.make_task("test", index)})
        env.step(sim.expert_action(env))
    sums[index] = obs["image"].sum()
threads = [threading.Thread(target=rounds, args=(index,)) for index in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sums, locale.str(0.5))
"""


def test_threads_locales_and_temporary_folders(tmp_path):
    """PushEnv works from several threads, under any locale, with temporary files in a folder of any name."""
    for name in ("UTF-8", "ISO-8859-1") if shutil.which("localedef") else ():
        subprocess.run(["localedef", "-i", "de_DE", "-f", name, f"./de_DE.{name}"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    (tmp_path / "ü").mkdir()
    printed = []
    for settings in ({}, {"LC_ALL": "de_DE.UTF-8"}, {"LC_ALL": "de_DE.ISO-8859-1", "TMPDIR": f"{tmp_path}/ü"}):
        if settings and not (tmp_path / settings["LC_ALL"]).exists():
            continue
        with started(sys.executable, "-c", ROUNDS, env={**ENVIRONMENT, "LC_ALL": "C", "LOCPATH": str(tmp_path),
                     "PYTHONPATH": str(HERE), **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            line, complaint = process.communicate(timeout=100)
        assert not complaint, complaint
        printed.append(line)
    assert printed[0].endswith("0.5\n") and all(line == printed[0].replace("0.5", "0,5") for line in printed[1:])


def test_no_room_for_temporary_files(tmp_path):
    env, task = sim.PushEnv(), {"task": sim.make_task("test", 0)}
    for folder in ("none", "file"):
        (tmp_path / "file").write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sim.tempfile, "tempdir", str(tmp_path / folder))
            with pytest.raises(OSError, match=f"{folder}.*TMPDIR"):
                env.reset(seed=0, options=task)
    env.reset(seed=0, options=task)
    env.close()


def test_a_data_set_that_is_being_written_is_left_alone(data_set):
    with open(data_set / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(common.UserError, match="another process"):
            data.generate(data_set, COUNTS, demos=4, seed=3)


def test_a_loss_that_is_not_finite_stops_the_run(data_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = start_run(data_set, "bad")
    job.model.control_net.head[-1].bias.data[0] = math.inf
    before = {name: p.clone() for name, p in job.model.named_parameters()}
    with pytest.raises(common.UserError, match="step 1: .* not finite"):
        job.train(stop=lambda: False)
    assert all(torch.equal(p, before[name]) for name, p in job.model.named_parameters())


def test_the_tables_are_those_of_the_results():
    for path, text in runpy.run_path(HERE / "results" / "readme.py")["filled"]().items():
        assert text == Path(path).read_text(), path
