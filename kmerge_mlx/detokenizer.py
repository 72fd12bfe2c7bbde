"""Turns token ids into the text that ``tokenizer.decode`` gives, as they come or one by one."""

from __future__ import annotations

from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

_PART = "\ufffd"  # what decoders write for a part of a character
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level tokenizers
_SPACE = bytes_to_unicode()[ord(" ")]


class Detokenizer(StreamingDetokenizer):
    """mlx-lm's interface to text that grows: all of it is ``tokenizer.decode(tokens)``.

    What later tokens may change is held back: a part of a character, and a run of byte tokens,
    which decoders read as a whole. An id without a token (embedding tables are often padded) has no
    text.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._known = frozenset(vocabulary.values())
        named = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        self._byte_tokens = {vocabulary[n]: byte for n, byte in named.items() if n in vocabulary}
        # A token alone would lose its space where the decoder strips a text's first one.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self.reset()

    def reset(self) -> None:
        """Begins a new text."""
        self.offset, self.text, self.tokens = 0, "", []
        # The last tokens whose text is out, with the text that they have alone, and the new ones.
        self._window: list[int] = []
        self._out, self._out_text = 0, ""

    def add_token(self, token: int) -> None:
        """Takes the next token."""
        self.tokens.append(token)
        if token in self._known:
            self._window.append(token)
            if token not in self._byte_tokens:
                self._let_go()

    def finalize(self) -> None:
        """Lets go of what was held back."""
        self._let_go(last=True)

    def _let_go(self, last: bool = False) -> None:
        text = self._tokenizer.decode(self._window)
        if text.endswith(_PART) and not last:
            return
        if not text.startswith(self._out_text):  # a decoder that looks back further than usual
            text, self._out_text = self.decode(self.tokens), self.text
        if new := text[len(self._out_text) :]:
            self.text += new
            self._window = self._window[self._out :]
            self._out, self._out_text = len(self._window), self._tokenizer.decode(self._window)

    def decode(self, tokens: list[int]) -> str:
        """The text of a whole answer."""
        return self._tokenizer.decode([token for token in tokens if token in self._known])

    def spell(self, token: int) -> tuple[str, bytes]:
        """A token's text in the middle of others, and its bytes.

        A part of a character is written ``bytes:\\xf0\\x9f``, as OpenAI once did.
        """
        if token not in self._known:
            return "", b""
        before = self._tokenizer.decode(self._before)
        text = self._tokenizer.decode([*self._before, token])
        text = text[len(before) :] if text.startswith(before) else self._tokenizer.decode([token])
        if _PART not in text:
            return text, text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if (data := self._byte_tokens.get(token)) is None:
            of_bytes = all(letter in _BYTE_OF for letter in piece)
            data = bytes(_BYTE_OF[letter] for letter in piece) if of_bytes else text.encode()
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


def exact(tokenizer: Any) -> TokenizerWrapper:
    """A tokenizer, mlx-lm's or transformers', whose streamed text comes from :class:`Detokenizer`.

    A byte-level vocabulary with another decoder (Mistral's tekken, converted by some tools) gets
    the decoder that fits.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if not isinstance(tokenizer._detokenizer, Detokenizer):
        inner = tokenizer._tokenizer
        text = inner.decode(inner.encode("a b", add_special_tokens=False))
        if _SPACE in text and getattr(inner, "is_fast", False):
            inner.backend_tokenizer.decoder = decoders.ByteLevel()
        tokenizer._detokenizer = Detokenizer(inner)
    return tokenizer
