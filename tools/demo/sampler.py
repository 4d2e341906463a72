"""Draws pictures from a model: the decode loop with classifier-free guidance and two samplers.

"ode" is plain Euler on the velocity from t = 0 (noise) to 1 (data); "sde" is the August pipeline's stochastic
sampler with its deterministic last step of 0.04. Both as in the official code, with `use_norm` as an option.
"""

import torch
import torch.nn.functional as F

from tokenizer import SPECIAL_IDS, image_prefix
from vae import patchify, to_bytes, to_signed, unpatchify

LAST_STEP = 0.04


def sample_token(net, cond, noise, draw, cfg, cfg_img, steps, sampler):
    """One image token per row. `cond` [R*B, D] is stacked branch by branch, `noise` [B, K] the start;
    `draw()` gives the fresh [B, K] normal numbers of the stochastic sampler. Returns [B, K]."""
    branches = cond.shape[0] // noise.shape[0]
    embedded = net.cond_embed(cond)

    def velocity(x, t):
        out = net.from_embedded(x.repeat(branches, 1), torch.full((len(cond),), t, device=x.device), embedded)
        parts = out.float().chunk(branches)
        if branches == 1:
            return parts[0]
        if branches == 2:
            return parts[1] + cfg * (parts[0] - parts[1])
        return parts[2] + cfg_img * (parts[1] - parts[2]) + cfg * (parts[0] - parts[1])

    x = noise
    if sampler == "ode":
        for k in range(steps):
            x = x + velocity(x, k / steps) / steps
        return x
    if sampler != "sde":
        raise ValueError(f"unknown sampler {sampler!r}: expected ode or sde")
    grid = [k * (1 - LAST_STEP) / (steps - 1) for k in range(steps)]
    for t, following in zip(grid, grid[1:]):
        dt = following - t
        # drift = v + (1-t) score with score = (t v - x)/(1-t), hence (1+t) v - x.
        x = x + ((1 + t) * velocity(x, t) - x) * dt + (2 * (1 - t) * dt) ** 0.5 * draw()
    return x + velocity(x, grid[-1]) * LAST_STEP


def branch_rows(tok, grid, texts, sources, cfg, cfg_img):
    """The rows of all guidance branches: lists of (ids, number of source tokens). `sources` is None or [B, n, K]."""
    eoi, hole = SPECIAL_IDS["<|end_of_image|>"], SPECIAL_IDS["<|image_placeholder|>"]
    prefix = image_prefix(tok, grid)
    picture = [] if sources is None else prefix + [hole] * sources.shape[1] + [eoi]
    rows = [picture + tok.encode(t, add_special_tokens=False).ids + prefix for t in texts]
    if cfg != 1 and sources is not None and cfg_img != 1:
        rows += [picture + prefix for _ in texts]
    if cfg != 1:
        rows += [prefix for _ in texts]
    return rows


@torch.no_grad()
def generate(
    model, tok, texts, grid, cfg=2.0, cfg_img=1.0, steps=10, sampler="ode", seed=0, use_norm=True, sources=None
):  # fmt: skip
    """Image tokens [B, hw, K] for captions, or for instructions when `sources` [B, n, K] holds pictures to edit."""
    device = next(model.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    count, token_dim = len(texts), model.config.token_dim
    hole, pad = SPECIAL_IDS["<|image_placeholder|>"], SPECIAL_IDS["[PAD]"]
    rows = branch_rows(tok, grid, texts, sources, cfg, cfg_img)
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    real = torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows], device=device)

    # Causal, never at padding; a padded query looks at itself so that its softmax is defined.
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    own = torch.eye(longest, dtype=torch.bool, device=device)
    mask = ((causal & real[:, None]) | own)[:, None]
    holes = ids == hole
    repeats = int(holes.sum()) // max(1, count * (0 if sources is None else sources.shape[1]))
    given = torch.zeros(0, token_dim, device=device) if sources is None else sources.repeat(repeats, 1, 1).flatten(0, 1)

    def draw():
        return torch.randn(count, token_dim, generator=rng).to(device)

    caches = [[] for _ in model.layers]
    x = model.embed(ids, given, holes)
    hidden = model(x, torch.arange(longest, device=device), caches, mask)[:, -1]
    tokens = []
    for n in range(grid[0] * grid[1]):
        cond = model.image_out_projector(hidden)
        token = sample_token(model.image_head.net, cond, draw(), draw, cfg, cfg_img, steps, sampler)
        if use_norm:
            token = F.layer_norm(token, (token_dim,), eps=1e-6)
        tokens.append(token)
        if n + 1 == grid[0] * grid[1]:
            break
        x = model.image_in_projector(token)[:, None].repeat(len(rows) // count, 1, 1)
        real = torch.cat([real, torch.ones(len(rows), 1, dtype=torch.bool, device=device)], 1)
        position = torch.tensor([longest + n], device=device)
        hidden = model(x, position, caches, real[:, None, None])[:, -1]
    return torch.stack(tokens, 1)


@torch.no_grad()
def encode_pictures(vae, pictures, batch=16):
    """uint8 [N, H, W, 3] -> image tokens [N, hw, 64]."""
    device = next(vae.parameters()).device
    parts = (to_signed(pictures[i : i + batch]).to(device) for i in range(0, len(pictures), batch))
    return torch.cat([patchify(vae.encode(part)[0]) for part in parts])


@torch.no_grad()
def decode_tokens(vae, tokens, grid, batch=16):
    """Image tokens [N, hw, 64] -> uint8 [N, H, W, 3]."""
    parts = (tokens[i : i + batch] for i in range(0, len(tokens), batch))
    pictures = [to_bytes(vae.decode(unpatchify(part, grid))) for part in parts]
    import numpy as np

    return np.concatenate(pictures)
