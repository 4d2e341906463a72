"""Trains the VAE: encoder and decoder together, then the decoder alone on frozen latents.

    python train_vae.py --run DIR --minutes 40 [--start VAE_DIR]

The encoder is frozen after `--encoder-part` of the time: from then on its latents are final, so transformer training
can begin on DIR/export while the decoder goes on improving. Loss: L1 + 2 MSE in -1..1, plus a weak pull of the
predicted variance; no adversary and no perceptual loss, flat shapes do not need them. Resumable as train.py is.
"""

import argparse
import pathlib
import signal
import time

import numpy as np
import torch

import layout
import optim
import precision
import scenes
from vae import Vae, VaeConfig, to_signed

KL_WEIGHT = 1e-4
# Noise on the normalised latent makes the decoder forgive a sampler's errors: a*eps with a ~ U(0, NOISE) per picture.
NOISE, NOISE_RAMP_STEPS = 0.5, 600
# (pixels of a side, pictures per step, share of the steps)
SIZES = ((64, 8, 0.7), (128, 3, 0.3))


def draw_pictures(rng, side, count):
    """Random scenes as float [count, 3, side, side]; colours jitter a little and half are mirrored."""
    kinds = rng.choice(["one", "two", "row"], count, p=[0.6, 0.25, 0.15])
    drawn = [scenes.draw_scene(rng, kind, shapes=scenes.ALL_SHAPES) for kind in kinds]
    pictures = [scenes.render(scenes.jitter(rng, scene), side, side) for scene in drawn]
    batch = to_signed(np.stack(pictures))
    batch = batch + torch.from_numpy(rng.normal(0, 0.04, (count, 3, 1, 1))).float()
    return (batch.flip(-1) if rng.random() < 0.5 else batch).clamp(-1, 1)


def loss_of(vae, pictures, ramp, train_encoder):
    """(loss, mean squared error) of reconstructing `pictures`."""
    with torch.set_grad_enabled(train_encoder):
        mean, logvar = vae.encode(pictures)
    latent = mean + (logvar / 2).exp() * torch.randn_like(mean)
    amount = ramp * NOISE * torch.rand(len(mean), 1, 1, 1, device=mean.device)
    rebuilt = vae.decode(latent + amount * torch.randn_like(latent)).float()
    squared = (rebuilt - pictures).pow(2).mean()
    # Only the variance half of the KL term: the mean is normalised by construction.
    spread = 0.5 * (logvar.exp() - 1 - logvar).mean()
    return (rebuilt - pictures).abs().mean() + 2 * squared + KL_WEIGHT * spread, squared


class Trainer:
    """The state of a VAE run; `elapsed` counts training seconds over all its starts."""

    def __init__(self, args):
        self.args, self.run, self.device = args, pathlib.Path(args.run), args.device
        self.run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed)
        self.vae = layout.load_vae(args.start, self.device) if args.start else Vae(VaeConfig()).to(self.device)
        kernels = [p for p in self.vae.parameters() if p.dim() == 4]
        others = [p for p in self.vae.parameters() if p.dim() != 4]
        self.optimisers = optim.build(kernels, others, args.muon_lr, args.adam_lr)
        self.steps, self.elapsed = 0, 0.0
        if (self.run / "state.pt").exists():
            state = torch.load(self.run / "state.pt", map_location="cpu", weights_only=False)
            self.vae.load_state_dict(state["vae"])
            for opt, saved in zip(self.optimisers, state["optimisers"]):
                opt.load_state_dict(saved)
            self.rng.bit_generator.state = state["rng"]
            torch.set_rng_state(state["torch_rng"])
            self.steps, self.elapsed = state["steps"], state["elapsed"]
            print(f"resumed at step {self.steps}, {self.elapsed / 60:.1f} minutes", flush=True)

    def save(self):
        """Write the state and the export, each by rename."""
        scratch = self.run / "state.new"
        state = {
            "vae": self.vae.state_dict(),
            "optimisers": [opt.state_dict() for opt in self.optimisers],
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "steps": self.steps,
            "elapsed": self.elapsed,
        }
        torch.save(state, scratch)
        scratch.rename(self.run / "state.pt")
        layout.export_vae(self.run / "export", self.vae)

    def train(self):
        """Run until the time is used up or a signal asks to stop."""
        args, budget, stop = self.args, self.args.minutes * 60, []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.append(True))
        squared_mean = {}
        clock = printed = saved = time.monotonic()
        while self.elapsed < budget and not stop:
            progress = self.elapsed / budget
            train_encoder = progress < args.encoder_part
            self.vae.encoder.requires_grad_(train_encoder)
            rate = optim.set_rate(self.optimisers, self.steps, progress, hold=0.6)
            # Small pictures alone at first: they teach the colours, at a quarter of the price.
            choices = SIZES[:1] if progress < args.encoder_part / 2 else SIZES
            shares = np.array([share for _, _, share in choices])
            side, count, _ = choices[self.rng.choice(len(choices), p=shares / shares.sum())]
            pictures = draw_pictures(self.rng, side, count).to(self.device)
            with precision.autocast(torch.device(self.device).type):
                loss, squared = loss_of(self.vae, pictures, min(1.0, self.steps / NOISE_RAMP_STEPS), train_encoder)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
            for opt in self.optimisers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            self.steps += 1
            squared_mean[side] = 0.97 * squared_mean.get(side, squared.item()) + 0.03 * squared.item()
            now = time.monotonic()
            self.elapsed, clock = self.elapsed + now - clock, now
            if now - printed > args.print_seconds:
                printed = now
                quality = "  ".join(f"{k} px {10 * np.log10(4 / v):.2f} dB" for k, v in sorted(squared_mean.items()))
                part = "encoder and decoder" if train_encoder else "decoder"
                print(
                    f"{100 * self.elapsed / budget:5.1f} %  {(budget - self.elapsed) / 60:5.1f} min left  "
                    f"step {self.steps}  {part}  {quality}  rate {rate:.3f}",
                    flush=True,
                )
            if now - saved > args.save_minutes * 60:
                self.save()
                saved = clock = time.monotonic()
        self.save()
        print(f"stopped after {self.steps} steps, {self.elapsed / 60:.1f} minutes: {self.run / 'export'}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="directory for state and export; resumed if it has a state")
    parser.add_argument("--start", help="VAE directory to start from; without it, from random weights")
    parser.add_argument("--minutes", type=float, default=40, help="training time in all")
    parser.add_argument("--encoder-part", type=float, default=0.35, help="part of the time in which the encoder learns")
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--print-seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Trainer(parser.parse_args()).train()


if __name__ == "__main__":
    main()
