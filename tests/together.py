"""Many small runs at once: settings of experiments on tasks, with all their seeds.

    python tests/together.py --only "recall of 15 | dyck" --results results

A model of 15,000 parameters leaves a GPU idle, and hundreds of runs of one take a CPU days. Here
models of one shape are stacked, and trained side by side, each with its weights, rows and rates.
Each ends as a checkpoint that train.py takes up: it finds all steps done, and writes the result.
Only the order of sums in a step differs from train.py, which test_together.py holds this to. Text
and --sharpen are left out.
"""
import argparse
import contextlib
import copy
import json
import os
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, see there
from analyze import (EXPERIMENTS, TASK_COLUMNS, folder_of, make_warmup, missing, settings_in,
                     with_checkpoints)
from data import UserError
from eval import evaluate, held_out_rows
from model import save

import torch
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import Dataset


class Member:
    """The first stage of a run (a warm-up, where it makes one), as train.py has it at step 0."""

    def __init__(self, flags, seed, out):
        words = [*shlex.split(flags), "--seed", str(seed), "--out", str(out), "--resume"]
        self.s = train.parse(words)
        # A run up to where it would train, which ends it; what it asked to train is the member.
        with patch("train.train", side_effect=InterruptedError) as asked:
            with contextlib.suppress(InterruptedError):
                train.run(self.s)
        self.model, self.data, self.stage, self.file, self.fingerprint, self.warmed = (
            asked.call_args.args)
        stage, self.log, self.before, self.passed = self.stage, [], None, 0
        assert not stage.dropout and not stage.sharpen and stage.dtype == "float32"
        self.held_out, self.began = held_out_rows(self.data, stage.eval_rows), time.monotonic()

    def evaluate(self, step, weights):
        """Evaluates its weights, all in one row (P,), and saves them where the stage is over."""
        stage, at = self.stage, {"step": step, "tokens": step * self.stage.step_tokens}
        vector_to_parameters(weights.clone(), self.model.parameters())
        result = evaluate(self.model.to(stage.device), self.held_out, stage.device)
        self.before = self.before or result
        self.log.append({"stage": stage.name, **at, "val_loss": result["loss"],
                         "val_accuracy": result["accuracy"]})
        good = step and result["accuracy"] >= stage.stop_at
        self.passed = self.passed + 1 if good else 0
        self.over = step == stage.steps or self.passed == 2
        if self.over:
            source = {"spec": self.data.spec, "seed": stage.seed, "eval_rows": stage.eval_rows}
            save(self.file, self.model, optimizer={"state": {}}, scaler={}, stage=stage.name,
                 source=source, fingerprint=self.fingerprint, warmed=vars(self.warmed), **at,
                 seconds=time.monotonic() - self.began, before=self.before, result=result,
                 passed=self.passed)
            lines = [json.dumps(entry) + "\n" for entry in self.log]
            self.file.with_name("log.jsonl").write_text("".join(lines))


class Stacked(Dataset):
    """The same rows of several data at once: x and y are (data, rows, T)."""

    def __init__(self, datas):
        self.datas = datas

    def __getitems__(self, rows):
        xs, ys = zip(*(data.train.__getitems__(rows) for data in self.datas))
        return torch.stack(xs), torch.stack(ys)


def stacked_loss(model):
    """Of models like this one, with their parameters in the rows of flat (E, P): a function of
    flat, x and y (E, B, T) -> the loss of each (E,)."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def of_one(row, x, y):
        pieces = zip(shapes.items(), row.split(sizes))
        parameters = {name: piece.view(shape) for (name, shape), piece in pieces}
        # Without y: the sum that the model makes itself picks what counts, which vmap cannot.
        logits = functional_call(model, parameters, x).flatten(0, 1)
        loss = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction="sum")
        return loss / (y != -1).sum()
    return vmap(of_one)


def adamw(flat, grad, mean, square, lr, decay, step):
    """A step of torch's AdamW for each model, with its gradient's norm clipped to 1. In place.
    step: from 1 on, in float64, in which 1 - 0.999 ** step is exact enough."""
    grad = grad / (grad.norm(dim=1, keepdim=True) + 1e-6).clamp_min(1)
    mean.lerp_(grad, 0.1)
    square.mul_(0.999).addcmul_(grad, grad, value=0.001)
    flat.mul_(1 - lr * decay)
    spread = (square / (1 - 0.999 ** step)).sqrt() + 1e-8
    flat.sub_(lr / (1 - 0.9 ** step) * mean / spread)


@sdpa_kernel(SDPBackend.MATH)  # which vmap takes on any device
def train_together(members):
    """Trains members whose models and stages are alike but for rates, and saves each at its end."""
    model, stage = copy.deepcopy(members[0].model), members[0].stage
    data = {(m.data.spec, m.s.seed): m.data for m in members}  # those of one seed share their rows
    which = torch.tensor([[*data].index((m.data.spec, m.s.seed)) for m in members])
    rows = train.batches_from(SimpleNamespace(train=Stacked([*data.values()])), stage, 0)
    rates = torch.tensor([[[train.lr_at(m.stage, step)] for m in members]
                          for step in range(stage.steps)])
    flat = torch.stack([parameters_to_vector(m.model.parameters()).detach() for m in members])
    decay = torch.cat([torch.full([p.numel()], stage.weight_decay if p.dim() >= 2 else 0.0)
                       for p in model.parameters()])
    steps = torch.arange(1, stage.steps + 1, dtype=torch.float64)
    which, rates, flat, decay, steps = (
        each.to(stage.device) for each in (which, rates, flat, decay, steps))
    mean, square = torch.zeros_like(flat), torch.zeros_like(flat)
    loss_of, update = stacked_loss(model.to(stage.device)), adamw
    if stage.compile:
        loss_of, update = torch.compile(loss_of), torch.compile(adamw)

    for step in range(stage.steps + 1):
        if step == stage.steps or step % stage.eval_every == 0:
            for member, weights in zip(members, flat):
                member.evaluate(step, weights)
            live = [i for i, member in enumerate(members) if not member.over]
            if not live:
                return
            members = [members[i] for i in live]  # the others are not computed any longer
            flat, mean, square, which = flat[live], mean[live], square[live], which[live]
            rates = rates[:, live]
        x, y = (each.to(stage.device, non_blocking=True)[which] for each in next(rows))
        flat.requires_grad_()
        grad, = torch.autograd.grad(loss_of(flat, x, y).sum(), flat)
        flat = flat.detach()
        update(flat, grad, mean, square, rates[step], decay, steps[step])


def run_together(members):
    """Trains them, those that are alike together, and lets train.py end each run."""
    groups = {}
    for member in members:
        if not member.file.exists():  # else train.py goes on with it
            stage = member.stage
            alike = (member.model.config, stage.name, stage.steps, stage.batch_size,
                     stage.eval_every, stage.weight_decay)
            groups.setdefault(repr(alike), []).append(member)
    for group in groups.values():
        train_together(group)
    for member in members:
        train.run(member.s)


def deaf(worker=None):
    """In place of train.listen: Ctrl-C is to end this at once."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", required=True, help="as analyze.py has it, of all experiments")
    parser.add_argument("--seeds", type=int, help="how many (default: as planned)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    settings = []
    for name in EXPERIMENTS:
        with contextlib.suppress(UserError):  # it has none of these
            settings += settings_in(name, args.only)
    if not settings:
        parser.error(f"no experiment has settings {args.only}")
    settings = [each for each in settings
                if each.column in TASK_COLUMNS and "--sharpen" not in each.train]
    train.listen = deaf
    args.results.mkdir(exist_ok=True)
    os.chdir(args.results)
    runs = missing(settings, args.seeds, Path())
    warmups = {folder_of(seed, flags): (flags, seed) for setting, of in runs.values()
               for flags, seed in setting.warmup_runs(of)}
    run_together([Member(*warmup, folder) for folder, warmup in warmups.items()
                  if not Path(folder, "result.json").exists()])
    for warmup in warmups.values():
        make_warmup(*warmup, Path())  # is there, and is asked what it learned
    run_together([Member(with_checkpoints(setting, seed, Path()), seed, folder)
                  for folder, (setting, seed) in runs.items()])
    for folder in runs:
        Path(f"{folder}.changed.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
