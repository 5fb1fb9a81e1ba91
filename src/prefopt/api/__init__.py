"""The Python functions: one per command, with names or objects.

Their signatures are those of the options, for ``help``, completion and the stubs that ``docs/make_stubs.py`` writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from prefopt.api import methods, models, runs
from prefopt.config.methods import METHODS
from prefopt.core.notebook import in_notebook

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: methods.method_function(name) for name in METHODS},
    "rlhf": methods.rlhf,
    **{name: getattr(models, name) for name in ("sample", "compare", *models.COMMANDS)},
    **{name: getattr(runs, name) for name in ("report", "plot", *runs.COMMANDS)},
}
"""What ``prefopt.NAME`` may be; those of ``prefopt.data`` and ``prefopt.collect`` are in modules of these names."""
globals().update(FUNCTIONS)

if in_notebook():  # said by the bars of other libraries, which prefopt keeps quiet
    warnings.filterwarnings("ignore", message="IProgress not found")
