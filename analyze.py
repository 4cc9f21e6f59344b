"""What many runs say.

    python analyze.py curves out/code-dyck-s0 out/code-none-s0      held-out loss against tokens, as table and picture
"""
import json
from pathlib import Path

from data import Parser, UserError, run_main
from train import read_json


def read_run(folder):
    """A run's folder -> (its settings, the log entries of its training stage that hold an evaluation)."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        points = [e for e in entries if e["stage"] == "train" and "val_loss" in e]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / 'log.jsonl'}: {error}") from None
    if not points:
        raise UserError(f"{folder} has no evaluation of its training stage yet")
    return read_json(folder / "config.json", "settings")["settings"], points


def curves(folders, picture):
    """Held-out loss against the training stage's tokens, one line per run; prints the table of last values too."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(f"a picture needs matplotlib: {error}") from None
    runs = [(folder, *read_run(folder)) for folder in folders]
    if len(data := {settings["data"] for _, settings, _ in runs}) > 1:
        raise UserError(f"these runs are on different data, so their losses do not compare: {', '.join(sorted(data))}")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    print(f"{'run':32} {'warm-up':24} {'seed':>4} {'tokens':>14} {'held-out loss':>13} {'accuracy':>9}")
    for i, (folder, settings, points) in enumerate(runs):
        last, warmup = points[-1], settings["init"] or settings["warmup"]
        if warmup != "none" and settings["transfer"] != "full":
            warmup += f" ({settings['transfer']})"
        print(f"{str(folder):32} {warmup:24} {settings['seed']:4} {last['tokens']:14,} {last['val_loss']:13.4f} "
              f"{last['val_accuracy']:9.2%}")
        later = [p for p in points if p["step"]]  # the untrained model's loss would flatten the picture
        axes.plot([p["tokens"] for p in later], [p["val_loss"] for p in later], marker="osv^D"[i % 5],
                  linestyle=("-", "--", ":", "-.")[i % 4], label=f"warm-up {warmup}, seed {settings['seed']}")
    axes.set(xlabel="tokens of training after the warm-up", ylabel="held-out loss (nats per counted token)",
             title=f"{data.pop()}: {len(runs)} run{'s' * (len(runs) > 1)}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(picture, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {picture}: {error}") from None
    print(f"picture: {picture}")


def main():
    parser = Parser(description="What many runs say.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawer = commands.add_parser("curves", help="held-out loss against tokens, one line per run")
    drawer.add_argument("runs", nargs="+", help="folders that train.py wrote")
    drawer.add_argument("--picture", default="curves.png", help="where to draw (default curves.png)")
    args = parser.parse_args()
    curves(args.runs, args.picture)


if __name__ == "__main__":
    run_main(main)
