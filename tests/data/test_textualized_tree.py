"""The textualized tree: what is drawn, that every label is right, and that no split leaks."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from functools import cache

import pytest

from kmerge_mlx.data import textualized_tree
from kmerge_mlx.data.tasks import fingerprint
from kmerge_mlx.data.textualized_tree import Stage, TreeTask
from kmerge_mlx.errors import DataError, SettingsError

TREE = r"Tree: (?P<tree>[A-Z]{2}(?:\n\++[A-Z]{2})*), Task: "
PAIR = r"Parent/Child Relationship, Parent: (?P<parent>[A-Z]{2}), Child: (?P<child>[A-Z]{2})"
PROMPT = re.compile(f"{TREE}{PAIR}, Answer: ")
# The paper's table: depth, nodes, children.
LIMITS = {
    "small": (2, 3, 0, 2),
    "xsmall": (3, 5, 0, 2),
    "medium": (3, 10, 0, 3),
    "xmedium": (4, 15, 1, 3),
    "large": (4, 30, 1, 3),
    "x3large": (4, 150, 3, 5),
}
# SHA-256 (its first 12 digits) of the test, train and valid file that release 0.1.0 wrote.
GOLDEN = [
    ({"num_trees": 300}, "b2dcf9c43afc a9769476830d 64c94cd82df5"),
    ({"num_trees": 300, "seed": 7}, "08924842810e 9fcf9efea9ec c72512780a0d"),
    (
        {"stage": "xmedium", "num_trees": 200, "find_parent": 2, "questions_per_tree": 4},
        "62e7a1ba6dc1 10c91012c16a 61f3013e82b6",
    ),
    (
        {"stage": "large", "num_trees": 100, "max_nodes": 20, "splits": {"train": 50}},
        "402b6b181a64 dbff76de0281 e867f9b243fd",
    ),
    (
        {
            "stage": "xsmall",
            "num_trees": 200,
            "reference_sampling": True,
            "splits": {"test": 9, "valid": 7},
        },
        "5704cedc5d43 ce7357c5b4ea 6c1b3a4e103f",
    ),
    ({"stage": "x3large", "num_trees": 100}, "bc1d765ff4fa 7d1b98d00f96 b25d0ffe24b3"),
]


def parse(text: str) -> tuple[dict[str, str | None], dict[str, int]]:
    """An independent reading of a tree: each node's parent and depth, from its text alone."""
    parents, depths, last_at = {}, {}, {}
    for row in text.split("\n"):
        depth = row.count("+")
        name = row[depth:]
        assert name not in parents
        parents[name] = last_at[depth - 1] if depth else None
        depths[name] = depth
        last_at[depth] = name
    return parents, depths


@cache
def sample(stage: str):
    """Trees of a stage with their questions."""
    count = 100 if stage == "x3large" else 500
    return [TreeTask(stage).draw("train", i) for i in range(count)]


def relation(parents, depths, a, b) -> str:
    """How the asked pair is related, from the parsed tree."""
    if parents[b] == a:
        return "edge"
    if parents[a] == b:
        return "reversed"
    if parents[b] is not None and parents[parents[b]] == a:
        return "grandparent"
    if parents[a] == parents[b]:
        return "sibling"
    return "uncle" if depths[a] + 1 == depths[b] else "other"


@pytest.mark.parametrize(("options", "expected"), GOLDEN)
def test_the_files_are_those_of_the_first_release_byte_for_byte(tmp_path, options, expected):
    summary = TreeTask(**options).write(tmp_path / "data")
    files = sorted((tmp_path / "data").glob("*.jsonl"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert " ".join(digest[:12] for digest in digests) == expected
    assert {found["sha256"] for found in summary["splits"].values()} == set(digests)


def test_a_training_run_finds_its_trees_again_by_the_text_of_the_first_release():
    splits = {"train": 10, "valid": 1, "test": 1}
    task = TreeTask(Stage(3, 7, 0, 3), seed=7, questions_per_tree=2, splits=splits)
    assert str(task) == (
        "TreeTask(stage=Stage(max_depth=3, max_nodes=7, min_children=0, max_children=3, "
        "batch_size=None, batch_size_k4=None), num_trees=10000, seed=7, questions_per_tree=2, "
        f"find_parent=0, reference_sampling=False, splits={splits}, max_nodes=None)"
    )


@pytest.mark.parametrize("stage", LIMITS)
def test_trees_reach_the_limits_of_the_papers_stage_and_no_further(stage):
    max_depth, max_nodes, _, max_children = LIMITS[stage]
    sizes, depths_seen, child_counts = Counter(), Counter(), Counter()
    for tree, _ in sample(stage):
        parents, depths = parse(tree.text)
        assert all(re.fullmatch("[A-Z]{2}", name) for name in parents)
        sizes[len(parents)] += 1
        depths_seen[max(depths.values())] += 1
        children = Counter(parents.values())
        child_counts.update(children[name] for name in parents if depths[name] < max_depth)
    assert (min(sizes) >= 2, max(sizes), max(depths_seen)) == (True, max_nodes, max_depth)
    # Room runs out under way, so a node may end with fewer children than were drawn for it.
    assert set(child_counts) == set(range(max_children + 1))


@pytest.mark.parametrize("stage", LIMITS)
def test_every_label_and_kind_is_right_by_a_second_reading_of_the_tree(stage):
    kinds, by_depth = Counter(), 0
    for tree, questions in sample(stage):
        for question in questions:
            match = PROMPT.fullmatch(question.prompt)
            parents, depths = parse(match["tree"])
            kind = relation(parents, depths, match["parent"], match["child"])
            assert question.kind == kind
            assert question.answer == ("true" if kind == "edge" else "false")
            assert question.depth == depths[match["child"]]
            kinds[kind] += 1
            lower = depths[match["parent"]] + 1 == depths[match["child"]]
            by_depth += lower == (question.answer == "true")
        answers = Counter(question.answer for question in questions)
        assert answers["true"] == answers["false"] == min(4, len(tree) - 1)
        assert len({question.prompt for question in questions}) == len(questions)
    if not stage.endswith("small"):  # there the false ones are near misses
        assert kinds["uncle"] > 0.4 * kinds["edge"]
        for kind in ("reversed", "grandparent", "sibling", "other"):
            assert 0.08 < kinds[kind] / kinds["edge"] < 0.2
        assert by_depth / sum(kinds.values()) < 0.8


@pytest.mark.parametrize("stage", ["small", "large"])
def test_reference_sampling_asks_every_ordered_pair_of_the_same_trees_once(stage):
    task = TreeTask(stage, 300, reference_sampling=True)
    for index in range(20):
        tree, questions = task.draw("train", index)
        assert tree == TreeTask(stage).draw("train", index)[0]
        pairs = {PROMPT.fullmatch(q.prompt).group("parent", "child") for q in questions}
        assert len(questions) == len(tree) * (len(tree) - 1)
        assert pairs == set(itertools.permutations(tree.names, 2))
        assert sum(q.answer == "true" for q in questions) == len(tree) - 1


def test_a_tree_is_the_same_whatever_was_drawn_before():
    task = TreeTask("medium")
    in_turn = [task.draw("train", i) for i in range(6)]
    assert [task.draw("train", i) for i in (5, 3, 4)] == [in_turn[5], in_turn[3], in_turn[4]]
    assert TreeTask("medium", 99).draw("train", 3) == in_turn[3]  # however many there will be
    assert task.question("train", 3, 9) == in_turn[3][1][9 % len(in_turn[3][1])]


def test_no_tree_is_in_two_splits_even_where_trees_are_few(tmp_path, monkeypatch):
    # Of 132 trees of two nodes: without care, splits would share some.
    monkeypatch.setattr(textualized_tree, "NAMES", tuple(a * 2 for a in "ABCDEFGHIJKL"))
    splits = {"train": 60, "valid": 20, "test": 20}
    task = TreeTask(Stage(1, 2, 1, 1), splits=splits, questions_per_tree=2)
    summary, trees = task.write(tmp_path / "data"), {}
    for split in splits:
        rows = map(json.loads, (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines())
        trees[split] = {PROMPT.fullmatch(row["prompt"])["tree"] for row in rows}
        assert summary["splits"][split]["distinct_trees"] == len(trees[split])
    assert len(trees["train"] | trees["valid"] | trees["test"]) == sum(map(len, trees.values()))
    assert (summary["trees"], summary["shared_trees"]) == (splits, 0)


def test_trees_of_earlier_splits_are_drawn_again_until_none_is_left(monkeypatch):
    task = TreeTask(Stage(1, 2, 0, 1), splits={"train": 1})  # 456,300 trees in all
    tree, _ = task.draw("train", 0)
    again, questions = task.draw("train", 0, {fingerprint(tree.text)})
    assert again.text != tree.text
    assert [q.answer for q in questions].count("true") == 1
    monkeypatch.setattr(textualized_tree, "NAMES", ("AA", "AB"))
    with pytest.raises(DataError, match="too few distinct trees"):
        task.draw("train", 0, {fingerprint("AA\n+AB"), fingerprint("AB\n+AA")})


def test_what_cannot_be_drawn_is_refused():
    for options, message in (
        ({"stage": "huge"}, "stage is 'huge', expected one of small, xsmall"),
        ({"num_trees": 1}, "1 trees, expected more than 1 for validation and 1 to test"),
        ({"questions_per_tree": 7}, "`questions_per_tree` is 7, expected an even number"),
        ({"splits": {"train": 0, "valid": 0, "test": 0}}, "expected more than"),
        ({"stage": "x3large", "max_nodes": 3}, "no tree of two nodes"),
        ({"max_nodes": 677}, "of only 676 names"),
    ):
        with pytest.raises((DataError, SettingsError), match=message):
            TreeTask(**options)
