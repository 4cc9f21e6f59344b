"""Experiments, statistics, tables, figures, claims, results on the disk, curves, sweeps."""
import functools
import gzip
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import train
from analyze import compare, permutation_interval, permutation_p, settings_in, table_lines
from conftest import ROOT
from data import UserError, lock
from model import GPT, GPTConfig, parse_size, part_of

PACKED = ROOT / "assets/results.jsonl.gz"


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
    analyze.main()


def named(name, column):
    """{name: setting} of a column of an experiment."""
    return {each.name: each for each in settings_in(name, "quick") if each.column == column}


def setting(column, name, train, *warmups, change=""):
    return analyze.Setting(column, name, train, warmups, change, (), 10)


# Experiments are command lines

@functools.cache
def accepted(flags):
    return train.parse(shlex.split(flags))


@pytest.mark.parametrize("name", analyze.EXPERIMENTS)
def test_every_setting_and_every_warm_up_is_a_command_line_of_train(name, monkeypatch):
    for budget in ("quick", "paper"):
        settings = settings_in(name, budget)
        assert len({(each.column, each.name) for each in settings}) == len(settings)
        for each in settings:
            if "nca" in each.name:
                continue  # kept for its results
            for warmup in each.warmups:
                warm = accepted(warmup)
                assert warm.steps == 0 and warm.warmup != "none"
                taken_up = SimpleNamespace(config=GPTConfig(300, 64, *parse_size(warm.size)))
                monkeypatch.setattr(train, "load", lambda path: (taken_up, {}))
            checkpoints = ("", " --init w.pt", " --attn_from a.pt --mlp_from m.pt")
            given = train.parse(shlex.split(each.train + checkpoints[len(each.warmups)]))
            assert given.warmup == "none"
            assert not each.warmups or parse_size(given.size) == parse_size(warm.size)


def test_folders_are_named_by_flags_in_any_order_and_packed_runs_keep_their_names():
    assert analyze.folder_of(0, "--data code --lr 1") == analyze.folder_of(0, "--lr 1 --data code")
    assert analyze.join("--data code --lr 1", "--lr 2") == "--data code --lr 2"
    for (name, column, of), folder in {
            ("starts", "recall", "dyck, attn, embeddings random"):
                "haystack-dyck_length=64-attn-43ded1d0-s0",
            ("starts", "recall", "none, steps 13500"): "haystack-none-dff050b9-s0"}.items():
        assert named(name, column)[of].folder(0) == folder
    found = set()
    for name, seed in itertools.product(analyze.EXPERIMENTS, range(10)):
        for each in settings_in(name, "quick"):
            warmups = [analyze.folder_of(of, flags) for flags, of in each.warmup_runs(seed)]
            found |= {each.folder(seed), *warmups}
    lost = analyze.read_results(PACKED).keys() - found
    older = "haystack_pairs=15-dyck_length=64-full-shuffled-d5a4a3ca"
    assert {re.sub(r"-s\d+$", "", each) for each in lost} <= {older}


def test_rules_by_tasks_are_compared_after_as_many_tokens():
    for warm in {each.warmups for each in settings_in("tasks", "quick") if each.warmups}:
        s = accepted(*warm)
        rule = train.open_data(s)[1]
        train.stage_of(s, "warmup", rule)  # turns tokens into steps
        tokens = s.warmup_steps * s.warmup_batch_size * rule.block_size
        assert tokens == pytest.approx(49_152_000, rel=1e-3), warm


# Statistics

def brute_force_p(a, b):
    """With exact fractions."""
    values = [Fraction(str(x)) for x in (*a, *b)]

    def difference(places):
        first = sum(values[i] for i in places)
        return abs(first / len(a) - (sum(values) - first) / len(b))

    ways = list(itertools.combinations(range(len(values)), len(a)))
    return sum(difference(way) >= difference(range(len(a))) for way in ways) / len(ways)


@pytest.mark.parametrize("a,b", [
    ([1, 2, 3], [4, 5, 6]), ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]), ([1, 1, 2, 2], [1, 2, 2, 2]),
    ([5, 1], [2, 2, 2, 9, 4]), ([1e6 + 1, 1e6 + 2, 1e6 + 3], [1e6 + 2, 1e6 + 3, 1e6 + 5])])
def test_the_permutation_test_is_exact(a, b):
    assert permutation_p(a, b) == pytest.approx(brute_force_p(a, b), abs=1e-12)
    assert permutation_p(b, a) == pytest.approx(brute_force_p(a, b), abs=1e-12)
    assert permutation_p(a, a) == 1 and math.isnan(permutation_p(a, b[:1]))


def test_of_many_values_some_ways_are_tried_and_p_is_never_zero():
    n, ones, in_a = 14, 12, 8  # of 28 values 12 are ones, 8 of these in a
    a, b = ([1] * k + [0] * (n - k) for k in (in_a, ones - in_a))
    exact = sum(math.comb(ones, k) * math.comb(2 * n - ones, n - k) for k in range(ones + 1)
                if abs(2 * k - ones) >= 2 * in_a - ones) / math.comb(2 * n, n)
    assert permutation_p(a, b) == pytest.approx(exact, abs=0.006)
    assert 0 < permutation_p([0] * n, [1] * n) < 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_the_interval_is_all_shifts_that_the_exact_test_does_not_reject(seed):
    r = np.random.default_rng(seed)
    n, m = ((4, 4), (5, 4), (6, 6), (10, 3))[seed % 4]
    a, b = r.normal(1, 1 + seed % 3, n).round(2), r.normal(0, 1, m).round(2)
    low, high = permutation_interval(a, b)
    for end, outwards in ((low, -1), (high, 1)):
        inside, outside = (end + outwards * step for step in (-1e-6, 1e-6))
        assert brute_force_p(a - round(inside, 9), b) >= 0.05
        assert brute_force_p(a - round(outside, 9), b) < 0.05
    assert (permutation_p(a, b) < 0.05) == (not low <= 0 <= high)
    assert permutation_interval(b, a) == pytest.approx((-high, -low))
    assert permutation_interval(a[:3], b[:3]) == (-math.inf, math.inf), "p is 0.1 at least"
    assert permutation_interval([3] * 6, [1] * 6) == (2, 2)


def test_rank_correlation_is_that_of_ranks_and_its_p_counts_orders():
    rho, p = analyze.rank_correlation([0.1, 0.5, 0.2, 0.9, 0.3], [50, 20, 40, 10, 30])
    assert (rho, p) == (pytest.approx(-1), pytest.approx(2 / math.factorial(5), abs=0.002))
    tied = analyze.rank_correlation([1, 2, 3, 4], [7, 9, 9, 11])[0]  # ranks 1, 2.5, 2.5, 4
    assert tied == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert analyze.rank_correlation([1, 2, 3], [5, 5, 5]) == (0, 1)


# Tables, figures and claims of made-up results

BUDGET = 1000
RECALL = [setting("recall", "none", "--data haystack --warmup none"),
          setting("recall", "set", "--data haystack", "--data haystack --warmup set --steps 0"),
          setting("recall", "late", "--data haystack --warmup none --lr 1")]
TEXT = [setting("code", "none", "--data code --warmup none"),
        setting("code", "dull", "--data code --warmup none --lr 1")]
SOME = {RECALL[0]: (900, BUDGET, 800), RECALL[1]: (100, 300, 200), TEXT[0]: (2.0, 3.0),
        TEXT[1]: (2.5, 3.5)}
LEARNED = ({"learned (share of what can be)": 0.75, "accuracy": 0.5},
           {"above it": 0.1, "above it, the blind": 0.4})  # an older record


def evaluation(step, accuracy=0.2):
    return {"stage": "train", "step": step, "tokens": 9 * step, "val_loss": 1.0,
            "val_accuracy": accuracy}


def record(setting, seed, value, budget=BUDGET):
    """Of a run: of recall learned after so many steps, on text with so many bits per byte, of
    another task with this accuracy at the end."""
    s = {"data": analyze.as_dict(setting.train).get("--data", "code"), "seed": seed,
         "steps": budget, "transfer": "full", "embeddings": "random", "positions": "fit"}
    log = [evaluation(0), evaluation(budget)]
    if setting.column.startswith("recall") and value < budget:
        log = [evaluation(0), evaluation(value, 0.92), evaluation(value + 1, 0.9)]
    accuracy = value if analyze.measure_of(setting.column) is analyze.ACCURACY else 0.9
    result = {"settings": s, "warmup": setting.name, "fingerprint": [seed, 5],
              "val_bits_per_byte": value, "val_loss": 1.0, "val_accuracy": accuracy,
              "tokens": {"procedural": 4500 if setting.warmups else 0, "semantic": 9}}
    return {"result": result, "log": log, "learned": {}}


def made_up(values):
    """{setting: what is measured, one for each seed} -> what read_results gives."""
    found = {}
    for setting, seeds in values.items():
        for seed, value in enumerate(seeds):
            found[setting.folder(seed)] = record(setting, seed, value)
            for flags in setting.warmups:
                warmup = analyze.folder_of(seed, flags)
                found[warmup] = record(setting, seed, 0.0) | {"learned": LEARNED[seed > 0]}
    return found


def kept(found, folder):
    """The same as folders of runs."""
    for name, each in found.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "log.jsonl").write_text("\n".join(map(json.dumps, each["log"])))
        config = {**each["result"], "environment": {"torch": "2.11"}}
        for part, content in (("config", config), ("result", each["result"]),
                              ("learned", each["learned"])):
            (folder / name / f"{part}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("accuracies,steps", [
    ((0.1, 0.9, 0.8, 0.9, 0.9), 300), ((0.1, 0.89, 0.9), BUDGET), ((0.9, 0.9), 0)])
def test_recall_is_measured_by_the_first_of_two_good_evaluations_in_a_row(accuracies, steps):
    run = record(RECALL[0], 0, BUDGET)
    run["log"] = [evaluation(100 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    assert analyze.value_of(run, analyze.STEPS) == steps


def cells(columns):
    """The lines of tables -> {name: [the other cells]}, and what is no table."""
    lines = table_lines(columns)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if "|" in line[:1]]
    return {row[0]: row[1:] for row in rows}, [line for line in lines if "|" not in line[:1]]


def test_gains_are_fewer_steps_fewer_bits_and_more_accuracy():
    table, notes = cells(compare(RECALL, 3, made_up(SOME)))
    assert table["set"] == ["200", "90.0%", "3 of 3 found", "at least 700", "-inf to inf", "0.1000",
                            "0.0 M", "75%, 50% right"]  # of older ones 1 - 0.1 / 0.4
    assert table["none"][:4] == ["900", "90.0%", "2 of 3 found", ""]
    assert "no result yet of recall: late" in notes
    table, _ = cells(compare(TEXT, 3, made_up(SOME)))
    assert table["dull"][:4] == ["3.0000", "90.0%", "n = 2", "-0.5000"]
    sorting = named("tasks", "sorting")
    both = {sorting["none"]: (0.5, 0.6), sorting["dyck, whole"]: (0.8, 0.9)}
    assert cells(compare(both, 2, made_up(both)))[0]["dyck, whole"][3] == "30.0%"
    for base, ours, words in (((900, 800), (100, 200), "700"),  # it is known where both got there
                              ((BUDGET, BUDGET), (100, BUDGET), "450")):
        table, _ = cells(compare(RECALL[:2], 2, made_up({RECALL[0]: base, RECALL[1]: ours})))
        assert table["set"][3] == words


def test_never_is_the_smaller_budget_for_both_and_a_warm_up_may_count_as_steps():
    found = {RECALL[0].folder(0): record(RECALL[0], 0, 3000, budget=3000),
             RECALL[1].folder(0): record(RECALL[1], 0, 400)}
    base, ours = compare(RECALL[:2], 1, found)["recall"]
    assert ours.against(base)[:2] == (1000, 400)
    ours.count_warmup()
    assert ours.values == [900] and ours.budget == 1500, "4,500 tokens are 500 steps of 9"
    assert ours.against(base)[:2] == (1500, 900)


def test_runs_on_other_data_than_the_first_setting_are_left_out_and_named():
    found = made_up(SOME)
    found[TEXT[1].folder(1)]["result"]["fingerprint"] = [7, 5]
    table, notes = cells(compare(TEXT, 3, found))
    assert table["none"][:3] == ["2.5000", "90.0%", "n = 2"] and table["dull"][0] == "2.5000"
    assert "left out: code | dull | seeds [1]: not the data of none" in notes[-1]


@pytest.mark.parametrize("name", ["starts", "tasks", "controls", "heads"])
def test_an_experiment_has_a_table_and_a_figure_though_half_is_missing(name, tmp_path):
    settings = settings_in(name, "quick")
    there = {each.folder(0) for each in settings[::2]}
    values = {each: (0.1, 0.2) for each in settings if each.folder(0) in there}
    columns = compare(settings, 2, made_up(values))
    text = "\n".join(table_lines(columns))
    assert all(each.setting.name in text for each in sum(columns.values(), []))
    analyze.draw(name, columns, tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def drawn(monkeypatch, name, columns):
    """All words in a figure, and the values of its dots."""
    words, dots = [], []

    def look(figure, path):
        words.extend(each.get_text() for each in figure.findobj(lambda a: hasattr(a, "get_text")))
        lines = itertools.chain(*(axis.lines for axis in figure.axes))
        dots.extend(list(line.get_xdata()) for line in lines if line.get_marker() == "o")

    monkeypatch.setattr(analyze, "keep_figure", look)
    analyze.draw(name, columns, "a.png")
    return words, dots


def test_figures_speak_words_and_show_every_seed(monkeypatch):
    words, dots = drawn(monkeypatch, "table", compare(RECALL + TEXT, 3, made_up(SOME)))
    assert dots == [list(values) for values in SOME.values()]
    assert {"recall of 30 pairs", "never", "no warm-up", "2 of 3 found", "after set",
            "3 of 3 found", "n = 2", "bits per byte"} <= set(words)
    assert analyze.in_words("shuffled:dyck:k=3, attn,norm, lr 1e-3") == (
        "after shuffled brackets (k=3): attention and norms, learning rate 1e-3")
    assert analyze.in_words("none, lr_ramp 0") == "no warm-up: ramp 0"
    values = {each: (0.5,) if each.name == "none" else (0.75, 0.8, 0.7)
              for each in settings_in("tasks", "quick")
              if each.column == "reversed_addition" and each.name in ("none", "eca, whole")}
    columns = compare(settings_in("tasks", "quick"), 3, made_up(values))
    words, _ = drawn(monkeypatch, "tasks", columns)
    assert "+25.0 (n = 1)\npaper +14.6" in words  # 91.0 - 76.4
    assert "not run\npaper +77.6" in words  # set, attention alone, before recall: 88.9 - 11.3
    del columns["recall of 15"]  # as report and --only draw it
    assert "+25.0 (n = 1)\npaper +14.6" in drawn(monkeypatch, "tasks", columns)[0]


LATE, SOON, MIDDLE = (900, BUDGET, 950, 920, BUDGET, 900), (90, 100, 95, 92, 90, 91), (400,) * 6
EVEN = (2.0, 2.001, 2.002, 2.0, 2.001, 2.0)


@pytest.mark.parametrize("column,worse,better,verdict", [
    ("recall", LATE, SOON, "supported"), ("recall", SOON, MIDDLE, "contradicted"),
    ("recall", MIDDLE, MIDDLE[1:] + (410,), "undecided"), ("recall", (), SOON, "not run"),
    ("recall", MIDDLE[:3], SOON[:3], "undecided"), ("english", EVEN, (1.9,) * 6, "supported"),
    ("english", EVEN, EVEN[::-1], "no difference beyond the margin"),
    ("english", (2.0, 2.2, 2.1, 2.3, 1.9, 2.0), (2.01, 2.2, 2.0, 2.3, 1.9, 2.01), "undecided")])
def test_a_claim_is_decided_by_its_two_settings(column, worse, better, verdict):
    settings = named("controls", column)
    found = made_up({settings["none"]: worse, settings["set"]: better})
    claim = analyze.Claim("more", "", "controls", column, "set", "none")
    measured, n, _, said = analyze.judge(claim, 6, found)
    assert said == verdict and n == str(len(worse))
    if worse and column == "recall":
        assert measured.startswith(f"{np.mean(worse):,.0f} (none) -> {np.mean(better):,.0f} steps")


def test_claims_can_be_decided_by_their_seeds():
    assert len(analyze.CLAIMS) <= 20
    for claim in analyze.CLAIMS:
        settings = named(claim.experiment, claim.column)
        n = min(settings[name].seeds for name in (claim.better, claim.worse))
        assert 2 / math.comb(2 * n, n) < 0.05 / len(analyze.CLAIMS), "p could never be so small"


def test_the_report_has_claims_and_tables_and_keeps_what_a_person_wrote(
        tmp_path, monkeypatch, refused):
    assert "no result" in refused(analyze, "report", "--results", tmp_path)
    names = {claim.experiment for claim in analyze.CLAIMS}
    settings = [each for name in sorted(names) for each in settings_in(name, "quick")]
    folder = kept(made_up({each: (0.1, 0.2) for each in settings}), tmp_path)
    path, ours, pictures = folder / "report.md", "# Ours\n\nWörds. \n\n", []
    path.write_text(f"{ours}{analyze.MARK}\nold", "utf-8")
    monkeypatch.setattr(analyze, "draw", lambda name, columns, path: pictures.append(path.name))
    call(monkeypatch, "report", "--results", folder, "--seeds", 2)
    text = path.read_text("utf-8")
    assert text.startswith(f"{ours}{analyze.MARK}\n\n# What was found\n") and "\nold" not in text
    assert "not run |" not in text, "each claim's settings are in its experiment"
    assert all(f"| {claim.text} |" in text for claim in analyze.CLAIMS)
    for name in names:
        assert f"## {name} (quick)" in text and f"![{name}]({name}-quick.png)" in text
        assert f"{name}-quick.png" in pictures


# Results on the disk, curves

def test_what_is_packed_gives_the_same_table_and_counts_as_run(tmp_path, monkeypatch, capsys):
    there = named("starts", "recall of 15")
    moving = [there["none"], there["dyck, full, embeddings mean"],
              there["dyck, attn, embeddings mean"]]
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: moving)
    monkeypatch.setattr(analyze, "share_that_differs", lambda setting, seed, results: 0.1 * seed)
    monkeypatch.setattr(analyze, "call_train", None)  # nothing may be run
    folder = kept(made_up({each: (500, 400, 300, 200) for each in moving}), tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").mkdir()
    call(monkeypatch, "pack", "packed/all.gz", "--results", folder)
    found = analyze.read_results("packed/all.gz").values()
    assert all(each["environment"] == {"torch": "2.11"} for each in found)
    tables = []
    for order in ((folder, "--show"), ("packed/all.gz", "--show"), ("packed", "--seeds", 4)):
        capsys.readouterr()
        call(monkeypatch, "table", "--results", *order)
        told = capsys.readouterr().out
        tables.append([line for line in told.splitlines() if line.startswith("| dyck")])
    assert tables[0] == tables[1] == tables[2] and "0 runs to go" in told
    (line,) = [line for line in told.splitlines() if "rank correlation" in line]
    assert "full" in line and "rank correlation -1.00, p 0.08" in line  # p is 2 of 4!


def test_a_table_and_figure_come_though_a_notebook_names_its_own_backend(script, tmp_path):
    done = script("analyze.py", *"strangers --show --only none --results".split(), PACKED,
                  cwd=tmp_path, env={"MPLBACKEND": "module://nosuch"})
    assert done.returncode == 0 and "| none | 6,000 |" in done.stdout, done.stderr
    assert (tmp_path / "strangers-quick.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_hides_a_failure_that_was_packed(tmp_path):
    folder = kept({"zz": GOOD}, tmp_path)
    (tmp_path / "zzz.gz").write_bytes(gzip.compress(b'{"name": "zz", "failed": "no room"}'))
    assert analyze.read_results(folder)["zz"]["result"] == GOOD["result"]


def test_a_folder_that_is_not_there_is_no_empty_one(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.gz").write_bytes(b"precious")
    for order in (("pack", "good.gz"), ("claims",), ("report",), ("table", "--show"),
                  ("curves", "x")):
        assert "typo" in refused(analyze, *order, "--results", "typo")
    assert "packed file" in refused(analyze, "table", "--results", "good.gz")
    assert (tmp_path / "good.gz").read_bytes() == b"precious" and not (tmp_path / "typo").exists()


def test_pack_and_curves_write_onto_no_pipe_or_device(tmp_path, refused):
    folder, pipe = kept(made_up({RECALL[0]: (500,)}), tmp_path / "r"), tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "not a file" in refused(analyze, "pack", pipe, "--results", folder)
    assert "not a file" in refused(analyze, "curves", folder / RECALL[0].folder(0), "--picture",
                                   pipe)


GOOD = record(RECALL[0], 0, 500)


@pytest.mark.parametrize("name,content", [
    ("r.gz", b"no"), ("r.gz", gzip.compress(b"[" * 200_000)), ("r.gz", gzip.compress(b"[1]")),
    ("r.gz", gzip.compress(json.dumps(GOOD).encode())[:-9]), ("result.json", b"{"),
    ("r.gz", gzip.compress(json.dumps({"name": RECALL[0].folder(0), "result": {}}).encode())),
    ("config.json", b"\xff"), ("learned.json", b"{"), ("log.jsonl", b"[1]"),
    ("result.json", json.dumps(GOOD["result"] | {"val_accuracy": "x"}).encode())])
def test_a_damaged_result_is_refused(name, content, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: RECALL)
    folder = kept({} if name == "r.gz" else {RECALL[0].folder(0): GOOD}, tmp_path)
    (folder / ("" if name == "r.gz" else RECALL[0].folder(0)) / name).write_bytes(content)
    assert str(tmp_path) in refused(analyze, "table", "--show", "--results", tmp_path)


def test_curves_draw_each_run_and_the_mean_over_seeds(tmp_path, monkeypatch, refused, capfd):
    runs = made_up({TEXT[0]: (2.0, 3.0), TEXT[1]: (2.0, 2.1)})
    for i, each in enumerate(runs.values()):
        each["result"]["warmup"] = "set" if i < 2 else "none"
        each["result"]["settings"]["steps"] += i // 2
        each["log"] = [evaluation(step) | {"val_loss": 9 - i - step} for step in range(4 - i // 3)]
    folder, found = kept(runs, tmp_path), {}
    for path in folder.glob("*/result.json"):
        path.unlink()  # they may be looked at before they have ended

    def look(figure, path):
        found["path"] = path
        for line in figure.axes[0].lines:
            label = "" if line.get_label().startswith("_") else line.get_label()
            found.setdefault(label, []).append(list(line.get_ydata()))

    with monkeypatch.context() as patched:
        patched.setattr(analyze, "keep_figure", look)
        call(patched, "curves", *(folder / name for name in runs))
    assert found == {
        "path": f"curves-{'-'.join(runs)[:100]}.png",
        "": [[8, 7, 6], [7, 6, 5], [6, 5, 4], [5, 4]],
        "no warm-up (n = 2); no mean, since they end at different steps": [[]],
        "after set: everything, positions that fit (n = 2)": [[7.5, 6.5, 5.5]]}
    assert "warning: not only warm-up and seed differ, but steps (1000, 1001)\n" in (
        capfd.readouterr().out)
    assert "config.json" in refused(analyze, "curves", tmp_path)
    last = folder / list(runs)[2]
    config = json.loads((last / "config.json").read_text())
    docs = config | {"settings": config["settings"] | {"data": "docs"}}
    for content, word in (({}, "cannot read"), (docs, "different data")):
        (last / "config.json").write_text(json.dumps(content))
        assert word in refused(analyze, "curves", *(folder / name for name in runs))
    (last / "log.jsonl").write_text('{"stage": "warmup", "step": 1}')
    assert "no evaluation of its training yet" in refused(analyze, "curves", last)


# Changed weights

SHARP, BLURRED = {(0, 1), (1, 2)}, {(0, 3), (1, 0)}  # by these entropies
BLUR = np.array([[0.5, 0.1, 0.6, 0.9], [0.8, 0.4, 0.2, 0.7]])
HEADS = set(np.ndindex(BLUR.shape))


def before_and_after(change):
    """The parameters of a model of 2 layers of 4 heads, 8 wide, before and after a change."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 12, 2, 4, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    analyze.change_weights(model, change, 1, BLUR)
    return before, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("change,promise", [
    ("shuffled", lambda was, now: torch.equal(now.flatten().sort()[0], was.flatten().sort()[0])),
    ("redrawn", lambda was, now: abs(now.std() / was.std() - 1) < 0.1
     and abs(now.mean() - was.mean()) < 0.1 and (now - was).std() > was.std()),
    ("noise 0.5", lambda was, now: abs((now - was).std() / was.std() - 0.5) < 0.05),
    ("scaled 2", lambda was, now: torch.equal(now, 2 * was))])
def test_a_change_is_to_attention_and_mlps_alone_and_keeps_what_it_promises(change, promise):
    before, after = before_and_after(change)
    for name, was in before.items():
        if part_of(name) not in ("attn", "mlp"):
            assert torch.equal(after[name], was), name
        elif was.numel() > 1000:
            assert not torch.equal(after[name], was) and promise(was, after[name]), name


@pytest.mark.parametrize("change,wanted", [
    ("without sharp", SHARP), ("without blurred", BLURRED), ("without random", 2),
    ("only sharp", HEADS - SHARP), ("only blurred", HEADS - BLURRED), ("only random", 6)])
def test_heads_are_replaced_by_their_entropy_and_nothing_else_is(change, wanted):
    before, after = before_and_after(change)
    replaced = set()
    for layer, head in HEADS:
        inside = slice(head * 8, head * 8 + 8)
        same = {torch.equal(*(each[f"h.{layer}.attn.c_attn.{key}"].unflatten(0, (3, 32))[:, inside]
                              for each in (before, after))) for key in ("weight", "bias")}
        same.add(torch.equal(*(each[f"h.{layer}.attn.c_proj.weight"][:, inside]
                               for each in (before, after))))
        assert len(same) == 1, "all of a head or nothing"
        if same == {False}:
            replaced.add((layer, head))
    assert replaced == wanted or len(replaced) == wanted
    assert all(torch.equal(before[name], after[name]) for name in before
               if "c_attn" not in name and "attn.c_proj.weight" not in name)


# Sweeps

def small(prose, steps=4):
    flags = (f"--data {shlex.quote(str(prose))} --size 1_2_8 --block_size 32 --batch_size 4 "
             f"--eval_rows 4 --steps {steps} --device cpu")
    warmup = ("--data haystack --size 1_2_8 --warmup set:length=4 --warmup_steps 3 "
              "--warmup_batch_size 4 --steps 0 --device cpu")
    return [setting("prose", "none", f"{flags} --warmup none"),
            setting("prose", "set", flags, warmup),
            setting("prose", "shuffled", flags, warmup, change="shuffled"),
            setting("prose", "bad", f"{flags} --warmup none --size 3_2_5")]


def test_a_sweep_runs_what_is_missing_and_says_what_failed(prose, tmp_path, monkeypatch, capsys):
    settings = small(prose)
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: settings)
    monkeypatch.setattr(analyze, "value_of", lambda record, measure: record["result"]["val_loss"])
    folder = tmp_path / "new"
    order = ("weights", "--seeds", 1, "--jobs", 2, "--results", folder)
    call(monkeypatch, *order)
    told = capsys.readouterr().out
    assert "4 runs to go" in told and re.search("no result yet of .*: bad\n", told)
    assert "bad | seed 0: failed: exit status 2: error: a width of 5 is no multiple" in told
    results = [json.loads((folder / each.folder(0) / "result.json").read_text())
               for each in settings[:3]]
    assert len({result["val_loss"] for result in results}) == 3
    assert [result["tokens"]["procedural"] for result in results] == [0, 108, 108]  # 3 x 4 x 9
    assert results[2]["warmup"] == "set:length=4 (shuffled)"
    (warmup,) = folder.glob("warmup-*")
    assert not list(folder.glob("*.changed.pt")) and (warmup / "learned.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    call(monkeypatch, *order)
    assert "1 runs to go" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}


def test_an_interrupted_sweep_goes_on(prose, tmp_path, monkeypatch, capsys):
    setting = small(prose, steps=2000)[0]
    code = (f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); import analyze, data\n"
            # A shell ignores it for what it starts with "&".
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"setting = analyze.Setting(*{tuple(setting)!r})\n"
            "analyze.settings_in = lambda name, budget: [setting]\ndata.run_main(analyze.main)")
    sweep = subprocess.Popen([sys.executable, "-c", code, "table", "--seeds", "2", "--results",
                              str(tmp_path)], start_new_session=True, stdout=subprocess.DEVNULL)
    run = tmp_path / setting.folder(0)
    while not (run / "ckpt.pt").exists() and sweep.poll() is None:
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(60) == 130 and not (run / "result.json").exists()
    assert not (tmp_path / setting.folder(1)).exists()
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: [setting])
    monkeypatch.setattr(analyze, "value_of", lambda record, measure: record["result"]["val_loss"])
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    assert "seed 0: done" in capsys.readouterr().out and (run / "result.json").exists()


def test_two_sweeps_or_two_runs_are_never_in_one_folder(prose, tmp_path, monkeypatch, capfd):
    pytest.importorskip("fcntl")
    settings = small(prose)[:1]
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: settings)
    with lock(tmp_path / ".lock"), pytest.raises(UserError, match="another process"):
        call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    with lock(tmp_path / settings[0].folder(0) / ".lock"):  # a run that outlived its sweep
        call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    assert "failed: exit status 75: error: another process" in capfd.readouterr().out


@pytest.mark.parametrize("only,names", [
    ("recall", ["none", "set", "late"]), ("recall of 15", ["none", "set"]),
    ("set", ["none", "set", "none", "set"]), ("recall | s", ["none", "set"]), ("ecall", None)])
def test_a_part_of_an_experiment_keeps_what_it_is_compared_with(only, names, monkeypatch, refused):
    fifteen = [each._replace(column="recall of 15") for each in RECALL[:2]]
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: RECALL + fifteen + TEXT)
    if names is None:
        assert "--only ecall" in refused(analyze, "table", "--show", "--only", only)
    else:
        part = analyze.part_of_experiment("table", "quick", only)
        assert [each.name for each in part] == names


def test_the_share_that_differs_is_of_the_states_that_a_run_begins_with(tmp_path):
    warm = ("--data haystack --size 1_2_8 --warmup set:length=4 --warmup_steps 1 "
            "--warmup_batch_size 4 --steps 0 --device cpu")
    run = setting("recall of 15", "x", "--data haystack:pairs=3 --size 1_2_8 --transfer full "
                  "--embeddings random --positions fit", warm)
    analyze.call_train(warm, tmp_path / analyze.folder_of(5, warm), 5)
    share = analyze.share_that_differs(run, 5, tmp_path)
    warmup = tmp_path / analyze.folder_of(5, warm) / "warmup.pt"
    s = train.parse(shlex.split(f"{run.train} --init {warmup} --seed 5 --device cpu"))
    data, _ = train.open_data(s)
    model = train.new_model(data, s.size, s.tied, s.dropout, s.seed).eval()
    train.start_from_checkpoints(model, s)
    states = []
    with torch.no_grad():
        for i in range(1000):  # a row at a time; the answer's token is the only one that counts
            x, y = data.val[i]
            states.append(model.states(x[None])[0, y.tolist().index(max(y.tolist()))].numpy())
    states = np.array(states)
    apart = ((states - states.mean(0)) ** 2).sum() / (states ** 2).sum()
    assert share == pytest.approx(apart, rel=1e-3) and 0 < share < 1
