"""Runs end to end: the same numbers whatever interrupts them and however many processes share them; what is refused."""
import gc
import json
import math
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train as script
from conftest import ROOT
from data import UserError, make_source
from model import GPT, GPTConfig, export, load, part_of, save
from train import Settings, Stage, run

SMALL = dict(warmup="set:length=4,vocab=12", warmup_steps=12, warmup_batch_size=8, size="1_2_16", block_size=32, steps=14,
             batch_size=8, eval_batches=2, eval_every=6, save_every=5, log_every=4, device="cpu")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def flags(**settings):
    words = []
    for key, value in settings.items():
        words += [f"--{'no-' * (value is False)}{key}"] + ([] if isinstance(value, bool) else [str(value)])
    return words


@pytest.fixture
def settings(prose, tmp_path):
    """Settings(...) for a run of a second, in a folder of its own."""
    def make(out="run", **changes):
        return Settings(**{**SMALL, "data": str(prose), "out": str(tmp_path / out), **changes})
    return make


def outcome(folder):
    """What must be the same bits: weights, optimiser, log but for its timing, result but for its timing."""
    _, state = load(f"{folder}/ckpt.pt")
    tensors = [*state["model"].values()] + [v for p in state["optimizer"]["state"].values() for v in p.values()]
    lines = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
    result = json.load(open(f"{folder}/result.json"))
    for entry in [*lines, result]:
        entry.pop("tokens_per_second", None)
    result.pop("seconds")
    return [t.numpy().tobytes() for t in tensors], lines, result


def test_a_run_writes_what_the_house_says(settings, tmp_path):
    result = run(settings())
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt.pt", "config.json", "log.jsonl", "result.json", "warmup.pt"]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["lr"] == 2e-3 and {"python", "torch", "numpy", "commit"} <= set(config["environment"])
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    assert [(e["stage"], e["step"]) for e in lines if "loss" in e] == (
        [("warmup", n) for n in (1, 4, 8, 12)] + [("train", n) for n in (1, 4, 8, 12, 14)])
    assert [(e["stage"], e["step"]) for e in lines if "val_loss" in e] == (
        [("warmup", n) for n in (0, 6, 12)] + [("train", n) for n in (0, 6, 12, 14)])
    assert result["tokens"] == {"procedural": 12 * 8 * 9, "semantic": 14 * 8 * 32}
    losses = [e["val_loss"] for e in lines if e["stage"] == "train" and "val_loss" in e]
    assert result["val_loss"] == losses[-1] < losses[0]
    assert math.isclose(result["val_bits_per_byte"], result["val_loss"] / math.log(2), rel_tol=0.05)
    for name in ("warmup.pt", "ckpt.pt"):
        assert torch.load(folder / name, weights_only=True)["stage"] == name.replace("ckpt", "train").split(".")[0]


def test_the_same_settings_give_the_same_bits_and_another_seed_gives_others(settings, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(settings(name, seed=seed))
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a == b and a[0] != c[0]


def test_training_learns_a_task(settings):
    result = run(settings(data="sorting:numbers=2,below=20", warmup="none", size="1_2_32", block_size=None, steps=300,
                          batch_size=64, lr=1e-2, lr_ramp=10, eval_batches=50, eval_every=None, save_every=None))
    assert result["val_exact"] <= result["val_accuracy"] and result["val_accuracy"] > 0.9


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


@pytest.mark.parametrize("where,calls", [("os.replace", (1, 2, 4, 6, 8)), ("os.fsync", (3, 6)), ("train.Log.add", (1, 3, 9, 12)),
                                         ("torch.optim.AdamW.step", (3, 12, 13, 20))])
def test_killed_anywhere_and_resumed_the_run_ends_with_the_same_bits(where, calls, settings, tmp_path, monkeypatch):
    run(settings("whole", warmup_dropout=0.1, dropout=0.1))
    for at in calls:
        module, _, name = where.rpartition(".")
        owner = {"os": os, "train.Log": script.Log, "torch.optim.AdamW": torch.optim.AdamW}[module]
        original, count = getattr(owner, name), iter(range(1, 10 ** 6))

        def dies(*args, **kwargs):
            if next(count) == at:
                raise Killed
            return original(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(Killed):
                run(settings(f"cut{at}", warmup_dropout=0.1, dropout=0.1))
        run(settings(f"cut{at}", warmup_dropout=0.1, dropout=0.1, resume=True))
        whole, cut = outcome(tmp_path / "whole"), outcome(tmp_path / f"cut{at}")
        whole[2]["settings"] = cut[2]["settings"] = None
        assert whole == cut, at
        assert sorted(os.listdir(tmp_path / f"cut{at}")) == sorted(script.RUN_FILES), "nothing half-written is left"


def wait_for(path, text, process, seconds=60):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {text!r} in {path}")


LONG = {**SMALL, "steps": 400, "warmup_steps": 200, "save_every": 20, "eval_every": 100, "log_every": 10}


def test_kill_9_at_random_moments_then_resume(prose, tmp_path):
    rng, out = random.Random(0), tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *flags(**LONG, data=prose, out=out, resume=True)]
    run(Settings(**LONG, data=str(prose), out=str(tmp_path / "whole")))
    for stage in ("warmup", "train"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(out / "log.jsonl", f'"stage": "{stage}", "step": 10', process)
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, killed = outcome(tmp_path / "whole"), outcome(out)
    assert whole[:2] == killed[:2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_save_and_say_how_to_go_on(number, prose, tmp_path):
    out, settings = tmp_path / "run", {**LONG, "save_every": 10 ** 6, "steps": 10 ** 5}
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags(**settings, data=prose, out=out)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "log.jsonl", '"stage": "train", "step": 10', process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not stderr
    assert "--resume" in stdout.splitlines()[-1]
    step = int(re.search(r"train step ([\d,]+) of", stdout)[1].replace(",", ""))
    assert load(out / "ckpt.pt")[1]["step"] == step >= 10 and not (out / "result.json").exists()


def test_two_processes_and_accumulation_end_with_the_loss_of_one(script, prose, tmp_path):
    losses = []
    for name, launcher, extra in (("one", (sys.executable,), {}), ("accumulated", (sys.executable,), {"grad_accum": 2}),
                                  ("two", (*TORCHRUN, "--nproc_per_node=2"), {})):
        done = script("train.py", *flags(**SMALL, **extra, data=prose, out=tmp_path / name), launcher=launcher)
        assert done.returncode == 0, done.stderr
        losses.append(json.load(open(tmp_path / name / "result.json")))
        lines = [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
        assert len(lines) == 13, "one process writes the log"
    for key in ("val_loss", "val_bits_per_byte", "warmup_loss", "val_accuracy"):
        assert max(r[key] for r in losses) - min(r[key] for r in losses) < 1e-4


@pytest.mark.parametrize("before,after", [((2, True), (1, False))])
def test_a_run_is_stopped_and_resumed_by_other_processes_with_and_without_a_sharded_optimiser(before, after, prose, tmp_path):
    settings, out = {**LONG, "save_every": 10 ** 6, "steps": 1000, "lr": 3e-4}, tmp_path / "run"  # rounding grows with the rate

    def command(processes, zero, *more):
        launcher = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
        return [*launcher, str(ROOT / "train.py"), *flags(**settings, zero=zero, data=prose, out=out), *more]
    process = subprocess.Popen(command(*before), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "log.jsonl", '"stage": "train", "step": 10', process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode != 0 and load(out / "ckpt.pt")[1]["step"] >= 10
    done = subprocess.run(command(*after, "--resume"), capture_output=True, timeout=120, text=True)
    assert done.returncode == 0, done.stderr
    run(Settings(**settings, data=str(prose), out=str(tmp_path / "one")))
    one, two = (json.load(open(tmp_path / name / "result.json")) for name in ("one", "run"))
    assert abs(one["val_loss"] - two["val_loss"]) < 1e-4


def test_two_machines_with_one_rendezvous_end_with_the_loss_of_one_process(prose, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
               "--rdzv_id=nanowarm", "--local_addr=127.0.0.1", str(ROOT / "train.py"),
               *flags(**SMALL, zero=True, data=prose, out=tmp_path / "two")]
    machines = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    spoken = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], spoken
    assert sorted("2 processes" in stdout for stdout, _ in spoken) == [False, True], "one of them speaks"
    run(Settings(**SMALL, data=str(prose), out=str(tmp_path / "one")))
    one, two = (json.load(open(tmp_path / name / "result.json")) for name in ("one", "two"))
    assert abs(one["val_loss"] - two["val_loss"]) < 1e-4


def test_processes_that_see_different_things_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda values, mine: values.__setitem__(slice(None), [mine, 7]))
    script.agree("data", 7)
    with pytest.raises(UserError, match="processes 0 and 1 do not have the same checkpoint.*share"):
        script.agree("checkpoint", 8)


def test_what_fails_in_one_process_is_said_in_all(monkeypatch):
    def elsewhere(values, mine):
        values[:] = [mine, "the disk of process 1 is full"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_gather_object", elsewhere)
    with pytest.raises(UserError, match="process 1 is full") as caught, script.failing_together():
        pass
    assert caught.value.everywhere


def test_a_machine_without_the_corpus_is_named(script, published, tmp_path):
    cache = {"NANOWARM_CACHE": str(tmp_path / "cache")}
    done = script("data.py", *"prepare c4 --tokens 50K --val_tokens 5K --tokenizer bytes --source".split(), published, env=cache)
    assert done.returncode == 0, done.stderr
    wrapper = tmp_path / "machine.py"
    wrapper.write_text("import os, runpy, sys\nif os.environ['RANK'] == '1':\n    os.environ['NANOWARM_CACHE'] = 'elsewhere'\n"
                       f"sys.path.insert(0, {str(ROOT)!r})\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    settings = flags(**{**SMALL, "data": "c4", "tokenizer": "bytes", "out": tmp_path / "run"})
    done = subprocess.run([*TORCHRUN, "--nproc_per_node=2", str(wrapper), *settings], capture_output=True, text=True,
                          env={**os.environ, **cache}, timeout=120)
    assert done.returncode != 0 and "error: c4 is not prepared on this machine" in done.stderr and "(process 1)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_whose_corpus_has_changed_is_not_resumed(settings, tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(30):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"Chapter {i}. " + "words and words " * 40)
    s = settings(data=str(tmp_path / "corpus"))
    run(s)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "corpus" / "31.txt").write_text("another chapter " * 40)
    with pytest.raises(UserError, match="not what it was"):
        run(settings(data=str(tmp_path / "corpus"), resume=True))


def test_with_dropout_the_number_of_micro_batches_stays(settings, tmp_path):
    run(settings(dropout=0.1))
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="micro-batches"):
        run(settings(dropout=0.1, resume=True, grad_accum=2))
    run(settings(dropout=0.1, resume=True))


def test_the_warm_up_model_is_gone_when_stage_2_begins(settings, monkeypatch):
    alive, original = {}, script.train

    def record(s, stage, model, *args, **kwargs):
        gc.collect()
        alive[stage.name] = sum(type(o) is GPT for o in gc.get_objects())
        return original(s, stage, model, *args, **kwargs)
    monkeypatch.setattr(script, "train", record)
    run(settings())
    assert alive["train"] == alive["warmup"] - 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_a_sharded_optimiser_takes_up_the_state_of_a_plain_one(device, settings, tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    run(settings(device=device))
    weights, tokens = [], torch.ones(2, 8, dtype=torch.int64, device=device)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", rank=0, world_size=1,
                                         init_method=f"file://{tmp_path}/store")
    try:
        for sharded in (False, True):
            model, state = load(tmp_path / "run" / "ckpt.pt", device)
            groups = [{"params": [p for p in model.parameters() if (p.dim() < 2) == small]} for small in (False, True)]
            settings = dict(lr=1e-3, fused=True)
            optimizer = (ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings) if sharded else
                         torch.optim.AdamW(groups, **settings))
            script.load_optimizer(optimizer, state["optimizer"])
            model(tokens, tokens).backward()
            optimizer.step()
            weights.append([p.detach().cpu() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_recomputing_and_accumulating_give_the_same_run(settings, tmp_path):
    plain = run(settings("plain", dropout=0.1))
    assert run(settings("recomputed", dropout=0.1, recompute=True)) == {
        **plain, **{key: pytest.approx(plain[key], abs=1e9) for key in ("seconds", "tokens_per_second")}}
    assert outcome(tmp_path / "plain")[0] == outcome(tmp_path / "recomputed")[0]


def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(prose, tmp_path):
    out = tmp_path / "run"
    run(Settings(**{**SMALL, "steps": 5}, data=str(prose), out=str(tmp_path / "sizes")))
    limit = (tmp_path / "sizes" / "ckpt.pt").stat().st_size - 2000
    assert (tmp_path / "sizes" / "warmup.pt").stat().st_size < limit
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags(**SMALL, data=prose, out=out)], text=True,
                          capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ckpt.pt" in done.stderr, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.jsonl", "warmup.pt"]
    assert load(out / "warmup.pt")[1]["step"] == 12
    run(Settings(**SMALL, data=str(prose), out=str(out), resume=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(settings, tmp_path, monkeypatch):
    original, count = GPT.forward, iter(range(10 ** 6))

    def turns_bad(self, idx, targets=None, reduction="mean"):
        loss = original(self, idx, targets, reduction)
        return loss * float("nan") if self.training and next(count) == 12 + 8 else loss
    monkeypatch.setattr(GPT, "forward", turns_bad)
    with pytest.raises(UserError, match="not finite at train step 9.*ckpt.pt"):
        run(settings())
    _, state = load(tmp_path / "run" / "ckpt.pt")
    assert state["step"] == 5 and all(t.isfinite().all() for t in state["model"].values())


# Transfer in a run


def test_a_saved_warm_up_can_be_taken_up_and_gives_the_same_run(settings, tmp_path):
    run(settings("both"))
    run(settings("init", warmup=None, init=str(tmp_path / "both" / "warmup.pt")))
    both, init = outcome(tmp_path / "both"), outcome(tmp_path / "init")
    assert both[0] == init[0] and init[2]["tokens"] == both[2]["tokens"]
    assert not (tmp_path / "init" / "warmup.pt").exists()


def first_weights(monkeypatch, s):
    """The weights with which stage 2 of a run starts."""
    seen = {}

    def record(settings, stage, model, *args, **kwargs):
        seen.setdefault(stage.name, {name: p.detach().clone() for name, p in model.named_parameters()})
        return original(settings, stage, model, *args, **kwargs)
    original = script.train
    with monkeypatch.context() as patch:
        patch.setattr(script, "train", record)
        run(s)
    return seen["train"]


@pytest.mark.parametrize("parts", ["attn", "mlp", "full"])
def test_a_run_moves_the_parts_it_was_asked_to_and_starts_the_rest_as_without_warm_up(parts, settings, tmp_path, monkeypatch):
    fresh = first_weights(monkeypatch, settings("none", warmup="none"))
    moved = first_weights(monkeypatch, settings("some", transfer=parts))
    warm = dict(load(tmp_path / "some" / "warmup.pt")[0].named_parameters())
    for name in fresh:
        taken = part_of(name) in (("attn", "mlp", "norm") if parts == "full" else (parts,))
        assert torch.equal(moved[name], warm[name] if taken else fresh[name]), name


def test_weight_mixtures_take_attention_and_mlps_from_two_checkpoints(settings, tmp_path, monkeypatch):
    run(settings("a"))
    run(settings("b", warmup="sort:length=4,vocab=12", seed=1))
    a, b = (dict(load(tmp_path / n / "warmup.pt")[0].named_parameters()) for n in "ab")
    fresh = first_weights(monkeypatch, settings("none", warmup="none"))
    mixed = first_weights(monkeypatch, settings("mix", warmup=None, attn_from=str(tmp_path / "a" / "warmup.pt"),
                                                mlp_from=str(tmp_path / "b" / "warmup.pt")))
    for name in mixed:
        assert torch.equal(mixed[name], {"attn": a, "mlp": b}.get(part_of(name), fresh)[name]), name


def test_a_task_has_published_settings_and_can_start_at_mean_embeddings(settings, tmp_path, monkeypatch):
    resolved = script.resolve(Settings(data="haystack", device="cpu"))
    assert (resolved.size, resolved.batch_size, resolved.steps, resolved.lr) == ("2_4_16", 1000, 10000, 1e-3)
    assert (resolved.lr_ramp, resolved.weight_decay, resolved.tied, resolved.embeddings) == (500, 1e-3, False, "random")
    assert resolved.transfer == "attn" and script.resolve(Settings(data="sorting", device="cpu")).transfer == "full"
    assert script.resolve(Settings(data="multiplication", device="cpu")).size == "4_8_512"
    start = first_weights(monkeypatch, settings(data="haystack:pairs=2", block_size=None, embeddings="mean"))
    mean = load(tmp_path / "run" / "warmup.pt")[0].wte.weight.mean(0)
    assert (start["wte.weight"] == mean).all() and (start["lm_head.weight"] == mean).all()
    fresh = first_weights(monkeypatch, settings("none", data="haystack:pairs=2", block_size=None, warmup="none"))
    start = first_weights(monkeypatch, settings("head", data="haystack:pairs=2", block_size=None, embeddings="mean",
                                                lm_head="random", positions="random"))
    assert torch.equal(start["lm_head.weight"], fresh["lm_head.weight"]) and torch.equal(start["wpe.weight"], fresh["wpe.weight"])
    assert (start["wte.weight"] == load(tmp_path / "head" / "warmup.pt")[0].wte.weight.mean(0)).all()
    for more in (dict(init=1), dict(attn_from=1, mlp_from=1)):  # the same with a warm-up that is there
        more = {key: str(tmp_path / "head" / "warmup.pt") for key in more}
        taken = first_weights(monkeypatch, settings("-".join(more), data="haystack:pairs=2", block_size=None, warmup=None,
                                                    embeddings="mean", lm_head="random", positions="random", **more))
        assert all(torch.equal(taken[name], start[name]) for name in ("wte.weight", "lm_head.weight", "wpe.weight"))


def test_the_text_warm_up_spends_as_many_tokens_on_the_same_corpus_and_keeps_its_embeddings(settings, tmp_path, monkeypatch):
    start = first_weights(monkeypatch, settings(warmup="text"))
    warm = dict(load(tmp_path / "run" / "warmup.pt")[0].named_parameters())
    assert all(torch.equal(start[name], warm[name]) for name in start)
    assert json.load(open(tmp_path / "run" / "result.json"))["tokens"]["procedural"] == 12 * 8 * 32


def test_the_curriculum_grows_the_input_by_two_as_accuracy_passes_99_percent(settings, capsys, monkeypatch):
    perfect = {"loss": 0.0, "accuracy": 1.0, "exact": 1.0, "tokens": 1, "bits_per_byte": None}
    monkeypatch.setattr(script, "evaluate", lambda *args: perfect)
    monkeypatch.setattr(script, "CURRICULUM_EVERY", 4)
    run(settings(warmup="set:length=7,vocab=12", warmup_curriculum=True, warmup_steps=20))
    assert re.findall(r"input length (\d+)", capsys.readouterr().out) == ["4", "6", "8"]


def test_a_curriculum_resumes_at_its_length(settings, tmp_path, monkeypatch):
    changes = dict(warmup="identity:length=8,vocab=4", warmup_curriculum=True, warmup_steps=150, warmup_lr=1e-2, log_every=10,
                   size="1_2_32")
    run(settings("whole", **changes))
    original, count = torch.optim.AdamW.step, iter(range(10 ** 6))

    def dies(*args, **kwargs):
        if next(count) == 128:
            raise Killed
        return original(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(Killed):
            run(settings("cut", **changes))
    run(settings("cut", **changes, resume=True))
    assert outcome(tmp_path / "whole")[:2] == outcome(tmp_path / "cut")[:2]


@pytest.mark.parametrize("schedule,expected", [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.55, 0.1]),
                                               ("cosine", [0.5, 1, 1, 0.55, 0.1])])
def test_the_learning_rate_ramps_up_and_follows_its_schedule(schedule, expected):
    stage = Stage("train", 110, 1, 1.0, schedule, 10, 0.1, 0.0, 0.0, 1, 1, None)
    assert [stage.lr_at(step) for step in (4, 9, 10, 60, 110)] == pytest.approx(expected)


def test_weight_decay_is_on_matrices_alone():
    model = GPT(GPTConfig(10, 8, 1, 2, 8))
    stage = Stage("train", 1, 1, 1.0, "constant", 0, 0.0, 0.3, 0.0, 1, 1, None)
    decayed, spared = script.make_optimizer(model, stage, Settings(device="cpu")).param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.dim() >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(p.dim() == 1 for p in spared["params"])


def test_compile_gives_the_same_run_or_one_warning(settings, capfd):
    plain, compiled = run(settings("plain", warmup="none")), run(settings("compiled", warmup="none", compile=True))
    assert abs(plain["val_loss"] - compiled["val_loss"]) < 1e-3


def test_where_compile_cannot_run_there_is_one_warning_and_the_run_goes_on(settings, capfd, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")
    monkeypatch.setattr(torch, "compile", broken)
    result = run(settings("a", compile=True, warmup="none"))
    assert capfd.readouterr().err.count("warning: torch.compile cannot run here") == 1
    assert result == {**run(settings("b", warmup="none")), "seconds": result["seconds"],
                      "tokens_per_second": result["tokens_per_second"]}


def test_bfloat16_trains(settings):
    assert run(settings(dtype="bfloat16"))["val_loss"] < 5.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_has_to_be_said_and_the_loss_is_the_cpus(settings):
    gpu = run(settings("gpu", device=None, dtype="float32"))
    assert abs(gpu["val_loss"] - run(settings("cpu"))["val_loss"]) < 1e-2


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_fine_tuning_goes_on_from_a_whole_model(source, settings, tmp_path, monkeypatch):
    run(settings("first", tokenizer="bytes"))
    path = tmp_path / "first" / "ckpt.pt"
    if source == "folder":
        export(path, tmp_path / "hf")
    init = str(path if source == "checkpoint" else tmp_path / "hf")
    (tmp_path / "other.txt").write_text("Another corpus, of other words entirely. " * 300)
    changes = dict(warmup=None, init=init, transfer="all", data=str(tmp_path / "other.txt"), size=None, block_size=None)
    start = first_weights(monkeypatch, settings("second", **changes))
    first = load(path)[0]
    assert all(torch.equal(start[name], p) for name, p in first.named_parameters())
    result = json.load(open(tmp_path / "second" / "result.json"))
    assert (result["settings"]["size"], result["settings"]["block_size"]) == ("1_2_16", 32)
    # What warm-up there was came before the first run, and is counted as such.
    assert result["tokens"]["procedural"] == (12 * 8 * 9 if source == "checkpoint" else 0)


def test_fine_tuning_that_cannot_keep_everything_is_refused(refused, settings, prose, tmp_path):
    run(settings("first"))
    command = {k: v for k, v in SMALL.items() if k != "warmup"} | dict(
        data=prose, out=tmp_path / "run", init=tmp_path / "first" / "ckpt.pt", transfer="all")
    assert "positions" in refused(script, *flags(**{**command, "block_size": 64}))
    assert "vocabulary" in refused(script, *flags(**{**command, "init": tmp_path / "first" / "warmup.pt", "block_size": 9}))
    assert "--init" in refused(script, *flags(**{**command, "init": "", "warmup": "set"}))
    assert not (tmp_path / "run").exists()


# Presets and plans


@pytest.mark.parametrize("preset,expected", [
    ("c4", ("c4", "gpt2", 2048, 32, 10_000, 5e-4, 5e-5, 0.0, 0.1, "gpt2")),
    ("codeparrot", ("codeparrot", "gpt2", 1024, 48, 20_000, 5e-5, 0.0, 0.01, 0.1, "gpt2")),
    ("deepmind_math", ("deepmind_math", "gpt2", 512, 64, 50_000, 5e-5, 0.0, 0.01, 0.1, "characters")),
    ("c4-350m", ("c4", "24_16_1024", 2048, 32, 10_000, 5e-4, 5e-5, 0.0, 0.1, "gpt2")),
    ("c4-1.3b", ("c4", "1.3b", 2048, 32, 160_000, 5e-4, 5e-5, 0.0, 0.1, "gpt2"))])
def test_presets_are_the_published_settings(preset, expected):
    s = script.resolve(Settings(preset=preset, device="cpu"))
    assert (s.data, s.size, s.block_size, s.batch_size, s.steps, s.lr, s.min_lr, s.weight_decay, s.dropout,
            s.tokenizer) == expected
    assert (s.lr_schedule, s.lr_ramp, s.tied) == ("cosine", 0, True)
    assert (s.warmup_lr, s.warmup_lr_schedule, s.warmup_weight_decay, s.warmup_dropout) == (5e-4, "constant", 0.1, 0.1)


@pytest.mark.parametrize("given,expected", [
    ("set", ("set:length=64", 2500, 64)), ("set+union", ("set+union:length=64", 2500, 64)),
    ("shuffled:sort", ("shuffled:sort:length=64", 2500, 64)), ("dyck", ("dyck:k=64,length=2048", 500, 32)),
    ("dyck_shuffle", ("dyck_shuffle:k=64,length=2048", 500, 32)), ("eca", ("eca:length=2048", 500, 32)),
    ("set:length=20", ("set:length=20", 2500, 64)), ("dyck:k=8", ("dyck:k=8", 500, 32))])
@pytest.mark.parametrize("preset", ["c4", "codeparrot"])
def test_warm_ups_under_a_preset_are_the_published_ones(preset, given, expected):
    s = script.resolve(Settings(preset=preset, warmup=given, device="cpu"))
    assert (s.warmup, s.warmup_steps, s.warmup_batch_size) == expected


@pytest.mark.parametrize("preset", ["c4", "codeparrot", "deepmind_math"])
def test_the_text_warm_up_of_a_preset_spends_what_dyck_spends(preset):
    s = script.resolve(Settings(preset=preset, warmup="text", device="cpu"))
    assert s.warmup_steps * s.warmup_batch_size * s.block_size == 500 * 32 * 2048


def test_every_flag_overrides_a_preset():
    changes = dict(data="code", size="tiny", block_size=128, batch_size=4, steps=7, lr=1e-2, min_lr=1e-4, weight_decay=0.3,
                   dropout=0.0, warmup_dropout=0.2, warmup_lr=1e-3, warmup_steps=3, warmup_batch_size=2, recompute=False)
    s = script.resolve(Settings(preset="c4-1.3b", device="cpu", **changes))
    assert {key: getattr(s, key) for key in changes} == changes and s.tokenizer == "bytes"
    assert s.warmup == "dyck:k=64,length=128" and s.out == script.resolve(Settings(preset="c4-1.3b", device="cpu", **changes)).out


def test_budgets_can_be_said_in_tokens(settings):
    s = script.resolve(settings(steps=None, warmup_steps=None, tokens=10_000, warmup_tokens=1000))
    assert (s.steps, s.warmup_steps) == (39, 14)  # of 8 x 32 tokens, and of 8 x 9
    s = script.resolve(Settings(preset="c4", tokens=655_360_000, warmup="union", warmup_tokens=4_000_000, device="cpu"))
    assert (s.steps, s.warmup_steps) == (10_000, 481)
    task = script.resolve(Settings(data="haystack", tokens=10 ** 6, warmup="none", device="cpu"))
    assert task.steps == 16  # of 1,000 x 63


def test_a_plan_needs_neither_data_nor_gpu_and_writes_nothing(script, tmp_path):
    done = script("train.py", "--preset", "c4", "--warmup", "union", "--device", "cuda", "--tflops", "300", "--plan", cwd=tmp_path,
                  env={"NANOWARM_CACHE": str(tmp_path / "none")})
    assert done.returncode == 0 and not any(tmp_path.iterdir()), done.stderr
    assert all(words in done.stdout for words in ("125,226,240 parameters", "65,536 tokens: 655,360,000 in all", "6.46e+17 FLOPs",
                                                  "0.6 hours", "peak", "0.0317 tokens"))


def kept_for_backward(model, x, s):
    """Bytes of the tensors that torch keeps for the backward pass, the weights themselves aside."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)  # so that no other comes to the same place
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with script.autocast_for(s)():
            model(x, x, reduction="sum")
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers,width,context,vocab", [(2, 128, 256, 100), (6, 64, 128, 100), (2, 64, 64, 2000)])
def test_the_planned_activations_are_those_torch_keeps(dtype, layers, width, context, vocab):
    s, config = Settings(device="cpu", dtype=dtype, recompute=False), GPTConfig(vocab, context, layers, 4, width)
    model = GPT(config).train()
    kept = kept_for_backward(model, torch.randint(vocab, (4, context)), s)
    plan = script.memory_plan(config, 4, s)
    transient = 4 * (2 * 4 * context * vocab + vocab * width + context * width)  # of the head, gone or not there yet
    assert kept < plan["activations"] < (kept + transient) * 1.15
    model.recompute = s.recompute = True
    less = script.memory_plan(config, 4, s)["activations"]
    assert kept_for_backward(model, torch.randint(vocab, (4, context)), s) < less
    assert less < plan["activations"] * 0.6 or layers < 6


def test_the_planned_weights_gradients_and_optimiser_are_those_of_a_step(monkeypatch):
    s, config = Settings(device="cpu", dtype="float32", recompute=False), GPTConfig(300, 64, 2, 4, 64)
    model = GPT(config)
    optimizer = script.make_optimizer(model, Stage("train", 1, 1, 1.0, "constant", 0, 0, 0, 0, 1, 1, None), s)
    model(torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int64)).backward()
    optimizer.step()
    plan = script.memory_plan(config, 2, s)
    state = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values() if t.dim()]
    assert plan["weights"] == sum(p.nbytes for p in model.parameters())
    assert plan["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert plan["optimiser"] == sum(t.nbytes for t in state)
    monkeypatch.setenv("WORLD_SIZE", "4")
    s.zero = True
    assert script.memory_plan(config, 2, s)["optimiser"] == plan["optimiser"] // 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"dropout": 0.1, "compile": False}, {"grad_accum": 2}])
def test_on_a_gpu_the_planned_memory_is_what_torch_reports(changes, settings):
    s = settings(device="cuda", data="code", size="gpt2", block_size=1024, batch_size=8, warmup="none", steps=3, **changes)
    resolved = script.resolve(s)
    torch.cuda.reset_peak_memory_stats()
    run(s)
    planned = script.memory_plan(GPTConfig(257, 1024, 12, 12, 768, resolved.dropout), 8 // s.grad_accum, resolved)["peak"]
    assert abs(torch.cuda.max_memory_allocated() / planned - 1) < 0.15


# The command line


def test_the_commands_of_the_readme_as_a_person_types_them(script, prose, tmp_path):
    quick = flags(size="1_2_16", warmup_steps=3, steps=4, warmup_batch_size=2, batch_size=2, eval_batches=1, block_size=32)
    done = script("train.py", "--warmup", "dyck", *quick, cwd=tmp_path,
                  launcher=(os.path.join(os.path.dirname(sys.executable), "torchrun"),))
    assert done.returncode == 0, done.stderr
    for words in ("dyck:k=8,length=32", "left", "bits per byte", "for one", "out/code-dyck-s0", "--warmup none"):
        assert words in done.stdout
    follow = re.search(r"next +python (train.py .*)", done.stdout)[1].split()
    compare = re.search(r"python (analyze.py curves .*)", done.stdout)[1].split()
    done = script(*follow, cwd=tmp_path)
    assert done.returncode == 0 and "--warmup dyck" in done.stdout
    done = script(*compare, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "curves.png").stat().st_size > 10_000
    again = script("train.py", *flags(warmup="dyck"), *quick, cwd=tmp_path)
    assert again.returncode == 0 and "train] step" not in again.stdout, "a finished run is told again, not run again"


def test_help_lists_every_setting_with_its_meaning(script):
    text = script("train.py", "--help").stdout
    for name in Settings.__dataclass_fields__:
        assert f"--{name} " in text
    assert "warm-up:" in text and "optimisation:" in text


@pytest.mark.parametrize("bad", [
    dict(warmup="dyke"), dict(warmup="dyck:k=0"), dict(warmup="eca:rule=256"), dict(warmup="haystack"), dict(data="haystak"),
    dict(data="set"), dict(size="huge"), dict(transfer="heads"), dict(embeddings="none"), dict(steps=-1), dict(lr=-1),
    dict(lr="nan"), dict(lr="fast"), dict(dtype="int8"), dict(lr_schedule="step"), dict(dropout=1), dict(device="tpu"),
    dict(seed=-1), dict(seed=2 ** 32), dict(batch_size=9, grad_accum=2), dict(warmup_batch_size=9, grad_accum=2), dict(warmup="set:length=40"),
    dict(data="haystack:pairs=20"), dict(block_size=4000), dict(tokenizer="klingon"), dict(unknown_flag=1),
    dict(warmup="text", data="haystack:pairs=2"), dict(init="missing.pt"), dict(warmup="text", warmup_curriculum=True), dict(warmup="eca", warmup_curriculum=True),
    dict(embeddings="keep"), dict(lm_head="mean"), dict(lm_head="zero"), dict(positions="keep"),
    dict(warmup="none", positions="random"), dict(preset="c5"), dict(preset="c4", data="haystack"), dict(tokens=5), dict(warmup_tokens=5),
    dict(transfer="all"), dict(tflops=0), dict(warmup_tokens="many", warmup_steps=None), dict(data="c4")])
def test_bad_settings_are_refused_and_nothing_is_written(bad, refused, prose, tmp_path):
    settings = {**SMALL, "data": prose, "out": tmp_path / "run", **bad}
    if "init" in bad:
        settings.pop("warmup")
    refused(script, *flags(**settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [dict(lm_head="mean"), dict(warmup="none", positions="random"), dict(transfer="")])
def test_a_plan_refuses_what_the_run_would(bad, refused, prose):
    refused(script, *flags(**{**SMALL, "data": prose, **bad}), "--plan")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_asked_for_and_absent_is_refused(refused, prose, tmp_path):
    assert "cuda" in refused(script, *flags(**{**SMALL, "device": "cuda"}, data=prose, out=tmp_path / "run"))


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(settings, monkeypatch):
    source = make_source("set:length=4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--batch_size 9 does not divide over 2 processes"):
        script.check_fit(settings(batch_size=9), source, source, None, None)


def test_a_checkpoint_of_another_architecture_is_refused(refused, prose, tmp_path):
    save(tmp_path / "other.pt", GPT(GPTConfig(14, 9, 2, 2, 16)))
    settings = {**SMALL, "data": prose, "out": tmp_path / "run", "init": tmp_path / "other.pt"}
    settings.pop("warmup")
    assert "do not fit" in refused(script, *flags(**settings))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused_and_left_alone(refused, settings, prose, tmp_path, capfd):
    run(settings())
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    line = refused(script, *flags(**{**SMALL, "steps": 99}, data=prose, out=tmp_path / "run"))
    assert "steps 14, here 99" in line and "another --out" in line
    refused(script, *flags(**{**SMALL, "steps": 99}, data=prose, out=tmp_path / "run", resume=True))
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    (tmp_path / "run" / "result.json").unlink()
    assert "--resume" in refused(script, *flags(**SMALL, data=prose, out=tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "not a run" in refused(script, *flags(**SMALL, data=prose, out=tmp_path / "mine"))


def test_an_out_that_cannot_be_made_is_refused(refused, prose, tmp_path):
    (tmp_path / "file").write_text("")
    refused(script, *flags(**SMALL, data=prose, out=tmp_path / "file" / "run"))


@pytest.mark.parametrize("name,content", [("config.json", "{"), ("config.json", '{"settings": 3}'), ("result.json", "[]"),
                                          ("ckpt.pt", "not a checkpoint")])
def test_damaged_files_of_a_run_are_named(name, content, refused, settings, prose, tmp_path):
    run(settings(steps=5))
    if name == "ckpt.pt":
        (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / name).write_text(content)
    assert name in refused(script, *flags(**{**SMALL, "steps": 5}, data=prose, out=tmp_path / "run", resume=True))


def test_a_damaged_log_is_no_obstacle_to_resuming(settings, tmp_path):
    run(settings())
    (tmp_path / "run" / "result.json").unlink()
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(b'[1]\n{"stage": "train"}\n\xff\n{"stage": "train", "st')
    run(settings(resume=True))
    assert all("step" in json.loads(line) for line in open(tmp_path / "run" / "log.jsonl"))


def test_runs_with_other_settings_have_folders_of_their_own():
    names = {script.run_name(Settings(**{"data": "code", "warmup": "dyck", **changes})) for changes in (
        {}, {"warmup": "none"}, {"seed": 1}, {"transfer": "attn"}, {"steps": 9}, {"init": "a/warmup.pt"},
        {"data": "haystack:pairs=3"}, {"init": "x" * 300}, {"init": "x" * 299 + "y"}, {"preset": "c4"},
        {"data": "c4", "preset": "c4"}, {"data": "c4", "preset": "c4-350m"}, {"tokens": 10 ** 6})}
    assert len(names) == 13 and {"code-dyck-s0", "c4-dyck-s0", "c4-350m-dyck-s0"} < names and max(map(len, names)) < 200
    assert script.resolve(Settings(device="cpu", log_every=3, resume=True)).out == "out/code-dyck-s0"


def test_memory_that_is_not_there_is_one_line(refused, settings, prose, tmp_path):
    line = refused(script, *flags(**{**SMALL, "size": "1_1_100000000"}, data=prose, out=tmp_path / "run"))
    assert "memory" in line and not (tmp_path / "run").exists()


def test_stopped_before_the_first_step_of_a_stage_the_log_has_no_line_twice(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SIGNALS", [signal.SIGTERM])
    with pytest.raises(script.Stopped):
        run(settings())
    monkeypatch.setattr(script, "SIGNALS", [])
    run(settings(resume=True))
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert len({(e["stage"], e["step"]) for e in lines}) == len(lines) == 13


def test_a_truncated_checkpoint_is_named_on_resuming(refused, settings, prose, tmp_path):
    run(settings())
    (tmp_path / "run" / "result.json").unlink()
    whole = (tmp_path / "run" / "ckpt.pt").read_bytes()
    (tmp_path / "run" / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    assert "ckpt.pt" in refused(script, *flags(**SMALL, data=prose, out=tmp_path / "run", resume=True))


def test_rows_of_like_length_are_the_same_rows_without_what_follows_the_last_counted_token():
    x, y = make_source("haystack").batch(0, 1000)
    parts = script.rows_of_like_length(x, y)
    assert len(parts) == 8 and sum(part.size for part, _ in parts) < 0.7 * x.size
    upto = lambda x, y: [tuple(row[:np.flatnonzero(wanted != -1)[-1] + 1]) for row, wanted in zip(x, y)]
    assert sorted(row for part in parts for row in upto(*part)) == sorted(upto(x, y))
    model = GPT(GPTConfig(256, 63, 2, 2, 16))
    whole = model(torch.from_numpy(x), torch.from_numpy(y), reduction="sum")
    whole.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pieces = [model(*map(torch.from_numpy, part), reduction="sum") for part in parts]
    sum(pieces).backward()
    torch.testing.assert_close(sum(pieces), whole)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-3, atol=1e-3)


def test_few_long_rows_of_like_length():
    x, y = make_source("set:length=2-1200").batch(0, 3)
    parts = script.rows_of_like_length(x, y)
    assert [part.shape[0] for part, _ in parts] == [1, 1, 1] and sum(int((y != -1).sum()) for _, y in parts) == (y != -1).sum()


def test_rows_of_one_length_and_rows_in_which_nothing_counts_stay_together():
    x, y = make_source("identity:length=4").batch(0, 1000)
    (pair,) = script.rows_of_like_length(x, y)
    assert np.array_equal(pair[0], x[:, :-1]) and np.array_equal(pair[1], y[:, :-1]), "nothing reads the last token"
    assert [part.shape for part, _ in script.rows_of_like_length(x, np.full_like(y, -1))] == [x.shape]


def test_sources_are_reached_by_every_process_in_disjoint_shares(monkeypatch):
    source, stage = make_source("identity:length=4"), Stage("train", 9, 12, 1.0, "constant", 0, 0, 0, 0, 1, 1, None)
    whole = source.batch(7, 12)[0]
    for processes, accumulated in ((1, 1), (2, 1), (2, 3), (4, 3)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        rows = {}
        for r in range(processes):
            monkeypatch.setenv("RANK", str(r))
            for x, _, place in script.step_batches(source, 7, stage, Settings(grad_accum=accumulated, device="cpu")):
                rows[place] = x
        assert torch.equal(torch.cat([rows[place] for place in sorted(rows)]), torch.from_numpy(whole)[:, :-1])  # nothing reads the last token


def test_bench_measures_the_step_and_compares_with_the_transformers_library_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(script, "BENCH_STEPS", (1, 2))
    monkeypatch.setattr(script, "matrix_rate", lambda s: 1e10)
    for flags in (["--data", "haystack:pairs=4", "--batch_size", "64", "--seeds", "2"], ["--size", "1_2_16", "--block_size", "16", "--data", "math"]):
        monkeypatch.setattr("sys.argv", ["train.py", *flags, "--bench"])
        script.main()
        printed = capsys.readouterr().out
        assert re.search(r"nanowarm +\d+\.\d+ steps/s", printed) and "floor" in printed
        assert ("2 seeds" in printed and "times as long as one" in printed) == ("--seeds" in flags)
        far = re.search(r"losses of 3 steps differ by at most (\S+)\)", printed)
        assert "pip install" in printed if not far else float(far[1]) < 1e-4


def test_bench_is_for_one_process(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "without torchrun" in refused(script, "--data", "haystack", "--bench")


def test_bench_refuses_what_a_run_would_not_do(refused):
    assert "does not divide" in refused(script, "--data", "haystack", "--bench", "--batch_size", 4, "--grad_accum", 8)
    assert "one after another" in refused(script, "--data", "haystack", "--bench", "--seeds", 2, "--dropout", 0.1)


def small_task(tmp_path, name, **more):
    return Settings(**{**dict(data="haystack:pairs=4", warmup="set:length=2-4,vocab=10", warmup_steps=6, warmup_lr=1e-3, warmup_batch_size=8, steps=8,
                              batch_size=16, size="2_2_16", eval_batches=2, lr_ramp=2, lr=1e-3, out=str(tmp_path / name),
                              device="cpu", save_every=3), **more})


@pytest.mark.parametrize("more", [dict(), dict(data="addition:digits=2", grad_accum=2, transfer="attn"), dict(warmup="none", tied=True),
                                  dict(data="math", block_size=16, warmup="eca:width=4,length=16")])
def test_seeds_trained_together_do_what_each_does_alone(tmp_path, more):
    together = run(small_task(tmp_path, "all", **more), seeds=[0, 3], together=True)
    for result, seed in zip(together, (0, 3)):
        alone = run(small_task(tmp_path, f"alone{seed}", seed=seed, **more))
        assert result["settings"] == alone["settings"]
        for key in ("val_loss", "val_accuracy", "warmup_loss"):
            assert result[key] == (None if alone[key] is None else pytest.approx(alone[key], abs=1e-4))
        for file in ("warmup.pt", "ckpt.pt"):
            a, b = (tmp_path / name / file for name in (f"all-s{seed}", f"alone{seed}"))
            if a.exists() or b.exists():
                a, b = (torch.load(path, weights_only=True) for path in (a, b))
                assert a.keys() == b.keys() and a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
                assert all((p - b["model"][key]).abs().mean() < 1e-3 for key, p in a["model"].items())
        log = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
               for name in (f"all-s{seed}", f"alone{seed}")]
        assert [(e["stage"], e["step"]) for e in log[0]] == [(e["stage"], e["step"]) for e in log[1]]
    assert together[0]["val_loss"] != together[1]["val_loss"]


def test_seeds_stopped_together_go_on_together_or_alone(tmp_path, monkeypatch):
    whole = run(small_task(tmp_path, "whole"), seeds=[0, 1], together=True)
    steps = iter(range(100))
    counted = script.ensemble_losses

    def stop_at_the_tenth(*args):
        if next(steps) == 9:
            script.SIGNALS.append(signal.SIGTERM)
        return counted(*args)
    monkeypatch.setattr(script, "ensemble_losses", stop_at_the_tenth)
    with pytest.raises(script.Stopped):
        run(small_task(tmp_path, "stopped"), seeds=[0, 1], together=True)
    script.SIGNALS.clear()
    monkeypatch.setattr(script, "ensemble_losses", counted)
    first = run(small_task(tmp_path, "stopped-s0", resume=True))  # one of them alone
    assert first["val_loss"] == pytest.approx(whole[0]["val_loss"], abs=1e-4)
    (tmp_path / "stopped-s0" / "result.json").unlink()
    both = run(small_task(tmp_path, "stopped", resume=True), seeds=[0, 1], together=True)
    assert both[1]["val_loss"] == whole[1]["val_loss"], "the same bits"


@pytest.mark.parametrize("seeds", [[0, 1, 2], [2, 0, 1]])
def test_seeds_stopped_before_their_first_step_and_a_new_one(tmp_path, seeds):
    script.SIGNALS.append(signal.SIGTERM)
    with pytest.raises(script.Stopped):
        run(small_task(tmp_path, "a"), seeds=[0, 1], together=True)
    script.SIGNALS.clear()
    found = run(small_task(tmp_path, "a", resume=True), seeds=seeds, together=True)
    for seed, result in zip(seeds, found):
        assert result["val_loss"] == pytest.approx(run(small_task(tmp_path, f"alone{seed}", seed=seed))["val_loss"], abs=1e-4)
        lines = [json.loads(line) for line in (tmp_path / f"a-s{seed}" / "log.jsonl").read_text().splitlines()]
        assert [e["stage"] for e in lines if e["step"] == 0] == ["warmup", "train"]


def test_seeds_whose_models_differ_in_shape_do_not_go_together(tmp_path):
    for seed, size in enumerate(("1_2_8", "1_2_16", "1_2_16")):
        run(small_task(tmp_path, f"warm{seed}", steps=0, seed=seed, size=size))
    settings = small_task(tmp_path, "a", warmup=None, size=None, init=str(tmp_path / "warmSEED" / "warmup.pt"))
    found = run(settings, seeds=[0, 1, 2], together=True)
    assert [r["settings"]["size"] for r in found] == ["1_2_8", "1_2_16", "1_2_16"] and all(r["val_loss"] for r in found)


def test_on_a_gpu_small_models_alone_go_together():
    stage = script.Stage("train", 1, 32, 1e-3, "constant", 0, 0.0, 0.0, 0.0, 1, 1, None)
    model = lambda *shape: GPT(GPTConfig(*shape))
    for device, wanted in (("cuda", True), ("cpu", False)):
        assert script.can_go_together(Settings(device=device, recompute=False), stage, model(256, 63, 2, 4, 16)) == wanted
    assert not script.can_go_together(Settings(device="cuda", recompute=False), stage, model(50257, 1024, 1, 4, 16))


def test_several_seeds_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "haystack:pairs=4", "--warmup", "none", "--steps", "2", "--batch_size", "4", "--size",
                                     "1_1_4", "--eval_batches", "1", "--seeds", "2", "--seed", "5", "--out", str(tmp_path / "r")])
    script.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "r-s5" / "result.json").exists() and (tmp_path / "r-s6" / "result.json").exists()
    assert "    5 " in printed and "    6 " in printed and " mean " in printed


def test_seeds_that_make_no_sense_are_refused(refused):
    for seeds in ("0", "a", "1,1", "-1,2", ""):
        assert "--seeds" in refused(script, "--data", "haystack", f"--seeds={seeds}", "--warmup", "none")


def test_seeds_of_which_one_is_finished_or_a_stage_has_dropout(tmp_path, monkeypatch):
    together, calls = script.train_together, []
    monkeypatch.setattr(script, "train_together", lambda requests: calls.append((requests[0][1].name, len(requests))) or together(requests))
    first = run(small_task(tmp_path, "a-s1", seed=1))
    found = run(small_task(tmp_path, "a"), seeds=[0, 1, 2], together=True)
    assert found[1]["val_loss"] == first["val_loss"] and calls == [("warmup", 2), ("train", 2)]
    calls.clear()
    run(small_task(tmp_path, "b", warmup_dropout=0.1), seeds=[0, 1], together=True)
    assert calls == [("train", 2)]
    calls.clear()
    run(small_task(tmp_path, "c", dropout=0.1), seeds=[0, 1], together=True)
    assert calls == [("warmup", 2)]
