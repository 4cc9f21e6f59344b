"""One run: warm up on procedural data, move what was learned, continue on what is wanted.

    python train.py --warmup dyck                  a small GPT: brackets first, then Python code
    python train.py --warmup none                  the same without the warm-up: compare
    python train.py --data haystack --warmup dyck  an algorithmic task, at its published settings
    python train.py --preset c4 --warmup union     a published run (first: data.py prepare c4)
    torchrun --nproc_per_node=8 train.py ...       on eight GPUs: the same batches

It goes from the whole to its parts: `run`, which has two stages; `train`, which is one stage, and
the pieces of its step; processes and signals; the settings; and what is said before and after. `s`
are all settings, `stage` the same as one stage sees them: `stage.lr` of the warm-up is
`s.warmup_lr`.
"""
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import (CORPORA, PUBLISHED, Parser, UserError, can_grow, default_tokenizer, fits,
                  json_lines, kind_of, lock, make_data, micro_batches, number, parse_spec,
                  read_json, reason_of, remove_scratch, run_main, say, write_json, written_whole)
from eval import evaluate, held_out_rows, perplexity
from model import (GPT, GPTConfig, attention_maps, find_device, load, parse_parts, parse_size, save,
                   transfer)

# --------------------------------------------------------------------------------------------------
# A run: two stages, and what moves between them


def run(s):
    """Everything that the settings say -> the content of result.json. Raises UserError, Stopped."""
    out = Path(s.out)
    join_processes(s)
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it
    data, warmup_data = open_data(s)
    # Before open_run: these turn the tokens of a stage into steps, in `s`, too.
    train_stage = stage_of(s, "train", data.block_size)
    warmup_stage = stage_of(s, "warmup", warmup_data.block_size) if warmup_data else None
    fingerprint = check_data(data, warmup_data, s)
    model = new_model(data, s.size, s.tied, s.dropout, s.seed)
    warmed = start_from_checkpoints(model, s)
    if warmup_data:
        seed = s.seed + 2 ** 32  # other weights
        warmup_model = new_model(warmup_data, s.size, True, s.warmup_dropout, seed)
        # What does not fit is refused now, not after hours of warm-up.
        transfer(warmup_model, model, parse_parts(s.transfer), s.embeddings, s.positions)

    with lock(out / ".lock") if rank() == 0 else contextlib.nullcontext():
        with first_process_first():
            finished = open_run(out, s, fingerprint, warmed["spec"])
        if finished:
            say(f"{out}: finished in an earlier run")
            return finished
        n = sum(p.numel() for p in model.parameters())
        say(f"{out}: {s.size} GPT, {n:,} parameters, context {data.block_size}; {s.device}, "
            f"{s.dtype}, {world_size()} process{'es' if world_size() > 1 else ''}")

        if warmup_data:
            # 1. Warm up.
            warmed |= train(warmup_model, warmup_data, warmup_stage, out / "warmup.pt", fingerprint,
                            warmed)
            # 2. Move what was learned.
            move(warmup_model, model, parse_parts(s.transfer), s)
            del warmup_model  # its memory is wanted now
        # 3. Continue.
        trained = train(model, data, train_stage, out / "ckpt.pt", fingerprint, warmed)
        # 4. Say what came of it.
        return write_result(out, s, fingerprint, warmed, trained)


def open_data(s):
    """The data of both stages; the second is None where nothing is warmed up. Raises UserError."""
    with first_process_first():  # it may have a corpus to tokenise, which the others then find
        data = make_data(s.data, s.seed, s.block_size, s.tokenizer)
        if s.warmup == "none":
            return data, None
        if s.warmup == "text":
            size = s.warmup_block_size or s.block_size
            return data, make_data(s.data, s.seed, size, s.tokenizer, split="warmup")
        return data, make_data(s.warmup, s.seed, s.warmup_block_size)


def new_model(data, size, tied, dropout, seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(data.vocab_size, data.block_size, *parse_size(size), dropout=dropout,
                         tied=tied))


def move(source, model, parts, s):
    """Moves these parts, and embeddings and positions as the settings say, and says what moved."""
    positions = transfer(source, model, parts, s.embeddings, s.positions)
    line = f"[transfer] {', '.join(parts)}; embeddings {s.embeddings}, positions "
    line += "moved" if positions else "random"
    if s.positions == "fit" and not positions:
        line += f": the warm-up has {source.config.block_size} of {model.config.block_size}"
    say(line)


def start_from_checkpoints(model, s):
    """Moves what --init, --attn_from and --mlp_from name into the model -> how it was warmed up."""
    specs = []
    warmed = {"tokens": 0, "seconds": 0.0, "before": {}, "result": {}}
    for path, parts in ((s.init, parse_parts(s.transfer)), (s.mlp_from, ["mlp"]),
                        (s.attn_from, ["attn"])):
        if path:
            source, state = load(path)
            move(source, model, parts, s)
            warm = state if state.get("stage") == "warmup" else state.get("warmed", {})
            warmed["tokens"] += warm.get("tokens", 0)
            specs.append(state.get("source", {}).get("spec") or Path(path).stem)
    return warmed | {"spec": " + ".join(specs) or s.warmup}


def check_data(data, warmup_data, s):
    """Refuses data that cannot be trained on. Returns their fingerprint. Raises UserError."""
    both = [data, warmup_data] if warmup_data else [data]
    fingerprint = [each.fingerprint() for each in both]
    for each in both:
        if not (each.train.__getitems__(range(64))[1] != -1).any():
            raise UserError(f"{each.spec}: no token counts in rows of {each.block_size}: longer "
                            "ones are needed")
    if s.embeddings == "keep" and both[-1].vocab_size != data.vocab_size:
        raise UserError(f"--embeddings keep needs one vocabulary: {warmup_data.spec} has "
                        f"{warmup_data.vocab_size} tokens, {data.spec} {data.vocab_size}")
    smallest = min(s.batch_size, s.warmup_batch_size if warmup_data else math.inf)
    if smallest < world_size():
        raise UserError(f"a batch of {smallest} is too small for {world_size()} processes")
    if world_size() > 1:
        theirs = [None] * world_size()
        dist.all_gather_object(theirs, fingerprint)
        if any(other != fingerprint for other in theirs):
            raise UserError("processes see different data: corpora have to be on a disk that all "
                            "machines share, or be copied to each")
    return fingerprint


RESULT = {  # what of result.json a finished run prints again
    "settings": {"data": str}, "warmup": str, "val_loss": float, "val_accuracy": float,
    "val_exact": float, "val_bits_per_byte": (float, None), "warmup_loss": (float, None),
    "warmup_accuracy": (float, None), "warmup_first_loss": (float, None),
    "warmup_first_accuracy": (float, None), "seconds": float,
    "tokens": {"procedural": float, "semantic": float}}


def open_run(out, s, fingerprint, warmup):
    """Makes the run's folder, or checks that it holds this very run. Returns its result if that is
    there, else None. Raises UserError."""
    if rank() == 0:
        remove_scratch(out)
    config = {"settings": vars(s), "warmup": warmup, "fingerprint": fingerprint,
              "environment": environment(s.device)}
    if not (out / "config.json").exists():
        if any(out.glob("[!.]*")):
            raise UserError(f"{out} is there and is not a run: choose another --out")
        write_json(out / "config.json", config)
        return None
    there = read_json(out / "config.json")
    if not fits(there, {"settings": dict}):
        raise UserError(f"{out / 'config.json'} is not of a run: choose another --out")
    for key, value in vars(s).items():
        if key not in OPERATIONAL and there["settings"].get(key) != value:
            line = (f"{out} holds a run with other settings ({key} {there['settings'].get(key)}, "
                    f"here {value}): choose another --out")
            if key == "steps":
                line += f", or --init {out}/ckpt.pt --transfer all to train on"
            raise UserError(line)
    if there.get("fingerprint") != fingerprint:
        raise UserError(f"{s.data} is not what it was when the run in {out} began: put it "
                        "back, or choose another --out")
    if (out / "result.json").exists():
        return read_json(out / "result.json", RESULT)
    if not s.resume and rank() == 0:
        raise UserError(f"{out} holds this run, unfinished: --resume goes on with it")
    return None


def environment(device):
    commit = None
    with contextlib.suppress(OSError):  # there may be no git
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent,
                                capture_output=True, text=True).stdout.strip()
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "device_name": name, "processes": world_size(),
            "commit": commit or None}


def write_result(out, s, fingerprint, warmed, trained):
    """Writes result.json, and returns what it holds."""
    before, after = warmed["before"], warmed["result"]
    found = {
        "settings": {key: value for key, value in vars(s).items() if key not in OPERATIONAL},
        "warmup": warmed["spec"], "fingerprint": fingerprint,
        "warmup_first_loss": before.get("loss"), "warmup_first_accuracy": before.get("accuracy"),
        "warmup_loss": after.get("loss"), "warmup_accuracy": after.get("accuracy"),
        **{f"val_{key}": value for key, value in trained["result"].items() if key != "tokens"},
        "tokens": {"procedural": warmed["tokens"], "semantic": trained["tokens"]},
        "seconds": warmed["seconds"] + trained["seconds"]}
    if rank() == 0:
        write_json(out / "result.json", found)
    return found


# --------------------------------------------------------------------------------------------------
# A stage of training


def train(model, data, stage, file, fingerprint, warmed):
    """Trains a model for one stage. `file` is its checkpoint: gone on from if it is there, and
    written with the data's fingerprint and what is known of a warm-up before. Returns {"before",
    "result": evaluations, "step", "tokens", "seconds", ...}. Raises UserError, and Stopped after a
    signal."""
    say(f"[{stage.label}] {data.spec}: {stage.steps:,} steps of {stage.batch_size} x "
        f"{stage.block_size} tokens")
    model.recompute = stage.recompute
    model.to(stage.device)
    optimizer = make_optimizer(model, stage)
    scaler = torch.amp.GradScaler(stage.device.partition(":")[0], enabled=stage.dtype == "float16")
    progress = {"step": 0, "tokens": 0, "seconds": 0.0, "before": None, "result": None, "passed": 0,
                "length": 2 if stage.curriculum else None}
    if file.exists():
        progress = resume(file, model, optimizer, scaler, stage, fingerprint)
    first = progress["step"]
    log = Log(file.with_name("log.jsonl"), stage, progress)
    if first and (first == stage.steps or progress["passed"] == 2):
        return progress  # it was complete
    if first:
        say(f"[{stage.label}] going on after step {first:,}")
    save_every = stage.save_every or stage.steps // 10 or 1
    eval_every = stage.eval_every or stage.steps // 5 or 1

    def due(every, done):
        return done % every == 0 or done == stage.steps

    def save_progress(step):
        progress.update(step=step, tokens=step * log.step_tokens, seconds=time.time() - log.began)
        if rank() == 0:
            source = {"spec": data.spec, "tokenizer": stage.tokenizer, "seed": stage.seed}
            save(file, model, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 stage=stage.name, source=source, fingerprint=fingerprint, warmed=warmed,
                 **progress)

    held_out = held_out_rows(data, stage.eval_rows)
    if not progress["before"]:
        progress["before"] = progress["result"] = measure(model, held_out, data, stage)
        log.add(0, result=progress["before"])
    n_micro = stage.grad_accum or enough_micro_batches(data, stage)
    net = wrapped(model, data, stage, n_micro) if stage.steps else model
    if progress["length"]:
        whole_length = data.train.longest
        data.train.longest = data.val.longest = progress["length"]
    rows = rows_from(data, stage, first)
    model.train()
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(stage, step)
        if stage.dropout:  # its masks depend on the step, so that a resumed run has the same
            torch.manual_seed(zlib.crc32(f"{stage.seed} {stage.name} {step} {rank()}".encode()))
        x, y = next(rows)
        # One process may have got the signal: all hear of it with the sum, and stop together.
        n_counted, asked_to_stop = total(int((y != -1).sum()), len(SIGNALS))
        if asked_to_stop:
            save_progress(step)
            raise Stopped(f"stopped at {stage.name} step {step:,} of {stage.steps:,}")
        micros = micro_batches(x, y, n_micro, trim=stage.device == "cpu")
        loss = gradients(net, model, micros, n_counted, stage, scaler)
        done = step + 1
        logging = due(stage.log_every, done) or done == 1
        saving = due(save_every, done)
        look = logging or saving or stage.device == "cpu"
        take_step(model, optimizer, scaler, stage, look)
        if logging:
            log.add(done, loss=total(float(loss))[0], lr=lr_at(stage, step))
        if due(eval_every, done):
            progress["result"] = measure(model, held_out, data, stage)
            log.add(done, result=progress["result"])
            good = stage.stop_at and progress["result"]["accuracy"] >= stage.stop_at
            progress["passed"] = progress["passed"] + 1 if good else 0
        growing = progress["length"] and progress["length"] < whole_length
        if growing and done % 20 == 0:  # the curriculum: every 20 steps, by 2 (ours)
            if measure(model, held_out_rows(data, 256), data, stage)["accuracy"] > 0.99:
                progress["length"] += 2
                data.train.longest = data.val.longest = progress["length"]
                rows = rows_from(data, stage, done)
        if saving or progress["passed"] == 2:
            save_progress(done)
        if progress["passed"] == 2:
            break
    return progress


def measure(model, rows, data, stage):
    """An evaluation, see eval.py. Raises UserError if its loss is not finite."""
    result = evaluate(model, rows, stage.device, autocast(stage), data.tokenizer)
    if not math.isfinite(result["loss"]):
        raise UserError("the held-out loss is not finite: a lower learning rate may help")
    return result


def lr_at(stage, step):
    """The learning rate of a step, which are counted from 0: a linear ramp up to lr, then along the
    schedule down to min_lr."""
    if step < stage.lr_ramp:
        return stage.lr * (step + 1) / stage.lr_ramp
    end = stage.lr / 10 if stage.min_lr is None else stage.min_lr
    done = (step - stage.lr_ramp) / max(1, stage.steps - stage.lr_ramp)
    share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1}
    return end + (stage.lr - end) * share[stage.lr_schedule]


def make_optimizer(model, stage):
    """AdamW, with weight decay on matrices and embeddings, not on biases and norms."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=stage.weight_decay,
                             fused=stage.device != "mps")


def rows_from(data, stage, first):
    """This process's share of the rows of each step from `first` on, an iterator of (x, y).

    Step s of a stage has the rows s * batch_size and on, whatever the number of processes."""
    steps = (range(step * stage.batch_size + rank(), (step + 1) * stage.batch_size, world_size())
             for step in range(first, stage.steps))
    cuda, workers = stage.device.startswith("cuda"), stage.workers
    if workers is None:  # on a CPU, they would take the cores from the model
        workers = min(8, max(1, os.cpu_count() // 2)) if cuda else 0
    # A batch is a range of row numbers, of which the Dataset makes x and y at once.
    return iter(DataLoader(data.train, batch_sampler=steps, collate_fn=tuple, num_workers=workers,
                           worker_init_fn=ignore_ctrl_c, pin_memory=cuda))


def ignore_ctrl_c(worker):
    """Ctrl-C reaches a run's workers, too, which its last step still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def enough_micro_batches(data, stage):
    """So many that a micro-batch's logits stay below 4 GB; of tasks on a CPU, 8 of 2,000 tokens or
    more, so that rows of like length go together (measured)."""
    tokens = stage.batch_size / world_size() * stage.block_size
    if stage.device == "cpu" and data.kind != "text":
        return max(1, min(8, int(tokens / 2000)))
    return math.ceil(tokens * data.vocab_size / 2 ** 30)


def wrapped(model, data, stage, n_micro):
    """The model as it is trained: compiled, and shared with other processes."""
    net = model
    if stage.compile:
        # A small model on a GPU waits for the launches of its kernels, which CUDA graphs save.
        small = sum(p.numel() for p in model.parameters()) < 10_000_000
        mode = "reduce-overhead" if small and stage.device.startswith("cuda") else None
        x, y = data.train.__getitems__(range(max(1, stage.batch_size // world_size() // n_micro)))
        try:
            net = torch.compile(model, mode=mode)
            with autocast(stage):
                loss = net(x.to(stage.device), y.to(stage.device))
            loss.backward()
        except Exception as error:  # a missing compiler, another platform: torch raises many kinds
            say(f"warning: torch.compile cannot run here ({type(error).__name__}): without it")
            net = model
        model.zero_grad(set_to_none=True)
    if world_size() > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    return net


def gradients(net, model, micros, n_counted, stage, scaler):
    """Backward through the micro-batches of a step -> this process's share of the step's loss.

    n_counted: the tokens that count in the whole step, in whichever process they are."""
    loss = 0.0
    for i, (x, y) in enumerate(micros):
        x, y = (each.to(stage.device, non_blocking=True) for each in (x, y))
        waits = world_size() > 1 and i < len(micros) - 1  # processes share gradients once a step
        watched = attention_maps(model) if stage.sharpen else contextlib.nullcontext()
        with net.no_sync() if waits else contextlib.nullcontext():
            with autocast(stage), watched as maps:
                micro_loss = net(x, y) / max(n_counted, 1)
            loss += micro_loss.detach()
            if stage.sharpen:
                blur = attention_entropy(maps, y).sum() / stage.batch_size
                micro_loss = micro_loss + stage.sharpen * blur
            # DDP takes the mean over processes; wanted is the sum.
            scaler.scale(micro_loss * world_size()).backward()
    return loss


def take_step(model, optimizer, scaler, stage, look):
    """Clips the gradient and takes a step. look: refuses a gradient that is not finite, for which
    a GPU has to be waited for; what is not looked at now is found by the next look."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.grad_clip or math.inf)
    if look and not scaler.is_enabled() and not math.isfinite(norm.item()):
        raise UserError("the loss or its gradient is not finite: a lower learning rate may help; "
                        "--resume goes on from the last checkpoint")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def autocast(stage):
    return torch.autocast(stage.device.partition(":")[0], getattr(torch, stage.dtype),
                          enabled=stage.dtype != "float32")


def attention_entropy(maps, y):
    """The mean over layers, heads and places up to the last that counts, (rows,), in nats. maps: of
    each layer what its heads attend to, (rows, heads, T, T)."""
    read = (y != -1).flip(1).cumsum(1).flip(1) > 0
    share = read / read.sum(1, keepdim=True).clamp_min(1)
    # The slope of entr at 0 is infinite.
    entropy = [torch.special.entr(each.clamp_min(1e-9)).sum(-1).mean(1) for each in maps]
    return (torch.stack(entropy).mean(0) * share).sum(1)


EVALUATION = {"loss": float, "accuracy": float, "exact": float}
PROGRESS = {"step": int, "tokens": int, "seconds": float, "before": EVALUATION,
            "result": EVALUATION, "passed": int, "length": (int, None)}


def resume(file, model, optimizer, scaler, stage, fingerprint):
    """Puts a checkpoint into model, optimiser and scaler -> how far it is. Raises UserError."""
    saved_model, state = load(file)
    try:
        if saved_model.config != model.config or state["fingerprint"] != fingerprint:
            raise ValueError("it is of another model, or of other data")
        if not fits(state, PROGRESS) or not 0 <= state["step"] <= stage.steps:
            raise ValueError("it does not say how far it is")
        progress = {key: state[key] for key in PROGRESS}
        saved, plain = state["optimizer"]["state"], optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters if saved else []):  # none before the first step
            for moment in (saved[i]["exp_avg"], saved[i]["exp_avg_sq"]):
                if moment.shape != p.shape or moment.dtype != p.dtype:
                    raise ValueError("its optimiser is of another model")
        optimizer.load_state_dict({"state": saved, "param_groups": plain["param_groups"]})
        scaler.load_state_dict(state["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file} is no checkpoint to go on from: {reason_of(error)}") from None
    model.load_state_dict(saved_model.state_dict())
    return progress


class Log:
    """log.jsonl, an object a line, and the same printed. On resuming, the lines of a stage
    after its checkpoint are dropped."""

    def __init__(self, path, stage, progress):
        self.path, self.stage = path, stage
        self.first = progress["step"]
        self.step_tokens = stage.batch_size * stage.block_size
        self.here = time.time()
        self.began = self.here - progress["seconds"]
        last = self.first if progress["before"] else -1  # step 0 is the evaluation before it
        if rank() == 0:
            with written_whole(self.path) as log:
                for entry in json_lines(self.path):
                    with contextlib.suppress(KeyError, TypeError):  # no entry of ours
                        if entry["stage"] != stage.name or entry["step"] <= last:
                            log.write(f"{json.dumps(entry)}\n".encode())

    def add(self, step, loss=None, lr=None, result=None):
        """After a step: its loss and learning rate, or an evaluation."""
        entry = {"stage": self.stage.name, "step": step, "tokens": step * self.step_tokens}
        label, steps = self.stage.label, self.stage.steps
        if loss is not None:
            each = (time.time() - self.here) / (step - self.first)
            entry |= {"loss": loss, "lr": lr, "tokens_per_second": round(self.step_tokens / each)}
            line = f"[{label}] step {step:,}/{steps:,} | loss {loss:.3f}"
            if step == 1:  # it is slow, where it compiles, and says nothing of the others
                self.here, self.first = time.time(), 1
            else:
                left = clock(each * (steps - step))
                line += f" | {self.step_tokens / each:,.0f} tokens/s | {left} left"
            say(line)
        if result:
            entry |= {"val_loss": result["loss"], "val_accuracy": result["accuracy"]}
            say(f"[{label}] {f'step {step:,}' if step else 'before'}: held-out loss "
                f"{result['loss']:.3f}, accuracy {result['accuracy']:.1%}")
        if rank() == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; --resume goes on "
                                "from the last checkpoint") from None


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


# --------------------------------------------------------------------------------------------------
# Processes and signals

SIGNALS = []  # those that came: after SIGINT and SIGTERM a step is finished and saved


class Stopped(Exception):
    """The run was stopped, and can go on from where it was."""


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def check_environment():
    """Refuses what torchrun did not set, or not whole. Raises UserError."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"
    there = {name: os.environ[name] for name in names if name in os.environ}
    numbers = [value for name, value in there.items() if name != "MASTER_ADDR"]
    whole = len(there) == len(names) and all(map(str.isdecimal, numbers)) and rank() < world_size()
    if {"RANK", "WORLD_SIZE"} & there.keys() and not whole:
        raise UserError(f"{there} is not as torchrun sets it: several processes need torchrun")


def join_processes(s):
    """Listens for signals, and joins the run's other processes, if torchrun started several."""
    for wanted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(wanted, lambda received, frame: SIGNALS.append(received))
    if world_size() > 1:
        cuda = s.device.startswith("cuda")
        if cuda:
            s.device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(s.device)
        patience = datetime.timedelta(hours=6)  # process 0 may have a corpus to tokenise
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)


@contextlib.contextmanager
def first_process_first():
    """The block runs in process 0 and then in the others, which find its files there."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def total(*values):
    """Sums over all processes; they meet on the CPU, so that no GPU is waited for."""
    if world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


# --------------------------------------------------------------------------------------------------
# Settings

# What is not given comes from one of these rows. Tasks: as published; the warm-up is ours, since
# models this small learn no rule in less.
TASK = dict(size="2_4_16", tied=False, steps=10_000, batch_size=1000, lr=1e-3, lr_schedule="cosine",
            lr_ramp=500, min_lr=0.0, weight_decay=1e-3, dropout=0.0, dtype="float32",
            eval_rows=4000,
            warmup_steps=10_000, warmup_batch_size=128, warmup_lr=5e-3, warmup_lr_schedule="cosine",
            warmup_lr_ramp=200, warmup_min_lr=0.0, warmup_weight_decay=0.1, warmup_dropout=0.0)
# On two CPU cores, in less than three minutes (ours): a task, a quarter of its rows at twice the
# rate until it is learned; and text, the lowest loss of what was tried.
LAPTOP_TASK = dict(batch_size=250, steps=1500, lr=2e-3, eval_every=100, stop_at=0.9,
                   warmup_steps=4000)
LAPTOP = dict(data="code", size="tiny", steps=3000, batch_size=8, block_size=128, lr=2e-3,
              lr_schedule="cosine", lr_ramp=100, weight_decay=0.1, dropout=0.0, dtype="float32",
              eval_rows=320,
              warmup_steps=2000, warmup_batch_size=8, warmup_lr=3e-3, warmup_lr_schedule="cosine",
              warmup_lr_ramp=200, warmup_min_lr=0.0, warmup_weight_decay=0.1, warmup_dropout=0.0)
# Text at GPT-2's size: paper, "Semantic pretraining"; no positions move. Its warm-ups are below.
C4 = dict(data="c4", size="gpt2", steps=10_000, batch_size=32, block_size=2048, lr=5e-4,
          lr_schedule="cosine", lr_ramp=0, weight_decay=0.0, dropout=0.1, eval_rows=640,
          positions="random", warmup_steps=2500, warmup_batch_size=64, warmup_lr=5e-4,
          warmup_lr_schedule="constant", warmup_lr_ramp=0, warmup_weight_decay=0.1,
          warmup_dropout=0.1)
PARROT = C4 | dict(data="codeparrot", steps=20_000, batch_size=48, block_size=1024, lr=5e-5,
                   min_lr=0.0, weight_decay=0.01)
MATH = PARROT | dict(data="deepmind_math", steps=50_000, batch_size=64, block_size=512)
WIKI = C4 | dict(data="wikitext103", block_size=1024)  # ours, after C4's
MEDIUM, LARGE = dict(size="24_16_1024"), dict(size="1.3b", recompute=True)
PRESETS = {
    "laptop": LAPTOP, "c4": C4, "c4-350m": C4 | MEDIUM,
    "c4-1.3b": C4 | LARGE | dict(steps=160_000),  # 10.5 billion tokens, the largest published run
    "codeparrot": PARROT, "codeparrot-350m": PARROT | MEDIUM, "codeparrot-1.3b": PARROT | LARGE,
    "deepmind_math": MATH, "deepmind_math-350m": MATH | MEDIUM, "deepmind_math-1.3b": MATH | LARGE,
    "wikitext103": WIKI, "wikitext103-350m": WIKI | MEDIUM, "wikitext103-1.3b": WIKI | LARGE}
ROWS = PRESETS | {
    "gpu": C4 | dict(steps=2000, block_size=1024, lr_ramp=100, weight_decay=0.1, dropout=0.0,
                     warmup_dropout=0.0),  # for corpora of some 10 MB (ours)
    "haystack": TASK | dict(transfer="attn"),
    "multiplication": TASK | dict(size="4_8_512", steps=156_250, batch_size=64, warmup_steps=2500,
                                  warmup_batch_size=64, warmup_lr=5e-4)}
# What a bare name stands for, on a laptop, and at GPT-2's size (paper, "Procedural data").
LAPTOP_WARMUPS = {"dyck": dict(warmup="dyck:k=8")}  # it learns no more types in the time
LAPTOP_TASK_WARMUPS = {"dyck": dict(warmup="dyck:length=36")}  # as long as 15 pairs are
LONG = dict(warmup_steps=500, warmup_batch_size=32)
WARMUPS = {name: dict(warmup=f"{name}:length=64") for name in
           ("identity", "reverse", "sort", "set", "union", "delete", "stack")}
WARMUPS |= {"dyck": dict(warmup="dyck:k=64,length=2048") | LONG,
            "dyck_shuffle": dict(warmup="dyck_shuffle:k=64,length=2048") | LONG,
            "eca": dict(warmup="eca:length=2048") | LONG,
            "text": dict(warmup_tokens=500 * 32 * 2048, warmup_batch_size=32)}

# Flags: name: (type or choices, default, what it is). Both stages have those of STAGE: --steps is
# the training's, --warmup_steps the warm-up's.
STAGE = {
    "steps": (number(0, 1e9), None, "optimiser steps"),
    "tokens": (number(1, 1e15), None, "the same in tokens, such as 655M"),
    "batch_size": (number(1, 1e6), None, "sequences per step, over all processes"),
    "block_size": (number(1, 1e6), None, "context in tokens; of rules and tasks: their rows"),
    "lr": (number(0, kind=float), None, "learning rate"),
    "lr_schedule": (("cosine", "linear", "constant"), None, "how the learning rate falls"),
    "lr_ramp": (number(0, 1e9), None, "steps in which it rises first"),
    "min_lr": (number(0, kind=float), None, "where it ends; if not given, a tenth of its height"),
    "weight_decay": (number(0, kind=float), None, "on matrices and embeddings alone"),
    "dropout": (number(0, 1, float), None, "dropout"),
}
FLAGS = {
    "warmup": (str, "dyck",
               "a rule or mixture (data.py list), none, or text: other text of the corpus"),
    "warmup_curriculum": (bool, False, "inputs of the warm-up grow from length 2 as it is learned"),
    "init": (str, None, "take up this checkpoint of a warm-up instead of making one"),
    "attn_from": (str, None, "a mixture of weights: the attention of this checkpoint,"),
    "mlp_from": (str, None, "and the MLPs of this one"),
    "transfer": (str, "full", "what moves over: full, or a list of attn, mlp, norm; all: go on "
                 "from a whole --init, embeddings too"),
    "embeddings": (("random", "mean", "keep"), "random", "how token embeddings and output head "
                   "begin: mean of the warm-up's rows, or keep (the same vocabulary)"),
    "positions": (("fit", "moved", "random"), "fit", "how positions begin; fit: moved where the "
                  "warm-up has as many"),
    "preset": (tuple(PRESETS), None, "a published run; or laptop: text or a task in minutes "
               "without a GPU"),
    "data": (str, None, "a task, a corpus or a path (data.py list) to train on; code if not given"),
    "tokenizer": (str, None, "of text: bytes, or one that tiktoken knows, such as gpt2"),
    "size": (str, None, "tiny, gpt2, gpt2-medium, -large, -xl, 1.3b, or layers_heads_width"),
    "tied": (bool, True, "the output head shares its weight with the token embeddings"),
    "grad_accum": (number(1, 1e5), None, "micro-batches a process makes of its share of a step"),
    "grad_clip": (number(0, kind=float), 1.0, "largest norm of the gradient; 0: no limit"),
    "sharpen": (number(0, kind=float), 0.0, "so many times the attention's entropy is added to the "
                "loss: a control, in place of a warm-up"),
    "seed": (number(0, 2 ** 32), 0, "of weights, rows and their order"),
    "device": (str, None, "cuda, mps or cpu"),
    "dtype": (("float32", "bfloat16", "float16"), None, "of matrix products"),
    "compile": (bool, None, "torch.compile"),
    "recompute": (bool, False, "less memory for a third more work"),
    "workers": (number(0, 257), None, "processes that make rows ahead"),
    "eval_every": (number(1, 1e9), None, "steps between evaluations; a fifth of the stage"),
    "eval_rows": (number(1, 1e9), None, "held-out rows of an evaluation"),
    "save_every": (number(1, 1e9), None, "steps between checkpoints; a tenth of the stage"),
    "stop_at": (number(0, 1.001, float), None,
                "stop at this accuracy (at most 1), seen twice in a row; the warm-up does not"),
    "log_every": (number(1, 1e9), 50, "steps between log lines"),
    "out": (str, None, "the run's folder; out/DATA-WARMUP-sSEED"),
    "resume": (bool, False, "go on with the run in --out"),
    "plan": (bool, False, "train nothing: print parameters, tokens, operations, memory and hours"),
    "tflops": (number(1e-9, kind=float), None, "for --plan: what a GPU really does, 1e12 a second"),
    **STAGE,
    **{f"warmup_{name}": (kind, None, f"of the warm-up: {text}")
       for name, (kind, _, text) in STAGE.items()},
}
# What may differ between a run and its resumption; everything else defines the run.
OPERATIONAL = {"device", "compile", "recompute", "workers", "eval_every", "save_every", "log_every",
               "grad_accum", "out", "resume", "plan", "tflops"}


def parse(argv):
    """The command line -> (settings, a namespace; those that were given). Raises UserError."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=SUPPRESS)
    for name, (kind, default, text) in FLAGS.items():
        if default and kind is not bool:
            text += f" (default {default})"
        if kind is bool:
            parser.add_argument(f"--{name}", action=BooleanOptionalAction, help=text)
        elif isinstance(kind, tuple):
            parser.add_argument(f"--{name}", choices=kind, help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, metavar="X", help=text)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":
            raise UserError(f"--{name} is empty")
    check_environment()
    return settle(given), given


def settle(given):
    """Every setting: as it is given, else as the checkpoint has it that the run starts from, else
    as the row of ROWS says, else the default of its flag. Raises UserError."""
    preset = given.get("preset")
    data = given.get("data") or (PRESETS[preset]["data"] if preset else "code")
    kind = kind_of(data)
    device = find_device(given.get("device"), elsewhere=given.get("plan", False))
    cuda = device.startswith("cuda")
    checkpoint = named_checkpoint(given)

    s = {name: default for name, (_, default, _) in FLAGS.items()}
    s |= dict(dtype="float32", compile=cuda and not given.get("sharpen"))
    if cuda:  # old GPUs have no bfloat16
        s["dtype"] = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    warmup = given.get("warmup", "none" if checkpoint else "dyck")
    s["out"] = f"out/{run_name(given | {'warmup': warmup})}"
    bare = {}  # what the name of a rule alone stands for
    if kind == "task":
        s |= ROWS.get(data.partition(":")[0], TASK)
        if preset:
            s |= LAPTOP_TASK
            bare = LAPTOP_TASK_WARMUPS
    else:
        row = preset or ("gpu" if cuda else "laptop")
        s |= ROWS[row] | dict(tokenizer=default_tokenizer(data))
        bare = LAPTOP_WARMUPS if row == "laptop" else WARMUPS
    name = warmup.removeprefix("shuffled:")
    if name in bare:  # a control has all that its rule has, in another order
        s |= bare[name]
        warmup = warmup.replace(name, bare[name].get("warmup", name))
    if warmup == "text":
        s["embeddings"] = "keep"
    if checkpoint:
        s |= settings_of(checkpoint, whole=given.get("transfer") == "all")
    s |= given | dict(data=data, device=device, warmup=warmup)
    if "warmup_steps" in given:
        s["warmup_tokens"] = None
    if warmup == "none":
        s["warmup_steps"] = 0
    check(s, given, kind)
    return Namespace(**s)


def named_checkpoint(s):
    """The checkpoint that a run starts from, if its settings name one."""
    return s.get("init") or s.get("attn_from") or s.get("mlp_from")


def settings_of(path, whole):
    """What a run takes from a checkpoint: the model's shape, or all that it has to keep."""
    model, state = load(path)
    c = model.config
    settings = {"size": f"{c.n_layer}_{c.n_head}_{c.n_embd}"}
    if whole:
        settings |= dict(tied=c.tied, block_size=c.block_size, embeddings="keep", positions="moved")
        tokenizer = state.get("source", {}).get("tokenizer")
        settings["tokenizer"] = tokenizer or ("gpt2" if c.vocab_size >= 50257 else "bytes")
    return settings


def check(s, given, kind):
    """Refuses settings that do not go together. Raises UserError."""
    warmup, data = s["warmup"], s["data"]
    parse_parts(s["transfer"])  # these refuse what they do not know
    GPTConfig(1, 1, *parse_size(s["size"]))
    rule = warmup not in ("none", "text")
    if rule:
        parse_spec(warmup)
    for wrong, line in (
            (kind == "rule", f"--data {data} is a rule: --warmup takes rules"),
            (kind == "task" and s["preset"] not in (None, "laptop"),
             f"--preset {s['preset']} is for text: tasks take laptop, or are as published"),
            (rule and kind_of(warmup) != "rule", f"--warmup {warmup} is no rule"),
            (warmup == "text" and kind == "task", "--warmup text needs --data that is text"),
            (warmup != "none" and named_checkpoint(s),
             "--warmup makes a warm-up, --init, --attn_from and --mlp_from name one: choose"),
            (s["transfer"] == "all" and not s["init"], "--transfer all needs --init"),
            ({"steps", "tokens"} <= given.keys(), "--steps and --tokens say the same: choose"),
            ({"warmup_steps", "warmup_tokens"} <= given.keys(),
             "--warmup_steps and --warmup_tokens say the same: choose"),
            (s["warmup_curriculum"] and not (rule and can_grow(warmup)),
             "--warmup_curriculum needs a rule whose input can grow from length 2"),
            (s["sharpen"] and (s["compile"] or s["recompute"]),
             "--sharpen looks at the attention: it excludes --compile and --recompute")):
        if wrong:
            raise UserError(line)


def run_name(given):
    """"code-dyck-s0", and whatever else was given: "code-dyck-s0-transfer=attn"."""
    what = [given["preset"]] if "preset" in given else []
    if "data" in given or not what:
        what.append(Path(given.get("data", "code")).name)
    name = f"{'-'.join(what)}-{given['warmup']}-s{given.get('seed', 0)}"
    for key, value in given.items():
        if key not in OPERATIONAL | {"data", "warmup", "seed", "preset"}:
            name += f"-{key}={value}"
    name = re.sub(r"[^\w.=+*-]+", "_", name, flags=re.ASCII)
    return name if len(name) < 120 else f"{name[:110]}-{zlib.crc32(name.encode()):08x}"


def stage_of(s, name, block_size):
    """The settings as one stage has them, "warmup" or "train". Tokens become steps, in `s`, too:
    steps define a run."""
    prefix = "warmup_" if name == "warmup" else ""
    own = vars(s) | {key: getattr(s, prefix + key) for key in STAGE}
    label = "train" if s.warmup == "none" else "2/2 train"
    stage = Namespace(**own | dict(name=name, label=label, block_size=block_size, curriculum=False))
    if prefix:
        vars(stage).update(label="1/2 warm-up", curriculum=s.warmup_curriculum, stop_at=None,
                           sharpen=0.0)
    if stage.tokens:
        stage.steps = max(1, round(stage.tokens / stage.batch_size / block_size))
        vars(s).update({f"{prefix}steps": stage.steps, f"{prefix}tokens": None})
    return stage


# --------------------------------------------------------------------------------------------------
# What is said before and after


def summarise(found, s, given):
    """What a newcomer wants to know at the end."""
    spent, out = found["tokens"], shlex.quote(s.out)
    say("\n" + "-" * 100)
    if found["warmup"] == "none":
        say("warm-up    none")
    elif found["warmup_loss"] is None:
        say(f"warm-up    {found['warmup']}, from a checkpoint")
    else:
        say(f"warm-up    {s.warmup}: held-out loss {found['warmup_first_loss']:.2f} -> "
            f"{found['warmup_loss']:.2f} nats per token, accuracy "
            f"{found['warmup_first_accuracy']:.0%} -> {found['warmup_accuracy']:.0%}")
    checkpoints = [file for file in ("warmup.pt", "ckpt.pt") if Path(s.out, file).exists()]
    if not s.steps:
        preset = f"--preset {s.preset} " if s.preset else ""
        if checkpoints:
            say(f"next       python train.py {preset}--data {shlex.quote(s.data)} "
                f"--init {out}/warmup.pt")
        return
    share = spent["procedural"] / spent["semantic"]
    line = f"tokens     {spent['procedural']:,} of warm-up, {spent['semantic']:,} of {s.data}"
    if share:
        line += f": {share:.3g} to 1 (paper: 0.001 to 0.003, in far longer runs)"
    say(line)
    line = f"result     held-out loss {found['val_loss']:.4f} nats per counted token"
    if found["val_bits_per_byte"] is not None:
        line += f" = {found['val_bits_per_byte']:.4f} bits per byte"
    if kind_of(s.data) == "text":
        say(f"{line}, perplexity {perplexity(found['val_loss']):.2f}")
    else:
        say(f"{line}, {found['val_accuracy']:.2%} of answer tokens, {found['val_exact']:.2%} of "
            "answers right")
    files = ", ".join(["config.json", "log.jsonl", *checkpoints, "result.json"])
    say(f"files      {out}: {files} ({clock(found['seconds'])})")
    other = next_command(s, given, "none" if spent["procedural"] else "dyck")
    flags = []
    for key, value in other.items():
        if isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no-{key}")
        else:
            flags += [f"--{key}", str(value)]
    say(f"next       python train.py {shlex.join(flags)}\n           the same "
        f"{'without the' if spent['procedural'] else 'with a'} warm-up; then: python analyze.py "
        f"curves {out} {shlex.quote('out/' + run_name(other))}")


def next_command(s, given, warmup):
    """The flags of the same run with another warm-up."""
    moves = "init", "attn_from", "mlp_from", "transfer", "embeddings", "positions"
    other = {key: value for key, value in given.items()
             if key not in (*moves, "out", "resume") and not key.startswith("warmup")}
    other["warmup"] = warmup
    plain = settle(other)
    for key in ("size", "tied", "block_size", "tokenizer"):  # these may come from a checkpoint
        if getattr(s, key) != getattr(plain, key):
            other[key] = getattr(s, key)
    return other


def print_plan(s):
    """Parameters, tokens, operations, memory and hours, without published data and training.

    A token takes 6 operations for each parameter in a matrix product, and 12 * n_layer * n_embd *
    context for attention (PaLM's way to count, arXiv 2204.02311, appendix B)."""
    n_layer, _, width = parse_size(s.size)
    vocab = {"gpt2": 50257, "bytes": 257, "characters": 97}.get(s.tokenizer)
    if s.data in CORPORA and vocab and s.block_size:  # it need not be here
        data = Namespace(vocab_size=vocab, block_size=s.block_size, kind="text")
    else:
        data = make_data(s.data, 0, s.block_size, s.tokenizer)
    stages = {"train": data}
    if s.warmup == "text":
        size = s.warmup_block_size or data.block_size
        stages = {"warmup": Namespace(vocab_size=data.vocab_size, block_size=size), **stages}
    elif s.warmup != "none":
        stages = {"warmup": make_data(s.warmup, 0, s.warmup_block_size), **stages}
    operations = 0
    for name, each in stages.items():
        stage = stage_of(s, name, each.block_size)
        with torch.device("meta"):  # shapes without numbers
            model = new_model(each, s.size, s.tied or name == "warmup", 0.0, 0)
        parameters = sum(p.numel() for p in model.parameters())
        matrices = sum(layer.weight.numel() for layer in model.modules()
                       if isinstance(layer, torch.nn.Linear))
        tokens = stage.steps * stage.batch_size * stage.block_size
        operations += tokens * (6 * matrices + 12 * n_layer * width * stage.block_size)
        say(f"{name:10} {parameters:,} parameters, vocabulary {each.vocab_size:,}; {stage.steps:,} "
            f"steps of {stage.batch_size} x {stage.block_size:,} = {tokens:,} tokens")
    say(f"compute    {operations:.3g} operations")
    if s.tflops:
        hours = operations * (4 / 3 if s.recompute else 1) / s.tflops / 1e12 / 3600 / world_size()
        say(f"time       {hours:,.1f} hours at {s.tflops:g} TFLOP/s a GPU; GPUs: {world_size()}")
    else:
        say("time       add --tflops: what one GPU really does, often 0.3 to 0.5 of its peak")
    # The training stage, which came last, is the largest. A micro-batch of it, in tokens:
    micro = stage.batch_size / world_size() * stage.block_size
    micro /= s.grad_accum or enough_micro_batches(data, stage)
    # Bytes that the backward pass keeps of each token, layer and unit of width (by reading).
    kept = 4 if s.recompute else 60 if s.dtype == "float32" else 34
    activations = micro * (kept * width * n_layer + 8 * data.vocab_size) / 2 ** 30
    say(f"memory     a GPU: {16 * parameters / 2 ** 30:.2f} GiB of weights, "
        f"gradients and AdamW's state; about {activations:.2f} GiB of activations of micro-batches "
        f"of {micro:,.0f} tokens")
    if s.data in PUBLISHED:
        say(f"data       python data.py prepare {s.data} --tokens {math.ceil(tokens / 1e6)}M")


def main():
    settings, given = parse(sys.argv[1:])
    if settings.plan:
        return print_plan(settings)
    try:
        summarise(run(settings), settings, given)
    except Stopped as stopped:
        say(f"{stopped}; saved. To go on: the same command with --resume")
        sys.exit(128 + (SIGNALS or [signal.SIGTERM])[0])  # another process may have got it
    finally:
        if dist.is_initialized():
            gc.collect()  # of DDP, which would keep the group's threads to the end, and abort
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
