"""The GPT: GPT-2 exactly, its loss, its parts (what can move between models), generation, checkpoints.

    python model.py export out/c4-union-s0/ckpt.pt DIR     a Hugging Face GPT-2 folder: GPT2LMHeadModel, harnesses
    python model.py import DIR ckpt.pt                     such a folder, or nanoGPT's ckpt.pt, as a checkpoint

A model is a sum of named parts: every parameter belongs to exactly one of attn, mlp, norm, embed. Transfer and weight
mixtures are "copy these parts", later ablations "do something to these parts".
"""
import dataclasses
import json
import math
import os
import pickle
import re
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from data import Parser, UserError, run_main

SIZES = {  # name: n_layer, n_head, n_embd
    "tiny": (2, 4, 128),  # for CPUs (ours)
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
    "1.3b": (24, 16, 2048)}
PARTS = ("attn", "mlp", "norm", "embed")


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    tied: bool = True  # lm_head shares its weight with wte


def parse_size(size):
    """"gpt2" or "2_4_16" -> (n_layer, n_head, n_embd)"""
    if size in SIZES:
        return SIZES[size]
    match = re.fullmatch(r"(\d+)_(\d+)_(\d+)", size)
    if not match:
        raise UserError(f"unknown size {size!r}: there are {', '.join(SIZES)}, or layers_heads_width such as 2_4_16")
    n_layer, n_head, n_embd = map(int, match.groups())
    if not (n_layer and n_head and n_embd) or n_embd % n_head:
        raise UserError(f"size {size}: none may be 0, and the width must be a multiple of the heads")
    return n_layer, n_head, n_embd


class CausalSelfAttention(nn.Module):
    weights = None  # set it to anything else, and each forward pass leaves its attention weights here: (B, heads, T, T)

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, first=0):
        """(B, T, C) -> (B, T - first, C): the result at the positions from `first` on. cache: a list that holds the keys
        and values of the tokens before, or is empty."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        if cache is not None:
            cache[:] = k, v
        q, mask = q[:, :, first:], None
        if self.weights is None:
            if first and T - first > 1:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[first:]
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0,
                                               is_causal=q.shape[2] == k.shape[2])  # one new token may see all before
        else:  # the same, written out
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[first:]
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            self.weights = scores.masked_fill(future, -math.inf).softmax(-1)
            y = F.dropout(self.weights, self.dropout, self.training) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, -1, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.resid_dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, first=0):
        x = x[:, first:] + self.attn(self.ln_1(x), cache, first)
        return x + self.mlp(self.ln_2(x))


MOST_LOGITS = 2 ** 27  # more than this (half a GB in float32), and the loss is made in chunks (ours)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the output head, some rows at a time: x (n, n_embd), weight (vocab_size, n_embd), targets (n,)
    with -1 where it does not count -> scalar in float32. The gradient is made together with the loss, so no logits are
    kept, and none are made twice. Products are in autocast's type, the softmax and the sums in float32 (torch 2.13's own
    F.linear_cross_entropy rounds the loss itself to bfloat16, or ignores autocast)."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        device, low = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)
        loss, grad_x, grad_weight = x.new_zeros((), dtype=torch.float32), torch.empty_like(x), torch.zeros_like(weight)
        # Tensor cores want rows of whole 128 bytes, and GPT-2 has 50,257 tokens: some that never come fill it up.
        head, rows = F.pad(weight.to(low), (0, 0, 0, -len(weight) % 64)), max(1, MOST_LOGITS // len(weight))
        for part, part_grad, wanted in zip(x.split(rows), grad_x.split(rows), targets.split(rows)):
            part, counts, wanted = part.to(low), (wanted != -1)[:, None], wanted.clamp_min(0)[:, None]
            logits = (part @ head.t()).float()
            logits[:, len(weight):] = -math.inf
            logits -= logits.logsumexp(1, keepdim=True)  # log probabilities
            loss -= (logits.gather(1, wanted) * counts).sum()
            slope = logits.exp_().scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0)).mul_(counts).to(low)
            part_grad.copy_(slope @ head)
            grad_weight += (slope.t() @ part)[:len(weight)]
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * slope, grad_weight * slope, None


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm, tanh GELU, biases. Weights are drawn from torch's global generator."""

    recompute = False  # keep only the input of each block for the backward pass, and compute the rest of it again

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():  # GPT-2's initialisation; layer norms are ones and zeros already
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif part_of(name) != "norm":
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def trunk(self, idx, caches=None, first=0):
        """Everything but the output head: (B, T) tokens -> (B, T - first, n_embd). caches: one list per block, see
        generate. first: of the last block, only the result from this position on is wanted."""
        start = caches[0][0].shape[2] if caches and caches[0] else 0
        x = self.drop(self.wte(idx) + self.wpe.weight[start:start + idx.shape[1]])
        for i, block in enumerate(self.h):
            arguments = x, caches[i] if caches else None, first if i == len(self.h) - 1 else 0
            if self.recompute and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.ln_f(x)

    def states(self, idx, where):
        """What the output head reads at the positions (B, T) where `where` is true: (n, n_embd).

        On a CPU, what comes before the first of them is left out of the last block, unless its attention is looked at;
        elsewhere, finding the first would make the device wait."""
        leave_out = idx.device.type == "cpu" and self.h[-1].attn.weights is None
        first = int(where.any(0).int().argmax()) if leave_out else 0
        return self.trunk(idx, first=first)[where[:, first:]]

    def forward(self, idx, targets=None, reduction="mean"):
        """Logits (B, T, vocab_size), or with targets (B, T) the cross-entropy in nats over the positions that count."""
        if targets is None:
            return self.lm_head(self.trunk(idx))
        if targets.numel() * self.config.vocab_size > MOST_LOGITS:
            loss = ChunkedCrossEntropy.apply(self.trunk(idx).flatten(0, 1), self.lm_head.weight, targets.flatten())
            return loss / (targets != -1).sum() if reduction == "mean" else loss
        if idx.device.type != "cpu":  # choosing positions would make the device wait
            logits = self.lm_head(self.trunk(idx)).flatten(0, 1)
            return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-1, reduction=reduction)
        where = targets != -1  # the output head is paid for where it is needed
        logits = self.lm_head(self.states(idx, where))
        return F.cross_entropy(logits.float(), targets[where], reduction=reduction)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None, stop=None, cached=True):
        """Continues idx (B, T) by n tokens, fewer if every row has made the token `stop`; temperature 0 takes the
        likeliest. While all fits into the context, keys and values of what was read are kept (`cached`); beyond it,
        the last block_size tokens are read anew for each token."""
        training, first = self.training, idx.shape[1]
        self.eval()
        caches, unread = [[] for _ in self.h], idx
        for _ in range(n):
            if not cached or idx.shape[1] > self.config.block_size:
                caches, unread = None, idx[:, -self.config.block_size:]
            logits = self.lm_head(self.trunk(unread, caches)[:, -1]).float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx, unread = torch.cat([idx, token], dim=1), token
            if stop is not None and (idx[:, first:] == stop).any(dim=1).all():
                break
        self.train(training)
        return idx


# ----------------------------------------------------------------------------------------------------------------------
# The same model for many seeds at once: every weight has one more dimension in front


def ensemble_losses(weights, config, idx, places, targets):
    """GPT.forward of several models with their own rows, as one program: a tiny model leaves a GPU idle, ten do less so.

    weights: {name: (seeds, ...)}, named as GPT names them; idx (seeds, B, T); places (seeds, B, K): where the head reads;
    targets (seeds, B, K): what should follow there, or -1 -> summed cross-entropy of each seed, (seeds,). No dropout."""
    (seeds, B, T), heads = idx.shape, config.n_head

    def linear(x, name):  # (seeds, B, T, C) -> (seeds, B, T, C')
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return torch.baddbmm(bias[:, None], x.flatten(1, 2), weight.transpose(1, 2)).view(*x.shape[:3], -1)

    def norm(x, name):
        weight, bias = (weights[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:]) * weight + bias

    rows = torch.arange(seeds, device=idx.device)[:, None, None] * config.vocab_size  # where each seed's embeddings begin
    x = F.embedding(idx + rows, weights["wte.weight"].flatten(0, 1)) + weights["wpe.weight"][:, None, :T]
    for i in range(config.n_layer):
        q, k, v = (z.view(seeds * B, T, heads, -1).transpose(1, 2) for z in
                   linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), f"h.{i}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    read = torch.take_along_dim(norm(x, "ln_f"), places[..., None], 2).flatten(1, 2)
    logits = read @ weights.get("lm_head.weight", weights["wte.weight"]).transpose(1, 2)
    return F.cross_entropy(logits.transpose(1, 2).float(), targets.flatten(1), ignore_index=-1, reduction="none").sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# Parts and transfer


def part_of(name):
    """The part that a parameter belongs to: "h.0.attn.c_attn.weight" -> "attn"."""
    words = name.split(".")
    if "attn" in words:
        return "attn"
    if "mlp" in words:
        return "mlp"
    return "norm" if any(word.startswith("ln_") for word in words) else "embed"


def parse_parts(text):
    """"full" or "attn,norm" -> ("attn", "norm"); "all" is full, and train.py keeps the embeddings too."""
    parts = tuple(part.strip() for part in text.split(",")) if text not in ("full", "all") else ("attn", "mlp", "norm")
    if unknown := [part for part in parts if part not in ("attn", "mlp", "norm")]:
        raise UserError(f"unknown part {unknown[0]!r}: --transfer takes full, all, or a list of attn, mlp, norm")
    return parts


@torch.no_grad()
def transfer(target, source, parts, embeddings="random", lm_head=None, positions=None):
    """Moves parts of one GPT into another of the same shape; what does not move stays as it is in `target`.

    parts: a list of attn, mlp, norm. embeddings, lm_head (None: the same): what happens to the rows of wte and of the
    output head, whose vocabularies do not match: "random" leaves them, "mean" starts each at the mean of the source's
    rows, "keep" copies them (same vocabulary; nanoGPT's may be padded to a multiple of 64). positions: "moved", "random", or None:
    moved where the source's context is at least as long. The published code has mean, mean and moved with the whole model,
    random, random and random with parts of it (paper's implementation, on tasks). Raises UserError if the shapes differ."""
    a, b = target.config, source.config
    if (a.n_layer, a.n_embd, a.n_head) != (b.n_layer, b.n_embd, b.n_head):
        raise UserError(f"weights of a {b.n_layer}_{b.n_head}_{b.n_embd} model do not fit a "
                        f"{a.n_layer}_{a.n_head}_{a.n_embd} model")
    theirs = dict(source.named_parameters())
    for name, p in target.named_parameters():
        if part_of(name) in parts:
            p.copy_(theirs[name])
    if positions == "moved" and b.block_size < a.block_size:
        raise UserError(f"positions cannot move: the warm-up has {b.block_size} of them, and {a.block_size} are wanted")
    if positions != "random" and b.block_size >= a.block_size:
        target.wpe.weight.copy_(source.wpe.weight[:a.block_size])
    for rows, from_rows, start in ((target.wte.weight, source.wte.weight, embeddings),
                                   (target.lm_head.weight, source.lm_head.weight, lm_head or embeddings)):
        if start == "mean":
            rows.copy_(from_rows.mean(0).expand_as(rows))
        elif start == "keep":
            if b.vocab_size not in (a.vocab_size, -(-a.vocab_size // 64) * 64):
                raise UserError(f"a vocabulary of {b.vocab_size} tokens cannot be kept for one of {a.vocab_size}")
            rows.copy_(from_rows[:a.vocab_size])


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path` and moves it into place: a crash leaves the old or the new
    file, never half of one. Raises UserError if it cannot be written (a full disk)."""
    folder, name = os.path.split(os.path.abspath(path))
    scratch = None
    try:
        scratch = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")
        with open(scratch, "xb") as file:  # unlike tempfile's, as readable for others as any file here
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if scratch and os.path.exists(scratch):
            os.unlink(scratch)
        reason = getattr(error, "strerror", None) or str(error.__context__ or error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; what was there before is unharmed") from None


def save(path, model, **extra):
    """Writes the config, the weights and anything else that torch.load(weights_only=True) reads back."""
    state = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), **extra}
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path, mmap=False):
    """Reads a checkpoint, nanoGPT's ckpt.pt or a Hugging Face GPT-2 folder -> (GPTConfig, weights, all that was saved).

    No code in the file is ever run. mmap: leave the tensors on the disk until they are touched. Raises UserError."""
    try:
        if os.path.isdir(path):
            return *read_hugging_face(Path(path)), {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles; they are refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if "model_args" in state:  # nanoGPT
            known = {f.name for f in dataclasses.fields(GPTConfig)}
            config = GPTConfig(**{key: value for key, value in state["model_args"].items() if key in known})
            return config, our_names(state["model"], config), {}
        return GPTConfig(**state["config"]), state["model"], state
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a checkpoint that can be trusted: it holds more than weights") from None
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a whole nanowarm checkpoint: {reason[0]}") from None


def load(path, device="cpu"):
    """Reads any checkpoint that read_checkpoint knows -> (GPT on `device`, everything that was saved)."""
    config, weights, state = read_checkpoint(path, mmap=str(device) != "cpu")  # the optimiser's state may be large
    try:
        model = GPT(config).to(device)
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a whole nanowarm checkpoint: {str(error).strip().splitlines()[0]}") from None
    return model, state


# ----------------------------------------------------------------------------------------------------------------------
# Other people's models: Hugging Face GPT-2 folders (OpenAI's weights come as one) and nanoGPT

SAFE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Hugging Face's GPT-2 keeps these as (in, out)


def our_names(weights, config, transposed=False):
    """Weights under GPT-2's names, with any prefix, in any float type -> float32 under ours. Biases that are not there
    (nanoGPT's bias=False) are zeros, which is the same function."""
    ours = {}
    for name, tensor in weights.items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if not re.search(r"\.attn\.(masked_)?bias$", name):  # the causal mask, which old checkpoints carry
            ours[name] = (tensor.t() if transposed and TRANSPOSED.search(name) else tensor).float()
    ours.setdefault("lm_head.weight", ours["wte.weight"])
    config.tied = torch.equal(ours["lm_head.weight"], ours["wte.weight"])
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).state_dict().items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items() if name.endswith("bias")} | ours


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: eight bytes of length, a header in JSON, the numbers."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("model.safetensors is damaged")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    raw = np.memmap(path, np.uint8, mode="c", offset=8 + size)
    return {name: torch.from_numpy(raw[slice(*entry["data_offsets"])]).view(SAFE_TYPES[entry["dtype"]]).reshape(
        entry["shape"]) for name, entry in header.items() if entry["dtype"] in SAFE_TYPES}


def read_hugging_face(folder):
    """A folder with config.json and model.safetensors or pytorch_model.bin -> (GPTConfig, weights)."""
    said = json.loads((folder / "config.json").read_text())
    fixed = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "n_inner": None}
    for key, value in fixed.items():
        if said.get(key, value) not in (value, *[4 * said.get("n_embd", 0)] * (key == "n_inner")):
            raise ValueError(f"its {key} is {said[key]!r}, and only GPT-2 with {value!r} is known here")
    config = GPTConfig(said["vocab_size"], said["n_positions"], said["n_layer"], said["n_head"], said["n_embd"],
                       said.get("resid_pdrop", 0.1))
    if (folder / "model.safetensors").exists():
        weights = read_safetensors(folder / "model.safetensors")
    else:
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return config, our_names(weights, config, transposed=True)


def export(path, folder):
    """Writes a checkpoint as a Hugging Face GPT-2 folder, which GPT2LMHeadModel.from_pretrained loads."""
    model, _ = load(path)
    c, header, offset = model.config, {"__metadata__": {"format": "pt"}}, 0
    weights = {name if name == "lm_head.weight" else f"transformer.{name}":
               (tensor.t() if TRANSPOSED.search(name) else tensor).contiguous() for name, tensor in
               model.state_dict().items() if not (c.tied and name == "lm_head.weight")}
    for name, tensor in weights.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    end = 50256 if c.vocab_size == 50257 else None  # GPT-2's <|endoftext|>
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
              "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd,
              "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": None, "layer_norm_epsilon": 1e-5,
              "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "initializer_range": 0.02,
              "tie_word_embeddings": c.tied, "bos_token_id": end, "eos_token_id": end, "torch_dtype": "float32"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            file.write(tensor.numpy().data)

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from None
    if any(Path(folder).iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder")
    write_atomically(Path(folder) / "model.safetensors", write)
    write_atomically(Path(folder) / "config.json", lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))


def main():
    parser = Parser(description="Checkpoints to and from Hugging Face's GPT-2 format.")
    commands = parser.add_subparsers(dest="command", required=True)
    exporter = commands.add_parser("export", help="write a folder that GPT2LMHeadModel.from_pretrained loads")
    exporter.add_argument("checkpoint")
    exporter.add_argument("folder")
    importer = commands.add_parser("import", help="read such a folder, or nanoGPT's ckpt.pt")
    importer.add_argument("folder")
    importer.add_argument("checkpoint", help="the file to write, which --init and eval.py take")
    args = parser.parse_args()
    if args.command == "export":
        export(args.checkpoint, args.folder)
        print(f"{args.folder}: config.json and model.safetensors; it has no tokenizer of its own")
    else:
        model, _ = load(args.folder)
        save(args.checkpoint, model, stage="imported", step=0)
        c = model.config
        print(f"{args.checkpoint}: {c.n_layer}_{c.n_head}_{c.n_embd}, context {c.block_size}, vocabulary {c.vocab_size}, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    run_main(main)
