"""``kmerge-mlx info``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kmerge_mlx.cli import options as opt


def info(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Adapter, checkpoint or base model folder.")
    ],
    as_json: opt.Json = False,
) -> None:
    """Say what a folder holds: K, sizes, base, provenance.

    \b
    Examples:
      kmerge-mlx info ./adapter
      kmerge-mlx info ./checkpoint --json
    """
    from kmerge_mlx.describe import describe

    found = describe(path)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{found['path']}: {found['kind']}")
    if found["kind"] == "base model":
        _print_base(found)
    for adapter in found.get("adapters", ()):
        _print_adapter(adapter)


def _print_adapter(adapter: dict[str, Any]) -> None:
    base = adapter["base_model"] or "not named"
    if not adapter["base_config"]:
        base += " (its config was not recorded: converted without --model)"
    pad = adapter["pad_token_id"]
    rows = {
        "encoder": _encoder(adapter),
        **_tuning(adapter),
        "base": base,
        **{f"  {name}": value for name, value in adapter["base_config"].items()},
        "padding": "from the tokenizer" if pad is None else f"token {pad}",
        **{name: _compact(adapter[name]) for name in ("layout", "provenance") if adapter[name]},
    }
    print(f"K = {adapter['merge_factor']}")
    _print_rows(rows)


def _encoder(adapter: dict[str, Any]) -> str:
    if adapter["merge_factor"] == 1:
        return "none: nothing is merged"
    context = adapter["encoder_context"]
    return (
        f"D = {adapter['hidden_size']}, H = {adapter['inner_size']}, "
        + (f"{context} tokens of context, " if context else "")
        + f"{adapter['encoder_parameters']:,} parameters, "
        f"{adapter['encoder_bytes'] / 1e6:.1f} MB {adapter['dtype']}"
    )


def _tuning(adapter: dict[str, Any]) -> dict[str, str]:
    """The rows on how the base is changed: by LoRA, or in whole layers, or both (the head)."""
    rows, layers = {}, adapter["num_layers"]
    if adapter["full_bytes"]:
        rows["full"] = (
            f"{f'last {layers}' if layers > 0 else 'all'} layers, "
            f"{adapter['full_parameters']:,} parameters, {adapter['full_bytes'] / 1e6:.1f} MB"
        )
    if adapter["lora_modules"] or not rows:
        rows["LoRA"] = (
            f"{adapter['lora_modules']} modules, rank {_list(adapter['lora_ranks'])}, "
            f"scale {_list(adapter['lora_scales'])}, {adapter['lora_bytes'] / 1e6:.1f} MB"
        )
    return rows


def _print_base(found: dict[str, Any]) -> None:
    bits = found["quantization_bits"]
    rows = {
        **found["config"],
        "context": f"{found['context_length']} positions" if found["context_length"] else "unknown",
        "quantization": f"{bits} bits" if bits else "none",
        "merging": "proven by this project's tests"
        if found["proven_by_tests"]
        else "checked when an adapter is loaded",
    }
    _print_rows(rows)


def _print_rows(rows: dict[str, Any]) -> None:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def _list(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
