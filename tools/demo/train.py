"""Trains the transformer and the flow head on streamed scenes; stops by the clock and resumes where it was.

    python train.py --run DIR --vae MODEL_DIR/vae --tokenizer MODEL_DIR [--start MODEL_DIR] --minutes 80

Prints one line every few seconds: progress, time left, steps, losses, learning rate, pictures encoded. Every
`--save-minutes`, and when interrupted, it writes DIR/state.pt (everything) and DIR/export (the averaged weights in
the official layout, without the VAE).
"""

import argparse
import dataclasses
import pathlib
import signal
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import layout
import optim
import precision
from model import ModelConfig, NextStep

LM_WEIGHT = 0.01
# Part of the time after which drawn tokens get little noise, and a stream its last mix.
LATE = 0.82


@dataclasses.dataclass(frozen=True)
class Stream:
    """A kind of example with its share of the steps early (before `switch`) and late, and rows per step."""

    kinds: tuple
    grid: tuple
    early: float
    late: float
    rows: int
    mix: tuple = ()  # shares of the kinds, in place of MIX_EARLY and MIX_LATE
    last_mix: tuple = ()  # and those of the last part of the time, after LATE


# Shares of "one", "two" and "row" within a captioned stream, before and after `switch`: single objects first.
MIX_EARLY, MIX_LATE = (0.86, 0.09, 0.05), (0.55, 0.28, 0.17)
CAPTIONED = ("one", "two", "row")
PLANS = {
    "small": (
        Stream(CAPTIONED, (4, 4), 0.75, 0.68, 48),
        Stream(CAPTIONED, (4, 8), 0.0, 0.06, 32),
        Stream(("edit",), (4, 4), 0.25, 0.26, 32),
    ),
    # For weights that draw single objects already: two objects are what is left to learn.
    "refine": (
        Stream(CAPTIONED, (4, 4), 0.67, 0.67, 48, (0.40, 0.44, 0.16)),
        Stream(CAPTIONED, (4, 8), 0.03, 0.03, 32),
        Stream(("edit",), (4, 4), 0.30, 0.30, 32),
    ),
    # For weights that draw two objects side by side, but not one above the other; single ones again at the end.
    "above": (
        Stream((*CAPTIONED, "above"), (4, 4), 0.66, 0.66, 48, (0.38, 0.16, 0.14, 0.32), (0.52, 0.14, 0.14, 0.20)),
        Stream(CAPTIONED, (4, 8), 0.03, 0.03, 32),
        Stream(("edit",), (4, 4), 0.31, 0.31, 32),
    ),
    "square": (Stream(CAPTIONED, (8, 8), 1.0, 1.0, 32),),
    "full": (
        Stream(CAPTIONED, (8, 8), 0.85, 0.6, 32),
        Stream(CAPTIONED, (4, 8), 0.0, 0.06, 32),
        Stream(CAPTIONED, (4, 4), 0.0, 0.06, 48),
        Stream(("edit",), (8, 8), 0.15, 0.28, 18),
    ),
}


class Source:
    """The pools of a plan: grows them and draws batches from them."""

    def __init__(self, plan, switch, vae, tok, seed, capacity):
        self.streams, self.switch, self.vae, self.tok = PLANS[plan], switch, vae, tok
        self.rng = np.random.default_rng(seed)
        self.pools = {}
        for stream in self.streams:
            for kind in stream.kinds:
                room = capacity // {"one": 2, "two": 4, "above": 4, "row": 4, "edit": 2}[kind]
                self.pools[kind, stream.grid] = data.Pool(kind, stream.grid, room)

    def made(self):
        """Examples encoded so far."""
        return sum(pool.made for pool in self.pools.values())

    def shares(self, stream, progress):
        """How the rows of a batch divide among the stream's kinds."""
        if stream.kinds == ("edit",):
            return (1.0,)
        if stream.last_mix and progress > LATE:
            return stream.last_mix
        if stream.mix:
            return stream.mix
        return MIX_EARLY if progress < self.switch else MIX_LATE

    def grow(self, progress, count):
        """Encode `count` more examples for a stream that is in use, kinds in proportion to their use."""
        weights = np.array([s.early if progress < self.switch else s.late for s in self.streams])
        stream = self.streams[self.rng.choice(len(weights), p=weights / weights.sum())]
        counts = self.rng.multinomial(count, self.shares(stream, progress))
        for kind, n in zip(stream.kinds, counts):
            if n:
                self.pools[kind, stream.grid].grow(self.vae, self.rng, int(n))

    def batch(self, progress):
        """A batch of one stream, chosen by the plan; kinds that have no example yet are left out."""
        ready = [s for s in self.streams if any(len(self.pools[k, s.grid]) for k in s.kinds)]
        weights = np.array([s.early if progress < self.switch else s.late for s in ready])
        stream = ready[self.rng.choice(len(ready), p=weights / weights.sum())]
        filled = [bool(len(self.pools[kind, stream.grid])) for kind in stream.kinds]
        shares = np.array(self.shares(stream, progress)) * filled
        kinds = self.rng.choice(len(shares), stream.rows, p=shares / shares.sum())
        pools = [self.pools[stream.kinds[k], stream.grid] for k in kinds]
        picks = [(pool, int(self.rng.integers(len(pool)))) for pool in pools]
        drop_first = 0.5 if progress < self.switch else 0.1
        how = {"drop_first": drop_first, "late": progress > LATE}
        return stream, data.make_batch(picks, self.tok, stream.grid, self.rng, **how)

    def state_dict(self):
        """Pools and random state."""
        filled = {key: pool.state_dict() for key, pool in self.pools.items() if len(pool)}
        return {"pools": filled, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        """The inverse of `state_dict`; pools of another plan are ignored."""
        self.rng.bit_generator.state = state["rng"]
        for key, pool in state["pools"].items():
            if key in self.pools and "keep" in pool:
                self.pools[key].load_state_dict(pool)


def losses(model, batch, draws):
    """(flow-matching loss, language loss), both means.

    Flow: x_t = t*data + (1-t)*noise, target data - noise, logit-normal t, `draws` of (t, noise) per token."""
    x = model.embed(batch.ids, batch.given, batch.is_image)
    hidden = model(x, torch.arange(x.shape[1], device=x.device))
    logits_at = batch.next_ids != data.IGNORE
    lm = F.cross_entropy(model.lm_head(hidden[logits_at]).float(), batch.next_ids[logits_at])

    # A subset of the tokens, each weighted by how rarely it is taken: the same expectation for half the work.
    keep = torch.rand(batch.keep.shape, device=x.device) < batch.keep
    weight = 1 / batch.keep[keep]
    at = torch.gather(hidden, 1, batch.condition[..., None].expand(-1, -1, hidden.shape[-1]))[keep]
    net = model.image_head.net
    cond = net.cond_embed(model.image_out_projector(at)).repeat(draws, 1)
    clean = batch.clean[keep].repeat(draws, 1)
    t = torch.randn(len(clean), device=x.device).sigmoid()
    noise = torch.randn_like(clean)
    velocity = net.from_embedded(t[:, None] * clean + (1 - t[:, None]) * noise, t, cond)
    error = (velocity.float() - (clean - noise)).pow(2).mean(-1)
    return (error * weight.repeat(draws)).sum() / (batch.keep.numel() * draws), lm


def split_parameters(model):
    """(matrices for Muon, the rest for AdamW): Muon takes the layers' matrices and the flow blocks' MLPs."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers.") or (".res_blocks." in name and ".mlp." in name)
        (matrices if inside and p.dim() == 2 else others).append(p)
    return matrices, others


class Trainer:
    """The state of a run and its clock. `elapsed` counts training seconds over all its starts."""

    def __init__(self, args):
        self.args, self.run = args, pathlib.Path(args.run)
        self.run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.device = args.device
        self.tok = layout.load_tokenizer(args.tokenizer)
        start = layout.load_model(args.start) if args.start else NextStep(ModelConfig())
        self.model = start.to(self.device)
        vae = layout.load_vae(args.vae, self.device).eval().requires_grad_(False)
        self.source = Source(args.plan, args.switch, vae, self.tok, args.seed, args.pool)
        self.optimisers = optim.build(*split_parameters(self.model), args.muon_lr, args.adam_lr)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.steps, self.elapsed = 0, 0.0
        if (self.run / "state.pt").exists():
            self.resume()

    def resume(self):
        """Go on from DIR/state.pt."""
        state = torch.load(self.run / "state.pt", map_location="cpu", weights_only=False)
        self.model.load_state_dict(state["model"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        for opt, saved in zip(self.optimisers, state["optimisers"]):
            opt.load_state_dict(saved)
        self.source.load_state_dict(state["source"])
        torch.set_rng_state(state["torch_rng"])
        self.steps, self.elapsed = state["steps"], state["elapsed"]
        print(f"resumed at step {self.steps}, {self.elapsed / 60:.1f} minutes", flush=True)

    def save(self):
        """Write the state and the export, each by rename."""
        scratch = self.run / "state.new"
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [opt.state_dict() for opt in self.optimisers],
            "source": self.source.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "steps": self.steps,
            "elapsed": self.elapsed,
        }
        torch.save(state, scratch)
        scratch.rename(self.run / "state.pt")
        layout.export_model(self.run / "export", self.average, self.model.config, self.args.tokenizer)

    def train(self):
        """Run until the time is used up."""
        args, budget = self.args, self.args.minutes * 60
        stop = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.append(True))
        while self.source.made() < args.first_pictures:
            self.source.grow(0.0, 64)
        encoding, flow_mean, lm_mean = 0.0, {}, 0.0
        clock = printed = saved = time.monotonic()
        began = self.elapsed
        while self.elapsed < budget and not stop:
            progress = self.elapsed / budget
            rate = optim.set_rate(self.optimisers, self.steps, progress, hold=args.hold)
            stream, batch = self.source.batch(progress)
            with precision.autocast(torch.device(self.device).type):
                flow, lm = losses(self.model, batch.to(self.device), args.draws)
            (flow + LM_WEIGHT * lm).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
            for opt in self.optimisers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            optim.update_average(self.average, self.model, min(args.average, (self.steps + 1) / (self.steps + 10)))
            self.steps += 1

            name = f"{stream.kinds[0] if stream.kinds == ('edit',) else 't2i'} {stream.grid[0]}x{stream.grid[1]}"
            flow_mean[name] = 0.98 * flow_mean.get(name, flow.item()) + 0.02 * flow.item()
            lm_mean = 0.98 * (lm_mean or lm.item()) + 0.02 * lm.item()
            now = time.monotonic()
            if encoding < args.encode_share * (self.elapsed - began):
                self.source.grow(progress, 16)
                encoding += time.monotonic() - now
                now = time.monotonic()
            self.elapsed += now - clock
            clock = now
            if now - printed > args.print_seconds:
                printed = now
                flows = "  ".join(f"{k} {v:.4f}" for k, v in sorted(flow_mean.items()))
                left = (budget - self.elapsed) / 60
                print(
                    f"{100 * self.elapsed / budget:5.1f} %  {left:5.1f} min left  step {self.steps}  flow {flows}  "
                    f"lm {lm_mean:.3f}  rate {rate:.3f}  encoded {self.source.made()}",
                    flush=True,
                )
            if now - saved > args.save_minutes * 60:
                self.save()
                saved = clock = time.monotonic()
        self.save()
        print(f"stopped after {self.steps} steps, {self.elapsed / 60:.1f} minutes: {self.run / 'export'}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="directory for state and exports; resumed if it has a state")
    parser.add_argument("--vae", required=True, help="VAE directory (config.json, model.safetensors)")
    parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--start", help="model directory to start from; without it, from random weights")
    parser.add_argument("--plan", choices=sorted(PLANS), default="small", help="which streams of examples")
    parser.add_argument("--minutes", type=float, default=80, help="training time in all")
    parser.add_argument("--switch", type=float, default=0.3, help="part of the time for the early mix")
    parser.add_argument("--hold", type=float, default=0.5, help="part of the time before the rate comes down")
    parser.add_argument("--muon-lr", type=float, default=0.014)
    parser.add_argument("--adam-lr", type=float, default=1.4e-3)
    parser.add_argument("--draws", type=int, default=3, help="noise draws per image token (fm_head_batch_mul is 4)")
    parser.add_argument("--average", type=float, default=0.995, help="decay of the moving average of the weights")
    parser.add_argument("--pool", type=int, default=24000, help="encoded examples kept per grid, about")
    parser.add_argument("--first-pictures", type=int, default=1500, help="examples to encode before the first step")
    parser.add_argument("--encode-share", type=float, default=0.1, help="part of the time spent on new examples")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--print-seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Trainer(parser.parse_args()).train()


if __name__ == "__main__":
    main()
