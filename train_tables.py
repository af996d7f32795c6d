"""Compile W_head and T_gate offline, from experience with the real model: `python train_tables.py`.

1. Collect. Every calibration prompt is prefilled once. A pass over the right continuation then shows which prompt tokens
   it really needs: mass[l,t], the most attention that any of its queries pays, times value length, summed over heads.
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
from bandit import ConservativeQ, EpsilonGreedy
from model import KVCache, UserError, load

HERE = Path(__file__).parent
BUDGETS = (64, 128, 256, 512)
CONTINUATION = 64       # tokens of continuation scored at most (the paper: 128)
HOLD_OUT = 3            # every third prompt only decides in step 3
PRIOR = 3               # pseudo-experiences by which a rare gate state leans on its layer's mean
SEEN_NEVER = 0.8        # tau of a gate state that was never visited (the paper's: keep more)
MAX_ROUNDS = 2
LEARNING_RATE = 3e-4   # of AdamW, as in the paper


@dataclasses.dataclass
class Sample:
    """One calibration prompt, prefilled: all that learning needs."""
    u: dict              # name of a setting -> (L, H, T) utility of Eq. 4
    risk: dict           # name of a setting -> (entropy, perplexity)
    mass: torch.Tensor   # (L, T) share of the continuation's attention, 0 on tokens that are always kept, sum 1 a layer
    cache: KVCache       # None for prompts that are never rolled out: caches are what takes memory
    logits: torch.Tensor  # (V,) of the last prompt token
    continuation: list   # token ids
    loss_full: float     # nats a token from the full cache


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
    if len(prompts) < HOLD_OUT:
        raise UserError(f"{path}: {len(prompts)} prompts are too few to learn from and to decide on")
    return prompts[::max(1, len(prompts) // limit)][:limit] if limit else prompts


# ------------------------------------------------------------------------------------------------------------- collect

def collect(model, prompt, roll_out):
    """Prefill one prompt, look at what its continuation attends to, and keep what learning needs."""
    tokenizer = model.tokenizer
    tokens = tokenizer.chat(prompt["prompt"]) if prompt["chat"] else tokenizer.encode(prompt["prompt"])
    continuation = tokenizer.encode(prompt["continuation"])[:CONTINUATION]
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
    mass = (needed * ckv.value_norm(cache).repeat_interleave(H // model.config.n_kv_head, 1)).sum(1)  # (L, H, T) -> (L, T)
    mass[:, :ckv.SINKS] = 0
    mass[:, T - ckv.OURS.window:] = 0
    u = {name: ckv.utility(observation, cache, s) for name, s in ckv.SETTINGS.items()}
    risk = {name: ckv.risk(observation, s.window) for name, s in ckv.SETTINGS.items()}
    return Sample(u, risk, mass / mass.sum(1, keepdim=True), cache if roll_out else None, logits, continuation, loss_full)


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
    settings, (_, L, H) = ckv.SETTINGS[name], W.shape
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


def risk_bins(samples, name, edges):
    """The (entropy bin, perplexity bin) of every sample."""
    return [tuple(ckv.risk_bin(x, e) for x, e in zip(sample.risk[name], edges)) for sample in samples]


def gate_state(b, l, e, p, L):
    """Row of the gate's Q-table."""
    return ((b * L + l) * ckv.N_ENTROPY_BINS + e) * ckv.N_PPL_BINS + p


def standardised(rewards):
    """Rewards on the scale of one, so that one learning rate fits every state."""
    return (rewards / (np.std(rewards) + 1e-12)).astype(np.float32)


def learn_heads(samples, name, W, taus, budgets, generator, rng):
    """One sweep over the heads in random order, one Q-table a budget and head. Returns the new W and the experiences used."""
    settings, (_, L, H) = ckv.SETTINGS[name], W.shape
    neutral, W, count = int(np.abs(np.log(settings.W_grid)).argmin()), W.copy(), 0
    for b, budget in enumerate(budgets):
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


def learn_gate(samples, name, W, edges, budgets, generator):
    """T_gate given W: a Q-table over (budget, layer, bins). Returns T (budgets, L, 20, 4), its visits and the experiences."""
    settings, (_, L, _) = ckv.SETTINGS[name], W.shape
    shape = (len(budgets), L, ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS)
    bins = risk_bins(samples, name, edges)
    learner = ConservativeQ(int(np.prod(shape)), len(settings.tau_grid), lr=LEARNING_RATE)
    count = 0
    for b, budget in enumerate(budgets):
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
        kept = ckv.kept_tokens(sample.u[name], torch.from_numpy(W).float(), torch.from_numpy(tau).float(), budget,
                               ckv.SETTINGS[name].window)
        caches.append(ckv.evict(sample.cache, [k.expand(G, -1) for k in kept]))
    return model.nll(KVCache.stack(caches), sample.logits, sample.continuation).numpy()


def choose_strength(model, samples, name, W, taus, budgets, progress):
    """W ** strength by budget: the action with the best mean reward -(loss_compressed - loss_full) of real roll-outs.

    Returns the tempered W and the mean rewards (budgets, strengths).
    """
    strengths = ckv.SETTINGS[name].strengths
    bandit = EpsilonGreedy(len(W), len(strengths))
    for i, sample in enumerate(samples):
        jobs = [(W[b] ** x, taus[b][i].numpy(), budget) for b, budget in enumerate(budgets) for x in strengths]
        rewards = sample.loss_full - roll_out(model, sample, name, jobs)
        b, a = np.divmod(np.arange(len(jobs)), len(strengths))
        bandit.update(b, a, rewards)
        progress.update(len(jobs))
    strength = np.array(strengths)[bandit.greedy()]
    return W ** strength[:, None, None], bandit.values()


def look_up_taus(samples, name, T, edges):
    """The gate's threshold for every budget and sample: [budget][sample] -> (L,)."""
    return [[torch.from_numpy(T_b[:, e, p]).float() for e, p in risk_bins(samples, name, edges)] for T_b in T]


def compile_tables(model, samples, name, budgets, rounds, seed, say):
    """The coupled compilation of one reading of the method. Returns ckv.Compiled and its evidence as a dict."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    L, H = model.config.n_layer, model.config.n_head
    learn_on = [s for i, s in enumerate(samples) if i % HOLD_OUT != HOLD_OUT - 1]
    decide_on = [s for i, s in enumerate(samples) if i % HOLD_OUT == HOLD_OUT - 1]
    quantiles = [np.quantile([s.risk[name][i] for s in learn_on], np.arange(1, n) / n)
                 for i, n in enumerate((ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS))]
    W, T = np.ones((len(budgets), L, H)), np.zeros((len(budgets), L, ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS))
    evidence = {"rounds": [], "roll_outs": 0, "head_experiences": 0, "gate_experiences": 0}
    strengths = ckv.SETTINGS[name].strengths
    n_roll_outs = len(budgets) * len(strengths) * len(decide_on)
    for round_ in range(rounds):
        start = time.time()
        raw, n = learn_heads(learn_on, name, W, look_up_taus(learn_on, name, T, quantiles), budgets, generator, rng)
        evidence["head_experiences"] += n
        with tqdm(total=n_roll_outs, desc=f"{name}, round {round_ + 1}", unit="roll-out", leave=False) as progress:
            taus = look_up_taus(decide_on, name, T, quantiles)
            new_W, rewards = choose_strength(model, decide_on, name, raw, taus, budgets, progress)
        evidence["roll_outs"] += n_roll_outs
        new_T, seen, n = learn_gate(learn_on, name, new_W, quantiles, budgets, generator)
        evidence["gate_experiences"] += n
        changed = {"W_head": float((new_W != W).mean()), "T_gate": float((new_T != T).mean())}
        W, T = new_W, new_T
        evidence["rounds"].append({
            "entries_changed": changed, "seconds": round(time.time() - start, 1),
            "held_out_dnll_by_strength": {str(b): dict(zip(map(str, strengths), (-r).round(4).tolist()))
                                          for b, r in zip(budgets, rewards)}})
        say(f"{name}, round {round_ + 1}: {100 * changed['W_head']:.0f}% of W_head and {100 * changed['T_gate']:.0f}% of "
            f"T_gate changed, {time.time() - start:.0f} s")
        for b, r in zip(budgets, rewards):
            say(f"  budget {b}: held-out dNLL " + ", ".join(f"W^{x:g} {-v:.3f}" for x, v in zip(strengths, r)))
        if not any(changed.values()):
            break
    evidence["gate_states_seen"] = float(seen.mean())
    visits = np.zeros((ckv.N_ENTROPY_BINS, ckv.N_PPL_BINS), dtype=int)  # prompts a gate state, the same in every layer
    np.add.at(visits, tuple(zip(*risk_bins(learn_on, name, quantiles))), 1)
    evidence["visits"] = visits.tolist()
    evidence["check"] = check(model, decide_on, name, W, T, quantiles, budgets)
    return ckv.Compiled(W, T, *quantiles), evidence


def check(model, samples, name, W, T, edges, budgets):
    """Held-out roll-outs without tables, with W_head, with both: mean dNLL by budget, and what the gate did."""
    taus, rows = look_up_taus(samples, name, T, edges), {}
    for b, budget in enumerate(budgets):
        losses, sizes = [], []
        for i, sample in enumerate(samples):
            tau = taus[b][i].numpy()
            losses.append(roll_out(model, sample, name, [(np.ones_like(W[b]), 0 * tau, budget), (W[b], 0 * tau, budget),
                                                         (W[b], tau, budget)]) - sample.loss_full)
            sizes += map(len, ckv.kept_tokens(sample.u[name], torch.from_numpy(W[b]).float(), taus[b][i], budget,
                                              ckv.SETTINGS[name].window))
        mean = np.mean(losses, 0).round(4).tolist()
        rows[str(budget)] = {"dnll_no_tables": mean[0], "dnll_W_head": mean[1], "dnll_W_head_and_T_gate": mean[2],
                             "kept_mean": round(float(np.mean(sizes)), 1),
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
            samples.append(collect(model, prompt, roll_out=len(samples) % HOLD_OUT == HOLD_OUT - 1))
    except KeyboardInterrupt:  # learn from what is there, but do not replace the full tables
        if len(samples) < 2 * HOLD_OUT:
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
        "learner": f"conservative Q-learning, c 0.75, AdamW lr {LEARNING_RATE}", "evidence": evidence,
        "prompts": {p["id"]: hashlib.sha256((p["prompt"] + p["continuation"]).encode()).hexdigest()[:16] for p in used}}
    ckv.Tables(np.array(budgets), model.fingerprint, compiled, provenance).save(out)
    stem = out.with_suffix("")
    ckv.write_atomically(stem.with_suffix(".json"), json.dumps(provenance, indent=1))
    heat_maps(compiled, budgets, stem)
    total = lambda key: sum(e[key] for e in evidence.values())
    print(f"{out.name}: {len(used)} prompts, {total('roll_outs')} roll-outs, {total('head_experiences')} experiences of heads "
          f"and {total('gate_experiences')} of the gate, {time.time() - start:.0f} s")


if __name__ == "__main__":
    evaluation.run_command(main)
