"""The pages in a browser: no script error and no request, filters, keys, both colour schemes, a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sniper.reports.comparison_page import Comparison
from sniper.runs.run import Run

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class OpenPage:
    """A page in a browser, with the errors of its script and its requests."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1200, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def shown(self) -> list[str]:
        """Return the kinds of the pictures that are shown."""
        cards = self.page.locator("#gallery .error:visible").all()
        return [card.get_attribute("data-kind") for card in cards]

    def select(self, name: str, value: str) -> None:
        self.page.select_option(f"#filters select[name={name}]", value)

    def wait_for_focus(self, kind: str) -> None:
        """Wait until a picture of a kind of error, or else a tag, has the focus; a dialog gives it back when it can."""
        has_focus = "kind => (document.activeElement.dataset.kind ?? document.activeElement.tagName) === kind"
        self.page.wait_for_function(has_focus, arg=kind)


@pytest.fixture
def opened(browser: Any, read_only_run: Run) -> Iterator[OpenPage]:
    opened = OpenPage(browser, read_only_run.report_path)
    yield opened
    opened.page.close()
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


ALL = ["background", "missed", "wrong_class", "loose"]


def test_filters_by_error_class_and_size_select_pictures(opened: OpenPage) -> None:
    assert opened.shown() == ALL
    opened.select("kind", "loose")
    assert opened.shown() == ["loose"]
    assert opened.page.inner_text("#shown") == "1 of 4 pictures"
    opened.page.click("text=Show all")
    opened.page.wait_for_function("document.querySelector('#shown').textContent === '4 of 4 pictures'")
    labels = {value: [] for value in ("0", "1")}  # type: ignore[var-annotated]
    for value in labels:
        opened.select("label", value)
        labels[value] = opened.shown()
    assert "wrong_class" in labels["0"]
    assert "wrong_class" in labels["1"]
    assert sum(map(len, labels.values())) == 5  # the wrong class belongs to both
    opened.select("label", "")
    opened.select("size", "large")
    assert opened.shown() == []
    assert opened.page.inner_text("#shown") == "No picture has all of these properties."


def test_suspected_gaps_of_the_annotations_are_a_filter(opened: OpenPage) -> None:
    options = opened.page.locator("#filters select[name=kind] option").all_inner_texts()
    has_suspects = "perhaps missing from the annotations" in options
    suspects = opened.page.locator('#gallery .error[data-suspect="1"]').count()
    assert has_suspects == (suspects > 0)


def test_keys_step_enlarge_and_close(opened: OpenPage) -> None:
    page = opened.page
    page.keyboard.press("j")
    opened.wait_for_focus("background")
    page.keyboard.press("j")
    opened.wait_for_focus("missed")
    page.keyboard.press("k")
    opened.wait_for_focus("background")
    page.keyboard.press("Enter")
    view = page.locator("#view")
    assert view.is_visible()
    assert "nothing is annotated here" in page.inner_text("#view .facts")
    assert page.inner_text("#view .number") == "1 of 4"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#view .number") == "2 of 4"
    assert "missed" in page.inner_text("#view .facts")
    page.keyboard.press("Escape")
    assert not view.is_visible()
    opened.wait_for_focus("missed")
    page.keyboard.press("f")
    opened.wait_for_focus("SELECT")


def test_a_click_enlarges_and_buttons_step(opened: OpenPage) -> None:
    page = opened.page
    page.locator("#gallery .error").nth(2).click()
    assert page.inner_text("#view .number") == "3 of 4"
    page.click("#view .previous")
    assert page.inner_text("#view .number") == "2 of 4"
    page.click("#view .following")
    page.click("#view .following")
    page.click("#view .following")  # the last one stays
    assert page.inner_text("#view .number") == "4 of 4"
    picture = page.locator("#view .large img").bounding_box()
    assert picture["height"] > 200
    page.click("#view .close")
    assert not page.locator("#view").is_visible()


def test_charts_show_the_values_under_the_pointer(opened: OpenPage) -> None:
    chart = opened.page.locator("svg.chart").first
    chart.hover()
    reading = opened.page.locator(".reading").first.inner_text()
    assert reading.startswith("epoch ")
    assert "AP50 0." in reading


def test_both_colour_schemes_differ_and_have_contrast(browser: Any, read_only_run: Run) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        opened = OpenPage(browser, read_only_run.report_path, scheme=scheme)
        style = "getComputedStyle(document.body)"
        colors = opened.page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        ground, text = (sum(map(int, color[4:-1].split(","))) / 3 for color in colors)
        assert abs(ground - text) > 180
        assert opened.errors == []
        grounds.append(ground)
        opened.page.close()
    assert grounds[0] > 200
    assert grounds[1] < 60


def test_masks_are_outlined_in_place_of_boxes(browser: Any, run_with_masks: Run) -> None:
    opened = OpenPage(browser, run_with_masks.report_path)
    for pictures, num_marks in (("#gallery", 4), ("#images ~ .images", 10), ("#chips ~ .row", 9)):
        assert opened.page.locator(f"{pictures} path.mark").count() >= num_marks
        assert opened.page.locator(f"{pictures} rect.mark").count() == 0
    is_outside = """paths => paths.filter(path => {
        const box = path.getBBox(), picture = path.ownerSVGElement.viewBox.baseVal
        return box.x < 0 || box.y < 0 || box.x + box.width > picture.width || box.y + box.height > picture.height
    }).length"""
    assert opened.page.locator("path.mark").evaluate_all(is_outside) == 0
    missed = opened.page.locator('#gallery .error[data-kind="missed"] path.missed').get_attribute("d")
    assert missed is not None
    assert len(missed.split("L")) == 3  # a triangle
    assert opened.errors == []
    opened.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser: Any, read_only_run: Run, tmp_path: Path, scheme: str) -> None:
    Comparison.of([read_only_run]).save(tmp_path / "comparison.html")
    for path in (read_only_run.report_path, tmp_path / "comparison.html"):
        opened = OpenPage(browser, path, width=380, scheme=scheme)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380
        assert opened.errors == []
        opened.page.close()
