"""Tests of data/: calibration and benchmark share no text, answers stand in their context, files are reproducible."""

import collections
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from eval import DEFAULT_DATA, TASKS, encode, read_records
from helpers import needs_weights, real_tokenizer

DATA = DEFAULT_DATA.parent
SUITES = {name: read_records(DATA / name) for name in ("mini_longbench", "needles", "ruler")}
MINI, RECORDS = SUITES["mini_longbench"], [record for records in SUITES.values() for record in records]
TEMPLATES = [text for name in SUITES for text in json.loads(
    (DATA / name / "config" / "dataset2prompt.json").read_text(encoding="utf-8")).values()]
SPAN = 50  # characters


def read_lines(path):
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in open(path, encoding="utf-8")]


CALIBRATION = read_lines(DATA / "calibration.jsonl")


def spans(text):
    """All stretches of SPAN characters, white space collapsed."""
    text = " ".join(text.split())
    return {text[i:i + SPAN] for i in range(len(text) - SPAN + 1)}


def test_calibration_and_benchmarks_share_no_text():
    """Guards against tables that were learned from the text they are judged on."""
    seen = set().union(*(spans(row[key]) for row in CALIBRATION for key in ("prompt", "continuation")))
    judged = {text for r in RECORDS for text in (r["context"], r["before"][-200:], r["question"], *r["answers"])}
    shared = [span for text in (*judged, *TEMPLATES) for span in spans(text) & seen]
    assert not shared, f"{len(shared)} spans, such as {min(shared)!r}"
    assert len(seen) > 100_000 and spans(CALIBRATION[0]["prompt"]) & seen  # the search finds what is there


def test_no_prompt_occurs_twice():
    """Guards against prompts that count double in learning or in the score, and against two of one name."""
    digest = lambda text: hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
    prompts = [(row["id"], row["prompt"]) for row in CALIBRATION] + [(r["_id"], r["before"] + r["question"]) for r in RECORDS]
    assert len({digest(text) for _, text in prompts}) == len({name for name, _ in prompts}) == len(prompts)
    assert set(collections.Counter(row["kind"] for row in CALIBRATION).values()) == {18} and len(CALIBRATION) == 108


def test_kinds_take_turns_and_both_halves_have_composed_and_whole_prompts():
    """Guards against a split by kind or by half that leaves a part of the corpus on one side."""
    kinds = [row["kind"] for row in CALIBRATION]
    assert len(set(kinds[:6])) == 6 and kinds == kinds[:6] * 18  # as train_tables.KINDS takes them
    whole = {row["prompt"] for row in read_lines(DATA / "bank" / "calib_prompts.jsonl")}
    for start in range(12):  # a kind's prompts of one half: every second round of six
        share = [row["prompt"] in whole for row in CALIBRATION[start::12]]
        assert len(share) == 9 and 4 <= sum(share) <= 5


def test_the_mini_longbench_has_two_tasks_a_category_and_sixty_four_records_a_task():
    """Guards against a category whose score rests on a handful of answers, and tasks that weigh unevenly."""
    counts = collections.Counter(r["dataset"] for r in MINI)
    categories = collections.Counter(TASKS[name].category for name in counts)
    assert set(categories.values()) == {2} and len(categories) == 6 and set(counts.values()) == {64}


def test_needed_facts_stand_evenly_over_the_depth_of_the_context():
    """Guards against a benchmark that a policy wins by keeping the beginning or the end."""
    for name in ("fieldqa", "reportqa", "hopqa", "kinqa", "news", "which"):
        depths = [r["depth"] for r in MINI if r["dataset"] == name]
        fifths = collections.Counter(min(int(5 * d), 4) for d in depths)
        assert len(depths) == 64 and min(fifths[i] for i in range(5)) >= 6, (name, fifths)


def test_answers_stand_in_their_context():
    """Guards against a question whose answer was left out, cut, or stands in the question itself."""
    for r in RECORDS:
        answer, task = r["answers"][0], r["dataset"]
        if task in ("fieldqa", "reportqa", "hopqa", "which", "needle", "multikey", "multivalue", "tracking"):
            context = " ".join(r["context"].split())
            parts = answer.split(", ") if task in ("multivalue", "tracking") else [answer.removesuffix('"')]
            assert all(part in context for part in parts) and not any(part in r["input"] for part in parts), r["_id"]
        elif task == "kinqa":
            parent, town = answer.removesuffix(")").split(" (")
            assert f"{parent} was born in {town} in " in r["context"] and f" was the child of {parent}." in r["context"], r["_id"]
            assert parent not in r["input"] and town not in r["input"], r["_id"]
        elif task == "count":
            assert f"Paragraph {answer}: " in r["context"] and f"Paragraph {int(answer) + 1}: " not in r["context"], r["_id"]
        elif task == "qtype":
            assert answer in r["all_classes"] and f"Type: {answer}\n" in r["context"], r["_id"]
            assert r["input"].removesuffix("\nType:") not in r["context"], r["_id"]
        assert all(answer.strip() for answer in r["answers"]), r["_id"]  # nor is the line of code to write a blank one
        assert task not in ("lines", "repo") or "\n" not in answer and not r["question"].endswith("\n"), r["_id"]


def test_needle_and_ruler_facts_are_where_the_record_says():
    """Guards against a heat map whose depth is not the needle's."""
    for r in SUITES["needles"]:
        at = r["context"].index(r["answers"][0]) / len(r["context"])
        assert abs(at - r["depth"]) < 0.06 and r["context"].count("The archive code of ") == r["needles"], r["_id"]
    assert collections.Counter(r["needles"] for r in SUITES["needles"]) == {1: 24, 2: 24, 4: 24}
    assert all(r["context"].count("The locker number of ") == 16 for r in SUITES["ruler"] if r["dataset"] == "multikey")


def test_the_committed_files_are_what_compose_writes(tmp_path):
    """Guards against data edited by hand, unseeded choices, and an order that depends on the machine."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    made = ["calibration.jsonl", *(str(path.relative_to(DATA)) for name in SUITES for path in (DATA / name).rglob("*.json*"))]
    for name in made:
        (tmp_path / "data" / name).unlink()
    subprocess.run([sys.executable, "data/compose.py"], cwd=tmp_path, check=True, capture_output=True)
    assert len(made) == 1 + 12 + 1 + 3 + 3 * 2
    for name in made:
        assert (tmp_path / "data" / name).read_bytes() == (DATA / name).read_bytes(), name


@needs_weights
def test_prompts_are_long_but_fit():
    """Guards against prompts too short to compress or too long for the model's context."""
    model = SimpleNamespace(tokenizer=real_tokenizer(), config=SimpleNamespace(context_length=8192))
    short_or_long = {row["id"]: n for row in CALIBRATION if not 1000 <= (n := len(model.tokenizer.encode(row["prompt"]))) <= 4000}
    assert not short_or_long
    lengths = {r["_id"]: len(encode(r, model).tokens) for r in RECORDS}
    assert not {r["_id"] for r in MINI if not 900 <= lengths[r["_id"]] <= 6000}
    assert not {r["_id"] for r in RECORDS if not 900 <= lengths[r["_id"]] <= 7500}


def test_the_code_of_the_bank_compiles():
    """Guards against completing code that nobody could have written."""
    files = [file for name in ("*code.jsonl", "calib_sources.jsonl") for path in (DATA / "bank").glob(name) for file in read_lines(path)]
    python = [file for file in files if Path(file["path"]).suffix == ".py"]
    assert len(python) >= 30 and len({file["path"] for file in files}) == len(files)
    for file in python:
        compile(file["code"], file["path"], "exec")
