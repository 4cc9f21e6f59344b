"""Where every token comes from: procedural rules, algorithmic tasks, corpora, tokenizers.

    python data.py list                        every rule, task and corpus, with its parameters
    python data.py show dyck:k=3,length=32     rows as a person would write them
    python data.py prepare c4 --tokens 700M    a published corpus, fetched and tokenised once

    from data import make_data
    x, y = make_data("dyck:k=3").train[0]      # y[t] is the token after x[t], or -1: not counted

All data are torch Datasets. Rules, tasks and `Rows`, which makes rows of them, come first; corpora
come after: look things up there.
"""
import argparse
import ast
import collections
import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Threads that spin while they wait take the cores from those that work: on a busy machine a step
# took 20 times as long. This has to be said before torch starts its threads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import tiktoken
import torch
from torch.utils.data import Dataset


class UserError(Exception):
    """Something the user can put right: one line on stderr and this exit status, see run_main."""

    status = 2


class Busy(UserError):
    """Another process is at work on it: to be tried again later."""

    status = 75  # EX_TEMPFAIL of sysexits.h


# --------------------------------------------------------------------------------------------------
# Procedural rules: rule(r, **parameters) -> (prompt, answer), two lists of tokens, drawn from a
# random.Random. The loss counts the answer. Where there is a `vocab`, the symbols are 1..vocab-1
# (paper, "Procedural data").

BAR = None  # the separator; `Rows` gives it its number
RANDOM = -1  # what "rule=random" says of eca


def symbols(r, length, vocab):
    return r.choices(range(1, vocab), k=length)


def without_repeats(x):
    return list(dict.fromkeys(x))


def identity(r, length=20, vocab=100):
    """the input again: 3 7 3 | 3 7 3"""
    x = symbols(r, length, vocab)
    return x + [BAR], x


def reverse(r, length=20, vocab=100):
    """the input backwards: 3 7 5 | 5 7 3"""
    x = symbols(r, length, vocab)
    return x + [BAR], x[::-1]


def sort(r, length=20, vocab=100):
    """the input in ascending order: 7 3 5 | 3 5 7"""
    x = symbols(r, length, vocab)
    return x + [BAR], sorted(x)


def set_(r, length=20, vocab=100):
    """the input without repeats, in order of first appearance: 3 7 3 5 | 3 7 5"""
    x = symbols(r, length, vocab)
    return x + [BAR], without_repeats(x)


def union(r, length=20, vocab=100):
    """what is in either half, without repeats: 3 7 | 7 5 | 3 7 5"""
    x = symbols(r, length // 2, vocab)
    y = symbols(r, length // 2, vocab)
    return x + [BAR] + y + [BAR], without_repeats(x + y)


def delete(r, length=20, vocab=100):
    """the input, a symbol, the input without the first such: 3 7 3 5 | 3 | 7 3 5"""
    x = symbols(r, length, vocab)
    t = r.randrange(1, vocab)
    rest = list(x)
    if t in rest:
        rest.remove(t)
    return x + [BAR, t, BAR], rest


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
    return operations + [BAR], left[::-1]


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
    """a cellular automaton on a ring of `width` cells, row after row; the first row is random

    rule=random: each example has a rule of its own, which has to be found out (ours)."""
    if rule == RANDOM:
        rule = r.randrange(256)
    cells = r.choices((0, 1), k=width)
    row = list(cells)
    while len(row) < length:
        neighbours = zip(cells[-1:] + cells[:-1], cells, cells[1:] + cells[:1])
        cells = [rule >> (4 * left + 2 * cell + right) & 1 for left, cell, right in neighbours]
        row += cells
    return row[:width], row[width:length]


def nca(r, states=10, grid=12, length=180, simple=0, complex=10_000):
    """a neural cellular automaton, frame after frame; each example has a net of its own

    After arXiv 2603.10055, but for the net, which is ours: 3 x 3 cells of a grid without edges, 16
    hidden units, and the likeliest state. A token is a patch of 2 x 2 cells. Nets are drawn until
    the cells of one zip to `simple` to `complex` thousandths of their size; of 50, the nearest."""
    places = np.arange(grid ** 2).reshape(grid, grid)
    shifts = itertools.product((-1, 0, 1), repeat=2)
    around = np.stack([np.roll(places, shift, (0, 1)) for shift in shifts], 2)  # grid, grid, 9
    one_hot, nearest = np.eye(states), math.inf
    for _ in range(50):
        g = np.random.default_rng(r.getrandbits(64))
        hidden, out = g.normal(size=(9 * states, 16)), g.normal(size=(16, states))
        frames = [g.integers(states, size=(grid, grid))]
        while len(frames) * grid ** 2 < 4 * length:
            seen = one_hot[frames[-1].take(around)].reshape(grid, grid, -1)
            frames.append((np.tanh(seen @ hidden) @ out).argmax(2))
        cells = np.array(frames, np.uint8)
        zipped = 1000 * len(zlib.compress(cells)) / cells.size
        off = max(simple - zipped, zipped - complex, 0)
        if off < nearest:
            nearest, best = off, cells
        if off == 0:
            break
    patches = best.reshape(-1, grid // 2, 2, grid // 2, 2).swapaxes(2, 3).reshape(-1, 4)
    row = (patches @ states ** np.arange(3, -1, -1)).tolist()
    return row[:grid ** 2 // 4], row[grid ** 2 // 4:length]


# --------------------------------------------------------------------------------------------------
# Algorithmic tasks: functions of the same form. The formats are the paper's, token for token.


def haystack(r, pairs=30):
    """1 to `pairs` keys and values, one key asked for, its value: k4: 17 k9: 88 ?k4 17"""
    n = r.randint(1, pairs)
    keys = r.sample(range(128, 128 + pairs), n)
    values = r.choices(range(1, 128), k=n)
    prompt = list(itertools.chain.from_iterable(zip(keys, values)))
    needle = r.randrange(n)
    asked = keys[needle] + pairs  # to ask for a key is another token than to name it
    return prompt + [asked], [values[needle]]


def arithmetic(r, digits, operation, least_first=False):
    """Digits are 0-9, the sign 10, equals 11; those of the answer 20-29, its end 30."""
    low, high = 10 ** (digits - 1), 10 ** digits
    a, b = r.randrange(low, high), r.randrange(low, high)
    order = -1 if least_first else 1
    written = lambda n: [int(digit) for digit in str(n)[::order]]
    answer = [20 + digit for digit in written(operation(a, b))]
    return written(a) + [10] + written(b) + [11], answer + [30]


def addition(r, digits=5):
    """most significant digit first: 12+34=46."""
    return arithmetic(r, digits, int.__add__)


def reversed_addition(r, digits=10):
    """least significant digit first: 21+43=64."""
    return arithmetic(r, digits, int.__add__, least_first=True)


def multiplication(r, digits=5):
    """most significant digit first: 12*34=408."""
    return arithmetic(r, digits, int.__mul__)


def sorting(r, numbers=20, below=100):
    """numbers from 0 to below - 1, a separator, the same in ascending order (layout: ours)"""
    x = r.choices(range(below), k=numbers)
    return x + [below], sorted(x)


# --------------------------------------------------------------------------------------------------
# The tables. To add a rule: write its function above, and its line here.


@dataclass
class Rule:
    """A rule or a task. Its parameters are those that its function has after r, with their
    defaults."""
    make: Callable
    tokens: Callable = lambda p: 2 * p["length"] + 1  # of the longest row, by its parameters
    vocab: Callable = lambda p: p["vocab"]  # how many symbols there are
    pad: int = None                         # of a task: fills its rows up
    least: Callable = lambda p: 1           # the smallest length


RULES = {
    "identity": Rule(identity),
    "reverse": Rule(reverse),
    "sort": Rule(sort),
    "set": Rule(set_),
    "union": Rule(union, lambda p: 2 * p["length"] + 2),
    "delete": Rule(delete, lambda p: 2 * p["length"] + 3),
    "stack": Rule(stack),
    "dyck": Rule(dyck, lambda p: p["length"], lambda p: 2 * p["k"]),
    "dyck_shuffle": Rule(dyck_shuffle, lambda p: p["length"], lambda p: 2 * p["k"]),
    "eca": Rule(eca, lambda p: p["length"], lambda p: 2, least=lambda p: p["width"] + 1),
    "nca": Rule(nca, lambda p: p["length"], lambda p: p["states"] ** 4,
                least=lambda p: p["grid"] ** 2 // 4 + 1),
}
TASKS = {
    "haystack": Rule(haystack, lambda p: 2 * p["pairs"] + 3, lambda p: 256, pad=0),
    "addition": Rule(addition, lambda p: 3 * p["digits"] + 4, lambda p: 31, pad=12),
    "reversed_addition": Rule(reversed_addition, lambda p: 3 * p["digits"] + 4, lambda p: 31,
                              pad=12),
    "multiplication": Rule(multiplication, lambda p: 5 * p["digits"] + 4, lambda p: 31, pad=12),
    "sorting": Rule(sorting, lambda p: 2 * p["numbers"] + 1, lambda p: p["below"] + 1, pad=0),
}
RULES_AND_TASKS = RULES | TASKS


# --------------------------------------------------------------------------------------------------
# Specs: "dyck:k=64,length=2048", "set:length=2-20", "0.7*set+0.3*union:length=32", "shuffled:dyck"

LIMITS = {  # what a parameter accepts; one that is not here goes from 0 to a million
    "length": (1, 65536), "vocab": (3, 50000), "k": (1, 20000), "p": (0, 1), "depth": (1, 1024),
    "rule": (0, 255), "width": (3, 4096), "pairs": (1, 64), "digits": (1, 100),
    "numbers": (1, 1024), "below": (2, 50000), "states": (2, 16), "grid": (2, 64)}


def parse_spec(spec):
    """A spec -> (shuffled, [(weight, name, parameters), ...]). Raises UserError."""
    members = []
    for text in spec.removeprefix("shuffled:").split("+"):
        weight, star, rule = text.rpartition("*")
        name, _, given = rule.partition(":")
        try:
            weight = float(weight) if star else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight <= 1e6:
            raise UserError(f"{text}: a weight is a number above 0 and at most a million")
        members.append((weight, name.strip(), parameters(name.strip(), given)))
    shuffled = spec.startswith("shuffled:")
    if (shuffled or len(members) > 1) and any(name in TASKS for _, name, _ in members):
        raise UserError(f"{spec}: a task is neither mixed nor shuffled, only rules are")
    return shuffled, members


def parameters(name, given=""):
    """The parameters of a rule or task, as given ("length=2-20, vocab=50") or as its function has
    them; a length is a pair (low, high), from which each row draws its own. Raises UserError."""
    if name not in RULES_AND_TASKS:
        raise UserError(f"unknown rule or task {name!r}: there are {', '.join(RULES_AND_TASKS)}")
    signature = inspect.signature(RULES_AND_TASKS[name].make).parameters.items()
    defaults = {key: value.default for key, value in signature if key != "r"}
    takes = ", ".join(f"{key}={value}" for key, value in defaults.items())
    p = {key: (value, value) if key == "length" else value for key, value in defaults.items()}
    for item in given.split(",") if given else []:
        key, _, text = (word.strip() for word in item.partition("="))
        if key not in p:
            raise UserError(f"{name}: bad parameter {item.strip()!r}: it takes {takes}")
        if (key, text) == ("rule", "random"):
            p[key] = RANDOM
            continue
        least, most = LIMITS.get(key, (0, 10 ** 6))
        ends = text.split("-", 1) if key == "length" else [text]
        try:
            values = [type(defaults[key])(end) for end in ends]
        except ValueError:
            values = [math.nan]
        if not least <= values[0] <= values[-1] <= most:
            raise UserError(f"{name}: {key}={text} is not accepted: from {least} to {most}")
        p[key] = (values[0], values[-1]) if key == "length" else values[0]
    least = RULES_AND_TASKS[name].least(p)
    if "length" in p and p["length"][0] < least:
        raise UserError(f"{name}: length, its first frame and what follows, is {least} or more")
    if p.get("grid", 0) % 2:
        raise UserError(f"{name}: grid is even, since a token is a patch of 2 x 2 cells")
    return p


def can_grow(spec):
    """Whether a rule's inputs may be as short as one likes. Raises UserError."""
    return all(RULES_AND_TASKS[name].least(p) == 1 for _, name, p in parse_spec(spec)[1])


def word(token, name, p):
    """A symbol of a rule or task as a person would write it."""
    if name in ("dyck", "dyck_shuffle"):
        kind, closes = token % p["k"], token >= p["k"]
        if p["k"] <= 4:
            return "()[]{}<>"[2 * kind + closes]
        return f"{kind})" if closes else f"({kind}"
    if name == "eca" and token < 2:
        return "·█"[token]
    if name == "haystack" and token >= 128:
        key = token - 128
        return f"k{key}:" if key < p["pairs"] else f"?k{key - p['pairs']}"
    if name in ("addition", "reversed_addition", "multiplication"):
        signs = {10: "*" if name == "multiplication" else "+", 11: "=", 12: "_", 30: "."}
        return signs.get(token, str(token % 10))
    special = {("stack", 0): "pop", ("haystack", 0): "_", ("sorting", p.get("below")): "|"}
    return special.get((name, token), str(token))


# --------------------------------------------------------------------------------------------------
# Rows of them


class Rows(Dataset):
    """The rows of a rule, a mixture of rules or a task.

    Row i is a pure function of (spec, seed, split, i): the same in any batch, process and run. So a
    run needs nothing but its step number to resume. Only a curriculum shortens rows as it goes, see
    `longest`. Of a task, one example in 16, by a hash of its prompt, is held out for validation."""

    def __init__(self, spec, seed=0, split="train", block_size=None):
        """block_size: tokens of a row; None: as many as the longest has. Raises UserError."""
        self.spec, self.seed, self.split = spec, seed, split
        self.shuffled, self.members = parse_spec(spec)  # members: [(weight, name, parameters), ...]
        self.longest = 0  # input lengths are cut to this, which a curriculum changes
        lengths, sizes = [], []
        for _, name, p in self.members:
            if "length" in p:
                p = p | {"length": p["length"][1]}
                self.longest = max(self.longest, p["length"])
            bar = 1 if len(self.members) > 1 else 0  # a mixture's, for a rule that has none
            lengths.append(RULES_AND_TASKS[name].tokens(p) + bar)
            sizes.append(RULES_AND_TASKS[name].vocab(p))
        self.block_size = block_size or max(lengths)
        if max(lengths) > self.block_size:
            raise UserError(f"{spec} makes rows of {max(lengths)} tokens, more than {block_size}")
        # Tokens: the symbols, which the members of a mixture share, a bar for each member, the pad.
        self.bars = range(max(sizes), max(sizes) + len(self.members))
        self.pad = self.bars.stop
        self.vocab_size = self.pad + 1
        name = self.members[0][1]
        if name in TASKS:  # one alone, since tasks do not mix: all its tokens are symbols
            self.pad, self.vocab_size = RULES_AND_TASKS[name].pad, self.bars.start

    def draw(self, i):
        """Row i as two lists: prompt, answer."""
        r = random.Random(f"{self.seed} {self.split} {i}")
        place = 0
        if len(self.members) > 1:
            weights = [weight for weight, _, _ in self.members]
            place = r.choices(range(len(self.members)), weights)[0]
        _, name, p = self.members[place]
        if "length" in p:
            low, high = p["length"]
            p = p | {"length": r.randint(min(low, self.longest), min(high, self.longest))}
        for _ in range(1000):
            prompt, answer = RULES_AND_TASKS[name].make(r, **p)
            if name in RULES or is_held_out(prompt) == (self.split == "val"):
                break
        else:
            raise UserError(f"{self.spec} has too few different examples to hold some out")
        if len(self.members) > 1 and BAR not in prompt:
            prompt = [BAR] + prompt  # so that every row says which rule it follows
        prompt = [self.bars[place] if t is BAR else t for t in prompt]
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

    def fingerprint(self):
        return zlib.crc32(self.__getitems__(range(8))[0].numpy())


def micro_batches(x, y, n, trim=True):
    """Rows x, y in n parts. trim: rows of like length together, without what follows the last token
    that counts: nothing reads that, and on a CPU pads cost as much as tokens."""
    if not trim:
        return list(zip(x.chunk(n), y.chunk(n)))
    lengths = y.shape[1] - (y != -1).flip(1).int().argmax(1)
    parts = []
    for rows in lengths.argsort(stable=True).chunk(n):
        longest = lengths[rows].max()
        parts.append((x[rows, :longest], y[rows, :longest]))
    return parts


def is_held_out(prompt):
    return zlib.crc32(np.array(prompt, np.uint16)) % 16 == 0


# --------------------------------------------------------------------------------------------------
# Tokenizers


@dataclass
class Tokenizer:
    name: str
    vocab_size: int
    encode: Callable  # text -> tokens
    decode: Callable  # tokens -> bytes
    end: int = None   # the token that ends a document

    @property
    def dtype(self):
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


# The alphabet of DeepMind-Math: printable ASCII, marks before each question and each answer.
CHARACTERS = [*map(chr, range(32, 127)), "<problem>", "<answer>"]
PROBLEM, ANSWER = 95, 96


def load_tokenizer(name):
    """`bytes` (needs no network), `characters`, or one that tiktoken knows. Raises UserError."""
    if name == "bytes":
        encode = lambda text: np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        words = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
        return Tokenizer(name, 257, encode, lambda ts: b"".join(words[t] for t in ts), end=256)
    if name == "characters":
        return letters(name, CHARACTERS)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"unknown tokenizer {name!r}: there are bytes, {known}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, a damaged download, an unwritable cache
        raise UserError(f"the vocabulary of {name!r} could not be fetched "
                        f"({type(error).__name__}): --tokenizer bytes needs no network") from None

    def encode(text):
        tokens = []
        for start in range(0, len(text), 50_000):  # a million spaces at once make tiktoken panic
            tokens += encoding.encode_ordinary(text[start:start + 50_000])
        return tokens

    return Tokenizer(name, encoding.n_vocab, encode, encoding.decode_bytes, encoding.eot_token)


def letters(name, words):
    """A vocabulary of words, one a token, as nanoGPT's folders of characters have: to print."""
    return Tokenizer(name, len(words), None, lambda ts: "".join(words[t] for t in ts).encode())


# --------------------------------------------------------------------------------------------------
# Files: written whole, held by one process


@contextlib.contextmanager
def written_whole(path):
    """Yields a file that is moved to `path` at the end: a crash leaves the old one or the new one.

    Raises UserError where it cannot be written: a full disk, a read-only folder."""
    path = Path(path)
    scratch = path.with_name(f".{os.urandom(4).hex()}.tmp")
    try:
        with open(scratch, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        reason = reason_of(error.__context__ or error)
        raise UserError(f"cannot write {path}: {reason}; what was there is unharmed") from None
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path, value):
    """numpy's numbers and arrays become Python's; nan, which is no JSON, becomes null."""
    text = json.dumps(value, default=lambda array: array.tolist())
    value = json.loads(text, parse_constant=lambda nan: None)
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with a file that is read in this block becomes a UserError."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}, or it is damaged: {reason_of(error)}") from None


def read_json(path, form=dict):
    """The JSON object in a file, if it has this form, see `fits`. Raises UserError."""
    with reading(path):
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a file")  # a pipe would make us wait for ever
        return checked(json.loads(Path(path).read_bytes()), form, path)


def checked(value, form, where):
    if not fits(value, form):
        raise UserError(f"{where} is not of the form in which it is written here")
    return value


def fits(value, form):
    """Whether a value from a file has a form: None, a type such as float (whole, too, and finite),
    one of several, (float, None), these keys, {"loss": float}, or a list of some, [form]."""
    if isinstance(form, tuple):
        return any(fits(value, each) for each in form)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(key), form[key]) for key in form)
    if isinstance(form, list):
        return isinstance(value, list) and bool(value) and all(fits(x, form[0]) for x in value)
    if form is float:
        return type(value) in (int, float) and abs(value) < 1e15
    return value is None if form is None else type(value) is form


def json_lines(path):
    """The values in a file of JSON lines, without what is none: a kill may leave half a line."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


def reason_of(error):
    """What an error says, in one line; an OSError without its number and path."""
    said = " ".join(str(error).split())[:200]
    return getattr(error, "strerror", None) or said or type(error).__name__


def lock(path, wait=False):
    """Holds a file until it is closed, or this process ends, however it ends.

    Another process that has it is waited for, or refused with UserError. Windows locks nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except BlockingIOError:
        raise Busy(f"another process is at work in {path.parent}: let it end first") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_of(error)}") from None


def remove_scratch(folder):
    """Removes what a kill left of files being written. The caller holds the folder's lock."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --------------------------------------------------------------------------------------------------
# Text, tokenised once into a folder of the cache

PIECE = 1 << 18  # characters, or bytes, that are read at a time
GZIP = b"\x1f\x8b"


def cache_folder():
    return Path(os.environ.get("NANOWARM_CACHE") or "~/.cache/nanowarm").expanduser()


def read_text(path):
    """The text of a file in pieces: pairs (text, whether a document ends here).

    Plain text, in which <|endoftext|> ends a document, or (.json, .jsonl, .ndjson) a line of JSON
    with a `text` or `content` for each; gzipped or not. Raises UserError."""
    nulls = 0
    with reading(path):
        with open(path, "rb") as file:
            opener = gzip.open if file.read(2) == GZIP else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            if path.name.lower().removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson")):
                for number, line in enumerate(file, 1):
                    text = text_of(line, f"{path}, line {number}")
                    nulls += text is None
                    yield (text or ""), True
            else:
                while piece := file.read(PIECE) + file.readline(PIECE):
                    *texts, rest = piece.split("<|endoftext|>")
                    yield from ((text, True) for text in texts)
                    yield rest, False
                yield "", True
    if nulls:
        say(f"{path}: skipped {nulls:,} records whose text is null")


def text_of(line, where):
    """The text in a line of JSON, None if that is null; "" if the line is blank."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        record = json.loads(line) if line.strip() else {"text": ""}
        text = record["text"] if "text" in record else record["content"]
        if text is None or isinstance(text, str):
            return text
    raise UserError(f"{where}: not a JSON object with a text or content field")


def python_files(*packages):
    """The .py files of the standard library and of packages, without tests."""
    skip = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3"}
    files, roots = [], [Path(os.__file__).parent]
    for package in packages:
        roots += importlib.util.find_spec(package).submodule_search_locations
    for root in roots:
        for folder, folders, names in os.walk(root):
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


def question(r):
    """School mathematics in words (after DeepMind-Math; sentences: ours) -> question, answer."""
    a, b = (r.randint(-10 ** r.randint(1, 4), 10 ** r.randint(1, 4)) for _ in range(2))
    n, d = r.randint(2, 10 ** r.randint(2, 5)), r.randint(2, 40)
    p, q, x = r.randint(1, 30), r.randint(1, 30), r.randint(-30, 30)
    return r.choice((
        (f"What is {a} + ({b})?", a + b),
        (f"What is {a} * ({b})?", a * b),
        (f"Divide {a * d} by {d}.", a),
        (f"What remains when {n} is divided by {d}?", n % d),
        (f"Is {a} less than {b}?", "yes" if a < b else "no"),
        (f"Write {n} in base 2.", f"{n:b}"),
        (f"Solve {d}*x + ({b}) = {d * x + b} for x.", x),
        (f"Let f(x) = {p}*x**2 + {q}*x + ({b}). What is f({x})?", p * x ** 2 + q * x + b)))


def problems(split):
    """16 M characters of questions and answers; for validation 1 M, of one question in 16."""
    r, left = random.Random(split), 16_000_000 if split == "train" else 1_000_000
    while left > 0:
        asked, answer = question(r)
        if is_held_out(list(asked.encode())) == (split == "val"):
            text = f"{asked}\n{answer}\n"
            left -= len(text)
            yield text, False


def users_files(root):
    """The text files of a path: (train, val) where names of files or folders say which they are,
    else (all, []). What is left out is said. Raises UserError."""
    texts, left_out = {"train": [], "val": [], "test": [], "other": []}, []
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        place = path.relative_to(root)
        words = re.split("[^a-z]+", re.sub("valid(ation)?", "val", str(place).lower()))
        split = next((split for split in texts if split in words), "other")
        hidden = any(part.startswith(".") for part in place.parts)
        if path.is_file() and not hidden:
            (texts[split] if is_text(path) else left_out).append(path)
    if texts["train"] and texts["val"] + texts["test"]:
        left_out += texts["test"] + texts["other"]
    else:
        texts = {"train": sum(texts.values(), []), "val": []}
    if not texts["train"]:
        raise UserError(f"{root} has no files of UTF-8 text")
    if left_out:
        say(f"left out of {root}: {', '.join(path.name for path in left_out[:9])}"
            + (", ..." if len(left_out) > 9 else ""))
    return texts["train"], texts["val"]


def is_text(path):
    """Whether the first 64 kB are UTF-8, or gzipped."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    try:
        start.decode()
    except UnicodeDecodeError as error:  # at the end, it is a character cut in two
        return start[:2] == GZIP or error.reason == "unexpected end of data"
    return True


def tokenise(spec, tokenizer):
    """`code`, `docs`, `math` or a path of text -> its folder in the cache: tokens.bin, and
    meta.json, which says which of them are for training and for validation. Raises UserError."""
    val, read = [], read_text
    if spec == "code":
        train = python_files()
    elif spec == "docs":
        train, read = python_files("torch", "numpy", "tiktoken", "matplotlib"), docstrings
    elif spec == "math":
        train, val, read = ["train"], ["val"], problems
    else:
        train, val = users_files(Path(spec))
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
             for path in train + val if spec != "math"]
    key = [4, spec, tokenizer.name, facts]  # 4: raise it where tokens are made otherwise
    folder = cache_folder() / hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    with lock(cache_folder() / "lock", wait=True):
        remove_scratch(cache_folder())
        if (folder / "meta.json").exists():
            return folder
        say(f"tokenising {spec} into {folder}, once")
        random.Random(0).shuffle(train)
        scratch = folder.with_name(f".{folder.name}.tmp")
        scratch.mkdir()
        with written_whole(scratch / "tokens.bin") as file:
            ends = write_tokens(file, map(read, train), tokenizer)
            cut = ends[-1]
            if val:
                ends += write_tokens(file, map(read, val), tokenizer)
        if not val:  # the last tenth is held out, from where a document ends if that is near
            cut -= cut // 10
            near = min(ends, key=lambda end: abs(end - cut))
            if abs(near - cut) <= ends[-1] // 100:
                cut = near
        for split, begin, end in (("training", 0, cut), ("validation", cut, ends[-1])):
            n = sum(begin < place <= end for place in ends)
            say(f"{split}: {end - begin:,} tokens in {n:,} documents")
        write_json(scratch / "meta.json", meta_of(spec, tokenizer, {
            "train": [["tokens.bin", 0, cut]], "val": [["tokens.bin", cut, ends[-1]]]}))
        scratch.rename(folder)
    return folder


def encoded(pieces, tokenizer, threads):
    """(text, ends) -> (tokens, ends), in their order; tiktoken lets threads work at once."""
    def encode(text, ends):
        return np.asarray(tokenizer.encode(text), tokenizer.dtype), ends

    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for text, ends in pieces:
            waiting.append(pool.submit(encode, text, ends))
            if len(waiting) > 16:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def write_tokens(file, texts, tokenizer, threads=None):
    """Streams of text -> tokens in a file. Returns the places in it where documents end."""
    n = file.tell() // tokenizer.dtype.itemsize
    ends, progress = [n], Progress("tokenised", "tokens")
    for tokens, ends_here in encoded(itertools.chain.from_iterable(texts), tokenizer, threads):
        if ends_here and n + len(tokens) > ends[-1]:  # else the document is empty
            tokens = np.append(tokens, np.array(tokenizer.end, tokenizer.dtype))
            ends.append(n + len(tokens))
        file.write(tokens)
        n += len(tokens)
        progress.add(len(tokens))
    return ends[1:] or [n]


class Progress:
    """Says every two seconds how far long work is."""

    def __init__(self, label, unit, wanted=None):
        self.label, self.unit, self.wanted = label, unit, wanted
        self.done = 0
        self.began = self.said = time.time()

    def add(self, n):
        self.done += n
        if time.time() - self.said > 2:
            self.said = time.time()
            rate = self.done / (self.said - self.began)
            share = f" of {self.wanted / 1e6:,.1f}" if self.wanted else ""
            say(f"{self.label}: {self.done / 1e6:,.1f}{share} M {self.unit}, {rate / 1e6:.2f} M/s")


def meta_of(source, tokenizer, splits):
    """What meta.json says of a folder of tokens. splits: {"train": [[file, begin, end]], ...}"""
    return {"source": source, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
            "dtype": str(tokenizer.dtype), **splits}


# --------------------------------------------------------------------------------------------------
# Published corpora: each published file becomes a shard of tokens in the cache

PUBLISHED = {  # tokens: what the published run reads, and a bit
    "c4": dict(
        what="English from the web (C4)", tokenizer="gpt2", tokens=700_000_000,
        url="https://huggingface.co/datasets/allenai/c4/resolve/main/en/",
        train=[f"c4-train.{i:05}-of-01024.json.gz" for i in range(1024)],
        val=[f"c4-validation.{i:05}-of-00008.json.gz" for i in range(8)]),
    "codeparrot": dict(
        what="Python from GitHub (CodeParrot, cleaned)", tokenizer="gpt2", tokens=1_000_000_000,
        url="https://huggingface.co/datasets/codeparrot/",
        train=[f"codeparrot-clean-train/resolve/main/file-{i:012}.json.gz" for i in range(1, 54)],
        val=["codeparrot-clean-valid/resolve/main/file-000000000054.json.gz"]),
    "wikitext103": dict(
        what="Wikipedia's good articles (WikiText-103, raw)", tokenizer="gpt2", tokens=120_000_000,
        url="https://wikitext.smerity.com/", archive="wikitext-103-raw-v1.zip",
        train="*/wiki.train.raw", val="*/wiki.valid.raw"),
    "deepmind_math": dict(
        what="school mathematics (DeepMind)", tokenizer="characters", tokens=1_700_000_000,
        url="https://storage.googleapis.com/mathematics-dataset/",
        archive="mathematics_dataset-v1.0.tar.gz",
        train="*/train-*/*.txt", val="*/*polate/*.txt")}
PAUSES = 0, 1, 2, 5, 10  # seconds before each try of a download


def fetch(url, path):
    """Downloads a compressed file and reads it through, in five tries; one goes on where the last
    was cut. Raises UserError."""
    part = path.with_name(path.name + ".part")
    for pause in PAUSES:
        time.sleep(pause)
        have = part.stat().st_size if part.exists() else 0
        try:
            asked = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(asked, timeout=30) as answer:
                progress = Progress(path.name, "bytes", int(answer.headers["Content-Length"] or 0))
                resumed = answer.status == 206  # 200: from the start, whatever was asked for
                with open(part, "ab" if resumed else "wb") as file:
                    while block := answer.read(PIECE):
                        file.write(block)
                        progress.add(len(block))
            if progress.done < progress.wanted:
                raise ConnectionError("the connection was cut")
            read_through(part)
            return part.rename(path)
        except (UserError, OSError, http.client.HTTPException, ValueError) as error:
            reason, code = error, getattr(error, "code", None)
            if isinstance(error, UserError) or code == 416:  # damaged; as long as the file, or more
                part.unlink()
            if code in (401, 403, 404):
                break
    raise UserError(f"cannot fetch {url}: {reason}; what has come is kept, the same command goes "
                    "on, and --source can name a mirror or a folder with the same files")


def read_through(path):
    """Reads a compressed file to its end. Raises UserError if it is not whole, or empty."""
    with reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None
        else:
            with gzip.open(path) as file:
                whole = file.seek(0, os.SEEK_END) > 0  # reads all of it
    if not whole:
        raise UserError(f"{path} is damaged, or empty")


def published_file(url, source, downloads, file):
    """A whole published file, from the user's folder or fetched -> its path. Raises UserError."""
    path = downloads / Path(file).name
    if source and "://" not in source:
        path = next(Path(source).rglob(path.name), None)
        if not path:
            raise UserError(f"{Path(file).name} is not in {source}")
        read_through(path)
    elif not path.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        base = f"{source.rstrip('/')}/" if source else url
        fetch(base + file, path)
    return path


def articles(path):
    """The articles of a file of WikiText."""
    article = ""
    with open(path, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            if re.fullmatch(r" = [^=].* = \s*", line) and article.strip():  # the next title
                yield article, True
                article = ""
            article += line
    yield article, True


def problem_tokens(path, most):
    """The first problems of a module of DeepMind-Math, in at most `most` characters -> tokens:
    <problem> question <answer> answer <problem> ... <problem>, which also ends an answer."""
    with open(path, "rb") as file:
        lines = file.read(most).split(b"\n")[:-1]
    problem, answer = bytes([PROBLEM + 32]), bytes([ANSWER + 32])
    raw = b"".join(q + answer + a + problem for q, a in zip(lines[::2], lines[1::2]))
    tokens = np.frombuffer(problem + raw, np.uint8) - 32  # below 32 it wraps around
    if tokens.max() >= len(CHARACTERS):
        raise UserError(f"{path.name} holds more than plain ASCII: try another --source")
    return tokens.astype(np.uint16)


def unpack(packed, folder):
    """Unpacks an archive into a folder of the downloads. Raises UserError."""
    safe = {} if packed.suffix == ".zip" else {"filter": "data"}  # zip is safe without
    try:
        shutil.unpack_archive(packed, folder, **safe)
    except (OSError, tarfile.TarError) as error:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise UserError(f"cannot unpack {packed.name}: {reason_of(error)}") from None


def write_shard(path, source, most, tokenizer, threads):
    """A published file -> a file of tokens."""
    with written_whole(path) as file:
        if source.suffix == ".txt":
            file.write(problem_tokens(source, most))
        else:
            read = articles if source.suffix == ".raw" else read_text
            write_tokens(file, [read(source)], tokenizer, threads)


def prepare(name, wanted, workers=1, source=None, tokenizer=None):
    """Fetches and tokenises a published corpus into the cache. Returns its folder.

    wanted: {"train": tokens, "val": tokens}; whole shards are made until there are as many. source:
    a mirror's address or a folder. A shard is there whole or not at all, so the same command goes
    on from where it was stopped, and asking for more adds to what is there. Raises UserError."""
    corpus = PUBLISHED[name]
    tokenizer = load_tokenizer(tokenizer or corpus["tokenizer"])
    if (tokenizer.name == "characters") != (corpus["tokenizer"] == "characters"):
        raise UserError(f"--tokenizer {tokenizer.name} does not go with {name}")
    folder = cache_folder() / f"{name}-{tokenizer.name}"
    made = {"val": [], "train": []}  # pieces, see Windows
    with lock(folder / "lock"):
        remove_scratch(folder)
        meta, downloads = folder / "meta.json", folder / "downloads"
        fetched = functools.partial(published_file, corpus["url"], source, downloads)
        if meta.exists() and read_json(meta).get("wanted") == wanted:
            return folder  # an archive would be fetched again
        if "archive" in corpus:
            unpack(fetched(corpus["archive"]), downloads / "unpacked")
        for split in made:
            done, files = 0, corpus[split]
            if "archive" in corpus:
                files = sorted(downloads.glob(f"unpacked/{files}"))
            share = wanted[split] // max(1, len(files))  # of each module as much, as published
            for file in files:
                shard = Path(file).name.split(".json")[0]
                if tokenizer.name == "characters":
                    shard = f"{file.parent.name}-{file.stem}-{share}"
                path = folder / f"{split}-{shard}.bin"
                if not path.exists():
                    local = file if "archive" in corpus else fetched(file)
                    write_shard(path, local, share, tokenizer, workers)
                made[split].append([path.name, 0, None])
                done += path.stat().st_size // tokenizer.dtype.itemsize
                say(f"{path.name}: {done / 1e6:,.1f} of {wanted[split] / 1e6:,.1f} M tokens")
                if done >= wanted[split] and "archive" not in corpus:
                    break
            if not done:
                shutil.rmtree(downloads, ignore_errors=True)
                raise UserError(f"the files of {name} hold nothing for {split}: another --source?")
        write_json(meta, meta_of(name, tokenizer, made | {"wanted": wanted}))
        shutil.rmtree(downloads, ignore_errors=True)
    return folder


# --------------------------------------------------------------------------------------------------
# Tokens in files

TYPES = "uint8", "uint16", "uint32", "int32", "int64"


@functools.cache
def open_tokens(path, dtype):
    """The tokens of a file, left on the disk. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path.name} is missing in {path.parent}")
    size = path.stat().st_size
    header = 1024 if 20240520 in np.fromfile(path, np.int32, 1) else 0  # llm.c, modded-nanogpt
    if (size - header) % dtype.itemsize:
        raise UserError(f"{path} has {size} bytes: no whole number of {dtype}")
    return np.memmap(path, dtype, "r", header) if size > header else np.zeros(0, dtype)


def check_tokens(path, dtype, vocab_size):
    """Refuses a file that is not what its folder says. Raises UserError."""
    tokens = open_tokens(path, dtype)
    # Wider numbers read as uint16: every other one, or three of four, is nearly always 0.
    words = tokens[:1 << 16] if dtype.itemsize == 2 else tokens[:0]
    if len(words) > 64 and np.count_nonzero(words[1::2]) < len(words) / 200:
        wide = "uint32" if np.count_nonzero(words[2::4]) > len(words) / 200 else "int64"
        raise UserError(f"{path} looks like {wide}, not {dtype}: name its dtype in meta.json")
    unsigned = tokens.view(f"u{dtype.itemsize}")  # in which a number below 0 is a large one
    if unsigned.max(initial=0) >= vocab_size:
        wrong = tokens[unsigned.argmax()]
        raise UserError(f"{path} holds the token {wrong}; its vocabulary has {vocab_size}")


class PlainUnpickler(pickle.Unpickler):
    """nanoGPT's meta.pkl holds dicts, strings and numbers, which need no import: all else may run
    code, and is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_meta(folder):
    """What a folder of tokens says of them -> (Tokenizer, dtype, {split: [[file, begin, end]]})."""
    meta = {"vocab_size": 50257, "tokenizer": "gpt2"}  # nanoGPT's folders of GPT-2 tokens
    try:
        if (folder / "meta.json").exists():
            meta = read_json(folder / "meta.json")
        elif (folder / "meta.pkl").is_file():
            with open(folder / "meta.pkl", "rb") as file:
                meta = PlainUnpickler(file).load()
        size, dtype = meta["vocab_size"], meta.get("dtype", "uint16")
        if type(size) is not int or not 0 < size < 1 << 31 or dtype not in TYPES:
            raise ValueError(f"vocab_size {size!r}, dtype {dtype!r}; known: {', '.join(TYPES)}")
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{folder}: its meta file is not accepted: {reason_of(error)}") from None
    try:
        if "itos" in meta:
            tokenizer = letters(None, [str(meta["itos"][i]) for i in range(size)])
        else:
            tokenizer = load_tokenizer(meta["tokenizer"])
            tokenizer.vocab_size = max(size, tokenizer.vocab_size)  # some pad their vocabulary
    except (UserError, KeyError, IndexError, TypeError):  # without names, numbers are printed
        numbers = lambda tokens: " ".join(map(str, tokens)).encode()
        tokenizer = Tokenizer(None, size, None, numbers)
    files = {split: meta.get(split, [[f"{split}.bin", 0, None]]) for split in ("train", "val")}
    return tokenizer, np.dtype(dtype), files


class Windows(Dataset):
    """Windows of block_size + 1 tokens, each once per epoch, in an order that the seed decides.

    Validation has one order for every seed. The split `warmup` reads the training windows from the
    other end: text that the run itself comes to last, if ever (`--warmup text`)."""

    def __init__(self, name, pieces, dtype, block_size, seed, split):
        """pieces: [(path, begin, end), ...], which windows do not cross. Raises UserError."""
        self.pieces, self.dtype, self.block_size, self.split = pieces, dtype, block_size, split
        self.seed = 0 if split == "val" else seed
        lengths = [len(self.tokens(place)) for place in range(len(pieces))]
        self.starts = np.cumsum([0] + [max(0, n - 1) // block_size for n in lengths])
        if not len(self):
            part = "validation" if split == "val" else "training"
            raise UserError(f"{name} is too short: its {part} part has {sum(lengths)} tokens, and "
                            f"a row of {block_size} needs {block_size + 1}")

    def __len__(self):
        return int(self.starts[-1])

    def tokens(self, place):
        path, begin, end = self.pieces[place]
        return open_tokens(path, self.dtype)[begin:end]

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))

    def window(self, i):
        """Where row i begins -> (the tokens of its piece, a place in them)."""
        epoch, i = divmod(i, len(self))
        if self.split == "warmup":
            epoch, i = 0, len(self) - 1 - i
        window = self.order(epoch)[i]
        place = int(np.searchsorted(self.starts, window, "right")) - 1
        return self.tokens(place), int(window - self.starts[place]) * self.block_size

    def __getitems__(self, rows):
        """Row numbers -> x, y: int64 tensors (rows, block_size)."""
        both = np.empty((len(rows), self.block_size + 1), np.int64)
        for j, i in enumerate(rows):
            tokens, start = self.window(i)
            both[j] = tokens[start:start + self.block_size + 1]
        both = torch.from_numpy(both)
        return both[:, :-1], both[:, 1:]

    def __getitem__(self, i):
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def fingerprint(self):
        """Of the first 16 M tokens of each piece."""
        return [zlib.crc32(self.tokens(place)[:1 << 24]) for place in range(len(self.pieces))]


class Problems(Windows):
    """DeepMind-Math: rows of problem after problem, of which the loss counts the answers and the
    token that ends each. A row begins with the first problem of its window."""

    def __getitems__(self, rows):
        both = np.full((len(rows), self.block_size + 1), PROBLEM)
        for j, i in enumerate(rows):
            tokens, start = self.window(i)
            start += int(np.argmax(tokens[start:start + 256] == PROBLEM))  # none is longer
            row = tokens[start:start + self.block_size + 1]
            both[j, :len(row)] = row
        # A token counts if the last mark before it was <answer>.
        places = np.where(both >= PROBLEM, np.arange(both.shape[1]), 0)
        last_mark = np.take_along_axis(both, np.maximum.accumulate(places, axis=1), axis=1)
        y = np.where(last_mark[:, :-1] == ANSWER, both[:, 1:], -1)
        return torch.from_numpy(both[:, :-1]), torch.from_numpy(y)

    def problems(self, n):
        """The first n problems of each module -> {"interpolate-gcd": [(question, answer), ...]}:
        tokens, <problem> to <answer>, and the answer with the <problem> that ends it."""
        found = {}
        for place, (path, _, _) in enumerate(self.pieces):
            tokens = self.tokens(place)[:256 * n].astype(np.int64)
            edges = np.flatnonzero(tokens == PROBLEM)[:n + 1]
            module = found[path.stem.removeprefix("val-").rpartition("-")[0]] = []
            for begin, end in zip(edges, edges[1:]):
                middle = begin + int(np.argmax(tokens[begin:end] == ANSWER)) + 1
                module.append((tokens[begin:middle], tokens[middle:end + 1]))
        return found


# --------------------------------------------------------------------------------------------------
# Any spec -> Data

CORPORA = {
    "code": "the Python source of the standard library of this interpreter",
    "docs": "English: docstrings of the standard library, torch, numpy, tiktoken and matplotlib",
    "math": "school mathematics, question and answer in words, made here",
    **{name: f"{corpus['what']}: python data.py prepare {name}"
       for name, corpus in PUBLISHED.items()}}


@dataclass
class Data:
    """What a spec names. Row i of train and of val is x, y: int64 tensors (block_size,)."""
    spec: str
    kind: str  # "rule", "task" or "text"
    train: Dataset
    val: Dataset
    vocab_size: int
    block_size: int
    tokenizer: Tokenizer = None  # of text

    def fingerprint(self):
        """A number that is another where the data are others."""
        both = self.train.fingerprint(), self.val.fingerprint()
        return zlib.crc32(repr(both).encode())

    def words(self, tokens):
        """Tokens, one by one, as a person would write them."""
        tokens = [int(t) for t in tokens]
        if self.kind == "text":
            return [self.tokenizer.decode([t]).decode("utf-8", "replace") for t in tokens]
        bars, members = self.train.bars, self.train.members
        place = next((bars.index(t) for t in tokens if t in bars), 0)  # the member it is a row of
        names = [f"|{name}|" if len(members) > 1 else "|" for _, name, _ in members]
        others = dict(enumerate([*names, "_"], bars.start))
        _, name, p = members[place]
        return [others.get(t) or word(t, name, p) for t in tokens]

    def joined(self, words):
        """Words of a row as one text; the rows of an automaton as lines."""
        if self.spec.startswith("eca") and "+" not in self.spec:
            width = self.train.members[0][2]["width"]
            return "\n".join("".join(words[i:i + width]) for i in range(0, len(words), width))
        digits = self.spec.partition(":")[0].endswith(("addition", "multiplication"))
        return ("" if self.kind == "text" or digits else " ").join(words)

    def write(self, tokens, counted=None):
        """A row as a person would write it; what counts (bool) stands between « and »."""
        if self.kind == "text" and counted is None:
            return self.tokenizer.decode([int(t) for t in tokens]).decode("utf-8", "replace")
        words = self.words(tokens)
        if counted is not None:
            words = [f"«{word}»" if counts else word for word, counts in zip(words, counted)]
        return re.sub(r"»(\s*)«", r"\1", self.joined(words))

    def read(self, text):
        """What a person wrote, as `write` writes it -> tokens, a list. Raises UserError."""
        if self.kind == "text" and self.tokenizer.encode and text:
            return [int(t) for t in self.tokenizer.encode(text)]
        if self.kind == "text":  # characters, which are known by their names alone
            words, bars = list(text), []
        else:
            apart = " " in self.joined("ab")  # or side by side, as digits and cells are
            words = text.split() if apart else list("".join(text.split()))
            bars = self.train.bars
        bars = [t for t in bars if self.words([t])[0] in words]  # these say which rule it follows
        names = {self.words([t, *bars])[0]: t for t in reversed(range(self.vocab_size))}
        if not words or not set(words) <= names.keys():
            raise UserError(f"{text!r} is not written as {self.spec} is: see data.py show")
        return [names[word] for word in words]


def kind_of(spec):
    """"rule", "task" or "text", without loading anything. Raises UserError."""
    first = spec.removeprefix("shuffled:").split("+")[0]
    name = first.rpartition("*")[2].partition(":")[0].strip()
    if name in RULES_AND_TASKS or spec.startswith("shuffled:"):
        return "task" if name in TASKS else "rule"
    if spec in CORPORA or spec and os.path.exists(spec):
        return "text"
    known = ", ".join([*RULES_AND_TASKS, *CORPORA])
    raise UserError(f"unknown data {spec!r}: a path, or one of {known}")


def default_tokenizer(spec):
    return PUBLISHED[spec]["tokenizer"] if spec in PUBLISHED else "bytes"


def make_data(spec, seed=0, block_size=None, tokenizer=None, split="train"):
    """The data that a spec names: a rule or mixture, a task, a corpus or a path. Raises UserError.

    block_size: tokens of a row (default: as long as they come; of text 256). tokenizer: of text.
    split "warmup": train is other text of the same corpus, see Windows."""
    kind = kind_of(spec)
    if kind != "text":
        train, val = (Rows(spec, seed, part, block_size) for part in ("train", "val"))
        return Data(spec, kind, train, val, train.vocab_size, train.block_size)
    folder, name = Path(spec), tokenizer or default_tokenizer(spec)
    if spec in CORPORA and folder.exists():
        say(f"{spec} is the corpus of that name (data.py list); your own is ./{spec}")
    if spec in PUBLISHED:
        folder = cache_folder() / f"{spec}-{name}"
        if not (folder / "meta.json").exists():
            more = f" --tokenizer {name}" if tokenizer else ""
            raise UserError(f"{spec} is not prepared here: python data.py prepare {spec}{more}")
    elif spec in CORPORA or not (folder / "train.bin").exists():
        folder = tokenise(spec, load_tokenizer(name))
    tokenizer, dtype, files = read_meta(folder)
    windows = Problems if tokenizer.name == "characters" else Windows
    datasets = []
    for part, pieces in files.items():
        pieces = [(folder / file, begin, end) for file, begin, end in pieces]
        if folder == Path(spec):  # somebody else's
            for path, _, _ in pieces:
                check_tokens(path, dtype, tokenizer.vocab_size)
        datasets.append(windows(spec, pieces, dtype, block_size or 256, seed,
                                split if part == "train" else "val"))
    return Data(spec, kind, *datasets, tokenizer.vocab_size, block_size or 256, tokenizer)


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is one line like every other error."""

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(low, below=math.inf, kind=int):
    """A type for argparse: a number from `low` to less than `below`; 4M and 1.6B are numbers."""
    def parse(text):
        try:
            unit = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
            value = round(float(text[:-1]) * unit) if unit else kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value < below:
            wanted = {int: "a whole number", float: "a number"}[kind] + f", at least {low}"
            if below < math.inf:
                wanted += f", below {below:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not accepted: {wanted}")
        return value
    return parse


def say(line):
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(line, flush=True)


def show(spec, n, seed, split, tokenizer):
    data = make_data(spec, seed, tokenizer=tokenizer)
    print(f"{spec}: {data.block_size} tokens from a vocabulary of {data.vocab_size}; what the loss "
          "counts is between « and », or all of a row that has none")
    for i in range(n):
        x, y = (data.train if split == "train" else data.val)[i]
        counted = None if (y != -1).all() else [False, *(y[:-1] != -1).tolist()]
        print("\n" + data.write(x, counted))


def list_everything():
    for title, rules in (("procedural rules", RULES), ("algorithmic tasks", TASKS)):
        print(title)
        for name, rule in rules.items():
            takes = str(inspect.signature(rule.make)).removeprefix("(r, ").removesuffix(")")
            about = filter(None, inspect.getdoc(rule.make).splitlines())
            print(f"  {name:18} " + f"\n{'':21}".join([*about, takes]))
    print("what rules make\n  mixtures           set+union, 0.7*set:length=32+0.3*union:length=32\n"
          "  shuffled control   shuffled:dyck:k=16\n"
          "  varying lengths    set:length=2-20\ncorpora")
    for name, line in CORPORA.items():
        print(f"  {name:18} {line}")
    print("  PATH               a file of text or of lines of JSON, a folder of them, or a folder "
          "with train.bin and val.bin")


def main():
    parser = Parser(description="Look at the data, or prepare a published corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every rule, task and corpus with its parameters")
    shower = commands.add_parser("show", help="print rows as a person would write them")
    shower.add_argument("spec", help="such as dyck:k=3,length=32, haystack:pairs=4, code, a path")
    shower.add_argument("-n", type=number(1, 10_001), default=3, help="how many (default 3)")
    shower.add_argument("--seed", type=number(0, 2 ** 32), default=0)
    shower.add_argument("--split", choices=("train", "val"), default="train")
    shower.add_argument("--tokenizer", help="of text (default bytes, or the published one)")
    preparer = commands.add_parser("prepare", help="fetch and tokenise a published corpus")
    preparer.add_argument("name", choices=PUBLISHED)
    preparer.add_argument("--tokens", type=number(1), help="such as 700M, rounded up to whole "
                          "shards (default: what the published run reads)")
    preparer.add_argument("--val_tokens", type=number(1), default=10_000_000, help="(default 10M)")
    preparer.add_argument("--workers", type=number(1, 1025), default=os.cpu_count(),
                          help="tokenising threads (default: all cores)")
    preparer.add_argument("--source", help="a mirror's address, or a folder with the same files")
    preparer.add_argument("--tokenizer", help="bytes, or one that tiktoken knows")
    args = parser.parse_args()
    if args.command == "list":
        list_everything()
    elif args.command == "show":
        show(args.spec, args.n, args.seed, args.split, args.tokenizer)
    else:
        wanted = {"train": args.tokens or PUBLISHED[args.name]["tokens"], "val": args.val_tokens}
        folder = prepare(args.name, wanted, args.workers, args.source, args.tokenizer)
        print(f"{args.name} is in {folder}; next: python train.py --preset {args.name}")


def run_main(main):
    """Runs a script's main: what the user can put right is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may not know every character
    try:
        main()
        sys.stdout.flush()
        return
    except (MemoryError, RuntimeError) as error:  # RuntimeError: torch's way to say it
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise
        status = 2
        line = "not enough memory: less is needed with smaller batches or models, or --grad_accum"
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # python data.py list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (UserError, OSError) as error:  # OSError: a file that may not be read, a full disk
        line, status = str(error), getattr(error, "status", 2)
    rank = os.environ.get("RANK", "0")
    print(f"error: {line}" + (f" (process {rank})" if rank != "0" else ""), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    run_main(main)
