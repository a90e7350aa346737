"""Programs that generate text, one a file, which peers.py measures beside each other.

A file has `names(base)`, what it can measure of a model here; `decoder(name, base, context)`, which
loads one of these and nothing else; `version()`; and INSTALL, how it is to be had.
"""

import re
from collections.abc import Callable
from pathlib import Path

from transformers import GenerationConfig

from sdsat.decoding.sequence import Generation
from sdsat.models.embedded import Embedded, base_dir

Decode = Callable[[list[int], int], Generation]  # (prompt ids, new tokens at most)

ROOT = Path(__file__).parent.parent.parent
DTYPE = "bfloat16"
AR = "ar"
LOOKUP_TOKENS = 10  # that are copied from the text at a time
LOOKUP_NGRAM = 3  # tokens that must be the same before them
LOOKUP = " prompt lookup"
ASSISTED = " assisted"


def kind_of(base: Embedded) -> str:
    """What llama.cpp calls the numbers of the base's file, as 'Q4_K_M'."""
    return re.findall(r"Q\d\w*(?=\.gguf)", base.file, re.IGNORECASE)[0].upper()


def stop_id_of(base: Embedded) -> int:
    found = GenerationConfig.from_pretrained(base_dir(base)).eos_token_id
    return found[0] if isinstance(found, list) else found


def with_stop(ids: list[int], stop_id: int, stopped: bool) -> list[int]:
    """A program's output as ours are: with the token that ended it."""
    return [*ids, stop_id] if stopped and ids[-1:] != [stop_id] else ids
