"""Tests of the two commands, train_tables.py and eval.py: what they refuse, and full runs on a tiny random model.

The tiny model reads bytes, so a text of 200 letters is a prompt of about 200 tokens.
"""

import collections
import importlib.metadata
import json
import random
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import eval as evaluation
import train_tables
from compilerkv import MAX_WINDOW, MIN_BUDGET, POLICIES, Tables, select
from eval import PROTOCOLS
from helpers import gguf_meta, gguf_tensors, random_model, write_gguf
from model import INSTALL, Config, load

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
    prompts, max_new = dict.fromkeys(("fieldqa", "needle"), "{context}\n{input}"), {"fieldqa": 8, "needle": 6}
    write_lines(root / "data" / "config" / "dataset2prompt.json", [prompts])
    write_lines(root / "data" / "config" / "dataset2maxlen.json", [max_new])
    for task in prompts:
        write_lines(root / "data" / "data" / f"{task}.jsonl", [
            {"_id": f"{task}-{i}", "dataset": task, "context": context, "input": f"what is {i}?", "answers": [f"red {i}"],
             "all_classes": None, "depth": 0.5, "needles": 1 if task == "needle" else None}
            for context in (letters(200),) for i in range(2)])  # two questions on one context
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
    (evaluate, "--protocols=query-blind", "query-blind"), (evaluate, "--tasks=none", "--tasks none"),
    (evaluate, "--protocols=,", "empty"), (evaluate, "--ablate --rows=W", "row 'W'"), (evaluate, "--rows=H2O", "--ablate"),
    *((evaluate, f"{run} {option}", "take neither") for run in ("--ablate", "--speed") for option in ("--policies=h2o", "--protocols=query-aware")),
    (evaluate, "--limit=0", "--limit"), (evaluate, "--limit=3 --full", "exclude"), (evaluate, "--limit=-1", "--limit"),
    (evaluate, "--data={}/none", "{}/none"),
    (evaluate, "--tables={}/none.npz", "train_tables.py"), (evaluate, "--tables={}/cut.npz", "{}/cut.npz: damaged"),
    (evaluate, "--model={}/other.gguf", "another model"),
    (train, "--out={}/tables.json", ".npz"), (train, "--data={}/none.jsonl", "{}/none.jsonl: No such file"),
    (train, "--data={}/tiny.gguf", "{}/tiny.gguf, line 1: malformed prompt"),
    *((command, *case) for command in (train, evaluate) for case in (
        ("--model={}/none.gguf", "{}/none.gguf"), ("--model={}/text.gguf", "{}/text.gguf: not a readable GGUF"),
        ("--model={}/mamba.gguf", "'mamba'"), ("--device=abacus", "abacus"), ("--out={}/tiny.gguf/t.npz", "{}/tiny"))),
])
def test_impossible_options_are_refused_in_one_line(world, tmp_path, capsys, command, argument, word):
    """Guards against a stack trace, a long run that fails at its end, or numbers from tables of another model."""
    [line] = refused(command, world, tmp_path / "out.npz", re.split(" (?=--)", argument.format(world)), capsys)
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
    lengths = tmp_path / "data" / "config" / "dataset2maxlen.json"
    lengths.write_text(lengths.read_text().replace("8", "400"))  # what is too long for the context loses its middle, answers not
    path.write_text(path.read_text().replace("what is", "what is " * 40))
    [line] = refused(evaluate, world, tmp_path / "out", [f"--data={tmp_path}/data"], capsys)
    assert line.startswith("error: record fieldqa-0: ") and "512" in line
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
    assert len(list(world.glob("t-*.png"))) == 5  # two tables of two readings of the method, and the learners


def results(report):
    """Every result as a dictionary, with the record it belongs to."""
    return [{**record, **dict(zip(report["columns"], result))} for record in report["records"] for result in record["results"]]


def test_the_report_holds_every_record_protocol_policy_and_budget_once(world, report):
    """Guards against a lost or doubled row, and against fields that the documentation promises and the file lacks."""
    assert all(0 <= row["score"] <= 100 and isinstance(row["answer"], str) for row in results(report))
    jobs = [(policy, budget) for policy in POLICIES for budget in (64, 128) if policy != "full"]
    expected = {(f"{task}-{i}", *key) for task in ("fieldqa", "needle") for i in (0, 1)
                for key in [("full", "full", None), *(("query-aware", *job) for job in jobs),
                            *(("query-agnostic", *job) for job in jobs if i == 0)]}  # the first question of a context
    counts = collections.Counter((row["id"], row["protocol"], row["policy"], row["budget"]) for row in results(report))
    assert counts == dict.fromkeys(expected, 1)
    by = collections.Counter((s["protocol"], s["n"]) for s in report["summary"])
    assert by == {("query-aware", 4): len(jobs) + 1, ("query-agnostic", 2): len(jobs) + 1}
    assert [report["meta"][key] for key in ("dtype", "n_records", "n_contexts", "interrupted")] == ["float32", 4, 2, False]
    pictures = {f"{kind}-{protocol}.png" for kind in ("quality", "tails") for protocol in PROTOCOLS}
    assert {path.name for path in (world / "results").iterdir()} == {"report.md", "eval.json", "kept.png"} | pictures


def test_the_report_counts_memory_exactly(report):
    """Guards against a budget that is exceeded, and bytes of query heads, padding, the question or decoded tokens."""
    for row in results(report):
        assert row["kv_bytes"] == row["kept"] * 2 * 2 * 8 * 2 * 4  # layers, KV heads, head dim, K and V, float32
        if row["policy"] == "full":
            assert row["dnll"] == 0 and row["kept"] == row["n_tokens"] > 200
        else:
            assert MIN_BUDGET <= row["kept"] <= row["budget"] and row["dnll"] != 0


def test_the_context_is_compressed_before_the_question_is_known(world, report, tmp_path):
    """Guards against a query-agnostic row that saw the question, and a query-aware one that did not."""
    shutil.copytree(world / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "data").iterdir():
        path.write_text(path.read_text().replace("what is", "who was"))  # as long, so that all else is equal
    evaluate(world, tmp_path / "out", f"--data={tmp_path}/data", "--policies=snapkv,compilerkv,full")
    other = results(json.loads((tmp_path / "out" / "eval.json").read_text()))
    first = {(r["id"], r["protocol"], r["policy"], r["budget"]): r for r in results(report)}
    pairs = [(r, first[r["id"], r["protocol"], r["policy"], r["budget"]]) for r in other]
    assert all(a["entropy_perplexity"]["query-agnostic"] == b["entropy_perplexity"]["query-agnostic"] and
               a["entropy_perplexity"]["query-aware"] != b["entropy_perplexity"]["query-aware"] for a, b in pairs)
    assert all(a["nll_full"] != b["nll_full"] for a, b in pairs)  # but the question is read in the end


def test_a_question_does_not_depend_on_the_one_before_it(world, tmp_path):
    """Guards against a context that still holds the first question when the second one comes."""
    shutil.copytree(world / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "data").iterdir():
        path.write_text(path.read_text().splitlines()[1])  # the second question alone
    rows = []
    for data in (world / "data", tmp_path / "data"):
        evaluate(world, tmp_path / "out", f"--data={data}", "--protocols=query-aware", "--policies=full,snapkv,hindsight")
        report = results(json.loads((tmp_path / "out" / "eval.json").read_text()))
        rows.append([(r["id"], r["policy"], r["budget"], r["nll_full"], r["dnll"], r["answer"]) for r in report if r["id"].endswith("-1")])
    assert len(rows[0]) == 2 * 5
    assert [row[:3] + row[5:] for row in rows[0]] == [row[:3] + row[5:] for row in rows[1]]
    assert np.allclose([row[3:5] for row in rows[0]], [row[3:5] for row in rows[1]], atol=1e-4)


def test_with_room_for_everything_both_protocols_lose_nothing(world, tmp_path):
    """Guards against a question that reads its context at shifted positions, or not at all."""
    evaluate(world, tmp_path, "--policies=snapkv,streaming", "--budgets=500")
    assert all(abs(row["dnll"]) < 1e-4 for row in results(json.loads((tmp_path / "eval.json").read_text())))


def test_needles_get_heat_maps(world, tmp_path):
    """Guards against a grid that is measured and not shown."""
    evaluate(world, tmp_path, "--tasks=needle", "--policies=full,snapkv")
    assert (tmp_path / "needles-query-aware.png").stat().st_size > 5000


def test_the_same_seed_gives_the_same_tables_and_the_same_report(world, report, tmp_path):
    """Guards against randomness outside the seeded generators, and against one run that changes the next."""
    train(world, tmp_path / "again.npz")
    with np.load(world / "t.npz") as first, np.load(tmp_path / "again.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first.files if name != "provenance")
    assert evaluate(world, tmp_path, f"--tables={tmp_path}/again.npz") == 0
    again = json.loads((tmp_path / "eval.json").read_text())
    untimed = lambda report: [{k: v for k, v in row.items() if k not in ("select_seconds", "results")} for row in results(report)]
    assert untimed(again) == untimed(report) and summary(again) == summary(report)


def summary(report):
    """A report's summary without what depends on the clock."""
    return [{key: value for key, value in row.items() if key != "select_ms"} for row in report["summary"]]


def interrupt(monkeypatch, module, name, n):
    """Press Ctrl-C in the n-th call of a module's function."""
    turns = iter([getattr(module, name)] * (n - 1) + [Mock(side_effect=KeyboardInterrupt)])
    monkeypatch.setattr(module, name, lambda *arguments, **options: next(turns)(*arguments, **options))


def test_an_interrupted_evaluation_reports_what_is_finished_and_goes_on(world, report, tmp_path, monkeypatch, capsys):
    """Guards against hours of evaluation lost to Ctrl-C or a crash, done twice, or reported as if they were complete."""
    with monkeypatch.context() as patch:
        interrupt(patch, evaluation, "run_context", 2)
        assert exit_code(evaluate, world, tmp_path / "out") == 130
    assert "interrupted: 2 of 4 records" in capsys.readouterr().err.splitlines()[-1]
    partial = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert partial["meta"]["interrupted"] and partial["meta"]["n_records"] == 2
    [journal] = (tmp_path / "out").glob("unfinished-*")
    journal.write_text(journal.read_text() + '[[{"id": "needle-0", "ta')  # the line a crash cut short
    assert exit_code(evaluate, world, tmp_path / "out", "--budgets=64") == 0  # another run does not take it for its own
    assert journal.exists()
    with monkeypatch.context() as patch:
        interrupt(patch, evaluation, "run_context", 2)  # one context is left
        assert evaluate(world, tmp_path / "out") == 0
    assert "1 of 2 contexts" in capsys.readouterr().err and not journal.exists()
    assert summary(json.loads((tmp_path / "out" / "eval.json").read_text())) == summary(report)


def test_interrupted_training_does_not_replace_the_tables(world, tmp_path, monkeypatch, capsys):
    """Guards against tables of a few prompts under the name of the full ones."""
    interrupt(monkeypatch, train_tables, "collect", 8)
    assert not exit_code(train, world, tmp_path / "t.npz")
    assert "t.partial.npz from 7 prompts" in capsys.readouterr().err
    assert (tmp_path / "t.partial.npz").exists() and (tmp_path / "t.partial.json").exists()
    assert not list(tmp_path.glob("t.npz")) + list(tmp_path.glob("t.json"))


def test_a_failed_write_leaves_earlier_results_intact(world, report, tmp_path, monkeypatch):
    """Guards against results cut in half by a full disk, and against litter beside them."""
    shutil.copytree(world / "results", tmp_path / "results")
    content = lambda: {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    before = content()
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError("no space left on device")))
    assert exit_code(evaluate, world, tmp_path / "results") == exit_code(train, world, tmp_path / "t.npz") == 2
    after = content()
    [journal] = after.keys() - before.keys()  # what was finished, for the next try
    assert journal.startswith("unfinished-") and before == {name: after[name] for name in before}
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_the_ablations_name_every_row_compare_in_pairs_and_go_on(world, tmp_path, capsys, monkeypatch):
    """Guards against a switch that changes nothing, a row that is lost, and parts that are credited with another's effect."""
    assert not evaluate(world, tmp_path, "--ablate", "--limit=2", "--budgets=64,128")
    report = (tmp_path / "ablation-data.md").read_text()
    assert report in capsys.readouterr().out and "gap from SnapKV to hindsight" in report and not list(tmp_path.glob("unfinished-*"))
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith(("| 64 |", "| 128 |"))]
    names = [row[1] for row in rows if not " - " in row[1]]
    assert names == [*evaluation.SWITCHES] * 2 and len(rows) - len(names) == 2 * len(evaluation.PAIRS)
    means = [[float(cell.split()[0]) for cell in line.split(" | ")[2:4]] for line in report.splitlines() if line.startswith("| mean |")]
    apart = [[float(cell.split()[0]) for cell in row[2:4]] for row in rows if " - " in row[1]]
    assert len(means) == len(evaluation.PAIRS)
    for mean, *both in zip(means, apart, apart[len(means):]):
        assert mean[0] == pytest.approx(np.mean(both, 0)[0], abs=0.0011) and mean[1] == pytest.approx(np.mean(both, 0)[1], abs=0.011)
    worst = {(row[0], row[1]): float(row[3]) for row in rows if " - " not in row[1]}
    for budget, pair, _, tail, _ in (row for row in rows if " - " in row[1]):
        difference, low, high = (float(number.strip("[],")) for number in tail.split())
        assert difference == pytest.approx(worst[budget, pair.split(" - ")[0]] - worst[budget, pair.split(" - ")[1]], abs=0.011)
        assert low <= difference <= high
    at_64 = {row[1]: row[2:] for row in rows if row[0] == "| 64"}
    switched = {"no gate": None, "cap 1": "CompilerKV"}  # from what; all others from "no gate"
    same = [name for name, values in at_64.items() if values == at_64.get(switched.get(name, "no gate"))]
    with np.load(world / "t.npz") as file:
        window, kernel = file["compilerkv/rules"][0]
        [(budget, check)] = json.loads(str(file["provenance"]))["evidence"]["compilerkv"]["check"].items()
        said = {f"window {window:.0f}", f"kernel {kernel:.0f}"}
        said |= {"W = 1, no gate"} if (file["compilerkv/W_head"] == 1).all() else set()
        said |= {"smaller budget"} if round(64 * check["kept_mean"] / int(budget)) == 64 else set()
    assert set(same) == said & set(at_64), same  # a switch to what the tables say already changes nothing, and no other
    chosen = ("--ablate", "--limit=2", "--budgets=64,128", "--rows", "H2O", "no gate", "CompilerKV", "W = 1")
    interrupt(monkeypatch, evaluation, "ablate_context", 2)
    assert exit_code(evaluate, world, tmp_path, *chosen) == 130
    assert (tmp_path / "ablation-data.md").read_text().startswith("INTERRUPTED, a part: 2 records on 1 contexts")
    monkeypatch.undo()
    interrupt(monkeypatch, evaluation, "ablate_context", 2)  # one context is left
    assert not evaluate(world, tmp_path, *chosen)
    part = (tmp_path / "ablation-data.md").read_text()
    lines = [line for line in part.splitlines() if line.startswith(("| 64 |", "| 128 |"))]
    assert set(lines) < set(report.splitlines()) and len(lines) == 2 * (4 + 4) and "gap" not in part


def test_rows_keep_what_their_names_say(world):
    """Guards against the size of a compiled budget that stands in for a smaller one that was asked for, and against caps mixed up."""
    model = load(world / "tiny.gguf", "float32")
    tables = Tables.load(world / "t.npz", model)
    logits, cache, observation = model.prefill([t % 256 for t in range(300)], MAX_WINDOW)
    for budget in (90, 180, 400):
        sizes = {name: [int((layer >= 0).sum()) / len(layer) for layer in evaluation.SWITCHES[name](observation, cache, budget, tables)]
                 for name in ("smaller budget", "cap 1", "constant tau", "CompilerKV", "no cap")}
        assert max(*sizes["smaller budget"], *sizes["cap 1"]) <= budget
        if budget < 300 / 2:
            assert budget < max(sizes["constant tau"]) <= 2 * budget >= max(sizes["CompilerKV"]) > budget
        assert all(np.mean(row) <= budget for row in sizes.values()) and max(sizes["no cap"]) >= max(sizes["CompilerKV"])


# --------------------------------------------------------------------------------------------------------------- speed

@pytest.fixture(scope="module")
def speed(world):
    """What `eval.py --speed` measures on the tiny model, at three lengths: the content of speed.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SPEED_LENGTHS", (96, 200, 400, 480))  # 480 and 64 more exceed the model's 512
        assert evaluate(world, world / "speed", "--speed") == 0
    return json.loads((world / "speed" / "speed.json").read_text())


def numbers(value):
    """Every number of nested JSON."""
    if isinstance(value, (dict, list)):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if type(value) in (int, float) else []


def test_speed_writes_a_report_its_numbers_and_a_picture(world, speed, tmp_path, monkeypatch, capsys):
    """Guards against a report that differs from what is printed, a row that is lost, and a model shorter than every length."""
    assert {path.name for path in (world / "speed").iterdir()} == {"speed.md", "speed.json", "speed.png"}
    assert [[c["budget"] for c in row["caches"]] for row in speed["lengths"]] == [[None, 64, 128]] * 3
    monkeypatch.setattr(evaluation, "STEPS", 2)
    capsys.readouterr()
    assert evaluate(world, tmp_path, "--speed", "--budgets=64") == 0
    report = (tmp_path / "speed.md").read_text()
    head, *lines = report.splitlines()
    assert report in capsys.readouterr().out and "tiny, float32" in head and "1 threads" in head
    assert (tmp_path / "speed.png").stat().st_size > 5000
    cells = [line.split(" | ")[:2] for line in lines if line.startswith("| 448 |")]  # the longest that fits
    assert [row[1] for row in cells[1:]] == ["64", "all", "64"]
    assert evaluation.parse(["--speed"]).out == evaluation.HERE / "results"


def test_speed_numbers_are_positive_and_bytes_exact(speed):
    """Guards against times in the wrong order, bytes of padding or of decoded tokens, and memory that falls."""
    measured = {key: value for key, value in speed.items() if key != "meta"}
    assert len(numbers(measured)) > 70 and all(0 < n < float("inf") for n in numbers(measured))
    assert [row["n_tokens"] for row in speed["lengths"]] == [96, 200, 400] and speed["roll_outs"]["n_tokens"] == 400
    assert speed["roll_outs"]["kept"] == 256
    for row in speed["lengths"]:
        for cache in row["caches"]:
            tokens = min(cache["budget"] or row["n_tokens"], row["n_tokens"])
            most = tokens * 2 * 2 * 2 * 8 * 4  # layers, KV heads, K and V, head dim, float32
            assert cache["kv_bytes"] == cache["kv_bytes_by_hand"] <= most
            assert cache["kv_bytes"] <= cache["kv_bytes_padded"] and cache["ms"] == sorted(cache["ms"])
            if cache["budget"]:
                assert list(cache["stage_seconds"]) == list(evaluation.STAGES)
                assert cache["share"] == pytest.approx(sum(cache["stage_seconds"].values()) / row["prefill_seconds"])
        assert row["caches"][0]["kv_bytes"] == row["caches"][0]["kv_bytes_padded"] == row["n_tokens"] * 256
    memory = [row["peak_memory_bytes"] for row in speed["lengths"] if row["peak_memory_bytes"]]  # Windows does not tell
    assert memory == sorted(memory) and all(m > 2 ** 24 for m in memory)


def test_speed_floors_by_hand(speed):
    """Guards against a floor that forgets the weights or counts the embedding twice, and attention to keys that are hidden."""
    weights = gguf_tensors(random_model(CONFIG, seed=1))  # the output matrix is the embedding
    matrices = sum(w.size for name, w in weights.items() if name.startswith("blk") and w.ndim == 2)
    for row in speed["lengths"]:
        for cache in row["caches"]:
            read = sum(w.nbytes for w in weights.values()) + cache["kv_bytes"]
            assert cache["floor_ms"] / 1000 * speed["bytes_a_second"] == pytest.approx(read)
        pairs = sum(t + 1 for t in range(row["n_tokens"])) * 2 * 4  # layers, query heads
        products = row["n_tokens"] * matrices + pairs * 2 * 8 + 260 * 32  # a score and a weighted value; the last logits
        assert row["prefill_floor_seconds"] * speed["multiply_adds_a_second"] == pytest.approx(products)
    full, *small = zip(*([cache["floor_ms"] for cache in row["caches"]] for row in speed["lengths"]))
    assert full[0] < full[1] < full[2]
    most = speed["lengths"][1]["caches"][0]["floor_ms"]  # all 200 tokens: more than either budget may ever read
    assert all(max(floors) < most for floors in small)


def test_speed_times_the_selection_that_is_really_made(world):
    """Guards against stages that are not CompilerKV's, and a decoder that leaves its tokens in the cache."""
    model = load(world / "tiny.gguf", "float32")
    tables, tokens = Tables.load(world / "t.npz", model), torch.arange(300).mul(7).remainder(256).tolist()
    logits, cache, observation = model.prefill(tokens, MAX_WINDOW)
    for budget in (64, 128, 400):
        kept, small, seconds = evaluation.timed_compilerkv(observation, cache, budget, tables)
        expected = select("compilerkv", observation, cache, budget, tables)
        slots = [small.layer(l)[2][0] for l in range(2)]  # (1, G, S_l) -> (G, S_l)
        assert len(kept) == 2 and all(map(torch.equal, kept, expected)) and all(map(torch.equal, slots, expected))
        assert len(seconds) == len(evaluation.STAGES) - 1 and (seconds > 0).all()  # all but the scan
    before, nll = (list(cache.length), cache.next_position), model.nll(cache, logits, tokens[:20])
    evaluation.decode_ms(model, cache, logits.argmax().view(1, 1))
    assert cache.length == before[0] and torch.equal(cache.next_position, before[1]) and cache.nbytes == 300 * 256
    assert torch.equal(model.nll(cache, logits, tokens[:20]), nll)


@pytest.mark.parametrize("other", ["--ablate", "--full", "--quick", "--limit=3"])
def test_speed_excludes_what_chooses_records(world, tmp_path, capsys, other):
    """Guards against an option that is silently ignored."""
    [line] = refused(evaluate, world, tmp_path / "out.npz", ["--speed", other], capsys)
    assert line.startswith("error: --speed") and other.split("=")[0] in line
