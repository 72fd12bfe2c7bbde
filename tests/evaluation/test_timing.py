"""Which prompts are timed, and what a time includes."""

from __future__ import annotations

import pytest

from kmerge_mlx import load
from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.evaluation import scoring
from kmerge_mlx.evaluation.baselines import METHODS
from tests.evaluations import Folders, measured, write_data


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """The methods and lengths of the prompts that are timed, each of which takes its number."""
    seen: list[tuple[str, int]] = []

    def seconds(self, method, segments):
        seen.append((method.name, sum(len(segment.ids) for segment in segments)))
        return float(len(seen))

    monkeypatch.setattr(scoring.Scorer, "seconds", seconds)
    return seen


def test_prompts_of_all_lengths_are_timed_after_one_that_warms_up(tmp_path, folders, asked):
    rows = [{"prompt": "AB " * (i + 1), "completion": f"{i} x"} for i in range(9)]
    data = str(write_data(tmp_path / "data", rows))
    settings = folders.settings(k=(4,), data=data, baseline=("truncate",), max_tokens=1)
    report = measured(**settings, timed=3)
    sizes = [size for name, size in asked if name == "merged"]
    lengths = sorted(batch_lengths(folders, rows))
    assert sizes == [lengths[1], lengths[1], lengths[4], lengths[7]]
    assert {name for name, _ in asked} == {"merged", "truncate"}
    for row in report.rows:
        spread = row.time_to_first_token["data"]
        assert (spread.median, spread.min, spread.max) == (spread.trials[1], *spread.trials[::2])
    assert len(measured(**settings, timed=99).rows[0].time_to_first_token["data"].trials) == 9
    named = report.to_json()["rows"][0]["time_to_first_token"]["data"]
    assert set(named) == {"median", "min", "max", "trials"}


def batch_lengths(folders: Folders, rows: list[dict]) -> list[int]:
    _, tokenizer = load(str(folders.base))
    return [len(tokenize(tokenizer, RowFormat().read(row)).prompt_ids) for row in rows]


def test_needles_at_other_depths_of_one_length_are_not_timed_again(folders, asked):
    recall = {"task": "recall", "length": (200, 400), "depth": (0, 1), "num_needles": 3}
    report = measured(model=str(folders.base), **recall, timed=2, max_tokens=1)
    assert len(asked) == 1 + 2 * 2
    times = [spread.trials for spread in report.rows[0].time_to_first_token.values()]
    assert times == [(2, 3), (2, 3), (4, 5), (4, 5)]


def test_the_time_of_a_method_includes_its_own_pass(monkeypatch, folders, rows):
    model, tokenizer = load(str(folders.base), folders.adapters, 1)
    passes, plain = [], scoring.time_reading

    def timed(model, compress):
        before = len(passes)
        reading = plain(model, compress)
        assert len(passes) == before + 1
        return reading

    class Watched(METHODS["selective-context"]):
        def weigh(self, model, ids):
            passes.append(ids.size)
            return super().weigh(model, ids)

    monkeypatch.setattr(scoring, "time_reading", timed)
    assert scoring.Scorer(model, tokenizer, 1).seconds(Watched(2), rows[0].segments) > 0
    assert passes == [len(rows[0].prompt_ids)]
