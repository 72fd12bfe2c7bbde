"""Examples to train on and to score by: the paper's tasks by name, and one's own JSONL."""

from __future__ import annotations

from kmerge_mlx.data.tasks import AmazonReviews, CommitPackFT, HubTask, Task
from kmerge_mlx.data.textualized_tree import TreeTask

HUB_TASKS: dict[str, type[HubTask]] = {task.name: task for task in (AmazonReviews, CommitPackFT)}
"""Tasks whose rows are drawn from a file of the hub."""

TASKS: dict[str, type[Task]] = {TreeTask.name: TreeTask, **HUB_TASKS}
"""The paper's tasks. Importing them is cheap: ``--help`` shows their names."""
