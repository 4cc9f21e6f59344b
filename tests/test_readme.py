"""What README shows: its worked example and its commands."""
import argparse
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import analyze
import data
import eval as probes
import model
import train
from conftest import ROOT
from data import Parser

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:python|torchrun) .*\.py.*", README, re.MULTILINE)


def test_a_rule_is_added_in_six_lines_as_readme_shows(tmp_path):
    function, entry = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len((function + entry).splitlines()) <= 6
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "data.py").read_text()
    for block, place in ((f"{function}\n\n", "# ---------"), (entry, "}\nTASKS = {")):
        after = text.index(place, text.index("def eca("))
        text = text[:after] + block + text[after:]
    (tmp_path / "data.py").write_text(text)

    def python(*argv):
        return subprocess.run([sys.executable, *argv], cwd=tmp_path, check=True, text=True,
                              capture_output=True, timeout=60).stdout

    row = python("data.py", "show", "swap:length=6", "-n", "1").splitlines()[-1]
    x, answer = row.removesuffix("»").split(" | «")
    x, answer = x.split(), answer.split()
    assert len(x) == 6 and answer == x[3:] + x[:3]
    said = python(*"train.py --warmup swap --warmup_steps 2 --data haystack:pairs=2 --steps 2 "
                  "--batch_size 4 --warmup_batch_size 4 --eval_rows 8 --device cpu".split())
    assert "warm-up    swap: held-out loss" in said


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_readme_are_accepted(command, monkeypatch):
    words = shlex.split(command, comments=True)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name, argv = words[place], words[place + 1:]
    if name == "train.py":
        train.parse([*argv, "--plan"])
        return

    def parse_args(parser):
        argparse.ArgumentParser.parse_args(parser)
        raise Parsed
    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(Parsed):
        {"data.py": data, "eval.py": probes, "analyze.py": analyze, "model.py": model}[name].main()
