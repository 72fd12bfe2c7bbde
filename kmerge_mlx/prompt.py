"""What of a prompt is merged and what stays raw.

Owns: text to token ids with mlx-lm's rules (special tokens, chat template) and the split of those
ids into segments. The ids are always those of the whole text, exactly as mlx-lm makes them; a
segment only says which of them to merge. Does not know models or blocks.

Source: mlx_lm.generate for templates and special tokens; arXiv 2604.15153 for "all of it merges".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError, first_line

# Stands for the user's text when asking a template where it puts it: no template mentions it.
_PLACEHOLDER = "\ue000kmerge\ue001"


@dataclass(frozen=True)
class Segment:
    """A run of token ids that is either merged in blocks or read one by one.

    Args:
        ids: Token ids, each below V.
        merge: Whether the run is merged.
    """

    ids: Sequence[int]
    merge: bool = True


@dataclass(frozen=True)
class ChatTemplate:
    """How ``mlx_lm.generate`` wraps one user message, with its options.

    Args:
        system_prompt: Content of a leading system message, or None.
        prefill_response: Beginning of the answer, or None.
        options: Further arguments of ``apply_chat_template``.
    """

    system_prompt: str | None = None
    prefill_response: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(self, tokenizer: Any, text: str) -> str:
        """The full prompt text for one user message.

        Raises:
            PromptError: The template refuses the messages or its options.
        """
        messages = [] if self.system_prompt is None else [_message("system", self.system_prompt)]
        messages.append(_message("user", text))
        prefilled = self.prefill_response is not None
        if prefilled:
            messages.append(_message("assistant", self.prefill_response))
        try:
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=prefilled,
                add_generation_prompt=not prefilled,
                **self.options,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise PromptError(
                f"the chat template refused ({first_line(error)}): change what it is given, or "
                "use --ignore-chat-template"
            ) from error


def decode_text(data: bytes, name: str) -> str:
    """Bytes of a prompt file to text, unchanged but for a leading byte-order mark.

    Args:
        data: The file's content.
        name: What to call it in an error.

    Raises:
        PromptError: Not UTF-8 (says which byte), or empty.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "save the file as UTF-8"
        ) from None
    if not text:
        raise PromptError(f"{name} is empty: put the text to compress in it")
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Text to token ids as ``mlx_lm.stream_generate`` does: special tokens unless it has them."""
    return list(tokenizer.encode(text, add_special_tokens=_wants_special_tokens(tokenizer, text)))


def lay_out(
    tokenizer: Any,
    context: str | None,
    prompt: str | None,
    chat: ChatTemplate | None = None,
) -> list[Segment]:
    """Splits a prompt into merged and raw segments: the context merges, the prompt does not.

    With a context alone everything merges, template included, as in the paper; with a prompt alone
    nothing does; with both, only the tokens that lie wholly inside the context.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        context: Text to merge, or None.
        prompt: Text to read raw, after the context, or None.
        chat: Chat template to apply, or None for the bare text.

    Returns:
        Segments whose ids, laid end to end, are the ids of the whole text.

    Raises:
        PromptError: Neither context nor prompt, or a chat template that rewrites the text.
    """
    text = CONTEXT_SEPARATOR.join(part for part in (context, prompt) if part)
    if not text:
        raise PromptError("the prompt is empty: give a FILE to compress, or --prompt")
    rendered = text if chat is None else chat.render(tokenizer, text)
    special = chat is None and _wants_special_tokens(tokenizer, rendered)
    ids = list(tokenizer.encode(rendered, add_special_tokens=special))
    if not (context and prompt):
        return [Segment(ids, merge=bool(context))]
    span = _context_span(tokenizer, chat, text, context, rendered)
    first, last = _token_span(tokenizer, rendered, special, ids, span)
    parts = [Segment(ids[:first], False), Segment(ids[first:last]), Segment(ids[last:], False)]
    return [part for part in parts if part.ids]


def _message(role: str, content: str | None) -> dict[str, str | None]:
    return {"role": role, "content": content}


def _wants_special_tokens(tokenizer: Any, text: str) -> bool:
    bos = tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def _context_span(
    tokenizer: Any, chat: ChatTemplate | None, text: str, context: str, rendered: str
) -> tuple[int, int]:
    """Where the context stands in the rendered prompt, in characters."""
    if chat is None:
        return 0, len(context)
    start = chat.render(tokenizer, _PLACEHOLDER).find(_PLACEHOLDER)
    # Many templates trim the message: then the context begins after its own leading blanks.
    for lead in (0, len(text) - len(text.lstrip())):
        if start >= 0 and rendered.startswith(context[lead:], start):
            return start, start + len(context) - lead
    raise PromptError(
        "the chat template rewrites the text, so its tokens cannot be told from the template's: "
        "use --ignore-chat-template"
    )


def _token_span(
    tokenizer: Any, rendered: str, special: bool, ids: list[int], span: tuple[int, int]
) -> tuple[int, int]:
    """The run of tokens that lie wholly within the characters of ``span``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode"):
        raise PromptError(
            "this tokenizer does not say where its tokens lie in the text, so a FILE cannot be "
            "merged beside a raw --prompt: put both in one FILE"
        )
    encoding = backend.encode(rendered, add_special_tokens=special)
    if encoding.ids != ids:
        raise PromptError(
            "this tokenizer changes its tokens after the fact, so a FILE cannot be merged beside "
            "a raw --prompt: put both in one FILE"
        )
    low, high = span
    inside = [i for i, (s, e) in enumerate(encoding.offsets) if low <= s < e <= high]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
