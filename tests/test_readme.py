"""What README shows: its rule is added, its commands are accepted, and what it says of results is
what the packed file says."""
import argparse
import itertools
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import analyze
import train
from conftest import ROOT
from data import Parser
from share import rank_correlation

README, REPORT, REPORT_311 = ((ROOT / name).read_text() for name in (
    "README.md", "assets/report.md", "assets/python-3.11/report.md"))
WORDS = " ".join(README.split())
COMMANDS = re.findall(r"^(?:python|torchrun) .*\.py.*", README, re.MULTILINE)
FOUND = analyze.read_results(ROOT / "assets/results.jsonl.gz")
FOUND_311 = analyze.read_results(ROOT / "assets/python-3.11/results.jsonl.gz")
CLAIMS, CLAIMS_311 = (analyze.claims_lines(found, None) for found in (FOUND, FOUND_311))


def test_a_rule_is_added_in_six_lines(tmp_path):
    function, entry = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len((function + entry).splitlines()) <= 6
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    code = (tmp_path / "data.py").read_text()
    for block, place in ((f"{function}\n\n", "# ----"), (entry, "}\nTASKS = {")):
        after = code.index(place, code.index("def eca("))
        code = code[:after] + block + code[after:]
    (tmp_path / "data.py").write_text(code)

    def python(command):
        return subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True,
                              text=True, capture_output=True, timeout=60).stdout
    row = python("data.py show swap:length=6 -n 1").splitlines()[-1]
    x, answer = (part.split() for part in row.removesuffix("»").split(" | «"))
    assert len(x) == 6 and answer == x[3:] + x[:3]
    said = python("train.py --warmup swap --warmup_steps 2 --data haystack:pairs=2 --steps 2 "
                  "--batch_size 4 --warmup_batch_size 4 --eval_rows 8 --device cpu")
    assert "warm-up    swap: held-out loss" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_readme_are_accepted(command, monkeypatch):
    words = shlex.split(command, comments=True)
    script, *argv = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    if script == "train.py":
        train.parse(argv)
        return

    def parse_args(parser):
        argparse.ArgumentParser.parse_args(parser)
        raise InterruptedError  # it was accepted, and is not to be done
    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(InterruptedError):
        importlib.import_module(script.removesuffix(".py")).main()


@pytest.mark.parametrize("text,folder", [
    (README, ROOT), (REPORT, ROOT / "assets"), (REPORT_311, ROOT / "assets/python-3.11")])
def test_what_is_pointed_to_is_there(text, folder):
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def packed(column, name, experiment, seeds=10):
    """A setting's packed runs by seed, of these at most."""
    setting, = (each for each in analyze.settings_in(experiment)
                if (each.column, each.name) == (column, name))
    folders = {seed: setting.folder(seed) for seed in range(seeds)}
    return {seed: FOUND[folder] for seed, folder in folders.items() if folder in FOUND}


def steps_of(column, name, experiment="starts", seeds=10):
    """Of a setting's packed runs, which have to be there: {seed: steps} of those that found it."""
    runs = packed(column, name, experiment, seeds)
    assert len(runs) == seeds
    steps = {seed: analyze.value_of(run, analyze.STEPS) for seed, run in runs.items()}
    return {seed: each for seed, each in steps.items()
            if each < runs[seed]["result"]["settings"]["steps"]}


def gain_of(lines, claim):
    """What a claim's line says: its gain, the interval's ends, how many seeds."""
    line, = (line for line in lines if line.startswith(f"| {claim} |"))
    words = re.search(r"gain (\S+) \((\S+) to (\S+)\) \| (\d+)", line).groups()
    return [*map(float, words)]


def results_in_words():
    """What README says of results, from the packed file: each has to stand there."""
    starts = {each.name: steps_of(each.column, each.name) for each in analyze.settings_in("starts")
              if each.column == "recall of 15" and each.name != "none"}
    none_15, none_30 = steps_of("recall of 15", "none"), steps_of("recall", "none, steps 13500")
    yield f"| nothing | {len(none_15)} | {len(none_30)}, in 13,500: 11 % right |"
    found = [steps_of(column, "dyck, attn, embeddings random").values()
             for column in ("recall of 15", "recall")]
    words = [f"{len(steps)}, after {min(steps):,} to {max(steps):,}" for steps in found]
    yield f"after brackets {words[1].replace(',', ' of 10 seeds get nine in ten right,', 1)} steps"
    yield f"| brackets | {words[0]} | {words[1]} |"
    norms = steps_of("recall", "dyck, attn,norm, embeddings random")
    yield f"norms moved, too, {len(norms)} of 10 find them"
    rules = {rule: len(steps_of("recall of 15", f"{rule}, attention, positions", experiment))
             for rule, experiment in (("shuffled:dyck", "controls"), ("identity", "table"),
                                      ("set", "table"), ("eca", "table"))}
    yield f"| brackets, their tokens shuffled | {rules['shuffled:dyck']} |"
    yield ("| identity; `set`; rule 110 (31, 31, 98 M tokens; brackets 49 M) | "
           f"{rules['identity']}; {rules['set']}; {rules['eca']} |")
    weights = steps_of("recall of 15", "shuffled", "weights")
    yield f"| brackets, the attention's weights shuffled | {len(weights)} |"
    for words, case in (
            ("30 pairs by {} of {}", ("recall", "dyck, full, embeddings mean", "starts")),
            ("in its place {} of {} seeds find them",
             ("recall of 15", "none, steps 12144", "budgets"))):
        n = len(packed(*case))
        yield words.format(len(steps_of(*case, seeds=n)), n)
    strangers = {(a, b): len(steps_of("recall of 15", f"attention of {a}, MLPs of {b}",
                                      "strangers", seeds=2))
                 for a, b in itertools.permutations((0, 1, 4, 7), 2)}
    own = sum(seed in (0, 1, 4, 7) for seed in starts["dyck, attn,mlp, embeddings random"])
    yield (f"{sum(strangers.values())} of 24 runs find 15 pairs (these four with their own, {own} "
           "of 4)")
    mean = starts["dyck, attn, embeddings mean"]
    yield f"attention with embeddings at the mean finds them in {len(mean)} of 10"
    rates = [packed("recall of 15", each.name, "budgets") for each in
             analyze.settings_in("budgets", "recall of 15 | none, lr")[1:]]
    steps = [analyze.value_of(run, analyze.STEPS) for runs in rates for run in runs.values()]
    yield (f"({len(steps)} of 50 runs were made, of which {sum(n < 6000 for n in steps)} find 15 "
           "pairs)")
    count = {what: sum(len(steps) for name, steps in starts.items() if re.search(what, name))
             for what in ("mlp|full", "random", "mean", "")}
    yield (f"({count[''] - count['mlp|full']} of 40 without, {count['mlp|full']} of 40 with them), "
           f"embeddings at the mean some ({count['random']} fresh, {count['mean']} at the mean)")
    best = sum((2 in steps) + (4 in steps) for steps in starts.values())
    assert f"{best} of 16 runs find 15 pairs, of the others {count[''] - best} of 64" in REPORT
    repeats = sorted(len(steps_of("recall of 15", f"dyck, as published, warm-up {seed}", "repeats",
                                  seeds=3)) for seed in range(10))
    assert repeats[-1] == 3
    yield f"finds 15 pairs three times, the other nine in {sum(repeats[:-1])} of 27 runs"
    not_run = [all("| not run |" in line for line in lines) for lines in zip(CLAIMS, CLAIMS_311)]
    yield f"{sum(not_run)} of the claims were not run yet"
    line, = (line for line in CLAIMS if "rule 110 helps reversed addition" in line)
    numbers = re.findall(r"-?[\d.]+(?=%)", line) + re.findall(r"\| (\d) \|", line)
    yield "published rows: {} to {} % right, a gain of {} points ({} to {}, {} seeds)".format(*numbers)
    for claim in ("set helps code", "set helps English"):
        gain, low, high, seeds = gain_of(CLAIMS, claim)
        yield f"{gain:.3f} bits per byte ({low:.3f} to {high:.3f}, {seeds:.0f} seeds; published"
    gain, low, high, seeds = gain_of(CLAIMS_311, "set helps code")
    yield f"`set` gains {gain:.3f} ({low:.3f} to {high:.3f}, {seeds:.0f} seeds), undecided"
    gain, low, high, seeds = gain_of(CLAIMS_311, "set helps code more than as many tokens of text")
    yield f"code in its place {-gain:.3f} more ({-high:.3f} to {-low:.3f}, {seeds:.0f} seeds;"
    for name in starts:
        if re.search("mlp|full", name):
            runs = packed("recall of 15", name, "starts").values()
            rho, p = rank_correlation([run["share"] for run in runs],
                                      [analyze.value_of(run, analyze.STEPS) for run in runs])
            assert f"{rho:.2f}" in REPORT and rho < 0 and p > 0.05
    yield "named after trials of the same warm-ups, is not beyond chance"


def test_what_is_said_of_results_is_what_the_packed_results_say():
    for words in results_in_words():
        assert words in WORDS, words
    for lines, text in ((CLAIMS, REPORT), (CLAIMS_311, REPORT_311)):
        for line in lines:
            assert line in text, line
