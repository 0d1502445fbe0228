"""The paper's baselines, with TecNets' calls: a contextual policy, an LSTM policy, and MIL.

    python train.py --method mil --name mil --steps 30000
    python evaluate.py --checkpoint runs/mil/last.pt --out runs/mil/test

Settings are those of MIL's public code (github.com/tianheyu927/mil, scripts/run_sim_push.sh, the
form with states and actions) and paper (Finn et al., One-Shot Visual Imitation Learning via
Meta-Learning, CoRL 2017, arXiv 1709.04905, section 6 and appendix A.2), simulated pushing. Here
only the frames of a demonstration are seen, its states and actions are not ("video only"), with the
linear learned loss of that paper; the public video-only script adds a temporal loss. The other two
have no public code; they take MIL's convolutions and fully connected layers, without the learned
picture, numbers and loss of its inner step.

Some things differ from the published. For speed, MIL reads 10 evenly spaced frames of one
demonstration and draws 10 control samples from three others; it had all 100 frames of one and all
100 of another. The LSTM reads 10 frames, and the LSTM and contextual draw 8 control samples, from
three demonstrations, too. As in our TecNets, a step has 16 tasks (published: 15; the runs in
results/ drew them by pairs), control samples favour the start, there are mirror and changed
colours, and convolutions pad both sides alike. The learning rate falls to zero in the last fifth of
the steps (published: constant).

Dimensions in comments are those of tecnets.py.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tecnets import CONVOLUTIONS, KERNEL, Policy, Sizes, processes

CONVOLUTION = dict(stride=2, padding=KERNEL // 2)


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes of MIL's public code, which all baselines share."""
    demo_frames: int = 2  # evenly spaced frames of a demonstration
    filters: int = 16  # in each of 4 convolutions, 5 x 5, stride 2
    units: int = 200  # in each of 2 fully connected layers


@dataclass(frozen=True)
class LSTMSettings(Settings):
    demo_frames: int = 10
    lstm_units: int = 512  # MIL's paper


@dataclass(frozen=True)
class MILSettings(Settings):
    demo_frames: int = 10
    bias_transform: int = 20  # learned inputs of the first fully connected layer
    inner_lr: float = 0.01  # of the gradient step on a demonstration
    inner_clip: float = 10.0  # of that gradient's elements
    action_scale: float = 50.0  # of the actions in the inner and the outer loss


# Layers ---------------------------------------------------------------------------------------

class LayerNorm(nn.Module):
    """Over C, H, W of one example, with a bias per channel and no gain."""

    def __init__(self, filters):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x):
        x = x.movedim(1, -1)  # channels last, as they are in memory: no copy
        return F.layer_norm(x, x.shape[1:]).movedim(-1, 1) + self.bias[:, None, None]


class FeaturePoints(nn.Module):
    """The expected coordinates of each map under its softmax: (N, C, h, w) -> (N, 2 C), x then y.

    As in MIL's public code, coordinate i of n counts as (i - n / 2) / n.
    """

    def forward(self, x):
        h, w = x.shape[2:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = x.flatten(2).softmax(-1, dtype).unflatten(2, (h, w))
        x, y = ((torch.arange(n, dtype=dtype, device=x.device) - n / 2) / n for n in (w, h))
        return torch.cat([(weights.sum(2) * x).sum(-1), (weights.sum(3) * y).sum(-1)], 1)


def vision(planes, settings):
    """The layers from images (N, planes, H, W) in [0, 1] to feature points (N, F), and F."""
    layers = []
    for _ in range(CONVOLUTIONS):
        layers += [nn.Conv2d(planes, settings.filters, KERNEL, **CONVOLUTION),
                   LayerNorm(settings.filters),
                   nn.ReLU()]
        planes = settings.filters
    return nn.Sequential(*layers, FeaturePoints()), 2 * settings.filters


def hidden_layers(inputs, settings):
    """The two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, settings.units), nn.ReLU(),
                         nn.Linear(settings.units, settings.units), nn.ReLU())


def to_planes(images, dtype):
    """uint8 (N, H, W, C) -> (N, C, H, W) in [0, 1]."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images are uint8, 0 to 255, not {images.dtype}")
    return images.to(dtype).movedim(-1, 1) / 255


def initialise(module):
    """MIL's: convolutions Glorot uniform, other layers N(0, 0.01), biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


# The methods ----------------------------------------------------------------------------------

class Baseline(Policy):
    """Behaviour cloning of query demos: a Policy with the training step of TecNets.

    A subclass makes its layers, with whatever weights, in `__init__`.
    """

    loss_scale = 1.0  # of gradients; to Adam it matters only beside its epsilon

    def backward(self, batch, chunk=256):
        """Add the gradient of L_ctr^q, times `loss_scale`, to the parameters'; the loss, detached.

        `batch` is that of TecNets; of the support demos the frames are used, of the query demos the
        control samples. Tasks run in chunks of at most `chunk` of these images together, but at
        least one task. Several processes have a shard each, as with TecNets.
        """
        frames = batch["frames_U"]  # (b, K, n, H, W, 3)
        images, states, actions = (batch[name][:, 1] for name in ("images", "states", "actions"))
        b, K, n = frames.shape[:3]
        B, total = b * processes(), 0.0
        size = max(1, chunk // (K * (n + images.shape[1])))
        for start in range(0, b, size):
            at = slice(start, start + size)
            context = self.embed(frames[at])
            loss = self.imitation_loss(images[at], states[at], actions[at], context)
            loss = len(context) / B * loss
            (self.loss_scale * loss).backward()
            total = total + loss.detach()
        return {"loss": total, "loss_q": total}


class Contextual(Baseline):
    """Feed-forward on a demo's last frame, the current image and the state.

    Actions are averaged over demos.
    """

    def __init__(self, settings=Settings(), **statistics):
        super().__init__(settings, **statistics)
        self.vision, features = vision(2 * 3, settings)
        self.layers = hidden_layers(features + settings.state_dim, settings)
        self.layers.append(nn.Linear(settings.units, settings.action_dim))
        self.apply(initialise)

    def embed(self, frames):
        return frames[..., -1, :, :, :]  # (..., K, H, W, 3)

    def respond(self, images, states, context):
        both = torch.broadcast_tensors(images[:, None], context[:, :, None])
        both = torch.cat(both, -1)  # (B, K, M, H, W, 6)
        shape = both.shape[:3]
        features = self.vision(to_planes(both.flatten(0, 2), states.dtype))
        states = states[:, None].expand(*shape, -1).flatten(0, 2)
        actions = self.layers(torch.cat([features, states], 1))  # (B K M, A)
        return actions.unflatten(0, shape).mean(1)


class LSTM(Baseline):
    """Reads a demo's n frames, with mean states, then the current image and state.

    Actions are averaged over demos. The cells' biases start as TensorFlow's, at 0, and at 1 for the
    forget gate: PyTorch's random ones would fill the memory with numbers that do not depend on the
    demo.
    """

    def __init__(self, settings=LSTMSettings(), **statistics):
        super().__init__(settings, **statistics)
        self.vision, features = vision(3, settings)
        self.layers = hidden_layers(features + settings.state_dim, settings)
        self.lstm = nn.LSTM(settings.units, settings.lstm_units)
        for bias in (self.lstm.bias_ih_l0, self.lstm.bias_hh_l0):
            nn.init.zeros_(bias)
        n = settings.lstm_units
        nn.init.ones_(self.lstm.bias_hh_l0.data[n:2 * n])  # of the forget gate
        self.head = nn.Linear(n, settings.action_dim)
        self.apply(initialise)

    def _features(self, images, states):
        features = self.vision(to_planes(images, states.dtype))
        return self.layers(torch.cat([features, states], 1))  # (N, units)

    def embed(self, frames):
        """The memory after each demo: (..., K, n, H, W, 3) -> (..., K, 2, lstm_units)."""
        self.check_size(frames)
        with self.autocast():
            images = frames.flatten(0, -4)
            states = self.state_mean.new_zeros(images.shape[0], self.settings.state_dim)
            features = self._features(images, states)
            features = features.unflatten(0, (-1, frames.shape[-4]))  # (demos, n, units)
            memory = torch.cat(self.lstm(features.transpose(0, 1))[1])  # (2, demos, lstm_units)
        memory = memory.transpose(0, 1).unflatten(0, frames.shape[:-4])
        return memory.to(self.state_mean.dtype)

    def respond(self, images, states, context):
        M, K = images.shape[1], context.shape[1]
        features = self._features(images.flatten(0, 1), states.flatten(0, 1))
        features = features.unflatten(0, (-1, M)).repeat(1, K, 1)  # (B, K M, units)
        memory = context.repeat_interleave(M, 1).flatten(0, 1).to(features.dtype)
        h, c = memory.transpose(0, 1)[:, None].contiguous()  # (1, B K M, lstm_units) each
        output = self.lstm(features.flatten(0, 1)[None], (h, c))[0][0]
        return self.head(output).unflatten(0, (-1, K, M)).mean(1)


class MILNet(nn.Module):
    """The network that MIL adapts.

    A learned picture is added to the image's channels, and learned numbers to the features. The
    inner pass has a head of its own, whose mean square is the loss that is learned, and, as it sees
    no state, a first fully connected layer of its own.
    """

    def __init__(self, settings):
        super().__init__()
        c = settings
        self.image_transform = nn.Parameter(torch.zeros(3, c.image_height, c.image_width))
        self.vision, features = vision(2 * 3, c)
        self.bias_transform = nn.Parameter(torch.zeros(c.bias_transform))
        features += c.bias_transform
        self.first = nn.Linear(features + c.state_dim, c.units)
        self.inner_first = nn.Linear(features, c.units)
        self.second = nn.Linear(c.units, c.units)
        self.head = nn.Linear(c.units, c.action_dim)
        self.inner_head = nn.Linear(c.units, c.action_dim)

    def forward(self, images, states=None):
        """Images (N, H, W, 3) uint8 -> (N, A): actions with states (N, S), else the inner pass."""
        planes = to_planes(images, self.image_transform.dtype)
        x = mil_vision(self.vision, planes, self.image_transform)
        x = torch.cat([x, self.bias_transform.expand(images.shape[0], -1)], 1)
        if states is None:
            return self.inner_head(F.relu(self.second(F.relu(self.inner_first(x)))))
        return self.head(F.relu(self.second(F.relu(self.first(torch.cat([x, states], 1))))))


class MIL(Baseline):
    """Meta imitation learning: a gradient step on the demo, then behaviour cloning.

    A context holds the adapted parameters. Norm biases, and layers that only one of the two passes
    has, are meta-learned, not adapted.
    """

    def __init__(self, settings=MILSettings(), **statistics):
        super().__init__(settings, **statistics)
        self.net = MILNet(settings)
        self.loss_scale = settings.action_scale ** 2
        self.apply(initialise)

    def _adapted(self):
        """Names and parameters that the inner step changes and the adapted network uses."""
        norms = {f"{name}.bias" for name, module in self.net.named_modules()
                 if isinstance(module, LayerNorm)}
        one_pass_only = ("first.", "inner_first.", "head.", "inner_head.")
        return {name: p for name, p in self.net.named_parameters()
                if name not in norms and not name.startswith(one_pass_only)}

    def embed(self, frames):
        """The inner step on all demos of a task: (..., K, n, H, W, 3) -> parameters (..., P)."""
        if frames.ndim > 5:
            return torch.stack([self.embed(task) for task in frames])
        self.check_size(frames)
        c, weights, create_graph = self.settings, self._adapted(), torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), self.autocast():
            # Before the step; it may lead out of [0, 1].
            weights["image_transform"] = weights["image_transform"].clamp(0, 1)
            output = torch.func.functional_call(self.net, weights, frames.flatten(0, 1))
            # The learned loss: the demonstrator's actions, hidden, count as zeros.
            loss = (c.action_scale * output).square().mean()
            gradients = torch.autograd.grad(loss, weights.values(), create_graph=create_graph)
            context = [p - c.inner_lr * gradient.clamp(-c.inner_clip, c.inner_clip)
                       for p, gradient in zip(weights.values(), gradients)]
        return torch.cat([p.flatten() for p in context])

    def respond(self, images, states, context):
        adapted = self._adapted()
        sizes = [p.numel() for p in adapted.values()]
        actions = []
        for task_images, task_states, values in zip(images, states, context):
            weights = {name: part.view_as(p)
                       for (name, p), part in zip(adapted.items(), values.split(sizes))}
            given = task_images, task_states
            actions.append(torch.func.functional_call(self.net, weights, given))
        return torch.stack(actions)


# Same numbers, faster: MIL's convolutions -----------------------------------------------------

def plain_mil_vision(vision, planes, picture):
    """Features (N, F) of images (N, 3, H, W) with the learned picture (3, H, W) beside each."""
    return vision(torch.cat([planes, picture.expand(planes.shape[0], -1, -1, -1)], 1))


def mil_vision(vision, planes, picture):
    """What plain_mil_vision computes, and its first and second derivatives, by two shortcuts.

    1. The picture is the same for all images: its response in the first convolution is computed
       once.
    2. The derivative of the inner step needs a convolution's second derivatives. PyTorch derives
       them by convolutions with kernels as large as an image; they are three ordinary convolutions
       and derivatives of them.
    """
    if torch.is_autocast_enabled(planes.device.type):
        return plain_mil_vision(vision, planes, picture)
    first, *rest = vision
    x = _Convolution.apply(planes, first.weight[:, :3], first.bias)
    x = x + _Convolution.apply(picture[None], first.weight[:, 3:], None)
    for layer in rest:
        if isinstance(layer, nn.Conv2d):
            x = _Convolution.apply(x, layer.weight, layer.bias)
        else:
            x = layer(x)
    return x


class _Convolution(torch.autograd.Function):
    """x (N, C, H, W), w (C', C, 5, 5) and b (C') or None -> (N, C', h, w)."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, b, **CONVOLUTION)

    @staticmethod
    def backward(ctx, gy):
        gx, gw = _ConvolutionBackward.apply(gy, *ctx.saved_tensors)
        return gx, gw, gy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


class _ConvolutionBackward(torch.autograd.Function):
    """gy, x and w -> the gradients gx, None where x needs none, and gw.

    Bilinear, in (gy, w) and in (gy, x).
    """

    @staticmethod
    def forward(ctx, gy, x, w):
        ctx.save_for_backward(gy, x, w)
        return _derivatives(gy, x, w, ctx.needs_input_grad[1])

    @staticmethod
    def backward(ctx, ggx, ggw):
        gy, x, w = ctx.saved_tensors
        if ggx is None:
            return F.conv2d(x, ggw, **CONVOLUTION), None, None
        ggy = F.conv2d(ggx, w, **CONVOLUTION) + F.conv2d(x, ggw, **CONVOLUTION)
        return ggy, *_derivatives(gy, ggx, ggw, True)


def _derivatives(gy, x, w, of_x):
    return torch.ops.aten.convolution_backward(
        gy, x, w, None, [2, 2], [2, 2], [1, 1], False, [0, 0], 1, [of_x, True, False])[:2]
