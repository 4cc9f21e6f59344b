"""GPT-2: the model, its parts, which can move between models, and checkpoints in and out.

    python model.py export out/code-dyck-s0/ckpt.pt DIR    a Hugging Face GPT-2 folder
    python model.py import DIR ckpt.pt                     such a folder, or nanoGPT's ckpt.pt

Every parameter belongs to one of the parts attn, mlp, norm and embed. What the paper calls transfer
and weight mixtures is "copy these parts".
"""
import contextlib
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import Parser, UserError, fits, read_json, reason_of, run_main, written_whole

SIZES = {  # name: (n_layer, n_head, n_embd)
    "tiny": (2, 4, 128),  # for laptops (ours)
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600), "1.3b": (24, 16, 2048)}


@dataclass
class GPTConfig:
    """The shape of a GPT. It comes from flags and files alike, so it is checked: UserError."""
    vocab_size: int
    block_size: int  # the longest context, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    tied: bool = True  # the output head shares its weight with the token embeddings

    def __post_init__(self):
        for name, most in (("vocab_size", 2 ** 22), ("block_size", 2 ** 20), ("n_layer", 1000),
                           ("n_head", 1000), ("n_embd", 2 ** 16)):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= most:
                raise UserError(f"{name} is {value!r}, and not a whole number from 1 to {most:,}")
        if self.n_embd % self.n_head:
            raise UserError(f"the width {self.n_embd} is no multiple of the {self.n_head} heads")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}, and not a number from 0 to less than 1")


def parse_size(size):
    """"gpt2" or "2_4_16" -> (n_layer, n_head, n_embd). Raises UserError."""
    if size in SIZES:
        return SIZES[size]
    if not re.fullmatch(r"\d{1,9}_\d{1,9}_\d{1,9}", size):
        raise UserError(f"unknown size {size!r}: {', '.join(SIZES)}, or layers_heads_width: 2_4_16")
    return tuple(map(int, size.split("_")))


def find_device(name=None, elsewhere=False):
    """The accelerator that is here: CUDA, Apple's MPS, or the CPU. elsewhere: a named one need not
    be here. Raises UserError."""
    here = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    if name is None:
        return next(kind for kind in here if here[kind])
    kind, _, place = name.partition(":")
    if not re.fullmatch(r"(cuda(:\d{1,3})?|mps|cpu)", name):
        raise UserError(f"unknown --device {name}: cuda, mps or cpu")
    if int(place or 0) >= here[kind] and not elsewhere:
        raise UserError(f"--device {name} is not here: without the flag it is {find_device()}")
    return name


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, start=0):
        """(B, T, n_embd) -> (B, T - start, n_embd): tokens from `start` on, see GPT.states."""
        q, k, v = split_heads(self.c_attn(x), self.n_head)
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[start:] if start else None
        y = F.scaled_dot_product_attention(q[:, :, start:], k, v, mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def split_heads(qkv, n_head):
    """(B, T, 3 * n_embd) -> q, k, v, each (B, n_head, T, n_embd / n_head)"""
    return qkv.unflatten(2, (3, n_head, -1)).permute(2, 0, 3, 1, 4).unbind()


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

    def forward(self, x, start=0):
        x = x[:, start:] + self.attn(self.ln_1(x), start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: learned positions, norms in front, tanh GELU, biases."""

    recompute = False  # True: keep only each block's input, and compute the rest again in backward

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
        for name, p in self.named_parameters():  # as GPT-2 begins; norms are ones already
            if p.dim() == 2:
                # Those that add to the residual stream, two a block, add less each.
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
            x, targets = self.counted_states(idx, targets)
        else:  # to pick what counts would wait for the GPU: it computes everything
            x, targets = self.states(idx).flatten(0, 1), targets.flatten()
        return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-1, reduction="sum")

    def states(self, idx, start=0):
        """What the output head reads of the tokens from `start` on: (B, T - start, n_embd).

        The last block alone can leave out those before: in the others, later tokens look at them.
        Where the loss counts only answers, that is a third of a step on a CPU (measured on
        haystack)."""
        x = self.drop(self.wte(idx) + self.wpe.weight[:idx.shape[1]])
        for block in self.h:
            begin = start if block is self.h[-1] else 0
            if self.recompute and self.training:
                x = checkpoint(block, x, begin, use_reentrant=False)
            else:
                x = block(x, begin)
        return self.ln_f(x)

    def counted_states(self, idx, targets):
        """What the head reads, (n, n_embd), where a target is not -1, and those targets, (n,)."""
        counts = targets != -1
        start = int(counts.any(0).int().argmax())  # the first place that counts in any row
        return self.states(idx, start)[counts[:, start:]], targets[counts]

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=0, generator=None, stop=-1):
        """Continues idx (B, T) by n tokens, or until every row has made the token `stop`.

        Temperature 0 takes the likeliest token; top_k 0 chooses among all. Call it in eval mode."""
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(n):
            logits = self.lm_head(self.states(idx[:, -self.config.block_size:])[:, -1]).float()
            if top_k:
                kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature:
                probability = (logits / temperature).softmax(-1)
                token = torch.multinomial(probability, 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
            stopped |= token[:, 0] == stop
            if stopped.all():
                break
        return idx


@contextlib.contextmanager
def attention_maps(model):
    """Yields a list to which each layer of each forward pass adds what its heads attend to:
    (B, n_head, T, T), from token (row) to token (column)."""
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


# --------------------------------------------------------------------------------------------------
# Parts, and moving them


def part_of(name):
    """The part that a parameter belongs to: "h.0.attn.c_attn.weight" -> "attn"."""
    for part, word in (("attn", ".attn."), ("mlp", ".mlp."), ("norm", "ln_")):
        if word in name:
            return part
    return "embed"


def parse_parts(text):
    """"full", "all" or "attn,norm" -> a list of parts. Raises UserError."""
    parts = ["attn", "mlp", "norm"] if text in ("full", "all") else text.replace(" ", "").split(",")
    for part in parts:
        if part not in ("attn", "mlp", "norm"):
            raise UserError(f"unknown part {part!r}: --transfer takes full, all, or a list of "
                            "attn, mlp and norm")
    return parts


@torch.no_grad()
def transfer(source, target, parts, embeddings="random", positions="fit"):
    """Copies parts of one GPT into another of the same shape; the rest of `target` stays as it is.

    embeddings, of tokens and the output head: "random" leaves the target's own, "mean" sets every
    row to the mean of the source's, "keep" copies them. positions: "random" leaves the target's
    own, "moved" copies the source's first ones and refuses a source that has too few, "fit" copies
    them if there are enough. Returns whether they moved. Raises UserError if the two do not fit."""
    old, new = source.config, target.config
    shapes = [f"{c.n_layer}_{c.n_head}_{c.n_embd}" for c in (old, new)]
    if shapes[0] != shapes[1]:
        raise UserError(f"weights of a {shapes[0]} model do not fit a {shapes[1]} model")
    if embeddings == "keep" and not 0 <= old.vocab_size - new.vocab_size < 256:  # some pad theirs
        raise UserError(f"embeddings of {old.vocab_size} tokens are not for {new.vocab_size}")
    for name, p in target.named_parameters():
        if part_of(name) in parts:
            p.copy_(source.get_parameter(name))
    enough = old.block_size >= new.block_size
    if positions == "moved" and not enough:
        raise UserError(f"{new.block_size} positions cannot come from {old.block_size}: "
                        "--positions random leaves them")
    moved = positions != "random" and enough
    if moved:
        target.wpe.weight.copy_(source.wpe.weight[:new.block_size])
    # The head first: if the target's is tied, its rows are the tokens', which come last.
    for rows, from_rows in ((target.lm_head.weight, source.lm_head.weight),
                            (target.wte.weight, source.wte.weight)):
        if embeddings == "mean":
            rows.copy_(from_rows.mean(0))
        if embeddings == "keep":
            rows.copy_(from_rows[:new.vocab_size])
    return moved


# --------------------------------------------------------------------------------------------------
# Checkpoints: ours, nanoGPT's, Hugging Face's


def save(path, model, **more):
    """Writes config, weights and more, whole or not at all. Raises UserError, also where a weight
    is not finite: from such a checkpoint no run can go on."""
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"a weight is not finite, so {path} was not written: a lower learning rate "
                        "may help")
    with written_whole(path) as file:
        torch.save({"config": vars(model.config), "model": weights, **more}, file)


def load(path, device="cpu"):
    """A checkpoint of ours, nanoGPT's, or the folder of a run or of a Hugging Face GPT-2 -> (GPT,
    what else our file holds). Nothing in a file is ever run. Raises UserError."""
    path = Path(path)
    try:
        if (path / "ckpt.pt").exists():
            path = path / "ckpt.pt"
        config, weights, state = read_folder(path) if path.is_dir() else read_file(path)
        ours = {field.name for field in fields(GPTConfig)}  # nanoGPT has others, too
        config = GPTConfig(**{key: config[key] for key in ours & config.keys()})
        weights = our_names(weights)
        config.tied = config.tied and torch.equal(weights["wte.weight"], weights["lm_head.weight"])
        model = GPT(config)
        biases = {name: p for name, p in model.state_dict().items() if name.endswith("bias")}
        model.load_state_dict(biases | weights)  # biases are zeros; nanoGPT's bias=False has none
    except UserError as error:
        raise UserError(f"{path}: {reason_of(error)}") from None
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {reason_of(error)}") from None
    except Exception as error:  # what reads a damaged file may raise any
        raise UserError(f"{path} is not a whole checkpoint: {reason_of(error)}") from None
    return model.to(device), state


def read_file(path):
    """A file with nothing but tensors, numbers and strings -> (config, weights, the rest)."""
    if path.exists() and not path.is_file():
        raise UserError("it is not a file")  # a pipe would make us wait for ever
    if path.open("rb").read(2) == b"PK" and not zipfile.is_zipfile(path):
        raise ValueError("it was cut short")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles, which are refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise ValueError("torch did not write it, or it was cut short") from None
        raise UserError(f"it holds {found[1]}, which is no tensor, number or string; nothing in it "
                        "was run") from None
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    defaults = {"tokens": 0, "source": {}, "warmed": {"tokens": 0}}  # other people's have none
    if not fits(defaults | state, {"tokens": float, "source": dict, "warmed": {"tokens": float}}):
        raise ValueError("its tokens, source or warmed are not as nanowarm writes them")
    if "model_args" in state:
        return state["model_args"], state["model"], {}  # nanoGPT's
    if not {"config", "model"} <= state.keys():
        raise UserError("it holds weights without a model's config: checkpoints of nanowarm and "
                        "nanoGPT have one, and so have Hugging Face's folders")
    return state.pop("config"), state.pop("model"), state


def our_names(weights):
    """Weights under our names, without the prefixes that others put before them, in float32."""
    ours = {}
    for name, tensor in weights.items():
        name = re.sub(r"^((module|_orig_mod|transformer)\.)+", "", name)
        if not re.search(r"\.attn\.(masked_)?bias$", name):  # the causal mask in old checkpoints
            ours[name] = tensor.float()
    for name, other in (("wte.weight", "lm_head.weight"), ("lm_head.weight", "wte.weight")):
        ours.setdefault(name, ours.get(other))  # of a tied pair, one is enough
    return ours


TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Hugging Face keeps these as (in, out)
GPT2 = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False}


def hugging_face():
    try:
        import transformers
    except ImportError:
        raise UserError("Hugging Face's folders need: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def read_folder(path):
    """A Hugging Face GPT-2 folder -> (config, weights, {})."""
    if not (path / "config.json").exists():
        raise UserError("it holds neither a run's ckpt.pt nor Hugging Face's config.json")
    # Looked at before transformers makes a model of it.
    c = {"n_inner": None, "resid_pdrop": 0.1, "tie_word_embeddings": True} | GPT2
    c |= {"vocab_size": 50257, "n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    c |= read_json(path / "config.json")
    config = GPTConfig(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"],
                       c["resid_pdrop"], c["tie_word_embeddings"])
    for key, value in (GPT2 | {"n_inner": c["n_inner"] and 4 * config.n_embd}).items():
        if c[key] != value:
            raise UserError(f"its {key} is {c[key]!r}; only {value!r} is known here")
    transformers = hugging_face()
    try:
        theirs, told = transformers.GPT2LMHeadModel.from_pretrained(
            path, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UserError(f"transformers cannot read it: {reason_of(error)}") from None
    odd = [*set(told["missing_keys"]) - {"lm_head.weight"}, *told["unexpected_keys"]]
    if odd:
        raise UserError(f"it is no whole GPT-2: its config and weights differ in {odd[:3]}")
    weights = theirs.state_dict()
    for name in filter(TRANSPOSED.search, weights):
        weights[name] = weights[name].t()
    return vars(config), weights, {}


def as_hugging_face(model):
    """The same model as one of transformers'."""
    c = model.config
    end = 50256 if c.vocab_size == 50257 else None  # GPT-2's <|endoftext|>
    transformers = hugging_face()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        tie_word_embeddings=c.tied, bos_token_id=end, eos_token_id=end, **GPT2))
    weights = {}
    for name, tensor in model.state_dict().items():
        ours = name if name == "lm_head.weight" else f"transformer.{name}"
        weights[ours] = tensor.t() if TRANSPOSED.search(name) else tensor
    theirs.load_state_dict(weights)
    return theirs


def main():
    parser = Parser(description="Checkpoints to and from Hugging Face's GPT-2 folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    exporter = commands.add_parser("export", help="write a folder that transformers loads")
    exporter.add_argument("checkpoint")
    exporter.add_argument("folder")
    importer = commands.add_parser("import", help="read such a folder, or nanoGPT's ckpt.pt")
    importer.add_argument("source")
    importer.add_argument("checkpoint", help="the file to write, which --init and eval.py take")
    args = parser.parse_args()
    if args.command == "import":
        model, _ = load(args.source)
        save(args.checkpoint, model, stage="imported", step=0)
        print(f"{args.checkpoint}: {sum(p.numel() for p in model.parameters()):,} parameters")
        return
    theirs = as_hugging_face(load(args.checkpoint)[0])
    try:
        if Path(args.folder).exists() and any(Path(args.folder).iterdir()):
            raise UserError(f"{args.folder} is not empty: choose another folder")
        theirs.save_pretrained(args.folder)
    except OSError as error:
        raise UserError(f"cannot write {args.folder}: {reason_of(error)}") from None
    print(f"{args.folder}: config.json and model.safetensors; it has no tokenizer of its own")


if __name__ == "__main__":
    run_main(main)
