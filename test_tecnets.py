"""Tests: values worked out by hand or by a slow independent formulation, and the promises of the README."""
import contextlib
import fcntl
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

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import baselines
import benchmark
import data
import evaluate
import sim
import train
from tecnets import ControlNet, Settings, TecNets, embedding_loss, sentence

HERE = Path(__file__).parent
COUNTS = {"train": 4, "val": 2, "test": 2}
THREADS = 2  # sums depend on their number
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
torch.set_num_threads(THREADS)


def run(*args, cwd, code=0):
    """Run a program of this project as a user does."""
    result = subprocess.run([sys.executable, HERE / args[0], *map(str, args[1:])], cwd=cwd,
                            capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="session")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "push"
    data.generate(folder, COUNTS, demos=4, seed=3, workers=2)
    return folder


def batch_of(B=5, K=2, Q=1, M=2, size=13, dtype=torch.float64):
    """A random batch at a small image size."""
    g = torch.Generator().manual_seed(0)
    images = lambda *shape: torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8, generator=g)
    return {"ends_U": images(B, K, 2), "ends_q": images(B, Q, 2), "images": images(B, 2, M),
            "states": torch.randn(B, 2, M, 20, generator=g, dtype=dtype),
            "actions": torch.randn(B, 2, M, 7, generator=g, dtype=dtype)}


def small_model(**settings):
    torch.manual_seed(0)
    return TecNets(Settings(image_size=13, **settings)).double()


def gradients(model, batch, chunk):
    model.zero_grad()
    losses = model.backward(batch, chunk)
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


# The method -----------------------------------------------------------------------------------

def test_sentence_by_hand():
    f = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(sentence(f), torch.tensor([3, 1]) / 10 ** 0.5)
    torch.testing.assert_close(sentence(f, "norm-mean-norm"), torch.tensor([1, 1]) / 2 ** 0.5)


def test_sentence_is_normalised_per_task():
    f = torch.tensor([[[3.0, 0.0]], [[0.0, 0.5]]])  # 2 tasks, 1 demo each
    torch.testing.assert_close(sentence(f), torch.eye(2))
    torch.testing.assert_close(sentence(f[:1]), sentence(f)[:1])


@pytest.mark.parametrize("negatives, normalise, loss, accuracy", [
    ("queries", False, 0.15, 0.5), ("queries", True, 0.0, 1.0), ("sentences", False, 0.0, 1.0)])
def test_embedding_loss_by_hand(negatives, normalise, loss, accuracy):
    s_U = sentence(torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]]))
    s_q = torch.tensor([[[1.0, 0.5]], [[0.2, 0.3]]])
    s_q = F.normalize(s_q, dim=-1) if normalise else s_q
    got = embedding_loss(s_U, s_q, 0.1, negatives)
    assert got[0].item() == pytest.approx(loss) and got[1].item() == accuracy


def looped_embedding_loss(s_U, s_q, margin, negatives):
    B, Q = s_q.shape[:2]
    terms = [F.relu(margin - s_q[j, k] @ s_U[j] + (s_q[j, k] @ s_U[i] if negatives == "sentences" else s_q[i, k] @ s_U[j]))
             for j in range(B) for i in range(B) for k in range(Q) if i != j]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["sentences", "queries"])
def test_embedding_loss_against_loops(negatives):
    """Loss and its gradients to both sides."""
    g = torch.Generator().manual_seed(1)
    s = [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4, 2, 3))]
    got, expected = embedding_loss(*s, 0.3, negatives)[0], looped_embedding_loss(*s, 0.3, negatives)
    torch.testing.assert_close(got, expected)
    for ours, plain in zip(torch.autograd.grad(got, s), torch.autograd.grad(expected, s)):
        assert plain.abs().max() > 0
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("normalise", [True, False])
def test_norm_of_the_embedding_and_the_loss(normalise):
    """A larger norm leaves the loss as it is with normalised queries, and changes it with raw ones."""
    model, batch = small_model(normalise_queries=normalise), batch_of()
    small = model.backward(batch)["loss_emb"].item()
    with torch.no_grad():
        for p in model.embedding_net.head[-1].parameters():
            p *= 10
    large = model.backward(batch)["loss_emb"].item()
    assert (large == pytest.approx(small, rel=1e-9)) == normalise and small > 0


@pytest.mark.parametrize("size", [13, 16, 125])
def test_control_net_equals_the_tiled_formulation(size):
    """Tiling the sentence to E planes gives the same actions and gradients, borders included."""
    torch.manual_seed(0)
    net = ControlNet(Settings(image_size=size)).double()
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 2, size, size, 3), dtype=torch.uint8, generator=g)
    states, s = torch.randn(3, 2, 20, generator=g, dtype=torch.float64), torch.randn(3, 20, generator=g, dtype=torch.float64)
    s.requires_grad_()

    def tiled():
        planes = (images.flatten(0, 1).double() / 127.5 - 1).movedim(-1, 1)
        planes = torch.cat([planes, s.repeat_interleave(2, 0)[..., None, None].expand(-1, -1, size, size)], 1)
        return net.head(torch.cat([net.convolutions(planes), states.flatten(0, 1)], 1)).unflatten(0, (3, 2))

    results = []
    for actions in (tiled(), net(images, states, s)):
        results.append([actions, *torch.autograd.grad(actions.square().sum(), [s, *net.parameters()])])
    for plain, ours in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk", [4, 9, 256])  # parts of 1, of 2 and 1, of all tasks
@pytest.mark.parametrize("options", [{}, dict(support_mean="norm-mean-norm", negatives="queries", margin=0.5,
                                              normalise_queries=False, lambda_emb=0.7, lambda_U=0.2, lambda_q=0.5)])
def test_chunked_backward_equals_one_big_backward(chunk, options):
    model, batch = small_model(**options), batch_of()
    c = model.settings
    f = model.embedding_net(torch.cat([batch["ends_U"], batch["ends_q"]], 1).flatten(0, 1)).unflatten(0, (5, 3))
    s_U = sentence(f[:, :2], c.support_mean)
    s_q = F.normalize(f[:, 2:], dim=-1) if c.normalise_queries else f[:, 2:]
    plain = c.lambda_emb * looped_embedding_loss(s_U, s_q, c.margin, c.negatives)
    for i, weight in enumerate((c.lambda_U, c.lambda_q)):
        prediction = model.control_net(batch["images"][:, i], batch["states"][:, i], s_U)
        plain = plain + weight * (prediction - batch["actions"][:, i]).square().mean()
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(plain, list(model.parameters()))))
    losses, got = gradients(model, batch, chunk)
    assert losses["loss"].item() == pytest.approx(plain.item(), rel=1e-9)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_the_benchmark_compares_equals():
    """Its plain training step and action are those of the method."""
    model, plain, batch = small_model(), small_model().to(memory_format=torch.contiguous_format), benchmark.random_batch(5, 13)
    batch = {name: values if values.dtype == torch.uint8 else values.double() for name, values in batch.items()}
    model.backward(batch)
    benchmark.plain_step(plain, batch)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-12)
    images, states, s = batch["images"][:, 0, 0], batch["states"][:, 0, 0], torch.randn(5, 20, dtype=torch.float64)
    torch.testing.assert_close(model.predict(images[:, None], states[:, None], s)[:, 0],
                               benchmark.plain_control(plain.control_net, images, states, s))


def test_control_loss_trains_the_embedding_net():
    model = small_model(lambda_emb=0.0)
    _, got = gradients(model, batch_of(), 256)
    assert all(grad.abs().max() > 0 for name, grad in got.items() if name.startswith("embedding_net"))


def test_architecture_of_the_official_code():
    model = TecNets()
    count = lambda module: sum(p.numel() for p in module.parameters())
    convolutions = lambda planes: 25 * 16 * (planes + 3 * 16) + 4 * 16 + 4 * 2 * 16
    layers = lambda n, out: (n + 1) * 200 + 2 * 201 * 200 + 201 * out
    assert count(model.embedding_net) == convolutions(6) + layers(8 * 8 * 16, 20)
    assert count(model.control_net) == convolutions(23) + layers(8 * 8 * 16 + 20, 7)


def test_bfloat16_gives_nearly_the_same_gradient():
    torch.manual_seed(0)
    model, batch = TecNets(), batch_of(B=4, size=125, dtype=torch.float32)
    _, exact = gradients(model, batch, 256)
    model.bfloat16 = True
    _, rounded = gradients(model, batch, 256)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rounded)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


def test_act_is_the_prediction_for_one_observation():
    model, batch = small_model().float().eval(), batch_of(dtype=torch.float32)
    s = model.embed(batch["ends_U"])
    expected = model.predict(batch["images"][:, 1], batch["states"][:, 1], s)[3, 1]
    torch.testing.assert_close(model.act(batch["images"][3, 1, 1], batch["states"][3, 1, 1], s[3]), expected)


@pytest.mark.parametrize("ends, used", [("both", (0, 1)), ("first", (0,)), ("last", (1,))])
def test_frames_that_are_embedded(ends, used):
    model, demos = small_model(ends=ends), batch_of()["ends_U"]
    assert model.embedding_net.convolutions[0].in_channels == 3 * len(used)
    for end in (0, 1):
        other = demos.clone()
        other[:, :, end] = 0
        assert torch.equal(model.embed(demos), model.embed(other)) == (end not in used)


# The baselines --------------------------------------------------------------------------------

def small_baseline(method, **settings):
    """With weights of ordinary size, so that gradients are."""
    torch.manual_seed(0)
    model = method(baselines.Settings(image_size=32, lstm_units=16, units=12, **settings)).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return model


def frames_batch(n=3, **sizes):
    """A random batch for a baseline, with n frames a demonstration."""
    batch = batch_of(size=32, **sizes)
    g = torch.Generator().manual_seed(1)
    batch["ends_U"] = torch.randint(0, 256, (*batch["ends_U"].shape[:2], n, 32, 32, 3), dtype=torch.uint8, generator=g)
    return batch


def test_feature_points_of_a_bright_pixel():
    maps = torch.zeros(2, 3, 8, 6)
    maps[1, 2, 5, 1] = 1000
    points = baselines.feature_points(maps)
    torch.testing.assert_close(points[1, [2, 5]], torch.tensor([(1 - 3) / 6, (5 - 4) / 8]))
    torch.testing.assert_close(points[0], torch.tensor([-0.5 / 6] * 3 + [-0.5 / 8] * 3))


def test_parameters_that_the_inner_step_changes():
    assert list(baselines.MIL()._adapted()) == [
        "image_transform", "bias_transform", *(f"vision.{i}.{part}" for i in (0, 3, 6, 9) for part in ("weight", "bias")),
        "second.weight", "second.bias"]


def test_inner_step_by_hand():
    """Every parameter p of the inner pass becomes p - 0.01 clip(gradient, -10, 10), the rest stays; some are clipped."""
    model, batch = small_baseline(baselines.MIL), frames_batch()
    image, state = batch["images"][0, 0, :1], batch["states"][0, 0, :1]
    adapted = model.predict(image[None], state[None], model.embed(batch["ends_U"][:1]))[0]
    (50 * model.net(batch["ends_U"][0].flatten(0, 1))).square().mean().backward()
    clipped = 0
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            if p.grad is not None and not (name.startswith("vision") and int(name.split(".")[1]) % 3 == 1):  # norm biases
                clipped += (p.grad.abs() > 10).sum()
                p -= 0.01 * p.grad.clamp(-10, 10)
    assert clipped > 10
    torch.testing.assert_close(adapted, model.net(image, state))


def test_meta_gradient_against_finite_differences():
    model, batch = small_baseline(baselines.MIL, inner_scale=5.0), frames_batch(B=2, K=1)
    model.net.image_transform.data.fill_(0.3)  # away from the kink of its clipping
    model.backward(batch)
    rng, relative = torch.Generator().manual_seed(0), []
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        losses, h = [], 1e-8  # small: an inner gradient jumps where a unit switches off
        with torch.no_grad():
            for sign in (1, -1):
                p += sign * h * direction
                contexts = model.embed(batch["ends_U"])
                losses.append((model.predict(batch["images"][:, 1], batch["states"][:, 1], contexts) - batch["actions"][:, 1])
                              .square().mean().item())
                p -= sign * h * direction
        difference, slope = (losses[0] - losses[1]) / (2 * h), (p.grad * direction).sum().item()
        relative.append(abs(slope - difference) / max(abs(difference), 1e-3))
    assert max(relative) < 1e-3, relative


def test_first_order_meta_gradient():
    """It is the control loss' gradient at the adapted parameters; the inner loss has none."""
    model, batch = small_baseline(baselines.MIL, second_order=False, inner_scale=5.0), frames_batch(B=1, K=1)
    model.backward(batch)
    context = model.embed(batch["ends_U"]).detach().requires_grad_()
    F.mse_loss(model.predict(batch["images"][:, 1], batch["states"][:, 1], context), batch["actions"][:, 1]).backward(inputs=[context])
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model._adapted().values()]), context.grad[0])
    assert context.grad.abs().max() > 0
    assert {name for name, p in model.net.named_parameters() if p.grad is None} == {
        f"inner_{layer}.{part}" for layer in ("first", "head") for part in ("weight", "bias")}


def test_the_lstm_reads_the_demo_and_then_the_observation():
    model, batch = small_baseline(baselines.LSTM), frames_batch(B=1, K=1, n=4)
    images = torch.cat([batch["ends_U"][0, 0], batch["images"][0, 1, :1]])
    states = torch.cat([torch.zeros(4, 20, dtype=torch.float64), batch["states"][0, 1, :1]])
    expected = model.head(model.lstm(model._features(images, states)[:, None])[0][-1, 0])
    torch.testing.assert_close(model.act(images[-1], states[-1], model.embed(batch["ends_U"][0])), expected)


def test_bfloat16_baselines():
    for method in (baselines.Contextual, baselines.LSTM):
        model, batch, gradients_ = small_baseline(method).float(), frames_batch(dtype=torch.float32), []
        for model.bfloat16 in (False, True):
            model.backward(batch)
            gradients_.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            model.zero_grad()
        assert not torch.equal(*gradients_) and F.cosine_similarity(*gradients_, dim=0) > 0.98


@pytest.mark.parametrize("demo_frames", [2, 5])
def test_a_policy_reads_evenly_spaced_frames(demo_frames):
    frames = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    policy = evaluate.NetworkPolicy(small_baseline(baselines.LSTM), demo_frames)
    times = {2: [0, 99], 5: [0, 25, 50, 74, 99]}[demo_frames]
    contexts = []
    for given in (frames, frames[times]):  # a whole demonstration, as recorded, or what is needed of one
        policy.adapt([{"frames": given}])
        contexts.append(policy.context)
    assert torch.equal(*contexts) and torch.equal(contexts[0], policy.model.embed(torch.from_numpy(frames[None, times])))


@pytest.mark.parametrize("method", [baselines.Contextual, baselines.LSTM])
def test_actions_are_averaged_over_demos(method):
    model, batch = small_baseline(method), frames_batch(K=3)
    images, states = batch["images"][:, 1], batch["states"][:, 1]
    each = [model.predict(images, states, model.embed(batch["ends_U"][:, [k]])) for k in range(3)]
    torch.testing.assert_close(model.predict(images, states, model.embed(batch["ends_U"])), torch.stack(each).mean(0))
    assert (each[0] - each[1]).abs().max() > 1e-9


@pytest.mark.parametrize("method", [baselines.Contextual, baselines.LSTM, baselines.MIL])
def test_baseline_in_chunks(method):
    """A backward in chunks is that of the whole; one observation acts as in a batch."""
    model, batch = small_baseline(method), frames_batch()
    results = []
    for chunk in (1, 10 ** 6):
        losses = model.backward(batch, chunk)
        results.append([losses["loss"], *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        whole = model.predict(batch["images"][:, 1], batch["states"][:, 1], model.embed(batch["ends_U"]))
        one = model.act(batch["images"][2, 1, 1], batch["states"][2, 1, 1], model.embed(batch["ends_U"][2]))
    torch.testing.assert_close(one, whole[2, 1])


@pytest.mark.parametrize("name", train.METHODS)
def test_every_method_learns_two_tasks(name):
    """The demonstration alone tells the action: a bright square on the left or on the right of its last frame."""
    torch.manual_seed(0)
    network, settings, _ = train.METHODS[name]
    model, batch = network(settings(image_size=32)), frames_batch(B=2, K=1, M=4, n=2, dtype=torch.float32)
    batch["ends_U"][:] = 30
    for task, columns in enumerate((slice(2, 12), slice(20, 30))):
        batch["ends_U"][task, :, -1, 10:20, columns] = 250
    batch["ends_q"] = batch["ends_U"]
    batch["images"][:], batch["states"][:] = 30, 0
    batch["actions"][:] = torch.tensor([1.0, -1.0])[:, None, None, None]
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(400):
        losses = model.backward(batch)
        optimiser.step()
        optimiser.zero_grad()
        if losses["loss_q"] < 0.05:
            return
    pytest.fail(f"control loss {losses['loss_q']:.3f} of 1")


# The simulator --------------------------------------------------------------------------------

def test_splits_share_no_mesh_and_pairs_are_swapped():
    used = {split: {body.mesh_id for i in range(800) for task in [sim.make_task(split, i)]
                    for body in (task.target, task.distractor)} for split in sim.SPLITS}
    assert not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]
    for index in range(0, 20, 2):
        a, b = sim.make_task("test", index), sim.make_task("test", index + 1)
        assert (a.target, a.distractor) == (b.distractor, b.target) and a == sim.make_task("test", index) != b


def test_start_ranges():
    env = sim.PushEnv(render=False)
    for seed in range(30):
        side = (-1, 1)[seed % 2]
        env.reset(seed=seed, options={"task": sim.make_task("train", seed), "side": side})
        target, distractor = env.target_position[:2], env.distractor_position[:2]
        for x, y in (target, distractor):
            assert -0.3 <= x <= 0 and abs(y) <= 0.2 and math.hypot(x, y) > 0.17
        assert np.sign(target[1]) == side == -np.sign(distractor[1])
        assert np.linalg.norm(target - distractor) > 0.1 and np.abs(env.dq).max() <= 0.005
    env.close()


@pytest.fixture(scope="module")
def expert_trials():
    """Success, joint speeds and lowest object height of the expert on a few test tasks."""
    env, results = sim.PushEnv(render=False), []
    for index in range(8):
        env.reset(seed=index, options={"task": sim.make_task("test", index)})
        speeds, heights = [], []
        for _ in range(sim.HORIZON):
            *_, truncated, info = env.step(sim.expert_action(env))
            speeds.append(np.abs(env.dq).max())
            heights.append(min(env.target_position[2], env.distractor_position[2]))
        assert truncated
        results.append((info["success"], max(speeds), min(heights)))
    env.close()
    return np.array(results)


def test_expert_solves_tasks(expert_trials):
    assert expert_trials[:, 0].all()


def test_joint_speeds_and_objects_stay_bounded(expert_trials):
    assert expert_trials[:, 1].max() < 3 and expert_trials[:, 2].min() > 0


def test_random_actions_solve_nothing():
    rows = evaluate.run_trials("random", "test", tasks=4, trials=2, shots=0, seed=0, workers=2)
    assert len(rows) == 8 and not any(row["success"] for row in rows)


def test_an_episode_depends_on_task_and_seed_only():
    def states(env, index, steps=30):
        obs, _ = env.reset(seed=5, options={"task": sim.make_task("train", index)})
        rng = np.random.default_rng(0)
        return np.stack([obs["state"]] + [env.step(rng.uniform(-1, 1, 7))[0]["state"] for _ in range(steps)])
    one, other = sim.PushEnv(render=False), sim.PushEnv()
    first = states(one, 0)
    states(other, 1)
    assert (states(other, 0) == first).all()  # after another task, beside another client, with rendering
    one.close()
    other.close()


def test_the_tasks_of_a_pair_start_from_the_same_scene():
    """So that a policy that is not told the task does the same in both, and solves one of them at best."""
    frames, places = [], []
    for index in (4, 5):
        env = sim.PushEnv()
        obs, _ = env.reset(seed=3, options={"task": sim.make_task("test", index), "swap": index == 5})
        rng = np.random.default_rng(0)
        frames.append([obs["image"]] + [env.step(rng.uniform(-1, 1, 7))[0]["image"] for _ in range(40)])
        places.append([env.target_position, env.distractor_position])
        env.close()
    assert (np.array(frames[0]) == frames[1]).all()
    assert (np.array(places[0]) == places[1][::-1]).all()


@pytest.mark.parametrize("swap", [False, True])
def test_the_target_starts_on_the_side_asked_for(swap):
    env = sim.PushEnv(render=False)
    for side in (-1, 1):
        env.reset(seed=1, options={"task": sim.make_task("test", 0), "side": side, "swap": swap})
        assert env.target_position[1] * side > 0 > env.distractor_position[1] * side
    env.close()


def test_the_mirrored_arm():
    """Mirrored joints give the mirrored state and picture, and nearly the mirrored action (objects out of sight)."""
    env, rng = sim.PushEnv(), np.random.default_rng(0)
    env.reset(seed=0, options={"task": sim.make_task("train", 0)})
    for body in (env.target, env.distractor):
        env.client.resetBasePositionAndOrientation(body, (5, 5, 0.1), (0, 0, 0, 1))
    for _ in range(5):
        q = (0.3, 1.7, 0, -1.7, 0, -0.4, 0.3) + rng.normal(0, 0.05, 7)  # well in view, on one side
        dq, twist = rng.normal(0, 0.1, 7), rng.normal(0, 0.1, 6)
        observations, actions = [], []
        for joints, axes in ((1, 1), (sim.MIRRORED_ACTION, (1, -1, 1, -1, 1, -1))):
            for joint in range(7):
                env.client.resetJointState(env.arm, joint, (q * joints)[joint], (dq * joints)[joint])
            observations.append(env._observe())
            actions.append(sim._joint_control(env, twist * axes, np.zeros(2)))
        (one, other), images = (obs["state"] for obs in observations), [obs["image"].astype(int) for obs in observations]
        np.testing.assert_allclose(one * sim.MIRRORED_STATE, other, atol=1e-6)
        assert 2 * np.abs(images[0][:, ::-1] - images[1]).mean() < np.abs(images[0] - images[1]).mean()
        assert (actions[0] * sim.MIRRORED_ACTION - actions[1]).std() < 0.05 < (actions[0] - actions[1]).std()
    env.close()


def test_the_picture_belongs_to_the_state_and_is_complete(monkeypatch):
    """Same picture as drawn anew, with every link of the arm and the table behind it."""
    def film(seed):
        env = sim.PushEnv()
        obs, _ = env.reset(seed=seed, options={"task": sim.make_task("train", seed)})
        frames = [obs["image"]]
        for _ in range(40):
            frames.append(env.step(sim.expert_action(env))[0]["image"])
        return env, np.stack(frames)
    env, frames = film(1)
    assert frames.dtype == np.uint8 and frames.shape == (41, 125, 125, 3)
    assert (env._image() == frames[-1]).all() and (frames[-1] != frames[-2]).any()
    client, n = env.client, 125
    table = client.createVisualShape(client.GEOM_BOX, halfExtents=(2, 2, 0.01), rgbaColor=(*sim.TABLE_RGB, 1))
    client.createMultiBody(0, -1, table, (0, 0, -0.01))
    disc = client.createVisualShape(client.GEOM_CYLINDER, radius=sim.GOAL_RADIUS, length=0.001,
                                    rgbaColor=(*sim.GOAL_RGB, 1))
    client.createMultiBody(0, -1, disc, (0, 0, 0.001))
    pixels, body = sim._camera(client, 2 * n)
    whole = pixels.view(np.uint8).reshape(n, 2, n, 2, 4)[..., :3].mean((1, 3))
    assert body.all() and np.abs(whole - frames[-1]).max() <= 0.5
    env.close()
    monkeypatch.setattr(sim, "DRAWN_LINKS", range(8))
    sim._arm_urdf.cache_clear()
    env, everything = film(1)
    env.close()
    sim._arm_urdf.cache_clear()
    assert (everything == frames).all()


EPISODES = int(os.environ.get("EPISODES", 30))


def body_corners(env, body, id_):
    """(V, 3) where the vertices of a body are."""
    _, vertices, _ = sim._mesh(body.mesh_id)
    scale, centre, _ = sim.body_shape(body)
    place, turn = env.client.getBasePositionAndOrientation(id_)
    return (vertices - centre) * scale @ np.reshape(env.client.getMatrixFromQuaternion(turn), (3, 3)).T + place


def random_episodes(numbers):
    """What some episodes of random actions, each held for 1, 5 or 25 steps, came to at worst; seeds are `numbers`."""
    env, memory = sim.PushEnv(render=False), []
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
    jobs = [range(EPISODES)[i::2] for i in range(2)]
    for result in data.parallel(random_episodes, jobs, workers=2):
        print(result)
        assert result["speed"] <= sim.MAX_SPEED and result["overshoot"] < 1
        assert result["depth"] < 0.01 and not result["unsaid"]
        first, last = result["memory"][len(result["memory"]) // 2], result["memory"][-1]  # settled by then
        assert last - first < 10


def test_a_lost_object_is_reported():
    env = sim.PushEnv(render=False)
    task = {"task": sim.make_task("train", 0)}
    assert not env.reset(seed=0, options=task)[1]["lost"]
    for body, place in ((env.target, (2.5, 0, 0.1)), (env.distractor, (0, -2.5, 0.1)), (env.target, (0, 0, -20))):
        env.reset(seed=0, options=task)
        env.client.resetBasePositionAndOrientation(body, place, (0, 0, 0, 1))
        assert env.step([0] * 7)[-1]["lost"]
    env.close()


def test_rendering_keeps_no_memory():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    env, sizes = sim.PushEnv(), []
    for seed in range(60):
        env.reset(seed=seed, options={"task": sim.make_task("train", seed % 4)})
        sizes.append(resident())
    env.close()
    assert sizes[-1] - sizes[20] < 2e6  # PyBullet's file cache took 6 MB


@pytest.mark.parametrize("action", [[0] * 6, [math.nan] * 7])
def test_bad_actions(action):
    env = sim.PushEnv(render=False)
    env.reset(seed=0, options={"task": sim.make_task("train", 0)})
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(action)
    env.close()


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
        process = subprocess.Popen([sys.executable, *map(str, command())], cwd=cwd, start_new_session=True,
                                   stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        before, deadline = written(), time.monotonic() + (100 if kill % 2 == 0 else rng.uniform(0, 5))
        while process.poll() is None and written() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            assert process.returncode == 0
            return
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{command()[0]}: kill {kill}")
        yield
    run(*command(), cwd=cwd)


def test_data_are_the_same_for_one_worker_and_after_kills(data_set, tmp_path):
    def written():
        return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npz")}
    folder, finished = tmp_path / "push", {}
    words = ["--out", folder, "--demos", 4, "--seed", 3, "--workers", 1]
    words += [word for split, n in COUNTS.items() for word in (f"--{split}", n)]
    for _ in kill_often(lambda: (HERE / "data.py", *words), tmp_path, written):
        assert finished.items() <= written().items()  # no finished task is made again
        finished = written()
        for path in finished:
            data.checked(path.read_bytes())
    assert finished and finished.items() <= written().items()
    assert contents(folder) == contents(data_set)


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


def test_loader(data_set):
    tasks = data.TaskSet(data_set, "train")
    loader = data.TaskLoader(tasks, B=3, K=2, Q=1, F=3, seed=0)
    for _ in range(20):
        b = next(loader)
        for i, task in enumerate(b["tasks"]):
            support, query = set(b["demos"][i, :2]), set(b["demos"][i, 2:])
            assert len(support) == 2 and len(query) == 1 and not support & query
            assert set(b["control_demos"][i, 0]) <= support and set(b["control_demos"][i, 1]) <= query
            assert (b["ends_q"][i, 0] == tasks.ends[task, b["demos"][i, 2]]).all()
            for side, k in np.ndindex(2, 3):
                at = task, b["control_demos"][i, side, k], b["times"][i, side, k]
                assert (b["images"][i, side, k] == tasks.frame(*at)).all()
                assert (b["states"][i, side, k] == tasks.states[at]).all()
                assert (b["actions"][i, side, k] == tasks.actions[at]).all()
        assert len(set(b["tasks"])) == 3
    state, expected = loader.state_dict(), next(loader)
    fresh = data.TaskLoader(tasks, B=3, K=2, Q=1, F=3, seed=9)
    fresh.load_state_dict(state)
    got = next(fresh)
    assert all((got[name] == expected[name]).all() for name in expected)


def test_mirrored_batches(data_set):
    tasks = data.TaskSet(data_set, "train")
    plain, mirrored = (data.TaskLoader(tasks, B=4, K=1, Q=1, F=2, seed=0, mirror=mirror).batch(1) for mirror in (False, True))
    assert not plain["mirrored"].any() and 0 < mirrored["mirrored"].sum() < 4
    for i, flipped in enumerate(mirrored["mirrored"]):
        for name in ("ends_U", "ends_q", "images"):
            assert (mirrored[name][i] == (plain[name][i][..., ::-1, :] if flipped else plain[name][i])).all()
        for name, signs in (("states", sim.MIRRORED_STATE), ("actions", sim.MIRRORED_ACTION)):
            assert (mirrored[name][i] == plain[name][i] * (signs if flipped else 1)).all()


def test_random_support(data_set):
    loader = data.TaskLoader(data.TaskSet(data_set, "train"), B=2, K=3, Q=1, F=1, seed=0, random_support=True)
    assert {loader.batch(i)["ends_U"].shape[1] for i in range(20)} == {1, 2, 3}


@pytest.mark.parametrize("early, share", [(1, 0.01), (3, 0.01 ** (1 / 3))])
def test_share_of_first_frames(data_set, early, share):
    loader = data.TaskLoader(data.TaskSet(data_set, "train"), B=4, K=1, Q=1, F=100, seed=0, early=early)
    times = np.stack([loader.batch(i)["times"] for i in range(10)])
    assert abs((times == 0).mean() - share) < 0.02 and times.max() == 99


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
    run("data.py", "--from-mil", mil, "--out", "mil", "--val", 1, cwd=tmp_path)
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
    run("data.py", "--from-mil", mil, "--out", "mil", "--val", 1, cwd=tmp_path)
    assert contents(tmp_path / "mil") == contents_
    run("train.py", "--data", "mil", "--name", "a", *TINY, "--batch", 2, "--val-tasks", 1, "--steps", 20, cwd=tmp_path)
    message = run("evaluate.py", "--data", "mil", "--split", "test", "--tasks", 1, "--checkpoint", "runs/a/last.pt",
                  "--out", "e", cwd=tmp_path, code=2).stderr
    assert "imported" in message
    message = run("train.py", "--data", "mil", "--name", "b", *TINY, "--batch", 2, "--mirror", 1, cwd=tmp_path, code=2).stderr
    assert "--mirror" in message


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
    shutil.copytree(mil / "sim_push", tmp_path / "mil")
    damage(tmp_path / "mil" / "demos_4.pkl", tmp_path / "mil" / "object_4" / "cond8.samp0.gif")
    with pytest.raises(data.UserError, match=message):
        data._import_task((tmp_path / "out", "train", 0, tmp_path / "mil" / "demos_4.pkl"))
    assert not (tmp_path / "malice").exists() and not (tmp_path / "out").exists()


# Training and evaluation ----------------------------------------------------------------------

TINY = ("--batch", 3, "--support", 2, "--samples", 1, "--steps", 60, "--validate-every", 20, "--validation-batches", 1)


@pytest.fixture(scope="session")
def trained(data_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run("train.py", "--data", data_set, "--name", "whole", *TINY, cwd=folder)
    return folder / "runs" / "whole"


@pytest.mark.parametrize("method", ["contextual", "lstm", "mil"])
def test_a_baseline_from_training_to_evaluation(method, data_set, tmp_path):
    run("train.py", "--data", data_set, "--method", method, *TINY, "--steps", 20, "--demo-frames", 3, cwd=tmp_path)
    checkpoint = f"runs/{method}/last.pt"
    run("evaluate.py", "--data", data_set, "--tasks", 1, "--trials", 1, "--shots", 1, 2, "--gif", 1, "--checkpoint", checkpoint,
        "--out", "filmed", cwd=tmp_path)  # frames picked from whole demonstrations
    run("evaluate.py", "--data", data_set, "--tasks", 1, "--trials", 1, "--shots", 1, 2, "--method", method, "--checkpoint",
        checkpoint, "--out", "e", cwd=tmp_path)
    filmed, report = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("filmed", "e"))
    assert [r["trials"] for r in filmed["results"]] == [r["trials"] for r in report["results"]]
    assert report["results"][0]["policy"] == method and report["network"]["adapt_ms"] > 0 and report["network"]["step"] == 20


def log_without_seconds(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_training_lowers_the_loss(trained):
    rows = [row for row in log_without_seconds(trained) if "loss_q" in row]
    assert rows[-1]["step"] == 60 and rows[-1]["loss_q"] < rows[0]["loss_q"]


def start_run(data_set, name):
    """A training run in this process, in runs/NAME of the current folder."""
    folder, *arguments = train.parse(["--data", str(data_set), "--name", name, *map(str, TINY)])
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


def test_killed_training_equals_uninterrupted(data_set, trained, tmp_path):
    folder, steps = tmp_path / "runs" / "cut", [0]

    def command():
        if (folder / "last.pt").exists():
            return HERE / "train.py", "--name", "cut", "--resume"
        return HERE / "train.py", "--data", data_set, "--name", "cut", *TINY

    def written():
        return [path.stat().st_mtime_ns for path in folder.glob("best.pt")]
    for _ in kill_often(command, tmp_path, written):
        if (folder / "last.pt").exists():
            steps.append(train.load_checkpoint(folder / "last.pt")["step"])
    assert steps == sorted(steps) and steps[-1] > 0
    assert_same_run(folder, trained)


def test_killed_evaluation_equals_uninterrupted(data_set, trained, tmp_path):
    words = ["--checkpoint", trained / "best.pt", "--data", data_set, "--tasks", 2, "--trials", 4, "--shots", 1, 2]
    words += ["--gif", 1]
    lines, record = [], tmp_path / "cut" / "trials.jsonl"

    def written():
        with contextlib.suppress(FileNotFoundError):  # before the beginning, and from the end on
            return len(record.read_text().splitlines())
    for _ in kill_often(lambda: (HERE / "evaluate.py", *words, "--out", "cut"), tmp_path, written):
        if record.exists():
            now = record.read_text().split("\n")[:-1]
            assert now[:len(lines)] == lines and len(set(now)) == len(now)  # nothing lost, nothing run twice
            lines = now
    run("evaluate.py", *words, "--out", "whole", cwd=tmp_path)
    cut, whole = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("cut", "whole"))
    assert lines and [r["trials"] for r in cut] == [r["trials"] for r in whole] and cut[0]["n_trials"] == 8
    gifs = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.gif")} for name in ("cut", "whole")]
    assert gifs[0] == gifs[1] and len(gifs[0]) == 2
    assert "8 " in run("evaluate.py", *words, "--out", "cut", cwd=tmp_path).stdout  # the table again


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(signal_, tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "data.py", "--out", tmp_path / "d", "--workers", "2"],
                               stderr=subprocess.PIPE, text=True)
    while len(workers := children(process.pid)) < 3:  # two and multiprocessing's tracker
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal_)
    start = time.monotonic()
    while any(Path(f"/proc/{pid}/fd").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < start + 5
        time.sleep(0.1)
    assert process.wait(5) == (-signal_ if signal_ == signal.SIGKILL else 128 + signal_)
    assert signal_ == signal.SIGKILL or process.stderr.read() == ""


def test_a_terminated_run_saves_and_says_how_to_go_on(data_set, tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "train.py", "--data", data_set, *map(str, TINY), "--steps", "9999"],
                               cwd=tmp_path, text=True, stdout=subprocess.PIPE, env=ENVIRONMENT)
    process.stdout.readline()  # says that it begins
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate(timeout=5)[0] and process.returncode == 128 + signal.SIGTERM
    assert train.load_checkpoint(tmp_path / "runs" / "ours" / "last.pt")["step"] < 9999


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


def test_demonstrations_on_the_fly_are_those_of_the_data_set(data_set, trained, monkeypatch):
    """The same rows with the demonstrations of the data set and with those recorded by the evaluation."""
    monkeypatch.setattr(evaluate, "FULL_DATA", {"demos": 4, "seed": 3})
    arguments = ("tecnets", "test", 1, 1, 2, 0, 1, (trained / "best.pt").read_bytes())
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


def test_wilson_interval():
    assert evaluate.wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert evaluate.wilson(0, 444)[0] == 0 and evaluate.wilson(444, 444)[1] == 1


def test_bfloat16_trains_alike(data_set, trained, tmp_path):
    """The same run in float32 ends with nearly the same losses."""
    run("train.py", "--data", data_set, "--name", "exact", "--bfloat16", 0, *TINY, cwd=tmp_path)
    ends = [[row for row in log_without_seconds(folder) if "loss_q" in row][-1]
            for folder in (tmp_path / "runs" / "exact", trained)]
    assert ends[0]["loss_q"] == pytest.approx(ends[1]["loss_q"], rel=0.1)


# Bad input ------------------------------------------------------------------------------------

def refuse(capsys, monkeypatch, module, *words):
    """The one line with which a program refuses its arguments; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data.command(module.main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1, line
    return line


MAY_BE_ZERO = ("--margin", "--lambda-emb", "--lambda-U", "--lambda-q", "--normalise-queries", "--seed", "--bfloat16",
               "--random-support", "--mirror", "--lr", "--second-order", "--gif")
NUMBERS = [(data, "--out d", flag) for flag in ("--train", "--val", "--test", "--demos", "--workers", "--seed")]
NUMBERS += [(evaluate, "--out e", flag) for flag in ("--tasks", "--trials", "--shots", "--workers", "--gif", "--seed")]
NUMBERS += [(train, "", "--" + name.replace("_", "-")) for name, (kind, *_) in train.OPTIONS.items()
            if kind.__name__ in ("int", "float")]
NUMBERS = [(*case, value) for case in NUMBERS for value in ("0", "-1", "1e300", "nan", "many", "")
           if value != "0" or case[-1] not in MAY_BE_ZERO]


@pytest.mark.parametrize("module, words, flag, value", NUMBERS)
def test_numbers_out_of_range(module, words, flag, value, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert flag in refuse(capsys, monkeypatch, module, *words.split(), flag, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, words, message", [
    (data, "", "--out"),
    (data, "--out {data} --demos 7", "other settings"),
    (data, "--out {data} --demos 4 --seed 4", "other settings"),
    (data, "--out /proc/none", "/proc/none"),
    (data, "--out {trained}", "File exists"),
    (data, "--out d --from-mil {data}", "0 training tasks"),
    (data, "--out d --from-mil none", "0 training tasks"),
    (data, "--out d --speed 3", "--speed"),
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
    (train, "--data {data} --batch 2 --demo-frames 3", "leave --demo-frames out"),
    (train, "--data {data} --batch 2 --demo-frames 101 --method mil", "--demo-frames"),
    (train, "--data {data} --steps 20 --minutes 1", "not both"),
    (train, "--data {data} --steps 5", "5 is not within 20"),
    (train, "--data {data} --minutes inf", "--minutes"),
    (train, "--data /proc/none", "/proc/none"),
    (train, "--data {trained}", "File exists"),
    (train, "--preset none", "--preset"),
    (train, "--resume --name none", "no checkpoint"),
    (train, "--resume --name run --lr 0.1", "another --lr"),
    (train, "--resume --name run --method mil", "another --method"),
    (train, "--resume --name run --steps 70", "another --steps"),
    (train, "--resume --name run --data other", "another --data"),
    (train, "--data {data} --name run", "holds a run"),
    (train, "--resume --name weights", "weights only"),
    (train, "--resume --name moved", "no data set in {tmp}/moved-data"),
    (train, "--resume --name changed", "not the data set"),
    (evaluate, "--embedding-map none/map.png --data {data} --tasks 2 --checkpoint {trained}", "none/map.png"),
    (evaluate, "--out e --data {data} --checkpoint {trained}", "2 test tasks, not 74"),
    (evaluate, "--out e --data {data} --tasks 2 --shots 5 --checkpoint {trained}", "5 shots"),
    (evaluate, "--out e --checkpoint none.pt", "no checkpoint none.pt"),
    (evaluate, "--out e --checkpoint {data}/manifest.json", "not a checkpoint"),
    (evaluate, "--out e --checkpoint {data}/train/00000.npz", "not a checkpoint"),
    (evaluate, "--out e --checkpoint {data}", "Is a directory"),
    (evaluate, "--out e --checkpoint small.pt", "trained on images of 64 pixels"),
    (evaluate, "--out e --checkpoint mixed.pt", "does not hold the weights"),
    (evaluate, "--out e --checkpoint strange.pt", "not a checkpoint"),
    (evaluate, "--out e --checkpoint malice.pt", "not a checkpoint"),
    (evaluate, "--out e --checkpoint old.pt", "format 1"),
    (evaluate, "--out e --policy nobody", "--policy"),
    (evaluate, "--out e --checkpoint {trained} --method mil", "of the method tecnets"),
    (evaluate, "--out e --checkpoint mil.pt --policy no-demo", "of the method mil"),
    (evaluate, "--embedding-map map.png --data {data} --tasks 2 --checkpoint mil.pt", "only tecnets"),
    (evaluate, "--out e --split holdout", "--split"),
    (evaluate, "--out /proc/none --policy expert", "/proc/none"),
    (evaluate, "--out done --policy expert", "another evaluation"),
    (evaluate, "--out other --policy expert", "another evaluation"),
    (evaluate, "--out torn --policy expert", "trials.jsonl is damaged"),
])
def test_bad_input(module, words, message, data_set, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "parallel", lambda *_: pytest.fail("began to work"))
    checkpoint = train.load_checkpoint(trained / "last.pt")
    small, mil = TecNets(Settings(image_size=64)), baselines.MIL()
    files = {"small.pt": {**checkpoint, "settings": vars(small.settings), "model": small.state_dict()},
             "mixed.pt": {**checkpoint, "settings": vars(small.settings)}, "strange.pt": [1, 2], "malice.pt": Malice(),
             "mil.pt": {**checkpoint, "settings": vars(mil.settings), "model": mil.state_dict(),
                        "options": {**checkpoint["options"], "method": "mil"}},
             "old.pt": {**checkpoint, "format": 1}, "runs/run/last.pt": checkpoint,
             "runs/weights/last.pt": {name: checkpoint[name] for name in ("format", "settings", "model", "options")},
             "runs/moved/last.pt": {**checkpoint, "options": {**checkpoint["options"], "data": str(tmp_path / "moved-data")}},
             "runs/changed/last.pt": {**checkpoint, "made_of": {**checkpoint["made_of"], "seed": 4}}}
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        data.write_checked(name, lambda file: torch.save(content, file))
    for name, text in {"done/results.json": "{}", "other/trials.jsonl": evaluate._line({"policy": "random"}),
                       "torn/trials.jsonl": "{\n{}\n"}.items():
        Path(name).parent.mkdir()
        Path(name).write_text(text)
    before, stored = contents(tmp_path), contents(data_set)
    places = {"data": data_set, "trained": trained / "best.pt", "tmp": tmp_path}
    assert message.format(**places) in refuse(capsys, monkeypatch, module, *words.format(**places).split())
    assert before.items() <= contents(tmp_path).items() and stored == contents(data_set)  # nothing lost, nothing run


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
            with pytest.raises(data.UserError, match="damaged|version"):
                read()
        path.write_bytes(content)
        read()


def test_crafted_archives_take_no_memory(data_set, tmp_path):
    """Files whose checksum fits, but whose headers promise more than there is."""
    shutil.copytree(data_set, tmp_path / "push")
    path = data.task_path(tmp_path / "push", "train", 0)
    with np.load(path) as archive:
        arrays = dict(archive)
    for name, array in (("states", np.zeros((4, 100, 21), np.float32)), ("offsets", arrays["offsets"] * 10 ** 9),
                        ("actions", np.array([[Malice()]])), ("frames", arrays["frames"][:-1])):
        data.write_checked(path, lambda file: np.savez(file, **{**arrays, name: array}))
        with pytest.raises(data.UserError, match="damaged"):
            data.TaskSet(tmp_path / "push", "train")
    data.write_checked(path, lambda file: np.savez_compressed(file, **arrays))
    with pytest.raises(data.UserError, match="damaged"):
        data.TaskSet(tmp_path / "push", "train")


def test_a_full_disk_is_one_line(tmp_path):
    """A file system of 1 MB, in a mount namespace of the test's own."""
    script = f"mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} {HERE}/data.py --out {tmp_path}/d --workers 1"
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=200)
    assert result.returncode == 2 and "No space left" in result.stderr and result.stderr.count("\n") == 1


def test_a_data_set_that_is_being_written_is_left_alone(data_set):
    with open(data_set / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(data.UserError, match="another process"):
            data.generate(data_set, COUNTS, demos=4, seed=3)


def test_a_loss_that_is_not_finite_stops_the_run(data_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = start_run(data_set, "bad")
    job.model.control_net.head[-1].bias.data[0] = math.inf
    before = {name: p.clone() for name, p in job.model.named_parameters()}
    with pytest.raises(data.UserError, match="step 1: .* not finite"):
        job.train(stop=lambda: False)
    assert all(torch.equal(p, before[name]) for name, p in job.model.named_parameters())


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (HERE / "README.md").read_text()
    assert runpy.run_path(HERE / "results" / "readme.py")["fill"](text) == text
