"""What commands read: their flags and YAML file, made from a settings class, and their prompts."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from kmerge_mlx.cli.output import bar, clean_stdout, note, note_layout, note_unnamed
from kmerge_mlx.cli.texts import check_length
from kmerge_mlx.errors import KMergeError, PromptError, SettingsError, first_line
from kmerge_mlx.prompts.chat_template import ChatTemplate, needs_template, now
from kmerge_mlx.prompts.keep import check_keep
from kmerge_mlx.prompts.policy import Layout, chosen
from kmerge_mlx.settings import (
    INTS,
    SIZE,
    CacheSettings,
    LayoutSettings,
    ModelSettings,
    Option,
    Settings,
    argument,
    flags_of,
    option,
    option_of,
)

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from kmerge_mlx.source import Source

MAX_YAML_BYTES, MAX_ALIASES = 1 << 20, 20

_METAVARS = {int: "N", float: "X", str: "TEXT", INTS: "N[,N]", SIZE: "SIZE"}
_METAVARS |= {list: "A,B", dict: "JSON"}

_DEVICE = {
    "the memory ran out": ("OutOfMemory", "Insufficient Memory", "malloc", "allocate"),
    "macOS ended a GPU program that took too long": ("Timeout", "Interactivity"),
}
"""What is wrong, and words of MLX's RuntimeErrors by which it is known."""
_HELPS = {
    "batch_size": "a smaller `batch_size`",
    "max_seq_length": "a smaller `max_seq_length`",
    "grad_checkpoint": "`grad_checkpoint`",
    "prefill_step_size": "a smaller `prefill_step_size`",
    "k": "a larger `k`",
    "resume": "and `resume` to go on from the last save",
}
"""What may help, by a setting that a command must have."""


def command(
    settings: type[Settings],
    config_file: bool = False,
    to_print: Callable[[Any], Settings] = lambda settings: settings,
) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a function of settings a command with a flag for each of them.

    With a ``config_file`` it takes ``-c config.yaml`` and ``--print-config`` too, which prints what
    ``to_print`` makes of the settings that were given.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            config, show = given.pop("config", None), given.pop("print_config", False)
            try:
                named = [f for f in fields(settings) if given.get(f.name) not in (None, [])]
                flags = {f.name: _read(f, given[f.name]) for f in named}
                made = settings.of(_as_flags(settings, _read_yaml(config)) if config else {}, flags)
                _check_trust(made, flags)
                if show:
                    print(as_yaml(to_print(made)), end="")
                else:
                    # mlx-lm prints warnings on stdout, about large models.
                    as_json = getattr(made, "json", getattr(made, "as_json", False))
                    with clean_stdout() if as_json else nullcontext():
                        function(made)
            except KMergeError as error:
                error.args = (with_flags(str(error), settings),)
                raise
            except RuntimeError as error:
                if (found := _device_error(error, settings)) is None:
                    raise
                raise KMergeError(with_flags(found, settings)) from error

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(_parameters(settings, config_file))
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
        return run

    return decorate


def _check_trust(made: Settings, flags: Mapping[str, Any]) -> None:
    """Only the command line permits code, and no file chooses whose."""
    if not getattr(made, "trust_remote_code", False):
        return
    if not flags.get("trust_remote_code"):
        raise SettingsError("`trust_remote_code` in a file is not enough: give it as a flag, too")
    if made.model is None:
        raise SettingsError("`trust_remote_code` needs `model`: no file chooses whose code runs")


def _device_error(error: RuntimeError, settings: type[Settings]) -> str | None:
    """What MLX says of the device, with what helps; None for anything else, which is a bug."""
    text = str(error)
    what = next((what for what, words in _DEVICE.items() if any(w in text for w in words)), None)
    names = {f.name for f in fields(settings)}
    helps = ", ".join(help for name, help in _HELPS.items() if name in names)
    return what and f"{what} ({first_line(error)}): try {helps or 'a smaller model'}"


def with_flags(message: str, settings: type[Settings]) -> str:
    """A message in which each setting in backticks is written as the flag that sets it."""
    flags: dict[str, str] = {}
    for setting in fields(settings):
        # Also both sides of --x/--ignore-x; a setting of YAML alone keeps its name.
        for flag in filter(None, "/".join(flags_of(setting)).split("/")):
            flags[flag.lstrip("-").replace("-", "_")] = flag
            flags.setdefault(setting.name, flag)
    return re.sub(r"`(\w+)`", lambda m: flags.get(m[1], m[0]), message)


@dataclass(frozen=True)
class _FileSettings(Settings):
    """The options of a command that reads a file of settings, which are not settings themselves."""

    config: str | None = option(None, str, "A YAML file with settings.", flags=("-c", "--config"))
    print_config: bool = option(False, bool, "Print the settings as YAML, and do no more.")


def _parameters(settings: type[Settings], config_file: bool) -> list[inspect.Parameter]:
    shown = [f for f in fields(settings) if not option_of(f).yaml_only]
    shown.sort(key=lambda f: option_of(f).argument is None)
    return [_parameter(f) for f in (*shown, *(fields(_FileSettings) if config_file else ()))]


def _parameter(field: Field) -> inspect.Parameter:
    """The command line's view of a setting; None means that it was not given."""
    own = option_of(field)
    # A list is text with commas, as several whole numbers may be; a mapping is JSON.
    kind: Any = own.kind if own.kind in (int, float, bool) else str
    kind = str if own.many and kind is int else kind
    kind = list[kind] if own.many or own.kind == INTS else kind
    if own.argument:
        info = typer.Argument(metavar=own.argument, help=own.help, show_default=False)
    else:
        limits = {"min": own.low, "max": own.high} if kind in (int, float) else {}
        info = typer.Option(
            *flags_of(field),
            help=own.help + _default(field, own),
            show_default=False,
            # Not a choice of Typer's: the settings' own check says more, for YAML too.
            metavar=("," if own.kind is list else "|").join(map(str, own.choices))
            or _METAVARS.get(own.kind),
            **limits,
        )
    annotation = Annotated[kind if own.required else kind | None, info]
    default = inspect.Parameter.empty if own.required else None
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=annotation)


def _default(field: Field, option: Option) -> str:
    shown = field.default if option.shown is None else option.shown
    if isinstance(shown, tuple):
        shown = ", ".join(map(str, shown))
    return f" Default: {shown}." if isinstance(shown, int | float | str) and shown else ""


def _read(field: Field, value: Any) -> Any:
    """A flag's value as the settings hold it."""
    kind = option_of(field).kind
    if kind is list and isinstance(value, str):
        if not (parts := [part.strip() for part in value.split(",") if part.strip()]):
            raise SettingsError(f"`{field.name}` is empty, expected names with commas between them")
        return parts
    if kind == INTS or (kind is int and isinstance(value, list)):
        texts = [value] if isinstance(value, str) else value
        found = [_whole(part.strip()) for text in texts for part in text.split(",")]
        if kind == INTS and (len(found) == 1 or any(isinstance(n, str) for n in found)):
            return found[0] if len(found) == 1 else ",".join(texts)
        return found
    if kind == SIZE:
        return _whole(value)
    if kind is dict:
        try:
            return json.loads(value)
        except ValueError as error:
            raise SettingsError(f"`{field.name}` is not JSON: {error}") from None
    return value


def _whole(text: str) -> int | str:
    """A whole number, or the text where it is none: the settings' check says more than int()."""
    return int(text) if re.fullmatch(r"-?\d{1,19}", text) else text


def _as_flags(settings: type[Settings], found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file; a list in it may be written as the flag takes it, such as 2,4."""
    lists = {f.name: f for f in fields(settings) if option_of(f).kind in (list, INTS)}
    return {
        n: _read(lists[n], v) if n in lists and isinstance(v, str) else v for n, v in found.items()
    }


def _read_yaml(path: str) -> Mapping[str, Any]:
    """The settings in a file, numbers such as 1e-5 read as mlx-lm reads them."""
    import yaml
    from mlx_lm.lora import yaml_loader

    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise SettingsError(f"--config {path} is larger than {MAX_YAML_BYTES >> 20} MiB")
        # Aliases of aliases grow without limit once they are written out.
        if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)) > MAX_ALIASES:
            raise SettingsError(f"--config {path} has over {MAX_ALIASES} aliases: write them out")
        found = yaml.load(text, yaml_loader)
        json.dumps(found, default=str, skipkeys=True)  # a ValueError where one is in itself
    except OSError as error:
        raise SettingsError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config {path} is not YAML: {reason[:200]}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"--config {path} holds no settings, expected lines of `name: value`")
    return found


def as_yaml(settings: Settings) -> str:
    """The settings as ``-c`` reads them: text that looks like a number is quoted."""
    import yaml
    from mlx_lm.lora import yaml_loader

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers = yaml_loader.yaml_implicit_resolvers

    ours = [f.name for f in fields(settings) if option_of(f).argument is None]
    values = {name: getattr(settings, name) for name in ours}
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class PromptSettings(CacheSettings, ModelSettings):
    """What ``generate``, ``chat`` and ``cache`` share."""

    files: tuple[str, ...] = argument(
        "FILE",
        "Text to compress; `-` is stdin. Several are joined by a blank line.",
        many=True,
        required=False,
    )
    max_kv_size: int | None = option(
        None, int, "Most positions the KV cache keeps; older ones are overwritten.", low=1
    )
    system_prompt: str | None = option(None, str, "System message for the chat template.")
    chat_template_config: dict[str, Any] | None = option(
        None, dict, "Further chat template arguments, a JSON object."
    )
    merges: str | None = LayoutSettings.setting("merges")
    chat_template: bool | None = LayoutSettings.setting("chat_template")
    keep: tuple[str, ...] | None = LayoutSettings.setting("keep")
    merge_threshold: ClassVar[int | None] = None
    prefill_response: ClassVar[str | None] = None

    def clashes(self) -> list[str]:
        if self.kv_bits is not None and self.max_kv_size is not None:
            return ["mlx-lm cannot quantize a cache with `max_kv_size`: leave `kv_bits` out"]
        return []

    def cache_options(self) -> dict[str, Any]:
        """Options of mlx-lm's ``generate_step``: those of :class:`CacheSettings`, and progress."""
        show = bar("Reading")

        def progress(done: int, total: int) -> None:
            if total > self.prefill_step_size:
                show(done, total)

        named = {f.name: getattr(self, f.name) for f in fields(CacheSettings)}
        return named | {"prompt_progress_callback": progress}


@dataclass(frozen=True)
class Opened:
    """A loaded model, and how its prompts are read."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    source: Source
    layout: Layout
    chat: ChatTemplate | None
    """The chat template with its options, or None if it is not applied."""
    noted: bool
    """Whether a note has named the model."""


def open_model(settings: PromptSettings, text: str = "") -> Opened:
    """Finds and loads what a command's settings name, with notes about its adapter on stderr.

    ``text``, of the FILEs and the prompt, is refused where this model cannot read it.
    """
    from kmerge_mlx.model import load_source
    from kmerge_mlx.source import Source, refuse_unknown, without_encoder

    named = (settings.model, settings.adapter_path, settings.k)
    if text and named[:2] == (None, None):
        refuse_unknown(text)
    noted = note_unnamed(*named[:2])
    source = Source.find(*named, settings.trust_remote_code)
    if settings.files and source.merge is None and settings.k is None:
        raise PromptError(without_encoder("a FILE merges", source.model))
    model, tokenizer, _ = load_source(source)
    check_length(text, tokenizer, model.context_length, source.k)
    stored = None
    if source.merge is not None:
        stored, made_for = source.merge.layout, source.merge.base
        if not made_for.fields and made_for.id not in (None, source.model):
            note(
                f"note: this adapter names {made_for.id} as its base and was converted without "
                f"--model, so only sizes show that it fits {source.model}"
            )
    needs_template(tokenizer, settings.chat_template)
    asked = (settings.merges, settings.merge_threshold, settings.chat_template, settings.keep)
    layout = replace(chosen(stored, *asked), date=now(tokenizer))
    check_keep(tokenizer, layout.keep)
    note_layout(stored, layout, tokenizer.has_chat_template)
    chat = _applied(tokenizer, settings, layout)
    return Opened(model, tokenizer, source, layout, chat, noted)


def _applied(tokenizer: Any, settings: PromptSettings, layout: Layout) -> ChatTemplate | None:
    """The chat template if it applies; options that would be lost without one are refused."""
    names = ("system_prompt", "prefill_response", "chat_template_config")
    system_prompt, prefill_response, options = (getattr(settings, name) for name in names)
    if tokenizer.has_chat_template and layout.chat_template:
        return ChatTemplate(system_prompt, prefill_response, options or {})
    if lost := [f"`{name}`" for name in names if getattr(settings, name)]:
        reason = "this tokenizer has none"
        if tokenizer.has_chat_template:
            reason = "it is left out here; --apply-chat-template applies it"
        raise PromptError(f"{' and '.join(lost)} cannot be used without a chat template: {reason}")
    return None
