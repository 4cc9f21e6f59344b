"""How fast it is beside other people's code, as ratios that are measured by turns on one machine.

    python tests/bench.py                              all of it but nanoGPT; takes minutes
    python tests/bench.py trainer                      a step beside transformers' Trainer
    python tests/bench.py nanogpt --nanogpt FOLDER     beside nanoGPT's model.py, which is there
    python tests/bench.py data                         rows of each kind that a core makes
    python tests/bench.py jobs                         eight runs side by side
"""
import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data import RULES, TASKS, make_data
from eval import micro_batches
from model import GPT, GPTConfig, as_hugging_face, parse_size

import torch

WARM, TURNS = 5, 3  # steps before the clock starts; times that each side is measured


def now(device):
    """A GPU is waited for here alone: at both ends of a block of steps, for each side alike."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(title, tokens, ours, theirs):
    """Runs both by turns; each returns (seconds a step, the mean loss)."""
    turns = [(ours(), theirs()) for _ in range(TURNS)]
    ratio = [b / a for (a, _), (b, _) in turns]
    apart = max(abs(a - b) for (_, a), (_, b) in turns)
    print(f"{title}: {np.median(ratio):.2f} times as fast ({min(ratio):.2f} to {max(ratio):.2f}); "
          f"losses differ by {apart:.0e}", flush=True)
    return [tokens / np.median([turn[side][0] for turn in turns]) for side in (0, 1)]


def a_run(flags, name="train"):
    """What train.py makes of flags: settings, data, stage and model."""
    settings, _ = train.parse(flags.split())
    if name == "warmup":
        data = make_data(settings.warmup, 0, settings.warmup_block_size)
    else:
        data = make_data(settings.data, 0, settings.block_size, settings.tokenizer)
    stage = train.stage_of(settings, name, data.block_size)
    model = train.new_model(data, settings, settings.tied, stage.dropout, 0).to(settings.device)
    return settings, data, stage, model


def batches_of(data, stage, settings, steps):
    rows = [range(i * stage.batch_size, (i + 1) * stage.batch_size) for i in range(steps)]
    batches = [data.train.__getitems__(each) for each in rows]
    return [(x.pin_memory(), y.pin_memory()) for x, y in batches] if torch.cuda.is_available() \
        else batches


def nanowarm(flags, batches, name="train"):
    """The loop of train.py, without what it logs, evaluates and saves."""
    settings, data, stage, model = a_run(flags, name)
    optimizer, losses = train.make_optimizer(model, stage, settings), []
    scaler = torch.amp.GradScaler(settings.device.partition(":")[0], enabled=False)
    n, cpu = train.enough_micro_batches(data, stage, settings), settings.device == "cpu"
    net = train.wrapped(model, data, stage, settings, n)
    model.train()
    for step, (x, y) in enumerate(batches):
        if step == WARM:
            began = now(settings.device)
        parts = micro_batches(x, y, n, trim=cpu)
        counted = int((y != -1).sum())
        losses.append(train.gradients(net, model, parts, counted, stage, settings, scaler))
        train.take_step(model, optimizer, scaler, settings, look=cpu)
    seconds = now(settings.device) - began
    return seconds / (len(batches) - WARM), torch.stack(losses).mean().item()


def trainer(flags, batches):
    """The same weights and batches in transformers' Trainer, told not to look at every loss."""
    import transformers
    settings, _, stage, model = a_run(flags)
    theirs, times = as_hugging_face(model), []
    theirs.config.use_cache = False

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for x, y in batches:
                wanted = y.masked_fill(y == -1, -100)
                yield {"input_ids": x, "labels": wanted, "shift_labels": wanted}  # shifted already

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step in (WARM, len(batches)):
                times.append(now(settings.device))

    with tempfile.TemporaryDirectory() as folder:
        loop = transformers.Trainer(theirs, transformers.TrainingArguments(
            folder, max_steps=len(batches), per_device_train_batch_size=1, seed=0,
            learning_rate=stage.lr, lr_scheduler_type="constant", weight_decay=stage.weight_decay,
            max_grad_norm=settings.grad_clip, optim="adamw_torch_fused",
            use_cpu=settings.device == "cpu", bf16=settings.dtype == "bfloat16",
            torch_compile=bool(settings.compile), accelerator_config={"non_blocking": True},
            logging_nan_inf_filter=False, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False),
            train_dataset=Batches(), data_collator=lambda rows: rows[0], callbacks=[Clock()])
        loop.remove_callback(transformers.PrinterCallback)
        loop.model_accepts_loss_kwargs = False  # else it counts tokens in a way that waits
        loss = loop.train().training_loss
    return (times[1] - times[0]) / (len(batches) - WARM), loss


def beside_trainer():
    for title, flags in (("haystack", "--data haystack --warmup none"),
                         ("laptop text", "--data code --warmup none --device cpu")):
        settings, data, stage, _ = a_run(flags)
        flags += f" --lr_schedule constant --lr_ramp 0 --lr {settings.lr}"
        batches = batches_of(data, stage, settings, WARM + 40)
        compare(f"step of {title} beside the Trainer", 1, lambda: nanowarm(flags, batches),
                lambda: trainer(flags, batches))


def bare(model, x, y, settings):
    """Forward, backward and AdamW on one batch, of a model of ours or of nanoGPT's."""
    net = torch.compile(model) if settings.compile else model
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), []
    for step in range(WARM + 30):
        if step == WARM:
            began = now(settings.device)
        with train.autocast(settings):
            loss = net(x, y) / y.numel() if isinstance(model, GPT) else net(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return (now(settings.device) - began) / 30, torch.stack(losses).mean().item()


def beside_nanogpt(folder, batch_size, peak):
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    theirs = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    settings, _ = train.parse(["--data", "code", "--warmup", "none"])
    shapes = [("tiny", 257, 128, 8)]
    if settings.device.startswith("cuda"):
        shapes.append(("gpt2", 50257, 1024, batch_size))
    for size, vocab, T, B in shapes:
        n_layer, n_head, d = parse_size(size)
        x, y = torch.randint(vocab, (2, B, T), device=settings.device)

        def ours():
            torch.manual_seed(0)
            return GPT(GPTConfig(vocab, T, n_layer, n_head, d)).to(settings.device)

        def nanogpt():
            weights = {f"transformer.{name}": p for name, p in ours().state_dict().items()}
            weights["lm_head.weight"] = weights.pop("transformer.lm_head.weight")
            model = theirs.GPT(theirs.GPTConfig(T, vocab, n_layer, n_head, d, 0.0, True))
            model.load_state_dict(weights, strict=False)
            return model.to(settings.device)

        rates = compare(f"{size} with context {T} beside nanoGPT", B * T,
                        lambda: bare(ours(), x, y, settings),
                        lambda: bare(nanogpt(), x, y, settings))
        N = sum(p.numel() for p in ours().parameters()) - T * d
        for name, rate in zip(("nanowarm", "nanoGPT"), rates):
            share = rate * (6 * N + 12 * n_layer * d * T) / peak / 1e12
            print(f"  {name}: {rate:,.0f} tokens/s, {share:.1%} of {peak:g} TFLOP/s")


def data_of_each_kind():
    print(f"{'':18} {'M tokens/s on a core':>22} {'cores that feed a step':>24}")
    for spec in (*RULES, *TASKS, "code", "docs", "math"):
        name = "warmup" if spec in RULES else "train"
        flags = f"--data haystack --warmup {spec}" if spec in RULES else f"--data {spec} --warmup none"
        settings, data, stage, _ = a_run(flags, name)
        makes, steps = [], []
        for _ in range(TURNS):
            began = time.process_time()
            batches = batches_of(data, stage, settings, WARM + 5)
            makes.append((time.process_time() - began) / len(batches))
            steps.append(nanowarm(flags, batches, name)[0])
        rate = stage.batch_size * stage.block_size / min(makes) / 1e6
        print(f"{spec:18} {rate:22.2f} {np.median(makes) / np.median(steps):24.2f}", flush=True)


def seconds_side_by_side(n, steps=150):
    """What the steps of n runs of haystack take at the same time, without how they start."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--data", "haystack",
                                  "--warmup", "none", "--steps", str(steps), "--seed", str(i),
                                  "--eval_every", str(steps), "--out", f"{folder}/{i}"],
                                 stdout=subprocess.DEVNULL) for i in range(n)]
        for run in runs:
            if run.wait():
                sys.exit("a run of haystack failed")
        seconds = []
        for i in range(n):
            log = map(json.loads, Path(folder, str(i), "log.jsonl").read_text().splitlines())
            ends = [e["tokens"] / e["tokens_per_second"] for e in log if "tokens_per_second" in e]
            seconds.append(ends[-1] - ends[0])
    return float(np.mean(seconds))


def eight_at_once():
    one, eight, again = (seconds_side_by_side(n) for n in (1, 8, 1))
    print(f"eight runs of haystack side by side take {2 * eight / (one + again):.2f} times as long "
          "as one")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="trainer, nanogpt, data, jobs (default: all)")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="where nanoGPT's model.py is")
    parser.add_argument("--batch", type=int, default=16, help="rows of gpt2 on a GPU (default 16)")
    parser.add_argument("--peak", type=float, default=989.0, help="of the GPU in bfloat16, TFLOP/s "
                        "(default 989: an H100)")
    args = parser.parse_args()
    print(f"{train.find_device()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for part, measure in (("trainer", beside_trainer), ("data", data_of_each_kind),
                          ("jobs", eight_at_once)):
        if part in (args.parts or [part]):
            measure()
    if args.nanogpt:
        beside_nanogpt(args.nanogpt, args.batch, args.peak)


if __name__ == "__main__":
    main()
