"""What eval.py says of models, against models whose answers are known and counts by hand."""
import collections
import json
import math
import os
import pickle
import random
import resource

import numpy as np
import pytest
import torch

import data
import eval as script
from data import BAR, UserError, make_data
from model import GPT, GPTConfig, find_device, load, save


class Fake(GPT):
    """A model whose logits are what a function makes of its input."""
    def __init__(self, config, answer):
        super().__init__(config)
        self.answer, self.lm_head = answer, torch.nn.Identity()

    def states(self, idx, first=0):
        return torch.as_tensor(self.answer(idx.numpy()), dtype=torch.float32)[:, first:]


def right(x, y, vocab_size):
    """Logits that are sure of the right token wherever one counts."""
    return 30.0 * np.eye(vocab_size)[np.maximum(y, 0)]


@pytest.fixture
def opened(tmp_path):
    """Opens an untrained checkpoint; answer(x, y, vocab_size), if given, makes its logits, and may
    look at what is asked (x) and what is right (y, -1 where nothing counts)."""
    def make(spec, answer=None, block_size=None, size=(2, 2, 16)):
        them = make_data(spec, 0, block_size)
        torch.manual_seed(0)
        model = GPT(GPTConfig(them.vocab_size, them.block_size, *size))
        save(tmp_path / "ckpt.pt", model, source={"spec": spec, "tokenizer": "bytes", "seed": 0})
        c, known = script.Opened(tmp_path, "cpu"), {}
        get = c.data.val.__getitems__

        def get_and_remember(rows):
            x, y = get(rows)
            known.update(zip((row.numpy().tobytes() for row in x), y.numpy()))
            return x, y

        def logits(x):
            nothing = np.full(x.shape[1], -1)
            y = np.stack([known.get(row.tobytes(), nothing) for row in x])
            return answer(x, y, them.vocab_size)

        if answer:
            c.data.val.__getitems__ = get_and_remember
            c.model = Fake(model.config, logits).eval()
        return c
    return make


# Loss and accuracy


WORDS = [b"a", "né".encode(), b"four", b"<end>"]
TOKENIZER = data.Tokenizer("words", 4, None, lambda ts: b"".join(WORDS[t] for t in ts), end=3)


def bigrams():
    """Rows of which about half count, and a model that only sees the last token."""
    rng = np.random.default_rng(0)
    table, x = rng.normal(size=(4, 4)) * 2, rng.integers(0, 4, (40, 13))
    y = np.where(rng.random((40, 13)) < 0.6, rng.integers(0, 4, (40, 13)), -1)
    y[:, 8:] = -1
    y[3], y[5, 12] = -1, 2  # a row of which nothing counts, and one that is long
    model = Fake(GPTConfig(4, 13, 1, 1, 4), lambda x: table[x])
    return model, torch.from_numpy(x), torch.from_numpy(y), table


@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_evaluation_counts_as_one_counts_by_hand_in_any_number_of_parts(n):
    model, x, y, table = bigrams()
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


def test_without_text_there_are_no_bits_per_byte():
    model, x, y, _ = bigrams()
    assert script.evaluate(model, [(x, y)])["bits_per_byte"] is None


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_leaves_the_mode_as_it_was(training):
    model = GPT(GPTConfig(4, 13, 1, 1, 8, dropout=0.5)).train(training)
    _, x, y, _ = bigrams()
    assert script.evaluate(model, [(x, y)]) == script.evaluate(model, [(x, y)])
    assert model.training == training == model.h[0].training


@pytest.mark.parametrize("n", [1, 2, 6, 40, 100])
def test_micro_batches_are_the_same_rows_without_what_follows_the_last_that_counts(n):
    _, x, y, _ = bigrams()

    def needed(x, y):
        for tokens, wanted in zip(x.tolist(), y.tolist()):
            length = max((t + 1 for t in range(len(wanted)) if wanted[t] != -1), default=0)
            yield *tokens[:length], *wanted[:length]
    parts, rows = data.micro_batches(x, y, n), collections.Counter()
    for x_part, y_part in parts:
        assert x_part.shape == y_part.shape
        assert (y_part[:, -1] != -1).any() or (y_part == -1).all(1).any()
        rows.update(needed(x_part, y_part))
    assert len(parts) <= n and rows == collections.Counter(needed(x, y))
    whole = data.micro_batches(x, y, n, trim=False)
    assert len(whole) <= n and torch.equal(torch.cat([part for part, _ in whole]), x)


@pytest.mark.parametrize("asked,cuda,mps,found", [
    (None, 0, False, "cpu"), (None, 0, True, "mps"), (None, 2, True, "cuda"),
    ("cpu", 2, False, "cpu"), ("cuda:1", 2, False, "cuda:1"), ("mps", 0, True, "mps"),
    ("cuda", 0, False, None), ("cuda:2", 2, False, None), ("mps", 1, False, None),
    ("abacus", 1, True, None), ("cpu:0", 1, True, None)])
def test_the_device_is_the_best_or_the_named_one_or_refused(asked, cuda, mps, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if found:
        assert find_device(asked) == found
        return
    with pytest.raises(UserError, match=asked):
        find_device(asked)


# Brackets


def rows_of_brackets(name, k, length, p, depth=None):
    """Every row that the rules of brackets allow, and how probable each is."""
    found = {}

    def walk(row, left, chance):
        if len(row) == length:
            found[tuple(row)] = chance
            return
        full = len(left) == (length - len(row) if name == "dyck" else depth)
        opens = 1 if not left else 0 if full else p
        for kind in range(k):
            if opens:
                walk([*row, kind], [*left, kind], chance * opens / k)
        closable = left[-1:] if name == "dyck" else set(left)
        for kind in closable:
            if opens < 1:
                place = max(i for i, other in enumerate(left) if other == kind)
                rest = left[:place] + left[place + 1:]
                walk([*row, k + kind], rest, chance * (1 - opens) / len(closable))
    walk([], [], 1.0)
    return found


@pytest.mark.parametrize("name,p", [
    ("dyck", dict(k=2, length=6, p=0.4)), ("dyck", dict(k=1, length=8, p=0.7)),
    ("dyck_shuffle", dict(k=2, length=5, p=0.5, depth=3)),
    ("dyck_shuffle", dict(k=3, length=4, p=0.6, depth=2))])
def test_bracket_facts_give_each_row_the_probability_with_which_it_is_made(name, p):
    chances = rows_of_brackets(name, **p)
    assert sum(chances.values()) == pytest.approx(1)
    for row, chance in chances.items():
        odds = script.bracket_facts(np.array([row]), name, p)["odds"][0]
        assert np.allclose(odds.sum(1), 1)
        assert math.prod(odds[t, token] for t, token in enumerate(row)) == pytest.approx(chance)
    r, n, make = random.Random(0), 20_000, data.RULES_AND_TASKS[name].make
    came = collections.Counter(tuple(make(r, **p)[1]) for _ in range(n))
    assert came.keys() <= chances.keys()
    for row, chance in chances.items():
        assert came[row] / n == pytest.approx(chance, abs=5 * math.sqrt(chance / n))


@pytest.mark.parametrize("name,row,partner,depth,innermost", [
    ("dyck", [0, 1, 3, 2, 0, 2], [-1, -1, 1, 0, -1, 4], [0, 1, 2, 1, 0, 1],
     [0, 1, 0, -1, 0, -1]),
    ("dyck_shuffle", [0, 1, 2, 1, 3, 3], [-1, -1, 0, -1, 3, 1], [0, 1, 2, 1, 2, 1],
     [0, 1, 1, 1, 1, -1])])
def test_bracket_facts_say_what_closes_what(name, row, partner, depth, innermost):
    facts = script.bracket_facts(np.array([row]), name, data.parameters(name, "k=2"))
    assert facts["partner"].tolist() == [partner] and facts["depth"].tolist() == [depth]
    assert facts["innermost"].tolist() == [innermost]


def generator(name, **p):
    """Logits of one who knows the rules of brackets, by the slow way: an answer for `opened`."""
    chances = rows_of_brackets(name, **p)

    def answer(x, y, vocab_size):
        logits = np.full((*x.shape, vocab_size), -30.0)
        for i, row in enumerate(x.tolist()):
            for t in range(p["length"] - 1):
                odds = collections.Counter()
                for other, chance in chances.items():
                    if list(other[:t + 1]) == row[:t + 1]:
                        odds[other[t + 1]] += chance
                for token, chance in odds.items():
                    logits[i, t, token] = math.log(chance / odds.total())
        return logits
    return answer


@pytest.mark.parametrize("spec,name,p", [
    ("dyck:k=2,length=6,p=0.4", "dyck", dict(k=2, length=6, p=0.4)),
    ("dyck_shuffle:k=2,length=5,depth=2", "dyck_shuffle", dict(k=2, length=5, p=0.5, depth=2))])
def test_who_knows_the_rules_of_brackets_has_learned_them_and_closes_right(spec, name, p, opened):
    c = opened(spec, generator(name, **p))
    learned, brackets = script.probe_learned(c), script.probe_brackets(c)
    assert learned["verdict"] == "learned"
    assert learned["above it"] == pytest.approx(0, abs=1e-5)
    assert learned["learned so far (1: all)"] == pytest.approx(1, abs=1e-4)
    assert learned["smallest possible"] > 0.3
    assert brackets["closing bracket of a right type"] == 1
    for what in ("depth", "distance"):
        shares = brackets[f"share of a right type by {what} (brackets) from"]["model"]
        assert set(shares.values()) == {1}
    assert brackets["probability of illegal tokens"] == pytest.approx(0, abs=1e-6)


def who_weighs_all_rules(x, y, vocab_size):
    """Logits of one who knows that a row of 5 cells follows one of 256 rules, each as likely."""
    logits = np.full((*x.shape, vocab_size), -30.0)
    for i, row in enumerate(x.tolist()):
        left = set(range(256))
        for t in range(5, len(row)):
            frame, j = row[t - t % 5 - 5:t - t % 5], t % 5
            place = 4 * frame[j - 1] + 2 * frame[j] + frame[(j + 1) % 5]
            ones = {rule for rule in left if rule >> place & 1}
            for token, rules in ((0, left - ones), (1, ones)):
                logits[i, t - 1, token] = math.log(max(len(rules), 1e-9) / len(left))
            left = ones if row[t] else left - ones
    return logits


def test_what_can_be_known_of_a_rule_of_its_own_is_what_the_row_has_told(opened):
    c = opened("eca:rule=random,width=5,length=20", who_weighs_all_rules)
    found = script.probe_learned(c)
    assert found["above it"] == pytest.approx(0, abs=1e-5) and found["verdict"] == "learned"
    assert 0.2 < found["smallest possible"] < 0.4 < found["above it, the blind"]
    assert script.probe_answers(c) is None, "the first of its answers are a coin's"


def test_who_always_closes_the_other_type_is_never_right(opened):
    def closes_wrong(x, y, vocab_size):
        innermost = script.bracket_facts(x, "dyck", dict(k=2, p=0.5))["innermost"]
        return 30.0 * np.eye(vocab_size)[np.where(innermost == 0, 3, 2)]
    c = opened("dyck:k=2,length=20", closes_wrong)
    found = script.probe_brackets(c)
    assert found["closing bracket of a right type"] == 0
    assert found["probability of illegal tokens"] == pytest.approx(1) and found["by chance"] == 0.5
    assert script.probe_learned(c)["verdict"] == "not learned"


def test_brackets_of_varying_lengths_give_no_number_that_is_none(opened):
    c = opened("dyck:k=2,length=4-12")
    for name, probe in script.PROBES.items():
        found = probe(c)
        assert found is None or script.printed(found), name
        for label, value in script.printed(found or {}).items():
            assert isinstance(value, str) or math.isfinite(value), (name, label)


# Was it learned?


@pytest.mark.parametrize("spec", [
    "set:length=5", "stack:length=6", "haystack:pairs=3", "addition:digits=2", "sorting:numbers=3",
    "eca:width=4,length=12"])
def test_who_always_answers_right_has_learned_it_and_who_guesses_has_not(spec, opened):
    c = opened(spec, right)
    assert script.probe_learned(c)["verdict"] == "learned"
    found = script.probe_answers(c)
    assert found["all tokens"] == found["whole answers"] == 1
    assert set(found["share right by token of the answer"]["model"].values()) == {1}
    guesses = opened(spec, lambda x, y, vocab_size: np.zeros((*x.shape, vocab_size)))
    found = script.probe_learned(guesses)
    assert found["verdict"] == "not learned"
    assert found["loss (nats per counted token)"] == pytest.approx(math.log(c.data.vocab_size))


@pytest.mark.parametrize("above,verdict", [(0.09, "learned"), (0.11, "not learned")])
def test_learned_means_less_than_a_tenth_of_a_nat_above_the_smallest_loss(above, verdict, opened):
    def nearly(x, y, vocab_size):
        others = math.log((1 - math.exp(-above)) / (vocab_size - 1))
        return np.where(right(x, y, vocab_size) > 0, -above, others)
    found = script.probe_learned(opened("sorting:numbers=3", nearly))
    assert found["above it"] == pytest.approx(above, abs=1e-4) and found["verdict"] == verdict


def test_who_knows_only_how_often_tokens_come_has_not_learned_a_rule(opened):
    blind = opened("dyck:k=1,length=128", lambda x, y, vocab_size: np.zeros((*x.shape, vocab_size))
                   + np.array([0, 0, -30, -30]))
    found = script.probe_learned(blind)
    assert found["verdict"] == "not learned"
    assert found["above it"] == pytest.approx(found["above it, the blind"], abs=1e-3)
    assert found["learned so far (1: all)"] == pytest.approx(0, abs=1e-3)


# Where it fails


def test_answers_are_counted_by_the_place_in_the_answer(opened):
    def second_wrong(x, y, vocab_size):
        y = y.copy()
        y[:, 5] = (y[:, 5] + 1) % vocab_size
        return right(x, y, vocab_size)
    found = script.probe_answers(opened("sorting:numbers=4", second_wrong))
    assert found["share right by token of the answer"] == {"model": {1: 1, 2: 0, 3: 1, 4: 1}}
    assert found["all tokens"] == 0.75 and found["whole answers"] == 0


def test_other_lengths_are_asked_as_far_as_positions_go(opened):
    def sorts_up_to_five(x, y, vocab_size):
        y = np.zeros_like(x)
        for row, out in zip(x.tolist(), y):
            n = row.index(100)
            out[n:2 * n] = sorted(row[:n]) if n <= 5 else 0
        return right(x, y, vocab_size)
    found = script.probe_length(opened("sorting:numbers=4", sorts_up_to_five, 17))
    sizes = found["share of whole answers right by numbers"]["model"]
    assert sizes == {n: float(n <= 5) for n in sizes} and {1, 2, 3, 4, 5, 8} <= sizes.keys()
    assert max(sizes) == 8, "8 numbers, a separator and 8 numbers fill 17 positions"


@pytest.mark.parametrize("name", ["addition", "reversed_addition"])
def test_sums_are_told_apart_by_their_longest_chain_of_carries(name, opened):
    chains = collections.Counter()

    def longest_chain(row):
        a, b = row[:3], row[4:7]
        if name == "addition":
            a, b = a[::-1], b[::-1]
        carry, run, longest = 0, 0, 0
        for i, j in zip(a, b):
            carry = int(i + j + carry > 9)
            run = run + 1 if carry else 0
            longest = max(longest, run)
        chains[longest] += 1
        return longest

    def right_with_one(x, y, vocab_size):
        one = np.array([longest_chain(row) == 1 for row in x.tolist()])
        return right(x, y, vocab_size) * one[:, None, None]
    found = script.probe_errors(opened(f"{name}:digits=3", right_with_one))
    assert sorted(chains) == [0, 1, 2, 3]
    assert found["share of sums right by longest chain of carries"] == {
        "model": {n: float(n == 1) for n in range(4)}}


def test_haystacks_are_told_apart_by_size_and_by_depth_of_the_needle(opened):
    def right_in_first_half_of_small_ones(x, y, vocab_size):
        logits = right(x, y, vocab_size)
        for row, asked, each in zip(x.tolist(), (y != -1).argmax(1), logits):
            depth = row.index(row[asked] - 12) / asked
            each *= depth < 0.5 and asked <= 20
        return logits
    found = script.probe_errors(opened("haystack:pairs=12", right_in_first_half_of_small_ones))
    curves = found["share of needles found by depth of the needle (%)"]
    assert list(curves["11-15 pairs"].values()) == [0] * 5
    for group in ("1-5 pairs", "6-10 pairs"):
        assert 0 <= curves[group].pop("40-60") <= 1
        assert curves[group] == {"0-20": 1, "20-40": 1, "60-80": 0, "80-100": 0}
    assert found["11-15 pairs"] == 0 and 0.4 < found["6-10 pairs"] < found["1-5 pairs"] < 0.8


def test_the_loss_is_told_by_how_much_came_before(prose, opened):
    def right_after_eight(x, y, vocab_size):
        logits = right(x, y, vocab_size)
        logits[:, :8] = 0
        return logits
    found = script.probe_context(opened(str(prose), right_after_eight, 32))
    blind = pytest.approx(math.log(257), abs=1e-4)
    assert found["loss (nats per token) by tokens before, up to"] == {
        "model": {n: blind if n <= 8 else pytest.approx(0) for n in (1, 2, 4, 8, 16, 32)}}


def looks_back(x, y, vocab_size):
    """What followed the longest earlier match of what came last."""
    logits = np.zeros((*x.shape, vocab_size))
    for row, each in zip(x.tolist(), logits):
        for t in range(len(row)):
            best = 0
            for s in range(t):
                n = 0
                while n <= s and row[s - n] == row[t - n]:
                    n += 1
                if n and n >= best:
                    best, token = n, row[s + 1]
            if best:
                each[t, token] = 30
    return logits


def forgets_the_end(x, y, vocab_size):
    logits = looks_back(x, y, vocab_size)
    logits[:, -1] = 0
    return logits


def knows_nothing(x, y, vocab_size):
    return np.zeros((*x.shape, vocab_size))


def test_a_needle_in_text_is_found_by_one_who_looks_back_alone(prose, opened):
    shares = []
    for answer in (looks_back, forgets_the_end, knows_nothing):
        found = script.probe_needle(opened(str(prose), answer, 80))
        curve = found["share of numbers found by depth of the line (%)"]["model"]
        assert list(curve) == [0, 25, 50, 75, 100]
        shares.append(set(curve.values()))
    assert shares == [{1.0}, {0.0}, {0.0}]
    assert script.probe_needle(opened(str(prose), knows_nothing, 32)) is None, "no room"


def test_copying_is_seen_in_one_who_looks_back(opened):
    found = script.probe_copying(opened("sorting:numbers=20", looks_back))
    assert found["second copy right"] > 0.9
    assert found["loss on the second copy (nats)"] < found["loss on the first copy (nats)"] / 2
    found = script.probe_copying(opened("sorting:numbers=20", knows_nothing))
    assert found["loss on the second copy (nats)"] == pytest.approx(math.log(101), abs=1e-4)


def test_problems_are_solved_only_if_every_character_is_right(tmp_path, opened):
    def tokens(text):
        return [data.CHARACTERS.index(word) for word in text]

    def written(name, problems):
        row = []
        for asked, answer in problems:
            row += [*tokens(asked), data.ANSWER, *tokens(answer), data.PROBLEM]
        np.array([data.PROBLEM] + row * 5, np.uint16).tofile(tmp_path / "math" / name)
        return [name, 0, None]

    (tmp_path / "math").mkdir()
    small, large = [(f"{n}+{n}", str(2 * n)) for n in (1, 7)], [("90+90", "180")]
    pieces = [written("val-interpolate-sums-9.bin", small + large),
              written("val-extrapolate-sums_big-9.bin", large)]
    meta = {"vocab_size": 97, "tokenizer": "characters", "dtype": "uint16",
            "train": [written("train.bin", small)], "val": pieces}
    (tmp_path / "math" / "meta.json").write_text(json.dumps(meta))

    def doubles_small_numbers(x, y, vocab_size):
        wanted = np.zeros_like(x)
        for row, out in zip(x.tolist(), wanted):
            middle = len(row) - 1 - row[::-1].index(data.ANSWER)
            asked = "".join(data.CHARACTERS[t] for t in row[:middle] if t < data.PROBLEM)
            number = int(asked.partition("+")[0])
            answer = [*tokens(str(2 * number) if number < 10 else "181"), data.PROBLEM]
            out[-1] = answer[len(row) - 1 - middle]
        return right(x, wanted, vocab_size)
    c = opened(str(tmp_path / "math"), doubles_small_numbers, 16)
    c.problems = 3
    assert script.probe_problems(c) == {
        "n": "3 problems of each module",
        "interpolate, all modules": pytest.approx(2 / 3), "extrapolate, all modules": 0,
        "interpolate-sums": pytest.approx(2 / 3), "extrapolate-sums_big": 0}


# Its parts


def alike(T):
    return np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]


def test_entropy_of_heads_is_0_for_one_token_and_1_for_all_alike():
    sharp = np.zeros((6, 6))
    sharp[:, 0] = 1
    attention = np.stack([[[sharp, alike(6)]], [[sharp, alike(6)]]])  # (rows, layers, heads, T, T)
    assert script.entropy_of_heads(attention, np.ones((2, 6), bool))[0] == pytest.approx([0, 1])
    attention[:, :, 1, 4:] = sharp[4:]
    real = np.arange(6) < [[4], [3]]
    assert script.entropy_of_heads(attention, real)[0] == pytest.approx([0, 1]), "pads are no part"


def looks_at(place):
    """Attention (rows, 1, 1, T, T) of which place(row, t), of a list of tokens, gets all."""
    def attention(x):
        found = np.zeros((len(x), 1, 1, x.shape[1], x.shape[1]))
        for i, row in enumerate(x.tolist()):
            for t in range(len(row)):
                found[i, 0, 0, t, place(row, t)] = 1
        return found
    return attention


def opened_by(row, t):
    """Where the bracket that closes at t was opened; else t. Of dyck:k=2."""
    left = []
    for i, token in enumerate(row[:t + 1]):
        if token < 2:
            left.append(i)
        else:
            place = left.pop() if left else i  # some rows are random
    return place if row[t] >= 2 else t


def opened_by_next(row, t):
    following = opened_by(row, t + 1) if t + 1 < len(row) else t
    return min(following, t)


@pytest.mark.parametrize("name,place,never", [
    ("previous token", lambda row, t: max(0, t - 1), lambda row, t: t),
    ("induction", lambda row, t: max(0, t - len(row) // 2 + 1), lambda row, t: 0),
    ("matching bracket", opened_by, lambda row, t: t),
    ("bracket that closes next", opened_by_next, lambda row, t: len(row) - 1)])
def test_a_head_that_looks_where_a_probe_looks_gets_one_and_others_nothing(name, place, never,
                                                                           opened):
    c = opened("dyck:k=2,length=16")
    for where, score in ((place, 1), (never, 0)):
        c.attention = looks_at(where)
        found = script.probe_heads(c)
        assert found[f"{name}, strongest head"] == pytest.approx(score)
        assert found["entropy (1: all alike), sharpest head"] == 0
    c.attention = lambda x: np.broadcast_to(alike(x.shape[1]), (len(x), 1, 1, *[x.shape[1]] * 2))
    found = script.probe_heads(c)
    assert found[f"{name}, strongest head"] == pytest.approx(
        found[f"{name}, if all were attended to alike"])


def test_a_head_built_by_hand_to_look_at_the_token_before_is_found(opened):
    c = opened("set:length=7", size=(2, 2, 32))
    with torch.no_grad():
        for p in c.model.parameters():
            p.zero_()
        c.model.wpe.weight[:, :16] = 10 * torch.eye(15, 16)  # each place has a direction
        block = c.model.h[1]
        block.ln_1.weight.fill_(1)
        block.attn.c_attn.weight[16:31, 0:15] = 100 * torch.eye(15).roll(1, 1)  # q of head 1: t - 1
        block.attn.c_attn.weight[48:64, 0:16] = torch.eye(16)  # k of head 1: t
    found = script.probe_heads(c)
    assert found["previous token, which (layer.head)"] == "1.1"
    assert found["previous token, strongest head"] == pytest.approx(1, abs=1e-3)
    assert found["entropy (1: all alike), mean of heads"] > 0.7
    assert 0.01 > found["entropy (1: all alike), sharpest head"]


def test_a_linear_map_reads_what_was_planted_and_nothing_else():
    rng = np.random.default_rng(0)
    labels, train = rng.choice(4, 4000, p=[0.7, 0.1, 0.1, 0.1]), np.arange(4000) % 2 == 0
    noise = rng.normal(size=(4000, 24))
    planted = np.eye(4)[labels] @ rng.normal(size=(4, 24)) + 0.01 * noise
    assert script.linear_fit(planted, labels, train) == 1
    assert script.linear_fit(noise, labels, train) == pytest.approx(1 / 4, abs=0.05)


@pytest.mark.parametrize("spec,row,states", [
    ("dyck:k=2,length=6", [0, 1, 3, 0, 2, 2], [[1, 2, 1, 2, 1], [0, 1, 0, 0, 0, -1]]),
    ("dyck_shuffle:k=2,length=6", [0, 1, 2, 0, 3, 2], [[1, 2, 1, 2, 1], [0, 1, 1, 0, 0, -1]]),
    ("stack:length=5,vocab=9", [3, 4, 0, 5, 0, BAR, 3], [[3, 4, 3, 5, 3, -1, -1]]),
    ("set:length=4,vocab=9", [3, 4, 3, 3, BAR, 3, 4], [[0, 0, 1, 1, -1, -1, -1]]),
    ("union:length=4,vocab=9", [3, 3, BAR, 3, 5, BAR, 3], [[0, 1, -1, -1, -1, -1, -1]])])
def test_the_state_of_a_rule_is_what_one_would_say(spec, row, states, opened):
    c = opened(spec)
    x = np.array([[c.data.train.bars[0] if t == BAR else t for t in row]])
    assert [state[0].tolist() for state in script.rule_states(c, x).values()] == states


def test_a_state_planted_in_the_residual_stream_is_read_there_alone(opened):
    c = opened("dyck:k=2,length=32")
    rng = np.random.default_rng(0)

    def planted(x, model=None):
        stream = rng.normal(size=(len(x), 3, 32, 16))
        depth = np.where(x < 2, 1, -1).cumsum(1)
        if model is None:
            stream[:, 1, :, :10] += 1000 * np.eye(10)[np.minimum(depth, 9)]
        return stream
    c.residual = planted
    found = script.probe_linear(c)
    name = "bracket depth up to 9"
    curves = found[f"{name}, share right by layers passed"]
    chance = pytest.approx(found[f"{name}: chance"], abs=0.08)
    assert curves["model"] == {0: chance, 1: 1, 2: chance} and curves["untrained"][1] == chance
    assert curves["control task"][1] < 0.6, "its labels are random"


def test_the_residual_stream_is_what_goes_through_the_blocks(opened):
    c = opened("set:length=5")
    x = torch.from_numpy(c.rows(4)[0])
    other = GPT(c.model.config)
    for given, model in ((None, c.model), (other, other)):
        stream = torch.from_numpy(c.residual(x.numpy(), given))
        with torch.no_grad():
            torch.testing.assert_close(stream[:, 0], model.wte(x) + model.wpe.weight)
            torch.testing.assert_close(model.h[1](stream[:, 1]), stream[:, 2])
            torch.testing.assert_close(model.lm_head(model.ln_f(stream[:, 2])), model(x))


# The command


SPECS = {"rule": "set:length=4", "brackets": "dyck:k=2,length=12", "task": "haystack:pairs=3"}


@pytest.fixture
def checkpoints(tmp_path, prose):
    """An untrained checkpoint of each kind."""
    made = {}
    for name, spec in (SPECS | {"text": str(prose)}).items():
        them = make_data(spec, 0, 64 if name == "text" else None)
        torch.manual_seed(0)
        made[name] = tmp_path / f"{name}.pt"
        save(made[name], GPT(GPTConfig(them.vocab_size, them.block_size, 1, 2, 8)), stage="train",
             step=7, source={"spec": spec, "tokenizer": "bytes", "seed": 0})
    return made


@pytest.fixture
def printed(monkeypatch, capfd):
    """Runs the command -> what it printed."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", "--device", "cpu", *map(str, arguments)])
        capfd.readouterr()
        script.main()
        return capfd.readouterr().out
    return call


def findings(folder):
    def fail(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads((folder / "eval.json").read_text(), parse_constant=fail)


@pytest.mark.parametrize("kind,probes", [
    ("rule", "answers copying heads learned length linear loss"),
    ("brackets", "brackets copying heads learned linear loss"),
    ("task", "answers copying errors heads learned loss"),
    ("text", "context copying heads loss needle")])
def test_every_probe_that_fits_is_printed_kept_and_drawn(kind, probes, checkpoints, printed):
    image = pytest.importorskip("matplotlib.image")
    path = checkpoints[kind]
    text, spec = printed(path, "--plot"), load(path)[1]["source"]["spec"]
    kept = findings(path.parent)["%s.pt" % kind][spec]
    assert " ".join(sorted(kept)) == probes
    assert "train step 7" in text and spec in text
    lines = text.splitlines()
    for name, found in kept.items():
        assert any(line.startswith(f"{name}: ") for line in lines)
        numbers = [label for label in found if isinstance(found[label], float)]
        assert all(any(line.startswith(label) for line in lines) for label in numbers)
        assert found["step"] == 7 and f"({found['n']})" in text
        figure = path.parent / f"eval-{kind}-{name}.png"
        assert figure.exists() == any(isinstance(each, (dict, list)) for each in found.values())
        if figure.exists():
            assert image.imread(figure).std() > 0.02, "it is no empty picture"
    x, y = make_data(spec, 0, load(path)[0].config.block_size).val.__getitems__(range(16))
    loss = load(path)[0](x, y).item() / (y != -1).sum().item()
    assert kept["loss"]["loss (nats per counted token)"] == pytest.approx(loss, abs=0.05)


def test_checkpoints_stand_side_by_side(checkpoints, printed):
    text = printed(checkpoints["rule"], checkpoints["task"], "--probe", "learned,linear")
    lines = text.splitlines()
    assert lines[0].startswith("[1] ") and "rule.pt" in lines[0]
    assert lines[1].startswith("[2] ") and "task.pt" in lines[1]
    verdict = next(line for line in lines if line.startswith("verdict"))
    assert verdict.split() == ["verdict", "not", "learned", "not", "learned"]
    chance = next(line for line in lines if "chance" in line)
    assert chance.endswith(" -"), "a task has no such state"
    kept = findings(checkpoints["rule"].parent)
    assert kept["rule.pt"][SPECS["rule"]].keys() == {"learned", "linear"}
    assert kept["task.pt"][SPECS["task"]].keys() == {"learned"}


def test_similarity_is_one_for_a_turned_copy_and_the_kl_divergence_is_that_of_the_predictions(
        checkpoints, printed):
    path = checkpoints["rule"]
    other, spec = path.parent / "other.pt", SPECS["rule"]
    torch.manual_seed(5)
    model = GPT(load(path)[0].config)
    save(other, model, source={"spec": spec, "tokenizer": "bytes", "seed": 0})
    text = printed(path, path, other, "--probe", "similarity")
    line = next(line for line in text.splitlines() if line.startswith("KL divergence"))
    assert line.split()[-3:-1] == ["-", "0.0000"]
    found = findings(path.parent)["other.pt"][spec]["similarity"]
    c = script.Opened(path, "cpu")
    x = torch.from_numpy(c.rows()[0])
    real = torch.from_numpy(c.real(x.numpy()))
    p, q = (each(x).log_softmax(-1)[real].double() for each in (load(path)[0], model))
    assert found["KL divergence (nats)"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())

    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert script.cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    y, middle = rng.normal(size=(50, 3)), np.eye(50) - 1 / 50
    k, m = (middle @ each @ each.T @ middle for each in (x, y))
    hsic = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert script.cka(x, y) == pytest.approx(hsic)


def test_what_is_in_eval_json_stays_there(checkpoints, printed):
    folder = checkpoints["rule"].parent
    (folder / "eval.json").write_text(json.dumps({"other.pt": {"dyck": {"loss": 1}}}))
    printed(checkpoints["rule"], "--probe", "loss")
    printed(checkpoints["rule"], "--probe", "learned")
    printed(checkpoints["rule"], "--probe", "loss", "--data", "sort:length=4")
    kept = findings(folder)
    assert kept["other.pt"] == {"dyck": {"loss": 1}}
    assert kept["rule.pt"][SPECS["rule"]].keys() == {"loss", "learned"}
    assert kept["rule.pt"]["sort:length=4"].keys() == {"loss"}


def test_a_number_that_is_none_is_kept_as_null(opened):
    c = opened("set:length=4")
    found = {"there": np.float32(0.5), "none": np.float32(math.nan), "word": "yes",
             "curves": {"model": {1: np.float64(1), 2: math.nan}}}
    script.add_to_json(c, "loss", found)
    assert findings(c.folder)["ckpt.pt"]["set:length=4"]["loss"] == {
        "step": 0, "there": 0.5, "none": None, "word": "yes",
        "curves": {"model": {"1": 1.0, "2": None}}}


@pytest.mark.parametrize("text", ["{damaged", "[]", '{"rule.pt": 3}', '{"rule.pt": null}',
                                  '{"rule.pt": {"set:length=4": 7}}'])
def test_a_damaged_eval_json_is_refused_and_unharmed(text, checkpoints, refused):
    path = checkpoints["rule"].parent / "eval.json"
    path.write_text(text)
    assert "eval.json" in refused(script, checkpoints["rule"], "--probe", "loss")
    assert path.read_text() == text


@pytest.mark.parametrize("kind,arguments,reason", [
    ("rule", ["--probe", "vibes"], "there are loss"),
    ("rule", ["--probe", "loss,needle"], "does not fit"),
    ("text", ["--probe", "learned"], "does not fit"),
    ("brackets", ["--data", "set:length=3"], "tokens"),
    ("task", ["--data", "set:length=3"], "tokens"),
    ("brackets", ["--data", "dyck:k=1,length=12"], "tokens"),
    ("rule", ["--data", "haystack"], "haystack"), ("rule", ["--data", "dyke"], "dyke"),
    ("text", ["--tokenizer", "klingon"], "klingon"), ("rule", ["--device", "abacus"], "abacus"),
    ("rule", ["--temperature", "-1"], "temperature"), ("rule", ["--sample", "x"], "sample"),
    ("task", ["--prompt", "k0: seven ?k0"], "seven"), ("task", ["--prompt", ""], "''"),
    ("text", ["--prompt", ""], "''")])
def test_what_cannot_be_asked_is_refused_in_one_line(kind, arguments, reason, checkpoints, refused):
    assert reason in refused(script, checkpoints[kind], *arguments)


@pytest.mark.parametrize("told", [{}, {"source": {"tokenizer": "bytes"}}, {"source": {"spec": 3}}])
def test_who_says_not_what_it_was_trained_on_needs_data(told, tmp_path, prose, printed, refused):
    torch.manual_seed(0)
    save(tmp_path / "a.pt", GPT(GPTConfig(264, 32, 1, 1, 8)), **told)  # a padded vocabulary
    assert "--data" in refused(script, tmp_path / "a.pt")
    assert "bits per byte" in printed(tmp_path / "a.pt", "--data", prose, "--probe", "loss")


@pytest.mark.parametrize("told", [{"step": "x"}, {"step": None}, {"stage": [3]},
                                  {"source": {"spec": "set:length=4", "seed": "x"}}])
def test_odd_words_in_a_checkpoint_are_no_traceback(told, tmp_path, checkpoints, printed):
    state = {"source": {"spec": "set:length=4", "seed": 0}} | told
    save(tmp_path / "a.pt", load(checkpoints["rule"])[0], **state)
    try:
        assert "heads" in printed(tmp_path / "a.pt", "--probe", "heads")
    except UserError as error:
        assert "a.pt" in str(error)


def test_a_runs_folder_is_its_checkpoint(tmp_path, script, printed):
    run = script("train.py", "--data", "haystack:pairs=2", "--warmup", "dyck:k=2,length=8",
                 "--steps", 2, "--warmup_steps", 2, "--batch_size", 4, "--warmup_batch_size", 4,
                 "--eval_rows", 8, "--size", "1_1_8", "--device", "cpu", "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    text = printed(tmp_path / "run", tmp_path / "run" / "warmup.pt", "--probe", "learned,answers",
                   "--plot")
    lines = text.splitlines()
    assert lines[0].endswith("held-out haystack:pairs=2") and ": train step 2, " in lines[0]
    assert lines[1].endswith("held-out dyck:k=2,length=8") and ": warmup step 2, " in lines[1]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    kept = findings(tmp_path / "run")
    printed(tmp_path / "run" / "ckpt.pt", "--probe", "learned,answers", "--plot")
    assert findings(tmp_path / "run") == kept and kept.keys() == {"ckpt.pt", "warmup.pt"}
    assert {path.name for path in tmp_path.rglob("*.png")} == {"eval-ckpt-answers.png"}
    assert set(kept["warmup.pt"]["dyck:k=2,length=8"]) == {"learned"}
    loss = kept["ckpt.pt"]["haystack:pairs=2"]["learned"]["loss (nats per counted token)"]
    assert loss == pytest.approx(result["val_loss"], abs=0.1)


# Samples


def test_answers_of_a_task_are_said_to_be_right_or_wrong(checkpoints, printed, monkeypatch):
    model, state = load(checkpoints["task"])

    def finds_large_values(x):
        logits = np.zeros((*x.shape, 256))
        for row, each in zip(x.tolist(), logits):
            if row[-1] - 3 in row:
                value = row[row.index(row[-1] - 3) + 1]
                each[-1, value] = 1 if value > 40 else -1
        return logits
    fake = Fake(model.config, finds_large_values)
    monkeypatch.setattr(script, "load", lambda *_: (fake, state))
    lines = printed(checkpoints["task"], "--sample", 20, "--probe", "loss").splitlines()[2:42:2]
    assert len({line.endswith("right") for line in lines}) == 2
    for line in lines:
        *pairs, last = line.partition(" ▶ ")[0].split()
        value = int(pairs[pairs.index(last.removeprefix("?") + ":") + 1])
        verdict = f" ▶ {value}   right" if value > 40 else f"   wrong: {value}"
        assert line.endswith(verdict)


def test_samples_of_text_go_on_from_held_out_text(checkpoints, printed, prose):
    text = printed(checkpoints["text"], "--sample", 2, "--tokens", 5, "--probe", "heads")
    model, _ = load(checkpoints["text"])
    them = make_data(str(prose), 0, 64)
    for row in range(2):
        begin = them.val[row][0][:32]
        assert f"{them.write(begin)} ▶ " in text


@pytest.mark.parametrize("kind,prompt,write", [
    ("text", "The quick", lambda ts: bytes(ts).decode("utf-8", "replace")),
    ("task", "k0: 17 k2: 5 ?k0", None), ("rule", "7 3 7 |", None), ("brackets", "( [ ]", None)])
def test_a_prompt_is_gone_on_from_greedily_or_not(kind, prompt, write, checkpoints, printed):
    them = make_data(load(checkpoints[kind])[1]["source"]["spec"], 0)
    begin = torch.tensor([[int(token) for token in them.read(prompt)]])
    out = load(checkpoints[kind])[0].eval().generate(begin, 6, temperature=0)[0].tolist()
    expected = f"{prompt} ▶ {(write or them.write)(out[begin.shape[1]:])}\n"
    ask = [checkpoints[kind], "--prompt", prompt, "--tokens", 6]
    assert printed(*ask, "--temperature", 0).endswith(expected)
    assert printed(*ask, "--top_k", 1).endswith(expected)
    assert printed(*ask) == printed(*ask)
    assert printed(*ask, "--temperature", 0) != printed(*ask, "--temperature", 5)
    assert not (checkpoints[kind].parent / "eval.json").exists(), "no probe was asked"


def test_a_prompt_of_characters_is_read_with_the_folders_own_names(tmp_path, printed, refused):
    np.array([0, 1, 2] * 50, np.uint16).tofile(tmp_path / "train.bin")
    np.array([0, 1, 2] * 50, np.uint16).tofile(tmp_path / "val.bin")
    meta = {"vocab_size": 3, "itos": dict(enumerate("ab ")), "stoi": {"a": 0, "b": 1, " ": 2}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    save(tmp_path / "a.pt", GPT(GPTConfig(3, 8, 1, 1, 4)), source={"spec": str(tmp_path)})
    assert "\nab b ▶ " in printed(tmp_path / "a.pt", "--prompt", "ab b", "--tokens", 3)
    assert "'abc'" in refused(script, tmp_path / "a.pt", "--prompt", "abc")


def test_a_figure_that_finds_the_disk_full_leaves_the_old_one(tmp_path):
    path, limits = tmp_path / "a.png", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="a.png"):
            script.keep_figure(script.pyplot().figure(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["a.png"] and path.read_bytes() == b"old"
