"""One file with all that somebody else needs to render a study again, or to run it again."""

import contextlib
import dataclasses
import shlex
import sqlite3
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from study.ablation.baseline import find_baseline
from study.config.errors import ConfigError
from study.config.study_config import StudyConfig
from study.config.toml import config_text
from study.record.models import SPLITS_FILE
from study.record.record import Record

_OUTPUT = StudyConfig().study.output
_REPORTS = ("report", "ablation")
_README = """Frostline study {name}.

studies.db       its record: configuration, trials, epochs, predictions, tests
study.toml       its configuration
{output}/{name}  its split file and reports

The images are not in here. To write the report again, in this folder:
  python -m study report {quoted}
To run it again, from the images of {source} (fingerprint {mark}):
  python -m study {command} --data IMAGES --name {again}
"""


def write_archive(store: Record, name: str, out: Path) -> Path:
    """Write a study's record, configuration, split file and reports into a ZIP file.

    Raises:
        ConfigError: The file is there, or the record is not in an SQLite file.
    """
    study = store.study(name)
    if out.exists():
        rule = f"--out must name a new file, but {out} exists."
        raise ConfigError(f"{rule} Remove it, or choose another.")
    if store.engine.dialect.name != "sqlite":
        raise ConfigError(
            f"an archive is made from an SQLite file, but {store.storage} is none. Dump that "
            "database with its own tools."
        )
    config, command = StudyConfig.from_record(study.config), "run --config study.toml"
    storage = str(store.engine.url.database)
    if store.designs(study.id):
        config = find_baseline(name, "best", (), {"study.storage": storage}).config
        command = "ablate study.toml"
    plain = StudyConfig()  # paths are to be those of the place where it is unpacked
    own = plain.study
    section = dataclasses.replace(config.study, storage=own.storage, output=own.output)
    data = dataclasses.replace(config.data, cache_dir=None, root=plain.data.root)
    config = config.model_copy(update={"study": section, "data": data})
    with TemporaryDirectory() as temporary:
        database = Path(temporary) / "studies.db"
        _copy_database(storage, database, name)
        readme = _README.format(
            name=name,
            quoted=shlex.quote(name),
            again=shlex.quote(f"{name}-again"),
            output=_OUTPUT,
            source=study.data["source"],
            mark=study.data["fingerprint"][:8],
            command=command,
        )
        with zipfile.ZipFile(out, "x", zipfile.ZIP_DEFLATED) as archive:
            archive.write(database, "studies.db")
            archive.writestr("study.toml", config_text(config))
            archive.writestr("README.txt", readme)
            for path in sorted(study.output.rglob("*")):
                inside = path.relative_to(study.output)
                if path.is_file() and inside.parts[0] in (SPLITS_FILE, *_REPORTS):
                    archive.write(path, f"{_OUTPUT}/{name}/{inside.as_posix()}")
    return out


def _copy_database(source: str, target: Path, name: str) -> None:
    """Copy one study of a database into another one."""
    connect = sqlite3.connect
    with contextlib.closing(connect(source)) as old, contextlib.closing(connect(target)) as new:
        old.backup(new)
    with Record(str(target)) as copy:
        for other in copy.studies():
            if other.name != name:
                copy.delete_study(other.name)
        study = copy.study(name)
        study.config["study"]["output"] = str(target.parent / _OUTPUT)
        copy.update_study(study, study.config, study.data)
    with contextlib.closing(connect(target)) as new:
        new.execute("VACUUM")
