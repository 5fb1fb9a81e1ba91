"""Pages about runs: the table with curves, one run, a new one from a form, and the commands that the page started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from prefopt.core.files import expanded
from prefopt.core.options import options
from prefopt.core.yaml_file import write_document
from prefopt.errors import ConfigError, UserError
from prefopt.runs.diagnose import diagnose
from prefopt.runs.history import History
from prefopt.runs.samples import SAMPLES
from prefopt.runs.settings import set_options, shown
from prefopt.runs.table import summary
from prefopt.ui import form as forms
from prefopt.ui.jobs import RunJob
from prefopt.ui.site import Workspace, redirect, value_of
from prefopt.web.security import Refusal

RESUMABLE = ("interrupted", "failed", "stopped")
PREFIX = "o."
"""Before the names of options in the form."""


class RunPages:
    """Handlers by path."""

    def __init__(self, site: Workspace) -> None:
        self.site = site
        self.get = {"/": self.table, "/run": self.run, "/new": self.new, "/job": self.job}
        self.post = {"/new": self.submit, "/run/stop": self.stop, "/run/resume": self.resume, "/report": self.report}
        self.post["/job/stop"] = self.stop

    def table(self, request: Request) -> Response:
        return self.site.render(request, "runs.html", topics="runs=1")

    # -- one run -----------------------------------------------------------------------------------------------

    def run(self, request: Request) -> Response:
        """A run, or the command that has not made one yet."""
        name = request.query_params.get("name", "")
        run, job = self.site.runs.run(name), self.site.jobs.of_run(name)
        if run is None and job is None:
            raise Refusal(404, "no such run")
        topics = {"runs": "1", "curve": name, **({"job": job.id} if job else {})}
        inside = [other for other in self.site.runs.look() if other.startswith(f"{name}/")]
        return self.site.render(
            request,
            "run.html",
            name=name,
            run=None if run is None else _described(run),
            job=None if job is None else self._shown(job),
            inside=inside,
            resumable=run is not None and run.status in RESUMABLE and run.method in forms.VERBS,
            samples=self._samples_of(name),
            topics=urlencode(topics),
        )

    def _samples_of(self, name: str) -> str:
        path = str(Path(name) / SAMPLES)
        return path if path in self.site.samples.files() else ""

    def _shown(self, job: RunJob) -> dict[str, Any]:
        return self.site.jobs.state(job) | {"kind": job.kind, "report": job.about.get("report", "")}

    def stop(self, request: Request) -> Response:
        """Ask a command that was started here to stop."""
        job = self.site.jobs.get(value_of(self.site.form(request), "job"))
        if job is None:
            raise Refusal(404, "not started here")
        self.site.jobs.stop(job)
        return redirect(_place_of(job))

    def resume(self, request: Request) -> Response:
        """Go on with a stopped run, from its last checkpoint."""
        name = value_of(self.site.form(request), "run")
        run = self.site.runs.run(name)
        if run is None or run.status not in RESUMABLE or run.method not in forms.VERBS:
            raise Refusal(404, "no such run")
        kind = forms.VERBS[run.method]
        known = {o.name for o in options(kind)} - {"resume", "overwrite", "dry_run"}
        values = {n: v for n, v in run.options.items() if n in known and v is not None}
        text = write_document(kind, values | {"output": str(run.folder.resolve())})
        started = self.site.jobs.start(
            "run", [run.method, "--resume"], config=text, run=name, folder=run.working_folder
        )
        return redirect(_place_of(started))

    def report(self, request: Request) -> Response:
        """Write a report of some runs."""
        names = [name for name in self.site.form(request).get("run", ()) if self.site.runs.run(name) is not None]
        if not names:
            raise ConfigError("no run is chosen: tick those to report")
        path = self.site.base / "reports" / f"{time.strftime('%Y-%m-%d-%H%M%S')}.html"
        words = ["report", *(str(self.site.base / name) for name in names), "--output", str(path)]
        about = {"report": str(path.relative_to(self.site.base))}
        return redirect(_place_of(self.site.jobs.start("report", words, about=about)))

    def job(self, request: Request) -> Response:
        """A command that was started here, with its log."""
        job = self.site.jobs.get(request.query_params.get("id", ""))
        if job is None:
            raise Refusal(404, "not started here")
        return self.site.render(request, "job.html", job=self._shown(job), topics=urlencode({"job": job.id}))

    # -- a new run ---------------------------------------------------------------------------------------------

    def new(self, request: Request) -> Response:
        """The form: empty, like a run, or as it was when a dry run was asked for."""
        query = request.query_params
        job = self.site.jobs.get(query.get("job", ""))
        if job is not None and job.kind == "dry run":
            return self._form(request, job.about["verb"], job.about["texts"], job=job)
        verb, texts = query.get("verb", "dpo"), {"output": str(self.site.base / "run-1")}
        number = 1
        while (self.site.base / f"run-{number}").exists() or (self.site.base / f"run-{number}.yaml").exists():
            number += 1
        texts["output"] = str(self.site.base / f"run-{number}")
        if (run := self.site.runs.run(query.get("from", ""))) is not None and run.method in forms.VERBS:
            verb, texts = run.method, texts | forms.texts_of_run(run)
        return self._form(request, verb if verb in forms.VERBS else "dpo", texts)

    def submit(self, request: Request) -> Response:
        """Check the form, then write its file, show a dry run, or start the run."""
        form = self.site.form(request)
        verb, action = value_of(form, "verb"), value_of(form, "action")
        if verb not in forms.VERBS:
            raise Refusal(404, "not found")
        texts = {n.removeprefix(PREFIX): value_of(form, n) for n in form if n.startswith(PREFIX) and value_of(form, n)}
        found = forms.filled(verb, texts, self.site.base)
        if found.config is None:
            return self._form(request, verb, texts, found=found, status=422)
        try:
            if action == "check":
                words, about = [verb, "--dry-run"], {"verb": verb, "texts": texts}
                job = self.site.jobs.start("dry run", words, config=forms.document(found), about=about)
                return redirect(f"/new?{urlencode({'job': job.id})}#check")
            name = str(expanded(found.config.output).resolve().relative_to(self.site.base.resolve()))
            live = self.site.jobs.live(name) is not None
            path = forms.write_file(found, replace=bool(value_of(form, "replace")) and not live)
            if action == "write":
                return self._form(request, verb, texts, found=found, written=str(path))
            return redirect(_place_of(self.site.jobs.start("run", [verb, "--config", str(path)], run=name)))
        except UserError as error:
            return self._form(request, verb, texts, found=found, status=422, problem=str(error))

    def _form(
        self,
        request: Request,
        verb: str,
        texts: dict[str, str],
        *,
        found: forms.Filled | None = None,
        job: RunJob | None = None,
        status: int = 200,
        **more: Any,
    ) -> Response:
        problems = dict(found.problems) if found is not None else {}
        values: dict[str, Any] = {
            "verb": verb,
            "helps": forms.HELPS,
            "groups": forms.groups_of(verb, texts, problems),
            "problems": problems,
            "has_dry_run": "dry_run" in {o.name for o in options(forms.VERBS[verb])},
            "yaml": forms.document(found) if found is not None and found.config is not None else "",
            "job": None if job is None else self._shown(job),
            "topics": urlencode({"job": job.id}) if job is not None else "",
            "written": "",
            "prefix": PREFIX,
        }
        return self.site.render(request, "new.html", status, **(values | more))


def _place_of(job: RunJob) -> str:
    return f"/run?{urlencode({'name': job.run})}" if job.run is not None else f"/job?{urlencode({'id': job.id})}"


def _described(run: History) -> dict[str, Any]:
    found = diagnose(run)
    return {
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "folder": str(run.folder),
        "summary": {n: v for n, v in summary(run).items() if n != "status"},
        "options": {n: shown(v) for n, v in set_options(run).items()},
        "findings": [f.text for f in found if not f.look],
        "warnings": [f.text for f in found if f.look],
    }
