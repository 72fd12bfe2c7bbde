"""``kmerge-mlx chat``."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli.generate import AnswerSettings, GenerateSettings
from kmerge_mlx.cli.inputs import command, open_model, parse_files, read_prompt, with_flags
from kmerge_mlx.cli.output import one_line_refusals, prefill_bar
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.settings import LayoutSettings

if TYPE_CHECKING:
    from kmerge_mlx.generation.conversation import Conversation
    from kmerge_mlx.generation.stream import GenerationResponse

MARK = "> "
HELP = "q exits, r forgets the conversation, h is this, /stats says what it takes; Ctrl-C stops"


@dataclass(frozen=True)
class ChatSettings(AnswerSettings):
    """Settings of ``kmerge-mlx chat``."""

    merge_threshold: int | None = LayoutSettings.setting("merge_threshold")
    seed: int = GenerateSettings.setting("seed", help="Seed of the random numbers.", default=0)


@command(ChatSettings)
def chat(settings: ChatSettings) -> None:
    """Talk with a model that reads the history in compressed form.

    The FILEs are the context of the first question, and are merged. Answers go to stdout.

    \b
    Examples:
      kmerge-mlx chat --adapter-path A --k 4
      kmerge-mlx chat report.txt --adapter-path A --k 4 --system-prompt "Be brief."
    """
    context = read_prompt(settings.files, None)[0] if settings.files else None
    spans = parse_files(context, settings.files)

    import mlx.core as mx

    from kmerge_mlx.generation.conversation import Conversation

    opened = open_model(settings, bool(spans), threshold=settings.merge_threshold)
    settings.add_eos_tokens(opened.tokenizer)
    mx.random.seed(settings.seed)
    talk = Conversation(
        opened.model,
        opened.tokenizer,
        opened.layout,
        context=spans,
        system_prompt=settings.system_prompt,
        template_options=settings.chat_template_config,
        max_kv_size=settings.max_kv_size,
    )
    options = settings.cache_options() | {
        "max_tokens": settings.max_tokens,
        "sampler": settings.sampler(opened.tokenizer),
    }
    source = opened.source
    merging = f"K={source.k}, merges {opened.layout.merges}"
    if source.model == BUNDLED:
        _note("note: the bundled model answers questions about one tree each, and cannot talk")
    _note(f"{source.model}, {'uncompressed' if source.merge is None else merging}. {HELP}")
    while True:
        try:
            line = _read_line()
            if line in (None, "q"):
                break
            _take(talk, line, options)
        except KeyboardInterrupt:  # it ends a pipe's reader, and not a person's conversation
            if not sys.stdin.isatty():
                raise
            _note("\nq or Ctrl-D exits")


def _take(talk: Conversation, line: str, options: dict[str, Any]) -> None:
    """Does what one line asks for."""
    if line == "h":
        _note(HELP)
    elif line == "r":
        talk.reset()
        _note("forgotten")
    elif line == "/stats":
        _note(_stats(talk))
    elif line:
        try:
            _answer(talk, line, options)
        except KMergeError as error:
            _note(f"error: {with_flags(str(error), ChatSettings)}")


def _answer(talk: Conversation, question: str, options: dict[str, Any]) -> None:
    """Prints an answer as it streams; Ctrl-C stops it, and it stays as far as it went."""
    last: GenerationResponse | None = None
    progress = prefill_bar(options["prefill_step_size"])
    with one_line_refusals():
        answer = talk.ask(question, prompt_progress_callback=progress, **options)
        with contextlib.closing(answer):
            try:
                for last in answer:
                    print(last.text, end="", flush=True)
            except KeyboardInterrupt:
                _note(" (stopped)")
    print(flush=True)
    if last is not None:
        _note(
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
    except UnicodeError:  # bytes from a pipe that are not text
        _note("error: a line that is not UTF-8 was left out")
        return ""
    return line


def _note(text: str) -> None:
    """Prints on stderr what is not an answer."""
    print(text, file=sys.stderr, flush=True)
