"""The page of a map in Chromium: opened, pointed at, sorted, filtered, searched and saved."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.browser import chromium, wait_for
from tests.support.maps import made, random_ends, windowed
from vllm_fox.maps.record import ForgettingMap
from vllm_fox.maps.write import write

T = 400
PIECES = ["def", " f", "(", "x", "):", "\n    ", "return", " x", " <b>&", " 17"] * (T // 10)
WINDOWS = [20, T, 100, 5]
"""Of the heads of two layers with two each: local, global, content-dependent and local."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chromium")


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Any]:
    with chromium(folder) as found:
        yield found


def opened(driver: Any, record: ForgettingMap, path: Path) -> float:
    """Write a map, open it, and return the milliseconds until it has been drawn."""
    write(record, path)
    driver.get(path.as_uri())
    return float(wait_for(lambda: driver.execute_script("return document.body.dataset.opened")))


@pytest.fixture
def page(driver: Any, folder: Path) -> Iterator[Any]:
    """A map of four heads; nothing may have been written to the console in the end."""
    ends = np.stack([windowed(T, window) for window in WINDOWS]).reshape(2, 2, T)
    opened(driver, made(ends, PIECES), folder / "small.html")
    yield driver
    assert driver.get_log("browser") == []


def by_id(page: Any, name: str) -> Any:
    return page.find_element("id", name)


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(page).send_keys(key).perform()


def token(page: Any, number: int) -> Any:
    return page.find_element("css selector", f"#text [data-i='{number}']")


def shown_heads(page: Any) -> list[str]:
    return [one.get_attribute("data-s") for one in page.find_elements("css selector", "#heads li:not(#all)")]


def reads(page: Any, name: str, *parts: str) -> None:
    """Wait until an element's text has these parts."""
    wait_for(lambda: all(part in by_id(page, name).text for part in parts))


def test_it_says_what_it_shows(page: Any) -> None:
    assert page.title == "What made-up forgets"
    assert re.fullmatch(
        r"\d+\u00a0% of the KV cache is given back at the end of the text \(\d+\u00a0% on average over it\)",
        by_id(page, "headline").get_property("textContent"),
    )
    assert "made-up (Made-up models): 2 layers of 2 KV heads, each head forgetting" in by_id(page, "summary").text
    assert "Of 4 heads: 1 global, 2 local, 1 content-dependent." in by_id(page, "summary").text
    kinds = by_id(page, "by-kind").text
    assert "Layer 0 head 0; layer 1 head 1." in kinds and "local: At least 95 % of what queries see" in kinds
    assert "mean over the text's second half" in page.find_element("css selector", ".columns").text
    assert by_id(page, "text").text.startswith("def f(x):") and " <b>&" in by_id(page, "text").text


def test_the_pointer_moves_the_token(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.find_element("css selector", "#heads [data-s='0']").click()
    target = token(page, 250)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", target)
    ActionChains(page).move_to_element(target).perform()
    reads(page, "status", "Token at position 250 ", "sees 20 of 251 tokens", "the query at 270 is the first")
    # Twenty tokens are seen, the token's own included, and the token itself by nineteen more.
    classes = {n: token(page, n).get_attribute("class").split()[0] for n in (230, 231, 249, 250, 251, 269, 270)}
    assert classes == {230: "n0", 231: "n5", 249: "n5", 250: "cursor", 251: "sees", 269: "sees", 270: "after"}
    assert by_id(page, "says").text.startswith(
        "Layer 0, head 0 is local: it sees little more than the newest tokens. It keeps 20 tokens on average over"
    )
    # All heads see the last three tokens; the global head alone sees the first.
    press(page, "a")
    reads(page, "status", "in the average head")
    assert [token(page, n).get_attribute("class").split()[0] for n in (10, 249)] == ["n2", "n5"]
    # A click holds the token.
    target.click()
    ActionChains(page).move_to_element(token(page, 255)).perform()
    reads(page, "status", "Token at position 250 ", "(held)")


def test_keys(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(page, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    reads(page, "status", "Token at position 1 ")
    press(page, Keys.END)
    reads(page, "status", "Token at position 399 (of 0 to 399)")
    reads(page, "token-says", "there are no later queries")
    press(page, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    reads(page, "plot-name", "layer 0, head 1")
    press(page, Keys.ARROW_UP)
    reads(page, "plot-name", "layer 0, head 0")
    assert page.find_element("css selector", "[aria-selected=true]").get_attribute("data-s") == "0"
    press(page, Keys.ESCAPE)
    reads(page, "plot-name", "all heads together")
    press(page, Keys.ARROW_DOWN)
    reads(page, "plot-name", "layer 0, head 0")
    by_id(page, "all").click()
    reads(page, "plot-name", "all heads together")
    colours = set()
    for _ in range(2):
        press(page, "t")
        colours.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    press(page, "?")
    wait_for(by_id(page, "explained").is_displayed)
    assert "an eighth of the text's length" in by_id(page, "rules").text


def test_heads_are_sorted_and_filtered(page: Any) -> None:
    from selenium.webdriver.support.select import Select

    sort = Select(by_id(page, "sort"))
    orders = {"layer": "0123", "short": "3021", "long": "1203", "kind": "1032"}
    for name, order in orders.items():
        sort.select_by_value(name)
        assert shown_heads(page) == list(order)
    sort.select_by_value("layer")
    page.find_element("css selector", "#filter [value=local]").click()
    assert shown_heads(page) == ["1", "2"]
    press(page, "a")
    # A kind that no head is of is not there to be chosen.
    assert not page.find_elements("css selector", "#filter [value=punctuation-dropper]")


def test_search(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    before = page.execute_script("return document.querySelector('#text .cursor').dataset.i")
    press(page, "/")
    press(page, "RETURN x")
    reads(page, "found", "1 of 40")
    reads(page, "status", "Token at position 6 ")
    assert "match" in token(page, 7).get_attribute("class") and "match" not in token(page, 8).get_attribute("class")
    press(page, Keys.ENTER)
    reads(page, "status", "Token at position 16 ")
    for _ in range(2):
        by_id(page, "search").send_keys(Keys.SHIFT, Keys.ENTER)
    reads(page, "found", "40 of 40")
    # What is found nowhere leaves the token where it was before the search, and an empty search marks nothing.
    by_id(page, "search").send_keys("nowhere")
    reads(page, "found", "not found")
    reads(page, "status", f"Token at position {before} ")
    by_id(page, "search").clear()
    by_id(page, "search").send_keys("x")
    reads(page, "found", "1 of")
    by_id(page, "search").send_keys(Keys.ESCAPE)
    wait_for(lambda: by_id(page, "found").text == "" and not page.find_elements("css selector", "#text .match"))


def test_what_is_dropped_first(page: Any, folder: Path) -> None:
    ends = np.full((2, 1, T), T)
    ends[0, 0, 2::10] = np.minimum(np.arange(2, T, 10) + 3, T)
    opened(page, made(ends, PIECES, stream="one layer"), folder / "layers.html")
    assert "Layer 0 drops soonest: half of all tokens are seen by" in by_id(page, "summary").text
    assert "Single tokens that are dropped first: “(”" in by_id(page, "summary").text
    rows = by_id(page, "first").find_elements("css selector", "table:first-child tr")
    assert rows[0].text.endswith("later queries that see it (median) share of later queries that see it")
    assert rows[1].text.startswith("( 30 ")
    assert "whitespace" in by_id(page, "first").text and by_id(page, "heads-name").text == "Layers"


def test_the_figure_is_saved(page: Any, folder: Path) -> None:
    by_id(page, "save-svg").click()
    path = folder / "downloads" / "made-up-map.svg"
    wait_for(path.exists)
    figure = ElementTree.fromstring(path.read_text())
    words = ["".join(one.itertext()) for one in figure.iter("{http://www.w3.org/2000/svg}text")]
    for part in ("of the KV cache is given back", "layer 1, head 1: 5"):
        assert any(part in one for one in words)
    by_id(page, "save-png").click()
    path = folder / "downloads" / "made-up-map.png"
    wait_for(path.exists)
    png = path.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (2 * int(figure.attrib["width"]), 2 * int(figure.attrib["height"]))


def test_a_long_text_of_a_large_model_is_small_and_opens_fast(driver: Any, folder: Path) -> None:
    """4,096 tokens of 8 layers of 32 heads, whose ends are random, which packs worst."""
    path, record = folder / "large.html", made(random_ends(8, 32, 4096))
    # Other work on the machine delays some.
    times = [opened(driver, record, path) for _ in range(3)]
    assert path.stat().st_size < 5e6
    assert min(times) < 1000, times
    assert driver.get_log("browser") == []
