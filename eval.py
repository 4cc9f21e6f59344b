"""What one checkpoint can do: loss, accuracy, exact match, bits per byte, samples.

    python eval.py out/code-dyck-s0/ckpt.pt                 on held-out data of its own kind
    python eval.py out/code-dyck-s0/ckpt.pt --data docs     on other data
    python eval.py out/haystack-none-s0/ckpt.pt --sample 3  solved examples (text: samples)
    python eval.py out/deepmind_math-none-s0/ckpt.pt        problems solved, by module and split
"""
import contextlib
import itertools
import math
import re

import numpy as np
import torch
import torch.nn.functional as F

from data import Parser, UserError, default_tokenizer, make_source, run_main
from model import MOST_LOGITS, load


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
            hidden = model.trunk(x)[where]
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
    if not tokens:
        raise UserError(f"no token of {source.name} counts in rows of {source.block_size}: longer ones are needed")
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


def print_solved(source, solved, samples):
    """A table of problems solved exactly, by module and split, and some of them in full."""
    rates = {part: [np.array_equal(wanted, given) for _, wanted, given in answers] for part, answers in solved.items()}
    splits = sorted({part.split("/")[0] for part in solved}, reverse=True)  # interpolate, extrapolate
    print(f"\n{'problems solved exactly':40}" + "".join(f"{split:>16}" for split in splits))
    for module in sorted({part.split("/")[1] for part in solved}):
        found = [rates.get(f"{split}/{module}") for split in splits]
        print(f"{module:40}" + "".join(f"{np.mean(r):11.1%} ({len(r):2})" if r else f"{'':16}" for r in found))
    found = [sum((r for part, r in rates.items() if part.startswith(split)), []) for split in splits]
    print(f"{'all':40}" + "".join(f"{np.mean(r):>16.1%}" for r in found))
    for answers in list(solved.values())[:samples]:
        for question, wanted, given in answers[:1]:
            right = "right" if np.array_equal(wanted, given) else f"wrong: {source.decode(wanted).strip()}"
            print(f"{source.decode(question)}«{source.decode(given).strip()}»   {right}")


def known_tokenizer(config, state):
    """The tokenizer of a checkpoint; None if it does not say."""
    if state.get("source"):
        return state["source"]["tokenizer"]
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
    parser = Parser(description="What a checkpoint can do, on held-out data.")
    parser.add_argument("checkpoint", help="ckpt.pt or warmup.pt of a run")
    parser.add_argument("--data", help="other data than the checkpoint was trained on")
    parser.add_argument("--tokenizer", help="of that data (default: the checkpoint's)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="also print N samples or solved examples")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=250, help="at most this many (default 250)")
    parser.add_argument("--problems", type=int, default=20, metavar="N",
                        help="problems to solve of each module and split of deepmind_math (default 20; 0: none)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: what is there)")
    args = parser.parse_args()
    if min(args.batch_size, args.batches) < 1 or min(args.sample, args.problems) < 0:
        raise UserError("--batch_size and --batches must be at least 1, --sample and --problems at least 0")
    device = find_device(args.device)
    model, state = load(args.checkpoint, device)
    trained_on = state.get("source") or {"spec": None, "tokenizer": None, "seed": 0}  # None: not from train.py
    spec = args.data or trained_on["spec"]
    if not spec:
        raise UserError(f"{args.checkpoint} does not say what it was trained on: name --data, and --tokenizer if needed")
    tokenizer = args.tokenizer or default_tokenizer(spec)
    if not args.tokenizer and tokenizer != "characters":
        tokenizer = known_tokenizer(model.config, state) or tokenizer
    source = make_source(spec, "val", trained_on["seed"], model.config.block_size, tokenizer)
    padded = -(-source.vocab_size // 64) * 64  # as nanoGPT pads it
    if source.vocab_size > model.config.vocab_size or (
            args.data and model.config.vocab_size not in (source.vocab_size, padded)):
        raise UserError(f"{spec} has a vocabulary of {source.vocab_size} tokens, the checkpoint one of "
                        f"{model.config.vocab_size}")
    result = evaluate(model, source, args.batch_size, args.batches, device)
    print(f"{args.checkpoint}: {state.get('stage', 'imported')} step {state.get('step', 0):,}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, on held-out {spec}")
    print(f"  loss            {result['loss']:.4f} nats per counted token ({result['tokens']:,} tokens)")
    if source.kind == "text":
        print(f"  perplexity      {perplexity(result['loss']):.2f}")
        if result["bits_per_byte"] is not None:
            print(f"  bits per byte   {result['bits_per_byte']:.4f}")
    print(f"  accuracy        {result['accuracy']:.2%} of counted tokens")
    if source.kind != "text":
        print(f"  exact           {result['exact']:.2%} of whole answers")
    if source.kind == "problems" and args.problems:
        print_solved(source, solve(model, source.problems(args.problems), device), args.sample)
    elif args.sample and source.kind != "problems":
        print_samples(model, source, args.sample, device)


if __name__ == "__main__":
    run_main(main)
