"""Tests of bandit.py: closed forms written out, problems whose answer is known, seeds, rewards that are no numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bandit import ConservativeQ, EpsilonGreedy, LinUCB

torch.set_num_threads(1)

MEANS = np.array([[.1, .9, .3, .2, 0], [.5, .4, .1, 1.1, .2], [.9, 0, .2, .1, .3]])  # (3 states, 5 actions)
BEST = MEANS.argmax(1).tolist()
properties = settings(max_examples=25, deadline=None, derandomize=True)


def noisy_log(seed, n=3000):
    """Uniformly random states and actions (n,) of the known problem with noisy rewards (n,)."""
    rng = np.random.default_rng(seed)
    states, actions = rng.integers(3, size=n), rng.integers(5, size=n)
    return states, actions, MEANS[states, actions] + rng.normal(0, 0.3, n)


def play(bandit, seed, rounds=150, n=8):
    """Let a bandit choose and learn online; returns all its actions."""
    rng, chosen = np.random.default_rng(seed), []
    for _ in range(rounds):
        states = rng.integers(3, size=n)
        chosen.append(bandit.choose(states, rng).tolist())
        bandit.update(states, chosen[-1], MEANS[states, chosen[-1]] + rng.normal(0, 0.3, n))
    return chosen


def fitted(seed, log=None, **options):
    """A ConservativeQ that has learned from a log."""
    q = ConservativeQ(3, 5, **{"lr": 0.05, "batch": 256, "epochs": 20, **options})
    q.update(*(log or noisy_log(seed)))
    q.fit(torch.Generator().manual_seed(seed))
    return q


def three():
    """One fresh bandit of each kind."""
    return EpsilonGreedy(3, 5), LinUCB(np.eye(3), 5), ConservativeQ(3, 5)


@properties
@given(seed=st.integers(0, 10_000), ridge=st.sampled_from([0.3, 1.0, 4.0]))
def test_linucb_is_ridge_regression(seed, ridge):
    """Guards against a wrong Sherman-Morrison update, a forgotten ridge, and actions that share one regression."""
    rng = np.random.default_rng(seed)
    states, actions, rewards = rng.integers(6, size=40), rng.integers(3, size=40), rng.normal(size=40)
    features, close = rng.normal(size=(6, 4)), lambda a, b: np.allclose(a, b, rtol=0, atol=1e-8)
    bandit = LinUCB(features, 3, ridge=ridge)
    bandit.update(states, actions, rewards)
    for a in range(3):
        X, r = features[states[actions == a]], rewards[actions == a]
        A = ridge * np.eye(4) + X.T @ X
        assert close(bandit.theta()[a], np.linalg.solve(A, X.T @ r)) and close(bandit.inverse[a], np.linalg.inv(A))
        assert close(bandit.values()[:, a], features @ bandit.theta()[a])


def test_linucb_prefers_the_action_it_knows_least():
    """Guards against a confidence width that is left out, subtracted, or not a square root."""
    bandit = LinUCB(np.eye(1), 3, alpha=0.7)
    bandit.update([0] * 9, [0] * 4 + [1] * 2 + [2] * 3, [0.0] * 9)
    assert bandit.choose([0] * 20, np.random.default_rng(0)).tolist() == [1] * 20
    bandit.update([0], [2], [0.55])  # mean 0.55 / 5, width 0.7 / sqrt(5): 0.423, above 0.7 / sqrt(3) = 0.404
    assert bandit.choose([0] * 20, np.random.default_rng(0)).tolist() == [2] * 20


def test_all_three_find_the_best_arms():
    """Guards against a bandit that never explores, learns the wrong cell of its table, or minimises the reward."""
    for seed in range(3):
        for bandit in (EpsilonGreedy(3, 5, epsilon=0.3), LinUCB(np.eye(3), 5)):
            play(bandit, seed)
            assert bandit.greedy().tolist() == BEST
        assert fitted(seed).greedy().tolist() == BEST


def test_conservative_loss_is_the_papers():
    """Guards against a missing half, square, mean or factor c, and against a softmax over states."""
    q, push, error = np.random.default_rng(0).normal(size=(4, 3)), 0.0, 0.0
    states, actions, rewards = [0, 2, 2, 3, 0], [1, 0, 2, 2, 1], [0.3, -1.0, 0.5, 0.0, 2.0]
    for s, a, r in zip(states, actions, rewards):
        push += math.log(sum(math.exp(value) for value in q[s])) - q[s][a]
        error += (q[s][a] - r) ** 2
    loss = ConservativeQ(4, 3, conservatism=0.4).loss(*map(torch.tensor, (q, states, actions, rewards)))
    assert loss.item() == pytest.approx(0.4 * push / 5 + error / 2 / 5, abs=1e-7) and ConservativeQ(4, 3).c == 0.75


def test_an_action_that_was_never_tried_does_not_win():
    """Guards against a table that leaves what the log knows: the untried action starts equal or slightly ahead."""
    states, actions = np.indices((3, 200)).reshape(2, -1)
    for start, c, wins in ((0.0, 0.75, False), (0.05, 0.75, False), (0.05, 0.0, True)):
        bandit = ConservativeQ(3, 5, conservatism=c, lr=0.02, batch=256, epochs=40)
        bandit.q[:, 4] = start
        bandit.update(states, actions % 4, np.full(600, -0.1))
        bandit.fit(torch.Generator().manual_seed(0))
        assert (bandit.greedy() == 4).all() if wins else not (bandit.greedy() == 4).any()


def test_without_conservatism_q_is_the_mean_reward():
    """Guards against a squared error toward something else than the rewards of that state and action."""
    states, actions, _ = noisy_log(0)
    rewards = MEANS[states, actions] + 0.2 * (-1.0) ** np.arange(len(states))
    q = fitted(0, (states, actions, rewards), conservatism=0.0, weight_decay=0.0, lr=0.01, epochs=60)
    for s, a in np.ndindex(3, 5):
        assert q.values()[s, a] == pytest.approx(rewards[(states == s) & (actions == a)].mean(), abs=0.06)


def test_states_are_drawn_uniformly():
    """Guards against frequent states that drown rare ones: 5,000 experiences of state 0, 50 of 2, none of 1."""
    class Spy(ConservativeQ):
        def loss(self, q, states, actions, rewards):
            drawn.extend(states.tolist())
            return super().loss(q, states, actions, rewards)

    drawn, states = [], np.repeat([0, 2], [5000, 50])
    bandit = Spy(3, 5, batch=512, epochs=2)
    bandit.update(states, np.arange(5050) % 5, np.zeros(5050))
    bandit.fit(torch.Generator().manual_seed(0))
    assert len(drawn) == 2 * 10 * 512 and drawn.count(1) == 0  # 10 batches of 512 are the first to cover 5,050
    assert 0.48 < drawn.count(2) / len(drawn) < 0.52


def test_a_state_never_visited_gets_the_default():
    """Guards against action 0 standing in for 'nothing is known'."""
    for bandit in (EpsilonGreedy(3, 5, default=2), ConservativeQ(3, 5, lr=0.05, default=2)):
        assert bandit.greedy().tolist() == [2, 2, 2]
        bandit.update([0, 0, 2], [1, 3, 3], [-5.0, -1.0, -2.0])
        if isinstance(bandit, ConservativeQ):
            bandit.fit(torch.Generator().manual_seed(0))
        assert bandit.greedy()[1] == 2
        assert bandit.greedy()[0] == 3 or isinstance(bandit, ConservativeQ)  # never tried does not count as 0


def test_the_same_seed_gives_the_same_table():
    """Guards against randomness from anywhere but the generator, and against a seed that is ignored."""
    for kind in range(3):
        bandits = [three()[kind] for _ in range(3)]
        first, same, other = (play(bandit, seed, rounds=20) for bandit, seed in zip(bandits, (5, 5, 6)))
        assert first == same != other and np.array_equal(bandits[0].values(), bandits[1].values())
    first, same, other = (fitted(seed, noisy_log(0), epochs=2).values() for seed in (5, 5, 6))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_rewards_that_are_not_finite_are_refused():
    """Guards against one NaN that poisons a whole table, and against a half-made update."""
    for bandit, wrong in zip(three() * 3, [math.nan] * 3 + [math.inf] * 3 + [-math.inf] * 3):
        with pytest.raises(ValueError):
            bandit.update([0, 1], [2, 3], [0.5, wrong])
        assert bandit.visits.sum() == 0 and not getattr(bandit, "log", [])


@properties
@given(seed=st.integers(0, 10_000))
def test_the_order_of_experience_does_not_matter_and_visits_count(seed):
    """Guards against repeated (state, action) pairs that are added once, and against an update that forgets."""
    states, actions, rewards = noisy_log(seed, n=60)
    order = np.random.default_rng(seed + 1).permutation(60)
    for once, parts in zip(three(), three()):
        once.update(states, actions, rewards)
        for part in np.array_split(order, 7):
            parts.update(states[part], actions[part], rewards[part])
        assert np.allclose(once.values(), parts.values(), rtol=0, atol=1e-9)
        assert once.visits.tolist() == parts.visits.tolist()
        assert all(once.visits[s, a] == ((states == s) & (actions == a)).sum() for s, a in np.ndindex(3, 5))


def test_confidence_is_the_odds_of_a_mean_above_zero():
    """Guards against a sign, a spread that is not that of the mean, and a state without experience or without spread."""
    bandit, rewards = EpsilonGreedy(4, 1), np.random.default_rng(0).normal(0.2, 1, 50)
    for state, some in enumerate((rewards, -rewards, np.zeros(5))):
        bandit.update(np.full(len(some), state), np.zeros(len(some), dtype=int), some)
    t = rewards.mean() / (rewards.std() / math.sqrt(50))
    up = 1 / (1 + math.exp(-t))  # logistic probability that the mean is above 0
    assert bandit.confidence()[:, 0] == pytest.approx([2 * up - 1, 1 - 2 * up, 0, 0])


def test_a_cautious_choice_needs_more_than_luck():
    """Guards against one lucky experience that outweighs the action known to be neutral, and against caution without end."""
    bandit = EpsilonGreedy(3, 3)
    for state, rewards in enumerate(([0.0, 0.0], [0.5, -0.3], [0.2, 0.3])):  # action 1: nothing, noise, gain
        bandit.update([state] * 2, [0] * 2, [0.0, 0.0])
        bandit.update([state] * 2, [1] * 2, rewards)
        bandit.update([state] * 2, [2] * 2, [-1.0, -1.0])
    assert bandit.greedy().tolist() == [0, 1, 1]
    assert bandit.cautious(neutral=0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("rewards, choice", [
    ({1: [0.1, 0.5, 0.1, 0.5, -0.3]}, 1),                 # mean 0.18, error 0.13, deviation 0.30
    ({1: [0.9, -0.9, 0.9, -0.6, 0.1]}, 0),                # mean 0.08, error 0.33
    ({1: [0.9, 0.9, -0.9, 0.9], 2: [0.3] * 4}, 2),        # mean 0.45, error 0.39; mean 0.30, no error
])
def test_caution_is_one_standard_error_of_the_mean(rewards, choice):
    """Guards against the deviation for the error, a best mean for the best bound, and repeated pairs that are counted once."""
    bandit = EpsilonGreedy(1, 3)
    for action in range(3):
        paid = rewards.get(action, [-1.0 * action, -1.0 * action])
        bandit.update([0] * len(paid), [action] * len(paid), paid)  # the same pair again and again in one update
    assert bandit.cautious(neutral=0).tolist() == [choice]


def test_linucb_breaks_ties_at_random():
    """Guards against a fresh bandit that always opens with action 0."""
    assert set(LinUCB(np.eye(1), 4).choose([0] * 200, np.random.default_rng(0))) == {0, 1, 2, 3}


def test_weights_of_states_without_experience_decay():
    """Guards against AdamW without its decay: lr 0.1 times 0.5, three steps of one batch each."""
    bandit = ConservativeQ(2, 2, lr=0.1, weight_decay=0.5, batch=4, epochs=3)
    bandit.q[1] = 1
    bandit.update([0] * 4, [0, 1, 0, 1], [0.0] * 4)
    bandit.fit(torch.Generator().manual_seed(0))
    assert bandit.values()[1] == pytest.approx([0.95 ** 3] * 2)
