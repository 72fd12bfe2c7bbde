"""``kmerge-mlx generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.cache import read_held
from kmerge_mlx.cli.opening import one_line_refusals, open_model, template_of
from kmerge_mlx.cli.reading import Files, json_object, prefill_bar, read_prompt
from kmerge_mlx.config import GenerationConfig
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.lay_out import lay_out

if TYPE_CHECKING:
    from kmerge_mlx.generation.stream import GenerationResponse

DEFAULTS = GenerationConfig()


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
    prompt_cache_file: opt.PromptCacheFile = None,
    max_kv_size: opt.MaxKvSize = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = DEFAULTS.kv_group_size,
    quantized_kv_start: opt.QuantizedKvStart = DEFAULTS.quantized_kv_start,
    prefill_step_size: opt.PrefillStepSize = DEFAULTS.prefill_step_size,
    system_prompt: opt.SystemPrompt = None,
    prefill_response: opt.PrefillResponse = None,
    chat_template_config: opt.ChatTemplateConfig = None,
    merges: opt.Merges = None,
    chat_template: opt.UseChatTemplate = None,
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
    opt.check_kv(kv_bits, max_kv_size)
    template_options = json_object(chat_template_config)
    shape = (merges, None, chat_template)
    if prompt_cache_file is None:
        context, question = read_prompt(files or [], prompt)
        held = None
    else:
        belongs = [files, max_kv_size, system_prompt, chat_template_config, *shape]
        held = read_held(prompt_cache_file, belongs, prompt)
        model, adapter_path, k = held.model(model, adapter_path, k)
    if held is None:
        opt.check_merges(model, adapter_path, context)

    # The heavy imports wait until the command line and the files are known to be good.
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from kmerge_mlx.generation.stream import stream_generate

    opened = open_model(model, adapter_path, k, trust_remote_code, extra_eos_token or [])
    llm, tokenizer = opened.model, opened.tokenizer
    if held is None:
        layout = opened.layout(*shape)
        chat = ChatTemplate(system_prompt, prefill_response, template_options)
        chat = template_of(tokenizer, chat, layout)
        segments, cache = lay_out(tokenizer, context, question, chat, layout), None
        if opened.base == BUNDLED and (question or context).endswith("\n"):
            print(
                "note: the prompt ends with a line end, and the bundled model knows none that do: "
                "see kmerge_mlx/bundled/README.md",
                file=sys.stderr,
            )
    else:
        segments, cache = held.go_on(opened, prefill_response, kv_bits)
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
            segments,
            max_tokens,
            sampler=sampler,
            logits_processors=processors,
            prompt_cache=cache,
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=progress,
        )
        print_answer(_one_line_errors(responses), as_json)


def _one_line_errors(responses: Iterator[GenerationResponse]) -> Iterator[GenerationResponse]:
    """Turns what mlx-lm refuses (--top-k past the vocabulary, say) into this project's errors."""
    with one_line_refusals():
        yield from responses


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
