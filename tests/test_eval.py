"""Tests of eval.py's functions: metrics against reference packages, statistics, LongBench's files, encoding.

metric_cases.json holds what the reference packages said. Whole runs of the command are in test_commands.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from eval import (DEFAULT_DATA, TASKS, classification, edit_similarity, encode, interval, lcs, markdown, normalise,
                  number_share, read_records, rouge_l, score, summarise, token_f1, worst_tenth)
from helpers import assert_one_line, gguf_meta
from model import Tokenizer, UserError

torch.set_num_threads(1)

CASES = json.loads((Path(__file__).parent / "metric_cases.json").read_text(encoding="utf-8"))["cases"]
properties = settings(max_examples=40, deadline=None, derandomize=True)


# ------------------------------------------------------------------------------------------------ metrics, by hand

def test_normalise_as_longbench_does():
    """Guards against articles cut out of words, punctuation that becomes a space, and upper case that is kept."""
    assert normalise("The cat's  (A) theatre,\nan hour-glass!") == "cats theatre hourglass"
    assert normalise("a the an") == normalise(" . ") == ""


@pytest.mark.parametrize("answer, gold, expected", [
    ("the green door", "a green, door", 1), ("door green", "green door", 1), ("green", "red", 0), ("", "red", 0),
    ("red red red", "red", 2 / 4), ("red", "red red red", 2 / 4), ("a b c", "b c d e", 4 / 6), ("The", "an", 0),
])
def test_token_f1_by_hand(answer, gold, expected):
    """Guards against sets where counts are meant, precision or recall alone, and articles that count as words."""
    assert token_f1(answer, gold, None) == pytest.approx(expected)


@pytest.mark.parametrize("answer, gold, expected", [
    ("a b c d", "a c b d", 2 * 3 / 8), ("a b", "c d", 0), ("", "a", 0), ("a", "", 0), ("a b c", "a b c", 1),
    ("b a", "a. b", 1),           # each gold sentence finds its word
    ("a b", "b a", 2 * 1 / 4),    # but within one sentence order counts
    ("a a b", "a b b", 1),        # distinct words
    ("a x. c y", "a b c", 2 * 2 / 7),  # the union over the answer's sentences
])
def test_rouge_l_by_hand(answer, gold, expected):
    """Guards against the wrong union over sentences, repeated words counted twice, and order that is ignored."""
    assert rouge_l(answer, gold, None) == pytest.approx(expected)


@pytest.mark.parametrize("answer, gold, expected", [
    ("Date", "Date", 1), ("A Date or Food", "Date", 1 / 2), ("Food", "Date", 0), ("date", "Date", 0), ("", "Date", 0),
    ("City or town", "City or town", 1), ("town", "City or town", 0), ("City or town", "town", 1 / 2),
])
def test_classification_by_hand(answer, gold, expected):
    """Guards against an answer that names every class, and against the class 'town' in the answer 'City or town'."""
    assert classification(answer, gold, ["Date", "Food", "City or town", "town"]) == expected


@pytest.mark.parametrize("answer, gold, expected", [
    ("Paragraph 12", "Paragraph 12", 1), ("12 or 13", "12", 1 / 2), ("12, 12 and 3", "12", 2 / 3), ("120", "12", 0),
    ("no number", "12", 0), ("", "12", 0), ("12", "none", 0), ("012", "12", 0),
])
def test_number_share_by_hand(answer, gold, expected):
    """Guards against a digit found inside a longer number, and against a list of guesses that scores in full."""
    assert number_share(answer, gold, None) == pytest.approx(expected)


@pytest.mark.parametrize("answer, gold, expected", [
    ("abcd", "abxd", 2 * 3 / 8), ("", "x", 0), ("x", "", 0), ("", "", 0), ("xyz", "abc", 0),
    ("\n\nx = 1\ny = 2", "x = 1", 1), ("# note\n```python\n// other\nx = 1", "x = 1", 1), ("\n\n", "x", 0),
])
def test_edit_similarity_by_hand(answer, gold, expected):
    """Guards against scoring a comment, a code fence or the second line instead of the first line of code."""
    assert edit_similarity(answer, gold, None) == pytest.approx(expected)


# ------------------------------------------------------------------------------------ metrics, against the references

def test_token_f1_equals_the_reference():
    """Guards against a normalisation or a count that only agrees with LongBench's on easy strings."""
    wrong = [case for case in CASES if abs(token_f1(case[0], case[1], None) - case[2]) > 1e-6]
    assert len(CASES) > 200 and not wrong


def test_rouge_l_equals_the_reference():
    """Guards against another tie-break among subsequences, other sentences, and words split at other places.

    The reference counts a sentence of nothing but white space as one empty word; here that word is written out.
    """
    spelt_out = lambda text: ".".join("\u2423" if s.isspace() else s for s in text.split("."))
    wrong = [case for case in CASES if abs(rouge_l(spelt_out(case[0]), spelt_out(case[1]), None) - case[3]) > 1e-6]
    assert not wrong
    assert sum(spelt_out(case[0]) == case[0] and spelt_out(case[1]) == case[1] for case in CASES) > 150


def test_edit_similarity_equals_the_reference():
    """Guards against Levenshtein distance or difflib's ratio, where insertions and deletions are meant."""
    cases = [case for case in CASES if case[0] and not any(mark in case[0] for mark in ("\n", "`", "#", "//"))]
    wrong = [case for case in cases if abs(edit_similarity(case[0], case[1], None) - case[4]) > 1e-6]
    assert len(cases) > 150 and not wrong


def slow_lcs(a, b):
    """Length of a longest common subsequence, by its recursive definition."""
    if not a or not b:
        return 0
    return 1 + slow_lcs(a[1:], b[1:]) if a[0] == b[0] else max(slow_lcs(a[1:], b), slow_lcs(a, b[1:]))


@properties
@given(a=st.text("abc", max_size=7), b=st.text("abcd", max_size=7))
def test_lcs_is_a_longest_common_subsequence(a, b):
    """Guards against a table filled in the wrong direction and a walk back that skips or repeats entries."""
    chosen = lcs(a, b)
    assert chosen == sorted(set(chosen)) and len(chosen) == slow_lcs(a, b)
    rest = iter(a)
    assert all(b[j] in rest for j in chosen)  # in this order in a, too


def test_score_takes_the_best_gold_answer_and_the_first_line_where_the_task_says_so():
    """Guards against a rambling second line that spoils or saves an answer, and a percentage that is a fraction."""
    row = {"answers": ["green door", "red door"]}
    assert score({**row, "dataset": "fieldqa"}, "\n\nred door\ngreen door and more") == 100
    assert score({**row, "dataset": "fieldqa"}, "blue\nred door") == 0
    assert score({**row, "dataset": "hotpotqa"}, "blue\nred door") == pytest.approx(80)
    assert score({"answers": ["Date"], "all_classes": ["Date", "Food"], "dataset": "trec"}, "Date\nFood") == 100
    assert score({"answers": ["x = 1"], "dataset": "repo"}, "# set x\nx = 1") == 100  # all lines reach the code metric


# --------------------------------------------------------------------------------------------------------- statistics

@properties
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_interval_holds_the_mean_and_is_repeatable(values, seed):
    """Guards against an interval of the records instead of their mean, and against a seed that is ignored."""
    low, high = interval(values, np.random.default_rng(seed))
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high <= max(values) + 1e-9
    assert (low, high) == interval(values, np.random.default_rng(seed))


def test_interval_shrinks_with_the_square_root_of_n():
    """Guards against resamples of another size than the sample, and against a wrong confidence level."""
    values = np.random.default_rng(0).normal(2, 1, 1600)
    for n in (25, 400, 1600):
        low, high = interval(values[:n], np.random.default_rng(1))
        assert low < values[:n].mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values[:n].std() / np.sqrt(n), rel=0.08)


def test_worst_tenth():
    """Guards against the best tenth, and against no record at all among fewer than ten."""
    assert worst_tenth([3.0, -1.0]) == 3 and worst_tenth(range(19)) == 18 and worst_tenth(range(40)) == 37.5


def result(id, policy, budget, dnll, task="fieldqa", score=50.0, kept=8.0):
    """One row as run_record makes it; 100 bytes a token."""
    return dict(id=id, task=task, policy=policy, budget=budget, dnll=dnll, score=score, kept=kept, kv_bytes=100 * kept)


def test_summarise_a_small_list_by_hand():
    """Guards against groups that mix budgets or policies, and a paired difference of unpaired records."""
    rows = [result("a", "full", None, 0.0, score=90.0, kept=20.0), result("b", "full", None, 0.0, "codes", 70.0, 30.0)]
    for budget, shift in ((64, 1.0), (128, 0.0)):
        rows += [result("a", "snapkv", budget, 1.0 + shift), result("b", "snapkv", budget, 5.0, "codes", 10.0)]
        rows += [result("a", "compilerkv", budget, 0.5 + shift), result("b", "compilerkv", budget, 4.5, "codes", 30.0)]
        rows += [result("a", "hindsight", budget, 0.0), result("b", "hindsight", budget, 0.1, "codes")]
    summary = summarise(rows, seed=0)
    by = {(s["policy"], s["budget"]): s for s in summary}
    assert len(summary) == len(by) == 7 and [s["n"] for s in summary] == [2] * 7
    ours = by["compilerkv", 64]
    assert [ours[k] for k in ("score", "dnll", "dnll_worst_tenth", "kept_mean")] == [40, 3, 4.5, 8]
    assert ours["score_by_category"] == {"single-document QA": 50, "synthetic": 30} and ours["dnll_ci"] == (1.5, 4.5)
    assert ours["dnll_minus_snapkv"] == pytest.approx(-0.5)
    assert ours["dnll_minus_snapkv_ci"] == pytest.approx((-0.5, -0.5))  # the same for both records: no spread
    assert by["full", None]["score"] == 80 and by["full", None]["kv_bytes_mean"] == 2500
    assert [key for key, s in by.items() if s["oracle"]] == [("hindsight", 64), ("hindsight", 128)]
    assert {key[0] for key, s in by.items() if "dnll_minus_snapkv" in s} == {"compilerkv", "hindsight"}
    assert summarise(rows, seed=0) == summary
    text = markdown(summary)
    assert "| 64 | compilerkv | 40.0 | 50.0 | 3.000 [1.500, 4.500] | -0.500 [-0.500, -0.500] | 4.50 | 8.0 |" in text
    assert "| 128 | hindsight (oracle) |" in text and "| all | full | 80.0 | 100.0 |" in text


# ------------------------------------------------------------------------------------------------- files and encoding

GOOD = {"_id": "x-0", "dataset": "fieldqa", "context": "C", "input": "I", "answers": ["yes"], "all_classes": None}


def write_data(directory, lines, prompts={"fieldqa": "{context} / {input}"}, maxlen={"fieldqa": 5}):
    """A directory in LongBench's layout with one data file of these lines."""
    (directory / "data").mkdir()
    (directory / "config").mkdir()
    (directory / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (directory / "config" / "dataset2maxlen.json").write_text(json.dumps(maxlen))
    (directory / "data" / "some.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_read_records_fills_in_prompt_and_length(tmp_path):
    """Guards against blank lines that end a file, a limit on all files together, and LongBench-E's task names."""
    second = GOOD | {"_id": "x-1", "dataset": "fieldqa_e", "input": "{context}"}
    write_data(tmp_path, [json.dumps(GOOD), "", json.dumps(second), json.dumps(GOOD | {"_id": "x-2"})])
    (tmp_path / "data" / "another.jsonl").write_text(json.dumps(GOOD | {"_id": "y-0"}))
    records = read_records(tmp_path, limit=2)
    assert [r["_id"] for r in records] == ["y-0", "x-0", "x-1"] and len(read_records(tmp_path)) == 4
    assert [r["prompt"] for r in records] == ["C / I", "C / I", "C / {context}"]
    assert {(r["dataset"], r["max_new"]) for r in records} == {("fieldqa", 5)}


@pytest.mark.parametrize("line, word", [
    ("{not json", "malformed"), (json.dumps([1, 2]), "malformed"), ("7", "malformed"),
    *((json.dumps({k: v for k, v in GOOD.items() if k != key}), key) for key in GOOD if key != "all_classes"),
    (json.dumps(GOOD | {"_id": "first"}), "twice"), (json.dumps(GOOD | {"_id": ["x"]}), "string"),
    (json.dumps(GOOD | {"answers": "yes"}), "list"), (json.dumps(GOOD | {"answers": [1]}), "strings"),
    (json.dumps(GOOD | {"answers": []}), "answer"), (json.dumps(GOOD | {"dataset": 5}), "5"),
    *((json.dumps(GOOD | {"dataset": name}), name) for name in ("gardening", "qasper")),  # no metric; no prompt here
])
def test_malformed_records_are_named_by_file_and_line(tmp_path, line, word):
    """Guards against a KeyError or a score of 0 from a record that was never right."""
    write_data(tmp_path, [json.dumps(GOOD | {"_id": "first"}), "", line])
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    assert_one_line(error, tmp_path / "data" / "some.jsonl", "line 3", word)


def test_directories_in_another_layout_are_refused_in_one_line(tmp_path):
    """Guards against a stack trace, or an average over no records, for a mistyped --data."""
    write_data(tmp_path, [json.dumps(GOOD)])
    config, data = tmp_path / "config", tmp_path / "data" / "some.jsonl"

    def refused(*words):
        with pytest.raises(UserError) as error:
            read_records(tmp_path)
        assert_one_line(error, *words)

    data.unlink()
    refused(tmp_path / "data", "no .jsonl")
    (config / "dataset2maxlen.json").write_text("{")
    refused(config, "JSON")
    (config / "dataset2prompt.json").unlink()
    refused(config / "dataset2prompt.json", "LongBench's layout")


def test_gold_answers_end_as_an_answer_ends():
    """Guards against a gold answer that is never asked to stop, glued to the prompt, or put behind two spaces."""
    meta = gguf_meta()
    tokenizer = Tokenizer(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], "gpt-2",
                          "<s>{{ messages[0].content }}</s>", 258, 259)
    for record in read_records(DEFAULT_DATA, limit=1):
        (prompt, gold), text, task = encode(record, tokenizer), record["answers"][0], record["dataset"]
        assert TASKS[task].chat == (task == "codes")
        if TASKS[task].chat:
            assert prompt == [258, *tokenizer.encode(record["prompt"]), 259]
            assert gold == tokenizer.encode(text) + [259]
        else:
            space = "" if task == "repo" else " "  # code goes on at the start of a line
            assert prompt == tokenizer.encode(record["prompt"]) and tokenizer.decode(gold) == space + text + "\n"
