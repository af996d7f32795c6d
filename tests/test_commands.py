"""Tests of the two commands, train_tables.py and eval.py: what they refuse, and full runs on a tiny random model.

The tiny model reads bytes, so a text of 200 letters is a prompt of about 200 tokens.
"""

import collections
import importlib.metadata
import json
import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import eval as evaluation
import train_tables
from compilerkv import MIN_BUDGET, POLICIES, Tables
from helpers import gguf_meta, gguf_tensors, write_gguf
from model import INSTALL, Config, load, random_model

torch.set_num_threads(1)

CONFIG = Config(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_ff=48, vocab_size=260, context_length=512)
META = gguf_meta(CONFIG) | {"tokenizer.chat_template": "<s>{{ messages[0].content }}\n> "}


def write_lines(path, rows):
    """A file of JSON lines, and its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(path, seed, **changes):
    """A random model of CONFIG's shape as a GGUF file."""
    write_gguf(path, gguf_tensors(random_model(CONFIG, seed)), META | changes)


def train(world, out, *more):
    """Run train_tables.main --quick; an option given again in `more` wins."""
    data = f"--data={world}/calibration.jsonl"
    return train_tables.main([f"--model={world}/tiny.gguf", "--dtype=float32", data, f"--out={out}", "--quick", *more])


def evaluate(world, out, *more):
    """Run eval.main; an option given again in `more` wins."""
    return evaluation.main([f"--model={world}/tiny.gguf", "--dtype=float32", f"--data={world}/data", "--budgets=64,128",
                            f"--tables={world}/t.npz", f"--out={out}", *more])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with models, two tasks of two records in LongBench's layout, calibration prompts, compiled tables."""
    root, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    letters = lambda n: "".join(rng.choices("aeinorst ", k=n))
    write_model(root / "tiny.gguf", seed=1)
    write_model(root / "other.gguf", seed=2)
    write_model(root / "mamba.gguf", seed=1, **{"general.architecture": "mamba"})
    (root / "text.gguf").write_text("Dear diary\n" * 99)
    prompts, max_new = dict.fromkeys(("fieldqa", "codes"), "{context}\n{input}"), {"fieldqa": 8, "codes": 6}
    write_lines(root / "data" / "config" / "dataset2prompt.json", [prompts])
    write_lines(root / "data" / "config" / "dataset2maxlen.json", [max_new])
    for task in prompts:
        write_lines(root / "data" / "data" / f"{task}.jsonl", [
            {"_id": f"{task}-{i}", "dataset": task, "context": letters(150 + 50 * i), "input": "what is it?",
             "answers": [f"red {i}"], "all_classes": None} for i in range(2)])
    write_lines(root / "calibration.jsonl", [
        {"id": f"c{i}", "chat": i % 2 == 0, "prompt": letters(190 + i), "continuation": letters(30)} for i in range(9)])
    train(root, root / "t.npz")
    (root / "cut.npz").write_bytes((root / "t.npz").read_bytes()[:-200])
    return root


@pytest.fixture(scope="module")
def report(world):
    """What eval.py reports on the tiny model: the content of eval.json."""
    assert evaluate(world, world / "results") == 0
    return json.loads((world / "results" / "eval.json").read_text())


# ----------------------------------------------------------------------------------------------------- what is refused

def exit_code(command, *arguments):
    """What a command leaves to the shell."""
    with pytest.raises(SystemExit) as stop:
        evaluation.run_command(lambda: command(*arguments))
    return stop.value.code


def refused(command, world, out, arguments, capsys):
    """The lines on standard error of a command that must exit with code 2 and write nothing."""
    before, _ = sorted(world.rglob("*")), capsys.readouterr()
    assert exit_code(command, world, out, *arguments) == 2
    assert not out.is_file() and not list(out.glob("*")) and sorted(world.rglob("*")) == before
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("command, argument, word", [
    (evaluate, "--policies=snapkv,magic", "magic"), (evaluate, "--policies= , ", "empty"),
    *((evaluate, f"--budgets={budget}", f"at least {MIN_BUDGET}") for budget in ("0", "-5", "35", "64,35")),
    *((evaluate, f"--budgets={budget}", "whole numbers") for budget in ("abc", "64.5", "")),
    (evaluate, "--limit=0", "--limit"), (evaluate, "--limit=-1", "--limit"), (evaluate, "--data={}/none", "{}/none"),
    (evaluate, "--tables={}/none.npz", "train_tables.py"), (evaluate, "--tables={}/cut.npz", "{}/cut.npz: damaged"),
    (evaluate, "--model={}/other.gguf", "another model"),
    (train, "--out={}/tables.json", ".npz"), (train, "--data={}/none.jsonl", "{}/none.jsonl: No such file"),
    *((command, *case) for command in (train, evaluate) for case in (
        ("--model={}/none.gguf", "{}/none.gguf"), ("--model={}/text.gguf", "{}/text.gguf: not a readable GGUF"),
        ("--model={}/mamba.gguf", "'mamba'"), ("--device=abacus", "abacus"), ("--out={}/tiny.gguf/t.npz", "{}/tiny"))),
])
def test_impossible_options_are_refused_in_one_line(world, tmp_path, capsys, command, argument, word):
    """Guards against a stack trace, a long run that fails at its end, or numbers from tables of another model."""
    [line] = refused(command, world, tmp_path / "out.npz", [argument.format(world)], capsys)
    assert line.startswith("error: ") and word.format(world) in line


@pytest.mark.parametrize("main", [train_tables.main, evaluation.main])
def test_missing_weights_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch, capsys, main):
    """Guards against a newcomer's first contact being a PackageNotFoundError."""
    monkeypatch.setattr(importlib.metadata, "files", Mock(side_effect=importlib.metadata.PackageNotFoundError))
    [line] = refused(lambda world, out: main([f"--out={out}"]), tmp_path, tmp_path / "out.npz", (), capsys)
    assert line.startswith("error: ") and INSTALL in line


@pytest.mark.parametrize("content, word", [
    ("", "too few"), ("{}", "line 1"), ("[]", "line 1"),
    ('{"id": "a", "chat": false, "prompt": "p", "continuation": "c"}\n\n{"id": "b", "chat"', "line 3"),
    ('{"id": "a", "prompt": "p", "continuation": "c"}', "line 1"),
    ('{"id": "a", "chat": false, "prompt": "p", "continuation": ""}', "line 1"),
])
def test_calibration_files_that_cannot_be_read_are_refused(world, tmp_path, capsys, content, word):
    """Guards against a KeyError that does not say which of many lines is wrong, and tables learned from nothing."""
    (tmp_path / "prompts.jsonl").write_text(content)
    [line] = refused(train, world, tmp_path / "t.npz", [f"--data={tmp_path}/prompts.jsonl"], capsys)
    assert line.startswith(f"error: {tmp_path}/prompts.jsonl") and word in line


def test_prompts_that_are_too_long_or_too_short_are_refused(world, tmp_path, capsys):
    """Guards against positions the model was never trained on, reports without the long records, shares of nothing."""
    shutil.copytree(world / "data", tmp_path / "data")
    path = tmp_path / "data" / "data" / "fieldqa.jsonl"
    path.write_text(path.read_text().replace("what is it?", "what is it? " * 40))
    *bar, line = refused(evaluate, world, tmp_path / "out", [f"--data={tmp_path}/data"], capsys)
    assert line.startswith("error: record fieldqa-0: ") and "512" in line and all("records:" in part for part in bar)
    write_lines(tmp_path / "short.jsonl", [{"id": "tiny", "chat": False, "prompt": "p", "continuation": "c"}] * 9)
    *bar, line = refused(train, world, tmp_path / "t.npz", [f"--data={tmp_path}/short.jsonl"], capsys)
    assert line.startswith("error: ") and "tiny" in line and all("prefill:" in part for part in bar)


# ----------------------------------------------------------------------------------------------------------- full runs

def test_training_leaves_tables_their_provenance_and_pictures(world):
    """Guards against tables that nobody can trace back to prompts and settings."""
    loaded = Tables.load(world / "t.npz", load(world / "tiny.gguf", "float32"))  # checks names, shapes and numbers
    assert loaded.budgets.tolist() == [128] and all((c.W_head > 0).all() for c in loaded.compiled.values())
    provenance = json.loads((world / "t.json").read_text())
    assert provenance == loaded.provenance and list(provenance["prompts"]) == [f"c{i}" for i in range(9)]
    assert [provenance[key] for key in ("model", "dtype", "seed")] == ["tiny", "float32", 0]
    assert len(list(world.glob("t-*.png"))) == 4  # two tables of two readings of the method


def test_the_report_holds_every_record_policy_and_budget_once(world, report):
    """Guards against a lost or doubled row, and against fields that the documentation promises and the file lacks."""
    assert set(report) == {"meta", "summary", "records"}
    assert all(row.keys() >= {"id", "task", "policy", "budget", "score", "dnll", "kept", "kv_bytes", "answer"}
               and 0 <= row["score"] <= 100 for row in report["records"])
    jobs = {("full", None), *((policy, budget) for policy in POLICIES for budget in (64, 128) if policy != "full")}
    counts = collections.Counter((row["id"], row["policy"], row["budget"]) for row in report["records"])
    assert counts == {(f"{task}-{i}", *job): 1 for task in ("fieldqa", "codes") for i in (0, 1) for job in jobs}
    fields = {"policy", "budget", "n", "score", "dnll", "dnll_ci", "dnll_worst_tenth", "kept_mean", "kv_bytes_mean"}
    assert all(row.keys() >= fields and row["n"] == 4 for row in report["summary"])
    assert collections.Counter((row["policy"], row["budget"]) for row in report["summary"]) == dict.fromkeys(jobs, 1)
    assert [report["meta"][key] for key in ("dtype", "records", "interrupted")] == ["float32", 4, False]
    assert {"report.md", "quality.png"} <= {path.name for path in (world / "results").iterdir()}


def test_the_report_counts_memory_exactly(report):
    """Guards against a budget that is exceeded, and bytes of query heads, padding or decoded tokens."""
    for row in report["records"]:
        assert row["kv_bytes"] == row["kept"] * 2 * 2 * 8 * 2 * 4  # layers, KV heads, head dim, K and V, float32
        if row["policy"] == "full":
            assert row["dnll"] == 0 and row["kept"] == row["n_tokens"] > 150
        else:
            assert MIN_BUDGET <= row["kept"] <= row["budget"] and row["dnll"] != 0


def test_the_same_seed_gives_the_same_tables_and_the_same_report(world, report, tmp_path):
    """Guards against randomness outside the seeded generators, and against one run that changes the next."""
    train(world, tmp_path / "again.npz")
    with np.load(world / "t.npz") as first, np.load(tmp_path / "again.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first.files if name != "provenance")
    assert evaluate(world, tmp_path, f"--tables={tmp_path}/again.npz") == 0
    again = json.loads((tmp_path / "eval.json").read_text())
    untimed = lambda rows: [{k: v for k, v in row.items() if k != "select_seconds"} for row in rows]
    assert untimed(again["records"]) == untimed(report["records"]) and again["summary"] == report["summary"]


def interrupt(monkeypatch, module, name, n):
    """Press Ctrl-C in the n-th call of a module's function."""
    turns = iter([getattr(module, name)] * (n - 1) + [Mock(side_effect=KeyboardInterrupt)])
    monkeypatch.setattr(module, name, lambda *arguments, **options: next(turns)(*arguments, **options))


def test_an_interrupted_evaluation_reports_what_is_finished(world, report, tmp_path, monkeypatch, capsys):
    """Guards against hours of evaluation lost to Ctrl-C, and against a partial report that does not say so."""
    interrupt(monkeypatch, evaluation, "run_record", 3)
    assert exit_code(evaluate, world, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: 2 of 4 records are in the report"
    partial = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert partial["meta"]["interrupted"] and partial["meta"]["records"] == 2
    assert [row["nll"] for row in partial["records"]] == [r["nll"] for r in report["records"] if r["task"] == "codes"]


def test_interrupted_training_does_not_replace_the_tables(world, tmp_path, monkeypatch, capsys):
    """Guards against tables of a few prompts under the name of the full ones."""
    interrupt(monkeypatch, train_tables, "collect", 8)
    assert not exit_code(train, world, tmp_path / "t.npz")
    assert "t.partial.npz from 7 prompts" in capsys.readouterr().err
    assert (tmp_path / "t.partial.npz").exists() and not (tmp_path / "t.npz").exists()


def test_a_failed_write_leaves_earlier_results_intact(world, report, tmp_path, monkeypatch):
    """Guards against results cut in half by a full disk, and against litter beside them."""
    shutil.copytree(world / "results", tmp_path / "results")
    content = lambda: {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    before = content()
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError("no space left on device")))
    assert exit_code(evaluate, world, tmp_path / "results") == exit_code(train, world, tmp_path / "t.npz") == 2
    assert content() == before and [path.name for path in tmp_path.iterdir()] == ["results"]
