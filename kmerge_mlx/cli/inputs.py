"""Makes a command of a settings class: its flags, its YAML file, and flags in its errors."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from kmerge_mlx.errors import KMergeError, SettingsError
from kmerge_mlx.settings import SIZE, Option, Settings, flags_of, option_of

# What the command line reads for each kind; a list is text with commas, a mapping is JSON.
_TYPES = {int: int, float: float, str: str, bool: bool, SIZE: str, list: str, dict: str}
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


class CommandError(Exception):
    """What ends a command.

    Args:
        message: One line, or a summary and a list, with flags for the settings.
        code: The exit code.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def command(
    settings: type[Settings],
    config_file: bool = False,
    to_print: Callable[[Any], Settings] = lambda settings: settings,
) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a function of settings a command with a flag for each of them.

    Args:
        settings: The class. A flag that is not given leaves its setting as the class has it.
        config_file: Whether the command takes ``-c config.yaml`` and ``--print-config``.
        to_print: From the settings that were given to those that ``--print-config`` prints.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            config, show = given.pop("config", None), given.pop("print_config", False)
            try:
                flags = {
                    f.name: _read(f, given[f.name])
                    for f in fields(settings)
                    if given.get(f.name) is not None
                }
                made = settings.of(read_yaml(config) if config else {}, flags)
                if show:
                    print(as_yaml(to_print(made)), end="")
                else:
                    function(made)
            except KMergeError as error:
                code = 2 if isinstance(error, SettingsError) else 1
                raise CommandError(with_flags(str(error), settings), code) from error

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(_parameters(settings, config_file))
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
        return run

    return decorate


def with_flags(message: str, settings: type[Settings]) -> str:
    """A message in which each setting in backticks is written as the flag that sets it."""
    flags = {f.name: flags_of(f)[0].split("/")[0] for f in fields(settings) if flags_of(f)}
    return re.sub(r"`(\w+)`", lambda m: flags.get(m[1], m[0]), message)


def _parameters(settings: type[Settings], config_file: bool) -> list[inspect.Parameter]:
    shown = [f for f in fields(settings) if not option_of(f).yaml_only]
    shown.sort(key=lambda f: option_of(f).argument is None)
    parameters = [_parameter(f) for f in shown]
    if config_file:
        config = typer.Option(
            "-c", "--config", help="A YAML file with settings.", show_default=False
        )
        show = typer.Option("--print-config", help="Print the settings as YAML, and do no more.")
        parameters += [
            inspect.Parameter(
                "config", _KEYWORD, default=None, annotation=Annotated[str | None, config]
            ),
            inspect.Parameter(
                "print_config", _KEYWORD, default=False, annotation=Annotated[bool, show]
            ),
        ]
    return parameters


def _parameter(field: Field) -> inspect.Parameter:
    """The command line's view of a setting; None means that it was not given."""
    option = option_of(field)
    kind: Any = _TYPES[option.kind]
    kind = list[kind] if option.many else kind
    if option.argument:
        info = typer.Argument(metavar=option.argument, help=option.help, show_default=False)
    else:
        limits = {"min": option.low, "max": option.high} if kind in (int, float) else {}
        info = typer.Option(
            *flags_of(field),
            help=option.help + _default(field, option),
            show_default=False,
            rich_help_panel=option.group,
            # Not a choice of Typer's: the settings' own check says more, for YAML too.
            metavar=f"<{'|'.join(map(str, option.choices))}>" if option.choices else None,
            **limits,
        )
    default = ... if option.required else None
    annotation = Annotated[kind if option.required else kind | None, info]
    if option.required:
        return inspect.Parameter(field.name, _KEYWORD, annotation=annotation)
    return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=annotation)


def _default(field: Field, option: Option) -> str:
    if option.shown is not None:
        return f" Default: {option.shown}."
    default = field.default
    if isinstance(default, tuple) and default:
        default = ", ".join(map(str, default))
    plain = isinstance(default, int | float | str)
    return f" Default: {default}." if plain and default not in (False, 0, "") else ""


def _read(field: Field, value: Any) -> Any:
    """A flag's value as the settings hold it."""
    kind = option_of(field).kind
    if kind is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind == SIZE and value.isdecimal():
        return int(value)
    if kind is dict:
        try:
            return json.loads(value)
        except ValueError as error:
            raise SettingsError(f"`{field.name}` is not JSON: {error}") from None
    return value


def read_yaml(path: str) -> Mapping[str, Any]:
    """The settings in a file, numbers such as 1e-5 read as mlx-lm reads them.

    Raises:
        SettingsError: Not there, or not a mapping in YAML.
    """
    import yaml
    from mlx_lm.lora import yaml_loader

    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            found = yaml.load(file, yaml_loader)
    except OSError as error:
        raise SettingsError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config {path} is not YAML: {reason[:200]}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"--config {path} holds no settings, expected lines of `name: value`")
    return found


def as_yaml(settings: Settings) -> str:
    """The settings as :func:`read_yaml` reads them: text that looks like a number is quoted."""
    import yaml
    from mlx_lm.lora import yaml_loader

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers = yaml_loader.yaml_implicit_resolvers

    ours = [f.name for f in fields(settings) if option_of(f).argument is None]
    values = {name: getattr(settings, name) for name in ours}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True)
