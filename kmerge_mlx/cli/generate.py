"""``kmerge-mlx generate``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli.cache import CacheFileSettings, go_on
from kmerge_mlx.cli.inputs import Opened, PromptSettings, command, open_model
from kmerge_mlx.cli.output import note, print_json, speaker, wrapped
from kmerge_mlx.cli.texts import read_prompt
from kmerge_mlx.errors import PromptError, one_line_refusals, short
from kmerge_mlx.prompts.lay_out import lay_out
from kmerge_mlx.prompts.policy import NOTED
from kmerge_mlx.prompts.segments import check_ids
from kmerge_mlx.settings import SamplingSettings, option

if TYPE_CHECKING:
    from kmerge_mlx.generation.stream import GenerationResponse
    from kmerge_mlx.prompts.segments import Segment
    from kmerge_mlx.virtual_tokens import CompressedPrompt

_LOOKS_BACK = "How many original tokens it looks back."


@dataclass(frozen=True)
class AnswerSettings(PromptSettings):
    """What ``generate`` and ``chat`` share; the defaults are mlx-lm's."""

    max_tokens: int = option(
        100, int, "Most tokens to generate; -1 for no limit.", low=-1, flags=("--max-tokens", "-m")
    )
    temp: float = SamplingSettings.setting("temp")
    top_p: float = SamplingSettings.setting("top_p")
    xtc_probability: float = option(0.0, float, "How often XTC sampling happens.", low=0, high=1)
    xtc_threshold: float = option(
        0.1, float, "Probability from which XTC drops tokens.", low=0, high=0.5
    )
    extra_eos_token: tuple[str, ...] = option(
        (), str, "Stop at this token too; give the option again for another.", many=True
    )

    def clashes(self) -> list[str]:
        zero = ["`max_tokens` is 0, which generates nothing; -1 is no limit"]
        return super().clashes() + (zero if self.max_tokens == 0 else [])

    def add_eos_tokens(self, tokenizer: Any) -> None:
        """Lets ``extra_eos_token``, tokens or their numbers, end an answer too."""
        known = tokenizer.get_vocab() if self.extra_eos_token else {}
        for token in self.extra_eos_token:
            # mlx-lm would take the unknown token, or a number that no token has, for any other.
            if token not in known and not (token.isdecimal() and int(token) < len(tokenizer)):
                raise PromptError(f"`extra_eos_token` {token}: the tokenizer has no such token")
            if (rows := tokenizer.table_rows) is not None:
                check_ids([known[token] if token in known else int(token)], rows, tokenizer)
            tokenizer.add_eos_token(token)

    def options(self, tokenizer: Any) -> dict[str, Any]:
        """Options of ``stream_generate``."""
        from mlx_lm.sample_utils import make_sampler

        names = ("temp", "top_p", "min_p", "top_k", "min_tokens_to_keep")
        names += ("xtc_probability", "xtc_threshold")
        sampling = {name: getattr(self, name) for name in names if hasattr(self, name)}
        special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
        sampler = make_sampler(**sampling, xtc_special_tokens=special)
        return self.cache_options() | {"max_tokens": self.max_tokens, "sampler": sampler}


@dataclass(frozen=True)
class GenerateSettings(AnswerSettings):
    """Settings of ``kmerge-mlx generate``."""

    NAME = "generate"

    prompt: str | None = CacheFileSettings.setting("prompt")
    min_p: float = SamplingSettings.setting("min_p")
    top_k: int = SamplingSettings.setting("top_k")
    min_tokens_to_keep: int = option(1, int, "Tokens that min-p always keeps.", low=1)
    seed: int | None = option(
        None, int, "Seed of the sampling: the same one gives the same text.", low=0
    )
    repetition_penalty: float | None = option(
        None, float, "Divides the logits of tokens already read; 1 is off.", low=0
    )
    repetition_context_size: int = option(20, int, _LOOKS_BACK, low=1)
    presence_penalty: float | None = option(
        None, float, "Subtracted from the logits of tokens already read."
    )
    presence_context_size: int = option(20, int, _LOOKS_BACK, low=1)
    frequency_penalty: float | None = option(
        None, float, "The same, once for every time a token was read."
    )
    frequency_context_size: int = option(20, int, _LOOKS_BACK, low=1)
    prompt_cache_file: str | None = CacheFileSettings.setting(
        "prompt_cache_file",
        help="KV cache made by `kmerge-mlx cache`: the --prompt goes on where it ends.",
        required=False,
    )
    prefill_response: str | None = option(
        None, str, "Beginning of the answer, for the chat template."
    )
    json_schema: str | None = option(
        None, str, "File with a JSON schema that the answer is to fit (docs/serving.md)."
    )
    json: bool = option(False, bool, "Print one JSON object on stdout.")

    def clashes(self) -> list[str]:
        found = super().clashes()
        if self.json_schema is not None and self.prefill_response is not None:
            found.append("`json_schema` makes all of an answer: leave `prefill_response` out")
        if self.prompt_cache_file is None:
            return found
        if self.prompt is None:
            found.append("`prompt_cache_file` needs a `prompt`: what is asked of what it holds")
        held = ("system_prompt", "chat_template_config", "merges", "chat_template")
        held += ("keep", "max_kv_size")
        again = [f"`{name}`" for name in held if getattr(self, name) is not None]
        if again := ["FILE"] * bool(self.files) + again:
            found.append(f"`prompt_cache_file` holds it already: leave {', '.join(again)} out")
        return found


@command(GenerateSettings)
def generate(settings: GenerateSettings) -> None:
    """Generate text from a compressed prompt.

    The FILEs are the context and are merged, K tokens to a position; the --prompt is the question
    and is not. With FILEs alone everything is merged. Text streams to stdout, statistics to stderr.

    \b
    Examples:
      kmerge-mlx generate --model M --adapter-path A --k 4 prompt.txt
      kmerge-mlx generate --adapter-path A --k 4 report.txt -p "What changed in May?"
      cat log.txt | kmerge-mlx generate --adapter-path A --k 4 - --json
    """
    cache, schema = None, _read_schema(settings.json_schema)
    if settings.prompt_cache_file is None:
        context, spans, question = read_prompt(settings.files, settings.prompt)
        opened = open_model(settings, f"{context or ''}{question or ''}")
        if opened.source.model == BUNDLED and (question or context).endswith("\n"):
            note(
                "note: the prompt ends with a line end, which the bundled model was not trained "
                "on: see kmerge_mlx/bundled/README.md"
            )
        prompt = lay_out(opened.tokenizer, spans, question, opened.chat, opened.layout)
    else:
        opened, prompt, cache = go_on(settings)
    settings.add_eos_tokens(opened.tokenizer)

    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors

    from kmerge_mlx.generation.stream import stream_generate

    if settings.seed is not None:
        mx.random.seed(settings.seed)
    kinds = ("repetition", "presence", "frequency")
    penalties = [f"{kind}_{what}" for kind in kinds for what in ("penalty", "context_size")]
    processors = make_logits_processors(**{name: getattr(settings, name) for name in penalties})
    if schema is not None:
        from kmerge_mlx.generation.structured import Follow, Schemas

        processors.append(Follow(Schemas(opened.tokenizer).compile(schema), _raise))
    with one_line_refusals():
        responses = stream_generate(
            opened.model,
            opened.tokenizer,
            prompt,
            logits_processors=processors,
            prompt_cache=cache,
            max_kv_size=settings.max_kv_size,
            **settings.options(opened.tokenizer),
        )
        last = print_answer(responses, settings.json, opened, _merging(opened, prompt))
    if schema is not None and last.finish_reason == "length":
        note("note: --max-tokens cut the answer short: it is not whole JSON")


def _read_schema(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from kmerge_mlx.files import read_json

    schema = read_json(Path(path), PromptError)
    if not isinstance(schema, dict):
        raise PromptError(f"{path} holds {short(schema)}, expected a JSON schema: an object")
    return schema


def _raise(error: PromptError) -> None:
    raise error


def _merging(opened: Opened, prompt: list[Segment] | CompressedPrompt) -> str:
    """How much of a prompt merges, in words, and a note where that is less than one expects."""
    k = opened.source.k
    if k == 1 or not isinstance(prompt, list):
        return ""
    total = sum(len(segment.ids) for segment in prompt)
    merged = sum(len(segment.ids) for segment in prompt if segment.merge)
    # A window encoder pads nothing; between what is kept, padding is nothing special.
    if 0 < merged < k and not (opened.source.merge.has_window or opened.layout.keep):
        note(
            f"note: {merged} token{'s' * (merged > 1)} to merge, fewer than K = {k}: the rest of "
            "the block is padding, so the answer may be poor"
        )
    if not merged and total >= NOTED * opened.layout.threshold:
        note("note: none of it merges: give a long text as a FILE, or mark it with <merge>")
    return f"{merged:,} merged and {total - merged:,} raw, "


def print_answer(
    responses: Iterator[GenerationResponse], as_json: bool, opened: Opened, merging: str = ""
) -> GenerationResponse:
    """Prints an answer as it streams, who gave it and what it cost; or all as one JSON object.

    Returns:
        The last response.
    """
    texts, tokens = [], []
    try:
        for last in responses:
            texts.append(last.text)
            if last.finish_reason != "stop":
                tokens.append(last.token)
            if not as_json:
                print(last.text, end="", flush=True)
    finally:
        # However the text ends, Ctrl-C included, what follows begins a line.
        if texts and not as_json:
            print(flush=True)
    if as_json:
        hidden = {"text", "token", "logprobs", "from_draft"}
        stats = {name: value for name, value in vars(last).items() if name not in hidden}
        answer = {"text": "".join(texts), "tokens": tokens} | stats
        print_json(answer)
        return last
    who = "" if opened.noted else f"Model: {speaker(opened.source)}\n"
    lines = (
        f"{who}Prompt: {last.prompt_tokens} tokens in {last.compressed_tokens} positions "
        f"({last.compression_ratio:.2f}x), {merging}{last.prompt_tps:.3f} tokens-per-sec, "
        f"first token after {last.time_to_first_token:.3f} s\n"
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {last.peak_memory:.3f} GB"
    ).splitlines()
    note("\n".join(map(wrapped, lines)))
    return last
