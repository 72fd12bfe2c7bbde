"""``kmerge-mlx info``: what a folder holds, and the calculator "which K"."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from kmerge_mlx.adapters.schema import QUANTIZATION
from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.calculated import parse_memory, report_of, text_of
from kmerge_mlx.config import USABLE_SHARE, GenerationConfig
from kmerge_mlx.prompts.policy import CONTEXTS

KS = (1, 2, 3, 4, 8)
MAX_LENGTH = 10_000_000  # the KV cache grows in mlx-lm's own steps, which takes time

MAX_SHOWN = 100  # characters of a value; --json shows all of it
SCORES = ("metrics", "eval_accuracy")  # what the authors' code leaves beside a checkpoint

_FOLDER, _CALCULATOR = "a PATH", "--model"
OWN_OPTIONS = {
    _FOLDER: (),
    _CALCULATOR: (
        *("length", "k", "memory", "dtype", "max_kv_size"),
        *("kv_bits", "kv_group_size", "quantized_kv_start"),
    ),
}

Rows = Iterable[tuple[str, Any]]


def info(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="Adapter, checkpoint or base model: a folder, or a hub repo id "
            "(user/name@revision).",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Calculate for this base model instead: a folder or a Hugging Face repo id, of "
            "which no weights are read.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            min=1,
            max=MAX_LENGTH,
            help="Tokens of the prompt; give it again for another.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            "--merge-factor",
            min=1,
            max=MAX_LENGTH,
            help="Merge factor K; give it again for another. 1 is plain mlx-lm, which is "
            f"calculated in any case. Default: {', '.join(map(str, KS))}.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help=f"Unified memory of a Mac, as in 16GB: say what fits in {USABLE_SHARE:.0%} of it.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        opt.Dtype | None,
        typer.Option(
            "--dtype",
            help="Of weights and KV cache. Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    max_kv_size: opt.MaxKvSize = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = GenerationConfig.kv_group_size,
    quantized_kv_start: opt.QuantizedKvStart = GenerationConfig.quantized_kv_start,
    as_json: opt.Json = False,
) -> None:
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
    if (path is None) == (model is None):
        found = "neither" if path is None else "both"
        raise typer.BadParameter(f"found {found}, expected one of them", param_hint="PATH, --model")
    if model is None:
        opt.refuse_foreign(context, OWN_OPTIONS, _FOLDER)
        _folder(path, as_json)
        return
    if not length:
        raise typer.BadParameter("--model needs it, in positions", param_hint="--length")
    opt.check_kv(kv_bits, max_kv_size)
    total = parse_memory(memory)

    from kmerge_mlx.tools.sizing import SizingConfig, calculate

    config = SizingConfig(
        lengths=tuple(sorted(set(length))),
        ks=tuple(sorted({1, *(k or KS)})),
        dtype=dtype,
        usable_bytes=None if total is None else int(total * USABLE_SHARE),
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )
    found = calculate(model, config)
    if max_kv_size is not None and not found.base.obeys_max_kv_size:
        note = f"note: mlx-lm's {found.base.model_type} makes its own KV cache and ignores "
        print(f"{note}--max-kv-size", file=sys.stderr)
    if as_json:
        print(json.dumps(report_of(model, config, total, found), ensure_ascii=False))
    else:
        print(text_of(model, config, total, found))


def _folder(path: str, as_json: bool) -> None:
    from kmerge_mlx.tools.describe import describe

    found = describe(path)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{found['path']}: {found['kind']}")
    if "context_length" in found:
        _print_base(found)
    for adapter in found.get("adapters", ()):
        _print_adapter(adapter, carried="context_length" in found)


def _print_adapter(adapter: dict[str, Any], carried: bool) -> None:
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
    if adapter["layout"]:
        rows.append(("layout", _layout(adapter["layout"])))
    about = dict(adapter["provenance"])
    scores = {name: about.pop(name) for name in SCORES if isinstance(about.get(name), dict)}
    if about:
        rows += [("provenance", ""), *_under(about)]
    for name, values in scores.items():
        rows += [(name.replace("_", " "), ""), *_under(values)]
    if adapter["training"]:
        rows += _training(adapter["training"])
    print(f"K = {adapter['merge_factor']}")
    _print_rows(rows)


def _layout(layout: Mapping[str, Any]) -> str:
    template = "with" if layout["chat_template"] else "without"
    merges = "everything merges"
    if layout["merges"] == CONTEXTS:
        merges = f"contexts of {layout['threshold']} tokens and more merge"
    return f"{merges}, {template} a chat template"


def _training(training: Mapping[str, Any]) -> Rows:
    """The run that the folder belongs to."""
    end = f"; {training['finished']}" if training["finished"] else ""
    yield "training", f"{training['iteration']:,} iterations{end}"
    if training["best"]:
        yield "best validation", ""
        yield from _under(training["best"])


def _under(values: Mapping[str, Any]) -> Rows:
    """Entries below a heading, each on a line that a terminal can show."""
    for name, value in values.items():
        yield f"  {_shown(name)}", _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def encoder_line(adapter: dict[str, Any]) -> str:
    """What an adapter's encoder is, of the facts that ``describe`` gives."""
    if adapter["merge_factor"] == 1:
        return "none: nothing is merged"
    context, packing = adapter["encoder_context"], adapter.get(QUANTIZATION)
    return (
        f"D = {adapter['hidden_size']}, H = {adapter['inner_size']}, "
        + (f"{context} tokens of context, " if context else "")
        + f"{adapter['encoder_parameters']:,} parameters, "
        f"{adapter['encoder_bytes'] / 1e6:.1f} MB "
        + (f"at {packing['bits']} bits" if packing else adapter["dtype"])
    )


def tuning_lines(adapter: dict[str, Any]) -> dict[str, str]:
    """The lines on how the base is changed: by LoRA, or in whole layers, or both (the head)."""
    rows, layers = {}, adapter["num_layers"]
    if adapter["full_bytes"]:
        rows["full"] = (
            f"{f'last {layers}' if layers > 0 else 'all'} layers, "
            f"{adapter['full_parameters']:,} parameters, {adapter['full_bytes'] / 1e6:.1f} MB"
        )
    if not adapter["lora_modules"] and not rows:
        rows["LoRA"] = "none"
    elif adapter["lora_modules"]:
        rows["LoRA"] = (
            f"{adapter['lora_modules']} modules, rank {_list(adapter['lora_ranks'])}, "
            f"scale {_list(adapter['lora_scales'])}, {adapter['lora_bytes'] / 1e6:.1f} MB"
        )
    return rows


def _print_base(found: dict[str, Any]) -> None:
    bits = found["quantization_bits"]
    rows = {
        **{name: _shown(value) for name, value in found["config"].items()},
        "context": f"{found['context_length']} positions" if found["context_length"] else "unknown",
        "quantization": f"{bits} bits" if bits else "none",
        "merging": "proven by this project's tests"
        if found["proven_by_tests"]
        else "checked when an adapter is loaded",
    }
    _print_rows(rows.items())


def _print_rows(rows: Rows) -> None:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}".rstrip())


def _list(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
