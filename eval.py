"""What a checkpoint knows, and where: probes of its answers, its heads and its residual stream.

    python eval.py out/code-dyck-s0/ckpt.pt                  every probe that fits, on held-out data
    python eval.py out/*/warmup.pt --probe learned           was it learned? Several side by side
    python eval.py A/ckpt.pt B/ckpt.pt --plot                and as figures
    python eval.py out/code-dyck-s0/ckpt.pt --prompt "def "  go on from one's own words

A probe is a function of an opened checkpoint that returns a Finding, or None where it does not fit.
"""
import contextlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (PROBLEM, RULES, Parser, UserError, default_tokenizer, make_data, number,
                  parse_spec, read_json, run_main, write_json, written_whole)
from model import GPT, attention_maps, load


def find_device(name=None, elsewhere=False):
    """The accelerator that is here: CUDA, Apple's MPS, or the CPU. elsewhere: a named one need not
    be here. Raises UserError."""
    here = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    if name is None:
        return next(kind for kind in here if here[kind])
    kind, _, place = name.partition(":")
    if not re.fullmatch(r"(cuda(:\d{1,3})?|mps|cpu)", name):
        raise UserError(f"unknown --device {name}: cuda, mps or cpu")
    if int(place or 0) >= here[kind] and not elsewhere:
        raise UserError(f"--device {name} is not here: without the flag it is {find_device()}")
    return name


# --------------------------------------------------------------------------------------------------
# Loss and accuracy


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


def held_out_rows(data, n):
    """The first n held-out rows, in parts (x, y) of 32,000 tokens or 1 GB of logits at most."""
    if data.kind == "text":
        n = min(n, len(data.val))
    x, y = data.val.__getitems__(range(n))
    return micro_batches(x, y, math.ceil(x.numel() * max(data.vocab_size, 2 ** 13) / 2 ** 28))


@torch.no_grad()
def evaluate(model, rows, device="cpu", autocast=contextlib.nullcontext(), tokenizer=None):
    """Of rows as held_out_rows gives them: loss, in nats per counted token; accuracy, the share of
    these whose likeliest prediction is right; exact, the share of answers (unbroken runs of counted
    tokens) that are right throughout; bits_per_byte, of text; and how many tokens count."""
    training = model.training
    model.eval()
    loss = right = tokens = exact = answers = size = 0
    for x, y in rows:
        x, y = x.to(device), y.to(device)
        with autocast:
            states, wanted = model.counted_states(x, y)
            logits = model.lm_head(states).float()
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        hit = logits.argmax(-1) == wanted
        counted = y != -1
        begins = counted & ~F.pad(counted, (1, 0))[:, :-1]
        answer = begins.flatten().cumsum(0)[counted.flatten()]  # the answer that a token is in
        right += hit.sum().item()
        tokens += len(wanted)
        answers += begins.sum().item()
        exact += begins.sum().item() - len(answer[~hit].unique())
        if tokenizer and tokenizer.end is not None:
            size += len(tokenizer.decode(wanted[wanted != tokenizer.end].tolist()))
    model.train(training)
    return {"loss": loss / tokens, "accuracy": right / tokens, "exact": exact / answers,
            "bits_per_byte": loss / size / math.log(2) if size else None, "tokens": tokens}


def perplexity(loss):
    return math.exp(min(loss, 700.0))


# --------------------------------------------------------------------------------------------------
# An opened checkpoint


@dataclass
class Finding:
    """What a probe found: a table {label: (value, format)}, panels to draw, and of how many."""
    table: dict
    panels: list = field(default_factory=list)
    n: str = ""


def lines(title, xlabel, ylabel, curves):
    """A panel of curves {name: (xs, ys)}."""
    curves = {name: [np.asarray(xs).tolist(), np.asarray(ys).tolist()]
              for name, (xs, ys) in curves.items()}
    return {"title": title, "xlabel": xlabel, "ylabel": ylabel, "curves": curves}


def heat(title, xlabel, ylabel, matrix, xticks=None, yticks=None):
    """A panel of numbers from 0 to 1, or nan."""
    matrix = np.asarray(matrix, float)
    ticks = [list(range(n) if given is None else given)
             for n, given in zip(matrix.shape, (yticks, xticks))]
    matrix = np.where(np.isnan(matrix), None, matrix.round(4)).tolist()
    return {"title": title, "xlabel": xlabel, "ylabel": ylabel, "yticks": ticks[0],
            "xticks": ticks[1], "matrix": matrix}


class Opened:
    """A checkpoint with its model and held-out data. Raises UserError."""

    def __init__(self, path, device=None, spec=None, tokenizer=None, problems=20):
        self.path, self.device, self.wanted = Path(path), find_device(device), problems
        self.model, state = load(path, self.device)
        self.model.eval()
        vocab_size, source = self.model.config.vocab_size, state.get("source")
        self.stage, self.step = state.get("stage", "imported"), state.get("step", 0)
        source = source if isinstance(source, dict) else {}  # another program's
        self.spec, self.seed = spec or source.get("spec"), source.get("seed", 0)
        if type(self.step) is not int or type(self.seed) is not int:
            raise UserError(f"{path}: its step is {self.step!r}, its seed {self.seed!r}")
        if not isinstance(self.spec, str):
            raise UserError(f"{path} does not say what it was trained on: name --data")
        known = source.get("tokenizer") or ("gpt2" if 50257 <= vocab_size < 50514 else None)
        self.data = make_data(self.spec, self.seed, self.model.config.block_size,
                              tokenizer or known or default_tokenizer(self.spec))
        padded = 256 if self.data.kind == "text" else 1  # some pad their vocabulary
        if not self.data.vocab_size <= vocab_size < self.data.vocab_size + padded:
            raise UserError(f"{self.spec} has {self.data.vocab_size} tokens, {path} {vocab_size}")
        # The name and parameters of a single rule or task; None for text, mixtures, the shuffled.
        self.name, self.p = None, {}
        if self.data.kind != "text":
            shuffled, members = parse_spec(self.spec)
            if len(members) == 1 and not shuffled:
                _, self.name, self.p = members[0]
        self.brackets = self.name in ("dyck", "dyck_shuffle")
        if self.brackets and self.p["length"][0] < self.p["length"][1]:
            self.name, self.brackets = None, False  # where a row ends, nobody can know
        self.n = max(16, min(256, 2 ** 15 // self.model.config.block_size))  # rows to look at

    def rows(self, n=None):
        """Held-out rows x, y: int64 arrays (n, block_size)."""
        n = n or self.n
        if self.data.kind == "text":
            n = min(n, len(self.data.val))
        return [each.numpy() for each in self.data.val.__getitems__(range(n))]

    def real(self, x):
        """bool (n, T): the places before the pads that fill a row up."""
        if self.data.kind == "text":
            return np.ones(x.shape, bool)
        return (x != self.data.train.pad)[:, ::-1].cumsum(1)[:, ::-1] > 0

    @torch.no_grad()
    def logits(self, x):
        """(n, T) -> (some rows, T, vocab_size), 16 rows at a time."""
        for part in torch.from_numpy(x).split(16):
            yield self.model(part.to(self.device)).float().cpu()

    def predict(self, x, y):
        """At each place the loss in nats, 0 where y is -1, and whether the likeliest is right."""
        losses, hits = [], []
        for logits, wanted in zip(self.logits(x), torch.from_numpy(y).split(16)):
            losses.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none",
                                          ignore_index=-1))
            hits.append(logits.argmax(-1) == wanted)
        return torch.cat(losses).numpy(), torch.cat(hits).numpy()

    @torch.no_grad()
    def attention(self, x):
        """What the heads attend to: (n, n_layer, n_head, T, T)"""
        with attention_maps(self.model) as maps:
            self.model.states(torch.from_numpy(x).to(self.device))
        return torch.stack(maps, 1).cpu().numpy()

    @torch.no_grad()
    def residual(self, x, model=None):
        """What goes into the first block and comes out of each: (n, n_layer + 1, T, n_embd)"""
        model, streams = model or self.model, []
        hooks = [model.h[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))]
        for block in model.h:
            hooks.append(block.register_forward_hook(lambda _, args, out: streams.append(out)))
        model.states(torch.from_numpy(x).to(self.device))
        for hook in hooks:
            hook.remove()
        return torch.stack(streams, 1).float().cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Probes of its answers


def probe_loss(c):
    """loss, accuracy, and what else says it in one number"""
    rows = held_out_rows(c.data, max(16, 2 ** 18 // c.data.block_size))
    result = evaluate(c.model, rows, c.device, tokenizer=c.data.tokenizer)
    table = {"loss (nats per counted token)": (result["loss"], "{:.4f}"),
             "accuracy, counted tokens": (result["accuracy"], "{:.2%}")}
    if c.data.kind == "text":
        table["perplexity"] = perplexity(result["loss"]), "{:.2f}"
    if result["bits_per_byte"]:
        table["bits per byte"] = result["bits_per_byte"], "{:.4f}"
    if c.data.kind != "text" and not c.brackets:
        table["exact, whole answers"] = result["exact"], "{:.2%}"
    return Finding(table, n=f"{result['tokens']:,} counted tokens")


LEARNED = 0.1  # nats above the smallest possible loss, and share of what the blind are above it


def probe_learned(c):
    """was it learned at all? The loss beside the smallest possible one

    That is 0 where the prompt decides the answer, and what the generator knows of brackets. The
    blind know how often each token comes, and nothing else."""
    if c.name is None:
        return None
    x, y = c.rows()
    loss, floor = c.predict(x, y)[0].sum() / (y != -1).sum(), 0.0
    if c.brackets:
        facts, rows = bracket_rows(c, x)
        came = [np.take_along_axis(fact["odds"], np.array(row)[:, None], 1)[1:]
                for fact, row in zip(facts, rows)]
        floor = -np.log(came).mean()
    share = np.bincount(y[y != -1]) / (y != -1).sum()
    blind = -(share * np.log(np.maximum(share, 1e-30))).sum()
    learned = loss - floor < LEARNED * min(1, blind - floor)
    return Finding({"loss (nats per counted token)": (loss, "{:.4f}"),
                    "smallest possible": (floor, "{:.4f}"), "above it": (loss - floor, "{:.4f}"),
                    "above it, the blind": (blind - floor, "{:.4f}"),
                    "verdict": ("learned" if learned else "not learned", "{}")},
                   n=f"{len(x):,} rows")


def probe_answers(c):
    """accuracy by the place of a token in its answer"""
    if c.name is None or c.brackets:
        return None
    x, y = c.rows(1024)
    counted, hit = y != -1, c.predict(x, y)[1]
    place = counted.cumsum(1)[counted] - 1
    right = np.bincount(place, hit[counted]) / np.bincount(place)
    table = {"all tokens": (hit[counted].mean(), "{:.1%}"),
             "whole answers": ((hit | ~counted).all(1).mean(), "{:.1%}")}
    for i in np.unique(np.linspace(0, len(right) - 1, 12).round().astype(int)):
        table[f"token {i + 1} of the answer"] = right[i], "{:.1%}"
    curve = {"accuracy": (np.arange(1, len(right) + 1), right)}
    return Finding(table, [lines("accuracy by place", "token of the answer", "accuracy", curve)],
                   f"{len(x):,} answers")


def probe_length(c):
    """shorter and longer problems than it was trained on, as far as its positions go"""
    key = next((key for key in ("digits", "numbers", "length") if key in c.p), None)
    if not key or c.brackets or c.name == "eca":
        return None
    low, high = c.p[key] if key == "length" else (c.p[key], c.p[key])
    sizes = {1, 2, 3, 4, low, high, *np.geomspace(5, 4 * high + 1, 8).astype(int).tolist()}
    others = "".join(f",{name}={value}" for name, value in c.p.items() if name != key)
    found = {}
    for size in sorted(sizes):
        with contextlib.suppress(UserError):  # too long, or too few examples to hold some out
            data = make_data(f"{c.name}:{key}={size}{others}", c.seed, c.model.config.block_size)
            x, y = (each.numpy() for each in data.val.__getitems__(range(128)))
            found[size] = (c.predict(x, y)[1] | (y == -1)).all(1).mean()
    table = {f"{key}={size}" + " (its own)" * (low <= size <= high): (share, "{:.1%}")
             for size, share in found.items()}
    curve = {"right": (list(found), list(found.values()))}
    return Finding(table, [lines("length generalisation", key, "whole answers right", curve)],
                   "128 answers each")


def probe_errors(c):
    """where it fails: sums by their longest chain of carries, haystacks by size and depth"""
    if c.name == "haystack":
        return haystack_errors(c)
    if c.name not in ("addition", "reversed_addition"):
        return None
    x, y = c.rows(4000)
    right, d = (c.predict(x, y)[1] | (y == -1)).all(1), c.p["digits"]
    a, b = x[:, :d], x[:, d + 1:2 * d + 1]
    carry = run = longest = np.zeros(len(a), int)
    for i in range(d) if c.name == "reversed_addition" else reversed(range(d)):
        carry = (a[:, i] + b[:, i] + carry) // 10
        run = (run + 1) * carry
        longest = np.maximum(longest, run)
    there = np.unique(longest)
    shares = [right[longest == i].mean() for i in there]
    table = {f"longest chain of carries {i} (n={(longest == i).sum()})": (share, "{:.1%}")
             for i, share in zip(there, shares)}
    return Finding(table, [lines("sums by carries", "longest chain of carries", "sums right",
                                 {"right": (there, shares)})], f"{len(x):,} sums")


def haystack_errors(c):
    x, y = c.rows(4000)
    right, asked = (c.predict(x, y)[1] | (y == -1)).all(1), (y != -1).argmax(1)
    pairs, key = asked // 2, x[np.arange(len(x)), asked] - c.p["pairs"]
    depth = (x == key[:, None]).argmax(1) // 2 / np.maximum(pairs - 1, 1)
    fifth = np.minimum(depth * 5, 4).astype(int)
    groups = [f"{5 * i + 1}-{5 * i + 5}" for i in range(-(-c.p["pairs"] // 5))]
    share = np.full((len(groups), 5), math.nan)
    table = {}
    for i, group in enumerate(groups):
        inside = (pairs - 1) // 5 == i
        table[f"{group} pairs"] = right[inside].mean() if inside.any() else math.nan, "{:.1%}"
        for j in np.unique(fifth[inside]):
            share[i, j] = right[inside & (fifth == j)].mean()
    depths = ["0-20", "20-40", "40-60", "60-80", "80-100"]
    return Finding(table, [heat("needle found", "depth of the needle (%)", "pairs", share, depths,
                                groups)], f"{len(x):,} haystacks")


def bracket_facts(row, name, p):
    """What the generator of dyck or dyck_shuffle knows of a row, a list of tokens, at each place.

    odds: of each token that may come, (T, 2k); partner: where the bracket that is closed was
    opened, or -1; depth: how many are open before; innermost: the last type open after, or -1."""
    k, left, odds = p["k"], [], np.zeros((len(row), 2 * p["k"]))
    partner, depth, innermost = [], [], []
    for t, token in enumerate(row):
        kinds = [kind for kind, _ in left]
        full = len(left) == (len(row) - t if name == "dyck" else p["depth"])
        opens = 1.0 if not left else 0.0 if full else p["p"]
        may_close = kinds[-1:] if name == "dyck" else sorted(set(kinds))
        odds[t, :k] = opens / k
        odds[t, [k + kind for kind in may_close]] = (1 - opens) / max(1, len(may_close))
        depth.append(len(left))
        partner.append(-1)
        if token < k:
            left.append((token, t))
        elif token - k in kinds:
            _, partner[t] = left.pop(len(left) - 1 - kinds[::-1].index(token - k))
        innermost.append(left[-1][0] if left else -1)
    return {"odds": odds, "partner": np.array(partner), "depth": np.array(depth),
            "innermost": np.array(innermost)}


def bracket_rows(c, x):
    """The facts of each row, and the rows as lists without what pads them."""
    length = c.p["length"][1] // 2 * 2 if c.name == "dyck" else c.p["length"][1]
    rows = x[:, :length].tolist()
    return [bracket_facts(row, c.name, c.p) for row in rows], rows


def probe_brackets(c):
    """does it close what is open? The likeliest closing type where a bracket closes

    By depth, and by the distance to the bracket that is closed. And what illegal tokens get."""
    if not c.brackets:
        return None
    x, k = c.rows()[0], c.p["k"]
    facts, _ = bracket_rows(c, x)
    odds, partner, depth = (np.stack([fact[key] for fact in facts])[:, 1:]
                            for key in ("odds", "partner", "depth"))
    predicted = torch.cat([logits.softmax(-1) for logits in c.logits(x)]).numpy()
    predicted = predicted[:, :odds.shape[1], :2 * k]
    likeliest = predicted[:, :, k:].argmax(-1)[:, :, None]
    right, closes = np.take_along_axis(odds[:, :, k:], likeliest, 2)[:, :, 0] > 0, partner >= 0
    chance = (odds[:, :, k:] > 0).sum(-1)[closes].mean() / k
    table = {"closing bracket of a right type": (right[closes].mean(), "{:.1%}"),
             "by chance": (chance, "{:.1%}"),
             "probability of illegal tokens": ((predicted * (odds == 0)).sum(-1).mean(), "{:.2%}")}
    panels, distance = [], np.arange(1, partner.shape[1] + 1) - partner
    for what, values in (("depth", depth[closes]), ("distance", distance[closes])):
        bins = np.log2(np.maximum(values, 1)).astype(int)  # 1, 2-3, 4-7, ...
        shares = {f"{2 ** i}-{2 ** (i + 1) - 1}" if i else "1": right[closes][bins == i].mean()
                  for i in np.unique(bins)}
        table |= {f"right type at {what} {name}": (share, "{:.1%}")
                  for name, share in shares.items()}
        panels.append(lines("closing brackets", what, "of a right type", {
            "right": (list(shares), list(shares.values())),
            "by chance": (list(shares), [chance] * len(shares))}))
    return Finding(table, panels, f"{closes.sum():,} closings")


def probe_context(c):
    """does more context help? The loss by how many tokens came before"""
    if c.data.kind != "text":
        return None
    x, y = c.rows()
    loss = np.ma.array(c.predict(x, y)[0], mask=y == -1)
    edges = [0] + [2 ** i for i in range(20) if 2 ** i < x.shape[1]] + [x.shape[1]]
    means = {b: float(loss[:, a:b].mean()) for a, b in zip(edges, edges[1:])}
    table = {f"up to {b} tokens before": (value, "{:.3f}") for b, value in means.items()}
    return Finding(table, [lines("loss by place", "tokens of context", "loss (nats per token)", {
        "loss": (list(means), list(means.values()))})], f"{len(x):,} windows")


def probe_needle(c):
    """a line with a number, hidden in text of the corpus, and asked for at its end"""
    if c.data.kind != "text" or not c.data.tokenizer.encode:
        return None
    encode, rng = c.data.tokenizer.encode, np.random.default_rng(c.seed)
    depths = 0, 25, 50, 75, 100
    found = np.zeros((16, len(depths)))
    for i, row in enumerate(c.rows(16)[0]):
        secret = str(rng.integers(1000, 10000))
        asked = "\nThe secret number is"
        hidden, asked, answer = encode(f"{asked} {secret}.\n"), encode(asked), encode(f" {secret}")
        room = len(row) - len(hidden) - len(asked) - len(answer)
        if room < 1:
            return None
        for j, depth in enumerate(depths):
            cut = room * depth // 100
            tokens = np.concatenate([row[:cut], hidden, row[cut:room], asked, answer]).astype(int)
            hit = c.predict(tokens[None, :-1], tokens[None, 1:])[1]
            found[i, j] = hit[0, -len(answer):].all()
    table = {f"found at a depth of {depth} %": (share, "{:.1%}")
             for depth, share in zip(depths, found.mean(0))}
    return Finding(table, [lines("number found", "depth of the line (%)", "share", {
        "found": (depths, found.mean(0))})], f"{len(found)} texts")


def repeated(c, length, n):
    """Random tokens of the held-out rows, twice: int64 (n, length)."""
    x, rng = c.rows()[0], np.random.default_rng(c.seed)
    once = rng.choice(np.unique(x[c.real(x)]), (n, length // 2))
    return np.concatenate([once, once], axis=1)


def probe_copying(c):
    """induction: random tokens, then the same again. Is the second copy easier?"""
    if c.model.config.block_size < 8:
        return None
    tokens = repeated(c, c.model.config.block_size, c.n)
    half = tokens.shape[1] // 2
    loss, hit = c.predict(tokens[:, :-1].copy(), tokens[:, 1:].copy())
    table = {"loss on the first copy (nats)": (loss[:, :half - 1].mean(), "{:.3f}"),
             "loss on the second copy (nats)": (loss[:, half:].mean(), "{:.3f}"),
             "second copy right": (hit[:, half:].mean(), "{:.1%}")}
    curve = {"loss": (np.arange(2, 2 * half + 1), loss.mean(0))}
    return Finding(table, [lines("repeated random tokens", "token", "loss (nats)", curve)],
                   f"{len(tokens):,} rows of 2 x {half}")


def probe_problems(c):
    """DeepMind-Math: problems solved exactly, by greedy answers, by module and split"""
    if not hasattr(c.data.val, "problems") or not c.wanted:
        return None
    rates = {}
    for module, problems in sorted(c.data.val.problems(c.wanted).items()):
        solved = []
        for asked, answer in problems:
            prompt = torch.from_numpy(asked)[None].to(c.device)
            out = c.model.generate(prompt, len(answer), temperature=0, stop=PROBLEM)
            solved.append(out[0, len(asked):].tolist() == answer.tolist())
        rates[module] = np.mean(solved)
    table = {f"{split}, all modules": (np.mean([rates[m] for m in rates if m.startswith(split)]),
                                       "{:.1%}") for split in ("interpolate", "extrapolate")}
    table |= {module: (rate, "{:.1%}") for module, rate in rates.items()}
    return Finding(table, n=f"{c.wanted} problems of each module")


# --------------------------------------------------------------------------------------------------
# Probes of its parts


def entropy_of_heads(attention, real):
    """How blurred each head is, (n_layer, n_head): the entropy of what it attends to, as a share of
    the most that a place allows. 0: one token; 1: all alike. real: bool (n, T)."""
    entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(-1)[..., 1:]
    entropy = entropy / np.log(np.arange(2, attention.shape[-1] + 1))
    return np.einsum("nlht,nt->lh", entropy, real[:, 1:]) / real[:, 1:].sum()


def looks(c, x, attention):
    """What a head may look at: {name: (attention, the places wanted (n, T, T), tokens)}."""
    n, T = x.shape
    found = {"previous token": (attention, np.eye(T, k=-1, dtype=bool) & c.real(x)[:, :, None], x)}
    if T >= 8:
        twice = repeated(c, min(T, 64), n)
        t = np.arange(twice.shape[1])
        after_match = np.pad(twice[:, :, None] == twice[:, None, :-1], ((0, 0), (0, 0), (1, 0)))
        wanted = after_match & (t <= t[:, None]) & (t[:, None] >= len(t) // 2)
        found["induction"] = c.attention(twice), wanted, twice
    if c.brackets:
        facts, rows = bracket_rows(c, x)
        size = len(rows[0])
        for name, ahead in (("matching bracket", 0), ("bracket that closes next", 1)):
            wanted = np.zeros((n, size, size), bool)
            for i, fact in enumerate(facts):
                closing = np.flatnonzero(fact["partner"] >= 0)
                wanted[i, closing - ahead, fact["partner"][closing]] = True
            found[name] = attention[..., :size, :size], wanted, x
    return found


def probe_heads(c):
    """what the attention heads do: how blurred they are, and how much they look at some places

    At the token before; at what followed the same token in the first of two copies; and at the
    bracket that is closed, or closes next. The figure shows the strongest head of each kind."""
    T = min(256, c.model.config.block_size)  # of longer contexts, the beginning
    few = max(4, min(32, 2 ** 26 // (c.model.config.n_layer * c.model.config.n_head * T * T)))
    x = c.rows(few)[0][:, :T]
    attention = c.attention(x)
    blur = entropy_of_heads(attention, c.real(x))
    table = {"entropy, sharpest head": (blur.min(), "{:.3f}"),
             "entropy, mean of heads": (blur.mean(), "{:.3f}")}
    panels = [heat("entropy", "head", "layer", blur)]
    for name, (maps, wanted, tokens) in looks(c, x, attention).items():
        asks = wanted.any(2).sum()
        score = np.einsum("nlhqk,nqk->lh", maps, wanted.astype(np.float32)) / asks
        layer, head = np.unravel_index(score.argmax(), score.shape)
        alike = (wanted.sum(2) / np.arange(1, wanted.shape[1] + 1)).sum() / asks
        table |= {f"{name}, strongest head": (score.max(), "{:.3f}"),
                  f"{name}, which (layer.head)": (f"{layer}.{head}", "{}"),
                  f"{name}, if all were attended to alike": (alike, "{:.3f}")}
        words = c.data.words(tokens[0][:20])
        panels += [heat(name, "head", "layer", score),
                   heat(f"head {layer}.{head}: {name}", "attended to", "from",
                        maps[0, layer, head, :20, :20], words, words)]
    return Finding(table, panels, f"{len(x)} rows")


def linear_fit(features, labels, train):
    """How well a linear map of features (n, d) gives held-out labels (n,): least squares with a
    small ridge, classes weighted alike; the mean over classes of the share that is right."""
    classes, target, counts = np.unique(labels, return_inverse=True, return_counts=True)
    mean, spread = features[train].mean(0), features[train].std(0) + 1e-6
    z = np.concatenate([(features - mean) / spread, np.ones((len(features), 1))], axis=1)
    weighted = z[train] * (len(labels) / len(classes) / counts[target[train]])[:, None]
    a = weighted.T @ z[train] + 1e-3 * train.sum() * np.eye(z.shape[1])
    fit = np.linalg.solve(a, weighted.T @ np.eye(len(classes))[target[train]])
    right = (z[~train] @ fit).argmax(1) == target[~train]
    return float(np.mean([right[target[~train] == i].mean() for i in np.unique(target[~train])]))


def rule_states(c, x):
    """What the state of a rule is at each place: {name: int (n, T), -1 where there is none}."""
    if c.brackets:
        facts, _ = bracket_rows(c, x)
        depth = np.stack([fact["depth"] for fact in facts])[:, 1:]  # after each token
        return {"bracket depth (9: or more)": np.minimum(depth, 9),
                "innermost open bracket": np.stack([fact["innermost"] for fact in facts])}
    if c.name not in RULES or c.name == "eca":
        return {}
    inside = (x >= c.data.train.first_bar).cumsum(1) == 0  # before the first separator
    if c.name == "stack":
        top = np.full(x.shape, -1)
        for i, row in enumerate(x.tolist()):
            left = []
            for t in np.flatnonzero(inside[i]):
                left.append(row[t]) if row[t] else left.pop()
                top[i, t] = left[-1] if left else -1
        return {"top of the stack": top}
    before = (x[:, :, None] == x[:, None, :]) & np.tri(x.shape[1], k=-1, dtype=bool)
    return {"seen before (set membership)": np.where(inside, before.any(2), -1)}


def probe_linear(c):
    """what a linear map can read of the rule's state in the residual stream, layer by layer

    Beside it stand an untrained model, and a control task: random labels for each pair of a token
    and the one before it (after Hewitt and Liang, arXiv 1909.03368)."""
    x = c.rows(min(c.n, max(8, 2 ** 13 // c.model.config.block_size)))[0]
    states, rng = rule_states(c, x), np.random.default_rng(c.seed)
    if not states:
        return None
    torch.manual_seed(c.seed)
    trained, untrained = c.residual(x), c.residual(x, GPT(c.model.config).to(c.device).eval())
    table, panels = {}, []
    for name, state in states.items():
        T, where = state.shape[1], state >= 0
        train = np.broadcast_to(np.arange(len(x))[:, None] % 2 == 0, where.shape)[where]  # by row
        pairs = np.pad(x, ((0, 0), (1, 0)))[:, :T] * 2 ** 20 + x[:, :T]
        pairs = np.unique(pairs[where], return_inverse=True)[1]
        labels = state[where]
        random = rng.choice(np.unique(labels), pairs.max() + 1)[pairs]
        curves = {}
        for label, stream, wanted in (("trained", trained, labels),
                                      ("untrained", untrained, labels),
                                      ("control task", trained, random)):
            layers = range(stream.shape[1])
            curves[label] = layers, [linear_fit(stream[:, layer, :T][where], wanted, train)
                                     for layer in layers]
        table[f"{name}: chance"] = 1 / len(np.unique(labels)), "{:.1%}"
        for layer in layers:
            for label, (_, values) in curves.items():
                table[f"{name}, {layer} layers passed, {label}"] = values[layer], "{:.1%}"
        panels.append(lines(name, "layers passed", "read right (mean over labels)", curves))
    return Finding(table, panels, f"{len(x)} rows, half of them for fitting")


PROBES = {probe.__name__.removeprefix("probe_"): probe for probe in (
    probe_loss, probe_learned, probe_answers, probe_length, probe_errors, probe_brackets,
    probe_context, probe_needle, probe_copying, probe_problems, probe_heads, probe_linear)}


# --------------------------------------------------------------------------------------------------
# Tables, figures, samples


def print_table(name, findings):
    """A row for each label, a column for each checkpoint."""
    found = [finding for finding in findings if finding]
    labels = dict.fromkeys(label for finding in found for label in finding.table)
    wide = max(map(len, labels)) + 2
    print(f"\n{name}: {PROBES[name].__doc__.splitlines()[0]} ({found[0].n})")
    if len(findings) > 1:
        print(" " * wide + "".join(f"{f'[{i + 1}]':>12}" for i in range(len(findings))))
    for label in labels:
        cells = [finding.table.get(label) if finding else None for finding in findings]
        texts = [cell[1].format(cell[0]) if cell else "-" for cell in cells]
        print(f"{label:{wide}}" + "".join(f"{text:>12}" for text in texts))


def pyplot():
    """matplotlib's, with one style for all figures: to be read from the last row, by anybody."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = "0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000 999999"  # Okabe and Ito's
    plt.rcParams.update({
        "font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
        "axes.spines.right": False, "savefig.dpi": 150, "figure.constrained_layout.use": True,
        "axes.prop_cycle": plt.cycler(color=[f"#{colour}" for colour in colours.split()])})
    return plt


def keep_figure(figure, path):
    """Writes a figure whole, or leaves the old one. Raises UserError."""
    try:
        with written_whole(path) as file:
            figure.savefig(file, format="png")
    finally:
        pyplot().close(figure)
    print(f"figure: {path}")


def draw(opened, findings, path):
    """The panels of a probe, a line of them for each checkpoint."""
    drawn = [(c, finding) for c, finding in zip(opened, findings) if finding and finding.panels]
    columns = min(4, max(len(finding.panels) for _, finding in drawn))
    deep = [-(-len(finding.panels) // columns) for _, finding in drawn]
    figure = pyplot().figure(figsize=(max(6, 4.5 * columns), 4.2 * sum(deep)))
    parts = np.atleast_1d(figure.subfigures(len(drawn), 1, height_ratios=deep))
    for part, rows, (c, finding) in zip(parts, deep, drawn):
        part.supxlabel(f"{c.path}: n = {finding.n}, seed {c.seed}", fontsize=9)
        axes = part.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(finding.panels):]:
            axis.axis("off")
        for axis, panel in zip(axes, finding.panels):
            axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"])
            for label, (xs, ys) in panel.get("curves", {}).items():
                axis.plot(xs, ys, marker="o" if len(xs) < 40 else None, label=label)
            if len(panel.get("curves", ())) > 1:
                axis.legend(fontsize=10)
            if "matrix" in panel:
                draw_matrix(figure, axis, panel)
    keep_figure(figure, path)


def draw_matrix(figure, axis, panel):
    matrix = np.array(panel["matrix"], float)
    axis.grid(False)
    image = axis.imshow(matrix, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axis, shrink=0.8)
    for put, ticks in ((axis.set_xticks, panel["xticks"]), (axis.set_yticks, panel["yticks"])):
        words = [str(tick).replace("$", r"\$") for tick in ticks]
        put(range(len(words)), words, fontsize=7 if len(words) > 8 else 10)
    for (row, column), value in np.ndenumerate(matrix) if matrix.size <= 64 else ():
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9,
                  color="white" if value > 0.6 else "black")


def add_to_json(c, findings):
    """Puts what was found into eval.json beside the checkpoint. Raises UserError."""
    path = (c.path if c.path.is_dir() else c.path.parent) / "eval.json"
    there = read_json(path) if path.exists() else {}
    entry = there
    for key in (c.path.name, c.spec):
        entry = entry.setdefault(key, {})
        if not isinstance(entry, dict):
            raise UserError(f"{path} is not as eval.py writes it: put it elsewhere")
    for name, finding in findings.items():
        values = {label: value if value == value else None  # nan is no JSON
                  for label, (value, _) in finding.table.items()}
        entry[name] = {"table": values, "n": finding.n, "panels": finding.panels, "step": c.step}
    write_json(path, json.loads(json.dumps(there, default=float)))


def print_sample(c, i, prompt, length, temperature, top_k):
    """Goes on from one's own prompt or from held-out row i; where an answer is right or wrong, the
    likeliest one."""
    x, y = (each.numpy() for each in c.data.val[i])
    counted = np.flatnonzero(y != -1)
    free = prompt is not None or c.data.kind == "text" or counted[0] == 0
    begin = x[:min(64, len(x) // 2)] if free else x[:counted[0] + 1]
    if prompt is not None:
        begin = np.array(c.data.read(prompt))
    generator = torch.Generator(c.device).manual_seed(c.seed + i)
    tokens = torch.from_numpy(begin)[None].to(c.device)
    if free:
        out = c.model.generate(tokens, length, temperature, top_k, generator)[0].tolist()
        print(f"{'-' * 80}\n{c.data.write(begin)} ▶ {c.data.write(out[len(begin):])}")
        return
    out, wanted = c.model.generate(tokens, len(counted), 0)[0].tolist(), y[counted].tolist()
    verdict = "right" if out[len(begin):] == wanted else f"wrong: {c.data.write(wanted)}"
    print(f"{c.data.write(out, [t >= len(begin) for t in range(len(out))])}   {verdict}")


def main():
    parser = Parser(description="What checkpoints know, and where, on held-out data.")
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt or warmup.pt, a run's folder, another's model")
    add("--probe", metavar="NAMES", help=f"some of {', '.join(PROBES)} (default: all that fit)")
    add("--plot", action="store_true", help="also draw eval-NAME-PROBE.png beside the checkpoint")
    add("--data", help="other data than it was trained on")
    add("--tokenizer", help="of that data")
    add("--sample", type=number(0, 1e4), default=0, metavar="N", help="N samples, or answers")
    add("--prompt", help="go on from these words, and ask no probe")
    add("--tokens", type=number(1, 1e6), default=200, help="of a sample (default 200)")
    add("--temperature", type=number(0, kind=float), default=0.8, help="of a sample (default 0.8)")
    add("--top_k", type=number(0, 1e6), default=0, help="of a sample; 0 is no limit, the default")
    add("--problems", type=number(0, 1e6), default=20, help="of each module of deepmind_math")
    add("--device", help="cuda, mps or cpu")
    args = parser.parse_args()
    names = args.probe.split(",") if args.probe else list(PROBES)
    for name in names:
        if name not in PROBES:
            raise UserError(f"unknown probe {name!r}: there are {', '.join(PROBES)}")
    opened = [Opened(path, args.device, args.data, args.tokenizer, args.problems)
              for path in args.checkpoints]
    for i, c in enumerate(opened):
        n = sum(p.numel() for p in c.model.parameters())
        print(f"[{i + 1}] {c.path}: {c.stage} step {c.step:,}, {n:,} parameters, held-out {c.spec}")
        for row in range(max(args.sample, args.prompt is not None)):
            print_sample(c, row, args.prompt, args.tokens, args.temperature, args.top_k)
    found = [{} for _ in opened]
    for name in names if args.prompt is None else ():
        findings = [PROBES[name](c) for c in opened]
        if not any(findings):
            if args.probe:
                raise UserError(f"the probe {name} does not fit {opened[0].spec}")
            continue
        print_table(name, findings)
        for each, finding in zip(found, findings):
            each |= {name: finding} if finding else {}
        if args.plot and any(finding and finding.panels for finding in findings):
            path = opened[0].path
            folder = path if path.is_dir() else path.parent
            draw(opened, findings, folder / f"eval-{path.stem}-{name}.png")
    for c, findings in zip(opened, found):
        if findings:
            add_to_json(c, findings)


if __name__ == "__main__":
    run_main(main)
