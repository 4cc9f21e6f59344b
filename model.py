"""GPT-2: the model, its parts, which can move between models, and checkpoints in and out.

    python model.py export out/code-dyck-s0 DIR    a run's model as a Hugging Face GPT-2 folder
"""
import contextlib
import math
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from data import Parser, UserError, read_json, reading, run_main, say, write_json, written_whole

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest context, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    tied: bool = True  # the output head shares its weight with the token embeddings

    def __post_init__(self):
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise UserError(f"a width of {self.n_embd} is no multiple of {self.n_head} heads")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        q, k, v = split_heads(self.c_attn(x), self.n_head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def split_heads(qkv, n_head):
    """(B, T, 3 * n_embd) -> q, k, v, each (B, n_head, T, n_embd / n_head)"""
    return [each.unflatten(2, (n_head, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=2)]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(config.n_embd, 4 * config.n_embd), gelu=nn.GELU(approximate="tanh"),
            c_proj=nn.Linear(4 * config.n_embd, config.n_embd)))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, counted=None):
        """(B, T, n_embd) -> the same; with a mask `counted` (B, T), its n places: (n, n_embd)."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        if counted is not None:
            x = x[counted]
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2: learned positions, norms in front, tanh GELU, biases."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # True: keep only each block's input; the rest is computed again
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():  # as GPT-2 begins; norms are ones already
            if p.dim() == 2:
                # The two projections of a block that add to the residual stream start smaller.
                added = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(added))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """Tokens (B, T) -> logits (B, T, vocab_size); with targets (B, T), the sum of the
        cross-entropy, in nats, over those that are not -1."""
        if targets is None:
            return self.lm_head(self.states(idx))
        if idx.device.type == "cpu":
            counted = targets != -1
            x, targets = self.states(idx, counted), targets[counted]
        else:  # to pick what counts would wait for the GPU, which computes everything
            x, targets = self.states(idx).flatten(0, 1), targets.flatten()
        return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-1, reduction="sum")

    def states(self, idx, counted=None):
        """What the output head reads: (B, T, n_embd); with a mask `counted` (B, T), (n, n_embd):
        after the last attention no token looks at another, so those that do not count end there,
        which saves a sixth of a step on a CPU where only answers count (measured on haystack)."""
        x = self.drop(self.wte(idx) + self.wpe.weight[:idx.shape[1]])
        for block in self.h:
            wanted = counted if block is self.h[-1] else None
            if self.recompute and self.training:
                x = checkpoint(block, x, wanted, use_reentrant=False)
            else:
                x = block(x, wanted)
        return self.ln_f(x)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0):
        """Tokens (B, T) -> (B, T + n). Temperature 0 takes the likeliest. Call it in eval mode."""
        for _ in range(n):
            logits = self.lm_head(self.states(idx[:, -self.config.block_size:])[:, -1]).float()
            if temperature > 0:
                chances = (logits / temperature).nan_to_num().softmax(-1)  # others' may be nan
                token = torch.multinomial(chances, 1)
            else:
                token = logits.argmax(-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
        return idx


def part_of(name):
    """The part that a parameter belongs to: "h.0.attn.c_attn.weight" -> "attn"."""
    for word, part in ((".attn.", "attn"), (".mlp.", "mlp"), ("ln_", "norm"), ("wpe", "positions")):
        if word in name:
            return part
    return "embeddings"


def parse_parts(text):
    """"full", "all" or "attn,norm" -> a list of parts. Raises UserError."""
    parts = ["attn", "mlp", "norm"] if text in ("full", "all") else text.replace(" ", "").split(",")
    if not set(parts) <= {"attn", "mlp", "norm"}:
        raise UserError(f"unknown part in {text!r}: full, all, or a list of attn, mlp and norm")
    return parts


@torch.no_grad()
def transfer(source, target, parts, embeddings="random", positions="fit"):
    """Copies parts of one GPT into another of the same shape. embeddings, of tokens and the output
    head: "random" leaves the target's own, "mean" sets all to the mean of the source's, "keep"
    copies them. positions: "random" leaves the target's own, "moved" copies the source's first ones
    or refuses, "fit" does if there are enough. Returns whether they moved. Raises UserError."""
    old, new = source.config, target.config
    shapes = [f"{c.n_layer}_{c.n_head}_{c.n_embd}" for c in (old, new)]
    if shapes[0] != shapes[1]:
        raise UserError(f"weights of a {shapes[0]} model do not fit a {shapes[1]} model")
    if embeddings == "keep" and not 0 <= old.vocab_size - new.vocab_size < 256:  # some pad theirs
        raise UserError(f"embeddings of {old.vocab_size} tokens are not for {new.vocab_size}")
    enough = old.block_size >= new.block_size
    if positions == "moved" and not enough:
        raise UserError(f"{new.block_size} positions cannot come from {old.block_size}")
    moved = positions != "random" and enough
    for name, p in target.named_parameters():
        part, theirs = part_of(name), source.get_parameter(name)
        if part in parts:
            p.copy_(theirs)
        elif part == "positions" and moved:
            p.copy_(theirs[:new.block_size])
        elif part == "embeddings" and embeddings == "mean":
            p.copy_(theirs.mean(0))
        elif part == "embeddings" and embeddings == "keep":
            p.copy_(theirs[:new.vocab_size])
    return moved


# ---- Here a student may stop. What flags name, and what the heads attend to ----------------------

SIZES = {  # layers_heads_width
    "tiny": "2_4_128",  # for laptops (ours)
    "gpt2": "12_12_768", "gpt2-medium": "24_16_1024", "gpt2-large": "36_20_1280",
    "gpt2-xl": "48_25_1600", "1.3b": "24_16_2048"}


def parse_size(size):
    """"gpt2" or "2_4_16" -> (n_layer, n_head, n_embd). Raises UserError."""
    shape = SIZES.get(size, size)
    if not re.fullmatch(r"([1-9]\d{0,5}_){2}[1-9]\d{0,5}", shape, re.ASCII):
        raise UserError(f"unknown size {size!r}: {', '.join(SIZES)}, or layers_heads_width: 2_4_16")
    return tuple(map(int, shape.split("_")))


def find_device(name=None):
    """The accelerator that is here: CUDA, Apple's MPS, or the CPU. Raises UserError."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cuda", *gpus] if gpus else []
    here += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name not in (None, *here):
        raise UserError(f"--device {name} is not here, but {', '.join(here)}")
    return name or here[0]


@contextlib.contextmanager
def attention_maps(model):
    """Yields a list to which each layer of each forward pass adds what its heads attend to:
    (B, n_head, T, T), from token (row) to token (column). A hook computes it once more, since
    scaled_dot_product_attention does not return it."""
    maps = []

    def add(c_attn, inputs, qkv):
        q, k, _ = split_heads(qkv, model.config.n_head)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        maps.append(scores.float().masked_fill(future, -math.inf).softmax(-1))

    with contextlib.ExitStack() as hooks:
        for block in model.h:
            hooks.enter_context(block.attn.c_attn.register_forward_hook(add))
        yield maps


# ---- Checkpoints: ours, nanoGPT's, Hugging Face's ------------------------------------------------


def save(path, model, **more):
    """Writes a checkpoint, if its weights are finite: else no run can go on. Raises UserError."""
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"a weight is not finite, so {path} was not written: lower the rate")
    with written_whole(path) as file:
        torch.save({"config": vars(model.config), "model": weights, **more}, file)


def load(path, device="cpu"):
    """A checkpoint of ours or nanoGPT's, or the folder of a run or of a Hugging Face GPT-2 -> (GPT,
    what else our file holds). Nothing in a file is ever run. Raises UserError."""
    path = Path(path)
    if (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    with reading(path):
        config, theirs, state = read_folder(path) if path.is_dir() else read_file(path)
        kinds = GPTConfig.__annotations__.items()
        ours = {key: kind(config[key]) for key, kind in kinds if key in config}
        if any(config[key] != value for key, value in ours.items()):
            raise ValueError("a number of its config is of another kind")
        config = GPTConfig(**ours)
        weights = {}
        for name, tensor in theirs.items():
            name = re.sub(r"^((module|_orig_mod|transformer)\.)+", "", name)
            if re.search(r"\.attn\.(masked_)?bias$", name):  # the mask in old checkpoints
                continue
            # Strides or sizes of 0 and "meta" make gigabytes of a few bytes.
            dense = tensor.is_floating_point() and tensor.is_contiguous() and tensor.numel()
            if tensor.is_meta or not dense:
                raise ValueError(f"{name} is no plain tensor")
            weights[name] = tensor.float()
            if part_of(name) in ("attn", "mlp", "norm"):  # nanoGPT's bias=False has no biases
                weights.setdefault(name.replace("weight", "bias"), torch.zeros(len(tensor)))
        head = weights.setdefault("lm_head.weight", weights["wte.weight"])
        config.tied &= torch.equal(weights["wte.weight"], head)
        if f"h.{config.n_layer - 1}.ln_1.weight" not in weights:
            raise ValueError(f"it does not have the {config.n_layer} layers of its config")
        with torch.device("meta"):  # shapes without memory: a config may claim any
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
        if config.tied:
            model.lm_head.weight = model.wte.weight
    return model.to(device), state


def read_file(path):
    """A file with nothing but tensors, numbers and strings -> (config, weights, the rest)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise pickle.UnpicklingError  # packed, a few bytes may be gigabytes
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        if b"\nbytearray\n" in b"".join(pickles):  # which may ask for any number of bytes
            raise pickle.UnpicklingError
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError):  # torch has a page of advice
        raise ValueError("it is no file of tensors, numbers and strings: nothing in it was run")
    config = state.pop("model_args" if "model_args" in state else "config")  # nanoGPT's, or ours
    return config, state.pop("model"), state


GPT2 = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False}
THEIRS = {"block_size": "n_positions", "dropout": "resid_pdrop", "tied": "tie_word_embeddings"}


def transposed(weights):
    """Ours as Hugging Face's, or back: it keeps the matrices of blocks as (in, out)."""
    return {name: weight.t().contiguous() if re.search(r"\.c_\w+\.weight$", name) else weight
            for name, weight in weights.items()}


def read_folder(path):
    """A Hugging Face GPT-2 folder -> (config, weights, {})."""
    if not (path / "model.safetensors").is_file():
        raise ValueError("it holds neither a run's ckpt.pt nor Hugging Face's model.safetensors")
    from safetensors.torch import load_file  # comes with transformers
    config = read_json(path / "config.json")
    for key, value in GPT2.items():
        if config.get(key, value) != value:
            raise ValueError(f"its {key} is {config[key]!r}; only {value!r} is known here")
    config |= {ours: config[theirs] for ours, theirs in THEIRS.items() if theirs in config}
    return config, transposed(load_file(path / "model.safetensors")), {}


def write_folder(path, model):
    """Makes a Hugging Face GPT-2 folder, which transformers reads as well. Raises UserError."""
    with reading("safetensors, which comes with transformers"):
        from safetensors.torch import save as packed
    c, theirs = model.config, transposed(dict(model.named_parameters()))
    weights = {name if name == "lm_head.weight" else f"transformer.{name}": weight
               for name, weight in theirs.items()}
    path.mkdir()
    with written_whole(path / "model.safetensors") as file:
        file.write(packed(weights, {"format": "pt"}))
    config = {THEIRS.get(key, key): value for key, value in vars(c).items()}
    write_json(path / "config.json", GPT2 | config | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout, "bos_token_id": None, "eos_token_id": None})


def main():
    parser = Parser(description="Writes a checkpoint as a Hugging Face GPT-2 folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="a run's folder, or a file of weights")
    parser.add_argument("folder", type=Path, help="the folder to make")
    args = parser.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} is there: choose another")
    model, _ = load(args.checkpoint)
    with tempfile.TemporaryDirectory(prefix=".", dir=args.folder.parent) as scratch:
        write_folder(Path(scratch, "whole"), model)
        Path(scratch, "whole").rename(args.folder)
    say(f"{args.folder}: config.json and model.safetensors; it has no tokenizer of its own")


if __name__ == "__main__":
    run_main(main)
