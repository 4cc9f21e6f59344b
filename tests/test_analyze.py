"""Experiments, statistics, tables, figures, claims, results on the disk, curves, sweeps."""
import functools
import gzip
import itertools
import json
import re
import math
import os
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
from analyze import Claim, Row, compare, measure, permutation_p, table_lines
from conftest import ROOT
from data import Rows, UserError, lock
from model import GPT, GPTConfig, parse_size, part_of


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
    analyze.main()


# --------------------------------------------------------------------------------------------------
# Experiments are command lines

EVERY = list(itertools.product(analyze.EXPERIMENTS, ("quick", "paper")))


@functools.lru_cache(maxsize=None)
def accepted(flags):
    return train.parse(shlex.split(flags))[0]


@pytest.mark.parametrize("name,budget", EVERY)
def test_every_row_and_every_warm_up_is_a_command_line_of_train(name, budget, monkeypatch):
    rows = analyze.rows_of(name, budget)
    assert len({(row.column, row.name) for row in rows}) == len(rows)
    first = {row.column: row for row in reversed(rows)}
    assert not any(row.warmup for row in first.values()), "what the others are compared with"
    for row in rows:
        flags = row.train
        for warmup in filter(None, (row.warmup, row.mlp_from)):
            warm = accepted(warmup)
            assert warm.steps == 0 and warm.warmup != "none"
            if warm.warmup != "text":
                Rows(warm.warmup, block_size=warm.warmup_block_size)  # raises if there are none
            taken_up = SimpleNamespace(config=GPTConfig(300, 64, *parse_size(warm.size)))
            monkeypatch.setattr(train, "load", lambda path: (taken_up, {}))
        if row.warmup:
            flags += " --attn_from a.pt --mlp_from m.pt" if row.mlp_from else " --init w.pt"
        settings, _ = train.parse(shlex.split(flags))
        assert settings.warmup == "none"
        assert not row.warmup or parse_size(settings.size) == parse_size(warm.size)


def test_the_same_flags_are_one_run_whatever_the_row_is_called():
    rows = [row for name, budget in EVERY for row in analyze.rows_of(name, budget)]
    folders, flags = {}, {}
    for row in rows:
        said = row.train, row.warmup, row.change, row.mlp_from
        folders.setdefault(row.folder(3), set()).add(said)
        flags.setdefault(said, set()).add(row.folder(3))
    assert max(map(len, folders.values())) == 1, "different flags in one folder"
    assert max(map(len, flags.values())) == 1, "the same flags in two folders"
    assert rows[0].folder(0) != rows[0].folder(1)
    assert (Row("a", "b", "--data code --lr 1").folder(0)
            == Row("c", "d", "--lr 1 --data code").folder(0))
    assert analyze.join("--data code --lr 1", "--lr 2") == "--data code --lr 2"
    warmups = {row.warmup for row in rows if row.warmup}
    assert len({analyze.folder_of(0, warmup) for warmup in warmups}) == len(warmups)


# --------------------------------------------------------------------------------------------------
# Statistics


def brute_force_p(a, b):
    """With exact fractions."""
    values = [Fraction(str(x)) for x in (*a, *b)]

    def difference(places):
        first = sum(values[i] for i in places)
        return abs(first / len(a) - (sum(values) - first) / len(b))

    deals = list(itertools.combinations(range(len(values)), len(a)))
    return sum(difference(deal) >= difference(range(len(a))) for deal in deals) / len(deals)


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


def test_many_values_are_dealt_at_random_and_p_is_never_zero():
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


def test_the_bootstrap_interval_is_around_the_difference_and_as_wide_as_theory_says():
    r = np.random.default_rng(1)
    a, b = r.normal(5, 2, 300), r.normal(4, 1, 200)
    half = 1.96 * math.sqrt(a.var() / len(a) + b.var() / len(b))
    ends = a.mean() - b.mean() - half, a.mean() - b.mean() + half
    assert analyze.bootstrap(a, b) == pytest.approx(ends, abs=half / 10)
    assert analyze.bootstrap([3, 3], [1, 1, 1]) == (2, 2)


# --------------------------------------------------------------------------------------------------
# Tables, figures and claims of made-up results

BUDGET = 1000
TASK = [Row("sorting", "none", "--data sorting --warmup none"),
        Row("sorting", "set", "--data sorting", "--data sorting --warmup set --steps 0"),
        Row("sorting", "late", "--data sorting --lr 1")]
TEXT = [Row("code", "none", "--data code --warmup none"), Row("code", "dull", "--data code --lr 1"),
        Row("code", "missing", "--data code --lr 2")]
SOME = {TASK[0]: (900, BUDGET, 800), TASK[1]: (100, 300, 200), TEXT[0]: (2.0, 3.0),
        TEXT[1]: (2.5, 3.5)}


def evaluation(step, loss=1.0, accuracy=0.2):
    return {"stage": "train", "step": step, "tokens": 9 * step, "val_loss": loss,
            "val_accuracy": accuracy}


def record(data, warmup, seed, value):
    """Of a run: on text with this loss at the end, on a task learned after so many steps."""
    text = data.partition(",")[0] in ("code", "english", "math")
    settings = {"data": data, "seed": seed, "steps": BUDGET, "transfer": "full",
                "embeddings": "random", "positions": "fit", "tokenizer": "bytes" if text else None}
    log = [evaluation(0), evaluation(BUDGET, value if text else 1.0)]
    if not text and value < BUDGET:
        log = [evaluation(0), evaluation(value, accuracy=0.92), evaluation(value + 1, accuracy=0.9)]
    result = {"settings": settings, "warmup": warmup, "fingerprint": [seed, 5],
              "val_loss": log[-1]["val_loss"], "val_accuracy": log[-1]["val_accuracy"]}
    return {"result": result, "log": log, "learned": {}}


def made_up(values):
    """{row: what is measured, one for each seed} -> what read_results gives."""
    found = {}
    for row, seeds in values.items():
        for seed, value in enumerate(seeds):
            found[row.folder(seed)] = record(row.column, row.name, seed, value)
            if row.warmup:
                verdict = "not learned" if seed == 1 else "learned"
                found[analyze.folder_of(seed, row.warmup)] = {
                    **record(row.column, "set", seed, 0.0), "learned": {"verdict": verdict}}
    return found


def kept(found, folder):
    """The same as folders of runs."""
    for name, each in found.items():
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(point) + "\n" for point in each["log"])
        (folder / name / "log.jsonl").write_text(lines)
        for part in each.keys() - {"log"}:
            (folder / name / f"{part}.json").write_text(json.dumps(each[part]))
    return folder


@pytest.mark.parametrize("accuracies,steps", [
    ((0.1, 0.9, 0.95, 1.0), 100), ((0.1, 0.9, 0.8, 0.9, 0.9), 300), ((0.1, 0.89, 0.9), BUDGET),
    ((0.1, 0.2, 0.3), BUDGET), ((0.9, 0.9), 0), ((0.95,), BUDGET)])
def test_a_task_is_measured_by_the_first_of_two_good_evaluations_in_a_row(accuracies, steps):
    run = record("sorting", "none", 0, BUDGET)
    run["log"] = [evaluation(100 * i, 1.0, accuracy) for i, accuracy in enumerate(accuracies)]
    assert measure(run) == steps
    assert measure(record("code", "none", 0, 2.5)) == 2.5, "text by its loss"


def test_gains_are_fewer_steps_and_less_loss():
    found = made_up(SOME) | {TASK[2].folder(1): {"failed": "no room"}}
    lines = table_lines(compare(TASK + TEXT, 3, found))
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert ["none", "900", "2", "66.7%", "3"] in [row[:5] for row in cells]
    warm, dull = ([row for row in cells if row[0] == name][0] for name in ("set", "dull"))
    assert warm[:6] == ["set", "200", "3", "90.0%", "3", "700"] and warm[7:] == ["0.1000", "2/3"]
    assert ["none", "2.5000", "2"] in [row[:3] for row in cells]
    assert dull[:4] == ["dull", "3.0000", "2", "-0.5000"]
    low, high = map(float, warm[6].split(" to "))
    assert 500 < low < 700 < high < 900
    assert "no result yet of sorting: late" in lines
    assert "no result yet of code: missing" in lines
    assert "failed: sorting | late | 1: no room" in lines
    for seed in range(3):
        found[analyze.folder_of(seed, TASK[1].warmup)]["learned"] = {}
    assert compare(TASK, 3, found)["sorting"][1].learned == "", "mixtures cannot be asked"


def test_runs_on_other_data_than_the_first_row_are_not_compared():
    found = made_up(SOME)
    found[TEXT[1].folder(1)]["result"]["fingerprint"] = [7, 5]
    base, other, _ = compare(TEXT, 3, found)["code"]
    assert base.values == [2.0, 3.0] and other.values == [2.5]
    (line,) = other.failed
    assert line.startswith("code | dull | 1: its data are not those of none")


@pytest.mark.parametrize("name", list(analyze.EXPERIMENTS))
def test_an_experiment_has_a_table_and_a_figure_of_every_seed_though_half_is_missing(
        name, tmp_path, monkeypatch):
    rows, r = analyze.rows_of(name, "quick"), np.random.default_rng(0)
    drawn = {row.folder(0): r.integers(1, BUDGET, 2).tolist() for row in rows[::2]}
    values = {row: drawn[row.folder(0)] for row in rows if row.folder(0) in drawn}
    columns = compare(rows, 2, made_up(values))
    text = "\n".join(table_lines(columns))
    assert all(row.name in text for row in rows)
    shown, keep = [], analyze.keep_figure

    def look(figure, path):
        for axis in figure.axes:
            shown.extend((axis.get_title(), pytest.approx(line.get_xdata()))
                         for line in axis.lines if line.get_marker() == "o")
        keep(figure, path)

    monkeypatch.setattr(analyze, "keep_figure", look)
    analyze.draw(columns, tmp_path / "figure.png")
    assert shown == [(row.column, value) for row, value in values.items()]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_dotted_line_of_a_figure_is_the_budget_or_the_loss_of_the_first_row(tmp_path,
                                                                               monkeypatch):
    dotted = []
    monkeypatch.setattr(analyze, "keep_figure", lambda figure, path: dotted.append(
        [line.get_xdata()[0] for axis in figure.axes for line in axis.lines
         if line.get_linestyle() == ":"]))
    analyze.draw(compare(TASK + TEXT, 3, made_up(SOME)), tmp_path / "a")
    analyze.draw(compare(TEXT, 3, made_up({TEXT[1]: (3.0,), TEXT[2]: (2.5,)})), tmp_path / "a")
    assert dotted == [[BUDGET, 2.5], []], "nothing yet that the others are compared with"


LATE, SOON, MIDDLE = (900, BUDGET, 950, 920, BUDGET, 900), (90, 100, 95, 92, 90, 91), (400,) * 6


@pytest.mark.parametrize("worse,dyck,verdict", [
    (LATE, SOON, "supported"), (MIDDLE, SOON, "supported"), (SOON, MIDDLE, "contradicted"),
    (MIDDLE, MIDDLE[1:] + (410,), "undecided"), (MIDDLE[:1], SOON, "undecided"),
    ((), SOON, "not run"), (MIDDLE[:3], SOON[:3], "undecided")])
def test_a_claim_is_decided_by_its_two_rows(worse, dyck, verdict):
    rows = {row.name: row for row in analyze.rows_of("controls", "quick")
            if row.column == "recall"}
    found = made_up({rows["none"]: SOON, rows["shuffled:dyck"]: worse, rows["dyck"]: dyck})
    claim = Claim("more", "", "controls", "recall", "dyck", "shuffled:dyck")
    measured, n, _, said = analyze.judge(claim, 6, found)
    assert said == verdict and n == len(worse)
    if worse:
        assert measured.startswith(f"{np.mean(worse):,.0f} (shuffled:dyck) -> {np.mean(dyck):,.0f}")


@pytest.mark.parametrize("none,warm,verdict", [
    ((2.0, 2.01, 2.02, 2.0, 2.01, 2.0), (1.9, 1.91, 1.92, 1.9, 1.9, 1.91), "supported"),
    ((2.0, 2.01, 2.02, 2.0, 2.01, 2.0), (2.01, 2.0, 2.0, 2.02, 2.0, 2.01),
     "no difference beyond the margin"),
    ((2.0, 2.2, 2.1, 2.3, 1.9, 2.0), (2.01, 2.2, 2.0, 2.3, 1.9, 2.01), "undecided"),
    ((2.0,), (2.0,), "undecided")])
def test_on_text_a_claim_may_also_make_no_difference(none, warm, verdict):
    rows = {row.name: row for row in analyze.rows_of("efficiency", "quick")
            if row.column == "english"}
    found = made_up({rows["none"]: none, rows["set"]: warm})
    claim = Claim("helps", "", "efficiency", "english", "set", "none")
    assert analyze.judge(claim, 6, found)[3] == verdict


def test_the_report_has_all_claims_and_each_table_with_its_figure(tmp_path, monkeypatch):
    names = {claim.experiment for claim in analyze.CLAIMS}
    rows = [row for name in sorted(names) for row in analyze.rows_of(name, "quick")]
    folder = kept(made_up({row: (100, 200) for row in rows}), tmp_path)
    call(monkeypatch, "report", "--results", folder, "--seeds", 2)
    text = (tmp_path / "report.md").read_text()
    for claim in analyze.CLAIMS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {claim.text} |")]
        assert "not run" not in line, "its rows are in its experiment"
    for name in names:
        assert f"## {name} (quick)" in text and f"![{name}]({name}-quick.png)" in text
        assert (tmp_path / f"{name}-quick.png").read_bytes().startswith(b"\x89PNG")
    assert "(paper)" not in text


# --------------------------------------------------------------------------------------------------
# Results on the disk


def test_what_is_packed_gives_the_same_table_and_counts_as_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: TASK[:2] + TEXT[:2])
    folder, elsewhere = kept(made_up(SOME), tmp_path / "r"), tmp_path / "elsewhere"
    (folder / f"{TEXT[0].folder(2)}.failed").write_text("no room\n")
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "table", "--show", "--results", folder)
    told = capsys.readouterr().out.partition("figure: ")[0]
    assert "| set | 200 | 3 |" in told and "failed: code | none | 2: no room" in told
    elsewhere.mkdir()
    call(monkeypatch, "pack", elsewhere / "all.jsonl.gz", "--results", folder)
    capsys.readouterr()
    call(monkeypatch, "table", "--show", "--results", elsewhere / "all.jsonl.gz")
    assert capsys.readouterr().out.partition("figure: ")[0] == told
    monkeypatch.setattr(analyze, "call_train", None)  # nothing may be run
    call(monkeypatch, "table", "--seeds", 2, "--results", elsewhere)
    assert "0 runs to go" in capsys.readouterr().out
    call(monkeypatch, "curves", "sorting", "--results", elsewhere)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


GOOD = {"name": TASK[0].folder(0), **record("sorting", "none", 0, 500)}
RECORDS = [[1], 3, {**GOOD, "result": {}}, {**GOOD, "learned": 3},
           {**GOOD, "result": GOOD["result"] | {"val_accuracy": "0.5"}},
           {**GOOD, "result": None, "failed": "why"}, {**GOOD, "log": [{}]}]
BYTES = [b"", b"no", gzip.compress(b"\xff\n"), gzip.compress(b"[" * 200_000),
         gzip.compress(json.dumps(GOOD).encode())[:-9]]


@pytest.mark.parametrize("content", [
    *(gzip.compress(json.dumps(each).encode()) for each in RECORDS), *BYTES])
def test_a_packed_file_that_is_damaged_or_of_another_form_is_refused(content, tmp_path, refused,
                                                                     monkeypatch):
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: TASK)
    (tmp_path / "r.jsonl.gz").write_bytes(content)
    for where in (tmp_path / "r.jsonl.gz", tmp_path):
        assert "r.jsonl.gz" in refused(analyze, "table", "--show", "--results", where)


@pytest.mark.parametrize("name,content", [
    ("result", b"{"), ("result", b"[1]"), ("result", b"{}"), ("result", b"\xff"), ("learned", b"{"),
    ("result", json.dumps(GOOD["result"] | {"val_accuracy": "x"}).encode()), ("learned", b"[1]")])
def test_a_damaged_result_is_refused(name, content, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: TASK)
    folder = kept({TASK[0].folder(0): record("sorting", "none", 0, 500)}, tmp_path)
    (folder / TASK[0].folder(0) / f"{name}.json").write_bytes(content)
    assert f"{name}.json" in refused(analyze, "table", "--show", "--results", tmp_path)


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


@pytest.mark.parametrize("settings,point,word", [
    ({"data": "docs"}, {}, "different data"), ({"seed": None}, {}, "b"), ({}, None, "b"),
    ({"data": 3}, {}, "b"), ({}, {"step": None}, "b"), ({}, {"tokens": "x"}, "b")])
def test_curves_refuse_what_is_no_run_or_does_not_compare(settings, point, word, tmp_path, refused):
    a, b = (record("code", "none", 0, 2.0) for _ in "ab")
    b["result"]["settings"] |= settings
    b["log"] = [] if point is None else [b["log"][0] | point]
    folder = kept({"a": a, "b": b}, tmp_path)
    for name in "ab":
        (folder / name / "result.json").rename(folder / name / "config.json")
    runs = [folder / "b"] if point is None else [folder / "a", folder / "b"]
    assert word in refused(analyze, "curves", *runs, "--picture", tmp_path / "c")
    assert "config.json" in refused(analyze, "curves", tmp_path) and not (tmp_path / "c").exists()


def test_curves_refuse_other_files_of_one_name():
    a, b = (record("code", "none", 0, 2.0) for _ in "ab")
    b["result"]["fingerprint"] = [7]
    runs = [(name, each["result"], each["log"]) for name, each in (("a", a), ("b", b))]
    with pytest.raises(UserError, match="other files of that name"):
        analyze.curves(runs, "c")


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
    return [Row("prose", "none", f"{flags} --warmup none"), Row("prose", "set", flags, warmup),
            Row("prose", "shuffled", flags, warmup, "shuffled"),
            Row("prose", "bad", f"{flags} --warmup none --size 3_2_5")]


def test_a_sweep_runs_what_is_missing_and_lists_what_failed(prose, tmp_path, monkeypatch, capsys):
    rows = small(prose)
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: rows)
    order = ("weights", "--seeds", 1, "--jobs", 2, "--results", tmp_path)
    call(monkeypatch, *order)
    told = capsys.readouterr().out
    assert "4 runs to go" in told and re.search("no result yet of .*: bad\n", told)
    assert "failed: prose | bad | 0: the width 5 is no multiple of the 2 heads" in told
    folders = [row.folder(0) for row in rows[:3]]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in folders]
    assert len({result["val_loss"] for result in results}) == 3
    assert [result["tokens"]["procedural"] for result in results] == [0, 108, 108]  # 3 x 4 x 9
    assert results[2]["warmup"] == "set:length=4 (shuffled)"
    assert len(list(tmp_path.glob("warmup-*"))) == 1 and not list(tmp_path.glob("*.changed.pt"))
    assert told.count("| 0/1 |") == 2, "three steps teach nothing"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    call(monkeypatch, *order)
    assert "1 runs to go" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}


def test_an_interrupted_sweep_goes_on(prose, tmp_path, monkeypatch, capsys):
    row = small(prose, steps=2000)[0]
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import analyze, data\n"
            f"row = analyze.Row({row.column!r}, {row.name!r}, {row.train!r})\n"
            "analyze.rows_of = lambda name, budget: [row]\ndata.run_main(analyze.main)")
    sweep = subprocess.Popen([sys.executable, "-c", code, "table", "--seeds", "2", "--results",
                              str(tmp_path)], start_new_session=True, stdout=subprocess.DEVNULL)
    run = tmp_path / row.folder(0)
    while not (run / "ckpt.pt").exists() and sweep.poll() is None:
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(60) == 130 and not (run / "result.json").exists()
    assert not list(tmp_path.glob("*.failed")) and not (tmp_path / row.folder(1)).exists()
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: [row])
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    assert "seed 0: done" in capsys.readouterr().out and (run / "result.json").exists()


def test_two_sweeps_or_two_runs_are_never_in_one_folder(prose, tmp_path, monkeypatch, capfd,
                                                        refused):
    pytest.importorskip("fcntl")
    rows = small(prose)[:1]
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: rows)
    order = ("table", "--seeds", 1, "--results", tmp_path)
    with lock(tmp_path / ".lock"):
        assert "another process" in refused(analyze, *order)
    with lock(tmp_path / rows[0].folder(0) / ".lock"):  # a run that outlived its sweep
        call(monkeypatch, *order)
    told = capfd.readouterr().out
    assert "seed 0: stopped" in told and "failed" not in told
    assert not list(tmp_path.glob("*.failed")) and not list(tmp_path.glob("*/result.json"))


def test_a_part_of_an_experiment_keeps_what_it_is_compared_with(tmp_path, monkeypatch, capfd,
                                                                refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "rows_of", lambda name, budget: TASK + TEXT)
    call(monkeypatch, "table", "--show", "--only", "sorting | set")
    told = capfd.readouterr().out
    assert "no result yet of sorting: none; set\n" in told and "code" not in told
    assert "--only x" in refused(analyze, "table", "--show", "--only", "x")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(analyze, "table", "--results", "file/r")
    assert "cannot read" in refused(analyze, "claims", "--results", "a/" * 3000)
