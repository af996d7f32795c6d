"""Evaluate every policy at every budget on the mini-LongBench: `python eval.py`.

Each record is prefilled once; every policy then evicts from that same cache, and all of them decode side by side. Two
measures: the task's own score (LongBench's metrics, 0 to 100) of the greedy answer, and dNLL, the mean negative
log-likelihood of the gold answer under the compressed cache minus that under the full one, in nats a token (0 = nothing
lost). The first answer token comes from the prefill, as in use, so compression touches the tokens after it.
Reading order: tasks and metrics -> one record -> statistics -> report -> command line.
"""

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import platform
import re
import string
import sys
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import compilerkv as ckv
from model import KVCache, UserError, load

matplotlib.use("Agg")  # pictures go to files; no display is needed
HERE = Path(__file__).parent
DEFAULT_DATA, DEFAULT_TABLES = HERE / "data" / "mini_longbench", HERE / "tables" / "smollm2-135m.npz"
BUDGETS = (64, 128, 256, 512)
RESAMPLES = 10000  # bootstrap resamples of the records behind every interval


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
    codes = {}
    b_codes = np.array([codes.setdefault(x, len(codes)) for x in b])
    for i, x in enumerate(a, 1):
        match = np.where(b_codes == codes.get(x, -1), table[i - 1, :-1] + 1, table[i - 1, 1:])
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
    named = [c for c in classes or [gold] if c in answer and not (c in gold and c != gold)]
    return 1 / len(named) if gold in named else 0.0


def number_share(answer, gold, classes):
    """Share of the numbers in the answer that are the gold number: LongBench's retrieval and count score."""
    numbers, right = re.findall(r"\d+", answer), re.search(r"\d+", gold)
    return numbers.count(right.group()) / len(numbers) if numbers and right else 0.0


def edit_similarity(answer, gold, classes):
    """Of the first line that is code: 2 common / total characters, the ratio of insertions and deletions."""
    lines = [x for x in answer.lstrip("\n").split("\n") if not any(mark in x for mark in ("`", "#", "//"))]
    line = lines[0] if lines else ""
    return 2 * len(lcs(line, gold)) / (len(line) + len(gold)) if line and gold else 0.0


@dataclasses.dataclass(frozen=True)
class Task:
    category: str
    metric: object            # (answer, gold, classes) -> 0..1
    chat: bool = True         # inside the model's chat template, or as plain text
    first_line: bool = False  # only the first line of the answer counts


TASKS = {
    # the mini-LongBench of this project
    "fieldqa": Task("single-document QA", token_f1, chat=False, first_line=True),
    "hopqa": Task("multi-document QA", token_f1, chat=False, first_line=True),
    "digest": Task("summarisation", rouge_l, chat=False, first_line=True),
    "qtype": Task("few-shot", classification, chat=False, first_line=True),
    "codes": Task("synthetic", number_share), "repo": Task("code", edit_similarity, chat=False),
    # LongBench's English tasks
    **{name: Task("single-document QA", token_f1) for name in ("narrativeqa", "qasper", "multifieldqa_en")},
    **{name: Task("multi-document QA", token_f1) for name in ("hotpotqa", "2wikimqa", "musique")},
    **{name: Task("summarisation", rouge_l) for name in ("gov_report", "qmsum", "multi_news")},
    "trec": Task("few-shot", classification, chat=False, first_line=True),
    "triviaqa": Task("few-shot", token_f1, chat=False, first_line=True),
    "samsum": Task("few-shot", rouge_l, chat=False, first_line=True),
    "passage_count": Task("synthetic", number_share), "passage_retrieval_en": Task("synthetic", number_share),
    "lcc": Task("code", edit_similarity, chat=False), "repobench-p": Task("code", edit_similarity, chat=False),
}


def score(record, answer):
    """The task's metric, best over the gold answers, in 0..100."""
    task = TASKS[record["dataset"]]
    if task.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return 100 * max(task.metric(answer, gold, record.get("all_classes")) for gold in record["answers"])


# ------------------------------------------------------------------------------------------------------------- records

def read_records(directory, limit=None):
    """LongBench's layout: data/*.jsonl, config/dataset2prompt.json, config/dataset2maxlen.json -> list of records.

    Each record gains "prompt" (its template filled in) and "max_new". Raises UserError naming file and line.
    """
    directory, records, ids = Path(directory), [], set()
    try:
        prompts, max_new = (json.loads((directory / "config" / f"dataset2{name}.json").read_text(encoding="utf-8"))
                            for name in ("prompt", "maxlen"))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; --data needs LongBench's layout, data/ and config/") from None
    except ValueError as error:
        raise UserError(f"{directory / 'config'}: not JSON ({error})") from None
    files = sorted((directory / "data").glob("*.jsonl"))
    if not files:
        raise UserError(f"{directory / 'data'}: no .jsonl files here")
    for path in files:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        for n, line in rows[:limit]:
            try:
                record = json.loads(line)
                record["answers"], record["input"], record["context"]  # KeyError names what is missing
                if not isinstance(record["_id"], str) or record["_id"] in ids:
                    raise TypeError(f"_id {record['_id']!r} is not a string, or occurs twice")
                if not isinstance(record["answers"], list) or not all(isinstance(a, str) for a in record["answers"]):
                    raise TypeError("answers must be a list of strings")
                name = str(record["dataset"]).removesuffix("_e")  # LongBench-E names its tasks so
                prompt, length = prompts.get(name, "").format(**record), int(max_new.get(name, 0))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                what = f"the key {error} is missing" if isinstance(error, KeyError) else error
                raise UserError(f"{path}, line {n}: malformed record: {what}") from None
            if name not in TASKS or not prompt or length < 1 or not record["answers"]:
                raise UserError(f"{path}, line {n}: no metric, prompt, answer length or gold answer for task {name!r}")
            ids.add(record["_id"])
            records.append({**record, "dataset": name, "prompt": prompt, "max_new": length})
    return records


def encode(record, tokenizer):
    """Token ids of a record's prompt, and of its gold answer with the token that ends it."""
    if TASKS[record["dataset"]].chat:
        return tokenizer.chat(record["prompt"]), tokenizer.encode(record["answers"][0]) + sorted(tokenizer.stop)
    space = "" if record["prompt"][-1:].isspace() else " "
    return tokenizer.encode(record["prompt"]), tokenizer.encode(space + record["answers"][0] + "\n")


def check_length(record, model):
    """Raise UserError for a record whose prompt and answer exceed the model's context."""
    tokens, gold = map(len, encode(record, model.tokenizer))
    if tokens + max(gold, record["max_new"]) > model.config.context_length:
        raise UserError(f"record {record['_id']}: {tokens} prompt tokens and up to {record['max_new']} of the answer do not "
                        f"fit into the model's context of {model.config.context_length}: shorten the record")


def look_ahead(model, cache, gold):
    """Attention (L, H, n, T + n) that the n tokens of the right answer pay: an oracle's knowledge. The cache stays as found."""
    before = cache.mark()
    _, attention, _ = model.forward(torch.tensor([gold], device=model.device), cache, observe=len(gold))
    cache.rewind(before)
    return attention


def run_record(model, record, policies, budgets, tables):
    """One prefill, then every (policy, budget) from it, decoded in one batch. Returns a list of result rows."""
    tokens, gold = encode(record, model.tokenizer)
    logits, cache, observation = model.prefill(tokens, ckv.MAX_WINDOW, total="h2o" in policies)
    if "hindsight" in policies:
        answer = look_ahead(model, cache, gold)[..., :len(tokens)].float().sum(2)  # (L, H, n, T + n) -> (L, H, T)
        observation = dataclasses.replace(observation, answer=answer)
    jobs = [(policy, budget) for budget in budgets for policy in policies if policy != "full"]
    full_nll, rows = model.nll(cache, logits, gold).item(), []

    def run(jobs, batch, seconds):
        """Measure a batch of caches, one a job; decoding comes last because it grows the batch."""
        kept, nll = batch.kept().tolist(), model.nll(batch, logits, gold).tolist()
        entries = model.config.n_layer * model.config.n_kv_head
        token_bytes = 2 * model.config.head_dim * cache.k[0].element_size()
        for i, answer in enumerate(model.decode(batch, logits, record["max_new"])):
            text = model.tokenizer.decode(answer)
            rows.append({"id": record["_id"], "task": record["dataset"], "policy": jobs[i][0], "budget": jobs[i][1],
                         "score": score(record, text), "dnll": nll[i] - full_nll, "nll": nll[i], "kept": kept[i] / entries,
                         "kv_bytes": kept[i] * token_bytes, "n_tokens": len(tokens), "select_seconds": seconds[i],
                         "answer": text})

    caches, seconds = [], []
    for policy, budget in jobs:
        start = time.perf_counter()
        caches.append(ckv.evict(cache, ckv.select(policy, observation, cache, budget, tables)))
        seconds.append(time.perf_counter() - start)
    if jobs:
        run(jobs, KVCache.stack(caches), seconds)
    changed = table_effect(observation, cache, budgets, tables) if "compilerkv" in policies else {}
    if "full" in policies:
        run([("full", None)], cache, [0.0])
    return rows, changed


def table_effect(observation, cache, budgets, tables):
    """{(table, budget): share of layers whose kept set changes when that table alone is made neutral}."""
    out, compiled = {}, tables.compiled["compilerkv"]
    neutral = {"W_head": np.ones_like(compiled.W_head), "T_gate": np.zeros_like(compiled.T_gate)}
    for budget in budgets:
        kept = ckv.select("compilerkv", observation, cache, budget, tables)
        for name, array in neutral.items():
            without = dataclasses.replace(tables, compiled={"compilerkv": dataclasses.replace(compiled, **{name: array})})
            other = ckv.select("compilerkv", observation, cache, budget, without)
            out[name, budget] = float(np.mean([not torch.equal(a, b) for a, b in zip(kept, other)]))
    return out


# ---------------------------------------------------------------------------------------------------------- statistics

def interval(values, generator):
    """95% percentile bootstrap interval of the mean over records: values (n,) -> (low, high)."""
    values = np.asarray(values)
    means = values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def worst_tenth(values):
    """Mean of the largest tenth, at least one record."""
    return float(np.sort(values)[-max(1, len(values) // 10):].mean())


def grouped(rows):
    """{(policy, budget): rows}, in the order they came."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["policy"], row["budget"]].append(row)
    return groups


def summarise(rows, seed):
    """One object a policy and budget; the same resamples of records for all of them, so that intervals are paired."""
    groups, summary = grouped(rows), []
    for (policy, budget), group in groups.items():
        dnll = [r["dnll"] for r in group]
        generator = np.random.default_rng(seed)
        row = {"policy": policy, "budget": budget, "n": len(group), "score": float(np.mean([r["score"] for r in group])),
               "dnll": float(np.mean(dnll)), "dnll_ci": interval(dnll, generator), "dnll_worst_tenth": worst_tenth(dnll),
               "kept_mean": float(np.mean([r["kept"] for r in group])),
               "kv_bytes_mean": float(np.mean([r["kv_bytes"] for r in group])), "oracle": policy == "hindsight",
               "score_by_category": {c: float(np.mean([r["score"] for r in group if TASKS[r["task"]].category == c]))
                                     for c in dict.fromkeys(TASKS[r["task"]].category for r in group)}}
        rivals = groups.get(("snapkv", budget))
        if rivals and policy not in ("snapkv", "full"):  # paired by record
            row["dnll_minus_snapkv"] = float(np.mean(dnll) - np.mean([r["dnll"] for r in rivals]))
            row["dnll_minus_snapkv_ci"] = interval(np.array(dnll) - [r["dnll"] for r in rivals], np.random.default_rng(seed))
        summary.append(row)
    return summary


# -------------------------------------------------------------------------------------------------------------- report

def label(policy):
    return policy + " (oracle)" if policy == "hindsight" else policy


def markdown(summary):
    """The results table and the scores by category, as Markdown."""
    full = next((s["score"] for s in summary if s["policy"] == "full"), None)
    lines = ["| budget | policy | score | % of full | dNLL [95% interval] | against SnapKV [95%] | worst tenth | "
             "kept a layer | KV MB |", "|" + "---|" * 9]
    for s in summary:
        share = f"{100 * s['score'] / full:.1f}" if full else "-"
        paired = "{:+.3f} [{:+.3f}, {:+.3f}]".format(s["dnll_minus_snapkv"], *s["dnll_minus_snapkv_ci"]) \
            if "dnll_minus_snapkv" in s else "-"
        lines.append(f"| {s['budget'] or 'all'} | {label(s['policy'])} | {s['score']:.1f} | {share} | "
                     f"{s['dnll']:.3f} [{s['dnll_ci'][0]:.3f}, {s['dnll_ci'][1]:.3f}] | {paired} | "
                     f"{s['dnll_worst_tenth']:.2f} | {s['kept_mean']:.1f} | {s['kv_bytes_mean'] / 1e6:.2f} |")
    categories = list(summary[0]["score_by_category"])
    lines += ["", "| budget | policy | " + " | ".join(categories) + " |", "|" + "---|" * (len(categories) + 2)]
    lines += [f"| {s['budget'] or 'all'} | {label(s['policy'])} | "
              + " | ".join(f"{s['score_by_category'][c]:.1f}" for c in categories) + " |" for s in summary]
    return "\n".join(lines)


def save_figure(figure, path):
    """Write a figure as PNG in one step, and free it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    ckv.write_atomically(path, buffer.getvalue())


def plot(summary, path, n):
    """Quality against budget, one line a policy: dNLL left, share of the full cache's score right."""
    full = next((s["score"] for s in summary if s["policy"] == "full"), None)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for policy in dict.fromkeys(s["policy"] for s in summary if s["policy"] != "full"):
        points = sorted((s["budget"], s["dnll"], *s["dnll_ci"], s["score"]) for s in summary if s["policy"] == policy)
        budget, dnll, low, high, scores = map(np.array, zip(*points))
        ours = policy == "compilerkv"
        style = {"marker": "o", "linewidth": 2.8 if ours else 1.4, "linestyle": ":" if policy == "hindsight" else "-",
                 "color": "black" if ours else None, "zorder": 3 if ours else 2, "label": label(policy)}
        line, = axes[0].plot(budget, dnll, **style)
        axes[0].fill_between(budget, low, high, color=line.get_color(), alpha=0.08)
        if full:
            axes[1].plot(budget, 100 * scores / full, **style)
    axes[0].set(ylabel="dNLL, nats a token (lower is better)", title="What the gold answer loses")
    axes[0].axhline(0, color="grey", linewidth=0.8)
    axes[1].set(ylabel="score, % of the full cache", title="What the score keeps")
    axes[1].axhline(100, color="grey", linewidth=0.8)
    for axis in axes:
        axis.set_xscale("log", base=2)
        ticks = sorted({s["budget"] for s in summary if s["budget"]})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xlabel("budget: tokens kept a layer")
        axis.grid(alpha=0.3)
    figure.suptitle(f"mean over {n} records; bands are 95% bootstrap intervals", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------------------- command line

def machine():
    """What the numbers were measured on."""
    capable = torch.cpu.get_capabilities()
    return {"cpu": capable.get("cpu_name") or platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
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
    parser.add_argument("--policies", default=",".join(ckv.POLICIES), help="comma-separated (default: all)")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="comma-separated tokens kept a layer")
    parser.add_argument("--limit", type=int, help="records a task")
    parser.add_argument("--quick", action="store_true", help="one budget, one record a task: does it run?")
    parser.add_argument("--tables", type=Path, default=DEFAULT_TABLES)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="a directory in LongBench's layout")
    parser.add_argument("--out", type=Path, help="a directory (default: results, or results/quick with --quick)")
    args = parser.parse_args(argv)
    args.policies = list(dict.fromkeys(p.strip() for p in args.policies.split(",") if p.strip()))
    try:
        args.budgets = sorted({int(b) for b in args.budgets.split(",")})
    except ValueError:
        raise UserError(f"--budgets takes whole numbers with commas, not {args.budgets!r}") from None
    if args.quick:
        args.budgets, args.limit = [128], 1
    args.out = args.out or HERE / "results" / ("quick" if args.quick else "")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    if not args.policies:
        raise UserError("--policies is empty")
    for budget in args.budgets:
        ckv.check_budget(budget)
    for policy in args.policies:
        if policy not in ckv.POLICIES:
            raise UserError(f"unknown policy {policy!r}: choose from {', '.join(ckv.POLICIES)}")
    return args


def main(argv=None):
    start = time.time()
    args = parse(argv)
    records = read_records(args.data, args.limit)
    model = load(args.model, args.dtype, args.device)
    tables = ckv.Tables.load(args.tables, model)
    for record in records:
        check_length(record, model)
    args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after the work
    rows, changed, interrupted = [], collections.defaultdict(list), False
    try:
        for record in tqdm(records, desc="records", unit="record", dynamic_ncols=True):
            new_rows, effects = run_record(model, record, args.policies, args.budgets, tables)
            rows += new_rows
            for key, share in effects.items():
                changed[key].append(share)
    except KeyboardInterrupt:  # report what is finished
        interrupted = True
    if not rows:
        raise UserError("interrupted before the first record was finished; nothing was written")
    order = {key: i for i, key in enumerate([(p, b) for b in (None, *args.budgets) for p in args.policies])}
    rows.sort(key=lambda r: order[r["policy"], r["budget"]])  # stable: records keep their order
    summary = summarise(rows, args.seed)
    n = len({r["id"] for r in rows})
    meta = {"model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch."),
            "seed": args.seed, "machine": machine(), "records": n, "interrupted": interrupted, "data": args.data.name,
            "tables": hashlib.sha256(args.tables.read_bytes()).hexdigest(), "policies": args.policies,
            "budgets": args.budgets,
            "window": ckv.OURS.window, "sinks": ckv.SINKS, "seconds": round(time.time() - start, 1),
            "kept_sets_changed": [{"table": t, "budget": b, "share": float(np.mean(v))} for (t, b), v in changed.items()]}
    head = (f"{n} records of {args.data.name}, {meta['model']}, {meta['dtype']}, seed {args.seed}, {meta['machine']['cpu']}, "
            f"{meta['machine']['threads']} threads, {meta['seconds']:.0f} s.")
    effect = "\n".join(f"{e['table']} changes the kept set of {100 * e['share']:.1f}% of (prompt, layer) pairs at budget "
                       f"{e['budget']}." for e in meta["kept_sets_changed"])
    report = f"{head}\n\n{markdown(summary)}\n\n{effect}\n"
    ckv.write_atomically(args.out / "eval.json", json.dumps({"meta": meta, "summary": summary, "records": rows}, indent=1))
    ckv.write_atomically(args.out / "report.md", report)
    plot(summary, args.out / "quality.png", n)
    print(report)
    if interrupted:
        print(f"interrupted: {n} of {len(records)} records are in the report", file=sys.stderr)
        return 130
    return 0


def run_command(main):
    """Exit with main's code; what the user can mend becomes one line on standard error and exit code 2."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:  # OSError: no space, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
