"""The rows that the bundled model learns from: a tree, then questions and answers about it.

Owns: which trees are drawn as the curriculum grows, the training rows with their loss weights, and
the validation rows. Does not know the model.

A training row asks one tree several questions, half true/false and half find-the-parent, each
answer ended by the end-of-text token. Questions must not see each other (``Rows.asked``): half of
a row's are true, and where they did, the model counted the trues so far, answered the last question
with certainty and had learned nothing of trees after 900 steps.

At first the lines of a tree have no ends (a depth begins a line anyhow): the model then finds out
in 600 steps what a true answer has to do with the tree (with line ends it had not after 2,000),
and takes them for granted within 50 steps when they come.

Validation asks one question a row,
in the paper's format, about held-out trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizer import ANSWER, EOS, TASKS
from tokenizers import Tokenizer

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data.fingerprint import fingerprint
from kmerge_mlx.data.textualized_tree import FIND_PARENT, Question, TreeTask, draw
from kmerge_mlx.data.trees import Stage

FIRST_NODES, LAST_NODES = 4, 12
ROW_STEP = 16  # rows are padded to a multiple of this: few shapes, few traces
HELD_OUT = 500  # trees of a shape in each of valid and test that are never trained on
TREE_WEIGHT, QUESTION_WEIGHT, ANSWER_WEIGHT = 0.1, 0.3, 1.0


def shapes(nodes: int) -> tuple[Stage, Stage]:
    """The paper's two small shapes, cut to some nodes: ``medium`` and the fuller ``xmedium``."""
    return Stage(3, nodes, 0, 3), Stage(4, nodes, 1, 3)


def held_out_trees(seed: int = DATA_SEED) -> set[int]:
    """Fingerprints of the first validation and test trees of every shape."""
    tasks = [TreeTask(s, seed=seed) for n in range(FIRST_NODES, LAST_NODES + 1) for s in shapes(n)]
    return {
        fingerprint(draw(task, split, index)[0].text)
        for task in tasks
        for split in ("valid", "test")
        for index in range(HELD_OUT)
    }


@dataclass(frozen=True)
class Rows:
    """Token rows.

    Args:
        ids: ``(B, T)`` int32, right-padded with the end-of-text token.
        weights: ``(B, T)`` float32, how much each token counts as a target; 0 for padding.
        asked: ``(B, T)`` int32, which question a token belongs to, from 1; 0 for the tree's.
        answer: ``(B, T)`` bool, the tokens of an answer and its end.
    """

    ids: np.ndarray
    weights: np.ndarray
    asked: np.ndarray
    answer: np.ndarray


class RowMaker:
    """Makes rows of texts.

    Args:
        tokenizer: The bundled model's.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._newline = tokenizer.encode("\n").ids[0]
        self._eos = tokenizer.token_to_id(EOS)
        self._answer = tokenizer.token_to_id(ANSWER)
        self._tasks = [tokenizer.token_to_id(task) for task in TASKS]

    def __call__(self, texts: Sequence[str], newlines: bool = True, length: int = 0) -> Rows:
        """The rows of some texts, at least as long as ``length``, with or without line ends."""
        encoded = [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        if not newlines:
            encoded = [[i for i in ids if i != self._newline] for ids in encoded]
        length = max(length, *map(len, encoded))
        ids = np.full((len(texts), -(-length // ROW_STEP) * ROW_STEP), self._eos, np.int32)
        real = np.zeros(ids.shape, bool)
        for row, mask, tokens in zip(ids, real, encoded, strict=True):
            row[: len(tokens)], mask[: len(tokens)] = tokens, True
        answer = (_before(ids == self._answer) > _before((ids == self._eos) & real)) & real
        asked = np.cumsum(np.isin(ids, self._tasks), axis=1, dtype=np.int32)
        weights = np.where(asked > 0, QUESTION_WEIGHT, TREE_WEIGHT)
        weights = np.where(answer, ANSWER_WEIGHT, weights) * real
        return Rows(ids, weights.astype(np.float32), asked, answer)


def _before(flags: np.ndarray) -> np.ndarray:
    """How many flags of a row are set before each place."""
    return np.cumsum(flags, axis=1) - flags


def training_rows(
    make: RowMaker,
    nodes: int,
    step: int,
    trees: int,
    seed: int,
    held_out: set[int],
    newlines: bool = True,
) -> Rows:
    """The batch of one step, the same whenever it is drawn.

    Args:
        make: Makes the rows.
        nodes: Most nodes of a tree.
        step: The step; each has trees of its own.
        trees: How many.
        seed: Of the trees.
        held_out: Fingerprints of trees that are not for training.
        newlines: Whether the tree's lines have ends.
    """
    tasks = [TreeTask(s, seed=seed, questions_per_tree=4, find_parent=4) for s in shapes(nodes)]
    texts = []
    for index in range(step * trees, (step + 1) * trees):
        tree, questions = draw(tasks[index % 2], "train", index, held_out)
        start = len("Tree: ") + len(tree.text)
        asked = "".join(f"{q.prompt[start:]}{q.answer}{EOS}" for q in questions)
        texts.append(f"Tree: {tree.text}{asked}")
    # The longest row there can be: one shape a number of nodes.
    return make(texts, newlines, (3 + newlines) * nodes + 4 * (10 + 8))


def validation_questions(stages: Sequence[Stage], trees: int, seed: int) -> list[Question]:
    """Of every held-out tree one true, one false and one find-the-parent question.

    Args:
        stages: Shapes to take turns.
        trees: How many in all.
        seed: Of the trees.
    """
    tasks = [TreeTask(s, seed=seed, questions_per_tree=2, find_parent=1) for s in stages]
    drawn = [draw(tasks[i % len(tasks)], "valid", i // len(tasks))[1] for i in range(trees)]
    return [question for questions in drawn for question in questions]


def validation_rows(make: RowMaker, questions: Sequence[Question], newlines: bool = True) -> Rows:
    """One question and its answer a row."""
    return make([q.prompt + q.answer + EOS for q in questions], newlines)


def scores(questions: Sequence[Question], rows: Rows, predicted: np.ndarray) -> dict[str, float]:
    """What of the questions was answered right.

    Args:
        questions: What was asked.
        rows: Their rows, ``(B, T)``.
        predicted: ``(B, T)``, the most likely token at each place given those before it. A whole
            answer that is predicted so is what greedy decoding writes.

    Returns:
        ``balanced_accuracy``: mean of the shares of the true and of the false ones answered right;
        ``find_parent``: share of the parents named exactly.
    """
    right = ((predicted == rows.ids) | ~rows.answer).all(axis=1)
    kinds = np.array([FIND_PARENT if q.kind == FIND_PARENT else q.answer for q in questions])
    true, false, named = (float(right[kinds == k].mean()) for k in ("true", "false", FIND_PARENT))
    return {"balanced_accuracy": (true + false) / 2, "find_parent": named}
