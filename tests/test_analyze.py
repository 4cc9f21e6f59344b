"""Curves of runs side by side, statistics, sweeps."""
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze as script
import train
from model import GPT, GPTConfig, part_of


def made_up_run(folder, warmup="dyck", data="code", losses=(5.0, 3.0, 2.5)):
    folder.mkdir()
    settings = {"data": data, "warmup": warmup, "init": None, "seed": 0, "transfer": "attn"}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    lines = [{"stage": "warmup", "step": 1, "tokens": 10, "loss": 9.0, "val_loss": 9.0, "val_accuracy": 0.0}]
    lines += [{"stage": "train", "step": i, "tokens": 100 * i, "val_loss": loss, "val_accuracy": 0.5} for i, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


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
    assert script.paired_p([1, 2], [1, 2]) == 1 and script.paired_p([2, 3], [1, 2]) == 0 and math.isnan(script.paired_p([1], [2]))


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
    results = sorted((tmp_path / "r").glob("*/result.json"))
    assert len(results) == 2 and (tmp_path / "r" / "table.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(open(tmp_path / "r" / "table.csv")))
    assert [row["row"] for row in rows] == ["none", "none again", "set"] and {row["n"] for row in rows} == {"1"}
    assert float(rows[1]["gain"]) == 0 and rows[0]["pairs"] == "0" and rows[2]["pairs"] == "1"
    losses = [json.loads(path.read_text())["val_loss"] for path in results if "none" in str(path)]
    assert float(rows[0]["mean"]) == pytest.approx(sum(losses))

    before = {path: path.stat().st_mtime_ns for path in results}
    results[0].unlink()  # as if that run had been stopped just before its end
    call(monkeypatch, *order)
    assert "1 done already, 1 to go" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns == before[path] for path in results] == [False, True]
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path / "r", "--show")
    assert "gain" in capsys.readouterr().out


def test_a_run_that_fails_is_listed_and_the_others_go_on(in_process, prose, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.EXPERIMENTS, "table", lambda budget: [cell("none", prose), cell("odd", prose, batch_size=3, grad_accum=2)])
    monkeypatch.setattr(script.EXPERIMENTS["table"], "__doc__", "One that fails.")
    call(monkeypatch, "table", "--seeds", 1, "--results", tmp_path)
    printed = capsys.readouterr().out
    assert "failed: odd | text | seed 0: error: --batch_size 3 does not divide" in printed and "none" in printed


def test_two_processes_never_run_the_same_run(prose, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = script.folder_of(cell("none", prose), 0, tmp_path)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert script.run_once(cell("none", prose), 0, folder, {}) == "elsewhere" and not folder.exists()


@pytest.mark.parametrize("name", list(script.EXPERIMENTS))
@pytest.mark.parametrize("budget", ["quick", "paper"])
def test_every_experiment_is_a_list_of_settings_that_train_accepts(name, budget):
    cells = script.EXPERIMENTS[name](budget)
    assert len({(c.row, c.column) for c in cells}) == len(cells), "each cell has a place of its own"
    for c in cells:
        train.resolve(train.Settings(**c.settings, device="cpu"))
    for column in {c.column for c in cells}:
        first = next(c for c in cells if c.column == column)
        assert first.settings["warmup"] == "none", "what the others are compared with"


def test_gains_are_paired_by_seed_and_more_is_better():
    cells = [script.Cell(row, column, {"data": data}) for column, data in (("a task", "haystack"), ("text", "code")) for row in ("none", "set")]
    result = lambda accuracy, loss: {"val_accuracy": accuracy, "val_loss": loss}
    values = {("none", "a task"): {0: result(0.1, 5), 1: result(0.2, 5), 2: result(0.9, 5)},
              ("set", "a task"): {0: result(0.3, 1), 1: result(0.4, 1)},
              ("none", "text"): {0: result(0, 2.0), 1: result(0, 3.0)}, ("set", "text"): {0: result(0, 2.5), 1: result(0, 3.5)}}
    gains = {(e["row"], e["column"]): (e["n"], e["pairs"], e["gain"]) for e in script.compare(cells, values)}
    assert gains["set", "a task"] == (2, 2, pytest.approx(0.2)) and gains["set", "text"] == (2, 2, pytest.approx(-0.5))
    assert gains["none", "a task"][0] == 3 and gains["none", "a task"][1] == 0


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
    losses = {row["row"]: float(row["mean"]) for row in csv.DictReader(open(tmp_path / "weights.csv"))}
    assert losses["scaled 1"] == losses["as it is"] and len(set(losses.values())) == 4
    spent = {json.loads(p.read_text())["tokens"]["procedural"] for p in tmp_path.glob("*/result.json")}
    assert spent == {0, 3 * 16 * 9}
