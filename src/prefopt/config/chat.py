"""What ``prefopt chat`` reads."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.data import TemplateOptions
from prefopt.config.model import MachineOptions
from prefopt.core.options import check_all, flag, option
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TalkerOptions:
    """Who answers; a class of its own so that it stands first."""

    model: str | None = option(
        None,
        "model to chat with: a folder, or its name on the Hugging Face Hub",
        group="model",
        default_text="the one behind --url",
    )
    adapter: str | None = option(None, "LoRA adapter on the model", group="model")
    against: str | None = option(None, "a second model, which answers too", group="model")
    against_adapter: str | None = option(
        None, "LoRA adapter on the second model (on --against, else on --model without its own)", group="model"
    )
    url: str | None = option(
        None,
        "a server with OpenAI's interface, such as http://localhost:8000/v1; with --model it answers second",
        group="model",
    )
    url_model: str | None = option(None, "which of the server's models", group="model", default_text="the one it has")
    url_key: str | None = option(
        None, "environment variable that holds the server's key", group="model", default_text="no key is sent"
    )


@dataclass(frozen=True, kw_only=True)
class ChatConfig(MachineOptions, TemplateOptions, TalkerOptions):
    """One session. Construction checks types, ranges and contradictions, and raises ``ConfigError``."""

    blind: bool = option(False, "two models answer as A and B, and you say which is better", group="chat")
    votes: str = option("votes.jsonl", "file that votes are appended to, to train on with --data", group="chat")
    system: str | None = option(None, "system prompt to begin with", group="chat")
    complete: bool = option(False, "continue text, without turns and chat template", group="chat")

    max_new_tokens: int = option(512, "tokens of an answer at most", group="sampling", at_least=1)
    temperature: float | None = option(
        None,
        "divides the logits; 0 takes the likeliest token",
        group="sampling",
        default_text="what the model's generation_config.json says, else 1",
        at_least=0,
    )
    top_p: float | None = option(
        None,
        "draw from the likeliest tokens that together have this probability",
        group="sampling",
        default_text="as for --temperature",
        above=0,
        at_most=1,
    )
    top_k: int | None = option(
        None, "draw from this many likeliest tokens", group="sampling", default_text="as for --temperature", at_least=1
    )
    seed: int | None = option(
        None,
        "seed of the answers",
        group="sampling",
        default_text="another one each time",
        at_least=0,
        at_most=2**32 - 1,
    )

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        if self.model is None and self.url is None:
            raise ConfigError("--model is missing: model to chat with, a folder or a Hub name; or give --url")
        two = self.against is not None or self.against_adapter is not None
        if two and self.url is not None:
            raise ConfigError("--against and --url both name the second model: leave one of them out")
        if two and self.model is None:
            raise ConfigError(f"{flag('against' if self.against else 'against_adapter')} needs --model to compare with")
        for name in ("url_model", "url_key"):
            if getattr(self, name) is not None and self.url is None:
                raise ConfigError(f"{flag(name)} does nothing without --url: leave it out")
        if self.adapter is not None and self.model is None:
            raise ConfigError("--adapter needs the --model it belongs to")
        if self.blind and not two and (self.url is None or self.model is None):
            raise ConfigError("--blind needs two models: give --against, or --url beside --model")
        if self.votes != type(self).votes and not self.blind:
            raise ConfigError("--votes does nothing without --blind: leave it out")
        if self.complete and (self.system or self.chat_template or self.template_variables):
            raise ConfigError("--complete continues text: --system and chat templates are for conversations")
