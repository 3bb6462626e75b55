"""The section of one training run: progress, diagnostics, curves, samples over time, machine and configuration."""

import math
from collections.abc import Iterator
from html import escape

from latentloom.report.diagnostics import best_point, diagnostics, validation_name
from latentloom.report.numbers import format_count, format_number, format_percent
from latentloom.report.panels import run_charts
from latentloom.report.reading import RunRecord
from latentloom.report.svg_charts import render_chart
from latentloom.report.widgets import Tile, diagnostic_list, grid_player, machine_facts, table, tiles

TITLES = {"tokenizer": "Stage one: tokenizer", "prior": "Stage two: prior"}
GRID_CAPTIONS = {
    "tokenizer": "Held-out images with their reconstructions below",
    "prior": "Samples with fixed seeds",
}
MAX_SKIPPED_ROWS = 5


def stage_section(run: RunRecord) -> str:
    """Return the section of a run as HTML."""
    parts = [f'<section id="{run.stage}"><h2>{TITLES[run.stage]} {state_label(run)}</h2>']
    if run.rows:
        parts.append(tiles(list(main_metrics(run))))
        if diagnostics_html := diagnostic_list(diagnostics(run)):
            parts.append(f"<h3>Health</h3>{diagnostics_html}")
        charts = map(render_chart, run_charts(run))
        parts += [skipped_step_table(run), '<h3>Curves</h3><div class="charts">', *charts, "</div>"]
    else:
        parts.append("<p>Nothing is logged yet.</p>")
    if run.grids:
        parts.append(f"<h3>Samples over time</h3>{grid_player(run.grids, run.num_grids, GRID_CAPTIONS[run.stage])}")
    facts = (
        machine_facts(run.environment)
        or '<p class="note">The run has no environment.json: an earlier version wrote it.</p>'
    )
    parts.append(f"<h3>Where it ran</h3>{facts}")
    if run.configuration_text:
        text = escape(run.configuration_text)
        parts.append(f"<details><summary>Configuration (config.yaml)</summary><pre>{text}</pre></details>")
    return "".join(parts) + "</section>"


def state_label(run: RunRecord) -> str:
    if run.is_finished:
        return '<span class="state done">finished</span>'
    if run.max_steps is not None and run.step >= run.max_steps:
        return '<span class="state open">all steps done, model not written</span>'
    total = f" of {run.max_steps:,}" if run.max_steps is not None else ""
    return f'<span class="state open">step {run.step:,}{total}</span>'


def main_metrics(run: RunRecord) -> Iterator[Tile]:
    size, total = run.codebook_size, run.max_steps
    yield Tile("Steps", f"{run.step:,}", f"of {total:,}" if total is not None else "", num_training_images(run))
    if (rate := run.last_value("images_per_second")) is not None:
        start = f"step {run.resumed_steps[-1]:,}" if run.resumed_steps else "the start"
        yield Tile("Throughput", format_number(rate, 3), "images/s", f"mean since {start}")
    yield from validation_metrics(run)
    used, perplexity = run.last_value("codes_used"), run.last_value("perplexity")
    if used is not None:
        total_codes = f"of {size:,}" if size else ""
        yield Tile("Codes used", format_number(used, 9), total_codes, format_percent(used / size) if size else "")
    if perplexity is not None:
        share = f"{format_percent(perplexity / size)} of K" if size else ""
        yield Tile("Perplexity", format_number(perplexity, 3), "codes", share)


def num_training_images(run: RunRecord) -> str:
    """Count the images of all steps, with repetitions; empty when a factor of the batch size is unknown."""
    factors = (run.environment.get("processes"), run.setting("batch_size"), run.setting("accumulation_steps"))
    known_factors = [factor for factor in factors if isinstance(factor, int)]
    return f"{run.step * math.prod(known_factors):,} images" if len(known_factors) == len(factors) else ""


def validation_metrics(run: RunRecord) -> Iterator[Tile]:
    name = validation_name(run)
    if name is None:
        return
    unit, label = {"validation_psnr": ("dB", "PSNR"), "validation_nats_per_token": ("nats a token", "validation")}.get(
        name, ("", name.replace("_", " "))
    )
    points = run.metrics[name]
    (step, best), (last_step, last) = best_point(name, points), points[-1]
    uniform_guess = ""
    if name == "validation_nats_per_token" and run.codebook_size:
        uniform_guess = f"; log K is {format_number(math.log(run.codebook_size), 3)}"
    yield Tile(f"Last {label}", format_number(last), unit, f"step {last_step:,}{uniform_guess}")
    yield Tile(f"Best {label}", format_number(best), unit, f"step {step:,}")
    if (bits := run.last_value("validation_bits_per_image")) is not None:
        yield Tile("Cost of an image", format_number(bits, 3), "bits", f"step {last_step:,}")


def skipped_step_table(run: RunRecord) -> str:
    """List the first skipped steps with their non-finite values."""
    if not run.skipped_rows:
        return ""
    rows = []
    for row in run.skipped_rows[:MAX_SKIPPED_ROWS]:
        terms = [f"{name} = {value}" for name, value in row.items() if name not in ("step", "process", "source_ids")]
        ids = row.get("source_ids")
        ids = [str(name) for name in ids] if isinstance(ids, list) else []
        images = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        rows.append((f"{row['step']:,}", str(row.get("process", "")), ", ".join(terms) or "in another process", images))
    num_more = len(run.skipped_rows) - len(rows)
    note = f'<p class="note">{format_count(num_more, "more row")} in skipped_steps.*.jsonl.</p>' if num_more > 0 else ""
    return f"<h3>Skipped steps</h3>{table(('step', 'process', 'not finite', 'images'), rows, numeric=(0, 1))}{note}"
