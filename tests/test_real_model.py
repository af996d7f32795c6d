"""Tests on the real weights: one answer, the positions that two policies keep of one prompt, and the committed tables."""

import pytest
import torch

from compilerkv import SETTINGS, Tables, select
from eval import DEFAULT_TABLES
from helpers import needs_weights
from model import load

torch.set_num_threads(1)
pytestmark = needs_weights

PROMPT = """The lighthouse at Corran Head was lit on 3 May 1874 and is 31 metres high. Its first keeper was Elspeth Rannoch, \
who came from the fishing village of Tolm with two goats and a barrel organ. She wound the clockwork of the lamp every \
four hours for twenty-six years and missed a single night, when the ferry that brought her oil sank off the Sgeir rocks. \
The keeper after her, Magnus Lyle, painted the tower red and white so that pilots could tell it from the church of Tolm. \
The lamp burns one flash every nine seconds. In 1932 the oil gave way to gas and in 1971 to electricity, and the last \
keeper, Una Farquhar, left on 30 September 1988. Today a baker rents the house below the tower and sells bread to walkers. \
A sign at the gate says that the lighthouse at Corran Head is 31 metres high, was lit on 3 May 1874, and shows one flash \
every nine seconds. A second sign, older and half covered by ivy, gives the name of its first keeper, Elspeth Rannoch from \
Tolm, and asks visitors not to feed the goats. Children of the village still say that Elspeth Rannoch walks the stairs when \
the ferry is late.\n\nWho was the first keeper of the lighthouse?"""

# Runs of kept positions of this prompt's 300 tokens, layer -> one line a distinct set; the window, 268-299, is left out.
# Computed once with this code; noise of 0.03% on every attention probability changes none of them.
KEPT = {
    "compilerkv": {
        0: ["0-3 52 118 127 129 172 208 225 227-228 230-231 239-240 242 246 249 252-253 256-257 259-261 263-267"],
        14: ["0-3 31-32 75 78-80 173 185 187 190-191 194-200 250-253 255 263-267"],
        29: ["0-3 92-98 103 132-142 154-160 264-265"]},
    "snapkv": {
        0: ["52-55 100-102 115-116 174-175 225-231 238-244 261-267",
             "222 226 238-267",
             "225-231 236 240-246 251-267"],
        14: ["0-3 173-176 185-191 225-231 256-257 260-267",
             "0-3 26-32 74-80 246-247 249-256 264-267",
             "0-3 185-191 194-200 247-253 257 262-267"],
        29: ["0-4 21 24-27 88-90 172-175 192-198 260-267",
             "0-3 21-27 62 185-186 225-231 257-267",
             "0-3 92-98 132-142 154-160 264-266"]},
}


@pytest.fixture(scope="module")
def smollm():
    return load(dtype="float32")


def runs(positions):
    """Sorted positions before the window as text: '0-3 7 9-11'."""
    starts = [p for p in positions if p < 268 and p - 1 not in positions]
    ends = [p for p in positions if p < 268 and (p == 267 or p + 1 not in positions)]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def test_the_capital_of_france(smollm):
    """Guards against weights, template or RoPE that are nearly right: the tiny models cannot tell sense from nonsense."""
    logits, cache, _ = smollm.prefill(smollm.tokenizer.chat("What is the capital of France?"), window=8)
    [answer] = smollm.decode(cache, logits, max_new=12)
    assert smollm.tokenizer.decode(answer) == "The capital of France is Paris."


def test_kept_positions_are_those_that_were_written_down(smollm):
    """Guards against a change of a score, pool, tie or RoPE that every property test allows."""
    tokens = smollm.tokenizer.encode(PROMPT)
    _, cache, observation = smollm.prefill(tokens, window=64)
    assert len(tokens) == 300
    for policy, by_layer in KEPT.items():
        kept = select(policy, observation, cache, 64, tables=None)
        for layer, expected in by_layer.items():
            assert all(row.tolist()[-32:] == list(range(268, 300)) for row in kept[layer])
            assert list(dict.fromkeys(runs(row.tolist()) for row in kept[layer])) == expected


def test_the_committed_tables_fit_the_model(smollm):
    """Guards against tables that were compiled for other weights or an older layout."""
    if not DEFAULT_TABLES.exists():
        pytest.skip("no tables yet: run `python train_tables.py`")
    assert set(Tables.load(DEFAULT_TABLES, smollm).compiled) == set(SETTINGS)
