"""Trains the demo tokenizer: a byte-level BPE with Qwen2.5's normaliser and split, over grammar captions.

    python tokenizer.py OUT_DIR

writes tokenizer.json and tokenizer_config.json and prints the vocabulary size. The nine NextStep tokens follow the
merges in their official order, so the engine's tokenizer code is exercised as with the real files.
"""

import argparse
import json
import pathlib

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import scenes

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = 132
SPECIALS = (
    "<|endoftext|>",
    "[PAD]",
    "<|image_area|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|image_placeholder|>",
    "<|begin_of_prompt_refinement|>",
    "<|end_of_prompt_refinement|>",
    "<|begin_of_thinking|>",
    "<|end_of_thinking|>",
)
SPECIAL_IDS = {token: 256 + MERGES + i for i, token in enumerate(SPECIALS)}


def corpus(seed=0, captions=6000, edits=1500):
    """Captions and edit instructions to learn the merges from."""
    rng = np.random.default_rng(seed)
    for _ in range(captions):
        kind = rng.choice(["one", "two", "row"], p=[0.7, 0.2, 0.1])
        yield scenes.caption(scenes.draw_scene(rng, kind), rng)
    for _ in range(edits):
        yield scenes.draw_edit(rng)[1]
    yield from ["Copy original image."] * 20


def train():
    """A `Tokenizer` of 256 bytes, 132 merges and the special tokens: ids 0..397."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(corpus(), trainer)
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    for token, expected in SPECIAL_IDS.items():
        if tok.token_to_id(token) != expected:
            raise ValueError(f"{token} got id {tok.token_to_id(token)}, expected {expected}: corpus too small")
    return tok


def save(tok, directory):
    """Write both tokenizer files."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tok.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "padding_side": "left",
        "pad_token": "[PAD]",
        "eos_token": "<|endoftext|>",
        "bos_token": None,
        "additional_special_tokens": list(SPECIALS[2:]),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def image_prefix(tok, grid):
    """Ids of `<|image_area|>h*w<|begin_of_image|>`, after which the image tokens of a (h, w) grid follow."""
    text = f"<|image_area|>{grid[0]}*{grid[1]}<|begin_of_image|>"
    return tok.encode(text, add_special_tokens=False).ids


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="directory for tokenizer.json and tokenizer_config.json")
    args = parser.parse_args()
    tok = train()
    save(tok, args.out)
    print(f"{args.out}: {tok.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
