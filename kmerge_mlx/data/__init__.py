"""Examples to train on and to score by: tasks by name, and one's own JSONL."""

from __future__ import annotations

from kmerge_mlx.data.git_history import CommitTask
from kmerge_mlx.data.hub_tasks import AmazonReviews, CommitPackFT, HubTask
from kmerge_mlx.data.questions import QuestionTask
from kmerge_mlx.data.recall import RecallTask
from kmerge_mlx.data.tasks import FileTask, Task
from kmerge_mlx.data.texts import TextTask
from kmerge_mlx.data.textualized_tree import TreeTask

HUB_TASKS: dict[str, type[HubTask]] = {task.name: task for task in (AmazonReviews, CommitPackFT)}
"""Tasks whose rows are drawn from a file of the hub."""

FILE_TASKS: dict[str, type[FileTask]] = {**HUB_TASKS, QuestionTask.name: QuestionTask}
"""Tasks whose rows are drawn from a file."""

TASKS: dict[str, type[Task]] = {
    TreeTask.name: TreeTask,
    **FILE_TASKS,
    RecallTask.name: RecallTask,
}
"""Tasks to train on and to evaluate. Importing them is cheap: ``--help`` shows their names."""

WRITTEN: dict[str, type[Task]] = {**TASKS, CommitTask.name: CommitTask, TextTask.name: TextTask}
"""Tasks whose data ``kmerge-mlx data`` writes."""
