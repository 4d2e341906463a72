"""Records what this code computes on a finished model, as cases that `warpstep verify` compares the engine with.

    python tools/demo/record.py MODEL_DIR --out tests/golden/cases

writes `demo_*.safetensors` (earlier ones there are replaced) and prints each file's size and what `check.py` says of
its picture. The model's folder is named MODEL in the files, where the engine looks for it beside the cases' folder.

- One teacher-forced case (kind `pipeline`) per sampler. `demo_aug` holds the layers of the prompt and of two steps
  and the picture before rounding; the others hold conditions, samplers and pixels alone, since the transformer knows
  nothing of the sampler. `demo_ode` is 64 pixels high and 128 wide, the rest 64x64.
- One edit with three guidance branches, on 32x32 pixels because a branch's prompt contains the source's tokens.
- Whole pictures (kind `picture`), which give the engine a prompt and draws and ask for nothing but the pixels: twelve
  of 64x64, one of 96x96. One of 80 pixels high and 112 wide and one of 64x512 also ask for the tokens.

Everything runs in float32 on one thread, on weights widened from bf16. Draws are rounded to bf16 before they are
used, so that they take half the space and lose nothing. Seeds are fixed: the same model and torch give the same files.
"""

import argparse
import copy
import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save

import check
import layout
import sampler
import scenes
from model import rotary_frequencies, rotary_table, rotate
from vae import patchify, to_bytes, to_signed, unpatchify

MODEL = "demo128"
CELL = 16
# The repository's share for these files.
MAX_BYTES = 1_400_000
GENERATION = {"aug": "aug", "hf11": "hf11", "sde": "feb", "cps": "feb", "ode": "feb"}
# Tokens whose sampling is recorded evaluation by evaluation.
TRACED_TOKENS = 1

# Shifts other than 1 where a sampler treats them in a way of its own.
PIPELINES = {
    "demo_aug": ("a red star on blue", (4, 4), sampler.Settings("aug", 6)),
    "demo_hf11": ("a green circle on white", (4, 4), sampler.Settings("hf11", 5)),
    "demo_sde": ("two blue squares on red", (4, 4), sampler.Settings("sde", 5, shift=2.0)),
    "demo_cps": ("a black triangle on green", (4, 4), sampler.Settings("cps", 5, noise_level=0.7)),
    "demo_ode": ("a yellow circle on black", (4, 8), sampler.Settings("ode", 6, shift=1.5)),
}
EDIT_GRID = (2, 2)
EDIT = sampler.Settings("aug", 5, cfg=3.0, cfg_img=1.5)
PICTURE = sampler.Settings("ode", 10)
UNGUIDED = sampler.Settings("ode", 10, cfg=1.0)
# Name, grid, how many pictures, of how many tries, how. The model was not trained at the sizes after the first, where
# it may amplify any rounding without bound; such a run tells nothing of an engine, so the case keeps how far its tokens
# move when every draw moves by `NUDGE`, the steadiest of several captions and draws is taken, and it is refused if it
# moves by more than `STEADY`. Guidance makes every run at the sizes of "demo_large" and "demo_high" unsteady.
PICTURES = (
    ("demo_picture", (4, 4), 12, 12, PICTURE),
    ("demo_large", (6, 6), 1, 12, UNGUIDED),
    ("demo_high", (5, 7), 1, 24, UNGUIDED),
    ("demo_wide", (4, 32), 1, 12, PICTURE),
)
# Pictures of these names keep their tokens too.
WITH_TOKENS = ("demo_high", "demo_wide")
NUDGE = 1e-6
STEADY = 1e-3


class RecordedDraws:
    """Normal draws of one image from a seed, representable in bf16, and kept."""

    def __init__(self, seed, token_dim):
        self.rng, self.token_dim, self.kept = torch.Generator().manual_seed(seed), token_dim, []

    def __call__(self):
        self.kept.append(self.normal(1, self.token_dim))
        return self.kept[-1].float()

    def normal(self, *shape):
        """Draws of another shape, which are not kept."""
        return torch.randn(*shape, generator=self.rng).bfloat16()

    def tensors(self, settings):
        """`draw.noise` [T, 1, K] and, where the sampler takes any, `draw.step` [T, n, 1, K]."""
        taken = torch.stack(self.kept).unflatten(0, (-1, 1 + sampler.step_draws(settings)))
        steps = {"draw.step": taken[:, 1:]} if taken.shape[1] > 1 else {}
        return {"draw.noise": taken[:, 0], **steps}


class Taps:
    """Collects what modules were given and gave while the model runs: entry 0 is the prompt, entry 1 + n the step that
    consumes token n."""

    def __init__(self, model):
        first = model.layers[0]
        attention = first.self_attn
        self.kept, self.handles = {}, []
        self.tap("embeds", first, lambda given, gave: given)
        for i, layer in enumerate(model.layers):
            self.tap(f"layer{i}", layer)
        self.tap("norm", model.norm)
        for name in ("q_proj", "k_proj", "v_proj"):
            self.tap(name, getattr(attention, name))
        self.tap("attn_ctx", attention.o_proj, lambda given, gave: given)
        self.tap("attn_out", attention.o_proj)
        self.tap("mlp_out", first.mlp)

    def tap(self, name, module, pick=lambda given, gave: gave):
        """Keep what `pick` chooses of every call of `module`."""
        kept = self.kept.setdefault(name, [])
        self.handles.append(module.register_forward_hook(lambda _, given, gave: kept.append(pick(given[0], gave))))

    def close(self):
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()

    def stage(self, name, call, config, position):
        """The tensors of a stage under the fixtures' names: call `call`, whose first token stands at `position`."""
        rows = {key: values[call] for key, values in self.kept.items()}
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        positions = torch.arange(position, position + rows["embeds"].shape[1])
        cos, sin = rotary_table(positions, config.head_dim, config.rope_theta)
        turned = {
            key: rotate(rows[key].unflatten(-1, (count, config.head_dim)).transpose(1, 2), cos, sin)
            for key, count in heads.items()
        }
        first = {"q_rope": turned["q_proj"], "k_rope": turned["k_proj"], "v": rows["v_proj"]}
        first |= {key: rows[key] for key in ("attn_ctx", "attn_out", "mlp_out")}
        layers = {key: value for key, value in rows.items() if key.startswith("layer")}
        plain = {"inputs_embeds": rows["embeds"], "norm": rows["norm"], "rope_cos": cos[None], "rope_sin": sin[None]}
        everything = plain | layers | {f"l0.{key}": value for key, value in first.items()}
        return {f"{name}.{key}": value for key, value in everything.items()}


def without(tensors, *parts):
    """The tensors whose name contains none of `parts`."""
    return {name: value for name, value in tensors.items() if not any(part in name for part in parts)}


def decode_norms(trace, taps):
    """`decode.norm`: the normed hidden state after every image token."""
    return torch.stack([taps.kept["norm"][1 + n][:, 0] for n in range(len(trace))])


def sampled(trace, taps):
    """The tensors of the decode loop: conditions, steps, and what the sampler did."""
    steps = len(trace)
    tensors = {
        "cond": torch.stack([t["cond"] for t in trace]),
        "decode.inputs_embeds": torch.stack([taps.kept["embeds"][1 + n][:, 0] for n in range(steps)]),
        "fm.t_net": torch.tensor(trace[0]["t"]),
        "fm.out": torch.stack([t["out"] for t in trace]),
    }
    for name, key in (("fm.x_net", "x"), ("fm.v_raw", "v_raw"), ("fm.v", "v")):
        tensors[name] = torch.stack([torch.stack(t[key]) for t in trace[:TRACED_TOKENS]])
    return tensors


def decoded(vae, tokens, grid):
    """(latents, image, image_u8) of image tokens."""
    latents = unpatchify(tokens, grid) / vae.config.scaling_factor + vae.config.shift_factor
    image = vae.decoder(latents)
    return latents, image, to_bytes(image)


def prompt(tok, grid, text, settings, sources=None):
    """`input_ids` and `attention_mask`."""
    ids, real = sampler.prompt_batch(tok, grid, [text], sources, settings)
    return {"input_ids": ids, "attention_mask": real.long()}


def pipeline_case(model, vae, tok, seed, text, grid, settings, full):
    """(tensors, picture) of a teacher-forced case; `full` records the layers too."""
    draws, trace, taps = RecordedDraws(seed, model.config.token_dim), [], Taps(model)
    tokens = sampler.generate(model, tok, [text], grid, settings, draws, trace=trace)
    taps.close()
    latents, image, picture = decoded(vae, tokens, grid)
    tensors = prompt(tok, grid, text, settings)
    length = tensors["input_ids"].shape[1]
    stages = taps.stage("prefill", 0, model.config, 0)
    if full:
        # Of the prompt the outer layers are kept: it takes ten times the space of a step.
        second = taps.stage("decode1", 2, model.config, length + 1)
        tensors |= taps.stage("decode0", 1, model.config, length) | without(second, ".l0.", ".rope_")
        inner = [f".layer{i}" for i in range(1, len(model.layers) - 1)]
        tensors |= without(stages, ".l0.", *inner) | {"image": image, "decode.norm": decode_norms(trace, taps)}
    else:
        tensors["prefill.inputs_embeds"] = stages["prefill.inputs_embeds"]
    tensors |= sampled(trace, taps) | draws.tensors(settings) | common(model, settings, len(trace))
    return tensors | {"tokens": tokens, "latents": latents, "image_u8": torch.from_numpy(picture)}, picture[0]


def edit_case(model, vae, tok, seed):
    """(tensors, picture, instruction, target scene) of an edit, with the way of the source through the VAE."""
    source, text, target = scenes.draw_edit(np.random.default_rng(seed), "colour")
    before = scenes.render(source, EDIT_GRID[0] * CELL, EDIT_GRID[1] * CELL)[None]
    pixels = to_signed(before)
    # The rows with the instruction and those with the picture alone hold the same picture.
    twice = pixels.repeat(2, 1, 1, 1)
    moments, (image_latents, _) = vae.encoder(twice), vae.encode(twice)
    mean = image_latents / vae.config.scaling_factor + vae.config.shift_factor
    draws, trace, taps = RecordedDraws(seed, model.config.token_dim), [], Taps(model)
    # The pipelines draw the posterior's noise even where, as here, it is multiplied by zero.
    posterior = draws.normal(*mean.shape)
    sources = patchify(image_latents)[:1]
    tokens = sampler.generate(model, tok, [text], EDIT_GRID, EDIT, draws, sources, trace)
    taps.close()
    latents, _, picture = decoded(vae, tokens, EDIT_GRID)
    tensors = prompt(tok, EDIT_GRID, text, EDIT, sources) | sampled(trace, taps) | draws.tensors(EDIT)
    stages = taps.stage("prefill", 0, model.config, 0)
    tensors["prefill.inputs_embeds"] = stages["prefill.inputs_embeds"]
    tensors |= {"pixel_values": twice, "vae.moments": moments, "vae.mean": mean, "vae.std": torch.zeros_like(mean)}
    tensors |= {"image_latents": image_latents, "draw.vae": posterior, "input_image_u8": torch.from_numpy(before)}
    tensors |= {"tokens": tokens, "latents": latents, "image_u8": torch.from_numpy(picture)}
    return tensors | common(model, EDIT, len(trace)), picture[0], text, target


def rounding(model, tensors):
    """How far float32 puts the conditions of a teacher-forced case from where float64 puts them, given the same
    embeddings: another order of the same sums can differ by as much again, and a trained model decides how much."""
    before, steps = tensors["prefill.inputs_embeds"], tensors["decode.inputs_embeds"]
    after = steps[:-1].transpose(0, 1)
    length, total = before.shape[1], before.shape[1] + after.shape[1]
    real = torch.cat([tensors["attention_mask"].bool(), torch.ones(len(before), total - length, dtype=torch.bool)], 1)
    own, causal = torch.eye(total, dtype=torch.bool), torch.ones(total, total, dtype=torch.bool).tril()
    mask = ((causal & real[:, None]) | own)[:, None]
    exact = copy.deepcopy(model).double()
    hidden = exact(torch.cat([before, after], 1).double(), torch.arange(total), mask=mask)
    cond = exact.image_out_projector(hidden[:, length - 1 :]).transpose(0, 1)
    return {"cond": (cond - tensors["cond"]).abs().max().item()}


def common(model, settings, tokens):
    """What every teacher-forced case holds besides: the guidance of each token, and the rotation frequencies."""
    return {
        "cfg_schedule": torch.tensor([[settings.cfg, settings.cfg_img]] * tokens),
        "rope_inv_freq": rotary_frequencies(model.config.head_dim, model.config.rope_theta),
    }


class MovedDraws:
    """Draws again what was recorded, moved by `NUDGE` times a normal draw."""

    def __init__(self, recorded, seed):
        self.rest, self.rng = iter(recorded.kept), torch.Generator().manual_seed(seed)

    def __call__(self):
        draw = next(self.rest).float()
        return draw + NUDGE * torch.randn(draw.shape, generator=self.rng)


def picture_case(model, vae, tok, seed, text, grid, nudged=False, how=PICTURE):
    """(tensors, picture, amplification) of a case that is run freely; `nudged` fills in the last one."""
    draws = RecordedDraws(seed, model.config.token_dim)
    tokens = sampler.generate(model, tok, [text], grid, how, draws)
    picture = decoded(vae, tokens, grid)[2]
    kept, amplification = {}, {}
    if nudged:
        moved = sampler.generate(model, tok, [text], grid, how, MovedDraws(draws, seed + 1))
        kept, amplification = {"tokens": tokens}, {"tokens": (moved - tokens).abs().max().item()}
    frequencies = {"rope_inv_freq": rotary_frequencies(model.config.head_dim, model.config.rope_theta)}
    tensors = prompt(tok, grid, text, how) | draws.tensors(how) | frequencies | kept
    return tensors | {"image_u8": torch.from_numpy(picture)}, picture[0], amplification


def most_moved(model, tok, meta, grid, how, nudges=4):
    """How far the tokens of a case move at most under several nudges: the least of many single ones is a lucky one."""
    draws, texts = RecordedDraws(meta["seed"], model.config.token_dim), [meta["kwargs"]["captions"]]
    tokens = sampler.generate(model, tok, texts, grid, how, draws)
    moved = (MovedDraws(draws, meta["seed"] + 1 + i) for i in range(nudges))
    return max((sampler.generate(model, tok, texts, grid, how, d) - tokens).abs().max().item() for d in moved)


def description(kind, seed, text, grid, settings, has_image=False):
    """The metadata of a case, with the arguments under the names of the official call."""
    arguments = {
        "captions": f"<image>{text}" if has_image else text,
        "hw": [grid[0] * CELL, grid[1] * CELL],
        "num_sampling_steps": settings.steps,
        "timesteps_shift": settings.shift,
        "use_norm": settings.use_norm,
        "cfg": settings.cfg,
        "cfg_img": settings.cfg_img,
    }
    if GENERATION[settings.sampler] == "feb":
        arguments |= {"sde_type": settings.sampler, "noise_level": settings.noise_level}
    return {
        "kind": kind,
        "generation": GENERATION[settings.sampler],
        "model": MODEL,
        "vae": f"{MODEL}/vae",
        "dtype": "float32",
        "kwargs": arguments,
        "config_overrides": {},
        "has_image": has_image,
        "seed": seed,
        "torch": torch.__version__,
    }


def cases(model, vae, tok):
    """(name, description, tensors, picture, scene) of every case."""
    for seed, (name, (text, grid, settings)) in enumerate(PIPELINES.items(), 100):
        tensors, picture = pipeline_case(model, vae, tok, seed, text, grid, settings, full=name == "demo_aug")
        meta = description("pipeline", seed, text, grid, settings) | {"rounding": rounding(model, tensors)}
        yield name, meta, tensors, picture, scenes.parse_caption(text)
    tensors, picture, text, target = edit_case(model, vae, tok, 200)
    meta = description("pipeline", 200, text, EDIT_GRID, EDIT, True) | {"rounding": rounding(model, tensors)}
    yield "demo_edit", meta, tensors, picture, target
    for first, (name, grid, count, most, how) in enumerate(PICTURES, 3):
        plain, texts = scenes.draw_captions(most, first)
        tries = []
        for i, (scene, text) in enumerate(zip(plain, texts)):
            seed = 100 * first + i
            tensors, picture, amplification = picture_case(model, vae, tok, seed, text, grid, most > count, how)
            if name not in WITH_TOKENS:
                tensors.pop("tokens", None)
            meta = description("picture", seed, text, grid, how) | {"amplification": amplification}
            tries.append((meta, tensors, picture, scene))
        tries.sort(key=lambda case: case[0]["amplification"].get("tokens", 0))
        for i, (meta, *case) in enumerate(tries[:count]):
            if most > count:
                meta["amplification"]["tokens"] = moved = most_moved(model, tok, meta, grid, how)
                if moved > STEADY:
                    raise ValueError(f"{name}: the steadiest of {len(tries)} runs moves by {moved:.1e}")
            yield f"{name}_{i:02}", meta, *case


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory in the official layout, with its vae/")
    parser.add_argument("--out", required=True, help="folder of the cases; demo_*.safetensors there are replaced")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tok = layout.load_model(args.model), layout.load_tokenizer(args.model)
    vae = layout.load_vae(pathlib.Path(args.model) / "vae")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("demo_*.safetensors"):
        old.unlink()
    total = 0
    with torch.no_grad():
        for name, meta, tensors, picture, scene in cases(model, vae, tok):
            tensors = {key: value.contiguous() for key, value in tensors.items()}
            data = save(tensors, metadata={"case": json.dumps(meta)})
            (out / f"{name}.safetensors").write_bytes(data)
            total += len(data)
            print(f"{name:16} {len(data):7} bytes  {meta['kwargs']['captions']}: {check.wrong(check.judge(picture, scene))}")
    print(f"{total} bytes in all")
    if total > MAX_BYTES:
        sys.exit(f"record.py: more than the {MAX_BYTES} bytes that the repository keeps for these cases")


if __name__ == "__main__":
    main()
