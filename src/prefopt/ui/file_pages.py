"""Pages about files: samples side by side, the audit of data, reports, and studies of people's votes."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from prefopt.config.tools import DataCheckConfig
from prefopt.core.options import options
from prefopt.core.words import from_words
from prefopt.errors import StudyError, UserError
from prefopt.studies.served import address_of
from prefopt.studies.study import Study
from prefopt.studies.summary import summarise
from prefopt.ui.jobs import RunJob
from prefopt.ui.runs import files_below
from prefopt.ui.samples import PAGE, readable
from prefopt.ui.site import Workspace, redirect, value_of
from prefopt.web.security import Refusal

OF_AUDIT = ("data", "eval_data", "model", "want", "format", "max_length", "show")
"""Options of ``prefopt data check`` on the page."""
EXAMPLES = 20
FOREIGN = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; base-uri 'none'; form-action 'none'"
"""The policy of reports: they have no scripts, and are shown as from a site of their own."""


class FilePages:
    """Handlers by path."""

    def __init__(self, site: Workspace) -> None:
        self.site = site
        self.get = {"/samples": self.samples, "/data": self.data, "/more": self.more, "/report": self.report}
        self.post = {"/data": self.check, "/serve": self.serve}

    def samples(self, request: Request) -> Response:
        """Rows of one or two files, those that contain what is searched for."""
        query, known = request.query_params, self.site.samples.files()
        names = list(dict.fromkeys(n for n in query.getlist("file") if n))[:2]
        start = query.get("start", "0")
        words = query.get("q", "")[:1000]
        page, problem = readable(self.site.samples, names, words, int(start) if start.isdecimal() else 0)

        def link(at: int) -> str:
            return "/samples?" + urlencode([*(("file", n) for n in names), ("q", words), ("start", at)])

        before = link(page.start - PAGE) if page and page.start else ""
        after = link(page.start + PAGE) if page and page.start + PAGE < page.of else ""
        more: dict[str, Any] = {"words": words, "before": before, "after": after, "problem": problem}
        return self.site.render(request, "samples.html", files=known, names=names, page=page, **more)

    # -- data --------------------------------------------------------------------------------------------------

    def data(self, request: Request) -> Response:
        """The form of an audit, and what the last one found."""
        job = self.site.jobs.get(request.query_params.get("job", ""))
        if job is None or job.kind != "data check":
            return self._audit(request, {"show": str(EXAMPLES)})
        return self._audit(request, job.about["texts"], job=job)

    def check(self, request: Request) -> Response:
        """Start an audit."""
        form = self.site.form(request)
        texts = {name: value_of(form, name).strip() for name in OF_AUDIT}
        known = {o.name: o for o in options(DataCheckConfig)}
        words = ["data", "check", "--json"]
        try:
            values = {}
            for name, text in texts.items():
                if text:
                    many = text.split("\n") if list[str] in known[name].kinds else [text]
                    many = [line.strip() for line in many if line.strip()]
                    values[name] = from_words(known[name], many)
                    words += [known[name].flag, *many]
            DataCheckConfig.from_dict(values)
        except UserError as error:
            return self._audit(request, texts, problem=str(error), status=422)
        job = self.site.jobs.start("data check", words, apart=True, about={"texts": texts})
        return redirect(f"/data?{urlencode({'job': job.id})}")

    def _audit(
        self,
        request: Request,
        texts: dict[str, str],
        *,
        job: RunJob | None = None,
        status: int = 200,
        problem: str = "",
    ) -> Response:
        found: dict[str, Any] | None = None
        state = None if job is None else self.site.jobs.state(job)
        if job is not None and state is not None and state["state"] == "ended":
            try:
                found = json.loads(self.site.jobs.output(job))
            except ValueError:  # it failed, and its log says why
                problem = self.site.jobs.log(job, 0)[1].strip()
        known = {o.name: o for o in options(DataCheckConfig)}
        values: dict[str, Any] = {"texts": texts, "options": known, "found": found, "job": state, "problem": problem}
        waiting = state is not None and state["state"] != "ended"
        topics = urlencode({"job": job.id}) if job is not None and waiting else ""
        return self.site.render(request, "data.html", status, **values, waiting=waiting, topics=topics)

    # -- reports and studies -----------------------------------------------------------------------------------

    def more(self, request: Request) -> Response:
        """Reports, studies, and the commands that were started here."""
        base = self.site.base
        reports = [str(path.relative_to(base)) for path in files_below(base, [".html"])]
        jobs = [self.site.jobs.state(job) | {"kind": job.kind, "started": job.started} for job in self.site.jobs.all()]
        return self.site.render(request, "more.html", reports=reports, studies=self._studies(), jobs=jobs)

    def _studies(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in files_below(self.site.base, [".db"]):
            try:
                with Study(path, read_only=True) as study:
                    s = summarise(study, resamples=0)
            except StudyError as error:
                found.append({"name": str(path.relative_to(self.site.base)), "problem": str(error)})
                continue
            about: dict[str, Any] = {"name": str(path.relative_to(self.site.base)), "title": s.title, "problem": ""}
            about["address"] = address_of(path) or ""
            found.append(about | {"items": s.items, "complete": s.complete, "votes": s.votes})
        return found

    def report(self, request: Request) -> Response:
        """An HTML file of the folder, without any right of this page."""
        name = request.query_params.get("name", "")
        for path in files_below(self.site.base, [".html"]):
            if str(path.relative_to(self.site.base)) == name:
                return Response(path.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": FOREIGN})
        raise Refusal(404, "not found")

    def serve(self, request: Request) -> Response:
        """Serve a study: the link of the lead is in the log."""
        name = value_of(self.site.form(request), "study")
        if name not in [str(path.relative_to(self.site.base)) for path in files_below(self.site.base, [".db"])]:
            raise Refusal(404, "not found")
        job = self.site.jobs.start("collect serve", ["collect", "serve", str(self.site.base / name), "--port", "0"])
        return redirect(f"/job?{urlencode({'id': job.id})}")
