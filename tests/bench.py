"""How fast it is beside other people's code: ratios, measured by turns on one machine.

    python tests/bench.py                      both parts; takes minutes
    python tests/bench.py trainer              a step beside the Trainer of transformers[torch]
    python tests/bench.py data                 the rows that a core makes, of each kind
"""
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data import RULES, TASKS
from eval import evaluate, held_out_rows
from model import find_device, load, write_folder

import numpy as np
import torch

STEPS, TURNS = 10, 5  # so many steps before the clock starts, and after; turns of each side
SHORT = f"--log_every {STEPS} --eval_every 1000 --save_every 1000 --eval_rows 64"


def ours(flags):
    """A run of train.py -> (tokens a second, as its log has them, held-out loss)."""
    out = tempfile.mkdtemp(dir=".")
    result = train.run(train.parse(f"{flags} {SHORT} --out {out}".split()))
    *_, last = [entry for entry in map(json.loads, open(f"{out}/log.jsonl")) if "lr" in entry]
    return last["tokens_per_second"], result["val_loss"]


def trainer(flags):
    """The same weights and rows in transformers' Trainer, which is told not to wait either."""
    import transformers
    s, times = train.parse(f"{flags} {SHORT}".split()), []
    data, _ = train.open_data(s)
    stage = train.stage_of(s, "train", data)
    folder = Path(tempfile.mkdtemp(dir="."), "hf")
    write_folder(folder, train.new_model(data, s.size, s.tied, s.dropout, s.seed))
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    model.config.use_cache = False

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for x, y in train.batches_from(data, stage, 0):
                wanted = y.masked_fill(y == -1, -100)
                yield {"input_ids": x, "labels": wanted, "shift_labels": wanted}  # shifted already

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step % STEPS == 0:
                if "cuda" in s.device:  # it is waited for here and nowhere else, as train.py does
                    torch.cuda.synchronize()
                times.append(time.monotonic())

    loop = transformers.Trainer(model, transformers.TrainingArguments(
        "trainer", max_steps=stage.steps, per_device_train_batch_size=1, learning_rate=stage.lr,
        lr_scheduler_type="constant", weight_decay=stage.weight_decay,
        max_grad_norm=stage.grad_clip, optim="adamw_torch_fused", use_cpu=s.device == "cpu",
        bf16=s.dtype == "bfloat16", torch_compile=bool(s.compile),
        accelerator_config={"non_blocking": True}, logging_nan_inf_filter=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False),
        train_dataset=Batches(), data_collator=lambda rows: rows[0], callbacks=[Clock()])
    loop.remove_callback(transformers.PrinterCallback)
    loop.model_accepts_loss_kwargs = False  # else it sends a number to the GPU, and waits
    loop.train()
    loop.save_model("trainer")
    model, _ = load("trainer", s.device)
    result = evaluate(model, held_out_rows(data, s.eval_rows), s.device, stage.autocast)
    return STEPS * stage.step_tokens / (times[1] - times[0]), result["loss"]


def beside_trainer():
    for data in ("haystack", "code --preset laptop"):
        flags = (f"--data {data} --warmup none --steps {2 * STEPS} --lr_schedule constant "
                 "--lr_ramp 0")
        turns = [(ours(flags), trainer(flags)) for _ in range(TURNS)]
        ratios = [our[0] / their[0] for our, their in turns]
        apart = max(abs(our[1] - their[1]) for our, their in turns)
        print(f"a step of {data}: {np.median(ratios):.2f} times as fast as the Trainer's "
              f"({min(ratios):.2f} to {max(ratios):.2f}), losses within {apart:.0e}", flush=True)


def data_of_each_kind():
    """On a GPU it never waits, as long as its workers make more than a run takes."""
    print(f"{'M tokens a second':20}{'a core makes':>15}{'a run takes':>15}")
    for spec in (*RULES, *TASKS, "code", "docs", "math"):
        flags = f"--data {spec} --warmup none --steps {2 * STEPS}"
        if spec in RULES:
            flags = f"--data haystack --steps 0 --warmup {spec} --warmup_steps {2 * STEPS}"
        s = train.parse(flags.split())
        data, rule = train.open_data(s)
        stage = train.stage_of(s, "warmup" if rule else "train", rule or data)
        began = time.process_time()
        for step in range(STEPS):
            rows = range(step * stage.batch_size, (step + 1) * stage.batch_size)
            (rule or data).train.__getitems__(rows)
        made = STEPS * stage.step_tokens / (time.process_time() - began)
        taken, _ = ours(flags)
        print(f"{spec:20}{made / 1e6:15.2f}{taken / 1e6:15.2f}", flush=True)


PARTS = {"trainer": beside_trainer, "data": data_of_each_kind}

if __name__ == "__main__":
    print(f"{find_device()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    train.say = lambda line: None  # what it says of each run is left out
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
