"""Task-Embedded Control Networks (James, Bloesch, Davison, CoRL 2018, arXiv 1810.03237), the method.

An embedding network f_theta turns a demonstration's first and last frame into a *sentence*; a
control network pi reads the camera image, the robot's state and the sentence at every step and
outputs the joint torques, as fractions of each joint's limit. Both train end to end on

    lambda_emb L_emb + lambda_U L_ctr^U + lambda_q L_ctr^q                             (section 3)

with the paper's symbols: U is the support set, q the query, s_U and s_q their sentences. This file
needs torch only and can be copied as it is. Trained weights load without the rest of the project:

    content = torch.load("results/weights.pt", weights_only=True)
    model = TecNets(Settings(**content["settings"]))
    model.load_state_dict(content["model"])

To export the policy (torch.export, ONNX) export `predict`, which normalises the state, not `control_net`.
Dimensions in comments:

    B tasks, K support demos and Q query demos of a task, M control samples of each of these two sets,
    N images, H x W pixels, E numbers in a sentence, S in a state, A in an action.

What is not of the stated shapes and kinds raises TypeError or ValueError (the last section).
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Settings:
    """Sizes of the official code, weights of the losses, and a choice where paper and official code differ."""
    image_size: int = 125
    state_dim: int = 20
    action_dim: int = 7
    embedding_dim: int = 20
    filters: int = 16  # in each of 4 convolutions, 5 x 5, stride 2
    units: int = 200  # in each of 3 fully connected layers
    margin: float = 0.1
    lambda_emb: float = 1.0
    lambda_U: float = 0.1
    lambda_q: float = 0.1
    normalise_queries: bool = True  # paper (cosine similarity); the code left queries raw
    support_mean: str = "mean-norm"  # paper; code: "norm-mean-norm"
    negatives: str = "sentences"  # paper: other tasks' sentences; code: other tasks' "queries"
    hinge_mean: str = "all"  # pairs of tasks over which the hinge is averaged: all (paper), or "violated", where it is above 0
    ends: str = "both"  # frames of a demonstration that are embedded: both, or for comparison "first" or "last" alone
    features: str = "flat"  # of the last convolution's maps: all their numbers, or for comparison "points", MIL's

    def __post_init__(self):
        check_settings(self)


# Sentences and losses (section 3) -------------------------------------------------------------

def sentence(f, support_mean="mean-norm"):
    """s = v(mean_k f(tau_k)) with v(x) = x / |x|: (..., K, E) -> (..., E), unit length.

    "norm-mean-norm" (official code) also normalises every f(tau_k) before the mean.
    """
    check("f", f, "float", ..., "K", "E")
    check_choice("support_mean", support_mean)
    if support_mean == "norm-mean-norm":
        f = F.normalize(f, dim=-1)
    return F.normalize(f.mean(-2), dim=-1)


def embedding_loss(s_U, s_q, margin=0.1, negatives="sentences", hinge_mean="all"):
    """L_emb, a hinge on dot products, and the retrieval accuracy: s_U (B, E), s_q (B, Q, E) -> two scalars.

    Mean over tasks j, other tasks i and queries of max(0, margin - s_q^j . s_U^j + s_q^j . s_U^i); with hinge_mean="violated"
    over those where it is above 0, so that few pairs that look alike do not vanish among many that do not.
    With negatives="queries" (official code) the last term is s_q^i . s_U^j. Gradients flow through
    both sides. The accuracy is the share of (task, query) whose own product beats all negatives.

    A loss that stays near the margin with an accuracy of about 1 / B or less is a collapse: all sentences are
    nearly equal. A constant learning rate of 1e-3 can bring it on; warming up, as train.py does, avoids it.
    """
    check("s_U", s_U, "float", "B", "E")
    check("s_q", s_q, "float", len(s_U), "Q", s_U.shape[1])
    check_choice("negatives", negatives)
    check_choice("hinge_mean", hinge_mean)
    B = len(s_U)
    similarity = torch.einsum("jqe,ie->jqi", s_q, s_U)  # (B, Q, B): query of j, sentence of i
    positive = similarity.diagonal(dim1=0, dim2=2).T[..., None]  # (B, Q, 1)
    if negatives == "queries":
        similarity = similarity.transpose(0, 2)  # query of i, sentence of j
    other = ~torch.eye(B, dtype=torch.bool, device=s_U.device)[:, None]  # (B, 1, B)
    hinge = (margin - positive + similarity).clamp(min=0)
    counted = other & ((hinge > 0) | (hinge_mean == "all"))  # (B, Q, B)
    loss = (hinge * counted).sum() / max(1, counted.sum())
    accuracy = (positive > similarity.masked_fill(~other, -torch.inf)).all(-1).float().mean()
    return loss, accuracy


def control_loss(prediction, actions):
    """L_ctr, behaviour cloning: the mean squared error of actions, (..., A) each -> a scalar."""
    check("actions", actions, "finite", ..., "A")
    check("prediction", prediction, "float", *actions.shape)
    return F.mse_loss(prediction, actions)


# The networks (official code, networks/cnn.py) ------------------------------------------------

CONVOLUTIONS, KERNEL, FULLY_CONNECTED = 4, 5, 3


def _glorot(module):
    """Glorot uniform weights and zero biases, the official initialisation."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _convolution(planes, filters):
    """Stride 2, maps of 63, 32, 16, 8 as with TensorFlow's SAME; but of even maps SAME pads 1 before, 2 after, this 2 before."""
    return nn.Conv2d(planes, filters, KERNEL, stride=2, padding=KERNEL // 2)


def _layer_norm(filters):
    """Layer norm over C, H, W of one example with a gain and a bias per channel, as the official code's."""
    return nn.GroupNorm(1, filters)


def _convolutions(planes, settings):
    """The layers up to the features, and how many these are."""
    layers = []
    for _ in range(CONVOLUTIONS):
        layers += [_convolution(planes, settings.filters), _layer_norm(settings.filters), nn.ELU(inplace=True)]
        planes = settings.filters
    last, features = features_of_maps(settings)
    return nn.Sequential(*layers, last), features


def features_of_maps(settings):
    """The layer that makes features of the last convolution's maps (N, filters, h, w), and how many it makes."""
    if settings.features == "points":
        return FeaturePoints(), 2 * settings.filters
    return nn.Flatten(), settings.filters * math.ceil(settings.image_size / 2 ** CONVOLUTIONS) ** 2


class FeaturePoints(nn.Module):
    """The expected coordinates of each map under its softmax: (N, C, h, w) -> (N, 2 C), x then y, as in MIL's public code.

    Coordinate i of n counts as (i - n / 2) / n.
    """

    def forward(self, x):
        check("x", x, "float", "N", "C", "h", "w")
        h, w = x.shape[2:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = x.flatten(2).softmax(-1, dtype).unflatten(2, (h, w))
        x, y = ((torch.arange(n, dtype=dtype, device=x.device) - n / 2) / n for n in (w, h))
        return torch.cat([(weights.sum(2) * x).sum(-1), (weights.sum(3) * y).sum(-1)], 1)


def _fully_connected(inputs, outputs, settings):
    layers = []
    for _ in range(FULLY_CONNECTED):
        layers += [nn.Linear(inputs, settings.units), nn.ELU(inplace=True)]
        inputs = settings.units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class EmbeddingNet(nn.Module):
    """f_theta: a demonstration's first and last frame -> E numbers (section 3.1)."""

    def __init__(self, settings):
        super().__init__()
        self.image_size = settings.image_size
        self.ends = {"both": slice(0, 2), "first": slice(0, 1), "last": slice(1, 2)}[settings.ends]
        self.convolutions, features = _convolutions((self.ends.stop - self.ends.start) * 3, settings)
        self.head = _fully_connected(features, settings.embedding_dim, settings)
        self.apply(_glorot)

    def forward(self, ends):
        """ends (N, 2, H, W, 3) uint8 -> (N, E), not normalised."""
        check("ends", ends, "uint8", "N", 2, self.image_size, self.image_size, 3)
        first, *rest = self.convolutions
        planes = torch.cat(ends[:, self.ends].unbind(1), -1)  # (N, H, W, 6), or 3 for one frame alone
        x = first_convolution(first, planes)  # (N, filters, h, w)
        for layer in rest:
            x = layer(x)  # (N, features) at the end
        return self.head(x).to(first.weight.dtype)


class ControlNet(nn.Module):
    """pi: image, state and sentence -> torques (section 3.2).

    The sentence is tiled over the image and stacked on its channels; the state joins the features.
    """

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.convolutions, features = _convolutions(3 + settings.embedding_dim, settings)
        self.head = _fully_connected(features + settings.state_dim, settings.action_dim, settings)
        self.apply(_glorot)

    def forward(self, images, states, s):
        """images (B, M, H, W, 3) uint8, states (B, M, S), normalised, s (B, E) -> actions (B, M, A)."""
        c = self.settings
        check("images", images, "uint8", "B", "M", c.image_size, c.image_size, 3)
        check("states", states, "float", *images.shape[:2], c.state_dim)
        check("s", s, "float", len(images), c.embedding_dim)
        first, *rest = self.convolutions
        x = first_convolution(first, images, s)  # (B M, filters, h, w)
        for layer in rest:
            x = layer(x)  # (B M, features) at the end
        x = torch.cat([x, states.flatten(0, 1).to(x.dtype)], 1)
        return self.head(x).to(first.weight.dtype).unflatten(0, images.shape[:2])


# The method -----------------------------------------------------------------------------------

class TecNets(nn.Module):
    """Both networks, and the statistics of training tasks that normalise the state (the official code feeds it raw).

    A batch maps to tensors, U before q on axis 1 where both are in one: `frames_U` (B, K, 2, H, W, 3) and
    `frames_q` (B, Q, 2, H, W, 3) uint8, the first and last frames; `images` (B, 2, M, H, W, 3) uint8,
    `states` (B, 2, M, S) and `actions` (B, 2, M, A), the control samples. Set `use_bfloat16` to run
    both networks in bfloat16; weights and losses stay float32. A state_std must be above 0.
    """

    def __init__(self, settings=None, state_mean=0.0, state_std=1.0):
        super().__init__()
        self.settings = settings = settings or Settings()
        self.use_bfloat16 = False
        self.embedding_net = EmbeddingNet(settings)
        self.control_net = ControlNet(settings)
        self.to(memory_format=torch.channels_last)
        for name, values in statistics(settings, state_mean, state_std).items():
            self.register_buffer(name, values)

    def losses(self, batch):
        """The total loss on a batch and its terms (section 3). All are means, as in the official code; the paper sums over tasks.

        Returns a dict of scalars with their gradient: loss, loss_emb, loss_U, loss_q; and accuracy.
        """
        c = self.settings
        check_batch(c, batch)
        s_U, loss_emb, accuracy = self._compare(batch)
        images, states, actions = batch["images"], batch["states"], batch["actions"]
        loss_U = control_loss(self._predict(images[:, 0], states[:, 0], s_U), actions[:, 0])
        loss_q = control_loss(self._predict(images[:, 1], states[:, 1], s_U), actions[:, 1])  # also given s_U
        loss = c.lambda_emb * loss_emb + c.lambda_U * loss_U + c.lambda_q * loss_q
        return {"loss": loss, "loss_emb": loss_emb, "loss_U": loss_U, "loss_q": loss_q, "accuracy": accuracy}

    def _compare(self, batch, chunk=None):
        """The sentences s_U (B, E) of the support sets, the embedding loss and the accuracy of a batch."""
        c, (f_U, f_q) = self.settings, (self._embeddings(batch[name], chunk) for name in ("frames_U", "frames_q"))
        s_U = sentence(f_U, c.support_mean)  # (B, E)
        s_q = F.normalize(f_q, dim=-1) if c.normalise_queries else f_q  # (B, Q, E)
        return s_U, *embedding_loss(gathered(s_U), gathered(s_q), c.margin, c.negatives, c.hinge_mean)

    def _embeddings(self, ends, chunk=None):
        """f_theta of (..., 2, H, W, 3) uint8 -> (..., E); with more than `chunk` demos backward computes activations again."""
        shape, ends = ends.shape[:-4], ends.flatten(0, -5)
        with self._autocast():
            if chunk is None or len(ends) <= chunk:
                f = self.embedding_net(ends)
            else:
                f = torch.cat([checkpoint(self.embedding_net, part, use_reentrant=False) for part in ends.split(chunk)])
        return f.unflatten(0, shape)

    def _autocast(self):
        return torch.autocast(self.state_mean.device.type, torch.bfloat16, enabled=self.use_bfloat16)

    def predict(self, images, states, s):
        """Actions (B, M, A) for images (B, M, H, W, 3) uint8, raw states (B, M, S) and sentences (B, E)."""
        check("states", states, "finite", "B", "M", self.settings.state_dim)
        return self._predict(images, states, s)

    def _predict(self, images, states, s):
        with self._autocast():
            return self.control_net(images, (states - self.state_mean) / self.state_std, s)

    def embed(self, ends, chunk=256):
        """The sentence of support demos: first and last frames (..., K, 2, H, W, 3) uint8 -> (..., E)."""
        check("ends", ends, "uint8", ..., "K", 2, *[self.settings.image_size] * 2, 3)
        return sentence(self._embeddings(ends, chunk), self.settings.support_mean)

    @torch.no_grad()
    def act(self, image, state, s):
        """The action (A,), not clipped, for one image (H, W, 3) uint8, raw state (S,) and sentence (E,)."""
        return self.predict(image[None, None], state[None, None], s[None])[0, 0]

    def backward(self, batch, chunk=256):
        """The same as losses(batch)["loss"].backward(), in bounded memory; returns the terms, detached.

        The control losses run in chunks of whole tasks, of at most `chunk` images but at least one task.
        Each has a backward of its own that collects its gradient on the sentences; the embedding
        network's backward then starts from there. That is the same gradient, with the activations of
        one chunk in memory, however many tasks. For the embedding network `chunk` counts demonstrations.
        Gradients accumulate: call `optimiser.zero_grad()` before. Where several processes have a share of the batch's
        tasks each, gradients and terms are shares, too: add up those of all processes.
        """
        check_batch(self.settings, batch)
        c, images = self.settings, batch["images"]
        b, M = len(images), images.shape[2]
        B = len(gathered(batch["actions"]))  # b, unless there are several processes
        s_U, loss_emb, accuracy = self._compare(batch, chunk)
        leaf, loss_U, loss_q = s_U.detach().requires_grad_(), 0.0, 0.0
        for part in torch.arange(b).split(max(1, chunk // (2 * M))):
            at = slice(int(part[0]), int(part[-1]) + 1)
            actions = batch["actions"][at]  # (b, 2, M, A)
            prediction = self._predict(images[at].flatten(1, 2), batch["states"][at].flatten(1, 2), leaf[at])
            prediction = prediction.unflatten(1, (2, M))
            part_U, part_q = (len(part) / B * control_loss(prediction[:, i], actions[:, i]) for i in (0, 1))
            (c.lambda_U * part_U + c.lambda_q * part_q).backward()
            loss_U, loss_q = loss_U + part_U.detach(), loss_q + part_q.detach()
        if s_U.requires_grad:  # unless the embedding network is frozen
            torch.autograd.backward([c.lambda_emb * loss_emb, s_U], [None, leaf.grad])
        loss_emb, accuracy = b / B * loss_emb.detach(), b / B * accuracy
        return {"loss": c.lambda_emb * loss_emb + c.lambda_U * loss_U + c.lambda_q * loss_q,
                "loss_emb": loss_emb, "loss_U": loss_U, "loss_q": loss_q, "accuracy": accuracy}


# Same numbers, faster: the first convolution --------------------------------------------------

def plain_first_convolution(layer, images, s=None):
    """The first convolution of images scaled to [-1, 1], with tiled sentences where there are some.

    images (..., H, W, C) uint8 -> (N, filters, h, w); with s (B, E) the images are (B, M, H, W, 3).
    """
    check("images", images, "uint8", ..., "H", "W", "C")
    planes = images.flatten(0, -4).movedim(-1, 1).contiguous().to(layer.weight.dtype) / 127.5 - 1  # (N, C, H, W)
    if s is not None:
        tiled = s.repeat_interleave(images.shape[1], 0)[..., None, None].expand(-1, -1, *planes.shape[2:])  # (N, E, H, W)
        planes = torch.cat([planes, tiled], 1)
    return layer(planes)


def first_convolution(layer, images, s=None):
    """What plain_first_convolution computes, by two shortcuts.

    1. x / 127.5 - 1 = (x - 127.5) / 127.5: the image is shifted, which is exact even in bfloat16, and the
       weight is divided, which is small.
    2. A tiled sentence is constant over the image, so the convolution's response to it is a bias. It is the
       same everywhere but at the border, where the padding cuts the kernel: it is computed for 3 x 3 zones.
    """
    check("images", images, "uint8", ..., "H", "W", "C")
    weight, device, size = layer.weight, images.device.type, images.shape[-2]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    planes = (images.flatten(0, -4).to(dtype) - 127.5).movedim(-1, 1)  # (N, C, H, W), channels last in memory
    x = F.conv2d(planes, weight[:, :planes.shape[1]] / 127.5, layer.bias, stride=2, padding=KERNEL // 2)
    if s is None:
        return x
    check("s", s, "float", len(images), "E")
    zones = weight.new_zeros((size + 1) // 2, 3)
    zones[0, 0] = zones[1:-1, 1] = zones[-1, 2] = 1
    ones = weight.new_ones(1, 1, *[KERNEL + (size + 1) % 2] * 2)  # the smallest plane with all zones of this parity
    response = F.conv2d(ones, weight[:, 3:].flatten(0, 1)[:, None], stride=2, padding=KERNEL // 2)[0]
    response = torch.einsum("be,feij->bijf", s, response.unflatten(0, (-1, s.shape[1])))
    response = torch.einsum("hi,bijf,wj->bhwf", zones, response, zones)[:, None]  # (B, 1, h, w, filters)
    x = x.movedim(1, -1).unflatten(0, images.shape[:2])  # (B, M, h, w, filters)
    return (x + response.to(x.dtype)).flatten(0, 1).movedim(-1, 1)  # (B M, filters, h, w)


# Several processes with a share of each batch's tasks -----------------------------------------

def gathered(x):
    """The rows of all processes after one another: x (b, ...) of the b tasks of this one -> (B, ...); x itself where it is alone.

    The processes are those of torch.distributed. Only this process's own rows have a gradient.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    rank, sizes = dist.get_rank(), torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    sizes[rank] = len(x)
    dist.all_reduce(sizes)
    start = int(sizes[:rank].sum())
    rows = x.new_zeros(int(sizes.sum()), *x.shape[1:])
    rows[start:start + len(x)] = x.detach()
    dist.all_reduce(rows)
    return torch.cat([rows[:start], x, rows[start + len(x):]])


# What was given -------------------------------------------------------------------------------

CHOICES = {"support_mean": ("mean-norm", "norm-mean-norm"), "negatives": ("sentences", "queries"),
           "hinge_mean": ("all", "violated"), "ends": ("both", "first", "last"), "features": ("flat", "points")}


def check_choice(name, value):
    if value not in CHOICES[name]:
        raise ValueError(f"{name} is {' or '.join(CHOICES[name])}, not {value!r}")


def check_settings(settings):
    """Choices are of CHOICES, images no smaller than the kernel, sizes 1 or more, other numbers finite and 0 or more."""
    for field in fields(settings):
        name, value, low = field.name, getattr(settings, field.name), KERNEL if field.name == "image_size" else 1
        if name in CHOICES:
            check_choice(name, value)
        elif isinstance(field.default, bool) and value not in (False, True):
            raise ValueError(f"{name} is True or False, not {value!r}")
        elif type(field.default) is int and not (isinstance(value, int) and value >= low):
            raise ValueError(f"{name} is a whole number, {low} or more, not {value!r}")
        elif not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name} is a finite number, 0 or more, not {value!r}")


def check(name, x, kind, *shape):
    """x is a tensor of a kind, "uint8", "float" (of any size) or "finite" (float, and so are its numbers), and of a shape.

    A word in the shape stands for any length from 1 on, a leading ... for any dimensions.
    """
    if not isinstance(x, torch.Tensor) or (x.dtype != torch.uint8 if kind == "uint8" else not x.is_floating_point()):
        raise TypeError(f"{name} is a tensor of {kind} numbers, not {type(x).__name__} {getattr(x, 'dtype', '')}")
    found, wanted = (x.shape[-len(shape) + 1:], shape[1:]) if shape[0] is ... else (x.shape, shape)
    if len(found) != len(wanted) or any(n < 1 if isinstance(m, str) else n != m for n, m in zip(found, wanted)):
        text = ", ".join("..." if n is ... else str(n) for n in shape)
        raise ValueError(f"{name} has the shape ({text}), not {tuple(x.shape)}")
    if kind == "finite" and not torch.compiler.is_compiling() and not x.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite")


def check_batch(settings, batch, n=2):
    """A batch is as TecNets states it, with `n` frames of a support demo."""
    c, images = settings, batch.get("images")
    picture = (c.image_size, c.image_size, 3)
    check("images", images, "uint8", "B", 2, "M", *picture)
    for name, kind, *shape in (("frames_U", "uint8", "K", n, *picture), ("frames_q", "uint8", "Q", 2, *picture),
                               ("states", "finite", 2, images.shape[2], c.state_dim),
                               ("actions", "finite", 2, images.shape[2], c.action_dim)):
        check(name, batch.get(name), kind, len(images), *shape)


def statistics(settings, state_mean, state_std):
    """The buffers (S,) of a network; numbers stand for all dimensions."""
    buffers = {"state_mean": state_mean, "state_std": state_std}
    for name, values in buffers.items():
        values = torch.as_tensor(values, dtype=torch.float32)
        buffers[name] = values.repeat(settings.state_dim) if values.ndim == 0 else values.clone()
        check(name, buffers[name], "finite", settings.state_dim)
    if not (buffers["state_std"] > 0).all():
        raise ValueError(f"state_std is above 0, not {buffers['state_std'].min()}")
    return buffers
