"""Open Optuna's dashboard, with the figures of our report among its own."""

import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import optuna
import optuna_dashboard
import plotly.graph_objects as go

from reports.record import read_record
from reports.search_plots import PLOTS, hovers, with_hovers
from study.execution.artifacts import ARTIFACTS_FOLDER
from study.record.database import RecordError
from study.record.record import Record

_AGAIN_S = 30  # what a running study adds appears after so many seconds
# The dashboard draws these itself, of complete trials alone.
_ITS_OWN = ("parallel", "contour", "timeline", "slices")


def open_dashboard(store: Record, port: int) -> int:
    """Serve the dashboard until it is interrupted, and keep it up to date; return its status."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise RecordError(f"--port must be free, but {port} is in use. Use another one.")
    names = [summary.name for summary in store.studies()]
    folders = {store.study(name).output.parent / ARTIFACTS_FOLDER for name in names}
    url = store.storage if "://" in store.storage else f"sqlite:///{store.storage}"
    program = Path(sys.executable).with_name("optuna-dashboard")
    command = [str(program), url, "--port", str(port), "--quiet"]
    if folders:
        folder, *others = sorted(folders, key=lambda path: not path.is_dir())
        folder.mkdir(parents=True, exist_ok=True)  # a running study's first trial may fill it
        command += ["--artifact-dir", str(folder)]
        if any(path.is_dir() for path in others):
            print(f"Artifacts are shown of studies in {folder.parent} alone.")
    publish(store, names)
    with subprocess.Popen(command) as server:
        print(f"Optuna's dashboard: http://127.0.0.1:{port}/ (Ctrl-C ends it)", flush=True)
        try:
            while True:
                running = [
                    s.name for s in store.studies() if store.working(store.study(s.name).id)
                ]
                try:
                    return server.wait(_AGAIN_S)
                except subprocess.TimeoutExpired:
                    publish(store, running)
        except KeyboardInterrupt:
            server.terminate()
    return 0


def publish(store: Record, names: Iterable[str]) -> None:
    """Add the figures of searches to them, over those of an earlier time."""
    for name in names:
        study = store.study(name)
        rows = store.trials(study.id)
        if any(row.factor for row in rows) or not rows:
            continue
        record, own = read_record(store, study.name), store.optuna_study(study.id)
        texts = hovers(record)
        for plot in (plot for plot in PLOTS if plot.name not in _ITS_OWN):
            for key, figure in plot.draw(record):
                if isinstance(figure, go.Figure):
                    with_hovers(figure, texts).update_layout(title=plot.title, template="none")
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                        optuna_dashboard.save_plotly_graph_object(own, figure, graph_object_id=key)
