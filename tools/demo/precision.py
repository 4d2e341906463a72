"""Which element type the matrix products of training take: bf16 where the processor has it, else float32."""

import functools
import time

import torch


def _seconds(dtype):
    a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(4):
        a @ b
    return time.perf_counter() - began


@functools.cache
def product_type(device):
    """torch.bfloat16 or torch.float32. A CPU without bf16 instructions emulates them 20 to 40 times slower than
    float32, so it is measured; float32 has to be clearly faster to be taken."""
    if device != "cpu":
        return torch.bfloat16
    return torch.float32 if 2 * _seconds(torch.float32) < _seconds(torch.bfloat16) else torch.bfloat16


def autocast(device):
    """The autocast context of `product_type`: none for float32."""
    dtype = product_type(device)
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)
