"""Throws bad command lines, specs and files at the scripts, and counts what they do not take well.

    python tests/fuzz.py --tries 600 --seed 0

No test: it takes minutes. Each try should end with status 0, or with status 2 and one line on
stderr; what does not is printed, and then the exit status is 1. Needs os.fork.
"""
import argparse
import collections
import copy
import gzip
import json
import os
import pickle
import random
import re
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
RUN = ("train.py --data haystack:pairs=2 --warmup set:length=3 --size 1_1_8 --steps 2 --batch_size "
       "4 --warmup_steps 2 --warmup_batch_size 4 --eval_rows 4 --device cpu --seed 0 --out run "
       "--resume").split()
TEXT = ("--size 1_1_8 --steps 2 --batch_size 2 --block_size 8 --warmup none --eval_rows 4 --device "
        "cpu").split()
WORDS = ["", " ", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e308", "1e-400", "9" * 400,
         "0x10", "1_0", "x", "None", "[1]", "4MM", "M", "٣", "\udcff", "a" * 300, "a/" * 3000,
         "tiny", "1_1_8", "0_0_0", "1_3_8", "all", "keep", "attn,mlp", "mean", "..", ".", "text",
         "lines.jsonl", "run", "run/ckpt.pt", "run/warmup.pt", "run/config.json", "fifo", "tokens",
         "packed.jsonl.gz", "/dev/null", "/dev/null/x", "/proc/self/mem", "none", "set", "set+union",
         "code", "c4", "sorting", "dyck:k=2,length=8", "cuda", "mps", "cpu:1", "float64"]
HUGE = ["1e9", "999999999", "1e14", "999999", "1.3b", "1000_1000_1000"]  # for --plan alone
VALUES = [None, True, False, -1, 0, 1, 2, 3, 1.5, 1e400, -1e400, float("nan"), 10 ** 30, "", "x",
          "run", "set", "O", "float64", "u2,u2", [], {}, [[]], [1, 2], {"a": 1}, "a" * 10_000]
TENSORS = [torch.zeros(1), torch.zeros(0), torch.full((8,), float("nan")), torch.zeros(8, 8),
           torch.zeros(8, dtype=torch.int64), torch.zeros(3, 3).to_sparse(),
           torch.empty(8, device="meta"), torch.zeros(8, dtype=torch.complex64)]
SPECS = re.findall(r"[a-z_]+|\d+|[:=,+*.\-]", "shuffled:dyck:k=4,length=2-8+0.5*set:vocab=9,length="
                   "6+eca:rule=110,width=5,p=0.5+haystack:pairs=3+sorting:numbers=3,below=9+none")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("canary",)  # to be found afterwards if anybody ran it


def harmless_files():
    """What the tries damage, and read: a run, tokens, texts, packed results, a pipe."""
    with open(os.devnull, "w") as nowhere:
        assert ended(RUN, {}, nowhere) == 0
    Path("text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    Path("lines.jsonl").write_text('{"text": "The quick brown fox."}\n' * 40)
    Path("tokens").mkdir()
    for name in ("train", "val"):
        np.arange(400, dtype=np.uint16).__mod__(9).tofile(f"tokens/{name}.bin")
    names = {"vocab_size": 9, "itos": dict(enumerate("abcdefghi")), "stoi": {"a": 0}}
    Path("tokens/meta.pkl").write_bytes(pickle.dumps(names))
    Path("tokens/meta.json").write_text(json.dumps({"vocab_size": 9, "dtype": "uint16"}))
    record = {"name": "run", "result": json.loads(Path("run/result.json").read_text()), "log": []}
    Path("packed.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    os.mkfifo("fifo")


def damaged(value, values, r):
    """A copy in which one thing, at the top or deep inside, is another, or gone."""
    if isinstance(value, (dict, list)) and value and r.random() < 0.85:
        value = copy.copy(value)
        key = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if r.random() < 0.2:
            del value[key]
        else:
            value[key] = damaged(value[key], values, r)
        return value
    return r.choice(values)


def damage_bytes(path, r):
    raw = bytearray(path.read_bytes())
    for _ in range(r.randint(1, 4)):
        raw[r.randrange(len(raw))] = r.randrange(256)
    cut = r.randrange(len(raw))
    path.write_bytes(r.choice((raw, raw[:cut], raw[cut:], b"", os.urandom(99), b"[" * 100_000,
                               raw + raw[:3], b"\xff\xfe" + raw)))


def damage(name, r):
    """Damages a file, in its bytes or in what it says. Returns in which way."""
    path, values = Path(name), VALUES + TENSORS * (Path(name).suffix == ".pt")
    how = r.choice(["bytes", "value", "value", "hostile"] * 4 + ["pipe"])
    if how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "hostile" and path.suffix in (".pt", ".pkl"):
        inside = damaged({"config": 1, "model": {}, "vocab_size": 9}, [Hostile()], r)
        path.write_bytes(pickle.dumps(inside))
        if r.random() < 0.7:
            torch.save(inside, path)
    elif how == "value" and path.suffix == ".pt":
        torch.save(damaged(torch.load(path), values, r), path)
    elif how == "value" and path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(damaged(pickle.loads(path.read_bytes()), values, r)))
    elif how == "value" and path.suffix in (".json", ".jsonl", ".gz"):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.splitlines() if path.suffix != ".json" else [raw]
        i = r.randrange(len(lines))
        lines[i] = json.dumps(damaged(json.loads(lines[i]), values, r)).encode()
        raw = b"\n".join(lines) + b"\n"
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    else:
        damage_bytes(path, r)
        how = "bytes"
    return f"{name} ({how})"


RESUME, INIT = RUN, ["train.py", "--data", "sorting", *TEXT[:6], "--device", "cpu", "--init"]
TABLE = ["analyze.py", "table", "--show", "--results"]
READERS = {  # file: what reads it
    "run/ckpt.pt": [["eval.py", "run/ckpt.pt"], ["eval.py", "run", "--probe", "loss"], RESUME,
                    INIT + ["run/ckpt.pt"], INIT + ["run/ckpt.pt", "--transfer", "all"],
                    ["model.py", "import", "run/ckpt.pt", "new.pt"]],
    "run/warmup.pt": [["eval.py", "run/warmup.pt", "--probe", "learned,heads"], RESUME,
                      INIT + ["run/warmup.pt"], ["eval.py", "run/warmup.pt", "--sample", "1"]],
    "run/config.json": [RESUME, ["analyze.py", "curves", "run"]],
    "run/result.json": [RESUME, [*TABLE, "."], ["analyze.py", "pack", "new.gz", "--results", "."]],
    "run/log.jsonl": [RESUME, ["analyze.py", "curves", "run"], [*TABLE, "."]],
    "packed.jsonl.gz": [["analyze.py", "claims", "--results", "packed.jsonl.gz"], [*TABLE, "."],
                        ["analyze.py", "curves", "run", "--results", "packed.jsonl.gz"]],
    "text": [["train.py", "--data", "text", *TEXT], ["data.py", "show", "text"]],
    "lines.jsonl": [["train.py", "--data", "lines.jsonl", *TEXT], ["data.py", "show", "lines.jsonl"]],
    **dict.fromkeys(("tokens/meta.json", "tokens/meta.pkl", "tokens/train.bin", "tokens/val.bin"), [
        ["train.py", "--data", "tokens", *TEXT], ["data.py", "show", "tokens"]])}


def bad_file(r):
    name = r.choice(list(READERS))
    if name == "tokens/meta.pkl":
        os.unlink("tokens/meta.json")
    said, argv = damage(name, r), r.choice(READERS[name])
    if argv == RESUME and name != "run/result.json":
        os.unlink("run/result.json")  # else there is nothing to go on with
    if name == "run/warmup.pt" and argv == RESUME:
        os.unlink("run/ckpt.pt")
    return said, argv, {}


def bad_flags(r):
    """A command line with some flags that are odd, and perhaps an odd environment."""
    plan = r.random() < 0.2
    argv = ["train.py", "--plan"] if plan else r.choice((
        list(RUN), ["train.py", "--data", "text", *TEXT], ["train.py", "--data", "tokens", *TEXT]))
    flags = {**train.every_flag(), "nonsense": (str, None, "")}
    for name in r.sample(sorted(flags.keys() - {"compile", "plan", "tokenizer"}), r.randint(1, 3)):
        kind = flags[name][0]
        argv.append(f"--{name}")
        if kind is not bool or r.random() < 0.1:
            choices = list(kind) * 20 if isinstance(kind, tuple) else HUGE * plan * 9
            argv.append(r.choice(choices + WORDS))
    return "flags", argv, {}


def bad_environment(r):
    name = r.choice(("RANK", "WORLD_SIZE", "NANOWARM_CACHE"))
    return "environment", ["train.py", "--data", "text", *TEXT], {name: r.choice(WORDS)}


def bad_command(r):
    """The other scripts, with odd words in place of theirs."""
    w = lambda: r.choice(WORDS)
    return "command", r.choice((
        ["data.py", "show", w(), "-n", w()], ["data.py", "show", w(), "--seed", w()],
        ["data.py", "show", w(), "--tokenizer", r.choice(("bytes", "characters", "x", ""))],
        ["data.py", "prepare", w()], ["data.py", w()], ["data.py", "list"], ["model.py", w()],
        ["data.py", "prepare", "c4", "--source", r.choice(("run", "text", "", "..")), "--tokens",
         w(), "--tokenizer", "bytes", "--workers", "1"],
        ["model.py", "import", w(), w()], ["eval.py", w()], ["eval.py"], ["eval.py", w(), w()],
        ["eval.py", "run/ckpt.pt", "--data", w()], ["eval.py", "run/ckpt.pt", "--probe", w()],
        ["eval.py", "run/warmup.pt", "--sample", w(), "--tokens", r.choice(("1", "0", "x"))],
        ["eval.py", "run/ckpt.pt", "--prompt", w(), "--temperature", w(), "--top_k", w()],
        ["analyze.py", "curves", w(), "--picture", w()], ["analyze.py", w()],
        ["analyze.py", "curves", w(), "--results", w()], [*TABLE, w(), "--seeds", w()],
        [*TABLE, ".", "--only", w()], ["analyze.py", "pack", w(), "--results", w()],
        ["analyze.py", "report", "--results", w()], ["analyze.py", "claims", "--results", w()])), {}


def bad_spec(r):
    """A rule, task or mixture in which some words are others."""
    spec = r.choice((*data.KINDS, "0.7*set+0.3*union:length=4", "shuffled:dyck:k=2,length=6"))
    words = [spec, *(r.choice(SPECS) for _ in range(r.randint(0, 6)))]
    if r.random() < 0.6:
        key = r.choice((*data.LIMITS, "depth", ""))
        words = [spec, ":", key, "=", r.choice(WORDS[:24] + ["3", "1-2", "2-1", "-", "7-"])]
    spec = "".join(words)
    if r.random() < 0.5:
        return "spec", ["data.py", "show", spec, "-n", "1"], {}
    flag = r.choice(("--data", "--warmup"))
    return "spec", [*RUN[:-3], "--out", "new", flag, spec], {}


def ended(argv, environment, errors):
    """Calls the script's main in a fork of this process, which has loaded it. Returns the status,
    below 0 for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(20)  # whoever waits for ever is killed
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=600, help="(default 600)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tried, faults = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as top:
        os.mkdir(f"{top}/whole")
        os.chdir(f"{top}/whole")
        os.environ["NANOWARM_CACHE"] = f"{top}/whole/cache"
        harmless_files()
        for i in range(args.tries):
            r = random.Random(f"{args.seed} {i}")
            shutil.copytree(f"{top}/whole", f"{top}/{i}", copy_function=copy_one)
            os.chdir(f"{top}/{i}")
            os.environ["NANOWARM_CACHE"] = f"{top}/{i}/cache"
            what, argv, environment = r.choice((bad_flags, bad_spec, bad_command, bad_environment,
                                                bad_file, bad_file, bad_file, bad_file))(r)
            kind = what.partition(" (")[0]
            tried[kind] += 1
            with open("errors", "w") as errors:
                if i % 50 == 49:  # as a person starts it
                    command = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
                    status = subprocess.run(command, env={**os.environ, **environment},
                                            stdout=subprocess.DEVNULL, stderr=errors).returncode
                else:
                    status = ended(argv, environment, errors)
            lines = Path("errors").read_text(errors="replace").splitlines()
            refused = status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
            if os.path.exists("canary"):
                lines.append("code of a pickle was run")
            elif status == 0 or refused:
                shutil.rmtree(f"{top}/{i}")
                continue
            faults[kind] += 1
            place = [line.strip() for line in lines if line.startswith("  File")][-1:]
            print(f"{i}: {what}; status {status}; {' '.join(argv)[-150:]!a} {environment}\n"
                  f"    {' '.join(lines[-1:])[:200]!a} {' '.join(place)}", flush=True)
        os.chdir(ROOT)
    for kind in sorted(tried):
        print(f"{kind:20} {tried[kind]:5} tried, {faults[kind]:4} wrong")
    print(f"{'all':20} {tried.total():5} tried, {faults.total():4} wrong")
    sys.exit(faults.total() > 0)


def copy_one(source, target):
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target)


if __name__ == "__main__":
    main()
