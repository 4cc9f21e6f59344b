"""What one checkpoint can do: loss, accuracy, exact match, bits per byte, samples.

    python eval.py out/code-dyck-s0/ckpt.pt                 on held-out data of its own kind
    python eval.py out/code-dyck-s0/ckpt.pt --data docs     on other data
    python eval.py out/haystack-none-s0/ckpt.pt --sample 3  solved examples (text: samples)
"""
import contextlib
import math
import re

import numpy as np
import torch
import torch.nn.functional as F

from data import Parser, UserError, make_source, run_main
from model import load


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
    (share of rows right in every counted token), bits_per_byte (text whose vocabulary is known, else None), tokens."""
    training = model.training
    model.eval()
    n = batch_size * batches if source.rows is None else min(batch_size * batches, source.rows)
    loss = right = rows = exact = tokens = text_bytes = 0
    for index in range(-(-n // batch_size)):
        x, y = (torch.from_numpy(a[:n - index * batch_size]).to(device) for a in source.batch(index, batch_size))
        with autocast():
            logits, wanted = model.counted(x, y)
        loss += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
        hit = logits.argmax(-1) == wanted
        row_of = (y != -1).nonzero()[:, 0]  # of each counted token
        asked, hits = row_of.bincount(minlength=len(x)), row_of[hit].bincount(minlength=len(x))
        right, exact = right + hit.sum().item(), exact + ((asked == hits) & (asked > 0)).sum().item()
        rows, tokens = rows + (asked > 0).sum().item(), tokens + len(wanted)
        if source.token_bytes is not None:
            text_bytes += int(source.token_bytes[wanted.cpu().numpy()].sum())
    model.train(training)
    return {"loss": loss / tokens, "accuracy": right / tokens, "exact": exact / rows, "tokens": tokens,
            "bits_per_byte": loss / text_bytes / math.log(2) if text_bytes else None}


def perplexity(loss):
    return math.exp(min(loss, 700.0))


def print_samples(model, source, n, device, seed=0):
    """Text: sampled continuations of held-out text. Rules and tasks: the answer given beside the right one."""
    generator = torch.Generator(device).manual_seed(seed)
    x, y = source.batch(0, n)
    for tokens, targets in zip(x, y):
        counts = np.flatnonzero(targets != -1)
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
    parser.add_argument("--device", help="cuda, mps or cpu (default: what is there)")
    args = parser.parse_args()
    if min(args.batch_size, args.batches) < 1 or args.sample < 0:
        raise UserError("--batch_size and --batches must be at least 1, --sample at least 0")
    device = find_device(args.device)
    model, state = load(args.checkpoint, device)
    trained_on = state.get("source")
    if not trained_on:
        raise UserError(f"{args.checkpoint} does not say what it was trained on: it is not from train.py")
    spec = args.data or trained_on["spec"]
    source = make_source(spec, "val", trained_on["seed"], model.config.block_size,
                         args.tokenizer or trained_on["tokenizer"])
    if source.vocab_size > model.config.vocab_size or (args.data and source.vocab_size != model.config.vocab_size):
        raise UserError(f"{spec} has a vocabulary of {source.vocab_size} tokens, the checkpoint one of "
                        f"{model.config.vocab_size}")
    result = evaluate(model, source, args.batch_size, args.batches, device)
    print(f"{args.checkpoint}: {state['stage']} step {state['step']:,}, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters, on held-out {spec}")
    print(f"  loss            {result['loss']:.4f} nats per counted token ({result['tokens']:,} tokens)")
    if source.kind == "text":
        print(f"  perplexity      {perplexity(result['loss']):.2f}")
        if result["bits_per_byte"] is not None:
            print(f"  bits per byte   {result['bits_per_byte']:.4f}")
    print(f"  accuracy        {result['accuracy']:.2%} of counted tokens")
    if source.kind != "text":
        print(f"  exact           {result['exact']:.2%} of whole answers")
    if args.sample:
        print_samples(model, source, args.sample, device)


if __name__ == "__main__":
    run_main(main)
