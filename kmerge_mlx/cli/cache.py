"""``kmerge-mlx cache``, and going on from what it wrote."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.opening import Opened, one_line_refusals, open_model, template_of
from kmerge_mlx.cli.reading import Files, json_object, prefill_bar, read_prompt
from kmerge_mlx.config import GenerationConfig
from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.lay_out import lay_out
from kmerge_mlx.prompts.policy import Layout

if TYPE_CHECKING:
    from kmerge_mlx.prompts.segments import Segment
    from kmerge_mlx.virtual_tokens import CompressedPrompt

DEFAULTS = GenerationConfig()
SUFFIX = ".safetensors"
QUESTIONS = ("0", "\n0", " z", "Z")
"""Whatever is asked, a cache holds what the prompts of all of these begin with."""

OutFile = Annotated[
    Path,
    typer.Option(
        "--prompt-cache-file", help="File to write: a .safetensors file.", show_default=False
    ),
]


def cache(
    prompt_cache_file: OutFile,
    files: Files = None,
    prompt: opt.Prompt = None,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: opt.MergeFactor = None,
    max_kv_size: opt.MaxKvSize = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = DEFAULTS.kv_group_size,
    quantized_kv_start: opt.QuantizedKvStart = DEFAULTS.quantized_kv_start,
    prefill_step_size: opt.PrefillStepSize = DEFAULTS.prefill_step_size,
    system_prompt: opt.SystemPrompt = None,
    chat_template_config: opt.ChatTemplateConfig = None,
    merges: opt.Merges = None,
    chat_template: opt.UseChatTemplate = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Read a context once and keep its KV cache in a file.

    The FILEs are merged and a --prompt after them is not, as `generate` reads them; what is asked
    of the file later goes on from there.

    \b
    Examples:
      kmerge-mlx cache report.txt --adapter-path A --k 4 --prompt-cache-file report.safetensors
      kmerge-mlx generate --prompt-cache-file report.safetensors -p "What changed in May?"
    """
    opt.check_kv(kv_bits, max_kv_size)
    template_options = json_object(chat_template_config)
    context, begun = read_prompt(files or [], prompt)
    opt.check_merges(model, adapter_path, context)
    if prompt_cache_file.suffix != SUFFIX:
        raise PromptError(f"--prompt-cache-file {prompt_cache_file}: its name must end in {SUFFIX}")
    if not prompt_cache_file.resolve().parent.is_dir():
        raise PromptError(f"--prompt-cache-file {prompt_cache_file}: there is no such folder")

    from kmerge_mlx.generation import prompt_cache
    from kmerge_mlx.generation.stream import check_context, compress

    opened = open_model(model, adapter_path, k, trust_remote_code)
    layout = opened.layout(merges, None, chat_template)
    chat = template_of(
        opened.tokenizer, ChatTemplate(system_prompt, None, template_options), layout
    )
    about = {
        "context": context,
        "prompt": begun,
        "layout": asdict(layout),
        "system_prompt": system_prompt if chat else None,
        "options": template_options,
        "templated": chat is not None,
        "model": opened.base,
        "adapter_path": _lasting(opened.adapter_path),
        "k": opened.merge and opened.merge.merge_factor,
    }
    held = prompt_cache.common_start(
        [_lay_out(opened.tokenizer, about, question) for question in QUESTIONS]
    )
    if not held:
        raise PromptError("there is nothing to keep: give a FILE, or a --prompt")
    check_context(opened.model, held)
    compressed = compress(opened.model, opened.tokenizer, held)
    with one_line_refusals(), prefill_bar(prefill_step_size) as progress:
        read = prompt_cache.prefill(
            opened.model,
            compressed,
            max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=progress,
        )
    made_with = prompt_cache.identity(opened.base, opened.adapter_path, about["k"])
    prompt_cache.save(prompt_cache_file, read, held, made_with, about)
    size = sum(each.nbytes for each in read)
    if kv_bits is not None and not any(hasattr(each, "bits") for each in read):
        print(
            f"note: not quantized: the {len(compressed.ids):,} positions are no more than "
            f"--quantized-kv-start {quantized_kv_start:,}",
            file=sys.stderr,
        )
    print(
        f"{prompt_cache_file}: {len(compressed.original_ids):,} tokens in "
        f"{len(compressed.ids):,} positions ({compressed.compression_ratio:.2f}x), "
        f"KV cache {size / 1e6:,.1f} MB",
        file=sys.stderr,
    )


@dataclass(frozen=True)
class Held:
    """A prompt cache file that is to be gone on from.

    Args:
        path: The file.
        about: How its prompt was made.
        question: What is asked now.
    """

    path: Path
    about: Mapping[str, Any]
    question: str

    def model(
        self, model: str | None, adapter_path: str | None, k: int | None
    ) -> tuple[str | None, str | None, int | None]:
        """``--model``, ``--adapter-path`` and ``--k``: as given, or as the file was made."""
        if model is None and adapter_path is None:
            model, adapter_path = self.about["model"], self.about["adapter_path"]
            if adapter_path == BUNDLED:
                adapter_path = None  # comes with the base of that name
        return model, adapter_path, self.about["k"] if k is None else k

    def go_on(
        self, opened: Opened, prefill_response: str | None, kv_bits: int | None
    ) -> tuple[CompressedPrompt, list[Any]]:
        """What is left to read of the prompt, and the KV cache to read it into.

        Raises:
            PromptError: The file is torn, or of another model, or the question changes what is
                before it.
        """
        from kmerge_mlx.generation import prompt_cache
        from kmerge_mlx.generation.stream import compress

        k = opened.merge and opened.merge.merge_factor
        used_with = prompt_cache.identity(opened.base, opened.adapter_path, k)
        found = prompt_cache.load(self.path, used_with)
        bits = getattr(found.cache[0], "bits", None)
        if bits is not None and kv_bits not in (None, bits):
            raise PromptError(f"--kv-bits is {kv_bits}, {self.path} was made with {bits}")
        segments = _lay_out(opened.tokenizer, self.about, self.question, prefill_response)
        if not prompt_cache.begins_with(segments, found.held):
            raise PromptError(
                f"this --prompt changes how the end of {self.path} is read: begin it otherwise"
            )
        whole = compress(opened.model, opened.tokenizer, segments)
        start = compress(opened.model, opened.tokenizer, found.held)
        print(
            f"Cache: {len(start.original_ids):,} tokens in {len(start.ids):,} positions",
            file=sys.stderr,
        )
        return whole.after(len(start.ids)), found.cache


def read_held(path: Path, belongs: Sequence[Any], question: str | None) -> Held:
    """A prompt cache file, before any model is loaded.

    Args:
        path: The file.
        belongs: Options that belong to `cache`: none of them may be given.
        question: The ``--prompt``.

    Raises:
        PromptError: The file is torn, something that belongs to it is given again, or no question.
    """
    if any(value not in (None, []) for value in belongs):
        raise PromptError(
            "--prompt-cache-file holds the context, the layout, the system prompt and the cache's "
            "size: leave FILEs, --merges, --apply-chat-template, --system-prompt, "
            "--chat-template-config and --max-kv-size out"
        )
    if question is None:
        raise PromptError("--prompt-cache-file needs a --prompt: what is asked of what it holds")
    _, asked = read_prompt([], question)
    from kmerge_mlx.generation import prompt_cache

    return Held(path, prompt_cache.read_about(path), asked)


def _lay_out(
    tokenizer: Any, about: Mapping[str, Any], question: str, prefill_response: str | None = None
) -> list[Segment]:
    """A prompt that begins with what a file holds."""
    chat = None
    if about["templated"]:
        chat = ChatTemplate(about["system_prompt"], prefill_response, about["options"])
    prompt = (about["prompt"] or "") + question
    return lay_out(tokenizer, about["context"], prompt, chat, Layout(**about["layout"]))


def _lasting(adapter_path: str | None) -> str | None:
    """An adapter's path that holds in other folders, too; the name of a hub repo does."""
    if adapter_path in (None, BUNDLED) or not Path(adapter_path).is_dir():
        return adapter_path
    return str(Path(adapter_path).resolve())
