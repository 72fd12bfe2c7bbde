"""What is stored on one day is gone on with on another, where the template writes today's date."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from kmerge_mlx.prompts.chat_template import Renderer
from kmerge_mlx.prompts.policy import Layout, chosen
from kmerge_mlx.serving.dates import Dates
from tests.cli_runner import assert_one_error, change_json, copy_base, run
from tests.prompts.test_lay_out import tokenizer_with, user
from tests.servers import serving
from tests.train_runs import train, trained, write_data

DATED = """\
<|im_start|>system
Today is {{ strftime_now('%d %B %Y') }}.<|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ROWS = [{"prompt": f"AB CD EF GH IJ KL {i}", "completion": f"{i}"} for i in range(8)]
SHORT = ("--k", 4, "--iters", 1, "--batch-size", 4, "--val-batches", 1, "--num-layers", 1)


@pytest.fixture
def on(monkeypatch):
    """Moves the clock that templates see to a day of November."""

    def move(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 11, day, 9, 30)

        for module in (
            "transformers.utils.chat_template_utils",
            "kmerge_mlx.prompts.chat_template",
        ):
            monkeypatch.setattr(f"{module}.datetime", Clock)

    return move


@pytest.fixture(scope="module")
def base(base_path, tmp_path_factory):
    return copy_base(base_path, tmp_path_factory.mktemp("dated") / "base", DATED)


def test_a_training_run_goes_on_with_the_date_on_which_it_began(on, base, tmp_path):
    data, path = write_data(tmp_path / "data", ROWS, ROWS), tmp_path / "run"
    on(26)
    trained(path, "--data", data, *SHORT, model=base)
    on(27)
    trained(path, "--resume", "--iters", 2, model=base)
    state = json.loads((path / "training" / "state.json").read_text())
    assert state["settings"]["template_date"] == "2026-11-26T09:30:00"
    assert "date" not in json.loads((path / "merge_config.json").read_text())["layout"]
    # A run of an earlier release does not know its date: the error says what to give.
    del state["settings"]["template_date"]
    change_json(path / "training" / "state.json", **state)
    again = ("--resume", "--iters", 3)
    said = "(the chat template writes the date: that day's is --template-date)"
    assert_one_error(train(path, *again, model=base), 1, said)
    trained(path, *again, "--template-date", "2026-11-26", model=base)


def test_a_prompt_cache_goes_on_with_its_date_and_a_new_prompt_has_todays(
    on, base, adapter_path, tmp_path
):
    (tmp_path / "report.txt").write_text("AB CD EF GH IJ KL MN OP QR ST " * 4)
    named = ("--model", base, "--adapter-path", adapter_path, "--apply-chat-template")
    file, asked = tmp_path / "report.safetensors", ("-p", "Which?", "-m", 4, "--json")
    on(26)
    whole = run("generate", tmp_path / "report.txt", *named, *asked)
    made = run("cache", tmp_path / "report.txt", *named, "--prompt-cache-file", file)
    assert (made.code, whole.code) == (0, 0), made.err
    on(27)
    later = run("generate", "--prompt-cache-file", file, *asked)
    assert later.code == 0, later.err
    assert json.loads(later.out)["tokens"] == json.loads(whole.out)["tokens"]


def test_predictions_and_a_teachers_file_go_on_with_their_date(on, base, adapter_path, tmp_path):
    data = write_data(tmp_path / "data", ROWS, ROWS[:2])
    (data / "test.jsonl").write_bytes((data / "valid.jsonl").read_bytes())
    evaluate = ("evaluate", "--model", base, "--adapter-path", adapter_path, "--data", data)
    evaluate += ("--apply-chat-template", "--timed", 0, "--json")
    evaluate += ("--predictions", tmp_path / "predictions.jsonl")
    teacher = ("--teacher", "base", "--teacher-top-k", 4, "--teacher-file", tmp_path / "top.st")
    taught = ("--data", data, *SHORT, *teacher)
    on(26)
    first = run(*evaluate)
    assert first.code == 0, first.err
    trained(tmp_path / "one", *taught, model=base)
    kept = (tmp_path / "predictions.jsonl").read_bytes()
    on(27)
    second = run(*evaluate)
    assert second.code == 0, second.err
    assert (tmp_path / "predictions.jsonl").read_bytes() == kept
    assert json.loads(first.out)["rows"] == json.loads(second.out)["rows"]
    trained(tmp_path / "two", *taught, model=base)


def test_a_servers_conversation_goes_on_with_its_date(on, base, adapter_path):
    messages = [user("AB CD EF GH IJ KL MN OP QR ST")]
    with serving(base, adapter_path, chat_template=True, merges="documents") as server:

        def ask(*messages):
            body = {"messages": list(messages), "max_tokens": 3}
            answer = server.request("POST", "/v1/chat/completions", body)
            assert answer.status == 200, answer.body
            return answer.json

        on(26)
        first = ask(*messages)
        said, size = first["choices"][0]["message"], first["usage"]["prompt_tokens"]
        on(27)
        usage = ask(*messages, said, user("And?"))["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > size - 8
        assert usage["merged_tokens"] + usage["raw_tokens"] == usage["prompt_tokens"]
        begun = ask(user("Which?"))["usage"]
        assert begun["prompt_tokens_details"]["cached_tokens"] < size / 2


def test_a_conversation_that_begins_anew_has_todays_date(on):
    dates, question = Dates(tokenizer_with(DATED)), user("What?")
    answered = [question, {"role": "assistant", "content": "So."}, user("Why?")]
    on(26)
    assert dates.of([question]) == dates.of(answered) == "2026-11-26T09:30:00"
    on(27)
    assert dates.of(answered) == "2026-11-26T09:30:00"
    assert dates.of([question]) == "2026-11-27T09:30:00"
    assert Dates(tokenizer_with("{{ messages[0].content }}")).of([question]) is None


def test_the_date_is_the_layouts_or_the_clocks_and_an_adapter_does_not_keep_it(on):
    tokenizer, messages = tokenizer_with(DATED), [user("What?")]
    on(26)
    assert "Today is 26 November 2026." in Renderer(tokenizer, {})(messages)
    assert "Today is 03 May 2025." in Renderer(tokenizer, {}, date="2025-05-03")(messages)
    assert chosen(Layout(date="2025-05-03")).date is None
    assert "date" not in Layout().to_json()
