"""The file in which a study leaves the trials that it ran, so that another can run them again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from study.config.errors import ConfigError
from study.config.search_space import ParamValue, fits
from study.config.study_config import StudyConfig
from study.record.models import Trial

PLAN_FILE = "plan.json"
"""Its name, in the study's folder."""


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    """A trial in the file of a plan.

    Attributes:
        params: A value for every dimension.
        origin: Why it was run.
        forecast_s: Seconds that were foreseen; None where nothing was.
        duration_s: Seconds that it took.
    """

    params: dict[str, ParamValue]
    origin: str = "plan"
    forecast_s: float | None = None
    duration_s: float | None = None


_PLAN = TypeAdapter(list[PlannedTrial])


def write_plan(folder: Path, rows: Sequence[Trial], forecasts: Mapping[int, float]) -> None:
    """Keep what a study ran, in its order; forecasts are by number."""
    found = [
        PlannedTrial(row.params, row.origin, forecasts.get(row.number), row.duration_s)
        for row in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN_FILE).write_bytes(_PLAN.dump_json(found, indent=1) + b"\n")


def read_plan(path: Path, config: StudyConfig) -> list[PlannedTrial]:
    """Read a plan for a study.

    Raises:
        ConfigError: It cannot be read, or has settings outside the study's space.
    """
    try:
        found = _PLAN.validate_json(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"--plan {path}: cannot be read: {err.strerror}.") from err
    except ValidationError as err:
        fault = err.errors(include_url=False)[0]
        place = "".join(f" in {part}" for part in fault["loc"])
        reason = f"{fault['msg'][0].lower()}{fault['msg'][1:]}{place}"
        raise ConfigError(f"--plan {path}: must be a study's {PLAN_FILE}, but {reason}.") from err
    for number, trial in enumerate(found):
        if not fits(config.space, trial.params):
            raise ConfigError(
                f"--plan {path}: trial {number} must lie in the study's space, but has "
                f"{trial.params}. Use the same --config and --set as the study that left it."
            )
    return found
