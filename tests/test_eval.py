"""What eval.py says of a checkpoint, against counts by hand."""
import collections
import contextlib
import itertools
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as script
from data import make_source
from model import GPT, GPTConfig, load, save


class Fixed:
    """A Source with given rows; `rows` says how many there are, as in data.py."""
    kind, vocab_size, token_bytes = "task", 5, None

    def __init__(self, x, y):
        self.x, self.y, self.rows, self.block_size = x, y, len(x), x.shape[1]

    def batch(self, index, size):
        places = np.arange(index * size, (index + 1) * size) % self.rows
        return self.x[places], self.y[places]


def oracle(source, wrong_at=()):
    """A stand-in for a GPT that answers right, with confidence, but for some (row, place)."""
    class Oracle(GPT):
        def trunk(self, idx, caches=None, first=0):
            targets = torch.from_numpy(source.batch(0, len(idx))[1])
            for row, place in wrong_at:
                targets[row, place] = (targets[row, place] + 1) % 5
            return F.one_hot(targets.clamp(min=0), 8).float()[:, first:] * 20
    model = Oracle(GPTConfig(5, 8, 1, 1, 8, tied=False))
    torch.nn.init.eye_(model.lm_head.weight)
    return model


def test_accuracy_counts_tokens_and_exact_counts_rows():
    x, y = np.zeros((4, 6), np.int64), np.full((4, 6), -1)
    y[:, 2:5] = [[1, 2, 3], [3, 2, 1], [4, 4, 4], [-1, -1, -1]]  # the last row asks nothing
    source = Fixed(x, y)
    perfect = script.evaluate(oracle(source), source, 4, 1)
    assert (perfect["accuracy"], perfect["exact"], perfect["tokens"]) == (1.0, 1.0, 9)
    one_wrong = script.evaluate(oracle(source, [(0, 3)]), source, 4, 1)
    assert one_wrong["accuracy"] == pytest.approx(8 / 9) and one_wrong["exact"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("batch_size,batches", [(4000, 1), (1000, 4), (700, 6), (64, 10 ** 6)])
def test_each_held_out_example_is_counted_once_whatever_the_batch_size(batch_size, batches):
    source = make_source("addition:digits=2", "val")
    torch.manual_seed(0)
    model = GPT(GPTConfig(31, source.block_size, 1, 1, 8))
    x, y = (torch.from_numpy(a) for a in source.batch(0, 4000))
    result = script.evaluate(model, source, batch_size, batches)
    assert result["tokens"] == (y != -1).sum()
    assert result["loss"] == pytest.approx(model(x, y).item(), abs=1e-4)


def test_bits_per_byte_weighs_the_loss_by_the_bytes_of_the_text(prose):
    source = make_source(str(prose), "val", block_size=16)
    torch.manual_seed(0)
    result = script.evaluate(GPT(GPTConfig(257, 16, 1, 1, 8)), source, 2, 3)
    end_of_text = sum(int((source.batch(i, 2)[1] == 256).sum()) for i in range(3))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 96 / (96 - end_of_text) / math.log(2))


def test_evaluation_switches_dropout_off_and_puts_it_back():
    source = make_source("set:length=3", "val")
    model = GPT(GPTConfig(102, 7, 1, 1, 8, dropout=0.5)).train()
    assert script.evaluate(model, source, 4, 2) == script.evaluate(model, source, 4, 2) and model.training


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, prose):
    """An untrained checkpoint of each kind."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for name, spec in (("rule", "set:length=3"), ("brackets", "dyck:k=2,length=12"), ("task", "haystack:pairs=2"), ("text", str(prose))):
        source = make_source(spec, block_size=16 if name == "text" else None)
        save(folder / f"{name}.pt", GPT(GPTConfig(source.vocab_size, source.block_size, 1, 2, 8)), stage="train", step=7,
             source={"spec": spec, "tokenizer": "bytes", "seed": 0})
        made[name] = folder / f"{name}.pt"
    return made


@pytest.mark.parametrize("kind,words", [("rule", ("accuracy", "whole answers", "|")), ("task", ("whole answers", "?k")),
                                        ("brackets", ("accuracy", "▶")), ("text", ("perplexity", "bits per byte", "▶"))])
def test_the_command_prints_what_fits_the_checkpoint(kind, words, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints[kind]), "--sample", "2", "--batches", "2", "--device", "cpu"])
    script.main()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("train step 7", "nats per counted token", *words)), printed


def test_other_data_of_the_same_vocabulary_can_be_asked_for(checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "b.txt").write_text("other words " * 200)
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints["text"]), "--data", str(tmp_path / "b.txt"), "--device", "cpu"])
    script.main()
    assert "b.txt" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--data", "haystack"], ["--data", "dyke"], ["--batches", "0"], ["--sample", "-1"],
                                  ["--device", "abacus"], ["--tokenizer", "klingon"]])
def test_bad_requests_are_refused(args, checkpoints, refused):
    refused(script, checkpoints["text"], *args)


def test_a_checkpoint_that_does_not_say_what_it_learned_is_refused(tmp_path, refused):
    save(tmp_path / "a.pt", GPT(GPTConfig(5, 8, 1, 1, 8)))
    assert "trained on" in refused(script, tmp_path / "a.pt")
    for source in ("code", 3, {"tokenizer": "bytes"}):  # another program's
        save(tmp_path / "b.pt", GPT(GPTConfig(20, 8, 1, 1, 8)), source=source)
        assert "trained on" in refused(script, tmp_path / "b.pt")


# Probes ---------------------------------------------------------------------------------------------------------------

ASKED = SimpleNamespace(device="cpu", batch_size=16, batches=4, problems=3, sample=0, data=None, tokenizer=None)


@pytest.fixture
def opened(tmp_path):
    """An untrained checkpoint of a spec, opened; its logits may be replaced by answer(x) -> float (n, T, vocab)."""
    def make(spec, answer=None, block_size=None, shape=(2, 2, 16)):
        source = make_source(spec, "val", 0, block_size)
        torch.manual_seed(0)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        save(path, GPT(GPTConfig(source.vocab_size, source.block_size, *shape)),
             source={"spec": spec, "tokenizer": "bytes", "seed": 0})
        c = script.Opened(str(path), ASKED)
        if answer:
            def logits(x):
                for part in np.array_split(x, range(c.batch_size, len(x), c.batch_size)):
                    yield torch.from_numpy(answer(part)).float()
            c.logits = logits
        return c
    return make


def knows(source, sure=30.0):
    """Logits that are right with confidence wherever a token of the source's rows counts."""
    answers = {}
    for index in range(20):
        for x, y in zip(*source.batch(index, 256)):
            answers[x.tobytes()] = y

    def answer(x):
        y = np.stack([answers[row.tobytes()] for row in x])
        return sure * np.eye(source.vocab_size)[np.maximum(y, 0)]
    return answer


def test_asking_for_attention_weights_changes_no_logit():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 32, 3, 4, 64)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randint(50, (4, 32))
    with torch.no_grad():
        plain = model(x)
        for block in model.h:
            block.attn.weights = True
        asked = model(x)
    assert (plain - asked).abs().max() < 1e-5 * max(1, plain.abs().max())
    for block in model.h:
        weights = block.attn.weights
        assert weights.shape == (4, 4, 32, 32) and torch.allclose(weights.sum(-1), torch.ones(4, 4, 32), atol=1e-5)
        assert (weights.triu(1) == 0).all()


def test_looking_inside_leaves_the_model_as_it_was(opened):
    c = opened("set:length=5")
    x = c.rows()[0]
    before = c.model(torch.from_numpy(x))
    weights, residual = c.look_inside(x)
    assert weights.shape == (len(x), 2, 2, 11, 11) and residual.shape == (len(x), 3, 11, 16)
    assert torch.equal(before, c.model(torch.from_numpy(x))) and all(b.attn.weights is None for b in c.model.h)
    embedded = (c.model.wte(torch.from_numpy(x)) + c.model.wpe.weight[:11]).detach().numpy()
    assert np.allclose(residual[:, 0], embedded)


def sequences_and_probabilities(name, k, length, p, depth):
    """Every sequence that the process can make with its probability, by walking its rules one token at a time."""
    found = []

    def walk(sequence, stack, chance):
        t = len(sequence)
        if t == length:
            found.append((sequence, chance))
            return
        opens = 1.0 if not stack else 0.0 if len(stack) >= (length - t if name == "dyck" else depth) else p
        for kind in range(k):
            if opens:
                walk([*sequence, kind], [*stack, kind], chance * opens / k)
        kinds = [stack[-1]] if name == "dyck" and stack else sorted(set(stack))
        for kind in kinds if opens < 1 else []:
            rest = list(stack)
            del rest[len(rest) - 1 - rest[::-1].index(kind)]
            walk([*sequence, k + kind], rest, chance * (1 - opens) / len(kinds))
    walk([], [], 1.0)
    return np.array([s for s, _ in found]), np.array([c for _, c in found])


@pytest.mark.parametrize("name,params", [("dyck", dict(k=2, length=6, p=0.49)), ("dyck", dict(k=1, length=8, p=0.3)),
                                         ("dyck_shuffle", dict(k=2, length=5, p=0.5, depth=3)),
                                         ("dyck_shuffle", dict(k=3, length=4, p=0.6, depth=2))])
def test_the_processs_own_loss_is_its_entropy_summed_by_brute_force(name, params):
    sequences, chances = sequences_and_probabilities(name, depth=params.get("depth"), **{k: params[k] for k in ("k", "length", "p")})
    assert chances.sum() == pytest.approx(1)
    process = data.bracket_process(name, sequences, **params)
    assert np.allclose(process.sum(-1), 1)
    came = np.take_along_axis(process, sequences[:, :, None], axis=2)[:, :, 0]
    assert np.allclose(came.prod(axis=1), chances)  # so the entropy is the mean of -log, place by place:
    assert -(chances * np.log(came).sum(axis=1)).sum() == pytest.approx(-(chances * np.log(chances)).sum())
    drawn = data.RULES[name](np.random.default_rng(0), 20_000, **params)[0]
    counted = collections.Counter(map(tuple, drawn.tolist()))
    assert set(counted) <= set(map(tuple, sequences.tolist()))
    for sequence, chance in zip(sequences.tolist(), chances):
        assert counted[tuple(sequence)] / 20_000 == pytest.approx(chance, abs=5 * math.sqrt(chance / 20_000))


def process_logits(c_spec, name, params):
    def answer(x):
        chances = data.bracket_process(name, x, **params)
        return np.concatenate([np.log(np.maximum(chances[:, 1:], 1e-12)), np.zeros((len(x), 1, 2 * params["k"]))], axis=1)
    return answer


@pytest.mark.parametrize("name,extra", [("dyck", {}), ("dyck_shuffle", {"depth": 4})])
def test_who_knows_the_process_has_learned_it_and_closes_every_bracket_right(name, extra, opened):
    params = dict(k=3, length=40, p=0.5, **extra)
    c = opened(f"{name}:" + ",".join(f"{key}={value}" for key, value in params.items()),
               process_logits(None, name, params))
    learned, brackets = script.probe_learned(c).rows, script.probe_brackets(c).rows
    assert learned["verdict"][0] == "learned" and learned["above it"][0] == pytest.approx(0, abs=1e-5)
    assert {value for label, (value, _) in brackets.items() if "right type" in label} == {1.0}
    assert brackets["probability of illegal tokens"][0] == pytest.approx(0, abs=1e-9)


def test_who_always_closes_the_wrong_type_is_never_right(opened):
    def answer(x):  # closes, with certainty, a type that cannot close
        chances = data.bracket_process("dyck", x, 3, 40, 0.5)
        wrong = 30.0 * (chances[:, 1:, 3:] == 0)
        return np.concatenate([np.concatenate([np.zeros_like(wrong), wrong], axis=2), np.zeros((len(x), 1, 6))], axis=1)
    c = opened("dyck:k=3,length=40,p=0.5", answer)
    rows = script.probe_brackets(c).rows
    assert {value for label, (value, _) in rows.items() if "right type" in label} == {0.0}
    assert rows["probability of illegal tokens"][0] == pytest.approx(1, abs=1e-6)
    assert script.probe_learned(c).rows["verdict"][0] == "not learned"


def test_partners_and_levels_of_brackets():
    partner, level = data.bracket_structure(np.array([[0, 1, 3, 2, 0, 2], [0, 1, 2, 3, 0, 1]]), 2)
    assert partner.tolist() == [[-1, -1, 1, 0, -1, 4], [-1, -1, 0, 1, -1, -1]]
    assert level.tolist() == [[0, 1, 2, 1, 0, 1], [0, 1, 2, 1, 0, 1]]


@pytest.mark.parametrize("spec", ["set:length=5", "stack:length=6", "haystack:pairs=3", "addition:digits=2", "sorting:numbers=3",
                                  "eca:width=4,length=12"])
def test_the_gate_and_the_answers_of_one_who_knows_and_of_one_who_does_not(spec, opened):
    source = make_source(spec, "val")
    c = opened(spec, knows(source))
    rows = script.probe_answers(c).rows
    assert script.probe_learned(c).rows["verdict"][0] == "learned" and {value for value, _ in rows.values()} == {1.0}
    assert script.probe_learned(opened(spec)).rows["verdict"][0] == "not learned"


def test_answers_are_counted_by_their_place(opened):
    source = make_source("sorting:numbers=4", "val")
    right = knows(source)

    def answer(x):  # the second token of each answer is wrong
        logits = right(x)
        logits[:, 5] = np.roll(logits[:, 5], 1, axis=-1)
        return logits
    rows = script.probe_answers(opened("sorting:numbers=4", answer)).rows
    assert [rows[f"token {i} of the answer"][0] for i in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert rows["all tokens"][0] == 0.75 and rows["whole answers"][0] == 0


def test_length_generalisation_goes_as_far_as_the_positions_and_marks_what_was_trained(opened):
    def answer(x):  # sorts whatever it is given
        y = np.zeros_like(x)
        for row, out in zip(x.tolist(), y):
            if 100 in row:
                n = row.index(100)
                out[n:2 * n] = sorted(row[:n])
        return 30.0 * np.eye(101)[y]
    finding = script.probe_length(opened("sorting:numbers=4", answer, block_size=17))
    assert {value for value, _ in finding.rows.values()} == {1.0} and finding.panels[0]["mark"] == (4, 4)
    assert [label for label in finding.rows if "trained" in label] == ["numbers=4 (trained): whole answers"]
    assert max(finding.panels[0]["curves"]["tokens"][0]) == 8  # 8 numbers, a separator, 8 numbers


@pytest.mark.parametrize("trained,asked,marked", [("set:length=6", None, (6, 6)), ("set:length=2-6", None, (2, 6)),
                                                  ("set:length=6", "set:length=3", (6, 6)), ("set+union", "set:length=3", None)])
def test_the_trained_range_is_that_of_the_training(trained, asked, marked, tmp_path):
    source = make_source(trained, "val")
    save(tmp_path / "a.pt", GPT(GPTConfig(source.vocab_size, source.block_size, 1, 1, 8)),
         source={"spec": trained, "tokenizer": "bytes", "seed": 0})
    c = script.Opened(str(tmp_path / "a.pt"), SimpleNamespace(**{**vars(ASKED), "data": asked if trained != "set+union" else None}))
    if trained == "set+union":
        assert script.probe_length(c) is None
    else:
        assert script.trained_sizes(c) == marked
        c.state["length"] = 4
        assert script.trained_sizes(c) == (2, 4)


def test_who_knows_the_frequencies_alone_has_not_learned_a_process_with_little_to_learn(opened):
    spec = "dyck:k=1,length=128"
    y = make_source(spec, "val").batch(0, 256)[1]
    share = np.bincount(y[y != -1]) / (y != -1).sum()
    c = opened(spec, lambda x: np.broadcast_to(np.log(share), (*x.shape, 2)).copy())
    rows = script.probe_learned(c).rows
    assert rows["above it"][0] < script.LEARNED and rows["verdict"][0] == "not learned"


def test_the_longest_chain_of_carries():
    digits = lambda n: [int(d) for d in reversed(f"{n:05}")]
    pairs = [(12345, 11111, 0), (99999, 1, 5), (50005, 50005, 1), (19, 1, 1), (199, 1, 2), (9090, 1010, 1), (555, 555, 3)]
    a, b, chains = (np.array(column) for column in zip(*((digits(x), digits(y), z) for x, y, z in pairs)))
    assert script.carry_chain(a, b).tolist() == chains.tolist()


@pytest.mark.parametrize("name", ["addition", "reversed_addition"])
def test_sums_with_carries_are_told_from_those_without(name, opened):
    spec = f"{name}:digits=3"
    right, source = knows(make_source(spec, "val")), make_source(spec, "val")

    def answer(x):  # right where nothing carries
        a, b = x[:, :3], x[:, 4:7]
        carries = ((a + b) >= 10).any(axis=1)
        return np.where(carries[:, None, None], 0.0, right(x))
    rows = script.probe_errors(opened(spec, answer)).rows
    by_chain = {label.split(" (")[0]: value for label, (value, _) in rows.items()}
    assert by_chain.pop("longest chain of carries 0") == 1.0 and set(by_chain.values()) == {0.0} and len(by_chain) == 3


def test_needles_of_the_haystack_are_told_by_depth_and_number(opened):
    spec = "haystack:pairs=12"
    right = knows(make_source(spec, "val"))

    def answer(x):  # finds needles in the first half alone
        asked = (x >= 140).argmax(axis=1)
        key = x[np.arange(len(x)), asked] - 12
        place = (x == key[:, None]).argmax(axis=1) // 2
        return np.where((place <= (asked // 2 - 1) * 0.5)[:, None, None], right(x), 0.0)
    finding = script.probe_errors(opened(spec, answer))
    assert finding.rows["needle at 0-20 % depth"][0] == 1.0 and finding.rows["needle at 80-100 % depth"][0] == 0.0
    assert [row[0] for row in finding.panels[0]["matrix"]] == [1.0] * 6


def test_the_loss_by_place_of_one_who_knows_nothing_is_the_same_everywhere(prose, opened):
    rows = script.probe_context(opened(str(prose), lambda x: np.zeros((*x.shape, 257)), block_size=32)).rows
    assert all(value == pytest.approx(math.log(257), abs=1e-4) for value, _ in rows.values())
    assert list(rows)[0] == "after 1 tokens" and list(rows)[-1] == "after 17 to 32 tokens"


def looks_back(x, vocab=257, least=1):
    """Predicts what followed the longest earlier match of what came last."""
    logits = np.zeros((*x.shape, vocab))
    for row, sequence in enumerate(x.tolist()):
        for t in range(len(sequence)):
            best = max(range(t), key=lambda s: next((n for n in itertools.count() if n > s or sequence[s - n] != sequence[t - n]), 0),
                       default=None)
            if best is not None and sequence[best] == sequence[t]:
                logits[row, t, sequence[best + 1]] = 30.0
    return logits


def test_a_needle_in_text_is_found_by_one_who_looks_back_and_by_no_one_else(prose, opened):
    found = script.probe_needle(opened(str(prose), looks_back, block_size=160))
    assert {value for label, (value, _) in found.rows.items() if "found" in label} == {1.0}
    blind = script.probe_needle(opened(str(prose), lambda x: np.zeros((*x.shape, 257)), block_size=160))
    assert {value for label, (value, _) in blind.rows.items() if "found" in label} == {0.0}


def test_copying_is_seen_in_one_who_looks_back(opened):
    rows = script.probe_copying(opened("sorting:numbers=20", lambda x: looks_back(x, 101))).rows
    assert rows["second copy right"][0] > 0.95 and rows["loss on the second copy (nats)"][0] < 0.3
    rows = script.probe_copying(opened("sorting:numbers=20", lambda x: np.zeros((*x.shape, 101)))).rows
    assert rows["loss on the second copy (nats)"][0] == pytest.approx(math.log(101), abs=1e-4)


def pattern(n, t, to):
    """Attention (n, 1, 1, t, t) that puts everything from place i of row r on place to(r, i)."""
    attention = np.zeros((n, 1, 1, t, t))
    for row in range(n):
        for i in range(t):
            attention[row, 0, 0, i, to(row, i)] = 1
    return attention


def test_scores_of_heads_are_exactly_one_for_the_pattern_they_look_for_and_zero_for_another():
    half, real = 6, np.ones((2, 12), bool)
    twice = np.tile(np.array([[3, 1, 4, 0, 5, 9], [2, 6, 5, 3, 8, 7]]), 2)
    previous, first, itself = (pattern(2, 12, to) for to in (lambda r, i: max(i - 1, 0), lambda r, i: 0, lambda r, i: i))
    copies = pattern(2, 12, lambda r, i: i - half + 1 if i >= half else 0)
    assert script.attended(previous, script.previous_token(real)) == 1 and script.attended(itself, script.previous_token(real)) == 0
    assert script.attended(copies, script.induction(twice)) == 1 and script.attended(itself, script.induction(twice)) == 0
    uniform = np.tril(np.ones((12, 12)))
    uniform = np.broadcast_to(uniform / uniform.sum(1, keepdims=True), (2, 1, 1, 12, 12))
    assert script.entropy_score(first, real) == 0 and script.entropy_score(uniform, real) == pytest.approx(1)
    tokens = np.array([[0, 1, 3, 2, 0, 2], [1, 0, 2, 0, 2, 3]])
    partner, _ = data.bracket_structure(tokens, 2)
    matching = pattern(2, 6, lambda r, i: partner[r, i] if partner[r, i] >= 0 else i)
    ahead = pattern(2, 6, lambda r, i: partner[r, i + 1] if i < 5 and partner[r, i + 1] >= 0 else i)
    assert script.attended(matching, script.matching_bracket(tokens, 2)) == 1
    assert script.attended(pattern(2, 6, lambda r, i: i), script.matching_bracket(tokens, 2)) == 0
    assert script.attended(ahead, script.matching_bracket(tokens, 2, ahead=1)) == 1


def test_induction_counts_every_earlier_match_and_pads_count_nowhere():
    tokens = np.array([[1, 2, 1, 3, 1, 2, 1, 3]])  # after 1 came 2 and 3
    spread = np.zeros((1, 1, 1, 8, 8))
    for i in range(8):
        matches = [j + 1 for j in range(i) if tokens[0, j] == tokens[0, i]]
        spread[0, 0, 0, i, matches or [0]] = 1 / max(1, len(matches))
    assert script.attended(spread, script.induction(tokens)) == pytest.approx(1)
    real = np.arange(8)[None] < 4
    blurred_on_pads = pattern(1, 8, lambda r, i: 0)
    blurred_on_pads[0, 0, 0, 4:] = 1 / 8
    assert script.entropy_score(blurred_on_pads, real) == 0
    assert script.attended(blurred_on_pads, script.previous_token(real)) == pytest.approx(1 / 3)  # from place 1 of 1, 2, 3


def test_a_head_built_by_hand_to_look_at_the_token_before_scores_one(opened):
    c = opened("dyck:k=2,length=16", shape=(1, 1, 32))
    model = c.model
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.wpe.weight[:] = torch.eye(16, 32) * 10  # each place has a direction of its own
        model.h[0].ln_1.weight.fill_(1)
        query = torch.zeros(32, 32)
        query[torch.arange(15), torch.arange(1, 16)] = 100.0  # the query of place i is the direction of place i - 1
        query[0, 0] = 100.0
        model.h[0].attn.c_attn.weight[:32], model.h[0].attn.c_attn.weight[32:64] = query, torch.eye(32)
    attention = c.look_inside(c.rows()[0])[0]
    assert script.attended(attention, script.previous_token(np.ones((len(attention), 16), bool))) == pytest.approx(1, abs=1e-3)
    assert script.probe_heads(c).rows["previous token, which (layer.head)"][0] == "0.0"


def test_a_linear_probe_reads_planted_features_and_no_others():
    rng = np.random.default_rng(0)
    labels, train = rng.integers(0, 5, 4000), np.arange(4000) % 2 == 0
    planted = np.eye(5)[labels] @ rng.normal(size=(5, 24)) + 0.01 * rng.normal(size=(4000, 24))
    assert script.linear_probe(planted, labels, train) == 1.0
    assert script.linear_probe(rng.normal(size=(4000, 24)), labels, train) == pytest.approx(0.2, abs=0.05)


def test_what_linear_probes_look_for(opened):
    c = opened("dyck:k=2,length=6")
    found = script.linear_targets(c, np.array([[0, 1, 3, 0, 2, 2]]))
    assert found["bracket depth (9: or more)"].tolist() == [[1, 2, 1, 2, 1, 0]]
    assert found["innermost open bracket"].tolist() == [[0, 1, 0, 0, 0, -1]]
    c = opened("dyck_shuffle:k=2,length=6")
    assert script.linear_targets(c, np.array([[0, 1, 2, 0, 3, 2]]))["innermost open bracket"].tolist() == [[0, 1, 1, 0, 0, -1]]
    c = opened("stack:length=5,vocab=9")
    assert list(script.linear_targets(c, np.array([[3, 4, 0, 5, 0, 9, 3, 10]])).values())[0].tolist() == [
        [3, 4, 3, 5, 3, -1, -1, -1]]
    c = opened("set:length=4,vocab=9")
    assert list(script.linear_targets(c, np.array([[3, 4, 3, 3, 9, 3, 4, 10]])).values())[0].tolist() == [
        [0, 0, 1, 1, -1, -1, -1, -1]]


def test_the_state_planted_in_the_residual_stream_is_read_and_the_untrained_model_has_it_not(opened, monkeypatch):
    c = opened("dyck:k=2,length=32")
    original = script.Opened.look_inside

    def planted(self, x, model=None, attention=True):
        weights, residual = original(self, x, model, attention)
        if model is None:
            residual[:, 1, :, :10] = 100 * np.eye(10)[script.linear_targets(self, x)["bracket depth (9: or more)"]]
        return weights, residual
    monkeypatch.setattr(script.Opened, "look_inside", planted)
    rows = script.probe_linear(c).rows
    name = "bracket depth (9: or more), after layer"
    assert rows[f"{name} 0"][0] > 0.99 > 0.9 > rows[f"{name} 1"][0]
    assert rows[f"{name} 0: untrained"][0] < 0.9


# The command: tables side by side, eval.json, figures


@pytest.mark.parametrize("kind", ["rule", "brackets", "task", "text"])
def test_every_probe_that_fits_is_run_printed_kept_and_drawn(kind, checkpoints, monkeypatch, capsys):
    folder = checkpoints[kind].parent
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints[kind]), "--plot", "--batches", "2", "--device", "cpu"])
    script.main()
    printed, kept = capsys.readouterr().out, json.loads((folder / "eval.json").read_text())
    found = kept[f"{kind}.pt"][load(checkpoints[kind])[1]["source"]["spec"]]
    expected = {"rule": {"learned", "answers", "length", "linear"}, "brackets": {"learned", "brackets", "linear", "copying"},
                "task": {"learned", "answers", "errors"}, "text": {"context", "copying"}}[kind] | {"loss", "heads"}
    assert set(found) >= expected and all(f"\n{name}: " in printed for name in found)
    for name in expected - {"loss", "learned"}:
        assert (folder / f"eval-{kind}-{name}.png").read_bytes().startswith(b"\x89PNG") and found[name]["panels"]


def test_checkpoints_are_put_side_by_side(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints["rule"]), str(checkpoints["task"]), "--probe", "loss,learned,linear",
                                     "--batches", "2", "--device", "cpu"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1] ") and "rule.pt" in lines[0] and lines[1].startswith("[2] ")
    verdict = next(line for line in lines if line.startswith("verdict"))
    assert verdict.count("not learned") == 2
    assert any(line.rstrip().endswith(" -") for line in lines), "the task has no linear probe"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said_after_everything_was_printed(checkpoints, tmp_path, refused, capfd):
    save(tmp_path / "a.pt", load(checkpoints["rule"])[0], source=load(checkpoints["rule"])[1]["source"])
    tmp_path.chmod(0o500)
    assert "cannot write" in refused(script, tmp_path / "a.pt", "--probe", "loss", "--batches", "2")
    tmp_path.chmod(0o700)


def test_what_is_in_eval_json_stays_there(checkpoints, monkeypatch, refused):
    path = checkpoints["rule"].parent / "eval.json"
    path.write_text(json.dumps({"other.pt": {"dyck": {"loss": 1}}}))
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints["rule"]), "--probe", "loss", "--batches", "2", "--device", "cpu"])
    script.main()
    assert json.loads(path.read_text()).keys() == {"other.pt", "rule.pt"}
    path.write_text("{damaged")
    assert "eval.json" in refused(script, checkpoints["rule"], "--probe", "loss", "--batches", "2", "--device", "cpu")
    assert path.read_text() == "{damaged"
    path.unlink()


def test_probes_that_do_not_exist_or_do_not_fit_are_refused(checkpoints, refused):
    assert "there are loss" in refused(script, checkpoints["rule"], "--probe", "vibes")
    assert "does not fit" in refused(script, checkpoints["rule"], "--probe", "needle")
