"""Reads and writes model directories in the official layout.

config.json, model.safetensors, tokenizer.json, tokenizer_config.json, vae/config.json and vae/model.safetensors.
Every tensor must be there under its official name: loading is strict, because a missing tensor would otherwise
stay random without a word.
"""

import dataclasses
import json
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import tokenizer as demo_tokenizer
from model import ModelConfig, NextStep
from vae import Vae, VaeConfig


def pick(cls, values):
    """A config dataclass from the keys of a JSON file that it knows."""
    known = {f.name for f in dataclasses.fields(cls)}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return cls(**chosen)


def load_model(directory, device="cpu"):
    """The transformer with its flow head, in float32."""
    directory = pathlib.Path(directory)
    config = json.loads((directory / "config.json").read_text())
    if config.get("use_gen_pos_embed"):
        raise ValueError(f"{directory}/config.json: use_gen_pos_embed is not supported by this training code")
    model = NextStep(pick(ModelConfig, config))
    model.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
    return model.to(device)


def load_vae(directory, device="cpu"):
    """The VAE in float32; `directory` is the one with model.safetensors."""
    directory = pathlib.Path(directory)
    vae = Vae(pick(VaeConfig, json.loads((directory / "config.json").read_text())))
    vae.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
    return vae.to(device)


def load_tokenizer(directory):
    """The `tokenizers.Tokenizer` of a model directory."""
    return Tokenizer.from_file(str(pathlib.Path(directory) / "tokenizer.json"))


def model_config_json(cfg):
    """The official keys, with the ids of our own tokenizer."""
    ids = demo_tokenizer.SPECIAL_IDS
    return {
        "architectures": ["NextStep"],
        "model_type": "nextstep",
        **{k: v for k, v in dataclasses.asdict(cfg).items()},
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "attention_bias": True,
        "o_attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": ids["[PAD]"],
        "bos_token_id": None,
        "eos_token_id": ids["<|endoftext|>"],
        "vae_name_or_path": "vae/",
        "latent_size": 32,
        "boi": ids["<|begin_of_image|>"],
        "eoi": ids["<|end_of_image|>"],
        "image_placeholder_id": ids["<|image_placeholder|>"],
        "pad_token_id_added": ids["[PAD]"],
        "lm_loss_weight": 0.01,
        "im_loss_weight": 1.0,
        "use_gen_pos_embed": False,
        "torch_dtype": "bfloat16",
    }


def as_bf16(state):
    """Contiguous bf16 copies, as safetensors wants them."""
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


def export_model(directory, state, cfg, tokenizer_dir):
    """Write config.json, model.safetensors and the tokenizer files. The weights land last and by rename, so that
    a reader never meets half a file."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model_config_json(cfg), indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pathlib.Path(tokenizer_dir) / name, directory / name)
    scratch = directory / "model.safetensors.new"
    save_file(as_bf16(state), scratch, metadata={"format": "pt"})
    scratch.rename(directory / "model.safetensors")


def export_vae(directory, vae):
    """Write config.json and model.safetensors of the VAE."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(vae.config), indent=1) + "\n")
    scratch = directory / "model.safetensors.new"
    save_file(as_bf16(vae.state_dict()), scratch, metadata={"format": "pt"})
    scratch.rename(directory / "model.safetensors")
