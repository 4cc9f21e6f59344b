"""What all tests share: the scripts on the path, a cache of their own, and ways to call the scripts."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models of the tests are too small for two; before torch is imported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests tokenise into a folder of their own."""
    os.environ["NANOWARM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A small corpus of text: 60 files, so that validation is split by document."""
    folder = tmp_path_factory.mktemp("prose")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"Chapter {i}. " + "The quick brown fox jumps over the lazy dog. " * (5 + i % 7))
    return folder


@pytest.fixture
def script():
    """Runs a script as a person would, in a process of its own: script("train.py", "--steps", "3")."""
    def call(name, *args, cwd=None, env=None, launcher=(sys.executable,), timeout=240):
        command = [*launcher, str(ROOT / name), *map(str, args)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True,
                              timeout=timeout)
    return call


@pytest.fixture
def refused(monkeypatch, capfd):
    """Calls a script's main and checks that it refuses as it should: one line on stderr, status 2. Returns the line."""
    def call(module, *args):
        from data import run_main
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(module.main)
        line = capfd.readouterr().err
        assert stop.value.code == 2
        assert line.startswith("error: ") and line.count("\n") == 1, line
        return line
    return call
