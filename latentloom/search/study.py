"""The state of a search: its plan, Optuna's journal, and how the values of a trial are chosen.

    OUTPUT/search.yaml   the search space and the base configuration
    OUTPUT/study.log     Optuna's journal

The values of trial n depend on a generator seeded with (seed, n) and on the earlier trials. So a search that was stopped goes on
as if it had not been stopped. Only trials that have ended are counted: an interrupted trial stays in the journal and is ignored.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from latentloom.search.results import Metric, TrialResult
from latentloom.search.space import Space, Training, base_optuna_values, replace_values
from training_harness.configuration import fill_defaults, find_differences, read_yaml, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.files import holds_files, write_text

if TYPE_CHECKING:
    import optuna

RANDOM_TRIALS = 6  # trials with random values, before the sampler has enough results to learn from
TRIALS_BEFORE_PRUNING = 4  # finished trials that a meaningful median needs
VALIDATIONS_PER_TRIAL = 8
FAILURE_REASON = "reason"


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """Everything that defines a search."""

    base: Training
    """Configuration of the recipe; its `output` is the folder of the search."""
    space: Space
    metric: Metric
    steps: int
    """Training steps of each trial."""
    trials: int
    """Number of trials after which the search is finished."""
    minutes: float | None = None
    """Time limit of the whole search."""
    trained_on: str = ""
    """For a prior, id of the tokenizer that wrote its codes."""

    @property
    def folder(self) -> Path:
        return self.base.output

    @property
    def request(self) -> dict[str, Any]:
        """Settings that must not change when a search is continued."""
        fields = {name: value for name, value in to_mapping(self.base).items() if name != "output"}
        specs = {parameter.field: parameter.spec for parameter in self.space}
        return {"trial_steps": self.steps, "trained_on": self.trained_on, "search": specs} | fields

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03d}"

    def trial_config(self, number: int, values: dict[str, Any]) -> Any:
        """Return the configuration of a trial.

        Raises:
            ConfigError: the values do not fit each other.
        """
        every = math.ceil(self.steps / VALIDATIONS_PER_TRIAL)
        run = {"output": str(self.trial_folder(number)), "max_steps": self.steps, "resume": "latest", "report_to": ()}
        checkpoints = {"checkpoint_every": self.steps, "keep_checkpoints": 1}
        logging = {"sample_every": every, "log_every": min(every, self.base.log_every)}
        return replace_values(self.base, values | run | checkpoints | logging)


def require_optuna() -> None:
    """Raise UserError when Optuna is not installed, and silence its log lines."""
    try:
        import optuna
    except ImportError:
        raise UserError('a search needs Optuna, which is not installed; run: pip install "latentloom[sweep]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def is_resumable(plan: SearchPlan) -> bool:
    """Return whether the folder holds a search that this plan continues.

    Raises:
        UserError: the folder holds another search or other files.
    """
    path = plan.folder / "search.yaml"
    if not path.exists():
        if holds_files(plan.folder):
            raise UserError(
                f"{plan.folder} is not empty and holds no search; expected a new or empty folder; choose another --output"
            )
        return False
    changes = find_differences(read_stored_request(plan), plan.request)
    descriptions = [f"{name} was {stored!r}, now {requested!r}" for name, (stored, requested) in changes.items()]
    if descriptions:
        raise UserError(
            f"{plan.folder} holds another search ({'; '.join(descriptions[:4])}); expected the same settings. "
            "Pass the earlier settings to go on with it, or choose another --output"
        )
    return True


def read_stored_request(plan: SearchPlan) -> dict[str, Any]:
    """Read the request of the search in the folder, in the present format and with defaults for newer fields."""
    migration = plan.base.migration
    fields = migration.migrate(read_yaml(plan.folder / "search.yaml"))
    search_fields = {name: fields.pop(name, None) for name in ("trial_steps", "trained_on", "search")}
    if isinstance(search_fields["search"], dict):
        search_fields["search"] = {
            migration.renamed_fields.get(field, field): spec for field, spec in search_fields["search"].items()
        }
    with suppress(ConfigError):  # the search of another kind of prior: it differs from the plan
        fields = fill_defaults(type(plan.base), fields)
        del fields["output"]
    return search_fields | fields


def write_request(plan: SearchPlan) -> None:
    """Write `search.yaml`."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    request = plan.base.migration.add_format_number(plan.request)
    write_text(plan.folder / "search.yaml", yaml.safe_dump(request, sort_keys=False))


def open_study(plan: SearchPlan) -> "optuna.Study":
    """Open Optuna's study of the folder, and mark interrupted trials as failed."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import TrialState

    journal = str((plan.folder / "study.log").resolve())
    remove_incomplete_line(Path(journal))
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))),
        study_name="sweep",
        load_if_exists=True,
        # no pruning in the first quarter, where trials differ by their warm-up
        pruner=optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, n_warmup_steps=plan.steps // 4),
    )
    for interrupted in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)
    return study


def remove_incomplete_line(journal: Path) -> None:
    """Remove the half-written last line of a killed process; Optuna could read neither it nor the line after it."""
    content = journal.read_bytes() if journal.exists() else b""
    if content and not content.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def read_results(study: "optuna.Study", plan: SearchPlan) -> list[TrialResult]:
    """Read the trials that have ended, numbered from 1 in order, without interrupted ones."""
    from optuna.trial import TrialState

    outcomes = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    journal_names = map_journal_names(plan, study)
    ended_trials = [
        t
        for t in study.get_trials(deepcopy=False, states=tuple(outcomes))
        if t.state is not TrialState.FAIL or FAILURE_REASON in t.user_attrs
    ]
    return [
        TrialResult(
            number=number,
            values={p.field: p.to_config_value(t.params[journal_names[p.field]]) for p in plan.space},
            outcome=outcomes[t.state],  # type: ignore[arg-type]
            objective=min(t.intermediate_values.values(), default=math.nan),
            steps=max(t.intermediate_values, default=0),
            seconds=t.duration.total_seconds() if t.duration else 0.0,
            reason=t.user_attrs.get(FAILURE_REASON, ""),
        )
        for number, t in enumerate(ended_trials, 1)
    ]


def map_journal_names(plan: SearchPlan, study: "optuna.Study") -> dict[str, str]:
    """Map each searched field to its name in the journal, which is an earlier one in a search of an earlier version."""
    stored_names = {name for trial in study.get_trials(deepcopy=False) for name in trial.params}
    earlier_names = {new: old for old, new in plan.base.migration.renamed_fields.items() if old in stored_names}
    return {parameter.field: earlier_names.get(parameter.field, parameter.field) for parameter in plan.space}


def suggest_trial(plan: SearchPlan, study: "optuna.Study", number: int) -> "optuna.Trial":
    """Start the next trial with values that depend on the seed, the number and the trials that have ended."""
    import optuna

    seed = int(np.random.SeedSequence((plan.base.seed, number)).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    if number == 1 and not waiting:  # a trial waits already when the search was killed after enqueue_trial
        study.enqueue_trial(base_optuna_values(plan.space, plan.base))
    trial = study.ask()
    journal_names = map_journal_names(plan, study)
    for parameter in plan.space:
        parameter.suggest(trial, journal_names[parameter.field])
    return trial
