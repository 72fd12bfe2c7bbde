"""``kmerge-mlx chat``."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.opening import one_line_refusals, open_model, template_of
from kmerge_mlx.cli.reading import Files, json_object, prefill_bar, read_prompt
from kmerge_mlx.config import GenerationConfig
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.prompts.chat_template import ChatTemplate

if TYPE_CHECKING:
    from kmerge_mlx.generation.conversation import Conversation
    from kmerge_mlx.generation.stream import GenerationResponse

DEFAULTS = GenerationConfig()
SEED, XTC_THRESHOLD = 0, 0.1
"""mlx_lm.chat's own."""
MARK = "> "
HELP = "q exits, r forgets the conversation, h is this, /stats says what it takes; Ctrl-C stops"


def chat(
    files: Files = None,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: opt.MergeFactor = None,
    max_tokens: opt.MaxTokens = DEFAULTS.max_tokens,
    temp: opt.Temp = DEFAULTS.temp,
    top_p: opt.TopP = DEFAULTS.top_p,
    xtc_probability: opt.XtcProbability = DEFAULTS.xtc_probability,
    xtc_threshold: opt.XtcThreshold = XTC_THRESHOLD,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random numbers.")] = SEED,
    max_kv_size: opt.MaxKvSize = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = DEFAULTS.kv_group_size,
    quantized_kv_start: opt.QuantizedKvStart = DEFAULTS.quantized_kv_start,
    prefill_step_size: opt.PrefillStepSize = DEFAULTS.prefill_step_size,
    system_prompt: opt.SystemPrompt = None,
    chat_template_config: opt.ChatTemplateConfig = None,
    merges: opt.Merges = None,
    merge_threshold: opt.MergeThreshold = None,
    chat_template: opt.UseChatTemplate = None,
    extra_eos_token: opt.ExtraEosToken = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Talk with a model that reads the history in compressed form.

    The FILEs are the context of the first question, and are merged. Answers go to stdout.

    \b
    Examples:
      kmerge-mlx chat --adapter-path A --k 4
      kmerge-mlx chat report.txt --adapter-path A --k 4 --system-prompt "Be brief."
    """
    opt.check_kv(kv_bits, max_kv_size)
    template_options = json_object(chat_template_config)
    context = read_prompt(files, None)[0] if files else None
    opt.check_merges(model, adapter_path, context)

    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from kmerge_mlx.generation.conversation import Conversation

    opened = open_model(model, adapter_path, k, trust_remote_code, extra_eos_token or [])
    tokenizer = opened.tokenizer
    layout = opened.layout(merges, merge_threshold, chat_template)
    template_of(tokenizer, ChatTemplate(system_prompt, None, template_options), layout)
    mx.random.seed(seed % 2**64)
    talk = Conversation(
        opened.model,
        tokenizer,
        layout,
        context=context,
        system_prompt=system_prompt,
        template_options=template_options,
        max_kv_size=max_kv_size,
    )
    options = {
        "max_tokens": max_tokens,
        "sampler": make_sampler(
            temp,
            top_p,
            xtc_probability=xtc_probability,
            xtc_threshold=xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        ),
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "quantized_kv_start": quantized_kv_start,
        "prefill_step_size": prefill_step_size,
    }
    merge = opened.merge
    says = "uncompressed" if merge is None else f"K={merge.merge_factor}, merges {layout.merges}"
    if opened.base == BUNDLED:
        _say("note: the bundled model answers questions about one tree each, and cannot talk")
    _say(f"{opened.base}, {says}. {HELP}")
    while True:
        try:
            line = _read_line()
            if line in (None, "q"):
                break
            _take(talk, line, options)
        except KeyboardInterrupt:  # wherever it comes: only a pipe's reader is ended by it
            if not sys.stdin.isatty():
                raise
            _say("\nq or Ctrl-D exits")


def _take(talk: Conversation, line: str, options: dict[str, object]) -> None:
    """Does what one line asks for."""
    if line == "h":
        _say(HELP)
    elif line == "r":
        talk.reset()
        _say("forgotten")
    elif line == "/stats":
        _say(_stats(talk))
    elif line:
        try:
            _answer(talk, line, options)
        except KMergeError as error:
            _say(f"error: {error}")


def _answer(talk: Conversation, question: str, options: dict[str, object]) -> None:
    """Prints an answer as it streams; Ctrl-C stops it, and it stays as far as it went."""
    last: GenerationResponse | None = None
    step = options["prefill_step_size"]
    with one_line_refusals(), prefill_bar(step) as progress:
        answer = talk.ask(question, prompt_progress_callback=progress, **options)
        with contextlib.closing(answer):
            try:
                for last in answer:
                    print(last.text, end="", flush=True)
            except KeyboardInterrupt:
                _say(" (stopped)")
    print(flush=True)
    if last is not None:
        _say(
            f"{last.generation_tokens} tokens, {last.generation_tps:.1f} tokens-per-sec; "
            f"read {last.prompt_tokens:,} tokens in {last.compressed_tokens:,} positions"
        )


def _stats(talk: Conversation) -> str:
    history = talk.history
    if not history.turns:
        return "nothing was asked yet"
    ratio = history.tokens / history.positions
    return (
        f"questions: {history.turns}; last prompt: {history.tokens:,} tokens in "
        f"{history.positions:,} positions ({ratio:.2f}x), {history.cached:,} of them read before; "
        f"KV cache {history.kv_bytes / 1e6:,.1f} MB"
    )


def _read_line() -> str | None:
    """The next line, or None at the end of the input."""
    if sys.stdin is None:
        return None
    shown = sys.stdin.isatty()
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines with it)
    try:
        line = input(MARK if shown else "").strip()
        line.encode()
    except EOFError:
        return None
    except UnicodeError:  # bytes that are no text, from a pipe
        _say("error: a line that is not UTF-8 was left out")
        return ""
    return line


def _say(text: str) -> None:
    """What is no answer goes to stderr."""
    print(text, file=sys.stderr, flush=True)
