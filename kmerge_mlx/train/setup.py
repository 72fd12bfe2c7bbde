"""From a config to everything a run needs: model, adapter, data, teacher, and where it stands.

Owns the order in which they are made, and the choice between a fresh adapter, a given one and a
saved run. Does not train.

Source: arXiv 2604.15153 section 4 (LoRA on every linear layer and the output head).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.utils import maybe_set_recommended_wired_limit

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters import lora
from kmerge_mlx.adapters.folder import HEAD, Adapter, check_not_quantized, load_adapter
from kmerge_mlx.adapters.schema import (
    BaseModelConfig,
    EncoderConfig,
    LoRASpec,
    MergeConfig,
    inner_size,
)
from kmerge_mlx.adapters.tuning import FULL, FullConfig, LoRAConfig, Tuning
from kmerge_mlx.errors import AdapterError, TrainError, findings, short
from kmerge_mlx.model import attach, check_fit, load, output_head, padding_of, wire
from kmerge_mlx.train.checkpoint import Identity, State, check_run_destination, read_state
from kmerge_mlx.train.distill import Teacher
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.settings import LORA_PARAMETERS, TrainSettings
from kmerge_mlx.train.stages import Bar, Stage, load_stages


@dataclass
class Run:
    """A run, ready to be trained or to go on.

    Args:
        config: Its settings.
        path: Its folder.
        model: The base with the adapter on it.
        tokenizer: The base's.
        merge: What ``merge_config.json`` will say.
        tuning: What ``adapter_config.json`` will say.
        stages: Its data, at least one stage.
        identity: What a resumed run must have in common with it.
        state: Where it stands.
        tensors: The saved optimizer and so on; empty for a run that begins.
        teacher: Where there is one.
    """

    config: TrainSettings
    path: Path
    model: nn.Module
    tokenizer: Any
    merge: MergeConfig
    tuning: Tuning
    stages: list[Stage]
    identity: Identity
    state: State
    tensors: dict[str, mx.array]
    teacher: Teacher | None = None


def prepare(config: TrainSettings, bar: Bar, ranks: Ranks) -> Run:
    """Loads and checks everything, so that nothing but the disk and the arithmetic can fail later.

    Args:
        config: The run's settings.
        bar: Shows how far the data are.
        ranks: The machines; the first alone reads and writes the run's folder.

    Raises:
        KMergeError: Anything that keeps the run from starting.
    """
    path = Path(config.adapter_path)
    first = ranks.rank == 0
    resumed = first and check_run_destination(path, config.resume, config.force)
    if config.model is None:
        nothing = f" ({path} holds no run to resume)" if config.resume else ""
        raise TrainError(f"no model: give --model{nothing}")
    if config.batch_size % ranks.size:
        raise TrainError(
            f"--batch-size {config.batch_size} is not divisible by {ranks.size} machines"
        )
    adapter = _given(config, resumed)
    maybe_set_recommended_wired_limit()
    if mx.default_device() == mx.Device(mx.cpu):
        # The C library hands memory out as fast as MLX's cache, and gives it back: 20% less in use.
        mx.set_cache_limit(0)
    mx.random.seed(config.seed)
    folder = base.resolve(config.model)
    model, tokenizer = load(str(folder), trust_remote_code=config.trust_remote_code)
    base_config = base.read_config(folder)
    stages = load_stages(config, tokenizer, bar)
    teacher = None
    if config.teacher is not None:
        teacher = Teacher(_frozen_copy(config, folder, model), config.teacher_top_k)
    if adapter is not None:
        if resumed:
            _check_base(config, adapter, base_config)
            merge, tuning = adapter.merge, adapter.tuning
        else:
            check_fit(adapter, base_config, config.model)
            merge, tuning = _adopt(config, adapter, tokenizer)
        attach(model, adapter, padding_of(adapter, tokenizer))
    else:
        merge, tuning = _fresh(config, model, tokenizer, base_config)
        try:
            wire(model, merge, tuning, merge.pad_token_id, config.model)
        except AdapterError as error:
            raise TrainError(f"lora_parameters: {error}") from error
    if config.grad_checkpoint:
        _checkpoint_layers(model)
    digests = [stage.digest for stage in stages]
    weights = base.weights_digest(folder)
    identity = Identity(config.settings(), config.fixed(), weights, digests, ranks.size)
    ranks.same({**config.fixed(), "--model": weights, "the data": digests}, "the settings")
    state, tensors = State(), {}
    if resumed:
        saved, state, tensors = read_state(path)
        identity.check(saved, path)
    return Run(
        *(config, path, model, tokenizer, merge, tuning, stages, identity, state, tensors, teacher)
    )


def _given(config: TrainSettings, resumed: bool) -> Adapter | None:
    """The adapter that a run goes on with, or begins from, or None."""
    source = config.adapter_path if resumed else config.init_from
    try:
        adapter = None if source is None else load_adapter(source, None if resumed else config.k)
        if adapter is not None:
            check_not_quantized(adapter.merge, "trained")
        return adapter
    except AdapterError as error:
        flag = "--resume" if resumed else "--init-from"
        raise TrainError(f"{flag}: {error}") from error


def _check_base(config: TrainSettings, adapter: Adapter, base_config: dict[str, Any]) -> None:
    """Refuses another base for a resumed run, in one line: it is the flag that is wrong."""
    try:
        check_fit(adapter, base_config, config.model)
    except AdapterError as error:
        raise TrainError(
            f"{config.adapter_path} cannot be resumed: --model {config.model} is not the base of "
            f"the run, which was made on {adapter.merge.base.id}"
        ) from error


def _fresh(
    config: TrainSettings, model: nn.Module, tokenizer: Any, base_config: dict[str, Any]
) -> tuple[MergeConfig, Tuning]:
    """What a new adapter is to be."""
    _, table = base.find_embedding(model, config.model)
    d, encoder = table(mx.array([0])).shape[-1], None
    if config.k > 1:
        h = inner_size(config.k, d, config.encoder_factor)
        encoder = EncoderConfig(config.k, d, h, config.encoder_context)
    tuning, head = _tuning(config, model)
    merge = MergeConfig(
        encoder,
        BaseModelConfig(config.model, base.fingerprint(base_config)),
        base.default_pad_token_id(tokenizer),
        head,
    )
    return _signed(config, merge, tokenizer), tuning


def _adopt(config: TrainSettings, adapter: Adapter, tokenizer: Any) -> tuple[MergeConfig, Tuning]:
    """What a given adapter stays when it is trained on; settings that say otherwise are refused."""
    encoder, tuning = adapter.merge.encoder, adapter.tuning
    kind = tuning.to_json()["fine_tune_type"]
    wrong = {}
    if (context := 0 if encoder is None else encoder.context) != config.encoder_context:
        wrong["--encoder-context"] = (config.encoder_context, context)
    if kind != config.fine_tune_type:
        wrong["--fine-tune-type"] = (config.fine_tune_type, kind)
    if encoder is not None and config.encoder_factor is not None:
        inner = inner_size(config.k, encoder.hidden_size, config.encoder_factor)
        if inner != encoder.inner_size:
            wrong["the width of --encoder-factor"] = (inner, encoder.inner_size)
    if config.num_layers not in (-1, tuning.num_layers):
        wrong["--num-layers"] = (config.num_layers, tuning.num_layers)
    if isinstance(tuning, LoRAConfig) and config.lora_parameters != LORA_PARAMETERS:
        has = asdict(tuning.uniform) if tuning.uniform else {}
        has |= {"keys": [*tuning.keys], "dropout": tuning.dropout}
        for name, value in config.lora_parameters.items():
            if value is not None and value != has.get(name):
                wrong[f"lora_parameters.{name}"] = (value, has.get(name))
    if wrong:
        lines = [
            f"{name} is {given}, the adapter has {its}" for name, (given, its) in wrong.items()
        ]
        raise TrainError(findings(f"--init-from {config.init_from}", lines))
    return _signed(config, adapter.merge, tokenizer), tuning


def _signed(config: TrainSettings, merge: MergeConfig, tokenizer: Any) -> MergeConfig:
    templated = bool(tokenizer.has_chat_template) and not config.ignore_chat_template
    layout = replace(config.layout(), chat_template=templated)
    provenance = {
        "trained_by": f"kmerge-mlx {__version__}",
        "data": config.task or config.data or "hf_dataset",
        "optimizer": config.optimizer,
        "learning_rate": config.lr_schedule or config.learning_rate,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }
    return replace(merge, layout=layout, provenance=provenance)


def _tuning(config: TrainSettings, model: nn.Module) -> tuple[Tuning, LoRASpec | None]:
    """What of the base is trained, and the LoRA of a tied head, which mlx-lm has no place for."""
    layers = len(model.layers)
    if config.num_layers > layers:
        raise TrainError(f"--num-layers is {config.num_layers}, the model has {layers} layers")
    count = layers if config.num_layers < 0 else config.num_layers
    if config.fine_tune_type == FULL:
        return FullConfig(count), None
    parameters = config.lora()
    if unknown := sorted(map(str, set(parameters) - set(LORA_PARAMETERS))):
        hint = ": mlx-lm's scale is alpha / rank" if "alpha" in unknown else ""
        known = ", ".join(LORA_PARAMETERS)
        raise TrainError(f"lora_parameters: unknown {short(unknown[0])}{hint}, expected {known}")
    keys = parameters["keys"]
    keys = [*lora.default_keys(model, count), HEAD] if keys is None else list(keys)
    try:
        spec = LoRASpec(parameters["rank"], parameters["scale"])
    except AdapterError as error:
        raise TrainError(f"lora_parameters: {error}") from None
    head = output_head(model)
    tied_head = HEAD in keys and head is None
    if HEAD in keys:
        keys = [key for key in keys if key != HEAD] + ([] if head is None else [head[0]])
    return LoRAConfig(count, parameters["dropout"], spec, tuple(keys)), spec if tied_head else None


def _frozen_copy(config: TrainSettings, folder: Path, model: nn.Module) -> nn.Module:
    """The base once more, on the same arrays, its embedding wrapped without merging."""
    copy, _ = load(str(folder), lazy=True, trust_remote_code=config.trust_remote_code)
    copy.update(model.parameters())
    wire(copy, MergeConfig(None), LoRAConfig(0), 0, config.model)
    copy.freeze()
    return copy


def _checkpoint_layers(model: nn.Module) -> None:
    """Recomputes each layer's activations in the backward pass, as mlx-lm does.

    mlx-lm changes the layers' class for the whole process; classes of this model's own keep that
    to this model.
    """
    own: dict[type, type] = {}
    for layer in model.layers:
        kind = type(layer)
        layer.__class__ = own.setdefault(kind, type(kind.__name__, (kind,), {}))
    for kind in own.values():
        grad_checkpoint(next(layer for layer in model.layers if type(layer) is kind))
