"""``prefopt chat``: from its options to a conversation."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

from prefopt.chat.conversation import Chat, VoteFile
from prefopt.chat.input import terminal_reader
from prefopt.config.sample import ChatConfig
from prefopt.core.terminal import Reporter
from prefopt.data.chat.render_options import parse_variables, read_template
from prefopt.generate.sampled_model import SampledModel, renderer_for
from prefopt.generate.sampler import Settings
from prefopt.generate.talker import LocalTalker, RemoteTalker, Talker
from prefopt.model.load import base_and_adapter
from prefopt.model.precision import slow_dtype


def chat(config: ChatConfig) -> None:
    """One session on standard input and output. Raises :class:`prefopt.errors.UserError` before it begins."""
    if config.threads:
        torch.set_num_threads(config.threads)
    reporter = Reporter("plain")
    seed = random.SystemRandom().randrange(2**32) if config.seed is None else config.seed
    talkers: list[Talker] = []
    if config.model is not None:
        talkers.append(_local(config, config.model, config.adapter, seed, reporter))
    if config.against is not None or config.against_adapter is not None:
        name = config.against or (base_and_adapter(config.model)[0] if config.model is not None else None)
        assert name is not None
        talkers.append(_local(config, name, config.against_adapter, seed, reporter))
    if config.url is not None:
        talkers.append(_remote(config))
        reporter.say(f"{talkers[-1].name}: with {_sent(config) or 'its own settings'}")
    _name_apart(talkers)
    votes = VoteFile(Path(config.votes), [talker.name for talker in talkers]) if config.blind else None
    if votes is not None:
        reporter.say(f"they answer blind, as A and B in a random order; votes go to {votes.path}")
    if config.complete:
        reporter.say("what you type is continued as text; an empty line lets it go on")
    reporter.say("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    reader = terminal_reader()
    Chat(talkers, reader, sys.stdout, system=config.system, complete=config.complete, votes=votes, seed=seed).run()


def _local(config: ChatConfig, name: str, adapter: str | None, seed: int, reporter: Reporter) -> LocalTalker:
    model = SampledModel(name, adapter=adapter, device=config.device, dtype=config.dtype)
    template = read_template(config.chat_template) if config.chat_template else None
    renderer = renderer_for(model.tokenizer, template, parse_variables(config.template_variables or ()))
    said = _said(model)
    given = {n: getattr(config, n) for n in ("temperature", "top_p", "top_k") if getattr(config, n) is not None}
    settings = Settings(config.max_new_tokens, model.stops(renderer), seed=seed, **{**said, **given})
    talker = LocalTalker(model, renderer, settings)
    own = "its own chat template" if model.tokenizer.chat_template else "turns as 'User: ...', 'Assistant: ...'"
    form = "text" if config.complete else "--chat-template" if template else own
    shown = ", ".join(f"{n.replace('_', '-')} {v:g}" for n, v in {"temperature": 1.0, **said, **given}.items())
    note = " as its generation_config.json says" if said and not given else ""
    dtype = str(model.dtype).removeprefix("torch.")
    reporter.say(f"{talker.name}: {dtype} on {model.device}, {form}, {shown}{note}")
    for line in (model.note, talker.note, slow_dtype(model.dtype, model.device)):
        if line:
            reporter.say(line)
    return talker


def _said(model: SampledModel) -> dict[str, Any]:
    """How the model's makers say it should be sampled from."""
    if not getattr(model.said, "do_sample", None):
        return {}
    found = {name: getattr(model.said, name, None) for name in ("temperature", "top_p", "top_k")}
    if not found["top_k"]:
        found.pop("top_k")
    return {name: value for name, value in found.items() if value is not None}


def _remote(config: ChatConfig) -> RemoteTalker:
    assert config.url is not None
    options = {"max_tokens": config.max_new_tokens, **_sent(config)}
    return RemoteTalker(config.url, config.url_model, key_variable=config.url_key, options=options)


def _sent(config: ChatConfig) -> dict[str, Any]:
    """What a server is told beside the conversation: what was given, for it knows its models best."""
    names = ("temperature", "top_p", "top_k", "seed")
    return {n: getattr(config, n) for n in names if getattr(config, n) is not None}


def _name_apart(talkers: list[Talker]) -> None:
    """Two models of one name are told apart by a number."""
    names = [talker.name for talker in talkers]
    for n, talker in enumerate(talkers, 1):
        if names.count(talker.name) > 1 or names.count(names[n - 1]) > 1:
            talker.name = f"{names[n - 1]} ({n})"
