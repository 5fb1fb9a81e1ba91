"""``prefopt sample`` and ``prefopt score``: responses drawn and responses judged, from file to file."""

from __future__ import annotations

from prefopt.config.sample import SampleConfig
from prefopt.config.score import ScoreConfig
from prefopt.errors import ConfigError
from prefopt.screen import tell, tell_lines


def sample_to_file(config: SampleConfig) -> int:
    """A program has nowhere else to put samples; the Python function gives them back."""
    from prefopt.methods.sample import run

    if config.output is None:
        raise ConfigError("--output is missing: file to write, JSON lines")
    run(config)
    return 0


def score_file(config: ScoreConfig) -> int:
    from prefopt.evaluate.score import run

    if config.model is not None:
        from prefopt.model.named import adapter_line  # a rule needs no torch

        if line := adapter_line(config.model):
            tell(line)
    tell_lines(run(config).lines())
    return 0
