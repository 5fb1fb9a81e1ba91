"""``prefopt compare``: who wins how often, told or as one JSON document."""

from __future__ import annotations

import json

from prefopt.config.compare import CompareConfig


def compare_models(config: CompareConfig) -> None:
    from prefopt.evaluate.compare import run
    from prefopt.evaluate.tell import lines

    result = run(config)
    if config.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print("\n".join(lines(result)))
