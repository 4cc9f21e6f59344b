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
from matplotlib.text import Text

import analyze
import train
from analyze import compare, permutation_interval, permutation_p, settings_in
from conftest import ROOT
from data import Busy, lock
from model import GPT, GPTConfig, load, parse_size, part_of
from share import rank_correlation, share_that_differs

PACKED = ROOT / "assets/results.jsonl.gz"


@pytest.fixture
def call(monkeypatch, capfd):
    """call("claims", "--results", folder) -> what it printed."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
        capfd.readouterr()
        analyze.main()
        return capfd.readouterr().out
    return run


def setting(column, name, train, *warmups, change="", warmup_seeds=()):
    return analyze.Setting(column, name, train, warmups, change, warmup_seeds, 10)


def named(name, column):
    """{name: setting} of a column of an experiment."""
    return {each.name: each for each in settings_in(name) if each.column == column}


# Experiments are command lines

@functools.cache
def accepted(flags):
    return train.parse(shlex.split(flags))


@pytest.mark.parametrize("name", analyze.EXPERIMENTS)
def test_every_setting_and_every_warm_up_is_a_command_line_of_train(name, monkeypatch):
    settings = settings_in(name)
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


def test_rules_by_tasks_are_compared_after_as_many_tokens():
    for warm in {each.warmups for each in settings_in("tasks") if each.warmups}:
        s = accepted(*warm)
        rule = train.open_data(s)[1]
        train.stage_of(s, "warmup", rule)  # turns tokens into steps
        tokens = s.warmup_steps * s.warmup_batch_size * rule.block_size
        assert tokens == pytest.approx(49_152_000, rel=1e-3), warm


def test_folders_are_named_by_flags_in_any_order_and_packed_runs_keep_their_names():
    assert analyze.folder_of(0, "--data code --lr 1") == analyze.folder_of(0, "--lr 1 --data code")
    assert analyze.join("--data code --lr 1", "--lr 2") == "--data code --lr 2"
    recall = named("starts", "recall")
    assert recall["none, steps 13500"].folder(0) == "haystack-none-dff050b9-s0"
    assert recall["dyck, attn, embeddings random"].folder(3) == (
        "haystack-dyck_length=64-attn-43ded1d0-s3")
    found = set()
    for name, seed in itertools.product(analyze.EXPERIMENTS, range(10)):
        for each in settings_in(name):
            warmups = [analyze.folder_of(of, flags) for flags, of in each.warmup_runs(seed)]
            found |= {each.folder(seed), *warmups}
    lost = analyze.read_results(PACKED).keys() - found
    older = "haystack_pairs=15-dyck_length=64-full-shuffled-d5a4a3ca"
    assert {re.sub(r"-s\d+$", "", each) for each in lost} <= {older}


@pytest.mark.parametrize("only,names", [
    ("recall", ["none", "set", "late"]), ("recall of 15", ["none", "set"]),
    ("set", ["none", "set", "none", "set"]), ("recall | s", ["none", "set"]), ("ecall", None)])
def test_a_part_of_an_experiment_keeps_what_it_is_compared_with(only, names, monkeypatch, refused):
    fifteen = [each._replace(column="recall of 15") for each in RECALL[:2]]
    monkeypatch.setattr(analyze, "settings_in", lambda name: RECALL + fifteen + TEXT)
    if names:
        assert [each.name for each in analyze.part_of_experiment("table", only)] == names
    else:
        assert "--only ecall" in refused(analyze, "table", "--show", "--only", only)


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
    assert 0 < permutation_p([0] * 14, [1] * 14) < 1e-3, "of many ways some are tried"


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_all_shifts_that_the_exact_test_does_not_reject(seed):
    r = np.random.default_rng(seed)
    n, m = ((4, 4), (5, 4), (6, 6), (10, 3))[seed]
    a, b = r.normal(1, 1 + seed % 3, n).round(2), r.normal(0, 1, m).round(2)
    low, high = permutation_interval(a, b)
    edges = [end + step for end in (low, high) for step in (-1e-6, 1e-6)]
    for shift in (*edges, *np.linspace(2 * low - high, 2 * high - low, 20), 0):
        kept = brute_force_p(a - round(shift, 9), b) >= 0.05
        assert kept == (low <= shift <= high), shift
    assert permutation_interval(b, a) == pytest.approx((-high, -low))
    assert permutation_interval(a[:3], b[:3]) == (-math.inf, math.inf), "p is 0.1 at least"
    assert permutation_interval([3] * 6, [1] * 6) == (2, 2)


def test_what_foretells_is_correlated_by_ranks_and_is_the_power_that_differs(
        tmp_path, monkeypatch):
    rho, p = rank_correlation([0.1, 0.5, 0.2, 0.9, 0.3], [50, 20, 40, 10, 30])
    assert (rho, p) == (pytest.approx(-1), pytest.approx(2 / math.factorial(5), abs=0.002))
    tied = rank_correlation([1, 2, 3, 4], [7, 9, 9, 11])[0]  # ranks 1, 2.5, 2.5, 4
    assert tied == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    states = torch.tensor([[3.0, 4.0], [3.0, -4.0]] * 500)
    model = SimpleNamespace(eval=lambda: model, counted_states=lambda x, y: (states, y))
    monkeypatch.setattr(train, "new_model", lambda *args: model)
    monkeypatch.setattr(train, "start_from_checkpoints", lambda model, s: None)
    assert share_that_differs(RECALL[0], 0, tmp_path) == pytest.approx(16 / 25)


# Tables, figures and claims of made-up results

BUDGET = 1000
RECALL = [setting("recall", "none", "--data haystack --warmup none"),
          setting("recall", "set", "--data haystack", "--data haystack --warmup set --steps 0"),
          setting("recall", "late", "--data haystack --warmup none --lr 1")]
TEXT = [setting("code", "none", "--data code --warmup none"),
        setting("code", "dull", "--data code --warmup none --lr 1")]
SORTING = [named("tasks", "sorting")[name] for name in ("none", "dyck, whole")]
SOME = {RECALL[0]: (900, BUDGET, 800), RECALL[1]: (100, 300, 200), TEXT[0]: (2.0, 3.0),
        TEXT[1]: (2.5, 3.5), SORTING[0]: (0.5, 0.6), SORTING[1]: (0.8, 0.9)}
LEARNED = {"learned (share of what can be)": 0.75, "accuracy": 0.5}


def evaluation(step, accuracy=0.2, loss=1.0):
    return {"stage": "train", "step": step, "tokens": 9 * step, "val_loss": loss,
            "val_accuracy": accuracy}


def record(setting, seed, value, budget=BUDGET):
    """Of a run: of recall learned after so many steps, on text with so many bits per byte, of
    another task with this accuracy at the end."""
    s = {"data": analyze.as_dict(setting.train).get("--data", "code"), "seed": seed,
         "steps": budget, "transfer": "full", "embeddings": "random", "positions": "fit"}
    log = [evaluation(0), evaluation(1, 0.95), evaluation(2)]  # one that is good is not enough
    if setting.column.startswith("recall") and value < budget:
        log += [evaluation(value, 0.9), evaluation(value + 1, 0.92)]
    accuracy = value if analyze.measure_of(setting.column) is analyze.ACCURACY else 0.9
    result = {"settings": s, "warmup": setting.name, "fingerprint": [seed, 5],
              "val_bits_per_byte": value, "val_loss": 1.0, "val_accuracy": accuracy,
              "tokens": {"procedural": 4500 if setting.warmups else 0, "semantic": 9}}
    learned = {} if "--warmup none" in setting.train else LEARNED
    return {"result": result, "log": log, "learned": learned}


def made_up(values):
    """{setting: what is measured, one for each seed} -> what read_results gives."""
    found = {}
    for setting, seeds in values.items():
        for seed, value in enumerate(seeds):
            for folder in (setting.folder(seed), *(analyze.folder_of(seed, flags)
                                                   for flags in setting.warmups)):
                found[folder] = record(setting, seed, value)
    return found


def keep(found, folder):
    """The same as folders of runs."""
    for name, each in found.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "log.jsonl").write_text("\n".join(map(json.dumps, each["log"])))
        for part in ("config", "result", "learned"):
            content = each["learned" if part == "learned" else "result"]
            (folder / name / f"{part}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change,line", [
    ({}, "| set | 200 | 90.0% | 3 of 3 found | at least 700 | -inf to inf | 0.1000 | 0.0 M | 75%, "
         "50% right |"),
    ({}, "| none | 900 | 90.0% | 2 of 3 found |  |  |  |  |  |"),
    ({}, "no result yet of recall: late"),
    ({RECALL[0]: (900, 800, 700)}, "| set | 200 | 90.0% | 3 of 3 found | 600 |"),
    ({RECALL[0]: (BUDGET,) * 2, RECALL[1]: (100, BUDGET)},  # a bound only where all of set found it
     "| set | 550 | 90.0% | 1 of 2 found | 450 |"),
    ({RECALL[0]: (900,)}, "| set | 200 | 90.0% | 3 of 3 found | 700 | - | - |"),
    ({}, "| dull | 3.0000 | 90.0% | n = 2 | -0.5000 |"),
    ({}, "| dyck, whole | 85.0% | 85.0% | n = 2 | 30.0% |")])
def test_gains_are_fewer_steps_fewer_bits_and_more_accuracy(change, line):
    columns = compare([*RECALL, *TEXT, *SORTING], None, made_up(SOME | change))
    assert line in "\n".join(analyze.table_lines(columns))


def test_what_cannot_be_compared_is_left_out_and_said_and_never_is_the_smaller_budget():
    found = made_up(SOME)
    found[TEXT[1].folder(1)]["result"]["fingerprint"] = [7, 5]
    text = "\n".join(analyze.table_lines(compare(TEXT, 3, found)))
    assert "| none | 2.5000 | 90.0% | n = 2 |" in text and "| dull | 2.5000 | 90.0% | n = 1" in text
    assert "left out: code | dull | seeds [1]: not the data of none" in text
    longer = {RECALL[0].folder(0): record(RECALL[0], 0, 3000, budget=3000),
              RECALL[1].folder(0): record(RECALL[1], 0, 400)}
    base, ours = compare(RECALL[:2], 1, longer)["recall"]
    assert ours.against(base)[:2] == (1000, 400)


def test_figures_speak_words_and_show_every_seed_and_what_is_published(monkeypatch):
    def drawn(name, settings, found):
        """All words, and the values of the dots."""
        words, dots = set(), []

        def look(figure, path):
            words.update(each.get_text() for each in figure.findobj(Text))
            lines = itertools.chain(*(axis.lines for axis in figure.axes))
            dots.extend(list(line.get_xdata()) for line in lines if line.get_marker() == "o")

        monkeypatch.setattr(analyze, "keep_figure", look)
        analyze.draw(name, compare(settings, 3, found), "a.png")
        return words, dots

    words, dots = drawn("table", [*RECALL, *TEXT, *SORTING], made_up(SOME))
    assert dots == [list(values) for values in SOME.values()]
    assert {"recall of 30 pairs", "never", "no warm-up", "2 of 3 found", "after set",
            "3 of 3 found", "n = 2", "bits per byte", "after brackets: everything"} <= words
    assert analyze.in_words("shuffled:dyck:k=3, attn,norm, lr 1e-3") == (
        "after shuffled brackets (k=3): attention and norms, learning rate 1e-3")
    column = named("tasks", "reversed_addition")
    found = made_up({column["none"]: (0.5,), column["eca, whole"]: (0.75, 0.8, 0.7)})
    for settings in (settings_in("tasks"), list(column.values())):  # as --only draws it
        words, _ = drawn("tasks", settings, found)
        assert "+25.0 (n = 1)\npaper +14.6" in words  # 91.0 - 76.4
        assert "not run\npaper -22.0" in words  # attention of set: 54.4 - 76.4


LATE, SOON, MIDDLE = (900, BUDGET, 950, 920, BUDGET, 900), (90, 100, 95, 92, 90, 91), (400,) * 6
EVEN = (2.0, 2.001, 2.002, 2.0, 2.001, 2.0)


@pytest.mark.parametrize("column,worse,better,counting,verdict", [
    ("recall", LATE, SOON, False, "supported"), ("recall", SOON, MIDDLE, False, "contradicted"),
    ("recall", MIDDLE, MIDDLE[1:] + (410,), False, "undecided"),
    ("recall", (), SOON, False, "not run"), ("recall", MIDDLE[:3], SOON[:3], False, "undecided"),
    ("recall", MIDDLE, SOON, True, "contradicted"),  # 500 steps of warm-up
    ("english", EVEN, (1.9,) * 6, False, "supported"),
    ("english", EVEN, EVEN[::-1], False, "no difference beyond the margin"),
    ("english", (2.0, 2.2, 2.1, 2.3, 1.9, 2.0), EVEN, False, "undecided")])
def test_a_claim_is_decided_by_its_two_settings(column, worse, better, counting, verdict):
    settings = named("controls", column)
    found = made_up({settings["none"]: worse, settings["set"]: better})
    claim = analyze.Claim("more", "", "controls", column, "set", "none", counting)
    measured, n, _, said = analyze.judge(claim, 6, found)
    assert said == verdict and n == str(len(worse))
    if worse and column == "recall":
        after = np.mean(better) + 500 * counting
        assert measured.startswith(f"{np.mean(worse):,.0f} (none) -> {after:,.0f} steps")


def test_the_report_has_claims_tables_and_figures_and_keeps_what_a_person_wrote(
        tmp_path, call, refused):
    assert "no result" in refused(analyze, "report", "--results", tmp_path)
    names = {claim.experiment for claim in analyze.CLAIMS}
    settings = [each for name in sorted(names) for each in settings_in(name)]
    keep(made_up({each: (0.1, 0.2) for each in settings}), tmp_path)
    path, ours = tmp_path / "report.md", "# Ours\n\nWörds. \n\n"
    path.write_text(f"{ours}{analyze.MARK}\nold", "utf-8")
    call("report", "--results", tmp_path, "--seeds", 2)
    text = path.read_text("utf-8")
    assert text.startswith(f"{ours}{analyze.MARK}\n\n# What was found\n") and "\nold" not in text
    assert "not run |" not in text, "each claim's settings are in its experiment"
    assert all(f"| {claim.text} |" in text for claim in analyze.CLAIMS)
    for claim in analyze.CLAIMS:
        ways = [math.comb(2 * each.seeds, each.seeds) for each in settings
                if each.column == claim.column and each.name in (claim.better, claim.worse)]
        assert 2 / min(ways) < 0.05 / len(analyze.CLAIMS), "p could never be so small"
    for name in names:
        assert f"## {name}: " in text and f"![{name}]({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# Results on the disk, curves

GOOD, NAME = record(RECALL[0], 0, 500), RECALL[0].folder(0)


def test_what_is_packed_gives_the_same_table_and_counts_as_run(tmp_path, monkeypatch, call):
    runs, packed = tmp_path / "runs", tmp_path / "packed/all.gz"
    monkeypatch.setattr(analyze, "settings_in", lambda name: RECALL[:2])
    monkeypatch.setattr(analyze, "call_train", None)  # nothing may be run
    monkeypatch.chdir(tmp_path)
    keep(made_up(SOME), runs)
    packed.parent.mkdir()
    call("pack", packed, "--results", runs)
    shown = call("table", "--seeds", 3, "--results", runs, "--show")
    assert "| set | 200 | 90.0% | 3 of 3 found | at least 700 |" in shown
    assert call("table", "--seeds", 3, "--results", packed, "--show") == shown
    assert call("table", "--seeds", 3, "--results", packed.parent).startswith("0 runs to go")
    failed = json.dumps({"name": NAME, "failed": "no room"})
    (runs / "zzz.gz").write_bytes(gzip.compress(failed.encode()))
    assert call("table", "--seeds", 3, "--results", runs, "--show") == shown, "a result wins"


def test_a_table_and_figure_come_though_a_notebook_names_its_own_backend(script, tmp_path):
    done = script("analyze.py", *"strangers --show --only none --results".split(), PACKED,
                  cwd=tmp_path, env={"MPLBACKEND": "module://nosuch"})
    assert done.returncode == 0 and "| none | 6,000 |" in done.stdout, done.stderr
    assert (tmp_path / "strangers.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_there_is_no_empty_one(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.gz").write_bytes(b"precious")
    for order in (("pack", "good.gz"), ("claims",), ("report",), ("table", "--show"),
                  ("curves", "x")):
        assert "typo" in refused(analyze, *order, "--results", "typo")
    assert "packed file" in refused(analyze, "table", "--results", "good.gz")
    assert (tmp_path / "good.gz").read_bytes() == b"precious" and not (tmp_path / "typo").exists()


def test_pack_and_curves_write_onto_no_pipe_and_pictures_in_the_format_of_their_name(
        tmp_path, call, refused):
    pipe, pdf, results = tmp_path / "pipe.png", tmp_path / "a.pdf", tmp_path / "r"
    os.mkfifo(pipe)
    keep({NAME: GOOD}, results)
    assert "not a file" in refused(analyze, "pack", pipe, "--results", results)
    assert "not a file" in refused(analyze, "curves", results / NAME, "--picture", pipe)
    call("curves", results / NAME, "--picture", pdf)
    assert pdf.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name,content", [
    ("r.gz", b"no"), ("r.gz", gzip.compress(b"[" * 200_000)), ("r.gz", gzip.compress(b"[1]")),
    ("r.gz", gzip.compress(json.dumps(GOOD).encode())[:-9]),
    ("r.gz", gzip.compress(json.dumps({"name": NAME, "result": {}}).encode())),
    (f"{NAME}/result.json", b"{"), (f"{NAME}/config.json", b"\xff"),
    (f"{NAME}/learned.json", b"{"), (f"{NAME}/log.jsonl", b"[1]"),
    (f"{NAME}/result.json", json.dumps(GOOD["result"] | {"val_accuracy": "x"}).encode())])
def test_a_damaged_result_is_refused(name, content, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(analyze, "settings_in", lambda name: RECALL)
    if name != "r.gz":
        keep({NAME: GOOD}, tmp_path)
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path) in refused(analyze, "table", "--show", "--results", tmp_path)


def test_curves_draw_each_run_and_the_mean_over_seeds(tmp_path, monkeypatch, refused, call):
    runs, found = made_up({TEXT[0]: (2.0, 3.0), TEXT[1]: (2.0, 2.1)}), {}
    for i, each in enumerate(runs.values()):
        each["result"]["warmup"] = "set" if i < 2 else "none"
        each["result"]["settings"]["steps"] += i // 2
        each["log"] = [evaluation(step, loss=9 - i - step) for step in range(4 - i // 3)]
    keep(runs, tmp_path)
    for path in tmp_path.glob("*/result.json"):
        path.unlink()  # they may be looked at before they have ended

    def look(figure, path):
        found["path"] = path
        for line in figure.axes[0].lines:
            label = "" if line.get_label().startswith("_") else line.get_label()
            found.setdefault(label, []).append(list(line.get_ydata()))

    folders = [tmp_path / name for name in runs]
    with monkeypatch.context() as patched:
        patched.setattr(analyze, "keep_figure", look)
        assert "warning: not only warm-up and seed differ, but steps (1000, 1001)\n" in (
            call("curves", *folders))
    assert found == {
        "path": f"curves-{'-'.join(runs)[:100]}.png",
        "": [[8, 7, 6], [7, 6, 5], [6, 5, 4], [5, 4]],
        "no warm-up (n = 2); no mean, since they end at different steps": [[]],
        "after set: everything, positions that fit (n = 2)": [[7.5, 6.5, 5.5]]}
    assert "config.json" in refused(analyze, "curves", tmp_path)
    (folders[1] / "config.json").write_text(json.dumps(GOOD["result"]))
    assert "different data" in refused(analyze, "curves", *folders)
    (folders[1] / "config.json").write_text("{}")
    assert "cannot read" in refused(analyze, "curves", *folders)
    (folders[2] / "log.jsonl").write_text('{"stage": "warmup", "step": 1}')
    assert "no evaluation of its training yet" in refused(analyze, "curves", folders[2])


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
    differs, replaced = {name: before[name] != after[name] for name in before}, set()
    for layer in range(2):
        parts = [differs.pop(f"h.{layer}.attn.{name}").view(first, 4, -1) for name, first in (
            ("c_attn.weight", 3), ("c_attn.bias", 3), ("c_proj.weight", 32))]
        for head in range(4):
            places = torch.cat([part[:, head].flatten() for part in parts])
            assert places.all() or not places.any(), "all of a head or nothing"
            if places.all():
                replaced.add((layer, head))
    assert replaced == wanted or len(replaced) == wanted
    assert not any(each.any() for each in differs.values())


# Sweeps

def small(steps, **flags):
    """Settings that take a second."""
    shape = "--data haystack:pairs=3 --size 1_2_8 --device cpu"
    flags = f"{shape} --batch_size 4 --eval_rows 4 --lr 0 --steps {steps}"
    warm = f"{shape} --warmup set:length=4 --warmup_steps 3 --warmup_batch_size 4 --steps 0"
    return [setting("recall", "none", f"{flags} --warmup none"),
            setting("recall", "mixed", flags, warm, warm, warmup_seeds=(1, 0)),
            setting("recall", "shuffled", flags, warm, change="shuffled"),
            setting("recall", "bad", f"{flags} --warmup none --size 3_2_5")]


def weights(path):
    """Of attention and MLPs."""
    state = load(path)[0].state_dict()
    return {name: state[name] for name in state
            if part_of(name) in ("attn", "mlp") and name.endswith("weight")}


def test_a_sweep_makes_what_is_missing_of_its_warm_ups_and_says_what_failed(
        tmp_path, monkeypatch, call):
    settings = small(steps=1)[1:]
    monkeypatch.setattr(analyze, "settings_in", lambda name: settings)
    order = ("weights", "--seeds", 1, "--jobs", 2, "--results", tmp_path)
    told = call(*order)
    assert "3 runs to go" in told and "no result yet of recall: bad\n" in told
    assert "bad | seed 0: failed: exit status 2: error: a width of 5 is no multiple" in told
    first, second = (weights(tmp_path / analyze.folder_of(of, settings[0].warmups[0]) / "warmup.pt")
                     for of in (1, 0))
    for name, weight in weights(tmp_path / settings[0].folder(0) / "ckpt.pt").items():
        assert torch.equal(weight, (first if part_of(name) == "attn" else second)[name])
    for name, weight in weights(tmp_path / settings[1].folder(0) / "ckpt.pt").items():
        assert not torch.equal(weight, second[name])
        assert torch.equal(weight.flatten().sort()[0], second[name].flatten().sort()[0])
    found = analyze.read_results(tmp_path)
    shuffled = found[settings[1].folder(0)]["result"]
    assert shuffled["warmup"] == "set:length=4 (shuffled)" and shuffled["tokens"]["procedural"] > 0
    assert sum("accuracy" in each["learned"] for each in found.values()) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    assert "1 runs to go" in call(*order) and not list(tmp_path.glob("*.changed.pt"))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    if analyze.lock.__globals__["fcntl"]:
        with lock(tmp_path / ".lock"), pytest.raises(Busy, match="another process"):
            call(*order)


def test_an_interrupted_sweep_goes_on(tmp_path):
    setting = small(steps=2000)[0]
    code = (f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); import analyze, data\n"
            # A shell ignores it for what it starts with "&".
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"setting = analyze.Setting(*{tuple(setting)!r})\n"
            "analyze.settings_in = lambda name: [setting]\ndata.run_main(analyze.main)")
    command = [sys.executable, "-c", code, "table", "--results", ".", "--seeds"]
    sweep = subprocess.Popen([*command, "2"], cwd=tmp_path, start_new_session=True)
    run = tmp_path / setting.folder(0)
    while not (run / "ckpt.pt").exists() and sweep.poll() is None:
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(60) == 130 and not (run / "result.json").exists()
    assert not (tmp_path / setting.folder(1)).exists()
    log = (run / "log.jsonl").read_text()
    done = subprocess.run([*command, "1"], cwd=tmp_path, text=True, stdout=subprocess.PIPE)
    assert "seed 0: done" in done.stdout and (run / "result.json").exists()
    assert (run / "log.jsonl").read_text().startswith(log), "it went on, and did not begin again"
