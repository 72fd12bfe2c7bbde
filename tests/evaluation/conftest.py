"""Adapters and questions that several modules measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmerge_mlx import load
from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.layout import TokenizedExample, tokenize
from tests.evaluations import QUESTIONS, Folders, questions_of, write_data, write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return write_folders(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("a") / "data", questions_of(QUESTIONS))


@pytest.fixture(scope="module")
def rows(folders, data) -> list[TokenizedExample]:
    """The questions as ids."""
    _, tokenizer = load(str(folders.base))
    lines = (data / "test.jsonl").read_text().splitlines()
    return [tokenize(tokenizer, RowFormat().read(json.loads(line))) for line in lines]
