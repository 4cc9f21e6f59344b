"""Throws bad command lines and files at the scripts, and counts what they do not take well.

    python tests/fuzz.py --tries 600 --seed 0

No test: it takes minutes, and needs os.fork. A try should end with status 0, or with status 2 and
one line on stderr; each that does not is printed. All its paths are in a folder of its own.
"""
import argparse
import contextlib
import copy
import gzip
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from conftest import ROOT  # and the scripts on the path

import analyze
import data
import train

import numpy as np
import torch

SMALL = "--size 1_1_8 --steps 2 --batch_size 4 --eval_rows 4 --device cpu --resume --out run"
RUN = (f"train.py --data haystack:pairs=2 --warmup set:length=3 --warmup_steps 2 "
       f"--warmup_batch_size 4 {SMALL}")
TEXT = f"train.py --data text --warmup none --block_size 8 {SMALL}2"
INIT = f"train.py --data sorting --init run {SMALL}2"
SHOW, CURVES = "analyze.py table --show --results .", "analyze.py curves run"

WORDS = ["", " ", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e308", "1e-400", "9" * 400,
         "0x10", "1_0", "x", "None", "[1]", "4MM", "M", "٣", "\udcff", "a" * 300, "a/" * 3000,
         "3-1", "1-2", "=", "tiny", "1_1_8", "0_0_0", "1_3_8", "all", "attn,mlp", ".", "text",
         "lines.jsonl", "run", "run/ckpt.pt", "run/warmup.pt", "run/config.json", "fifo", "tokens",
         "packed.jsonl.gz", "fifo/x", "text/x", "none", "set", "set+union", "code", "c4", "sorting",
         "dyck:k=2,length=8", "cuda", "cpu:1", "float64"]
VALUES = [None, True, False, -1, 0, 1, 2, 3, 1.5, 1e400, -1e400, float("nan"), 10 ** 30, "", "x",
          "run", "set", "O", "float64", "u2,u2", [], {}, [[]], [1, 2], {"a": 1}, "a" * 10_000]
TENSORS = [torch.zeros(1), torch.zeros(0), torch.full((8,), float("nan")), torch.zeros(8, 8),
           torch.zeros(8, dtype=torch.int64), torch.zeros(3, 3).to_sparse(),
           torch.empty(8, device="meta"), torch.zeros(8, dtype=torch.complex64)]
READERS = {  # a file: the command lines that read it; of two equal flags the later counts
    "run/ckpt.pt": [RUN, INIT, f"{INIT} --transfer all --data haystack:pairs=2",
                    "eval.py run"],
    "run/warmup.pt": [RUN, f"{INIT} --init run/warmup.pt", "eval.py run/warmup.pt",
                      "eval.py run/warmup.pt --sample 1"],
    "run/config.json": [RUN, CURVES],
    "run/result.json": [RUN, SHOW, "analyze.py pack new.gz --results ."],
    "run/log.jsonl": [RUN, SHOW, CURVES],
    "packed.jsonl.gz": [SHOW, "analyze.py claims --results packed.jsonl.gz",
                        f"{CURVES} --results packed.jsonl.gz"],
    "text": [TEXT, "data.py show text"],
    "lines.jsonl": [f"{TEXT} --data lines.jsonl", "data.py show lines.jsonl"]}
for name in ("meta.json", "train.bin", "val.bin"):
    READERS[f"tokens/{name}"] = [f"{TEXT} --data tokens", "data.py show tokens"]
ODD = """data.py show WORD -n WORD|data.py show WORD --seed WORD|data.py show text -n 1
data.py prepare WORD
data.py WORD|data.py list|model.py WORD|model.py export WORD new|eval.py WORD|eval.py WORD WORD
eval.py run --data WORD|eval.py run --probe WORD|eval.py run/warmup.pt --tokens 1 --sample WORD
eval.py run --tokens 1 --prompt WORD|train.py --nonsense|train.py --resume=WORD
analyze.py WORD|analyze.py curves WORD --picture WORD|analyze.py curves WORD --results WORD
analyze.py table --show --results WORD --seeds WORD|analyze.py table --show --only WORD
analyze.py pack WORD --results WORD|analyze.py report --results WORD
analyze.py claims --results WORD --seeds WORD"""
PARAMETERS = [*data.RANGES, "length", "k", "depth", "digits", "numbers", ""]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("canary",)  # which is found afterwards if anybody ran this


def harmless_files():
    assert status_of(RUN.split(), {}) == 0, Path("errors").read_text()
    Path("text").write_text("The quick brown fox jumps over the lazy dog. " * 99)
    Path("lines.jsonl").write_text('{"text": "The quick brown fox."}\n' * 200)
    Path("tokens").mkdir()
    for name in ("train", "val"):
        (np.arange(400) % 9).astype(np.uint16).tofile(f"tokens/{name}.bin")
    Path("tokens/meta.json").write_text('{"source": "me", "tokenizer": "bytes"}')
    record = analyze.read_results(".")["run"]
    compared = analyze.settings_in("controls", "recall of 15")[:2]  # which claims look at
    lines = [json.dumps({"name": name, **record})
             for name in ("run", *(setting.folder(0) for setting in compared))]
    Path("packed.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def damaged(value, values, r):
    """A copy in which one thing, at the top or deep inside, is another or gone."""
    if not isinstance(value, (dict, list)) or not value or r.random() < 0.15:
        return r.choice(values)
    value = copy.copy(value)
    key = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if r.random() < 0.2:
        del value[key]
    else:
        value[key] = damaged(value[key], values, r)
    return value


def damage(path, r):
    """Damages a file in its bytes, or in what it says. Returns how."""
    how = r.choice(["bytes", "value", "value", "hostile"] * 5 + ["pipe"])
    raw = path.read_bytes()
    if how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "hostile" and path.suffix == ".pt":
        inside = damaged({"config": 1, "model": {}}, [Hostile()], r)
        torch.save(inside, path)
        if r.random() < 0.3:
            path.write_bytes(pickle.dumps(inside))
    elif how == "value" and path.suffix == ".pt":
        torch.save(damaged(torch.load(path), VALUES + TENSORS, r), path)
    elif how == "value" and path.suffix in (".json", ".jsonl", ".gz"):
        unpack, pack = (gzip.decompress, gzip.compress) if path.suffix == ".gz" else (bytes, bytes)
        lines = [raw] if path.suffix == ".json" else unpack(raw).splitlines()
        i = r.randrange(len(lines))
        lines[i] = json.dumps(damaged(json.loads(lines[i]), VALUES, r)).encode()
        path.write_bytes(pack(b"\n".join(lines)))
    else:
        how, cut, flipped = "bytes", r.randrange(len(raw)), bytearray(raw)
        for _ in range(4):
            flipped[r.randrange(len(raw))] = r.randrange(256)
        path.write_bytes(r.choice((flipped, raw[:cut], raw[cut:], b"", raw[:3] + raw,
                                   os.urandom(99), b"[" * 100_000, b"\xff\xfe" + raw)))
    return how


# Each of these returns (what it is about, a command line, an environment).

def bad_file(r):
    name = r.choice(list(READERS))
    how, line = damage(Path(name), r), r.choice(READERS[name])
    if line == RUN and name != "run/result.json":
        os.unlink("run/result.json")  # else there is nothing to go on with
        if name == "run/warmup.pt":
            os.unlink("run/ckpt.pt")
    return f"{name} ({how})", line.split(), {}


def bad_flags(r):
    argv = r.choice((RUN, TEXT, f"{TEXT} --data tokens", INIT)).split()
    for name in r.sample(sorted(train.FLAGS.keys() - {"compile", "tokenizer"}), r.randint(1, 3)):
        kind, *_ = train.FLAGS[name]
        argv.append(f"--{name}")
        if kind is not bool:
            argv.append(r.choice([*kind, r.choice(WORDS)] if isinstance(kind, tuple) else WORDS))
    return "flags", argv, {}


def bad_spec(r):
    spec = r.choice(("", "", "", "-1*", "1e9*", "+", "shuffled:", "0.7*set+0.3*", "set:length=4+"))
    spec += r.choice(list(data.RULES_AND_TASKS))
    for _ in range(r.randint(0, 3)):
        spec += f"{r.choice(':,')}{r.choice(PARAMETERS)}={r.choice(WORDS[:30])}"
    line = r.choice(("data.py show", f"{RUN} --warmup", f"{RUN} --data"))
    return "spec", [*line.split(), spec], {}


def odd_words(r):
    line = r.choice(re.split(r"[|\n]", ODD))
    return "words", [r.choice(WORDS) if word == "WORD" else word for word in line.split()], {}


def odd_environment(r):
    name = r.choice(("RANK", "WORLD_SIZE", "NANOWARM_CACHE"))
    return "environment", TEXT.split(), {name: r.choice(WORDS)}


def start(argv, environment):
    """Runs a script, with what it says on stderr in a file."""
    signal.alarm(120)  # what waits for ever is killed
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # and what works for ever
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = argv
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def status_of(argv, environment):
    """The exit status of a script, below 0 for a signal. It runs in a fork, which has torch."""
    process = multiprocessing.get_context("fork").Process(target=start, args=(argv, environment))
    process.start()
    process.join()
    return process.exitcode


def attempt(number, r):
    """One try, in the current folder. Says what went wrong, and returns whether anything did."""
    kind = r.choice((bad_flags, bad_spec, odd_words, odd_environment, *[bad_file] * 4))
    what, argv, environment = kind(r)
    status = status_of(argv, environment)
    lines = Path("errors").read_text(errors="replace").splitlines() or [""]
    refused = status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    if os.path.exists("canary"):
        lines.append("the code of a pickle was run")
    elif status == 0 or refused:
        return False
    place = [line.strip() for line in lines if line.startswith("  File")][-1:]
    print(f"{number}: {what}: {' '.join(argv)[-150:]!a} {environment}\n    status {status}, "
          f"{len(lines)} lines: {lines[-1][:200]!a} {place}", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=600, help="(default 600)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as top, contextlib.chdir(top):
        os.mkdir("whole")
        os.environ["NANOWARM_CACHE"] = "cache"
        with contextlib.chdir("whole"):
            harmless_files()
        for i in range(args.tries):
            shutil.copytree("whole", "try")
            with contextlib.chdir("try"):
                os.mkfifo("fifo")
                wrong += attempt(i, random.Random(f"{args.seed} {i}"))
            shutil.rmtree("try")
    print(f"{args.tries} tried, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
