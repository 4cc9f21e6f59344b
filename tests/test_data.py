"""Rules and tasks against slow oracles; rows and specs; texts, tokens, corpora; files, errors."""
import collections
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

import data
from conftest import Mirror
from data import UserError, make_data


def examples(spec, pad, n=200, split="train", seed=0):
    """Rows as (prompt, answer), told apart by what counts. Checks the loss mask and the pads."""
    rows = getattr(make_data(spec, seed), split).__getitems__(range(n))
    for x, y in zip(*(tensor.tolist() for tensor in rows)):
        counted = [t for t in range(len(y)) if y[t] != -1]
        begin, end = counted[0] + 1, counted[-1] + 2
        assert y == [-1] * (begin - 1) + x[begin:end] + [-1] * (len(y) - end + 1)
        assert x[end:] == [pad] * (len(x) - end)
        yield x[:begin], x[begin:end]


def split_at(separator, tokens):
    ends = [t for t, token in enumerate(tokens) if token == separator]
    starts = [0, *(end + 1 for end in ends)]
    return [tokens[start:end] for start, end in zip(starts, [*ends, len(tokens)])]


# Rules and tasks

def run_stack(operations):
    left = []
    for operation in operations:
        assert operation not in left and (operation or len(left) > 1), "it is never empty"
        left = left + [operation] if operation else left[:-1]
    return left[::-1]


ORACLES = {"identity": list, "reverse": lambda x: x[::-1], "sort": sorted,
           "set": lambda x: sorted(set(x), key=x.index), "stack": run_stack,
           "union": lambda x, y: ORACLES["set"](x + y),
           "delete": lambda x, t: list(bytes(x).replace(bytes(t), b"", 1))}


@pytest.mark.parametrize("low,high,vocab", [(20, 20, 100), (64, 64, 7), (2, 9, 7)])
@pytest.mark.parametrize("name", ORACLES)
def test_rules_with_input_and_output_agree_with_plain_python(name, vocab, low, high):
    lengths = set()
    for prompt, answer in examples(f"{name}:length={low}-{high},vocab={vocab}", pad=vocab + 1):
        *inputs, rest = split_at(vocab, prompt)
        assert rest == [] and answer == ORACLES[name](*inputs)
        assert all(token < vocab and (token or name == "stack") for token in sum(inputs, answer))
        lengths.add(len(inputs[0]))
    halves = 2 if name == "union" else 1
    assert lengths == {length // halves for length in range(low, high + 1)}


def test_symbols_pushes_and_what_is_deleted_are_as_frequent_as_published():
    rows = np.array([prompt for prompt, _ in examples("delete:vocab=11", pad=12, n=3000)])
    assert np.allclose(np.bincount(rows[:, [*range(20), 21]].flat)[1:], 6300, atol=400)
    assert abs(np.mean((rows[:, :20] == rows[:, 21:22]).any(1)) - (1 - 0.9 ** 20)) < 0.03
    operations = np.array([prompt[:20] for prompt, _ in examples("stack", pad=101, n=3000)])
    depth = np.cumsum(np.where(operations, 1, -1), axis=1)[:, :-1]  # before each but the first
    share = [np.mean(operations[:, t + 1][depth[:, t] > 1] != 0) for t in range(1, 19)]
    assert np.allclose(share, [0.75] * 11 + [0.25] * 6 + [0], atol=0.04), "the last is a pop"


def chance(row, k, p, depth=None):
    """How probable a row of brackets is. With a depth, as in dyck_shuffle, any open kind may close;
    without, the last one, and all do."""
    result, opened = 1, []  # the last first
    for t, token in enumerate(row):
        full = len(opened) == (depth or len(row) - t)
        opens = 1 if not opened else 0 if full else p
        may_close = set(opened if depth else opened[:1])
        if token < k:
            result *= opens / k
            opened.insert(0, token)
        elif token - k in may_close:
            result *= (1 - opens) / len(may_close)
            opened.remove(token - k)
        else:
            return 0
    return result


@pytest.mark.parametrize("name,length,parameters", [
    ("dyck", 6, dict(k=1, p=0.5)), ("dyck", 6, dict(k=2, p=0.3)),
    ("dyck_shuffle", 5, dict(k=2, p=0.4, depth=2)), ("dyck_shuffle", 4, dict(k=3, p=0.7, depth=3))])
def test_brackets_have_the_frequencies_of_the_exact_process(name, length, parameters):
    spec = ",".join(f"{key}={value}" for key, value in parameters.items())
    rows = examples(f"{name}:length={length},{spec}", pad=None, n=20_000)
    seen = collections.Counter(tuple(prompt + answer) for prompt, answer in rows)
    for row in itertools.product(range(2 * parameters["k"]), repeat=length):
        expected = 20_000 * chance(row, **parameters)
        assert abs(seen[row] - expected) <= (5 * math.sqrt(expected) + 3 if expected else 0)


@pytest.mark.parametrize("rule", [30, 110, "random"])
def test_each_row_of_the_automaton_is_the_rules_image_of_the_one_before(rule):
    images = set()
    for prompt, answer in examples(f"eca:rule={rule},width=16,length=128", pad=None, n=60):
        rows = np.array(prompt + answer).reshape(8, 16)
        above = 4 * np.roll(rows, 1, axis=1) + 2 * rows + np.roll(rows, -1, axis=1)
        image = set(zip(above[:-1].flat, rows[1:].flat))
        assert len(dict(image)) == len(image), "what is above decides"
        assert rule == "random" or image <= {(n, int(f"{rule:08b}"[7 - n])) for n in range(8)}
        images.add(frozenset(image))
    assert len(images) > 40 or rule != "random"


def calculated(prompt, operation, order=1):
    a, b = (int("".join(map(str, digits[::order]))) for digits in split_at(10, prompt[:-1]))
    return [20 + int(digit) for digit in str(operation(a, b))[::order]] + [30]


@pytest.mark.parametrize("spec,pad,solved", [
    ("sorting:numbers=7,below=50", None, lambda prompt: sorted(prompt[:-1])),
    ("haystack", 0, lambda prompt: [dict(zip(prompt[::2], prompt[1::2]))[prompt[-1] - 30]]),
    ("addition", 12, lambda prompt: calculated(prompt, int.__add__)),
    ("reversed_addition", 12, lambda prompt: calculated(prompt, int.__add__, -1)),
    ("multiplication:digits=2", 12, lambda prompt: calculated(prompt, int.__mul__))])
def test_tasks_are_solved_right(spec, pad, solved):
    for prompt, answer in examples(spec, pad):
        assert answer == solved(prompt)


def test_haystack_asks_for_any_of_its_keys_which_are_in_any_order():
    places, in_order = set(), 0
    for (*pairs, asked), _ in examples("haystack", pad=0, n=6000):
        keys = pairs[::2]
        assert set(keys) <= set(range(128, 158)) and set(pairs[1::2]) <= set(range(1, 128))
        places.add((keys.index(asked - 30), len(set(keys))))
        in_order += keys == sorted(keys)
    assert len(places) == 30 * 31 / 2 and in_order < 900


@pytest.mark.parametrize("spec,pad,different", [
    ("addition:digits=1", 12, 81), ("haystack:pairs=1", 0, 127)])
def test_one_example_in_16_is_for_validation_and_never_for_training(spec, pad, different):
    found = {"train": set(), "val": set()}
    for split, seed in itertools.product(found, (0, 1)):
        found[split] |= {tuple(prompt) for prompt, _ in examples(spec, pad, 1000, split, seed)}
    assert not found["train"] & found["val"] and len(found["train"] | found["val"]) == different
    assert abs(len(found["val"]) - different / 16) < 2 * math.sqrt(different / 16)


# Rows and specs

@pytest.mark.parametrize("spec", [
    "dyck:k=4,length=1-5", "set+union:length=1-3", "shuffled:stack:vocab=3", "eca:rule=random",
    "0.5 * set: length = 2-9, vocab = 5", "haystack"])
def test_a_row_is_a_pure_function_of_seed_split_and_number(spec):
    one, two = make_data(spec, 3).train, make_data(spec, 3).train
    x, y = one.__getitems__(range(40))
    for rows in ([38, 2], [5], [0, 1, 3, 4, 6, 7]):
        assert all(map(torch.equal, two.__getitems__(rows), (x[rows], y[rows])))
        assert all(map(torch.equal, two[rows[0]], (x[rows[0]], y[rows[0]])))
    for other in (make_data(spec, 3).val, make_data(spec, 4).train):
        assert not torch.equal(other.__getitems__(range(40))[0], x)


def test_members_of_a_mixture_have_shares_lengths_and_separators_of_their_own():
    spec, sets = "0.7*set:length=0.02K+3e-1*dyck:k=1e1,length=24", 0  # numbers as people type them
    assert (make_data(spec).vocab_size, make_data(spec).block_size) == (103, 42)
    for prompt, answer in examples(spec, pad=102, n=3000):
        if prompt[-1] == 100:
            sets += 1
            assert len(prompt) == 21 and answer == ORACLES["set"](prompt[:-1])
        else:
            assert prompt == [101] and len(answer) == 24 and max(answer) < 20
    assert abs(sets / 3000 - 0.7) < 0.05


@pytest.mark.parametrize("spec,pad", [("dyck:k=4,length=30", 9), ("set+union", 102)])
def test_the_shuffled_control_has_the_same_tokens_and_as_many_that_count(spec, pad):
    plain, shuffled = list(examples(spec, pad)), list(examples("shuffled:" + spec, pad))
    for (prompt, answer), (other_prompt, other_answer) in zip(plain, shuffled):
        assert len(answer) == len(other_answer)
        assert sorted(prompt + answer) == sorted(other_prompt + other_answer)
    assert sum(row == other for row, other in zip(plain, shuffled)) < 20


def test_micro_batches_end_where_nothing_counts_any_more_or_are_the_rows_as_they_are():
    x, y = make_data("set:length=2-9").train.__getitems__(range(40))
    parts, whole = data.micro_batches(x, y, 6), data.micro_batches(x, y, 6, trim=False)
    assert all((y_part[:, -1] != -1).any() for _, y_part in parts)
    assert torch.equal(torch.cat([x_part for x_part, _ in whole]), x)


@pytest.mark.parametrize("spec,reason", [
    ("dyke", ", ".join([*data.TASKS, *data.CORPORA])), ("shuffled:haystack", "can be mixed"),
    ("dyck:p=nan", "'nan'"), ("dyck:depth=3", "length=128, p=0.5"), ("haystack:pairs=65", "65"),
    ("set:length=1_1", "'1_1'"), ("set:length=0.0004K", "whole"), ("eca:length=8", "above 16"),
    ("c4", "prepare c4"), ("c4 bytes", "bytes"), ("math characters", "is not to be had"),
    ("math klingon", "klingon")])
def test_what_is_not_to_be_had_is_refused(spec, reason):
    spec, _, tokenizer = spec.partition(" ")
    with pytest.raises(UserError, match=reason):
        make_data(spec, tokenizer=tokenizer or None)


@pytest.mark.parametrize("spec,row", [
    ("stack:length=5", r"[\d ]+\| «[\d ]+»[ _]*"), ("set+dyck", r"[\d ]+«[\d ]+»[ _]*"),
    ("dyck:k=9,length=4", r"\(\d «[()\d ]+»"), ("dyck:k=3", r"[(\[{] «[()\[\]{} ]{253}»"),
    ("eca:width=8,length=16", r"[·█]{8}\n«[·█]{8}»"), ("haystack:pairs=1", r"k0: \d+ \?k0 .+ _"),
    ("sorting:numbers=1", r"\d+ 100 «\d+»"), ("addition:digits=2", r"\d\d\+\d\d=«\d+\.»_?")])
def test_rows_are_written_as_a_person_would(spec, row):
    them = make_data(spec)
    assert all(re.fullmatch(row, them.write(*them.train[i])) for i in range(5))


# Texts, folders of tokens, published corpora

def write(folder, files):
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def tokenise(path, tokenizer="bytes"):
    return data.tokenise(str(path), data.load_tokenizer(tokenizer))


def text_in(folder, splits=("train", "val")):
    """What is in a folder of tokens, with a NUL where a document ends."""
    tokenizer = data.load_tokenizer(data.read_json(folder / "meta.json")["tokenizer"])
    tokens = [np.fromfile(folder / f"{split}.bin", np.uint16) for split in splits]
    texts = split_at(tokenizer.end, np.concatenate(tokens).tolist())
    return "\0".join(tokenizer.decode(text).decode() for text in texts)


@pytest.fixture
def gpt2(monkeypatch):
    """In the place of GPT-2's vocabulary, which needs a network: the 256 bytes."""
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, special_tokens={MARK: 50256},
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)


MARK = "<|endoftext|>"  # in a text it is letters, also across the pieces that are read
MARKED = f"naïve, 日本語, \U0001f600\r\n\t\x85\u2028{MARK}" * 40_000
SPACES = "a" + " " * 1_100_000  # a million at once make tiktoken panic


def tokens_of(numbers):
    """A folder of GPT-2's tokens, as nanoGPT makes them."""
    return dict.fromkeys(["train.bin", "val.bin"], np.array(numbers, np.uint16).tobytes())


@pytest.mark.parametrize("files,wanted", [
    ({"a.Json": '\ufeff\n{"text": "one"}\r\n\n{ "content": "two"}\n \n'}, ["one", "two"]),
    ({"AA/wiki_00": '{"id": 1, "text": "\\ud800x"}\n{"text": "a\u2028b\x85c", "n": NaN}\n'
                    '{"text": null}'}, ["?x", "a\u2028b\x85c"]),
    ({"a.jsonl.gz": json.dumps({"text": MARKED})}, [MARKED]), ({"a.txt": SPACES}, [SPACES]),
    ({"a.txt.gz": "\ufeff" + MARKED}, [MARKED]), ({"a": "x" * 99_999 + "\0"}, "NUL"),
    ({"a": '{"text": "fine"}\n\n{"title": "none"}\n'}, "content"), ({"a.jsonl": ""}, "empty"),
    ({"a": b"x" * 999_999 + b"\xff"}, "utf-8"), (tokens_of([7] * 999 + [50257]), "gpt2"),
    ({"a": "\0"}, "UTF-8"), (tokens_of([7] * 999) | {"meta.pkl": ""}, "meta.pkl")], ids=range(12))
def test_what_a_user_points_at_is_read_or_refused(files, wanted, tmp_path, gpt2, refused):
    write(tmp_path, files)
    if isinstance(wanted, str):
        assert wanted in refused(data, "show", tmp_path)
    else:
        for tokenizer in ("bytes", "gpt2"):
            text = text_in(tokenise(tmp_path, tokenizer))
            assert text.replace("\ufffd", "?") == "\0".join([*wanted, ""])


@pytest.mark.parametrize("files,share,whole", [
    ({"Train/1.gz": "a" * 99, "wiki.dev.raw": "b" * 299}, 0.25, True),
    ({"train.txt": "0123456789" * 99}, 0.9, False),
    ({f"{i}.txt": f"{i} " * (70 + i) for i in range(60)}, 0.9, True)], ids=range(3))
def test_what_is_named_so_or_the_last_tenth_is_held_out(files, share, whole, tmp_path):
    folder = tokenise(write(tmp_path, files))
    both, train = text_in(folder), text_in(folder, ["train"])
    assert sorted(both.split("\0")) == sorted(["", *files.values()])
    assert len(train) / len(both) == pytest.approx(share, abs=0.011)
    assert train.endswith("\0") == whole, "cut where a document ends, if that is near"


def test_what_is_no_text_beside_text_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    write(tmp_path, {"train.txt": "text", "val/1.txt": "more", ".git/HEAD": "main", "closed/.a": "",
                     "utf-16": "H\0i\0", "number": '{"text": 5}', "long": '{"text": "' + "x" * 999})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("val")  # a folder
    monkeypatch.setattr(data, "LONG", 500)  # characters, of a line that goes on
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed")  # root may all
    assert text_in(tokenise(tmp_path)) == "text\0more\0"
    assert "6, such as closed, link, long, number, pipe, utf-16\n" in capsys.readouterr().out


def test_a_text_is_known_by_its_content_alone(tmp_path, monkeypatch):
    for folder, content in (("1", "hello world"), ("2", "other world"), ("1", "third world")):
        write(tmp_path / folder, {"a.txt": content})
        os.utime(tmp_path / folder / "a.txt", ns=(0, 0))
        monkeypatch.chdir(tmp_path / folder)
        assert text_in(tokenise("a.txt")) == content + "\0"


def kill_at(n, owner, name, function, *args):
    """Calls the function in a process that is killed when it calls owner.name for the n-th time."""
    calls = [getattr(owner, name)] * (n - 1) + [lambda *args: os._exit(9)]  # nothing is cleaned up
    with patch.object(owner, name, lambda *args: calls.pop(0)(*args)):
        process = multiprocessing.get_context("fork").Process(target=function, args=args)
        process.start()
        process.join()
    assert process.exitcode == 9


@pytest.mark.parametrize("n,owner,name", [(30, np, "frombuffer"), (1, os, "replace")])
def test_a_kill_while_tokenising_does_no_harm(n, owner, name, tmp_path, prose, monkeypatch, capsys):
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path))
    write(tmp_path, {".backup.tmp/a": "mine", ".d.tmp": "mine"})
    kill_at(n, owner, name, tokenise, prose)
    with ThreadPoolExecutor(2) as pool:  # of two at once one waits
        one, other = pool.map(tokenise, [prose, prose])
    assert one == other and capsys.readouterr().out.count("tokenising /") == 1
    assert text_in(one).count("\0") == 60
    assert {*os.listdir(tmp_path)} == {".backup.tmp", ".d.tmp", one.name}


def test_code_is_python_and_docs_are_docstrings(tmp_path, monkeypatch):
    assert tiktoken.__file__ not in map(str, data.python_files())
    both = [Path(re.__file__), write(tmp_path, {"bad.py": "def f(:"}) / "bad.py"]
    monkeypatch.setattr(data, "python_files", lambda *packages: both if packages else both[:1])
    assert text_in(tokenise("code")) == both[0].read_text() + "\0"
    assert re.__doc__.strip() in text_in(tokenise("docs")).split("\0")


ANSWERS = {  # what a question is, and what gives its answer
    r"What is (.*)\?": r"\1", r"What remains when (.*) is divided by (.*)\?": r"\1 % \2",
    r"Divide (.*) by (.*)\.": r"\1 // \2", r"Write (.*) in base 2\.": r"bin(\1)[2:]",
    r"Is (.*) less than (.*)\?": r"'yes' if \1 < \2 else 'no'",
    r"Solve (.*)\*x \+ (.*) = (.*) for x\.": r"(\3 - \2) // \1",
    r"Let f\(x\) = (.*)\. What is f\((.*)\)\?": r"(lambda x: \1)(\2)"}


def test_answers_of_the_mathematics_corpus_are_right_and_no_question_is_in_both_splits():
    train, val = (dict(problem.splitlines() for problem, _ in itertools.islice(problems, 4000))
                  for problems in map(data.questions, ("train", "val")))
    assert not train.keys() & val.keys()
    for question, answer in (train | val).items():
        kind, = (kind for kind in ANSWERS if re.fullmatch(kind, question))
        assert answer == str(eval(re.sub(kind, ANSWERS[kind], question)))


def test_every_window_comes_once_per_epoch_in_an_order_that_the_seed_decides(gpt2, tmp_path):
    folder = str(write(tmp_path, tokens_of(range(1001))))
    one, other = make_data(folder, 0, 10), make_data(folder, 1, 10)
    x, y = one.train.__getitems__(range(200))
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(10))
    orders = torch.stack([x[:100, 0], x[100:, 0], other.train.__getitems__(range(100))[0][:, 0]])
    assert torch.equal(orders.sort().values, torch.arange(0, 1000, 10).expand(3, 100))
    assert len(orders.unique(dim=0)) == 3
    assert torch.equal(*(source.val.__getitems__(range(99))[0] for source in (one, other)))


@pytest.fixture
def mirror(published, tmp_path, gpt2, monkeypatch):
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", Mock())  # before another try
    monkeypatch.setattr(data, "HELD_OUT", 20_000)
    with Mirror(published) as server:
        yield server
        server.shutdown()


def prepare(name, source, tokens=200_000):
    data.fetch.cache_clear()  # every call as a command of its own
    return data.prepare(name, tokens, source)


def test_shards_are_whole_files_in_order_until_there_are_enough(mirror, published):
    prepare("c4", mirror.url, 1000)
    folder = prepare("c4", mirror.url, 400_000)  # as bytes: what three files have, and two have not
    lines = [line for path in sorted(published.glob("c4-train*"))[:3] for line in gzip.open(path)]
    texts = [json.loads(line)["text"] for line in lines]
    assert text_in(folder, ["train"]) == "\0".join([*texts, ""])
    assert len(mirror.requests) == len({*mirror.requests}) == 4, "more adds to what is there"
    with pytest.raises(OSError):  # a server's page in the place of a file is not trained on
        next(data.published_pieces(io.BytesIO(b"<html>"), "x.json.gz", "train", 1000))
    folder = prepare("wikitext103", published.as_uri())
    with zipfile.ZipFile(published / "wikitext-103-raw-v1.zip") as archive:
        for split, name in (("train", "train"), ("val", "valid")):
            text = archive.read(f"wikitext-103-raw/wiki.{name}.raw").decode()
            assert text_in(folder, [split]) == text + "\0"


def test_deepmind_math_takes_as_much_of_every_module_and_counts_answers(mirror, published):
    prepare("deepmind_math", published.as_uri(), 90_000)
    source, sizes = make_data("deepmind_math", block_size=200), collections.Counter()
    for problem in source.write(source.train.tokens).split("<problem>")[:-1]:
        asked = re.fullmatch(r"What is (\d+) \+ (\d+)\? \((\w+)\)<answer>(\d+)", problem)
        assert int(asked[1]) + int(asked[2]) == int(asked[4])
        sizes[asked[3]] += len(problem) - len("<answer>") + 2
    assert len(sizes) == 3 and all(29_700 < size <= 30_000 for size in sizes.values())
    for rows in (source.train, source.val):
        for x, y in zip(*rows.__getitems__(range(rows.n))):
            assert x[0] == 95 and torch.equal(y[:-1][y[:-1] != -1], x[1:][y[:-1] != -1])
            problems = re.findall(r"<problem>What is ([^?]*)[^<]*<answer>", source.write(x))
            sums = "".join(f"{eval(problem)}<problem>" for problem in problems)
            counted = source.write(y[y != -1])
            assert sums.startswith(counted) and counted.count("<problem>") >= len(problems) - 1


@pytest.mark.parametrize("name,faults,reason", [
    ("codeparrot", ["refuse", "cut"], None), ("codeparrot", ["cut", "refuse", "empty"], "0 of 0"),
    ("codeparrot", [], "killed"), ("deepmind_math", ["corrupt"], "")])
def test_whatever_a_server_does_there_are_three_tries_and_the_same_command_goes_on(
        name, faults, reason, mirror, published, tmp_path, monkeypatch):
    file = {"codeparrot": "file-000000000002.json.gz",
            "deepmind_math": "mathematics_dataset-v1.0.tar.gz"}[name]
    mirror.faults[file] = list(faults)
    if reason == "killed":
        kill_at(4, os, "replace", prepare, name, mirror.url)
    elif reason is not None:
        with pytest.raises(UserError, match=f"{file}.*{reason}"):
            prepare(name, mirror.url)
    found = text_in(prepare(name, mirror.url))
    assert not mirror.faults[file], "as many tries as that"
    assert sum(path.endswith("file-000000000001.json.gz") for path in mirror.requests) < 2
    monkeypatch.setenv("NANOWARM_CACHE", str(tmp_path / "other"))
    assert text_in(prepare(name, published.as_uri())) == found, "as from a folder"


# What all scripts share: files and the command line

def test_a_file_is_there_whole_or_as_it_was_and_no_other_thing_is_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("a.json")  # as stdout of a system is one, which stays
    data.write_json("link", {"a": np.float32(0.5), "b": np.arange(2), "c": None})
    with patch("os.fsync", side_effect=OSError(28, "Full")), pytest.raises(UserError, match="Full"):
        data.write_json("a.json", {"new": 1})
    assert data.read_json("a.json") == {"a": 0.5, "b": [0, 1], "c": None}
    os.mkfifo("pipe")  # in the place of a device, which root would replace
    write(tmp_path, {".pipe.tmp": "mine"})
    for path in ("pipe", tmp_path, "missing/a"):
        with pytest.raises(UserError, match="cannot write"):
            data.write_json(path, {})
        with pytest.raises(UserError, match="cannot read [^\n]*$"):
            data.read_json(path)
    assert Path("link").is_symlink() and Path("pipe").is_fifo()
    assert sorted(os.listdir()) == [".pipe.tmp", "a.json", "link", "pipe"]


def test_a_person_gets_one_line_and_our_mistakes_a_traceback(capsys):
    for error, line in ((UserError("two\nlines"), "two lines"), (MemoryError(), "enough memory"),
                        (RuntimeError("CUDA out of memory.\nTried 9 GiB"), "enough memory")):
        with pytest.raises(SystemExit):
            data.run_main(Mock(side_effect=error))
        assert re.fullmatch(f"error: [^\n]*{line}[^\n]*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="our mistake"):
        data.run_main(Mock(side_effect=RuntimeError("our mistake")))


@pytest.mark.parametrize("command", ["list", "show eca"])
def test_odd_outputs_and_file_systems_without_locks_are_no_failure(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["data.py", *command.split()])
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "No locks here")))
    text, closed = io.StringIO(), Mock(write=Mock(side_effect=BrokenPipeError))
    for stdout in (None, text, closed, io.TextIOWrapper(io.BytesIO(), "ascii")):
        monkeypatch.setattr("sys.stdout", stdout)
        data.run_main(data.main)
        data.lock(tmp_path / "lock").close()
    assert "eca" in text.getvalue() and "cannot be locked here" in text.getvalue()


def test_threads_that_wait_spin_briefly_whichever_script_comes_first(script, monkeypatch):
    """libgomp itself says what it got: it looks once, when torch is imported."""
    monkeypatch.delenv("GOMP_SPINCOUNT")  # set by data, which this process has imported
    for name in ("data.py", "model.py", "eval.py", "train.py", "analyze.py"):
        said = script(name, "--help", env={"OMP_DISPLAY_ENV": "verbose"}).stderr
        if "GOMP_SPINCOUNT" not in said:
            pytest.skip("this torch has another OpenMP than libgomp")
        assert "GOMP_SPINCOUNT = '1000'" in said
