"""Tests of compilerkv.py: the equations, the gate, every policy's kept set, and the file of compiled tables.

No model is run: observations and caches are random tensors of the right shape. Letters in shapes as in compilerkv.py.
"""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from compilerkv import (MAX_WINDOW, MIN_BUDGET, N_ENTROPY_BINS, N_PPL_BINS, OURS, PAPER, POLICIES, SETTINGS, SINKS, WINDOW,
                        Compiled, Settings, Tables, attention_level, by_kv_head, evict, gate, head_score,
                        positions_of, protect, pyramid_budgets, risk, risk_bin, select, spread, utility, value_norm,
                        write_atomically)
from helpers import assert_one_line
from model import KVCache, Observation, UserError

torch.set_num_threads(1)  # on tensors this small, threads would only wait for each other

L, H, G, D = 3, 4, 2, 8
HEADWISE = ("h2o", "snapkv", "pyramidkv", "dynamickv", "adakv", "knorm", "razor", "random", "compilerkv",
            "hindsight")  # policies whose KV heads choose for themselves

properties = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
budgets = st.integers(MIN_BUDGET, 150)
lengths = st.integers(1, 200)


# ----------------------------------------------------------------------------------------------------------- helpers

def random_prompt(seed, L=L, H=H, G=G, T=100, w=64, ties=False):
    """What prefill would hand over for T random tokens: (observation with total and answer, cache).

    ties: every query attends evenly to all tokens and every value is the same, so that all scores tie.
    """
    g = torch.Generator().manual_seed(seed)
    w = min(w, T)
    scores = torch.randn(L, H, w, T, generator=g) * 2
    future = torch.ones(w, T).triu(T - w + 1).bool()  # query j of the window stands at position T - w + j
    attention = scores.masked_fill(future, -torch.inf).softmax(-1)
    values = torch.randn(L, 1, G, T, D, generator=g)
    total, answer = torch.rand(L, H, T, generator=g), torch.rand(L, H, T, generator=g)
    if ties:
        attention, values = torch.full_like(attention, 1 / T), torch.ones_like(values)
        total, answer = torch.ones_like(total), torch.ones_like(answer)
    logprobs = -3 * torch.rand(w - (w == T), generator=g)
    slots = torch.arange(T).expand(1, G, T).clone()
    cache = KVCache(torch.randn(L, 1, G, T, D, generator=g), values, [slots] * L, torch.tensor([T]))
    return Observation(list(attention), logprobs, total, answer), cache


def constant_tables(W=1.0, tau=0.0, sizes=(64, 256)):
    """Tables that say the same for every head and every risk."""
    n = len(sizes)
    compiled = {name: Compiled(np.array([s.rules[0]] * n, dtype=float), np.full((n, L, H), W), np.full((n, L, N_ENTROPY_BINS, N_PPL_BINS), tau),
                               np.linspace(1, 5, N_ENTROPY_BINS - 1), np.array([2.0, 4.0, 8.0]))
                for name, s in SETTINGS.items()}
    return Tables(np.array(sizes), "f" * 64, compiled, np.arange(L * H, dtype=float).reshape(L, H), {"seed": 0})


MODEL = SimpleNamespace(fingerprint="f" * 64, config=SimpleNamespace(n_layer=L, n_head=H))


def same(kept, others):
    """True when two policies kept the same positions."""
    return len(kept) == len(others) and all(torch.equal(a, b) for a, b in zip(kept, others))


def as_sets(kept):
    """Kept positions as one set for each layer and KV head, in order."""
    return [set(row[row >= 0].tolist()) for positions in kept for row in positions]


# ---------------------------------------------------------------------------------------------- stage 1: the utility

def test_the_worked_example_of_the_method():
    """Guards against any change to Eqs. 4-6 that looks harmless: the numbers were worked out by hand."""
    attention = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).expand(1, 2, 2, 3)  # (L, H, w, T)
    values = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]).view(1, 1, 2, 3, 1)  # (L, B, G, T, D)
    slots = torch.arange(3).expand(1, 2, 3)
    observation, cache = Observation(list(attention), torch.zeros(2)), KVCache(values, values, [slots], torch.tensor([3]))
    alpha, rho = attention_level(observation, window=2, scope="model"), value_norm(cache)
    assert alpha.flatten().tolist() == [0.75, 1.5, 0.75]
    assert rho.tolist() == [[[1.0, 1.0, 1.0], [0.5, 1.0, 1.5]]]
    u = utility(observation, cache, Settings("model", "mean", True, (), 1, (), (), 1.0, False), window=2)
    assert torch.equal(u, alpha * rho)
    W = torch.tensor([[1.0, 1.5]])
    assert head_score(u, W).tolist() == [[[0.75, 2.25, 1.6875]]]
    assert head_score(u, W, n_sets=2).tolist() == [[[0.75, 1.5, 0.75], [0.5625, 2.25, 1.6875]]]


@pytest.mark.parametrize("scope, shape", [("model", (1, 1)), ("layer", (L, 1)), ("head", (L, H))])
@properties
@given(T=lengths, seed=seeds)
def test_alpha_has_mean_one_in_every_scope(scope, shape, T, seed):
    """Guards against a threshold that means something else for long prompts, wide windows or many heads."""
    alpha = attention_level(random_prompt(seed, T=T)[0], window=32, scope=scope)
    assert alpha.shape == (*shape, T)
    assert torch.allclose(alpha.mean(-1), torch.ones(shape), atol=1e-5)


def test_alpha_looks_at_the_last_queries_only():
    """Guards against a window taken from the wrong end of the queries that prefill observed."""
    observation, _ = random_prompt(seed=1, T=100, w=64)
    shorter = Observation([A[:, 32:] for A in observation.attention], observation.logprobs[32:])
    assert torch.equal(attention_level(observation, 32, "head"), attention_level(shorter, 64, "head"))
    with pytest.raises(KeyError):
        attention_level(observation, 32, "heads")
    assert torch.equal(attention_level(observation, 32, "head", "max"), 100 * torch.stack(observation.attention)[:, :, 32:].amax(2))


def test_protected_tokens_lend_nothing_to_their_neighbours():
    """Guards against a dozen places behind the first token that its own sink would win for them."""
    u = torch.rand(L, H, 60, generator=torch.Generator().manual_seed(5))
    u[..., :SINKS] = u[..., -16:] = 100
    spread_u = spread(u, 16, 7)
    assert spread_u[..., SINKS:-16].max() < 1 and torch.equal(spread(u, 16, 1), u) and (u[..., 0] == 100).all()
    for t in range(10, 40):
        assert torch.equal(spread_u[..., t], u[..., t - 3:t + 4].amax(-1))


@properties
@given(T=lengths, seed=seeds)
def test_rho_has_mean_one(T, seed):
    """Guards against a value factor whose scale depends on the layer or on the prompt."""
    rho = value_norm(random_prompt(seed, T=T)[1])
    assert rho.shape == (L, G, T)
    assert torch.allclose(rho.mean(-1), torch.ones(L, G), atol=1e-5)


@properties
@given(factor=st.floats(1e-3, 1e3), layer=st.integers(0, L - 1), head=st.integers(0, G - 1), seed=seeds)
def test_the_scale_of_a_heads_values_does_not_matter(factor, layer, head, seed):
    """Guards against heads that win only because their value vectors are long."""
    observation, cache = random_prompt(seed)
    scaled = copy.deepcopy(cache)
    scaled.v[layer][0, head] *= factor
    for policy in POLICIES:
        assert same(*(select(policy, observation, c, 50, constant_tables()) for c in (cache, scaled)))


def test_a_query_head_reads_the_values_of_its_own_kv_head():
    """Guards against heads that are grouped as g, g + G, ... where the model groups neighbours."""
    observation, cache = random_prompt(seed=3)
    changed = copy.deepcopy(cache)
    changed.v[0][0, 1, 10] *= 5.0
    difference = (utility(observation, changed, OURS, 32) - utility(observation, cache, OURS, 32)).abs().sum(-1)  # (L, H)
    assert (difference > 0).tolist() == [[False, False, True, True], [False] * 4, [False] * 4]
    x = torch.rand(L, H, 20)
    assert torch.equal(by_kv_head(x, G), torch.stack([(x[:, 0] + x[:, 1]) / 2, (x[:, 2] + x[:, 3]) / 2], 1))


# ----------------------------------------------------------------------------------------- stage 2: the weighted heads

def test_one_heads_weight_can_change_the_order_of_tokens():
    """Guards against averaging over heads before W_head, which would make the table one constant a layer: a no-op."""
    u = torch.tensor([[[3.0, 1.0], [1.0, 2.0]]])  # (L, H, T)
    for W in (torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 1.5]]), torch.tensor([[1.5, 0.1]])):
        averaged = (W[:, :, None] * u.mean(1, keepdim=True)).amax(1)
        assert averaged.argsort(descending=True).tolist() == [[0, 1]]  # whatever W is
    assert head_score(u, torch.tensor([[1.0, 1.0]])).tolist() == [[[3.0, 2.0]]]
    assert head_score(u, torch.tensor([[0.5, 1.5]])).tolist() == [[[1.5, 3.0]]]


@pytest.mark.parametrize("name", SETTINGS)
def test_W_head_changes_the_kept_set(name):
    """Guards against a learned table that is looked up and then has no effect."""
    observation, cache = random_prompt(seed=4, T=150)
    tables = constant_tables()
    tables.compiled[name].W_head[:, :, 0] = np.exp(3)
    plain, weighted = select(name, observation, cache, 80), select(name, observation, cache, 80, tables)
    assert not same(plain, weighted)
    for sizes in ([int((p >= 0).sum()) for p in kept] for kept in (plain, weighted)):
        assert sum(sizes) == L * G * 80 and max(sizes) <= SETTINGS[name].cap * G * 80


# ---------------------------------------------------------------------------------------------- stage 3: the risk gate

@properties
@given(T=lengths, seed=seeds, window=st.integers(1, 64))
def test_risk_stays_in_its_range(T, seed, window):
    """Guards against a negative entropy, one above log T, and a perplexity below 1."""
    entropy, perplexity = risk(random_prompt(seed, T=T)[0], window)
    assert 0 <= entropy <= np.log(T)
    assert 1 <= perplexity <= np.exp(3) + 1e-3


@pytest.mark.parametrize("T", [1, 2, 77])
def test_risk_of_even_and_of_pointed_attention(T):
    """Guards against entropy in bits, of raw or pooled attention, or the wrong way round."""
    even = torch.full((L, H, 5, T), 1 / T)
    pointed = torch.zeros(L, H, 5, T)
    pointed[..., T // 2] = 1
    assert risk(Observation(list(even), torch.zeros(5)), 5)[0] == pytest.approx(np.log(T), abs=1e-5)
    assert risk(Observation(list(pointed), torch.zeros(5)), 5)[0] == pytest.approx(0, abs=1e-6)


def test_perplexity_is_that_of_the_windows_tokens():
    """Guards against a perplexity over other tokens, of the sum instead of the mean, or of nothing at all."""
    attention = torch.full((L, H, 4, 10), 0.1)
    logprobs = torch.log(torch.tensor([0.9, 0.9, 0.5, 0.125]))
    assert risk(Observation(list(attention), logprobs), 2)[1] == pytest.approx(4)
    assert risk(Observation(list(attention), torch.zeros(4)), 4)[1] == 1
    assert risk(Observation([torch.ones(H, 1, 1)] * L, torch.zeros(0)), 4) == (0, 1)  # a prompt of one token


def test_nan_in_the_model_is_not_a_risk_bin():
    """Guards against a broken model that is compressed as if its prompts were risky, or safe."""
    for part in (lambda seen: seen.attention[0], lambda seen: seen.logprobs):
        observation, cache = random_prompt(seed=5)
        part(observation)[..., -1] = torch.nan
        with pytest.raises(ValueError):
            risk(observation, 32)
        with pytest.raises(ValueError):
            select("compilerkv", observation, cache, 50, constant_tables())
    with pytest.raises(ValueError):
        risk_bin(float("nan"), np.array([1.0, 2.0]))


def test_nan_in_the_model_is_noticed_without_tables_too():
    """Guards against NaN scores, which sort above the protected tokens and push the sinks out."""
    observation, cache = random_prompt(seed=5)
    observation.attention[0][..., 20:90] = torch.nan
    with pytest.raises(ValueError):
        select("compilerkv", observation, cache, 50)


@properties
@given(values=st.tuples(st.floats(-10, 10), st.floats(-10, 10)), edges=st.lists(st.floats(-5, 5), max_size=19))
def test_risk_bins_rise_with_the_value(values, edges):
    """Guards against bins in the wrong order, and against a bin past the end of the table."""
    low, high = (risk_bin(value, np.sort(edges)) for value in sorted(values))
    assert 0 <= low <= high <= len(edges)
    assert risk_bin(-11, np.sort(edges)) == 0 and risk_bin(11, np.sort(edges)) == len(edges)


@properties
@given(T=st.integers(40, 200), small=budgets, more=st.integers(0, 100), tau=st.floats(0, 6), seed=seeds)
def test_a_larger_budget_keeps_a_superset(T, small, more, tau, seed):
    """Guards against a choice among ties, or a protected set, that a larger budget would reverse."""
    observation, cache = random_prompt(seed, T=T)
    tables = constant_tables(tau=tau)
    for name in SETTINGS:
        few, many = (select(name, observation, cache, budget, tables) for budget in (small, small + more))
        assert all(a <= b for a, b in zip(as_sets(few), as_sets(many)))
    s = torch.rand(L, 2, T, generator=torch.Generator().manual_seed(seed)).mul(9).round()  # many ties
    for cap in (1, 2, L):
        few, many = (gate(s, torch.full((L,), tau), budget, cap) for budget in (small, small + more))
        assert all(a <= b for a, b in zip(as_sets(few), as_sets(many)))


@properties
@given(T=st.integers(40, 200), budget=budgets, low=st.floats(0, 3), rise=st.floats(0, 3), seed=seeds)
def test_a_larger_tau_keeps_a_subset(T, budget, low, rise, seed):
    """Guards against a threshold with the wrong sign, or one that the clamp to the budget undoes."""
    observation, cache = random_prompt(seed, T=T)
    for name in SETTINGS:
        many, few = (select(name, observation, cache, budget, constant_tables(tau=tau)) for tau in (low, low + rise))
        assert all(a <= b for a, b in zip(as_sets(few), as_sets(many)))
    s = torch.rand(L, 2, T, generator=torch.Generator().manual_seed(seed)).mul(9).round()
    for cap in (1, 2, L):
        many, few = (gate(s, torch.full((L,), tau), budget, cap) for tau in (low, low + rise))
        assert all(a <= b for a, b in zip(as_sets(few), as_sets(many)))


@properties
@given(T=lengths, more=st.integers(0, 50), seed=seeds)
def test_a_budget_for_all_tokens_keeps_all_tokens(T, more, seed):
    """Guards against loss where nothing had to be dropped."""
    observation, cache = random_prompt(seed, T=T)
    for policy in POLICIES:
        for tables in (None, constant_tables())[policy == "razor":]:
            kept = select(policy, observation, cache, max(T, MIN_BUDGET) + more, tables)
            assert all(set(range(T)) == row for row in as_sets(kept))


@pytest.mark.parametrize("name", SETTINGS)
def test_candidates_are_never_padded_up_to_the_budget(name):
    """Guards against padding, which keeps the plain top-B whatever the gate says: a no-op."""
    observation, cache = random_prompt(seed=6, T=100)
    window = min(SETTINGS[name].rules[0][0], 80 - SINKS)
    protected = {*range(SINKS), *range(100 - window, 100)}
    for row in as_sets(select(name, observation, cache, 80, constant_tables(tau=1e9))):
        assert row == protected and len(row) < 80


@pytest.mark.parametrize("name", SETTINGS)
def test_only_the_prompts_own_cell_of_T_gate_changes_the_kept_set(name):
    """Guards against a gate that has no effect, and against the cell of another risk, layer or budget."""
    observation, cache = random_prompt(seed=7, T=150)
    window = SETTINGS[name].rules[0][0]
    plain = select(name, observation, cache, 100, constant_tables())
    tables = constant_tables()
    entropy, perplexity = risk(observation, SETTINGS[name].window)
    e = sum(entropy >= edge for edge in tables.compiled[name].entropy_edges)
    p = sum(perplexity >= edge for edge in tables.compiled[name].ppl_edges)
    tables.compiled[name].T_gate[0, 1, e, p] = 1e9  # budget 64 is nearer to 100 than 256
    kept = select(name, observation, cache, 100, tables)
    sizes = [int((positions >= 0).sum()) for positions in kept]
    assert sizes[1] == (SINKS + window) * G
    if SETTINGS[name].cap == 1:
        assert sizes[::2] == [100 * G] * 2 and same(kept[::2], plain[::2])
    else:  # what layer 1 gives up is shared out among the others, but for the half budget that was safe from them
        assert sum(sizes[::2]) == (300 - 100 // 2) * G > sum(int((p >= 0).sum()) for p in plain[::2]) + 40 * G
        assert all(a >= b for a, b in zip(as_sets(kept[::2]), as_sets(plain[::2])))
    others = constant_tables(tau=1e9)
    others.compiled[name].T_gate[0, :, e, p] = 0
    assert same(select(name, observation, cache, 100, others), plain)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_reading_needs_no_query_before_its_own_window(name):
    """Guards against a risk read from more queries than the rules need, which every prefill would have to observe."""
    observation, cache = random_prompt(seed=8, T=150)
    tables, w = constant_tables(), SETTINGS[name].window
    tables.compiled[name].entropy_edges[:] = np.mean([risk(observation, n)[0] for n in (w, MAX_WINDOW)])  # tells the two apart
    tables.compiled[name].T_gate[:, :, N_ENTROPY_BINS // 2:] = 1e9
    narrow = Observation([A[:, -w:] for A in observation.attention], observation.logprobs[-w:])
    assert same(select(name, observation, cache, 100, tables), select(name, narrow, cache, 100, tables))


@properties
@given(T=lengths, budget=budgets, seed=seeds)
def test_neutral_tables_equal_no_tables(T, budget, seed):
    """Guards against a default that is not the neutral element: W = 1 and tau = 0."""
    observation, cache = random_prompt(seed, T=T)
    for name in SETTINGS:
        plain, neutral = (select(name, observation, cache, budget, tables) for tables in (None, constant_tables()))
        assert same(plain, neutral)


def test_a_score_equal_to_tau_is_a_candidate_and_ties_go_to_the_earlier_token():
    """Guards against > in place of >= in Eq. 8, and against a choice among ties that changes from run to run."""
    s = torch.tensor([[[1.0, 2.0, 2.0, 0.5, 2.0]]])
    assert gate(s, torch.tensor([1.0]), 9)[0].tolist() == [[0, 1, 2, 4]]
    assert gate(s, torch.tensor([1.0]), 2)[0].tolist() == [[1, 2]]
    assert gate(s, torch.tensor([2.0]), 9)[0].tolist() == [[1, 2, 4]]


def test_kv_heads_compete_for_the_entries_of_their_layer():
    """Guards against heads that split the budget evenly, a layer that exceeds its bytes, and padding in the wrong place."""
    s = torch.tensor([[[9.0, 1.0, 8.0, 7.0], [6.0, 2.0, 3.0, 0.0]], [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]])
    for tau in (torch.zeros(2), None):
        first, second = gate(s, tau, budget=2)  # 2 tokens a KV head: 4 entries a layer
        assert first.tolist() == [[0, 2, 3], [0, -1, -1]]
        assert second.tolist() == [[-1] * 4, [0, 1, 2, 3]]
    chosen = torch.tensor([[[False, True, True], [True, False, False]], [[False, False, True], [False, False, False]]])
    assert [layer.tolist() for layer in positions_of(chosen)] == [[[1, 2], [0, -1]], [[2], [-1]]]


def test_layers_compete_in_multiples_of_their_thresholds():
    """Guards against a layer that ignores its threshold, exceeds its cap, loses its safe half or makes all exceed their bytes."""
    s = torch.tensor([[[9.0, 1.0, 8.0, 7.0]], [[6.0, 2.0, 3.0, 0.0]]])
    kept = lambda tau, budget, cap: [layer.tolist()[0] for layer in gate(s, tau and torch.tensor(tau), budget, cap)]
    assert kept([0.0, 0.0], 2, 2) == kept([1.0, 1.0], 2, 2) == [[0, 2, 3], [0]]  # 4 entries, 4 at most in a layer
    assert kept([4.1, 1.0], 2, 2) == [[0], [0, 1, 2]]  # 2.20, 1.95 and 1.71 thresholds against 6, 3 and 2
    assert kept([4.1, 4.1], 2, 2) == [[0, 2, 3], [0]] and kept([8.5, 4.1], 2, 2) == [[0], [0]]  # fewer stay fewer
    assert kept([0.0, 0.0], 1, 2) == kept([0.0, 0.0], 1, 1) == kept(None, 1, 2) == [[0], [0]]  # half of 1 is 1
    assert kept([0.1, 6.0], 3, 2) == [[0, 1, 2, 3], [0]] and kept([0.1, 7.0], 3, 2) == [[0, 1, 2, 3], []]  # safe from the other, not from tau
    assert kept([3.0, 0.1], 2, 2) == [[0], [0, 1, 2]] and kept([1.0, 1.0], 2, 4) == [[0, 2, 3], [0]]


@properties
@given(budget=st.integers(1, 12), cap=st.integers(1, 4), tau=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=3, max_size=3), seed=seeds)
def test_the_gate_takes_the_best_until_a_layer_or_all_are_full(budget, cap, tau, seed):
    """Guards against anything that differs from the plain loop: a rank, a tie, a clamp, a threshold of another layer."""
    s = torch.randint(0, 12, (3, 2, 10), generator=torch.Generator().manual_seed(seed)).float()
    left, most, expected, entries = 3 * 2 * budget, [cap * 2 * budget] * 3, [set() for _ in range(6)], []
    for l in range(3):
        best_first = sorted((-s[l, g, t].item(), l, g, t) for g in range(2) for t in range(10))
        safe = budget if cap > 1 else 0  # half of the budgets of two sets
        entries += [(-math.inf, *entry) for entry in best_first[:safe]] + [(entry[0] / tau[l], *entry) for entry in best_first[safe:]]
    for _, score, l, g, t in sorted(entries, key=lambda entry: (entry[0], *entry[2:])):
        if left and most[l]:
            left, most[l] = left - 1, most[l] - 1
            if -score >= tau[l]:
                expected[2 * l + g].add(t)
    assert as_sets(gate(s, torch.tensor(tau), budget, cap)) == expected


def test_ragged_sets_are_stored_without_the_padding_that_they_count():
    """Guards against bytes that grow with padding, and against padded slots that a query could see."""
    observation, cache = random_prompt(seed=13, T=150)
    kept = select("compilerkv", observation, cache, 60)
    small = evict(cache, kept)
    assert len({int((row >= 0).sum()) for positions in kept for row in positions}) > 1  # ragged indeed
    assert small.nbytes == L * G * 60 * D * 2 * 4
    for l, positions in enumerate(kept):
        keys, values, slots = small.layer(l)
        assert torch.equal(slots[0], positions)
        for g in range(G):
            at = positions[g][positions[g] >= 0]
            n = len(at)
            assert torch.equal(keys[0, g, :n], cache.layer(l)[0][0, g, at])
            assert torch.equal(values[0, g, :n], cache.layer(l)[1][0, g, at])


@properties
@given(T=lengths, budget=budgets, window=st.sampled_from([32, 64]))
def test_protected_tokens_fit_into_the_budget(T, budget, window):
    """Guards against protected tokens that crowd the sinks out, and against scores changed in place."""
    s = torch.zeros(L, T)
    protected = protect(s, budget, window).isinf()
    assert not s.any() and protected.sum(-1).max() <= budget
    assert protected[:, :SINKS].all() and protected[:, -min(window, budget - SINKS):].all()


# ------------------------------------------------------------------------------------------------------- every policy

@pytest.mark.parametrize("policy", POLICIES)
@properties
@given(T=lengths, budget=budgets, seed=seeds, ties=st.booleans())
def test_kept_sets_are_well_formed(policy, T, budget, seed, ties):
    """Guards against positions that are unsorted, doubled or out of range, and budgets that are not respected."""
    observation, cache = random_prompt(seed, T=T, ties=ties)
    kept = select(policy, observation, cache, budget, constant_tables())
    assert len(kept) == L
    for positions in kept:
        assert positions.shape[0] == G and positions.shape[1] > 0 and positions.dtype == torch.int64
        for row in positions:
            n = (row >= 0).sum()
            assert n and row.max() < T and (row[:n].diff() > 0).all() and (row[n:] == -1).all()
        assert (positions >= 0).any(0).all()  # no more padding than the longest row needs
    sizes = [int((positions >= 0).sum()) / G for positions in kept]
    if policy == "full":
        assert sizes == [T] * L
    elif policy in ("pyramidkv", "dynamickv", "razor"):  # same total, spread over layers; less than one token a layer is lost
        assert L * (min(budget, T) - 1) < sum(sizes) <= L * min(budget, T)
        assert policy != "pyramidkv" or sizes == [min(n, T) for n in pyramid_budgets(budget, L, WINDOW, T)]
    elif policy == "compilerkv":  # the same total to the entry
        assert sum(sizes) == L * min(budget, T) and max(sizes) <= OURS.cap * budget
    else:
        assert sizes == [min(budget, T)] * L
    for row in as_sets(kept):
        if policy in ("random", "streaming", "lacache", "razor", "compilerkv", "compilerkv-paper", "full"):
            assert set(range(min(SINKS, T))) <= row
        if policy in ("random", "streaming", "snapkv", "pyramidkv", "dynamickv", "adakv", "razor", "compilerkv-paper", "full"):
            assert set(range(max(T - WINDOW, 0), T)) <= row
        if policy == "compilerkv":
            assert set(range(max(T - OURS.rules[0][0], 0), T)) <= row
        if policy in ("h2o", "lacache"):
            assert set(range(max(T - budget // 2, 0), T)) <= row


@pytest.mark.parametrize("policy", POLICIES)
def test_selectors_are_deterministic_and_only_look(policy):
    """Guards against scores written into the observation, which would change what the next policy sees."""
    observation, cache = random_prompt(seed=8)
    seen, cached, tables = copy.deepcopy(observation), copy.deepcopy(cache), constant_tables(W=1.3, tau=0.9)
    first, second = (select(policy, observation, cache, 60, tables) for _ in range(2))
    assert same(first, second)
    tensors = lambda o: {key: torch.stack(value) if isinstance(value, list) else value for key, value in vars(o).items()}
    assert all(torch.equal(value, tensors(seen)[key]) for key, value in tensors(observation).items())
    assert all(torch.equal(a, b) for l in range(L) for a, b in zip(cache.layer(l), cached.layer(l)))
    assert cache.length == cached.length and torch.equal(cache.next_position, cached.next_position)


def test_rivals_keep_what_their_papers_say():
    """Guards against a straw man: rivals that are weaker than the methods they are named after."""
    T, budget = 120, 50
    observation, cache = random_prompt(seed=9, T=T)
    for row in as_sets(select("streaming", observation, cache, budget)):
        assert row == {*range(SINKS), *range(T - budget + SINKS, T)}
    for policy, score, recent in (
            ("h2o", by_kv_head(observation.total, G), budget // 2),
            ("snapkv", by_kv_head(F.pad(F.max_pool1d(attention_level(observation, WINDOW, "head")[..., :-WINDOW], 7, 1, 3), (0, WINDOW)), G),
             WINDOW),
            ("tova", attention_level(observation, 1, "head").mean(1, keepdim=True).repeat(1, G, 1), 1),
            ("knorm", -torch.stack([k[0].norm(dim=-1) for k in cache.k]), 0),
            ("hindsight", by_kv_head(observation.answer, G) * value_norm(cache), 0)):
        score[..., T - recent:] = torch.inf
        kept = torch.stack(select(policy, observation, cache, budget))  # (L, G, budget)
        dropped = score.scatter(2, kept, -torch.inf)
        assert (score.gather(2, kept).amin(-1) >= dropped.amax(-1)).all() and kept.shape == (L, G, budget)


def test_kv_heads_choose_for_themselves_where_the_rival_says_so():
    """Guards against rivals that share one set a layer, and against a literal reading of the paper that does not."""
    observation, cache = random_prompt(seed=10, T=150)
    for policy in POLICIES:
        shared = all(torch.equal(*positions) for positions in select(policy, observation, cache, 60, constant_tables()))
        assert shared == (policy not in HEADWISE)


def test_a_pyramid_never_gives_a_layer_more_than_there_is():
    """Guards against entries that are lost where the widest layer would hold more tokens than the prompt has."""
    sizes = pyramid_budgets(500, 30, WINDOW, 600)
    assert max(sizes) in (599, 600, 601) and sum(sizes) == 30 * 500


@pytest.mark.parametrize("T, budget", [(150, 80), (450, 200)])  # a fifth is less than the window, and more
def test_kv_heads_of_adakv_compete_and_have_a_fifth_to_themselves(T, budget):
    """Guards against AdaKV that is SnapKV under another name, and against a head that is left with nothing."""
    observation, cache = random_prompt(seed=13, T=T)
    attention = torch.stack(observation.attention)
    attention[:, :H // G] *= 1e-3  # the first KV head's queries look at no token before the window with any weight
    kept = as_sets(select("adakv", Observation(list(attention), observation.logprobs), cache, budget))
    for first, second in zip(kept[::2], kept[1::2]):
        assert len(first) == max(budget // 5, WINDOW) and len(first) + len(second) == G * budget


def test_the_layers_of_dynamickv_get_what_their_scores_win():
    """Guards against layer sizes that do not follow the attention."""
    observation, cache = random_prompt(seed=14, T=150)
    attention = torch.stack(observation.attention)
    attention[0] *= 1e-3
    sizes = [k.shape[1] for k in select("dynamickv", Observation(list(attention), observation.logprobs), cache, 60)]
    assert sizes[0] == WINDOW and min(sizes[1:]) > 60 and sum(sizes) <= L * 60


def test_the_ladder_of_lacache_climbs():
    """Guards against a ladder whose layers all keep the same span, or that leaves out an end of the middle."""
    T, budget = 200, 50
    observation, cache = random_prompt(seed=15, T=T)
    spans = [sorted(row - {*range(SINKS), *range(T - budget // 2, T)}) for row in as_sets(select("lacache", observation, cache, budget))]
    assert all(span == list(range(span[0], span[0] + 21)) for span in spans)
    assert [span[0] for span in spans[::G]] == [4, 79, 154] and spans[-1][-1] == T - budget // 2 - 1


def test_the_heads_that_look_back_keep_all_of_it_in_razor():
    """Guards against the wrong heads, or against more entries than the others have."""
    T, budget = 150, 60
    observation, cache = random_prompt(seed=16, T=T)
    tables = constant_tables()
    tables.retrieval[:] = 0
    tables.retrieval[1, H - 1] = 1.0  # a query head of the last KV head of layer 1
    kept = as_sets(select("razor", observation, cache, budget, tables))
    n_all = L * G * (budget - MIN_BUDGET) // (T - MIN_BUDGET)
    whole = [i for i, row in enumerate(kept) if len(row) == T]
    assert n_all == len(whole) == 1 and whole == [1 * G + G - 1]
    rest = [row for row in kept if len(row) < T]
    assert all(row == {*range(SINKS), *range(T - len(row) + SINKS, T)} for row in rest) and len({len(row) for row in rest}) == 1


def test_policies_refuse_an_observation_without_what_they_need():
    """Guards against H2O or the oracle running silently on the window's attention instead."""
    observation, cache = random_prompt(seed=11)
    poor = Observation(observation.attention, observation.logprobs)
    for policy in ("h2o", "hindsight", "razor"):
        with pytest.raises(ValueError):
            select(policy, poor, cache, 50)


@properties
@given(n_layer=st.integers(2, 40), budget=st.integers(MIN_BUDGET, 2000))
def test_pyramid_budgets_fall_and_keep_the_total(n_layer, budget):
    """Guards against a pyramid that is upside down, flat, or larger than the rivals' caches."""
    sizes = pyramid_budgets(budget, n_layer, WINDOW, 8192)
    assert len(sizes) == n_layer and sum(sizes) == n_layer * budget
    assert min(sizes) >= WINDOW and sizes[0] > sizes[-1]
    slope = 1.9 * (budget - WINDOW) / (n_layer - 1)  # tokens by which a layer's share is less than the one before
    assert max(np.diff(sizes)) <= (0 if slope >= 2 else 1)  # on a gentler slope, rounding may lift a layer by one


def test_a_pyramid_of_one_layer_has_the_budget():
    """Guards against a single layer that is given nearly twice its budget."""
    assert pyramid_budgets(100, 1, WINDOW, 8192) == [100]


@pytest.mark.parametrize("policy, budget, word", [
    ("magic", 64, "magic"), ("", 64, "compilerkv"), ("compilerkv", 0, MIN_BUDGET), ("full", -5, MIN_BUDGET),
    ("snapkv", MIN_BUDGET - 1, MIN_BUDGET),
])
def test_unknown_policies_and_impossible_budgets_are_refused_in_one_line(policy, budget, word):
    """Guards against a stack trace, or an empty cache, for a mistyped option."""
    with pytest.raises(UserError) as error:
        select(policy, *random_prompt(seed=12), budget)
    assert_one_line(error, word)


# --------------------------------------------------------------------------------------------------------- the tables

def test_tables_survive_a_round_trip(tmp_path):
    """Guards against arrays that change their type, order or name on the way through the file."""
    path, tables = tmp_path / "deep" / "tables.npz", constant_tables(W=1.1, tau=0.85)
    tables.compiled["compilerkv"].W_head[:] = np.random.default_rng(0).random((2, L, H))
    tables.save(path)
    loaded = Tables.load(path, MODEL)
    assert loaded.budgets.tolist() == [64, 256] and loaded.fingerprint == MODEL.fingerprint
    assert loaded.provenance == {"seed": 0} and loaded.compiled.keys() == SETTINGS.keys()
    for name, compiled in tables.compiled.items():
        assert all(np.array_equal(array, vars(loaded.compiled[name])[key]) for key, array in vars(compiled).items())
    assert [file.name for file in path.parent.iterdir()] == ["tables.npz"]


def test_look_up_takes_the_nearest_budget_in_ratio():
    """Guards against the nearest in difference: 144 is 80 from 64 and 112 from 256, but 2.25 times against 1.78."""
    tables = constant_tables()
    tables.compiled["compilerkv"].W_head[1] = 2
    tables.compiled["compilerkv"].T_gate[1] = 3
    tables.compiled["compilerkv"].rules[1] = OURS.rules[3]
    for budget, near in ((36, 0), (64, 0), (100, 0), (127, 0), (129, 1), (144, 1), (256, 1), (9999, 1)):
        rule, W, tau = tables.look_up("compilerkv", budget, 1.0, 1.0)
        assert W.shape == (L, H) and tau.shape == (L,) and W.dtype == tau.dtype == torch.float32
        assert (W == 1 + near).all() and (tau == 3 * near).all() and rule == OURS.rules[3 * near]


def test_look_up_takes_the_row_and_column_of_the_risk():
    """Guards against entropy and perplexity bins that trade places."""
    tables = constant_tables()
    c = tables.compiled["compilerkv"]
    c.T_gate[:] = np.arange(N_ENTROPY_BINS)[:, None] + 100 * np.arange(N_PPL_BINS)
    assert (tables.look_up("compilerkv", 64, 0.0, 99.0)[2] == 300).all()
    assert (tables.look_up("compilerkv", 64, 9.0, 1.0)[2] == N_ENTROPY_BINS - 1).all()
    assert (tables.look_up("compilerkv", 64, c.entropy_edges[4], 3.0)[2] == 105).all()  # an edge opens the next bin


def test_tables_of_another_model_are_refused_in_one_line(tmp_path):
    """Guards against weights for heads that mean something else in this model."""
    path = tmp_path / "tables.npz"
    constant_tables().save(path)
    with pytest.raises(UserError) as error:
        Tables.load(path, SimpleNamespace(fingerprint="e" * 64, config=MODEL.config))
    assert_one_line(error, path, "another model")


def test_missing_tables_are_refused_in_one_line(tmp_path):
    """Guards against a stack trace before the tables have been compiled."""
    with pytest.raises(UserError) as error:
        Tables.load(tmp_path / "nowhere.npz", MODEL)
    assert_one_line(error, tmp_path / "nowhere.npz", "train_tables.py")


def test_tables_cut_anywhere_are_refused_in_one_line(tmp_path):
    """Guards against half a download, or half a write, that is taken for tables."""
    path = tmp_path / "tables.npz"
    constant_tables().save(path)
    content = path.read_bytes()
    for cut in np.linspace(0, len(content) - 1, 50).astype(int):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError) as error:
            Tables.load(path, MODEL)
        assert_one_line(error, path)


NPY = b"\x93NUMPY\x01\x00\x37\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}" + bytes(8)


@pytest.mark.parametrize("content", [
    pytest.param(b"Dear diary,\ntoday I compiled no tables.\n", id="text"),
    pytest.param(np.random.default_rng(0).bytes(3000), id="random bytes"),
    pytest.param(b"PK\x03\x04" + np.random.default_rng(1).bytes(3000), id="random bytes behind a zip's first bytes"),
    pytest.param(b"PK\x05\x06" + bytes(18), id="a zip of no files"),
    pytest.param(b"\x93NUMPY\x01\x00", id="the start of a .npy file"),
    pytest.param(NPY, id="a whole .npy file"),
])
def test_files_that_are_not_tables_are_refused_in_one_line(tmp_path, content):
    """Guards against a stack trace, or unpickling, for a wrong file."""
    path = tmp_path / "tables.npz"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path)


@pytest.mark.parametrize("damaged", ["zip", "npy"])
def test_a_single_wrong_byte_is_refused_in_one_line(tmp_path, damaged):
    """Guards against a stack trace for a file that a disk or a download has damaged in one place."""
    path = tmp_path / "tables.npz"
    constant_tables().save(path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 10] ^= 64  # the compression method, in the directory at the zip's end
    path.write_bytes(content if damaged == "zip" else NPY.replace(b"\x37", b"\x36"))  # a header one byte too short
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path)


def with_nan(array):
    """A copy whose last entry is NaN."""
    return np.append(array.ravel()[:-1], np.nan).reshape(array.shape)


@pytest.mark.parametrize("key, damage", [
    ("rules", lambda a: a[:, :1]), ("rules", lambda a: a + 1), ("rules", with_nan), ("W_head", lambda a: a[:, :2]), ("W_head", lambda a: a[:1]), ("T_gate", lambda a: a.swapaxes(2, 3)),
    ("entropy_edges", lambda a: a[:-1]), ("ppl_edges", lambda a: a[:, None]), ("T_gate", lambda a: a + np.inf),
    ("W_head", with_nan), ("T_gate", with_nan), ("entropy_edges", with_nan), ("ppl_edges", with_nan),
    ("entropy_edges", lambda a: a[::-1]), ("ppl_edges", lambda a: a[::-1]),
])
@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_entries_are_refused_in_one_line(tmp_path, name, key, damage):
    """Guards against tables of the wrong shape, order or with NaN that index or compare as if they were right."""
    path, tables = tmp_path / "tables.npz", constant_tables()
    setattr(tables.compiled[name], key, damage(getattr(tables.compiled[name], key)))
    tables.save(path)
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path, f"{name}/{key}")


@pytest.mark.parametrize("wrong", [[np.nan, 256], [0, 256], [-64, 256], ["64", "256"]])
def test_wrong_budgets_are_refused_in_one_line(tmp_path, wrong):
    """Guards against a budget whose logarithm is NaN, which argmin takes for the nearest to everything."""
    path, tables = tmp_path / "tables.npz", constant_tables()
    tables.budgets = np.array(wrong)
    tables.save(path)
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path, "budgets")


def test_a_retrieval_table_of_text_is_refused_in_one_line(tmp_path):
    """Guards against a TypeError for numbers that were saved as text."""
    path, tables = tmp_path / "tables.npz", constant_tables()
    tables.retrieval = tables.retrieval.astype(str)
    tables.save(path)
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path, "retrieval")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_missing_method_is_refused_by_name(tmp_path, name):
    """Guards against a KeyError in the middle of an evaluation."""
    path, tables = tmp_path / "tables.npz", constant_tables()
    del tables.compiled[name]
    tables.save(path)
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path, f"'{name}/", "compile it anew")


@pytest.mark.parametrize("key", ["budgets", "fingerprint", "provenance", "compilerkv/T_gate"])
def test_a_missing_array_is_refused_in_one_line(tmp_path, key):
    """Guards against a KeyError or TypeError for a file of an older version."""
    path = tmp_path / "tables.npz"
    constant_tables().save(path)
    with np.load(path) as file:
        np.savez(path, **{name: file[name] for name in file.files if name != key})
    with pytest.raises(UserError) as error:
        Tables.load(path, MODEL)
    assert_one_line(error, path)


def test_a_failed_save_leaves_the_old_tables_and_nothing_else(tmp_path, monkeypatch):
    """Guards against losing hours of compilation to a full disk, and against litter beside the file."""
    path = tmp_path / "tables.npz"
    constant_tables().save(path)
    before = path.read_bytes()

    def fail(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):
        constant_tables(W=2.0).save(path)
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError):
        write_atomically(path, "text")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tables.npz"]


def test_the_paper_settings_are_those_of_the_paper():
    """Guards against a grid of actions with a wrong end or step."""
    assert (PAPER.scope, PAPER.queries, PAPER.shared, PAPER.rules) == ("model", "mean", True, ((64, 1),))
    assert np.allclose(PAPER.W_grid, 0.8 + 0.025 * np.arange(29))
    assert np.allclose(PAPER.tau_grid, 0.8 + 0.01 * np.arange(21))
