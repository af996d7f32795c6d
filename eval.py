"""Evaluate every policy at every budget: `python eval.py` (a sample), `--full` (all records).

Records that share a context share its prefill. They are judged under two protocols that are never mixed:
    query-aware     the whole prompt, question included, is prefilled, then compressed (the question is in the window)
    query-agnostic  the context is compressed before the question is known; the question then passes through what is left
                    (the first question of each context: the same tokens would be evicted for the others)
Two measures: the task's own score (LongBench's metrics, 0 to 100) of the greedy answer, and dNLL, the mean negative
log-likelihood of the gold answer under the compressed cache minus that under the full one, in nats a token (0 = nothing
lost). Reading order: metrics and tasks -> records -> one context -> the run -> statistics -> report -> pictures ->
ablations -> speed -> command.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import platform
import re
import string
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import compilerkv as ckv
from model import KVCache, UserError, last_attention, load

plt.switch_backend("agg")  # pictures go to files; no display is needed
HERE = Path(__file__).parent
DEFAULT_DATA, DEFAULT_TABLES = HERE / "data" / "mini_longbench", HERE / "tables" / "smollm2-135m.npz"
PROTOCOLS = ("query-aware", "query-agnostic")
SAMPLE = 6             # records a task without --full: a multiple of the records that share a context
RESAMPLES = 10000      # bootstrap resamples of the contexts behind every interval
PROMPT_SHARE = 7500 / 8192  # of the model's context: longer prompts lose their middle, as LongBench cuts for 8k models
GOLD = 64              # tokens of the gold answer whose loss is measured, at most
KEPT = ("streaming", "tova", "h2o", "snapkv", "adakv", "compilerkv-paper", "compilerkv", "hindsight")  # whose kept tokens are drawn
ORACLE = "hindsight (oracle)"  # what reports call the policy `hindsight`
RIGHT = 50             # a score from which an answer counts as right when failures are counted


# ------------------------------------------------------------------------------------------------- LongBench's metrics

def normalise(text):
    """Lower case, no punctuation, no articles, single spaces: how LongBench reads an answer before it counts words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer, gold, classes):
    """Harmonic mean of word precision and recall, as sets with counts."""
    a, g = normalise(answer).split(), normalise(gold).split()
    common = sum((collections.Counter(a) & collections.Counter(g)).values())
    return 2 * common / (len(a) + len(g)) if common else 0.0


def lcs(a, b):
    """Which entries of b belong to a longest common subsequence of sequences a and b: sorted indices into b."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int32)
    b = np.array(list(b), dtype=object)
    for i, x in enumerate(a, 1):
        match = np.where(b == x, table[i - 1, :-1] + 1, table[i - 1, 1:])
        table[i, 1:] = np.maximum.accumulate(match)
    i, j, chosen = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            chosen.append(j)
        elif table[i - 1, j] >= table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return chosen[::-1]


def rouge_l(answer, gold, classes):
    """Summary-level ROUGE-L F1: distinct gold words in the union of common subsequences over pairs of sentences."""
    sentences = lambda text: [s.split() or [""] for s in text.split(".") if s]  # a blank sentence is one empty word
    a, g = sentences(answer), sentences(gold)
    found = {s[i] for s in g for t in a for i in lcs(t, s)}
    n_answer, n_gold = len({w for s in a for w in s}), len({w for s in g for w in s})
    return 2 * len(found) / (n_answer + n_gold) if found else 0.0


def classification(answer, gold, classes):
    """1 / number of class names in the answer if the right one is among them (parts of the right name do not count)."""
    named = [c for c in classes or [gold] if c in answer]
    for c in named:  # LongBench shortens the list while it walks it, so the name after a dropped one stays; so do we
        if c in gold and c != gold:
            named.remove(c)
    return 1 / len(named) if gold in named else 0.0


def number_share(answer, gold, classes):
    """Share of the numbers in the answer that are the gold number: LongBench's retrieval and count score."""
    numbers, right = re.findall(r"\d+", answer), re.search(r"\d+", gold)
    return numbers.count(right.group()) / len(numbers) if numbers and right else 0.0


def is_code(line):
    """Whether LongBench takes the line for code: no fence and no comment."""
    return not any(mark in line for mark in ("`", "#", "//"))


def edit_similarity(answer, gold, classes):
    """Of the first line that is code: 2 common / total characters, to a whole per cent as the reference rounds it."""
    line = next(filter(is_code, answer.lstrip("\n").split("\n")), "")
    ratio = 2 * len(lcs(line, gold)) / (len(line) + len(gold)) if line and gold else float(line == gold)
    return round(100 * ratio) / 100


def all_found(answer, gold, classes):
    """Share of the gold strings, separated by commas, that stand in the answer in any case: RULER's score."""
    parts = gold.lower().split(", ")
    return sum(part in answer.lower() for part in parts) / len(parts)


def line_written(text):
    """Whether the first line of an answer is complete: what follows does not count where a task scores one line."""
    return "\n" in text.lstrip("\n")


def code_written(text):
    """Whether the first line that is code is complete."""
    return any(map(is_code, text.lstrip("\n").split("\n")[:-1]))


@dataclasses.dataclass(frozen=True)
class Task:
    """How one task is asked and judged."""
    category: str
    metric: object         # (answer, gold, classes) -> 0..1
    chat: bool = True      # inside the model's chat template, or as plain text
    ended: object = None   # text -> whether the rest of the answer cannot count; None: until the model ends its turn
    lead: str = " "        # what stands between a plain prompt and its answer
    one_line: bool = False  # a line break ends the answer and may not begin it, as LongBench generates samsum


plain = partial(Task, chat=False, ended=line_written)  # a task without chat template
SINGLE, MULTI, SUMMARY, FEW, SYNTHETIC, CODE = ("single-document QA", "multi-document QA", "summarisation", "few-shot",
                                                "synthetic", "code")
TASKS = {
    # the mini-LongBench of this project
    "fieldqa": plain(SINGLE, token_f1), "reportqa": plain(SINGLE, token_f1), "hopqa": plain(MULTI, token_f1),
    "kinqa": plain(MULTI, token_f1), "reports": plain(SUMMARY, rouge_l), "news": plain(SUMMARY, rouge_l),
    "qtype": plain(FEW, classification), "chats": plain(FEW, rouge_l), "count": plain(SYNTHETIC, number_share),
    "which": Task(SYNTHETIC, number_share), "lines": plain(CODE, edit_similarity, ended=code_written, lead="\n"),
    "repo": plain(CODE, edit_similarity, ended=code_written, lead="\n"),
    # needles, and tasks in the style of RULER
    "needle": Task("needle", all_found), "multikey": Task("multi-key", all_found),
    "multivalue": Task("multi-value", all_found), "tracking": plain("variable tracking", all_found),
    # LongBench's English tasks
    **{name: Task(SINGLE, token_f1) for name in ("narrativeqa", "qasper", "multifieldqa_en")},
    **{name: Task(MULTI, token_f1) for name in ("hotpotqa", "2wikimqa", "musique")},
    **{name: Task(SUMMARY, rouge_l) for name in ("gov_report", "qmsum", "multi_news")},
    "trec": plain(FEW, classification), "triviaqa": plain(FEW, token_f1), "samsum": plain(FEW, rouge_l, one_line=True),
    "passage_count": Task(SYNTHETIC, number_share), "passage_retrieval_en": Task(SYNTHETIC, number_share),
    **{name: plain(CODE, edit_similarity, ended=code_written) for name in ("lcc", "repobench-p")},
}
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")  # of LongBench, not judged here


def score(record, answer):
    """The task's metric, best over the gold answers, in 0..100."""
    task = TASKS[record["dataset"]]
    if task.ended is line_written:
        answer = answer.lstrip("\n").split("\n")[0]
    return 100 * max(task.metric(answer, gold, record.get("all_classes")) for gold in record["answers"])


# ------------------------------------------------------------------------------------------------------------- records

def json_lines(path, what, read, limit=None):
    """read(object) of every line of a UTF-8 file that is not blank, of the first `limit` of them.

    Raises UserError naming file and line for one that is no JSON or that `read` refuses.
    """
    lines, out = Path(path).read_bytes().split(b"\n"), []
    for n, line in [(n, line) for n, line in enumerate(lines, 1) if line.strip()][:limit]:
        try:
            out.append(read(json.loads(line)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, line {n}: malformed {what}: {reason}") from None
    return out


def read_records(directory, limit=None, tasks=None):
    """LongBench's layout: data/*.jsonl, config/dataset2prompt.json, config/dataset2maxlen.json -> list of records.

    limit: records a file; tasks: names of the only files to read (default: all but Chinese ones and LongBench-E's, `*_e`).
    Each record gains "before" (its prompt up to the end of the context), "question" (the rest) and "max_new".
    Raises UserError naming file and line.
    """
    directory, ids = Path(directory), set()
    try:
        prompts, max_new = (json.loads((directory / "config" / f"dataset2{name}.json").read_text(encoding="utf-8"))
                            for name in ("prompt", "maxlen"))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; --data needs LongBench's layout, data/ and config/") from None
    except ValueError as error:
        raise UserError(f"{directory / 'config'}: not JSON ({error})") from None
    files = {path.stem: path for path in sorted((directory / "data").glob("*.jsonl")) if path.stem not in CHINESE}
    chosen = tasks or [name for name in files if not name.endswith("_e")]
    for name in chosen:
        if name not in files:
            reason = "Chinese tasks are not judged here" if name in CHINESE else f"no {name}.jsonl in {directory / 'data'}"
            raise UserError(f"--tasks {name}: {reason}; there are {', '.join(files)}")

    def read(record):
        """A record as it is used here; raises one of many errors for a malformed one."""
        answers, classes = record["answers"], record.get("all_classes") or []
        texts = (record["_id"], record["input"], record["context"], *answers, *classes)
        if not all(isinstance(x, str) for x in texts) or not isinstance(answers, list) or not isinstance(classes, list):
            raise TypeError("_id, input, context, the list of answers and the names in all_classes must be strings")
        name = str(record["dataset"]).removesuffix("_e")  # LongBench-E names its tasks so
        head, mark, tail = prompts.get(name, "").partition("{context}")
        before, question = (head + mark).format(**record), tail.format(**record)
        length, depth, needles = int(max_new.get(name, 0)), record.get("depth"), record.get("needles")
        if not (depth is None or 0 <= float(depth) <= 1) or needles and (depth is None or int(needles) < 1):
            raise ValueError(f"depth {depth!r} and needles {needles!r} must be a number from 0 to 1, and how many")
        if record["_id"] in ids:
            raise ValueError(f"_id {record['_id']!r} occurs twice")
        if "{input}" in head:
            raise ValueError("the prompt asks its question before the context, which no protocol here allows")
        if name not in TASKS or not mark or length < 1 or not answers:
            raise ValueError(f"no metric, prompt with {{context}}, answer length or gold answer for task {name!r}")
        ids.add(record["_id"])
        return {**record, "dataset": name, "depth": None if depth is None else float(depth), "needles": needles and int(needles),
                "before": before, "question": question, "max_new": length}

    records = [record for name in files if name in chosen for record in json_lines(files[name], "record", read, limit)]
    if not records:
        raise UserError(f"{directory / 'data'}: no records of English tasks here")
    return records


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids of one record: tokens[:n_context] do not depend on the question; gold ends with what ends an answer."""
    tokens: list
    n_context: int
    gold: list
    cut: bool = False  # the middle was cut out


def with_end(tokenizer, answer, chat):
    """Token ids of an answer and of what ends it: in a chat the end-of-turn token, else the end of its line."""
    return tokenizer.encode(answer, begin=False) + sorted(tokenizer.stop) if chat else tokenizer.encode(answer + "\n", begin=False)


def encode(record, model):
    """A record's Prompt. One longer than the context loses its middle as in LongBench; UserError if it still is."""
    task, tokenizer = TASKS[record["dataset"]], model.tokenizer
    text, question = record["before"] + record["question"], record["question"]
    ids, limit = tokenizer.encode(text, begin=False), int(PROMPT_SHARE * model.config.context_length)
    if len(ids) > limit:
        text = tokenizer.decode(ids[:limit // 2], special=False) + tokenizer.decode(ids[-(limit // 2):], special=False)
        question = tokenizer.decode(tokenizer.encode(question, begin=False), special=False)
        question = os.path.commonprefix([question[::-1], text[::-1]])[::-1]  # of a question cut too, what is left
    wrap = tokenizer.chat if task.chat else tokenizer.encode
    tokens, unasked = wrap(text), wrap(text[:len(text) - len(question)])
    n_context = min(len(os.path.commonprefix([tokens, unasked])), len(tokens) - 1)
    if n_context < 1:
        raise UserError(f"record {record['_id']}: there is no context to compress")
    lead = "" if task.chat or text[-1:].isspace() else task.lead
    gold = with_end(tokenizer, lead + record["answers"][0], task.chat)
    longest = max(len(gold[:GOLD]), record["max_new"])
    if len(tokens) + longest > model.config.context_length:
        raise UserError(f"record {record['_id']}: {len(tokens)} prompt tokens and up to {longest} of the answer do not "
                        f"fit into the model's context of {model.config.context_length}: shorten the answer")
    return Prompt(tokens, n_context, gold[:GOLD], len(ids) > limit)


# --------------------------------------------------------------------------------------------------------- one context

COLUMNS = ("protocol", "policy", "budget", "score", "dnll", "kept", "kv_bytes", "gated", "select_seconds", "answer")


def look_ahead(model, observation, cache, ids):
    """The observation with an oracle's knowledge: attention (L, H, S) that slots get from all tokens to come. The cache stays as found."""
    _, _, received = model.forward(torch.tensor([ids], device=model.device), cache, total=True)
    cache.rewind(len(ids))
    return dataclasses.replace(observation, answer=received[..., :-len(ids)])


def uncut(tables):
    """These tables with thresholds that every token reaches, so that only their ratios over layers are left. None stays None."""
    if tables is None:
        return None
    least = ckv.OURS.tau_grid[0]  # which every token reaches
    lowest = lambda T: least * T / T.max(1, keepdims=True).clip(least)  # of (budgets, L, 20, 4)
    return dataclasses.replace(tables, compiled={name: dataclasses.replace(c, T_gate=lowest(c.T_gate)) for name, c in tables.compiled.items()})


def compress(model, policies, budgets, observation, cache, ids, tables):
    """Every policy at every budget on one cache: [(rows of (policy, budget, gated, seconds), batch of the caches left)].

    ids: the tokens to come, which only hindsight sees. gated: the share of layers whose size a gate set, not a clamp: without its cut
    they keep more; 0 of policies that have no gate. Caches with a KV head that keeps more than four times the largest budget make a
    batch of their own, because they would pad all others.
    """
    if "hindsight" in policies:
        observation = look_ahead(model, observation, cache, ids)
    parts, widest, reached = {False: ([], []), True: ([], [])}, 4 * max(budgets), uncut(tables)
    for policy, budget in itertools.product(policies, budgets):
        start = clock(model.device)
        kept = ckv.select(policy, observation, cache, budget, tables)
        seconds, gated = clock(model.device) - start, 0.0
        if policy in ckv.SETTINGS:
            gated = float((ckv.tokens_kept(kept) < ckv.tokens_kept(ckv.select(policy, observation, cache, budget, reached))).mean())
        jobs, sets = parts[max(k.shape[1] for k in kept) > widest]
        jobs.append((policy, budget, gated, seconds))
        sets.append(kept)
    return [(jobs, ckv.evict(cache, *sets)) for jobs, sets in parts.values() if jobs]


def write_answer(model, record, cache, logits):
    """Greedy answers (texts) of every row of the cache, until what follows cannot count."""
    task, tokenizer, stop = TASKS[record["dataset"]], model.tokenizer, model.tokenizer.stop
    if task.one_line:
        stop = stop | {tokenizer.encode("\n")[-1]}
        logits = logits.index_fill(-1, torch.tensor(sorted(stop), device=logits.device), -torch.inf)
    text = lambda ids: tokenizer.decode(ids, special=False)
    return [text(ids) for ids in model.decode(cache, logits, record["max_new"], stop, task.ended and (lambda ids: task.ended(text(ids))))]


def prefills(model, prompts, total):
    """Prefill the context that prompts share once, then each one's question: yields (logits, cache, observation, the context's own).

    It is one cache, and each question's takes the place of the one before. total: see `Model.prefill`.
    """
    n_context = prompts[0].n_context
    context = model.prefill(prompts[0].tokens[:n_context], ckv.MAX_WINDOW, total)
    _, cache, seen = context
    for prompt in prompts:
        cache.rewind(cache.length[0] - n_context)  # to the end of the context
        logits, _, observation = model.prefill(prompt.tokens[n_context:], ckv.MAX_WINDOW, total, before=context)
        yield logits, cache, observation, seen


def run_context(model, records, prompts, args, tables):
    """Records that share a context: one prefill of it, then every question, query-aware; the first also query-agnostic.

    Returns one object a record, with a list of results: COLUMNS of every (protocol, policy, budget).
    """
    policies, n_context = [p for p in args.policies if p != "full"], prompts[0].n_context
    entries, out = model.config.n_layer * model.config.n_kv_head, []
    token_bytes = 2 * model.config.head_dim * model.dtype.itemsize  # one key and one value
    for record, prompt, (logits, cache, observation, seen) in zip(records, prompts, prefills(model, prompts, "h2o" in policies)):
        question, gold, results = prompt.tokens[n_context:], prompt.gold, []

        def measure(protocol, jobs, batch, logits, kept):
            """Append the results of a batch, one row a job; writing the answers uses the batch up."""
            nll, texts = model.nll(batch, logits, gold).tolist(), write_answer(model, record, batch, logits)
            for (policy, budget, gated, seconds), n, loss, text in zip(jobs, kept.tolist(), nll, texts):
                results.append([protocol, policy, budget, round(score(record, text), 2), round(loss - full, 5),
                                round(n / entries, 2), n * token_bytes, round(gated, 3), round(seconds, 5), text])

        full = model.nll(cache, logits, gold).item()
        if "query-aware" in args.protocols:
            for jobs, batch in compress(model, policies, args.budgets, observation, cache, gold, tables):
                measure("query-aware", jobs, batch, logits, batch.kept())
        if "full" in args.policies:
            measure("full", [("full", None, 0.0, 0.0)], cache, logits, cache.kept())
        if "query-agnostic" in args.protocols and not out:  # the context's first question only
            cache.rewind(cache.length[0] - n_context)
            for jobs, batch in compress(model, policies, args.budgets, seen, cache, question + gold, tables):
                kept, ids = batch.kept(), torch.tensor([question], device=model.device)
                hidden, _, _ = model.forward(ids.expand(len(kept), -1), batch)  # the question reads what is left of the context
                measure("query-agnostic", jobs, batch, model.logits(hidden[:, -1]), kept)
        risks = {protocol: [round(x, 4) for x in ckv.risk(o, ckv.MAX_WINDOW)]
                 for protocol, o in zip(PROTOCOLS, (observation, seen))}
        out.append({"id": record["_id"], "task": record["dataset"], "n_tokens": len(prompt.tokens), "n_context": n_context,
                    "cut": prompt.cut, "depth": record.get("depth"), "needles": record.get("needles"),
                    "nll_full": round(full, 5), "entropy_perplexity": risks, "results": results})
    return out


# -------------------------------------------------------------------------------------------------------------- the run

def contexts(records, prompts):
    """Neighbouring records with the same context tokens, as [(records, prompts)]: the unit of work."""
    pairs = zip(records, prompts)
    key = lambda pair: (pair[0]["dataset"], pair[1].tokens[:pair[1].n_context])
    return [tuple(zip(*group)) for _, group in itertools.groupby(pairs, key)]


def run(one_context, work, out, settings):
    """one_context(records, prompts) of all work; what is finished comes from the journal of an interrupted run of these settings.

    one_context returns an object with "id" for each record. Returns [(those objects, seconds)], whether it was interrupted,
    and the journal in directory `out`, which the report makes needless. The journal holds one JSON line a context; a line
    that was cut short by a crash is done again.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    journal, done = out / f"unfinished-{digest}.jsonl", {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a blank line, or one that was cut short
            rows, seconds = json.loads(line)
            done[rows[0]["id"]] = rows, seconds
    if done:
        print(f"continuing: {len(done)} of {len(work)} contexts were finished before", file=sys.stderr)
    interrupted = False
    try:
        with open(journal, "a", encoding="utf-8") as file:
            for records, prompts in tqdm(work, desc="contexts", unit="context", dynamic_ncols=True):
                if records[0]["_id"] not in done:
                    start = time.perf_counter()
                    rows = one_context(records, prompts)
                    done[records[0]["_id"]] = line = rows, round(time.perf_counter() - start, 2)
                    file.write(f"\n{json.dumps(line)}\n")  # a line of its own, whatever a crash left before it
                    file.flush()
    except KeyboardInterrupt:  # report what is finished; the journal stays
        interrupted = True
    if not done:
        journal.unlink(missing_ok=True)
        raise KeyboardInterrupt
    return [done[records[0]["_id"]] for records, _ in work if records[0]["_id"] in done], interrupted, journal


# ---------------------------------------------------------------------------------------------------------- statistics

def resamples(contexts, tasks, seed):
    """Bootstrap over contexts, task by task: how often each record counts in each draw, (RESAMPLES, records) float32."""
    contexts, tasks, generator = np.asarray(contexts), np.asarray(tasks), np.random.default_rng(seed)
    counts = np.zeros((RESAMPLES, len(tasks)), dtype=np.float32)
    for task in dict.fromkeys(tasks.tolist()):
        _, index = np.unique(contexts[tasks == task], return_inverse=True)  # which of the task's n contexts each record has
        n = index.max() + 1
        draws = generator.integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
        drawn = np.bincount(draws.ravel(), minlength=n * RESAMPLES).reshape(RESAMPLES, n)[:, index]  # how often each record
        counts[:, tasks == task] = drawn * (len(index) / drawn.sum(1, keepdims=True))  # the task weighs the same in every draw
    return counts


def interval(values, counts, weights=1.0):
    """95% percentile interval of the mean of `values` (records,) over the resamples -> [low, high]."""
    means = counts @ (weights * values) / (counts @ (weights * np.ones_like(values)))
    return np.percentile(means, (2.5, 97.5)).tolist()


def worst_tenth(values, counts=None):
    """Mean of the largest tenth of values (records,), at least one; with counts (draws, records), see `resamples`, that of each draw."""
    values = np.asarray(values, dtype=float)
    order, tenth = np.argsort(-values), max(1, len(values) // 10)
    counts = np.ones(len(values)) if counts is None else counts
    taken = np.minimum(counts[..., order].cumsum(-1), tenth)  # places of the tenth that a record and all above it fill
    return np.diff(taken, prepend=0) @ values[order] / tenth


def rank_correlation(x, y):
    """Spearman's rho: correlation of the ranks, ties sharing their mean rank; None where one side is constant."""
    rx, ry = ((np.searchsorted(np.sort(v), v) + np.searchsorted(np.sort(v), v, side="right") + 1) / 2 for v in (x, y))
    return float(np.corrcoef(rx, ry)[0, 1]) if rx.std() and ry.std() else None


def columns(records, protocol):
    """{(policy, budget): {column: values in the order of the records}} of one protocol, the full cache included."""
    table = collections.defaultdict(list)
    for under, policy, budget, *values in (result for record in records for result in record["results"]):
        if under in (protocol, "full"):
            table[policy, budget].append(values)
    return {key: dict(zip(COLUMNS[3:], map(np.array, zip(*rows)))) for key, rows in table.items()}


def summarise(records, protocol, seed):
    """One object a policy and budget of one protocol, over the records that were judged under it.

    The same resamples of their contexts serve all, so that differences are paired.
    score: mean over tasks of the mean over records, as LongBench averages; dNLL and the rest: mean over records.
    failures: of the records that the full cache gets right, the per cent that this one does not; agreement: word F1 with
    the full cache's answer; by depth: mean dNLL by fifths of the place of the needed fact.
    """
    table, summary = columns(records, protocol), []
    task = np.array([r["task"] for r in records])
    counts = resamples([r["context"] for r in records], task, seed)
    category = np.array([TASKS[t].category for t in task])
    fifth = np.array([-1 if r["depth"] is None else min(int(5 * r["depth"]), 4) for r in records])
    risks = np.array([r["entropy_perplexity"][protocol] for r in records])  # (records, 2)
    weights = 1 / np.array([(task == t).sum() for t in task])  # every task counts the same
    mean_score = lambda v, at=slice(None): float((weights * v)[at].sum() / weights[at].sum())
    where = lambda v, at: float(v[at].mean()) if at.any() else None
    full = table.get(("full", None))
    if full and protocol == "query-agnostic":  # count what can be evicted: the context without the question
        for name in ("kept", "kv_bytes"):
            full[name] = full[name] * np.array([r["n_context"] / r["n_tokens"] for r in records])
    for (policy, budget), values in table.items():
        points, dnll = values["score"], values["dnll"]
        row = {"protocol": protocol, "policy": policy, "budget": budget, "oracle": policy == "hindsight", "n": len(points),
               "score": mean_score(points), "score_ci": interval(points, counts, weights),
               "dnll": float(dnll.mean()), "dnll_ci": interval(dnll, counts), "dnll_worst_tenth": worst_tenth(dnll),
               "kept_mean": float(values["kept"].mean()), "kv_bytes_mean": float(values["kv_bytes"].mean()),
               "gated": float(values["gated"].mean()), "select_ms": 1000 * float(np.median(values["select_seconds"])),
               "score_by_task": {t: where(points, task == t) for t in dict.fromkeys(task.tolist())},
               "by_category": {c: {"score": mean_score(points, category == c), "kv_bytes": where(values["kv_bytes"], category == c)}
                               for c in dict.fromkeys(category.tolist())},
               "dnll_by_depth": [where(dnll, fifth == i) for i in range(5)]}
        rival = table.get(("snapkv", budget))
        if rival and policy != "snapkv":  # paired by record
            for name, weight in (("score", weights), ("dnll", np.ones(len(dnll)))):
                difference = values[name] - rival[name]
                row[f"{name}_minus_snapkv"] = float(weight @ difference / weight.sum())
                row[f"{name}_minus_snapkv_ci"] = interval(difference, counts, weight)
        if policy != "full":
            row["risk"] = risk_report(risks, dnll, task)
            if full:
                row["failures"] = where(100.0 * (points < RIGHT), full["score"] >= RIGHT)
                row["agreement"] = float(np.mean([100 * (a == b or token_f1(a, b, None))
                                                  for a, b in zip(values["answer"].tolist(), full["answer"].tolist())]))
        summary.append(row)
    return summary


def risk_report(risks, dnll, task):
    """Do the two risk signals of Eq. 7, (records, 2), predict dNLL? Rank correlations, and mean dNLL by quarter of each.

    within: the mean of the own correlations of tasks with five records or more, which no difference between tasks can feign.
    """
    out = {}
    for name, x in zip(("entropy", "perplexity"), risks.T):
        quarter = np.searchsorted(np.quantile(x, (0.25, 0.5, 0.75)), x, side="right")
        within = [rank_correlation(x[task == t], dnll[task == t]) for t in dict.fromkeys(task.tolist()) if (task == t).sum() >= 5]
        within = [rho for rho in within if rho is not None]
        out[name] = {"spearman": rank_correlation(x, dnll), "within": float(np.mean(within)) if within else None,
                     "dnll_by_quarter": [float(dnll[quarter == q].mean()) if (quarter == q).any() and np.ptp(x) else None
                                         for q in range(4)]}
    return out


# -------------------------------------------------------------------------------------------------------------- report

def label(policy):
    """What reports and pictures call a policy."""
    return ORACLE if policy == "hindsight" else policy


def cell(value, form="{:.2f}"):
    return "-" if value is None else form.format(value)


def lines_of(head, rows):
    """A Markdown table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""]


def task_table(records):
    """What was asked, and how the full cache answers."""
    table = columns(records, None).get(("full", None))
    rows = []
    for t in dict.fromkeys(r["task"] for r in records):
        at = [i for i, r in enumerate(records) if r["task"] == t]
        lengths = [records[i]["n_tokens"] for i in at]
        rows.append([t, TASKS[t].category, str(len(at)), f"{min(lengths)} / {int(np.median(lengths))} / {max(lengths)}",
                     cell(table and table["score"][at].mean(), "{:.1f}")])
    return lines_of(["task", "category", "records", "prompt tokens (min / median / max)", "full-cache score"], rows)


def protocol_tables(summary):
    """Results, tails, tasks and risk of one protocol, as lines of Markdown."""
    protocol, part = summary[0]["protocol"], [s for s in summary if s["policy"] != "full"]
    full = next((s for s in summary if s["policy"] == "full"), None)
    shown = [full] * bool(full) + part
    paired = lambda s, name, form: form.format(s[name], *s[name + "_ci"]) if name in s else "-"
    first = lambda s: [str(s["budget"] or "all"), label(s["policy"])]
    out = [f"### {protocol}, {part[0]['n']} records", "", *lines_of(
        ["budget", "policy", "score", "% of full", "score - SnapKV's [95%]", "dNLL [95%]", "dNLL - SnapKV's [95%]", "kept a layer",
         "gated %", "KV MB", "ms"],
        [first(s) + [f"{s['score']:.1f}", cell(100 * s["score"] / full["score"] if full and full["score"] else None, "{:.1f}"),
                     paired(s, "score_minus_snapkv", "{:+.1f} [{:+.1f}, {:+.1f}]"), paired(s, "dnll", "{:.3f} [{:.3f}, {:.3f}]"),
                     paired(s, "dnll_minus_snapkv", "{:+.3f} [{:+.3f}, {:+.3f}]"), f"{s['kept_mean']:.1f}",
                     cell(100 * s["gated"] if s["policy"] in ckv.SETTINGS else None, "{:.0f}"), f"{s['kv_bytes_mean'] / 1e6:.2f}",
                     cell(s["select_ms"] or None, "{:.0f}")] for s in shown])]
    out += [f"Tails, {protocol}: worst tenth of dNLL; failures, in % of the records that the full cache gets right; agreement "
            "with the full cache's answer; dNLL by the place of the needed fact, in fifths of the context.", "", *lines_of(
        ["budget", "policy", "worst tenth", "failures %", "agreement", "0-20%", "20-40%", "40-60%", "60-80%", "80-100%"],
        [first(s) + [f"{s['dnll_worst_tenth']:.2f}", cell(s.get("failures"), "{:.0f}"), cell(s.get("agreement"), "{:.0f}"),
                     *map(cell, s["dnll_by_depth"])] for s in part])]
    tasks = list(part[0]["score_by_task"])
    out += [f"Scores by task, {protocol}:", ""]
    out += lines_of(["budget", "policy", *tasks], [first(s) + [f"{s['score_by_task'][t]:.1f}" for t in tasks] for s in shown])
    risky = [s for s in part if s["policy"] in ("snapkv", *ckv.SETTINGS)]
    if risky:
        out += [f"Do the risk signals predict the loss? {protocol}: Spearman's rho of each signal with dNLL over all records, the "
                "mean of rho within tasks, and mean dNLL by rising quarter of the signal.", "", *lines_of(
            ["budget", "policy", "entropy rho", "within tasks", "by quarter", "perplexity rho", "within tasks", "by quarter"],
            [first(s) + [x for r in s["risk"].values() for x in (cell(r["spearman"], "{:+.2f}"), cell(r["within"], "{:+.2f}"),
                                                                 " / ".join(map(cell, r["dnll_by_quarter"])))] for s in risky])]
    return out


# ------------------------------------------------------------------------------------------------------------ pictures

def save_figure(figure, path):
    """Write a figure as PNG in one step, and free it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    ckv.write_atomically(path, buffer.getvalue())


def style(policy):
    """How a policy is drawn, the same in every picture: ours black, the oracle dotted."""
    ours = policy == "compilerkv"
    return {"marker": "o", "markersize": 4, "linewidth": 2.6 if ours else 1.3, "linestyle": ":" if policy == "hindsight" else "-",
            "color": "black" if ours else plt.cm.tab20(list(ckv.POLICIES).index(policy)), "zorder": 3 if ours else 2, "label": label(policy)}


def finish(figure, axes, title, path):
    """Grid, one legend for all panels, a title; save."""
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def draw_quality(summary, path, title):
    """Against the megabytes kept: dNLL and worst tenth over all records, then the score of each category."""
    part, full = [s for s in summary if s["policy"] != "full"], next((s for s in summary if s["policy"] == "full"), None)
    panels = [("all: dNLL, nats a token", lambda s: (s["kv_bytes_mean"], s["dnll"])),
              ("all: dNLL of the worst tenth", lambda s: (s["kv_bytes_mean"], s["dnll_worst_tenth"]))]
    panels += [(f"{c}: score", lambda s, c=c: (s["by_category"][c]["kv_bytes"], s["by_category"][c]["score"]))
               for c in part[0]["by_category"]]
    width = -(-len(panels) // 2)
    figure, axes = plt.subplots(2, width, figsize=(3.3 * width + 2, 6.2), layout="constrained", squeeze=False)
    for axis, (name, point) in zip(axes.flat, panels):
        for policy in dict.fromkeys(s["policy"] for s in part):
            x, y = np.array(sorted(point(s) for s in part if s["policy"] == policy)).T
            axis.plot(x / 1e6, y, **style(policy))
        if full:
            axis.axhline(point(full)[1], color="grey", linestyle="--", linewidth=1, label="full cache")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set(title=name, xlabel="KV megabytes kept")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    finish(figure, axes.flat[:len(panels)], title, path)


def draw_tails(summary, records, budget, path, title):
    """Where it fails at one budget: share of records at or above each dNLL, dNLL by place of the fact, by entropy, by perplexity."""
    table = columns(records, summary[0]["protocol"])
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    for s in (s for s in summary if s["budget"] == budget):
        dnll, look = np.sort(table[s["policy"], budget]["dnll"]), style(s["policy"])
        axes[0].plot(dnll, 100 * (1 - np.arange(len(dnll)) / len(dnll)), **{**look, "marker": None})
        for axis, values in zip(axes[1:], (s["dnll_by_depth"], *(r["dnll_by_quarter"] for r in s["risk"].values()))):
            axis.plot(np.array(values, dtype=float), **look)  # None becomes NaN, a gap
    axes[0].set(yscale="log", xlim=(-1, None), xlabel="dNLL, nats a token", ylabel="% of records at or above", title="Tail")
    axes[0].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes[1].set(xlabel="where in the context the needed fact stands", ylabel="mean dNLL", title="Lost facts")
    axes[1].set_xticks(range(5), ["0-20%", "20-40%", "40-60%", "60-80%", "80-100%"])
    for axis, name in zip(axes[2:], ("attention entropy", "perplexity of the window")):
        axis.set(xlabel=f"quarter of the records by {name}", ylabel="mean dNLL", title=f"Risk: {name}")
        axis.set_xticks(range(4), ["lowest", "2nd", "3rd", "highest"])
    finish(figure, axes, f"{title}, budget {budget}", path)


def draw_needles(records, protocol, path, title):
    """Needle heat maps: a row a number of needles, a column a policy; score by length and depth, mean over budgets."""
    table = columns(records, protocol)
    cells = [(r["needles"], round(r["n_tokens"], -3), r["depth"]) for r in records]
    numbers, lengths, depths = (sorted(set(values)) for values in zip(*cells))
    policies = sorted(dict.fromkeys(policy for policy, _ in table), key=lambda policy: policy != "full")  # the full cache first
    figure, axes = plt.subplots(len(numbers), len(policies), figsize=(1.75 * len(policies) + 1.5, 1.9 * len(numbers) + 1),
                                layout="constrained", squeeze=False, sharex=True, sharey=True)
    for axis, (number, policy) in zip(axes.flat, itertools.product(numbers, policies)):
        points = np.mean([values["score"] for key, values in table.items() if key[0] == policy], axis=0)
        mean_at = lambda *place: np.mean([p for p, c in zip(points, cells) if c == place] or [np.nan])  # no record here: blank
        image = np.array([[mean_at(number, length, depth) for length in lengths] for depth in depths])
        shown = axis.imshow(image, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{n // 1000}k" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
        axis.set_title(f"{label(policy)}\nmean {np.nanmean(image):.0f}", fontsize=8)
    for axis, number in zip(axes[:, 0], numbers):
        axis.set_ylabel(f"{number} needle{'s' * (number > 1)}\ndepth")
    figure.colorbar(shown, ax=axes.ravel().tolist(), shrink=0.7, label="score")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def draw_kept(model, record, args, budget, tables, path):
    """Which tokens of one prompt each policy kept, as text: the darker, the more (layer, KV head) pairs kept the token."""
    prompt, policies, width = encode(record, model), [p for p in KEPT if p in args.policies], 104  # letters a line
    if not policies:
        return
    _, cache, observation = model.prefill(prompt.tokens, ckv.MAX_WINDOW, "h2o" in policies)
    observation = look_ahead(model, observation, cache, prompt.gold)
    letters = [(t, c) for t, token in enumerate(prompt.tokens) for c in model.tokenizer.decode([token]).replace("\n", " ")]
    height, n_rows = -(-len(letters) // width), -(-len(policies) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(17, n_rows * (0.155 * height + 0.6)), layout="constrained", squeeze=False)
    for axis, policy in zip(axes.flat, policies):
        kept = torch.cat([k.flatten() for k in ckv.select(policy, observation, cache, budget, tables)])  # over layers and KV heads
        share = kept[kept >= 0].bincount(minlength=len(prompt.tokens)) / (model.config.n_layer * model.config.n_kv_head)  # (T,)
        shades = np.full(height * width, np.nan)
        shades[:len(letters)] = share.cpu()[[t for t, _ in letters]]
        axis.imshow(shades.reshape(height, width), cmap="OrRd", vmin=0, vmax=1.6, aspect="auto", extent=(0, width, height, 0))
        for i, (_, c) in enumerate(letters):
            axis.text(i % width + 0.5, i // width + 0.55, c, family="monospace", fontsize=6.5, ha="center", va="center")
        axis.set_title(f"{label(policy)}: the darker, the more layers and heads keep the token", fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    answer = textwrap.shorten(record["answers"][0], 80).replace("$", r"\$")
    figure.suptitle(f"{record['_id']}, {budget} of {len(prompt.tokens)} tokens a layer; the answer: {answer}")
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------- ablations

PARTS = {  # each changes one thing in CompilerKV as compiled, without the gate, so that all keep as many tokens
    "W = 1, no gate": {"W": False}, "scope layer": {"scope": "layer"}, "scope model": {"scope": "model"},
    "mean of the queries": {"queries": "mean"}, "one set a layer": {"shared": True}, "no value norm": {"norm": False},
    "sinks not protected": {"sinks": 0}, "kernel 1": {"kernel": 1}, "kernel 7": {"kernel": 7}, "window 8": {"window": 8},
    "window 32": {"window": 32}, "window 64": {"window": 64}}
# (a row, what it is compared with): the first is better where the difference is below 0
PAIRS = (*(("CompilerKV", other) for other in ("SnapKV", "SnapKV, kernel 31", "AdaKV", "H2O", "W = 1", "constant tau", "no gate",
                                               "smaller budget", "W = 1, no gate", "cap 1", "no cap", "paper grid")),
         *(("no gate", other) for other in ("SnapKV", "AdaKV", "H2O", *PARTS)))


def ablated(observation, cache, budget, tables, W=True, gate="none", norm=True, sinks=ckv.SINKS, window=None, kernel=None, **settings):
    """Kept positions of CompilerKV as compiled but for what the arguments change."""
    rule, learned_W, learned_tau = tables.look_up("compilerkv", budget, *ckv.risk(observation, ckv.OURS.window))
    window, kernel, tau = window or rule[0], kernel or rule[1], learned_tau if gate == "learned" else None
    if gate in ("constant", "smaller"):  # as many tokens as the learned gate left on the calibration prompts
        compiled = tables.budgets[tables.nearest(budget)]
        check = tables.provenance["evidence"]["compilerkv"]["check"][str(compiled)]
        if gate == "constant":
            tau = torch.full_like(learned_tau, check["constant_tau"])  # (L,)
        else:
            budget = max(round(budget * check["kept_mean"] / compiled), ckv.MIN_BUDGET)
    setting = dataclasses.replace(ckv.OURS, **settings)
    G = cache.k[0].shape[1]
    u = ckv.utility(observation, cache, setting, window) if norm else \
        ckv.attention_level(observation, window, setting.scope, setting.queries)  # (L, H, T)
    u = ckv.spread(u, window, kernel, sinks)
    W = learned_W if W else torch.ones_like(learned_W)  # (L, H)
    s = ckv.protect(ckv.head_score(u, W.to(u.device), setting.n_sets(G)), budget, window, sinks)  # (L, n_sets, T)
    return [kept.expand(G, -1) for kept in ckv.gate(s, tau, budget, setting.cap)]


SWITCHES = {  # all rows: selectors, like ckv.POLICIES
    "CompilerKV": ckv.select_compilerkv, "W = 1": partial(ablated, gate="learned", W=False),
    "constant tau": partial(ablated, gate="constant"), "cap 1": partial(ablated, gate="learned", cap=1),
    "no cap": partial(ablated, gate="learned", cap=10 ** 6), "smaller budget": partial(ablated, gate="smaller"), "no gate": ablated,
    **{name: partial(ablated, **change) for name, change in PARTS.items()},
    "paper grid": ckv.POLICIES["compilerkv-paper"], ORACLE: ckv.select_hindsight, "SnapKV": ckv.select_snapkv,
    "SnapKV, mean pool": partial(ckv.select_snapkv, pooled=torch.nn.functional.avg_pool1d),
    "SnapKV, kernel 31": partial(ckv.select_snapkv, kernel=31), "AdaKV": ckv.select_adakv, "DynamicKV": ckv.select_dynamickv,
    "PyramidKV": ckv.select_pyramidkv, "H2O": ckv.select_h2o, "StreamingLLM": ckv.select_streaming}


def ablate_context(model, records, prompts, args, tables):
    """dNLL and tokens kept a layer of every row of SWITCHES asked for, (rows, budgets) each, query-aware: one object a record."""
    out, entries = [], model.config.n_layer * model.config.n_kv_head
    for record, prompt, (logits, cache, observation, _) in zip(records, prompts, prefills(model, prompts, "H2O" in args.rows)):
        full = model.nll(cache, logits, prompt.gold)
        if ORACLE in args.rows:
            observation = look_ahead(model, observation, cache, prompt.gold)
        dnll, kept = [], []
        for name in args.rows:
            batch = ckv.evict(cache, *(SWITCHES[name](observation, cache, budget, tables) for budget in args.budgets))
            dnll.append((model.nll(batch, logits, prompt.gold) - full).tolist())
            kept.append((batch.kept() / entries).tolist())
        out.append({"id": record["_id"], "task": record["dataset"], "cut": prompt.cut, "dnll": dnll, "kept": kept})
    return out


def write_ablation(model, records, results, meta, args, tables):
    """Each row at each budget, then the paired differences: ablation-<data>.md, into --out. Returns the report."""
    dnll, kept = (np.array([row[name] for row in results]) for name in ("dnll", "kept"))  # (records, rows, budgets) each
    counts = resamples([row["context"] for row in results], [row["task"] for row in results], args.seed)
    show = lambda v, form: form.format(v.mean(), *interval(v, counts))
    token = 2 * model.config.head_dim * model.dtype.itemsize * model.config.n_layer * model.config.n_kv_head
    worst_of = lambda *counts: np.array([[worst_tenth(values, *counts) for values in row.T] for row in dnll.transpose(1, 0, 2)])
    worst, draws = worst_of(), worst_of(counts)  # (rows, budgets), (rows, budgets, RESAMPLES)
    rows = [[str(budget), name, show(dnll[:, i, b], "{:.3f} [{:.3f}, {:.3f}]"), f"{worst[i, b]:.2f}",
             f"{kept[:, i, b].mean():.1f}", f"{kept[:, i, b].mean() * token / 1e6:.2f}"]
            for b, budget in enumerate(args.budgets) for i, name in enumerate(args.rows)]
    out = lines_of(["budget", "row", "dNLL [95%]", "worst tenth", "kept a layer", "KV MB"], rows)
    at, single = args.rows.index, [(str(budget), slice(b, b + 1)) for b, budget in enumerate(args.budgets)]
    pairs = [(at(name), at(other)) for name, other in PAIRS if {name, other} <= set(args.rows)]
    rows = []
    for (name, part), (i, j) in itertools.product(single + [("mean", slice(None))] * (len(single) > 1), pairs):
        low, high = np.percentile((draws[i] - draws[j])[part].mean(0), (2.5, 97.5))
        rows.append([name, f"{args.rows[i]} - {args.rows[j]}", show((dnll[:, i] - dnll[:, j])[:, part].mean(1), "{:+.3f} [{:+.3f}, {:+.3f}]"),
                     f"{(worst[i] - worst[j])[part].mean():+.2f} [{low:+.2f}, {high:+.2f}]", f"{(kept[:, i] - kept[:, j])[:, part].mean():+.1f}"])
    out += lines_of(["budget", "difference", "dNLL [95%], paired", "worst tenth [95%], paired", "kept a layer"], rows)
    if {"CompilerKV", "SnapKV", ORACLE} <= set(args.rows):
        ours, rival, best = (dnll[:, at(name)].mean(0) for name in ("CompilerKV", "SnapKV", ORACLE))
        if (rival != best).all():  # they are equal where the budget holds every prompt whole
            closed = 100 * (rival - ours) / (rival - best)
            out += ["Share of the gap from SnapKV to hindsight that CompilerKV closes, by budget: "
                    + ", ".join(f"{c:.0f}%" for c in closed) + f"; mean {closed.mean():.0f}%.", ""]
    report = "\n".join([heading(meta), "", *out])
    ckv.write_atomically(args.out / f"ablation-{meta['data']}.md", report)
    return report


# --------------------------------------------------------------------------------------------------------------- speed

SPEED_LENGTHS = (1024, 2048, 4096, 8000)  # prompt tokens; rising, because the process's memory is a high-water mark
ROUNDS, SCANS = 5, 3    # of which the fastest counts; one round fewer above 4,096 tokens
WARM_UP, STEPS = 2, 24  # decode steps: not counted (the first makes room in the cache), and timed
ROLL_OUTS, ROLL_KEPT, ROLL_TOKENS = 16, 256, 64  # caches in one batch, tokens each KV head kept, tokens read from each cache
STAGES = ("Eq. 4: A", "Eq. 7: risk, look-up", "Eq. 4: utility, spread", "Eqs. 5-6, 8: score, gate", "evict")


def clock(device):
    """Seconds, read once the device has finished all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def fastest(rounds, device, *works):
    """Least seconds of each of the works, which take turns so that a slow spell hits all; and what the last returned."""
    least = [np.inf] * len(works)
    for _, (i, work) in itertools.product(range(rounds), enumerate(works)):
        result = None  # frees what the work before returned
        start = clock(device)
        result = work()
        least[i] = min(least[i], clock(device) - start)
    return least, result


def peak_memory():
    """Most bytes of main memory that the process has held so far; None where the system does not tell (Windows)."""
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux: KiB


def machine_rates(model):
    """What this machine reaches at its best: bytes a second from memory, multiply-adds a second in the model's dtype.

    Memory: 256 MB read (a sum) or copied (512 MB moved), whichever moves more. Matrices: 2,048 tokens by the first gate_up.
    """
    data, weight = torch.ones(64_000_000, device=model.device), model.blocks[0].gate_up  # float32; (2F, E)
    copy, x = torch.empty_like(data), torch.ones(2048, weight.shape[1], dtype=model.dtype, device=model.device)
    y = x.new_empty(2048, weight.shape[0])  # made once, so that fresh memory is not timed
    (read, copied, product), _ = fastest(5, model.device, data.sum, lambda: copy.copy_(data), lambda: torch.mm(x, weight.T, out=y))
    return max(data.nbytes / read, 2 * data.nbytes / copied), len(x) * weight.numel() / product


def add_floors(model, rows, bandwidth, rate):
    """Put beside each measured time the least that this machine could need for it. What is counted:

    decode: all weights of the layers and of the output read once, and the KV entries kept (not their padding), at full
    bandwidth. prefill: multiply-adds of the linear layers, of causal attention (T (T + 1) / 2 pairs, for scores and for
    values) and of one token's logits, at the best rate. What is not: norms, rotations, softmax, masks, activations, Python.
    """
    c, weights = model.config, [w for block in model.blocks for w in vars(block).values()]
    step, a_token = sum(w.nbytes for w in (*weights, model.norm, model.head)), sum(w.numel() for w in weights if w.dim() == 2)
    for row in rows:
        T = row["n_tokens"]
        attention = T * (T + 1) * c.n_layer * c.n_head * c.head_dim
        row["prefill_floor_seconds"] = (T * a_token + attention + model.head.numel()) / rate
        for cache in row["caches"]:
            cache["floor_ms"] = 1000 * (step + cache["kv_bytes"]) / bandwidth


def timed_scan(model, ids):
    """Seconds of what prefill does to observe ids (1, T), behind a forward pass as there: in the memory that the pass has left."""
    cache = KVCache.empty(model.config, model.dtype, model.device)
    hidden, queries, _ = model.forward(ids, cache, observe=ckv.OURS.window)
    start = clock(model.device)
    _ = last_attention(queries, cache), model.logits(hidden[0, -ckv.OURS.window:])
    return clock(model.device) - start


def timed_compilerkv(observation, cache, budget, tables):
    """CompilerKV as `select` and `evict` run it, the clock read between STAGES but the first: kept, the cache left, seconds (4,)."""
    device, G = cache.k[0].device, cache.k[0].shape[1]
    times = [clock(device)]
    (window, kernel), W, tau = tables.look_up("compilerkv", budget, *ckv.risk(observation, ckv.OURS.window))
    times.append(clock(device))
    u = ckv.spread(ckv.utility(observation, cache, ckv.OURS, window), window, kernel)  # (L, H, T)
    times.append(clock(device))
    kept = ckv.kept_tokens(u, W, tau, budget, window, G, ckv.OURS.cap)  # L x (G, S_l)
    times.append(clock(device))
    small = ckv.evict(cache, kept)
    times.append(clock(device))
    return kept, small, np.diff(times)


def decode_ms(model, cache, token):
    """Quartiles [25, 50, 75%] of the milliseconds of a greedy step from token (1, 1). The cache is handed back as found."""
    times = [clock(model.device)]
    for _ in range(WARM_UP + STEPS):
        hidden, _, _ = model.forward(token, cache)
        token = model.logits(hidden[:, -1]).argmax(-1, keepdim=True)  # (1, E) -> (1, V) -> (1, 1)
        times.append(clock(model.device))
    cache.rewind(WARM_UP + STEPS)
    return np.percentile(1000 * np.diff(times)[WARM_UP:], (25, 50, 75)).tolist()


def measure_length(model, tokens, budgets, tables):
    """All that is timed on one prompt, and its memory: (one object for speed.json, what prefill returned)."""
    T, device, config, ids = len(tokens), model.device, model.config, torch.tensor([tokens], device=model.device)  # (1, T)
    scan = min(timed_scan(model, ids) for _ in range(SCANS))
    bare = lambda: model.logits(model.forward(ids, KVCache.empty(config, model.dtype, device))[0][0, -1])
    (plain, scanned), prefilled = fastest(ROUNDS - (T > 4096), device, bare, lambda: model.prefill(tokens, ckv.OURS.window))
    logits, cache, observation = prefilled
    entry, caches = 2 * config.head_dim * cache.k[0].element_size(), []  # bytes of one key and one value
    for budget in (None, *budgets):  # None: the full cache
        kept, small, more = ckv.select_full(observation, cache, budget, tables), cache, {}
        if budget is not None:
            kept, small, seconds = zip(*(timed_compilerkv(observation, cache, budget, tables) for _ in range(ROUNDS)))
            kept, small, seconds = kept[-1], small[-1], [scan, *np.min(seconds, axis=0).tolist()]  # (rounds, 4) -> (5,)
            more = {"stage_seconds": dict(zip(STAGES, seconds)), "share": sum(seconds) / plain}
        caches.append({"budget": budget, "kv_bytes": small.nbytes, "kv_bytes_padded": entry * config.n_kv_head * sum(small.length),
                       "kv_bytes_by_hand": entry * sum(int((p >= 0).sum()) for p in kept),
                       "ms": decode_ms(model, small, logits.argmax().view(1, 1)), **more})
    return {"n_tokens": T, "prefill_seconds": plain, "prefill_scan_seconds": scanned, "peak_memory_bytes": peak_memory(),
            "caches": caches}, prefilled


def roll_outs(model, continuation, logits, cache, observation):
    """How many roll-outs of the continuation a second one batch makes. SnapKV chooses: every KV head keeps exactly as many."""
    kept = ckv.select("snapkv", observation, cache, ROLL_KEPT)
    work = lambda: model.nll(ckv.evict(cache, *[kept] * ROLL_OUTS), logits, continuation)
    (seconds,), _ = fastest(ROUNDS, model.device, work)
    return {"n_tokens": observation.n_tokens, "kept": kept[0].shape[1], "a_second": ROLL_OUTS / seconds}


def measure_speed(model, records, budgets, tables):
    """Every length; last the machine itself, whose large tensors would else count as memory of the short prompts."""
    longest = max(model.config.context_length - ROLL_TOKENS, 1)
    lengths, rows = [T for T in SPEED_LENGTHS if T <= longest] or [longest], []
    ids = model.tokenizer.encode("".join(context + "\n\n" for context in dict.fromkeys(r["context"] for r in records)))
    ids = ids * -(-(lengths[-1] + ROLL_TOKENS) // len(ids))
    for T in tqdm(lengths, desc="lengths", unit="length", dynamic_ncols=True):
        row, prefilled = measure_length(model, ids[:T], budgets, tables)
        rows.append(row)
        if T == min(lengths, key=lambda T: abs(T - 2048)):
            rolled = roll_outs(model, ids[T:T + ROLL_TOKENS], *prefilled)
        del prefilled  # the next length's memory must not hold it
    bandwidth, rate = machine_rates(model)
    add_floors(model, rows, bandwidth, rate)
    return {"bytes_a_second": bandwidth, "multiply_adds_a_second": rate, "roll_outs": rolled, "lengths": rows}


def speed_tables(speed):
    """What was measured, as lines of Markdown."""
    rows, roll, n = speed["lengths"], speed["roll_outs"], lambda row: str(row["n_tokens"])
    out = [f"Prefill, seconds; the scan observes the last {ckv.OURS.window} queries. Peak memory: the most that the process has held "
           "up to there, loading included, so lengths rise.", ""]
    out += lines_of(["prompt tokens", "prefill", "floor", "prefill / floor", "with the scan", "peak memory, MB"], [
        [n(r), f"{r['prefill_seconds']:.3f}", f"{r['prefill_floor_seconds']:.3f}",
         f"{r['prefill_seconds'] / r['prefill_floor_seconds']:.1f}", f"{r['prefill_scan_seconds']:.3f}",
         cell(r["peak_memory_bytes"] and r["peak_memory_bytes"] / 1e6, "{:.0f}")] for r in rows])
    out += ["CompilerKV's stages, milliseconds (A: the scan, timed by itself); all together, in % of the prefill without them.", ""]
    out += lines_of(["prompt tokens", "budget", *STAGES, "all stages, % of prefill"], [
        [n(r), str(c["budget"]), *(f"{1000 * s:.1f}" for s in c["stage_seconds"].values()), f"{100 * c['share']:.1f}"]
        for r in rows for c in r["caches"][1:]])
    out += [f"Decode, milliseconds a token: median [quartiles] of {STEPS} steps. KV bytes: as the cache counts them; by hand, kept "
            "entries x 2 x head dim x bytes of a number; and with the padding of KV heads that keep fewer than their layer's longest.", ""]
    out += lines_of(["prompt tokens", "budget", "ms a token", "floor", "ms / floor", "full cache's ms / ms", "KV bytes", "by hand",
                     "with padding"], [
        [n(r), str(c["budget"] or "all"), "{1:.2f} [{0:.2f}, {2:.2f}]".format(*c["ms"]), f"{c['floor_ms']:.2f}",
         f"{c['ms'][1] / c['floor_ms']:.1f}", f"{r['caches'][0]['ms'][1] / c['ms'][1]:.2f}",
         *(f"{c[key]:,}" for key in ("kv_bytes", "kv_bytes_by_hand", "kv_bytes_padded"))] for r in rows for c in r["caches"]])
    return out + [
        f"Roll-outs: {roll['a_second']:.1f} a second, in a batch of {ROLL_OUTS} caches of {roll['kept']} tokens a KV head (of "
        f"{roll['n_tokens']}), {ROLL_TOKENS} given tokens each.", "",
        f"Floors: {speed['bytes_a_second'] / 1e9:.1f} GB a second from memory, {speed['multiply_adds_a_second'] / 1e9:.3g} G "
        "multiply-adds a second, both measured here. A decode step reads all weights and the KV bytes kept once; a prefill multiplies in "
        "its linear layers, in causal attention and for the last token's logits. Nothing else is counted.", ""]


def draw_speed(speed, path, title):
    """Decode milliseconds against the prompt's length, median and quartiles, full cache and budgets; dotted: their floors."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lengths = [row["n_tokens"] for row in speed["lengths"]]
    for i, caches in enumerate(zip(*(row["caches"] for row in speed["lengths"]))):
        low, middle, high = np.array([c["ms"] for c in caches]).T  # (lengths, 3) -> 3 x (lengths,)
        name = f"budget {caches[0]['budget']}" if caches[0]["budget"] else "full cache"
        axis.errorbar(lengths, middle, (middle - low, high - middle), color=f"C{i}", marker="o", markersize=4, capsize=3, label=name)
        axis.plot(lengths, [c["floor_ms"] for c in caches], color=f"C{i}", linestyle=":", label=f"{name}: floor")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, map(str, lengths))
    axis.set(xlabel="prompt tokens", ylabel="decode, milliseconds a token", ylim=(0, None))
    finish(figure, [axis], title, path)


def write_speed(model, records, args, tables, settings):
    """speed.json, speed.md and speed.png, into --out. Returns the report."""
    start, meta = time.perf_counter(), {key: settings[key] for key in settings if key not in ("policies", "protocols")}
    speed = measure_speed(model, records, args.budgets, tables)
    title = f"{model.name}, {meta['dtype']}, {meta['machine']['cpu']}, {meta['machine']['threads']} threads"
    meta["seconds"] = round(time.perf_counter() - start, 1)
    report = "\n".join([f"Speed on {meta['device']}, {title}, {meta['seconds']:.0f} s.", "", *speed_tables(speed)])
    ckv.write_atomically(args.out / "speed.json", json.dumps({"meta": meta, **speed}, indent=1) + "\n")
    ckv.write_atomically(args.out / "speed.md", report)
    draw_speed(speed, args.out / "speed.png", title)
    return report


# -------------------------------------------------------------------------------------------------------- command line

def machine():
    """What the numbers were measured on."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    linux = Path("/proc/cpuinfo")  # tells apart the processors that go by one name
    numbers = re.findall(r"^(?:cpu family|model)\s*: (\d+)", linux.read_text(), re.MULTILINE)[:2] if linux.exists() else ()
    cpu += " (family {}, model {})".format(*numbers) if len(numbers) == 2 else ""
    return {"cpu": cpu, "threads": torch.get_num_threads(),
            "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


def seed_number(text):
    """A seed that every generator here takes. Raises UserError for any other."""
    if not text.isdecimal() or int(text) >= 2 ** 32:
        raise UserError(f"--seed takes a whole number from 0 to {2 ** 32 - 1}, not {text!r}")
    return int(text)


def add_model_options(parser):
    """Options that eval.py and train_tables.py share."""
    parser.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2-135M-Instruct of the installed wheel)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where native")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--seed", type=seed_number, default=0)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    names = lambda text: list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    parser.add_argument("--policies", type=names, default=list(ckv.POLICIES), help="comma-separated (default: all)")
    parser.add_argument("--budgets", help="comma-separated tokens kept a layer")
    parser.add_argument("--protocols", type=names, default=list(PROTOCOLS), help="comma-separated (default: both)")
    parser.add_argument("--full", action="store_true", help="all records (the mini-LongBench has 768)")
    parser.add_argument("--quick", action="store_true", help="one budget, one record a task: does it run?")
    parser.add_argument("--ablate", action="store_true", help="what each part of CompilerKV is worth, in dNLL (budgets of the tables)")
    parser.add_argument("--rows", nargs="+", help="the only rows of --ablate, quoted where they have spaces (default: all)")
    parser.add_argument("--speed", action="store_true", help="what compression costs and buys in seconds and bytes (a few minutes)")
    parser.add_argument("--limit", type=int, help=f"records a task (default: {SAMPLE})")
    parser.add_argument("--tables", type=Path, default=DEFAULT_TABLES)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="a directory in LongBench's layout")
    parser.add_argument("--tasks", type=names, help="comma-separated names of the only tasks to run (default: all)")
    parser.add_argument("--out", type=Path, help="a directory (default: results/sample, full or quick; results with --ablate or --speed)")
    args = parser.parse_args(argv)
    default = "128" if args.quick else "64,128,256,512" if args.ablate else "128,512"
    try:
        args.budgets = sorted({int(b) for b in (default if args.budgets is None else args.budgets).split(",")})
    except ValueError:
        raise UserError(f"--budgets takes whole numbers with commas, not {args.budgets!r}") from None
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    if (args.limit is not None) + args.full + args.quick + args.speed > 1 or args.speed and args.ablate:
        raise UserError("--speed, --full, --quick and --limit exclude each other: each says what to run on; so do --speed and --ablate")
    if not args.full:
        args.limit = 1 if args.quick else args.limit or SAMPLE
    if args.rows and not args.ablate:
        raise UserError("--rows belongs to --ablate")
    if (args.ablate or args.speed) and (args.policies, args.protocols) != (list(ckv.POLICIES), list(PROTOCOLS)):
        raise UserError("--ablate and --speed take neither --policies nor --protocols")
    args.rows = args.rows or list(SWITCHES)
    folder = "quick" if args.quick else "" if args.ablate or args.speed else "full" if args.full else "sample"
    args.out = args.out or HERE / "results" / folder
    for option in ("policies", "protocols", "tasks"):
        if getattr(args, option) == []:
            raise UserError(f"--{option} is empty")
    ckv.check_budget(args.budgets[0])  # the smallest
    for what, given, known in (("protocol", args.protocols, PROTOCOLS), ("policy", args.policies, ckv.POLICIES),
                               ("row", args.rows, SWITCHES)):
        for name in given:
            if name not in known:
                raise UserError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    return args


def main(argv=None):
    args = parse(argv)
    records = read_records(args.data, args.limit, args.tasks)
    model = load(args.model, args.dtype, args.device)
    tables = ckv.Tables.load(args.tables, model)
    args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after the work
    code = b"".join((HERE / f"{name}.py").read_bytes() for name in ("model", "compilerkv", "eval"))
    settings = {"model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch."),
                "seed": args.seed, "data": args.data.resolve().name, "machine": machine(), "device": str(model.device),
                "code": hashlib.sha256(code).hexdigest(), "policies": args.policies,
                "protocols": args.protocols, "budgets": args.budgets, "window": ckv.WINDOW, "sinks": ckv.SINKS,
                "tables": hashlib.sha256(args.tables.read_bytes()).hexdigest(),
                "records": hashlib.sha256(json.dumps(records).encode()).hexdigest()}
    if args.speed:
        print(write_speed(model, records, args, tables, settings))
        return 0
    work = contexts(records, [encode(record, model) for record in records])
    one_context, write = (ablate_context, write_ablation) if args.ablate else (run_context, write_report)
    finished, interrupted, journal = run(lambda *context: one_context(model, *context, args, tables), work, args.out,
                                         {**settings, "rows": args.rows if args.ablate else None})
    context, order = {r["_id"]: (r["dataset"], r["context"]) for r in records}, {}  # contexts are numbered as they come
    results = [{**row, "context": order.setdefault(context[row["id"]], len(order))} for rows, _ in finished for row in rows]
    meta = {**settings, "n_records": len(results), "n_contexts": len(order), "interrupted": interrupted,
            "seconds": round(sum(seconds for _, seconds in finished), 1), "cut": sum(row["cut"] for row in results)}
    print(write(model, records, results, meta, args, tables))
    if interrupted:
        print(f"interrupted: {len(results)} of {len(records)} records are in the report; the same command goes on from here",
              file=sys.stderr)
        return 130
    journal.unlink()
    return 0


def heading(meta):
    """What was measured on what, one sentence; meta as in eval.json."""
    part, cut = "INTERRUPTED, a part: " * meta["interrupted"], f", {meta['cut']} cut" * (meta["cut"] > 0)
    return (f"{part}{meta['n_records']} records on {meta['n_contexts']} contexts of {meta['data']}{cut}, {meta['model']}, "
            f"{meta['dtype']}, seed {meta['seed']}, {meta['machine']['cpu']}, {meta['machine']['threads']} threads, "
            f"{meta['seconds']:.0f} s.")


def write_report(model, records, results, meta, args, tables):
    """eval.json, report.md and every picture, into --out. Returns the report."""
    judged = {p: [row for row in results if any(result[0] == p for result in row["results"])] for p in args.protocols}
    summaries = {p: summarise(part, p, args.seed) for p, part in judged.items() if part}
    report = "\n".join([heading(meta), "", *task_table(results), *(x for s in summaries.values() for x in protocol_tables(s))])
    lines = {"meta": json.dumps(meta), "columns": json.dumps(COLUMNS),
             "summary": json.dumps([row for summary in summaries.values() for row in summary]),
             "records": "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in results) + "\n]"}  # a line a record
    ckv.write_atomically(args.out / "eval.json", "{" + ",\n".join(f'"{key}": {text}' for key, text in lines.items()) + "}\n")
    ckv.write_atomically(args.out / "report.md", report)
    budget = 128 if 128 in args.budgets else args.budgets[0]
    for protocol, summary in summaries.items():
        part, title = judged[protocol], f"{len(judged[protocol])} records of {meta['data']}, {protocol}"
        draw_quality(summary, args.out / f"quality-{protocol}.png", title)
        draw_tails(summary, part, budget, args.out / f"tails-{protocol}.png", title)
        if all(row["needles"] for row in part):
            draw_needles(part, protocol, args.out / f"needles-{protocol}.png", f"{title}, mean over budgets")
    if summaries:  # a short prompt whose needed fact stands near the middle
        example = min(results, key=lambda row: (abs((row["depth"] or 0) - 0.5) > 0.2, row["n_tokens"]))["id"]
        draw_kept(model, next(r for r in records if r["_id"] == example), args, budget, tables, args.out / "kept.png")
    return report


def run_command(main):
    """Exit with main's code; what the user can mend becomes one line on standard error and exit code 2."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:  # OSError: no space, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
