"""What several test files share: a writer of tiny GGUF files, the real vocabulary if it is there, one-line errors."""

import math

import gguf
import numpy as np
import pytest
import torch

from model import BYTE_ALPHABET, CONTROL, Block, Config, Model, Tokenizer, UserError, default_path, rope_frequencies

TINY = Config(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, n_ff=24, vocab_size=260, context_length=128,
              rope_base=5000.0, norm_eps=1e-6)


def assert_one_line(error, *words):
    """The message of a UserError is a single line that contains the words."""
    text = str(error.value)
    assert text.strip() and len(text.splitlines()) == 1
    assert all(str(word) in text for word in words), text


def positions(runs):
    """Numbers written as runs, "0-3 7" -> [0, 1, 2, 3, 7]."""
    ends = [run.split("-") for run in runs.split()]
    return [n for end in ends for n in range(int(end[0]), int(end[-1]) + 1)]


def random_model(config, seed, dtype=torch.float32):
    """A tiny untrained model of any shape, for tests that need no weights."""
    g = torch.Generator().manual_seed(seed)
    c, draw = config, lambda *shape: torch.randn(*shape, generator=g) / math.sqrt(shape[-1])
    ones = torch.ones(c.n_embd)
    blocks = [Block(ones, draw((c.n_head + 2 * c.n_kv_head) * c.head_dim, c.n_embd) * 2,
                    draw(c.n_embd, c.n_head * c.head_dim), ones, draw(2 * c.n_ff, c.n_embd), draw(c.n_embd, c.n_ff))
              for _ in range(c.n_layer)]
    blocks = [Block(*(w.to(dtype) for w in vars(b).values())) for b in blocks]
    embedding = draw(c.vocab_size, c.n_embd).to(dtype)
    return Model(c, embedding, blocks, ones.to(dtype), embedding, rope_frequencies(c), f"random-{seed}", name="random")


# ------------------------------------------------------------------------------------------------------ weights files

def gguf_tensors(model):
    """The model's weights under their GGUF names, query and key rows in GGUF's order: i, i + D/2 become neighbours."""
    c = model.config

    def interleave(w, n_head):
        half = c.head_dim // 2
        order = [h * c.head_dim + i + side * half for h in range(n_head) for i in range(half) for side in (0, 1)]
        return w[order]

    tensors = {"token_embd.weight": model.embedding, "output_norm.weight": model.norm}
    if model.head is not model.embedding:
        tensors["output.weight"] = model.head
    for l, b in enumerate(model.blocks):
        q, k, v = b.qkv.split([n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
        gate, up = b.gate_up.chunk(2)
        for name, w in {"attn_norm": b.attn_norm, "attn_q": interleave(q, c.n_head),
                        "attn_k": interleave(k, c.n_kv_head), "attn_v": v, "attn_output": b.out,
                        "ffn_norm": b.ffn_norm, "ffn_gate": gate, "ffn_up": up, "ffn_down": b.down}.items():
            tensors[f"blk.{l}.{name}.weight"] = w
    return {name: w.numpy() for name, w in tensors.items()}


def gguf_meta(config=TINY):
    """Metadata of a tiny file: 256 byte tokens, 2 merged tokens, 2 control tokens."""
    return {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": config.n_layer,
        "llama.context_length": config.context_length, "llama.embedding_length": config.n_embd,
        "llama.feed_forward_length": config.n_ff, "llama.attention.head_count": config.n_head,
        "llama.attention.head_count_kv": config.n_kv_head, "llama.rope.freq_base": config.rope_base,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*BYTE_ALPHABET, "th", "the", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * 258 + [CONTROL] * 2, "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 258, "tokenizer.ggml.eos_token_id": 259,
    }


def write_gguf(path, tensors, meta):
    """Write a GGUF file of float32 tensors."""
    writer = gguf.GGUFWriter(path, meta["general.architecture"])
    for key, value in meta.items():
        if key != "general.architecture":  # the writer has put it in already
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, w in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --------------------------------------------------------------------------------------------------- the real weights

def why_no_weights():
    """The message that names the pip command where the weights are missing, else an empty string."""
    try:
        default_path()
    except UserError as error:
        return str(error)
    return ""


needs_weights = pytest.mark.skipif(bool(why_no_weights()), reason=why_no_weights())


def real_tokenizer():
    """The real tokenizer, made from the file's metadata alone: no weight is read."""
    meta = {key: field.contents() for key, field in gguf.GGUFReader(default_path()).fields.items()}
    prefix = "tokenizer.ggml."
    return Tokenizer(meta[prefix + "tokens"], meta[prefix + "token_type"], meta[prefix + "pre"],
                     meta["tokenizer.chat_template"], meta[prefix + "bos_token_id"], meta[prefix + "eos_token_id"],
                     meta[prefix + "add_bos_token"])
