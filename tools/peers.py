#!/usr/bin/env python3
"""PyTorch on the same GPU, in one run, next to `warpstep bench`: what a user of torch gets, and what its library can do.

    warpstep bench --format json -o ours.json && python3 tools/peers.py --ours ours.json --output peers.json

All models here are our own, with random weights of the true shapes (Qwen2-like layers, the flow-matching head with its
stochastic sampler, the VAE's decoder): speed depends on shapes, not on values. No file of the official code is needed.

  eager        layers with a growing cache, the sampler's loop as a user writes it
  graph        static cache, torch.compile, explicit CUDA graph capture, the head's modulations batched over all steps
  library roof only the products of all layers, in one graph: what cuBLAS reaches with nothing else to do

--ours takes its settings (steps, branches, prompt, position) from that file, so that all rows are about the same work.
Nobody's LM head is counted: image tokens need none. --output is rewritten after every measurement. --toy runs
everything at toy sizes, on a CPU if need be: that tests this script and says nothing about speed.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
import traceback

import torch
import torch.nn.functional as F
from torch import nn

REAL = dict(hidden=5120, layers=48, heads=40, kv=8, dim=128, mlp=13824, width=1536, blocks=12, token=64,
            vae=(128, (1, 2, 4, 4), 2), sizes=(256, 512), unit=16, stream=4 << 30, gemm=8192)
TOY = dict(hidden=64, layers=2, heads=4, kv=2, dim=16, mlp=160, width=64, blocks=2, token=64,
           vae=(32, (1, 1, 1, 1), 1), sizes=(32, 64), unit=16, stream=1 << 20, gemm=64)


# A span between two events on a GPU: so many runs at least, and so many milliseconds if few runs are shorter.
FEWEST_RUNS, SPAN_MS, MOST_RUNS = 4, 5.0, 64


class Clock:
    """Repeated runs: events on a GPU, the host's clock elsewhere."""

    def __init__(self, cuda, warm_up, repeats, seconds):
        self.cuda, self.warm_up, self.repeats, self.seconds = cuda, warm_up, repeats, seconds

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def span(self, work, runs):
        """Milliseconds of one of so many runs that were enqueued one after the other: the first alone finds an idle
        stream, which waits for the host, as no token but a picture's first does."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / runs

    def measure(self, work):
        """Milliseconds of a run, once for every span that was timed."""
        begin = time.perf_counter()
        for _ in range(self.warm_up):
            work()
            self.wait()
            if time.perf_counter() - begin > self.seconds:
                break
        runs = 1
        if self.cuda:
            runs = max(FEWEST_RUNS, min(MOST_RUNS, math.ceil(SPAN_MS / max(self.span(work, 1), 1e-3))))
        samples = []
        begin = time.perf_counter()
        while len(samples) < self.repeats and (len(samples) < 3 or time.perf_counter() - begin < self.seconds):
            if self.cuda:
                samples.append(self.span(work, runs))
            else:
                start = time.perf_counter()
                work()
                samples.append((time.perf_counter() - start) * 1e3)
        return samples

    def capture(self, work):
        """`work` as one CUDA graph; the function itself where there is no GPU."""
        if not self.cuda:
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def rms_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        q, kv = s["heads"] * s["dim"], s["kv"] * s["dim"]
        self.s = s
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(s["hidden"])) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(s["hidden"], n) for n in (q, kv, kv))
        self.o = nn.Linear(q, s["hidden"], bias=False)
        self.gate, self.up = (nn.Linear(s["hidden"], s["mlp"], bias=False) for _ in range(2))
        self.down = nn.Linear(s["mlp"], s["hidden"], bias=False)

    def project(self, x, cos, sin):
        rows, count = x.shape[:2]
        h = rms_norm(x, self.norm1)
        q, k, v = (f(h).view(rows, count, -1, self.s["dim"]).transpose(1, 2) for f in (self.q, self.k, self.v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x, q, k, v, mask=None, causal=False):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(*x.shape[:2], -1))
        h = rms_norm(x, self.norm2)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def decode(self, x, cos, sin, keys, values, position, mask):
        """One token into a cache of fixed size."""
        q, k, v = self.project(x, cos, sin)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return self.finish(x, q, keys, values, mask=mask)


class Backbone(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.layers = nn.ModuleList(Layer(s) for _ in range(s["layers"]))
        self.norm = nn.Parameter(torch.ones(s["hidden"]))
        self.image_out = nn.Linear(s["hidden"], s["hidden"])
        self.image_in = nn.Linear(s["token"], s["hidden"])

    def angles(self, positions):
        inverse = 1e6 ** (-torch.arange(0, self.s["dim"], 2, device=positions.device).float() / self.s["dim"])
        angle = torch.cat([positions.float()[:, None] * inverse] * 2, -1)
        return angle.cos().to(self.norm.dtype), angle.sin().to(self.norm.dtype)

    def prefill(self, x):
        cos, sin = self.angles(torch.arange(x.shape[1], device=x.device))
        cache = []
        for layer in self.layers:
            q, k, v = layer.project(x, cos, sin)
            cache.append((k, v))
            x = layer.finish(x, q, k, v, causal=True)
        return x, cache

    def step_growing(self, x, cache, position):
        """A token whose keys are appended, as a cache that grows does it; returns the new cache."""
        cos, sin = self.angles(torch.tensor([position], device=x.device))
        grown = []
        for layer, (keys, values) in zip(self.layers, cache):
            q, k, v = layer.project(x, cos, sin)
            keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            grown.append((keys, values))
            x = layer.finish(x, q, keys, values)
        return self.image_out(rms_norm(x, self.norm)), grown

    def step_static(self, x, keys, values, position, mask, decode=Layer.decode):
        """The same into caches of fixed size: `position` is a tensor, so that one graph does for all tokens."""
        cos, sin = self.angles(position)
        for i, layer in enumerate(self.layers):
            x = decode(layer, x, cos, sin, keys[i], values[i], position, mask)
        return self.image_out(rms_norm(x, self.norm))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x, shift, scale, gate):
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class FlowHead(nn.Module):
    def __init__(self, s):
        super().__init__()
        width = s["width"]
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.cond = nn.Linear(s["hidden"], width)
        self.input = nn.Linear(s["token"], width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(s["blocks"]))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, s["token"])

    def embed_time(self, t):
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        angle = t[:, None] * frequency
        return self.time(torch.cat((angle.cos(), angle.sin()), -1).to(self.cond.weight.dtype))

    def modulations(self, y):
        y = F.silu(y)
        return [b.modulation(y).chunk(3, -1) for b in self.blocks] + [self.last_modulation(y).chunk(2, -1)]

    def velocity(self, x, modulations):
        x = self.input(x)
        for block, (shift, scale, gate) in zip(self.blocks, modulations):
            x = block(x, shift, scale, gate)
        shift, scale = modulations[-1]
        return self.output(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    def sample(self, c, steps, guidance=7.5):
        """The stochastic sampler as a user writes it: everything again at every step."""
        branches, device, dtype = c.shape[0], c.device, c.dtype
        x = torch.randn(1, self.output.out_features, device=device)
        times = torch.linspace(0, 0.96, steps)
        for i in range(steps):
            t = torch.full((branches,), times[i].item(), device=device)
            v = self.velocity(x.repeat(branches, 1).to(dtype), self.modulations(self.embed_time(t) + self.cond(c)))
            x = self.update(x, v.float(), times, i, guidance)
        return x

    def sample_batched(self, c, times_embedded, solver, noise, tables, evaluate, guidance=7.5):
        """The same numbers with all modulations in one product per layer: they do not depend on x. `tables` and
        `evaluate` are the methods of these names, or what a compiler makes of them."""
        branches = c.shape[0]
        tables = tables(self, c, times_embedded)
        x = noise
        for i, step in enumerate(solver):
            rows = slice(i * branches, (i + 1) * branches)
            x = evaluate(self, x, [tuple(m[rows] for m in ms) for ms in tables], step, guidance)
        return x

    def tables(self, c, times_embedded):
        return self.modulations((times_embedded[:, None] + self.cond(c)[None]).flatten(0, 1))

    def evaluate(self, x, modulations, step, guidance):
        """One evaluation and step of the solver, whose coefficients are a tensor: the same code for all steps."""
        branches = modulations[0][0].shape[0]
        v = self.velocity(x.repeat(branches, 1).to(modulations[0][0].dtype), modulations).float()
        return step[0] * x + step[1] * self.guide(v, guidance) + step[2] * torch.randn_like(x)

    @staticmethod
    def guide(v, guidance):
        return v[:1] if v.shape[0] == 1 else v[1:2] + guidance * (v[:1] - v[1:2])

    @staticmethod
    def solver(times):
        """What the state, the velocity and the noise of every step are multiplied with; a fourth column, so that every
        row lies on 16 bytes: compiled code copies an input that does not before it uses it."""
        steps = [(1 - dt, dt * (1 + t), math.sqrt(2 * (1 - t) * dt), 0)
                 for t, dt in zip(times.tolist(), times.diff().tolist())]
        return torch.tensor(steps + [(1, 0.04, 0, 0)])

    @classmethod
    def update(cls, x, v, times, i, guidance):
        v = cls.guide(v, guidance)
        if i + 1 == len(times):
            return x + 0.04 * v
        t, dt = float(times[i]), float(times[i + 1] - times[i])
        return (1 - dt) * x + dt * (1 + t) * v + math.sqrt(2 * (1 - t) * dt) * torch.randn_like(x)


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs), nn.GroupNorm(32, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.short(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.out(out)


class Decoder(nn.Module):
    def __init__(self, ch, mult, blocks):
        super().__init__()
        widths = [ch * m for m in mult]
        top = widths[-1]
        parts = [nn.Conv2d(16, top, 3, padding=1), Residual(top, top), Attention(top), Residual(top, top)]
        width = top
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                parts.append(Residual(width, widths[level]))
                width = widths[level]
            if level:
                parts += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
        parts += [nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)]
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


def build(make, device, dtype):
    """A module with random weights made where they are used: the 14B never passes through the host."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() > 1:
                gain = 0.25 if re.search(r"\.(o|down|mlp\.2|conv2|out)\.weight$", name) else 1.0
                p.normal_(0, gain / math.sqrt(p[0].numel()))
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1)
    return module.eval()


def ceilings(clock, s, device, dtype):
    """Copy and read-only stream in bytes per second, product in operations per second."""
    count = s["stream"] // 4
    src = torch.randint(-1000, 1000, (count,), dtype=torch.int32, device=device)
    dst = torch.empty_like(src)
    copy = 8 * count / statistics.median(clock.measure(lambda: dst.copy_(src))) * 1e3
    read = 4 * count / statistics.median(clock.measure(lambda: src.sum(dtype=torch.int32))) * 1e3
    del src, dst
    a, b = (torch.randn(s["gemm"], s["gemm"], device=device, dtype=dtype) for _ in range(2))
    gemm = 2 * s["gemm"] ** 3 / statistics.median(clock.measure(lambda: a @ b)) * 1e3
    return {"copy_gb_per_s": copy / 1e9, "read_gb_per_s": read / 1e9, "product_tflop_per_s": gemm / 1e12}


def layer_bytes(s, size):
    q, kv = s["heads"] * s["dim"], s["kv"] * s["dim"]
    return size * s["layers"] * (s["hidden"] * (q + 2 * kv) + q * s["hidden"] + 3 * s["hidden"] * s["mlp"])


def cache_bytes(s, size, branches, position):
    return size * s["layers"] * 2 * s["kv"] * s["dim"] * branches * position


class Bench:
    def __init__(self, args, s):
        self.a, self.s = args, s
        self.cuda = torch.cuda.is_available() and not args.cpu
        self.device = "cuda" if self.cuda else "cpu"
        self.dtype, self.size = (torch.bfloat16, 2) if args.fmt == "bf16" else (torch.float32, 4)
        self.clock = Clock(self.cuda, 20 if self.cuda else 1, args.repeats, args.seconds_per_row)
        self.samples, self.rows, self.ours, self.top = {}, [], [], None
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU: these times say nothing about a GPU"
        self.deadline = time.monotonic() + args.seconds

    def time(self, name, work):
        if time.monotonic() > self.deadline:
            print(f"{name}: no time left", file=sys.stderr)
            return None
        self.samples[name] = self.clock.measure(work)
        self.save()
        median = statistics.median(self.samples[name])
        print(f"{name}: {median:.3f} ms ({len(self.samples[name])} runs)", file=sys.stderr, flush=True)
        return median

    def launches(self, work):
        """Kernels that one call launches, by the profiler; None without a GPU."""
        if not self.cuda:
            return None
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            work()
            torch.cuda.synchronize()
        return sum(e.count for e in found.key_averages() if e.key in ("cudaLaunchKernel", "cudaLaunchKernelExC",
                                                                       "cuLaunchKernel", "cuLaunchKernelEx"))

    def save(self):
        """All of it so far, and whole at any moment: whoever stops this program keeps what it has measured."""
        if not self.a.output:
            return
        settings = {name: getattr(self.a, name) for name in ("branches", "steps", "prompt", "position")}
        with open(self.a.output + ".new", "w") as file:
            json.dump(dict(schema="warpstep-peers-1", torch=torch.__version__, device=self.name, toy=self.a.toy,
                           settings=settings, ceilings=self.top, rows=self.rows + self.ours,
                           samples_ms=self.samples), file, indent=1)
        os.replace(self.a.output + ".new", self.a.output)

    def row(self, name, prefill=None, backbone=None, moved=None, flow=None, vae=None, launches=None):
        """`vae`: milliseconds by size. A picture is computed from its parts, for a token in its middle: fewer slots of
        the cache than at the position that was timed, or more, at the bandwidth of the copy."""
        vae = vae or {}
        image = {}
        for size in self.s["sizes"]:
            parts = (prefill, backbone, flow, vae.get(size))
            if None not in parts:
                tokens = (size // self.s["unit"]) ** 2
                slots = self.a.prompt + tokens // 2 - self.a.position
                more = cache_bytes(self.s, self.size, self.a.branches, slots) / self.top["copy_gb_per_s"] / 1e6
                image[size] = (prefill + tokens * (backbone + more + flow) + vae[size]) / 1e3
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None
        ratio = moved / 1e6 / backbone / self.top["copy_gb_per_s"] if backbone and moved else None
        self.rows.append(dict(name=name, fmt=self.a.fmt, branches=self.a.branches, steps=self.a.steps,
                              prefill_ms=prefill, backbone_ms=backbone, ratio_to_copy=ratio, flow_ms=flow,
                              vae_ms={str(k): v for k, v in vae.items()},
                              image_s={str(k): v for k, v in image.items()}, peak_gb=peak, launches=launches))
        self.save()

    # Not inference_mode: torch 2.11 cannot compile products of batches in it (pytorch/pytorch#181512).
    @torch.no_grad()
    def run(self):
        a, s, device, dtype = self.a, self.s, self.device, self.dtype
        size, branches, position = self.size, a.branches, a.position
        # The fastest of its convolutions for each shape, found while warming up.
        torch.backends.cudnn.benchmark = True
        self.top = ceilings(self.clock, s, device, dtype)
        self.save()
        print("ceilings:", {k: round(v, 2) for k, v in self.top.items()}, file=sys.stderr)
        moved = layer_bytes(s, size)
        with_cache = moved + cache_bytes(s, size, branches, position)

        backbone = build(lambda: Backbone(s), device, dtype)
        flow = build(lambda: FlowHead(s), device, dtype)
        x = torch.randn(branches, 1, s["hidden"], device=device, dtype=dtype)
        c = torch.randn(branches, s["hidden"], device=device, dtype=dtype)
        rows = torch.randn(branches, a.prompt, s["hidden"], device=device, dtype=dtype)

        # The library's products first: nothing can be faster with them.
        layers = [[(w.weight.t(), torch.randn(branches, w.in_features, device=device, dtype=dtype))
                   for w in (m.q, m.k, m.v, m.o, m.gate, m.up, m.down)] for m in backbone.layers]
        products = [(inputs, w) for layer in layers for w, inputs in layer]
        roof = self.clock.capture(lambda: [torch.mm(inputs, w) for inputs, w in products])
        self.row("library roof: products only", backbone=self.time("roof", roof), moved=moved)

        prefill = self.time("eager prefill", lambda: backbone.prefill(rows))
        shape = (branches, s["kv"], position - 1, s["dim"])
        cache = [tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(s["layers"])]
        token = lambda: backbone.step_growing(x, cache, position - 1)
        sample = lambda: flow.sample(c, a.steps)
        eager = self.time("eager backbone", token), self.time("eager flow head", sample)
        launches = self.launches(lambda: (token(), sample()))
        del cache

        vae, vae_last = {}, {}
        decoder = build(lambda: Decoder(*s["vae"]), device, dtype)
        for pixels in s["sizes"]:
            z = torch.randn(1, 16, pixels // 8, pixels // 8, device=device, dtype=dtype)
            vae[pixels] = self.time(f"VAE {pixels} stock", lambda: decoder(z))
        decoder = decoder.to(memory_format=torch.channels_last)
        for pixels in s["sizes"]:
            z = torch.randn(1, 16, pixels // 8, pixels // 8, device=device, dtype=dtype)
            z = z.contiguous(memory_format=torch.channels_last)
            vae_last[pixels] = self.time(f"VAE {pixels} channels last", lambda: decoder(z))
        self.row("torch eager, stock VAE", prefill, eager[0], with_cache, eager[1], vae, launches)

        # Static shapes, compiled, captured. The whole cache is masked: as long as what is timed, rounded up.
        length = -(-position // 64) * 64
        shape = (branches, s["kv"], length, s["dim"])
        keys, values = ([torch.randn(shape, device=device, dtype=dtype) for _ in range(s["layers"])] for _ in range(2))
        at = torch.tensor([position - 1], device=device)
        mask = torch.zeros(1, 1, 1, length, device=device, dtype=dtype)
        mask[..., position:] = float("-inf")
        times = torch.linspace(0, 0.96, a.steps)
        embedded, solver = flow.embed_time(times.to(device)), flow.solver(times).to(device)
        noise = torch.randn(1, s["token"], device=device)
        parts = Layer.decode, FlowHead.tables, FlowHead.evaluate
        if not a.no_compile:
            # One layer and one evaluation, each compiled once: all 48 and 28 of them unrolled take many minutes.
            # Without a GPU only the tracing is tried: inductor's C++ would say nothing about one.
            options = dict() if self.cuda else dict(backend="eager")
            parts = [torch.compile(part, fullgraph=True, dynamic=False, **options) for part in parts]
        decode, tables, evaluate = parts
        token = lambda: backbone.step_static(x, keys, values, at, mask, decode)
        sample = lambda: flow.sample_batched(c, embedded, solver, noise, tables, evaluate)
        for work in (token, sample):
            work()
        graphed = (self.time("graph backbone", self.clock.capture(token)),
                   self.time("graph flow head", self.clock.capture(sample)))
        name = "torch graph, static cache" + ("" if a.no_compile else ", compiled") + ", channels-last VAE"
        self.row(name, prefill, graphed[0], with_cache, graphed[1], vae_last)


def ours(path, position, sizes):
    """A row of the table from `warpstep bench --format json`, which may lack what was not measured."""
    with open(path) as file:
        report = json.load(file)
    rows = {row["test"]: row for row in report["rows"] if row["median_ms"] is not None}
    median = lambda test: rows[test]["median_ms"] if test in rows else None
    first = lambda text: next((row["median_ms"] for test, row in rows.items() if test.startswith(text)), None)
    decoder, projector = (rows.get(f"token @{position}: {part}") for part in ("LLM decoder", "projector"))
    backbone = decoder["median_ms"] + projector["median_ms"] if decoder and projector else None
    vae = {str(s): median(f"VAE decode {s}x{s}") for s in sizes}
    image = {str(s): median(f"image {s}x{s}") for s in sizes}
    return dict(name=f"warpstep {report['header']['version']} ({report['header']['device']})",
                fmt=decoder["dtype"] if decoder else "", prefill_ms=first("prefill"), backbone_ms=backbone,
                ratio_to_copy=decoder and decoder["of_copy"], flow_ms=median(f"token @{position}: FM head"),
                vae_ms={k: v for k, v in vae.items() if v},
                image_s={k: v / 1e3 for k, v in image.items() if v}, peak_gb=None, launches=None)


def settings_of(path):
    """Steps, branches, prompt and position that a report of ours is about; nothing of one that ended before its first
    token: its other rows are worth comparing all the same."""
    with open(path) as file:
        report = json.load(file)
    positions = [int(m[1]) for row in report["rows"] if (m := re.match(r"token @(\d+): ", row["test"]))]
    shape = next((row["shape"] for row in report["rows"] if row["test"].startswith("token @")), "")
    found = re.search(r"(\d+) images x (\d+) branches, (\d+) evaluations, prompt (\d+)", shape)
    if not found:
        print(f"{path}: no token rows, so that its settings are unknown", file=sys.stderr)
        return {}
    images, branches, steps, prompt = map(int, found.groups())
    if images != 1:
        sys.exit(f"{path}: is about {images} pictures at a time, the peers about one")
    position = next((p for p in (512, 1024) if p in positions), positions[0])
    return dict(branches=branches, steps=steps, prompt=prompt, position=position)


def table(rows, sizes, position):
    show = lambda v, digits=2: "" if v is None else f"{v:.{digits}f}"
    head = ["name", "fmt", "branches", "N", "prefill ms", f"backbone ms/token @{position}", "ratio to copy",
            "FM ms/token", f"VAE ms {sizes[-1]}²"] + [f"s/image {s}²" for s in sizes] + ["peak GB", "launches/token"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["name"], r["fmt"], str(r["branches"]), str(r["steps"]), show(r["prefill_ms"]),
                 show(r["backbone_ms"], 3), show(r["ratio_to_copy"], 3), show(r["flow_ms"], 3),
                 show(r["vae_ms"].get(str(sizes[-1])))]
        cells += [show(r["image_s"].get(str(s))) for s in sizes]
        cells += [show(r["peak_gb"], 1), "" if r["launches"] is None else str(r["launches"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", metavar="FILE", help="a JSON report of warpstep bench: its settings and its row")
    parser.add_argument("--output", metavar="FILE", help="write everything, every sample included, as JSON")
    parser.add_argument("--fmt", choices=("bf16", "f32"), help="default bf16; f32 without a GPU, where bf16 crawls")
    parser.add_argument("--branches", type=int, choices=(1, 2))
    parser.add_argument("--steps", type=int, help="network evaluations per token (default 28)")
    parser.add_argument("--prompt", type=int, help="tokens of every prompt (default 96)")
    parser.add_argument("--position", type=int, help="filled cache slots at which a token is timed (default 512)")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seconds-per-row", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=480.0, help="start no more rows after so long")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to try the script itself")
    args = parser.parse_args()
    standard = dict(branches=2, steps=28, prompt=96, position=512)
    if args.toy:
        standard = dict(branches=2, steps=3, prompt=8, position=32)
        args.repeats, args.seconds_per_row = min(args.repeats, 3), min(args.seconds_per_row, 0.2)
    theirs = settings_of(args.ours) if args.ours else {}
    for name, value in (standard | theirs).items():
        given = getattr(args, name)
        if name in theirs and given is not None and given != value:
            sys.exit(f"--{name} {given}: {args.ours} is about {value}")
        setattr(args, name, value if given is None else given)
    if args.branches not in (1, 2):
        sys.exit(f"{args.branches} branches: the peers do 1 or 2")
    if not (torch.cuda.is_available() or args.toy):
        sys.exit("no GPU that torch can use; --toy tries the script without one")
    args.fmt = args.fmt or ("bf16" if torch.cuda.is_available() and not args.cpu else "f32")
    torch.manual_seed(1)
    s = TOY if args.toy else REAL
    bench, failed = Bench(args, s), False
    if args.ours:
        row = ours(args.ours, args.position, s["sizes"])
        bench.ours = [dict(row, branches=args.branches, steps=args.steps)]
    try:
        bench.run()
    except Exception:
        if not bench.rows:
            raise
        # What was measured before is worth keeping.
        traceback.print_exc()
        failed = True
    bench.save()
    top = bench.top
    print(f"torch {torch.__version__} on {bench.name}; copy {top['copy_gb_per_s']:.1f} GB/s, read "
          f"{top['read_gb_per_s']:.1f} GB/s, product {top['product_tflop_per_s']:.2f} TFLOP/s; random weights; peers' "
          "pictures are computed from their parts, warpstep's are measured\n")
    print(table(bench.rows + bench.ours, s["sizes"], args.position))
    if failed:
        sys.exit("not all rows were measured")


if __name__ == "__main__":
    main()
