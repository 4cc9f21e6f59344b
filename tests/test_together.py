"""tests/together.py against train.py: the same runs, but for the order of sums."""
import json

import pytest
import torch

import together
import train
from model import load

FLAGS = "--data haystack:pairs=4 --batch_size 32 --eval_rows 64 --eval_every 4 --device cpu "
WARM = "--warmup_steps 6 --warmup_batch_size 8 --steps 0 --warmup "
SORTING = "--data sorting:numbers=4,below=3 --warmup none --steps 24"
RUNS = {
    "warm-ups": [f"{WARM} dyck:k=3,length=12", f"{WARM} shuffled:dyck:k=3,length=12 --seed 1"],
    "rates": ["--warmup none --steps 12 --lr 3e-2", "--warmup none --steps 12 --lr_ramp 3 --seed 1",
              "--init warm/warmup.pt --embeddings mean --steps 8"],
    "whole answers, found": [f"{SORTING} --lr 1e-2 --stop_at 0.3", f"{SORTING} --seed 1"]}


def evaluations(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").open()]
    return [(entry["step"], pytest.approx(entry["val_loss"], abs=1e-4)) for entry in entries
            if entry["stage"] == "train" and "val_loss" in entry]


@pytest.mark.parametrize("name", RUNS)
def test_runs_made_together_are_those_that_train_makes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.run(train.parse(f"{FLAGS} {WARM} dyck:length=12 --out warm".split()))
    warm, words = name == "warm-ups", [(FLAGS + run).split() for run in RUNS[name]]
    members = [together.Member(FLAGS + run, train.parse(argv).seed, f"m{i}", warm)
               for i, (run, argv) in enumerate(zip(RUNS[name], words))]
    together.train_together(members, "cpu", 0)
    for i, argv in enumerate(words):
        train.run(train.parse([*argv, "--out", f"w{i}"]))
        ours, theirs = (json.loads((tmp_path / f"{side}{i}/result.json").read_text())
                        for side in "mw")
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"seconds"}:
            number = isinstance(theirs[key], float)
            assert ours[key] == (pytest.approx(theirs[key], abs=1e-4) if number else theirs[key])
        assert [(step, loss.expected) for step, loss in evaluations(tmp_path / f"m{i}")] == (
            evaluations(tmp_path / f"w{i}"))
        states = [load(tmp_path / f"{side}{i}" / ("warmup.pt" if warm else "ckpt.pt"))[0]
                  .state_dict() for side in "mw"]
        for key, weight in states[1].items():
            torch.testing.assert_close(states[0][key], weight, atol=1e-5, rtol=1e-4)
