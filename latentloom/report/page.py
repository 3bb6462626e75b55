"""The page of a run or of a job: one file that loads nothing."""

from pathlib import Path

from latentloom.report.document import document
from latentloom.report.reading import JobRecord
from latentloom.report.results import results
from latentloom.report.stage_section import TITLES, stage_section, state_label

HERE = Path(__file__).parent
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
    return document(
        name=job.name,
        kind=kind,
        head=f'<p class="states">{state}</p>{nav}',
        main=found + sections,
        styles=[HERE / "page.css"],
        source=" from the run’s own files",
        script=HERE / "page.js",
    )
