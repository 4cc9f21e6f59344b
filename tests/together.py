"""Many small runs at once: settings of experiments on tasks, with all their seeds.

    python tests/together.py warmups --results results --only "recall of 15 | dyck"
    python tests/together.py runs --results results --only "recall of 15 | dyck"

A model of 15,000 parameters leaves a GPU idle, and hundreds of runs of one take a CPU days. Here
models of one shape are stacked, and trained side by side, each with its weights, rows and rates.
The folders written are those that analyze.py would make; only the order of sums in a step differs
from train.py, which test_together.py holds this to. It neither resumes nor takes text or --sharpen.
"""
import argparse
import contextlib
import copy
import json
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, see there
from analyze import (EXPERIMENTS, TASK_COLUMNS, folder_of, make_warmup, missing, settings_in,
                     with_checkpoints)
from data import UserError
from eval import evaluate, first_rows, held_out_rows
from model import save

import torch
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, Dataset


class Member:
    """A run, or with warm=True a warm-up, as train.py has it before its first step."""

    def __init__(self, flags, seed, out, warm):
        s = self.s = train.parse([*shlex.split(flags), "--seed", str(seed), "--out", str(out)])
        self.out, self.warm, self.began = Path(out), warm, time.monotonic()
        self.task, rule = train.open_data(s)
        self.data = rule if warm else self.task
        self.fingerprint = [each.fingerprint() for each in (self.task, rule) if each]
        self.model = train.new_model(self.task, s.size, s.tied, s.dropout, seed)
        self.warmup, self.warmed = train.start_from_checkpoints(self.model, s)
        self.out.mkdir(exist_ok=True)
        train.open_run(self.out, s, self.fingerprint, self.warmup)
        if warm:
            self.target = self.model
            self.model = train.new_model(rule, s.size, True, 0.0, seed + 2 ** 32)
        self.stage = train.stage_of(s, "warmup" if warm else "train", self.data)
        assert not self.stage.dropout and not self.stage.sharpen and s.dtype == "float32"
        self.log, self.passed, self.ended = [], 0, False
        self.before = self.evaluation(copy.deepcopy(self.model), self.data) if warm else None

    def note(self, step, loss, accuracy):
        """Notes an evaluation, and returns whether the run ends here, see --stop_at."""
        self.log.append({"stage": "train", "step": step, "tokens": step * self.stage.step_tokens,
                         "val_loss": loss, "val_accuracy": accuracy})
        good = step and self.s.stop_at and accuracy >= self.s.stop_at
        self.passed = self.passed + 1 if good else 0
        return self.passed == 2 or step == self.stage.steps

    def evaluation(self, model, data):
        rows = held_out_rows(data, self.s.eval_rows)
        return evaluate(model.to(self.s.device), rows, self.s.device)

    def finish(self, step, weights):
        """Writes what train.py would have in the run's folder. weights: all in one row."""
        s, warmed, self.ended = self.s, self.warmed, True
        vector_to_parameters(weights, self.model.parameters())
        done = train.Progress(step, step * self.stage.step_tokens, time.monotonic() - self.began,
                              self.before, self.evaluation(self.model, self.data))
        source = {"spec": self.data.spec, "tokenizer": None, "seed": s.seed,
                  "eval_rows": s.eval_rows}
        save(self.out / ("warmup.pt" if self.warm else "ckpt.pt"), self.model.cpu(), source=source,
             stage=self.stage.name, **vars(done))
        if self.warm:
            train.move(self.model, self.target, train.parse_parts(s.transfer), s)
            warmed, first = done, self.evaluation(self.target, self.task)
            done = train.Progress(result=first)
            self.note(0, first["loss"], first["accuracy"])
        lines = [json.dumps(entry) + "\n" for entry in self.log]
        (self.out / "log.jsonl").write_text("".join(lines))
        train.write_result(self.out, s, self.fingerprint, self.warmup, warmed, done)


class Steps(Dataset):
    """Item i: the rows of step i, of every data in turn: x, y, each (data, rows, T)."""

    def __init__(self, datas, batch_size):
        self.datas, self.batch_size = datas, batch_size

    def __getitem__(self, step):
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        xs, ys = zip(*(data.train.__getitems__(rows) for data in self.datas))
        return torch.stack(xs), torch.stack(ys)


def stacked_losses(model):
    """Of models as this one, with their parameters in the rows of flat (E, P): a function of flat,
    x and y (E, B, T) -> the loss of each (E,), and how many tokens it has right (E,)."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def of_one(parameters, x, y):
        pieces = parameters.split([shape.numel() for shape in shapes.values()])
        pieces = {name: piece.view(shape) for piece, (name, shape) in zip(pieces, shapes.items())}
        logits, wanted = functional_call(model, pieces, x).flatten(0, 1), y.flatten()
        loss = F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")
        return loss / (wanted != -1).sum(), (logits.argmax(-1) == wanted).sum()
    return vmap(of_one)


def adamw(flat, grad, m, v, lr, decay, decayed, bias1, bias2):
    """A step of torch's AdamW for each model, with its gradient's norm clipped to 1. In place."""
    norm = grad.norm(dim=1, keepdim=True)
    grad = grad * (1 / (norm + 1e-6)).clamp_max(1)
    m.lerp_(grad, 0.1)
    v.mul_(0.999).addcmul_(grad, grad, value=0.001)
    flat.mul_(1 - lr * decay * decayed)
    flat.sub_(lr / bias1 * m / (v.sqrt() / bias2.sqrt() + 1e-8))
    return norm


@sdpa_kernel(SDPBackend.MATH)  # which vmap takes on any device
def train_together(members, device, workers):
    """Trains the members, of one shape, and finishes each as it ends."""
    warm, data = members[0].warm, {}
    for member in members:  # those of one seed share their rows
        data.setdefault((member.data.spec, member.s.seed), member.data)
    which = torch.tensor([[*data].index((m.data.spec, m.s.seed)) for m in members]).to(device)
    stages, data = [m.stage for m in members], list(data.values())
    steps, B, every = max(s.steps for s in stages), stages[0].batch_size, members[0].s.eval_every
    flat = torch.stack([parameters_to_vector(m.model.parameters()).detach() for m in members])
    flat = flat.to(device).requires_grad_()
    decayed = [torch.full([p.numel()], float(p.dim() >= 2)) for p in members[0].model.parameters()]
    decayed = torch.cat(decayed).to(device)
    rates = [[train.lr_at(stage, i) if i < stage.steps else 0.0 for i in range(steps)]
             for stage in stages]
    rates = torch.tensor(rates).T.contiguous()[..., None].to(device)
    decay = torch.tensor([[stage.weight_decay] for stage in stages]).to(device)
    powers = torch.arange(1, steps + 1, dtype=torch.float64)
    bias1, bias2 = ((1 - beta ** powers).float().to(device) for beta in (0.9, 0.999))
    losses, update = stacked_losses(copy.deepcopy(members[0].model).to(device)), adamw
    if device == "cuda":
        losses, update = torch.compile(losses), torch.compile(adamw)
    m, v = torch.zeros_like(flat), torch.zeros_like(flat)
    held_out = zip(*(first_rows(each, members[0].s.eval_rows) for each in data))
    held_out = [] if warm else [torch.stack(each).to(device) for each in held_out]

    @torch.no_grad()
    def evaluate():
        """[losses, accuracies], of each member, in parts as large as a step."""
        sums = torch.zeros(3, len(members), device=device, dtype=torch.float64)
        for x, y in zip(*(each.split(B, dim=1) for each in held_out)):
            x, y = x[which], y[which]
            loss, right = losses(flat, x, y)
            n = (y != -1).sum((1, 2))
            sums += torch.stack([loss * n, right, n])
        return (sums[:2] / sums[2]).tolist()

    def end(step):
        """Evaluates, where it is time to, and finishes the members that end here."""
        result = None if warm else evaluate()
        for i, member in enumerate(members):
            last = member.stage.steps == step
            if not warm and step <= member.stage.steps:
                last = member.note(step, result[0][i], result[1][i])
            if last and not member.ended:
                member.finish(step, flat.data[i].clone())

    loader = iter(DataLoader(Steps(data, B), batch_size=None, sampler=range(steps),
                             num_workers=workers, pin_memory=device == "cuda",
                             prefetch_factor=4 if workers else None))
    if not warm:
        end(0)
    for step in range(steps):
        x, y = (each.to(device, non_blocking=True)[which] for each in next(loader))
        loss, _ = losses(flat, x, y)
        grad, = torch.autograd.grad(loss.sum(), flat)
        norm = update(flat.data, grad, m, v, rates[step], decay, decayed, bias1[step], bias2[step])
        done = step + 1
        if not warm and done % every == 0 or done in {stage.steps for stage in stages}:
            end(done)
            live = [i for i, member in enumerate(members) if not member.ended]
            if not live:
                break
            if len(live) < len(members):  # the others are not computed any longer
                members = [members[i] for i in live]
                flat, m, v = flat.data[live].requires_grad_(), m[live], v[live]
                which, rates, decay = which[live], rates[:, live], decay[live]
        if done % 500 == 0:
            assert norm.isfinite().all()
            print(f"{members[0].data.spec} x {len(members)}: step {done:,} of {steps:,}, loss "
                  f"{loss.mean().item():.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("warmups", "runs"))
    parser.add_argument("--only", required=True, help="as analyze.py has it, of all experiments")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.results.mkdir(exist_ok=True)
    results, settings = args.results.resolve(), []
    for name in EXPERIMENTS:
        with contextlib.suppress(UserError):  # it has none of these
            settings += settings_in(name, args.only)
    settings = [each for each in settings
                if each.column in TASK_COLUMNS and "--sharpen" not in each.train]
    members, warmups, groups = [], {}, {}
    with contextlib.chdir(results):
        for folder, (setting, seed) in missing(settings, args.seeds, results).items():
            for flags, of in setting.warmup_runs(seed):
                warmups[folder_of(of, flags)] = flags, of
            if args.stage == "runs":
                flags = f"{with_checkpoints(setting, seed, results)} --device {args.device}"
                members.append(Member(flags, seed, folder, False))
                Path(f"{folder}.changed.pt").unlink(missing_ok=True)
        for folder, (flags, seed) in warmups.items():
            if not Path(folder, "result.json").exists():
                members.append(Member(f"{flags} --device {args.device}", seed, folder, True))
        for member in members:
            shape = (repr(member.model.config), member.stage.batch_size, member.stage.steps,
                     member.warm, member.task.spec)
            groups.setdefault(shape, []).append(member)
        for group in groups.values():
            train_together(group, args.device, args.workers)
        for flags, seed in warmups.values():
            make_warmup(flags, seed, results)  # is there, and is asked whether it was learned


if __name__ == "__main__":
    main()
