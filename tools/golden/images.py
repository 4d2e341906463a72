"""Makes the pictures and figures that tests compare image reading, cropping and metrics with.

    python tools/golden/images.py tests/golden/images

needs Pillow 11.3, numpy, safetensors and scikit-image. It was run once; run it again only to add something. 11.3 is the
Pillow of August 2025, like the code whose pictures are wanted: 13.0 takes the vertical pass of some resizes first, which
moves values by up to 5 levels.

- `crops.safetensors`: the August code's centre crop (box halving, then antialiased bicubic) of `formula` pictures, made
  with Pillow. `WxH_S` is the crop to S x S pixels. The inputs are a formula, so that only results are stored.
- `metrics.json`: PSNR and SSIM of pairs of `formula` pictures by scikit-image.
- Small files of kinds that no encoder at hand writes from Rust: CMYK and progressive JPEG, lossy and animated WebP,
  interlaced PNG, GIF. They show `quarters`: four flat colours, so that lossy decoders must agree.
"""

import io
import json
import pathlib
import struct
import sys
import zlib

import numpy as np
import PIL
from PIL import Image
from safetensors.numpy import save_file

# Width, height, side: enlarged, halved once, twice and four times, on both sides of the threshold, long, odd, equal.
CROPS = [
    (16, 16, 16), (17, 16, 16), (31, 31, 16), (32, 32, 16), (33, 35, 16), (64, 40, 16), (200, 17, 16), (9, 120, 16),
    (32, 32, 32), (63, 64, 32), (64, 64, 32), (65, 130, 32), (100, 75, 32), (129, 257, 32), (20, 13, 32), (5, 7, 32),
    (97, 96, 48), (150, 100, 48), (47, 49, 48), (131, 300, 64),
]  # fmt: skip
# Sizes for the metrics, and the share of the error pattern that is added.
METRICS = [(11, 11, 1.0), (16, 24, 0.3), (37, 29, 2.0), (64, 48, 6.0), (80, 12, 0.1)]
COLOURS = [(220, 40, 30), (30, 160, 60), (40, 60, 200), (240, 220, 50)]


def formula(width, height):
    """uint8 [height, width, 3], by integers alone."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * 11 + y * 7 + c * 50 + x * y + x * x * y // 16) % 256).astype(np.uint8)


def disturbed(picture, share):
    """`picture` plus `share` of a pattern of errors, in whole levels."""
    y, x, c = np.indices(picture.shape)
    error = (x * 5 + y * 3 + c * 2 + x * y * (c + 1)) % 23 * round(share * 10) // 10
    return np.minimum(picture + error, 255).astype(np.uint8)


def centre_crop(image, side):
    """What the August pipeline does to an input picture, with Pillow."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def quarters(side):
    """Four flat colours, [side, side, 3]."""
    half = side // 2
    out = np.zeros((side, side, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        out[i // 2 * half : (i // 2 + 1) * half, i % 2 * half : (i % 2 + 1) * half] = colour
    return out


def interlaced_png(picture):
    """Bytes of an Adam7 PNG, RGB, no filter."""
    height, width, _ = picture.shape
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = b""
    for x0, y0, dx, dy in passes:
        for row in picture[y0::dy, x0::dx]:
            raw += b"\0" + row.tobytes() if row.size else b""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def files():
    """(name, bytes) of the small files."""
    rgb = Image.fromarray(quarters(32))

    def saved(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    yield "progressive.jpg", saved(rgb, "JPEG", quality=95, subsampling=0, progressive=True)
    yield "cmyk.jpg", saved(rgb.convert("CMYK"), "JPEG", quality=95)
    yield "lossy.webp", saved(rgb, "WEBP", quality=95)
    yield "animated.webp", saved(rgb, "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 32))], lossless=True)
    yield "interlaced.png", interlaced_png(quarters(32))
    yield "still.gif", saved(rgb.convert("P"), "GIF")


def metrics():
    """Rows of width, height, share, PSNR, SSIM."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    for width, height, share in METRICS:
        a = formula(width, height)
        b = disturbed(a, share)
        options = dict(channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        psnr, ssim = peak_signal_noise_ratio(a, b, data_range=255), structural_similarity(a, b, **options)
        yield {"width": width, "height": height, "share": share, "psnr": float(psnr), "ssim": float(ssim)}


def main():
    if not PIL.__version__.startswith("11."):
        sys.exit(f"images.py: Pillow {PIL.__version__}, expected 11.3: see above")
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    crops = {f"{w}x{h}_{s}": np.asarray(centre_crop(Image.fromarray(formula(w, h)), s)) for w, h, s in CROPS}
    save_file(crops, out / "crops.safetensors")
    for name, data in files():
        (out / name).write_bytes(data)
    (out / "metrics.json").write_text(json.dumps(list(metrics()), indent=1) + "\n")
    print(*(f"{path.stat().st_size:7} {path.name}" for path in sorted(out.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
