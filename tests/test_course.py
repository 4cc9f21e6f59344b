"""The course's two notebooks: all cells run, small and without Jupyter; outputs are kept."""
import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT

BOOKS = [json.loads((ROOT / f"assets/{name}.ipynb").read_text("utf-8"))["cells"]
         for name in ("course", "solutions")]
# A command is a fork, which has torch; ours it imports anew, since exercise 7 changes data.py.
PRELUDE = """
import os, runpy, shlex, sys
import matplotlib, numpy, tiktoken, torch
matplotlib.use("Agg")
import matplotlib.pyplot, torch._dynamo  # what takes each command a second or two
Image = lambda path, width: open(path)
def python(command):
    child = os.fork()
    if child == 0:
        for name in ("data", "model", "eval", "train", "analyze"):
            sys.modules.pop(name, None)
        sys.argv = shlex.split(command)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, command
"""


def as_python(line, text):
    """A cell's line; of a training, few steps and rows, and little text."""
    if not line.startswith("!python "):
        return line.replace("from IPython.display import Image", "")
    command = line.removeprefix("!python ").replace("--data docs", f"--data {text}")
    if command.startswith("train.py"):
        command += " --batch_size 8 --eval_rows 16"
        if "--steps 0" not in command:
            command += " --steps 2"
        if re.search("--warmup (?!none)", command):
            command += " --warmup_steps 2 --warmup_batch_size 8"
    return f"python(f{command!r})"


def start(folder, text):
    """Starts all cells in a copy of the project: a process, and the file of what it says."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out", "results", "tests"))
    cells = [cell for cell in BOOKS[0] + BOOKS[1] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    script = PRELUDE + "\n".join(as_python(line, text) for line in lines)
    (folder / "cells.py").write_text(script, "utf-8")
    said = folder / "said.txt"
    with said.open("w") as to:
        return subprocess.Popen([sys.executable, "-u", "cells.py"], cwd=folder, stdout=to,
                                stderr=subprocess.STDOUT), said


def test_the_cells_run(course):
    process, said = course
    assert process.wait(240) == 0, said.read_text()


def test_the_outputs_are_kept_and_the_exercises_are_there():
    for cells, pictures, handed_in in zip(BOOKS, (True, False), ("1234567", "2")):
        said = json.dumps([cell.get("outputs") for cell in cells])
        assert ("image/png" in said) == pictures
        assert re.findall(r"hand in \((\d)\)", said) == list(handed_in)
        assert not re.search('"output_type": "error"|error: |Traceback|/home/|/root/|/tmp/', said)
        text = "\n".join("".join(cell["source"]) for cell in cells)
        assert re.findall(r"^## (\d)\. ", text, re.MULTILINE) == list("1234567")
