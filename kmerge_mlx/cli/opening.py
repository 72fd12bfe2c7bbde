"""What commands that read prompts begin with: the model, and how its prompts are laid out.

Owns the notes on stderr about what an adapter was made for and trained with. Heavy imports wait
until a command asks for its model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.cli import options as opt
from kmerge_mlx.errors import KMergeError, ModelError, PromptError, of_mlx_lm
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.policy import Layout, chosen, differences

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Opened:
    """A loaded model.

    Args:
        model: The base model, with its adapter if there is one.
        tokenizer: Its tokenizer.
        base: What the base was called.
        adapter_path: The adapter, or None.
        merge: What the adapter says of itself, or None without one.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    base: str
    adapter_path: str | None
    merge: MergeConfig | None

    def layout(
        self, merges: str | None, threshold: int | None, chat_template: bool | None
    ) -> Layout:
        """How prompts are laid out: as asked for, else as the adapter was trained.

        Says on stderr where the one differs from the other.
        """
        stored = None if self.merge is None else self.merge.layout
        layout = chosen(stored, merges and str(merges), threshold, chat_template)
        note_layout(stored, layout, self.tokenizer.has_chat_template)
        return layout


def note_layout(stored: Layout | None, used: Layout, has_template: bool) -> None:
    """Says when prompts are laid out in another way than in training."""
    if differs := differences(stored, used, has_template):
        print(f"note: this adapter was trained {' and '.join(differs)}", file=sys.stderr)


def open_model(
    model: str | None,
    adapter_path: str | None,
    k: int | None,
    trust_remote_code: bool = False,
    extra_eos_tokens: Sequence[str] = (),
) -> Opened:
    """Loads what ``--model``, ``--adapter-path`` and ``--k`` name.

    Args:
        model: Base model, or None: the adapter's, or the bundled model.
        adapter_path: Adapter folder, or None.
        k: Merge factor, or None: the adapter's only one.
        trust_remote_code: Let the base's own Python files run.
        extra_eos_tokens: Further tokens that end an answer.

    Raises:
        ModelError: The base cannot be loaded.
        AdapterError: The adapter is torn, has no such K, or is for another base.
        PromptError: A token that the tokenizer does not have.
    """
    model_given, (base, adapter_path) = model is not None, opt.chosen(model, adapter_path)
    from kmerge_mlx.adapters.folder import adapter_folder, read_merge_config
    from kmerge_mlx.model import load

    merge = None
    if adapter_path is not None:
        merge = read_merge_config(adapter_folder(adapter_path, k))
    try:
        llm, tokenizer = load(base, adapter_path, k, trust_remote_code=trust_remote_code)
    except ModelError as error:
        hint = "" if model_given else f" ({adapter_path} names this base; --model gives another)"
        raise ModelError(f"{error}{hint}") from error
    if merge is not None and not merge.base.fields and merge.base.id not in (None, base):
        print(
            f"note: this adapter names {merge.base.id} as its base and was converted without "
            f"--model, so only sizes say that it fits {base}",
            file=sys.stderr,
        )
    _add_eos_tokens(tokenizer, extra_eos_tokens)
    return Opened(llm, tokenizer, base, adapter_path, merge)


@contextlib.contextmanager
def one_line_refusals() -> Iterator[None]:
    """Turns what mlx-lm refuses (--top-k past the vocabulary, say) into this project's errors.

    Raises:
        KMergeError: mlx-lm's reason.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise KMergeError(of_mlx_lm(error)) from error


def template_of(tokenizer: Any, chat: ChatTemplate, layout: Layout) -> ChatTemplate | None:
    """The chat template if it applies; options that would be lost without one are refused.

    Raises:
        PromptError: Options of a template, and none is applied.
    """
    if tokenizer.has_chat_template and layout.chat_template:
        return chat
    if chat.system_prompt or chat.prefill_response or chat.options:
        raise PromptError(
            "--system-prompt, --prefill-response and --chat-template-config need a chat template: "
            + (
                "it is left out, as --ignore-chat-template or the adapter's training says; "
                "--apply-chat-template applies it"
                if tokenizer.has_chat_template
                else "this tokenizer has none"
            )
        )
    return None


def _add_eos_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Adds tokens, or numbers of tokens, to those that end an answer."""
    known = tokenizer.get_vocab() if tokens else {}
    for token in tokens:
        # mlx-lm would take the unknown token, or a number that no token has, for any other word.
        if token not in known and not (token.isdecimal() and int(token) < len(tokenizer)):
            raise PromptError(f"--extra-eos-token {token}: the tokenizer has no such token")
        tokenizer.add_eos_token(token)
