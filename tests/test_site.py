"""The documentation site builds without a warning, is complete, and works without a network."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import sniper

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@dataclass
class Page(HTMLParser):
    """What a page of the site links to, loads from elsewhere, and can be linked to at."""

    links: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def read(cls, path: Path) -> "Page":
        page = cls()
        page.feed(path.read_text())
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value is not None:
                self.anchors.add(value)
            elif name in ("href", "src", "srcset") and value is not None:
                self.links.append(value)
                if tag != "a":
                    self.resources.append(value)


def build(folder: Path, *, config: Path = ROOT / "mkdocs.yml") -> "subprocess.CompletedProcess[str]":
    """Build the site with the settings of a file into a folder."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(folder),
        "-f",
        str(config),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """The result of building the site; its folder is the last but two of the arguments."""
    return build(tmp_path_factory.mktemp("site") / "site")


@pytest.fixture(scope="module")
def site(built: "subprocess.CompletedProcess[str]") -> Path:
    """The folder of the site."""
    return Path(built.args[-3])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """The pages of the site; not the one for absent pages, whose links start at the host."""
    return {path: Page.read(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def find_broken_links(pages: dict[Path, Page]) -> list[str]:
    """Return the links to files of the site, and to places in them, that do not exist."""
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            is_page = target in pages
            if not target.is_file() or (anchor and is_page and anchor not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    return broken


def test_the_site_builds_without_a_warning(built: "subprocess.CompletedProcess[str]") -> None:
    assert built.returncode == 0, built.stderr
    assert built.stdout == ""
    assert [line for line in built.stderr.splitlines() if not line.startswith("INFO ")] == []


def test_a_link_to_an_absent_heading_fails_the_build(tmp_path: Path) -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Here\n\n[there](#absent)\n")
    (tmp_path / "docs" / "left_out.md").write_text("# Left out\n")
    settings = re.sub(r"(?s)^nav:.*?(?=^validation:)", "nav: [index.md]\n", settings, flags=re.MULTILINE)
    settings = settings.replace("extra_css: [assets/extra.css]\n", "")
    (tmp_path / "mkdocs.yml").write_text(settings)
    failed = build(tmp_path / "site", config=tmp_path / "mkdocs.yml")
    assert failed.returncode != 0
    assert "absent" in failed.stderr
    assert "left_out.md" in failed.stderr


def test_every_page_is_in_the_navigation() -> None:
    from mkdocs.config import load_config

    def names(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from names(value)

    listed = list(names(load_config(str(ROOT / "mkdocs.yml"))["nav"]))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(there)


def test_every_decision_is_listed() -> None:
    decisions = {path.name for path in (ROOT / "docs/decisions").glob("0*.md")}
    assert (
        set(re.findall(r"\((0\d+-[\w-]+\.md)\)", (ROOT / "docs/decisions/index.md").read_text())) == decisions
    )


def test_every_link_and_anchor_of_the_site_exists(pages: dict[Path, Page]) -> None:
    assert len(pages) > 20
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert find_broken_links(pages) == []


def test_broken_links_are_detected(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="b.html#x"></a><a href="#top"></a>')
    (tmp_path / "b.html").write_text(
        '<a href="a.html#top"></a><img src="absent.png"><a href="https://c.org"></a>'
    )
    pages = {path: Page.read(path) for path in sorted(tmp_path.glob("*.html"))}
    assert find_broken_links(pages) == ["a.html: b.html#x", "b.html: absent.png"]


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    assert [
        link for page in pages.values() for link in page.resources if re.match(r"(https?:)?//", link)
    ] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles) == []


def test_every_public_name_is_documented_once(pages: dict[Path, Page]) -> None:
    of_reference = [page for path, page in pages.items() if path.parent.name == "api"]
    counts = {name: sum(f"sniper.{name}" in page.anchors for page in of_reference) for name in sniper.__all__}
    assert counts == dict.fromkeys(sniper.__all__, 1)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Discard a line of the log."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The address of a server of the site, on the loopback interface."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_window_and_are_found_by_the_search(address: str, width: str, scheme: Any) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    faults: list[str] = []
    with playwright.sync_playwright() as tools:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = tools.chromium.launch(executable_path=BROWSER, args=arguments)
        sides = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        page = browser.new_page(viewport=sides, color_scheme=scheme)
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(address) else faults.append(request.url)
        )
        for name in ("index", "first_hour", "configuration", "paper", "api/training", "proof"):
            page.goto(f"{address}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= sides["width"], name
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) == (scheme == "dark")
        page.click("label.md-header__button[for=__search]" if width == "phone" else "input.md-search__input")
        page.wait_for_function("document.activeElement.matches('input.md-search__input')")
        page.keyboard.type("overlap")
        page.wait_for_selector(".md-search-result__item a", timeout=60_000)
        assert page.locator(".md-search-result__item").count() > 0
        browser.close()
    assert faults == []
