"""The paper's third task: a file after a commit, from the file before it and the commit's subject.

Source: arXiv 2604.15153 (CommitPackFT); the hub dataset bigcode/commitpackft, whose rows hold
``old_contents``, ``new_contents``, ``subject`` and more.
"""

from __future__ import annotations

from kmerge_mlx.data.jsonl import Row
from kmerge_mlx.data.splits import HubTask, Pair
from kmerge_mlx.errors import DataError, short


class CommitPackFT(HubTask):
    """Commits of a language; a commit that leaves its file empty has no answer.

    The prompt is the paper's to the letter: "instrutions", and "python" whatever the language. The
    paper has no validation set.
    """

    name = "commitpackft"
    repo = "bigcode/commitpackft"
    path = "data/{}/data.jsonl"
    part_name, default_part, part_pattern = "language", "python", r"[\w+#.-]*\w[\w+#.-]*"
    test, valid = 5_600, 500

    @staticmethod
    def pair(row: Row) -> Pair:
        """Raises a DataError for a commit that lacks a text."""
        for name in ("old_contents", "subject", "new_contents"):
            if not isinstance(row.get(name), str):
                raise DataError(f"{name} is {short(row.get(name))}, expected text")
        prompt = (
            "Update the old python code content based on the instrutions.\n"
            f"Old Content: {row['old_contents']}\n"
            f"Instructions: {row['subject']}\n"
            "New Content:\n"
        )
        return Pair(prompt, row["new_contents"])
