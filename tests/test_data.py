"""Rules and tasks against slow oracles; rows and specs; text, token files, published corpora."""
import collections
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
import torch
from torch.utils.data import DataLoader

import data
from conftest import Mirror
from data import UserError, make_data


def examples(spec, pad, n=200, longest=math.inf):
    """Rows as (prompt, answer), told apart by what counts. Checks the loss mask and the pads."""
    rows = make_data(spec).train
    rows.longest = longest
    for x, y in zip(*(tensor.tolist() for tensor in rows.__getitems__(range(n)))):
        counted = [t for t in range(len(y)) if y[t] != -1]
        begin, end = counted[0] + 1, counted[-1] + 2
        assert y == [-1] * (begin - 1) + x[begin:end] + [-1] * (len(y) - end + 1)
        assert x[end:] == [pad] * (len(x) - end)
        yield x[:begin], x[begin:end]


def split_at(bar, tokens):
    pieces = [[]]
    for token in tokens:
        if token == bar:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


# Procedural rules


def unique(x):
    return [token for t, token in enumerate(x) if token not in x[:t]]


def delete_first(x, t):
    at = x.index(*t) if t[0] in x else len(x)
    return x[:at] + x[at + 1:]


def run_stack(operations):
    left = []
    for t, operation in enumerate(operations):
        if operation:
            assert operation not in left, "what is on the stack is not pushed"
            assert len(left) <= 1 or t < len(operations) - 1, "the last one is a pop"
            left.append(operation)
        else:
            assert len(left) > 1, "at one symbol or fewer: push"
            left.pop()
    return left[::-1]


ORACLES = {"identity": list, "reverse": lambda x: x[::-1], "sort": sorted, "set": unique,
           "union": lambda x, y: unique(x + y), "delete": delete_first, "stack": run_stack}


@pytest.mark.parametrize("low,high", [(20, 20), (64, 64), (2, 9)])
@pytest.mark.parametrize("vocab", [100, 7])
@pytest.mark.parametrize("name", ORACLES)
def test_rules_with_input_and_output_agree_with_plain_python(name, vocab, low, high):
    lengths = set()
    for prompt, answer in examples(f"{name}:length={low}-{high},vocab={vocab}", pad=vocab + 1):
        *inputs, rest = split_at(vocab, prompt)
        assert rest == [] and answer == ORACLES[name](*inputs)
        least = 0 if name == "stack" else 1
        assert all(least <= token < vocab for token in sum(inputs, answer))
        lengths.add(len(inputs[0]))
    halves = 2 if name == "union" else 1
    assert lengths == {length // halves for length in range(low, high + 1)}


def test_symbols_are_uniform_and_the_one_to_delete_may_be_absent():
    seen, absent = collections.Counter(), 0
    for prompt, _ in examples("delete:vocab=11", pad=12, n=3000):
        seen.update(prompt[:20])
        seen[prompt[-2]] += 1
        absent += prompt[-2] not in prompt[:20]
    assert sorted(seen) == list(range(1, 11))
    assert all(abs(count - 6300) < 5 * math.sqrt(6300) for count in seen.values())
    assert abs(absent / 3000 - 0.9 ** 20) < 0.03


def test_the_stack_pushes_as_often_as_published():
    pushes, chances = np.zeros(20), np.zeros(20)
    for prompt, _ in examples("stack", pad=101, n=3000):
        depth = 0
        for t, operation in enumerate(prompt[:19]):
            if depth > 1:
                pushes[t] += operation != 0
                chances[t] += 1
            depth += 1 if operation else -1
    share = pushes[2:19] / chances[2:19]
    assert np.allclose(share[:11], 0.75, atol=0.04) and np.allclose(share[11:], 0.25, atol=0.04)


def dyck_next(row, left, k, p):
    """What may follow a row that has `left` tokens to come, and how probably."""
    opened = []
    for token in row:
        opened.append(token) if token < k else opened.pop()
    opens = 1 if not opened else 0 if len(opened) == left else p
    chances = dict.fromkeys(range(k), opens / k)
    if opened:
        chances[k + opened[-1]] = 1 - opens
    return chances


def dyck_shuffle_next(row, left, k, p, depth):
    count = collections.Counter(row)
    opened = [kind for kind in range(k) if count[kind] > count[k + kind]]
    full = sum(count[kind] - count[k + kind] for kind in range(k)) == depth
    opens = 1 if not opened else 0 if full else p
    return dict.fromkeys(range(k), opens / k) | {k + kind: (1 - opens) / len(opened)
                                                 for kind in opened}


@pytest.mark.parametrize("name,follows,length,parameters", [
    ("dyck", dyck_next, 6, dict(k=1, p=0.5)), ("dyck", dyck_next, 6, dict(k=2, p=0.3)),
    ("dyck_shuffle", dyck_shuffle_next, 5, dict(k=2, p=0.4, depth=2)),
    ("dyck_shuffle", dyck_shuffle_next, 4, dict(k=3, p=0.7, depth=3))])
def test_brackets_have_the_frequencies_of_the_exact_process(name, follows, length, parameters):
    expected = {(): 20_000.0}
    for t in range(length):
        longer = {}
        for row, count in expected.items():
            for token, chance in follows(row, length - t, **parameters).items():
                longer[row + (token,)] = count * chance
        expected = longer
    r, draw = random.Random(1), data.RULES[name].make
    seen = collections.Counter()
    for _ in range(20_000):
        seen[tuple(draw(r, length=length, **parameters)[1])] += 1
    for row in seen.keys() | expected.keys():
        assert expected[row] or not seen[row]
        assert abs(seen[row] - expected[row]) <= 5 * math.sqrt(expected[row]) + 3


@pytest.mark.parametrize("name,follows,length,parameters", [
    ("dyck", dyck_next, 128, dict(k=64, p=0.5)), ("dyck", dyck_next, 63, dict(k=3, p=0.8)),
    ("dyck_shuffle", dyck_shuffle_next, 128, dict(k=16, p=0.5, depth=16)),
    ("dyck_shuffle", dyck_shuffle_next, 99, dict(k=5, p=0.9, depth=3))])
def test_long_bracket_sequences_hold_what_the_process_allows(name, follows, length, parameters):
    given = "".join(f",{key}={value}" for key, value in parameters.items())
    length -= length % 2 if name == "dyck" else 0
    for first, others in examples(f"{name}:length={length}{given}", 2 * parameters["k"] + 1, 30):
        row = first + others
        assert len(first) == 1 and len(row) == length
        for t, token in enumerate(row):
            assert follows(row[:t], length - t, **parameters)[token] > 0


@pytest.mark.parametrize("rule,image", [
    (30, lambda left, cell, right: left ^ (cell | right)),
    (90, lambda left, cell, right: left ^ right),
    (110, lambda left, cell, right: (cell | right) - (left & cell & right))])
def test_each_row_of_the_automaton_is_the_rules_image_of_the_one_before(rule, image):
    first_rows = []
    for prompt, answer in examples(f"eca:rule={rule},width=7,length=40", pad=None):
        cells = prompt + answer
        assert (len(prompt), len(answer)) == (7, 33)
        for t in range(7, 40):
            row, place = divmod(t - 7, 7)
            above = cells[7 * row:7 * row + 7]
            assert cells[t] == image(above[place - 1], above[place], above[(place + 1) % 7])
        first_rows.append(prompt)
    assert np.mean(first_rows) == pytest.approx(0.5, abs=0.05)


def test_a_random_rule_is_one_for_the_whole_row_and_another_for_the_next():
    found = set()
    for prompt, answer in examples("eca:rule=random,width=16,length=128", pad=None, n=40):
        rows = np.array(prompt + answer).reshape(8, 16)
        image = {}
        for above, below in itertools.pairwise(rows):
            for seen in zip(np.roll(above, 1), above, np.roll(above, -1), below):
                assert image.setdefault(seen[:3], seen[3]) == seen[3]
        found.add(tuple(sorted(image.items())))
    assert len(found) > 30


@pytest.mark.parametrize("states,grid", [(2, 4), (10, 12)])
def test_a_neural_automatons_cells_are_images_of_their_neighbours_by_one_net(states, grid):
    r, image, changed = random.Random(3), {}, 0
    for _ in range(5):
        prompt, answer = data.nca(r, states=states, grid=grid, length=5 * grid ** 2 // 4)
        frames = np.zeros((5, grid, grid), int)
        for i, token in enumerate(prompt + answer):
            frame, patch = divmod(i, grid ** 2 // 4)
            row, column = divmod(patch, grid // 2)
            for place in range(4):
                digit = token // states ** (3 - place) % states
                frames[frame, 2 * row + place // 2, 2 * column + place % 2] = digit
        image.clear()
        for above, below in itertools.pairwise(frames):
            for i, j in np.ndindex(grid, grid):
                seen = tuple(above[(i + a) % grid, (j + b) % grid]
                             for a in (-1, 0, 1) for b in (-1, 0, 1))
                assert image.setdefault(seen, below[i, j]) == below[i, j]
            changed += (above != below).any()
    assert changed > 5


def test_a_neural_automaton_is_as_simple_as_asked():
    for low, high in ((0, 250), (350, 10_000)):
        for seed in range(4):
            r = random.Random(seed)
            prompt, answer = data.nca(r, states=4, grid=8, length=160, simple=low, complex=high)
            digits = np.array(prompt + answer)[:, None] // [64, 16, 4, 1] % 4
            cells = digits.reshape(10, 4, 4, 2, 2).swapaxes(2, 3).astype(np.uint8).tobytes()
            assert low <= 1000 * len(zlib.compress(cells)) / len(cells) <= high
    assert data.nca(random.Random(0), states=2, grid=4, length=8, simple=0, complex=1), "nearest"


# Algorithmic tasks


@pytest.mark.parametrize("spec", ["addition", "addition:digits=1", "multiplication",
                                  "reversed_addition", "multiplication:digits=2"])
def test_arithmetic_is_right_digit_by_digit(spec):
    order = -1 if spec.startswith("reversed") else 1
    for prompt, answer in examples(spec, pad=12):
        first, second = split_at(10, prompt[:-1])
        a, b = (int("".join(map(str, digits[::order]))) for digits in (first, second))
        assert prompt[-1] == 11 and len(str(a)) == len(str(b)) == len(first) == len(second)
        result = str(a * b if spec.startswith("multi") else a + b)[::order]
        assert answer == [20 + int(digit) for digit in result] + [30]


def test_haystack_asks_for_one_of_its_keys_and_counts_its_value_alone():
    sizes, places, in_order = set(), set(), 0
    assert (make_data("haystack").block_size, make_data("haystack").vocab_size) == (63, 256)
    for prompt, answer in examples("haystack", pad=0, n=2000):
        keys, values, place = prompt[:-1:2], prompt[1:-1:2], prompt.index(prompt[-1] - 30) // 2
        assert len(set(keys)) == len(keys) == len(values) and set(keys) <= set(range(128, 158))
        assert set(values) <= set(range(1, 128)) and answer == [values[place]]
        sizes.add(len(keys))
        places.add(place)
        in_order += keys == sorted(keys)
    assert sizes == set(range(1, 31)) and places == set(range(30)) and in_order < 300


def test_sorting_sorts():
    for prompt, answer in examples("sorting:numbers=7,below=50", pad=None):
        assert len(prompt) == 8 and prompt[-1] == 50 and set(prompt[:-1]) <= set(range(50))
        assert answer == sorted(prompt[:-1])


@pytest.mark.parametrize("spec,different", [("addition:digits=1", 81), ("haystack:pairs=1", 127),
                                            ("sorting:numbers=2,below=8", 64)])
def test_an_example_is_for_training_or_for_validation_never_both(spec, different):
    def prompts(split, seed):
        x, y = getattr(make_data(spec, seed), split).__getitems__(range(1500))
        ends = (y != -1).int().argmax(1)
        return {tuple(row[:end + 1]) for row, end in zip(x.tolist(), ends)}
    train, val = prompts("train", 0), prompts("val", 0)
    assert val and not train & val and len(train | val) == different
    assert prompts("train", 1) == train and prompts("val", 1) == val


# Rows, specs, and how they are written


@pytest.mark.parametrize("spec", ["dyck:k=4,length=30", "set+union:length=2-9", "shuffled:stack",
                                  "eca:rule=random", "nca", "haystack", "TEXT"])
def test_a_row_is_a_pure_function_of_seed_split_and_number(spec, prose):
    spec = str(prose) if spec == "TEXT" else spec
    one, two = make_data(spec, 3).train, make_data(spec, 3).train
    x, y = one.__getitems__(range(9))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (9, one.block_size)
    for i in (7, 0, 8):
        assert torch.equal(two[i][0], x[i]) and torch.equal(two[i][1], y[i])
    groups = [[8, 2], [5], [0, 1, 3, 4, 6, 7]]
    loader = DataLoader(two, batch_sampler=groups, collate_fn=tuple, num_workers=1)
    for rows, loaded in zip(groups, loader, strict=True):
        assert torch.equal(loaded[0], x[rows]) and torch.equal(loaded[1], y[rows])
    assert not torch.equal(make_data(spec, 3).val.__getitems__(range(9))[0], x)
    assert not torch.equal(make_data(spec, 4).train.__getitems__(range(9))[0], x)


def test_members_of_a_mixture_have_shares_lengths_and_bars_of_their_own():
    spec, sets = "0.7*set:length=20+0.3*dyck:k=10,length=24", 0
    assert (make_data(spec).vocab_size, make_data(spec).block_size) == (103, 42)
    for prompt, answer in examples(spec, pad=102, n=3000):
        if prompt[-1] == 100:
            sets += 1
            assert len(prompt) == 21 and answer == unique(prompt[:-1])
        else:
            assert prompt == [101] and len(answer) == 24 and max(answer) < 20
    assert abs(sets / 3000 - 0.7) < 0.05
    bars = [prompt[-1] for prompt, _ in examples("set+reverse", pad=102, n=3000)]
    assert set(bars) == {100, 101} and abs(bars.count(100) / 3000 - 0.5) < 0.05


@pytest.mark.parametrize("spec,pad", [("dyck:k=4,length=30", 9), ("set:length=2-9", 101),
                                      ("set+union", 102)])
def test_the_shuffled_control_has_the_same_tokens_and_as_many_that_count(spec, pad):
    plain, shuffled = list(examples(spec, pad)), list(examples("shuffled:" + spec, pad))
    for (prompt, answer), (other_prompt, other_answer) in zip(plain, shuffled):
        assert len(answer) == len(other_answer)
        assert sorted(prompt + answer) == sorted(other_prompt + other_answer)
    assert sum(row == other for row, other in zip(plain, shuffled)) < 20


def test_a_curriculum_cuts_the_length_of_inputs_and_nothing_else():
    assert {len(prompt) for prompt, _ in examples("set", pad=101, longest=4)} == {5}
    varied = examples("set:length=3-20", pad=101, longest=4)
    assert {len(prompt) for prompt, _ in varied} == {4, 5}
    rows = make_data("set").train
    rows.longest = 4
    assert rows[0][0].shape == (41,)


@pytest.mark.parametrize("spec", [
    "", "dyke", "set+dyke", "no/such/file", "shuffled:", "set+haystack", "shuffled:haystack",
    "dyck:k=0", "eca:rule=256", "dyck:p=2", "dyck:p=nan", "set:length=9-2", "set:vocab=2",
    "set:wide=3", "set:length", "set:length=x", "set:length=0", "set:length=2-",
    "haystack:pairs=65", "addition:digits=0", "-1*set+union", "a*set",
    "1e308*set+1e308*union", f"set:length={'9' * 400}", "x" * 300, "eca:length=8",
    "eca:rule=some", "eca:rule=-1", "nca:grid=5", "nca:length=36", "nca:states=17"])
def test_bad_specs_are_refused_in_one_line(spec, refused):
    refused(data, "show", spec)


@pytest.mark.parametrize("spec", ["dyck:length=1-5", "union:length=1-3", "eca:length=17-20",
                                  "stack:vocab=3,length=1-9", "set: length = 2-9, vocab = 5"])
def test_odd_specs_make_rows(spec):
    x, y = make_data(spec).train.__getitems__(range(300))
    assert x.shape == y.shape and (y != -1).any()


def test_a_refusal_says_what_there_is(refused):
    line = refused(data, "show", "dyk")
    assert all(name in line for name in (*data.RULES, *data.TASKS, *data.CORPORA))
    assert "takes k=16, length=128, p=0.5" in refused(data, "show", "dyck:depth=3")
    with pytest.raises(UserError, match="41 tokens, more than 40"):
        make_data("set:length=20", block_size=40)


@pytest.mark.parametrize("spec,row", [
    ("identity:length=3", r"\d+ \d+ \d+ \| «\d+ \d+ \d+»"),
    ("stack:length=5", r"(\d+ |pop )+\| «[\d ]+»[ _]*"),
    ("dyck:k=3,length=8", r"[(\[{] «[()\[\]{} ]{13}»"), ("dyck:k=9,length=4", r"\(\d «[()\d ]+»"),
    ("eca:width=8,length=24", r"[·█]{8}\n«[·█]{8}\n[·█]{8}»"),
    ("nca:states=2,grid=4,length=8", r"(\d+ ){4}«(\d+ ?){4}»"),
    ("haystack:pairs=1", r"k0: \d+ \?k0 «\d+» _"), ("addition:digits=2", r"\d\d\+\d\d=«\d+\.»_?"),
    ("sorting:numbers=2", r"\d+ \d+ \| «\d+ \d+»"),
    ("multiplication:digits=1", r"\d\*\d=«\d+\.»_*"),
    ("set+dyck", r"(\|dyck\| «[()\d ]+»|[\d ]+\|set\| «[\d ]+»)[ _]*")])
def test_rows_are_shown_as_a_person_would_write_them(spec, row, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["data.py", "show", spec, "-n", "5"])
    data.main()
    first, *shown = capsys.readouterr().out.strip("\n").split("\n\n")
    assert first.startswith(spec) and len(shown) == 5
    for text in shown:
        assert re.fullmatch(row, text)


def test_list_names_everything_with_its_parameters(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["data.py", "list"])
    data.main()
    listed = capsys.readouterr().out
    for name in (*data.RULES, *data.TASKS, *data.CORPORA):
        assert re.search(rf"^  {name} +\S", listed, re.M)
    assert "k=16, length=128, p=0.5" in listed and "pairs=30" in listed and "PATH" in listed


@pytest.mark.parametrize("spec", [
    "set:length=5", "set+union:length=6", "stack", "dyck:k=3", "dyck:k=20", "haystack", "addition",
    "sorting", "eca:width=8,length=24", "shuffled:set", "dyck:k=3+eca", "eca+set:length=4"])
def test_what_a_person_writes_is_read_as_it_was_written(spec):
    source = make_data(spec)
    for i in range(20):
        x, y = source.train[i]
        if source.kind == "task":
            x = x[:int((y != -1).int().argmax()) + 1]  # the prompt: digits of answers look the same
        assert source.read(source.write(x)) == x.tolist()
    with pytest.raises(UserError, match="is not written as"):
        source.read("nonsense")


# Tokenizers


def test_the_bytes_tokenizer_returns_every_text(prose):
    tokenizer = data.load_tokenizer("bytes")
    text = "plain, naïve, 日本語, \U0001f600\r\n\t\0" + "".join(map(chr, range(32, 400)))
    assert list(tokenizer.encode(text)) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    source = make_data(str(prose))
    assert source.write(source.read(text)) == text


def write_vocabulary(folder):
    """One in GPT-2's format, of 256 bytes and 50,000 pairs -> {checksum of a file: of GPT-2's}"""
    order = sorted(range(256), key=lambda b: (not chr(b).isprintable() or chr(b) == " ", b))
    letters = [chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)]
    pairs = [a + b for a in letters for b in letters][:50_000]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "vocab.bpe").write_text("\n".join(merges) + "\n")
    words = enumerate([*letters, *pairs, "<|endoftext|>"])
    (folder / "encoder.json").write_text(json.dumps({word: i for i, word in words}))
    known = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
             "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
    return {hashlib.sha256((folder / name).read_bytes()).hexdigest(): checksum
            for name, checksum in known.items()}


def test_gpt2s_vocabulary_is_fetched_checked_and_used(tmp_path, monkeypatch, refused):
    """tiktoken's own loading, led to a server here and to the checksums of its files."""
    same, server, load = write_vocabulary(tmp_path), Mirror(tmp_path), tiktoken.load
    read_file = load.read_file
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(load, "read_file",
                        lambda url: read_file(f"{server.url}/{url.split('/')[-1]}"))
    monkeypatch.setattr(load, "check_hash", lambda raw, expected:
                        same.get(hashlib.sha256(raw).hexdigest()) == expected)
    text = "naïve <|endoftext|> 日本語 \ud800" + " " * 1_100_000 + "\n" * 60_000
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": text}))
    server.faults["vocab.bpe"] = ["corrupt", "refuse"]
    for reason in ("ValueError", "HTTPError"):
        line = refused(data, "show", path, "--tokenizer", "gpt2")
        assert reason in line and "--tokenizer bytes" in line
    source = make_data(str(path), tokenizer="gpt2")
    server.close()
    *tokens, end = [*source.train.tokens(0), *source.val.tokens(0)]
    assert source.vocab_size == 50257 and end == 50256 not in tokens
    assert source.write(tokens) == text.replace("\ud800", "\ufffd")
    assert "klingon" in refused(data, "show", path, "--tokenizer", "klingon")


# Text


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "PAUSES", (0,) * 5)
    return tmp_path / "cache"


def write(folder, files):
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(folder)


def texts_of(tokens):
    *texts, rest = split_at(256, tokens.tolist())
    assert rest == [], "every document is ended"
    return [bytes(text).decode() for text in texts]


def tokenise(path):
    return data.tokenise(str(path), data.load_tokenizer("bytes"))


def documents(path):
    return texts_of(np.fromfile(tokenise(path) / "tokens.bin", np.uint16))


def written(rows):
    return "".join(chr(t) if t < 256 else "\0" for t in rows.tokens(0))


@pytest.mark.parametrize("train,val,test", [
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"), ("train.txt", "val.txt", "test.txt"),
    ("train/1.txt", "Validation/1.txt", "test/1.txt"),
    ("a-train-0.json.gz", "a-validation-0.json.gz", "a_test.json.gz")])
def test_files_and_folders_named_train_and_validation_are_these(train, val, test, tmp_path, capsys):
    files = {train: "to learn " * 4, val: "to check " * 90, test: "a test", "README.gz": "about it"}
    if "json" in train:
        files = {name: json.dumps({"text": text}) for name, text in files.items()}
    source = make_data(write(tmp_path, files), block_size=8)
    assert written(source.train) == "to learn " * 4 + "\0"
    assert written(source.val) == "to check " * 90 + "\0"
    said = capsys.readouterr().out
    assert Path(test).name in said and "README.gz" in said
    assert "training: 37 tokens in 1 doc" in said and "validation: 811 tokens in 1 doc" in said


@pytest.mark.parametrize("files", [
    {"README": "about", "input.txt": "a line of text\n" * 30_000}, {"a.txt": "0123456789" * 99},
    {"train.txt": "a line\n" * 99}, {"test.txt": "a line\n" * 99, "train.txt": "b" * 200},
    {f"{i}.txt": f"{i} " * (70 + i) for i in range(60)}])
def test_else_the_last_tenth_of_the_tokens_is_held_out(files, tmp_path, capsys):
    source = make_data(write(tmp_path, files), block_size=8)
    train, val, said = written(source.train), written(source.val), capsys.readouterr().out
    left_out = ["test.txt"] if "train.txt" in files and "test.txt" in files else []
    kept = [text for name, text in files.items() if name not in left_out]
    assert sorted((train + val).split("\0")) == sorted(["", *kept])
    assert len(val) / len(train + val) == pytest.approx(0.1, abs=0.011)
    assert train.endswith("\0") == (len(files) > 2), "cut where a document ends, if that is near"
    assert all(name in said for name in left_out)
    for name, part in (("training", train), ("validation", val)):
        assert f"{name}: {len(part):,} tokens in {part.count(chr(0))} documents" in said


@pytest.mark.parametrize("name,content,expected", [
    ("a.jsonl", '\n{"text": "one"}\n\n{"content": "two"}\n \n', ["one", "two"]),
    ("a.NDJSON", '{"text": "\\ud800x"}\n{"text": "y", "n": NaN}', ["?x", "y"]),
    ("a.Json", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}', ["one", "two"]),
    ("a.JSONL.gz", '{"text": "one"}', ["one"]), ("a.txt.gz", "one", ["one"]),
    ("a.jsonl", '{"text": "a\u2028b\x85c"}', ["a\u2028b\x85c"]),
    ("a.txt", b"\xef\xbb\xbfone\r\ntwo\0", ["one\r\ntwo\0"]),
    ("a.txt", "one<|endoftext|>two<|endoftext|>", ["one", "two"]),
    ("a.py", "y" * (data.PIECE - 6) + "<|endoftext|>日本\n" * 2,
     ["y" * (data.PIECE - 6), "日本\n", "日本\n"])])
def test_text_is_read_document_by_document(name, content, expected, tmp_path):
    write(tmp_path, {name: content})
    assert documents(tmp_path / name) == expected


def test_records_without_text_are_skipped_and_counted(tmp_path, capsys):
    write(tmp_path, {"a.jsonl": '{"text": null}\n{"text": "one"}\n\n{"content": null}\n'})
    assert documents(tmp_path / "a.jsonl") == ["one"]
    assert "a.jsonl: skipped 2 records whose text is null" in capsys.readouterr().out


@pytest.mark.parametrize("name,content,reason", [
    ("a.jsonl", '{"text": "fine"}\n\n{"title": "none"}\n', "line 3"), ("a.json", "[1]", "line 1"),
    ("a.ndjson", '{"text": 5}', "line 1"), ("a.json", "[" * 100_000, "line 1"),
    ("a.txt", b"\xff\xfe\x00binary", "UTF-8"), ("a.txt", b"x" * 99_999 + b"\xff", "not UTF-8"),
    ("a.txt", "", "too short"), ("a.txt", "too short", "too short"), ("a.gz", "", "too short"),
    ("a.jsonl", '{"text": null}', "too short"), ("a/b.png", b"\x89PNG\xff", "no files")])
def test_what_is_no_text_or_too_little_is_refused(name, content, reason, tmp_path, refused):
    write(tmp_path, {name: content})
    assert reason in refused(data, "show", tmp_path / name.split("/")[0])


def test_pictures_and_hidden_files_beside_text_are_skipped(tmp_path, capsys):
    write(tmp_path, {"a.txt": "text", "photo.png": b"\x89PNG\xff", "desktop.ini": b"\xff\xfeA\0",
                     ".git/HEAD": "main", "folder/b.txt": "more", ".hidden": "secret"})
    assert sorted(documents(tmp_path)) == ["more", "text"]
    said = capsys.readouterr().out
    assert "photo.png" in said and "desktop.ini" in said


def test_text_is_tokenised_once_and_again_if_path_size_or_time_change(tmp_path, own_cache, capsys):
    path, copy = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("hello world")
    folders = [tokenise(path)]
    capsys.readouterr()
    assert tokenise(path) == folders[0] and not capsys.readouterr().out
    shutil.copy2(path, copy)
    folders.append(tokenise(copy))
    os.utime(path, ns=(0, 1))
    folders.append(tokenise(path))
    path.write_text("hello there, world")
    os.utime(path, ns=(0, 1))
    folders.append(tokenise(path))
    assert len(set(folders)) == 4 and documents(path) == ["hello there, world"]


def forked(function, *args):
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork a process")
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def run_until_killed(owner, name, n, function, *args):
    """Calls the function in a process that is killed when it calls owner.name for the n-th time."""
    def run():
        original, calls = getattr(owner, name), itertools.count(1)

        def call(*args, **more):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)
        setattr(owner, name, call)
        function(*args)
    process = forked(run)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_tokenisation_leaves_nothing_behind_after_the_next(tmp_path, own_cache, prose):
    run_until_killed(data, "read_text", 30, tokenise, prose)
    assert list(own_cache.glob(".*.tmp"))
    folder = tokenise(write(tmp_path / "other", {"a.txt": "other"}))
    assert sorted(own_cache.iterdir()) == sorted([folder, own_cache / "lock"])


def test_two_processes_that_tokenise_at_once_make_one_folder(prose, own_cache, monkeypatch, capfd):
    original = data.write_tokens
    monkeypatch.setattr(data, "write_tokens", lambda *args: time.sleep(0.1) or original(*args))
    processes = [forked(tokenise, prose), forked(tokenise, prose)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert capfd.readouterr().out.count("tokenising") == 1 and len(documents(prose)) == 60
    assert len(list(own_cache.glob("*/tokens.bin"))) == 1


MEASURE = """
import data, re, sys
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()  # in kB; ru_maxrss would begin with that of pytest
data.tokenise(sys.argv[1], data.load_tokenizer("bytes"))
print(peak() - before)
"""


@pytest.mark.parametrize("end", ["\n", " "])
def test_memory_stays_flat_however_large_the_text_and_long_its_lines(end, tmp_path):
    status = Path("/proc/self/status")
    if not status.exists() or "VmHWM" not in status.read_text():
        pytest.skip("this system does not say how much memory a process has used")
    write(tmp_path, {"a.txt": f"a line of text about nothing in particular{end}" * 1_400_000})
    command = [sys.executable, "-c", MEASURE, tmp_path / "a.txt"]
    said = subprocess.check_output(command, text=True, cwd=Path(data.__file__).parent)
    assert int(said.split()[-1]) < 60_000  # kB, for 60 MB of text


def test_code_is_python_and_docs_are_docstrings(tmp_path, monkeypatch):
    files = data.python_files()
    assert Path(random.__file__) in files and Path(json.decoder.__file__) in files
    assert not [path for path in files if {"site-packages", "test"} & set(path.parts)]
    monkeypatch.setattr(data, "python_files", lambda *packages: [Path(random.__file__)])
    assert documents("code") == [Path(random.__file__).read_text()]
    docs = documents("docs")
    assert len(docs) > 5 and all(text in random.__doc__ or len(text) >= 200 for text in docs)
    write(tmp_path, {"bad.py": "def f(:"})
    assert list(data.docstrings(tmp_path / "bad.py")) == []


ANSWERS = {  # what a question is, and what its numbers give
    r"What is N \+ \(N\)\?": lambda a, b: a + b, r"What is N \* \(N\)\?": lambda a, b: a * b,
    r"Divide N by N\.": Fraction, r"What remains when N is divided by N\?": lambda a, b: a % b,
    r"Is N less than N\?": lambda a, b: "yes" if a < b else "no",
    r"Write N in base 2\.": lambda n: bin(n)[2:],
    r"Solve N\*x \+ \(N\) = N for x\.": lambda a, b, c: Fraction(c - b, a),
    r"Let f\(x\) = N\*x\*\*2 \+ N\*x \+ \(N\)\. What is f\(N\)\?":
        lambda a, b, c, x: a * x * x + b * x + c}


def test_answers_of_the_mathematics_corpus_are_right_and_no_question_is_in_both_splits():
    asked, kinds = {"train": set(), "val": set()}, collections.Counter()
    for split, questions in asked.items():
        for problem, _ in itertools.islice(data.problems(split), 4000):
            question, answer, rest = problem.split("\n")
            kind, = (kind for kind in ANSWERS
                     if re.fullmatch(kind.replace("N", r"-?\d+"), question))
            numbers = re.fullmatch(kind.replace("N", r"(-?\d+)"), question).groups()
            assert answer == str(ANSWERS[kind](*map(int, numbers))) and rest == ""
            questions.add(question)
            kinds[kind] += 1
    assert not asked["train"] & asked["val"] and kinds.keys() == ANSWERS.keys()


def test_the_mathematics_corpus_keeps_its_splits(monkeypatch, own_cache):
    few = {split: list(itertools.islice(data.problems(split), 99)) for split in ("train", "val")}
    monkeypatch.setattr(data, "problems", few.get)
    source = make_data("math", block_size=16)
    assert written(source.train) == "".join(text for text, _ in few["train"])
    assert written(source.val) == "".join(text for text, _ in few["val"])


# Tokens in files


def token_folder(folder, tokens, dtype="uint16", meta=None):
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        np.asarray(tokens, dtype).tofile(folder / name)
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def test_every_window_comes_once_per_epoch_in_an_order_that_the_seed_decides(tmp_path):
    folder = token_folder(tmp_path, np.arange(1001))
    one, other = make_data(folder, 0, 10), make_data(folder, 1, 10)
    x, y = one.train.__getitems__(range(300))
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(10))
    epochs = x[:, 0].view(3, 100).tolist()
    epochs.append(other.train.__getitems__(range(100))[0][:, 0].tolist())
    assert all(sorted(epoch) == list(range(0, 1000, 10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert torch.equal(*(source.val.__getitems__(range(99))[0] for source in (one, other)))
    from_the_end = make_data(folder, 0, 10, split="warmup").train.__getitems__(range(100))[0]
    assert from_the_end[:, 0].tolist() == epochs[0][::-1]
    assert one.fingerprint() == make_data(folder, 0, 10).fingerprint()
    assert one.fingerprint() != make_data(token_folder(tmp_path / "b", [3] * 999)).fingerprint()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_the_type_of_numbers_that_meta_names_is_used(dtype, tmp_path):
    folder = token_folder(tmp_path, range(200), dtype, {"vocab_size": 250, "dtype": dtype})
    source = make_data(folder, block_size=20)
    assert source.vocab_size == 250 and source.train.tokens(0).tolist() == list(range(200))


@pytest.mark.parametrize("meta,expected", [
    ({"itos": dict(enumerate("abcde"))}, "abca"), ({}, "0120"), ({"tokenizer": "klingon"}, "0120"),
    ({"itos": list("abcde")}, "abca"), ({"itos": {1: "b", 2: "c"}}, "0120")])
def test_nanogpts_letters_are_printed_and_numbers_where_there_are_none(meta, expected, tmp_path):
    folder = token_folder(tmp_path, [0, 1, 2, 0] * 30)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta | {"vocab_size": 5}))
    source = make_data(folder, block_size=4)
    assert source.vocab_size == 5
    assert source.write([0, 1, 2, 0]).replace(" ", "") == expected


def test_without_a_meta_file_tokens_are_gpt2s_and_the_header_of_llmc_is_skipped(tmp_path):
    tokens = np.arange(50_000)
    header = np.zeros(512, np.uint16)
    header[:2].view(np.int32)[0] = 20240520
    for name, content in (("plain", tokens), ("llmc", np.append(header, tokens))):
        source = make_data(token_folder(tmp_path / name, content))
        assert source.vocab_size == 50257
        assert source.train.tokens(0).tolist() == tokens.tolist()


@pytest.mark.parametrize("tokens,dtype,reason", [
    (np.arange(9999), "uint32", "looks like uint32"), ([1] * 999, "uint8", "999 bytes"),
    (np.arange(9999), "int64", "looks like int64"), ([1] * 9, "uint16", "too short"),
    (np.append([7] * 2_000_000, 60_000), "uint16", "token 60000"), ([-1] * 999, "int32", "-1")])
def test_token_files_that_cannot_be_right_are_refused(tokens, dtype, reason, tmp_path, refused):
    meta = {"vocab_size": 9, "dtype": "int32"} if dtype == "int32" else None
    assert reason in refused(data, "show", token_folder(tmp_path, tokens, dtype, meta))


def test_a_folder_without_val_bin_says_so(tmp_path, refused):
    folder = token_folder(tmp_path, [1] * 999)
    (tmp_path / "val.bin").unlink()
    assert "val.bin is missing" in refused(data, "show", folder)


def test_every_file_of_a_prepared_folder_that_was_moved_is_checked(tmp_path, refused):
    pieces = [["train.bin", 0, None], ["second.bin", 0, None]]
    meta = {"vocab_size": 9, "train": pieces, "val": pieces[:1]}
    folder = token_folder(tmp_path, [1] * 999, meta=meta)
    np.full(999, 9, np.uint16).tofile(tmp_path / "second.bin")
    assert "second.bin holds the token 9" in refused(data, "show", folder)


@pytest.mark.parametrize("train", ["train.bin", "a.txt"])
def test_a_folder_named_as_a_corpus_is_not_meant_and_that_is_said(
        train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "problems", lambda split: [("12345\n" * 99, False)])
    write(tmp_path / "math", {train: "x" * 999})
    assert make_data("math", block_size=8).train[0][0].max() < ord("x")
    assert "your own is ./math" in capsys.readouterr().out


class Trap:
    """Opens a file for writing where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_meta_files_of_other_types_or_with_code_are_refused_and_never_run(tmp_path, refused):
    folder = token_folder(tmp_path, [1] * 999)
    plain = [{"vocab_size": 9, "dtype": dtype}
             for dtype in ("O", "float64", "S0", "u2,u2", "int8", ["uint16"], None, 2)]
    plain += [{"vocab_size": size} for size in (0, -1, "9", 1 << 40, None, True)]
    bad = [pickle.dumps(meta) for meta in [
        *plain, {}, [9], Trap(tmp_path / "sprung"), np.dtype("O"),
        {"vocab_size": np.arange(5)}, {"vocab_size": 5, "itos": Trap(tmp_path / "sprung")}]]
    for raw in [*bad, b"", b"\x80garbage"]:
        (tmp_path / "meta.pkl").write_bytes(raw)
        assert "meta" in refused(data, "show", folder)
        assert not (tmp_path / "sprung").exists()
    for text in [*map(json.dumps, plain), "", "[9]", "[" * 100_000]:
        (tmp_path / "meta.json").write_text(text)
        assert "meta" in refused(data, "show", folder)


# Published corpora


ORDER = {"c4": (1_400_000, "bytes"), "codeparrot": (200_000, "bytes"),
         "wikitext103": (100_000, "bytes"), "deepmind_math": (90_000, None)}
FIRST = "c4-train.00000-of-01024.json.gz"


def prepare(name, source, wanted=None, workers=1):
    tokens, tokenizer = ORDER[name]
    wanted = {"train": wanted or tokens, "val": 20_000}
    return data.prepare(name, wanted, workers, str(source), tokenizer)


def contents(folder):
    """Every file that a preparation leaves, as bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(published, tmp_path_factory):
    """What an undisturbed preparation of each corpus leaves: from a folder, with one worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOWARM_CACHE", str(tmp_path_factory.mktemp("whole")))
        return {name: contents(prepare(name, published)) for name in ORDER}


@pytest.mark.parametrize("name", ORDER)
def test_a_mirror_gives_the_same_bytes_as_a_folder_and_is_asked_once(
        name, mirror, own_cache, whole):
    assert contents(prepare(name, mirror.url, workers=2)) == whole[name]
    assert contents(prepare(name, mirror.url)) == whole[name]
    assert len(mirror.requests) == len(set(mirror.requests)), "nothing is fetched twice"


@pytest.mark.parametrize("name,file,field,shards", [
    ("c4", "c4-train.{:05}-of-01024", "text", range(0, 3)),
    ("codeparrot", "codeparrot-clean-train/resolve/main/file-{:012}", "content", range(1, 3))])
def test_shards_are_whole_files_in_order_until_there_are_enough(
        name, file, field, shards, published, own_cache):
    prepare(name, published)
    source = make_data(name, tokenizer="bytes", block_size=64)
    lengths = [len(source.train.tokens(place)) for place in range(len(shards))]
    assert len(source.train.pieces) == len(shards) and sum(lengths[:-1]) < ORDER[name][0]
    assert sum(lengths) >= ORDER[name][0]
    assert len(source.train) == sum((length - 1) // 64 for length in lengths)
    for place, shard in enumerate(shards):
        with gzip.open(published / f"{file.format(shard)}.json.gz") as lines:
            assert texts_of(source.train.tokens(place)) == [json.loads(line)[field]
                                                            for line in lines]


def test_asking_for_more_adds_whole_shards_to_what_is_there(mirror, own_cache, whole):
    first, = prepare("c4", mirror.url, wanted=300_000).glob("train-*.bin")
    made, asked = first.stat().st_mtime_ns, len(mirror.requests)
    assert len(make_data("c4", tokenizer="bytes").train.pieces) == 1
    assert contents(prepare("c4", mirror.url)) == whole["c4"] and first.stat().st_mtime_ns == made
    assert [path for path, _ in mirror.requests[asked:]] == [
        "/c4-train.00001-of-01024.json.gz", "/c4-train.00002-of-01024.json.gz"]


def test_wikitext_is_cut_into_articles(published, own_cache):
    prepare("wikitext103", published, wanted=10)
    source = make_data("wikitext103", tokenizer="bytes")
    for rows, articles in ((source.train, 200), (source.val, 20)):
        titles = [text.strip().split("\n")[0] for text in texts_of(rows.tokens(0))]
        assert titles == [f"= Title {i} = " for i in range(articles)]


def characters(tokens):
    alphabet = [*map(chr, range(32, 127)), "<problem>", "<answer>"]
    return "".join(alphabet[t] if t >= 0 else " " for t in tokens)


def test_deepmind_math_takes_as_much_of_every_module_and_counts_answers(published, own_cache):
    folder = prepare("deepmind_math", published)
    sizes = [path.stat().st_size // 2 for path in folder.glob("train-*.bin")]
    assert len(sizes) == 9 and all(9_900 < size <= 10_001 for size in sizes)
    source = make_data("deepmind_math", block_size=200)
    assert source.vocab_size == 97
    for rows in (source.train, source.val):
        for x, y in zip(*rows.__getitems__(range(len(rows)))):
            assert x[0] == 95 and torch.equal(y[:-1][y[:-1] != -1], x[1:][y[:-1] != -1])
            problems = re.findall(r"<problem>What is ([^?]*)[^<]*<answer>", characters(x))
            sums = "".join(f"{eval(problem)}<problem>" for problem in problems)
            counted = characters(y[y != -1])
            assert sums.startswith(counted) and counted.count("<problem>") >= len(problems) - 1


def test_problems_are_found_by_module_and_split(published, own_cache):
    prepare("deepmind_math", published)
    found = make_data("deepmind_math").val.problems(7)
    assert set(found) == {"interpolate-numbers__gcd", "interpolate-algebra__linear_1d",
                          "interpolate-arithmetic__add_or_sub",
                          "extrapolate-arithmetic__add_or_sub_big"}
    for name, problems in found.items():
        assert len(problems) == 7 and len({characters(question) for question, _ in problems}) > 3
        for question, answer in problems:
            asked = re.fullmatch(r"<problem>What is (\d+) \+ (\d+)\? \((\w+)\)<answer>",
                                 characters(question))
            assert asked[3] == name.partition("-")[2]
            assert characters(answer) == f"{int(asked[1]) + int(asked[2])}<problem>"


@pytest.mark.parametrize("faults", [
    ["cut"] * 4, ["truncate"], ["corrupt"], ["refuse"] * 3, ["cut", "no ranges"], ["empty"],
    ["cut", "corrupt", "refuse", "truncate"]])
@pytest.mark.parametrize("name,file", [("codeparrot", "file-000000000001.json.gz"),
                                       ("wikitext103", "wikitext-103-raw-v1.zip")])
def test_a_server_that_misbehaves_changes_nothing(name, file, faults, mirror, own_cache, whole):
    mirror.faults[file] = list(faults)
    assert contents(prepare(name, mirror.url)) == whole[name] and not mirror.faults[file]


def test_a_cut_connection_goes_on_from_where_it_broke(mirror, own_cache, published):
    mirror.faults[FIRST] = ["cut", "cut"]
    prepare("c4", mirror.url, wanted=1000)
    size = (published / FIRST).stat().st_size
    spans = [span for path, span in mirror.requests if path == f"/{FIRST}"]
    assert spans == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]


@pytest.mark.parametrize("fault,reason", [
    ("truncate", "damaged"), ("corrupt", "damaged"), ("refuse", "503"), ("empty", "empty")])
def test_a_server_that_never_gets_better_is_refused(fault, reason, mirror, own_cache, whole):
    mirror.faults["file-000000000002.json.gz"] = [fault] * 5
    with pytest.raises(UserError, match=f"file-000000000002.json.gz: .*{reason}"):
        prepare("codeparrot", mirror.url)
    assert not (own_cache / "codeparrot-bytes/meta.json").exists()
    assert contents(prepare("codeparrot", mirror.url)) == whole["codeparrot"]


def test_what_cannot_be_prepared_is_refused(mirror, own_cache, published, tmp_path, refused):
    order = ["prepare", "c4", "--val_tokens", "1K", "--tokens", "90M", "--tokenizer", "bytes",
             "--workers", "1", "--source"]
    line = refused(data, *order, mirror.url)
    assert "c4-train.00004" in line and "404" in line
    assert "python data.py prepare c4" in refused(data, "show", "c4")
    mirror.close()
    assert "cannot fetch" in refused(data, *order, mirror.url)
    assert "cannot fetch" in refused(data, *order, "nonsense://x")
    assert "not in" in refused(data, *order, tmp_path / "nowhere")
    bad = tmp_path / "bad"
    for content, reason in ((b"", "damaged"), ((published / FIRST).read_bytes()[:-9], "damaged"),
                            (gzip.compress(b'{"text": "fine"}\n{"url": "x"}\n'), "line 2")):
        write(bad, {"c4-train.00004-of-01024.json": content})
        (bad / "c4-train.00004-of-01024.json").rename(bad / "c4-train.00004-of-01024.json.gz")
        line = refused(data, *order, bad)
        assert reason in line and "c4-train.00004" in line
    assert "does not go" in refused(data, "prepare", "deepmind_math", "--tokenizer", "bytes")
    assert "invalid choice" in refused(data, "prepare", "c5")
    assert "at least 1" in refused(data, "prepare", "c4", "--tokens", "0")


@pytest.mark.parametrize("inside", ["other/a.txt", "../../../../train-easy/outside.txt", None])
def test_an_archive_that_is_not_the_corpus_is_refused_and_does_no_harm(
        inside, mirror, published, own_cache, whole, tmp_path):
    path = tmp_path / "mirror/mathematics_dataset-v1.0.tar.gz"
    write(path.parent, {path.name: "<html>"})
    if inside:
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(inside), io.BytesIO())
    mirror.folder = path.parent
    with pytest.raises(UserError):
        prepare("deepmind_math", mirror.url)
    assert not list(tmp_path.rglob("outside.txt"))
    mirror.folder = published
    assert contents(prepare("deepmind_math", published)) == whole["deepmind_math"]


@pytest.mark.parametrize("name,owner,function,n", [
    ("c4", data, "fetch", 2), ("c4", data, "read_through", 3), ("c4", data.Progress, "add", 900),
    ("c4", os, "rename", 2), ("c4", os, "replace", 1), ("c4", os, "replace", 4),
    ("wikitext103", shutil, "unpack_archive", 1), ("deepmind_math", os, "replace", 6),
    ("deepmind_math", tarfile, "copyfileobj", 4)])
def test_killed_in_the_middle_the_same_command_ends_with_the_same_bytes(
        name, owner, function, n, mirror, own_cache, whole):
    run_until_killed(owner, function, n, prepare, name, mirror.url)
    folder, = own_cache.iterdir()
    assert not (folder / "meta.json").exists()
    data.lock(folder / "lock", wait=True).close()  # its workers go, too
    assert contents(prepare(name, mirror.url)) == whole[name]


def test_one_preparation_of_a_corpus_at_a_time(own_cache, published):
    with data.lock(own_cache / "c4-bytes/lock"), pytest.raises(UserError, match="another process"):
        prepare("c4", published)
    prepare("c4", published, wanted=1000)


def test_a_console_that_knows_few_characters_and_a_full_disk_get_no_traceback(script):
    few = script("data.py", "show", "eca", env={"PYTHONIOENCODING": "ascii"})
    assert few.returncode == 0 and "?" in few.stdout and not few.stderr, few.stderr
    command = [sys.executable, data.__file__, "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_a_byte_order_mark_is_no_text_and_the_cache_may_be_in_ones_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOWARM_CACHE", "~/x")
    plain, marked = "a" * 900, "\ufeff" + "a" * 900
    first = make_data(write(tmp_path / "1", {"a.txt": plain}), block_size=8)
    for name, content in (("a.txt", marked), ("a.jsonl", "\ufeff" + json.dumps({"text": plain}))):
        data = make_data(write(tmp_path / name, {name: content}), block_size=8)
        assert data.fingerprint() == first.fingerprint()
    assert (tmp_path / "x").is_dir()
