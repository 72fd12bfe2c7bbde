"""A server of an adapter for several K: each request picks one, and gets that K's own answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from kmerge_mlx import load
from kmerge_mlx.adapters.schema import EncoderConfig
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import AdapterError, PromptError
from kmerge_mlx.generation.stream import compress
from kmerge_mlx.multi_encoder import MultiEncoder
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.virtual_tokens import MergedEmbedding
from tests.servers import FIXTURE_EOS, Address, eventually, serving
from tests.train_runs import BASE, rows_of, trained, write_data

KS = (1, 2, 4)
PROMPTS = [[*range(start, start + 37)] for start in (20, 90, 160)]
ASKED = {"merge": True, "max_tokens": 6, "logprobs": 1, "logit_bias": {FIXTURE_EOS: -100}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A set for K = 1, 2 and 4 whose encoders and LoRA have learnt something. Read-only."""
    folder = tmp_path_factory.mktemp("set")
    data = write_data(folder / "data", rows_of(40))
    options = ("--data", data, "--merges", "all", "--iters", 9, "--learning-rate", 1e-2)
    trained(folder / "run", *options, "--k", "1,2,4")
    return folder / "run"


@pytest.fixture(scope="module")
def server(whole) -> Iterator[Address]:
    with serving(BASE, whole) as address:
        yield address


@pytest.fixture(scope="module")
def alone(whole) -> dict[int, list[dict]]:
    """What a server for each K alone answers."""
    found = {}
    for k in KS:
        with serving(BASE, whole, k) as address:
            found[k] = [answer_of(address, "base", ids) for ids in PROMPTS]
            assert address.complete(model="base:k2", prompt="x").status == 404
            assert names(address) == ["base"]
    return found


def names(address: Address) -> list[str]:
    return [each["id"] for each in address.request("GET", "/v1/models").json["data"]]


def answer_of(address: Address, model: str, ids: list[int]) -> dict:
    """What the answer is, and what it cost, without what every answer has of its own."""
    answer = address.complete(model=model, prompt=ids, **ASKED)
    assert answer.status == 200, answer.body
    choice, usage = answer.json["choices"][0], answer.json["usage"]
    usage.pop("prompt_tokens_details")
    logprobs = choice["logprobs"]
    return {"tokens": logprobs["tokens"], "usage": usage, "near": logprobs["token_logprobs"]}


def same(one: dict, two: dict) -> bool:
    """Equal tokens and counts; log-probabilities as near as another batch leaves them."""
    return one | {"near": None} == two | {"near": None} and one["near"] == pytest.approx(
        two["near"], abs=1e-4
    )


def test_each_k_answers_as_a_server_for_it_alone(server, alone):
    for k in KS:
        for ids, expected in zip(PROMPTS, alone[k], strict=True):
            assert same(answer_of(server, f"base:k{k}", ids), expected)
    first = [alone[k][0] for k in KS]
    assert [a["usage"]["compressed_tokens"] for a in first] == [37, 19, 10]
    assert [a["usage"]["merged_tokens"] for a in first] == [0, 37, 37]
    assert all(not same(one, two | {"usage": one["usage"]}) for one, two in pairwise(first))


def test_requests_of_several_k_in_one_batch_get_their_own_answers(server, alone):
    jobs = [(k, i) for _ in range(3) for i in range(len(PROMPTS)) for k in KS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        ask = lambda job: answer_of(server, f"base:k{job[0]}", PROMPTS[job[1]])  # noqa: E731
        found = list(pool.map(ask, jobs))
    for (k, i), answer in zip(jobs, found, strict=True):
        assert same(answer, alone[k][i]), (k, i)


def test_a_request_without_a_k_gets_the_smallest_that_merges(server, alone):
    for model in ("base", "default_model", str(BASE)):
        assert same(answer_of(server, model, PROMPTS[0]), alone[2][0])
    answer = server.complete(prompt=PROMPTS[0], **ASKED)
    assert (answer.json["model"], answer.json["usage"]["compressed_tokens"]) == ("base:k2", 19)


def test_the_names_of_all_k_are_listed_and_no_others_are_known(server):
    assert names(server) == ["base", "base:k1", "base:k2", "base:k4"]
    for wanted, known in (
        ("base:k4", "base:k4"),
        ("default_model:k4", "base:k4"),
        ("base", "base:k2"),
    ):
        assert server.request("GET", f"/v1/models/{wanted}").json["id"] == known
    for wanted in ("base:k3", "base:k", "base:4", "k4", "base:k4:k4"):
        assert server.request("GET", f"/v1/models/{wanted}").status == 404
        answer = server.complete(model=wanted, prompt="x")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert answer.error["message"].endswith("expected base:k2, base:k1, base:k4")


def test_a_chat_has_the_k_of_its_model_in_the_answer_and_in_each_chunk(server):
    messages = [{"role": "user", "content": "Tree: AB and 7. " * 4}]
    client, counts = server.client(), []
    for k in KS:
        asked = {"model": f"base:k{k}", "messages": messages, "max_tokens": 2}
        whole = client.chat.completions.create(**asked)
        assert whole.model == f"base:k{k}"
        counts.append(whole.usage.compressed_tokens)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert {chunk.model for chunk in chunks} == {f"base:k{k}"}
    assert counts[0] > 1.8 * counts[1] > 3 * counts[2]


def test_a_layout_is_that_of_the_k_that_is_asked_for(server, alone):
    for k in KS:
        asked = {"model": f"base:k{k}", "prompt": PROMPTS[0], "merge": True}
        found = server.request("POST", "/v1/layout", asked).json
        assert (found["model"], found["merge_factor"]) == (f"base:k{k}", k)
        assert found["compressed_tokens"] == alone[k][0]["usage"]["compressed_tokens"]
        assert max(len(texts) for s in found["segments"] for texts in s["blocks"]) == k


def test_a_cached_prefix_is_of_its_own_k(whole):
    """A prompt that was read at one K is new at another, and known when it comes again."""
    with serving(BASE, whole) as server:
        for ids, seen in ((PROMPTS[0], False), (PROMPTS[0], True)):
            for k in KS:
                usage = server.complete(model=f"base:k{k}", prompt=ids, **ASKED).json["usage"]
                assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == seen


def test_slots_of_one_k_are_counted_for_that_k(whole):
    with serving(BASE, whole, max_blocks=16) as server:
        ids = [*range(10, 50)]
        for k, status in ((4, 200), (2, 400), (1, 200)):
            answer = server.complete(model=f"base:k{k}", prompt=ids, merge=True, max_tokens=1)
            assert answer.status == status
        assert "20 distinct blocks" in server.complete(prompt=ids, merge=True).error["message"]


def test_the_longest_prompt_is_that_of_its_k(server):
    most = server.server.service.provider.model.context_length
    ids = [5] * (most + 8)
    for k, status in ((1, 400), (2, 200)):
        answer = server.complete(model=f"base:k{k}", prompt=ids, merge=True, max_tokens=1)
        assert answer.status == status


@pytest.mark.parametrize("name", ["adapters.safetensors", "merge_encoder.safetensors"])
def test_adapters_that_were_not_trained_together_need_a_k(tmp_path, whole, name):
    path = Path(shutil.copytree(whole, tmp_path / "set"))
    file = str(path / "k4" / name)
    tensors = mx.load(file)
    mx.save_safetensors(file, {n: a + ("lora_b" in n) for n, a in tensors.items()})
    said = "K = 1, 2, 4, which were not trained together: choose one with `k`"
    with pytest.raises(AdapterError, match=said), serving(BASE, path):
        pass
    with serving(BASE, path, 4) as server:
        assert server.complete(prompt=PROMPTS[0], **ASKED).status == 200


# The encoders of a set, in one table


def test_blocks_of_two_encoders_that_read_the_same_ids_are_two_blocks():
    """K = 2 after two tokens before it, and K = 4 alone: both read four ids."""
    mx.random.seed(1)
    encoders = {
        2: MergeEncoder(EncoderConfig(2, 8, 12, 2)),
        4: MergeEncoder(EncoderConfig(4, 8, 12)),
    }
    for encoder in encoders.values():
        encoder.update(tree_map(lambda a: mx.random.normal(a.shape), encoder.parameters()))
    table = nn.Embedding(30, 8)
    merged = MergedEmbedding(table, MultiEncoder(encoders), pad_token_id=0)
    ids = [0, 0, 5, 6, 0, 0, 5, 6]
    prompts = {k: merged.compress([Segment(ids)], k) for k in (1, 2, 4)}
    assert prompts[1].ids == ids
    assert [len(prompts[k].ids) for k in (2, 4)] == [4, 2]
    assert not {*prompts[2].ids} & {*prompts[4].ids}
    for k, encoder in encoders.items():
        plain = MergedEmbedding(table, encoder, pad_token_id=0)
        expected = plain(mx.array(plain.compress([Segment(ids)]).ids))
        assert mx.allclose(merged(mx.array(prompts[k].ids)), expected, rtol=0, atol=1e-6).item()
    assert merged.compress([Segment(ids)]).ids == prompts[2].ids  # the smallest is its own
    assert merged.merge_factor == 2


def test_encoders_of_two_widths_are_refused():
    encoders = {k: MergeEncoder(EncoderConfig(k, 8 * k, 12)) for k in (2, 4)}
    with pytest.raises(AdapterError, match="hidden_size"):
        MultiEncoder(encoders)


def test_a_model_of_one_k_reads_at_that_k_or_unmerged(whole):
    model, tokenizer = load(str(BASE), whole, 4)
    own, unmerged, default = (compress(model, tokenizer, PROMPTS[0], k) for k in (4, 1, None))
    assert own.ids == default.ids
    assert unmerged.ids == PROMPTS[0]
    for k in (2, "4"):
        with pytest.raises(PromptError, match=r"`k` is .*, this model reads prompts at K = 1, 4"):
            compress(model, tokenizer, PROMPTS[0], k)


def test_a_restarted_server_reads_each_prefix_of_a_folder_at_its_own_k(whole, alone, tmp_path):
    def cached(server: Address, k: int) -> int:
        answer = server.complete(model=f"base:k{k}", prompt=PROMPTS[0], **ASKED)
        return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    for restarted in (False, True):
        with serving(BASE, whole, prompt_cache_dir=str(tmp_path / "kept")) as server:
            for k in KS:
                assert (cached(server, k) > 30) == restarted, k
                assert same(answer_of(server, f"base:k{k}", PROMPTS[0]), alone[k][0])
            busy = server.server.service.generator.folder.flushing()
            eventually(lambda busy=busy: not busy())
    assert len([*(tmp_path / "kept").glob("*.safetensors")]) == len(KS)
