"""The rows that the bundled model learns from: a tree, then questions and answers about it.

Owns: which trees are drawn as the curriculum grows, the rows, what each of their tokens is, and the
scores. Does not know the model.

A training row asks one tree several questions, half true/false and half find-the-parent, each
answer ended by the end-of-text token. Questions do not see each other, and each stands at the
positions it would have alone: the tree is padded on the left, so that all questions begin at one
column. (Where they did see each other, the model counted the trues so far, answered the last
question with certainty and had learned nothing of trees after 900 steps.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from tokenizer import ANSWER, CHILD, EOS, PHRASES, TASKS, TREE
from tokenizers import Tokenizer

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.data.tasks import fingerprint
from kmerge_mlx.data.textualized_tree import FIND_PARENT, Question, Stage, Tree, TreeTask

FIRST_NODES, LAST_NODES = 4, 20
NODE_TOKENS = 4  # depth, letter, letter, line end
QUESTION_TOKENS = 11  # of the longer question, with its answer and the end of the text
# What ends a block (of the last node, of A B, of C D), and the answer but its end, in
#     ", Task..", ", Parent: ", A, B, ", Child", ": ", C, D, ", Answer: ", "true", end
#     ", Task..", ": ", C, D, ", Answer: ", A, B, end
READ_AT, NAMED_AT = (0, 4, 8, 9), (0, 4, 5, 6)
HELD_OUT = 500  # trees of a shape in each of valid and test that are never trained on
TEXT_WEIGHT, ANSWER_WEIGHT = 0.1, 1.0


def shapes(nodes: int) -> tuple[Stage, Stage]:
    """The paper's two small shapes, cut to some nodes: ``medium`` and the fuller ``xmedium``."""
    return Stage(3, nodes, 0, 3), Stage(4, nodes, 1, 3)


def held_out_trees(seed: int = DATA_SEED) -> set[int]:
    """Fingerprints of the first validation and test trees of every shape."""
    tasks = [TreeTask(s, seed=seed) for n in range(FIRST_NODES, LAST_NODES + 1) for s in shapes(n)]
    return {
        fingerprint(task.draw(split, index)[0].text)
        for task in tasks
        for split in ("valid", "test")
        for index in range(HELD_OUT)
    }


@dataclass(frozen=True)
class Rows:
    """Trees, and the questions about each.

    Args:
        tree: ``(B, T)`` int32, T = 4 * nodes - 1, left-padded with the end-of-text token.
        asked: ``(B, Q, A)`` int32, questions with their answers, right-padded with it.
        answers: ``(B, Q, A)`` bool, the tokens of an answer and its end.
        places: ``(B, Q, P)`` int32, the tokens that end a block, and those of the answer but its
            end: each token of the answer follows one of them.
        tree_weights: ``(B, T)`` float32, how much each token counts as a target; 0 for padding.
        asked_weights: ``(B, Q, A)`` float32, the same.
        kinds: ``(B, Q)`` str: ``true``, ``false`` or ``find_parent``.
    """

    tree: np.ndarray
    asked: np.ndarray
    answers: np.ndarray
    places: np.ndarray
    tree_weights: np.ndarray
    asked_weights: np.ndarray
    kinds: np.ndarray

    def __getitem__(self, part: slice) -> Rows:
        return Rows(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


class RowMaker:
    """Makes rows of trees and questions.

    Args:
        tokenizer: The bundled model's.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._eos = tokenizer.token_to_id(EOS)
        # Tokens that end a block (of a node, of the last node, of a name), and all that there are.
        self.ends = [self._ids(text)[0] for text in ("\n", *TASKS, CHILD, ANSWER)]
        self.tokens = [self._ids(text)[0] for text in ("\n", *ascii_uppercase, *PHRASES, EOS)]

    def __call__(
        self, drawn: Sequence[tuple[Tree, list[Question]]], nodes: int, asked: int
    ) -> Rows:
        """The rows of some trees.

        Args:
            drawn: Trees and questions about them.
            nodes: Most nodes that a tree may have.
            asked: Questions a row: a tree that has fewer is asked them again.
        """
        size = len(drawn)
        tree = np.full((size, NODE_TOKENS * nodes - 1), self._eos, np.int32)
        questions = np.full((size, asked, QUESTION_TOKENS), self._eos, np.int32)
        answers = np.zeros(questions.shape, bool)
        places = np.empty((size, asked, len(READ_AT)), np.int32)
        kinds = np.empty((size, asked), object)
        texts = [f"{TREE}{t.text}" for t, _ in drawn]
        for row, (text, (_, about)) in enumerate(zip(texts, drawn, strict=True)):
            ids = self._ids(text)
            tree[row, tree.shape[1] - len(ids) :] = ids
            for column in range(asked):
                question = about[column % len(about)]
                ids = self._ids(question.prompt[len(text) :])
                end = len(ids) + len(answer := [*self._ids(question.answer), self._eos])
                questions[row, column, :end] = ids + answer
                answers[row, column, len(ids) : end] = True
                named = question.kind == FIND_PARENT
                kinds[row, column] = FIND_PARENT if named else question.answer
                places[row, column] = NAMED_AT if named else READ_AT
        real = (tree != self._eos) * TEXT_WEIGHT
        weights = np.where(answers, ANSWER_WEIGHT, (questions != self._eos) * TEXT_WEIGHT)
        return Rows(tree, questions, answers, places, _float(real), _float(weights), kinds)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def training_rows(
    make: RowMaker, nodes: int, step: int, trees: int, seed: int, held_out: set[int]
) -> Rows:
    """The batch of one step, the same whenever it is drawn.

    Args:
        make: Makes the rows.
        nodes: Most nodes of a tree.
        step: The step; each has trees of its own.
        trees: How many.
        seed: Of the trees.
        held_out: Fingerprints of trees that are not for training.
    """
    tasks = [TreeTask(s, seed=seed, questions_per_tree=4, find_parent=4) for s in shapes(nodes)]
    places = range(step * trees, (step + 1) * trees)
    return make([tasks[i % 2].draw("train", i, held_out) for i in places], nodes, 8)


def validation_rows(
    make: RowMaker, stages: Sequence[Stage], trees: int, seed: int, split: str = "valid"
) -> Rows:
    """Of every held-out tree one true, one false and one find-the-parent question.

    Args:
        make: Makes the rows.
        stages: Shapes to take turns.
        trees: How many in all.
        seed: Of the trees.
        split: ``valid`` or ``test``.
    """
    tasks = [TreeTask(s, seed=seed, questions_per_tree=2, find_parent=1) for s in stages]
    drawn = [tasks[i % len(tasks)].draw(split, i // len(tasks)) for i in range(trees)]
    return make(drawn, max(stage.max_nodes for stage in stages), 3)


def scores(rows: Rows, predicted: np.ndarray) -> dict[str, float]:
    """What of the questions was answered right.

    Args:
        rows: The questions.
        predicted: ``(B, Q, P)``, the most likely token after each place. A whole answer that is
            predicted so is what greedy decoding writes.

    Returns:
        ``balanced_accuracy``: mean of the shares of the true and of the false ones answered right;
        ``find_parent``: share of the parents named exactly.
    """
    after = rows.places + 1
    actual, counts = (np.take_along_axis(a, after, axis=-1) for a in (rows.asked, rows.answers))
    right = ((predicted == actual) | ~counts).all(axis=-1)
    true, false, named = (
        float(right[rows.kinds == kind].mean()) for kind in ("true", "false", FIND_PARENT)
    )
    return {"balanced_accuracy": (true + false) / 2, "find_parent": named}
