"""``prefopt compare``: who wins how often, told or as one JSON document."""

from __future__ import annotations

from prefopt.config.compare import CompareConfig
from prefopt.screen import tell_json, tell_lines


def compare_models(config: CompareConfig) -> None:
    from prefopt.evaluate.compare import run
    from prefopt.evaluate.tell import lines

    result = run(config)
    if config.json:
        tell_json(result.to_dict())
    else:
        tell_lines(lines(result))
