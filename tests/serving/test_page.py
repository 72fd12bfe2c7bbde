"""The page in a Chromium: what a person sees and does, and that nothing leaves the machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from kmerge_mlx.serving import generator
from kmerge_mlx.serving.jobs import Job
from tests.servers import FIXTURE_EOS, Address, eventually, serving

pytestmark = pytest.mark.slow

LAYOUT = {"merges": "documents", "merge_threshold": 8}
DOCUMENT = "Tree: JN\n+WO\n++UP\n++JG\n+++VN <b>caf\u00e9</b> and \U0001f389"
QUESTION = "Parent: JN?"
ANSWER = '<img src=x onerror="hit=1"> is what it said, and more of it, in many tokens.'
CONTRAST = """
const [selector] = arguments, all = [...document.querySelectorAll(selector)];
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((n) => n / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const under = (one) => {
  const found = getComputedStyle(one).backgroundColor;
  return found === "rgba(0, 0, 0, 0)" ? under(one.parentElement) : found;
};
return all.map((one) => {
  const pair = [light(getComputedStyle(one).color), light(under(one))].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
});
"""
FOCUSED = """
const one = document.activeElement, style = getComputedStyle(one);
return [one.id || one.className, style.outlineStyle, parseFloat(style.outlineWidth)];
"""
DROP = """
const data = new DataTransfer();
data.items.add(new File([new Uint8Array(arguments[0])], arguments[1]));
for (const kind of ["dragover", "drop"]) {
  const event = new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  document.getElementById("question").dispatchEvent(event);
  if (!event.defaultPrevented) return false;
}
return true;
"""


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for argument in ("headless=new", "disable-dev-shm-usage", "window-size=1300,900"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    # Debian's, with the driver that comes beside it; elsewhere selenium finds Chrome.
    options.binary_location = shutil.which("chromium") or ""
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with webdriver.Chrome(options, Service(shutil.which("chromedriver"), env=plain)) as made:
        yield made


class Page:
    """The page of a server."""

    def __init__(self, driver: webdriver.Chrome, server: Address):
        self.driver, self.run = driver, driver.execute_script
        driver.get(f"http://127.0.0.1:{server.port}/")

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )

    def text(self, selector: str) -> str:
        (text,) = self.texts(selector)
        return text

    def shows(self, selector: str) -> bool:
        return self.driver.find_element(By.CSS_SELECTOR, selector).is_displayed()

    def write(self, document: str = DOCUMENT, question: str = QUESTION) -> None:
        """Puts a text in, as pasting it does."""
        for name, text in (("document", document), ("question", question)):
            self.run(
                "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                "field.dispatchEvent(new Event('input'))",
                *(name, text),
            )

    def slide(self, stop: int) -> None:
        self.run(
            "const slider = document.getElementById('merges'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'))",
            stop,
        )

    def click(self, name: str) -> None:
        self.driver.find_element(By.ID, name).click()

    def press(self, *keys: str, holding: str | None = None) -> None:
        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            if holding:
                actions.key_down(holding).send_keys(key).key_up(holding)
            else:
                actions.send_keys(key)
        actions.perform()

    def figures(self, place: str) -> dict[str, str]:
        return dict(
            self.run(
                "return [...document.querySelectorAll(arguments[0])]"
                ".map((one) => [one.firstChild.textContent, one.lastChild.textContent])",
                f"{place} dl div",
            )
        )

    def wait(self, condition: Callable[[], Any]) -> None:
        eventually(lambda: bool(condition()))

    def answered(self) -> None:
        self.wait(lambda: self.text("#status") == "Done.")


@pytest.fixture(scope="module")
def server(base_path, adapter_path):
    with serving(base_path, adapter_path, **LAYOUT) as address:
        yield address


@pytest.fixture
def answers(monkeypatch):
    """Every request is answered with this text."""

    def forced(args: Any) -> list[Any]:
        ids = args.tokenizer.encode(ANSWER, add_special_tokens=False)
        left = iter([*ids, FIXTURE_EOS])

        def force(tokens: mx.array, logits: mx.array) -> mx.array:
            wanted = mx.arange(logits.shape[-1]) == next(left, FIXTURE_EOS)
            return mx.where(wanted, 100.0, -100.0) + 0 * logits

        return [force]

    def of(server: Address) -> None:
        tokenizer = server.server.service.tokenizer

        def processors(args: Any) -> list[Any]:
            args.tokenizer = tokenizer
            return forced(args)

        monkeypatch.setattr(generator, "_host_processors", processors)

    return of


@pytest.fixture
def slowly(monkeypatch):
    """Tokens come one at a time, as a large model's do: seconds of each."""
    following, pause = Job.next, {"seconds": 0.3}

    async def next_(job: Job) -> Any:
        await asyncio.sleep(pause["seconds"])
        return await following(job)

    monkeypatch.setattr(Job, "next", next_)
    return pause


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_an_answer_streams_is_text_whatever_it_says_and_can_be_stopped(
    driver, server, answers, slowly
):
    answers(server)
    page = Page(driver, server)
    page.write()
    page.click("ask")
    page.wait(lambda: len(page.texts(".said")) == 1 and page.text(".said"))
    begun = page.text(".said")
    assert ANSWER.startswith(begun)
    assert page.text("#status").startswith("Answering")
    page.wait(lambda: len(page.text(".said")) > len(begun))
    page.click("stop")
    page.wait(lambda: page.text("#status") == "Stopped.")
    assert len(page.text(".said")) < len(ANSWER)
    eventually(lambda: server.metric("requests_in_flight") == 0)
    slowly["seconds"] = 0
    page.click("ask")
    page.answered()
    assert page.text(".said") == ANSWER
    figures = page.figures(".card")
    assert list(figures) == ["first token", "whole answer", "tokens written"]
    assert number(figures["tokens written"]) > 10
    assert page.run("return [window.hit, document.querySelectorAll('img').length]") == [None, 0]


def test_every_block_is_a_chip_and_shows_its_tokens(driver, server):
    page = Page(driver, server)
    page.write()
    page.slide(2)
    parts = [{"type": "text", "text": DOCUMENT, "merge": True}]
    parts += [{"type": "text", "text": f"\n\n{QUESTION}", "merge": False}]
    body = {"messages": [{"role": "user", "content": parts}]}
    layout = server.request("POST", "/v1/layout", body).json
    blocks = [block for s in layout["segments"] if s["merge"] for block in s["blocks"]]
    shown = ["".join(block).replace("\n", "\u23ce") for block in blocks]
    page.wait(lambda: page.texts(".chip") == [text or "\u2026" for text in shown])
    assert page.text("#positions").endswith(QUESTION)
    assert page.figures("#prompt")["tokens \u2192 positions"] == (
        f"{layout['prompt_tokens']} \u2192 {layout['compressed_tokens']}"
    )
    assert page.figures("#prompt")["ratio"] == f"{layout['compression_ratio']:.2f}\u00d7"
    chips = driver.find_elements(By.CSS_SELECTOR, ".chip")
    for place in (0, len(chips) - 1):
        ActionChains(driver).move_to_element(chips[place]).perform()
        tokens = [t.replace(" ", "\u2423").replace("\n", "\u23ce") for t in blocks[place]]
        assert page.texts("#tip code") == [t or "part of a character" for t in tokens]
        assert page.shows("#tip")


def test_the_slider_goes_from_nothing_to_everything(driver, server):
    page = Page(driver, server)
    page.write()
    for stop, merge in ((0, False), (3, True)):
        page.slide(stop)
        page.wait(lambda merge=merge: bool(page.texts(".chip")) == merge)
        body = {"messages": [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]}
        found = server.request("POST", "/v1/layout", body | {"merge": merge}).json
        counts = f"{found['prompt_tokens']} \u2192 {found['compressed_tokens']}"
        page.wait(lambda c=counts: page.figures("#prompt").get("tokens \u2192 positions") == c)
    assert page.run("return document.getElementById('merges').ariaValueText") == "everything"
    page.write(f"<raw>{DOCUMENT}</raw>")
    page.slide(1)  # the server's choice, by tags too
    page.wait(lambda: not page.texts(".chip"))
    assert "<raw>" not in page.text("#positions")
    page.slide(2)  # in what a client says to merge, a tag is text
    page.wait(lambda: page.texts(".chip"))
    assert "<raw>" in page.text("#positions")


def test_compare_shows_both_answers_with_their_times_tokens_and_bytes(driver, server, answers):
    answers(server)
    page = Page(driver, server)
    page.write()
    page.click("compare")
    page.answered()
    assert page.texts(".said") == [ANSWER, ANSWER]
    titles = page.texts(".card h2")
    assert titles == ["Merged", "Uncompressed"]
    merged, plain = (page.figures(f".card:nth-of-type({n})") for n in (1, 2))
    assert merged.keys() == plain.keys() >= {"KV cache", "first token", "whole answer"}
    tokens, positions = map(number, merged["tokens \u2192 positions"].split(" \u2192 "))
    assert positions < tokens
    assert plain["tokens \u2192 positions"] == f"{tokens} \u2192 {tokens}"
    assert merged["KV cache"] != plain["KV cache"]
    left, right = driver.find_elements(By.CSS_SELECTOR, ".card")
    assert left.location["y"] == right.location["y"]
    assert left.location["x"] < right.location["x"]


def test_it_says_that_the_server_is_away_and_goes_on_when_it_is_back(
    driver, base_path, adapter_path, answers, slowly
):
    with serving(base_path, adapter_path, **LAYOUT) as server:
        answers(server)
        server.server.service.drain = lambda *_: 0  # it waits for no answer
        page = Page(driver, server)
        page.write()
        page.click("ask")
        page.wait(lambda: page.texts(".said")[:1] not in ([], [""]))
    page.wait(lambda: page.shows("#notice"))
    assert "does not answer" in page.text("#notice")
    page.wait(lambda: page.text(".problem"))  # the answer was broken off, and what came stays
    assert ANSWER.startswith(page.text(".said"))
    page.click("ask")
    page.wait(lambda: page.texts(".problem") == ["The server does not answer."])
    with serving(base_path, adapter_path, port=server.port, **LAYOUT) as server:
        answers(server)
        slowly["seconds"] = 0
        page.wait(lambda: not page.shows("#notice"))
        page.click("ask")
        page.answered()
        assert page.text(".said") == ANSWER
        assert page.figures("#prompt")


def test_nothing_leaves_the_machine_and_nothing_but_the_page_runs(driver, server):
    driver.get_log("performance")
    driver.get_log("browser")
    page = Page(driver, server)
    page.write()
    for name in ("ask", "compare"):
        page.click(name)
        page.answered()
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent}
    own = f"http://127.0.0.1:{server.port}/"
    assert {own, f"{own}v1/layout", f"{own}v1/chat/completions"} <= asked
    assert all(url.startswith((own, "data:")) for url in asked)
    assert driver.get_log("browser") == []
    # What is not the page's own neither runs nor is fetched, even if it came into the page.
    page.run(
        "const one = document.createElement('script'); one.append('window.hit = 1');"
        "try { document.body.append(one); } catch {}"
    )
    with pytest.raises(Exception, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<b>'")
    gone = "return fetch('http://127.0.0.1:9/').then(() => 1, () => 0)"
    assert page.run(gone) == 0
    assert page.run("return window.hit") is None
    refused = [entry["message"] for entry in driver.get_log("browser")]
    assert any("connect-src" in one for one in refused)
    assert any("script" in one for one in refused)


def test_the_keyboard_alone_suffices(driver, server, answers):
    answers(server)
    page, seen = Page(driver, server), []
    for _ in range(2):
        page.press(Keys.TAB)
        seen.append(page.run(FOCUSED))
    page.press(*DOCUMENT.replace("\U0001f389", "!"))
    page.press(Keys.ENTER, holding=Keys.CONTROL)  # in the document
    page.answered()
    page.press(Keys.TAB)
    seen.append(page.run(FOCUSED))
    page.press(*QUESTION, Keys.ENTER)  # in the question
    page.wait(lambda: page.text("#positions").endswith(QUESTION))
    page.answered()
    page.press(Keys.TAB)
    seen.append(page.run(FOCUSED))
    page.press(Keys.ARROW_RIGHT)
    assert page.text("#stop-name") == "the document"
    page.press(Keys.TAB, Keys.TAB)
    seen.append(page.run(FOCUSED))
    page.press(Keys.ENTER)  # on the button
    page.wait(lambda: len(page.texts(".said")) == 2)
    page.answered()
    assert page.run(FOCUSED) == seen[-1]  # nothing took the focus away
    for _ in range(3):
        page.press(Keys.TAB)
        seen.append(page.run(FOCUSED))
    names, styles, widths = zip(*seen, strict=True)
    ids = ("open", "document", "question", "merges", "compare", "stop", "positions", "chip")
    assert names == ids
    assert set(styles) == {"solid"}
    assert min(widths) >= 2
    first = page.texts("#tip code")
    page.press(Keys.ARROW_RIGHT)
    assert page.run(FOCUSED)[0] == "chip even"
    assert page.texts("#tip code") != first
    page.press(Keys.ESCAPE)
    assert not page.shows("#tip")


def test_a_long_document_is_shown_in_part_and_says_how_much_is_not(driver, server, monkeypatch):
    monkeypatch.setattr(server.server.service.provider.model, "context_length", 10**6)
    page = Page(driver, server)
    page.slide(2)
    page.write("Parent: JN, Child: WO\n" * 8_500)
    page.wait(lambda: page.texts(".more") and page.text("#positions").endswith(QUESTION))
    tokens, positions = map(
        number, page.figures("#prompt")["tokens \u2192 positions"].split(" \u2192 ")
    )
    assert tokens > 100_000
    chips = len(page.texts(".chip"))
    assert 1000 < chips <= 1500
    more = page.text(".more").split()
    hidden = number(more[0])
    assert 1500 + hidden == positions
    assert more[1:3] == ["more", "positions"]
    page.slide(0)
    page.wait(lambda: not page.texts(".chip"))
    assert len(page.text("#positions")) < 20_000


def test_a_file_is_dropped_anywhere_and_one_that_is_not_text_is_refused(driver, server):
    page = Page(driver, server)
    assert page.run(DROP, list("\ufeffcaf\u00e9 \U0001f389\n".encode()), "a.txt")
    page.wait(lambda: page.run("return document.getElementById('document').value"))
    assert page.run("return document.getElementById('document').value") == "caf\u00e9 \U0001f389\n"
    page.wait(lambda: page.figures("#prompt"))
    assert page.run(DROP, [0x89, 0x50, 0xFF, 0xFE], "<b>.png")
    page.wait(lambda: page.shows("#notice"))
    assert page.text("#notice").startswith("<b>.png is not UTF-8 text")
    assert page.run("return document.getElementById('document').value") == "caf\u00e9 \U0001f389\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(driver, server, scheme):
    own = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": own})
    try:
        page = Page(driver, server)
        page.write()
        page.click("compare")
        page.answered()
        page.run(
            "document.querySelector('.chip').focus(); notice('away');"
            "document.querySelector('.problem').hidden = false"
        )
        for selector in (
            *("body", "h1", "#model", ".hint", "dt", "dd", ".chip", ".said", "textarea", "label"),
            *("#ask", "#compare", "#notice", ".problem", "#status", ".stops", "#tip", "#tip code"),
        ):
            found = page.run(CONTRAST, selector)
            assert found, selector
            assert min(found) >= 4.5, (selector, found)  # WCAG 2.2, AA
        page_colour = page.run("return getComputedStyle(document.body).backgroundColor")
        first = int(page_colour.removeprefix("rgb(").split(",")[0])
        assert (first < 60) == (scheme == "dark")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_on_a_narrow_screen_all_stands_one_below_the_other(driver, server):
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page = Page(driver, server)
        page.write()
        page.click("compare")
        page.answered()
        parts = driver.find_elements(By.CSS_SELECTOR, "#form, .card, #prompt")
        assert len({part.location["x"] for part in parts}) == 1
        assert page.run("return document.documentElement.scrollWidth") <= 400
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_key_is_asked_for_and_kept_for_this_tab_alone(
    driver, base_path, adapter_path, tmp_path, answers
):
    file = tmp_path / "key"
    file.write_text("sesame-42")
    with serving(base_path, adapter_path, api_key=str(file), **LAYOUT) as server:
        answers(server)
        page = Page(driver, server)
        for key, hint in (("wrong", "kept until this tab is closed"), ("sesame-42", "was wrong")):
            page.wait(lambda hint=hint: page.shows("#ask-key") and hint in page.text("#key-hint"))
            page.press(key, Keys.ENTER)
        page.wait(lambda: page.text("#model") == "base")
        page.write()
        page.click("ask")
        page.answered()
        assert page.text(".said") == ANSWER
        page = Page(driver, server)  # as after a reload
        page.wait(lambda: page.text("#model") == "base")
        assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
        page.run("sessionStorage.clear()")
        page = Page(driver, server)
        page.wait(lambda: page.shows("#ask-key"))
        page.press(Keys.ESCAPE)
        page.wait(lambda: page.text("#model") == "The server wants its API key.")
