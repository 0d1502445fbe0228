"""The paper's baselines, with TecNets' calls: a contextual policy, an LSTM policy, and MIL.

    python train.py --method mil --name mil --steps 30000
    python evaluate.py --checkpoint runs/mil/last.pt --out runs/mil/test

Settings are those of MIL's public code (github.com/tianheyu927/mil, scripts/run_sim_push.sh) and paper
(Finn et al., One-Shot Visual Imitation Learning via Meta-Learning, CoRL 2017, arXiv 1709.04905,
section 6 and appendix A.2), simulated pushing, video only: the frames of a demonstration are seen, its
states and actions are not. The other two have no public code; they take MIL's convolutions and fully connected layers,
without what MIL has for its inner step: the learned picture, numbers and loss.

Some things differ from the published. For speed, MIL reads 10 evenly spaced frames of one demonstration and draws 10
control samples from three others; it had all 100 frames of one and all 100 of another. The LSTM reads 10 frames, and the
LSTM and contextual draw 8 control samples, from three demonstrations, too. As in our TecNets, tasks are drawn by pairs, 16
in a step (published: 15, independent), control samples favour the start, there are mirror and changed colours, and
convolutions pad both sides alike. The learning rate falls to zero in the last fifth of the steps (published: constant).

`embed` turns demonstrations into a context, `predict` and `act` take the place of TecNets' with
the context for the sentence; what is given is checked as there. Dimensions in comments: B tasks, K demos
of a task, n frames of a demo, evenly spaced, M control samples of a task, N images, H x W pixels, S in a state, A in an action.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tecnets import CONVOLUTIONS, KERNEL, check, check_batch, check_settings, features_of_maps, gathered, statistics

CONVOLUTION = dict(stride=2, padding=KERNEL // 2)


@dataclass(frozen=True)
class Settings:
    """Sizes and constants of MIL's public code; the LSTM's size is of MIL's paper."""
    image_size: int = 125
    state_dim: int = 20
    action_dim: int = 7
    filters: int = 16  # in each of 4 convolutions, 5 x 5, stride 2
    units: int = 200  # in each of 2 fully connected layers
    lstm_units: int = 512
    bias_transform: int = 20  # MIL's learned inputs of the first fully connected layer
    features: str = "points"  # of the last convolution's maps: their feature points, or for comparison "flat", as in TecNets
    inner_steps: int = 1  # MIL's gradient steps on a demonstration
    inner_lr: float = 0.01  # of such a step
    inner_clip: float = 10.0  # of that gradient's elements
    action_scale: float = 50.0  # of the actions in MIL's inner and outer loss
    second_order: bool = True  # the meta-gradient goes through the inner gradient; else the learned loss stays as drawn

    def __post_init__(self):
        check_settings(self)


# Layers ---------------------------------------------------------------------------------------

class LayerNorm(nn.Module):
    """Over C, H, W of one example, with a bias per channel and no gain."""

    def __init__(self, filters):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x):
        x = x.movedim(1, -1)  # channels last, as they are in memory: no copy
        return F.layer_norm(x, x.shape[1:]).movedim(-1, 1) + self.bias[:, None, None]


def vision(planes, settings):
    """The layers from images (N, planes, H, W) in [0, 1] to features (N, F), and F."""
    layers = []
    for _ in range(CONVOLUTIONS):
        layers += [nn.Conv2d(planes, settings.filters, KERNEL, **CONVOLUTION), LayerNorm(settings.filters), nn.ReLU()]
        planes = settings.filters
    last, features = features_of_maps(settings)
    return nn.Sequential(*layers, last), features


def to_planes(images, dtype):
    """uint8 (N, H, W, C) -> (N, C, H, W) in [0, 1]."""
    check("images", images, "uint8", "N", "H", "W", "C")
    return images.to(dtype).movedim(-1, 1) / 255


def _initialise(module):
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.zeros_(module.bias)


# The methods ----------------------------------------------------------------------------------

class Baseline(nn.Module):
    """What the methods share: behaviour cloning of query demos, with the calls of TecNets.

    A subclass has `embed(frames)`: frames (..., K, n, H, W, 3) uint8 -> a context, a tensor (..., *), and
    `respond(images, states, context)`: (B, M, H, W, 3) uint8, normalised (B, M, S) -> actions (B, M, A).
    """

    def __init__(self, settings=Settings(), state_mean=0.0, state_std=1.0):
        super().__init__()
        self.settings = settings
        self.use_bfloat16 = False  # run the networks in bfloat16, weights and losses stay float32
        self.loss_scale = 1.0  # of gradients; to Adam it matters only beside its epsilon
        self.build()
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)
        for name, values in statistics(settings, state_mean, state_std).items():
            self.register_buffer(name, values)

    def _autocast(self):
        return torch.autocast(self.state_mean.device.type, torch.bfloat16, enabled=self.use_bfloat16)

    def _check_frames(self, frames):
        check("frames", frames, "uint8", ..., "K", "n", *[self.settings.image_size] * 2, 3)

    def predict(self, images, states, context):
        """Actions (B, M, A) for images (B, M, H, W, 3) uint8, raw states (B, M, S) and contexts (B, *)."""
        c = self.settings
        check("images", images, "uint8", "B", "M", c.image_size, c.image_size, 3)
        check("states", states, "finite", *images.shape[:2], c.state_dim)
        with self._autocast():
            return self.respond(images, (states - self.state_mean) / self.state_std, context).to(states.dtype)

    @torch.no_grad()
    def act(self, image, state, context):
        """The action (A,), not clipped, for one image (H, W, 3) uint8, raw state (S,) and context (*)."""
        return self.predict(image[None, None], state[None, None], context[None])[0, 0]

    def backward(self, batch, chunk=256):
        """Add the gradient of the query demos' control loss, times `loss_scale`, to the parameters'; return the loss.

        `batch` is that of TecNets; of the support demos the frames `frames_U` (B, K, n, H, W, 3) are used,
        of the query demos the control samples. Tasks run in chunks of at most `chunk` of these together. Several
        processes have a share each, as with TecNets.
        """
        check_batch(self.settings, batch, "n")
        images, states, actions = (batch[name][:, 1] for name in ("images", "states", "actions"))
        B, total = len(gathered(actions)), 0.0
        frames = batch["frames_U"].shape[1] * (images.shape[1] + batch["frames_U"].shape[2])  # at most
        for part in torch.arange(len(images)).split(max(1, chunk // frames)):
            at = slice(int(part[0]), int(part[-1]) + 1)
            prediction = self.predict(images[at], states[at], self.embed(batch["frames_U"][at]))
            loss = len(part) / B * F.mse_loss(prediction, actions[at])
            (self.loss_scale * loss).backward()
            total = total + loss.detach()
        return {"loss": total, "loss_q": total}


class Contextual(Baseline):
    """Feed-forward on a demo's last frame, the current image and the state; actions are averaged over demos."""

    def build(self):
        c = self.settings
        self.vision, features = vision(2 * 3, c)
        self.layers = nn.Sequential(nn.Linear(features + c.state_dim, c.units), nn.ReLU(),
                                    nn.Linear(c.units, c.units), nn.ReLU(), nn.Linear(c.units, c.action_dim))

    def embed(self, frames):
        self._check_frames(frames)
        return frames[..., -1, :, :, :]  # (..., K, H, W, 3)

    def respond(self, images, states, context):
        check("context", context, "uint8", len(images), "K", *images.shape[2:])
        K, M = context.shape[1], images.shape[1]
        shape = len(images), K, M
        pairs = torch.cat([images[:, None].expand(-1, K, -1, -1, -1, -1),
                           context[:, :, None].expand(-1, -1, M, -1, -1, -1)], -1)  # (B, K, M, H, W, 6)
        features = self.vision(to_planes(pairs.flatten(0, 2), states.dtype))
        states = states[:, None].expand(-1, K, -1, -1).flatten(0, 2)
        return self.layers(torch.cat([features, states], 1)).unflatten(0, shape).mean(1)


class LSTM(Baseline):
    """Reads a demo's n frames, with a state of zeros, then the current image and state; actions are averaged over demos.

    The cells start as TensorFlow's do, with biases of 0, and of 1 for the forget gate. PyTorch's random biases would fill
    the memory with numbers that do not depend on the demo.
    """

    def build(self):
        c = self.settings
        self.vision, features = vision(3, c)
        self.layers = nn.Sequential(nn.Linear(features + c.state_dim, c.units), nn.ReLU(),
                                    nn.Linear(c.units, c.units), nn.ReLU())
        self.lstm = nn.LSTM(c.units, c.lstm_units)
        for bias in (self.lstm.bias_ih_l0, self.lstm.bias_hh_l0):
            nn.init.zeros_(bias)
        nn.init.ones_(self.lstm.bias_hh_l0.data[c.lstm_units:2 * c.lstm_units])  # of the forget gate
        self.head = nn.Linear(c.lstm_units, c.action_dim)

    def _features(self, images, states):
        features = self.vision(to_planes(images, states.dtype))
        return self.layers(torch.cat([features, states], 1))  # (N, units)

    def embed(self, frames):
        """The memory after each demo: (..., K, n, H, W, 3) -> (..., K, 2, lstm_units)."""
        self._check_frames(frames)
        with self._autocast():
            images = frames.flatten(0, -4)
            features = self._features(images, self.state_mean.new_zeros(len(images), self.settings.state_dim))
            features = features.unflatten(0, (-1, frames.shape[-4]))  # (demos, n, units)
            memory = torch.cat(self.lstm(features.transpose(0, 1))[1])  # (2, demos, lstm_units)
        return memory.transpose(0, 1).unflatten(0, frames.shape[:-4]).to(self.state_mean.dtype)

    def respond(self, images, states, context):
        B, M = images.shape[:2]
        check("context", context, "float", B, "K", 2, self.settings.lstm_units)
        K = context.shape[1]
        features = self._features(images.flatten(0, 1), states.flatten(0, 1)).unflatten(0, (B, 1, M))
        features = features.expand(-1, K, -1, -1).flatten(0, 2)  # (B K M, units)
        memory = context[:, :, None].expand(-1, -1, M, -1, -1).flatten(0, 2).to(features.dtype)
        h, c = memory.transpose(0, 1)[:, None].contiguous()  # (1, B K M, lstm_units) each
        return self.head(self.lstm(features[None], (h, c))[0][0]).unflatten(0, (B, K, M)).mean(1)


class MILNet(nn.Module):
    """The network that MIL adapts.

    A learned picture is added to the image's channels, and learned numbers to the features. The
    inner pass has a head of its own, whose mean square is the loss that is learned, and, as it sees no state,
    a first fully connected layer of its own.
    """

    def __init__(self, settings):
        super().__init__()
        c = settings
        self.image_transform = nn.Parameter(torch.zeros(3, c.image_size, c.image_size))
        self.vision, features = vision(2 * 3, c)
        self.bias_transform = nn.Parameter(torch.zeros(c.bias_transform))
        features += c.bias_transform
        self.first, self.inner_first = nn.Linear(features + c.state_dim, c.units), nn.Linear(features, c.units)
        self.second = nn.Linear(c.units, c.units)
        self.head, self.inner_head = nn.Linear(c.units, c.action_dim), nn.Linear(c.units, c.action_dim)

    def forward(self, images, states=None):
        """Images (N, H, W, 3) uint8 -> (N, A): actions with states (N, S), else the inner pass."""
        x = mil_vision(self.vision, to_planes(images, self.image_transform.dtype), self.image_transform)
        x = torch.cat([x, self.bias_transform.expand(len(images), -1)], 1)
        x = self.inner_first(x) if states is None else self.first(torch.cat([x, states], 1))
        x = F.relu(self.second(F.relu(x)))
        return self.inner_head(x) if states is None else self.head(x)


class MIL(Baseline):
    """Meta imitation learning: a gradient step on the demo, then behaviour cloning with the new weights.

    A context holds the adapted parameters. Norm biases, and layers that only one of the two passes has, are meta-learned,
    not adapted.
    """

    def build(self):
        self.net = MILNet(self.settings)
        self.loss_scale = self.settings.action_scale ** 2

    def _adapted(self):
        """Names and parameters that the inner step changes and the adapted network uses."""
        norms = {f"{name}.bias" for name, module in self.net.named_modules() if isinstance(module, LayerNorm)}
        one_pass_only = ("first.", "inner_first.", "head.", "inner_head.")
        return {name: p for name, p in self.net.named_parameters()
                if name not in norms and not name.startswith(one_pass_only)}

    def _inner_loss(self, frames, weights):
        """The learned loss of demos (K, n, H, W, 3) with given weights: the actions, hidden, count as zeros."""
        output = torch.func.functional_call(self.net, weights, frames.flatten(0, 1))
        return (self.settings.action_scale * output).square().mean()

    def embed(self, frames):
        """Inner steps on all demos of a task: (..., K, n, H, W, 3) -> adapted parameters (..., P)."""
        self._check_frames(frames)
        if frames.ndim > 5:
            return torch.stack([self.embed(task) for task in frames])
        c, weights = self.settings, self._adapted()
        create_graph = torch.is_grad_enabled() and c.second_order
        with torch.enable_grad(), self._autocast():
            weights["image_transform"] = weights["image_transform"].clamp(0, 1)  # before the step; it may lead out of [0, 1]
            for _ in range(c.inner_steps):
                gradients = torch.autograd.grad(self._inner_loss(frames, weights), weights.values(), create_graph=create_graph)
                weights = {name: p - c.inner_lr * gradient.clamp(-c.inner_clip, c.inner_clip)
                           for (name, p), gradient in zip(weights.items(), gradients)}
        return torch.cat([p.flatten() for p in weights.values()])

    def respond(self, images, states, context):
        adapted = self._adapted()
        sizes = [p.numel() for p in adapted.values()]
        check("context", context, "float", len(images), sum(sizes))
        actions = []
        for task_images, task_states, values in zip(images, states, context):
            weights = {name: part.view_as(p) for (name, p), part in zip(adapted.items(), values.split(sizes))}
            actions.append(torch.func.functional_call(self.net, weights, (task_images, task_states)))
        return torch.stack(actions)


# Same numbers, faster: MIL's convolutions -----------------------------------------------------

def plain_mil_vision(vision, planes, picture):
    """Features (N, F) of images (N, 3, H, W) with the learned picture (3, H, W) on further channels."""
    return vision(torch.cat([planes, picture.expand(len(planes), -1, -1, -1)], 1))


def mil_vision(vision, planes, picture):
    """What plain_mil_vision computes, and its first and second derivatives, by two shortcuts.

    1. The picture is the same for all images: its response in the first convolution is computed once.
    2. The derivative of the inner step needs a convolution's second derivatives. PyTorch derives them by convolutions
       with kernels as large as an image; they are three ordinary convolutions and derivatives of them.
    """
    first, *rest = vision
    if torch.is_autocast_enabled(planes.device.type):
        return plain_mil_vision(vision, planes, picture)
    split = planes.shape[1]
    x = _Convolution.apply(planes, first.weight[:, :split], first.bias)
    x = x + _Convolution.apply(picture[None], first.weight[:, split:], None)
    for layer in rest:
        x = _Convolution.apply(x, layer.weight, layer.bias) if isinstance(layer, nn.Conv2d) else layer(x)
    return x


class _Convolution(torch.autograd.Function):
    """x (N, C, H, W), w (C', C, 5, 5) and b (C') or None -> (N, C', h, w)."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, b, **CONVOLUTION)

    @staticmethod
    def backward(ctx, gy):
        return *_ConvolutionBackward.apply(gy, *ctx.saved_tensors), gy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


class _ConvolutionBackward(torch.autograd.Function):
    """gy, x and w -> the gradients gx, None where x needs none, and gw. Bilinear, in (gy, w) and in (gy, x)."""

    @staticmethod
    def forward(ctx, gy, x, w):
        ctx.save_for_backward(gy, x, w)
        return _derivatives(gy, x, w, ctx.needs_input_grad[1])

    @staticmethod
    def backward(ctx, ggx, ggw):
        gy, x, w = ctx.saved_tensors
        if ggx is None:
            return F.conv2d(x, ggw, **CONVOLUTION), None, None
        return F.conv2d(ggx, w, **CONVOLUTION) + F.conv2d(x, ggw, **CONVOLUTION), *_derivatives(gy, ggx, ggw, True)


def _derivatives(gy, x, w, of_x):
    return torch.ops.aten.convolution_backward(gy, x, w, None, [2, 2], [2, 2], [1, 1], False, [0, 0], 1, [of_x, True, False])[:2]
