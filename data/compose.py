"""Compose the mini-LongBench and the calibration corpus from the text bank, seeded: `python data/compose.py`.

The bank (`bank/*.jsonl`) was written for this project: short passages, stories, reports, dialogues and working code, each
with facts, questions or a summary. This script only arranges: which passages share a prompt, in which order, how long,
and at what depth the needed fact stands. Files that start with `eval_` go to the benchmark, `calib_` to calibration, so
the two share no text; the question wordings differ as well (tests/test_data.py checks every 50-character span).

Writes `mini_longbench/data/*.jsonl` and `mini_longbench/config/*.json` in LongBench's own layout, and `calibration.jsonl`.
"""

import argparse
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
RECORDS = 10  # records a task
BANDS = (720, 1000, 1450, 2200)  # words of context, about 1,100 / 1,500 / 2,200 / 3,300 tokens


def bank(pattern):
    """All objects of the bank files whose names match, in file order."""
    return [json.loads(line) for path in sorted((HERE / "bank").glob(pattern)) for line in open(path, encoding="utf-8")]


def fill(rng, needed, pool, n_words, depth):
    """The needed items, at `depth` in [0, 1] of the list, among items of the pool until about n_words words are there."""
    others = [item for item in rng.sample(pool, len(pool)) if item not in needed]
    words, chosen = sum(len(item["text"].split()) for item in needed), []
    while others and words + 40 < n_words:
        chosen.append(others.pop())
        words += len(chosen[-1]["text"].split())
    at = round(depth * len(chosen))
    spread = [at if i == 0 else rng.randint(0, len(chosen)) for i in range(len(needed))]  # the first at depth, others anywhere
    for position, item in sorted(zip(spread, needed), key=lambda pair: -pair[0]):
        chosen.insert(position, item)
    return chosen


# ------------------------------------------------------------------------------------------------------ mini-LongBench

PROMPTS = {  # as in LongBench's dataset2prompt.json; the small model answers best when an answer is begun for it
    "fieldqa": "{context}\n\nQuestion: {input}",
    "hopqa": "These passages come from several sources.\n\n{context}\n\nQuestion: {input}",
    "digest": "{context}\n\nThe same news in brief, one sentence an item:\n{input}",
    "qtype": "Name the kind of thing each question asks for.\n\n{context}\n{input}",
    "codes": "{context}\n\n{input}",
    "repo": "{context}{input}",
}
MAX_NEW = {"fieldqa": 20, "hopqa": 20, "digest": 40, "qtype": 8, "codes": 24, "repo": 32}


def record(task, i, context, question, answers, classes=None):
    """One object in LongBench's schema."""
    return {"input": question, "context": context, "answers": answers, "length": len(context.split()), "dataset": task,
            "language": "python" if task == "repo" else "en", "all_classes": classes, "_id": f"{task}-{i:03d}"}


def begun_answer(question, text, answer, n_lead):
    """A question with the answer's sentence begun by its last n_lead words, and the rest of that clause as the gold answer."""
    at = text.index(answer)
    lead = re.split(r"[.;?!] ", text[:at])[-1].split()[-n_lead:]
    rest = re.split(r"[.;?!](?: |$)", text[at:])[0].split()[:12]
    return f"{question}\nAnswer in the words of the text: \"{' '.join(lead)}", " ".join(rest)


def benchmark(rng):
    """{task: records}: lengths cycle through BANDS, the needed text through depths 0 to 1."""
    passages, links = bank("eval_passages_*.jsonl"), bank("eval_links_*.jsonl")
    by_id = {p["id"]: p for p in passages}
    tasks = {task: [] for task in PROMPTS}
    plan = [(BANDS[i % len(BANDS)], (i * 0.37) % 1.0) for i in range(RECORDS)]  # depth: a low-discrepancy walk
    asked = rng.sample(passages, 3 * RECORDS)

    for i, (n_words, depth) in enumerate(plan):
        target = asked[i]
        question, answer = target["qa"][i % 2]
        context = "\n\n".join(f"{p['title']}\n{p['text']}" for p in fill(rng, [target], passages, n_words, depth))
        question, gold = begun_answer(question, target["text"], answer, n_lead=4)
        tasks["fieldqa"].append(record("fieldqa", i, context, question, [gold]))

    for i, ((n_words, depth), link) in enumerate(zip(plan, rng.sample(links, RECORDS))):
        first, second = by_id[link["first"]], by_id[link["second"]]
        chosen = fill(rng, [first, second], passages, n_words, depth)
        context = "\n\n".join(f"Passage {n}:\n{p['title']}\n{p['text']}" for n, p in enumerate(chosen, 1))
        question, gold = begun_answer(link["question"], second["text"], link["answer"], n_lead=3)
        tasks["hopqa"].append(record("hopqa", i, context, question, [gold]))

    news = [p for p in passages if p["id"].startswith("ep2")]
    for i, (n_words, depth) in enumerate(plan):
        target = rng.choice(news)
        chosen = fill(rng, [target], news, n_words, depth)
        context = "\n\n".join(f"{p['title']}. {p['text']}" for p in chosen)
        lead = lambda p: re.split(r"(?<=[.?!]) ", p["text"])[0]
        examples = [f"{p['title']}: {lead(p)}" for p in rng.sample([p for p in chosen if p is not target], 2)]
        brief = "\n".join(examples + [f"{target['title']}:"])
        tasks["digest"].append(record("digest", i, context, brief, [lead(target), target["gist"]]))

    questions = bank("eval_questions.jsonl")
    classes = sorted({q["type"] for q in questions})
    for i, (n_words, _) in enumerate(plan):
        examples = rng.sample(questions, len(questions))
        target = examples.pop()
        context = "\n".join(f"Question: {q['question']}\nType: {q['type']}" for q in examples[:n_words // 14])
        tasks["qtype"].append(record("qtype", i, context, f"Question: {target['question']}\nType:", [target["type"]], classes))

    for i, (n_words, depth) in enumerate(plan):
        target = asked[RECORDS + i]
        chosen = fill(rng, [target], passages, n_words, depth)
        coded = {p["title"]: rng.randint(10000, 99999) for p in (target, rng.choice([p for p in chosen if p is not target]))}
        context = "\n\n".join(p["text"] + (f" The archive code of {p['title']} is {coded[p['title']]}." if p["title"] in coded
                                            else "") for p in chosen)
        tasks["codes"].append(record("codes", i, context, f"What is the archive code of {target['title']}?",
                                     [str(coded[target["title"]])]))

    files = bank("eval_code.jsonl")
    projects = sorted({f["path"].split("/")[0] for f in files})
    for i in range(RECORDS):
        own = [f for f in files if f["path"].startswith(projects[i % len(projects)] + "/")]
        last = own.pop(-1 - i // len(projects) % 2)
        lines = last["code"].split("\n")
        # The line to complete: in the last third, long enough to mean something, with a name that stood above.
        ends = [n for n in range(len(lines) * 2 // 3, len(lines)) if len(lines[n].strip()) > 20 and '"""' not in lines[n]
                and any(len(w) > 5 and w in "\n".join(lines[:n // 2]) for w in re.findall(r"\w+", lines[n]))]
        end = rng.choice(ends)
        context = "".join(f"# file: {f['path']}\n{f['code'].strip()}\n\n\n" for f in own[:(1, 1, 2, 0)[i % 4]])
        body = f"# file: {last['path']}\n" + "\n".join(lines[:end]) + "\n"
        tasks["repo"].append(record("repo", i, context, body, [lines[end]]))
    return tasks


# --------------------------------------------------------------------------------------------------------- calibration

ASK = (  # wordings of a question behind a text; none occurs in the benchmark
    "{text}\n\n{question}",
    "I have a question about the following.\n\n\"\"\"\n{text}\n\"\"\"\n\n{question} Be brief.",
    "{text}\n\n---\nReply from the text above, shortly: {question}",
    "Please read carefully.\n\n{text}\n\nNow tell me: {question}",
)
TELL = ("{text}\n\nGive me the gist of the document titled {title} in two or three sentences.",
        "Shorten this for a busy reader.\n\n{text}\n\nThe part to shorten is {title}.")


def calibration(rng):
    """Prompts of six kinds, each with the right continuation; about 900 to 2,600 tokens."""
    out = []

    def add(kind, prompt, continuation, chat):
        out.append({"id": f"{kind}-{len(out):03d}", "kind": kind, "chat": chat, "prompt": prompt, "continuation": continuation})

    def ask(kind, items, pool, n_words, i):
        """A question on one of the pool's texts, which stands among others; the right answer is the rest of its sentence."""
        target = items[i % len(items)]
        question, answer = target["qa"][(i * 5 + i // len(items)) % len(target["qa"])]
        at = target["text"].index(answer)
        said = re.split(r"(?<=[.?!])\s|\n", target["text"][at:])[0]  # the rest of the answer's sentence
        texts = [f"{t['title']}\n\n{t['text']}" for t in fill(rng, [target], pool, n_words, rng.random())]
        add(kind, ASK[i % len(ASK)].format(text="\n\n\n".join(texts), question=question), said, True)

    def go_on(kind, items, i):
        """Plain text, cut at a sentence in its second half; sometimes another text of the kind stands before it."""
        target, other = items[i % len(items)], items[(i + 5) % len(items)]
        sentences = target["text"].replace(". ", ".\u241e ").split("\u241e")
        cut = int(len(sentences) * rng.uniform(0.55, 0.85))
        before = "" if i % 3 == 0 else f"{other['title']}\n\n{other['text']}\n\n\n"
        add(kind, f"{before}{target['title']}\n\n" + "".join(sentences[:cut]), "".join(sentences[cut:])[:500], False)

    def shorten(kind, items, i):
        target, other = items[i % len(items)], items[(i + 3) % len(items)]
        pair = rng.sample([target, other], 2) if i % 2 else [target]
        text = "\n\n\n".join(f"{t['title']}\n\n{t['text']}" for t in pair)
        add(kind, TELL[i % len(TELL)].format(text=text, title=target["title"]), target["summary"], True)

    stories, articles, mixed = bank("calib_stories.jsonl"), bank("calib_articles.jsonl"), bank("calib_mixed.jsonl")
    facts, code = bank("calib_facts.jsonl"), bank("calib_code.jsonl")
    records = [m for m in mixed if m["kind"] in ("report", "transcript")]
    manuals = [m for m in mixed if m["kind"] == "instruction"]
    for i in range(10):
        go_on("narrative", stories, i)
        go_on("technical", articles, i)
        go_on("report", records, 2 * i)
        go_on("instruction", manuals, i)
        ask("narrative", stories[6:], stories, (800, 1400)[i % 2], i)
        ask("technical", articles[6:], articles, (800, 1400)[i % 2], i)
        shorten("report", records[i % 2:], i)
        ask("instruction", manuals, manuals + records, (700, 1300, 1900)[i % 3], i)
    for i in range(24):
        ask("qa", facts, facts, (700, 1000, 1400, 1900)[i % 4], 3 * i)
    for i in range(16):
        own = rng.sample(code, 1 + i % 3)
        lines = own[-1]["code"].split("\n")
        cut = rng.randint(len(lines) * 3 // 5, len(lines) - 8)
        head = "".join(f"### {f['path']}\n\n{f['code'].strip()}\n\n" for f in own[:-1])
        add("code", f"{head}### {own[-1]['path']}\n\n" + "\n".join(lines[:cut]) + "\n", "\n".join(lines[cut:cut + 8]), False)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in ("data", "config"):
        (HERE / "mini_longbench" / part).mkdir(parents=True, exist_ok=True)
    outputs = {f"mini_longbench/data/{task}.jsonl": rows for task, rows in benchmark(random.Random(args.seed)).items()}
    outputs["calibration.jsonl"] = calibration(random.Random(args.seed + 1))
    for name, rows in outputs.items():
        (HERE / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} records")
    for name, content in (("dataset2prompt", PROMPTS), ("dataset2maxlen", MAX_NEW)):
        (HERE / "mini_longbench/config" / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")


if __name__ == "__main__":
    main()
