"""What many runs say.

    python analyze.py curves out/code-dyck-s0 out/code-none-s0    held-out loss by tokens, a picture
    python analyze.py table --seeds 3 --jobs 2                    runs what an experiment lacks
    python analyze.py table --show                                its table and figure; runs nothing
    python analyze.py claims                                      what the paper says, what is found

An experiment is a list of rows, and a row is a command line of train.py, which is run once for each
seed in a folder of its own below --results. The rows of a column, a task or a text, are compared
with its first; what of a run is compared, `measure` says.
"""
import functools
import gzip
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import (RULES, TASKS, Busy, Parser, UserError, checked, fits, json_lines, lock, number,
                  read_json, reading, run_main, write_json, written_whole)
from eval import Opened, entropy_of_heads, keep_figure, probe_learned, pyplot
from model import GPT, part_of, save
from train import OPERATIONAL, PRESETS, Stopped, clock

# --------------------------------------------------------------------------------------------------
# Settings are command lines


def as_dict(flags):
    """"--data code --lr 1e-3" -> {"--data": "code", "--lr": "1e-3"}. Each flag has one value."""
    words = shlex.split(flags)
    return dict(zip(words[::2], words[1::2]))


def join(*flags):
    """Flags one after another; of one that comes twice, the later value counts."""
    merged = as_dict(" ".join(flags))
    return shlex.join(itertools.chain.from_iterable(merged.items()))


def folder_of(seed, train, warmup="", change="", mlp_from="", warmup_seeds=()):
    """Where a run is. The same flags in any order are the same run, whichever experiment asks."""
    flags = as_dict(train)
    parts = [sorted(as_dict(part).items()) for part in (train, warmup, mlp_from)]
    if any(each != seed for each in warmup_seeds):
        parts.append(warmup_seeds)
    data = Path(flags.get("--data") or flags["--preset"]).name
    label = ["warmup" if flags.get("--steps") == "0" else data,
             flags.get("--warmup") or as_dict(warmup).get("--warmup"), flags.get("--transfer"),
             change, f"{zlib.crc32(repr((parts, change)).encode()):08x}", f"s{seed}"]
    return re.sub(r"[^\w.=+*-]+", "_", "-".join(filter(None, label)))


class Setting(NamedTuple):
    """What is run with each of so many seeds, and compared with the others of its column."""
    column: str
    name: str
    train: str          # flags of train.py, but for --seed and --out
    warmup: str = ""    # flags of the warm-up that it takes up: a run of its own, made once
    change: str = ""    # what is done to the weights of the warm-up first, see change_weights
    mlp_from: str = ""  # flags of a second warm-up, whose MLPs are taken with the first's attention
    warmup_seeds: tuple = ()  # of these warm-ups, where they are not the run's own
    seeds: int = 10

    def warmups(self, seed):
        """The flags and seeds of the warm-ups that it takes up."""
        flags = [each for each in (self.warmup, self.mlp_from) if each]
        return list(zip(flags, self.warmup_seeds or (seed, seed)))

    def folder(self, seed):
        return folder_of(seed, *self[2:7])


# The quick budget (ours) is for two CPU cores: minutes a run. Its tasks have the published model
# and a quarter of the published rows at twice the rate. Recall stops once it is solved; arithmetic
# and sorting have a fixed budget, as published. Their warm-ups are shorter than train.py's, and of
# brackets as long as recall's rows; those before text have the published batch and rate, and as
# many tokens as are best in the paper.
TASK = "--batch_size 250 --lr 2e-3"
RECALL = f"{TASK} --eval_every 100 --stop_at 0.9"
FIXED = f"{TASK} --eval_every 500 --steps 6000"
TEXT = ("--preset laptop --size 4_4_128 --block_size 256 --batch_size 16 --steps 2500 "
        "--lr 3e-3 --lr_ramp 200")
BEFORE_TASK = "--data haystack --warmup_steps 6000"  # of brackets 49.2 M tokens
BEFORE_TEXT = ("--data haystack --warmup_batch_size 64 --warmup_lr 5e-4 --warmup_lr_ramp 0 "
               "--warmup_lr_schedule constant --warmup_dropout 0.1 --warmup_tokens 4M")
COLUMNS = {
    "quick": {"recall": f"--data haystack {RECALL}",
              "recall of 15": f"--data haystack:pairs=15 --steps 6000 {RECALL}",
              "addition": f"--data addition {FIXED}",
              "reversed_addition": f"--data reversed_addition {FIXED}",
              "sorting": f"--data sorting {FIXED}",
              "code": f"--data code {TEXT}",
              "english": f"--data docs {TEXT}",
              "english, smaller": f"--data docs {TEXT} --size 2_4_64",
              "english, larger": f"--data docs {TEXT} --size 6_8_256",
              "math": f"--data math {TEXT}"},
    "paper": {"recall": "--data haystack --eval_every 100",
              "addition": "--data addition --eval_every 100",
              "reversed_addition": "--data reversed_addition --eval_every 100",
              "multiplication": "--data multiplication --eval_every 1500",
              "sorting": "--data sorting --eval_every 100",
              "code": "--preset codeparrot",
              "english": "--preset c4",
              "english, larger": "--preset c4-350m",
              "math": "--preset deepmind_math"}}
TASK_COLUMNS = ("recall", "recall of 15", "addition", "reversed_addition", "multiplication",
                "sorting")
TEXTS = ("code", "english", "math")

# How a task starts from its warm-up. Two ways are published: the whole model, with embeddings at
# the mean of the warm-up's and positions if it has enough; its attention alone, and all else fresh.
# Ours, train.py's default before haystack, moves the attention and the positions. It was the best
# of four starts on seeds 0 to 2; seeds 3 to 9 confirm it.
WHOLE = "--transfer full --embeddings mean --positions fit"
FRESH = "--embeddings random --positions random"
STARTS = {"whole": WHOLE, "attention": f"--transfer attn {FRESH}",
          "attention, positions": "--transfer attn --embeddings random --positions fit"}
OURS = STARTS["attention, positions"]


# --------------------------------------------------------------------------------------------------
# Experiments


class Line(NamedTuple):
    """A setting before its column is known, whose flags come before its own."""
    name: str
    warmup: str = "none"  # its spec, and flags of it
    flags: str = ""       # how it moves over, and what else differs
    change: str = ""
    mlp_from: str = ""    # a second warm-up
    warmup_seeds: tuple = ()
    share: str = "1"      # of the column's steps


def cross(*lists, name="{}", **fields):
    """A Line for each combination of what is in the lists; {0} stands for what is of the first."""
    lines = []
    for each in itertools.product(*lists):
        filled = {field: text.format(*each) for field, text in fields.items()}
        lines.append(Line(name.format(*each), **filled))
    return lines


class Experiment(NamedTuple):
    """groups: (columns, their lines) or, if but one budget has them, (columns, lines, budget)"""
    question: str
    groups: list
    on_tasks: int = 10  # seeds
    on_text: int = 6


DIAGNOSTICS = ("recall of 15", "reversed_addition", "addition", "sorting")
EQUAL = "--warmup_tokens 49152000"  # as many as BEFORE_TASK has of brackets
LONG = "--warmup_steps 24000"  # after 6,000 most stop on a plateau, and have no sharp heads
WHOLE_OR_ATTENTION = list(STARTS.items())[:2]
QUARTERS = [f"{kept} {which}" for kept in ("only", "without")
            for which in ("sharp", "blurred", "random")]
CHANGES = ("shuffled", "redrawn", "noise 0.1", "noise 0.3", "noise 1", "scaled 0.5", "scaled 2")
EXPERIMENTS = {
    # Named before the runs, on five starts that were tried: right after the transfer, of the power
    # of the states that the head reads where the key is asked for, the share that differs between
    # 1,000 held-out rows. Of two warm-ups that start in one way, the one of the smaller share is to
    # find the needle later (Spearman's rank correlation, within each start that moves MLPs).
    "starts": Experiment("which part makes it, and which breaks it: the MLPs (ours)", [
        (("recall of 15",), cross(
            ("random", "mean"), ("attn", "attn,norm", "attn,mlp", "full"),
            name="dyck, {1}, embeddings {0}", warmup="dyck",
            flags="--transfer {1} --embeddings {0} --positions fit")),
        (("recall",), [
            *cross(("attn", "attn,norm"), name="dyck, {}, embeddings random", warmup="dyck",
                   flags="--transfer {} --embeddings random --positions fit"),
            Line("dyck, full, embeddings mean", "dyck", WHOLE),
            Line("none, steps 13500", flags="--steps 13500")])]),  # ten of these are there
    "repeats": Experiment(
        "how much of the spread is the warm-up's: ten of them, each before three seeds of the task",
        [(("recall of 15",), [Line(f"dyck, as published, warm-up {seed}", "dyck",
                                   warmup_seeds=(seed,)) for seed in range(10)])], on_tasks=3),
    "strangers": Experiment(  # of warm-ups 0, 1, 4 and 7: 0 and 7 are found with their own MLPs
        "attention of one warm-up, MLPs of another: is it these MLPs, or that they are strangers?",
        [(("recall of 15",), [
            Line(f"attention of {a}, MLPs of {b}", "dyck", "--embeddings random --positions fit",
                 mlp_from="dyck", warmup_seeds=(a, b))
            for a, b in itertools.permutations((0, 1, 4, 7), 2)])], on_tasks=2),
    "budgets": Experiment("the warm-up's tokens as further steps, and other rates and ramps", [
        (("recall of 15",), [Line("dyck, attention, positions", "dyck", OURS),
                             Line("none, steps 12144", flags="--steps 12144")]),
        (TEXTS, [Line("none, steps 3500", flags="--steps 3500")]),
        (("recall", "recall of 15", *TEXTS), cross(
            ("lr 1e-3", "lr 4e-3", "lr 8e-3", "lr_ramp 0", "lr_ramp 1000"),
            name="none, {}", flags="--{}"))]),
    "tasks": Experiment("which rule helps which task, all after 49.2 M tokens of warm-up", [
        (DIAGNOSTICS, cross(("dyck",), WHOLE_OR_ATTENTION, name="{0}, {1[0]}", warmup="{0}",
                            flags="{1[1]}"), "quick"),
        (DIAGNOSTICS, cross(("identity", "set", "union", "delete", "eca"), WHOLE_OR_ATTENTION,
                            name="{0}, {1[0]}", warmup=f"{{0}} {EQUAL}", flags="{1[1]}"),
         "quick")], on_tasks=6),
    "table": Experiment(
        "which warm-up helps which task, moved over in either published way, or in ours", [
            (TASK_COLUMNS, cross(  # the last in rows as long as the brackets'
                ("dyck", "identity", "set", "eca", "eca:rule=random,length=64"), STARTS.items(),
                name="{0}, {1[0]}", warmup="{0}", flags="{1[1]}"), "quick"),
            # It can no longer be run: its ten results are kept.
            (("recall of 15",), [Line("nca:states=2,grid=6,length=64, attention, positions",
                                      "nca:states=2,grid=6,length=64", OURS)], "quick"),
            (TASK_COLUMNS, cross((*RULES, "eca:rule=random"), STARTS.items(), name="{0}, {1[0]}",
                                 warmup="{0}", flags="{1[1]}"), "paper")]),
    "transfer": Experiment("what has to move over: the whole model, attention, MLPs or norms", [
        (("recall", *TEXTS), cross(("set", "dyck"), ("full", "attn", "mlp", "norm"),
                                   name="{0}, {1}", warmup="{0}", flags="--transfer {1}"))]),
    "embeddings": Experiment("where token embeddings and positions begin", [
        (("recall",), cross(
            ("dyck", "identity", "set"), ("full", "attn"), ("random", "mean"), ("fit", "random"),
            name="{0}, {1}, {2}, {3}", warmup="{0}",
            flags="--transfer {1} --embeddings {2} --positions {3}"))]),
    "controls": Experiment("the critics' controls: shuffled rows, as many tokens of text", [
        (("recall", "recall of 15", *TEXTS),
         cross(("dyck", "shuffled:dyck", "set", "shuffled:set"), warmup="{}")),
        (("recall", "recall of 15"), [
            *cross(("dyck", "shuffled:dyck"), name="{}, attention, positions", warmup="{}",
                   flags=OURS),
            Line("dyck, lr 1e-3", "dyck", "--lr 1e-3")]),
        (TEXTS, [Line("text", "text"), Line("set, lr 1e-3", "set", "--lr 1e-3")])]),
    "weights": Experiment(
        "is it the values or the scale: weights shuffled within tensors, redrawn, noisy, scaled", [
            (("recall of 15",), [Line("as it is", "dyck", OURS),
                                 *cross(CHANGES, warmup="dyck", flags=OURS, change="{}")]),
            (("code",), [Line("as it is", "set"), *cross(CHANGES, warmup="set", change="{}")])]),
    "heads": Experiment(
        "which heads carry it: the sharpest, most blurred or random quarter, or all but these", [
            (("recall of 15",), [
                Line("long warm-up", f"dyck {LONG}", OURS),
                *cross(QUARTERS, name="long warm-up, {}", warmup=f"dyck {LONG}", flags=OURS,
                       change="{}")]),
            (("code",), [Line("as it is", "set"), *cross(QUARTERS, warmup="set", change="{}")])],
        on_tasks=6),
    "sharpen": Experiment("no warm-up, but a penalty on the attention's entropy in its place", [
        (("recall of 15",), [Line("dyck", "dyck", OURS)]),
        (("english",), [Line("set", "set")]),
        (("recall of 15", "english"), cross(("0.01", "0.1", "1"), name="penalty {}",
                                            flags="--sharpen {}"))], on_tasks=6),
    "length": Experiment("how much warm-up is best, and where more becomes worse", [
        (TEXTS, cross(("dyck", "set"), ("1M", "2M", "4M", "8M", "16M"), name="{0}, {1}",
                      warmup="{0} --warmup_tokens {1}"))]),
    "mix": Experiment("set and union in proportions; attention of one warm-up, MLPs of another", [
        (TEXTS, cross(("set", "union"), warmup="{}")),
        (TEXTS, cross((("0.25", "0.75"), ("0.5", "0.5"), ("0.75", "0.25")),
                      name="{0[0]} set, the rest union",
                      warmup="{0[0]}*set:length=64+{0[1]}*union:length=64")),
        (DIAGNOSTICS, [
            Line("rule 110, MLPs", f"eca {EQUAL}", f"--transfer mlp {FRESH}"),
            *cross((("dyck", "dyck"), ("set", f"set {EQUAL}")), name="{0[0]}, attention",
                   warmup="{0[1]}", flags=STARTS["attention"]),
            *cross((("dyck", "dyck"), ("set", f"set {EQUAL}")), warmup="{0[1]}",
                   name="attention of {0[0]}, MLPs of rule 110", flags=FRESH,
                   mlp_from=f"eca {EQUAL}")], "quick")], on_tasks=6),
    "efficiency": Experiment(
        "how much less text does it take, until the loss is that of the baseline with all of it", [
            (TEXTS, cross(("set", "union", "sort", "dyck", "dyck_shuffle", "eca", "eca:rule=random",
                           "text"), warmup="{}")),
            (TEXTS, cross(("set", "union"), (0.85, 0.7, 0.55), name="{0}, {1:.0%} of the text",
                          warmup="{0}", share="{1}"))]),
    "tuned": Experiment("what rate and ramp are worth to the baseline and beside a warm-up", [
        (TEXTS, cross(("5e-4", "1e-3", "3e-3"), (0, 200), ("none", "set", "union"),
                      name="{2}, {0}, ramp {1}", warmup="{2}", flags="--lr {0} --lr_ramp {1}"))]),
    "grid": Experiment("learning rate by weight decay, for none and a warm-up: best against best", [
        (("english",), cross(
            (0, 0.1), ("1e-3", "2e-3", "4e-3", "8e-3"), ("none", "set"),
            name="{2}, {1}, decay {0}", warmup="{2}", flags="--lr {1} --weight_decay {0}"))]),
    "scale": Experiment("the gain over sizes of the model", [
        (("english, smaller", "english", "english, larger"), cross(("dyck", "set"), warmup="{}"))]),
}


def settings_in(name, budget):
    """The settings of an experiment, column by column; a budget may lack some of these. First in
    each comes the one without a warm-up, which the others are compared with."""
    experiment = EXPERIMENTS[name]
    lines = {}
    for columns, group, *only in experiment.groups:
        for column in columns:
            if column in COLUMNS[budget] and budget in (only or COLUMNS):
                lines.setdefault(column, [Line("none")]).extend(group)
    return [setting(column, budget, line, experiment)
            for column, each in lines.items() for line in each]


def setting(column, budget, line, experiment):
    """A line in a column. A warm-up moves over as published, the whole model, before text with
    fresh positions, unless the line says otherwise."""
    train, on_task = COLUMNS[budget][column], column in TASK_COLUMNS
    if line.mlp_from or line.warmup == "none":  # it says itself what moves, or nothing does
        how = ""
    elif line.warmup == "text":
        how = "--transfer all"
    else:
        how = WHOLE if on_task else "--positions random"
    flags = join(train, how, line.flags)
    if line.share != "1":
        preset = as_dict(train).get("--preset")
        steps = as_dict(train).get("--steps") or PRESETS[preset]["steps"]
        flags = join(flags, f"--steps {int(steps) * float(line.share):.0f}")
    if line.warmup == "none":
        flags = join(flags, "--warmup none")
    first, second = (warmup_flags(each, train, budget, on_task) if each not in ("", "none") else ""
                     for each in (line.warmup, line.mlp_from))
    return Setting(column, line.name, flags, first, line.change, second, line.warmup_seeds,
                   experiment.on_tasks if on_task else experiment.on_text)


def warmup_flags(warmup, train, budget, on_task):
    """The flags of a run that stops after its warm-up. Its --data matters to the warm-up `text`
    alone: before others, quick columns name the same data, and share warm-ups."""
    spec, _, flags = warmup.partition(" ")
    before, quick = train, budget == "quick"
    if quick and on_task:
        before = "--data haystack" if EQUAL in flags else BEFORE_TASK
    elif quick and spec == "text":
        before = f"{train} --warmup_tokens 4M"
    elif quick:
        before = f"{BEFORE_TEXT} --size {as_dict(train)['--size']}"
    rule = spec.removeprefix("shuffled:")
    if not on_task and rule in ("identity", "sort", "set", "union"):
        spec += ":length=64"  # as published; before tasks it is 20
    if quick and on_task and rule == "dyck":
        spec += ":length=64"
    return join(before, flags, f"--warmup {spec} --steps 0")


# --------------------------------------------------------------------------------------------------
# Changes to the weights of a warm-up


@torch.no_grad()
def change_weights(model, change, seed, blur):
    """Changes attention and MLPs of a GPT in place; the rest stays.

    "shuffled": the values of each tensor in another order; "redrawn": normal numbers of its mean
    and spread; "noise x": x times its spread is added; "scaled x": times x; "only" or "without"
    "sharp", "blurred" or "random": that quarter of the heads is kept, or drawn afresh (the others
    the other way round), by `blur`, the entropy of each head (n_layer, n_head)."""
    what, _, which = change.partition(" ")
    if what in ("only", "without"):
        return replace_heads(model, what == "without", which, seed, blur)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if part_of(name) not in ("attn", "mlp"):
            continue
        noise = p.std(correction=0) * torch.randn(p.shape, generator=generator)
        if what == "shuffled":
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
        elif what == "redrawn":
            p.copy_(p.mean() + noise)
        elif what == "noise":
            p.add_(float(which) * noise)
        else:
            p.mul_(float(which))


def replace_heads(model, replaced, which, seed, blur):
    """Draws a quarter of the heads afresh: `which`; with replaced=False, all heads but these."""
    sharpest = np.argsort(blur, axis=None)
    order = {"sharp": sharpest, "blurred": sharpest[::-1],
             "random": np.random.default_rng(seed).permutation(blur.size)}[which]
    quarter = np.isin(np.arange(blur.size), order[:max(1, blur.size // 4)])
    afresh = torch.from_numpy(quarter == replaced).view(blur.shape)
    torch.manual_seed(seed + 2 ** 33)
    for block, other, heads in zip(model.h, GPT(model.config).h, afresh):
        ours, theirs = block.attn, other.attn
        units = heads.repeat_interleave(model.config.n_embd // len(heads))  # those of these heads
        qkv = units.repeat(3)
        ours.c_attn.weight[qkv] = theirs.c_attn.weight[qkv]
        ours.c_attn.bias[qkv] = theirs.c_attn.bias[qkv]
        ours.c_proj.weight[:, units] = theirs.c_proj.weight[:, units]


def changed_checkpoint(path, change, seed, to):
    """Writes a changed copy of a warm-up."""
    c = Opened(path, "cpu")
    x = c.rows(16)[0]
    change_weights(c.model, change, seed, entropy_of_heads(c.attention(x), c.real(x)))
    source = c.source | {"spec": f"{c.spec} ({change})"}
    save(to, c.model, stage="warmup", step=c.step, tokens=c.tokens, source=source)


# --------------------------------------------------------------------------------------------------
# Running them


def call_train(flags, folder, seed, device):
    """Runs or resumes train.py in a folder. Raises UserError with what it said, and Stopped."""
    script = Path(__file__).resolve().with_name("train.py")
    command = [sys.executable, script, *shlex.split(flags), *device, "--seed", str(seed),
               "--out", folder.name, "--resume"]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode in (130, 143, -2, -15, Busy.status):  # SIGINT, SIGTERM, or at work elsewhere
        raise Stopped
    if done.returncode:
        raise UserError(said.removeprefix("error: "))


def make_warmup(flags, seed, results, device):
    """Makes a warm-up unless it is there, and asks whether it was learned. Raises UserError and
    Stopped."""
    folder = results / folder_of(seed, flags)
    if not (folder / "result.json").exists():
        call_train(flags, folder, seed, device)
    if not (folder / "learned.json").exists():
        found = probe_learned(Opened(folder / "warmup.pt", "cpu"))
        write_json(folder / "learned.json", found or {})


def with_checkpoints(row, seed, results):
    """The flags of a row, and in them the checkpoints of its warm-ups, as seen from `results`,
    where they are. One that is to be changed is copied first, beside the run."""
    flags = row.train
    paths = [f"{folder_of(of, warmup)}/warmup.pt" for warmup, of in row.warmups(seed)]
    if row.warmup:
        path = paths[0]
        if row.change:
            copy = f"{row.folder(seed)}.changed.pt"
            changed_checkpoint(results / path, row.change, seed, results / copy)
            path = copy
        flags += f" --{'attn_from' if row.mlp_from else 'init'} {path}"
    if row.mlp_from:
        flags += f" --mlp_from {paths[1]}"
    return flags


def missing(rows, seeds, results):
    """{folder: (row, seed)} of what has no result yet."""
    found = read_results(results)
    runs = {row.folder(seed): (row, seed) for row in rows for seed in range(seeds or row.seeds)}
    return {name: run for name, run in runs.items() if "result" not in found.get(name, {})}


def run_all(rows, seeds, results, jobs, device):
    """Every row with every seed that has no result yet, `jobs` at a time, all rows of a seed first.
    The warm-ups that they take up are made before."""
    runs = missing(rows, seeds, results)
    print(f"{len(runs)} runs to go, {jobs} at a time", flush=True)
    began, ended = time.time(), itertools.count(1)
    pool, warmups, futures = ThreadPoolExecutor(jobs), {}, []

    def one(row, seed):
        name = row.folder(seed)
        failed = results / f"{name}.failed"
        try:
            for warmup in row.warmups(seed):
                warmups[warmup].result()  # waits for it, and raises what it raised
            call_train(with_checkpoints(row, seed, results), results / name, seed, device)
            (results / f"{name}.changed.pt").unlink(missing_ok=True)
            failed.unlink(missing_ok=True)
            state = "done"
        except Stopped:
            state = "stopped"
        except UserError as error:
            failed.write_text(f"{error}\n")
            state = f"failed: {error}"
        n = next(ended)
        left = clock((time.time() - began) / n * (len(runs) - n))
        print(f"[{n}/{len(runs)}] {row.column} | {row.name} | seed {seed}: {state}; {left} left",
              flush=True)

    for seed in range((seeds or max(row.seeds for row in rows)) + 1):  # warm-ups one seed ahead of rows, so that no job waits for one
        ahead = [warmup for row, of in runs.values() if of == seed for warmup in row.warmups(of)]
        for warmup in dict.fromkeys(ahead):
            if warmup not in warmups:
                warmups[warmup] = pool.submit(make_warmup, *warmup, results, device)
        futures += [pool.submit(one, row, of) for row, of in runs.values() if of == seed - 1]
    try:
        for future in futures:
            future.result()
    finally:  # after Ctrl-C, which the runs got, too: each saves and stops
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Results

# What is read has this form, or is refused: nothing later on has to doubt it.
MEASURED = {"val_loss": float, "val_accuracy": float}
CONFIG = {"warmup": str, "fingerprint": [int], "settings": {
    "data": str, "tokenizer": (str, None), "steps": float, "seed": float, "transfer": str,
    "embeddings": str, "positions": str}}
LOG = [{"step": float, "tokens": float} | MEASURED]
RUN = {"result": CONFIG | MEASURED, "log": LOG, "learned": dict}


def read_log(path):
    """The evaluations of a run's training stage. Raises UserError."""
    entries = [entry for entry in json_lines(path)
               if fits(entry, {"stage": str}) and entry["stage"] == "train" and "val_loss" in entry]
    return checked(entries, LOG, path)


def read_packed(path):
    with reading(path), gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file]
    for record in checked(records, [{"name": str}], path):
        checked(record, RUN if "result" in record else {"failed": str}, path)
    return {record.pop("name"): record for record in records}


def read_run(path):
    """A run's folder -> {"result": result.json, "log": evaluations, "learned": of a warm-up}"""
    learned = path / "learned.json"
    return {"result": read_json(path / "result.json", RUN["result"]),
            "log": read_log(path / "log.jsonl"),
            "learned": read_json(learned) if learned.exists() else {}}


def read_results(where):
    """{folder name: what read_run says, or {"failed": why} of a run that did} of a folder and the
    packed files in it, or of one packed file. Raises UserError."""
    where, found = Path(where), {}
    with reading(where):
        paths = [where] if where.is_file() else sorted(where.glob("*"))
    for path in paths:
        if path == where or path.suffix == ".gz" and path.is_file():
            found |= read_packed(path)
        elif path.suffix == ".failed":
            found.setdefault(path.stem, {"failed": path.read_text(errors="replace").strip()})
        elif (path / "result.json").exists():
            found[path.name] = read_run(path)
    return found


def pack(where, to):
    """All results of a folder in one small file, from which everything can be drawn again."""
    found = read_results(where)
    text = "".join(json.dumps({"name": name, **record}) + "\n" for name, record in found.items())
    with written_whole(to) as file:
        file.write(gzip.compress(text.encode(), mtime=0))
    print(f"{to}: {len(found)} runs, {Path(to).stat().st_size / 1e6:.2f} MB")


# --------------------------------------------------------------------------------------------------
# What a run is worth, and whether two settings differ


class Measure(NamedTuple):
    name: str
    form: str
    better: int  # 1: more is better; -1: less is


FOUND = 0.9     # of held-out answers right: recall is learned
MARGIN = 0.005  # bits per byte: less is no difference worth having. Half of the published effect.
STEPS = Measure(f"steps to {FOUND:.0%}", "{:,.0f}", -1)
ACCURACY = Measure("accuracy at the end", "{:.1%}", 1)
BITS = Measure("bits per byte", "{:.4f}", -1)


def measure_of(column):
    """Recall by steps: runs find the answer suddenly, each at its own time, so that the accuracy at
    the end only tells where the budget cut them off. Arithmetic and sorting as published."""
    if column not in TASK_COLUMNS:
        return BITS
    return STEPS if column.startswith("recall") else ACCURACY


def value_of(record, measure):
    """The steps until recall was learned, as two evaluations in a row say, or all steps if it never
    was; or the accuracy, or the bits per byte, at the end."""
    result = record["result"]
    if measure is BITS:
        return result["val_bits_per_byte"]
    if measure is ACCURACY:
        return result["val_accuracy"]
    for first, second in itertools.pairwise(record["log"]):
        if min(first["val_accuracy"], second["val_accuracy"]) >= FOUND:
            return first["step"]
    return result["settings"]["steps"]


def on_text(result):
    return result["settings"]["data"].partition(":")[0] not in TASKS


def data_of(result):
    """A number that is another where the run was trained on other data."""
    return result["fingerprint"][0]


def share_learned(learned):
    """How much of what can be learned a warm-up has: 1 is all. None where that was not asked."""
    for key in ("learned (share of what can be)", "learned so far (1: all)"):
        if key in learned:
            return learned[key]
    if "above it" in learned:  # so old records say it
        return 1 - learned["above it"] / learned["above it, the blind"]
    return None


@functools.cache
def choices(n, of):
    """All ways to choose n of so many places, or 100,000 random ones: (ways, n). The first way is
    the first n places."""
    if math.comb(of, n) <= 200_000:
        return np.array(list(itertools.combinations(range(of), n)))
    chosen = np.random.default_rng(0).random((100_000, of)).argsort(1)[:, :n]
    chosen[0] = range(n)  # what happened is one of the ways: p is never 0
    return chosen


def differences(a, b):
    """Mean of the first values less mean of the others, for every way to deal both out anew."""
    both = np.array([*a, *b], float)
    sums = both[choices(len(a), len(both))].sum(1)
    return sums / len(a) - (both.sum() - sums) / len(b)


def permutation_p(a, b):
    """Two-sided p that a and b differ in their mean by chance: the share of all ways to give their
    values to two groups in which the means differ as much or more."""
    if min(len(a), len(b)) < 2:
        return math.nan
    found = np.abs(differences(a, b))
    return float((found >= found[0] - 1e-9 * np.abs([*a, *b]).max()).mean())  # rounding


def permutation_interval(a, b):
    """The 95 % interval of how much larger the mean of a is than that of b: all shifts of a that
    the permutation test does not reject at 5 %, so that 0 is outside exactly where p < 0.05.

    Let a be shifted until its mean is u below that of b. What was seen then differs by -u, another
    way by e - c * u (both below). It differs as much as long as u is below a bound of its own, so
    p falls as u grows, and the interval ends where 5 % of the ways have a larger bound. Unbounded
    where there are too few ways to reject anything."""
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan
    a, b = np.asarray(a, float), np.asarray(b, float)
    e = differences(a - a.mean(), b - b.mean())
    c = differences(np.ones(len(a)), np.zeros(len(b)))
    always = np.abs(c) > 1 - 1e-9  # what was seen, and the same with the groups' names exchanged
    c[always] = 0
    wanted = math.ceil(0.05 * len(e)) - 1
    ends = []
    for sign in (-1, 1):
        bounds = np.maximum(sign * e / (1 + c), -sign * e / (1 - c))
        bounds[always] = math.inf
        ends.append(a.mean() - b.mean() + sign * np.sort(bounds)[::-1][wanted])
    return tuple(ends)


def shown_p(p):
    return "" if math.isnan(p) else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


class Outcome:
    """What came of a setting with each seed, as far as there are results. base: what it is compared
    with, if anything; a run on other data than the base's has failed. counting_warmup: the tokens
    of the warm-up are steps, too."""

    def __init__(self, setting, seeds, found, base=None, counting_warmup=False):
        self.setting, self.measure = setting, measure_of(setting.column)
        self.runs, self.failed, self.learned = {}, [], []
        for seed in range(seeds or setting.seeds):
            record = found.get(setting.folder(seed), {})
            theirs = base.runs.get(seed) if base else None
            if theirs and "result" in record and (
                    data_of(record["result"]) != data_of(theirs["result"])):
                record = {"failed": f"its data are not those of {base.setting.name}: the code and "
                          "docs of another Python, or other files"}
            if "failed" in record:
                self.failed.append(f"{setting.column} | {setting.name} | {seed}: "
                                   f"{record['failed']}")
            elif record:
                self.runs[seed] = record
                for flags, of in setting.warmups(seed)[:1]:
                    self.learned.append(found.get(folder_of(of, flags), {}).get("learned", {}))
        self.n = len(self.runs)
        if not self.n:
            return
        records = list(self.runs.values())
        results = [record["result"] for record in records]
        self.values = np.array([value_of(record, self.measure) for record in records], float)
        self.budget = results[0]["settings"]["steps"]
        self.warmup_tokens = np.mean([result["tokens"]["procedural"] for result in results])
        if counting_warmup:
            last = records[0]["log"][-1]
            steps = self.warmup_tokens * last["step"] / last["tokens"]
            self.values, self.budget = self.values + steps, self.budget + steps
        self.found = int((self.values < self.budget).sum()) if self.measure is STEPS else self.n
        self.mean, self.accuracy = self.values.mean(), np.mean(
            [result["val_accuracy"] for result in results])
    
    def show(self, value):
        return self.measure.form.format(value)

    def together(self, base):
        """The values of both; never is the same number of steps for both, the smaller budget."""
        both = self.values, base.values
        if self.measure is STEPS:
            both = (np.minimum(each, min(self.budget, base.budget)) for each in both)
        return both

    def against(self, base):
        """How much better this is than a baseline; its 95 % interval, low and high; and p."""
        ours, theirs = (each * self.measure.better for each in self.together(base))
        return (ours.mean() - theirs.mean(), *permutation_interval(ours, theirs),
                permutation_p(ours, theirs))

    def compared(self, base):
        """The same in words: the gain, a lower bound if the baseline never got there; its interval;
        and p."""
        gain, low, high, p = self.against(base)
        bound = "at least " if base.found < base.n and self.found == self.n else ""
        return [bound + self.show(gain), f"{self.show(low)} to {self.show(high)}", shown_p(p)]


def compare(settings, seeds, found, counting_warmup=False):
    """{column: outcomes of its settings}, which come column by column, the base of each first"""
    columns = {}
    for setting in settings:
        outcomes = columns.setdefault(setting.column, [])
        base = outcomes[0] if outcomes else None
        outcomes.append(Outcome(setting, seeds, found, base, counting_warmup))
    return columns


# --------------------------------------------------------------------------------------------------
# Tables and figures


def table_lines(columns):
    """A table for each column, in Markdown, which reads well in a terminal, too."""
    lines = []
    for column, outcomes in columns.items():
        there, first = [each for each in outcomes if each.n], outcomes[0]
        if there:
            found = ["found", "accuracy"] if first.measure is STEPS else []
            head = [column, first.measure.name, *found, "n", f"gain over {first.setting.name}",
                    "95 %", "p", "warm-up", "learned"]
            lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for each in there:
            cells = [each.setting.name, each.show(each.mean)]
            if found:
                cells += [f"{each.found} of {each.n}", f"{each.accuracy:.1%}"]
            compared = ["", "", ""]
            if first.n and each is not first:
                compared = each.compared(first)
            warmup = f"{each.warmup_tokens / 1e6:.1f} M tokens" if each.warmup_tokens else ""
            cells += [str(each.n), *compared, warmup, shown_learned(each.learned)]
            lines.append(f"| {' | '.join(cells)} |")
        without = [each.setting.name for each in outcomes if not each.n]
        if without:
            lines += ["", f"no result yet of {column}: {'; '.join(without)}"]
        lines += [f"failed: {line}" for each in outcomes for line in each.failed]
    return lines


def shown_learned(probed):
    """The mean share that warm-ups learned, and how many answer tokens they have right."""
    shares = [share_learned(each) for each in probed]
    shares = [share for share in shares if share is not None]
    right = [each["accuracy"] for each in probed if "accuracy" in each]
    shown = f"{np.mean(shares):.0%}" if shares else ""
    return f"{shown}, {np.mean(right):.0%} right" if right else shown


COLOURS = {  # of a warm-up, in all figures: those of pyplot's style, and six of Tol's "muted"
    "dyck": "C0", "set": "C1", "identity": "C2", "union": "C3", "eca": "C4", "nca": "C5",
    "none": "C6", "text": "C7",
    "sort": "#882255", "reverse": "#999933", "delete": "#332288", "stack": "#117733",
    "dyck_shuffle": "#44AA99", "shuffled": "#CC6677"}


def colour_of(warmup):
    """"dyck:k=3" -> that of dyck; of a mixture, that of its first rule."""
    name = re.search(r"^(?:[\d.]+\*)?(\w*)", warmup)[1]
    return COLOURS.get(name, "C7")


def draw_settings(columns, path):
    """A panel for each column, and in it a line for each row: every seed a dot, or a ring where
    the weights of its warm-up were changed; the mean a bar."""
    panels = {column: [each for each in outcomes if each.n] for column, outcomes in columns.items()}
    panels = {column: there for column, there in panels.items() if there}
    sizes = [len(there) + 1.5 for there in panels.values()]
    figure, axes = pyplot().subplots(len(panels), 1, squeeze=False, height_ratios=sizes,
                                     figsize=(9, 0.4 * sum(sizes) + 0.6 * len(panels)))
    for axis, (column, there) in zip(axes[:, 0], panels.items()):
        first = columns[column][0]
        for y, each in enumerate(there):
            warmup = as_dict(each.setting.warmup or each.setting.train).get("--warmup", "none")
            places = y + np.linspace(-0.3, 0.3, each.n + 2)[1:-1]  # else equal values are one dot
            axis.plot(each.values, places, "o", color=colour_of(warmup), alpha=0.7,
                      fillstyle="none" if each.setting.change else "full")
            axis.plot([each.mean], [y], "|", color="black", markersize=18, markeredgewidth=2)
        if not there[0].measure is BITS:
            axis.axvline(there[0].budget, color="grey", linestyle=":")
            axis.set(xlim=(0, None), xlabel=f"steps to {FOUND:.0%} right (dotted: never)")
        else:
            axis.set_xlabel(f"held-out loss, nats per token (dotted: mean of {first.setting.name})")
            if first.n:
                axis.axvline(first.mean, color="grey", linestyle=":")
        axis.set_yticks(range(len(there)), [f"{each.setting.name} (n = {each.n})" for each in there])
        axis.set(title=column, ylim=(len(there) - 0.5, -0.5))
    keep_figure(figure, path)


def curves(runs, picture):
    """Held-out loss or accuracy by tokens: a thin line for each run, a thick one for the mean of
    those that differ in the seed alone. runs: [(name, what CONFIG says, evaluations)]. Raises
    UserError."""
    data = list(dict.fromkeys(said["settings"]["data"] for _, said, _ in runs))
    seeds = {said["settings"]["seed"] for _, said, _ in runs}
    versions = {(said["settings"]["seed"], data_of(said)) for _, said, _ in runs}
    if len(data) > 1 or len(versions) > len(seeds):
        raise UserError("these runs are on different data, or on other files of that name, and do "
                        f"not compare: {', '.join(data)}")
    metric, ylabel = "val_accuracy", "accuracy on held-out answers"
    if on_text(runs[0][1]):
        metric, ylabel = "val_loss", "held-out loss (nats per token)"
    groups, styles = {}, {}
    moot = OPERATIONAL | {"seed", "init", "attn_from", "mlp_from"}  # what a group may differ in
    moot |= {"transfer", "embeddings", "positions"}  # what the label says, if anything moved over
    print(f"{'run':44} {'warm-up':20} {'seed':>4} {'tokens':>13} {'loss':>8} {'accuracy':>9}")
    for name, said, points in runs:
        s, last, label = said["settings"], points[-1], said["warmup"]
        print(f"{name:44} {label:20} {s['seed']:4} {last['tokens']:13,} {last['val_loss']:8.4f} "
              f"{last['val_accuracy']:9.2%}")
        if label != "none":
            label += f": {s['transfer']}, embeddings {s['embeddings']}, positions {s['positions']}"
        alike = label, repr([s[key] for key in sorted(s.keys() - moot)])
        # The untrained model's loss would flatten the picture: the first evaluation is left out.
        curve = {point["tokens"]: point[metric] for point in points[1:] or points}
        groups.setdefault(alike, []).append(curve)
    figure, axis = pyplot().subplots(figsize=(9, 6.5))
    for (label, _), group in groups.items():
        colour = colour_of(label)
        style = styles.setdefault(colour, itertools.cycle(("-", "--", ":", "-.")))
        look = {"color": colour, "linestyle": next(style)}  # one warm-up, one colour
        # Of some that stopped when they had learned it, the mean of the others would mislead.
        level = len({max(curve) for curve in group}) == 1
        shared = sorted(set(group[0]).intersection(*group)) if level else []
        mean = [np.mean([curve[tokens] for curve in group]) for tokens in shared]
        axis.plot(shared, mean, **look, linewidth=2.5, label=f"{label} (n = {len(group)})")
        for curve in group:
            axis.plot(list(curve), list(curve.values()), **look, alpha=0.5, linewidth=1)
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M")
    axis.set(title=data[0], xlabel="tokens of training", ylabel=ylabel)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    keep_figure(figure, picture)


def runs_of(patterns, results):
    """What curves draws: folders of runs, or with results those whose names hold one of these."""
    if not results:
        return [(str(run), read_json(run / "config.json", CONFIG), read_log(run / "log.jsonl"))
                for run in map(Path, patterns)]
    runs = [(name, record["result"], record["log"])
            for name, record in read_results(results).items()
            if "result" in record and any(pattern in name for pattern in patterns)]
    if not runs:
        raise UserError(f"no run in {results} is named like {', '.join(patterns)}")
    return runs


# --------------------------------------------------------------------------------------------------
# Verdicts


class Claim(NamedTuple):
    """`better` is better than `worse`: names of settings in a column of an experiment."""
    text: str
    published: str  # in our unit, where there is one
    experiment: str
    column: str
    better: str
    worse: str
    counting_warmup: bool = False  # its tokens are steps, too


# Written down before the runs that decide them, but for what the report says of the first seven.
# Ten seeds of recall, six of all else, each with a warm-up of its own. On text, rate and ramp suit
# the baseline, but where it says so. A published perplexity of 62.0 -> 59.9 is 0.034 nats a token
# of GPT-2; of English text 4.4 bytes long: 0.011 bits per byte. 5.47 -> 5.15 is 0.060 nats a token
# of CodeParrot's tokenizer; of Python some 3 bytes long (ours): 0.029.
CLAIMS = [
    Claim("Dyck finds the needle: the whole model moved, as published", "11.3 -> 96.9 % right",
          "controls", "recall of 15", "dyck", "none"),
    Claim("... attention and positions moved, our default", "-", "table", "recall of 15",
          "dyck, attention, positions", "none"),
    Claim("... more than Dyck with its tokens shuffled", "10.3 -> 96.9 % right", "controls",
          "recall of 15", "dyck, attention, positions", "shuffled:dyck, attention, positions"),
    Claim("... it takes its weights as they are, not shuffled in each tensor", "gain gone",
          "weights", "recall of 15", "as it is", "shuffled"),
    Claim("set helps code", "gain 0.029 (perplexity 5.47 -> 5.15)", "controls", "code", "set",
          "none"),
    Claim("set helps English", "gain 0.011 (perplexity 62.0 -> 59.9)", "controls", "english",
          "set", "none"),
    Claim("set helps English at a modest rate without a ramp",
          "gain 0.011 (perplexity 62.0 -> 59.9)", "tuned", "english", "set, 1e-3, ramp 0",
          "none, 1e-3, ramp 0"),
    Claim("30 pairs, the paper's own task: attention and positions moved, our default",
          "11.3 -> 96.9 % right", "starts", "recall", "dyck, attn, embeddings random",
          "none, steps 13500"),
    Claim("30 pairs: the whole model moved, as published", "11.3 -> 96.9 % right", "starts",
          "recall", "dyck, full, embeddings mean", "none, steps 13500"),
    Claim("attention without MLPs finds the needle sooner than with them", "- (ours)", "starts",
          "recall of 15", "dyck, attn, embeddings random", "dyck, attn,mlp, embeddings random"),
    Claim("Dyck, its 49.2 M tokens counted as steps, beats as many steps without",
          "- (ours)", "budgets", "recall of 15", "dyck, attention, positions", "none, steps 12144",
          counting_warmup=True),
    Claim("set helps code more than as many tokens of text",
          "others, 410 M parameters: text is better", "controls", "code", "set", "text"),
    Claim("set helps English more than as many tokens of text",
          "others, 410 M parameters: text is better", "controls", "english", "set", "text"),
    Claim("attention of set alone helps code", "it carries the gain; no number", "transfer", "code",
          "set, attn", "none"),
    Claim("MLPs of set alone help English", "they carry the gain; no number", "transfer", "english",
          "set, mlp", "none"),
    Claim("rule 110 helps reversed addition: the whole model moved, as published",
          "76.4 -> 91.0 % right", "tasks", "reversed_addition", "eca, whole", "none"),
    Claim("sharp heads carry it: the sharpest quarter more than a random one", "they do; no number",
          "heads", "recall of 15", "long warm-up, only sharp", "long warm-up, only random"),
    Claim("attention of set with MLPs of rule 110 beats attention of set alone",
          "54.4 -> 82.9 % right", "mix", "reversed_addition",
          "attention of set, MLPs of rule 110", "set, attention"),
]


def judge(claim, seeds, found):
    """A claim -> what was measured, in words; n; p; the verdict."""
    settings = {each.name: each for each in settings_in(claim.experiment, "quick")
                if each.column == claim.column}
    base, ours = compare([settings[claim.worse], settings[claim.better]], seeds, found,
                         claim.counting_warmup)[claim.column]
    if not ours.n or not base.n:
        return "", 0, math.nan, "not run"
    gain, low, high, p = ours.against(base)
    verdict = "undecided"
    if p < 0.05 / len(CLAIMS):  # Bonferroni: one false finding in 20 such lists of claims
        verdict = "supported" if gain > 0 else "contradicted"
    elif ours.measure is BITS and -MARGIN < low and high < MARGIN:
        verdict = "no difference beyond the margin"
    after, before = (ours.show(values.mean()) for values in ours.together(base))
    theirs, right = base.setting.name, ""
    if ours.measure is STEPS:
        theirs, right = f"{theirs}: {base.accuracy:.1%} right", f" ({ours.accuracy:.1%} right)"
    gain, limits, _ = ours.compared(base)
    measured = (f"{before} ({theirs}) -> {after} {ours.measure.name}{right}, gain {gain} "
                f"({limits})")
    return measured, min(base.n, ours.n), p, verdict


def claims_lines(found, seeds):
    lines = ["| claim | published | measured here (95 %) | n | p | verdict | python analyze.py |",
             "|---|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        measured, n, p, verdict = judge(claim, seeds, found)
        lines.append(f"| {claim.text} | {claim.published} | {measured} | {n} | {shown_p(p)} "
                     f"| {verdict} | `{claim.experiment} --only {shlex.quote(claim.column)}` |")
    return lines


def report(results, seeds):
    """All claims, tables and figures that there are results for, in report.md beside them."""
    found = read_results(results)
    folder = results if results.is_dir() else results.parent
    lines = ["# What was found", ""]
    if any(judge(claim, seeds, found)[1] for claim in CLAIMS):
        lines += [*claims_lines(found, seeds), ""]
    lines += ["In the figures: a dot for each seed, a ring where the weights of its warm-up were "
              "changed, a bar for the mean."]
    shown = set()  # rows, which several experiments may have
    for budget, (name, asks) in itertools.product(COLUMNS, EXPERIMENTS.items()):
        columns = {column: outcomes
                   for column, outcomes in compare(settings_in(name, budget), seeds, found).items()
                   if any(each.n for each in outcomes[1:])}
        there = {each.setting.folder(0) for each in sum(columns.values(), []) if each.n}
        if there - shown:
            shown |= there
            draw_settings(columns, folder / f"{name}-{budget}.png")
            lines += ["", f"## {name} ({budget}): {asks.question}", *table_lines(columns), "",
                      f"![{name}]({name}-{budget}.png)"]
    with written_whole(folder / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print(folder / "report.md")


def experiment(name, args):
    """Runs what is missing of an experiment, or of the part that --only names, and shows it."""
    rows, results = settings_in(name, args.budget), Path(args.results)
    wanted = [row for row in rows if args.only in f"{row.column} | {row.name}"]
    if not wanted:
        raise UserError(f"--only {args.only} is in no \"column | row\" of {name}, such as "
                        f"\"{rows[0].column} | {rows[0].name}\"")
    first = {row.column: row for row in reversed(rows)}
    wanted += [first[row.column] for row in wanted]  # what they are compared with
    rows = [row for row in rows if row in wanted]
    if not args.show:
        with lock(results / ".lock"):
            run_all(rows, args.seeds, results.resolve(), args.jobs,
                    ["--device", args.device] if args.device else [])
    columns = compare(rows, args.seeds, read_results(results))
    print(f"\n{name} ({args.budget}): {EXPERIMENTS[name].question}", *table_lines(columns),
          sep="\n")
    if any(each.n for outcomes in columns.values() for each in outcomes):
        draw_settings(columns, (results if results.is_dir() else Path()) / f"{name}-{args.budget}.png")


def main():
    parser = Parser(description="What many runs say.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = Parser(add_help=False)
    shared.add_argument("--results", default="results", help="(default results)")
    shared.add_argument("--seeds", type=number(1, 1000), default=10, help="(default 10)")
    drawer = commands.add_parser("curves", help="held-out loss or accuracy by tokens, of any runs")
    drawer.add_argument("runs", nargs="+", help="folders, or with --results parts of names")
    drawer.add_argument("--results", help="a folder of many runs, or a packed file")
    drawer.add_argument("--picture", default="curves.png", help="(default curves.png)")
    for name, asks in EXPERIMENTS.items():
        runner = commands.add_parser(name, help=asks.question, parents=[shared])
        runner.set_defaults(seeds=None)
        runner.add_argument("--budget", choices=COLUMNS, default="quick",
                            help="for two CPU cores, or as published (default quick)")
        runner.add_argument("--only", default="", metavar="TEXT",
                            help="rows with this in \"column | row\", and the first row")
        runner.add_argument("--jobs", type=number(1, 1000), default=1, help="runs at a time")
        runner.add_argument("--show", action="store_true", help="run nothing")
        runner.add_argument("--device", help="cuda, mps or cpu")
    commands.add_parser("claims", parents=[shared],
                        help="each claim: supported, contradicted or undecided here")
    commands.add_parser("report", parents=[shared],
                        help="all tables and figures, in report.md beside the results")
    packer = commands.add_parser("pack", parents=[shared], help="all results in one small file")
    packer.add_argument("to", help="such as results.jsonl.gz")
    args = parser.parse_args()
    if args.command == "curves":
        curves(runs_of(args.runs, args.results), args.picture)
    elif args.command == "pack":
        pack(args.results, args.to)
    elif args.command == "claims":
        print("\n".join(claims_lines(read_results(args.results), args.seeds)))
    elif args.command == "report":
        report(Path(args.results), args.seeds)
    else:
        experiment(args.command, args)


if __name__ == "__main__":
    run_main(main)
