"""Draws pictures from a model: the decode loop with classifier-free guidance and the five samplers.

t runs from 0 (noise) to 1 (data). The samplers, all under warpstep's names and all as the official pipelines have
them: "ode" is Euler on the velocity, "aug" the stochastic sampler of August 2025 with its deterministic last step of
0.04, "hf11" the one inside the 1.1 checkpoint, which has no such step, "sde" and "cps" the stochastic ones of
February 2026.
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer import SPECIAL_IDS, image_prefix
from vae import patchify, to_bytes, to_signed, unpatchify

SAMPLERS = ("aug", "hf11", "sde", "cps", "ode")
# Length of aug's last step.
LAST_STEP = 0.04


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tokens are sampled. `steps` counts evaluations of the network; `shift` above 1 moves them towards the
    noise; `noise_level` is of sde and cps; `use_norm` normalises every token before it is stored and fed back."""

    sampler: str = "ode"
    steps: int = 10
    cfg: float = 2.0
    cfg_img: float = 1.0
    shift: float = 1.0
    noise_level: float = 0.8
    use_norm: bool = True


def time_grid(settings):
    """The times at which the network is asked, float32 values in rising order."""
    steps, shift = settings.steps, settings.shift
    if settings.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {settings.sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if steps < 2:
        raise ValueError(f"{steps} steps: expected at least 2")
    t = torch.linspace(0, 1 - LAST_STEP, steps) if settings.sampler == "aug" else torch.linspace(0, 1, steps + 1)[:-1]
    return (t / (shift - (shift - 1) * t)).tolist()


def step_draws(settings):
    """Fresh normal draws that one token takes after its initial noise."""
    return {"aug": settings.steps - 1, "ode": 0}.get(settings.sampler, settings.steps)


def sample_token(net, cond, noise, draw, settings, trace=None):
    """One image token per row, before any norm. `cond` [R*B, D] is stacked branch by branch, `noise` [B, K] the
    start; `draw()` gives fresh [B, K] normal numbers. Returns [B, K].

    `trace` collects lists of what every evaluation of the network was given and gave: "t", "x" [B, K], "v_raw"
    [R*B, K] and the guided "v" [B, K]."""
    branches = cond.shape[0] // noise.shape[0]
    embedded = net.cond_embed(cond)

    def velocity(x, t):
        out = net.from_embedded(x.repeat(branches, 1), torch.full((len(cond),), t, device=x.device), embedded).float()
        parts = out.chunk(branches)
        if branches == 1:
            v = parts[0]
        elif branches == 2:
            v = parts[1] + settings.cfg * (parts[0] - parts[1])
        else:
            v = parts[2] + settings.cfg_img * (parts[1] - parts[2]) + settings.cfg * (parts[0] - parts[1])
        if trace is not None:
            for name, value in (("t", t), ("x", x), ("v_raw", out), ("v", v)):
                trace.setdefault(name, []).append(value)
        return v

    times = time_grid(settings)
    step = {"aug": score_step, "hf11": score_step, "sde": sde_step, "cps": cps_step, "ode": ode_step}[settings.sampler]
    following = times[1:] if settings.sampler == "aug" else times[1:] + [1.0]
    x = noise
    for t, u in zip(times, following):
        x = step(x, velocity(x, t), t, u, draw, settings, times[-1])
    return x + velocity(x, times[-1]) * LAST_STEP if settings.sampler == "aug" else x


def score_step(x, v, t, u, draw, settings, last):
    """aug and hf11 from t to u: drift v + (1-t) score with score = (t v - x)/(1-t), hence (1+t) v - x."""
    return x + ((1 + t) * v - x) * (u - t) + math.sqrt(2 * (1 - t) * (u - t)) * draw()


def ode_step(x, v, t, u, draw, settings, last):
    """Mixes the noise and the picture that the velocity points from and to: the same as Euler."""
    return (x - v * t) * (1 - u) + (x + v * (1 - t)) * u


def cps_step(x, v, t, u, draw, settings, last):
    """As `ode_step`, with a part of the noise replaced by a fresh draw of the same size."""
    deviation = (1 - u) * math.sin(settings.noise_level * math.pi / 2)
    kept = math.sqrt((1 - u) ** 2 - deviation**2)
    return (x - v * t) * kept + (x + v * (1 - t)) * u + deviation * draw()


def sde_step(x, v, t, u, draw, settings, last):
    """As `ode_step`, plus noise and the drift that answers it. `last`, the last time before 1, stands for the noise
    of the first step, where 1 - sigma would be zero; with a shift the official code does the same."""
    noise, picture = x - v * t, x + v * (1 - t)
    sigma, dt = 1 - t, u - t
    deviation = settings.noise_level * math.sqrt(sigma / (1 - (last if sigma == 1 else sigma)))
    mean = noise * (1 - u) + picture * u - deviation**2 * dt / (2 * sigma) * noise
    return mean + deviation * math.sqrt(dt) * draw()


def branch_rows(tok, grid, texts, sources, cfg, cfg_img):
    """The ids of every row, branch by branch, without padding. `sources` is None or [B, n, K]."""
    eoi, hole = SPECIAL_IDS["<|end_of_image|>"], SPECIAL_IDS["<|image_placeholder|>"]
    prefix = image_prefix(tok, grid)
    picture = [] if sources is None else prefix + [hole] * sources.shape[1] + [eoi]
    rows = [picture + tok.encode(t, add_special_tokens=False).ids + prefix for t in texts]
    if cfg != 1 and sources is not None and cfg_img != 1:
        rows += [picture + prefix for _ in texts]
    if cfg != 1:
        rows += [prefix for _ in texts]
    return rows


def prompt_batch(tok, grid, texts, sources, settings):
    """(ids [R*B, S], real [R*B, S]) of all branches, padded on the left; `real` is False at padding."""
    rows = branch_rows(tok, grid, texts, sources, settings.cfg, settings.cfg_img)
    longest = max(map(len, rows))
    ids = torch.tensor([[SPECIAL_IDS["[PAD]"]] * (longest - len(r)) + r for r in rows])
    return ids, torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows])


def normal_draws(seed, count, token_dim):
    """A function that gives [count, token_dim] normal numbers per call, from a seed."""
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, token_dim, generator=rng)


@torch.no_grad()
def generate(model, tok, texts, grid, settings, draw, sources=None, trace=None):
    """Image tokens [B, hw, K] for captions, or for instructions when `sources` [B, n, K] holds pictures to edit.

    Every token takes `draw()` for its initial noise, then once per noisy step. `trace`, a list, gets one dict per
    token: what `sample_token` traces, "cond" [R*B, D] and "out" [B, K], the token before the norm; the step after the
    last token, whose result nobody needs, is then made as well, as the official code does."""
    device = next(model.parameters()).device
    count, token_dim, total = len(texts), model.config.token_dim, grid[0] * grid[1]
    ids, real = (t.to(device) for t in prompt_batch(tok, grid, texts, sources, settings))
    branches, longest = len(ids) // count, ids.shape[1]

    # Causal, never at padding; a padded query looks at itself so that its softmax is defined.
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    own = torch.eye(longest, dtype=torch.bool, device=device)
    mask = ((causal & real[:, None]) | own)[:, None]
    holes = ids == SPECIAL_IDS["<|image_placeholder|>"]
    repeats = int(holes.sum()) // max(1, count * (0 if sources is None else sources.shape[1]))
    given = torch.zeros(0, token_dim, device=device) if sources is None else sources.repeat(repeats, 1, 1).flatten(0, 1)

    def draw_here():
        return draw().to(device)

    caches = [[] for _ in model.layers]
    x = model.embed(ids, given, holes)
    hidden = model(x, torch.arange(longest, device=device), caches, mask)[:, -1]
    tokens = []
    for n in range(total):
        cond = model.image_out_projector(hidden)
        seen = None if trace is None else {"cond": cond}
        out = sample_token(model.image_head.net, cond, draw_here(), draw_here, settings, seen)
        if trace is not None:
            trace.append(seen | {"out": out})
        tokens.append(F.layer_norm(out, (token_dim,), eps=1e-6) if settings.use_norm else out)
        if n + 1 == total and trace is None:
            break
        x = model.image_in_projector(tokens[-1])[:, None].repeat(branches, 1, 1)
        real = torch.cat([real, torch.ones(len(ids), 1, dtype=torch.bool, device=device)], 1)
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
    return np.concatenate(pictures)
