"""A model folder that carries its adapter: every command finds it, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.model import load_source, unfreeze
from kmerge_mlx.source import Source
from tests.cli_runner import assert_one_error, run
from tests.hub_server import running_hub, using
from tests.train_runs import SMALL_TREES, train

TEXT = "Tree: JN\n+WO\n++UP\n++JG\n" * 6


@pytest.fixture(scope="module")
def home(tmp_path_factory, base_path, adapter_path) -> Path:
    """The fixture's base and adapter: fused, quantized with a packed encoder, and a text."""
    home = tmp_path_factory.mktemp("carried")
    (home / "text.txt").write_text(TEXT)
    named = ("--model", base_path, "--adapter-path", adapter_path, "--k", 4)
    done = run("fuse", *named, "--save-path", home / "fused", home / "text.txt")
    assert (done.code, done.out) == (0, ""), done.err
    lines = done.err.splitlines()
    assert lines[0] == f"{home}/fused: floating-point weights, the merge encoder for K = 4"
    assert lines[1] == "Drift on your text:"
    assert lines[2] == (
        "  merged embeddings moved by 0.000% of their length, 0.000% at most (23 blocks)"
    )
    assert "the likeliest token stayed at 100.0% of 23 positions" in lines[3]
    assert lines[5].startswith("note: the output head had LoRA of its own, so it is no longer")
    done = run("quantize", *named, "--mlx-path", home / "q", "--q-bits", 8, "--encoder-bits", 8)
    assert (done.code, done.out) == (0, ""), done.err
    assert "bits per weight, the adapter for K = 4\nDrift on random tokens:" in done.err
    assert "note: the embedding table is the output head as well, and neither is" in done.err
    return home


def answer(*args: object) -> dict:
    done = run("generate", *args, "--json", "-m", 8)
    assert (done.code, done.err) == (0, ""), done.err
    found = json.loads(done.out)
    return {name: found[name] for name in ("tokens", "prompt_tokens", "compressed_tokens")}


def test_generate_finds_it_by_the_model_alone(home, base_path, adapter_path):
    text = home / "text.txt"
    wanted = answer("--model", base_path, "--adapter-path", adapter_path, text)
    assert wanted["compressed_tokens"] * 4 >= wanted["prompt_tokens"] > wanted["compressed_tokens"]
    fused = home / "fused"
    assert answer("--model", fused, text) == wanted
    assert answer("--model", fused, "--adapter-path", fused, "--k", 4, text) == wanted
    assert answer("--adapter-path", fused, text) == wanted
    assert answer("--adapter-path", fused / "kmerge", text) == wanted
    assert answer("--model", home / "q", text) == wanted


def test_an_adapter_that_is_named_comes_first(home, base_path, adapter_path, tmp_path):
    text = home / "text.txt"
    done = run("generate", "--model", home / "q", "--adapter-path", adapter_path, text)
    assert done.code == 0
    said = run("generate", "--model", home / "fused", "--k", 3, text)
    assert_one_error(said, 1, "3: it has K = 4")
    for command in ("generate", "chat"):
        said = run(command, "--model", base_path, text)
        assert_one_error(said, 1, "a FILE merges, and there is no merge encoder: ")


def test_cache_chat_evaluate_and_bench_find_it(home, tmp_path):
    kept = tmp_path / "c.safetensors"
    done = run("cache", home / "text.txt", "--model", home / "fused", "--prompt-cache-file", kept)
    assert done.code == 0, done.err
    done = run("generate", "--prompt-cache-file", kept, "-p", "One?", "-m", 2)
    assert done.code == 0, done.err
    assert "Cache: 92 tokens in 25 positions" in done.err
    done = run("chat", home / "text.txt", "--model", home / "fused", "-m", 2, stdin=b"A?\n/stats\n")
    assert done.code == 0, done.err
    assert "K=4, merges all" in done.err
    few = ("--task", "textualized-tree", "--stage", "small", "--num-trees", 4)
    done = run("evaluate", "--model", home / "q", *few, "--baseline", "mean", "--json")
    assert done.code == 0, done.err
    assert {row["method"] for row in json.loads(done.out)["rows"]} == {"merged", "mean"}
    done = run("bench", "--model", home / "q", "--length", 16, "-n", 1, "-g", 2, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["settings"]["adapter_path"] == str(home / "q" / "kmerge")
    assert found["encoders"][0]["encoder_quantization"] == {"bits": 8, "group_size": 64}
    assert found["encoders"][0]["dtype"] == "float32"


def test_info_says_what_the_model_and_the_adapter_are(home):
    found = json.loads(run("info", home / "q", "--json").out)
    assert (found["kind"], found["quantization_bits"]) == ("model with its adapter", 8)
    (adapter,) = found["adapters"]
    assert adapter["encoder_quantization"] == {"bits": 8, "group_size": 64}
    assert (adapter["merge_factor"], adapter["dtype"]) == (4, "float32")
    lines = [" ".join(line.split()) for line in run("info", home / "q").out.splitlines()]
    assert lines[0] == f"{home}/q: model with its adapter"
    assert {"quantization 8 bits", "K = 4", "base the model around it"} <= set(lines)
    (encoder,) = [line for line in lines if line.startswith("encoder ")]
    assert encoder.endswith("213,696 parameters, 0.2 MB at 8 bits")


def test_a_hub_repo_carries_it_too(home, tmp_path):
    wanted = answer("--model", home / "fused", home / "text.txt")
    with running_hub(fused=home / "fused") as hub, using(hub, tmp_path / "hf"):
        assert answer("--model", "user/fused", home / "text.txt") == wanted


def test_training_says_that_it_starts_without_it(home, tmp_path):
    rows = json.dumps({"prompt": "One two three four five six.", "completion": "seven"}) + "\n"
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(rows * 4)
    named = ("--model", home / "fused", "--data", tmp_path / "data", "--k", 4)
    done = run("train", *named, "--adapter-path", tmp_path / "run", "--iters", 1)
    assert done.code == 0, done.err
    first, *rest = " ".join(done.err.split()).partition("Starting: ")
    assert f"note: the adapter that {home / 'fused'} carries is not trained on" in first
    assert rest[0]


def test_evaluate_does_not_call_a_fused_model_a_base_without_adapter(home, tmp_path):
    rows = json.dumps({"prompt": "One two three four five six.", "completion": "seven"}) + "\n"
    (tmp_path / "test.jsonl").write_text(rows * 2)
    asked = ("--data", tmp_path, "--timed", 0, "--baseline", "uncompressed")
    for name, called in (("fused", "model alone"), ("q", "base without adapter")):
        table = run("evaluate", "--model", home / name, *asked).out
        assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [called, "K=4"]


def test_it_is_not_uploaded_without_its_model(home):
    named = ("--license", "mit", "--base-model", "user/base", "--dry-run")
    for adapter in (home / "fused", home / "fused" / "kmerge"):
        done = run("upload", adapter, "me/mine", *named)
        assert_one_error(done, 1, "carries its adapter", "hf upload me/mine")


# A packed encoder is read with, and nothing else


def test_a_packed_encoder_is_not_trained_on(home, base_path, tmp_path):
    options = ("--init-from", home / "q", "--k", 4, *SMALL_TREES, "--iters", 1)
    said = train(tmp_path / "run", *options, model=base_path)
    assert_one_error(said, 1, "--init-from: the merge encoder is quantized to 8 bits, and cannot")
    assert not (tmp_path / "run").exists()
    model, *_ = load_source(Source.find(str(home / "q"), home / "q"), fold=False)
    with pytest.raises(AdapterError, match="quantized to 8 bits, and cannot be trained: take the"):
        unfreeze(model, load_adapter(home / "q").tuning)


# What cannot be fused or quantized is one message


def test_what_cannot_work_is_one_message(tmp_path, monkeypatch, base_path, adapter_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("One")
    (tmp_path / "empty.txt").write_text("")
    fuse, quantize = ("fuse", "--adapter-path", adapter_path), ("quantize", "--model", base_path)
    for args, said in (
        (("fuse", "--model", base_path), "carries no adapter to fuse: give --adapter-path"),
        ((*fuse, "--save-path", base_path), "--save-path"),
        ((*fuse, "--save-path", "text.txt/x"), "cannot write text."),
        ((*quantize, "empty.txt"), "empty.txt is empty"),
        ((*quantize, "--mlx-path", "text.txt", "--force"), "text.txt"),
    ):
        assert_one_error(run(*args), 1, said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "text.txt"]
    for option in (("--q-mode", "gptq"), ("--encoder-bits", 7), ("--q-bits", 0)):
        assert_one_error(run("quantize", "--model", "x", *option), 2, option[0])
