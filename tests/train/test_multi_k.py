"""Training for several K at once: one LoRA, an encoder for each K, one set of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import FILES, find_adapters, load_adapter, look_up, share_tuning
from kmerge_mlx.cli.train import TrainingBar
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.errors import SettingsError, TrainError
from kmerge_mlx.model import merged_embedding, unfreeze
from kmerge_mlx.train.checkpoint import read_state
from kmerge_mlx.train.dataset import TokenizedSet
from kmerge_mlx.train.loop import Validator
from kmerge_mlx.train.loss import answer_loss
from kmerge_mlx.train.multi_k import drawn
from kmerge_mlx.train.prepare import prepare
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Place, make_batch, shuffled
from kmerge_mlx.train.settings import TrainSettings
from tests.cli_runner import assert_one_error, change_json, run
from tests.kills import Writer
from tests.train import test_ranks
from tests.train.test_killed import OPTIONS, SAVES, content
from tests.train_runs import (
    BASE,
    NO_DROPOUT,
    log_of,
    rows_of,
    same,
    state_of,
    tensors_of,
    train,
    trained,
    write_data,
)

KS = (2, 3, 4)
QUIET = ("--val-batches", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run for K = 2, 3 and 4 to its end, beside its data. Read-only."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_data(folder / "data", rows_of(64), rows_of(20, 64))
    options = ("--data", data, "--batch-size", 8, "--iters", 14, "--learning-rate", 3e-3)
    trained(
        *(folder / "run", *options, "--k", "2,3,4", "--merges", "all", "--save-every", 10),
        *("--steps-per-report", 5, "--steps-per-eval", 12, "--val-batches", -1),
    )
    return folder / "run"


def test_each_k_comes_once_in_every_round_and_follows_from_seed_and_iteration_alone():
    found = [drawn(KS, 5, i) for i in range(1, 301)]
    assert all(sorted(found[i : i + 3]) == [*KS] for i in range(0, 300, 3))
    assert len({tuple(found[i : i + 3]) for i in range(0, 300, 3)}) == 6
    assert [drawn(KS, 5, i) for i in reversed(range(1, 301))] == found[::-1]
    assert [drawn(KS, 6, i) for i in range(1, 301)] != found
    assert drawn((4,), 5, 7) == 4


def test_the_folder_is_a_set_of_adapters_that_differ_in_their_encoders_alone(whole):
    assert {path.name for path in whole.iterdir()} == {"k2", "k3", "k4", "best", "training"}
    for place in (whole, whole / "best"):
        for k in KS:
            assert {path.name for path in (place / f"k{k}").iterdir()} == set(FILES)
        assert [*find_adapters(place)] == [*KS]
        adapters = {k: load_adapter(place, k) for k in KS}
        assert share_tuning([*adapters.values()])
        for k, adapter in adapters.items():
            assert adapter.merge.merge_factor == k
            assert adapter.merge.provenance["k"] == [*KS]
            assert adapter.encoder_weights["w3.weight"].any().item()
            assert adapter.head_weights["lora_b"].any().item()
            read = look_up(place / f"k{k}").choose()[1]
            assert Path(read.base.id).resolve() == BASE.resolve()  # a path from a deeper folder


def test_each_ks_validation_is_logged_beside_the_mean_that_decides(whole):
    losses = {k: dict(log_of(whole, f"val_loss_k{k}")) for k in KS}
    means, best = dict(log_of(whole, "val_loss")), state_of(whole)["best_iteration"]
    assert [*means] == [0, 12, 14]
    for iteration, mean in means.items():
        assert mean == pytest.approx(sum(losses[k][iteration] for k in KS) / 3)
    assert means[best] == min(means.values()) == state_of(whole)["best_score"]
    for k in KS:
        model, tokenizer = load(str(BASE), whole / "best", k)
        pad = json.loads((whole / f"k{k}" / "merge_config.json").read_text())["pad_token_id"]
        examples = load_examples(whole.parent / "data")["valid"]
        rows = TokenizedSet(examples, tokenizer, TrainSettings(merges="all", k=k))
        batch = lambda indices, found, k=k, pad=pad: make_batch(found, k, pad, 700)  # noqa: E731
        measure = Validator(model, rows, 4, k, batch, Ranks())
        assert measure().loss == pytest.approx(losses[k][best], rel=1e-5)


def test_what_a_batch_teaches_is_what_its_k_alone_teaches(tmp_path):
    """Six batches in groups of two, by hand: each with one plain encoder in the set's place."""
    data, rate = write_data(tmp_path / "data", rows_of(30)), 0.05
    given = {"model": str(BASE), "data": str(data), "k": [2, 4], "batch_size": 4, "seed": 3}
    given |= {"lora_parameters": {"dropout": 0.0}, "adapter_path": str(tmp_path / "none")}
    given |= {"merges": "all", "max_grad_norm": 0.0}
    hand = prepare(TrainSettings.of(given))
    unfreeze(hand.model, hand.tuning)
    merged = merged_embedding(hand.model)
    several = merged.encoder
    batches, groups = shuffled(hand.stages[0].train, 4, 2, (3, 0), Place()), []
    for group in ((1, 2), (3, 4), (5, 6)):
        sums, tokens = {}, 0
        for iteration in group:
            k = drawn((2, 4), 3, iteration)
            batch = make_batch(next(batches).examples, k, hand.merge.pad_token_id, 700)
            merged.encoder = several.of(k)
            loss = lambda model, batch=batch: answer_loss(model, batch)[0]  # noqa: E731
            _, gradients = nn.value_and_grad(hand.model, loss)(hand.model)
            tokens += batch.weights.sum().item()
            for name, array in tree_flatten(gradients):
                at = name.replace(".encoder.", f".encoder.k{k}.")
                sums[at] = sums.get(at, 0) + array
        merged.encoder = several
        groups.append({k for k in (2, 4) if any(f".k{k}." in name for name in sums)})
        weights = dict(tree_flatten(hand.model.trainable_parameters()))
        new = [(name, weights[name] - rate * total / tokens) for name, total in sums.items()]
        hand.model.load_weights(new, strict=False)
    assert groups == [{2, 4}] * 3
    path = tmp_path / "run"
    options = ("--data", data, "--batch-size", 4, "--grad-accumulation-steps", 2, "--seed", 3)
    trained(
        *(path, *options, "--k", "2,4", "--iters", 6, "--merges", "all", "--max-grad-norm", 0),
        *("--optimizer", "sgd", "--learning-rate", rate),
        yaml=NO_DROPOUT,
    )
    for k in (2, 4):
        found = {n.partition(".")[2]: a for n, a in tensors_of(path / f"k{k}").items()}
        for name, array in tree_flatten(hand.model.trainable_parameters()):
            if f".encoder.k{6 - k}." not in name:
                name = name.removeprefix("model.embed_tokens.").removeprefix(f"encoder.k{k}.")
                assert mx.abs(found[name] - array).max().item() < 1e-5, name


def part(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The encoder's."""
    return {name: array for name, array in tensors.items() if name.startswith("encoder.")}


def test_an_encoder_stays_as_it_is_where_no_batch_of_an_update_had_its_k(tmp_path):
    """AdamW would move it by what it remembers."""
    data, path = write_data(tmp_path / "data", rows_of(30)), tmp_path / "run"
    options = ("--data", data, "--k", "2,4", "--merges", "all", "--learning-rate", 1e-2, *QUIET)
    before = None
    for iteration in range(1, 7):
        trained(path, *options, "--iters", iteration, "--resume")
        now = {k: tensors_of(path / f"k{k}") for k in (2, 4)}
        k = drawn((2, 4), 0, iteration)
        if before is not None:
            assert same(part(before[6 - k]), part(now[6 - k]))
            assert not same(part(before[k]), part(now[k]))
        before = now


HARD = (
    *("--k", "1,2,4", "--merges", "all", "--batch-size", 4, "--grad-accumulation-steps", 3),
    *("--encoder-learning-rate", 1e-3, "--learning-rate", 1e-2, "--steps-per-report", 2),
    *("--encoder-warmup", 4, "--encoder-warmup-loss", "reconstruction", "--encoder-context", 1),
    *("--encoder-start", "information", "--steps-per-eval", 3, "--save-every", 1),
)


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, monkeypatch):
    """Broken in every phase and in the midst of groups; with dropout, and two optimizers."""
    data = write_data(tmp_path / "data", rows_of(20), rows_of(8, 20))
    options = ("--data", data, *HARD, "--iters", 11, "--resume")
    trained(tmp_path / "unbroken", *options)
    for end in (1, 2, 3, 5, 6, 9):

        def stop(bar: TrainingBar, iteration: int, end: int = end) -> None:
            if iteration == end:
                raise TrainError("stopped")

        monkeypatch.setattr(TrainingBar, "on_iteration", stop)
        assert train(tmp_path / "broken", *options).err.endswith("error: stopped\n")
        assert state_of(tmp_path / "broken")["iteration"] == end
    monkeypatch.undo()
    trained(tmp_path / "broken", *options)
    assert content(tmp_path / "broken") == content(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_a_whole_set_and_ends_with_the_bits_of_an_unbroken_one(
    tmp_path,
):
    """Killed at steps on the disk through the first save and the second."""
    kills, wholes = 12, 0
    path, unbroken = tmp_path / "killed" / "run", tmp_path / "unbroken" / "run"
    options = [*map(str, OPTIONS)]
    options[options.index("--k") + 1] = "2,4"
    for place in (path, unbroken):
        place.parent.mkdir()
    with Writer() as write:
        code, steps = write("train", options, unbroken)
        assert code == 0
        for i in range(kills):
            assert write("train", options, path, 1 + i * 2 * steps // (SAVES * kills))[0] == -9
            if path.exists():
                places = [path, path / "best"] if (path / "best").exists() else [path]
                for place in places:
                    assert [*find_adapters(place)] == [2, 4]
                    assert share_tuning([load_adapter(place, k) for k in (2, 4)])
                read_state(path)
                wholes += 1
        assert kills // 3 <= wholes < kills
        assert write("train", options, path)[0] == 0
    assert content(path) == content(unbroken)
    assert [place.name for place in path.parent.iterdir()] == ["run"]


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path):
    (tmp_path / "config.yaml").write_text(NO_DROPOUT + "k: [2, 4]\n")
    data = write_data(tmp_path / "data", rows_of(80), rows_of(24, 80))
    options = ["-c", tmp_path / "config.yaml", "--data", data, *test_ranks.OPTIONS[4:]]
    options += ["--model", BASE, "--iters", 8, "--grad-accumulation-steps", 2, "--merges", "all"]
    one, two = tmp_path / "one", tmp_path / "two"
    pair = test_ranks.train(two, *options)
    test_ranks.train_alone(one, *options)
    for code, _, errors in test_ranks.finish(pair):
        assert code == 0, errors
    for k in (2, 4):
        test_ranks.assert_near(one / f"k{k}", two / f"k{k}")
    for name in ("val_loss_k2", "val_loss_k4"):
        assert log_of(two, name) == [
            (i, pytest.approx(loss, rel=1e-4)) for i, loss in log_of(one, name)
        ]


# What a run takes, and what it refuses


def test_k_is_a_number_or_several_in_a_flag_and_in_yaml(tmp_path):
    def printed(*options: object, yaml: str = "") -> list[str]:
        return train(tmp_path / "run", *options, "--print-config", yaml=yaml).out.splitlines()

    several = ["k:", "- 2", "- 4", "- 8"]
    repeated, plain = printed("--k", 2, "--k", 4, "--k", 8), printed(yaml="k: 2,4,8\n")
    for lines in (printed("--k", "2,4,8"), repeated, plain, printed(yaml="k: [2, 4, 8]\n")):
        assert lines[lines.index("k:") :][:4] == several
    assert "k: 2" in printed("--k", 2, yaml="k: [2, 4, 8]\n")
    for k, said in (
        ("2,2", "--k is [2, 2], expected a whole number, or several ascending ones"),
        ("2,x", "--k is '2,x', expected a whole number, or several"),
        ("2,2000", "--k is [2, 2000], expected at most 1024"),
        ("0,2", "--k is [0, 2], expected at least 1"),
        (0, "--k is 0, expected at least 1"),
    ):
        assert_one_error(train(tmp_path / "run", "--k", k), 2, said)
    for k in ([4], [4, 2], [], [2, "4"], [2, True], 2.0):
        with pytest.raises(SettingsError, match="expected a whole number, or several"):
            TrainSettings(k=k)
    assert TrainSettings(k=4).ks == (4,)
    with pytest.raises(SettingsError, match="nothing is left to train"):
        TrainSettings(k=[1, 2], lora_parameters={"keys": []})


def test_a_row_has_to_suit_every_k(tmp_path):
    """At most --max-seq-length positions at the smallest K, a block's tokens at the largest."""
    short = {"prompt": "A", "completion": "B"}
    long = rows_of(1)[0] | {"prompt": "Tree: A and 1, Child: " * 8}
    for row, said in ((short, "to merge, expected at least --k = 8"), (long, "--max-seq-length")):
        data = write_data(tmp_path / said[:5].strip(), [*rows_of(8), row])
        options = ("--data", data, "--merges", "all", "--max-seq-length", 40, "--iters", 1)
        result = train(tmp_path / "run", *options, "--k", "2,8")
        assert_one_error(result, 1, said)
        assert "train.jsonl" in result.err
    trained(tmp_path / "run", *options, "--k", 8)


def test_another_set_of_ks_is_not_resumed_and_a_link_in_it_not_followed(tmp_path, whole):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    for k in ("2,4", "2,3,5", "4"):
        result = train(path, "--resume", "--iters", 15, "--k", k)
        assert result.code == 1
        assert "the run has [2, 3, 4]" in result.err
    (path / "k3").rename(tmp_path / "k3")
    (path / "k3").symlink_to(tmp_path / "k3")
    said = f"{path / 'k3'} is not what a run writes"
    assert_one_error(train(path, "--resume", "--iters", 15), 1, said)


@pytest.mark.parametrize(
    "name", ["k3", "k4/merge_config.json", "best/k4", "best/k2/adapters.safetensors"]
)
def test_a_set_that_lacks_something_is_not_resumed_with_a_fresh_encoder(tmp_path, whole, name):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    (path / name).rename(tmp_path / "gone")
    found = train(path, "--resume", "--iters", 15)
    assert_one_error(found, 1, f"{path} cannot be resumed: ", f"{name} is missing")
    assert state_of(path)["iteration"] == 14


def test_an_adapter_of_a_run_is_not_replaced_by_another_run(tmp_path, whole):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    options = ("--data", whole.parent / "data", "--merges", "all", "--iters", 1)
    for at in ("k4", "best", "best/k2"):
        for more in ("--resume", "--force"):
            said = f"{path / at} belongs to the run in {path}: give --resume with that"
            assert_one_error(train(path / at, *options, more), 1, said)
    for more in ("--resume", "--force"):  # beside them there may be one for another K
        trained(path / "k1", *options, "--k", 1, more)
    before = content(path / "k1")
    (path / "thesis.txt").write_text("years of work")
    (path / "best" / "link").symlink_to(tmp_path)
    with (path / "output.txt").open("w") as output:  # as `train > RUN/output.txt` has it
        trained(path, "--resume", "--iters", 15)
        output.write("written on")
    own = {"k2", "k3", "k4", "best", "training"}
    assert {p.name for p in path.iterdir()} == {*own, "k1", "thesis.txt", "output.txt"}
    assert content(path / "k1") == before
    assert (path / "thesis.txt").read_text() == "years of work"
    assert (path / "output.txt").read_text() == "written on"
    assert (path / "best" / "link").readlink() == tmp_path


@pytest.mark.parametrize("k", ["4", "2,4"])
def test_a_best_adapter_that_counts_no_more_is_not_kept(tmp_path, whole, k):
    """A curriculum's next stage begins without one."""
    path, data = tmp_path / "run", whole.parent / "data"
    trained(path, "--data", data, "--merges", "all", "--k", k, "--iters", 1, *QUIET)
    own = [file.relative_to(path) for name in FILES for file in path.rglob(name)]
    for file in own:
        (path / "best" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path / file, path / "best" / file)
    (path / "best" / "notes.txt").write_text("of mine")
    trained(path, "--resume", "--iters", 2)
    assert [p.name for p in (path / "best").rglob("*")] == ["notes.txt"]
    assert all((path / file).is_file() for file in own)
    trained(path, "--resume", "--iters", 3)


@pytest.mark.parametrize("resumed", [True, False])
def test_another_context_is_named_with_the_folder(tmp_path, whole, resumed):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    if resumed:
        found = train(path, "--resume", "--iters", 15, "--encoder-context", 2)
        said = f"{path} cannot be resumed: --encoder-context is 2, the run has 0"
    else:
        options = ("--data", whole.parent / "data", "--k", "2,8", "--encoder-context", 2)
        found = train(tmp_path / "new", *options, "--init-from", path)
        said = f"--init-from {path}: --encoder-context for K = 2 is 2, the adapter has 0"
    assert_one_error(found, 1, said)


@pytest.mark.parametrize(
    ("state", "code"), [({"iteration": 0, "added": 1, "rng": [0, 0]}, 1), ({"iteration": 2**62}, 0)]
)
def test_a_state_that_no_run_has_is_one_line(tmp_path, whole, state, code):
    """It may come from a stranger, and the K of each batch follows from it."""
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    file = path / "training" / "state.json"
    about = json.loads(file.read_text())
    settings = about["settings"] | {"grad_accumulation_steps": 2, "val_batches": 0}
    change_json(file, state=about["state"] | state, settings=settings)
    result = train(path, "--resume", "--iters", 2**62 + 1)
    assert (result.code, "Traceback" in result.err) == (code, False)
    assert ("its state is not of a run like this" in result.err) == (code == 1)


def test_a_set_whose_lora_differs_is_not_gone_on_with(tmp_path, whole):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    file = str(path / "k3" / "adapters.safetensors")
    mx.save_safetensors(file, {n: a + 1 for n, a in mx.load(file).items()})
    for options, said in (
        (("--resume", "--adapter-path", path), "--resume: the adapters for K = 2, 3, 4 in"),
        (("--init-from", path, "--k", "2,3"), "--init-from: the adapters for K = 2, 3 in"),
    ):
        result = train(tmp_path / "new", "--data", whole.parent / "data", *options)
        assert_one_error(result, 1, said)
        assert "do not change the base alike: give the folder of one" in result.err


def test_force_replaces_a_set_by_one_adapter_and_back(tmp_path, whole):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    options = ("--data", whole.parent / "data", "--merges", "all", "--iters", 1)
    assert_one_error(train(path, *options), 1, "holds a run: give --resume")
    trained(path, *options, "--force")
    assert {p.name for p in path.iterdir()} == {*FILES, "best", "training"}
    assert {p.name for p in (path / "best").iterdir()} == set(FILES)
    trained(path, *options, "--k", "2,4", "--force")
    assert {p.name for p in path.iterdir()} == {"k2", "k4", "best", "training"}
    (path / "thesis.txt").write_text("years of work")
    assert_one_error(train(path, *options, "--force"), 1, "holds more than adapter files")


def test_a_run_begins_from_a_set_with_the_encoders_that_it_has(tmp_path, whole):
    """At a rate of 0 nothing moves: its encoders and LoRA, and for another K a fresh encoder."""
    options = ("--data", whole.parent / "data", "--merges", "all", "--iters", 1, *QUIET)
    options += ("--learning-rate", 0, "--init-from", whole)
    trained(tmp_path / "several", *options, "--k", "2,4,5")
    trained(tmp_path / "one", *options, "--k", 4)
    trained(tmp_path / "other", *options, "--k", 5)
    for path, k in (("several/k2", 2), ("several/k4", 4), ("one", 4)):
        assert same(tensors_of(tmp_path / path), tensors_of(whole / f"k{k}"))
    old = {n: a for n, a in tensors_of(whole / "k2").items() if n[0] != "e"}
    for path in ("several/k5", "other"):
        found = tensors_of(tmp_path / path)
        assert same({n: found[n] for n in old}, old)
        assert not found["encoder.w3.weight"].any().item()
    wider = train(tmp_path / "wider", *options, "--k", "2,4", "--encoder-factor", 1)
    assert_one_error(
        wider, 1, "the width of --encoder-factor for K = 4 is 256, the adapter has 384"
    )


def test_several_ks_start_from_information_each_as_one_does(tmp_path):
    data = write_data(tmp_path / "data", rows_of(20))
    options = ("--data", data, "--merges", "all", "--iters", 1, "--learning-rate", 0)
    options += ("--encoder-start", "information", "--encoder-factor", 1)
    trained(tmp_path / "several", *options, "--k", "2,4")
    for k in (2, 4):
        trained(tmp_path / f"one{k}", *options, "--k", k)
        one, two = tensors_of(tmp_path / f"one{k}"), tensors_of(tmp_path / "several" / f"k{k}")
        for name in ("center", "gate_weight", "gate_bias", "w3.weight"):
            assert mx.array_equal(one[f"encoder.{name}"], two[f"encoder.{name}"])
        assert {n: a.shape for n, a in one.items()} == {n: a.shape for n, a in two.items()}


def test_every_command_reads_one_k_of_a_set(tmp_path, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = set()
    for k in KS:
        found = run(
            "generate", "--adapter-path", whole, "--k", k, "-p", "Tree: AB", "--merges", "all"
        )
        assert found.code == 0, found.err
        fused = run("fuse", "--adapter-path", whole, "--k", k, "--save-path", f"fused{k}")
        assert fused.code == 0, fused.err
        assert look_up(f"fused{k}/kmerge").choose()[1].merge_factor == k
        exported = run("export", whole, f"torch{k}", "--k", k)
        assert exported.code == 0, exported.err
        back = run("convert", f"torch{k}", f"back{k}", "--model", BASE)
        assert back.code == 0, back.err
        assert same(tensors_of(Path(f"back{k}")), tensors_of(whole / f"k{k}"))
        answers.add(found.out)
    for command in (("generate", "--adapter-path", whole, "-p", "A"), ("export", whole, "x")):
        assert_one_error(run(*command), 1, "holds adapters for K = 2, 3, 4: choose one with --k")
    shutil.copy(whole.parent / "data" / "valid.jsonl", tmp_path / "test.jsonl")
    measured = run("evaluate", "--adapter-path", whole, "--data", tmp_path, "--limit", 2, "--json")
    assert measured.code == 0, measured.err
    assert {row["k"] for row in json.loads(measured.out)["rows"]} >= {*KS}
    named = ("--license", "mit", "--base-model", "some/base")
    sent = run("upload", whole, "me/several", *named, "--dry-run")
    assert sent.code == 0, sent.err
    assert all(f"k{k}/adapters.safetensors" in sent.err for k in KS)
    about = json.loads(run("info", whole, "--json").out)
    assert [adapter["merge_factor"] for adapter in about["adapters"]] == [*KS]
    for adapter, k in zip(about["adapters"], KS, strict=True):
        assert adapter["training"]["iteration"] == 14
        best = adapter["training"]["best"]
        assert {n for n in best if "loss" in n} == {"val_loss", f"val_loss_k{k}"}


@pytest.mark.parametrize("k", [4, "2,4"])
def test_a_picture_has_a_line_for_each_k(tmp_path, k):
    data, picture = write_data(tmp_path / "data", rows_of(20), rows_of(8, 20)), tmp_path / "a.svg"
    options = ("--data", data, "--k", k, "--merges", "all", "--iters", 4, "--steps-per-eval", 2)
    trained(tmp_path / "run", *options, "--plot", picture)
    assert ("K=2" in picture.read_text()) == (k != 4)
