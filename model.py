"""The GPT: GPT-2 exactly, its loss, its parts (what can move between models), generation, checkpoints.

A model is a sum of named parts: every parameter belongs to exactly one of attn, mlp, norm, embed. Transfer and weight
mixtures are "copy these parts", later ablations "do something to these parts".
"""
import dataclasses
import math
import os
import pickle
import re
import tempfile
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError

SIZES = {  # name: n_layer, n_head, n_embd
    "tiny": (4, 4, 128),  # for CPUs (ours)
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
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


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

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm, tanh GELU, biases. Weights are drawn from torch's global generator."""

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

    def trunk(self, idx):
        """Everything but the output head: (B, T) tokens -> (B, T, n_embd)."""
        x = self.drop(self.wte(idx) + self.wpe.weight[:idx.shape[1]])
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def counted(self, idx, targets):
        """Logits (n, vocab_size) and targets (n,) of the n positions that count, those whose target is not -1: the
        output head is paid for where it is needed."""
        where = targets != -1
        return self.lm_head(self.trunk(idx)[where]), targets[where]

    def forward(self, idx, targets=None, reduction="mean"):
        """Logits (B, T, vocab_size), or with targets (B, T) the cross-entropy in nats over the positions that count."""
        if targets is None:
            return self.lm_head(self.trunk(idx))
        logits, wanted = self.counted(idx, targets)
        return F.cross_entropy(logits.float(), wanted, reduction=reduction)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None, generator=None):
        """Continues idx (B, T) by n tokens; temperature 0 takes the likeliest. Sees the last block_size tokens."""
        training = self.training
        self.eval()
        for _ in range(n):
            logits = self.lm_head(self.trunk(idx[:, -self.config.block_size:])[:, -1]).float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        self.train(training)
        return idx


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
    """"full" or "attn,norm" -> ("attn", "norm")"""
    parts = ("attn", "mlp", "norm") if text == "full" else tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in parts if part not in ("attn", "mlp", "norm")]:
        raise UserError(f"unknown part {unknown[0]!r}: --transfer takes full, or a list of attn, mlp, norm")
    return parts


@torch.no_grad()
def transfer(target, source, parts, embeddings="random"):
    """Moves parts of one GPT into another of the same shape; what does not move stays as it is in `target`.

    parts: a list of attn, mlp, norm. embeddings: what happens to the rows of wte and lm_head, whose vocabularies do not
    match: "random" leaves them, "mean" starts each at the mean of the source's rows (paper, on algorithmic tasks),
    "keep" copies them (same vocabulary). Position embeddings move where the source's context is at least as long
    (paper). Raises UserError if the shapes differ."""
    a, b = target.config, source.config
    if (a.n_layer, a.n_embd, a.n_head) != (b.n_layer, b.n_embd, b.n_head):
        raise UserError(f"weights of a {b.n_layer}_{b.n_head}_{b.n_embd} model do not fit a "
                        f"{a.n_layer}_{a.n_head}_{a.n_embd} model")
    theirs = dict(source.named_parameters())
    for name, p in target.named_parameters():
        if part_of(name) in parts:
            p.copy_(theirs[name])
    if b.block_size >= a.block_size:
        target.wpe.weight.copy_(source.wpe.weight[:a.block_size])
    if embeddings == "mean":
        target.wte.weight.copy_(source.wte.weight.mean(0).expand_as(target.wte.weight))
        target.lm_head.weight.copy_(source.lm_head.weight.mean(0).expand_as(target.lm_head.weight))
    elif embeddings == "keep":
        if a.vocab_size != b.vocab_size:
            raise UserError(f"a vocabulary of {b.vocab_size} cannot be kept for one of {a.vocab_size}")
        target.wte.weight.copy_(source.wte.weight)
        target.lm_head.weight.copy_(source.lm_head.weight)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path` and moves it into place: a crash leaves the old or the new
    file, never half of one. Raises UserError if it cannot be written (a full disk)."""
    folder, name = os.path.split(os.path.abspath(path))
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        with os.fdopen(handle, "wb") as file:
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


def load(path, device="cpu"):
    """Reads a checkpoint -> (GPT on `device`, everything that was saved). No code in the file is ever run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles; they are refused below
            state = torch.load(path, map_location=device, weights_only=True)
        config = GPTConfig(**state["config"])
        model = GPT(config).to(device)
        model.load_state_dict(state["model"])
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a checkpoint that can be trusted: it holds more than weights") from None
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is not a whole nanowarm checkpoint: {reason[0]}") from None
    return model, state
