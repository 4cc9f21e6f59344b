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

from data import (RULES, Busy, Parser, UserError, checked, fits, json_lines, lock, number,
                  read_json, reading, run_main, write_json, written_whole)
from eval import Opened, entropy_of_heads, keep_figure, probe_learned, pyplot
from model import GPT, part_of, save
from train import OPERATIONAL, PRESETS, Stopped, clock

# --------------------------------------------------------------------------------------------------
# Rows are command lines


def as_dict(flags):
    """"--data code --lr 1e-3" -> {"--data": "code", "--lr": "1e-3"}. Each flag has one value."""
    words = shlex.split(flags)
    return dict(zip(words[::2], words[1::2]))


def join(*flags):
    """Flags one after another; of one that comes twice, the later value counts."""
    merged = as_dict(" ".join(flags))
    return shlex.join(itertools.chain.from_iterable(merged.items()))


def folder_of(seed, train, warmup="", change="", mlp_from="", seeds=()):
    """Where a run is. The same flags in any order are the same run, whichever experiment asks."""
    flags = as_dict(train)
    parts = [sorted(as_dict(part).items()) for part in (train, warmup, mlp_from)]
    if any(each != seed for each in seeds):
        parts.append(seeds)
    data = Path(flags.get("--data") or flags["--preset"]).name
    label = ["warmup" if flags.get("--steps") == "0" else data,
             flags.get("--warmup") or as_dict(warmup).get("--warmup"), flags.get("--transfer"),
             change, f"{zlib.crc32(repr((parts, change)).encode()):08x}", f"s{seed}"]
    return re.sub(r"[^\w.=+*-]+", "_", "-".join(filter(None, label)))


class Row(NamedTuple):
    """One setting, which is run with each seed."""
    column: str
    name: str
    train: str          # flags of train.py, but for --seed and --out
    warmup: str = ""    # flags of the warm-up that it takes up: a run of its own, made once
    change: str = ""    # what is done to the weights of the warm-up first, see change_weights
    mlp_from: str = ""  # flags of a second warm-up, whose MLPs are taken with the first's attention
    seeds: tuple = ()   # of these warm-ups, where they are not the run's own

    def warmups(self, seed):
        """The flags and seeds of the warm-ups that it takes up."""
        flags = [each for each in (self.warmup, self.mlp_from) if each]
        return list(zip(flags, self.seeds or (seed, seed)))

    def folder(self, seed):
        return folder_of(seed, self.train, self.warmup, self.change, self.mlp_from, self.seeds)


# The quick budget (ours) is for two CPU cores: minutes a run. Its tasks have the published model, a
# quarter of the published rows at twice the rate, and stop once they are solved. Their warm-ups are
# shorter than train.py's, and of brackets as long as recall's rows; those before text have the
# published batch and rate, and as many tokens as are best in the paper.
TASK = "--batch_size 250 --lr 2e-3 --eval_every 100 --stop_at 0.9"
TEXT = ("--preset laptop --size 4_4_128 --block_size 256 --batch_size 16 --steps 2500 "
        "--lr 3e-3 --lr_ramp 200")
BEFORE_TASK = "--data haystack --warmup_steps 6000"
BEFORE_TEXT = ("--data haystack --warmup_batch_size 64 --warmup_lr 5e-4 --warmup_lr_ramp 0 "
               "--warmup_lr_schedule constant --warmup_dropout 0.1 --warmup_tokens 4M")
COLUMNS = {
    "quick": {"recall": f"--data haystack {TASK}",
              "recall of 15": f"--data haystack:pairs=15 --steps 6000 {TASK}",
              "reversed_addition": f"--data reversed_addition {TASK}",
              "sorting": f"--data sorting {TASK}",
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
# Ours, train.py's default before haystack, moves the attention and the positions.
WHOLE = "--transfer full --embeddings mean --positions fit"
FRESH = "--embeddings random --positions random"
OURS = "attention, positions"
STARTS = {"whole": WHOLE, "attention": f"--transfer attn {FRESH}",
          OURS: "--transfer attn --embeddings random --positions fit"}


class Column:
    """A task or a text, and the rows that are compared on it."""

    def __init__(self, name, budget):
        self.name, self.train, self.quick = name, COLUMNS[budget][name], budget == "quick"
        self.text = name not in TASK_COLUMNS
        # The warm-up to look into, and how it moves over: before tasks as helps most.
        self.best, self.start = ("set", "") if self.text else ("dyck", STARTS[OURS])

    def row(self, spec, name=None, flags="", warmup="", **rest):
        """A row with this warm-up, or "none". It moves over as published, the whole model, before
        text with fresh positions, unless `flags` say otherwise. `warmup`: more of the warm-up's."""
        name = name or spec
        if spec == "none":
            return Row(self.name, name, join(self.train, flags, "--warmup none"))
        how = "--positions random" if self.text else WHOLE
        if spec == "text":
            how = "--transfer all"
        if "mlp_from" in rest:  # says itself what moves
            how = ""
        return Row(self.name, name, join(self.train, how, flags), self.warmup(spec, warmup), **rest)

    def warmup(self, spec, flags=""):
        """The flags of a run that stops after its warm-up. Its --data matters to the warm-up `text`
        alone: before others, quick columns name the same data, and share warm-ups."""
        before = self.train
        if self.quick and spec == "text":
            before = f"{self.train} --warmup_tokens 4M"
        elif self.quick and self.text:
            before = f"{BEFORE_TEXT} --size {as_dict(self.train)['--size']}"
        elif self.quick:
            before = BEFORE_TASK
        bare = spec.removeprefix("shuffled:")
        if self.text and bare in ("identity", "sort", "set", "union"):
            spec += ":length=64"  # as published; before tasks it is 20
        if self.quick and not self.text and bare == "dyck":
            spec += ":length=64"
        return join(before, flags, f"--warmup {spec} --steps 0")


# --------------------------------------------------------------------------------------------------
# Experiments: the rows of a column. The first, without a warm-up, is put before them by `rows_of`.


def table(column):
    """which warm-up helps which task, moved over in either published way, or in ours"""
    specs = [*RULES, "eca:rule=random"]
    if column.quick:  # the last two in rows as long as the brackets'
        specs = ["dyck", "identity", "set", "eca", "eca:rule=random,length=64",
                 "nca:states=2,grid=6,length=64"]
    for spec in specs:
        for start, flags in STARTS.items():
            yield column.row(spec, f"{spec}, {start}", flags)


def transfer(column):
    """what has to move over: the whole model, attention, MLPs or norms"""
    for spec, parts in itertools.product(("set", "dyck"), ("full", "attn", "mlp", "norm")):
        yield column.row(spec, f"{spec}, {parts}", f"--transfer {parts}")


def starts(column):
    """which part makes it, and which breaks it: the MLPs (ours)

    Named before the runs, on five starts that were tried: right after the transfer, of the power of
    the states that the head reads where the key is asked for, the share that differs between 1,000
    held-out rows. Of two warm-ups that start in one way, the one of the smaller share is to find
    the needle later (Spearman's rank correlation, within each start that moves MLPs)."""
    for start, parts in itertools.product(("random", "mean"),
                                          ("attn", "attn,norm", "attn,mlp", "full")):
        if column.name == "recall of 15" or (parts, start) in (
                ("attn", "random"), ("attn,norm", "random"), ("full", "mean")):
            yield column.row("dyck", f"dyck, {parts}, embeddings {start}",
                             f"--transfer {parts} --embeddings {start} --positions fit")
    if column.name == "recall":
        yield column.row("none", "none, steps 13500", "--steps 13500")  # ten of these are there


def repeats(column):
    """how much of the spread is the warm-up's: ten of them, each before three seeds of the task"""
    for seed in range(10):
        yield column.row("dyck", f"dyck, as published, warm-up {seed}", seeds=(seed,))


def strangers(column):
    """attention of one warm-up, MLPs of another: is it these MLPs, or that they are strangers?"""
    how = "--embeddings random --positions fit"
    for a, b in itertools.permutations((0, 1, 4, 7), 2):  # 0 and 7 are found with their own MLPs
        yield column.row("dyck", f"attention of {a}, MLPs of {b}", how,
                         mlp_from=column.warmup("dyck"), seeds=(a, b))


def embeddings(column):
    """where token embeddings and positions begin"""
    for spec, parts, start, positions in itertools.product(
            ("dyck", "identity", "set"), ("full", "attn"), ("random", "mean"), ("fit", "random")):
        yield column.row(spec, f"{spec}, {parts}, {start}, {positions}",
                         f"--transfer {parts} --embeddings {start} --positions {positions}")


def controls(column):
    """the critics' controls: shuffled rows, as many tokens of text, a baseline otherwise tuned"""
    for spec in ("dyck", "shuffled:dyck", "set", "shuffled:set"):
        yield column.row(spec)
    if column.text:
        yield column.row("text")
    else:
        for spec in ("dyck", "shuffled:dyck"):
            yield column.row(spec, f"{spec}, {OURS}", column.start)
    yield column.row(column.best, f"{column.best}, lr 1e-3", "--lr 1e-3")
    # The last has the tokens of the warm-up as further steps.
    for more in ("lr_ramp 0", "lr_ramp 1000", "lr 1e-3", "lr 4e-3",
                 "steps 3500" if column.text else "steps 13500"):
        yield column.row("none", f"none, {more}", f"--{more}")


def weights(column):
    """is it the values or the scale: weights shuffled within tensors, redrawn, noisy, scaled"""
    for change in ("", "shuffled", "redrawn", "noise 0.1", "noise 0.3", "noise 1", "scaled 0.5",
                   "scaled 2"):
        yield column.row(column.best, change or "as it is", column.start, change=change)


def heads(column):
    """which heads carry it: the sharpest, most blurred or random quarter alone, or all but these"""
    for change in ("", "only sharp", "only blurred", "only random", "without sharp",
                   "without blurred", "without random"):
        yield column.row(column.best, change or "as it is", column.start, change=change)


def sharpen(column):
    """no warm-up, but a penalty on the attention's entropy in its place"""
    yield column.row(column.best, flags=column.start)
    for penalty in (0.01, 0.1, 1):
        yield column.row("none", f"penalty {penalty}", f"--sharpen {penalty}")


def length(column):
    """how much warm-up is best, and where more becomes worse"""
    for spec, tokens in itertools.product(("dyck", "set"), ("1M", "2M", "4M", "8M", "16M")):
        yield column.row(spec, f"{spec}, {tokens}", warmup=f"--warmup_tokens {tokens}")


def mix(column):
    """before text set and union in proportions; before tasks the parts of two warm-ups in one"""
    if column.text:
        yield column.row("set")
        yield column.row("union")
        for share in (0.25, 0.5, 0.75):
            yield column.row(f"{share}*set:length=64+{1 - share}*union:length=64",
                             f"{share} set, the rest union")
        return
    for a, b in (("dyck", "eca"), ("eca", "dyck")):
        yield column.row(a, f"{a}, whole")
        for parts in ("attn", "mlp"):
            yield column.row(a, f"{a}, {parts}", f"--transfer {parts} {FRESH}")
        yield column.row(a, f"attention of {a}, MLPs of {b}", FRESH, mlp_from=column.warmup(b))


def efficiency(column):
    """how much less text does it take, until the loss is that of the baseline with all of it"""
    for spec in ("set", "union", "sort", "dyck", "dyck_shuffle", "eca", "eca:rule=random", "nca",
                 "text"):
        yield column.row(spec)
    flags = as_dict(column.train)
    steps = int(flags.get("--steps") or PRESETS[flags["--preset"]]["steps"])
    for spec, share in itertools.product(("set", "union"), (0.85, 0.7, 0.55)):
        yield column.row(spec, f"{spec}, {share:.0%} of the text", f"--steps {steps * share:.0f}")


def tuned(column):
    """what rate and ramp are worth to the baseline and beside a warm-up, on text"""
    for lr, ramp, spec in itertools.product(
            ("5e-4", "1e-3", "3e-3"), (0, 200), ("none", "set", "union")):
        yield column.row(spec, f"{spec}, {lr}, ramp {ramp}", f"--lr {lr} --lr_ramp {ramp}")


def grid(column):
    """learning rate by weight decay, for none and for a warm-up: best against best"""
    for decay, lr, spec in itertools.product(
            (0, 0.1), ("1e-3", "2e-3", "4e-3", "8e-3"), ("none", "set")):
        yield column.row(spec, f"{spec}, {lr}, decay {decay}", f"--lr {lr} --weight_decay {decay}")


def scale(column):
    """the gain over sizes of the model"""
    for spec in ("dyck", "set"):
        yield column.row(spec)


EXPERIMENTS = {  # name: what makes the rows of a column, and the columns
    "starts": (starts, ("recall of 15", "recall")), "repeats": (repeats, ("recall of 15",)),
    "strangers": (strangers, ("recall of 15",)),
    "table": (table, TASK_COLUMNS), "transfer": (transfer, ("recall", *TEXTS)),
    "embeddings": (embeddings, ("recall",)),
    "controls": (controls, ("recall", "recall of 15", *TEXTS)),
    "weights": (weights, ("recall of 15", "code")), "heads": (heads, ("recall of 15", "code")),
    "sharpen": (sharpen, ("recall of 15", "english")), "length": (length, TEXTS),
    "mix": (mix, (*TEXTS, *TASK_COLUMNS)), "efficiency": (efficiency, TEXTS),
    "tuned": (tuned, TEXTS), "grid": (grid, ("english",)),
    "scale": (scale, ("english, smaller", "english", "english, larger"))}


SEEDS = {"repeats": 3, "strangers": 2}  # of the other experiments ten on tasks, six on text


def rows_of(name, budget):
    """The rows of an experiment, column by column; a budget may lack some of these. First in each
    comes the run without a warm-up."""
    make, names = EXPERIMENTS[name]
    rows = []
    for column in [Column(each, budget) for each in names if each in COLUMNS[budget]]:
        rows += [column.row("none"), *make(column)]
    return rows


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
    runs = {row.folder(seed): (row, seed) for seed, row in itertools.product(range(seeds), rows)}
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

    for seed in range(seeds + 1):  # warm-ups one seed ahead of rows, so that no job waits for one
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

FOUND = 0.9    # of held-out answers right: a task is learned
MARGIN = 0.03  # nats per token of text: less is no difference worth having


def is_text(result):
    return result["settings"]["tokenizer"] is not None


def data_of(result):
    """A number that is another where the run was trained on other data."""
    return result["fingerprint"][0]


def measure(record):
    """The value of a run, of which less is better: on a task the steps until it was learned, as
    two evaluations in a row say, or all its steps if it never was; on text the final held-out loss.

    Not the final accuracy: runs find an answer suddenly, each at its own time, so that accuracy
    only tells where the budget cut them off."""
    if is_text(record["result"]):
        return record["result"]["val_loss"]
    for first, second in itertools.pairwise(record["log"]):
        if min(first["val_accuracy"], second["val_accuracy"]) >= FOUND:
            return first["step"]
    return record["result"]["settings"]["steps"]


@functools.cache
def deals(n, of):
    """All ways to choose n of so many places, or 100,000 random ones: (ways, n). The first way is
    the first n places."""
    if math.comb(of, n) <= 200_000:
        return np.array(list(itertools.combinations(range(of), n)))
    chosen = np.random.default_rng(0).random((100_000, of)).argsort(1)[:, :n]
    chosen[0] = range(n)  # what happened is one of the ways: p is never 0
    return chosen


def permutation_p(a, b):
    """Two-sided p that a and b differ in their mean by chance: the share of all ways to deal their
    values out again in which the means differ as much or more."""
    if min(len(a), len(b)) < 2:
        return math.nan
    both = np.array([*a, *b], float)
    sums = both[deals(len(a), len(both))].sum(1)
    differences = np.abs(sums / len(a) - (both.sum() - sums) / len(b))
    return float((differences >= differences[0] - 1e-9 * np.abs(both).max()).mean())  # rounding


def shown_p(p):
    return "" if math.isnan(p) else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def bootstrap(a, b):
    """The 95 % interval of how much larger the mean of a is than that of b, over seeds."""
    r = np.random.default_rng(0)
    means = [r.choice(np.asarray(each, float), (10_000, len(each))).mean(1) for each in (a, b)]
    return tuple(np.percentile(means[0] - means[1], (2.5, 97.5)))


class Outcome:
    """What came of a row with each seed, as far as there are results. base: what it is compared
    with, if anything; a run on other data than the base's has failed."""

    def __init__(self, row, seeds, found, base=None):
        self.row, self.runs, self.failed, verdicts = row, {}, [], []
        for seed in range(seeds):
            record = found.get(row.folder(seed), {})
            theirs = base.runs.get(seed) if base else None
            if theirs and "result" in record and (
                    data_of(record["result"]) != data_of(theirs["result"])):
                record = {"failed": f"its data are not those of {base.row.name}: the code and "
                          "docs of another Python, or other files"}
            if "failed" in record:
                self.failed.append(f"{row.column} | {row.name} | {seed}: {record['failed']}")
            elif record:
                self.runs[seed] = record
                for flags, of in row.warmups(seed)[:1]:
                    learned = found.get(folder_of(of, flags), {}).get("learned", {})
                    verdicts.append(learned.get("verdict"))
        asked = [verdict == "learned" for verdict in verdicts if verdict]  # some rules cannot be
        self.learned = f"{sum(asked)}/{len(asked)}" if asked else ""
        self.n, self.values = len(self.runs), [measure(run) for run in self.runs.values()]
        results = [run["result"] for run in self.runs.values()]
        if self.n:
            self.mean, self.text = np.mean(self.values), is_text(results[0])
            self.budget = results[0]["settings"]["steps"]
            self.accuracy = np.mean([result["val_accuracy"] for result in results])

    def show(self, value):
        return f"{value:.4f}" if self.text else f"{value:,.0f}"

    def against(self, base):
        """How much less was measured than of a baseline; the 95 % interval, low and high; and p."""
        return (base.mean - self.mean, *bootstrap(base.values, self.values),
                permutation_p(base.values, self.values))


def compare(rows, seeds, found):
    """{column: outcomes of its rows}, which come column by column, the base of each first"""
    columns = {}
    for row in rows:
        outcomes = columns.setdefault(row.column, [])
        outcomes.append(Outcome(row, seeds, found, outcomes[0] if outcomes else None))
    return columns


# --------------------------------------------------------------------------------------------------
# Tables and figures


def table_lines(columns):
    """A table for each column, in Markdown, which reads well in a terminal, too."""
    lines = []
    for column, outcomes in columns.items():
        there, first = [each for each in outcomes if each.n], outcomes[0]
        if there:
            measured = ["loss"] if there[0].text else [f"steps to {FOUND:.0%}", "found", "accuracy"]
            head = [column, *measured, "n", f"gain over {first.row.name}", "95 %", "p", "learned"]
            lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for each in there:
            cells = [each.row.name, each.show(each.mean)]
            if not each.text:
                found = sum(value < each.budget for value in each.values)
                cells += [f"{found}", f"{each.accuracy:.1%}"]
            compared = ["", "", ""]
            if first.n and each is not first:
                gain, low, high, p = each.against(first)
                compared = [each.show(gain), f"{each.show(low)} to {each.show(high)}", shown_p(p)]
            lines.append(f"| {' | '.join([*cells, str(each.n), *compared, each.learned])} |")
        without = [each.row.name for each in outcomes if not each.n]
        if without:
            lines += ["", f"no result yet of {column}: {'; '.join(without)}"]
        lines += [f"failed: {line}" for each in outcomes for line in each.failed]
    return lines


COLOURS = {  # of a warm-up, in all figures: those of pyplot's style, and six of Tol's "muted"
    "dyck": "C0", "set": "C1", "identity": "C2", "union": "C3", "eca": "C4", "nca": "C5",
    "none": "C6", "text": "C7",
    "sort": "#882255", "reverse": "#999933", "delete": "#332288", "stack": "#117733",
    "dyck_shuffle": "#44AA99", "shuffled": "#CC6677"}


def colour_of(warmup):
    """"dyck:k=3" -> that of dyck; of a mixture, that of its first rule."""
    name = re.search(r"^(?:[\d.]+\*)?(\w*)", warmup)[1]
    return COLOURS.get(name, "C7")


def draw(columns, path):
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
            warmup = as_dict(each.row.warmup or each.row.train).get("--warmup", "none")
            places = y + np.linspace(-0.3, 0.3, each.n + 2)[1:-1]  # else equal values are one dot
            axis.plot(each.values, places, "o", color=colour_of(warmup), alpha=0.7,
                      fillstyle="none" if each.row.change else "full")
            axis.plot([each.mean], [y], "|", color="black", markersize=18, markeredgewidth=2)
        if not there[0].text:
            axis.axvline(there[0].budget, color="grey", linestyle=":")
            axis.set(xlim=(0, None), xlabel=f"steps to {FOUND:.0%} right (dotted: never)")
        else:
            axis.set_xlabel(f"held-out loss, nats per token (dotted: mean of {first.row.name})")
            if first.n:
                axis.axvline(first.mean, color="grey", linestyle=":")
        axis.set_yticks(range(len(there)), [f"{each.row.name} (n = {each.n})" for each in there])
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
    if is_text(runs[0][1]):
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
    """`better` is better than `worse`: names of rows in a column of an experiment."""
    text: str
    published: str
    experiment: str
    column: str
    better: str
    worse: str


# Written down before the runs that decide them: ten seeds of a task, six of a text, each with a
# warm-up of its own. On text, rate and ramp suit the baseline, but where it says so.
CLAIMS = [
    Claim("Dyck finds the needle: the whole model moved, as published", "11.3 -> 96.9 % right",
          "controls", "recall of 15", "dyck", "none"),
    Claim("... attention and positions moved, our default", "-", "table", "recall of 15",
          f"dyck, {OURS}", "none"),
    Claim("... more than Dyck with its tokens shuffled", "10.3 -> 96.9 % right", "controls",
          "recall of 15", f"dyck, {OURS}", f"shuffled:dyck, {OURS}"),
    Claim("... it takes its weights as they are, not shuffled in each tensor", "gain gone",
          "weights", "recall of 15", "as it is", "shuffled"),
    Claim("set helps code", "perplexity 5.47 -> 5.15", "controls", "code", "set", "none"),
    Claim("set helps English", "perplexity 62.0 -> 59.9", "controls", "english", "set", "none"),
    Claim("set helps English at a modest rate without a ramp", "perplexity 62.0 -> 59.9", "tuned",
          "english", "set, 1e-3, ramp 0", "none, 1e-3, ramp 0"),
]


def judge(claim, seeds, found):
    """A claim -> what was measured, in words; n; p; the verdict."""
    rows = {row.name: row for row in rows_of(claim.experiment, "quick")
            if row.column == claim.column}
    base, ours = compare([rows[claim.worse], rows[claim.better]], seeds, found)[claim.column]
    if not ours.n or not base.n:
        return "", 0, math.nan, "not run"
    gain, low, high, p = ours.against(base)
    verdict = "undecided"
    if p < 0.05 / len(CLAIMS):  # Bonferroni: one false finding in 20 such lists of claims
        verdict = "supported" if gain > 0 else "contradicted"
    elif ours.text and not math.isnan(p) and -MARGIN < low and high < MARGIN:
        verdict = "no difference beyond the margin"
    measured = (f"{ours.show(base.mean)} ({base.row.name}) -> {ours.show(ours.mean)} "
                f"{'nats' if ours.text else 'steps'}, gain {ours.show(low)} to {ours.show(high)}")
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
    for budget, (name, (make, _)) in itertools.product(COLUMNS, EXPERIMENTS.items()):
        columns = {column: outcomes
                   for column, outcomes in compare(rows_of(name, budget), seeds, found).items()
                   if any(each.n for each in outcomes[1:])}
        there = {each.row.folder(0) for each in sum(columns.values(), []) if each.n}
        if there - shown:
            shown |= there
            draw(columns, folder / f"{name}-{budget}.png")
            lines += ["", f"## {name} ({budget}): {make.__doc__}", *table_lines(columns), "",
                      f"![{name}]({name}-{budget}.png)"]
    with written_whole(folder / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print(folder / "report.md")


def experiment(name, args):
    """Runs what is missing of an experiment, or of the part that --only names, and shows it."""
    rows, results = rows_of(name, args.budget), Path(args.results)
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
    print(f"\n{name} ({args.budget}): {EXPERIMENTS[name][0].__doc__}", *table_lines(columns),
          sep="\n")
    if any(each.n for outcomes in columns.values() for each in outcomes):
        draw(columns, (results if results.is_dir() else Path()) / f"{name}-{args.budget}.png")


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
    for name, (make, _) in EXPERIMENTS.items():
        runner = commands.add_parser(name, help=make.__doc__, parents=[shared])
        runner.set_defaults(seeds=SEEDS.get(name, 10))
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
