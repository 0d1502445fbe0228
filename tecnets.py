"""Task-Embedded Control Networks (James, Bloesch, Davison, CoRL 2018, arXiv 1810.03237), the method.

An embedding network f_theta turns a demonstration's first and last frame into a *sentence*; a
control network pi reads the camera image, the robot's state and the sentence at every step and
outputs the joint torques, as fractions of each joint's limit. Both train end to end on

    lambda_emb L_emb + lambda_U L_ctr^U + lambda_q L_ctr^q                             (section 3)

with the paper's symbols: U is the support set, q the query, s_U and s_q their sentences. This file
needs torch only and can be copied as it is. Dimensions in comments:

    B tasks, K support demos and Q query demos of a task, M control samples of a task,
    N images, H x W pixels, E numbers in a sentence, S in a state, A in an action.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Settings:
    """Sizes of the official code, loss weights, and a side wherever paper and code differ."""
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
    ends: str = "both"  # frames of a demonstration that are embedded; "first" or "last" alone to compare

    def __post_init__(self):
        if self.support_mean not in ("mean-norm", "norm-mean-norm"):
            raise ValueError(f"support_mean is mean-norm or norm-mean-norm, not {self.support_mean}")
        if self.negatives not in ("sentences", "queries"):
            raise ValueError(f"negatives is sentences or queries, not {self.negatives}")
        if self.ends not in ("both", "first", "last"):
            raise ValueError(f"ends is both, first or last, not {self.ends}")


# The networks (official code, networks/cnn.py) ------------------------------------------------

CONVOLUTIONS, KERNEL, FULLY_CONNECTED = 4, 5, 3


def _glorot(module):
    """Glorot uniform weights and zero biases, the official initialisation."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _convolution(planes, filters):
    """Stride 2 with maps of 63, 32, 16, 8 as TensorFlow's SAME (which pads even maps on the other side)."""
    return nn.Conv2d(planes, filters, KERNEL, stride=2, padding=KERNEL // 2)


def _layer_norm(filters):
    """Layer norm over C, H, W of one example with a gain and a bias per channel, as the official code's."""
    return nn.GroupNorm(1, filters)


def _convolutions(planes, settings):
    """The layers up to the flattened features, and how many these are."""
    layers, size = [], settings.image_size
    for _ in range(CONVOLUTIONS):
        layers += [_convolution(planes, settings.filters), _layer_norm(settings.filters), nn.ELU(inplace=True)]
        planes, size = settings.filters, (size + 1) // 2
    return nn.Sequential(*layers, nn.Flatten()), planes * size * size


def _fully_connected(inputs, outputs, settings):
    layers = []
    for _ in range(FULLY_CONNECTED):
        layers += [nn.Linear(inputs, settings.units), nn.ELU(inplace=True)]
        inputs = settings.units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _first_convolution(images, weight, bias):
    """The first convolution of images scaled to [-1, 1]: uint8 (N, H, W, C) -> (N, filters, h, w).

    Of x / 127.5 - 1 the image takes the shift, exact even in bfloat16, and the weight the scale.
    """
    dtype = torch.get_autocast_dtype(images.device.type) if torch.is_autocast_enabled(images.device.type) else weight.dtype
    planes = (images.to(dtype) - 127.5).movedim(-1, 1)  # (N, C, H, W), channels last in memory
    return F.conv2d(planes, weight / 127.5, bias, stride=2, padding=KERNEL // 2)


class EmbeddingNet(nn.Module):
    """f_theta: a demonstration's first and last frame -> E numbers (section 3.1)."""

    def __init__(self, settings):
        super().__init__()
        self.ends = {"both": slice(0, 2), "first": slice(0, 1), "last": slice(1, 2)}[settings.ends]
        self.convolutions, features = _convolutions((self.ends.stop - self.ends.start) * 3, settings)
        self.head = _fully_connected(features, settings.embedding_dim, settings)
        self.apply(_glorot)

    def forward(self, ends):
        """ends (N, 2, H, W, 3) uint8 -> (N, E), not normalised."""
        first, *rest = self.convolutions
        planes = torch.cat(ends[:, self.ends].unbind(1), -1)  # (N, H, W, 6), or 3 for one frame alone
        x = _first_convolution(planes, first.weight, first.bias)
        for layer in rest:
            x = layer(x)  # (N, features) at the end
        return self.head(x).to(first.weight.dtype)


class ControlNet(nn.Module):
    """pi: image, state and sentence -> torques (section 3.2).

    The sentence is tiled over the image and stacked on its channels. As it is constant there, the
    first convolution's response to it is a bias, the same everywhere but at the border, where the
    zero padding cuts the kernel: 3 x 3 zones. It is computed for the zones only and added.
    """

    def __init__(self, settings):
        super().__init__()
        self.image_size = settings.image_size
        self.convolutions, features = _convolutions(3 + settings.embedding_dim, settings)
        self.head = _fully_connected(features + settings.state_dim, settings.action_dim, settings)
        self.apply(_glorot)
        zones = torch.zeros((self.image_size + 1) // 2, 3)
        zones[0, 0] = zones[1:-1, 1] = zones[-1, 2] = 1
        self.register_buffer("zones", zones, persistent=False)

    def sentence_response(self, s):
        """What the tiled sentences (B, E) add to the first convolution, (B, 1, h, w, filters)."""
        weight, E = self.convolutions[0].weight, s.shape[1]  # (filters, 3 + E, 5, 5)
        size = KERNEL + (self.image_size + 1) % 2  # the smallest plane with all zones of this parity
        ones = weight.new_ones(1, 1, size, size)
        response = F.conv2d(ones, weight[:, 3:].flatten(0, 1)[:, None], stride=2, padding=KERNEL // 2)[0]
        response = torch.einsum("be,feij->bijf", s, response.unflatten(0, (-1, E)))
        return torch.einsum("hi,bijf,wj->bhwf", self.zones, response, self.zones)[:, None]

    def forward(self, images, states, s):
        """images (B, M, H, W, 3) uint8, states (B, M, S), normalised, s (B, E) -> actions (B, M, A)."""
        B, M = images.shape[:2]
        first, *rest = self.convolutions
        x = _first_convolution(images.flatten(0, 1), first.weight[:, :3], first.bias)
        x = x.movedim(1, -1).unflatten(0, (B, M))  # (B, M, h, w, filters)
        x = (x + self.sentence_response(s).to(x.dtype)).flatten(0, 1).movedim(-1, 1)  # (B M, filters, h, w)
        for layer in rest:
            x = layer(x)  # (B M, features) at the end
        x = torch.cat([x, states.flatten(0, 1).to(x.dtype)], 1)
        return self.head(x).to(first.weight.dtype).unflatten(0, (B, M))


# Sentences and losses (section 3) -------------------------------------------------------------

def sentence(f, support_mean="mean-norm"):
    """s = v(mean_k f(tau_k)) with v(x) = x / |x|: (..., K, E) -> (..., E), unit length.

    "norm-mean-norm" (official code) also normalises every f(tau_k) before the mean.
    """
    if support_mean == "norm-mean-norm":
        f = F.normalize(f, dim=-1)
    return F.normalize(f.mean(-2), dim=-1)


def embedding_loss(s_U, s_q, margin=0.1, negatives="sentences"):
    """L_emb, a hinge on dot products, and the retrieval accuracy: s_U (B, E), s_q (B, Q, E) -> two scalars.

    Mean over tasks j, other tasks i and queries of max(0, margin - s_q^j . s_U^j + s_q^j . s_U^i).
    With negatives="queries" (official code) the last term is s_q^i . s_U^j. Gradients flow through
    both sides. The accuracy is the share of (task, query) whose own product beats all negatives.
    """
    B = len(s_U)
    similarity = torch.einsum("jqe,ie->jqi", s_q, s_U)  # (B, Q, B): query of j, sentence of i
    positive = similarity.diagonal(dim1=0, dim2=2).T[..., None]  # (B, Q, 1)
    if negatives == "queries":
        similarity = similarity.transpose(0, 2)  # query of i, sentence of j
    other = ~torch.eye(B, dtype=torch.bool, device=s_U.device)[:, None]  # (B, 1, B)
    hinge = (margin - positive + similarity).clamp(min=0)
    loss = (hinge * other).sum() / max(1, other.sum() * s_q.shape[1])
    accuracy = (positive > similarity.masked_fill(~other, -torch.inf)).all(-1).float().mean()
    return loss, accuracy


def control_loss(prediction, actions):
    """L_ctr, behaviour cloning: the mean squared error of actions, (..., A) each -> a scalar."""
    return F.mse_loss(prediction, actions)


# Both together --------------------------------------------------------------------------------

class TecNets(nn.Module):
    """Both networks and the statistics that normalise the state (taken from training tasks only)."""

    def __init__(self, settings=Settings(), state_mean=0.0, state_std=1.0):
        super().__init__()
        self.settings = settings
        self.bfloat16 = False  # run both networks in bfloat16, weights and losses stay float32
        self.embedding_net = EmbeddingNet(settings)
        self.control_net = ControlNet(settings)
        self.to(memory_format=torch.channels_last)
        self.register_buffer("state_mean", torch.as_tensor(state_mean) + torch.zeros(settings.state_dim))
        self.register_buffer("state_std", torch.as_tensor(state_std) * torch.ones(settings.state_dim))

    def _autocast(self):
        return torch.autocast(self.state_mean.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _embeddings(self, ends, chunk):
        """f_theta of (N, 2, H, W, 3) uint8 -> (N, E); beyond one chunk activations are recomputed in backward."""
        with self._autocast():
            if len(ends) <= chunk:
                return self.embedding_net(ends)
            return torch.cat([checkpoint(self.embedding_net, part, use_reentrant=False)
                              for part in ends.split(chunk)])

    def predict(self, images, states, s):
        """Actions (B, M, A) for images (B, M, H, W, 3) uint8, raw states (B, M, S) and sentences (B, E)."""
        with self._autocast():
            return self.control_net(images, (states - self.state_mean) / self.state_std, s)

    def embed(self, ends, chunk=256):
        """The sentence of support demos: first and last frames (..., K, 2, H, W, 3) uint8 -> (..., E)."""
        f = self._embeddings(ends.flatten(0, -5), chunk).unflatten(0, ends.shape[:-4])
        return sentence(f, self.settings.support_mean)

    @torch.no_grad()
    def act(self, image, state, s):
        """The action (A,), not clipped, for one image (H, W, 3) uint8, raw state (S,) and sentence (E,)."""
        return self.predict(image[None, None], state[None, None], s[None])[0, 0]

    def backward(self, batch, chunk=256):
        """Add the gradient of the total loss on a batch to the parameters' and return its terms.

        `batch` maps to tensors, U before q on axis 1 where both are in one: `ends_U` (B, K, 2, H, W, 3)
        and `ends_q` (B, Q, 2, H, W, 3) uint8, `images` (B, 2, M, H, W, 3) uint8, `states` (B, 2, M, S)
        and `actions` (B, 2, M, A). Both control losses are conditioned on s_U. They run in chunks of
        at most `chunk` images, each with a backward of its own that collects its gradient on the
        sentences; the embedding network's backward then starts from there: the same gradient as
        one backward of the sum, with the activations of one chunk (a task's samples stay together;
        the embedding network counts demos) in memory, whatever B.
        Returns a dict of detached scalars: loss, loss_emb, loss_U, loss_q, accuracy.
        """
        c, ends_U, ends_q, images = self.settings, batch["ends_U"], batch["ends_q"], batch["images"]
        B, M = len(images), images.shape[2]
        f_U, f_q = (self._embeddings(ends.flatten(0, 1), chunk).unflatten(0, ends.shape[:2]) for ends in (ends_U, ends_q))
        s_U = sentence(f_U, c.support_mean)  # (B, E)
        s_q = F.normalize(f_q, dim=-1) if c.normalise_queries else f_q  # (B, Q, E)
        loss_emb, accuracy = embedding_loss(s_U, s_q, c.margin, c.negatives)

        leaf, loss_U, loss_q = s_U.detach().requires_grad_(), 0.0, 0.0
        for part in torch.arange(B).split(max(1, chunk // (2 * M))):
            at = slice(int(part[0]), int(part[-1]) + 1)
            actions = batch["actions"][at]  # (b, 2, M, A)
            prediction = self.predict(images[at].flatten(1, 2), batch["states"][at].flatten(1, 2), leaf[at])
            prediction = prediction.unflatten(1, (2, M))
            part_U, part_q = (len(part) / B * control_loss(prediction[:, i], actions[:, i]) for i in (0, 1))
            (c.lambda_U * part_U + c.lambda_q * part_q).backward()
            loss_U, loss_q = loss_U + part_U.detach(), loss_q + part_q.detach()
        torch.autograd.backward([c.lambda_emb * loss_emb, s_U], [None, leaf.grad])
        loss_emb = loss_emb.detach()
        return {"loss": c.lambda_emb * loss_emb + c.lambda_U * loss_U + c.lambda_q * loss_q,
                "loss_emb": loss_emb, "loss_U": loss_U, "loss_q": loss_q, "accuracy": accuracy}
