#!/usr/bin/env python3
"""Whether two PNGs show the same picture, though the last digits of it were computed in another order.

    tools/likeness.py EXPECTED.png FOUND.png [--at-least DB]

Prints their PSNR and the largest difference of a value. Exits with 1 if the PSNR is below --at-least. Needs nothing
but Python, and reads what warpstep writes: 8-bit RGB, not interlaced.
"""

import argparse
import math
import struct
import sys
import zlib


def paeth(left, up, corner):
    near = [abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)]
    return (left, up, corner)[near.index(min(near))]


PREDICTED = [lambda left, up, corner: 0, lambda left, up, corner: left, lambda left, up, corner: up,
             lambda left, up, corner: (left + up) // 2, paeth]


def pixels(path):
    """(width, height, values)."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        sys.exit(f"{path}: not a PNG")
    at, packed, head = 8, b"", None
    while at + 8 <= len(data):
        count, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + count]
        at += 12 + count
        if kind == b"IHDR":
            head = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
    if head is None or head[2:] != (8, 2, 0, 0, 0):
        sys.exit(f"{path}: not a PNG of 8-bit RGB")
    width, height = head[:2]
    raw, stride = zlib.decompress(packed), 3 * width
    above, values = bytearray(stride), bytearray()
    for y in range(height):
        start = y * (stride + 1)
        predicted, row = PREDICTED[raw[start]], bytearray(raw[start + 1:start + 1 + stride])
        for x in range(stride):
            left, corner = (row[x - 3], above[x - 3]) if x >= 3 else (0, 0)
            row[x] = (row[x] + predicted(left, above[x], corner)) & 255
        values += row
        above = row
    return width, height, values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expected")
    parser.add_argument("found")
    parser.add_argument("--at-least", type=float, default=40.0, metavar="DB")
    args = parser.parse_args()
    a, b = pixels(args.expected), pixels(args.found)
    if a[:2] != b[:2]:
        sys.exit(f"{a[0]}x{a[1]} and {b[0]}x{b[1]} pixels")
    differences = [abs(x - y) for x, y in zip(a[2], b[2])]
    square = sum(d * d for d in differences) / len(differences)
    psnr = 10 * math.log10(255 ** 2 / square) if square else math.inf
    print(f"PSNR {psnr:.1f} dB, at least {args.at_least:.1f}; largest difference {max(differences)} of 255")
    sys.exit(psnr < args.at_least)


if __name__ == "__main__":
    main()
