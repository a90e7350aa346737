"""Small random models: exact oracles that need no download; and what many tests say."""

import copy
import gc
import os
import string
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdsat.config import LOOKUP, DecodeConfig, InputError, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import PassInput
from sdsat.engines.transformers import TransformersEngine
from sdsat.method.layout import SatGroup
from sdsat.models import attention
from sdsat.models.adapter import AdapterConfig, SatAdapter, sample_weights
from sdsat.models.sat_model import SatModel
from sdsat.training.shards import TrainingExample

VOCAB = 64

# What is imported stays; collections needn't walk through a million such objects again and again.
gc.freeze()

_LLAMAS = {}
PLOTS = {  # files of a benchmark
    "tokens_per_second",
    "speedup",
    "acceptance_rate",
    "seconds_per_problem",
    "seconds_per_pass",
    "acceptance_by_depth",
}


def tiny_llama(dtype=torch.float64, vocab=VOCAB, seed=0, **overrides):
    """A random two-layer Llama with grouped queries; weights large enough that its next tokens
    vary.

    Small ones are made once and then copied, which is quicker; random numbers go on as after that.
    """
    settings = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=1,
    )
    settings |= overrides
    key = repr((dtype, seed, settings))
    if key in _LLAMAS:
        lm, state = _LLAMAS[key]
        torch.set_rng_state(state)
        return copy.deepcopy(lm)
    torch.manual_seed(seed)
    lm = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval().requires_grad_(False)
    lm.set_attn_implementation(attention.NAME)
    if lm.num_parameters() < 10**6:
        _LLAMAS[key] = copy.deepcopy(lm), torch.get_rng_state()
    return lm


def with_adapter(lm, **settings):
    """A decoder of `adapted(lm, ...)`."""
    model = adapted(lm, **settings)
    return decoder_of(lm, sat=model.sat, adapter=model.adapter)


def adapted(lm, k=3, rank=4, seed=1, strength=1.0, head=0, draft_ids=()):
    """`lm` with a random, attached adapter: its drafts are as good as random ones.

    draft_ids: of its draft vocabulary; none: all.
    """
    torch.manual_seed(seed)
    config = AdapterConfig(
        "tiny",
        SatConfig(lm.config.vocab_size, k),
        rank,
        head=head,
        draft_vocabulary=len(draft_ids),
        base_sample=sample_weights(lm),
    )
    adapter = SatAdapter(lm, config)
    if draft_ids:
        adapter.draft_ids.copy_(torch.tensor(draft_ids))
    for parameter in adapter.up.values():
        torch.nn.init.normal_(parameter, std=strength)
    if adapter.head is not None:
        torch.nn.init.normal_(adapter.head.outer, std=strength)
        randomise_gains(adapter.head)
    adapter.requires_grad_(False).attach(lm)
    return SatModel(lm, None, "tiny", adapter.config.sat, adapter)


def randomise_gains(head):
    """Give a draft head numbers of size 1 for what the text says, and a sharpness other than 1."""
    torch.nn.init.normal_(head.copies)
    torch.nn.init.uniform_(head.sharpness, 0.5, 1.5)


def text_adds(head, text, before, tokens):
    """What the text adds to a draft head's scores of `tokens` after the tokens `before`."""
    added = torch.zeros(len(tokens), dtype=torch.float64)
    for size in range(1, min(len(before), len(head.copies)) + 1):
        ends = [i for i in range(size, len(text)) if text[i - size : i] == before[-size:]]
        followers = {text[i] for i in ends}
        for at, token in enumerate(tokens):
            added[at] += (token in followers) * head.copies[size - 1].item()
    return added


def decoder_of(lm, tokenizer=None, name="tiny", sat=None, adapter=None, rows=None):
    """A decoder that runs passes through `lm`'s modules as they are.

    rows: the row policy, which is then not looked for.
    """
    model = SatModel(lm, tokenizer, name, sat, adapter)
    engine = TransformersEngine(model)
    if rows is not None:
        engine.row_policy = rows
    return Decoder(model, engine)


def forward(decoder, cache, tokens, tree, groups=(), **options):
    """States [R, D] and logits [R, V] of a pass of one sequence.

    tokens [R]: one a node of the tree, then the SATs of its groups. Without a draft vocabulary.
    """
    groups = tuple(SatGroup(*group) for group in groups)
    part = PassInput(cache, tokens[: len(tree)].tolist(), tree, groups)
    out = decoder.engine.forward([part], **options)
    return out.states, torch.cat([out.logits, out.sat_logits])


def random_sequences(lengths, prompt_length=2):
    torch.manual_seed(0)
    return [TrainingExample(torch.randint(2, VOCAB, (n,)), prompt_length) for n in lengths]


def tiny_tokenizer(pieces, decoder=None):
    """A tokenizer whose token i decodes to pieces[i]; it encodes one character a token, unknown
    ones as token 0.
    """
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoder or decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=pieces[0])


@contextmanager
def one_line_error(*parts):
    """The block must raise an InputError whose message is one line and holds every part."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# Prompts for a tokenizer that takes one token a character.
CHARACTERS = ["<unk>", *string.ascii_letters, *' \n_():".,=#']  # 64
EOS = 40


def let_vanish(monkeypatch, beginning):
    """Have folders whose name begins so be listed, and gone when they are looked into.

    Returns a list, which grows by each.
    """
    scandir = os.scandir
    gone = []

    def scan(path="."):
        if not isinstance(path, int) and Path(path).name.startswith(beginning):
            gone.append(path)
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    return gone


def function(name, doc):
    return f'def {name}(value):\n    """{doc}"""\n    return value\n'


def prompt(name, doc):
    return f'def {name}(value):\n    """{doc}"""\n'


def long_doc(topic):
    return f"Say something about {topic}, in forty letters or more."


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def drafted(strategy, k, lookup, *arguments, **settings):
    """Settings as they are drawn for a test: 'lookup' takes no SATs, and plain decoding (k = 0)
    looks nothing up.
    """
    k, lookup = (0, lookup or None) if strategy == LOOKUP else (k, lookup if k else None)
    return DecodeConfig(k, *arguments, strategy=strategy, lookup=lookup, **settings)


def save_tiny(folder):
    """Save an adapter, and its base: a tiny random model with a tokenizer of one character a
    token. Returns the adapter's directory.
    """
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    lm = tiny_llama(vocab=len(tokenizer), max_position_embeddings=4096, eos_token_id=5)
    model = adapted(lm, k=5)
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.adapter.config = AdapterConfig(
        str(folder / "base"), model.sat, 4, base_sample=model.adapter.config.base_sample
    )
    model.adapter.save(folder / "tiny-sdsat")
    return folder / "tiny-sdsat"
