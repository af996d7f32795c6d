"""Compile W_head and T_gate offline, from experience with the real model: `python train_tables.py`.

1. Collect. Every calibration prompt is prefilled once. A pass over the right continuation then shows which prompt tokens
   its queries really use: mass[l,t], attention times value length, summed over heads.
2. Learn. An experience is (state, action, reward): in state (budget, layer, head), W_head takes one of the grid's values
   while all other heads keep theirs, and the reward is the share of the layer's mass that the kept set keeps. In state
   (budget, layer, entropy bin, perplexity bin), T_gate takes a threshold, with the same reward less the paper's penalty
   for candidates beyond the budget. Conservative Q-learning turns the log into a table. The two tables share their
   reward, so they are learned in turns until the greedy tables stop changing.
3. Let the loss decide. The share is a proxy, so prompts that took no part in step 2 are rolled out for real: the
   continuation is teacher-forced from compressed caches, and a bandit on -(loss_compressed - loss_full) chooses, for each
   budget, how much of log W_head to apply.
Both readings of the method are compiled: the paper's (model scope, its grids) and ours (head scope, log-spaced grids).
"""

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import compilerkv as ckv
import eval as evaluation
from bandit import ConservativeQ, EpsilonGreedy
from model import KVCache, UserError, load

HERE = Path(__file__).parent
BUDGETS = (64, 128, 256, 512)
CONTINUATION = 64       # tokens of continuation scored at most (the paper: 128)
HOLD_OUT = 3            # every third prompt only decides in step 3
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # actions of step 3: W_head ** strength
PRIOR = 3               # pseudo-experiences by which a rare gate state leans on its layer's mean
SEEN_NEVER = 0.8        # tau of a gate state that was never visited (the paper's: keep more)
MAX_ROUNDS = 3


@dataclasses.dataclass
class Sample:
    """One calibration prompt, prefilled: all that learning needs."""
    u: dict              # name of a setting -> (L, H, T) utility of Eq. 4
    risk: dict           # name of a setting -> (entropy, perplexity)
    mass: torch.Tensor   # (L, T) share of the continuation's attention, 0 on tokens that are always kept, sum 1 a layer
    cache: KVCache
    logits: torch.Tensor  # (V,) of the last prompt token
    continuation: list   # token ids
    loss_full: float     # nats a token from the full cache


def read_prompts(path, limit):
    """Calibration prompts from JSON lines. Raises UserError naming file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --data needs the calibration corpus") from None
    prompts = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not all(isinstance(row[key], str) and row[key] for key in ("id", "prompt", "continuation")):
                    raise TypeError("id, prompt and continuation must be non-empty strings")
                row["chat"]  # KeyError if it is missing
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {n}: malformed prompt: {error}") from None
            prompts.append(row)
    if len(prompts) < HOLD_OUT:
        raise UserError(f"{path}: {len(prompts)} prompts are too few to learn from and to decide on")
    return prompts[::max(1, len(prompts) // limit)][:limit] if limit else prompts


# ------------------------------------------------------------------------------------------------------------- collect

def collect(model, prompt):
    """Prefill one prompt, look at what its continuation attends to, and keep what learning needs."""
    tokenizer = model.tokenizer
    tokens = tokenizer.chat(prompt["prompt"]) if prompt["chat"] else tokenizer.encode(prompt["prompt"])
    continuation = tokenizer.encode(prompt["continuation"])[:CONTINUATION]
    logits, cache, observation = model.prefill(tokens, ckv.MAX_WINDOW)
    loss_full = model.nll(cache, logits, continuation).item()
    used = evaluation.look_ahead(model, cache, observation, continuation).answer  # (L, H, T)
    L, H, T = used.shape
    mass = (used * ckv.value_norm(cache).repeat_interleave(H // model.config.n_kv_head, 1)).sum(1)  # (L, H, T) -> (L, T)
    mass[:, :ckv.SINKS] = 0
    mass[:, T - ckv.OURS.window:] = 0
    u = {name: ckv.utility(observation, cache, s) for name, s in ckv.SETTINGS.items()}
    risk = {name: ckv.risk(observation, s.window) for name, s in ckv.SETTINGS.items()}
    return Sample(u, risk, mass / mass.sum(1, keepdim=True), cache, logits, continuation, loss_full)


# --------------------------------------------------------------------------------------------------------------- learn

def protected_scores(s, budget, window):
    """Scores (..., T) of the tokens that compete, and how many places are left for them after sinks and window."""
    window = min(window, budget - ckv.SINKS)
    return s[..., ckv.SINKS:s.shape[-1] - window], budget - ckv.SINKS - window


def kept_share(s, mass, budget, window, tau):
    """Share of the mass that the kept set keeps: s (..., L, T), mass (L, T), tau (L,) -> (..., L)."""
    s, places = protected_scores(s, budget, window)
    mass, _ = protected_scores(mass, budget, window)
    if places == 0:
        return s.new_zeros(s.shape[:-1])
    if places < s.shape[-1]:  # the clamp: the lowest score that still finds a place
        tau = torch.maximum(s.kthvalue(s.shape[-1] - places + 1, dim=-1).values, tau)
    return (mass * (s >= tau[..., None])).sum(-1)


def head_experience(samples, name, b, budget, h, W, taus):
    """Every grid value tried for head h of every layer, all else as in W: states, actions, rewards (N,) each.

    The reward is counted from that of W = 1 on the same prompt, so that prompts of different difficulty compare.
    """
    settings, (n_budgets, L, H) = ckv.SETTINGS[name], W.shape
    grid = torch.tensor(settings.W_grid, dtype=torch.float32)
    neutral = int(np.abs(np.log(settings.W_grid)).argmin())
    others = torch.from_numpy(W[b]).float()
    others[:, h] = 0
    rewards = []
    for sample, tau in zip(samples, taus):
        u = sample.u[name]
        rest = ckv.head_score(u, others)  # (L, T)
        s = torch.maximum(rest, grid[:, None, None] * u[:, h])  # (A, L, T)
        share = kept_share(s, sample.mass, budget, settings.window, tau)  # (A, L)
        rewards.append((share - share[neutral]).T)  # (L, A)
    rewards = torch.stack(rewards).numpy()  # (P, L, A)
    state = (b * L + np.arange(L)) * H + h
    _, l, a = np.indices(rewards.shape)
    return state[l].ravel(), a.ravel(), rewards.ravel()


def gate_experience(samples, bins, name, b, budget, W):
    """Every threshold tried in every layer: states, actions, rewards (N,); rewards are the paper's gate reward."""
    settings, L = ckv.SETTINGS[name], W.shape[1]
    grid = torch.tensor(settings.tau_grid, dtype=torch.float32)
    states, actions, rewards = [], [], []
    for sample, (e, p) in zip(samples, bins):
        s = ckv.head_score(sample.u[name], torch.from_numpy(W[b]).float())  # (L, T)
        T = s.shape[-1]
        share = kept_share(s.expand(len(grid), L, T), sample.mass, budget, settings.window, grid[:, None].expand(-1, L))
        competing, places = protected_scores(s, budget, settings.window)
        beyond = ((competing >= grid[:, None, None]).sum(-1) - places).clamp(min=0)  # (A, L) candidates the clamp drops
        rewards.append((share - beyond / T).T.numpy())  # (L, A)
        states.append(np.repeat(gate_state(b, np.arange(L), e, p, L), len(grid)))
        actions.append(np.tile(np.arange(len(grid)), L))
    return np.concatenate(states), np.concatenate(actions), np.concatenate([r.ravel() for r in rewards])


def gate_state(b, l, e, p, L):
    return ((b * L + l) * ckv.N_ENTROPY_BINS + e) * ckv.N_PPL_BINS + p


def standardised(rewards):
    """Rewards on the scale of one, so that one learning rate fits every state."""
    return (rewards / (np.std(rewards) + 1e-12)).astype(np.float32)


def learn_heads(samples, name, W, taus, generator, rng):
    """One sweep over the heads in random order, one Q-table a budget and head. Returns the new W and the experiences used."""
    settings, (n_budgets, L, H) = ckv.SETTINGS[name], W.shape
    neutral, W, count = int(np.abs(np.log(settings.W_grid)).argmin()), W.copy(), 0
    for b, budget in enumerate(BUDGETS[:n_budgets]):
        if budget <= settings.window + ckv.SINKS:
            continue  # no token competes: nothing to learn, W stays 1
        for h in rng.permutation(H):
            states, actions, rewards = head_experience(samples, name, b, budget, h, W, taus[b])
            learner = ConservativeQ(W.size, len(settings.W_grid), lr=LEARNING_RATE, default=neutral)
            learner.update(states, actions, standardised(rewards))
            learner.fit(generator)
            W[b, :, h] = np.array(settings.W_grid)[learner.greedy()].reshape(W.shape)[b, :, h]
            count += len(rewards)
    return W, count


def learn_gate(samples, name, W, edges, generator):
    """T_gate given W: a Q-table over (budget, layer, bins). Returns T (budgets, L, 20, 4), its visits and the experiences."""
    settings, (n_budgets, L, H) = ckv.SETTINGS[name], W.shape
    shape = (n_budgets, L, ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS)
    bins = [tuple(ckv.risk_bin(x, e) for x, e in zip(s.risk[name], edges)) for s in samples]
    learner = ConservativeQ(int(np.prod(shape)), len(settings.tau_grid), lr=LEARNING_RATE)
    count = 0
    for b, budget in enumerate(BUDGETS[:n_budgets]):
        states, actions, rewards = gate_experience(samples, bins, name, b, budget, W)
        rewards = standardised(rewards)
        learner.update(states, actions, rewards)
        count += len(rewards)
        # A rare state leans on its parent: PRIOR pseudo-experiences carry the mean reward of its layer.
        mean = rewards.reshape(len(samples), L, -1).mean(0)  # (P, L, A) -> (L, A)
        for e, p in sorted(set(bins)):
            l, a = np.indices(mean.shape)
            for _ in range(PRIOR):
                learner.update(gate_state(b, l, e, p, L).ravel(), a.ravel(), mean.ravel())
    learner.fit(generator)
    visits = learner.visits.sum(1).reshape(shape)
    T = np.where(visits > 0, np.array(settings.tau_grid)[learner.greedy()].reshape(shape), SEEN_NEVER)
    return T, visits > 0, count


# ------------------------------------------------------------------------------------------------- let the loss decide

def roll_out(model, sample, name, settings_of):
    """Loss, nats a token, of the continuation from one compressed cache for each (W (L, H), tau (L,), budget): (N,)."""
    caches, G = [], model.config.n_kv_head
    for W, tau, budget in settings_of:
        s = ckv.head_score(sample.u[name], torch.from_numpy(W).float())  # (L, T)
        kept = ckv.gate(ckv.protect(s, budget, ckv.SETTINGS[name].window), torch.from_numpy(tau).float(), budget)
        caches.append(ckv.evict(sample.cache, [k.expand(G, -1) for k in kept]))
    return model.nll(KVCache.stack(caches), sample.logits, sample.continuation).numpy()


def choose_strength(model, samples, name, W, taus, progress):
    """W ** strength by budget: the action with the best mean reward -(loss_compressed - loss_full) of real roll-outs.

    Returns the tempered W and the mean rewards (budgets, strengths).
    """
    bandit = EpsilonGreedy(len(W), len(STRENGTHS))
    for i, sample in enumerate(samples):
        jobs = [(W[b] ** x, taus[b][i].numpy(), BUDGETS[b]) for b in range(len(W)) for x in STRENGTHS]
        rewards = sample.loss_full - roll_out(model, sample, name, jobs)
        b, a = np.divmod(np.arange(len(jobs)), len(STRENGTHS))
        bandit.update(b, a, rewards)
        progress.update(len(jobs))
    strength = np.array(STRENGTHS)[bandit.greedy()]
    return W ** strength[:, None, None], bandit.values()


def look_up_taus(samples, name, T, edges):
    """The gate's threshold for every budget and sample: [budget][sample] -> (L,)."""
    bins = [tuple(ckv.risk_bin(x, e) for x, e in zip(s.risk[name], edges)) for s in samples]
    return [[torch.from_numpy(T[b][:, e, p]).float() for e, p in bins] for b in range(len(T))]
