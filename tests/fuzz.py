"""Throws bad command lines and files at the scripts, and counts what they do not take well.

    python tests/fuzz.py --tries 600 --seed 0

No test: it takes minutes, and needs os.fork. A try should end with status 0, or with status 2 and
one line on stderr. Each that does not is printed, and then the exit status is 1. Every path among
its words is inside its own folder: it may be run as root.
"""
import argparse
import copy
import gzip
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import analyze
import data
import eval
import model
import train

import numpy as np
import torch

SCRIPTS = {"analyze.py": analyze, "data.py": data, "eval.py": eval, "model.py": model,
           "train.py": train}
SMALL = "--size 1_1_8 --steps 2 --batch_size 4 --eval_rows 4 --device cpu --resume --out run"
RUN = (f"train.py --data haystack:pairs=2 --warmup set:length=3 --warmup_steps 2 "
       f"--warmup_batch_size 4 {SMALL}").split()
TEXT, LINES, TOKENS, INIT, INIT_ALL = (f"train.py {flags} {SMALL}2".split() for flags in (
    "--data text --warmup none --block_size 8", "--data lines.jsonl --warmup none --block_size 8",
    "--data tokens --warmup none --block_size 8", "--data sorting --init run",
    "--data haystack:pairs=2 --transfer all --init run/ckpt.pt"))
SHOW, CURVES = "analyze.py table --show --results .".split(), "analyze.py curves run".split()

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
READERS = {  # a file: the command lines that read it
    "run/ckpt.pt": [RUN, INIT, INIT_ALL, ["eval.py", "run"]],
    "run/warmup.pt": [RUN, ["eval.py", "run/warmup.pt"], [*INIT[:4], "run/warmup.pt", *INIT[5:]],
                      "eval.py run/warmup.pt --sample 1".split()],
    "run/config.json": [RUN, CURVES],
    "run/result.json": [RUN, SHOW, "analyze.py pack new.gz --results .".split()],
    "run/log.jsonl": [RUN, SHOW, CURVES],
    "packed.jsonl.gz": [SHOW, "analyze.py claims --results packed.jsonl.gz".split(),
                        [*CURVES, "--results", "packed.jsonl.gz"]],
    "text": [TEXT, ["data.py", "show", "text"]],
    "lines.jsonl": [LINES, ["data.py", "show", "lines.jsonl"]],
    **{f"tokens/{name}": [TOKENS, ["data.py", "show", "tokens"]]
       for name in ("meta.json", "train.bin", "val.bin")}}
ODD = """data.py show WORD -n WORD|data.py show WORD --seed WORD|data.py show text --tokenizer x
data.py prepare WORD|data.py prepare c4 --source text --tokens WORD
data.py WORD|data.py list|model.py WORD|model.py export WORD new|eval.py WORD|eval.py WORD WORD
eval.py run --data WORD|eval.py run --probe WORD|eval.py run/warmup.pt --tokens 1 --sample WORD
eval.py run --tokens 1 --prompt WORD
analyze.py WORD|analyze.py curves WORD --picture WORD|analyze.py curves WORD --results WORD
analyze.py table --show --results WORD --seeds WORD|analyze.py table --show --only WORD
analyze.py pack WORD --results WORD|analyze.py report --results WORD
analyze.py claims --results WORD --seeds WORD
"""


PARAMETERS = "length vocab k p depth rule width pairs digits numbers below".split()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("canary",)  # which is found afterwards if anybody ran this


def harmless_files():
    with open(os.devnull, "w") as nowhere:
        assert status_of(RUN, {}, nowhere) == 0
    Path("text").write_text("The quick brown fox jumps over the lazy dog. " * 99)
    Path("lines.jsonl").write_text('{"text": "The quick brown fox."}\n' * 200)
    Path("tokens").mkdir()
    for name in ("train", "val"):
        (np.arange(400) % 9).astype(np.uint16).tofile(f"tokens/{name}.bin")
    Path("tokens/meta.json").write_text('{"source": "me", "tokenizer": "bytes"}')
    record = {"name": "run", **analyze.read_results(".")["run"]}
    Path("packed.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))


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
    kind, raw = path.suffix, path.read_bytes()
    if how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "hostile" and kind == ".pt":
        inside = damaged({"config": 1, "model": {}}, [Hostile()], r)
        path.write_bytes(pickle.dumps(inside))
        if r.random() < 0.7:
            torch.save(inside, path)
    elif how == "value" and kind == ".pt":
        torch.save(damaged(torch.load(path), VALUES + TENSORS, r), path)
    elif how == "value" and kind in (".json", ".jsonl", ".gz"):
        raw = gzip.decompress(raw) if kind == ".gz" else raw
        lines = [raw] if kind == ".json" else raw.splitlines()
        i = r.randrange(len(lines))
        lines[i] = json.dumps(damaged(json.loads(lines[i]), VALUES, r)).encode()
        raw = b"\n".join(lines)
        path.write_bytes(gzip.compress(raw) if kind == ".gz" else raw)
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
    how, argv = damage(Path(name), r), r.choice(READERS[name])
    if argv == RUN and name != "run/result.json":
        os.unlink("run/result.json")  # else there is nothing to go on with
        if name == "run/warmup.pt":
            os.unlink("run/ckpt.pt")
    return f"{name} ({how})", argv, {}


def bad_flags(r):
    argv, flags = list(r.choice((RUN, TEXT, TOKENS, INIT))), train.FLAGS
    for name in r.sample(sorted(flags.keys() - {"compile", "tokenizer"}), r.randint(1, 3)):
        kind = flags[name][0]
        argv.append(f"--{name}")
        if kind is not bool or r.random() < 0.1:
            argv.append(r.choice([*kind] * 20 + WORDS if isinstance(kind, tuple) else WORDS))
    return "flags", argv + ["--nonsense"] * (r.random() < 0.02), {}


def bad_spec(r):
    mixtures = "0.7*set+0.3*union", "shuffled:dyck", "set:length=4+set"
    spec = r.choice((*data.RULES_AND_TASKS, *mixtures))
    for _ in range(r.randint(0, 3)):
        spec += r.choice((":", ",")) + r.choice((*PARAMETERS, "")) + "=" + r.choice(WORDS[:30])
    argv = r.choice((["data.py", "show"], RUN + ["--warmup"], RUN + ["--data"]))
    return "spec", [*argv, r.choice(("", "", "", "-1*", "1e9*", "+", "shuffled:")) + spec], {}


def odd_words(r):
    line = r.choice(ODD.replace("\n", "|").strip("|").split("|"))
    return "words", [r.choice(WORDS) if word == "WORD" else word for word in line.split()], {}


def odd_environment(r):
    name = r.choice(("RANK", "WORLD_SIZE", "NANOWARM_CACHE"))
    return "environment", TEXT, {name: r.choice(WORDS)}


def status_of(argv, environment, errors):
    """Calls a script's main in a fork of this process. Returns the exit status, below 0 for a
    signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(120)  # what waits for ever is killed
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # and what works for ever
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors.fileno(), 2)
        sys.argv = argv
        data.run_main(SCRIPTS[argv[0]].main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def attempt(r, fresh):
    """One try, in the current folder. Returns what went wrong, or ""."""
    what, argv, environment = r.choice((bad_flags, bad_spec, odd_words, odd_environment,
                                        *[bad_file] * 4))(r)
    with open("errors", "w") as errors:
        if fresh:  # as a person starts it
            command = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
            status = subprocess.run(command, env={**os.environ, **environment}, stderr=errors,
                                    stdout=subprocess.DEVNULL).returncode
        else:
            status = status_of(argv, environment, errors)
    lines = Path("errors").read_text(errors="replace").splitlines() or [""]
    refused = status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    if os.path.exists("canary"):
        lines.append("the code of a pickle was run")
    elif status == 0 or refused:
        return ""
    place = [line.strip() for line in lines if line.startswith("  File")][-1:]
    said = f"{what}: {' '.join(argv)[-150:]!a} {environment or ''}"
    return f"{said}\n    status {status}, {len(lines)} lines: {lines[-1][:200]!a} {place}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=600, help="(default 600)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as top:
        os.mkdir(f"{top}/whole")
        os.chdir(f"{top}/whole")
        os.environ["NANOWARM_CACHE"] = "cache"
        harmless_files()
        for i in range(args.tries):
            shutil.copytree(f"{top}/whole", f"{top}/{i}")
            os.chdir(f"{top}/{i}")
            os.mkfifo("fifo")
            fault = attempt(random.Random(f"{args.seed} {i}"), fresh=i % 50 == 49)
            if fault:
                wrong += 1
                print(f"{i}: {fault}", flush=True)
            shutil.rmtree(f"{top}/{i}")
        os.chdir(ROOT)
    print(f"{args.tries} tried, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
