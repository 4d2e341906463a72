"""Compares pictures that `warpstep` makes with what this code makes of the same prompts, sources and draws.

    python tools/demo/compare.py MODEL_DIR --edits 100 --captions 12 --out DIR --minutes 10

records edits and captions as cases of kind `picture` (draws included) in DIR/cases, lets `warpstep verify` draw them
in f32 and in bf16, sends the sources of the edits through `warpstep reconstruct`, and prints:

- f32: the share of values within one level of this code's picture, of the worst picture and of all together;
- bf16: the cases whose verdict by `check.py` (right or wrong) is not that of this code's f32 picture;
- reconstruction: PSNR of this code and of the engine, and the largest difference between them.

It exits with 1 when f32 pictures agree on less than 99.5 % of the values, more than 5 % of the verdicts differ, a
PSNR is more than 0.05 dB off, or nothing was compared. --minutes bounds the engine's time for pictures: what did not
fit is left out and counted. Recording is repeatable; cases that are there already are used again.

WARPSTEP names the binary (target/release/warpstep).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

import check
import layout
import record
import sampler
import scenes
from model import rotary_frequencies
from vae import patchify, to_bytes, to_signed

GRID = (4, 4)
EDIT = sampler.Settings("ode", 5, cfg=3.0, cfg_img=1.5)
# Cases per run of the engine, which loads the model anew.
CHUNK = 5
ALLOWED_OFF = 0.005
ALLOWED_VERDICTS = 0.05
ALLOWED_DB = 0.05


def edit_case(model, vae, tok, seed, rng):
    """(text, tensors, target) of an edit; the picture is this code's."""
    source, text, target = scenes.draw_edit(rng)
    before = scenes.render(source, GRID[0] * record.CELL, GRID[1] * record.CELL)[None]
    draws = record.RecordedDraws(seed, model.config.token_dim)
    sources = patchify(vae.encode(to_signed(before))[0])
    tokens = sampler.generate(model, tok, [text], GRID, EDIT, draws, sources)
    tensors = record.prompt(tok, GRID, text, EDIT, sources) | draws.tensors(EDIT)
    tensors |= {"rope_inv_freq": rotary_frequencies(model.config.head_dim, model.config.rope_theta)}
    tensors |= {"input_image_u8": torch.from_numpy(before)}
    return text, tensors | {"image_u8": torch.from_numpy(record.decoded(vae, tokens, GRID)[2])}, target


def record_cases(model, vae, tok, args, folder):
    """[(name, text, target scene)] of all cases, written where they are not there yet."""
    rows = []

    def write(name, meta, tensors):
        data = save({key: value.contiguous() for key, value in tensors.items()}, metadata={"case": json.dumps(meta)})
        (folder / f"{name}.safetensors").write_bytes(data)

    plain, texts = scenes.draw_captions(args.captions, args.seed)
    for i, (scene, text) in enumerate(zip(plain, texts)):
        name, seed = f"caption_{i:03}", 10_000 + i
        if not (folder / f"{name}.safetensors").exists():
            tensors = record.picture_case(model, vae, tok, seed, text, GRID)[0]
            write(name, record.description("picture", seed, text, GRID, record.PICTURE), tensors)
        rows.append((name, text, scene))
    for i in range(args.edits):
        name, seed = f"edit_{i:03}", 20_000 + i
        rng = np.random.default_rng(args.seed + 1_000_003 * (i + 1))
        if (folder / f"{name}.safetensors").exists():
            _, text, target = scenes.draw_edit(rng)
        else:
            text, tensors, target = edit_case(model, vae, tok, seed, rng)
            write(name, record.description("picture", seed, text, GRID, EDIT, True), tensors)
        rows.append((name, text, target))
    return rows


def tensor(path, name):
    """A tensor of a case."""
    with safe_open(path, "np") as file:
        return file.get_tensor(name)


def warpstep(*arguments):
    """Standard output of the engine; its failures are for the caller to see in it."""
    command = [os.environ.get("WARPSTEP", "target/release/warpstep"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise ValueError(f"{' '.join(command[:3])}: exit status {run.returncode}: {run.stderr}")
    return run.stdout


def draw(rows, args, cases):
    """Lets the engine draw as many cases as fit; dict name -> share of values more than one level off in f32."""
    began, shares = time.monotonic(), {}
    for first in range(0, len(rows), CHUNK):
        if time.monotonic() - began > 60 * args.minutes:
            break
        names = [name for name, _, _ in rows[first : first + CHUNK]]
        paths = [cases / f"{name}.safetensors" for name in names]
        for precision in ("f32", "bf16"):
            options = ("--precision", precision, "--pictures", args.out / precision, "--model-root", args.out, "--json")
            for line in map(json.loads, warpstep("verify", *options, *paths).splitlines()):
                if line.get("tensor") == "image_u8":
                    shares[line["case"]] = line["off_share"]
                elif "error" in line:
                    raise ValueError(f"{line['case']}: {line['error']}")
        minutes = (time.monotonic() - began) / 60
        print(f"{len(shares)} of {len(rows)} cases, {minutes:.1f} min", file=sys.stderr)
    return shares


def compare_pictures(kind, rows, shares, args, cases):
    """Print the figures of one kind of case; whether they are good enough."""
    rows = [row for row in rows if row[0].startswith(kind) and row[0] in shares]
    if not rows:
        print(f"{kind}s: none compared")
        return False
    off = np.array([shares[name] for name, _, _ in rows])
    differing, right = [], [0, 0]
    for name, text, target in rows:
        ours = tensor(cases / f"{name}.safetensors", "image_u8")[0]
        theirs = np.asarray(Image.open(args.out / "bf16" / f"{name}.png").convert("RGB"))
        verdicts = [check.judge(picture, target) for picture in (ours, theirs)]
        right = [count + verdict["all"] for count, verdict in zip(right, verdicts)]
        if verdicts[0]["all"] != verdicts[1]["all"]:
            differing.append(f"  {name} {text!r}: PyTorch f32 {check.wrong(verdicts[0])}, bf16 {check.wrong(verdicts[1])}")
    print(
        f"{kind}s: {len(rows)} compared. f32 within one level: {100 * (1 - off.mean()):.3f} % of the values, "
        f"{100 * (1 - off.max()):.3f} % in the worst; {(off <= ALLOWED_OFF).sum()} of {len(rows)} within 99.5 %"
    )
    print(f"  right: {right[0]} by PyTorch in f32, {right[1]} by warpstep in bf16; {len(differing)} verdicts differ")
    print(*differing, sep="\n", end="\n" if differing else "")
    return off.mean() <= ALLOWED_OFF and len(differing) <= max(1, ALLOWED_VERDICTS * len(rows))


def psnr(a, b):
    """dB, as `warpstep reconstruct` has it."""
    return 10 * np.log10(255**2 / ((a.astype(np.float64) - b) ** 2).mean())


def compare_reconstructions(vae, rows, args, cases):
    """Print PSNR of this code and of the engine on the edits' sources; whether they agree."""
    names = [name for name, _, _ in rows if name.startswith("edit")]
    if not names:
        return True
    folder = args.out / "sources"
    folder.mkdir(exist_ok=True)
    sources = [tensor(cases / f"{name}.safetensors", "input_image_u8")[0] for name in names]
    for name, source in zip(names, sources):
        Image.fromarray(source).save(folder / f"{name}.png")
    ours = np.array([psnr(s, to_bytes(vae.decode(vae.encode(to_signed(s[None]))[0]))[0]) for s in sources])
    good = True
    for precision in ("f32", "bf16"):
        options = ("--precision", precision, "--model", args.model, "--json", "-o", args.out / f"decoded-{precision}.png")
        files = [folder / f"{name}.png" for name in names]
        found = json.loads(warpstep("reconstruct", *files, *options))["pictures"]
        theirs = np.array([row["psnr_db"] for row in found])
        apart = np.abs(theirs - ours).max()
        print(
            f"reconstruct {precision}: {len(names)} pictures, mean PSNR {theirs.mean():.3f} dB, "
            f"PyTorch in f32 {ours.mean():.3f} dB, at most {apart:.4f} dB apart"
        )
        good &= precision == "bf16" or apart <= ALLOWED_DB
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="model directory in the official layout, with its vae/")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for cases and pictures")
    parser.add_argument("--edits", type=int, default=100, help="how many edits")
    parser.add_argument("--captions", type=int, default=12, help="how many captions")
    parser.add_argument("--seed", type=int, default=1, help="seed of captions and edits")
    parser.add_argument("--minutes", type=float, default=10, help="time for the engine's pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Whoever keeps the output in a file sees it as it comes.
    sys.stdout.reconfigure(line_buffering=True)
    cases = args.out / "cases"
    cases.mkdir(parents=True, exist_ok=True)
    link = args.out / record.MODEL
    if not link.exists():
        link.symlink_to(args.model.resolve())
    model, tok = layout.load_model(args.model), layout.load_tokenizer(args.model)
    vae = layout.load_vae(args.model / "vae")
    with torch.no_grad():
        rows = record_cases(model, vae, tok, args, cases)
        print(f"{len(rows)} cases recorded", file=sys.stderr)
        good = compare_reconstructions(vae, rows, args, cases)
    shares = draw(rows, args, cases)
    for kind, count in (("caption", args.captions), ("edit", args.edits)):
        if count:
            good &= compare_pictures(kind, rows, shares, args, cases)
    if len(shares) < len(rows):
        print(f"{len(rows) - len(shares)} cases did not fit into {args.minutes:g} minutes")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: {error}")
