"""The variational autoencoder of Stable Diffusion (`AutoencoderKL`), written top-down.

Attribute names are the keys of a diffusers checkpoint (`to_q` .. `to_out.0`; older files are renamed in weights/).
Architecture: Latent Diffusion [2112.10752, section 3.1].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min.config import VAEConfig

_EPS = 1e-6  # of every GroupNorm in this network


class VAE(nn.Module):
    """Images in [-1, 1] (B, 3, H, W) <-> scaled latents (B, C, H / factor, W / factor).

    latents = scaling_factor * the posterior's mean
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, C, h, w), unscaled, in the parameters' dtype."""
        hidden = self.encoder(image.to(self.quant_conv.weight.dtype))
        mean, logvar = self.quant_conv(hidden).chunk(2, dim=1)
        return mean, logvar

    def encode(self, image: Tensor) -> Tensor:
        """The posterior's mode, scaled, float32: a deterministic encoding, so that one picture has one inversion.

        H and W must be multiples of `config.factor`.
        """
        mean, _ = self.moments(image)
        return mean.float() * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> image, float32, about [-1, 1] (not clipped)."""
        unscaled = (latents / self.config.scaling_factor).to(self.post_quant_conv.weight.dtype)
        image: Tensor = self.decoder(self.post_quant_conv(unscaled))
        return image.float()


class Encoder(nn.Module):
    """Image -> features of the posterior, halving the size at every level but the last."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down_blocks.append(DownBlock(channels, width, config.layers_per_block, groups, not last))
            channels = width
        self.mid_block = MidBlock(channels, groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.conv_in(image)
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.mid_block(hidden)
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class Decoder(nn.Module):
    """Latents -> image, doubling the size at every level but the last; one more resnet per level than the encoder."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.up_blocks.append(UpBlock(channels, width, config.layers_per_block + 1, groups, not last))
            channels = width
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=_EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class DownBlock(nn.Module):
    """Resnets, then a halving where the level has one."""

    def __init__(self, channels: int, width: int, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        inputs = [channels] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, width, groups) for c in inputs)
        self.downsamplers = nn.ModuleList([Downsample(width)] if downsample else [])

    def forward(self, hidden: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            hidden = module(hidden)
        return hidden


class UpBlock(nn.Module):
    """Resnets, then a doubling where the level has one."""

    def __init__(self, channels: int, width: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        inputs = [channels] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, width, groups) for c in inputs)
        self.upsamplers = nn.ModuleList([Upsample(width)] if upsample else [])

    def forward(self, hidden: Tensor) -> Tensor:
        for module in (*self.resnets, *self.upsamplers):
            hidden = module(hidden)
        return hidden


class MidBlock(nn.Module):
    """The bottleneck: resnet, single-head attention (where the config asks for it), resnet."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)] if attention else [])

    def forward(self, hidden: Tensor) -> Tensor:
        before, after = self.resnets
        for module in (before, *self.attentions, after):
            hidden = module(hidden)
        return hidden


class ResnetBlock(nn.Module):
    """hidden + conv2(silu(norm2(conv1(silu(norm1(hidden)))))), the shortcut widened where widths differ."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=_EPS)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, width, 1) if channels != width else None

    def forward(self, hidden: Tensor) -> Tensor:
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        return residual + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Every position of a feature map attends to every other, with one head as wide as the map has channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = self.group_norm(hidden).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        attended: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return hidden + attended[:, 0].transpose(1, 2).reshape(hidden.shape)


class Downsample(nn.Module):
    """Halve height and width; the padding sits at the right and the bottom only, as in the published models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width with nearest neighbours, then convolve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        height, width = hidden.shape[-2:]
        return self.conv(F.interpolate(hidden, size=(2 * height, 2 * width), mode="nearest"))
