"""What an ablation is to do, settled before its first run: baseline, design and looks."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from core.config import TrainConfig
from study.baseline import Baseline
from study.config.errors import ConfigError
from study.config.search_space import apply_params
from study.config.study_config import StudyConfig, config_diff
from study.designs import Design
from study.execution.session import corner_configs, stored_side
from study.record.record import Record

# A later look has half as many replicates again: few looks, so that little error is spent on each.
_LOOK_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What an ablation is to do.

    Attributes:
        baseline: What is compared against.
        design: Its cells; a path grows.
        looks: Numbers of replicates after which an adaptive ablation looks; one for a fixed one.
    """

    baseline: Baseline
    design: Design
    looks: tuple[int, ...]


def looks_of(replicates: int, most: int) -> tuple[int, ...]:
    """List the numbers of replicates at which an adaptive ablation looks."""
    looks = [replicates]
    while looks[-1] < most:
        step = math.ceil(looks[-1] * _LOOK_GROWTH)
        # No look that the last one follows closely: it would spend error and see little.
        looks.append(most if step * _LOOK_GROWTH > most else step)
    return tuple(looks)


def make_plan(baseline: Baseline, design: Design) -> Plan:
    """Put a baseline and a design together.

    Raises:
        ConfigError: The rules of an adaptive ablation are broken.
    """
    settings = baseline.settings
    if not settings.adaptive:
        return Plan(baseline, design, (settings.replicates,))
    if design.kind not in ("ofat", "loco"):
        raise ConfigError(
            f"--adaptive adds replicates to single levels, so it needs --design ofat or loco, but "
            f"got design={design.kind!r}."
        )
    if settings.replicates < 2 or settings.max_replicates <= settings.replicates:
        raise ConfigError(
            "an adaptive ablation must begin with at least 2 replicates and may end with more "
            f"(ablation.max_replicates), but got {settings.replicates} and "
            f"{settings.max_replicates}."
        )
    return Plan(baseline, design, looks_of(settings.replicates, settings.max_replicates))


def cell_configs(plan: Plan) -> list[TrainConfig]:
    """Return what each cell of the design trains, with the first replicate's seed."""
    train = plan.baseline.config.train
    found = []
    for cell in plan.design.cells:
        try:
            found.append(apply_params(train, cell.overrides))
        except ValueError as err:
            raise ConfigError(f"{cell.label}: {err}") from err
    return found


def settled_config(plan: Plan) -> StudyConfig:
    """Return the ablation's configuration with the pictures' size fixed.

    What a run sees must not depend on the other cells of the design; so the size at which pictures
    are kept is that of the study that found the baseline, or enough for every cell of the first
    design.
    """
    config, source = plan.baseline.config, plan.baseline.source
    if config.data.store_size is not None:
        return config
    trains = corner_configs(source) if source else cell_configs(plan)
    data = dataclasses.replace(config.data, store_size=stored_side(trains))
    return config.model_copy(update={"data": data})


def n_runs(plan: Plan) -> int:
    """Count the runs of a plan: all that an adaptive one may need, all steps of a path."""
    if plan.design.kind != "path":
        return len(plan.design.cells) * plan.looks[-1]
    k = len(plan.design.factors)
    return (1 + k * (k + 1) // 2) * plan.looks[-1]


def check_begun(plan: Plan) -> None:
    """Refuse, before a run, what the database has under the ablation's name, if it is another.

    Raises:
        ConfigError: The study of this name is a search, or has another baseline.
    """
    storage = plan.baseline.config.study.storage
    if "://" in storage or Path(storage).is_file():
        with Record.open(storage) as store:
            as_begun_config(store, plan)


def as_begun_config(store: Record, plan: Plan) -> StudyConfig:
    """Take the pictures' size from the record where the ablation has begun; else settle it.

    Raises:
        ConfigError: The study of this name is a search, or has another baseline.
    """
    row = store.find_study(plan.baseline.config.study.name)
    if row is None:
        return settled_config(plan)
    if row.config.get("space"):
        raise ConfigError(
            f"study {row.name} is a search, so it cannot hold an ablation too. Use another --name."
        )
    config = plan.baseline.config
    if config.data.store_size is None:
        known = row.config["data"]["store_size"]
        data = dataclasses.replace(config.data, store_size=known)
        config = config.model_copy(update={"data": data})
    changes = config_diff(StudyConfig.from_record(row.config), config)
    if changes:
        raise ConfigError(
            f"ablation {row.name} is already in {config.study.storage} with another baseline:\n  "
            + "\n  ".join(changes)
            + "\nUse another --name, or go on with that one: "
            f"python -m study ablate {row.name}"
        )
    return config
