"""The server's parts by themselves: settings, metrics, stop texts, what is taken from mlx-lm."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from unittest import mock

import pytest
from mlx_lm import server as host
from mlx_lm.models.cache import KVCache
from mlx_lm.server import Response

from kmerge_mlx.errors import ServeError
from kmerge_mlx.serving.caches import PromptCache
from kmerge_mlx.serving.generator import _rebound
from kmerge_mlx.serving.metrics import Metrics
from kmerge_mlx.serving.settings import ServeConfig
from kmerge_mlx.serving.stops import cut_at_stops


def test_defaults_are_mlx_lms():
    made = []
    parse = argparse.ArgumentParser.parse_args

    def note(parser: argparse.ArgumentParser, *args: object) -> None:
        made.append(vars(parse(parser, [])))
        raise SystemExit

    with mock.patch.object(argparse.ArgumentParser, "parse_args", note), pytest.raises(SystemExit):
        host.main()
    (theirs,) = made
    ours = vars(ServeConfig())
    # A web page that anybody wrote may not drive the model: no origin is allowed by default.
    shared = ours.keys() & theirs.keys() - {"allowed_origins", "chat_template"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert len(shared) == 17


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", 65_536),
        ("temp", float("nan")),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("kv_bits", 7),
        ("merges", "some"),
        ("request_timeout", 0),
        ("read_timeout", float("inf")),
        ("max_queue", -1),
        ("api_key", " "),
        ("api_key", "caf\u00e9"),
        ("log_level", "loud"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(setting, value):
    with pytest.raises(ServeError, match=setting):
        ServeConfig(**{setting: value})


def test_all_wrong_settings_are_listed_at_once():
    with pytest.raises(ServeError, match=r"2 problems\n  - port .*\n  - max_queue "):
        ServeConfig(port=-1, max_queue=-1)


def test_a_key_is_not_in_what_is_printed_of_the_settings():
    assert "sesame" not in repr(ServeConfig(api_key="sesame"))
    assert len(fields(ServeConfig)) == len(vars(ServeConfig()))


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.add("requests_total", 2, "/v1/completions", "200")
    metrics.set("block_slots", 131_072)
    for seconds in (0.004, 0.03, 1000.0):
        metrics.observe("request_duration_seconds", seconds)
    lines = metrics.text().splitlines()
    assert 'kmerge_mlx_requests_total{endpoint="/v1/completions",status="200"} 2' in lines
    assert "kmerge_mlx_block_slots 131072" in lines
    assert "kmerge_mlx_prompt_tokens_total 0" in lines
    name = "kmerge_mlx_request_duration_seconds"
    assert f'{name}_bucket{{le="0.005"}} 1' in lines
    assert f'{name}_bucket{{le="0.05"}} 2' in lines
    assert f'{name}_bucket{{le="300"}} 2' in lines
    assert f'{name}_bucket{{le="+Inf"}} 3' in lines
    assert f"{name}_count 3" in lines
    assert f"{name}_sum 1000.034" in lines
    assert metrics.text().endswith("\n")


def pieces(*texts: str, end: str = "length") -> list[Response]:
    ends = [None] * (len(texts) - 1) + [end]
    return [Response(t, i, -1.0, e, ()) for i, (t, e) in enumerate(zip(texts, ends, strict=True))]


@pytest.mark.parametrize(
    ("texts", "stops", "left", "end"),
    [
        (("ab", "cd", "ef"), [], "abcdef", "length"),
        (("ab", "cd", "ef"), ["zz"], "abcdef", "length"),
        (("ab", "cd", "ef"), ["cd"], "abcd", "stop"),
        (("ab", "cd", "ef"), ["bcd"], "abcd", "stop"),
        (("ab", "cd", "ef"), ["d", "c"], "abc", "stop"),
        (("ab", "cd", "ef"), ["ef"], "abcdef", "stop"),
        (("a", "a", "a", "b"), ["aab"], "aaab", "stop"),
    ],
)
def test_an_answer_is_cut_after_its_first_stop_text(texts, stops, left, end):
    got = list(cut_at_stops(pieces(*texts), stops))
    assert "".join(response.text for response in got) == left
    assert got[-1].finish_reason == end
    assert [r.finish_reason for r in got[:-1]] == [None] * (len(got) - 1)
    counted = [response.token for response in got if response.token >= 0]
    assert counted == sorted(set(counted))


def test_text_that_the_detokenizer_kept_back_is_not_lost_at_the_end():
    *_, kept, last = cut_at_stops(pieces("ab", "cd", end="stop"), [])
    assert (kept.text, kept.finish_reason, kept.token) == ("cd", None, 1)
    assert (last.text, last.finish_reason, last.token) == ("", "stop", -1)


def test_a_prompt_that_is_cached_whole_leaves_something_to_read():
    cache = PromptCache(4, None, Metrics())

    def filled(tokens: list[int]) -> list[KVCache]:
        import mlx.core as mx

        kv = KVCache()
        kv.update_and_fetch(*[mx.zeros((1, 1, len(tokens), 4))] * 2)
        return [kv]

    cache.insert_cache("m", [1, 2, 3, 4], filled([1, 2, 3, 4]))
    for tokens in ([1, 2, 3, 4], [1, 2, 3], [1], [1, 2, 3, 4, 5], [9]):
        kept, rest = cache.fetch_nearest_cache("m", tokens)
        assert rest == tokens[len(tokens) - len(rest) :]
        assert len(rest) >= 1
        assert (kept[0].offset if kept else 0) == len(tokens) - len(rest)
    assert list(cache.cached_ids()) == [[1, 2, 3, 4]]
    cache.clear()
    assert list(cache.cached_ids()) == []


def test_mlx_lms_own_module_stays_as_it_is():
    before = dict(vars(host))
    own = _rebound(host.ResponseGenerator._generate, _make_logits_processors=None)
    assert own.__globals__["_make_logits_processors"] is None
    assert vars(host) == before


def test_a_name_that_mlx_lm_no_longer_uses_is_an_error():
    with pytest.raises(ImportError, match="no longer uses"):
        _rebound(host.ResponseGenerator._generate, gone=None)


def test_the_settings_do_not_import_mlx():
    import subprocess

    code = "import sys, kmerge_mlx.cli.serve; assert not {'mlx', 'mlx_lm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
