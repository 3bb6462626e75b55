"""One stage of a job: where it stands, its health, its curves, its samples over time, and what it was told to do."""

import math
from collections.abc import Iterator
from html import escape

from latentloom.report.diagnostics import best_of, diagnostics, validation_name
from latentloom.report.numbers import count, number, percent
from latentloom.report.panels import charts
from latentloom.report.reading import RunRecord
from latentloom.report.svg_charts import draw
from latentloom.report.widgets import Tile, diagnostic_list, grid_player, machine_facts, table, tiles

TITLES = {"tokenizer": "Stage one: tokenizer", "prior": "Stage two: prior"}
GRIDS = {"tokenizer": "Originals over reconstructions of held-out images", "prior": "Samples with fixed seeds"}
FIRST_SKIPPED = 5


def stage_section(run: RunRecord) -> str:
    parts = [f'<section id="{run.stage}"><h2>{TITLES[run.stage]} {state_label(run)}</h2>']
    if run.rows:
        parts.append(tiles(list(key_metrics(run))))
        if said := diagnostic_list(diagnostics(run)):
            parts.append(f"<h3>Health</h3>{said}")
        parts += [skipped_steps(run), '<h3>Curves</h3><div class="charts">', *map(draw, charts(run)), "</div>"]
    else:
        parts.append("<p>Nothing is logged yet.</p>")
    if run.grids:
        parts.append(f"<h3>Samples over time</h3>{grid_player(run.grids, run.grids_found, GRIDS[run.stage])}")
    facts = (
        machine_facts(run.environment)
        or '<p class="note">The run has no environment.json: an earlier version made it.</p>'
    )
    parts.append(f"<h3>Where it ran</h3>{facts}")
    if run.configuration_text:
        text = escape(run.configuration_text)
        parts.append(f"<details><summary>Configuration (config.yaml)</summary><pre>{text}</pre></details>")
    return "".join(parts) + "</section>"


def state_label(run: RunRecord) -> str:
    if run.finished:
        return '<span class="state done">finished</span>'
    if run.max_steps is not None and run.step >= run.max_steps:
        return '<span class="state open">all steps done, model not written</span>'
    of = f" of {run.max_steps:,}" if run.max_steps is not None else ""
    return f'<span class="state open">step {run.step:,}{of}</span>'


def key_metrics(run: RunRecord) -> Iterator[Tile]:
    size, total = run.codebook_size, run.max_steps
    yield Tile("Steps", f"{run.step:,}", f"of {total:,}" if total is not None else "", images_seen(run))
    if (rate := run.last("images_per_second")) is not None:
        since = f"step {run.resumed[-1]:,}" if run.resumed else "the start"
        yield Tile("Throughput", number(rate, 3), "images/s", f"mean since {since}")
    yield from validation_tiles(run)
    used, perplexity = run.last("codes_used"), run.last("perplexity")
    if used is not None:
        of = f"of {size:,}" if size else ""
        yield Tile("Codes used", number(used, 9), of, percent(used / size) if size else "")
    if perplexity is not None:
        share = f"{percent(perplexity / size)} of K" if size else ""
        yield Tile("Perplexity", number(perplexity, 3), "codes", share)


def images_seen(run: RunRecord) -> str:
    factors = (run.environment.get("processes"), run.setting("batch_size"), run.setting("accumulation_steps"))
    known = [factor for factor in factors if isinstance(factor, int)]
    return f"{run.step * math.prod(known):,} images" if len(known) == len(factors) else ""


def validation_tiles(run: RunRecord) -> Iterator[Tile]:
    name = validation_name(run)
    if name is None:
        return
    unit, label = {"validation_psnr": ("dB", "PSNR"), "validation_nats_per_token": ("nats a token", "validation")}.get(
        name, ("", name.replace("_", " "))
    )
    points = run.figures[name]
    (step, best), (last_step, last) = best_of(name, points), points[-1]
    guess = ""
    if name == "validation_nats_per_token" and run.codebook_size:
        guess = f"; log K is {number(math.log(run.codebook_size), 3)}"
    yield Tile(f"Last {label}", number(last), unit, f"step {last_step:,}{guess}")
    yield Tile(f"Best {label}", number(best), unit, f"step {step:,}")
    if (bits := run.last("validation_bits_per_image")) is not None:
        yield Tile("Cost of an image", number(bits, 3), "bits", f"step {last_step:,}")


def skipped_steps(run: RunRecord) -> str:
    """The first few steps that were not taken, with what was not finite."""
    if not run.skipped:
        return ""
    rows = []
    for row in run.skipped[:FIRST_SKIPPED]:
        terms = [f"{name} = {value}" for name, value in row.items() if name not in ("step", "process", "source_ids")]
        ids = row.get("source_ids")
        ids = [str(name) for name in ids] if isinstance(ids, list) else []
        named = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        rows.append((f"{row['step']:,}", str(row.get("process", "")), ", ".join(terms) or "another process’s", named))
    more = len(run.skipped) - len(rows)
    note = f'<p class="note">And {count(more, "row")} more in skipped_steps.*.jsonl.</p>' if more else ""
    return f"<h3>Skipped steps</h3>{table(('step', 'process', 'not finite', 'images'), rows, numeric=(0, 1))}{note}"
