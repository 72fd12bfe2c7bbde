"""The paper's tasks whose rows come from the hub, drawn and read by name.

Owns the way from a task's name to examples. Does not know trees, which are drawn and not fetched
(``textualized_tree``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kmerge_mlx.config import TASKS
from kmerge_mlx.data import amazon_reviews, commitpackft
from kmerge_mlx.data.sampling import write_splits
from kmerge_mlx.data.sources import ExampleList, load_examples
from kmerge_mlx.errors import DataError


def load_task(
    task: str,
    part: str | None,
    file: str | None,
    seed: int,
    skip_bad: bool,
    splits: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ExampleList]:
    """Draws the paper's splits of reviews or commits; the files are gone when they have been read.

    Args:
        task: Name of a task.
        part: Category of the reviews or language of the commits; None is the paper's.
        file: A local file in the dataset's schema; None fetches it.
        seed: Of the draw.
        skip_bad: Count bad lines and go on, instead of stopping at the first.
        splits: Which splits are wanted.
        progress: Called with (bytes read, bytes to read).

    Returns:
        Examples by split.

    Raises:
        DataError: A bad line, a file too small for the paper's splits, or one that cannot be had.
    """
    module, name = (
        (amazon_reviews, part or amazon_reviews.CATEGORY)
        if task == TASKS[1]
        else (commitpackft, part or commitpackft.LANGUAGE)
    )
    source = Path(file) if file else module.fetch(name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = write_splits(
                source, module.pair, module.SIZES, Path(folder), seed, skip_bad, progress
            )
        except DataError as error:
            if "--test" not in str(error):
                raise
            raise DataError(
                f"{source} is too small for the paper's splits ({error}): `kmerge-mlx data "
                f"{task} --file {source} --test N --valid N` draws others, for --data"
            ) from None
        found = load_examples(folder, splits=splits)
    # What was left out was left out of the source.
    found[splits[0]].parts[0][0].bad = written["bad_lines"]
    return found
