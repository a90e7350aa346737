"""GGUF files of tiny models, written with llama.cpp's own package."""

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

KINDS = gguf.GGMLQuantizationType
# What a byte-level tokenizer is made of: bytes, merges, and special tokens.
BYTES = sorted(ByteLevel.alphabet())
MERGES = ["d e", "de f", "Ġ (", "r e", "re t"]
MERGES += ["1 2", "3 4", "12 34", "5 6"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), *SPECIAL, "<think>"]
EOS = TOKENS.index("<|im_end|>")


def permuted(weight, heads):
    """Queries' or keys' rows in llama.cpp's order: its conversion script's `permute`."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(lm, file, kind=KINDS.F32, raw=None, **more):
    """Write `lm`, of one of the families that are read, as a GGUF file; return it.

    kind: of its matrices; raw: {tensor's name in the file: (its bytes, its type)} instead; more:
    further settings, as **{"llama.rope.scaling.type": "linear"}.
    """
    config = lm.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [*TOKENS, *(f"[PAD{i}]" for i in range(len(TOKENS), config.vocab_size))]
    writer.add_token_list(tokens)
    types = {**dict.fromkeys(SPECIAL, 3), "<think>": 4}
    writer.add_token_types([types.get(token, 1) for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|im_start|>"))
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for key, value in more.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key, value)
    for name, (data, of) in tensors_of(lm, kind).items():
        if raw and name in raw:
            data, of = raw[name]
        writer.add_tensor(name, data, raw_dtype=of)
    for name, (data, of) in (raw or {}).items():
        if name not in tensors_of(lm, kind):
            writer.add_tensor(name, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# Where a block has numbers in half precision.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind, outputs, inputs, seed=0):
    """Random bytes of a matrix of a type, [outputs, bytes], whose numbers are of size 0.1."""
    rng = np.random.default_rng(seed)
    size, held = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    blocks = rng.integers(0, 256, (outputs, inputs // size, held), np.uint8)
    largest = {"Q8_0": 127, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 127 * 32}.get(kind, 16)
    for at in HALVES.get(kind, (0,)):
        halves = rng.uniform(-0.2, 0.2, (*blocks.shape[:2], 1)) / (63 if at == 2 else largest)
        blocks[..., at : at + 2] = halves.astype(np.float16).view(np.uint8)
    return torch.from_numpy(blocks.reshape(outputs, -1))


def tensors_of(lm, kind):
    """{name in a GGUF file: (data, type)}; vectors stay in float32, as llama.cpp has them."""
    config = lm.config
    names = gguf.get_tensor_name_map(
        next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == config.model_type),
        config.num_hidden_layers,
    )
    found = {}
    for own, parameter in lm.named_parameters():
        weight = parameter.detach().float().numpy()
        if config.model_type == "llama" and own.endswith(("q_proj.weight", "k_proj.weight")):
            keys = own.endswith("k_proj.weight")
            heads = config.num_key_value_heads if keys else config.num_attention_heads
            weight = permuted(weight, heads)
        of = kind if weight.ndim > 1 else KINDS.F32
        data = weight if of == KINDS.F32 else gguf.quantize(np.ascontiguousarray(weight), of)
        found[names.get_name(own, (".weight", ".bias"))] = (data, of)
    return found
