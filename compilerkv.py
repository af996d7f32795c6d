"""CompilerKV (arXiv 2602.08686): which tokens of a prompt's KV cache to keep, and the policies it is compared with.

Read it next to the paper, top to bottom: Eq. 4 scores tokens, Eqs. 5-6 correct the score by head, Eqs. 7-8 cut it by
risk, `evict` drops the rest. Every policy is a selector

    kept = selector(observation, cache, budget, tables)

that returns for each layer the ORIGINAL positions to keep, sorted, (G, S_l); a KV head that keeps fewer is padded with -1. On
average over KV heads, for CompilerKV and some rivals over layers too, at most `budget` are kept. No model is run here. Letters as
in model.py: L layers, H query heads, G KV heads, T tokens.
"""

import io
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import SPARE_SLOTS, KVCache, UserError

SINKS = 4           # first tokens that are always kept: the attention sinks
N_ENTROPY_BINS, N_PPL_BINS = 20, 4  # risk bins of the gate, as in the paper


@dataclass(frozen=True)
class Settings:
    """What distinguishes the paper's literal reading from ours; both run through the same functions."""
    scope: str     # over what Eq. 4 averages attention: "model" (layers and heads), "layer" (heads) or "head" (nothing)
    queries: str   # how Eq. 4 joins the window's queries: their "mean", or the one that wants the token most, "max"
    shared: bool   # one kept set a layer for all its KV heads, or sets of its KV heads that compete for the layer's budget
    rules: tuple   # (window, kernel) actions: |Omega|, and the width of the max-pool of u over tokens (1 = none); first = default
    cap: int       # most that a gated layer keeps, in budgets: 1 = each layer has its own; above, layers compete, see `gate`
    W_grid: tuple  # actions of W_head
    tau_grid: tuple  # actions of T_gate
    penalty: float   # nats that the gate pays for a context full of candidates beyond the budget
    soft: bool     # roll-outs are judged by the loss against all that the full cache predicts, not by that of the right tokens alone

    @property
    def window(self):
        """Last queries that prefill must observe: the widest window of the rules, which the risk signals read too."""
        return max(window for window, _ in self.rules)

    def n_sets(self, G):
        """Kept sets of a layer: one for all its G KV heads, or one for each."""
        return 1 if self.shared else G


PAPER = Settings("model", "mean", True, ((64, 1),), cap=1, W_grid=tuple(np.linspace(0.8, 1.5, 29).tolist()),
                 tau_grid=tuple(np.linspace(0.8, 1.0, 21).tolist()), penalty=1.0, soft=False)
# Ours: log-spaced actions. W from e^-1 to e; tau from one that all tokens reach over the paper's 0.8 to 819.
OURS = Settings("head", "max", False, ((16, 31), (16, 45), (32, 31), (32, 45)), cap=2,
                W_grid=tuple(np.exp(np.linspace(-1, 1, 5)).tolist()), tau_grid=(0.001, *(0.8 * 2.0 ** np.arange(11)).tolist()), penalty=0.05,
                soft=True)
SETTINGS = {"compilerkv": OURS, "compilerkv-paper": PAPER}
WINDOW = 32         # of the rivals that have one
MAX_WINDOW = max(WINDOW, *(s.window for s in SETTINGS.values()))  # what prefill must observe to serve every policy
MIN_BUDGET = WINDOW + SINKS


# ------------------------------------------------------------------------------- stage 1: stabilised token utility

def attention_level(observation, window, scope, queries="mean"):
    """alpha[t] of Eq. 4: attention of the window's queries on each key, times T, so that its mean over t is 1.

    L times (H, w, T) -> (L, H, T); under scope "model" and "layer" the averaged dimensions have size 1. With queries="max" the
    query that wants a token most speaks for it, not the mean of all, and the mean over t is no longer 1. Where prefill observed
    fewer queries than `window`, these are read.
    """
    join = {"mean": lambda A: A.mean(1, dtype=torch.float32), "max": lambda A: A.amax(1)}[queries]
    L, H, _, T = observation.shape
    received = torch.empty(L, H, T, device=observation.attention[0].device)
    for row, A in zip(received, observation.attention):  # one tensor, made first: the float32 copies in mean() then share one room
        row.copy_(join(A[:, -window:]))  # (H, w, T) -> (H, T)
    alpha = T * received
    averaged = {"model": (0, 1), "layer": (1,), "head": ()}[scope]
    return alpha.mean(averaged, keepdim=True) if averaged else alpha  # -> (1, 1, T), (L, 1, T) or (L, H, T)


def spread(u, window, kernel, sinks=SINKS):
    """Max-pool u over kernel // 2 tokens to both sides, (L, H, T) -> (L, H, T): neighbours of a token that matters matter.

    Sinks and window are kept in any case and lend nothing to their neighbours. Kernel 1: u, the paper's formula.
    """
    if kernel == 1:
        return u
    u = u.clone()
    u[..., :sinks] = 0
    u[..., max(u.shape[-1] - window, 0):] = 0
    return F.max_pool1d(u, kernel, stride=1, padding=kernel // 2)


def vector_lengths(cache, part):
    """Euclidean length of every key (part 0) or value (part 1), (L, G, T) float32."""
    return torch.stack([cache.layer(l)[part][0].norm(dim=-1, dtype=torch.float32) for l in range(len(cache.k))])  # of (G, T, D)


def value_norm(cache):
    """rho[l,h,t] of Eq. 4: length of each value vector over the mean length in its head, (L, G, T)."""
    v = vector_lengths(cache, 1)
    return v / v.mean(-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def utility(observation, cache, settings, window):
    """u[l,h,t] = alpha * rho (Eq. 4), un-pooled, (L, H, T). Query head h reads the values of KV head h // (H / G)."""
    alpha = attention_level(observation, window, settings.scope, settings.queries)
    rho = value_norm(cache)
    return alpha * rho.repeat_interleave(observation.shape[1] // rho.shape[1], dim=1)


# ---------------------------------------------------------------------------------------- stage 2: head-aware score

def head_score(u, W, n_sets=1):
    """s[l,t] = max over h of W_head[l,h] u[l,h,t] (Eqs. 5-6): one reliable head can veto an eviction.

    u (L, H, T), W (L, H) -> (L, n_sets, T): the maximum is over all heads of a layer (n_sets = 1, the paper), or over the
    query heads of each KV head (n_sets = G).
    """
    L, H, T = u.shape
    return (W[:, :, None] * u).view(L, n_sets, H // n_sets, T).amax(2)


# ------------------------------------------------------------------------------------- stage 3: risk-adaptive gate

def risk(observation, window):
    """The two risk signals of Eq. 7, as floats.

    entropy, in [0, log T] nats, of the model-scope, un-pooled alpha read as a distribution over tokens: is attention
    spread out? perplexity, >= 1, of the window's tokens: is the text hard for the model? (1 if nothing was predicted.)
    """
    alpha = attention_level(observation, window, "model").flatten()  # (T,)
    p = alpha / alpha.sum()
    entropy = torch.special.entr(p).sum().item()  # - sum p log p
    logprobs = observation.logprobs[-window:]
    perplexity = torch.exp(-logprobs.mean()).item() if len(logprobs) else 1.0
    if not (np.isfinite(entropy) and np.isfinite(perplexity)):
        raise ValueError(f"the risk signals are not finite (entropy {entropy}, perplexity {perplexity}): NaN in the model?")
    return min(max(entropy, 0.0), float(np.log(observation.n_tokens))), max(perplexity, 1.0)


def protect(s, budget, window, sinks=SINKS):
    """Give the sinks and the window's tokens an infinite score. Where they alone exceed the budget, fewer window tokens."""
    s, T = s.clone(), s.shape[-1]
    s[..., :sinks] = torch.inf
    s[..., T - min(window, budget - sinks, T):] = torch.inf
    return s


def highest(s, n):
    """Which n entries of each row score highest, (..., N) -> (..., N) bool, in O(N); all of them where n exceeds N.

    Ties go to the earlier entry, so that the choice is deterministic and a larger budget keeps a superset.
    """
    n = min(n, s.shape[-1])
    least = s.kthvalue(s.shape[-1] - n + 1, dim=-1, keepdim=True).values  # (..., 1) the lowest score that finds a place
    above, ties = s > least, s == least
    return above | (ties & (ties.cumsum(-1) <= n - above.sum(-1, keepdim=True)))  # of the ties, the first that still fit


def top(s, budget):
    """Positions of the `budget` highest scores of each row, sorted: (..., T) -> (..., min(budget, T))."""
    return highest(s, budget).nonzero()[:, -1].view(*s.shape[:-1], -1)


def positions_of(chosen):
    """Positions of the True entries, sorted, padded with -1: (L, n_sets, T) bool -> L tensors (n_sets, most of any set)."""
    L, n_sets, _ = chosen.shape
    positions = chosen.nonzero()[:, 2].split(chosen.sum(-1).flatten().tolist())  # one (kept,) for each set, layer by layer
    return [pad_sequence(positions[i:i + n_sets], batch_first=True, padding_value=-1) for i in range(0, L * n_sets, n_sets)]


def tokens_kept(kept):
    """How many tokens each layer keeps, a mean over its sets: L position tensors (n_sets, S_l) -> (L,) float64."""
    return np.array([(positions >= 0).sum().item() / len(positions) for positions in kept])


def gate(s, tau, budget, cap=1):
    """Eq. 8: candidates score at least tau; the kept set is the candidates, or their top scores if they exceed the budget.

    s: (L, n_sets, T) with protected tokens at infinity; tau: (L,), or None for no gate. Returns L tensors as of `positions_of`. The
    sets of a layer compete for its n_sets * budget entries. With a cap above 1, layers compete too, for the budgets of all: each may
    keep up to cap budgets, its best half budget is safe from the others, and beyond that the highest s / tau of all layers
    find a place, as if all thresholds rose in proportion until the candidates fit. So the ratios of tau share tokens out among
    layers. Fewer candidates than the budget stay fewer: else the gate would do nothing. tau may stand on the CPU, where tables
    are, and s on another device.
    """
    L, n_sets, T = s.shape
    s = s.reshape(L, -1)  # -> (L, n_sets T)
    if tau is None:
        return positions_of(highest(s, n_sets * budget).view(L, n_sets, T))
    chosen, tau = highest(s, cap * n_sets * budget), tau.to(s.device)[:, None]  # (L, n_sets T), (L, 1)
    if cap > 1:
        best = s[chosen].view(L, -1)  # (L, at most cap n_sets budget), which are enough to fill all budgets from any layers
        ratio = best / tau.clamp_min(1e-6)  # by how much the thresholds may rise before an entry falls
        ratio[highest(best, (n_sets * budget + 1) // 2)] = torch.inf
        chosen = chosen.masked_scatter(chosen, highest(ratio.flatten(), L * n_sets * budget))
    return positions_of((chosen & (s >= tau)).view(L, n_sets, T))


def kept_tokens(u, W, tau, budget, window, n_sets, cap):
    """Stages 2 and 3 for every layer: utility after `spread` (L, H, T), W (L, H), tau (L,) or None -> L position tensors (n_sets, S_l).

    W and tau may stand on the CPU, where tables are, and u on another device.
    """
    return gate(protect(head_score(u, W.to(u.device), n_sets), budget, window), tau, budget, cap)


def select_compilerkv(observation, cache, budget, tables, name="compilerkv"):
    """CompilerKV, end to end: three table look-ups and a clamp. Without tables W = 1, tau = 0 and the default rule."""
    settings, (L, H), G = SETTINGS[name], observation.shape[:2], cache.k[0].shape[1]
    entropy, perplexity = risk(observation, settings.window)  # refuses NaN, with tables or without
    (window, kernel), W, tau = settings.rules[0], torch.ones(L, H), torch.zeros(L)
    if tables is not None:
        (window, kernel), W, tau = tables.look_up(name, budget, entropy, perplexity)
    u = spread(utility(observation, cache, settings, window), window, kernel)  # (L, H, T)
    kept = kept_tokens(u, W, tau, budget, window, settings.n_sets(G), settings.cap)
    return [positions.expand(G, -1) for positions in kept]  # (1, S_l) or (G, S_l) -> (G, S_l)


def select_compilerkv_paper(observation, cache, budget, tables):
    """CompilerKV with the paper's literal alpha, window and action grids."""
    return select_compilerkv(observation, cache, budget, tables, "compilerkv-paper")


# -------------------------------------------------------------------------------------------------------- the rivals

def by_kv_head(per_query_head, G):
    """Mean over the query heads that share a KV head: (L, H, T) -> (L, G, T)."""
    L, H, T = per_query_head.shape
    return per_query_head.view(L, G, H // G, T).mean(2)


def select_full(observation, cache, budget, tables):
    """Keep everything: the score to reach."""
    return list(top(torch.zeros(len(cache.k), cache.k[0].shape[1], observation.n_tokens), observation.n_tokens))


def select_random(observation, cache, budget, tables):
    """Sinks, window and random others: the floor. Seeded by the prompt's length, so that a prompt always gets the same."""
    generator = torch.Generator().manual_seed(observation.n_tokens)
    s = torch.rand(len(cache.k), cache.k[0].shape[1], observation.n_tokens, generator=generator)
    return list(top(protect(s, budget, WINDOW), budget))


def select_streaming(observation, cache, budget, tables):
    """StreamingLLM (arXiv 2309.17453): the sinks and the most recent tokens."""
    s = torch.zeros(len(cache.k), cache.k[0].shape[1], observation.n_tokens)
    return list(top(protect(s, budget, budget - SINKS), budget))


def select_h2o(observation, cache, budget, tables):
    """H2O (arXiv 2306.14048): half the budget for recent tokens, half for those that ALL queries attended to most."""
    if observation.total is None:
        raise ValueError("H2O needs prefill(..., total=True)")
    s = by_kv_head(observation.total, cache.k[0].shape[1])  # (L, G, T)
    s[..., -(budget // 2):] = torch.inf
    return list(top(s, budget))


def snapkv_score(observation, G, kernel=7, pooled=F.max_pool1d):
    """SnapKV's score, (L, G, T): the window's mean attention on the tokens before it, pooled, by KV head; the window on top."""
    window = min(WINDOW, observation.n_tokens - 1)
    before = attention_level(observation, window, "head")[..., :observation.n_tokens - window]  # (L, H, T - w)
    s = by_kv_head(pooled(before, kernel, stride=1, padding=kernel // 2), G)
    return F.pad(s, (0, window), value=torch.inf)


def select_snapkv(observation, cache, budget, tables, **how):
    """SnapKV (arXiv 2404.14469): each KV head keeps what the window's queries attend to. how: see `snapkv_score`."""
    return list(top(snapkv_score(observation, cache.k[0].shape[1], **how), budget))


def pyramid_budgets(budget, n_layer, window, n_tokens, beta=20):
    """PyramidKV's sizes: window + a share falling linearly with depth, from 2 - 1/beta to 1/beta of the mean; same total."""
    mean = budget - window
    steep = min(1 - 1 / beta, (n_tokens - window) / mean - 1) if n_tokens > budget else 0  # no layer has more than all
    share = mean * (1 + steep * np.linspace(1, -1, n_layer) * (n_layer > 1))
    edges = np.round(np.concatenate(([0], np.cumsum(share)))).astype(int)  # rounded sums: exact total
    return (window + np.diff(edges)).tolist()


def select_pyramidkv(observation, cache, budget, tables):
    """PyramidKV (arXiv 2406.02069): SnapKV with more tokens in low layers and fewer in high ones."""
    s = snapkv_score(observation, cache.k[0].shape[1])
    return [top(row, n) for row, n in zip(s, pyramid_budgets(budget, len(s), WINDOW, observation.n_tokens))]


def select_dynamickv(observation, cache, budget, tables):
    """DynamicKV (arXiv 2412.14838): SnapKV; a layer's size is its share of the best scores of all layers."""
    s = snapkv_score(observation, cache.k[0].shape[1])  # (L, G, T)
    L, G, _ = s.shape
    before = s[..., :max(s.shape[2] - WINDOW, 0)].flatten(1)  # (L, G (T - w))
    best = before.flatten().topk(min(L * G * (budget - WINDOW), before.numel())).indices
    sizes = torch.bincount(best // max(before.shape[1], 1), minlength=L) // G  # (L,) tokens beside the window
    return [top(row, WINDOW + n) for row, n in zip(s, sizes.tolist())]


def select_adakv(observation, cache, budget, tables, **how):
    """AdaKV (arXiv 2407.11550) over SnapKV: KV heads compete for their layer's entries; a fifth of the budget is safe for each."""
    s = snapkv_score(observation, cache.k[0].shape[1], **how)  # (L, G, T)
    s = s.scatter(-1, top(s, budget // 5), torch.inf)
    return gate(s, None, budget)


def select_tova(observation, cache, budget, tables):
    """TOVA (arXiv 2401.06104): what the last query attends to, mean over heads, one set a layer; and itself."""
    s = attention_level(observation, 1, "layer").expand(-1, cache.k[0].shape[1], -1).clone()  # (L, 1, T) -> (L, G, T)
    s[..., -1] = torch.inf
    return list(top(s, budget))


def select_knorm(observation, cache, budget, tables):
    """K-norm (arXiv 2406.11430): the keys of smallest length; no attention is read."""
    return list(top(-vector_lengths(cache, 0), budget))


def select_lacache(observation, cache, budget, tables):
    """LaCache (arXiv 2507.14204): sinks, recent tokens for half the budget, and a ladder of spans, later ones in deeper layers."""
    L, T, recent = len(cache.k), observation.n_tokens, budget // 2
    s, span = torch.zeros(L, cache.k[0].shape[1], T), budget - SINKS - recent
    for l in range(L):
        start = SINKS + round(l / max(L - 1, 1) * max(T - SINKS - recent - span, 0))
        s[l, :, start:start + span] = 1
    return list(top(protect(s, budget, recent), budget))


def select_razor(observation, cache, budget, tables):
    """After RazorAttention (arXiv 2407.15891): the KV heads that look back most keep all, the others sinks and recent tokens.

    Which look back was found offline, see Tables.retrieval. As many keep all as leave the others their sinks and window.
    """
    if tables is None:
        raise ValueError("razor needs compiled tables: they tell which heads retrieve")
    L, G, T = len(cache.k), cache.k[0].shape[1], observation.n_tokens
    n_all = min(L * G * (budget - MIN_BUDGET) // max(T - MIN_BUDGET, 1), L * G)  # n_all T + (L G - n_all) MIN_BUDGET <= L G budget
    recent = (L * G * budget - n_all * T) // max(L * G - n_all, 1) - SINKS  # what is left, evenly
    rank = torch.from_numpy(tables.retrieval).view(L, G, -1).amax(2).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(L * G, T, dtype=torch.bool)
    chosen[:, :SINKS] = chosen[:, max(T - recent, 0):] = True
    chosen[rank[:n_all]] = True
    return positions_of(chosen.view(L, G, T))


def select_hindsight(observation, cache, budget, tables):
    """ORACLE, not a policy: keeps what the right answer's own queries attend to most. Shows how little can be lost."""
    if observation.answer is None:
        raise ValueError("hindsight needs the answer's attention, see Observation.answer")
    return list(top(by_kv_head(observation.answer, cache.k[0].shape[1]) * value_norm(cache), budget))


POLICIES = {
    "full": select_full, "random": select_random, "streaming": select_streaming, "lacache": select_lacache, "knorm": select_knorm,
    "tova": select_tova, "h2o": select_h2o, "snapkv": select_snapkv, "pyramidkv": select_pyramidkv, "dynamickv": select_dynamickv,
    "adakv": select_adakv, "razor": select_razor, "compilerkv-paper": select_compilerkv_paper, "compilerkv": select_compilerkv,
    "hindsight": select_hindsight,
}


def check_budget(budget):
    """Raise UserError for a budget that cannot hold the sinks and the window."""
    if budget < MIN_BUDGET:
        raise UserError(f"a budget of {budget} tokens a layer is too small: policies keep up to {WINDOW} last and {SINKS} first "
                        f"tokens in any case, so give at least {MIN_BUDGET}")


def select(policy, observation, cache, budget, tables=None):
    """Positions that a policy keeps, one sorted (G, S_l) tensor a layer. Raises UserError for an unknown policy or too small a budget."""
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r}: choose from {', '.join(POLICIES)}")
    check_budget(budget)
    return POLICIES[policy](observation, cache, budget, tables)


def evict(cache, *kept):
    """A new cache of the kept slots only, one row for each kept set, L x (G, S_l).

    cache: a batch of one as prefill made it, slot t = position t. Where a KV head keeps fewer tokens than another of its
    layer, in any row, its last slots are padding (position -1): no query sees them.
    """
    k, v, slots, length = [], [], [], []
    for l, sets in enumerate(zip(*kept)):  # of one layer: a (G, S_l) for each row
        G, C = cache.k[l].shape[1:3]
        positions = pad_sequence([s.T for s in sets], True, -1).transpose(1, 2).to(cache.k[l].device)  # (rows, G, S)
        length.append(positions.shape[2])
        positions = F.pad(positions, (0, SPARE_SLOTS), value=-1)  # room for what is decoded: C' = S + SPARE_SLOTS
        index = positions.clamp(min=0) + C * torch.arange(G, device=positions.device)[:, None]  # into (G C, D), the flat cache
        k.append(F.embedding(index, cache.k[l].flatten(0, 2)))  # picks rows of a matrix: (rows, G, C') of (G C, D) -> (rows, G, C', D)
        v.append(F.embedding(index, cache.v[l].flatten(0, 2)))
        slots.append(positions)
    return KVCache(k, v, slots, cache.next_position.expand(len(kept)), length)


# --------------------------------------------------------------------------------------------------- compiled tables

@dataclass
class Compiled:
    """The three tables learned for one of SETTINGS, and the bins that index the gate."""
    rules: np.ndarray          # (budgets, 2) window and kernel
    W_head: np.ndarray         # (budgets, L, H)
    T_gate: np.ndarray         # (budgets, L, 20, 4)
    entropy_edges: np.ndarray  # (19,) ascending, nats
    ppl_edges: np.ndarray      # (3,) ascending


@dataclass
class Tables:
    """What offline compilation leaves: one .npz of some 15 kilobytes, valid for one model only."""
    budgets: np.ndarray   # (budgets,) tokens a layer that were compiled; others use the nearest in ratio
    fingerprint: str      # of the model's weights file
    compiled: dict        # a name of SETTINGS -> Compiled
    retrieval: np.ndarray  # (L, H) share of the attention, while answering, on what is neither sink nor window
    provenance: dict = field(default_factory=dict)  # how the tables were made, JSON-serialisable

    def nearest(self, budget):
        """Index of the compiled budget that is nearest in ratio."""
        return int(np.abs(np.log(self.budgets / budget)).argmin())

    def look_up(self, name, budget, entropy, perplexity):
        """The rule (window, kernel), W_head (L, H) and tau (L,) for one prompt's risk: O(1) in its length."""
        c, b = self.compiled[name], self.nearest(budget)
        e, p = risk_bin(entropy, c.entropy_edges), risk_bin(perplexity, c.ppl_edges)
        return tuple(map(int, c.rules[b])), torch.from_numpy(c.W_head[b]).float(), torch.from_numpy(c.T_gate[b, :, e, p]).float()

    def save(self, path):
        """Write to a temporary file, then rename: a reader sees the old tables or the new ones, never half of them."""
        arrays = {f"{name}/{key}": value for name, c in self.compiled.items() for key, value in vars(c).items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, budgets=self.budgets, fingerprint=self.fingerprint, retrieval=self.retrieval,
                            provenance=json.dumps(self.provenance), **arrays)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path, model):
        """Read and validate tables for `model`. Raises UserError if missing, damaged, or of another model."""
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {key: file[key] for key in file.files}
            compiled = {name: Compiled(*(data[f"{name}/{part.name}"] for part in fields(Compiled))) for name in SETTINGS}
            tables = cls(data["budgets"], str(data["fingerprint"]), compiled, data["retrieval"], json.loads(str(data["provenance"])))
        except FileNotFoundError:
            raise UserError(f"{path}: no such tables; compile them with `python train_tables.py`") from None
        except Exception as error:  # zipfile and numpy raise a dozen kinds on a damaged file
            raise UserError(f"{path}: damaged tables file ({error}); compile it anew with `python train_tables.py`") from None
        if tables.fingerprint != model.fingerprint:
            raise UserError(f"{path}: these tables were compiled for another model (weights {tables.fingerprint[:12]}, "
                            f"here {model.fingerprint[:12]}); compile them with `python train_tables.py --model FILE`")
        tables.validate(path, model.config)
        return tables

    def validate(self, path, config):
        """Raise UserError unless every array has the shape the model needs and finite, ordered entries."""
        n = self.budgets.size
        if self.budgets.dtype.kind != "i" or self.budgets.shape != (n,) or n == 0 or not (self.budgets >= MIN_BUDGET).all():
            raise UserError(f"{path}: damaged tables file (budgets {self.budgets})")
        if self.retrieval.dtype.kind != "f" or self.retrieval.shape != (config.n_layer, config.n_head) or not np.isfinite(self.retrieval).all():
            raise UserError(f"{path}: damaged tables file (retrieval)")
        shapes = {"rules": (n, 2), "W_head": (n, config.n_layer, config.n_head), "T_gate": (n, config.n_layer, N_ENTROPY_BINS, N_PPL_BINS),
                  "entropy_edges": (N_ENTROPY_BINS - 1,), "ppl_edges": (N_PPL_BINS - 1,)}
        for name, compiled in self.compiled.items():
            for key, array in vars(compiled).items():
                if array.dtype.kind != "f" or array.shape != shapes[key] or not np.isfinite(array).all():
                    raise UserError(f"{path}: {name}/{key} has shape {array.shape} or entries that are not finite numbers; "
                                    f"expected {shapes[key]}")
                if key == "rules" and not set(map(tuple, array.tolist())) <= set(SETTINGS[name].rules):
                    raise UserError(f"{path}: {name}/rules has windows and kernels that are not among the method's")
                if key.endswith("edges") and (np.diff(array) < 0).any():
                    raise UserError(f"{path}: {name}/{key} is not ascending")


def risk_bin(value, edges):
    """Index of the bin that holds value: 0 .. len(edges), rising with value. Raises ValueError for NaN."""
    if np.isnan(value):
        raise ValueError("NaN has no risk bin")
    return int(np.searchsorted(edges, value, side="right"))


def write_atomically(path, data):
    """Write bytes or text to a temporary file beside path, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)  # an answer may hold half a character
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
