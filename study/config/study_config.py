"""StudyConfig: all settings of a study, in sections."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from core.config import SECTION, DataConfig, OrNone, TrainConfig, fields_of
from study.ablation.designs import DESIGNS
from study.config.formatting import hide_password
from study.config.search_space import (
    DEFAULT_SPACE,
    SPACE,
    Dimension,
    default_params,
    parse_space,
)
from study.search.samplers import PRUNERS, SAMPLERS

if TYPE_CHECKING:
    Sampler = str
    Pruner = str
    DesignKind = str
else:
    Sampler, Pruner = Literal[tuple(SAMPLERS)], Literal[tuple(PRUNERS)]
    DesignKind = Literal[tuple(DESIGNS)]
EXHAUSTIVE: tuple[Sampler, ...] = ("grid", "bruteforce")
"""Samplers that visit every setting of the space."""
# Bytes: folders take 255, and `-ablation` is appended.
LONGEST_NAME = 240
DEFAULT_TIME = 900.0
"""Seconds of a run whose study is limited by nothing."""
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?[hms])+", value):  # "2" may be meant as minutes
        raise ValueError('must be a text like "2h", "90m", "1h30m" or "45s"')
    parts = re.findall(r"([\d.]+)([hms])", value)
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _study_name(value: object) -> object:
    if not (isinstance(value, str) and re.fullmatch(r"\w([\w .-]*\w)?", value)):
        rule = "must begin and end with a letter or digit, with . _ - or a space between"
        raise ValueError(rule)
    return value


@dataclass(frozen=True, slots=True, config=SECTION)
class StudySection:
    """What the study is called, where it is kept, and when it is done."""

    name: Annotated[str, BeforeValidator(_study_name)] = ""
    """Name of the study; leave out for the name of the data folder."""
    storage: Annotated[str, PlainSerializer(hide_password)] = "studies.db"
    """Database of all studies: a file, or an SQLAlchemy URL (postgresql://...)."""
    output: str = "frostline-runs"
    """Folder of checkpoints and reports; a relative one lies beside the database."""
    time: OrNone[Annotated[float, BeforeValidator(_seconds)]] = Field(default=None, gt=0)
    """Time that one run takes as a whole, in seconds or as "2h" or "90m". Leave out for no limit,
    or, where trials is left out too, for 15 minutes."""
    trials: OrNone[int] = Field(default=None, ge=1)
    """Finished trials that the study shall have in total; leave out for no limit."""
    patience: OrNone[int] = Field(default=None, ge=1)
    """Stop when this many finished trials in a row were no better; leave out for never."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Checkpoints that stay on disk: those of the best trials, beside those that a model is made
    of (of each backbone the best head and the best thawed trial)."""
    finish: Literal["ensemble", "single"] = "ensemble"
    """What the model is made of: the best trial alone, or the best of several backbones and
    freeze levels, whose probabilities are averaged, where that scores higher."""
    refit: bool = True
    """Fit the trials of the model again on all images but the test split."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler. (That of training is train.seed.)"""
    cache: OrNone[ByteSize] = Field(default=None, ge=0)
    """Most bytes on disk for outputs of frozen layers, which trials share, as "8GB"; 0 shares
    nothing; leave out for a tenth of what is free. It changes no number."""

    @property
    def seconds(self) -> float | None:
        """Time of one run; None for no limit."""
        return DEFAULT_TIME if self.time is None and self.trials is None else self.time


@dataclass(frozen=True, slots=True, config=SECTION)
class SearchSection:
    """How settings are proposed, and how hopeless trials are stopped."""

    strategy: Literal["plan", "sampler"] = "plan"
    """plan: solved heads of every backbone, then thawed layers where that helps, then the sampler,
    each trial as long as the time allows. sampler: recipes, then the sampler, with a pruner; so it
    is where sampler, pruner or recipes are given, and this key is not, or in a layer below."""
    download: bool = False
    """Search modern backbones, too, where [space] names none (`python -m study backbones --modern`
    lists them); weights that are not in the cache are downloaded."""
    sampler: Sampler = "tpe"
    """Proposes settings: tpe, random, gp, cmaes, qmc, grid or bruteforce."""
    pruner: Pruner = "hyperband"
    """With strategy = sampler, stops hopeless trials early: hyperband, median, percentile,
    halving, wilcoxon or none. (A plan stops trials that fall behind the head they start from.)"""
    recipes: bool = True
    """With strategy = sampler, try known settings first: a linear probe of every backbone, then
    half and all of the first one fine-tuned. (Not under grid and bruteforce.)"""

    @property
    def has_recipes(self) -> bool:
        """Whether recipes are tried first: not where the sampler visits every setting anyway."""
        return self.recipes and self.sampler not in EXHAUSTIVE


@dataclass(frozen=True, slots=True, config=SECTION)
class AblationSection:
    """What `study ablate` varies about a baseline, how often, and how it judges."""

    design: DesignKind = Field(
        default="ofat",
        description="Which settings are run: "
        + ", ".join(f"{kind} ({design.summary})" for kind, design in DESIGNS.items())
        + ".",
    )
    replicates: int = Field(default=5, ge=1)
    """Runs of every setting, with seeds paired over the settings; with adaptive, those of the
    first analysis."""
    folds: OrNone[int] = Field(default=None, ge=1, le=20)
    """Folds of a cross-validation of all images but the test split: replicate r has the r-th of
    them to validate on. 1: all replicates share the validation split. Leave out for 5; or 1 where
    that split has 400 images and chose no baseline, or data.ablation_fraction kept some apart."""
    adaptive: bool = False
    """Add replicates where a result is inconclusive, up to max_replicates; the significance level
    is adjusted for the interim analyses."""
    max_replicates: int = Field(default=20, ge=2)
    """With adaptive: most replicates of a setting."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Family-wise error that all analyses of an ablation hold together."""
    margin: float = Field(default=1.0, gt=0, le=100)
    """Accuracy points below which a difference does not matter: two settings count as equal where
    the difference is shown to be smaller."""
    max_cells: int = Field(default=64, ge=2)
    """Most settings of a factorial; a larger one is refused."""
    keep_checkpoints: bool = True
    """Keep every run's weights, so that chosen settings can be tested later."""
    factors: OrNone[dict[str, Any]] = None
    """What is varied: a training key with a list of values, or a name with a table of levels, each
    a table of training keys. Leave out for a set proposed for the baseline."""


class StudyConfig(BaseModel):
    """The whole configuration of a study; `study.config.load` makes checked ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    study: StudySection = StudySection()
    """Name, storage, and when the study is done."""
    data: DataConfig = DataConfig()
    """Which images."""
    train: TrainConfig = TrainConfig()
    """Settings of every trial; a searched key's value here is only a recipe's default."""
    search: SearchSection = SearchSection()
    """Sampler, pruner, recipes."""
    ablation: AblationSection = AblationSection()
    """What `study ablate` varies."""
    space: dict[str, Dimension] = Field(default_factory=lambda: parse_space(DEFAULT_SPACE)[0])
    """Searched training keys; given as a whole, it replaces the default space."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_data(cls, raw: Any) -> Any:
        study = raw.get("study", StudySection())
        if study.name:
            return raw
        name = default_name(raw.get("data", DataConfig()).source)
        return {**raw, "study": dataclasses.replace(study, name=name)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StudyConfig":
        """Read back what `to_record` wrote."""
        space = parse_space(record["space"])[0]
        values = {**record, "train": default_params(space) | record["train"]}
        made = {name: section(**values[name]) for name, section in SECTIONS.items()}
        return cls(**made, space=space)

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values; a searched key stands under `space` only."""
        record = self.model_dump(mode="json", exclude={"train": set(self.space)})
        record["space"] = SPACE.dump_python(self.space, mode="json", exclude_defaults=True)
        return record


SECTIONS: dict[str, Any] = {
    name: field.annotation for name, field in StudyConfig.model_fields.items() if name != "space"
}
"""The sections of keys; [space], which holds dimensions, is not among them."""
FREE_KEYS = {
    *(f"study.{key}" for key in fields_of(StudySection) if key != "seed"),
    *(f"data.{key}" for key in ("source", "root", "download", "cache_dir")),
    *("train.device", "train.workers"),
    *(f"ablation.{key}" for key in fields_of(AblationSection)),
}
"""Keys that may change when a study is resumed: they do not change what a trial's result means."""


def default_name(source: str) -> str:
    """Name a study after its data: the folder's or the dataset's name."""
    path = source.removeprefix("torchvision:").removeprefix("folder:")
    name = path if source.startswith("torchvision:") else Path(path).resolve().name
    name = re.sub(r"[^\w.-]+", "-", name).encode()[:LONGEST_NAME].decode(errors="ignore")
    return name.strip(".-_") or "study"


def config_diff(old: StudyConfig, new: StudyConfig) -> list[str]:
    """List what differs but for `FREE_KEYS`, one `section.key: old -> new` per line."""
    before, after = _flat(old), _flat(new)
    changed = [key for key in before if before[key] != after[key] and key not in FREE_KEYS]
    return [f"{key}: {before[key]} -> {after[key]}" for key in changed]


def _flat(config: StudyConfig) -> dict[str, str]:
    """Map every key with its section to its value, or to the dimension that searches it."""
    return {
        f"{name}.{key}": repr(value)
        for name in SECTIONS
        for key, value in dataclasses.asdict(getattr(config, name)).items()
    } | {f"train.{key}": f"searched in {dimension}" for key, dimension in config.space.items()}
