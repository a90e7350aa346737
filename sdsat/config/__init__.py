"""Settings as frozen dataclasses, which are checked when they are made.

A bad value raises `InputError`, which is every bad-input message of the program.

    checks      what a value must be              options     how a command gives it
    strategies  what drafts                       loading     which model, and how
    decoding    a generation                      training    distillation and training
    serving     an endpoint
"""

from sdsat.config.checks import (
    InputError,
    flag,
    is_real,
    is_whole,
    plain_warnings,
    real,
    require,
    several,
    utf8,
    whole,
)
from sdsat.config.decoding import (
    MAX_K,
    MAX_ROWS,
    DecodeConfig,
    SamplingConfig,
    SatConfig,
    SatIds,
    decode_config_of,
)
from sdsat.config.loading import CheckpointConfig, HubConfig, LoadConfig
from sdsat.config.options import (
    MAX_NEW_TOKENS,
    NUMBERS,
    SEED,
    TEMPERATURE,
    TEMPLATE_OPTIONS,
    TREE,
    WHOLE_NUMBERS,
    WORD,
    WORDS,
    Option,
    Text,
    numbers_of,
    option,
)
from sdsat.config.serving import ServeConfig
from sdsat.config.strategies import (
    ALL_STRATEGIES,
    LOOKUP,
    NUM_LOOKUP,
    STRATEGIES,
    STRATEGY,
    Strategy,
    beside,
    has_sats,
    keys_of,
    keys_with_parts,
    looks_up,
    speed_bound,
)
from sdsat.config.training import (
    DRAFT_VOCABULARY,
    MAX_TRAINED_K,
    TARGETS,
    TRAIN_MODES,
    DistillConfig,
    TrainConfig,
)

__all__ = [
    "ALL_STRATEGIES",
    "DRAFT_VOCABULARY",
    "LOOKUP",
    "MAX_K",
    "MAX_NEW_TOKENS",
    "MAX_ROWS",
    "MAX_TRAINED_K",
    "NUMBERS",
    "NUM_LOOKUP",
    "SEED",
    "STRATEGIES",
    "STRATEGY",
    "TARGETS",
    "TEMPERATURE",
    "TEMPLATE_OPTIONS",
    "TRAIN_MODES",
    "TREE",
    "WHOLE_NUMBERS",
    "WORD",
    "WORDS",
    "CheckpointConfig",
    "DecodeConfig",
    "DistillConfig",
    "HubConfig",
    "InputError",
    "LoadConfig",
    "Option",
    "SamplingConfig",
    "SatConfig",
    "SatIds",
    "ServeConfig",
    "Strategy",
    "Text",
    "TrainConfig",
    "beside",
    "decode_config_of",
    "flag",
    "has_sats",
    "is_real",
    "is_whole",
    "keys_of",
    "keys_with_parts",
    "looks_up",
    "numbers_of",
    "option",
    "plain_warnings",
    "real",
    "require",
    "several",
    "speed_bound",
    "utf8",
    "whole",
]
