"""What all tests share: the scripts on the path, a cache of their own, and ways to call them."""
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
import zipfile
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


class Mirror:
    """A server on 127.0.0.1 with the files of a folder, and ways to misbehave.

    `faults` maps a file's name to a list: each request for it takes the next one. "refuse": HTTP
    503; "cut": half of what is left, then the connection is closed; "no ranges": the whole file,
    whatever was asked for; "truncate": half of the file as if it were all; "empty": nothing as if
    it were all; "corrupt": one byte is wrong; None: as it should be."""

    def __init__(self, folder):
        self.folder, self.faults, self.requests = folder, {}, []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handler(mirror):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                path, span = mirror.folder / self.path.lstrip("/"), self.headers.get("Range")
                mirror.requests.append((self.path, span))
                if not path.is_file():
                    return self.send_error(404)
                queue = mirror.faults.get(path.name)
                fault = queue.pop(0) if queue else None
                if fault == "refuse":
                    return self.send_error(503)
                body, start = path.read_bytes(), 0
                middle = len(body) // 2
                if fault == "truncate":
                    body = body[:middle]
                elif fault == "empty":
                    body = b""
                elif fault == "corrupt":
                    body = body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1:]
                if span and fault != "no ranges":
                    start = int(span.removeprefix("bytes=").rstrip("-"))
                    self.send_response(206 if start < len(body) else 416)
                else:
                    self.send_response(200)
                rest = body[start:]
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[:len(rest) // 2] if fault == "cut" else rest)
                self.close_connection = True
        return Handler


def write_published(folder):
    """Small files with the names and formats of C4, CodeParrot, WikiText-103 and DeepMind-Math."""
    r = random.Random(0)
    vocabulary = "the a river Code learns of in and 12 7 was by never f(y) naïve 中文 runs".split()

    def words(n):
        return " ".join(r.choices(vocabulary, k=n))

    def write_json(path, field, documents):
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for i in range(documents):
                text = f"{i} {words(r.randint(20, 200))}"
                file.write(json.dumps({field: text, "url": "x"}) + "\n")

    for i in range(4):  # half a million bytes of text each
        write_json(folder / f"c4-train.{i:05}-of-01024.json.gz", "text", 1000)
    write_json(folder / "c4-validation.00000-of-00008.json.gz", "text", 300)
    for i, part, documents in ((1, "train", 300), (2, "train", 300), (54, "valid", 100)):
        parrot = folder / f"codeparrot-clean-{part}/resolve/main"
        write_json(parrot / f"file-{i:012}.json.gz", "content", documents)
    with zipfile.ZipFile(folder / "wikitext-103-raw-v1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, articles in (("train", 200), ("valid", 20), ("test", 20)):
            text = ""
            for i in range(articles):
                text += f" \n = Title {i} = \n \n {words(60)} \n \n"
                text += f" = = Part = = \n \n {words(80)} \n"
            archive.writestr(f"wikitext-103-raw/wiki.{split}.raw", text)
    modules = ["numbers__gcd", "algebra__linear_1d", "arithmetic__add_or_sub"]
    with tarfile.open(folder / "mathematics_dataset-v1.0.tar.gz", "w:gz") as archive:
        for level in ("train-easy", "train-medium", "train-hard", "interpolate", "extrapolate"):
            for module in modules if level != "extrapolate" else ["arithmetic__add_or_sub_big"]:
                text = ""
                for _ in range(400):
                    a, b = r.randint(0, 99), r.randint(0, 99)
                    text += f"What is {a} + {b}? ({module})\n{a + b}\n"
                info = tarfile.TarInfo(f"mathematics_dataset-v1.0/{level}/{module}.txt")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))


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
    server.close()


@pytest.fixture
def script():
    """Runs a script as a person would, in a process of its own: script("train.py", "--plan")."""
    def call(name, *args, cwd=None, env=None, launcher=(sys.executable,), timeout=240):
        command = [*launcher, str(ROOT / name), *map(str, args)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, text=True,
                              capture_output=True, timeout=timeout)
    return call


@pytest.fixture
def refused(monkeypatch, capfd):
    """Calls a script's main, which has to refuse: one line on stderr, status 2. Returns it."""
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
