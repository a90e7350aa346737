"""Every refusal in sdsat.config names the argument and its value, in one line; the borders
themselves are allowed.
"""

import json
import math
from dataclasses import FrozenInstanceError, asdict
from functools import partial

import numpy as np
import pytest
from common import one_line_error

from sdsat.config import DecodeConfig, DistillConfig, SamplingConfig, SatConfig, TrainConfig
from sdsat.evaluation.sweep import BenchConfig, InspectConfig, QualityConfig, VerifyConfig

BENCH = partial(BenchConfig, "tiny")


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
        (SamplingConfig, dict(temperature="1"), "temperature='1'"),
        (SamplingConfig, dict(temperature=True), "temperature=True"),
        (SamplingConfig, dict(top_k=2.0), "top_k=2.0"),
        (SamplingConfig, dict(top_p=None), "top_p=None"),
        (SamplingConfig, dict(seed=1.5), "seed=1.5"),
        (SamplingConfig, dict(seed=False), "seed=False"),
        (SatConfig, dict(token_id="7", k=5), "sat_token_id='7'"),
        (SatConfig, dict(token_id=7, k=5.0), "k=5.0"),
        (DecodeConfig, dict(k="5"), "k='5'"),
        (DecodeConfig, dict(k=2.0), "k=2.0"),
        (DecodeConfig, dict(k=95), "k=95"),
        (DecodeConfig, dict(k=True), "k=True"),
        (DecodeConfig, dict(max_new_tokens=5.0), "max_new_tokens=5.0"),
        (DecodeConfig, dict(k=3, tree=3), "tree=3"),
        (DecodeConfig, dict(k=3, tree=(2.0, 1)), "tree=(2.0, 1)"),
        (DecodeConfig, dict(k=3, tree=()), "tree=()"),
        (DecodeConfig, dict(k=3, budget=2.5), "budget=2.5"),
        (DecodeConfig, dict(k=3, budget=97), "budget=97"),
        (DecodeConfig, dict(k=3, lookup=3.5), "lookup=3.5"),
        (DecodeConfig, dict(sampling=0.7), "sampling=0.7"),
        (DecodeConfig, dict(stop_ids=5), "stop_ids=5"),
        (DecodeConfig, dict(stop_ids=(-1,)), "stop_ids=-1"),
        (DecodeConfig, dict(stop_strings="end"), "stop_strings='end'"),
        (DecodeConfig, dict(stop_strings=(5,)), "stop_strings=5"),
        (DecodeConfig, dict(stop_strings=("\udcff",)), "stop_strings: not UTF-8"),
        (TrainConfig, dict(steps=2.5), "steps=2.5"),
        (TrainConfig, dict(k=17), "k=17"),
        (TrainConfig, dict(lr=math.inf), "lr=inf"),
        (TrainConfig, dict(lr=0), "lr=0"),
        (TrainConfig, dict(warmup=-1), "warmup=-1"),
        (TrainConfig, dict(clip=math.nan), "clip=nan"),
        (TrainConfig, dict(keep=1.5), "keep=1.5"),
        (TrainConfig, dict(seed="0"), "seed='0'"),
        (TrainConfig, dict(targets=""), "targets=''"),
        (TrainConfig, dict(targets=["q_proj"]), "targets=['q_proj']"),
        (TrainConfig, dict(init=""), "init=''"),
        (TrainConfig, dict(mode="full", checkpointing="x"), "checkpointing='x'"),
        (DistillConfig, dict(limit="5"), "limit='5'"),
        (DistillConfig, dict(limit=0), "limit=0"),
        (DistillConfig, dict(answers=1.5), "answers=1.5"),
        (DistillConfig, dict(max_new_tokens="5"), "max_new_tokens='5'"),
        (DistillConfig, dict(batch_size=0), "batch_size=0"),
        (DistillConfig, dict(seed="x"), "seed='x'"),
        (DistillConfig, dict(kinds=5), "kinds=5"),
        (DistillConfig, dict(avoid="x"), "avoid='x'"),
        (DistillConfig, dict(template_options="x"), "template_options='x'"),
        (DistillConfig, dict(temperatures=5), "temperatures=5"),
        (DistillConfig, dict(temperatures=()), "temperatures: none"),
        (DistillConfig, dict(temperatures=("x",)), "temperature='x'"),
        (BENCH, dict(k_list=5), "k_list=5"),
        (BENCH, dict(k_list=("x",)), "k='x'"),
        (BENCH, dict(strategies=5), "strategies=5"),
        (BENCH, dict(strategies=(5,)), "strategy=5"),
        (BENCH, dict(tree=5), "tree=5"),
        (BENCH, dict(dataset=5), "dataset=5"),
        (BENCH, dict(data_limit="x"), "data_limit=x"),
        (BENCH, dict(data_limit=1.5), "data_limit=1.5"),
        (BENCH, dict(with_generate="x"), "with_generate='x'"),
        (BENCH, dict(temperature="x"), "temperature='x'"),
        (BENCH, dict(turns=1.5), "turns=1.5"),
        (BENCH, dict(template_options="x"), "template_options='x'"),
        (VerifyConfig, dict(trees=(5,)), "tree=5"),
        (VerifyConfig, dict(temperatures=5), "temperatures=5"),
        (VerifyConfig, dict(temperatures=(1.0,), seeds=("x",)), "seed='x'"),
        (VerifyConfig, dict(temperatures=(1.0,), seeds=5), "seeds=5"),
        (QualityConfig, dict(samples="x"), "samples='x'"),
        (QualityConfig, dict(temperature="x"), "temperature='x'"),
        (InspectConfig, dict(text=5), "text=5"),
        (InspectConfig, dict(anchors=0), "anchors=0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals(config, arguments, named):
    with one_line_error(named, "expected" if named != "stop_strings" else "empty"):
        config(**arguments)


def test_borders_are_allowed():
    assert SamplingConfig(temperature=0, top_k=0, top_p=1).greedy
    assert not SamplingConfig(temperature=1e-3, top_k=1, top_p=1e-9, seed=-(2**70)).greedy
    assert SatConfig(token_id=0, k=1).token_id == 0
    assert DecodeConfig(k=0, max_new_tokens=1, stop_ids=(0,), stop_strings=(" ",)).sampling.greedy


def test_numbers_of_numpy_and_lists_become_pythons():
    config = DecodeConfig(
        np.int64(3),
        np.int32(9),
        [np.uint8(2), 1],
        SamplingConfig(np.float32(0.5), np.int64(4)),
        [np.int64(7)],
    )
    assert config == DecodeConfig(3, 9, (2, 1), SamplingConfig(0.5, 4), (7,)) and hash(config)
    json.dumps(asdict(config))


@pytest.mark.parametrize(
    "config", [SamplingConfig(), SatConfig(1, 1), DecodeConfig()], ids=lambda c: type(c).__name__
)
def test_frozen_and_hashable(config):
    with pytest.raises(FrozenInstanceError):
        config.k = 3
    assert hash(config) == hash(type(config)(**vars(config)))
