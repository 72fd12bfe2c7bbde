"""Where an answer ends because of a stop text.

mlx-lm looks for a stop text's tokens; the same text in other tokens would go on. Here the text
itself is looked for. Taking it out of the answer is left to mlx-lm, which holds back what may be
the beginning of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mlx_lm.server import Response


def cut_at_stops(responses: Iterable[Response], stops: Sequence[str]) -> Iterator[Response]:
    """Passes an answer's tokens on up to the first stop text.

    Args:
        responses: mlx-lm's, one a token.
        stops: The stop texts.

    Yields:
        The same, but that an end by ``stop`` has no text of its own: mlx-lm's server does not
        look at it, though it holds what the detokenizer kept back. Its token is -1 then: it was
        counted before.
    """
    longest = max(map(len, stops), default=0)
    before = ""
    for response in responses:
        text = before + response.text
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if ends:
            yield replace(response, text=text[len(before) : min(ends)], finish_reason=None)
            yield replace(response, text="", token=-1, finish_reason="stop")
            return
        before = text[-longest:] if longest else ""
        if response.finish_reason == "stop" and response.text:
            yield replace(response, finish_reason=None)
            response = replace(response, text="", token=-1)
        yield response
