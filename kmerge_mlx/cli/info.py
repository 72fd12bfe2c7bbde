"""``kmerge-mlx info``: what a folder holds, and which K saves what."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kmerge_mlx.cli.convert import ConvertSettings
from kmerge_mlx.cli.inputs import PromptSettings, command
from kmerge_mlx.cli.output import aligned, note, print_json, size, wrapped
from kmerge_mlx.config import MULTIPLICATIONS_PER_BYTE, USABLE_SHARE
from kmerge_mlx.errors import SettingsError
from kmerge_mlx.settings import (
    SIZE,
    CacheSettings,
    ModelSettings,
    Settings,
    argument,
    option,
    parse_size,
)

if TYPE_CHECKING:
    from kmerge_mlx.tools.sizing import SizingConfig

MOST = 10_000_000
MAX_SHOWN = 100  # characters of a value; --json shows all of it
SCORES = ("metrics", "eval_accuracy")  # what the authors' code leaves beside a checkpoint


@dataclass(frozen=True)
class InfoSettings(Settings):
    """A folder to look into, or a base model to calculate for."""

    NAME = "info"

    path: str | None = argument(
        "PATH",
        "Adapter, checkpoint or base model: a folder, or a hub repo id (user/name@revision).",
        required=False,
    )
    model: str | None = option(
        None,
        str,
        "Calculate for this base model instead: a folder or a Hugging Face repo id, of which no "
        "weights are read.",
    )
    length: tuple[int, ...] = option(
        (), int, "Tokens of the prompt; give it again for another.", low=1, high=MOST, many=True
    )
    k: tuple[int, ...] = ModelSettings.setting(
        "k",
        default=(1, 2, 3, 4, 8),
        help="Merge factor K; give it again for another. 1 is plain mlx-lm, which is calculated in "
        "any case. Of a folder that `convert` made of LCLM, the default is its own K.",
        high=MOST,
        many=True,
    )
    memory: Any = option(
        None,
        SIZE,
        f"Unified memory of a Mac, as in 16GB: say what fits in {USABLE_SHARE:.0%} of it.",
    )
    dtype: str | None = ConvertSettings.setting(
        "dtype", help="Of weights and KV cache. Default: the model's own."
    )
    max_kv_size: int | None = PromptSettings.setting("max_kv_size")
    kv_bits: int | None = CacheSettings.setting("kv_bits")
    kv_group_size: int = CacheSettings.setting("kv_group_size")
    quantized_kv_start: int = CacheSettings.setting("quantized_kv_start")
    as_json: bool = option(False, bool, "Print one JSON object on stdout.", flags=("--json",))

    def clashes(self) -> list[str]:
        found = []
        if (self.path is None) == (self.model is None):
            what = "neither" if self.path is None else "both"
            found.append(f"found {what} PATH and `model`, expected one of them")
        elif self.model is not None and not self.length:
            found.append("`model` needs a `length`, in tokens")
        if self.memory is not None and self.memory_bytes < 1 << 20:
            found.append(f"`memory` is {self.memory}, expected an amount as in 16GB")
        if self.kv_bits is not None and self.max_kv_size is not None:
            found.append("`kv_bits`: mlx-lm cannot quantize a `max_kv_size` cache")
        return found

    @property
    def memory_bytes(self) -> int | None:
        """Memory is sold in powers of two: ``GB`` means ``GiB``."""
        return None if self.memory is None else parse_size(str(self.memory), 1024)


@command(InfoSettings)
def info(settings: InfoSettings) -> None:
    """Say what a folder or hub repo holds, or which K saves what.

    With a PATH: K, sizes, base, layout, provenance, metrics. With --model and --length: positions,
    KV cache, encoder, memory and the least speed-up of every K, from the config alone.

    \b
    Examples:
      kmerge-mlx info ./adapter
      kmerge-mlx info ./checkpoint --json
      kmerge-mlx info --model Qwen/Qwen2.5-0.5B --length 2048 --length 32768 --memory 16GB
      kmerge-mlx info --model ./base --length 100000 --k 4 --k 8 --kv-bits 4
    """
    if settings.model is not None:
        _calculate(settings)
        return
    if foreign := settings.given().keys() - {"path", "as_json"}:
        raise SettingsError(f"`{min(foreign)}` is an option of `model`, not of a PATH")

    from kmerge_mlx.tools.describe import describe

    found = describe(settings.path)
    if settings.as_json:
        print_json(found)
        return
    print(f"{found['path']}: {found['kind']}")
    if "context_length" in found:
        _print_base(found)
    for adapter in found.get("adapters", ()):
        _print_adapter(adapter, carried="context_length" in found)


def _print_adapter(adapter: dict[str, Any], carried: bool) -> None:
    from kmerge_mlx.tools.describe import encoder_line, layout_line, tuning_lines

    base = adapter["base_model"] or "not named"
    if carried:
        base, adapter = "the model around it", adapter | {"base_config": {}}
    elif not adapter["base_config"]:
        base += " (its config was not recorded: converted without --model)"
    pad = adapter["pad_token_id"]
    rows = [
        ("encoder", encoder_line(adapter)),
        *tuning_lines(adapter).items(),
        ("base", base),
        *_under(adapter["base_config"]),
        ("padding", "from the tokenizer" if pad is None else f"token {pad}"),
    ]
    if layout := layout_line(adapter):
        rows.append(("layout", layout))
    about = dict(adapter["provenance"])
    scores = {name: about.pop(name) for name in SCORES if isinstance(about.get(name), dict)}
    if about:
        rows += [("provenance", ""), *_under(about)]
    for name, values in scores.items():
        rows += [(name.replace("_", " "), ""), *_under(values)]
    if run := adapter["training"]:
        end = f"; {run['finished']}" if run["finished"] else ""
        rows.append(("training", f"{run['iteration']:,} iterations{end}"))
        if run["best"]:
            rows += [("best validation", ""), *_under(run["best"])]
    print(f"K = {adapter['merge_factor']}")
    _print_rows(rows)


def _print_base(found: dict[str, Any]) -> None:
    bits, context = found["quantization_bits"], found["context_length"]
    merging = "checked when an adapter is loaded"
    if found["proven_by_tests"]:
        merging = "proven by this project's tests"
    _print_rows(
        [
            *((name, _shown(value)) for name, value in found["config"].items()),
            ("context", f"{context} positions" if context else "unknown"),
            ("quantization", f"{bits} bits" if bits else "none"),
            ("merging", merging),
        ]
    )


def _print_rows(rows: Sequence[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}".rstrip())


def _under(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Entries below a heading, each on a line that a terminal can show."""
    return ((f"  {_shown(name)}", _shown(value)) for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _calculate(settings: InfoSettings) -> None:
    from kmerge_mlx.tools.sizing import SizingConfig, calculate

    memory = settings.memory_bytes
    shared = ("dtype", "max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start")
    config = SizingConfig(
        lengths=tuple(sorted(set(settings.length))),
        ks=tuple(sorted({1, *settings.k})),
        usable_bytes=None if memory is None else int(memory * USABLE_SHARE),
        **{name: getattr(settings, name) for name in shared},
    )
    found = calculate(settings.model, config, own_k="k" not in settings.given())
    config = replace(config, ks=tuple(factor["k"] for factor in found["factors"]))
    if config.max_kv_size is not None and not found["base"]["obeys_max_kv_size"]:
        kind = found["base"]["model_type"]
        note(f"note: mlx-lm's {kind} makes its own KV cache and ignores --max-kv-size")
    if not settings.as_json:
        print(_tables(settings.model, config, memory, found))
        return
    report = {
        "kind": "calculation",
        "settings": {"model": settings.model, "memory_bytes": memory, **asdict(config)},
        "assumed": {
            "multiplications_per_byte": MULTIPLICATIONS_PER_BYTE,
            "usable_share_of_memory": USABLE_SHARE,
        },
        **found,
    }
    print_json(report)


def _tables(name: str, config: SizingConfig, memory: int | None, found: Mapping[str, Any]) -> str:
    base, asked = found["base"], memory is not None
    context = f"{base['context_length']:,} positions" if base["context_length"] else "unknown"
    source = "weights' headers" if base["has_weights"] else "config"
    factors = [["K", "encoder", "its size"]]
    rows = [["prompt", "K", "positions", "KV cache", "memory", *(["fits"] if asked else [])]]
    rows[0] += ["less work", "speed-up at least"]
    if asked:
        factors[0] += [f"longest prompt in {memory / (1 << 30):.6g} GB", "ends at"]
    for factor in found["factors"]:
        encoder = [f"{factor['encoder_parameters']:,}", size(factor["encoder_bytes"])]
        cells = [str(factor["k"]), *(encoder if factor["k"] > 1 else ["none", "-"])]
        if asked:
            longest = factor["longest_prompt"]
            cells.append("no limit found" if longest is None else f"{longest:,} tokens")
            cells.append(factor["limited_by"] or "-")
        factors.append(cells)
    for row in found["rows"]:
        ratios = (row["work_ratio"], row["speedup_floor"])
        rows.append(
            [
                f"{row['length']:,} token{'' if row['length'] == 1 else 's'}",
                str(row["k"]),
                f"{row['positions']:,}" + ("*" if row["in_context"] is False else ""),
                size(row["kv_bytes"]),
                size(row["memory_bytes"]),
                *(["yes" if row["fits"] else "no"] if asked else []),
                *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            ]
        )
    title = (
        f"{name}: {base['model_type']}, {base['parameters']:,} parameters, "
        f"{size(base['weight_bytes'])} ({base['dtype']}, from its {source}); context {context}"
    )
    over = any(row["in_context"] is False for row in found["rows"])
    return "\n\n".join([wrapped(title), aligned(factors), aligned(rows, 2), _legend(config, over)])


def _legend(config: SizingConfig, over: bool) -> str:
    cache = "" if config.kv_bits is None else f", {config.kv_bits} bits each"
    if config.kv_bits is not None and config.quantized_kv_start:
        cache += f" from position {config.quantized_kv_start:,} on"
    marked = "*           more positions than the model was made for\n" if over else ""
    fits = f"memory within {USABLE_SHARE:.0%} of --memory: what a Mac's GPU may use"
    fits = "" if config.usable_bytes is None else f"fits        {fits}\n"
    return f"""\
K = 1       plain mlx-lm on the whole prompt; at any other K all of the prompt merges
encoder     the one in the model's folder, or of default width, in float32
{marked}\
KV cache    keys and values of the prompt's positions{cache};
            a linear layer's state
memory      weights, encoder, merged blocks, and the room that mlx-lm gives
            the KV cache; activations and generated tokens not counted
{fits}\
less work   multiplications at K = 1 over those at this K, the encoder's included
speed-up    the least of time to first token if multiplying and reading weights
            take all of it, where a machine multiplies at most {MULTIPLICATIONS_PER_BYTE} times
            while it reads a byte, which is assumed, not measured;
            `kmerge-mlx bench` measures"""
