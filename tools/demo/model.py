"""The NextStep transformer and its flow-matching head, as small as the demo model needs.

Owns the modules whose parameter names are the official checkpoint's names, so `state_dict()` is the file.
Shapes: B rows, S positions, D hidden size, d head dim, K token dim (64), F flow-head width.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys of `config.json` that change the arithmetic; the field names are the file's."""

    vocab_size: int = 400
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    latent_patch_size: int = 2
    latent_channels: int = 16
    fm_head_dim: int = 192
    fm_head_layers: int = 3
    fm_head_batch_mul: int = 4

    @property
    def token_dim(self):
        """K: the numbers in one image token, a patch of the latent."""
        return self.latent_channels * self.latent_patch_size**2


def at_least_float32(dtype):
    """What norms and softmax are computed in: float32, or float64 where the whole model is."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, back to x's type, then times the weight (the published order of rounding)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        wide = x.to(at_least_float32(x.dtype))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotary_frequencies(head_dim, theta):
    """The angle that one position turns each pair of values by, [head_dim / 2]."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_table(positions, head_dim, theta):
    """cos and sin, each [len(positions), head_dim], for the "rotate halves" form."""
    angle = positions.float()[:, None].cpu() * rotary_frequencies(head_dim, theta)[None]
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(positions.device), angle.sin().to(positions.device)


def rotate(x, cos, sin):
    """Apply rotary positions to x [B, heads, S, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped KV heads; bias on q, k, v and none on the output."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, self.heads * self.head_dim)
        self.k_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x, rope, cache=None, mask=None):
        """x [B, S, D] -> [B, S, D]. `cache` is a list that holds the earlier (k, v) and takes the new ones.

        `mask` [B, 1, S, S_total] is True where a query may look; None means plainly causal (training)."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        # Written out: on a CPU the fused attention's backward costs several times this at our short lengths. The query
        # heads of one KV head are stacked as rows of one product, so K and V are never copied.
        grouped = q.reshape(rows, self.kv_heads, -1, self.head_dim)
        scores = grouped @ k.mT * self.head_dim**-0.5
        scores = scores.view(rows, self.heads, length, -1)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        masked = scores.masked_fill(~mask, float("-inf"))
        weights = masked.softmax(-1, dtype=at_least_float32(v.dtype)).to(v.dtype)
        out = weights.view(rows, self.kv_heads, -1, weights.shape[-1]) @ v
        out = out.view(rows, self.heads, length, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    """down( silu(gate x) * up x )."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, cache=None, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TimeEmbed(nn.Module):
    """Sinusoid of t in 0..1 (not scaled; cosine half first), then a two-layer MLP."""

    def __init__(self, dim, width=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.half = width // 2

    def forward(self, t):
        """t [N] -> [N, F]."""
        freq = torch.exp(-math.log(10000) / self.half * torch.arange(self.half, dtype=torch.float32, device=t.device))
        angle = t.float()[:, None] * freq[None]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """h + gate * MLP( LayerNorm(h) * (1 + scale) + shift ), the three from one adaLN projection."""

    def __init__(self, dim):
        super().__init__()
        self.in_ln = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))

    def forward(self, h, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Norm without parameters, adaLN shift and scale, linear down to a token."""

    def __init__(self, dim, token_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


class VelocityNet(nn.Module):
    """v(x, t, c): x [N, K] noisy token, t [N] with 1 = data, c [N, D] condition -> velocity [N, K]."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.fm_head_dim
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(cfg.hidden_size, width)
        self.input_proj = nn.Linear(cfg.token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(cfg.fm_head_layers))
        self.final_layer = FinalLayer(width, cfg.token_dim)

    def forward(self, x, t, c):
        return self.from_embedded(x, t, self.cond_embed(c))

    def from_embedded(self, x, t, cond):
        """As `forward`, with `cond` [N, F] = cond_embed(c) made once for several t."""
        y = self.time_embed(t) + cond
        h = self.input_proj(x)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


class FlowHead(nn.Module):
    """Holds the velocity network under the official name `image_head.net`."""

    def __init__(self, cfg):
        super().__init__()
        self.net = VelocityNet(cfg)


class NextStep(nn.Module):
    """The whole model without the VAE; parameter names as in the official `model.safetensors`."""

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.image_in_projector = nn.Linear(cfg.token_dim, cfg.hidden_size)
        self.image_out_projector = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.image_head = FlowHead(cfg)
        self.reset_parameters()

    def reset_parameters(self):
        """Small fan-in scaled weights; every residual branch and the flow head's output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        for layer in self.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        net = self.image_head.net
        for block in net.res_blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(net.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(net.final_layer.linear.weight)

    def embed(self, ids, image_tokens, image_mask):
        """ids [B, S]; `image_tokens` [n, K] in row order replace the positions where `image_mask` [B, S] is True."""
        x = self.embed_tokens(ids)
        projected = self.image_in_projector(image_tokens).to(x.dtype)
        return x.masked_scatter(image_mask[..., None], projected)

    def forward(self, x, positions, caches=None, mask=None):
        """Embedded sequence x [B, S, D] at `positions` [S] -> normed hidden states [B, S, D]."""
        rope = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, None if caches is None else caches[i], mask)
        return self.norm(x)
