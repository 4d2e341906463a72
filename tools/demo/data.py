"""Training examples: pools of encoded pictures that grow while training runs, and the batches drawn from them.

Encoding a 128x128 picture costs about a tenth of a training step on a CPU, so every picture is encoded once, kept,
and used several times. Shapes: B rows, S positions, n tokens of the picture to learn, K token dim.
"""

import dataclasses

import numpy as np
import torch

import precision
import sampler
import scenes
from tokenizer import SPECIAL_IDS, image_prefix

EOS, EOI = SPECIAL_IDS["<|endoftext|>"], SPECIAL_IDS["<|end_of_image|>"]
# Which edits are drawn for training: in proportion to what they leave to learn.
EDIT_SHARES = {"colour": 0.21, "background": 0.27, "shape": 0.25, "remove": 0.05, "add": 0.22}
# How many examples are of all shapes rather than of the four that figures are about.
WIDE_SHARE = 0.5
HOLE, PAD = SPECIAL_IDS["<|image_placeholder|>"], SPECIAL_IDS["[PAD]"]
IGNORE = -100
CELL = 16


@dataclasses.dataclass
class Batch:
    """One training step's tensors.

    ids [B, S] right-padded (causal attention then needs no mask); is_image [B, S] the positions of `given` [m, K] in
    row order; clean [B, n, K] the tokens to learn, keep [B, n] the chance with which to train on each;
    condition [B, n] the position whose hidden state must predict each of them; next_ids [B, S] the LM targets."""

    ids: torch.Tensor
    is_image: torch.Tensor
    given: torch.Tensor
    clean: torch.Tensor
    keep: torch.Tensor
    condition: torch.Tensor
    next_ids: torch.Tensor

    def to(self, device):
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


class Pool:
    """Encoded examples of one kind on one grid: "one", "two", "above" and "row" captions, or "edit" pairs."""

    def __init__(self, kind, grid, capacity):
        self.kind, self.grid, self.capacity = kind, grid, capacity
        self.texts, self.tokens, self.sources, self.keep = [], [], [], []
        self.made = 0

    def __len__(self):
        return len(self.texts)

    def grow(self, vae, rng, count):
        """Render and encode `count` more examples; once full, the oldest make room."""
        side = (self.grid[0] * CELL, self.grid[1] * CELL)
        texts, before, after = [], [], []
        for _ in range(count):
            shapes = scenes.ALL_SHAPES if rng.random() < WIDE_SHARE else scenes.SHAPES
            if self.kind == "edit":
                kind = rng.choice(list(EDIT_SHARES), p=list(EDIT_SHARES.values()))
                source, text, target = scenes.draw_edit(rng, kind, shapes)
                before.append(scenes.render(source, *side))
            else:
                plain = scenes.draw_scene(rng, self.kind, shapes=shapes)
                text, target = scenes.caption(plain, rng), scenes.jitter(rng, plain)
            texts.append(text)
            after.append(target)
        pictures = np.stack(before + [scenes.render(s, *side) for s in after])
        device = next(vae.parameters()).device.type
        with precision.autocast(device):
            tokens = sampler.encode_pictures(vae, pictures, batch=8).cpu().half()
        rows = list(zip(texts, tokens[-count:], tokens[:count], (scenes.keep_chances(s, self.grid) for s in after)))
        for text, target, source, keep in rows:
            self.put(text, target, source if self.kind == "edit" else None, torch.from_numpy(keep))

    def put(self, text, tokens, source, keep):
        """Store one example."""
        columns = ((self.texts, text), (self.tokens, tokens), (self.sources, source), (self.keep, keep))
        for column, value in columns:
            if len(column) < self.capacity:
                column.append(value)
            else:
                column[self.made % self.capacity] = value
        self.made += 1

    def state_dict(self):
        """Everything needed to go on after an interruption."""
        stack = {"tokens": torch.stack(self.tokens), "keep": torch.stack(self.keep)}
        stack |= {"texts": self.texts, "made": self.made}
        return stack | ({"sources": torch.stack(self.sources)} if self.kind == "edit" else {})

    def load_state_dict(self, state):
        """The inverse of `state_dict`."""
        self.texts, self.made = list(state["texts"]), state["made"]
        self.tokens, self.keep = list(state["tokens"]), list(state["keep"])
        self.sources = list(state["sources"]) if "sources" in state else [None] * len(self.texts)


def without_first_shape(text):
    """The caption without the shape of its first object. Which of two shapes a token should look at is learned late or
    never; the only shape there is, at once, and the choice after it."""
    words = text.split(" ")
    named = [i for i, word in enumerate(words) if word in scenes.ALL_SHAPES]
    return " ".join(words[: named[0]] + words[named[0] + 1 :]) if named else text


def draw_haze(rng, late):
    """How much noise the tokens drawn so far get: in two rows of five so much that little of them is left; `late` in
    training less and in fewer rows, which makes outlines sharp again.

    The encoder sees far, so that clean tokens tell what stands below them: from the upper half of a picture a linear
    probe knows the shape of the lower object in 86 % of the cases, with noise of 0.4 still in 30 % (chance is 25 %). A
    model that may read it there never learns to read it in the caption, and when it draws, nobody has written it."""
    strong, most = (0.2, 0.2) if late else (0.4, 0.4)
    return rng.uniform(0.6, 2.0) if rng.random() < strong else rng.uniform(0.02, most)


def make_batch(picks, tok, grid, rng, drop_text=0.1, drop_all=0.04, drop_first=0.0, late=False, noise=0.03):
    """A `Batch` from picks, a list of (pool, index) on one grid.

    `drop_text` of the rows lose their text, `drop_all` of the edits their source picture as well, which trains the
    branches of classifier-free guidance; `drop_first` of the captions of kind "above" the shape of the upper object.
    Source pictures and targets get Gaussian noise of `noise`, the tokens drawn so far that of `draw_haze`, which is
    less `late` in training."""
    prefix = image_prefix(tok, grid)
    count = grid[0] * grid[1]
    rows, given, blur, starts = [], [], [], []
    for pool, index in picks:
        source, chance = pool.sources[index], rng.random()
        words = pool.texts[index]
        if pool.kind == "above" and rng.random() < drop_first:
            words = without_first_shape(words)
        text = [] if chance < drop_text else tok.encode(words, add_special_tokens=False).ids
        row = []
        if source is not None and chance >= drop_all:
            row = prefix + [HOLE] * count + [EOI]
            given.append(source)
            blur.append(noise)
        row = row + text + prefix
        starts.append(len(row))
        rows.append(row + [HOLE] * count + [EOI])
        given.append(pool.tokens[index])
        blur.append(draw_haze(rng, late))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    following = torch.tensor([row[1:] + [EOS] + [IGNORE] * (longest - len(row)) for row in rows])
    given = torch.cat(given).float()
    blur = torch.tensor(blur, dtype=torch.float32).repeat_interleave(count)[:, None]
    clean = torch.stack([pool.tokens[i] for pool, i in picks]).float()
    condition = torch.tensor(starts)[:, None] - 1 + torch.arange(count)
    return Batch(
        ids=ids,
        is_image=ids == HOLE,
        given=given + blur * torch.randn_like(given),
        clean=clean + noise * torch.randn_like(clean),
        keep=torch.stack([pool.keep[i] for pool, i in picks]),
        condition=condition,
        next_ids=following.masked_fill(following == HOLE, IGNORE),
    )
