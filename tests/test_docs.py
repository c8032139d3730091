"""The documentation as GitHub shows it: its generated page is up to date, and its links lead to files and headings."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from sniper.specs import spec_dataclass

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPOSITORY = re.compile(r"https://github\.com/sniper-det/sniper/(?:blob|tree)/main/")
OF_REFERENCE = "sniper."  # anchors of the site only, which tests/test_site.py checks
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
SOURCE = re.compile(r"""(?:src|srcset|href)=["']([^"'\s]+)""")  # of HTML in Markdown


def load_generator() -> ModuleType:
    """Import the script that writes docs/configuration.md."""
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "script/configuration_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_links(text: str) -> list[str]:
    """Find the targets of all links and images outside code blocks."""
    prose = FENCE.sub("", text)
    return LINK.findall(prose) + SOURCE.findall(prose)


def find_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_broken_links(page: Path, *, root: Path = ROOT) -> list[str]:
    """Return the links of a page to files and headings that do not exist; links to other sites are not checked."""
    broken = []
    for link in find_links(page.read_text()):
        path, _, anchor = link.partition("#")
        in_repository = REPOSITORY.match(path)
        if in_repository:
            target = root / path[in_repository.end() :]
        elif re.match(r"\w+:", path):
            continue
        else:
            target = page.parent / path if path else page
        is_heading = anchor != "" and target.suffix == ".md" and not anchor.startswith(OF_REFERENCE)
        if not target.exists() or (is_heading and anchor not in find_anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert find_broken_links(page) == []


def test_broken_links_are_detected(tmp_path: Path) -> None:
    repository = "https://github.com/sniper-det/sniper/blob/main"
    links = ["a.md", "a.md#the-title", "#here", f"{repository}/a.md", "https://example.org/none"]
    broken = ["b.md", "a.md#other", "#there", f"{repository}/b.md"]
    (tmp_path / "a.md").write_text("# The title\n")
    page = tmp_path / "page.md"
    page.write_text("# Here\n" + " ".join(f"[text]({link})" for link in links + broken) + "\n")
    assert find_broken_links(page, root=tmp_path) == broken


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    generator = load_generator()
    assert (ROOT / "docs/configuration.md").read_text() == generator.render_page(), "run script/docs"


def test_a_field_without_a_description_is_an_error() -> None:
    @spec_dataclass
    class Grid:
        """A grid.

        Attributes:
            side: of a cell.
        """

        side: int = 1
        overlap: float = 0.2

    with pytest.raises(ValueError, match=r"Grid: expected the attributes \['side', 'overlap'\]"):
        load_generator().read_docstring(Grid)
