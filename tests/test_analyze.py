"""Experiments, statistics, tables, figures, claims, results on the disk, curves, sweeps."""
import gzip
import itertools
import json
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
from matplotlib.text import Text

import analyze
import train
from analyze import compare, folder_of, permutation_interval, permutation_p, settings_in
from conftest import ROOT
from data import lock
from model import GPT, GPTConfig, load, parse_size, part_of
from share import rank_correlation, share_that_differs


@pytest.fixture
def call(monkeypatch, capfd):
    """call("claims", "--results", folder) -> what it printed."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
        analyze.main()
        return capfd.readouterr().out
    return run


@pytest.mark.parametrize("name", analyze.EXPERIMENTS)
def test_every_setting_and_every_warm_up_is_a_command_line_of_train(name, monkeypatch):
    for each in settings_in(name):
        for warmup in each.warmups:
            warm = train.parse(shlex.split(warmup))
            assert warm.steps == 0 and warm.warmup != "none"
            if name == "tasks":  # rules are compared after as many tokens
                rule = train.open_data(warm)[1]
                train.stage_of(warm, "warmup", rule)  # turns tokens into steps
                tokens = warm.warmup_steps * warm.warmup_batch_size * rule.block_size
                assert tokens == pytest.approx(49_152_000, rel=1e-3), warmup
            taken_up = SimpleNamespace(config=GPTConfig(300, 64, *parse_size(warm.size)))
            monkeypatch.setattr(train, "load", lambda path: (taken_up, {}))
        checkpoints = ("", " --init w.pt", " --attn_from a.pt --mlp_from m.pt")
        given = train.parse(shlex.split(each.train + checkpoints[len(each.warmups)]))
        assert given.warmup == "none"
        assert not each.warmups or parse_size(given.size) == parse_size(warm.size)


def test_folders_are_named_by_flags_in_any_order_and_packed_runs_keep_their_names():
    assert folder_of(0, "--data code --lr 1") == folder_of(0, "--lr 1 --data code")
    found = set()
    for name, seed in itertools.product(analyze.EXPERIMENTS, range(10)):
        for each in settings_in(name):
            warmups = [folder_of(of, flags) for flags, of in each.warmup_runs(seed)]
            found |= {each.folder(seed), *warmups}
    lost = analyze.read_results(ROOT / "assets/results.jsonl.gz").keys() - found
    assert all("full-shuffled-d5a4a3ca" in each or "nca" in each for each in lost), "older ones"


def brute_force_p(a, b):
    """With exact fractions."""
    values = [Fraction(str(x)) for x in (*a, *b)]
    firsts = [sum(way) for way in itertools.combinations(values, len(a))]
    found = [abs(first / len(a) - (sum(values) - first) / len(b)) for first in firsts]
    return sum(each >= found[0] for each in found) / len(found)


@pytest.mark.parametrize("a,b", [
    ([1, 2, 3], [4, 5, 6]), ([1, 1, 2, 2], [1, 2, 2, 2]), ([3] * 4, [1] * 4),
    ([5, 1], [2, 2, 2, 9, 4]), ([2.31, 0.2, 1.97, 1.13, 2.9], [0.04, -1.6, 0.71, 0.3]),
    ([1.2, 0.61, 3.4, 2.5, 2.6, 0.9], [-0.1, 0.8, 0.2, -1.1, 1.3, 0.45])])
def test_p_is_exact_and_the_interval_is_all_shifts_that_it_does_not_reject(a, b):
    low, high = permutation_interval(a, b)
    edges = [end + step for end in (low, high) for step in (-1e-5, 1e-5) if math.isfinite(end)]
    for shift in (*edges, *np.linspace(-6, 6, 25)):
        shifted = np.round(np.subtract(a, shift), 6)
        p = permutation_p(shifted, b)
        assert p == pytest.approx(brute_force_p(shifted, b), abs=1e-12)
        assert (p >= 0.05) == (low <= shift <= high), shift
    assert permutation_interval(b, a) == pytest.approx((-high, -low))
    assert permutation_p(a, a) == 1 and permutation_p([1], [2]) == 1
    large = [1e6 + 1, 1e6 + 2, 1e6 + 3], [1e6 + 2, 1e6 + 3, 1e6 + 5]
    assert permutation_p(*large) == pytest.approx(brute_force_p(*large), abs=1e-12)
    assert 0 < permutation_p([0] * 14, [1] * 14) < 1e-3, "of very many ways some are tried"


def test_what_foretells_is_the_power_that_differs_correlated_by_ranks(tmp_path, monkeypatch):
    rho = -4.5 / math.sqrt(5 * 4.5)  # ranks 4, 2.5, 2.5, 1; of 12 orders two are as far from chance
    assert rank_correlation([1, 2, 3, 4], [9, 7, 7, 5]) == pytest.approx((rho, 1 / 6), abs=0.005)
    states = torch.tensor([[3.0, 4.0], [3.0, -4.0]] * 500)
    model = SimpleNamespace(eval=lambda: model, states=lambda x, counts: states)
    monkeypatch.setattr(train, "new_model", lambda *args: model)
    monkeypatch.setattr(train, "start_from_checkpoints", lambda model, s: None)
    assert share_that_differs(RECALL[0], 0, tmp_path) == pytest.approx(16 / 25)


# Tables, figures and claims of made-up results

BUDGET = 1000
RECALL = settings_in("transfer", "recall | set, ")[:3]  # none; set, full; set, attn
TEXT = settings_in("budgets", "code | none, steps")  # none; none, steps 3500
SORTING = settings_in("tasks", "sorting | dyck, w")  # none; dyck, whole
SOME = {RECALL[0]: (900, BUDGET, 800), RECALL[1]: (100, 300, 200), TEXT[0]: (2.0, 3.0),
        TEXT[1]: (2.5, 3.5), SORTING[0]: (0.5, 0.6), SORTING[1]: (0.8, 0.9)}


def evaluation(step, accuracy=0.2, loss=1.0):
    return {"stage": "train", "step": step, "tokens": 9 * step, "val_loss": loss,
            "val_accuracy": accuracy}


def record(setting, seed, value, budget=BUDGET):
    """Of a run that took `value` steps to recall, or has it as bits per byte or as accuracy."""
    s = {"data": analyze.as_dict(setting.train)["--data"], "seed": seed, "steps": budget}
    log = [evaluation(0), evaluation(1, 0.95), evaluation(2)]  # one that is good is not enough
    if setting.column.startswith("recall") and value < budget:
        log += [evaluation(value, 0.9), evaluation(value + 1, 0.92)]
    accuracy = value if analyze.MEASURES[setting.column] == analyze.ACCURACY else 0.9
    data = seed if setting.column in analyze.TASK_COLUMNS else 9  # a text is one for all seeds
    result = {"settings": s, "warmup": setting.name, "fingerprint": [data, 5],
              "val_bits_per_byte": value, "val_accuracy": accuracy,
              "tokens": {"procedural": 4500 if setting.warmups else 0, "semantic": 9}}
    learned = {"learned (share of what can be)": 0.75, "accuracy": 0.5}  # of a warm-up
    return {"result": result, "log": log, "learned": learned}


def made_up(values):
    """{setting: what is measured, one for each seed} -> what read_results gives."""
    found = {}
    for setting, seeds in values.items():
        for seed, value in enumerate(seeds):
            for folder in (setting.folder(seed), *(folder_of(seed, w) for w in setting.warmups)):
                found[folder] = record(setting, seed, value)
    return found


def keep(found, folder):
    """The same as folders of runs."""
    for name, each in found.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "log.jsonl").write_text("\n".join(map(json.dumps, each["log"])))
        for part, content in (("config", "result"), ("result", "result"), ("learned", "learned")):
            (folder / name / f"{part}.json").write_text(json.dumps(each[content]))


@pytest.mark.parametrize("change,line", [
    ({}, "| 3 of 3 found | at least 700 | any | 0.1000 | 0.0 M | 75%, 50% right |"),
    ({}, "no result yet of recall: set, attn"),
    ({RECALL[0]: (900, 800, 700)}, "| set, full | 200 | 90.0% | 3 of 3 found | 600 |"),
    ({RECALL[0]: (BUDGET,) * 2, RECALL[1]: (100, BUDGET)},  # a bound only where all of set found it
     "| set, full | 550 | 90.0% | 1 of 2 found | 450 |"),
    ({}, "| none, steps 3500 | 3.0000 | 90.0% | n = 2 | -0.5000 |"),
    ({}, "| dyck, whole | 85.0% | 85.0% | n = 2 | 30.0% |")])
def test_gains_are_fewer_steps_fewer_bits_and_more_accuracy(change, line):
    columns = compare([*RECALL, *TEXT, *SORTING], None, made_up(SOME | change))
    assert line in "\n".join(analyze.table_lines(columns))


def test_what_cannot_be_compared_is_left_out_and_never_is_the_smaller_budget():
    found = made_up(SOME)
    del found[TEXT[0].folder(1)]  # what the base does not have is on its data all the same
    found[TEXT[1].folder(1)]["result"]["fingerprint"] = [7, 5]
    assert [each.n for each in compare(TEXT[:2], 3, found)[TEXT[0].column]] == [1, 1]
    assert "seeds [1]: not the data of none" in "".join(
        analyze.table_lines(compare(TEXT, 3, found)))
    found[RECALL[0].folder(0)] = record(RECALL[0], 0, 3000, budget=3000)
    base, ours = compare(RECALL[:2], 1, found)["recall"]
    assert ours.against(base)[:2] == (1000, 100)


def test_figures_show_every_seed_and_what_is_published(monkeypatch):
    figures = []
    monkeypatch.setattr(analyze, "keep_figure", lambda figure, path: figures.append(figure))
    none, eca = settings_in("tasks", "reversed_addition | eca, whole")
    found = made_up({none: (0.5,), eca: (0.75, 0.8, 0.7)})
    analyze.draw("table", compare([*RECALL, *TEXT, *SORTING], 3, made_up(SOME)), "a.png")
    analyze.draw("tasks", compare(settings_in("tasks"), 3, found), "a.png")
    words, gains = ({each.get_text() for each in figure.findobj(Text)} for figure in figures)
    assert {"recall", "none (2 of 3 found)", "dyck, whole (n = 2)"} <= words
    marks = {marker: [x for axis in figures[0].axes for line in axis.lines
                      if line.get_marker() == marker for x in line.get_xdata()] for marker in "ox"}
    assert marks == {"x": [BUDGET], "o": [
        value for values in SOME.values() for value in values if value != BUDGET]}
    # 91.0 - 76.4; attention of set: 54.4 - 76.4
    assert {"+25.0 (n = 1)\npaper +14.6", "not run\npaper -22.0"} <= gains


LATE, SOON, MIDDLE = (900, BUDGET, 950, 920, BUDGET, 900), (90, 100, 95, 92, 90, 91), (400,) * 6
EVEN = (2.0, 2.001, 2.002, 2.0, 2.001, 2.0)


@pytest.mark.parametrize("column,worse,better,counting,verdict", [
    ("recall", LATE, SOON, False, "supported"), ("recall", SOON, MIDDLE, False, "contradicted"),
    ("recall", (), SOON, False, "not run"), ("recall", MIDDLE[:3], SOON[:3], False, "undecided"),
    ("recall", MIDDLE, SOON, True, "contradicted"),  # 500 steps of warm-up
    ("english", EVEN, (2.0, 2.03, 2.0, 2.03, 2.0, 2.0), False, "undecided"),
    ("english", EVEN, EVEN[::-1], False, "no difference beyond the margin"),
    ("english", (2.0, 2.2, 2.1, 2.3, 1.9, 2.0), EVEN, False, "undecided")])
def test_a_claim_is_decided_by_its_two_settings(column, worse, better, counting, verdict):
    none, ours = settings_in("controls", f"{column} | set")[:2]
    claim = analyze.Claim("more", "", "controls", column, "set", "none", counting)
    _, n, _, said = analyze.judge(claim, 6, made_up({none: worse, ours: better}))
    assert said == verdict and n == str(len(worse))


def test_the_report_is_whole_and_keeps_what_a_person_wrote(tmp_path, monkeypatch, call):
    pictures, ours = [], f"# Ours\n\nWörds. \n\n{analyze.MARK}\n"
    settings = [each for claim in analyze.CLAIMS for each in settings_in(claim.experiment)
                if each.column == claim.column and each.name in (claim.better, claim.worse)]
    keep(made_up({each: (0.1, 0.2) for each in settings}), tmp_path)
    (tmp_path / "report.md").write_text(f"{ours}old", "utf-8")
    monkeypatch.setattr(analyze, "draw", lambda name, columns, path: pictures.append(path.name))
    call("report", "--results", tmp_path, "--seeds", 2)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.startswith(f"{ours}\n# What was found\n") and "\nold" not in text
    assert "not run |" not in text, "each claim's settings are in its experiment"
    assert all(f"| {claim.text} |" in text for claim in analyze.CLAIMS)
    assert all(f"({name})" in text for name in pictures) and "controls.png" in pictures
    n = min(each.seeds for each in settings)
    assert 2 / math.comb(2 * n, n) < 0.05 / len(analyze.CLAIMS), "p could never be so small"


# Results on the disk, curves

GOOD, NAME = record(RECALL[0], 0, 500), RECALL[0].folder(0)


def test_what_is_packed_gives_the_same_table_and_counts_as_run(tmp_path, monkeypatch, call):
    runs, packed = tmp_path / "runs", tmp_path / "packed/all.gz"
    monkeypatch.setattr(analyze, "call_train", None)  # nothing may be run
    monkeypatch.chdir(tmp_path)
    keep(made_up(SOME), runs)
    failed = json.dumps({"name": NAME, "failed": "no room"})  # a result hides it
    (runs / "zzz.gz").write_bytes(gzip.compress(failed.encode()))
    packed.parent.mkdir()
    call("pack", packed, "--results", runs)
    for order in ((runs, "--show"), (packed,), (packed.parent, "--seeds", 3)):
        told = call("transfer", "--only", "recall | set, full", "--results", *order)
        assert "| none | 900 | 90.0% | 2 of 3 found |" in told
        assert "| set, full | 200 | 90.0% | 3 of 3 found | at least 700 |" in told
    assert "0 runs to go" in told


@pytest.mark.parametrize("order,word", [
    ("pack good.gz --results typo", "typo"), ("table --show --results typo", "typo"),
    ("table --results good.gz", "good.gz: Not a gzipped file"), ("table --only ecall", "ecall"),
    ("pack pipe.gz --results runs", "not a file"), ("curves empty", "config.json")])
def test_what_is_refused_changes_nothing(order, word, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    keep({NAME: GOOD}, tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.gz").write_bytes(b"precious")
    os.mkfifo("pipe.gz")
    there = sorted(tmp_path.rglob("*"))
    assert word in refused(analyze, *order.split())
    assert (tmp_path / "good.gz").read_bytes() == b"precious"
    assert sorted(tmp_path.rglob("*")) == there and (tmp_path / "pipe.gz").is_fifo()


@pytest.mark.parametrize("name,content", [
    ("../r.gz", gzip.compress(b"[1]")), ("../r.gz", b"no"), ("log.jsonl", b"[1]"),
    ("../r.gz", gzip.compress(json.dumps(GOOD | {"name": "x" * 9999}).encode())),  # a long line
    ("result.json", json.dumps(GOOD["result"] | {"val_accuracy": "x"}).encode())])
def test_a_damaged_result_is_refused(name, content, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(analyze, "LONG", 5000)
    keep({NAME: GOOD}, tmp_path)
    (tmp_path / NAME / name).write_bytes(content)
    assert str(tmp_path) in refused(analyze, "transfer", "--show", "--results", tmp_path)


def test_a_run_without_a_config_is_read_as_those_of_the_archive_are(tmp_path):
    keep({NAME: GOOD}, tmp_path)
    (tmp_path / NAME / "config.json").unlink()
    (tmp_path / "warmups.tar.gz").write_bytes(b"may lie there, too")
    assert analyze.read_results(tmp_path)[NAME] == GOOD | {"environment": None}


def test_two_packed_files_do_not_say_two_things_of_one_run(tmp_path, refused):
    for i, name in enumerate(("a.gz", "b.gz")):
        text = json.dumps({"name": NAME, **record(RECALL[0], 0, 500 + 100 * i)})
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert f"b.gz: of {NAME} it has another" in refused(analyze, "claims", "--results", tmp_path)


def test_curves_draw_each_run_and_the_mean_over_seeds(tmp_path, monkeypatch, refused, call):
    runs, figures = made_up({TEXT[0]: (2.0, 3.0), TEXT[1]: (2.0, 2.1)}), []
    monkeypatch.setattr(analyze, "keep_figure", lambda figure, path: figures.append(figure))
    for i, each in enumerate(runs.values()):
        each["result"]["warmup"] = "set" if i < 2 else "none"
        each["result"]["settings"]["steps"] += i // 2
        each["log"] = [evaluation(step, loss=9 - i - step) for step in range(4 - i // 3)]
    keep(runs, tmp_path)
    folders = [tmp_path / name for name in runs]
    for folder in folders:
        (folder / "result.json").unlink()  # they may be looked at before they have ended
    assert "seed 1, 27 tokens, loss 5.0000, 20.00% right\n" in call("curves", *folders)
    (axis,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axis.lines] == [
        [8, 7, 6], [7, 6, 5], [7.5, 6.5, 5.5], [6, 5, 4], [5, 4], []]
    assert [each.get_text() for each in axis.get_legend().get_texts()] == [
        "warmup set, steps 1000 (n = 2)", "warmup none, steps 1001 (n = 2)"]
    (folders[1] / "config.json").write_text(json.dumps(GOOD["result"]))
    assert "different data" in refused(analyze, "curves", *folders)
    (folders[2] / "log.jsonl").write_text('{"stage": "warmup", "step": 1}')
    assert "no evaluation of its training yet" in refused(analyze, "curves", folders[2])


BLUR = np.array([[0.5, 0.1, 0.6, 0.9], [0.8, 0.4, 0.2, 0.7]])
SHARP, BLURRED, HEADS = {(0, 1), (1, 2)}, {(0, 3), (1, 0)}, set(np.ndindex(BLUR.shape))


def before_and_after(change):
    """The parameters of a model of 2 layers of 4 heads, 8 wide, before and after a change."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 12, 2, 4, 32))
    parameters = dict(model.named_parameters())
    before = {name: p.data.add_(torch.randn_like(p)).clone() for name, p in parameters.items()}
    analyze.change_weights(model, change, 1, BLUR)
    return before, parameters


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
    ("without sharp", SHARP), ("without random", 2), ("only blurred", HEADS - BLURRED),
    ("only random", 6)])
def test_heads_are_replaced_by_their_entropy_and_nothing_else_is(change, wanted):
    before, after = before_and_after(change)
    differs, replaced = {name: before[name] != after[name] for name in before}, set()
    for layer in range(2):
        parts = [differs.pop(f"h.{layer}.attn.{name}").view(first, 4, -1) for name, first in (
            ("c_attn.weight", 3), ("c_attn.bias", 3), ("c_proj.weight", 32))]
        by_head = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
        assert torch.equal(by_head.all(1), by_head.any(1)), "all of a head or nothing"
        replaced |= {(layer, head) for head in range(4) if by_head[head].all()}
    assert replaced == wanted or len(replaced) == wanted
    assert not any(each.any() for each in differs.values())


def test_an_interrupted_experiment_goes_on_and_takes_up_warm_ups(tmp_path, monkeypatch, call):
    shape = "--data haystack:pairs=3 --size 1_2_8 --device cpu"
    warm = f"{shape} --warmup set:length=4 --warmup_steps 3 --warmup_batch_size 4 --steps 0"
    run = f"{shape} --batch_size 4 --eval_rows 4 --lr 0 --steps"
    settings = [analyze.Setting("recall", *each, 10) for each in (
        ("none", f"{run} 400 --warmup none", (), "", ()),
        ("mixed", f"{run} 1", (warm, warm), "", (1, 0)),
        ("shuffled", f"{run} 1", (warm,), "shuffled", ()))]
    none, mixed, shuffled = folders = [tmp_path / each.folder(0) for each in settings]
    code = (f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); import analyze, data\n"
            # A shell ignores it for what it starts with "&".
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"settings = [analyze.Setting(*each) for each in {[*map(tuple, settings)]}]\n"
            "analyze.settings_in = lambda name, only: settings\ndata.run_main(analyze.main)")
    sweep = subprocess.Popen([sys.executable, "-c", code, "table", "--seeds", "1", "--results",
                              tmp_path], start_new_session=True, stdout=subprocess.DEVNULL)
    while not (none / "ckpt.pt").exists() and sweep.poll() is None:
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(60) == 130 and not (none / "result.json").exists()
    assert not any(folder.exists() for folder in folders[1:])
    log = (none / "log.jsonl").read_text()
    monkeypatch.setattr(analyze, "settings_in", lambda name, only: settings)
    order = ("table", "--results", tmp_path, "--seeds", 1)
    with lock(none / ".lock"):
        told = call(*order)
    assert "3 runs to go" in told and "mixed | seed 0: done" in told
    assert "none | seed 0: failed: exit status 2: error: another process is at work" in told
    assert "1 runs to go" in call(*order) and (none / "result.json").exists()
    assert (none / "log.jsonl").read_text().startswith(log), "it went on, and did not begin again"
    assert json.loads((shuffled / "result.json").read_text())["warmup"].endswith("(shuffled)")
    paths = [tmp_path / folder_of(seed, warm) / "warmup.pt" for seed in (1, 0)]
    made, *given = (load(path)[0].state_dict() for path in (mixed / "ckpt.pt", *paths))
    for name in made:
        if part_of(name) in ("attn", "mlp"):
            assert torch.equal(made[name], given[part_of(name) == "mlp"][name]), name
    assert "0 runs to go" in call(*order) and not list(tmp_path.glob("*.changed.pt"))
