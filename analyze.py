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
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import Parser, UserError, kind_of, run_main
from eval import Opened, entropy_score
from model import GPT, load, part_of, save
from train import Settings, clock, read_json, run_name


def read_run(folder):
    """A run's folder -> (its settings, the log entries of its training stage that hold an evaluation)."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        points = [e for e in entries if e["stage"] == "train" and "val_loss" in e]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / 'log.jsonl'}: {error}") from None
    if not points:
        raise UserError(f"{folder} has no evaluation of its training stage yet")
    return read_json(folder / "config.json", "settings")["settings"], points


def curves(folders, picture):
    """Held-out loss against the training stage's tokens, one line per run; prints the table of last values too."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(f"a picture needs matplotlib: {error}") from None
    runs = [(folder, *read_run(folder)) for folder in folders]
    if len(data := {settings["data"] for _, settings, _ in runs}) > 1:
        raise UserError(f"these runs are on different data, so their losses do not compare: {', '.join(sorted(data))}")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    print(f"{'run':32} {'warm-up':24} {'seed':>4} {'tokens':>14} {'held-out loss':>13} {'accuracy':>9}")
    for i, (folder, settings, points) in enumerate(runs):
        last, warmup = points[-1], settings["init"] or settings["warmup"]
        if warmup != "none" and settings["transfer"] != "full":
            warmup += f" ({settings['transfer']})"
        print(f"{str(folder):32} {warmup:24} {settings['seed']:4} {last['tokens']:14,} {last['val_loss']:13.4f} "
              f"{last['val_accuracy']:9.2%}")
        later = [p for p in points if p["step"]]  # the untrained model's loss would flatten the picture
        axes.plot([p["tokens"] for p in later], [p["val_loss"] for p in later], marker="osv^D"[i % 5],
                  linestyle=("-", "--", ":", "-.")[i % 4], label=f"warm-up {warmup}, seed {settings['seed']}")
    axes.set(xlabel="tokens of training after the warm-up", ylabel="held-out loss (nats per counted token)",
             title=f"{data.pop()}: {len(runs)} run{'s' * (len(runs) > 1)}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(picture, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {picture}: {error}") from None
    print(f"picture: {picture}")


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
    """Two-sided p of the paired t test that a and b have the same mean; nan with fewer than two pairs."""
    d = np.asarray(a, float) - np.asarray(b, float)
    if len(d) < 2:
        return math.nan
    spread = d.std(ddof=1) / math.sqrt(len(d))
    return t_tail(d.mean() / spread, len(d) - 1) if spread else float(d.mean() == 0)


def holm(ps):
    """Holm's step-down correction; nan stays nan and does not count."""
    ps, corrected, worst = np.asarray(ps, float), np.full(len(ps), math.nan), 0.0
    order = [i for i in np.argsort(ps) if not math.isnan(ps[i])]
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, ps[i] * (len(order) - rank)))
        corrected[i] = worst
    return corrected


# ----------------------------------------------------------------------------------------------------------------------
# Experiments: lists of cells. The first row is what the others are compared with.


@dataclass
class Cell:
    row: str
    column: str
    settings: dict  # of train.py, but for the seed
    operation: str = ""  # what is done to the warm-up's weights before they are taken up, see `operate`


TASKS = {"quick": ("haystack:pairs=8", "addition:digits=3", "reversed_addition:digits=4", "sorting:numbers=8"),
         "paper": ("haystack", "addition", "reversed_addition", "multiplication", "sorting")}
WARMUPS = {"quick": ("none", "dyck:k=4,length=24", "set:length=8,vocab=30", "union:length=8,vocab=30", "eca:width=6,length=24"),
           "paper": ("none", "dyck", "dyck_shuffle", "identity", "reverse", "sort", "set", "union", "delete", "stack", "eca")}
TASK = {"quick": dict(size="2_4_32", steps=1500, batch_size=128, lr=3e-3, lr_ramp=100, eval_batches=16, warmup_steps=1500,
                      warmup_lr=3e-3), "paper": {}}
TEXT = {"quick": dict(data="code", steps=800, warmup_steps=300), "paper": dict(preset="c4")}


def table(budget):
    """Which warm-up helps which task."""
    return [Cell(warmup, task, {**TASK[budget], "data": task, "warmup": warmup})
            for task in TASKS[budget] for warmup in WARMUPS[budget]]


def transfer(budget):
    """What has to move over: the whole model, attention, MLPs or norms, for tasks and for text."""
    cells = []
    for column in (*TASKS[budget][:2], "text"):
        settings = TEXT[budget] if column == "text" else {**TASK[budget], "data": column}
        cells.append(Cell("none", column, {**settings, "warmup": "none"}))
        for warmup in ("dyck", "set") if column == "text" or budget == "paper" else WARMUPS[budget][1:3]:
            cells += [Cell(f"{warmup.split(':')[0]}, {parts}", column, {**settings, "warmup": warmup, "transfer": parts})
                      for parts in ("full", "attn", "mlp", "norm")]
    return cells


def controls(budget):
    """The critics' controls on text: shuffled sequences, the same tokens of text, a ramp for the baseline."""
    rows = {"none": dict(warmup="none"), "none, no ramp": dict(warmup="none", lr_ramp=0),
            "none, ramp of a tenth": dict(warmup="none", lr_ramp=TEXT[budget].get("steps", 10_000) // 10),
            "text": dict(warmup="text"), "dyck": dict(warmup="dyck"), "set": dict(warmup="set"),
            "shuffled dyck": dict(warmup="shuffled:dyck" if budget == "paper" else "shuffled:dyck:length=128"),
            "shuffled set": dict(warmup="shuffled:set")}
    return [Cell(row, "text", {**TEXT[budget], **changes}) for row, changes in rows.items()]


def length(budget):
    """How much warm-up is best, and where more becomes worse."""
    steps = (75, 150, 300, 600, 1200) if budget == "quick" else (125, 250, 500, 1000, 2000, 4000)
    none = Cell("none", "text", {**TEXT[budget], "warmup": "none"})
    return [none] + [Cell(f"{warmup}, {n} steps", "text", {**TEXT[budget], "warmup": warmup, "warmup_steps": n})
                     for warmup in ("dyck", "set") for n in steps]


def mix(budget):
    """Data mixtures of set and union over their proportions."""
    ending = ":length=64" if budget == "paper" else ":length=20"
    return [Cell("none", "text", {**TEXT[budget], "warmup": "none"})] + [
        Cell(f"{share:g} set, {1 - share:g} union", "text", {**TEXT[budget], "warmup": (
            f"{share}*set+{1 - share}*union" if 0 < share < 1 else "set" if share else "union") + ending})
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def grid(budget):
    """Learning rate by weight decay, for none and for a warm-up: is the gain more than a mistuned baseline?"""
    rates = (5e-4, 1e-3, 2e-3, 4e-3) if budget == "quick" else (2.5e-4, 5e-4, 1e-3, 2e-3)
    return [Cell(f"{warmup}, lr {lr:g}, weight decay {decay:g}", "text",
                 {**TEXT[budget], "warmup": warmup, "lr": lr, "weight_decay": decay})
            for warmup in ("none", "set") for lr in rates for decay in (0.0, 0.1)]


def scale(budget):
    """The gain over model sizes: one column for each."""
    sizes = ("2_4_64", "4_4_128", "4_4_192") if budget == "quick" else ("gpt2", "24_16_1024", "1.3b")
    return [Cell(warmup, size, {**TEXT[budget], "warmup": warmup, "size": size})
            for size in sizes for warmup in ("none", "dyck", "set", "union")]


def operated(budget, operations):
    """Cells: none, a warm-up as it is, and the same warm-up after each operation; for text and for a task."""
    task = TASKS[budget][0]
    columns = {"text": {**TEXT[budget], "warmup": "set"},
               task: {**TASK[budget], "data": task, "warmup": WARMUPS[budget][2] if budget == "quick" else "set"}}
    return [cell for column, settings in columns.items() for cell in (
        Cell("none", column, {**settings, "warmup": "none"}), Cell("set, as it is", column, settings),
        *(Cell(f"set, {operation}", column, settings, operation) for operation in operations))]


def weights(budget):
    """Is it the values or the scale: the warm-up's weights shuffled, with noise, scaled, drawn afresh."""
    return operated(budget, ("shuffled", "redrawn", "noise 0.3", "noise 1", "scaled 0.5", "scaled 2"))


def heads(budget):
    """Which heads carry it: a quarter of them alone, or all but a quarter, by how sharply they attend."""
    return operated(budget, [f"{what} {which}" for what in ("only", "without") for which in ("sharp", "blurred", "random")])


EXPERIMENTS = {f.__name__: f for f in (table, transfer, controls, length, mix, grid, scale, weights, heads)}


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
    """Writes the operated copy of a warm-up's checkpoint, which --init takes up."""
    sharpness = None
    if operation.startswith(("only", "without")):
        c = Opened(str(warmup), SimpleNamespace(device="cpu", batch_size=16, batches=1, problems=0, sample=0, data=None,
                                                tokenizer=None))
        x = c.rows(16)[0]
        sharpness = entropy_score(c.look_inside(x)[0], c.real(x))
    model, state = load(warmup)
    operate(model, operation, seed, sharpness)
    save(path, model, **{key: state[key] for key in ("stage", "step", "tokens", "source")})


# ----------------------------------------------------------------------------------------------------------------------
# Running them


def folder_of(cell, seed, results):
    """Where a cell's run with a seed is: settings that are the same are the same run, whichever experiment asks."""
    s = Settings(**{**cell.settings, "seed": seed})
    name = run_name(Settings(**{**vars(s), "data": s.data or s.preset}))
    return Path(results) / (name + f"-{cell.operation.replace(' ', '_')}" * bool(cell.operation))


def arguments(settings, seed, folder, more):
    """The command line of one run."""
    words = []
    for key, value in {**settings, **more, "seed": seed, "out": str(folder)}.items():
        words += [f"--{key}", str(value)]
    return [sys.executable, str(Path(__file__).resolve().parent / "train.py"), *words, "--resume"]


def run_once(cell, seed, folder, more):
    """Runs or resumes one run, unless it is finished or another process is at it -> "done", "failed" or "elsewhere"."""
    if (folder / "result.json").exists():
        return "done"
    folder.parent.mkdir(parents=True, exist_ok=True)
    failed = folder.with_name(folder.name + ".failed")
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return "elsewhere"
        if (folder / "result.json").exists():
            return "done"
        settings, problem = cell.settings, None
        if cell.operation:
            warmup, start = folder_of(Cell("", "", settings), seed, folder.parent) / "warmup.pt", folder.with_name(folder.name + ".init.pt")
            settings = {key: value for key, value in settings.items() if key != "warmup"} | {"init": str(start)}
            try:
                operated_checkpoint(warmup, cell.operation, seed, start)
            except UserError as error:
                problem = str(error)
        if not problem:
            done = subprocess.run(arguments(settings, seed, folder, more), capture_output=True, text=True,
                                  env={"OMP_NUM_THREADS": "1", **os.environ})
            if done.returncode:
                problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if problem:
            failed.write_text(problem + "\n")
            return "failed"
        failed.unlink(missing_ok=True)
        return "done"


def run_all(cells, seeds, results, jobs, more):
    """Every cell with every seed, `jobs` at a time; says after each how many are done and how long it may still take."""
    runs = {}
    for seed in seeds:  # all cells of one seed first: an early look compares like with like
        for cell in cells:
            runs.setdefault(folder_of(cell, seed, results), (cell, seed))
    left = {folder: run for folder, run in runs.items() if not (folder / "result.json").exists()}
    print(f"{len(runs)} runs, {len(runs) - len(left)} done already, {len(left)} to go, {jobs} at a time")
    began, counts = time.time(), {"done": 0, "failed": 0, "elsewhere": 0}

    def one(item):
        folder, (cell, seed) = item
        state = run_once(cell, seed, folder, more)
        counts[state] += 1
        finished = sum(counts.values())
        print(f"[{finished}/{len(left)}] {state}: {cell.row} | {cell.column} | seed {seed}; "
              f"{clock((time.time() - began) / finished * (len(left) - finished))} left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for late in (False, True):  # operations need the warm-up of the run as it is
                list(pool.map(one, [item for item in left.items() if bool(item[1][0].operation) == late]))
        except KeyboardInterrupt:  # the runs got it too: each saves and stops
            pool.shutdown(cancel_futures=True)
            raise
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# What they say


def collect(cells, seeds, results):
    """{(row, column): {seed: result.json}} of what is finished, and the runs that failed: [(row, column, seed, why)]."""
    values, failed = {}, []
    for cell in cells:
        found = values.setdefault((cell.row, cell.column), {})
        for seed in seeds:
            folder = folder_of(cell, seed, results)
            why = folder.with_name(folder.name + ".failed")
            if (folder / "result.json").exists():
                found[seed] = read_json(folder / "result.json", "settings", "val_loss", "val_accuracy")
            elif why.exists():
                failed.append((cell.row, cell.column, seed, why.read_text().strip()))
    return values, failed


def compare(cells, values):
    """[{row, column, metric, n, mean, half, difference, p}]: each cell, and its gain over the column's first row.

    Tasks are measured by accuracy, text by minus the loss, so that more is better in both."""
    out, rows, columns = [], list(dict.fromkeys(c.row for c in cells)), list(dict.fromkeys(c.column for c in cells))
    for column in columns:
        first = next(c for c in cells if c.column == column)
        task = "data" in first.settings and kind_of(first.settings["data"]) == "task"
        measure = (lambda r: r["val_accuracy"]) if task else lambda r: r["val_loss"]
        base = values[first.row, column]
        for row in rows:
            if (row, column) not in values:
                continue
            found = values[row, column]
            both = sorted(set(found) & set(base)) if row != first.row else []
            mean, half = interval([measure(found[seed]) for seed in sorted(found)])
            gain = [(measure(found[s]) - measure(base[s])) * (1 if task else -1) for s in both]
            out.append({"row": row, "column": column, "metric": "accuracy" if task else "loss", "n": len(found), "mean": mean,
                        "half": half, "pairs": len(both), "gain": interval(gain)[0], "gain_half": interval(gain)[1],
                        "p": paired_p(gain, [0.0] * len(gain))})
    for entry, p in zip(out, holm([entry["p"] for entry in out])):
        entry["p_holm"] = float(p)
    return out


def print_comparison(name, entries, failed):
    print(f"\n{name}: {EXPERIMENTS[name].__doc__.splitlines()[0]}")
    print("Mean and 95 % interval over seeds (n); gain over the first row of the column, paired by seed; p after Holm.")
    for column in dict.fromkeys(entry["column"] for entry in entries):
        here = [entry for entry in entries if entry["column"] == column]
        print(f"\n{column} ({here[0]['metric']})")
        for e in here:
            show = "{:.1%}".format if e["metric"] == "accuracy" else "{:.4f}".format
            plain = lambda value: "-" if math.isnan(value) else show(value)
            gain = "" if not e["pairs"] else f"  gain {plain(e['gain']):>8} ± {plain(e['gain_half']):<8}" + (
                "" if math.isnan(e["p_holm"]) else f" p = {e['p_holm']:.3g}")
            print(f"  {e['row']:34} {plain(e['mean']):>8} ± {plain(e['half']):<8} ({e['n']}){gain}")
    for row, column, seed, why in failed:
        print(f"failed: {row} | {column} | seed {seed}: {why}")


def write_comparison(name, entries, folder):
    """The table as CSV, and as a heat map of gains (one column) or of columns, in `folder`."""
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, entries[0].keys())
        writer.writeheader()
        writer.writerows(entries)
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(f"a picture needs matplotlib: {error}") from None
    rows, columns = (list(dict.fromkeys(entry[key] for entry in entries)) for key in ("row", "column"))
    figure, axes = plt.subplots(1, len(columns), figsize=(2.2 + 3.1 * len(columns), 1.2 + 0.34 * len(rows)), squeeze=False,
                                layout="constrained", sharey=True)
    for axis, column in zip(axes[0], columns):
        here = {entry["row"]: entry for entry in entries if entry["column"] == column and not math.isnan(entry["mean"])}
        places = [i for i, row in enumerate(rows) if row in here]
        half = [0 if math.isnan(e["half"]) else e["half"] for e in here.values()]
        axis.errorbar([e["mean"] for e in here.values()], places, xerr=half, fmt="o", color="black", capsize=3)
        if rows[0] in here:
            axis.axvline(here[rows[0]]["mean"], color="grey", linestyle=":")
        metric = next(entry["metric"] for entry in entries if entry["column"] == column)
        axis.set(title=column, xlabel="accuracy" if metric == "accuracy" else "held-out loss (nats per token)")
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(f"{name}: mean and 95 % interval over {max(e['n'] for e in entries)} seeds; dotted: {rows[0]}", fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)
    print(f"table: {folder / name}.csv, figure: {folder / name}.png")


def experiment(name, args):
    cells, seeds = EXPERIMENTS[name](args.budget), range(args.seeds)
    more = dict(device=args.device) if args.device else {}
    results = Path(args.results)
    if not args.show:
        try:
            results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {results}: {error.strerror}") from None
        run_all(cells, seeds, results, args.jobs, more)
    values, failed = collect(cells, seeds, results)
    if not any(values.values()):
        raise UserError(f"no run of {name} is finished in {results}: leave --show out to run them")
    entries = compare(cells, values)
    print_comparison(name, entries, failed)
    write_comparison(name, entries, results)


def main():
    parser = Parser(description="What many runs say.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawer = commands.add_parser("curves", help="held-out loss against tokens, one line per run")
    drawer.add_argument("runs", nargs="+", help="folders that train.py wrote")
    drawer.add_argument("--picture", default="curves.png", help="where to draw (default curves.png)")
    for name, function in EXPERIMENTS.items():
        runner = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        runner.add_argument("--budget", choices=("quick", "paper"), default="quick", help="quick: small and honest, for two "
                            "CPU cores; paper: the published settings (default quick)")
        runner.add_argument("--seeds", type=int, default=3, help="runs of each cell (default 3)")
        runner.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
        runner.add_argument("--results", default="results", help="folder of the runs, the tables and the figures")
        runner.add_argument("--show", action="store_true", help="run nothing: the table of what is finished")
        runner.add_argument("--device", help="cuda, mps or cpu (default: what is there)")
    args = parser.parse_args()
    if args.command == "curves":
        return curves(args.runs, args.picture)
    if min(args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    experiment(args.command, args)


if __name__ == "__main__":
    run_main(main)
