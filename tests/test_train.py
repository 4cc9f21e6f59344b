"""Runs end to end: what they compute, what they take over, what they survive and refuse."""
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from data import UserError, make_data
from model import GPT, attention_maps, load, part_of

SMALL = dict(data="haystack:pairs=3", warmup="set:length=2-4,vocab=9", size="1_2_8", device="cpu",
             steps=14, batch_size=8, lr=1e-2, lr_ramp=4, warmup_steps=12, warmup_batch_size=8,
             eval_rows=32, eval_every=6, save_every=5, log_every=4)


def words(out="run", *more, **flags):
    """The command line of a small run; None leaves a flag out."""
    flags = {**SMALL, **flags, "out": out}
    if flags["warmup"] in (None, "none"):  # its settings would do nothing
        flags |= {key: None for key in flags if key.startswith("warmup_")}
    return [f"--{key}={value}" for key, value in flags.items() if value is not None] + list(more)


def go(*out, **flags):
    return train.run(train.parse(words(*out, **flags))[0])


@pytest.fixture
def printed(monkeypatch, capfd):
    """What train.py prints."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        capfd.readouterr()
        train.main()
        return capfd.readouterr().out
    return call


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """And the signals that a run takes for itself are given back."""
    monkeypatch.chdir(tmp_path)
    taken = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = {number: signal.getsignal(number) for number in taken}
    yield
    train.SIGNALS.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def log(out, key="step", stage="train"):
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["stage"] == stage and key in line]


def result_of(out):
    return json.loads(Path(out, "result.json").read_text())


def state_of(out, file="ckpt.pt"):
    return torch.load(Path(out, file), weights_only=True)


def outcome(out):
    """What has to be the same bits: log and result but for their times, weights, optimiser."""
    text = Path(out, "log.jsonl").read_text() + Path(out, "result.json").read_text()
    state = state_of(out)
    tensors = list(state["model"].values())
    for moments in state["optimizer"]["state"].values():
        tensors += moments.values()
    return (re.sub(r'"(seconds|tokens_per_second)": [\d.]+', "", text),
            [tensor.numpy().tobytes() for tensor in tensors])


def start_of(out, *more, **flags):
    """The weights with which the second stage begins: at a rate of 0 they stay."""
    go(out, *more, **{**flags, "lr": 0, "steps": 1})
    return state_of(out)["model"]


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def killed():
    raise Killed


def at_call(patch, n, owner, name, happens):
    """The n-th call of a function begins with what happens."""
    calls, original = itertools.count(1), getattr(owner, name)

    def watched(*args, **kwargs):
        if next(calls) == n:
            happens()
        return original(*args, **kwargs)
    patch.setattr(owner, name, watched)


def kill(n, owner, name, *out, **flags):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_call(patch, n, owner, name, killed)
        go(*out, **flags)


# What a run computes


def test_a_run_writes_its_files_and_the_result_last(monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    result = go()
    names = {"ckpt.pt", "config.json", "log.jsonl", "result.json", "warmup.pt"}
    assert {path.name for path in Path("run").glob("[!.]*")} == names
    assert moved[-1] == "result.json" and result == result_of("run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["settings"]["lr"] == 1e-2 and config["settings"]["transfer"] == "attn"
    assert {"python", "torch", "numpy", "commit"} <= config["environment"].keys()
    for file, stage, steps in (("warmup.pt", "warmup", [0, 1, 4, 6, 8, 12, 12]),
                               ("ckpt.pt", "train", [0, 1, 4, 6, 8, 12, 12, 14, 14])):
        state = state_of("run", file)
        assert (state["stage"], state["step"]) == (stage, steps[-1])
        assert log("run", "step", stage) == steps
        assert len(log("run", "loss", stage) + log("run", "val_loss", stage)) == len(steps)
    assert result["tokens"] == {"procedural": 12 * 8 * 9, "semantic": 14 * 8 * 9}
    assert result["val_loss"] == log("run", "val_loss")[-1]
    assert state["source"] == {"spec": SMALL["data"], "tokenizer": None, "seed": 0, "eval_rows": 32}


def test_the_same_settings_give_the_same_bits_and_another_seed_gives_others():
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        go(out, seed=seed)
    assert outcome("a") == outcome("b") and outcome("a")[1] != outcome("c")[1]


@pytest.mark.parametrize("schedule,min_lr,rates", [
    ("constant", None, [.5, 1, 1, 1, 1, 1]), ("linear", 0, [.5, 1, 1, .75, .5, .25]),
    ("linear", None, [.5, 1, 1, .775, .55, .325]), ("linear", .2, [.5, 1, 1, .8, .6, .4]),
    ("cosine", 0, [.5, 1, 1, .853553, .5, .146447]),
    ("cosine", None, [.5, 1, 1, .868198, .55, .231802])])
def test_the_learning_rate_ramps_up_and_follows_its_schedule(schedule, min_lr, rates, prose):
    go(data=prose, block_size=8, log_every=1, steps=6, lr=1, grad_clip=1e-3, min_lr=min_lr,
       lr_schedule=schedule, lr_ramp=2, warmup_steps=3, warmup_lr=.5, warmup_lr_ramp=2,
       warmup_lr_schedule="linear", warmup_min_lr=.1)
    assert log("run", "lr") == pytest.approx(rates, abs=1e-6)
    assert log("run", "lr", "warmup") == pytest.approx([.25, .5, .5])


def test_weight_decay_is_on_matrices_alone():
    start, after = start_of("start"), {}
    for decay in (0, 0.5):
        go(f"{decay}", weight_decay=decay, steps=1, lr_ramp=0)
        after[decay] = state_of(f"{decay}")["model"]
    for name, p in start.items():
        lost = 1e-2 * 0.5 * p if p.dim() > 1 else torch.zeros_like(p)
        torch.testing.assert_close(after[0][name] - after[0.5][name], lost, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 3, 5])
@pytest.mark.parametrize("data", ["haystack:pairs=3", "addition:digits=2"])
def test_the_loss_of_step_s_is_the_mean_over_what_counts_in_rows_s_times_batch_size_and_on(
        data, accumulated):
    go(data=data, seed=5, lr=0, steps=3, grad_accum=accumulated, log_every=1)
    model, rows = load("run")[0], make_data(data, seed=5).train
    for step, loss in enumerate(log("run", "loss")):
        losses = []
        for i in range(8 * step, 8 * step + 8):
            x, y = rows[i]
            chances = model(x[None])[0].softmax(-1).tolist()
            losses += [-math.log(chances[t][y[t]]) for t in range(len(y)) if y[t] != -1]
        assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("flag,dropout", [("--grad_accum=3", 0), ("--grad_accum=5", 0),
                                          ("--recompute", 0.1), ("--workers=2", 0.1)])
def test_micro_batches_recomputing_and_workers_change_rounding_at_most(flag, dropout):
    go("plain", dropout=dropout, log_every=1)
    go("other", flag, dropout=dropout, log_every=1)
    assert log("other", "loss") == pytest.approx(log("plain", "loss"), abs=1e-4)


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_end_with_the_loss_of_one(machines):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_RANK="0")
    # What torchrun starts on two machines with one rendezvous is a process with this environment.
    each = [(torchrun, {})] if machines == 1 else [([], dict(there, RANK=rank)) for rank in "01"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    flags = words("two", batch_size=9)
    started = [subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", *flags],
                                env=os.environ | more, **pipes) for launcher, more in each]
    try:
        spoken = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * machines, spoken
    assert "".join(out for out, _ in spoken).count("2 processes") == 1
    one, two = go("one", batch_size=9), result_of("two")
    for key in ("warmup_loss", "val_loss"):
        assert two[key] == pytest.approx(one[key], abs=1e-4)
    assert log("two") == log("one")


def test_processes_that_cannot_share_a_step_say_so(monkeypatch):
    settings, data = train.parse(words())[0], make_data(SMALL["data"])
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(UserError, match="a batch of 8 is too small for 9 processes"):
        train.check_data(data, None, settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "total", lambda mine: [mine + 7.0])
    with pytest.raises(UserError, match="see different data"):
        train.check_data(data, None, settings)


def test_an_environment_of_one_process_is_one(monkeypatch, printed):
    for name, value in dict(RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    assert "1 process\n" in printed(*words())


@pytest.mark.parametrize("environment", [
    dict(WORLD_SIZE="abc"), dict(WORLD_SIZE="0"), dict(RANK="5"), dict(RANK="x"),
    dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"), dict(RANK="0", WORLD_SIZE="2"),
    dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")], ids=str)
def test_an_environment_that_torchrun_did_not_make_is_refused(environment, refused, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert "torchrun" in refused(train, *words()) and not os.listdir()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_and_resumes_with_the_same_bits(dtype):
    # At a batch of 1, the first scale of float16's gradients is too large: it has to be kept, too.
    flags = dict(dtype=dtype, batch_size=1, steps=150, save_every=50)
    go("whole", **flags)
    assert log("whole", "val_loss")[-1] < log("whole", "val_loss")[0] - 0.1
    kill(3, train, "save", "cut", **flags)
    go("cut", "--resume", **flags)
    assert outcome("cut") == outcome("whole")


def test_a_gradient_is_clipped_in_its_own_size_whatever_float16_scales_it_by(monkeypatch):
    norms, clip = {}, torch.nn.utils.clip_grad_norm_
    for dtype in ("float32", "float16"):
        norms[dtype] = []
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (
            norms[dtype].append(clip(*args)), norms[dtype][-1])[1])
        go(dtype, dtype=dtype, warmup="none")
    usual = [float(norm) for norm in norms["float16"] if norm.isfinite()]
    assert len(usual) > 9 and usual[-1] == pytest.approx(float(norms["float32"][-1]), rel=0.5)


@pytest.mark.parametrize("compiler,warnings", [("works", 0), ("is missing", 1), ("fails", 1)])
def test_compiled_a_run_is_the_same_if_need_be_with_one_warning(
        compiler, warnings, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")
    real = torch.compile  # its C++ would take a minute
    stand_in = {"works": lambda model, mode: real(model, backend="eager"),
                "is missing": broken, "fails": lambda model, mode: broken}
    monkeypatch.setattr(torch, "compile", stand_in[compiler])
    go("plain", warmup="none")
    go("compiled", "--compile", warmup="none")
    assert capsys.readouterr().out.count("warning: torch.compile cannot run") == warnings
    assert outcome("compiled") == outcome("plain")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_has_to_be_said_and_the_loss_is_the_cpus():
    gpu, cpu = go("gpu", device=None, dtype="float32"), go("cpu")
    assert gpu["val_loss"] == pytest.approx(cpu["val_loss"], abs=1e-2)


# What it takes over


@pytest.mark.parametrize("parts", ["attn", "mlp", "norm", "attn,mlp", "full"])
def test_parts_move_and_the_rest_starts_as_without_a_warm_up(parts):
    fresh = start_of("none", warmup="none")
    made = start_of("made", transfer=parts, positions="random")
    taken = start_of("taken", transfer=parts, positions="random", init="made/warmup.pt",
                     warmup=None, size=None)
    warm = state_of("made", "warmup.pt")["model"]
    for name, p in fresh.items():
        moves = part_of(name) in parts.replace("full", "attn,mlp,norm")
        assert torch.equal(made[name], warm[name] if moves else p), name
        assert torch.equal(taken[name], made[name])
    assert result_of("taken")["tokens"]["procedural"] == 12 * 8 * 9
    assert result_of("taken")["warmup"] == SMALL["warmup"]


def test_weight_mixtures_take_attention_and_mlps_from_two_checkpoints():
    a, b, c = (start_of(f"{seed}", warmup="none", seed=seed) for seed in range(3))
    mixed = start_of("mix", warmup=None, seed=2, positions="random", attn_from="0",
                     mlp_from="1/ckpt.pt")
    for name, p in mixed.items():
        assert torch.equal(p, {"attn": a, "mlp": b}.get(part_of(name), c)[name]), name


def test_embeddings_and_positions_begin_as_asked(capsys):
    fresh, mean = start_of("none", warmup="none"), start_of("mean", embeddings="mean")
    warm = state_of("mean", "warmup.pt")["model"]
    for name in ("wte.weight", "lm_head.weight"):
        assert (mean[name] == warm["wte.weight"].mean(0)).all()
    assert torch.equal(mean["wpe.weight"], warm["wpe.weight"]), "9 positions for 9"
    few = start_of("few", warmup="set:length=2,vocab=9")
    assert torch.equal(few["wpe.weight"], fresh["wpe.weight"]), "5 are too few"
    assert "positions random (there are 5 for 9)\n" in capsys.readouterr().out


@pytest.mark.parametrize("theirs", [False, True])
def test_transfer_all_goes_on_from_a_whole_model_of_ours_or_of_nanogpt(theirs, prose):
    go("first", "--no-tied", data=prose, block_size=16)
    whole = state_of("first")["model"]
    if theirs:
        weights = {f"transformer.{name}": p for name, p in whole.items() if "lm_head" not in name}
        weights["lm_head.weight"] = whole["lm_head.weight"]
        weights = {f"_orig_mod.{name}": p for name, p in weights.items()}
        shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=True, vocab_size=257)
        torch.save({"model": weights, "model_args": dict(dropout=0.0, **shape)}, "nanogpt.pt")
    start = start_of("second", data=prose, warmup=None, size=None, transfer="all", seed=3,
                     init="nanogpt.pt" if theirs else "first")
    assert all(torch.equal(start[name], p) for name, p in whole.items())
    settings = result_of("second")["settings"]
    assert (settings["block_size"], settings["tied"]) == (16, False)
    assert result_of("second")["tokens"]["procedural"] == (0 if theirs else 12 * 8 * 9)


def test_what_does_not_fit_is_refused_before_anything_is_written(refused, cut):
    whole = dict(warmup=None, init=cut, transfer="all")
    for changes in (dict(whole, size="1_2_16"), dict(whole, data="haystack:pairs=4"),
                    dict(embeddings="keep"), dict(positions="moved", data="haystack:pairs=4")):
        refused(train, *words(**changes))
    assert not os.listdir()


@pytest.fixture
def fed(monkeypatch):
    """The rows of each micro-batch of training, as they come."""
    rows, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, idx, targets=None: (
        rows.append(idx.tolist()), forward(self, idx, targets))[1])
    return rows


def test_the_text_warm_up_reads_other_windows_and_keeps_its_embeddings(fed):
    Path("text").write_text(" ".join(map(str, range(9999))))
    flags = dict(warmup="text", block_size=32, data="text")
    result = go(**flags)
    windows = {tuple(row) for rows in fed for row in rows}
    assert len(windows) == (12 + 14) * 8 and result["tokens"]["procedural"] == 12 * 8 * 32
    start, warm = start_of("start", **flags), state_of("start", "warmup.pt")["model"]
    assert all(torch.equal(start[name], p) for name, p in warm.items())
    go("short", warmup_block_size=8, **flags)
    assert state_of("short", "warmup.pt")["config"]["block_size"] == 8


def test_inputs_of_a_curriculum_grow_by_two_as_accuracy_passes_99_percent(monkeypatch, fed):
    found = dict.fromkeys(("loss", "exact", "bits_per_byte"), 0.0)
    monkeypatch.setattr(train, "evaluate", lambda *args: found)
    for accuracy, lengths in ((1.0, [2] * 20 + [4] * 20 + [6] * 20 + [7] * 30), (0.99, [2] * 90)):
        fed.clear()
        found["accuracy"] = accuracy
        go(f"{accuracy}", "--warmup_curriculum", warmup="set:length=7,vocab=12", warmup_steps=90)
        bar = 12
        assert [{row.index(bar) for row in rows} for rows in fed[:90]] == [{n} for n in lengths]


def test_a_run_stops_at_an_accuracy_seen_twice_in_a_row(monkeypatch):
    accuracies = iter([0, 0, 0, .1, .6, .4, .5, .7, .9, .9])
    monkeypatch.setattr(train, "evaluate", lambda *args: {
        "accuracy": next(accuracies), "loss": 0.0, "exact": 0.0, "bits_per_byte": None})
    result = go(stop_at=0.5, steps=100)
    assert log("run", "val_accuracy") == [.1, .6, .4, .5, .7] and state_of("run")["step"] == 24
    assert result["val_accuracy"] == 0.7 and result["tokens"]["semantic"] == 24 * 8 * 9


def test_sharpening_lowers_the_entropy_of_attention():
    rows, entropy = make_data(SMALL["data"]).val.__getitems__(range(50))[0], []
    for sharpen in (0, 1):
        go(f"{sharpen}", warmup="none", sharpen=sharpen, steps=200, eval_every=None)
        model, _ = load(f"{sharpen}")
        with attention_maps(model) as maps:
            model(rows)
        entropy.append(torch.special.entr(maps[0]).sum(-1).mean())
    assert entropy[1] < entropy[0] / 2


# What it survives

ALL = dict(warmup="dyck:k=1,length=8", warmup_steps=60, warmup_lr=2e-2, warmup_lr_ramp=0,
           warmup_lr_schedule="constant", warmup_dropout=0.02, data="addition:digits=2",
           steps=100, dropout=0.1, lr_ramp=30, stop_at=0.15, eval_every=25, save_every=15,
           log_every=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything that a checkpoint has to remember, never stopped."""
    folder = tmp_path_factory.mktemp("all")
    go(folder, "--warmup_curriculum", **ALL)
    assert state_of(folder, "warmup.pt")["length"] > 2, "the curriculum grew"
    assert state_of(folder)["step"] == 50, "--stop_at stopped it"
    return outcome(folder)


@pytest.mark.parametrize("owner,name,calls", [
    (os, "replace", (1, 2, 5, 7, 12)), (os, "fsync", (3, 11)), (train, "save", (1, 4, 5, 8)),
    (train.Log, "add", (1, 2, 9, 10, 14)), (torch.optim.AdamW, "step", (16, 60, 61, 93))])
def test_killed_anywhere_and_resumed_a_run_ends_with_the_same_bits(owner, name, calls, whole):
    for n in calls:
        kill(n, owner, name, f"{n}", "--warmup_curriculum", **ALL)
        if Path(f"{n}/log.jsonl").exists():
            with open(f"{n}/log.jsonl", "ab") as file:
                file.write(b'\xff\n{"stage": "train", "st')
        go(f"{n}", "--warmup_curriculum", "--resume", "--save_every=7", **ALL)
        assert outcome(f"{n}") == whole, n


LONG = dict(warmup_steps=20, steps=400, save_every=20, eval_every=300, log_every=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT,
                                    signal.SIGHUP, signal.SIGUSR1])
def test_a_run_goes_on_after_a_signal(number):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pipesize=4096)
    command = [sys.executable, ROOT / "train.py", *words(**LONG)]
    with subprocess.Popen(command, **pipes) as process:
        while "train] step 33/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)  # it cannot have ended: what it says would not fit the pipe
        out, err = process.communicate(timeout=60)
    assert not Path("run/result.json").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and not err
        stopped = re.search(r"stopped at train step (\d+) of 400; saved.* --resume$", out)
        assert state_of("run")["step"] == int(stopped[1])
    go("run", "--resume", **LONG)
    go("whole", **LONG)
    assert outcome("run") == outcome("whole")


def test_stopped_before_its_first_step_a_run_goes_on():
    train.SIGNALS.append(signal.SIGTERM)
    with pytest.raises(train.Stopped):
        go("run")
    train.SIGNALS.clear()
    go("run", "--resume")
    go("whole")
    assert outcome("run") == outcome("whole")


@pytest.mark.parametrize("owner,name,n,file", [(train, "save", 5, "ckpt.pt"),
                                               (train.Log, "add", 11, "log.jsonl")])
def test_a_full_disk_is_one_line_and_harms_no_checkpoint(owner, name, n, file, refused):
    go("whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, n, owner, name, full)
        assert file in refused(train, *words())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state_of("run")["step"] == 5
    go("run", "--resume")
    assert outcome("run") == outcome("whole")


@pytest.mark.parametrize("lr,steps,eval_every", [("1e37", 1, 1), ("1e37", 3, 100), ("1e38", 3, 1)])
def test_a_run_that_is_not_finite_is_refused_and_saves_no_such_weights(
        lr, steps, eval_every, refused):
    for more in ([], ["--resume"]):
        assert "not finite" in refused(train, *words("run", *more, lr=lr, lr_ramp=0, save_every=1,
                                                     steps=steps, eval_every=eval_every))
        assert not Path("run/result.json").exists()
        for path in Path("run").glob("*.pt"):
            assert all(p.isfinite().all() for p in load(path)[0].parameters())


def test_a_gradient_that_is_not_finite_once_is_refused_and_resuming_goes_on(refused):
    go("whole")
    calls, clip = itertools.count(1), torch.nn.utils.clip_grad_norm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * (
            math.nan if next(calls) == 20 else 1))
        assert "not finite" in refused(train, *words())
    go("run", "--resume")
    assert outcome("run") == outcome("whole")


def test_a_killed_runs_workers_do_not_keep_its_folder():
    command = [sys.executable, ROOT / "train.py", *words("run", "--workers=2", **LONG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while "train] step 33/" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
    go("run", "--resume", **LONG)


def test_a_closed_pipe_does_not_stop_a_run():
    line = shlex.join([sys.executable, str(ROOT / "train.py"), *words(log_every=1)])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} | head -2"],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 2
    assert result_of("run")["tokens"]["semantic"] == 14 * 8 * 9


def test_a_clock_may_be_coarse_and_be_set_back(monkeypatch):
    times = itertools.count(1e9, -3600)
    monkeypatch.setattr(train.time, "time", lambda: next(times))
    monkeypatch.setattr(train.time, "monotonic", lambda: 5.0)
    assert go(log_every=1)["seconds"] == 0
    assert min(log("run", "tokens_per_second")) > 0


def test_a_second_process_is_refused_and_the_first_goes_on_unharmed(monkeypatch):
    def second():
        with pytest.raises(UserError, match="another process is at work in .*run") as refusal:
            go("run", "--resume")
        assert "--resume" not in str(refusal.value)
    go("whole")
    at_call(monkeypatch, 10, train.Log, "add", second)
    go("run")
    assert outcome("run") == outcome("whole")


# What it refuses


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of a run that was killed after the checkpoint of its step 10."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    kill(6, train, "save", folder)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*")}


def test_a_run_whose_data_have_changed_is_refused(refused, monkeypatch, printed):
    text, flags = Path("corpus.txt"), dict(data="corpus.txt", block_size=16)
    first, other = "The quick brown fox jumps over it. " * 99, "It sleeps under a brown fox. " * 99
    text.write_text(first)
    kill(5, train, "save", "run", **flags)
    assert "unfinished: --resume" in refused(train, *words(**flags))
    text.write_text(other)
    assert "not what it was" in refused(train, *words("run", "--resume", **flags))
    text.write_text(first)
    go("run", "--resume", **flags)
    monkeypatch.setattr(train, "train", killed)
    assert "finished in an earlier run" in printed(*words(**flags))
    text.write_text(other)
    assert "not what it was" in refused(train, *words(**flags))


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(more, refused, cut):
    before = files_of(cut)
    line = refused(train, *words(cut, *more, steps=99))
    assert "steps 14, here 99" in line and f"--init {cut}/ckpt.pt --transfer all" in line
    assert files_of(cut) == before
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    Path("mine/.own.tmp").mkdir()
    for out in ("mine", "mine/thesis.txt", "mine/thesis.txt/run", "x" * 300):
        assert out in refused(train, *words(out, *more))
        assert {path.name for path in Path("mine").iterdir()} >= {"thesis.txt", ".own.tmp"}
    assert files_of("mine") == {"thesis.txt": b"precious"}


def test_micro_batches_may_change_on_resuming_unless_dropout_depends_on_them(refused):
    for dropout in (0, 0.1):
        kill(6, train, "save", f"{dropout}", dropout=dropout)
    more = "--resume", "--grad_accum=3"
    go("0", *more, dropout=0)
    assert "grad_accum" in refused(train, *words("0.1", *more, dropout=0.1))


@pytest.mark.parametrize("name", ["config.json", "result.json", "ckpt.pt", "warmup.pt"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"[", "cut"])
def test_a_damaged_file_is_named_and_kept(name, damage, refused, cut):
    shutil.copytree(cut, "run")
    damage = (cut / "ckpt.pt").read_bytes()[:9000] if damage == "cut" else damage
    Path("run", name).write_bytes(damage)
    assert name in refused(train, *words("run", "--resume"))
    assert files_of("run")[name] == damage


@pytest.mark.parametrize("wrong", [
    dict(step="3"), dict(step=-1), dict(step=None), dict(step=15), dict(seconds="long"),
    dict(result=None), dict(result={"loss": "low"}), dict(fingerprint=[1]), dict(optimizer={}),
    dict(optimizer={"state": []}), dict(exp_avg=torch.zeros(1)), dict(exp_avg=None),
    dict(exp_avg=torch.zeros(256, 8).half()), dict(exp_avg_sq=torch.zeros(3, 3)),
    dict(exp_avg=torch.zeros(256, 8).to_sparse()), dict(optimizer={"state": {0: {"step": []}}})],
    ids=str)
def test_a_checkpoint_with_something_else_in_it_is_refused(wrong, refused, cut):
    shutil.copytree(cut, "run")
    state = state_of(cut)
    place = state["optimizer"]["state"][0] if "exp_avg" in str(wrong) else state
    place.update(wrong)
    torch.save(state, "run/ckpt.pt")
    assert "ckpt.pt" in refused(train, *words("run", "--resume"))


def test_moments_that_repeat_one_number_in_a_file_are_a_tensor_when_they_are_used(cut):
    shutil.copytree(cut, "run")
    state = state_of(cut)
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):  # fused AdamW crashed on these
            moments[name] = torch.zeros(1).expand(moments[name].shape)
    torch.save(state, "run/ckpt.pt")
    go("run", "--resume")
    assert state_of("run")["step"] == 14


BAD = """
    --data=haystak | --data=set | --data= | --data=c4 | --data=haystack:pairs=99 | --data=none.txt |
    --warmup=dyke | --warmup=haystack | --warmup=eca --warmup_curriculum | --warmup=text |
    --warmup=dyck:length=1 | --init=none.pt | --transfer=all | --transfer=heads | --preset=c4 |
    --embeddings=keep | --size=huge | --size=1_3_8 | --steps=1.5 | --block_size=4 | --lr=nan |
    --warmup_block_size=4 | --dropout=1 | --seed=4294967296 | --device=tpu | --stop_at=1.5 |
    --log_every=0 | --sharpen=1 --recompute | --unknown=1 | stray | --warmup=none --init=none.pt
"""


@pytest.mark.parametrize("bad", re.split(r"\s*\|\s*", BAD.strip()))
def test_a_bad_command_line_is_one_line_and_writes_nothing(bad, refused):
    refused(train, *words(), *bad.split())
    assert not os.listdir()


@pytest.mark.parametrize("argv,idle", [
    ("--warmup none --warmup_lr 1 --transfer attn", "--warmup_lr, --transfer"),
    ("--data sorting --tokenizer bytes", "--tokenizer"), ("--tokens 1M --steps 9", "--steps"),
    ("--init CUT --warmup_steps 5 --data haystack", "--warmup_steps"),
    ("--attn_from CUT --transfer attn --data haystack", "--transfer")])
def test_a_flag_that_would_do_nothing_is_refused(argv, idle, refused, cut):
    line = refused(train, *argv.replace("CUT", str(cut)).split())
    assert f"{idle} would do nothing" in line


# Settings and names

C4 = dict(data="c4", tokenizer="gpt2", size="gpt2", block_size=2048, batch_size=32, steps=10_000,
          lr=5e-4, lr_schedule="cosine", lr_ramp=0, min_lr=None, weight_decay=0.0, dropout=0.1,
          tied=True, positions="random", transfer="full", warmup_lr=5e-4, warmup_dropout=0.1,
          warmup_weight_decay=0.1, warmup_lr_schedule="constant")
PARROT = dict(C4, data="codeparrot", block_size=1024, batch_size=48, steps=20_000, lr=5e-5,
              min_lr=0.0, weight_decay=0.01)
LAPTOP = dict(data="code", tokenizer="bytes", size="tiny", steps=3000, batch_size=8, block_size=128,
              lr=2e-3, lr_schedule="cosine", lr_ramp=100, warmup="dyck:k=8", warmup_steps=2000,
              warmup_batch_size=8, warmup_lr=3e-3, warmup_lr_ramp=200, warmup_min_lr=0.0)
DYCK = dict(warmup="dyck:k=64,length=2048", warmup_steps=500, warmup_batch_size=32)
TASK = dict(size="2_4_16", tied=False, steps=10_000, batch_size=1000, lr=1e-3, lr_ramp=500,
            lr_schedule="cosine", weight_decay=1e-3, dropout=0.0, dtype="float32", eval_rows=4000)


@pytest.mark.parametrize("given,expected", [
    ("", LAPTOP), ("--preset laptop", LAPTOP),
    ("--preset gpu", dict(C4, data="code", tokenizer="bytes", block_size=1024, steps=2000,
                          lr_ramp=100, weight_decay=0.1, dropout=0.0, warmup_dropout=0.0)),
    ("--warmup none", dict(warmup="none", warmup_steps=0)),
    ("--data haystack", dict(TASK, warmup="dyck", transfer="attn", warmup_lr=5e-3)),
    ("--data sorting", dict(TASK, transfer="full")),
    ("--preset laptop --data haystack", dict(TASK, steps=1500, batch_size=250, lr=2e-3, stop_at=0.9,
                                             warmup="dyck:length=36", warmup_steps=4000,
                                             warmup_lr=5e-3, warmup_lr_ramp=200)),
    ("--data multiplication", dict(TASK, size="4_8_512", steps=156_250, batch_size=64)),
    ("--preset c4", C4 | DYCK),
    ("--preset c4 --warmup union", dict(C4, warmup="union:length=64", warmup_steps=2500,
                                        warmup_batch_size=64)),
    ("--preset c4 --warmup eca", dict(DYCK, warmup="eca:length=2048")),
    ("--preset c4 --warmup set:length=20", dict(warmup="set:length=20", warmup_steps=2500)),
    ("--preset c4-350m", dict(C4, size="24_16_1024")),
    ("--preset c4-1.3b", dict(C4, size="1.3b", steps=160_000, recompute=True)),
    ("--preset codeparrot", PARROT | DYCK),
    ("--preset deepmind_math", dict(PARROT, data="deepmind_math", tokenizer="characters",
                                    block_size=512, batch_size=64, steps=50_000)),
    ("--preset deepmind_math-1.3b", dict(size="1.3b", steps=50_000)),
    ("--preset wikitext103-350m", dict(data="wikitext103", size="24_16_1024", tokenizer="gpt2")),
    ("--preset c4 --warmup text", dict(warmup_tokens=500 * 32 * 2048, embeddings="keep")),
    ("--preset c4 --warmup text --warmup_steps 9", dict(warmup_tokens=None, warmup_steps=9)),
    ("--preset c4 --data code --lr 1e-2 --no-tied --dropout 0 --positions fit --tokenizer gpt2",
     dict(C4, data="code", lr=1e-2, tied=False, dropout=0.0, positions="fit")),
    ("--data haystack --init CUT", dict(size="1_2_8", warmup="none")),
    ("--data haystack --init CUT --size 1_1_8", dict(size="1_1_8"))])
def test_what_is_not_given_comes_from_a_checkpoint_or_a_published_row(given, expected, cut):
    settings, _ = train.parse(["--device=cpu", *given.replace("CUT", str(cut)).split()])
    assert {key: getattr(settings, key) for key in expected} == expected


def test_a_budget_in_tokens_is_one_in_steps():
    result = go(steps=None, tokens="0.8K", warmup_steps=None, warmup_tokens=300)
    assert (result["settings"]["steps"], result["settings"]["warmup_steps"]) == (11, 4)
    assert result["tokens"] == {"procedural": 4 * 8 * 9, "semantic": 11 * 8 * 9}


def test_what_a_stage_uses_is_said_as_it_starts(printed):
    text = printed(*words(warmup_lr=3e-3, warmup_lr_schedule="constant", warmup_lr_ramp=0))
    assert "[warmup] learning rate 0.003: a ramp of 0 steps, then constant\n" in text
    assert "[train] haystack:pairs=3: 14 steps of 8 x 9 tokens" in text
    assert "[train] learning rate 0.01: a ramp of 4 steps, then cosine to 0\n" in text


def test_folders_are_named_by_data_warm_up_and_seed():
    for argv, name in (
            ("", "code-dyck-s0"), ("--preset c4 --seed 3 --lr 1", "c4-dyck-s3"),
            ("--data docs --preset c4 --warmup none", "c4-docs-none-s0"),
            ("--warmup 0.7*set+0.3*union", "code-0.7_set+0.3_union-s0"),
            ("--data haystack:pairs=3 --warmup shuffled:set", "haystack_pairs=3-shuffled_set-s0"),
            (f"--warmup {'+'.join(['set'] * 99)}", f"code{('-' + 'set+' * 99)[:96]}-s0")):
        assert train.parse(["--device=cpu", *argv.split()])[0].out == f"out/{name}"


@pytest.mark.parametrize("flags", [
    {}, dict(warmup="none"), dict(min_lr="1e-3"), dict(warmup=None, init="CUT", size=None)],
    ids=str)
def test_the_next_command_is_accepted_and_differs_in_its_warm_up_alone(flags, printed, cut):
    argv = [word.replace("CUT", str(cut)) for word in words("my run", "--no-tied", **flags)]
    text = printed(*argv)
    here = train.parse(argv)[0]
    there = train.parse(shlex.split(re.search(r"next +python train.py (.*)", text)[1]))[0]
    curves = re.search(r"next +python analyze.py curves (.*)", text)[1]
    assert shlex.split(curves) == [here.out, there.out]
    assert (there.warmup == "none") == (result_of("my run")["tokens"]["procedural"] > 0)
    for key, value in vars(here).items():
        if key not in ("init", "transfer", "out") and not key.startswith("warmup"):
            assert getattr(there, key) == value, key
    Path(there.out).mkdir(parents=True)
    assert "next       python train.py" not in printed(*argv), "it is there"


@pytest.mark.skipif("NANOWARM_SLOW" not in os.environ, reason="two minutes: NANOWARM_SLOW=1")
def test_brackets_find_the_needle_by_step_1000_and_without_them_it_is_not_found():
    recall = dict(dict.fromkeys(SMALL), data="haystack:pairs=15", preset="laptop", steps=None)
    go("none", **dict(recall, warmup="none", steps=1000))
    go("dyck", **dict(recall, warmup="dyck"))
    assert max(log("none", "val_accuracy")) < 0.5
    assert max(log("dyck", "val_accuracy")) > 0.9 and state_of("dyck")["step"] <= 1000
