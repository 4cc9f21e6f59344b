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
import math
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, see there
from analyze import (EXPERIMENTS, TASK_COLUMNS, folder_of, make_warmup, missing,
                     part_of_experiment, with_checkpoints)
from data import UserError
from eval import first_rows, held_out_rows
from model import save

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class Member:
    """A run, or with warm=True a warm-up, as train.py has it before its first step."""

    def __init__(self, flags, seed, out, warm):
        s = self.s = train.parse([*shlex.split(flags), "--seed", str(seed), "--out", str(out)])
        self.out, self.warm, self.began = Path(out), warm, time.monotonic()
        self.task, rule = train.open_data(s)
        self.data = rule if warm else self.task
        self.fingerprint = train.check_data(self.task, rule, s)
        self.model = train.new_model(self.task, s.size, s.tied, s.dropout, seed)
        self.warmed = train.start_from_checkpoints(self.model, s)
        self.out.mkdir(exist_ok=True)
        train.open_run(self.out, s, self.fingerprint, self.warmed["spec"])
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
        return train.evaluation(model.to(self.s.device), rows, data, self.s)

    def finish(self, step, weights):
        """Writes what train.py would have in the run's folder."""
        s, warmed, self.ended = self.s, self.warmed, True
        self.model.load_state_dict(weights, strict=False)  # a tied head is no parameter of its own
        done = {"step": step, "tokens": step * self.stage.step_tokens, "before": self.before,
                "seconds": time.monotonic() - self.began,
                "result": self.evaluation(self.model, self.data)}
        source = {"spec": self.data.spec, "tokenizer": None, "seed": s.seed,
                  "eval_rows": s.eval_rows}
        save(self.out / ("warmup.pt" if self.warm else "ckpt.pt"), self.model.cpu(), source=source,
             stage=self.stage.name, **done)
        if self.warm:
            train.move(self.model, self.target, train.parse_parts(s.transfer), s)
            warmed, first = done | {"spec": s.warmup}, self.evaluation(self.target, self.task)
            done = {"result": first, "tokens": 0, "seconds": 0.0}
            self.note(0, first["loss"], first["accuracy"])
        lines = [json.dumps(entry) + "\n" for entry in self.log]
        (self.out / "log.jsonl").write_text("".join(lines))
        train.write_result(self.out, s, self.fingerprint, warmed, done)


class Steps(Dataset):
    """Item i: the rows of step i, of every data in turn: x, y, each (data, rows, T)."""

    def __init__(self, datas, batch_size):
        self.datas, self.batch_size = datas, batch_size

    def __getitem__(self, step):
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        xs, ys = zip(*(data.train.__getitems__(rows) for data in self.datas))
        return torch.stack(xs).int(), torch.stack(ys).int()


class Stack:
    """E models of one shape; `flat` (E, P) has a model's parameters in each row."""

    def __init__(self, members, device):
        self.config = members[0].model.config
        self.shapes = {name: p.shape for name, p in members[0].model.named_parameters()}
        self.flat = torch.stack([torch.cat([p.detach().flatten() for p in m.model.parameters()])
                                 for m in members]).to(device)
        decayed = [torch.full([shape.numel()], float(len(shape) >= 2))
                   for shape in self.shapes.values()]
        self.decayed = torch.cat(decayed).to(device)
        self.first = (torch.arange(len(members)) * self.config.vocab_size).to(device)

    def parts(self, flat):
        pieces = flat.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {name: piece.view(-1, *shape)
                for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def logits(self, flat, x, place):
        """x (E, B, T) -> logits (E, N, vocab). place (E, B): the one that counts in a row, or None,
        where N is all B * T."""
        p, c = self.parts(flat), self.config
        E, B, T = x.shape
        C, H = c.n_embd, c.n_head

        def linear(x, name):
            x = x.reshape(E, -1, x.shape[-1])
            return torch.baddbmm(p[f"{name}.bias"][:, None], x, p[f"{name}.weight"].mT)

        def norm(x, name):
            y = F.layer_norm(x.reshape(E, -1, C), (C,))
            return y * p[f"{name}.weight"][:, None] + p[f"{name}.bias"][:, None]

        tokens = p["wte.weight"].reshape(-1, C)
        h = F.embedding(x + self.first[:, None, None], tokens) + p["wpe.weight"][:, None, :T]
        h = h.reshape(E, B, T, C)
        for i in range(c.n_layer):
            q, k, v = (linear(norm(h, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
                       .view(E * B, T, 3, H, C // H).permute(2, 0, 3, 1, 4))
            if place is not None and i == c.n_layer - 1:  # nothing reads the others
                where = place.reshape(-1, 1, 1, 1).expand(-1, H, 1, C // H)
                scores = (q.gather(2, where) * k).sum(-1) / math.sqrt(C // H)
                late = torch.arange(T, device=x.device) > place.reshape(-1, 1, 1)
                y = (scores.masked_fill(late, -math.inf).softmax(-1)[..., None] * v).sum(2)
                h = h.gather(2, place[..., None, None].expand(-1, -1, 1, C))
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            h = h + linear(y.reshape(E, -1, C), f"h.{i}.attn.c_proj").view(h.shape)
            a = F.gelu(linear(norm(h, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
            h = h + linear(a, f"h.{i}.mlp.c_proj").view(h.shape)
        head = p["wte.weight" if c.tied else "lm_head.weight"]
        return torch.bmm(norm(h, "ln_f"), head.mT)

    def losses(self, flat, x, y, one):
        """-> loss of each model (E,), and how many answer tokens it has right (E,). one: a row has
        one answer token."""
        counts = y != -1
        place = counts.int().argmax(2) if one else None
        logits = self.logits(flat, x, place)
        wanted = (y.gather(2, place[..., None]) if one else y).reshape(len(y), -1).long()
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1,
                               reduction="none").view(wanted.shape)
        right = (logits.argmax(-1) == wanted) & (wanted != -1)
        return each.sum(1) / counts.sum((1, 2)), right.sum(1)


def adamw(flat, grad, m, v, lr, decay, decayed, bias1, bias2):
    """A step of torch's AdamW for each model, with its gradient's norm clipped to 1. In place."""
    norm = grad.norm(dim=1, keepdim=True)
    grad = grad * (1 / (norm + 1e-6)).clamp_max(1)
    m.lerp_(grad, 0.1)
    v.mul_(0.999).addcmul_(grad, grad, value=0.001)
    flat.mul_(1 - lr * decay * decayed)
    flat.sub_(lr / bias1 * m / (v.sqrt() / bias2.sqrt() + 1e-8))
    return norm


def train_together(members, device, workers):
    """Trains the members, of one shape, and finishes each as it ends."""
    warm, data = members[0].warm, {}
    for member in members:  # those of one seed share their rows
        data.setdefault((member.data.spec, member.s.seed), member.data)
    which = torch.tensor([[*data].index((m.data.spec, m.s.seed)) for m in members]).to(device)
    stages, data = [m.stage for m in members], list(data.values())
    steps, B, every = max(s.steps for s in stages), stages[0].batch_size, members[0].s.eval_every
    stack = Stack(members, device)
    one = bool((data[0].train.__getitems__(range(64))[1] != -1).sum(1).eq(1).all())
    rates = [[train.lr_at(stage, i) if i < stage.steps else 0.0 for i in range(steps)]
             for stage in stages]
    rates = torch.tensor(rates).T.contiguous()[..., None].to(device)
    decay = torch.tensor([[stage.weight_decay] for stage in stages]).to(device)
    powers = torch.arange(1, steps + 1, dtype=torch.float64)
    bias1, bias2 = ((1 - beta ** powers).float().to(device) for beta in (0.9, 0.999))
    losses, update = stack.losses, adamw
    if device == "cuda":
        losses, update = torch.compile(losses), torch.compile(adamw)
    flat = stack.flat.requires_grad_()
    m, v = torch.zeros_like(flat), torch.zeros_like(flat)
    held_out = zip(*(first_rows(each, members[0].s.eval_rows) for each in data))
    held_out = [] if warm else [torch.stack(each).to(device) for each in held_out]

    @torch.no_grad()
    def evaluate():
        """[losses, accuracies], of each member, in parts as large as a step."""
        sums = torch.zeros(3, len(members), device=device, dtype=torch.float64)
        for x, y in zip(*(each.split(B, dim=1) for each in held_out)):
            x, y = x[which].int(), y[which].int()
            loss, right = losses(flat, x, y, one)
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
                weights = {name: p[i].clone() for name, p in stack.parts(flat.data).items()}
                member.finish(step, weights)

    loader = iter(DataLoader(Steps(data, B), batch_size=None, sampler=range(steps),
                             num_workers=workers, pin_memory=device == "cuda",
                             prefetch_factor=4 if workers else None))
    if not warm:
        end(0)
    for step in range(steps):
        x, y = (each.to(device, non_blocking=True)[which] for each in next(loader))
        loss, _ = losses(flat, x, y, one)
        grad, = torch.autograd.grad(loss.sum(), flat)
        norm = update(flat.data, grad, m, v, rates[step], decay, stack.decayed, bias1[step],
                      bias2[step])
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
                stack.first = stack.first[:len(live)]
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
            settings += part_of_experiment(name, "quick", args.only)
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
