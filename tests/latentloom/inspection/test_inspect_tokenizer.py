"""The page of a tokenizer: its figures are those of the images, its pictures show what they say, and it needs no network."""

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
from latentloom.inspection.codes import by_level, decoded_codes, in_company, usage_by_position
from latentloom.inspection.colours import SCALE, absolute_error, coloured, error_map, error_top
from latentloom.inspection.diagnostics import latents_diagnostic
from latentloom.inspection.drawing import codes_by_use, heat_map
from latentloom.inspection.latents import LatentStatistics
from latentloom.inspection.measure import Inspection, inspect
from latentloom.inspection.page import Subject, page
from latentloom.report.numbers import number
from pipelines.evaluation.tokenizer_metrics import reconstruct
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.identity import IdentityConfig, IdentityTokenizer
from stage1_tokenizer.metrics import codebook_usage, psnr, ssim
from stage1_tokenizer.tokenizer import Tokenizer

IMAGES = 30  # in the test split: 480 codes of 4 × 4, 30 for each of 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "<b>pictures"
    write_images(folder / "train", 2)
    write_images(folder / "test", IMAGES)
    return folder


def pixels_of(pictures: Path, tokenizer: Tokenizer) -> ImageLoader:
    return ImageLoader(open_source(pictures).held_out, tokenizer.config.image_processor)


def whole_kl(**fields: int) -> AutoencoderKL:
    sizes = {"image_size": (16, 16), "channels": (8, 8, 16), "blocks": (0, 1, 1), "latent_channels": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(AutoencoderKLConfig(**sizes | fields)).eval()


def partly_dead() -> Tokenizer:
    """Two of its 16 codes are far from all latents."""
    tokenizer = small_tokenizer()
    with torch.no_grad():
        tokenizer.quantizer.codebook[14:] = 1e3
    return tokenizer


def identity() -> IdentityTokenizer:
    return IdentityTokenizer(IdentityConfig(image_size=(16, 16))).eval()


def page_of(tokenizer: Tokenizer, found: Inspection, name: str = "mine") -> Page:
    subject = Subject(tokenizer=tokenizer, name=name, data="pictures", split="test", available=IMAGES, seed=0)
    return Page(page(subject, found))


def said(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture(scope="module")
def drawn(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the command draws of a tokenizer that uses its codes."""
    folder = tmp_path_factory.mktemp("drawn")
    partly_dead().save_pretrained(folder / "model")
    words = ["--tokenizer", folder / "model", "--data", pictures, "--output", folder / "pages" / "a.html"]
    assert latentloom("inspect-tokenizer", *words) == 0
    return folder / "pages" / "a.html"


# -- figures ------------------------------------------------------------------------------------------------------------


def test_the_figures_of_the_page_are_those_computed_directly(pictures: Path, drawn: Path) -> None:
    tokenizer = partly_dead()
    originals = torch.cat([batch for _, batch in pixels_of(pictures, tokenizer).batches(IMAGES)])
    rebuilt, codes = reconstruct(tokenizer, originals)
    assert codes is not None
    usage = codebook_usage(torch.bincount(codes.flatten(), minlength=16))
    assert 4 < usage.codes_used < 16  # or too little is claimed
    text = said(Page(drawn.read_text(encoding="utf-8")))
    for shown in (
        f"Mean PSNR{psnr(rebuilt, originals).mean():.2f} dB",
        f"Mean SSIM{number(float(ssim(rebuilt, originals).mean()))}",
        f"Codes used{usage.codes_used} of 16",
        f"Perplexity{number(usage.perplexity)} codes",
        f"Dead codes{16 - usage.codes_used}in 480 choices",
        "Bits an image6416 codes of 4 bits",
        "latents4 × 4 × 4, c × h × w; f = 4",
        f"test split: {IMAGES} images",
    ):
        assert shown in text, shown


def test_a_page_of_fewer_images_says_that_they_were_drawn(
    pictures: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = drawn.parent / "few.html"
    words = ["--tokenizer", drawn.parents[1] / "model", "--data", pictures, "--output", output]
    assert latentloom("inspect-tokenizer", *words, "--num-images", 12, "--seed", 3) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(r"12 images, PSNR \d+\.\d\d dB, \d+ of 16 codes used, perplexity \d+\.\d: \S+few\.html\n", line)
    assert "12 images of 30, drawn at random (seed 3)" in said(Page(output.read_text(encoding="utf-8")))


def collapsed() -> Tokenizer:
    """It uses one of its 16 codes."""
    tokenizer = small_tokenizer()
    with torch.no_grad():
        tokenizer.quantizer.codebook[1:] = 1e3
    return tokenizer


def test_a_codebook_of_which_one_code_is_used_is_called_collapsed_and_a_remedy_named(pictures: Path) -> None:
    for tokenizer, words in ((collapsed(), ["bad"]), (small_tokenizer(), ["good"])):
        found = page_of(tokenizer, inspect(tokenizer, pixels_of(pictures, tokenizer)))
        assert [item["class"] for item in found.find_all("li") if item["class"] in ("good", "note", "bad")] == words
        text = said(found)
        assert ("The codebook has collapsed1 of 16 codes are used" in text) == (words == ["bad"])
        assert ("--model.quantizer.restart-threshold" in text) == (words == ["bad"])
        assert len(found.find_all("span", "dead")) == int(re.search(r"Dead codes(\d+)in", text)[1])  # type: ignore[index]


def test_few_images_are_no_proof_of_a_collapse(pictures: Path) -> None:
    tokenizer = collapsed()
    split = open_source(pictures).held_out.select([0, 1, 2])
    text = said(page_of(tokenizer, inspect(tokenizer, ImageLoader(split, tokenizer.config.image_processor))))
    assert "Too few images to judge the codebook" in text
    assert "collapsed" not in text
    assert "--num-images 4 or more" in text


# -- reconstructions ----------------------------------------------------------------------------------------------------


def test_examples_are_the_worst_the_best_and_others_whatever_the_batches(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = small_tokenizer()
    pixels = pixels_of(pictures, tokenizer)
    found = inspect(tokenizer, pixels)
    order = found.psnr.argsort(stable=True).tolist()
    shown = found.examples
    assert [example.position for example in shown.worst] == order[:3]
    assert [example.position for example in shown.best] == order[:-4:-1]
    assert len(shown.drawn) == 3
    every = [*shown.worst, *shown.best, *shown.drawn]
    assert len({example.position for example in every}) == 9
    for example in every:
        assert torch.equal(example.original, pixels[[example.position]][0])
        assert example.psnr == float(psnr(example.reconstruction[None], example.original[None]))
        assert [example.source_id] == pixels.source_ids([example.position])
    monkeypatch.setattr(measure, "BATCH", 7)
    again = inspect(tokenizer, pixels).examples
    assert [e.position for e in (*again.worst, *again.best, *again.drawn)] == [e.position for e in every]
    assert [e.position for e in inspect(tokenizer, pixels, seed=1).examples.drawn] != [e.position for e in shown.drawn]


def test_the_page_labels_each_example_with_its_psnr_and_shows_the_three_pictures(pictures: Path) -> None:
    tokenizer = small_tokenizer()
    found = inspect(tokenizer, pixels_of(pictures, tokenizer))
    drawn = page_of(tokenizer, found)
    assert f"Worst{found.psnr.min():.2f} dB" in said(drawn)
    assert f"Best{found.psnr.max():.2f} dB" in said(drawn)
    original, reconstruction, error = drawn.images()[:3]
    worst = found.examples.worst[0]
    assert torch.equal(pixels_in(original), worst.original)
    assert torch.equal(pixels_in(reconstruction), worst.reconstruction)
    assert error.size == (16, 16)


def pixels_in(picture: Image.Image) -> Tensor:
    """(C, h, w) uint8 of an RGB picture."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def test_the_error_of_a_perfect_reconstruction_is_black_everywhere() -> None:
    image = torch.randint(256, (3, 8, 8), generator=seeded(0)).to(torch.uint8)
    assert absolute_error(image, image).eq(0).all()
    black = error_map(absolute_error(image, image), error_top([absolute_error(image, image)]))
    assert black.flatten(1).unique(dim=1).mT.tolist() == [[0x0A, 0x0A, 0x23]]


def test_an_error_is_the_mean_over_channels_and_lighter_where_larger() -> None:
    original = torch.zeros(3, 10, 10, dtype=torch.uint8)
    rebuilt = original.clone()
    rebuilt[0, 4, 5], rebuilt[:, 1, 1] = 90, 60
    error = absolute_error(original, rebuilt)
    assert (error[4, 5], error[1, 1], error.sum()) == (30, 60, 90)
    drawn = error_map(error, 64).double().mean(0)
    assert drawn[0, 0] < drawn[4, 5] < drawn[1, 1]
    assert error_top([error]) == 32  # one pixel of a hundred may lie above
    assert error_top([torch.full((4, 4), 255.0, dtype=torch.float64)]) == 255


def test_colours_grow_lighter_along_the_scale() -> None:
    light = coloured(torch.linspace(-1, 2, 50)).double() @ torch.tensor([0.3, 0.59, 0.11], dtype=torch.float64)
    assert (light.diff() >= -0.5).all()
    assert light[0] < 20
    assert light[-1] > 230


# -- codes --------------------------------------------------------------------------------------------------------------


def test_a_code_is_decoded_as_the_middle_of_a_grid_of_its_own(pictures: Path) -> None:
    tokenizer = small_tokenizer()
    tiles = decoded_codes(tokenizer, torch.arange(16))
    for code in (0, 7, 15):
        with torch.no_grad():
            whole = tokenizer.decode_indices(torch.full((1, 3, 3), code))[0, :, 4:8, 4:8]
        assert torch.equal(tiles[code], ((whole + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8))
    assert len({tile.numpy().tobytes() for tile in tiles}) == 16
    found = inspect(tokenizer, pixels_of(pictures, tokenizer))
    assert found.codes is not None
    (level,) = by_level(found.codes, 16)
    drawn = page_of(tokenizer, found)
    titles = [span["title"] for span in drawn.find_all("span") if "--share" in span.get("style", "")]
    assert titles[0].startswith(f"code {level.counts.argmax()}: {level.counts.max()} times")
    assert len(titles) == 16
    assert torch.equal(pixels_in(drawn.images()[27]), tiles[level.counts.argmax()])  # after nine examples of three


def test_the_most_used_codes_are_shown_where_there_are_many(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentloom.inspection.sections.TILES", 5)
    tokenizer = small_tokenizer()
    found = inspect(tokenizer, pixels_of(pictures, tokenizer))
    drawn = page_of(tokenizer, found)
    counts = [int(re.search(r": (\d+) time", span["title"])[1]) for span in drawn.find_all("span", "used")]  # type: ignore[index]
    assert found.codes is not None
    assert counts == torch.bincount(found.codes.flatten()).sort(descending=True).values[:5].tolist()
    assert "The 5 most used codes, of 16" in said(drawn)


def test_a_residual_code_is_shown_with_the_codes_it_comes_with() -> None:
    first, second = torch.tensor([[[1, 2], [1, 1]]]), torch.tensor([[[5, 6], [5, 7]]])
    codes = torch.stack([first, second], 1)  # (1, 2, 2, 2); the pairs 1 5, 2 6, 1 5, 1 7
    assert in_company(codes, 0, torch.tensor([1, 2, 9])).tolist() == [[1, 5], [2, 6], [9, 5]]
    assert in_company(codes, 1, torch.tensor([7, 6])).tolist() == [[1, 7], [2, 6]]


def test_residual_codes_are_told_by_level(pictures: Path) -> None:
    tokenizer = small_tokenizer(quantizer={"name": "residual", "depth": 2})
    found = inspect(tokenizer, pixels_of(pictures, tokenizer))
    assert found.codes is not None
    first, second = by_level(found.codes, 16)
    assert not torch.equal(first.counts, second.counts)
    drawn = page_of(tokenizer, found)
    text = said(drawn)
    used = [level.usage.codes_used for level in (first, second)]
    assert f"Codes used{sum(used)} of 32" in text
    assert "Bits an image12832 codes of 4 bits" in text
    assert len(drawn.find_all("svg", "heat")) == 4
    assert len(drawn.find_all("g", "curve")) == 2
    assert len([span for span in drawn.find_all("span") if "--share" in span.get("style", "")]) == 32


def test_a_position_that_always_has_the_same_code_has_a_perplexity_of_one_and_others_more() -> None:
    codes = torch.randint(16, (200, 3, 4), generator=seeded(0))
    codes[:, 1, 2] = 5
    found = usage_by_position(codes)
    assert found.perplexity.shape == (3, 4)
    assert found.perplexity[1, 2] == 1
    assert found.most_common[1, 2] == 1
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert found.perplexity[others].min() > 10
    shares = torch.bincount(codes[:, 2, 0]) / 200
    assert float(found.perplexity[2, 0]) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
    assert float(found.most_common[2, 0]) == pytest.approx(float(shares.max()))


def test_the_map_of_the_page_holds_the_perplexity_of_each_position(pictures: Path, drawn: Path) -> None:
    tokenizer = partly_dead()
    codes = inspect(tokenizer, pixels_of(pictures, tokenizer)).codes
    assert codes is not None
    text = drawn.read_text(encoding="utf-8")
    cells = re.findall(r"<title>row (\d), column (\d): ([\d.]+)</title>", text)
    assert len(cells) == 2 * 16  # of the perplexity, then of the most common code's share in per cent
    usage = usage_by_position(codes)
    for (row, column, value), map_ in zip(cells, [usage.perplexity] * 16 + [100 * usage.most_common] * 16, strict=True):
        assert float(value) == pytest.approx(float(map_[int(row) - 1, int(column) - 1]), rel=0.06)


def test_a_map_is_dark_where_values_are_low_and_light_where_they_are_high() -> None:
    drawn = Page(heat_map("Perplexity", "codes", torch.tensor([[1.0, 5.5], [10.0, 1.0]]), (1, 10)))
    fills = [cell["fill"] for cell in drawn.find_all("rect")]
    assert (fills[0], fills[2], fills[3]) == (SCALE[0], SCALE[-1], SCALE[0])
    assert fills[1] not in SCALE
    assert [text["class"] for text in drawn.find_all("text")] == ["pale", "pale", "dark", "pale"]


def test_codes_by_use_fall_from_the_most_used_to_the_last_used() -> None:
    counts = torch.tensor([0, 50, 5, 30, 15])
    drawn = Page(codes_by_use([("codes", counts), ("all alike", torch.full((5,), 20))], "a note"))
    (level,) = (path["d"] for path in drawn.find_all("path", "level"))
    falling, flat = (
        [tuple(map(float, place.split(","))) for place in line["points"].split()] for line in drawn.find_all("polyline")
    )
    assert [x for x, _ in falling] == sorted({x for x, _ in falling})
    assert [y for _, y in falling] == sorted({y for _, y in falling})  # y points down the page
    assert len(falling) == 4  # the fifth code is never chosen
    assert {f"{y:.1f}" for _, y in flat} == {re.search(r" ([\d.]+)H", level)[1]}  # type: ignore[index]
    assert len(flat) == 5


# -- tokenizers without a codebook --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [whole_kl, identity])
def test_a_tokenizer_without_a_codebook_has_a_page_of_its_latents(kind: type[Tokenizer], pictures: Path) -> None:
    tokenizer = kind()
    found = inspect(tokenizer, pixels_of(pictures, tokenizer))
    drawn = page_of(tokenizer, found)
    assert [section["id"] for section in drawn.find_all("section")] == ["reconstructions", "latents"]
    text = said(drawn)
    assert f"A tokenizer of the kind {type(tokenizer).__name__} has no codebook" in text
    assert "Perplexity" not in text
    assert len(drawn.find_all("svg", "bars")) == tokenizer.latent_channels
    assert ("every image comes back as it was" in text) == isinstance(tokenizer, IdentityTokenizer)


def test_the_latents_mean_and_spread_are_those_computed_directly(pictures: Path) -> None:
    pixels = pixels_of(pictures, identity())
    values = torch.cat([batch for _, batch in pixels.batches(IMAGES)]).double().movedim(1, 0).flatten(1) / 127.5 - 1
    found = inspect(identity(), pixels).latents
    assert found is not None
    torch.testing.assert_close(found.mean, values.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.std, values.std(1, correction=0), rtol=0, atol=1e-6)
    assert found.collapsed is None
    assert found.histograms.sum(1).tolist() == [values.shape[1]] * 3


def kl_latents(tokenizer: AutoencoderKL, pictures: Path) -> LatentStatistics:
    found = inspect(tokenizer, pixels_of(pictures, tokenizer)).latents
    assert found is not None
    return found


def test_dimensions_whose_posterior_is_the_same_for_all_images_are_collapsed(pictures: Path) -> None:
    tokenizer = whole_kl()
    last = [module for module in tokenizer.encoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight[4:], last.bias[4:] = 0, -6  # a narrow posterior, whose means differ by image
        last.weight[:4] *= 10
        last.weight[1], last.bias[1], last.bias[5] = 0, 0.5, 0  # and N(0.5, 1) in the second channel
    found = kl_latents(tokenizer, pictures)
    assert found.collapsed is not None
    assert found.collapsed.tolist() == [0, 1, 0, 0]
    assert float(found.mean[1]) == pytest.approx(0.5)
    assert float(found.std[1]) == pytest.approx(1)
    verdict = latents_diagnostic(found)
    assert verdict is not None
    assert verdict.title.startswith("25\N{NO-BREAK SPACE}% of the latents’ dimensions are collapsed")
    assert "--reconstruction.kl" not in verdict.text


def test_latents_that_are_mostly_collapsed_come_with_a_remedy_and_whole_ones_with_praise() -> None:
    shared = {"mean": torch.zeros(4), "std": torch.ones(4), "histograms": torch.ones(4, 40), "ends": (-1.0, 1.0)}
    mostly, not_at_all = (
        latents_diagnostic(LatentStatistics(collapsed=share, **shared)) for share in (torch.ones(4), torch.zeros(4))
    )
    assert mostly is not None
    assert not_at_all is not None
    assert "--reconstruction.kl" in mostly.text
    assert not_at_all.level == "good"


# -- the file -----------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_addresses_or_scripts(drawn: Path) -> None:
    assert [path.name for path in drawn.parent.iterdir() if path.name == "a.html"] == ["a.html"]
    found = Page(drawn.read_text(encoding="utf-8"))
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), f"<{tag} {name}={attributes[name]!r}>"
    text = re.sub(r'"data:image[^"]*"', "", drawn.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert len(found.images()) == 3 * 9 + 16
    assert all(image["alt"] for image in found.find_all("img"))
    assert all(drawing["aria-label"] for drawing in found.find_all("svg"))
    assert found.find_all("b") == []  # the folder of the images is called <b>pictures
    assert "<b>pictures" in found.text


def test_the_same_tokenizer_and_images_give_the_same_bytes(pictures: Path, drawn: Path) -> None:
    again = drawn.parent / "again.html"
    words = ["--tokenizer", drawn.parents[1] / "model", "--data", pictures, "--output", again]
    assert latentloom("inspect-tokenizer", *words) == 0
    assert again.read_bytes() == drawn.read_bytes()


def test_pictures_smaller_than_the_window_of_ssim_and_fewer_than_examples_have_a_page() -> None:
    tokenizer = small_tokenizer(image_size=(8, 8), image_channels=1)
    found = inspect(tokenizer, ImageLoader(tiny_split(2, size=(8, 8)), tokenizer.config.image_processor))
    text = said(page_of(tokenizer, found))
    assert "SSIM" not in text
    assert "At random" not in text
    assert "Worst" in text


SEEN = """<script>addEventListener("load", () => {
  const seen = { images: Array.from(document.images, (x) => x.naturalWidth), wrong, width: innerWidth };
  seen.shown = Array.from(document.images, (x) => x.getBoundingClientRect().width);
  seen.charts = Array.from(document.querySelectorAll("svg"), (x) => x.getBoundingClientRect().width);
  seen.beyond = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  parent.postMessage(JSON.stringify(seen), "*");
});</script>"""


def with_scripts(text: str) -> str:
    """The page's own policy forbids the scripts by which it is looked at."""
    assert "default-src 'none';" in text
    return text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_picture_and_nothing_lies_beyond_the_screen(
    width: int, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_pages, "PROBE_SCRIPT", SEEN)
    seen, console = open_in_browser(drawn, with_scripts, width)
    assert console == []
    assert seen["wrong"] == []
    assert seen["images"] == [16] * 27 + [4] * 16
    assert min(seen["shown"]) > 30
    assert len(seen["charts"]) == 3
    assert min(seen["charts"]) > 250
    assert (seen["width"], seen["beyond"]) == (width, 0)
