"""What many runs say.

    python analyze.py curves out/code-dyck-s0 out/code-none-s0      held-out loss against tokens, as table and picture
    python analyze.py table --budget quick --seeds 3                warm-ups by algorithmic tasks, each against none
    python analyze.py controls --budget quick --jobs 2              shuffled, text instead, a ramp for the baseline
    python analyze.py table --show                                  what there is so far; runs nothing

An experiment is a list of cells (row, column, settings of train.py). Each cell is run once per seed, in a folder of its
own below --results; a finished run is not run again, an interrupted one is resumed. Then the values are put into a table:
mean and 95 % interval (Student's t) over seeds, and each row against the first one, paired by seed, with Holm's
correction over the table.
"""
import contextlib
import csv
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import Parser, UserError, kind_of, run_main
from eval import Opened, entropy_score, probe_learned
from model import GPT, load, part_of, save, write_atomically
from train import OPERATIONAL, PRESETS, Settings, clock, read_json, resolve, run_name, warmup_block_size, write_json


def read_run(folder):
    """A run's folder -> (its settings, the log entries of its training stage that hold an evaluation)."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the folder of a run: it has no config.json (runs in a packed file: --results FILE and "
                        "parts of their names)")
    try:
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        points = [e for e in entries if e["stage"] == "train" and "val_loss" in e]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / 'log.jsonl'}: {error}") from None
    if not points:
        raise UserError(f"{folder} has no evaluation of its training stage yet")
    return read_json(folder / "config.json", "settings")["settings"], points


def regular(pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern} is not a regular expression: {error}") from None


def runs_named(patterns, found):
    """Of all results (see read_results) the runs in whose name one of the patterns is found: [(name, settings, points)]."""
    patterns = [regular(pattern) for pattern in patterns]
    runs = [(name, record["result"]["settings"], record["log"]) for name, record in found.items()
            if record.get("log") and record["result"]["settings"]["steps"] and any(p.search(name) for p in patterns)]
    if not runs:
        raise UserError(f"no run there has a name with {' or '.join(p.pattern for p in patterns)}")
    return runs


FROM = ("init", "attn_from", "mlp_from")  # what a run takes up from another's checkpoint,
HOW = ("transfer", "embeddings", "lm_head", "positions")  # and how: without a warm-up these are moot


def taken_up(settings, found):
    """Which warm-up a run takes up, in words: its spec, or the name of its folder or file, and what was done to it."""
    words = []
    for path in (settings[key] for key in FROM if settings.get(key)):
        ours = Path(path).name in ("warmup.pt", "ckpt.pt") and Path(path).parent.name
        folder = ours or (Path(path).stem if path.endswith(".pt") else Path(path).name)
        if operation := re.search(r"-([a-z]+(_[\w.]+)?)\.init\.pt$", path):  # see operated_checkpoint
            words.append(operation[1].replace("_", " ") + " weights")
        elif "result" in found.get(folder, {}):
            words.append(found[folder]["result"]["settings"]["warmup"])
        else:
            words.append(re.sub(r"^warmup-|-s\d+-[0-9a-f]{8}$", "", folder))
    return " + ".join(words) or settings["warmup"]


def warmed(settings):
    """Whether a run has a warm-up, its own or another's."""
    return settings["warmup"] != "none" or any(settings.get(key) for key in FROM)


def label(settings, found):
    """What a run differs from others by: its warm-up, how that was taken up, a penalty."""
    how = [settings["transfer"]] * (settings["transfer"] != "full") + ["mean embeddings"] * (settings.get("embeddings") == "mean")
    how += [f"{key} {settings[key]}" for key in ("lm_head", "positions") if settings.get(key)]
    penalty = f", penalty {settings['sharpen']:g}" if settings.get("sharpen") else ""
    return taken_up(settings, found) + penalty + f" ({', '.join(how)})" * bool(warmed(settings) and how)


def same_but_seed(settings):
    """A key that runs share which differ in the seed alone."""
    moot = {*OPERATIONAL, "seed"} | set(() if warmed(settings) else HOW)
    alike = {key: value for key, value in settings.items() if value is not None and key not in moot
             and (settings["warmup_steps"] or not key.startswith("warmup_"))}
    for key in FROM:  # each seed has a warm-up of its own
        path = re.sub(r"-[0-9a-f]{8}(-[^-]*\.init\.pt)$", r"\1", alike.get(key, ""))  # that hash is of the seed, too
        alike[key] = re.sub(r"-s\d+(?=[-/.]|$)", "", path)
    return json.dumps(alike, sort_keys=True)


def print_runs(runs, found):
    """The last values of every run."""
    print(f"{'run':32} {'warm-up':24} {'seed':>4} {'tokens':>14} {'held-out loss':>13} {'accuracy':>9}")
    for folder, settings, points in runs:
        last = points[-1]
        print(f"{str(folder):32} {label(settings, found):24} {settings['seed']:4} {last['tokens']:14,} {last['val_loss']:13.4f} "
              f"{last['val_accuracy']:9.2%}")


def curves(runs, picture, metric, found):
    """Draws held-out loss or accuracy against the training stage's tokens, for runs [(name, settings, points)]. Runs that
    differ in the seed alone are one line, the mean, among a thin one for each."""
    if len(data := {settings["data"] for _, settings, _ in runs}) > 1:
        raise UserError(f"these runs are on different data, so they do not compare: {', '.join(sorted(data))}")
    plt, name, groups = pyplot(), data.pop(), {}
    metric = metric or ("accuracy" if Path(name).parts and kind_of(name) == "task" else "loss")
    for _, settings, points in runs:
        groups.setdefault(same_but_seed(settings), []).append((settings, points))
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for i, group in enumerate(groups.values()):
        # The untrained model's loss would flatten the picture, so the first evaluation is left out.
        values = [{p["tokens"]: p[f"val_{metric}"] for p in points if p["step"] or len(points) == 1} for _, points in group]
        tokens = sorted(set(values[0]).intersection(*values))
        matrix = np.array([[value[x] for x in tokens] for value in values])
        settings = group[0][0]
        seeds = f"seed {settings['seed']}" if len(group) == 1 else f"mean of {len(group)} seeds"
        line, = axes.plot(tokens, matrix.mean(0), marker="osv^D"[i % 5], linestyle=("-", "--", ":", "-.")[i % 4],
                          label=f"warm-up {label(settings, found)}, {seeds}")
        for each in matrix if len(group) > 1 else ():
            axes.plot(tokens, each, color=line.get_color(), alpha=0.3, linewidth=0.8)
    axes.set(xlabel="tokens of training after the warm-up", title=f"{name}: {len(runs)} run{'s' * (len(runs) > 1)}",
             ylabel="accuracy on held-out answers" if metric == "accuracy" else "held-out loss (nats per counted token)")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8)
    keep_figure(figure, picture)


def keep_figure(figure, path):
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        pyplot().close(figure)


def pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt
    except ImportError as error:
        raise UserError(f"a picture needs matplotlib: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def t_tail(t, df):
    """P(|T| > t) of Student's t with df degrees of freedom, by Simpson's rule on its density."""
    if not math.isfinite(t):
        return 0.0
    x = np.linspace(0, math.atan(abs(t) / math.sqrt(df)), 2001)  # t = sqrt(df) tan(x): the density is cos(x) ** (df - 1)
    weights = np.tile([2.0, 4.0], 1001)[:2001]
    weights[[0, -1]] = 1.0
    inside = (np.cos(x) ** (df - 1) * weights).sum() * (x[1] - x[0]) / 3
    return float(max(0.0, 1 - 2 * inside * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)))


def interval(values):
    """(mean, half the width of its 95 % interval): Student's t; nan with fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan
    low, high = 0.0, 1000.0
    for _ in range(60):  # the t that leaves 5 %
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, len(values) - 1) > 0.05 else (low, middle)
    return float(values.mean()), float(high * values.std(ddof=1) / math.sqrt(len(values)))


def paired_p(a, b):
    """Two-sided p of the paired t test that a and b have the same mean; 1 if they are the same; nan where there is nothing
    to test: fewer than two pairs, a loss that is not finite, or differences that are all one number."""
    d = np.asarray(a, float) - np.asarray(b, float)
    if len(d) < 2 or not np.isfinite(d).all():
        return math.nan
    spread = d.std(ddof=1) / math.sqrt(len(d))
    return t_tail(d.mean() / spread, len(d) - 1) if spread else 1.0 if d.mean() == 0 else math.nan


def holm(ps):
    """Holm's step-down correction; nan stays nan and does not count."""
    ps, corrected, worst = np.asarray(ps, float), np.full(len(ps), math.nan), 0.0
    order = [i for i in np.argsort(ps) if not math.isnan(ps[i])]
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, ps[i] * (len(order) - rank)))
        corrected[i] = worst
    return corrected


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: lists of cells. The first row of a column is what the others are compared with.


@dataclass
class Cell:
    row: str
    column: str
    settings: dict  # of train.py, but for the seed
    operation: str = ""  # what is done to the warm-up's weights before they are taken up, see `operate`
    mixture: dict = field(default_factory=dict)  # {"attn_from" or "mlp_from": settings of the warm-up it is taken from}
    times: int = 1  # this many times as many seeds
    line: str = ""  # in a figure of lines: which one,
    x: float = math.nan  # and where on it


WARMUP_FLAGS = ("warmup", "warmup_steps", "warmup_batch_size", "warmup_lr", "warmup_lr_schedule", "warmup_lr_ramp",
                "warmup_weight_decay", "warmup_dropout", "warmup_block_size", "warmup_curriculum", "warmup_tokens")
TASKS = {"quick": ("haystack:pairs=15", "reversed_addition", "sorting:numbers=17"),
         "paper": ("haystack", "addition", "reversed_addition", "multiplication", "sorting")}
DOMAINS = {"quick": ("code", "docs", "math"), "paper": ("codeparrot", "c4", "deepmind_math")}
PAPER_WARMUPS = ("dyck", "dyck_shuffle", "identity", "reverse", "sort", "set", "union", "delete", "stack", "eca")
# Quick (ours): two CPU cores, a minute or two a run. The warm-ups are in contexts as long as what follows, so that trained
# position embeddings move over. Before tasks they are of the kind that models this small learn, for long enough. Before text
# they have the published batch, steps and learning rate: at six times that rate every one of them made all text worse.
SPECS = {"task": {"dyck": ("dyck:k=16,length=36", 4000), "identity": ("identity:length=2-17", 8000),  # and for how many steps
                  "set": ("set:length=2-17", 10_000), "union": ("union:length=2-17", 10_000), "eca": ("eca:width=8,length=36", 2000)},
         "text": {"dyck": ("dyck:k=8,length=64", 2500), "identity": ("identity:length=2-31", 2500),
                  "set": ("set:length=2-15", 2500), "union": ("union:length=2-15", 2500), "sort": ("sort:length=2-15", 2500),
                  "dyck_shuffle": ("dyck_shuffle:k=8,length=64", 2500), "eca": ("eca:width=8,length=64", 2500)}}
TASK = {"quick": dict(size="2_4_16", steps=1500, batch_size=250, lr=2e-3, lr_ramp=150, warmup_steps=10_000,
                      warmup_batch_size=128, warmup_block_size=36, warmup_lr=5e-3, warmup_lr_schedule="cosine",
                      warmup_lr_ramp=200), "paper": {}}
TEXT = {"quick": dict(size="2_4_64", block_size=64, steps=1000, batch_size=32, lr=2e-3, lr_ramp=0, warmup_steps=2500,
                      warmup_batch_size=64, warmup_block_size=64, warmup_lr=5e-4, warmup_lr_schedule="constant",
                      warmup_lr_ramp=0, eval_batches=40), "paper": {}}  # the same held-out rows on every device


def on(column, budget, warmup="none", **more):
    """The settings of a run on a task or a domain of text, after one of the budget's warm-ups or another spec."""
    if column in DOMAINS[budget]:
        settings = TEXT[budget] | ({"data": column} if budget == "quick" else {"preset": column})
    else:
        settings = TASK[budget] | {"data": column}
    if warmup == "none":
        return {key: value for key, value in settings.items() if key not in WARMUP_FLAGS} | {"warmup": "none"} | more
    shuffled, name = "shuffled:" * warmup.startswith("shuffled:"), warmup.removeprefix("shuffled:")
    specs = SPECS["text" if column in DOMAINS[budget] else "task"] if budget == "quick" else {}
    if warmup == "text" and budget == "quick":  # it is as long as the text's rows
        settings.pop("warmup_block_size")
    spec, steps = specs.get(name, (name, settings.get("warmup_steps") if name != "text" else specs.get("dyck", (0, 0))[1]))
    if steps:
        settings["warmup_steps"] = steps
    if column not in DOMAINS[budget]:  # published with the whole model; with parts of it all are fresh, see `embeddings`
        settings["embeddings"] = "mean"
    return settings | {"warmup": shuffled + spec, "transfer": "full"} | more


STARTS = ((dict(embeddings="mean"), ""), (dict(embeddings="random"), ", fresh embeddings"))  # of tasks; positions move


def table(budget):
    """Which warm-up helps which task: the whole model or its attention alone, token embeddings at the mean or fresh.

    At the mean of the warm-up's, as published with the whole model."""
    warmups = ("dyck", "identity", "set", "eca") if budget == "quick" else PAPER_WARMUPS
    cells = []
    for task in TASKS[budget]:
        cells += [Cell("none", task, on(task, budget))]
        cells += [Cell(f"{warmup}, {parts}{ending}", task, on(task, budget, warmup, transfer=parts, **start))
                  for start, ending in STARTS for warmup in warmups for parts in ("full", "attn")]
    return cells


def transfer(budget):
    """What has to move over: the whole model, attention, MLPs or norms, for tasks and for each domain of text."""
    cells = []
    for column in (TASKS[budget][0], "reversed_addition", *DOMAINS[budget]):
        cells.append(Cell("none", column, on(column, budget)))
        warmups = ("set", "dyck") if column in DOMAINS[budget] else ("identity", "set") if budget == "quick" else (
            "identity", "set", "stack")
        for warmup in warmups:
            cells += [Cell(f"{warmup}, {parts}", column, on(column, budget, warmup, transfer=parts))
                      for parts in ("full", "attn", "mlp", "norm")]
    return cells


def embeddings(budget):
    """What stands in the way of a warm-up before recall: where token embeddings, output head and positions begin."""
    column = TASKS[budget][0]
    cells = [Cell("none", column, on(column, budget))]
    for warmup in ("dyck", "identity", "set"):
        for parts in ("attn", "full"):
            for words, start in (("all fresh but positions", dict(embeddings="random")),
                                 ("input at the mean", dict(embeddings="mean", lm_head="random")),
                                 ("head at the mean", dict(embeddings="random", lm_head="mean")),
                                 ("both at the mean", dict(embeddings="mean")),
                                 ("all fresh", dict(embeddings="random", positions="random"))):
                cells.append(Cell(f"{warmup}, {parts}, {words}", column, on(column, budget, warmup, transfer=parts, **start)))
    return cells


def controls(budget):
    """The critics' controls: shuffled sequences, the same tokens of text, a baseline otherwise tuned, longer, or luckier."""
    cells = []
    for column in (TASKS[budget][0], *DOMAINS[budget]):
        task = column in TASKS[budget]
        best = dict(transfer="attn", embeddings="random") if task else {}  # what works best there
        cells += [Cell("none", column, on(column, budget), times=2)]
        cells += [Cell(shuffled + row, column, on(column, budget, shuffled + row, **best))
                  for row in ("dyck", "identity", *["set"] * task) for shuffled in ("", "shuffled:")]
        steps = on(column, budget).get("steps", 10_000) if task else train_steps(column, budget)
        cells += [Cell(f"none, ramp of {share}", column, on(column, budget, lr_ramp=round(steps * share)))
                  for share in (0.05, 0.2)]
        if task:
            rate = TASK[budget].get("lr", 1e-3)
            cells += [Cell(f"none, {times} times the rate", column, on(column, budget, lr=times * rate)) for times in (2, 4)]
            cells += [Cell("none, 4 times the steps", column, on(column, budget, steps=4 * steps))]
        else:  # as many tokens as dyck has (what train.py has as default for the presets)
            cells.append(Cell("text", column, on(column, budget, "text")))
    return cells


def weights(budget):
    """Is it the values or the scale: the warm-up's weights shuffled, with noise, scaled, drawn afresh."""
    return operated(budget, ("shuffled", "redrawn", "noise 0.1", "noise 0.3", "noise 1", "scaled 0.5", "scaled 2"))


def heads(budget):
    """Which heads carry it: a quarter of them alone, or all but a quarter, by how sharply they attend."""
    return operated(budget, [f"{what} {which}" for what in ("only", "without") for which in ("sharp", "blurred", "random")])


def operated(budget, operations):
    """Cells: none, a set warm-up as it is, and the same warm-up after each operation. On code, its attention and MLPs move
    over; on recall, its attention."""
    cells = []
    for column, parts in ((DOMAINS[budget][0], "attn,mlp"), (TASKS[budget][0], "attn")):
        settings = on(column, budget, "set", transfer=parts)
        cells += [Cell("none", column, on(column, budget)), Cell("as it is", column, settings),
                  *(Cell(operation, column, settings, operation) for operation in operations)]
    return cells


def sharpen(budget):
    """No warm-up, but a penalty on the attention's entropy in its place, over a range of strengths."""
    cells = []
    for column in (DOMAINS[budget][0], TASKS[budget][0]):
        warm = on(column, budget, "set", transfer="full" if column in DOMAINS[budget] else "attn")
        cells += [Cell("none", column, on(column, budget), line="penalty", x=0), Cell("warm-up", column, warm)]
        cells += [Cell(f"none, penalty {strength:g}", column, on(column, budget, sharpen=strength), line="penalty", x=strength)
                  for strength in (0.01, 0.03, 0.1, 0.3, 1.0)]
    return cells


def length(budget):
    """How much warm-up is best, and where more becomes worse."""
    steps, cells = (125, 250, 500, 1000, 2000, 4000), []
    for column in DOMAINS[budget]:
        cells.append(Cell("none", column, on(column, budget)))
        for warmup in ("dyck", "set"):
            cells += [Cell(f"{warmup}, {n} steps", column, line=warmup, x=n, settings=on(
                column, budget, warmup, warmup_steps=n)) for n in steps]
    return cells


def mix(budget):
    """Data mixtures of set and union over their proportions, and attention of one warm-up with the MLPs of another."""
    cells, ending = [], ":length=64" if budget == "paper" else ":length=2-10,vocab=30"
    for column in DOMAINS[budget][:2]:
        cells.append(Cell("none", column, on(column, budget)))
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            spec = f"{share}*set+{1 - share}*union" if 0 < share < 1 else "set" if share else "union"
            cells.append(Cell(f"{share:g} set, {1 - share:g} union", column, on(column, budget, spec + ending), line="mixture",
                              x=share))
    for column in (*TASKS[budget], DOMAINS[budget][0]):
        plain = on(column, budget)
        if column in TASKS[budget]:
            cells.append(Cell("none", column, plain))
        for start, ending in STARTS if column in TASKS[budget] else [({}, "")]:
            for warmup in ("set", "eca"):
                for parts in ("full", "attn", "mlp"):
                    cells.append(Cell(f"{warmup}, {parts}{ending}", column, on(column, budget, warmup, transfer=parts, **start)))
            for a, b in (("set", "eca"), ("eca", "set")):
                cells.append(Cell(f"attention of {a}, MLPs of {b}{ending}", column, plain, mixture={
                    f"{part}_from": on(column, budget, warmup, **start)
                    for part, warmup in (("attn", a), ("mlp", b))}))
    return cells


TEXT_WARMUPS = ("none", "text", "set", "union", "sort", "dyck", "dyck_shuffle", "eca")


def efficiency(budget):
    """How much less text does it take: the same steps (additive), and fewer steps until the baseline's loss (substitutive)."""
    cells = []
    for column in DOMAINS[budget]:
        steps = train_steps(column, budget)
        for warmup in TEXT_WARMUPS:
            shares = (1.0, 0.85, 0.7, 0.55) if warmup in ("set", "union") else (1.0,)
            cells += [Cell(f"{warmup}, {share:.0%} of the text", column, line=warmup, x=share, settings=on(
                column, budget, warmup, steps=round(steps * share))) for share in shares]
    return cells


def tuned(budget):
    """As efficiency, with all of the text, where no warm-up does best: twice the learning rate, a ramp, weight decay 0.1.

    So says the grid at the quick budget; at the paper's it is a guess."""
    cells = []
    for column in DOMAINS[budget]:
        rate, steps = TEXT["quick"]["lr"] if budget == "quick" else PRESETS[column]["lr"], train_steps(column, budget)
        rows = [(warmup, warmup, {}) for warmup in (*TEXT_WARMUPS, "shuffled:eca")]
        rows += [(f"{warmup}, norms alone", warmup, dict(transfer="norm")) for warmup in ("set", "dyck")]
        cells += [Cell(row, column, on(column, budget, warmup, lr=2 * rate, weight_decay=0.1, lr_ramp=steps // 20, **more))
                  for row, warmup, more in rows]
    return cells


def grid(budget):
    """Learning rate by weight decay by ramp, for none and for a warm-up: is the gain more than a mistuned baseline?"""
    rates, column = (1e-3, 2e-3, 4e-3, 8e-3) if budget == "quick" else (2.5e-4, 5e-4, 1e-3, 2e-3), DOMAINS[budget][1]
    ramp = train_steps(column, budget) // 20
    return [Cell(f"{warmup}, lr {lr:g}, weight decay {decay:g}, ramp {steps}", column,
                 on(column, budget, warmup, lr=lr, weight_decay=decay, lr_ramp=steps),
                 line=f"{warmup}, {decay:g}, ramp {steps}", x=lr)
            for warmup in ("none", "set") for decay in (0.0, 0.1) for steps in (0, ramp) for lr in rates]


def scale(budget):
    """The gain over model sizes: one column for each."""
    sizes = ("2_4_32", "2_4_64", "4_4_128") if budget == "quick" else ("gpt2", "24_16_1024", "1.3b")
    return [Cell(warmup, size, on(DOMAINS[budget][1], budget, warmup, size=size))
            for size in sizes for warmup in ("none", "dyck", "set", "union")]


def train_steps(column, budget):
    return TEXT["quick"]["steps"] if budget == "quick" else PRESETS[column]["steps"]


EXPERIMENTS = {f.__name__: f for f in (table, transfer, embeddings, controls, weights, heads, sharpen, length, mix, efficiency,
                                       tuned, grid, scale)}
XLABELS = {"sharpen": "strength of the penalty", "length": "steps of warm-up", "mix": "share of set (the rest is union)",
           "efficiency": "share of the text", "grid": "learning rate"}


# ----------------------------------------------------------------------------------------------------------------------
# Operations on the weights of a warm-up


@torch.no_grad()
def operate(model, operation, seed, sharpness=None):
    """Changes a GPT in place. Attention and MLPs alone: the rest stays as it is.

    "shuffled": the values of each tensor in another order; "redrawn": normal numbers of each tensor's mean and spread;
    "noise x": x times the tensor's spread is added; "scaled x": each tensor times x; "only" or "without" "sharp",
    "blurred" or "random": that quarter of the heads is kept, or given fresh weights (the others the other way round),
    by `sharpness`, the entropy of each head (layers, heads)."""
    generator, (what, _, which) = torch.Generator().manual_seed(seed), operation.partition(" ")
    if what in ("only", "without"):
        return replace_heads(model, chosen_heads(sharpness, which, seed), what == "without", seed)
    for name, p in model.named_parameters():
        if part_of(name) in ("attn", "mlp"):
            noise = torch.randn(p.shape, generator=generator)
            spread = p.std() if p.numel() > 1 else 0.0
            if what == "shuffled":
                p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
            elif what == "redrawn":
                p.copy_(p.mean() + spread * noise)
            elif what == "noise":
                p.add_(float(which) * spread * noise)
            else:
                p.mul_(float(which))


def chosen_heads(sharpness, which, seed):
    """bool (layers, heads): the quarter of all heads with the lowest or highest entropy, or a random one."""
    order = np.random.default_rng(seed).permutation(sharpness.size) if which == "random" else np.argsort(sharpness, axis=None)
    chosen = np.zeros(sharpness.size, bool)
    quarter = max(1, sharpness.size // 4)
    chosen[order[-quarter:] if which == "blurred" else order[:quarter]] = True
    return chosen.reshape(sharpness.shape)


def replace_heads(model, chosen, replaced, seed):
    """Gives fresh weights to the chosen heads, or with replaced=False to all others: queries, keys, values and output."""
    torch.manual_seed(seed + 2 ** 33)
    fresh = GPT(model.config)
    for layer, (ours, theirs) in enumerate(zip(model.h, fresh.h)):
        width = model.config.n_embd // model.config.n_head
        for head in np.flatnonzero(chosen[layer] == replaced):
            inside = torch.arange(head * width, (head + 1) * width)
            rows = torch.cat([inside + i * model.config.n_embd for i in range(3)])  # of q, k and v
            ours.attn.c_attn.weight[rows] = theirs.attn.c_attn.weight[rows]
            ours.attn.c_attn.bias[rows] = theirs.attn.c_attn.bias[rows]
            ours.attn.c_proj.weight[:, inside] = theirs.attn.c_proj.weight[:, inside]


def operated_checkpoint(warmup, operation, seed, path):
    """Writes the operated copy of a warm-up's checkpoint, which --init takes up. Returns its path."""
    sharpness = None
    if operation.startswith(("only", "without")):
        c = opened(warmup)
        x = c.rows(16)[0]
        sharpness = entropy_score(c.look_inside(x)[0], c.real(x))
    model, state = load(warmup)
    operate(model, operation, seed, sharpness)
    save(path, model, **{key: state[key] for key in ("stage", "step", "tokens", "source")})
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Running them. A warm-up is a run of its own (train.py --steps 0), made once for all the runs that take it up.


def name_of(cell, seed):
    """The folder of a cell's run with a seed: the same settings are the same run, whichever experiment asks. How often and
    on how much it is measured is not in the name."""
    settings = {"data": cell.settings.get("preset"), "warmup": "dyck", **cell.settings, "seed": seed, "eval_batches": None}
    name = run_name(Settings(**settings))
    for flag, settings in cell.mixture.items():
        name += f"-{flag}={settings['warmup'].partition(':')[0]}-{zlib.crc32(repr(settings).encode()):08x}"
    return name + f"-{cell.operation.replace(' ', '_')}" * bool(cell.operation)


def warmup_of(settings, seed):
    """The settings of a cell that has a warm-up -> (the name of the warm-up's run, its settings, how to go on from it)."""
    s = resolve(Settings(**{**settings, "seed": seed}))
    warm = {key: getattr(s, key) for key in (*WARMUP_FLAGS, "size", "beta1", "beta2", "grad_clip", "recompute")
            if getattr(s, key) is not None}
    warm |= dict(data="haystack", tied=s.tied)  # with no step of training, any data will do: a task is there at once
    if s.warmup != "text":
        warm["warmup_block_size"] = warmup_block_size(s)
    else:
        warm |= {key: getattr(s, key) for key in ("data", "tokenizer", "block_size")}
    name = re.sub(r"[^\w.=+*,-]+", "_", f"warmup-{s.warmup}-{s.size}-s{seed}")
    return (f"{name[:120]}-{zlib.crc32(json.dumps(warm, sort_keys=True).encode()):08x}", {**warm, "steps": 0, "seed": seed},
            {"embeddings": s.embeddings})


def warmups_of(cell, seed):
    """{name: settings} of the warm-ups that a cell takes up: one, two for a mixture of weights, or none."""
    wanted = cell.mixture.values() or [cell.settings] * (cell.settings["warmup"] != "none")
    return {warmup_of(settings, seed)[0]: settings for settings in wanted}


@contextlib.contextmanager
def locked(folder, wait):
    """Yields the lock of a run, which goes on with the run if this process is killed, or None where another is at it; where
    files cannot be locked (Windows), a file that locks nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:
            pass
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            raise UserError(f"{folder.parent} does not let files be locked ({error.strerror}): choose another disk") from None
        yield file


def call_train(settings, folder, more, lock):
    """Runs or resumes train.py in a folder, in a process of its own. Raises UserError with what it said."""
    if STOPPING.is_set():
        raise Interrupted
    words = []
    for key, value in {**settings, **more, "out": folder.name}.items():
        words += [f"--{'no-' * (value is False)}{key}"] + ([] if isinstance(value, bool) else [str(value)])
    # From the folder of all results, so that no setting of a run depends on where that is; with the lock in its hands.
    done = subprocess.run([sys.executable, str(Path(__file__).resolve().parent / "train.py"), *words, "--resume"],
                          cwd=folder.parent, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ},
                          pass_fds=(lock.fileno(),) if os.name == "posix" else ())
    if STOPPING.is_set() or done.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        raise Interrupted
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("error: "))


STOPPING = threading.Event()  # Ctrl-C came: nothing new is begun


class Interrupted(Exception):
    """A run was stopped with its work saved, or not begun: it is not failed."""


ONE_AT_A_TIME = threading.Lock()  # torch's random numbers are one stream for all threads


def ready_warmup(settings, seed, results, more):
    """Makes a cell's warm-up unless it is there, and asks whether it was learned -> (its checkpoint, how to go on)."""
    name, warm, then = warmup_of(settings, seed)
    folder = results / name
    with locked(folder, wait=True) as lock:
        if not finished(folder):
            call_train(warm, folder, more, lock)
        if not (folder / "learned.json").exists():
            with ONE_AT_A_TIME:
                found = probe_learned(opened(folder / "warmup.pt"))
            write_json(folder / "learned.json", {key: value for key, (value, _) in found.rows.items()} if found else {})
    return folder / "warmup.pt", then


def opened(path):
    return Opened(str(path), SimpleNamespace(device="cpu", batch_size=16, batches=1, problems=0, sample=0, data=None,
                                             tokenizer=None))


def finished(folder):
    """Whether a run has its result; one that cannot be read is taken away, so that the run is resumed."""
    path = folder / "result.json"
    if path.exists():
        with contextlib.suppress(UserError, ValueError):
            return bool(read_result(folder))
        path.unlink(missing_ok=True)
    return False


def run_once(cell, seed, results, more):
    """Runs or resumes one run -> "done", "failed", "elsewhere" (another process is at it) or "stopped"."""
    folder = results / name_of(cell, seed)
    with locked(folder, wait=False) as lock:
        if finished(folder):
            return "done"
        if not lock:
            return "elsewhere"
        failed, settings = folder.with_name(folder.name + ".failed"), {**cell.settings, "seed": seed}
        try:
            if cell.mixture or settings["warmup"] != "none":
                wanted = cell.mixture or {"init": cell.settings}
                settings = {key: value for key, value in settings.items() if key not in WARMUP_FLAGS}
                for flag, warm in wanted.items():
                    path, then = ready_warmup(warm, seed, results, more)
                    if cell.operation:
                        with ONE_AT_A_TIME:
                            path = operated_checkpoint(path, cell.operation, seed, folder.with_name(folder.name + ".init.pt"))
                    settings |= {flag: str(path.relative_to(results)), **then}
            call_train(settings, folder, more, lock)
        except Interrupted:
            return "stopped"
        except UserError as error:
            failed.write_text(f"{error}\n")
            return "failed"
        failed.unlink(missing_ok=True)
        return "done"


def runs_of(cells, seeds):
    """{name: (cell, seed)} of every run that the cells ask for, all cells of one seed first: an early look is fair."""
    runs = {}
    for seed in range(seeds * max(cell.times for cell in cells)):
        for cell in cells:
            if seed < seeds * cell.times:
                runs.setdefault(name_of(cell, seed), (cell, seed))
    return runs


def run_all(cells, seeds, results, jobs, more):
    """Every cell with every seed, `jobs` at a time; says after each how many are done and how long it may still take."""
    runs, found = runs_of(cells, seeds), read_results(results)
    left = [run for name, run in runs.items() if "result" not in found.get(name, {}) and not finished(results / name)]
    makers = {}  # of a seed's runs, first those of which each makes another warm-up: then none has to wait for one
    for cell, seed in left:
        for name in warmups_of(cell, seed):
            makers.setdefault(name, id(cell))
    left.sort(key=lambda run: (run[1], id(run[0]) not in makers.values()))
    print(f"{len(runs)} runs, {len(runs) - len(left)} done already, {len(left)} to go, {jobs} at a time", flush=True)
    began, counts = time.time(), {"done": 0, "failed": 0, "elsewhere": 0, "stopped": 0}

    def one(run):
        cell, seed = run
        state = run_once(cell, seed, results, more)
        counts[state] += 1
        if state == "stopped":
            return
        finished = sum(counts.values())
        print(f"[{finished}/{len(left)}] {state}: {cell.row} | {cell.column} | seed {seed}; "
              f"{min(jobs - 1, len(left) - finished)} more running, "
              f"{clock((time.time() - began) / finished * (len(left) - finished))} left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, left))
        except KeyboardInterrupt:  # the runs got it too: each saves and stops
            STOPPING.set()
            pool.shutdown(cancel_futures=True)
            raise
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# What they say


def checked(record):
    """A record, if it has what every reader asks for. Raises ValueError."""
    try:
        if "result" in record:
            missing = [key for key in ("settings", "tokens", "val_loss", "val_accuracy") if key not in record["result"]]
            missing += [key for key in ("seed", "steps", "warmup", "data") if key not in record["result"]["settings"]]
            missing += [key for key in ("procedural", "semantic") if key not in record["result"]["tokens"]]
            missing += [key for point in record.get("log", ()) for key in ("step", "tokens", "val_loss", "val_accuracy")
                        if key not in point]
        else:
            missing = ["result"] * ("failed" not in record or "log" in record)
        if not missing and isinstance(record.get("learned", {}), dict):
            return record
    except (KeyError, TypeError):
        missing = []
    raise ValueError(f"a record lacks {missing[0]}" if missing else "a record is not of the form that pack writes")


def read_packed(path):
    """{name: record} of a file that `pack` made."""
    try:
        with gzip.open(path, "rt") as file:
            found = {record.pop("name"): checked(record) for record in map(json.loads, file)}
        if not found:
            raise ValueError("it is empty")
        return found
    except (OSError, EOFError, zlib.error, ValueError, AttributeError, KeyError, TypeError) as error:
        why = "a record has no name" if isinstance(error, (AttributeError, KeyError, TypeError)) else error
        raise UserError(f"cannot read {path}: {why}; a file that analyze.py pack wrote is wanted") from None


def read_result(folder):
    """{"result": what a run's result.json holds}. Raises UserError or ValueError."""
    return checked({"result": read_json(folder / "result.json", "settings", "val_loss", "val_accuracy", "tokens")})


def read_folder(path):
    """The record of one run that has a result.json; "failed" says that this cannot be read."""
    record = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        record["learned"] = dict(json.loads((path / "learned.json").read_text()))
    try:
        record |= read_result(path)
    except (UserError, ValueError) as error:
        return {"failed": f"{error}; without that file the run is resumed"}
    with contextlib.suppress(UserError):
        record["log"] = read_run(path)[1]
    return record


def read_results(where):
    """{name: record} of all that is finished or failed in a folder of runs and the packed files in it, or in one packed file.

    A record holds "result" (result.json), "log" (the evaluations), "learned" (of a warm-up), or "failed" (why). Of the same
    run a result counts more than a failure, a folder's more than a packed one."""
    where, found = Path(where), {}
    if not where.exists() and where.name.endswith((".gz", ".jsonl")):
        raise UserError(f"there is no file {where}; a file that analyze.py pack wrote, or a folder of runs is wanted")
    if where.is_file():
        return read_packed(where)
    records = [pair for path in sorted(where.glob("*.jsonl.gz")) for pair in read_packed(path).items()]
    for path in sorted(where.glob("*")):
        if path.name.endswith(".failed"):
            with contextlib.suppress(OSError):  # another process may just have made a success of it
                records.append((path.name.removesuffix(".failed"), {"failed": path.read_text(errors="replace").strip()}))
        elif (path / "result.json").exists():
            records.append((path.name, read_folder(path)))
    for name, record in records:
        if "result" in record:
            found[name] = {key: value for key, value in {**found.get(name, {}), **record}.items() if key != "failed"}
        else:
            found.setdefault(name, record)
    return found


def pack(where, path):
    """All results of a folder in one small file, from which every table and figure can be made again."""
    found = read_results(where)
    if not found:
        raise UserError(f"there are no results in {where}")
    write = lambda file: file.write(gzip.compress("".join(json.dumps({"name": name, **record}) + "\n" for name, record
                                                          in found.items()).encode(), mtime=0))
    write_atomically(Path(path), write)
    print(f"{path}: {len(found)} runs, {Path(path).stat().st_size / 1e6:.2f} MB")


def was_learned(cell, seed, found):
    """Whether the warm-ups of a run passed the gate. None: it has no warm-up, or one for which no gate is defined (text,
    shuffled sequences). Where the answer is missing it counts as not learned."""
    verdicts = [found.get(name, {}).get("learned", {"verdict": "unknown"}).get("verdict") for name in warmups_of(cell, seed)]
    verdicts = [verdict for verdict in verdicts if verdict]
    return all(verdict == "learned" for verdict in verdicts) if verdicts else None


def compare(cells, seeds, found):
    """One entry for each cell: its values by seed, their mean and 95 % interval, and the gain over the column's first row.

    Tasks are measured by accuracy, text by minus the loss, so that a gain is good in both. Gains are paired by seed.
    Holm's correction is over all entries. Runs that failed or do not compare are listed in "failed": [(seed, why)]."""
    entries, first, measures = [], {}, {}
    for cell in cells:
        task = "preset" not in cell.settings and kind_of(cell.settings["data"]) == "task"
        metric, values, failed, spent, early = "accuracy" if task else "loss", {}, [], [], []
        for seed in range(seeds * cell.times):
            record = found.get(name_of(cell, seed), {})
            if "result" in record:
                batches = record["result"]["settings"].get("eval_batches")
                if measures.setdefault(cell.column, batches) != batches:
                    failed.append((seed, f"measured on {batches} held-out batches, the first row on {measures[cell.column]}, so they "
                                   "do not compare: delete its folder to run it again"))
                    continue
                values[seed] = record["result"]["val_accuracy" if task else "val_loss"]
                spent.append(record["result"]["tokens"]["procedural"] / max(1, record["result"]["tokens"]["semantic"]))
                early += [point[f"val_{metric}"] for point in record.get("log", ())[1:2]]
            elif "failed" in record:
                failed.append((seed, record["failed"]))
        base = first.setdefault(cell.column, values)
        gains = {} if base is values else {s: (values[s] - base[s]) * (1 if task else -1) for s in values if s in base}
        (mean, half), (gain, gain_half) = interval(list(values.values())), interval(list(gains.values()))
        entries.append({"row": cell.row, "column": cell.column, "metric": metric, "n": len(values), "mean": mean, "half": half,
                        "pairs": len(gains), "gain": gain, "gain_half": gain_half,
                        "p": paired_p(list(gains.values()), [0.0] * len(gains)), "line": cell.line, "x": cell.x,
                        "procedural": float(np.mean(spent)) if spent else math.nan, "early": float(np.mean(early or [math.nan])),
                        "learned": {seed: was_learned(cell, seed, found) for seed in values}, "values": values, "failed": failed})
    for entry, p in zip(entries, holm([entry["p"] for entry in entries])):
        entry["p_holm"] = float(p)
    return entries


def show(entry, value):
    return "-" if math.isnan(value) else f"{value:.1%}" if entry["metric"] == "accuracy" else f"{value:.4f}"


def show_p(p):
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def gate(entry):
    """How many of a cell's warm-ups were learned: "2/3 learned", or nothing where that is not asked."""
    verdicts = [verdict for verdict in entry["learned"].values() if verdict is not None]
    return f"{sum(verdicts)}/{len(verdicts)}" if verdicts else ""


def table_lines(name, entries):
    """The table of an experiment in Markdown, which reads well in a terminal too."""
    lines = []
    for column in dict.fromkeys(entry["column"] for entry in entries):
        here = [entry for entry in entries if entry["column"] == column]
        if not any(e["n"] or e["failed"] for e in here):
            lines += ["", f"{column}: no result yet"]
            continue
        width = max(len(e["row"]) for e in [*here, {"row": column}])
        lines += ["", f"| {column:{width}} | {here[0]['metric']:17} | n | gain              | p (Holm) | learned | warm-up |",
                  f"|{'-' * (width + 2)}|-------------------|---|-------------------|----------|---------|---------|"]
        for e in (e for e in here if e["n"]):
            gain = f"{show(e, e['gain']):>7} ± {show(e, e['gain_half'])}" if e["pairs"] else ""
            share = f"{e['procedural']:.3g}" if e["procedural"] > 0 else ""
            lines.append(f"| {e['row']:{width}} | {show(e, e['mean']):>7} ± {show(e, e['half']):7} | {e['n']} | {gain:17} | "
                         f"{show_p(e['p_holm']):8} | {gate(e):7} | {share:7} |")
        if missing := [e["row"] for e in here if not e["n"]]:  # not run yet, or failed
            lines += ["", f"no result yet: {'; '.join(missing)}"]
    return lines + [f"failed: {e['row']} | {e['column']} | seed {seed}: {why}" for e in entries for seed, why in e["failed"]]


def best(entries):
    """The entry with the best mean, of those that have one."""
    entries = [e for e in entries if e["n"]]
    return max(entries, key=lambda e: e["mean"] if e["metric"] == "accuracy" else -e["mean"]) if entries else None


def shares(entries, line):
    """{seed: the share of the text with which a warm-up reaches the loss of no warm-up with all of it}.

    From all of the text downwards, as long as the loss stays at or below that one; between the last run that does and the
    first that does not, straight in the logarithm of the share. inf where all of the text does not do; the smallest share
    that was run where all do (an upper bound)."""
    runs = sorted((e for e in entries if e["line"] == line and e["n"]), key=lambda e: -e["x"])
    target, found = next((e["values"] for e in entries if e["line"] == "none" and e["x"] == 1), {}), {}
    for seed in set(target).intersection(*(e["values"] for e in runs)) if runs and runs[0]["x"] == 1 else ():
        points = [(math.log(e["x"]), e["values"][seed]) for e in runs]
        missed = next((i for i, (_, loss) in enumerate(points) if loss > target[seed]), None)
        if missed is None or missed == 0:
            found[seed] = math.inf if missed == 0 else math.exp(points[-1][0])
        else:
            (x, loss), (lower, higher) = points[missed - 1], points[missed]
            found[seed] = math.exp(x + (lower - x) * (target[seed] - loss) / (higher - loss))
    return found


def verdict_lines(name, entries):
    """What an experiment's table says beyond its rows."""
    lines = []
    for column in dict.fromkeys(entry["column"] for entry in entries):
        here = [entry for entry in entries if entry["column"] == column]
        if name == "grid":
            lines += best_against_best(here)
        elif name == "embeddings":
            lines += needle_lines(here)
        elif name == "controls" and len(here[0]["values"]) > 1:
            lucky = (max if here[0]["metric"] == "accuracy" else min)(here[0]["values"].values())
            means = [f"{show(e, e['mean'])} ({e['row']})" for e in here if e["n"] and not e["row"].startswith("none")]
            lines.append(f"{column}: the best of {here[0]['n']} seeds of no warm-up has {show(here[0], lucky)}; the means are "
                         + ", ".join(means))
        elif name == "efficiency":
            if here[0]["n"]:
                lines.append(f"{column}: at the first evaluation, after a fifth of the text, the loss is " + ", ".join(
                    f"{e['early']:.3f} ({e['line']})" for e in here if e["x"] == 1 and e["n"]))
            for line in list(dict.fromkeys(e["line"] for e in here))[1:]:
                found = [shares(here, line)[seed] for seed in sorted(shares(here, line))]
                reached, (mean, half) = [s for s in found if s < math.inf], interval([s for s in found if s < math.inf])
                if found and sum(e["n"] > 0 for e in here if e["line"] == line) > 1:
                    lines.append(f"{column}: {line} reaches the loss of no warm-up with " + (
                        f"{mean:.0%}" + f" ± {half:.0%}" * (half == half) + " of the text in "
                        f"{len(reached)} of {len(found)} seeds" if reached else
                        f"no less than all of the text in any of {len(found)} seeds"))
        elif name == "length":
            for line in list(dict.fromkeys(e["line"] for e in here))[1:]:
                if top := best([e for e in here if e["line"] == line]):
                    lines.append(f"{column}: the best length of {line} is {top['x']:g} steps ({show(top, top['mean'])})")
    return lines


def needle_lines(entries):
    """How many seeds found the needle, starts by warm-ups, in Markdown: a mean hides that each seed does or does not."""
    found = {}
    for e in (e for e in entries if e["n"] and e["row"] != "none"):
        warmup, _, start = e["row"].partition(", ")
        found.setdefault(start, {})[warmup] = f"{sum(value > 0.9 for value in e['values'].values())} of {e['n']}"
    if not found:
        return []
    warmups = list(dict.fromkeys(warmup for cells in found.values() for warmup in cells))
    return ["", f"| seeds with more than 90 % right | {' | '.join(warmups)} |", "|---" * (len(warmups) + 1) + "|",
            *(f"| {start} | {' | '.join(cells.get(warmup, '-') for warmup in warmups)} |" for start, cells in found.items())]


def best_against_best(entries):
    none, warm = (best([e for e in entries if e["row"].startswith("none") == which]) for which in (True, False))
    if not none or not warm:
        return []
    gains = [none["values"][seed] - warm["values"][seed] for seed in sorted(set(none["values"]) & set(warm["values"]))]
    mean, half = interval(gains)
    return [f"{none['column']}: the best of no warm-up ({none['row']}: {none['mean']:.4f}) against the best with one "
            f"({warm['row']}: {warm['mean']:.4f}): gain {mean:.4f} ± {half:.4f}, paired by seed, n = {len(gains)}, "
            f"warm-ups learned: {gate(warm) or 'no gate'}"]


def draw_comparison(name, entries, path):
    """The figure of what an experiment has: a heat map of `table`, lines where cells differ in x, else points."""
    compared = {e["column"] for e in entries if e["pairs"]}  # a baseline alone is no picture
    entries = [e for e in entries if e["n"] and (e["column"] in compared or not compared)]
    rows, columns = (list(dict.fromkeys(entry[key] for entry in entries)) for key in ("row", "column"))
    n, lines = max(e["n"] for e in entries), name in XLABELS and len({e["x"] for e in entries if e["line"]}) > 1
    size = ((3 + 1.5 * len(columns), 1.5 + 0.42 * len(rows)) if name == "table" else (4 * len(columns) + 1, 3.6) if lines else
            (2.6 + 2.8 * len(columns), 1.4 + 0.32 * len(rows)))
    figure, axes = pyplot().subplots(1, 1 if name == "table" else len(columns), figsize=size, squeeze=False,
                                     layout="constrained", sharey=not lines)
    if name == "table":
        figure.colorbar(draw_heat_map(axes[0, 0], entries, rows, columns), label="gain over none (points)")
        axes[0, 0].set_title(f"accuracy after each warm-up, mean of up to {n} seeds (*: p < 0.05 after Holm)", fontsize=10)
        return keep_figure(figure, path)
    drawn = list(dict.fromkeys(e["line"] for e in entries if e["line"]))
    for axis, column in zip(axes[0], columns):
        here = [e for e in entries if e["column"] == column]
        value = "held-out loss (nats per token)" if here[0]["metric"] == "loss" else "accuracy"
        axis.set_title(column, fontsize=10)
        axis.grid(alpha=0.3)
        if lines:
            draw_lines(axis, here, drawn, log=name in ("length", "grid"))
            axis.set(xlabel=XLABELS[name], ylabel=value)
        else:
            draw_points(axis, here, rows)
            axis.set(xlabel=value)
    figure.supxlabel(f"{name}: mean and 95 % interval over up to {n} seeds" if lines else f"{name}: up to {n} seeds, in black "
                     "their mean, of a loss with its 95 % interval; dotted: none", fontsize=8)
    keep_figure(figure, path)


def draw_heat_map(axis, entries, rows, columns):
    gains = np.full((len(rows), len(columns)), math.nan)
    for e in entries:
        gains[rows.index(e["row"]), columns.index(e["column"])] = e["gain"] * 100 if e["pairs"] else 0.0
    limit = np.nanmax(np.abs(gains)) or 1
    for e in entries:
        i, j = rows.index(e["row"]), columns.index(e["column"])
        axis.text(j, i, show(e, e["mean"]) + "*" * bool(e["p_holm"] < 0.05), ha="center", va="center", fontsize=9,
                  color="white" if abs(gains[i, j]) > 0.6 * limit else "black")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    return axis.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")


def half_widths(entries):
    return [0 if math.isnan(e["half"]) else e["half"] for e in entries]


def draw_lines(axis, entries, drawn, log):
    if log:
        axis.set_xscale("log")
    for i, line in enumerate(drawn):  # a little beside each other, in the same colour everywhere
        if some := [e for e in entries if e["line"] == line]:
            shift = 0.006 * (i - (len(drawn) - 1) / 2)
            axis.errorbar([e["x"] * (1 + shift) for e in some], [e["mean"] for e in some], yerr=half_widths(some),
                          marker="osv^D"[i % 5], color=f"C{i}", capsize=3, label=line)
    for e in entries:
        if not e["line"]:
            axis.axhline(e["mean"], linestyle=":" if e["row"] == "none" else "-.", color="grey", label=e["row"])
    axis.legend(fontsize=7)


def draw_points(axis, entries, rows):
    """Seeds as dots, their mean in black, of losses with its 95 % interval: of accuracies, high or low, that says little."""
    task, y = entries[0]["metric"] == "accuracy", [rows.index(e["row"]) for e in entries]
    for e, row in zip(entries, y):
        axis.plot(list(e["values"].values()), [row] * e["n"], "o", color="C0", alpha=0.4, markersize=4)
    axis.errorbar([e["mean"] for e in entries], y, xerr=None if task else half_widths(entries), fmt="|" if task else "o",
                  color="black", markersize=12 if task else 5, capsize=3)
    if entries[0]["row"] == rows[0]:
        axis.axvline(entries[0]["mean"], color="grey", linestyle=":")
    if task:
        axis.set_xlim(-0.03, 1.03)
    axis.set_yticks(range(len(rows)), [row.removesuffix(f", {ALL}") for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)


CAPTION = ("Mean ± 95 % interval (Student's t) over n seeds; gain over the first row of the column, paired by seed; p of the "
           "paired t test after Holm's correction over the table; learned: warm-ups that passed the gate of eval.py --probe learned; "
           "warm-up: its tokens for one of training (paper: 0.001 to 0.003).")


def write_comparison(name, budget, entries, folder):
    """Prints the table, and writes it as CSV and as a figure in `folder`."""
    print(f"\n{name} ({budget}): {EXPERIMENTS[name].__doc__.splitlines()[0]}\n{CAPTION}")
    print("\n".join(table_lines(name, entries) + verdict_lines(name, entries)))
    with open(folder / f"{name}-{budget}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in entries[0] if key not in ("values", "failed")], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**entry, "learned": gate(entry)} for entry in entries)
    draw_comparison(name, entries, folder / f"{name}-{budget}.png")
    print(f"table: {folder / name}-{budget}.csv, figure: {folder / name}-{budget}.png")


def chosen(cells, pattern):
    """The cells whose "column | row" a pattern is found in, and what they are compared with: the first of their column."""
    pattern = regular(pattern)
    wanted = lambda cell: pattern.search(f"{cell.column} | {cell.row}")
    columns = {cell.column for cell in cells if wanted(cell)}
    if not columns:
        quoted = lambda names: ", ".join(f'"{name}"' for name in dict.fromkeys(names))
        raise UserError(f"--only \"{pattern.pattern}\" is not found in any \"column | row\" of the columns "
                        f"{quoted(c.column for c in cells)} and the rows {quoted(c.row for c in cells)}")
    first = {cell.column: cell for cell in reversed(cells)}
    return [cell for cell in cells if cell.column in columns and (cell is first[cell.column] or wanted(cell))]


def experiment(name, args):
    cells, results = chosen(EXPERIMENTS[name](args.budget), args.only), Path(args.results)
    if not args.show and results.is_file():
        raise UserError(f"{results} is a file of finished runs, to which none can be added: give --show, or a folder to --results")
    if not args.show:
        args.seeds = args.seeds or 3
        make_folder(results)
        STOPPING.clear()
        run_all(cells, args.seeds, results.resolve(), args.jobs, dict(device=args.device) if args.device else {})
    found = read_results(results)
    entries = compare(cells, args.seeds or seeds_in(found), found)
    if not any(entry["n"] for entry in entries):
        for line in table_lines(name, entries):
            print(line) if line.startswith("failed") else None
        raise UserError(f"no run of {name} is finished in {results}: leave --show out to run them")
    # beside a packed file lie the pictures of all of its results: those of a part go elsewhere
    write_comparison(name, args.budget, entries, make_folder(args.to or (results if results.is_dir() else ".")))


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}") from None
    return Path(path)


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


@dataclass
class Claim:
    """`better` is better than `worse`, and than `than` where that is named, says the paper: patterns of rows in a column of
    an experiment. Where several rows match a pattern, see `judge`."""
    text: str
    published: str  # PAPER.md's figure
    experiment: str
    column: str  # of a task, or 0, 1, 2 for the domains code, language, mathematics, or "largest" (of scale)
    better: str
    worse: str
    than: str = ""


ALL = "100% of the text"
CLAIMS = [
    Claim("Dyck helps recall", "11.3 -> 96.9 %", "table", "haystack", "dyck, .*", "none"),
    Claim("Dyck helps sorting", "82.7 % without", "table", "sorting", "dyck, .*", "none"),
    Claim("rule 110 helps reversed addition", "76.4 -> 91.0 %", "table", "reversed_addition", "eca, .*", "none"),
    Claim("union helps multiplication", "42.7 -> 63.5 %", "table", "multiplication", "union, .*", "none"),
    Claim("identity's attention helps recall", "11.3 -> 99.0 %", "table", "haystack", "identity, attn.*", "none"),
    Claim("set's attention helps recall", "11.3 -> 88.9 %", "table", "haystack", "set, attn.*", "none"),
    *(Claim(f"{warmup}'s attention alone beats the whole model (recall)", published, "embeddings", "haystack",
            f"{warmup}, attn, all fresh", f"{warmup}, full, both at the mean")  # as in the published code
      for warmup, published in (("identity", "18.8 -> 99.0 %"), ("set", "18.9 -> 88.9 %"))),
    *(Claim(f"{warmup}'s attention beats the whole model, where both begin alike", "not published", "embeddings", "haystack",
            f"{warmup}, attn, all fresh but positions", f"{warmup}, full, all fresh but positions")
      for warmup in ("identity", "set")),
    Claim("set, whole model, hurts reversed addition", "76.4 -> 44.6 %", "table", "reversed_addition", "none", "set, full"),
    Claim("stack, whole model, hurts reversed addition", "76.4 -> 34.9 %", "table", "reversed_addition", "none", "stack, full"),
    Claim("Dyck helps recall, and more than shuffled Dyck", "10.3 -> 96.9 %", "controls", "haystack", "dyck", "shuffled:dyck",
          "none"),
    Claim("Dyck helps recall more than other rates, ramps or four times the steps", "not published", "controls", "haystack",
          "dyck", "none, .*", "none"),
    Claim("identity helps recall, and more than shuffled identity", "gain gone", "controls", "haystack", "identity",
          "shuffled:identity", "none"),
    Claim("set helps recall, and more than shuffled set", "gain gone", "controls", "haystack", "set", "shuffled:set", "none"),
    Claim("Dyck helps language, and more than shuffled Dyck", "gain gone", "controls", 1, "dyck", "shuffled:dyck", "none"),
    Claim("attention of set with MLPs of rule 110 helps recall", "11.3 -> 94.4 %", "mix", "haystack",
          "attention of set, MLPs of eca.*", "none"),
    Claim("attention of set with MLPs of rule 110 helps recall more than either alone", "88.9 -> 94.4 %", "mix", "haystack",
          "attention of set, MLPs of eca.*", "(set|eca), (attn|mlp|full).*", "none"),
    Claim("after set, code is learned better", "perplexity 5.47 -> 5.15", "efficiency", 0, f"set, {ALL}", f"none, {ALL}"),
    Claim("after union, code is learned better", "perplexity 5.47 -> 5.13", "efficiency", 0, f"union, {ALL}", f"none, {ALL}"),
    Claim("after set, language is learned better", "perplexity 62.0 -> 59.9", "efficiency", 1, f"set, {ALL}", f"none, {ALL}"),
    Claim("after union, language is learned better", "perplexity 62.0 -> 59.9", "efficiency", 1, f"union, {ALL}", f"none, {ALL}"),
    Claim("after sort, language is learned better", "perplexity 62.0 -> 58.8", "efficiency", 1, f"sort, {ALL}", f"none, {ALL}"),
    Claim("after set, mathematics is learned better", "41.2 -> 42.5 % solved", "efficiency", 2, f"set, {ALL}", f"none, {ALL}"),
    Claim("after union, mathematics is learned better", "41.2 -> 42.7 % solved", "efficiency", 2, f"union, {ALL}",
          f"none, {ALL}"),
    Claim("union with 85 % of the code beats none with all", "67 % are enough", "efficiency", 0, "union, 85% .*", f"none, {ALL}"),
    Claim("union with 85 % of the language beats none with all", "55 % are enough", "efficiency", 1, "union, 85% .*",
          f"none, {ALL}"),
    Claim("union with 85 % of the mathematics beats none with all", "86 % are enough", "efficiency", 2, "union, 85% .*",
          f"none, {ALL}"),
    Claim("four times as long a warm-up is worse (language)", "2-4 M tokens beat 16-20 M (union)", "length", 1, "set, 1000 steps",
          "set, 4000 steps"),
    Claim("a warm-up beats the same tokens of text (critics: no)", "worse, Pythia-410M", "controls", 1, "dyck", "text"),
    Claim("a warm-up beats none with a learning-rate ramp", "open", "controls", 1, "dyck", "none, ramp of .*", "none"),
    Claim("set helps code, and more than its weights shuffled", "gain gone", "weights", 0, "as it is", "shuffled", "none"),
    Claim("set's attention helps recall, and more than its weights shuffled", "gain gone", "weights", "haystack", "as it is",
          "shuffled", "none"),
    Claim("set's attention helps recall more than a penalty on entropy", "not reproduced by it", "sharpen", "haystack", "warm-up",
          "none, penalty .*", "none"),
    Claim("the sharpest heads help recall, and more than the most blurred", "low entropy", "heads", "haystack", "only sharp",
          "only blurred", "none"),
    Claim("without the sharpest heads less is left than without the most blurred", "low entropy", "heads", "haystack",
          "without blurred", "without sharp", "none"),
    Claim("code: attention helps, and more than MLPs", "attention", "transfer", 0, "set, attn", "set, mlp", "none"),
    Claim("language: MLPs help, and more than attention", "MLPs", "transfer", 1, "set, mlp", "set, attn", "none"),
    Claim("set and union mixed beat either alone (language)", "50.8, 52.0 -> 49.6", "mix", 1, "0.5 set, .*", "(0|1) set, .*",
          "none"),
    *(Claim(f"a warm-up helps {domain}, whose baseline is well tuned", "not published", "tuned", i,
            "(set|union|sort|dyck|dyck_shuffle|eca)", "none") for i, domain in enumerate(("code", "language", "mathematics"))),
    Claim("best against best, a warm-up wins (language)", "not published", "grid", 1, "set, lr.*", "none, lr.*"),
    Claim("union helps at the largest size too (language)", "40.3 -> 39.0, 28.8 -> 27.3", "scale", "largest", "union", "none")]


def learned(entry):
    """{seed: value} of the runs whose warm-up was learned, or that need none."""
    return {seed: value for seed, value in entry["values"].items() if entry["learned"][seed] is not False}


def stand_in(entries, pattern, counted):
    """The row that stands for a pattern, and how many there are: of those with most seeds that count, the best on average."""
    rows = [e for e in entries if re.fullmatch(pattern, e["row"]) and counted(e)]
    most = max((len(counted(e)) for e in rows), default=0)
    mean = lambda e: np.mean(list(counted(e).values())) * (1 if e["metric"] == "accuracy" else -1)
    return max((e for e in rows if len(counted(e)) == most), key=mean, default=None), len(rows)


def judge(claim, entries, budget):
    """One row of `claims`: what was measured, the pairs that count, p. Runs whose warm-up was not learned do not count.
    Where no seed of a row has learned its warm-up, all seeds of all rows do, and "unlearned" says so: a gain is one all the
    same, but what was not learned cannot speak against the paper.

    Where one of several rows stands for `better`, p is multiplied by how many they were (Bonferroni). All rows that match
    `worse`, and `than`, have to be beaten: the hardest to beat is shown."""
    columns = list(dict.fromkeys(e["column"] for e in entries))
    if claim.column == "largest":
        column = columns[-1]
    elif isinstance(claim.column, int):
        column = DOMAINS[budget][claim.column]
    else:
        column = next((column for column in columns if column.partition(":")[0] == claim.column), None)
    here = [e for e in entries if e["column"] == column]
    if not all(any(re.fullmatch(p, e["row"]) for e in here) for p in (claim.better, claim.worse, claim.than) if p):
        column = None  # this budget does not have it
    nothing = {"measured": "", "n": 0, "p": math.nan, "gain": math.nan, "unlearned": False, "column": column}
    patterns = [pattern for pattern in (claim.worse, claim.than) if pattern]
    for counted in (learned, lambda entry: entry["values"]):
        better, candidates = stand_in(here, claim.better, counted)
        others = [[e for e in here if re.fullmatch(pattern, e["row"]) and counted(e)] for pattern in patterns]
        if better and all(others):
            break
    else:
        return {**nothing, "why": "not run"}
    unlearned = counted is not learned
    tests, sign = [], 1 if better["metric"] == "accuracy" else -1
    for other in (other for some in others for other in some):
        a, b = counted(other), counted(better)
        pairs = sorted(set(a) & set(b))
        if not pairs:
            return {**nothing, "why": "no seed in common"}
        gains = [(b[seed] - a[seed]) * sign for seed in pairs]
        p = float(np.minimum(1.0, paired_p(gains, [0.0] * len(gains)) * candidates))
        tests.append({"n": len(pairs), "gain": float(np.mean(gains)), "half": interval(gains)[1], "p": p,
                      "a": np.mean([a[seed] for seed in pairs]), "b": np.mean([b[seed] for seed in pairs]),
                      "why": "one seed" if len(pairs) == 1 else "warm-up not learned" * unlearned,
                      "against": other["row"] if claim.than or other["row"] != claim.worse else ""})
    # All comparisons have to hold: the weakest of those that do not, or of those that do, speaks for them.
    losing = [test for test in tests if not test["gain"] > 0]
    p_of = lambda test: math.inf if math.isnan(test["p"]) else test["p"]
    test = min(losing, key=p_of) if losing else max(tests, key=p_of)
    harm = claim.better == "none"  # shown as published: from none to the warm-up
    a, b, gain = (test["b"], test["a"], -test["gain"]) if harm else (test["a"], test["b"], test["gain"])
    measured = f"{show(better, a)} -> {show(better, b)}, gain {show(better, gain)} ± {show(better, test['half'])}"
    named = [f"chosen of {candidates} rows: " * (candidates > 1) + better["row"]] * (better["row"] != claim.better)
    named += [f"against {test['against']}"] if test["against"] else []
    measured += f" ({'; '.join(named)})" * bool(named)
    if claim.experiment == "efficiency" and (found := shares(here, better["line"])):
        reached = [share for share in found.values() if share < math.inf]
        measured += f"; {np.mean(reached):.0%} are enough" if reached else "; all of the text is not enough"
        measured += f" in {len(reached) or len(found)} of {len(found)} seeds"
    return {**nothing, "measured": measured, "unlearned": unlearned, **{key: test[key] for key in ("n", "p", "gain", "why")}}


def claims(found, seeds, budgets=("quick", "paper")):
    """Every claim of PAPER.md against what there is: [{claim, budget, measured, n, gain, p, p_holm, verdict}].

    The paired t test over seeds, two-sided, with Holm's correction over all claims of a budget, run or not: supported or
    contradicted below 0.05, by the sign; else undecided. See `judge` for what counts."""
    rows = []
    for budget in budgets:
        entries = {name: compare(make(budget), seeds, found) for name, make in EXPERIMENTS.items()}
        if any(e["pairs"] for table in entries.values() for e in table):
            here = [{"claim": claim, "budget": budget, **judge(claim, entries[claim.experiment], budget)} for claim in CLAIMS]
            for row, p in zip(here, holm([1.0 if math.isnan(row["p"]) else row["p"] for row in here])):
                row["p_holm"] = float(p) if row["p"] == row["p"] else math.nan
                row["verdict"] = "undecided" if not row["p_holm"] < 0.05 else "supported" if row["gain"] > 0 else (
                    "undecided: worse" if row["unlearned"] else "contradicted")
                row["verdict"] += f" ({row['why']})" * bool(row["why"])
            rows += here
    return sorted(rows, key=lambda row: not row["n"])  # what was not run comes last


def claims_lines(rows):
    verdicts = [row["verdict"].partition(" (")[0].partition(":")[0] for row in rows]
    budgets = {row["budget"] for row in rows}
    lines = [f"{len(CLAIMS)} claims{' at two budgets' * (len(budgets) > 1)}: "
             + ", ".join(f"{verdicts.count(v)} {v}" for v in ("supported", "contradicted", "undecided"))
             + f" ({sum(not row['n'] for row in rows)} of these not run).", "",
             "| claim | published | measured here | n | p (Holm) | verdict | python analyze.py |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        column = row["column"] or str(row["claim"].column)  # the quick budget does not have everything
        command = row["claim"].experiment + " --budget paper" * (row["budget"] == "paper" or not row["column"])
        command += f" --only {column.partition(':')[0]}"
        lines.append(f"| {row['claim'].text} | {row['claim'].published} | {row['measured']} | {row['n']} | "
                     f"{show_p(row['p_holm'])} | {row['verdict']} | `{command}` |")
    return lines + ["", "Measured: accuracy on tasks, held-out loss in nats per token on text; gain: the mean of the pairs with "
                    "its 95 % interval, of the weaker comparison where there are two. The paired t test over seeds, Holm's "
                    "correction over all claims. Where several rows may speak for a claim, the one with most seeds does, then "
                    "the best, and p is multiplied by their number; of several to beat, the hardest is shown. Runs whose warm-up "
                    "was not learned do not count, unless none was: that can support a claim, but not contradict it. Quick runs "
                    "are far smaller than the published ones: tiny models, and on text more tokens of warm-up than of text, "
                    "where the paper has 0.001 to 0.003 for one."]


def seeds_in(found):
    """How many seeds there are, counted from 0: all that were run, but for the second half of `controls`."""
    seeds = [record["result"]["settings"]["seed"] for record in found.values()
             if "result" in record and record["result"]["settings"].get("steps") and record["result"]["tokens"]["procedural"]]
    return max(seeds, default=0) + 1


SECONDS = {"task": 60, "text": 60, "warmup": 150}  # of a run at the quick budget, on one core of a busy server (measured)


def minutes(name, seeds):
    """(runs, minutes on one core) that the quick budget of an experiment takes."""
    runs = runs_of(EXPERIMENTS[name]("quick"), seeds)
    warmups = {name for cell, seed in runs.values() for name in warmups_of(cell, seed)}
    seconds = 0
    for cell, _ in runs.values():
        kind, usual = ("task", TASK) if kind_of(cell.settings["data"]) == "task" else ("text", TEXT)
        seconds += SECONDS[kind] * cell.settings["steps"] / usual["quick"]["steps"]
    return len(runs) + len(warmups), (seconds + len(warmups) * SECONDS["warmup"]) / 60


def print_claims(args):
    found = read_results(args.results)
    rows = claims(found, args.seeds or seeds_in(found))
    if not rows:
        args.seeds = args.seeds or 3
        print(f"There are no results in {args.results} yet. To run, in this order (quick budget, {args.seeds} seeds; minutes with "
              "one job on one core, all warm-ups new):")
        for name in EXPERIMENTS:
            runs, time_needed = minutes(name, args.seeds)
            print(f"  python analyze.py {name} --seeds {args.seeds} --jobs 2   {runs:4} runs, {time_needed:4.0f} minutes: "
                  f"{EXPERIMENTS[name].__doc__.splitlines()[0]}")
        return
    print("\n".join(claims_lines(rows)))


def report(args):
    """One Markdown file with the claims, and the table and figure of each experiment that has results."""
    found, folder = read_results(args.results), Path(args.results)
    folder, seeds = make_folder(args.to or (folder if folder.is_dir() else folder.parent)), args.seeds or seeds_in(found)
    lines, names = ["# What reproduces", "", *claims_lines(claims(found, seeds)), "", CAPTION], []
    for budget in ("quick", "paper"):
        for name, make in EXPERIMENTS.items():
            entries = compare(make(budget), seeds, found)
            if any(entry["pairs"] for entry in entries):
                draw_comparison(name, entries, folder / f"{name}-{budget}.png")
                names.append(name)
                lines += ["", f"## {name} ({budget})", "", make.__doc__.splitlines()[0], *table_lines(name, entries), "",
                          *[f"{line}  " for line in verdict_lines(name, entries)], "", f"![{name}]({name}-{budget}.png)"]
        cells = chosen(table(budget), rf"{TASKS[budget][0]} \| .*attn, fresh")
        runs = [(name, found[name]["result"]["settings"], found[name]["log"]) for name in runs_of(cells, seeds)
                if found.get(name, {}).get("log")]
        if len(runs) > 1:
            curves(runs, folder / f"recall-{budget}.png", None, found)
            lines += ["", f"## recall by tokens of training ({budget})", "", f"![recall](recall-{budget}.png)"]
    if not names:
        raise UserError(f"there are no results in {args.results}: python analyze.py claims says what to run")
    write_atomically(folder / "report.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print(f"{folder / 'report.md'}: {', '.join(names)}")


def main():
    parser = Parser(description="What many runs say.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawer = commands.add_parser("curves", help="held-out loss or accuracy against tokens; the seeds of a setting are one line")
    drawer.add_argument("runs", nargs="+", help="folders that train.py wrote, or with --results patterns of names of runs")
    drawer.add_argument("--results", help="folder of many runs, or the file that pack made of one")
    drawer.add_argument("--picture", default="curves.png", help="where to draw (default curves.png)")
    drawer.add_argument("--metric", choices=("loss", "accuracy"), help="default: accuracy for tasks, loss for text")
    for name, function in EXPERIMENTS.items():
        runner = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        runner.add_argument("--budget", choices=("quick", "paper"), default="quick", help="quick: small and honest, for two "
                            "CPU cores; paper: the published settings (default quick)")
        runner.add_argument("--only", default="", metavar="PATTERN", help="the part whose \"column | row\" it is found in, such as "
                            "'haystack.*set' (a regular expression), and what that is compared with")
        runner.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
        runner.add_argument("--show", action="store_true", help="run nothing: the table of what is finished")
        runner.add_argument("--device", help="cuda, mps or cpu (default: what is there)")
    commands.add_parser("claims", help="one row for each claim of the paper: supported, contradicted or undecided here")
    commands.add_parser("report", help="all tables and figures so far in one Markdown file")
    packer = commands.add_parser("pack", help="all results of a folder in one small file, which --results reads too")
    packer.add_argument("to", help="the file to write, such as results.jsonl.gz")
    for name, command in commands.choices.items():
        if name != "curves":
            command.add_argument("--results", default="results", help="folder of the runs, or a packed file (default results)")
        if name not in ("curves", "pack"):
            fixed = name in EXPERIMENTS
            command.add_argument("--seeds", type=int, help="runs of each cell (default 3; with --show all there are)" if fixed
                                 else "how many of the seeds count (default: all that were run)")
        if name not in ("curves", "pack", "claims"):
            command.add_argument("--to", help="folder for tables and figures (default: among the runs; of a "
                                 "packed file the current one, or for report the file's)")
    args = parser.parse_args()
    if args.command == "curves":
        found = read_results(args.results) if args.results else {}
        runs = runs_named(args.runs, found) if args.results else [(folder, *read_run(folder)) for folder in args.runs]
        curves(runs, args.picture, args.metric, found)
        print_runs(runs, found)
        return print(f"picture: {args.picture}")
    if args.command == "pack":
        return pack(args.results, args.to)
    if min(1 if args.seeds is None else args.seeds, getattr(args, "jobs", 1)) < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    if args.command in EXPERIMENTS:
        return experiment(args.command, args)
    print_claims(args) if args.command == "claims" else report(args)


if __name__ == "__main__":
    run_main(main)
