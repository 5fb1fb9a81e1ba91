"""What ``prefopt collect`` reads: create, serve, summarise and export a study.

>>> CollectServeConfig(study="s.db").port
8700
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from prefopt.config.data import RowOptions, SamplingOptions
from prefopt.config.training import MachineOptions
from prefopt.core.options import Config, flag, option
from prefopt.errors import ConfigError

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Config):
    """The study of a command."""

    study: str = option(help="study: one SQLite file", group="study", positional=True)


@dataclass(frozen=True, kw_only=True)
class ImportOptions(RowOptions):
    """Items to import into a study."""

    responses: list[str] | None = option(
        None,
        "files with responses, in any layout; responses to one prompt are compared, also those of different files",
        group="items",
    )
    gold: list[str] | None = option(None, "files with known preferences, mixed in to measure the quality of annotators")
    for_everyone: float = option(
        0.0,
        "fraction of the new items that every annotator judges, to measure agreement; a column overlap of"
        " --responses gives the annotators of its item (a number, or all)",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class CollectNewConfig(MachineOptions, SamplingOptions, ImportOptions, StudyOptions):
    """A new study. Construction raises ``ConfigError``."""

    prompts: list[str] | None = option(
        None, "files, folders, globs or Hub data sets with prompts for --model; or .txt, one per line", group="items"
    )
    model: list[str] | None = option(
        None, "models to sample responses from, folders or Hub names; of several, each gives the same number"
    )
    num: int = option(2, "responses per prompt, from all models together", at_least=2, at_most=9)
    top_p: float = option(
        1.0,
        "nucleus sampling: from the most likely tokens with this total probability",
        group="sampling",
        above=0,
        at_most=1,
    )

    title: str | None = option(None, "title of the page", group="study", default_text="the file's name")
    instructions: str | None = option(None, "file with instructions for annotators, in Markdown")
    tags: list[str] | None = option(None, "tags to choose from, at most one per vote")
    overlap: int = option(1, "annotators per item", at_least=1)
    gold_every: int = option(10, "show one gold item in this many items, while there are any", at_least=2)

    def check(self) -> None:
        if self.prompts is None and self.responses is None and self.gold is None:
            raise ConfigError(
                "a study needs items: give --prompts with --model, or --responses with files that have them"
            )
        if (self.prompts is None) != (self.model is None):
            raise ConfigError("--prompts and --model go together: the model answers the prompts")
        if self.model is not None and self.num % len(self.model):
            raise ConfigError(f"--num {self.num} is not divisible by the {len(self.model)} models: make it a multiple")
        if self.temperature == 0 and self.model is not None and self.num > len(self.model):
            raise ConfigError("--temperature 0 draws the same response every time: raise it")


@dataclass(frozen=True, kw_only=True)
class CollectImportConfig(ImportOptions, StudyOptions):
    """More items for a study. Construction raises ``ConfigError``."""

    def check(self) -> None:
        if self.responses is None and self.gold is None:
            raise ConfigError("nothing to import: give --responses, or --gold")


@dataclass(frozen=True, kw_only=True)
class CollectServeConfig(StudyOptions):
    """The server of a study. Construction raises ``ConfigError``."""

    host: str = option("127.0.0.1", "address to listen on; other than localhost needs invitations", group="server")
    port: int = option(8700, "port to listen on; 0 takes a free one", at_least=0, at_most=65535)
    allowed_hosts: list[str] | None = option(
        None, "host names that the server accepts", default_text="--host and localhost, or the name in --url"
    )
    url: str | None = option(None, "public address of the TLS proxy in front of it, such as https://votes.example.org")
    certfile: str | None = option(
        None, "TLS certificate (PEM, with its chain) to serve https", default_text="none: http"
    )
    keyfile: str | None = option(None, "private key of --certfile", default_text="the one in --certfile")
    trusted_proxies: list[str] | None = option(
        None,
        "addresses or networks of proxies whose X-Forwarded-For is trusted, so that rate limits count each client's"
        " address",
    )

    def check(self) -> None:
        if self.keyfile is not None and self.certfile is None:
            raise ConfigError("--keyfile is the key of a certificate: give that with --certfile")
        if self.certfile is not None and (self.url or "").startswith("http:"):
            raise ConfigError(f"--url {self.url} is not what --certfile serves: make it https")
        if self.url is not None and not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:\d+)?/?", self.url):
            raise ConfigError(f"--url is {self.url!r}; it must be scheme and name alone, as https://votes.example.org")
        for proxy in self.trusted_proxies or ():
            _check_proxy(proxy)
        if self.host in EVERYWHERE and self.url is None and self.allowed_hosts is None:
            raise ConfigError(
                f"--host {self.host} is not a host name: give the names of the server with --allowed-hosts, or --url"
            )


def _check_proxy(proxy: str) -> None:
    """Refuse what is no address or network, or covers every address. Raises ``ConfigError``."""
    try:
        network = ipaddress.ip_network(proxy)
    except ValueError as error:
        raise ConfigError(
            f"--trusted-proxies is {proxy!r}; it must be an address as 127.0.0.1, or a network as 10.0.0.0/8 ({error})"
        ) from None
    if not network.prefixlen:
        raise ConfigError(f"--trusted-proxies {proxy} covers every address; give the proxy's own")


@dataclass(frozen=True, kw_only=True)
class CollectInviteConfig(StudyOptions):
    """An invitation link for one annotator. Construction raises ``ConfigError``."""

    name: str = option(
        help="name of the annotator; inviting the same name again revokes the earlier link",
        group="invitation",
        positional=True,
    )
    lead: bool = option(False, "the annotator also sees progress, agreement and all votes")
    days: float = option(30.0, "days that the link is valid", above=0)
    revoke: bool = option(False, "revoke the annotator's link and sessions instead; votes are kept")
    url: str | None = option(
        None, "address of the server, for the link", default_text="where the study is served, or http://127.0.0.1:8700"
    )

    def check(self) -> None:
        if self.revoke and self.lead:
            raise ConfigError("--revoke ends an invitation and --lead makes one: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class CollectStatsConfig(StudyOptions):
    """Progress and agreement."""

    json: bool = option(False, "print one JSON document", group="output")


@dataclass(frozen=True, kw_only=True)
class CollectExportConfig(StudyOptions):
    """Votes as training data. Construction raises ``ConfigError``."""

    output: str = option(help="file to write: .jsonl or .parquet, for --form votes also .csv", group="output")
    eval_output: str | None = option(None, "file for the prompts of --eval-fraction")
    overwrite: bool = option(False, "replace files that exist")
    form: Literal["pairs", "rankings", "soft", "votes"] = option(
        "pairs",
        "rows: pairs, rankings of all responses to an item, pairs with soft labels, the fraction of votes, or a table"
        " of all votes and skips (.csv too)",
        group="rows",
    )
    disagreement: Literal["majority", "unanimous", "every"] = option(
        "majority", "where annotators disagree: use the majority, only unanimous items, or every vote as a row"
    )
    ties: Literal["drop", "half", "keep"] = option("drop", "ties: dropped, half a vote for each side, or kept as ties")
    all_bad: Literal["drop", "tie"] = option("drop", "votes that all responses are bad: dropped, or counted as ties")
    min_votes: int = option(1, "drop items with fewer votes", at_least=1)
    exclude: list[str] | None = option(None, "annotators to exclude, by name or pseudonym")
    eval_fraction: float = option(
        0.0, "fraction of the prompts to write to --eval-output; no prompt is in both files", at_least=0, below=1
    )
    seed: int = option(0, "seed of the held-out prompts")

    def check(self) -> None:
        if (self.eval_output is None) != (self.eval_fraction == 0):
            raise ConfigError("--eval-output and --eval-fraction go together")
        if self.form == "votes":
            names = ("disagreement", "ties", "all_bad", "min_votes", "eval_fraction")
            if given := [flag(name) for name in names if self.is_given(name)]:
                raise ConfigError(f"--form votes writes every vote as it was given: leave out {' and '.join(given)}")
        if self.form == "soft" and self.disagreement != "majority":
            raise ConfigError(
                f"--form soft uses all votes, so --disagreement {self.disagreement} does nothing: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class CollectCheckConfig(StudyOptions):
    """Check of a study for damage and manipulation."""


@dataclass(frozen=True, kw_only=True)
class CollectBackupConfig(StudyOptions):
    """A copy, safe while the study is served."""

    output: str = option(help="file to write", group="output", positional=True)
