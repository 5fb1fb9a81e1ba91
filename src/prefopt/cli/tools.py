"""Commands that print what a function of the package returns. Each imports what it needs when it is called."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path

from prefopt.api.models import merged, pushed
from prefopt.config import tools
from prefopt.config.compare import CompareConfig
from prefopt.config.export import ExportConfig
from prefopt.config.frontier import FrontierConfig
from prefopt.config.launch import LaunchConfig
from prefopt.config.methods import METHODS
from prefopt.config.reward_bench import RewardBenchConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.scoring import ScorerOptions
from prefopt.config.sweeps import MethodsConfig
from prefopt.core import cache_folder
from prefopt.core.plugins import needing
from prefopt.core.ranks import Ranks, check_ranks
from prefopt.core.terminal import size, tell, tell_json, tell_lines
from prefopt.errors import ConfigError


def cache_list(_: tools.CacheListConfig) -> int:
    from prefopt.data.token_cache import list_tokens
    from prefopt.reference.blocks import list_spaces

    spaces, tokens, samples = list_spaces(), list_tokens(), cache_folder.sample_entries()
    total = size(sum(s.bytes for s in spaces))
    tell(f"{cache_folder.reference_folder()}: {len(spaces)} space{'s' * (len(spaces) != 1)}, {total}")
    for s in spaces:
        scored = ", ".join(str(s.about[key]) for key in ("dtype", "path", "kernel", "device") if key in s.about)
        model = s.about.get("model") or "description unreadable"
        tell(f"{s.id}  {s.responses:>9,} responses  {_size_and_use(s.bytes, s.last_used)}  {model} ({scored})")
    if tokens:
        tell(f"{cache_folder.tokens_folder()}: {len(tokens)} tokenised, {size(sum(t.bytes for t in tokens))}")
    for t in tokens:
        file = t.about.get("file") or "description unreadable"
        tell(f"{t.id}  {t.groups:>9,} groups  {_size_and_use(t.bytes, t.last_used)}  {file}")
    if samples:
        total = size(sum(map(cache_folder.size_of, samples)))
        tell(f"{cache_folder.samples_folder()}: {len(samples)} sets of samples, {total}")
    for folder in samples:
        used = datetime.fromtimestamp(cache_folder.last_used(folder))
        about = _size_and_use(cache_folder.size_of(folder), used)
        tell(f"{folder.name}  {about}  {cache_folder.model_of(folder)}")
    return 0


def _size_and_use(count: int, used: datetime) -> str:
    return f"{size(count):>9}  last used {used.astimezone():%Y-%m-%d %H:%M}"


def cache_verify(config: tools.CacheVerifyConfig) -> int:
    from prefopt.data.token_cache import verify_tokens
    from prefopt.generate.sample_file import verify_samples
    from prefopt.reference.blocks import verify

    problems = verify(repair=config.repair)
    problems += [*verify_tokens(repair=config.repair), *verify_samples(repair=config.repair)]
    for file, what in problems:
        tell(f"{file}: {what}{'; taken out of use' if config.repair else ''}")
    if not problems:
        tell("every file is intact")
    elif not config.repair:
        tell(f"{len(problems)} damaged; prefopt cache verify --repair takes them out of use")
    return 1 if problems and not config.repair else 0


def cache_clear(config: tools.CacheClearConfig) -> int:
    tell(f"{size(cache_folder.clear(ids=config.space, older_than_days=config.older_than))} freed")
    return 0


def merge(config: tools.MergeConfig) -> int:
    tell_lines(merged(config).lines())
    return 0


def export(config: ExportConfig) -> int:
    from prefopt.export.run import run

    tell_lines(run(config).lines())
    return 0


def push(config: tools.PushConfig) -> int:
    address = pushed(config)
    tell("nothing was sent" if address is None else f"sent: {address}")
    return 0


def launch(config: LaunchConfig) -> int:
    from prefopt.cli import values_of
    from prefopt.parallel.launch import job_file, on_this_machine, run_here, threads_each

    name, *words = config.command
    if name not in METHODS:
        raise ConfigError(f"prefopt {name} runs in one process; launch starts {', '.join(METHODS)}")
    values, file, given, _ = values_of(name, words)
    run = METHODS[name].config.from_dict(values, file, given)  # refused here, and not by every process of a job
    gpus = config.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
        if not gpus:
            raise ConfigError("this machine has no GPU that torch can use; --gpus N starts N processes on its CPU")
    check_ranks(run, name, Ranks(size=config.nodes * gpus, local_size=gpus))
    if config.manager != "here":
        tell(job_file(config), end="")
        return 0
    command = on_this_machine(config)
    if config.dry_run:
        tell(shlex.join(command))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(gpus)))
    sys.stdout.flush()
    return run_here(command)


def env(config: tools.EnvConfig) -> int:
    from prefopt.model.environment import environment, in_words

    found = environment()
    if config.json:
        tell_json(found)
    else:
        tell_lines(in_words(found))
    return 0


def runs(config: tools.RunsConfig) -> int:
    from prefopt.runs.listing import show_runs

    folders = config.folder or ["."]
    tell_lines(show_runs(folders, as_json=config.json, as_csv=config.csv, sort=config.sort))
    return 0


def plot(config: tools.PlotConfig) -> int:
    from prefopt.runs.plot import plot_runs
    from prefopt.runs.table import runs_of

    runs = [run for folder in config.run for run in runs_of(folder)]
    plot_runs(runs, config.output, metrics=config.metrics, x=config.x)
    tell(f"{config.output}: {len(runs)} run{'s' * (len(runs) != 1)}")
    return 0


def report(config: tools.ReportConfig) -> int:
    from prefopt.runs.table import runs_of

    if not config.run and not config.comparisons:
        raise ConfigError("there is nothing to report: name output folders, or --comparisons")
    for name in config.run or ():
        if not (Path(name).is_file() or any(Path(name).glob("*.json"))):
            runs_of(name)  # refuses it, before torch is imported
    from prefopt.sweeps.report import write_report

    tell(f"written: {write_report(config)}")
    return 0


def frontier(config: FrontierConfig) -> None:
    from prefopt.runs.plot import require_matplotlib
    from prefopt.sweeps.frontier import run
    from prefopt.sweeps.report import lines, plot_frontier

    require_matplotlib()
    folder = Path(config.output)
    sweep = run(config)
    plot_frontier(sweep, folder / "frontier.png", folder / "frontier.svg")
    tell_lines(lines(sweep))
    tell(f"\nwritten: {folder / 'frontier.json'}, {folder / 'frontier.png'}, {folder / 'frontier.svg'}")


def methods(config: MethodsConfig) -> None:
    from prefopt.sweeps.methods import markdown, run

    tell_lines(markdown(run(config)))
    folder = Path(config.output)
    tell(f"\nwritten: {folder / 'methods.json'}, {folder / 'methods.md'}")


def sample(config: SampleConfig) -> int:
    from prefopt.methods.sample import run

    if config.output is None:
        raise ConfigError("--output is missing: file to write, JSON lines")
    run(config)
    return 0


def score(config: tools.ScoreConfig) -> int:
    from prefopt.evaluate.score import run

    _tell_adapter(config)
    tell_lines(run(config).lines())
    return 0


def _tell_adapter(config: ScorerOptions) -> None:
    """Say what is scored where an adapter is named in the place of a model."""
    if config.model is None:
        return
    from prefopt.model.load import base_and_adapter
    from prefopt.model.quantised import chosen
    from prefopt.reference.identity import adapter_line

    quantise = chosen(config.quantise, base_and_adapter(config.model, config.adapter)[1])
    if line := adapter_line(config.model, config.adapter, quantise):
        tell(line)


def reward_bench(config: RewardBenchConfig) -> int:
    from prefopt.evaluate.reward_bench import run
    from prefopt.reports.bench import write_page
    from prefopt.runs.plot import require_matplotlib

    if config.html is not None:
        require_matplotlib()
    if not config.json:
        _tell_adapter(config)
    report = run(config)
    page = write_page(report, config.html) if config.html is not None else None
    if config.json:
        tell_json(report.to_dict(with_scores=False))
        return 0
    tell_lines(report.lines())
    for written in filter(None, (config.output, page)):
        tell(f"written: {written}")
    return 0


def data_layouts(config: tools.DataLayoutsConfig) -> int:
    from prefopt.data.layouts import describe_layout, list_layouts, named_layout

    tell(list_layouts() if config.name is None else describe_layout(named_layout(config.name)))
    return 0


def data_check(config: tools.DataCheckConfig) -> int:
    from prefopt.data.audit import run_check

    if config.model is None:  # without torch
        return run_check(config)
    from prefopt.model.load import context_of
    from prefopt.reference.identity import adapter_line

    if not config.json and (line := adapter_line(config.model)):
        tell(line)
    return run_check(config, context_of(config.model))


def compare(config: CompareConfig) -> None:
    from prefopt.evaluate.compare import run

    result = run(config)
    if config.json:
        tell_json(result.to_dict())
    else:
        tell_lines(result.lines())


def losses(config: tools.LossesConfig) -> int:
    from prefopt.losses.parse import describe_loss, list_losses

    tell(list_losses() if config.name is None else describe_loss(config.name))
    return 0


def ui(config: tools.UiConfig) -> int:
    with needing("collect", "prefopt ui"):
        from prefopt.ui.serve import serve
    serve(config)
    return 0


def demo(config: tools.DemoConfig) -> int:
    from prefopt.demo.run import run_demo

    run_demo(config.output, config.seed)
    return 0
