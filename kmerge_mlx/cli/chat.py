"""``kmerge-mlx chat``."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli.generate import AnswerSettings, GenerateSettings
from kmerge_mlx.cli.inputs import command, open_model, with_flags
from kmerge_mlx.cli.output import note
from kmerge_mlx.cli.texts import read_prompt
from kmerge_mlx.errors import KMergeError, one_line_refusals
from kmerge_mlx.settings import LayoutSettings

if TYPE_CHECKING:
    from kmerge_mlx.generation.conversation import Conversation
    from kmerge_mlx.generation.stream import GenerationResponse

HELP = "q exits, r forgets, h is this, /stats says what it takes; Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatSettings(AnswerSettings):
    """Settings of ``kmerge-mlx chat``."""

    NAME = "chat"

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
    context, spans, _ = read_prompt(settings.files, None) if settings.files else ("", [], None)

    import mlx.core as mx

    from kmerge_mlx.generation.conversation import Conversation

    opened = open_model(settings, context)
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
    source = opened.source
    merging = f"K={source.k}, merges {opened.layout.merges}"
    if source.model == BUNDLED:
        note("note: the bundled model answers questions about one tree each, and cannot talk")
    note(f"{source.model}, {'uncompressed' if source.merge is None else merging}\n{HELP}")
    while True:
        try:
            match _read_line():
                case None | "q":
                    break
                case "h":
                    note(HELP)
                case "r":
                    talk.reset()
                    note("forgotten")
                case "/stats":
                    note(_stats(talk))
                case "":
                    pass
                case question:
                    _answer(talk, question, settings.options(opened.tokenizer))
        except KMergeError as error:
            note(f"error: {with_flags(str(error), ChatSettings)}")
        except KeyboardInterrupt:  # it ends a pipe's reader, and not a person's conversation
            if not sys.stdin.isatty():
                raise
            note("\nq or Ctrl-D exits")


def _answer(talk: Conversation, question: str, options: dict[str, Any]) -> None:
    """Prints an answer as it streams; Ctrl-C stops it, and it stays as far as it went."""
    last: GenerationResponse | None = None
    with one_line_refusals(), contextlib.closing(talk.ask(question, **options)) as answer:
        try:
            for last in answer:
                print(last.text, end="", flush=True)
        except KeyboardInterrupt:
            note(" (stopped)")
    print(flush=True)
    if last is not None:
        note(
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
    if shown := sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines with it)
    try:
        line = input("> " if shown else "").strip()
        line.encode()
    except EOFError:
        return None
    except UnicodeError:  # bytes from a pipe that are not text
        note("error: a line that is not UTF-8 was left out")
        return ""
    return line
