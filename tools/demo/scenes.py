"""The pictures and their captions: grammar, palette, edit instructions and the renderer.

A scene is plain data, so the checker and the trainer know exactly what a picture should show. Lengths are fractions
of the picture's shorter side unless said otherwise; places are fractions of width and height. Every function that
draws random numbers takes a `numpy.random.Generator`, so a seed fixes everything.
"""

import dataclasses
import re

import numpy as np
from scipy import ndimage

PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 40),
    "orange": (245, 130, 30),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
# Every figure is about the first four unless it says otherwise. The others are there to be drawn too, but mostly
# because the more shapes a colour has been seen in, the less is gained by learning which pairs there are.
SHAPES = ("circle", "square", "triangle", "star")
ALL_SHAPES = (*SHAPES, "diamond", "cross", "heart", "arrow")

# Pairs that never occur in training, so that composing colour and shape can be measured.
HELD_OUT = frozenset({("purple", "star"), ("orange", "triangle")})

SIZES = {"small": 0.18, "": 0.25, "large": 0.35}
CORNER_SIZES = {"small": 0.15, "": 0.215, "large": 0.25}
CORNERS = {
    "top left": (0.28, 0.28),
    "top right": (0.72, 0.28),
    "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72),
}
PAIR_SIZE = 0.19
ROW_SIZES = {2: 0.19, 3: 0.13}
ROW_PLACES = {2: (0.27, 0.73), 3: (0.19, 0.5, 0.81)}
NUMBERS = {2: "two", 3: "three"}

# A circle of size r reaches r from its centre; the others are scaled to look equally large.
SQUARE_HALF = 0.9
TRIANGLE = np.array([(0.0, -0.95), (0.9, 0.95), (-0.9, 0.95)])
STAR_OUTER, STAR_INNER = 1.08, 0.52
_spoke = np.arange(10) * np.pi / 5
STAR = np.stack([np.sin(_spoke), -np.cos(_spoke)], 1) * np.where(np.arange(10) % 2, STAR_INNER, STAR_OUTER)[:, None]
DIAMOND = np.array([(0.0, -1.08), (0.82, 0.0), (0.0, 1.08), (-0.82, 0.0)])
_ARM = np.array([(-0.36, -1.0), (0.36, -1.0), (0.36, -0.36)])
CROSS = np.concatenate([_ARM @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])
_turn = np.arange(28) * np.pi / 14
_below = 5 * np.cos(2 * _turn) + 2 * np.cos(3 * _turn) + np.cos(4 * _turn) - 13 * np.cos(_turn) - 2.5
HEART = np.stack([16 * np.sin(_turn) ** 3, _below], 1) / 15.5
_HEAD = [(0.1, -0.9), (1.05, 0.0), (0.1, 0.9), (0.1, 0.4)]
ARROW = np.array([(-1.05, -0.4), (0.1, -0.4), *_HEAD, (-1.05, 0.4)])
POLYGONS = {
    "triangle": TRIANGLE,
    "star": STAR,
    "diamond": DIAMOND,
    "cross": CROSS,
    "heart": HEART,
    "arrow": ARROW,
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: what it is, where its centre is, and how large it is."""

    colour: str
    shape: str
    x: float
    y: float
    size: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and its objects. `words` keeps what the caption says beyond colour and shape: (size, corner)
    for one object, the relation for two, "row" for a row, "" for an empty scene."""

    background: str
    things: tuple
    kind: str
    words: tuple = ()


def draw_pair(rng, background, held_out, shapes=SHAPES):
    """A (colour, shape) that shows on `background`: only held-out pairs, or none of them."""
    while True:
        pair = (COLOURS[rng.integers(8)], shapes[rng.integers(len(shapes))])
        if pair[0] != background and (pair in HELD_OUT) == held_out:
            return pair


def one_thing(background, colour, shape, size, corner):
    """The single-object scene without jitter; `size` and `corner` are words of the caption, "" when not said."""
    x, y = CORNERS.get(corner, (0.5, 0.5))
    thing = Thing(colour, shape, x, y, (CORNER_SIZES if corner else SIZES)[size])
    return Scene(background, (thing,), "one", (size, corner))


def pair_scene(background, first, second, relation):
    """Two (colour, shape) objects, the first "to the left of" or "above" the second."""
    places = ((0.27, 0.5), (0.73, 0.5)) if relation == "to the left of" else ((0.5, 0.27), (0.5, 0.73))
    things = tuple(Thing(*pair, *place, PAIR_SIZE) for pair, place in zip((first, second), places))
    return Scene(background, things, "two", (relation,))


def row_scene(background, colour, shape, count):
    """`count` (2 or 3) equal objects side by side."""
    things = tuple(Thing(colour, shape, x, 0.5, ROW_SIZES[count]) for x in ROW_PLACES[count])
    return Scene(background, things, "row", (count,))


def draw_scene(rng, kind, held_out=False, shapes=SHAPES):
    """A random scene of `kind` "one", "two", "above" (two with one relation) or "row", without jitter. `held_out` uses
    only the held-out pairs."""
    background = COLOURS[rng.integers(8)]
    if held_out:
        background = ("red", "green", "blue", "yellow", "white", "black")[rng.integers(6)]
    first = draw_pair(rng, background, held_out, shapes)
    if kind == "one":
        size = ("", "", "small", "large")[rng.integers(4)]
        corner = (tuple(CORNERS)[rng.integers(4)]) if rng.random() < 0.45 else ""
        return one_thing(background, *first, size, corner)
    if kind in ("two", "above"):
        second = first
        while second == first:
            second = draw_pair(rng, background, held_out, shapes)
        relation = "above" if kind == "above" else ("to the left of", "above")[rng.integers(2)]
        return pair_scene(background, first, second, relation)
    if kind == "row":
        return row_scene(background, *first, int(rng.integers(2, 4)))
    raise ValueError(f"unknown kind of scene {kind!r}: expected one, two, above or row")


def jitter(rng, scene):
    """Shift every object a little and scale it by up to 6 %, so that no picture is drawn twice. Objects with
    neighbours shift less, so that they never touch."""
    moved = []
    far = 0.025 if len(scene.things) == 1 else 0.012
    for thing in scene.things:
        dx, dy, grow = rng.uniform(-far, far), rng.uniform(-far, far), rng.uniform(0.94, 1.06)
        moved.append(dataclasses.replace(thing, x=thing.x + dx, y=thing.y + dy, size=thing.size * grow))
    return dataclasses.replace(scene, things=tuple(moved))


def article(word):
    """ "a red", "an orange"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def caption(scene, rng=None):
    """The caption of a scene. With `rng`: one in five as a sentence, and "on blue" for "on a blue background"
    in three of ten; without it the plain long form."""
    if scene.kind == "one":
        thing, (size, corner) = scene.things[0], scene.words
        text = article(f"{size} {thing.colour} {thing.shape}".strip())
        text += f" at the {corner}" if corner else ""
    elif scene.kind == "two":
        a, b = scene.things
        text = f"{article(a.colour)} {a.shape} {scene.words[0]} {article(b.colour)} {b.shape}"
    else:
        thing, count = scene.things[0], scene.words[0]
        text = f"{NUMBERS[count]} {thing.colour} {thing.shape}{'es' if thing.shape == 'cross' else 's'}"
    short = rng is not None and rng.random() < 0.3
    text += f" on {scene.background}" if short else f" on {article(scene.background)} background"
    if rng is not None and rng.random() < 0.2:
        text = text[0].upper() + text[1:] + "."
    return text


# One object, two objects, a row: more hard scenes than in training, so that a figure says something about them.
MIXED = {"one": 0.5, "two": 0.3, "row": 0.2}


def draw_captions(count, seed, kind="mixed", held_out=False, shapes=SHAPES):
    """(scenes without jitter, their captions) that training has not seen, of all kinds or of one; `held_out` asks for
    single objects of the held-out pairs. The same arguments give the same captions everywhere."""
    rng = np.random.default_rng(seed + 1_000_003)
    kinds = rng.choice(list(MIXED), count, p=list(MIXED.values()))
    if held_out or kind != "mixed":
        kinds = ["one" if held_out else kind] * count
    plain = [draw_scene(rng, kind, held_out, shapes) for kind in kinds]
    return plain, [caption(s, rng) for s in plain]


EDITS = ("colour", "background", "shape", "remove", "add")


def draw_addition(rng, shapes):
    """(source scene, instruction, target scene) of one "add": into an empty scene, or opposite an object that sits
    in a corner, where the two cannot touch."""
    target = draw_scene(rng, "one", shapes=shapes)
    thing, (size, corner) = target.things[0], target.words
    text = f"add {article(f'{size} {thing.colour} {thing.shape}'.strip())}" + (f" at the {corner}" if corner else "")
    if not corner or rng.random() < 0.5:
        source = Scene(target.background, (), "empty")
    else:
        row, column = corner.split()
        opposite = f"{'bottom' if row == 'top' else 'top'} {'right' if column == 'left' else 'left'}"
        pair = draw_pair(rng, target.background, False, shapes)
        source = one_thing(target.background, *pair, ("", "small")[rng.integers(2)], opposite)
    source, target = jitter(rng, source), jitter(rng, target)
    return source, text, Scene(target.background, source.things + target.things, "added")


def draw_change(rng, kind, shapes):
    """(source scene, instruction, target scene) of an edit of the one object, or of the background behind it."""
    while True:
        source = draw_scene(rng, "one", shapes=shapes)
        thing, (size, corner) = source.things[0], source.words
        colour, shape = COLOURS[rng.integers(8)], shapes[rng.integers(len(shapes))]
        if kind == "colour":
            text = f"make the {thing.shape} {colour}"
            target = one_thing(source.background, colour, thing.shape, size, corner)
        elif kind == "background":
            text = f"change the background to {colour}"
            target = one_thing(colour, thing.colour, thing.shape, size, corner)
        elif kind == "shape":
            text = f"turn the {thing.shape} into {article(shape)}"
            target = one_thing(source.background, thing.colour, shape, size, corner)
        else:
            text, target = f"remove the {thing.shape}", Scene(source.background, (), "empty")
        left = target.things[0] if target.things else None
        sensible = left is None or (left.colour != target.background and (left.colour, left.shape) not in HELD_OUT)
        if sensible and target != source:
            break
    # What the instruction does not name stays exactly where it was.
    source = jitter(rng, source)
    if target.things:
        kept = source.things[0]
        thing = dataclasses.replace(target.things[0], x=kept.x, y=kept.y, size=kept.size)
        target = dataclasses.replace(target, things=(thing,))
    return source, text, target


def draw_edit(rng, kind=None, shapes=SHAPES):
    """(source scene, instruction, target scene) of one of `EDITS`, any of them when `kind` is not given."""
    kind = kind or EDITS[rng.integers(len(EDITS))]
    source, text, target = draw_addition(rng, shapes) if kind == "add" else draw_change(rng, kind, shapes)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:] + "."
    return source, text, target


def polygon_distance(points, corners):
    """Signed distance of points [..., 2] to a simple polygon [n, 2]: negative inside."""
    squared = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], bool)
    for a, b in zip(corners, np.roll(corners, -1, 0)):
        edge, rel = b - a, points - a
        along = np.clip((rel @ edge) / (edge @ edge), 0, 1)
        squared = np.minimum(squared, ((rel - along[..., None] * edge) ** 2).sum(-1))
        crosses = (a[1] > points[..., 1]) != (b[1] > points[..., 1])
        if edge[1]:
            inside ^= crosses & (points[..., 0] < a[0] + (points[..., 1] - a[1]) * edge[0] / edge[1])
    return np.where(inside, -1, 1) * np.sqrt(squared)


def shape_distance(shape, points, size):
    """Signed distance of points [..., 2], relative to the object's centre, to the outline of `shape`."""
    if shape == "circle":
        return np.sqrt((points**2).sum(-1)) - size
    if shape == "square":
        beyond = np.abs(points) - SQUARE_HALF * size
        return np.sqrt((np.maximum(beyond, 0) ** 2).sum(-1)) + np.minimum(beyond.max(-1), 0)
    return polygon_distance(points, POLYGONS[shape] * size)


def coverage(thing, height, width):
    """How much of each pixel the object covers, [H, W] in 0..1: one pixel of anti-aliasing across the outline."""
    side = min(height, width)
    ys, xs = np.mgrid[0:height, 0:width] + 0.5
    points = np.stack([xs - thing.x * width, ys - thing.y * height], -1)
    return np.clip(0.5 - shape_distance(thing.shape, points, thing.size * side), 0, 1)


def render(scene, height, width):
    """The picture, uint8 [H, W, 3]."""
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = PALETTE[scene.background]
    for thing in scene.things:
        alpha = coverage(thing, height, width)[..., None]
        picture = picture * (1 - alpha) + np.array(PALETTE[thing.colour], np.float32) * alpha
    return np.rint(picture).astype(np.uint8)


def keep_chances(scene, grid, cell=16):
    """With which chance each image token should be trained on, float32 [h*w] in raster order.

    Tokens that hold an outline are what must be learned: always. Their neighbours, which the encoder's reach makes
    vary a little, every second time; flat colour, most of a picture and learned first, every fifth time."""
    height, width = grid
    outline = np.zeros((height + 2, width + 2), bool)
    for thing in scene.things:
        cells = coverage(thing, height * cell, width * cell).reshape(height, cell, width, cell)
        outline[1:-1, 1:-1] |= (cells.max((1, 3)) > 0) & (cells.min((1, 3)) < 1)
    around = ndimage.binary_dilation(outline, np.ones((3, 3), bool))
    chance = np.where(outline, 1.0, np.where(around, 0.5, 0.2)).astype(np.float32)
    return chance[1:-1, 1:-1].reshape(-1)


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(ALL_SHAPES)
_GROUND = rf" on (?:an? )?(?P<ground>{_COLOUR})(?: background)?"
_ONE = re.compile(
    rf"an? (?:(?P<size>small|large) )?(?P<colour>{_COLOUR}) (?P<shape>{_SHAPE})"
    rf"(?: at the (?P<corner>{'|'.join(CORNERS)}))?{_GROUND}"
)
_TWO = re.compile(
    rf"an? (?P<c1>{_COLOUR}) (?P<s1>{_SHAPE}) (?P<relation>to the left of|above) "
    rf"an? (?P<c2>{_COLOUR}) (?P<s2>{_SHAPE}){_GROUND}"
)
_ROW = re.compile(rf"(?P<count>two|three) (?P<colour>{_COLOUR}) (?P<shape>{_SHAPE})e?s" + _GROUND)


def parse_caption(text):
    """The scene (without jitter) that a caption of this grammar describes; `ValueError` for any other text."""
    plain = text.strip().rstrip(".")
    plain = plain[:1].lower() + plain[1:]
    if found := _ONE.fullmatch(plain):
        return one_thing(found["ground"], found["colour"], found["shape"], found["size"] or "", found["corner"] or "")
    if found := _TWO.fullmatch(plain):
        return pair_scene(found["ground"], (found["c1"], found["s1"]), (found["c2"], found["s2"]), found["relation"])
    if found := _ROW.fullmatch(plain):
        count = 2 if found["count"] == "two" else 3
        return row_scene(found["ground"], found["colour"], found["shape"], count)
    raise ValueError(f"not a caption of the demo grammar: {text!r}")
