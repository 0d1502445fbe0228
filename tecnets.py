"""Task-Embedded Control Networks (James, Bloesch, Davison, CoRL 2018, arXiv 1810.03237).

An embedding network f_theta turns a demonstration's first and last frame into a *sentence*; a
control network pi reads the camera image, the robot's state and the sentence at every step and
outputs the joint torques. Both train end to end on

    lambda_emb L_emb + lambda_U L_ctr^U + lambda_q L_ctr^q                             (section 3)

with the paper's symbols: U is the support set, q the query, s_U and s_q their sentences. This file
needs torch only and can be copied as it is. Trained weights load without the rest of the project:

    checkpoint = torch.load("results/weights.pt", map_location="cpu", weights_only=True)
    model = TecNets(Settings(**checkpoint["settings"]))
    model.load_state_dict(checkpoint["model"])

Dimensions in comments:

    B tasks; of a task K support demos, Q query demos and M control samples of each of these sets;
    N images, H x W pixels, n frames of a demo; E numbers in a sentence, S in a state, A in an
    action.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# The paper's side first, then the official code's.
CHOICES = {
    "support_mean": ("mean-norm", "norm-mean-norm"),
    "negatives": ("sentences", "queries"),  # of other tasks
}


@dataclass(frozen=True)
class Sizes:
    """What the data tell; here those of the benchmark."""
    image_height: int = 125
    image_width: int = 125
    state_dim: int = 20
    action_dim: int = 7


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes and loss weights of the official code; of two sides that are named, the paper's."""
    demo_frames: int = 2  # evenly spaced frames of a demonstration; 2 are the first and the last
    embedding_dim: int = 20
    filters: int = 16  # in each of 4 convolutions, 5 x 5, stride 2
    units: int = 200  # in each of 3 fully connected layers
    margin: float = 0.1
    lambda_emb: float = 1.0
    lambda_U: float = 0.1
    lambda_q: float = 0.1
    normalise_queries: bool = True  # paper (cosine similarity); official code: raw queries
    support_mean: str = "mean-norm"
    negatives: str = "sentences"


def check_choices(**chosen):
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {' or '.join(CHOICES[name])}, not {value!r}")


# Sentences and losses (section 3) -------------------------------------------------------------

def sentence(f, support_mean="mean-norm"):
    """s = v(mean_k f(tau_k)) with v(x) = x / |x|: (..., K, E) -> (..., E), unit length.

    "norm-mean-norm" (official code) also normalises every f(tau_k) before the mean.
    """
    check_choices(support_mean=support_mean)
    if support_mean == "norm-mean-norm":
        f = F.normalize(f, dim=-1)
    return F.normalize(f.mean(-2), dim=-1)


def embedding_loss(s_U, s_q, margin=0.1, negatives="sentences"):
    """L_emb, a hinge on dot products, and the retrieval accuracy: two scalars.

    s_U (B, E) are the tasks' sentences, s_q (B, Q, E) those of their queries. The loss is the mean
    over tasks j, other tasks i and queries of max(0, margin - s_q^j . s_U^j + s_q^j . s_U^i). With
    negatives="queries" (official code) the last product is s_q^i . s_U^j. Gradients flow through
    both sides. The accuracy is the share of queries whose own product s_q^j . s_U^j beats those
    with all negatives.

    A loss that stays near the margin with an accuracy of about 1 / B is a collapse: all sentences
    are nearly equal. A lower learning rate or a warm-up may avoid it.
    """
    check_choices(negatives=negatives)
    B, Q, _ = s_q.shape
    similarity = torch.einsum("jqe,ie->jqi", s_q, s_U)  # (B, Q, B), [j, q, i] = s_q^j . s_U^i
    positive = similarity.diagonal(dim1=0, dim2=2).T[..., None]  # (B, Q, 1)
    if negatives == "queries":
        similarity = similarity.transpose(0, 2)  # [j, q, i] = s_q^i . s_U^j
    own = torch.eye(B, dtype=torch.bool, device=s_U.device)[:, None]  # (B, 1, B)
    hinge = (margin - positive + similarity).clamp(min=0).masked_fill(own, 0)  # (B, Q, B)
    loss = hinge.sum() / (B * Q * (B - 1))
    accuracy = (positive > similarity.masked_fill(own, -torch.inf)).all(-1).float().mean()
    return loss, accuracy


def control_loss(prediction, actions):
    """L_ctr, behaviour cloning: the mean squared error of actions (..., A) -> a scalar."""
    if prediction.shape != actions.shape:  # mse_loss would broadcast
        raise ValueError(f"actions {tuple(actions.shape)}, predicted {tuple(prediction.shape)}")
    return F.mse_loss(prediction, actions)


# The networks (official code, networks/cnn.py) ------------------------------------------------

CONVOLUTIONS, KERNEL, FULLY_CONNECTED = 4, 5, 3


def initialise(module):
    """Glorot uniform weights and zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def convolutions(planes, settings):
    """Maps of 63, 32, 16, 8, flattened. Layer norm is over C, H, W, with gain and bias per channel.

    Padding is 2 on all sides; TensorFlow's SAME pads 1 before and 2 after maps of even size.
    """
    layers = []
    for _ in range(CONVOLUTIONS):
        layers += [nn.Conv2d(planes, settings.filters, KERNEL, stride=2, padding=KERNEL // 2),
                   nn.GroupNorm(1, settings.filters),
                   nn.ELU(inplace=True)]
        planes = settings.filters
    return nn.Sequential(*layers, nn.Flatten())


def n_features(settings):
    """How many numbers the last convolution's maps have."""
    sides = settings.image_height, settings.image_width
    h, w = (math.ceil(side / 2 ** CONVOLUTIONS) for side in sides)
    return settings.filters * h * w


def fully_connected(inputs, outputs, settings):
    layers = []
    for _ in range(FULLY_CONNECTED):
        layers += [nn.Linear(inputs, settings.units), nn.ELU(inplace=True)]
        inputs = settings.units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class EmbeddingNet(nn.Module):
    """f_theta: n frames of a demonstration, in the paper 2, -> E numbers (section 3)."""

    def __init__(self, settings):
        super().__init__()
        self.convolutions = convolutions(settings.demo_frames * 3, settings)
        self.head = fully_connected(n_features(settings), settings.embedding_dim, settings)
        self.apply(initialise)

    def forward(self, frames):
        """frames (N, n, H, W, 3) uint8 -> (N, E), not normalised."""
        first, *rest = self.convolutions
        planes = torch.cat(frames.unbind(1), -1)  # (N, H, W, 3 n)
        x = first_convolution(first, planes)  # (N, filters, h, w)
        for layer in rest:
            x = layer(x)  # (N, features) at the end
        return self.head(x).to(first.weight.dtype)


class ControlNet(nn.Module):
    """pi: image, state and sentence -> an action, in the paper joint torques (section 3).

    The sentence is tiled over the image and stacked on its channels; the state joins the features.
    """

    def __init__(self, settings):
        super().__init__()
        inputs = n_features(settings) + settings.state_dim
        self.convolutions = convolutions(3 + settings.embedding_dim, settings)
        self.head = fully_connected(inputs, settings.action_dim, settings)
        self.apply(initialise)

    def forward(self, images, states, s):
        """images (B, M, H, W, 3) uint8, states (B, M, S), s (B, E) -> actions (B, M, A).

        States and actions are normalised.
        """
        first, *rest = self.convolutions
        x = first_convolution(first, images, s)  # (B M, filters, h, w)
        for layer in rest:
            x = layer(x)  # (B M, features) at the end
        x = torch.cat([x, states.flatten(0, 1).to(x.dtype)], 1)
        return self.head(x).unflatten(0, images.shape[:2])


# The method -----------------------------------------------------------------------------------

class Policy(nn.Module):
    """What imitates: a context from demonstrations, then actions from images and states.

    A subclass has `embed(frames)`, frames (..., K, n, H, W, 3) uint8 -> a context (..., *), and
    `respond(images, states, context)` -> actions (B, M, A). Inside, states and actions are
    normalised by the statistics of the training tasks, which are part of the weights; `predict` and
    `act` take and give the robot's units. The benchmark's actions are fractions of the torque
    limits and stay as they are: their mean is set to 0, their deviation to 1. (The official code
    feeds states raw.)
    Set `use_bfloat16` to run the networks in bfloat16; weights and losses stay float32.
    """

    def __init__(self, settings, **statistics):
        super().__init__()
        self.settings = settings
        self.use_bfloat16 = False
        self.register_buffer("state_mean", torch.zeros(settings.state_dim))
        self.register_buffer("state_std", torch.ones(settings.state_dim))
        self.register_buffer("action_mean", torch.zeros(settings.action_dim))
        self.register_buffer("action_std", torch.ones(settings.action_dim))
        for name, values in statistics.items():
            getattr(self, name).copy_(torch.as_tensor(values))

    def autocast(self):
        device = self.state_mean.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.use_bfloat16)

    def check_size(self, pictures):
        """Raise ValueError for pictures of another size: some would give wrong actions."""
        size = self.settings.image_height, self.settings.image_width, 3
        if pictures.shape[-3:] != size:
            raise ValueError(f"pictures are {tuple(pictures.shape[-3:])}, the network's {size}")

    def predict_normalised(self, images, states, context):
        """As `predict`, but the actions stay normalised."""
        self.check_size(images)
        if states.shape[-1:] != self.state_mean.shape:  # one number would be spread over all
            raise ValueError(f"states have size {states.shape[-1]}, the network's "
                             f"{len(self.state_mean)}")
        states = (states - self.state_mean) / self.state_std
        with self.autocast():
            return self.respond(images, states, context).to(states.dtype)

    def normalise_actions(self, actions):
        return (actions - self.action_mean) / self.action_std

    def predict(self, images, states, context):
        """Actions (B, M, A) for images (B, M, H, W, 3) uint8, states (B, M, S), contexts (B, *).

        Raises ValueError for images or states of another size.
        """
        actions = self.predict_normalised(images, states, context)
        return actions * self.action_std + self.action_mean

    forward = predict  # what torch.export and ONNX take

    @torch.no_grad()
    def act(self, image, state, context):
        """The action (A,), not clipped, for an image (H, W, 3) uint8, state (S,), context (*)."""
        return self.predict(image[None, None], state[None, None], context[None])[0, 0]

    def imitation_loss(self, images, states, actions, context):
        """L_ctr of normalised actions; shapes as in `predict`."""
        prediction = self.predict_normalised(images, states, context)
        return control_loss(prediction, self.normalise_actions(actions))


class TecNets(Policy):
    """Both networks and their losses; the context is the sentence s_U.

    A batch maps to tensors, U before q on axis 1 where both are in one: frames of demonstrations,
    `frames_U` (B, K, n, H, W, 3) and `frames_q` (B, Q, n, H, W, 3) uint8; the control samples,
    `images` (B, 2, M, H, W, 3) uint8, `states` (B, 2, M, S) and `actions` (B, 2, M, A).
    """

    def __init__(self, settings=Settings(), **statistics):
        super().__init__(settings, **statistics)
        self.embedding_net = EmbeddingNet(settings)
        self.control_net = ControlNet(settings)

    def embed(self, frames, chunk=None):
        """The sentence of support demos: frames (..., K, n, H, W, 3) uint8 -> (..., E)."""
        return sentence(self.embeddings(frames, chunk), self.settings.support_mean)

    def respond(self, images, states, s):
        return self.control_net(images, states, s)

    def losses(self, batch, chunk=256):
        """The total loss on a batch and its terms (section 3): a dict of scalars.

        They are loss, loss_emb, loss_U, loss_q, all means (the paper sums over tasks), and, without
        gradient, accuracy. Both control losses are given s_U. Of more than `chunk` demonstrations
        of a set, or control images (but at least a task's), no activations are kept: they are
        computed again in backward. Where only a part of the batch's tasks is in this process,
        loss_emb and accuracy are of the whole batch.
        """
        c, M = self.settings, batch["images"].shape[2]
        s_U = self.embed(batch["frames_U"], chunk)  # (B, E)
        s_q = self.embeddings(batch["frames_q"], chunk)  # (B, Q, E)
        if c.normalise_queries:
            s_q = F.normalize(s_q, dim=-1)
        loss_emb, accuracy = embedding_loss(gathered(s_U), gathered(s_q), c.margin, c.negatives)
        samples = batch["images"].flatten(1, 2), batch["states"].flatten(1, 2)  # (B, 2 M, ...)
        predicted = in_parts(self.predict_normalised, max(1, chunk // (2 * M)), *samples, s_U)
        predicted = predicted.unflatten(1, (2, M))  # (B, 2, M, A)
        expected = self.normalise_actions(batch["actions"])
        loss_U = control_loss(predicted[:, 0], expected[:, 0])
        loss_q = control_loss(predicted[:, 1], expected[:, 1])
        loss = c.lambda_emb * loss_emb + c.lambda_U * loss_U + c.lambda_q * loss_q
        return dict(loss=loss, loss_emb=loss_emb, loss_U=loss_U, loss_q=loss_q, accuracy=accuracy)

    def backward(self, batch, chunk=256):
        """Add the gradient of the loss on a batch to the parameters'; the terms, detached.

        One of several processes, which have equally many of the batch's tasks, gives its share: add
        up the gradients and the terms of all.
        """
        losses, share = self.losses(batch, chunk), 1 / processes()
        # L_emb is of all tasks, but has here the gradient of this process's sentences only: no
        # other process counts that, so it is taken whole.
        rest = (1 - share) * self.settings.lambda_emb * losses["loss_emb"]
        (share * losses["loss"] + rest).backward()
        return {name: share * value.detach() for name, value in losses.items()}

    def embeddings(self, frames, chunk=None):
        """f_theta of (..., n, H, W, 3) uint8 -> (..., E); `chunk` as in `losses`."""
        self.check_size(frames)
        with self.autocast():
            f = in_parts(self.embedding_net, chunk, frames.flatten(0, -5))
        return f.unflatten(0, frames.shape[:-4])


def in_parts(function, size, *tensors):
    """function(*tensors); more than `size` rows in parts that are computed again in backward."""
    if size is None or len(tensors[0]) <= size:
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


# Same numbers, faster: the first convolution --------------------------------------------------

def plain_first_convolution(layer, images, s=None):
    """The first convolution of images scaled to [-1, 1], with tiled sentences where there are some.

    images (..., H, W, C) uint8 -> (N, filters, h, w); with s (B, E) the images are (B, M, H, W, 3).
    """
    planes = images.flatten(0, -4).movedim(-1, 1).contiguous()  # (N, C, H, W)
    planes = planes.to(layer.weight.dtype) / 127.5 - 1
    if s is not None:
        s = s.repeat_interleave(images.shape[1], 0)[..., None, None]  # (N, E, 1, 1)
        planes = torch.cat([planes, s.expand(-1, -1, *planes.shape[2:])], 1)
    return layer(planes)


def first_convolution(layer, images, s=None):
    """What plain_first_convolution computes, by two shortcuts.

    1. x / 127.5 - 1 = (x - 127.5) / 127.5: pixels minus 127.5 are exact even in bfloat16; the
       division is done on the kernel, which is smaller than the images.
    2. A tiled sentence is constant over the image, so the convolution's response to it is a bias.
       It is the same everywhere but at the border, where the padding cuts the kernel: it is
       computed for 3 x 3 zones.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are uint8, 0 to 255, not {images.dtype}")
    weight, device = layer.weight, images.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    planes = (images.flatten(0, -4).to(dtype) - 127.5).movedim(-1, 1)  # (N, C, H, W), channels last
    kernel = (weight if s is None else weight[:, :3]) / 127.5
    x = F.conv2d(planes, kernel, layer.bias, stride=2, padding=KERNEL // 2)  # (N, filters, h, w)
    if s is None:
        return x
    size = images.shape[-3:-1]
    # The smallest plane with all zones of this parity:
    ones = weight.new_ones(1, 1, *(KERNEL + (side + 1) % 2 for side in size))
    response = F.conv2d(ones, weight[:, 3:].flatten(0, 1)[:, None], stride=2, padding=KERNEL // 2)
    response = response[0].unflatten(0, (-1, s.shape[1]))  # (filters, E, 3, 3)
    response = torch.einsum("be,feij->bijf", s, response)
    rows, columns = (_zones(weight, side) for side in size)  # (h, 3), (w, 3)
    response = torch.einsum("hi,bijf,wj->bhwf", rows, response, columns)[:, None]
    x = x.movedim(1, -1).unflatten(0, images.shape[:2])  # (B, M, h, w, filters)
    return (x + response.to(x.dtype)).flatten(0, 1).movedim(-1, 1)  # (B M, filters, h, w)


def _zones(weight, side):
    """(h, 3): which of the first, the middle and the last zone each place of a map belongs to."""
    zones = weight.new_zeros((side + 1) // 2, 3)
    zones[0, 0] = zones[1:-1, 1] = zones[-1, 2] = 1
    return zones


# Several processes with a shard of each batch's tasks -----------------------------------------

def processes():
    """The number of processes of torch.distributed, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(x):
    """The rows of all processes after one another: x (b, ...) of each -> (B, ...).

    Only this process's own rows have a gradient.
    """
    if processes() == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x
    return torch.cat(rows)
