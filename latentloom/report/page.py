"""The page of a run or of a job: one file that loads nothing, and may not (its own policy forbids it)."""

from html import escape
from pathlib import Path

from latentloom import __version__
from latentloom.report.reading import JobRecord
from latentloom.report.results import results
from latentloom.report.stage_section import TITLES, stage_section, state_label

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
KINDS = {"tokenizer": "a tokenizer’s training run", "prior": "a prior’s training run"}


def page(job: JobRecord) -> str:
    """HTML that depends on the files read alone: the same folder gives the same bytes."""
    found = results(job)
    single = len(job.runs) == 1 and not found
    kind = KINDS[job.runs[0].stage] if single else "a job of both stages"
    links = [("results", "Results")] if found else []
    links += [(run.stage, TITLES[run.stage]) for run in job.runs]
    anchors = "".join(f'<a href="#{place}">{title}</a>' for place, title in links)
    nav = "" if single else f"<nav>{anchors}</nav>"
    state = " ".join(f"<span>{run.stage} {state_label(run)}</span>" for run in job.runs)
    sections = "".join(stage_section(run) for run in job.runs)
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    name = escape(job.name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{name} · latentloom</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><p class="kind">latentloom · {kind}</p><h1>{name}</h1><p class="states">{state}</p>{nav}</header>
<main>{found}{sections}</main>
<footer>Drawn by latentloom {escape(__version__)} from the run’s own files.</footer>
<script>
{script}</script>
</body>
</html>
"""
