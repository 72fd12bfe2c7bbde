"""Every option that more than one command takes, defined once: name, type and help."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.data.textualized_tree import STAGES
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.prompts.policy import MERGES


def one_of(*values: int) -> Callable[[int | None], int | None]:
    """A check of an option that takes one of a few numbers."""

    def check(value: int | None) -> int | None:
        if value is None or value in values:
            return value
        raise typer.BadParameter(f"{value} is none of {', '.join(map(str, values))}")

    return check


def chosen(model: str | None, adapter_path: str | None) -> tuple[str, str | None]:
    """The base model and the adapter that a command is to use.

    Args:
        model: The ``--model`` that was given, or None: the adapter's base, or the bundled model.
        adapter_path: The ``--adapter-path`` that was given, or None: the adapter that the model
            carries, if it carries one.

    Raises:
        ModelError: The adapter does not name its base, or the model cannot be found.
        AdapterError: The adapter cannot be read.
    """
    if adapter_path is None and model in (None, BUNDLED):
        return BUNDLED, BUNDLED
    from kmerge_mlx import base
    from kmerge_mlx.adapters import folder as adapter

    if adapter_path is None:
        carried = adapter.carried_by(base.resolve(model, weights=False))
        return model, carried and str(carried)
    if model is None and (model := adapter.base_of(adapter_path)) is None:
        raise ModelError(f"{adapter_path} does not name its base model: give --model")
    return model, adapter_path


def check_merges(model: str | None, adapter_path: str | None, context: str | None) -> None:
    """Refuses FILEs without a merge encoder to read them.

    Args:
        model: The ``--model`` that was given, or None.
        adapter_path: The ``--adapter-path`` that was given, or None.
        context: What the FILEs hold, or None without any.

    Raises:
        AdapterError: There are some, and nothing to merge them with.
    """
    if context and chosen(model, adapter_path)[1] is None:
        raise AdapterError(
            f"FILEs need a merge encoder, and {model} carries none: give --adapter-path"
        )


def check_kv(kv_bits: int | None, max_kv_size: int | None) -> None:
    """Refuses what mlx-lm cannot do: a quantized cache of limited size.

    Raises:
        typer.BadParameter: Both are given.
    """
    if kv_bits is not None and max_kv_size is not None:
        raise typer.BadParameter(
            "mlx-lm cannot quantize a --max-kv-size cache", param_hint="--kv-bits"
        )


def refuse_foreign(context: typer.Context, own: Mapping[str, Sequence[str]], task: str) -> None:
    """Refuses options of another task: ignored, they would mislead.

    Args:
        context: The command's.
        own: By task, the parameters that not all tasks have.
        task: What was asked for.

    Raises:
        typer.BadParameter: Names the first.
    """
    for name in {name: None for names in own.values() for name in names}:
        source = context.get_parameter_source(name)
        if name not in own[task] and source is not None and source.name != "DEFAULT":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{task} has no such option", param_hint=flag)


def _unicode(text: str | None) -> str | None:
    """Refuses bytes of the command line that are not text: no tokenizer takes them."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("not UTF-8") from None
    return text


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Base model: a folder or a Hugging Face repo id (user/name@revision). Default: the "
        "one the adapter names; without an adapter, the bundled model.",
        show_default=False,
    ),
]
AdapterPath = Annotated[
    str | None,
    typer.Option(
        "--adapter-path",
        help="Adapter folder, as `kmerge-mlx convert` writes it, or a hub repo of one "
        "(user/name@revision). Default: the one that the model's folder carries, if any.",
        show_default=False,
    ),
]
MergeFactor = Annotated[
    int | None,
    typer.Option(
        "--k",
        "--merge-factor",
        min=1,
        help="Merge factor K: how many tokens one position stands for. Default: the only one "
        "there is; of the bundled model's, 4.",
        show_default=False,
    ),
]
DriftFiles = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE",
        help="Text to measure the drift on; `-` is stdin. Default: random tokens.",
    ),
]
ForceModel = Annotated[bool, typer.Option("--force", help="Replace a model folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the base model's own Python files run."),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        callback=_unicode,
        help="Text to read uncompressed, after the FILEs; `-` is stdin, and \\n and \\t are "
        "line break and tab.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", "-m", min=-1, help="Most tokens to generate; -1 for no limit."),
]
Temp = Annotated[float, typer.Option("--temp", min=0.0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sampling top-p.")]
MinP = Annotated[float, typer.Option("--min-p", min=0.0, max=1.0, help="Sampling min-p.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sampling top-k; 0 is off.")]
MinTokensToKeep = Annotated[
    int, typer.Option("--min-tokens-to-keep", min=1, help="Tokens that min-p always keeps.")
]
XtcProbability = Annotated[
    float,
    typer.Option("--xtc-probability", min=0.0, max=1.0, help="How often XTC sampling happens."),
]
XtcThreshold = Annotated[
    float,
    typer.Option(
        "--xtc-threshold", min=0.0, max=0.5, help="Probability from which XTC drops tokens."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        help="Seed of the sampling: the same one gives the same text.",
        show_default=False,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        min=0.0,
        help="Divides the logits of tokens already read; 1 is off.",
        show_default=False,
    ),
]
RepetitionContextSize = Annotated[
    int,
    typer.Option(
        "--repetition-context-size", min=1, help="How many original tokens it looks back."
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        help="Subtracted from the logits of tokens already read.",
        show_default=False,
    ),
]
PresenceContextSize = Annotated[
    int,
    typer.Option("--presence-context-size", min=1, help="How many original tokens it looks back."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        help="The same, once for every time a token was read.",
        show_default=False,
    ),
]
FrequencyContextSize = Annotated[
    int,
    typer.Option("--frequency-context-size", min=1, help="How many original tokens it looks back."),
]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache-file",
        help="KV cache made by `kmerge-mlx cache`: the --prompt goes on where it ends.",
        show_default=False,
    ),
]
MaxKvSize = Annotated[
    int | None,
    typer.Option(
        "--max-kv-size",
        min=1,
        help="Most positions the KV cache keeps; older ones are overwritten.",
        show_default=False,
    ),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        callback=one_of(2, 3, 4, 5, 6, 8),
        help="Bits to quantize the KV cache to: 2, 3, 4, 5, 6 or 8.",
        show_default=False,
    ),
]
KvGroupSize = Annotated[
    int,
    typer.Option(
        "--kv-group-size",
        callback=one_of(32, 64, 128),
        help="Group size of --kv-bits: 32, 64 or 128.",
    ),
]
QuantizedKvStart = Annotated[
    int, typer.Option("--quantized-kv-start", min=0, help="Position from which --kv-bits applies.")
]
PrefillStepSize = Annotated[
    int, typer.Option("--prefill-step-size", min=1, help="Positions prefilled at once.")
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        "--system-prompt",
        callback=_unicode,
        help="System message for the chat template.",
        show_default=False,
    ),
]
PrefillResponse = Annotated[
    str | None,
    typer.Option(
        "--prefill-response",
        callback=_unicode,
        help="Beginning of the answer, for the chat template.",
        show_default=False,
    ),
]
ChatTemplateConfig = Annotated[
    str | None,
    typer.Option(
        "--chat-template-config",
        help="Further chat template arguments, a JSON object.",
        show_default=False,
    ),
]
Layouts = enum.StrEnum("Layouts", list(MERGES))
Merges = Annotated[
    Layouts | None,
    typer.Option(
        "--merges",
        help="What merges where nothing is said: long contexts, or all, chat template and question "
        "too. (A FILE beside a --prompt always merges, and that prompt never.) Default: as the "
        "adapter was trained.",
        show_default=False,
    ),
]
MergeThreshold = Annotated[
    int | None,
    typer.Option(
        "--merge-threshold",
        min=1,
        help="Fewest tokens of a conversation's text that merges as a context. Default: as the "
        "adapter was trained.",
        show_default=False,
    ),
]
UseChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--apply-chat-template/--ignore-chat-template",
        help="Wrap the text in the tokenizer's chat template, or use it bare. Default: as the "
        "adapter was trained.",
        show_default=False,
    ),
]
ExtraEosToken = Annotated[
    list[str] | None,
    typer.Option(
        "--extra-eos-token",
        metavar="TOKEN",
        help="Stop at this token too; give the option again for another.",
        show_default=False,
    ),
]
Stage = enum.StrEnum("Stage", list(STAGES))
TreeStage = Annotated[Stage, typer.Option("--stage", help="Trees: how large they grow.")]
MaxNodes = Annotated[
    int | None,
    typer.Option(
        "--max-nodes",
        min=2,
        help="Trees: most nodes of one. Default: the stage's.",
        show_default=False,
    ),
]
ReferenceSampling = Annotated[
    bool,
    typer.Option(
        "--reference-sampling",
        help="Trees: ask every pair of nodes, as the paper's code does; most are false.",
    ),
]
Category = Annotated[
    str | None,
    typer.Option(
        "--category",
        help="Reviews: category of the hub dataset. Default: the paper's.",
        show_default=False,
    ),
]
Language = Annotated[
    str | None,
    typer.Option(
        "--language",
        help="Commits: language of the hub dataset. Default: the paper's.",
        show_default=False,
    ),
]
TaskFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="Reviews, commits: a local .jsonl or .jsonl.gz in the dataset's schema.",
        show_default=False,
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Count bad lines and go on, instead of stopping."),
]
Dtype = enum.StrEnum("Dtype", ["float32", "float16", "bfloat16"])
Plot = Annotated[
    str | None,
    typer.Option(
        "--plot", help="Draw a picture into this file (.png, .svg, .pdf).", show_default=False
    ),
]
