"""What eval.py says of models, against models whose answers are known and counts by hand."""
import math
import re

import numpy as np
import pytest

import data
import eval as script
import train
from data import ANSWER, PROBLEM, UserError, make_data
from model import GPT, GPTConfig, load, save

import torch


class Fake(GPT):
    """A model whose logits are what a function makes of its input."""
    def __init__(self, config, answer):
        super().__init__(config)
        self.answer, self.lm_head = answer, torch.nn.Identity()

    def states(self, idx, counts=...):
        return torch.as_tensor(self.answer(idx.numpy()), dtype=torch.float32)[counts]


def right(x, y, vocab_size):
    """Logits that are sure of the right token wherever one counts."""
    return 30.0 * np.eye(vocab_size)[np.maximum(y, 0)]


def save_untrained(path, spec, block_size=None, size=(1, 2, 8), **source):
    """Saves an untrained checkpoint -> the data that it is for."""
    them = make_data(spec, 0, block_size)
    torch.manual_seed(0)
    save(path, GPT(GPTConfig(them.vocab_size, them.block_size, *size)), stage="train", step=7,
         source={"spec": spec, "seed": 0, **source})
    return them


@pytest.fixture
def opened(tmp_path):
    """Opens an untrained checkpoint; answer(x, y, vocab_size), if given, makes its logits, and may
    look at what is asked (x) and what is right (y, -1 where nothing counts)."""
    def make(spec, answer=None):
        them = save_untrained(tmp_path / "ckpt.pt", spec, size=(2, 2, 16))
        c = script.Opened(tmp_path, "cpu")

        def logits(x):  # of rows that may be cut behind the last token that counts
            T = x.shape[1]
            known = {row[:T].tobytes(): (row, y) for row, y in zip(*c.rows(1024))}
            rows = [known.get(row.tobytes(), (row, np.full(T, -1))) for row in x]
            return answer(*map(np.stack, zip(*rows)), them.vocab_size)[:, :T]

        if answer:
            c.model = Fake(c.model.config, logits).eval().requires_grad_(False)
        return c
    return make


# Loss and accuracy

WORDS = [b"a", "né".encode(), b"four", b"<end>"]
TOKENIZER = data.Tokenizer("words", 4, None, lambda ts: b"".join(WORDS[t] for t in ts), end=3)


@pytest.mark.parametrize("n", [1, 3, 100])
def test_evaluation_counts_as_one_counts_by_hand_in_any_number_of_parts(n):
    rng = np.random.default_rng(0)
    table, x = rng.normal(size=(4, 4)) * 2, torch.from_numpy(rng.integers(0, 4, (40, 13)))
    y = torch.from_numpy(np.where(rng.random((40, 13)) < 0.6, rng.integers(0, 4, (40, 13)), -1))
    y[:, 8:] = -1
    y[3], y[5, 12] = -1, 2  # a row of which nothing counts, and one that is long
    model = Fake(GPTConfig(4, 13, 1, 1, 4), lambda x: table[x])  # it only sees the last token
    loss, hits, answers, size = 0.0, [], [], 0
    for row, wanted in zip(x.tolist(), y.tolist()):
        before = -1
        for token, target in zip(row, wanted):
            if target != -1:
                logits = table[token]
                loss += math.log(sum(math.exp(logit) for logit in logits)) - logits[target]
                hits.append(max(range(4), key=lambda t: logits[t]) == target)
                size += len(WORDS[target]) if target != 3 else 0
                answers += [[]] if before == -1 else []
                answers[-1].append(hits[-1])
            before = target
    result = script.evaluate(model, data.micro_batches(x, y, n), tokenizer=TOKENIZER)
    assert result == {
        "loss": pytest.approx(loss / len(hits)), "accuracy": pytest.approx(np.mean(hits)),
        "exact": pytest.approx(np.mean([all(answer) for answer in answers])),
        "bits_per_byte": pytest.approx(loss / math.log(2) / size), "tokens": len(hits)}
    assert script.evaluate(model, [(x, y)])["bits_per_byte"] is None, "it is not said to be text"
    model = GPT(GPTConfig(4, 13, 1, 1, 8, dropout=0.5))
    assert script.evaluate(model, [(x, y)]) == script.evaluate(model, [(x, y)]), "no dropout"


@pytest.mark.parametrize("spec", [
    "dyck:k=2,length=6,p=0.4", "dyck_shuffle:k=2,length=6,depth=3", "dyck_shuffle:k=3,length=5"])
def test_odds_of_brackets_are_how_often_they_come_after_each_other(spec, opened):
    c = opened(spec)
    x = c.rows(8000)[0]
    odds = script.bracket_facts(x, c.name, c.p)["odds"]
    came = np.eye(odds.shape[2])[x[:, :odds.shape[1]]]
    assert np.allclose(odds.sum(2), 1) and (odds[came == 1] > 0).all()
    for t, before in np.ndindex(odds.shape[1:]):
        rows = x[:, t - 1] == before
        if t > 0 and rows.any():
            away = came[rows, t].mean(0) - odds[rows, t].mean(0)
            assert (abs(away) < 2.5 / rows.sum() ** 0.5).all()


def test_bracket_facts_say_what_closes_what():
    for name, row, partner, depth, innermost in (
            ("dyck", [0, 1, 3, 2, 0, 2], [-1, -1, 1, 0, -1, 4], [0, 1, 2, 1, 0, 1],
             [0, 1, 0, -1, 0, -1]),
            ("dyck_shuffle", [0, 1, 2, 1, 3, 3], [-1, -1, 0, -1, 3, 1], [0, 1, 2, 1, 2, 1],
             [0, 1, 1, 1, 1, -1])):
        facts = script.bracket_facts(np.array([row + [5, 5]]), name, data.parameters(name, "k=2"))
        assert facts["partner"].tolist() == [partner] and facts["depth"].tolist() == [depth]
        assert facts["innermost"].tolist() == [innermost]


@pytest.mark.parametrize("spec", ["dyck:k=2,length=20,p=0.4", "dyck_shuffle:k=2,length=9,depth=2"])
def test_who_knows_the_rules_of_brackets_closes_right_and_who_errs_does_not(spec, opened):
    def knows(x, y, vocab_size):
        odds = script.bracket_facts(x, c.name, c.p)["odds"]
        odds = np.pad(odds[:, 1:], ((0, 0), (0, 1), (0, vocab_size - odds.shape[2])))
        return np.log(np.maximum(odds, 1e-12))
    c = opened(spec, knows)
    learned, found = script.probe_learned(c), script.probe_brackets(c)
    assert learned["loss (nats per counted token)"] == pytest.approx(learned["smallest possible"])
    assert learned["learned (share of what can be)"] == pytest.approx(1, abs=1e-4)
    assert found["closing bracket of a right type"] == 1
    shares = found["share of a right type by brackets that are open (1, 2-3, 4-7, ...), model"]
    assert set(shares.values()) == {1}
    if c.name == "dyck":  # only one type may close: the other is never right
        other = opened(spec, lambda *asked: -knows(*asked))
        assert script.probe_brackets(other)["closing bracket of a right type"] == 0


@pytest.mark.parametrize("spec", ["set:length=5", "haystack:pairs=3", "eca:width=4,length=12"])
def test_who_always_answers_right_has_learned_it_and_who_guesses_has_not(spec, opened):
    c = opened(spec, right)
    assert script.probe_learned(c)["learned (share of what can be)"] == pytest.approx(1)
    found = script.probe_learned(opened(spec, lambda x, y, n: np.zeros((*x.shape, n))))
    assert found["learned (share of what can be)"] < 0.1
    assert found["loss (nats per counted token)"] == pytest.approx(math.log(c.data.vocab_size))


def test_answers_are_counted_by_the_place_in_the_answer(opened):
    def second_wrong(x, y, vocab_size):
        return right(x, np.where(np.arange(x.shape[1]) == 5, (y + 1) % vocab_size, y), vocab_size)
    c = opened("sorting:numbers=4", second_wrong)
    shares = script.probe_answers(c)["share right by token of the answer, model"]
    assert shares == {1: 1, 2: 0, 3: 1, 4: 1}
    assert script.probe_learned(c)["accuracy"] == 0.75


def test_copying_is_seen_in_one_who_looks_back(opened):
    def copies(x, y, vocab_size):
        return right(x, np.roll(x, (x.shape[1] + 1) // 2 - 1, axis=1), vocab_size)
    found = script.probe_copying(opened("sorting:numbers=20", copies))
    assert found["second copy right"] == 1 and found["loss on the first copy (nats)"] > 20
    assert found["loss on the second copy (nats)"] < 1e-4


# Its parts

def looks_at(place, x):
    """Attention (rows, 1, 1, T, T) of which place(row, t), of a list of tokens, gets all."""
    found = np.zeros((len(x), 1, 1, x.shape[1], x.shape[1]))
    for i, row in enumerate(x.tolist()):
        for t in range(len(row)):
            found[i, 0, 0, t, place(row, t) % len(row)] = 1
    return found


def opened_by_next(row, t):
    """Where the bracket that closes after t, if one does, was opened; else t. Of dyck:k=2."""
    left = []
    for i, token in enumerate(row[:t + 2]):
        if token < 2:
            left.append(i)
        else:
            place = left.pop() if left else i  # some rows are random
    return min(place, t) if t + 1 < len(row) and row[t + 1] >= 2 else t


def value_of_asked(row, t):
    """Of haystack:pairs=5: the value beside the key that row[t] asks for; else t."""
    key = row[t] - 5
    return row.index(key) + 1 if row[t] >= 133 and key in row else t


@pytest.mark.parametrize("spec,name,place", [
    ("set:length=8", "previous token", lambda row, t: t - 1),
    ("set:length=8", "induction", lambda row, t: t - len(row) // 2 + 1),
    ("dyck:k=2,length=16", "matching bracket", lambda row, t: opened_by_next(row, t - 1)),
    ("dyck:k=2,length=16", "bracket that closes next", opened_by_next),
    ("haystack:pairs=5", "value of the asked key", value_of_asked)])
def test_a_head_that_looks_where_a_probe_looks_gets_one(spec, name, place, opened):
    c = opened(spec)
    for where, score in ((place, 1), (lambda row, t: place(row, t) + 1, 0)):
        c.attention = lambda x: looks_at(where, x)
        found = script.probe_heads(c)
        assert found[name] == found[f"{name}, strongest head"] == pytest.approx(score)
        assert found["entropy (1: all alike)"] == 0
    alike = np.tril(np.ones(2 * [c.data.block_size]))
    alike /= alike.sum(1, keepdims=True)
    c.attention = lambda x: np.stack([alike[None, None, :x.shape[1], :x.shape[1]]] * len(x))
    found = script.probe_heads(c)
    assert found[name] == pytest.approx(found[f"{name}, if it looked at all alike"])
    assert found["entropy (1: all alike)"] == pytest.approx(1)


def test_a_state_planted_in_the_residual_stream_is_read_from_there_on(opened):
    class Planted(torch.nn.Module):
        def forward(self, stream):
            tokens = stream[..., :11].argmax(-1)
            before = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(2)
            return torch.cat([stream[..., :-1], before[..., None].float()], -1)

    c = opened("set:length=20,vocab=9")
    with torch.no_grad():
        c.model.wpe.weight.zero_()
        c.model.wte.weight.copy_(torch.eye(11, 16))  # a token is a direction
    c.model.h = torch.nn.ModuleList([torch.nn.Identity(), Planted()])
    found = script.probe_linear(c)
    shares, untrained = (found[f"seen before, share right by layers passed, {name}"]
                         for name in ("model", "untrained"))
    assert shares[0] == shares[1] < 0.8 and shares[2] == 1
    assert len(untrained) == 3 and max(untrained.values()) < 0.9


# The command

@pytest.fixture
def checkpoints(tmp_path, prose):
    """An untrained checkpoint of each kind; that of a rule may name its run's tokenizer."""
    specs = dict(rule="set:length=4", brackets="dyck:k=2,length=12", varying="dyck:k=2,length=4-12",
                 task="haystack:pairs=1", text=str(prose))
    for name, spec in specs.items():
        block_size = 64 if name == "text" else None
        save_untrained(tmp_path / f"{name}.pt", spec, block_size, tokenizer="bytes")
    return {name: tmp_path / f"{name}.pt" for name in specs}


@pytest.fixture
def printed(monkeypatch, capfd):
    """Runs the command -> what it printed."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", "--device", "cpu", *map(str, arguments)])
        capfd.readouterr()
        script.main()
        return capfd.readouterr().out
    return call


@pytest.mark.parametrize("kind,probes", [
    ("rule", "loss learned answers copying heads linear"),
    ("brackets", "loss learned copying brackets heads linear"),
    ("varying", "loss copying heads"),  # nobody knows where they will end
    ("task", "loss learned answers copying heads"), ("text", "loss copying heads")])
def test_each_probe_that_applies_is_printed_and_heads_drawn(kind, probes, checkpoints, printed):
    image, path = pytest.importorskip("matplotlib.image"), checkpoints[kind]
    text, c = printed(path, "--plot"), script.Opened(path, "cpu")
    assert text.startswith(f"{path}: train step 7, held-out {c.spec}")
    assert ("tokens of bytes" in text.splitlines()[0]) == (kind == "text")
    assert re.findall(r"^(\w+): \S.* \(.*\)$", text, re.MULTILINE) == probes.split()
    assert f"{script.probe_loss(c)['perplexity']:.4f}" in text
    figure = path.with_name(f"eval-{kind}-heads.png")
    assert [*path.parent.glob("*.png")] == [figure] and image.imread(figure).std() > 0.02


@pytest.mark.parametrize("kind,arguments,reason", [
    ("rule", ["--probe", "vibes"], "there are loss"),
    ("rule", ["--probe", "loss,brackets"], "does not apply"),
    ("brackets", ["--data", "set:length=3"], "tokens"),
    ("task", ["--prompt", "k0: 17 ?k0"], "--prompt")])
def test_what_cannot_be_asked_is_refused_in_one_line(kind, arguments, reason, checkpoints, refused):
    assert reason in refused(script, checkpoints[kind], *arguments)


def test_who_says_not_what_it_was_trained_on_needs_data(tmp_path, prose, printed, refused):
    path, padded = tmp_path / "a.pt", GPT(GPTConfig(264, 32, 1, 1, 8))
    with torch.no_grad():
        padded.wte.weight[:257] = 0  # the eight that only pad the vocabulary are likely
    save(path, padded)
    assert "--data" in refused(script, path)
    assert "bits per byte" in printed(path, "--data", prose, "--probe", "loss")
    assert "The ▶ " in printed(path, "--data", prose, "--prompt", "The"), "pads have no words"
    save(path, GPT(GPTConfig(50257, 32, 1, 1, 8)))  # GPT-2's size alone does not say that it is
    assert "--tokenizer" in refused(script, path, "--data", prose)
    save(path, padded, source=[3])
    assert "a.pt" in refused(script, path)


@pytest.mark.parametrize("says", [
    {"step": "x"}, {"seed": -1}, {"seed": 10 ** 30}, {"eval_rows": -1}, {"eval_rows": 10 ** 30}])
def test_what_a_checkpoint_says_of_itself_may_be_anything(says, checkpoints, refused):
    model, state = load(checkpoints["text"])
    save(checkpoints["text"], model, **state | {"source": state["source"] | says} | says)
    assert "whole number" in refused(script, checkpoints["text"]) or "step" in says


def test_weights_that_are_no_numbers_are_taken_as_they_are(checkpoints, printed):
    for path in (checkpoints["brackets"], checkpoints["text"]):
        state = torch.load(path)
        state["model"]["ln_f.weight"].fill_(math.nan)
        torch.save(state, path)
        assert re.search(r"counted token\) +nan", printed(path))
        assert "▶" in printed(path, "--sample", 1)


def test_changed_data_are_refused(tmp_path, prose, checkpoints, printed, refused):
    model, state = load(checkpoints["text"])
    its, path = make_data(str(prose), 0, 64).fingerprint(), tmp_path / "a.pt"
    for stage, good in (("train", [its, 0]), ("warmup", [0, its])):  # of the data, of the warm-up's
        save(path, model, **state | {"stage": stage, "fingerprint": good})
        assert "perplexity" in printed(path, "--probe", "loss")
        save(path, model, **state | {"stage": stage, "fingerprint": good[::-1]})
        assert f"--data {prose}" in refused(script, path, "--probe", "loss")
    assert "perplexity" in printed(path, "--probe", "loss", "--data", prose)


def test_a_run_has_one_held_out_loss_wherever_it_is_said(tmp_path, printed, monkeypatch):
    monkeypatch.setattr(train, "listen", lambda: None)  # for signals, which are the tests'
    flags = ("--data haystack:pairs=2 --warmup dyck:k=2,length=8 --steps 2 --warmup_steps 2 "
             "--batch_size 4 --warmup_batch_size 4 --eval_rows 24 --size 1_1_8 --device cpu --out")
    result = train.run(train.parse([*flags.split(), f"{tmp_path}/run"]))
    task, brackets = printed(tmp_path / "run", tmp_path / "run/warmup.pt", "--probe",
                             "loss").split("held-out ")[1:]
    assert task.startswith("haystack:pairs=2\n") and f"{result['val_loss']:.4f}" in task
    assert brackets.startswith("dyck:") and f"{result['warmup_loss']:.4f}" in brackets


def test_answers_of_a_task_are_said_to_be_right_or_wrong(checkpoints, printed, monkeypatch):
    def finds_large_values(x):  # of a key, its value, and the key again
        logits = np.eye(256)[x[:, 1]] * np.where(x[:, 1] > 40, 1, -1)[:, None]
        return np.repeat(logits[:, None], x.shape[1], 1)
    model, state = load(checkpoints["task"])
    monkeypatch.setattr(script, "load", lambda *_: (Fake(model.config, finds_large_values), state))
    lines = printed(checkpoints["task"], "--sample", 20).splitlines()
    assert len(lines) == 61 and len(set(lines[3::3])) > 1, "no probe was asked"
    for line, verdict in zip(lines[2::3], lines[3::3]):
        value = int(line.split()[1])
        assert line.endswith(f" ▶ {value}") == (value > 40)
        assert verdict == ("right" if value > 40 else f"wrong: {value}")


def test_samples_go_on_from_held_out_text_and_prompts_from_words(checkpoints, printed, prose):
    text, them = printed(checkpoints["text"], "--sample", 2), make_data(str(prose), 0, 64)
    assert all(f"{them.write(them.val[row][0])} ▶ " in text for row in range(2))
    torch.manual_seed(0)
    begin = torch.tensor([list(b"The quick")])
    out = load(checkpoints["text"])[0].eval().generate(begin, 6, 0.8)[0, 9:].tolist()
    told = printed(checkpoints["text"], "--tokens", 6, "--prompt", "The quick")
    assert told.endswith(f"The quick ▶ {bytes(out).decode('utf-8', 'replace')}\n")


def test_a_prompt_of_characters_that_a_model_has_not_is_refused(tmp_path, refused):
    for name in ("train.bin", "val.bin"):
        np.tile(np.array([17, ANSWER, 18, PROBLEM], np.uint16), 20).tofile(tmp_path / name)
    (tmp_path / "meta.json").write_text('{"tokenizer": "characters"}')
    save(tmp_path / "a.pt", GPT(GPTConfig(97, 16, 1, 1, 8)), source={"spec": str(tmp_path)})
    for prompt in ("\u00e9", "1\n", "\u20ac"):
        assert "has to know" in refused(script, tmp_path / "a.pt", "--prompt", prompt)


def test_a_figure_is_of_its_names_format(tmp_path):
    figure = script.pyplot().figure()
    figure.suptitle("/tmp/$^$")  # which is no formula
    script.keep_figure(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="png, .pdf"):
        script.keep_figure(figure, tmp_path / "a.txt")
