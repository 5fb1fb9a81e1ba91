"""The page of a chat with one or two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from prefopt.config.sample import ChatConfig
from prefopt.core.options import options
from prefopt.core.words import from_words
from prefopt.errors import ConfigError, UserError
from prefopt.ui.site import Form, Workspace, redirect, value_of

OF_CHAT = ("model", "adapter", "against", "against_adapter", "system", "temperature", "top_p", "max_new_tokens", "seed")
"""Options of ``prefopt chat`` on the page."""


class ChatPages:
    """Handlers by path. Those of a script answer in JSON, with the problem if there is one."""

    def __init__(self, site: Workspace) -> None:
        self.site = site
        self.get = {"/chat": self.chat}
        self.post: dict[str, Callable[[Request], Response]] = {"/chat": self.open}
        room = site.room
        for name, action in {
            "say": lambda form: room.say(value_of(form, "text")),
            "retry": lambda _: room.retry(),
            "stop": lambda _: room.stop(),
            "reset": lambda _: room.reset(),
            "close": lambda _: room.close(),
            "save": lambda form: room.save(self._file(form)),
        }.items():
            self.post[f"/chat/{name}"] = self._told(action)

    def chat(self, request: Request) -> Response:
        """The chat, or the form for the models of the runs that the address names."""
        known = self.site.runs.look()
        folders = [str(self.site.base / name) for name in request.query_params.getlist("run") if name in known]
        return self._page(request, dict(zip(("model", "against"), folders, strict=False)))

    def open(self, request: Request) -> Response:
        """Load the models that the form names."""
        form = self.site.form(request)
        texts = {name: value_of(form, name).strip() for name in OF_CHAT}
        known = {o.name: o for o in options(ChatConfig)}
        try:
            values: dict[str, Any] = {n: from_words(known[n], [text]) for n, text in texts.items() if text}
            self.site.room.open(ChatConfig.from_dict(values))
        except UserError as error:
            return self._page(request, texts, problem=str(error), status=422)
        return redirect("/chat")

    def _page(self, request: Request, texts: dict[str, str], *, problem: str = "", status: int = 200) -> Response:
        runs = self.site.runs.look()
        models = [str(self.site.base / name) for name, f in runs.items() if f.run.status == "finished"]
        values: dict[str, Any] = {"texts": dict.fromkeys(OF_CHAT, "") | texts, "models": models, "problem": problem}
        known = {o.name: o for o in options(ChatConfig)}
        state = self.site.room.state
        return self.site.render(request, "chat.html", status, **values, options=known, state=state, topics="chat=1")

    def _file(self, form: Form) -> Path:
        name = value_of(form, "file").strip()
        path = (self.site.base / name).resolve()
        if not name or not path.is_relative_to(self.site.base.resolve()):
            raise ConfigError(f"name a file below {self.site.base}")
        return path

    def _told(self, action: Callable[[Form], object]) -> Callable[[Request], Response]:
        def handler(request: Request) -> Response:
            form = self.site.form(request)
            try:
                action(form)
            except UserError as error:
                return JSONResponse({"problem": str(error)}, 422)
            return JSONResponse({"problem": ""})

        return handler
