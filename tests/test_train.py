"""Tests of train_tables.py: the local rewards are those of the sets that the method would really keep."""

import numpy as np
import pytest
import torch

import compilerkv as ckv
import train_tables
from test_compilerkv import G, H, L, random_prompt

RULES = {"compilerkv": (16, 1), "compilerkv-paper": (64, 1)}  # no pool, so that no scores tie


def sample(seed, T=150):
    """A calibration prompt of random tensors, with random needs."""
    observation, cache = random_prompt(seed, T=T)
    mass = torch.rand(L, G, T, generator=torch.Generator().manual_seed(seed))
    mass[..., :ckv.SINKS] = 0
    mass[..., T - 8:] = 0
    u = {(name, w): ckv.utility(observation, cache, ckv.SETTINGS[name], w) for name, (w, _) in RULES.items()}
    return train_tables.Sample(u, (3.0, 5.0), mass / mass.sum((1, 2), keepdim=True), cache, None, [], 0.0)


def share_kept(s, name, W, tau, budget):
    """Share of each layer's mass on the set that `kept_tokens` keeps, protected tokens left out: (L,)."""
    n_sets = 1 if ckv.SETTINGS[name].shared else G
    rule = RULES[name]
    kept = ckv.kept_tokens(s.pooled(name, rule), W, tau, budget, rule[0], n_sets)
    mass, (T, window) = s.mass.clone(), (s.mass.shape[-1], min(rule[0], budget - ckv.SINKS))
    mass[..., T - window:] = 0
    rows = [[mass[l, g][row[row >= 0]].sum() for g, row in enumerate(kept[l].expand(G, -1))] for l in range(L)]
    return torch.tensor(rows).sum(1)


@pytest.mark.parametrize("name", RULES)
def test_the_reward_of_a_head_is_the_mass_that_its_action_keeps(name):
    """Guards against a fast path that ranks or protects in another way than the method, and against the wrong head."""
    s, budget, grid = sample(1), 90, ckv.SETTINGS[name].W_grid
    W = torch.rand(L, H, generator=torch.Generator().manual_seed(2)) + 0.5
    rewards = train_tables.head_rewards(s, name, RULES[name], budget, W)
    neutral = int(np.abs(np.log(grid)).argmin())
    assert rewards.shape == (len(grid), L, H) and not rewards[neutral].any() and rewards.any()
    for h in range(H):
        shares = []
        for action in (neutral, 0, len(grid) - 1):
            changed = W.clone()
            changed[:, h] = grid[action]
            shares.append(share_kept(s, name, changed, torch.zeros(L), budget))
        assert torch.allclose(rewards[0, :, h], shares[1] - shares[0], atol=1e-5)
        assert torch.allclose(rewards[-1, :, h], shares[2] - shares[0], atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_the_reward_of_a_threshold_is_the_mass_kept_less_the_papers_penalty(name):
    """Guards against a gate that is paid for another set than the one it leaves."""
    s, budget, T = sample(3), 90, 150
    n_sets = 1 if ckv.SETTINGS[name].shared else G
    rewards = train_tables.gate_rewards(s, name, RULES[name], budget, torch.ones(L, H))
    scores = ckv.protect(ckv.head_score(s.pooled(name, RULES[name]), torch.ones(L, H), n_sets), budget, RULES[name][0])
    for i, tau in enumerate(ckv.SETTINGS[name].tau_grid):
        candidates = (scores >= tau).sum((1, 2)) / n_sets  # (L,)
        penalty = (candidates - budget).clamp(min=0) / T
        wanted = share_kept(s, name, torch.ones(L, H), torch.full((L,), tau), budget) - penalty
        assert np.allclose(rewards[:, i], wanted.numpy(), atol=1e-5)


def test_both_halves_hold_every_kind():
    """Guards against a half of stories that decides over tables for code."""
    first, second = train_tables.halves(list(range(24)))
    assert {i % train_tables.KINDS for i in first} == {i % train_tables.KINDS for i in second} == set(range(6))
    assert not set(first) & set(second) and len(first) == len(second) == 12


def test_learners_find_what_pays_and_random_does_not():
    """Guards against a regret that counts another table, a learner that never learns, and a stream that peeks."""
    rng = np.random.default_rng(0)
    truth = np.zeros((6, 4))
    truth[np.arange(6), [1, 2, 3, 1, 2, 3]] = 1.0
    log, held_out = (np.where(truth[None] > 0, 1.0, 0.0) + 0.05 * rng.standard_normal((80, 6, 4)) for _ in range(2))
    log[..., 0] = held_out[..., 0] = 0  # the neutral action
    curves = train_tables.compare_learners(log, held_out, seed=1)
    for name, (regret, reward) in curves.items():
        if name == "complete log, cautious":
            assert regret is None and reward > 0.95
        elif name != "random":
            assert reward > 0.9 and regret[-1] < 0.8 * curves["random"][0][-1], name
    assert (np.diff(curves["random"][0]) > 0).mean() > 0.9  # it never stops to pay
