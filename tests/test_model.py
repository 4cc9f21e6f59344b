"""The GPT against an independent one, its loss against a plain reference, parts, transfer, generation, checkpoints."""
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import eval as eval_script
import model as script
from data import UserError
from model import GPT, GPTConfig, PARTS, SIZES, load, parse_parts, parse_size, part_of, save, transfer


def small(vocab_size=50, block_size=24, seed=0, **kwargs):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size, block_size, 2, 4, 32, **kwargs))


def plain_gpt2(weights, idx, n_layer, n_head):
    """GPT-2 written out: one head and one matrix at a time, from its paper's equations. Returns logits."""
    w = {name: p.double() for name, p in weights.items()}
    B, T = idx.shape

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for layer in range(n_layer):
        name = f"h.{layer}"
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(n_head, -1), k.chunk(n_head, -1), v.chunk(n_head, -1)):
            scores = q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v_h)
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.c_proj")
        u = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(u, f"{name}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_gpt2(tied):
    model = small(tied=tied)
    for p in model.parameters():  # away from ones and zeros, so that every weight matters
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(50, (3, 20))
    expected = plain_gpt2(model.state_dict(), idx, 2, 4)
    assert torch.allclose(model(idx).double(), expected, atol=1e-4)


def test_a_later_token_changes_no_earlier_logit():
    model, idx = small(), torch.randint(50, (1, 20))
    other = idx.clone()
    other[0, 10] = (idx[0, 10] + 1) % 50
    one, two = model(idx)[0], model(other)[0]
    assert torch.equal(one[:10], two[:10]) and not torch.allclose(one[10], two[10])


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(500, 64, 8, 4, 128))
    assert model.lm_head.weight is model.wte.weight
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif part_of(name) == "norm":
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std() / expected - 1) < 0.05, name


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(GPTConfig(50257, 1024, *SIZES["gpt2"])).parameters())
    assert count == 124_439_808


def test_the_loss_is_plain_cross_entropy_over_counted_positions_and_so_is_its_gradient():
    model, idx = small(), torch.randint(50, (4, 20))
    targets = torch.where(torch.rand(4, 20) < 0.3, torch.randint(50, (4, 20)), -1)
    loss = model(idx, targets)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    plain.backward()
    assert torch.allclose(loss, plain, atol=1e-6)
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(got, model.parameters()))


def test_the_output_head_is_run_on_counted_positions_alone():
    model, seen = small(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    targets = torch.full((6, 20), -1)
    targets[:, 7] = 3
    model(torch.randint(50, (6, 20)), targets)
    assert seen == [(6, 50)]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_belongs_to_exactly_one_part(tied):
    names = [name for name, _ in small(tied=tied).named_parameters()]
    parts = {part: {n for n in names if part_of(n) == part} for part in PARTS}
    assert sum(map(len, parts.values())) == len(names)
    assert parts["embed"] == {"wte.weight", "wpe.weight"} | ({"lm_head.weight"} - {"lm_head.weight"} if tied else {"lm_head.weight"})
    assert all(".attn." in n for n in parts["attn"]) and all(".mlp." in n for n in parts["mlp"])
    assert {n.split(".")[-2] for n in parts["norm"]} == {"ln_1", "ln_2", "ln_f"}


def scrambled(seed, **kwargs):
    model = small(seed=seed, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("parts", [("attn",), ("mlp",), ("norm",), ("attn", "norm"), ("attn", "mlp", "norm"), ()])
@pytest.mark.parametrize("context", [16, 24, 40])
def test_transfer_moves_exactly_the_named_parts_and_positions_that_fit(parts, context):
    source, target = scrambled(1, vocab_size=30, block_size=context), scrambled(2)
    before = {name: p.clone() for name, p in target.named_parameters()}
    theirs = dict(source.named_parameters())
    transfer(target, source, parts)
    for name, p in target.named_parameters():
        if name == "wpe.weight":
            assert torch.equal(p, theirs[name][:24] if context >= 24 else before[name])
        else:
            assert torch.equal(p, theirs[name] if part_of(name) in parts else before[name]), name


def test_mean_embeddings_start_every_row_at_the_mean_of_the_sources():
    source, target = scrambled(1, vocab_size=30), scrambled(2, tied=False)
    transfer(target, source, ("attn",), "mean")
    mean = source.wte.weight.mean(0)
    assert (target.wte.weight == mean).all() and (target.lm_head.weight == mean).all()


def test_input_rows_the_heads_rows_and_positions_begin_each_as_told():
    source, target = scrambled(1, vocab_size=30), scrambled(2, tied=False)
    before, mean = {name: p.clone() for name, p in target.named_parameters()}, source.wte.weight.mean(0)
    transfer(target, source, (), "mean", "random", "random")
    assert (target.wte.weight == mean).all()
    assert torch.equal(target.lm_head.weight, before["lm_head.weight"]) and torch.equal(target.wpe.weight, before["wpe.weight"])
    target = scrambled(2, tied=False)
    transfer(target, source, (), "random", "mean", "moved")
    assert torch.equal(target.wte.weight, before["wte.weight"]) and (target.lm_head.weight == mean).all()
    assert torch.equal(target.wpe.weight, source.wpe.weight)
    with pytest.raises(UserError, match="cannot move"):
        transfer(target, scrambled(1, block_size=16), (), positions="moved")


def test_kept_embeddings_need_the_same_vocabulary():
    source, target = scrambled(1), scrambled(2)
    transfer(target, source, ("attn", "mlp", "norm"), "keep")
    idx = torch.randint(50, (2, 24))
    assert torch.equal(source(idx), target(idx))
    with pytest.raises(UserError, match="vocabulary"):
        transfer(scrambled(2, vocab_size=9), source, (), "keep")


def test_weights_of_another_shape_are_refused():
    torch.manual_seed(0)
    with pytest.raises(UserError, match="do not fit"):
        transfer(small(), GPT(GPTConfig(50, 24, 3, 4, 32)), ("attn",))


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, idx = small(), torch.randint(50, (2, 5))
    out = model.generate(idx, 30, temperature=0)
    assert out.shape == (2, 35) and torch.equal(out[:, :5], idx)
    for t in range(5, 35):
        assert torch.equal(out[:, t], model(out[:, max(0, t - 24):t])[:, -1].argmax(-1))


def test_sampling_follows_its_generator_and_top_k():
    model, idx = small(), torch.randint(50, (1, 5))
    one, two, three = (model.generate(idx, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(model.generate(idx, 20, top_k=1), model.generate(idx, 20, temperature=0))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_with_its_cache_is_generation_without_it(temperature):
    model, idx = scrambled(3), torch.randint(50, (3, 4))
    for n in (1, 19, 20, 21, 30):  # up to the context of 24, and beyond it
        cached, plain = (model.generate(idx, n, temperature, generator=torch.Generator().manual_seed(n), cached=cached)
                         for cached in (True, False))
        assert torch.equal(cached, plain)


def test_with_its_cache_generation_reads_each_token_once(monkeypatch):
    model, read, trunk = small(), [], GPT.trunk
    monkeypatch.setattr(GPT, "trunk", lambda self, idx, caches=None: read.append(idx.shape[1]) or trunk(self, idx, caches))
    model.generate(torch.randint(50, (2, 7)), 6, 0)
    assert read == [7, 1, 1, 1, 1, 1]


def test_generation_stops_when_every_row_has_made_the_stop_token():
    model, idx = scrambled(3), torch.randint(50, (2, 4))
    whole = model.generate(idx, 20, 0)[:, 4:]
    first, second = whole[0], whole[1]
    stop = next((t for t in first.tolist() if t in second.tolist()), None)
    if stop is None:  # then it never stops early
        assert torch.equal(model.generate(idx, 20, 0, stop=int(first[0])), torch.cat([idx, whole], 1))
    else:
        last = max(row.tolist().index(stop) for row in whole)
        assert torch.equal(model.generate(idx, 20, 0, stop=stop), torch.cat([idx, whole[:, :last + 1]], 1))
    assert model.generate(idx[:1], 20, 0, stop=int(first[0])).shape[1] == 5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_chunks_is_the_loss_and_so_is_its_gradient(reduction, tied, monkeypatch):
    model, idx = scrambled(1, tied=tied), torch.randint(50, (4, 24))
    targets = torch.where(torch.rand(4, 24) < 0.6, torch.randint(50, (4, 24)), -1)
    results = []
    for most in (2 ** 27, 500):  # 500: ten positions at a time
        monkeypatch.setattr(script, "MOST_LOGITS", most)
        model.zero_grad()
        loss = model(idx, targets, reduction)
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, float(a.abs().max()))) for a, b in zip(*results))


def test_in_bfloat16_a_loss_in_chunks_is_as_accurate_as_the_plain_one(monkeypatch):
    model, idx, targets, found = scrambled(1), torch.randint(50, (16, 24)), torch.randint(50, (16, 24)), {}
    for name, most, low in (("exact", 2 ** 27, False), ("plain", 2 ** 27, True), ("chunks", 2000, True)):
        monkeypatch.setattr(script, "MOST_LOGITS", most)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(idx, targets, "sum")
        loss.backward()
        found[name] = loss.detach(), model.lm_head.weight.grad.clone(), model.wpe.weight.grad.clone()
    assert found["chunks"][0].dtype == torch.float32
    for exact, plain, chunks in zip(*(found[name] for name in ("exact", "plain", "chunks"))):
        assert (chunks - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_a_loss_in_chunks_keeps_no_logits_for_the_backward_pass(monkeypatch):
    kept = {}
    for most in (2 ** 27, 500):
        monkeypatch.setattr(script, "MOST_LOGITS", most)
        model, idx, shapes = small(), torch.randint(50, (4, 24)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            model(idx, idx)
        kept[most] = any(shape[-1:] == (50,) for shape in shapes)
    assert kept == {2 ** 27: True, 500: False}


def test_recomputing_changes_no_gradient_even_with_dropout():
    model, idx, gradients = small(dropout=0.2).train(), torch.randint(50, (4, 24)), []
    for model.recompute in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        model(idx, idx).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("size,expected", [("gpt2", (12, 12, 768)), ("1.3b", (24, 16, 2048)), ("2_4_16", (2, 4, 16))])
def test_sizes_have_names_or_say_layers_heads_width(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["huge", "2_4", "2_3_16", "0_1_16", "2_4_x"])
def test_unknown_sizes_are_refused(size):
    with pytest.raises(UserError):
        parse_size(size)


def test_unknown_parts_are_refused():
    assert parse_parts("full") == ("attn", "mlp", "norm") and parse_parts("attn,norm") == ("attn", "norm")
    with pytest.raises(UserError, match="attn, mlp, norm"):
        parse_parts("attn,heads")


# Checkpoints


def test_a_checkpoint_brings_back_model_and_extras(tmp_path):
    model = scrambled(1, tied=False)
    save(tmp_path / "a.pt", model, step=3, note={"spec": "dyck"})
    again, state = load(tmp_path / "a.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert state["step"] == 3 and state["note"] == {"spec": "dyck"} and again.config == model.config
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path / "a.pt", small(), step=1)
    before = (tmp_path / "a.pt").read_bytes()

    def full(state, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "a.pt", small(), step=2)
    assert (tmp_path / "a.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class Trap:
    def __reduce__(self):
        return (print, ("sprung",))


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "code":
        torch.save({"config": {}, "model": Trap()}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif how == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif how == "architecture":
        state = torch.load(path, weights_only=True)
        state["config"]["n_layer"] = 3
        torch.save(state, path)
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["missing", "truncated", "text", "empty", "code", "pickle", "other", "architecture", "folder"])
def test_damaged_and_dangerous_checkpoints_are_refused_in_one_line(how, tmp_path, refused, capfd):
    save(tmp_path / "a.pt", small(), step=1)
    damage(tmp_path / "a.pt", how)
    assert "a.pt" in refused(eval_script, tmp_path / "a.pt")
    assert "sprung" not in capfd.readouterr().out


# Other people's models


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["model.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_can_be_imported_with_equal_weights(tied, tmp_path, monkeypatch, capsys):
    model, idx = scrambled(1, tied=tied).eval(), torch.randint(50, (2, 20))
    save(tmp_path / "a.pt", model, step=3)
    run_command(monkeypatch, "export", tmp_path / "a.pt", tmp_path / "hf")
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    run_command(monkeypatch, "import", tmp_path / "hf", tmp_path / "b.pt")
    for again in (load(tmp_path / "hf")[0], load(tmp_path / "b.pt")[0]):
        assert again.config.tied == tied and torch.equal(model(idx), again.eval()(idx))
    assert "2_4_32" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_is_exported_with_equal_logits(tied, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, idx = scrambled(1, tied=tied).eval(), torch.randint(50, (2, 20))
    save(tmp_path / "a.pt", model)
    script.export(tmp_path / "a.pt", tmp_path / "hf")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(idx).logits, model(idx), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_read_with_equal_logits(tied, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model, _ = load(tmp_path / "hf")
    idx = torch.randint(60, (2, 20))
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, model.eval()(idx), atol=1e-5) and model.config.tied == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_openais_layout_is_read_from_pytorch_model_bin(dtype, tmp_path):
    model, idx = scrambled(1).eval(), torch.randint(50, (2, 20))  # no prefix, transposed matrices, masks in the weights
    weights = {name: (p.t() if script.TRANSPOSED.search(name) else p).to(dtype) for name, p in model.state_dict().items()
               if name != "lm_head.weight"}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50, "n_positions": 24, "n_layer": 2, "n_head": 4,
                                                      "n_embd": 32, "activation_function": "gelu_new"}))
    again = load(tmp_path)[0].eval()
    assert again.config.tied and torch.allclose(again(idx), model.to(dtype).float()(idx), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_is_read(bias, tmp_path):
    model, idx = scrambled(1).eval(), torch.randint(50, (2, 20))
    weights = {f"_orig_mod.transformer.{name}" if name != "lm_head.weight" else f"_orig_mod.{name}": p
               for name, p in model.state_dict().items() if bias or not name.endswith("bias")}
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": bias, "vocab_size": 50, "dropout": 0.0}
    torch.save({"model": weights, "optimizer": {}, "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(2.0),
                "config": {"dataset": "owt"}}, tmp_path / "ckpt.pt")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not bias and name.endswith("bias"):
                p.zero_()
    assert torch.equal(load(tmp_path / "ckpt.pt")[0].eval()(idx), model(idx))


def test_vocabularies_padded_as_nanogpt_does_are_kept_without_the_padding():
    source, target = scrambled(1, vocab_size=64), scrambled(2, vocab_size=50)
    transfer(target, source, ("attn", "mlp", "norm"), "keep")
    idx = torch.randint(50, (2, 24))
    assert torch.equal(source(idx)[..., :50], target(idx))


@pytest.mark.parametrize("how", ["no config", "no weights", "truncated", "other model", "nonsense"])
def test_folders_that_hold_no_gpt2_are_refused(how, tmp_path, refused):
    save(tmp_path / "a.pt", small())
    script.export(tmp_path / "a.pt", tmp_path / "hf")
    config, weights = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "other model":
        config.write_text(config.read_text().replace("gelu_new", "relu"))
    else:
        weights.write_bytes(b"\xff" * 100)
    refused(script, "import", tmp_path / "hf", tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_an_export_never_overwrites(tmp_path, refused):
    save(tmp_path / "a.pt", small())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("precious")
    assert "not empty" in refused(script, "export", tmp_path / "a.pt", tmp_path / "hf")
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_comes_before_the_first_counted_position_is_left_out_of_the_last_block_without_a_trace(recompute):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, block_size=12, n_layer=2, n_head=2, n_embd=16))
    model.recompute = recompute
    x, y = torch.randint(20, (5, 12)), torch.randint(20, (5, 12))
    for first in (0, 1, 7, 11):
        y[:, :first] = -1
        y[2, :11] = -1  # rows may begin later than others
        plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        torch.testing.assert_close(model(x, y), plain)
        torch.testing.assert_close(torch.autograd.grad(model(x, y), model.wte.weight),
                                   torch.autograd.grad(plain, model.wte.weight))
