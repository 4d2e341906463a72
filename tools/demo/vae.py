"""The convolutional VAE: 8x down, 16 latent channels, parameter names of the official f8ch16 tokenizer.

Shapes: pictures [B, 3, H, W] in -1..1, latents [B, z, H/8, W/8], image tokens [B, (H/16)(W/16), 64].
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The keys of `vae/config.json`; scale 1, shift 0, a deterministic and normalised latent, as released."""

    resolution: int = 128
    in_channels: int = 3
    ch: int = 64
    out_ch: int = 3
    ch_mult: tuple = (1, 1, 2, 2)
    num_res_blocks: int = 1
    z_channels: int = 16
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    deterministic: bool = True
    encoder_norm: bool = True
    psz: int = 1


def group_norm(channels):
    """32 groups. With 32 channels this would be instance norm and lose the absolute colour: keep ch >= 64."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normed 3x3 convolutions beside a skip that is 1x1 when the width changes."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One head over all H*W positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Half size: zeros on the right and bottom edge only, then 3x3 stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest x2, then 3x3."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels):
    """ResBlock, attention, ResBlock at the lowest resolution."""
    first, second = ResBlock(channels, channels), ResBlock(channels, channels)
    return nn.ModuleDict({"block_1": first, "attn_1": AttnBlock(channels), "block_2": second})


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, 2z, H/8, W/8]: mean and log variance."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.in_channels, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        before = cfg.ch
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList(ResBlock(before if j == 0 else width, width) for j in range(cfg.num_res_blocks))
            if level + 1 < len(widths):
                stage.downsample = Downsample(width)
            self.down.append(stage)
            before = width
        self.mid = middle(before)
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        for part in ("block_1", "attn_1", "block_2"):
            h = self.mid[part](h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """[B, z, h, w] -> [B, 3, 8h, 8w]. `up[l]` is indexed by level, and run from the highest level to 0."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        before = widths[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, before, 3, padding=1)
        self.mid = middle(before)
        stages = []
        for level in reversed(range(len(widths))):
            stage, width = nn.Module(), widths[level]
            count = cfg.num_res_blocks + 1
            stage.block = nn.ModuleList(ResBlock(before if j == 0 else width, width) for j in range(count))
            if level > 0:
                stage.upsample = Upsample(width)
            stages.insert(0, stage)
            before = width
        self.up = nn.ModuleList(stages)
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, cfg.out_ch, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for part in ("block_1", "attn_1", "block_2"):
            h = self.mid[part](h)
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Vae(nn.Module):
    """Encoder and decoder together, with the normalised mean as the latent."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.psz != 1 or not cfg.encoder_norm or not cfg.deterministic:
            raise ValueError("this training code makes psz 1, encoder_norm, deterministic latents only")
        self.config = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)

    def encode(self, pictures):
        """pictures [B, 3, H, W] -> (latent mean, normalised over its channels; log variance), each [B, z, H/8, W/8]."""
        mean, logvar = self.encoder(pictures).chunk(2, 1)
        mean = F.layer_norm(mean.float().movedim(1, -1), (mean.shape[1],), eps=1e-6).movedim(-1, 1)
        return (mean - self.config.shift_factor) * self.config.scaling_factor, logvar.float().clamp(-30, 20)

    def decode(self, latent):
        """latent [B, z, h, w] -> pictures [B, 3, 8h, 8w], not clamped."""
        return self.decoder(latent / self.config.scaling_factor + self.config.shift_factor)


def patchify(latent, patch=2):
    """[B, C, H, W] -> [B, hw, C*p*p]: raster order of patches, channel-major inside one."""
    rows, channels, height, width = latent.shape
    x = latent.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // patch) * (width // patch), channels * patch * patch)


def unpatchify(tokens, grid, patch=2):
    """The inverse of `patchify`; `grid` is (h, w) in tokens."""
    rows, _, dim = tokens.shape
    height, width = grid
    channels = dim // (patch * patch)
    x = tokens.reshape(rows, height, width, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height * patch, width * patch)


def to_signed(pictures):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1."""
    return torch.as_tensor(pictures).movedim(-1, 1).float() / 127.5 - 1


def to_bytes(pictures):
    """float [B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3], rounded half to even as the pipelines do."""
    return ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
