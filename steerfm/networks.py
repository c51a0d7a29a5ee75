"""Networks u(x, s, t, cond): the raw functions inside a `NeuralFlowMap`.

Everything here is safe under forward-mode AD (`torch.func.jvp`): attention is a plain matrix product, since the fused
kernels have no forward derivative, and there is no batch normalisation. Times are embedded slowly (a few radians per unit
of time), since a fast embedding makes d u/d t, which self-distillation differentiates, needlessly large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

BEFORE_2_14 = torch.__version__ < "2.14"
OF_POSTERIORS = ("state", "state_time", "state_1", "state_2", "states")
"""Names of the parts of a network that only posteriors use."""


class GroupNorm(nn.GroupNorm):
    """torch's, with a forward derivative in any memory format: before 2.14 it fails on channels-last inputs."""

    def forward(self, input: Tensor) -> Tensor:
        if BEFORE_2_14 and forward_ad.unpack_dual(input).tangent is not None:
            input = input.contiguous()
        return super().forward(input)


class ConditionEmbedding(nn.Module):
    """Embeds (s, t) and a class label or a text to one vector per row.

    Args:
        width: size of the embedding.
        classes: number of classes; label ``classes`` is the null class. 0 means no labels.
        text: size of a text's embedding; zeros are the null text. 0 means no texts.
        frequencies: sines and cosines per time, spaced up to ``max_frequency`` radians per unit of time.
    """

    def __init__(self, width: int, classes: int = 0, text: int = 0, frequencies: int = 8, max_frequency: float = 6.0) -> None:
        super().__init__()
        if classes and text:
            raise ValueError("a network is conditioned on classes or on text, not on both")
        self.classes, self.frequencies, self.max_frequency = classes, frequencies, max_frequency
        self.time = nn.Sequential(nn.Linear(4 * frequencies + 2, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.text_width = text
        self.text = nn.Sequential(nn.Linear(text, width), nn.SiLU(), nn.Linear(width, width)) if text else None

    def forward(self, s: Tensor, t: Tensor, cond: Tensor | Mapping[str, Tensor] | None) -> Tensor:
        """s, t: (b,); cond: labels (b,) int64, {"text": (b, text)}, or None for the null condition. Returns (b, width)."""
        times = torch.stack([s, t - s], -1)  # (b, 2)
        # no buffer: where the network is bfloat16, its frequencies would be, too
        omega = torch.linspace(0.5, self.max_frequency, self.frequencies, dtype=times.dtype, device=times.device)
        phase = (times.unsqueeze(-1) * omega).flatten(1)
        h = self.time(torch.cat([times, phase.sin(), phase.cos()], -1).to(next(self.time.parameters()).dtype))
        if self.text is not None:
            if isinstance(cond, Tensor) or (cond is not None and "text" not in cond):
                raise ValueError('this network reads texts: pass prompts, or cond={"text": embeddings}')
            rows = h.new_zeros(1, self.text_width) if cond is None else cond["text"].to(h.dtype)
            return h + self.text(rows)
        if isinstance(cond, Mapping):
            raise ValueError("this network reads no texts: pass labels, or cond=None")
        if self.label is not None:
            if cond is None:
                return h + self.label.weight[-1]
            h = h + self.label(cond)
        elif cond is not None:
            raise ValueError("this network is unconditional: pass cond=None")
        return h


class StateTime(nn.Module):
    """Embeds the time of the state that a posterior is given, (b,) to (b, width): zero at t = 0, and before training."""

    def __init__(self, width: int, frequencies: int = 8, max_frequency: float = 6.0) -> None:
        super().__init__()
        self.frequencies, self.max_frequency = frequencies, max_frequency
        self.layers = nn.Sequential(nn.Linear(2 * frequencies + 1, width), nn.SiLU(), _zeroed(nn.Linear(width, width)))

    def forward(self, t: Tensor) -> Tensor:
        t = t.unsqueeze(-1)
        phase = t * torch.linspace(0.5, self.max_frequency, self.frequencies, dtype=t.dtype, device=t.device)
        features = torch.cat([t, phase.sin(), phase.cos()], -1).to(next(self.layers.parameters()).dtype)
        return t.to(features.dtype) * self.layers(features)


def of_posteriors(name: str) -> bool:
    """Whether only posteriors use the weight of this name, in a network of this module."""
    return not {*OF_POSTERIORS}.isdisjoint(name.split("."))


def posterior_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that only posteriors use, by name."""
    has_them = isinstance(network, Mlp | UNet) and network.posterior
    return {name: value for name, value in network.named_parameters() if has_them and of_posteriors(name)}


def fit_posterior(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a map for a network with another choice of ``posterior``: without what only posteriors use if it has none,
    or, if the weights have none, with it as the network begins."""
    own = {name: value for name, value in network.state_dict().items() if of_posteriors(name)}
    return own | {name: value for name, value in weights.items() if name in own or not of_posteriors(name)}


def _checked_rank(posterior: bool, rank: int) -> int:
    if rank and not posterior:
        raise ValueError(f"posterior_rank={rank} changes what posteriors use: posterior=true as well")
    return rank


def _weight_of_posteriors(t: Tensor, like: Tensor) -> Tensor:
    """1 for rows that are given a state, 0 where it says nothing, at t = 0: (b,) to (b, 1, ...)."""
    return (t > 0).to(like).view(-1, *[1] * (like.ndim - 1))


def _low_rank(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """What is added to the output of a layer: a product of two layers through ``rank`` channels, zero before training."""
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False), _zeroed(nn.Linear(rank, layer.out_features, bias=False))
        )
    size, padding = layer.kernel_size[0], layer.padding[0]
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, rank, size, padding=padding, bias=False),
        _zeroed(nn.Conv2d(rank, layer.out_channels, 1, bias=False)),
    )


class Mlp(nn.Module):
    """Multi-layer perceptron for maps of vectors, shape (b, dim).

    Args:
        dim: size of one sample.
        width, depth: hidden width and number of hidden layers.
        classes: number of classes (0: unconditional).
        posterior: whether it can be given a state x_t, for `steerfm.FlowMap.posterior`.
        posterior_rank: see `UNet`.
    """

    def __init__(
        self,
        dim: int,
        width: int = 128,
        depth: int = 4,
        classes: int = 0,
        posterior: bool = False,
        posterior_rank: int = 0,
    ) -> None:
        super().__init__()
        self.posterior, self.posterior_rank = posterior, _checked_rank(posterior, posterior_rank)
        self.condition = ConditionEmbedding(width, classes)
        self.inputs = nn.Linear(dim, width)
        hidden = [nn.Linear(width, width) for _ in range(depth)]
        self.hidden = nn.ModuleList(hidden)
        self.outputs = _zeroed(nn.Linear(width, dim))
        if posterior:
            self.state, self.state_time = _zeroed(nn.Linear(dim, width, bias=False)), StateTime(width)
        if posterior_rank:
            self.states = nn.ModuleList(_low_rank(layer, posterior_rank) for layer in hidden)

    def forward(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        state: Tensor | None = None,
        state_time: Tensor | None = None,
    ) -> Tensor:
        """x: (b, dim); s, t: (b,); state (b, dim) and state_time (b,): what a posterior is given. Returns (b, dim)."""
        h = self.inputs(x) + self.condition(s, t, cond)
        h = F.silu(h if state is None else h + self.state(state) + self.state_time(state_time))
        weight = _weight_of_posteriors(state_time, h) if state_time is not None and self.posterior_rank else None
        for i, layer in enumerate(self.hidden):
            h = h + F.silu(layer(h) if weight is None else layer(h) + weight * self.states[i](h))
        return self.outputs(h)


class UNet(nn.Module):
    """Convolutional U-Net on small pictures, conditioned on (s, t) and a class by scale and shift.

    The picture is folded into ``patch`` x ``patch`` blocks first: most of the cost of a small U-Net at full resolution is
    memory traffic, not learning. Skips are added, not concatenated, for the same reason.

    Args:
        channels: picture channels.
        widths: channels at each resolution, halving the side from one to the next.
        blocks: residual blocks per resolution, on the way down and again on the way up.
        patch: side of the folded blocks; the picture's side must be divisible by ``patch * 2**(len(widths) - 1)``.
        classes: number of classes (0: none).
        text: size of a text's embedding (0: none).
        attention: self-attention at the coarsest resolution.
        posterior: whether it can be given a state x_t, for `steerfm.FlowMap.posterior`.
        posterior_rank: rank of changes of its convolutions that only posteriors use. Above 0, posteriors are the map at the
            joint state, see `NeuralFlowMap.posterior_velocity`, and trainings of draws alone leave the map as it is.
    """

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (48, 96),
        blocks: int = 1,
        patch: int = 2,
        classes: int = 0,
        attention: bool = True,
        text: int = 0,
        posterior: bool = False,
        posterior_rank: int = 0,
    ) -> None:
        super().__init__()
        self.posterior, self.posterior_rank = posterior, _checked_rank(posterior, posterior_rank)
        self.patch, self.factor = patch, patch * 2 ** (len(widths) - 1)
        embedding = 4 * widths[0]
        self.condition = ConditionEmbedding(embedding, classes, text)
        self.inputs = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            stage = [nn.Conv2d(widths[level - 1], width, 2, stride=2)] if level else []
            self.down.append(nn.ModuleList([*stage, *(ResidualBlock(width, embedding, posterior_rank) for _ in range(blocks))]))
        last = widths[-1]
        middle = [
            ResidualBlock(last, embedding, posterior_rank),
            *([Attention(last)] if attention else []),
            ResidualBlock(last, embedding, posterior_rank),
        ]
        self.middle = nn.ModuleList(middle)
        for level, width in reversed(list(enumerate(widths))):
            stage = [nn.ConvTranspose2d(width, widths[level - 1], 2, stride=2)] if level else []
            self.up.append(nn.ModuleList([*(ResidualBlock(width, embedding, posterior_rank) for _ in range(blocks)), *stage]))
        self.norm = GroupNorm(8, widths[0])
        self.outputs = _zeroed(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))
        if posterior:
            self.state = _zeroed(nn.Conv2d(channels * patch**2, widths[0], 3, padding=1, bias=False))
            self.state_time = StateTime(embedding)

    def forward(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        cond: Tensor | Mapping[str, Tensor] | None = None,
        state: Tensor | None = None,
        state_time: Tensor | None = None,
    ) -> Tensor:
        """A call of the network.

        Args:
            x: (b, channels, h, w).
            s, t: (b,).
            cond: see `ConditionEmbedding`.
            state: what a posterior is given, of the shape of x.
            state_time: its time, (b,).

        Returns:
            (b, channels, h, w).
        """
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"picture sides {tuple(x.shape[-2:])} must be divisible by {self.factor}")
        emb, h = self.condition(s, t, cond), self.inputs(F.pixel_unshuffle(x, self.patch))
        if state is not None:
            emb, h = emb + self.state_time(state_time), h + self.state(F.pixel_unshuffle(state, self.patch))
        weight = _weight_of_posteriors(state_time, h) if state_time is not None and self.posterior_rank else None
        emb = F.silu(emb)
        skips = []
        for stage in self.down:
            for layer in stage.children():
                h = layer(h, emb, weight) if isinstance(layer, ResidualBlock) else layer(h)
                if isinstance(layer, ResidualBlock):
                    skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, weight)
        for stage in self.up:
            for layer in stage.children():
                h = layer(h + skips.pop(), emb, weight) if isinstance(layer, ResidualBlock) else layer(h)
        h = self.outputs(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.patch)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the embedding scales and shifts between them (FiLM)."""

    def __init__(self, width: int, embedding: int, rank: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(8, width), GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = _zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.film = nn.Linear(embedding, 2 * width)
        if rank:
            self.state_1, self.state_2 = _low_rank(self.conv1, rank), _low_rank(self.conv2, rank)

    def forward(self, x: Tensor, emb: Tensor, weight: Tensor | None = None) -> Tensor:
        """A call.

        Args:
            x: (b, width, h, w).
            emb: (b, embedding).
            weight: (b, 1, 1, 1) of the changes that only posteriors use; None for none.

        Returns:
            (b, width, h, w).
        """
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        a = F.silu(self.norm1(x))
        h = self.conv1(a) if weight is None else self.conv1(a) + weight * self.state_1(a)
        a = F.silu(self.norm2(h) * (1 + scale) + shift)
        return x + (self.conv2(a) if weight is None else self.conv2(a) + weight * self.state_2(a))


class Attention(nn.Module):
    """Single-head self-attention over positions, written as matrix products (see the module's first lines)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.outputs = _zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, emb: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)  # (b, c, h*w)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(c), -1)
        return x + self.outputs((v @ weights.transpose(1, 2)).view(b, c, h, w))


def _zeroed(layer):
    """Zero-initialise a layer, so that its branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResNet(nn.Module):
    """Residual classifier; `features` are its pooled last activations.

    Args:
        channels: picture channels.
        widths: channels at each resolution, halving the side from one to the next.
        classes: number of classes.
        dropout: on the pooled features.
    """

    def __init__(
        self, channels: int = 1, widths: Sequence[int] = (32, 64, 128), classes: int = 10, dropout: float = 0.1
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
            layers.append(_Residual(width))
        self.trunk = nn.Sequential(*layers, GroupNorm(8, widths[-1]), nn.SiLU())
        self.num_features = widths[-1]
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(widths[-1], classes)

    def features(self, pictures: Tensor) -> Tensor:
        """pictures (b, c, h, w) in [0, 1] -> (b, num_features)."""
        return self.trunk(pictures * 2 - 1).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (b, c, h, w) in [0, 1] -> logits (b, classes)."""
        return self.head(self.dropout(self.features(pictures)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvNet(nn.Module):
    """Plain classifier: 5 x 5 convolutions, ReLU, max pooling and a hidden layer. Deliberately unlike `ResNet`.

    Args:
        channels: picture channels.
        widths: channels of each convolution; the side halves after each.
        side: picture side.
        hidden: width of the hidden layer.
        classes: number of classes.
        dropout: before and after the hidden layer.
    """

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (32, 64),
        side: int = 28,
        hidden: int = 128,
        classes: int = 10,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip([channels, *widths[:-1]], widths):
            layers += [nn.Conv2d(before, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        flat = widths[-1] * (side // 2 ** len(widths)) ** 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(flat, hidden), nn.ReLU())
        self.num_features = hidden
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(hidden, classes)

    def features(self, pictures: Tensor) -> Tensor:
        """pictures (b, c, h, w) in [0, 1] -> (b, num_features)."""
        return self.trunk(pictures)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (b, c, h, w) in [0, 1] -> logits (b, classes)."""
        return self.head(self.dropout(self.features(pictures)))


NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": Mlp, "resnet": ResNet, "convnet": ConvNet}
"""Networks by the name that configurations and checkpoints use."""
