"""Judges pictures against what they should show: background, count, colour, shape, place and size.

    python check.py DIR      # DIR/captions.tsv has one line "file<TAB>caption" per picture

prints the percentages with standard errors and lists what failed (`--strict` then exits with 1);

    python check.py DIR --compare DIR2

lists the captions whose verdict differs between two folders with the same captions, and

    python check.py --draw N --kind one --seed 1

prints N captions that training has not seen. On ground-truth renderings nearly every picture
passes (`--self-test` says how many), so that is the ceiling of every figure.
"""

import argparse
import pathlib
import sys

import numpy as np
from PIL import Image
from scipy import ndimage, optimize

import scenes

ATTRIBUTES = ("background", "count", "colour", "shape", "place", "size")
PALETTE = np.array([scenes.PALETTE[c] for c in scenes.COLOURS], np.float32)
# A pixel belongs to an object when it is this far from the background, in RGB of 0..1.
OBJECT_DISTANCE = 0.25
# Regions smaller than this part of the picture's shorter side squared are specks; the smallest true object has 0.025.
SPECK = 0.004
PLACE_TOLERANCE = 0.13
SIZE_TOLERANCE = (0.72, 1.38)
# Area of a shape of size 1, and how far its centroid lies to the right of its centre and below it.
AREA = {"circle": np.pi, "square": 4 * scenes.SQUARE_HALF**2}
CENTROID = {"circle": np.zeros(2), "square": np.zeros(2)}
for _shape, _corners in scenes.POLYGONS.items():
    _next = np.roll(_corners, -1, 0)
    _doubled = _corners[:, 0] * _next[:, 1] - _next[:, 0] * _corners[:, 1]
    AREA[_shape] = abs(_doubled.sum()) / 2
    CENTROID[_shape] = ((_corners + _next) * _doubled[:, None]).sum(0) / (3 * _doubled.sum())


def nearest_colour(pixels):
    """Index into `scenes.COLOURS` for each of pixels [..., 3]."""
    return ((pixels[..., None, :].astype(np.float32) - PALETTE) ** 2).sum(-1).argmin(-1)


def fit_shape(region):
    """(shape, thing) whose template, scaled to the region's area and put on its centroid, overlaps bool [H, W] best."""
    height, width = region.shape
    side = min(height, width)
    ys, xs = np.nonzero(region)
    x, y = (xs.mean() + 0.5) / width, (ys.mean() + 0.5) / height
    best, best_overlap = None, -1.0
    for shape in scenes.ALL_SHAPES:
        size = np.sqrt(len(xs) / AREA[shape]) / side
        right, below = CENTROID[shape] * size * side
        thing = scenes.Thing("", shape, x - right / width, y - below / height, size)
        template = scenes.coverage(thing, height, width) > 0.5
        overlap = (template & region).sum() / (template | region).sum()
        if overlap > best_overlap:
            best, best_overlap = thing, overlap
    return best


def find_things(picture):
    """(background colour, list of `Thing`) seen in a picture, uint8 [H, W, 3]."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = np.bincount(nearest_colour(border), minlength=len(PALETTE)).argmax()
    away = np.sqrt(((picture.astype(np.float32) - PALETTE[ground]) ** 2).sum(-1)) / 255
    labels, count = ndimage.label(away > OBJECT_DISTANCE)
    things = []
    for i in range(1, count + 1):
        region = ndimage.binary_fill_holes(labels == i)
        if region.sum() < SPECK * min(region.shape) ** 2:
            continue
        # The rim is a mixture of two colours: ask the inside, if there is one.
        inside = ndimage.binary_erosion(region, iterations=2)
        pixels = picture[inside if inside.any() else region]
        colour = scenes.COLOURS[np.bincount(nearest_colour(pixels), minlength=len(PALETTE)).argmax()]
        fitted = fit_shape(region)
        things.append(scenes.Thing(colour, fitted.shape, fitted.x, fitted.y, fitted.size))
    return scenes.COLOURS[ground], things


def judge(picture, scene):
    """dict attribute -> bool, and "all". Without the right count nothing about the objects counts as right."""
    ground, seen = find_things(picture)
    verdict = dict.fromkeys(ATTRIBUTES, False)
    verdict["background"] = ground == scene.background
    verdict["count"] = len(seen) == len(scene.things)
    if verdict["count"]:
        far = [[np.hypot(a.x - b.x, a.y - b.y) for b in seen] for a in scene.things]
        pairs = [(scene.things[i], seen[j]) for i, j in zip(*optimize.linear_sum_assignment(far))] if seen else []
        verdict["colour"] = all(a.colour == b.colour for a, b in pairs)
        verdict["shape"] = all(a.shape == b.shape for a, b in pairs)
        verdict["place"] = all(max(abs(a.x - b.x), abs(a.y - b.y)) < PLACE_TOLERANCE for a, b in pairs)
        verdict["size"] = all(SIZE_TOLERANCE[0] < b.size / a.size < SIZE_TOLERANCE[1] for a, b in pairs)
    verdict["all"] = all(verdict[a] for a in ATTRIBUTES)
    return verdict


def percent(flags):
    """ "81.2 ±3.1": percentage and its standard error."""
    share = np.mean(flags)
    return f"{100 * share:5.1f} ±{100 * np.sqrt(share * (1 - share) / len(flags)):3.1f}"


def table(verdicts, kinds):
    """Lines of the report: every attribute over all pictures, then "all" by kind of scene."""
    lines = ["  ".join(f"{a:>10}" for a in (*ATTRIBUTES, "all"))]
    lines.append("  ".join(f"{percent([v[a] for v in verdicts]):>10}" for a in (*ATTRIBUTES, "all")))
    for kind in dict.fromkeys(kinds):
        flags = [v["all"] for v, k in zip(verdicts, kinds) if k == kind]
        lines.append(f"{kind}: {percent(flags)} all right (n={len(flags)})")
    return lines


def picture_name(index):
    """File name of picture `index` of a folder, so that folders made by different programs can be compared."""
    return f"{index:04}.png"


def save(directory, pictures, texts):
    """Write uint8 pictures [N, H, W, 3] and captions.tsv."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = [picture_name(i) for i in range(len(texts))]
    for name, picture in zip(names, pictures):
        Image.fromarray(picture).save(directory / name, optimize=True)
    (directory / "captions.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in zip(names, texts)))


def contact_sheet(pictures, columns=8, gap=4):
    """uint8 pictures [N, H, W, 3] in one sheet."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def read_captions(directory):
    """[(file name, caption)] of DIR/captions.tsv."""
    lines = (pathlib.Path(directory) / "captions.tsv").read_text().splitlines()
    return [tuple(line.split("\t")) for line in lines if line.strip()]


def judge_directory(directory):
    """(verdicts, kinds) of DIR's pictures, in the order of captions.tsv."""
    plain = [scenes.parse_caption(text) for _, text in read_captions(directory)]
    if not plain:
        raise ValueError(f"{directory}/captions.tsv names no picture")
    opened = (Image.open(pathlib.Path(directory) / name).convert("RGB") for name, _ in read_captions(directory))
    return [judge(np.asarray(picture), scene) for picture, scene in zip(opened, plain)], [s.kind for s in plain]


def wrong(verdict):
    """The attributes that failed, in words."""
    return "wrong: " + ", ".join(a for a in ATTRIBUTES if not verdict[a]) if not verdict["all"] else "right"


def check_directory(directory):
    """Judge DIR's pictures, print the table and the failures; whether there were none."""
    verdicts, kinds = judge_directory(directory)
    rows = zip(read_captions(directory), verdicts)
    failed = [f"{name}\t{text}\t{wrong(verdict)}" for (name, text), verdict in rows if not verdict["all"]]
    print(*table(verdicts, kinds), *failed, sep="\n")
    return not failed


def sheet_of_directory(directory, path):
    """Write DIR's pictures, in the order of captions.tsv, as one."""
    opened = [Image.open(pathlib.Path(directory) / name).convert("RGB") for name, _ in read_captions(directory)]
    Image.fromarray(contact_sheet(np.stack(opened))).save(path, optimize=True)


def compare_directories(first, second):
    """List the captions whose pictures are all right in one folder and not in the other."""
    rows = read_captions(first)
    if rows != read_captions(second):
        raise ValueError(f"{first} and {second} hold different captions: draw both with one seed, kind and number")
    pairs = list(zip(rows, judge_directory(first)[0], judge_directory(second)[0]))
    differing = [
        f"{name}\t{text}\t{first}: {wrong(a)}\t{second}: {wrong(b)}"
        for (name, text), a, b in pairs
        if a["all"] != b["all"]
    ]
    gained = sum(a["all"] and not b["all"] for _, a, b in pairs)
    print(*differing, sep="\n", end="\n" if differing else "")
    print(
        f"{len(differing)} of {len(rows)} verdicts differ: {gained} right in {first} only, "
        f"{len(differing) - gained} in {second} only"
    )


def self_test(count=300, side=(128, 128), seed=5):
    """Judge ground-truth renderings, and the same renderings against the caption of the next one."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(list(scenes.MIXED), count, p=list(scenes.MIXED.values()))
    plain = [scenes.draw_scene(rng, kind, shapes=scenes.ALL_SHAPES) for kind in kinds]
    read = [scenes.parse_caption(scenes.caption(s, rng)) for s in plain]
    if read != plain:
        raise ValueError("a caption does not read back as the scene it was made from")
    pictures = [scenes.render(scenes.jitter(rng, s), *side) for s in plain]
    right = [judge(p, s)["all"] for p, s in zip(pictures, plain)]
    swapped = [judge(p, s)["all"] for p, s in zip(pictures, plain[1:] + plain[:1])]
    print(f"true pictures: {percent(right)} all right; with another scene's caption: {percent(swapped)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", help="pictures and captions.tsv")
    parser.add_argument("--self-test", action="store_true", help="judge ground-truth renderings")
    parser.add_argument("--compare", metavar="DIR2", help="list the captions whose verdict differs in DIR2")
    parser.add_argument("--sheet", metavar="FILE", help="also write the pictures side by side (PNG)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every picture is right")
    parser.add_argument("--draw", type=int, metavar="N", help="print N captions and judge nothing")
    parser.add_argument("--kind", choices=("mixed", *scenes.MIXED), default="mixed", help="kind of captions to draw")
    parser.add_argument("--seed", type=int, default=1, help="seed of the captions to draw")
    args = parser.parse_args()
    if args.self_test:
        self_test()
    elif args.draw is not None:
        print(*scenes.draw_captions(args.draw, args.seed, args.kind)[1], sep="\n")
    elif args.directory and args.compare:
        compare_directories(args.directory, args.compare)
    elif args.directory:
        if args.sheet:
            sheet_of_directory(args.directory, args.sheet)
        if not check_directory(args.directory) and args.strict:
            sys.exit(1)
    else:
        parser.error("give a directory, --draw N or --self-test")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"check.py: {error}")
