"""tests/together.py against train.py: the same runs, but for the order of sums."""
import json
import sys
from pathlib import Path

import pytest
import torch

import analyze
import together
import train
from model import load

FLAGS = "--data haystack:pairs=4 --batch_size 32 --eval_rows 64 --eval_every 4 --device cpu"
WARM = f"{FLAGS} --warmup_steps 6 --warmup_batch_size 8 --steps 0 --warmup"
SORTING = f"{FLAGS} --data sorting:numbers=4,below=3 --warmup none --steps 24"
RUNS = {
    "warm-ups": [f"{WARM} dyck:k=3,length=12", f"{WARM} shuffled:dyck:k=3,length=12"],
    "rates": [f"{FLAGS} --steps 12 --warmup none --lr 3e-2",
              f"{FLAGS} --steps 12 --warmup none --lr_ramp 3",
              f"{FLAGS} --steps 12 --init warm/warmup.pt --embeddings mean"],
    "whole answers, found": [f"{SORTING} --lr 1e-2 --stop_at 0.3", SORTING]}


def outcome(folder):
    """What is to be the same, what is to be so but for rounding, and the weights."""
    result = json.loads(Path(folder, "result.json").read_text())
    numbers = {key: result.pop(key) for key in [*result] if isinstance(result[key], float)}
    del numbers["seconds"]
    for line in map(json.loads, Path(folder, "log.jsonl").open()):
        if "val_loss" in line:
            numbers[f"{line['stage']}, step {line['step']}"] = line["val_loss"]
    model, _ = load(next(Path(folder).glob("*.pt")))
    return result, pytest.approx(numbers, abs=1e-4), model.state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_runs_made_together_are_those_that_train_makes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.run(train.parse(f"{WARM} dyck:length=12 --out warm".split()))
    together.run_together([together.Member(flags, seed, f"ours {seed}")
                           for seed, flags in enumerate(RUNS[name])])
    for seed, flags in enumerate(RUNS[name]):
        train.run(train.parse([*flags.split(), f"--seed={seed}", f"--out=theirs {seed}"]))
        result, numbers, weights = outcome(f"theirs {seed}")
        ours = outcome(f"ours {seed}")
        assert ours[0] == result and ours[1].expected == numbers
        for key, weight in weights.items():
            torch.testing.assert_close(ours[2][key], weight, atol=1e-5, rtol=1e-4)


def test_what_an_experiment_lacks_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(analyze.COLUMNS, "recall of 15", f"{FLAGS} --steps 4")
    monkeypatch.setattr(analyze, "warmup_flags", lambda warmup, *_: (
        f"{FLAGS} --warmup_steps 4 --warmup {warmup}:length=12 --steps 0"))
    only = "recall of 15 | shuffled"
    monkeypatch.setattr(sys, "argv", ["together.py", "--only", only, "--seeds", "1"])
    together.main()  # and has changed the working folder
    for name in ("weights", "controls"):
        assert not analyze.missing(analyze.settings_in(name, only), 1, Path())
    assert len([*Path().glob("*/learned.json")]) == 3 and not [*Path().glob("*.changed.pt")]
