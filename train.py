"""One run: warm up on procedural data, move what was learned, continue on what is wanted.

    python train.py --warmup dyck                  a small GPT: brackets first, then Python code
    python train.py --warmup none                  the same without the warm-up: compare
    python train.py --data haystack --warmup dyck  an algorithmic task of the paper
    python train.py --preset c4 --warmup union     a published run (first: data.py prepare c4)
    torchrun --nproc_per_node=8 train.py ...       on eight GPUs: the same batches

Read from `run`, which has two stages, through `train`, which is one, to the end of `Log`. `s` are
all settings, `stage` the same as a stage sees them: `stage.lr` of the warm-up is `s.warmup_lr`.
"""
import contextlib
import gc
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zlib
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from data import (CORPORA, Parser, UserError, json_lines, kind_of, lock, make_data, micro_batches,
                  number, read_json, reading, run_main, say, write_json, written_whole)
from eval import evaluate, held_out_rows
from model import (GPT, GPTConfig, attention_maps, find_device, load, parse_parts, parse_size, save,
                   transfer)

import numpy
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

# The first two commands (ours; other settings are at the end): of those tried, the lowest loss in
# three minutes on two CPU cores. Rates fall as cosines, to a tenth where no min_lr is said.
LAPTOP = dict(
    data="code", size="tiny", dtype="float32", eval_rows=320,
    steps=3000, batch_size=8, block_size=128, lr=2e-3, lr_ramp=100,
    warmup_steps=2000, warmup_batch_size=8, warmup_lr=3e-3, warmup_lr_ramp=200, warmup_min_lr=0.0,
    warmups={"dyck": dict(warmup="dyck:k=8"), "text": dict(embeddings="keep")})

# ---- A run: two stages, and what moves between them ----------------------------------------------


def run(s):
    """What the settings say -> what result.json holds. Raises UserError; SystemExit: a signal."""
    out, parts = Path(s.out), parse_parts(s.transfer)
    join_processes(s)
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it
    data, warm_data = open_data(s)
    fingerprint = [each.fingerprint() for each in (data, warm_data) if each]
    if total(*fingerprint) != [mine * world_size() for mine in fingerprint]:
        raise UserError("processes see different data: each machine needs the same corpora")
    stage = stage_of(s, "train", data)
    model = new_model(data, s.size, s.tied, s.dropout, s.seed)
    warmup, warmed = start_from_checkpoints(model, s)
    if warm_data:
        warm_stage = stage_of(s, "warmup", warm_data)
        # Another seed than any flag's: the parts that start afresh do not begin as this did.
        warm = new_model(warm_data, s.size, True, s.warmup_dropout, s.seed + 2 ** 32)
        # A trial, overwritten below: what does not fit is refused now, not after hours of warm-up.
        transfer(warm, model, parts, s.embeddings, s.positions)

    with lock(out / ".lock") if rank() == 0 else contextlib.nullcontext():
        if rank() == 0:
            open_run(out, s, fingerprint, warmup)
        listen()
        n = sum(p.numel() for p in model.parameters())
        tokens = f"; tokens of {data.tokenizer.name}" if data.tokenizer else ""
        say(f"{out}: {n:,} parameters{tokens}; {s.device}, {s.dtype}, processes: {world_size()}")
        if warm_data:
            # 1. Warm up.
            warmed = train(warm, warm_data, warm_stage, out / "warmup.pt", fingerprint, warmed)
            # 2. Move what was learned.
            move(warm, model, parts, s)
            del warm  # its memory is wanted now
        # 3. Continue.
        trained = train(model, data, stage, out / "ckpt.pt", fingerprint, warmed)
        return write_result(out, s, fingerprint, warmup, warmed, trained)


def open_data(s):
    """The data of both stages; the second is None where nothing is warmed up. Raises UserError."""
    data = make_data(s.data, s.seed, s.block_size, s.tokenizer)
    if s.warmup == "text":
        return data, make_data(s.data, s.seed, s.block_size, s.tokenizer, split="warmup")
    rule = None if s.warmup == "none" else make_data(s.warmup, s.seed, s.warmup_block_size)
    return data, rule


def new_model(data, size, tied, dropout, seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(data.vocab_size, data.block_size, *parse_size(size), dropout, tied))


def move(source, model, parts, s):
    """Moves these parts, and embeddings and positions as the settings say, and says what moved."""
    moved = transfer(source, model, parts, s.embeddings, s.positions)
    say(f"[transfer] {', '.join(parts)}; embeddings {s.embeddings}, positions "
        f"{'moved' if moved else 'random'}")


def start_from_checkpoints(model, s):
    """Moves what --init, --attn_from or --mlp_from name -> on what it was warmed up, a Progress."""
    specs, warmed = [], Progress()
    for path, parts in ((s.init, s.transfer), (s.mlp_from, "mlp"), (s.attn_from, "attn")):
        if path:
            source, state = load(path)
            move(source, model, parse_parts(parts), s)
            # After a second stage our file has its warm-up in "warmed"; other people's have none.
            with reading(path):
                warm = state if state.get("stage") == "warmup" else state.get("warmed", {})
                warmed.tokens += int(warm.get("tokens", 0))
                specs.append(str(state.get("source", {}).get("spec", Path(path).stem)))
    return " + ".join(specs) or s.warmup, warmed


# ---- A stage of training -------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a stage is, as each checkpoint keeps it."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    before: dict = field(default_factory=dict)  # the first evaluation, see `evaluate`
    result: dict = field(default_factory=dict)  # the last one
    passed: int = 0  # how many in a row reached --stop_at

    def is_over(self, stage):
        """After all steps, or when --stop_at was reached twice in a row."""
        return self.step >= stage.steps or self.passed == 2


def train(model, data, stage, file, fingerprint, warmed):
    """Trains a model for one stage, from its checkpoint `file` on, if there is one -> its Progress.
    Raises UserError, and SystemExit after a signal. warmed: the Progress of what came before."""
    say(f"[{stage.name}] {data.spec}: {stage.steps:,} steps of {stage.batch_size} x "
        f"{stage.block_size} tokens\n[{stage.name}] learning rate {stage.lr:g}: a ramp of "
        f"{stage.lr_ramp:,} steps, then {stage.lr_schedule}; ends at {lr_at(stage, stage.steps):g}")
    model.recompute = stage.recompute
    model.to(stage.device)
    optimizer = make_optimizer(model, stage)
    scaler = torch.amp.GradScaler(stage.device.partition(":")[0], enabled=stage.dtype == "float16")
    progress = resume(file, model, optimizer, scaler, stage, fingerprint)
    began = time.monotonic() - progress.seconds
    source = {"spec": data.spec, "seed": stage.seed, "eval_rows": stage.eval_rows,
              "tokenizer": data.tokenizer and data.tokenizer.name}
    log = Log(file.with_name("log.jsonl"), stage, progress)
    held_out = held_out_rows(data, stage.eval_rows), stage.device, stage.autocast, data.tokenizer
    if not progress.before:
        progress.before = progress.result = evaluate(model, *held_out)
        log.add_evaluation(0, progress.before)
    net = torch.compile(model) if stage.compile else model
    if world_size() > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    batches = batches_from(data, stage, progress.step)

    model.train()
    while not progress.is_over(stage):
        step = progress.step
        lr = lr_at(stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x, y = next(batches)
        if stage.dropout:  # its masks depend on the step, so that a resumed run has the same
            torch.manual_seed(zlib.crc32(f"{stage.seed} {stage.name} {step} {rank()}".encode()))
        # One process may have got a signal: all hear of it with this sum, and stop together.
        n_counted, n_signals = total(int((y != -1).sum()), len(SIGNALS))
        loss = 0.0
        micros = micro_batches(x, y, stage.grad_accum, trim=stage.device == "cpu")
        for i, (x, y) in enumerate(micros):
            if world_size() > 1:  # processes share their gradients once a step
                net.require_backward_grad_sync = i == len(micros) - 1
            x, y = x.to(stage.device, non_blocking=True), y.to(stage.device, non_blocking=True)
            watched = attention_maps(model) if stage.sharpen else contextlib.nullcontext()
            with stage.autocast, watched as maps:
                # A sum over tokens that count, by their number in the step, in all processes.
                micro_loss = net(x, y) / max(n_counted, 1)
            loss += micro_loss.detach()
            if stage.sharpen:
                entropy = attention_entropy(maps, y).sum() / stage.batch_size
                micro_loss = micro_loss + stage.sharpen * entropy
            scaler.scale(micro_loss * world_size()).backward()  # DDP takes the mean, not the sum

        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.grad_clip or math.inf)
        scaler.step(optimizer)  # leaves out a step whose gradient float16 could not hold
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        step += 1
        progress.step, progress.tokens = step, step * stage.step_tokens
        progress.seconds = time.monotonic() - began
        last = step == stage.steps
        if last or step == 1 or step % stage.log_every == 0:
            log.add_step(step, total(float(loss))[0], lr)
        if last or step % stage.eval_every == 0:
            progress.result = evaluate(model, *held_out)
            model.train()  # which an evaluation ends
            log.add_evaluation(step, progress.result)
            good = progress.result["accuracy"] >= stage.stop_at
            progress.passed = progress.passed + 1 if good else 0
        if rank() == 0 and (progress.is_over(stage) or n_signals or step % stage.save_every == 0):
            save(file, model, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 stage=stage.name, source=source, fingerprint=fingerprint, warmed=vars(warmed),
                 **vars(progress))
        if n_signals:
            say(f"stopped at {stage.name} step {step:,} of {stage.steps:,}; saved, for --resume")
            sys.exit(128 + (SIGNALS or [signal.SIGTERM])[0])  # another process may have got it
    return progress


def resume(file, model, optimizer, scaler, stage, fingerprint):
    """Takes up a checkpoint, if there is one -> the stage's Progress. Raises UserError."""
    if not file.exists():
        return Progress()
    saved_model, state = load(file)
    with reading(file):
        if saved_model.config != model.config or state["fingerprint"] != fingerprint:
            raise ValueError("it is of another model, or of other data")
        progress = Progress(*(kind(state[key]) for key, kind in Progress.__annotations__.items()))
        say(f"[{stage.name}] taken up at step {progress.step:,}")
        saved = state["optimizer"]["state"]  # empty before the first step
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in saved.items():
            moments["step"] = torch.tensor(float(moments["step"]))
            for name in ("exp_avg", "exp_avg_sq"):
                # Strides that a file may have would crash the fused step.
                moments[name] = moments[name].reshape(parameters[i].shape).contiguous()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
        scaler.load_state_dict(state["scaler"])
    model.load_state_dict(saved_model.state_dict())
    return progress


def lr_at(stage, step):
    """The rate of a step (the first is 0): a ramp up to lr, then a schedule down to min_lr."""
    if step < stage.lr_ramp:
        return stage.lr * (step + 1) / stage.lr_ramp
    done = (step - stage.lr_ramp) / max(1, stage.steps - stage.lr_ramp)
    share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1}
    return stage.min_lr + (stage.lr - stage.min_lr) * share[stage.lr_schedule]


def make_optimizer(model, stage):
    """AdamW, with weight decay on matrices and embeddings, not on biases and norms."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=stage.weight_decay,
                             fused=stage.device != "mps")


def batches_from(data, stage, first):
    """Yields (x, y) of each step from `first` on, this process's share of the rows. A step has the
    rows step * batch_size and on, however many processes there are. Workers start at first use."""
    steps = (range(step * stage.batch_size + rank(), (step + 1) * stage.batch_size, world_size())
             for step in range(first, stage.steps))
    # A batch is a range of row numbers, of which the Dataset makes x and y at once.
    yield from DataLoader(data.train, batch_sampler=steps, collate_fn=tuple, worker_init_fn=listen,
                          num_workers=stage.workers, pin_memory="cuda" in stage.device)


def attention_entropy(maps, y):
    """Of each row the mean over layers, heads and places up to the last that counts: (rows,)."""
    read = (y != -1).flip(1).cumsum(1).flip(1) > 0
    share = read / read.sum(1, keepdim=True).clamp_min(1)
    # The slope of entr at 0 is infinite.
    entropy = [torch.special.entr(each.clamp_min(1e-9)).sum(-1).mean(1) for each in maps]
    return (torch.stack(entropy).mean(0) * share).sum(1)


class Log:
    """log.jsonl, and the same printed. Drops what came after the checkpoint. Raises UserError."""

    def __init__(self, path, stage, progress):
        self.path, self.stage = path, stage
        self.time, self.step = time.monotonic(), progress.step  # of the last line
        last = progress.step if progress.before else -1  # step 0 is the evaluation before it
        if rank() == 0:
            with reading(path), written_whole(path) as file:
                for entry in json_lines(path):
                    if entry["stage"] != stage.name or entry["step"] <= last:
                        file.write(f"{json.dumps(entry)}\n".encode())

    def add_step(self, step, loss, lr):
        seconds = max(time.monotonic() - self.time, 1e-3)  # a clock may be coarse
        speed = (step - self.step) * self.stage.step_tokens / seconds
        left = timedelta(seconds=(self.stage.steps - step) * self.stage.step_tokens // speed)
        line = f"step {step:,}/{self.stage.steps:,} | loss {loss:.3f}"
        if step > 1:  # the first is slow, and says nothing of the others
            line += f" | {speed:,.0f} tokens/s | {left} left"
        self.time, self.step = time.monotonic(), step
        self.add(step, line, loss=loss, lr=lr, tokens_per_second=round(speed))

    def add_evaluation(self, step, result):
        loss, accuracy = result["loss"], result["accuracy"]
        self.add(step, f"step {step:,}: held-out loss {loss:.3f}, accuracy {accuracy:.1%}",
                 val_loss=loss, val_accuracy=accuracy)

    def add(self, step, line, **values):
        if not all(map(math.isfinite, values.values())):
            raise UserError("the loss is not finite: a lower learning rate may help, or --resume")
        say(f"[{self.stage.name}] {line}")
        entry = {"stage": self.stage.name, "step": step, "tokens": step * self.stage.step_tokens}
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry | values) + "\n")


# ---- Here a student may stop. Processes and signals ----------------------------------------------

SIGNALS = []  # those that came: a step is finished and saved, then the run stops


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(s):
    """Joins the run's other processes, if torchrun started several. Raises UserError."""
    with reading("what torchrun says of a run's processes"):
        if not 0 <= rank() < world_size():
            raise ValueError(f"there is no process {rank()} of {world_size()}")
        if world_size() > 1:
            if "cuda" in s.device:
                s.device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(s.device)
            backend = "cpu:gloo,cuda:nccl" if "cuda" in s.device else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=6))  # one may have to tokenise


def total(*values):
    """Sums over all processes; they meet on the CPU, so that no GPU is waited for."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def listen(worker=None):
    """Hears Ctrl-C, a cluster, a closed terminal; workers, too, or they would end before a save."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        code = getattr(signal, name, None)  # Windows has the first two
        if code and (name != "SIGHUP" or signal.getsignal(code) != signal.SIG_IGN):  # nohup
            signal.signal(code, lambda received, frame: SIGNALS.append(received))


# ---- A run's folder ------------------------------------------------------------------------------


def open_run(out, s, fingerprint, warmup):
    """Makes a run's folder, or checks that it holds this run. Raises UserError."""
    path = out / "config.json"
    if not path.exists():
        if any(out.glob("[!.]*")):
            raise UserError(f"{out} is there and is not a run: choose another --out")
        commit = subprocess.getoutput(f'git -C "{Path(__file__).resolve().parent}" rev-parse HEAD')
        chip = torch.cuda.get_device_name(s.device) if "cuda" in s.device else platform.machine()
        environment = {"python": platform.python_version(), "torch": torch.__version__,
                       "numpy": numpy.__version__, "device_name": chip, "processes": world_size(),
                       "commit": commit if len(commit) == 40 else None}  # there may be no git
        write_json(path, {"settings": vars(s), "warmup": warmup, "fingerprint": fingerprint,
                          "environment": environment})
        return
    fixed = vars(s).keys() - OPERATIONAL
    if s.dropout or s.warmup_dropout:
        fixed.add("grad_accum")  # which changes what is dropped
    with reading(path):
        there = read_json(path)
        for key in sorted(fixed):
            theirs, ours = there["settings"].get(key), getattr(s, key)
            if theirs != ours:
                raise UserError(f"{out} holds another run ({key} {theirs}, here {ours})")
        if there["fingerprint"] != fingerprint:
            raise UserError(f"{s.data} is not what it was when the run in {out} began")
    finished = (out / "result.json").exists()
    if finished and s.steps and not (out / "ckpt.pt").exists():
        raise UserError(f"{out} holds this run, finished, without its ckpt.pt")
    if not finished and not s.resume:
        raise UserError(f"{out} holds this run, unfinished: --resume goes on with it")


def write_result(out, s, fingerprint, warmup, warmed, trained):
    """Writes result.json, says what came of the run, and returns what the file holds."""
    before, after, result = warmed.before, warmed.result, trained.result
    found = {
        "settings": {key: value for key, value in vars(s).items() if key not in OPERATIONAL},
        "warmup": warmup, "fingerprint": fingerprint, "warmup_first_loss": before.get("loss"),
        "warmup_loss": after.get("loss"), "warmup_accuracy": after.get("accuracy"),
        **{f"val_{key}": value for key, value in result.items() if key != "tokens"},
        "tokens": {"procedural": warmed.tokens, "semantic": trained.tokens},
        "seconds": warmed.seconds + trained.seconds}
    if rank() == 0:
        write_json(out / "result.json", found)
    if after:
        warmup += (f": held-out loss {before['loss']:.2f} -> {after['loss']:.2f} nats per counted "
                   f"token, {after['accuracy']:.0%} right")
    bits = result["bits_per_byte"]
    how_good = f"{bits:.4f} bits per byte" if bits else f"{result['accuracy']:.2%} right"
    say(f"\nwarm-up    {warmup}\n"
        f"tokens     {warmed.tokens:,} of warm-up, {trained.tokens:,} of {s.data}\n"
        f"result     held-out loss {result['loss']:.4f} nats per counted token, {how_good}\n"
        f"files      {s.out} ({timedelta(seconds=int(found['seconds']))})\n"
        f"next       python analyze.py curves \"{s.out}\" OTHER, of another --warmup")
    return found


# ---- Settings ------------------------------------------------------------------------------------
# What is used is what a flag says; else the shape of the checkpoint that a run starts from; else a
# row: that of its preset or of its task, or LAPTOP, for text without a preset; else as in FLAGS.
# A row's `warmups` say what a rule's bare name stands for, as in --warmup dyck; else data.py does.

# With models of GPT-2's size, as published (paper, "Procedural data").
WARMUPS = {name: dict(warmup=f"{name}:length=64")
           for name in ("identity", "reverse", "sort", "set", "union", "delete", "stack")}
for spec in ("dyck:k=64,length=2048", "dyck_shuffle:k=64,length=2048", "eca:length=2048"):
    name = spec.partition(":")[0]
    WARMUPS[name] = dict(warmup=spec, warmup_steps=500, warmup_batch_size=32)
WARMUPS["text"] = dict(warmup_tokens=500 * 32 * 2048, warmup_batch_size=32, embeddings="keep")

# Text, with GPT-2's size (paper, "Semantic pretraining"); no positions move.
C4 = dict(data="c4", size="gpt2", positions="random", eval_rows=640, warmups=WARMUPS,
          steps=10_000, batch_size=32, block_size=2048, lr=5e-4, weight_decay=0.0, dropout=0.1,
          warmup_steps=2500, warmup_batch_size=64, warmup_lr=5e-4,
          warmup_lr_schedule="constant", warmup_dropout=0.1)
PARROT = C4 | dict(data="codeparrot", steps=20_000, batch_size=48, block_size=1024, lr=5e-5,
                   min_lr=0.0, weight_decay=0.01)
MATH = PARROT | dict(data="deepmind_math", steps=50_000, batch_size=64, block_size=512)
PRESETS = {"laptop": LAPTOP, "c4": C4, "codeparrot": PARROT, "deepmind_math": MATH,
           "wikitext103": C4 | dict(data="wikitext103", block_size=1024)}  # ours, after C4's
for name in ("c4", "codeparrot", "deepmind_math", "wikitext103"):
    PRESETS[f"{name}-350m"] = PRESETS[name] | dict(size="gpt2-medium")
    PRESETS[f"{name}-1.3b"] = PRESETS[name] | dict(size="1.3b", recompute=True)
PRESETS["c4-1.3b"]["steps"] = 160_000  # 10.5 billion tokens, the largest published run
PRESETS["gpu"] = C4 | dict(data="code", steps=2000, block_size=1024, lr_ramp=100, weight_decay=0.1,
                           dropout=0.0, warmup_dropout=0.0)  # ours: 10 MB of text, on a GPU

# Tasks (paper, "Algorithmic tasks"); the warm-up is ours: theirs teaches models so small no rule.
TASK = dict(size="2_4_16", tied=False, dtype="float32", eval_rows=4000,
            steps=10_000, batch_size=1000, lr=1e-3, lr_ramp=500, min_lr=0.0, weight_decay=1e-3,
            warmup_steps=10_000, warmup_batch_size=128, warmup_lr=5e-3, warmup_lr_ramp=200,
            warmup_min_lr=0.0)
TASK_SETTINGS = {
    "haystack": TASK | dict(transfer="attn"),
    "multiplication": TASK | dict(size="4_8_512", steps=156_250, batch_size=64, warmup_steps=2500,
                                  warmup_batch_size=64, warmup_lr=5e-4)}
# Ours, with --preset laptop: a quarter of the rows, twice the rate, brackets longer than 15 pairs.
LAPTOP_TASK = dict(batch_size=250, steps=1500, lr=2e-3, eval_every=100, stop_at=0.9,
                   warmup_steps=4000, warmups={"dyck": dict(warmup="dyck:length=36")})

# Flags: name: (type or choices, default, what it is). Both stages have those of STAGE.
STAGE = {
    "steps": (number(0, 1e9), None, "optimiser steps"),
    "tokens": (number(1, 1e15), None, "the same in tokens, such as 655M"),
    "batch_size": (number(1, 1e6), None, "sequences per step, over all processes"),
    "block_size": (number(1, 1e6), None, "context in tokens; of rules and tasks: their rows"),
    "lr": (number(0, kind=float), None, "learning rate"),
    "lr_schedule": (("cosine", "linear", "constant"), "cosine", "how the learning rate falls"),
    "lr_ramp": (number(0, 1e9), 0, "steps in which it rises first"),
    "min_lr": (number(0, kind=float), None, "where it ends; if not given, a tenth of its height"),
    "weight_decay": (number(0, kind=float), 0.1, "on matrices and embeddings alone"),
    "dropout": (number(0, 1, float), 0.0, "fraction of activations that is left out")}
FLAGS = {
    "warmup": (str, "dyck", "a rule or mixture (data.py list); none; text: other text of --data"),
    "init": (str, None, "take up this checkpoint of a warm-up instead of making one"),
    "attn_from": (str, None, "a mixture of weights: the attention of this checkpoint,"),
    "mlp_from": (str, None, "and the MLPs of this one"),
    "transfer": (str, "full", "what moves: full; attn,mlp,norm or some; all: the whole --init"),
    "embeddings": (("random", "mean", "keep"), "random", "at first; mean, keep: the warm-up's"),
    "positions": (("fit", "moved", "random"), "fit", "fit: moved where the warm-up has as many"),
    "preset": (tuple(PRESETS), None, "settings: a published run's, gpu, or laptop (shown here)"),
    "data": (str, None, "a task, a corpus or a path (data.py list)"),
    "tokenizer": (str, None, "of text: bytes, or one that tiktoken knows, such as gpt2"),
    "size": (str, None, "tiny, gpt2, gpt2-medium, -large, -xl, 1.3b, or layers_heads_width"),
    "tied": (bool, True, "the output head shares its weight with the token embeddings"),
    "grad_accum": (number(1, 1e5), None, "micro-batches a process makes of its share of a step"),
    "grad_clip": (number(0, kind=float), 1.0, "largest norm of the gradient; 0: no limit"),
    "sharpen": (number(0, kind=float), 0.0, "adds so much of the attention's entropy to the loss"),
    "seed": (number(0, 2 ** 32), 0, "of weights, rows and their order"),
    "device": (str, None, "cuda, mps or cpu"),
    "dtype": (("float32", "bfloat16", "float16"), "float32", "of matrix products"),
    "compile": (bool, False, "torch.compile; on CUDA with triton, True"),
    "recompute": (bool, False, "less memory for a third more work"),
    "workers": (number(0, 257), 0, "processes that make rows ahead; with a GPU, some"),
    "eval_every": (number(1, 1e9), None, "steps between evaluations; a fifth of the stage"),
    "eval_rows": (number(1, 1e9), None, "held-out rows of an evaluation"),
    "save_every": (number(1, 1e9), None, "steps between checkpoints; a tenth of the stage"),
    "stop_at": (number(0, 1.001, float), None, "stop training at this accuracy, twice in a row"),
    "log_every": (number(1, 1e9), 50, "steps between log lines"),
    "out": (str, None, "the run's folder; out/DATA-WARMUP-sSEED"),
    "resume": (bool, False, "go on with the run in --out")}
FLAGS |= STAGE | {f"warmup_{name}": (kind, default, f"of the warm-up: {text}")
                  for name, (kind, default, text) in STAGE.items()}
# What may differ between a run and its resumption; everything else defines the run.
OPERATIONAL = {"device", "compile", "recompute", "workers", "eval_every", "save_every", "log_every",
               "grad_accum", "out", "resume"}


def parse(argv):
    """The command line -> all settings, a Namespace. Raises UserError."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=SUPPRESS)
    for name, (kind, default, text) in FLAGS.items():
        takes = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "X"}
        if kind is bool:
            takes = {"action": BooleanOptionalAction}
        default = LAPTOP.get(name, default)
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", help=text + shown, **takes)
    given = vars(parser.parse_args(argv))
    if "" in given.values() or [] in given.values():  # a shell's variable that is not set; "--"
        raise UserError("a flag has an empty value")
    preset = given.get("preset")
    data = given.get("data", PRESETS[preset or "laptop"]["data"])
    kind = kind_of(data)
    checkpoint = given.get("init") or given.get("attn_from") or given.get("mlp_from")
    warmup = given.get("warmup", "none" if checkpoint else "dyck")

    s = {name: default for name, (_, default, _) in FLAGS.items()}
    data_name = Path(given.get("data", "" if preset else "code")).name
    name = "-".join(filter(None, (preset, data_name, "init" if checkpoint else warmup)))
    name = re.sub(r"[^\w.=+-]+", "_", name, flags=re.ASCII)
    s["out"] = f"out/{name[:100]}-s{given.get('seed', 0)}"
    s["device"] = find_device(given.get("device"))
    if "cuda" in s["device"]:  # triton is not everywhere, as on Windows; old GPUs have no bfloat16
        s |= dict(compile=bool(importlib.util.find_spec("triton")) and not given.get("sharpen"),
                  dtype="bfloat16" if torch.cuda.is_bf16_supported(False) else "float16",
                  workers=min(8, max(1, os.cpu_count() // 2)))
    if kind == "task":
        s |= TASK_SETTINGS.get(data.partition(":")[0], TASK) | (LAPTOP_TASK if preset else {})
    else:
        s |= PRESETS[preset or "laptop"] | {"tokenizer": CORPORA.get(data, "bytes")}
    warmups = {"none": dict(warmup_steps=0), **s.pop("warmups", {})}
    s |= warmups.get(warmup.removeprefix("shuffled:"), {})  # a control has its rule's
    # A name without parameters is the last word of its member: of "2*set:length=9+dyck", the dyck.
    warmup = re.sub(r"\w+(?=\+|\Z)", lambda name: warmups.get(name[0], {}).get("warmup", name[0]),
                    warmup.replace(" ", ""))
    if checkpoint:
        c = load(checkpoint)[0].config
        s["size"] = f"{c.n_layer}_{c.n_head}_{c.n_embd}"
        if given.get("transfer") == "all":
            s |= dict(tied=c.tied, block_size=c.block_size, embeddings="keep", positions="moved")
    s |= given | {"data": data, "warmup": warmup}
    if "warmup_steps" in given:
        s["warmup_tokens"] = None
    check(s, given, kind, checkpoint)
    return Namespace(**s)


def check(s, given, kind, checkpoint):
    """Refuses what would silently be another experiment than was meant. Raises UserError."""
    warmup, is_rule = s["warmup"], s["warmup"] not in ("none", "text")
    idle = {"preset": kind == "task" and s["preset"] != "laptop",
            "steps": "tokens" in given, "warmup_steps": "warmup_tokens" in given,
            "transfer": warmup == "none" and not s["init"],
            "warmup_block_size": warmup == "text"}  # its windows are those of the text
    idle = [key for key in given if idle.get(key) or key.startswith("warmup_") and warmup == "none"]
    for wrong, line in (
            (idle, f"--{', --'.join(idle)} would do nothing here"),
            (kind == "rule" or is_rule and kind_of(warmup) != "rule",
             "--data takes a task or text, --warmup a rule"),
            (warmup == "text" and kind != "text", "--warmup text needs --data that is text"),
            (warmup != "none" and checkpoint, "--warmup excludes --init, --attn_from, --mlp_from"),
            (s["transfer"] == "all" and not s["init"], "--transfer all needs --init"),
            (s["sharpen"] and (s["compile"] or s["recompute"]),
             "--sharpen excludes --compile and --recompute")):
        if wrong:
            raise UserError(line)


def stage_of(s, name, data):
    """The settings as one stage has them; tokens become steps, in `s`, too. Raises UserError."""
    prefix = "warmup_" if name == "warmup" else ""
    stage = Namespace(**vars(s) | {key: getattr(s, prefix + key) for key in STAGE})
    stage.name, stage.block_size = name, data.block_size
    stage.step_tokens = stage.batch_size * data.block_size
    if stage.batch_size < world_size():
        raise UserError(f"a batch of {stage.batch_size} is too small for {world_size()} processes")
    held_out_rows(data, 64)  # which refuses rows where no token counts
    if stage.tokens:
        stage.steps = max(1, round(stage.tokens / stage.step_tokens))
        vars(s).update({f"{prefix}steps": stage.steps, f"{prefix}tokens": None})
    stage.min_lr = stage.lr / 10 if stage.min_lr is None else stage.min_lr
    stage.eval_every = s.eval_every or stage.steps // 5 or 1
    stage.save_every = s.save_every or stage.steps // 10 or 1
    if not stage.grad_accum:  # so many that a micro-batch's logits stay below 4 GB
        tokens = stage.step_tokens / world_size()
        stage.grad_accum = math.ceil(tokens * data.vocab_size / 2 ** 30)
        if stage.device == "cpu" and data.kind != "text":  # measured: rows of like length together
            stage.grad_accum = max(1, min(8, int(tokens / 2000)))
    stage.autocast = torch.autocast(stage.device.partition(":")[0], getattr(torch, stage.dtype),
                                    enabled=stage.dtype != "float32")
    stage.stop_at = math.inf if prefix else s.stop_at or math.inf
    stage.sharpen = 0.0 if prefix else s.sharpen
    return stage


def main():
    try:
        run(parse(sys.argv[1:]))
    finally:
        if dist.is_initialized():
            gc.collect()  # of DDP, which would keep the group's threads to the end, and abort
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
