"""Every supported architecture, as a tiny random checkpoint: exact against transformers' own
`generate`; others are refused.

The oracle is a model that transformers alone has loaded. Where layers have windows, generations run
far past them.
"""

import copy
import json

import pytest
import torch
from common import forward, one_line_error, tiny_tokenizer, with_adapter
from test_graphs import traced
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from sdsat.config import DecodeConfig, SamplingConfig, TrainConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines.graphs import Graphs
from sdsat.evaluation.reference import transformers_generate
from sdsat.method.costs import COUNTS, CostCurve
from sdsat.method.tree import DraftTree, make_tree
from sdsat.models import attention
from sdsat.models.loading import load
from sdsat.training.distill import answer_batch
from sdsat.training.loop import train
from sdsat.training.loss import IGNORED, joint_logits, predict, sat_batch
from sdsat.training.shards import TrainingExample

VOCAB = 16
SAT = 15
WINDOW = 16  # so few tokens that random SATs are right now and then
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.3,
    eos_token_id=None,
    bos_token_id=1,
    pad_token_id=None,
)
NO_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
WIDE = {**NO_DIM, "hidden_size": 128}  # Qwen2's head_dim is hidden_size / heads
UNGROUPED = {**COMMON, "num_key_value_heads": 4}
THREE = {**COMMON, "num_hidden_layers": 3}  # two would just repeat themselves
UNTIED = dict(tie_word_embeddings=False)
ROPE = dict(rope_theta=10000.0)
LLAMA3 = dict(
    rope_theta=500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(**ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
# the first layer sees everything
SLIDING = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
CAPS = dict(query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=4.0)
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
NATIVE = {  # what the native engine takes too
    "llama 2, 7b": LlamaConfig(**UNGROUPED),
    "llama 2, 70b": LlamaConfig(**COMMON),
    "codellama": LlamaConfig(**UNGROUPED, rope_parameters={"rope_theta": 1e6}),
    "llama 3": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "llama 3, tied": LlamaConfig(**COMMON, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama, one kv head": LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "llama, attention biases": LlamaConfig(**COMMON, attention_bias=True),
    "llama, mlp biases": LlamaConfig(**COMMON, mlp_bias=True),
    "linear rope": LlamaConfig(
        **COMMON, rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}
    ),
    "yarn rope": LlamaConfig(**COMMON, rope_parameters=YARN),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "mistral, window never reached": MistralConfig(**COMMON, sliding_window=256),
    "qwen2": Qwen2Config(**WIDE),
    "qwen2, tied": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON),
    "qwen3, tied": Qwen3Config(**COMMON, tie_word_embeddings=True),
}
WINDOWED = {
    "mistral, window": MistralConfig(**COMMON, sliding_window=WINDOW),
    "qwen2, window": Qwen2Config(**NO_DIM, **SLIDING),
    "qwen3, window": Qwen3Config(**COMMON, **SLIDING),
    "gemma 2": Gemma2Config(**COMMON, **CAPS, **UNTIED, sliding_window=WINDOW),
    "gemma 2, tied": Gemma2Config(**THREE, **CAPS, sliding_window=WINDOW),
    "gemma 3": Gemma3TextConfig(
        **COMMON,
        **UNTIED,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
        rope_parameters=GEMMA3_ROPE,
    ),
}
OTHERS = {
    "gemma": GemmaConfig(**COMMON),
    "gemma, untied": GemmaConfig(**COMMON, **UNTIED),
    **WINDOWED,
}
FAMILIES = {**NATIVE, **OTHERS}
LATE = "qwen2, tied"  # varies late
ADAPTED = ("mistral, window", "qwen2, window", "gemma", "gemma 2, tied", "gemma 3")
RUNS = [
    (0, "chain", "two-step"),
    (1, "chain", "two-step"),
    (3, "chain", "two-step"),
    (3, (2, 2, 1), "two-step"),
    (2, "chain", "one-pass"),
    (3, (2, 2, 1), "one-pass"),
    (3, "chain", "auto"),
    (3, (2, 2, 1), "auto"),
    (3, "grown", "auto"),
]
# `auto` drafts a lot
COSTS = CostCurve([[1e-3 * n + 1 for n in COUNTS]] * 2, [[1e-3 * n + 1 for n in COUNTS]] * 2, 0.0)
PROMPT = [1, 5, 9, 2, 7, 3, 12]


def checkpoint(folder, config, sat=True):
    """A random model whose norms and biases are no ones and zeros, and whose tokens don't just
    repeat themselves.
    """
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if hasattr(lm.get_input_embeddings(), "embed_scale"):
            lm.get_input_embeddings().weight.div_(config.hidden_size**0.5)
    lm.save_pretrained(folder)
    if sat:
        path = folder / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "sdsat": {"sat_token_id": SAT, "k": 3}})
        )
    tiny_tokenizer([f"<{i}>" for i in range(VOCAB)]).save_pretrained(folder)
    return str(folder)


def narrow(family):
    """The family's config with windows that end within a pass."""
    config = copy.deepcopy(FAMILIES[family])
    if family in WINDOWED:
        config.sliding_window = 2
    return config


def alone(folder):
    """The model as transformers loads it.

    Its sdpa attention leaves Gemma 2's caps out: `eager`, as Gemma 2's authors advise.
    """
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def generated(lm, num_tokens, sat=True, prompt=PROMPT):
    ids = torch.tensor([prompt])
    never = [SAT] if sat else None
    settings = dict(
        do_sample=False, suppress_tokens=never, pad_token_id=0, attention_mask=torch.ones_like(ids)
    )
    return lm.generate(ids, max_new_tokens=num_tokens, **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_generate(tmp_path, family):
    folder = checkpoint(tmp_path, FAMILIES[family])
    num_tokens = 32 if family in WINDOWED else 24 if family == LATE else 16
    want = generated(alone(folder), num_tokens)
    assert len(set(want)) > 4
    for engine in ("native", "transformers") if family in NATIVE else ("transformers",):
        decoder = Decoder.load(folder, "float32", "cpu", engine=engine)
        accepted = 0
        decoder.costs = COSTS
        # modules take long: each family takes half of the runs, and of those that the native
        # engine has too, a quarter
        share = 1 if engine == "native" else 4 if family in NATIVE else 2
        for k, tree, strategy in RUNS[list(FAMILIES).index(family) % share :: share]:
            out = decoder.generate(PROMPT, DecodeConfig(k, num_tokens, tree, strategy=strategy))
            assert out.token_ids == want, (engine, k, tree, strategy)
            accepted += sum(out.accepted_lengths)
        assert accepted > 0 or share == 4
        nucleus = DecodeConfig(0, num_tokens, sampling=SamplingConfig(1.0, 10, 0.95, seed=4))
        sampled = decoder.generate(PROMPT, nucleus).token_ids
        assert (
            decoder.generate(
                PROMPT, DecodeConfig(3, num_tokens, (2, 2, 1), nucleus.sampling)
            ).token_ids
            == sampled
            != want
        )


@pytest.mark.parametrize("family", ["mistral, window", "gemma 2, tied"])
def test_the_package_s_own_reference_is_that_generate(tmp_path, family):
    decoder = Decoder.load(
        checkpoint(tmp_path, FAMILIES[family], sat=False), "float32", "cpu", engine="transformers"
    )
    assert transformers_generate(decoder, PROMPT, DecodeConfig(0, 40)).token_ids == generated(
        alone(tmp_path), 40, sat=False
    )


# Nodes 1 and 2 below x, 3 and 4 below 1, 5 below 2; SATs at x and at nodes 3 and 5.
TREE = DraftTree((-1, 0, 0, 1, 1, 2), (0, 0, 1, 0, 1, 0))
TREE_TOKENS = [4, 8, 11, 2, 9, 6]
GROUPS = ((0, 3), (3, 2), (5, 3))
PATHS = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]]


@pytest.mark.parametrize(
    ("family", "recorded"), [*((family, False) for family in OTHERS), ("mistral, window", True)]
)
@torch.inference_mode()
def test_every_row_of_a_pass_is_the_end_of_a_plain_sequence(tmp_path, family, recorded):
    """Nodes and SATs lie in the cache apart from their positions: windows go by position."""
    folder = checkpoint(tmp_path, narrow(family))
    decoder = Decoder.load(folder, "float32", "cpu", engine="transformers")
    plain = alone(folder)
    decoder.engine.graphs = Graphs(traced) if recorded else None
    paths = [[TREE_TOKENS[node] for node in path] for path in PATHS]
    paths += [paths[node] + [SAT] * i for node, size in GROUPS for i in range(1, size + 1)]
    tokens = torch.tensor(TREE_TOKENS + [SAT] * sum(size for _, size in GROUPS))
    cache = decoder.engine.new_cache(128)
    for length in (40, 33):
        context = torch.randint(SAT, (length,), generator=torch.Generator().manual_seed(length))
        decoder.engine.prefill(cache, context)
        _, logits = forward(decoder, cache, tokens, TREE, GROUPS)
        for row, path in zip(logits, paths, strict=True):
            want = plain(torch.cat([context, torch.tensor(path)])[None]).logits[0, -1]
            torch.testing.assert_close(row[:SAT], want[:SAT], rtol=1e-4, atol=1e-4)
            assert row[SAT] == float("-inf")


@pytest.mark.parametrize("family", WINDOWED)
@torch.inference_mode()
def test_a_row_has_the_same_bits_beside_any_others(tmp_path, family):
    folder = checkpoint(tmp_path, FAMILIES[family])
    decoder = Decoder.load(folder, "float32", "cpu", engine="transformers")
    assert decoder.engine.row_policy.stable
    tokens = torch.randint(SAT, (72,), generator=torch.Generator().manual_seed(1))
    cache = decoder.engine.new_cache(128)
    one_by_one = []
    for size in (1, 5):
        decoder.engine.prefill(cache, tokens[:12])
        for part in tokens[12:].split(size):
            _, logits = forward(decoder, cache, part, make_tree("chain", size - 1))
            one_by_one += list(logits) if size == 1 else []
            place = cache.length - 12
            assert torch.equal(logits, torch.stack(one_by_one[place : place + size]))
            cache.commit(tuple(range(size)))


@pytest.mark.parametrize("family", WINDOWED)
def test_distilled_answers_of_a_batch_equal_generate(tmp_path, family):
    folder = checkpoint(tmp_path, FAMILIES[family])
    decoder = Decoder.load(folder, "float32", "cpu", engine="transformers")
    prompts = [PROMPT, PROMPT[:2], PROMPT * 4]
    lm = alone(tmp_path)
    for place, answer in answer_batch(decoder, prompts, [0, 1, 2], [0.0] * 3, 24, 2, 0):
        assert answer == generated(lm, 24, prompt=prompts[place])


def sequences(lengths=(44, 30, 37, 26)):
    generator = torch.Generator().manual_seed(3)
    return [TrainingExample(torch.randint(SAT, (n,), generator=generator), 4) for n in lengths]


def expected_of(batch, logits_of):
    """[M, V]: `logits_of` (standard tokens [T], how many SATs after them) at the last SAT, for
    every labelled row.
    """
    rows = (batch.label != IGNORED).nonzero().tolist()
    return torch.stack(
        [
            logits_of(batch.tokens[b, : batch.anchor[b, r] + 1], int(batch.depth[b, r]))
            for b, r in rows
        ]
    )


@pytest.mark.parametrize("family", ADAPTED)
@torch.no_grad()
def test_training_sees_what_decoding_sees(tmp_path, family):
    """SATs of an adapter, and in full mode: each is the end of a plain sequence, with its windows,
    caps and scales.
    """
    plain = load(checkpoint(tmp_path, narrow(family), sat=False), "float32", "cpu")
    batch = sat_batch(sequences(), 3, 6, 0.8, [torch.Generator().manual_seed(i) for i in range(4)])
    lm = alone(tmp_path)
    of_full_mode = expected_of(
        batch, lambda ids, sats: lm(torch.cat([ids, torch.full((sats,), SAT)])[None]).logits[0, -1]
    )
    torch.testing.assert_close(
        joint_logits(plain.lm, SAT, batch)[0], of_full_mode, rtol=1e-4, atol=1e-4
    )
    adapted = with_adapter(lm, k=3, strength=0.3).model
    scale = getattr(lm.get_input_embeddings(), "embed_scale", 1)
    sat = adapted.adapter.sat_embedding * scale

    def logits_of(ids, sats):
        with adapted.sat_rows(len(ids), len(ids) + sats):
            embeddings = torch.cat([lm.get_input_embeddings()(ids), sat.expand(sats, -1)])
            return lm(inputs_embeds=embeddings[None]).logits[0, -1]

    of_adapter = expected_of(batch, logits_of)
    lm.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(predict(adapted, batch), of_adapter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("family", ["mistral, window", "gemma 2, tied"])
def test_trained_here_and_decoded_exactly(tmp_path, family, mode):
    base = tmp_path / "base"
    out = tmp_path / "out"
    model = load(checkpoint(base, FAMILIES[family], sat=False), "float32", "cpu")
    of_adapter = dict(rank=2, head=8) if mode == "adapter" else {}
    settings = dict(
        steps=2,
        k=3,
        anchors=8,
        eval_every=2,
        held_out=1,
        warmup=1,
        lr=1e-2,
        mode=mode,
        **of_adapter,
    )
    train(model, sequences(), out, TrainConfig(**settings))
    trained = Decoder.load(str(out), "float32", "cpu", engine="transformers")
    trained.costs = COSTS
    lm = alone(base if mode == "adapter" else out)
    ids = torch.tensor([PROMPT])
    never = [trained.model.sat.token_id] if mode == "full" else None
    want = lm.generate(
        ids,
        max_new_tokens=40,
        do_sample=False,
        suppress_tokens=never,
        attention_mask=torch.ones_like(ids),
    )
    for strategy in ("two-step", "one-pass", "auto"):
        config = DecodeConfig(3, 40, (2, 2, 1), strategy=strategy)
        assert trained.generate(PROMPT, config).token_ids == want[0, len(PROMPT) :].tolist()


def test_masks_of_layers_brute_force():
    generator = torch.Generator().manual_seed(0)
    attend = torch.rand(2, 1, 9, 30, generator=generator) < 0.7
    rows, columns = (torch.randint(40, (2, n), generator=generator) for n in (9, 30))
    for family, kinds in (
        ("mistral, window", None),
        ("gemma 2", {"full_attention", "sliding_attention"}),
    ):
        found = attention.layer_masks(FAMILIES[family], attend, rows, columns)
        if kinds:
            assert found.keys() == kinds and torch.equal(found["full_attention"], attend)
            found = found["sliding_attention"]
        for b, s, t in torch.cartesian_prod(*map(torch.arange, (2, 9, 30))).tolist():
            assert found[b, 0, s, t] == (attend[b, 0, s, t] and columns[b, t] > rows[b, s] - WINDOW)
    for family in ("mistral", "qwen2", "gemma"):
        assert attention.layer_masks(FAMILIES[family], attend, rows, columns) is attend


def refused(folder, config):
    config.save_pretrained(folder)
    return str(folder)


TINY = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    pad_token_id=None,
)
SUPPORTED = "expected one of llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text"
LONGROPE = dict(
    **ROPE, rope_type="longrope", factor=2.0, short_factor=[1.0] * 16, long_factor=[2.0] * 16,
    original_max_position_embeddings=64,
)  # fmt: skip
LOOKS_AHEAD = "drafts look ahead"


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2), ["architecture 'gpt2'", SUPPORTED]),
        (Phi3Config(**TINY), ["architecture 'phi3'", SUPPORTED]),
        (GraniteConfig(**TINY), ["architecture 'granite'", SUPPORTED]),
        (Olmo2Config(**TINY), ["architecture 'olmo2'", SUPPORTED]),
        (Gemma3Config(text_config=TINY), ["architecture 'gemma3'", SUPPORTED]),
        (
            LlamaConfig(**COMMON, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
            ["'dynamic'", LOOKS_AHEAD],
        ),
        (LlamaConfig(**COMMON, rope_parameters=LONGROPE), ["'longrope'", LOOKS_AHEAD]),
        (
            Gemma3TextConfig(
                **COMMON,
                rope_parameters={"full_attention": {"rope_type": "dynamic", "factor": 2.0}},
            ),
            ["rope_type 'dynamic'", LOOKS_AHEAD],
        ),
        (
            LlamaConfig(
                **COMMON,
                rope_parameters={
                    **ROPE,
                    "rope_type": "linear",
                    "factor": 4.0,
                    "partial_rotary_factor": 0.5,
                },
            ),
            ["partial_rotary_factor=0.5", "expected 1"],
        ),
        (
            GemmaConfig(**COMMON, use_bidirectional_attention=True),
            ["use_bidirectional_attention=True", "expected false"],
        ),
        (
            Qwen2Config(**NO_DIM, layer_types=["full_attention", "sliding_attention"]),
            ["layer type 'sliding_attention' with sliding_window=None", "expected full_attention"],
        ),
        (
            Qwen3Config(**COMMON, layer_types=["full_attention", "chunked_attention"]),
            ["layer type 'chunked_attention'", "expected full_attention"],
        ),
        (
            LlamaConfig(**COMMON, quantization_config={"quant_method": "fp8"}),
            ["quantized weights", "expected a checkpoint"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_decoded_exactly_is_refused(tmp_path, config, reasons):
    """Before any weights are read: there are none."""
    with one_line_error(refused(tmp_path, config), "not supported", *reasons):
        load(str(tmp_path), "float32", "cpu")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FAMILIES["gemma"], "architecture gemma"),
        (FAMILIES["gemma 2"], "architecture gemma2"),
        (FAMILIES["mistral, window"], "sliding_window=16, and the context goes on to 256"),
        (FAMILIES["qwen3, window"], "sliding_window=16"),
        (LlamaConfig(**COMMON, hidden_act="gelu"), "activation gelu"),
        (LlamaConfig(**{**COMMON, "head_dim": 16}), "dim=16: not a multiple of 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_native_engine_leaves_what_it_does_not_compute_to_transformers(
    tmp_path, config, reason
):
    folder = checkpoint(tmp_path, config)
    with one_line_error("engine=native", reason):
        Decoder.load(folder, "float32", "cpu", engine="native")
    with pytest.warns(UserWarning, match="transformers' modules"):
        decoder = Decoder.load(folder, "float32", "cpu")
    assert decoder.generate(PROMPT, DecodeConfig(3, 30)).token_ids == generated(alone(folder), 30)


def test_a_window_does_not_end_the_context_and_the_positions_do(tmp_path):
    config = MistralConfig(**{**COMMON, "max_position_embeddings": 64}, sliding_window=WINDOW)
    folder = checkpoint(tmp_path, config)
    decoder = Decoder.load(folder, "float32", "cpu", engine="transformers")
    assert decoder.generate(PROMPT, DecodeConfig(3, 57)).token_ids == generated(alone(tmp_path), 57)
    with one_line_error("max_new_tokens=58", "64"):
        decoder.generate(PROMPT, DecodeConfig(0, 58))
