"""What all tests share: the scripts on the path, a cache of their own, and ways to call them."""
import gzip
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models are too small for two; before torch is imported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests tokenise into a folder of their own."""
    os.environ["NANOWARM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A small corpus of text: 60 files."""
    folder = tmp_path_factory.mktemp("prose")
    for i in range(60):
        sentences = "The quick brown fox jumps over the lazy dog. " * (5 + i % 7)
        (folder / f"{i:02}.txt").write_text(f"Chapter {i}. {sentences}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def course(request, tmp_path_factory, cache, prose):
    """The cells of the course, which take a minute, run beside the other tests."""
    if any(item.name == "test_the_cells_run" for item in request.session.items):
        import test_course
        process, said = test_course.start(tmp_path_factory.mktemp("course") / "copy", prose)
        request.addfinalizer(process.kill)  # where the tests are stopped before its own
        return process, said


class Mirror(http.server.ThreadingHTTPServer):
    """A server on 127.0.0.1 with the files of a folder, known by their last names. faults: of such
    a name, what its next requests get: "refuse", "cut" (half comes), "empty" or "corrupt"."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder, self.faults, self.requests = folder, {}, []
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    log_message = lambda *args: None

    def do_GET(self):
        self.server.requests.append(self.path)
        path = self.server.folder / Path(self.path).name
        fault = (self.server.faults.get(path.name) or [None]).pop(0)
        if fault == "refuse":
            return self.send_error(503)
        body = {"empty": b""}.get(fault, path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            body = body[:len(body) // 2]
        if fault == "corrupt":
            body = body[:-8] + bytes(8)  # gzip's checksum
        self.wfile.write(body)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Small files with the names and formats of C4, CodeParrot, WikiText-103 and DeepMind-Math."""
    folder, r = tmp_path_factory.mktemp("published"), random.Random(0)
    words = "the a river Code learns of in and 12 7 was by never f(y) naïve 中文 runs".split()
    c4 = [f"c4-train.{i:05}-of-01024" for i in range(4)] + ["c4-validation.00000-of-00008"]
    for name in (*c4, *(f"file-{i:012}" for i in (1, 2, 54))):
        field = "text" if name in c4 else "content"
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            for _ in range(300):
                text = " ".join(r.choices(words, k=r.randint(20, 200)))
                file.write(json.dumps({field: text, "url": "x"}) + "\n")
    wiki, problems = (tmp_path_factory.mktemp("unpacked") / name
                      for name in ("wikitext-103-raw", "mathematics_dataset-v1.0"))
    wiki.mkdir()
    for split in ("train", "valid"):
        text = " ".join(r.choices(words, k=30_000))
        (wiki / f"wiki.{split}.raw").write_text(f" \n = Title = \n \n {text}", "utf-8")
    for level in ("train-easy", "train-hard", "interpolate", "extrapolate"):
        (problems / level).mkdir(parents=True)
        for module in ("gcd", "linear_1d", "add_or_sub"):
            sums = [(r.randint(0, 99), r.randint(0, 99)) for _ in range(600)]
            text = "".join(f"What is {a} + {b}? ({module})\n{a + b}\n" for a, b in sums)
            (problems / level / f"{module}.txt").write_text(text)
    shutil.make_archive(folder / "wikitext-103-raw-v1", "zip", wiki.parent, wiki.name)
    shutil.make_archive(folder / problems.name, "gztar", problems.parent, problems.name)
    return folder


@pytest.fixture
def script():
    """Runs a script as a person would, in a process of its own: script("data.py", "list")."""
    def call(name, *args, env={}, launcher=(sys.executable,)):
        return subprocess.run([*launcher, ROOT / name, *args], env=os.environ | env, text=True,
                              capture_output=True, timeout=240)
    return call


@pytest.fixture
def refused(monkeypatch, capfd):
    """Calls a script's main, which has to refuse: one line on stderr, status 2. Returns it."""
    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.run_main(module.main)
        line = capfd.readouterr().err
        assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        return line
    return call
