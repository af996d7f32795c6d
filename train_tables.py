"""Compile the tables offline, from experience with the real model: `python train_tables.py`.

1. Collect. Every calibration prompt is prefilled once.
2. Rule. A bandit on real roll-outs chooses for each budget the window and the width of the pool (ours; the paper has one rule). The
   reward is -(loss_compressed - loss_full): in the paper's reading the loss of the right continuation; in ours that against all that
   the full cache predicts along it, of which the right token alone tells less.
3. Heads, from two rewards. The value: a pass forth and back through the network tells of every cache entry, kept or not, by how much
   our loss would fall with it, to first order. In state (budget, layer, head), W_head is multiplied by a value of the grid, and the
   reward is the value of the entries that this lifts over the threshold, less the price of their places; one pass serves every state
   and action. The loss: random tables are rolled out for real, and all heads of a table share its reward. Layers compete meanwhile,
   as under the gate, with thresholds (random too where tables are) that every token reaches: under higher ones, a head would be paid
   for the tokens that a larger W adds.
4. Layers, given the heads. Where layers compete (ours), the ratios of T_gate over layers share tokens out: they are learned from the
   loss of random thresholds, one direction for all budgets, because budgets apart tell little of a layer.
5. Let roll-outs decide. Every prompt is rolled out under the tables that the other kinds of prompts made, at several strengths, and
   a bandit chooses for each budget: first how far the layers go, by the prompts that lose most, for the gate is there to control
   risk; then, given the layers, how far the heads go, where W = 1 stays unless the best is better by more than one standard error.
   What ships is learned from all prompts.
6. Gate. In state (budget, entropy bin, perplexity bin), all thresholds together take a level; the reward is that of real roll-outs
   less the paper's penalty for candidates beyond the budget.
Both readings of the method are compiled: the paper's (model scope, its grids) and ours (head scope, log-spaced grids).
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import compilerkv as ckv
import eval as evaluation
from bandit import ConservativeQ, EpsilonGreedy, LinUCB
from model import KVCache, UserError, last_attention, linear, load, rms_norm, whole_units

HERE = Path(__file__).parent
BUDGETS = (64, 128, 256, 512)
CONTINUATION = 24       # tokens of continuation scored at most (the paper: 128): more prompts tell more than longer ones
KINDS = 6               # the corpus lists its kinds in turn, so that every second round of them makes a fair half
TABLES = 8              # random W_head, and as many random T_gate, that every prompt rolls out for each budget, half of them mirror images
SPREAD = 1.2            # by how much such a table moves the log of each entry, up or down; from 0.8, twice as many tell as much
NOISE = 0.1             # nats; differences between a prompt's roll-outs that are smaller than this count less
# Strengths among which real roll-outs decide: the log of W at a head whose larger weight surely pays in value, and the standard deviation
# over heads of the log of the table learned from the loss; of layers the same, of 1 / threshold. They are few: the best of many would be
# the luckiest.
HEAD_STEPS = ((0.0, 0.0), (0.6, 0.0), (0.3, 0.1), (0.6, 0.2))
HEAD_START = (0.6, 0.2)  # beside which the layers are learned
LAYER_STEPS = ((0.0, 0.0), (0.0, 0.3))
WORST = 0.25            # share of the prompts, those that lose most, whose mean loss decides on the thresholds of layers
PRIOR = 30              # pseudo-experiences by which a rare gate state leans on the mean over all states
LEVELS = 2.0 ** np.arange(-4, 12, 0.1)  # constant thresholds among which `gate_sizes` finds the one that keeps as many tokens
ROWS = 8                # roll-outs in one batch, of like size: more would pad the small ones and outgrow the processor's cache
VALUE_SPREAD = 0.8      # by how much the random W around which values are taken move a head's log, in the grid's widest steps
VALUE_ROWS = 4          # passes forth and back in one batch, of budgets that are alike: more would pad the small ones


@dataclasses.dataclass
class Sample:
    """One calibration prompt, prefilled: all that learning needs."""
    u: dict              # (name of a setting, window) -> (L, H, T) utility of Eq. 4, un-pooled, float16
    risk: dict           # name of a setting -> (entropy, perplexity)
    looks_back: torch.Tensor  # (L, H) share of the continuation's attention on tokens that compete: does the head retrieve?
    cache: KVCache       # the full one
    logits: torch.Tensor  # (V,) of the last prompt token
    continuation: list   # n token ids
    hidden: torch.Tensor  # (n - 1, E) last hidden states of all but the last of them, from the full cache
    loss_full: float     # nats a token from the full cache
    losses: dict = dataclasses.field(default_factory=dict)  # (soft, digest of the kept sets) -> nats a token: no roll-out is made twice

    def pooled(self, name, rule):
        """Utility (L, H, T) as a rule (window, kernel) reads it, float32."""
        window, kernel = rule
        return ckv.spread(self.u[name, window].float(), window, kernel)

    def predicted(self, model):
        """What the full cache predicts after each of `hidden`'s tokens, probabilities (n - 1, V): `targets` of Model.nll."""
        return torch.softmax(model.logits(self.hidden), -1)


def read_prompts(path, limit):
    """Calibration prompts from JSON lines. Raises UserError naming file and line."""
    def read(row):
        if not all(isinstance(row[key], str) and row[key] for key in ("id", "prompt", "continuation")):
            raise TypeError("id, prompt and continuation must be non-empty strings")
        if not isinstance(row["chat"], bool):
            raise TypeError("chat must be true or false")
        return row

    try:
        prompts = evaluation.json_lines(path, "prompt", read)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --data needs the calibration corpus, as JSON lines") from None
    if len(prompts) <= KINDS:
        raise UserError(f"{path}: {len(prompts)} prompts are too few to learn from and to decide on")
    return prompts[:limit]


# ------------------------------------------------------------------------------------------------------------- collect

def collect(model, prompt):
    """Prefill one prompt, look at what its continuation attends to, and keep what learning needs."""
    tokenizer = model.tokenizer
    tokens = tokenizer.chat(prompt["prompt"]) if prompt["chat"] else tokenizer.encode(prompt["prompt"])
    answer = prompt["continuation"].rstrip("\n")
    if len(tokens) <= ckv.MAX_WINDOW + ckv.SINKS:
        raise UserError(f"calibration prompt {prompt['id']}: {len(tokens)} tokens are too few to compress; give more than "
                        f"{ckv.MAX_WINDOW + ckv.SINKS}")
    if not tokenizer.encode(answer, begin=False):
        raise UserError(f"calibration prompt {prompt['id']}: no token of the vocabulary stands in its continuation")
    # As in an evaluation, what ends the answer is part of it: a cache that forgot how to answer loses there.
    continuation = evaluation.with_end(tokenizer, answer, prompt["chat"])[:CONTINUATION]
    logits, cache, observation = model.prefill(tokens, ckv.MAX_WINDOW)
    ids = torch.tensor(continuation, device=model.device)  # (n,)
    hidden, queries, _ = model.forward(ids[None], cache, observe=len(ids))  # (1, n, E)
    loss_full = F.cross_entropy(torch.cat((logits[None], model.logits(hidden[0, :-1]))), ids).item()
    attention = torch.stack([A[..., :len(tokens)] for A in last_attention(queries, cache)]).float()  # L x (H, n, T + n) -> (L, H, n, T)
    cache.rewind(len(continuation))
    # In one piece: thousands of tensors that stay leave as many holes, through which the memory allocator would search from then on.
    cache.k, cache.v, cache.slots = (list(torch.stack(part)) for part in (cache.k, cache.v, cache.slots))
    window = min(w for w, _ in ckv.OURS.rules)
    looks_back = attention[..., ckv.SINKS:len(tokens) - window].sum(-1).mean(2)  # (L, H, n, T) -> (L, H)
    u = {(name, w): ckv.utility(observation, cache, s, w).half().cpu() for name, s in ckv.SETTINGS.items() for w in {w for w, _ in s.rules}}
    risks = {name: ckv.risk(observation, s.window) for name, s in ckv.SETTINGS.items()}
    return Sample(u, risks, looks_back.cpu(), cache, logits, continuation, hidden[0, :-1], loss_full)


# --------------------------------------------------------------------------------------------------------------- learn

def mask_of(kept, T):
    """Which entries are kept, (L, n_sets, T) bool, of L position tensors (n_sets, S_l); the inverse of `ckv.positions_of`."""
    return torch.stack([torch.zeros(len(k), T + 1, dtype=torch.bool).scatter(1, k % (T + 1), True)[:, :T] for k in kept])  # -1 is entry T


def token_values(model, sample, *kept):
    """By how much, to first order, the loss is lower where a cache entry is kept than where it is not, in nats a token: (B, L, G, T).

    The loss is the cross-entropy with what the full cache predicts (`Sample.predicted`).
    kept: for each of B rows L position tensors (n_sets, S_l), around which the loss is linearised. An entry of value v and score z
    (against the log-sum-exp of all that the query sees) moves the attention output o by sigmoid(z) (v - o): exact for an entry that
    joins the kept set alone, and times the gradient of the loss the entry's effect. Its own share is within o if it is kept already.
    """
    c, ids, T, B = model.config, sample.continuation, sample.cache.length[0], len(kept)
    n, G, D, values = len(ids) - 1, c.n_kv_head, c.head_dim, torch.zeros(B, c.n_layer, c.n_kv_head, T)
    if n == 0:  # the one token is predicted by the prompt's own logits
        return values
    small = ckv.evict(sample.cache, *([k.expand(G, -1) for k in row] for row in kept))
    positions = T + torch.arange(n, device=model.device)[None]  # (1, n)
    cos, sin = model.rotation(positions)
    x, layers = model.embedding[torch.tensor([ids[:-1]] * B, device=model.device)].requires_grad_(), []  # (B, n, E)
    for l, block in enumerate(model.blocks):  # as in Model.forward, but attention is written out, for its output's gradient
        q = model.project(l, rms_norm(x, block.attn_norm, c.norm_eps), small, positions, cos, sin).view(B, G, -1, n, D) / D ** 0.5
        k, v, slots = whole_units(*small.layer(l))  # of the kept and the n new: (B, G, S, D) twice, (B, G, S)
        z = (q.flatten(2, 3) @ k.transpose(2, 3)).float().view(B, G, -1, n, k.shape[2])  # (B, G, R n, D) @ (B, G, D, S) -> (B, G, R, n, S)
        slots = slots[:, :, None, None]  # (B, G, 1, 1, S)
        unseen = (slots < 0) | (slots > positions[0, :, None])  # (B, G, 1, n, S)
        z = z + torch.zeros(unseen.shape, device=x.device).masked_fill_(unseen, -torch.inf)
        A = torch.softmax(z, -1)
        o = (A.to(v.dtype).flatten(2, 3) @ v).view_as(q)  # (B, G, R n, S) @ (B, G, S, D) -> (B, G, R, n, D)
        o.retain_grad()
        total = z.detach().amax(-1, keepdim=True) - A.detach().amax(-1, keepdim=True).log()  # log-sum-exp: a score less its log share
        layers.append((q.detach(), total, o))
        x = x + linear(o.view(B, -1, n, D).transpose(1, 2).flatten(2), block.out)  # (B, H, n, D) -> (B, n, E)
        gate, up = linear(rms_norm(x, block.ffn_norm, c.norm_eps), block.gate_up).chunk(2, dim=-1)
        x = x + linear(F.silu(gate) * up, block.down)
    logits = model.logits(rms_norm(x, model.norm, c.norm_eps))  # (B, n, V)
    targets = sample.predicted(model).repeat(B, 1)  # (B n, V)
    (F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(ids)).backward()  # a row's gradient is its own loss's
    rows = lambda x: x.transpose(0, 1).flatten(1, 3)  # (B, G, R, n, any) -> (G, B R n, any): all rows read the same keys and values
    for l, (q, total, o) in enumerate(layers):  # total: the log-sum-exp, (B, G, R, n, 1)
        k, v = (x[0].contiguous().transpose(1, 2) for x in sample.cache.layer(l)[:2])  # of all: (G, D, T)
        joins = (rows(q) @ k).float().sub_(rows(total)).sigmoid_()  # (G, B R n, T)
        before = (o.grad * o.detach()).sum(-1, keepdim=True, dtype=torch.float32)  # slope o: (B, G, R, n, 1)
        worth = joins.mul_((rows(o.grad) @ v).float().sub_(rows(before)))  # (G, B R n, T)
        values[:, l] = -worth.view(G, B, -1, T).sum(2).transpose(0, 1).cpu()  # -> (G, B, T) -> (B, G, T)
    return values


def moved(u, W, n_sets, budget, window, kept, values, grid):
    """What every action moves over the threshold: its value and its entries' number, each (L, H + 1, A), from those of action 1.

    Action: the weight of a query head, or (column H) of all heads of a layer, which is what dividing its threshold does, is multiplied
    by a value of the grid. u (L, H, T) after `spread`, W (L, H), kept: L tensors (n_sets, S_l), values (L, G, T).
    """
    (L, H, T), grid = u.shape, torch.tensor(grid, dtype=torch.float32)
    s = ckv.head_score(u, W, n_sets)  # (L, n_sets, T)
    free = ckv.protect(s, budget, window) < torch.inf
    least = torch.where(mask_of(kept, T) & free, s, torch.inf).amin((1, 2))[:, None]  # (L, 1) the threshold: nothing moves if only protected are kept
    values = values.view(L, n_sets, -1, T).sum(2)  # (L, G, T) -> (L, n_sets, T)
    out = torch.zeros(2, L, H + 1, len(grid) + 1)

    def book(column, scores, movable, worth):
        """Of the movable entries (L, N), each one's worth and its number, at the first action that lifts its score over the threshold."""
        first = torch.bucketize(least / scores, grid)  # (L, N), up to A: none does
        for total, x in zip(out, (worth * movable, movable.float())):
            total[:, column].scatter_add_(1, first, x)

    book(H, s.flatten(1), free.flatten(1), values.flatten(1))
    weighted, R = (W[:, :, None] * u).view(L, n_sets, -1, T), H // n_sets  # (L, n_sets, R, T)
    for h in range(H):
        g = h // R
        others = torch.cat((weighted[:, g, :h % R], weighted[:, g, h % R + 1:]), dim=1)  # (L, R - 1, T)
        mine = free[:, g] & ~(others >= least[:, :, None]).any(1)  # (L, T) entries that this head alone can lift
        book(h, weighted[:, g, h % R], mine, values[:, g])
    out = out[..., :-1].cumsum(-1)  # what a smaller weight lifts, a larger one lifts too
    return out - out[..., grid.tolist().index(1.0), None]


def random_logs(rng, n, *shape):
    """Logs of n random tables, (n, *shape), in units of their spread: every entry goes up or down by 1.

    Only ratios along the last axis are of interest, of the KV heads of a layer or of all layers, so that the mean is 0 there.
    """
    x = rng.choice((-1.0, 1.0), size=(n, *shape))
    return x - x.mean(-1, keepdims=True)


def value_log(model, samples, name, rules, tau, budgets, rng, progress):
    """The complete log of these prompts: what every action pays in every state, (P, budgets, L, H, A) nats a token.

    States and actions: see `moved`, of heads alone: whole layers only tell the price. A prompt tries them around a random W for
    each budget and around its mirror image, so that the log holds in the neighbourhood of W = 1, not only there. Places are
    limited, so every moved entry pays the price of one: what entries are worth on average, to this prompt at this budget, that
    the next action above and below moves where every layer takes it.
    """
    settings, c, logs = ckv.SETTINGS[name], model.config, []
    tau, n_sets = None if tau is None else torch.as_tensor(tau, dtype=torch.float32), settings.n_sets(c.n_kv_head)
    reach, neutral = VALUE_SPREAD * np.log(settings.W_grid[-1]), settings.W_grid.index(1.0)
    for sample in samples:
        found, tables = torch.zeros(len(budgets), 2, c.n_layer, c.n_head + 1, len(settings.W_grid)), []
        for b, x in enumerate(random_logs(rng, len(budgets), c.n_layer, c.n_kv_head)):
            if budgets[b] > rules[b][0] + ckv.SINKS:  # else only protected entries fit, and none can move
                u = sample.pooled(name, rules[b])  # (L, H, T)
                for W in torch.from_numpy(by_head(np.exp(reach * np.stack((x, -x))), c.n_head)).float():  # (L, H)
                    tables.append((b, u, W, ckv.kept_tokens(u, W, tau, budgets[b], rules[b][0], n_sets, settings.cap)))
        for i in range(0, len(tables), VALUE_ROWS):
            batch = tables[i:i + VALUE_ROWS]
            for (b, u, W, kept), values in zip(batch, token_values(model, sample, *(kept for *_, kept in batch))):
                found[b] += moved(u, W, n_sets, budgets[b], rules[b][0], kept, values, settings.W_grid)
        for moves, entries in found:  # (L, H + 1, A) each
            value, count = (x[:, -1, neutral + 1] - x[:, -1, neutral - 1] for x in (moves, entries))
            logs.append((moves - value.sum() / max(count.sum(), 1) * entries)[:, :-1].numpy())  # (L, H, A)
        progress.update(2 * len(budgets))
    return np.stack(logs).astype(float).reshape(len(samples), len(budgets), *logs[0].shape)


def evened(r, states):
    """Rewards (P, ...) counted in each prompt's root mean square over these axes, plus its median over prompts.

    So no prompt outvotes the others, and one with little at stake counts less.
    """
    size = np.sqrt(np.square(r).mean(states, keepdims=True))
    return r / (size + np.median(size, axis=0) + 1e-12)


def lent(n):
    """What each of n budgets counts for each, (n, n): neighbours lend 0.7 of what they saw, those two steps apart half of it."""
    return 0.7 ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def of_complete_log(log):
    """A bandit that has seen what every action of every state paid every prompt: log (P, S, A)."""
    bandit = EpsilonGreedy(*log.shape[1:])
    _, states, actions = np.indices(log.shape)
    bandit.update(states.ravel(), actions.ravel(), log.ravel())
    return bandit


def direction(log):
    """How surely the largest action pays more than the smallest, against other states of the last axis: (budgets, ..., S), -1 to 1.

    log (P, budgets, ..., S, A).
    """
    r = log[..., -1] - log[..., 0]  # (P, budgets, ..., S)
    r = r - r.mean(-1, keepdims=True)
    r = evened(r, tuple(range(2, r.ndim)))
    r = np.einsum("bc,pc...->pb...", lent(r.shape[1]), r)
    step = of_complete_log(r.reshape(len(r), -1, 1)).confidence().reshape(r.shape[1:])
    return step - step.mean(-1, keepdims=True)


def by_head(x, n_head):
    """One weight for each KV head, (..., G), as one for each of its query heads: (..., H)."""
    return np.repeat(x, n_head // x.shape[-1], axis=-1)


def loss_log(model, samples, name, budgets, shapes, job_of, rng, progress):
    """Random tables, rolled out for real: their logs (P, budgets, TABLES, entries) and what they paid (P, budgets, TABLES).

    shapes: of the parts of a table, whose entries follow one another in the log; job_of(budget's number, log of each part) -> a job
    of `roll_out`. A prompt's rewards at one budget are counted from their mean, in standard deviations, so that no prompt outvotes
    the others.
    """
    logs, rewards = [], []
    for sample in samples:
        parts = []
        for shape in shapes:
            x = SPREAD * random_logs(rng, len(budgets) * TABLES // 2, *shape).reshape(len(budgets), -1, *shape)
            parts.append(np.concatenate((x, -x), axis=1))  # with mirror images: (budgets, TABLES, *shape)
        jobs = [job_of(b, *table) for b in range(len(budgets)) for table in zip(*(x[b] for x in parts))]
        r = -roll_out(model, sample, name, jobs).reshape(len(budgets), -1)  # (budgets, TABLES)
        logs.append(np.concatenate([x.reshape(*r.shape, -1) for x in parts], axis=-1))
        rewards.append((r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + NOISE))
        progress.update(r.size)
    return np.stack(logs), np.stack(rewards)


def loss_direction(logs, rewards, n, shares):
    """The direction (budgets, n) in which the log of a table's first n entries should go by `loss_log`, with a standard deviation of 1.

    It is what LinUCB's regression of the rewards on the logs of the tables finds: one action, to use the table. shares (budgets,
    budgets): what each budget's experiences count for each.
    """
    steps = []
    for weight in np.sqrt(shares):  # (budgets,): a regression counts the squares
        x = (weight[:, None, None] * logs).reshape(rewards.size, -1)  # (P, budgets, TABLES, entries) -> (P budgets TABLES, entries)
        bandit = LinUCB(x, 1)
        bandit.update(np.arange(len(x)), np.zeros(len(x), dtype=int), (weight[:, None] * rewards).ravel())
        steps.append(bandit.theta()[0, :n])
    return np.stack([step / (step.std() + 1e-12) for step in steps])


def at_strengths(steps, value, loss):
    """Candidates for a table: {what it is: exp(x value + y loss)} for the strengths (x, y); value and loss of the shape of the table."""
    title = lambda x, y: ", ".join(f"{what} {step:g}" for what, step in (("value", x), ("loss", y)) if step) or "neutral"
    return {title(x, y): np.exp(x * value + y * loss) for x, y in steps}


def learn_heads(name, log, losses=None, steps=HEAD_STEPS):
    """Candidates for W_head from what some prompts paid: {what it is: table (budgets, L, H)}. log: `value_log`, losses: `loss_log`."""
    grid = ckv.SETTINGS[name].W_grid
    if losses is None:  # the paper's reading: a head has the action that clearly pays, or 1
        bandit = of_complete_log(log.reshape(len(log), -1, len(grid)))
        table = np.array(grid)[bandit.cautious(grid.index(1.0))].reshape(log.shape[1:-1])
        return {"neutral": np.ones_like(table), "value": table}
    L, H = log.shape[2:4]  # of (P, budgets, L, H, A)
    G = losses[0].shape[-1] // L - 1  # an entry of the log for each of L G heads, then one for each layer
    loss = loss_direction(*losses, L * G, lent(log.shape[1])).reshape(-1, L, G)  # (budgets, L G) -> (budgets, L, G)
    return at_strengths(steps, direction(log), by_head(loss, H))


def learn_layers(losses):
    """Candidates for what divides the thresholds of layers, {what it is: (budgets, L)}; losses: `loss_log` of random thresholds."""
    logs, rewards = losses
    n_budgets, L = rewards.shape[1], logs.shape[-1]
    # A lower threshold is a larger weight.
    return at_strengths(LAYER_STEPS, 0.0, loss_direction(logs, rewards, L, np.ones((n_budgets, n_budgets))))


def named(budgets, actions, rewards):
    """Mean losses by budget and action, for the evidence: rewards (budgets, actions)."""
    return {str(b): dict(zip(map(str, actions), (-r).round(4).tolist())) for b, r in zip(budgets, rewards)}


def compare_learners(log, held_out, seed):
    """Every bandit on the same stream: each prompt asks once for an action of each state and pays its reward. Conservative Q
    is made for logs of others: it sees the rewards of random actions, and its regret is that of its greedy table so far.

    log (P, S, A): what each action would pay; held_out: the same of other prompts. Returns {name: (cumulative regret (P,)
    against each state's best fixed action in hindsight, mean held-out reward of the final greedy table)}.
    """
    P, S, A = log.shape
    scale = float(log.std()) or 1.0  # one learning rate, one width of confidence
    best, every, out = log.mean(0).max(-1), np.arange(S), {}  # best: (S,)
    neutral = int(np.abs(log).sum((0, 1)).argmin())  # W = 1, from whose rewards all are counted
    learners = {"random": EpsilonGreedy(S, A, epsilon=1.0, default=neutral), "epsilon-greedy": EpsilonGreedy(S, A, default=neutral),
                "LinUCB": LinUCB(np.eye(S), A), "conservative Q": ConservativeQ(S, A, default=neutral)}
    for name, learner in learners.items():
        rng, generator, regret = np.random.default_rng(seed), torch.Generator().manual_seed(seed), []
        for rewards in log:  # (S, A)
            offline = isinstance(learner, ConservativeQ)  # learns from random actions, not from its own
            actions = learner.greedy() if offline else learner.choose(every, rng)
            logged = rng.integers(A, size=S) if offline else actions
            learner.update(every, logged, (rewards[every, logged] / scale).astype(np.float32))
            if offline:
                learner.fit(generator)
            regret.append((best - rewards[every, actions]).sum())
        out[name] = np.cumsum(regret), float(held_out.mean(0)[every, learner.greedy()].mean())
    out["complete log, cautious"] = None, float(held_out.mean(0)[every, of_complete_log(log).cautious(neutral)].mean())
    return out


def describe_learners(log, budget, seed, say):
    """`compare_learners` on the values of heads at one budget, log (P, L, H, A): one half of the prompts is the stream, one judges."""
    stream, held_out = (evened(log[half], (1, 2, 3)).reshape(len(half), -1, log.shape[-1]) for half in halves(len(log)))  # (P, L H, A)
    out = {who: {"regret": None if regret is None else regret.round(4).tolist(), "held_out_reward": reward}
           for who, (regret, reward) in compare_learners(stream, held_out, seed).items()}
    for who, result in out.items():
        say(f"learner {who}, budget {budget}: cumulative regret "
            f"{'-' if result['regret'] is None else round(result['regret'][-1], 2)}, held-out reward {result['held_out_reward']:+.5f}")
    return {"budget": budget, **out}


def draw_learners(curves, budget, path):
    """Cumulative regret of every learner over the calibration prompts."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (regret, held_out) in curves.items():
        if regret is not None:
            axis.plot(np.arange(1, len(regret) + 1), regret, label=f"{name} (held-out reward {held_out:+.4f})")
    axis.set(xlabel="calibration prompts", ylabel="cumulative regret, all heads, in a prompt's own units",
             title=f"Learners of W_head on one stream, budget {budget}")
    axis.grid(alpha=0.3)
    axis.legend()
    evaluation.save_figure(figure, path)


def risk_bins(samples, name, edges):
    """The (entropy bin, perplexity bin) of every sample under one reading of the method."""
    return [tuple(ckv.risk_bin(x, e) for x, e in zip(sample.risk[name], edges)) for sample in samples]


def protected_scores(sample, name, rule, W, budget, n_sets):
    """What the gate compares with tau under W (L, H): (L, n_sets, T), infinite on protected tokens."""
    return ckv.protect(ckv.head_score(sample.pooled(name, rule), torch.from_numpy(W).float(), n_sets), budget, rule[0])


def learn_gate(model, samples, name, rules, W, layers, edges, budgets, progress):
    """T_gate (budgets, L, 20, 4) given W and the layers' multiples (budgets, L), from the paper's reward of real roll-outs.

    Also the prompts that visited each state (20, 4), and what all prompts lose on average without a gate and with it (budgets, 2).
    All layers share the level of a risk state: one loss a roll-out cannot tell 30 of them apart. A rare state leans on
    the mean over all by PRIOR pseudo-experiences; one that no prompt visited takes that mean's level.
    """
    settings, L = ckv.SETTINGS[name], W.shape[1]
    grid, n_states, n_sets = np.array(settings.tau_grid), ckv.N_ENTROPY_BINS * ckv.N_PPL_BINS, settings.n_sets(model.config.n_kv_head)
    states = [e * ckv.N_PPL_BINS + p for e, p in risk_bins(samples, name, edges)]
    taus = grid[:, None] * layers[:, None]  # (budgets, A, L)
    jobs = [(rules[b], W[b], tau, budget) for b, budget in enumerate(budgets) for tau in (None, *taus[b])]
    lost, rewards = [], []
    for sample in samples:
        lost.append(roll_out(model, sample, name, jobs).reshape(len(budgets), -1))  # (budgets, 1 + A): no gate first
        excess = []
        for b, budget in enumerate(budgets):
            s = protected_scores(sample, name, rules[b], W[b], budget, n_sets)
            candidates = np.array([float((s >= torch.from_numpy(tau).float()[:, None, None]).sum()) for tau in taus[b]]) / (L * n_sets)
            excess.append(np.maximum(candidates - budget, 0) / s.shape[-1])  # of tokens a layer
        rewards.append(-lost[-1][:, 1:] - settings.penalty * np.stack(excess))
        progress.update(lost[-1].size)
    T, a = np.empty((len(budgets), L, ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS)), np.arange(len(grid))
    mean_lost = np.empty((len(budgets), 2))
    for b in range(len(budgets)):
        bandit, mean = EpsilonGreedy(n_states, len(grid)), np.mean([r[b] for r in rewards], 0)
        for state, reward in zip(states, rewards):
            bandit.update(state, a, reward[b])
        for _ in range(PRIOR):
            bandit.update(np.arange(n_states)[:, None], a[None], mean[None])
        chosen = bandit.greedy()  # (n_states,)
        T[b] = layers[b][:, None, None] * grid[chosen].reshape(T.shape[2:])
        mean_lost[b] = np.mean([(x[b, 0], x[b, 1 + chosen[state]]) for x, state in zip(lost, states)], 0)
    return T, np.bincount(states, minlength=n_states).reshape(T.shape[2:]), mean_lost


# ------------------------------------------------------------------------------------------------- let the loss decide

def judge(name):
    """What `roll_out` measures under one reading of the method, for the reports."""
    return "divergence" if ckv.SETTINGS[name].soft else "dNLL"


def roll_out(model, sample, name, jobs):
    """What the continuation loses, nats a token, from one compressed cache for each job (rule, W (L, H), tau, budget): (N,).

    tau: (L,), or None for no gate. What counts is the loss of the right tokens less the full cache's own (dNLL); where settings are
    soft, of all that the full cache predicts after each of them (the Kullback-Leibler divergence). Jobs that keep the same tokens share
    a roll-out, also with earlier calls.
    """
    settings, G, which, sets = ckv.SETTINGS[name], model.config.n_kv_head, [], {}
    pooled = {rule: sample.pooled(name, rule) for rule in {job[0] for job in jobs}}  # once a rule, not once a job
    for rule, W, tau, budget in jobs:
        W, tau = (x if x is None else torch.as_tensor(x, dtype=torch.float32) for x in (W, tau))
        kept = ckv.kept_tokens(pooled[rule], W, tau, budget, rule[0], settings.n_sets(G), settings.cap)
        which.append((settings.soft, hashlib.sha256(b"".join(k.numpy().tobytes() for k in kept)).digest()))
        if which[-1] not in sample.losses:
            sets[which[-1]] = [k.expand(G, -1) for k in kept]
    targets, loss_full, ids = None, sample.loss_full, sample.continuation
    if settings.soft:  # the full cache's loss against itself: of the first token, and the entropy of what it predicts
        targets = sample.predicted(model)  # (n - 1, V)
        first = model.nll(sample.cache, sample.logits, ids[:1]).item()
        loss_full = (first + torch.special.entr(targets).sum().item()) / len(ids)
    keys = sorted(sets, key=lambda key: sum(k.shape[1] for k in sets[key]))  # sets of like size pad each other least
    for i in range(0, len(keys), ROWS):
        batch = ckv.evict(sample.cache, *(sets[key] for key in keys[i:i + ROWS]))
        sample.losses |= zip(keys[i:i + ROWS], model.nll(batch, sample.logits, ids, targets).tolist())
    return np.array([sample.losses[key] for key in which]) - loss_full


def choose(model, samples, name, budgets, actions, job_of, progress, cautious=False, worst=1.0, lend=False):
    """For each budget the action whose real roll-outs lose least; cautious: action 0 if that is not better by a standard error.

    job_of(sample's number, budget's number, action) -> a job of `roll_out`. worst: the share of the prompts, for
    each action those that lose most, whose mean counts; lend: other budgets count as in `lent`. Returns the indices of the chosen
    actions (budgets,) and these mean rewards, of each budget alone (budgets, actions).
    """
    rewards = []
    for i, sample in enumerate(samples):
        jobs = [job_of(i, b, action) for b in range(len(budgets)) for action in actions]
        rewards.append(-roll_out(model, sample, name, jobs).reshape(len(budgets), -1))
        progress.update(len(jobs))
    rewards = np.stack(rewards)  # (P, budgets, actions)
    mean = np.sort(rewards, axis=0)[:max(1, round(worst * len(samples)))].mean(0)  # (budgets, actions)
    weights = lent(len(budgets)) if lend else np.eye(len(budgets))
    gain = of_complete_log(np.einsum("bc,pca->pba", weights, rewards - rewards[..., :1]))  # counted from action 0 on the same prompt
    best, every = (weights @ mean).argmax(1), np.arange(len(budgets))
    clear = gain.values()[every, best] > gain.errors()[every, best]
    return np.where(clear, best, 0) if cautious else best, mean


def decide(model, samples, name, budgets, learn, job_of, progress, **how):
    """The tables (budgets, ...) at the strengths that lose least where other kinds of prompts made them, and the evidence as a dict.

    learn(prompts' numbers) -> candidates {what it is: tables (budgets, ...)}, the neutral one first; job_of(budget's number, table of
    that budget) -> a job of `roll_out`; how: see `choose`. What is returned is learned from all prompts.
    """
    n = len(samples)
    learned, by_kind, two = learn(slice(None)), list(map(learn, other_kinds(n))), list(map(learn, halves(n)))
    titles, every = list(learned), list(map(str, budgets))
    chosen, rewards = choose(model, samples, name, budgets, titles, lambda i, b, title: job_of(b, by_kind[i % KINDS][title][b]), progress,
                             lend=True, **how)
    best = [titles[i] for i in chosen]
    of = judge(name) + (f", worst {100 * how['worst']:.0f}% of prompts" if "worst" in how else "")
    agree = lambda title, b: evaluation.rank_correlation(*(half[title][b].ravel() for half in two))
    agreement = {title: agree(title, slice(None)) for title in titles[1:]}
    agreement |= {budget: agree(title, b) for b, (budget, title) in enumerate(zip(every, best)) if title != titles[0]}
    return np.stack([learned[title][b] for b, title in enumerate(best)]), {
        "chosen": dict(zip(every, best)), "held_out_loss": named(budgets, titles, rewards), "judge": of,
        "rank_agreement_of_halves": agreement}


def other_kinds(n):
    """For each kind of prompt the numbers of all of other kinds, out of n."""
    i = np.arange(n)
    return [i[i % KINDS != kind] for kind in range(KINDS)]


def halves(n):
    """The numbers of two halves of n prompts: each has every kind and layout."""
    i = np.arange(n)
    return [i[i // KINDS % 2 == half] for half in (0, 1)]


def learn_weights(model, samples, name, budgets, rules, rng, progress):
    """W_head, and what divides the thresholds of layers (steps 3 to 5 above).

    Returns W_head (budgets, L, H), the divisors (budgets, L), the log of `value_log`, and the evidence as a dict.
    """
    settings, (L, H, G) = ckv.SETTINGS[name], (model.config.n_layer, model.config.n_head, model.config.n_kv_head)
    layers_compete = settings.cap > 1
    even = np.full(L, settings.tau_grid[0]) if layers_compete else None  # one threshold that all tokens reach; None: no gate
    job = lambda b, W, weight: (rules[b], W, even / weight if layers_compete else None, budgets[b])  # of `roll_out`
    part_of = lambda losses, prompts: losses and [part[prompts] for part in losses]
    log = value_log(model, samples, name, rules, even, budgets, rng, progress)  # (P, budgets, L, H, A)
    weights, losses, evidence = np.ones((len(budgets), L)), None, {"head_experiences": log.size}
    if layers_compete:
        random_loss = lambda shapes, job_of: loss_log(model, samples, name, budgets, shapes, job_of, rng, progress)
        losses = random_loss(((L, G), (L,)), lambda b, heads, layers: job(b, by_head(np.exp(heads), H), np.exp(layers)))
        (start,) = learn_heads(name, log, losses, (HEAD_START,)).values()
        of_layers = random_loss(((L,),), lambda b, layers: job(b, start[b], np.exp(layers)))
        weights, evidence["layers"] = decide(
            model, samples, name, budgets, lambda prompts: learn_layers(part_of(of_layers, prompts)),
            lambda b, weight: job(b, start[b], weight), progress, worst=WORST)
    W, evidence["W_head"] = decide(
        model, samples, name, budgets, lambda prompts: learn_heads(name, log[prompts], part_of(losses, prompts)),
        lambda b, W: job(b, W, weights[b]), progress, cautious=True)
    return W, weights, log, evidence


def compile_tables(model, samples, name, budgets, seed, say):
    """The compilation of one reading of the method: rule, heads, gate. Returns ckv.Compiled and its evidence as a dict."""
    start, rng, settings = time.time(), np.random.default_rng(seed), ckv.SETTINGS[name]
    one = np.ones((model.config.n_layer, model.config.n_head))
    quantiles = [np.quantile([s.risk[name][i] for s in samples], np.arange(1, n) / n)
                 for i, n in enumerate((ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS))]
    with tqdm(desc=f"{name}, roll-outs", unit="roll-out", leave=False) as progress:
        chosen, rewards = choose(model, samples, name, budgets, settings.rules,
                                 lambda i, b, rule: (rule, one, None, budgets[b]), progress)
        rules, evidence = [settings.rules[i] for i in chosen], {"lost_by_rule": named(budgets, settings.rules, rewards)}
        for budget, rule, r in zip(budgets, rules, rewards):
            say(f"{name}, budget {budget}: window {rule[0]}, kernel {rule[1]}, {judge(name)} {-r.max():.3f} (rules {-r.max():.3f} to {-r.min():.3f})")
        W, weights, log, more = learn_weights(model, samples, name, budgets, rules, rng, progress)
        evidence |= more
        for what, found in ((what, more[what]) for what in ("layers", "W_head") if what in more):
            for budget, row in found["held_out_loss"].items():
                say(f"{name}, budget {budget}: {what} {found['chosen'][budget]}; held out, {found['judge']}: "
                    + "; ".join(f"{title} {loss:.3f}" for title, loss in row.items()))
        T, visits, mean_lost = learn_gate(model, samples, name, rules, W, 1 / weights, quantiles, budgets, progress)
        evidence["gate_visits"], evidence["roll_outs"] = visits.tolist(), progress.n
    evidence["check"], sizes = {}, gate_sizes(samples, name, rules, W, T, quantiles, budgets)  # on the prompts that made the tables
    for b, budget in enumerate(map(str, budgets)):
        no_gate, both = mean_lost[b].round(4).tolist()
        evidence["check"][budget] = {"lost_no_tables": round(float(-rewards[b].max()), 4),  # of the rule that was chosen
                                     "lost_W_head": no_gate, "lost_W_head_and_T_gate": both, **sizes[b]}
    if name == "compilerkv":
        evidence["learners"] = describe_learners(log[:, len(budgets) // 2], budgets[len(budgets) // 2], seed, say)
    say(f"{name}: rank agreement of W_head from two halves {evidence['W_head']['rank_agreement_of_halves']}; {time.time() - start:.0f} s")
    return ckv.Compiled(np.array(rules, dtype=float), W, T, *quantiles), evidence


def gate_sizes(samples, name, rules, W, T, edges, budgets):
    """What the gate did on these prompts, a dict for each budget.

    kept_mean: tokens kept a layer; constant_tau: the one of LEVELS that keeps as many; gate_set_the_size: the share of (prompt,
    layer) pairs in which the gate, not a clamp, set the size.
    """
    settings, n_sets, out = ckv.SETTINGS[name], ckv.SETTINGS[name].n_sets(samples[0].cache.k[0].shape[1]), []
    levels, bins = torch.from_numpy(LEVELS).float(), risk_bins(samples, name, edges)
    for b, budget in enumerate(budgets):
        gated, kept, constant = [], [], []  # by prompt: (L,), a number, (levels,)
        for sample, (e, p) in zip(samples, bins):
            s = protected_scores(sample, name, rules[b], W[b], budget, n_sets)  # (L, n_sets, T)
            tau = torch.from_numpy(T[b, :, e, p]).float()
            sizes = ckv.tokens_kept(ckv.gate(s, tau, budget, settings.cap))  # (L,)
            candidates = (s >= tau[:, None, None]).sum((1, 2)).numpy() / n_sets  # (L,)
            gated.append((sizes == candidates) & (sizes < min(settings.cap * budget, s.shape[-1])))
            kept.append(float(sizes.mean()))
            most = ckv.gate(s, torch.zeros(len(s)), budget, settings.cap)  # what any constant tau keeps is among it
            scores = torch.cat([row.gather(-1, k.clamp(min=0))[k >= 0] for row, k in zip(s, most)]).sort().values  # ascending
            constant.append(((len(scores) - torch.searchsorted(scores, levels)) / s.shape[:2].numel()).numpy())
        out.append({"kept_mean": round(float(np.mean(kept)), 1),
                    "constant_tau": float(LEVELS[np.abs(np.mean(constant, 0) - np.mean(kept)).argmin()]),
                    "gate_set_the_size": round(float(np.mean(gated)), 4)})
    return out


# -------------------------------------------------------------------------------------------------------------- report

def heat_maps(compiled, evidence, budgets, stem):
    """W_head (layer x head, one panel a budget) and T_gate (layer x risk bin) as PNG files beside the tables."""
    def draw(arrays, name, title, xlabel, limits, color_map, marked=()):
        figure, axes = plt.subplots(1, len(arrays), figsize=(3.4 * len(arrays) + 1, 6.2), squeeze=False, layout="constrained")
        for axis, array, budget in zip(axes[0], arrays, budgets):
            image = axis.imshow(array, aspect="auto", cmap=color_map, vmin=limits[0], vmax=limits[1], interpolation="nearest")
            if len(marked):
                axis.plot(marked, np.full(len(marked), -1), "v", color="dimgrey", markersize=3)  # in a strip above layer 0
            axis.set(title=f"budget {budget}", xlabel=xlabel)
        axes[0, 0].set_ylabel("layer")
        figure.suptitle(title)
        figure.colorbar(image, ax=axes[0].tolist(), shrink=0.7)
        evaluation.save_figure(figure, stem.with_name(f"{stem.name}-{name}.png"))

    for name, c in compiled.items():
        logs = np.log2(c.W_head)
        bound = max(float(np.abs(logs).max()), 0.1)
        draw(logs, f"{name}-W_head", f"{name}: log2 W_head (red: the head counts more)", "query head", (-bound, bound),
             "RdBu_r")
        flat = c.T_gate.transpose(0, 1, 3, 2).reshape(*c.T_gate.shape[:2], -1)  # (budgets, L, 20, 4) -> (budgets, L, 4 x 20)
        logs = np.log2(np.maximum(flat, 0.25))  # tau = 0, keep all, is drawn as 0.25
        draw(logs, f"{name}-T_gate", f"{name}: log2 T_gate (4 blocks of rising perplexity, entropy rises within each; "
             "triangles: no prompt came there)", "risk bin", (float(logs.min()), float(logs.max())), "viridis",
             np.flatnonzero(np.transpose(evidence[name]["gate_visits"]).ravel() == 0))


def describe(name, compiled, evidence, budgets, retrieval, say):
    """Print what was learned; retrieval (L, H): see ckv.Tables."""
    for b, budget in enumerate(budgets):
        W, T, row = compiled.W_head[b], compiled.T_gate[b], evidence["check"][str(budget)]
        best = np.dstack(np.unravel_index(np.argsort(-W, axis=None, kind="stable")[:3], W.shape))[0]
        heads = ", ".join(f"layer {l} head {h} ({W[l, h]:.2f})" for l, h in best)
        rho = evaluation.rank_correlation(W.ravel(), retrieval.ravel())
        ratio = np.median(T, (1, 2)) / np.median(T)  # (L,)
        low = "".join(f", layer {l} {ratio[l]:.2f} of it" for l in np.argsort(ratio, kind="stable")[:3] if ratio[l] < 1)
        say(f"{name}, budget {budget}: W_head {W.min():.2f} to {W.max():.2f}, highest {heads}, rank correlation with "
            f"retrieval {evaluation.cell(rho)}; median tau {np.median(T):.2f}{low}; "
            f"{judge(name)} {row['lost_no_tables']:.3f} without tables, {row['lost_W_head']:.3f} with W_head, "
            f"{row['lost_W_head_and_T_gate']:.3f} with both; gate set the size in {100 * row['gate_set_the_size']:.1f}% of "
            f"(prompt, layer) pairs, {row['kept_mean']:.0f} tokens kept")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evaluation.add_model_options(parser)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "calibration.jsonl")
    parser.add_argument("--out", type=Path, help="default: tables/smollm2-135m.npz, or tables/quick.npz with --quick")
    parser.add_argument("--quick", action="store_true", help="a dozen prompts, one budget: does it run?")
    args = parser.parse_args(argv)
    args.out = args.out or HERE / "tables" / ("quick.npz" if args.quick else "smollm2-135m.npz")
    if args.out.suffix != ".npz":
        raise UserError(f"--out must name a .npz file, not {args.out}")
    return args


def main(argv=None):
    start, args = time.time(), parse(argv)
    budgets = (128,) if args.quick else BUDGETS
    prompts = read_prompts(args.data, 12 if args.quick else None)
    model = load(args.model, args.dtype, args.device)
    say, samples, out = tqdm.write, [], args.out
    out.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the work
    try:
        for prompt in tqdm(prompts, desc="prefill", unit="prompt", dynamic_ncols=True):
            samples.append(collect(model, prompt))
    except KeyboardInterrupt:  # learn from what is there, but do not replace the full tables
        if len(samples) <= KINDS:
            raise
        out = args.out.with_name(f"{args.out.stem}.partial.npz")
        print(f"interrupted: compiling {out.name} from {len(samples)} prompts (Ctrl-C again to stop)", file=sys.stderr)
    compiled, evidence = {}, {}
    for name in ckv.SETTINGS:
        compiled[name], evidence[name] = compile_tables(model, samples, name, budgets, args.seed, say)
    retrieval = np.mean([s.looks_back.numpy() for s in samples], 0, dtype=float)  # (L, H)
    for name in compiled:
        describe(name, compiled[name], evidence[name], budgets, retrieval, say)
    used = prompts[:len(samples)]
    provenance = {
        "model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "seed": args.seed,
        "machine": evaluation.machine(), "seconds": round(time.time() - start, 1),
        "settings": {n: dataclasses.asdict(s) for n, s in ckv.SETTINGS.items()},
        "learner": "means and errors of a complete log of values; LinUCB on the losses of random tables", "evidence": evidence,
        "prompts": {p["id"]: hashlib.sha256((p["prompt"] + p["continuation"]).encode()).hexdigest()[:16] for p in used}}
    ckv.Tables(np.array(budgets), model.fingerprint, compiled, retrieval, provenance).save(out)
    stem = out.with_suffix("")
    ckv.write_atomically(out.with_suffix(".json"), json.dumps(provenance, indent=1))
    heat_maps(compiled, evidence, budgets, stem)
    curves = dict(evidence["compilerkv"]["learners"])
    budget = curves.pop("budget")
    draw_learners({who: (c["regret"], c["held_out_reward"]) for who, c in curves.items()}, budget, stem.with_name(f"{stem.name}-learners.png"))
    total = lambda key: sum(e[key] for e in evidence.values())
    print(f"{out.name}: {len(used)} prompts, {total('roll_outs')} roll-outs, {total('head_experiences')} experiences of heads, "
          f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    evaluation.run_command(main)
