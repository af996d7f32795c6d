"""Compose benchmarks and the calibration corpus from the text bank, seeded: `python data/compose.py`.

The bank (`bank/*.jsonl`) was written for this project: short passages, stories, reports, news, dialogues and working code,
each with facts, questions or a summary. This script only arranges: which texts share a prompt, in which order, how long,
and at what depth the needed fact stands. Files that start with `eval_` go to the benchmarks, `calib_` to calibration, so
that the two share no text; the question wordings differ as well (tests/test_data.py checks every 50-character span).

Writes three directories in LongBench's own layout, `mini_longbench/`, `needles/` and `ruler/`, and `calibration.jsonl`.
Reading order: how a context is filled -> mini-LongBench -> needles and RULER -> calibration.
"""

import argparse
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
CONTEXTS = 32                      # contexts a task, QUESTIONS questions on each
QUESTIONS = 2
BANDS = (720, 1150, 2000, 3700)    # words of context, about 1,100 / 1,700 / 3,000 / 5,600 tokens
REPORT = 450                       # words that the last report added may exceed the plan by, at most
MIX = (0, 1, 0, 2, 1, 0, 3, 1, 0, 2)  # bands of consecutive contexts: short ones are more frequent, as they cost less


def bank(pattern):
    """All objects of the bank files whose names match, in file order."""
    return [json.loads(line) for path in sorted((HERE / "bank").glob(pattern)) for line in open(path, encoding="utf-8")]


def words(text):
    """Number of words, which is what lengths are planned in."""
    return len(text.split())


def fill(rng, needed, pool, n_words, depth):
    """The needed items among others of the pool, until about n_words words are there.

    The first needed item stands at `depth` in [0, 1] of the list, the second half a list away, further ones anywhere.
    """
    others = [item for item in rng.sample(pool, len(pool)) if item not in needed]
    total, chosen = sum(words(item["text"]) for item in needed), []
    while others and total + 40 < n_words:
        chosen.append(others.pop())
        total += words(chosen[-1]["text"])
    depths = [depth, (depth + 0.5) % 1, *(rng.random() for _ in needed[2:])][:len(needed)]
    places = [(round(d * len(chosen)), i) for i, d in enumerate(depths)]
    for place, i in sorted(places, reverse=True):
        chosen.insert(place, needed[i])
    return chosen


def plan(n):
    """(words, depth) of n contexts: lengths follow MIX, depths a low-discrepancy walk over [0, 1]."""
    return [(BANDS[MIX[i % len(MIX)]], i * 0.618 % 1) for i in range(n)]


def at_depth(chosen, depth, used):
    """The item of the list that stands at `depth`, or the next one that no other record asks about."""
    start = int(depth * len(chosen))
    item = next(item for item in chosen[start:] + chosen[:start] if item["title"] not in used)
    used.add(item["title"])
    return item


# ------------------------------------------------------------------------------------------------------ mini-LongBench

PROMPTS = {  # as in LongBench's dataset2prompt.json; the small model answers best when an answer is begun for it
    "fieldqa": "{context}\n\nQuestion: {input}",
    "reportqa": "Reports of public bodies.\n\n{context}\n\nQuestion: {input}",
    "hopqa": "These passages come from several sources.\n\n{context}\n\nQuestion: {input}",
    "kinqa": "These entries come from a biographical dictionary.\n\n{context}\n\nQuestion: {input}",
    "reports": "Reports of public bodies.\n\n{context}\n\nThe findings in short, one paragraph a report:\n{input}",
    "news": "{context}\n\nThe same news in brief, one paragraph an event:\n{input}",
    "qtype": "Name the kind of thing each question asks for.\n\n{context}\n{input}",
    "chats": "Say in a sentence or two what each conversation comes to.\n\n{context}\n\n{input}",
    "count": "{context}\n\n{input}",
    "which": "{context}\n\n{input}",
    "lines": "{context}",
    "repo": "{context}{input}",
}
MAX_NEW = {"fieldqa": 24, "reportqa": 24, "hopqa": 24, "kinqa": 20, "reports": 40, "news": 14, "qtype": 8, "chats": 28,
           "count": 6, "which": 20, "lines": 32, "repo": 32}


def record(task, rows, context, question, answers, fact=None, offset=0, classes=None, **more):
    """Append one object in LongBench's schema; `depth`: where in the context the fact begins, `offset` characters behind it."""
    depth = None if fact is None else round((context.index(fact) + offset) / len(context), 3)
    rows.append({"input": question, "context": context, "answers": answers, "length": words(context), "dataset": task,
                 "language": "python" if task in ("lines", "repo") else "en", "all_classes": classes,
                 "_id": f"{task}-{len(rows):03d}", "depth": depth, **more})


def begun_answer(question, text, answer, n_lead):
    """A question whose answer is begun with n_lead words of the text, the gold answers, and where the fact begins in the text.

    The first gold answer is the rest of the clause, at most 12 words, up to a comma if it must be cut; the second the bare answer.
    """
    at = text.index(answer)
    lead = re.split(r"[.;?!] |\n", text[:at])[-1].split()[-n_lead:]
    rest = re.split(r"[.;?!](?: |\n|$)", text[at:])[0]
    if words(rest) > 12:
        piece = " ".join(rest.split()[:12])
        end = max(piece.rfind(mark) for mark in ",;:")
        rest = piece[:end] if end >= len(answer) else answer
    return f"{question}\nAnswer in the words of the text: \"{' '.join(lead)}", [rest + '"', answer], at


def can_begin(text, answer, n_lead):
    """Whether n_lead words of its own sentence stand before the answer."""
    return words(re.split(r"[.;?!] |\n", text[:text.index(answer)])[-1]) >= n_lead


def begun(summary, turn, n_lead=6, n_gold=24):
    """A summary's first words, and the next ones as the gold answer, at most n_gold, cut at a comma or full stop.

    turn: how often the summary was asked for before; each time it is begun a sentence later.
    """
    parts = " ".join(re.split(r"(?<=[.?!]) ", summary)[turn:]).split()
    while parts[n_lead - 1][0].isupper() and parts[n_lead][0].isupper():  # do not split a name
        n_lead += 1
    gold = " ".join(parts[n_lead:n_lead + n_gold])
    ends = [m.end() for m in re.finditer(r"[.,;:](?= |$)", gold)]
    return " ".join(parts[:n_lead]), gold[:ends[-1]].rstrip(",;:") if ends and ends[-1] > len(gold) / 2 else gold


def question_tasks(rng, passages, reports, links):
    """Single- and multi-document QA: {task: records}."""
    tasks, by_id, used = {"fieldqa": [], "reportqa": [], "hopqa": [], "kinqa": []}, {p["id"]: p for p in passages}, set()
    asked = set()
    for size, depth in plan(CONTEXTS):
        chosen = fill(rng, [], passages, size, depth)
        context = "\n\n".join(f"{p['title']}\n{p['text']}" for p in chosen)
        for k in range(QUESTIONS):
            target = at_depth([p for p in chosen if any(can_begin(p["text"], a, 3) for _, a in p["qa"])],
                              (depth + k / QUESTIONS) % 1, used)
            question, answer = next(qa for qa in target["qa"] if can_begin(target["text"], qa[1], 3))
            question, golds, at = begun_answer(question, target["text"], answer, n_lead=4)
            record("fieldqa", tasks["fieldqa"], context, question, golds, target["text"], at)
    for size, depth in plan(CONTEXTS):
        fresh = max(reports, key=lambda r: (sum(q not in asked for q, _ in r["qa"]), rng.random()))  # has most questions left
        chosen = fill(rng, [fresh], reports, max(size - REPORT, 800), depth)
        context = "\n\n\n".join(r["text"] for r in chosen)
        for k in range(QUESTIONS):  # the question, not asked before, whose answer stands nearest to the planned depth
            place = (depth + k / QUESTIONS) % 1 * len(context)
            target, (question, answer) = min(((r, qa) for r in chosen for qa in r["qa"]
                                              if qa[0] not in asked and can_begin(r["text"], qa[1], 4)),
                                             key=lambda pair: abs(context.index(pair[0]["text"]) + pair[0]["text"].index(pair[1][1]) - place))
            asked.add(question)
            question, golds, at = begun_answer(question, target["text"], answer, n_lead=4)
            record("reportqa", tasks["reportqa"], context, question, golds, target["text"], at)
    links = [link for link in rng.sample(links, len(links)) if can_begin(by_id[link["second"]]["text"], link["answer"], 2)]
    for i, (size, depth) in enumerate(plan(CONTEXTS)):
        pair = links[QUESTIONS * i:QUESTIONS * (i + 1)]
        needed = [by_id[link[end]] for end in ("second", "first") for link in pair]
        chosen = fill(rng, [p for n, p in enumerate(needed) if p not in needed[:n]], passages, size, depth)
        context = "\n\n".join(f"Passage {n}:\n{p['title']}\n{p['text']}" for n, p in enumerate(chosen, 1))
        for link in pair:
            text = by_id[link["second"]]["text"]
            question, golds, at = begun_answer(link["question"], text, link["answer"], n_lead=2)
            record("hopqa", tasks["hopqa"], context, question, golds, text, at)
    *people, parent_a, child_a = invented_people(rng, 4 * CONTEXTS * QUESTIONS + 2)  # the last pair is the worked example
    for i, (size, depth) in enumerate(plan(CONTEXTS)):
        needed = people[2 * QUESTIONS * i:2 * QUESTIONS * (i + 1)]  # parent, child, parent, child
        chosen = fill(rng, needed[::2] + needed[1::2], people, 0.83 * size, depth)  # coined names are long in tokens
        context = "\n\n".join(p["text"] for p in chosen)
        for parent, child in zip(needed[::2], needed[1::2]):
            ask = lambda parent, child: (f"Who was {child['name']}'s {child['parent']}, and where was that parent born?\n"
                                         f"Answer: {child['name']} was the child of")
            known = f"{ask(parent_a, child_a)} {parent_a['name']} ({parent_a['town']})."
            record("kinqa", tasks["kinqa"], context, f"{known}\n\nQuestion: {ask(parent, child)}",
                   [f"{parent['name']} ({parent['town']})"], parent["text"])
    return tasks


def syllables(rng, n):
    """A coined name of n syllables."""
    return "".join(rng.choice("bdfghklmnprstvz") + rng.choice(("a", "e", "i", "o", "u", "ai", "or", "en", "il", "as"))
                   for _ in range(n)).capitalize()


TRADES = ("cartographer", "organ builder", "surgeon", "glass painter", "river pilot", "botanist", "typefounder", "judge",
          "mountain guide", "saddler", "astronomer", "translator", "bell founder", "actor", "apothecary", "bridge engineer")
DEEDS = ("taught for {n} years at the night school of {a}", "left {n} notebooks to the town archive of {a}",
         "walked from {a} to {b} in {n} days", "lost a lawsuit in {a} over {n} sacks of barley",
         "kept {n} tame jackdaws in a tower at {a}", "sold a house in {a} for {n} silver coins and moved to {b}",
         "wrote {n} letters from {a} that were never answered", "won {n} wagers about the weather at {a}")


def invented_people(rng, n):
    """n dictionary entries in pairs, a parent and a child: dictionaries of name, parent (mother or father), town, title, text.

    Only the child's entry names the parent, and the two share no name, so that both entries are needed.
    """
    people = []
    for _ in range(n // 2):
        names, year = [f"{syllables(rng, 2)} {syllables(rng, 3)}" for _ in range(2)], rng.randint(1780, 1870)
        kin = ("", f" {names[1]} was the child of {names[0]}.")
        for name, child_of in zip(names, kin):
            town, trade = syllables(rng, 3), rng.choice(TRADES)
            deeds = " and ".join(deed.format(a=syllables(rng, 3), b=syllables(rng, 3), n=rng.randint(3, 40))
                                 for deed in rng.sample(DEEDS, 2))
            text = (f"{name} was born in {town} in {year}, and worked as a{'n' * (trade[0] in 'aeiou')} {trade}.{child_of} "
                    f"{name} {deeds}.")
            people.append({"name": name, "parent": rng.choice(("mother", "father")), "town": town, "title": name, "text": text})
            year += rng.randint(22, 40)
    return people


def summary_tasks(rng, reports, events):
    """Summaries of one report, or of three articles on one event, among others: {task: records}."""
    tasks = {"reports": [], "news": []}
    for task, pool in (("reports", reports), ("news", events)):
        turns = {t["title"]: 0 for t in pool}
        for size, depth in plan(CONTEXTS):
            needed = sorted(pool, key=lambda t: (turns[t["title"]], rng.random()))[:QUESTIONS]
            chosen = fill(rng, needed, pool, size - (REPORT if task == "reports" else 0), depth)
            if task == "reports":
                context = "\n\n\n".join(t["text"] for t in chosen)
            else:
                articles = [a for t in chosen for a in t["articles"]]
                rng.shuffle(articles)
                context = "\n\n".join(f"{a['outlet']}. {a['text']}" for a in articles)
            for target in needed:
                example = rng.choice([t for t in pool if t not in chosen] if len(chosen) < len(pool) else pool)
                lead, rest = begun(target["summary"], turns[target["title"]], n_gold=24 if task == "reports" else 8)
                turns[target["title"]] += 1
                start = f"{example['title']}: {example['summary']}\n{target['title']}: {lead}"
                fact = target["text"] if task == "reports" else target["articles"][0]["text"]
                record(task, tasks[task], context, start, [rest], fact)
    return tasks


def few_shot_tasks(rng, questions, dialogues):
    """Question types and conversations, learned from examples in the prompt: {task: records}."""
    tasks, classes = {"qtype": [], "chats": []}, sorted({q["type"] for q in questions})
    asked, told = rng.sample(questions, CONTEXTS * QUESTIONS), rng.sample(dialogues, CONTEXTS * QUESTIONS)
    for i, (size, _) in enumerate(plan(CONTEXTS)):
        targets = asked[QUESTIONS * i:QUESTIONS * (i + 1)]
        examples = [q for q in rng.sample(questions, len(questions)) if q not in targets][:size // 14]
        context = "\n".join(f"Question: {q['question']}\nType: {q['type']}" for q in examples)
        for q in targets:
            record("qtype", tasks["qtype"], context, f"Question: {q['question']}\nType:", [q["type"]], classes=classes)
        targets = told[QUESTIONS * i:QUESTIONS * (i + 1)]
        examples = [d for d in rng.sample(dialogues, len(dialogues)) if d not in targets][:size // 120]
        context = "\n\n".join(f"Conversation:\n{d['dialogue']}\nIn short: {d['summary']}" for d in examples)
        for d in targets:
            lead, rest = begun(d["summary"], 0)
            record("chats", tasks["chats"], context, f"Conversation:\n{d['dialogue']}\nIn short: {lead}", [rest])
    return tasks


def numbered_tasks(rng, passages):
    """Which passage, by the mark it carries, and how many there are: {task: records}."""
    tasks, used = {"count": [], "which": []}, set()
    for size, depth in plan(CONTEXTS):
        chosen = fill(rng, [], passages, size, depth)
        targets = [at_depth(chosen, (depth + k / QUESTIONS) % 1, used) for k in range(QUESTIONS)]
        marked = targets + rng.sample([p for p in chosen if p not in targets], 1)  # more marks are beyond this model
        marks = {p["title"]: m for p, m in zip(marked, rng.sample(range(10000, 100000), len(marked)))}
        context = "\n\n".join(p["text"] + (f" The shelf mark of {p['title']} is {marks[p['title']]}." if p["title"] in marks else "")
                              for p in chosen)
        for target in targets:
            mark = str(marks[target["title"]])
            record("which", tasks["which"], context, f"What is the shelf mark of {target['title']}?", [mark], f" is {mark}.")
        for k in range(QUESTIONS):
            chosen = fill(rng, [], passages, size * rng.uniform(0.88, 1.05), depth)
            context = "\n\n".join(f"Paragraph {n}: {p['text']}" for n, p in enumerate(chosen, 1))
            record("count", tasks["count"], context, "The highest number of a paragraph above is", [str(len(chosen))])
    return tasks


def code_tasks(rng, files):
    """The next line of a long file, and of a file whose project stands before it: {task: records}."""
    tasks, used = {"lines": [], "repo": []}, set()

    def target_line(lines, start, stop, above):
        """A new line to complete between start and stop: no text of its own, and all its longer names stood above."""
        def fits(line, n):
            names = re.findall(r"[A-Za-z_]{5,}", line)
            return (20 < len(line.strip()) < 90 and line not in used and not re.search(r"[\"'].{9,}|^\s*(def|class|@)", line)
                    and lines[n - 1].strip() and names and all(name in above + "\n".join(lines[:n]) for name in names))
        end = rng.choice([n for n in range(start, min(stop, len(lines))) if fits(lines[n], n)])
        used.add(lines[end])
        return end

    projects = {}
    for f in files:
        projects.setdefault(f["path"].split("/")[0], []).append(f)
    solo = projects.pop("solo")  # long files that stand alone
    groups = list(projects.values())
    n, per_file = CONTEXTS * QUESTIONS, -(-CONTEXTS * QUESTIONS // len(solo))
    for i in range(n):  # the files take turns; the places of one file are far apart
        lines = solo[i % len(solo)]["code"].strip().split("\n")
        start = int(len(lines) * (0.3 + 0.65 * (i // len(solo)) / per_file))
        end = target_line(lines, start, start + 40, "")
        record("lines", tasks["lines"], f"# {solo[i % len(solo)]['path']}\n" + "\n".join(lines[:end]), "", [lines[end]])
    for i, (size, _) in enumerate(plan(CONTEXTS)):
        own = groups[i % len(groups)]
        last = own[-1 - i // len(groups) % 2]
        others = [f for f in own if f is not last]
        strangers = [f for f in files if f not in own and f not in solo]
        while strangers and sum(words(f["code"]) for f in others) < 0.4 * size:  # code has more tokens a word
            others.insert(0, strangers.pop(rng.randrange(len(strangers))))
        head, lines = "".join(f"# file: {f['path']}\n{f['code'].strip()}\n\n\n" for f in others), last["code"].strip().split("\n")
        for k in range(QUESTIONS):
            end = target_line(lines, len(lines) // 2, len(lines), head)
            start = max(end - 6, 0)
            record("repo", tasks["repo"], head + f"# file: {last['path']}\n" + "\n".join(lines[:start]) + "\n",
                   "\n".join(lines[start:end]), [lines[end]])
    return tasks


def benchmark(rng):
    """All twelve tasks: {task: records}."""
    passages, reports, events = bank("eval_passages_*.jsonl"), bank("eval_reports_*.jsonl"), bank("eval_events.jsonl")
    events = [{**e, "text": "\n\n".join(a["text"] for a in e["articles"])} for e in events]
    return {**question_tasks(rng, passages, reports, bank("eval_links_*.jsonl")), **summary_tasks(rng, reports, events),
            **few_shot_tasks(rng, bank("eval_questions.jsonl"), bank("eval_dialogues.jsonl")),
            **numbered_tasks(rng, passages), **code_tasks(rng, bank("eval_code*.jsonl"))}


# ---------------------------------------------------------------------------------------------------- needles and RULER

NEEDLE_PROMPTS = {"needle": "{context}\n\n{input}"}
RULER_PROMPTS = {"multikey": "{context}\n\n{input}", "multivalue": "{context}\n\n{input}", "tracking": "{context}\n\n{input}"}
LENGTHS = (700, 1400, 2700, 4700)  # words of hay, about 1,000 / 2,000 / 4,000 / 7,000 tokens
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PER_LENGTH = 6  # records of each RULER task and length


def sentences_of(rng, passages, n_words):
    """Hay: sentences of passages in their order, about n_words words."""
    chosen = fill(rng, [], passages, n_words, 0.0)
    return [s for p in chosen for s in re.split(r"(?<=[a-z0-9)][.?!]) (?=[A-Z])", p["text"])]


def bury(hay, needles):
    """Insert (depth, sentence) pairs into a list of sentences; returns one text."""
    for place, needle in sorted(((round(d * len(hay)), n) for d, n in needles), reverse=True):
        hay.insert(place, needle)
    return " ".join(hay)


def needles(rng, passages):
    """Every length x depth x number of competing needles: one sentence tells the code asked for, others the codes of others."""
    rows = []
    for n_needles in (1, 2, 4):
        for n_words in LENGTHS:
            for depth in DEPTHS:
                owners = rng.sample(passages, n_needles)
                codes = rng.sample(range(10000, 100000), n_needles)
                facts = [f"The archive code of {p['title']} is {code}." for p, code in zip(owners, codes)]
                hay = sentences_of(rng, [p for p in passages if p not in owners], n_words)
                places = [depth, *((depth + i / n_needles) % 1 for i in range(1, n_needles))]
                record("needle", rows, bury(hay, list(zip(places, facts))), f"What is the archive code of {owners[0]['title']}?",
                       [str(codes[0])], facts[0], needles=n_needles)
                rows[-1]["depth"] = depth  # the planned one: cells of a grid
    return {"needle": rows}


def ruler(rng, passages):
    """Many keys, several values of one key, and chains of assignments: {task: records}."""
    tasks = {name: [] for name in RULER_PROMPTS}
    for n_words in LENGTHS:
        for i in range(PER_LENGTH):
            depth = (i + 0.5) / PER_LENGTH
            owners, codes = rng.sample(passages, 16), rng.sample(range(10000, 100000), 16)
            facts = [f"The locker number of {p['title']} is {code}." for p, code in zip(owners, codes)]
            places = [depth, *(rng.random() for _ in owners[1:])]
            context = bury(sentences_of(rng, passages, n_words), list(zip(places, facts)))
            record("multikey", tasks["multikey"], context, f"What is the locker number of {owners[0]['title']}?",
                   [str(codes[0])], facts[0])

            owner, codes = rng.choice(passages), rng.sample(range(1000, 10000), 3)
            facts = [f"One badge number of {owner['title']} is {code}." for code in codes]
            places = sorted((depth + k / 3) % 1 for k in range(3))  # the order of the answer is that of the text
            context = bury(sentences_of(rng, passages, n_words), list(zip(places, facts)))
            record("multivalue", tasks["multivalue"], context, f"There are three badge numbers of {owner['title']}. List all of them.",
                   [", ".join(map(str, codes))], facts[0])

            value = rng.randint(10000, 99999)
            names = ["".join(rng.choice("ABCDEFGHKLMNPRSTUVWX") for _ in range(4)) for _ in range(3)]
            chain = [f"Note: {names[0]} = {value}.", *(f"Note: {b} = {a}." for a, b in zip(names, names[1:]))]
            places = sorted(rng.random() for _ in chain)
            context = bury(sentences_of(rng, passages, n_words), list(zip(places, chain)))
            record("tracking", tasks["tracking"], context,
                   f"Which names have the value {value}?\nThe names with the value {value} are {names[0]},", [", ".join(names[1:])], chain[0])
    return tasks


# --------------------------------------------------------------------------------------------------------- calibration

PER_KIND = 18  # calibration prompts of each kind: half composed here, half as they stand in the bank
SIZES = (740, 900, 1150, 1500)  # words of a calibration prompt, about 1,200 to 2,700 tokens
ASK = (  # (prompt, in the chat template?): wordings of a question behind a text; none occurs in the benchmarks
    ("{text}\n\n{question}", True),
    ("I have a question about the following.\n\n\"\"\"\n{text}\n\"\"\"\n\n{question} Be brief.", True),
    ("{text}\n\n---\nReply from the text above, shortly: {question}", True),
    ("Please read carefully.\n\n{text}\n\nNow tell me: {question}", True),
    ("{text}\n\n{question}\nIt is written above: {lead}", False),
    ("Notes for the quiz night\n\n{text}\n\nQ. {question}\nA. {lead}", False),
    ("You will read some texts, then a question about one of them. Give nothing but the answer, as briefly as you can.\n\n{text}\n\n"
     "The texts end here. Give nothing but the answer.\n\n{question}\nYour answer:", True),
    ("<texts>\n{text}\n</texts>\n\nUse only what the texts say. {question}", True),
    ("Read the source below and reply in a few words.\n\nSource: {text}\n\nUser: {question}\nReply:", True),
)
TELL = (("{text}\n\nGive me the gist of the document titled {title} in two or three sentences.", True),
        ("Shorten this for a busy reader.\n\n{text}\n\nThe part to shorten is {title}.", True),
        ("{text}\n\nAbstract of {title}\n\n{lead}", False),
        ("Below are documents. Summarise one of them in a paragraph.\n\n{text}\n\nNow write the paragraph on {title}.", True))
STYLES = ("{title}\n\n{text}", "## {title}\n{text}", "[{n}] {title}. {text}", "<doc no=\"{n}\" title=\"{title}\">\n{text}\n</doc>")
TOKENS = (  # a sentence that tells a code, and the question: {owner} and {code} are filled in
    ("For {owner} the combination of the safe is {code}.", "Which combination opens the safe for {owner}?"),
    ("(Dial {code} to reach {owner}.)", "What must one dial to reach {owner}?"),
    ("Invoice {code} was made out to {owner}.", "Which invoice was made out to {owner}?"),
    ("{owner}: bin {code}, second shelf.", "In which bin is the file on {owner}?"))
GOODS = ("lamp oil", "rope", "seed potatoes", "window glass", "copper nails", "oatmeal", "roof felt", "candles", "goose down",
         "black tea", "sheep dip", "writing ink", "salt herring", "hoof balm", "chalk", "pine tar")


def calibration(rng):
    """108 prompts of six kinds, 1,000 to 4,000 tokens, each with the right continuation; layouts differ within a kind.

    Half are composed here. Half of their texts are told for their own sake, half are in the manner of what one meets: papers, reports
    of agencies, minutes, news, web pages, encyclopedias, chats, repositories. Where one fact is needed, its depth walks evenly over the
    prompt. The other prompts were written as a whole: instructions, notation, question and all, no two alike.
    """
    out, walk = [], 0

    def add(kind, prompt, continuation, chat):
        out.append({"id": f"{kind}-{len(out):03d}", "kind": kind, "chat": chat, "prompt": prompt, "continuation": continuation})

    def next_place(i):
        """(words, depth) of the next prompt: lengths take turns, depths walk over [0, 1]."""
        nonlocal walk
        walk += 1
        return SIZES[i % len(SIZES)], walk * 0.618 % 1

    def joined(texts):
        style = STYLES[walk // 2 % len(STYLES)]
        return "\n\n\n".join(style.format(n=n, title=t["title"], text=t["text"]) for n, t in enumerate(texts, 1))

    def ask(kind, items, pool, i):
        """A question on one of the pool's texts, which stands among others; the right answer is the rest of its sentence."""
        size, depth = next_place(i)
        wording, chat = ASK[walk % len(ASK)]
        target = items[i % len(items)]
        choices = [qa for qa in target["qa"] if chat or can_begin(target["text"], qa[1], 3)]
        question, answer = choices[(i * 5 + i // len(items)) % len(choices)]
        at = target["text"].index(answer)
        sentence = re.split(r"(?<=[.?!])\s|\n", target["text"][at:])[0]  # from the answer on
        lead = " ".join(re.split(r"[.;?!] |\n", target["text"][:at])[-1].split()[-4:])
        text = joined(fill(rng, [target], pool, size, depth))
        add(kind, wording.format(text=text, question=question, lead=lead), " " * (not chat) + sentence, chat)

    def go_on(kind, items, i):
        """Plain text, cut at a sentence in its second half; other texts of the kind stand before it."""
        size, _ = next_place(i)
        target = items[i % len(items)]
        sentences = target["text"].replace(". ", ".\u241e ").split("\u241e")
        cut = int(len(sentences) * rng.uniform(0.55, 0.85))
        before = joined(fill(rng, [], [t for t in items if t is not target], size - 600, 0)) + "\n\n\n"
        add(kind, f"{before}{target['title']}\n\n" + "".join(sentences[:cut]), "".join(sentences[cut:])[:500], False)

    def shorten(kind, items, i):
        """The summary of one text among others, begun in the plain layout."""
        size, depth = next_place(i)
        wording, chat = TELL[walk % len(TELL)]
        target = items[i % len(items)]
        lead, rest = ("", target["summary"]) if chat else begun(target["summary"], 0, n_lead=4, n_gold=40)
        text = joined(fill(rng, [target], items, size, depth))
        add(kind, wording.format(text=text, title=target["title"], lead=lead), " " * (not chat) + rest, chat)

    def find(kind, items, i):
        """The number of the text that a summary belongs to."""
        size, depth = next_place(i)
        target = items[i % len(items)]
        chosen = fill(rng, [target], items, size, depth)
        text = "\n\n".join(f"Text {n}. {t['text']}" for n, t in enumerate(chosen, 1))
        gist = target.get("gist") or target["summary"]
        add(kind, f"{text}\n\nSomebody noted down what one of these texts says:\n\n{gist}\n\nWhich text was that? It was Text",
            f" {chosen.index(target) + 1}.", False)

    def look_up(kind, pool, i):
        """A code that one sentence tells, among the codes of three others, in running text."""
        size, depth = next_place(i)
        fact, question = TOKENS[i % len(TOKENS)]
        owners, codes = rng.sample(pool, 4), rng.sample(range(1000, 100000), 4)
        hay = sentences_of(rng, [t for t in pool if t not in owners], size)
        facts = [fact.format(owner=o["title"], code=c) for o, c in zip(owners, codes)]
        text = bury(hay, [(depth, facts[0]), *((rng.random(), f) for f in facts[1:])])
        add(kind, f"{text}\n\n{question.format(owner=owners[0]['title'])}", str(codes[0]), True)

    def ledger(kind, i):
        """One field of one row of a table of orders, written as lines, as CSV or as JSON."""
        size, depth = next_place(i)
        rows = [{"customer": f"{syllables(rng, 2)} {syllables(rng, 2)}", "goods": rng.choice(GOODS),
                 "amount": rng.randint(2, 98), "number": n} for n in rng.sample(range(1000, 9999), size // 17)]
        row = rows[int(depth * len(rows)) % len(rows)]
        text = ("\n".join("No. {number}: {customer} ordered {amount} lots of {goods}.".format(**r) for r in rows),
                "number,customer,goods,amount\n" + "\n".join("{number},{customer},{goods},{amount}".format(**r) for r in rows),
                "[" + ",\n ".join(json.dumps(r) for r in rows) + "]")[i // 2 % 3]
        question, start, end = (("What did {customer} order?", "{customer} ordered", " {amount} lots of {goods}."),
                                ("Who placed order {number}, and for what?", "Order {number} was placed by", " {customer} for {goods}."))[i % 2]
        add(kind, f"{text}\n\n{question.format(**row)}\n{start.format(**row)}", end.format(**row), False)

    def two_steps(kind, pairs, pool, i):
        """A question that two texts answer together, the second one at the planned depth."""
        size, depth = next_place(i)
        pair = pairs[i % len(pairs)]
        first, second = ({"title": pair["title" + n], "text": pair["text" + n]} for n in ("", "_2"))
        at = second["text"].index(pair["answer"])
        lead = " ".join(re.split(r"[.;?!] |\n", second["text"][:at])[-1].split()[-3:])
        text = joined(fill(rng, [second, first], pool, size, depth))
        rest = re.split(r"(?<=[.?!])\s|\n", second["text"][at:])[0]
        if i % 2:
            add(kind, f"{text}\n\nTwo of these belong together. {pair['question']}", rest, True)
        else:
            add(kind, f"{text}\n\n{pair['question']} Hint: \u201c{lead}", " " + rest, False)

    def sort_messages(kind, messages, i):
        """The desk that a message belongs to, learned from examples."""
        size, _ = next_place(i)
        m = rng.choice(messages)
        chosen = fill(rng, [], [other for other in messages if other is not m], size + 50, 0)
        text = ("\n\n".join("{text}\nDesk: {label}".format(**m) for m in chosen),
                "\n".join("[{label}] {text}".format(**m) for m in chosen))[i % 2]
        tail = (f"\n\n{m['text']}\nDesk:", f"\nThe label of \u201c{m['text']}\u201d is [")[i % 2]
        add(kind, text + tail, (f" {m['label']}", f"{m['label']}]")[i % 2], False)

    def take_notes(kind, dialogues, i):
        """A summary of the last conversation, in the manner of those before it."""
        size, _ = next_place(i)
        chosen = fill(rng, [], dialogues, size, 0)
        lead, rest = begun(chosen[-1]["summary"], 0, n_lead=5, n_gold=30)
        text = "\n\n".join(f"{d['text']}\n=> {d['summary']}" for d in chosen[:-1])
        add(kind, f"{text}\n\n{chosen[-1]['text']}\n=> {lead}", " " + rest, False)

    def write_code(kind, files, i):
        """The next lines of a file that stands behind other files; the cut walks over the file."""
        size, depth = next_place(i)
        target = files[i % len(files)]
        root = lambda f: f["path"].split("/")[0]
        own = [f for f in files if root(f) == root(target) and f is not target]
        others = fill(rng, [], [{**f, "text": f["code"]} for f in own or files if f is not target], 0.4 * size - 200, 0)
        lines = target["code"].strip().split("\n")
        cut = int(len(lines) * (0.6 + 0.35 * depth if others else 0.97))
        while not lines[cut].strip():
            cut += 1
        mark = ("### {path}", "--- {path} ---", "// {path}")[i % 3]
        head = "".join(f"{mark.format(**f)}\n\n{f['code'].strip()}\n\n" for f in others)
        add(kind, f"{head}{mark.format(**target)}\n\n" + "\n".join(lines[:cut]) + "\n", "\n".join(lines[cut:cut + (8, 1)[i // 4 % 2]]) + "\n", False)

    stories, articles, mixed = bank("calib_stories.jsonl"), bank("calib_articles.jsonl"), bank("calib_mixed.jsonl")
    facts, code, pairs = bank("calib_facts.jsonl"), bank("calib_code.jsonl"), bank("calib_pairs.jsonl")
    dialogues, messages = bank("calib_dialogues.jsonl"), bank("calib_messages.jsonl")
    chapters, papers, agencies = bank("calib_chapters.jsonl"), bank("calib_papers.jsonl"), bank("calib_agencies.jsonl")
    meetings, news, web = bank("calib_meetings.jsonl"), bank("calib_news.jsonl"), bank("calib_web.jsonl")
    chats, reviews, sources = bank("calib_chats.jsonl"), bank("calib_reviews.jsonl"), bank("calib_sources.jsonl")
    reviews = [{**m, "text": f"({m['set']}) {m['text']}"} for m in reviews]
    entries, hops = bank("calib_entries.jsonl"), bank("calib_hops.jsonl")
    records = [m for m in mixed if m["kind"] in ("report", "transcript")]
    manuals = [m for m in mixed if m["kind"] == "instruction"]
    makers = {  # kind -> the layouts that take turns: a function and the texts it draws from
        "narrative": [(ask, stories[6:], stories), (ask, chapters, chapters), (go_on, stories), (ask, chapters, chapters),
                      (shorten, chapters), (ask, stories[6:], stories), (ask, chapters, chapters), (look_up, chapters),
                      (go_on, chapters)],
        "technical": [(ask, articles[6:], articles), (ask, papers, papers), (go_on, papers), (ask, papers, papers), (shorten, papers),
                      (look_up, articles), (ask, papers, papers), (ask, articles[6:], articles), (shorten, papers)],
        "report": [(ask, records, records), (shorten, agencies), (ask, meetings, meetings), (shorten, news), (ask, agencies, agencies),
                   (shorten, meetings), (ask, news, news), (shorten, records), (go_on, agencies)],
        "dialogue": [(ask, dialogues, dialogues), (ask, web, web), (sort_messages, messages), (take_notes, chats), (ask, manuals, manuals),
                     (sort_messages, reviews), (take_notes, dialogues), (ask, chats, chats), (shorten, web)],
        "code": [(write_code, code), (write_code, sources)],
        "qa": [(ask, facts, facts), (two_steps, hops, entries), (ledger,), (ask, entries, entries), (two_steps, pairs, facts),
               (find, entries), (two_steps, hops, entries), (look_up, facts), (ask, entries, entries)]}
    whole = {kind: [row for row in bank("calib_prompts.jsonl") if row["kind"] == kind] for kind in makers}
    for n in range(PER_KIND // 2):
        for composed in (n % 2 == 0, n % 2 == 1):  # the two sources change places, so that every second round has both
            for kind, layouts in makers.items():
                if composed:
                    make, *texts = layouts[n % len(layouts)]
                    make(kind, *texts, n)
                else:
                    row = whole[kind][n]
                    add(kind, row["prompt"], row["continuation"], row["chat"])
    return out


def write_suite(name, tasks, prompts, max_new):
    """One directory in LongBench's layout."""
    for part in ("data", "config"):
        (HERE / name / part).mkdir(parents=True, exist_ok=True)
    for task, rows in tasks.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / name / "data" / f"{task}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}/{task}: {len(rows)} records")
    for key, content in (("prompt", prompts), ("maxlen", max_new)):
        (HERE / name / "config" / f"dataset2{key}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_suite("mini_longbench", benchmark(random.Random(args.seed)), PROMPTS, MAX_NEW)
    passages = bank("eval_passages_*.jsonl")
    write_suite("needles", needles(random.Random(args.seed + 2), passages), NEEDLE_PROMPTS, {"needle": 20})
    write_suite("ruler", ruler(random.Random(args.seed + 3), passages), RULER_PROMPTS,
                {"multikey": 20, "multivalue": 40, "tracking": 16})
    rows = calibration(random.Random(args.seed + 1))
    (HERE / "calibration.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                            encoding="utf-8")
    print(f"calibration.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    main()
