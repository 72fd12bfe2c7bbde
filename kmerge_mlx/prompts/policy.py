"""How prompts are laid out: what merges where tags do not say it, and whether a template applies.

Source: arXiv 2604.15153, where everything merges; instructions and questions stay exact otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kmerge_mlx.errors import AdapterError, findings, short

ALL, CONTEXTS = "all", "contexts"
MERGES = (ALL, CONTEXTS)
"""What of a conversation merges where nothing is specified: see :class:`Layout`."""


@dataclass(frozen=True)
class Layout:
    """What merges where neither tags nor a message specify it; stored in ``merge_config.json``.

    Args:
        merges: ``contexts``: long texts of a conversation, but not its template, its system
            messages and its last question; ``all``: everything, the template too, as in the paper.
        threshold: Fewest tokens of a text that merges, for ``contexts``.
        chat_template: Whether the tokenizer's template is applied, where it has one.

    Raises:
        AdapterError: Every setting that is not valid, listed.
    """

    merges: str = CONTEXTS
    threshold: int = 32
    chat_template: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.merges not in MERGES:
            problems.append(f"merges is {short(self.merges)}, expected {' or '.join(MERGES)}")
        if type(self.threshold) is not int or self.threshold < 1:
            problems.append(f"threshold is {short(self.threshold)}, expected a whole number >= 1")
        if not isinstance(self.chat_template, bool):
            problems.append(f"chat_template is {short(self.chat_template)}, expected true or false")
        if problems:
            raise AdapterError(findings("layout", problems))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout | None:
        """Reads the layout of ``merge_config.json``; None where it is empty.

        Earlier releases merged everything, and wrote ``chat_template`` alone (and ``merged``,
        always the prompt).

        Raises:
            AdapterError: An unknown entry, or a value that is not valid.
        """
        if not data:
            return None
        names = {f.name for f in fields(cls)}
        if extra := sorted(set(data) - names - {"merged"}):
            raise AdapterError(
                f"merge_config.json: layout has {', '.join(extra)}, which this release "
                "does not know: update kmerge-mlx"
            )
        known = {name: value for name, value in data.items() if name in names}
        return cls(**({"merges": ALL} | known))


DEFAULT_LAYOUT = Layout()
"""Where an adapter does not record how it was trained."""


def chosen(
    stored: Layout | None,
    merges: str | None = None,
    threshold: int | None = None,
    chat_template: bool | None = None,
) -> Layout:
    """The layout to use: what is asked for, else ``stored``, as the adapter was trained."""
    asked = {"merges": merges, "threshold": threshold, "chat_template": chat_template}
    asked = {name: value for name, value in asked.items() if value is not None}
    return replace(stored or DEFAULT_LAYOUT, **asked)
