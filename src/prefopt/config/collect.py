"""What ``prefopt collect`` reads: a study is made, served, counted and exported.

>>> CollectServeConfig(study="s.db").port
8700
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from prefopt.config.data import ReadOptions
from prefopt.config.training import MachineOptions
from prefopt.core.options import check_all, option
from prefopt.errors import ConfigError

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The file; a class of its own so that it stands first."""

    study: str = option(help="the study: one SQLite file", group="study", positional=True)


@dataclass(frozen=True, kw_only=True)
class ImportOptions(ReadOptions):
    """What is read into a study."""

    responses: list[str] | None = option(
        None,
        "files with responses, in any layout; what several files (of two models, say) answer to one prompt is compared",
        group="items",
    )
    gold: list[str] | None = option(
        None, "files with preferences that are known: shown now and then, to see who judges well", group="items"
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be used stops everything, or is left out and counted", group="data"
    )


@dataclass(frozen=True, kw_only=True)
class CollectNewConfig(MachineOptions, ImportOptions, StudyOptions):
    """A new study. Construction checks types, ranges and contradictions, and raises ``ConfigError``."""

    prompts: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets with prompts for --model; or .txt, one in every line",
        group="items",
    )
    model: list[str] | None = option(
        None, "models to sample responses from, folders or Hub names; of two, each gives as many", group="items"
    )
    num: int = option(2, "responses of every prompt, from all models together", group="items", at_least=2, at_most=9)
    max_new_tokens: int = option(256, "tokens of a response at most", group="sampling", at_least=1)
    temperature: float = option(1.0, "divides the logits", group="sampling", at_least=0)
    top_p: float = option(
        1.0, "draw from the likeliest tokens that together have this probability", group="sampling", above=0, at_most=1
    )
    seed: int = option(0, "seed of the samples", group="sampling", at_least=0, at_most=2**32 - 1)

    title: str | None = option(None, "what people see above", group="study", default_text="the file's name")
    instructions: str | None = option(None, "file with what people are told, as markdown", group="study")
    tags: list[str] | None = option(None, "tags that a vote may be given, one of them each", group="study")
    overlap: int = option(1, "people who judge every item", group="study", at_least=1)
    gold_every: int = option(10, "one in so many items is a gold one, while there are any", group="study", at_least=2)

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        if self.prompts is None and self.responses is None and self.gold is None:
            raise ConfigError(
                "a study needs items: give --prompts with --model, or --responses with files that have them"
            )
        if (self.prompts is None) != (self.model is None):
            raise ConfigError("--prompts and --model go together: the model answers the prompts")
        if self.model is not None and self.num % len(self.model):
            raise ConfigError(f"--num {self.num} cannot be shared out evenly among {len(self.model)} models")
        if self.temperature == 0 and self.model is not None and self.num > len(self.model):
            raise ConfigError("--temperature 0 draws the same response again and again: raise it")


@dataclass(frozen=True, kw_only=True)
class CollectImportConfig(ImportOptions, StudyOptions):
    """More items for a study."""

    def __post_init__(self) -> None:
        check_all(self)
        if self.responses is None and self.gold is None:
            raise ConfigError("nothing to import: give --responses, or --gold")


@dataclass(frozen=True, kw_only=True)
class CollectServeConfig(StudyOptions):
    """The page that people vote on."""

    host: str = option(
        "127.0.0.1", "address to listen on; any but this machine's own needs invitations", group="server"
    )
    port: int = option(8700, "port to listen on; 0 takes a free one", group="server", at_least=0, at_most=65535)
    allowed_hosts: list[str] | None = option(
        None,
        "names by which browsers reach the server; others are refused",
        group="server",
        default_text="--host and localhost, or the name in --url",
    )
    url: str | None = option(
        None,
        "address that people use, such as https://votes.example.org, behind a proxy that speaks TLS",
        group="server",
    )
    trusted_proxies: list[str] | None = option(
        None,
        "addresses or networks of proxies in front, whose X-Forwarded-For is believed: limits then hold for each"
        " person's address",
        group="server",
    )

    def __post_init__(self) -> None:
        check_all(self)
        if self.url is not None and not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:\d+)?/?", self.url):
            raise ConfigError(f"--url is {self.url!r}; it must be scheme and name alone, as https://votes.example.org")
        for proxy in self.trusted_proxies or ():
            _check_proxy(proxy)
        if self.host in EVERYWHERE and self.url is None and self.allowed_hosts is None:
            raise ConfigError(
                f"--host {self.host} has no name of its own: say with --allowed-hosts or --url how it is reached"
            )


def _check_proxy(proxy: str) -> None:
    """Raises :class:`ConfigError` for what is neither an address nor a network, or is everybody."""
    try:
        network = ipaddress.ip_network(proxy)
    except ValueError as error:
        raise ConfigError(
            f"--trusted-proxies is {proxy!r}; it must be an address as 127.0.0.1, or a network as 10.0.0.0/8 ({error})"
        ) from None
    if not network.prefixlen:
        raise ConfigError(f"--trusted-proxies {proxy} is everybody; name the proxy's own address")


@dataclass(frozen=True, kw_only=True)
class CollectInviteConfig(StudyOptions):
    """A link for one person."""

    name: str = option(help="the person's name; inviting the same name again ends the earlier link", group="invitation")
    lead: bool = option(False, "the person also sees progress, agreement and all votes", group="invitation")
    days: float = option(30.0, "days that the link works", group="invitation", above=0)
    revoke: bool = option(False, "end the person's link and sessions instead; votes stay", group="invitation")
    url: str = option("http://127.0.0.1:8700", "address of the server, which the link begins with", group="invitation")

    def __post_init__(self) -> None:
        check_all(self)
        if self.revoke and self.lead:
            raise ConfigError("--revoke ends an invitation, and --lead makes one: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class CollectStatsConfig(StudyOptions):
    """Progress and agreement."""

    json: bool = option(False, "print one JSON document", group="output")

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class CollectExportConfig(StudyOptions):
    """Votes as rows to train on."""

    output: str = option(help="file to write: .jsonl or .parquet", group="output")
    eval_output: str | None = option(None, "file for the prompts that --eval-fraction holds out", group="output")
    overwrite: bool = option(False, "replace files that exist", group="output")
    form: Literal["pairs", "rankings", "soft"] = option(
        "pairs",
        "rows: two responses each, all of an item in order, or pairs weighed by their share of votes",
        group="rows",
    )
    disagreement: Literal["majority", "unanimous", "every"] = option(
        "majority",
        "what counts where people differ: most of them, only what all say, or each vote as a row",
        group="rows",
    )
    ties: Literal["drop", "half", "keep"] = option(
        "drop", "ties: not counted, half a vote for either side, or kept as ties", group="rows"
    )
    all_bad: Literal["drop", "tie"] = option(
        "drop", "votes that no response is good: left out, or counted as ties", group="rows"
    )
    min_votes: int = option(1, "leave out items with fewer votes", group="rows", at_least=1)
    exclude: list[str] | None = option(None, "annotators whose votes are left out, by name or pseudonym", group="rows")
    eval_fraction: float = option(
        0.0,
        "part of the prompts that goes to --eval-output; no prompt is on both sides",
        group="rows",
        at_least=0,
        below=1,
    )
    seed: int = option(0, "another seed holds out other prompts", group="rows")

    def __post_init__(self) -> None:
        check_all(self)
        if (self.eval_output is None) != (self.eval_fraction == 0):
            raise ConfigError("--eval-output and --eval-fraction go together")
        if self.form == "soft" and self.disagreement != "majority":
            raise ConfigError(
                f"--form soft weighs all votes, so --disagreement {self.disagreement} does nothing: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class CollectCheckConfig(StudyOptions):
    """Whether a study is as it was written."""

    def __post_init__(self) -> None:
        check_all(self)


@dataclass(frozen=True, kw_only=True)
class CollectBackupConfig(StudyOptions):
    """A copy, also while the study is served."""

    output: str = option(help="file to write", group="output", positional=True)

    def __post_init__(self) -> None:
        check_all(self)
