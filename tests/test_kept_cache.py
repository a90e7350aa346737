"""A cache that is kept: of a prompt that begins as the last text did only the rest is read, and
what comes out is what a fresh decode gives, bit for bit.
"""

from dataclasses import replace

import pytest
import torch
from common import decoder_of, drafted, one_line_error, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import ENGINES, VOCAB, K, decoder_with, strategies
from test_decode import WHOLE, drafting

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.kept import KeptCache
from sdsat.engines.native.engine import PREFILL_ROWS
from sdsat.models.int8 import round_linears
from sdsat.models.sat_model import SatModel

TOKENS = st.integers(0, VOCAB - 1)
TEXT = torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(0)).tolist()


def in_common(one, other):
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    return next((i for i in range(size) if one[i] != other[i]), size)


def reading(decoder, prompt, config, kept):
    """A generation, and how many tokens of its prompt were read."""
    read = []
    report = lambda *at: read.append(at)  # noqa: E731
    out = decoder.generate(prompt, config, kept=kept, on_read=report)
    assert read[0][0] == 0 and read[-1][0] == read[-1][1]
    return out, read[-1][1]


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_conversation_has_the_tokens_of_fresh_decodes(engine, data):
    """Prompts that go on where the last text ended, or leave it somewhere, or are others."""
    decoder = decoder_with(engine)
    kept = KeptCache()
    text = []
    for turn in range(data.draw(st.integers(2, 4))):
        stays = data.draw(st.just(len(text)) | st.integers(0, len(text)))
        more = st.lists(TOKENS, min_size=stays == 0, max_size=70)
        prompt = text[:stays] + data.draw(more)
        sampling = SamplingConfig(data.draw(st.sampled_from([0.0, 1.0])), seed=turn)
        strategy = data.draw(st.sampled_from([*strategies(engine), "auto"]))
        config = drafted(strategy, data.draw(st.sampled_from([0, K])), 4, 12, sampling=sampling)
        config = replace(config, stop_ids=(9,))
        held = kept.tokens
        out, read = reading(decoder, prompt, config, kept)
        assert out.token_ids == decoder.generate(prompt, config).token_ids
        assert read == len(prompt) - 1 - in_common(held, prompt[:-1])
        text = prompt + out.token_ids
        # all but the last token; a draft that was accepted may have been the last
        assert len(kept.tokens) >= len(text) - 1 and kept.tokens == text[: len(kept.tokens)]


def seen(decoder, prompt, kept):
    """The logits that plain decoding sees, [T, V]."""
    rows = []

    def chooser(logits):
        rows.append(logits.clone())
        return int(logits.argmax()), False

    decoder.generate(prompt, DecodeConfig(0, 8), chooser=chooser, kept=kept)
    return torch.stack(rows)


def in_8_bits():
    lm = tiny_llama(torch.bfloat16, **WHOLE)
    round_linears(lm)
    return drafting(lm, native=True, k=K)


@pytest.mark.parametrize("engine", [*ENGINES, "native, 8 bits"])
@pytest.mark.parametrize("config", [DecodeConfig(0, 40), DecodeConfig(K, 40, tree=(2, 2, 1))])
def test_what_verified_drafts_leave_gives_the_same_bits(engine, config):
    decoder = decoder_with(engine) if engine in ENGINES else in_8_bits()
    kept = KeptCache()
    prompt = TEXT[:40]
    prompt = prompt + decoder.generate(prompt, config, kept=kept).token_ids
    assert len(kept.tokens) >= 79
    for further in ([3, 8], [3, 8], [5] * PREFILL_ROWS):  # the second goes back
        fresh, again = (seen(decoder, prompt + further, each) for each in (None, kept))
        if engine.startswith("native"):
            assert torch.equal(fresh, again)
        else:
            torch.testing.assert_close(again, fresh, atol=1e-4, rtol=1e-4)
            assert torch.equal(again.argmax(-1), fresh.argmax(-1))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_generation_that_is_stopped_leaves_what_it_had_come_to(engine, passes):
    decoder = decoder_with(engine)
    config = DecodeConfig(K, 30, strategy="two-step")
    kept = KeptCache()
    so_far = []

    def stop(tokens, _):
        so_far.append(tokens)
        if len(so_far) == passes:
            raise Stopped

    with pytest.raises(Stopped):
        decoder.generate(TEXT[:20], config, stop, kept=kept)
    text = TEXT[:20] + [token for tokens in so_far for token in tokens]
    assert kept.tokens == text[:-1]
    out, read = reading(decoder, [*text, 7, 7], config, kept)
    assert read == 2 and out.token_ids == decoder.generate([*text, 7, 7], config).token_ids


def test_reading_that_is_stopped_leaves_the_text_before():
    decoder = decoder_with("native, bfloat16")
    kept = KeptCache()
    config = DecodeConfig(0, 4)
    decoder.generate(TEXT[:10], config, kept=kept)
    held = kept.tokens
    at = []

    def stop(read, of):
        at.append((read, of))
        if read:
            raise Stopped

    with pytest.raises(Stopped):
        decoder.generate(held + TEXT, config, kept=kept, on_read=stop)
    assert at == [(0, 299), (PREFILL_ROWS, 299)] and kept.tokens == held
    assert reading(decoder, [*held, 1], config, kept)[1] == 0


def test_half_precision_through_modules_reads_everything():
    """There a pass's size decides how it rounds."""
    decoder = decoder_of(tiny_llama(torch.bfloat16))
    kept = KeptCache()
    prompt = TEXT[:20]
    for _ in range(3):
        out, read = reading(decoder, prompt, DecodeConfig(0, 6), kept)
        assert read == len(prompt) - 1 and kept.tokens == []
        assert out.token_ids == decoder.generate(prompt, DecodeConfig(0, 6)).token_ids
        prompt = prompt + out.token_ids


def test_other_weights_read_everything():
    lm = tiny_llama(torch.float32)
    decoder = Decoder(SatModel(lm, None, "tiny"), "transformers")
    kept = KeptCache()
    config = DecodeConfig(0, 12)
    before = decoder.generate(TEXT[:20], config, kept=kept).token_ids
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.k_proj.weight *= -1
    out, read = reading(decoder, TEXT[:20], config, kept)
    assert read == 19 and out.token_ids == decoder.generate(TEXT[:20], config).token_ids != before
    assert reading(decoder, TEXT[:20], config, kept)[1] == 0


def test_bad_input_is_one_line():
    decoder = decoder_with("modules, float32")
    with one_line_error("kept='here': expected a KeptCache"):
        decoder.generate([1], DecodeConfig(0, 1), kept="here")
    with one_line_error("on_read=3: expected a function"):
        decoder.generate([1], DecodeConfig(0, 1), on_read=3)
