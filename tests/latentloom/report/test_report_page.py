"""The report of a run: it loads nothing, shows and explains all metrics, and works in a browser."""

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
from latentloom.report.numbers import format_number
from latentloom.report.panels import PANELS, is_marker
from latentloom.report.reading import find_codebook_size, read_run, select_grid_steps
from latentloom.report.svg_charts import MAX_CURVE_POINTS, thin_points

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


def tokenizer_rows(last_step: int = 1000, codes: float = 480, perplexity: float = 400) -> list[Row]:
    rows: list[Row] = []
    for step in range(25, last_step + 1, 25):
        decay = math.exp(-step / 400)
        rows.append(
            {"step": step, "l1": 0.05 + 0.1 * decay, "l2": 0.01 + 0.05 * decay, "codebook": 0.02, "commitment": 0.02}
            | {"perceptual": 0.0, "learning_rate": 0.01 * (1 - step / 1000), "gradient_norm": 1 + 3 * decay}
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
        write_image(folder / "samples" / f"step_{step:06d}.png", step % 256)
    if finished:
        write_json(folder / "environment.json", ENVIRONMENT)
        write_json(folder / "model" / "config.json", {"codebook_size": 512})
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_image(path: Path, grey: int, size: tuple[int, int] = (120, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


@pytest.fixture
def tokenizer_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine", TOKENIZER, tokenizer_rows(), (250, 500, 750, 1000), finished=True)


@pytest.fixture
def prior_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "second", PRIOR, prior_rows([4.2, 3.9, 3.8, 3.7]), (500, 1000), finished=True)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "both"
    write_run(folder / "tokenizer", TOKENIZER, tokenizer_rows(), (500, 1000), finished=True)
    write_run(folder / "prior", PRIOR, prior_rows([4.2, 3.9, 3.8, 3.7]), (500, 1000), finished=True)
    write_image(folder / "samples.png", 10)
    write_image(folder / "reconstructions.png", 20)
    metrics = {"psnr": 24.5, "frechet": 0.4567, "frechet_interval": [0.4, 0.5], "recall": 0.625, "seconds": 75.0}
    by_class = {"coats & <hats>": {"frechet": 0.9, "recall": 0.5}}
    write_json(folder / "metrics.json", metrics | {"floor": {"recall": 0.875}, "by_class": by_class, "num_images": 200})
    return folder


def write_report(folder: Path) -> Page:
    assert latentloom("report", folder) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def read_diagnostics(folder: Path) -> dict[str, str]:
    """Return the diagnostics of a run: title → level and text."""
    return {item.title: f"{item.level}: {item.text}" for item in diagnostics(read_run(folder))}


# -- content of the page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_images"), [("tokenizer_run", 4), ("prior_run", 2), ("job", 6)])
def test_a_page_contains_its_images_and_loads_nothing(
    kind: str, num_images: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    page = write_report(folder)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), f"<{tag} {name}={attributes[name]!r}>"
    text = re.sub(r'"data:image[^"]*"', "", (folder / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|(src|href)\s*=\s*[\"']?//", text)
    assert len(page.images()) == num_images
    assert all(image["alt"] for image in page.find_all("img"))
    assert all(chart["aria-label"] for chart in page.find_all("svg"))


@pytest.mark.parametrize("kind", ["tokenizer_run", "prior_run"])
def test_every_logged_metric_is_a_curve_with_all_its_values(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    run, curves = read_run(folder), list(write_report(folder).curves().values())
    for name, points in run.metrics.items():
        rounded = [(step, float(f"{value:.6g}")) for step, value in points]
        assert rounded in curves or not any(value for _, value in points), name
    assert any(len(points) == 40 for points in curves)


def test_the_page_of_a_job_has_both_stages_and_the_final_metrics(job: Path) -> None:
    page = write_report(job)
    assert [section["id"] for section in page.find_all("section")] == ["results", "tokenizer", "prior"]
    for expected in (
        "24.5",
        "0.4567",
        "0.4 … 0.5",
        "62.5\N{NO-BREAK SPACE}%",
        "87.5\N{NO-BREAK SPACE}%",
        "1 min 15 s",
        "coats & <hats>",
    ):
        assert expected in page.text
    assert {"L1", "training"} <= set(page.curves())


def test_the_page_of_a_job_without_a_prior_has_only_the_tokenizer(job: Path) -> None:
    shutil.rmtree(job / "prior")
    for name in ("metrics.json", "samples.png", "reconstructions.png"):
        (job / name).unlink()
    assert [section["id"] for section in write_report(job).find_all("section")] == ["tokenizer"]


def test_the_page_shows_progress_machine_and_configuration(tokenizer_run: Path) -> None:
    text = write_report(tokenizer_run).text
    for expected in (
        "finished",
        "16,000 images",
        "A processor & sons",
        "torch 2.14.1",
        "24 dB",
        "restart_threshold: 0.3",
    ):
        assert expected in " ".join(text.split()), expected


def test_an_unfinished_run_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young", TOKENIZER, tokenizer_rows(75))
    page = write_report(folder)
    assert "step 75 of 1,000" in page.text
    assert "finished" not in page.text
    assert "no environment.json" in page.text
    assert page.find_all("img") == []
    assert "L1" in page.curves()


def test_a_run_with_all_steps_but_no_model_is_not_called_finished(tokenizer_run: Path) -> None:
    shutil.rmtree(tokenizer_run / "model")
    assert "all steps done, model not written" in write_report(tokenizer_run).text


def test_an_incomplete_last_line_is_ignored(tokenizer_run: Path) -> None:
    with (tokenizer_run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1025, "l1": 0.0')
    assert write_report(tokenizer_run).curves()["L1"][-1][0] == 1000


def test_every_chart_of_a_resumed_run_marks_the_step(tmp_path: Path) -> None:
    rows = tokenizer_rows()
    split = next(i for i, row in enumerate(rows) if row["step"] == 525)
    uninterrupted = write_report(write_run(tmp_path / "whole", TOKENIZER, rows))
    resumed = write_report(
        write_run(tmp_path / "resumed", TOKENIZER, [*rows[:split], {"step": 500, "resumed_from": 500}, *rows[split:]])
    )
    assert uninterrupted.find_all("g", "resumed") == []
    assert len(resumed.find_all("g", "resumed")) == len(resumed.find_all("svg"))
    assert "From step 500" in resumed.text
    assert resumed.curves() == uninterrupted.curves()


def test_spikes_are_marked_and_skipped_steps_are_listed(tokenizer_run: Path) -> None:
    with (tokenizer_run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 610, "gradient_norm_spike": 77.7, "usual_gradient_norm": 1.5}) + "\n")
        log.write(json.dumps({"step": 620, "discriminator_gradient_norm_spike": 9.0}) + "\n")
    for process in (0, 1):
        row = {"step": 333, "process": process, "source_ids": ["a<b>.png", "c", "d", "e"], "l1": "nan"}
        write_json(tokenizer_run / f"skipped_steps.{process}.jsonl", row)
    page = write_report(tokenizer_run)
    assert len(page.find_all("path", "mark")) == 2
    assert "the largest is 77.7 at step 610" in page.text
    assert "1 gradient spike of the discriminator" in page.text
    assert "1 step skipped" in page.text
    assert "l1 = nan" in page.text
    assert "a<b>.png, c, d and 1 more" in page.text


def test_non_finite_values_are_counted_and_not_plotted(tmp_path: Path) -> None:
    rows = tokenizer_rows()
    rows[3]["l1"], rows[4]["l1"] = math.nan, math.inf
    page = write_report(write_run(tmp_path / "nan", TOKENIZER, rows))
    assert len(page.curves()["L1"]) == 38
    assert "2 non-finite values left out" in page.text
    assert "nan" not in " ".join(f"{line}" for line in page.find_all("polyline"))


def test_a_metric_without_a_panel_gets_its_own_chart(tmp_path: Path) -> None:
    rows = [{"step": step, "noise_level": 1.0 + step, "note": "words", "flag": True} for step in (1, 2)]
    assert write_report(write_run(tmp_path / "new", TOKENIZER, rows)).curves() == {"noise level": [(1, 2.0), (2, 3.0)]}


def test_equal_curves_are_merged_into_one_with_both_names(tokenizer_run: Path) -> None:
    curves = write_report(tokenizer_run).curves()
    assert "codebook = commitment" in curves
    assert "commitment" not in curves


HOSTILE = '</pre></script><script>document.title="taken"</script><img src=x onerror=alert(1)>"\'&'


def test_nothing_in_a_file_becomes_markup(job: Path) -> None:
    harmless = write_report(job)
    config = TOKENIZER | {"data": HOSTILE}
    rows = [row | {HOSTILE: 1.0} for row in tokenizer_rows()]
    write_run(job / "tokenizer", config, [*rows, {"step": 500, "resumed_from": 500}])  # every chart has a legend
    write_json(job / "tokenizer" / "environment.json", {"machine": {"device": HOSTILE}, "versions": {HOSTILE: HOSTILE}})
    write_json(job / "tokenizer" / "skipped_steps.0.jsonl", {"step": 1, "source_ids": [HOSTILE], HOSTILE: HOSTILE})
    write_json(job / "metrics.json", {"psnr": 20.0, "by_class": {HOSTILE: {}}, "features": HOSTILE, "num_images": 1})
    folder = job.rename(job.with_name("<script>1"))
    page = write_report(folder)
    assert len(page.find_all("script")) == len(harmless.find_all("script")) == 1
    assert len(page.find_all("img")) == len(harmless.find_all("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count('document.title="taken"') >= 6
    assert HOSTILE.replace("_", " ") in page.curves()


# -- long logs and many images ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_ends_the_extremes_and_the_order(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    thinned = thin_points(points, limit)
    assert len(thinned) <= max(limit, 1)
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
    assert set(thinned) <= set(points)
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert min(value for _, value in thinned) == min(values)
    assert max(value for _, value in thinned) == max(values)


def test_a_long_log_keeps_every_extreme_and_gives_a_small_page(tmp_path: Path) -> None:
    def value(step: int, of: int) -> float:
        return {70_001 + of: 9.0, 30_003 + of: 1e-4}.get(step, 0.5 + 0.1 * math.sin(step + of))

    names = ("l1", "l2", "codebook", "gradient_norm", "another")
    rows = [{"step": step} | {name: value(step, i) for i, name in enumerate(names)} for step in range(1, 100_001)]
    folder = write_run(tmp_path / "long", TOKENIZER, rows)
    curves = write_report(folder).curves()
    assert len(curves) == len(names)
    for i, points in enumerate(curves.values()):
        assert {(70_001 + i, 9.0), (30_003 + i, 1e-4)} <= set(points)
        assert len(points) <= MAX_CURVE_POINTS
    assert (folder / "report.html").stat().st_size < 400_000


@pytest.mark.parametrize(
    ("num_grids", "size", "num_selected"), [(1, 1, 1), (2, 10**9, 2), (40, 1, 40), (1000, 1, 40), (40, 10**6, 16)]
)
def test_selected_grids_are_evenly_spaced_and_include_the_first_and_the_last(
    num_grids: int, size: int, num_selected: int
) -> None:
    steps = [500 * i for i in range(1, num_grids + 1)]
    selected = select_grid_steps(dict.fromkeys(steps, size))
    assert len(selected) == len(set(selected)) == num_selected
    assert (selected[0], selected[-1]) == (steps[0], steps[-1])
    gaps = [after - before for before, after in pairwise(selected)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 500
    assert select_grid_steps({}) == []


def test_only_the_last_grid_is_visible_before_a_script_runs(tokenizer_run: Path) -> None:
    page = write_report(tokenizer_run)
    assert ["hidden" in image for image in page.find_all("img")] == [True, True, True, False]
    assert page.find_all("img")[-1]["alt"].endswith("at step 1,000")
    assert "hidden" in page.find_all("div", "controls")[0]


def test_the_page_says_how_many_of_the_grids_it_shows(tokenizer_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_GRIDS", 3)
    page = write_report(tokenizer_run)
    assert len(page.find_all("img")) == 3
    assert "3 grids of 4, evenly spaced" in page.text


def test_a_broken_image_is_left_out(tokenizer_run: Path) -> None:
    truncated = tokenizer_run / "samples" / "step_000750.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    (tokenizer_run / "samples" / "step_001000.png").write_text("<svg onload=alert(1)>")
    (tokenizer_run / "samples" / "mine.png").write_bytes(b"")
    assert len(write_report(tokenizer_run).images()) == 2


# -- diagnostics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "perplexity", "model", "title", "recommendation"),
    [
        (480, 400, {}, "The codebook is used well", "480 of 512"),
        (52, 128, {}, "The codebook is used well", "52 of 512"),  # 10.2 % and 25 %: neither is below its bound
        (51, 30, {}, "The codebook has collapsed", "--model.codebook-size 128"),
        (51, 30, {"name": "vq"}, "The codebook has collapsed", "--model.quantizer.name ema"),
        (51, 30, {"restart_threshold": 0}, "The codebook has collapsed", "--model.quantizer.restart-threshold 0.3"),
        (400, 127, {}, "The codebook is used unevenly", "--model.codebook-size 128"),
    ],
)
def test_poor_codebook_usage_is_reported_with_a_recommendation(
    codes: int, perplexity: int, model: Row, title: str, recommendation: str, tmp_path: Path
) -> None:
    quantizer = TOKENIZER["model"]["quantizer"] | model
    config = TOKENIZER | {"model": TOKENIZER["model"] | {"quantizer": quantizer}}
    diagnostics_by_title = read_diagnostics(
        write_run(tmp_path / "run", config, tokenizer_rows(1000, codes, perplexity))
    )
    (text,) = (text for name, text in diagnostics_by_title.items() if "codebook" in name)
    assert [name for name in diagnostics_by_title if "codebook" in name] == [title]
    assert recommendation in text


def test_a_run_at_an_early_step_is_told_that_usage_often_rises_later(tmp_path: Path) -> None:
    config = TOKENIZER | {"max_steps": 10_000}
    text = read_diagnostics(write_run(tmp_path / "run", config, tokenizer_rows(1000, 51, 30)))[
        "The codebook has collapsed"
    ]
    assert "The run is at an early step" in text
    assert "--model.codebook-size 128" in text


def test_psnr_that_fell_is_a_note_with_a_discriminator_and_bad_without(tmp_path: Path) -> None:
    rows = [{"step": step, "l1": 0.1} | {"validation_psnr": psnr} for step, psnr in ((250, 24.0), (500, 22.0))]
    texts = []
    for name, terms in (("without", {}), ("with", {"discriminator": 1.9})):
        folder = write_run(tmp_path / name, TOKENIZER, [row | terms for row in rows])
        texts.append(read_diagnostics(folder)["PSNR has fallen since its best"])
    assert texts[0].startswith("bad: PSNR was best at step 250 with 24 dB and is 22 dB now.")
    assert "--optimizer.learning-rate" in texts[0]
    assert texts[1].startswith("note: ")
    assert "sharper images" in texts[1]


def test_a_logged_warning_is_repeated_unless_it_is_diagnosed_here(tmp_path: Path) -> None:
    rows = [
        {"step": 25, "warning": "the discriminator wins", "about": "discriminator"},
        {"step": 50, "warning": "the codebook has collapsed", "about": "codebook"},
    ]
    found = read_diagnostics(write_run(tmp_path / "run", TOKENIZER, [*tokenizer_rows(), *rows]))
    warned = {title: text for title, text in found.items() if title.startswith("A warning")}
    assert list(warned) == ["A warning at step 25"]
    assert warned["A warning at step 25"].startswith("bad: The discriminator wins. ")


def test_a_prior_overfits_if_validation_rises_while_training_falls(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRIOR, prior_rows([4.0, 3.6, 3.7, 3.9]))
    (folder / "checkpoints" / "step_000500").mkdir(parents=True)
    text = read_diagnostics(folder)["The prior overfits"]
    for expected in ("best at step 500 with 3.6 nats", "risen to 3.9", "--resume step_000500 --max-steps 500"):
        assert expected in text
    shutil.rmtree(folder / "checkpoints")
    assert "--resume" not in read_diagnostics(folder)["The prior overfits"]


def test_validation_that_falls_or_rises_with_training_is_not_overfitting(tmp_path: Path) -> None:
    falling = read_diagnostics(write_run(tmp_path / "falling", PRIOR, prior_rows([4.0, 3.6, 3.5, 3.4])))
    noisy = read_diagnostics(write_run(tmp_path / "noisy", PRIOR, prior_rows([4.0, 3.6, 3.5, 3.501])))
    both_rise = read_diagnostics(
        write_run(tmp_path / "both", PRIOR, prior_rows([4.0, 3.6, 3.7, 3.9], lambda step: 3 + step / 900))
    )
    assert all("The prior overfits" not in found for found in (falling, noisy, both_rise))
    assert falling["Validation does not get worse"].startswith("good: The last value, 3.4 nats a token at step 1,000")
    assert noisy["Validation does not get worse"].startswith("good")
    assert both_rise["Validation has risen since its best"].startswith("note")


def test_the_report_shows_log_k_if_the_code_cache_states_k(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "job" / "prior", PRIOR, prior_rows([4.0, 3.6]))
    assert "log K is 6" not in write_report(folder).text
    write_json(tmp_path / "job" / "codes" / "manifest.json", {"spec": {"codebook_size": 512}})
    assert "log K is 6.24" in write_report(folder).text


@pytest.mark.parametrize(
    "saved",
    [{"codebook_size": 512}, {"latentloom_format": 2, "model": {"name": "vqgan", "codebook_size": 512}}],
    ids=["first format", "present format"],
)
def test_the_codebook_size_is_read_from_a_model_of_any_format(saved: Row, tmp_path: Path) -> None:
    write_json(tmp_path / "model" / "config.json", saved)
    assert find_codebook_size(tmp_path, "tokenizer", {}) == 512


# -- the command --------------------------------------------------------------------------------------------------------


def test_a_report_is_reproducible_and_changes_no_other_file(tokenizer_run: Path, tmp_path: Path) -> None:
    before = hash_files(tokenizer_run)
    assert latentloom("report", tokenizer_run, "--output", tmp_path / "pages" / "a.html") == 0
    assert hash_files(tokenizer_run) == before
    write_report(tokenizer_run)
    assert (tokenizer_run / "report.html").read_bytes() == (tmp_path / "pages" / "a.html").read_bytes()
    assert hash_files(tokenizer_run) == before | {"report.html": hash_files(tokenizer_run)["report.html"]}


def test_without_an_argument_the_run_is_the_current_folder(
    tokenizer_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tokenizer_run)
    assert latentloom("report") == 0
    assert "mine" in Page((tokenizer_run / "report.html").read_text(encoding="utf-8")).text


def test_a_report_is_written_without_torch(tokenizer_run: Path) -> None:
    code = "import sys; from latentloom.commands.report import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = run_python("-c", code, tokenizer_run)
    assert done.stdout.splitlines() == [f"report: {tokenizer_run / 'report.html'}", "False"], done.stderr


BAD = {
    "a folder that is missing": ("nowhere", "no folder at nowhere", "pass one"),
    "a folder that is no run": ("images", "images holds no run", "pass that folder"),
    "a file": ("notes.txt", "notes.txt holds no run", "pass that folder"),
    "an empty log": ("empty", "no complete row in empty/metrics.jsonl", "wait"),
    "a log with an incomplete first line": ("torn", "no complete row in torn/metrics.jsonl", "wait"),
    "a run without a log": ("begun", "no complete row in begun/metrics.jsonl", "wait"),
    "a log that is no text": ("binary", "binary/metrics.jsonl is not text", "move the file away"),
    "an environment that is no JSON": ("odd", "odd/environment.json is not valid JSON", "move the file away"),
    "another file ending": ("good --output page.pdf", "--output is page.pdf", "page.html"),
    "the current folder for a file": ("good --output .", "--output is .", "report.html"),
    "a folder for a file": ("good --output images", "--output is images", "images/report.html"),
    "a run too many": ("good images", "unknown argument 'images'", "latentloom report --help"),
    "a mistyped option": ("good --outptu a.html", "'--outptu'", "'--output'"),
}


@pytest.mark.parametrize(("arguments", "problem", "advice"), BAD.values(), ids=BAD.keys())
def test_invalid_input_is_refused_in_one_line(
    arguments: str,
    problem: str,
    advice: str,
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
    write_image(tmp_path / "images" / "a.png", 0)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = hash_files(tmp_path)
    assert latentloom("report", *arguments.split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert problem in line
    assert advice in line
    assert hash_files(tmp_path) == before


def test_every_metric_of_the_real_training_loops_is_in_a_panel(finished_job: Path, tmp_path: Path) -> None:
    """A metric with a new name would still be plotted, in its own chart at the end."""
    panel_metrics = {name for panel in PANELS for name in panel.metrics}
    for stage in ("tokenizer", "prior"):
        run = read_run(finished_job / stage)
        assert run.stage == stage
        assert run.is_finished
        assert [name for name in run.metrics if name not in panel_metrics and not is_marker(name)] == []
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
def test_numbers_have_four_digits_and_thousands_separators(value: float, text: str) -> None:
    assert format_number(value) == text


# -- a real browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_image_and_chart_and_plays_the_grids(width: int, job: Path) -> None:
    write_report(job)
    observed, console = open_in_browser(job / "report.html", width=width)
    assert console == []
    assert observed["wrong"] == []
    assert observed["images"] == [120] * 6
    assert len(observed["charts"]) == 13
    assert min(observed["charts"]) > 100
    assert (observed["width"], observed["beyond"]) == (width, 0)  # nothing to scroll to sideways
    assert (observed["before"], observed["step"]) == ([False, True], "1,000")
    assert (observed["after"], observed["stepAfter"]) == ([True, False], "500")
    assert (observed["played"], observed["button"]) == ([False, True], "Play")
    assert observed["tip"].startswith("step 1,000L1 0.05821L2 0.0141")
    lefts = [left for left, _, _, _ in observed["tips"]]
    assert lefts == sorted(set(lefts))
    for left, right, bottom, tip_width in observed["tips"]:  # within the card, and above the curves
        assert min(left, right) > -20
        assert abs(bottom) < 20
        assert tip_width > 50


def test_the_browser_test_notices_a_broken_image_and_a_failing_script(job: Path) -> None:
    """Otherwise the browser test would pass on any page."""
    write_report(job)
    observed, _ = open_in_browser(job / "report.html", lambda text: text.replace("base64,iVBOR", "base64,AAAAA", 1))
    assert observed["images"][0] == 0
    assert len(observed["wrong"]) == 1
    observed, console = open_in_browser(
        job / "report.html", lambda text: text.replace('"use strict";', "nothing.here();")
    )
    assert observed["wrong"]
    assert "nothing is not defined" in console[0]
    observed, console = open_in_browser(
        job / "report.html",
        lambda text: text.replace("<main>", '<main><img alt="" src="https://example.org/a.png">'),
    )
    assert observed["wrong"] == ["img-src", "[object HTMLImageElement]"]
    assert "Content Security Policy" in console[0]
