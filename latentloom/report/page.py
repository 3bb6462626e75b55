"""Write the report of a run or of a job: one HTML file that loads nothing."""

from pathlib import Path

from latentloom.report.document import html_document
from latentloom.report.reading import JobRecord
from latentloom.report.results import results_section
from latentloom.report.stage_section import TITLES, stage_section, state_label

HERE = Path(__file__).parent
KINDS = {"tokenizer": "training run of a tokenizer", "prior": "training run of a prior"}


def report_page(job: JobRecord) -> str:
    """Return the report as HTML; the same files give the same bytes."""
    results = results_section(job)
    is_single_run = len(job.runs) == 1 and not results
    kind = KINDS[job.runs[0].stage] if is_single_run else "job with both stages"
    links = [("results", "Results")] if results else []
    links += [(run.stage, TITLES[run.stage]) for run in job.runs]
    anchors = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in links)
    nav = "" if is_single_run else f"<nav>{anchors}</nav>"
    state = " ".join(f"<span>{run.stage} {state_label(run)}</span>" for run in job.runs)
    sections = "".join(stage_section(run) for run in job.runs)
    return html_document(
        name=job.name,
        kind=kind,
        head=f'<p class="states">{state}</p>{nav}',
        main=results + sections,
        styles=[HERE / "page.css"],
        source=" from the files of the run folder",
        script=HERE / "page.js",
    )
