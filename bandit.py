"""Three contextual bandits by hand: epsilon-greedy, LinUCB and horizon-1 conservative Q-learning.

A bandit sees a state, takes one action, gets one reward; there is no next state. States and actions are integers here:
a state is a row of a table to be compiled, an action one of the values that the row may take. All three share one
interface, on arrays of N experiences so that a whole log is one call:

    choose(states, generator) -> actions (N,)      explore and exploit
    update(states, actions, rewards)               learn from what happened
    values() -> (n_states, n_actions)              how good each action looks
    greedy() -> (n_states,)                        the compiled table: the best known action of each state
    visits   -> (n_states, n_actions)              how often each action was tried

This module knows nothing of caches and prompts.
"""

import numpy as np
import torch


class EpsilonGreedy:
    """Mean reward of each (state, action); explore uniformly with probability epsilon (Sutton & Barto, section 2.2)."""

    def __init__(self, n_states, n_actions, epsilon=0.1, default=0):
        """default: the action of a state that has never been visited."""
        self.epsilon, self.default = epsilon, default
        self.sums, self.squares = np.zeros((n_states, n_actions)), np.zeros((n_states, n_actions))
        self.visits = np.zeros((n_states, n_actions), dtype=np.int64)

    def choose(self, states, generator):
        """Actions (N,) for states (N,); generator: numpy.random.Generator."""
        return explore_or_exploit(self, states, generator)

    def update(self, states, actions, rewards):
        """Add N experiences; the order does not matter."""
        require_finite(rewards)
        np.add.at(self.sums, (states, actions), rewards)
        np.add.at(self.squares, (states, actions), np.square(rewards))
        np.add.at(self.visits, (states, actions), 1)

    def values(self):
        """Mean reward (n_states, n_actions); -inf where an action was never tried."""
        return np.where(self.visits > 0, self.sums / np.maximum(self.visits, 1), -np.inf)

    def greedy(self):
        """Best mean reward of each state; the default where nothing was tried."""
        return np.where(self.visits.any(1), self.values().argmax(1), self.default)

    def errors(self):
        """Standard error of every mean reward (n_states, n_actions)."""
        n = np.maximum(self.visits, 1)
        return np.sqrt(np.maximum(self.squares / n - np.square(self.sums / n), 0) / n)

    def cautious(self, neutral):
        """The action whose mean less one standard error is highest, if that exceeds the neutral action's; else `neutral`: (n_states,).

        Rewards are counted from the neutral action's, so its own are all 0. Luck on a few experiences does not displace it; a
        single experience has no error and is believed.
        """
        bound = self.values() - self.errors()
        best = bound.argmax(1)
        better = bound[np.arange(len(best)), best] > bound[:, neutral]
        return np.where(better, best, neutral)

    def confidence(self):
        """How surely a mean reward is above 0, from -1 (surely below) over 0 (as likely as not) to 1: (n_states, n_actions).

        The probability above 0 less that below, tanh(t / 2), for t = mean / standard error that is distributed logistically.
        """
        errors = self.errors()
        return np.tanh(np.divide(self.values(), errors, out=np.zeros(errors.shape), where=errors > 0) / 2)


class LinUCB:
    """Disjoint LinUCB (Li et al., arXiv 1003.0146, algorithm 1): a ridge regression an action, plus its uncertainty.

    For action a: A_a = ridge I + sum x x^T, b_a = sum r x, theta_a = A_a^-1 b_a; choose the largest
    theta_a . x + alpha sqrt(x^T A_a^-1 x). A_a^-1 is kept up to date by the Sherman-Morrison formula.
    """

    def __init__(self, features, n_actions, alpha=1.0, ridge=1.0):
        """features: (n_states, d) one context vector x a state; the identity matrix makes the states independent."""
        self.features, self.alpha = np.asarray(features, dtype=float), alpha
        n_states, d = self.features.shape
        self.inverse = np.tile(np.eye(d) / ridge, (n_actions, 1, 1))  # A_a^-1: (n_actions, d, d)
        self.b = np.zeros((n_actions, d))
        self.visits = np.zeros((n_states, n_actions), dtype=np.int64)

    def theta(self):
        """Regression weights of every action, (n_actions, d)."""
        return np.einsum("aij,aj->ai", self.inverse, self.b)

    def values(self):
        """Predicted mean reward (n_states, n_actions)."""
        return self.features @ self.theta().T

    def choose(self, states, generator):
        """Actions (N,) of the highest upper confidence bound; ties are broken at random."""
        x = self.features[np.asarray(states)]  # (N, d)
        width = np.sqrt(np.einsum("ni,aij,nj->na", x, self.inverse, x))  # (N, n_actions)
        bound = x @ self.theta().T + self.alpha * width
        ties = bound >= bound.max(1, keepdims=True) - 1e-12
        return (ties * generator.random(bound.shape)).argmax(1)

    def update(self, states, actions, rewards):
        """Add N experiences, one rank-1 update each."""
        require_finite(rewards)
        for state, action, reward in zip(states, actions, rewards):
            x, inverse = self.features[state], self.inverse[action]
            ax = inverse @ x  # (d,)
            self.inverse[action] = inverse - np.outer(ax, ax) / (1 + x @ ax)  # Sherman-Morrison: (A + x x^T)^-1
            self.b[action] += reward * x
            self.visits[state, action] += 1

    def greedy(self):
        """Highest predicted reward of each state, without the exploration bonus."""
        return self.values().argmax(1)


class ConservativeQ:
    """Horizon-1 conservative Q-learning over a log, as the paper compiles its tables (after Kumar et al., arXiv 2006.04779).

    Minimises J(Q) = c E[logsumexp_a Q(s,a) - Q(s,a_i)] + 1/2 E[(Q(s,a_i) - r_i)^2] over a table Q by AdamW. The first
    term pushes down actions that the log does not contain, so that the table stays with what was really tried.
    The paper's constants are the defaults. Unlike the other two it learns offline: `update` logs, `fit` learns.
    """

    def __init__(self, n_states, n_actions, conservatism=0.75, lr=3e-4, weight_decay=0.01, batch=4096, epochs=10,
                 epsilon=0.1, default=0):
        self.c, self.lr, self.weight_decay, self.batch, self.epochs = conservatism, lr, weight_decay, batch, epochs
        self.epsilon, self.default = epsilon, default
        self.q = torch.zeros(n_states, n_actions)
        self.visits = np.zeros((n_states, n_actions), dtype=np.int64)
        self.log = []  # (states, actions, rewards) as they came

    def choose(self, states, generator):
        """Epsilon-greedy on Q: the log needs more than one action a state."""
        return explore_or_exploit(self, states, generator)

    def update(self, states, actions, rewards):
        """Append N experiences to the log; Q is unchanged until `fit`."""
        with np.errstate(over="ignore"):
            rewards = np.asarray(rewards, dtype=np.float32)
        require_finite(rewards)
        self.log.append((np.asarray(states), np.asarray(actions), rewards))
        np.add.at(self.visits, (states, actions), 1)

    def loss(self, q, states, actions, rewards):
        """J(Q) on a batch: q (n_states, n_actions); states, actions, rewards (N,)."""
        rows = q[states]  # (N, n_actions)
        taken = rows.gather(1, actions[:, None])[:, 0]  # (N,)
        return self.c * (rows.logsumexp(1) - taken).mean() + 0.5 * (taken - rewards).pow(2).mean()

    def fit(self, generator):
        """Several epochs over the log, in batches whose states are drawn uniformly; generator: torch.Generator."""
        if not self.log:
            return
        states, actions, rewards = (torch.from_numpy(np.concatenate(part)) for part in zip(*self.log))
        # Rare states count as much as frequent ones: an experience is drawn in proportion to 1 / visits of its state.
        weight = 1.0 / torch.bincount(states, minlength=len(self.q))[states].double()
        q = self.q.clone().requires_grad_()
        optimizer = torch.optim.AdamW([q], lr=self.lr, weight_decay=self.weight_decay)
        cumulative = weight.cumsum(0)
        for _ in range(self.epochs * -(-len(states) // self.batch)):
            u = torch.rand(self.batch, generator=generator, dtype=torch.float64) * cumulative[-1]
            i = torch.searchsorted(cumulative, u).clamp(max=len(states) - 1)
            optimizer.zero_grad()
            self.loss(q, states[i], actions[i], rewards[i]).backward()
            optimizer.step()
        self.q = q.detach()

    def values(self):
        """Q (n_states, n_actions)."""
        return self.q.numpy()

    def greedy(self):
        """argmax_a Q(s,a) of each state; the default where nothing was logged."""
        return np.where(self.visits.any(1), self.values().argmax(1), self.default)


def explore_or_exploit(bandit, states, generator):
    """The greedy action of each state, or with probability epsilon any action: (N,) -> (N,)."""
    states = np.asarray(states)
    explore = generator.random(len(states)) < bandit.epsilon
    return np.where(explore, generator.integers(bandit.visits.shape[1], size=len(states)), bandit.greedy()[states])


def require_finite(rewards):
    """Raise ValueError for a reward that is not finite: one NaN would poison a whole table."""
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
