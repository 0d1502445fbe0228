"""Smoke tests, under a minute: values worked out by hand or by a slow independent formulation.

test_programs.py has the tests of the programs, which take minutes.
"""
import copy
import dataclasses
import math
import os
import pickle
import textwrap
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
from tecnets import (ControlNet, FeaturePoints, Settings, TecNets, control_loss, embedding_loss, first_convolution,
                     plain_first_convolution, sentence)

torch.set_num_threads(1)  # more are slow on small tensors when other processes run


def batch_of(B=5, K=2, Q=1, M=2, size=13, dtype=torch.float64):
    """A random batch at a small image size."""
    g = torch.Generator().manual_seed(0)
    images = lambda *shape: torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8, generator=g)
    return {"frames_U": images(B, K, 2), "frames_q": images(B, Q, 2), "images": images(B, 2, M),
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


def looped_embedding_loss(s_U, s_q, margin, negatives, hinge_mean):
    B, Q = s_q.shape[:2]
    terms = [F.relu(margin - s_q[j, k] @ s_U[j] + (s_q[j, k] @ s_U[i] if negatives == "sentences" else s_q[i, k] @ s_U[j]))
             for j in range(B) for i in range(B) for k in range(Q) if i != j]
    return torch.stack([term for term in terms if term > 0 or hinge_mean == "all"]).mean()


@pytest.mark.parametrize("hinge_mean", ["all", "violated"])
@pytest.mark.parametrize("negatives", ["sentences", "queries"])
def test_embedding_loss_against_loops(negatives, hinge_mean):
    """Loss and its gradients to both sides; some pairs violate the margin, some do not."""
    g = torch.Generator().manual_seed(1)
    s = [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4, 2, 3))]
    got, expected = (loss(*s, 0.3, negatives, hinge_mean) for loss in (embedding_loss, looped_embedding_loss))
    got, all_mean = got[0], embedding_loss(*s, 0.3, negatives)[0]
    torch.testing.assert_close(got, expected)
    assert (got > all_mean) == (hinge_mean == "violated")
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


@pytest.mark.parametrize("size", [13, 16, 125])
@pytest.mark.parametrize("with_sentence", [False, True])
def test_fast_first_convolution(size, with_sentence):
    """Values and gradients of the three plain lines, borders included."""
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(3 + 20 if with_sentence else 6, 16, 5, stride=2, padding=2).double()
    shape = (3, 2, size, size, 3) if with_sentence else (6, size, size, 6)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    s = torch.randn(3, 20, generator=g, dtype=torch.float64, requires_grad=True) if with_sentence else None
    weights, results = torch.randn(6, 16, (size + 1) // 2, (size + 1) // 2, generator=g, dtype=torch.float64), []
    for convolution in (plain_first_convolution, first_convolution):
        x = convolution(layer, images, s)
        assert x.shape == weights.shape
        results.append([x, *torch.autograd.grad((weights * x).sum(), [*layer.parameters(), *([s] if with_sentence else [])])])
    for plain, fast in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


LOSS_OPTIONS = [{}, dict(support_mean="norm-mean-norm", negatives="queries", margin=0.5, normalise_queries=False,
                         hinge_mean="violated", lambda_emb=0.7, lambda_U=0.2, lambda_q=0.5)]


@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_losses_by_loops(options):
    """Every loss of the paper, a task and a sample at a time."""
    model, batch = small_model(**options), batch_of()
    c, losses = model.settings, model.losses(batch)
    f_U, f_q = (torch.stack([model.embedding_net(demos) for demos in batch[name]]) for name in ("frames_U", "frames_q"))
    s_U = torch.stack([sentence(f, c.support_mean) for f in f_U])
    s_q = f_q / f_q.norm(dim=-1, keepdim=True) if c.normalise_queries else f_q
    expected = {"loss_emb": looped_embedding_loss(s_U, s_q, c.margin, c.negatives, c.hinge_mean)}
    for i, name in enumerate(("loss_U", "loss_q")):
        expected[name] = torch.stack([
            (model.control_net(batch["images"][j:j + 1, i, m:m + 1], batch["states"][j:j + 1, i, m:m + 1], s_U[j:j + 1])
             - batch["actions"][j, i, m]).square().mean() for j in range(5) for m in range(2)]).mean()
    expected["loss"] = sum(getattr(c, f"lambda_{name}") * expected[f"loss_{name}"] for name in ("emb", "U", "q"))
    expected["accuracy"] = embedding_loss(s_U, s_q, c.margin, c.negatives)[1]
    assert losses.keys() == expected.keys() and losses["loss"].requires_grad
    for name in expected:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-9), name


@pytest.mark.parametrize("chunk", [4, 9, 256])  # parts of 1, of 2 and 1, of all tasks
@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_chunked_backward_equals_one_big_backward(chunk, options):
    model, batch = small_model(**options), batch_of()
    plain = model.losses(batch)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(plain["loss"], list(model.parameters()))))
    losses, got = gradients(model, batch, chunk)
    assert losses.keys() == plain.keys() and not losses["loss"].requires_grad
    for name in losses:
        assert losses[name].item() == pytest.approx(plain[name].item(), rel=1e-9), name
    for name in expected:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("chunk", [4, 256])
def test_a_frozen_embedding_net(chunk):
    """The control net's gradient is the same."""
    model, batch = small_model(), batch_of()
    parameters = list(model.control_net.parameters())
    expected = torch.autograd.grad(model.losses(batch)["loss"], parameters)
    model.embedding_net.requires_grad_(False)
    model.backward(batch, chunk)
    assert all(p.grad is None for p in model.embedding_net.parameters())
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10)


def test_no_support_demo_and_no_spread_are_refused():
    """They would be NaN."""
    model, batch = small_model(), batch_of(K=0)
    for call in (model.backward, model.losses, lambda batch: model.embed(batch["frames_U"])):
        with pytest.raises(ValueError):
            call(batch)
    std = torch.ones(20)
    std[3] = 0
    with pytest.raises(ValueError, match="state_std"):
        TecNets(Settings(image_size=13), state_std=std)


def test_the_benchmark_compares_equals():
    """Its plain training step and action are those of the method, by the plain first convolution."""
    model, plain, batch = small_model(), small_model().to(memory_format=torch.contiguous_format), benchmark.random_batch(5, 13)
    batch = {name: values if values.dtype == torch.uint8 else values.double() for name, values in batch.items()}
    model.backward(batch)
    benchmark.plain_step(plain, batch)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-12)
    observation = batch["images"][3, 0, 0], batch["states"][3, 0, 0], torch.randn(20, dtype=torch.float64)
    torch.testing.assert_close(model.act(*observation), benchmark.plain_act(plain, *observation))
    with benchmark.plain_form():
        assert benchmark.tecnets.first_convolution is plain_first_convolution


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
    model.use_bfloat16 = True
    _, rounded = gradients(model, batch, 256)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rounded)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


def test_act_is_the_prediction_for_one_observation():
    model, batch = small_model().float().eval(), batch_of(dtype=torch.float32)
    s = model.embed(batch["frames_U"])
    expected = model.predict(batch["images"][:, 1], batch["states"][:, 1], s)[3, 1]
    torch.testing.assert_close(model.act(batch["images"][3, 1, 1], batch["states"][3, 1, 1], s[3]), expected)


@pytest.mark.parametrize("ends, used", [("both", (0, 1)), ("first", (0,)), ("last", (1,))])
def test_frames_that_are_embedded(ends, used):
    model, demos = small_model(ends=ends), batch_of()["frames_U"]
    assert model.embedding_net.convolutions[0].in_channels == 3 * len(used)
    for end in (0, 1):
        other = demos.clone()
        other[:, :, end] = 0
        assert torch.equal(model.embed(demos), model.embed(other)) == (end not in used)


WRONG = [  # call of a model and a batch, the error, what it says
    (lambda model, batch: model.embed(batch["frames_U"].double() / 255), TypeError, "ends is a tensor of uint8"),
    (lambda model, batch: model.embed(batch["images"][:, 0, :, None].repeat(1, 1, 4, 1, 1, 1)), ValueError, r"K, 2, 13, 13, 3\)"),
    (lambda model, batch: model.embed(batch["frames_U"][..., :12, :, :]), ValueError, "13, 13"),
    (lambda model, batch: model.embed(batch["frames_U"].numpy()), TypeError, "ndarray"),
    (lambda model, batch: model.embed(batch["frames_U"][0, 0]), ValueError, "K, 2"),
    (lambda model, batch: model.act(batch["images"][0, 0, 0], batch["states"][0, 0, 0] * torch.nan, torch.zeros(20)), ValueError,
     "not finite"),
    (lambda model, batch: model.predict(batch["images"][:, 0], batch["states"][:, 0, :1], torch.zeros(5, 20)), ValueError,
     "states"),
    (lambda model, batch: model.predict(batch["images"][:, 0], batch["states"][:, 0], torch.zeros(1, 20)), ValueError, "s has"),
    (lambda model, batch: model.backward({**batch, "actions": batch["actions"] * torch.inf}), ValueError, "actions .* not finite"),
    (lambda model, batch: model.backward({**batch, "frames_q": batch["frames_q"][1:]}), ValueError, r"frames_q .*\(5, Q"),
    (lambda model, batch: model.losses({name: batch[name] for name in batch if name != "frames_q"}), TypeError, "frames_q"),
    (lambda model, batch: control_loss(torch.zeros(2, 7), torch.zeros(7)), ValueError, "prediction"),
    (lambda model, batch: embedding_loss(torch.eye(3), torch.eye(3)[:, None], negatives="query"), ValueError,
     "sentences or queries"),
    (lambda model, batch: embedding_loss(torch.eye(3), torch.eye(3)), ValueError, "Q"),
    (lambda model, batch: sentence(torch.eye(3), "mean"), ValueError, "support_mean"),
    (lambda model, batch: Settings(margin=-0.1), ValueError, "margin"),
    (lambda model, batch: Settings(image_size=2), ValueError, "image_size is a whole number, 5 or more"),
    (lambda model, batch: TecNets(Settings(image_size=13), state_mean=torch.nan), ValueError, "state_mean"),
    (lambda model, batch: TecNets(Settings(image_size=13), state_std=torch.ones(19)), ValueError, r"\(20\)"),
    (lambda model, batch: Settings(normalise_queries="no"), ValueError, "True or False"),
    (lambda model, batch: first_convolution(torch.nn.Conv2d(3, 4, 5), batch["images"][0, 0] / 255), TypeError, "uint8"),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(small_model(), batch_of())


def test_the_policy_can_be_exported():
    """What is given is checked at no cost to torch.export."""
    model, batch = small_model().float(), batch_of(dtype=torch.float32)
    model.forward = model.predict
    s = model.embed(batch["frames_U"]).detach()
    given = batch["images"][:, 0], batch["states"][:, 0], s
    torch.testing.assert_close(torch.export.export(model, given).module()(*given), model.predict(*given))


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
    batch["frames_U"] = torch.randint(0, 256, (*batch["frames_U"].shape[:2], n, 32, 32, 3), dtype=torch.uint8, generator=g)
    return batch


def test_feature_points_of_a_bright_pixel():
    maps = torch.zeros(2, 3, 8, 6)
    maps[1, 2, 5, 1] = 1000
    points = FeaturePoints()(maps)
    torch.testing.assert_close(points[1, [2, 5]], torch.tensor([(1 - 3) / 6, (5 - 4) / 8]))
    torch.testing.assert_close(points[0], torch.tensor([-0.5 / 6] * 3 + [-0.5 / 8] * 3))


def test_parameters_that_the_inner_step_changes():
    assert list(baselines.MIL()._adapted()) == [
        "image_transform", "bias_transform", *(f"vision.{i}.{part}" for i in (0, 3, 6, 9) for part in ("weight", "bias")),
        "second.weight", "second.bias"]


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_inner_steps_by_hand(inner_steps):
    """Every parameter p of the inner pass becomes p - 0.01 clip(gradient, -10, 10), the rest stays; some are clipped.

    The rest are norm biases and the layers that only the learned loss has. The learned picture is clipped before.
    """
    model, batch = small_baseline(baselines.MIL, inner_steps=inner_steps), frames_batch()
    model.net.image_transform.data.uniform_(-0.01, 1.01)
    image, state = batch["images"][0, 0, :1], batch["states"][0, 0, :1]
    adapted = model.predict(image[None], state[None], model.embed(batch["frames_U"][:1]))[0]
    model.net.image_transform.data.clamp_(0, 1)
    for _ in range(inner_steps):
        model.zero_grad()
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


@pytest.mark.parametrize("second_order, inner_steps", [(True, 1), (True, 2), (False, 1)])
def test_fast_convolutions_of_mil(second_order, inner_steps, monkeypatch):
    """The meta-gradient by our second derivatives of a convolution is that by PyTorch's own."""
    model, batch = small_baseline(baselines.MIL, second_order=second_order, inner_steps=inner_steps), frames_batch(K=2)
    gradients = []
    for vision in (baselines.plain_mil_vision, baselines.mil_vision):
        monkeypatch.setattr(baselines, "mil_vision", vision)
        model.zero_grad()
        model.backward(batch)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, fast = gradients
    assert plain.keys() == fast.keys() and ("net.inner_head.weight" in plain) == second_order
    for name in plain:
        assert plain[name].abs().max() > 0
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-9, atol=1e-12, msg=name)


def test_meta_gradient_against_finite_differences():
    model, batch = small_baseline(baselines.MIL, action_scale=5.0), frames_batch(B=2, K=1)
    model.net.image_transform.data.fill_(0.3)  # away from the kink of its clipping
    model.backward(batch)
    rng, relative = torch.Generator().manual_seed(0), []
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        losses, h = [], 1e-8  # small: an inner gradient jumps where a unit switches off
        with torch.no_grad():
            for sign in (1, -1):
                p += sign * h * direction
                contexts = model.embed(batch["frames_U"])
                losses.append((model.predict(batch["images"][:, 1], batch["states"][:, 1], contexts) - batch["actions"][:, 1])
                              .square().mean().item())
                p -= sign * h * direction
        difference, slope = (losses[0] - losses[1]) / (2 * h), (p.grad * direction).sum().item() / 5 ** 2
        relative.append(abs(slope - difference) / max(abs(difference), 1e-3))
    assert max(relative) < 1e-3, relative


def test_first_order_meta_gradient():
    """It is the control loss' gradient at the adapted parameters; the inner loss has none."""
    model, batch = small_baseline(baselines.MIL, second_order=False, action_scale=5.0), frames_batch(B=1, K=1)
    model.backward(batch)
    context = model.embed(batch["frames_U"]).detach().requires_grad_()
    F.mse_loss(model.predict(batch["images"][:, 1], batch["states"][:, 1], context), batch["actions"][:, 1]).backward(inputs=[context])
    meta_gradient = torch.cat([p.grad.flatten() for p in model._adapted().values()])
    torch.testing.assert_close(meta_gradient, 5 ** 2 * context.grad[0])  # the outer loss is of actions times 5, too
    assert context.grad.abs().max() > 0
    assert {name for name, p in model.net.named_parameters() if p.grad is None} == {
        f"inner_{layer}.{part}" for layer in ("first", "head") for part in ("weight", "bias")}


def test_the_lstm_reads_the_demo_and_then_the_observation():
    model, batch = small_baseline(baselines.LSTM), frames_batch(B=1, K=1, n=4)
    images = torch.cat([batch["frames_U"][0, 0], batch["images"][0, 1, :1]])
    states = torch.cat([torch.zeros(4, 20, dtype=torch.float64), batch["states"][0, 1, :1]])
    expected = model.head(model.lstm(model._features(images, states)[:, None])[0][-1, 0])
    torch.testing.assert_close(model.act(images[-1], states[-1], model.embed(batch["frames_U"][0])), expected)


def test_an_untrained_lstm_keeps_its_memory():
    lstm = baselines.LSTM().lstm
    c = torch.ones(1, 1, lstm.hidden_size)
    _, (_, kept) = lstm(torch.zeros(1, 1, lstm.input_size), (torch.zeros_like(c), c))
    torch.testing.assert_close(kept, torch.sigmoid(c))  # the gates' biases are 1 and 0: nothing is added


def test_bfloat16_baselines():
    for method in (baselines.Contextual, baselines.LSTM):
        model, batch, gradients_ = small_baseline(method).float(), frames_batch(dtype=torch.float32), []
        for model.use_bfloat16 in (False, True):
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
    each = [model.predict(images, states, model.embed(batch["frames_U"][:, [k]])) for k in range(3)]
    torch.testing.assert_close(model.predict(images, states, model.embed(batch["frames_U"])), torch.stack(each).mean(0))
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
        whole = model.predict(batch["images"][:, 1], batch["states"][:, 1], model.embed(batch["frames_U"]))
        one = model.act(batch["images"][2, 1, 1], batch["states"][2, 1, 1], model.embed(batch["frames_U"][2]))
    torch.testing.assert_close(one, whole[2, 1])


def test_a_chunk_bounds_the_images_of_a_pass():
    model, batch, seen = small_baseline(baselines.Contextual), frames_batch(B=6, K=5, M=8, n=2), []
    model.vision.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model.backward(batch, chunk=100)
    assert seen == 3 * [2 * 5 * 8]  # two tasks at a time, each sample with each demo


@pytest.mark.parametrize("features", ["flat", "points"])
@pytest.mark.parametrize("name", train.METHODS)
def test_every_method_learns_two_tasks(name, features):
    """The demonstration alone tells the action: a bright square on the left or on the right of its last frame."""
    torch.manual_seed(0)
    network, settings, *_ = train.METHODS[name]
    model = network(settings(image_size=32, features=features))
    batch = frames_batch(B=2, K=1, M=4, n=2, dtype=torch.float32)
    batch["frames_U"][:] = 30
    for task, columns in enumerate((slice(2, 12), slice(20, 30))):
        batch["frames_U"][task, :, -1, 10:20, columns] = 250
    batch["frames_q"] = batch["frames_U"]
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
    env = sim.PushEnv(render_mode=None)
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
    env, results = sim.PushEnv(render_mode=None), []
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


def test_the_expert_goes_around_a_distractor():
    env = sim.PushEnv(render_mode=None)
    env.reset(seed=1017, options={"task": sim.make_task("train", 17), "side": 1})  # 10 cm on the straight way
    for _ in range(sim.HORIZON):
        info = env.step(sim.expert_action(env))[-1]
    assert info["success"] and info["distractor_displacement"] < sim.MOVED_DISTANCE
    env.close()


def test_joint_speeds_and_objects_stay_bounded(expert_trials):
    assert expert_trials[:, 1].max() < 3 and expert_trials[:, 2].min() > 0


def test_random_actions_solve_nothing():
    env = sim.PushEnv(render_mode=None)
    for index, trial in np.ndindex(4, 2):
        task = sim.make_task("test", index)
        assert not evaluate.rollout(env, evaluate.RandomPolicy([0, index, trial]), task, trial)["success"]
    env.close()


def test_an_episode_depends_on_task_and_seed_only():
    def states(env, index, steps=30):
        obs, _ = env.reset(seed=5, options={"task": sim.make_task("train", index)})
        rng = np.random.default_rng(0)
        return np.stack([obs["state"]] + [env.step(rng.uniform(-1, 1, 7))[0]["state"] for _ in range(steps)])
    one, other = sim.PushEnv(render_mode=None), sim.PushEnv()
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
    env = sim.PushEnv(render_mode=None)
    for side in (-1, 1):
        env.reset(seed=1, options={"task": sim.make_task("test", 0), "side": side, "swap": swap})
        assert env.target_position[1] * side > 0 > env.distractor_position[1] * side
    env.close()


def test_the_mirrored_arm():
    """Mirrored joints give the mirrored state, action and, nearly, picture (objects out of sight)."""
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
        np.testing.assert_allclose(actions[0] * sim.MIRRORED_ACTION, actions[1], atol=1e-6)
        assert 10 * np.abs(images[0][:, ::-1] - images[1]).mean() < np.abs(images[0] - images[1]).mean()
    empty = sim._background(250)[1].astype(int)
    assert np.abs(empty[:, ::-1] - empty).mean() < 0.01
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
    assert (env.picture(125) == frames[-1]).all() and (frames[-1] != frames[-2]).any()
    client, n = env.client, 125
    table = client.createVisualShape(client.GEOM_BOX, halfExtents=(2, 2, 0.01), rgbaColor=(*sim.TABLE_RGB, 1))
    client.createMultiBody(0, -1, table, (0, 0, -0.01))
    disc = client.createVisualShape(client.GEOM_CYLINDER, radius=sim.GOAL_RADIUS, length=0.001,
                                    rgbaColor=(*sim.GOAL_RGB, 1))
    client.createMultiBody(0, -1, disc, (0, 0, 0.001))
    pixels, body = sim._camera(client, 2 * n, (0, 0, 2 * n, 2 * n))
    whole = pixels.view(np.uint8).reshape(n, 2, n, 2, 4)[..., :3].mean((1, 3))
    assert body.all() and np.abs(whole - frames[-1]).max() <= 0.5
    env.close()
    monkeypatch.setattr(sim, "ARM_RGB", {number: sim.ARM_RGB[6 if number in (3, 6) else 5] for number in range(1, 7)})
    sim._arm.cache_clear()
    env, everything = film(1)
    env.close()
    sim._arm.cache_clear()
    assert (everything != frames).any(-1).sum() <= 5  # of 640,625 pixels: the windows differ, and their rounding


def test_a_lost_object_is_reported():
    env = sim.PushEnv(render_mode=None)
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
    env = sim.PushEnv(render_mode=None)
    env.reset(seed=0, options={"task": sim.make_task("train", 0)})
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(action)
    env.close()


@pytest.mark.parametrize("method", [baselines.Contextual, baselines.LSTM, baselines.MIL])
def test_wrong_calls_of_a_baseline(method):
    model, batch = small_baseline(method), frames_batch()
    context = model.embed(batch["frames_U"])
    given = batch["images"][:, 0], batch["states"][:, 0]
    model.predict(*given, context)
    for call in (lambda: model.embed(batch["frames_U"][..., 1:, :, :]), lambda: model.embed(batch["frames_U"].double()),
                 lambda: model.predict(*given, context[:1]), lambda: model.predict(*given, context[:, :0]),
                 lambda: model.predict(given[0], given[1] * torch.nan, context), lambda: baselines.Settings(inner_lr=-1.0),
                 lambda: model.backward({**batch, "images": batch["images"].double()}), lambda: method(state_std=0.0)):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_wrong_calls_of_the_simulator():
    task, env, black = sim.make_task("test", 0), sim.PushEnv(render_mode=None), (0, 0, 0)
    body = lambda **changes: dataclasses.replace(task.target, **changes)
    for call, message in (
            (lambda: sim.make_task("holdout", 0), "split"), (lambda: sim.make_task("test", -1), "index"),
            (lambda: body(size=math.nan), "size"), (lambda: body(mass=0), "mass"), (lambda: body(friction=-1), "friction"),
            (lambda: sim.Appearance("dots", (black, black), 0), "pattern"),
            (lambda: sim.Appearance("flat", (black, (0, 0, 2)), 0), "colours"),
            (lambda: sim.PushEnv(render_mode="human"), "render_mode"), (lambda: sim.PushEnv(image_size=0), "image_size"),
            *((lambda options=options: env.reset(options=options), "make_task") for options in (
                None, {"task": 3}, {"task": task, "side": 0}, {"task": task, "swap": 2}, {"task": task, "sides": 1}))):
        with pytest.raises(ValueError, match=message):
            call()
    env.reset(options={"task": task})
    with pytest.raises(ValueError, match="rgb_array"):
        env.render()
    env.close()
    with pytest.raises(TypeError):
        sim.make_task("test", 1.5)


def test_what_gymnasium_promises():
    env, task = sim.PushEnv(), {"task": sim.make_task("test", 0)}
    for call in (lambda: env.step([0] * 7), env.render, lambda: sim.expert_action(env), lambda: env.target_position):
        with pytest.raises(RuntimeError, match="call reset first"):
            call()
    places = []
    for seed in (7, None, 7, None, 8):
        obs, info = env.reset(seed=seed, options=task)
        places.append(tuple(env.target_position))
    assert places[:2] == places[2:4] and len(set(places)) == 3
    assert (env.render() == obs["image"]).all() and env.render_mode in env.metadata["render_modes"]
    for refused in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copied or pickled"):
            refused(env)
    for name, box in env.observation_space.items():
        assert obs[name].shape == box.shape and obs[name].dtype == box.dtype
        assert box.low <= obs[name].min() and obs[name].max() <= box.high
    assert env.action_space.shape == (7,) and obs.keys() == env.observation_space.keys()
    while not env.step([0] * 7)[3]:
        pass
    with pytest.raises(RuntimeError, match="ended after 100 steps"):
        env.step([0] * 7)
    env.close()
    env.close()
    copy.deepcopy(env).reset(options=task)


@pytest.mark.filterwarnings("ignore")
def test_gymnasiums_own_check():
    """The wrapper of PushEnv's docstring; Gymnasium is not among the requirements."""
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    names = {"gymnasium": gymnasium, "PushEnv": sim.PushEnv}
    exec(textwrap.dedent(sim.PushEnv.__doc__[sim.PushEnv.__doc__.index("        class Pushing"):]), names)
    check_env(names["Pushing"](sim.make_task("test", 0)))


def test_a_task_of_ones_own():
    """A pair of objects outside the splits can be recorded, the same again where meshes are given by their files."""
    bodies = sim.make_task("train", 7).target, sim.make_task("test", 30).target
    from_files = (dataclasses.replace(body, mesh_id=sim._mesh(body.mesh_id)[0]) for body in bodies)
    env, seed = sim.PushEnv(), 0
    demo, again, other = (data.record_demo(env, sim.Task(*task), 1, seed) for task in (
        ("own", 5, *bodies), ("own", 5, *from_files), ("another", 5, *bodies)))
    env.close()
    assert {name: (array.shape, array.dtype) for name, array in demo.items()} == {
        "frames": ((100, 125, 125, 3), np.uint8), "states": ((100, 20), np.float32), "actions": ((100, 7), np.float32)}
    assert all((demo[name] == again[name]).all() and (demo[name] != other[name]).any() for name in demo)


def test_bodies_that_do_not_fit(tmp_path):
    """Too large a pair, and a mesh of squares, are refused at once."""
    env, task = sim.PushEnv(render_mode=None), sim.make_task("test", 0)
    (tmp_path / "squares.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 1\nf 1 2 3 4\n")
    for change, message in ((dict(size=0.6), "between them"), (dict(mesh_id=str(tmp_path / "squares.obj")), "triangles")):
        body = dataclasses.replace(task.target, **change)
        with pytest.raises(ValueError, match=message):
            env.reset(seed=0, options={"task": sim.Task("own", 0, body, body)})
    env.close()


# The data -------------------------------------------------------------------------------------

def random_demos(T, size, states, actions, **counts):
    """Arrays of demonstrations, counts[split] = (tasks, demos of each), as data.write_data_set takes them."""
    rng = np.random.default_rng(0)
    demo = lambda: {"frames": rng.integers(0, 256, (T, size, size, 3), np.uint8),
                    "states": rng.normal(size=(T, states)).astype(np.float32),
                    "actions": rng.normal(size=(T, actions)).astype(np.float32)}
    return {split: [[demo() for _ in range(demos)] for _ in range(tasks)] for split, (tasks, demos) in counts.items()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Small pictures, the simulator's states, actions and mirror."""
    folder = tmp_path_factory.mktemp("data") / "small"
    data.write_data_set(folder, random_demos(100, 16, 20, 7, train=(4, 4), val=(1, 4)), sim.MIRROR, recolour=True, pairs=True)
    return data.TaskSet(folder, "train")


def test_data_of_ones_own(tmp_path):
    """Arrays of other sizes come back as they were given, with what a network needs to know of them."""
    demos = random_demos(7, 32, 5, 3, train=(4, 3), val=(2, 3))
    data.write_data_set(tmp_path / "own", demos)
    manifest = data.read_manifest(tmp_path / "own")
    assert (manifest["state_dim"], manifest["action_dim"], manifest["mirror"]) == (5, 3, None)
    for split in demos:
        got = data.TaskSet(tmp_path / "own", split)
        for name in ("states", "actions"):
            assert (getattr(got, name) == [[demo[name] for demo in task] for task in demos[split]]).all()
        frames = np.array([[demo["frames"] for demo in task] for task in demos[split]])
        assert (got.frames(*np.ogrid[:len(frames), :3, :7]) == frames).all() and (got.ends == frames[:, :, [0, 6]]).all()
        mean, std = got.state_statistics()
        np.testing.assert_allclose(mean, got.states.mean((0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(std, got.states.std((0, 1, 2)), atol=1e-5)
    for symmetry in ("mirror", "recolour", "pairs"):
        with pytest.raises(data.UserError, match=symmetry):
            data.TaskLoader(got, B=2, K=1, Q=1, F=1, seed=0, **{symmetry: True})
    with pytest.raises(data.UserError, match="holds a data set"):
        data.write_data_set(tmp_path / "own", demos)


@pytest.mark.parametrize("damage, message", [
    (lambda demo: {"states": demo["states"][:-1]}, "shape"), (lambda demo: {"actions": demo["actions"][:, :-1]}, "shape"),
    (lambda demo: {"frames": demo["frames"][:, :, :-1]}, "shape"), (lambda demo: {"frames": demo["frames"] / 255}, "uint8"),
    (lambda demo: {"states": demo["states"] * np.nan}, "finite")])
def test_arrays_that_are_no_data_set(damage, message, tmp_path):
    demos = random_demos(7, 32, 5, 3, train=(2, 2), val=(1, 2))
    demos["train"][1][1] |= damage(demos["train"][1][1])
    with pytest.raises(ValueError, match=message):
        data.write_data_set(tmp_path / "own", demos)
    assert not (tmp_path / "own").exists()


def test_own_mirror_signs(tmp_path):
    signs = {"states": [1, -1, 1, 1, -1], "actions": [-1, 1, 1]}
    data.write_data_set(tmp_path / "own", random_demos(7, 32, 5, 3, train=(4, 3), val=(1, 3)), signs)
    check_mirror(data.TaskSet(tmp_path / "own", "train"), signs["states"], signs["actions"])


def check_mirror(tasks, state_signs, action_signs):
    plain, mirrored = (data.TaskLoader(tasks, B=4, K=1, Q=1, F=2, seed=0, mirror=mirror).batch(1) for mirror in (False, True))
    assert not plain["mirrored"].any() and 0 < mirrored["mirrored"].sum() < 4
    for i, flipped in enumerate(mirrored["mirrored"]):
        for name in ("frames_U", "frames_q", "images"):
            assert (mirrored[name][i] == (plain[name][i][..., ::-1, :] if flipped else plain[name][i])).all()
        for name, signs in (("states", state_signs), ("actions", action_signs)):
            assert (mirrored[name][i] == plain[name][i] * (signs if flipped else 1)).all()


def test_mirrored_batches(tasks):
    check_mirror(tasks, sim.MIRRORED_STATE, sim.MIRRORED_ACTION)


def test_recoloured_batches(tasks):
    """Green and blue exchanged in all frames of half of the tasks, nothing else changed."""
    plain, changed = (data.TaskLoader(tasks, B=4, K=1, Q=1, F=2, seed=0, recolour=recolour).batch(1) for recolour in (False, True))
    assert not plain["recoloured"].any() and 0 < changed["recoloured"].sum() < 4
    for name in plain.keys() - {"recoloured"}:
        expected = plain[name].copy()
        if expected.dtype == np.uint8:
            expected[changed["recoloured"]] = expected[changed["recoloured"]][..., [0, 2, 1]]
        assert (changed[name] == expected).all()


def test_turned_hues(tasks):
    """A third of a turn moves every channel to the next one, greys stay; batches turn each task's frames alike, nothing else."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), np.uint8)
    assert np.abs(data.turn_hue(frames, 2 * np.pi / 3) - frames[..., [2, 0, 1]].astype(float)).max() <= 1
    greys = np.repeat(frames[..., :1], 3, -1)
    assert np.abs(data.turn_hue(greys, 0.4) - greys.astype(float)).max() <= 1
    plain, turned = (data.TaskLoader(tasks, B=4, K=1, Q=1, F=2, seed=0, hue=hue).batch(1) for hue in (0, 0.6))
    assert not plain["hues"].any() and len(set(turned["hues"])) == 4 and 0 < np.abs(turned["hues"]).max() <= 0.6
    for name in plain.keys() - {"hues"}:
        for i, expected in enumerate(plain[name]):
            if expected.dtype == np.uint8:
                expected = data.turn_hue(expected, turned["hues"][i])
            assert (turned[name][i] == expected).all()
    with pytest.raises(ValueError, match="angle"):
        data.TaskLoader(tasks, B=2, K=1, Q=1, F=1, seed=0, hue=-1)


def test_batches_of_pairs(tasks):
    """Every task comes with its partner, both seen alike; all pairs come."""
    loader, seen = data.TaskLoader(tasks, B=2, K=1, Q=1, F=1, seed=0, mirror=True, recolour=True, hue=0.6, pairs=True), set()
    for position in range(20):
        batch = loader.batch(position)
        assert batch["tasks"][0] % 2 == 0 and batch["tasks"][1] == batch["tasks"][0] + 1
        assert all(batch[name][0] == batch[name][1] for name in ("mirrored", "recoloured", "hues"))
        seen.add((*batch["tasks"].tolist(), bool(batch["mirrored"][0]), bool(batch["recoloured"][0])))
    assert len(seen) == 8
    with pytest.raises(data.UserError, match="whole pairs"):
        data.TaskLoader(tasks, B=3, K=1, Q=1, F=1, seed=0, pairs=True)


def test_loader(tasks):
    loader = data.TaskLoader(tasks, B=3, K=2, Q=1, F=3, seed=0)
    for _ in range(20):
        b = next(loader)
        for i, task in enumerate(b["tasks"]):
            support, query = set(b["demos"][i, :2]), set(b["demos"][i, 2:])
            assert len(support) == 2 and len(query) == 1 and not support & query
            assert set(b["control_demos"][i, 0]) <= support and set(b["control_demos"][i, 1]) <= query
            assert (b["frames_q"][i, 0] == tasks.ends[task, b["demos"][i, 2]]).all()
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


def test_wrong_calls_of_the_data(tasks):
    loader = lambda *words, **options: data.TaskLoader(tasks, *words, seed=0, **options)
    write = lambda *words, mirror=None, **counts: data.write_data_set("none", random_demos(*words, **counts), mirror)
    for call, error, message in (
            (lambda: data.TaskSet("none", "tset"), ValueError, "splits"),
            (lambda: tasks.frame(0, 0, 100), IndexError, "time 100"),
            (lambda: tasks.frame(-1, 0, 0), IndexError, "task -1"),
            (lambda: tasks.frames(0, [0, 4], 0), IndexError, "demo 4"),
            (lambda: data.evenly_spaced(100, 1), ValueError, "at least 2"),
            (lambda: data.evenly_spaced(3, 4), ValueError, "3"),
            (lambda: data.generate("none", {"tests": 1}, 2, 0), ValueError, "train"),
            (lambda: data.generate("none", {"val": 0}, 2, 0), ValueError, "1"),
            (lambda: loader(2, 1, 1, 0), ValueError, "F is"),
            (lambda: loader(2, 1.0, 1, 2), TypeError, "integer"),
            (lambda: loader(2, 1, 1, 2, early=math.nan), ValueError, "early"),
            (lambda: loader(2, 1, 1, 2, demo_frames=101), ValueError, "101"),
            (lambda: write(1, 8, 5, 3, train=(2, 2), val=(1, 2)), ValueError, "first and a last"),
            (lambda: write(3, 8, 5, 3, train=(2, 2), valid=(1, 2)), ValueError, "train and val"),
            (lambda: write(3, 8, 5, 3, train=(2, 2), val=(1, 3)), ValueError, "2 demonstrations"),
            (lambda: write(3, 8, 2, 1, train=(2, 2), val=(1, 2), mirror={"states": [1, 0], "actions": [1]}), ValueError, "signs")):
        with pytest.raises(error, match=message):
            call()
    demo, = random_demos(100, 16, 20, 7, val=(1, 1))["val"][0]
    for demos, message in (([demo] * 3, "4 demonstrations"), ([{**demo, "frames": demo["frames"] / 255}] * 4, "uint8")):
        with pytest.raises(ValueError, match=message):
            data.write_task("none", tasks.manifest, "val", 0, demos)
    assert not Path("none").exists()


def test_shares_of_a_batch_make_the_batch(tasks):
    """Of uneven shares, too, and whatever the number of threads; K is drawn alike."""
    words = dict(B=3, K=2, Q=1, F=2, seed=0, random_support=True, mirror=True)
    whole = data.TaskLoader(tasks, **words)
    shares = [data.TaskLoader(tasks, **words, share=(i, 2), threads=1 + i) for i in range(2)]
    for _ in range(5):
        expected, parts = next(whole), [next(share) for share in shares]
        assert len(parts[0]["tasks"]) == 1 and len(parts[1]["tasks"]) == 2
        for name in expected:
            assert (np.concatenate([part[name] for part in parts]) == expected[name]).all()
    with pytest.raises(data.UserError, match="3 tasks cannot be shared by 4"):
        data.TaskLoader(tasks, **words, share=(0, 4))


def test_random_support(tasks):
    loader = data.TaskLoader(tasks, B=2, K=3, Q=1, F=1, seed=0, random_support=True)
    assert {loader.batch(i)["frames_U"].shape[1] for i in range(20)} == {1, 2, 3}


@pytest.mark.parametrize("early, share", [(1, 0.01), (3, 0.01 ** (1 / 3))])
def test_share_of_first_frames(tasks, early, share):
    loader = data.TaskLoader(tasks, B=4, K=1, Q=1, F=100, seed=0, early=early)
    times = np.stack([loader.batch(i)["times"] for i in range(10)])
    assert abs((times == 0).mean() - share) < 0.02 and times.max() == 99


def test_interval():
    """That of a binomial for independent trials, wider where the trials of a pair of tasks are alike, the same every time."""
    rng = np.random.default_rng(0)
    for different, independent in ((12, 1200), (1, 100)):  # of the 12 trials of a pair
        rows = [dict(task=2 * pair + i % 2, success=bool(success)) for pair in range(100)
                for i, success in enumerate(np.resize(rng.random(different) < 0.8, 12))]
        rate, interval = np.mean([row["success"] for row in rows]), evaluate.interval(rows)
        half = 1.96 * (rate * (1 - rate) / independent) ** 0.5
        assert interval == pytest.approx([rate - half, rate + half], abs=0.01)
        assert evaluate.interval(rows[::-1]) == interval
    assert evaluate.interval([dict(task=0, success=True)]) == [1, 1]
