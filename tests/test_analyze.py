"""Curves of runs side by side, statistics, sweeps."""
import contextlib
import csv
import gzip
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze as script
import train
from conftest import ROOT
from data import UserError
from model import GPT, GPTConfig, part_of


def made_up_run(folder, warmup="dyck", data="code", losses=(5.0, 3.0, 2.5), seed=0):
    folder.mkdir()
    settings = {"data": data, "warmup": warmup, "init": None, "seed": seed, "transfer": "attn", "steps": 9, "warmup_steps": 9}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    lines = [{"stage": "warmup", "step": 1, "tokens": 10, "loss": 9.0, "val_loss": 9.0, "val_accuracy": 0.0}]
    lines += [{"stage": "train", "step": i, "tokens": 100 * i, "val_loss": loss, "val_accuracy": 0.5} for i, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_that_differ_in_the_seed_alone_are_one_line(tmp_path, monkeypatch, capsys):
    runs = [made_up_run(tmp_path / f"a{seed}", "dyck", losses=(5.0, 3.0 + seed, 2.0), seed=seed) for seed in range(3)]
    labels, thin = [], []
    monkeypatch.setattr(script.pyplot().Axes, "plot", spy := lambda self, *args, label=None, _plot=script.pyplot().Axes.plot, **kwargs: (
        labels.append((label, list(args[1]))) if label else thin.append(list(args[1])), _plot(self, *args, label=label, **kwargs))[1])
    call(monkeypatch, "curves", *runs, made_up_run(tmp_path / "b", "none"), "--picture", tmp_path / "c.png")
    wanted = [("warm-up dyck (attn), mean of 3 seeds", [4.0, 2.0]), ("warm-up none, seed 0", [3.0, 2.5])]
    assert labels == wanted and sorted(thin) == [[3.0, 2.0], [4.0, 2.0], [5.0, 2.0]]
    for run in tmp_path.glob("*/"):  # the same from the file that `pack` makes of them
        settings = json.loads((run / "config.json").read_text())["settings"]
        (run / "result.json").write_text(json.dumps({"settings": settings, "val_loss": 2.0, "val_accuracy": 0.5,
                                                     "tokens": {"procedural": 10, "semantic": 200}}))
    call(monkeypatch, "pack", tmp_path / "r.gz", "--results", tmp_path)
    labels.clear()
    call(monkeypatch, "curves", "^a", "b", "--results", tmp_path / "r.gz", "--picture", tmp_path / "c.png")
    assert labels == wanted


def test_a_run_is_named_by_the_warm_up_that_it_takes_up():
    found = {"warmup-dyck_k=4-s0-0123abcd": {"result": {"settings": {"warmup": "dyck:k=4"}}}}
    run = {"warmup": "none", "warmup_steps": 0, "transfer": "full", "embeddings": "random"}
    for init, words in (("warmup-dyck_k=4-s0-0123abcd/warmup.pt", "dyck:k=4"), ("out/code-set-s0/warmup.pt", "code-set-s0"),
                        ("gpt2.pt", "gpt2"), ("models/gpt2-medium", "gpt2-medium"), ("runs/b.pt", "b"),
                        ("haystack-set-s0-0123abcd-noise_0.1.init.pt", "noise 0.1 weights"), (None, "none")):
        assert script.label(run | {"init": init}, found) == words
    assert script.label(run | dict(init="gpt2.pt", transfer="attn", embeddings="mean", positions="random"), found) == (
        "gpt2 (attn, mean embeddings, positions random)")
    assert script.same_but_seed(run | dict(seed=0, transfer="attn")) == script.same_but_seed(run | dict(seed=1)), "moot"
    assert script.same_but_seed(run | dict(init="a.pt", transfer="attn")) != script.same_but_seed(run | dict(init="a.pt"))


def test_curves_prints_a_table_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    runs = [made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b", "none", losses=(5.0, 4.0, 3.25))]
    monkeypatch.setattr("sys.argv", ["analyze.py", "curves", *map(str, runs), "--picture", str(tmp_path / "c.png")])
    script.main()
    printed = capsys.readouterr().out
    assert "dyck (attn)" in printed and "2.5000" in printed and "3.2500" in printed and "9.0" not in printed
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_or_does_not_compare_is_refused(tmp_path, refused):
    assert "config.json" in refused(script, "curves", tmp_path)
    runs = [made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b", data="docs")]
    assert "different data" in refused(script, "curves", *runs)
    assert "no run there" in refused(script, "curves", "c4", "--results", tmp_path)
    assert "regular expression" in refused(script, "curves", "(", "--results", tmp_path)
    assert "no evaluation" in refused(script, "curves", made_up_run(tmp_path / "c", losses=()))
    refused(script, "curves", runs[0], "--picture", tmp_path / "no" / "folder.png")
    refused(script, "draw")


# Statistics, against worked examples


@pytest.mark.parametrize("t,df,p", [(2.776445, 4, 0.05), (12.706205, 1, 0.05), (1.959964, 10 ** 6, 0.05), (2.228139, 10, 0.05),
                                    (3.169273, 10, 0.01), (0.0, 3, 1.0), (-2.776445, 4, 0.05)])
def test_students_t_is_that_of_the_tables(t, df, p):
    assert script.t_tail(t, df) == pytest.approx(p, abs=1e-5)


def test_the_interval_of_a_mean():
    mean, half = script.interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), abs=1e-5)
    assert script.interval([2.0])[0] == 2 and math.isnan(script.interval([2.0])[1]) and math.isnan(script.interval([])[0])


def test_the_paired_t_test():
    assert script.paired_p([2, 4, 6, 8, 10], [1, 2, 3, 4, 5]) == pytest.approx(0.01324, abs=1e-5)
    assert script.paired_p([1, 2], [1, 2]) == 1
    for a, b in (([1], [2]), ([2, 3], [1, 2]), ([math.nan, 1, 2], [0, 0, 0]), ([math.inf, 1], [0, 0])):
        assert math.isnan(script.paired_p(a, b)), "there is nothing to test"


def test_holms_correction():
    assert script.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    corrected = script.holm([0.5, math.nan, 0.02, 0.9])
    assert corrected[[0, 2, 3]] == pytest.approx([1.0, 0.06, 1.0]) and math.isnan(corrected[1])


# Experiments


def cell(row, prose, **changes):
    settings = dict(data=str(prose), warmup="none", size="1_2_16", block_size=32, steps=4, batch_size=4, eval_batches=1)
    return script.Cell(row, "text", {**settings, **changes})


@pytest.fixture
def small(prose, monkeypatch):
    """An experiment of three cells, of which two are the same run."""
    def small(budget):
        """A small one."""
        return [cell("none", prose), cell("none again", prose), cell("set", prose, warmup="set:length=4", warmup_steps=3)]
    monkeypatch.setitem(script.EXPERIMENTS, "table", small)
    return small


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["analyze.py", *map(str, args)])
    script.main()


@pytest.fixture
def in_process(monkeypatch):
    """Runs of a sweep in this process: the same train.py, without starting Python each time."""
    def run(command, **kwargs):
        with contextlib.chdir(kwargs["cwd"]):
            try:
                train.run(train.parse_arguments(command[2:])[0])
            except train.UserError as error:
                return SimpleNamespace(returncode=2, stderr=f"error: {error}\n")
        return SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))


def test_a_sweep_runs_each_run_once_resumes_the_interrupted_and_shows_all(small, tmp_path, monkeypatch, capsys):
    order = ("table", "--seeds", 1, "--jobs", 2, "--results", tmp_path / "r")
    call(monkeypatch, *order)
    printed = capsys.readouterr().out
    assert "2 runs, 0 done already, 2 to go" in printed and "[2/2] done" in printed and "left" in printed
    warmup, *results = sorted((tmp_path / "r").glob("*/result.json"), key=lambda path: "warmup-" not in str(path))
    assert len(results) == 2 and (tmp_path / "r" / "table-quick.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((warmup.parent / "learned.json").read_text())["verdict"] == "not learned"
    rows = list(csv.DictReader(open(tmp_path / "r" / "table-quick.csv")))
    assert [row["learned"] for row in rows] == ["", "", "0/1"]
    assert [row["row"] for row in rows] == ["none", "none again", "set"] and {row["n"] for row in rows} == {"1"}
    assert float(rows[1]["gain"]) == 0 and rows[0]["pairs"] == "0" and rows[2]["pairs"] == "1"
    losses = [json.loads(path.read_text())["val_loss"] for path in results if "none" in str(path)]
    assert float(rows[0]["mean"]) == pytest.approx(sum(losses))

    times = lambda: [path.stat().st_mtime_ns for path in (warmup, *results)]
    before = times()
    results[-1].unlink()  # as if that run had been stopped just before its end
    (tmp_path / "r").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "r")  # and the folder had been on a journey
    call(monkeypatch, *order)
    assert "1 done already, 1 to go" in capsys.readouterr().out
    assert [a == b for a, b in zip(before, times())] == [True, True, False]
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path / "r", "--show")
    told = capsys.readouterr().out
    assert "gain" in told

    call(monkeypatch, "pack", tmp_path / "all.jsonl.gz", "--results", tmp_path / "r")
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path / "all.jsonl.gz", "--show", "--to", tmp_path / "again")
    assert told.partition("\ntable: ")[0] in capsys.readouterr().out, "one file holds all that the tables need"
    assert (tmp_path / "again" / "table-quick.png").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "all.jsonl.gz").rename(tmp_path / "elsewhere" / "earlier.jsonl.gz")
    call(monkeypatch, *order[:-1], tmp_path / "elsewhere")
    assert "2 done already, 0 to go" in capsys.readouterr().out, "a packed file in the folder is as good as its runs"
    call(monkeypatch, "pack", tmp_path / "all.jsonl.gz", "--results", tmp_path / "elsewhere")
    assert (tmp_path / "all.jsonl.gz").read_bytes() == (tmp_path / "elsewhere" / "earlier.jsonl.gz").read_bytes()


def test_a_run_that_fails_is_listed_and_the_others_go_on(in_process, prose, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.EXPERIMENTS, "table", lambda budget: [cell("none", prose), cell("odd", prose, batch_size=3, grad_accum=2)])
    monkeypatch.setattr(script.EXPERIMENTS["table"], "__doc__", "One that fails.")
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    printed = capsys.readouterr().out
    assert "failed: odd | text | seed 0: --batch_size 3 does not divide" in printed and "none" in printed


def test_two_processes_never_run_the_same_run(prose, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    name = script.name_of(cell("none", prose), 0)
    with open(tmp_path / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert script.run_once(cell("none", prose), 0, tmp_path, {}) == "elsewhere" and not (tmp_path / name).exists()


def test_a_run_that_outlives_its_sweep_is_not_run_by_another(prose, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    left = []

    def run(command, cwd, pass_fds, **kwargs):  # a run that goes on, though its sweep hears that it was killed
        left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=cwd, pass_fds=pass_fds))
        return SimpleNamespace(returncode=1, stderr="error: killed\n")
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    try:
        assert [script.run_once(cell("none", prose), 0, tmp_path, {}) for _ in range(2)] == ["failed", "elsewhere"]
    finally:
        left[0].kill()
        left[0].wait()
    assert script.run_once(cell("none", prose), 0, tmp_path, {}) == "failed", "and then it is free"
    left[1].kill()


def test_a_warm_up_is_made_once_for_all_runs_that_take_it_up(in_process, prose, tmp_path, monkeypatch, capsys):
    def cells(budget):
        """Shared."""
        warm = dict(warmup="set:length=4", warmup_steps=3)
        made = [cell(row, prose, **warm, **more) for row, more in (("full", {}), ("attn", dict(transfer="attn")), ("lr", dict(lr=1e-4)))]
        mixture = {"attn_from": made[0].settings, "mlp_from": {**made[0].settings, "warmup": "union:length=4"}}
        return [cell("none", prose), *made, script.Cell("mixture", "text", cell("", prose).settings, mixture=mixture)]
    monkeypatch.setitem(script.EXPERIMENTS, "mix", cells)
    call(monkeypatch, "mix", "--seeds", 1, "--results", tmp_path)
    assert "failed" not in capsys.readouterr().out
    assert len(list(tmp_path.glob("warmup-*/warmup.pt"))) == 2 and len(list(tmp_path.glob("*/result.json"))) == 7
    whole = train.run(train.Settings(**cells("quick")[1].settings, seed=0, out=str(tmp_path / "alone")))
    losses = {row["row"]: float(row["mean"]) for row in csv.DictReader(open(tmp_path / "mix-quick.csv"))}
    assert losses["full"] == whole["val_loss"], "the same run as in one go" 
    assert len(set(losses.values())) == 5


def test_a_warm_up_that_fails_is_the_reason_why_its_runs_failed(in_process, prose, tmp_path):
    bad = cell("set", prose, warmup="set:length=4", warmup_batch_size=3, grad_accum=2)
    assert script.run_once(script.Cell("set", "text", {**bad.settings, "warmup_steps": 0}), 0, tmp_path, {}) == "failed"
    (why,) = tmp_path.glob("*.failed")
    assert "warmup_steps 0 is not accepted" in why.read_text()


@pytest.mark.parametrize("name", list(script.EXPERIMENTS))
@pytest.mark.parametrize("budget", ["quick", "paper"])
def test_every_experiment_is_a_list_of_settings_that_train_accepts(name, budget):
    cells = script.EXPERIMENTS[name](budget)
    assert len({(c.row, c.column) for c in cells}) == len(cells), "each cell has a place of its own"
    for c in cells:
        train.resolve(train.Settings(**c.settings, device="cpu"))
        assert not math.isnan(c.x) or not c.line
    for column in {c.column for c in cells}:
        first = next(c for c in cells if c.column == column)
        assert first.settings["warmup"] == "none" and not first.mixture, "what the others are compared with"


def test_every_claim_is_about_rows_that_the_experiments_have():
    for claim in script.CLAIMS:
        cells = script.EXPERIMENTS[claim.experiment]("paper")
        rows = {c.row for c in cells}
        for pattern in filter(None, (claim.better, claim.worse, claim.than)):
            assert any(script.re.fullmatch(pattern, row) for row in rows), claim.text


def made_up_results(cells, values, learned="learned"):
    """{name: record} as read_results gives it. values: {(row, column): one value per seed}."""
    found = {}
    for c in cells:
        for seed, value in enumerate(values.get((c.row, c.column), ())):
            tokens = {"procedural": 10 * (c.settings["warmup"] != "none"), "semantic": 5}
            settings = {"seed": seed, "steps": 9, "warmup": c.settings["warmup"], "data": c.column}
            result = {"val_accuracy": value, "val_loss": value, "tokens": tokens, "settings": settings}
            found[script.name_of(c, seed)] = {"result": result}
            for warm in c.mixture.values() or [c.settings] * (c.settings["warmup"] != "none"):
                found[script.warmup_of(warm, seed)[0]] = {"result": result | {"settings": settings | {"steps": 0}},
                                                                  "learned": {"verdict": learned}}
    return found


def test_gains_are_paired_by_seed_and_more_is_better():
    cells = [script.Cell(row, data, {"data": data, "warmup": row}) for data in ("haystack", "code") for row in ("none", "set")]
    found = made_up_results(cells, {("none", "haystack"): (0.1, 0.2, 0.9), ("set", "haystack"): (0.3, 0.4),
                                    ("none", "code"): (2.0, 3.0), ("set", "code"): (2.5, 3.5)})
    found[script.name_of(cells[1], 2)] = {"failed": "no room"}
    entries = {(e["row"], e["column"]): e for e in script.compare(cells, 3, found)}
    gains = {key: (e["n"], e["pairs"], e["gain"]) for key, e in entries.items()}
    assert gains["set", "haystack"] == (2, 2, pytest.approx(0.2)) and gains["set", "code"] == (2, 2, pytest.approx(-0.5))
    assert gains["none", "haystack"][:2] == (3, 0) and entries["set", "haystack"]["failed"] == [(2, "no room")]
    assert "failed: set | haystack | seed 2: no room" in script.table_lines("table", list(entries.values()))


@pytest.mark.parametrize("name", list(script.EXPERIMENTS))
def test_every_experiment_has_a_table_and_a_figure_even_when_half_of_it_is_missing(name, tmp_path):
    cells, rng = script.EXPERIMENTS[name]("quick"), np.random.default_rng(0)
    entries = script.compare(cells, 2, made_up_results(cells[::2], {(c.row, c.column): rng.random(2) for c in cells[::2]}))
    script.draw_comparison(name, entries, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(c.row) in "\n".join(script.table_lines(name, entries)) for c in cells)
    script.verdict_lines(name, entries)


def test_what_was_measured_on_other_held_out_rows_is_not_compared():
    cells = [script.Cell(row, "code", {"data": "code", "warmup": row}) for row in ("none", "set")]
    found = made_up_results(cells, {("none", "code"): (2.0, 2.0), ("set", "code"): (1.5, 1.0, 0.5)})
    for cell, seed, batches in ((0, 0, 40), (0, 1, 40), (1, 0, 20), (1, 1, 40), (1, 2, 20)):
        found[script.name_of(cells[cell], seed)]["result"]["settings"]["eval_batches"] = batches
    _, entry = script.compare(cells, 3, found)
    assert entry["values"] == {1: 1.0} and (entry["pairs"], entry["gain"]) == (1, pytest.approx(1.0))
    assert [seed for seed, why in entry["failed"] if "20 held-out batches" in why] == [0, 2]
    assert script.on("code", "quick")["eval_batches"] and "eval_batches" not in script.name_of(script.tuned("quick")[0], 0)


def packed(path, records):
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def test_a_result_counts_more_than_a_failure_wherever_they_are(tmp_path):
    settings = {"seed": 0, "steps": 1, "warmup": "none", "data": "code"}
    result = {"settings": settings, "tokens": {"procedural": 0, "semantic": 1}, "val_loss": 1.0, "val_accuracy": 0.5}
    packed(tmp_path / "a.jsonl.gz", [{"name": "x", "result": result, "learned": {"verdict": "learned"}}])
    packed(tmp_path / "b.jsonl.gz", [{"name": "x", "failed": "no room"}, {"name": "y", "failed": "no room"}])
    found = script.read_results(tmp_path)
    assert found == {"x": {"result": result, "learned": {"verdict": "learned"}}, "y": {"failed": "no room"}}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "result.json").write_text("{")
    assert script.read_results(tmp_path) == found, "a damaged file hides no good result"
    (tmp_path / "x" / "result.json").write_text(json.dumps(result | {"val_loss": 2.0}))
    (tmp_path / "y.failed").write_text("no time")
    (tmp_path / "z.failed").mkdir()
    (tmp_path / "x" / "learned.json").write_text("[1]")
    newer = script.read_results(tmp_path)
    assert script.finished(tmp_path / "x")
    assert newer["x"]["result"]["val_loss"] == 2.0 and newer["x"]["learned"] == {"verdict": "learned"}
    (tmp_path / "x" / "result.json").write_text(json.dumps(result | {"tokens": {}}))
    assert script.read_results(tmp_path) == {**found, "y": {"failed": "no room"}}
    assert not script.finished(tmp_path / "x"), "what cannot be read is run again"


RESULT = {"settings": {"seed": 0, "steps": 1, "warmup": "none", "data": "code"}, "val_loss": 1.0, "val_accuracy": 0.5,
          "tokens": {"procedural": 0, "semantic": 1}}


@pytest.mark.parametrize("record", [
    {"name": "a", "result": {}}, {"name": "a"}, {"result": RESULT}, [1], {"name": "a", "failed": "no", "log": []},
    {"name": "a", "result": RESULT, "log": [{}]}, {"name": "a", "result": RESULT, "learned": 3},
    *({"name": "a", "result": {k: v for k, v in RESULT.items() if k != key}} for key in RESULT),
    {"name": "a", "result": RESULT | {"tokens": {"procedural": 1}}}, {"name": "a", "result": RESULT | {"settings": {"seed": 1}}}])
def test_a_packed_file_that_lacks_what_the_tables_need_is_refused(record, tmp_path, refused):
    for command in ("claims", "report"):
        assert "cannot read" in refused(script, command, "--results", packed(tmp_path / "r.jsonl.gz", [record]))
        assert "it is empty" in refused(script, command, "--results", packed(tmp_path / "r.jsonl.gz", []))
    whole = packed(tmp_path / "r.jsonl.gz", [{"name": "a", "result": RESULT}]).read_bytes()
    (tmp_path / "r.jsonl.gz").write_bytes(whole[:-9])
    assert "ended before" in refused(script, "claims", "--results", tmp_path / "r.jsonl.gz"), "cut short"


def test_figures_show_the_values():
    row = dict(column="haystack", metric="accuracy", p_holm=0.01, pairs=2)
    entries = [row | dict(row="none", mean=0.2, half=0.1, n=2, pairs=0, gain=math.nan, values={0: 0.1, 1: 0.3}, line="", x=0.5),
               row | dict(row="set", mean=0.9, half=0.2, n=2, gain=0.7, values={0: 0.8, 1: 1.0}, line="a", x=0.5),
               row | dict(row="eca", mean=0.1, half=0.3, n=2, gain=-0.1, values={0: 0.0, 1: 0.2}, line="a", x=1.0)]
    plt = script.pyplot()
    image = script.draw_heat_map(plt.figure().gca(), entries, ["none", "set", "eca"], ["haystack"])
    assert np.allclose(image.get_array().ravel(), [0, 70, -10]) and image.get_cmap().name == "RdBu", "red is worse"
    assert [text.get_text() for text in image.axes.texts] == ["20.0%*", "90.0%*", "10.0%*"]
    axis = plt.figure().gca()
    script.draw_points(axis, entries, ["none", "set", "eca"])
    dots = [list(line.get_xdata()) for line in axis.lines if line.get_alpha()]
    assert dots == [[0.1, 0.3], [0.8, 1.0], [0.0, 0.2]]
    axis = plt.figure().gca()
    script.draw_lines(axis, entries, ["a"], log=False)
    (bars,) = axis.containers
    assert list(bars.lines[0].get_xdata()) == [0.5, 1.0] and list(bars.lines[0].get_ydata()) == [0.9, 0.1]
    assert [list(end.get_ydata()) for end in bars.lines[1]] == [pytest.approx([0.7, -0.2]), pytest.approx([1.1, 0.4])]
    plt.close("all")


def test_a_part_of_an_experiment_keeps_what_it_is_compared_with():
    cells = script.table("quick")
    assert script.chosen(cells, "") == cells
    some = script.chosen(cells, "haystack.*set")
    assert [c.row for c in some] == ["none", "set, full", "set, attn", "set, full, fresh embeddings", "set, attn, fresh embeddings"]
    assert {c.column for c in some} == {cells[0].column}
    for pattern, word in (("nothing", "haystack"), ("(", "regular expression")):
        with pytest.raises(UserError, match=word):
            script.chosen(cells, pattern)


def test_the_share_of_the_text_is_interpolated_between_runs():
    cells = [c for c in script.efficiency("quick") if c.column == "docs" and c.line in ("none", "set", "union")]
    losses = {("none", 1.0): 2.0, ("set", 1.0): 1.9, ("set", 0.85): 1.98, ("set", 0.7): 2.02, ("set", 0.55): 2.1,
              ("union", 1.0): 2.05, ("union", 0.85): 2.1, ("union", 0.7): 2.2, ("union", 0.55): 2.3}
    found = made_up_results(cells, {(c.row, c.column): [losses[c.line, c.x]] * 2 for c in cells if (c.line, c.x) in losses})
    entries = script.compare(cells, 2, found)
    assert script.shares(entries, "set") == {0: pytest.approx(math.sqrt(0.85 * 0.7)), 1: pytest.approx(math.sqrt(0.85 * 0.7))}
    assert script.shares(entries, "union") == {0: math.inf, 1: math.inf}, "never reached"
    early, first, second = script.verdict_lines("efficiency", entries)
    assert early.startswith("docs: at the first evaluation, after a fifth of the text, the loss is")
    assert "77% ± 0% of the text in 2 of 2 seeds" in first and "no less than all of the text in any of 2 seeds" in second


def test_how_many_seeds_found_the_needle_is_counted_for_each_start():
    cells = script.embeddings("quick")
    values = {(c.row, c.column): [0.95, 0.2] for c in cells if c.row.startswith(("none", "dyck, attn", "set, attn, all fresh"))}
    lines = script.verdict_lines("embeddings", script.compare(cells, 2, made_up_results(cells, values)))
    assert lines[1:3] == ["| seeds with more than 90 % right | dyck | set |", "|---|---|---|"]
    assert "| attn, all fresh | 1 of 2 | 1 of 2 |" in lines and "| attn, head at the mean | 1 of 2 | - |" in lines and len(lines) == 8
    assert script.verdict_lines("embeddings", script.compare(cells, 2, {})) == []


def test_best_is_compared_with_best_and_with_the_luck_of_more_seeds():
    cells = script.grid("quick")
    values = {(c.row, c.column): [3.0, 3.1] for c in cells} | {(cells[3].row, "docs"): [2.0, 2.2], (cells[-1].row, "docs"): [2.1, 2.1]}
    (line,) = script.verdict_lines("grid", script.compare(cells, 2, made_up_results(cells, values)))
    assert cells[3].row in line and cells[-1].row in line and "gain 0.0000" in line
    cells = script.controls("quick")
    haystack = cells[0].column
    values = {(c.row, c.column): [0.5] * 4 if c.row == "none" else [0.7] * 2 for c in cells} | {("none", haystack): [0.1, 0.2, 0.8, 0.3]}
    line = script.verdict_lines("controls", script.compare(cells, 2, made_up_results(cells, values)))[0]
    assert line.startswith(f"{haystack}: the best of 4 seeds of no warm-up has 80.0%") and "70.0% (dyck)" in line


@pytest.mark.parametrize("none,dyck,learned,verdict", [
    ((0.10, 0.11, 0.12), (0.90, 0.95, 0.97), "learned", "supported"), ((0.9, 0.95, 0.97), (0.1, 0.12, 0.11), "learned", "contradicted"),
    ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1), "learned", "undecided"), ((0.1, 0.11, 0.12), (0.9, 0.9, 0.9), "not learned", "supported (warm-up not learned)"),
    ((0.9, 0.95, 0.97), (0.1, 0.12, 0.11), "not learned", "undecided: worse (warm-up not learned)"),
    ((0.1,), (0.9,), "learned", "undecided (one seed)"), ((0.1, 0.1), (), "learned", "undecided (not run)")])
def test_verdicts_on_made_up_results_of_every_kind(none, dyck, learned, verdict):
    cells = [c for c in script.table("quick") if c.settings["data"].startswith("haystack")]
    (column,) = {c.column for c in cells}
    found = made_up_results(cells, {("none", column): none, ("dyck, attn", column): dyck, ("eca, full", column): none}, learned)
    rows = {row["claim"].text: row for row in script.claims(found, 3, ("quick",))}
    row = rows["Dyck helps recall"]
    assert row["verdict"] == verdict and row["n"] == min(len(none), len(dyck))
    (line,) = [line for line in script.claims_lines(list(rows.values())) if line.startswith("| Dyck helps recall |")]
    assert f"| {row['n']} | " in line and line.endswith(f"| {verdict} | `table --only haystack` |")


def judged(cells, values, learned="learned", budget="quick", gate=None):
    """{claim: row} of claims on made-up values {row: one value for each seed} of one column of cells."""
    found = made_up_results(cells, {(c.row, c.column): values[c.row] for c in cells if c.row in values}, learned)
    if gate:
        gate(found)
    return {row["claim"].text: row for row in script.claims(found, 8, (budget,))}


def around(mean, n=6, spread=0.01, seed=0):
    return list(mean + spread * np.random.default_rng(seed).standard_normal(n))


def test_a_claim_about_less_text_compares_less_with_all_and_names_the_share():
    cells = [c for c in script.efficiency("quick") if c.column == "code"]
    losses = {"none": 3.0, "set": 2.8, "union": 2.7, "dyck": 4.0}
    values = {c.row: around(losses.get(c.line, 5.0) - c.x, seed=i) for i, c in enumerate(cells)}
    row = judged(cells, values)["union with 85 % of the code beats none with all"]
    assert row["verdict"] == "supported" and "are enough in 6 of 6 seeds" in row["measured"]
    values |= {c.row: around(5.0 - c.x, seed=i) for i, c in enumerate(cells) if c.line == "union"}
    row = judged(cells, values)["union with 85 % of the code beats none with all"]
    assert row["verdict"] == "contradicted" and "all of the text is not enough in 6 of 6 seeds" in row["measured"]


@pytest.mark.parametrize("none,dyck,shuffled,verdict", [(0.1, 0.9, 0.1, "supported"), (0.3, 0.05, 0.01, "contradicted"),
                                                        (0.1, 0.5, 0.9, "contradicted"), (0.5, 0.5001, 0.1, "undecided")])
def test_a_control_speaks_only_where_the_warm_up_itself_helps(none, dyck, shuffled, verdict):
    cells = [c for c in script.controls("quick") if c.column == script.TASKS["quick"][0]]
    values = {"none": around(none, seed=1), "dyck": around(dyck, seed=2), "shuffled:dyck": around(shuffled, seed=3)}
    assert judged(cells, values)["Dyck helps recall, and more than shuffled Dyck"]["verdict"] == verdict


def test_seeds_that_do_not_count_are_dropped_before_a_row_is_chosen():
    cells = [c for c in script.table("quick") if c.column == script.TASKS["quick"][0]]
    values = {"none": around(0.1, seed=1), "dyck, full": around(0.3, seed=2), "dyck, attn": around(0.2, seed=3)}

    def no_answer_for_most_of_dyck(found):
        for name in list(found):
            if name.startswith("warmup-") and "-s0-" not in name and "-s1-" not in name:
                del found[name]["learned"]
    row = judged(cells, values, gate=no_answer_for_most_of_dyck)["Dyck helps recall"]
    assert row["n"] == 2 and "dyck, full" in row["measured"]
    row = judged(cells, {"none": values["none"], "dyck, full": values["dyck, full"][:1], "dyck, attn": values["dyck, attn"]})
    assert "dyck, attn" in row["Dyck helps recall"]["measured"], "one lucky seed does not stand for all"


def test_the_row_that_was_chosen_of_several_is_named_and_pays_for_it():
    cells = [c for c in script.table("quick") if c.column == script.TASKS["quick"][0]]
    alone = {"none": around(0.14, 3), "dyck, attn": around(0.2, 3, seed=1)}
    entries = script.compare(cells, 3, made_up_results(cells, {(c.row, c.column): alone[c.row] for c in cells if c.row in alone}))
    (claim,) = [claim for claim in script.CLAIMS if claim.text == "Dyck helps recall"]
    once = script.judge(claim, entries, "quick")
    alone["dyck, full"] = around(0.1, 3, seed=2)
    entries = script.compare(cells, 3, made_up_results(cells, {(c.row, c.column): alone[c.row] for c in cells if c.row in alone}))
    twice = script.judge(claim, entries, "quick")
    assert twice["p"] == pytest.approx(2 * once["p"]) and "chosen of 2 rows: dyck, attn" in twice["measured"]


def test_of_two_comparisons_the_weaker_one_is_shown_whole():
    cells = [c for c in script.controls("quick") if c.column == script.TASKS["quick"][0]]
    values = {"none": around(0.1, seed=1), "dyck": around(0.9, seed=2), "shuffled:dyck": around(0.8, spread=0.1, seed=3)}
    row = judged(cells, values)["Dyck helps recall, and more than shuffled Dyck"]
    a, b, gain = (float(word) for word in re.match(r"([\d.]+)% -> ([\d.]+)%, gain ([\d.]+)%", row["measured"]).groups())
    assert b - a == pytest.approx(gain, abs=0.11) and row["measured"].endswith("(against shuffled:dyck)")


def test_a_claim_has_to_beat_the_hardest_of_its_rows():
    cells = [c for c in script.controls("quick") if c.column == script.TASKS["quick"][0]]
    values = {"none": around(0.1, seed=1), "dyck": around(0.5, seed=2), "none, ramp of 0.2": around(0.1, seed=3),
              "none, 4 times the steps": around(0.6, n=3, seed=4)}
    text = "Dyck helps recall more than other rates, ramps or four times the steps"
    row = judged(cells, values)[text]
    assert row["gain"] == pytest.approx(-0.1, abs=0.02) and row["measured"].endswith("(against none, 4 times the steps)")
    assert judged(cells, values | {"none, 4 times the steps": [0.2]})[text]["verdict"] == "undecided (one seed)"


def test_a_claim_about_harm_is_shown_in_the_published_direction():
    cells = [c for c in script.table("quick") if c.column == "reversed_addition"]
    row = judged(cells, {"none": around(0.76, seed=1), "set, full": around(0.44, seed=2)})["set, whole model, hurts reversed addition"]
    assert re.match(r"7\d\.\d% -> 4\d\.\d%", row["measured"]) and row["verdict"] == "supported"


def test_the_readme_shows_what_the_published_results_say():
    found, readme = script.read_results(ROOT / "assets" / "results.jsonl.gz"), (ROOT / "README.md").read_text()
    seeds = script.seeds_in(found)
    starts = script.needle_lines(script.compare(script.embeddings("quick"), seeds, found))
    for lines in (script.claims_lines(script.claims(found, seeds)), starts):
        assert "\n".join(lines) in readme, "a table of README.md is not that of assets/results.jsonl.gz"


def test_holms_correction_is_over_all_rows_of_claims():
    cells = script.table("quick")
    rng = np.random.default_rng(1)
    rows = script.claims(made_up_results(cells, {(c.row, c.column): rng.random(3) for c in cells}), 3, ("quick",))
    assert len(rows) == len(script.CLAIMS)
    wanted = script.holm([1.0 if math.isnan(row["p"]) else row["p"] for row in rows])
    assert all(math.isnan(row["p"]) or row["p_holm"] == pytest.approx(p) for row, p in zip(rows, wanted))


def test_on_an_empty_folder_claims_says_what_to_run_first_and_how_long_it_takes(tmp_path, monkeypatch, capsys):
    call(monkeypatch, "claims", "--results", tmp_path)
    printed = capsys.readouterr().out
    assert printed.index("analyze.py table") < printed.index("analyze.py transfer") and "minutes" in printed


def test_the_report_holds_the_claims_and_every_table_with_its_picture(tmp_path, monkeypatch, refused):
    assert "says what to run" in refused(script, "report", "--results", tmp_path)
    found = {}
    for name in ("table", "length"):
        cells = script.EXPERIMENTS[name]("quick")
        found |= made_up_results(cells, {(c.row, c.column): [0.1, 0.2] for c in cells})
    packed(tmp_path / "r.jsonl.gz", [{"name": name, **record} for name, record in found.items()])
    call(monkeypatch, "report", "--results", tmp_path / "r.jsonl.gz", "--seeds", 2, "--to", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    for word in ("| Dyck helps recall | 11.3 -> 96.9 % |", "## table (quick)", "![length](length-quick.png)"):
        assert word in text
    assert (tmp_path / "out" / "length-quick.png").exists() and "## grid" not in text
    (tmp_path / "bad.gz").write_bytes(b"no")
    assert "cannot read" in refused(script, "claims", "--results", tmp_path / "bad.gz")
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"[1]\n"))
    assert "cannot read" in refused(script, "claims", "--results", tmp_path / "bad.gz")


def test_a_damaged_result_is_a_failed_run_and_hides_no_other(small, tmp_path, monkeypatch, capsys, in_process):
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    for path in tmp_path.glob("*/learned.json"):
        path.write_text('{"verd')
    next(tmp_path.glob("*-none-*/result.json")).write_text("")
    (tmp_path / "other.failed").write_bytes(b"\xff")
    capsys.readouterr()
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path, "--show")
    printed = capsys.readouterr().out
    assert "failed: none | text | seed 0: cannot read" in printed and "| set " in printed
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    assert "1 done already, 1 to go" in capsys.readouterr().out, "and it heals"


def test_a_stopped_run_is_not_a_failed_one_and_nothing_new_begins(prose, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=lambda *a, **k: calls.append(a) or SimpleNamespace(returncode=130, stderr="")))
    assert script.run_once(cell("none", prose), 0, tmp_path, {}) == "stopped" and len(calls) == 1
    script.STOPPING.set()
    try:
        assert script.run_once(cell("set", prose, warmup="set:length=4", warmup_steps=3), 0, tmp_path, {}) == "stopped"
    finally:
        script.STOPPING.clear()
    assert len(calls) == 1 and not list(tmp_path.glob("*.failed"))


def test_sweeps_that_make_no_sense_are_refused(refused, tmp_path):
    assert "at least 1" in refused(script, "table", "--seeds", "0")
    assert "no run of table is finished" in refused(script, "table", "--show", "--results", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot make" in refused(script, "table", "--results", tmp_path / "file" / "r")
    assert "invalid choice" in refused(script, "table", "--budget", "lavish")


# Operations on weights


def warm_model(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(20, 12, 2, 4, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


def before_and_after(operation, sharpness=None):
    model = warm_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    script.operate(model, operation, 1, sharpness)
    return before, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("operation", ["shuffled", "redrawn", "noise 0.5", "scaled 2"])
def test_operations_change_attention_and_mlps_alone_and_are_the_same_each_time(operation):
    before, after = before_and_after(operation)
    for name in before:
        assert torch.equal(before[name], after[name]) == (part_of(name) not in ("attn", "mlp")), name
    again = before_and_after(operation)[1]
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_operations_keep_what_they_promise():
    before, after = before_and_after("shuffled")
    assert all(torch.equal(before[n].flatten().sort().values, after[n].flatten().sort().values) for n in before)
    before, after = before_and_after("scaled 0.5")
    matrices = [n for n in before if part_of(n) in ("attn", "mlp")]
    assert all(torch.equal(after[n], before[n] * 0.5) for n in matrices)
    before, after = before_and_after("redrawn")
    big = [n for n in matrices if before[n].numel() >= 1024]
    assert all(abs(after[n].mean() - before[n].mean()) < 0.15 and abs(after[n].std() / before[n].std() - 1) < 0.1 for n in big)
    before, after = before_and_after("noise 0.5")
    assert all(abs((after[n] - before[n]).std() / before[n].std() - 0.5) < 0.05 for n in big)
    model, idx = warm_model().eval(), torch.randint(20, (2, 12))
    logits = model(idx)
    script.operate(model, "noise 0", 1)
    script.operate(model, "scaled 1", 1)
    assert torch.equal(model(idx), logits), "nothing asked for, nothing changed"


@pytest.mark.parametrize("operation,replaced", [("without sharp", {(0, 1), (1, 2)}), ("without blurred", {(0, 3), (1, 0)}),
                                                ("only sharp", {(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)})])
def test_heads_are_kept_or_replaced_by_their_entropy(operation, replaced):
    sharpness = np.array([[0.5, 0.1, 0.6, 0.9], [0.8, 0.4, 0.2, 0.7]])
    before, after = before_and_after(operation, sharpness)
    for name in before:
        if "c_attn" not in name and "attn.c_proj.weight" not in name:
            assert torch.equal(before[name], after[name]), name
    for layer in range(2):
        for head in range(4):
            inside = slice(8 * head, 8 * head + 8)
            for i in range(3):
                name, rows = f"h.{layer}.attn.c_attn.weight", slice(32 * i + 8 * head, 32 * i + 8 * head + 8)
                assert torch.equal(before[name][rows], after[name][rows]) == ((layer, head) not in replaced)
            name = f"h.{layer}.attn.c_proj.weight"
            assert torch.equal(before[name][:, inside], after[name][:, inside]) == ((layer, head) not in replaced)


def test_a_warm_up_is_operated_on_and_taken_up(in_process, prose, tmp_path, monkeypatch, capsys):
    def operated(budget):
        """Operated."""
        warm = dict(warmup="set:length=4", warmup_steps=3)
        cells = [cell("none", prose), cell("as it is", prose, **warm)]
        return cells + [script.Cell(row, "text", cells[1].settings, row) for row in ("shuffled", "scaled 1", "only sharp")]
    monkeypatch.setitem(script.EXPERIMENTS, "weights", operated)
    call(monkeypatch, "weights", "--seeds", 1, "--results", tmp_path)
    assert "failed" not in capsys.readouterr().out
    losses = {row["row"]: float(row["mean"]) for row in csv.DictReader(open(tmp_path / "weights-quick.csv"))}
    assert losses["scaled 1"] == losses["as it is"] and len(set(losses.values())) == 4
    spent = {json.loads(p.read_text())["tokens"]["procedural"] for p in tmp_path.glob("*/result.json")}
    assert spent == {0, 3 * 8 * 9}
