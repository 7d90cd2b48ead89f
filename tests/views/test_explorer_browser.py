"""The explorer's page in Chromium, without a display: it opens, searches, unfolds, and says nothing on the console."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx

pytest.importorskip("selenium", reason="selenium is not installed (pip install stp-fx[test])")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Chromium or its driver is not installed (apt-get install chromium chromium-driver)"
)
ODD = "<img src=x onerror=alert(1)></script>"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).relu())


def network() -> nn.Sequential:
    """Twelve modules of three boxes: more than a page shows unfolded. The fourth's name is no name to HTML."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1))
    for k in range(12):
        net.add_module(ODD if k == 3 else f"block{k}", nn.Sequential(Block(8), Block(8)))
    net.add_module("head", nn.Conv2d(8, 5, 1))
    return net


@pytest.fixture(scope="module")
def plan_and_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[stp_fx.PrunePlan, str]:
    gm = stp_fx.trace(network().eval(), torch.zeros(1, 3, 4, 4), validate=False)
    plan = stp_fx.analyze(gm).plan_for({"0": [1, 5], "block0.0.a": list(range(4))})
    path = tmp_path_factory.mktemp("page") / "net.html"
    stp_fx.explore(gm, path, plan=plan, title=ODD)
    return plan, path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, plan_and_page: tuple[stp_fx.PrunePlan, str]) -> Iterator[webdriver.Chrome]:
    browser.get("about:blank")
    browser.get(plan_and_page[1])
    yield browser
    assert browser.get_log("browser") == []


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [each.text for each in browser.find_elements(By.CSS_SELECTOR, selector)]


def text(browser: webdriver.Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def find(browser: webdriver.Chrome, query: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    browser.switch_to.active_element.send_keys(Keys.CONTROL, "a", Keys.NULL, query)


def names(browser: webdriver.Chrome) -> list[str]:
    return texts(browser, "#graph .box .name")


def centres(browser: webdriver.Chrome) -> dict[str, Any]:
    """The rectangles of all boxes of the picture, by their first line."""
    return {
        each.find_element(By.CSS_SELECTOR, ".name").text: each.rect
        for each in browser.find_elements(By.CSS_SELECTOR, "#graph .box")
    }


def test_it_opens_with_modules_folded_and_names_as_text(opened: webdriver.Chrome) -> None:
    assert text(opened, "#title") == ODD
    assert not opened.find_elements(By.TAG_NAME, "img")
    found = names(opened)
    assert "+ block0" in found
    assert any("onerror" in name for name in found)
    assert not any(name.startswith("block0.") for name in found)
    assert texts(opened, "#totals tr")[1].split() == ["units", "392", "386", "98.5", "%"]


def test_a_click_unfolds_and_the_caption_folds(opened: webdriver.Chrome) -> None:
    before = len(names(opened))
    opened.find_element(By.CSS_SELECTOR, '.box[aria-label^="module block0,"]').click()
    assert {"+ block0.0", "+ block0.1"} <= set(names(opened))
    assert len(names(opened)) == before + 1
    assert text(opened, "#panel h2") == "block0"
    opened.find_element(By.CSS_SELECTOR, '.box[aria-label^="module block0.0,"]').send_keys(Keys.ENTER)
    assert {"a", "b", "add", "+ block0.1"} <= set(names(opened))
    places = centres(opened)
    assert places["a"]["y"] < places["b"]["y"] < places["add"]["y"] < places["+ block0.1"]["y"]
    opened.find_element(By.CSS_SELECTOR, '.caption[aria-label="fold module block0"]').click()
    assert len(names(opened)) == before
    opened.find_element(By.ID, "unfold").click()
    assert len(names(opened)) == 3 + 24 * 3 + 1
    opened.find_element(By.ID, "fold").click()
    assert len(names(opened)) == before


def test_boxes_do_not_overlap(opened: webdriver.Chrome) -> None:
    opened.find_element(By.ID, "unfold").click()
    rects = [each.rect for each in opened.find_elements(By.CSS_SELECTOR, "#graph .box .body, #graph .caption rect")]
    for k, one in enumerate(rects):
        for other in rects[k + 1 :]:
            apart = [
                one[at] + one[size] <= other[at] + 1 or other[at] + other[size] <= one[at] + 1
                for at, size in (("x", "width"), ("y", "height"))
            ]
            assert any(apart), (one, other)


def test_search_by_keyboard_unfolds_and_says_what_a_channel_is_coupled_to(opened: webdriver.Chrome) -> None:
    find(opened, "block7.1.b[3]")
    assert texts(opened, "#found li")[0].startswith("block7.1.b.weight:0[3]")
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    shown = text(opened, "#panel")
    assert "unit 3 of 0.weight:0: kept" in shown
    assert all(f"block{k}.0.a.weight:1[3]" in shown for k in (0, 11))
    assert text(opened, "#graph .box.picked .name") == "b"
    assert len(opened.find_elements(By.CSS_SELECTOR, "#graph svg.choosing .edge.hit")) > 10
    find(opened, "block0.0.a.weight:0[2]")
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert "unit 2 of block0.0.a.weight:0: removed" in text(opened, "#panel")


def test_reasons_are_found_and_shown_while_the_mouse_is_over_a_box(opened: webdriver.Chrome) -> None:
    find(opened, "graph output")
    opened.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ENTER)
    assert text(opened, "#panel h2") == "pinned: graph output"
    assert "head.weight:0" in text(opened, "#panel")
    find(opened, "head")
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    head = opened.find_element(By.CSS_SELECTOR, '.box[aria-label^="layer head,"]')
    webdriver.ActionChains(opened).move_to_element(head).perform()
    assert "head.weight:0 5 pinned: graph output" in text(opened, "#tip")
    assert "0.weight:0" in text(opened, "#tip")


def test_tabs_show_groups_layers_and_the_plan(opened: webdriver.Chrome, plan_and_page: tuple[stp_fx.PrunePlan, str]) -> None:
    tabs = {tab.text: tab for tab in opened.find_elements(By.CSS_SELECTOR, "#tabs button")}
    assert list(tabs) == ["overview", "groups", "layers", "pinned", "plan"]
    tabs["groups"].click()
    rows = texts(opened, "#panel tbody tr")
    assert len(rows) == 25
    assert rows[0].replace("\n", " ").startswith("1 0.weight:0 8 6 (75 %)")
    opened.find_element(By.CSS_SELECTOR, "#panel tbody tr").click()
    assert "conv" in text(opened, "#panel") or "0.weight:0" in text(opened, "#panel h2")
    opened.find_elements(By.CSS_SELECTOR, "#tabs button")[4].click()
    area = opened.find_element(By.CSS_SELECTOR, "#panel textarea")
    assert json.loads(area.get_property("value")) == json.loads(plan_and_page[0].to_json())
    opened.find_element(By.CSS_SELECTOR, "#panel button").click()
    opened.find_elements(By.CSS_SELECTOR, "#tabs button")[2].click()
    assert any(row.startswith("block0.0.a ") for row in texts(opened, "#panel tbody tr"))


def test_themes_directions_and_zoom(opened: webdriver.Chrome) -> None:
    def ink() -> str:
        return opened.find_element(By.TAG_NAME, "body").value_of_css_property("color")

    light = ink()
    opened.find_element(By.ID, "theme").click()
    assert ink() != light
    opened.find_element(By.ID, "theme").click()
    tall = opened.find_element(By.CSS_SELECTOR, "#graph svg").size
    opened.find_element(By.ID, "turn").click()
    wide = opened.find_element(By.CSS_SELECTOR, "#graph svg").size
    assert tall["height"] > tall["width"]
    assert wide["width"] > wide["height"]
    opened.find_element(By.TAG_NAME, "body").send_keys("+")
    assert opened.find_element(By.CSS_SELECTOR, "#graph svg").size["width"] > wide["width"]


def test_a_page_in_a_frame_of_a_notebook_runs(opened: webdriver.Chrome, tmp_path: pathlib.Path) -> None:
    gm = stp_fx.trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval(), torch.zeros(1, 3, 4, 4), validate=False)
    (tmp_path / "cell.html").write_text(f'<meta charset="utf-8">{stp_fx.explore(gm)._repr_html_()}', encoding="utf-8")
    opened.get((tmp_path / "cell.html").as_uri())
    opened.switch_to.frame(opened.find_element(By.TAG_NAME, "iframe"))
    assert names(opened) == ["input_1", "0", "1", "output"]
    opened.switch_to.default_content()
