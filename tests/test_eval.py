"""Tests of eval.py's functions: metrics against reference packages, statistics, LongBench's files, encoding.

metric_cases.json holds what the reference packages said. Whole runs of the command are in test_commands.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import compilerkv as ckv
from eval import (DEFAULT_DATA, GOLD, TASKS, all_found, classification, code_written, edit_similarity, compress, encode, interval, lcs,
                  line_written, normalise, number_share, protocol_tables, rank_correlation, read_records, resamples, risk_report,
                  rouge_l, score, summarise, token_f1, uncut, worst_tenth)
from helpers import assert_one_line, gguf_meta
from model import Tokenizer, UserError
from test_compilerkv import H, L, random_prompt

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
    ("City or town hall", "City or town hall", 1 / 2),  # of two parts of the right name LongBench drops only the first
])
def test_classification_by_hand(answer, gold, expected):
    """Guards against an answer that names every class, and against the class 'town' in the answer 'City or town'."""
    assert classification(answer, gold, ["Date", "Food", "City or town", "town", "City or town hall"][:4 + ("hall" in gold)]) == expected


@pytest.mark.parametrize("answer, gold, expected", [
    ("Paragraph 12", "Paragraph 12", 1), ("12 or 13", "12", 1 / 2), ("12, 12 and 3", "12", 2 / 3), ("120", "12", 0),
    ("no number", "12", 0), ("", "12", 0), ("12", "none", 0), ("012", "12", 0),
])
def test_number_share_by_hand(answer, gold, expected):
    """Guards against a digit found inside a longer number, and against a list of guesses that scores in full."""
    assert number_share(answer, gold, None) == pytest.approx(expected)


@pytest.mark.parametrize("answer, gold, expected", [
    ("abcd", "abxd", 0.75), ("", "x", 0), ("x", "", 0), ("", "", 1), ("abc", "abd", 0.67), ("xyz", "abc", 0),
    ("\n\nx = 1\ny = 2", "x = 1", 1), ("# note\n```python\n// other\nx = 1", "x = 1", 1), ("\n\n", "x", 0),
])
def test_edit_similarity_by_hand(answer, gold, expected):
    """Guards against scoring a comment, a code fence or the second line instead of the first line of code."""
    assert edit_similarity(answer, gold, None) == pytest.approx(expected)


# ------------------------------------------------------------------------------------ metrics, against the references

@pytest.mark.parametrize("metric, column", [(token_f1, 3), (rouge_l, 4), (classification, 5), (number_share, 6),
                                            (number_share, 7), (edit_similarity, 8)])
def test_metrics_equal_the_references(metric, column):
    """Guards against a metric that agrees with LongBench's only on easy strings; the file says what made its numbers."""
    cases = [case for case in CASES if case[column] is not None]  # numbers are asked for in some cases only
    assert len(CASES) >= 500 and len(cases) >= 40 and len({case[column] for case in cases}) > 2
    assert not [case for case in cases if abs(metric(*case[:3]) - case[column]) > 1e-6]


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


@pytest.mark.parametrize("answer, gold, expected", [
    ("12 and 34", "12, 34", 1), ("34 only", "12, 34", 1 / 2), ("", "12", 0), ("3412", "12, 34, 56", 2 / 3),
])
def test_all_found_by_hand(answer, gold, expected):
    """Guards against one value that counts for all, and against order."""
    assert all_found(answer, gold, None) == pytest.approx(expected)


@properties
@given(text=st.text(alphabet="ab\n#", max_size=12), more=st.text(alphabet="ab\n#", max_size=6))
def test_an_answer_that_has_ended_keeps_its_score(text, more):
    """Guards against an answer cut short before the part that LongBench scores was complete."""
    if line_written(text):
        assert score({"answers": ["ab"], "dataset": "fieldqa"}, text) == score({"answers": ["ab"], "dataset": "fieldqa"}, text + more)
    if code_written(text):
        assert edit_similarity(text, "ab", None) == edit_similarity(text + more, "ab", None)


# --------------------------------------------------------------------------------------------------------- statistics

@properties
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_interval_holds_the_mean_and_is_repeatable(values, seed):
    """Guards against an interval of the records instead of their mean, and against a seed that is ignored."""
    values = np.array(values)
    low, high = interval(values, resamples(range(len(values)), ["a"] * len(values), seed))
    assert min(values) - 1e-4 <= low <= np.mean(values) + 1e-4 and np.mean(values) - 1e-4 <= high <= max(values) + 1e-4
    assert [low, high] == interval(values, resamples(range(len(values)), ["a"] * len(values), seed))


def test_interval_shrinks_with_the_square_root_of_the_number_of_contexts():
    """Guards against a wrong confidence level, and against records of one context that pass for independent ones."""
    values = np.random.default_rng(0).normal(2, 1, 400)
    for n in (25, 400):
        low, high = interval(values[:n], resamples(range(n), ["a"] * n, 1))
        assert low < values[:n].mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values[:n].std() / np.sqrt(n), rel=0.08)
    copies, contexts = np.repeat(values, 4), np.repeat(np.arange(400), 4)  # the same record four times tells nothing new
    assert interval(copies, resamples(contexts, ["a"] * 1600, 1)) == \
        pytest.approx(interval(values, resamples(range(400), ["a"] * 400, 1)), abs=0.01)


def test_weights_make_every_task_count_the_same():
    """Guards against an average over records where LongBench averages over tasks."""
    low, high = interval(np.array([100.0, 0, 0, 0]), np.ones((3, 4), dtype=np.float32), np.array([1, 1 / 3, 1 / 3, 1 / 3]))
    assert low == high == pytest.approx(50)


def test_worst_tenth():
    """Guards against the best tenth, and against no record at all among fewer than ten."""
    assert worst_tenth([3.0, -1.0]) == 3 and worst_tenth(range(19)) == 18 and worst_tenth(range(40)) == 37.5


def test_the_worst_tenth_of_a_draw_counts_records_as_often_as_it_drew_them():
    """Guards against a tenth of the records in the place of a tenth of the draw, and against counts that stay in the order of the file."""
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=40), rng.multinomial(40, np.full(40, 1 / 40), size=5)
    assert np.allclose(worst_tenth(values, counts), [worst_tenth(np.repeat(values, c)) for c in counts])
    assert worst_tenth([1.0, 5.0], np.array([[0.5, 1.5], [1.75, 0.25]])) == pytest.approx([5, 0.25 * 5 + 0.75])  # a record that counts in part


@pytest.mark.parametrize("x, y, rho", [
    ([1, 2, 3], [10, 100, 1000], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 1, 2, 2], [1, 2, 1, 2], 0),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8), ([1, 2, 2, 4], [1, 3, 2, 4], 0.9486832980505138), ([7, 7], [1, 2], None),
])
def test_rank_correlation_by_hand(x, y, rho):
    """Guards against a correlation of values, and ties that are ranked in the order they come."""
    assert rank_correlation(x, y) == (rho if rho is None else pytest.approx(rho))


def result(policy, budget, dnll, score=50.0, kept=8.0, answer="red door", protocol="query-aware"):
    """One result as run_context makes it; 100 bytes a token."""
    return [protocol, policy, budget, score, dnll, kept, 100 * kept, 0.0, 0.1, answer]


def done(id, context, task, depth, *results):
    """One record as run_context makes it, and the number of its context."""
    return dict(id=id, context=context, task=task, depth=depth, n_tokens=20, needles=None, results=list(results),
                entropy_perplexity={"query-aware": [len(results), 2.0]})


def test_summarise_a_small_list_by_hand():
    """Guards against groups that mix budgets or policies, and a paired difference of unpaired records."""
    def results(shift, points, full=90.0):
        out = [result("full", None, 0.0, full, 20.0, protocol="full"), result("snapkv", 64, 9.0, 1.0, protocol="query-agnostic")]
        for budget, more in ((64, 1.0), (128, 0.0)):
            out += [result("snapkv", budget, shift + more, 10.0), result("compilerkv", budget, shift + more - 0.5, points, 8.0, "red"),
                    result("hindsight", budget, 0.1, 60.0)]
        return out

    records = [done("a", 0, "fieldqa", 0.1, *results(1.0, 30.0)), done("b", 1, "which", 0.9, *results(5.0, 50.0)),
               done("c", 1, "which", 1.0, *results(7.0, 20.0, full=40.0))]  # the full cache is wrong, too
    summary = summarise(records, "query-aware", seed=0)
    by = {(s["policy"], s["budget"]): s for s in summary}
    assert len(summary) == len(by) == 7 and [s["n"] for s in summary] == [3] * 7
    ours = by["compilerkv", 64]
    assert ours["score"] == pytest.approx((30 + 35) / 2) and ours["score_minus_snapkv"] == pytest.approx((20 + 25) / 2)
    assert ours["dnll"] == pytest.approx((1.5 + 5.5 + 7.5) / 3)
    assert ours["dnll_minus_snapkv"] == pytest.approx(-0.5) and ours["dnll_minus_snapkv_ci"] == pytest.approx([-0.5, -0.5])
    assert ours["dnll_worst_tenth"] == 7.5 and ours["kept_mean"] == 8 and ours["kv_bytes_mean"] == 800
    assert ours["score_by_task"] == {"fieldqa": 30, "which": 35}
    assert ours["by_category"]["synthetic"] == {"score": pytest.approx(35), "kv_bytes": 800}
    assert ours["dnll_by_depth"] == [1.5, None, None, None, 6.5]
    assert ours["failures"] == 50 and by["hindsight", 64]["failures"] == 0
    assert ours["agreement"] == pytest.approx(100 * 2 / 3) and by["snapkv", 64]["agreement"] == 100
    assert by["full", None]["score"] == pytest.approx((90 + 65) / 2) and [key for key, s in by.items() if s["oracle"]] == [("hindsight", 64), ("hindsight", 128)]
    assert {key[0] for key, s in by.items() if "dnll_minus_snapkv" in s} == {"compilerkv", "hindsight"}
    assert summarise(records, "query-aware", seed=0) == summary
    text = "\n".join(protocol_tables(summary))
    assert "| 64 | compilerkv | 32.5 | 41.9 | +22.5 [" in text and "| 64 | hindsight (oracle) |" in text
    assert "9.000" not in text  # nothing of the other protocol


def test_risk_report_sees_a_signal_within_tasks_only_where_there_is_one():
    """Guards against a correlation that is nothing but easy tasks against hard ones."""
    x = np.concatenate((np.arange(5.0), np.arange(20.0, 25.0)))
    task = np.array(["a"] * 5 + ["b"] * 5)
    dnll = np.where(task == "a", 1.0, 6.0) - x / 100  # falls within each task, rises between them
    report = risk_report(np.stack((x, np.ones(10)), 1), dnll, task)
    assert report["entropy"]["spearman"] > 0.2 and report["entropy"]["within"] == pytest.approx(-1)
    assert report["entropy"]["dnll_by_quarter"] == pytest.approx([0.99, 0.965, 5.795, 5.77])
    assert report["perplexity"] == {"spearman": None, "within": None, "dnll_by_quarter": [None] * 4}  # a signal that never moves


@pytest.mark.parametrize("policy, thresholds, expected", [
    ("compilerkv-paper", (1e9, 0.0, 0.0), 1 / 3), ("compilerkv-paper", (0.0, 0.0, 0.0), 0),  # nothing reaches it, or all do
    ("compilerkv", (1e-4, 1e-4, 1e-4), 0), ("compilerkv", (1e9, 1e9, 1e9), 1), ("snapkv", (1e9, 1e9, 1e9), 0),
    ("compilerkv", (1.0, 10.0, 10.0), 0), ("compilerkv", (1.0, 10.0, 90.0), 1 / 3),  # layer 1 has its safe half: layer 0 outbids it
])
def test_the_gate_is_credited_with_the_sizes_that_no_clamp_set(policy, thresholds, expected):
    """Guards against a clamp's work, or that of other layers which outbid one, that is reported as the gate's."""
    observation, cache = random_prompt(2, T=150)
    T_gate = np.array(thresholds)[None, :, None, None] * np.ones((1, 1, 20, 4))
    compiled = {name: ckv.Compiled(np.array([s.rules[0]], dtype=float), np.ones((1, L, H)), T_gate, np.arange(19.0), np.arange(3.0))
                for name, s in ckv.SETTINGS.items()}
    tables = ckv.Tables(np.array([80]), "", compiled, np.ones((L, H)))
    [(jobs, _)] = compress(SimpleNamespace(device=torch.device("cpu")), [policy], (80,), observation, cache, [], tables)
    assert [job[:3] for job in jobs] == [(policy, 80, pytest.approx(expected))]
    assert uncut(None) is None and np.isfinite(uncut(tables).compiled[policy if policy in compiled else "compilerkv"].T_gate).all()


# ------------------------------------------------------------------------------------------------- files and encoding

GOOD = {"_id": "x-0", "dataset": "fieldqa", "context": "C", "input": "I", "answers": ["yes"], "all_classes": None}


def write_data(directory, lines, prompts={"fieldqa": "{context} / {input}"}, maxlen={"fieldqa": 5}, stem="some"):
    """A directory in LongBench's layout with one data file of these lines."""
    for part in ("data", "config"):
        (directory / part).mkdir(exist_ok=True)
    (directory / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (directory / "config" / "dataset2maxlen.json").write_text(json.dumps(maxlen))
    (directory / "data" / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_read_records_fills_in_prompt_and_length(tmp_path):
    """Guards against blank lines that end a file, a limit on all files together, and LongBench-E's task names."""
    second = GOOD | {"_id": "x-1", "dataset": "fieldqa_e", "input": "{context}"}
    write_data(tmp_path, [json.dumps(GOOD), "", json.dumps(second), json.dumps(GOOD | {"_id": "x-2"})])
    (tmp_path / "data" / "another.jsonl").write_text(json.dumps(GOOD | {"_id": "y-0"}))
    records = read_records(tmp_path, limit=2)
    assert [r["_id"] for r in records] == ["y-0", "x-0", "x-1"] and len(read_records(tmp_path)) == 4
    assert [r["_id"] for r in read_records(tmp_path, tasks=["another"])] == ["y-0"]
    assert [(r["before"], r["question"]) for r in records] == [("C", " / I"), ("C", " / I"), ("C", " / {context}")]
    assert {(r["dataset"], r["max_new"]) for r in records} == {("fieldqa", 5)}


def test_chinese_tasks_are_passed_over_and_refused_by_name(tmp_path):
    """Guards against Chinese answers scored by English rules, LongBench-E pooled with LongBench, and a whole folder refused."""
    write_data(tmp_path, ["{this is not read}"], stem="dureader")
    write_data(tmp_path, [json.dumps(GOOD)])
    write_data(tmp_path, ["{nor this}"], stem="qasper_e")
    assert [r["_id"] for r in read_records(tmp_path)] == ["x-0"]
    for name, word in (("dureader", "Chinese"), ("gardening", "no gardening.jsonl")):
        with pytest.raises(UserError) as error:
            read_records(tmp_path, tasks=[name])
        assert_one_line(error, name, word, "there are qasper_e, some")


@pytest.mark.parametrize("line, word", [
    ("{not json", "malformed"), (json.dumps([1, 2]), "malformed"), ("7", "malformed"),
    *((json.dumps({k: v for k, v in GOOD.items() if k != key}), key) for key in GOOD if key != "all_classes"),
    (json.dumps(GOOD | {"_id": "first"}), "twice"), (json.dumps(GOOD | {"_id": ["x"]}), "string"),
    (json.dumps(GOOD | {"answers": "yes"}), "list"), (json.dumps(GOOD | {"answers": [1]}), "strings"),
    (json.dumps(GOOD | {"answers": []}), "answer"), (json.dumps(GOOD | {"dataset": 5}), "5"),
    *((json.dumps(GOOD | {"dataset": name}), name) for name in ("gardening", "qasper")),  # no metric; no prompt here
    (json.dumps(GOOD | {"context": ["x"]}), "strings"), (json.dumps(GOOD | {"all_classes": [1]}), "strings"),
    (json.dumps(GOOD | {"all_classes": "Date"}), "strings"),
    (json.dumps(GOOD | {"depth": 2}), "depth"), (json.dumps(GOOD | {"needles": 1}), "needles"),
])
def test_malformed_records_are_named_by_file_and_line(tmp_path, line, word):
    """Guards against a KeyError or a score of 0 from a record that was never right."""
    write_data(tmp_path, [json.dumps(GOOD | {"_id": "first"}), "", line])
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    assert_one_line(error, tmp_path / "data" / "some.jsonl", "line 3", word)


def test_lines_that_are_not_utf8_are_named(tmp_path):
    """Guards against a stack trace, or an answer judged by letters that were never in the file."""
    write_data(tmp_path, [json.dumps(GOOD)])
    with open(tmp_path / "data" / "some.jsonl", "ab") as file:
        file.write(json.dumps(GOOD | {"_id": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    assert_one_line(error, tmp_path / "data" / "some.jsonl", "line 2", "utf-8")


def test_directories_in_another_layout_are_refused_in_one_line(tmp_path):
    """Guards against a stack trace, or an average over no records, for a mistyped --data."""
    write_data(tmp_path, [json.dumps(GOOD)])
    config, data = tmp_path / "config", tmp_path / "data" / "some.jsonl"

    def refused(*words):
        with pytest.raises(UserError) as error:
            read_records(tmp_path)
        assert_one_line(error, *words)

    data.write_text("\n")
    refused(tmp_path / "data", "no records")
    data.unlink()
    refused(tmp_path / "data", "no records")
    write_data(tmp_path, [json.dumps(GOOD)], prompts={"fieldqa": "{input} {context}"})
    refused(data, "line 1", "before the context")
    (config / "dataset2maxlen.json").write_text("{")
    refused(config, "JSON")
    (config / "dataset2prompt.json").unlink()
    refused(config / "dataset2prompt.json", "LongBench's layout")


def byte_model(context_length):
    """Something with a tokenizer of single bytes and a context, which is all that encoding needs."""
    meta = gguf_meta()
    tokenizer = Tokenizer(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], "gpt-2",
                          "<s>{{ messages[0].content }}</s>", 258, 259)
    return SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(context_length=context_length))


def test_prompts_end_their_context_where_the_question_begins():
    """Guards against a question that leaks into the compressed context, or a context that is cut before its end."""
    model = byte_model(10 ** 6)
    for record in read_records(DEFAULT_DATA, limit=1):
        prompt, task, text = encode(record, model), TASKS[record["dataset"]], record["before"] + record["question"]
        before = model.tokenizer.decode(prompt.tokens[:prompt.n_context]).removeprefix("<s>")
        assert record["before"].startswith(before) and len(record["before"]) - len(before) < 3  # a merge may cross the border
        whole = f"<s>{text}</s>" if task.chat else text
        assert model.tokenizer.decode(prompt.tokens) == whole
        ending = [259] if task.chat else model.tokenizer.encode("\n")
        lead = "" if task.chat or text[-1].isspace() else task.lead
        gold = model.tokenizer.encode(lead + record["answers"][0]) + ending
        assert prompt.gold == gold[:GOLD] and not prompt.cut


def test_long_prompts_lose_their_middle_as_in_longbench():
    """Guards against a question that is cut off, a prompt that keeps only its end, and a context measured without it."""
    record = {"_id": "long", "dataset": "qasper", "answers": ["yes"], "max_new": 5, "before": "begin" + "x" * 5000, "question": " end?"}
    model = byte_model(1000)
    limit = int(1000 * 7500 / 8192)
    prompt = encode(record, model)
    text = model.tokenizer.decode(prompt.tokens[1:-1])
    assert prompt.cut and len(text) == limit // 2 * 2 and text.startswith("begin") and text.endswith("xx end?")
    assert prompt.n_context == len(prompt.tokens) - 6  # the bytes of " end?" and </s>
    with pytest.raises(UserError) as error:
        encode({"_id": "empty", "dataset": "fieldqa", "answers": ["yes"], "max_new": 5, "before": "", "question": "Q?"}, model)
    assert_one_line(error, "record empty", "no context")
    assert len(encode(record | {"max_new": 84}, model).tokens) == 916  # the short gold answer asks for no more room
    for longer in ({"max_new": 85}, {"answers": ["y" * 100]}):
        with pytest.raises(UserError) as error:
            encode(record | longer, byte_model(1000 if "max_new" in longer else 700))
        assert_one_line(error, "record long", "context of")
