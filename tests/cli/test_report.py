"""`sniper report`: the page of a run, several runs side by side, and what is refused."""

from pathlib import Path

import pytest

from tests.cli.commands import CommandLine


def test_the_page_of_a_run_is_written(sniper: CommandLine, trained_folder: Path) -> None:
    run = trained_folder / "run"
    (run / "report.html").unlink()
    assert sniper.json("report", run) == {"run": str(run), "page": str(run / "report.html")}
    assert "<h1>run</h1>" in (run / "report.html").read_text()
    sniper.text("report", run, "-o", trained_folder / "other.html")
    assert (trained_folder / "other.html").exists()


@pytest.mark.usefixtures("few_draws")
def test_runs_are_compared_after_their_evaluation(
    sniper: CommandLine, trained_folder: Path, tmp_path: Path
) -> None:
    run, other = trained_folder / "run", tmp_path / "other"
    options = ("--train.epochs", "0.2", "--seed", "3")
    sniper.text("train", trained_folder / "experiment.yaml", "--run", other, *options)
    for each in (run, other):
        assert sniper.json("evaluate", each)["page"] == str(each / "report.html")
        assert "The worst errors" in (each / "report.html").read_text()
    page = tmp_path / "both.html"
    result = sniper.json("report", run, other, "--to", page)
    assert result["page"] == str(page)
    assert result["differences"] == {"seed": [0, 3]}
    assert [row["run"] for row in result["runs"]] == [str(run), str(other)]
    assert all(row["ap_low"] <= row["ap"] <= row["ap_high"] for row in result["runs"])
    assert result["runs"][0]["ap_difference"] is None
    assert result["notes"] == []
    text = sniper.text("report", run, other, "--to", page).out
    assert "seed: 0, 3" in text
    assert text.endswith(f"page: {page}\n")


def test_pages_of_several_runs_have_a_folder(
    sniper: CommandLine, trained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_folder)
    sniper.text("train", "experiment.yaml", "--run", "second", "--train.epochs", "0.2")
    assert sniper.json("report", "run", "second")["page"] == "reports/run-second.html"
    assert Path("reports/run-second.html").exists()


def test_predict_adds_images_without_annotations_to_the_page(
    sniper: CommandLine, trained_folder: Path
) -> None:
    run, image = trained_folder / "run", trained_folder / "images" / "train_0.png"
    assert sniper.json("predict", run, image)["page"] == str(run / "report.html")
    html = (run / "report.html").read_text()
    assert "Images of <code>sniper predict</code>" in html
    assert "train_0.png" in html
    result = sniper.json("predict", run, image, "-o", trained_folder / "elsewhere.json")
    assert "page" not in result


def test_a_run_can_do_without_a_page(sniper: CommandLine, folder: Path) -> None:
    options = ("--train.epochs", "0.2", "--train.report", "false")
    sniper.text("train", folder / "experiment.yaml", "--run", folder / "run", *options)
    assert not (folder / "run" / "report.html").exists()
    assert not (folder / "run" / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: there is no run"),
        (("run", "run"), "expected different runs, one is named twice"),
        (("run", "-o", "page.pdf"), "--output page.pdf: expected a name that ends in .html"),
        (("run", "-o", "missing/page.html"), "there is no folder missing"),
    ],
)
def test_a_mistake_is_explained(
    sniper: CommandLine,
    trained_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(trained_folder)
    assert message in sniper.error("report", *arguments)
