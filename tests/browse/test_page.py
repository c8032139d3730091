"""The page works in a real browser: images, boxes, chips, filters, keys, messages, and nothing from the network."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from PIL import Image

from tests.browse.data import Client, load, match, noise, serving, write_coco

sync_api = pytest.importorskip("playwright.sync_api")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
TIMEOUT = 120_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Three good images, of which the third has no object, and one that is missing."""
    folder = tmp_path_factory.mktemp("page")
    for index, name in enumerate(("a.png", "b.png", "empty.png")):
        Image.fromarray(noise(1200, 900, seed=index)).save(folder / name)
    sides = dict.fromkeys(("a.png", "b.png", "empty.png", "missing.png"), (1200, 900))
    boxes = {
        "a.png": [(1, 100, 100, 40, 40), (2, 600, 500, 200, 200), (1, 900, 100, 30, 30)],
        "b.png": [(2, 300, 300, 50, 50)],
        "missing.png": [(1, 10, 10, 30, 30)],
    }
    dataset = load(write_coco(folder, sides, boxes))
    detections = match(
        dataset,
        [
            (1, 1, 0.9, [100, 100, 40, 40]),
            (1, 2, 0.35, [605, 500, 200, 200]),
            (1, 1, 0.6, [300, 700, 50, 50]),
            (2, 2, 0.8, [300, 300, 50, 50]),
        ],
    )
    with serving(dataset, detections=detections, min_score=0.5) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A headless Chromium."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser", client: Client) -> Iterator["Page"]:
    """The page, opened; no script may fail, and no request go elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    errors: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(client.server.url)
    wait(page, "chips.state === 'ready' && image && image.chips")
    yield page
    assert [error for error in errors if "responded with a status of 400" not in error] == []  # a bad filter
    assert requested
    assert all(url.startswith((client.server.url, "data:,")) for url in requested)
    context.close()


def run(page: "Page", script: str) -> Any:
    return page.evaluate(script)


def wait(page: "Page", condition: str) -> None:
    """Wait until a condition holds; Playwright's own way evaluates text, which the page's policy forbids."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while not run(page, condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def wait_until_drawn(page: "Page") -> None:
    wait(page, "loading === 0 && drawn === 0")


def row(page: "Page", text: str) -> str:
    """Return the count beside a text of the legend."""
    return page.locator("#legend .row", has_text=text).locator("b").inner_text()


def colors_at(page: "Page", *, x: float, y: float) -> list[int]:
    """Return the colour of the canvas at a point of the image."""
    return run(
        page,
        f"""(() => {{ const ratio = window.devicePixelRatio;
        const at = [({x} - view.x) * view.scale * ratio, ({y} - view.y) * view.scale * ratio].map(Math.round);
        return [...context.getImageData(...at, 1, 1).data].slice(0, 3); }})()""",
    )


def test_the_page_shows_an_image_with_its_objects_and_errors(page: "Page") -> None:
    assert page.locator("#name").inner_text() == "a.png"
    assert page.locator("#position").input_value() == "1"
    assert page.locator("#total").inner_text() == "of 4"
    assert "<i>annotations</i>" in page.title()
    texts = ("Objects", "detected", "missed", "Detections", "true positives", "false positives")
    assert [row(page, text) for text in texts] == ["3", "1", "2", "2", "1", "1"]
    page.locator("#score").fill("0.3")
    assert [row(page, text) for text in texts] == ["3", "2", "1", "3", "2", "1"]
    words = page.locator("#boxes button span:nth-child(2)").all_text_contents()
    assert words == ["car", "car 0.60", "car 0.90", "<b>bike</b> 0.35", "car", "<b>bike</b>"]  # errors first


def test_the_pixels_of_the_canvas_are_those_of_the_image(page: "Page") -> None:
    pixels = noise(1200, 900)
    for name in ("o", "x", "l"):
        page.keyboard.press(name)
    page.keyboard.press("1")
    wait_until_drawn(page)
    # The upper left corner of the view lies between pixels: move it onto one.
    run(page, "view.x = Math.round(view.x), view.y = Math.round(view.y), draw()")
    wait_until_drawn(page)
    for x, y in ((600, 450), (513, 511), (700, 512)):
        assert colors_at(page, x=x, y=y) == pixels[y, x].tolist()


def test_keys_step_through_images_boxes_and_chips(page: "Page") -> None:
    page.keyboard.press("ArrowRight")
    wait(page, "image.index === 1")
    assert page.url.endswith("#2")
    page.keyboard.press("Home")
    wait(page, "image.index === 0")
    page.keyboard.press("n")
    assert run(page, "[marks[selected].box, kindOf(marks[selected])]") == [[600, 500, 800, 700], "missed"]
    assert run(page, "isFitted") is False
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert run(page, "kindOf(marks[selected])") == "true"
    page.keyboard.press("0")
    assert run(page, "isFitted") is True
    page.keyboard.press("]")
    assert run(page, "[shown.chips, chip]") == [True, 0]
    assert "valid" in page.locator("#chip").inner_text()
    page.keyboard.press("[")
    assert run(page, "chip") == run(page, "image.chips.length - 1")
    page.keyboard.press("Escape")
    assert run(page, "[chip, selected]") == [None, None]
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_filters_select_images_and_typing_in_them_triggers_no_key(page: "Page") -> None:
    page.keyboard.press("f")
    page.locator("#kind").select_option("empty")
    wait(page, "image && image.name === 'empty.png'")
    assert page.locator("#kept").inner_text() == "1 of 4 images"
    page.locator("#kind").select_option("missed")
    wait(page, "kept.length === 2")
    page.locator("#file-name").type("a.pnc0")
    wait(page, "kept.length === 0")
    assert page.locator("#message").inner_text() == "No image fits the filter."
    assert run(page, "[shown.chips, image]") == [False, None]
    page.locator("#filter button[type=reset]").click()
    wait(page, "kept.length === 4 && image !== null")
    assert page.locator("#message").is_hidden()
    page.locator("#below").fill("45")
    wait(page, "kept.length === 2")
    page.locator("#level").select_option("1")
    wait(page, "kept.length === 1")  # of 40 px
    page.locator("#at-least").fill("-3")
    wait(page, "document.getElementById('kept').textContent.includes('out of range')")


def test_an_image_that_cannot_be_read_shows_why(page: "Page") -> None:
    page.locator("#position").fill("4")
    page.locator("#position").press("Enter")
    wait(page, "image.name === 'missing.png'")
    text = page.locator("#message").inner_text()
    assert text.startswith("This image cannot be shown.")
    assert "missing.png: does not exist" in text
    page.keyboard.press("ArrowLeft")
    wait(page, "image.name === 'empty.png'")
    assert page.locator("#message").is_hidden()


def test_the_mouse_zooms_moves_and_selects(page: "Page") -> None:
    wait_until_drawn(page)
    box = page.locator("#view").bounding_box()
    assert box is not None
    x, y = run(page, "[(115 - view.x) * view.scale, (115 - view.y) * view.scale]")
    page.mouse.click(box["x"] + x, box["y"] + y)
    assert run(page, "marks[selected].label") == 0
    assert page.locator("#boxes [aria-current=true]").count() == 1
    before = run(page, "[view.scale, view.x + 300 / view.scale]")
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    page.mouse.wheel(0, -250)
    wait(page, f"view.scale > {1.5 * before[0]}")
    assert run(page, "view.x + 300 / view.scale") == pytest.approx(before[1])
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 300, steps=4)
    page.mouse.up()
    assert run(page, "view.x + 200 / view.scale") == pytest.approx(before[1])


Scheme = Literal["light", "dark"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_schemes(browser: "Browser", client: Client, scheme: Scheme) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(client.server.url)
    wait(page, "image !== null")
    assert run(page, "document.documentElement.scrollWidth") <= 360
    ground = run(page, "getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_a_lost_connection_is_reported(browser: "Browser", tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(60, 60)).save(tmp_path / name)
    dataset = load(write_coco(tmp_path, dict.fromkeys(("a.png", "b.png"), (60, 60)), {}))
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    with serving(dataset) as client:
        page.goto(client.server.url)
        wait(page, "image !== null && chips.state === 'none' && loading === 0")
        assert "no object to learn from" in page.locator("#chips-note").inner_text()
        page.route("**/*", lambda route: route.abort())
        page.keyboard.press("ArrowRight")
        wait(page, "!document.getElementById('message').hidden")
        assert "connection to sniper browse is lost" in page.locator("#message").inner_text()
    context.close()
