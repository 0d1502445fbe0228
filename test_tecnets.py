"""Fast tests, half a minute: values by hand, or by a slow formulation of their own.

test_programs.py has the tests of the programs, which take minutes.
"""
import copy
import dataclasses
import math
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import baselines
import data
import evaluate
import sim
import tecnets
import train
from conftest import batch_of, random_demos, small_model
from tecnets import Settings, TecNets, embedding_loss, sentence

torch.set_num_threads(1)  # more are slow on small tensors when other processes run


# The method -----------------------------------------------------------------------------------

def test_sentence_by_hand():
    f = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(sentence(f), torch.tensor([3, 1]) / 10 ** 0.5)
    torch.testing.assert_close(sentence(f, "norm-mean-norm"), torch.tensor([1, 1]) / 2 ** 0.5)
    torch.testing.assert_close(sentence(f[:, None]), torch.eye(2))  # two tasks, each for itself


@pytest.mark.parametrize("negatives, normalise, loss, accuracy", [
    ("queries", False, 0.15, 0.5), ("queries", True, 0.0, 1.0), ("sentences", False, 0.0, 1.0)])
def test_embedding_loss_by_hand(negatives, normalise, loss, accuracy):
    s_U = sentence(torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]]))
    s_q = torch.tensor([[[1.0, 0.5]], [[0.2, 0.3]]])
    s_q = F.normalize(s_q, dim=-1) if normalise else s_q
    got = embedding_loss(s_U, s_q, 0.1, negatives, "all")
    assert got[0].item() == pytest.approx(loss) and got[1].item() == accuracy


def looped_embedding_loss(s_U, s_q, margin, negatives, hinge_mean):
    terms = []
    for j, i, k in np.ndindex(len(s_U), len(s_U), s_q.shape[1]):
        other = s_q[j, k] @ s_U[i] if negatives == "sentences" else s_q[i, k] @ s_U[j]
        term = F.relu(margin - s_q[j, k] @ s_U[j] + other)
        if i != j and (term > 0 or hinge_mean == "all"):
            terms.append(term)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("hinge_mean", ["all", "violated"])
@pytest.mark.parametrize("negatives", ["sentences", "queries"])
def test_embedding_loss_against_loops(negatives, hinge_mean):
    """Loss and its gradients to both sides; some pairs violate the margin, some do not."""
    torch.manual_seed(1)
    s = [torch.randn(*shape).double().requires_grad_() for shape in ((4, 3), (4, 2, 3))]
    loss, _ = embedding_loss(*s, 0.3, negatives, hinge_mean)
    expected = looped_embedding_loss(*s, 0.3, negatives, hinge_mean)
    torch.testing.assert_close(loss, expected)
    assert (loss > embedding_loss(*s, 0.3, negatives, "all")[0]) == (hinge_mean == "violated")
    for ours, plain in zip(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s)):
        assert plain.any()
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("normalise", [True, False])
def test_norm_of_the_embedding_and_the_loss(normalise):
    """A larger norm changes the loss of raw queries only."""
    model, batch = small_model(normalise_queries=normalise), batch_of()
    small = model.losses(batch)["loss_emb"].item()
    with torch.no_grad():
        for p in model.embedding_net.head[-1].parameters():
            p *= 10
    large = model.losses(batch)["loss_emb"].item()
    assert (large == pytest.approx(small, rel=1e-9)) == normalise and small > 0


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("H, W", [(13, 13), (16, 21), (125, 125)])
def test_networks_against_tiled_planes(H, W, shortcut, monkeypatch):
    """Values and gradients with images scaled and the sentence tiled by hand."""
    if not shortcut:
        monkeypatch.setattr(tecnets, "first_convolution", tecnets.plain_first_convolution)
    torch.manual_seed(0)
    model, batch = TecNets(Settings(image_height=H, image_width=W)).double(), batch_of(B=3, H=H, W=W)
    demos, images, states = batch["frames_U"][:, 0], batch["images"][:, 0], batch["states"][:, 0]
    s = torch.randn(3, 20).double().requires_grad_()
    f, actions = model.embedding_net(demos), model.control_net(images, states, s)
    net = model.embedding_net
    planes = demos.double().movedim(-1, 2).flatten(1, 2) / 127.5 - 1  # (3, 6, H, W)
    expected_f = net.head(net.convolutions(planes))
    net = model.control_net
    planes = images.double().movedim(-1, 2).flatten(0, 1) / 127.5 - 1
    tiles = s[:, None, :, None, None].expand(3, 2, 20, H, W).flatten(0, 1)
    features = net.convolutions(torch.cat([planes, tiles], 1))
    expected_actions = net.head(torch.cat([features, states.flatten(0, 1)], 1)).unflatten(0, (3, 2))
    results, inputs = [], [s, *model.parameters()]
    for values in ([f, actions], [expected_f, expected_actions]):
        loss = sum(value.square().sum() for value in values)
        results.append([*values, *torch.autograd.grad(loss, inputs)])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


LOSS_OPTIONS = [{}, dict(support_mean="norm-mean-norm", negatives="queries", margin=0.5,
                         normalise_queries=False, hinge_mean="all", lambda_emb=0.7, lambda_U=0.2,
                         lambda_q=0.5)]


def looped_losses(model, batch):
    """Every loss of the paper, a demonstration and a sample at a time."""
    c = model.settings
    f_U, f_q = (torch.stack([model.embedding_net(demos) for demos in batch[name]])
                for name in ("frames_U", "frames_q"))
    s_U = torch.stack([sentence(f, c.support_mean) for f in f_U])
    s_q = f_q / f_q.norm(dim=-1, keepdim=True) if c.normalise_queries else f_q
    losses = {"loss_emb": looped_embedding_loss(s_U, s_q, c.margin, c.negatives, c.hinge_mean)}
    for i, name in enumerate(("loss_U", "loss_q")):
        errors = []
        for j, m in np.ndindex(len(s_U), batch["images"].shape[2]):
            image, state, action = (batch[key][j, i, m] for key in ("images", "states", "actions"))
            state = (state - model.state_mean) / model.state_std
            predicted = model.control_net(image[None, None], state[None, None], s_U[[j]])[0, 0]
            errors.append(predicted - (action - model.action_mean) / model.action_std)
        losses[name] = torch.stack(errors).square().mean()
    losses["loss"] = (c.lambda_emb * losses["loss_emb"] + c.lambda_U * losses["loss_U"]
                      + c.lambda_q * losses["loss_q"])
    losses["accuracy"] = embedding_loss(s_U, s_q, c.margin, c.negatives)[1]
    return losses


@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_losses_and_gradients_against_loops(options):
    """Of `losses`, and of `backward` in chunks of 1, of 2 and 1, and of all tasks."""
    statistics = dict(state_mean=0.5, state_std=2.0, action_mean=0.25, action_std=0.5)
    model, batch = small_model(statistics=statistics, **options), batch_of()
    expected, parameters = looped_losses(model, batch), list(model.parameters())
    slopes = torch.autograd.grad(expected["loss"], parameters)
    for chunk in (None, 4, 9, 256):
        losses = model.backward(batch, chunk) if chunk else model.losses(batch)
        if not chunk:
            losses["loss"].backward()
        assert losses.keys() == expected.keys()
        for name in losses:
            assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-9), name
        for p, slope in zip(parameters, slopes):
            assert slope.any()
            torch.testing.assert_close(p.grad, slope, rtol=1e-8, atol=1e-10)
        model.zero_grad()


@pytest.mark.parametrize("chunk", [4, 256])
def test_a_frozen_embedding_net(chunk):
    """The control net's gradient is the same."""
    model, batch = small_model(), batch_of()
    parameters = list(model.control_net.parameters())
    expected = torch.autograd.grad(model.losses(batch)["loss"], parameters)
    model.embedding_net.requires_grad_(False)
    model.backward(batch, chunk)
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("unit", [0.001, 1000.0])
def test_actions_in_any_units(unit):
    """Losses and gradients are those of the plain actions, predictions are in the robot's units."""
    results, predictions, batch = [], [], batch_of()
    actions, given = batch["actions"], (batch["images"][:, 1], batch["states"][:, 1])
    for scale, shift in ((1, 0), (unit, 3 * unit)):
        model = small_model(statistics=dict(action_mean=shift, action_std=scale))
        losses = model.backward({**batch, "actions": scale * actions + shift})
        results.append([*losses.values(), *(p.grad for p in model.parameters())])
        s = model.embed(batch["frames_U"])
        predictions.append((model.predict(*given, s) - shift) / scale)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-6)


def test_architecture_of_the_official_code():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    def expected(planes, state, outputs):
        convolutions = 25 * 16 * (planes + 3 * 16) + 4 * 16 + 4 * 2 * 16
        return convolutions + (8 * 8 * 16 + state + 1) * 200 + 2 * 201 * 200 + 201 * outputs

    model = TecNets()
    assert count(model.embedding_net) == expected(6, 0, 20)
    assert count(model.control_net) == expected(23, 20, 7)


@pytest.mark.parametrize("n", [2, 3])
def test_frames_of_a_demonstration(n):
    """Each of them counts, in its place."""
    model, demos = small_model(demo_frames=n), batch_of(n=n)["frames_U"]
    assert model.embedding_net.convolutions[0].in_channels == 3 * n
    for frame in range(n):
        other = demos.clone()
        other[:, :, frame] = 0
        assert (model.embed(other) - model.embed(demos)).abs().max() > 1e-3
    assert (model.embed(demos.flip(2)) - model.embed(demos)).abs().max() > 1e-3


def small_method(name, **chosen):
    """One of train.METHODS, with weights of ordinary size, so that gradients are."""
    network, settings, _ = train.METHODS[name]
    model = small_model(network, settings, 32, units=12, **chosen)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return model


def batch_for(name, **sizes):
    return batch_of(n=2 if name == "tecnets" else 3, H=32, W=32, **sizes)


@pytest.mark.parametrize("name", ["tecnets", "contextual", "lstm"])
def test_bfloat16_gives_nearly_the_same_gradient(name):
    model, batch, gradients = small_method(name).float(), batch_for(name, dtype=torch.float32), []
    for model.use_bfloat16 in (False, True):
        model.zero_grad()
        model.backward(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 0.98 < F.cosine_similarity(*gradients, dim=0) and not torch.equal(*gradients)


@pytest.mark.parametrize("name", train.METHODS)
def test_one_observation_acts_as_in_a_batch(name):
    model, batch = small_method(name), batch_for(name)
    given = batch["images"][:, 1], batch["states"][:, 1]
    with torch.no_grad():
        actions = model(*given, model.embed(batch["frames_U"]))
        context = model.embed(batch["frames_U"][3])
    torch.testing.assert_close(model.act(given[0][3, 1], given[1][3, 1], context), actions[3, 1])


@pytest.mark.parametrize("name", train.METHODS)
def test_tools_that_take_any_network(name):
    """Contiguous weights, numbers of numpy, inference mode; and floats for images are refused."""
    model, batch = small_method(name, filters=np.int64(4)), batch_for(name)
    parameters = list(model.parameters())
    assert all(p.is_contiguous() for p in parameters)
    vector = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(vector + 1e-3, parameters)
    torch.testing.assert_close(parameters[-1].flatten(), vector[-parameters[-1].numel():] + 1e-3)
    with torch.no_grad():
        context = model.embed(batch["frames_U"])
    with torch.inference_mode():
        torch.testing.assert_close(model.embed(batch["frames_U"].clone()), context)
    with pytest.raises(TypeError, match="uint8"):
        model.backward({**batch, "frames_U": batch["frames_U"] / 255})


class Embedder(torch.nn.Module):
    """What a deployer wraps to export `embed`."""

    def __init__(self, model):
        super().__init__()
        self.embed = model.embed

    def forward(self, frames):
        return self.embed(frames)


@pytest.mark.parametrize("to", ["export", "onnx"])
def test_exported_networks_take_any_sizes(to):
    """Numbers of tasks, samples and demonstrations other than those traced."""
    model, dynamic = small_model().float().eval(), torch.export.Dim.DYNAMIC

    def inputs(**sizes):
        batch = batch_of(dtype=torch.float32, **sizes)
        samples = batch["images"][:, 0].contiguous(), batch["states"][:, 0].contiguous()
        return (batch["frames_U"],), (*samples, F.normalize(torch.randn(len(samples[0]), 20), dim=-1))

    two = {0: dynamic, 1: dynamic}
    for i, (module, shapes) in enumerate(((Embedder(model), (two,)), (model, (two, two, two)))):
        shapes = shapes[:2] + ({0: dynamic},) * (len(shapes) == 3)
        traced, given = inputs()[i], inputs(B=3, K=4, M=5)[i]
        if to == "export":
            got = torch.export.export(module, traced, dynamic_shapes=shapes).module()(*given)
        else:
            pytest.importorskip("onnxscript")
            reference = pytest.importorskip("onnx.reference").ReferenceEvaluator
            program = torch.onnx.export(module, traced, dynamic_shapes=shapes, dynamo=True)
            names = [value.name for value in program.model_proto.graph.input]
            feed = {name: values.numpy() for name, values in zip(names, given)}
            got = torch.from_numpy(reference(program.model_proto).run(None, feed)[0])
        torch.testing.assert_close(got, module(*given), rtol=1e-4, atol=1e-5)


def test_wrong_calls():
    with pytest.raises(ValueError, match="mean-norm or norm-mean-norm, not 'mean'"):
        Settings(support_mean="mean")
    with pytest.raises(ValueError, match="points or flat"):
        baselines.Settings(features="point")
    with pytest.raises(ValueError, match=r"actions \(7,\), predicted \(2, 7\)"):
        tecnets.control_loss(torch.zeros(2, 7), torch.zeros(7))


# The baselines --------------------------------------------------------------------------------

def test_feature_points_of_a_bright_pixel():
    maps = torch.zeros(2, 3, 8, 6)
    maps[1, 2, 5, 1] = 1000
    points = baselines.FeaturePoints()(maps)
    torch.testing.assert_close(points[1, [2, 5]], torch.tensor([(1 - 3) / 6, (5 - 4) / 8]))
    torch.testing.assert_close(points[0], torch.tensor([-0.5 / 6] * 3 + [-0.5 / 8] * 3))


def test_own_layers_keep_their_weights():
    class Own(baselines.Baseline):
        def __init__(self):
            super().__init__(baselines.Settings())
            self.layer = torch.nn.Linear(4, 3)

    torch.manual_seed(0)
    own = Own().layer
    torch.manual_seed(0)
    assert torch.equal(own.weight, torch.nn.Linear(4, 3).weight)


def test_inner_step_by_hand():
    """A parameter p of the inner pass becomes p - 0.01 clip(gradient, -10, 10), the rest stays.

    The rest are norm biases and the layers that only the learned loss has. The learned picture is
    clipped before.
    """
    model, batch = small_method("mil"), batch_for("mil")
    model.net.image_transform.data.uniform_(-0.01, 1.01)
    image, state = batch["images"][0, 0, :1], batch["states"][0, 0, :1]
    context = model.embed(batch["frames_U"][:1])
    adapted = model.predict(image[None], state[None], context)[0]
    model.net.image_transform.data.clamp_(0, 1)
    (50 * model.net(batch["frames_U"][0].flatten(0, 1))).square().mean().backward()
    clipped = 0
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            norm_bias = name.startswith("vision") and int(name.split(".")[1]) % 3 == 1
            if p.grad is not None and not norm_bias and not name.startswith("inner_"):
                clipped += (p.grad.abs() > 10).sum()
                p -= 0.01 * p.grad.clamp(-10, 10)
    assert clipped
    torch.testing.assert_close(adapted, model.net(image, state))


def test_fast_convolutions_of_mil(monkeypatch):
    """The meta-gradient by our second derivatives of a convolution is that by PyTorch's own."""
    model, batch, gradients = small_method("mil"), batch_for("mil"), []
    for vision in (baselines.plain_mil_vision, baselines.mil_vision):
        monkeypatch.setattr(baselines, "mil_vision", vision)
        model.zero_grad()
        model.backward(batch)
        gradients.append([p.grad for p in model.parameters()])
    for plain, fast in zip(*gradients):
        assert plain.any()
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


def test_meta_gradient_against_finite_differences():
    model, batch = small_method("mil", action_scale=5.0), batch_for("mil", B=2, K=1)
    model.net.image_transform.data.fill_(0.3)  # away from the kink of its clipping
    model.backward(batch)
    samples = [batch[name][:, 1] for name in ("images", "states", "actions")]
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, dtype=p.dtype)
        losses, h = [], 1e-8  # small: an inner gradient jumps where a unit switches off
        with torch.no_grad():
            for step in (h, -2 * h, h):
                p += step * direction
                losses.append(model.imitation_loss(*samples, model.embed(batch["frames_U"])).item())
        difference = (losses[0] - losses[1]) / (2 * h)
        slope = (p.grad * direction).sum().item() / 5 ** 2
        assert abs(slope - difference) < 1e-3 * max(abs(difference), 1e-3), name


def test_the_lstm_reads_the_demo_and_then_the_observation():
    model, batch = small_method("lstm"), batch_for("lstm", K=1)
    images = torch.cat([batch["frames_U"][0, 0], batch["images"][0, 1, :1]])
    states = torch.cat([torch.zeros(3, 20).double(), batch["states"][0, 1, :1]])
    output, _ = model.lstm(model._features(images, states)[:, None])
    action = model.act(images[-1], states[-1], model.embed(batch["frames_U"][0]))
    torch.testing.assert_close(action, model.head(output[-1, 0]))


def test_an_untrained_lstm_keeps_its_memory():
    lstm = small_model(*train.METHODS["lstm"][:2], size=32).lstm.float()
    c = torch.ones(1, 1, lstm.hidden_size)
    _, (_, kept) = lstm(torch.zeros(1, 1, lstm.input_size), (torch.zeros_like(c), c))
    torch.testing.assert_close(kept, torch.sigmoid(c))  # biases are 1 and 0: nothing is added


@pytest.mark.parametrize("name", ["contextual", "lstm"])
def test_actions_are_averaged_over_demos(name):
    model, batch = small_method(name), batch_for(name)
    given, frames = (batch["images"][:, 1], batch["states"][:, 1]), batch["frames_U"]
    each = [model.predict(*given, model.embed(frames[:, [k]])) for k in range(2)]
    both = model.predict(*given, model.embed(frames))
    torch.testing.assert_close(both, sum(each) / 2)
    assert (each[0] - each[1]).abs().max() > 1e-9


@pytest.mark.parametrize("name", ["contextual", "lstm", "mil"])
def test_baseline_in_chunks(name):
    """A backward in chunks, of at most so many images, is that of the whole."""
    model, batch, results, seen = small_method(name), batch_for(name, B=6, K=2, M=2), [], []
    model.register_module("hook", torch.nn.Identity())
    embed = model.embed
    model.embed = lambda frames: seen.append(len(frames)) or embed(frames)
    for chunk in (24, 10 ** 6):  # 2 demos of 3 frames and of 2 samples: 10 images a task
        losses = model.backward(batch, chunk)
        results.append([losses["loss_q"], *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert seen == [2, 2, 2, 6]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name, chosen", [(name, {}) for name in train.METHODS]
                         + [("contextual", {"features": "flat"})])
def test_every_method_learns_two_tasks(name, chosen):
    """Only a bright square on one side of the demo's last frame tells the action, in any units."""
    network, settings, _ = train.METHODS[name]
    model = small_model(network, settings, 32, dict(action_std=0.001), **chosen).float()
    batch = batch_of(B=2, K=1, M=4, H=32, W=32, dtype=torch.float32)
    for part in ("frames_U", "images", "states"):
        batch[part].fill_(30 if part != "states" else 0)
    for task, columns in enumerate((slice(2, 12), slice(20, 30))):
        batch["frames_U"][task, :, -1, 10:20, columns] = 250
    batch["frames_q"] = batch["frames_U"]
    batch["actions"][0], batch["actions"][1] = 0.001, -0.001
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(400):
        losses = model.backward(batch)
        optimiser.step()
        optimiser.zero_grad()
        if losses["loss_q"] < 0.05:
            return
    pytest.fail(f"control loss {losses['loss_q']:.3f} of 1")


# The simulator --------------------------------------------------------------------------------

@pytest.fixture
def env():
    env = sim.PushEnv()
    yield env
    env.close()


@pytest.fixture
def blind():
    """An environment without pictures."""
    env = sim.PushEnv(render_mode=None)
    yield env
    env.close()


def test_splits_share_no_mesh_and_pairs_are_swapped():
    used = {split: set() for split in sim.SPLITS}
    for split in used:
        for index in range(0, 800, 2):
            one, other = sim.make_task(split, index), sim.make_task(split, index + 1)
            assert (one.target, one.distractor) == (other.distractor, other.target)
            used[split] |= {one.target.mesh_id, one.distractor.mesh_id}
    assert len(set.union(*used.values())) == sum(map(len, used.values())) > 800


@pytest.mark.parametrize("swap", [False, True])
def test_start_ranges(blind, swap):
    for seed in range(30):
        side = (-1, 1)[seed % 2]
        options = {"task": sim.make_task("train", seed), "side": side, "swap": swap}
        blind.reset(seed=seed, options=options)
        target, distractor = blind.target_position[:2], blind.distractor_position[:2]
        for x, y in (target, distractor):
            assert -0.3 <= x <= 0 and abs(y) <= 0.2 and math.hypot(x, y) > 0.17
        assert np.sign(target[1]) == side == -np.sign(distractor[1])
        assert np.linalg.norm(target - distractor) > 0.1 and np.abs(blind.dq).max() <= 0.005


def test_the_expert_solves_tasks_and_nothing_flies(blind):
    for index in range(8):
        blind.reset(seed=index, options={"task": sim.make_task("test", index)})
        for _ in range(sim.HORIZON):
            *_, truncated, info = blind.step(sim.expert_action(blind))
            assert np.abs(blind.dq).max() < 3
            assert min(blind.target_position[2], blind.distractor_position[2]) > 0
        assert truncated and info["success"]


def test_the_expert_goes_around_a_distractor(blind):
    options = {"task": sim.make_task("train", 17), "side": 1}  # 10 cm on the straight way
    info = evaluate.rollout(blind, evaluate.ExpertPolicy(blind), 1017, options)
    assert info["success"] and info["distractor_displacement"] < sim.MOVED_DISTANCE


def test_random_actions_solve_nothing(blind):
    for index, trial in np.ndindex(4, 2):
        policy = evaluate.RandomPolicy([0, index, trial])
        assert not evaluate.rollout(
            blind, policy, trial, {"task": sim.make_task("test", index)})["success"]


def random_course(env, index, steps=30, **options):
    """The observations of an episode of random actions."""
    obs, _ = env.reset(seed=5, options={"task": sim.make_task("test", index), **options})
    rng, course = np.random.default_rng(0), [obs]
    for _ in range(steps):
        course.append(env.step(rng.uniform(-1, 1, 7))[0])
    return {name: np.array([obs[name] for obs in course]) for name in obs}


def test_an_episode_depends_on_task_and_seed_only(env, blind):
    first = random_course(blind, 0)["state"]
    random_course(env, 1)  # another task, another client, with pictures
    assert (random_course(env, 0)["state"] == first).all()


def test_the_tasks_of_a_pair_start_from_the_same_scene(env):
    """A policy that ignores the demonstration does the same in both."""
    films, places = [], []
    for index in (4, 5):
        films.append(random_course(env, index, swap=index == 5)["image"])
        places.append([env.target_position, env.distractor_position])
    assert (films[0] == films[1]).all() and (np.array(places[0]) == places[1][::-1]).all()


def test_the_mirrored_arm(env):
    """Mirrored joints give the mirrored state, action and, nearly, picture."""
    rng = np.random.default_rng(0)
    env.reset(seed=0, options={"task": sim.make_task("train", 0)})
    for body in (env.target, env.distractor):  # out of sight
        env.client.resetBasePositionAndOrientation(body, (5, 5, 0.1), (0, 0, 0, 1))
    for _ in range(5):
        q = (0.3, 1.7, 0, -1.7, 0, -0.4, 0.3) + rng.normal(0, 0.05, 7)  # in view, on one side
        dq, twist = rng.normal(0, 0.1, 7), rng.normal(0, 0.1, 6)
        states, images, actions = [], [], []
        for joints, axes in ((np.ones(7), 1), (sim.MIRRORED_ACTION, (1, -1, 1, -1, 1, -1))):
            for joint, sign in enumerate(joints):
                env.client.resetJointState(env.arm, joint, q[joint] * sign, dq[joint] * sign)
            obs = env._observe()
            states.append(obs["state"])
            images.append(obs["image"].astype(int))
            actions.append(sim._joint_control(env, twist * axes, np.zeros(2)))
        np.testing.assert_allclose(states[0] * sim.MIRRORED_STATE, states[1], atol=1e-6)
        np.testing.assert_allclose(actions[0] * sim.MIRRORED_ACTION, actions[1], atol=1e-6)
        mirrored, plain = np.abs([images[0][:, ::-1] - images[1], images[0] - images[1]]).mean((1, 2, 3))
        assert 10 * mirrored < plain
    empty = sim._background(250).view(np.uint8).reshape(250, 250, 4).astype(int)
    assert np.abs(empty[:, ::-1] - empty).mean() < 0.01


def expert_film(env):
    """Every second picture of an expert's episode, and the one after its end."""
    film, options = [], {"task": sim.make_task("train", 1)}
    evaluate.rollout(env, evaluate.ExpertPolicy(env), 1, options, film)
    return np.array([*film, env.render()])


def test_the_picture_is_complete(env, monkeypatch):
    """It is as drawn anew, with every link of the arm and the table behind it."""
    frames, client, n = expert_film(env), env.client, 125
    table = client.createVisualShape(client.GEOM_BOX, halfExtents=(2, 2, 0.01),
                                     rgbaColor=(*sim.TABLE_RGB, 1))
    client.createMultiBody(0, -1, table, (0, 0, -0.01))
    disc = client.createVisualShape(client.GEOM_CYLINDER, radius=sim.GOAL_RADIUS, length=0.001,
                                    rgbaColor=(*sim.GOAL_RGB, 1))
    client.createMultiBody(0, -1, disc, (0, 0, 0.001))
    pixels, body = sim._camera(client, 2 * n, (0, 0, 2 * n, 2 * n))
    whole = pixels.view(np.uint8).reshape(n, 2, n, 2, 4)[..., :3].mean((1, 3))
    assert body.all() and np.abs(whole - frames[-1]).max() <= 0.5
    colours = {number: sim.ARM_RGB[6 if number in (3, 6) else 5] for number in range(1, 7)}
    monkeypatch.setattr(sim, "ARM_RGB", colours)
    sim._arm.cache_clear()
    everything = expert_film(env)
    sim._arm.cache_clear()
    assert (everything != frames).any(-1).sum() <= 5  # of 796,875: the windows' rounding differs


def test_the_picture_belongs_to_the_state(env):
    obs, _ = env.reset(seed=0, options={"task": sim.make_task("test", 0)})
    for _ in range(3):
        before = obs["image"]
        obs, *_ = env.step([1] * 7)
        assert (obs["image"] == env.render()).all() and (obs["image"] != before).any()


def test_a_lost_object_is_reported(blind):
    for name, place in (("target", (2.5, 0, 0.1)), ("distractor", (0, -2.5, 0.1)),
                        ("target", (0, 0, -20))):
        assert not blind.reset(seed=0, options={"task": sim.make_task("train", 0)})[1]["lost"]
        body = getattr(blind, name)
        blind.client.resetBasePositionAndOrientation(body, place, (0, 0, 0, 1))
        assert blind.step([0] * 7)[-1]["lost"]


def test_rendering_keeps_no_memory(env):
    sizes = []
    for seed in range(50):
        env.reset(seed=seed, options={"task": sim.make_task("train", seed % 4)})
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert sizes[-1] - sizes[15] < 2e6  # PyBullet's file cache took 6 MB


def test_calls_of_the_simulator(blind):
    places, options = [], {"task": sim.make_task("test", 0)}
    for seed in (7, None, 7, None, 8):
        blind.reset(seed=seed, options=options)
        places.append(tuple(blind.target_position))
    assert places[:2] == places[2:4] and len(set(places)) == 3
    for call, error, message in (
            (lambda: copy.copy(blind.client), TypeError, "copied or pickled"),
            (lambda: blind.step([math.nan] * 7), ValueError, "7 finite numbers"),
            (lambda: blind.reset(options={**options, "sides": 1}), TypeError, "sides")):
        with pytest.raises(error, match=message):
            call()


TETRAHEDRON = "v 0 0 0\nv {} 0 0\nv 0 1 0\nv 0 0 {}\nf 1 2 3\nf 1 2 4\nf 1 3 4\nf 2 3 4\n"


def test_a_mesh_of_ones_own(env, tmp_path):
    """A file edited in between counts as it is now; one without height or of squares is refused."""
    mesh, pictures = tmp_path / "own.obj", []
    body = dataclasses.replace(sim.make_task("test", 0).target, mesh_id=mesh, size=0.1)
    options = {"task": sim.Task("own", 0, body, body)}
    small = [0.05, 0.05, 0.05], 0.05 * 1.25 ** 0.5
    for width, (scale, radius) in ((1, ([0.1, 0.1, 0.08], 0.1 * 0.5 ** 0.5)), (2, small), (2, small)):
        mesh.write_text(TETRAHEDRON.format(width, 1))
        got = sim.body_shape(body)
        np.testing.assert_allclose([*got[0], got[2]], [*scale, radius])
        pictures.append(env.reset(seed=0, options=options)[0]["image"])
    assert (pictures[0] != pictures[1]).any() and (pictures[1] == pictures[2]).all()
    for text, message in ((TETRAHEDRON.format(1, 0), "0.0 high"), ("v 0 0 0\n" * 4 + "f 1 2 3 4\n", "triangles")):
        mesh.write_text(text)
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    large = dataclasses.replace(sim.make_task("test", 0).target, size=0.6)
    with pytest.raises(ValueError, match="between them"):
        env.reset(options={"task": sim.Task("own", 0, large, large)})


def test_a_task_of_ones_own(env):
    """Its demonstrations are the same where a mesh is given by its file or a number of numpy's."""
    target, other = sim.make_task("train", 7).target, sim.make_task("test", 30).target
    from_file = dataclasses.replace(target, mesh_id=sim._mesh(target.mesh_id)[0])
    numpys = dataclasses.replace(other, mesh_id=np.int64(other.mesh_id))
    demos = [sim.record_demo(env, sim.Task(*task), 1, seed=0) for task in (
        ("own", 5, target, other), ("own", 5, from_file, numpys), ("another", 5, target, other))]
    for name, shape in (("frames", (125, 125, 3)), ("states", (20,)), ("actions", (7,))):
        arrays = [demo[name] for demo in demos]
        assert arrays[0].shape == (100, *shape)
        assert (arrays[0] == arrays[1]).all() and (arrays[0] != arrays[2]).any()


@pytest.mark.filterwarnings("ignore")
def test_gymnasium():
    """Its own check, vector environments, and what `info` adds."""
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    import gym_push
    words = dict(tasks=3, image_size=32)
    env = gymnasium.make("tecnets/Push-v3", dense_reward=True, render_mode="rgb_array", **words)
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    _, reward, *_, info = env.step(env.action_space.sample())
    assert reward == -info["distance"] == -math.hypot(*info["target"][:2])
    assert (info["fork"][:3] == env.unwrapped.env.fork_position).all()
    assert info["is_success"] == info["success"] and env.render().shape == (32, 32, 3)
    env.close()
    envs = gymnasium.make_vec("tecnets/Push-v3", 2, vectorization_mode="sync", **words)
    obs, _ = envs.reset(seed=[4, 4])
    assert (obs["state"][0] == obs["state"][1]).all() and obs["image"].shape == (2, 32, 32, 3)
    envs.close()


# The data -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tasks(tiny_data):
    return data.TaskSet(tiny_data, "train")


LENGTHS, OWN_SIZES = (7, 4, 9), dict(H=12, W=20, S=5, A=3)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(demonstrations of unlike lengths and oblong pictures, the data set made of them)."""
    demos = random_demos(LENGTHS, **OWN_SIZES, train=4, val=2)
    folder = tmp_path_factory.mktemp("own") / "data"
    data.write_data_set(folder, demos)
    return demos["train"], data.TaskSet(folder, "train")


def test_data_of_ones_own(own):
    """They come back as they were given, with what a network needs to know of them."""
    demos, got = own
    for n, k in np.ndindex(4, 3):
        demo, T = demos[n][k], LENGTHS[k]
        assert got.lengths[n, k] == T
        assert (got.frames(n, k, np.arange(T)) == demo["frames"]).all()
        assert (got.ends[n, k] == demo["frames"][[0, T - 1]]).all()
        for name in ("states", "actions"):
            assert (getattr(got, name)[got.row(n, k, np.arange(T))] == demo[name]).all()
    statistics = got.statistics()
    for name in ("state", "action"):
        rows = np.concatenate([demo[name + "s"] for task in demos for demo in task])
        np.testing.assert_allclose(statistics[name + "_mean"], rows.mean(0), atol=1e-6)
        np.testing.assert_allclose(statistics[name + "_std"], rows.std(0), atol=1e-6)


def test_whatever_holds_the_arrays(own, tmp_path):
    """A generator of tasks, lists and tensors give the files of arrays."""
    def held(demos):
        for task in demos:
            yield [{"frames": list(demo["frames"]), "states": demo["states"].tolist(),
                    "actions": torch.from_numpy(demo["actions"])} for demo in task]

    demos = random_demos(LENGTHS, **OWN_SIZES, train=4, val=2)
    data.write_data_set(tmp_path, {split: held(demos[split]) for split in demos})
    folder = own[1]._paths[0].parent.parent
    files = [path.relative_to(folder) for path in folder.rglob("*.*")]
    assert len(files) == 1 + 2 * 6
    for path in files:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_statistics_of_constants_and_of_the_benchmark(tmp_path):
    """Deviations have floors; the benchmark's actions are fractions of limits, and stay raw."""
    demos = random_demos(train=2, val=1)
    for task in demos["train"]:
        task[0]["states"][:, 0], task[0]["actions"][:, 1:] = 3, 0.5
    data.write_data_set(tmp_path / "own", demos)
    statistics = data.TaskSet(tmp_path / "own", "train").statistics()
    assert statistics["state_std"][0] == np.float32(1e-3)
    np.testing.assert_allclose(statistics["action_std"] / statistics["action_std"][0], [1] + [1e-3] * 6)
    data.write_data_set(tmp_path / "raw", demos, normalise_actions=False)
    statistics = data.TaskSet(tmp_path / "raw", "train").statistics()
    assert not statistics["action_mean"].any() and (statistics["action_std"] == 1).all()
    data.generate(tmp_path / "push", {"train": 0}, demos=1, seed=0)
    assert not data.read_manifest(tmp_path / "push")["normalise_actions"]


@pytest.mark.parametrize("name, damage, message", [
    ("states", lambda array: array[:-1], r"shape \(6, 20\), not \(7, 20\)"),
    ("frames", lambda array: array / 255, "float64: convert them to uint8"),
    ("actions", lambda array: array * np.nan, "not finite")])
def test_demonstrations_that_do_not_fit(name, damage, message, tmp_path):
    demos = random_demos((7, 7), train=2, val=1)
    demo = demos["train"][1][1]
    demo[name] = damage(demo[name])
    with pytest.raises(ValueError, match=f"train task 1, demonstration 1, {name} .*{message}"):
        data.write_data_set(tmp_path, demos)


def test_what_data_do_not_allow(own, tasks):
    with pytest.raises(data.UserError, match="allow mirror"):
        data.TaskLoader(own[1], B=2, K=1, mirror=True)
    with pytest.raises(data.UserError, match="4 of a task: lower --support or --query"):
        data.TaskLoader(tasks, B=2, K=4)
    with pytest.raises(data.UserError, match="drawn 2 at a time"):
        data.TaskLoader(tasks, B=3, K=1)


@pytest.mark.parametrize("n", [2, 3])
def test_loader_against_loops(own, n):
    """Sets are disjoint, samples lie within their demonstration, its last frame is its own."""
    demos, got = own
    loader = data.TaskLoader(got, B=3, K=2, M=5, random_support=False, hue_jitter=0, demo_frames=n)
    for _ in range(10):
        b = next(loader)
        for i, task in enumerate(b["tasks"]):
            support, query = set(b["demos"][i, :2]), set(b["demos"][i, 2:])
            assert len(support) == 2 and len(query) == 1 and not support & query
            for k, number in enumerate(b["demos"][i]):
                frames = demos[task][number]["frames"]
                times = [0, round((len(frames) - 1) / 2), len(frames) - 1] if n == 3 else [0, -1]
                seen = b["frames_U"][i, k] if k < 2 else b["frames_q"][i, 0]
                assert (seen == frames[times]).all()
            for side, m in np.ndindex(2, 5):
                number, time_ = b["control_demos"][i, side, m], b["times"][i, side, m]
                assert number in (support, query)[side]
                for name in ("images", "states", "actions"):
                    array = demos[task][number][name if name != "images" else "frames"]
                    assert (b[name][i, side, m] == array[time_]).all()
        assert len(set(b["tasks"])) == 3
    sizes = {name: got.manifest[name] for name in train.SIZES}
    model = TecNets(Settings(**sizes, demo_frames=n), **got.statistics())
    batch = train.to_tensors(b, "cpu")
    prediction = model.predict(*(batch[name][:, 1] for name in ("images", "states")),
                               model.embed(batch["frames_U"]))
    errors = (prediction - batch["actions"][:, 1]) / torch.tensor(got.statistics()["action_std"])
    torch.testing.assert_close(model.losses(batch)["loss_q"], errors.square().mean())


def test_augmented_batches(tasks):
    """Mirror, colours and hue of all frames of a task are changed alike, and nothing else is."""
    words = dict(B=4, K=1, M=2, pairs=False)
    plain = data.TaskLoader(tasks, **words, mirror=False, recolour=False, hue_jitter=0).batch(1)
    batch = data.TaskLoader(tasks, **words).batch(1)  # by default where the data allow it
    hues = set(batch["hues"])
    assert len(hues) == 4 and 0 < max(map(abs, hues)) <= 0.6 and not plain["hues"].any()
    for name in ("mirrored", "recoloured"):
        assert 0 < batch[name].sum() < 4 and not plain[name].any()
    for i in range(4):
        for name in ("frames_U", "frames_q", "images"):
            expected = plain[name][i]
            if batch["mirrored"][i]:
                expected = expected[..., ::-1, :]
            if batch["recoloured"][i]:
                expected = expected[..., [0, 2, 1]]
            expected = data.turn_hue(np.ascontiguousarray(expected), batch["hues"][i])
            assert (batch[name][i] == expected).all()
        for name, signs in sim.MIRROR.items():
            signs = np.array(signs) if batch["mirrored"][i] else 1
            assert (batch[name][i] == plain[name][i] * signs).all()
    for name in ("tasks", "demos", "control_demos", "times"):
        assert (batch[name] == plain[name]).all()


def test_turned_hues():
    """A third of a turn moves every channel to the next one; greys stay."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), np.uint8)
    turned = data.turn_hue(frames, 2 * np.pi / 3)
    assert np.abs(turned - frames[..., [2, 0, 1]].astype(float)).max() <= 1
    greys = np.repeat(frames[..., :1], 3, -1)
    assert np.abs(data.turn_hue(greys, 0.4) - greys.astype(float)).max() <= 1


def test_batches_of_pairs(tasks):
    """Every task comes with its partner, both seen alike; all pairs come, K from 1 to 2."""
    loader, seen = data.TaskLoader(tasks, B=2, K=2), set()
    for position in range(40):
        batch = loader.batch(position)
        assert batch["tasks"][0] % 2 == 0 and batch["tasks"][1] == batch["tasks"][0] + 1
        drawn = [tuple(batch[name]) for name in ("mirrored", "recoloured", "hues")]
        assert all(one == other for one, other in drawn)
        seen.add((batch["tasks"][0], drawn[0][0], drawn[1][0], batch["frames_U"].shape[1]))
    assert len(seen) == 16


def test_shards_of_a_batch_make_the_batch(tasks):
    """Whatever the number of threads; K is drawn alike. A state goes on in another loader."""
    words = dict(B=4, K=2, M=2, seed=3)
    whole = data.TaskLoader(tasks, **words)
    shards = [data.TaskLoader(tasks, **words, shard=(i, 2), threads=1 + i) for i in range(2)]
    for _ in range(3):
        expected, parts = next(whole), [next(shard) for shard in shards]
        for name in expected:
            assert (np.concatenate([part[name] for part in parts]) == expected[name]).all()
    other = data.TaskLoader(tasks, B=4, K=2, M=2)
    next(other)
    other.load_state_dict(whole.state_dict())
    assert (next(other)["images"] == next(whole)["images"]).all()


def test_an_interruption_costs_no_batch(tasks):
    """After an error and after Ctrl-C the next call gives the same position."""
    loader = data.TaskLoader(tasks, B=2, K=1, threads=2)
    expected, plain = [loader.batch(i)["demos"] for i in range(5)], loader.batch
    troubles = {1: lambda: 1 / 0, 3: lambda: time.sleep(2)}

    def batch(position):
        troubles.pop(position, int)()
        return plain(position)

    loader.batch = batch
    got, before = [next(loader)["demos"]], signal.signal(signal.SIGALRM, signal.default_int_handler)
    with pytest.raises(ZeroDivisionError):
        next(loader)
    got += [next(loader)["demos"], next(loader)["demos"]]
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    signal.signal(signal.SIGALRM, before)
    got += [next(loader)["demos"], next(loader)["demos"]]
    assert (np.array(got) == expected).all()


def give_next(loader, queue):
    queue.put(next(loader)["demos"])


@pytest.mark.filterwarnings("ignore")
def test_a_loader_in_another_process(tasks):
    """A forked child, and what is pickled for a spawned one, go on where the loader is."""
    loader = data.TaskLoader(tasks, B=2, K=1)
    next(loader)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=give_next, args=(loader, queue), daemon=True)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    copied, expected = pickle.loads(pickle.dumps(loader)), next(loader)["demos"]
    assert (queue.get() == expected).all() and (next(copied)["demos"] == expected).all()


@pytest.mark.parametrize("exponent, share", [(1, 0.01), (3, 0.01 ** (1 / 3))])
def test_share_of_first_frames(tasks, exponent, share):
    loader = data.TaskLoader(tasks, B=4, K=1, M=100, time_exponent=exponent)
    times = np.array([loader._draw(np.random.default_rng(i))[1]["times"] for i in range(10)])
    assert abs((times == 0).mean() - share) < 0.02 and times.max() == 99


# Evaluation -----------------------------------------------------------------------------------

def test_a_policy_reads_evenly_spaced_frames():
    frames = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    for n, times in ((2, [0, 99]), (5, [0, 25, 50, 74, 99])):
        policy = evaluate.NetworkPolicy(small_method("lstm", demo_frames=n))
        policy.adapt([{"frames": frames}, {"frames": frames[:50]}])
        given = torch.from_numpy(np.stack([frames[times], frames[data.evenly_spaced(50, n)]]))
        assert torch.equal(policy.context, policy.model.embed(given))


class FiveSteps:
    """An environment of one's own: its pictures and actions count the steps."""

    def reset(self, seed, options):
        self.steps = seed + options["later"]
        return self.observe(), {}

    def observe(self):
        return {"image": np.full((2, 2, 3), self.steps), "state": np.float32([self.steps])}

    def step(self, action):
        assert action == self.steps
        self.steps += 1
        return self.observe(), 0.0, self.steps == 5, False, {"steps": self.steps}

    def act(self, obs):
        return obs["state"][0]


def test_rollout_in_an_environment_of_ones_own():
    env, film = FiveSteps(), []
    assert evaluate.rollout(env, env, -1, {"later": 1}, film) == {"steps": 5}
    assert [picture[0, 0, 0] for picture in film] == [0, 2, 4]


def test_interval():
    """That of a binomial for independent trials, wider where the trials of a pair are alike."""
    rng = np.random.default_rng(0)
    for different, independent in ((12, 1200), (1, 100)):  # of the 12 trials of a pair
        rows = []
        for pair in range(100):
            successes = np.resize(rng.random(different) < 0.8, 12)
            rows += [dict(task=2 * pair + i % 2, success=bool(successes[i])) for i in range(12)]
        rate = np.mean([row["success"] for row in rows])
        interval, half = evaluate.interval(rows), 1.96 * (rate * (1 - rate) / independent) ** 0.5
        assert interval == pytest.approx([rate - half, rate + half], abs=0.01)
        assert evaluate.interval(rows[::-1]) == interval
