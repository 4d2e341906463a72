"""Muon for the weight matrices, AdamW for everything else, and the moving average of the weights."""

import math

import torch

import precision

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack):
    """Newton-Schulz towards the nearest orthogonal matrix of each [rows, cols] in `stack` [n, rows, cols]."""
    a, b, c = QUINTIC
    x = stack.to(precision.product_type(stack.device.type))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; matrices of one shape are handled in one batch.

    Convolution kernels count as [out, in*kh*kw]."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((len(p), p.numel() // len(p)), []).append(p)
            for (rows, cols), params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]).reshape(rows, cols))
                scale = -group["lr"] * math.sqrt(max(1.0, rows / cols))
                for p, update in zip(params, orthogonalise(torch.stack(updates))):
                    p.add_(update.reshape(p.shape), alpha=scale)


def build(matrices, others, muon_lr, adam_lr):
    """The two optimisers; each group remembers its peak rate under "peak"."""
    optimisers = [
        Muon(matrices, muon_lr),
        torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=True),
    ]
    for opt in optimisers:
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def set_rate(optimisers, step, progress, warmup=60, hold=0.5, floor=0.01):
    """Warm-up over `warmup` steps, constant until `progress` (0..1) reaches `hold`, then cosine down to `floor`."""
    down = max(0.0, (progress - hold) / (1 - hold))
    factor = min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, down))))
    for opt in optimisers:
        for group in opt.param_groups:
            group["lr"] = group["peak"] * factor
    return factor


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay * average + (1 - decay) * weights, for a dict name -> tensor."""
    state = model.state_dict()
    torch._foreach_lerp_(list(average.values()), [state[name] for name in average], 1 - decay)
