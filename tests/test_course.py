"""The course's two notebooks: their cells run, small and without Jupyter, and their outputs are
those of a real run."""
import json
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

BOOKS = {name: json.loads((ROOT / f"assets/{name}.ipynb").read_text("utf-8"))["cells"]
         for name in ("course", "solutions")}

# What a notebook has and a script has not. torch takes seconds to import, so a command is a fork of
# a process that has imported it.
PRELUDE = """
import os, runpy, shlex, sys, traceback
import matplotlib, numpy, tiktoken, torch
matplotlib.use("Agg")
Image = lambda path, width: open(path)

def python(command):
    print("$", command, flush=True)
    if not (child := os.fork()):
        status = 0
        try:
            for name in ("data", "model", "eval", "train", "analyze"):
                sys.modules.pop(name, None)  # exercise 7 changes data.py
            sys.argv = shlex.split(command)
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException as stop:
            traceback.print_exc()
            status = getattr(stop, "code", None) or 0 if isinstance(stop, SystemExit) else 1
        sys.stdout.flush()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, command
"""


def small(command, text):
    """A command of a cell, with a few steps and few rows, and little text."""
    command = command.replace("--data docs", f"--data {text}")
    if command.startswith("train.py"):
        command += " --batch_size 8 --eval_rows 16"
        command += "" if "--steps 0" in command else " --steps 2"
        if "--warmup " in command and "--warmup none" not in command:
            command += " --warmup_steps 2 --warmup_batch_size 8"
    return f"python(f{command!r})"


def test_the_cells_run(tmp_path, prose):
    for name in ("data", "model", "eval", "train", "analyze"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    lines = [PRELUDE]
    for cell in BOOKS["course"] + BOOKS["solutions"]:
        if cell["cell_type"] == "code":
            lines += "".join(cell["source"]).replace("from IPython.display import Image",
                                                     "").splitlines()
    script = [small(line[len("!python "):], prose) if line.startswith("!python ") else line
              for line in lines]
    (tmp_path / "cells.py").write_text("\n".join(script), "utf-8")
    done = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, text=True, timeout=240,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(f"hand in ({i})" in done.stdout for i in range(1, 8))


@pytest.mark.parametrize("name", BOOKS)
def test_the_outputs_are_kept_and_the_exercises_are_there(name):
    said = json.dumps([cell.get("outputs") for cell in BOOKS[name]])
    assert "image/png" in said or name == "solutions"
    assert not re.search(r'"output_type": "error"|error: |Traceback|/home/|/tmp/', said)
    text = "".join("".join(cell["source"]) + "\n" for cell in BOOKS[name])
    assert re.findall(r"^## (\d)\. ", text, re.MULTILINE) == list("1234567")
