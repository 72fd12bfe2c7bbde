"""The textualized tree: what is drawn, that every label is right, and that no split leaks."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest

from kmerge_mlx.data import trees
from kmerge_mlx.data.fingerprint import fingerprint
from kmerge_mlx.data.textualized_tree import TreeTask, draw, draw_split, write
from kmerge_mlx.data.trees import STAGES, Stage
from kmerge_mlx.errors import DataError

PROMPT = re.compile(
    r"Tree: (?P<tree>[A-Z]{2}(?:\n\++[A-Z]{2})*), Task: Parent/Child Relationship, "
    r"Parent: (?P<parent>[A-Z]{2}), Child: (?P<child>[A-Z]{2}), Answer: "
)
FIND = re.compile(
    r"Tree: (?P<tree>[A-Z]{2}(?:\n\++[A-Z]{2})*), Task: Find Parent, "
    r"Child: (?P<child>[A-Z]{2}), Answer: "
)
# The paper's table, typed from DESIGN section 9: depth, nodes, children.
LIMITS = {
    "small": (2, 3, 0, 2),
    "xsmall": (3, 5, 0, 2),
    "medium": (3, 10, 0, 3),
    "xmedium": (4, 15, 1, 3),
    "large": (4, 30, 1, 3),
    "x3large": (4, 150, 3, 5),
}


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
def sample(stage: str, count: int = 2000):
    """Trees of a stage with their questions."""
    return list(itertools.islice(draw_split(TreeTask(stage, 3 * count), "train"), count))


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


# Written down once, on Linux with Python 3.11; a row for a line break.
GOLDEN = {
    ("small", "train", 0): "MC +YD ++MB",
    ("medium", "train", 4): "BL +ZU ++NB ++SN",
    (
        "xmedium",
        "test",
        7,
    ): "BJ +JQ ++ES +++FA ++++HH ++++GX +ZO ++NX +++QF ++++QQ ++++FL ++++OH ++FG +++MN ++++BI",
}


@pytest.mark.parametrize("drawn", GOLDEN)
def test_the_trees_of_the_default_seed_are_these_forever(drawn):
    stage, split, index = drawn
    tree, _ = draw(TreeTask(stage), split, index)
    assert tree.text.replace("\n", " ") == GOLDEN[drawn]


def test_the_first_questions_of_the_default_seed_are_these_forever():
    _, questions = draw(TreeTask("small"), "train", 0)
    asked = [(*PROMPT.fullmatch(q.prompt).group("parent", "child"), q.answer) for q in questions]
    assert asked == [
        ("MC", "MB", "false"),
        ("YD", "MB", "true"),
        ("MC", "YD", "true"),
        ("YD", "MC", "false"),
    ]


def test_the_stages_are_the_papers():
    assert {
        name: (s.max_depth, s.max_nodes, s.min_children, s.max_children)
        for name, s in STAGES.items()
    } == LIMITS
    batches = {name: (s.batch_size, s.batch_size_k4) for name, s in STAGES.items()}
    assert batches["small"] == (282, 320)
    assert batches["x3large"] == (16, 16)


@pytest.mark.parametrize("stage", LIMITS)
def test_trees_stay_within_the_limits_of_their_stage_and_reach_them(stage):
    max_depth, max_nodes, min_children, max_children = LIMITS[stage]
    sizes, depths_seen, child_counts = Counter(), Counter(), Counter()
    for tree, _ in sample(stage):
        parents, depths = parse(tree.text)
        sizes[len(parents)] += 1
        depths_seen[max(depths.values())] += 1
        children = Counter(parents.values())
        for name in parents:
            if depths[name] < max_depth:
                child_counts[children[name]] += 1
    assert (min(sizes) >= 2, max(sizes)) == (True, max_nodes)
    assert max(depths_seen) == max_depth
    assert max(child_counts) == max_children
    # Room runs out under way, so a node may end with fewer children than were drawn for it.
    assert set(child_counts) == set(range(max_children + 1))
    if min_children == 0:
        assert child_counts[0] > len(sample(stage)) / 10


def test_shapes_are_as_frequent_as_the_papers_procedure_makes_them():
    # Worked out by hand for `small`. The root has 1 or 2 children (0 is drawn again). Its first
    # child has 0 or 1, and if 1, then the room is taken and a second child of the root left out.
    shapes = Counter("".join(str(d) for d in tree.depths) for tree, _ in sample("small"))
    assert set(shapes) == {"01", "012", "011"}
    for shape, share in (("01", 1 / 4), ("012", 1 / 2), ("011", 1 / 4)):
        assert abs(shapes[shape] / 2000 - share) < 0.045  # four standard deviations


def sizes_by_reference(stage: str, count: int) -> Counter[int]:
    """Sizes of trees grown by the rules of DESIGN section 9, with numpy's kind of randomness."""
    max_depth, max_nodes, low, high = LIMITS[stage]
    rng, sizes, nodes = np.random.default_rng(7), Counter(), [0]

    def grow(depth):
        if nodes[0] == max_nodes:
            return
        nodes[0] += 1
        top = min(high, max_nodes - nodes[0])
        if depth < max_depth and top >= low:
            for _ in range(rng.integers(low, top + 1)):
                grow(depth + 1)

    while sum(sizes.values()) < count:
        nodes[0] = 0
        grow(0)
        sizes.update([nodes[0]] * (nodes[0] > 1))
    return sizes


@pytest.mark.parametrize("stage", ["xsmall", "medium", "xmedium"])
def test_trees_are_as_large_as_those_of_a_second_generator(stage):
    theirs, ours = sizes_by_reference(stage, 10_000), Counter(len(t) for t, _ in sample(stage))
    for size in range(2, LIMITS[stage][1] + 1):
        expected = theirs[size] / 10_000
        error = 5 * (expected * (1 - expected) / 2000) ** 0.5 + 0.005
        assert abs(ours[size] / 2000 - expected) < error


def test_names_are_two_capitals_never_twice_in_a_tree_and_evenly_drawn():
    names = Counter()
    for tree, _ in sample("large"):
        found = [row.lstrip("+") for row in tree.text.split("\n")]
        assert len(set(found)) == len(found)
        assert all(re.fullmatch("[A-Z]{2}", name) for name in found)
        names.update(found)
    assert len(names) == 676
    mean = sum(names.values()) / 676
    assert max(abs(n - mean) for n in names.values()) < 5 * mean**0.5


@pytest.mark.parametrize("stage", LIMITS)
def test_every_label_and_kind_is_right_by_a_second_reading_of_the_tree(stage):
    for _, questions in sample(stage):
        for question in questions:
            match = PROMPT.fullmatch(question.prompt)
            parents, depths = parse(match["tree"])
            kind = relation(parents, depths, match["parent"], match["child"])
            assert question.kind == kind
            assert question.answer == ("true" if kind == "edge" else "false")
            assert question.depth == depths[match["child"]]


@pytest.mark.parametrize("stage", LIMITS)
def test_half_of_every_trees_questions_are_true_and_none_is_asked_twice(stage):
    for tree, questions in sample(stage):
        answers = Counter(question.answer for question in questions)
        assert answers["true"] == answers["false"] == min(4, len(tree) - 1)
        assert len({question.prompt for question in questions}) == len(questions)


@pytest.mark.parametrize("stage", ["medium", "xmedium", "large", "x3large"])
def test_false_questions_are_mostly_near_misses(stage):
    kinds = Counter(q.kind for _, questions in sample(stage) for q in questions)
    false = sum(kinds.values()) - kinds["edge"]
    assert kinds["uncle"] > 0.4 * false
    for kind in ("reversed", "grandparent", "sibling", "other"):
        assert 0.08 * false < kinds[kind] < 0.2 * false


@pytest.mark.parametrize("stage", ["medium", "xmedium", "large", "x3large"])
def test_counting_plus_signs_is_not_enough(stage):
    right = total = 0
    for _, questions in sample(stage):
        for question in questions:
            match = PROMPT.fullmatch(question.prompt)
            _, depths = parse(match["tree"])
            guess = depths[match["parent"]] + 1 == depths[match["child"]]
            right += guess == (question.answer == "true")
            total += 1
    assert right / total < 0.8


@pytest.mark.parametrize("stage", ["small", "medium", "large"])
def test_reference_sampling_asks_every_ordered_pair_once(stage):
    for tree, questions in itertools.islice(
        draw_split(TreeTask(stage, 300, reference_sampling=True), "train"), 50
    ):
        pairs = {PROMPT.fullmatch(q.prompt).group("parent", "child") for q in questions}
        assert len(questions) == len(tree) * (len(tree) - 1)
        assert pairs == set(itertools.permutations(tree.names, 2))
        assert sum(q.answer == "true" for q in questions) == len(tree) - 1


def test_reference_sampling_asks_about_the_same_trees():
    plain, reference = TreeTask("medium"), TreeTask("medium", reference_sampling=True)
    for index in range(20):
        assert draw(plain, "train", index)[0] == draw(reference, "train", index)[0]


def test_find_parent_is_off_by_default_and_asks_for_names_when_on():
    assert all(q.answer in ("true", "false") for _, qs in sample("medium") for q in qs)
    asked = 0
    for tree, questions in itertools.islice(draw_split(TreeTask(find_parent=3), "train"), 200):
        found = [q for q in questions if q.kind == "find_parent"]
        assert len(found) == min(3, len(tree) - 1)
        for question in found:
            match = FIND.fullmatch(question.prompt)
            assert parse(match["tree"])[0][match["child"]] == question.answer
            asked += 1
        assert len({q.prompt for q in questions}) == len(questions)
    assert asked > 400


def test_a_tree_is_the_same_whatever_was_drawn_before():
    one_by_one = [draw(TreeTask("medium"), "train", i) for i in (5, 3, 4)]
    in_turn = list(itertools.islice(draw_split(TreeTask("medium"), "train"), 6))
    assert one_by_one == [in_turn[5], in_turn[3], in_turn[4]]
    assert draw(TreeTask("medium", 99), "train", 3) == in_turn[3]  # however many there will be


def test_seeds_splits_and_stages_each_draw_trees_of_their_own():
    base = [draw(TreeTask("medium"), "train", i)[0] for i in range(20)]
    for task, split in (
        (TreeTask("medium", seed=43), "train"),
        (TreeTask("medium"), "test"),
        (TreeTask("xmedium"), "train"),
    ):
        assert not {t.text for t in base} & {draw(task, split, i)[0].text for i in range(20)}
    assert len({tree.text for tree in base}) == 20


def write_to(folder, *args, **options):
    folder.mkdir()
    return write(TreeTask(*args, **options), folder)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes_in_any_process_and_another_seed_others(tmp_path):
    summary = write_to(tmp_path / "here", "medium", 300)
    code = (
        "import sys; from pathlib import Path\n"
        "from kmerge_mlx.data.textualized_tree import TreeTask, write\n"
        "write(TreeTask('medium', 300), Path(sys.argv[1]))\n"
    )
    (tmp_path / "there").mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert {s["sha256"] for s in summary["splits"].values()} == set(
        digests(tmp_path / "here").values()
    )
    write_to(tmp_path / "other", "medium", 300, seed=43)
    assert not set(digests(tmp_path / "here").values()) & set(digests(tmp_path / "other").values())


def read_trees(path) -> list[str]:
    """The tree of every row, by the independent pattern."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    return [PROMPT.fullmatch(row["prompt"])["tree"] for row in rows]


@pytest.mark.parametrize("stage", ["small", "xsmall"])
def test_no_tree_is_in_two_splits_even_where_trees_are_few(tmp_path, stage):
    # Of 456,300 trees of two nodes, some 5,000 are drawn: without care, splits would share some.
    splits = {"train": 12_000, "valid": 4_000, "test": 4_000}
    summary = write_to(tmp_path / "data", stage, splits=splits, questions_per_tree=2)
    hashes = {
        split: {
            hashlib.sha256(t.encode()).digest()
            for t in read_trees(tmp_path / "data" / f"{split}.jsonl")
        }
        for split in splits
    }
    assert not hashes["train"] & hashes["valid"]
    assert not hashes["train"] & hashes["test"]
    assert not hashes["valid"] & hashes["test"]
    assert summary["shared_trees"] == 0
    for split, count in splits.items():
        assert summary["trees"][split] == count
        assert summary["splits"][split]["distinct_trees"] == len(hashes[split])
        assert len(hashes[split]) > 0.98 * count


def test_trees_of_earlier_splits_are_really_drawn_again():
    task = TreeTask(Stage(1, 2, 0, 1), splits={"train": 1})  # 456,300 trees in all
    tree, _ = draw(task, "train", 0)
    again, questions = draw(task, "train", 0, {fingerprint(tree.text)})
    assert again.text != tree.text
    assert [q.answer for q in questions].count("true") == 1


def test_a_stage_without_enough_trees_is_an_error_and_not_an_endless_loop(monkeypatch):
    monkeypatch.setattr(trees, "NAMES", ("AA", "AB"))
    task = TreeTask(Stage(1, 2, 1, 1), splits={"train": 1, "valid": 1, "test": 2})
    earlier = {fingerprint("AA\n+AB"), fingerprint("AB\n+AA")}
    with pytest.raises(DataError, match="too few distinct trees"):
        draw(task, "train", 0, earlier)


def test_the_summary_counts_what_is_in_the_files(tmp_path):
    summary = write_to(tmp_path / "data", "medium", 400, find_parent=1)
    for split, found in summary["splits"].items():
        rows = [
            json.loads(x) for x in (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines()
        ]
        labels = Counter(row["completion"] for row in rows)
        assert found["rows"] == len(rows)
        assert found["labels"]["true"] == found["labels"]["false"] == labels["true"]
        assert sum(found["labels"].values()) == len(rows)
        assert sum(found["negatives"].values()) == labels["false"]
        assert sum(found["depths"].values()) == len(rows)
    assert list(summary["splits"]) == ["train", "valid", "test"]
    assert summary["trees"] == {"train": 392, "valid": 4, "test": 4}


def test_a_split_of_no_trees_leaves_no_file(tmp_path):
    write_to(tmp_path / "data", splits={"train": 0, "valid": 0, "test": 3})
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["test.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "huge"}, "stage is 'huge', expected one of small, xsmall"),
        ({"num_trees": -1}, "num_trees is -1"),
        ({"num_trees": 1}, "1 trees, expected more than 1 for validation and 1 to test"),
        ({"questions_per_tree": 7}, "questions_per_tree is 7, expected an even number"),
        ({"splits": {"dev": 3}}, "dev is 3, expected train, valid, test"),
        ({"splits": {"train": 0, "valid": 0, "test": 0}}, "expected more than"),
        ({"num_trees": "9", "find_parent": -1}, "2 problems"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        TreeTask(**options)


@pytest.mark.parametrize("limits", [(0, 5, 0, 2), (3, 1, 0, 2), (3, 3, 3, 5), (3, 5, 0, 0)])
def test_a_stage_in_which_nothing_grows_is_refused(limits):
    with pytest.raises(DataError, match="no tree of two nodes"):
        Stage(*limits)
    with pytest.raises(DataError, match="only 676 names"):
        Stage(9, 677, 0, 2)
