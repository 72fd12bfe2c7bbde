"""Runs of every kind: K, LoRA or whole layers, quantized and untied bases, given adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import load_adapter
from tests.cli_runner import assert_one_error, run
from tests.tiny import qwen2_config, write_base
from tests.train_runs import (
    BASE,
    NO_DROPOUT,
    SMALL_TREES,
    log_of,
    same,
    state_of,
    tensors_of,
    train,
    trained,
)

pytestmark = pytest.mark.slow

RUN = (*SMALL_TREES, "--iters", 5, "--steps-per-report", 1, "--val-batches", 1)
K_1, FULL = ("--k", 1), ("--fine-tune-type", "full")
PROMPT = "Tree: AB\n+CD, Task: Parent/Child Relationship, Parent: AB, Child: CD, Answer: "


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Bases that are untied, 4-bit, and 4-bit with a table that is not."""
    folder = tmp_path_factory.mktemp("bases")
    quantized = {"quantization": {"group_size": 32, "bits": 4}}
    write_base(folder / "untied", qwen2_config(tie_word_embeddings=False))
    write_base(folder / "quantized", qwen2_config(**quantized))
    write_base(folder / "quantized_untied", qwen2_config(tie_word_embeddings=False, **quantized))
    return folder


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Callable[..., Path]:
    """Runs with given options, each of them made once."""
    made: dict[tuple, Path] = {}

    def get(*options: object, model: Path = BASE, yaml: str = "") -> Path:
        key = (*options, model, yaml)
        if key not in made:
            path = tmp_path_factory.mktemp("kinds") / "run"
            trained(path, *RUN, *options, model=model, yaml=yaml)
            made[key] = path
        return made[key]

    return get


def losses(path: Path) -> list[float]:
    return [loss for _, loss in log_of(path, "train_loss")]


def check_generates(path: Path, base: Path, k: int) -> None:
    prompt = path.parent / "prompt.txt"
    prompt.write_text(PROMPT)
    result = run(
        *("generate", "--model", base, "--adapter-path", path, "--k", k, prompt),
        *("--max-tokens", 4, "--json"),
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["compressed_tokens"] == -(-found["prompt_tokens"] // k)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("", K_1),
        ("", ("--k", 3, "--encoder-factor", 0.5)),
        ("", ("--encoder-context", 3)),
        ("", FULL),
        ("", (*K_1, *FULL)),
        ("", ("--num-layers", 1)),
        *((name, ()) for name in ("untied", "quantized", "quantized_untied")),
    ],
)
def test_every_kind_of_run_on_every_kind_of_base_learns_and_generates(run_of, bases, base, options):
    model = bases / base if base else BASE
    path = run_of(*options, model=model)
    assert losses(path)[-1] < 0.9 * losses(path)[0]
    k = load_adapter(path).merge.merge_factor
    assert k == (options[1] if "--k" in options else 4)
    check_generates(path, model, k)


def test_a_quantized_base_stays_as_it_is(run_of, bases):
    base = bases / "quantized"
    model, _ = load(str(base), run_of(model=base), 4)
    after = dict(tree_flatten(model.parameters()))
    for name, array in mx.load(str(base / "model.safetensors")).items():
        (found,) = [a for n, a in after.items() if _plain(n) == name]
        assert mx.array_equal(found, array), name


def _plain(name: str) -> str:
    """A parameter's name in the base: LoRA and the wrapped table put a level in between."""
    return name.replace(".linear.", ".").replace("embed_tokens.embedding.", "embed_tokens.")


def test_whole_layers_of_a_quantized_base_are_refused(tmp_path, bases):
    result = train(tmp_path / "run", *RUN, *FULL, model=bases / "quantized")
    assert_one_error(result, 1, "full fine-tuning changes model.layers.0.", "which is quantized")
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_does_not_fit_the_base_is_one_line(tmp_path):
    for yaml, said in (
        ("lora_parameters: {rank: 0}", "LoRA with rank 0 and scale 4.0: expected a whole rank"),
        ("lora_parameters: {alpha: 16}", "unknown 'alpha': mlx-lm's scale is alpha / rank"),
        ("lora_parameters: {keys: [nope]}", "does not have what the adapter changes: nope"),
        ("num_layers: 9", "--num-layers is 9, the model has 3 layers"),
        ("encoder_factor: 0.001", "--encoder-factor is 0.001, expected at least 0.00"),
    ):
        assert_one_error(train(tmp_path / "run", *RUN, yaml=yaml + "\n"), 1, said)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [(), FULL])
def test_recomputed_activations_change_no_loss_and_no_weight(run_of, kind):
    """Recomputing takes the same numbers again: only compiled rounding may differ."""
    plain = run_of(*kind, yaml=NO_DROPOUT)
    again = run_of(*kind, "--grad-checkpoint", yaml=NO_DROPOUT)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-4)
    assert same(tensors_of(plain), tensors_of(again), atol=1e-4)
    check_generates(again, BASE, 4)
    # mlx-lm's own switch would change the class of every layer of the process.
    model, _ = load(str(BASE))
    assert type(model.layers[0]).__call__.__qualname__ == "TransformerBlock.__call__"


def test_a_converted_checkpoint_is_where_a_run_begins(tmp_path, adapter_path):
    """Nothing is learnt, so what is saved is the converted adapter."""
    path = tmp_path / "run"
    trained(path, *RUN, "--init-from", adapter_path, "--learning-rate", 0)
    assert same(tensors_of(path), tensors_of(adapter_path))
    assert load_adapter(path).merge.head_lora == load_adapter(adapter_path).merge.head_lora
    check_generates(path, BASE, 4)


def test_a_run_goes_on_with_another_runs_adapter(run_of):
    first = run_of()
    second = run_of("--init-from", first)
    assert losses(second)[0] < losses(first)[2]
    assert state_of(second)["iteration"] == 5


@pytest.mark.parametrize("k", [1, 2])
def test_an_adapter_for_another_k_gives_its_lora_alone(tmp_path, adapter_path, k):
    path, start = tmp_path / "run", ("--encoder-start", "information") if k > 1 else ()
    options = ("--k", k, *start, "--init-from", adapter_path, "--learning-rate", 0)
    trained(path, *RUN, *options)
    found, given = load_adapter(path), load_adapter(adapter_path)
    assert found.merge.merge_factor == k
    assert found.merge.head_lora == given.merge.head_lora
    for one, other in (
        (found.tuning_weights, given.tuning_weights),
        (found.head_weights, given.head_weights),
    ):
        assert {n: a.tolist() for n, a in one.items()} == {n: a.tolist() for n, a in other.items()}
    if k > 1:
        assert not mx.any(found.encoder_weights["w3.weight"]).item()
        assert mx.any(found.encoder_weights["center"]).item()
    check_generates(path, BASE, k)


def test_an_adapter_of_another_kind_is_no_beginning(tmp_path, adapter_path):
    for options, said in (
        (("--encoder-context", 2), "--encoder-context is 2, the adapter has 0"),
        (("--fine-tune-type", "full"), "--fine-tune-type is full, the adapter has lora"),
    ):
        result = train(tmp_path / "run", *RUN, "--init-from", adapter_path, *options)
        assert_one_error(result, 1, said)
        assert not (tmp_path / "run").exists()
