"""Kills runs at random moments, resumes them, and compares them with runs that nothing stopped.

    python tests/kills.py --runs 12 --seed 0

No test: a run takes half a minute. Exit status 1 if any run differs in its weights or its log.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = ("--size 2_2_16 --batch_size 8 --warmup_batch_size 8 --steps 400 --warmup_steps 300 "
         "--eval_rows 16 --eval_every 20 --save_every 9 --log_every 10 --device cpu "
         "--dtype float32 --resume --out run")
TEXT = f"--data text --block_size 32 {SMALL}"
TASK = f"--data haystack:pairs=4 {SMALL}"
KINDS = {"text": f"{TEXT} --warmup dyck:k=4,length=32",
         "text, dropout": f"{TEXT} --warmup text --dropout 0.1 --warmup_dropout 0.2",
         "task": f"{TASK} --warmup set:length=8,vocab=3",
         "task, dropout, workers": f"{TASK} --warmup union --dropout 0.1 --workers 2",
         "text, dropout, two processes": f"{TEXT} --warmup set --dropout 0.1",
         "task, two processes": f"{TASK} --warmup dyck:k=4,length=32"}


def start(kind, folder):
    """A run in a folder, which has a text and a cache of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    command = [sys.executable, *(TORCHRUN if "two" in kind else []), TRAIN, *KINDS[kind].split()]
    with open(folder / "stderr", "wb") as errors:
        return subprocess.Popen(
            command, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors,
            env={**os.environ, "NANOWARM_CACHE": "cache", "OMP_NUM_THREADS": "1"})


def kill_and_resume(kind, folder, seconds, r):
    """Kills a run again and again, and lets it finish. Returns how often it was killed."""
    kills = 0
    for _ in range(r.randint(1, 6)):
        run = start(kind, folder)
        time.sleep(r.uniform(0, seconds))
        if run.poll() is None:
            os.killpg(run.pid, r.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            kills += 1
        run.wait()
    if start(kind, folder).wait():
        print(f"{kind}: does not go on: {(folder / 'stderr').read_text().splitlines()[-1:]}")
    return kills


def what_came_of(folder):
    """All weights, and the log but for how fast it was: {what: value}"""
    found = {f"{path.name} {key}": tensor.numpy().tobytes()
             for path in sorted(folder.glob("run/*.pt"))
             for key, tensor in torch.load(path, weights_only=True)["model"].items()}
    for number, line in enumerate(open(folder / "run" / "log.jsonl"), 1):
        found[f"log.jsonl line {number}"] = json.loads(line) | {"tokens_per_second": None}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=12, help="(default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and signals")
    args = parser.parse_args()
    r, whole, kills, identical = random.Random(args.seed), {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.runs):
            kind, here = list(KINDS)[i % len(KINDS)], Path(folder, str(i))
            if kind not in whole:
                began, unharmed = time.monotonic(), Path(folder, kind)
                assert start(kind, unharmed).wait() == 0, (unharmed / "stderr").read_text()
                whole[kind] = what_came_of(unharmed), time.monotonic() - began
            wanted, seconds = whole[kind]
            times = kill_and_resume(kind, here, seconds, r)
            found = what_came_of(here)
            different = [key for key in wanted | found if wanted.get(key) != found.get(key)]
            kills, identical = kills + times, identical + (not different)
            print(f"{kind}: {times} kills, {f'differs: {different[:3]}' if different else 'same'}",
                  flush=True)
    print(f"{kills} kills tried, {identical} of {args.runs} runs identical")
    sys.exit(identical < args.runs)


if __name__ == "__main__":
    main()
