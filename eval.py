"""What a checkpoint knows, and where: probes of its answers, its heads and its residual stream.

    python eval.py out/code-dyck-s0/ckpt.pt                  every probe that applies to it
    python eval.py out/*/warmup.pt --probe learned           how much was learned, side by side
    python eval.py A/ckpt.pt B/ckpt.pt --plot                and as figures
    python eval.py out/code-dyck-s0/ckpt.pt --prompt "def "  go on from one's own words

`evaluate` is how loss and accuracy are computed, in training, too. A probe is a function of an
opened checkpoint. It returns None where it does not apply, or what it found, as eval.json keeps it:
labels with numbers and words, which are printed, curves {name: {x: y}}, printed and drawn (their
label says "y by x"), and Maps, drawn; "n" says of how many rows, answers or tokens.
"""
import contextlib
import math
from collections import namedtuple
from pathlib import Path

import numpy as np

# Before torch, of which data.py says how its threads wait.
from data import (RANDOM, Parser, UserError, lock, make_data, micro_batches, number, read_json,
                  reading, run_main, write_json, written_whole)
from model import GPT, attention_maps, find_device, load

import torch
import torch.nn.functional as F


@torch.no_grad()
def evaluate(model, rows, device="cpu", autocast=contextlib.nullcontext(), tokenizer=None):
    """Of rows as held_out_rows gives them: loss, in nats per counted token; accuracy, the share of
    these whose likeliest prediction is right; exact, the share of answers (unbroken runs of counted
    tokens) that are right throughout, which are just those that greedy decoding gets right;
    bits_per_byte, of text; and how many tokens count."""
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


def held_out_rows(data, n):
    """The first n held-out rows, in parts (x, y) of 32,000 tokens or 1 GB of logits at most."""
    x, y = first_rows(data, n)
    logits = x.numel() * max(data.vocab_size, 2 ** 13)  # of 4 bytes; 2 ** 28 / 2 ** 13 = 32,768
    return micro_batches(x, y, math.ceil(logits / 2 ** 28))


def first_rows(data, n):
    """The first n held-out rows x, y; of text, as many as there are."""
    if data.kind == "text":
        n = min(n, len(data.val))
    return data.val.__getitems__(range(n))


def perplexity(loss):
    return math.exp(min(loss, 700.0))  # more would overflow


class Opened:
    """A checkpoint with its model and data. spec: other data, on purpose. Raises UserError."""

    def __init__(self, path, device=None, spec=None, tokenizer=None):
        self.path, self.device = Path(path), find_device(device)
        self.model, state = load(path, self.device)
        self.model.eval().requires_grad_(False)
        if (self.path / "ckpt.pt").exists():  # a run's folder
            self.path = self.path / "ckpt.pt"
        self.stage, self.step = state.get("stage", "imported"), state.get("step", 0)
        config = self.model.config
        with reading(path):  # what a file says of its data may be anything
            source = state.get("source", {})
            self.spec = spec or source.get("spec")
            if not self.spec:
                raise UserError(f"{path} does not say what it was trained on: name --data")
            self.seed = int(source.get("seed", 0)) % 2 ** 32
            self.eval_rows = int(source.get("eval_rows") or max(16, 2 ** 18 // config.block_size))
            self.data = make_data(self.spec, self.seed, config.block_size,
                                  tokenizer or source.get("tokenizer"))
            seen = (state.get("fingerprint") or [None])[-1 if self.stage == "warmup" else 0]
            if not spec and seen not in (None, self.data.fingerprint()):
                raise UserError(f"{self.spec} is not what {path} was trained on, which may have "
                                f"seen the held-out rows: --data {self.spec} takes it on purpose")
        padding = config.vocab_size - self.data.vocab_size  # of text, some pad their vocabulary
        if padding and not (self.data.kind == "text" and 0 < padding < 256):
            raise UserError(f"{self.spec} has {self.data.vocab_size} tokens, {path} "
                            f"{config.vocab_size}: name its --data, and of text its --tokenizer")
        self.n = max(16, min(256, 2 ** 15 // config.block_size))  # rows to look at
        self.found = {}  # by the probes
        rows = self.data.train
        single = self.data.kind != "text" and not rows.shuffled and len(rows.members) == 1
        _, self.name, self.p = rows.members[0] if single else (1.0, None, {})
        self.brackets = self.name in BRACKETS
        if self.brackets and self.p["length"][0] < self.p["length"][1]:
            self.name, self.brackets = None, False  # nobody knows where they will end
        chance = self.brackets or self.p.get("rule") == RANDOM
        self.one_answer = self.name is not None and not chance  # for each prompt

    def rows(self, n=None):
        """The first held-out rows x, y: int64 arrays (n, block_size)."""
        x, y = first_rows(self.data, n or self.n)
        return x.numpy(), y.numpy()

    def real(self, x):
        """bool (n, T): whether this place or a later one is no pad. Text has no pads."""
        pad = -1 if self.data.kind == "text" else self.data.train.pad
        return (x != pad)[:, ::-1].cumsum(1)[:, ::-1] > 0

    def predict(self, x, y):
        """At each place the loss in nats, 0 where y is -1, and whether the likeliest is right."""
        losses, hits = [], []
        for x_part, wanted in zip(torch.from_numpy(x).split(16), torch.from_numpy(y).split(16)):
            logits = self.model(x_part.to(self.device)).float().cpu().transpose(1, 2)
            losses.append(F.cross_entropy(logits, wanted, reduction="none", ignore_index=-1))
            hits.append(logits.argmax(1) == wanted)
        return torch.cat(losses).numpy(), torch.cat(hits).numpy()

    def attention(self, x):
        """What the heads attend to: (n, n_layer, n_head, T, T)"""
        with attention_maps(self.model) as maps:
            self.model.states(torch.from_numpy(x).to(self.device))
        return torch.stack(maps, 1).cpu().numpy()

    def residual(self, x, model):
        """What goes into the first block and comes out of each: (n, n_layer + 1, T, n_embd)"""
        x = torch.from_numpy(x).to(self.device)
        streams = [model.wte(x) + model.wpe.weight[:x.shape[1]]]
        for block in model.h:
            streams.append(block(streams[-1]))
        return torch.stack(streams, 1).float().detach().cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Probes of its answers, then of its parts


# Shares from 0 to 1; `words` are the names of its rows and columns, which else have numbers.
Map = namedtuple("Map", "matrix ylabel xlabel words", defaults=[None])
BRACKETS = "dyck", "dyck_shuffle"


def means(values, groups):
    """The mean of the values in each group, {group: mean}."""
    return {group: values[groups == group].mean() for group in np.unique(groups).tolist()}


def probe_loss(c):
    """loss, accuracy, and what else says it in one number, on the rows that training looked at"""
    rows = held_out_rows(c.data, c.eval_rows)
    result = evaluate(c.model, rows, c.device, tokenizer=c.data.tokenizer)
    found = {"n": f"{result['tokens']:,} counted tokens",
             "loss (nats per counted token)": result["loss"],
             "perplexity": perplexity(result["loss"]),
             "accuracy, counted tokens": result["accuracy"],
             "exact, whole answers": result["exact"]}
    if result["bits_per_byte"]:
        found["bits per byte"] = result["bits_per_byte"]
    return found


def probe_learned(c):
    """how much of what can be learned was learned? The loss beside the smallest possible one

    The smallest possible loss is 0 where the prompt decides the answer. Of brackets it follows from
    the generator's odds; where each example has a rule of its own, from what its row tells of that.
    The share that is learned is 1 there, and 0 at the loss of a guess by token frequency."""
    if c.name is None:
        return None
    x, y = c.rows()
    losses, hits = c.predict(x, y)
    counted = y != -1
    wanted, loss, floor = y[counted], losses[counted].mean(), 0.0
    if c.brackets:
        odds = bracket_facts(x, c.name, c.p)["odds"]
        came = np.take_along_axis(odds, x[:, :odds.shape[1], None], 2)
        floor = -np.log(came[:, 1:]).mean()
    elif not c.one_answer:
        floor = math.log(2) * coin_flips(c, x, y) / len(wanted)
    frequency = np.bincount(wanted) / len(wanted)
    guess = -np.log(frequency[wanted]).mean()
    return {"n": f"{len(x):,} rows", "loss (nats per counted token)": loss,
            "smallest possible": floor, "above it": loss - floor,
            "above it, a guess by token frequency": guess - floor,
            "learned (share of what can be)": 1 - (loss - floor) / max(guess - floor, 1e-9),
            "accuracy": hits[counted].mean()}


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
    return {"n": f"{len(x):,} answers", "share right by token of the answer": {"model": shares}}


def bracket_facts(x, name, p):
    """What the generator of dyck or dyck_shuffle knows at each place of rows x, (n, T), but pads.

    odds: of each token that may come, (n, T, 2k); partner: where the bracket that is closed was
    opened, or -1; depth: how many are open before; innermost: the last type open after, or -1."""
    k = p["k"]
    x = x[:, x[0] < 2 * k]  # all rows are of one length
    n, T = x.shape
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


def probe_brackets(c):
    """does it close what is open? The likeliest closing type where a bracket closes

    By depth, and by the distance to the bracket that is closed. And what illegal tokens get."""
    if not c.brackets:
        return None
    x, k = c.rows()[0], c.p["k"]
    facts = bracket_facts(x, c.name, c.p)
    odds, partner, depth = (facts[key][:, 1:] for key in ("odds", "partner", "depth"))
    predicted = c.model(torch.from_numpy(x).to(c.device)).float().softmax(-1).cpu().numpy()
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
    for what, values in (("depth", depth), ("distance", distance)):
        bins = 2 ** np.log2(values[closes]).astype(int)  # 1, 2-3, 4-7, ...
        found[f"share of a right type by {what} (brackets) from"] = {
            "model": means(right, bins), "chance": means(chance, bins)}
    return found


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
            "second copy right": hit[:, half:].mean()}


def entropy_of_heads(attention, real):
    """How blurred each head is, (n_layer, n_head): the entropy of what it attends to, as a share of
    the most that a place allows. 0: one token; 1: all alike. real: bool (n, T)."""
    entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(-1)[..., 1:]
    share = entropy / np.log(np.arange(2, attention.shape[-1] + 1))
    return share.transpose(0, 3, 1, 2)[real[:, 1:]].mean(0)


def looks(c, x, attention):
    """Where a head may look. Yields a name; the attention (n, n_layer, n_head, T, T); the places
    wanted, bool (n, T, T), from token to token; and the tokens (n, T). The most telling is last."""
    n, T = x.shape
    yield "previous token", attention, np.eye(T, k=-1, dtype=bool) & c.real(x)[:, :, None], x
    twice = repeated(c, min(T, 64), n)
    wanted = np.tril(twice[:, :, None] == np.roll(twice, 1, axis=1)[:, None, :])
    wanted[:, :twice.shape[1] // 2] = False
    wanted[:, :, 0] = False  # which follows nothing
    yield "induction", c.attention(twice), wanted, twice
    if c.brackets:
        partner = bracket_facts(x, c.name, c.p)["partner"]
        rows, closing = np.nonzero(partner >= 0)
        for name, ahead in (("matching bracket", 0), ("bracket that closes next", 1)):
            wanted = np.zeros((n, T, T), bool)
            wanted[rows, closing - ahead, partner[rows, closing]] = True
            yield name, attention, wanted, x
    if c.name == "haystack":
        key = np.where(x >= 128 + c.p["pairs"], x - c.p["pairs"], -1)  # that is asked for here
        wanted = key[:, :, None] == np.roll(x, 1, axis=1)[:, None, :]
        yield "value of the asked key", attention, wanted, x


def probe_heads(c):
    """what the attention heads do: how blurred they are, and how much they look at some places

    At the token before; at what followed the same token in the first of two copies; at the bracket
    that is closed, or closes next; from the key that is asked for at its value. The figure shows
    all heads, and what the strongest of the last kind attends to in one row."""
    T = min(256, c.data.block_size)  # of longer contexts, the beginning
    heads = c.model.config.n_layer * c.model.config.n_head
    x = c.rows(max(4, min(32, 2 ** 26 // (heads * T * T))))[0][:, :T]
    attention = c.attention(x)
    blur = entropy_of_heads(attention, c.real(x))
    found = {"n": f"{len(x)} rows", "entropy (1: all alike), sharpest head": blur.min(),
             "entropy (1: all alike), mean of heads": blur.mean()}
    for name, maps, wanted, tokens in looks(c, x, attention):
        asks = wanted.any(2).sum()
        score = np.einsum("nlhqk,nqk->lh", maps, wanted.astype(np.float32)) / asks
        layer, head = np.unravel_index(score.argmax(), score.shape)
        alike = (wanted.sum(2) / np.arange(1, wanted.shape[1] + 1)).sum() / asks
        found |= {f"{name}, strongest head": score.max(),
                  f"{name}, which (layer.head)": f"{layer}.{head}",
                  f"{name}, if all were attended to alike": alike}
    most = 20 if wanted[:, :20].any() else wanted.shape[1]
    row = wanted[:, :most].any((1, 2)).argmax()  # one in whose beginning something is wanted
    end = min(most, c.real(tokens)[row].sum())
    words = c.data.words(tokens[row, :end]) if end <= 20 else None
    return found | {"entropy (1: all alike)": Map(blur, "layer", "head"),
                    f"{name}: attention": Map(score, "layer", "head"),
                    f"{name}: head {layer}.{head}": Map(maps[row, layer, head, :end, :end],
                                                        "from token", "to token", words)}


def linear_accuracy(features, labels, train):
    """How well a linear map of features (n, d) gives held-out labels (n,): least squares with a
    small ridge, classes weighted alike; the mean over classes of the share that is right."""
    classes, target, counts = np.unique(labels, return_inverse=True, return_counts=True)
    mean, spread = features[train].mean(0), features[train].std(0) + 1e-6
    z = np.concatenate([(features - mean) / spread, np.ones((len(features), 1))], axis=1)
    weighted = z[train] * (len(labels) / len(classes) / counts[target[train]])[:, None]
    a = weighted.T @ z[train] + 1e-3 * train.sum() * np.eye(z.shape[1])
    weights = np.linalg.solve(a, weighted.T @ np.eye(len(classes))[target[train]])
    right = (z[~train] @ weights).argmax(1) == target[~train]
    return np.mean(list(means(right, target[~train]).values()))


def probe_linear(c):
    """what a linear map can read of the rule's state in the residual stream, layer by layer

    Of brackets, which is open last; of rules on a list of symbols, whether one was there before.
    Beside it stands an untrained model."""
    x = c.rows(max(8, min(c.n, 2 ** 13 // c.data.block_size)))[0]
    if c.brackets:
        name, state = "innermost open bracket", bracket_facts(x, c.name, c.p)["innermost"]
    elif "vocab" in c.p and c.name != "stack":
        before = np.tril(x[:, :, None] == x[:, None, :], -1).any(2)
        inside = (x < c.p["vocab"]).cumprod(1) == 1  # before the first separator
        name, state = "seen before", np.where(inside, before, -1)
    else:
        return None
    rows, t = np.nonzero(state >= 0)
    labels, train = state[rows, t], rows % 2 == 0
    torch.manual_seed(c.seed)
    untrained = GPT(c.model.config).to(c.device).eval()
    curves = {}
    for label, model in (("model", c.model), ("untrained", untrained)):
        stream = c.residual(x, model)
        curves[label] = {layer: linear_accuracy(stream[rows, layer, t], labels, train)
                         for layer in range(stream.shape[1])}
    return {"n": f"{len(x)} rows; the map comes from every other one",
            f"{name}: chance": 1 / len(np.unique(labels)),
            f"{name}, share right by layers passed": curves}


PROBES = dict(loss=probe_loss, learned=probe_learned, answers=probe_answers, copying=probe_copying,
              brackets=probe_brackets, heads=probe_heads, linear=probe_linear)


# --------------------------------------------------------------------------------------------------
# Tables, figures, samples


def print_table(name, findings):
    """A row for each label, a column for each checkpoint; then the curves, 9 places at most."""
    question, _, more = PROBES[name].__doc__.partition("\n\n")
    print(f"\n{name}: {question} ({next(each['n'] for each in findings if each)})")
    if more:  # what its words mean
        print(" ".join(more.split()))
    numbers, curves = {"": [f"[{i}]" for i in range(1, len(findings) + 1)]}, []
    for i, finding in enumerate(findings):
        for label, value in finding.items():
            if isinstance(value, dict):
                places = list(next(iter(value.values())))
                places = places[::math.ceil(len(places) / 9)]
                curves += [(f"[{i + 1}] {label}", []), ("", places)]
                for each, curve in value.items():
                    curves.append((f"    {each}", [f"{curve[x]:.3f}" for x in places]))
            elif not isinstance(value, Map) and label != "n":
                said = value if isinstance(value, str) else f"{value:.4f}"
                numbers.setdefault(label, ["-"] * len(findings))[i] = said
    for rows, width in ((numbers.items(), max(map(len, numbers))), (curves, 16)):
        for label, cells in rows:
            print(label.ljust(width) + "".join(f"{cell:>9}" for cell in cells))


def keep(folder, opened):
    """Puts what was found into eval.json beside the checkpoints, or says why it cannot."""
    path = folder / "eval.json"
    try:
        # Another eval.py may be adding to it. The folder's `.lock` is train.py's.
        with lock(folder / ".eval.lock", wait=True), reading(path):
            there = read_json(path) if path.exists() else {}
            for c in opened:
                probes = there.setdefault(c.path.name, {}).setdefault(c.spec, {})
                for name, finding in c.found.items():
                    probes[name] = {"step": c.step, **finding}
            write_json(path, there)
    except UserError as error:
        print(f"\nnot kept: {error}")


def pyplot():
    """matplotlib's, with one style for all figures: to be read from the last row, by anybody."""
    import matplotlib
    matplotlib.use("Agg")  # first: a notebook's MPLBACKEND may name one that is not there
    import matplotlib.pyplot as plt
    colours = "0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000 999999"  # Okabe and Ito's
    plt.rcParams.update({
        "font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
        "axes.spines.right": False, "savefig.dpi": 150, "figure.constrained_layout.use": True,
        "text.parse_math": False,  # a token may be a $
        "axes.prop_cycle": plt.cycler(color=[f"#{colour}" for colour in colours.split()])})
    return plt


def keep_figure(figure, path):
    """Writes a figure whole, in the format that its name ends in. Raises UserError."""
    path, formats = Path(path), figure.canvas.get_supported_filetypes()
    ending = path.suffix.lower().removeprefix(".")
    if ending not in formats:
        raise UserError(f"{path}: a figure's name ends in one of {', '.join(formats)}")
    with written_whole(path) as file:
        figure.savefig(file, format=ending)
    pyplot().close(figure)
    print(f"figure: {path}")


def draw_finding(c, name, finding):
    """The curves and maps of a finding, as a figure of a slide's width beside the checkpoint."""
    panels = {key: each for key, each in finding.items() if isinstance(each, (dict, Map))}
    if not panels:
        return
    figure, axes = pyplot().subplots(1, len(panels), squeeze=False, figsize=(13.3, 5))
    figure.suptitle(f"{name}: {c.spec} ({c.path}: {finding['n']}, seed {c.seed})", fontsize=11)
    for axis, (key, panel) in zip(axes[0], panels.items()):
        if isinstance(panel, Map):
            draw_map(axis, key, panel)
            continue
        for label, curve in panel.items():
            # Few x are words, at equal distances: many go up as 1, 2, 4, 8.
            places = [str(x) for x in curve] if len(curve) <= 16 else list(curve)
            axis.plot(places, list(curve.values()), marker=".", label=label)
        ylabel, xlabel = key.split(" by ")
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    keep_figure(figure, c.path.with_name(f"eval-{c.path.stem}-{name}.png"))


def draw_map(axis, key, panel):
    axis.grid(False)
    most = max(0.2, panel.matrix.max())  # so that small shares are seen, and noise is not
    image = axis.imshow(panel.matrix, cmap="Greys", vmin=0, vmax=most, aspect="auto")
    axis.figure.colorbar(image, ax=axis)
    axis.set(title=key, xlabel=panel.xlabel, ylabel=panel.ylabel)
    for put, n in zip((axis.set_yticks, axis.set_xticks), panel.matrix.shape):
        step = 1 if panel.words else math.ceil(n / 12)  # more labels would collide
        put(range(0, n, step), (panel.words or range(n))[::step], fontsize=9)
    axis.tick_params(axis="x", rotation=90 if panel.words else 0)


def print_sample(c, i, args):
    """Goes on from one's own words, or from held-out row i; where that asks for an answer, with the
    likeliest one, which is right or wrong. Raises UserError."""
    length, temperature, wanted = args.tokens, args.temperature, []
    if args.prompt is None:
        x, y = c.data.val[i]
        begin, first = x[:min(64, len(x) // 2)], int((y != -1).int().argmax())
        if c.data.kind != "text" and first > 0:  # brackets ask nothing
            begin, wanted = x[:first + 1], y[y != -1].tolist()
            length, temperature = len(wanted), 0
    elif c.data.kind == "text" and c.data.tokenizer.encode and args.prompt:
        begin = torch.tensor(np.array(c.data.tokenizer.encode(args.prompt), np.int64))
    else:
        raise UserError(f"--prompt is for text, and not {args.prompt!r} for {c.spec}")
    generator = torch.Generator(c.device).manual_seed(c.seed + i)
    idx = begin[None].to(c.device)
    out = c.model.generate(idx, length, temperature, args.top_k, generator)[0, len(begin):].tolist()
    out = [token for token in out if token < c.data.vocab_size]  # a padded one has no word
    line = f"{c.data.write(begin)} ▶ {c.data.write(out)}"
    if wanted:
        line += "   right" if out == wanted else f"   wrong: {c.data.write(wanted)}"
    print("-" * 80, line, sep="\n")


def main():
    parser = Parser(description="What checkpoints know, and where, on held-out data.")
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt or warmup.pt, a run's folder, another's model")
    add("--probe", metavar="NAMES", help=f"some of {','.join(PROBES)} (default: all that apply)")
    add("--plot", action="store_true", help="also draw eval-NAME-PROBE.png beside the checkpoint")
    add("--data", help="other data than it was trained on")
    add("--tokenizer", help="of that data")
    add("--sample", type=number(0, 1e4), default=0, metavar="N", help="N samples, and no probe")
    add("--prompt", help="go on from these words, and ask no probe")
    add("--tokens", type=number(1, 1e6), default=200, help="of a sample (default 200)")
    add("--temperature", type=number(0, kind=float), default=0.8, help="of a sample (default 0.8)")
    add("--top_k", type=number(0, 1e6), default=0, help="of a sample (default 0: no limit)")
    add("--device", help="cuda, mps or cpu")
    args = parser.parse_args()
    names = args.probe.split(",") if args.probe else list(PROBES)
    if not PROBES.keys() >= set(names):
        raise UserError(f"unknown probe in {args.probe!r}: there are {', '.join(PROBES)}")
    opened = [Opened(path, args.device, args.data, args.tokenizer) for path in args.checkpoints]
    samples = args.sample if args.prompt is None else max(1, args.sample)
    for i, c in enumerate(opened, 1):
        n = sum(p.numel() for p in c.model.parameters())
        print(f"[{i}] {c.path}: {c.stage} step {c.step}, {n:,} parameters, held-out {c.spec}")
        for row in range(samples):
            print_sample(c, row, args)
    if samples:
        return
    for name in names:
        findings = [PROBES[name](c) or {} for c in opened]
        if any(findings):
            print_table(name, findings)
        elif args.probe:
            raise UserError(f"the probe {name} does not apply to {opened[0].spec}")
        for c, finding in zip(opened, findings):
            if finding:
                c.found[name] = finding
    for folder in dict.fromkeys(c.path.parent for c in opened):
        keep(folder, [c for c in opened if c.path.parent == folder])
    if args.plot:
        for c in opened:
            for name, finding in c.found.items():
                draw_finding(c, name, finding)


if __name__ == "__main__":
    run_main(main)
