"""How fast it is beside other people's code: ratios, measured by turns on one machine.

    python tests/bench.py                      both parts; takes minutes
    python tests/bench.py trainer              a step beside transformers' Trainer
    python tests/bench.py data                 the rows that a core makes, of each kind
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data import RULES, TASKS, micro_batches
from model import as_hugging_face, find_device

import numpy as np
import torch

WARM, STEPS, TURNS = 5, 20, 5  # steps before the clock starts and after; turns of each side


def now(device):
    """A GPU is waited for at both ends of a block of steps, and nowhere else, on either side."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(title, ours, theirs):
    """Runs both by turns; each returns (seconds a step, mean loss)."""
    turns = [(ours(), theirs()) for _ in range(TURNS)]
    ratios = [their[0] / our[0] for our, their in turns]
    apart = max(abs(our[1] - their[1]) for our, their in turns)
    print(f"{title}: {np.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
          f"{max(ratios):.2f}), losses within {apart:.0e}", flush=True)


def a_run(flags, name="train"):
    """What train.py makes of flags: settings, data, stage and model."""
    settings = train.parse(flags.split())
    data, rule = train.open_data(settings)
    data = rule if name == "warmup" else data
    stage = train.stage_of(settings, name, data)
    model = train.new_model(data, settings.size, settings.tied, stage.dropout, 0)
    return settings, data, stage, model.to(settings.device)


def batches_of(data, stage):
    batches = []
    for step in range(WARM + STEPS):
        rows = range(step * stage.batch_size, (step + 1) * stage.batch_size)
        batches.append(data.train.__getitems__(rows))
    if torch.cuda.is_available():
        batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches]
    return batches


def nanowarm(flags, batches, name="train"):
    """The step of train.py, without what it logs, evaluates and saves."""
    settings, data, stage, model = a_run(flags, name)
    optimizer, losses = train.make_optimizer(model, stage), []
    net, cpu = train.wrapped(model, stage), settings.device == "cpu"
    model.train()
    for step, (x, y) in enumerate(batches):
        if step == WARM:
            began = now(settings.device)
        counted, loss = int((y != -1).sum()), 0.0
        for x, y in micro_batches(x, y, stage.grad_accum, trim=cpu):
            x, y = (each.to(settings.device, non_blocking=True) for each in (x, y))
            with stage.autocast:
                micro_loss = net(x, y) / counted
            micro_loss.backward()
            loss += micro_loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
    return (now(settings.device) - began) / STEPS, torch.stack(losses).mean().item()


def trainer(flags, batches):
    """The same weights and batches in transformers' Trainer, which is told not to wait either."""
    import transformers
    settings, _, stage, model = a_run(flags)
    theirs, times = as_hugging_face(model), {}
    theirs.config.use_cache = False

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for x, y in batches:
                wanted = y.masked_fill(y == -1, -100)
                yield {"input_ids": x, "labels": wanted, "shift_labels": wanted}  # shifted already

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step in (WARM, WARM + STEPS):
                times[state.global_step] = now(settings.device)

    with tempfile.TemporaryDirectory() as folder:
        loop = transformers.Trainer(theirs, transformers.TrainingArguments(
            folder, max_steps=WARM + STEPS, per_device_train_batch_size=1, learning_rate=stage.lr,
            lr_scheduler_type="constant", weight_decay=stage.weight_decay,
            max_grad_norm=settings.grad_clip, optim="adamw_torch_fused",
            use_cpu=settings.device == "cpu", bf16=settings.dtype == "bfloat16",
            torch_compile=bool(settings.compile), accelerator_config={"non_blocking": True},
            logging_nan_inf_filter=False, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False),
            train_dataset=Batches(), data_collator=lambda rows: rows[0], callbacks=[Clock()])
        loop.remove_callback(transformers.PrinterCallback)
        loop.model_accepts_loss_kwargs = False  # else it sends a number to the GPU, and waits
        loss = loop.train().training_loss
    return (times[WARM + STEPS] - times[WARM]) / STEPS, loss


def beside_trainer():
    for name, flags in (("haystack", "--data haystack --warmup none --lr_schedule constant"),
                        ("the laptop's text", "--data code --warmup none --device cpu")):
        _, data, stage, _ = a_run(flags)
        batches = batches_of(data, stage)
        compare(f"a step of {name}, beside the Trainer", lambda: nanowarm(flags, batches),
                lambda: trainer(flags, batches))


def data_of_each_kind():
    """A step needs so many cores for its data that these are made while it goes on."""
    print(f"{'':20}{'M tokens/s of a core':>22}{'cores for a step':>20}")
    for spec in (*RULES, *TASKS, "code", "docs", "math"):
        name, flags = "train", f"--data {spec} --warmup none"
        if spec in RULES:
            name, flags = "warmup", f"--data haystack --warmup {spec}"
        _, data, stage, _ = a_run(flags, name)
        making, steps = [], []
        for _ in range(2):
            began = time.process_time()
            batches = batches_of(data, stage)
            making.append((time.process_time() - began) / len(batches))
            steps.append(nanowarm(flags, batches, name)[0])
        rate = stage.batch_size * stage.block_size / min(making) / 1e6
        print(f"{spec:20}{rate:22.2f}{min(making) / min(steps):20.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["trainer", "data"],
                        help="trainer, data or both")
    args = parser.parse_args()
    print(f"{find_device()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if "trainer" in args.parts:
        beside_trainer()
    if "data" in args.parts:
        data_of_each_kind()


if __name__ == "__main__":
    main()
