"""Tests on the real weights: one answer, the positions that two policies keep of one prompt, the committed tables."""

import pytest
import torch

from compilerkv import SETTINGS, Tables, select
from eval import DEFAULT_TABLES
from helpers import needs_weights, positions
from model import load

torch.set_num_threads(1)
pytestmark = needs_weights

STORY = """The lighthouse at Corran Head was lit on 3 May 1874 and is 31 metres high. Its first keeper was Elspeth \
Rannoch, who came from the fishing village of Tolm with two goats and a barrel organ. She wound the clockwork of the \
lamp every four hours for twenty-six years and missed a single night, when the ferry that brought her oil sank off \
the Sgeir rocks. The keeper after her, Magnus Lyle, painted the tower red and white so that pilots could tell it from \
the church of Tolm. In 1932 the oil gave way to gas, and the last keeper, Una Farquhar, left on 30 September 1988."""
PROMPT = f"{STORY} Once more: {STORY.split(' In 1932')[0]} Who was the first keeper?"
KEPT = {  # (policy, layer): runs of kept positions; KV heads that keep other ones behind a bar. Written down once.
    ("compilerkv", 0): "0-3 139-143 232-262 267-282 | 0-3 267-282",
    ("compilerkv", 14): "0-3 11-58 94-132 169-225 267-282 | 0-3 53-83 97-127 142-172 267-282 | 0-3 251-282",
    ("compilerkv", 29): "0-3 45-75 80-154 238-282 | 0-3 251-282 | 0-3 267-282",
    ("snapkv", 0): "100-103 152-157 207-213 229-236 244-282 | 194-196 214-220 228-237 239-282"
                   " | 200-203 207 213-219 224-227 229-230 233-237 239 243-282",
    ("snapkv", 14): "0-3 65-71 86-87 151-157 161-167 246-282 | 0-3 91-101 105-117 247-282"
                    " | 0-3 86-92 115-121 151-157 244-282",
    ("snapkv", 29): "0-3 86-92 116-122 151-157 244-282 | 0-3 21-27 86-92 151-157 244-282"
                    " | 0-3 92-94 100-106 123-133 136-142 251-282",
}  # noise of 0.1% on every attention probability changes none of them


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M-Instruct."""
    return load(dtype="float32")


def test_the_capital_of_france(smollm):
    """Guards against weights, template or RoPE that are nearly right; tiny random models cannot tell."""
    logits, cache, _ = smollm.prefill(smollm.tokenizer.chat("What is the capital of France?"), window=8)
    assert smollm.tokenizer.decode(smollm.decode(cache, logits, 12)[0]) == "The capital of France is Paris."


def test_kept_positions_are_those_that_were_written_down(smollm):
    """Guards against a change of a score, pool, tie or RoPE that every property test allows."""
    _, cache, observation = smollm.prefill(smollm.tokenizer.encode(PROMPT), window=64)
    for (policy, layer), expected in KEPT.items():
        kept = select(policy, observation, cache, 64, tables=None)[layer].unique(dim=0)
        assert sorted([t for t in row if t >= 0] for row in kept.tolist()) == sorted(positions(text) for text in expected.split(" | "))


@pytest.mark.skipif(not DEFAULT_TABLES.exists(), reason="no tables yet: run `python train_tables.py`")
def test_the_committed_tables_fit_the_model(smollm):
    """Guards against tables that were compiled for other weights or an older layout."""
    assert set(Tables.load(DEFAULT_TABLES, smollm).compiled) == set(SETTINGS)


@pytest.mark.skipif(not DEFAULT_TABLES.exists(), reason="no tables yet: run `python train_tables.py`")
def test_the_example_of_the_readme_runs(capsys, monkeypatch):
    """Guards against a README whose own ten lines no longer run."""
    root = DEFAULT_TABLES.parent.parent
    monkeypatch.chdir(root)
    example = (root / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "bytes of cache ->" in capsys.readouterr().out
