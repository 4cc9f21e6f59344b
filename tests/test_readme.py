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


def steps_of(found, column, name, experiment="starts", seeds=range(10)):
    """(how many seeds of a setting found the needle, of how many, their steps), as packed."""
    setting = next(each for each in analyze.settings_in(experiment)
                   if (each.column, each.name) == (column, name))
    runs = [found[setting.folder(seed)] for seed in seeds if setting.folder(seed) in found]
    values = [analyze.value_of(run, analyze.STEPS) for run in runs]
    steps = [value for value, run in zip(values, runs)
             if value < run["result"]["settings"]["steps"]]
    return len(steps), len(runs), steps


def results_in_words(found):
    """What README says of results, from the packed file: each has to stand there."""
    ours, n, steps = steps_of(found, "recall", "dyck, attn, embeddings random")
    none, all_none, _ = steps_of(found, "recall", "none, steps 13500")
    of_15 = {name: steps_of(found, "recall of 15", name) for name in (
        "none", *(f"dyck, {parts}, embeddings {start}" for start in ("random", "mean")
                  for parts in ("attn", "attn,norm", "attn,mlp", "full")))}
    best, m, soon = of_15["dyck, attn, embeddings random"]
    assert n == m == all_none == of_15["none"][1] == 10
    yield f"| nothing | {of_15['none'][0]} | {none}, in 13,500: 11 % right, guessing 13 |"
    yield (f"| brackets | {best}, after {min(soon):,} to {max(soon):,} | {ours}, after "
           f"{min(steps):,} to {max(steps):,} |")
    yield "norms moved, too, {} of {} find them".format(
        *steps_of(found, "recall", "dyck, attn,norm, embeddings random")[:2])
    others = {}
    for name, experiment in (("shuffled:dyck", "controls"), ("identity", "table"), ("set", "table"),
                             ("eca", "table")):
        others[name], m, _ = steps_of(found, "recall of 15", f"{name}, attention, positions",
                                      experiment)
        assert m == 10
    yield f"| brackets, their tokens shuffled | {others['shuffled:dyck']} |"
    yield "| {}; {}; {} |".format(*list(others.values())[1:])
    yield ("| brackets, the attention's weights shuffled | {} |".format(
        steps_of(found, "recall of 15", "shuffled", "weights")[0]))
    yield "30 pairs by {} of {}".format(*steps_of(found, "recall", "dyck, full, embeddings mean")[:2])
    sums = {what: sum(k for name, (k, _, _) in of_15.items() if re.search(what, name))
            for what in ("attn(,norm)?, ", "mlp|full", "random", "mean")}
    yield "({} of 40 without, {} of 40 with them), embeddings at the mean some ({} and {})".format(
        *sums.values())
    times = [steps_of(found, "recall of 15", f"dyck, as published, warm-up {seed}", "repeats",
                      range(3))[:2] for seed in range(10)]
    assert all(m == 3 for _, m in times) and sorted(times)[-1] == (3, 3)
    yield (f"one warm-up finds 15 pairs three times, the other nine in "
           f"{sum(k for k, _ in times) - 3} of 27 runs")
    best = [sum(steps_of(found, "recall of 15", name, seeds=seeds)[0] for name in of_15)
            for seeds in ((2, 4), (0, 1, 3, 5, 6, 7, 8, 9))]
    yield "({} of 16 runs find 15 pairs, the others' {} of 64)".format(*best)
    unrun = sum("| not run |" in line for line in analyze.claims_lines(found, None))
    yield f"{unrun} of the claims were not run yet"
    for setting in analyze.settings_in("starts"):
        runs = [found[setting.folder(seed)] for seed in range(10) if setting.folder(seed) in found]
        if setting.column == "recall of 15" and all("share" in run for run in runs):
            steps = [analyze.value_of(run, analyze.STEPS) for run in runs]
            rho, p = rank_correlation([run["share"] for run in runs], steps)
            assert f"{rho:.2f}" in REPORT and rho < 0 and p > 0.05
    yield "as foretold in all four starts, in none beyond chance"
    for claim in analyze.CLAIMS:
        if claim.text in ("set helps code", "set helps English"):
            settings = {each.name: each for each in analyze.settings_in("controls")
                        if each.column == claim.column}
            base, better = analyze.compare([settings["none"], settings["set"]], None,
                                           found)[claim.column]
            _, _, gain, low, high, *_ = better.against(base)
            yield (f"{gain:.3f} bits per byte ({low:.3f} to {high:.3f}, {better.n} seeds; "
                   f"published")


def test_what_readme_says_of_results_is_what_the_packed_results_say():
    found = analyze.read_results(ROOT / "assets/results.jsonl.gz")
    for words in results_in_words(found):
        assert words in WORDS, words


def test_the_report_has_the_claims_that_the_packed_results_give():
    found = analyze.read_results(ROOT / "assets/results.jsonl.gz")
    for line in analyze.claims_lines(found, None):
        assert line in REPORT, line
