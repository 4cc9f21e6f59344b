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
from analyze import Setting, compare, permutation_interval, permutation_p, settings_in, table_lines
from conftest import ROOT
from data import Busy, UserError, lock
from model import GPT, GPTConfig, parse_size, part_of


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
    analyze.main()


# --------------------------------------------------------------------------------------------------
# Experiments are command lines

EVERY = list(itertools.product(analyze.EXPERIMENTS, ("quick", "paper")))


@functools.cache
def accepted(flags):
    return train.parse(shlex.split(flags))[0]


@pytest.mark.parametrize("name,budget", EVERY)
def test_every_setting_and_every_warm_up_is_a_command_line_of_train(name, budget, monkeypatch):
    settings = settings_in(name, budget)
    assert len({(each.column, each.name) for each in settings}) == len(settings)
    first = {each.column: each for each in reversed(settings)}
    assert not any(each.warmup for each in first.values()), "what the others are compared with"
    for each in settings:
        if "nca" in each.name:
            continue  # kept for its results
        flags = each.train
        for warmup in filter(None, (each.warmup, each.mlp_from)):
            warm = accepted(warmup)
            assert warm.steps == 0 and warm.warmup != "none"
            taken_up = SimpleNamespace(config=GPTConfig(300, 64, *parse_size(warm.size)))
            monkeypatch.setattr(train, "load", lambda path: (taken_up, {}))
        if each.warmup:
            flags += " --attn_from a.pt --mlp_from m.pt" if each.mlp_from else " --init w.pt"
        given, _ = train.parse(shlex.split(flags))
        assert given.warmup == "none"
        assert not each.warmup or parse_size(given.size) == parse_size(warm.size)


@pytest.mark.parametrize("name,budget,column,setting,folder", [
    ("controls", "quick", "recall of 15", "none",
     "haystack_pairs=15-none-71452a10-s0"),
    ("controls", "quick", "recall of 15", "dyck",
     "haystack_pairs=15-dyck_length=64-full-89c4787f-s0"),
    ("table", "quick", "recall of 15", "dyck, attention, positions",
     "haystack_pairs=15-dyck_length=64-attn-24611e66-s0"),
    ("weights", "quick", "recall of 15", "shuffled",
     "haystack_pairs=15-dyck_length=64-attn-shuffled-9f502b6f-s0"),
    ("strangers", "quick", "recall of 15", "attention of 0, MLPs of 7",
     "haystack_pairs=15-dyck_length=64-a31ad4a5-s0"),
    ("controls", "quick", "code", "set",
     "code-set_length=64-9ed09456-s0"),
    ("tuned", "quick", "english", "set, 1e-3, ramp 0",
     "docs-set_length=64-70b5383a-s0"),
    ("controls", "paper", "english", "set",
     "c4-set_length=64-a7f05991-s0")])
def test_folders_keep_their_names(name, budget, column, setting, folder):
    (found,) = [each for each in settings_in(name, budget)
                if (each.column, each.name) == (column, setting)]
    assert found.folder(0) == folder


def test_every_packed_run_has_its_setting():
    with gzip.open(ROOT / "assets/results.jsonl.gz", "rt") as file:
        packed = {json.loads(line)["name"] for line in file}
    named = set()
    for name, seed in itertools.product(analyze.EXPERIMENTS, range(10)):
        for each in settings_in(name, "quick"):
            warmups = each.warmups(seed)
            named |= {each.folder(seed), *(analyze.folder_of(of, flags) for flags, of in warmups)}
    lost = {re.sub(r"-s\d+$", "", each) for each in packed - named}
    assert lost <= {"haystack_pairs=15-dyck_length=64-full-shuffled-d5a4a3ca"}, "an older experiment"


def test_the_same_flags_are_one_run_whatever_the_setting_is_called():
    settings = [each for name, budget in EVERY for each in settings_in(name, budget)]
    folders, flags = {}, {}
    for each in settings:
        said = tuple(sorted(analyze.as_dict(part).items())
                     for part in (each.train, each.warmup, each.mlp_from))
        said = repr((said, each.change, each.warmup_seeds))
        folders.setdefault(each.folder(3), set()).add(said)
        flags.setdefault(said, set()).add(each.folder(3))
    # Of seed 3 the warm-up of seed 3 is its own, whether that is said or not.
    own = [said for said in folders.values() if len(said) > 1]
    assert all({each.replace("(3,)", "()") for each in said} == {min(said)} for said in own)
    assert max(map(len, flags.values())) == 1, "the same flags in two folders"
    assert settings[0].folder(0) != settings[0].folder(1)
    assert (Setting("a", "b", "--data code --lr 1").folder(0)
            == Setting("c", "d", "--lr 1 --data code").folder(0))
    assert analyze.join("--data code --lr 1", "--lr 2") == "--data code --lr 2"


def test_rules_by_tasks_are_compared_after_as_many_tokens():
    for each in settings_in("tasks", "quick"):
        if each.warmup:
            warm = accepted(each.warmup)
            size = train.open_data(warm)[1].block_size
            train.stage_of(warm, "warmup", size)  # turns tokens into steps
            tokens = warm.warmup_steps * warm.warmup_batch_size * size
            assert tokens == pytest.approx(49_152_000, rel=1e-3), each.name


# --------------------------------------------------------------------------------------------------
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
    ([1, 2, 3], [4, 5, 6]), ([1, 2], [3, 4]), ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]),
    ([0.3, 0.1, 0.2], [0.4, 0.2, 0.3]), ([1, 1, 2, 2], [1, 2, 2, 2]), ([5, 1], [2, 2, 2, 9, 4]),
    ([-2.31, -2.30, -2.33], [-2.30, -2.29, -2.28]), ([0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.7]),
    ([1e6 + 1, 1e6 + 2, 1e6 + 3], [1e6 + 2, 1e6 + 3, 1e6 + 5]), ([0, 0, 0, 0], [0, 0, 0, 1e-4])])
def test_the_permutation_test_is_exact(a, b):
    assert permutation_p(a, b) == pytest.approx(brute_force_p(a, b), abs=1e-12)
    assert permutation_p(b, a) == pytest.approx(brute_force_p(a, b), abs=1e-12)


def test_identical_samples_give_one_and_fewer_than_two_values_nothing():
    for a in ([0.1, 0.7, 0.4], [0.99] * 5, [0, 0]):
        assert permutation_p(a, a) == 1
    for a, b in (([1], [2, 3]), ([2, 3], [1]), ([], [1, 2])):
        assert math.isnan(permutation_p(a, b))


def test_of_many_values_some_ways_are_tried_and_p_is_never_zero():
    n, ones, in_a = 14, 12, 8  # of 28 values 12 are ones, 8 of these in a
    a, b = ([1] * k + [0] * (n - k) for k in (in_a, ones - in_a))
    exact = sum(math.comb(ones, k) * math.comb(2 * n - ones, n - k) for k in range(ones + 1)
                if abs(2 * k - ones) >= 2 * in_a - ones) / math.comb(2 * n, n)
    assert permutation_p(a, b) == pytest.approx(exact, abs=0.006)
    assert 0 < permutation_p([0] * n, [1] * n) < 1e-3


def test_p_is_uniform_where_there_is_no_difference_even_if_values_come_in_two_heaps():
    r, tried = np.random.default_rng(0), 800
    heaps = r.choice([0.14, 0.99], (tried, 12)) + 0.01 * r.random((tried, 12))
    p = np.array([permutation_p(values[:6], values[6:]) for values in heaps])
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert abs((p <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / tried)


@pytest.mark.parametrize("seed", range(12))
def test_the_interval_is_all_shifts_that_the_exact_test_does_not_reject(seed):
    r = np.random.default_rng(seed)
    n, m = ((4, 4), (5, 4), (6, 6), (10, 3))[seed % 4]
    a, b = r.normal(1, 1 + seed % 3, n).round(2), r.normal(0, 1, m).round(2)
    low, high = permutation_interval(a, b)
    assert low < a.mean() - b.mean() < high
    for end, outwards in ((low, -1), (high, 1)):
        inside, outside = (end + outwards * step for step in (-1e-6, 1e-6))
        assert brute_force_p(a - round(inside, 9), b) >= 0.05
        assert brute_force_p(a - round(outside, 9), b) < 0.05
    assert (permutation_p(a, b) < 0.05) == (not low <= 0 <= high)
    assert permutation_interval(b, a) == pytest.approx((-high, -low))
    assert permutation_interval(a + 3, b) == pytest.approx((low + 3, high + 3))


def test_the_interval_of_few_or_equal_values():
    assert permutation_interval([1, 2, 3], [7, 8, 9]) == (-math.inf, math.inf), "p is 0.1 at least"
    assert permutation_interval([3] * 6, [1] * 6) == (2, 2)
    assert all(map(math.isnan, permutation_interval([1], [2, 3])))


def test_the_interval_holds_the_truth_in_95_of_100_samples_and_is_as_wide_as_theory_says():
    r, tried = np.random.default_rng(2), 400
    ends = np.array([permutation_interval(r.normal(5, 1, 6), r.normal(4, 1, 6))
                     for _ in range(tried)])
    covered = ((ends[:, 0] <= 1) & (1 <= ends[:, 1])).mean()
    assert abs(covered - 0.95) < 4 * math.sqrt(0.05 * 0.95 / tried)
    a, b = r.normal(5, 2, 60), r.normal(4, 2, 60)
    half = 1.98 * math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    middle = a.mean() - b.mean()
    assert permutation_interval(a, b) == pytest.approx((middle - half, middle + half),
                                                       abs=half / 20)


def test_rank_correlation_is_that_of_ranks_and_its_p_counts_orders():
    x, y = [0.1, 0.5, 0.2, 0.9, 0.3], [50, 20, 40, 10, 30]
    assert analyze.rank_correlation(x, y)[0] == pytest.approx(-1)
    assert analyze.rank_correlation(x, y)[1] == pytest.approx(2 / math.factorial(5), abs=0.002)
    tied = analyze.rank_correlation([1, 2, 3, 4], [7, 9, 9, 11])[0]  # ranks 1, 2.5, 2.5, 4
    assert tied == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert analyze.rank_correlation([1, 2, 3], [5, 5, 5]) == (0, 1)


# --------------------------------------------------------------------------------------------------
# Tables, figures and claims of made-up results

BUDGET = 1000
RECALL = [Setting("recall", "none", "--data haystack --warmup none"),
          Setting("recall", "set", "--data haystack", "--data haystack --warmup set --steps 0"),
          Setting("recall", "late", "--data haystack --warmup none --lr 1")]
TEXT = [Setting("code", "none", "--data code --warmup none"),
        Setting("code", "dull", "--data code --warmup none --lr 1"),
        Setting("code", "missing", "--data code --warmup none --lr 2")]
SOME = {RECALL[0]: (900, BUDGET, 800), RECALL[1]: (100, 300, 200), TEXT[0]: (2.0, 3.0),
        TEXT[1]: (2.5, 3.5)}
NEW = {"learned (share of what can be)": 0.75, "accuracy": 0.5}
OLD = {"above it": 0.1, "above it, the blind": 0.4, "verdict": "not learned"}


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
    if analyze.measure_of(setting.column) is analyze.ACCURACY:
        log[-1]["val_accuracy"] = value
    result = {"settings": s, "warmup": setting.name, "fingerprint": [seed, 5],
              "val_bits_per_byte": value, "val_loss": 1.0, "val_accuracy": log[-1]["val_accuracy"],
              "tokens": {"procedural": 4500 if setting.warmup else 0, "semantic": 9}}
    return {"result": result, "log": log, "learned": {}}


def made_up(values):
    """{setting: what is measured, one for each seed} -> what read_results gives."""
    found = {}
    for setting, seeds in values.items():
        for seed, value in enumerate(seeds):
            found[setting.folder(seed)] = record(setting, seed, value)
            if setting.warmup:
                found[analyze.folder_of(seed, setting.warmup)] = {
                    **record(setting, seed, 0.0), "learned": OLD if seed else NEW}
    return found


def kept(found, folder):
    """The same as folders of runs."""
    for name, each in found.items():
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(point) + "\n" for point in each["log"])
        (folder / name / "log.jsonl").write_text(lines)
        config = {**each["result"], "environment": {"torch": "2.11"}}
        for part, content in (("config", config), ("result", each["result"]),
                              ("learned", each["learned"])):
            (folder / name / f"{part}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("accuracies,steps", [
    ((0.1, 0.9, 0.95, 1.0), 100), ((0.1, 0.9, 0.8, 0.9, 0.9), 300), ((0.1, 0.89, 0.9), BUDGET),
    ((0.1, 0.2, 0.3), BUDGET), ((0.9, 0.9), 0), ((0.95,), BUDGET)])
def test_recall_is_measured_by_the_first_of_two_good_evaluations_in_a_row(accuracies, steps):
    run = record(RECALL[0], 0, BUDGET)
    run["log"] = [evaluation(100 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    assert analyze.value_of(run, analyze.STEPS) == steps


def test_every_kind_of_column_has_its_measure():
    for column, measure, value in (("sorting", analyze.ACCURACY, 0.7), ("code", analyze.BITS, 1.7),
                                   ("english, larger", analyze.BITS, 1.8),
                                   ("recall of 15", analyze.STEPS, 300)):
        assert analyze.measure_of(column) is measure
        assert analyze.value_of(record(Setting(column, "", ""), 0, value), measure) == value


def cells(columns):
    """The lines of tables -> {name: [the other cells]}, and what is no table."""
    lines = table_lines(columns)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if "|" in line[:1]]
    return {row[0]: row[1:] for row in rows}, [line for line in lines if "|" not in line[:1]]


def test_gains_are_fewer_steps_and_fewer_bits():
    table, others = cells(compare(RECALL + TEXT, 3, made_up(SOME)))
    assert table["set"] == ["200", "3 of 3", "90.0%", "3", "at least 700", "-inf to inf", "0.1000",
                            "0.0 M", "75%, 50% right"]  # old shares are 1 - 0.1 / 0.4
    assert table["none"][:3] == ["2.5000", "2", ""] and table["dull"][:3] == [
        "3.0000", "2", "-0.5000"]
    assert "no result yet of recall: late" in others
    assert "no result yet of code: missing" in others
    (none, *_), _ = compare(RECALL, 3, made_up(SOME)).values(), None
    assert none[0].found == 2 and none[0].show(none[0].values.mean()) == "900"


def test_more_accuracy_is_a_gain():
    names = {each.name: each for each in settings_in("tasks", "quick") if each.column == "sorting"}
    both = [names["none"], names["dyck, whole"]]
    table, _ = cells(compare(both, 2, made_up({both[0]: (0.5, 0.6), both[1]: (0.8, 0.9)})))
    assert table["dyck, whole"][:3] == ["85.0%", "2", "30.0%"]


def test_a_gain_is_a_lower_bound_only_where_the_baseline_alone_did_not_get_there():
    for base, ours, words in (((900, BUDGET), (100, 200), "at least 800"),
                              ((900, 800), (100, 200), "700"),
                              ((BUDGET, BUDGET), (100, BUDGET), "450")):
        table, _ = cells(compare(RECALL[:2], 2, made_up({RECALL[0]: base, RECALL[1]: ours})))
        assert table["set"][4] == words


def test_never_is_the_smaller_budget_for_both_and_a_warm_up_may_count_as_steps():
    found = {RECALL[0].folder(0): record(RECALL[0], 0, 3000, budget=3000),
             RECALL[1].folder(0): record(RECALL[1], 0, 400)}
    base, ours = compare(RECALL[:2], 1, found)["recall"]
    assert [values.tolist() for values in ours.together(base)] == [[400], [1000]]
    base, ours = compare(RECALL[:2], 1, found, counting_warmup=True)["recall"]
    assert ours.values == [900] and ours.budget == 1500, "4,500 tokens are 500 steps of 9"
    assert [values.tolist() for values in ours.together(base)] == [[900], [1500]]


def test_runs_on_other_data_than_the_first_setting_are_left_out_and_named():
    found = made_up(SOME)
    found[TEXT[1].folder(1)]["result"]["fingerprint"] = [7, 5]
    base, other, _ = compare(TEXT, 3, found)["code"]
    assert base.values.tolist() == [2.0, 3.0] and other.values.tolist() == [2.5]
    (line,) = [line for line in table_lines({"code": [base, other]}) if "left out" in line]
    assert line.startswith("left out: code | dull | seeds [1]: their data are not those of none")


@pytest.mark.parametrize("name", list(analyze.EXPERIMENTS))
def test_an_experiment_has_a_table_and_a_figure_of_every_seed_though_half_is_missing(
        name, tmp_path, monkeypatch):
    settings, r = settings_in(name, "quick"), np.random.default_rng(0)
    drawn = {each.folder(0): r.uniform(0, 1, 2) for each in settings[::2]}
    values = {each: drawn[each.folder(0)] for each in settings if each.folder(0) in drawn}
    columns = compare(settings, 2, made_up(values))
    text = "\n".join(table_lines(columns))
    assert all(each.setting.name in text for each in sum(columns.values(), []))
    shown, keep = [], analyze.keep_figure

    def look(figure, path):
        for axis in figure.axes:
            shown.extend(pytest.approx(line.get_xdata()) for line in axis.lines
                         if line.get_marker() == "o")
        keep(figure, path)

    monkeypatch.setattr(analyze, "keep_figure", look)
    analyze.draw_settings(columns, tmp_path / "figure.png")
    assert shown == [each.values for each in sum(columns.values(), []) if each.n]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def texts(monkeypatch, draw, columns):
    """All words in a figure."""
    found = []
    monkeypatch.setattr(analyze, "keep_figure", lambda figure, path: found.extend(
        text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))))
    draw(columns, "a.png")
    return found


def test_a_figure_speaks_words(monkeypatch):
    words = texts(monkeypatch, analyze.draw_settings, compare(RECALL + TEXT, 3, made_up(SOME)))
    assert {"recall of 30 pairs", "never", "none (2 of 3 found)", "set (3 of 3 found)",
            "none (n = 2)", "mean of none", "bits per byte"} <= set(words)


def test_the_heat_map_has_the_gain_its_seeds_and_what_is_published(monkeypatch):
    settings = settings_in("tasks", "quick")
    values = {each: (0.5,) if each.name == "none" else (0.75, 0.8, 0.7) for each in settings
              if each.column == "reversed_addition" and each.name in ("none", "eca, whole")}
    words = texts(monkeypatch, analyze.draw_gains, compare(settings, 3, made_up(values)))
    assert "+25.0 (n = 1)\npaper +14.6" in words  # 91.0 - 76.4
    assert "not run\npaper +77.6" in words  # set, attention alone, before recall: 88.9 - 11.3
    assert {"reversed\naddition", "whole moved", "attention moved"} <= set(words)
    columns = compare(settings, 3, made_up(values))
    part = {"reversed_addition": columns["reversed_addition"]}  # as report and --only draw it
    assert "+25.0 (n = 1)\npaper +14.6" in texts(monkeypatch, analyze.draw_gains, part)


LATE, SOON, MIDDLE = (900, BUDGET, 950, 920, BUDGET, 900), (90, 100, 95, 92, 90, 91), (400,) * 6


@pytest.mark.parametrize("worse,dyck,verdict", [
    (LATE, SOON, "supported"), (MIDDLE, SOON, "supported"), (SOON, MIDDLE, "contradicted"),
    (MIDDLE, MIDDLE[1:] + (410,), "undecided"), (MIDDLE[:1], SOON, "undecided"),
    ((), SOON, "not run"), (MIDDLE[:3], SOON[:3], "undecided")])
def test_a_claim_is_decided_by_its_two_settings(worse, dyck, verdict):
    settings = {each.name: each for each in settings_in("controls", "quick")
                if each.column == "recall"}
    found = made_up({settings["none"]: SOON, settings["shuffled:dyck"]: worse,
                     settings["dyck"]: dyck})
    claim = analyze.Claim("more", "", "controls", "recall", "dyck", "shuffled:dyck")
    measured, n, _, said = analyze.judge(claim, 6, found)
    assert said == verdict and n == str(len(worse))
    if worse:
        assert measured.startswith(f"{np.mean(worse):,.0f} (shuffled:dyck) -> ")
        assert f" -> {np.mean(dyck):,.0f} steps to 90%" in measured


@pytest.mark.parametrize("none,warm,verdict", [
    ((2.0, 2.01, 2.02, 2.0, 2.01, 2.0), (1.9, 1.91, 1.92, 1.9, 1.9, 1.91), "supported"),
    ((2.0, 2.001, 2.002, 2.0, 2.001, 2.0), (2.001, 2.0, 2.0, 2.002, 2.0, 2.001),
     "no difference beyond the margin"),
    ((2.0, 2.2, 2.1, 2.3, 1.9, 2.0), (2.01, 2.2, 2.0, 2.3, 1.9, 2.01), "undecided"),
    ((2.0,), (2.0,), "undecided"), ((2.0, 2.0), (2.0, 2.0), "undecided")])
def test_on_text_a_claim_may_also_make_no_difference(none, warm, verdict):
    settings = {each.name: each for each in settings_in("efficiency", "quick")
                if each.column == "english"}
    found = made_up({settings["none"]: none, settings["set"]: warm})
    claim = analyze.Claim("helps", "", "efficiency", "english", "set", "none")
    assert analyze.judge(claim, 6, found)[3] == verdict


def test_claims_can_be_decided_by_their_seeds_and_the_margin_is_below_what_is_published():
    assert len(analyze.CLAIMS) <= 20
    for claim in analyze.CLAIMS:
        settings = {each.name: each for each in settings_in(claim.experiment, "quick")
                    if each.column == claim.column}
        n = min(settings[name].seeds for name in (claim.better, claim.worse))
        assert 2 / math.comb(2 * n, n) < 0.05 / len(analyze.CLAIMS), "p could never be so small"
    published = math.log(62.0 / 59.9) / math.log(2) / 4.4
    assert published == pytest.approx(0.011, abs=5e-4) and analyze.MARGIN <= published / 2
    assert math.log(5.47 / 5.15) / math.log(2) / 3 == pytest.approx(0.029, abs=5e-4)


def test_the_packed_claims_on_recall_are_what_they_were(monkeypatch, capsys):
    call(monkeypatch, "claims", "--results", ROOT / "assets/results.jsonl.gz")
    lines = capsys.readouterr().out.splitlines()[2:6]
    for line, (before, after, gain, p, verdict) in zip(lines, (
            ("6,000", "5,570", "430", "1.0000", "undecided"),
            ("6,000", "840", "at least 5,160", "< 0.0001", "supported"),
            ("6,000", "840", "at least 5,160", "< 0.0001", "supported"),
            ("5,350", "840", "at least 4,510", "< 0.0001", "supported"))):
        assert f"| {before} (" in line and f" -> {after} steps" in line and f"gain {gain} (" in line
        assert f"| 10 | {p} | {verdict} |" in line


def test_the_report_has_all_claims_and_each_table_with_its_figure(tmp_path, monkeypatch, refused):
    assert "no result" in refused(analyze, "report", "--results", tmp_path)
    names = {claim.experiment for claim in analyze.CLAIMS}
    settings = [each for name in sorted(names) for each in settings_in(name, "quick")]
    folder = kept(made_up({each: (0.1, 0.2) for each in settings}), tmp_path)
    call(monkeypatch, "report", "--results", folder, "--seeds", 2)
    text = (tmp_path / "report.md").read_text()
    for claim in analyze.CLAIMS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {claim.text} |")]
        assert "not run" not in line, "its settings are in its experiment"
    for name in names:
        assert f"## {name} (quick)" in text and f"![{name}]({name}-quick.png)" in text
        assert (tmp_path / f"{name}-quick.png").read_bytes().startswith(b"\x89PNG")
    assert "(paper)" not in text


# --------------------------------------------------------------------------------------------------
# Results on the disk


def test_what_is_packed_gives_the_same_table_and_counts_as_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: RECALL[:2] + TEXT[:2])
    folder, elsewhere = kept(made_up(SOME), tmp_path / "r"), tmp_path / "elsewhere"
    monkeypatch.setattr(analyze, "share_that_differs", lambda setting, seed, results: 0.1 * seed)
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "table", "--show", "--results", folder)
    told = capsys.readouterr().out.partition("figure: ")[0]
    assert "| set | 200 | 3 of 3 |" in told
    elsewhere.mkdir()
    call(monkeypatch, "pack", elsewhere / "all.jsonl.gz", "--results", folder)
    with gzip.open(elsewhere / "all.jsonl.gz", "rt") as file:
        assert all(json.loads(line)["environment"] == {"torch": "2.11"} for line in file)
    capsys.readouterr()
    call(monkeypatch, "table", "--show", "--results", elsewhere / "all.jsonl.gz")
    assert capsys.readouterr().out.partition("figure: ")[0] == told
    monkeypatch.setattr(analyze, "call_train", None)  # nothing may be run
    call(monkeypatch, "table", "--seeds", 2, "--results", elsewhere)
    assert "0 runs to go" in capsys.readouterr().out
    call(monkeypatch, "curves", "haystack", "--results", elsewhere)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_that_differs_is_packed_and_its_rank_correlation_shown(tmp_path, monkeypatch,
                                                                         capsys):
    moving = [each for each in settings_in("starts", "quick")
              if each.name in ("dyck, full, embeddings mean", "dyck, attn, embeddings mean")]
    folder = kept(made_up({each: (500, 400, 300, 200) for each in moving}), tmp_path / "r")
    monkeypatch.setattr(analyze, "share_that_differs", lambda setting, seed, results: 0.1 * seed)
    call(monkeypatch, "pack", tmp_path / "all.gz", "--results", folder)
    found = analyze.read_results(tmp_path / "all.gz")
    assert found[moving[-1].folder(3)]["share"] == pytest.approx(0.3)
    lines = [line for line in table_lines(compare(moving, 4, found)) if "rank" in line]
    assert all("full" in line and "rank correlation -1.00, p 0.08" in line for line in lines)
    assert len(lines) == 2, "recall of 15 and of 30"  # p is 2 of 4!


def test_a_folder_that_is_not_there_is_no_empty_one(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.gz").write_bytes(b"precious")
    for order in (("pack", "good.gz"), ("claims",), ("report",), ("table", "--show"),
                  ("curves", "x")):
        assert "typo" in refused(analyze, *order, "--results", "typo")
    assert (tmp_path / "good.gz").read_bytes() == b"precious" and not (tmp_path / "typo").exists()


def test_no_failure_hides_a_result(tmp_path):
    folder = kept(made_up(SOME), tmp_path)
    whole = analyze.read_results(folder)
    (folder / f"{RECALL[0].folder(0)}.failed").write_text("no room")
    failed = json.dumps({"name": RECALL[0].folder(0), "failed": "no room"}).encode()
    (folder / "old.gz").write_bytes(gzip.compress(failed))
    assert analyze.read_results(folder) == whole


GOOD = {"name": RECALL[0].folder(0), **record(RECALL[0], 0, 500)}
RECORDS = [[1], 3, {**GOOD, "result": {}}, {**GOOD, "result": None}, {**GOOD, "log": [{}, {}]},
           {**GOOD, "result": GOOD["result"] | {"val_accuracy": "0.5"}}, {"result": {}}]
BYTES = [b"no", gzip.compress(b"\xff\n"), gzip.compress(b"[" * 200_000),
         gzip.compress(json.dumps(GOOD).encode())[:-9]]


@pytest.mark.parametrize("content", [
    *(gzip.compress(json.dumps(each).encode()) for each in RECORDS), *BYTES])
def test_a_packed_file_that_is_damaged_or_of_another_form_is_refused(content, tmp_path, refused,
                                                                     monkeypatch):
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: RECALL)
    (tmp_path / "r.jsonl.gz").write_bytes(content)
    assert "r.jsonl.gz" in refused(analyze, "table", "--show", "--results", tmp_path / "r.jsonl.gz")


@pytest.mark.parametrize("name,content", [
    ("result", b"{"), ("result", b"[1]"), ("result", b"{}"), ("config", b"\xff"),
    ("learned", b"{"), ("log", b"[1]"),
    ("result", json.dumps(GOOD["result"] | {"val_accuracy": "x"}).encode())])
def test_a_damaged_result_is_refused(name, content, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: RECALL)
    folder = kept({RECALL[0].folder(0): record(RECALL[0], 0, 500)}, tmp_path)
    ending = "jsonl" if name == "log" else "json"
    (folder / RECALL[0].folder(0) / f"{name}.{ending}").write_bytes(content)
    assert str(tmp_path) in refused(analyze, "table", "--show", "--results", tmp_path)


# --------------------------------------------------------------------------------------------------
# Curves


def test_curves_draw_each_run_and_the_mean_over_seeds(tmp_path, monkeypatch):
    drawn, signals = {}, (signal.SIGINT, signal.SIGTERM)
    handlers = {wanted: signal.getsignal(wanted) for wanted in signals}
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 99)
    flags = (f"--data {tmp_path}/text --size 1_1_8 --block_size 32 --batch_size 4 --steps 4 "
             "--eval_every 2 --eval_rows 4 --warmup_steps 2 --warmup_batch_size 4")
    for seed, warmup, out in ((0, "set", "a"), (1, "set", "b"), (0, "none", "c")):
        more = f" --warmup {warmup} --seed {seed} --out {tmp_path}/{out}"
        train.run(train.parse(shlex.split(flags + more))[0])
        entries = map(json.loads, (tmp_path / out / "log.jsonl").read_text().splitlines())
        drawn[out] = [entry["val_loss"] for entry in entries
                      if entry["stage"] == "train" and entry["step"] and "val_loss" in entry]
    for wanted, handler in handlers.items():
        signal.signal(wanted, handler)
    (tmp_path / "text").unlink()  # runs can be looked at where their data are gone
    (tmp_path / "c/result.json").unlink()  # and before they have ended
    found = {}

    def look(figure, path):
        for line in figure.axes[0].lines:
            label = "" if line.get_label().startswith("_") else line.get_label()
            found.setdefault(label, []).append(list(line.get_ydata()))
            assert list(line.get_xdata()) == [2 * 4 * 32, 4 * 4 * 32]

    monkeypatch.setattr(analyze, "keep_figure", look)
    call(monkeypatch, "curves", *(tmp_path / out for out in "abc"))
    assert sorted(found.pop("")) == sorted(drawn.values())
    mean = np.mean([drawn["a"], drawn["b"]], 0)
    assert found == {"set: full, embeddings random, positions fit (n = 2)": [pytest.approx(mean)],
                     "none (n = 1)": [drawn["c"]]}


@pytest.mark.parametrize("settings,fingerprint,log,word", [
    ({"data": "docs"}, [0], None, "different data"), ({}, [7], None, "other files of that name"),
    ({}, [0], [], "b has no evaluation"), ({}, [0], [{"stage": "train", "val_loss": 1}], "damaged"),
    ({"seed": None}, [0], None, "damaged")])
def test_curves_refuse_what_is_no_run_or_does_not_compare(settings, fingerprint, log, word,
                                                          tmp_path, refused):
    a, b = (record(TEXT[0], 0, 2.0) for _ in "ab")
    b["result"]["settings"] |= settings
    b["result"]["fingerprint"] = fingerprint
    b["log"] = b["log"] if log is None else log
    folder = kept({"a": a, "b": b}, tmp_path)
    said = refused(analyze, "curves", folder / "a", folder / "b", "--picture", tmp_path / "c.png")
    assert word in said and not (tmp_path / "c.png").exists()
    assert "config.json" in refused(analyze, "curves", tmp_path)


# --------------------------------------------------------------------------------------------------
# Changed weights


def before_and_after(change):
    """The parameters of a model of 2 layers of 4 heads, 8 wide, before and after a change."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 12, 2, 4, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    blur = np.array([[0.5, 0.1, 0.6, 0.9], [0.8, 0.4, 0.2, 0.7]])
    analyze.change_weights(model, change, 1, blur)
    return before, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("change", ["shuffled", "redrawn", "noise 0.5", "scaled 2"])
def test_a_change_is_to_attention_and_mlps_alone_and_keeps_what_it_promises(change):
    before, after = before_and_after(change)
    again = before_and_after(change)[1]
    for name, was in before.items():
        now = after[name]
        assert torch.equal(now, again[name]), "the same seed, the same change"
        assert torch.equal(now, was) == (part_of(name) not in ("attn", "mlp")), name
        if change == "shuffled":
            assert torch.equal(now.flatten().sort().values, was.flatten().sort().values)
        elif part_of(name) in ("attn", "mlp") and was.numel() > 1000:
            noise = (now - was).std().item()
            if change == "redrawn":
                assert now.mean().item() == pytest.approx(was.mean().item(), abs=0.1)
                assert now.std().item() == pytest.approx(was.std().item(), rel=0.1)
                assert noise > was.std().item()
            elif change == "noise 0.5":
                assert noise == pytest.approx(0.5 * was.std().item(), rel=0.1)
            else:
                assert torch.equal(now, 2 * was)


HEADS = set(itertools.product(range(2), range(4)))
SHARP, BLURRED = {(0, 1), (1, 2)}, {(0, 3), (1, 0)}  # by the entropies above


@pytest.mark.parametrize("change,wanted", [
    ("without sharp", SHARP), ("without blurred", BLURRED), ("without random", 2),
    ("only sharp", HEADS - SHARP), ("only blurred", HEADS - BLURRED), ("only random", 6)])
def test_heads_are_replaced_by_their_entropy_and_nothing_else_is(change, wanted):
    before, after = before_and_after(change)
    replaced = set()
    for layer, head in HEADS:
        inside = [head * 8 + i for i in range(8)]
        rows = [place * 32 + i for place in range(3) for i in inside]
        name = f"h.{layer}.attn.c_"
        same = [torch.equal(weights[0][place], weights[1][place]) for weights, place in (
            ((before[f"{name}attn.weight"], after[f"{name}attn.weight"]), rows),
            ((before[f"{name}attn.bias"], after[f"{name}attn.bias"]), rows),
            ((before[f"{name}proj.weight"].t(), after[f"{name}proj.weight"].t()), inside))]
        assert len(set(same)) == 1, "all of a head or nothing"
        if not same[0]:
            replaced.add((layer, head))
    assert replaced == wanted or len(replaced) == wanted
    for name in before:
        if "c_attn" not in name and "attn.c_proj.weight" not in name:
            assert torch.equal(before[name], after[name]), name


# --------------------------------------------------------------------------------------------------
# Sweeps


def small(prose, steps=4):
    flags = (f"--data {shlex.quote(str(prose))} --size 1_2_8 --block_size 32 --batch_size 4 "
             f"--eval_rows 4 --steps {steps} --device cpu")
    warmup = ("--data haystack --size 1_2_8 --warmup set:length=4 --warmup_steps 3 "
              "--warmup_batch_size 4 --steps 0 --device cpu")
    return [Setting("prose", "none", f"{flags} --warmup none"),
            Setting("prose", "set", flags, warmup),
            Setting("prose", "shuffled", flags, warmup, "shuffled"),
            Setting("prose", "bad", f"{flags} --warmup none --size 3_2_5")]


def test_a_sweep_runs_what_is_missing_and_says_what_failed(prose, tmp_path, monkeypatch, capsys):
    settings = small(prose)
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: settings)
    monkeypatch.setattr(analyze, "value_of", lambda record, measure: record["result"]["val_loss"])
    order = ("weights", "--seeds", 1, "--jobs", 2, "--results", tmp_path / "new")
    call(monkeypatch, *order)
    told = capsys.readouterr().out
    assert "4 runs to go" in told and re.search("no result yet of .*: bad\n", told)
    assert re.search("bad . seed 0: failed: the width 5 is no multiple of the 2 heads", told)
    tmp_path /= "new"
    folders = [each.folder(0) for each in settings[:3]]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in folders]
    assert len({result["val_loss"] for result in results}) == 3
    assert [result["tokens"]["procedural"] for result in results] == [0, 108, 108]  # 3 x 4 x 9
    assert results[2]["warmup"] == "set:length=4 (shuffled)"
    (warmup,) = tmp_path.glob("warmup-*")
    assert not list(tmp_path.glob("*.changed.pt")) and (warmup / "learned.json").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    call(monkeypatch, *order)
    assert "1 runs to go" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}


def test_an_interrupted_sweep_goes_on(prose, tmp_path, monkeypatch, capsys):
    setting = small(prose, steps=2000)[0]
    code = (f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); import analyze, data\n"
            # A shell ignores it for what it starts with "&".
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"setting = analyze.Setting({setting.column!r}, {setting.name!r}, {setting.train!r})\n"
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


@pytest.mark.parametrize("leave,raised", [
    *((f"sys.exit({status})", analyze.Stopped) for status in (129, 130, 138, 143, Busy.status)),
    ("os.kill(os.getpid(), 9)", analyze.Stopped), ("print('done')", None),
    ("sys.exit('error: no room')", UserError), ("sys.exit(2)", UserError)])
def test_what_a_run_s_exit_status_means(leave, raised, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(f"import os, sys\n{leave}\n")
    monkeypatch.setattr(analyze, "__file__", str(tmp_path / "analyze.py"))
    if raised is None:
        return analyze.call_train("--steps 1", tmp_path / "run", 0, [])
    with pytest.raises(raised, match="^no room$" if "room" in leave else None):
        analyze.call_train("--steps 1", tmp_path / "run", 0, [])


def test_two_sweeps_or_two_runs_are_never_in_one_folder(prose, tmp_path, monkeypatch, capfd,
                                                        refused):
    pytest.importorskip("fcntl")
    settings = small(prose)[:1]
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: settings)
    order = ("table", "--seeds", 1, "--results", tmp_path)
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, order)])
    with lock(tmp_path / ".lock"):
        with pytest.raises(Busy, match="another process"):
            analyze.main()
    with lock(tmp_path / settings[0].folder(0) / ".lock"):  # a run that outlived its sweep
        analyze.main()
    told = capfd.readouterr().out
    assert "seed 0: stopped" in told and not list(tmp_path.glob("*/result.json"))


def test_a_part_of_an_experiment_keeps_what_it_is_compared_with(tmp_path, monkeypatch, capfd,
                                                                refused):
    monkeypatch.setattr(analyze, "settings_in", lambda name, budget: RECALL + TEXT)
    call(monkeypatch, "table", "--show", "--only", "recall | set", "--results", tmp_path)
    told = capfd.readouterr().out
    assert "no result yet of recall: none; set\n" in told and "code" not in told
    assert "--only x" in refused(analyze, "table", "--show", "--only", "x")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(analyze, "table", "--results", tmp_path / "file/r")
    assert "cannot read" in refused(analyze, "claims", "--results", "a/" * 3000)


def test_the_share_that_differs_is_of_the_states_that_a_run_begins_with(tmp_path):
    setting = Setting("recall of 15", "x", "--data haystack:pairs=3 --size 1_2_8 --transfer full "
                      "--embeddings random --positions fit",
                      "--data haystack --size 1_2_8 --warmup set:length=4 --warmup_steps 1 "
                      "--warmup_batch_size 4 --steps 0")
    analyze.call_train(setting.warmup, tmp_path / analyze.folder_of(5, setting.warmup), 5,
                       ["--device", "cpu"])
    share = analyze.share_that_differs(setting, 5, tmp_path)
    s, _ = train.parse(shlex.split(analyze.with_checkpoints(setting, 5, tmp_path, tmp_path))
                       + ["--seed", "5", "--device", "cpu"])
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
