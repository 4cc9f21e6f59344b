"""What a checkpoint knows, and where: probes of its answers, its heads and its residual stream.

    python eval.py out/code-dyck-s0/ckpt.pt                  every probe that applies to it
    python eval.py A.pt B.pt --probe learned,heads --plot    some of two, and a figure of the heads
    python eval.py out/code-dyck-s0/ckpt.pt --prompt "def "  go on from one's own words

A probe takes an opened checkpoint and returns None where it does not apply, or what it found: by
label numbers, words, curves {x: y} and maps (n_layer, n_head), which are drawn; "n" says of how
many rows, answers or tokens. What is printed above them is its docstring.
"""
import contextlib
import math
from pathlib import Path

import numpy as np

from data import (RANDOM, Parser, UserError, kind_of, make_data, micro_batches, number, reading,
                  run_main, say, written_whole)
from model import GPT, attention_maps, find_device, load

import torch
import torch.nn.functional as F


@torch.no_grad()
def evaluate(model, rows, device="cpu", autocast=contextlib.nullcontext(), tokenizer=None):
    """Of rows as held_out_rows gives them: loss, in nats per counted token; accuracy, the share of
    these whose likeliest prediction is right; exact, the share of answers (unbroken runs of counted
    tokens) that greedy decoding gets right; bits_per_byte, of text; how many tokens count."""
    model.eval()
    loss = right = tokens = exact = answers = n_bytes = 0
    for x, y in rows:
        x, y = x.to(device), y.to(device)
        with autocast:
            counted = y != -1
            logits, wanted = model.lm_head(model.states(x, counted)).float(), y[counted]
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        hit = logits.argmax(-1) == wanted
        begins = counted & ~F.pad(counted, (1, 0))[:, :-1]
        answer = begins.flatten().cumsum(0)[counted.flatten()]  # the answer that a token is in
        right += hit.sum().item()
        tokens += len(wanted)
        answers += begins.sum().item()
        exact += begins.sum().item() - len(answer[~hit].unique())  # all but those with a miss
        if tokenizer and tokenizer.end is not None:
            n_bytes += len(tokenizer.decode(wanted[wanted != tokenizer.end].tolist()))
    return {"loss": loss / tokens, "accuracy": right / tokens, "exact": exact / answers,
            "bits_per_byte": loss / n_bytes / math.log(2) if n_bytes else None, "tokens": tokens}


def held_out_rows(data, n):
    """The first n held-out rows, or all, in parts (x, y) of 32,000 tokens or 1 GB of logits."""
    x, y = data.val.__getitems__(range(n)[:data.val.n])
    if (y == -1).all():
        raise UserError(f"{data.spec}: no token counts in {n} held-out rows")
    logits = x.numel() * max(data.vocab_size, 2 ** 13)  # of 4 bytes each; 2 ** 28 are 1 GB
    return micro_batches(x, y, math.ceil(logits / 2 ** 28))


class Opened:
    """A checkpoint with its model and data. spec: other data, on purpose. Raises UserError."""

    def __init__(self, path, device=None, spec=None, tokenizer=None):
        inside = Path(path) / "ckpt.pt"  # of a run's folder
        self.path, self.device = inside if inside.exists() else Path(path), find_device(device)
        self.model, state = load(self.path, self.device)
        self.model.eval().requires_grad_(False)
        config = self.model.config
        with reading(path):  # what a file says of itself and its data may be anything
            self.stage, self.step = state.get("stage", "imported"), int(state.get("step", 0))
            source = state.get("source", {})
            self.spec = spec or source.get("spec")
            if not self.spec:
                raise UserError(f"{path} does not say what it was trained on: name --data")
            self.seed = number(0, 2 ** 32)(str(source.get("seed", 0)))
            rows = source.get("eval_rows") or max(16, 2 ** 18 // config.block_size)
            self.eval_rows = number(1, 1e9)(str(rows))
            if kind_of(self.spec) == "text":  # older warm-ups on rules name their text's
                tokenizer = tokenizer or source.get("tokenizer")
            self.data = make_data(self.spec, self.seed, config.block_size, tokenizer)
            seen = state.get("fingerprint", [None])[-1 if self.stage == "warmup" else 0]
            if not spec and seen not in (None, self.data.fingerprint()):
                raise UserError(f"{self.spec} is not what {path} was trained on, which may have "
                                f"seen the held-out rows: --data {self.spec} takes it on purpose")
        text, train = self.data.kind == "text", self.data.train
        padding = config.vocab_size - self.data.vocab_size
        if not 0 <= padding < (256 if text else 1):  # of text, some pad their vocabulary
            raise UserError(f"{self.spec} has {self.data.vocab_size} tokens, {path} "
                            f"{config.vocab_size}: name its --data, and of text its --tokenizer")
        self.n = max(16, min(256, 2 ** 15 // config.block_size))  # rows to look at
        # Its rule or task, if there is one that decides what comes next, and the parameters.
        one = not text and not train.shuffled and len(train.members) == 1
        _, self.name, self.p = train.members[0] if one else (1.0, None, {})
        self.brackets = self.name in ("dyck", "dyck_shuffle")
        unknown_end = self.brackets and self.p["length"][0] < self.p["length"][1]
        if unknown_end or self.p.get("rule") == RANDOM:  # nobody knows what comes
            self.name, self.brackets = None, False

    def rows(self, n=None):
        """The first held-out rows x, y, or all of a text: int64 arrays (n, block_size)."""
        x, y = self.data.val.__getitems__(range(n or self.n)[:self.data.val.n])
        return x.numpy(), y.numpy()

    def real(self, x):
        """bool (n, T): whether this place or a later one is no pad. Text has no pads."""
        pad = -1 if self.data.kind == "text" else self.data.train.pad
        return (x != pad)[:, ::-1].cumsum(1)[:, ::-1] > 0

    def attention(self, x):
        """What the heads attend to: (n, n_layer, n_head, T, T)"""
        with attention_maps(self.model) as maps:
            self.model.states(torch.from_numpy(x).to(self.device))
        return torch.stack(maps, 1).cpu().numpy()


# ---- Probes of its answers, then of its parts ----------------------------------------------------


def means(values, groups):
    """The mean of the values in each group, {group: mean}."""
    return {group: values[groups == group].mean() for group in np.unique(groups).tolist()}


def probe_loss(c):
    """loss, accuracy, and what else says it in one number, on the rows that training looked at"""
    rows = held_out_rows(c.data, c.eval_rows)
    found = evaluate(c.model, rows, c.device, tokenizer=c.data.tokenizer)
    return {"n": f"{found['tokens']:,} counted tokens",
            "loss (nats per counted token)": found["loss"],
            "perplexity": math.exp(min(found["loss"], 700.0)),  # more would overflow
            "accuracy": found["accuracy"], "exact (whole answers)": found["exact"],
            "bits per byte": found["bits_per_byte"]}


def probe_learned(c):
    """how much of what can be learned was learned? The loss beside the smallest possible one"""
    if c.name is None:
        return None
    result = evaluate(c.model, held_out_rows(c.data, c.n), c.device)
    x, y = c.rows()
    wanted, floor = y[y != -1], 0.0  # a prompt decides its answer
    if c.brackets:  # the generator's odds
        odds = bracket_facts(x, c.name, c.p)["odds"]
        came = np.take_along_axis(odds, x[:, :odds.shape[1], None], 2)
        floor = -np.log(came[:, 1:]).mean()
    frequency = np.bincount(wanted) / len(wanted)
    guess = -np.log(frequency[wanted]).mean()
    learned = 1 - (result["loss"] - floor) / max(guess - floor, 1e-9)
    return {"n": f"{len(x):,} rows", "loss (nats per counted token)": result["loss"],
            "smallest possible": floor, "of a guess by token frequency": guess,
            "learned (share of what can be)": learned, "accuracy": result["accuracy"]}


def probe_answers(c):
    """accuracy by the place of a token in its answer"""
    if c.name is None or c.brackets:  # only where a prompt has one
        return None
    x, y = c.rows(1024)
    said = [c.model(part.to(c.device)).argmax(-1).cpu() for part in torch.from_numpy(x).split(16)]
    hit, counted = torch.cat(said).numpy() == y, y != -1
    shares = means(hit[counted], counted.cumsum(1)[counted])
    return {"n": f"{len(x):,} answers", "share right by token of the answer, model": shares}


def bracket_facts(x, name, p):
    """What the generator of dyck or dyck_shuffle knows at each place of rows x, (n, T), but pads.
    odds: of each token that may come, (n, T, 2k); partner: where the bracket that is closed was
    opened, or -1; depth: how many are open before; innermost: the last type open after, or -1."""
    k = p["k"]
    x = x[:, x[0] < 2 * k]  # all rows are of one length
    T = x.shape[1]
    odds, (partner, innermost, depth) = np.zeros((*x.shape, 2 * k)), np.full((3, *x.shape), -1)
    for i, row in enumerate(x.tolist()):
        left = []  # the brackets that are open: (type, place)
        for t, token in enumerate(row):
            depth[i, t] = len(left)
            kinds = [kind for kind, _ in left]
            full = len(left) == (T - t if name == "dyck" else p["depth"])
            opens = 0.0 if full else p["p"] if left else 1.0  # with this probability
            may_close = kinds[-1:] if name == "dyck" else list(set(kinds))
            odds[i, t, :k] = opens / k
            odds[i, t, [k + kind for kind in may_close]] = (1 - opens) / max(1, len(may_close))
            if token < k:
                left.append((token, t))
            else:
                partner[i, t] = max(place for kind, place in left if kind == token - k)
                left.remove((token - k, partner[i, t]))
            innermost[i, t] = left[-1][0] if left else -1
    return {"odds": odds, "partner": partner, "depth": depth, "innermost": innermost}


def probe_brackets(c):
    """does it close what is open? The likeliest closing type where a bracket closes"""
    if not c.brackets:
        return None
    x, k = c.rows()[0], c.p["k"]
    facts = bracket_facts(x, c.name, c.p)
    odds, partner, depth = (facts[key][:, 1:] for key in ("odds", "partner", "depth"))
    logits = c.model(torch.from_numpy(x).to(c.device))[:, :odds.shape[1], k:2 * k]
    closes = partner >= 0
    allowed, likeliest = odds[closes][:, k:] > 0, logits.argmax(-1).cpu().numpy()[closes]
    right, chance = allowed[np.arange(len(allowed)), likeliest], allowed.mean(-1)
    bins = 2 ** np.log2(depth[closes]).astype(int)
    by = "share of a right type by brackets that are open (1, 2-3, 4-7, ...)"
    return {"n": f"{closes.sum():,} closings", "closing bracket of a right type": right.mean(),
            "by chance": chance.mean(), f"{by}, model": means(right, bins),
            f"{by}, by chance": means(chance, bins)}


def repeated(c, length, n):
    """Random tokens of the held-out rows, twice: int64 (n, length)."""
    x, rng = c.rows()[0], np.random.default_rng(c.seed)
    once = rng.choice(np.unique(x[c.real(x)]), (n, length // 2))
    return np.concatenate([once, once], axis=1)


def probe_copying(c):
    """induction: random tokens, then the same again. Is the second copy easier?"""
    if c.data.block_size < 4:  # nothing to compare
        return None
    tokens = torch.from_numpy(repeated(c, c.data.block_size, c.n))
    x, y, half = tokens[:, :-1], tokens[:, 1:], tokens.shape[1] // 2
    t = torch.arange(2 * half - 1)
    first, second = (evaluate(c.model, zip(x.split(16), y.where(counts, -1).split(16)), c.device)
                     for counts in (t < half - 1, t >= half))
    return {"n": f"{len(x):,} rows of 2 x {half}",
            "loss on the first copy (nats)": first["loss"],
            "loss on the second copy (nats)": second["loss"],
            "second copy right": second["accuracy"]}


def entropy_of_heads(attention, real):
    """How blurred each head is, (n_layer, n_head): the entropy of what it attends to, as a share of
    the most that a place allows. 0: one token; 1: all alike. real: bool (n, T)."""
    entropy = -(attention * np.log(np.maximum(attention, 1e-30))).sum(-1)[..., 1:]
    share = entropy / np.log(np.arange(2, attention.shape[-1] + 1))
    return share.transpose(0, 3, 1, 2)[real[:, 1:]].mean(0)


def looks(c, x, attention):
    """Where heads may look. Yields a name, attention, and each token's place, int (n, T), or -1."""
    yield "previous token", attention, np.where(c.real(x), np.arange(x.shape[1]) - 1, -1)
    twice = repeated(c, min(x.shape[1], 64), len(x))
    t, half = np.arange(twice.shape[1]), twice.shape[1] // 2
    after = np.where(t >= half, t - half + 1, -1)  # what followed the same token in the first copy
    yield "induction", c.attention(twice), np.broadcast_to(after, twice.shape)
    if c.brackets:
        partner = bracket_facts(x, c.name, c.p)["partner"]
        yield "matching bracket", attention, partner
        yield "bracket that closes next", attention, partner[:, 1:]
    if c.name == "haystack":
        pairs = c.p["pairs"]
        key = x[:, None, :] == x[:, :, None] - pairs  # which token names the key asked for here
        yield "value of the asked key", attention, np.where(x >= 128 + pairs, key.argmax(2) + 1, -1)


def probe_heads(c):
    """how blurred is what each attention head looks at, and what share goes to some places?"""
    T = min(256, c.data.block_size)  # of longer contexts, the beginning
    heads = c.model.config.n_layer * c.model.config.n_head
    x = c.rows(max(4, min(32, 2 ** 26 // (heads * T * T))))[0][:, :T]
    attention = c.attention(x)
    blur = entropy_of_heads(attention, c.real(x))
    found = {"n": f"{len(x)} rows", "entropy (1: all alike), sharpest head": blur.min(),
             "entropy (1: all alike), mean of heads": blur.mean(), "entropy (1: all alike)": blur}
    for name, maps, place in looks(c, x, attention):
        row, t = np.nonzero(place >= 0)
        score = maps[row, :, :, t, place[row, t]].mean(0)
        layer, head = np.unravel_index(score.argmax(), score.shape)
        found |= {f"{name}, strongest head": score.max(),
                  f"{name}, which (layer.head)": f"{layer}.{head}",
                  f"{name}, if it looked at all alike": (1 / (t + 1)).mean(), name: score}
    return found


def linear_accuracy(features, labels, train):
    """The share of held-out labels that least squares get right, all classes weighted alike."""
    classes, target, counts = np.unique(labels, return_inverse=True, return_counts=True)
    z = np.append(np.nan_to_num(features), np.ones((len(features), 1)), axis=1)
    weight, wanted = counts[target[train], None] ** -0.5, np.eye(len(classes))[target[train]]
    linear, *_ = np.linalg.lstsq(weight * z[train], weight * wanted, rcond=None)
    right = (z[~train] @ linear).argmax(1) == target[~train]
    return np.mean(list(means(right, target[~train]).values()))


def probe_linear(c):
    """what a linear map can read of the rule's state in the residual stream, layer by layer"""
    x = c.rows(max(8, min(c.n, 2 ** 13 // c.data.block_size)))[0]
    if c.brackets:
        what, state = "innermost open bracket", bracket_facts(x, c.name, c.p)["innermost"]
    elif "vocab" in c.p and c.name != "stack":
        before = np.tril(x[:, :, None] == x[:, None, :], -1).any(2)
        inside = (x < c.p["vocab"]).cumprod(1) == 1  # before the first separator
        what, state = "seen before", np.where(inside, before, -1)
    else:
        return None
    rows, t = np.nonzero(state >= 0)
    labels, train = state[rows, t], rows % 2 == 0
    torch.manual_seed(c.seed)
    untrained = GPT(c.model.config).to(c.device).eval().requires_grad_(False)
    found = {"n": f"{len(x)} rows; the map comes from every other one",
             f"{what}: chance": 1 / len(np.unique(labels))}
    x = torch.from_numpy(x).to(c.device)
    for name, model in (("model", c.model), ("untrained", untrained)):
        streams = [model.wte(x) + model.wpe.weight[:x.shape[1]]]
        for block in model.h:
            streams.append(block(streams[-1]))
        found[f"{what}, share right by layers passed, {name}"] = {
            layer: linear_accuracy(stream.cpu().numpy()[rows, t], labels, train)
            for layer, stream in enumerate(streams)}
    return found


PROBES = dict(loss=probe_loss, learned=probe_learned, answers=probe_answers, copying=probe_copying,
              brackets=probe_brackets, heads=probe_heads, linear=probe_linear)


# ---- What is printed, figures, samples -----------------------------------------------------------


def print_finding(name, finding):
    """A line for each number, and for each curve, with 8 of its points at most."""
    say(f"\n{name}: {PROBES[name].__doc__} ({finding['n']})")
    for label, value in finding.items():
        if isinstance(value, dict):
            places = list(value)[::math.ceil(len(value) / 8)]
            say(f"{label}:  " + "  ".join(f"{x}: {value[x]:.3f}" for x in places))
        elif isinstance(value, (float, np.floating)):
            say(f"{label:49}{value:9.4f}")
        elif isinstance(value, str) and label != "n":
            say(f"{label:49}{value:>9}")


def pyplot():
    """matplotlib's, with one style for all figures: to be read from the back of a room."""
    import matplotlib
    matplotlib.use("Agg")  # first: a notebook's MPLBACKEND may name one that is not there
    import matplotlib.pyplot as plt
    colours = "0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000 999999"  # Okabe and Ito's
    plt.rcParams.update({
        "font.size": 12, "text.parse_math": False,  # a path may have dollars
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
        "axes.spines.right": False, "savefig.dpi": 150, "figure.constrained_layout.use": True,
        "axes.prop_cycle": plt.cycler(color=[f"#{colour}" for colour in colours.split()])})
    return plt


def keep_figure(figure, path):
    """Writes a figure whole, in the format that its name ends in. Raises UserError."""
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: a figure's name ends in .png, .pdf or .svg")
    for text in figure.findobj(lambda artist: hasattr(artist, "set_text")):
        text.set_text(text.get_text().encode(errors="replace").decode())  # a path may be no Unicode
    with written_whole(path) as file:
        figure.savefig(file, format=ending)
    pyplot().close(figure)
    say(f"figure: {path}")


def draw_heads(c, found):
    """The blur of the heads, and where they look, as a slide."""
    panels = [(label, scores) for label, scores in found.items() if isinstance(scores, np.ndarray)]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(13.3, 4.5))
    figure.suptitle(f"{probe_heads.__doc__}\n{c.spec}, {c.stage} step {c.step:,}, seed {c.seed}")
    for axis, (label, scores) in zip(axes, panels):
        image = axis.imshow(scores, cmap="Blues", vmin=0, aspect="auto")
        figure.colorbar(image, ax=axis)
        axis.set(title=label, xlabel="head", ylabel="layer")
        axis.grid(False)
        axis.locator_params(integer=True)
    keep_figure(figure, c.path.parent / f"eval-{c.path.stem}-heads.png")


def print_sample(c, i, args):
    """Goes on from one's own words, or held-out row i, and says whether that is right."""
    length, temperature, asks = args.tokens, 0.8, 0
    if args.prompt is not None:
        if c.data.kind != "text" or not args.prompt:
            raise UserError(f"--prompt is for text, and not {args.prompt!r} for {c.spec}")
        with reading("--prompt, all of whose characters this model has to know"):
            begin = torch.tensor(np.array(c.data.tokenizer.encode(args.prompt), np.int64))
            c.data.write(begin)
    elif c.data.kind == "text":
        begin = c.data.val[i][0][:64]
    else:
        x, y = c.data.val[i]
        asks = int((y != -1).int().argmax())  # where the prompt ends; of brackets 0: they have none
        begin, wanted = x[:asks + 1], y[y != -1].tolist()
        length, temperature = len(wanted), 0 if asks else temperature
    torch.manual_seed(c.seed + i)
    out = c.model.generate(begin[None].to(c.device), length, temperature)[0, len(begin):].tolist()
    out = [token for token in out if token < c.data.vocab_size]  # a padded one has no word
    say(f"{'-' * 80}\n{c.data.write(begin)} ▶ {c.data.write(out)}")
    if asks:
        say("right" if out == wanted else f"wrong: {c.data.write(wanted)}")


def main():
    parser = Parser(description="What checkpoints know, and where, on held-out data.")
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt or warmup.pt, a run's folder, another's model")
    add("--probe", metavar="NAMES", help=f"some of {','.join(PROBES)} (default: all that apply)")
    add("--plot", action="store_true", help="draw the heads, too: eval-NAME-heads.png, beside it")
    add("--data", metavar="SPEC", help="as of train.py (default: what it was trained on)")
    add("--tokenizer", metavar="NAME", help="of that data (default: that of its training)")
    add("--sample", type=number(0, 1e4), default=0, metavar="N", help="N samples, and no probe")
    add("--prompt", metavar="WORDS", help="go on from these words of text, and ask no probe")
    add("--tokens", type=number(1, 1e6), default=200, metavar="N", help="of text (default 200)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first that is here)")
    args = parser.parse_args()
    samples = args.sample or int(args.prompt is not None)
    names = args.probe.split(",") if args.probe else list(PROBES)
    if not PROBES.keys() >= set(names):
        raise UserError(f"unknown probe in {args.probe!r}: there are {', '.join(PROBES)}")
    for path in args.checkpoints:
        c = Opened(path, args.device, args.data, args.tokenizer)
        tokens = f", tokens of {c.data.tokenizer.name}" if c.data.tokenizer else ""
        say(f"{c.path}: {c.stage} step {c.step}, held-out {c.spec}{tokens}")
        for i in range(samples):
            print_sample(c, i, args)
        for name in [] if samples else names:
            found = PROBES[name](c)
            if found:
                print_finding(name, found)
            elif args.probe:
                raise UserError(f"the probe {name} does not apply to {c.spec}")
            if args.plot and name == "heads":
                draw_heads(c, found)


if __name__ == "__main__":
    run_main(main)
