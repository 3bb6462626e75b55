"""The page of a tokenizer: metrics and images on it are right, and it is one file that loads nothing."""

import math
import re
from pathlib import Path

import html_pages
import numpy as np
import pytest
import torch
from command_line import latentloom
from html_pages import Page, open_in_browser
from PIL import Image
from small_parts import small_tokenizer, write_images
from tiny_models import seeded, tiny_split
from torch import Tensor

from latentloom.inspection import measure
from latentloom.inspection.charts import code_usage_chart, heat_map
from latentloom.inspection.codes import complete_residual_codes, decode_code_tiles, usage_by_level, usage_by_position
from latentloom.inspection.colours import SCALE, absolute_error, choose_error_limit, error_map, map_to_colours
from latentloom.inspection.diagnostics import latents_diagnostic
from latentloom.inspection.latents import LatentStatistics
from latentloom.inspection.measure import TokenizerInspection, inspect_tokenizer
from latentloom.inspection.page import InspectedTokenizer, tokenizer_page
from latentloom.report.numbers import format_number
from pipelines.evaluation.tokenizer_metrics import reconstruct
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.identity import IdentityConfig, IdentityTokenizer
from stage1_tokenizer.metrics import codebook_usage, psnr, ssim
from stage1_tokenizer.tokenizer import Tokenizer

IMAGES = 30  # in the test split: 480 tokens on 4 × 4 grids, 30 for each of the 16 codes


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "<b>images"
    write_images(folder / "train", 2)
    write_images(folder / "test", IMAGES)
    return folder


def load_images(image_folder: Path, tokenizer: Tokenizer) -> ImageLoader:
    return ImageLoader(open_source(image_folder).held_out, tokenizer.config.image_processor)


def build_autoencoder_kl(**fields: int) -> AutoencoderKL:
    sizes = {"image_size": (16, 16), "channels": (8, 8, 16), "blocks": (0, 1, 1), "latent_channels": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(AutoencoderKLConfig(**sizes | fields)).eval()


def tokenizer_with_dead_codes() -> Tokenizer:
    """Build a tokenizer with two codes far from all latents, of 16."""
    tokenizer = small_tokenizer()
    with torch.no_grad():
        tokenizer.quantizer.codebook[14:] = 1e3
    return tokenizer


def identity_tokenizer() -> IdentityTokenizer:
    return IdentityTokenizer(IdentityConfig(image_size=(16, 16))).eval()


def render_page(tokenizer: Tokenizer, inspection: TokenizerInspection, name: str = "mine") -> Page:
    subject = InspectedTokenizer(
        tokenizer=tokenizer, name=name, data="images", split="test", num_available=IMAGES, seed=0
    )
    return Page(tokenizer_page(subject, inspection))


def page_text(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture(scope="module")
def page_path(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the command writes for a tokenizer that uses most of its codes."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer_with_dead_codes().save_pretrained(folder / "model")
    arguments = ["--tokenizer", folder / "model", "--data", image_folder, "--output", folder / "pages" / "a.html"]
    assert latentloom("inspect-tokenizer", *arguments) == 0
    return folder / "pages" / "a.html"


# -- metrics ------------------------------------------------------------------------------------------------------------


def test_the_metrics_on_the_page_equal_direct_computations(image_folder: Path, page_path: Path) -> None:
    tokenizer = tokenizer_with_dead_codes()
    originals = torch.cat([batch for _, batch in load_images(image_folder, tokenizer).batches(IMAGES)])
    reconstructions, codes = reconstruct(tokenizer, originals)
    assert codes is not None
    usage = codebook_usage(torch.bincount(codes.flatten(), minlength=16))
    assert 4 < usage.codes_used < 16  # or the test would show too little
    text = page_text(Page(page_path.read_text(encoding="utf-8")))
    for expected in (
        f"Mean PSNR{psnr(reconstructions, originals).mean():.2f} dB",
        f"Mean SSIM{format_number(float(ssim(reconstructions, originals).mean()))}",
        f"Codes used{usage.codes_used} of 16",
        f"Perplexity{format_number(usage.perplexity)} codes",
        f"Dead codes{16 - usage.codes_used}in 480 tokens",
        "Bits an image6416 codes of 4 bits",
        "latents4 × 4 × 4, c × h × w; f = 4",
        f"test split: {IMAGES} images",
    ):
        assert expected in text, expected


def test_a_page_of_fewer_images_says_that_they_were_selected_at_random(
    image_folder: Path, page_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = page_path.parent / "few.html"
    arguments = ["--tokenizer", page_path.parents[1] / "model", "--data", image_folder, "--output", output]
    assert latentloom("inspect-tokenizer", *arguments, "--num-images", 12, "--seed", 3) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(r"12 images, PSNR \d+\.\d\d dB, \d+ of 16 codes used, perplexity \d+\.\d: \S+few\.html\n", line)
    assert "12 images of 30, selected at random (seed 3)" in page_text(Page(output.read_text(encoding="utf-8")))


def collapsed_tokenizer() -> Tokenizer:
    """Build a tokenizer that uses one of its 16 codes."""
    tokenizer = small_tokenizer()
    with torch.no_grad():
        tokenizer.quantizer.codebook[1:] = 1e3
    return tokenizer


def test_a_codebook_with_one_used_code_is_called_collapsed_with_a_recommendation(image_folder: Path) -> None:
    for tokenizer, levels in ((collapsed_tokenizer(), ["bad"]), (small_tokenizer(), ["good"])):
        page = render_page(tokenizer, inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer)))
        assert [item["class"] for item in page.find_all("li") if item["class"] in ("good", "note", "bad")] == levels
        text = page_text(page)
        assert ("The codebook has collapsed1 of 16 codes are used" in text) == (levels == ["bad"])
        assert ("--model.quantizer.restart-threshold" in text) == (levels == ["bad"])
        assert len(page.find_all("span", "dead")) == int(re.search(r"Dead codes(\d+)in", text)[1])  # type: ignore[index]


def test_a_codebook_is_not_called_collapsed_after_too_few_images(image_folder: Path) -> None:
    tokenizer = collapsed_tokenizer()
    split = open_source(image_folder).held_out.select([0, 1, 2])
    text = page_text(
        render_page(tokenizer, inspect_tokenizer(tokenizer, ImageLoader(split, tokenizer.config.image_processor)))
    )
    assert "Too few images to assess the codebook" in text
    assert "collapsed" not in text
    assert "--num-images 4 or more" in text


# -- reconstructions ----------------------------------------------------------------------------------------------------


def test_the_worst_best_and_random_examples_do_not_depend_on_the_batch_size(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = small_tokenizer()
    images = load_images(image_folder, tokenizer)
    inspection = inspect_tokenizer(tokenizer, images)
    order = inspection.psnr.argsort(stable=True).tolist()
    examples = inspection.examples
    assert [example.position for example in examples.worst] == order[:3]
    assert [example.position for example in examples.best] == order[:-4:-1]
    assert len(examples.random) == 3
    all_examples = [*examples.worst, *examples.best, *examples.random]
    assert len({example.position for example in all_examples}) == 9
    for example in all_examples:
        assert torch.equal(example.original, images[[example.position]][0])
        assert example.psnr == float(psnr(example.reconstruction[None], example.original[None]))
        assert [example.source_id] == images.source_ids([example.position])
    monkeypatch.setattr(measure, "BATCH", 7)
    other_batches = inspect_tokenizer(tokenizer, images).examples
    assert [e.position for e in (*other_batches.worst, *other_batches.best, *other_batches.random)] == [
        e.position for e in all_examples
    ]
    assert [e.position for e in inspect_tokenizer(tokenizer, images, seed=1).examples.random] != [
        e.position for e in examples.random
    ]


def test_the_page_labels_each_example_with_its_psnr_and_shows_three_images(image_folder: Path) -> None:
    tokenizer = small_tokenizer()
    inspection = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer))
    page = render_page(tokenizer, inspection)
    assert f"Worst{inspection.psnr.min():.2f} dB" in page_text(page)
    assert f"Best{inspection.psnr.max():.2f} dB" in page_text(page)
    original, reconstruction, error = page.images()[:3]
    worst = inspection.examples.worst[0]
    assert torch.equal(image_pixels(original), worst.original)
    assert torch.equal(image_pixels(reconstruction), worst.reconstruction)
    assert error.size == (16, 16)


def image_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as (C, h, w) uint8."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


def test_the_error_map_of_a_perfect_reconstruction_is_black() -> None:
    image = torch.randint(256, (3, 8, 8), generator=seeded(0)).to(torch.uint8)
    assert absolute_error(image, image).eq(0).all()
    black = error_map(absolute_error(image, image), choose_error_limit([absolute_error(image, image)]))
    assert black.flatten(1).unique(dim=1).mT.tolist() == [[0x0A, 0x0A, 0x23]]


def test_errors_are_averaged_over_channels_and_larger_errors_are_lighter() -> None:
    original = torch.zeros(3, 10, 10, dtype=torch.uint8)
    reconstruction = original.clone()
    reconstruction[0, 4, 5], reconstruction[:, 1, 1] = 90, 60
    error = absolute_error(original, reconstruction)
    assert (error[4, 5], error[1, 1], error.sum()) == (30, 60, 90)
    brightness = error_map(error, 64).double().mean(0)
    assert brightness[0, 0] < brightness[4, 5] < brightness[1, 1]
    assert choose_error_limit([error]) == 32  # one pixel of a hundred may be larger
    assert choose_error_limit([torch.full((4, 4), 255.0, dtype=torch.float64)]) == 255


def test_colours_get_lighter_along_the_scale() -> None:
    luma = map_to_colours(torch.linspace(-1, 2, 50)).double() @ torch.tensor([0.3, 0.59, 0.11], dtype=torch.float64)
    assert (luma.diff() >= -0.5).all()
    assert luma[0] < 20
    assert luma[-1] > 230


# -- codes --------------------------------------------------------------------------------------------------------------


def test_a_code_tile_is_the_middle_of_a_grid_with_one_code(image_folder: Path) -> None:
    tokenizer = small_tokenizer()
    tiles = decode_code_tiles(tokenizer, torch.arange(16))
    for code in (0, 7, 15):
        with torch.no_grad():
            middle = tokenizer.decode_indices(torch.full((1, 3, 3), code))[0, :, 4:8, 4:8]
        assert torch.equal(tiles[code], ((middle + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8))
    assert len({tile.numpy().tobytes() for tile in tiles}) == 16
    inspection = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer))
    assert inspection.codes is not None
    (level,) = usage_by_level(inspection.codes, 16)
    page = render_page(tokenizer, inspection)
    titles = [span["title"] for span in page.find_all("span") if "--share" in span.get("style", "")]
    assert titles[0].startswith(f"code {level.counts.argmax()}: {level.counts.max()} times")
    assert len(titles) == 16
    assert torch.equal(image_pixels(page.images()[27]), tiles[level.counts.argmax()])  # after 9 examples × 3 images


def test_only_the_most_used_codes_are_shown_of_a_large_codebook(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentloom.inspection.sections.MAX_TILES", 5)
    tokenizer = small_tokenizer()
    inspection = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer))
    page = render_page(tokenizer, inspection)
    counts = [int(re.search(r": (\d+) time", span["title"])[1]) for span in page.find_all("span", "used")]  # type: ignore[index]
    assert inspection.codes is not None
    assert counts == torch.bincount(inspection.codes.flatten()).sort(descending=True).values[:5].tolist()
    assert "The 5 most used codes, of 16" in page_text(page)


def test_a_residual_code_is_completed_with_its_most_frequent_companions() -> None:
    first, second = torch.tensor([[[1, 2], [1, 1]]]), torch.tensor([[[5, 6], [5, 7]]])
    codes = torch.stack([first, second], 1)  # (1, 2, 2, 2); the pairs 1 5, 2 6, 1 5, 1 7
    assert complete_residual_codes(codes, 0, torch.tensor([1, 2, 9])).tolist() == [[1, 5], [2, 6], [9, 5]]
    assert complete_residual_codes(codes, 1, torch.tensor([7, 6])).tolist() == [[1, 7], [2, 6]]


def test_residual_codes_are_counted_by_level(image_folder: Path) -> None:
    tokenizer = small_tokenizer(quantizer={"name": "residual", "depth": 2})
    inspection = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer))
    assert inspection.codes is not None
    first, second = usage_by_level(inspection.codes, 16)
    assert not torch.equal(first.counts, second.counts)
    page = render_page(tokenizer, inspection)
    text = page_text(page)
    used = [level.usage.codes_used for level in (first, second)]
    assert f"Codes used{sum(used)} of 32" in text
    assert "Bits an image12832 codes of 4 bits" in text
    assert len(page.find_all("svg", "heat")) == 4
    assert len(page.find_all("g", "curve")) == 2
    assert len([span for span in page.find_all("span") if "--share" in span.get("style", "")]) == 32


def test_a_position_with_one_code_has_perplexity_one_and_others_have_more() -> None:
    codes = torch.randint(16, (200, 3, 4), generator=seeded(0))
    codes[:, 1, 2] = 5
    usage = usage_by_position(codes)
    assert usage.perplexity.shape == (3, 4)
    assert usage.perplexity[1, 2] == 1
    assert usage.most_common_share[1, 2] == 1
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert usage.perplexity[others].min() > 10
    shares = torch.bincount(codes[:, 2, 0]) / 200
    assert float(usage.perplexity[2, 0]) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
    assert float(usage.most_common_share[2, 0]) == pytest.approx(float(shares.max()))


def test_the_heat_maps_contain_the_perplexity_and_top_share_of_each_position(
    image_folder: Path, page_path: Path
) -> None:
    tokenizer = tokenizer_with_dead_codes()
    codes = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer)).codes
    assert codes is not None
    text = page_path.read_text(encoding="utf-8")
    cells = re.findall(r"<title>row (\d), column (\d): ([\d.]+)</title>", text)
    assert len(cells) == 2 * 16  # first perplexities, then shares of the most common code in per cent
    usage = usage_by_position(codes)
    for (row, column, value), values in zip(
        cells, [usage.perplexity] * 16 + [100 * usage.most_common_share] * 16, strict=True
    ):
        assert float(value) == pytest.approx(float(values[int(row) - 1, int(column) - 1]), rel=0.06)


def test_low_values_of_a_heat_map_are_dark_and_high_values_are_light() -> None:
    page = Page(heat_map("Perplexity", "codes", torch.tensor([[1.0, 5.5], [10.0, 1.0]]), (1, 10)))
    fills = [cell["fill"] for cell in page.find_all("rect")]
    assert (fills[0], fills[2], fills[3]) == (SCALE[0], SCALE[-1], SCALE[0])
    assert fills[1] not in SCALE
    assert [text["class"] for text in page.find_all("text")] == ["pale", "pale", "dark", "pale"]


def test_the_code_usage_curve_falls_and_ends_at_the_last_used_code() -> None:
    counts = torch.tensor([0, 50, 5, 30, 15])
    page = Page(code_usage_chart([("codes", counts), ("uniform", torch.full((5,), 20))], "a note"))
    (level,) = (path["d"] for path in page.find_all("path", "level"))
    falling, flat = (
        [tuple(map(float, pair.split(","))) for pair in line["points"].split()] for line in page.find_all("polyline")
    )
    assert [x for x, _ in falling] == sorted({x for x, _ in falling})
    assert [y for _, y in falling] == sorted({y for _, y in falling})  # y points down the page
    assert len(falling) == 4  # the fifth code is never used
    assert {f"{y:.1f}" for _, y in flat} == {re.search(r" ([\d.]+)H", level)[1]}  # type: ignore[index]
    assert len(flat) == 5


# -- tokenizers without a codebook --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [build_autoencoder_kl, identity_tokenizer])
def test_the_page_of_a_tokenizer_without_a_codebook_shows_its_latents(
    kind: type[Tokenizer], image_folder: Path
) -> None:
    tokenizer = kind()
    inspection = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer))
    page = render_page(tokenizer, inspection)
    assert [section["id"] for section in page.find_all("section")] == ["reconstructions", "latents"]
    text = page_text(page)
    assert f"The tokenizer ({type(tokenizer).__name__}) has no codebook" in text
    assert "Perplexity" not in text
    assert len(page.find_all("svg", "bars")) == tokenizer.latent_channels
    assert ("all reconstructions are exact" in text) == isinstance(tokenizer, IdentityTokenizer)


def test_latent_mean_and_standard_deviation_equal_direct_computations(image_folder: Path) -> None:
    images = load_images(image_folder, identity_tokenizer())
    values = torch.cat([batch for _, batch in images.batches(IMAGES)]).double().movedim(1, 0).flatten(1) / 127.5 - 1
    latents = inspect_tokenizer(identity_tokenizer(), images).latents
    assert latents is not None
    torch.testing.assert_close(latents.mean, values.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(latents.std, values.std(1, correction=0), rtol=0, atol=1e-6)
    assert latents.collapsed_share is None
    assert latents.histograms.sum(1).tolist() == [values.shape[1]] * 3


def kl_latents(tokenizer: AutoencoderKL, image_folder: Path) -> LatentStatistics:
    latents = inspect_tokenizer(tokenizer, load_images(image_folder, tokenizer)).latents
    assert latents is not None
    return latents


def test_dimensions_with_the_same_posterior_for_all_images_are_collapsed(image_folder: Path) -> None:
    tokenizer = build_autoencoder_kl()
    last_convolution = [module for module in tokenizer.encoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last_convolution.weight[4:], last_convolution.bias[4:] = (
            0,
            -6,
        )  # a narrow posterior with different means
        last_convolution.weight[:4] *= 10
        last_convolution.weight[1], last_convolution.bias[1], last_convolution.bias[5] = (
            0,
            0.5,
            0,
        )  # N(0.5, 1) in the second channel
    latents = kl_latents(tokenizer, image_folder)
    assert latents.collapsed_share is not None
    assert latents.collapsed_share.tolist() == [0, 1, 0, 0]
    assert float(latents.mean[1]) == pytest.approx(0.5)
    assert float(latents.std[1]) == pytest.approx(1)
    diagnostic = latents_diagnostic(latents)
    assert diagnostic is not None
    assert diagnostic.title.startswith("25\N{NO-BREAK SPACE}% of the latent dimensions are collapsed")
    assert "--reconstruction.kl" not in diagnostic.text


def test_mostly_collapsed_latents_get_a_recommendation_and_others_are_called_good() -> None:
    other_fields = {
        "mean": torch.zeros(4),
        "std": torch.ones(4),
        "histograms": torch.ones(4, 40),
        "histogram_range": (-1.0, 1.0),
    }
    mostly_collapsed, not_collapsed = (
        latents_diagnostic(LatentStatistics(collapsed_share=share, **other_fields))
        for share in (torch.ones(4), torch.zeros(4))
    )
    assert mostly_collapsed is not None
    assert not_collapsed is not None
    assert "--reconstruction.kl" in mostly_collapsed.text
    assert not_collapsed.level == "good"


# -- the file -----------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_urls_or_scripts(page_path: Path) -> None:
    assert [path.name for path in page_path.parent.iterdir() if path.name == "a.html"] == ["a.html"]
    page = Page(page_path.read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), f"<{tag} {name}={attributes[name]!r}>"
    text = re.sub(r'"data:image[^"]*"', "", page_path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert len(page.images()) == 3 * 9 + 16
    assert all(image["alt"] for image in page.find_all("img"))
    assert all(chart["aria-label"] for chart in page.find_all("svg"))
    assert page.find_all("b") == []  # the image folder is called <b>images
    assert "<b>images" in page.text


def test_the_same_tokenizer_and_images_give_the_same_bytes(image_folder: Path, page_path: Path) -> None:
    second_page = page_path.parent / "again.html"
    arguments = ["--tokenizer", page_path.parents[1] / "model", "--data", image_folder, "--output", second_page]
    assert latentloom("inspect-tokenizer", *arguments) == 0
    assert second_page.read_bytes() == page_path.read_bytes()


def test_images_smaller_than_the_ssim_window_and_fewer_than_the_examples_have_a_page() -> None:
    tokenizer = small_tokenizer(image_size=(8, 8), image_channels=1)
    inspection = inspect_tokenizer(tokenizer, ImageLoader(tiny_split(2, size=(8, 8)), tokenizer.config.image_processor))
    text = page_text(render_page(tokenizer, inspection))
    assert "SSIM" not in text
    assert "Random" not in text
    assert "Worst" in text


PROBE = """<script>addEventListener("load", () => {
  const seen = { images: Array.from(document.images, (x) => x.naturalWidth), wrong, width: innerWidth };
  seen.shown = Array.from(document.images, (x) => x.getBoundingClientRect().width);
  seen.charts = Array.from(document.querySelectorAll("svg"), (x) => x.getBoundingClientRect().width);
  seen.beyond = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  parent.postMessage(JSON.stringify(seen), "*");
});</script>"""


def allow_scripts(text: str) -> str:
    """Allow the test's script, which the page's own policy forbids."""
    assert "default-src 'none';" in text
    return text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_image_and_the_page_does_not_scroll_sideways(
    width: int, page_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_pages, "PROBE_SCRIPT", PROBE)
    observed, console = open_in_browser(page_path, allow_scripts, width)
    assert console == []
    assert observed["wrong"] == []
    assert observed["images"] == [16] * 27 + [4] * 16
    assert min(observed["shown"]) > 30
    assert len(observed["charts"]) == 3
    assert min(observed["charts"]) > 250
    assert (observed["width"], observed["beyond"]) == (width, 0)
