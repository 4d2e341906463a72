"""Scores a model directory: draws unseen captions (or edits) with our own sampler and judges the pictures.

    python evaluate.py MODEL_DIR --captions 96 --sheet sheet.png
    python evaluate.py MODEL_DIR --held-out        # only colour-shape pairs that training never shows
    python evaluate.py MODEL_DIR --edits
    python evaluate.py MODEL_DIR --save DIR        # keep the pictures in check.py's form, to compare with others
    python evaluate.py MODEL_DIR --vae             # reconstruction of the VAE alone

Prints one table per run. Captions come from a seed that training does not use; `check.py --draw` and
`tools/quality.sh` with the same seed draw the same ones.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
from PIL import Image

import check
import layout
import sampler
import scenes

CELL = 16


def in_batches(model, tok, texts, grid, args, sources=None):
    """`sampler.generate` over batches, the seed moving on with each."""
    settings = sampler.Settings(
        args.sampler, args.steps, args.cfg, args.cfg_img, args.shift, args.noise_level, not args.no_norm
    )
    parts = []
    for i in range(0, len(texts), args.batch):
        some = None if sources is None else sources[i : i + args.batch]
        batch = texts[i : i + args.batch]
        draw = sampler.normal_draws(args.seed + i, len(batch), model.config.token_dim)
        parts.append(sampler.generate(model, tok, batch, grid, settings, draw, some))
    return torch.cat(parts)


def shapes_of(args):
    """The four shapes of every figure, or all."""
    return scenes.ALL_SHAPES if args.all_shapes else scenes.SHAPES


def evaluate_captions(model, vae, tok, grid, args):
    """(pictures, verdicts, kinds, texts) for captions."""
    plain, texts = scenes.draw_captions(args.captions, args.seed, args.kind, args.held_out, shapes_of(args))
    pictures = sampler.decode_tokens(vae, in_batches(model, tok, texts, grid, args), grid)
    return pictures, [check.judge(p, s) for p, s in zip(pictures, plain)], [s.kind for s in plain], texts


def evaluate_edits(model, vae, tok, grid, args):
    """The same for editing pairs; the kind is the instruction's verb."""
    rng = np.random.default_rng(args.seed + 1_000_003)
    pairs = [scenes.draw_edit(rng, shapes=shapes_of(args)) for _ in range(args.captions)]
    texts = [text for _, text, _ in pairs]
    before = np.stack([scenes.render(source, grid[0] * CELL, grid[1] * CELL) for source, _, _ in pairs])
    tokens = in_batches(model, tok, texts, grid, args, sampler.encode_pictures(vae, before))
    pictures = sampler.decode_tokens(vae, tokens, grid)
    verdicts = [check.judge(p, target) for p, (_, _, target) in zip(pictures, pairs)]
    return pictures, verdicts, [text.split()[0].lower() for text in texts], texts


def evaluate_vae(vae, grid, args):
    """PSNR in dB of each reconstruction, and the checker's verdicts on them."""
    rng = np.random.default_rng(args.seed + 1_000_003)
    plain, _ = scenes.draw_captions(args.captions, args.seed, shapes=shapes_of(args))
    original = np.stack([scenes.render(scenes.jitter(rng, s), grid[0] * CELL, grid[1] * CELL) for s in plain])
    pictures = sampler.decode_tokens(vae, sampler.encode_pictures(vae, original), grid)
    squared = ((pictures.astype(np.float64) - original) ** 2).mean((1, 2, 3))
    print(f"PSNR {np.mean(10 * np.log10(255**2 / np.maximum(squared, 1e-3))):.2f} dB (mean over {len(plain)} pictures)")
    return pictures, [check.judge(p, s) for p, s in zip(pictures, plain)], [s.kind for s in plain], [""] * len(plain)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory in the official layout")
    parser.add_argument("--vae-dir", help="VAE directory; default MODEL/vae")
    parser.add_argument("--captions", type=int, default=96, help="how many captions or edits")
    parser.add_argument("--size", default="64x64", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--cfg-img", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sampler", choices=sampler.SAMPLERS, default="ode")
    parser.add_argument("--shift", type=float, default=1.0, help="above 1 moves the steps towards the noise")
    parser.add_argument("--noise-level", type=float, default=0.8, help="noise of the sde and cps samplers")
    parser.add_argument("--no-norm", action="store_true", help="leave sampled tokens as they are (use_norm false)")
    parser.add_argument("--held-out", action="store_true", help="only held-out colour-shape pairs, one object")
    parser.add_argument("--all-shapes", action="store_true", help="diamonds, crosses, hearts and arrows as well")
    parser.add_argument("--kind", choices=("mixed", *scenes.MIXED), default="mixed", help="only captions of one kind")
    parser.add_argument("--edits", action="store_true", help="score editing instead of captions")
    parser.add_argument("--vae", action="store_true", help="score the VAE alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--sheet", help="write a contact sheet of the first 48 pictures here (PNG)")
    parser.add_argument("--save", metavar="DIR", help="write every picture and captions.tsv here, as check.py reads them")
    parser.add_argument("--failures", action="store_true", help="list the captions that failed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.save and (args.edits or args.vae):
        parser.error("--save keeps pictures made from captions: leave out --edits and --vae")
    width, height = map(int, args.size.split("x"))
    grid = (height // CELL, width // CELL)
    vae = layout.load_vae(args.vae_dir or pathlib.Path(args.model) / "vae", args.device)
    began = time.monotonic()
    if args.vae:
        pictures, verdicts, kinds, texts = evaluate_vae(vae, grid, args)
    else:
        model, tok = layout.load_model(args.model, args.device), layout.load_tokenizer(args.model)
        run = evaluate_edits if args.edits else evaluate_captions
        pictures, verdicts, kinds, texts = run(model, vae, tok, grid, args)
        setting = f"{args.size}  cfg {args.cfg:g}  {args.steps} {args.sampler} steps"
        print(f"{setting}  n={len(texts)}  {time.monotonic() - began:.0f} s")
    print(*check.table(verdicts, kinds), sep="\n")
    if args.failures:
        for text, verdict in zip(texts, verdicts):
            if not verdict["all"]:
                print(f"{text}: {', '.join(a for a in check.ATTRIBUTES if not verdict[a])}")
    if args.save:
        check.save(args.save, pictures, texts)
    if args.sheet:
        Image.fromarray(check.contact_sheet(pictures[:48])).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
