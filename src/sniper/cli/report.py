"""`sniper report`: write the page of a run, or one with several runs side by side."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sniper.cli.inputs import check_parent
from sniper.cli.options import Json, default
from sniper.cli.output import console, print_line, print_result
from sniper.errors import ConfigError


def report(
    run: Annotated[Path, Parameter(help="Folder of a run.")],
    /,
    *others: Annotated[
        Path, Parameter(help="Folders of other runs, to be shown side by side with the first.")
    ],
    output: Annotated[
        Path | None,
        Parameter(
            name=["-o", "--output", "--to"],
            help="Page to write (.html).",
            show_default=default("RUN/report.html; of several runs, reports/NAMES.html"),
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write the page of a run anew, or a page with several runs side by side.

    The page of a run is written by `sniper train` after every epoch, and by `sniper predict` and `sniper evaluate`;
    this command writes it from what they have kept. Several runs are compared: what differs in their experiments,
    their scores with bounds by a paired bootstrap over images, and their curves over megapixels and minutes. No image
    is read.
    """
    from sniper.reports.comparison_page import Comparison
    from sniper.reports.run_page import write_run_page
    from sniper.runs.run import Run

    runs = [Run.open(folder) for folder in (run, *others)]
    if output is not None:
        _check_page(output)
    if not others:
        page = write_run_page(runs[0], output)
        print_result({"run": str(run), "page": str(page)}, is_json=json)
        return
    with console.status("resampling images"):
        comparison = Comparison.of(runs)
    page = _default_page(comparison.names) if output is None else output
    comparison.save(page)
    if json:
        print_result({**comparison.as_dict(), "page": str(page)}, is_json=True)
        return
    for line in comparison.describe():
        print_line(line)
    print_line(f"page: {page}")


def _check_page(path: Path) -> None:
    check_parent(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {path}: expected a name that ends in .html")


def _default_page(names: list[str]) -> Path:
    """Return the page of some runs, in a folder that is created."""
    folder = Path("reports")
    folder.mkdir(exist_ok=True)
    return folder / ("-".join(name.replace("/", "_") for name in names)[:120] + ".html")
