"""GPT-2 against two others, its loss and parts, and checkpoints from friends and enemies."""
import math
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest

import model as script  # which imports torch when data has set what its threads read
from data import UserError
from model import (GPT, GPTConfig, attention_maps, find_device, load, parse_parts, parse_size, save,
                   transfer)

import torch


def small(seed=0, vocab_size=50, block_size=24, n_layer=2, **more):
    """A model whose every weight matters: no ones, no zeros."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, 4, 32, **more))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def tokens(rows=3, length=20):
    return torch.randint(50, (rows, length))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# GPT-2

def test_weights_begin_as_gpt2s_do():
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 8, 4, 128, tied=False))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_dropout_is_where_gpt2_has_it():
    model, idx, seen = small(dropout=0.25), torch.zeros(3000, 1, dtype=torch.long), {}
    block = model.h[0]
    model.drop.register_forward_hook(lambda _, x, y: seen.update(whole=x[0]))
    block.register_forward_pre_hook(lambda _, x: seen.update(embeddings=x[0]))
    block.attn.c_attn.register_forward_hook(lambda _, x, qkv: seen.update(values=qkv[..., 64:]))
    block.attn.c_proj.register_forward_pre_hook(lambda _, x: seen.update(attention=x[0]))
    block.attn.register_forward_hook(lambda _, x, y: seen.update(attn=y))
    block.ln_2.register_forward_pre_hook(lambda _, x: seen.update(middle=x[0]))
    block.mlp.register_forward_hook(lambda _, x, y: seen.update(mlp=y))
    block.register_forward_hook(lambda _, x, y: seen.update(end=y))
    model(idx)
    seen |= {"added": seen["middle"] - seen["embeddings"], "last": seen["end"] - seen["middle"]}
    # A token that sees itself alone attends with 1, or is dropped.
    for name, full in (("embeddings", "whole"), ("attention", "values"), ("added", "attn"),
                       ("last", "mlp")):
        kept = seen[name].abs() > 1e-4 * seen[full].abs().mean()
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02), name
        torch.testing.assert_close(seen[name][kept], seen[full][kept] / 0.75, atol=1e-3, rtol=1e-3)
    assert torch.equal(model.eval()(idx), model(idx))


@pytest.mark.parametrize("first", [0, 9, 20])  # 20: nothing counts, and the loss is zero
@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_and_its_gradient_are_plain_cross_entropy_over_all_logits(first, recompute):
    model, idx, targets = small(), tokens(5), torch.full((5, 20), -1)
    model.recompute = recompute
    for row, begin in enumerate((first + 3, first, 19, first, 20)):  # the last row has none
        targets[row, begin:] = torch.randint(-1, 50, (20,))[begin:]
    plain = sum(-model(idx)[row, t].log_softmax(-1)[targets[row, t]]
                for row, t in (targets != -1).nonzero().tolist()) + 0 * model(idx).sum()
    loss = model(idx, targets)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())),
                            torch.autograd.grad(plain, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_attention_maps_are_what_attention_really_uses_and_no_token_sees_a_later_one():
    model, idx, seen = small(), tokens(), []
    for block in model.h:
        block.attn.register_forward_hook(lambda attn, x, y: seen.append((attn, x[0], y)))
    with attention_maps(model) as maps:
        model(idx)
    model(idx)
    assert len(maps) == 2, "once outside, nothing is added"
    for weights, (attn, x, y) in zip(maps, seen):
        assert (weights.triu(1) == 0).all(), "no token sees a later one"
        values = attn.c_attn(x)[..., 64:].chunk(4, -1)
        heads = [weights[:, head] @ value for head, value in enumerate(values)]
        torch.testing.assert_close(attn.c_proj(torch.cat(heads, -1)), y, atol=1e-4, rtol=1e-4)


def test_generation_takes_the_likeliest_token_or_each_as_often_as_the_temperature_says():
    model, idx = small(tied=False), tokens(2, 5)
    model.ln_f.bias.data.zero_()  # no token is always the likeliest
    out = model.generate(idx, 40, temperature=0)
    assert torch.equal(out[:, :5], idx) and len(out[:, 24:].unique()) > 1
    for t in range(5, 45):  # also beyond the context
        assert torch.equal(out[:, t], model(out[:, max(0, t - 24):t])[:, -1].argmax(-1))
    out = model.generate(idx[:1].expand(20_000, 5), 1, temperature=0.2)[:, 5]
    came = torch.bincount(out, minlength=50) / len(out)
    wanted = (model(idx[:1])[0, -1] / 0.2).softmax(-1)
    torch.testing.assert_close(came, wanted, atol=0.02, rtol=0)


# Parts, sizes and devices

@pytest.mark.parametrize("parts,embeddings,positions,context,moves", [
    ([], "random", "random", 40, False), (["attn"], "random", "fit", 24, True),
    (["mlp"], "mean", "fit", 40, True), (["attn", "norm"], "mean", "fit", 16, False),
    (["attn", "mlp", "norm"], "keep", "moved", 40, True)])
@pytest.mark.parametrize("tied", [True, False])
def test_transfer_moves_what_it_is_told_to(parts, embeddings, positions, context, moves, tied):
    source = small(1, vocab_size=64, block_size=context, tied=tied)
    target, before = small(2, tied=tied), dict(small(2, tied=tied).named_parameters())
    assert transfer(source, target, parts, embeddings, positions) == moves
    for name, p in target.named_parameters():
        theirs, own = source.get_parameter(name), before[name]
        if name == "wpe.weight":
            expected = theirs[:24] if moves else own
        elif name in ("wte.weight", "lm_head.weight"):
            mean = theirs.mean(0).expand(50, 32)
            expected = {"random": own, "mean": mean, "keep": theirs[:50]}[embeddings]
        else:
            part = "norm" if "ln_" in name else name.split(".")[2]  # h.0.attn.c_attn.weight
            expected = theirs if part in parts else own
        assert torch.equal(p, expected), name


def test_sizes_and_parts_have_names_or_are_written_out():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(50257, 1024, *parse_size("gpt2")))
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert parse_size("2_4_16") == (2, 4, 16) and parse_parts("attn, norm") == ["attn", "norm"]
    assert parse_parts("full") == parse_parts("all") == ["attn", "mlp", "norm"]
    for parse, text in ((parse_size, "huge"), (parse_size, "0_4_16"), (parse_parts, "heads")):
        with pytest.raises(UserError, match="unknown"):
            parse(text)


def test_the_device_is_the_best_or_the_named_one_or_refused(monkeypatch):
    for gpus, mps, best in ((0, False, "cpu"), (0, True, "mps"), (2, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert find_device() == best and find_device("cpu") == "cpu"
    assert find_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="cuda:2"):
        find_device("cuda:2")


# Checkpoints: ours, nanoGPT's, Hugging Face's

@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_brings_all_back_and_stays_whole_where_none_can_be_saved(tied, tmp_path):
    path, model = tmp_path / "ckpt.pt", small(tied=tied, dropout=0.25)
    save(path, model, source={"spec": "dyck"})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # as a full disk
    with pytest.raises(UserError, match="ckpt.pt: .* unharmed"):
        save(path, model)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]
    for place in (path, str(tmp_path)):
        again, state = load(place)
        assert same(model, again) and again.config == model.config
        assert (again.lm_head.weight is again.wte.weight) == tied
        assert state["source"] == {"spec": "dyck"}


@pytest.mark.parametrize("prefix,bias,dtype", [
    ("", True, torch.float32), ("module.", False, torch.float32),
    ("_orig_mod.module.", True, torch.bfloat16)])
def test_nanogpts_checkpoints_are_read(prefix, bias, dtype, tmp_path):
    model, weights = small(), {}
    for name, p in model.named_parameters():
        p.data = p.data.to(dtype).float() if bias or "weight" in name else torch.zeros_like(p)
        if bias or "weight" in name:
            weights[f"{prefix}transformer.{name}"] = p.data.to(dtype)
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.wte.weight"]
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=50, bias=bias)
    torch.save({"model": weights, "model_args": args, "iter_num": 5}, tmp_path / "ckpt.pt")
    again, _ = load(tmp_path / "ckpt.pt")
    assert same(model, again) and again.lm_head.weight is again.wte.weight


class Trap(tuple):
    """A function and its arguments: where Python unpickles this, it calls the function."""
    def __reduce__(self):
        return self[0], self[1:]


@pytest.mark.parametrize("place,changes,reason", [
    ("config", dict(n_layer=10 ** 9), "layers"), ("config", dict(n_embd="wide"), "ValueError"),
    ("config", dict(vocab_size=10 ** 12), "wte.weight"),
    ("config", {"more": Trap([bytearray, 10 ** 9])}, "nothing in it was run"),
    ("model", {"wte.weight": None}, "NoneType"), ("model", {"strange": torch.zeros(3)}, "strange"),
    ("model", {"wpe.weight": torch.zeros(24, 32, device="meta")}, "plain tensor"),
    ("model", {"h.0.ln_1.weight": torch.zeros(10 ** 9, 0)}, "no plain tensor"),
    ("model", {"wte.weight": torch.zeros(1).half().expand(10 ** 9)}, "no plain tensor")])
def test_a_damaged_checkpoint_is_refused_and_takes_no_memory(place, changes, reason, tmp_path):
    path, model = tmp_path / "a.pt", small()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = {"config": vars(model.config), "model": model.state_dict()}
    torch.save(state | {place: state[place] | changes}, path)
    is_refused(path, reason)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "in kilobytes"


def is_refused(path, reason):
    """One line, which says which file it is and why."""
    with pytest.raises(UserError, match=f"(?s).*{path}.*{reason}") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


def test_numbers_of_a_config_are_of_their_kinds(tmp_path):
    model = small()
    config = vars(model.config) | dict(n_head=4.0, block_size=True + 23)
    torch.save({"config": config, "model": model.state_dict()}, tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt")[0](tokens() * 0), model(tokens() * 0))


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "hf").mkdir()
    os.mkfifo(tmp_path / "hf/model.safetensors")  # which would make us wait for ever
    (tmp_path / "half").write_bytes(b"PK, and no more")
    save(tmp_path / "packed", small())
    with zipfile.ZipFile(tmp_path / "packed", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pkl", bytes(10 ** 7))  # thousands of times what it is as a file
    for name, reason in (("hf", "neither"), ("half", "no file"), ("packed", "no file")):
        is_refused(tmp_path / name, reason)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_function_in_a_checkpoint_is_ever_called(legacy, tmp_path):
    path, sprung, model = tmp_path / "a.pt", tmp_path / "sprung", small()
    touch = Trap([eval, f"open({str(sprung)!r}, 'w')"])
    inner = Trap([torch.storage._load_from_bytes, pickle.dumps(touch)])
    for trap in (touch, Trap([os.system, f"touch {sprung}"]), Trap([Path.touch, sprung]), inner):
        state = {"config": vars(model.config), "model": model.state_dict() | {"wte.weight": trap}}
        for written in (trap, {"config": trap, "model": trap}, state):
            torch.save(written, path, _use_new_zipfile_serialization=not legacy)
            is_refused(path, "nothing in it was run")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(touch))
    assert sprung.exists(), "this is no trap"


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_transformers_loads_and_load_brings_back(tied, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model, idx = small(tied=tied, dropout=0.25).eval(), tokens()
    save(tmp_path / "a.pt", model, step=3)
    paths = str(tmp_path / "a.pt"), str(tmp_path / "hf")
    monkeypatch.setattr("sys.argv", ["model.py", "export", *paths])
    script.main()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=1e-4)
    again, _ = load(tmp_path / "hf")
    assert same(model, again) and again.config == model.config
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "hf"]
    config = tmp_path / "hf/config.json"
    config.write_text(config.read_text().replace('"gelu_new"', '"relu"'))
    is_refused(tmp_path / "hf", "activation_function")


def test_an_export_overwrites_nothing_and_leaves_nothing_behind(tmp_path, refused, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path, limits = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save(path, small())
    assert "choose another" in refused(script, "export", path, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # as a full disk
    assert "model.safetensors: File too large" in refused(script, "export", path, tmp_path / "new")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.delattr(safetensors, "save")
    assert "safetensors, which comes with" in refused(script, "export", path, tmp_path / "b")
    assert os.listdir(tmp_path) == ["a.pt"]
