"""What eval.py says of a checkpoint, against counts by hand."""
import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as script
from data import make_source
from model import GPT, GPTConfig, load, save


class Fixed:
    """A Source with given rows; `rows` says how many there are, as in data.py."""
    kind, vocab_size, token_bytes = "task", 5, None

    def __init__(self, x, y):
        self.x, self.y, self.rows, self.block_size = x, y, len(x), x.shape[1]

    def batch(self, index, size):
        places = np.arange(index * size, (index + 1) * size) % self.rows
        return self.x[places], self.y[places]


def oracle(source, wrong_at=()):
    """A stand-in for a GPT that answers right, with confidence, but for some (row, place)."""
    class Oracle(GPT):
        def trunk(self, idx):
            targets = torch.from_numpy(source.batch(0, len(idx))[1])
            for row, place in wrong_at:
                targets[row, place] = (targets[row, place] + 1) % 5
            return F.one_hot(targets.clamp(min=0), 8).float() * 20
    model = Oracle(GPTConfig(5, 8, 1, 1, 8, tied=False))
    torch.nn.init.eye_(model.lm_head.weight)
    return model


def test_accuracy_counts_tokens_and_exact_counts_rows():
    x, y = np.zeros((4, 6), np.int64), np.full((4, 6), -1)
    y[:, 2:5] = [[1, 2, 3], [3, 2, 1], [4, 4, 4], [-1, -1, -1]]  # the last row asks nothing
    source = Fixed(x, y)
    perfect = script.evaluate(oracle(source), source, 4, 1)
    assert (perfect["accuracy"], perfect["exact"], perfect["tokens"]) == (1.0, 1.0, 9)
    one_wrong = script.evaluate(oracle(source, [(0, 3)]), source, 4, 1)
    assert one_wrong["accuracy"] == pytest.approx(8 / 9) and one_wrong["exact"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("batch_size,batches", [(4000, 1), (1000, 4), (700, 6), (64, 10 ** 6)])
def test_each_held_out_example_is_counted_once_whatever_the_batch_size(batch_size, batches):
    source = make_source("addition:digits=2", "val")
    torch.manual_seed(0)
    model = GPT(GPTConfig(31, source.block_size, 1, 1, 8))
    x, y = (torch.from_numpy(a) for a in source.batch(0, 4000))
    result = script.evaluate(model, source, batch_size, batches)
    assert result["tokens"] == (y != -1).sum()
    assert result["loss"] == pytest.approx(model(x, y).item(), abs=1e-4)


def test_bits_per_byte_weighs_the_loss_by_the_bytes_of_the_text(prose):
    source = make_source(str(prose), "val", block_size=16)
    torch.manual_seed(0)
    result = script.evaluate(GPT(GPTConfig(257, 16, 1, 1, 8)), source, 2, 3)
    end_of_text = sum(int((source.batch(i, 2)[1] == 256).sum()) for i in range(3))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 96 / (96 - end_of_text) / math.log(2))


def test_evaluation_switches_dropout_off_and_puts_it_back():
    source = make_source("set:length=3", "val")
    model = GPT(GPTConfig(102, 7, 1, 1, 8, dropout=0.5)).train()
    assert script.evaluate(model, source, 4, 2) == script.evaluate(model, source, 4, 2) and model.training


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, prose):
    """An untrained checkpoint of each kind."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for name, spec in (("rule", "set:length=3"), ("brackets", "dyck:k=2,length=12"), ("task", "haystack:pairs=2"), ("text", str(prose))):
        source = make_source(spec, block_size=16 if name == "text" else None)
        save(folder / f"{name}.pt", GPT(GPTConfig(source.vocab_size, source.block_size, 1, 2, 8)), stage="train", step=7,
             source={"spec": spec, "tokenizer": "bytes", "seed": 0})
        made[name] = folder / f"{name}.pt"
    return made


@pytest.mark.parametrize("kind,words", [("rule", ("accuracy", "whole answers", "|")), ("task", ("whole answers", "?k")),
                                        ("brackets", ("accuracy", "▶")), ("text", ("perplexity", "bits per byte", "▶"))])
def test_the_command_prints_what_fits_the_checkpoint(kind, words, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints[kind]), "--sample", "2", "--batches", "2", "--device", "cpu"])
    script.main()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("train step 7", "nats per counted token", *words)), printed


def test_other_data_of_the_same_vocabulary_can_be_asked_for(checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "b.txt").write_text("other words " * 200)
    monkeypatch.setattr("sys.argv", ["eval.py", str(checkpoints["text"]), "--data", str(tmp_path / "b.txt"), "--device", "cpu"])
    script.main()
    assert "b.txt" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--data", "haystack"], ["--data", "dyke"], ["--batches", "0"], ["--sample", "-1"],
                                  ["--device", "abacus"], ["--tokenizer", "klingon"]])
def test_bad_requests_are_refused(args, checkpoints, refused):
    refused(script, checkpoints["text"], *args)


def test_a_checkpoint_that_does_not_say_what_it_learned_is_refused(tmp_path, refused):
    save(tmp_path / "a.pt", GPT(GPTConfig(5, 8, 1, 1, 8)))
    assert "trained on" in refused(script, tmp_path / "a.pt")
