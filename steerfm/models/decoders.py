"""Decode latents of a pipeline to pictures in [0, 1] and back, with gradients: invertible pieces around its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.randomness import stream

FRAMES_FIRST = ("AnyFlow", "CogVideoX")
"""Prefixes of the names of pipelines with video latents (b, f, c, h, w)."""


class Affine(nn.Module):
    """z * scale + shift, per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.scale + self.shift

    def inverse(self, z: Tensor) -> Tensor:
        return (z - self.shift) / self.scale


class Tokens(nn.Module):
    """Tokens (b, h w / 4, 4 c) to a picture (b, c, h, w): each token is a 2 x 2 square."""

    def __init__(self, h: int, w: int) -> None:
        super().__init__()
        self.h, self.w = h, w

    def forward(self, z: Tensor) -> Tensor:
        squares = z.unflatten(2, (-1, 2, 2)).unflatten(1, (self.h // 2, self.w // 2))  # b h w c 2 2
        return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(z), -1, self.h, self.w)

    def inverse(self, z: Tensor) -> Tensor:
        squares = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # b c h 2 w 2
        return squares.permute(0, 2, 4, 1, 3, 5).reshape(len(z), self.h * self.w // 4, -1)


class VideoTokens(nn.Module):
    """Tokens (b, f h w, c) to a video (b, c, f, h, w)."""

    def __init__(self, f: int, h: int, w: int) -> None:
        super().__init__()
        self.sides = f, h, w

    def forward(self, z: Tensor) -> Tensor:
        return z.unflatten(1, self.sides).movedim(4, 1)

    def inverse(self, z: Tensor) -> Tensor:
        return z.flatten(2).transpose(1, 2)


class FramesFirst(nn.Module):
    """(b, f, c, h, w) to (b, c, f, h, w)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2)

    inverse = forward


class OneFrame(nn.Module):
    """A picture (b, c, h, w) to a video of one frame (b, c, 1, h, w)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.unsqueeze(2)

    def inverse(self, z: Tensor) -> Tensor:
        return z.squeeze(2)


class NoiseMix(nn.Module):
    """(1 - share) z + share noise, with fixed noise, so that pictures depend on their latents only."""

    noise: Tensor

    def __init__(self, shape: torch.Size | tuple[int, ...], share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("noise", torch.randn(1, *shape, generator=stream(0, "decoder")), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return (1 - self.share) * z + self.share * self.noise

    def inverse(self, z: Tensor) -> Tensor:
        return (z - self.share * self.noise) / (1 - self.share)


class Decoder(nn.Module):
    """Latents to pictures (b, c, h, w), or videos (b, c, f, h, w), in [0, 1], float32.

    Args:
        vae: the autoencoder.
        pieces: convert latents to the autoencoder's input.
        time: time argument of the autoencoder; None if it has none.
    """

    def __init__(self, vae: nn.Module, pieces: list[nn.Module], time: float | None = None) -> None:
        super().__init__()
        self.vae, self.pieces, self.time = vae, nn.ModuleList(pieces), time
        self.one_frame = any(isinstance(piece, OneFrame) for piece in pieces)

    def forward(self, z: Tensor) -> Tensor:
        for piece in self.pieces:
            z = piece(z)
        vae: Any = self.vae
        z = z.to(_dtype(vae))
        times = () if self.time is None else (torch.full((len(z),), self.time).to(z),)
        pictures = vae.decode(z, *times, return_dict=False)[0].float()
        if self.one_frame:
            pictures = pictures.squeeze(2)
        return (pictures / 2 + 0.5).clamp(0, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """The approximate inverse; the mode if the autoencoder returns a distribution."""
        vae: Any = self.vae
        x = (pictures * 2 - 1).to(_dtype(vae))
        out = vae.encode(x.unsqueeze(2) if self.one_frame else x)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent if hasattr(out, "latent") else out.latents
        z = z.float()
        for piece in reversed(self.pieces):
            z = piece.inverse(z)  # type: ignore[operator]
        return z


def decoder_of(
    pipe: Any, shape: torch.Size | tuple[int, ...], size: tuple[int, int] | None, call: Mapping[str, Any]
) -> Decoder | None:
    """The decoder of a pipeline's latents; None if it has no supported autoencoder.

    Args:
        pipe: the pipeline.
        shape: of one sample's latents.
        size: (height, width) of its pictures in pixels.
        call: arguments of its call.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(vae, "decode"):
        return None
    if getattr(vae.config, "force_upcast", False) and _dtype(vae) == torch.float16:
        vae.to(torch.float32)  # as the pipeline does, since half precision overflows
    pieces: list[nn.Module] = []
    if len(shape) == 2 and type(pipe).__name__ == "LTXPipeline" and size is not None:
        return _ltx(pipe, vae, shape, size, call)
    if len(shape) == 2:
        if size is None or not hasattr(pipe, "vae_scale_factor"):
            return None
        h, w = (2 * (pixels // (2 * pipe.vae_scale_factor)) for pixels in size)
        if shape[0] * 4 != h * w:
            return None
        pieces = [Tokens(h, w)]
    if hasattr(vae, "bn"):  # latents that are already squares
        spread = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).float()
        pieces.insert(0, Affine(spread, vae.bn.running_mean.float()))
        return Decoder(vae, pieces)
    if len(shape) == 4 and type(pipe).__name__.startswith(FRAMES_FIRST):
        pieces.append(FramesFirst())
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    video = len(shape) == 4 or type(vae).__name__.endswith(("Wan", "QwenImage"))
    if video and len(shape) < 4:
        pieces.append(OneFrame())
    factor = float(getattr(vae.config, "scaling_factor", None) or 1.0)
    scale = torch.tensor(std if std is not None else [1.0], dtype=torch.float32) / factor
    shift = torch.tensor(mean if mean is not None else [float(getattr(vae.config, "shift_factor", None) or 0.0)])
    ones = (-1, *(1,) * (3 if video else 2))
    pieces.append(Affine(scale.view(ones), shift.view(ones)))
    return Decoder(vae, pieces)


def _ltx(
    pipe: Any, vae: Any, shape: torch.Size | tuple[int, ...], size: tuple[int, int], call: Mapping[str, Any]
) -> Decoder | None:
    """LTX-Video: one token for each place in space and time; None if tokens are larger blocks."""
    h, w = (pixels // pipe.vae_spatial_compression_ratio for pixels in size)
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    if patches != (1, 1) or shape[0] % (h * w):
        return None
    mean, std = (part.float().view(1, -1, 1, 1, 1) for part in (vae.latents_mean, vae.latents_std))
    video = shape[0] // (h * w), h, w
    pieces: list[nn.Module] = [VideoTokens(*video), Affine(std / float(vae.config.scaling_factor), mean)]
    if not vae.config.timestep_conditioning:
        return Decoder(vae, pieces)
    time, share = float(call.get("decode_timestep") or 0.0), call.get("decode_noise_scale")
    share = time if share is None else float(share)
    return Decoder(vae, [*pieces, NoiseMix((shape[1], *video), share)] if share else pieces, time)


def _dtype(vae: Any) -> torch.dtype:
    return next(vae.parameters()).dtype
