"""The settings: mlx-lm's defaults, and a key that cannot be wrong without a word."""

from __future__ import annotations

import argparse
from unittest import mock

import pytest
from mlx_lm import server as host

from kmerge_mlx.errors import ServeError
from kmerge_mlx.serving.settings import ServeSettings, read_api_key


def test_defaults_are_mlx_lms():
    made = []
    parse = argparse.ArgumentParser.parse_args

    def note(parser: argparse.ArgumentParser, *args: object) -> None:
        made.append(vars(parse(parser, [])))
        raise SystemExit

    with mock.patch.object(argparse.ArgumentParser, "parse_args", note), pytest.raises(SystemExit):
        host.main()
    (theirs,) = made
    ours = vars(ServeSettings())
    # No origin is allowed by default: any web page could drive the model otherwise.
    shared = ours.keys() & theirs.keys() - {"allowed_origins", "chat_template"}
    theirs["chat_template_args"] = {}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert len(shared) == 20


def test_a_key_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("sesame\n")
    monkeypatch.setenv("KMERGE_MLX_API_KEY", "other")
    assert (read_api_key(str(file)), read_api_key(None)) == ("sesame", "other")
    file.write_text("  sesame \n")
    monkeypatch.setenv("KMERGE_MLX_API_KEY", " other  ")  # no client could send the spaces
    assert (read_api_key(str(file)), read_api_key(None)) == ("sesame", "other")
    with pytest.raises(ServeError, match="over 4,096 characters"):
        read_api_key("/dev/zero")
    for content in (b"\n", b"caf\xc3\xa9", b"\xff", b"x" * 5000):
        file.write_bytes(content)
        with pytest.raises(ServeError, match="`api_key`"):
            read_api_key(str(file))
    monkeypatch.delenv("KMERGE_MLX_API_KEY")
    assert read_api_key(None) is None
