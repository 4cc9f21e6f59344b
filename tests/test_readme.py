"""What README shows: its rule is added, its commands are accepted, and what it says of results is
what the packed file says."""
import argparse
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import analyze
import data
import eval as probes
import model
import train
from conftest import ROOT
from data import Parser
from share import rank_correlation

README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
SCRIPTS = {"data.py": data, "model.py": model, "train.py": train, "eval.py": probes,
           "analyze.py": analyze}
COMMANDS = re.findall(r"^(?:python|torchrun) .*\.py.*", README, re.MULTILINE)


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
    x, answer = row.removesuffix("»").split(" | «")
    x, answer = x.split(), answer.split()
    assert len(x) == 6 and answer == x[3:] + x[:3]
    said = python("train.py --warmup swap --warmup_steps 2 --data haystack:pairs=2 --steps 2 "
                  "--batch_size 4 --warmup_batch_size 4 --eval_rows 8 --device cpu")
    assert "warm-up    swap: held-out loss" in said


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_readme_are_accepted(command, monkeypatch):
    words = shlex.split(command, comments=True)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name, argv = words[place], words[place + 1:]
    if name == "train.py":
        train.parse(argv)
        return

    def parse_args(parser):
        argparse.ArgumentParser.parse_args(parser)
        raise Parsed
    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(Parsed):
        SCRIPTS[name].main()


REPORT = (ROOT / "assets/report.md").read_text()


@pytest.mark.parametrize("text,folder", [(README, ROOT), (REPORT, ROOT / "assets")])
def test_what_is_pointed_to_is_there(text, folder):
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def steps_of(found, column, name, experiment="starts"):
    """(how many seeds of a setting found the needle, of how many, their steps), as packed."""
    setting = next(each for each in analyze.settings_in(experiment)
                   if (each.column, each.name) == (column, name))
    runs = [found[setting.folder(seed)] for seed in range(10) if setting.folder(seed) in found]
    values = [analyze.value_of(run, analyze.STEPS) for run in runs]
    steps = [value for value, run in zip(values, runs)
             if value < run["result"]["settings"]["steps"]]
    return len(steps), len(runs), steps


def results_in_words(found):
    """What README says of results, from the packed file: each has to stand there."""
    ours, n, steps = steps_of(found, "recall", "dyck, attn, embeddings random")
    whole, of, _ = steps_of(found, "recall", "dyck, full, embeddings mean")
    none, all_none, _ = steps_of(found, "recall", "none, steps 13500")
    yield (f"{ours} of {n} seeds have nine in ten values right, after {min(steps):,} to "
           f"{max(steps):,} steps of 10,000")
    yield f"without a warm-up {none} of {all_none} do in 13,500"
    yield f"of 30 pairs in {whole} of {of}"
    found_of = {name: steps_of(found, "recall of 15", name) for name in (
        "none", *(f"dyck, {parts}, embeddings {start}" for start in ("random", "mean")
                  for parts in ("attn", "attn,norm", "attn,mlp", "full")))}
    k, n, steps = found_of["dyck, attn, embeddings random"]
    yield f"{k} of {n} seeds in {min(steps):,} to {max(steps):,} steps"
    yield "{} of {} without in 6,000".format(*found_of["none"][:2])
    yield "after the same brackets with their tokens shuffled {} of {}".format(*steps_of(
        found, "recall of 15", "shuffled:dyck, attention, positions", "controls")[:2])
    yield "with their weights shuffled {} of {}".format(
        *steps_of(found, "recall of 15", "shuffled", "weights")[:2])
    for parts, words in (("attn", "attention"), ("attn,norm", "attention, norms"),
                         ("attn,mlp", "attention, MLPs"), ("full", "everything")):
        cells = ["{} of {}".format(*found_of[f"dyck, {parts}, embeddings {start}"][:2])
                 for start in ("random", "mean")]
        yield f"| {words} | {cells[0]} | {cells[1]} |"
    unrun = sum("| not run |" in line for line in analyze.claims_lines(found, None))
    yield f"{unrun} of the claims were not run yet"
    times = [steps_of(found, "recall of 15", f"dyck, as published, warm-up {seed}", "repeats")[:2]
             for seed in range(10)]
    assert sorted(times) == [(0, 3)] * 7 + [(1, 3)] * 2 + [(3, 3)]
    yield "one of these finds it 3 times, two once, and seven never"
    for setting in analyze.settings_in("starts"):
        runs = [found[setting.folder(seed)] for seed in range(10) if setting.folder(seed) in found]
        if setting.column == "recall of 15" and all("share" in run for run in runs):
            steps = [analyze.value_of(run, analyze.STEPS) for run in runs]
            rho, p = rank_correlation([run["share"] for run in runs], steps)
            assert f"{rho:.2f}" in REPORT and p > 0.05
    yield "does no better than chance"
    for claim in analyze.CLAIMS:
        if claim.text in ("set helps code", "set helps English"):
            settings = {each.name: each for each in analyze.settings_in("controls")
                        if each.column == claim.column}
            base, better = analyze.compare([settings["none"], settings["set"]], None,
                                           found)[claim.column]
            _, _, gain, low, high, *_ = better.against(base)
            yield (f"{gain:.3f} bits per byte ({low:.3f} to {high:.3f}, {better.n} seeds; published "
                   f"{claim.published.split()[1]})")


def test_what_readme_says_of_results_is_what_the_packed_results_say():
    found = analyze.read_results(ROOT / "assets/results.jsonl.gz")
    for words in results_in_words(found):
        assert words in WORDS, words


def test_the_report_has_the_claims_that_the_packed_results_give():
    found = analyze.read_results(ROOT / "assets/results.jsonl.gz")
    for line in analyze.claims_lines(found, None):
        assert line in REPORT, line
