"""Many small runs at once: settings of experiments on tasks, with all their seeds.

    python tests/together.py warmups --results results --only "recall of 15 | dyck"
    python tests/together.py runs --results results --only "recall of 15 | dyck"

A model of 15,000 parameters leaves a GPU idle, and hundreds of runs of one take a CPU days. Here
models of one shape are stacked, and trained side by side, each with its weights, rows and rates.
The folders written are those that analyze.py would make; only the order of sums in a step differs
from train.py, which test_together.py holds this to. It neither resumes nor takes text. On a CPU it
saves little: --device cpu --workers 0.
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
from analyze import (EXPERIMENTS, TASK_COLUMNS, folder_of, make_warmup, missing, settings_in,
                     with_checkpoints)
from eval import first_rows, held_out_rows
from model import save

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class Member:
    """A run, or with warm=True a warm-up, as train.py has it before its first step."""

    def __init__(self, flags, seed, out, warm):
        words = [*shlex.split(flags), "--seed", str(seed), "--out", str(out), "--resume"]
        self.s, _ = train.parse(words)
        self.out, self.warm = Path(out), warm
        data, rule = train.open_data(self.s)
        self.fingerprint = train.check_data(data, rule, self.s)
        self.task, self.data = data, rule if warm else data
        self.model = train.new_model(data, self.s.size, self.s.tied, self.s.dropout, seed)
        self.warmed = train.start_from_checkpoints(self.model, self.s)
        self.out.mkdir(exist_ok=True)
        train.open_run(self.out, self.s, self.fingerprint, self.warmed["spec"])
        if warm:
            self.target = self.model
            self.model = train.new_model(rule, self.s.size, True, 0.0, seed + 2 ** 32)
        self.stage = train.stage_of(self.s, "warmup" if warm else "train", self.data)
        assert not self.stage.dropout and self.s.dtype == "float32"
        self.log, self.passed, self.ended, self.before = [], 0, None, None
        self.began = time.monotonic()

    def note(self, step, loss, accuracy):
        """Notes an evaluation, and returns whether the run ends here, see --stop_at."""
        self.log.append({"stage": self.stage.name, "step": step, "val_loss": loss,
                         "tokens": step * self.stage.step_tokens, "val_accuracy": accuracy})
        good = step and self.s.stop_at and accuracy >= self.s.stop_at
        self.passed = self.passed + 1 if good else 0
        return self.passed == 2 or step == self.stage.steps

    def evaluation(self, model, data):
        rows = held_out_rows(data, self.s.eval_rows)
        return train.evaluation(model.to(self.s.device), rows, data, self.s)

    def finish(self, step, weights):
        """Writes what train.py would have in the run's folder."""
        s, self.ended = self.s, step
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
            self.log = [{"stage": "train", "step": 0, "tokens": 0, "val_loss": first["loss"],
                         "val_accuracy": first["accuracy"]}]
        else:
            warmed = self.warmed
        with open(self.out / "log.jsonl", "w") as file:
            file.writelines(f"{json.dumps(entry)}\n" for entry in self.log)
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

    def logits(self, flat, x, place, watch):
        """x (E, B, T) -> logits (E, N, vocab), and with watch the attention of each layer. place
        (E, B): the one that counts in a row, or None, where N is all B * T."""
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
        h, maps = h.reshape(E, B, T, C), []
        for i in range(c.n_layer):
            q, k, v = (linear(norm(h, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
                       .view(E * B, T, 3, H, C // H).permute(2, 0, 3, 1, 4))
            if place is not None and i == c.n_layer - 1:  # nothing reads the others
                where = place.reshape(-1, 1, 1, 1).expand(-1, H, 1, C // H)
                scores = (q.gather(2, where) * k).sum(-1) / math.sqrt(C // H)
                late = torch.arange(T, device=x.device) > place.reshape(-1, 1, 1)
                y = (scores.masked_fill(late, -math.inf).softmax(-1)[..., None] * v).sum(2)
                h = h.gather(2, place[..., None, None].expand(-1, -1, 1, C))
            elif watch:
                scores = q @ k.mT / math.sqrt(C // H)
                future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
                maps.append(scores.masked_fill(future, -math.inf).softmax(-1))
                y = (maps[-1] @ v).transpose(1, 2)
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            h = h + linear(y.reshape(E, -1, C), f"h.{i}.attn.c_proj").view(h.shape)
            a = F.gelu(linear(norm(h, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
            h = h + linear(a, f"h.{i}.mlp.c_proj").view(h.shape)
        head = p["wte.weight" if c.tied else "lm_head.weight"]
        return torch.bmm(norm(h, "ln_f"), head.mT), maps

    def losses(self, flat, x, y, sharpen, one):
        """-> loss of each model (E,), the penalty of --sharpen in it, and right answers (E,)."""
        counts = y != -1
        place = counts.int().argmax(2) if one else None
        logits, maps = self.logits(flat, x, place, sharpen is not None)
        wanted = (y.gather(2, place[..., None]) if one else y).reshape(len(y), -1).long()
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1,
                               reduction="none").view(wanted.shape)
        loss = each.sum(1) / counts.sum((1, 2))
        if sharpen is not None:
            entropy = train.attention_entropy(maps, y.flatten(0, 1)).view(x.shape[:2])
            loss = loss + sharpen * entropy.mean(1)
        return loss, ((logits.argmax(-1) == wanted) & (wanted != -1)).sum(1)


def adamw(flat, grad, m, v, lr, decay, decayed, bias1, bias2):
    """A step of torch's AdamW for each model, with its gradient's norm clipped to 1. In place."""
    norm = grad.norm(dim=1, keepdim=True)
    grad = grad * (1 / (norm + 1e-6)).clamp_max(1)
    m.lerp_(grad, 0.1)
    v.mul_(0.999).addcmul_(grad, grad, value=0.001)
    flat.mul_(1 - lr * decay * decayed)
    flat.sub_(lr / bias1 * m / (v.sqrt() / bias2.sqrt() + 1e-8))
    return norm


def train_together(members, device, workers, compiled):
    """Trains the members, of one shape, and finishes each as it ends."""
    keys = {}
    for member in members:
        keys.setdefault((member.data.spec, member.s.seed), member.data)
    which = torch.tensor([list(keys).index((m.data.spec, m.s.seed)) for m in members]).to(device)
    stages, datas = [m.stage for m in members], list(keys.values())
    steps, B, every = max(s.steps for s in stages), stages[0].batch_size, members[0].s.eval_every
    stack = Stack(members, device)
    one = bool((datas[0].train.__getitems__(range(64))[1] != -1).sum(1).eq(1).all())
    sharpen = torch.tensor([0.0 if m.warm else m.s.sharpen for m in members])
    sharpen = sharpen.to(device) if sharpen.any() else None
    one = one and sharpen is None
    table = [[train.lr_at(stage, i) if i < stage.steps else 0.0 for i in range(steps)]
             for stage in stages]
    table = torch.tensor(table).T.contiguous()[..., None].to(device)
    decay = torch.tensor([[stage.weight_decay] for stage in stages]).to(device)
    powers = torch.arange(1, steps + 1, dtype=torch.float64)
    bias1, bias2 = ((1 - beta ** powers).float().to(device) for beta in (0.9, 0.999))
    losses, update = stack.losses, adamw
    if compiled:
        losses, update = torch.compile(losses), torch.compile(adamw)
    flat = stack.flat.requires_grad_()
    m, v = torch.zeros_like(flat), torch.zeros_like(flat)
    held_out = None
    if not members[0].warm:
        rows = [first_rows(data, members[0].s.eval_rows) for data in datas]
        held_out = [torch.stack(each).to(device).unflatten(1, (-1, B)) for each in zip(*rows)]
    seen = held_out[1].ne(-1).sum((1, 2, 3)) if held_out else None

    @torch.no_grad()
    def evaluate():
        sums = torch.zeros(2, len(members), device=device, dtype=torch.float64)
        for x, y in zip(*(each.transpose(0, 1) for each in held_out)):
            x, y = x[which].int(), y[which].int()
            loss, right = losses(flat, x, y, None, one)
            sums += torch.stack([loss * (y != -1).sum((1, 2)), right])
        return (sums / seen[which]).tolist()

    def ends(step):
        for i, member in enumerate(members):
            if member.ended is None and step <= member.stage.steps:
                last = member.stage.steps == step if member.warm else \
                    member.note(step, *(each[i] for each in result))
                if last:
                    weights = {name: p[i].clone() for name, p in stack.parts(flat.data).items()}
                    member.finish(step, weights)

    for member in members:
        if member.warm:
            member.before = member.evaluation(copy.deepcopy(member.model), member.data)
    loader = iter(DataLoader(Steps(datas, B), batch_size=None, sampler=range(steps),
                             num_workers=workers, pin_memory=device == "cuda",
                             prefetch_factor=4 if workers else None))
    if held_out:
        result = evaluate()
        ends(0)
    began = time.monotonic()
    for step in range(steps):
        x, y = (each.to(device, non_blocking=True)[which] for each in next(loader))
        loss, _ = losses(flat, x, y, sharpen, one)
        grad, = torch.autograd.grad(loss.sum(), flat)
        norm = update(flat.data, grad, m, v, table[step], decay, stack.decayed, bias1[step],
                      bias2[step])
        done = step + 1
        if held_out and done % every == 0 or done in {stage.steps for stage in stages}:
            result = evaluate() if held_out else None
            ends(done)
            live = [i for i, member in enumerate(members) if member.ended is None]
            if not live:
                break
            if len(live) < len(members):  # the others are not computed any longer
                members = [members[i] for i in live]
                flat, m, v = flat.data[live].requires_grad_(), m[live], v[live]
                which, table, decay = which[live], table[:, live], decay[live]
                stack.first = stack.first[:len(live)]
                sharpen = None if sharpen is None else sharpen[live]
        if done % 500 == 0 or done == 20:
            assert norm.isfinite().all()
            print(f"{members[0].data.spec} x {len(members)}: step {done:,}/{steps:,}, loss "
                  f"{loss.mean().item():.3f}, {done / (time.monotonic() - began):.1f} steps/s",
                  flush=True)


def together(stage, runs, results, device, workers, compiled):
    """Makes the warm-ups of runs (setting, seed), or these, where they are not there yet; those of
    one shape at a time. The current folder is `results`."""
    members, warmups = [], {}
    for setting, seed in runs:
        warmups |= {folder_of(of, flags): (flags, of) for flags, of in setting.warmups(seed)}
        if stage == "runs":
            folder = setting.folder(seed)
            flags = with_checkpoints(setting, seed, results) + f" --device {device}"
            members.append(Member(flags, seed, folder, False))
            Path(f"{folder}.changed.pt").unlink(missing_ok=True)
    for folder, (flags, seed) in warmups.items():
        if not Path(folder, "result.json").exists():
            members.append(Member(f"{flags} --device {device}", seed, folder, True))
    groups = {}
    for member in members:
        shape = (repr(member.model.config), member.stage.batch_size, member.stage.steps,
                 member.warm, member.task.spec, bool(member.s.sharpen))
        groups.setdefault(shape, []).append(member)
    for group in groups.values():
        train_together(group, device, workers, compiled)
    for flags, seed in warmups.values():
        make_warmup(flags, seed, results, [])  # is there, and is asked whether it was learned


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("warmups", "runs"))
    parser.add_argument("--only", required=True, help="settings with this in \"column | name\"")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.results.mkdir(exist_ok=True)
    results = args.results.resolve()
    settings = [each for name in EXPERIMENTS for each in settings_in(name, "quick")
                if each.column in TASK_COLUMNS and args.only in f"{each.column} | {each.name}"]
    runs = missing(settings, args.seeds, results).values()
    with contextlib.chdir(results):
        together(args.stage, runs, results, args.device, args.workers, args.device != "cpu")


if __name__ == "__main__":
    main()
