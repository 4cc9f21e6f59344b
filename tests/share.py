"""Does a number foretell, before a task is trained, from which warm-ups it will not be learned?

    python tests/share.py FOLDER    the runs of `analyze.py starts`, with their warm-ups

No test: an analysis of the runs that move MLPs (ours; named before they were made). Prints, for
each start, how the share goes with the steps that a run takes. The shares that came out are in
assets/results.jsonl.gz, what they say is in assets/report.md.
"""
import contextlib
import math
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze
import train

import numpy as np
import torch


def share_that_differs(setting, seed, results):
    """Right after the transfer, of the power of the states that the head reads where the key is
    asked for, the share that differs between 1,000 held-out rows. Small where the MLPs answer what
    they never saw with one large constant."""
    with contextlib.chdir(results), contextlib.redirect_stdout(None):  # it says what moved
        flags = analyze.with_checkpoints(setting, seed, Path())
        s = train.parse([*shlex.split(flags), "--seed", str(seed), "--device", "cpu"])
        data, _ = train.open_data(s)
        model = train.new_model(data, s.size, s.tied, s.dropout, s.seed).eval()
        train.start_from_checkpoints(model, s)
    with torch.no_grad():
        x, y = data.val.__getitems__(range(1000))
        states = model.states(x, y != -1)
    return 1 - float(states.mean(0).square().sum() / states.square().sum(1).mean())


def rank_correlation(x, y):
    """Spearman's rank correlation, and its two-sided p by 100,000 random orders. Its ranks: of how
    many each is the larger, less of how many the smaller."""
    x, y = (np.sign(np.subtract.outer(values, values)).sum(1) for values in (x, y))
    orders = np.random.default_rng(0).permuted(np.tile(y, (100_000, 1)), axis=1)
    p = float((np.abs(orders @ x) >= abs(x @ y) - 1e-9).mean())
    return x @ y / max(math.sqrt(x @ x * (y @ y)), 1e-9), p


def main():
    results = Path(sys.argv[1]).resolve()
    found = analyze.read_results(results)
    for setting in analyze.settings_in("starts"):
        if setting.column == "recall of 15" and re.search("attn,mlp|full", setting.name):
            runs = [found[setting.folder(seed)] for seed in range(10)]
            steps = [analyze.value_of(run, analyze.STEPS) for run in runs]
            shares = [share_that_differs(setting, seed, results) for seed in range(10)]
            rho, p = rank_correlation(shares, steps)
            print(f"{setting.name}: {np.round(shares, 3)}; rank correlation {rho:.2f}, p {p:.4f}")


if __name__ == "__main__":
    main()
