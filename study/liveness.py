"""Whether the process that works on a study is still there."""

import socket

from study.rows import RunRow

# Two readings of a process's start differ by rounding only.
_SAME_START_S = 2.0


def process_start(pid: int) -> float:
    """Return when a process began, seconds since 1970.

    Raises:
        psutil.Error: There is none of that number.
    """
    import psutil

    return float(psutil.Process(pid).create_time())


def is_alive(run: RunRow, take_over: bool) -> bool:
    """Say whether a run's process still exists; of another machine's, only it could know."""
    import psutil

    if run.host != socket.gethostname():
        return not take_over
    try:
        return abs(process_start(run.pid) - run.pid_started) < _SAME_START_S
    except psutil.Error:
        return False


def told_alive(run: RunRow) -> str:
    """Say which process it is, and what the user can do."""
    where = f"process {run.pid} on {run.host} since {run.started_at:%Y-%m-%d %H:%M} UTC"
    remedy = "Wait for it, stop it, or use another --name."
    if run.host != socket.gethostname():
        remedy += " If that machine is gone, add --take-over."
    return f"the study is being run by {where}. {remedy}"
