"""From settings to everything that a run needs: model, adapter, data, teacher and saved state.

Source: arXiv 2604.15153 section 4 (LoRA on every linear layer and the output head).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
    read_adapter,
    share_tuning,
)
from kmerge_mlx.adapters.schema import FULL, FullConfig, LoRAConfig, MergeConfig, Tuning
from kmerge_mlx.data.tasks import Bar, silent
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import AdapterError, TrainError, findings, short
from kmerge_mlx.files import machine_memory
from kmerge_mlx.model import (
    attach,
    check_fit,
    fresh_lora,
    load_source,
    merged_embedding,
    padding_of,
    wire,
)
from kmerge_mlx.multi_encoder import MultiEncoder
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

Encoders = Mapping[int, schema.EncoderConfig | None]
Given = Mapping[int, Adapter]
"""Both by K."""


@dataclass
class Run:
    """A run, ready to be trained or to go on."""

    settings: TrainSettings
    path: Path
    model: nn.Module  # the base with the adapter on it
    tokenizer: Any
    merges: dict[int, MergeConfig]  # by K, ascending; they differ in their encoders alone
    tuning: Tuning
    stages: list[Stage]  # at least one
    base: tuple[str, str]  # base.digests
    data: list[str]  # digest of each stage
    ranks: Ranks
    teacher: Teacher | StoredTeacher | None
    state: State = field(default_factory=State)
    tensors: dict[str, mx.array] = field(default_factory=dict)  # the saved optimizer and so on
    answers: Answers | None = None  # those that the teacher wrote

    @property
    def merge(self) -> MergeConfig:
        """That of the smallest K."""
        return next(iter(self.merges.values()))


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
    source, given = _source(settings, resumed)
    maybe_set_recommended_wired_limit()
    if mx.default_device() == mx.Device(mx.cpu):
        # The C library hands memory out as fast as MLX's cache, and gives it back: 20% less in use.
        mx.set_cache_limit(0)
    mx.random.seed(settings.seed)
    bare = replace(source, adapter_path=None, adapter=None, merge=None)
    model, tokenizer, config = load_source(bare)
    encoders = {
        k: given[k].merge.encoder if k in given else _encoder(settings, model, k)
        for k in settings.ks
    }
    _check_memory(settings, encoders, model)
    if settings.template_date is None and not settings.ignore_chat_template:
        date = teaching.stored_date(settings.teacher_file) or now(tokenizer)
        settings = replace(settings, template_date=ranks.share_json(date))
    stages = load_stages(settings, tokenizer, bar)
    data, weights = [stage.digest for stage in stages], base.digests(source.path)
    ranks.same(settings.fixed() | {"model": weights[0], "data": data}, "the settings")
    teacher = None
    if settings.teacher is not None:
        teacher = Teacher(_frozen_copy(bare, model), settings.teacher_top_k)
    merges, tuning = _adapt(settings, model, tokenizer, config, encoders, given, resumed)
    encoder = merged_embedding(model).encoder
    if settings.encoder_start != schema.MEAN and (
        fresh := [k for k in settings.ks if k not in given]
    ):
        several = isinstance(encoder, MultiEncoder)
        own = [encoder.of(k) for k in fresh if k > 1] if several else [encoder]
        fit_rarity(model, stages[0], own)
    made = (settings, path, model, tokenizer, merges, tuning)
    run = Run(*made, stages, weights, data, ranks, teacher)
    if resumed:
        saved, run.state, run.tensors = checkpoint.read_state(path)
        checkpoint.check_same(run, saved)
        checkpoint.check_whole(run)
        most = min(settings.grad_accumulation_steps - 1, run.state.iteration)
        if run.state.stage >= len(stages) or run.state.added > most:
            raise TrainError(f"{path} cannot be resumed: its state is not of a run like this")
    if settings.teacher_answers:
        _answer(run, bar)
    if settings.teacher_file:
        _use_file(run, bar, resumed)
    return run


def _source(settings: TrainSettings, resumed: bool) -> tuple[Source, dict[int, Adapter]]:
    """The base, and the adapters by K that a run goes on with, or begins from, if any."""
    start = settings.adapter_path if resumed else settings.init_from
    trust = settings.trust_remote_code
    if start is None:  # not Source.find: the adapter that a model carries is not trained on
        path = base.resolve(settings.model)
        return Source(settings.model, path, trust_remote_code=trust), {}
    try:
        # A run begins from adapters for its own Ks, or else from the LoRA of those that there are.
        have = find_adapters(start)
        ks = [k for k in settings.ks if k in have] or [*have]
        sources = Source.find_all(settings.model, start, ks, trust)
        found = {source.k: read_adapter(source.adapter, source.merge) for source in sources}
        for adapter in found.values():
            check_plain_encoder(adapter.merge, "trained")
        if not share_tuning([*found.values()]):
            several = ", ".join(map(str, ks))
            raise AdapterError(
                f"the adapters for K = {several} in {start} do not change the base alike: give the "
                "folder of one"
            )
    except AdapterError as error:
        raise TrainError(f"`{'resume' if resumed else 'init_from'}`: {error}") from error
    return sources[0], found


def _encoder(settings: TrainSettings, model: nn.Module, k: int) -> schema.EncoderConfig | None:
    """A fresh encoder's sizes; None for K = 1."""
    if k == 1:
        return None
    _, table = base.find_embedding(model, settings.model)
    d = table(mx.array([0])).shape[-1]
    h = schema.inner_size(k, d, settings.encoder_factor)
    if not h:
        factor = settings.encoder_factor
        raise TrainError(f"`encoder_factor` is {factor}, expected at least {1 / k / d:.2g} (H = 1)")
    context, start = settings.encoder_context, settings.encoder_start
    return schema.EncoderConfig(k, d, h, context, start=start)


def _check_memory(settings: TrainSettings, encoders: Encoders, model: nn.Module) -> None:
    """Refuses an encoder that this machine's memory could never train: its size grows with K^2."""
    sizes = [encoder.num_parameters for encoder in encoders.values() if encoder is not None]
    if not sizes:
        return
    encoder = encoders[max(encoders)]  # the largest
    # Weights and gradients, and Adam's two moments; all in float32.
    arrays = 4 if settings.optimizer in ("adam", "adamw") else 2
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    needed, memory = weights + 4 * arrays * sum(sizes), machine_memory()
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


def _several(encoders: Encoders, given: Given) -> MultiEncoder | None:
    """The encoders of a run for several K, with the given weights; None where there is one K."""
    if len(encoders) == 1:
        return None
    contexts = {k: config.context for k, config in encoders.items() if config is not None}
    if len({*contexts.values()}) > 1:
        raise TrainError(f"the encoders read contexts of {contexts} tokens by K, expected one")
    return MultiEncoder.make(encoders, {k: given[k].encoder_weights for k in given})


def _adapt(
    settings: TrainSettings,
    model: nn.Module,
    tokenizer: Any,
    config: dict[str, Any],
    encoders: Encoders,
    given: Given,
    resumed: bool,
) -> tuple[dict[int, MergeConfig], Tuning]:
    """Puts the given adapters on the model, or fresh ones, and says what they are."""
    adapter = next(iter(given.values()), None)
    if adapter is not None:
        if len(encoders) == 1 and settings.k not in given:
            adapter = _with_encoder(adapter, encoders[settings.k])
        check_fit(adapter, config, settings.model)
        if not resumed:
            _check_adopted(settings, adapter, encoders)
    several = _several(encoders, given)
    encoder = next(iter(encoders.values())) if several is None else several.config
    if adapter is None:
        made_for = schema.BaseModelConfig(settings.model, base.fingerprint(config))
        try:
            tuning, head = _tuning(settings, model)
            merge = MergeConfig(encoder, made_for, base.default_pad_token_id(tokenizer), head)
            wire(model, merge, tuning, merge.pad_token_id, settings.model, encoder=several)
        except AdapterError as error:
            raise TrainError(f"lora_parameters: {error}") from error
    else:
        if several is not None:
            merge = replace(adapter.merge, encoder=encoder)
            adapter = replace(adapter, merge=merge, encoder_weights={})
        attach(model, adapter, padding_of(adapter, tokenizer), encoder=several)
        merge, tuning = adapter.merge, adapter.tuning
    if not resumed:
        merge = _signed(settings, merge, tokenizer)
    own = {k: replace(merge, encoder=config) for k, config in encoders.items()}
    return own | {k: given[k].merge for k in own.keys() & given.keys() if resumed}, tuning


def _check_adopted(settings: TrainSettings, adapter: Adapter, encoders: Encoders) -> None:
    """Refuses settings that ask for another adapter than the given one."""
    tuning = adapter.tuning
    pairs = {"`fine_tune_type`": (settings.fine_tune_type, tuning.to_json()["fine_tune_type"])}
    for k, encoder in encoders.items():
        of = f" for K = {k}" if len(encoders) > 1 else ""
        if encoder is None:
            continue
        pairs[f"`encoder_context`{of}"] = (settings.encoder_context, encoder.context)
        pairs[f"`encoder_start`{of}"] = (settings.encoder_start, encoder.start)
        if settings.encoder_factor is not None:
            inner = schema.inner_size(k, encoder.hidden_size, settings.encoder_factor)
            pairs[f"the width of `encoder_factor`{of}"] = (inner, encoder.inner_size)
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
    if len(settings.ks) > 1:
        provenance["k"] = [*settings.ks]  # the LoRA has learnt all of them
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
