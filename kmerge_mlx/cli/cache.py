"""``kmerge-mlx cache``, and going on from the file that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli.inputs import Opened, PromptSettings, command, open_model
from kmerge_mlx.cli.output import note
from kmerge_mlx.cli.texts import read_prompt
from kmerge_mlx.errors import PromptError, one_line_refusals
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.lay_out import lay_out
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT, Layout
from kmerge_mlx.prompts.tags import Span, parse
from kmerge_mlx.settings import MAX_INT, option

if TYPE_CHECKING:
    from kmerge_mlx.cli.generate import GenerateSettings
    from kmerge_mlx.prompts.segments import Segment
    from kmerge_mlx.virtual_tokens import CompressedPrompt

SUFFIX = ".safetensors"
QUESTIONS = ("0", "\n0", " z", "Z")
"""A cache holds what the prompts of all of these begin with, so that any question can follow."""

_ABOUT = dict.fromkeys(("context", "prompt", "system_prompt", "model", "adapter_path"), str) | {
    "layout": dict,
    "options": dict,
    "templated": bool,
    "k": int,
}
"""What a file records of its prompt; each may be null."""


@dataclass(frozen=True)
class CacheFileSettings(PromptSettings):
    """Settings of ``kmerge-mlx cache``."""

    NAME = "cache"

    prompt_cache_file: str | None = option(
        None, str, "File to write: a .safetensors file.", required=True
    )
    prompt: str | None = option(
        None,
        str,
        "Text to read uncompressed, after the FILEs; `-` is stdin, and \\n and \\t are line break "
        "and tab.",
        flags=("--prompt", "-p"),
    )

    def clashes(self) -> list[str]:
        found = super().clashes()
        if not (name := self.prompt_cache_file or SUFFIX).endswith(SUFFIX):
            found.append(f"`prompt_cache_file` {name}: its name must end in {SUFFIX}")
        return found


@command(CacheFileSettings)
def cache(settings: CacheFileSettings) -> None:
    """Read a context once and keep its KV cache in a file.

    The FILEs are merged and a --prompt after them is not, as `generate` reads them; what is asked
    of the file later goes on from there.

    \b
    Examples:
      kmerge-mlx cache report.txt --adapter-path A --k 4 --prompt-cache-file report.safetensors
      kmerge-mlx generate --prompt-cache-file report.safetensors -p "What changed in May?"
    """
    context, spans, begun = read_prompt(settings.files, settings.prompt)
    path = Path(settings.prompt_cache_file)
    if not path.resolve().parent.is_dir():
        raise PromptError(f"`prompt_cache_file` {path}: there is no folder {path.parent}")

    from kmerge_mlx.generation import prompt_cache
    from kmerge_mlx.generation.stream import fitting

    opened = open_model(settings, f"{context or ''}{begun or ''}")
    about = _about(opened, context, begun)
    held = prompt_cache.common_start(
        [_lay_out(opened.tokenizer, about, spans, question) for question in QUESTIONS]
    )
    if not held:
        raise PromptError("there is nothing to keep: give a FILE, or a `prompt`")
    prompt = fitting(opened.model, opened.tokenizer, held)
    with one_line_refusals():
        read = prompt_cache.prefill(
            opened.model, prompt, settings.max_kv_size, **settings.cache_options()
        )
    prompt_cache.CacheFile(path, prompt_cache.identity(opened.source), held, about).save(read)
    if settings.kv_bits is not None and not any(hasattr(each, "bits") for each in read):
        note(
            f"note: not quantized: the {len(prompt.ids):,} positions are no more than "
            f"--quantized-kv-start {settings.quantized_kv_start:,}"
        )
    note(
        f"{path}: {len(prompt.original_ids):,} tokens in {len(prompt.ids):,} positions "
        f"({prompt.compression_ratio:.2f}x), "
        f"KV cache {sum(each.nbytes for each in read) / 1e6:,.1f} MB"
    )


def go_on(settings: GenerateSettings) -> tuple[Opened, CompressedPrompt, list[Any]]:
    """The model of a prompt cache file, what is left to read of a prompt, and its KV cache."""
    path = Path(settings.prompt_cache_file)
    question = read_prompt([], settings.prompt)[-1]

    from kmerge_mlx.generation import prompt_cache
    from kmerge_mlx.generation.stream import compress

    file = prompt_cache.CacheFile.read(path)
    about = {name: file.about.get(name) for name in _ABOUT}
    if not all(isinstance(about[name], kind | None) for name, kind in _ABOUT.items()):
        raise PromptError(f"{path}: its record of its prompt is torn: make it again")
    named = {"k": about["k"] if settings.k is None else settings.k}
    if settings.model is None and settings.adapter_path is None:
        named |= {"model": about["model"], "adapter_path": about["adapter_path"]}
    # A beginning of the answer goes into the file's template, if it has one.
    opened = open_model(replace(settings, prefill_response=None, **named))
    file.check(prompt_cache.identity(opened.source))
    start = compress(opened.model, opened.tokenizer, file.held, cached=MAX_INT)
    cache = file.load(opened.model, len(start.ids))
    bits = next((each.bits for each in cache if hasattr(each, "bits")), None)
    if bits is not None and settings.kv_bits not in (None, bits):
        raise PromptError(f"`kv_bits` is {settings.kv_bits}, {path} was made with {bits}")
    spans = parse(about["context"] or "")
    segments = _lay_out(opened.tokenizer, about, spans, question, settings.prefill_response)
    whole = compress(opened.model, opened.tokenizer, segments, cached=len(start.ids))
    if whole.ids[: len(start.ids)] != start.ids:
        raise PromptError(
            f"this `prompt` changes how the end of {path} is read: begin it differently"
        )
    note(f"Cache: {len(start.original_ids):,} tokens in {len(start.ids):,} positions")
    return opened, whole.after(len(start.ids)), cache


def _lay_out(
    tokenizer: Any,
    about: Mapping[str, Any],
    context: list[Span],
    question: str,
    prefill_response: str | None = None,
) -> list[Segment]:
    """A prompt that begins with what a file holds."""
    chat = None
    if about["templated"]:
        chat = ChatTemplate(about["system_prompt"], prefill_response, about["options"] or {})
    layout = Layout.from_json(about["layout"]) or DEFAULT_LAYOUT
    return lay_out(tokenizer, context, (about["prompt"] or "") + question, chat, layout)


def _about(opened: Opened, context: str | None, prompt: str | None) -> dict[str, Any]:
    """What a file records of its prompt."""
    source, adapter, chat = opened.source, opened.source.adapter_path, opened.chat or ChatTemplate()
    if adapter not in (None, BUNDLED) and Path(adapter).is_dir():
        adapter = str(Path(adapter).resolve())  # it is read from other folders, too
    return {
        "context": context,
        "prompt": prompt,
        "layout": opened.layout.to_json(),
        "system_prompt": chat.system_prompt,
        "options": dict(chat.options),
        "templated": opened.chat is not None,
        "model": source.model,
        "adapter_path": adapter,
        "k": None if source.merge is None else source.k,
    }
