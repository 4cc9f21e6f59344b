"""GPT-2 against two others, its loss and parts, and checkpoints from friends and enemies."""
import json
import math
import os
import pickle
from pathlib import Path

import pytest

import model as script  # which imports torch when data has set what its threads read
from data import UserError
from model import (GPT, GPTConfig, as_hugging_face, attention_maps, find_device, load, parse_parts,
                   parse_size, part_of, save, transfer)

import torch
import torch.nn.functional as F


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


def plain_gpt2(w, idx, n_layer, n_head):
    """GPT-2 from its equations, a head at a time. w: weights by name -> logits"""
    T = idx.shape[1]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for name in [f"h.{layer}" for layer in range(n_layer)]:
        heads = []
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1)
        for q, k, v in zip(*(each.chunk(n_head, -1) for each in qkv)):
            scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).exp().tril()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.c_proj")
        u = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        u = u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(u, f"{name}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_gpt2_written_out(tied):
    model, idx = small(tied=tied), tokens()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    named = {"lm_head.weight": weights["wte.weight"]} | weights
    expected, logits = plain_gpt2(named, idx, 2, 4), model(idx)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
    wanted = torch.randn_like(expected)
    gradients = torch.autograd.grad((logits * wanted.float()).sum(), list(model.parameters()))
    plain = torch.autograd.grad((expected * wanted).sum(), list(weights.values()))
    for ours, theirs in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-2, rtol=1e-3)


def test_weights_begin_as_gpt2s_do():
    torch.manual_seed(0)
    model = GPT(GPTConfig(500, 64, 8, 4, 128, tied=False))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name or name.startswith("ln_"):
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < std / 10, name


def test_gpt2_has_124_439_808_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, *parse_size("gpt2")))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_dropout_is_where_gpt2_has_it():
    model, idx, seen = small(dropout=0.25), torch.zeros(3000, 1, dtype=torch.long), {}
    block = model.h[0]
    block.register_forward_pre_hook(lambda _, x: seen.update(embeddings=x[0]))
    block.attn.c_attn.register_forward_hook(lambda _, x, qkv: seen.update(values=qkv[..., 64:]))
    block.attn.c_proj.register_forward_pre_hook(lambda _, x: seen.update(attention=x[0]))
    block.attn.register_forward_hook(lambda _, x, y: seen.update(attn=y))
    block.mlp.register_forward_hook(lambda _, x, y: seen.update(mlp=y))
    model(idx)
    for name in ("embeddings", "attention", "attn", "mlp"):
        assert (seen[name] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02), name
    whole = model.wte.weight[0] + model.wpe.weight[0]
    for name, full in (("embeddings", whole.expand(3000, 1, 32)), ("attention", seen["values"])):
        kept = seen[name] != 0  # a token that sees itself alone attends with 1, or is dropped
        torch.testing.assert_close(seen[name][kept], full[kept] / 0.75)
    model.eval()(idx)
    assert all((each != 0).all() for each in seen.values())


def some_targets(first):
    """Targets that begin at `first` or later, in each row elsewhere; the last row has none."""
    targets = tokens(5)
    targets[torch.rand(5, 20) < 0.3] = -1
    for row, start in enumerate((first + 3, first, 19, first, 20)):
        targets[row, :start] = -1
    return targets


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first", [0, 9, 16, 20])  # 20: nothing counts, and the loss is zero
def test_the_loss_and_its_gradient_are_plain_cross_entropy_over_all_logits(first, recompute):
    model, idx, targets = small(), tokens(5), some_targets(first)
    everything, counts = model.states(idx), targets != -1
    plain = F.cross_entropy(model.lm_head(everything[counts]), targets[counts], reduction="sum")
    model.recompute = recompute
    states, wanted = model.counted_states(idx, targets)
    torch.testing.assert_close(states, everything[counts])
    assert torch.equal(wanted, targets[counts])
    loss = model(idx, targets)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())),
                            torch.autograd.grad(plain, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_recomputing_changes_no_gradient_even_with_dropout():
    model, idx, targets, gradients = small(dropout=0.2), tokens(5), some_targets(4), []
    for model.recompute in (False, True):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(model(idx, targets), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_attention_maps_are_what_attention_really_uses():
    model, idx, seen = small(), tokens(), []
    for block in model.h:
        block.attn.register_forward_hook(lambda attn, x, y: seen.append((attn, x[0], y)))
    with attention_maps(model) as maps:
        model(idx)
    model(idx)
    assert len(maps) == 2, "once outside, nothing is added"
    for weights, (attn, x, y) in zip(maps, seen):
        assert weights.shape == (3, 4, 20, 20) and (weights.triu(1) == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 20))
        values = attn.c_attn(x)[..., 64:].chunk(4, -1)
        heads = [weights[:, head] @ value for head, value in enumerate(values)]
        torch.testing.assert_close(attn.c_proj(torch.cat(heads, -1)), y, atol=1e-4, rtol=1e-4)


# Generation


def test_temperature_0_takes_the_likeliest_token_also_beyond_the_context():
    model, idx = small(tied=False), tokens(2, 5)
    model.ln_f.bias.data.zero_()  # no token is always the likeliest
    out = model.generate(idx, 40, temperature=0)
    assert out.shape == (2, 45) and torch.equal(out[:, :5], idx)
    assert len(out[:, 24:].unique()) > 1, "a model that says one thing shows nothing"
    for t in range(5, 45):
        seen = out[:, max(0, t - 24):t]
        assert torch.equal(out[:, t], model(seen)[:, -1].argmax(-1))
    assert torch.equal(model.generate(idx, 40, temperature=1e-45), out), "no division by it"


@pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (0.5, 0), (2.0, 5), (1.0, 1), (1.0, 999)])
def test_tokens_come_as_often_as_temperature_and_top_k_say(temperature, top_k):
    model = small()
    logits = model(torch.tensor([[3, 4]]))[0, -1] / temperature
    weights = logits.sub(logits.max()).exp()
    if top_k:
        weights[weights.argsort(descending=True)[top_k:]] = 0
    out = model.generate(torch.tensor([[3, 4]] * 20_000), 1, temperature, top_k,
                         torch.Generator().manual_seed(1))
    came = torch.bincount(out[:, 2], minlength=50) / 20_000
    torch.testing.assert_close(came, weights / weights.sum(), atol=0.02, rtol=0)
    assert (came[weights == 0] == 0).all()


# Parts, sizes and devices


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_part(tied):
    found = {"attn": 0, "mlp": 0, "norm": 0, "embed": 0}
    for name, p in small(tied=tied).named_parameters():
        found[part_of(name)] += p.numel()
    d = 32
    assert found == {"attn": 2 * (4 * d * d + 4 * d), "mlp": 2 * (8 * d * d + 5 * d),
                     "norm": 5 * 2 * d, "embed": (50 + 24 + (0 if tied else 50)) * d}


@pytest.mark.parametrize("parts", [[], ["attn"], ["mlp"], ["attn", "norm"]])
def test_transfer_moves_exactly_the_named_parts(parts):
    source, target, before = small(1, vocab_size=30), small(2), small(2)
    transfer(source, target, parts, positions="random")
    theirs, old = dict(source.named_parameters()), dict(before.named_parameters())
    for name, p in target.named_parameters():
        assert torch.equal(p, theirs[name] if part_of(name) in parts else old[name]), name


@pytest.mark.parametrize("positions,context,moves", [
    ("fit", 24, True), ("fit", 40, True), ("fit", 16, False), ("moved", 40, True),
    ("random", 40, False)])
def test_positions_move_where_they_are_asked_to_and_fit(positions, context, moves):
    source, target, before = small(1, block_size=context), small(2), small(2)
    transfer(source, target, [], positions=positions)
    expected = source.wpe.weight[:24] if moves else before.wpe.weight
    assert torch.equal(target.wpe.weight, expected)
    assert torch.equal(target.wte.weight, before.wte.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_begin_as_they_were_or_at_the_mean_or_are_kept(tied):
    source, before = small(1, vocab_size=64, tied=tied), small(2, tied=tied)
    for layer in ("wte", "lm_head"):
        theirs, own = getattr(source, layer).weight, getattr(before, layer).weight
        for how, rows in (("random", own), ("keep", theirs[:50]),
                          ("mean", theirs.mean(0).expand(50, 32))):
            target = small(2, tied=tied)
            transfer(source, target, ["attn"], embeddings=how)
            torch.testing.assert_close(getattr(target, layer).weight, rows)


@pytest.mark.parametrize("source,how,reason", [
    (dict(n_layer=3), {}, "3_4_32.*2_4_32"), (dict(block_size=16), {"positions": "moved"}, "16"),
    (dict(vocab_size=49), {"embeddings": "keep"}, "49"),
    (dict(vocab_size=500), {"embeddings": "keep"}, "500")])
def test_what_does_not_fit_is_not_moved(source, how, reason):
    with pytest.raises(UserError, match=reason):
        transfer(small(1, **source), small(2), ["attn"], **how)


def test_sizes_and_parts_have_names_or_are_written_out():
    assert parse_size("gpt2") == (12, 12, 768) and parse_size("2_4_16") == (2, 4, 16)
    assert parse_parts("full") == parse_parts("all") == ["attn", "mlp", "norm"]
    assert parse_parts("attn, norm") == ["attn", "norm"]
    for parse, texts in ((parse_size, ("huge", "2_4", "0_4_16", "")), (parse_parts, ("heads", ""))):
        for text in texts:
            with pytest.raises(UserError, match="unknown"):
                parse(text)


@pytest.mark.parametrize("asked,cuda,mps,found", [
    (None, 0, False, "cpu"), (None, 0, True, "mps"), (None, 2, True, "cuda"),
    ("cpu", 2, False, "cpu"), ("cuda:1", 2, False, "cuda:1"), ("mps", 0, True, "mps"),
    ("cuda", 0, False, None), ("cuda:2", 2, False, None), ("abacus", 1, True, None)])
def test_the_device_is_the_best_or_the_named_one_or_refused(asked, cuda, mps, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if found:
        assert find_device(asked) == found
        return
    with pytest.raises(UserError, match=asked):
        find_device(asked)


@pytest.mark.parametrize("n_head", [0, 3])
def test_a_width_is_a_multiple_of_the_heads(n_head):
    with pytest.raises(UserError, match="heads"):
        GPTConfig(50, 24, 2, n_head, 32)


# Checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_brings_back_the_model_and_what_else_was_saved(tied, tmp_path):
    model = small(tied=tied, dropout=0.25)
    save(tmp_path / "ckpt.pt", model, step=3, source={"spec": "dyck"})
    for path in (tmp_path / "ckpt.pt", str(tmp_path / "ckpt.pt"), tmp_path):
        again, state = load(path)
        assert same(model, again) and again.config == model.config
        assert (again.lm_head.weight is again.wte.weight) == tied
        assert (state["step"], state["source"]) == (3, {"spec": "dyck"})
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = small()
    model.h[1].mlp.c_fc.bias.data[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        save(tmp_path / "a.pt", model)
    assert not os.listdir(tmp_path)


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
    torch.save({"model": weights, "model_args": args, "iter_num": 5,
                "config": {"dataset": "openwebtext"}}, tmp_path / "ckpt.pt")
    again, _ = load(tmp_path / "ckpt.pt")
    assert same(model, again) and again.lm_head.weight is again.wte.weight
    assert again(tokens()).dtype == torch.float32


def whole(folder):
    path = folder / "a.pt"
    save(path, small(), step=1)
    return path, torch.load(path, weights_only=True)


def is_refused(path, reason):
    """One line, which says which file it is and why."""
    with pytest.raises(UserError, match=f"(?s).*{path}.*{reason}") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value,reason", [
    (small().state_dict(), "no model's config"), ([1, 2], "no model's config"),
    ({"model": {}, "config": {}}, "wte.weight"),
    ({"model": {}, "config": {}, "path": Path("x")}, "nothing in it was run")])
def test_other_things_are_refused_for_what_they_are(value, reason, tmp_path):
    torch.save(value, tmp_path / "a.pt")
    is_refused(tmp_path / "a.pt", reason)


@pytest.mark.parametrize("change,named", [
    *[(lambda state, key=key, value=value: state["config"].update({key: value}), named)
      for key, value, named in (
          ("n_layer", 10 ** 9, "layers"), ("n_layer", 1, "h.1"), ("n_embd", "wide", "TypeError"),
          ("vocab_size", 10 ** 12, "wte.weight"), ("dropout", 2.0, "dropout"))],
    (lambda state: state["model"].update({"h.0.ln_1.bias": None}), "NoneType"),
    (lambda state: state["model"].pop("h.1.mlp.c_fc.weight"), "h.1.mlp.c_fc.weight"),
    (lambda state: state["model"].update({"h.9.strange": torch.zeros(3)}), "h.9.strange")])
def test_weights_that_are_not_those_of_the_config_are_named(change, named, tmp_path):
    path, state = whole(tmp_path)
    change(state)
    torch.save(state, path)
    is_refused(path, named)


def test_what_cannot_be_read_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("no checkpoint")
    for path, reason in ((tmp_path / "missing.pt", "No such file"), (tmp_path, "neither"),
                         (tmp_path / "fifo", "not a file"), (tmp_path / "text", "no file of")):
        is_refused(path, reason)
    path, _ = whole(tmp_path)
    for share in (0.99, 0.5, 0.001, 0):
        os.truncate(path, int(share * path.stat().st_size))
        is_refused(path, "")


class Trap:
    """Calls a function when it is unpickled as Python does it."""
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_no_function_in_a_checkpoint_is_ever_called(legacy, tmp_path):
    (path, state), sprung = whole(tmp_path), tmp_path / "sprung"
    touch = Trap(eval, f"open({str(sprung)!r}, 'w')")
    inner = Trap(torch.storage._load_from_bytes, pickle.dumps(touch))
    for trap in (touch, Trap(os.system, f"touch {sprung}"), Trap(Path.touch, sprung), inner):
        state["model"]["h.0.ln_1.weight"] = trap
        for written in (trap, {"config": trap, "model": trap}, {**state, "more": [{"deep": trap}]}):
            torch.save(written, path, _use_new_zipfile_serialization=not legacy)
            is_refused(path, "nothing in it was run")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(touch))
    assert sprung.exists(), "this is no trap"


# Hugging Face's folders


@pytest.fixture
def folder(tmp_path):
    """What transformers writes."""
    pytest.importorskip("transformers", reason="reads transformers' folders, which is not here")
    as_hugging_face(small()).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_transformers_loads_and_load_brings_back(tied, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="exports to transformers")
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


def test_an_export_overwrites_nothing_and_leaves_nothing_behind(tmp_path, refused, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="exports to transformers")
    path, _ = whole(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("precious")
    for taken in (tmp_path / "hf", tmp_path / "hf" / "thesis.txt", os.devnull):
        assert "choose another" in refused(script, "export", path, taken)
    assert (tmp_path / "hf" / "thesis.txt").read_text() == "precious"

    def full(model, folder):
        Path(folder).mkdir()
        Path(folder, "model.safetensors").write_text("half of it")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", full)
    assert "No space left" in refused(script, "export", path, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "hf"]


def test_folders_with_sharded_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    as_hugging_face(small()).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert same(load(folder)[0], small())


def config_says(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


@pytest.mark.parametrize("damage,reason", [
    (config_says(activation_function="relu"), "activation_function"),
    (config_says(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    (config_says(scale_attn_by_inverse_layer_idx=True), "inverse_layer"),
    (config_says(n_layer=3), "3 layers"), (config_says(vocab_size=51), "wte.weight"),
    (lambda folder: (folder / "config.json").write_text("{damaged"), "config.json"),
    (lambda folder: os.truncate(folder / "model.safetensors", 5000), ""),
    (lambda folder: (folder / "model.safetensors").unlink(), "neither")])
def test_folders_that_hold_no_whole_gpt2_are_refused(damage, reason, folder):
    damage(folder)
    is_refused(folder, reason)
