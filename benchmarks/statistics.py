"""Planted effects: how often the ablation's statistics are right on simulated studies.

    python benchmarks/statistics.py --studies 2000

The figures are made in planted_effects.py. This file has the name of a module of the standard
library, and a script's folder comes first on the path: where another benchmark (or a library that
it loads) asks for that module, this file steps aside for it.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ != "__main__":
    meant = Path(sysconfig.get_path("stdlib")) / "statistics.py"
    spec = importlib.util.spec_from_file_location("statistics", meant)
    assert spec is not None and spec.loader is not None, "Python comes with its library"
    sys.modules["statistics"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    from planted_effects import main

    main()
