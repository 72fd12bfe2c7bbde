"""From settings to everything that a run needs: model, adapter, data, teacher and saved state.

Source: arXiv 2604.15153 section 4 (LoRA on every linear layer and the output head).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import maybe_set_recommended_wired_limit

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters import schema
from kmerge_mlx.adapters.folder import (
    Adapter,
    check_plain_encoder,
    find_adapters,
    load_adapter,
)
from kmerge_mlx.adapters.schema import FULL, FullConfig, LoRAConfig, MergeConfig, Tuning
from kmerge_mlx.data.tasks import Bar, silent
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import AdapterError, TrainError, findings, short
from kmerge_mlx.files import machine_memory
from kmerge_mlx.model import attach, check_fit, fresh_lora, load_source, padding_of, wire
from kmerge_mlx.prompts.chat_template import now
from kmerge_mlx.source import Source
from kmerge_mlx.train import checkpoint
from kmerge_mlx.train import teacher as teaching
from kmerge_mlx.train.checkpoint import State
from kmerge_mlx.train.dataset import Stage, load_stages
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rarity import fit_rarity
from kmerge_mlx.train.settings import LORA_PARAMETERS, TrainSettings
from kmerge_mlx.train.teacher import Answers, StoredTeacher, Teacher


@dataclass
class Run:
    """A run, ready to be trained or to go on."""

    settings: TrainSettings
    path: Path
    model: nn.Module  # the base with the adapter on it
    tokenizer: Any
    merge: MergeConfig
    tuning: Tuning
    stages: list[Stage]  # at least one
    base: tuple[str, str]  # base.digests
    data: list[str]  # digest of each stage
    ranks: Ranks
    teacher: Teacher | StoredTeacher | None
    state: State = field(default_factory=State)
    tensors: dict[str, mx.array] = field(default_factory=dict)  # the saved optimizer and so on
    answers: Answers | None = None  # those that the teacher wrote


def prepare(
    settings: TrainSettings, bar: Bar = lambda label: silent, ranks: Ranks | None = None
) -> Run:
    """Loads and checks everything, so that only the disk and the arithmetic can fail later.

    The first of the ranks alone reads and writes the run's folder.
    """
    ranks, path = ranks or Ranks(), Path(settings.adapter_path)
    resumed = ranks.rank == 0 and checkpoint.find_run(path, settings.resume, settings.force)
    if settings.model is None:
        nothing = f" ({path} holds no run to resume)" if settings.resume else ""
        raise TrainError(f"found no base model: give `model`{nothing}")
    if settings.batch_size % ranks.size:
        raise TrainError(
            f"`batch_size` {settings.batch_size} is not divisible by {ranks.size} machines"
        )
    source, adapter = _source(settings, resumed)
    maybe_set_recommended_wired_limit()
    if mx.default_device() == mx.Device(mx.cpu):
        # The C library hands memory out as fast as MLX's cache, and gives it back: 20% less in use.
        mx.set_cache_limit(0)
    mx.random.seed(settings.seed)
    bare = replace(source, adapter_path=None, adapter=None, merge=None)
    model, tokenizer, config = load_source(bare)
    fresh = adapter is None or (not resumed and adapter.merge.merge_factor != settings.k)
    encoder = _encoder(settings, model) if fresh else adapter.merge.encoder
    _check_memory(settings, encoder, model)
    if settings.template_date is None and not settings.ignore_chat_template:
        date = teaching.stored_date(settings.teacher_file) or now(tokenizer)
        settings = replace(settings, template_date=ranks.share_json(date))
    stages = load_stages(settings, tokenizer, bar)
    data, weights = [stage.digest for stage in stages], base.digests(source.path)
    ranks.same(settings.fixed() | {"model": weights[0], "data": data}, "the settings")
    teacher = None
    if settings.teacher is not None:
        teacher = Teacher(_frozen_copy(bare, model), settings.teacher_top_k)
    if fresh and adapter is not None:
        adapter = _with_encoder(adapter, encoder)
    merge, tuning = _adapt(settings, model, tokenizer, config, encoder, adapter, resumed)
    if fresh and encoder is not None and encoder.start != schema.MEAN:
        fit_rarity(model, stages[0])
    made = (settings, path, model, tokenizer, merge, tuning)
    run = Run(*made, stages, weights, data, ranks, teacher)
    if resumed:
        saved, run.state, run.tensors = checkpoint.read_state(path)
        checkpoint.check_same(run, saved)
        if run.state.stage >= len(stages) or run.state.added >= settings.grad_accumulation_steps:
            raise TrainError(f"{path} cannot be resumed: its state is not of a run like this")
    if settings.teacher_answers:
        _answer(run, bar)
    if settings.teacher_file:
        _use_file(run, bar, resumed)
    return run


def _source(settings: TrainSettings, resumed: bool) -> tuple[Source, Adapter | None]:
    """The base, and the adapter that a run goes on with, or begins from, or None."""
    start = settings.adapter_path if resumed else settings.init_from
    trust = settings.trust_remote_code
    if start is None:  # not Source.find: the adapter that a model carries is not trained on
        path = base.resolve(settings.model)
        return Source(settings.model, path, trust_remote_code=trust), None
    try:
        # A run begins from an adapter for its own K, or else from the only one there is.
        k = settings.k if not resumed and settings.k in find_adapters(start) else None
        source = Source.find(settings.model, start, k, trust)
        adapter = load_adapter(source.adapter)
        check_plain_encoder(adapter.merge, "trained")
    except AdapterError as error:
        raise TrainError(f"`{'resume' if resumed else 'init_from'}`: {error}") from error
    return source, adapter


def _encoder(settings: TrainSettings, model: nn.Module) -> schema.EncoderConfig | None:
    """A fresh encoder's sizes; None for K = 1."""
    if settings.k == 1:
        return None
    _, table = base.find_embedding(model, settings.model)
    d = table(mx.array([0])).shape[-1]
    h = schema.inner_size(settings.k, d, settings.encoder_factor)
    context, start = settings.encoder_context, settings.encoder_start
    return schema.EncoderConfig(settings.k, d, h, context, start=start)


def _check_memory(
    settings: TrainSettings, encoder: schema.EncoderConfig | None, model: nn.Module
) -> None:
    """Refuses an encoder that this machine's memory could never train: its size grows with K^2."""
    if encoder is None:
        return
    # Weights and gradients, and Adam's two moments; all in float32.
    arrays = 4 if settings.optimizer in ("adam", "adamw") else 2
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    needed, memory = weights + 4 * arrays * encoder.num_parameters, machine_memory()
    if needed > memory:
        raise TrainError(
            f"the encoder of `k` = {encoder.merge_factor} has {encoder.num_parameters / 1e9:,.2f} "
            f"billion parameters, and training it takes over {needed / 1e9:,.0f} GB of this "
            f"machine's {memory / 1e9:,.0f} GB: choose a smaller `k`, or an `encoder_factor` below "
            f"{encoder.inner_size / encoder.hidden_size / encoder.merge_factor:.2g}"
        )


def _with_encoder(adapter: Adapter, encoder: schema.EncoderConfig | None) -> Adapter:
    """What an adapter for another K has learnt of the base, beside a fresh encoder."""
    weights = {} if encoder is None else dict(tree_flatten(MergeEncoder(encoder).parameters()))
    return replace(adapter, merge=replace(adapter.merge, encoder=encoder), encoder_weights=weights)


def _adapt(
    settings: TrainSettings,
    model: nn.Module,
    tokenizer: Any,
    config: dict[str, Any],
    encoder: schema.EncoderConfig | None,
    adapter: Adapter | None,
    resumed: bool,
) -> tuple[MergeConfig, Tuning]:
    """Puts the given adapter on the model, or a fresh one, and says what it is."""
    if adapter is None:
        made_for = schema.BaseModelConfig(settings.model, base.fingerprint(config))
        try:
            tuning, head = _tuning(settings, model)
            merge = MergeConfig(encoder, made_for, base.default_pad_token_id(tokenizer), head)
            wire(model, merge, tuning, merge.pad_token_id, settings.model)
        except AdapterError as error:
            raise TrainError(f"lora_parameters: {error}") from error
    else:
        check_fit(adapter, config, settings.model)
        attach(model, adapter, padding_of(adapter, tokenizer))
        merge, tuning = adapter.merge, adapter.tuning
        if resumed:
            return merge, tuning
        _check_adopted(settings, adapter)
    return _signed(settings, merge, tokenizer), tuning


def _check_adopted(settings: TrainSettings, adapter: Adapter) -> None:
    """Refuses settings that ask for another adapter than the given one."""
    encoder, tuning = adapter.merge.encoder, adapter.tuning
    pairs = {
        "`encoder_context`": (settings.encoder_context, encoder.context if encoder else 0),
        "`encoder_start`": (settings.encoder_start, encoder.start if encoder else schema.MEAN),
        "`fine_tune_type`": (settings.fine_tune_type, tuning.to_json()["fine_tune_type"]),
    }
    if encoder is not None and settings.encoder_factor is not None:
        inner = schema.inner_size(settings.k, encoder.hidden_size, settings.encoder_factor)
        pairs["the width of `encoder_factor`"] = (inner, encoder.inner_size)
    if settings.num_layers != -1:
        pairs["`num_layers`"] = (settings.num_layers, tuning.num_layers)
    if isinstance(tuning, LoRAConfig) and settings.lora_parameters != LORA_PARAMETERS:
        has = asdict(tuning.uniform) if tuning.uniform else {}
        has |= {"keys": [*tuning.keys], "dropout": tuning.dropout}
        given = {n: v for n, v in settings.lora_parameters.items() if v is not None}
        pairs |= {f"lora_parameters.{n}": (value, has.get(n)) for n, value in given.items()}
    wrong = [f"{n} is {a}, the adapter has {b}" for n, (a, b) in pairs.items() if a != b]
    if wrong:
        raise TrainError(findings(f"`init_from` {settings.init_from}", wrong))


def _signed(settings: TrainSettings, merge: MergeConfig, tokenizer: Any) -> MergeConfig:
    """What an adapter says of itself, with the layout and the settings of this run."""
    templated = bool(tokenizer.has_chat_template) and not settings.ignore_chat_template
    layout = replace(settings.layout(), chat_template=templated, date=None)
    provenance = {
        "trained_by": f"kmerge-mlx {__version__}",
        "data": settings.task or settings.data or "hf_dataset",
        "optimizer": settings.optimizer,
        "learning_rate": settings.lr_schedule or settings.learning_rate,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    return replace(merge, layout=layout, provenance=provenance)


def _tuning(settings: TrainSettings, model: nn.Module) -> tuple[Tuning, schema.LoRASpec | None]:
    """What of the base is trained, and the LoRA of a tied head, for which mlx-lm has no place."""
    layers = len(model.layers)
    if settings.num_layers > layers:
        raise TrainError(f"`num_layers` is {settings.num_layers}, the model has {layers} layers")
    count = layers if settings.num_layers < 0 else settings.num_layers
    if settings.fine_tune_type == FULL:
        return FullConfig(count), None
    parameters = settings.lora()
    if unknown := sorted(map(str, set(parameters) - set(LORA_PARAMETERS))):
        hint = ": mlx-lm's scale is alpha / rank" if "alpha" in unknown else ""
        known = ", ".join(LORA_PARAMETERS)
        raise TrainError(f"lora_parameters: unknown {short(unknown[0])}{hint}, expected {known}")
    spec = schema.LoRASpec(parameters["rank"], parameters["scale"])
    return fresh_lora(model, spec, count, parameters["dropout"], parameters["keys"])


def _frozen_copy(source: Source, model: nn.Module) -> nn.Module:
    """The base once more, on the same arrays, its embedding wrapped without merging."""
    copy, _, _ = load_source(source, lazy=True)
    copy.update(model.parameters())
    wire(copy, MergeConfig(None), LoRAConfig(0), 0, source.model)
    copy.freeze()
    return copy


def _answer(run: Run, bar: Bar) -> None:
    """Lets the teacher write the missing answers, or takes those of the saved run."""
    sets, most, answers = run.stages[0].sets, run.settings.teacher_max_tokens, None
    if run.state.rng:
        answers = teaching.read_answers(run.path, run.teacher, sets, most)
    elif run.ranks.rank == 0:
        answers = teaching.write_answers(run.teacher, run.tokenizer, sets, most, bar("Answering"))
    run.answers = run.ranks.share_json(answers)
    for split, found in run.answers.items():
        for index, ids in found.items():
            sets[split].set_answer(int(index), ids)


def _use_file(run: Run, bar: Bar, resumed: bool) -> None:
    """Puts the teacher's file in the place of the teacher; a run that begins makes it if needed."""
    settings, sets, path = run.settings, run.stages[0].sets, Path(run.settings.teacher_file)
    # The digests of the sets are taken anew: written answers are part of them by now.
    rest = [f"{split} {data.digest}" for split, data in sets.items()]
    rest += [str(settings.teacher_top_k), str(settings.teacher_answers)]
    rest += [str(settings.teacher_max_tokens)]
    known = [hashlib.sha256(" ".join([of, *rest]).encode()).hexdigest() for of in run.base]
    # A saved run may come from a stranger, and its settings must not name a file to write.
    if run.ranks.rank == 0 and not path.exists() and not resumed:
        progress = bar("Asking the teacher")
        date = {"date": settings.template_date} if settings.template_date else {}
        about = {"digest": known[0]} | date
        teaching.store(path, about, run.teacher, sets, settings.batch_size, progress)
    run.ranks.any(False)  # the others wait for the file
    run.teacher = StoredTeacher(path, known, run.teacher, sets)
