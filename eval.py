"""What a checkpoint knows, and where: probes of its answers, its attention heads and its residual stream.

    python eval.py out/code-dyck-s0/ckpt.pt                  every probe that fits it, on held-out data of its own kind
    python eval.py out/*/warmup.pt --probe learned           was the warm-up learned at all? Several side by side
    python eval.py A/ckpt.pt B/ckpt.pt --plot                and as figures
    python eval.py out/code-dyck-s0/ckpt.pt --data docs      on other data
    python eval.py out/haystack-none-s0/ckpt.pt --sample 3   solved examples (text: samples)

A probe is a function of an opened checkpoint that returns a Finding: the rows of a table, and panels to draw. What was
found is added to eval.json beside the checkpoint.
"""
import contextlib
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (Parser, UserError, bracket_process, bracket_structure, default_tokenizer, kind_of, load_tokenizer,
                  make_source, parse_member, parse_rules, run_main, RULES, TASKS)
from model import GPT, MOST_LOGITS, load, write_atomically


def find_device(name=None):
    """The accelerator if there is one: CUDA, then Apple's MPS, then the CPU. Raises UserError if `name` is not here."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", name):
        raise UserError(f"unknown device {name!r}: there are cuda, mps and cpu")
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    kind, _, number = name.partition(":")
    if int(number or 0) >= there[kind]:
        raise UserError(f"--device {name} was asked for, but torch sees {there[kind]} devices of this kind here; "
                        f"leave it out to use {find_device()}")
    return name


@torch.no_grad()
def evaluate(model, source, batch_size, batches, device="cpu", autocast=contextlib.nullcontext):
    """Over the first `batches` batches of a source (fewer if it has fewer rows), in evaluation mode.

    Returns loss (nats per counted token), accuracy (share of counted tokens whose likeliest prediction is right), exact
    (share of answers, unbroken runs of counted tokens, that are right throughout), bits_per_byte (text whose vocabulary
    is known, else None), tokens."""
    training = model.training
    model.eval()
    n = batch_size * batches if source.rows is None else min(batch_size * batches, source.rows)
    loss = right = answers = exact = tokens = text_bytes = 0
    for index in range(-(-n // batch_size)):
        x, y = (torch.from_numpy(a[:n - index * batch_size]).to(device) for a in source.batch(index, batch_size))
        where = y != -1
        wanted, hits = y[where], []
        with autocast():
            hidden = model.states(x, where)
            for h, w in zip(*(z.split(MOST_LOGITS // model.config.vocab_size + 1) for z in (hidden, wanted))):
                logits = model.lm_head(h).float()  # of some positions at a time: all of them may not fit
                loss += F.cross_entropy(logits, w, reduction="sum").item()
                hits.append(logits.argmax(-1) == w)
        hit = torch.cat(hits)
        starts = where & ~F.pad(where, (1, 0))[:, :-1]  # where an answer begins: a run of counted tokens
        answer = starts.flatten().cumsum(0)[where.flatten()] - 1  # which answer a counted token belongs to
        right, tokens, answers = right + hit.sum().item(), tokens + len(wanted), answers + starts.sum().item()
        exact += (answer.bincount() == answer[hit].bincount(minlength=starts.sum())).sum().item()
        if source.token_bytes is not None:
            text_bytes += int(source.token_bytes[wanted.cpu().numpy()].sum())
    model.train(training)
    return {"loss": loss / tokens, "accuracy": right / tokens, "exact": exact / answers, "tokens": tokens,
            "bits_per_byte": loss / text_bytes / math.log(2) if text_bytes else None}


def perplexity(loss):
    return math.exp(min(loss, 700.0))


def solve(model, problems, device="cpu", batch_size=256):
    """Greedy answers to questions. problems: {part: [(question, answer), ...]} as Problems.problems gives them.

    Returns {part: [(question, wanted, given), ...]}, all int64 arrays; solved exactly means given equals wanted, up to
    and with the token that ends it. Questions of one length share a batch, so none needs padding."""
    every = sorted(((len(q), part, i) for part, found in problems.items() for i, (q, _) in enumerate(found)))
    result = {part: [None] * len(found) for part, found in problems.items()}
    for _, alike in itertools.groupby(every, key=lambda entry: entry[0]):
        while batch := list(itertools.islice(alike, batch_size)):
            questions, wanted = zip(*(problems[part][i] for _, part, i in batch))
            prompt = torch.from_numpy(np.stack(questions)).to(device)
            given = model.generate(prompt, max(map(len, wanted)), 0.0, stop=wanted[0][-1].item())[:, prompt.shape[1]:]
            for (_, part, i), question, answer, tokens in zip(batch, questions, wanted, given.cpu().numpy()):
                result[part][i] = question, answer, tokens[:len(answer)]
    return result


# ----------------------------------------------------------------------------------------------------------------------
# An opened checkpoint, and what its model does on some rows


@dataclass
class Finding:
    """What a probe found in one checkpoint."""
    rows: dict  # {label: (value, format)}: the table, with one column per checkpoint
    panels: list = field(default_factory=list)  # figures in plain numbers, see `lines` and `heat`
    n: str = ""  # how many of what: for the caption
    note: str = ""  # a line below the table


def lines(title, xlabel, ylabel, curves, mark=None):
    """A panel of curves {name: (xs, ys)}; mark: (low, high) of x to shade, the trained range."""
    return {"kind": "lines", "title": title, "xlabel": xlabel, "ylabel": ylabel, "mark": mark,
            "curves": {name: [np.asarray(values).tolist() for values in curve] for name, curve in curves.items()}}


def heat(title, xlabel, ylabel, matrix, xticks=None, yticks=None):
    """A panel of numbers from 0 to 1 by row and column; nan where there is none."""
    matrix = [[None if math.isnan(value) else round(float(value), 4) for value in row] for row in matrix]
    return {"kind": "heat", "title": title, "xlabel": xlabel, "ylabel": ylabel, "matrix": matrix, "xticks": xticks,
            "yticks": yticks}


class Opened:
    """A checkpoint with its model and held-out data: what a probe gets."""

    def __init__(self, path, args):
        self.path, self.device = path, find_device(args.device)
        self.batch_size, self.batches, self.wanted, self.samples = args.batch_size, args.batches, args.problems, args.sample
        self.model, state = load(path, self.device)
        self.model.eval()
        self.state = {key: state[key] for key in ("stage", "step", "source", "length") if key in state}  # not the optimiser
        if not isinstance(self.state.get("source"), dict):
            self.state["source"] = {}  # not from train.py
        self.spec, self.seed = args.data or self.state["source"].get("spec"), self.state["source"].get("seed", 0)
        if not self.spec:
            raise UserError(f"{path} does not say what it was trained on: name --data, and --tokenizer if needed")
        config, self.tokenizer = self.model.config, args.tokenizer or default_tokenizer(self.spec)
        if not args.tokenizer and self.tokenizer != "characters":
            self.tokenizer = known_tokenizer(config, self.state) or self.tokenizer
        self.source = make_source(self.spec, "val", self.seed, config.block_size, self.tokenizer)
        padded = -(-self.source.vocab_size // 64) * 64  # as nanoGPT pads it
        if self.source.vocab_size > config.vocab_size or (
                args.data and config.vocab_size not in (self.source.vocab_size, padded)):
            raise UserError(f"{self.spec} has a vocabulary of {self.source.vocab_size} tokens, the checkpoint one of "
                            f"{config.vocab_size}")
        # The rule or task: (name, parameters), None for text, for mixtures and for the shuffled control.
        self.kind, self.member, self.members = self.source.kind, None, []
        if self.kind == "task":
            self.member = parse_member(self.spec, TASKS)[:2]
        elif self.kind == "rule":
            shuffled, self.members = parse_rules(self.spec)
            if not shuffled and len(self.members) == 1:
                self.member = self.members[0][1:]
        self.brackets = self.member is not None and self.member[0] in ("dyck", "dyck_shuffle")
        self.n = max(16, min(256, 2 ** 15 // config.block_size))  # rows that a probe looks at, if it is not said there

    def rows(self, n=None):
        return self.source.batch(0, min(n or self.n, self.source.rows or 10 ** 9))

    def real(self, x):
        """bool (n, T): the places before the pads that fill a row up."""
        if self.kind not in ("rule", "task"):
            return np.ones(x.shape, bool)
        if self.member and "length" in self.member[1] and "vocab" not in self.member[1]:  # brackets and cells: no pad
            return np.broadcast_to(np.arange(x.shape[1]) < self.member[1]["length"], x.shape)
        return np.cumsum((x != self.source.pad)[:, ::-1], axis=1)[:, ::-1] > 0

    @torch.no_grad()
    def logits(self, x):
        """int64 (n, T) -> float32 (some rows, T, vocab_size) on the device, as many rows at a time as are not too many."""
        rows = max(1, min(self.batch_size, MOST_LOGITS // x.shape[1] // self.model.config.vocab_size))
        for part in torch.from_numpy(x).split(rows):
            yield self.model(part.to(self.device)).float()

    def predict(self, x, y):
        """(loss, hit) at each place, both (n, T): nats, and whether the likeliest token is right; 0 where y is -1."""
        losses, hits, first = [], [], 0
        for logits in self.logits(x):
            wanted = torch.from_numpy(y[first:first + len(logits)]).to(logits.device)
            losses.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=-1)
                          .view(wanted.shape).cpu())
            hits.append((logits.argmax(-1) == wanted).cpu())
            first += len(logits)
        return torch.cat(losses).numpy(), torch.cat(hits).numpy()

    @torch.no_grad()
    def look_inside(self, x, model=None, attention=True):
        """The attention weights (n, layers, heads, T, T) and the residual stream (n, layers + 1, T, n_embd): what goes
        into the first block, and what comes out of each. Without `attention`, which grows with T squared, None."""
        model, seen, streams = model or self.model, [], []
        hooks = [model.h[0].register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].cpu()))]
        hooks += [block.register_forward_hook(lambda block, inputs, output: streams.append(output.cpu()))
                  for block in model.h]
        weights, residual = [], []
        try:
            for part in torch.from_numpy(x).split(self.batch_size):
                streams.clear()
                for block in model.h:
                    block.attn.weights = True if attention else None
                model.trunk(part.to(self.device))
                if attention:
                    weights.append(torch.stack([block.attn.weights.cpu() for block in model.h], dim=1))
                residual.append(torch.stack(streams, dim=1))
        finally:
            for hook in hooks:
                hook.remove()
            for block in model.h:
                block.attn.weights = None
        return torch.cat(weights).float().numpy() if attention else None, torch.cat(residual).float().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Probes of what it answers


def probe_loss(c):
    """Loss, accuracy and what else says it in one number."""
    few = max(1, 2 ** 18 // (c.batch_size * c.source.block_size))
    result = evaluate(c.model, c.source, c.batch_size, c.batches or few, c.device)
    rows = {"loss (nats per counted token)": (result["loss"], "{:.4f}")}
    if c.kind == "text":
        rows["perplexity"] = (perplexity(result["loss"]), "{:.2f}")
        if result["bits_per_byte"] is not None:
            rows["bits per byte"] = (result["bits_per_byte"], "{:.4f}")
    rows["accuracy, counted tokens"] = (result["accuracy"], "{:.2%}")
    if c.kind != "text" and (c.rows()[1][:, :-1] == -1).any():  # where all tokens count there is no answer
        rows["exact, whole answers"] = (result["exact"], "{:.2%}")
    return Finding(rows, n=f"{result['tokens']:,} counted tokens")


LEARNED = 0.1  # learned (ours): less than this many nats per counted token above what the process itself leaves open,
#                and less than this share of what a model without context, which knows the tokens' frequencies, is above it


def probe_learned(c):
    """Was it learned at all? The loss beside the smallest possible one.

    That is 0 where the input decides the output, and what the generator of brackets knows where it does not."""
    trained_on = c.state["source"].get("spec")
    if c.kind not in ("rule", "task") or not c.member and (
            c.spec.startswith("shuffled:") or any(name in ("dyck", "dyck_shuffle") for _, name, _ in c.members)):
        return None
    x, y = c.rows()
    loss = c.predict(x, y)[0].sum() / (y != -1).sum()
    floor = 0.0
    if c.brackets:
        came = np.take_along_axis(bracket_process(c.member[0], sequences(c, x), **c.member[1]),
                                  sequences(c, x)[:, :, None], axis=2)[:, 1:]
        floor = -np.log(came).mean()
    share = np.bincount(y[y != -1]) / (y != -1).sum()
    blind = -(share * np.log(np.maximum(share, 1e-30))).sum()
    verdict = "learned" if loss - floor < LEARNED * min(1, blind - floor) else "not learned"
    note = f"learned: less than {LEARNED} nats above the smallest possible, and less than {LEARNED:.0%} of where the blind are"
    if c.state.get("length") and trained_on == c.spec:
        note += f"; its curriculum stopped at input length {c.state['length']}"
    return Finding({"loss (nats per counted token)": (loss, "{:.4f}"), "smallest possible on these": (floor, "{:.4f}"),
                    "above it": (loss - floor, "{:.4f}"), "blind: frequencies alone, above it": (blind - floor, "{:.4f}"),
                    "verdict": (verdict, "{}")}, n=f"{len(x):,} rows", note=note)


def sequences(c, x):
    """The brackets of rows, without what pads them."""
    return x[:, :c.member[1]["length"]]


def probe_answers(c):
    """Accuracy by the place of a token in its answer."""
    if c.kind not in ("rule", "task") or c.brackets or c.member is None:
        return None
    x, y = c.rows(1024)
    where, (_, hit) = y != -1, c.predict(x, y)
    place = np.cumsum(where, axis=1)[where] - 1
    right, n = np.bincount(place, hit[where]), np.bincount(place)
    rows = {"all tokens": (hit[where].mean(), "{:.1%}"),
            "whole answers": ((hit | ~where).all(axis=1).mean(), "{:.1%}")}
    shown = np.unique(np.linspace(0, len(n) - 1, 12).round().astype(int))  # twelve places at most, all in the figure
    rows |= {f"token {i + 1} of the answer": (right[i] / n[i], "{:.1%}") for i in shown}
    return Finding(rows, [lines("accuracy by place", "token of the answer", "accuracy",
                                {"accuracy": (np.arange(1, len(n) + 1), right / n)})], f"{len(x):,} answers")


SIZED_BY = {"addition": "digits", "reversed_addition": "digits", "multiplication": "digits", "sorting": "numbers"} | {
    name: "length" for name in ("identity", "reverse", "sort", "set", "union", "delete", "stack")}


def trained_sizes(c):
    """(low, high) of what the checkpoint was trained on, if that was the same rule or task; else None."""
    spec = c.state["source"].get("spec")
    try:
        name, params = parse_member(spec, RULES | TASKS)[:2]
        size = params[SIZED_BY[c.member[0]]]
    except (UserError, AttributeError, KeyError):  # a mixture, a corpus, or not said
        return None
    low, high = size if isinstance(size, tuple) else (size, size)
    if c.state.get("length"):  # a curriculum: from 2 to where it stopped
        low, high = min(2, high), min(high, c.state["length"])
    return (low, high) if name == c.member[0] else None


def probe_length(c):
    """Shorter and longer problems than were trained on, as far as the position table goes."""
    if c.member is None or c.member[0] not in SIZED_BY:
        return None
    (name, params), key, trained = c.member, SIZED_BY[c.member[0]], trained_sizes(c)
    most = 4 * np.max(params[key])
    found = {}
    for size in sorted({*range(1, 5), *np.unique(np.geomspace(5, max(5, most), 8).round().astype(int)).tolist(),
                        *np.atleast_1d(params[key]).tolist(), *(trained or ())}):
        spec = f"{name}:" + ",".join(f"{k}={size if k == key else '-'.join(map(str, v)) if isinstance(v, tuple) else v}"
                                     for k, v in params.items())
        with contextlib.suppress(UserError):  # too short for the rule, or too few examples to hold some out, or too long
            source = make_source(spec, "val", c.seed, c.model.config.block_size)
            x, y = source.batch(0, 128)
            hit = c.predict(x, y)[1]
            found[size] = hit[y != -1].mean(), (hit | (y == -1)).all(axis=1).mean()
    inside = {size: " (trained)" * bool(trained and trained[0] <= size <= trained[1]) for size in found}
    rows = {f"{key}={size}{inside[size]}: whole answers": (whole, "{:.1%}") for size, (_, whole) in found.items()}
    curves = {label: (list(found), [pair[i] for pair in found.values()]) for i, label in enumerate(("tokens", "whole answers"))}
    return Finding(rows, [lines("length generalisation", key, "accuracy", curves, trained)], "128 answers each, of small sizes fewer different ones")


def carry_chain(a, b):
    """The longest run of carries in a sum; a, b: int (n, digits), least significant digit first -> (n,)"""
    carry = run = longest = np.zeros(len(a), int)
    for x, y in zip(a.T, b.T):
        carry = (x + y + carry) // 10
        run = (run + 1) * carry
        longest = np.maximum(longest, run)
    return longest


def probe_errors(c):
    """Where it fails: sums by their longest chain of carries, haystacks by their size and the needle's depth."""
    if c.member is None or c.member[0] not in ("addition", "reversed_addition", "haystack"):
        return None
    (name, params), (x, y) = c.member, c.rows(4000)
    where, (_, hit) = y != -1, c.predict(x, y)
    right = (hit | ~where).all(axis=1)
    if name == "haystack":
        asked = where.argmax(axis=1)  # where the query stands: 2 tokens per pair before it
        pairs, key = asked // 2, x[np.arange(len(x)), asked] - params["pairs"]
        needle = (x == key[:, None]).argmax(axis=1) // 2
        depth = np.where(pairs > 1, needle / np.maximum(pairs - 1, 1), 0.0)
        size = np.minimum((pairs - 1) * 6 // params["pairs"], 5)
        at = size * 5 + np.minimum((depth * 5).astype(int), 4)
        with np.errstate(invalid="ignore"):  # nan where there is none
            share = (np.bincount(at, right, 30) / np.bincount(at, minlength=30)).reshape(6, 5)
        sizes = [np.unique(pairs[size == i]) for i in range(6)]
        edges = ["-".join(map(str, np.unique(s[[0, -1]]))) if len(s) else "none" for s in sizes]
        depths = ["0-20", "20-40", "40-60", "60-80", "80-100"]
        rows = {f"{edge} pairs": (right[size == i].mean(), "{:.1%}") for i, edge in enumerate(edges) if (size == i).any()}
        rows |= {f"needle at {d} % depth": (right[at % 5 == i].mean(), "{:.1%}") for i, d in enumerate(depths)
                 if (at % 5 == i).any()}
        return Finding(rows, [heat("needle found", "depth of the needle (%)", "pairs", share, depths, edges)],
                       f"{len(x):,} haystacks")
    d = params["digits"]
    a, b = x[:, :d], x[:, d + 1:2 * d + 1]
    chain = carry_chain(*((a, b) if name == "reversed_addition" else (a[:, ::-1], b[:, ::-1])))
    present = [i for i in range(d + 1) if (chain == i).any()]
    rows = {f"longest chain of carries {i} (n={(chain == i).sum()})": (right[chain == i].mean(), "{:.1%}") for i in present}
    return Finding(rows, [lines("sums by carries", "longest chain of carries", "share of sums right",
                                {"right": (present, [right[chain == i].mean() for i in present])})], f"{len(x):,} sums")


def by_bin(values, bins, right):
    """{"1", "2-3", "4-7", ...: share right} over bins that double."""
    found = {}
    for low in bins:
        inside = (values >= low) & (values < 2 * low)
        if inside.any():
            found[f"{low}" if low == 1 else f"{low}-{2 * low - 1}"] = right[inside].mean(), inside.sum()
    return found


def probe_brackets(c):
    """Does it close what is open? The likeliest closing type where a bracket closes, by depth and distance.

    And how much probability goes to tokens that cannot come."""
    if not c.brackets:
        return None
    (name, params), x = c.member, c.rows()[0]
    tokens, k = sequences(c, x), c.member[1]["k"]
    process, (partner, level) = bracket_process(name, tokens, **params), bracket_structure(tokens, k)
    illegal, right, first = [], [], 0
    for logits in c.logits(x):
        probability = logits.softmax(-1).double().cpu().numpy()[:, :tokens.shape[1] - 1]
        possible = process[first:first + len(logits)]
        first += len(logits)
        legal = np.pad(possible[:, 1:] > 0, ((0, 0), (0, 0), (0, probability.shape[2] - 2 * k)))
        illegal.append((probability * ~legal).sum(-1))
        closing = probability[:, :, k:2 * k].argmax(-1)
        right.append(np.take_along_axis(legal[:, :, k:], closing[:, :, None], axis=2)[:, :, 0])
    illegal, right, closes = np.concatenate(illegal), np.concatenate(right), partner[:, 1:] >= 0
    distance, depth = (np.arange(tokens.shape[1]) - partner)[:, 1:][closes], level[:, 1:][closes]
    bins = [2 ** i for i in range(16)]
    depths, distances = by_bin(depth, bins, right[closes]), by_bin(distance, bins, right[closes])
    chance = (process[:, 1:, k:] > 0).sum(-1)[closes].mean() / k
    rows = {"closing bracket of a right type": (right[closes].mean(), "{:.1%}"),
            "by chance": (chance, "{:.1%}"), "probability of illegal tokens": (illegal.mean(), "{:.2%}")}
    rows |= {f"right type at depth {label} (n={n:,})": (share, "{:.1%}") for label, (share, n) in depths.items()}
    rows |= {f"right type at distance {label} (n={n:,})": (share, "{:.1%}") for label, (share, n) in distances.items()}
    return Finding(rows, [lines("closing brackets", f"{what} (bins)", "share of right type",
                                {"right": (list(found), [share for share, _ in found.values()]),
                                 "by chance": (list(found), [chance] * len(found))})
                          for what, found in (("depth", depths), ("distance", distances))], f"{closes.sum():,} closings")


def probe_context(c):
    """Does more context help? The loss by how many tokens came before."""
    if c.kind != "text":
        return None
    x, y = c.rows()
    loss, edges = c.predict(x, y)[0], [0] + [2 ** i for i in range(17) if 2 ** i < x.shape[1]] + [x.shape[1]]
    spans = [(a, b, loss[:, a:b].mean()) for a, b in zip(edges, edges[1:])]
    rows = {f"after {a + 1}{f' to {b}' if b > a + 1 else ''} tokens": (value, "{:.3f}") for a, b, value in spans}
    return Finding(rows, [lines("loss by place", "tokens of context", "loss (nats per token)",
                                {"loss": ([b for _, b, _ in spans], [v for _, _, v in spans])})], f"{len(x):,} windows")


NEEDLES = [f"The secret number of {name} is {{}}.\n" for name in ("the river", "the garden", "the tower", "the captain")]


def probe_needle(c):
    """A line with a number, hidden in text of the corpus, and asked for again at the end of the context."""
    if c.kind != "text" or c.source.token_bytes is None or c.tokenizer == "characters":
        return None
    encode, block = load_tokenizer(c.tokenizer).encode_ordinary, c.model.config.block_size
    rng, share, heard, sizes, depths = np.random.default_rng(c.seed), [], [], [], [0, 25, 50, 75, 100]
    filler = c.source.batch(0, 16)[0]
    for size in (block // 4, block // 2, block):
        prompts, answers = [], []
        for row in filler:
            line, number = NEEDLES[rng.integers(len(NEEDLES))], str(rng.integers(1000, 10000))
            hidden, asked = encode("\n" + line.format(number)), encode("\n" + line.partition(" {}")[0])
            answer = encode(" " + number)
            room = size - len(hidden) - len(asked) - len(answer)
            for depth in depths if room > 0 else []:
                cut = room * depth // 100
                prompts.append([*row[:cut], *hidden, *row[cut:room], *asked, *answer])
                answers.append(len(answer))
        if not prompts:
            continue
        x = np.array([tokens[:-1] for tokens in prompts])
        y = np.array([[-1] * (len(t) - 1 - a) + t[-a:] for t, a in zip(prompts, answers)])
        loss, hit = c.predict(x, y)
        sizes.append(size)
        share.append((hit | (y == -1)).all(axis=1).reshape(-1, len(depths)).mean(axis=0))
        heard.append(loss.sum(axis=1).reshape(-1, len(depths)).mean(axis=0) / np.mean(answers))
    if not sizes:
        return None
    rows = {f"found in {size} tokens": (found.mean(), "{:.1%}") for size, found in zip(sizes, share)}
    rows |= {f"loss of the number, {size} tokens (nats per token of it)": (loss.mean(), "{:.3f}") for size, loss in zip(sizes, heard)}
    return Finding(rows, [heat("number found", "depth of the line (%)", "tokens of context", share, depths, sizes)],
                   f"{len(filler)} texts for each cell")


def repeated(c, length):
    """Random tokens of the held-out rows, twice: int64 (n, 2 * half)."""
    rng, x, half = np.random.default_rng(c.seed), c.rows()[0], length // 2
    seen = np.unique(x[c.real(x)])
    once = np.stack([rng.choice(seen, half, replace=len(seen) < half) for _ in range(c.n)])
    return np.concatenate([once, once], axis=1)


def probe_copying(c):
    """Induction: random tokens, then the same again. Is the second copy easier?"""
    if c.model.config.block_size < 8:
        return None
    tokens = repeated(c, c.model.config.block_size)
    half = tokens.shape[1] // 2
    loss, hit = c.predict(tokens[:, :-1].copy(), tokens[:, 1:].copy())
    rows = {"loss on the first copy (nats)": (loss[:, :half - 1].mean(), "{:.3f}"),
            "loss on the second copy (nats)": (loss[:, half:].mean(), "{:.3f}"),
            "second copy right": (hit[:, half:].mean(), "{:.1%}")}
    return Finding(rows, [lines("repeated random tokens", "token", "loss (nats)",
                                {"loss": (np.arange(2, 2 * half + 1), loss.mean(axis=0))})], f"{len(tokens):,} rows of 2 x {half}")


def probe_problems(c):
    """DeepMind-Math: problems solved exactly, by module and split."""
    if c.kind != "problems" or not c.wanted:
        return None
    solved, rows = solve(c.model, c.source.problems(c.wanted), c.device), {}
    rates = {part: np.mean([np.array_equal(wanted, given) for _, wanted, given in answers])
             for part, answers in solved.items() if answers}
    for split in ("interpolate", "extrapolate"):
        found = {part: rate for part, rate in rates.items() if part.startswith(split)}
        rows |= {f"{split}, all modules": (np.mean(list(found.values())), "{:.1%}")} if found else {}
        rows |= {part: (rate, "{:.1%}") for part, rate in sorted(found.items())}
    for answers in list(solved.values())[:c.samples]:
        for question, wanted, given in answers[:1]:
            right = "right" if np.array_equal(wanted, given) else f"wrong: {c.source.decode(wanted).strip()}"
            print(f"{c.source.decode(question)}«{c.source.decode(given).strip()}»   {right}")
    return Finding(rows, n=f"{c.wanted} problems of each module")


# ----------------------------------------------------------------------------------------------------------------------
# Probes of its parts: attention heads and residual stream


def entropy_score(attention, real):
    """Mean entropy of what each head attends with, as a share of the most that its place allows: attention
    (n, layers, heads, T, T), real (n, T) -> (layers, heads); 0: always one token, 1: all alike."""
    entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(-1)[..., 1:] / np.log(
        np.arange(2, attention.shape[-1] + 1))
    return np.einsum("nlht,nt->lh", entropy, real[:, 1:]) / real[:, 1:].sum()


def attended(attention, wanted):
    """Mean attention to the wanted places, (layers, heads), over those that have any: wanted is bool (n, T, T)."""
    asks = wanted.any(axis=2)
    return np.einsum("nlhqk,nqk->lh", attention, wanted.astype(attention.dtype)) / asks.sum()


def previous_token(real):
    """bool (n, T, T), true from each real token to the one before it."""
    return np.eye(real.shape[1], k=-1, dtype=bool) & real[:, :, None]


def induction(tokens):
    """On rows that are the same half twice: from each token of the second half to what followed it earlier."""
    t = tokens.shape[1]
    followed = np.pad(tokens[:, :, None] == tokens[:, None, :-1], ((0, 0), (0, 0), (1, 0)))  # (query, key after a match)
    return followed & np.tri(t, dtype=bool) & (np.arange(t) >= t // 2)[:, None]


def matching_bracket(tokens, k, ahead=0):
    """From each closing bracket to the one it closes; ahead=1: from the token before it, where it is predicted."""
    partner, wanted = bracket_structure(tokens, k)[0], np.zeros((*tokens.shape, tokens.shape[1]), bool)
    rows, queries = np.nonzero(partner >= 0)
    wanted[rows, queries - ahead, partner[rows, queries]] = True
    return wanted


def probe_heads(c):
    """What the attention heads do: 0 to 1 for how blurred they are, and for three things to look at.

    Those are the token before, what followed the same token in the first of two copies, and the bracket that a bracket
    closes (from that one, and from the token before it, where it is predicted). The figure has example maps of the strongest head of each kind."""
    config, t = c.model.config, min(256, c.model.config.block_size)  # of longer contexts, the beginning
    x = c.rows(max(4, min(32, 2 ** 26 // (config.n_layer * config.n_head * t * t))))[0][:, :t]
    attention, real = c.look_inside(x)[0], c.real(x)
    # What to look for: the attention, the places that are wanted, and an example: attention and tokens of one row.
    looks = {"previous token": (attention, previous_token(real), attention[0], x[0])}
    if t >= 8:
        twice, short = repeated(c, t)[:len(x)], repeated(c, min(t, 20))[:1]  # both copies fit into the picture
        looks["induction"] = c.look_inside(twice)[0], induction(twice), c.look_inside(short)[0][0], short[0]
    if c.brackets:
        tokens, k = sequences(c, x), c.member[1]["k"]
        inside = attention[..., :tokens.shape[1], :tokens.shape[1]]
        looks |= {name: (inside, matching_bracket(tokens, k, ahead), inside[0], tokens[0])
                  for name, ahead in (("matching bracket", 0), ("bracket that closes next", 1))}
    scores = {"entropy": entropy_score(attention, real)} | {name: attended(*look[:2]) for name, look in looks.items()}
    rows, panels = {}, []
    for name, score in scores.items():
        best = np.unravel_index((score if name != "entropy" else -score).argmax(), score.shape)
        rows[f"{name}, {'sharpest' if name == 'entropy' else 'strongest'} head"] = (float(score[best]), "{:.3f}")
        rows[f"{name}, which (layer.head)"] = (f"{best[0]}.{best[1]}", "{}")
        panels.append(heat(name, "head", "layer", score))
        if name in looks:
            _, wanted, example, tokens = looks[name]
            size = wanted.shape[1]
            alike = (np.tri(size) / np.arange(1, size + 1)[:, None])[None, None, None]  # attention to all alike
            rows[f"{name}, if all were attended to alike"] = (
                float(attended(np.broadcast_to(alike, (len(wanted), *alike.shape[1:])), wanted)[0, 0]), "{:.3f}")
            words = [c.source.decode(tokens[i:i + 1]) for i in range(min(20, len(tokens)))]
            panels.append(heat(f"head {best[0]}.{best[1]}: {name}", "attended to", "from", example[best][:20, :20],
                               words, words))
    return Finding(rows, panels, f"{len(x)} rows")


def linear_probe(features, labels, train):
    """How well a linear map of the features gives held-out labels: least squares with a small ridge, every class of the
    same weight; the mean over the classes of the share of each that is right (chance: one by their number).

    features (n, d), labels int (n,), train bool (n,): which are for fitting."""
    classes, target, counts = np.unique(labels, return_inverse=True, return_counts=True)
    mean, spread = features[train].mean(0), features[train].std(0) + 1e-6
    z = np.concatenate([(features - mean) / spread, np.ones((len(features), 1))], axis=1)
    weighted = z[train] * (len(labels) / len(classes) / counts[target[train]])[:, None]
    a = weighted.T @ z[train] + 1e-3 * train.sum() * np.eye(z.shape[1])
    right = (z[~train] @ np.linalg.solve(a, weighted.T @ np.eye(len(classes))[target[train]])).argmax(1) == target[~train]
    held = np.bincount(target[~train], minlength=len(classes))
    return float((np.bincount(target[~train], right, len(classes))[held > 0] / held[held > 0]).mean())


def linear_targets(c, x):
    """What the state of a rule is at each place: {name: int (n, T), -1 where there is nothing to know}."""
    (name, params), targets = c.member, {}
    if c.brackets:
        tokens, k = sequences(c, x), params["k"]
        level = bracket_structure(tokens, k)[1] + np.where(tokens < k, 1, -1)  # after this token
        innermost = np.full(tokens.shape, -1)
        for row, sequence in enumerate(tokens.tolist()):
            stack = []
            for t, token in enumerate(sequence):
                if token < k:
                    stack.append(token)
                else:  # the latest of its type
                    del stack[len(stack) - 1 - stack[::-1].index(token - k)]
                innermost[row, t] = stack[-1] if stack else -1
        return {"bracket depth (9: or more)": np.minimum(level, 9), "innermost open bracket": innermost}
    if name not in ("stack", "identity", "reverse", "sort", "set", "union", "delete"):
        return {}
    separator = params["vocab"]
    inside = np.cumsum(x >= separator, axis=1) == 0  # before the first separator
    if name == "stack":
        top = np.full(x.shape, -1)
        for row, sequence in enumerate(x.tolist()):
            stack = []
            for t in np.flatnonzero(inside[row]):
                stack.append(sequence[t]) if sequence[t] else stack.pop()
                top[row, t] = stack[-1] if stack else -1
        return {"top of the stack": top}
    before = (x[:, :, None] == x[:, None, :]) & np.tri(x.shape[1], k=-1, dtype=bool)
    return {"seen before (set membership)": np.where(inside, before.any(axis=2), -1)}


def probe_linear(c):
    """What a linear map can read of the rule's state in the residual stream, layer by layer.

    Beside it stand a control task (random labels of the same kinds, one for each pair of a token and the one before it;
    after Hewitt and Liang, arXiv 1909.03368): what it reads beyond that is selectivity; and an untrained model."""
    if c.member is None or c.kind != "rule":
        return None
    rng = np.random.default_rng(c.seed)
    x = c.rows(min(c.n, max(8, 2 ** 13 // c.model.config.block_size)))[0]
    rows, panels, targets = {}, [], linear_targets(c, x)
    if not targets:
        return None
    torch.manual_seed(c.seed)
    untrained = GPT(c.model.config).to(c.device).eval()
    streams = {name: c.look_inside(x, model, attention=False)[1]
               for name, model in (("trained", None), ("untrained", untrained))}
    for name, target in targets.items():
        where = target >= 0
        train = np.broadcast_to((np.arange(len(x)) % 2 == 0)[:, None], where.shape)[where]  # by row, so that none leaks
        tokens = x[:, :target.shape[1]]
        pairs = np.unique((np.pad(tokens, ((0, 0), (1, 0)))[:, :-1] * 2 ** 20 + tokens)[where], return_inverse=True)[1]
        control = rng.choice(np.unique(target[where]), pairs.max() + 1)[pairs]
        found = {label: [linear_probe(streams[stream][:, layer, :target.shape[1]][where], wanted, train)
                         for layer in range(len(c.model.h) + 1)]
                 for label, stream, wanted in (("trained", "trained", target[where]), ("control task", "trained", control),
                                               ("untrained", "untrained", target[where]))}
        rows[f"{name}: chance"] = (1 / len(np.unique(target[where])), "{:.1%}")
        for layer in range(len(c.model.h) + 1):
            for label, values in found.items():
                at = "embedding" if layer == 0 else f"after layer {layer - 1}"
                rows[f"{name}, {at}{'' if label == 'trained' else f': {label}'}"] = (values[layer], "{:.1%}")
        panels.append(lines(name, "layers passed", "read right (mean over labels)",
                            {label: (np.arange(len(values)), values) for label, values in found.items()}))
    return Finding(rows, panels, f"{len(x)} rows, half of them for fitting")


PROBES = {"loss": probe_loss, "learned": probe_learned, "answers": probe_answers, "length": probe_length,
          "errors": probe_errors, "brackets": probe_brackets, "context": probe_context, "needle": probe_needle,
          "copying": probe_copying, "problems": probe_problems, "heads": probe_heads, "linear": probe_linear}


# ----------------------------------------------------------------------------------------------------------------------
# Tables, figures, eval.json


def print_table(name, opened, findings):
    """One row per label, one column per checkpoint."""
    labels = list(dict.fromkeys(label for finding in findings if finding for label in finding.rows))
    wide = max(map(len, labels)) + 2
    counted = dict.fromkeys(finding.n for finding in findings if finding and finding.n)
    print(f"\n{name}: {PROBES[name].__doc__.splitlines()[0]}" + f" ({'; '.join(counted)})" * bool(counted))
    if len(opened) > 1:
        print(" " * wide + "".join(f"{f'[{i + 1}]':>12}" for i in range(len(opened))))
    for label in labels:
        cells = (finding.rows.get(label) if finding else None for finding in findings)
        print(f"{label:{wide}}" + "".join(f"{cell[1].format(cell[0]) if cell else '-':>12}" for cell in cells))
    for note in dict.fromkeys(finding.note for finding in findings if finding and finding.note):
        print(f"({note})")


def draw(name, opened, findings, path):
    """The panels of a probe, one line of them per checkpoint, as a PNG that can be read in grey."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib: {error}") from None
    drawn = [(c, finding) for c, finding in zip(opened, findings) if finding and finding.panels]
    columns = min(4, max(len(finding.panels) for _, finding in drawn))
    deep = [-(-len(finding.panels) // columns) for _, finding in drawn]  # lines of panels for each checkpoint
    figure = plt.figure(figsize=(max(6, 4.2 * columns), 3.9 * sum(deep)), layout="constrained")
    for part, (c, finding) in zip(np.atleast_1d(figure.subfigures(len(drawn), 1, height_ratios=deep)), drawn):
        part.supxlabel(f"{c.path}: n = {finding.n}, seed {c.seed}", fontsize=8)
        axes = part.subplots(-(-len(finding.panels) // columns), columns, squeeze=False).flatten()
        for axis in axes[len(finding.panels):]:
            axis.axis("off")
        for axis, panel in zip(axes, finding.panels):
            axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"])
            if panel["kind"] == "heat":
                matrix = np.array(panel["matrix"], float)
                image = axis.imshow(matrix, cmap="Greys", vmin=0, vmax=1, aspect="auto")
                figure.colorbar(image, ax=axis, shrink=0.8)
                for n, ticks, put in ((matrix.shape[1], panel["xticks"], axis.set_xticks),
                                      (matrix.shape[0], panel["yticks"], axis.set_yticks)):
                    ticks = range(n) if ticks is None else ticks
                    put(range(n), [str(t).replace("$", r"\$") for t in ticks], fontsize=6 if n > 8 else 9)
                for (row, column), value in np.ndenumerate(matrix) if matrix.size <= 64 else ():
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                              color="white" if value > 0.6 else "black")
                continue
            for i, (label, (xs, ys)) in enumerate(panel["curves"].items()):
                axis.plot(xs, ys, marker="osv^"[i % 4] if len(xs) < 40 else None, linestyle=("-", "--", ":", "-.")[i % 4],
                          color=str(0.2 * (i % 4)), label=label)
            if panel["mark"]:
                low, high = panel["mark"]
                axis.axvspan(low - 0.3, high + 0.3, alpha=0.2, color="grey", label="trained")
            if panel["xlabel"].startswith("layers"):
                axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            if len(panel["curves"]) > 1 or panel["mark"]:
                axis.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    plt.close(figure)
    print(f"figure: {path}")


def add_to_json(c, findings):
    """Puts what was found into eval.json beside the checkpoint, and keeps what is there already."""
    path = Path(c.path)
    path = (path if path.is_dir() else path.parent) / "eval.json"
    try:
        there = json.loads(path.read_text()) if path.exists() else {}
        entry = there.setdefault(Path(c.path).name, {}).setdefault(c.spec, {})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; move it away") from None
    plain = lambda value: value if isinstance(value, str) else None if math.isnan(value) else float(value)
    for name, finding in findings.items():
        entry[name] = {"rows": {label: plain(value) for label, (value, _) in finding.rows.items()}, "n": finding.n,
                       "seed": c.seed, "step": c.state.get("step"), "panels": finding.panels}
    write_atomically(path, lambda file: file.write((json.dumps(there) + "\n").encode()))


def known_tokenizer(config, state):
    """The tokenizer of a checkpoint; None if it does not say."""
    if state.get("source") and isinstance(state["source"], dict):
        return state["source"].get("tokenizer")
    return "gpt2" if config.vocab_size in (50257, 50304) else None  # OpenAI's weights; nanoGPT pads them to 50304


def print_samples(model, source, n, device, seed=0):
    """Text: sampled continuations of held-out text. Rules and tasks: the answer given beside the right one."""
    generator = torch.Generator(device).manual_seed(seed)
    x, y = source.batch(0, n)
    for tokens, targets in zip(x, y):
        counts = np.flatnonzero(targets != -1)
        if not len(counts):  # an empty answer
            continue
        asked = counts[0] + 1 if source.kind != "text" else min(64, source.block_size // 2)
        free = source.kind == "text" or len(counts) == source.block_size - 1  # every token counts: nothing to solve
        prompt = torch.from_numpy(tokens[None, :asked]).to(device)
        steps = len(counts) if not free else min(256, source.block_size) - asked
        out = model.generate(prompt, steps, 0.8 if free else 0.0, generator=generator)[0].cpu().numpy()
        if free:
            print(f"{'-' * 80}\n{source.decode(out[:asked])} ▶ {source.decode(out[asked:])}")
        else:
            right = np.array_equal(out[asked:], targets[counts])
            wanted = "" if right else f"   wrong: {source.decode(targets[counts])}"
            print(f"{source.decode(out, np.arange(len(out)) >= asked)}{wanted or '   right'}")


def main():
    parser = Parser(description="What checkpoints know, and where, on held-out data.")
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint", help="ckpt.pt or warmup.pt of a run, or an imported "
                        "model; several are put side by side")
    parser.add_argument("--probe", metavar="NAMES", help=f"some of {', '.join(PROBES)} (default: all that fit)")
    parser.add_argument("--plot", action="store_true", help="also draw figures, as eval-NAME-PROBE.png beside the "
                        "(first) checkpoint")
    parser.add_argument("--data", help="other data than the checkpoint was trained on")
    parser.add_argument("--tokenizer", help="of that data (default: the checkpoint's)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="also print N samples or solved examples")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, help="at most this many for the loss (default: 262,144 tokens)")
    parser.add_argument("--problems", type=int, default=20, metavar="N",
                        help="problems to solve of each module and split of deepmind_math (default 20; 0: none)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: what is there)")
    args = parser.parse_args()
    if min(args.batch_size, 1 if args.batches is None else args.batches) < 1 or min(args.sample, args.problems) < 0:
        raise UserError("--batch_size and --batches must be at least 1, --sample and --problems at least 0")
    names = args.probe.split(",") if args.probe else list(PROBES)
    if unknown := [name for name in names if name not in PROBES]:
        raise UserError(f"unknown probe {unknown[0]!r}: there are {', '.join(PROBES)}")
    opened = [Opened(path, args) for path in args.checkpoints]
    for i, c in enumerate(opened):
        print(f"{f'[{i + 1}] ' if len(opened) > 1 else ''}{c.path}: {c.state.get('stage', 'imported')} step "
              f"{c.state.get('step', 0):,}, {sum(p.numel() for p in c.model.parameters()):,} parameters, on held-out {c.spec}")
    found, problems = {}, []
    for name in names:
        findings = [PROBES[name](c) for c in opened]
        if not any(findings):
            if args.probe:
                raise UserError(f"the probe {name} does not fit {' or '.join(c.spec for c in opened)}")
            continue
        found[name] = findings
        print_table(name, opened, findings)
        if args.plot and any(finding and finding.panels for finding in findings):
            path = Path(opened[0].path)
            folder, stem = (path, path.name) if path.is_dir() else (path.parent, path.stem)
            try:
                draw(name, opened, findings, folder / f"eval-{stem}-{name}.png")
            except UserError as error:  # said at the end; the other probes come first
                problems.append(error)
    for i, c in enumerate(opened):
        if c.samples and c.kind != "problems":
            print()
            print_samples(c.model, c.source, c.samples, c.device)
        try:
            add_to_json(c, {name: findings[i] for name, findings in found.items() if findings[i]})
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]


if __name__ == "__main__":
    run_main(main)
