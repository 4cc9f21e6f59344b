"""What many runs say.

    python analyze.py curves out/code-dyck-s0 out/code-none-s0    held-out loss, a picture
    python analyze.py table --seeds 3                             runs what an experiment lacks
    python analyze.py table --show                                its table and figure; runs nothing
    python analyze.py claims                                      what the paper says, what is found

An experiment is a list of settings. A setting is a command line of train.py, run once for each seed
in a folder of its own below --results. In each column, a task or a text, the first setting has no
warm-up, and the others are compared with it.
"""
import functools
import gzip
import json
import math
import re
import shlex
import subprocess
import sys
import zlib
from itertools import chain, combinations, pairwise, permutations, product
from pathlib import Path
from typing import NamedTuple

from data import (LONG, TASKS, Parser, UserError, json_lines, lock, number, read_json, reading,
                  run_main, say, write_json, written_whole)
from eval import Opened, entropy_of_heads, keep_figure, probe_learned, pyplot
from model import GPT, load, part_of, save
from train import OPERATIONAL

import numpy as np
import torch

# ---- Experiments are settings, and settings are command lines ------------------------------------


def as_dict(flags):
    """"--data code --lr 1e-3" -> {"--data": "code", "--lr": "1e-3"}. The later value counts."""
    words = shlex.split(flags)
    return dict(zip(words[::2], words[1::2]))


def folder_of(seed, train, warmups=(), change="", warmup_seeds=()):
    """Where a run is. The same flags in any order are the same run, whichever experiment asks."""
    run, warmup, second = map(as_dict, (train, *warmups, "", "")[:3])
    parts = [sorted(flags.items()) for flags in (run, warmup, second)]
    if any(each != seed for each in warmup_seeds):
        parts.append(warmup_seeds)
    label = ["warmup" if run.get("--steps") == "0" else run["--data"],
             run.get("--warmup") or warmup.get("--warmup"), run.get("--transfer"), change,
             f"{zlib.crc32(repr((parts, change)).encode()):08x}", f"s{seed}"]
    return re.sub(r"[^\w.=+*-]+", "_", "-".join(filter(None, label)))


class Setting(NamedTuple):
    column: str
    name: str
    train: str      # flags of train.py, but for --seed and --out
    warmups: tuple  # flags of runs whose warm-ups it takes up; of two the attention, and the MLPs
    change: str     # what is done to the weights of the warm-up first, see change_weights
    warmup_seeds: tuple  # of these warm-ups, where they are not the run's own
    seeds: int      # how many runs it wants

    def folder(self, seed):
        return folder_of(seed, *self[2:6])

    def warmup_runs(self, seed):
        """The flags and seeds of the warm-ups that it takes up."""
        return list(zip(self.warmups, self.warmup_seeds or (seed, seed)))


# Settings for two CPU cores (ours): minutes a run. Tasks have the published model, a quarter of its
# rows and twice its rate; recall stops once solved, others have a fixed budget, as published.
# Warm-ups before tasks are shorter than train.py's; before text, batch and rate are published.
TASK_FLAGS = "--batch_size 250 --lr 2e-3"
STOPPED = f"{TASK_FLAGS} --eval_every 100 --stop_at 0.9"
FIXED = f"{TASK_FLAGS} --eval_every 500 --steps 6000"
TEXT = ("--preset laptop --size 4_4_128 --block_size 256 --batch_size 16 --steps 2500 "
        "--lr 3e-3 --lr_ramp 200")
BEFORE_TEXT = ("--data haystack --warmup_batch_size 64 --warmup_lr 5e-4 --warmup_lr_ramp 0 "
               "--warmup_lr_schedule constant --warmup_dropout 0.1 --warmup_tokens 4M")
COLUMNS = {
    "recall": f"--data haystack {STOPPED}",
    "recall of 15": f"--data haystack:pairs=15 --steps 6000 {STOPPED}",
    **{task: f"--data {task} {FIXED}" for task in ("addition", "reversed_addition", "sorting")},
    "code": f"--data code {TEXT}", "english": f"--data docs {TEXT}",
    "english, smaller": f"--data docs {TEXT} --size 2_4_64",
    "english, larger": f"--data docs {TEXT} --size 6_8_256", "math": f"--data math {TEXT}"}
TEXTS = ("code", "english", "math")
TASK_COLUMNS = "recall", "recall of 15", "addition", "reversed_addition", "sorting"

# Two are published; the third is train.py's before haystack, the best of four on seeds 0 to 2.
FRESH = "--embeddings random --positions random"
STARTS = {"whole": "--transfer full --embeddings mean --positions fit",
          "attention": f"--transfer attn {FRESH}",
          "attention, positions": "--transfer attn --embeddings random --positions fit"}


class Line(NamedTuple):
    """Settings: one for each choice from the braces in its name; {0}, {1} below are the choices."""
    columns: tuple
    name: str
    warmup: str = "none"  # spec and flags (equal: 49.2 M tokens) / of another, whose MLPs are taken
    flags: str = ""       # how it moves over, and what else differs; or one of STARTS
    change: str = ""
    warmup_seeds: tuple = ()


RECALL, RECALL_15, RECALLS = ("recall",), ("recall of 15",), ("recall", "recall of 15")
DIAGNOSTICS = ("recall of 15", "reversed_addition", "addition", "sorting")
LONG_WARMUP = "--warmup_steps 24000"  # after 6,000 most stop on a plateau, and have no sharp heads
OURS = "attention, positions"
MOVED = "--transfer {0} --embeddings {1} --positions fit"
CHANGES = "{as it is|shuffled|redrawn|noise 0.1|noise 0.3|noise 1|scaled 0.5|scaled 2}"
KEPT = "{as it is|only sharp|only blurred|only random|without sharp|without blurred|without random}"
EXPERIMENTS = {  # what it asks, seeds (of text six), its lines
    # Said before the runs, after trials of five starts: in each that moves MLPs, a warm-up with
    # a smaller share_that_differs (tests/share.py) is to find the needle later.
    "starts": ("which part makes it, and which breaks it (ours)", 10, [
        Line(RECALL_15, "dyck, {attn|attn,norm|attn,mlp|full}, embeddings {random|mean}", "dyck",
             MOVED),
        Line(RECALL, "dyck, {attn|attn,norm}, embeddings {random}", "dyck", MOVED),
        Line(RECALL, "dyck, {full}, embeddings {mean}", "dyck", MOVED),
        Line(RECALL, "none, steps 13500", flags="--steps 13500")]),
    "repeats": ("how much of the spread is the warm-up's, and how much the task's", 3, [
        Line(RECALL_15, f"dyck, as published, warm-up {seed}", "dyck", warmup_seeds=(seed,))
        for seed in range(10)]),
    "strangers": ("is it these MLPs, or that they and the attention are strangers?", 2, [
        Line(RECALL_15, f"attention of {a}, MLPs of {b}", "dyck / dyck",
             "--embeddings random --positions fit", warmup_seeds=(a, b))
        for a, b in permutations((0, 1, 4, 7), 2)]),
    "budgets": ("the warm-up's tokens as further steps, and other rates and ramps", 10, [
        Line(RECALL_15, "dyck, attention, positions", "dyck", OURS),
        Line(RECALL_15, "none, steps 12144", flags="--steps 12144"),
        Line(TEXTS, "none, steps 3500", flags="--steps 3500"),
        Line((*RECALLS, *TEXTS), "none, {lr 1e-3|lr 4e-3|lr 8e-3|lr_ramp 0|lr_ramp 1000}",
             flags="--{0}")]),
    "tasks": ("which rule helps which task, all after 49.2 M tokens of warm-up", 6, [
        Line(DIAGNOSTICS, "{dyck|identity|set|union|delete|eca}, {whole|attention}", "{0} equal",
             "{1}")]),
    "table": ("which warm-up helps which task, moved over as published, or as ours", 10, [
        Line(TASK_COLUMNS, "{dyck|identity|set|eca|eca:rule=random,length=64}, "
             "{whole|attention|attention, positions}", "{0}", "{1}")]),
    "transfer": ("what has to move over: the whole model, attention, MLPs or norms", 10, [
        Line((*RECALL, *TEXTS), "{set|dyck}, {full|attn|mlp|norm}", "{0}", "--transfer {1}")]),
    "controls": ("the critics' controls: shuffled rows, as many tokens of text", 10, [
        Line((*RECALLS, *TEXTS), "{dyck|shuffled:dyck|set|shuffled:set}", "{0}"),
        Line(RECALLS, "{dyck|shuffled:dyck}, attention, positions", "{0}", OURS),
        Line(RECALLS, "dyck, lr 1e-3", "dyck", "--lr 1e-3"),
        Line(TEXTS, "text", "text"),
        Line(TEXTS, "set, lr 1e-3", "set", "--lr 1e-3")]),
    "weights": ("is it the values of the weights, or their scale", 10, [
        Line(RECALL_15, CHANGES, "dyck", OURS, "{0}"),
        Line(("code",), CHANGES, "set", change="{0}")]),
    "heads": ("which quarter of the heads carries it: the sharpest, most blurred, any", 6, [
        Line(RECALL_15, f"long warm-up, {KEPT}", f"dyck {LONG_WARMUP}", OURS, "{0}"),
        Line(("code",), KEPT, "set", change="{0}")]),
    "sharpen": ("no warm-up, but a penalty on the attention's entropy in its place", 6, [
        Line(RECALL_15, "dyck", "dyck", OURS),
        Line(("english",), "set", "set"),
        Line((*RECALL_15, "english"), "penalty {0.01|0.1|1}", flags="--sharpen {0}")]),
    "length": ("how much warm-up is best, and where more becomes worse", 10, [
        Line(TEXTS, "{dyck|set}, {1M|2M|4M|8M|16M}", "{0} --warmup_tokens {1}")]),
    "mix": ("set and union in proportions; attention of one warm-up, MLPs of another", 6, [
        Line(TEXTS, "{set|union}", "{0}"),
        *(Line(TEXTS, f"{x} set, the rest union", f"{x}*set:length=64+{1 - x}*union:length=64")
          for x in (0.25, 0.5, 0.75)),
        Line(DIAGNOSTICS, "rule 110, MLPs", "eca equal", f"--transfer mlp {FRESH}"),
        Line(DIAGNOSTICS, "{dyck|set}, attention", "{0} equal", "attention"),
        Line(DIAGNOSTICS, "attention of {dyck|set}, MLPs of rule 110",
             "{0} equal / eca equal", FRESH)]),
    "efficiency": ("how much less text does it take to reach the baseline's loss", 10, [
        Line(TEXTS, "{set|union|sort|dyck|dyck_shuffle|eca|eca:rule=random|text}", "{0}"),
        *(Line(TEXTS, f"{rule}, {share}% of the text", rule, f"--steps {25 * share}")
          for rule in ("set", "union") for share in (85, 70, 55))]),
    "tuned": ("what rate and ramp are worth to the baseline and beside a warm-up", 10, [
        Line(TEXTS, "{none|set|union}, {5e-4|1e-3|3e-3}, ramp {0|200}", "{0}",
             "--lr {1} --lr_ramp {2}")]),
    "grid": ("learning rate by weight decay, for none and a warm-up: best against best", 10, [
        Line(("english",), "{none|set}, {1e-3|2e-3|4e-3|8e-3}, decay {0|0.1}", "{0}",
             "--lr {1} --weight_decay {2}")]),
    "scale": ("the gain over sizes of the model", 10, [
        Line(("english, smaller", "english", "english, larger"), "{dyck|set}", "{0}")])}


def settings_in(name, only=""):
    """The settings of an experiment, by columns, bases first. only: see main. Raises UserError."""
    columns, (_, seeds, lines) = {}, EXPERIMENTS[name]
    wanted, _, beginning = only.partition(" | ")
    for line in lines:
        pieces = re.split(r"{(.*?)}", line.name)  # every second one was in braces
        for chosen in product(*(piece.split("|") for piece in pieces[1::2])):
            pieces[1::2] = chosen
            filled = [part.format(*chosen) for part in line[2:5]]
            one = Line(line.columns, "".join(pieces), *filled, *line[5:])
            for column in line.columns:
                if wanted in ("", column) and one.name.startswith(beginning):
                    columns.setdefault(column, [Line((), "none")]).append(one)
    if not columns:
        raise UserError(f"--only {only}: {name} has no such column or setting")
    return [setting(line, column, seeds) for column in columns for line in columns[column]]


def setting(line, column, seeds):
    """A warm-up moves over as published, the whole model, unless the line says otherwise."""
    own, on_task = COLUMNS[column], column in TASK_COLUMNS
    how = STARTS["whole"] if on_task else "--positions random"
    how = {"none": "--warmup none", "text": "--transfer all"}.get(line.warmup, how)
    warmups = tuple(warmup_flags(each, own, on_task)
                    for each in line.warmup.split(" / ") if each != "none")
    how = "" if len(warmups) == 2 else how  # such a line says itself what moves
    train = f"{own} {how} {STARTS.get(line.flags, line.flags)}"  # the later of two flags counts
    return Setting(column, line.name, train, warmups, line.change.replace("as it is", ""),
                   line.warmup_seeds, seeds if on_task else 6)


def warmup_flags(warmup, own, on_task):
    """The flags of a run that stops after its warm-up, which all tasks share, or all texts."""
    spec, _, flags = warmup.partition(" ")
    rule = spec.removeprefix("shuffled:")
    if flags == "equal" and rule != "dyck":
        flags = "--warmup_tokens 49152000"
    elif on_task and flags in ("", "equal"):
        flags = "--warmup_steps 6000"  # of brackets 49.2 M tokens
    if rule in (("dyck",) if on_task else ("identity", "sort", "set", "union")):
        spec += ":length=64"  # as long as recall's rows; as published
    before = "--data haystack" if on_task else f"{BEFORE_TEXT} --size {as_dict(own)['--size']}"
    if spec == "text":
        before = f"{own} --warmup_tokens 4M"
    return f"{before} {flags} --warmup {spec} --steps 0"


# ---- Running: warm-ups, what is done to them, runs, and what was run -----------------------------


@torch.no_grad()
def change_weights(model, change, seed, blur):
    """Changes attention and MLPs of a GPT in place. "shuffled": each tensor's values in another
    order; "redrawn": of its mean and spread; "noise 0.1" of its spread; "scaled 2"; "only sharp"
    keeps a quarter of the heads, "without sharp" draws it afresh. blur: (n_layer, n_head)."""
    what, _, which = change.partition(" ")
    if what in ("only", "without"):
        return replace_heads(model, what == "without", which, seed, blur)
    generator = torch.Generator().manual_seed(seed)
    for p in [p for name, p in model.named_parameters() if part_of(name) in ("attn", "mlp")]:
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
    c, (_, state) = Opened(path, "cpu"), load(path)
    x = c.rows(16)[0]
    change_weights(c.model, change, seed, entropy_of_heads(c.attention(x), c.real(x)))
    source = state["source"] | {"spec": f"{c.spec} ({change})"}
    save(to, c.model, stage="warmup", step=c.step, tokens=state["tokens"], source=source)


def call_train(flags, folder, seed):
    """Runs or resumes train.py in a folder. Raises UserError with the last line that it said."""
    command = [sys.executable, Path(__file__).resolve().with_name("train.py"), *shlex.split(flags),
               "--seed", str(seed), "--out", folder.name, "--resume"]
    with subprocess.Popen(command, cwd=folder.parent, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as run:
        try:
            said = run.stdout.read()
        finally:
            run.communicate()  # after Ctrl-C, which it got, too: it saves and stops
    if run.returncode:
        raise UserError(f"exit status {run.returncode}: {''.join(said.strip().splitlines()[-1:])}")


def make_warmup(flags, seed, results):
    """Makes a warm-up unless it is there -> its checkpoint, in `results`. Raises UserError."""
    folder = results / folder_of(seed, flags)
    with lock(folder / ".made", wait=True):  # another command may be making it
        if not (folder / "result.json").exists():
            call_train(flags, folder, seed)
        if not (folder / "learned.json").exists():
            found = probe_learned(Opened(folder / "warmup.pt", "cpu"))
            write_json(folder / "learned.json", found or {})
    return f"{folder.name}/warmup.pt"


def with_checkpoints(setting, seed, results):
    """A setting's flags, with its warm-ups' checkpoints: made if need be, and changed in a copy."""
    paths = [make_warmup(*warmup, results) for warmup in setting.warmup_runs(seed)]
    if setting.change:
        made_from, paths = paths[0], [f"{setting.folder(seed)}.changed.pt"]
        changed_checkpoint(results / made_from, setting.change, seed, results / paths[0])
    names = ("--init",) if len(paths) == 1 else ("--attn_from", "--mlp_from")
    return " ".join([setting.train, *map("{} {}".format, names, paths)])


def missing(settings, seeds, results):
    """{folder: (setting, seed)} of what has no result yet, all settings of a seed first."""
    found, runs = read_results(results), {}
    for seed, setting in product(range(seeds or 10), settings):
        if seed < (seeds or setting.seeds) and setting.folder(seed) not in found:
            runs[setting.folder(seed)] = setting, seed
    return runs


def run_all(settings, seeds, results):
    """Runs what has no result yet. Where another command is at work this fails: it has the lock."""
    runs = missing(settings, seeds, results)
    say(f"{len(runs)} runs to go")
    for i, (folder, (setting, seed)) in enumerate(runs.items(), 1):
        said = "done"
        try:
            call_train(with_checkpoints(setting, seed, results), results / folder, seed)
            (results / f"{folder}.changed.pt").unlink(missing_ok=True)
        except UserError as error:
            said = f"failed: {error}"
        say(f"[{i}/{len(runs)}] {setting.column} | {setting.name} | seed {seed}: {said}")


def read_run(path):
    """A run's folder -> its record, with config.json as the result while there is none yet."""
    config, result, learned = (path / f"{name}.json" for name in ("config", "result", "learned"))
    begun = read_json(config) if config.exists() or not result.exists() else {}
    with reading(path):
        log = [entry for entry in json_lines(path / "log.jsonl")
               if entry["stage"] == "train" and "val_loss" in entry]
    return {"result": read_json(result) if result.exists() else begun, "log": log,
            "learned": read_json(learned) if learned.exists() else {},
            "environment": begun.get("environment")}


def read_results(where):
    """{folder name: what read_run says} of a folder with runs and packed files, or of one file."""
    where, found = Path(where), {}
    paths = [where] if where.is_file() else where.iterdir()
    for path in sorted(paths, key=lambda path: (path.suffix != ".gz", path)):
        if (path / "result.json").exists():  # these come last: a run hides a packed one
            found[path.name] = read_run(path)
        elif path.is_file() and (path == where or path.suffix == ".gz" and ".tar" not in path.name):
            with reading(path), gzip.open(path, "rt") as file:
                for line in iter(lambda: file.readline(LONG), ""):
                    record = json.loads(line)
                    name = record.pop("name")
                    if found.setdefault(name, record) != record:
                        raise ValueError(f"of {name} it has another result than a file before")
    return found


# ---- What a run is worth, and whether two settings differ ----------------------------------------

FOUND = 0.9     # of held-out answers right: recall is learned
MARGIN = 0.005  # bits per byte, half of the published effect: less is no difference worth having
STEPS, ACCURACY, BITS = f"steps to {FOUND:.0%}", "accuracy at the end", "bits per byte"
FORMS = {STEPS: "{:z,.0f}", ACCURACY: "{:z.1%}", BITS: "{:z.4f}"}  # z: no -0
# Accuracy as published, but steps of recall, which each run finds suddenly, at its own time.
MEASURES = dict.fromkeys(COLUMNS, BITS) | dict.fromkeys(TASK_COLUMNS, ACCURACY) | dict.fromkeys(
    RECALLS, STEPS)


def value_of(record, measure):
    """Steps until it was learned, as two evaluations in a row say, or all if it never was."""
    result = record["result"]
    if measure != STEPS:
        return result["val_accuracy" if measure == ACCURACY else "val_bits_per_byte"]
    found = (first["step"] for first, second in pairwise(record["log"])
             if min(first["val_accuracy"], second["val_accuracy"]) >= FOUND)
    return next(found, result["settings"]["steps"])


@functools.cache
def ways(n, of):
    """All ways to choose n places, in row 0 the first, or 100,000 random ones if there are more."""
    if math.comb(of, n) <= 200_000:
        return np.array(list(combinations(range(of), n)))
    chosen = np.random.default_rng(0).random((100_000, of)).argsort(1)[:, :n]
    chosen[0] = range(n)  # what happened is one of the ways: p is never 0
    return chosen


def differences(a, b):
    """Mean of a less mean of b, as they are, and for every other way to give out their values."""
    both = np.array([*a, *b], float)
    sums = both[ways(len(a), len(both))].sum(1)
    return sums / len(a) - (both.sum() - sums) / len(b)


def permutation_p(a, b):
    """Two-sided p: the share of all ways in which the means differ as much as they do, or more."""
    found = np.abs(differences(a, b))
    return float((found >= found[0] - 1e-9 * np.abs([*a, *b]).max()).mean())  # rounding


def permutation_interval(a, b):
    """The 95 % interval of mean(a) - mean(b): all shifts of a that permutation_p does not reject at
    5 %: 0 is outside exactly where p < 0.05. With a shifted until its mean is u below that of b,
    what happened is a difference of -u, another way to give the values one of e - c * u, as large
    up to some u, its bound: the interval ends where 5 % of all ways have a bound that is larger."""
    e = differences(a - np.mean(a), b - np.mean(b))
    c = differences(np.ones(len(a)), np.zeros(len(b)))
    always = np.abs(c) > 1 - 1e-9  # what happened itself, or with the groups exchanged
    c[always], ends = 0, []  # nothing bounds these: with few values no shift is ever rejected
    for sign in (-1, 1):
        bounds = np.where(always, math.inf, np.maximum(sign * e / (1 + c), -sign * e / (1 - c)))
        ends.append(sign * np.sort(bounds)[::-1][math.ceil(0.05 * len(e)) - 1])
    return tuple(np.mean(a) - np.mean(b) + ends)


class Outcome:
    """The runs of a setting that are there, without those on other data than `base` had."""

    def __init__(self, setting, seeds, found, base=None):
        self.setting, self.measure = setting, MEASURES[setting.column]
        self.show = FORMS[self.measure].format  # of a value what is printed
        self.data = dict(base.data) if base else {}  # fingerprints: of a task one for each seed
        self.runs, self.left_out = {}, {}
        for seed in range(seeds or setting.seeds):
            record = found.get(setting.folder(seed))
            if record:
                key = seed if setting.column in TASK_COLUMNS else "text"
                fingerprint = record["result"]["fingerprint"][0]
                alike = self.data.setdefault(key, fingerprint) == fingerprint
                (self.runs if alike else self.left_out)[seed] = record
        self.n, self.number, self.budget = len(self.runs), f"n = {len(self.runs)}", math.inf
        if self.n:
            results = [each["result"] for each in self.runs.values()]
            self.values = np.array([value_of(each, self.measure) for each in self.runs.values()])
            self.accuracy = np.mean([each["val_accuracy"] for each in results])
            self.warmup_tokens = np.mean([each["tokens"]["procedural"] for each in results])
            self.learned = [found.get(folder_of(of, flags), {}).get("learned", {})
                            for seed in self.runs for flags, of in setting.warmup_runs(seed)]
            if self.measure == STEPS:
                self.budget = results[0]["settings"]["steps"]
                self.number = f"{(self.values < self.budget).sum()} of {self.n} found"

    def against(self, base):
        """Means of a baseline and of this; gain, low, high of its 95 % interval, p; and in words. A
        run that never got there counts as the smaller budget: a gain may be a lower bound."""
        never = min(self.budget, base.budget)
        theirs, ours = np.minimum(base.values, never), np.minimum(self.values, never)
        better = 1 if self.measure == ACCURACY else -1  # less, of steps and bits
        signed = ours * better, theirs * better
        gain, p = signed[0].mean() - signed[1].mean(), permutation_p(*signed)
        low, high = permutation_interval(*signed)
        bound = "at least " if theirs.max() == never > ours.max() else ""
        limits = "any" if math.isinf(low) else f"{self.show(low)} to {self.show(high)}"
        words = [f"{bound}{self.show(gain)}", limits, "< 0.0001" if p < 1e-4 else f"{p:.4f}"]
        return theirs.mean(), ours.mean(), gain, low, high, p, words


def compare(settings, seeds, found):
    """{column: outcomes of its settings, the base first}; of two that are one run, the first."""
    columns, seen = {}, set()
    for setting in settings:
        if setting.folder(0) not in seen:
            seen.add(setting.folder(0))
            outcomes = columns.setdefault(setting.column, [])
            outcomes.append(Outcome(setting, seeds, found, *outcomes[:1]))
    return columns


# ---- Tables and figures --------------------------------------------------------------------------


def markdown(head, rows):
    """A table, which reads well in a terminal, too."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def table_lines(columns):
    lines = []
    for column, outcomes in columns.items():
        first, rows = outcomes[0], []
        for each in [each for each in outcomes if each.n]:
            gain = each.against(first)[-1] if first.n and each is not first else [""] * 3
            warmup = f"{each.warmup_tokens / 1e6:.1f} M" if each.warmup_tokens else ""
            learned = []
            for key, form in (("learned (share of what can be)", "{:.0%}"),
                              ("accuracy", "{:.0%} right")):  # which old records lack
                values = [found[key] for found in each.learned if key in found]
                learned += [form.format(np.mean(values))] if values else []
            rows.append([each.setting.name, each.show(each.values.mean()), f"{each.accuracy:.1%}",
                         each.number, *gain, warmup, ", ".join(learned)])
        if rows:
            head = [column, first.measure, "accuracy", "seeds", "gain over none", "95 %", "p",
                    "tokens of warm-up", "learned"]
            lines += ["", *markdown(head, rows)]
        notes = [f"left out: {each.setting.name}, seeds {[*each.left_out]}: not the data of "
                 f"{first.setting.name} (another Python's code and docs?)"
                 for each in outcomes if each.left_out]
        without = [each.setting.name for each in outcomes if not each.n]
        if without:
            notes.append(f"no result yet of {column}: {'; '.join(without)}")
        lines += ["", *notes] if notes else []
    return lines


def draw(name, columns, path):
    """A panel for each column, a row for each setting; what stands in that is said at its foot."""
    if name == "tasks":
        return draw_gains(columns, path)
    panels = [[each for each in outcomes if each.n] for outcomes in columns.values()]
    panels = [there for there in panels if there]
    sizes = [len(there) + 2 for there in panels]
    figure, axes = pyplot().subplots(len(panels), 1, squeeze=False, height_ratios=sizes,
                                     figsize=(11, 0.45 * sum(sizes)))
    for axis, there in zip(axes[:, 0], panels):
        for y, each in enumerate(there):
            places = y + np.linspace(-0.3, 0.3, each.n + 2)[1:-1]  # else equal values are one dot
            found = each.values < each.budget
            for marker, which in (("o", found), ("x", ~found)):
                axis.plot(each.values[which], places[which], marker, color="C0", alpha=0.7)
            if found.all():
                axis.plot(each.values.mean(), y, "|k", markersize=18, markeredgewidth=2)
        axis.set(title=there[0].setting.column, xlabel=there[0].measure, yticks=range(len(there)),
                 yticklabels=[f"{each.setting.name} ({each.number})" for each in there],
                 ylim=(len(there) - 0.5, -0.5))
    figure.supxlabel("dot: a seed; cross: one that never got there; bar: the mean, where all did")
    keep_figure(figure, path)


PAPER = {  # its accuracy in percent; its recall is of 30 pairs
    "recall of 15": {"none": 11.3, "dyck, whole": 96.9, "identity, whole": 18.8, "set, whole": 18.9,
                     "eca, whole": 10.5, "identity, attention": 99.0, "set, attention": 88.9},
    "reversed_addition": {"none": 76.4, "set, whole": 44.6, "set, attention": 54.4,
                          "eca, whole": 91.0},
    "addition": {"none": 59.1, "set, attention": 81.1, "eca, whole": 69.6},
    "sorting": {"none": 82.7, "set, attention": 98.1, "eca, whole": 76.9}}


def draw_gains(columns, path):
    """The paper's first figure, rules by tasks: points of accuracy gained, n, what is published."""
    names = [each.setting.name for each in next(iter(columns.values()))[1:]]
    gains = np.full((len(names), len(columns)), np.nan)
    figure, axis = pyplot().subplots(figsize=(11, 1 + 0.6 * len(names)))
    for j, (column, (base, *others)) in enumerate(columns.items()):
        for i, each in enumerate(others):
            text, published = "not run", PAPER[column]
            if each.n and base.n:
                gains[i, j] = 100 * (each.accuracy - base.accuracy)
                text = f"{gains[i, j]:+.1f} (n = {min(each.n, base.n)})"
            if names[i] in published:
                text += f"\npaper {published[names[i]] - published['none']:+.1f}"
            axis.text(j, i, text, ha="center", va="center")
    image = axis.imshow(gains, cmap="RdBu", vmin=-100, vmax=100, aspect="auto", alpha=0.7)
    figure.colorbar(image, label="points of accuracy over no warm-up (the paper's recall: of 30)")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(names)), names)
    axis.grid(False)
    keep_figure(figure, path)


def curves(runs, picture):
    """Accuracy on a task, or held-out loss of text, by steps: a thin line for each run, and a thick
    one for the mean of those that differ in the seed alone. runs: {name: record}."""
    settings = {name: record["result"]["settings"] | {"warmup": record["result"]["warmup"]}
                for name, record in runs.items()}
    groups, differ, (first, *_) = {}, ["warmup"], settings.values()
    for key in sorted({*first} - OPERATIONAL - {"warmup", "seed", "init", "attn_from", "mlp_from"}):
        if len({str(s.get(key, first[key])) for s in settings.values()}) > 1:  # old runs lack some
            differ.append(key)
    fingerprints = {record["result"]["fingerprint"][0] for record in runs.values()}
    on_task = first["data"].partition(":")[0] in TASKS  # where each seed has its own
    if "data" in differ or len(fingerprints) > 1 and not on_task:
        raise UserError("these runs are on different data")
    y, ylabel = (("val_accuracy", "accuracy on held-out answers") if on_task else
                 ("val_loss", "held-out loss (nats per token)"))
    for name, s in settings.items():
        log = runs[name]["log"]
        if not log:
            raise UserError(f"{name} has no evaluation of its training yet")
        say(f"{name}: warm-up {s['warmup']}, seed {s['seed']}, {log[-1]['tokens']:,} tokens, "
            f"loss {log[-1]['val_loss']:.4f}, {log[-1]['val_accuracy']:.2%} right")
        label = ", ".join(f"{key} {s.get(key)}" for key in differ)
        # An untrained model's loss would flatten the picture: it is left out.
        groups.setdefault(label, []).append({entry["step"]: entry[y] for entry in log[1:] or log})
    figure, axis = pyplot().subplots(figsize=(11, 6.5))
    for i, (label, lines) in enumerate(groups.items()):
        for line in lines:
            axis.plot(line.keys(), line.values(), color=f"C{i}", alpha=0.5, lw=1)
        steps = lines[0].keys() if all(line.keys() == lines[0].keys() for line in lines) else []
        mean = np.mean([list(map(line.get, steps)) for line in lines], axis=0)
        axis.plot([*steps], mean, color=f"C{i}", lw=2.5, label=f"{label} (n = {len(lines)})")
    axis.set(title=f"{first['data']} (thin: a run; thick: the mean, where all end at one step)",
             xlabel="steps of training", ylabel=ylabel)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    keep_figure(figure, picture)


# ---- Verdicts, and the report --------------------------------------------------------------------


class Claim(NamedTuple):
    text: str
    published: str  # in our unit, where there is one
    experiment: str
    column: str
    better: str     # names of two settings
    worse: str
    counting_warmup: bool = False  # its tokens are steps, too


# Written down before the runs that decide them; assets/report.md has the exceptions among the first
# ten, and the published perplexities from which these bits per byte come.
CODE, ENGLISH = "gain 0.029 bits per byte", "gain 0.011 bits per byte"
RIGHT = "11.3 -> 96.9 % right"
DEFAULT, R15 = "dyck, attention, positions", "recall of 15"
CLAIMS = [
    Claim("Dyck finds the needle: the whole model moved, as published", RIGHT, "controls", R15,
          "dyck", "none"),
    Claim("... attention and positions moved, our default", "-", "table", R15, DEFAULT, "none"),
    Claim("... more than Dyck with its tokens shuffled", "10.3 -> 96.9 % right", "controls", R15,
          DEFAULT, f"shuffled:{DEFAULT}"),
    Claim("... it takes its weights as they are, not shuffled in each tensor", "gain gone",
          "weights", R15, "as it is", "shuffled"),
    Claim("set helps code", CODE, "controls", "code", "set", "none"),
    Claim("set helps English", ENGLISH, "controls", "english", "set", "none"),
    Claim("set helps English at a modest rate without a ramp", ENGLISH, "tuned", "english",
          "set, 1e-3, ramp 0", "none, 1e-3, ramp 0"),
    Claim("30 pairs, the paper's own task: attention and positions moved, our default", RIGHT,
          "starts", "recall", "dyck, attn, embeddings random", "none, steps 13500"),
    Claim("30 pairs: the whole model moved, as published", RIGHT, "starts", "recall",
          "dyck, full, embeddings mean", "none, steps 13500"),
    Claim("attention without MLPs finds the needle sooner than with them", "- (ours)", "starts",
          R15, "dyck, attn, embeddings random", "dyck, attn,mlp, embeddings random"),
    Claim("Dyck, its 49.2 M tokens counted as steps, beats as many steps without", "- (ours)",
          "budgets", R15, DEFAULT, "none, steps 12144", counting_warmup=True),
    Claim("set helps code more than as many tokens of text",
          "others, 410 M parameters: text is better", "controls", "code", "set", "text"),
    Claim("set helps English more than as many tokens of text",
          "others, 410 M parameters: text is better", "controls", "english", "set", "text"),
    Claim("attention of set alone helps code", "it carries the gain; no number", "transfer",
          "code", "set, attn", "none"),
    Claim("MLPs of set alone help English", "they carry the gain; no number", "transfer",
          "english", "set, mlp", "none"),
    Claim("rule 110 helps reversed addition: the whole model moved, as published",
          "76.4 -> 91.0 % right", "tasks", "reversed_addition", "eca, whole", "none"),
    Claim("sharp heads carry it: the sharpest quarter more than a random one", "they do; no number",
          "heads", R15, "long warm-up, only sharp", "long warm-up, only random"),
    Claim("attention of set with MLPs of rule 110 beats attention of set alone",
          "54.4 -> 82.9 % right", "mix", "reversed_addition",
          "attention of set, MLPs of rule 110", "set, attention")]


def judge(claim, seeds, found):
    """A claim -> what was measured, in words; n; p; the verdict."""
    settings = {each.name: each for each in settings_in(claim.experiment, claim.column)}
    base = Outcome(settings[claim.worse], seeds, found)
    ours = Outcome(settings[claim.better], seeds, found, base)
    if not ours.n or not base.n:
        return ["", "0", "", "not run"]
    if claim.counting_warmup:
        last = next(iter(ours.runs.values()))["log"][-1]
        steps = ours.warmup_tokens * last["step"] / last["tokens"]
        ours.values, ours.budget = ours.values + steps, ours.budget + steps
    before, after, gain, low, high, p, (gained, limits, shown_p) = ours.against(base)
    verdict = "undecided"
    if p < 0.05 / len(CLAIMS):  # Bonferroni: one false finding in 20 such lists of claims
        verdict = "supported" if gain > 0 else "contradicted"
    elif ours.measure == BITS and -MARGIN < low and high < MARGIN:
        verdict = "no difference beyond the margin"
    words = (f"{ours.show(before)} ({base.setting.name}) -> {ours.show(after)} "
             f"{ours.measure}, gain {gained} ({limits})")
    if ours.measure == STEPS:
        words += f"; {base.accuracy:.1%} -> {ours.accuracy:.1%} right"
    return [words, str(min(base.n, ours.n)), shown_p, verdict]


def claims_lines(found, seeds):
    head = ["claim", "published", "measured here (95 %)", "n", "p", "verdict", "python analyze.py"]
    return markdown(head, [
        [claim.text, claim.published, *judge(claim, seeds, found),
         f"`{claim.experiment} --only {shlex.quote(claim.column)}`"] for claim in CLAIMS])


MARK = "<!-- written by analyze.py report from here on -->"


def report(found, folder, seeds):
    """What there are results for, in the folder's report.md below MARK: what is above it stays."""
    path, shown = folder / "report.md", set()
    above = path.read_text("utf-8").partition(MARK)[0] if path.exists() else ""
    lines = [above + MARK, "", "# What was found", "", *claims_lines(found, seeds)]
    for name, (question, *_) in EXPERIMENTS.items():
        columns = {column: outcomes for column, outcomes in
                   compare(settings_in(name), seeds, found).items()
                   if any(each.n for each in outcomes[1:])}
        runs = {each.setting.folder(0) for each in chain(*columns.values()) if each.n}
        if runs - shown:  # several experiments may have a run
            shown |= runs
            draw(name, columns, folder / f"{name}.png")
            lines += ["", f"## {name}: {question}", *table_lines(columns), "",
                      f"![{name}]({name}.png)"]
    if not shown:
        raise UserError(f"{folder} has no result of any experiment")
    with written_whole(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    say(path)


def main():
    parser = Parser(description="What many runs say.")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {name: question for name, (question, *_) in EXPERIMENTS.items()} | {
        "curves": "held-out loss of text, or accuracy on a task, of any runs",
        "claims": "each claim: supported, contradicted or undecided here",
        "report": "all tables and figures, in report.md beside the results",
        "pack": "all results in one small file"}
    for name, text in texts.items():
        flag = commands.add_parser(name, help=text).add_argument
        flag("--results", type=Path, default=None if name == "curves" else "results",
             help="a folder, or a packed file (default %(default)s)")
        if name == "curves":
            flag("runs", nargs="+", help="folders, or with --results parts of names")
            flag("--picture", help="a .png, .pdf or .svg (default curves-RUNS.png)")
        elif name == "pack":
            flag("to", help="such as results.jsonl.gz")
        else:
            flag("--seeds", type=number(1, 1000), help="how many (default: as planned)")
        if name in EXPERIMENTS:
            flag("--only", default="", help="a column, or \"column | beginning of names\"")
            flag("--show", action="store_true", help="run nothing, as for a packed file")
    args = parser.parse_args()
    command, results = args.command, args.results
    if command in EXPERIMENTS:
        settings = settings_in(command, args.only)
        if not args.show and not results.is_file():  # nothing is run into a packed file
            results.mkdir(parents=True, exist_ok=True)
            run_all(settings, args.seeds, results)
    with reading(results or ", ".join(args.runs)):  # a record is checked by being used
        found = read_results(results) if results else {
            run: read_run(Path(run)) for run in args.runs}
        if command in EXPERIMENTS:
            columns = compare(settings, args.seeds, found)
            say("\n".join(["", f"{command}: {EXPERIMENTS[command][0]}", *table_lines(columns)]))
            if any(each.n for each in chain(*columns.values())):
                draw(command, columns, (results if results.is_dir() else Path()) / f"{command}.png")
        elif command == "claims":
            say("\n".join(claims_lines(found, args.seeds)))
        elif command == "report":
            report(found, results if results.is_dir() else results.parent, args.seeds)
        elif command == "pack":
            text = "".join(json.dumps({"name": name, **found[name]}) + "\n" for name in found)
            with written_whole(args.to) as file:
                file.write(gzip.compress(text.encode(), mtime=0))
            say(f"{args.to}: {len(found)} runs, {Path(args.to).stat().st_size / 1e6:.2f} MB")
        else:
            runs = {name: found[name] for name in found if any(part in name for part in args.runs)}
            if not runs:
                raise UserError(f"no run in {results} is named like {', '.join(args.runs)}")
            names = "-".join(Path(run).resolve().name for run in args.runs)
            curves(runs, args.picture or f"curves-{names[:100]}.png")


if __name__ == "__main__":
    run_main(main)
