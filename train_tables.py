"""Compile the tables offline, from experience with the real model: `python train_tables.py`.

1. Collect. Every calibration prompt is prefilled once. A pass over the right continuation then shows which cache entries it
   really needs: mass[l,g,t], the most attention that any of its queries pays, times value length, summed over the query heads.
2. Rule. A bandit on real roll-outs, reward -(loss_compressed - loss_full), chooses for each budget the window and the width
   of the pool (ours; the paper has one rule).
3. Heads. An experience is (state, action, reward): in state (budget, layer, head), W_head takes one of the grid's values
   while all other heads keep theirs, and the reward is the share of the layer's mass that the kept set keeps. The table takes
   the action whose gain over W = 1 is largest by a cautious count: mean less one standard error over prompts.
4. Let the loss decide. The share is a proxy, so prompts that took no part in the learning are rolled out for real, and a bandit
   chooses, for each budget, how much of log W_head to apply, or to stay with the table of the round before; step 3 is repeated until that
   does not help any more.
5. Gate. In state (budget, layer, entropy bin, perplexity bin), T_gate takes a threshold, with the same reward less the
   paper's penalty for candidates beyond the budget; conservative Q-learning turns the log into a table.
   It is learned given the heads; they are learned at the full budget, so that no head is paid for tokens that it adds.
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
from tqdm import tqdm

import compilerkv as ckv
import eval as evaluation
from bandit import ConservativeQ, EpsilonGreedy, LinUCB
from model import KVCache, UserError, load

HERE = Path(__file__).parent
BUDGETS = (64, 128, 256, 512)
CONTINUATION = 64       # tokens of continuation scored at most (the paper: 128)
KINDS = 6               # the corpus lists its kinds in turn, so that every second round of them makes a fair half
PRIOR = 3               # pseudo-experiences by which a rare gate state leans on its layer's mean
SEEN_NEVER = 0.8        # tau of a gate state that was never visited (the paper's: keep more)
MAX_ROUNDS = 3
LEVELS = 2.0 ** np.arange(-4, 12, 0.1)  # constant thresholds among which `check` finds the one that keeps as many tokens
ROWS = 24               # roll-outs in one batch: bounds memory
LEARNING_RATE = 3e-4   # of AdamW, as in the paper


@dataclasses.dataclass
class Sample:
    """One calibration prompt, prefilled: all that learning needs."""
    u: dict              # (name of a setting, window) -> (L, H, T) utility of Eq. 4, un-pooled, float16
    risk: tuple          # (entropy, perplexity)
    mass: torch.Tensor   # (L, G, T) share of the continuation's attention, 0 on tokens that are always kept, sum 1 a layer
    cache: KVCache       # the full one
    logits: torch.Tensor  # (V,) of the last prompt token
    continuation: list   # token ids
    loss_full: float     # nats a token from the full cache

    def pooled(self, name, rule):
        """Utility (L, H, T) as a rule (window, kernel) reads it, float32."""
        window, kernel = rule
        return ckv.spread(self.u[name, window].float(), window, kernel)


def read_prompts(path, limit):
    """Calibration prompts from JSON lines. Raises UserError naming file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason}; --data needs the calibration corpus, as JSON lines") from None
    prompts = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not all(isinstance(row[key], str) and row[key] for key in ("id", "prompt", "continuation")):
                    raise TypeError("id, prompt and continuation must be non-empty strings")
                if not isinstance(row["chat"], bool):
                    raise TypeError("chat must be true or false")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {n}: malformed prompt: {error}") from None
            prompts.append(row)
    if len(prompts) <= KINDS:
        raise UserError(f"{path}: {len(prompts)} prompts are too few to learn from and to decide on")
    return prompts[:limit]


# ------------------------------------------------------------------------------------------------------------- collect

def collect(model, prompt):
    """Prefill one prompt, look at what its continuation attends to, and keep what learning needs."""
    tokenizer, G = model.tokenizer, model.config.n_kv_head
    tokens = tokenizer.chat(prompt["prompt"]) if prompt["chat"] else tokenizer.encode(prompt["prompt"])
    continuation = tokenizer.encode(prompt["continuation"], begin=False)[:CONTINUATION]
    if len(tokens) <= ckv.MAX_WINDOW + ckv.SINKS:
        raise UserError(f"calibration prompt {prompt['id']}: {len(tokens)} tokens are too few to compress; give more than "
                        f"{ckv.MAX_WINDOW + ckv.SINKS}")
    logits, cache, observation = model.prefill(tokens, ckv.MAX_WINDOW)
    loss_full = model.nll(cache, logits, continuation).item()
    before = cache.mark()
    _, attention, _ = model.forward(torch.tensor([continuation], device=model.device), cache, observe=len(continuation))
    cache.rewind(before)
    needed = attention[..., :len(tokens)].float().amax(2)  # (L, H, n, T + n) -> (L, H, T)
    L, H, T = needed.shape
    mass = needed.view(L, G, H // G, T).sum(2) * ckv.value_norm(cache)  # (L, G, T)
    mass[..., :ckv.SINKS] = 0
    mass[..., T - min(w for w, _ in ckv.OURS.rules):] = 0
    u = {(name, w): ckv.utility(observation, cache, s, w).half() for name, s in ckv.SETTINGS.items() for w in {w for w, _ in s.rules}}
    return Sample(u, ckv.risk(observation, ckv.MAX_WINDOW), mass / mass.sum((1, 2), keepdim=True), cache, logits, continuation,
                  loss_full)


# --------------------------------------------------------------------------------------------------------------- learn

def sets_of(name, model_config):
    """How many kept sets a layer has under one reading of the method."""
    return 1 if ckv.SETTINGS[name].shared else model_config.n_kv_head


def threshold(s, budget, window):
    """The scores that compete, (..., L, n_sets, T) -> (..., L, N), and the lowest that still finds a place, (..., L, 1).

    All that tie with it count as kept here: a plateau of the pool may exceed the budget by its width, for every action alike.
    """
    window = min(window, budget - ckv.SINKS)
    places = s.shape[-2] * (budget - ckv.SINKS - window)
    competing = s[..., ckv.SINKS:s.shape[-1] - window].flatten(-2)  # (..., L, n_sets T')
    if places == 0:
        return competing, competing.new_full((*competing.shape[:-1], 1), torch.inf)
    if places >= competing.shape[-1]:
        return competing, competing.new_full((*competing.shape[:-1], 1), -torch.inf)
    return competing, competing.kthvalue(competing.shape[-1] - places + 1, dim=-1, keepdim=True).values


def competing_mass(sample, n_sets, budget, window):
    """The mass of the tokens that compete, in the layout of `threshold`: (L, n_sets T')."""
    window = min(window, budget - ckv.SINKS)
    mass = sample.mass if n_sets > 1 else sample.mass.sum(1, keepdim=True)  # (L, n_sets, T)
    return mass[..., ckv.SINKS:mass.shape[-1] - window].flatten(1)


def head_rewards(sample, name, rule, budget, W):
    """Reward of every grid value for every head, others as in W (L, H), less that of W = 1: (A, L, H).

    Heads are compared at the full budget: under a threshold, a head of larger W would be paid for the tokens that it adds.
    """
    settings, (L, H) = ckv.SETTINGS[name], W.shape
    n_sets = 1 if settings.shared else sample.mass.shape[1]
    grid = torch.tensor(settings.W_grid, dtype=torch.float32)
    neutral = int(grid.log().abs().argmin())
    u, window = sample.pooled(name, rule), rule[0]
    mass = competing_mass(sample, n_sets, budget, window)
    weighted, rewards = W[:, :, None] * u, []  # (L, H, T)
    for h in range(H):
        others = weighted.clone()
        others[:, h] = 0
        g = h * n_sets // H
        s = others.view(L, n_sets, H // n_sets, -1).amax(2).expand(len(grid), -1, -1, -1).clone()  # (A, L, n_sets, T)
        s[:, :, g] = torch.maximum(s[:, :, g], grid[:, None, None] * u[:, h])
        competing, lowest = threshold(s, budget, window)
        share = (mass * (competing >= lowest)).sum(-1)  # (A, L)
        rewards.append(share - share[neutral])
    return torch.stack(rewards, -1)


def head_log(samples, name, rule, budget, W):
    """The complete log of one budget: reward of every prompt, head (layer by layer) and action, (P, L H, A)."""
    return np.stack([head_rewards(s, name, rule, budget, torch.from_numpy(W).float()).flatten(1).T.numpy() for s in samples])


def learn_heads(samples, name, rules, W, budgets):
    """One sweep over all heads at once, every action tried on every prompt. Returns the new W and the number of experiences."""
    settings, W, count = ckv.SETTINGS[name], W.copy(), 0
    grid = np.array(settings.W_grid)
    neutral = int(np.abs(np.log(grid)).argmin())
    for b, budget in enumerate(budgets):
        rewards = head_log(samples, name, rules[b], budget, W[b])
        _, states, actions = np.indices(rewards.shape)
        bandit = EpsilonGreedy(W[b].size, len(grid), default=neutral)
        bandit.update(states.ravel(), actions.ravel(), rewards.ravel())
        W[b] = grid[bandit.cautious(neutral)].reshape(W[b].shape)
        count += rewards.size
    return W, count


def compare_learners(log, held_out, seed):
    """Every bandit on the same stream: each prompt asks once for an action of each state and pays its reward. Conservative Q
    is made for logs of others: it sees the rewards of random actions, and its regret is that of its greedy table so far.

    log (P, S, A): what each action would pay; held_out: the same of other prompts. Returns {name: (cumulative regret (P,)
    against each state's best fixed action in hindsight, mean held-out reward of the final greedy table)}.
    """
    P, S, A = log.shape
    scale = float(log.std()) or 1.0  # one learning rate, one width of confidence
    best, every, out = log.mean(0).max(-1), np.arange(S), {}  # best: (S,)
    learners = {"random": EpsilonGreedy(S, A, epsilon=1.0), "epsilon-greedy": EpsilonGreedy(S, A),
                "LinUCB": LinUCB(np.eye(S), A), "conservative Q": ConservativeQ(S, A, lr=LEARNING_RATE)}
    for name, learner in learners.items():
        rng, generator, regret = np.random.default_rng(seed), torch.Generator().manual_seed(seed), []
        for rewards in log:  # (S, A)
            offline = isinstance(learner, ConservativeQ)  # learns from what another, the random one, logs
            actions = learner.greedy() if offline else learner.choose(every, rng)
            logged = rng.integers(A, size=S) if offline else actions
            learner.update(every, logged, (rewards[every, logged] / scale).astype(np.float32))
            if offline:
                learner.fit(generator)
            regret.append((best - rewards[every, actions]).sum())
        out[name] = np.cumsum(regret), float(held_out.mean(0)[every, learner.greedy()].mean())
    complete = EpsilonGreedy(S, A)
    _, states, actions = np.indices(log.shape)
    complete.update(states.ravel(), actions.ravel(), log.ravel())
    neutral = int(np.abs(log).sum((0, 1)).argmin())
    out["complete log, cautious"] = None, float(held_out.mean(0)[every, complete.cautious(neutral)].mean())
    return out


def draw_learners(curves, budget, path):
    """Cumulative regret of every learner over the calibration prompts."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (regret, held_out) in curves.items():
        if regret is not None:
            axis.plot(np.arange(1, len(regret) + 1), regret, label=f"{name} (held-out reward {held_out:+.4f})")
    axis.set(xlabel="calibration prompts", ylabel="cumulative regret, shares of a layer's mass, all heads",
             title=f"Learners of W_head on one stream, budget {budget}")
    axis.grid(alpha=0.3)
    axis.legend()
    evaluation.save_figure(figure, path)


def risk_bins(samples, edges):
    """The (entropy bin, perplexity bin) of every sample."""
    return [tuple(ckv.risk_bin(x, e) for x, e in zip(sample.risk, edges)) for sample in samples]


def gate_state(b, l, e, p, L):
    """Row of the gate's Q-table."""
    return ((b * L + l) * ckv.N_ENTROPY_BINS + e) * ckv.N_PPL_BINS + p


def gate_rewards(sample, name, rule, budget, W):
    """Reward of every threshold in every layer: the share kept, less the paper's max(0, candidates - budget) / T. (L, A)."""
    settings, T = ckv.SETTINGS[name], sample.mass.shape[-1]
    n_sets = 1 if settings.shared else sample.mass.shape[1]
    competing, lowest = threshold(ckv.head_score(sample.pooled(name, rule), W, n_sets), budget, rule[0])  # (L, N), (L, 1)
    mass, always = competing_mass(sample, n_sets, budget, rule[0]), T - competing.shape[-1] // n_sets
    rewards = []
    for tau in settings.tau_grid:
        candidates = always + (competing >= tau).sum(-1) / n_sets  # (L,) tokens, mean over the layer's sets
        share = (mass * (competing >= lowest.clamp(min=tau))).sum(-1)
        rewards.append(share - (candidates - budget).clamp(min=0) / T)
    return torch.stack(rewards, 1).numpy()


def learn_gate(samples, name, rules, W, edges, budgets, generator):
    """T_gate given W: a Q-table over (budget, layer, bins). Returns T (budgets, L, 20, 4), which states were seen, experiences."""
    settings, (_, L, _) = ckv.SETTINGS[name], W.shape
    shape = (len(budgets), L, ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS)
    bins = risk_bins(samples, edges)
    learner = ConservativeQ(int(np.prod(shape)), len(settings.tau_grid), lr=LEARNING_RATE)
    count = 0
    l, a = np.indices((L, len(settings.tau_grid)))
    for b, budget in enumerate(budgets):
        rewards = np.stack([gate_rewards(s, name, rules[b], budget, torch.from_numpy(W[b]).float()) for s in samples])  # (P, L, A)
        rewards = (rewards / (rewards.std() + 1e-12)).astype(np.float32)  # one learning rate fits every budget
        count += rewards.size
        for (e, p), reward in zip(bins, rewards):
            learner.update(gate_state(b, l, e, p, L).ravel(), a.ravel(), reward.ravel())
        for e, p in sorted(set(bins)):  # a rare state leans on its parent, the layer: PRIOR pseudo-experiences of its mean
            for _ in range(PRIOR):
                learner.update(gate_state(b, l, e, p, L).ravel(), a.ravel(), rewards.mean(0).ravel())
    learner.fit(generator)
    visits = learner.visits.sum(1).reshape(shape)
    T = np.where(visits > 0, np.array(settings.tau_grid)[learner.greedy()].reshape(shape), SEEN_NEVER)
    return T, visits > 0, count


# ------------------------------------------------------------------------------------------------- let the loss decide

def roll_out(model, sample, name, jobs):
    """Loss, nats a token, of the continuation from one compressed cache for each job (rule, W (L, H), tau (L,), budget): (N,)."""
    caches, G = [], model.config.n_kv_head
    for rule, W, tau, budget in jobs:
        W, tau = (torch.as_tensor(x, dtype=torch.float32) for x in (W, tau))
        kept = ckv.kept_tokens(sample.pooled(name, rule), W, tau, budget, rule[0], sets_of(name, model.config))
        caches.append(ckv.evict(sample.cache, [k.expand(G, -1) for k in kept]))
    return np.concatenate([model.nll(KVCache.stack(caches[i:i + ROWS]), sample.logits, sample.continuation).numpy()
                           for i in range(0, len(caches), ROWS)])


def choose(model, samples, name, budgets, actions, job_of, progress):
    """For each budget the action whose real roll-outs lose least. Returns their indices and the mean rewards (budgets, actions)."""
    bandit = EpsilonGreedy(len(budgets), len(actions))
    b, a = (x.ravel() for x in np.indices((len(budgets), len(actions))))
    for i, sample in enumerate(samples):
        rewards = sample.loss_full - roll_out(model, sample, name, [job_of(b_, actions[a_], i) for b_, a_ in zip(b, a)])
        bandit.update(b, a, rewards)
        progress.update(len(rewards))
    return bandit.greedy(), bandit.values()


def look_up_taus(samples, T, edges):
    """The gate's threshold for every budget and sample: [budget][sample] -> (L,)."""
    return [[torch.from_numpy(T_b[:, e, p]).float() for e, p in risk_bins(samples, edges)] for T_b in T]


def halves(samples):
    """Two halves of the corpus, each with every kind and layout: to learn from, and to decide on."""
    parts = [s for i, s in enumerate(samples) if i // KINDS % 2 == 0], [s for i, s in enumerate(samples) if i // KINDS % 2]
    return parts


def compile_tables(model, samples, name, budgets, rounds, seed, say):
    """The coupled compilation of one reading of the method. Returns ckv.Compiled and its evidence as a dict."""
    generator, settings = torch.Generator().manual_seed(seed), ckv.SETTINGS[name]
    L, H = model.config.n_layer, model.config.n_head
    learn_on, decide_on = halves(samples)
    quantiles = [np.quantile([s.risk[i] for s in learn_on], np.arange(1, n) / n)
                 for i, n in enumerate((ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS))]
    W, T = np.ones((len(budgets), L, H)), np.zeros((len(budgets), L, ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS))
    evidence = {"rounds": [], "roll_outs": 0, "head_experiences": 0}
    named = lambda actions, rewards: {str(b): dict(zip(map(str, actions), (-r).round(4).tolist())) for b, r in zip(budgets, rewards)}
    with tqdm(desc=f"{name}, rules", unit="roll-out", leave=False) as progress:
        chosen, rewards = choose(model, learn_on, name, budgets, settings.rules,
                                 lambda b, rule, i: (rule, W[b], T[b, :, 0, 0], budgets[b]), progress)
    rules = [settings.rules[i] for i in chosen]
    evidence["dnll_by_rule"], evidence["roll_outs"] = named(settings.rules, rewards), len(learn_on) * rewards.size
    for budget, rule, r in zip(budgets, rules, rewards):
        say(f"{name}, budget {budget}: window {rule[0]}, kernel {rule[1]}, dNLL {-r.max():.3f} (rules {-r.max():.3f} to {-r.min():.3f})")
    for round_ in range(rounds):
        start = time.time()
        raw, n = learn_heads(learn_on, name, rules, W, budgets)
        evidence["head_experiences"] += n
        if round_ == 0:  # the same sweep on the other half: would other prompts have made the same table?
            other, _ = learn_heads(decide_on, name, rules, W, budgets)
            evidence["rank_agreement_of_halves"] = {str(b): evaluation.rank_correlation(x.ravel(), y.ravel())
                                                    for b, x, y in zip(budgets, raw, other)}
            say(f"{name}: rank agreement of W_head from two halves {evidence['rank_agreement_of_halves']}")
        tables = [W, *(raw ** x for x in settings.strengths)]  # what there was, and the new table by strength
        with tqdm(desc=f"{name}, round {round_ + 1}", unit="roll-out", leave=False) as progress:
            chosen, rewards = choose(model, decide_on, name, budgets, tables,
                                     lambda b, table, i: (rules[b], table[b], T[b, :, 0, 0], budgets[b]), progress)
        new_W = np.stack([tables[i][b] for b, i in enumerate(chosen)])
        evidence["roll_outs"] += len(decide_on) * rewards.size
        changed = float((new_W != W).mean())
        W = new_W
        evidence["rounds"].append({"entries_changed": changed, "seconds": round(time.time() - start, 1),
                                   "held_out_dnll_by_strength": named(("old", *settings.strengths), rewards)})
        say(f"{name}, round {round_ + 1}: {100 * changed:.0f}% of W_head changed, {time.time() - start:.0f} s")
        for b, r in zip(budgets, rewards):
            say(f"  budget {b}: held-out dNLL old W {-r[0]:.3f}, "
                + ", ".join(f"W^{x:g} {-v:.3f}" for x, v in zip(settings.strengths, r[1:])))
        if not changed:
            break
    if name == "compilerkv":
        b = len(budgets) // 2
        logs = [head_log(half, name, rules[b], budgets[b], np.ones((L, H))) for half in (learn_on, decide_on)]
        evidence["learners"] = {"budget": budgets[b], **{
            who: {"regret": None if regret is None else regret.round(4).tolist(), "held_out_reward": held_out}
            for who, (regret, held_out) in compare_learners(*logs, seed).items()}}
        for who, result in list(evidence["learners"].items())[1:]:
            say(f"learner {who}, budget {budgets[b]}: cumulative regret "
                f"{'-' if result['regret'] is None else round(result['regret'][-1], 2)}, held-out reward {result['held_out_reward']:+.5f}")
    T, seen, evidence["gate_experiences"] = learn_gate(learn_on, name, rules, W, quantiles, budgets, generator)
    evidence["gate_states_seen"] = float(seen.mean())
    visits = np.zeros((ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS), dtype=int)  # prompts a gate state, the same in every layer
    np.add.at(visits, tuple(zip(*risk_bins(learn_on, quantiles))), 1)
    evidence["visits"] = visits.tolist()
    evidence["check"] = check(model, decide_on, name, rules, W, T, quantiles, budgets)
    return ckv.Compiled(np.array(rules, dtype=float), W, T, *quantiles), evidence


def check(model, samples, name, rules, W, T, edges, budgets):
    """Held-out roll-outs with the rule alone, with W_head, with both: mean dNLL by budget, and what the gate did."""
    taus, rows, n_sets = look_up_taus(samples, T, edges), {}, sets_of(name, model.config)
    for b, budget in enumerate(budgets):
        losses, sizes, constant = [], [], []  # constant: tokens kept by one tau for all, for each of LEVELS
        for i, sample in enumerate(samples):
            tau, rule = taus[b][i], rules[b]
            losses.append(roll_out(model, sample, name, [(rule, np.ones_like(W[b]), 0 * tau, budget), (rule, W[b], 0 * tau, budget),
                                                         (rule, W[b], tau, budget)]) - sample.loss_full)
            kept = ckv.kept_tokens(sample.pooled(name, rule), torch.from_numpy(W[b]).float(), tau, budget, rule[0], n_sets)
            sizes += [int((k >= 0).sum()) / n_sets for k in kept]
            scores = ckv.protect(ckv.head_score(sample.pooled(name, rule), torch.from_numpy(W[b]).float(), n_sets), budget, rule[0])
            constant.append([float(((scores >= x).sum((1, 2)) / n_sets).clamp(max=budget).mean()) for x in LEVELS])
        mean = np.mean(losses, 0).round(4).tolist()
        rows[str(budget)] = {"dnll_no_tables": mean[0], "dnll_W_head": mean[1], "dnll_W_head_and_T_gate": mean[2],
                             "kept_mean": round(float(np.mean(sizes)), 1),
                             "constant_tau": float(LEVELS[np.abs(np.mean(constant, 0) - np.mean(sizes)).argmin()]),
                             "gate_set_the_size": round(float(np.mean(np.array(sizes) < budget)), 4)}
    return rows


# -------------------------------------------------------------------------------------------------------------- report

def heat_maps(compiled, budgets, stem):
    """W_head (layer x head, one panel a budget) and T_gate (layer x risk bin) as PNG files beside the tables."""
    def draw(arrays, name, title, xlabel, limits, color_map):
        figure, axes = plt.subplots(1, len(arrays), figsize=(3.4 * len(arrays) + 1, 6.2), squeeze=False, layout="constrained")
        for axis, array, budget in zip(axes[0], arrays, budgets):
            image = axis.imshow(array, aspect="auto", cmap=color_map, vmin=limits[0], vmax=limits[1], interpolation="nearest")
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
        draw(logs, f"{name}-T_gate", f"{name}: log2 T_gate (4 blocks of rising perplexity, entropy rises within each)",
             "risk bin", (float(logs.min()), float(logs.max())), "viridis")


def describe(name, compiled, evidence, budgets, say):
    """Print what was learned."""
    for b, budget in enumerate(budgets):
        W, T, row = compiled.W_head[b], compiled.T_gate[b], evidence["check"][str(budget)]
        best = np.dstack(np.unravel_index(np.argsort(-W, axis=None, kind="stable")[:3], W.shape))[0]
        heads = ", ".join(f"layer {l} head {h} ({W[l, h]:.2f})" for l, h in best)
        say(f"{name}, budget {budget}: W_head {W.min():.2f} to {W.max():.2f}, highest {heads}; median tau {np.median(T):.2f}; "
            f"held-out dNLL {row['dnll_no_tables']:.3f} without tables, {row['dnll_W_head']:.3f} with W_head, "
            f"{row['dnll_W_head_and_T_gate']:.3f} with both; gate set the size in {100 * row['gate_set_the_size']:.1f}% of "
            f"(prompt, layer) pairs, {row['kept_mean']:.0f} tokens kept")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evaluation.add_model_options(parser)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "calibration.jsonl")
    parser.add_argument("--out", type=Path, help="default: tables/smollm2-135m.npz, or tables/quick.npz with --quick")
    parser.add_argument("--quick", action="store_true", help="a dozen prompts, one budget, one round: does it run?")
    args = parser.parse_args(argv)
    args.out = args.out or HERE / "tables" / ("quick.npz" if args.quick else "smollm2-135m.npz")
    if args.out.suffix != ".npz":
        raise UserError(f"--out must name a .npz file, not {args.out}")
    return args


def main(argv=None):
    start, args = time.time(), parse(argv)
    budgets, rounds = ((128,), 1) if args.quick else (BUDGETS, MAX_ROUNDS)
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
        compiled[name], evidence[name] = compile_tables(model, samples, name, budgets, rounds, args.seed, say)
    for name in compiled:
        describe(name, compiled[name], evidence[name], budgets, say)
    used = prompts[:len(samples)]
    provenance = {
        "model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "seed": args.seed,
        "machine": evaluation.machine(), "seconds": round(time.time() - start, 1), "settings": {n: dataclasses.asdict(s) for n, s in ckv.SETTINGS.items()},
        "learner": f"rules and heads: mean reward of every action; gate: conservative Q-learning, c 0.75, AdamW lr {LEARNING_RATE}", "evidence": evidence,
        "prompts": {p["id"]: hashlib.sha256((p["prompt"] + p["continuation"]).encode()).hexdigest()[:16] for p in used}}
    ckv.Tables(np.array(budgets), model.fingerprint, compiled, provenance).save(out)
    stem = out.with_suffix("")
    ckv.write_atomically(stem.with_suffix(".json"), json.dumps(provenance, indent=1))
    heat_maps(compiled, budgets, stem)
    curves = dict(evidence["compilerkv"]["learners"])
    budget = curves.pop("budget")
    draw_learners({who: (c["regret"], c["held_out_reward"]) for who, c in curves.items()}, budget, stem.with_name(f"{stem.name}-learners.png"))
    total = lambda key: sum(e[key] for e in evidence.values())
    print(f"{out.name}: {len(used)} prompts, {total('roll_outs')} roll-outs, {total('head_experiences')} experiences of heads "
          f"and {total('gate_experiences')} of the gate, {time.time() - start:.0f} s")


if __name__ == "__main__":
    evaluation.run_command(main)
