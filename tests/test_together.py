"""tests/together.py against train.py: the same runs, but for the order of sums."""
import json

import pytest
import torch

import together
import train
from model import load

FLAGS = "--data haystack:pairs=4 --batch_size 32 --eval_rows 64 --eval_every 4 --device cpu "
RUNS = {
    "rates": ["--warmup none --steps 12 --lr 3e-2", "--warmup none --steps 12 --lr_ramp 3 --seed 1",
              "--init warm/warmup.pt --embeddings mean --steps 8"],
    "penalties": ["--warmup none --steps 8 --sharpen 0.1", "--warmup none --steps 8 --sharpen 1"],
    "whole answers": ["--data sorting:numbers=4,below=9 --warmup none --steps 8"],
    "found": [f"--data sorting:numbers=4,below=3 --warmup none --steps 24 {more}"
              for more in ("--lr 1e-2 --stop_at 0.3", "--seed 1", "--seed 2")]}
WARM = "--warmup_steps 6 --warmup_batch_size 8 --steps 0 --warmup "


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Makes runs both ways, and compares results, evaluations and weights."""
    monkeypatch.chdir(tmp_path)

    def compare(runs, warm=False):
        words = [[*FLAGS.split(), *run.split()] for run in runs]
        members = [together.Member(FLAGS + run, train.parse(argv)[0].seed, f"m{i}", warm)
                   for i, (run, argv) in enumerate(zip(runs, words))]
        together.train_together(members, "cpu", 0, False)
        for i, argv in enumerate(words):
            train.run(train.parse([*argv, "--out", f"w{i}"])[0])
            ours, theirs = (json.loads((tmp_path / f"{side}{i}/result.json").read_text())
                            for side in "mw")
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if key != "seconds":
                    near = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                    assert ours[key] == near, key
            logs = [[json.loads(line) for line in (tmp_path / f"{x}{i}/log.jsonl").open()]
                    for x in "mw"]
            kept = [[entry["step"], entry["val_loss"]] for entry in logs[1]
                    if entry["stage"] == "train" and "val_loss" in entry]
            assert [[e["step"], e["val_loss"]] for e in logs[0]] == [
                [step, pytest.approx(loss, abs=1e-4)] for step, loss in kept]
            name = "warmup.pt" if warm else "ckpt.pt"
            states = [load(tmp_path / f"{x}{i}" / name)[0].state_dict() for x in "mw"]
            for key, weight in states[1].items():
                torch.testing.assert_close(states[0][key], weight, atol=1e-5, rtol=1e-4)
    return compare


def test_warm_ups_made_together_are_those_that_train_makes(compare):
    compare([f"{WARM} dyck:k=3,length=12", f"{WARM} shuffled:dyck:k=3,length=12 --seed 1"], True)


@pytest.mark.parametrize("name", RUNS)
def test_runs_made_together_are_those_that_train_makes(name, compare):
    train.run(train.parse(f"{FLAGS} {WARM} dyck:length=12 --out warm".split())[0])
    compare(RUNS[name])
