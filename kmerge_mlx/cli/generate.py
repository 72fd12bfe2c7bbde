"""``kmerge-mlx generate``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmerge_mlx.cli import options as opt
from kmerge_mlx.config import CONTEXT_SEPARATOR, GenerationConfig, MergeConfig
from kmerge_mlx.errors import AdapterError, KMergeError, ModelError, PromptError, first_line
from kmerge_mlx.prompt import ChatTemplate, decode_text, lay_out

if TYPE_CHECKING:
    from kmerge_mlx.generation import GenerationResponse

DEFAULTS = GenerationConfig()
STDIN = "-"
Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE", help="Text to compress; `-` is stdin. Several are joined by a blank line."
    ),
]


def generate(
    files: Files = None,
    prompt: opt.Prompt = None,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: opt.MergeFactor = None,
    max_tokens: opt.MaxTokens = DEFAULTS.max_tokens,
    temp: opt.Temp = DEFAULTS.temp,
    top_p: opt.TopP = DEFAULTS.top_p,
    min_p: opt.MinP = DEFAULTS.min_p,
    top_k: opt.TopK = DEFAULTS.top_k,
    min_tokens_to_keep: opt.MinTokensToKeep = DEFAULTS.min_tokens_to_keep,
    xtc_probability: opt.XtcProbability = DEFAULTS.xtc_probability,
    xtc_threshold: opt.XtcThreshold = DEFAULTS.xtc_threshold,
    seed: opt.Seed = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    repetition_context_size: opt.RepetitionContextSize = DEFAULTS.penalty_context_size,
    presence_penalty: opt.PresencePenalty = None,
    presence_context_size: opt.PresenceContextSize = DEFAULTS.penalty_context_size,
    frequency_penalty: opt.FrequencyPenalty = None,
    frequency_context_size: opt.FrequencyContextSize = DEFAULTS.penalty_context_size,
    max_kv_size: opt.MaxKvSize = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = DEFAULTS.kv_group_size,
    quantized_kv_start: opt.QuantizedKvStart = DEFAULTS.quantized_kv_start,
    prefill_step_size: opt.PrefillStepSize = DEFAULTS.prefill_step_size,
    system_prompt: opt.SystemPrompt = None,
    prefill_response: opt.PrefillResponse = None,
    chat_template_config: opt.ChatTemplateConfig = None,
    ignore_chat_template: opt.IgnoreChatTemplate = False,
    extra_eos_token: opt.ExtraEosToken = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Generate text from a compressed prompt.

    The FILEs are the context and are merged, K tokens to a position; the --prompt is the question
    and is not. With FILEs alone everything is merged. Text streams to stdout, statistics to stderr.

    \b
    Examples:
      kmerge-mlx generate --model M --adapter-path A --k 4 prompt.txt
      kmerge-mlx generate --adapter-path A --k 4 report.txt -p "What changed in May?"
      cat log.txt | kmerge-mlx generate --adapter-path A --k 4 - --json
    """
    if max_tokens == 0:
        raise typer.BadParameter("0 generates nothing; -1 is no limit", param_hint="--max-tokens")
    if kv_bits is not None and max_kv_size is not None:
        raise typer.BadParameter(
            "mlx-lm cannot quantize a --max-kv-size cache", param_hint="--kv-bits"
        )
    template_options = _json_object(chat_template_config)
    context, question = read_prompt(files or [], prompt)
    model_given, (base, adapter_path) = model is not None, opt.chosen(model, adapter_path)
    if adapter_path is None and context:
        raise AdapterError("FILEs need a merge encoder: give --adapter-path, or use --prompt")

    # The heavy imports wait until the command line and the files are known to be good.
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from kmerge_mlx.adapter import load_adapter
    from kmerge_mlx.generation import stream_generate
    from kmerge_mlx.model import load

    merge = None if adapter_path is None else load_adapter(adapter_path, k).merge
    try:
        llm, tokenizer = load(base, adapter_path, k, trust_remote_code=trust_remote_code)
    except ModelError as error:
        hint = "" if model_given else f" ({adapter_path} names this base; --model gives another)"
        raise ModelError(f"{error}{hint}") from error
    if merge is not None:
        _note_base(merge, base)
    _add_eos_tokens(tokenizer, extra_eos_token or [])
    chat = ChatTemplate(system_prompt, prefill_response, template_options)
    chat = _chat_template(tokenizer, chat, ignore_chat_template)
    if chat is not None and merge is not None:
        _note_layout(merge)
    if seed is not None:
        mx.random.seed(seed % 2**64)
    sampler = make_sampler(
        temp,
        top_p,
        min_p,
        min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    processors = make_logits_processors(
        repetition_penalty=repetition_penalty,
        repetition_context_size=repetition_context_size,
        presence_penalty=presence_penalty,
        presence_context_size=presence_context_size,
        frequency_penalty=frequency_penalty,
        frequency_context_size=frequency_context_size,
    )
    with prefill_bar(prefill_step_size) as progress:
        responses = stream_generate(
            llm,
            tokenizer,
            lay_out(tokenizer, context, question, chat),
            max_tokens,
            sampler=sampler,
            logits_processors=processors,
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=progress,
        )
        print_answer(_one_line_errors(responses), as_json)


def read_prompt(files: list[str], prompt: str | None) -> tuple[str | None, str | None]:
    """The text to merge and the text to keep raw.

    Args:
        files: Names of files, ``-`` for stdin.
        prompt: The ``--prompt`` text with mlx-lm's conventions: ``-`` is stdin, and a written
            ``\\n`` or ``\\t`` means the character.

    Raises:
        PromptError: Nothing to read, or a file that is missing, empty or not UTF-8.
    """
    if [*files, prompt].count(STDIN) > 1:
        raise PromptError("`-` is given more than once, but stdin can be read only once")
    if prompt == "":
        raise PromptError("--prompt is empty: leave it out, or give it text")
    context = CONTEXT_SEPARATOR.join(_read_text(name) for name in files) or None
    if prompt == STDIN:
        return context, _read_text(STDIN)
    if prompt is not None:
        return context, prompt.replace("\\n", "\n").replace("\\t", "\t")
    if context is None:
        raise PromptError("the prompt is empty: give a FILE to compress, or --prompt")
    return context, None


def _read_text(name: str) -> str:
    if name == STDIN and sys.stdin is None:
        raise PromptError("cannot read stdin: it is closed")
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read {name}: {error.strerror}") from None
    return decode_text(data, "stdin" if name == STDIN else name)


def _json_object(text: str | None) -> dict[str, Any]:
    hint = "--chat-template-config"
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=hint) from None
    if not isinstance(value, dict):
        raise typer.BadParameter("not a JSON object", param_hint=hint)
    return value


def _add_eos_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Adds tokens, or numbers of tokens, to those that end an answer."""
    known = tokenizer.get_vocab() if tokens else {}
    for token in tokens:
        # mlx-lm would take the unknown token, or a number that no token has, for any other word.
        if token not in known and not (token.isdecimal() and int(token) < len(tokenizer)):
            raise PromptError(f"--extra-eos-token {token}: the tokenizer has no such token")
        tokenizer.add_eos_token(token)


def _chat_template(tokenizer: Any, chat: ChatTemplate, ignore: bool) -> ChatTemplate | None:
    """The chat template if it applies; options that would be lost without one are refused."""
    if tokenizer.has_chat_template and not ignore:
        return chat
    if chat.system_prompt or chat.prefill_response or chat.options:
        raise PromptError(
            "--system-prompt, --prefill-response and --chat-template-config need a chat template: "
            + ("--ignore-chat-template leaves it out" if ignore else "this tokenizer has none")
        )
    return None


def _note_base(merge: MergeConfig, base: str) -> None:
    """Says when nothing but sizes could tell that the base is the adapter's own."""
    if not merge.base.fields and merge.base.id not in (None, base):
        print(
            f"note: this adapter names {merge.base.id} as its base and was converted without "
            f"--model, so only sizes say that it fits {base}",
            file=sys.stderr,
        )


def _note_layout(merge: MergeConfig) -> None:
    """Says when the prompt is laid out in another way than in training."""
    if merge.layout.get("chat_template") is False:
        print(
            "note: the tokenizer's chat template is applied, but this adapter was trained "
            "without one: --ignore-chat-template leaves it out",
            file=sys.stderr,
        )


@contextlib.contextmanager
def prefill_bar(step_size: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr while a prompt of several prefill steps is read, if anyone looks.

    Args:
        step_size: Positions prefilled at once.

    Yields:
        mlx-lm's ``prompt_progress_callback``: called with (positions read, positions in all).
    """
    bar: Any = None
    # Whatever ends the block, Ctrl-C included, gives the terminal its cursor back.
    with contextlib.ExitStack() as shown:

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if done == 0 and total > step_size and sys.stderr.isatty():
                bar = typer.progressbar(length=total, label="Reading", file=sys.stderr)
                shown.enter_context(bar)
            if bar is not None:
                bar.update(done - bar.pos)
            if done == total:
                shown.close()

        yield progress


def _one_line_errors(responses: Iterator[GenerationResponse]) -> Iterator[GenerationResponse]:
    """Turns what mlx-lm refuses (--top-k past the vocabulary, say) into this project's errors."""
    try:
        yield from responses
    except (ValueError, NotImplementedError) as error:
        reason = first_line(error).replace("[quantize]", "--kv-bits and --kv-group-size:")
        raise KMergeError(f"mlx-lm refused these options: {reason}") from error


def print_answer(responses: Iterator[GenerationResponse], as_json: bool) -> None:
    """Prints an answer as it streams, and what it cost; or all of it as one JSON object."""
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
        print(json.dumps(answer, ensure_ascii=False))
        return
    print(
        f"Prompt: {last.prompt_tokens} tokens in {last.compressed_tokens} positions "
        f"({last.compression_ratio:.2f}x), {last.prompt_tps:.3f} tokens-per-sec, "
        f"first token after {last.time_to_first_token:.3f} s\n"
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {last.peak_memory:.3f} GB",
        file=sys.stderr,
    )
