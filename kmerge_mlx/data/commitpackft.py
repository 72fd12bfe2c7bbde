"""The paper's third task: a file after a commit, from the file before it and the commit's subject.

Owns: the prompt, where the commits are and how many the paper tests on. Does not know how rows are
drawn (``sampling``).

Source: arXiv 2604.15153 (CommitPackFT); the hub dataset bigcode/commitpackft, whose rows hold
``old_contents``, ``new_contents``, ``subject`` and more. None of it is in this project.
"""

from __future__ import annotations

import re
from pathlib import Path

from kmerge_mlx.data.jsonl import Row
from kmerge_mlx.data.sampling import Pair, SplitSizes
from kmerge_mlx.errors import DataError, short
from kmerge_mlx.hub.fetch import DATASET, fetch_file

REPO = "bigcode/commitpackft"
LANGUAGE = "python"
SIZES = SplitSizes(test=5_600, valid=500)
"""The paper's test set, and all the rest to train on; it has no validation set."""


def pair(row: Row) -> Pair:
    """A commit to a prompt and the new content of its file.

    The prompt is the paper's to the letter, "instrutions" included, and says "python" whatever the
    language. A commit that leaves the file empty has no answer.

    Raises:
        DataError: A missing text.
    """
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


def fetch(language: str = LANGUAGE) -> Path:
    """The commits of a language, from the hub's cache or the hub.

    Args:
        language: A name as the dataset's page lists them.

    Raises:
        DataError: No such language, or the hub did not give it.
    """
    if not re.fullmatch(r"[\w+#.-]*\w[\w+#.-]*", language, re.ASCII):
        raise DataError(f"language is {short(language)}, expected a name such as {LANGUAGE}")
    return fetch_file(REPO, f"data/{language}/data.jsonl", DataError, repo_type=DATASET)
