"""A language model behind a URL that judges responses, as all commands name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.core.options import Config, flag, option
from prefopt.errors import ConfigError

LLM = "llm"
"""What the judge is called that ``--judge-url`` stands for."""
COMPARERS = (LLM, "people")
"""What ``prefopt online`` calls judges that compare responses instead of scoring each."""


@dataclass(frozen=True, kw_only=True)
class JudgeServerOptions(Config):
    """The server of the judge ``llm``."""

    judge_url: str | None = option(
        None, "OpenAI-compatible server of the judge llm, such as http://localhost:8000/v1", group="judge"
    )
    judge_model: str | None = option(None, "its name there", default_text="the server's only model")
    judge_key: str | None = option(None, "environment variable with the server's key", default_text="no key is sent")

    def check_judge(self, asked: bool, by: str, more: Sequence[str] = ()) -> None:
        """Refuse the judge without a server, and options of the judge where it is not ``asked``.

        ``by``: the option that names it, in words; ``more``: other options that the judge alone reads. Raises
        ``ConfigError``.
        """
        if asked and self.judge_url is None:
            raise ConfigError(f"{by} needs --judge-url, the address of its server")
        for name in ("judge_url", "judge_model", "judge_key", *more):
            if not asked and getattr(self, name) is not None:
                raise ConfigError(f"{flag(name)} belongs to {by}; leave it out")
