"""Judges by name: what ``--judge`` takes."""

from __future__ import annotations

from prefopt.config.compare import CompareConfig
from prefopt.config.tools import IMPLICIT, ScoreConfig, is_model_reward
from prefopt.core.options import nearest
from prefopt.errors import ConfigError
from prefopt.evaluate.judges.judge import AnswerJudge, Judge, PatternJudge, ScoreJudge
from prefopt.evaluate.score import by_text, scores_for
from prefopt.rewards import RULES, Reward, load_reward

NAMED = ("regex:PATTERN", "gsm8k", "implicit:MODEL,REFERENCE", "llm")


def load_judge(config: CompareConfig, own: Reward | None = None) -> Judge:
    """The judge that ``config`` names, or ``own`` function. Raises :class:`prefopt.errors.UserError`."""
    if own is not None:
        return ScoreJudge(own.name, by_text(own))
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
        return _by_scores(name, config, reward=IMPLICIT, model=policy, reference=reference)
    if name == "llm":
        from prefopt.evaluate.judges.llm import LanguageJudge

        assert config.judge_url is not None
        return LanguageJudge(config.judge_url, config.judge_model, key_variable=config.judge_key)
    if is_model_reward(name):
        return _by_scores(name, config, reward=name)
    if not colon and name not in RULES:
        known = [*RULES, *NAMED]
        raise ConfigError(
            f"--judge {name}: there is no such judge{nearest(name, known)}; there are {', '.join(known)}, the folder of"
            " a reward model, and MODULE:FUNCTION for one of your own"
        )
    return ScoreJudge(name, by_text(load_reward(name)))


def _by_scores(name: str, config: CompareConfig, **options: str) -> ScoreJudge:
    """A judge by what ``prefopt score`` would give; nothing is read from files or written."""
    machine = {"device": config.device, "dtype": config.dtype, "threads": config.threads}
    scores, _ = scores_for(ScoreConfig(files=["samples"], output="none", **options, **machine))  # type: ignore[arg-type]
    return ScoreJudge(name, scores)
