"""``serve --expand``: the model may ask for the exact text of what was merged.

Source: LCLM's agent, arXiv 2606.09659.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from kmerge_mlx.errors import PromptError, ServeError, short
from kmerge_mlx.prompts.lay_out import lay_out_chat
from kmerge_mlx.prompts.policy import Layout
from kmerge_mlx.prompts.segments import Segment, add, merged_text

NAME = "expand"

MOST_ROUNDS = 4
"""Times that the model may ask before it has to answer."""

MOST_TOKENS = 4096
"""Of the text that it gets for asking once, as it was merged."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": (
            "Returns the exact text of a compressed segment of this conversation. Each one stands "
            "after its number, such as [segment 1]. Call it if you need exact words or numbers."
        ),
        "parameters": {
            "type": "object",
            "properties": {"segment": {"type": "integer", "description": "Its number."}},
            "required": ["segment"],
        },
    },
}


def check_expand(tokenizer: Any, layout: Layout, k: int) -> None:
    """Raises ServeError where ``expand`` cannot work: nothing merges, or tools cannot be called."""
    found = None
    if k == 1:
        found = "nothing is merged (K is 1)"
    elif not tokenizer.has_tool_calling:
        found = "mlx-lm does not know how this base calls tools"
    else:
        call = {"id": "a" * 9, "type": "function", "function": {"name": NAME, "arguments": "{}"}}
        asked = [{"role": "user", "content": "a"}, *messages_of(tokenizer, (), {}, [call], 0)]
        try:
            for tools in ([TOOL], None):
                lay_out_chat(tokenizer, asked, layout, {"tools": tools})
        except PromptError as error:
            found = error.found.replace("`", "")
    if found is not None:
        raise ServeError(f"`expand`: {found}: leave it out")


def numbered(
    tokenizer: Any, segments: Sequence[Segment], whole: Sequence[Segment]
) -> list[Segment]:
    """Segments with a raw number before each text that merges, as token ids of its own.

    It is not in the text that is tokenized, so a text may look like it but cannot replace it.
    ``whole`` is the same prompt with nothing kept raw inside of what merges.
    """
    before = int(merged_text(tokenizer) is not None)  # the token that stands before a text
    starts = accumulate((len(segment.ids) for segment in whole), initial=0)
    places = [start - before for start, s in zip(starts, whole, strict=False) if s.merge]
    made: list[Segment] = []
    at, count = 0, 0
    for segment in segments:
        ids, end = list(segment.ids), at + len(segment.ids)
        while count < len(places) and places[count] < end:
            count += 1
            cut = places[count - 1] - at
            label = tokenizer.encode(f"[segment {count}]\n", add_special_tokens=False)
            add(made, [*ids[:cut], *label], False)
            ids, at = ids[cut:], at + cut
        add(made, ids, segment.merge)
        at = end
    return made


def messages_of(
    tokenizer: Any,
    segments: Sequence[Segment],
    said: Mapping[str, str],
    calls: Sequence[Mapping[str, Any]],
    most: int,
) -> list[dict[str, Any]]:
    """What a round adds to the conversation: the model's calls, and their results, all of it raw.

    Args:
        tokenizer: The model's.
        segments: The prompt that the model answered.
        said: Its text beside the calls, by mlx-lm's state: ``normal``, ``reasoning``.
        calls: Its calls in OpenAI's form.
        most: Tokens of the results together, as they were merged; the rest is cut.
    """
    merged, left = [segment.ids for segment in segments if segment.merge], most
    own = merged_text(tokenizer)
    decode = (tokenizer if own is None else own.tokenizer).decode
    shown, results = [], []
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        given = arguments.get("segment") if isinstance(arguments, dict) else arguments
        named = re.fullmatch(r"\s*([0-9]{1,9})(\.0)?\s*", str(given))  # models write 2.0, too
        number = int(named[1]) if named else 0
        if 1 <= number <= len(merged):
            ids = merged[number - 1]
            text = decode(ids[:left], clean_up_tokenization_spaces=False)
            if len(ids) > left:
                text = text.rstrip("\ufffd")  # the cut may lie in a character
                text += f"\n[cut: these are {left} of the segment's {len(ids)} tokens]"
            left = max(0, left - len(ids))
        else:
            text = f"There is no segment {short(given)}: give a number from 1 to {len(merged)}."
        # The model's own id, or one for mlx-lm's: some templates want 9 letters and digits.
        is_own = re.fullmatch(r"[a-zA-Z0-9]{9}", call["id"])
        known = call["id"] if is_own else f"{NAME}{len(shown):03}"
        function = {"name": NAME, "arguments": {"segment": number or short(given)}}
        shown.append({"id": known, "type": "function", "function": function})
        result = {"role": "tool", "name": NAME, "tool_call_id": known}
        results.append(result | {"content": text, "merge": False})
    made = {"role": "assistant", "content": said.get("normal", ""), "merge": False}
    if said.get("reasoning"):
        made["reasoning_content"] = said["reasoning"]
    return [made | {"tool_calls": shown}, *results]
