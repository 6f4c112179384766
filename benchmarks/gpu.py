"""Run the tests marked gpu and the throughput benchmark, and write what they say to docs/gpu.md.

Where packages are missing and gpu-kit/ is there, its wheels are unpacked into it first; nothing
else is installed. All ends within nine minutes. Without a GPU the same tests and a tiny benchmark
run on the CPU, and nothing is written.

    python benchmarks/gpu.py    # or: make gpu
"""

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KIT, PAGE = ROOT / "gpu-kit", ROOT / "docs" / "gpu.md"
LAST = "## Last run\n"
# Seconds for all, and for the tests of them; the rest is the benchmark's, but for its end.
MOST_S, TESTS_S, END_S = 540, 200, 30
CPU_TESTS = "-m 'not gpu' tests/core/test_gpu.py tests/core/data/test_gpu_views.py"
CPU_SIZES = "--networks resnet18 --batches 4 8 --size 64 --images 32 --rounds 3"
# Another image's libraries may warn of other things than ours: that is not what is asked here.
PYTEST = "-m pytest -vv --color=no --tb=short -W default -p no:cacheprovider"


def unpack_kit() -> None:
    """Make the kit's packages importable, here and in child processes, where they are missing."""
    if all(importlib.util.find_spec(name) for name in ("optuna", "platformdirs", "pydantic")):
        return
    wheels, site = sorted(KIT.glob("wheels/*.whl")), KIT / "site"
    if not wheels:
        raise SystemExit(
            "Packages are missing. With a network: make test. Without: bring the folder that "
            "make gpu-kit made elsewhere (docs/gpu.md)."
        )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--upgrade", f"--target={site}", *wheels], check=True)
    os.environ["PYTHONPATH"] = f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(site))


def run(seconds: float, command: str) -> tuple[str, bool]:
    """Run Python on a command; give what it says, shown too, and whether it ended well."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    line = [sys.executable, *shlex.split(command)]
    try:
        done = subprocess.run(
            line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=seconds
        )
        said, is_good = done.stdout.decode(), done.returncode == 0
    except subprocess.TimeoutExpired as err:
        said, is_good = (err.stdout or b"").decode(), False
        said += f"\nCut off after {seconds:.0f} seconds.\n"
    print(said, flush=True)
    return said, is_good


def outcomes(said: str) -> tuple[str, str]:
    """Return how many tests ended how, as verbose pytest said, and a table of them."""
    which = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
    found = re.findall(rf"^tests/(\S+)\.py::test_(.+?) ({which})", said, re.M)
    rows = [f"| {file} | {name.replace('_', ' ')} | {how.lower()} |" for file, name, how in found]
    counts = Counter(how.lower() for *_, how in found)
    summary = ", ".join(f"{n} {how}" for how, n in counts.items()) or "none ran"
    return summary, "\n".join(["| file | test | outcome |", "| --- | --- | --- |", *rows])


def main() -> None:
    """Run, and write the page where there is a GPU."""
    begin = time.perf_counter()
    unpack_kit()
    import torch

    has_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if has_gpu else "no GPU here: the same, small, on the CPU"
    print(f"{name}, PyTorch {torch.__version__}", flush=True)
    chosen = "-m gpu tests/core" if has_gpu else CPU_TESTS
    said, is_good = run(TESTS_S, f"{PYTEST} {chosen}")
    left = MOST_S - END_S - (time.perf_counter() - begin)
    sizes = f"--seconds {left - END_S:.0f}" if has_gpu else CPU_SIZES
    measured, is_measured = run(left, f"benchmarks/throughput.py {sizes}")
    summary, table = outcomes(said)
    if has_gpu:
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        head = (
            f"{date.today()}, commit {git.stdout.strip() or 'unknown'}: {name}, PyTorch "
            f"{torch.__version__}, Python {platform.python_version()}. Tests: {summary}"
            f"{'' if is_good else '; pytest FAILED'}. {time.perf_counter() - begin:.0f} s in all."
        )
        above = PAGE.read_text(encoding="utf-8").partition(LAST)[0]
        page = f"{above}{LAST}\n{head}\n\n{table}\n\n{measured}"
        PAGE.write_text(page, encoding="utf-8")
    raise SystemExit(not (is_good and is_measured and "passed" in summary))


if __name__ == "__main__":
    main()
