"""Runs end to end: what they compute, what they take over, what they survive and refuse."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from data import UserError, make_data, read_json
from model import attention_maps, load, part_of

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
    return train.run(train.parse(words(*out, **flags)))


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "listen", deaf)


def deaf(worker=None):
    """In place of train.listen: signals are the tests'."""


def log(out, key="step", stage="train"):
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["stage"] == stage and key in line]


def outcome(out):
    """What has to be the same bits: log and result but for their times, weights, optimiser."""
    text = Path(out, "log.jsonl").read_text() + Path(out, "result.json").read_text()
    model, state = load(out)
    tensors = [model.state_dict(), *state["optimizer"]["state"].values()]
    return (re.sub(r'"(seconds|tokens_per_second)": [\d.]+', "", text),
            [tensor.numpy().tobytes() for some in tensors for tensor in some.values()])


def start_of(out, **flags):
    """The weights with which the second stage begins: at a rate of 0 they stay."""
    go(out, **{**flags, "lr": 0, "steps": 1})
    return load(out)[0].state_dict()


def kill(at, owner, name, *out, **flags):
    """A run that ends where a function is called for the at-th time, as with kill -9."""
    calls = [getattr(owner, name)] * (at - 1) + [lambda *args, **more: sys.exit()]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):  # nothing may catch it
        patch.setattr(owner, name, lambda *args, **more: calls.pop(0)(*args, **more))
        go(*out, **flags)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """What comes of a small run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("usual")
    go(folder)
    return outcome(folder)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of a run that was killed after the checkpoint of its step 10."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    kill(6, train, "save", folder)
    return folder


# What a run computes

def test_a_run_writes_its_files_and_the_result_last(monkeypatch, usual):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    result, config = go(), read_json("run/config.json")
    assert outcome("run") == usual, "the same bits"
    assert {*moved} == {path.name for path in Path("run").glob("[!.]*")}
    assert moved[-1] == "result.json" and result == read_json("run/result.json")
    assert config["settings"]["lr"] == 1e-2 and config["environment"]["torch"] == torch.__version__
    assert log("run", "step", "warmup") == [0, 1, 4, 6, 8, 12, 12]
    assert log("run") == [0, 1, 4, 6, 8, 12, 12, 14, 14]
    assert log("run", "lr", "warmup")[-1] == pytest.approx(5e-3 * 12 / 200), "of its own ramp"
    assert result["tokens"] == {"procedural": 12 * 8 * 9, "semantic": 14 * 8 * 9}


@pytest.mark.parametrize("flags,rates", [
    (dict(data="haystack:pairs=3", lr_schedule="linear", min_lr=0.01), [.5, 1, 1, .8, .6, .4]),
    (dict(data="addition:digits=2", grad_accum=5), [.5, 1, 1, .853553, .5, .146447])])
def test_a_plain_loop_in_torch_has_the_same_losses(flags, rates):
    flags = dict(dict(warmup="none", seed=5, lr_ramp=2), **flags)
    start = start_of("start", **flags)
    go(**dict(flags, steps=6, lr=0.05, weight_decay=0.5, grad_clip=0.3, log_every=1))
    model, rows = load("start")[0], make_data(flags["data"], seed=5).train
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((1, 0.0), (2, 0.5))])
    for step, (logged, rate) in enumerate(zip(log("run", "loss"), rates, strict=True)):
        x, y = map(torch.stack, zip(*(rows[i] for i in range(8 * step, 8 * step + 8))))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(),
                                                 ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.05
        optimizer.step()
        assert logged == pytest.approx(loss.item(), abs=1e-4), step


def test_two_processes_of_torchrun_end_with_the_loss_of_one(script, refused, monkeypatch):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = script("train.py", *words("two", batch_size=9), launcher=launcher)
    assert done.returncode == 0 and done.stdout.count("processes: 2\n") == 1, done.stderr
    for rank, processes in (("5", "1"), ("-1", "1"), ("0", "abc"), ("0", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert "torchrun" in refused(train, *words()) and os.listdir() == ["two"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    go("one", batch_size=9)
    for stage in ("warmup", "train"):
        one, two = log("one", "val_loss", stage), log("two", "val_loss", stage)
        assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_clips_as_float32_does_and_resumes(dtype, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)))
    # At a batch of 1, the first scale of float16's gradients is too large: it has to be kept, too.
    flags = dict(warmup="none", batch_size=1, steps=150, save_every=50)
    go("single", **flags)
    go("whole", dtype=dtype, **flags)
    assert norms[299].item() == pytest.approx(norms[149].item(), rel=0.5), "however it is scaled"
    assert log("whole", "val_loss")[-1] < log("whole", "val_loss")[0] - 0.1
    kill(2, train, "save", "cut", dtype=dtype, **flags)
    go("cut", "--resume", dtype=dtype, **flags)
    assert outcome("cut") == outcome("whole")


@pytest.mark.parametrize("flag", ["--compile", "--recompute", "--workers=1"])
def test_what_saves_time_or_memory_changes_no_bit(flag, usual, monkeypatch):
    compiled = torch.compile  # its C++ would take a minute
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    go("run", flag)
    assert outcome("run")[1] == usual[1]


# What it takes over

def test_parts_move_from_a_warm_up_or_checkpoints_and_the_rest_starts_as_without():
    fresh, other = (start_of(f"none {seed}", warmup="none", seed=seed) for seed in (0, 1))
    made = start_of("made", transfer="mlp,norm", positions="random")
    flags = dict(warmup=None, size=None, positions="random")
    taken = start_of("taken", init="made/warmup.pt", transfer="mlp,norm", **flags)
    mixed = start_of("mixed", attn_from="none 1", mlp_from="made/warmup.pt", **flags)
    warm = load("made/warmup.pt")[0].state_dict()
    for name, p in fresh.items():
        part = part_of(name)
        assert torch.equal(made[name], warm[name] if part in ("mlp", "norm") else p), name
        assert torch.equal(taken[name], made[name])
        assert torch.equal(mixed[name], {"attn": other, "mlp": warm}.get(part, fresh)[name])
    result = read_json("taken/result.json")
    assert (result["warmup"], result["tokens"]["procedural"]) == (SMALL["warmup"], 12 * 8 * 9)


def test_transfer_all_goes_on_from_a_whole_model_such_as_nanogpts(prose):
    go("first", "--no-tied", data=prose, block_size=16, seed=2)
    first, state = load("first")
    assert state["source"] == dict(spec=str(prose), tokenizer="bytes", seed=2, eval_rows=32)
    torch.save({"model": first.state_dict(), "model_args": vars(first.config)}, "nanogpt.pt")
    for init, tokens in (("first", 12 * 8 * 9), ("nanogpt.pt", 0)):
        start = start_of(f"{tokens}", data=prose, warmup=None, size=None, transfer="all", init=init)
        assert all(torch.equal(start[name], p) for name, p in first.named_parameters())
        assert read_json(f"{tokens}/result.json")["tokens"]["procedural"] == tokens


def test_the_text_warm_up_reads_other_windows_and_keeps_its_embeddings():
    Path("text").write_text(" ".join(map(str, range(9999))))
    flags = dict(data="text", warmup="text", block_size=32)
    rows = [each.train.__getitems__(range(96))[0] for each in train.open_data(
        train.parse(words(**flags)))]
    assert len(torch.cat(rows).unique(dim=0)) == 2 * 96
    start = start_of("run", **flags)
    warm, _ = load("run/warmup.pt")
    assert all(torch.equal(start[name], p) for name, p in warm.named_parameters())


def test_a_run_stops_at_an_accuracy_seen_twice_in_a_row(monkeypatch):
    accuracies = iter([0, 0, 0, .1, .6, .4, .5, .7, .9, .9])
    monkeypatch.setattr(train, "evaluate", lambda *args: {
        "accuracy": next(accuracies), "loss": 0.0, "exact": 0.0, "bits_per_byte": None})
    result = go(stop_at=0.5, steps=100)
    assert log("run", "val_accuracy") == [.1, .6, .4, .5, .7] and load("run")[1]["step"] == 24
    assert result["val_accuracy"] == 0.7 and result["tokens"]["semantic"] == 24 * 8 * 9


def test_sharpening_lowers_the_entropy_of_attention():
    rows, entropy = make_data(SMALL["data"]).val.__getitems__(range(50))[0], []
    for out, sharpen in (("plain", 0), ("sharp", 1)):
        go(out, warmup="none", sharpen=sharpen, steps=200, eval_every=None)
        model, _ = load(out)
        with attention_maps(model) as maps:
            model(rows)
        entropy.append(torch.special.entr(maps[0]).sum(-1).mean())
    assert entropy[1] < entropy[0] / 2


# What it survives

def test_killed_anywhere_and_resumed_a_run_ends_with_the_same_bits():
    flags = dict(warmup="dyck:k=1,length=8", warmup_steps=60, warmup_lr=2e-2, warmup_lr_ramp=0,
                 warmup_lr_schedule="constant", warmup_dropout=0.02, data="addition:digits=2",
                 steps=100, dropout=0.1, lr_ramp=30, stop_at=0.15, eval_every=25, save_every=15)
    go("whole", **flags)  # it has everything that a checkpoint has to remember
    assert load("whole")[1]["step"] == 50, "--stop_at stopped it"
    for owner, name, calls in (
            (os, "replace", (1, 2, 5, 7, 12)), (os, "fsync", (3, 11)), (train, "save", (1, 4, 8)),
            (train.Log, "add", (1, 2, 9, 10, 14)), (torch.optim.AdamW, "step", (16, 60, 61, 93))):
        for n in calls:
            out = f"{name} {n}"
            kill(n, owner, name, out, **flags)
            if Path(out, "log.jsonl").exists():
                with open(f"{out}/log.jsonl", "ab") as file:
                    file.write(b'\xff\n{"stage": "train", "st')
            go(out, "--resume", "--save_every=7", **flags)
            assert outcome(out) == outcome("whole"), out


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_no_second_process_is_let_in_and_a_run_goes_on_after_a_signal(name):
    flags = dict(warmup_steps=20, steps=400, save_every=20, eval_every=300, log_every=1)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pipesize=4096)
    command = [sys.executable, ROOT / "train.py", *words("run", "--workers=2", **flags)]
    heard = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    with subprocess.Popen(command, preexec_fn=heard, **pipes) as process:
        while "train] step 33/" not in process.stdout.readline():
            assert process.poll() is None
        with pytest.raises(UserError, match="another process is at work in .*run"):
            go("run", "--resume", **flags)
        process.send_signal(signal.Signals[name])  # not ended: its words fill the pipe
        if name == "SIGKILL":  # its workers live on for seconds, and hold no lock
            process.wait()
        else:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 128 + signal.Signals[name] and not err
            assert re.search(r"stopped at train step \d+ of 400; saved.* --resume$", out)
    go("run", "--resume", **flags)
    go("whole", **flags)
    assert outcome("run") == outcome("whole")


def test_a_run_that_is_not_finite_is_refused(refused):
    assert "the loss is not finite" in refused(train, *words(lr=1e37, lr_ramp=0, log_every=1))


def test_a_closed_pipe_does_not_stop_a_run(script):
    piped = "bash", "-c", 'set -o pipefail; "$@" | head -2', "bash", sys.executable
    done = script("train.py", *words(log_every=1), launcher=piped)
    assert done.returncode == 0 and not done.stderr and Path("run/result.json").exists()


# What it refuses, and its settings

def test_a_folder_is_one_runs_with_the_data_and_the_masks_that_it_began_with(refused, monkeypatch):
    text, flags = Path("corpus.txt"), dict(data="corpus.txt", block_size=16, dropout=0.1)
    text.write_text("The brown fox. " * 200)
    kill(5, train, "save", "run", **flags)
    for said, changes in (("unfinished: --resume", {}), ("steps 14, here 99", dict(steps=99)),
                          ("grad_accum", dict(grad_accum=3))):
        assert said in refused(train, *words("run", **flags, **changes))
    text.write_text("A red fox. " * 200)
    assert "not what it was" in refused(train, *words("run", "--resume", **flags))
    text.write_text("The brown fox. " * 200)
    result = go("run", "--resume", **flags)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # it was finished
    assert go(**flags) == result == read_json("run/result.json")
    Path("run/ckpt.pt").unlink()  # it is not trained anew
    assert "without its ckpt.pt" in refused(train, *words("run", **flags))


def test_what_is_no_run_is_refused_and_left_alone(refused, cut):
    shutil.copytree(cut, "run")
    for name in ("ckpt.pt", "warmup.pt", "config.json"):
        Path("run", name).write_bytes(b"[]")
        assert name in refused(train, *words("run", "--resume"))
        assert Path("run", name).read_bytes() == b"[]"
    Path("mine/.own.tmp").mkdir(parents=True)
    Path("mine/thesis.txt").write_text("precious")
    for out in ("mine", "mine/thesis.txt", "x" * 300):
        assert out in refused(train, *words(out, "--resume"))
    assert Path("mine/thesis.txt").read_text() == "precious" and Path("mine/.own.tmp").exists()


@pytest.mark.parametrize("key,change,same_bits", [
    ("step", int, True), ("exp_avg", lambda m: m.double(), True),
    ("exp_avg_sq", lambda m: m.t().contiguous().t(), True), ("exp_avg", lambda m: m[0], None),
    ("exp_avg", lambda m: m[0, 0].expand(256, 8), False)])  # fused AdamW crashed on this
def test_moments_of_any_dtype_and_layout_go_on(key, change, same_bits, refused, cut, usual):
    shutil.copytree(cut, "run")
    state = torch.load("run/ckpt.pt", weights_only=True)
    moments = state["optimizer"]["state"][0]
    moments[key] = change(moments[key])
    torch.save(state, "run/ckpt.pt")
    if same_bits is None:
        assert "ckpt.pt" in refused(train, *words("run", "--resume"))
        return
    go("run", "--resume")
    assert (outcome("run") == usual) == same_bits


@pytest.mark.parametrize("bad,said", [
    ("--data=set", "takes a task"), ("--warmup=haystack", "a rule"), ("--warmup=text", "is text"),
    ("--log_every=--", "empty"), ("--init=CUT --warmup=set", "excludes"),
    ("--sharpen=1 --recompute", "excludes"), ("--tokenizer=bytes", "to be had with --tokenizer"),
    ("--init=CUT --warmup_lr=1", "--warmup_lr would"), ("--tokens=1M", "--steps would"),
    ("--attn_from=CUT --transfer=attn", "--transfer would"), ("--preset=c4", "--preset would"),
    ("--transfer=all", "needs --init"), ("--warmup=dyck:length=1", "no token counts"),
    # What does not fit is seen before the warm-up.
    ("--init=CUT --size=1_2_16", "1_2_8"), ("--embeddings=keep", "256")])
def test_a_bad_command_line_is_one_line_and_writes_nothing(bad, said, refused, cut):
    assert said in refused(train, *words(warmup=None), *bad.replace("CUT", str(cut)).split())
    assert not os.listdir()


@pytest.mark.parametrize("given,expected", [
    ("", dict(data="code", tokenizer="bytes", size="tiny", steps=3000, batch_size=8, lr=2e-3,
              warmup="dyck:k=8", warmup_steps=2000, warmup_lr=3e-3, out="out/code-dyck-s0")),
    ("--data haystack", dict(size="2_4_16", tied=False, steps=10_000, batch_size=1000, lr=1e-3,
                             lr_ramp=500, warmup="dyck", transfer="attn", warmup_lr=5e-3)),
    ("--preset laptop --data haystack", dict(steps=1500, batch_size=250, lr=2e-3, stop_at=0.9,
                                             warmup="dyck:length=36", warmup_steps=4000)),
    ("--data multiplication", dict(size="4_8_512", steps=156_250, batch_size=64, lr=1e-3)),
    ("--preset c4", dict(
        data="c4", tokenizer="gpt2", size="gpt2", block_size=2048, batch_size=32, steps=10_000,
        lr=5e-4, lr_schedule="cosine", lr_ramp=0, weight_decay=0.0, dropout=0.1, tied=True,
        positions="random", transfer="full", warmup="dyck:k=64,length=2048", warmup_steps=500,
        warmup_lr=5e-4, warmup_dropout=0.1)),
    ("--preset c4 --warmup '0.7 * set + 0.3*dyck:k=3+union' --lr 1 --no-tied --seed 3", dict(
        warmup="0.7*set:length=64+0.3*dyck:k=3+union:length=64", warmup_steps=2500, lr=1,
        tied=False, seed=3)),
    ("--preset c4-1.3b", dict(size="1.3b", block_size=2048, steps=160_000, recompute=True)),
    ("--preset deepmind_math-1.3b", dict(tokenizer="characters", size="1.3b", block_size=512,
                                         batch_size=64, steps=50_000, lr=5e-5, min_lr=0.0)),
    ("--preset c4 --warmup text", dict(warmup_tokens=500 * 32 * 2048, embeddings="keep")),
    ("--preset c4 --data docs --warmup none", dict(warmup_steps=0, out="out/c4-docs-none-s0")),
    ("--warmup shuffled:2*set+dyck --seed 4", dict(  # Windows takes no : and no *
        warmup="shuffled:2*set+dyck:k=8", out="out/code-shuffled_2_set+dyck-s4")),
    ("--data haystack --init CUT", dict(size="1_2_8", warmup="none", out="out/haystack-init-s0")),
    ("--data haystack --init CUT --transfer all", dict(tokenizer=None, block_size=9, tied=False))])
def test_what_is_not_given_is_published_or_a_checkpoints_or_a_name(given, expected, cut):
    settings = train.parse(["--device=cpu", *shlex.split(given.replace("CUT", str(cut)))])
    assert {key: getattr(settings, key) for key in expected} == expected


def test_a_run_says_its_rate_and_takes_budgets_in_tokens_and_a_coarse_clock(monkeypatch, capfd):
    monkeypatch.setattr(train.time, "monotonic", lambda: 5.0)
    result = go("my run", steps=None, tokens="1K", warmup_steps=None, warmup_tokens=850)
    assert result["seconds"] == 0 and min(log("my run", "tokens_per_second")) > 0
    assert result["tokens"] == {"procedural": 864, "semantic": 1008}
    line = "[train] learning rate 0.01: a ramp of 4 steps, then cosine; ends at 0\n"
    assert line in capfd.readouterr().out


@pytest.mark.skipif("NANOWARM_SLOW" not in os.environ, reason="two minutes: NANOWARM_SLOW=1")
def test_brackets_find_the_needle_by_step_1000_and_without_them_it_is_not_found():
    recall = dict(dict.fromkeys(SMALL), data="haystack:pairs=15", preset="laptop", steps=None)
    go("none", **dict(recall, warmup="none", steps=1000))
    go("dyck", **dict(recall, warmup="dyck"))
    assert max(log("none", "val_accuracy")) < 0.5
    assert max(log("dyck", "val_accuracy")) > 0.9 and load("dyck")[1]["step"] <= 1000
