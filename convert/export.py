"""Writes an adapter as a checkpoint folder for PyTorch: the reverse of ``checkpoint.py``.

The copies of base weights (``base_layer``) that PEFT saves for an adapted output head are not
written: they are the base's, and PEFT loads an adapter without them. To PEFT, ``lora_alpha / r`` is
the scale, and an entry of ``target_modules`` or of a pattern means every module whose path ends
with it: a short entry is written only where that is what is meant.

Source: as for ``peft.py``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import base, bundled
from kmerge_mlx.adapters.folder import (
    HEAD,
    MERGE_CONFIG,
    Adapter,
    check_plain_encoder,
    load_adapter,
    name_ends,
)
from kmerge_mlx.adapters.portable import portable, stored_id
from kmerge_mlx.adapters.schema import MEAN, LoRAConfig, LoRASpec
from kmerge_mlx.convert import checkpoint
from kmerge_mlx.convert.checkpoint import COMPANION, PROVENANCE, named_head
from kmerge_mlx.convert.names import PREFIX, SUFFIXES, place
from kmerge_mlx.convert.peft import neighbours
from kmerge_mlx.convert.torch_write import write_state_dict
from kmerge_mlx.errors import AdapterError, CheckpointError, findings, first_line
from kmerge_mlx.files import check_destination, replacing_folder, write_json, write_safetensors

PEFT_CONFIG, PEFT_WEIGHTS = checkpoint.PEFT_CONFIG, checkpoint.PEFT_WEIGHTS[0]
FILES = (checkpoint.ENCODER, PEFT_CONFIG, PEFT_WEIGHTS, COMPANION, *PROVENANCE)
_MOST_EXACT = 2**53  # integers up to this are float64s as well


def export_adapter(
    source: str | Path, destination: str | Path, k: int | None = None, force: bool = False
) -> Adapter:
    """Writes an adapter as the paper's code and PEFT read it; ``convert`` brings it back.

    Tensors keep their dtypes and bits, and the same adapter gives the same bytes. An adapter with
    K = 1 has no encoder, and gets no ``encoder.pth``. ``source`` may be a folder of several K.
    """
    check_destination(destination, force, "exported adapter", FILES, CheckpointError, COMPANION)
    adapter = load_adapter(source, k)
    if problems := _objections(adapter):
        raise AdapterError(findings(f"{source} cannot be exported", problems))
    try:
        with replacing_folder(Path(destination)) as folder:
            _write(adapter, folder)
    except OSError as e:
        raise CheckpointError(f"cannot write {destination}: {e.strerror or first_line(e)}") from e
    return adapter


def _objections(adapter: Adapter) -> list[str]:
    """Why an adapter means nothing to PEFT or to the paper's code, one line each."""
    merge, weights = adapter.merge, adapter.tuning_weights
    check_plain_encoder(merge, "exported")
    problems = checkpoint.not_finite(adapter.encoder_weights | weights | named_head(adapter))
    if not isinstance(adapter.tuning, LoRAConfig):
        return [*problems, "full fine-tuning is not LoRA: `kmerge-mlx fuse` writes a whole model"]
    if merge.encoder is not None:
        if context := merge.encoder.context:
            problems.append(
                f"its encoder also reads the {context} tokens before a block, which the paper's "
                "code does not: train it without `encoder_context`"
            )
        if merge.encoder.start != MEAN:
            problems.append(
                f"its encoder starts from `{merge.encoder.start}`, which the paper's code does not "
                "know: train it with `encoder_start` mean"
            )
        if base.scales_embeddings(merge.base.fields):
            problems.append(
                "its base scales embeddings inside the model, and the paper's code feeds it "
                "unscaled ones (docs/method.md, Gemma): no checkpoint of it is the same model"
            )
        if not weights and not adapter.head_weights:
            problems.append(
                "it has no LoRA: `kmerge-mlx fuse` put it into the model's weights; export the "
                "adapter that it was made from"
            )
    if named_head(adapter).keys() & weights.keys():
        problems.append("lm_head has two LoRAs, one beside the encoder")
    homeless = {}
    for name, array in weights.items():
        module = name.rpartition(".")[0]
        last = module.rpartition(".")[2]
        if array.ndim == 3:
            homeless[place(module)[2]] = "experts"
        elif "embed" in last or last in ("wte", "wpe"):
            homeless[module] = "the embedding table"
    return problems + [
        f"{name} is LoRA on {what}, for which PEFT's files have no place: train it with other "
        "lora_parameters.keys"
        for name, what in sorted(homeless.items())
    ]


def _write(adapter: Adapter, folder: Path) -> None:
    own = adapter.merge.base.id
    named = str(bundled.BASE) if own == bundled.BUNDLED else own
    config, tensors, scales = lora_to_peft(adapter, stored_id(named, folder))
    write_json(folder / PEFT_CONFIG, config)
    write_safetensors(folder / PEFT_WEIGHTS, tensors, "pt")
    if encoder := adapter.encoder_weights:
        state = {theirs: encoder[ours] for theirs, ours in checkpoint.ENCODER_NAMES.items()}
        write_state_dict(folder / checkpoint.ENCODER, state)
    merge = portable(adapter.merge, folder)
    provenance = dict(merge.provenance)
    for path in (folder / name for name in PROVENANCE):
        if isinstance(content := provenance.get(path.stem), dict):
            write_json(path, content)
            # Past this, `convert` would not take it from there.
            if path.stat().st_size <= checkpoint.MAX_PROVENANCE_BYTES:
                del provenance[path.stem]
    merge = replace(merge, provenance=provenance)
    write_json(folder / COMPANION, {MERGE_CONFIG: merge.to_json(), "scales": scales})


def lora_to_peft(
    adapter: Adapter, base_model: str | None
) -> tuple[dict[str, Any], dict[str, mx.array], list[float]]:
    """Says an adapter's LoRA in PEFT's terms: its config, its tensors, and its inexact scales.

    Those are the ones that no ``lora_alpha`` gives to the last bit, ascending.
    """
    tuning, weights = adapter.tuning, adapter.tuning_weights
    modules = {name.rpartition(".")[0] for name in weights}
    specs = {name: tuning.uniform or tuning.modules[name] for name in sorted(modules)}
    if adapter.merge.head_lora is not None:
        specs[HEAD] = adapter.merge.head_lora
    suffixes = {part: suffix for suffix, part in SUFFIXES.items()}
    tensors = {}
    for name, array in (weights | named_head(adapter)).items():
        module, _, part = name.rpartition(".")
        tensors[f"{PREFIX}{module}{suffixes[part]}"] = array.T
    ranks = {name: spec.rank for name, spec in specs.items()}
    alphas = {name: _alpha(spec) for name, spec in specs.items()}
    # An adapter without LoRA has neither.
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] if v else 1 for v in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": tuning.dropout,
        "use_rslora": False,
        "bias": "none",
        "target_modules": _targets(specs, tuning, adapter.merge.base.fields),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "modules_to_save": None,
    }
    inexact = {s.scale for name, s in specs.items() if alphas[name] / s.rank != s.scale}
    return config, tensors, sorted(inexact)


def _alpha(spec: LoRASpec) -> float:
    """The ``lora_alpha`` that, divided by the rank, is the scale; an integer where it is one.

    About one scale in six has none, at ranks that are not a power of two: the nearest then.
    """
    alpha = float(spec.scale) * spec.rank
    alpha = next((a for a in neighbours(alpha) if a / spec.rank == spec.scale), alpha)
    return int(alpha) if alpha.is_integer() and abs(alpha) < _MOST_EXACT else alpha


def _pattern(values: Mapping[str, Hashable], default: Hashable) -> dict[str, Any]:
    """The modules that have another value, each by a regular expression that means no other one."""
    ending = defaultdict(set)  # the end of a path -> the values of all modules that have it
    for name, value in values.items():
        for end in name_ends(name):
            ending[end].add(value)
    keys = {}
    for name, value in values.items():
        inside = place(name)[2]
        short = next((end for end in (inside, name) if len(ending[end]) == 1), None)
        if value != default:
            keys[f"^{re.escape(name)}" if short is None else re.escape(short)] = value
    return dict(sorted(keys.items()))


def _targets(
    specs: Mapping[str, LoRASpec], tuning: LoRAConfig, fields: Mapping[str, Any]
) -> list[str]:
    """The modules by their paths inside a layer where all layers are meant, else by full paths."""
    layers: dict[str, set[int | None]] = defaultdict(set)
    for name in specs:
        _, layer, inside = place(name)
        layers[inside].add(layer)
    named = set(tuning.keys) & layers.keys()  # keys may be full paths too
    covered = set().union(*(layers[inside] for inside in named))
    count = fields.get("num_hidden_layers")
    # The last of the layers, as mlx-lm counts them: with the first among them, they are all.
    all_covered = tuning.num_layers in (0, count) or 0 in covered
    short = {
        inside
        for inside, found in layers.items()
        if (all_covered and inside in named)
        or (len(found) == count and found == set(range(len(found))))
    }
    return sorted({inside if (inside := place(name)[2]) in short else name for name in specs})
