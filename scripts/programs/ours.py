"""This program's strategies, as 'two-step:5', 'auto' and 'int8 auto'."""

from functools import cache

from programs import AR, DTYPE, Decode
from sdsat.config import DecodeConfig, decode_config_of
from sdsat.decoding.decoder import Decoder
from sdsat.models.sat_model import SatModel


def dtype_and_strategy(name: str) -> tuple[str, str]:
    """Of one of ours, as 'int8 auto'; DTYPE is not named."""
    dtype, _, strategy = name.rpartition(" ")
    return dtype or DTYPE, strategy


def ar_of(name: str) -> str:
    dtype, _ = dtype_and_strategy(name)
    return AR if dtype == DTYPE else f"{dtype} {AR}"


def decode_config(strategy: str, model: SatModel, max_new_tokens: int) -> DecodeConfig:
    """The settings of one of our strategies, as 'one-pass:5'."""
    return decode_config_of(strategy, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids)


@cache
def own_decoder(model: str, dtype: str = DTYPE) -> Decoder:
    return Decoder.load(model, dtype, "cpu")


def decoder(name: str, model: str) -> Decode:
    """Load one of ours, as 'int8 auto'."""
    dtype, strategy = dtype_and_strategy(name)
    own = own_decoder(model, dtype)
    return lambda ids, limit: own.generate(ids, decode_config(strategy, own.model, limit))
