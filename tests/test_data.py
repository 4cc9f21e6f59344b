"""Rules and tasks against slow oracles, masks token by token, purity of batches, corpora, specs that are refused."""
import collections
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load

import data
from conftest import Mirror
from data import RULES, TASKS, UserError, make_source

RNG = np.random.default_rng
PAD = -7  # stands for nothing in the oracles


def rows_of(name, n=200, seed=0, **params):
    """Rows of a rule as lists: (tokens without pads, which of them count)."""
    params = {**data.parameters(RULES[name]), **params}
    tokens, mask = RULES[name](RNG(seed), n, **params)
    assert tokens.shape == mask.shape and mask.dtype == bool
    pad = params["vocab"] + 1 if "vocab" in params else None
    for t, m in zip(tokens.tolist(), mask.tolist()):
        length = t.index(pad) if pad in t else len(t)
        assert all(x == pad for x in t[length:]) and not any(m[length:]), "pads stand at the end and never count"
        yield t[:length], m[:length]


def split_at(tokens, separator):
    pieces = [[]]
    for token in tokens:
        pieces.append([]) if token == separator else pieces[-1].append(token)
    return pieces


def run_stack(operations):
    stack = []
    for op in operations:
        if op == 0:
            stack.pop()
        else:
            assert op not in stack, "what is on the stack is never pushed"
            stack.append(op)
    return stack[::-1]


def without_first(x, target):
    x = list(x)
    if target in x:
        x.remove(target)
    return x


ORACLES = {
    "identity": lambda x: x, "reverse": lambda x: x[::-1], "sort": lambda x: sorted(x),
    "set": lambda x: list(dict.fromkeys(x)), "union": lambda x, y: list(dict.fromkeys(x + y)),
    "delete": lambda x, t: without_first(x, t[0]), "stack": run_stack}


@pytest.mark.parametrize("length", [20, (2, 20), 64, 3])
@pytest.mark.parametrize("name", ORACLES)
def test_input_output_rules_agree_with_plain_python_and_count_exactly_the_output(name, length):
    for vocab in (100, 6):
        lengths = set()
        for tokens, counted in rows_of(name, length=length, vocab=vocab):
            *inputs, output = split_at(tokens, vocab)
            assert output == ORACLES[name](*inputs)
            assert all(0 <= t <= vocab for t in tokens)
            assert counted == [False] * (len(tokens) - len(output)) + [True] * len(output)
            lengths.add(sum(map(len, inputs)) if name == "union" else len(inputs[0]))
        low, high = length if isinstance(length, tuple) else (length, length)
        expected = {n // 2 * 2 for n in range(low, high + 1)} if name == "union" else set(range(low, high + 1))
        assert lengths == expected


def test_symbols_are_uniform_from_1_to_vocab_minus_1():
    tokens, _ = RULES["identity"](RNG(0), 5000, length=20, vocab=11)
    share = np.bincount(tokens[:, :20].ravel(), minlength=13) / 100_000
    assert share[[0, 11, 12]].sum() == 0
    assert np.allclose(share[1:11], 0.1, atol=0.005)


def test_stack_pushes_as_often_as_published_and_ends_with_a_pop():
    pushes, chances = np.zeros(20), np.zeros(20)
    for tokens, _ in rows_of("stack", 4000, length=20):
        depth = 0
        for t, op in enumerate(tokens[:20]):
            if depth >= 2 and t < 19:
                pushes[t] += op != 0
                chances[t] += 1
            else:
                assert (op != 0) == (depth <= 1), "one symbol or fewer: push; the last operation: pop"
            depth += 1 if op else -1
    share = pushes[2:19] / chances[2:19]
    assert np.allclose(share[:11], 0.75, atol=0.03) and np.allclose(share[11:], 0.25, atol=0.03)


def test_dyck_is_balanced_and_each_closing_bracket_is_of_its_partners_type():
    for k, length in ((1, 2), (3, 40), (64, 128)):
        for tokens, counted in rows_of("dyck", k=k, length=length):
            stack = []
            for token in tokens:
                if token < k:
                    stack.append(token)
                else:
                    assert stack.pop() == token - k
            assert not stack and all(counted)


@pytest.mark.parametrize("p", [0.49, 0.2])
def test_dyck_opens_with_probability_p_where_it_may(p):
    tokens, _ = RULES["dyck"](RNG(1), 3000, k=4, length=64, p=p)
    opens = tokens < 4
    depth = np.cumsum(np.where(opens, 1, -1), axis=1) - np.where(opens, 1, -1)
    free = (depth > 0) & (depth < 64 - np.arange(64))
    assert abs(opens[free].mean() - p) < 4 * math.sqrt(p * (1 - p) / free.sum())
    assert np.allclose(np.bincount(tokens[opens]) / opens.sum(), 0.25, atol=0.01)


def test_dyck_sequences_have_the_frequencies_of_the_process():
    """All sequences of length 6 with one type: the walk's own probabilities, by hand."""
    p = 0.49
    tokens, _ = RULES["dyck"](RNG(2), 40000, k=1, length=6)
    seen = collections.Counter(map(tuple, (tokens == 0).tolist()))
    for word, count in seen.items():
        probability, depth = 1.0, 0
        for t, opening in enumerate(word):
            if 0 < depth < 6 - t:
                probability *= p if opening else 1 - p
            depth += 1 if opening else -1
        assert abs(count / 40000 - probability) < 0.012
    assert len(seen) == 5  # the Catalan number


def slow_dyck_shuffle(rng, k, length, p, depth):
    word, still_open = [], collections.Counter()
    for _ in range(length):
        total = still_open.total()
        if total == 0 or total < depth and rng.random() < p:
            bracket = int(rng.integers(k))
            still_open[bracket] += 1
        else:
            kinds = [b for b in range(k) if still_open[b]]
            bracket = kinds[rng.integers(len(kinds))]
            still_open[bracket] -= 1
            bracket += k
        word.append(bracket)
    return tuple(word)


def test_dyck_shuffle_closes_only_what_is_open_and_stays_within_its_depth():
    for tokens, counted in rows_of("dyck_shuffle", k=5, length=200, depth=4):
        still_open = collections.Counter()
        for token in tokens:
            still_open[token % 5] += 1 if token < 5 else -1
            assert min(still_open.values()) >= 0 and still_open.total() <= 4
        assert all(counted)


def test_dyck_shuffle_has_the_frequencies_of_a_slow_generator():
    n, rng = 20000, RNG(3)
    tokens, _ = RULES["dyck_shuffle"](RNG(4), n, k=2, length=5, depth=3)
    fast = collections.Counter(map(tuple, tokens.tolist()))
    slow = collections.Counter(slow_dyck_shuffle(rng, 2, 5, 0.5, 3) for _ in range(n))
    assert set(fast) == set(slow)
    for word in slow:
        assert abs(fast[word] - slow[word]) < 5 * math.sqrt(2 * slow[word]) + 5


@pytest.mark.parametrize("rule", [30, 90, 110])
def test_eca_follows_the_rule_table(rule):
    table = {tuple(map(int, f"{i:03b}")): rule >> i & 1 for i in range(8)}
    for tokens, counted in rows_of("eca", 50, rule=rule, width=7, length=40):
        for t in range(7, 40):
            row, cell = divmod(t, 7)
            above = tokens[(row - 1) * 7:row * 7]
            assert tokens[t] == table[above[cell - 1], above[cell], above[(cell + 1) % 7]]
        assert counted == [False] * 7 + [True] * 33


# Tasks


def decode_number(digits, least_first=False):
    return int("".join(map(str, digits[::-1] if least_first else digits)))


@pytest.mark.parametrize("name,digits,sign", [("addition", 5, "+"), ("reversed_addition", 10, "+"), ("addition", 1, "+"),
                                              ("multiplication", 5, "*"), ("multiplication", 9, "*"),
                                              ("addition", 17, "+")])
def test_arithmetic_tasks_are_right_digit_by_digit(name, digits, sign):
    tokens, mask = TASKS[name](RNG(0), 300, digits=digits)
    assert tokens.shape[1] == (5 if sign == "*" else 3) * digits + 4
    least_first = name == "reversed_addition"
    for t, m in zip(tokens.tolist(), mask.tolist()):
        a, b = decode_number(t[:digits], least_first), decode_number(t[digits + 1:2 * digits + 1], least_first)
        assert 10 ** (digits - 1) <= min(a, b) and max(a, b) < 10 ** digits
        answer = str(a * b if sign == "*" else a + b)[::-1 if least_first else 1]
        expected = [20 + int(d) for d in answer] + [30]
        end = 2 * digits + 2 + len(expected)
        assert (t[digits], t[2 * digits + 1]) == (10, 11)
        assert t[2 * digits + 2:end] == expected and set(t[end:]) <= {12}
        assert m == [2 * digits + 2 <= i < end for i in range(len(t))]


def test_haystack_asks_for_one_of_its_keys_and_counts_the_value_alone():
    tokens, mask = TASKS["haystack"](RNG(0), 500, pairs=30)
    assert tokens.shape == (500, 63)
    sizes = set()
    for t, m in zip(tokens.tolist(), mask.tolist()):
        end = t.index(0)
        query, answer = t[end - 2:end]
        pairs = dict(zip(t[:end - 2:2], t[1:end - 2:2]))
        assert len(pairs) == (end - 2) // 2 and set(pairs) <= set(range(128, 158))
        assert all(1 <= v <= 127 for v in pairs.values())
        assert pairs[query - 30] == answer and not any(t[end:])
        assert [i for i, counts in enumerate(m) if counts] == [end - 1]
        sizes.add(len(pairs))
    assert sizes == set(range(1, 31))


def test_sorting_sorts():
    tokens, mask = TASKS["sorting"](RNG(0), 100, numbers=7, below=50)
    for t, m in zip(tokens.tolist(), mask.tolist()):
        assert t[7] == 50 and t[8:] == sorted(t[:7]) and m == [False] * 8 + [True] * 7


@pytest.mark.parametrize("spec", ["addition:digits=2", "haystack:pairs=2"])
def test_no_training_batch_holds_a_held_out_example(spec):
    def examples(split, seed, batches):
        source = make_source(spec, split, seed)
        return {row.tobytes() for i in range(batches) for row in source.batch(i, 1000)[0]}
    held_out = examples("val", 0, 4)
    training = examples("train", 0, 150)
    assert held_out and training and not held_out & training
    assert held_out == examples("val", 0, 4) != examples("val", 1, 4)
    if spec.startswith("addition"):
        assert len(held_out | training) == 90 * 90, "between them they are all there is"


# Sources


ANY = ["dyck:k=4,length=30", "set+union:length=2-9", "shuffled:stack", "eca", "haystack", "math", "code"]


@pytest.mark.parametrize("spec", ANY)
def test_a_batch_is_a_pure_function_of_seed_split_and_index(spec):
    one, two = make_source(spec, seed=3), make_source(spec, seed=3)
    x, y = one.batch(5, 6)
    assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (6, one.block_size)
    assert x.min() >= 0 and max(x.max(), y.max()) < one.vocab_size and y.min() >= -1
    two.batch(90, 2)
    assert all(np.array_equal(a, b) for a, b in zip((x, y), two.batch(5, 6)))
    halves = [two.batch(10, 3), two.batch(11, 3)]
    assert np.array_equal(np.concatenate([h[0] for h in halves]), x), "rows do not depend on the size of a batch"
    assert not np.array_equal(make_source(spec, "val", 3).batch(5, 6)[0], x)
    assert not np.array_equal(make_source(spec, seed=4).batch(5, 6)[0], x)


def test_rows_that_cross_a_chunk_are_the_same_rows():
    source = make_source("dyck:length=4096,k=2")
    edge = source.chunk_rows
    x, _ = source.batch(1, edge - 1)
    assert np.array_equal(x[0], source.batch(edge - 1, 1)[0][0]) and np.array_equal(x[1], source.batch(edge, 1)[0][0])


@pytest.mark.parametrize("spec", ["dyck:k=4,length=30", "set:length=2-9", "haystack", "addition"])
def test_targets_are_the_next_tokens_where_the_rule_counts_them(spec):
    source = make_source(spec)
    name, params, _ = data.parse_member(spec, {**RULES, **TASKS})
    tokens, mask = source.draw(np.random.default_rng((0, 0, 0)), source.chunk_rows)
    x, y = source.batch(0, 50)
    for b in range(50):
        for t in range(source.block_size):
            follows = t + 1 < source.block_size and mask[b, t + 1]
            assert x[b, t] == tokens[b, t] and y[b, t] == (tokens[b, t + 1] if follows else -1)


def test_members_of_a_mixture_share_symbols_and_have_separators_of_their_own():
    source = make_source("0.7*set:length=20+0.3*dyck:k=10,length=24")
    assert source.vocab_size == 100 + 2 + 1 and source.block_size == 41
    x, y = source.batch(0, 4000)
    is_set, is_dyck = (x == 100).any(1), (x == 101).any(1)
    assert not (is_set & is_dyck).any() and (is_set | is_dyck).all()
    assert abs(is_set.mean() - 0.7) < 0.03
    assert (x[is_dyck, 0] == 101).all() and (x[is_dyck][:, 1:25] < 20).all() and (x[is_dyck][:, 25:] == 102).all()
    assert (y[is_dyck][:, 0] >= 0).sum() == is_dyck.sum() and (y[is_set][:, :20] == -1).all()


def test_members_without_parameters_take_those_of_the_last():
    _, members = data.parse_rules("0.7*set+0.3*union:length=32")
    assert [(w, n, p["length"]) for w, n, p in members] == [(0.7, "set", 32), (0.3, "union", 32)]
    assert [p["length"] for _, _, p in data.parse_rules("set:length=8+union:length=32")[1]] == [8, 32]


@pytest.mark.parametrize("spec", ["dyck:k=4,length=30", "set:length=2-9", "set+union"])
def test_the_shuffled_control_permutes_tokens_and_keeps_places_that_count(spec):
    plain, shuffled = make_source(spec), make_source("shuffled:" + spec)
    pad = plain.pad if "set" in spec else -1
    (x, y), (sx, sy) = plain.batch(0, 300), shuffled.batch(0, 300)
    assert np.array_equal((sx == pad).sum(1), (np.sort(sx) == pad).sum(1)) and sx.shape == x.shape
    places = np.arange(x.shape[1])
    assert ((sx == pad) == (places >= (sx != pad).sum(1, keepdims=True))).all(), "pads stay at the end"
    assert (sy[(sy != -1)] == np.roll(sx, -1, axis=1)[sy != -1]).all()
    tokens, mask = plain.generate(RNG(0), 200)
    s_tokens, s_mask = shuffled.generate(RNG(0), 200)
    assert np.array_equal(np.sort(tokens), np.sort(s_tokens)) and not np.array_equal(tokens, s_tokens)
    assert np.array_equal(mask, s_mask)


def test_the_curriculum_cuts_input_lengths_within_the_same_block():
    full, short = make_source("set:length=20"), make_source("set:length=20", longest=4)
    assert short.block_size == full.block_size == 41 and short.vocab_size == full.vocab_size and full.longest == 20
    x, _ = short.batch(0, 10)
    assert (x[:, 4] == 100).all() and (x[:, 9:] == 101).all()


# Corpora


def test_a_folder_is_split_by_document_and_every_window_comes_once_per_epoch(prose):
    train, val = (make_source(str(prose), split, block_size=32) for split in ("train", "val"))
    texts = [f.read_text() for f in prose.iterdir()]
    parts = [set(bytes(b if b < 256 else 0 for b in s.tokens).decode().split("\0")) - {""} for s in (train, val)]
    assert sorted(parts[0] | parts[1]) == sorted(texts) and not parts[0] & parts[1]
    assert 0.03 < len(val.tokens) / (len(train.tokens) + len(val.tokens)) < 0.15
    starts = train.epoch(0)
    assert len(set(starts.tolist())) == train.windows and starts.max() + 33 <= len(train.tokens)
    x, y = train.batch(0, train.windows)
    assert np.array_equal(x[:, 1:], y[:, :-1]) and not np.array_equal(train.batch(1, train.windows)[0], x)


def test_the_text_warm_up_reads_the_first_epoch_from_its_other_end(prose):
    train, other = (make_source(str(prose), split, block_size=32) for split in ("train", "warmup"))
    n = train.windows
    assert np.array_equal(train.batch(0, n)[0][::-1], other.batch(0, n)[0])


def test_validation_windows_do_not_depend_on_the_seed(prose):
    assert np.array_equal(*(make_source(str(prose), "val", seed, 32).batch(0, 3)[0] for seed in (0, 1)))


def test_the_cache_is_keyed_by_content_and_tokenised_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "a.txt"
    text.write_text("hello world " * 200)
    one = data.tokenise_files(str(text), "bytes")
    assert "tokenising" in capsys.readouterr().out
    assert data.tokenise_files(str(text), "bytes") == one and not capsys.readouterr().out
    text.write_text("hello there " * 200)
    assert data.tokenise_files(str(text), "bytes") != one
    assert [p for p in (tmp_path / "cache").iterdir() if p.name.startswith("tmp-")] == []


def test_jsonl_with_text_or_content(tmp_path):
    lines = [json.dumps({("text", "content")[i % 2]: f"document {i} " * 9}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = make_source(str(tmp_path / "a.jsonl"), block_size=16)
    assert "document" in source.decode(source.batch(0, 4)[0].ravel())


def test_nanogpt_folders_with_and_without_a_meta_file(tmp_path):
    for part in ("train", "val"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / f"{part}.bin")
    source = make_source(str(tmp_path), block_size=16)
    assert source.vocab_size == 50257 and source.batch(0, 4)[0].max() < 1000
    letters = {i: chr(i) for i in range(1000)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1000, "itos": letters, "stoi": {}}))
    source = make_source(str(tmp_path), block_size=16)
    assert source.vocab_size == 1000 and source.decode([97, 98]) == "ab" and source.token_bytes[200] == 2
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 10, "itos": {i: "x" for i in range(10)}}))
    with pytest.raises(UserError, match="vocabulary"):
        make_source(str(tmp_path), block_size=16).batch(0, 40)


def test_a_meta_file_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))
    np.zeros(99, np.uint16).tofile(tmp_path / "train.bin")
    np.zeros(99, np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="meta"):
        make_source(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_the_bytes_tokenizer_returns_every_text():
    tokenizer = data.load_tokenizer("bytes")
    text = "plain, naïve, 日本語, \U0001f600\r\n\t" + "".join(map(chr, range(32, 400)))
    assert tokenizer.encode_ordinary(text) == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert tokenizer.n_vocab == 257 and data.bytes_per_token(tokenizer).tolist() == [1] * 256 + [0]


def test_code_is_python_and_docs_are_english():
    code = make_source("code")
    assert "def " in "".join(code.decode(row) for row in code.batch(0, 40)[0])
    words = "Return the value of x if it is given."
    raw = f'def f(x):\n    """{words}\n\n    {words * 6}"""\n    return "not this"\n'.encode()
    assert data.docstrings(raw)[0].startswith(words) and "not this" not in data.docstrings(raw)[0]
    assert data.docstrings(b"def f(:") == []


def polynomial_value(text, x):
    return eval(text, {"x": x})  # our own generator's output, with ** and * as Python writes them


def test_every_answer_of_the_mathematics_corpus_is_right():
    rng, kinds = RNG(0), collections.Counter()
    for _ in range(6000):
        question, answer = data.math_question(lambda low, high: int(rng.integers(low, high + 1)))
        kinds[question.split()[0]] += 1
        if m := re.fullmatch(r"What is (-?\d+) ([-+*]) \(?(-?\d+)\)?\?", question):
            assert int(answer) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[m[2]](int(m[1]), int(m[3]))
        elif m := re.fullmatch(r"Divide (-?\d+) by (\d+)\.", question):
            assert int(answer) * int(m[2]) == int(m[1])
        elif m := re.fullmatch(r"Solve (.*) = (-?\d+) for x\.", question):
            assert polynomial_value(m[1], int(answer)) == int(m[2])
        elif m := re.fullmatch(r"Which is larger, (\d+)/(\d+) or (\d+)/(\d+)\?", question):
            p, q, r, s = map(int, m.groups())
            assert answer == ("equal" if p * s == r * q else f"{p}/{q}" if p / q > r / s else f"{r}/{s}")
        elif m := re.fullmatch(r"Is (-?\d+) less than (-?\d+)\?", question):
            assert answer == ("yes" if int(m[1]) < int(m[2]) else "no")
        elif m := re.fullmatch(r"Does (\d+) divide (\d+)\?", question):
            assert answer == ("yes" if int(m[2]) % int(m[1]) == 0 else "no")
        elif m := re.fullmatch(r"What remains when (\d+) is divided by (\d+)\?", question):
            assert int(answer) == int(m[1]) % int(m[2])
        elif m := re.fullmatch(r"Write (\d+) in base (\d+)\.", question):
            assert int(answer, int(m[2])) == int(m[1])
        elif m := re.fullmatch(r"Which number is (\w+) in base (\d+)\?", question):
            assert int(answer) == int(m[1], int(m[2]))
        elif m := re.fullmatch(r"Let f\(x\) = (.*)\. What is f\((-?\d+)\)\?", question):
            assert int(answer) == polynomial_value(m[1], int(m[2]))
        elif m := re.fullmatch(r"Find the derivative of (.*) with respect to x\.", question):
            for x in (-2, 0, 3):  # cubics at most: the central difference with h = 1 is off by the cubic coefficient
                slope = (polynomial_value(m[1], x - 2) - 8 * polynomial_value(m[1], x - 1)
                         + 8 * polynomial_value(m[1], x + 1) - polynomial_value(m[1], x + 2)) / 12
                assert slope == polynomial_value(answer, x)
        elif m := re.fullmatch(r"Expand (.*)\.", question):
            assert all(polynomial_value(m[1], x) == polynomial_value(answer, x) for x in (-3, 0, 1, 5))
        else:
            raise AssertionError(question)
    assert len(kinds) >= 9


def test_no_mathematics_question_is_in_both_splits():
    def questions(split):
        source = make_source("math", split)
        text = "".join(source.decode(row) for row in source.batch(0, 400)[0])
        return set(text.split("\n")[2:-2:1])
    train, val = ({q for q in questions(split) if q.endswith(("?", "."))} for split in ("train", "val"))
    assert len(train) > 500 and len(val) > 500 and not train & val


# What a person sees, and what is refused


@pytest.mark.parametrize("spec,expected", [
    ("identity:length=3", r"\d+ \d+ \d+ \| «\d+ \d+ \d+»"), ("stack:length=5", r"[\dpo ]+ \| «[\d ]+»[ _]*"),
    ("dyck:k=3,length=8", r"[(\[{] «[()\[\]{} ]+»"), ("eca:width=8,length=24", r"([·█]{8}\n){2}[·█]{8}"),
    ("haystack:pairs=1", r"k0: \d+ \?k0 «\d+» _"), ("addition:digits=2", r"\d\d\+\d\d=«\d+\.»_?"),
    ("sorting:numbers=2", r"\d+ \d+ \| «\d+ \d+»"), ("set+dyck", r"(\|dyck\| «[()\d ]+»|[\d ]+\|set\| «[\d ]+»)[ _]*")])
def test_sequences_are_shown_as_a_person_would_write_them(spec, expected, capsys):
    data.show(spec, 4, 0, "train", "bytes")
    shown = capsys.readouterr().out.strip().split("\n\n")[1:]
    assert len(shown) == 4 and all(re.fullmatch(expected, row) for row in shown), shown


def test_list_names_everything(script):
    listing = script("data.py", "list").stdout
    assert all(name in listing for name in [*RULES, *TASKS, "code", "docs", "math", "k=16", "pairs=30"])


@pytest.mark.parametrize("spec", ["dyck:k=0", "eca:rule=256", "dyck:length=7", "dyck:p=2", "set:length=9-2", "dyck:length=2-8",
                                  "set:vocab=2", "set:wide=3", "set:length", "set:length=x", "dyke", "set+dyke", "haystack:pairs=65",
                                  "addition:digits=0", "multiplication:digits=10", "-1*set+union", "a*set", "union:length=1", "eca:width=16,length=16",
                                  "shuffled:haystack", "no/such/file", "addition:digits=1,digits=1", "set:length=0", ""])
def test_bad_specs_are_refused_in_one_line(spec, refused):
    refused(data, "show", spec)


def test_an_unknown_name_is_answered_with_those_there_are(refused):
    line = refused(data, "show", "dyk")
    assert "dyck" in line and "haystack" in line and "code" in line


def test_a_sequence_longer_than_the_block_is_refused():
    with pytest.raises(UserError, match="longer than the block of 40"):
        make_source("set:length=20", block_size=40)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00binary", b"too short", b"nul \0 byte"])
def test_empty_binary_and_short_corpora_are_refused(content, tmp_path, refused):
    (tmp_path / "corpus.txt").write_bytes(content)
    refused(data, "show", tmp_path / "corpus.txt")


def test_line_separators_within_a_document_do_not_end_it(tmp_path):
    text = "one\u2028two\x85three\x0bfour " * 40
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text + str(i)}, ensure_ascii=False) + "\n" for i in range(9)))
    source = make_source(str(tmp_path / "a.jsonl"), block_size=64)
    assert "one\u2028two\x85three" in source.decode(source.tokens[:1000])


def test_bad_json_lines_and_empty_folders_are_refused(tmp_path, refused):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    assert "line 2" in refused(data, "show", tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    refused(data, "show", tmp_path / "empty")


def test_a_vocabulary_that_cannot_be_fetched_names_the_offline_tokenizer(tmp_path, script):
    text = tmp_path / "a.txt"
    text.write_text("hello world " * 99)
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}
    done = script("data.py", "show", text, "--tokenizer", "gpt2", env=nowhere)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--tokenizer bytes" in done.stderr
    assert script("data.py", "show", text, "--tokenizer", "klingon").returncode == 2


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch, refused):
    (tmp_path / "a.txt").write_text("hello world " * 99)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path / "file" / "cache"))
    assert "NANOWARM_CACHE" in refused(data, "show", tmp_path / "a.txt")


# Published corpora ----------------------------------------------------------------------------------------------------


def contents(folder):
    """Every file of a prepared corpus, as bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "RETRY_AFTER", (0.01,) * 5)
    return tmp_path / "cache"


def prepare(name, **changes):
    return data.prepare(name, **{"tokenizer_name": None if name == "deepmind_math" else "bytes", "val_tokens": 20_000,
                                 "tokens": 3_000_000 if name == "c4" else 60_000, **changes})


@pytest.fixture(scope="module")
def whole(published, tmp_path_factory):
    """What an undisturbed preparation of each corpus leaves: from a folder, one worker."""
    results = {}
    for name in data.PUBLISHED:
        os.environ["NANOWARM_CACHE"], before = str(tmp_path_factory.mktemp("whole")), os.environ["NANOWARM_CACHE"]
        results[name] = contents(prepare(name, source=str(published)))
        os.environ["NANOWARM_CACHE"] = before
    return results


@pytest.mark.parametrize("name", list(data.PUBLISHED))
def test_a_mirror_and_two_workers_give_the_same_bytes_as_a_folder_and_one(name, mirror, own_cache, whole):
    assert contents(prepare(name, source=mirror.url, workers=2)) == whole[name]


def test_documents_come_in_order_each_ended_by_end_of_text(published, own_cache):
    folder = prepare("c4", source=str(published), tokens=1_000_000)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    with gzip.open(published / "en/c4-train.00000-of-01024.json.gz") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(100)]
    assert len(tokens) == 1_000_000
    assert bytes(tokens[:2000]).decode("utf-16-le")  # every token fits
    encoded = np.concatenate([[*text.encode(), 256] for text in texts])
    assert np.array_equal(tokens[:len(encoded)], encoded)


def test_wikitext_is_cut_into_articles(published, own_cache):
    folder = prepare("wikitext103", source=str(published), tokens=10 ** 9)
    source = data.make_source("wikitext103", tokenizer="bytes", block_size=64)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    articles = "".join(map(chr, np.where(tokens == 256, 0, tokens))).split("\0")
    assert len(articles) == 201 and not articles[-1]
    assert all(article.strip().startswith("= Title") and "= = Part = =" in article for article in articles[:-1])
    assert source.vocab_size == 257 and source.decode(source.batch(0, 1)[0][0])


@pytest.mark.parametrize("fault", ["cut", "truncate", "corrupt", "refuse", "delay", "no ranges"])
def test_a_server_that_misbehaves_changes_nothing(fault, mirror, own_cache, whole):
    for i in range(3):
        mirror.faults[f"c4-train.{i:05}-of-01024.json.gz"] = [fault, None] if fault != "cut" else ["cut"] * 4
    mirror.faults["c4-train.00001-of-01024.json.gz"][:0] = ["cut"] if fault == "no ranges" else []
    assert contents(prepare("c4", source=mirror.url)) == whole["c4"]


def test_a_cut_connection_goes_on_from_where_it_broke(mirror, own_cache, published):
    file = "c4-train.00000-of-01024.json.gz"
    mirror.faults[file] = ["cut", "cut"]
    prepare("c4", source=mirror.url, tokens=100_000, val_tokens=1000)
    spans = [span for path, span in mirror.requests if path.endswith(file)]
    size = (published / "en" / file).stat().st_size
    assert spans == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]


def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(mirror, own_cache, whole):
    arguments = [sys.executable, data.__file__, "prepare", "c4", "--source", mirror.url, "--val_tokens", "20000",
                 "--tokens", "3M", "--workers", "2", "--tokenizer", "bytes"]
    mirror.faults = {"c4-validation.00000-of-00008.json.gz": ["delay"]}  # so that the first is not over too soon
    rng, kills = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            assert process.wait(timeout=rng.uniform(0.3, 1.0) if kills < 6 else 60) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills and contents(data.prepared_folder("c4", "bytes")) == whole["c4"]


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


@pytest.mark.parametrize("name", ["codeparrot", "deepmind_math"])
@pytest.mark.parametrize("at", range(1, 9))
def test_killed_at_each_file_it_puts_in_place_it_ends_with_the_same_bytes(at, name, published, own_cache, whole, monkeypatch):
    original, count = Path.replace, iter(range(1, 100))

    def dies(self, target):
        if next(count) == at:
            raise Killed
        return original(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with contextlib.suppress(Killed):
            prepare(name, source=str(published))
    assert contents(prepare(name, source=str(published))) == whole[name]


def test_nothing_is_fetched_twice(mirror, own_cache, published, monkeypatch):
    monkeypatch.setattr(data.Progress, "say", lambda self: self.tokens < 2_500_000 or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the preparation breaks off in its second file
        prepare("c4", source=mirror.url)
    monkeypatch.undo()
    monkeypatch.setenv("NANOWARM_CACHE", str(own_cache))
    before = len(mirror.requests)
    prepare("c4", source=mirror.url)
    again = [path for path, _ in mirror.requests[before:]]
    assert "/en/c4-train.00000-of-01024.json.gz" not in again and "/en/c4-validation.00000-of-00008.json.gz" not in again


def test_asking_for_more_goes_on_and_gives_what_asking_at_once_gives(mirror, own_cache, whole):
    prepare("c4", source=mirror.url, tokens=1_700_000, val_tokens=1000)
    assert contents(prepare("c4", source=mirror.url)) == whole["c4"]
    requests = len(mirror.requests)
    assert contents(prepare("c4", source=mirror.url, tokens=5)) == whole["c4"] and len(mirror.requests) == requests


@pytest.mark.parametrize("name,more", [("c4", 5_000_000), ("deepmind_math", 90_000)])
def test_while_more_is_prepared_what_is_there_stays_as_it_is(name, more, published, own_cache, tmp_path, monkeypatch):
    folder = prepare(name, source=str(published))
    before, tokens = contents(folder), np.memmap(folder / "train.bin", np.uint16, mode="r")
    seen = tokens.copy()
    with pytest.raises(data.UserError):
        prepare(name, tokens=10 ** 9 if name == "c4" else more, source=str(tmp_path))  # there is nothing there
    assert {k: v for k, v in contents(folder).items() if k in ("train.bin", "val.bin", "meta.json")} == {
        k: v for k, v in before.items() if k in ("train.bin", "val.bin", "meta.json")}
    data.make_source(name, tokenizer=None if name == "deepmind_math" else "bytes")
    prepare(name, tokens=more, source=str(published))
    assert (tokens == seen).all() and (folder / "train.bin").stat().st_size >= 2 * len(tokens)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_damaged_journal_costs_work_and_nothing_else(damage, published, own_cache, whole):
    folder = prepare("codeparrot", source=str(published))
    (folder / "meta.json").write_text(damage)
    (folder / "train.json").write_text(damage)
    assert contents(prepare("codeparrot", source=str(published))) == whole["codeparrot"]


def test_an_archive_that_holds_none_of_the_data_is_refused(refused, own_cache, published, tmp_path):
    with tarfile.open(tmp_path / "mathematics_dataset-v1.0.tar.gz", "w:gz") as archive:
        archive.add(published / "en", "other")
    assert "nothing for val" in refused(data, "prepare", "deepmind_math", "--source", tmp_path)
    assert not (data.prepared_folder("deepmind_math", "characters") / "meta.json").exists()
    prepare("deepmind_math", source=str(published))


def test_asking_deepmind_math_for_more_takes_more_of_every_module(mirror, own_cache, whole):
    prepare("deepmind_math", source=mirror.url, tokens=20_000)
    assert contents(prepare("deepmind_math", source=mirror.url)) == whole["deepmind_math"]


def test_a_preparation_that_cannot_go_on_says_why_and_keeps_what_it_has(refused, mirror, own_cache, published, tmp_path):
    arguments = ("prepare", "c4", "--tokenizer", "bytes", "--val_tokens", "1K", "--workers", "1", "--tokens")
    assert "is damaged" in refused(data, *arguments, "5M", "--source", damaged_copy(published, tmp_path))
    line = refused(data, *arguments, "100M", "--source", mirror.url)  # there are four files
    assert "c4-train.00004" in line and "404" in line and "tokens of train are done" in line
    assert "not in" in refused(data, *arguments, "200M", "--source", tmp_path)
    mirror.server.shutdown()
    mirror.server.server_close()
    assert "cannot fetch" in refused(data, *arguments, "200M", "--source", mirror.url)
    assert "neither" in refused(data, *arguments, "200M", "--source", "nonsense://x")


def damaged_copy(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "damaged")
    file = folder / "en/c4-train.00001-of-01024.json.gz"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def test_bad_orders_of_preparation_are_refused(refused, own_cache, published):
    assert "invalid choice" in refused(data, "prepare", "c5")
    assert "such as 700M" in refused(data, "prepare", "c4", "--tokens", "many")
    assert "at least 1" in refused(data, "prepare", "c4", "--tokens", "0")
    assert "characters" in refused(data, "prepare", "deepmind_math", "--tokenizer", "bytes")
    assert "python data.py prepare c4" in refused(data, "show", "c4")


def test_one_preparation_of_a_corpus_at_a_time(own_cache, published):
    folder = data.prepared_folder("c4", "bytes")
    folder.mkdir(parents=True)
    with data.only_one(folder), pytest.raises(data.UserError, match="another process"):
        prepare("c4", source=str(published))


def test_memory_stays_flat_however_large_the_corpus(tmp_path, own_cache):
    document = json.dumps({"text": "a line of text about nothing in particular, " * 200}) + "\n"
    (tmp_path / "en").mkdir()
    for name, lines in (("train.00000-of-01024", 7500), ("validation.00000-of-00008", 10)):
        with gzip.open(tmp_path / f"en/c4-{name}.json.gz", "wt", compresslevel=1) as file:
            file.writelines(itertools.repeat(document, lines))  # 66 MB of text, 132 MB of tokens
    code = ("import data, resource, sys\nif __name__ == '__main__':\n"
            "    data.prepare('c4', int(sys.argv[1]), 1000, 1, sys.argv[2], 'bytes')\n"
            "    print(*(resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))")
    (tmp_path / "measure.py").write_text(code)
    peaks = [subprocess.run([sys.executable, tmp_path / "measure.py", str(tokens), str(tmp_path)], check=True, text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)})
             for tokens in (10 ** 6, 66 * 10 ** 6)]
    small, large = ([int(mb) for mb in peak.stdout.split()[-2:]] for peak in peaks)
    assert large[0] < small[0] + 40 and large[1] < small[1] + 40


def test_answers_of_problems_are_what_the_loss_counts(published, own_cache):
    prepare("deepmind_math", source=str(published))
    for split in ("train", "val"):
        source = data.make_source("deepmind_math", split, block_size=200)
        x, y = source.batch(3, 8)
        for row, targets in zip(x, y):
            text = "".join(list(data.CHARACTERS)[t] for t in row)
            assert text.startswith("<problem>What is ")
            counted = "".join(list(data.CHARACTERS)[t] for t in targets if t >= 0).split("<problem>")
            sums = [eval(q.removeprefix("What is ").split("?")[0]) for q in text.split("<problem>")[1:] if "<answer>" in q]
            assert sums[:-1] == list(map(int, counted[:len(sums) - 1])) and len(sums) > 3


def test_problems_are_found_by_module_and_split(published, own_cache):
    prepare("deepmind_math", source=str(published))
    problems = data.make_source("deepmind_math", "val").problems(5)
    assert list(problems) == ["interpolate/numbers__gcd", "interpolate/algebra__linear_1d",
                              "interpolate/arithmetic__add_or_sub", "extrapolate/arithmetic__add_or_sub_big"]
    letters = list(data.CHARACTERS)
    for part, found in problems.items():
        assert len(found) == 5
        for question, answer in found:
            question, answer = "".join(letters[t] for t in question), "".join(letters[t] for t in answer)
            assert part.split("/")[1].removesuffix("_big") in question and question.endswith("<answer>")
            assert str(eval(question.removeprefix("<problem>What is ").split("?")[0])) + "<problem>" == answer


def write_vocabulary(folder):
    """A vocabulary in the format of GPT-2's vocab.bpe and encoder.json: 256 bytes and 50,000 pairs of them."""
    order = sorted(range(256), key=lambda b: (not chr(b).isprintable() or chr(b) == " ", b))
    letters = {b: chr(b) if chr(b).isprintable() and chr(b) != " " else chr(256 + i - 188) for i, b in enumerate(order)}
    pairs = [letters[a] + " " + letters[b] for a in order for b in order][:50_000]
    vocabulary = [letters[b] for b in order] + [pair.replace(" ", "") for pair in pairs] + ["<|endoftext|>"]
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    return {hashlib.sha256((folder / name).read_bytes()).hexdigest(): expected for name, expected in (
        ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"))}


def test_gpt2s_vocabulary_is_fetched_checked_and_used(published, mirror, own_cache, tmp_path, monkeypatch, refused):
    """tiktoken's own loading, with its addresses led to a server here and its checksums to these files'."""
    (tmp_path / "files").mkdir()
    expected, server, fetch = write_vocabulary(tmp_path / "files"), Mirror(tmp_path / "files"), tiktoken.load.read_file
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: fetch(f"{server.url}/{url.split('/')[-1]}"))
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda raw, wanted: expected.get(hashlib.sha256(raw).hexdigest()) == wanted)
    order = ("prepare", "c4", "--tokens", "200K", "--val_tokens", "5K", "--workers", "1", "--source", mirror.url)
    server.faults = {"vocab.bpe": ["corrupt", "refuse"]}
    for fault in ("ValueError", "HTTPError"):
        assert fault in refused(data, *order)
    monkeypatch.setattr("sys.argv", ["data.py", *order])
    monkeypatch.setattr(data, "text_pieces", functools.partial(in_this_process, data.text_pieces))
    data.main()
    server.server.shutdown()
    source = make_source("c4", "val", block_size=64)
    assert source.vocab_size == 50257 and source.tokens.dtype == np.uint16
    with gzip.open(published / "en/c4-validation.00000-of-00008.json.gz", "rt") as file:
        first = json.loads(file.readline())["text"]
    assert source.decode(source.tokens[:2000]).startswith(first + "<|endoftext|>")
    end = source.tokens.tolist().index(50256)
    assert source.token_bytes[source.tokens[:end]].sum() == len(first.encode()) > end


def in_this_process(text_pieces, files, names, split, tokenizer, workers, place, progress):
    """A worker of its own would fetch the vocabulary from where it really is."""
    data.start_worker.tokenizer = tokenizer
    for number in range(place[0], len(names)):
        path = files.get(names[number])
        for chunk in data.in_chunks(data.records(path, split)):
            yield data.tokenise_chunk(chunk, True)[0], [number, 0], None


def test_bench_says_how_fast_data_are_made_and_what_share_of_a_core_a_consumer_takes(monkeypatch, capfd, refused):
    monkeypatch.setattr("sys.argv", ["data.py", "bench", "set:length=4", "addition", "--consumer", "100k"])
    data.main()
    header, *lines = capfd.readouterr().out.splitlines()
    assert "core for 0.1M/s" in header and [line.split()[0] for line in lines] == ["set:length=4", "addition"]
    assert all(float(line.split()[-3]) > 0 and line.split()[-1].endswith("%") for line in lines)
    assert "unknown" in refused(data, "bench", "nonsense")


def test_long_rows_come_in_chunks_of_many_and_are_the_same_in_any_batch():
    source = make_source("dyck:k=4,length=2048")
    assert source.chunk_rows == 2048 and source.batch(0, 1)[0].dtype == np.int64
    four = make_source("dyck:k=4,length=2048").batch(512, 4)  # the first rows of the second chunk
    assert np.array_equal(four[0][:1], source.batch(2048, 1)[0]) and np.array_equal(four[1][3:], source.batch(2051, 1)[1])


@pytest.mark.parametrize("spec", ["stack:length=4,vocab=50000", "dyck_shuffle:k=20000,length=4", "set:length=4,vocab=50000", "dyck:k=20000,length=4"])
def test_large_vocabularies_fit_into_the_symbols_and_the_memory(spec):
    x, y = make_source(spec).batch(0, 500)
    assert x.min() >= 0 and 30_000 < x.max() < make_source(spec).vocab_size
