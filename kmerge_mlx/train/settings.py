"""The settings of ``kmerge-mlx train``: name, default, range, flag and help of each.

Source: names and defaults are those of ``mlx_lm.lora`` (a test compares them); what belongs to the
method (K, LoRA, optimizer, learning rate) is the paper's, arXiv 2604.15153 section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kmerge_mlx.adapters.schema import FULL, LORA, MEAN, STARTS
from kmerge_mlx.config import DATA_SEED, is_number
from kmerge_mlx.data import TASKS
from kmerge_mlx.data.recall import RecallTask
from kmerge_mlx.data.textualized_tree import TreeTask
from kmerge_mlx.errors import short
from kmerge_mlx.prompts.keep import KINDS, NONE, kinds_of
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT, MERGES, Layout, is_date
from kmerge_mlx.settings import INTS, SIZE, Settings, option, option_of, parse_size

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
REPORTERS = ("wandb", "swanlab")
ANSWER, RECONSTRUCTION = "answer", "reconstruction"
BASE = "base"

MOST_TOKENS = 1024
"""Most tokens an encoder may read of a block or before it: its size grows with their square."""

LORA_PARAMETERS = {"rank": 4, "scale": 4.0, "dropout": 0.05, "keys": None}
"""The paper's r = 4, alpha = 16; no keys means every linear layer and the output head."""

ELSEWHERE = {
    "train": "training is what this command does: remove it",
    "mask_prompt": "the loss is always on answers alone: remove it",
    "test": "there is no test after training here: remove it",
    "test_batches": "there is no test after training here: remove it",
    "resume_adapter_file": "give an adapter folder as init_from, or `resume` to go on with a run",
    "config": "a config file cannot name another",
}

_MODEL = {"group": "Model and data"}
_PLACE = _MODEL | {"fixed": False}  # its content is compared, not its name
_FEATURE = {"group": "Model and data", "yaml_only": True}
_TASKS = {"group": "Tasks"}
_SHARE = _TASKS | {"low": 0, "high": 1}
_MERGE = {"group": "Merging"}
_LENGTH = _MERGE | {"low": 0, "high": MOST_TOKENS}
_K = _LENGTH | {"low": 1}
_TEACHER = {"group": "Self-distillation"}
_OUT = {"group": "Output", "fixed": False}


@dataclass(frozen=True)
class TrainSettings(Settings):
    """The settings of a run; the help of each says what it means."""

    NAME = "train"
    ELSEWHERE = ELSEWHERE

    model: str | None = option(None, str, "Base model: a folder or a hub repo id.", **_PLACE)
    data: str | None = option(
        None, str, "Folder with train.jsonl and valid.jsonl, or a hub dataset of them.", **_PLACE
    )
    task: str | None = option(
        None, str, "One of the paper's tasks, qa or recall.", choices=tuple(TASKS), **_MODEL
    )
    hf_dataset: Any = option(None, dict, "mlx-lm's hf_dataset entries.", many=True, **_FEATURE)
    prompt_feature: str = option("prompt", str, "Key of the prompt.", **_FEATURE)
    completion_feature: str = option("completion", str, "Key of its answer.", **_FEATURE)
    chat_feature: str = option("messages", str, "Key of a conversation.", **_FEATURE)
    text_feature: str = option("text", str, "Key of a text.", **_FEATURE)
    context_feature: str = option("context", str, "Key of what merges.", **_FEATURE)
    split_feature: str = option("split", str, "Key of a text's split point.", **_FEATURE)
    text_split: float | None = option(None, float, "Share of a text before its answer.", **_FEATURE)
    skip_bad: bool = option(False, bool, "Leave out bad or too long rows.", **_MODEL)
    ignore_chat_template: bool = option(
        False, bool, "Train on the bare text, without the tokenizer's chat template.", **_MODEL
    )
    merges: str = option(
        DEFAULT_LAYOUT.merges,
        str,
        "What merges without tags: documents (long texts beside a question), contexts (only what "
        "stands before the last paragraph), or all.",
        choices=MERGES,
        **_MODEL,
    )
    merge_threshold: int = option(
        DEFAULT_LAYOUT.threshold, int, "Fewest tokens of a text that merges.", low=1, **_MODEL
    )
    keep: Any = option(
        [],
        list,
        f"Exact strings that stay raw inside of what merges: {', '.join(KINDS)}.",
        choices=(*KINDS, NONE),
        **_MODEL,
    )
    template_date: str | None = option(
        None,
        str,
        "Date that the chat template writes as today's, such as 2026-11-28. Default: that of the "
        "run which is resumed, of the --teacher-file, or today.",
        **_PLACE,
    )
    trust_remote_code: bool = option(False, bool, "Let the base's own Python files run.", **_PLACE)

    stage: str = option("medium", str, "Trees: how large they grow.", **_TASKS)
    curriculum: Any = option([], list, "Trees: stages, such as small,xsmall.", **_TASKS)
    stage_threshold: float = option(0.85, float, "Trees: accuracy that ends a stage.", **_SHARE)
    last_threshold: float = option(0.95, float, "Trees: accuracy that ends the run.", **_SHARE)
    num_trees: int = option(
        500_000, int, "Trees: how many before they repeat.", low=1, high=10**9, **_TASKS
    )
    find_parent: int = option(0, int, "Trees: 1 also asks for a parent's name.", **_SHARE)
    reference_sampling: bool = option(False, bool, "Trees: ask every pair of nodes.", **_TASKS)
    data_seed: int = option(DATA_SEED, int, "Seed of the tasks' draws and splits.", **_TASKS)
    words: int = option(
        RecallTask.words, int, "Recall: words of a document, about.", low=20, high=20_000, **_TASKS
    )
    category: str | None = option(None, str, "Reviews: category of the hub dataset.", **_TASKS)
    language: str | None = option(None, str, "Commits: one language alone.", **_TASKS)
    file: str | None = option(
        None,
        str,
        "Reviews, commits, qa: a local .jsonl(.gz) to draw from; qa also SQuAD's .json.",
        fixed=False,
        **_TASKS,
    )

    k: Any = option(
        4,
        INTS,
        "Merge factor K; 1 trains without merging. Several (2,4,8) share one LoRA, and each has an "
        "encoder.",
        flags=("--k", "--merge-factor"),
        **_K,
    )
    encoder_factor: float | None = option(
        None,
        float,
        "Encoder width H = int(factor * K) * D, of a factor below 1 / K int(factor * K * D). "
        "Default: the paper's; past K = 4 D / 2.",
        low=0,
        **_MERGE,
    )
    encoder_context: int = option(0, int, "Tokens before a block to read too.", **_LENGTH)
    encoder_start: str = option(
        MEAN,
        str,
        "What it gives before training: the block's mean, or its tokens weighed by their rarity.",
        choices=STARTS,
        **_MERGE,
    )
    encoder_learning_rate: float | None = option(
        None, float, "Its peak learning rate. Default: as the rest.", low=0, **_MERGE
    )
    encoder_warmup: int = option(0, int, "Iterations of the encoder alone.", low=0, **_MERGE)
    encoder_warmup_loss: str = option(
        ANSWER, str, "What it is trained for then.", choices=(ANSWER, RECONSTRUCTION), **_MERGE
    )
    init_from: str | None = option(
        None,
        str,
        "Adapter to start from: a folder or a hub repo. One for another K gives its LoRA alone.",
        fixed=False,
        **_MERGE,
    )

    fine_tune_type: str = option(
        LORA, str, "LoRA, or the layers' own weights.", choices=(LORA, FULL)
    )
    num_layers: int = option(-1, int, "Layers to train, counted from the last; -1 for all.", low=-1)
    lora_parameters: Any = option(
        LORA_PARAMETERS, dict, "rank, scale, dropout and keys.", yaml_only=True
    )
    optimizer: str = option("adamw", str, "Optimizer.", choices=OPTIMIZERS)
    optimizer_config: Any = option({}, dict, "Arguments by optimizer.", yaml_only=True)
    learning_rate: float = option(1e-4, float, "Learning rate.", low=0)
    lr_schedule: Any = option(None, dict, "mlx-lm's learning-rate schedule.", yaml_only=True)
    max_grad_norm: float = option(1.0, float, "Gradient norm to clip at; 0 is off.", low=0)
    batch_size: int = option(4, int, "Rows a batch, over all machines.", low=1)
    iters: int = option(1000, int, "Iterations (batches) to train for.", low=1, fixed=False)
    grad_accumulation_steps: int = option(1, int, "Batches added up for an update.", low=1)
    grad_checkpoint: bool = option(False, bool, "Recompute activations: saves memory.")
    max_seq_length: int = option(2048, int, "Most positions of a row.", low=2)
    val_batches: int = option(25, int, "Validation batches; -1 for the whole set.", low=-1)
    steps_per_report: int = option(10, int, "Iterations between two reports of the loss.", low=1)
    steps_per_eval: int = option(200, int, "Iterations between two validations.", low=1)
    save_every: int = option(100, int, "Iterations between two saves.", low=1)
    early_stop: int = option(
        0, int, "Validations without a better loss that end the run; 0 is off.", low=0
    )
    clear_cache_threshold: Any = option(
        0, SIZE, "Bytes of allocator cache from which it is cleared, such as 4GB.", fixed=False
    )
    seed: int = option(0, int, "Seed of weights, shuffles and dropout.", low=0)

    teacher: str | None = option(
        None, str, "Learn the uncompressed base's distributions.", choices=(BASE,), **_TEACHER
    )
    teacher_top_k: int = option(0, int, "Teacher tokens to keep; 0 keeps all.", low=0, **_TEACHER)
    teacher_file: str | None = option(
        None, str, "File of the teacher's top tokens; made if missing.", fixed=False, **_TEACHER
    )
    teacher_answers: bool = option(
        False, bool, "Let the base model write the answers of rows that have none.", **_TEACHER
    )
    teacher_max_tokens: int = option(256, int, "Most tokens of such an answer.", low=1, **_TEACHER)

    adapter_path: str = option("adapters", str, "Folder to write the adapter to.", **_OUT)
    resume: bool = option(False, bool, "Go on from the last save in --adapter-path.", **_OUT)
    force: bool = option(False, bool, "Replace an adapter that is there.", **_OUT)
    plot: str | None = option(None, str, "Picture to draw (.png, .svg, .pdf).", **_OUT)
    report_to: str | None = option(None, str, "Also report to wandb, swanlab or both.", **_OUT)
    project_name: str | None = option(None, str, "Project name for --report-to.", **_OUT)

    def clashes(self) -> list[str]:
        sources = [n for n in ("data", "task", "hf_dataset") if getattr(self, n)]
        trees, k1, lora = self.task == TreeTask.name, self.ks[0] == 1, self.lora()
        keys, dropout = lora["keys"], lora["dropout"]
        own = [f for f in fields(self) if f.name.startswith("encoder_")]
        encoders = [f"`{f.name}`" for f in own if getattr(self, f.name) != f.default]
        reporters = [name.strip() for name in (self.report_to or "").lower().split(",")]
        rules = {
            f"found `{'` and `'.join(sources)}`, expected one of them": len(sources) > 1,
            "`curriculum` is for `task` textualized-tree": bool(self.curriculum) and not trees,
            f"`k` = 1 has no encoder: leave {' and '.join(encoders)} out": (
                self.ks == (1,) and bool(encoders)
            ),
            "`teacher_top_k`, `teacher_file` and `teacher_answers` need `teacher`": (
                self.teacher is None
                and bool(self.teacher_top_k or self.teacher_file or self.teacher_answers)
            ),
            "`teacher_file` needs `teacher_top_k`: whole distributions are too large to store": (
                bool(self.teacher_file) and not self.teacher_top_k
            ),
            "`teacher_file` and `teacher_answers` need `data`: a task's trees are always fresh": (
                trees and bool(self.teacher_file or self.teacher_answers)
            ),
            "`k` = 1 has no encoder, and lora_parameters.keys is empty: nothing is left to train": (
                k1 and self.fine_tune_type == LORA and keys in ([], ())
            ),
            "`resume` and `force` exclude each other": self.resume and self.force,
            f"lora_parameters.keys is {short(keys)}, expected a list of module names": (
                keys is not None
                and not (isinstance(keys, list | tuple) and {type(key) for key in keys} <= {str})
            ),
            f"lora_parameters.dropout is {short(dropout)}, expected a number from 0 up to 1": (
                not is_number(dropout) or not 0 <= dropout < 1
            ),
            f"`template_date` is {short(self.template_date)}, expected a date such as 2026-11-28": (
                self.template_date is not None and not is_date(self.template_date)
            ),
            "`num_layers` is 0, expected a number of layers, or -1 for all": self.num_layers == 0,
            f"`report_to` is {short(self.report_to)}, expected {', '.join(REPORTERS)} or both": (
                self.report_to is not None and not set(reporters) <= set(REPORTERS)
            ),
        }
        return [text for text, broken in rules.items() if broken]

    @property
    def ks(self) -> tuple[int, ...]:
        """The merge factors, ascending: one, or several that are trained together."""
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    def saved(self) -> dict[str, Any]:
        """The settings a resumed run begins from: all but where it writes and reports."""
        ours = [f for f in fields(self) if option_of(f).group != _OUT["group"]]
        return {f.name: getattr(self, f.name) for f in ours}

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run, and every machine, must have the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if option_of(f).fixed}

    @property
    def cache_limit(self) -> int:
        """Bytes of allocator cache from which it is cleared."""
        size = self.clear_cache_threshold
        return size if isinstance(size, int) else parse_size(size)

    def layout(self) -> Layout:
        """What merges without tags, and whether a chat template applies."""
        templated = not self.ignore_chat_template
        date, keep = self.template_date, kinds_of(self.keep)
        return Layout(self.merges, self.merge_threshold, templated, date, keep)

    def lora(self) -> dict[str, Any]:
        """LoRA's rank, scale, dropout and keys; those not given are the paper's."""
        return {**LORA_PARAMETERS, **self.lora_parameters}
