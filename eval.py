"""What a checkpoint knows, and where: probes of its answers, its heads and its residual stream.

    python eval.py out/code-dyck-s0/ckpt.pt                  every probe that fits, on held-out data
    python eval.py out/*/warmup.pt --probe learned           was it learned? Several side by side
    python eval.py A/ckpt.pt B/ckpt.pt --plot                and as figures
    python eval.py out/code-dyck-s0/ckpt.pt --prompt "def "  go on from one's own words

A probe is a function of an opened checkpoint. It returns None where it does not fit, or what it
found, as eval.json keeps it: a dict of labels and

    numbers and words      which are printed
    {name: {x: y}}         curves, printed and drawn; the label says "y by x"
    a Map                  which is drawn

and "n": of how many rows, answers or tokens all this is.
"""
import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import (PROBLEM, RANDOM, RULES, Parser, UserError, make_data, micro_batches, number,
                  read_json, run_main, write_json, written_whole)
from model import GPT, attention_maps, find_device, load


# --------------------------------------------------------------------------------------------------
# Loss and accuracy


def first_rows(data, n):
    """The first n held-out rows x, y; of text, as many as there are."""
    if data.kind == "text":
        n = min(n, len(data.val))
    return data.val.__getitems__(range(n))


def held_out_rows(data, n):
    """The first n held-out rows, in parts (x, y) of 32,000 tokens or 1 GB of logits at most."""
    x, y = first_rows(data, n)
    logits = x.numel() * max(data.vocab_size, 2 ** 13)  # of 4 bytes; 2 ** 28 / 2 ** 13 = 32,768
    return micro_batches(x, y, math.ceil(logits / 2 ** 28))


@torch.no_grad()
def evaluate(model, rows, device="cpu", autocast=contextlib.nullcontext(), tokenizer=None):
    """Of rows as held_out_rows gives them: loss, in nats per counted token; accuracy, the share of
    these whose likeliest prediction is right; exact, the share of answers (unbroken runs of counted
    tokens) that are right throughout; bits_per_byte, of text; and how many tokens count."""
    training = model.training
    model.eval()
    loss = right = tokens = exact = answers = n_bytes = 0
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
        exact += begins.sum().item() - len(answer[~hit].unique())  # all but those with a miss
        if tokenizer and tokenizer.end is not None:
            n_bytes += len(tokenizer.decode(wanted[wanted != tokenizer.end].tolist()))
    model.train(training)
    return {"loss": loss / tokens, "accuracy": right / tokens, "exact": exact / answers,
            "bits_per_byte": loss / n_bytes / math.log(2) if n_bytes else None, "tokens": tokens}


def perplexity(loss):
    return math.exp(min(loss, 700.0))  # more would overflow


# --------------------------------------------------------------------------------------------------
# An opened checkpoint


class Opened:
    """A checkpoint with its model and held-out data. Raises UserError."""

    def __init__(self, path, device=None, spec=None, tokenizer=None, problems=20):
        self.path, self.device, self.problems = Path(path), find_device(device), problems
        self.model, state = load(path, self.device)
        self.model.eval()
        self.first = self  # of several, the one that the others are compared with
        if (self.path / "ckpt.pt").exists():  # a run's folder
            self.path = self.path / "ckpt.pt"
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.stage, self.step = state.get("stage", "imported"), state.get("step", 0)
        # Not the whole state, which holds the optimiser's.
        self.source, self.tokens = state.get("source", {}), state.get("tokens", 0)
        self.spec, seed = spec or self.source.get("spec"), self.source.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        if not isinstance(self.spec, str):
            raise UserError(f"{path} does not say what it was trained on: name --data")
        vocab_size = self.model.config.vocab_size
        tokenizer = tokenizer or self.source.get("tokenizer")
        if not tokenizer and 50257 <= vocab_size < 50514:
            tokenizer = "gpt2"
        self.data = make_data(self.spec, self.seed, self.model.config.block_size, tokenizer)
        spare = 256 if self.data.kind == "text" else 1  # some pad their vocabulary
        if vocab_size - self.data.vocab_size not in range(spare):
            raise UserError(f"{self.spec} has {self.data.vocab_size} tokens, {path} {vocab_size}")
        self.name, self.p = self.rule()
        self.brackets = self.name in ("dyck", "dyck_shuffle")
        chance = self.brackets or self.p.get("rule") == RANDOM
        self.one_answer = self.name is not None and not chance  # for each prompt
        self.n = max(16, min(256, 2 ** 15 // self.data.block_size))  # rows to look at
        self.few = max(8, min(self.n, 2 ** 13 // self.data.block_size))  # with each layer's stream

    def rule(self):
        """The name and parameters of a single rule or task. None, {} for text, mixtures, shuffled
        rows, and what cannot be known: the end of brackets of varying length, the net of an nca."""
        rows = self.data.train
        if self.data.kind == "text" or rows.shuffled or len(rows.members) > 1:
            return None, {}
        _, name, p = rows.members[0]
        varies = name.startswith("dyck") and p["length"][0] < p["length"][1]
        return (None, {}) if varies or name == "nca" else (name, p)

    def rows(self, n=None):
        """The first held-out rows x, y: int64 arrays (n, block_size)."""
        return [each.numpy() for each in first_rows(self.data, n or self.n)]

    def real(self, x):
        """bool (n, T): whether this place or a later one is no pad. Text has no pads."""
        pad = getattr(self.data.train, "pad", -1)
        return (x != pad)[:, ::-1].cumsum(1)[:, ::-1] > 0

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

    def right(self, x, y):
        """bool (n,): whether the whole answer is right, each of its tokens given those before."""
        return (self.predict(x, y)[1] | (y == -1)).all(1)

    @torch.no_grad()
    def attention(self, x):
        """What the heads attend to: (n, n_layer, n_head, T, T)"""
        with attention_maps(self.model) as maps:
            self.model.states(torch.from_numpy(x).to(self.device))
        return torch.stack(maps, 1).cpu().numpy()

    @torch.no_grad()
    def residual(self, x, model=None):
        """What goes into the first block and comes out of each: (n, n_layer + 1, T, n_embd)"""
        model, x = model or self.model, torch.from_numpy(x).to(self.device)
        streams = [model.wte(x) + model.wpe.weight[:x.shape[1]]]
        for block in model.h:
            streams.append(block(streams[-1]))
        return torch.stack(streams, 1).float().cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Probes of its answers


class Map(NamedTuple):
    """Shares from 0 to 1, in rows and columns."""
    matrix: np.ndarray
    ylabel: str
    xlabel: str
    ticks: list = None  # of both; None: numbers


def means(values, groups):
    """The mean of the values in each group, {group: mean}."""
    return {group: values[groups == group].mean() for group in np.unique(groups).tolist()}


def probe_loss(c):
    """loss, accuracy, and what else says it in one number"""
    rows = held_out_rows(c.data, max(16, 2 ** 18 // c.data.block_size))
    result = evaluate(c.model, rows, c.device, tokenizer=c.data.tokenizer)
    found = {"n": f"{result['tokens']:,} counted tokens",
             "loss (nats per counted token)": result["loss"],
             "accuracy, counted tokens": result["accuracy"]}
    if c.data.kind == "text":
        found["perplexity"] = perplexity(result["loss"])
    elif not c.brackets:
        found["exact, whole answers"] = result["exact"]
    if result["bits_per_byte"]:
        found["bits per byte"] = result["bits_per_byte"]
    return found


LEARNED = 0.1  # above the smallest possible loss: in nats, and as a share of the blind's


def probe_learned(c):
    """was it learned at all? The loss beside the smallest possible one

    The smallest possible loss is 0 where the prompt decides the answer. Of brackets it follows from
    the generator's odds; where each example has a rule of its own, from what its row tells of that.
    The blind know how often each token comes, and nothing else. Learned means to the end: less than
    0.1 nats, and than a tenth of what the blind lack, above the smallest possible loss."""
    if c.name is None:
        return None
    x, y = c.rows()
    wanted = y[y != -1]
    loss, floor = c.predict(x, y)[0].sum() / len(wanted), 0.0
    if c.brackets:
        odds = bracket_rows(c, x)["odds"]
        came = np.take_along_axis(odds, x[:, :odds.shape[1], None], 2)
        floor = -np.log(came[:, 1:]).mean()
    elif not c.one_answer:
        floor = math.log(2) * coin_flips(c, x, y) / len(wanted)
    share = np.bincount(wanted) / len(wanted)
    blind = -np.log(share[wanted]).mean()
    learned = loss - floor < LEARNED * min(1, blind - floor)
    return {"n": f"{len(x):,} rows", "loss (nats per counted token)": loss,
            "smallest possible": floor, "above it": loss - floor,
            "above it, the blind": blind - floor,
            "learned so far (1: all)": 1 - (loss - floor) / max(blind - floor, 1e-9),
            "verdict": "learned" if learned else "not learned"}


def coin_flips(c, x, y):
    """How many counted tokens of eca:rule=random no row has told yet: what follows three cells is a
    fair coin the first time, and known from then on."""
    width = c.p["width"]
    t = np.arange(width, x.shape[1])
    frame = t - t % width - width  # where the one before begins
    left, cell, right = (x[:, frame + (t + shift) % width] for shift in (-1, 0, 1))
    threes = np.where(y[:, width - 1:-1] != -1, 4 * left + 2 * cell + right, -1)
    return sum(len({*row} - {-1}) for row in threes.tolist())  # each kind once a row


def probe_answers(c):
    """accuracy by the place of a token in its answer"""
    if not c.one_answer:
        return None
    x, y = c.rows(1024)
    counted, hit = y != -1, c.predict(x, y)[1]
    shares = means(hit[counted], counted.cumsum(1)[counted])
    return {"n": f"{len(x):,} answers", "all tokens": hit[counted].mean(),
            "whole answers": (hit | ~counted).all(1).mean(),
            "share right by token of the answer": {"model": shares}}


def probe_length(c):
    """shorter and longer problems than it was trained on, as far as its positions go"""
    key = next((key for key in ("digits", "numbers", "length") if key in c.p), None)
    if not c.one_answer or not key:
        return None
    high = c.p[key][1] if key == "length" else c.p[key]
    others = "".join(f",{name}={value}" for name, value in c.p.items() if name != key)
    shares = {}
    for size in sorted({1, 2, 3, 4, high, *np.geomspace(5, 4 * high + 1, 8).astype(int).tolist()}):
        with contextlib.suppress(UserError):  # too long, or too few examples to hold some out
            data = make_data(f"{c.name}:{key}={size}{others}", c.seed, c.data.block_size)
            x, y = first_rows(data, 128)
            shares[size] = c.right(x.numpy(), y.numpy()).mean()
    return {"n": "128 answers each", f"share of whole answers right by {key}": {"model": shares}}


def probe_errors(c):
    """where it fails: sums by their longest chain of carries, haystacks by size and depth"""
    probes = {"addition": sums, "reversed_addition": sums, "haystack": haystacks}
    return probes[c.name](c) if c.name in probes else None


def sums(c):
    """A sum may fail by a carry that goes on through many digits."""
    x, y = c.rows(4000)
    d = c.p["digits"]
    a, b = x[:, :d], x[:, d + 1:2 * d + 1]
    if c.name == "addition":  # carries go from right to left
        a, b = a[:, ::-1], b[:, ::-1]
    carry = run = longest = np.zeros(len(x), int)
    for i in range(d):
        carry = (a[:, i] + b[:, i] + carry) // 10
        run = (run + 1) * carry
        longest = np.maximum(longest, run)
    shares = means(c.right(x, y), longest)
    return {"n": f"{len(x):,} sums",
            "share of sums right by longest chain of carries": {"model": shares}}


def haystacks(c):
    """Of how many pairs it is, and how deep in them the one that is asked for."""
    x, y = c.rows(4000)
    right, asked = c.right(x, y), (y != -1).argmax(1)
    pairs, key = asked // 2, x[np.arange(len(x)), asked] - c.p["pairs"]
    depth = (x == key[:, None]).argmax(1) // 2 / np.maximum(pairs - 1, 1)
    size, fifth = (pairs - 1) // 5, np.minimum(depth * 5, 4).astype(int)
    by_size, by_depth = {}, {}
    for i, share in means(right, size).items():
        group = f"{5 * i + 1}-{5 * i + 5} pairs"
        by_size[group] = share
        shares = means(right[size == i], fifth[size == i])
        by_depth[group] = {f"{20 * j}-{20 * j + 20}": share for j, share in shares.items()}
    return {"n": f"{len(x):,} haystacks", **by_size,
            "share of needles found by depth of the needle (%)": by_depth}


def bracket_facts(x, name, p):
    """What the generator of dyck or dyck_shuffle knows at each place of its rows x, (n, T).

    odds: of each token that may come, (n, T, 2k); partner: where the bracket that is closed was
    opened, or -1; depth: how many are open before; innermost: the last type open after, or -1."""
    k, (n, T) = p["k"], x.shape
    odds, depth = np.zeros((n, T, 2 * k)), np.zeros((n, T), int)
    partner, innermost = np.full((2, n, T), -1)
    for i, row in enumerate(x.tolist()):
        left = []  # the brackets that are open: (type, place)
        for t, token in enumerate(row):
            depth[i, t] = len(left)
            kinds = [kind for kind, _ in left]
            full = len(left) == (T - t if name == "dyck" else p["depth"])
            opens = 0.0 if full else p["p"] if left else 1.0  # with this probability
            may_close = kinds[-1:] if name == "dyck" else sorted(set(kinds))
            odds[i, t, :k] = opens / k
            odds[i, t, [k + kind for kind in may_close]] = (1 - opens) / max(1, len(may_close))
            if token < k:
                left.append((token, t))
            elif token - k in kinds:
                partner[i, t] = max(place for kind, place in left if kind == token - k)
                left.remove((token - k, partner[i, t]))
            innermost[i, t] = left[-1][0] if left else -1
    return {"odds": odds, "partner": partner, "depth": depth, "innermost": innermost}


def bracket_rows(c, x):
    """The same without what pads the rows, which are all of one length."""
    return bracket_facts(x[:, c.real(x)[0]], c.name, c.p)


def probe_brackets(c):
    """does it close what is open? The likeliest closing type where a bracket closes

    By depth, and by the distance to the bracket that is closed. And what illegal tokens get."""
    if not c.brackets:
        return None
    x, k = c.rows()[0], c.p["k"]
    facts = bracket_rows(c, x)
    odds, partner, depth = (facts[key][:, 1:] for key in ("odds", "partner", "depth"))
    predicted = torch.cat([logits.softmax(-1) for logits in c.logits(x)]).numpy()
    predicted = predicted[:, :odds.shape[1], :2 * k]
    closes = partner >= 0
    allowed = odds[closes][:, k:] > 0  # (closings, k)
    likeliest = predicted[closes][:, k:].argmax(-1)
    right = allowed[np.arange(len(allowed)), likeliest]
    chance = allowed.mean(-1)
    distance = np.arange(1, partner.shape[1] + 1) - partner
    found = {"n": f"{closes.sum():,} closings", "closing bracket of a right type": right.mean(),
             "by chance": chance.mean(),
             "probability of illegal tokens": (predicted * (odds == 0)).sum(-1).mean()}
    for what, values in (("depth", depth[closes]), ("distance", distance[closes])):
        bins = 2 ** np.log2(values).astype(int)  # 1, 2-3, 4-7, ...
        found[f"share of a right type by {what} (brackets) from"] = {
            "model": means(right, bins), "chance": means(chance, bins)}
    return found


def probe_context(c):
    """does more context help? The loss by how many tokens came before"""
    if c.data.kind != "text":
        return None
    x, y = c.rows()
    counted, before = y != -1, np.arange(1, y.shape[1] + 1)
    up_to = np.minimum(2 ** np.ceil(np.log2(before)), len(before)).astype(int)  # 1, 2, 4, 8, ...
    losses = means(c.predict(x, y)[0][counted], np.broadcast_to(up_to, y.shape)[counted])
    return {"n": f"{len(x):,} windows",
            "loss (nats per token) by tokens before, up to": {"model": losses}}


def probe_needle(c):
    """a line with a number, hidden in text of the corpus, and asked for at its end"""
    if c.data.kind != "text" or not c.data.tokenizer.encode:
        return None
    encode, rng = c.data.tokenizer.encode, np.random.default_rng(c.seed)
    depths, found, question = (0, 25, 50, 75, 100), [], "\nThe secret number is"
    asked = encode(question)
    for row in c.rows(16)[0]:
        secret = rng.integers(1000, 10000)
        hidden, answer = encode(f"{question} {secret}.\n"), encode(f" {secret}")
        room = len(row) - len(hidden) - len(asked) - len(answer)
        if room < 1:
            return None
        cuts = [room * depth // 100 for depth in depths]
        x = np.array([[*row[:cut], *hidden, *row[cut:room], *asked, *answer] for cut in cuts])
        y = x[:, 1:].copy()
        y[:, :-len(answer)] = -1
        found.append(c.right(x[:, :-1], y))
    shares = dict(zip(depths, np.mean(found, axis=0)))
    return {"n": f"{len(found)} texts",
            "share of numbers found by depth of the line (%)": {"model": shares}}


def repeated(c, length, n):
    """Random tokens of the held-out rows, twice: int64 (n, length)."""
    x, rng = c.rows()[0], np.random.default_rng(c.seed)
    once = rng.choice(np.unique(x[c.real(x)]), (n, length // 2))
    return np.concatenate([once, once], axis=1)


def probe_copying(c):
    """induction: random tokens, then the same again. Is the second copy easier?"""
    if c.data.block_size < 8:
        return None
    tokens = repeated(c, c.data.block_size, c.n)
    half = tokens.shape[1] // 2
    loss, hit = c.predict(tokens[:, :-1], tokens[:, 1:])
    return {"n": f"{len(tokens):,} rows of 2 x {half}",
            "loss on the first copy (nats)": loss[:, :half - 1].mean(),
            "loss on the second copy (nats)": loss[:, half:].mean(),
            "second copy right": hit[:, half:].mean(),
            "loss (nats per token) by token": {  # of which the first is given
                "model": dict(enumerate(loss.mean(0), 2))}}


def probe_problems(c):
    """DeepMind-Math: problems solved exactly, by greedy answers, by module and split"""
    if not hasattr(c.data.val, "problems") or not c.problems:
        return None
    rates = {}
    for module, problems in sorted(c.data.val.problems(c.problems).items()):
        solved = []
        for asked, answer in problems:
            prompt = torch.from_numpy(asked)[None].to(c.device)
            out = c.model.generate(prompt, len(answer), temperature=0, stop=PROBLEM)
            solved.append(out[0, len(asked):].tolist() == answer.tolist())
        rates[module] = np.mean(solved)
    found = {"n": f"{c.problems} problems of each module"}
    for split in ("interpolate", "extrapolate"):
        found[f"{split}, all modules"] = np.mean([rates[m] for m in rates if m.startswith(split)])
    return found | rates


# --------------------------------------------------------------------------------------------------
# Probes of its parts


def entropy_of_heads(attention, real):
    """How blurred each head is, (n_layer, n_head): the entropy of what it attends to, as a share of
    the most that a place allows. 0: one token; 1: all alike. real: bool (n, T)."""
    entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(-1)[..., 1:]
    share = entropy / np.log(np.arange(2, attention.shape[-1] + 1))
    return share.transpose(0, 3, 1, 2)[real[:, 1:]].mean(0)


def looks(c, x, attention):
    """Where a head may look. Yields a name; the attention (n, n_layer, n_head, T, T); the places
    wanted, bool (n, T, T), from token to token; and the tokens (n, T)."""
    n, T = x.shape
    yield "previous token", attention, np.eye(T, k=-1, dtype=bool) & c.real(x)[:, :, None], x
    if T >= 8:
        twice = repeated(c, min(T, 64), n)
        same = twice[:, :, None] == twice[:, None, :]
        after = np.pad(same, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]  # the place after the same token
        wanted = np.tril(after)
        wanted[:, :twice.shape[1] // 2] = False
        yield "induction", c.attention(twice), wanted, twice
    if c.brackets:
        partner = bracket_rows(c, x)["partner"]
        rows, closing = np.nonzero(partner >= 0)
        for name, ahead in (("matching bracket", 0), ("bracket that closes next", 1)):
            wanted = np.zeros((n, T, T), bool)
            wanted[rows, closing - ahead, partner[rows, closing]] = True
            yield name, attention, wanted, x


def probe_heads(c):
    """what the attention heads do: how blurred they are, and how much they look at some places

    At the token before; at what followed the same token in the first of two copies; and at the
    bracket that is closed, or closes next. The figure shows all heads, and a map of the strongest
    of each kind."""
    T = min(256, c.data.block_size)  # of longer contexts, the beginning
    few = max(4, min(32, 2 ** 26 // (c.model.config.n_layer * c.model.config.n_head * T * T)))
    x = c.rows(few)[0][:, :T]
    attention = c.attention(x)
    blur = entropy_of_heads(attention, c.real(x))
    found = {"n": f"{len(x)} rows", "entropy (1: all alike), sharpest head": blur.min(),
             "entropy (1: all alike), mean of heads": blur.mean()}
    for name, maps, wanted, tokens in looks(c, x, attention):
        asks = wanted.any(2).sum()
        score = np.einsum("nlhqk,nqk->lh", maps, wanted.astype(np.float32)) / asks
        layer, head = np.unravel_index(score.argmax(), score.shape)
        alike = (wanted.sum(2) / np.arange(1, wanted.shape[1] + 1)).sum() / asks
        words = c.data.words(tokens[0][:20])
        found |= {f"{name}, strongest head": score.max(),
                  f"{name}, which (layer.head)": f"{layer}.{head}",
                  f"{name}, if all were attended to alike": alike,
                  f"{name}: attention": Map(score, "layer", "head"),
                  f"{name}: head {layer}.{head}": Map(maps[0, layer, head, :20, :20],
                                                      "from token", "to token", words)}
    return found | {"entropy (share of the most)": Map(blur, "layer", "head")}


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
    return np.mean(list(means(right, target[~train]).values()))


def rule_states(c, x):
    """What the state of a rule is at each place: {name: int (n, T), -1 where there is none}."""
    if c.brackets:
        facts = bracket_rows(c, x)
        return {"bracket depth up to 9": np.minimum(facts["depth"][:, 1:], 9),  # after each
                "innermost open bracket": facts["innermost"]}
    if c.name not in RULES or c.name == "eca":
        return {}
    inside = (x >= c.data.train.bars.start).cumsum(1) == 0  # before the first separator
    if c.name == "stack":
        top = np.full(x.shape, -1)
        for i, row in enumerate(x.tolist()):
            left = []
            for t in np.flatnonzero(inside[i]):
                if row[t] == 0:  # a pop
                    left.pop()
                else:
                    left.append(row[t])
                top[i, t] = left[-1] if left else -1
        return {"top of the stack": top}
    before = np.tril(x[:, :, None] == x[:, None, :], -1)
    return {"seen before": np.where(inside, before.any(2), -1)}


def probe_linear(c):
    """what a linear map can read of the rule's state in the residual stream, layer by layer

    Beside it stand an untrained model, and a control task: random labels for each pair of a token
    and the one before it (after Hewitt and Liang, arXiv 1909.03368)."""
    x = c.rows(c.few)[0]
    states, rng = rule_states(c, x), np.random.default_rng(c.seed)
    if not states:
        return None
    torch.manual_seed(c.seed)
    trained, untrained = c.residual(x), c.residual(x, GPT(c.model.config).to(c.device).eval())
    pairs = np.pad(x, ((0, 0), (1, 0)))[:, :-1] * 2 ** 20 + x
    found = {"n": f"{len(x)} rows, half of them for fitting"}
    for name, state in states.items():
        rows, t = np.nonzero(state >= 0)
        labels, train = state[rows, t], rows % 2 == 0
        kinds, kind = np.unique(pairs[rows, t], return_inverse=True)
        control = rng.choice(np.unique(labels), len(kinds))[kind]
        found[f"{name}: chance"] = 1 / len(np.unique(labels))
        curves = {}
        for label, stream, wanted in (("model", trained, labels), ("untrained", untrained, labels),
                                      ("control task", trained, control)):
            curves[label] = {layer: linear_fit(stream[rows, layer, t], wanted, train)
                             for layer in range(stream.shape[1])}
        found[f"{name}, share right by layers passed"] = curves
    return found


def probe_similarity(c):
    """how like the first checkpoint it is, on the same rows

    The residual stream by linear CKA, which is 1 for the same but for rotation and scale (Kornblith
    and others, arXiv 1905.00414), and the predictions by their KL divergence from the first's."""
    other, a, b = c.first, c.model.config, c.first.model.config
    fits = (c.spec, a.vocab_size, a.block_size, a.n_layer) == (
        other.spec, b.vocab_size, b.block_size, b.n_layer)
    if other is c or not fits:
        return None
    x = c.rows(c.few)[0]
    real, ours, theirs = c.real(x), c.residual(x), other.residual(x)
    alike = {layer: cka(ours[:, layer][real], theirs[:, layer][real])
             for layer in range(ours.shape[1])}
    apart = [F.kl_div(mine.log_softmax(-1), yours.log_softmax(-1), reduction="none",
                      log_target=True).sum(-1) for mine, yours in zip(c.logits(x), other.logits(x))]
    return {"n": f"{real.sum():,} tokens", "KL divergence (nats)": torch.cat(apart)[real].mean(),
            "linear CKA by layers passed": {"residual stream": alike}}


def cka(x, y):
    """Linear CKA of two sets of n vectors, (n, d) and (n, e)."""
    x, y = (each.astype(np.float64) - each.mean(0) for each in (x, y))
    norm = np.linalg.norm
    return norm(x.T @ y) ** 2 / max(norm(x.T @ x) * norm(y.T @ y), 1e-300)


PROBES = {probe.__name__.removeprefix("probe_"): probe for probe in (
    probe_loss, probe_learned, probe_answers, probe_length, probe_errors, probe_brackets,
    probe_context, probe_needle, probe_copying, probe_problems, probe_heads, probe_linear,
    probe_similarity)}


# --------------------------------------------------------------------------------------------------
# Tables, figures, samples


def printed(finding):
    """What is printed of a finding, {label: value}: 12 places of a curve at most, and no map."""
    found = {}
    for label, value in finding.items():
        if isinstance(value, dict):
            places = list(dict.fromkeys(x for curve in value.values() for x in curve))
            for x in places[::math.ceil(len(places) / 12)]:
                for name, curve in value.items():
                    found[f"{label} {x}: {name}"] = curve.get(x, "-")
        elif not isinstance(value, Map) and label != "n":
            found[label] = value
    return found


def print_table(name, findings):
    """A row for each label, a column for each checkpoint."""
    columns = [printed(finding or {}) for finding in findings]
    n = next(finding["n"] for finding in findings if finding)
    question, _, more = PROBES[name].__doc__.partition("\n\n")
    print(f"\n{name}: {question} ({n})")
    if more:  # what its words mean
        print(" ".join(more.split()))
    labels = {label: None for column in columns for label in column}
    wide = max(map(len, labels)) + 2
    if len(findings) > 1:
        print(" " * wide + "".join(f"{f'[{i + 1}]':>12}" for i in range(len(findings))))
    for label in labels:
        values = [column.get(label, "-") for column in columns]
        cells = [f"{x:>12}" if isinstance(x, str) else f"{x:12.4f}" for x in values]
        print(f"{label:{wide}}" + "".join(cells))


def pyplot():
    """matplotlib's, with one style for all figures: to be read from the last row, by anybody."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    colours = "0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000 999999"  # Okabe and Ito's
    plt.rcParams.update({
        "font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
        "axes.spines.right": False, "savefig.dpi": 150, "figure.constrained_layout.use": True,
        "text.parse_math": False,  # a token may be a $
        "axes.prop_cycle": plt.cycler(color=[f"#{colour}" for colour in colours.split()])})
    return plt


def keep_figure(figure, path):
    """Writes a figure whole, or leaves the old one. Raises UserError."""
    with written_whole(path) as file:
        figure.savefig(file, format="png")
    pyplot().close(figure)
    print(f"figure: {path}")


def draw(c, name, finding):
    """The curves and maps of a finding, as a figure beside the checkpoint."""
    panels = {key: each for key, each in finding.items() if isinstance(each, (dict, Map))}
    if not panels:
        return
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = pyplot().figure(figsize=(max(6, 5 * columns), 4.5 * rows))
    figure.suptitle(f"{name}: {c.spec}")
    figure.supxlabel(f"{c.path}: n = {finding['n']}, seed {c.seed}", fontsize=9)
    for place, (key, panel) in enumerate(panels.items(), 1):
        plot = draw_map if isinstance(panel, Map) else draw_curves
        plot(figure.add_subplot(rows, columns, place), key, panel)
    keep_figure(figure, c.folder / f"eval-{c.path.stem}-{name}.png")


def draw_curves(axis, key, curves):
    ylabel, xlabel = key.split(" by ")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    for name, curve in curves.items():
        few = len(curve) <= 16  # then words, at equal distances: many go up as 1, 2, 4, 8
        places = [str(x) for x in curve] if few else list(curve)
        axis.plot(places, list(curve.values()), marker="o" if few else "", label=name)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    if len(curves) > 1:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def draw_map(axis, key, panel):
    axis.grid(False)
    most = max(0.2, panel.matrix.max())  # so that small shares are seen, and noise is not
    image = axis.imshow(panel.matrix, cmap="Greys", vmin=0, vmax=most, aspect="auto")
    axis.figure.colorbar(image, ax=axis)
    axis.set(title=key, xlabel=panel.xlabel, ylabel=panel.ylabel)
    for put, n in zip((axis.set_yticks, axis.set_xticks), panel.matrix.shape):
        put(range(n), panel.ticks or range(n), fontsize=12 if n <= 12 else 8)
    if panel.matrix.size <= 64:
        for (row, column), share in np.ndenumerate(panel.matrix):
            axis.text(column, row, f"{share:.2f}", ha="center", va="center",
                      color="white" if share > 0.6 * most else "black")


def add_to_json(c, name, finding):
    """Puts what was found into eval.json beside the checkpoint. Raises UserError."""
    path = c.folder / "eval.json"
    there = read_json(path) if path.exists() else {}
    try:
        probes = there.setdefault(c.path.name, {}).setdefault(c.spec, {})
        probes[name] = {"step": c.step, **finding}
    except (AttributeError, TypeError):  # what should be an object is something else
        raise UserError(f"{path} is not as eval.py writes it: put it elsewhere") from None
    write_json(path, there)


def print_sample(c, i, prompt, length, temperature, top_k):
    """Goes on from one's own prompt or from held-out row i; where an answer is right or wrong, the
    likeliest one."""
    x, y = (each.numpy() for each in c.data.val[i])
    counted = np.flatnonzero(y != -1)
    answers = prompt is None and c.data.kind != "text" and counted[0] > 0  # brackets ask nothing
    if answers:
        begin, length, temperature = x[:counted[0] + 1], len(counted), 0
    else:
        begin = x[:min(64, len(x) // 2)] if prompt is None else np.array(c.data.read(prompt))
    generator = torch.Generator(c.device).manual_seed(c.seed + i)
    tokens = torch.from_numpy(begin)[None].to(c.device)
    out = c.model.generate(tokens, length, temperature, top_k, generator)[0, len(begin):].tolist()
    line = f"{c.data.write(begin)} ▶ {c.data.write(out)}"
    if answers:
        wanted = y[counted].tolist()
        line += "   right" if out == wanted else f"   wrong: {c.data.write(wanted)}"
    print("-" * 80, line, sep="\n")


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
    samples = args.sample if args.prompt is None else max(args.sample, 1)
    for i, c in enumerate(opened):
        c.first = opened[0]
        n = sum(p.numel() for p in c.model.parameters())
        print(f"[{i + 1}] {c.path}: {c.stage} step {c.step}, {n:,} parameters, held-out {c.spec}")
        for row in range(samples):
            print_sample(c, row, args.prompt, args.tokens, args.temperature, args.top_k)
    if args.prompt is not None:
        return
    for name in names:
        findings = [PROBES[name](c) for c in opened]
        if any(findings):
            print_table(name, findings)
        elif args.probe:
            why = ": it compares checkpoints of one rule or corpus" if name == "similarity" else ""
            raise UserError(f"the probe {name} does not fit {opened[0].spec}{why}")
        for c, finding in zip(opened, findings):
            if finding:
                add_to_json(c, name, finding)
                if args.plot:
                    draw(c, name, finding)


if __name__ == "__main__":
    run_main(main)
