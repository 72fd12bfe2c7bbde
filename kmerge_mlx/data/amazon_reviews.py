"""The paper's second task: is a review positive?

Owns: the prompt, the label rule, where the reviews are and how many the paper takes. Does not know
how rows are drawn (``sampling``).

Source: arXiv 2604.15153 (Amazon Reviews); the hub dataset McAuley-Lab/Amazon-Reviews-2023, whose
rows hold ``rating`` (1.0 to 5.0), ``title``, ``text`` and more. None of it is in this project.
"""

from __future__ import annotations

import re
from pathlib import Path

from kmerge_mlx.config import is_number
from kmerge_mlx.data.jsonl import Row
from kmerge_mlx.data.sampling import Pair, SplitSizes
from kmerge_mlx.errors import DataError, short
from kmerge_mlx.hub.fetch import DATASET, fetch_file

REPO = "McAuley-Lab/Amazon-Reviews-2023"
CATEGORY = "Amazon_Fashion"
POSITIVE_FROM = 3.5
SIZES = SplitSizes(test=50_000, valid=1_000, train_share=0.1)
"""The paper's test set, and a tenth of the rest to train on; it has no validation set."""


def pair(row: Row) -> Pair:
    """A review to a prompt and its label.

    Raises:
        DataError: No text, or no rating.
    """
    text, rating = row.get("text"), row.get("rating")
    if not isinstance(text, str):
        raise DataError(f"text is {short(text)}, expected the text of a review")
    if not is_number(rating):
        raise DataError(f"rating is {short(rating)}, expected a number")
    label = "positive" if rating >= POSITIVE_FROM else "negative"
    return Pair(f"Review: {text}, Label:", label, label)


def fetch(category: str = CATEGORY) -> Path:
    """The reviews of a category, from the hub's cache or the hub.

    Args:
        category: A name as the dataset's page lists them.

    Raises:
        DataError: No such category, or the hub did not give it.
    """
    if not re.fullmatch(r"\w+", category, re.ASCII):
        raise DataError(f"category is {short(category)}, expected a name such as {CATEGORY}")
    return fetch_file(REPO, f"raw/review_categories/{category}.jsonl", DataError, repo_type=DATASET)
