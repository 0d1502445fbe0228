"""Fast tests, half a minute: values by hand, or by a slow formulation of their own.

test_programs.py has the tests of the programs, which take minutes.
"""
import colorsys
import dataclasses
import itertools
import math
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from torch.testing import assert_close

import baselines
import data
import evaluate
import sim
import tecnets
import train
from conftest import batch_of, random_demos, small_model
from tecnets import Settings, TecNets, embedding_loss, sentence

parametrize = pytest.mark.parametrize
torch.set_num_threads(1)  # more are slow on small tensors when other processes run


# The method -----------------------------------------------------------------------------------

def test_sentence_by_hand():
    f = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert_close(sentence(f), torch.tensor([3, 1]) / 10 ** 0.5)
    assert_close(sentence(f, "norm-mean-norm"), torch.tensor([1, 1]) / 2 ** 0.5)
    f = torch.tensor([[[3.0, 4.0]], [[0.0, 0.5]]])  # two tasks, each for itself
    assert_close(sentence(f), torch.tensor([[0.6, 0.8], [0, 1]]))


def test_embedding_loss_by_hand():
    s_U, s_q = torch.eye(2), torch.tensor([[[1.0, 0.5]], [[0.2, 0.3]]])
    unit = F.normalize(s_q, dim=-1)
    for queries, negatives, loss, accuracy in (
            (s_q, "queries", 0.15, 0.5), (unit, "queries", 0.0, 1.0), (s_q, "sentences", 0.0, 1.0)):
        got = embedding_loss(s_U, queries, 0.1, negatives)
        assert [*map(float, got)] == pytest.approx([loss, accuracy])


def looped_embedding_loss(s_U, s_q, margin, negatives):
    terms = []
    for j, i, k in np.ndindex(len(s_U), *s_q.shape[:2]):
        other = s_q[j, k] @ s_U[i] if negatives == "sentences" else s_q[i, k] @ s_U[j]
        if i != j:
            terms.append(F.relu(margin - s_q[j, k] @ s_U[j] + other))
    return torch.stack(terms).mean()


@parametrize("negatives", ["sentences", "queries"])
def test_embedding_loss_against_loops(negatives):
    """Loss and its gradients to both sides; some pairs violate the margin, some do not."""
    torch.manual_seed(1)
    s = [torch.randn(*shape).double().requires_grad_() for shape in ((4, 3), (4, 2, 3))]
    loss, _ = embedding_loss(*s, 0.3, negatives)
    expected = looped_embedding_loss(*s, 0.3, negatives)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s))


def backward(model, batch, chunk=256):
    """The losses and the gradients of `backward`."""
    model.zero_grad()
    losses = model.backward(batch, chunk)
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient.any() for gradient in gradients)
    return losses, gradients


def tiled_planes(layer, images, s=None):
    """The first convolution by hand."""
    planes = (images.double() / 127.5 - 1).movedim(-1, -3)
    if s is not None:
        tiles = s[:, None, :, None, None].expand(*planes.shape[:2], -1, *planes.shape[3:])
        planes = torch.cat([planes, tiles], 2).flatten(0, 1)
    return layer(planes)


@parametrize("H, W", [(13, 13), (16, 21), (125, 125)])
def test_first_convolution_against_tiled_planes(H, W, monkeypatch):
    """Both formulations, with and without a sentence; borders, gradients and all."""
    model, batch = TecNets(Settings(H, W)).double(), batch_of(B=2, H=H, W=W)
    fast = backward(model, batch)
    for convolution in (tiled_planes, tecnets.plain_first_convolution):
        monkeypatch.setattr(tecnets, "first_convolution", convolution)
        assert_close(backward(model, batch), fast, rtol=1e-9, atol=1e-10)


def looped_losses(model, batch):
    """Every loss of the paper, a demonstration and a sample at a time."""
    c, embed = model.settings, model.embedding_net
    s_U = torch.stack([sentence(embed(demos), c.support_mean) for demos in batch["frames_U"]])
    s_q = torch.stack([embed(demos) for demos in batch["frames_q"]])
    s_q = F.normalize(s_q, dim=-1) if c.normalise_queries else s_q
    predicted = torch.zeros_like(batch["actions"])
    for j, side, m in np.ndindex(predicted.shape[:3]):
        at = slice(j, j + 1), side, slice(m, m + 1)
        predicted[at] = model.predict(batch["images"][at], batch["states"][at], s_U[[j]])
    errors = (predicted - batch["actions"]) / model.action_std
    loss_U, loss_q = errors.square().mean((0, 2, 3))
    loss_emb = looped_embedding_loss(s_U, s_q, c.margin, c.negatives)
    loss = c.lambda_emb * loss_emb + c.lambda_U * loss_U + c.lambda_q * loss_q
    _, accuracy = embedding_loss(s_U, s_q, negatives=c.negatives)
    return dict(loss=loss, loss_emb=loss_emb, loss_U=loss_U, loss_q=loss_q, accuracy=accuracy)


@parametrize("options", [{}, dict(
    support_mean="norm-mean-norm", negatives="queries", margin=0.5, normalise_queries=False,
    lambda_emb=0.7, lambda_U=0.2, lambda_q=0.5)])
def test_losses_and_gradients_against_loops(options):
    """Of `losses`, and of `backward`."""
    model = small_model(statistics=dict(action_mean=0.25, action_std=0.5), **options)
    batch = batch_of()
    losses = looped_losses(model, batch)
    expected = losses, list(torch.autograd.grad(losses["loss"], model.parameters()))
    assert_close(model.losses(batch), losses)
    assert_close(backward(model, batch), expected, rtol=1e-8, atol=1e-10)


def test_a_frozen_embedding_net():
    model, batch = small_model(), batch_of()
    parameters = [*model.control_net.parameters()]
    expected = torch.autograd.grad(model.losses(batch)["loss"], parameters)
    model.embedding_net.requires_grad_(False)
    model.backward(batch, chunk=4)
    assert_close([p.grad for p in parameters], [*expected])


def test_any_units():
    """Losses and gradients are those of plain numbers, predictions are in the robot's units."""
    results, batch = [], batch_of()
    for scale, shift in ((1, 0), (0.001, 0.003), (1000, 3000)):
        given = {name: scale * batch[name] + shift for name in ("states", "actions")}
        model = small_model(statistics=dict(
            state_mean=shift, state_std=scale, action_mean=shift, action_std=scale))
        s = model.embed(batch["frames_U"])
        predicted = model.predict(batch["images"][:, 1], given["states"][:, 1], s)
        results.append([(predicted - shift) / scale, backward(model, {**batch, **given})])
    assert_close(results[1:], 2 * results[:1], rtol=1e-3, atol=1e-6)


def test_architecture_of_the_official_code():
    """25 * 16 * (planes + 3 * 16) + 4 * 16 + 4 * 2 * 16 numbers in the convolutions;

    (8 * 8 * 16 + state + 1) * 200 + 2 * 201 * 200 + 201 * outputs in the layers.
    """
    nets = TecNets().embedding_net, TecNets().control_net
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [311_212, 319_399]


def test_every_frame_of_a_demonstration_counts():
    model, demos = small_model(demo_frames=3), batch_of(n=3)["frames_U"]
    for frame in range(3):
        other = demos.clone()
        other[:, :, frame] = 0
        assert (model.embed(other) - model.embed(demos)).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="channels"):
        model.embed(demos[:, :, :2])


def small_method(name, dtype=torch.float64, **chosen):
    """(one of train.METHODS with weights of ordinary size, so that gradients are; a batch)."""
    model = small_model(*train.METHODS[name][:2], 32, units=12, **chosen).to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return model, batch_of(n=2 if name == "tecnets" else 3, H=32, W=32, dtype=dtype)


@parametrize("name", ["tecnets", "contextual", "lstm"])
def test_bfloat16_gives_nearly_the_same_gradient(name):
    (model, batch), gradients = small_method(name, torch.float32), []
    for model.use_bfloat16 in (False, True):
        gradients.append(torch.cat([g.flatten() for g in backward(model, batch)[1]]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98 and not torch.equal(*gradients)


@parametrize("name", train.METHODS)
def test_tools_that_take_any_network(name):
    """One observation, inference mode, vectors of weights, numbers of numpy; floats are refused."""
    model, batch = small_method(name, filters=np.int64(4))
    images, states, frames = batch["images"][:, 1], batch["states"][:, 1], batch["frames_U"]
    context = model.embed(frames)
    actions = model(images, states, context)
    assert (model(images, states + 1, context) != actions).any()
    with torch.inference_mode():
        action = model.act(images[3, 1], states[3, 1], model.embed(frames[3].clone()))
    assert_close(action, actions[3, 1].detach())
    torch.nn.utils.parameters_to_vector(model.parameters())  # they are contiguous
    with pytest.raises(TypeError, match="uint8"):
        model.backward({**batch, "frames_U": frames / 255})
    with pytest.raises(ValueError, match="states have size 1, the network's"):
        model(images, states[..., :1], context)


@parametrize("call", ["embed", "predict"])
def test_exported_networks_take_any_sizes(call):
    """Numbers of tasks, samples and demonstrations other than those traced."""
    model, some = small_model().float(), torch.export.Dim.DYNAMIC
    model.forward = getattr(model, call)

    def inputs(**sizes):
        batch = batch_of(dtype=torch.float32, **sizes)
        images, states = batch["images"].flatten(1, 2), batch["states"].flatten(1, 2)
        samples = images, states, torch.randn(len(images), 20)
        return samples if call == "predict" else (batch["frames_U"],)

    given = inputs(B=3, K=4, M=5)
    shapes = [{0: some, 1: some}, {0: some, 1: some}, {0: some}][:len(given)]
    exported = torch.export.export(model, inputs(), dynamic_shapes=shapes).module()
    assert_close(exported(*given), model(*given))


def test_wrong_calls():
    with pytest.raises(ValueError, match="mean-norm or norm-mean-norm, not 'mean'"):
        sentence(torch.eye(2), "mean")
    with pytest.raises(ValueError, match=r"actions \(7,\), predicted \(2, 7\)"):
        tecnets.control_loss(torch.zeros(2, 7), torch.zeros(7))


# The baselines --------------------------------------------------------------------------------

def test_feature_points_of_a_bright_pixel():
    maps = torch.zeros(2, 3, 8, 6)
    maps[1, 2, 5, 1] = 1000
    points = baselines.FeaturePoints()(maps)
    assert_close(points[1, [2, 5]], torch.tensor([(1 - 3) / 6, (5 - 4) / 8]))
    assert_close(points[0], torch.tensor([-0.5 / 6] * 3 + [-0.5 / 8] * 3))


def test_inner_step_by_hand():
    """A parameter p of the inner pass becomes p - 0.01 clip(gradient, -10, 10), the rest stays.

    The rest are norm biases and the layers that only the learned loss has. The learned picture is
    clipped before.
    """
    model, batch = small_method("mil")
    model.net.image_transform.data.uniform_(-0.01, 1.01)
    image, state, demos = batch["images"][0, 0, :1], batch["states"][0, 0, :1], batch["frames_U"][0]
    adapted = model.predict(image[None], state[None], model.embed(demos)[None])[0]
    model.net.image_transform.data.clamp_(0, 1)
    (50 * model.net(demos.flatten(0, 1))).square().mean().backward()
    clipped = 0
    for name, p in model.net.named_parameters():
        norm_bias = name in ("vision.1.bias", "vision.4.bias", "vision.7.bias", "vision.10.bias")
        if p.grad is not None and not norm_bias and not name.startswith("inner_"):
            clipped += (p.grad.abs() > 10).sum()
            p.data -= 0.01 * p.grad.clamp(-10, 10)
    assert clipped
    assert_close(adapted, model.net(image, state))


def test_fast_convolutions_of_mil(monkeypatch):
    """The meta-gradient by our second derivatives of a convolution is that by PyTorch's own."""
    model, batch = small_method("mil")
    fast = backward(model, batch)
    monkeypatch.setattr(baselines, "mil_vision", baselines.plain_mil_vision)
    assert_close(fast, backward(model, batch), rtol=1e-9, atol=1e-12)


def test_meta_gradient_against_finite_differences():
    model, batch = small_method("mil", action_scale=5.0)
    batch = {name: values[:2] for name, values in batch.items()}
    model.net.image_transform.data.fill_(0.3)  # away from the kink of its clipping
    model.backward(batch)
    samples = [batch[name][:, 1] for name in ("images", "states", "actions")]
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        losses, h = [], 1e-8  # small: an inner gradient jumps where a unit switches off
        with torch.no_grad():
            for step in (h, -2 * h, h):
                p += step * direction
                losses.append(model.imitation_loss(*samples, model.embed(batch["frames_U"])).item())
        difference = (losses[0] - losses[1]) / (2 * h)
        slope = (p.grad * direction).sum().item() / 5 ** 2
        assert abs(slope - difference) < 1e-3 * max(abs(difference), 1e-3), name


@parametrize("name", ["contextual", "lstm"])
def test_actions_by_hand(name):
    """The mean over demos, of which one at a time is read, then the observation."""
    (model, batch), actions = small_method(name), []
    image, state = batch["images"][0, 1, 0], batch["states"][0, 1, 0]
    for demo in batch["frames_U"][0]:
        if name == "lstm":
            states = torch.cat([torch.zeros(3, 20), state[None]])
            features = model._features(torch.cat([demo, image[None]]), states)
            actions.append(model.head(model.lstm(features[:, None])[0][-1, 0]))
        else:
            planes = torch.cat([image, demo[-1]], -1).double().movedim(-1, 0) / 255
            features = model.vision(planes[None])[0]
            actions.append(model.layers(torch.cat([features, state])))
    action = model.act(image, state, model.embed(batch["frames_U"][0]))
    assert_close(action, sum(actions) / 2)


def test_an_untrained_lstm_keeps_its_memory():
    c, lstm = torch.ones(1, 1, 512), baselines.LSTM().lstm
    kept = lstm(torch.zeros(1, 1, 200), (0 * c, c))[1][1]
    assert_close(kept, torch.sigmoid(c))  # biases are 1 and 0: nothing is added


@parametrize("name", train.METHODS)
def test_backward_in_chunks(name, monkeypatch):
    """It is that of the whole, with at most so many images at a time."""
    (model, batch), seen = small_method(name), []
    respond = model.respond
    monkeypatch.setattr(model, "respond", lambda images, *given: (
        seen.append(len(images)) or respond(images, *given)))
    whole = backward(model, batch)
    chunk = 8 if name == "tecnets" else 24  # images a task: 2 x 2 samples or 2 x (3 frames + 2)
    assert_close(backward(model, batch, chunk), whole)
    again = [2, 2, 1] * (name == "tecnets")  # in backward
    assert sorted(seen) == sorted([5, 2, 2, 1] + again)


@parametrize("name", train.METHODS)
def test_every_method_learns_two_tasks(name):
    """Only a bright square on one side of the demo's last frame tells the action, in any units."""
    model = small_model(*train.METHODS[name][:2], 32, dict(action_std=0.001)).float()
    batch = batch_of(B=2, K=1, M=4, H=32, W=32, dtype=torch.float32)
    batch = {name: torch.zeros_like(values) for name, values in batch.items()}
    for task, side in enumerate((1, -1)):
        batch["frames_U"][task, :, -1, 10:20, 11 + 9 * side:21 + 9 * side] = 250
        batch["actions"][task] = 0.001 * side
    batch["frames_q"], optimiser = batch["frames_U"], torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(400):
        optimiser.zero_grad()
        losses = model.backward(batch)
        optimiser.step()
        if losses["loss_q"] < 0.05:  # of 1
            return
    pytest.fail()


# The simulator --------------------------------------------------------------------------------

@pytest.fixture
def env():
    return sim.PushEnv()


@pytest.fixture
def blind():
    """An environment without pictures."""
    return sim.PushEnv(images=False)


def test_splits_share_no_mesh_and_pairs_are_swapped():
    home = {}
    for split, pair in itertools.product(sim.SPLITS, range(400)):
        one, other = (sim.make_task(split, 2 * pair + i) for i in (0, 1))
        assert (one.target, one.distractor) == (other.distractor, other.target)
        for body in (one.target, other.target):
            assert home.setdefault(body.mesh_id, split) == split


def test_start_ranges(blind):
    for seed in range(40):
        side, task = (-1, 1)[seed % 2], sim.make_task("train", seed)
        blind.reset(seed=seed, options={"task": task, "side": side, "swap": seed % 4 < 2})
        target, distractor = blind.target_position[:2], blind.distractor_position[:2]
        for (x, y), sign in ((target, side), (distractor, -side)):
            assert -0.3 <= x <= 0 <= y * sign <= 0.2 and math.hypot(x, y) > 0.17
        assert math.dist(target, distractor) > 0.1 and np.abs(blind.dq).max() <= 0.005


def test_the_expert_solves_tasks_and_nothing_flies(blind):
    def policy(obs):
        assert np.abs(blind.dq).max() < 3
        assert min(blind.target_position[2], blind.distractor_position[2]) > 0
        return sim.expert_action(blind)

    for index in range(8):
        options = {"task": sim.make_task("test", index)}
        assert evaluate.rollout(blind, policy, index, options)["success"]


def expert_episode(env, seed, index, film=None, **options):
    options |= {"task": sim.make_task("train", index), "side": 1}
    return evaluate.rollout(env, lambda obs: sim.expert_action(env), seed, options, film)


def test_the_expert_goes_around_a_distractor(blind):
    info = expert_episode(blind, 1017, 17)  # which stands 10 cm on the straight way
    assert info["success"] and info["distractor_displacement"] < sim.MOVED_DISTANCE


def test_the_tasks_of_a_pair_start_from_the_same_scene(env):
    """A policy that ignores the demonstration does the same. Pictures are of the instant."""
    def policy(obs):
        assert_array_equal(obs["image"], env.render())
        return rng.uniform(-1, 1, 7)

    films, places = ([], []), []
    for index in (0, 1):
        rng = np.random.default_rng(0)
        options = {"task": sim.make_task("test", index), "swap": index}
        evaluate.rollout(env, policy, 5, options, films[index])
        places.append([env.target_position, env.distractor_position])
    assert_array_equal(*films)
    assert_array_equal(places[0], places[1][::-1])


def test_the_mirrored_arm(env):
    """Mirrored joints give the mirrored state, action and, nearly, picture."""
    env.reset(seed=0, options={"task": sim.make_task("train", 0)})
    for body in (env.target, env.distractor):  # out of sight
        env.client.resetBasePositionAndOrientation(body, (5, 5, 0.1), (0, 0, 0, 1))
    q = 0.3, 1.7, 0.1, -1.7, 0.1, -0.4, 0.3  # in view, on one side
    dq, seen = np.linspace(-0.1, 0.2, 7), []
    state_signs, action_signs = map(np.array, sim.MIRROR.values())
    for signs, axes in ((np.ones(7), 1), (action_signs, (1, -1, 1, -1, 1, -1))):
        for joint, pose in enumerate(zip(q * signs, dq * signs)):
            env.client.resetJointState(env.arm, joint, *pose)
        obs = env._observe()
        action = sim._joint_control(env, dq[:6] * axes, np.zeros(2))
        seen.append((obs["state"], action, obs["image"].astype(int)))
    (state, action, image), mirrored = seen
    assert_allclose(state * state_signs, mirrored[0], atol=1e-6)
    assert_allclose(action * action_signs, mirrored[1], atol=1e-6)
    plain, flipped = (np.abs(one - mirrored[2]).mean() for one in (image, image[:, ::-1]))
    assert 10 * flipped < plain


def test_the_picture_is_complete(env, monkeypatch):
    """It is as drawn at once with table and disc, and with every link of the arm."""
    films = [], []
    expert_episode(env, 1, 1, films[0])
    picture = env.render()
    with monkeypatch.context() as patch:
        patch.setattr(sim, "_Client", lambda: env.client)
        # The empty scene, made where the bodies are.
        whole = sim._background.__wrapped__(250, sim.Look())
        env.close()
    whole = whole.view(np.uint8).reshape(125, 2, 125, 2, 4)[..., :3].mean((1, 3))
    assert np.abs(whole - picture).max() <= 0.5
    monkeypatch.setattr(sim, "DRAWN_LINKS", range(1, 7))
    sim._arm.cache_clear()
    expert_episode(env, 1, 1, films[1], look=sim.Look(arm=((1, 0, 0),) * 4 + sim.Look().arm))
    sim._arm.cache_clear()
    different = np.not_equal(*films).any(-1)
    assert different.sum() <= 5  # of 781,250: the windows differ, and their rounding


def seen(env, look):
    """A picture of one scene in a look, as floats, and the state."""
    obs, _ = env.reset(seed=0, options={"task": sim.make_task("train", 0), "look": look})
    for _ in range(40):
        obs, *_ = env.step(sim.expert_action(env))
    return obs["image"].astype(float), obs["state"]


def test_looks(env):
    """Every field changes the picture as it says, and not the physics."""
    plain, state = seen(env, sim.Look())
    x, y, *others = sim.Look().camera
    changed = {
        "table": sim.Appearance("checks", ((0.2, 0.2, 0.9), (0.1, 0.1, 0.5)), 0),
        "arm": ((1.0, 0.5, 0.0),) * 2, "light": (0, 2, 1), "brightness": 0.5,
        "camera": (x, y + 0.04, *others), "noise": 20}
    for name in changed:
        changed[name], other = seen(env, sim.Look(**{name: changed[name]}))
        assert_array_equal(state, other)
    table = changed["table"][100:, :30] @ (-2, 0, 1)  # blue
    assert (table > 0).all() and 0.2 < (table > 100).mean() < 0.8
    rows, _ = (changed["arm"] != plain).any(-1).nonzero()
    assert 200 < len(rows) and rows.max() < 60
    assert changed["light"][-1, 0, 0] < plain[-1, 0, 0] - 20  # it falls on the table at a slant
    ambient = 0.6 * 255 * np.array(sim.TABLE_RGB)  # Bullet's light from everywhere
    assert_allclose(changed["brightness"][-1, 0], (plain[-1, 0] + ambient) / 2, atol=2)
    disc, moved = (np.argwhere(picture @ (1, -2, -2) > 50).mean(0)
                   for picture in (plain, changed["camera"]))
    pixels = 0.04 * 62.5 / np.tan(np.pi / 8) / 0.73  # at the goal's distance from the camera
    assert_allclose(disc - moved, [0, pixels], atol=0.5)
    noise = (changed["noise"] - plain)[100:, :30]
    assert np.std(noise) == pytest.approx(20, rel=0.05) and abs(noise.mean()) < 0.5
    places = []
    for look in (sim.Look(), sim.Look(noise=20)):  # whose scenes go on alike without a seed
        seen(env, look)
        env.reset(options={"task": sim.make_task("train", 0)})
        places.append(env.target_position)
    assert_array_equal(*places)


def test_held_out_looks():
    """No random look is like them."""
    rng = np.random.default_rng(0)
    looks, held_out = [sim.random_look(rng) for _ in range(400)], sim.HELD_OUT_LOOKS

    def hues(colours):
        return {round(colorsys.rgb_to_hsv(*colour)[0], 2) for colour in colours}

    seen = hues(colour for look in looks for colour in (*look.table.colours, *look.arm))
    assert not seen & hues(held_out["table"].table.colours + held_out["arm"].arm)
    cameras, camera = np.array([look.camera for look in looks]), held_out["camera"].camera
    assert ((camera < cameras.min(0)) | (camera > cameras.max(0))).sum() == 3
    assert held_out["light"].light[0] < 0 < min(look.light[0] for look in looks)
    assert held_out["noise"].noise > 0 == max(look.noise for look in looks)


def test_a_lost_object_is_reported(blind):
    for place in ((2.5, 0, 0.1), (0, 0, -20)):
        for name in ("target", "distractor"):
            assert not blind.reset(options={"task": sim.make_task("train", 0)})[1]["lost"]
            body = getattr(blind, name)
            blind.client.resetBasePositionAndOrientation(body, place, (0, 0, 0, 1))
            assert blind.step([0] * 7)[-1]["lost"]


def test_rendering_keeps_no_memory(env):
    pages = []
    for seed in range(50):
        env.reset(seed=seed, options={"task": sim.make_task("train", seed % 4)})
        pages.append(int(open("/proc/self/statm").read().split()[1]))
    assert pages[-1] - pages[15] < 500  # 2 MB; PyBullet's file cache took 6


def test_calls_of_the_simulator(blind):
    places, options = [], {"task": sim.make_task("test", 0)}
    for seed in (7, None, 7, None):
        blind.reset(seed=seed, options=options)
        places.append(tuple(blind.target_position))
    assert places[:2] == places[2:] and places[0] != places[1]
    with pytest.raises(ValueError, match="7 finite numbers"):
        blind.step([math.nan] * 7)
    with pytest.raises(TypeError, match="sides"):
        blind.reset(options={**options, "sides": 1})


TETRAHEDRON = "v 0 0 0\nv {} 0 0\nv 0 1 0\nv 0 0 {}\nf 1 2 3\nf 1 2 4\nf 1 3 4\nf 2 3 4\n"


def test_bodies_of_ones_own(env, tmp_path):
    """A file that is edited counts as it is now; one without height, or of squares, is refused."""
    mesh, pictures, task = tmp_path / "own.obj", [], sim.make_task("test", 0)

    def reset(**changes):
        body = dataclasses.replace(task.target, **changes)
        return env.reset(seed=0, options={"task": sim.Task("own", 0, body, body)})[0]["image"]

    for width, expected in ((1, [0.1, 0.1, 0.08]), (2, [0.05, 0.05, 0.05])):
        mesh.write_text(TETRAHEDRON.format(width, 1))
        pictures.append(reset(mesh_id=mesh, size=0.1))
        assert_allclose(sim.body_shape(env.task.target)[0], expected)
    assert np.not_equal(*pictures).any()
    assert_array_equal(reset(mesh_id=np.int64(6)), reset(mesh_id=6))
    for text, message in ((TETRAHEDRON.format(1, 0), "0.0 high"),
                          (TETRAHEDRON.format(1, 1) + "f 1 2 3 4", "triangles")):
        mesh.write_text(text)
        with pytest.raises(ValueError, match=message):
            reset(mesh_id=mesh)
    with pytest.raises(ValueError, match="between them"):
        reset(size=0.6)


@pytest.mark.filterwarnings("ignore")
def test_gymnasium():
    """Its own check, vector environments, and what `info` adds."""
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    words = dict(id="gym_push:tecnets/Push-v3", tasks=3, image_size=32)
    env = gymnasium.make(**words, dense_reward=True, render_mode="rgb_array").unwrapped
    check_env(env)
    env.reset(seed=0)
    _, reward, *_, info = env.step(env.action_space.sample())
    assert reward == -info["distance"] and info["is_success"] == info["success"]
    assert_allclose(info["target"][:3], env.target_position)
    assert_allclose(info["fork"][:3], env.fork_position)
    envs = gymnasium.make_vec(**words, num_envs=2, vectorization_mode="sync")
    obs, _ = envs.reset(seed=[4, 4])
    assert_array_equal(*obs["state"])
    env, seen = gymnasium.make(**{**words, "tasks": 2}, images=False).unwrapped, set()
    for seed in range(20):
        env.reset(seed=seed)
        seen.add((env.task.index, env.target_position[1] > 0))
    assert len(seen) == 4  # either task on either side


# The data -------------------------------------------------------------------------------------

LENGTHS = 7, 5, 9


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(demonstrations of unlike lengths and oblong pictures, the data set made of them).

    It was given a generator of tasks, lists and tensors. The first number is always the same, the
    second zero up to rounding.
    """
    demos = random_demos(LENGTHS, H=12, W=20, train=4, val=1)
    folder = tmp_path_factory.mktemp("own")

    def generator(split):
        for task in demos[split]:
            for demo in task:
                demo["states"][:, 0] = demo["actions"][:, 0] = 0.5
                demo["states"][:, 1] *= 1e-17
                demo["actions"][:, 1] *= 1e-17
            yield [{"frames": list(demo["frames"]), "states": demo["states"].tolist(),
                    "actions": torch.from_numpy(demo["actions"])} for demo in task]

    given = {split: generator(split) for split in demos}
    data.write_data_set(folder, given, sim.MIRROR, recolour=True, pairs=True)
    return demos["train"], data.TaskSet(folder, "train")


@pytest.fixture
def tasks(own):
    return own[1]


def test_statistics(own, monkeypatch, tmp_path):
    """The deviation of what is constant is 1. Actions of the benchmark stay raw.

    What is mirrored counts on both sides: a number that is 0.5 or -0.5 has mean 0, deviation 0.5.
    """
    demos, got = own
    for name in ("state", "action"):
        rows = np.concatenate([demo[name + "s"] for task in demos for demo in task])
        plain, both = got.statistics(mirrored=False), got.statistics()
        assert_allclose(plain[name + "_mean"], rows.mean(0), rtol=1e-5)
        assert_allclose(plain[name + "_std"], [1, 1, *rows[:, 2:].std(0)], rtol=1e-5)
        signs = np.array(sim.MIRROR[name + "s"])
        rows = np.concatenate([rows, rows * signs])
        assert_allclose(both[name + "_mean"], rows.mean(0), rtol=1e-5, atol=1e-9)
        first = 0.5 if signs[0] < 0 else 1
        assert_allclose(both[name + "_std"], [first, 1, *rows[:, 2:].std(0)], rtol=1e-5)
    data.generate(tmp_path, {"train": 0}, demos=1, seed=0)
    monkeypatch.setattr(got, "manifest", data.read_manifest(tmp_path))
    model = TecNets(Settings(), **got.statistics())
    assert not model.action_mean.any() and (model.action_std == 1).all()
    assert model.state_std[0] == np.float32(1e-3)  # MIL's floor


@parametrize("name, damage, message", [
    ("states", lambda array: array[:-1], r"shape \(6, 20\), not \(7, 20\)"),
    ("frames", lambda array: array / 255, "float64: convert them to uint8"),
    ("actions", lambda array: array * np.nan, "not finite")])
def test_demonstrations_that_do_not_fit(name, damage, message, tmp_path):
    demos = random_demos((7, 7), train=2, val=1)
    with pytest.raises(ValueError, match="no tasks .* {'train': 2, 'val': 0}"):
        data.write_data_set(tmp_path / "few", {**demos, "val": iter(())})
    demo = demos["train"][1][1]
    demo[name] = damage(demo[name])
    with pytest.raises(ValueError, match=f"train task 1, demonstration 1, {name} .*{message}"):
        data.write_data_set(tmp_path / "own", demos)


@parametrize("n", [2, 3])
def test_loader_against_loops(own, n, monkeypatch):
    """Sets are disjoint, samples lie within their demonstration, its last frame is its own.

    What the data do not allow is left out, or refused.
    """
    demos, got = own
    nothing = dict.fromkeys(("mirror", "recolour", "pairs"), False)
    monkeypatch.setattr(got, "manifest", {**got.manifest, **nothing})
    for words, message in (({"mirror": True}, "allow mirror"), ({"pairs": True}, "allow pairs"),
                           ({"K": 3}, "3 of a task")):
        with pytest.raises(data.UserError, match=message):
            data.TaskLoader(got, **{"B": 2, "K": 1, **words})
    loader = data.TaskLoader(got, B=3, K=2, M=5, random_support=False, demo_frames=n)
    for _ in range(10):
        b = next(loader)
        assert len(set(b["tasks"])) == 3
        for i, task in enumerate(b["tasks"]):
            numbers = b["demos"][i].tolist()
            assert sorted(numbers) == [0, 1, 2]
            for seen, number in zip([*b["frames_U"][i], *b["frames_q"][i]], numbers):
                times = [0, LENGTHS[number] // 2, -1] if n == 3 else [0, -1]
                assert_array_equal(seen, demos[task][number]["frames"][times])
            for side, m in np.ndindex(2, 5):
                number, time_ = b["control_demos"][i, side, m], b["times"][i, side, m]
                assert number in (numbers[:2], numbers[2:])[side]
                for name in ("images", "states", "actions"):
                    array = demos[task][number][name.replace("images", "frames")]
                    assert_array_equal(b[name][i, side, m], array[time_])
    model = TecNets(Settings(12, 20, demo_frames=n), **got.statistics())
    batch = train.to_tensors(b, "cpu")
    assert_close(model.losses(batch), looped_losses(model, batch), rtol=1e-4, atol=1e-5)


def turned(frames, angle):
    """Colours turned about the axis of greys, by Rodrigues' formula."""
    v, axis = frames.astype(float), np.full(3, 3 ** -0.5)
    along = (v @ axis)[..., None] * axis
    colours = along + np.cos(angle) * (v - along) + np.sin(angle) * np.cross(axis, v)
    return colours.clip(0, 255)


def test_augmented_batches(tasks):
    """Mirror, colours and hue change all frames of a task alike, and nothing else."""
    loader = data.TaskLoader(tasks, B=4, K=1)  # by default where the data allow it
    batch = loader.batch(1)
    loader.mirror = loader.recolour = loader.hue_jitter = False
    plain, drawn = loader.batch(1), [batch[name] for name in ("mirrored", "recoloured", "hues")]
    assert 0 < drawn[0].sum() < 4 and 0 < drawn[1].sum() < 4
    assert len(set(drawn[2])) == 4 and np.abs(drawn[2]).max() <= 0.6
    for i, (mirrored, recoloured, hue) in enumerate(zip(*drawn)):
        for name in ("frames_U", "frames_q", "images"):
            expected = plain[name][i, ..., ::1 - 2 * mirrored, :]
            expected = expected[..., [0, 2, 1] if recoloured else [0, 1, 2]]
            assert_allclose(batch[name][i], turned(expected, hue), atol=1)
        for name, signs in sim.MIRROR.items():
            assert_array_equal(batch[name][i], plain[name][i] * np.where(mirrored, signs, 1))


def test_batches_of_pairs(tasks):
    """Every task comes with its partner, both seen alike; all pairs come, K from 1 to 2.

    Times are T u^3: (1 / T)^(1/3) of them are 0.
    """
    loader, seen, surplus = data.TaskLoader(tasks, B=2, K=2, pairs=True), set(), []
    for position in range(60):
        batch = loader.batch(position)
        one, other = zip(*(batch[name] for name in ("tasks", "mirrored", "recoloured", "hues")))
        assert one[0] % 2 == 0 and other == (one[0] + 1, *one[1:])
        seen.add((*one[:3], batch["frames_U"].shape[1]))
        surplus.append((batch["times"] == 0) - np.take(LENGTHS, batch["control_demos"]) ** (-1 / 3))
    assert len(seen) == 16 and abs(np.mean(surplus)) < 0.03


def test_shards_of_a_batch_make_the_batch(tasks):
    """Whatever the number of threads; K is drawn alike."""
    loaders = []
    for threads, shard in ((1, (0, 1)), (1, (0, 2)), (2, (1, 2))):
        loaders.append(data.TaskLoader(tasks, B=4, K=2, M=2, threads=threads, shard=shard))
    for _ in range(3):
        whole, *parts = map(next, loaders)
        for name in whole:
            assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_an_interruption_costs_no_batch(tasks):
    """After an error and after Ctrl-C the next call gives the same position."""
    troubles, got, seen = {1: lambda: 1 / 0, 3: lambda: time.sleep(2)}, [], set()

    class Troubled(data.TaskLoader):
        def batch(self, position):
            troubles.pop(position, int)()
            return super().batch(position)

    loader = Troubled(tasks, B=2, K=1, threads=2)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C calls
    for _ in range(7):
        signal.setitimer(signal.ITIMER_REAL, 1)
        try:
            got.append(next(loader)["times"])
        except (ZeroDivisionError, KeyboardInterrupt) as error:
            seen.add(type(error))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(seen) == 2
    assert_array_equal(got, [loader.batch(position)["times"] for position in range(5)])


# Evaluation -----------------------------------------------------------------------------------

def test_a_policy_reads_evenly_spaced_frames():
    model, _ = small_method("lstm", torch.float32, demo_frames=5)
    demo, = random_demos([100], H=32, W=32, val=1)["val"][0]
    obs, actions = {"image": demo["frames"][7], "state": demo["states"][7]}, []
    for frames in (demo["frames"], demo["frames"][[0, 25, 50, 74, 99]]):
        actions.append(evaluate.policy_of(model, [{"frames": frames}])(obs))
    assert_array_equal(*actions)


@parametrize("name", train.METHODS)
def test_a_policy_refuses_pictures_of_another_size(name):
    """Of the demonstration, of the scene, of both; 31 x 32 gives as many features as 32 x 32."""
    model, _ = small_method(name, torch.float32)
    one, other = (random_demos(H=H, W=W, val=1)["val"][0][0] for H, W in ((32, 32), (31, 32)))
    for given, seen in ((other, one), (one, other), (other, other)):
        with pytest.raises((ValueError, RuntimeError)):
            obs = {"image": seen["frames"][0], "state": seen["states"][0]}
            evaluate.policy_of(model, [given])(obs)


def test_interval():
    """That of a binomial for independent trials, wider where the trials of a pair are alike."""
    rng = np.random.default_rng(0)
    for different in (12, 1):  # of the 12 trials of a pair
        successes = np.repeat(rng.random((100, different)) < 0.8, 12 // different, 1)
        rows = [dict(task=2 * pair + i % 2, success=bool(successes[pair, i]))
                for pair, i in np.ndindex(100, 12)]
        rate, interval = successes.mean(), evaluate.interval(rows)
        half = 1.96 * (rate * (1 - rate) / (100 * different)) ** 0.5
        assert interval == pytest.approx([rate - half, rate + half], abs=0.01)
