"""Judges by name: what ``--judge`` takes."""

from __future__ import annotations

from prefopt.config.compare import CompareConfig
from prefopt.errors import ConfigError
from prefopt.evaluate.judges.judge import Judge, ScoreJudge
from prefopt.evaluate.judges.rules import AnswerJudge, PatternJudge
from prefopt.rewards import load_reward


def load_judge(config: CompareConfig) -> Judge:
    """The judge that ``config`` names. Raises :class:`prefopt.errors.UserError`."""
    name = config.judge
    assert name is not None
    kind, colon, rest = name.partition(":")
    if kind == "regex" and colon:
        return PatternJudge(rest)
    if name == "gsm8k":
        return AnswerJudge()
    if kind == "implicit" and colon:
        policy, comma, reference = rest.partition(",")
        if not (policy and comma and reference):
            raise ConfigError(f"--judge {name}: write implicit:MODEL,REFERENCE")
        from prefopt.evaluate.judges.implicit import ImplicitJudge

        return ImplicitJudge(policy, reference, device=config.device, dtype=config.dtype)
    if name == "llm":
        from prefopt.evaluate.judges.llm import LanguageJudge

        assert config.judge_url is not None
        return LanguageJudge(config.judge_url, config.judge_model, key_variable=config.judge_key)
    return ScoreJudge(load_reward(name))
