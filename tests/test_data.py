"""Tests of data/: calibration and benchmark share no text, answers stand in their context, files are reproducible."""

import collections
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from eval import DEFAULT_DATA, TASKS, encode, read_records
from helpers import needs_weights, real_tokenizer

DATA = DEFAULT_DATA.parent
RECORDS = read_records(DEFAULT_DATA)
TEMPLATES = json.loads((DEFAULT_DATA / "config" / "dataset2prompt.json").read_text(encoding="utf-8"))
SPAN = 50  # characters


def read_lines(path):
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in open(path, encoding="utf-8")]


CALIBRATION = read_lines(DATA / "calibration.jsonl")


def spans(text):
    """All stretches of SPAN characters, white space collapsed."""
    text = " ".join(text.split())
    return {text[i:i + SPAN] for i in range(len(text) - SPAN + 1)}


def test_calibration_and_benchmark_share_no_text():
    """Guards against tables that were learned from the text they are judged on."""
    seen = set().union(*(spans(row[key]) for row in CALIBRATION for key in ("prompt", "continuation")))
    judged = [text for r in RECORDS for text in (r["context"], r["input"], r["prompt"], *r["answers"])]
    shared = [span for text in (*judged, *TEMPLATES.values()) for span in spans(text) & seen]
    assert not shared, f"{len(shared)} spans, such as {min(shared)!r}"
    assert len(seen) > 100_000 and spans(CALIBRATION[0]["prompt"]) & seen  # the search finds what is there


def test_no_prompt_occurs_twice():
    """Guards against prompts that count double in learning or in the score, and against two of one name."""
    digest = lambda text: hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
    for rows, key in ((CALIBRATION, "id"), (RECORDS, "_id")):
        assert len({digest(row["prompt"]) for row in rows}) == len({row[key] for row in rows}) == len(rows)
    assert len(CALIBRATION) >= 100


def test_every_category_has_ten_records():
    """Guards against a category whose score rests on a handful of answers."""
    counts = collections.Counter(TASKS[r["dataset"]].category for r in RECORDS)
    assert set(counts) == {task.category for task in TASKS.values()} and len(counts) == 6
    assert min(counts.values()) >= 10


def test_answers_stand_in_their_context():
    """Guards against a question whose answer was left out, cut, or stands in the question itself."""
    for r in RECORDS:
        if r["dataset"] in ("fieldqa", "hopqa", "codes"):
            assert r["answers"][0] in r["context"] and r["answers"][0] not in r["input"], r["_id"]
        elif r["dataset"] == "qtype":
            assert r["answers"][0] in r["all_classes"] and f"Type: {r['answers'][0]}\n" in r["context"], r["_id"]
            assert r["input"].removesuffix("\nType:") not in r["context"], r["_id"]
        assert all(answer.strip() for answer in r["answers"]), r["_id"]  # nor is the line of code to write a blank one
        assert r["dataset"] != "repo" or "\n" not in r["answers"][0] and r["input"].endswith("\n"), r["_id"]


def test_the_committed_files_are_what_compose_writes(tmp_path):
    """Guards against data edited by hand, unseeded choices, and an order that depends on the machine."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    made = ["calibration.jsonl", *(str(path.relative_to(DATA)) for path in DEFAULT_DATA.rglob("*.json*"))]
    for name in made:
        (tmp_path / "data" / name).unlink()
    subprocess.run([sys.executable, "data/compose.py"], cwd=tmp_path, check=True, capture_output=True)
    assert len(made) == 9
    for name in made:
        assert (tmp_path / "data" / name).read_bytes() == (DATA / name).read_bytes(), name


@needs_weights
def test_prompts_are_long_but_fit():
    """Guards against prompts too short to compress or too long for the model's context."""
    tokenizer = real_tokenizer()
    lengths = {r["_id"]: len(encode(r, tokenizer)[0]) for r in RECORDS}
    assert not {name: n for name, n in lengths.items() if not 900 <= n <= 4000}


def test_the_code_of_the_bank_compiles():
    """Guards against completing code that nobody could have written."""
    files = [file for path in (DATA / "bank").glob("*code.jsonl") for file in read_lines(path)]
    python = [file for file in files if Path(file["path"]).suffix == ".py"]
    assert len(python) >= 30 and len({file["path"] for file in files}) == len(files)
    for file in python:
        compile(file["code"], file["path"], "exec")
