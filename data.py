"""Where every token comes from: procedural rules, algorithmic tasks, corpora, tokenizers.

    python data.py list                           every rule, task and corpus, with its parameters
    python data.py show dyck:k=3,length=32        sequences as a person would write them
    python data.py prepare c4 --tokens 700M       a published corpus, fetched and tokenised once

Everything is a Source and answers `batch(index, size) -> x, y`: two int64 arrays of shape (size, block_size), where
`y[b, t]` is the token that should follow `x[b, :t+1]`, or -1 where the loss does not count. Row r of a source is a
pure function of (seed, split, r), so the batch at any step is too: nothing but the step number is needed to resume,
and any number of processes can share one global batch.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tiktoken


class UserError(Exception):
    """Something the user can put right. Every script prints it as one line on stderr and exits with status 2.

    everywhere: of several processes, all raise it alike."""

    def __init__(self, message, everywhere=False):
        super().__init__(message)
        self.everywhere = everywhere


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is one line like every other error."""

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


# ----------------------------------------------------------------------------------------------------------------------
# Procedural rules: rule(rng, batch, ...) -> tokens, mask, both of shape (batch, width).
# mask[b, t] says whether tokens[b, t] counts as a target: the model is asked to predict it from tokens[b, :t].
# Rules with an input and an output use symbols 1..vocab-1 (0 is the pop of `stack`), the separator `vocab`, the pad
# `vocab + 1`, and count output tokens alone, without pads. `length` may be a pair (low, high): then each row draws its
# own input length. Formats: paper, "Procedural data"; checked against the authors' published generators.


SYMBOL = np.uint16  # of tokens while they are made: every vocabulary fits, and a quarter of int64's bytes are moved


def draw_input(rng, batch, length, vocab):
    """Random symbols x and a mask `on` of those that exist, both (batch, longest): rows may have different lengths."""
    low, high = length if isinstance(length, tuple) else (length, length)
    x = rng.integers(1, vocab, (batch, high), dtype=SYMBOL)
    if low == high:
        return x, np.ones(x.shape, bool)
    on = np.arange(high) < rng.integers(low, high + 1, (batch, 1))
    return x * on, on


def pack(wide, exists, counted, pad):
    """Moves the tokens of each row that exist to its left, in order, and pads on the right. All are (batch, width)."""
    if exists.all():
        return wide, counted
    left = np.arange(wide.shape[1]) < exists.sum(1, keepdims=True)  # row by row as many places as there are tokens
    tokens, mask = np.full(wide.shape, pad, wide.dtype), np.zeros(wide.shape, bool)
    tokens[left], mask[left] = wide[exists], counted[exists]
    return tokens, mask


def input_to_output(inputs, output, vocab):
    """`input | output`, or `input | input | output`: each piece is a pair (symbols, which of them exist)."""
    separator = (np.full((len(output[0]), 1), vocab, SYMBOL), np.ones((len(output[0]), 1), bool))
    pieces = [piece for pair in inputs for piece in (pair, separator)] + [output]
    wide, exists = (np.concatenate(parts, axis=1) for parts in zip(*pieces))
    counted = np.broadcast_to(np.arange(wide.shape[1]) >= wide.shape[1] - output[0].shape[1], wide.shape)
    return pack(wide, exists, counted, vocab + 1)


def first_appearance(x, on):
    """Where a symbol stands for the first time in its row: (batch, width) of bool."""
    order = np.argsort(x, axis=1, kind="stable")  # equal symbols side by side, in their order in the row
    ranked = np.take_along_axis(x, order, axis=1)
    new, first = np.ones(x.shape, bool), np.empty(x.shape, bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    np.put_along_axis(first, order, new, axis=1)
    return first & on


def identity(rng, batch, length=20, vocab=100):
    """the input again: 3 7 3 | 3 7 3"""
    x, on = draw_input(rng, batch, length, vocab)
    return input_to_output([(x, on)], (x, on), vocab)


def reverse(rng, batch, length=20, vocab=100):
    """the input backwards: 3 7 5 | 5 7 3"""
    x, on = draw_input(rng, batch, length, vocab)
    return input_to_output([(x, on)], (x[:, ::-1], on[:, ::-1]), vocab)


def sort(rng, batch, length=20, vocab=100):
    """the input in ascending order: 7 3 5 | 3 5 7"""
    x, on = draw_input(rng, batch, length, vocab)
    return input_to_output([(x, on)], (np.sort(np.where(on, x, vocab), axis=1), on), vocab)


def set_(rng, batch, length=20, vocab=100):
    """the input without repeats, in order of first appearance: 3 7 3 5 | 3 7 5"""
    x, on = draw_input(rng, batch, length, vocab)
    return input_to_output([(x, on)], (x, first_appearance(x, on)), vocab)


def union(rng, batch, length=20, vocab=100):
    """what is in either half of the input, without repeats, in order of first appearance: 3 7 | 7 5 | 3 7 5"""
    low, high = length if isinstance(length, tuple) else (length, length)
    x, on = draw_input(rng, batch, (low, high), vocab)
    half = on.sum(1, keepdims=True) // 2  # an odd length loses its last symbol
    x_on, y_on = np.arange(high // 2) < half, np.arange(high // 2) < half
    x, y = x[:, :high // 2], rng.integers(1, vocab, (batch, high // 2), dtype=SYMBOL)
    both, both_on = np.concatenate([x * x_on, y * y_on], axis=1), np.concatenate([x_on, y_on], axis=1)
    return input_to_output([(x, x_on), (y, y_on)], (both, first_appearance(both, both_on)), vocab)


def delete(rng, batch, length=20, vocab=100):
    """the input without the first t (which may be absent): 3 7 3 5 | 3 | 7 3 5"""
    x, on = draw_input(rng, batch, length, vocab)
    target = rng.integers(1, vocab, (batch, 1), dtype=SYMBOL)
    hit = (x == target) & on
    first_hit = hit & (np.cumsum(hit, axis=1) == 1)
    return input_to_output([(x, on), (target, np.ones_like(target, bool))], (x, on & ~first_hit), vocab)


def stack(rng, batch, length=20, vocab=100):
    """pushes (a symbol) and pops (0), then what is left on the stack, top first: 3 7 0 5 9 0 | 5 3"""
    low, high = length if isinstance(length, tuple) else (length, length)
    lengths = rng.integers(low, high + 1, batch)
    # symbols[b, :depth[b]] is the stack, the rest of the row is what may be pushed: a push swaps one of those in.
    symbols, depth = np.tile(np.arange(1, vocab, dtype=SYMBOL), (batch, 1)), np.zeros(batch, np.int64)
    coin, pick = rng.random((2, high, batch))
    operations = np.zeros((batch, high), SYMBOL)
    for t in range(high):  # over time only: each turn is a few array operations on the whole batch
        push = coin[t] < np.where(t < lengths * 2 // 3, 0.75, 0.25)
        push = (push & (t != lengths - 1) & (depth < vocab - 1)) | (depth <= 1)
        rows = np.flatnonzero(push & (t < lengths))
        chosen = depth[rows] + (pick[t, rows] * (vocab - 1 - depth[rows])).astype(np.int64)
        operations[rows, t] = symbols[rows, chosen]
        symbols[rows, chosen] = symbols[rows, depth[rows]]
        symbols[rows, depth[rows]] = operations[rows, t]
        depth += np.where(t < lengths, np.where(push, 1, -1), 0)
    places = np.arange(min(high, vocab - 1))[::-1]  # top first
    on_stack = places < depth[:, None]
    tokens, mask = input_to_output([(operations, np.arange(high) < lengths[:, None])],
                                   (symbols[:, places], on_stack), vocab)
    return tokens, mask


def dyck(rng, batch, k=16, length=128, p=0.49):
    """balanced brackets of k types, opening with probability p where both are possible: ( [ ] ) { }"""
    coin = rng.random((length, batch), dtype=np.float32) < p
    depths = np.zeros((length + 1, batch), np.int32)  # before each token, and at the end
    for t in range(length):  # over time only; must open at depth 0, must close when only closing is left
        opens = ((depths[t] == 0) | coin[t]) & (depths[t] < length - t)
        depths[t + 1] = depths[t] + 2 * opens - 1
    level = np.maximum(depths[:-1], depths[1:]).T.astype(SYMBOL)  # the same for a bracket and its partner
    # Sorted by level (stable), each opening bracket stands just before its partner: give both one type.
    order = np.argsort(level, axis=1, kind="stable")
    types = rng.integers(0, k, (batch, length // 2), dtype=SYMBOL).repeat(2, axis=1)
    types[:, 1::2] += k
    tokens = np.empty((batch, length), SYMBOL)
    np.put_along_axis(tokens, order, types, axis=1)
    return tokens, np.ones((batch, length), bool)


def dyck_shuffle(rng, batch, k=16, length=128, p=0.5, depth=16):
    """as dyck, but any open type may close, depth is bounded and the end may stay open: ( [ ) ] {"""
    tokens, rows = np.empty((length, batch), SYMBOL), np.arange(batch)
    # How often each type of a row is open; and a list of those that are, in no order, n_types long.
    count, listed = np.zeros(batch * k, np.int16), np.zeros(batch * (depth + 1), SYMBOL)
    n_types, total = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    coin = rng.random((length, batch), dtype=np.float32) < p
    new_type, pick = rng.integers(0, k, (length, batch), dtype=SYMBOL), rng.random((length, batch), dtype=np.float32)
    for t in range(length):  # over time only; arrays are flat: take and put are faster than pairs of indices
        opening = ((total == 0) | coin[t]) & (total < depth)
        slot = np.minimum((pick[t] * n_types).astype(np.int64), n_types - 1) + rows * (depth + 1)
        kind = np.where(opening, new_type[t], listed[slot])
        place = kind + rows * k
        change = 2 * opening.astype(np.int16) - 1
        count[place] = left = count[place] + change
        total += change
        tokens[t] = np.where(opening, kind, kind + k)
        came, gone = np.flatnonzero(opening & (left == 1)), np.flatnonzero(left == 0)
        listed[came * (depth + 1) + n_types[came]] = kind[came]
        n_types[came] += 1
        n_types[gone] -= 1  # the last one of its type was closed: the last of the list moves to its slot
        listed[slot[gone]] = listed[gone * (depth + 1) + n_types[gone]]
    return np.ascontiguousarray(tokens.T), np.ones((batch, length), bool)


def eca(rng, batch, rule=110, width=16, length=128):
    """an elementary cellular automaton on a ring of `width` cells, row after row; the first row is random"""
    image = ((rule >> np.arange(8)) & 1).astype(SYMBOL)  # image[4 * left + 2 * centre + right]
    rows = np.empty((batch, -(-length // width), width), SYMBOL)
    rows[:, 0] = rng.integers(0, 2, (batch, width))
    for i in range(1, rows.shape[1]):
        cells = rows[:, i - 1]
        rows[:, i] = image[4 * np.roll(cells, 1, axis=1) + 2 * cells + np.roll(cells, -1, axis=1)]
    tokens = rows.reshape(batch, rows.shape[1] * width)[:, :length]
    return tokens, np.broadcast_to(np.arange(length) >= width, tokens.shape)  # every cell that its predecessors decide


def bracket_process(name, tokens, k, length, p, depth=None):
    """What the generator of dyck or dyck_shuffle knows: the exact probability of each token given those before it.

    tokens: int64 (n, length) -> float64 (n, length, 2k). The mean of -log of what came is the loss that a perfect
    model has on these rows; a token of probability 0 is illegal."""
    n, rows = len(tokens), np.arange(len(tokens))
    probability = np.zeros((n, length, 2 * k))
    count, level = np.zeros((n, k), np.int64), np.zeros(n, np.int64)  # open brackets of each type, and in all
    stack = np.zeros((n, length + 1), np.int64)  # dyck: their types in order
    for t in range(length):
        opens = np.where(level == 0, 1.0, p)
        opens = np.where(level >= (length - t if name == "dyck" else depth), 0.0, opens)
        probability[:, t, :k] = opens[:, None] / k
        may_close = np.eye(k)[stack[rows, level - 1]] * (level > 0)[:, None] if name == "dyck" else count > 0
        probability[:, t, k:] = (1 - opens)[:, None] * may_close / np.maximum(may_close.sum(1, keepdims=True), 1)
        opened, kind = tokens[:, t] < k, tokens[:, t] % k
        stack[rows[opened], level[opened]] = kind[opened]
        count[rows, kind] += np.where(opened, 1, -1)
        level += np.where(opened, 1, -1)
    return probability


def bracket_structure(tokens, k):
    """(partner, level) of each token, both int64 (n, T). partner: where the bracket that a closing one closes was
    opened (dyck_shuffle: the latest open one of its type), -1 for opening ones. level: how many are open before it."""
    partner, level = np.full(tokens.shape, -1), np.zeros(tokens.shape, np.int64)
    for row, sequence in enumerate(tokens.tolist()):  # a loop over tokens: for probes of some rows, not for training
        open_at = {}
        for t, token in enumerate(sequence):
            level[row, t] = sum(map(len, open_at.values()))
            places = open_at.setdefault(token % k, [])
            if token < k:
                places.append(t)
            elif places:
                partner[row, t] = places.pop()
    return partner, level


RULES = {"identity": identity, "reverse": reverse, "sort": sort, "set": set_, "union": union, "delete": delete,
         "stack": stack, "dyck": dyck, "dyck_shuffle": dyck_shuffle, "eca": eca}


# ----------------------------------------------------------------------------------------------------------------------
# Algorithmic tasks: the same shape as rules. Formats: paper, "Algorithmic tasks", token for token.


def haystack(rng, batch, pairs=30):
    """needle in a haystack: 1..pairs key-value pairs, one key asked again, its value: k4 17 k9 88 ?k4 17"""
    n = rng.integers(1, pairs + 1, (batch, 1))
    # A random order of all keys, of which n are used: random numbers that carry their key in the last 7 bits, sorted.
    keys = (np.sort(rng.integers(0, 2 ** 56, (batch, pairs)) << 7 | np.arange(pairs), axis=1) & 127).astype(SYMBOL)
    values = rng.integers(1, 128, (batch, pairs), dtype=SYMBOL)
    needle = (rng.random((batch, 1)) * n).astype(np.int64)
    query = 128 + pairs + np.take_along_axis(keys, needle, axis=1)
    answer = np.take_along_axis(values, needle, axis=1)
    listing = np.stack([128 + keys, values], axis=2).reshape(batch, -1)
    place = np.arange(2 * pairs + 3)  # as wide as published
    tokens = np.concatenate([listing, np.zeros((batch, 3), SYMBOL)], axis=1) * (place < 2 * n)
    np.put_along_axis(tokens, 2 * n, query, axis=1)
    np.put_along_axis(tokens, 2 * n + 1, answer, axis=1)
    return tokens, place == 2 * n + 1


def arithmetic_task(rng, batch, digits, operation, answer_digits, width, least_first=False):
    """`a + b =` and the answer. Input digits 0-9, the sign 10, equals 11; answer digits 20-29, stop 30; pad 12."""
    a, b = rng.integers(10 ** (digits - 1), 10 ** digits, (2, batch))
    answer = operation(a, b)
    order = slice(None) if least_first else slice(None, None, -1)
    sign = np.full((batch, 1), 10, SYMBOL)
    wide = np.concatenate([digits_of(a, digits)[:, order], sign, digits_of(b, digits)[:, order], sign + 1,
                           digits_of(answer, answer_digits)[:, order] + SYMBOL(20), sign + 20,
                           np.full((batch, width - 2 * digits - answer_digits - 3), 12, SYMBOL)], axis=1)
    exists, first = np.ones(wide.shape, bool), 2 * digits + 2
    exists[:, first:first + answer_digits] = answer[:, None] >= (10 ** np.arange(answer_digits))[order]  # no leading zeros
    exists[:, first + answer_digits + 1:] = False
    return pack(wide, exists, np.broadcast_to(np.arange(width) >= first, wide.shape), 12)


def digits_of(n, count):
    """int64 (batch,) -> (batch, count): the last `count` decimal digits, least significant first."""
    found = np.empty((count, len(n)), SYMBOL)
    for place in range(count):  # division by one number is far faster than by an array of powers
        found[place], n = n - n // 10 * 10, n // 10
    return found.T


def addition(rng, batch, digits=5):
    """two numbers of `digits` digits and their sum, most significant digit first: 12+34=46."""
    return arithmetic_task(rng, batch, digits, np.add, digits + 1, 3 * digits + 4)


def reversed_addition(rng, batch, digits=10):
    """the same, least significant digit first: 21+43=64."""
    return arithmetic_task(rng, batch, digits, np.add, digits + 1, 3 * digits + 4, least_first=True)


def multiplication(rng, batch, digits=5):
    """two numbers of `digits` digits and their product: 12*34=408."""
    return arithmetic_task(rng, batch, digits, np.multiply, 2 * digits, 5 * digits + 4)  # width as published


def sorting(rng, batch, numbers=20, below=100):
    """numbers from 0 to below-1, one token each, a separator, the numbers in ascending order (layout: ours)"""
    x = rng.integers(0, below, (batch, numbers), dtype=SYMBOL)
    tokens = np.concatenate([x, np.full((batch, 1), below, SYMBOL), np.sort(x, axis=1)], axis=1)
    return tokens, np.broadcast_to(np.arange(tokens.shape[1]) > numbers, tokens.shape)


TASKS = {"haystack": haystack, "addition": addition, "reversed_addition": reversed_addition,
         "multiplication": multiplication, "sorting": sorting}
TASK_VOCAB = {"haystack": lambda p: 256, "addition": lambda p: 31, "reversed_addition": lambda p: 31,
              "multiplication": lambda p: 31, "sorting": lambda p: p["below"] + 1}


# ----------------------------------------------------------------------------------------------------------------------
# Specs: "dyck:k=64,length=2048", "0.7*set+0.3*union:length=32", "shuffled:dyck:k=16"

LIMITS = {  # what a parameter accepts, by name; the functions' signatures give the defaults and the types
    "length": (1, 65536), "vocab": (3, 50000), "k": (1, 20000), "p": (0.0, 1.0), "depth": (1, 1024), "rule": (0, 255),
    "width": (3, 4096), "pairs": (1, 64), "digits": (1, 17), "numbers": (1, 1024), "below": (2, 50000)}


def parameters(function):
    """The parameters of a rule or task with their defaults."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()
            if p.default is not inspect.Parameter.empty}


def parse_value(where, key, text, default):
    """The text behind `key=` as a number of the default's type, or a pair for a range of lengths. Raises UserError."""
    low, high = LIMITS[key]
    ranged = key == "length" and re.fullmatch(r"(\d+)-(\d+)", text)
    try:
        value = tuple(map(int, ranged.groups())) if ranged else type(default)(text)
    except ValueError:
        raise UserError(f"{where}: {key}={text} is not a number") from None
    first, last = value if ranged else (value, value)
    if not low <= first <= last <= high:
        raise UserError(f"{where}: {key}={text} is not accepted: {key} goes from {low} to {high}")
    return value


def parse_member(text, functions):
    """"set:length=64,vocab=100" -> ("set", every parameter, those that were given)"""
    name, _, given = (part.strip() for part in text.partition(":"))
    if name not in functions:
        raise UserError(f"unknown rule or task {name!r} in {text!r}: there are {', '.join(functions)}")
    known, params = parameters(functions[name]), {}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if key not in known or not equals or key in params:
            takes = ", ".join(f"{k}={v}" for k, v in known.items())
            raise UserError(f"{name}: bad parameter {item!r}: it takes {takes}")
        params[key] = parse_value(name, key, value, known[key])
    return name, {**known, **params}, params


def check_member(name, params):
    """Conditions between parameters, or of one rule alone."""
    longest = params.get("length")
    longest, shortest = (longest[1], longest[0]) if isinstance(longest, tuple) else (longest, longest)
    if isinstance(params.get("length"), tuple) and "vocab" not in params:
        raise UserError(f"{name}: length is one number here, not a range")
    if name == "dyck" and longest % 2:
        raise UserError(f"dyck: length={longest} is odd: balanced brackets need an even length")
    if name == "union" and shortest < 2:
        raise UserError(f"union: length={shortest} is too short: each half needs a symbol, so at least 2")
    if name == "eca" and longest <= params["width"]:
        raise UserError(f"eca: length={longest} ends in the first row: it must be more than width={params['width']}")
    if name == "multiplication" and params["digits"] > 9:
        raise UserError(f"multiplication: digits={params['digits']} is not accepted: products are 64-bit, so at most 9")
    if name in ("dyck", "dyck_shuffle") and longest < 2:
        raise UserError(f"{name}: length={longest} is too short: at least 2")


def parse_rules(spec):
    """A procedural spec -> (shuffled, [(weight, name, parameters), ...]), weights summing to 1.

    Members of a mixture are joined by `+`, each with an optional weight in front (`0.7*set`). A member without
    parameters of its own takes those of the last member, as far as it knows them."""
    shuffled = spec.startswith("shuffled:")
    members = []
    for text in spec.removeprefix("shuffled:").split("+"):
        weight, star, rest = text.partition("*")
        try:
            weight, rest = (float(weight), rest) if star else (1.0, text)
        except ValueError:
            raise UserError(f"{spec}: the weight {weight!r} is not a number") from None
        if not 0 < weight < float("inf"):
            raise UserError(f"{spec}: the weight {weight:g} is not accepted: weights are positive")
        members.append((weight, *parse_member(rest, RULES)))
    trailing = members[-1][3]
    total = sum(member[0] for member in members)
    result = []
    for weight, name, params, given in members:
        if not given:
            params = {key: trailing.get(key, value) for key, value in params.items()}
        check_member(name, params)
        result.append((weight / total, name, params))
    return shuffled, result


# ----------------------------------------------------------------------------------------------------------------------
# Sources whose sequences are generated: rules, mixtures and tasks


class Generated:
    """A Source over `generate(rng, n) -> tokens, mask`, each (n, width).

    Rows are made in chunks; chunk c of a split is drawn from a generator seeded by (seed, split, c). With `holdout`,
    one example in 16 (by a hash of its tokens and the seed) belongs to validation and is never seen in training."""

    token_bytes = None  # symbols are not text

    def __init__(self, name, kind, generate, vocab_size, block_size, write, seed, split, pad=0, holdout=False,
                 rows=None):
        self.name, self.kind, self.generate, self.vocab_size, self.write = name, kind, generate, vocab_size, write
        self.seed, self.split, self.pad, self.holdout, self.rows = seed, split, pad, holdout, rows
        width = generate(np.random.default_rng(0), 1)[0].shape[1]
        self.block_size = block_size or width
        if width > self.block_size:
            raise UserError(f"{name} makes sequences of {width} tokens: longer than the block of {block_size}")
        # Enough rows that the work on each array outweighs the calls: 2**19 tokens, of long rows up to 2**22.
        self.chunk_rows = max(2 ** 19 // self.block_size, min(2048, 2 ** 22 // self.block_size), 1)
        self.salt = np.random.default_rng((seed, 7)).integers(1, 2 ** 32, width, dtype=np.uint32)
        self.chunks = {}

    def is_held_out(self, tokens):
        """(n, width) -> (n,) of bool: true for one sequence in 16, by a multiplicative hash of all its tokens."""
        mixed = (tokens * self.salt).sum(axis=1, dtype=np.uint32)
        return (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x9E3779B1) >> np.uint32(28) == 0

    def draw(self, rng, n):
        """n rows of this split."""
        if not self.holdout:
            return self.generate(rng, n)
        kept = []
        for _ in range(50):
            tokens, mask = self.generate(rng, n + n // 8 + 8 if self.split == "train" else 20 * n)
            keep = self.is_held_out(tokens) == (self.split != "train")
            kept.append((tokens[keep], mask[keep]))
            if sum(len(tokens) for tokens, _ in kept) >= n:
                return tuple(np.concatenate(parts)[:n] for parts in zip(*kept))
        raise UserError(f"{self.name} has too few different examples to hold some of them out: make it larger")

    def chunk(self, c):
        """Rows c * chunk_rows and on: their tokens, and which of them count, both (rows, width); width is at most
        block_size."""
        if c not in self.chunks:
            rng = np.random.default_rng((self.seed, ("train", "val").index(self.split), c))
            n = self.chunk_rows if self.rows is None else min(self.chunk_rows, self.rows - c * self.chunk_rows)
            if len(self.chunks) == 2:
                del self.chunks[min(self.chunks)]
            self.chunks[c] = self.draw(rng, n)
        return self.chunks[c]

    def batch(self, index, size):
        """Rows index * size and on: x, y, both int64 (size, block_size)."""
        x, y, done = np.full((size, self.block_size), self.pad), np.full((size, self.block_size), -1), 0
        while done < size:
            first = index * size + done
            c, offset = divmod(first if self.rows is None else first % self.rows, self.chunk_rows)
            tokens, mask = (a[offset:offset + size - done] for a in self.chunk(c))
            rows, width = slice(done, done + len(tokens)), tokens.shape[1]
            x[rows, :width] = tokens
            np.copyto(y[rows, :width - 1], tokens[:, 1:], where=mask[:, 1:])  # the loss mask: what does not count stays -1
            done += len(tokens)
        return x, y

    def decode(self, tokens, counted=None):
        """A row as a person would write it; tokens that the loss counts stand between « and »."""
        return self.write(np.asarray(tokens), counted)


def write_words(words, counted, separator=" "):
    """Joins the words of a row and puts « » around those that count."""
    if counted is None:
        return separator.join(words)
    edges = np.diff(np.asarray(counted, int), prepend=0, append=0).tolist()
    return separator.join("«" * (edges[i] == 1) + word + "»" * (edges[i + 1] == -1) for i, word in enumerate(words))


def bracket(kind, k, token):
    """One of ()[]{}<> while they last, else the number of the kind: (7 opens it, 7) closes it."""
    glyphs = "()[]{}<>"
    if k <= 4:
        return glyphs[2 * kind + (token >= k)]
    return f"{kind})" if token >= k else f"({kind}"


def rule_writer(members, content):
    """How to print a row of these rules: brackets as brackets, cells as blocks, symbols as numbers."""
    def write(tokens, counted):
        separators = tokens[(tokens >= content) & (tokens < content + len(members))]
        name, params = members[int(separators[0]) - content if len(separators) else 0][1:]
        k, words = params.get("k"), []
        for token in tokens:
            if token >= content + len(members):
                words.append("_")
            elif token >= content:
                words.append("|" if len(members) == 1 else f"|{members[token - content][1]}|")
            elif k:
                words.append(bracket(token % k, k, token))
            else:
                words.append("·█"[token] if name == "eca" else
                             "pop" if name == "stack" and token == 0 else str(token))
        if name != "eca":
            return write_words(words, counted)
        start = len(words) % params["width"] and int(len(members) > 1)
        lines = [words[i:i + params["width"]] for i in range(start, len(words), params["width"])]
        return write_words(words[:start] + ["".join(line) for line in lines], None, "\n")
    return write


def content_size(name, params):
    """How many content symbols a rule uses: separators and pads come after them."""
    return 2 if name == "eca" else 2 * params["k"] if "k" in params else params["vocab"]


def rule_source(spec, seed, split, block_size=None, longest=None):
    """A procedural rule, a mixture of them, or their shuffled control. `longest` cuts input lengths (curriculum).

    In a mixture the members share their content symbols; each has its own separator (content + its place in the
    mixture), with which dyck, dyck_shuffle and eca, having none, begin; the pad comes last. The shuffled control
    permutes all tokens of a sequence but its pads. The places that count stay where they were: there are as many
    as before, and each can be predicted as far as the tokens before it in its sequence tell what is left to come."""
    shuffled, members = parse_rules(spec)
    if longest is not None:
        block_size = block_size or rule_source(spec, seed, split).block_size
        members = [(w, name, {**p, "length": min(max(longest, 2), np.max(p["length"]))}) for w, name, p in members]
    content = max(content_size(name, params) for _, name, params in members)
    pad = content + len(members)
    bare = len(members) == 1 and "vocab" not in members[0][2]  # no separator and no pad in its sequences
    width = max(RULES[name](np.random.default_rng(0), 1, **params)[0].shape[1]
                + (len(members) > 1 and "vocab" not in params) for _, name, params in members)

    def generate(rng, n):
        if len(members) == 1 and not shuffled:
            return RULES[members[0][1]](rng, n, **members[0][2])
        tokens, mask = np.full((n, width), pad, SYMBOL), np.zeros((n, width), bool)
        which = rng.choice(len(members), n, p=[weight for weight, _, _ in members]) if len(members) > 1 else np.zeros(n)
        for place, (_, name, params) in enumerate(members):
            rows = np.flatnonzero(which == place)
            t, m = RULES[name](rng, len(rows), **params)
            if "vocab" in params:  # the rule's own separator and pad become the mixture's
                t = np.where(t == params["vocab"], content + place, np.where(t > params["vocab"], pad, t))
            elif len(members) > 1:
                t = np.concatenate([np.full((len(rows), 1), content + place), t], axis=1)
                m = np.concatenate([np.zeros((len(rows), 1), bool), m], axis=1)
            tokens[rows, :t.shape[1]], mask[rows, :m.shape[1]] = t, m
        if shuffled:
            order = np.argsort(np.where(tokens == pad, 2.0, rng.random(tokens.shape)), axis=1, kind="stable")
            tokens = np.take_along_axis(tokens, order, axis=1)
        return tokens, mask

    source = Generated(spec, "rule", generate, content if bare else pad + 1, block_size, rule_writer(members, content),
                       seed, split, pad=0 if bare else pad)
    source.chunk_rows = max(1, min(source.chunk_rows, 2 ** 27 // content))  # some rules keep a table of all symbols per row
    source.longest = max(np.max(params["length"]) for _, _, params in parse_rules(spec)[1])
    return source


def task_writer(name, params):
    """How to print a row of a task: digits and signs, or k4: 17 for a key and its value and ?k4 for the question."""
    def write(tokens, counted):
        if name == "haystack":
            pairs = params["pairs"]
            words = ["_" if t == 0 else str(t) if t < 128 else f"k{t - 128}:" if t < 128 + pairs
                     else f"?k{t - 128 - pairs}" for t in tokens]
            return write_words(words, counted)
        if name == "sorting":
            return write_words(["|" if t == params["below"] else str(t) for t in tokens], counted)
        sign = "*" if name == "multiplication" else "+"
        letters = dict(zip(range(10), "0123456789")) | dict(zip(range(20, 30), "0123456789"))
        return write_words([{**letters, 10: sign, 11: "=", 12: "_", 30: "."}.get(int(t), "?") for t in tokens],
                           counted, "")
    return write


def task_source(spec, seed, split, block_size=None):
    """An algorithmic task. Validation is 4,000 examples (paper), of which training never sees one."""
    name, params, _ = parse_member(spec, TASKS)
    check_member(name, params)
    return Generated(spec, "task", lambda rng, n: TASKS[name](rng, n, **params), TASK_VOCAB[name](params), block_size,
                     task_writer(name, params), seed, split, pad={"haystack": 0, "sorting": 0}.get(name, 12),
                     holdout=True, rows=4000 if split == "val" else None)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(name):
    """`bytes` (256 bytes and an end-of-text token, needs no network) or any encoding that tiktoken knows."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,32})", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"unknown tokenizer {name!r}: there are bytes, {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, a corrupt download, an unwritable cache: all end here
        raise UserError(f"the vocabulary of {name!r} could not be fetched ({type(error).__name__}): "
                        "use --tokenizer bytes, which needs no network") from None


def bytes_per_token(tokenizer):
    """int64 (n_vocab,): how many bytes of text each token stands for; 0 for special tokens."""
    sizes = np.zeros(tokenizer.n_vocab, np.int64)
    for token in range(tokenizer.n_vocab):
        try:
            sizes[token] = len(tokenizer.decode_single_token_bytes(token))
        except KeyError:
            pass  # a gap in the vocabulary
    sizes[[t for t in map(tokenizer.encode_single_token, tokenizer.special_tokens_set)]] = 0
    return sizes


# ----------------------------------------------------------------------------------------------------------------------
# Corpora: text is tokenised once into a cache folder with nanoGPT's train.bin and val.bin


def python_files(root):
    """The .py files below a folder in a fixed order, without tests and installed packages."""
    skip = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3"}
    return sorted(f for f in Path(root).rglob("*.py") if not skip & set(f.relative_to(root).parts))


def package_folders():
    """The standard library and the four runtime packages."""
    folders = [sysconfig.get_paths()["stdlib"]]
    for package in ("torch", "numpy", "tiktoken", "matplotlib"):
        found = importlib.util.find_spec(package)
        folders += found.submodule_search_locations if found else []
    return folders


def docstrings(raw):
    """The docstrings of a Python file that are long enough to be prose (200 characters: ours)."""
    try:
        nodes = ast.walk(ast.parse(raw))
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
    return [text for text in texts if text and len(text) >= 200]


def as_text(raw, path):
    """Bytes of a user's file as text."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path} is not UTF-8 text")
    return text


def json_lines(raw, path):
    """The documents of a .jsonl file: each line an object with a `text` or `content` field."""
    for number, line in enumerate(as_text(raw, path).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                text = record["text"] if "text" in record else record["content"]
                text.encode()  # also refuses lone surrogates, which no tokenizer takes
                yield text
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}, line {number}: not a JSON object with a text or content field") from None


def corpus_files(spec):
    """The files that a corpus is made from, and a function (bytes, path) -> the documents in one. Raises UserError."""
    if spec == "code":
        return python_files(sysconfig.get_paths()["stdlib"]), lambda raw, path: [raw.decode("utf-8", "ignore")]
    if spec == "docs":
        return [f for folder in package_folders() for f in python_files(folder)], lambda raw, path: docstrings(raw)
    root = Path(spec)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    if not files:
        raise UserError(f"{spec} has no files")
    return files, lambda raw, path: json_lines(raw, path) if path.suffix == ".jsonl" else [as_text(raw, path)]


def cache_folder():
    return Path(os.environ.get("NANOWARM_CACHE") or Path.home() / ".cache" / "nanowarm")


def tokenise_files(spec, tokenizer_name):
    """Tokenises a corpus once, to a folder keyed by its content and the tokenizer; returns the folder.

    Documents are shuffled (always the same way), repeats dropped, and the last tenth held out for validation; a corpus
    that is a single document is cut within it. Each document ends with <|endoftext|>."""
    files, read = corpus_files(spec)
    key, raws = hashlib.sha256(f"1 {tokenizer_name} {spec if spec in CORPORA else ''}".encode()), []
    for path in files:
        try:
            raws.append(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        key.update(path.suffix.encode() + len(raws[-1]).to_bytes(8, "little") + raws[-1])
    folder = cache_folder() / key.hexdigest()[:24]
    if (folder / "meta.json").exists():
        return folder
    tokenizer = load_tokenizer(tokenizer_name)
    print(f"tokenising {spec} ({len(files)} files) into {folder}, once", flush=True)
    documents = list(dict.fromkeys(text for path, raw in zip(files, raws) for text in read(raw, path) if text))
    np.random.default_rng(0).shuffle(documents)
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32
    coded = [np.array(tokenizer.encode_ordinary(text) + [tokenizer.eot_token], dtype) for text in documents]
    if not coded:
        raise UserError(f"{spec} is empty")
    if len(coded) == 1:
        cut = len(coded[0]) - len(coded[0]) // 10
        coded = [coded[0][:cut], coded[0][cut:]]
    starts = np.cumsum([0] + [len(c) for c in coded])
    n_train = int(np.searchsorted(starts, starts[-1] * 0.9))
    n_train = min(max(n_train, 1), len(coded) - 1)
    meta = {"source": str(spec), "tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab,
            "dtype": np.dtype(dtype).name, "documents": len(documents)}
    return keep_tokens(folder, meta, np.concatenate(coded[:n_train]), np.concatenate(coded[n_train:]))


def keep_tokens(folder, meta, train, val):
    """Writes a tokenised corpus into the cache, whole or not at all; returns its folder. Raises UserError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder.parent))
        try:
            train.tofile(scratch / "train.bin")
            val.tofile(scratch / "val.bin")
            (scratch / "meta.json").write_text(json.dumps(meta))
            scratch.rename(folder)  # atomic: a folder that is there is whole
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            if not (folder / "meta.json").exists():  # otherwise another process was faster, with the same bytes
                raise
    except OSError as error:
        raise UserError(f"cannot write the token cache {folder.parent}: {error.strerror}; "
                        "NANOWARM_CACHE can move it") from None
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Published corpora: `python data.py prepare NAME` fetches, checks and tokenises them, once, into the cache folder

CHARACTERS = {**{chr(32 + i): i for i in range(95)}, "<problem>": 95, "<answer>": 96}  # the alphabet of DeepMind-Math
PUBLISHED = {  # `files` are below `url`; `tokens` is what is prepared if nothing is said (the published runs and a bit)
    "c4": dict(
        what="English text from the web (C4)", tokenizer="gpt2", tokens=700_000_000,
        url="https://huggingface.co/datasets/allenai/c4/resolve/main",
        train=[f"en/c4-train.{i:05}-of-01024.json.gz" for i in range(1024)],
        val=[f"en/c4-validation.{i:05}-of-00008.json.gz" for i in range(8)]),
    "codeparrot": dict(
        what="Python from GitHub (CodeParrot, cleaned)", tokenizer="gpt2", tokens=1_000_000_000,
        url="https://huggingface.co/datasets/codeparrot",
        train=[f"codeparrot-clean-train/resolve/main/file-{i:012}.json.gz" for i in range(1, 54)],
        val=["codeparrot-clean-valid/resolve/main/file-000000000054.json.gz"]),
    "wikitext103": dict(
        what="Wikipedia's good articles (WikiText-103, raw)", tokenizer="gpt2", tokens=10 ** 15,  # all: 0.12 billion
        url="https://wikitext.smerity.com", train=["wikitext-103-raw-v1.zip"], val=["wikitext-103-raw-v1.zip"]),
    "deepmind_math": dict(
        what="school mathematics, question and answer (DeepMind)", tokenizer="characters", tokens=1_700_000_000,
        url="https://storage.googleapis.com/mathematics-dataset",
        train=["mathematics_dataset-v1.0.tar.gz"], val=["mathematics_dataset-v1.0.tar.gz"])}
RETRY_AFTER = (0.5, 1, 2, 5, 10)  # seconds; a fetch that got no further this many times is given up
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile)  # what a broken file raises


def parse_count(text):
    """"700M" -> 700_000_000; K, M, B, T for thousands, millions, billions, trillions."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 700M, 1.6B or 655360000")
    return round(float(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " "))


class Progress:
    """Says every two seconds how far the preparation of a split is."""

    def __init__(self, label, wanted, tokens, files):
        self.label, self.wanted, self.tokens, self.files, self.text = label, wanted, tokens, files, 0
        self.first, self.first_fetched, self.began, self.said = tokens, files.fetched, time.time(), time.time()

    def say(self):
        now = time.time()
        if now - self.said < 2:
            return
        seconds, rate, self.said = now - self.began, (self.tokens - self.first) / (now - self.began), now
        fetched = (self.files.fetched - self.first_fetched) / 1e6
        aim = f" of {self.wanted / 1e6:,.1f}" if self.wanted < 10 ** 15 else ""
        left = f", {(self.wanted - self.tokens) / rate / 60:.1f} min left" if rate and aim else ""
        print(f"[{self.label}] {self.tokens / 1e6:,.1f}{aim} M tokens, {rate / 1e6:.2f} M/s{left} | text "
              f"{self.text / seconds / 1e6:.1f} MB/s | fetched {fetched:,.1f} MB, {fetched / seconds:.1f} MB/s", flush=True)

    def wait(self, future):
        """The result of work that goes on in a thread."""
        while not future.done():
            self.say()
            concurrent.futures.wait([future], 0.2)
        return future.result()


class Files:
    """The published files of a corpus: the user's own, or fetched into a folder. Each is read through before use."""

    def __init__(self, corpus, source, folder):
        if source and "://" in source and not source.startswith(("http://", "https://")):
            raise UserError(f"--source {source} is neither an http address nor a folder")
        self.url, self.source, self.folder = corpus["url"], source, folder
        self.fetched, self.checked, self.stop = 0, {}, threading.Event()  # stop: what is on the way is not needed

    def places(self, file):
        """Where a file may be: at its own address, or at a mirror or in a folder that is laid out like the whole host,
        like the repository, or flat."""
        if self.source is None:
            return [f"{self.url}/{file}"]
        host = f"{self.url}/{file}".split("/", 3)[3]
        layouts = [file.split("/resolve/main/")[-1], file.replace("/resolve/main", ""), file, host, file.split("/")[-1]]
        return [f"{self.source.rstrip('/')}/{layout}" for layout in dict.fromkeys(layouts)]

    def get(self, file):
        """The path of a whole copy of one file. Raises UserError."""
        if file not in self.checked:
            local = self.source is not None and "://" not in self.source
            self.checked[file] = self.find(file) if local else self.fetch_whole(file)
        return self.checked[file]

    def find(self, file):
        paths = [path for path in map(Path, self.places(file)) if path.is_file()]
        if not paths:
            raise UserError(f"{file.split('/')[-1]} is not in {self.source}")
        try:
            read_through(paths[0])
        except DAMAGED as error:
            raise UserError(f"{paths[0]} is damaged ({error}): put a whole copy in its place") from None
        return paths[0]

    def fetch_whole(self, file):
        path = self.folder / file.replace("/", "_")
        for _ in range(3):
            if not path.exists():
                self.fetch(self.places(file), path)
            if self.stop.is_set():
                return None
            try:
                read_through(path)
                return path
            except DAMAGED as error:
                print(f"{file.split('/')[-1]} is damaged ({error}): fetching it again", flush=True)
                path.unlink()
        raise UserError(f"{file.split('/')[-1]} came damaged three times: --source can name a mirror or a folder")

    def fetch(self, urls, path):
        """Downloads from the first of some addresses that has the file. A connection that was cut or stalled goes on
        from where it broke, in this session or a later one. Raises UserError; gives up quietly once `stop` is set."""
        part, failures = path.with_name(path.name + ".part"), 0
        part.parent.mkdir(parents=True, exist_ok=True)
        while not self.stop.is_set():
            have, size, reason = part.stat().st_size if part.exists() else 0, None, "the connection was cut"
            try:
                request = urllib.request.Request(urls[0], headers={"Range": f"bytes={have}-"} if have else {})
                with urllib.request.urlopen(request, timeout=30) as answer:
                    resumed = answer.status == 206  # 200: the server knows no ranges and sends it from the start
                    if length := answer.headers.get("Content-Length"):
                        size = int(length) + have * resumed
                    with open(part, "ab" if resumed else "wb") as file:
                        while not self.stop.is_set() and (block := answer.read(1 << 18)):
                            file.write(block)
                            self.fetched += len(block)
                if part.stat().st_size == size or size is None and not self.stop.is_set():
                    part.replace(path)
                    return
            except urllib.error.HTTPError as error:
                if error.code == 416 and error.headers.get("Content-Range", "").endswith(f"/{have}"):
                    part.replace(path)  # it was whole already
                    return
                if error.code == 416:
                    part.unlink()  # longer than the file: not the same file
                elif error.code == 404 and len(urls) > 1:
                    urls = urls[1:]
                    continue
                elif error.code not in (408, 425, 429) and error.code < 500:
                    raise UserError(f"cannot fetch {urls[0]}: HTTP {error.code} {error.reason}; --source can name a "
                                    "mirror or a folder with the same files") from None
                reason = f"HTTP {error.code} {error.reason}"
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = getattr(error, "reason", None) or error
            except ValueError:
                raise UserError(f"--source {self.source} is not an address") from None
            failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
            if failures > len(RETRY_AFTER):
                raise UserError(f"cannot fetch {urls[0]}: {reason}; what has come so far is kept, the same command goes "
                                "on from there, and --source can name a mirror or a folder") from None
            self.stop.wait(RETRY_AFTER[failures - 1] if failures else 0)

    def done_with(self, file):
        """Frees the disk of a fetched file."""
        path = self.checked.pop(file, None)
        if path and path.parent == self.folder:
            path.unlink(missing_ok=True)


def read_through(path):
    """Reads a compressed file to its end, and so checks it. Raises one of DAMAGED."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile(f"{archive.testzip()} in it is damaged")
    else:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass


def records(path, split):
    """The documents of a published file, not parsed yet: lines of JSON, or WikiText's articles."""
    if path.suffix == ".gz":
        with gzip.open(path) as lines:
            yield from lines
        return
    with zipfile.ZipFile(path) as archive:
        ending = {"train": "wiki.train.raw", "val": "wiki.valid.raw"}[split]
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if not names:
            raise UserError(f"{path} holds no {ending}")
        with archive.open(names[0]) as lines:
            article = []
            for line in lines:
                if re.fullmatch(rb" = [^=].* = \s*", line) and any(map(bytes.strip, article)):  # the next title
                    yield b"".join(article)
                    article = []
                article.append(line)
            if article:
                yield b"".join(article)


def in_chunks(items, size=1 << 19):
    """Lists of records, each list of about `size` bytes: what one worker tokenises at a time."""
    chunk, n = [], 0
    for item in items:
        chunk.append(item)
        n += len(item)
        if n >= size:
            yield chunk
            chunk, n = [], 0
    if chunk:
        yield chunk


def start_worker(tokenizer):
    """In a new worker: Ctrl-C is the main process's business, and when that is gone the worker goes too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    start_worker.tokenizer = tokenizer


def tokenise_chunk(chunk, is_json):
    """In a worker: a list of records -> their tokens, each document ended by <|endoftext|>, and the characters."""
    tokenizer, tokens, size = start_worker.tokenizer, [], 0
    for record in chunk:
        if is_json:
            document = json.loads(record)
            text = document["text"] if "text" in document else document["content"]
        else:
            text = record.decode("utf-8")
        size += len(text)
        tokens += tokenizer.encode_ordinary(text)
        tokens.append(tokenizer.eot_token)
    return np.array(tokens, np.uint32), size


def text_pieces(files, names, split, tokenizer, workers, place, progress):
    """Yields (tokens, the place behind them, None) of a text corpus from a place [file, chunk] on.

    Chunks are tokenised in processes and come back in order, at most three per worker on the way, so memory is flat;
    the next file is fetched meanwhile if it will be needed (a compressed byte makes about half a token)."""
    fetcher, ahead = concurrent.futures.ThreadPoolExecutor(1), None
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker,
                                                  (tokenizer,))
    try:
        for number in range(place[0], len(names)):
            path = progress.wait(ahead or fetcher.submit(files.get, names[number]))
            needed = number + 1 < len(names) and progress.wanted - progress.tokens > path.stat().st_size / 2
            ahead = fetcher.submit(files.get, names[number + 1]) if needed else None
            done = place[1] if number == place[0] else 0
            chunks, pending = itertools.islice(in_chunks(records(path, split)), done, None), collections.deque()
            while True:
                for chunk in itertools.islice(chunks, 3 * workers - len(pending)):
                    pending.append(pool.submit(tokenise_chunk, chunk, path.suffix == ".gz"))
                if not pending:
                    break
                try:
                    tokens, size = progress.wait(pending.popleft())
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path.name} has a line that is not a document ({error!r}): try another --source"
                                    ) from None
                done, progress.text = done + 1, progress.text + size
                yield tokens, [number, done], None
            yield np.zeros(0, np.uint32), [number + 1, 0], None  # nothing more from this file: the place is saved now
            if split == "train":  # the file of the validation split may be that of the training split, too
                files.done_with(names[number])
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("a tokenising process was killed (out of memory?): what is done is kept; the same command goes "
                        "on, perhaps with fewer --workers") from None
    finally:
        files.stop.set()
        pool.shutdown(cancel_futures=True)
        fetcher.shutdown()
        files.stop.clear()


def problem_files(archive, split):
    """The text files of the archive of DeepMind-Math that belong to a split, in their order there."""
    folders = {"train": ("train-easy", "train-medium", "train-hard"), "val": ("interpolate", "extrapolate")}[split]
    return (member for member in archive if member.isfile() and Path(member.name).parent.name in folders)


def problem_pieces(files, names, split, place, progress):
    """Yields (tokens, place, "folder/module") of DeepMind-Math: from each of its files the same share of the tokens
    wanted, whole problems only, so that every module and level counts alike, as published.

    The stream is <problem> question <answer> answer <problem> question ...: the next <problem> also ends an answer."""
    with concurrent.futures.ThreadPoolExecutor(1) as fetcher:
        path = progress.wait(fetcher.submit(files.get, names[0]))
    with tarfile.open(path, "r|gz") as archive:
        share = progress.wanted // max(1, sum(1 for _ in problem_files(archive, split)))
    with tarfile.open(path, "r|gz") as archive:
        for number, member in enumerate(problem_files(archive, split)):
            if number < place[1]:
                continue
            label = f"{Path(member.name).parent.name}/{Path(member.name).stem}"
            raw = np.frombuffer(archive.extractfile(member).read(share), np.uint8)
            ends = np.flatnonzero(raw == ord("\n"))
            ends = ends[:len(ends) // 2 * 2]  # of whole problems: question, answer, question, answer ...
            tokens = raw[:ends[-1] + 1 if len(ends) else 0].astype(np.int64) - 32
            tokens[ends[0::2]], tokens[ends[1::2]] = CHARACTERS["<answer>"], CHARACTERS["<problem>"]
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(CHARACTERS):
                raise UserError(f"{label} in {path.name} is not plain ASCII text: try another --source")
            if number == 0:
                tokens = np.concatenate([[CHARACTERS["<problem>"]], tokens])
            progress.text += len(tokens)
            yield tokens, [0, number + 1], label


def write_split(folder, split, wanted, pieces, dtype, files, growing):
    """Writes pieces of tokens to SPLIT.bin.part until there are `wanted`; returns the state at the end. A SPLIT.bin
    that is there, and perhaps read from, stays as it is.

    SPLIT.json holds the state: the place behind the last whole piece, and the tokens up to there. It is replaced about
    once a second, after the tokens have reached the disk, so a kill at any moment costs a second's work and leaves no
    trace in the result. With `growing`, asking for more later goes on from there too."""
    final, part, journal = folder / f"{split}.bin", folder / f"{split}.bin.part", folder / f"{split}.json"
    there = {"wanted": None, "total": None, "tokens": 0}
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or damaged: from the start
        there |= json.loads(journal.read_text())
    newest = part if part.exists() else final
    size = newest.stat().st_size // dtype.itemsize if newest.exists() else 0
    if there["total"] is not None and there["wanted"] == wanted and size == there["total"]:
        return there
    if there["tokens"] and size >= there["tokens"] and (growing or there["wanted"] == wanted):
        if newest is final:
            shutil.copyfile(final, part.with_suffix(".tmp"))
            part.with_suffix(".tmp").replace(part)
        wanted = max(wanted, there["tokens"])
        state = {**there, "wanted": wanted, "total": None}
    else:
        journal.unlink(missing_ok=True)  # before anything is written over
        part.write_bytes(b"")
        state = {"wanted": wanted, "place": [0, 0], "tokens": 0, "parts": [], "total": None}
    with open(part, "r+b") as file:
        def save():
            file.flush()
            os.fsync(file.fileno())
            with open(journal.with_suffix(".tmp"), "w") as scratch:
                scratch.write(json.dumps(state, sort_keys=True))
                scratch.flush()
                os.fsync(scratch.fileno())
            journal.with_suffix(".tmp").replace(journal)

        file.seek(state["tokens"] * dtype.itemsize)
        total, saved, progress = state["tokens"], time.time(), Progress(split, wanted, state["tokens"], files)
        try:
            with contextlib.closing(pieces(state["place"], progress)) as stream:
                while total < wanted and (piece := next(stream, None)):
                    tokens, place, label = piece
                    file.write(tokens.astype(dtype).tobytes())
                    total = state["tokens"] + len(tokens)
                    if total > wanted:  # cut here; the state stays at the end of the piece before
                        total = wanted
                        break
                    if label:  # where the first question of this part starts
                        state["parts"].append([label, max(1, state["tokens"])])
                    state["place"], state["tokens"], progress.tokens = place, total, total
                    if not len(tokens) or time.time() - saved > 1:
                        save()
                        saved = time.time()
                    progress.say()
        except UserError as error:
            save()
            raise UserError(f"{error} ({state['tokens']:,} tokens of {split} are done and kept)") from None
        file.truncate(total * dtype.itemsize)
        state["total"] = total
        save()
    return state


@contextlib.contextmanager
def only_one(folder):
    """Two preparations of one folder at a time would spoil it. The lock goes with the process, however that ends."""
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is preparing {folder}: wait for it, or stop it") from None
        yield


def prepared_folder(name, tokenizer):
    return cache_folder() / f"{name}-{tokenizer}"


def prepare(name, tokens=None, val_tokens=10_000_000, workers=1, source=None, tokenizer_name=None):
    """Fetches, checks and tokenises a published corpus into the cache, in nanoGPT's format; returns the folder.

    `tokens` and `val_tokens`: how many to take, from the beginning of the published files of each split. `source`: a
    mirror's address or a folder with the same files. It may be killed and started again at any moment, and asked for
    more later: the files come out the same, byte for byte, whatever the number of workers. Raises UserError."""
    corpus = PUBLISHED[name]
    tokens, tokenizer_name = tokens or corpus["tokens"], tokenizer_name or corpus["tokenizer"]
    by_character = corpus["tokenizer"] == "characters"
    if (tokenizer_name == "characters") != by_character:
        raise UserError(f"--tokenizer {tokenizer_name} does not go with {name}: leave it out for {corpus['tokenizer']}")
    meta = {"source": name, "dtype": "uint16", "vocab_size": len(CHARACTERS), "itos": list(CHARACTERS)}
    tokenizer = None if by_character else load_tokenizer(tokenizer_name)
    if tokenizer:
        meta = {"source": name, "dtype": "uint16" if tokenizer.n_vocab <= 2 ** 16 else "uint32",
                "vocab_size": tokenizer.n_vocab, "tokenizer": tokenizer_name}
    folder = prepared_folder(name, tokenizer_name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            finished, there = folder / "meta.json", {"train": 0, "val": 0}
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
                there = json.loads(finished.read_text())["wanted"]
            if there["train"] >= tokens and there["val"] >= val_tokens:
                return folder
            tokens, val_tokens = max(tokens, there["train"]), max(val_tokens, there["val"])
            files, states = Files(corpus, source, folder / "downloads"), {}
            for split, wanted in (("val", val_tokens), ("train", tokens)):
                pieces = (functools.partial(problem_pieces, files, corpus[split], split) if by_character else
                          functools.partial(text_pieces, files, corpus[split], split, tokenizer, workers))
                states[split] = write_split(folder, split, wanted, pieces, np.dtype(meta["dtype"]), files,
                                            growing=not by_character)
                if not states[split]["total"]:
                    (folder / f"{split}.json").unlink()
                    raise UserError(f"the files of {name} hold nothing for {split}: try another --source")
            meta |= {key: {split: state[name] for split, state in states.items()}
                     for key, name in (("wanted", "wanted"), ("tokens", "total"), ("parts", "parts"))}
            finished.with_suffix(".tmp").write_text(json.dumps(meta))
            finished.unlink(missing_ok=True)  # until the new files are all in place, the corpus is not there
            for split in states:
                if (folder / f"{split}.bin.part").exists():
                    (folder / f"{split}.bin.part").replace(folder / f"{split}.bin")
            shutil.rmtree(folder / "downloads", ignore_errors=True)
            finished.with_suffix(".tmp").replace(finished)
    except (OSError, *DAMAGED) as error:
        raise UserError(f"cannot prepare {name} in {folder}: {error}; what is done is kept, the same command goes on "
                        "from there; NANOWARM_CACHE can move the folder") from None
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Reading tokenised text


class PlainUnpickler(pickle.Unpickler):
    """nanoGPT's meta.pkl holds plain containers, so any class or function in one is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_meta(folder):
    """(vocab_size, dtype, decode, token_bytes) of a folder with train.bin and val.bin."""
    try:
        if (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text())
        elif (folder / "meta.pkl").exists():
            meta = PlainUnpickler((folder / "meta.pkl").open("rb")).load()
        else:
            meta = {"vocab_size": 50257, "tokenizer": "gpt2"}
        if "itos" in meta:
            letters = [meta["itos"][i] for i in range(meta["vocab_size"])]
            sizes = np.array([len(letter.encode()) for letter in letters])
            return meta["vocab_size"], np.dtype("uint16"), lambda tokens: "".join(letters[t] for t in tokens), sizes
        dtype = np.dtype(meta.get("dtype", "uint16"))
        if "tokenizer" in meta:
            try:
                tokenizer = load_tokenizer(meta["tokenizer"])
                return (int(meta["vocab_size"]), dtype, lambda tokens: tokenizer.decode([int(t) for t in tokens]),
                        np.pad(bytes_per_token(tokenizer), (0, max(0, meta["vocab_size"] - tokenizer.n_vocab))))
            except UserError:  # tokens can be trained on without their vocabulary, but not printed or weighed in bytes
                pass
        return int(meta["vocab_size"]), dtype, lambda tokens: " ".join(map(str, tokens)), None
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as error:
        raise UserError(f"{folder}: its meta file cannot be read ({type(error).__name__}: {error})") from None


class Corpus:
    """A Source over tokenised text: windows of block_size + 1 tokens, each once per epoch, in a random order.

    Validation is the same windows for every seed. The split `warmup` reads the training windows of the first epoch
    from the other end: text that the training run itself comes to last, if ever (`--warmup text`)."""

    kind = "text"

    def __init__(self, name, folder, block_size, seed, split):
        self.name, self.block_size, self.seed, self.split = name, block_size, seed, split
        self.vocab_size, dtype, self.write, self.token_bytes = read_meta(folder)
        path = folder / ("val.bin" if split == "val" else "train.bin")
        try:
            self.tokens = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        self.windows = (len(self.tokens) - 1) // block_size
        if self.windows < 1:
            raise UserError(f"{name} is too short: its {'validation' if split == 'val' else 'training'} part has "
                            f"{len(self.tokens)} tokens, a block of {block_size} needs {block_size + 1}")
        self.rows = self.windows if split == "val" else None
        self.epochs = {}

    def epoch(self, e):
        """Where the windows of an epoch start; later epochs cut the text at other places."""
        if e not in self.epochs:
            rng = np.random.default_rng((0, 1) if self.split == "val" else (self.seed, 0, e))
            slack = (len(self.tokens) - 1) % self.block_size
            self.epochs = {e: rng.permutation(self.windows) * self.block_size + rng.integers(0, slack + 1)}
        return self.epochs[e]

    def decode(self, tokens, counted=None):
        """A row as text."""
        return self.write(tokens)

    def cut(self, starts, width):
        """(n,) places -> int64 (n, width): the tokens from there on. Raises UserError on an impossible token."""
        tokens = self.tokens[np.minimum(starts[:, None] + np.arange(width), len(self.tokens) - 1)].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.name} holds the token {tokens.max()}, but its vocabulary has {self.vocab_size}")
        return tokens

    def starts(self, index, size):
        """Where the windows of rows index * size and on begin: int64 (size,)."""
        rows = np.arange(index * size, (index + 1) * size)
        if self.split == "warmup":
            rows = self.windows - 1 - rows % self.windows
        elif self.split == "val":
            rows = rows % self.windows
        epochs, windows = np.divmod(rows, self.windows)
        starts = np.empty_like(rows)
        for e in np.unique(epochs):
            starts[epochs == e] = self.epoch(e)[windows[epochs == e]]
        return starts

    def batch(self, index, size):
        """Rows index * size and on: x, y, both int64 (size, block_size)."""
        both = self.cut(self.starts(index, size), self.block_size + 1)
        return both[:, :-1], both[:, 1:]


class Problems(Corpus):
    """DeepMind-Math: rows of problem after problem, of which the loss counts the answers and the token that ends each.

    A row starts with the first problem that starts in its window, so it ends a little beyond it."""

    kind = "problems"

    def __init__(self, name, folder, block_size, seed, split):
        super().__init__(name, folder, block_size, seed, split)
        self.token_bytes, self.parts = None, json.loads((folder / "meta.json").read_text())["parts"]["val"]

    def batch(self, index, size):
        """Rows index * size and on: x, y, both int64 (size, block_size)."""
        starts = self.starts(index, size)
        ahead = self.cut(starts, 256) == CHARACTERS["<problem>"]  # a problem has at most 192 characters (published)
        both = self.cut(starts + ahead.argmax(axis=1), self.block_size + 1)
        # The loss mask: a token counts if the last of the two marks before it was <answer>.
        marks = np.where(both >= CHARACTERS["<problem>"], np.arange(both.shape[1]), 0)
        last_mark = np.take_along_axis(both, np.maximum.accumulate(marks, axis=1), axis=1)
        return both[:, :-1], np.where(last_mark[:, :-1] == CHARACTERS["<answer>"], both[:, 1:], -1)

    def decode(self, tokens, counted=None):
        """Problems as a person would write them; with `counted`, what the loss counts stands between « and »."""
        return write_words([self.write([t]) for t in tokens], counted, "").replace("<problem>", "\n").replace(
            "<answer>", " = ")

    def problems(self, n):
        """The first n problems of each part of the validation split -> {"interpolate/numbers__gcd": [(question,
        answer), ...]}: int64 tokens, <problem> to <answer>, and the answer with the <problem> that ends it."""
        result, ends = {}, [start for _, start in self.parts[1:]] + [len(self.tokens)]
        for (part, start), end in zip(self.parts, ends):
            tokens = self.tokens[start - 1:min(end, start + 256 * n)].astype(np.int64)
            edges = np.flatnonzero(tokens == CHARACTERS["<problem>"])[:n + 1]
            result[part] = []
            for a, b in zip(edges, edges[1:]):
                middle = a + int(np.argmax(tokens[a:b] == CHARACTERS["<answer>"])) + 1
                result[part].append((tokens[a:middle], tokens[middle:b + 1]))
        return result


# ----------------------------------------------------------------------------------------------------------------------
# School mathematics in words (after DeepMind-Math; sentences and modules: ours)


def polynomial(coefficients):
    """[2, 0, -3] -> "-3*x**2 + 2": coefficients from the constant up."""
    terms = []
    for power, c in reversed(list(enumerate(coefficients))):
        if c:
            factor = "" if abs(c) == 1 and power else f"{abs(c)}" + ("*" if power else "")
            terms.append(("- " if c < 0 else "+ ") + factor + ("", "x", f"x**{power}")[min(power, 2)])
    text = " ".join(terms) or "+ 0"
    return text[2:] if text[0] == "+" else "-" + text[2:]


def in_base(n, base):
    """A number above 0 in digits of a base up to 16."""
    digits = ""
    while n:
        n, digit = divmod(n, base)
        digits = "0123456789abcdef"[digit] + digits
    return digits or "0"


def math_question(rand):
    """One question and its answer. rand(a, b) draws an integer from a..b."""
    module = rand(0, 8)
    a, b = rand(-10 ** rand(1, 4), 10 ** rand(1, 4)), rand(-10 ** rand(1, 4), 10 ** rand(1, 4))
    if module == 0:
        sign = "+-*"[rand(0, 2)]
        wanted = a + b if sign == "+" else a - b if sign == "-" else a * b
        return f"What is {a} {sign} {f'({b})' if b < 0 else b}?", str(wanted)
    if module == 1:
        divisor = rand(2, 60)
        return f"Divide {a * divisor} by {divisor}.", str(a)
    if module == 2:
        x, factor = rand(-30, 30), rand(2, 20) * (1, -1)[rand(0, 1)]
        left = polynomial([b, factor])
        return f"Solve {left} = {factor * x + b} for x.", str(x)
    if module == 3:
        p, q, r, s = rand(1, 30), rand(2, 30), rand(1, 30), rand(2, 30)
        if rand(0, 1):
            return f"Which is larger, {p}/{q} or {r}/{s}?", ("equal" if p * s == r * q else
                                                            f"{p}/{q}" if p * s > r * q else f"{r}/{s}")
        return f"Is {a} less than {b}?", "yes" if a < b else "no"
    if module == 4:
        n, divisor = rand(2, 10 ** rand(2, 5)), rand(2, 40)
        if rand(0, 1):
            return f"Does {divisor} divide {n}?", "yes" if n % divisor == 0 else "no"
        return f"What remains when {n} is divided by {divisor}?", str(n % divisor)
    if module == 5:
        n, base = rand(1, 10 ** rand(2, 5)), (2, 3, 5, 8, 16)[rand(0, 4)]
        if rand(0, 1):
            return f"Write {n} in base {base}.", in_base(n, base)
        return f"Which number is {in_base(n, base)} in base {base}?", str(n)
    coefficients = [rand(-9, 9) for _ in range(rand(2, 4))]
    if module == 6:
        x = rand(-9, 9)
        return (f"Let f(x) = {polynomial(coefficients)}. What is f({x})?",
                str(sum(c * x ** power for power, c in enumerate(coefficients))))
    if module == 7:
        slope = [power * c for power, c in enumerate(coefficients)][1:]
        return f"Find the derivative of {polynomial(coefficients)} with respect to x.", polynomial(slope)
    p, q, r, s = rand(1, 9), rand(-9, 9), rand(1, 9), rand(-9, 9)
    return (f"Expand ({polynomial([q, p])})*({polynomial([s, r])}).", polynomial([q * s, p * s + q * r, p * r]))


def math_lines(split, size):
    """At least `size` characters of questions and answers, a line each. One question in 16, by a hash, is for validation."""
    rng, lines, made = np.random.default_rng((8, split == "val")), [], 0
    while made < size:
        numbers = iter(rng.random(1 << 16).tolist())
        with contextlib.suppress(StopIteration):  # a Python loop per question, but once: the tokens are kept
            while made < size:
                question, answer = math_question(lambda low, high: low + int(next(numbers) * (high - low + 1)))
                if (zlib.crc32(question.encode()) % 16 == 0) == (split == "val"):
                    lines.append(f"{question}\n{answer}\n")
                    made += len(lines[-1])
    return "".join(lines)


def tokenise_math(tokenizer_name):
    """The mathematics corpus, 16 M characters and a sixteenth of that for validation: made and tokenised once, into the
    cache; returns the folder."""
    folder = cache_folder() / f"math-1-{tokenizer_name}"  # another number for other questions
    if not (folder / "meta.json").exists():
        tokenizer = load_tokenizer(tokenizer_name)
        print(f"making and tokenising math into {folder}, once", flush=True)
        dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32
        meta = {"source": "math", "tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab, "dtype": np.dtype(dtype).name}
        keep_tokens(folder, meta, *(np.array(tokenizer.encode_ordinary(math_lines(split, size)), dtype)
                                    for split, size in (("train", 2 ** 24), ("val", 2 ** 20))))
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Any spec -> a Source

CORPORA = {"code": "the Python source of the standard library of this interpreter",
           "docs": "English: the docstrings of the standard library, torch, numpy, tiktoken and matplotlib",
           "math": "school mathematics as question and answer in words, made here",
           **{name: corpus["what"] + f": python data.py prepare {name}" for name, corpus in PUBLISHED.items()}}


def kind_of(spec):
    """"rule", "task" or "text", without loading anything."""
    name = spec.removeprefix("shuffled:").split(":")[0].split("+")[0].split("*")[-1].strip()
    if spec in CORPORA:
        return "text"
    if name in TASKS:
        return "task"
    if name in RULES or spec.startswith("shuffled:") or "+" in spec and not os.path.exists(spec):
        return "rule"
    if os.path.exists(spec):
        return "text"
    raise UserError(f"unknown data {spec!r}: neither a path nor one of {', '.join([*RULES, *TASKS, *CORPORA])}")


def default_tokenizer(spec):
    """The tokenizer of a corpus if none is named."""
    return PUBLISHED[spec]["tokenizer"] if spec in PUBLISHED else "bytes"


def make_source(spec, split="train", seed=0, block_size=None, tokenizer=None, longest=None):
    """The Source that a spec names.

    spec: a rule or mixture ("dyck:k=16"), a task ("haystack"), a corpus ("code", "c4") or a path.
    split: "train", "val", or "warmup" (text only: other windows of the training part). block_size: tokens per row;
    None: as long as the sequences (rules and tasks) or 256 (text). Raises UserError."""
    kind, tokenizer = kind_of(spec), tokenizer or default_tokenizer(spec)
    if kind == "rule":
        return rule_source(spec, seed, split, block_size, longest)
    if kind == "task":
        return task_source(spec, seed, split, block_size)
    if spec in PUBLISHED:
        folder = prepared_folder(spec, tokenizer)
        if not (folder / "meta.json").exists():
            other = f" --tokenizer {tokenizer}" if tokenizer != default_tokenizer(spec) else ""
            raise UserError(f"{spec} is not prepared on this machine: python data.py prepare {spec}{other}")
        kind = Problems if tokenizer == "characters" else Corpus
        return kind(spec, folder, block_size or 256, seed, split)
    folder = Path(spec)
    if spec == "math":
        folder = tokenise_math(tokenizer)
    elif not (folder / "train.bin").exists() or not (folder / "val.bin").exists():
        folder = tokenise_files(spec, tokenizer)
    return Corpus(spec, folder, block_size or 256, seed, split)


def show(spec, n, seed, split, tokenizer):
    source = make_source(spec, split, seed, tokenizer=tokenizer)
    x, y = source.batch(0, n)
    if source.kind == "text":
        print(("\n" + "-" * 80 + "\n").join(source.decode(row) for row in x))
        return
    print(f"{spec}: {source.block_size} tokens from a vocabulary of {source.vocab_size}; what the loss counts is "
          "between « and »")
    for tokens, targets in zip(x, y):
        print("\n" + source.decode(tokens, np.concatenate([[False], targets[:-1] != -1])))


def list_everything():
    for title, functions in (("procedural rules", RULES), ("algorithmic tasks", TASKS)):
        print(title)
        for name, function in functions.items():
            print(f"  {name:18} {function.__doc__}\n{'':20} "
                  + ", ".join(f"{key}={value}" for key, value in parameters(function).items()))
    print("  mixtures           set+union, 0.7*set+0.3*union:length=32\n"
          "  shuffled control   shuffled:dyck:k=16\n"
          "  varying lengths    set:length=2-20\ncorpora")
    for name, line in CORPORA.items():
        print(f"  {name:18} {line}")
    print("  PATH               a text or .jsonl file, a folder of them, or a folder with train.bin and val.bin")


BENCH = [*((f"{name}:length=64", 64) for name in ("identity", "reverse", "sort", "set", "union", "delete", "stack")),
         *((f"{name}{ending}", size) for ending, size in (("length=2048", 4), ("length=128", 64))
           for name in ("dyck:k=64,", "dyck_shuffle:k=64,", "eca:")),
         *((name, 1000) for name in TASKS), *((name, 16) for name in CORPORA)]


def seconds_of(call, least=0.5):
    """Processor seconds of one call(i), i = 0, 1, ...: the mean over at least `least` seconds."""
    began, n = time.process_time(), 0
    while time.process_time() - began < least:
        call(n)
        n += 1
    return (time.process_time() - began) / n


def bench(specs, consumer):
    """Tokens per second on one core, pads included, beside what it takes to write so many numbers at all (the floor)."""
    print(f"{'data':32} {'batch':>12} {'M tokens/s':>11} {'of the floor':>13} {f'core for {consumer / 1e6:g}M/s':>16}")
    for spec, size in ([(spec, 64) for spec in specs] or BENCH):
        text = kind_of(spec) == "text"
        if not specs and spec in PUBLISHED and not (prepared_folder(spec, default_tokenizer(spec)) / "meta.json").exists():
            continue
        source = make_source(spec, block_size=1024 if text else None)
        shape = size, source.block_size
        source.batch(0, size)
        floor = seconds_of(lambda i: (np.full(shape, i), np.full(shape, -1)), 0.1)
        rate = size * source.block_size / (needed := seconds_of(lambda i: source.batch(i, size)))
        print(f"{spec:32} {f'{size} x {source.block_size}':>12} {rate / 1e6:11.1f} {floor / needed:13.0%} {consumer / rate:16.1%}",
              flush=True)


def main():
    parser = Parser(description="Look at the data.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every rule, task and corpus with its parameters")
    shower = commands.add_parser("show", help="print sequences as a person would write them")
    shower.add_argument("spec", help="for example dyck:k=3,length=32, haystack:pairs=4, code, or a path")
    shower.add_argument("-n", type=int, default=3, help="how many (default 3)")
    shower.add_argument("--seed", type=int, default=0)
    shower.add_argument("--split", choices=("train", "val"), default="train")
    shower.add_argument("--tokenizer", help="of a corpus (default: bytes, or what was published)")
    bencher = commands.add_parser("bench", help="tokens per second on one core, for every rule, task and corpus")
    bencher.add_argument("specs", nargs="*", help="for example dyck:k=64,length=2048 (default: all of them)")
    bencher.add_argument("--consumer", type=parse_count, metavar="N", default=1_000_000, help="tokens per second that a "
                         "model takes: which share of a core makes them (default 1M)")
    preparer = commands.add_parser("prepare", help="fetch and tokenise a published corpus")
    preparer.add_argument("name", choices=PUBLISHED)
    preparer.add_argument("--tokens", type=parse_count, metavar="N", help="training tokens, such as 700M; default: what "
                          "the published run reads (" + ", ".join(
                              f"{name} {'all' if c['tokens'] >= 10 ** 15 else format(c['tokens'] // 10 ** 6, ',') + 'M'}"
                              for name, c in PUBLISHED.items()) + ")")
    preparer.add_argument("--val_tokens", type=parse_count, metavar="N", default=10_000_000,
                          help="validation tokens (default 10M)")
    preparer.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenising processes (default: all cores)")
    preparer.add_argument("--source", metavar="URL|FOLDER", help="take the same files from a mirror or a disk")
    preparer.add_argument("--tokenizer", help="bytes, or an encoding that tiktoken knows (default: as published)")
    args = parser.parse_args()
    if args.command == "list":
        return list_everything()
    if args.command == "bench":
        return bench(args.specs, args.consumer)
    if args.command == "prepare":
        if min(args.workers, args.val_tokens, 1 if args.tokens is None else args.tokens) < 1:
            raise UserError("--workers, --tokens and --val_tokens must be at least 1")
        folder = prepare(args.name, args.tokens, args.val_tokens, args.workers, args.source, args.tokenizer)
        tokens = json.loads((folder / "meta.json").read_text())["tokens"]
        print(f"{args.name}: {tokens['train']:,} training and {tokens['val']:,} validation tokens in {folder}")
        if args.tokens and tokens["train"] < args.tokens * 0.9:
            print(f"that is less than --tokens {args.tokens:,}: the published files hold no more")
        print(f"next: python train.py --data {args.name}")
        return
    if not 1 <= args.n <= 10000 or args.seed < 0:
        raise UserError("-n goes from 1 to 10000, --seed from 0")
    show(args.spec, args.n, args.seed, args.split, args.tokenizer)


def run_main(main):
    """Runs a script's main: what the user can put right is one line on stderr and exit status 2, not a traceback."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process fails the same way: one line is enough
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("error: not enough memory: ask for less (a smaller batch, block or corpus)", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # torch's ways to say it
        if "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        print("error: not enough memory: ask for less (a smaller batch, block or model)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python data.py list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_main(main)
