"""The state of a search: what was asked for, Optuna's journal of it, and how a trial's values are drawn.

    OUTPUT/search.yaml   what is searched       study.log   Optuna's journal

Trial n draws from a generator of (seed, n), given the trials before it: a search that was stopped goes on as if it had not
been. Trials are counted by those that are over; one that was cut off stays in the journal and counts for nothing.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from latentloom.search.results import Metric, TrialResult
from latentloom.search.space import Space, Training, own_values, with_values
from training_harness.configuration import fill_defaults, find_differences, read_yaml, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.files import holds_files, write_text

if TYPE_CHECKING:
    import optuna

AT_RANDOM = 6  # trials before the model of the good ones has anything to learn from
NEVER_PRUNED = 4  # trials that must have finished, for a median to mean something
VALIDATIONS = 8  # of a trial
REASON = "reason"


@dataclass(frozen=True, kw_only=True)
class Plan:
    base: Training
    """The recipe; its `output` is the folder of the search."""
    space: Space
    metric: Metric
    steps: int
    """Of each trial."""
    trials: int
    minutes: float | None = None
    trained_on: str = ""
    """Id of the tokenizer whose codes a prior is trained on."""

    @property
    def folder(self) -> Path:
        return self.base.output

    @property
    def request(self) -> dict[str, Any]:
        """What must be the same for a search to go on."""
        fields = {name: value for name, value in to_mapping(self.base).items() if name != "output"}
        searched = {parameter.field: parameter.spec for parameter in self.space}
        return {"trial_steps": self.steps, "trained_on": self.trained_on, "search": searched} | fields

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03d}"

    def trial_config(self, number: int, values: dict[str, Any]) -> Any:
        """Raises ConfigError for values that do not go together."""
        every = math.ceil(self.steps / VALIDATIONS)
        run = {"output": str(self.trial_folder(number)), "max_steps": self.steps, "resume": "latest", "report_to": ()}
        saved = {"checkpoint_every": self.steps, "keep_checkpoints": 1}
        logged = {"sample_every": every, "log_every": min(every, self.base.log_every)}
        return with_values(self.base, values | run | saved | logged)


def require_optuna() -> None:
    """Raises UserError where it is not installed; keeps its own lines from the terminal."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            'a search needs Optuna, which is not installed; expected its package; run: pip install "latentloom[sweep]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def holds_this_search(plan: Plan) -> bool:
    """Whether the folder holds a search to go on with; raises UserError when it holds anything else."""
    path = plan.folder / "search.yaml"
    if not path.exists():
        if holds_files(plan.folder):
            raise UserError(
                f"{plan.folder} is not empty and holds no search; expected a new or empty folder; choose another --output"
            )
        return False
    found = find_differences(stored_request(plan), plan.request)
    differing = [f"{name} is {held!r} there and {wanted!r} here" for name, (held, wanted) in found.items()]
    if differing:
        raise UserError(
            f"{plan.folder} holds another search ({'; '.join(differing[:4])}); expected the same; give the same values to go on "
            "with it, or choose another --output"
        )
    return True


def stored_request(plan: Plan) -> dict[str, Any]:
    """The request of the search in the folder, in the present format and with the defaults of fields that are new."""
    migration = plan.base.migration
    fields = migration.migrate(read_yaml(plan.folder / "search.yaml"))
    own = {name: fields.pop(name, None) for name in ("trial_steps", "trained_on", "search")}
    if isinstance(own["search"], dict):
        own["search"] = {migration.renamed_fields.get(field, field): spec for field, spec in own["search"].items()}
    with suppress(ConfigError):  # of another kind of prior, which then differs
        fields = fill_defaults(type(plan.base), fields)
        del fields["output"]
    return own | fields


def write_request(plan: Plan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    request = plan.base.migration.add_format_number(plan.request)
    write_text(plan.folder / "search.yaml", yaml.safe_dump(request, sort_keys=False))


def open_study(plan: Plan) -> "optuna.Study":
    """The study of the folder, in which no trial is under way."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import TrialState

    journal = str((plan.folder / "study.log").resolve())
    drop_torn_line(Path(journal))
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))),
        study_name="sweep",
        load_if_exists=True,
        # not in the first quarter, where it is warm-ups that differ
        pruner=optuna.pruners.MedianPruner(NEVER_PRUNED, n_warmup_steps=plan.steps // 4),
    )
    for cut_off in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)
    return study


def drop_torn_line(journal: Path) -> None:
    """Cuts off what a kill left half written: Optuna would write behind it and then read neither."""
    written = journal.read_bytes() if journal.exists() else b""
    if written and not written.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(written.rfind(b"\n") + 1)


def results_of(study: "optuna.Study", plan: Plan) -> list[TrialResult]:
    """The trials that are over, numbered from 1 in their order, without those that were cut off."""
    from optuna.trial import TrialState

    names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    known_as = journal_names(plan, study)
    over = [
        t
        for t in study.get_trials(deepcopy=False, states=tuple(names))
        if t.state is not TrialState.FAIL or REASON in t.user_attrs
    ]
    return [
        TrialResult(
            number=number,
            values={p.field: p.value_of(t.params[known_as[p.field]]) for p in plan.space},
            outcome=names[t.state],  # type: ignore[arg-type]
            figure=min(t.intermediate_values.values(), default=math.nan),
            steps=max(t.intermediate_values, default=0),
            seconds=t.duration.total_seconds() if t.duration else 0.0,
            reason=t.user_attrs.get(REASON, ""),
        )
        for number, t in enumerate(over, 1)
    ]


def journal_names(plan: Plan, study: "optuna.Study") -> dict[str, str]:
    """The name of each searched field in the journal: a former one, where the search began with that."""
    held = {name for trial in study.get_trials(deepcopy=False) for name in trial.params}
    former = {new: old for old, new in plan.base.migration.renamed_fields.items() if old in held}
    return {parameter.field: former.get(parameter.field, parameter.field) for parameter in plan.space}


def draw(plan: Plan, study: "optuna.Study", number: int) -> "optuna.Trial":
    """The next trial with its values; a function of the seed, the number and the trials that are over."""
    import optuna

    seed = int(np.random.SeedSequence((plan.base.seed, number)).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=AT_RANDOM, seed=seed)
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    if number == 1 and not waiting:  # one waits where a search was killed between the two
        study.enqueue_trial(own_values(plan.space, plan.base))
    trial = study.ask()
    known_as = journal_names(plan, study)
    for parameter in plan.space:
        parameter.suggest(trial, known_as[parameter.field])
    return trial
