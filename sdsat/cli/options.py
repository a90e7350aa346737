"""Command options that are made from settings.

A field's name, default, help and environment variable stand in its dataclass (`config.option`), and
nowhere else.

    @from_settings
    def distill(*, out: Path, load: LoadConfig, config: DistillConfig) -> None: ...

Here every field of LoadConfig and DistillConfig that is an `option` becomes an option of the
command, and the command gets the settings made of what was given. Other parameters are typer's own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from sdsat.config import TEMPLATE_OPTIONS, LoadConfig, Option
from sdsat.files import destination
from sdsat.models import embedded

S = TypeVar("S")


class Only:
    """`Annotated[Settings, Only(...)]`: a command has these options of the settings alone."""

    def __init__(self, *names: str):
        self.names = names


class Defaults:
    """`Annotated[Settings, Defaults(...)]`: a command has these defaults for its options.

    They stand instead of the settings' own.
    """

    def __init__(self, **values: Any):
        self.values = values


@dataclass
class Given(Generic[S]):
    """Options that were given, before settings are made of them: a type of parameters.

    Attributes:
        kind: the settings' class.
        values: by field; what was left open is not among them.
    """

    kind: type[S]
    values: dict[str, Any] = field(default_factory=dict)

    def make(self, defaults: dict[str, Any], **more: Any) -> S:
        """Make the settings: of `defaults`, then what was given, then `more`.

        Raises InputError for what the settings refuse.
        """
        return self.kind(**{**defaults, **self.values, **more})


@dataclass(frozen=True)
class _Source:
    """A parameter of a command that settings fill.

    Attributes:
        kind: the settings' class.
        make: what the command gets, of the values by field.
        only: the fields that are options here; None for all.
        defaults: by field, instead of the settings' own.
    """

    kind: Any
    make: Callable[[dict[str, Any]], Any]
    only: tuple[str, ...] | None
    defaults: dict[str, Any]

    def options(self) -> list[tuple[str, Option, Any, Any]]:
        """List (name, about, type, default) of each field that is an option here."""
        hints = get_type_hints(self.kind)
        return [
            (
                each.name,
                each.metadata["option"],
                hints[each.name],
                self.defaults.get(each.name, each.default),
            )
            for each in fields(self.kind)
            if "option" in each.metadata and (self.only is None or each.name in self.only)
        ]

    def parameters(self) -> list[inspect.Parameter]:
        """List the parameters that typer makes options of."""
        return [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_shown(about, default),
                annotation=Annotated[_word_type(about, hint), typer_option(about)],
            )
            for name, about, hint, default in self.options()
        ]

    def take(self, given: dict[str, Any]) -> Any:
        """Make what the command gets, out of the options' values, which leave `given`."""
        values: dict[str, Any] = {}
        for name, about, _, default in self.options():
            value = given.pop(name)
            if about.is_open and value in (None, ""):
                continue
            if about.repeated:
                value = tuple(value) if value else default
            elif about.text is not None:
                value = about.text.read(_name_in_messages(name, about), value)
            values[name] = value
        return self.make(values)


def _source(annotation: Any) -> _Source | None:
    """Find what a parameter takes from options; None for one that is typer's own."""
    kind: Any
    kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    only = next((note.names for note in notes if isinstance(note, Only)), None)
    defaults = next((note.values for note in notes if isinstance(note, Defaults)), {})
    if get_origin(kind) is Given:
        (kind,) = get_args(kind)
        return _Source(kind, functools.partial(Given, kind), only, defaults)
    if is_dataclass(kind):
        return _Source(kind, functools.partial(_make, kind), only, defaults)
    return None


def _make(kind: Any, values: dict[str, Any]) -> Any:
    """Make the settings of these values; their own defaults stand for the rest."""
    return kind(**values)


def _shown(about: Option, default: Any) -> Any:
    """Write the default as the command line has it."""
    if about.is_open or about.repeated:
        return None
    return default if about.text is None else about.text.write(default)


def _word_type(about: Option, hint: Any) -> Any:
    """Choose the type that typer reads."""
    if about.repeated:
        (item, _) = get_args(hint)
        return list[item] | None  # type: ignore[valid-type]
    kind = hint if about.text is None else str
    optional = get_origin(kind) in (Union, types.UnionType)
    return kind if optional or not about.is_open else kind | None


def _name_in_messages(name: str, about: Option) -> str:
    """Name an option as users know it.

    That is the long option's name, as the environment and Python have it.
    """
    return about.names[-1].lstrip("-").replace("-", "_") if about.names else name


def typer_option(about: Option) -> Any:
    """Make typer's form of an Option."""
    return typer.Option(*about.names, envvar=about.env, help=about.help)


def of_field(settings: Any, name: str) -> Any:
    """Make typer's form of one field of settings."""
    (found,) = (each for each in fields(settings) if each.name == name)
    return typer_option(found.metadata["option"])


def from_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of one with settings, which become options: `_Source` says which."""
    signature = inspect.signature(command, eval_str=True)
    sources: dict[str, _Source] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        source = _source(parameter.annotation)
        if source is None:
            parameters.append(parameter)
        else:
            sources[name] = source
            parameters += source.parameters()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: source.take(given) for name, source in sources.items()}
        command(**given, **made)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def writable(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse a file that can't be written, before anything is computed for it.

    Raises InputError, one line, for such a file.
    """
    if value is not None:
        destination(value, param.opts[-1])
    return value


def out_file(help: str) -> Any:
    """Make the option of a command's file, which is written at its end or after every problem."""
    return typer.Option(help=help, callback=writable)


# Parameters of several commands and scripts that are no settings' field.
MODEL_HELP = (
    "Hub id, model directory, GGUF file, adapter directory, or an embedded name: "
    f"{', '.join(embedded.names())}."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
TemplateOptions = Annotated[list[str] | None, typer_option(TEMPLATE_OPTIONS)]
# Of commands that answer: plan every pass, with as many SATs as were trained.
PLANNED: dict[str, Any] = {"k": None, "strategy": "auto"}
# Single fields, for scripts.
Dtype = Annotated[str, of_field(LoadConfig, "dtype")]
Device = Annotated[str, of_field(LoadConfig, "device")]
