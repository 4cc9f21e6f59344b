"""Where every token comes from: procedural rules, algorithmic tasks, texts, tokenizers.

    python data.py list                        every rule, task and corpus, with its parameters
    python data.py show dyck:k=3,length=32     rows as a person would write them
    python data.py prepare c4 --tokens 700M    a published corpus, fetched and tokenised once

    from data import make_data
    x, y = make_data("dyck:k=3").train[0]      # y[t] is the token after x[t], or -1: not counted

All data are torch Datasets: of rules and tasks, then of texts. Last comes what all scripts share.
"""
import argparse
import ast
import contextlib
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

# Threads that spin while they wait take the cores from those that work (a step took 20 times as
# long). It must be said before torch is imported: every script imports from here first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import tiktoken
import torch
from torch.utils.data import Dataset


# ---- Procedural rules: rule(r, **parameters) -> (prompt, answer) ---------------------------------
# Lists of tokens, drawn from a random.Random; the loss counts the answer. Symbols: 1..vocab-1.

SEPARATOR = None  # `Rows` gives it its number
RANDOM = -1  # eca's rule where the spec says rule=random: each row has its own


def symbols(r, length, vocab):
    return r.choices(range(1, vocab), k=length)


def identity(r, length=20, vocab=100):
    """the input again: 3 7 3 | 3 7 3"""
    x = symbols(r, length, vocab)
    return x + [SEPARATOR], x


def reverse(r, length=20, vocab=100):
    """the input backwards: 3 7 5 | 5 7 3"""
    x = symbols(r, length, vocab)
    return x + [SEPARATOR], x[::-1]


def sort(r, length=20, vocab=100):
    """the input in ascending order: 7 3 5 | 3 5 7"""
    x = symbols(r, length, vocab)
    return x + [SEPARATOR], sorted(x)


def set_(r, length=20, vocab=100):
    """the input without repeats, in order of first appearance: 3 7 3 5 | 3 7 5"""
    x = symbols(r, length, vocab)
    return x + [SEPARATOR], list(dict.fromkeys(x))


def union(r, length=20, vocab=100):
    """what is in either half, without repeats: 3 7 | 7 5 | 3 7 5"""
    x = symbols(r, length // 2, vocab)
    y = symbols(r, length // 2, vocab)
    return x + [SEPARATOR] + y + [SEPARATOR], list(dict.fromkeys(x + y))


def delete(r, length=20, vocab=100):
    """the input, a symbol, the input without the first such: 3 7 3 5 | 3 | 7 3 5"""
    x = symbols(r, length, vocab)
    t = r.randrange(1, vocab)
    first = x.index(t) if t in x else length
    return x + [SEPARATOR, t, SEPARATOR], x[:first] + x[first + 1:]


def stack(r, length=20, vocab=100):
    """a symbol is pushed, 0 pops; what is left, top first: 3 7 0 5 9 0 | 5 3"""
    operations, left = [], []
    for t in range(length):
        push = r.random() < (0.75 if t < length * 2 // 3 else 0.25)
        must_pop = t == length - 1 or len(left) == vocab - 1  # it holds each symbol once
        if len(left) <= 1 or (push and not must_pop):  # it is never empty
            symbol = r.randrange(1, vocab)
            while symbol in left:
                symbol = r.randrange(1, vocab)
            left.append(symbol)
            operations.append(symbol)
        else:
            left.pop()
            operations.append(0)
    return operations + [SEPARATOR], left[::-1]


def dyck(r, k=16, length=128, p=0.5):
    """balanced brackets of k types; opens with probability p where it may: ( [ ] ) { }"""
    row, opened = [], []
    length -= length % 2
    for t in range(length):
        must_close = len(opened) == length - t
        if not opened or (not must_close and r.random() < p):
            opened.append(r.randrange(k))
            row.append(opened[-1])
        else:
            row.append(k + opened.pop())
    return [], row


def dyck_shuffle(r, k=16, length=128, p=0.5, depth=16):
    """as dyck, but any open type may close, and the end may stay open: ( [ ) ] {"""
    row, opened = [], []
    for _ in range(length):
        if not opened or (len(opened) < depth and r.random() < p):
            opened.append(r.randrange(k))
            row.append(opened[-1])
        else:
            closes = r.choice(sorted(set(opened)))
            opened.remove(closes)
            row.append(k + closes)
    return [], row


def eca(r, rule=110, width=16, length=128):
    """a cellular automaton on a ring, row after row; rule=random (ours): one for each row"""
    if rule == RANDOM:
        rule = r.randrange(256)
    cells = r.choices((0, 1), k=width)
    row = list(cells)
    while len(row) < length:
        neighbours = zip(cells[-1:] + cells[:-1], cells, cells[1:] + cells[:1])
        cells = [rule >> (4 * left + 2 * cell + right) & 1 for left, cell, right in neighbours]
        row += cells
    return row[:width], row[width:length]


# ---- Algorithmic tasks: functions of the same form, in the paper's formats (sorting's is ours) ---


def haystack(r, pairs=30):
    """1 to `pairs` keys and values, one key asked for, its value: k4: 17 k9: 88 ?k4 17"""
    n = r.randint(1, pairs)
    keys = r.sample(range(128, 128 + pairs), n)
    values = r.choices(range(1, 128), k=n)
    prompt = list(itertools.chain.from_iterable(zip(keys, values)))
    needle = r.randrange(n)
    asked = keys[needle] + pairs  # to ask for a key is another token than to name it
    return prompt + [asked], [values[needle]]


def arithmetic(r, digits, operation, order=1):
    """Digits are 0-9, the sign 10, equals 11; those of the answer 20-29, its end 30, pads 12."""
    a, b = (r.randrange(10 ** (digits - 1), 10 ** digits) for _ in range(2))
    written = lambda n: [int(digit) for digit in str(n)[::order]]
    answer = [20 + digit for digit in written(operation(a, b))]
    return written(a) + [10] + written(b) + [11], answer + [30]


def addition(r, digits=5):
    """most significant digit first: 12+34=46."""
    return arithmetic(r, digits, int.__add__)


def reversed_addition(r, digits=10):
    """least significant digit first: 21+43=64."""
    return arithmetic(r, digits, int.__add__, order=-1)


def multiplication(r, digits=5):
    """most significant digit first: 12*34=408."""
    return arithmetic(r, digits, int.__mul__)


def sorting(r, numbers=20, below=100):
    """numbers from 0 to below - 1, a separator, the same in ascending order (layout: ours)"""
    x = r.choices(range(below), k=numbers)
    return x + [below], sorted(x)


# ---- The tables. To add a rule: write its function above, and its line here. ---------------------

# Of p, which `parameters` gives, length as (low, high): tokens, for how many a row has room; vocab,
# how many there are without separators and pad. pad: what fills a task's rows up.
Rule = namedtuple("Rule", "make tokens vocab pad", defaults=[
    lambda p: 2 * p["length"][1] + 1, lambda p: p["vocab"], None])
RULES = {
    "identity": Rule(identity),
    "reverse": Rule(reverse),
    "sort": Rule(sort),
    "set": Rule(set_),
    "union": Rule(union, lambda p: 2 * p["length"][1] + 2),
    "delete": Rule(delete, lambda p: 2 * p["length"][1] + 3),
    "stack": Rule(stack),
    "dyck": Rule(dyck, lambda p: p["length"][1], lambda p: 2 * p["k"]),
    "dyck_shuffle": Rule(dyck_shuffle, lambda p: p["length"][1], lambda p: 2 * p["k"]),
    "eca": Rule(eca, lambda p: p["length"][1], lambda p: 2),
}
TASKS = {
    "haystack": Rule(haystack, lambda p: 2 * p["pairs"] + 3, lambda p: 256, 0),
    "addition": Rule(addition, lambda p: 3 * p["digits"] + 4, lambda p: 31, 12),
    "reversed_addition": Rule(reversed_addition, lambda p: 3 * p["digits"] + 4, lambda p: 31, 12),
    "multiplication": Rule(multiplication, lambda p: 5 * p["digits"] + 4, lambda p: 31, 12),
    "sorting": Rule(sorting, lambda p: 2 * p["numbers"] + 1, lambda p: p["below"] + 1, 0),
}
RULES_AND_TASKS = RULES | TASKS


# ---- Specs: "dyck:k=64", "0.7*set:length=2-20+0.3*union", "shuffled:dyck" ------------------------

# Parameter: (least, below); of others (1, 10 ** 9). A haystack's pair takes two of 128 tokens.
RANGES = {"vocab": (3, 10 ** 9), "p": (0, 1), "rule": (0, 256), "width": (3, 10 ** 9),
          "pairs": (1, 65), "below": (2, 65536), "digits": (1, 1001)}


def parse_spec(spec):
    """A spec -> (shuffled, [(weight, name, parameters), ...]). Raises UserError."""
    shuffled, members = spec.startswith("shuffled:"), []
    texts = spec.removeprefix("shuffled:").replace(" ", "").split("+")
    for text in texts:
        weight, star, rule = text.rpartition("*")
        name, _, given = rule.partition(":")
        if name not in (RULES if shuffled or len(texts) > 1 else RULES_AND_TASKS):
            raise UserError(f"unknown data {spec!r}: there are {', '.join(RULES)}, which can be "
                            f"mixed and shuffled; {', '.join([*TASKS, *CORPORA])}; and paths")
        weight = number(1e-9, 1e9, float)(weight) if star else 1.0
        members.append((weight, name, parameters(name, given)))
    return shuffled, members


def parameters(name, given=""):
    """The parameters of a rule or task, as given ("length=2-20,vocab=50") or as its function has
    them; a length is a pair (low, high), from which each row draws its own. Raises UserError."""
    signature = inspect.signature(RULES_AND_TASKS[name].make)
    defaults = {key: value.default for key, value in signature.parameters.items() if key != "r"}
    p = {key: (value, value) if key == "length" else value for key, value in defaults.items()}
    for item in given.split(",") if given else []:
        key, _, text = item.partition("=")
        if key not in p:
            raise UserError(f"no parameter {item!r}: there is {name}{signature}")
        read = number(*RANGES.get(key, (1, 10 ** 9)), kind=type(defaults[key]))
        if (key, text) == ("rule", "random"):
            p[key] = RANDOM
        elif key == "length":
            low, _, high = text.partition("-")
            p[key] = sorted([read(low), read(high or low)])
        else:
            p[key] = read(text)
    if name == "eca" and p["length"][0] <= p["width"]:
        raise UserError(f"eca: length, the first row and what follows, is above {p['width']}")
    return p


class Rows(Dataset):
    """The rows of a rule, a mixture or a task. Row i is a pure function of (spec, seed, split, i),
    the same in any batch, process and run: to resume takes nothing but the number of the step. Of a
    task one example in 16, by a hash of its prompt, is held out."""
    n = None  # there is no last row

    def __init__(self, spec, seed=0, split="train", block_size=None):
        """block_size: tokens of a row; None: as many as the longest has. Raises UserError."""
        self.spec, self.seed, self.split = spec, seed, split
        self.shuffled, self.members = parse_spec(spec)
        separator = 1 if len(self.members) > 1 else 0  # before rows that have none
        longest = separator + max(RULES_AND_TASKS[name].tokens(p) for _, name, p in self.members)
        size = max(RULES_AND_TASKS[name].vocab(p) for _, name, p in self.members)
        self.block_size = block_size or longest
        if longest > self.block_size:
            raise UserError(f"{spec} makes rows of {longest} tokens, more than {block_size}")
        # Tokens: the symbols, which members share, a separator for each member, and the pad.
        self.separators = range(size, size + len(self.members))
        self.pad = self.separators.stop
        self.vocab_size = self.pad + 1
        name = self.members[0][1]
        if name in TASKS:  # one alone, since tasks do not mix: it has no separator and its own pad
            self.pad, self.vocab_size = TASKS[name].pad, size

    def draw(self, i):
        """Row i as two lists: prompt, answer."""
        r = random.Random(f"{self.seed} {self.split} {i}")
        weights = [weight for weight, _, _ in self.members]
        place = r.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
        _, name, p = self.members[place]
        if "length" in p:
            p = p | {"length": r.randint(*p["length"])}
        for _ in range(1000):  # a task draws until the example's hash says that it is of this split
            prompt, answer = RULES_AND_TASKS[name].make(r, **p)
            if name in RULES or is_held_out(prompt) == (self.split == "val"):
                break
        else:
            raise UserError(f"{self.spec} has too few different examples to hold some out")
        if len(self.members) > 1 and SEPARATOR not in prompt:
            prompt = [SEPARATOR] + prompt  # so that every row says which rule it follows
        prompt = [self.separators[place] if t is SEPARATOR else t for t in prompt]
        if self.shuffled:  # the control: the same tokens, and as many of them count
            tokens = prompt + answer
            r.shuffle(tokens)
            prompt, answer = tokens[:len(prompt)], tokens[len(prompt):]
        return prompt, answer

    def __getitems__(self, rows):
        """Row numbers -> x, y: int64 tensors (rows, block_size). A DataLoader asks for a batch."""
        x = np.full((len(rows), self.block_size), self.pad)
        mask = np.zeros(x.shape, bool)
        for j, i in enumerate(rows):
            prompt, answer = self.draw(i)
            end = len(prompt) + len(answer)
            x[j, :end] = prompt + answer
            mask[j, max(1, len(prompt)):end] = True  # Dyck has no prompt: its first token is given
        y = np.roll(np.where(mask, x, -1), -1, axis=1)  # y[t] is the token after x[t]
        return torch.from_numpy(x), torch.from_numpy(y)

    def __getitem__(self, i):
        x, y = self.__getitems__([i])
        return x[0], y[0]


def is_held_out(prompt):
    return zlib.crc32(np.array(prompt, np.uint16)) % 16 == 0


def micro_batches(x, y, n, trim=True):
    """Rows x, y in n parts. trim: rows of like length together, without what follows the last token
    that counts: nothing reads that, and on a CPU pads cost as much as tokens."""
    if not trim:
        return list(zip(x.chunk(n), y.chunk(n)))
    lengths = y.shape[1] - (y != -1).flip(1).int().argmax(1)  # to the last that counts
    groups = lengths.argsort(stable=True).chunk(n)  # the last row of each is the longest
    return [(x[rows, :lengths[rows[-1]]], y[rows, :lengths[rows[-1]]]) for rows in groups]


# ---- Here a student may stop. Every text becomes nanoGPT's folder: train.bin, val.bin ------------

ANSWER, PROBLEM = 96, 95  # tokens of DeepMind-Math: the marks after a question and after an answer
PIECE = 50_000  # characters; a million spaces at once make tiktoken panic
LONG = 1 << 26  # characters of a line of JSON, at most
VERSION = 7  # to be raised where the same text becomes other tokens

# encode: text -> tokens; decode: tokens -> bytes; end: the token that ends a document, if one does.
Tokenizer = namedtuple("Tokenizer", "name vocab_size encode decode end", defaults=[None])


def load_tokenizer(name):
    """`bytes`, `characters` (of DeepMind-Math) or one that tiktoken knows. Raises UserError."""
    if name == "bytes":
        encode = lambda text: np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        words = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
        return Tokenizer(name, 257, encode, lambda ts: b"".join(words[t] for t in ts), end=256)
    if name == "characters":
        encode = lambda text: np.frombuffer(text.encode("latin-1"), np.uint8) - 32
        words = [*map(chr, range(32, 127)), "<problem>", "<answer>"]
        return Tokenizer(name, 97, encode, lambda ts: "".join(words[t] for t in ts).encode())
    with reading(f"the vocabulary {name} (bytes needs no network, gpt2 needs it once)"):
        bpe = tiktoken.get_encoding(name)
        if bpe.n_vocab > 1 << 16:
            raise ValueError(f"it has {bpe.n_vocab:,} tokens, more than 16 bits hold")
    return Tokenizer(name, bpe.n_vocab, bpe.encode_ordinary, bpe.decode_bytes, end=bpe.eot_token)


def pieces_of(file):
    """An open file, gzipped or not -> pieces (text, whether a document ends): lines of JSON with
    `text` or `content`, a document each, if it begins as such; else plain text, one document."""
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    file = io.TextIOWrapper(gzip.open(file) if zipped else file, "utf-8-sig", newline="\n")
    is_json = re.match(r'\s*\[?\s*{\s*"', file.read(100))
    file.seek(0)
    for piece in iter(lambda: file.readline(LONG) if is_json else file.read(PIECE), ""):
        if is_json:
            record = json.loads(piece) if piece.strip() else {"text": ""}
            piece = (record["text" if "text" in record else "content"] or "") + ""
        if "\0" in piece:
            raise ValueError("it holds a NUL, which no text does")
        yield piece, bool(is_json)
    yield "", True


def file_pieces(path):
    with reading(path), open(path, "rb") as file:
        yield from pieces_of(file)


def users_files(root):
    """The text files of a path, as named for training and validation, or (all, [])."""
    train, val, others, left_out = [], [], [], []
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        place = path.relative_to(root).as_posix().lower()
        is_folder = path.is_dir() and os.access(path, os.R_OK) and not path.is_symlink()
        if is_folder or re.search(r"(^|/)\..", place):
            continue  # what is hidden is no text
        words = set(re.split("[^a-z]+", place))
        is_val = words & {"val", "valid", "validation", "dev", "test"}
        split = train if "train" in words else val if is_val else others
        try:
            next(file_pieces(path), None)
            split.append(path)
        except UserError:
            left_out.append(path.name)
    if not train or not val:
        train, val, others = sorted(train + val + others), [], []
    if not train:
        raise UserError(f"{root} has no files of UTF-8 text")
    left_out += [path.name for path in others]
    if left_out:
        say(f"left out of {root}: {len(left_out)}, such as {', '.join(left_out[:9])}")
    return train, val


def python_files(*packages):
    """The .py files of the standard library and of packages, without tests."""
    skip = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3"}
    files = []
    for package in (os, *packages):
        for folder, folders, names in os.walk(Path(package.__file__).parent):
            folders[:] = sorted(set(folders) - skip)
            files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return files


def docstrings(path):
    """Those of a Python file that are long enough to be prose (200 characters: ours)."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) >= 200:
                yield text, True


def questions(split):
    """School mathematics in words, after DeepMind-Math (sentences: ours): 16 or 1 M characters."""
    r, left = random.Random(split), 16_000_000 if split == "train" else 1_000_000
    while left > 0:
        a, b = (r.randint(-10 ** r.randint(1, 4), 10 ** r.randint(1, 4)) for _ in range(2))
        n, d = r.randint(2, 10 ** r.randint(2, 5)), r.randint(2, 40)
        p, q, x = r.randint(1, 30), r.randint(1, 30), r.randint(-30, 30)
        question, answer = r.choice((
            (f"What is {a} + ({b})?", a + b),
            (f"What is {a} * ({b})?", a * b),
            (f"Divide {a * d} by {d}.", a),
            (f"What remains when {n} is divided by {d}?", n % d),
            (f"Is {a} less than {b}?", "yes" if a < b else "no"),
            (f"Write {n} in base 2.", f"{n:b}"),
            (f"Solve {d}*x + ({b}) = {d * x + b} for x.", x),
            (f"Let f(x) = {p}*x**2 + {q}*x + ({b}). What is f({x})?", p * x ** 2 + q * x + b)))
        if is_held_out(list(question.encode())) == (split == "val"):
            text = f"{question}\n{answer}\n"
            left -= len(text)
            yield text, False


def write_tokens(file, texts, tokenizer):
    """Streams of pieces -> a file of 16-bit tokens. Returns where its documents end."""
    ends = [0]
    for text, ends_here in itertools.chain.from_iterable(texts):
        for start in range(0, len(text), PIECE):
            file.write(np.asarray(tokenizer.encode(text[start:start + PIECE]), np.uint16))
        if ends_here and file.tell() // 2 > ends[-1]:  # else the document is empty
            file.write(np.uint16(tokenizer.end))
            ends.append(file.tell() // 2)
    return ends


def cache_folder():
    with reading("$NANOWARM_CACHE, the cache folder"):  # there may be no home
        return Path(os.environ.get("NANOWARM_CACHE") or "~/.cache/nanowarm").expanduser()


def tokenise(spec, tokenizer):
    """`code`, `docs`, `math` or a path -> its folder in the cache, made once for these files."""
    val, read = [], file_pieces
    if spec == "code":
        train = python_files()
    elif spec == "docs":
        import matplotlib
        train, read = python_files(torch, np, tiktoken, matplotlib), docstrings
    elif spec == "math":
        train, val, read = ["train"], ["val"], questions
    else:
        train, val = users_files(Path(spec))
    key = hashlib.sha256(repr((VERSION, read.__name__, tokenizer.name, train, val)).encode())
    for path in train + val if read != questions else []:
        with reading(path), open(path, "rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    folder = cache_folder() / key.hexdigest()[:24]
    with lock(folder / "lock", wait=True):
        if (folder / "meta.json").exists():  # it is written last
            return folder
        say(f"tokenising {spec} into {folder}, once")
        random.Random(0).shuffle(train)
        with open(folder / "train.bin", "w+b") as file, open(folder / "val.bin", "wb") as other:
            ends = write_tokens(file, map(read, train), tokenizer)
            write_tokens(other, map(read, val), tokenizer)
            if not val:  # the last tenth, from where a document ends if that is near
                cut = ends[-1] - ends[-1] // 10
                near = min(ends, key=lambda end: abs(end - cut))
                cut = near if abs(near - cut) <= ends[-1] // 100 else cut
                file.seek(2 * cut)
                shutil.copyfileobj(file, other)
                file.truncate(2 * cut)
        write_json(folder / "meta.json", {"source": spec, "tokenizer": tokenizer.name})
    return folder


# ---- Published corpora: each file becomes a shard of tokens, all shards one train.bin ------------

PUBLISHED = {  # tokens: what the published run reads, and a bit, or all; an archive has both splits
    "c4": dict(
        tokens=700_000_000, url="https://huggingface.co/datasets/allenai/c4/resolve/main/en",
        train=[f"c4-train.{i:05}-of-01024.json.gz" for i in range(1024)],
        val=[f"c4-validation.{i:05}-of-00008.json.gz" for i in range(8)]),
    "codeparrot": dict(
        tokens=1_000_000_000, url="https://huggingface.co/datasets/codeparrot",
        train=[f"codeparrot-clean-train/resolve/main/file-{i:012}.json.gz" for i in range(1, 54)],
        val=["codeparrot-clean-valid/resolve/main/file-000000000054.json.gz"]),
    "wikitext103": dict(
        tokens=120_000_000, url="https://wikitext.smerity.com", train=["wikitext-103-raw-v1.zip"]),
    "deepmind_math": dict(
        tokens=1_700_000_000, url="https://storage.googleapis.com/mathematics-dataset",
        train=["mathematics_dataset-v1.0.tar.gz"])}
HELD_OUT = 10_000_000  # tokens
CORPORA = {  # and their tokenizers, beside a user's path
    "code": "bytes", "docs": "bytes", "math": "bytes", "c4": "gpt2", "codeparrot": "gpt2",
    "wikitext103": "gpt2", "deepmind_math": "characters"}


def published_pieces(file, name, split, n_tokens):
    """A published file: lines of JSON, WikiText's archive, or DeepMind-Math's, where a piece is
    question<answer>answer<problem>, and each module has as many characters, as published."""
    file.seek(0)
    if name.endswith(".json.gz"):
        yield from pieces_of(gzip.open(file))  # what is not gzipped is a server's excuse
    elif name.endswith(".zip"):
        member = {"train": "wiki.train.raw", "val": "wiki.valid.raw"}[split]
        yield from pieces_of(zipfile.ZipFile(file).open(f"wikitext-103-raw/{member}"))
    else:
        pattern = {"train": "train-*/*.txt", "val": "*polate/*.txt"}[split]
        with gzip.open(file) as unzipped, tarfile.open(fileobj=unzipped) as archive:
            modules = [module for module in archive if Path(module.name).match(pattern)]
            unzipped.read()  # to its end, where gzip finds out whether it is whole
            for module in modules:
                start = archive.extractfile(module).read(n_tokens // len(modules)).decode("ascii")
                lines = start.split("\n")[:-1]
                yield "".join(question + chr(32 + ANSWER) + answer + chr(32 + PROBLEM)
                              for question, answer in zip(lines[::2], lines[1::2])), False


@functools.lru_cache(maxsize=1)  # both splits of an archive are in one file
def fetch(url):
    """A published file, as a temporary one, which is gone with the process. Raises UserError."""
    for pause in (0, 2, 10):  # seconds
        time.sleep(pause)
        file = tempfile.TemporaryFile()
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                wanted = int(answer.headers["Content-Length"] or 0)
                say(f"fetching {url}, {wanted / 1e6:,.0f} MB")
                shutil.copyfileobj(answer, file, 1 << 20)
            if file.tell() and wanted in (0, file.tell()):
                return file
            reason = f"{file.tell():,} of {wanted:,} bytes came"
        except Exception as error:  # whatever a network says
            reason = reason_of(error)
    raise UserError(f"cannot fetch {url}: {reason}; the same command goes on from here, and "
                    "--source says where else they are (https://... or file:///...)")


def prepare(name, tokens, source=None):
    """Fetches and tokenises a published corpus, whole files until there are as many tokens. A shard
    is there whole or not at all: the same command goes on, or adds to it. Returns the folder."""
    corpus, tokenizer = PUBLISHED[name], load_tokenizer(CORPORA[name])
    base = (source or corpus["url"]).rstrip("/")
    folder = cache_folder() / f"{name}-{tokenizer.name}"
    with lock(folder / "lock"):
        for split, n_tokens in (("val", HELD_OUT), ("train", tokens)):
            with written_whole(folder / f"{split}.bin") as whole:
                files = corpus.get(split, corpus["train"])
                for file in itertools.takewhile(lambda file: whole.tell() < 2 * n_tokens, files):
                    url = f"{base}/{Path(file).name if source else file}"
                    size = f"-{n_tokens}" if name == "deepmind_math" else ""  # what is read of it
                    shard = folder / f"{split}-{Path(file).name}{size}.tokens"
                    if not shard.exists():
                        with written_whole(shard) as part, reading(url):
                            pieces = published_pieces(fetch(url), file, split, n_tokens)
                            write_tokens(part, [pieces], tokenizer)
                            if part.tell() == 0:
                                raise ValueError("it holds no text")
                    with open(shard, "rb") as part:
                        shutil.copyfileobj(part, whole)
                    say(f"{shard.name}: {whole.tell() / 2e6:,.1f} of {n_tokens / 1e6:,.1f} M")
        write_json(folder / "meta.json", {"source": name, "tokenizer": tokenizer.name})
    return folder


class Windows(Dataset):
    """Windows of block_size + 1 tokens of a file, each once per epoch, in the order of a seed. The
    split `warmup` (of `--warmup text`) reads from the other end: what the run comes to last."""

    def __init__(self, path, block_size, seed, split):
        self.path, self.block_size, self.seed, self.split = path, block_size, seed, split
        with reading(path):
            self.n = (len(self.tokens) - 1) // block_size
            if self.n < 1:
                raise ValueError(f"it is too short for a row of {block_size} + 1 tokens")

    @property
    @functools.lru_cache(maxsize=4)
    def tokens(self):  # a worker that is spawned would get a copy of an attribute
        return np.memmap(self.path, np.uint16, "r")

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(self.n)

    def start(self, i):
        """Where row i begins."""
        epoch, i = divmod(i, self.n)
        if self.split == "warmup":
            epoch, i = 0, self.n - 1 - i
        return int(self.order(epoch)[i]) * self.block_size

    def __getitems__(self, rows):
        """Row numbers -> x, y: int64 tensors (rows, block_size)."""
        starts = np.array([[self.start(i)] for i in rows])
        both = self.tokens.take(starts + np.arange(self.block_size + 1), mode="clip")
        both = torch.from_numpy(both.astype(np.int64))
        return both[:, :-1], both[:, 1:]

    __getitem__ = Rows.__getitem__


class Problems(Windows):
    """DeepMind-Math: the loss counts answers, with the token that ends each. A row begins where the
    first problem of its window ends; beyond the file's end its last token is repeated."""

    def start(self, i):
        start = super().start(i)
        return start + int(np.argmax(self.tokens[start:start + 256] == PROBLEM))  # none is longer

    def __getitems__(self, rows):
        x, y = super().__getitems__(rows)
        in_answer = (x == PROBLEM).cumsum(1) == (x == ANSWER).cumsum(1)
        return x, torch.where(in_answer, y, -1)


def word(token, rows):
    """A token of a rule or task as a person would write it; of a mixture, its number."""
    _, name, p = rows.members[0]
    if token == rows.pad and name != "sorting":
        return "_"
    if len(rows.members) > 1:
        return str(token)
    if token == rows.separators[0]:  # of a task, none
        return "|"
    if "k" in p:
        closes, kind = divmod(token, p["k"])
        return "([{<)]}>"[4 * closes + kind] if p["k"] <= 4 else f"{'()'[closes]}{kind}"
    if name == "haystack" and token >= 128:
        key = token - 128
        return f"k{key}:" if key < p["pairs"] else f"?k{key - p['pairs']}"
    if "digits" in p:
        signs = "*=" if name == "multiplication" else "+="
        return f"0123456789{signs}        0123456789."[token]
    return "·█"[token] if name == "eca" else str(token)


class Data(NamedTuple):
    """What a spec names. Row i of train and of val is x, y: int64 tensors (block_size,)."""
    spec: str
    kind: str  # "rule", "task" or "text"
    train: Dataset
    val: Dataset
    vocab_size: int
    block_size: int
    tokenizer: Tokenizer = None  # of text

    def fingerprint(self):
        """A number that differs where the data do: a run goes on with the same data alone."""
        both = self.train, self.val
        if self.kind == "text":  # of 16 M tokens
            found = tuple([zlib.crc32(each.tokens[:1 << 24])] for each in both)
        else:
            found = tuple(zlib.crc32(each.__getitems__(range(8))[0].numpy()) for each in both)
        return zlib.crc32(repr(found).encode())

    def write(self, x, y=None):
        """Tokens as a person would write them; of a row x, y what counts is between « and »."""
        if self.kind == "text":
            return self.tokenizer.decode([int(t) for t in x]).decode("utf-8", "replace")
        words = [word(int(t), self.train) for t in x]
        if y is not None and (y != -1).any():  # what counts is in one piece
            counted = (y != -1).nonzero().flatten() + 1
            words[counted[0]] = "«" + words[counted[0]]
            words[counted[-1]] += "»"
        _, name, p = self.train.members[0]
        if name == "eca" and len(self.train.members) == 1:  # a line for each of its rows
            lines = [words[i:i + p["width"]] for i in range(0, len(words), p["width"])]
            return "\n".join(map("".join, lines))
        return ("" if "digits" in p else " ").join(words)


def kind_of(spec):
    """"rule", "task" or "text", without loading anything. Raises UserError."""
    if spec in CORPORA or spec not in RULES_AND_TASKS and os.path.exists(spec):
        return "text"
    _, members = parse_spec(spec)
    return "task" if members[0][1] in TASKS else "rule"


def make_data(spec, seed=0, block_size=None, tokenizer=None, split="train"):
    """The data that a spec names. block_size: of a row (default: as long as they come; text: 256).
    tokenizer: of text. split "warmup": train is other text, see Windows. Raises UserError."""
    kind = kind_of(spec)
    usual = CORPORA.get(spec, "bytes") if kind == "text" else None
    name = tokenizer or usual
    if name != usual and (kind != "text" or spec in PUBLISHED or name == "characters"):
        raise UserError(f"{spec} is not to be had with --tokenizer {name}")
    if kind != "text":
        train, val = (Rows(spec, seed, part, block_size) for part in ("train", "val"))
        return Data(spec, kind, train, val, train.vocab_size, train.block_size)
    folder = Path(spec)
    if spec in PUBLISHED:
        folder = cache_folder() / f"{spec}-{name}"
        if not (folder / "meta.json").exists():
            raise UserError(f"{spec} is not prepared here: python data.py prepare {spec}")
    elif spec in CORPORA or not (folder / "train.bin").exists():
        folder = tokenise(spec, load_tokenizer(name))
    elif (folder / "meta.pkl").exists():
        raise UserError(f"{folder} has a vocabulary of its own (meta.pkl): point at its text")
    meta = read_json(folder / "meta.json") if (folder / "meta.json").exists() else {}
    tokenizer = load_tokenizer(str(meta.get("tokenizer", "gpt2")))  # nanoGPT's has no meta.json
    windows, size = Problems if tokenizer.name == "characters" else Windows, block_size or 256
    train = windows(folder / "train.bin", size, seed, split)
    val = windows(folder / "val.bin", size, 0, "val")
    if folder == Path(spec) and max(train.tokens.max(), val.tokens.max()) >= tokenizer.vocab_size:
        raise UserError(f"{spec} holds tokens that {tokenizer.name} does not know")
    return Data(spec, kind, train, val, tokenizer.vocab_size, size, tokenizer)


# ---- What all scripts share: errors, files, the command line -------------------------------------


class UserError(argparse.ArgumentTypeError):  # so that argparse says of which flag
    """Something the user can put right: one line on stderr and exit status 2, see run_main."""


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong in this block, which uses what is in a file, becomes a UserError."""
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError("it is not a file")  # a pipe would make us wait for ever
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None


def reason_of(error):
    """What an error says, in one line; an OSError without its number and path."""
    said = " ".join(str(error).split())[:200]
    return getattr(error, "strerror", None) or f"{said} ({type(error).__name__})"


@contextlib.contextmanager
def written_whole(path):
    """Yields a file that becomes `path` at the end, whole or not at all. Raises UserError."""
    path = Path(path).resolve()  # a link stays one
    scratch = path.with_name(f".{path.name}.tmp")  # what a kill leaves of it is written over
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is there and is not a file")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the first behind the second
        reason = reason_of(error.__context__ or error)
        raise UserError(f"cannot write {path}: {reason}; what was there is unharmed") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_json(path, value):
    """numpy's numbers and arrays become Python's."""
    text = json.dumps(value, indent=1, default=lambda array: array.tolist())
    with written_whole(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path):
    """The JSON object in a file. Raises UserError."""
    with reading(path):
        return {**json.loads(Path(path).read_bytes())}


def json_lines(path):
    """The values in a file of JSON lines, without what is none: a kill may leave half a line."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


def lock(path, wait=False):
    """Holds a file until it is closed, or this process ends, however it ends. Another process that
    has it is waited for, or refused. Windows locks nothing, and some file systems cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        # A DataLoader's workers, which outlive a kill by seconds, would hold it as well.
        os.register_at_fork(after_in_child=file.close)
    except BlockingIOError:
        raise UserError(f"another process is at work in {path.parent}: let it end first") from None
    except (ImportError, OSError):
        say(f"{path} cannot be locked here: one process at a time, please")
    return file


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is one line like every other error."""

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(low, below=float("inf"), kind=int):
    """A type for argparse: a number from `low` to less than `below`; 4M and 1.6B are numbers."""
    def parse(text):
        powers = {"K": "e3", "M": "e6", "B": "e9", "T": "e12"}
        with contextlib.suppress(ValueError):
            value = float(text[:-1].replace("_", "x") + powers.get(text[-1:].upper(), text[-1:]))
            if low <= value < below and kind(value) == value:
                return kind(value)
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{text[:40]!r} is not {wanted} from {low} to below {below:g}")
    return parse


def say(line):
    """What scripts print with: of several processes rank 0. Work goes on where nobody reads it."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:  # python train.py ... | head
            sys.stdout = None


def run_main(main):
    """Runs a script's main: what the user can put right is one line on stderr and status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not; none at all is None
        sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = str(error)
        if not isinstance(error, (UserError, OSError)):  # torch says RuntimeError
            if not re.search("allocate|out of memory|^$", line):
                raise
            line = "not enough memory: smaller batches or models, or --grad_accum, need less"
        print("error:", *line.split(), file=sys.stderr)
        sys.exit(2)


def main():
    parser = Parser(description="Look at the data, or prepare a published corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every rule, task and corpus, with its parameters")
    shower = commands.add_parser("show", help="print rows as a person would write them")
    shower.add_argument("spec", help="such as dyck:k=3,length=32, haystack:pairs=4, code, a path")
    shower.add_argument("-n", type=number(1, 10_001), default=3, help="how many (default 3)")
    shower.add_argument("--seed", type=number(0, 2 ** 32), default=0)
    preparer = commands.add_parser("prepare", help="fetch and tokenise a published corpus")
    preparer.add_argument("name", choices=PUBLISHED)
    preparer.add_argument("--tokens", type=number(1), help="such as 700M (default: as published)")
    preparer.add_argument("--source", help="where the same files are: https://..., file:///...")
    args = parser.parse_args()
    if args.command == "list":
        for name, rule in RULES_AND_TASKS.items():
            say(f"{name:18} {rule.make.__doc__}\n{'':18} {inspect.signature(rule.make)}")
        say(f"{'text':18} {', '.join(CORPORA)}, or a path: see README")
    elif args.command == "show":
        data = make_data(args.spec, args.seed)
        say(f"{args.spec}: {data.block_size} tokens from a vocabulary of {data.vocab_size}; the "
            "loss counts what is between « and », all of text, of DeepMind-Math answers")
        for i in range(args.n):
            say("\n" + data.write(*data.train[i]))
    else:
        folder = prepare(args.name, args.tokens or PUBLISHED[args.name]["tokens"], args.source)
        say(f"{args.name} is in {folder}; next: python train.py --preset {args.name}")


if __name__ == "__main__":
    run_main(main)
