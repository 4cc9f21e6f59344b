"""Curves of runs side by side."""
import json

import analyze as script


def made_up_run(folder, warmup="dyck", data="code", losses=(5.0, 3.0, 2.5)):
    folder.mkdir()
    settings = {"data": data, "warmup": warmup, "init": None, "seed": 0, "transfer": "attn"}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    lines = [{"stage": "warmup", "step": 1, "tokens": 10, "loss": 9.0, "val_loss": 9.0, "val_accuracy": 0.0}]
    lines += [{"stage": "train", "step": i, "tokens": 100 * i, "val_loss": loss, "val_accuracy": 0.5} for i, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_prints_a_table_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    runs = [made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b", "none", losses=(5.0, 4.0, 3.25))]
    monkeypatch.setattr("sys.argv", ["analyze.py", "curves", *map(str, runs), "--picture", str(tmp_path / "c.png")])
    script.main()
    printed = capsys.readouterr().out
    assert "dyck (attn)" in printed and "2.5000" in printed and "3.2500" in printed and "9.0" not in printed
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_or_does_not_compare_is_refused(tmp_path, refused):
    assert "config.json" in refused(script, "curves", tmp_path)
    runs = [made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b", data="docs")]
    assert "different data" in refused(script, "curves", *runs)
    assert "no evaluation" in refused(script, "curves", made_up_run(tmp_path / "c", losses=()))
    refused(script, "curves", runs[0], "--picture", tmp_path / "no" / "folder.png")
    refused(script, "draw")
