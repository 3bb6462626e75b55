"""The page of a run: it holds everything it shows, tells what the figures mean, and works in a browser without a network."""

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import hash_files, latentloom, run_python
from html_pages import Page, open_in_browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentloom.report import reading
from latentloom.report.diagnostics import diagnostics
from latentloom.report.numbers import number
from latentloom.report.panels import PANELS, marks_something
from latentloom.report.reading import chosen_grids, find_codebook_size, read_run
from latentloom.report.svg_charts import CURVE_POINTS, thinned

ENVIRONMENT = {
    "run_id": "0a1b2c3d",
    "machine": {"device": "cpu", "processor": "A processor & sons", "cores": 2, "threads": 2},
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "processes": 1,
    "distributed_type": "NO",
}
TOKENIZER: dict[str, Any] = {
    "output": "runs/t",
    "max_steps": 1000,
    "batch_size": 16,
    "accumulation_steps": 1,
    "data": "images",
    "model": {"codebook_size": 512, "quantizer": {"name": "ema", "restart_threshold": 0.3}},
    "optimizer": {"max_grad_norm": 1.0},
}
PRIOR: dict[str, Any] = {
    "output": "runs/p",
    "max_steps": 1000,
    "codes": "runs/codes",
    "model": {"hidden_size": 64, "dropout": 0.0},
    "optimizer": {"max_grad_norm": 1.0},
}
Row = dict[str, Any]


def tokenizer_rows(last: int = 1000, codes: float = 480, perplexity: float = 400) -> list[Row]:
    rows: list[Row] = []
    for step in range(25, last + 1, 25):
        fall = math.exp(-step / 400)
        rows.append(
            {"step": step, "l1": 0.05 + 0.1 * fall, "l2": 0.01 + 0.05 * fall, "codebook": 0.02, "commitment": 0.02}
            | {"perceptual": 0.0, "learning_rate": 0.01 * (1 - step / 1000), "gradient_norm": 1 + 3 * fall}
            | {"images_per_second": 250 + 30 * math.sin(step)}
        )
        if step >= 500:
            rows[-1] |= {"generator": 0.4 - step / 2000, "discriminator": 1.9, "adaptive_weight": 0.3}
            rows[-1] |= {"logits_real": 0.2, "logits_fake": -0.2}
        if step % 250 == 0:
            rows.append(
                {"step": step, "validation_psnr": 20 + step / 250, "codes_used": codes, "perplexity": perplexity}
            )
    return rows


def prior_rows(validation: list[float], training: Callable[[int], float] = lambda step: 6 - step / 300) -> list[Row]:
    rows: list[Row] = []
    for step in range(25, 250 * len(validation) + 1, 25):
        rows.append({"step": step, "nats_per_token": training(step), "learning_rate": 0.01, "images_per_second": 500.0})
        if step % 250 == 0:
            nats = validation[step // 250 - 1]
            rows.append({"step": step, "validation_nats_per_token": nats, "validation_bits_per_image": nats * 70.69})
    return rows


def write_run(folder: Path, config: Row, rows: list[Row], grids: tuple[int, ...] = (), finished: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in grids:
        write_picture(folder / "samples" / f"step_{step:06d}.png", step % 256)
    if finished:
        write_json(folder / "environment.json", ENVIRONMENT)
        write_json(folder / "model" / "config.json", {"codebook_size": 512})
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_picture(path: Path, grey: int, size: tuple[int, int] = (120, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine", TOKENIZER, tokenizer_rows(), (250, 500, 750, 1000), finished=True)


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    return write_run(tmp_path / "second", PRIOR, prior_rows([4.2, 3.9, 3.8, 3.7]), (500, 1000), finished=True)


@pytest.fixture
def whole_job(tmp_path: Path) -> Path:
    folder = tmp_path / "both"
    write_run(folder / "tokenizer", TOKENIZER, tokenizer_rows(), (500, 1000), finished=True)
    write_run(folder / "prior", PRIOR, prior_rows([4.2, 3.9, 3.8, 3.7]), (500, 1000), finished=True)
    write_picture(folder / "samples.png", 10)
    write_picture(folder / "reconstructions.png", 20)
    figures = {"psnr": 24.5, "frechet": 0.4567, "frechet_interval": [0.4, 0.5], "recall": 0.625, "seconds": 75.0}
    by_class = {"coats & <hats>": {"frechet": 0.9, "recall": 0.5}}
    write_json(folder / "metrics.json", figures | {"floor": {"recall": 0.875}, "by_class": by_class, "num_images": 200})
    return folder


def report(folder: Path) -> Page:
    assert latentloom("report", folder) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def said(folder: Path) -> dict[str, str]:
    """Verdicts on a run: texts by title, each with its level in front."""
    return {verdict.title: f"{verdict.level}: {verdict.text}" for verdict in diagnostics(read_run(folder))}


# -- what the page holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "pictures"), [("tokenizer", 4), ("prior", 2), ("whole_job", 6)])
def test_a_page_holds_its_pictures_and_asks_no_one_for_anything(
    kind: str, pictures: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    page = report(folder)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), f"<{tag} {name}={attributes[name]!r}>"
    text = re.sub(r'"data:image[^"]*"', "", (folder / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|(src|href)\s*=\s*[\"']?//", text)
    assert len(page.images()) == pictures
    assert all(image["alt"] for image in page.find_all("img"))
    assert all(drawing["aria-label"] for drawing in page.find_all("svg"))


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_every_logged_figure_is_a_curve_from_its_first_value_to_its_last(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    run, drawn = read_run(folder), list(report(folder).curves().values())
    for name, points in run.figures.items():
        rounded = [(step, float(f"{value:.6g}")) for step, value in points]
        assert rounded in drawn or not any(value for _, value in points), name
    assert any(len(points) == 40 for points in drawn)


def test_a_page_of_a_job_has_both_stages_and_the_final_figures(whole_job: Path) -> None:
    page = report(whole_job)
    assert [section["id"] for section in page.find_all("section")] == ["results", "tokenizer", "prior"]
    for shown in (
        "24.5",
        "0.4567",
        "0.4 … 0.5",
        "62.5\N{NO-BREAK SPACE}%",
        "87.5\N{NO-BREAK SPACE}%",
        "1 min 15 s",
        "coats & <hats>",
    ):
        assert shown in page.text
    assert {"L1", "training"} <= set(page.curves())


def test_a_job_whose_prior_has_not_begun_has_a_page_of_its_tokenizer(whole_job: Path) -> None:
    shutil.rmtree(whole_job / "prior")
    for name in ("metrics.json", "samples.png", "reconstructions.png"):
        (whole_job / name).unlink()
    assert [section["id"] for section in report(whole_job).find_all("section")] == ["tokenizer"]


def test_the_page_says_where_the_run_stands_and_ran(tokenizer: Path) -> None:
    text = report(tokenizer).text
    for shown in ("finished", "16,000 images", "A processor & sons", "torch 2.14.1", "24 dB", "restart_threshold: 0.3"):
        assert shown in " ".join(text.split()), shown


def test_a_run_in_progress_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young", TOKENIZER, tokenizer_rows(75))
    page = report(folder)
    assert "step 75 of 1,000" in page.text
    assert "finished" not in page.text
    assert "no environment.json" in page.text
    assert page.find_all("img") == []
    assert "L1" in page.curves()


def test_all_steps_without_a_model_are_not_called_finished(tokenizer: Path) -> None:
    shutil.rmtree(tokenizer / "model")
    assert "all steps done, model not written" in report(tokenizer).text


def test_a_torn_last_line_is_left_out(tokenizer: Path) -> None:
    with (tokenizer / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1025, "l1": 0.0')
    assert report(tokenizer).curves()["L1"][-1][0] == 1000


def test_a_run_that_was_taken_up_again_shows_where_on_every_chart(tmp_path: Path) -> None:
    rows = tokenizer_rows()
    at = next(i for i, row in enumerate(rows) if row["step"] == 525)
    whole = report(write_run(tmp_path / "whole", TOKENIZER, rows))
    resumed = report(
        write_run(tmp_path / "resumed", TOKENIZER, [*rows[:at], {"step": 500, "resumed_from": 500}, *rows[at:]])
    )
    assert whole.find_all("g", "resumed") == []
    assert len(resumed.find_all("g", "resumed")) == len(resumed.find_all("svg"))
    assert "From step 500" in resumed.text
    assert resumed.curves() == whole.curves()


def test_spikes_are_marked_and_skipped_steps_listed(tokenizer: Path) -> None:
    with (tokenizer / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 610, "gradient_norm_spike": 77.7, "usual_gradient_norm": 1.5}) + "\n")
        log.write(json.dumps({"step": 620, "discriminator_gradient_norm_spike": 9.0}) + "\n")
    for process in (0, 1):
        row = {"step": 333, "process": process, "source_ids": ["a<b>.png", "c", "d", "e"], "l1": "nan"}
        write_json(tokenizer / f"skipped_steps.{process}.jsonl", row)
    page = report(tokenizer)
    assert len(page.find_all("path", "mark")) == 2
    assert "the largest is 77.7 at step 610" in page.text
    assert "1 gradient spike of the discriminator" in page.text
    assert "1 step skipped" in page.text
    assert "l1 = nan" in page.text
    assert "a<b>.png, c, d and 1 more" in page.text


def test_values_that_are_no_finite_numbers_are_counted_and_not_drawn(tmp_path: Path) -> None:
    rows = tokenizer_rows()
    rows[3]["l1"], rows[4]["l1"] = math.nan, math.inf
    page = report(write_run(tmp_path / "nan", TOKENIZER, rows))
    assert len(page.curves()["L1"]) == 38
    assert "2 values that are no finite number left out" in page.text
    assert "nan" not in " ".join(f"{line}" for line in page.find_all("polyline"))


def test_a_figure_that_no_panel_knows_gets_a_chart_of_its_own(tmp_path: Path) -> None:
    rows = [{"step": step, "noise_level": 1.0 + step, "note": "words", "flag": True} for step in (1, 2)]
    assert report(write_run(tmp_path / "new", TOKENIZER, rows)).curves() == {"noise level": [(1, 2.0), (2, 3.0)]}


def test_curves_that_lie_on_one_another_are_one_curve_with_both_names(tokenizer: Path) -> None:
    curves = report(tokenizer).curves()
    assert "codebook = commitment" in curves
    assert "commitment" not in curves


HOSTILE = '</pre></script><script>document.title="taken"</script><img src=x onerror=alert(1)>"\'&'


def test_nothing_in_a_file_becomes_markup(whole_job: Path) -> None:
    plain = report(whole_job)
    config = TOKENIZER | {"data": HOSTILE}
    rows = [row | {HOSTILE: 1.0} for row in tokenizer_rows()]
    write_run(
        whole_job / "tokenizer", config, [*rows, {"step": 500, "resumed_from": 500}]
    )  # with a legend on every chart
    write_json(
        whole_job / "tokenizer" / "environment.json", {"machine": {"device": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    )
    write_json(
        whole_job / "tokenizer" / "skipped_steps.0.jsonl", {"step": 1, "source_ids": [HOSTILE], HOSTILE: HOSTILE}
    )
    write_json(
        whole_job / "metrics.json", {"psnr": 20.0, "by_class": {HOSTILE: {}}, "features": HOSTILE, "num_images": 1}
    )
    folder = whole_job.rename(whole_job.with_name("<script>1"))
    page = report(folder)
    assert len(page.find_all("script")) == len(plain.find_all("script")) == 1
    assert len(page.find_all("img")) == len(plain.find_all("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count('document.title="taken"') >= 6
    assert HOSTILE.replace("_", " ") in page.curves()


# -- long logs and many pictures ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes_in_order(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    kept = thinned(points, limit)
    assert len(kept) <= max(limit, 1)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert min(value for _, value in kept) == min(values)
    assert max(value for _, value in kept) == max(values)


def test_a_long_log_keeps_every_extreme_and_gives_a_small_page(tmp_path: Path) -> None:
    def value(step: int, of: int) -> float:
        return {70_001 + of: 9.0, 30_003 + of: 1e-4}.get(step, 0.5 + 0.1 * math.sin(step + of))

    names = ("l1", "l2", "codebook", "gradient_norm", "another")
    rows = [{"step": step} | {name: value(step, i) for i, name in enumerate(names)} for step in range(1, 100_001)]
    folder = write_run(tmp_path / "long", TOKENIZER, rows)
    curves = report(folder).curves()
    assert len(curves) == len(names)
    for i, points in enumerate(curves.values()):
        assert {(70_001 + i, 9.0), (30_003 + i, 1e-4)} <= set(points)
        assert len(points) <= CURVE_POINTS
    assert (folder / "report.html").stat().st_size < 400_000


@pytest.mark.parametrize(
    ("found", "size", "shown"), [(1, 1, 1), (2, 10**9, 2), (40, 1, 40), (1000, 1, 40), (40, 10**6, 16)]
)
def test_grids_are_thinned_evenly_and_the_first_and_last_kept(found: int, size: int, shown: int) -> None:
    steps = [500 * i for i in range(1, found + 1)]
    chosen = chosen_grids(dict.fromkeys(steps, size))
    assert len(chosen) == len(set(chosen)) == shown
    assert (chosen[0], chosen[-1]) == (steps[0], steps[-1])
    gaps = [after - before for before, after in pairwise(chosen)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 500
    assert chosen_grids({}) == []


def test_only_the_last_grid_is_in_view_before_a_script_runs(tokenizer: Path) -> None:
    page = report(tokenizer)
    assert ["hidden" in image for image in page.find_all("img")] == [True, True, True, False]
    assert page.find_all("img")[-1]["alt"].endswith("at step 1,000")
    assert "hidden" in page.find_all("div", "controls")[0]


def test_a_page_says_how_many_of_the_grids_it_shows(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_GRIDS", 3)
    page = report(tokenizer)
    assert len(page.find_all("img")) == 3
    assert "3 grids of 4, evenly spread" in page.text


def test_a_picture_that_cannot_be_shown_is_left_out(tokenizer: Path) -> None:
    whole = tokenizer / "samples" / "step_000750.png"
    whole.write_bytes(whole.read_bytes()[:60])
    (tokenizer / "samples" / "step_001000.png").write_text("<svg onload=alert(1)>")
    (tokenizer / "samples" / "mine.png").write_bytes(b"")
    assert len(report(tokenizer).images()) == 2


# -- verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "perplexity", "model", "title", "remedy"),
    [
        (480, 400, {}, "The codebook is in good use", "480 of 512"),
        (52, 128, {}, "The codebook is in good use", "52 of 512"),  # 10.2 % and 25 %: neither is below its bound
        (51, 30, {}, "The codebook has collapsed", "--model.codebook-size 128"),
        (51, 30, {"name": "vq"}, "The codebook has collapsed", "--model.quantizer.name ema"),
        (51, 30, {"restart_threshold": 0}, "The codebook has collapsed", "--model.quantizer.restart-threshold 0.3"),
        (400, 127, {}, "The codebook is used unevenly", "--model.codebook-size 128"),
    ],
)
def test_a_codebook_in_poor_use_is_named_with_its_remedy(
    codes: int, perplexity: int, model: Row, title: str, remedy: str, tmp_path: Path
) -> None:
    quantizer = TOKENIZER["model"]["quantizer"] | model
    config = TOKENIZER | {"model": TOKENIZER["model"] | {"quantizer": quantizer}}
    found = said(write_run(tmp_path / "run", config, tokenizer_rows(1000, codes, perplexity)))
    (text,) = (text for name, text in found.items() if "codebook" in name)
    assert [name for name in found if "codebook" in name] == [title]
    assert remedy in text


def test_a_prior_overfits_when_validation_rises_while_training_falls(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRIOR, prior_rows([4.0, 3.6, 3.7, 3.9]))
    (folder / "checkpoints" / "step_000500").mkdir(parents=True)
    text = said(folder)["The prior overfits"]
    for words in ("best at step 500 with 3.6 nats", "risen to 3.9", "--resume step_000500 --max-steps 500"):
        assert words in text
    shutil.rmtree(folder / "checkpoints")
    assert "--resume" not in said(folder)["The prior overfits"]


def test_validation_that_falls_or_rises_with_training_is_not_overfitting(tmp_path: Path) -> None:
    falling = said(write_run(tmp_path / "falling", PRIOR, prior_rows([4.0, 3.6, 3.5, 3.4])))
    noisy = said(write_run(tmp_path / "noisy", PRIOR, prior_rows([4.0, 3.6, 3.5, 3.501])))
    both = said(write_run(tmp_path / "both", PRIOR, prior_rows([4.0, 3.6, 3.7, 3.9], lambda step: 3 + step / 900)))
    assert all("The prior overfits" not in found for found in (falling, noisy, both))
    assert falling["Validation does not get worse"].startswith(
        "good: The last one measured, 3.4 nats a token at step 1,000"
    )
    assert noisy["Validation does not get worse"].startswith("good")
    assert both["Validation has risen since its best"].startswith("note")


def test_a_prior_is_read_against_log_k_where_its_codes_tell_k(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "job" / "prior", PRIOR, prior_rows([4.0, 3.6]))
    assert "log K is 6" not in report(folder).text
    write_json(tmp_path / "job" / "codes" / "manifest.json", {"spec": {"codebook_size": 512}})
    assert "log K is 6.24" in report(folder).text


@pytest.mark.parametrize(
    "saved",
    [{"codebook_size": 512}, {"latentloom_format": 2, "model": {"name": "vqgan", "codebook_size": 512}}],
    ids=["first format", "present format"],
)
def test_a_tokenizer_s_codebook_is_known_from_a_model_of_any_format(saved: Row, tmp_path: Path) -> None:
    write_json(tmp_path / "model" / "config.json", saved)
    assert find_codebook_size(tmp_path, "tokenizer", {}) == 512


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_same_folder_gives_the_same_bytes_and_nothing_else_is_touched(tokenizer: Path, tmp_path: Path) -> None:
    before = hash_files(tokenizer)
    assert latentloom("report", tokenizer, "--output", tmp_path / "pages" / "a.html") == 0
    assert hash_files(tokenizer) == before
    report(tokenizer)
    assert (tokenizer / "report.html").read_bytes() == (tmp_path / "pages" / "a.html").read_bytes()
    assert hash_files(tokenizer) == before | {"report.html": hash_files(tokenizer)["report.html"]}


def test_the_current_folder_is_the_run_when_none_is_named(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tokenizer)
    assert latentloom("report") == 0
    assert "mine" in Page((tokenizer / "report.html").read_text(encoding="utf-8")).text


def test_a_page_is_drawn_without_torch(tokenizer: Path) -> None:
    code = "import sys; from latentloom.commands.report import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = run_python("-c", code, tokenizer)
    assert done.stdout.splitlines() == [f"report: {tokenizer / 'report.html'}", "False"], done.stderr


BAD = {
    "a folder that is missing": ("nowhere", "no folder at nowhere", "give one"),
    "a folder that is no run": ("images", "images holds no run", "give that folder"),
    "a file": ("notes.txt", "notes.txt holds no run", "give that folder"),
    "an empty log": ("empty", "empty/metrics.jsonl without a single whole row", "wait"),
    "a log that is torn in its first line": ("torn", "torn/metrics.jsonl without a single whole row", "wait"),
    "a run without a log": ("begun", "begun/metrics.jsonl without a single whole row", "wait"),
    "a log that is no text": ("binary", "binary/metrics.jsonl is not text", "move the file away"),
    "an environment that is no JSON": ("odd", "odd/environment.json is not valid JSON", "move the file away"),
    "another ending": ("good --output page.pdf", "--output is page.pdf", "page.html"),
    "the current folder for a file": ("good --output .", "--output is .", "report.html"),
    "a folder for a file": ("good --output images", "--output is images", "images/report.html"),
    "a run too many": ("good images", "unknown argument 'images'", "latentloom report --help"),
    "a mistyped option": ("good --outptu a.html", "'--outptu'", "'--output'"),
}


@pytest.mark.parametrize(("words", "found", "remedy"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_drawn_is_refused_in_one_line(
    words: str,
    found: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("good", "empty", "torn", "binary", "odd", "begun"):
        write_run(tmp_path / name, TOKENIZER, [] if name == "empty" else tokenizer_rows(50))
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 1, "l1"')
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "odd" / "environment.json").write_text("{")
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    write_picture(tmp_path / "images" / "a.png", 0)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = hash_files(tmp_path)
    assert latentloom("report", *words.split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert found in line
    assert remedy in line
    assert hash_files(tmp_path) == before


def test_the_figures_of_the_real_loops_have_their_place_in_a_panel(finished_job: Path, tmp_path: Path) -> None:
    """A figure with a new name would still be drawn, alone and at the end."""
    known = {name for panel in PANELS for name in panel.figures}
    for stage in ("tokenizer", "prior"):
        run = read_run(finished_job / stage)
        assert run.stage == stage
        assert run.finished
        assert [name for name in run.figures if name not in known and not marks_something(name)] == []
    assert latentloom("report", finished_job, "--output", tmp_path / "page.html") == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.images()) == 4
    assert "log K is 6" in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (26.0389, "26.04"),
        (0.0643, "0.0643"),
        (38400, "38,400"),
        (2.14e-5, "2.14×10⁻⁵"),
        (1e-6, "10⁻⁶"),
        (-0.5, "−0.5"),
        (0.99999, "1"),
        (9.9999e-5, "0.0001"),
        (1e12, "10¹²"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_four_digits_and_their_thousands_apart(value: float, text: str) -> None:
    assert number(value) == text


# -- a real browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_picture_and_chart_and_moves_through_the_grids(width: int, whole_job: Path) -> None:
    report(whole_job)
    seen, console = open_in_browser(whole_job / "report.html", width=width)
    assert console == []
    assert seen["wrong"] == []
    assert seen["images"] == [120] * 6
    assert len(seen["charts"]) == 13
    assert min(seen["charts"]) > 100
    assert (seen["width"], seen["beyond"]) == (width, 0)  # nothing to scroll sideways to
    assert (seen["before"], seen["step"]) == ([False, True], "1,000")
    assert (seen["after"], seen["stepAfter"]) == ([True, False], "500")
    assert (seen["played"], seen["button"]) == ([False, True], "Play")
    assert seen["tip"].startswith("step 1,000L1 0.05821L2 0.0141")
    lefts = [left for left, _, _, _ in seen["tips"]]
    assert lefts == sorted(set(lefts))
    for left, right, bottom, wide in seen["tips"]:  # within the card, and above the curves
        assert min(left, right) > -20
        assert abs(bottom) < 20
        assert wide > 50


def test_the_browser_test_sees_a_broken_picture_and_a_script_that_throws(whole_job: Path) -> None:
    """Or it would pass on any page."""
    report(whole_job)
    seen, _ = open_in_browser(whole_job / "report.html", lambda text: text.replace("base64,iVBOR", "base64,AAAAA", 1))
    assert seen["images"][0] == 0
    assert len(seen["wrong"]) == 1
    seen, console = open_in_browser(
        whole_job / "report.html", lambda text: text.replace('"use strict";', "nothing.here();")
    )
    assert seen["wrong"]
    assert "nothing is not defined" in console[0]
    seen, console = open_in_browser(
        whole_job / "report.html",
        lambda text: text.replace("<main>", '<main><img alt="" src="https://example.org/a.png">'),
    )
    assert seen["wrong"] == ["img-src", "[object HTMLImageElement]"]
    assert "Content Security Policy" in console[0]
