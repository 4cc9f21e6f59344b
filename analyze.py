"""What many runs say.

    python analyze.py curves out/code-dyck-s0 out/code-none-s0    held-out loss by tokens, a picture
    python analyze.py table --seeds 3 --jobs 2                    runs what an experiment lacks
    python analyze.py table --show                                its table and figure; runs nothing
    python analyze.py claims                                      what the paper says, what is found

An experiment is a list of rows, and a row is a command line of train.py, which is run once for each
seed in a folder of its own below --results. The others are compared with the first row of a column.
"""
import contextlib
import dataclasses
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import (RULES, Parser, UserError, kind_of, lock, number, read_json, run_main, write_json,
                  written_whole)
from eval import Opened, entropy_of_heads, keep_figure, probe_learned, pyplot
from model import GPT, load, part_of, save
from train import OPERATIONAL, clock

# --------------------------------------------------------------------------------------------------
# Experiments


@dataclass(frozen=True)
class Row:
    """One setting, which is run with each seed."""
    column: str
    name: str
    train: str          # flags of train.py, but for --seed and --out
    warmup: str = ""    # flags of the warm-up that it takes up: a run of its own, made once
    change: str = ""    # what is done to the weights of the warm-up first, see change_weights
    mlp_from: str = ""  # flags of a second warm-up, whose MLPs are taken with the first's attention

    def folder(self, seed):
        """The same flags are the same run, whichever experiment asks."""
        flags = repr((self.train, self.warmup, self.change, self.mlp_from)).encode()
        return slug(f"{self.column}-{self.name}-{zlib.crc32(flags):08x}-s{seed}")


def slug(text):
    return re.sub(r"[^\w.=+*-]+", "_", text)


def warmup_folder(flags, seed):
    spec = flags.split("--warmup ")[1].split()[0]
    return slug(f"warmup-{spec}-{zlib.crc32(flags.encode()):08x}-s{seed}")


# The quick budget (ours) is for two CPU cores: minutes a run. Its tasks have the published model, a
# quarter of the published rows at twice the rate, and stop once they are solved.
TASK = "--batch_size 250 --lr 2e-3 --eval_every 100 --stop_at 0.9"
TEXT = ("--device cpu --size 4_4_128 --block_size 256 --batch_size 16 --steps 2500 --lr 3e-3 "
        "--lr_ramp 200")
QUICK = {"haystack": f"--data haystack {TASK}",
         "haystack:pairs=15": f"--data haystack:pairs=15 --steps 6000 {TASK}",
         "reversed_addition": f"--data reversed_addition {TASK}",
         "sorting": f"--data sorting {TASK}",
         **{text: f"--data {text} {TEXT}" for text in ("code", "docs", "math")}}
TEXTS = {"quick": ("code", "docs", "math"), "paper": ("codeparrot", "c4", "deepmind_math")}
TASKS = {"quick": ("haystack:pairs=15", "reversed_addition", "sorting"),
         "paper": ("haystack", "addition", "reversed_addition", "multiplication", "sorting")}
# Before tasks a warm-up has the defaults of train.py; before text the published batch and rate, and
# as many tokens as are best in the paper.
BEFORE_TASKS = "--data haystack --warmup_steps 5000"
BEFORE_TEXT = ("--data haystack --size 4_4_128 --warmup_batch_size 64 --warmup_lr 5e-4 "
               "--warmup_lr_schedule constant --warmup_lr_ramp 0 --warmup_dropout 0.1 "
               "--warmup_tokens 4M")
# Two ways to take a warm-up up before tasks are published: the whole model, with embeddings at the
# mean of the warm-up's and positions where it has as many; its attention, and all else fresh.
WHOLE = "--transfer full --embeddings mean --positions fit"
ATTENTION = "--transfer attn --embeddings random --positions random"
OURS = "--transfer attn --embeddings random --positions fit"


def flags_of(column, budget):
    """The flags of a run on a task or a corpus."""
    if budget == "quick":
        return QUICK[column]
    return f"--preset {column}" if column in TEXTS["paper"] else f"--data {column}"


def warmup_of(spec, column, budget):
    """The flags of a warm-up before a task or a corpus. With --steps 0, any data will do."""
    if budget == "paper":
        return f"{flags_of(column, budget)} --warmup {spec} --steps 0"
    if column not in TEXTS["quick"]:
        return f"{BEFORE_TASKS} --warmup {spec} --steps 0"
    if spec == "text":
        return f"{QUICK[column]} --warmup text --warmup_tokens 4M".replace("2500", "0")
    long = spec.removeprefix("shuffled:") in ("identity", "sort", "set", "union")
    return f"{BEFORE_TEXT} --warmup {spec}{':length=64' * long} --steps 0"


def none(column, budget, name="none", more=""):
    return Row(column, name, f"{flags_of(column, budget)} --warmup none {more}".strip())


def warm(column, budget, spec, name=None, how=None, more="", **rest):
    """A row with a warm-up. Text is published with the whole model, and positions fresh."""
    if how is None:
        how = "--positions random" if column in TEXTS[budget] else WHOLE
    if spec == "text":
        how = "--transfer all"
    return Row(column, name or spec, f"{flags_of(column, budget)} {how} {more}".strip(),
               warmup_of(spec, column, budget), **rest)


def table(budget):
    """which warm-up helps which task, moved over in either published way, or in ours"""
    rows = []
    specs = ("dyck", "identity", "set", "eca") if budget == "quick" else RULES
    for task in TASKS[budget]:
        rows.append(none(task, budget))
        for spec, (name, how) in itertools.product(specs, (
                ("whole", WHOLE), ("attention", ATTENTION), ("attention, positions", OURS))):
            rows.append(warm(task, budget, spec, f"{spec}, {name}", how))
    return rows


def transfer(budget):
    """what has to move over: the whole model, attention, MLPs or norms"""
    rows = []
    for column in (TASKS[budget][0], *TEXTS[budget]):
        rows.append(none(column, budget))
        for spec, parts in itertools.product(("set", "dyck"), ("full", "attn", "mlp", "norm")):
            rows.append(warm(column, budget, spec, f"{spec}, {parts}", f"--transfer {parts}"))
    return rows


def embeddings(budget):
    """before recall: where token embeddings and positions begin"""
    task = TASKS[budget][0]
    rows = [none(task, budget)]
    for spec, parts, start, positions in itertools.product(
            ("dyck", "identity", "set"), ("full", "attn"), ("random", "mean"), ("fit", "random")):
        how = f"--transfer {parts} --embeddings {start} --positions {positions}"
        rows.append(warm(task, budget, spec, f"{spec}, {parts}, {start}, {positions}", how))
    return rows


def controls(budget):
    """the critics' controls: shuffled rows, as many tokens of text, a baseline otherwise tuned"""
    rows = []
    for column in (TASKS[budget][0], *TEXTS[budget]):
        text = ["text"] * (column in TEXTS[budget])
        rows.append(none(column, budget))
        rows += [warm(column, budget, spec)
                 for spec in ("dyck", "shuffled:dyck", "set", "shuffled:set", *text)]
        rows += [none(column, budget, f"none, {more}", f"--{more}")
                 for more in ("lr_ramp 0", "lr_ramp 1000", "lr 1e-3", "lr 4e-3", "steps 10000")]
    return rows


def changed(budget, changes):
    """A Dyck warm-up before recall, a set warm-up before code: as it is, and after each change."""
    rows = []
    for column, spec in ((TASKS[budget][0], "dyck"), (TEXTS[budget][0], "set")):
        rows += [none(column, budget), warm(column, budget, spec, "as it is")]
        rows += [warm(column, budget, spec, change, change=change) for change in changes]
    return rows


def weights(budget):
    """is it the values or the scale: weights shuffled within layers, redrawn, noisy, scaled"""
    return changed(budget, ("shuffled", "redrawn", "noise 0.1", "noise 0.3", "noise 1",
                            "scaled 0.5", "scaled 2"))


def heads(budget):
    """which heads carry it: the sharpest, most blurred or random quarter alone, or all but these"""
    return changed(budget, [f"{what} {which}" for what in ("only", "without")
                            for which in ("sharp", "blurred", "random")])


def sharpen(budget):
    """no warm-up, but a penalty on the attention's entropy in its place"""
    rows = []
    for column, spec in ((TASKS[budget][0], "dyck"), (TEXTS[budget][1], "set")):
        rows += [none(column, budget), warm(column, budget, spec)]
        rows += [none(column, budget, f"penalty {x}", f"--sharpen {x}") for x in (0.01, 0.1, 1)]
    return rows


def length(budget):
    """how much warm-up is best, and where more becomes worse"""
    rows = []
    for column in TEXTS[budget]:
        rows.append(none(column, budget))
        for spec, tokens in itertools.product(("dyck", "set"), ("1M", "2M", "4M", "8M", "16M")):
            row = warm(column, budget, spec, f"{spec}, {tokens}")
            flags = row.warmup.replace(" --warmup_tokens 4M", "") + f" --warmup_tokens {tokens}"
            rows.append(dataclasses.replace(row, warmup=flags))
    return rows


def mix(budget):
    """set and union in proportions; the attention of one warm-up with the MLPs of another"""
    rows = []
    for column in TEXTS[budget]:
        rows.append(none(column, budget))
        for share in (0, 0.25, 0.5, 0.75, 1):
            mixture = f"{share}*set:length=64+{1 - share}*union:length=64"
            spec = mixture if 0 < share < 1 else "set" if share else "union"
            rows.append(warm(column, budget, spec, f"{share} set, the rest union"))
    for task in TASKS[budget]:
        rows.append(none(task, budget))
        for spec, parts in itertools.product(("set", "eca"), ("full", "attn", "mlp")):
            rows.append(warm(task, budget, spec, f"{spec}, {parts}", f"--transfer {parts}"))
        for a, b in (("set", "eca"), ("eca", "set")):
            rows.append(warm(task, budget, a, f"attention of {a}, MLPs of {b}", "",
                             mlp_from=warmup_of(b, task, budget)))
    return rows


def efficiency(budget):
    """how much less text does it take, until the loss is that of the baseline with all of it"""
    rows, published = [], {"codeparrot": 20_000, "c4": 10_000, "deepmind_math": 50_000}
    for column in TEXTS[budget]:
        steps = published.get(column, 2500)
        rows.append(none(column, budget))
        rows += [warm(column, budget, spec)
                 for spec in ("set", "union", "sort", "dyck", "dyck_shuffle", "eca", "text")]
        for spec, share in itertools.product(("set", "union"), (0.85, 0.7, 0.55)):
            rows.append(warm(column, budget, spec, f"{spec}, {share:.0%} of the text",
                             more=f"--steps {round(steps * share)}"))
    return rows


def tuned(budget):
    """what rate and ramp are worth to the baseline and beside a warm-up, on text"""
    rows = []
    for column, lr, ramp in itertools.product(TEXTS[budget], ("5e-4", "1e-3", "3e-3"), (0, 200)):
        more = f"--lr {lr} --lr_ramp {ramp}"
        rows.append(none(column, budget, f"none, {lr}, ramp {ramp}", more))
        rows += [warm(column, budget, spec, f"{spec}, {lr}, ramp {ramp}", more=more)
                 for spec in ("set", "union")]
    return rows


def grid(budget):
    """learning rate by weight decay, for none and for a warm-up: best against best"""
    rows, column = [], TEXTS[budget][1]
    for decay, lr in itertools.product(("0", "0.1"), ("1e-3", "2e-3", "4e-3", "8e-3")):
        more = f"--lr {lr} --weight_decay {decay}"
        rows.append(none(column, budget, f"none, {lr}, decay {decay}", more))
        rows.append(warm(column, budget, "set", f"set, {lr}, decay {decay}", more=more))
    return rows


def scale(budget):
    """the gain over sizes of the model"""
    rows, column = [], TEXTS[budget][1]
    for size in ("2_4_64", "4_4_128", "6_8_256") if budget == "quick" else ("gpt2", "24_16_1024"):
        for row in (none(column, budget), *(warm(column, budget, of) for of in ("dyck", "set"))):
            flags = [f"{flags.replace('--size 4_4_128', '')} --size {size}" if flags else ""
                     for flags in (row.train, row.warmup)]
            rows.append(Row(f"{column}, {size}", row.name, *flags))
    return rows


EXPERIMENTS = {make.__name__: make for make in (
    table, transfer, embeddings, controls, weights, heads, sharpen, length, mix, efficiency, tuned,
    grid, scale)}


# --------------------------------------------------------------------------------------------------
# Changes to the weights of a warm-up


@torch.no_grad()
def change_weights(model, change, seed, blur=None):
    """Changes attention and MLPs of a GPT in place; the rest stays.

    "shuffled": the values of each tensor in another order; "redrawn": normal numbers of its mean
    and spread; "noise x": x times its spread is added; "scaled x": times x; "only" or "without"
    "sharp", "blurred" or "random": that quarter of the heads is kept, or drawn afresh (the others
    the other way round), by `blur`, the entropy of each head (n_layer, n_head)."""
    what, _, which = change.partition(" ")
    generator = torch.Generator().manual_seed(seed)
    if what in ("only", "without"):
        replace_heads(model, what == "without", which, seed, blur)
        return
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
    """Draws a quarter of the heads afresh, or with replaced=False all the others: their queries,
    keys, values and output."""
    order = np.argsort(blur, axis=None)
    if which == "random":
        order = np.random.default_rng(seed).permutation(blur.size)
    quarter = max(1, blur.size // 4)
    chosen = order[-quarter:] if which == "blurred" else order[:quarter]
    torch.manual_seed(seed + 2 ** 33)
    fresh, c = GPT(model.config), model.config
    width = c.n_embd // c.n_head
    for i in range(blur.size):
        if (i in chosen) == replaced:
            layer, head = divmod(i, c.n_head)
            ours, theirs = model.h[layer].attn, fresh.h[layer].attn
            inside = torch.arange(head * width, (head + 1) * width)
            rows = torch.cat([inside + place * c.n_embd for place in range(3)])  # of q, k and v
            ours.c_attn.weight[rows] = theirs.c_attn.weight[rows]
            ours.c_attn.bias[rows] = theirs.c_attn.bias[rows]
            ours.c_proj.weight[:, inside] = theirs.c_proj.weight[:, inside]


def changed_checkpoint(path, change, seed, to):
    """Writes a changed copy of a warm-up."""
    c, (model, state) = Opened(path, "cpu"), load(path)
    x = c.rows(16)[0]
    change_weights(model, change, seed, entropy_of_heads(c.attention(x), c.real(x)))
    source = state["source"] | {"spec": f"{state['source']['spec']} ({change})"}
    save(to, model, stage="warmup", step=state["step"], tokens=state["tokens"], source=source)
    return to


# --------------------------------------------------------------------------------------------------
# Running them


class Stopped(Exception):
    """Ctrl-C came, or another process is at this run: it is neither done nor failed."""


def call_train(flags, folder, seed, device):
    """Runs or resumes train.py in a folder. Raises UserError with what it said, and Stopped."""
    script = Path(__file__).resolve().parent / "train.py"
    command = [sys.executable, str(script), *shlex.split(flags), *device, "--seed", str(seed)]
    done = subprocess.run([*command, "--out", folder.name, "--resume"], cwd=folder.parent,
                          capture_output=True, text=True)
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode in (130, 143, -2, -15) or "another process" in said:
        raise Stopped
    if done.returncode:
        raise UserError(said.removeprefix("error: "))


def make_warmup(flags, seed, results, device):
    """Makes a warm-up unless it is there, and asks whether it was learned -> its checkpoint."""
    folder = results / warmup_folder(flags, seed)
    if not (folder / "result.json").exists():
        call_train(flags, folder, seed, device)
    if not (folder / "learned.json").exists():
        found = probe_learned(Opened(folder / "warmup.pt", "cpu")) or {}
        write_json(folder / "learned.json", json.loads(json.dumps(found, default=float)))
    return folder / "warmup.pt"


def make_run(row, seed, results, device, warmups):
    """Runs or resumes a row with one seed. Raises UserError and Stopped."""
    flags, folder, scratch = row.train, results / row.folder(seed), None
    if row.warmup:
        path = warmups[row.warmup, seed].result()
        if row.change:
            scratch = path = changed_checkpoint(path, row.change, seed, f"{folder}.changed.pt")
        flags += f" --{'attn_from' if row.mlp_from else 'init'} {Path(path).relative_to(results)}"
    if row.mlp_from:
        flags += f" --mlp_from {warmups[row.mlp_from, seed].result().relative_to(results)}"
    call_train(flags, folder, seed, device)
    if scratch:
        Path(scratch).unlink()


def run_all(rows, seeds, results, jobs, device):
    """Every row with every seed that has no result yet, `jobs` at a time, all rows of a seed first;
    and before these, the warm-ups that they take up."""
    found, began, counts, warmups = read_results(results), time.time(), {}, {}
    runs = {}
    for seed, row in itertools.product(range(seeds), rows):
        if "result" not in found.get(row.folder(seed), {}):
            runs.setdefault(row.folder(seed), (row, seed))
    print(f"{len(runs)} runs to go, {jobs} at a time", flush=True)

    def one(row, seed):
        failed = results / f"{row.folder(seed)}.failed"
        try:
            make_run(row, seed, results, device, warmups)
            failed.unlink(missing_ok=True)
            state = "done"
        except Stopped:
            state = "stopped"
        except UserError as error:
            failed.write_text(f"{error}\n")
            state = f"failed: {error}"
        counts[row, seed] = state
        left = clock((time.time() - began) / len(counts) * (len(runs) - len(counts)))
        print(f"[{len(counts)}/{len(runs)}] {row.column} | {row.name} | seed {seed}: {state}; "
              f"{left} left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        futures = []
        for seed in range(seeds):
            ours = [row for row, of in runs.values() if of == seed]
            for flags in dict.fromkeys(itertools.chain(*((r.warmup, r.mlp_from) for r in ours))):
                if flags:
                    warmups[flags, seed] = pool.submit(make_warmup, flags, seed, results, device)
            futures += [pool.submit(one, row, seed) for row in ours]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:  # the runs got it, too: each saves and stops
            pool.shutdown(cancel_futures=True)
            raise


# --------------------------------------------------------------------------------------------------
# Results


def read_run(path):
    """A run's folder -> {"result": result.json, "log": evaluations, "learned": of a warm-up}."""
    record = {"result": read_json(path / "result.json"), "log": read_log(path)}
    if not {"settings", "val_loss", "val_accuracy", "tokens"} <= record["result"].keys():
        raise UserError(f"{path / 'result.json'} is not of a run")
    if (path / "learned.json").exists():
        record["learned"] = read_json(path / "learned.json")
    return record


def read_log(path):
    """The entries of a run's training stage that hold an evaluation."""
    entries = []
    with contextlib.suppress(OSError):
        for line in (path / "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
                entry = json.loads(line)
                if entry["stage"] == "train" and "val_loss" in entry:
                    entries.append(entry)
    return entries


def read_results(where):
    """{folder name: record} of the runs in a folder and of the packed files in it, or of one packed
    file; of runs that failed, {"failed": why}. Raises UserError."""
    where, found = Path(where), {}
    for packed in [where] if where.is_file() else sorted(where.glob("*.jsonl.gz")):
        try:
            with gzip.open(packed, "rt") as file:
                found |= {record.pop("name"): record for record in map(json.loads, file)}
        except (OSError, EOFError, ValueError, KeyError, AttributeError, zlib.error) as error:
            raise UserError(f"{packed} is not a file that analyze.py pack wrote: {error}") from None
    for path in sorted(where.glob("*")) if where.is_dir() else ():
        if path.suffix == ".failed":
            found.setdefault(path.stem, {"failed": path.read_text().strip()})
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
# Statistics and tables


def permutation_p(a, b):
    """Two-sided p that a and b differ in their mean by chance: the share of all ways to deal their
    values out again, or of 100,000 random ones, in which the means differ as much or more."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    both, n = np.concatenate([a, b]), len(a)
    if min(len(a), len(b)) < 2:
        return math.nan
    if math.comb(len(both), n) <= 200_000:
        deals = np.array(list(itertools.combinations(range(len(both)), n)))
    else:
        deals = np.random.default_rng(0).random((100_000, len(both))).argsort(1)[:, :n]
    sums = both[deals].sum(1)
    differences = np.abs(sums / n - (both.sum() - sums) / len(b))
    as_much = abs(a.mean() - b.mean()) - 1e-9 * np.abs(both).max()  # but for rounding
    return float((differences >= as_much).mean())


def bootstrap(a, b):
    """The 95 % interval of how much larger the mean of a is than that of b, over seeds."""
    r = np.random.default_rng(0)
    means = [r.choice(np.asarray(each, float), (10_000, len(each))).mean(1) for each in (a, b)]
    low, high = np.percentile(means[0] - means[1], (2.5, 97.5))
    return float(low), float(high)


def compare(rows, seeds, found):
    """An entry for each row: its values by seed, and how they differ from the column's first row's.
    Of tasks the accuracy, of text minus the loss, so that more is better."""
    entries, first = [], {}
    for row in rows:
        text = "--preset" in row.train or kind_of(shlex.split(row.train)[1]) == "text"
        values, failed, learned = {}, [], []
        for seed in range(seeds):
            record = found.get(row.folder(seed), {})
            if "result" in record:
                result = record["result"]
                values[seed] = -result["val_loss"] if text else result["val_accuracy"]
                if row.warmup:
                    gate = found.get(warmup_folder(row.warmup, seed), {}).get("learned", {})
                    learned.append(gate.get("verdict") == "learned")
            elif "failed" in record:
                failed.append(f"failed: {row.column} | {row.name} | {seed}: {record['failed']}")
        entry = {"row": row, "text": text, "values": values, "failed": failed,
                 "learned": f"{sum(learned)}/{len(learned)}" if learned else ""}
        base = first.setdefault(row.column, values)
        if values and base and base is not values:
            a, b = list(values.values()), list(base.values())
            entry |= {"gain": np.mean(a) - np.mean(b), "interval": bootstrap(a, b),
                      "p": permutation_p(a, b)}
        entries.append(entry)
    return entries


def show(value, text):
    return f"{value:.4f}" if text else f"{value:.1%}"


def mean_of(entry):
    """As it was measured: the accuracy, or the loss."""
    return abs(np.mean(list(entry["values"].values())))


def table_lines(entries):
    """A table for each column, in Markdown, which reads well in a terminal, too."""
    lines = []
    for column, here in itertools.groupby(entries, lambda entry: entry["row"].column):
        here = list(here)
        measure = "loss" if here[0]["text"] else "accuracy"
        lines += ["", f"| {column} | {measure} | n | gain over {here[0]['row'].name} | 95 % | p | "
                  "learned |", "|---|---|---|---|---|---|---|"]
        for entry in here:
            text, cells = entry["text"], ["", "", ""]
            if not entry["values"]:
                continue
            if "gain" in entry:
                ends = " to ".join(show(end, text) for end in entry["interval"])
                cells = [show(entry["gain"], text), ends, f"{entry['p']:.4f}"]
            cells = [entry["row"].name, show(mean_of(entry), text), str(len(entry["values"])),
                     *cells, entry["learned"]]
            lines.append(f"| {' | '.join(cells)} |")
        missing = [entry["row"].name for entry in here if not entry["values"]]
        lines += ["", f"no result yet: {'; '.join(missing)}"] if missing else []
    return lines + [line for entry in entries for line in entry["failed"]]


def draw(entries, path):
    """A panel for each column: every seed a dot, the mean a bar, that of the first row dotted."""
    entries = [entry for entry in entries if entry["values"]]
    columns = {}
    for entry in entries:
        columns.setdefault(entry["row"].column, []).append(entry)
    deepest = max(map(len, columns.values()))
    figure, axes = pyplot().subplots(1, len(columns), squeeze=False, figsize=(
        2 + 4.5 * len(columns), 1.5 + 0.34 * deepest))
    for axis, (column, here) in zip(axes[0], columns.items()):
        for y, entry in enumerate(here):
            values = [abs(value) for value in entry["values"].values()]
            axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.5)
            axis.plot([mean_of(entry)], [y], "|", color="black", markersize=16, markeredgewidth=2)
        axis.axvline(mean_of(here[0]), color="grey", linestyle=":")
        axis.set_yticks(range(len(here)), [entry["row"].name for entry in here])
        axis.set(title=column, ylim=(len(here) - 0.5, -0.5),
                 xlabel="held-out loss (nats per token)" if here[0]["text"] else "accuracy")
    keep_figure(figure, path)


def curves(runs, picture):
    """Held-out loss or accuracy by tokens: a thin line for each run, a thick one for the mean of
    those that differ in the seed alone. runs: [(name, {"settings", "warmup"}, evaluations)]. Raises
    UserError."""
    data = list(dict.fromkeys(said["settings"]["data"] for _, said, _ in runs))
    if len(data) > 1:
        raise UserError(f"these runs are on different data, and do not compare: {', '.join(data)}")
    metric = "val_accuracy" if kind_of(data[0]) == "task" else "val_loss"
    moot = OPERATIONAL | {"seed", "init", "attn_from", "mlp_from"}
    groups = {}
    print(f"{'run':44} {'warm-up':20} {'seed':>4} {'tokens':>13} {'loss':>8} {'accuracy':>9}")
    for name, said, points in runs:
        s, last = said["settings"], points[-1]
        how = [] if said["warmup"] == "none" else [s["transfer"], s["embeddings"], s["positions"]]
        label = ", ".join([said["warmup"], *how])
        alike = [value for key, value in sorted(s.items()) if key not in moot and
                 not (key in ("transfer", "embeddings", "positions") and not how)]
        groups.setdefault((label, repr(alike)), []).append(points)
        print(f"{name:44} {said['warmup']:20} {s['seed']:4} {last['tokens']:13,} "
              f"{last['val_loss']:8.4f} {last['val_accuracy']:9.2%}")
    figure, axis = pyplot().subplots(figsize=(8, 5.5))
    for i, ((label, _), group) in enumerate(groups.items()):
        # The untrained model's loss would flatten the picture: the first evaluation is left out.
        values = [{p["tokens"]: p[metric] for p in points if p["step"] or len(points) == 1}
                  for points in group]
        shared = sorted(set(values[0]).intersection(*values))
        mean = [np.mean([each[tokens] for each in values]) for tokens in shared]
        axis.plot(shared, mean, color=f"C{i}", linewidth=2.5, label=f"{label} (n = {len(group)})")
        for each in values:
            axis.plot(list(each), list(each.values()), color=f"C{i}", alpha=0.35, linewidth=0.8)
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M")
    axis.set(title=data[0], xlabel="tokens of training", ylabel={
        "val_accuracy": "accuracy on held-out answers",
        "val_loss": "held-out loss (nats per token)"}[metric])
    axis.legend()
    keep_figure(figure, picture)


def runs_of(patterns, results):
    """What curves draws: folders of runs, or with results those whose names hold one of these."""
    runs = []
    if results:
        for name, record in read_results(results).items():
            if any(pattern in name for pattern in patterns) and "result" in record:
                runs.append((name, record["result"], record["log"]))
    else:
        for path in map(Path, patterns):
            runs.append((str(path), read_json(path / "config.json"), read_log(path)))
    runs = [run for run in runs if run[2]]
    if not runs:
        raise UserError(f"no evaluation of a training stage in {', '.join(patterns)}")
    return runs


# --------------------------------------------------------------------------------------------------
# Verdicts


@dataclass
class Claim:
    """`better` is better than each of `worse`: names of rows in a column of an experiment."""
    text: str
    published: str
    experiment: str
    column: str
    better: str
    worse: tuple


RECALL, ADD = "haystack:pairs=15", "reversed_addition"
CLAIMS = [
    Claim("Dyck helps recall", "11.3 -> 96.9 %", "table", RECALL, "dyck, whole", ("none",)),
    Claim("more than shuffled Dyck", "10.3 -> 96.9 %", "controls", RECALL, "dyck",
          ("shuffled:dyck", "none")),
    Claim("Dyck helps sorting", "82.7 % without", "table", "sorting", "dyck, whole", ("none",)),
    Claim("rule 110 helps addition", "76.4 -> 91.0 %", "table", ADD, "eca, whole", ("none",)),
    Claim("it takes the values of the weights", "gain gone", "weights", RECALL, "as it is",
          ("shuffled", "redrawn")),
    Claim("set helps code", "perplexity 5.47 -> 5.15", "efficiency", "code", "set", ("none",)),
    Claim("set helps language", "perplexity 62.0 -> 59.9", "efficiency", "docs", "set", ("none",)),
]


def judge(claim, seeds, found):
    """What was measured, how many seeds, p and the verdict: the hardest to beat decides."""
    entries = compare(EXPERIMENTS[claim.experiment]("quick"), seeds, found)
    by_name = {entry["row"].name: entry for entry in entries if entry["row"].column == claim.column}
    better = by_name[claim.better]
    others = [by_name[name] for name in claim.worse]
    if not all(entry["values"] for entry in (better, *others)):
        return "", 0, math.nan, "not run"
    hardest = max(others, key=lambda entry: np.mean(list(entry["values"].values())))
    a, b, text = list(better["values"].values()), list(hardest["values"].values()), better["text"]
    p, gain, (low, high) = permutation_p(a, b), np.mean(a) - np.mean(b), bootstrap(a, b)
    verdict = "undecided" if not p < 0.05 else "supported" if gain > 0 else "contradicted"
    measured = (f"{show(mean_of(hardest), text)} ({hardest['row'].name}) -> "
                f"{show(mean_of(better), text)}, gain {show(low, text)} to {show(high, text)}")
    return measured, min(len(a), len(b)), p, verdict


def claims_lines(found, seeds):
    lines = ["| claim | published | measured here (95 %) | n | p | verdict | python analyze.py |",
             "|---|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        measured, n, p, verdict = judge(claim, seeds, found)
        command = f"`{claim.experiment} --only {shlex.quote(claim.column)}`"
        cells = [claim.text, claim.published, measured, str(n), "" if math.isnan(p) else f"{p:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {verdict} | {command} |")
    return lines


def report(found, seeds, folder):
    """All claims, tables and figures that there are results for, in one Markdown file."""
    lines = ["# What was found", "", *claims_lines(found, seeds)]
    for budget, (name, make) in itertools.product(("quick", "paper"), EXPERIMENTS.items()):
        entries = compare(make(budget), seeds, found)
        if any("gain" in entry for entry in entries):
            draw(entries, folder / f"{name}-{budget}.png")
            lines += ["", f"## {name} ({budget}): {make.__doc__}", *table_lines(entries), "",
                      f"![{name}]({name}-{budget}.png)"]
    with written_whole(folder / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print(folder / "report.md")


def experiment(name, args):
    """Runs what is missing of an experiment, or of the part that --only names, and shows it."""
    rows, results = EXPERIMENTS[name](args.budget), Path(args.results)
    wanted = [row for row in rows if args.only in f"{row.column} | {row.name}"]
    if not wanted:
        raise UserError(f"--only {args.only} is in no \"column | row\" of {name}, such as "
                        f"\"{rows[0].column} | {rows[0].name}\"")
    first = {row.column: row for row in reversed(rows)}
    wanted += [first[row.column] for row in wanted]
    rows = [row for row in rows if row in wanted]
    if not args.show:
        with lock(results / ".lock"):
            run_all(rows, args.seeds, results.resolve(), args.jobs,
                    ["--device", args.device] if args.device else [])
    entries = compare(rows, args.seeds, read_results(results))
    print(f"\n{name} ({args.budget}): {EXPERIMENTS[name].__doc__}", *table_lines(entries), sep="\n")
    if any(entry["values"] for entry in entries):
        folder = results if results.is_dir() else Path()
        draw(entries, folder / f"{name}-{args.budget}.png")


def main():
    parser = Parser(description="What many runs say.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawer = commands.add_parser("curves", help="held-out loss or accuracy by tokens, of any runs")
    drawer.add_argument("runs", nargs="+", help="folders, or with --results parts of names")
    drawer.add_argument("--results", help="a folder of many runs, or a packed file")
    drawer.add_argument("--picture", default="curves.png", help="(default curves.png)")
    for name, make in EXPERIMENTS.items():
        runner = commands.add_parser(name, help=make.__doc__)
        runner.add_argument("--budget", choices=("quick", "paper"), default="quick",
                            help="for two CPU cores, or as published (default quick)")
        runner.add_argument("--only", default="", metavar="TEXT",
                            help="rows with this in \"column | row\", and the first row")
        runner.add_argument("--jobs", type=number(1, 1000), default=1, help="runs at a time")
        runner.add_argument("--show", action="store_true", help="run nothing")
        runner.add_argument("--device", help="cuda, mps or cpu")
    commands.add_parser("claims", help="each claim: supported, contradicted or undecided here")
    commands.add_parser("report", help="all tables and figures, in report.md beside the results")
    packer = commands.add_parser("pack", help="all results in one small file")
    packer.add_argument("to", help="such as results.jsonl.gz")
    for name, command in commands.choices.items():
        if name != "curves":
            command.add_argument("--results", default="results", help="(default results)")
            command.add_argument("--seeds", type=number(1, 1000), default=3, help="(default 3)")
    args = parser.parse_args()
    if args.command == "curves":
        curves(runs_of(args.runs, args.results), args.picture)
    elif args.command == "pack":
        pack(args.results, args.to)
    elif args.command == "claims":
        print("\n".join(claims_lines(read_results(args.results), args.seeds)))
    elif args.command == "report":
        results = Path(args.results)
        report(read_results(results), args.seeds, results if results.is_dir() else results.parent)
    else:
        experiment(args.command, args)


if __name__ == "__main__":
    run_main(main)
