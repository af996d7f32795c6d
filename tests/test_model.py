"""Tests of model.py: the network against a slow reference, the KV cache against masking, GGUF files and the tokenizer.

Nearly everything runs on a tiny random model, so that no weights are needed. Letters in shapes as in model.py.
"""

import copy
import json
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

import model as model_module
from compilerkv import evict, positions_of
from helpers import TINY, assert_one_line, gguf_meta, gguf_tensors, needs_weights, random_model, real_tokenizer, write_gguf
from model import (ATTEND_BLOCK, BYTE_ALPHABET, QUERY_BLOCK, ROW_BLOCK, SPARE_SLOTS, Block, Config, KVCache, Model, UserError, default_path,
                   last_attention, load, rms_norm, rope_frequencies)

torch.set_num_threads(1)  # on tensors this small, threads would only wait for each other

CONFIG = Config(n_layer=3, n_head=4, n_kv_head=2, n_embd=24, head_dim=8, n_ff=40, vocab_size=64, context_length=256)
MODEL = random_model(CONFIG, seed=0)
L, H, G, D = CONFIG.n_layer, CONFIG.n_head, CONFIG.n_kv_head, CONFIG.head_dim

properties = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


# ----------------------------------------------------------------------------------------------------------- helpers

def random_tokens(n, seed, vocab_size=CONFIG.vocab_size):
    """A list of n random token ids."""
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def full_forward(model, tokens):
    """Logits (T, V) of a whole sequence in one pass through an empty cache."""
    cache = KVCache.empty(model.config, model.dtype, model.device)
    return model.logits(model.forward(torch.tensor([tokens]), cache)[0][0])


def step(model, cache, token):
    """Logits (B, V) after one more token, the same in every row of the cache, which grows by it."""
    column = torch.full((len(cache.next_position), 1), token)
    return model.logits(model.forward(column, cache)[0][:, -1])


def reference(model, tokens):
    """The network the slow way, in float64: one head at a time, RoPE by complex numbers, a whole T x T softmax.

    Returns logits (T, V) and attention probabilities (L, H, T, T).
    """
    c, T = model.config, len(tokens)
    x = model.embedding[tokens].double()  # (T, E)
    frequency = c.rope_base ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)  # (D/2,)
    turn = torch.polar(torch.ones(1).double(), torch.outer(torch.arange(T).double(), frequency))  # (T, D/2)
    hidden = torch.ones(T, T).triu(1).bool()

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight.double()

    def spin(z):  # (T, D) -> (T, D)
        a, b = z[:, :c.head_dim // 2], z[:, c.head_dim // 2:]
        turned = torch.complex(a, b) * turn
        return torch.cat((turned.real, turned.imag), 1)

    attention = []
    for block in model.blocks:
        rows = (norm(x, block.attn_norm) @ block.qkv.double().T).split(c.head_dim, 1)  # H + 2G times (T, D)
        outputs = []
        for h in range(c.n_head):
            g = h * c.n_kv_head // c.n_head
            q, k, v = spin(rows[h]), spin(rows[c.n_head + g]), rows[c.n_head + c.n_kv_head + g]
            A = (q @ k.T / math.sqrt(c.head_dim)).masked_fill(hidden, -torch.inf).softmax(-1)  # (T, T)
            attention.append(A)
            outputs.append(A @ v)
        x = x + torch.cat(outputs, 1) @ block.out.double().T
        gate, up = (norm(x, block.ffn_norm) @ block.gate_up.double().T).split(c.n_ff, 1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ block.down.double().T
    logits = norm(x, model.norm) @ model.head.double().T
    return logits.float(), torch.stack(attention).view(c.n_layer, c.n_head, T, T).float()


def random_kept(T, seed, ragged=True):
    """A random kept set of T slots: every KV head its own positions and, if `ragged`, every layer its own number."""
    g = torch.Generator().manual_seed(seed)
    sizes = [int(torch.randint(1, T + 1, (1,), generator=g)) if ragged else T // 2 for _ in range(L)]
    return [torch.stack([torch.randperm(T, generator=g)[:size].sort().values for _ in range(G)]) for size in sizes]


def all_kept(T):
    """The kept set that leaves out nothing."""
    return [torch.arange(T).expand(G, -1)] * L


def masked(cache, kept):
    """A copy of the cache that still holds every slot, those not kept hidden by position -1."""
    slots = [torch.full_like(old, -1).scatter(2, positions[None], positions[None]) for old, positions in zip(cache.slots, kept)]
    return KVCache(copy.deepcopy(cache.k), copy.deepcopy(cache.v), slots, cache.next_position, cache.length)


def close(a, b, tolerance=1e-5):
    """True when two of one shape differ nowhere by more than the tolerance (times the largest entry, if above 1)."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


# ------------------------------------------------------------------------------------------- the network, as a whole

@pytest.mark.parametrize("T", [1, 2, 9, QUERY_BLOCK, QUERY_BLOCK + 22, ATTEND_BLOCK + 1, 2 * ATTEND_BLOCK - 5])
def test_prefill_matches_the_slow_reference(T):
    """Guards against a wrong mask, RoPE, head order or block boundary in logits, attention, total or logprobs."""
    tokens, tolerance = random_tokens(T, seed=T), 1e-5 if T < 10 else 1e-4  # rounding of the angles grows with position
    logits, cache, seen = MODEL.prefill(tokens, window=T, total=True)
    expected, A = reference(MODEL, tokens)
    assert close(logits, expected[-1], tolerance) and close(full_forward(MODEL, tokens), expected, tolerance)
    assert seen.n_tokens == T and close(torch.stack(seen.attention), A, tolerance) and close(seen.total, A.sum(2), tolerance)
    assert close(torch.stack(seen.attention).sum(-1), torch.ones(L, H, T))
    assert seen.logprobs.shape == (T - 1,)
    if T > 1:
        assert close(seen.logprobs, expected[:-1].log_softmax(-1)[range(T - 1), tokens[1:]], tolerance)
    assert cache.length == [T] * L and cache.next_position.tolist() == [T]


@properties
@given(T=st.integers(1, 40), window=st.integers(1, 50), seed=seeds)
def test_a_short_window_is_the_end_of_a_long_one(T, window, seed):
    """Guards against a window shifted by one: its queries, keys and log-probabilities are the prompt's last."""
    tokens = random_tokens(T, seed)
    _, _, everything = MODEL.prefill(tokens, window=T)
    _, _, seen = MODEL.prefill(tokens, window=window)
    w = min(window, T)
    assert close(torch.stack(seen.attention), torch.stack(everything.attention)[:, :, -w:])
    assert len(seen.logprobs) == min(w, T - 1)
    assert torch.allclose(seen.logprobs, everything.logprobs[T - 1 - len(seen.logprobs):], rtol=0, atol=1e-5)
    assert seen.total is None and seen.answer is None


@properties
@given(T=st.integers(2, 40), cut=st.integers(1, 39), window=st.integers(1, 20), seed=seeds)
@example(T=QUERY_BLOCK + 40, cut=QUERY_BLOCK // 4, window=9, seed=0)  # blocks of queries behind earlier keys
@example(T=ATTEND_BLOCK + 90, cut=50, window=9, seed=0)
def test_a_prompt_in_two_parts_equals_one_prefill(T, cut, window, seed):
    """Guards against a second part that is shifted, blind to the first, or counted twice in what was observed."""
    tokens, cut = random_tokens(T, seed), min(cut, T - 1)
    whole_logits, whole_cache, whole = MODEL.prefill(tokens, window, total=True)
    first = MODEL.prefill(tokens[:cut], window, total=True)
    logits, cache, seen = MODEL.prefill(tokens[cut:], window, total=True, before=first)
    assert close(logits, whole_logits, 1e-4) and close(seen.total, whole.total, 1e-4)
    assert close(torch.stack(seen.attention), torch.stack(whole.attention))
    assert seen.logprobs.shape == whole.logprobs.shape and torch.allclose(seen.logprobs, whole.logprobs, rtol=0, atol=1e-4)
    assert close(step(MODEL, cache, 5), step(MODEL, whole_cache, 5))


def test_many_questions_can_follow_one_context():
    """Guards against a cache that is not rewound all the way: the second question would read the first one too."""
    context, questions = random_tokens(15, seed=30), [random_tokens(n, seed=n) for n in (4, 9, 6)]
    first = MODEL.prefill(context, 5)
    for question in questions:
        first[1].rewind(first[1].length[0] - 15)
        logits, cache, _ = MODEL.prefill(question, 5, before=first)
        assert close(logits, MODEL.prefill(context + question, 5)[0])
        MODEL.decode(cache, logits, 3, stop={CONFIG.vocab_size})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, ROW_BLOCK, ROW_BLOCK + 1, 3 * ROW_BLOCK - 7])
def test_the_norm_in_blocks_is_the_librarys(rows, dtype):
    """Guards against a block that is left out, normed with another's numbers, or rounded before the weight is applied."""
    g = torch.Generator().manual_seed(rows)
    x, weight = (3 * torch.randn(rows, 48, generator=g)).to(dtype)[None], torch.rand(48, generator=g).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-3), F.rms_norm(x, weight.shape, weight, 1e-3))


@properties
@given(T=st.integers(2, 30), n=st.integers(1, 8), seed=seeds)
@example(T=20, n=QUERY_BLOCK + 5, seed=0)
def test_observed_attention_sees_no_later_token_and_needs_every_earlier_one(T, n, seed):
    """Guards against a pass that observes other numbers than it computes with, and against keys whose position is not their place."""
    _, cache, _ = MODEL.prefill(random_tokens(T, seed), window=1)
    ids = torch.tensor([random_tokens(n, seed + 1)])
    plain = MODEL.forward(ids, cache)[0]
    cache.rewind(n)
    observed, queries, summed = MODEL.forward(ids, cache, observe=n, total=True)
    attention = torch.stack(last_attention(queries, cache))  # (L, H, n, T + n)
    assert torch.equal(observed, plain) and close(attention.sum(-1), torch.ones(L, H, n)) and close(summed, attention.sum(2))
    assert not attention[..., T:].triu(1).any() and (attention[..., :T] > 0).all()
    cache.rewind(n)
    whole, one_head = [torch.arange(T).expand(G, -1)] * L, positions_of(torch.arange(T) <= torch.tensor([[[T], [0]]])) * L
    for kept in ([torch.arange(1, T).expand(G, -1)] * L, [torch.arange(T - (l > 0)).expand(G, -1) for l in range(L)], one_head):
        with pytest.raises(ValueError, match="evicted"):
            MODEL.forward(ids, evict(cache, kept), total=True)
    with pytest.raises(ValueError, match="one cache"):
        MODEL.forward(ids.expand(2, -1), evict(cache, whole, whole), observe=1)


@properties
@given(T=st.integers(1, 12), n=st.integers(1, 12), seed=seeds)
def test_token_by_token_equals_one_forward(T, n, seed):
    """Guards against a cache that feeds decoding other keys, values or positions than prefill would."""
    tokens = random_tokens(T + n, seed)
    logits, cache, _ = MODEL.prefill(tokens[:T], window=1)
    rows = [logits] + [step(MODEL, cache, token)[0] for token in tokens[T:]]
    assert close(torch.stack(rows), full_forward(MODEL, tokens)[T - 1:])


def test_greedy_decoding_past_the_spare_slots_equals_one_forward():
    """Guards against losing or overwriting slots when the cache has to grow while decoding."""
    T, n = 5, 2 * SPARE_SLOTS + 10
    model = random_model(CONFIG, seed=2)
    prompt = random_tokens(T, seed=3)
    logits, cache, _ = model.prefill(prompt, window=4)
    [out] = model.decode(cache, logits, max_new=n, stop={CONFIG.vocab_size})
    assert len(out) == n and len(set(out)) > 3
    assert out == full_forward(model, prompt + out[:-1]).argmax(-1)[T - 1:].tolist()
    assert cache.length == [T + n - 1] * L


def test_repeating_the_kv_heads_changes_nothing():
    """Guards against query heads that read the wrong KV head: 2 KV heads, or each written out twice, are one model."""
    config = Config(**{**vars(CONFIG), "n_kv_head": H})

    def widen(qkv):  # ((H + 2G) D, E) -> (3H D, E)
        q, k, v = qkv.split((H * D, G * D, G * D))
        repeated = [w.view(G, D, -1).repeat_interleave(H // G, 0).reshape(H * D, -1) for w in (k, v)]
        return torch.cat((q, *repeated))

    blocks = [Block(**{**vars(b), "qkv": widen(b.qkv)}) for b in MODEL.blocks]
    wide = Model(config, MODEL.embedding, blocks, MODEL.norm, MODEL.head, MODEL.inv_freq, "wide")
    tokens = random_tokens(20, seed=1)
    logits, cache, seen = MODEL.prefill(tokens, window=20)
    wide_logits, wide_cache, wide_seen = wide.prefill(tokens, window=20)
    assert close(logits, wide_logits) and close(torch.stack(seen.attention), torch.stack(wide_seen.attention))
    assert close(step(MODEL, cache, 7), step(wide, wide_cache, 7))
    assert wide_cache.nbytes == H // G * cache.nbytes


def test_two_prompts_in_a_row_equal_two_fresh_models():
    """Guards against anything that one prompt leaves behind in the model for the next."""
    for length, seed in ((30, 1), (11, 2)):
        tokens = random_tokens(length, seed)
        fresh = random_model(CONFIG, seed=0)
        (logits, cache, seen), (logits2, cache2, seen2) = (m.prefill(tokens, 8, total=True) for m in (MODEL, fresh))
        assert torch.equal(logits, logits2) and torch.equal(torch.stack(seen.attention), torch.stack(seen2.attention))
        assert torch.equal(seen.logprobs, seen2.logprobs) and torch.equal(seen.total, seen2.total)
        assert MODEL.decode(cache, logits, 10, stop={1}) == fresh.decode(cache2, logits2, 10, stop={1})


# ---------------------------------------------------------------------------------------------------- the cut cache

@properties
@given(T=st.integers(2, 40), seed=seeds)
def test_evicted_slots_equal_hidden_slots(T, seed):
    """Guards against eviction that moves positions, mixes KV heads or keeps more or other tokens than asked."""
    tokens, continuation = random_tokens(T, seed), random_tokens(6, seed + 1)
    logits, cache, _ = MODEL.prefill(tokens, window=1)
    kept = random_kept(T, seed)
    cut, hidden = evict(cache, kept), masked(cache, kept)
    assert close(MODEL.nll(cut, logits, continuation), MODEL.nll(hidden, logits, continuation))
    for token in continuation:
        assert close(step(MODEL, cut, token), step(MODEL, hidden, token))


def test_eviction_changes_the_loss():
    """Guards against a comparison of evicted caches that is true only because eviction does nothing."""
    logits, cache, _ = MODEL.prefill(random_tokens(30, seed=4), window=1)
    continuation = random_tokens(6, seed=5)
    cut = evict(cache, random_kept(30, seed=6))
    assert (MODEL.nll(cut, logits, continuation) - MODEL.nll(cache, logits, continuation)).abs() > 1e-3


def test_keeping_everything_equals_the_full_cache_bit_for_bit():
    """Guards against eviction that reorders, rounds or re-rotates what it keeps."""
    T = 33
    tokens, continuation = random_tokens(T, seed=7), random_tokens(9, seed=8)
    logits, cache, _ = MODEL.prefill(tokens, window=1)
    same = evict(cache, all_kept(T))
    assert torch.equal(MODEL.nll(cache, logits, continuation), MODEL.nll(same, logits, continuation))
    for token in continuation:
        assert torch.equal(step(MODEL, cache, token), step(MODEL, same, token))


def test_eviction_leaves_the_cache_it_was_given_alone():
    """Guards against one policy's eviction spoiling the cache that the next policy is compared on."""
    _, cache, _ = MODEL.prefill(random_tokens(20, seed=9), window=1)
    before = copy.deepcopy(cache)
    step(MODEL, evict(cache, random_kept(20, seed=10)), 3)
    assert cache.length == before.length and torch.equal(cache.next_position, before.next_position)
    for l in range(L):
        assert all(torch.equal(a, b) for a, b in zip(cache.layer(l), before.layer(l)))


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_nbytes_is_exact_arithmetic_at_the_stored_heads(dtype, itemsize):
    """Guards against counting query heads, padding, spare capacity or evicted slots as memory."""
    T = 21
    model = random_model(CONFIG, seed=1, dtype=dtype)
    logits, cache, _ = model.prefill(random_tokens(T, seed=11), window=5)
    assert all(cache.layer(l)[i].shape == (1, G, T, D) for l in range(L) for i in (0, 1))
    assert cache.nbytes == 2 * L * G * T * D * itemsize
    kepts = [random_kept(T, seed=12, ragged=False), random_kept(T, seed=13), random_kept(T, seed=14)]
    cuts = [evict(cache, kept) for kept in kepts]
    assert cuts[0].nbytes == 2 * L * G * (T // 2) * D * itemsize
    for cut, kept in zip(cuts, kepts):
        assert cut.nbytes == 2 * G * sum(positions.shape[1] for positions in kept) * D * itemsize
        assert cut.length == [positions.shape[1] for positions in kept]
        assert all(k.shape[2] == n + SPARE_SLOTS for k, n in zip(cut.k, cut.length))  # room for the answer, and no more
    batch = evict(cache, *kepts)
    assert batch.nbytes == sum(cut.nbytes for cut in cuts)
    assert batch.kept().tolist() == [int(cut.kept()) for cut in cuts]
    model.decode(batch, logits, max_new=4, stop={CONFIG.vocab_size})  # writes 3 tokens: nobody needs the fourth's slot
    assert batch.nbytes == sum(cut.nbytes for cut in cuts) + 3 * 3 * 2 * L * G * D * itemsize


# --------------------------------------------------------------------------------------------- batches, nll, decode

@properties
@given(T=st.integers(2, 30), B=st.integers(1, 4), seed=seeds)
def test_a_ragged_batch_equals_its_rows_one_by_one(T, B, seed):
    """Guards against padding that is attended to, and against rows that leak into each other."""
    logits, cache, _ = MODEL.prefill(random_tokens(T, seed), window=1)
    kepts = [random_kept(T, seed + row) for row in range(B)]
    continuation = random_tokens(5, seed)
    batch = evict(cache, *kepts)
    alone = torch.cat([MODEL.nll(evict(cache, kept), logits, continuation) for kept in kepts])
    assert close(MODEL.nll(batch, logits, continuation), alone)
    out = MODEL.decode(batch, logits, max_new=12, stop={3, 4})
    assert out == [MODEL.decode(evict(cache, kept), logits, 12, stop={3, 4})[0] for kept in kepts]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("units", [True, False])
def test_single_tokens_equal_many_at_once_on_every_processor(monkeypatch, units, B):
    """Guards against padding that a single query sees, and heads that read another's keys, beside matrix units and without them."""
    monkeypatch.setattr(model_module, "MATRIX_UNITS", units)
    _, cache, _ = MODEL.prefill(random_tokens(30, seed=1), window=1)
    ids, kepts = torch.tensor([random_tokens(3, seed=2)]).expand(B, -1), [positions_of(torch.rand(L, G, 30, generator=torch.Generator().manual_seed(i)) < 0.5) for i in range(B)]
    batch, again = evict(cache, *kepts), evict(cache, *kepts)
    assert batch.padded
    many = MODEL.forward(ids, batch)[0]  # (B, 3, E)
    assert close(torch.cat([MODEL.forward(ids[:, i:i + 1], again)[0] for i in range(3)], dim=1), many)


@pytest.mark.parametrize("n", [2, 40, 50, 130])
def test_nll_of_many_rows_is_that_of_each_row_alone(n):
    """Guards against the groups of rows whose logits are made together: one that is left out, counted twice or mixed up, or has no row."""
    logits, cache, _ = MODEL.prefill(random_tokens(40, seed=31), window=3)
    kepts, continuation = [random_kept(40, seed) for seed in range(32, 39)], random_tokens(n, seed=39)
    alone = torch.cat([MODEL.nll(evict(cache, kept), logits, continuation) for kept in kepts])
    assert close(MODEL.nll(evict(cache, *kepts), logits, continuation), alone) and alone.diff().abs().min() > 1e-4


def test_nll_is_the_mean_over_the_continuation():
    """Guards against a loss shifted by one token, summed instead of averaged, or without the first token."""
    tokens, continuation = random_tokens(12, seed=15), random_tokens(7, seed=16)
    logits, cache, _ = MODEL.prefill(tokens, window=3)
    expected = F.cross_entropy(reference(MODEL, tokens + continuation[:-1])[0][11:], torch.tensor(continuation))
    assert close(MODEL.nll(cache, logits, continuation), expected[None])
    first = F.cross_entropy(logits, torch.tensor(continuation[0]))
    assert close(MODEL.nll(cache, logits, continuation[:1]), first[None])


def test_nll_against_targets_is_their_cross_entropy():
    """Guards against a target that is read at another place or row, and one that takes the place of the first token."""
    tokens, continuation = random_tokens(40, seed=15), random_tokens(50, seed=16)
    logits, cache, _ = MODEL.prefill(tokens, window=3)
    targets = torch.softmax(3 * torch.randn(49, CONFIG.vocab_size, generator=torch.Generator().manual_seed(0)), -1)
    predicted = torch.log_softmax(reference(MODEL, tokens + continuation[:-1])[0][39:], -1)  # (50, V)
    expected = -(predicted[0, continuation[0]] + (targets * predicted[1:]).sum()) / 50
    assert close(MODEL.nll(cache, logits, continuation, targets), expected[None])
    batch = evict(cache, *(random_kept(40, seed) for seed in range(3)))
    one_hot = F.one_hot(torch.tensor(continuation[1:]), CONFIG.vocab_size).float()
    assert close(MODEL.nll(batch, logits, continuation, one_hot), MODEL.nll(batch, logits, continuation))
    assert close(MODEL.nll(cache, logits, continuation[:1], targets[:0]), MODEL.nll(cache, logits, continuation[:1]))


def test_nll_hands_the_cache_back_as_it_found_it():
    """Guards against a continuation that was only scored and yet stays in the cache."""
    logits, cache, _ = MODEL.prefill(random_tokens(15, seed=17), window=3)
    cache = evict(cache, random_kept(15, seed=18))
    untouched, continuation = copy.deepcopy(cache), random_tokens(SPARE_SLOTS + 9, seed=19)
    first = MODEL.nll(cache, logits, continuation)
    assert cache.length == untouched.length and torch.equal(cache.next_position, untouched.next_position)
    assert cache.nbytes == untouched.nbytes
    assert torch.equal(first, MODEL.nll(cache, logits, continuation))
    MODEL.nll(cache, logits, continuation[:3])
    assert MODEL.decode(cache, logits, 20, stop={0}) == MODEL.decode(untouched, logits, 20, stop={0})


def test_decode_stops_before_the_stop_token():
    """Guards against an answer that holds its stop token, runs past it, or ends with the first row that stops."""
    logits, cache, _ = MODEL.prefill(random_tokens(20, seed=20), window=3)
    rows = [random_kept(20, seed) for seed in (21, 22, 23, 24)]
    free = [MODEL.decode(evict(cache, row), logits, 30, stop={CONFIG.vocab_size})[0] for row in rows]
    stop = next(token for token in free[0][3:] if token != logits.argmax())  # all rows share their first token
    expected = [out[:out.index(stop)] if stop in out else out for out in free]
    assert len(set(map(len, expected))) > 1
    assert MODEL.decode(evict(cache, *rows), logits, 30, stop={stop}) == expected
    assert MODEL.decode(cache, logits, 30, stop={int(logits.argmax()), stop}) == [[]]


@pytest.mark.parametrize("max_new", [1, 2, 7])
def test_decode_respects_max_new(max_new):
    """Guards against one token too many or too few."""
    logits, cache, _ = MODEL.prefill(random_tokens(9, seed=25), window=3)
    out = MODEL.decode(evict(cache, *[all_kept(9)] * 2), logits, max_new, stop={CONFIG.vocab_size})
    assert [len(row) for row in out] == [max_new, max_new]


def test_decode_of_no_tokens():
    """Guards against a crash where no new token was asked for."""
    logits, cache, _ = MODEL.prefill(random_tokens(9, seed=25), window=3)
    assert MODEL.decode(evict(cache, *[all_kept(9)] * 2), logits, 0, stop={CONFIG.vocab_size}) == [[], []]


def test_every_row_may_go_on_from_its_own_logits():
    """Guards against rows that all start with the first row's token, in the loss and in the answer."""
    logits, cache, _ = MODEL.prefill(random_tokens(12, seed=40), window=3)
    batch = evict(cache, *(random_kept(12, seed) for seed in (41, 42, 43)))
    question, continuation = random_tokens(4, seed=44), random_tokens(5, seed=45)
    hidden, _, _ = MODEL.forward(torch.tensor([question]).expand(3, -1), batch)
    rows = [batch.rows([i]) for i in range(3)]
    scores = MODEL.logits(hidden[:, -1])
    assert close(MODEL.nll(batch, scores, continuation),
                 torch.cat([MODEL.nll(row, x, continuation) for row, x in zip(rows, scores)]))
    assert MODEL.decode(batch, scores, 9, stop={3}) == [MODEL.decode(row, x, 9, stop={3})[0] for row, x in zip(rows, scores)]


def test_decode_ends_a_row_where_the_caller_says():
    """Guards against an answer that loses the token it ended with, and against rows that end together."""
    logits, cache, _ = MODEL.prefill(random_tokens(20, seed=20), window=3)
    rows = [random_kept(20, seed) for seed in range(50, 58)]
    free = MODEL.decode(evict(cache, *rows), logits, 20, stop={CONFIG.vocab_size})
    ended = lambda ids: sum(ids) % 5 == 0
    expected = [row[:next((n for n in range(1, 20) if ended(row[:n])), 20)] for row in free]
    assert len(set(map(len, expected))) > 2
    assert MODEL.decode(evict(cache, *rows), logits, 20, stop={CONFIG.vocab_size}, ended=ended) == expected


# ----------------------------------------------------------------------------------------------------- short and long

@pytest.mark.parametrize("length, window, word", [
    (0, 4, "empty"), (CONFIG.context_length + 1, 4, CONFIG.context_length), (5, 0, "window"), (5, -1, "window"),
])
def test_impossible_prompts_are_refused_in_one_line(length, window, word):
    """Guards against a stack trace, or a silently wrong answer, for a prompt that the model cannot run."""
    with pytest.raises(UserError) as error:
        MODEL.prefill(random_tokens(length, seed=26), window)
    assert_one_line(error, word)


def test_the_context_may_be_filled_and_not_overrun():
    """Guards against a limit that is off by one, and against positions that the model was never trained on."""
    logits, cache, _ = MODEL.prefill(random_tokens(CONFIG.context_length, seed=27), window=4)
    assert len(MODEL.decode(cache, logits, 1, stop={CONFIG.vocab_size})[0]) == 1
    with pytest.raises(UserError) as error:
        MODEL.decode(cache, logits, 2, stop={CONFIG.vocab_size})
    assert_one_line(error, CONFIG.context_length + 1, CONFIG.context_length)


def test_a_prompt_of_one_token_works():
    """Guards against the empty slice: one token has attention, but no token before it that predicted it."""
    logits, cache, seen = MODEL.prefill([5], window=32, total=True)
    assert seen.logprobs.shape == (0,) and torch.equal(torch.stack(seen.attention), torch.ones(L, H, 1, 1))
    assert close(seen.total, torch.ones(L, H, 1))
    assert len(MODEL.decode(cache, logits, 3, stop={CONFIG.vocab_size})[0]) == 3


# ------------------------------------------------------------------------------------------------------ weights files

def tiny_llama(seed, tied):
    """A random model of TINY's shape whose norms are random too, so that mixed-up norms show."""
    g = torch.Generator().manual_seed(seed)
    base = random_model(TINY, seed)
    norm = lambda: torch.rand(TINY.n_embd, generator=g) + 0.5
    blocks = [Block(**{**vars(b), "attn_norm": norm(), "ffn_norm": norm()}) for b in base.blocks]
    head = base.embedding if tied else torch.randn(base.embedding.shape, generator=g) / 4
    return Model(TINY, base.embedding, blocks, norm(), head, rope_frequencies(TINY), "tiny")


@pytest.mark.parametrize("tied", [True, False])
def test_load_reads_back_what_was_written(tmp_path, tied):
    """Guards against transposed, swapped or un-permuted weights, a forgotten output matrix, and ignored constants."""
    model, path = tiny_llama(seed=1, tied=tied), tmp_path / "tiny.gguf"
    write_gguf(path, gguf_tensors(model), gguf_meta())
    loaded = load(path, "float32")
    assert vars(loaded.config) == pytest.approx(vars(TINY))
    assert loaded.name == "tiny" and len(loaded.fingerprint) == 64 and loaded.dtype == torch.float32
    for mine, theirs in zip(model.blocks, loaded.blocks):
        assert all(torch.equal(w, vars(theirs)[name]) for name, w in vars(mine).items())
    assert torch.equal(loaded.head, model.head) and (loaded.head is loaded.embedding) == tied
    tokens = random_tokens(20, seed=2, vocab_size=260)
    logits, cache, _ = loaded.prefill(tokens, window=4)
    assert close(logits, reference(model, tokens)[0][-1])
    free = loaded.decode(cache, logits, 8, stop=set())[0]
    loaded.tokenizer.stop = {free[5]}  # decoding stops there, unless told otherwise
    assert len(free) == 8 and loaded.decode(loaded.prefill(tokens, 4)[1], logits, 8)[0] == free[:free.index(free[5])]


def test_loaded_tokenizer_merges_and_knows_its_special_tokens(tmp_path):
    """Guards against a vocabulary read by the wrong alphabet, without merges, or with control tokens cut to bytes."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), gguf_meta())
    tokenizer = load(path, "float32").tokenizer
    ids = list(BYTE_ALPHABET.values())
    assert tokenizer.encode("the bath</s>") == [257, *(ids.index(b) for b in b" ba"), 256, 259]
    assert tokenizer.stop == {259}
    text = "Grüße,\t世界 🙂\x00 the\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    defined = gguf_meta() | {"tokenizer.ggml.token_type": [1] * 257 + [4] + [3] * 2, "tokenizer.ggml.pre": "llama-bpe"}
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), defined)
    tokenizer = load(path, "float32").tokenizer  # "the" is a token of the file's author, no control token; Llama 3 begins with bos
    assert tokenizer.encode("the")[0] == 258 and tokenizer.decode(tokenizer.encode("a the</s>"), special=False) == "a the"
    with pytest.raises(UserError) as error:
        tokenizer.chat("hello")
    assert_one_line(error, "template")


def test_chat_templates_render_as_their_authors_saw_them(tmp_path):
    """Guards against line breaks of the template's own {% %} lines that end up in the prompt."""
    template = "{{ bos_token }}\n{% for m in messages %}\n  {% if true %}\n{{ m.role }}: {{ m.content }}\n" \
               "  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nassistant:{% endif %}"
    write_gguf(tmp_path / "tiny.gguf", gguf_tensors(tiny_llama(seed=1, tied=True)),
               gguf_meta() | {"tokenizer.chat_template": template})
    tokenizer = load(tmp_path / "tiny.gguf", "float32").tokenizer
    assert tokenizer.decode(tokenizer.chat("Hi </s>")) == "<s>\nuser: Hi </s>\nassistant:"


def test_fingerprints_tell_weights_apart(tmp_path):
    """Guards against tables of one model being accepted by another of the same shape."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_gguf(tmp_path / name, gguf_tensors(tiny_llama(seed, tied=True)), gguf_meta())
    a, b, c = (load(tmp_path / name, torch.float32).fingerprint for name in "abc")
    assert a == b != c


def test_linear_rope_scaling_slows_every_rotation(tmp_path):
    """Guards against a scaling factor that is accepted and then ignored."""
    scaled = gguf_meta() | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "tiny.gguf", gguf_tensors(tiny_llama(seed=1, tied=True)), scaled)
    assert close(load(tmp_path / "tiny.gguf", "float32").inv_freq, rope_frequencies(TINY) / 4, 1e-9)
    write_gguf(tmp_path / "tiny.gguf", gguf_tensors(tiny_llama(seed=1, tied=True)), scaled | {"llama.rope.scaling.type": "none"})
    assert close(load(tmp_path / "tiny.gguf", "float32").inv_freq, rope_frequencies(TINY), 1e-9)
    factors = np.linspace(1.001, 7.003, TINY.head_dim // 2, dtype=np.float32)  # bfloat16 would round them
    write_gguf(tmp_path / "tiny.gguf", gguf_tensors(tiny_llama(seed=1, tied=True)) | {"rope_freqs.weight": factors}, gguf_meta())
    assert close(load(tmp_path / "tiny.gguf", "bfloat16").inv_freq, rope_frequencies(TINY) / torch.from_numpy(factors), 1e-9)


@pytest.mark.parametrize("changes, word", [
    ({"general.architecture": "mamba"}, "mamba"),
    ({"llama.expert_count": 8}, "mixture of experts"),
    ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    ({"tokenizer.ggml.model": "llama"}, "byte-level"),
    ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
    ({"tokenizer.ggml.merges": ["th e", "t h"]}, "merges"),
    ({"tokenizer.ggml.tokens": [*BYTE_ALPHABET, "th", "\u65e5", "<s>", "</s>"], "tokenizer.ggml.merges": ["t h"]}, "alphabet"),
])
def test_models_that_would_compute_something_else_are_refused_by_name(tmp_path, changes, word):
    """Guards against a file that loads without complaint and then speaks nonsense."""
    path = tmp_path / "strange.gguf"
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), gguf_meta() | changes)
    with pytest.raises(UserError) as error:
        load(path, "float32")
    assert_one_line(error, path, word)


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path):
    """Guards against a bias that is silently left out, and against a KeyError for an incomplete file."""
    tensors, path = gguf_tensors(tiny_llama(seed=1, tied=True)), tmp_path / "strange.gguf"
    for changed, word in ((tensors | {"blk.0.attn_q.bias": np.zeros(16, np.float32)}, "blk.0.attn_q.bias"),
                          ({k: w for k, w in tensors.items() if "1.ffn_up" not in k}, "blk.1.ffn_up.weight")):
        write_gguf(path, changed, gguf_meta())
        with pytest.raises(UserError) as error:
            load(path, "float32")
        assert_one_line(error, path, word)


def test_weights_in_a_format_that_gguf_cannot_read_are_refused_in_one_line(tmp_path, monkeypatch):
    """Guards against a stack trace of the de-quantiser."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), gguf_meta())
    monkeypatch.setattr("gguf.quants.dequantize", Mock(side_effect=NotImplementedError("Q8_K")))
    with pytest.raises(UserError) as error:
        load(path, "float32")
    assert_one_line(error, path, "Q8_K")


def test_missing_metadata_is_refused_in_one_line(tmp_path):
    """Guards against a KeyError for a file that lacks a key that no default can stand in for."""
    tensors, path = gguf_tensors(tiny_llama(seed=1, tied=True)), tmp_path / "lacking.gguf"
    optional = {"general.architecture", "general.name", "llama.rope.freq_base", "llama.attention.head_count_kv",
                "tokenizer.ggml.model", "tokenizer.ggml.pre"}
    for key in sorted(gguf_meta().keys() - optional):
        write_gguf(path, tensors, {k: v for k, v in gguf_meta().items() if k != key})
        with pytest.raises(UserError) as error:
            load(path, "float32")
        assert_one_line(error, path, key)


@pytest.mark.parametrize("changes", [
    {"llama.attention.head_count_kv": 2}, {"llama.attention.head_count": 3}, {"llama.embedding_length": 32},
    {"llama.feed_forward_length": 20}, {"llama.rope.dimension_count": 4}, {"tokenizer.ggml.eos_token_id": 999},
])
def test_metadata_that_contradicts_the_tensors_is_refused_in_one_line(tmp_path, changes):
    """Guards against a damaged file that loads and fails at the first prompt, or turns only a part of each head."""
    path = tmp_path / "contradiction.gguf"
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), gguf_meta() | changes)
    with pytest.raises(UserError) as error:
        load(path, "float32")
    assert_one_line(error, path)


def test_a_file_without_the_name_of_its_pre_tokenizer_loads_as_gpt_2(tmp_path):
    """Guards against a default that one function grants and the next one does not know."""
    path, meta = tmp_path / "old.gguf", gguf_meta()
    del meta["tokenizer.ggml.pre"]
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), meta)
    assert load(path, "float32").tokenizer.encode("the") == [257]


@pytest.mark.parametrize("content", [
    pytest.param(b"", id="empty"),
    pytest.param(b"GGUF", id="magic number only"),
    pytest.param(bytes(5000), id="zeros"),
    pytest.param(b"Dear diary,\ntoday I wrote no weights.\n", id="text"),
    pytest.param(np.random.default_rng(0).bytes(5000), id="random bytes"),
    pytest.param(b"GGUF\x03\x00\x00\x00" + np.random.default_rng(1).bytes(5000), id="random bytes behind a header"),
])
def test_files_that_are_not_gguf_are_refused_in_one_line(tmp_path, content):
    """Guards against a stack trace of the GGUF reader for a wrong or damaged download."""
    path = tmp_path / "not-weights.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path, "float32")
    assert_one_line(error, path)


def test_missing_paths_and_directories_are_refused_in_one_line(tmp_path):
    """Guards against a FileNotFoundError for a mistyped --model."""
    for path in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(UserError) as error:
            load(path, "float32")
        assert_one_line(error, path)


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path):
    """Guards against a broken download that loads as a smaller model or crashes the reader."""
    path = tmp_path / "cut.gguf"
    write_gguf(path, gguf_tensors(tiny_llama(seed=1, tied=True)), gguf_meta())
    content = path.read_bytes()
    for cut in [*np.linspace(1, len(content) - 1, 60).astype(int), len(content) - 33]:
        path.write_bytes(content[:cut])
        with pytest.raises(UserError) as error:
            load(path, "float32")
        assert_one_line(error, path)


# ------------------------------------------------------------------------------------------------- the real vocabulary

CASES = json.loads((Path(__file__).parent / "tokenizer_cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    """The real tokenizer, made from the file's metadata alone: no weight is read."""
    return real_tokenizer()


@needs_weights
def test_token_ids_equal_the_reference(tokenizer):
    """Guards against a pre-tokenizer or merge order that differs from the one the model was trained with."""
    wrong = [(text, tokenizer.encode(text), ids) for text, ids in CASES["encode"] if tokenizer.encode(text) != ids]
    assert len(CASES["encode"]) > 300 and not wrong


@needs_weights
def test_chat_ids_equal_the_reference(tokenizer):
    """Guards against a chat template rendered without its system prompt, line breaks or assistant header."""
    for text, ids in CASES["chat"]:
        assert tokenizer.chat(text) == ids


@needs_weights
def test_decode_undoes_encode(tokenizer):
    """Guards against text that changes on its way through the tokenizer."""
    lacking = {b for b in range(256) if tokenizer.encoding.encode_single_token(bytes([b])) >= tokenizer.n_vocab}
    assert len(lacking) == 21
    ordinary = [text for text, _ in CASES["encode"] if not lacking & set(text.encode())]
    assert len(ordinary) > 280
    for text in ordinary:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_weights
def test_bytes_without_a_token_are_dropped(tokenizer):
    """Guards against ids past the vocabulary, which would read outside the embedding."""
    for byte in range(32):
        assert all(i < tokenizer.n_vocab for i in tokenizer.encode(f"a{chr(byte)}b"))
    assert tokenizer.decode(tokenizer.encode("a\x06b")) == "ab"


@needs_weights
def test_a_truncated_copy_of_the_weights_is_refused_in_one_line(tmp_path):
    """Guards against an interrupted download of the real file."""
    path = tmp_path / "first-megabyte.gguf"
    with open(default_path(), "rb") as file:
        path.write_bytes(file.read(2 ** 20))
    with pytest.raises(UserError) as error:
        load(path, "float32")
    assert_one_line(error, path)
