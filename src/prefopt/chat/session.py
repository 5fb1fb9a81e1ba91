"""``prefopt chat``: from options to a conversation."""

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
from prefopt.data.chat.pictures import has_processor
from prefopt.data.chat.template import parse_variables, read_template
from prefopt.generate.chat_model import ChatModel, LocalChatModel, RemoteChatModel
from prefopt.generate.model_io import SampledModel, renderer_for
from prefopt.generate.sampler import SamplingParams
from prefopt.model.load import base_and_adapter, load_config
from prefopt.model.pictures import FAMILIES
from prefopt.model.precision import slow_dtype


def chat(config: ChatConfig) -> None:
    """One session on standard input and output. Raises :class:`prefopt.errors.UserError` before it begins."""
    reporter = Reporter("plain")
    seed = random.SystemRandom().randrange(2**32) if config.seed is None else config.seed
    models = open_models(config, seed, reporter)
    votes = VoteFile(Path(config.votes), [model.name for model in models]) if config.blind else None
    if votes is not None:
        reporter.say(f"the models answer blind, as A and B in random order; votes are written to {votes.path}")
    if config.complete:
        reporter.say("what you type is continued as text; an empty line continues it further")
    reporter.say("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for terminals that lack a character
    reader = terminal_reader()
    Chat(models, reader, sys.stdout, system=config.system, complete=config.complete, votes=votes, seed=seed).run()


def open_models(config: ChatConfig, seed: int, reporter: Reporter) -> list[ChatModel]:
    """The one or two models of a chat, with distinct names. Raises :class:`prefopt.errors.UserError`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    models: list[ChatModel] = []
    if config.model is not None:
        models.append(_local(config, config.model, config.adapter, seed, reporter))
    if config.against is not None or config.against_adapter is not None:
        name = config.against or (base_and_adapter(config.model)[0] if config.model is not None else None)
        assert name is not None
        models.append(_local(config, name, config.against_adapter, seed, reporter))
    if config.url is not None:
        sent = _given(config, "temperature", "top_p", "top_k", "seed")  # the server knows its own defaults best
        options = {"max_tokens": config.max_new_tokens, **sent}
        models.append(RemoteChatModel(config.url, config.url_model, key_variable=config.url_key, options=options))
        reporter.say(f"{models[-1].name}: with {sent or 'its own settings'}")
    if len(models) == 2 and models[0].name == models[1].name:
        for n, model in enumerate(models, 1):
            model.name = f"{model.name} ({n})"
    return models


def _local(config: ChatConfig, name: str, adapter: str | None, seed: int, reporter: Reporter) -> LocalChatModel:
    model = SampledModel(name, adapter=adapter, quantise=config.quantise, device=config.device, dtype=config.dtype)
    model.pictures = has_processor(model.source) and load_config(model.source).model_type in FAMILIES
    template = read_template(config.chat_template) if config.chat_template else None
    renderer = renderer_for(model.tokenizer, template, parse_variables(config.template_variables or ()))
    recommended = _recommended(model.generation_config)
    given = _given(config, "temperature", "top_p", "top_k")
    sampling = {**recommended, **given}
    sampled: dict[str, Any] = {"seed": seed, "never": model.never_drawn, **sampling}
    params = SamplingParams(config.max_new_tokens, model.stop_ids(renderer), **sampled)
    found = LocalChatModel(model, renderer, params)
    own = "its own chat template" if model.tokenizer.chat_template else "turns as 'User: ...', 'Assistant: ...'"
    form = "text" if config.complete else "--chat-template" if template else own
    shown = ", ".join(f"{n.replace('_', '-')} {v:g}" for n, v in {"temperature": 1.0, **sampling}.items())
    note = " as its generation_config.json says" if recommended and not given else ""
    dtype = str(model.dtype).removeprefix("torch.")
    reporter.say(f"{found.name}: {dtype} on {model.device}, {form}, {shown}{note}")
    for line in (model.note, found.note, slow_dtype(model.dtype, model.device)):
        if line:
            reporter.say(line)
    return found


def _given(config: ChatConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _recommended(generation_config: Any) -> dict[str, Any]:
    """The sampling parameters of a model's generation config."""
    if not getattr(generation_config, "do_sample", None):
        return {}
    found = {name: getattr(generation_config, name, None) for name in ("temperature", "top_p", "top_k")}
    return {name: value for name, value in found.items() if value is not None and not (name == "top_k" and not value)}
