"""What all tests share: the scripts on the path, a cache of their own, and ways to call the scripts."""
import gzip
import http.server
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
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


class Mirror:
    """A server on 127.0.0.1 with files in the published formats, and ways to misbehave.

    `faults` maps a file's name to a list: each request for it takes the next one. "cut": half of what is left, then the
    connection is closed; "truncate": half of the file as if it were whole; "corrupt": one byte is wrong; "refuse": HTTP
    503; "no ranges": the whole file, whatever was asked for; "delay": a second late; None: as it should be."""

    def __init__(self, folder):
        self.folder, self.faults, self.requests, self.sent = folder, {}, [], 0
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                path = mirror.folder / self.path.lstrip("/")
                mirror.requests.append((self.path, self.headers.get("Range")))
                if not path.is_file():
                    return self.send_error(404)
                queue = mirror.faults.get(path.name)
                fault = queue.pop(0) if queue else None
                if fault == "refuse":
                    return self.send_error(503)
                if fault == "delay":
                    time.sleep(1)
                body, start = path.read_bytes(), 0
                if fault == "truncate":
                    body = body[:len(body) // 2]
                if fault == "corrupt":
                    body = body[:len(body) // 2] + bytes([body[len(body) // 2] ^ 255]) + body[len(body) // 2 + 1:]
                if (span := self.headers.get("Range")) and fault != "no ranges":
                    start = int(span.removeprefix("bytes=").rstrip("-"))
                    if start >= len(body):
                        self.send_response(416)
                        self.send_header("Content-Range", f"bytes */{len(body)}")
                        self.send_header("Content-Length", "0")
                        return self.end_headers()
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                else:
                    self.send_response(200)
                rest = body[start:]
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                rest = rest[:len(rest) // 2] if fault == "cut" else rest
                mirror.sent += len(rest)
                self.wfile.write(rest)
                self.close_connection = True

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def write_published(folder):
    """Small files with the names and formats of C4, CodeParrot, WikiText-103 and DeepMind-Math."""
    rng = random.Random(0)
    words = "the a river mountain Code learns of in and 12 7 was by never f(y) naïve 中文 runs".split()

    def prose(n):
        return " ".join(rng.choices(words, k=n))

    def write_json(path, field, documents):
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for i in range(documents):
                file.write(json.dumps({field: f"{i} {prose(rng.randint(20, 200))}", "url": "x"}) + "\n")

    for i in range(4):
        write_json(folder / f"en/c4-train.{i:05}-of-01024.json.gz", "text", 4000)
    write_json(folder / "en/c4-validation.00000-of-00008.json.gz", "text", 300)
    for i in (1, 2):
        write_json(folder / f"codeparrot-clean-train/resolve/main/file-{i:012}.json.gz", "content", 300)
    write_json(folder / "codeparrot-clean-valid/resolve/main/file-000000000054.json.gz", "content", 100)
    with zipfile.ZipFile(folder / "wikitext-103-raw-v1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, n in (("train", 200), ("valid", 20), ("test", 20)):
            articles = "".join(f" \n = Title {i} = \n \n {prose(60)} \n \n = = Part = = \n \n {prose(80)} \n" for i in range(n))
            archive.writestr(f"wikitext-103-raw/wiki.{split}.raw", articles)
    modules = ("numbers__gcd", "algebra__linear_1d", "arithmetic__add_or_sub")
    with tarfile.open(folder / "mathematics_dataset-v1.0.tar.gz", "w:gz") as archive:
        def add(name, text):
            info = tarfile.TarInfo(f"mathematics_dataset-v1.0/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        add("README.txt", "not data\n")
        for level in ("train-easy", "train-medium", "train-hard", "interpolate", "extrapolate"):
            for module in modules if level != "extrapolate" else [modules[-1] + "_big"]:
                lines = []
                for _ in range(400):
                    a, b = rng.randint(0, 99), rng.randint(0, 99)
                    lines.append(f"What is {a} + {b}? ({module})\n{a + b}\n")
                add(f"{level}/{module}.txt", "".join(lines))


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder with the published files in small."""
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder


@pytest.fixture
def mirror(published):
    """The same files on a server of their own."""
    server = Mirror(published)
    yield server
    server.server.shutdown()


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
