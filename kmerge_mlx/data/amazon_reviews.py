"""The paper's second task: is a review positive?

Source: arXiv 2604.15153 (Amazon Reviews); the hub dataset McAuley-Lab/Amazon-Reviews-2023, whose
rows hold ``rating`` (1.0 to 5.0), ``title``, ``text`` and more.
"""

from __future__ import annotations

from kmerge_mlx.config import is_number
from kmerge_mlx.data.jsonl import Row
from kmerge_mlx.data.splits import HubTask, Pair
from kmerge_mlx.errors import DataError, short

POSITIVE_FROM = 3.5


class AmazonReviews(HubTask):
    """Reviews of a category, with ``positive`` or ``negative`` as the answer.

    The paper has no validation set, and trains on a tenth of what is not in the test set.
    """

    name = "amazon-reviews"
    repo = "McAuley-Lab/Amazon-Reviews-2023"
    path = "raw/review_categories/{}.jsonl"
    part_name, default_part, part_pattern = "category", "Amazon_Fashion", r"\w+"
    test, valid = 50_000, 1_000
    train_share = 0.1

    @staticmethod
    def pair(row: Row) -> Pair:
        """Raises a DataError for a review without text or rating."""
        text, rating = row.get("text"), row.get("rating")
        if not isinstance(text, str):
            raise DataError(f"text is {short(text)}, expected the text of a review")
        if not is_number(rating):
            raise DataError(f"rating is {short(rating)}, expected a number")
        label = "positive" if rating >= POSITIVE_FROM else "negative"
        return Pair(f"Review: {text}, Label:", label, label)
