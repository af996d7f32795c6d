"""Tests against the references: kept positions and logits that kvpress and transformers gave for the same weights file.

golden_rivals.json was written once, in float32, with the versions it names. Its rows: [prompt, budget, policy, kept positions
of each of "layers" as runs, KV heads apart]. kvpress pools SnapKV's attention by the mean, and so do we for this comparison.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import compilerkv as ckv
from helpers import needs_weights, positions
from model import load

torch.set_num_threads(1)
pytestmark = needs_weights
GOLDEN = json.loads((Path(__file__).parent / "golden_rivals.json").read_text())
G = 3
MEAN = {"pooled": F.avg_pool1d}
OURS = {  # each policy as its reference in kvpress has it: (observation, cache, budget) -> L x (G, S)
    "streaming": lambda o, c, b: ckv.select_streaming(o, c, b, None),
    "snapkv": lambda o, c, b: list(ckv.top(ckv.snapkv_score(o, G, **MEAN), b)),
    "tova": lambda o, c, b: ckv.select_tova(o, c, b, None),
    "knorm": lambda o, c, b: ckv.select_knorm(o, c, b, None),
    "adakv": lambda o, c, b: ckv.select_adakv(o, c, b, None, **MEAN),
    # ObservedAttention: H2O's sums over the number of queries that see the key, without H2O's recent half
    "h2o score": lambda o, c, b: list(ckv.top(ckv.by_kv_head(o.total, G) / torch.arange(o.n_tokens, 0, -1), b)),
}


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M-Instruct in float32."""
    return load(dtype="float32")


@pytest.fixture(scope="module")
def prefilled(smollm):
    """prompt number -> (observation, cache), each prefilled once."""
    @functools.cache
    def run(i):
        _, cache, observation = smollm.prefill(GOLDEN["prompts"][i], ckv.MAX_WINDOW, total=True)
        return observation, cache
    return run


@pytest.mark.parametrize("policy", OURS)
def test_rivals_keep_what_their_reference_keeps(prefilled, policy):
    """Guards against rivals that are weaker than the methods they are named after, in any head of any layer."""
    rows = [row for row in GOLDEN["kept"] if row[2] == policy]
    assert len(rows) == 15
    for i, budget, _, by_layer in rows:
        observation, cache = prefilled(i)
        kept = OURS[policy](observation, cache, budget)
        for layer, text in zip(GOLDEN["layers"], by_layer):
            wanted, ours = [positions(head) for head in text.split(" | ")], [[t for t in row if t >= 0] for row in kept[layer].tolist()]
            if policy == "knorm":  # of keys of one length any may stay: in layer 0 those of one token, elsewhere some that differ by rounding
                lengths = cache.k[layer][0].norm(dim=-1)  # (G, T)
                for row, w, o in zip(lengths, wanted, ours):
                    shorter = row < row[o].max() * (1 - 1e-6)
                    assert [t for t in o if shorter[t]] == [t for t in w if shorter[t]], (i, budget, layer)
                    assert torch.allclose(row[o].sort().values, row[w].sort().values, rtol=1e-6), (i, budget, layer)
            else:
                assert ours == wanted, (i, budget, layer)


def test_the_pyramid_has_the_references_sizes():
    """Guards against another slope; the reference rounds every size, ours the running sum, so that the total is exact."""
    for n_tokens, budget, sizes in GOLDEN["pyramid_sizes_beside_the_window"]:
        ours = ckv.pyramid_budgets(budget, len(sizes), 0, n_tokens)
        assert sum(ours) == len(sizes) * budget and np.abs(np.subtract(ours, sizes)).max() <= 1


@pytest.mark.parametrize("case", range(3))
def test_logits_are_those_of_the_reference(smollm, case):
    """Guards against a RoPE, norm or mask that drifts with the length of the prompt: 16, 500 and 3,000 tokens."""
    n, ids, wanted = GOLDEN["logits"][case]
    logits, _, _ = smollm.prefill(GOLDEN["long_prompt"][:n], 8)
    assert (logits[ids] - torch.tensor(wanted)).abs().max() < 1e-3
