"""Every refusal in config.py names the argument and its value, in one line; the borders themselves are allowed."""

import math
from dataclasses import FrozenInstanceError

import pytest
from conftest import one_line_error

from sdsat.config import DecodeConfig, SamplingConfig, SatConfig


@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        (SamplingConfig, dict(temperature=-0.1), "temperature=-0.1"),
        (SamplingConfig, dict(temperature=math.nan), "temperature=nan"),
        (SamplingConfig, dict(temperature=math.inf), "temperature=inf"),
        (SamplingConfig, dict(top_k=-1), "top_k=-1"),
        (SamplingConfig, dict(top_p=0.0), "top_p=0.0"),
        (SamplingConfig, dict(top_p=-0.5), "top_p=-0.5"),
        (SamplingConfig, dict(top_p=1.01), "top_p=1.01"),
        (SamplingConfig, dict(top_p=math.nan), "top_p=nan"),
        (SatConfig, dict(token_id=-1, k=5), "sat_token_id=-1"),
        (SatConfig, dict(token_id=7, k=0), "k=0"),
        (DecodeConfig, dict(k=-1), "k=-1"),
        (DecodeConfig, dict(k=0, lookup=5), "lookup=5: k=0 is plain decoding"),
        (DecodeConfig, dict(k=0, strategy="auto", lookup=12), "lookup=12"),
        (DecodeConfig, dict(k=3, strategy="lookup"), "k=3: strategy=lookup drafts without SATs"),
        (DecodeConfig, dict(strategy="lookup", lookup=0), "lookup=0"),
        (DecodeConfig, dict(max_new_tokens=0), "max_new_tokens=0"),
        (DecodeConfig, dict(stop_strings=("end", "")), "stop_strings"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals(config, arguments, named):
    with one_line_error(named, "expected" if "stop" not in named else "empty"):
        config(**arguments)


def test_borders_are_allowed():
    assert SamplingConfig(temperature=0, top_k=0, top_p=1).greedy
    assert not SamplingConfig(temperature=1e-3, top_k=1, top_p=1e-9, seed=-(2**70)).greedy
    assert SatConfig(token_id=0, k=1).token_id == 0
    assert DecodeConfig(k=0, max_new_tokens=1, stop_ids=(0,), stop_strings=(" ",)).sampling.greedy


@pytest.mark.parametrize("config", [SamplingConfig(), SatConfig(1, 1), DecodeConfig()], ids=lambda c: type(c).__name__)
def test_frozen_and_hashable(config):
    with pytest.raises(FrozenInstanceError):
        config.k = 3
    assert hash(config) == hash(type(config)(**vars(config)))
