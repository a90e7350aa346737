"""Running a command line: every expected failure is one line on stderr and an exit code.

Bad input: 2; an interrupt: 130; a dead worker, a difference that an audit can't explain, memory
that ran out: 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdsat.config import (
    CONTEXT,
    DecodeConfig,
    InputError,
    LoadConfig,
    SamplingConfig,
    plain_warnings,
)

_INTERRUPTED = "interrupted; what was finished is kept, and the same command resumes"
# Typer carries a click of its own, without a public name for it.
UsageError: Any = typer.BadParameter.__base__


def run(command: Callable[..., None]) -> None:
    """Run a script of one command, as its entry point.

    Its arguments and errors are handled as this program's own.
    """
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)
    run_app(script)


def run_app(application: typer.Typer) -> None:
    """Run the app and turn every expected failure into one line and an exit code.

    Raises SystemExit with that code.
    """
    plain_warnings()
    try:
        code = application(standalone_mode=False)
        if code == 130:  # how typer reports an interrupt
            code = _fail(_INTERRUPTED, code)
    except InputError as error:
        code = _fail(str(error), 2)
    except UsageError as error:
        code = _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(_INTERRUPTED, 130)
    except SystemExit as error:
        code = _fail(error.code, 1) if isinstance(error.code, str) else error.code
    except Exception as error:
        # torch's own kind, which may not be imported; on a CPU it says so in words alone.
        gone = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
        if not gone and not isinstance(error, MemoryError):
            raise
        code = _fail((str(error) or "out of memory").splitlines()[0], 1)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    line = message if message.startswith("error") else f"error: {message}"
    Console(stderr=True, soft_wrap=True).print(Text(line))
    return code


def show(table: Table, width: int) -> None:
    """Print a table at least so many columns wide.

    A terminal's line may be cut, but then it can be read; cells that are cut can't.
    """
    Console(width=max(width, Console().width)).print(table)


def load_decoder(name: str, config: LoadConfig, context: int = CONTEXT) -> Any:
    """Load the model that a command works on.

    context: positions of the cache that memory must be left for. Raises InputError, one line, for
    what can't be loaded.
    """
    from sdsat.decoding.decoder import Decoder

    return Decoder.load(
        name,
        config.dtype,
        config.device,
        config.sat_token_id,
        config.engine,
        trained_k=config.trained_k,
        context=context,
    )


def decode_settings(
    name: str, decode: DecodeConfig, sampling: SamplingConfig, load: LoadConfig
) -> DecodeConfig:
    """Put the settings of a generation together, before the model's weights are read.

    Args:
        name: of the model.
        decode: all of them but the sampling.
        sampling: how the next token is chosen.
        load: how the model will be loaded.

    Returns:
        All settings, with the tree as `parse_tree` reads it.

    Raises:
        InputError: in one line, for a tree that can't be made with the model's SATs, and for a
            model whose settings can't be read.
    """
    from sdsat.method.tree import given_tree, parse_tree
    from sdsat.models import loading

    decode = replace(decode, sampling=sampling, tree=parse_tree(decode.tree_name))
    sat = loading.sat_of(name, load.sat_token_id, load.trained_k) if decode.k is None else None
    if k := sat.k if sat else decode.k:
        given_tree(decode.tree, k)
    return decode


def check_template_options(name: str, options: Sequence[str]) -> None:
    """Refuse options that a model's chat template doesn't know, before its weights are read.

    Raises InputError, one line.
    """
    if options:
        from sdsat.models import loading
        from sdsat.tasks import prompts

        prompts.encode_prompt(loading.load_tokenizer(name), prompts.WARM_UP, options)


def is_first() -> bool:
    """Tell whether this is the only process, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def own_gpu() -> str:
    """Name each process's own GPU under a launcher; '' where there is none."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return local if local and torch.cuda.is_available() else ""
