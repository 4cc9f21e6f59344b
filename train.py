"""One run: warm up on procedural data, transfer, continue on what is wanted.

    python train.py --warmup dyck                   a small GPT on this machine, then the embedded code corpus
    python train.py --warmup none                   the same without the warm-up: compare
    python train.py --warmup set --data haystack    an algorithmic task, at its published settings
    python train.py --preset c4 --warmup union      a published semantic run (python data.py prepare c4 comes first)
    torchrun --nproc_per_node=8 train.py ...        on eight GPUs: the same global batch, the same result
    python train.py ... --plan                      trains nothing: parameters, tokens, FLOPs, memory, time
    python train.py ... --bench                     how fast a step is, beside other people's code

Read from the top: the settings, how unset ones are filled in, one training stage, and the run that strings two stages
together. The random numbers of a step depend on the seed and the step alone, so a run that was stopped goes on exactly.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import typing
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import (CHARACTERS, PUBLISHED, Parser, UserError, default_tokenizer, kind_of, load_tokenizer, make_source, parse_count,
                  parse_member, parse_rules, read_meta, run_main, RULES, TASKS)
from eval import evaluate, find_device, known_tokenizer, perplexity
from model import (GPT, GPTConfig, MOST_LOGITS, TRANSPOSED, ensemble_losses, load, parse_parts, parse_size, read_checkpoint,
                   save, transfer, write_atomically)

# ----------------------------------------------------------------------------------------------------------------------
# Settings: every field is a flag. None means: it depends on the data and the device, see `resolve`.


def flag(default, text, group=None, parse=None):
    return field(default=default, metadata={"help": text, "group": group, "parse": parse})


@dataclass
class Settings:
    warmup: str | None = flag(None, "procedural rule or mixture to warm up on (data.py list), none, or text: as many "
                              "tokens of other data of the same corpus (default dyck)", "warm-up")
    warmup_steps: int | None = flag(None, "optimiser steps of warm-up")
    warmup_tokens: int | None = flag(None, "the same in tokens: 4M", parse=parse_count)
    warmup_batch_size: int | None = flag(None, "sequences per warm-up step, over all processes")
    warmup_lr: float | None = flag(None, "learning rate of the warm-up")
    warmup_lr_schedule: str | None = flag(None, "cosine, linear or constant (default: cosine before tasks and on a CPU; in "
                                          "presets, and on a GPU before text, constant)")
    warmup_lr_ramp: int | None = flag(None, "steps of linear ramp of the warm-up's learning rate")
    warmup_weight_decay: float = flag(0.1, "weight decay of the warm-up")
    warmup_dropout: float | None = flag(None, "dropout of the warm-up (default 0; in presets 0.1)")
    warmup_block_size: int | None = flag(None, "context of the warm-up model (default: as long as its sequences)")
    warmup_curriculum: bool = flag(False, "input length grows from 2 by 2 each time accuracy passes 0.99")

    init: str | None = flag(None, "start from this saved warm-up and skip stage 1", "transfer")
    attn_from: str | None = flag(None, "weight mixture: take the attention from this checkpoint (and its positions)")
    mlp_from: str | None = flag(None, "weight mixture: take the MLPs from this checkpoint")
    transfer: str | None = flag(None, "what moves over: full, or a list of attn, mlp, norm (default attn before haystack, else "
                                "full); all: the embeddings too, to go on from a model of the same vocabulary (its size, "
                                "context and tokenizer are the default)")
    embeddings: str | None = flag(None, "token embeddings after transfer: random, mean (of the warm-up's rows), or "
                                  "keep (same vocabulary; default keep after text, else random)")
    lm_head: str | None = flag(None, "the untied output head's rows after transfer, likewise (default: as --embeddings)")
    positions: str | None = flag(None, "position embeddings after transfer: moved or random (default moved where the "
                                 "warm-up's context is as long)")

    preset: str | None = flag(None, "the settings of a published run: c4, codeparrot, deepmind_math, wikitext103, each "
                              "also with -350m and -1.3b; every other flag overrides", "data and model")
    data: str | None = flag(None, "task, corpus (data.py list) or path to text to train on (default code)")
    tokenizer: str | None = flag(None, "bytes, or an encoding that tiktoken knows, such as gpt2 (default: bytes, or the "
                                 "published one)")
    size: str | None = flag(None, "tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, 1.3b, or layers_heads_width: 2_4_16")
    block_size: int | None = flag(None, "context in tokens")
    tied: bool | None = flag(None, "output head shares its weight with the token embeddings (the warm-up always does)")
    dropout: float | None = flag(None, "dropout (default 0; in presets 0.1)")

    steps: int | None = flag(None, "optimiser steps; 0: no more than the warm-up and what it moves", "optimisation")
    tokens: int | None = flag(None, "the same in tokens: 655M", parse=parse_count)
    batch_size: int | None = flag(None, "sequences per step, over all processes")
    grad_accum: int = flag(1, "micro-batches that each process splits its share of a step into (both stages)")
    lr: float | None = flag(None, "learning rate")
    lr_schedule: str = flag("cosine", "cosine, linear or constant")
    lr_ramp: int | None = flag(None, "steps of linear ramp of the learning rate")
    min_lr: float | None = flag(None, "where the schedule ends")
    weight_decay: float | None = flag(None, "on matrices and embeddings; biases and layer norms are spared")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.999, "AdamW")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    sharpen: float = flag(0.0, "in place of a warm-up: so many times the attention's mean entropy is added to the loss")

    seed: int = flag(0, "of weights, data order and held-out examples", "run")
    seeds: str | None = flag(None, "several: 10 for ten from --seed on, or a list such as 0,3,7; each has a folder of its "
                             "own; on a GPU they are trained as one program. In --init, SEED stands for the seed")
    device: str | None = flag(None, "cuda, mps or cpu (default: what is there)")
    dtype: str | None = flag(None, "float32 or bfloat16 (autocast; default bfloat16 on a GPU that has it)")
    compile: bool | None = flag(None, "torch.compile (default on CUDA)")
    recompute: bool | None = flag(None, "activation checkpointing: a third more work, far less memory")
    zero: bool = flag(False, "each process keeps its share of the optimiser's state alone")
    eval_every: int | None = flag(None, "steps between evaluations (default: a fifth of the stage)")
    eval_batches: int | None = flag(None, "batches of each evaluation")
    save_every: int | None = flag(None, "steps between checkpoints (default: a tenth of the stage)")
    log_every: int = flag(50, "steps between log lines")
    out: str | None = flag(None, "folder of this run (default out/DATA-WARMUP-sSEED)")
    resume: bool = flag(False, "go on with the run in --out where it stopped")
    plan: bool = flag(False, "train nothing: print parameters, tokens, FLOPs, memory and time")
    bench: bool = flag(False, "train nothing that is kept: steps per second beside the transformers library's, and the floor")
    tflops: float | None = flag(None, "for the time in --plan: what one GPU really does, in 1e12 operations a second")


# What may differ between a run and its resumption; everything else defines the run.
OPERATIONAL = ("device", "compile", "recompute", "zero", "eval_every", "save_every", "log_every", "grad_accum", "out",
               "resume", "plan", "bench", "tflops", "seeds")

# The published semantic runs (paper, "Semantic pretraining"). What is None in the settings is taken from here.
PRESETS = {
    "c4": dict(data="c4", block_size=2048, batch_size=32, steps=10_000, lr=5e-4, weight_decay=0.0),
    "codeparrot": dict(data="codeparrot", block_size=1024, batch_size=48, steps=20_000, lr=5e-5, min_lr=0.0,
                       weight_decay=0.01),
    "deepmind_math": dict(data="deepmind_math", block_size=512, batch_size=64, steps=50_000, lr=5e-5, min_lr=0.0,
                          weight_decay=0.01),
    "wikitext103": dict(data="wikitext103", block_size=1024, batch_size=32, steps=10_000, lr=5e-4, weight_decay=0.0)}
for corpus in list(PRESETS):  # WikiText's numbers are ours, after C4's
    PRESETS[corpus] |= dict(size="gpt2", lr_ramp=0, dropout=0.1, warmup_dropout=0.1, warmup_lr=5e-4,
                            warmup_lr_schedule="constant", warmup_lr_ramp=0, eval_batches=20)
    PRESETS[f"{corpus}-350m"] = PRESETS[corpus] | dict(size="24_16_1024")
    PRESETS[f"{corpus}-1.3b"] = PRESETS[corpus] | dict(size="1.3b", recompute=True)
PRESETS["c4-1.3b"]["steps"] = 160_000  # 10.5 billion tokens, the paper's largest run; no other larger one is known

AT_LEAST = {
    1: ("warmup_steps", "warmup_tokens", "warmup_batch_size", "warmup_block_size", "block_size", "tokens", "batch_size",
        "grad_accum", "log_every", "eval_every", "eval_batches", "save_every"),
    0: ("steps", "sharpen", "warmup_lr", "warmup_lr_ramp", "warmup_weight_decay", "warmup_dropout", "dropout", "lr", "lr_ramp",
        "min_lr", "weight_decay", "beta1", "beta2", "grad_clip", "seed")}
CHOICES = {"warmup_lr_schedule": ("cosine", "linear", "constant"), "lr_schedule": ("cosine", "linear", "constant"),
           "embeddings": ("random", "mean", "keep"), "lm_head": ("random", "mean", "keep"),
           "positions": ("moved", "random"), "dtype": ("float32", "bfloat16")}


def parse_arguments(argv):
    """The command line -> (Settings, the flags that were given)."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    group = None
    for f in dataclasses.fields(Settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = next(t for t in (typing.get_args(f.type) or (f.type,)) if t is not type(None))
        text = f.metadata["help"] + ("" if f.default in (None, False) else f" (default {f.default})")
        if kind is bool:
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(f"--{f.name}", type=f.metadata["parse"] or kind, help=text,
                               metavar="COUNT" if f.metadata["parse"] else kind.__name__.upper())
    given = vars(parser.parse_args(argv))
    return Settings(**given), given


def check(s):
    """Refuses values that no run can have. Raises UserError."""
    for least, names in AT_LEAST.items():
        for name in names:
            if (value := getattr(s, name)) is not None and not least <= value < math.inf:
                raise UserError(f"--{name} {value} is not accepted: at least {least}")
    for name, choices in CHOICES.items():
        if getattr(s, name) not in (None, *choices):
            raise UserError(f"--{name} {getattr(s, name)} is not accepted: {', '.join(choices)}")
    for name in ("warmup_dropout", "dropout", "beta1", "beta2"):
        if (getattr(s, name) or 0) >= 1:
            raise UserError(f"--{name} {getattr(s, name)} is not accepted: less than 1")
    if s.seed >= 2 ** 32:
        raise UserError(f"--seed {s.seed} is not accepted: less than 2**32")
    if s.tflops is not None and not 0 < s.tflops < math.inf:
        raise UserError(f"--tflops {s.tflops} is not accepted: more than 0")
    if s.transfer is not None:
        parse_parts(s.transfer)
    if s.sharpen and (s.compile or s.recompute):
        raise UserError("--sharpen reads the attention's weights: it excludes --compile and --recompute")
    if s.transfer == "all" and not s.init:
        raise UserError("--transfer all goes on from a whole model: name it with --init")
    if s.preset and kind_of(s.data) != "text":
        raise UserError(f"--preset {s.preset} is for text, and --data {s.data} is not: tasks bring their own settings")
    if s.size:
        parse_size(s.size)
    if s.warmup not in (None, "none") and (s.init or s.attn_from or s.mlp_from):
        raise UserError("--warmup and --init, --attn_from or --mlp_from exclude each other: choose one")
    if kind_of(s.data) == "rule":
        raise UserError(f"--data {s.data} is a procedural rule: use --warmup for rules, --data for a task or a corpus")
    if s.warmup not in (None, "none", "text") and kind_of(s.warmup) != "rule":
        raise UserError(f"--warmup {s.warmup} is not a procedural rule: there are {', '.join(RULES)}, none and text")
    if s.warmup == "text" and kind_of(s.data) != "text":
        raise UserError(f"--warmup text needs a corpus, and --data {s.data} is a task")
    if s.warmup_curriculum and (s.warmup in ("text", "none") or "eca" in str(s.warmup)):
        raise UserError("--warmup_curriculum needs a procedural warm-up whose input can grow from length 2")


def run_name(s):
    """"code-dyck-s0", and whatever else was asked for: "code-dyck-s0-transfer=attn"."""
    base = s.preset or Path(s.data).resolve().name
    if s.preset and s.data != PRESETS[s.preset]["data"]:
        base += f"-{Path(s.data).resolve().name}"
    name = f"{base}-{s.warmup}-s{s.seed}"
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        if value != f.default and f.name not in (*OPERATIONAL, "preset", "data", "warmup", "seed"):
            name += f"-{f.name}={value}"
    name = re.sub(r"[^\w.=+*,-]+", "_", name)
    return name if len(name) < 150 else f"{name[:140]}-{zlib.crc32(name.encode()):08x}"


def published_warmup(s, asked_block_size):
    """The warm-up of the published semantic runs: fills in what a spec leaves open, and its steps and batch."""
    names = {name for _, name, _ in parse_rules(s.warmup)[1]} if s.warmup != "text" else {"dyck"}
    long = names <= {"dyck", "dyck_shuffle", "eca"}
    if ":" not in s.warmup.removeprefix("shuffled:") and s.warmup != "text":
        length = min(2048, asked_block_size // 2 * 2) if asked_block_size else 2048
        s.warmup += f":length={length}" if names == {"eca"} else f":k=64,length={length}" if long else ":length=64"
    if s.warmup == "text":  # as many tokens as those of dyck
        return dict(warmup_steps=max(1, round(500 * 2048 / s.block_size)), warmup_batch_size=32)
    return dict(warmup_steps=500, warmup_batch_size=32) if long else dict(warmup_steps=2500, warmup_batch_size=64)


def resolve(s):
    """Fills in what was left open: the preset, the published settings for tasks, what suits the device for text."""
    for tokens, steps in (("tokens", "steps"), ("warmup_tokens", "warmup_steps")):
        if getattr(s, tokens) is not None and getattr(s, steps) is not None:
            raise UserError(f"--{tokens} and --{steps} say the same thing twice: choose one")
    if s.preset not in (None, *PRESETS):
        raise UserError(f"--preset {s.preset} is not one of {', '.join(PRESETS)}")
    asked_block_size, s = s.block_size, dataclasses.replace(s)
    s.data = s.data or (PRESETS[s.preset]["data"] if s.preset else "code")
    check(s)
    if world() > 1 and "RANK" not in os.environ and not s.plan:
        raise UserError(f"WORLD_SIZE is {world()}, but RANK is not set: start several processes with torchrun")
    if s.warmup is None:
        s.warmup = "none" if s.init or s.attn_from or s.mlp_from else "dyck"
    s.out = s.out or f"out/{run_name(s)}"
    s.device = s.device if s.plan and s.device == "cuda" else find_device(s.device)  # a plan may be made elsewhere
    cuda = s.device.startswith("cuda")
    task = kind_of(s.data) == "task" and parse_member(s.data, TASKS)[0]

    default = {}
    if s.init or s.attn_from or s.mlp_from:  # the shape is that of the checkpoint
        config, _, state = read_checkpoint(s.init or s.attn_from or s.mlp_from, mmap=True)
        default["size"] = f"{config.n_layer}_{config.n_head}_{config.n_embd}"
        if s.transfer == "all":
            default |= dict(tied=config.tied, block_size=config.block_size, embeddings="keep")
            if default_tokenizer(s.data) != "characters":
                default["tokenizer"] = known_tokenizer(config, state)
    if s.preset:
        default = PRESETS[s.preset] | default
    for name, value in default.items():
        if getattr(s, name) is None:
            setattr(s, name, value)

    if task == "multiplication":  # paper, "Algorithmic tasks"
        default = dict(size="4_8_512", batch_size=64, warmup_steps=2500, warmup_batch_size=64, warmup_lr=5e-4)
    elif task:  # the warm-up is ours: a model this small learns a rule in no less, and what was not learned does not help
        default = dict(size="2_4_16", batch_size=1000, warmup_steps=10_000, warmup_batch_size=128, warmup_lr=5e-3,
                       warmup_lr_schedule="cosine", warmup_lr_ramp=200)
    elif cuda:  # text on a GPU: GPT-2 small (published rate; steps: ours, for corpora of about 10 MB)
        default = dict(size="gpt2", batch_size=32, block_size=1024, steps=2000, lr=5e-4, lr_ramp=100, warmup_steps=500,
                       warmup_batch_size=32, warmup_lr=5e-4)
    else:  # text on two CPU cores, in less than five minutes: the lowest loss of what was tried (ours)
        default = dict(size="tiny", batch_size=8, block_size=128, steps=3000, lr=2e-3, lr_ramp=100, warmup_steps=2000,
                       warmup_batch_size=8, warmup_lr=3e-3, warmup_lr_schedule="cosine", warmup_lr_ramp=200, eval_batches=40)
    if task:  # published, but for what moves over: see README, "What reproduces"
        default |= dict(steps=10000, lr=1e-3, lr_ramp=500, min_lr=0.0, weight_decay=1e-3, tied=False, embeddings="random",
                        transfer="attn" if task == "haystack" else "full",
                        eval_batches=-(-4000 // (s.batch_size or default["batch_size"])))
    else:
        default |= dict(min_lr=(default["lr"] if s.lr is None else s.lr) / 10, weight_decay=0.1, tied=True,
                        embeddings="keep" if s.warmup == "text" else "random")
    default = dict(warmup_lr_schedule="constant", warmup_lr_ramp=0, eval_batches=20, transfer="full") | default
    default |= dict(dtype="bfloat16" if cuda and (s.plan or torch.cuda.is_bf16_supported()) else "float32",
                    compile=cuda and not s.sharpen,
                    dropout=0.0, warmup_dropout=0.0, recompute=False, tokenizer=default_tokenizer(s.data))
    if s.preset and s.warmup != "none":
        default |= published_warmup(s, asked_block_size)
    for name, value in default.items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    if (s.lm_head or s.positions) and s.warmup == "none" and not (s.init or s.attn_from or s.mlp_from):
        raise UserError("--lm_head and --positions say how a warm-up is taken up, and there is none")
    if s.tied and s.lm_head not in (None, s.embeddings):
        raise UserError(f"--lm_head {s.lm_head} is not accepted: the head shares its weight with the token embeddings "
                        f"({s.embeddings}); --no-tied gives it its own")
    # Warm-up sequences as long as what follows, of whatever length up to that, so that trained positions move over (ours).
    if s.warmup in ("dyck", "dyck_shuffle", "eca"):
        kinds = "k=8," * (s.warmup == "dyck" and not task and not cuda)  # as many as so small a model learns in the time
        s.warmup += f":{kinds}length={max(2, block_size(s) + block_size(s) % 2 if task else s.block_size - s.block_size % 2)}"
    elif task and s.warmup in RULES:
        s.warmup += f":length=2-{max(2, block_size(s) // 2)}"
    if task and s.warmup != "none" and not s.warmup_block_size:
        s.warmup_block_size = max(warmup_block_size(s), block_size(s))
    if s.init or s.attn_from or s.mlp_from or s.warmup == "none":
        s.warmup_steps = 0
    elif s.warmup_tokens:
        s.warmup_steps = max(1, round(s.warmup_tokens / s.warmup_batch_size / warmup_block_size(s)))
    if s.tokens:
        s.steps = max(1, round(s.tokens / s.batch_size / block_size(s)))
    s.tokens = s.warmup_tokens = None  # a run is defined by its steps
    return s


def block_size(s):
    """Tokens per row of the training stage; a task's rows are as long as they are."""
    return make_source(s.data, block_size=s.block_size).block_size if kind_of(s.data) == "task" else s.block_size


def warmup_block_size(s):
    """Tokens per row of the warm-up."""
    return s.block_size if s.warmup == "text" else make_source(s.warmup, block_size=s.warmup_block_size).block_size


# ----------------------------------------------------------------------------------------------------------------------
# Processes, signals, files


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def total(*values):
    """The sums of some numbers over all processes."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU, over gloo: the accelerator is not kept waiting
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather(value):
    """What every process has, in all of them."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def agree(what, value):
    """Raises UserError in every process unless all have the same value."""
    for other, theirs in enumerate(values := gather(value)):
        if theirs != values[0]:
            raise UserError(f"processes 0 and {other} do not have the same {what}: {values[0]} and {theirs}; --out "
                            "and the corpora have to be on a disk that all machines share, or be copied to each",
                            everywhere=True)


@contextlib.contextmanager
def failing_together():
    """A UserError in the block, in whichever process, is raised in all of them after it."""
    try:
        yield
        problem = None
    except UserError as error:
        problem = f"{error}" + f" (process {rank()})" * (rank() > 0)
    if problem := next(filter(None, gather(problem)), None):
        raise UserError(problem, everywhere=True)


@contextlib.contextmanager
def first_process_first():
    """The block runs in process 0, then in the others."""
    if world() > 1 and rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if world() > 1 and rank() == 0:
            dist.barrier()


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


class Stopped(Exception):
    """SIGINT or SIGTERM came; the step was finished and saved."""


SIGNALS = []  # those that came


def write_json(path, value):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path, *keys):
    """A JSON object from a file that must have these keys."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict) or not isinstance(value[keys[0]], dict) or not value.keys() >= set(keys):
            raise ValueError("not written by train.py")
        return value
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


class Log:
    """log.jsonl: one object per line. On resuming, lines after the checkpoint's (stage, step) are dropped."""

    def __init__(self, path, stage=None, step=0):
        self.path, kept = path, []
        if stage and path.exists():
            for line in path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be half a line
                    entry = json.loads(line)
                    earlier = (entry["stage"], stage) == ("warmup", "train")
                    if earlier or entry["stage"] == stage and entry["step"] <= step:
                        kept.append(line + "\n")
        if rank() == 0:
            write_atomically(path, lambda file: file.write("".join(kept).encode()))

    def add(self, **entry):
        if rank() == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is unharmed, "
                                "--resume goes on from it") from None


def describe_environment():
    """What config.json says beside the settings."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device_name": device, "processes": world(), "commit": commit or None}


RUN_FILES = ("config.json", "log.jsonl", "warmup.pt", "ckpt.pt", "result.json")


def open_run(s):
    """Makes the run's folder or checks that it holds this very run. Returns its result if it is finished."""
    out = Path(s.out)
    settings = {key: value for key, value in dataclasses.asdict(s).items() if key not in ("out", "resume")}
    scratch = [p for name in RUN_FILES for p in out.glob(f".{name}.*")]  # what a kill left of a file being written
    if (out / "config.json").exists():
        there = read_json(out / "config.json", "settings")["settings"]
        differs = [key for key in settings if key not in OPERATIONAL and there.get(key) != settings[key]]
        if differs:
            raise UserError(f"{out} holds a run with other settings ({differs[0]} {there.get(differs[0])}, here "
                            f"{settings[differs[0]]}): choose another --out")
        if (out / "result.json").exists():
            return read_json(out / "result.json", "settings", "tokens", "val_loss")
        if not s.resume and rank() == 0:
            raise UserError(f"{out} holds this run, unfinished: add --resume to go on with it, or choose another --out")
    elif out.exists() and (not out.is_dir() or set(out.iterdir()) - set(scratch)):
        raise UserError(f"{out} is there and is not a run: choose another --out")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {out}: {error.strerror}") from None
        write_json(out / "config.json", {"settings": settings, "environment": describe_environment()})
    if rank() == 0:
        for path in scratch:
            path.unlink(missing_ok=True)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# One stage of training


@dataclass
class Stage:
    """What the two stages of a run differ in."""
    name: str  # "warmup" or "train"
    steps: int
    batch_size: int
    lr: float
    lr_schedule: str
    lr_ramp: int
    min_lr: float
    weight_decay: float
    dropout: float
    eval_every: int
    save_every: int
    file: Path  # its checkpoint

    def lr_at(self, step):
        """Linear ramp, then cosine, linear or constant from lr to min_lr."""
        if step < self.lr_ramp:
            return self.lr * (step + 1) / self.lr_ramp
        done = (step - self.lr_ramp) / max(1, self.steps - self.lr_ramp)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.lr_schedule]
        return self.min_lr + (self.lr - self.min_lr) * left if self.lr_schedule != "constant" else self.lr


def make_optimizer(model, stage, s):
    """AdamW; weight decay on matrices and embeddings alone (GPT-2's habit, and the published runs' on tasks and C4)."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": stage.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    settings = dict(lr=stage.lr, betas=(s.beta1, s.beta2), fused=s.device != "mps")
    if s.zero and world() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here, as it takes long and warns when imported
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict, and what torch's sharded optimiser leaves to do after it."""
    optimizer.load_state_dict(state)
    if hasattr(optimizer, "optim"):
        optimizer.state.clear()  # a second copy of what optimizer.optim.state holds
        for p, entry in optimizer.optim.state.items():  # it is put on the CPU, where fused AdamW on a GPU cannot use it
            entry["step"] = entry["step"].to(p.device)


LIKE_ROWS = 1024, 8  # a part has at least about so many tokens, a micro-batch at most so many parts (measured, ours)


def rows_of_like_length(x, y):
    """A micro-batch in parts of rows of like length, each without what follows the last token that counts.

    Nothing reads what is left out, so the summed loss is the same. On a CPU, pads cost as much as tokens do."""
    lengths = x.shape[1] - (y[:, ::-1] != -1).argmax(axis=1)
    if lengths.min() == lengths.max():
        return [(x[:, :lengths[0]], y[:, :lengths[0]])]
    parts = np.array_split(lengths.argsort(kind="stable"), np.clip(x.size // LIKE_ROWS[0], 1, min(LIKE_ROWS[1], len(x))))
    return [(x[rows, :lengths[rows].max()], y[rows, :lengths[rows].max()]) for rows in parts]


def step_batches(source, step, stage, s):
    """This process's micro-batches of one step, each (x, y, (its place in the run, its part)).

    The step's rows are step * batch_size and on, whatever the number of processes and micro-batches."""
    n = s.grad_accum * world()
    batches = []
    for i in range(s.grad_accum):
        place = step * n + i * world() + rank()
        x, y = source.batch(place, stage.batch_size // n)
        for part, pair in enumerate(rows_of_like_length(x, y) if s.device == "cpu" else [(x, y)]):
            x, y = (torch.from_numpy(a).pin_memory() if s.device.startswith("cuda") else torch.from_numpy(a) for a in pair)
            batches.append((x, y, (place, part)))
    return batches


def batches_ahead(source, first, stage, s):
    """Yields step_batches for each step from `first`; the next one is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(step_batches, source, first, stage, s)
        for step in range(first, stage.steps):
            batches = ready.result()
            ready = pool.submit(step_batches, source, step + 1, stage, s)
            yield batches


CURRICULUM_EVERY = 20  # steps between looks at the accuracy (ours)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


def autocast_for(s):
    if s.dtype == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(s.device.partition(":")[0], torch.bfloat16)


def compile_trunk(model, x, y, autocast):
    """torch.compile on everything but the output head; where it cannot run, one warning and on without."""
    try:
        model.trunk = torch.compile(model.trunk)
        with autocast():
            loss = model(x, y)
        loss.backward()
    except Exception as error:  # a missing compiler, an unsupported platform: torch raises many kinds
        model.__dict__.pop("trunk", None)  # the class's own method again
        if rank() == 0:
            print(f"warning: torch.compile cannot run here ({type(error).__name__}): going on without it",
                  file=sys.stderr)
    model.zero_grad(set_to_none=True)


def attention_entropy(model, y):
    """The entropy (nats) of what each head attends to in the forward pass before, which left its weights there: averaged
    over layers, heads and the positions up to the last that counts, summed over the rows of y (B, T)."""
    length = y.shape[1] - (y != -1).flip(1).int().argmax(1)
    read = torch.arange(y.shape[1], device=y.device) < length[:, None]
    entropy = sum(torch.special.entr(block.attn.weights.clamp_min(1e-9)).sum(-1).mean(1) for block in model.h)
    return ((entropy * read).sum(1) / length).sum() / len(model.h)


def accumulate_gradients(net, micro_batches, counted, stage, s, autocast):
    """Backward through each micro-batch; returns this process's share of the step's loss (a tensor)."""
    loss = 0.0
    sharpen, model = s.sharpen if stage.name == "train" else 0.0, getattr(net, "module", net)
    for block in model.h:
        block.attn.weights = True if sharpen else None
    for i, (x, y, place) in enumerate(micro_batches):
        if stage.dropout:  # masks depend on the seed, the stage and the micro-batch's place in the run alone
            torch.manual_seed(int(np.random.SeedSequence((s.seed, stage.name == "train", *place)).generate_state(1)[0]))
        last = i == len(micro_batches) - 1  # with DDP, gradients are synchronised once per step
        with contextlib.nullcontext() if last or world() == 1 else net.no_sync():
            with autocast():
                part = net(x.to(s.device, non_blocking=True), y.to(s.device, non_blocking=True), reduction="sum")
            part = part / max(counted, 1)
            penalty = sharpen * attention_entropy(model, y.to(s.device)) / stage.batch_size if sharpen else 0.0
            ((part + penalty) * world()).backward()  # DDP takes the mean over the processes
        loss = loss + part.detach()
    for block in model.h:
        block.attn.weights = None
    return loss


def train(s, stage, model, make, log, state=None, extra=None):
    """Trains `model` for one stage; returns the last evaluation, and saves stage.file on the way and at the end.

    make(split, length) gives the Source of a split; length is None without a curriculum. state: a checkpoint of this
    stage to go on from. extra: what the checkpoint holds beside weights, optimiser and progress."""
    device, autocast, label = s.device, autocast_for(s), "1/2 warm-up" if stage.name == "warmup" else "2/2 train"
    model.to(device)
    length = 2 if stage.name == "warmup" and s.warmup_curriculum else None
    model.recompute, optimizer = s.recompute, make_optimizer(model, stage, s)
    first, before, result, started_at = 0, 0.0, None, None
    if state:
        load_optimizer(optimizer, state["optimizer"])
        first, length, before = state["step"], state["length"], state["seconds"]
        result, started_at = state["evaluation"], state["first_evaluation"]
    source, val, share = make("train", length), make("val", length), world() * s.grad_accum
    if s.compile and first < stage.steps:
        x, y, _ = step_batches(source, first, stage, s)[0]
        compile_trunk(model, x.to(device), y.to(device), autocast)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world() > 1 else model
    began, tokens_per_step = time.time(), stage.batch_size * source.block_size

    def measure():
        return evaluate(model, val, stage.batch_size // share, s.eval_batches * share, device, autocast)

    def checkpoint(step):
        if s.zero and world() > 1:
            optimizer.consolidate_state_dict()  # to process 0
        if rank() == 0:
            save(stage.file, model, optimizer=optimizer.state_dict(), stage=stage.name, step=step, length=length,
                 tokens=step * tokens_per_step, seconds=before + time.time() - began, evaluation=result,
                 first_evaluation=started_at, **(extra or {}))

    def stop_if_asked(step, asked):
        if asked:
            checkpoint(step)
            raise Stopped(f"stopped at {stage.name} step {step:,} of {stage.steps:,}")

    if not state:
        result = started_at = measure()
        log.add(stage=stage.name, step=0, tokens=0, val_loss=result["loss"], val_accuracy=result["accuracy"])
        say(f"[{label}] before: held-out loss {result['loss']:.3f}, accuracy {result['accuracy']:.1%}")
    model.train()
    batches = batches_ahead(source, first, stage, s)
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr_at(step)
        micro_batches = next(batches)
        # The loss is the mean over all counted tokens of the step, in whichever process and micro-batch they are.
        counted, asked = total(sum(int((y != -1).sum()) for _, y, _ in micro_batches), len(SIGNALS))
        stop_if_asked(step, asked)
        loss = accumulate_gradients(net, micro_batches, counted, stage, s, autocast)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)

        done = step + 1
        logging = done % s.log_every == 0 or done in (1, stage.steps)
        saving = done % stage.save_every == 0 or done == stage.steps
        if (logging or saving or device == "cpu") and not math.isfinite(norm.item()):  # reading it waits for the GPU
            raise UserError(f"the loss or its gradient is not finite at {stage.name} step {done}: a lower learning rate "
                            f"may help; {f'the last good checkpoint is {stage.file}' * stage.file.exists()}", everywhere=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        entry = {}
        if logging:
            rate = (done - first) * tokens_per_step / (time.time() - began)
            entry = {"loss": total(float(loss))[0], "lr": stage.lr_at(step), "tokens_per_second": round(rate)}
            say(f"[{label}] step {done:,}/{stage.steps:,} | loss {entry['loss']:.3f} | {rate:,.0f} tokens/s | "
                f"{clock((time.time() - began) / (done - first) * (stage.steps - done))} left")
        if done % stage.eval_every == 0 or done == stage.steps:
            result = measure()
            entry |= {"val_loss": result["loss"], "val_accuracy": result["accuracy"]}
            say(f"[{label}] step {done:,}: held-out loss {result['loss']:.3f}, accuracy {result['accuracy']:.1%}")
        if entry:
            log.add(stage=stage.name, step=done, tokens=done * tokens_per_step, **entry)
        if length and length < val.longest and done % CURRICULUM_EVERY == 0 and measure()["accuracy"] > 0.99:
            length += 2
            source, val = make("train", length), make("val", length)
            batches = batches_ahead(source, done, stage, s)
            say(f"[{label}] accuracy passed 0.99: input length {length}")
        if saving:
            checkpoint(done)
    return result, started_at, before + time.time() - began


# ----------------------------------------------------------------------------------------------------------------------
# The run


def new_model(s, source, tied, dropout, seed):
    torch.manual_seed(seed)
    config = GPTConfig(source.vocab_size, source.block_size, *parse_size(s.size), dropout=dropout, tied=tied)
    return GPT(config)


def check_fit(s, source, val, warmup_source, longest):
    """Refuses batches that do not divide, and a warm-up longer than the context that was asked for."""
    share = world() * s.grad_accum
    for name in ("warmup_batch_size", "batch_size") if warmup_source else ("batch_size",):
        if getattr(s, name) % share:
            raise UserError(f"--{name} {getattr(s, name)} does not divide over {world()} process{'es' * (world() > 1)} "
                            f"times --grad_accum {s.grad_accum}")
    for name, a in (("data", source), ("data", val), ("warmup", warmup_source)):
        if a and not (a.batch(0, 64)[1] != -1).any():
            raise UserError(f"--{name} {a.name}: no token counts in rows of {a.block_size}: a longer --block_size is needed")
    for name in ("embeddings", "lm_head"):
        if warmup_source and getattr(s, name) == "keep" and warmup_source.vocab_size != source.vocab_size:
            raise UserError(f"--{name} keep needs one vocabulary: {s.warmup} has {warmup_source.vocab_size} tokens, "
                            f"{s.data} has {source.vocab_size}")
    if warmup_source and longest and warmup_source.block_size > longest and not s.warmup_block_size:
        raise UserError(f"--warmup {s.warmup} makes sequences of {warmup_source.block_size} tokens, longer than "
                        f"--block_size {longest}: shorten them, or add --warmup_block_size {warmup_source.block_size}")


def memory_plan(config, micro_batch, s):
    """The bytes that one process needs to train a model of this GPTConfig: weights, gradients, optimiser, activations,
    and peak, which is less than their sum where gradients come while activations go.

    micro_batch: sequences at a time. Activations are what torch keeps for the backward pass (the tests compare), the
    bfloat16 copies of the weights among them. Not counted: the CUDA context, the fragments between blocks of memory."""
    weights = 4 * count_parameters(config)[0]
    tokens, d, low = micro_batch * config.block_size, config.n_embd, 2 if s.dtype == "bfloat16" else 4
    # Of each block and token: what goes into its two layer norms (float32) and comes out; q, k, v; the attention's
    # output; before and after the GELU; the two dropout masks; the layer norms' and the attention's statistics.
    block = tokens * (d * (2 * 4 + (2 + 3 + 1 + 8) * low + 2 * (config.dropout > 0)) + 16 + 4 * config.n_head)
    if config.dropout and s.device == "cpu":  # there is no fused attention with dropout, and masks are numbers
        block += tokens * (12 * config.n_head * config.block_size + 10 * d)
    copies = 12 * d * d * config.n_layer * 2 if s.dtype == "bfloat16" else 0
    logits = 12 * min(tokens * config.vocab_size, MOST_LOGITS)  # them, their softmax, its gradient: 4 bytes each
    head = tokens * d * (2 * 4 + low) + logits + 4 * config.vocab_size * d
    kept = config.n_layer * (4 * d * tokens if s.recompute else block) + copies + head + s.recompute * block
    optimiser = 2 * weights // (world() if s.zero else 1)
    held = weights if world() > 1 or s.grad_accum > 1 else 0  # gradients that are there before the backward pass
    return {"weights": weights, "gradients": weights, "optimiser": optimiser, "activations": kept,
            "peak": weights + optimiser + max(held + kept, weights + block)}


def count_parameters(config):
    """All of them, and those in matrix products (a lookup of an embedding is none)."""
    with torch.device("meta"):
        model = GPT(config)
    n = sum(p.numel() for p in model.parameters())
    return n, n - model.wpe.weight.numel() - (0 if config.tied else model.wte.weight.numel())


def vocabulary(s):
    """How many tokens the data have, without preparing them."""
    if kind_of(s.data) == "task":
        return make_source(s.data).vocab_size
    if (Path(s.data) / "train.bin").exists():
        return read_meta(Path(s.data))[0]
    known = {"bytes": 257, "characters": len(CHARACTERS), "gpt2": 50257}
    return known.get(s.tokenizer) or load_tokenizer(s.tokenizer).n_vocab


def print_plan(s):
    """What the run would take, as far as that can be told without data and without training.

    FLOPs: 6 for each parameter in a matrix product and 12 * n_layer * n_embd * context for attention, per token (PaLM's
    way to count, arXiv 2204.02311, appendix B); what --recompute does again is in the time, not in the FLOPs."""
    stages = [("training", s.steps, s.batch_size, GPTConfig(vocabulary(s), block_size(s), *parse_size(s.size),
                                                            s.dropout, s.tied))]
    if s.warmup_steps:
        vocab = stages[0][3].vocab_size if s.warmup == "text" else make_source(s.warmup).vocab_size
        stages.insert(0, ("warm-up", s.warmup_steps, s.warmup_batch_size, GPTConfig(
            vocab, warmup_block_size(s), *parse_size(s.size), s.warmup_dropout)))
    n, share, flops, tokens, peaks = count_parameters(stages[-1][3])[0], world() * s.grad_accum, 0, {}, {}
    say(f"model      {s.size}: {n:,} parameters, vocabulary {stages[-1][3].vocab_size:,}, context {block_size(s):,}")
    for name, steps, batch_size, config in stages:
        if batch_size % share:
            raise UserError(f"{batch_size} sequences per step of {name} do not divide over {world()} processes times "
                            f"--grad_accum {s.grad_accum}")
        tokens[name] = steps * batch_size * config.block_size
        flops += tokens[name] * (6 * count_parameters(config)[1] + 12 * config.n_layer * config.n_embd * config.block_size)
        peaks[name] = memory_plan(config, batch_size // share, s)
        say(f"{name:10} {steps:,} steps of {batch_size} x {config.block_size:,} = {batch_size * config.block_size:,} "
            f"tokens: {tokens[name]:,} in all")
    if s.data in PUBLISHED and s.steps and tokens["training"] < 100 * PUBLISHED[s.data]["tokens"]:
        say(f"data       python data.py prepare {s.data} --tokens {-(-tokens['training'] // 10 ** 6):,}M reads no text twice"
            .replace(",", "_"))
    if s.warmup_steps:
        say(f"share      {tokens['warm-up'] / max(1, tokens['training']):.3g} tokens of {s.warmup} for one of {s.data} "
            "(paper: 0.001 to 0.003)")
    say(f"compute    {flops:.3g} FLOPs")
    if s.tflops:
        # The backward pass costs twice the forward pass, so computing that again makes four thirds.
        seconds = flops * (4 / 3 if s.recompute else 1) / (s.tflops * 1e12 * world())
        say(f"time       {seconds / 3600:,.1f} hours at {s.tflops:g} TFLOP/s on each of {world()}")
    else:
        say("time       add --tflops: what one GPU really does, often 0.3 to 0.5 of its peak")
    name = max(peaks, key=lambda name: peaks[name]["peak"])
    unit, scale = ("GiB", 30) if peaks[name]["peak"] >= 2 ** 30 else ("MiB", 20)
    parts = {part: f"{part} {size / 2 ** scale:,.2f}" for part, size in peaks[name].items()}
    peak = parts.pop("peak")
    say(f"memory     of each of {world()} process{'es' * (world() > 1)} in {name}, {unit}: {', '.join(parts.values())}; {peak} "
        f"({s.device}, {s.dtype}{', recompute' * s.recompute}{', zero' * s.zero}, micro-batches of "
        f"{(s.batch_size if name == 'training' else s.warmup_batch_size) // share})")
    if torch.cuda.is_available() and s.device.startswith("cuda"):
        say(f"           this GPU has {torch.cuda.get_device_properties(0).total_memory / 2 ** 30:.1f}")


# ----------------------------------------------------------------------------------------------------------------------
# A stage of several runs that differ in the seed alone, as one program


def can_go_together(s, stage, model, together=None):
    """Whether a stage of several seeds may go as one program: unless asked for, on a GPU with a model that leaves it idle."""
    if together is None:
        logits = stage.batch_size * model.config.block_size * model.config.vocab_size
        together = s.device.startswith("cuda") and sum(p.numel() for p in model.parameters()) <= 2e7 and logits <= MOST_LOGITS
    return together and world() == 1 and not (stage.dropout or s.recompute or s.zero or s.sharpen and stage.name == "train" or
                                              s.warmup_curriculum and stage.name == "warmup")


def batches_together(sources, first, stage, s):
    """Yields for each step a list of parts (x, places, wanted), each (seeds, rows, ...), see ensemble_losses; made in a
    thread, one step ahead. Every seed has the rows that it has alone, those of like length together on a CPU."""
    def make(step):
        x, y = (np.stack(a) for a in zip(*(source.batch(step, stage.batch_size) for source in sources)))
        lengths = x.shape[2] - (y[:, :, ::-1] != -1).argmax(axis=2)
        order = lengths.argsort(axis=1, kind="stable") if s.device == "cpu" else np.arange(x.shape[1])[None].repeat(len(x), 0)
        parts = s.grad_accum if s.device != "cpu" else max(s.grad_accum, min(x[0].size // LIKE_ROWS[0], LIKE_ROWS[1], len(x[0])))
        made = []
        for rows in np.array_split(order, parts, axis=1):
            longest = np.take_along_axis(lengths, rows, 1).max()
            tokens, wanted = (np.take_along_axis(a, rows[..., None], 1)[..., :longest] for a in (x, y))
            places = np.argsort(wanted == -1, axis=2, kind="stable")[..., :(wanted != -1).sum(axis=2).max()]
            part = (torch.from_numpy(a) for a in (tokens, places, np.take_along_axis(wanted, places, 2)))
            made.append([a.pin_memory() if s.device.startswith("cuda") else a for a in part])
        return made, torch.from_numpy((y != -1).sum(axis=(1, 2)))

    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(make, first)
        for step in range(first, stage.steps):
            batch = ready.result()
            ready = pool.submit(make, step + 1)
            yield batch


def stack_models(models, stage, s):
    """{name: (seeds, ...)} of the models' weights, and an AdamW over them that treats each as make_optimizer does."""
    named = [dict(model.named_parameters()) for model in models]
    weights = {name: torch.stack([each[name].detach() for each in named]).requires_grad_() for name in named[0]}
    groups = [{"params": [w for name, w in weights.items() if (named[0][name].dim() < 2) == spared],
               "weight_decay": 0.0 if spared else stage.weight_decay} for spared in (False, True)]
    return weights, torch.optim.AdamW(groups, lr=stage.lr, betas=(s.beta1, s.beta2), fused=s.device != "mps")


def gradients_together(weights, config, parts, counted, s, autocast):
    """Backward through each part, and clipping -> (each seed's loss, each seed's gradient norm), both (seeds,)."""
    loss, counted = 0.0, counted.clamp_min(1).to(s.device, non_blocking=True)
    for part in parts:
        with autocast():
            share = ensemble_losses(weights, config, *(a.to(s.device, non_blocking=True) for a in part)) / counted
        share.sum().backward()
        loss = loss + share.detach()
    # Each seed's gradient is clipped by its own norm, as clip_grad_norm_ does it.
    norms = torch.stack([w.grad.flatten(1).norm(dim=1) for w in weights.values()]).norm(dim=0)
    if s.grad_clip:
        scale = (s.grad_clip / (norms + 1e-6)).clamp(max=1.0)
        for w in weights.values():
            w.grad.mul_(scale.view(-1, *[1] * (w.dim() - 1)))
    return loss, norms


def train_together(requests):
    """`train` for runs that differ in the seed alone: the same as one after another, but for rounding. Each seed has its
    own data, clipping, log and checkpoints. requests: the arguments of `train` of each. Returns what it returns of each."""
    (s, stage, model, *_), n = requests[0], len(requests)
    models, logs, states = [r[2].to(s.device) for r in requests], [r[4] for r in requests], [r[5] for r in requests]
    autocast, label = autocast_for(s), f"{'1/2 warm-up' if stage.name == 'warmup' else '2/2 train'}, {n} seeds"
    files = [r[1].file for r in requests]
    sources, vals = ([r[3](split, None) for r in requests] for split in ("train", "val"))
    alone = [make_optimizer(model, stage, r[0]) for model, r in zip(models, requests)]  # as their checkpoints hold them
    for optimizer, state in zip(alone, states):
        if state:
            load_optimizer(optimizer, state["optimizer"])
    weights, together = stack_models(models, stage, s)
    first = states[0]["step"] if states[0] else 0
    if first:
        for name, w in weights.items():
            each = [optimizer.state[dict(m.named_parameters())[name]] for optimizer, m in zip(alone, models)]
            together.state[w] = {"step": each[0]["step"], **{key: torch.stack([entry[key] for entry in each])
                                                             for key in ("exp_avg", "exp_avg_sq")}}
    results = [state["evaluation"] if state else None for state in states]
    started_at = [state["first_evaluation"] if state else None for state in states]
    before, began = [state["seconds"] if state else 0.0 for state in states], time.time()
    tokens_per_step = stage.batch_size * sources[0].block_size

    @torch.no_grad()
    def hand_out():
        """The stacked weights and moments, back to each seed's own model and optimiser."""
        for j, (model, optimizer) in enumerate(zip(models, alone)):
            for name, p in model.named_parameters():
                p.copy_(weights[name][j])
                if entry := together.state.get(weights[name]):
                    optimizer.state[p] = {key: (value if key == "step" else value[j]).clone() for key, value in entry.items()}
            for group, shared in zip(optimizer.param_groups, together.param_groups):
                group["lr"] = shared["lr"]

    def checkpoint(step):
        hand_out()
        for j in range(n):
            save(files[j], models[j], optimizer=alone[j].state_dict(), stage=stage.name, step=step, length=None,
                 tokens=step * tokens_per_step, seconds=before[j] + (time.time() - began) / n, evaluation=results[j],
                 first_evaluation=started_at[j], **requests[j][6])

    def measure():
        hand_out()
        return [evaluate(m, val, stage.batch_size // s.grad_accum, s.eval_batches * s.grad_accum, s.device, autocast)
                for m, val in zip(models, vals)]

    def mean(key):
        return sum(result[key] for result in results) / n

    if not states[0]:
        results = started_at = measure()
        for log, result in zip(logs, results):
            log.add(stage=stage.name, step=0, tokens=0, val_loss=result["loss"], val_accuracy=result["accuracy"])
        say(f"[{label}] before: held-out loss {mean('loss'):.3f}, accuracy {mean('accuracy'):.1%}, on average")
    batches = batches_together(sources, first, stage, s)
    for step in range(first, stage.steps):
        for group in together.param_groups:
            group["lr"] = stage.lr_at(step)
        parts, counted = next(batches)
        if SIGNALS:
            checkpoint(step)
            raise Stopped(f"stopped at {stage.name} step {step:,} of {stage.steps:,}, {n} seeds")
        loss, norms = gradients_together(weights, model.config, parts, counted, s, autocast)
        done = step + 1
        logging = done % s.log_every == 0 or done in (1, stage.steps)
        saving = done % stage.save_every == 0 or done == stage.steps
        if (logging or saving or s.device == "cpu") and not norms.isfinite().all():
            seed = requests[int((~norms.isfinite()).int().argmax())][0].seed
            raise UserError(f"the loss or its gradient is not finite at {stage.name} step {done} of seed {seed}: a lower "
                            "learning rate may help, and without it in --seeds the others go on; "
                            f"{'the last checkpoints are good' * files[0].exists()}")
        together.step()
        together.zero_grad(set_to_none=True)
        entries = [{} for _ in requests]
        if logging:
            rate = (done - first) * tokens_per_step * n / (time.time() - began)
            for entry, value in zip(entries, loss.tolist()):
                entry |= {"loss": value, "lr": stage.lr_at(step), "tokens_per_second": round(rate / n)}
            say(f"[{label}] step {done:,}/{stage.steps:,} | mean loss {loss.mean().item():.3f} | {rate:,.0f} tokens/s | "
                f"{clock((time.time() - began) / (done - first) * (stage.steps - done))} left")
        if done % stage.eval_every == 0 or done == stage.steps:
            results = measure()
            for entry, result in zip(entries, results):
                entry |= {"val_loss": result["loss"], "val_accuracy": result["accuracy"]}
            say(f"[{label}] step {done:,}: held-out loss {mean('loss'):.3f}, accuracy {mean('accuracy'):.1%}, on average")
        for log, entry in zip(logs, entries):
            if entry:
                log.add(stage=stage.name, step=done, tokens=done * tokens_per_step, **entry)
        if saving:
            checkpoint(done)
    hand_out()
    return [(result, start, earlier + (time.time() - began) / n) for result, start, earlier in zip(results, started_at, before)]


# ----------------------------------------------------------------------------------------------------------------------
# How fast is it?

BENCH_STEPS = 5, 25  # not timed (compilation, first touches of memory), timed


def wait_for(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def bench_ours(s, stage, source, model):
    """(seconds per step, losses) of the training loop, without what it writes."""
    optimizer, autocast, losses = make_optimizer(model, stage, s), autocast_for(s), []
    batches = batches_ahead(source, 0, stage, s)
    if s.compile:
        x, y, _ = step_batches(source, 0, stage, s)[0]
        compile_trunk(model, x.to(s.device), y.to(s.device), autocast)
    model.train()
    for step in range(stage.steps):
        if step == BENCH_STEPS[0]:
            wait_for(s.device)
            began = time.time()
        micro_batches = next(batches)
        losses.append(accumulate_gradients(model, micro_batches, sum(int((y != -1).sum()) for _, y, _ in micro_batches),
                                           stage, s, autocast))
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait_for(s.device)
    return (time.time() - began) / BENCH_STEPS[1], torch.stack(losses).tolist()


def bench_together(s, stage, sources, models):
    """(seconds per step, losses) of several seeds as one program."""
    (weights, optimizer), losses = stack_models(models, stage, s), []
    batches = batches_together(sources, 0, stage, s)
    for step in range(stage.steps):
        if step == BENCH_STEPS[0]:
            wait_for(s.device)
            began = time.time()
        losses.append(gradients_together(weights, models[0].config, *next(batches), s, autocast_for(s))[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait_for(s.device)
    return (time.time() - began) / BENCH_STEPS[1], torch.stack(losses).mean(1).tolist()


def bench_theirs(s, stage, source, model):
    """The same of GPT2LMHeadModel trained by transformers' Trainer, from the same weights on the same batches. None if that
    library is not there."""
    try:
        import transformers
        import accelerate  # noqa: F401: the Trainer wants it
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=c.tied, use_cache=False,
        bos_token_id=0, eos_token_id=0))
    theirs.load_state_dict({name if name == "lm_head.weight" else f"transformer.{name}":
                            tensor.t() if TRANSPOSED.search(name) else tensor for name, tensor in model.state_dict().items()})

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for step in range(stage.steps):
                x, y = (torch.from_numpy(a) for a in source.batch(step, stage.batch_size))
                wanted = y.masked_fill(y == -1, -100)
                yield {"input_ids": x, "labels": wanted, "shift_labels": wanted}  # ours are shifted already

    class Times(transformers.TrainerCallback):
        def __init__(self):
            self.ends, self.losses = [], []

        def on_step_end(self, args, state, control, **kwargs):
            wait_for(s.device)
            self.ends.append(time.time())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(theirs, transformers.TrainingArguments(
            folder, max_steps=stage.steps, learning_rate=stage.lr, lr_scheduler_type="constant", adam_beta1=s.beta1,
            adam_beta2=s.beta2, weight_decay=stage.weight_decay, max_grad_norm=s.grad_clip, per_device_train_batch_size=1,
            logging_steps=1, remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True, seed=s.seed,
            use_cpu=s.device == "cpu", bf16=s.dtype == "bfloat16", torch_compile=bool(s.compile)),
            train_dataset=Batches(), data_collator=lambda rows: rows[0], callbacks=[times])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return (times.ends[-1] - times.ends[BENCH_STEPS[0] - 1]) / BENCH_STEPS[1], times.losses


def matrix_rate(s):
    """Operations per second of a large matrix product on this device, in the run's precision: what no model can surpass
    that leaves nothing out."""
    n = 1536 if s.device == "cpu" else 8192
    a = torch.randn(n, n, dtype=torch.bfloat16 if s.dtype == "bfloat16" else torch.float32, device=s.device)
    best = math.inf
    for _ in range(5):
        wait_for(s.device)
        began = time.time()
        a @ a
        wait_for(s.device)
        best = min(best, time.time() - began)
    return 2 * n ** 3 / best


def bench(s):
    """Steps per second of this run's training stage, beside the transformers library and the floor. Learning rate constant."""
    s = resolve(s)
    if world() > 1:
        raise UserError("--bench measures one process: start it without torchrun")
    if s.batch_size % s.grad_accum:
        raise UserError(f"--batch_size {s.batch_size} does not divide over --grad_accum {s.grad_accum}")
    source = make_source(s.data, "train", s.seed, s.block_size, s.tokenizer)
    stage = Stage("train", sum(BENCH_STEPS), s.batch_size, s.lr, "constant", 0, s.lr, s.weight_decay, s.dropout, 1, 1, None)
    seeds = parse_seeds(s) if s.seeds is not None else []
    found = {"nanowarm": [], "transformers": [], f"{len(seeds)} seeds": []}
    model = new_model(s, source, s.tied, s.dropout, s.seed)
    if seeds and not can_go_together(s, stage, model, True):
        raise UserError("--bench --seeds measures seeds as one program, and with --dropout, --recompute, --zero or --sharpen they "
                        "go one after another")
    for _ in range(2):  # by turns, on a machine that others may use too: the best of two
        if seeds:
            sources = [make_source(s.data, "train", seed, s.block_size, s.tokenizer) for seed in seeds]
            models = [new_model(s, source, s.tied, s.dropout, seed).to(s.device) for seed in seeds]
            found[f"{len(seeds)} seeds"].append(bench_together(s, stage, sources, models))
        for name, function in (("nanowarm", bench_ours), ("transformers", bench_theirs)):
            model = new_model(s, source, s.tied, s.dropout, s.seed).to(s.device)
            model.recompute = s.recompute
            if (result := function(s, stage, source, model)) is not None:
                found[name].append(result)
    tokens, config = s.batch_size * source.block_size, model.config
    flops = tokens * (6 * count_parameters(config)[1] + 12 * config.n_layer * config.n_embd * config.block_size)
    say(f"{s.data}, {s.size}, {s.batch_size} x {source.block_size} tokens a step; {s.device}, {s.dtype}"
        f"{', compiled' * bool(s.compile)}, {torch.get_num_threads()} threads")
    seconds = {name: min(result[0] for result in results) for name, results in found.items() if results}
    for name, each in seconds.items():
        times = len(seeds) if name.endswith("seeds") else 1
        say(f"{name:13} {1 / each:8.2f} steps/s {times * tokens / each:12,.0f} tokens/s, pads counted"
            + f": {each / seconds['nanowarm']:.2f} times as long as one" * (times > 1))
    if "transformers" in seconds:
        far = max(abs(a - b) for a, b in zip(found["nanowarm"][0][1], found["transformers"][0][1]))
        say(f"ratio         {seconds['transformers'] / seconds['nanowarm']:8.2f} (their model and Trainer, on the same batches from "
            f"the same weights; losses of {stage.steps} steps differ by at most {far:.1g})")
    else:
        say("              to measure beside transformers: pip install transformers accelerate")
    rate = matrix_rate(s)
    say(f"floor         {rate / flops:8.2f} steps/s: {flops:.3g} operations, pads counted, at the {rate / 1e9:,.0f} GFLOP/s of a "
        f"large matrix product here; reached {flops / rate / seconds['nanowarm']:.0%}")


# ----------------------------------------------------------------------------------------------------------------------
# The run, from start to end


def stages_of(s):
    """What the settings say, in s.out. A generator: it yields the arguments of `train` for a stage and is sent what that
    returns, so that several runs can go side by side. Returns the content of result.json. Raises UserError."""
    asked_block_size, s = s.block_size, resolve(s)
    if world() > 1 and not dist.is_initialized():  # gloo carries what the log and the signals need, past the GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if s.device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(hours=6))  # process 0 may have a large corpus to tokenise
    if world() > 1 and s.device.startswith("cuda"):
        s.device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(s.device)

    def data(split, length=None):
        return make_source(s.data, split, s.seed, s.block_size, s.tokenizer)

    def warmup_data(split, length=None):
        if s.warmup == "text":
            return make_source(s.data, "warmup" if split == "train" else split, s.seed, s.block_size, s.tokenizer)
        return make_source(s.warmup, split, s.seed, s.warmup_block_size, longest=length)

    # A bad spec, corpus or checkpoint is refused here, before anything is written.
    with failing_together(), first_process_first():  # it fills the token cache
        source, val, warmup_source = data("train"), data("val"), warmup_data("train") if s.warmup_steps else None
        check_fit(s, source, val, warmup_source, asked_block_size)
    fingerprint = [[getattr(a, "windows", 0), zlib.crc32(a.batch(0, 1)[0].tobytes())] for a in (source, val, warmup_source)
                   if a]
    agree("data", fingerprint)
    target = new_model(s, source, s.tied, s.dropout, s.seed)
    facts = {"loss": None, "accuracy": None, "first_loss": None, "first_accuracy": None, "tokens": 0, "seconds": 0.0}
    with failing_together():
        for name, parts in (("init", parse_parts(s.transfer)), ("mlp_from", ("mlp",)), ("attn_from", ("attn",))):
            if path := getattr(s, name):
                model, state = load(path)
                if s.transfer == "all" and model.config.block_size < target.config.block_size:
                    raise UserError(f"{path} has positions for {model.config.block_size} tokens alone, and --block_size asks "
                                    f"for {target.config.block_size}: --transfer full starts them anew")
                transfer(target, model, parts, s.embeddings, s.lm_head, s.positions)
                warmed = state if state.get("stage") == "warmup" else state.get("warmup", {})
                facts["tokens"] += warmed.get("tokens", 0)

    out = Path(s.out)
    finished = None
    with failing_together(), first_process_first():
        finished = open_run(s)
    if finished:
        return finished
    stages = [
        Stage("warmup", s.warmup_steps, s.warmup_batch_size, s.warmup_lr, s.warmup_lr_schedule, s.warmup_lr_ramp,
              min_lr=0.0, weight_decay=s.warmup_weight_decay, dropout=s.warmup_dropout, file=out / "warmup.pt",
              eval_every=s.eval_every or max(1, s.warmup_steps // 5),
              save_every=s.save_every or max(1, s.warmup_steps // 10)),
        Stage("train", s.steps, s.batch_size, s.lr, s.lr_schedule, s.lr_ramp,
              min_lr=s.min_lr, weight_decay=s.weight_decay, dropout=s.dropout, file=out / "ckpt.pt",
              eval_every=s.eval_every or max(1, s.steps // 5), save_every=s.save_every or max(1, s.steps // 10))]
    # Where did it stop? The furthest checkpoint says.
    model, state = next((load(stage.file, s.device) for stage in reversed(stages) if stage.file.exists()), (None, {}))
    if state and not state.keys() >= {"stage", "step", "optimizer", "evaluation"}:
        raise UserError(f"the checkpoint in {out} is not one of a run: choose another --out")
    if state.get("fingerprint", fingerprint)[:2] != fingerprint[:2]:
        raise UserError(f"{s.data} is not what it was when the run in {out} was stopped (other tokens, or more of them): "
                        "put it back, or begin a new run in another --out")
    micro_batches, dropout = world() * s.grad_accum, s.dropout if state.get("stage") == "train" else s.warmup_dropout
    if dropout and state.get("micro_batches", micro_batches) != micro_batches:
        raise UserError(f"the run in {out} has {state['micro_batches']} micro-batches a step (processes times "
                        f"--grad_accum), here {micro_batches}: with dropout that would be another run")
    agree("checkpoint", (state.get("stage"), state.get("step")))
    facts_of_data = {"fingerprint": fingerprint, "micro_batches": micro_batches}
    log = Log(out / "log.jsonl", state.get("stage"), state.get("step"))
    say(f"{s.out}: {s.size} GPT, {sum(p.numel() for p in target.parameters()):,} parameters, context "
        f"{target.config.block_size}; {s.device}, {s.dtype}, {world()} process{'es' * (world() > 1)}"
        + (f"; going on from {state['stage']} step {state['step']:,}" if state else ""))

    if state.get("stage") == "train":
        target, facts = model, state["warmup"]
    elif s.warmup_steps:
        # Stage 1: warm up
        say(f"[1/2 warm-up] {s.warmup}: {s.warmup_steps:,} steps of {s.warmup_batch_size} x "
            f"{warmup_source.block_size} tokens")
        warm = model or new_model(s, warmup_source, True, s.warmup_dropout, s.seed + 2 ** 32)
        origin = {"spec": s.data if s.warmup == "text" else s.warmup, "tokenizer": s.tokenizer, "seed": s.seed}
        result, start, seconds = yield s, stages[0], warm, warmup_data, log, state, {"source": origin, **facts_of_data}
        facts = {"loss": result["loss"], "accuracy": result["accuracy"], "first_loss": start["loss"],
                 "first_accuracy": start["accuracy"], "seconds": seconds,
                 "tokens": s.warmup_steps * s.warmup_batch_size * warmup_source.block_size}
        # Transfer
        transfer(target, warm, parse_parts(s.transfer), s.embeddings, s.lm_head, s.positions)
        warm, model, state = None, None, {}  # their memory is wanted now

    # Stage 2: continue (with --steps 0 the model is measured as it is)
    passes = s.steps * s.batch_size / source.windows if hasattr(source, "windows") else 0
    say(f"[2/2 train] {s.data}: {s.steps:,} steps of {s.batch_size} x {target.config.block_size} tokens"
        + f", {passes:.1f} passes over it" * (passes > 1))
    origin = {"spec": s.data, "tokenizer": s.tokenizer, "seed": s.seed}
    result, _, seconds = yield s, stages[1], target, data, log, state, {"source": origin, "warmup": facts, **facts_of_data}

    semantic = s.steps * s.batch_size * target.config.block_size
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in OPERATIONAL}
    result = {"settings": settings, "warmup_loss": facts["loss"], "warmup_accuracy": facts["accuracy"],
              "warmup_first_loss": facts["first_loss"], "warmup_first_accuracy": facts["first_accuracy"],
              "val_loss": result["loss"], "val_accuracy": result["accuracy"], "val_exact": result["exact"],
              "val_bits_per_byte": result["bits_per_byte"],
              "tokens": {"procedural": facts["tokens"], "semantic": semantic}, "seconds": facts["seconds"] + seconds,
              "tokens_per_second": (facts["tokens"] + semantic) / (facts["seconds"] + seconds)}
    if rank() == 0:
        write_json(out / "result.json", result)
    return result


def run(s, seeds=None, together=None):
    """Runs what the settings say, in s.out; with `seeds`, once for each, in folders of their own. Returns the content of
    result.json, or a list of them. Raises UserError and Stopped.

    together: stages of several seeds that are equally far go as one program; by default on a GPU, which one tiny model
    leaves idle (a CPU is as busy with one, so there they come one after another)."""
    runs = [stages_of(s)] if seeds is None else [stages_of(with_seed(s, seed)) for seed in seeds]
    results, waiting = [None] * len(runs), {}  # {place among the runs: the arguments of `train` that it waits for}

    def go_on(i, value):
        try:
            waiting[i] = runs[i].send(value)
        except StopIteration as end:
            results[i] = end.value

    def how_far(i):
        s, stage, *_, state, _ = waiting[i]
        return stage.name == "train", state["step"] if state else -1  # not measured yet

    for i in range(len(runs)):
        go_on(i, None)
        while i in waiting and not can_go_together(*waiting[i][:3], together):
            go_on(i, train(*waiting.pop(i)))
    while waiting:
        first = min(waiting, key=how_far)
        group = [i for i in waiting if (how_far(i), waiting[i][2].config) == (how_far(first), waiting[first][2].config)]
        requests = [waiting.pop(i) for i in group]
        if len(group) > 1 and can_go_together(*requests[0][:3], together):
            found = train_together(requests)
        else:
            found = [train(*request) for request in requests]
        for i, result in zip(group, found):
            go_on(i, result)
    return results if seeds is not None else results[0]


def parse_seeds(s):
    """--seeds as a list of numbers. Raises UserError."""
    try:
        seeds = [int(word) for word in s.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {s.seeds} is not accepted: a number of seeds, or a list of them such as 0,3,7") from None
    if len(seeds) == 1:
        seeds = list(range(s.seed, s.seed + seeds[0]))
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {s.seeds} is not accepted: at least one seed, each once, from 0")
    return seeds


def with_seed(s, seed):
    """The settings for one of several seeds: a folder of its own, and a warm-up of its own if its name has the seed in it."""
    paths = {key: path.replace("SEED", str(seed)) for key in ("init", "attn_from", "mlp_from") if (path := getattr(s, key))}
    return dataclasses.replace(s, seed=seed, seeds=None, out=f"{s.out}-s{seed}" if s.out else None, **paths)


def summarise_seeds(results):
    """One line for each seed, and their mean."""
    say("\n" + "-" * 100 + f"\n{'seed':>5} {'warm-up loss':>13} {'held-out loss':>14} {'accuracy':>9}  after a warm-up on "
        f"{results[0]['settings']['warmup']}, {results[0]['settings']['data']}")
    for r in results:
        say(f"{r['settings']['seed']:5} {'' if r['warmup_loss'] is None else format(r['warmup_loss'], '.4f'):>13} "
            f"{r['val_loss']:14.4f} {r['val_accuracy']:9.2%}")
    loss, accuracy = (np.array([r[key] for r in results]) for key in ("val_loss", "val_accuracy"))
    few = min(1, len(loss) - 1)  # one seed has no spread
    say(f"{'mean':>5} {'':13} {loss.mean():14.4f} {accuracy.mean():9.2%}\n"
        f"{'sd':>5} {'':13} {loss.std(ddof=few):14.4f} {accuracy.std(ddof=few):9.2%}\n"
        "next  python analyze.py curves with the folders of these and of other runs")


def summarise(result, s, given):
    """What a newcomer wants to know at the end of a run."""
    s = resolve(s)
    spent, text = result["tokens"], kind_of(s.data) == "text" and s.tokenizer != "characters"
    say("\n" + "-" * 100)
    if result["warmup_loss"] is not None:
        say(f"warm-up    {s.warmup}: held-out loss {result['warmup_first_loss']:.2f} -> {result['warmup_loss']:.2f} "
            f"nats per token, accuracy {result['warmup_first_accuracy']:.0%} -> {result['warmup_accuracy']:.0%}")
        if not s.steps:
            return say(f"next       python train.py --init {shlex.quote(s.out)}/warmup.pt --data {s.data}")
    elif s.warmup == "none":
        say("warm-up    none" if not s.init else f"warm-up    taken from {s.init}")
    if not s.steps:
        return say(f"tokens     {spent['procedural']:,} of warm-up, none of {s.data}: it was measured as it is")
    if spent["procedural"]:
        say(f"tokens     {spent['procedural']:,} of warm-up, then {spent['semantic']:,} of {s.data}: "
            f"{spent['procedural'] / spent['semantic']:.3g} for one (paper: 0.001 to 0.003, in far longer runs)")
    else:
        say(f"tokens     {spent['semantic']:,} of {s.data}")
    line = f"result     held-out loss {result['val_loss']:.4f} nats per counted token"
    if result["val_bits_per_byte"] is not None:
        line += f" = {result['val_bits_per_byte']:.4f} bits per byte"
    say(line + (f", perplexity {perplexity(result['val_loss']):.2f}" if text else
                f", {result['val_accuracy']:.2%} of answer tokens and {result['val_exact']:.2%} of answers right"))
    say(f"files      {s.out}: config.json, log.jsonl, ckpt.pt{', warmup.pt' * bool(s.warmup_steps)}, result.json "
        f"({clock(result['seconds'])})")
    drop = ("out", "resume", "init", "transfer", "embeddings", "lm_head", "positions", "attn_from", "mlp_from")
    other = {key: value for key, value in given.items() if key not in drop and not key.startswith("warmup")}
    other = {"warmup": "none" if spent["procedural"] else "dyck", **other}
    if s.transfer == "all":  # these came from the checkpoint
        other |= {key: getattr(s, key) for key in ("size", "block_size", "tokenizer", "tied")}
    if "out" in given:
        other["out"] = f"{s.out.rstrip('/')}-{other['warmup']}"
    flags = " ".join(f"--{'no-' * (v is False)}{k}" + ("" if isinstance(v, bool) else f" {shlex.quote(str(v))}")
                     for k, v in other.items())
    say(f"next       python train.py {flags}\n           the same {'without the' if spent['procedural'] else 'with a'} "
        f"warm-up; then: python analyze.py curves {s.out} {other.get('out') or resolve(Settings(**other)).out}")


def main():
    s, given = parse_arguments(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: SIGNALS.append(number))
    try:
        if s.plan:
            return print_plan(resolve(s))
        if s.bench:
            return bench(s)
        try:
            result = run(s, parse_seeds(s) if s.seeds is not None else None)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            raise UserError("not enough memory: a smaller --batch_size, --size or --block_size needs less, and so do a "
                            "larger --grad_accum, --recompute and --zero") from None
        summarise_seeds(result) if s.seeds is not None else summarise(result, s, given)
    except UserError as error:
        if rank() and dist.is_initialized() and not error.everywhere:  # run_main speaks for process 0 alone
            print(f"error (process {rank()}): {error}", file=sys.stderr)
        raise
    except Stopped as stopped:
        say(f"{stopped}; saved. To go on: the same command with --resume")
        sys.exit(128 + (SIGNALS or [signal.SIGTERM])[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
