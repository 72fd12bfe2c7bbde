"""Remembers on which day each conversation began, so that it goes on with its own date."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from kmerge_mlx.prompts.chat_template import now

MOST = 1024
"""Conversations remembered; of more, those that were asked last."""


class Dates:
    """The dates that a chat template writes, where it writes today's, by conversation.

    With another date nothing of a conversation's KV cache would fit its next question.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._lock = tokenizer, Lock()
        self._begun: OrderedDict[str, str] = OrderedDict()

    def of(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """The date for a conversation: of its first question, once the model has answered it."""
        if (today := now(self._tokenizer)) is None:
            return None
        roles = [message["role"] for message in messages]
        first = roles.index("user") + 1 if "user" in roles else len(roles)
        key = hashlib.sha256(json.dumps(messages[:first]).encode()).hexdigest()
        with self._lock:
            date = self._begun.get(key, today) if "assistant" in roles[first:] else today
            self._begun[key] = date
            self._begun.move_to_end(key)
            if len(self._begun) > MOST:
                self._begun.popitem(last=False)
        return date
