"""The small commands: each imports what it needs when it is called, so that light ones start at once."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from prefopt.config.compare import CompareConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.sweeps import FrontierConfig, MethodsConfig
from prefopt.config.tools import (
    CacheClearConfig,
    CacheListConfig,
    CacheVerifyConfig,
    DataCheckConfig,
    DataLayoutsConfig,
    DemoConfig,
    EnvConfig,
    LossesConfig,
    MergeConfig,
    PlotConfig,
    PushConfig,
    ReportConfig,
    RunsConfig,
    ScoreConfig,
)
from prefopt.core.cache_folder import (
    clear,
    last_used,
    model_of,
    reference_folder,
    sample_entries,
    samples_folder,
    size_of,
    tokens_folder,
)
from prefopt.core.terminal import size, tell, tell_json, tell_lines
from prefopt.errors import ConfigError


def list_cache(_: CacheListConfig) -> int:
    from prefopt.data.token_cache import list_tokens
    from prefopt.reference.blocks import list_spaces

    spaces = list_spaces()
    tell(f"{reference_folder()}: {len(spaces)} space{'s' * (len(spaces) != 1)}, {size(sum(s.bytes for s in spaces))}")
    for s in spaces:
        scored = ", ".join(str(s.about[key]) for key in ("dtype", "path", "kernel", "device") if key in s.about)
        used = s.last_used.astimezone().strftime("%Y-%m-%d %H:%M")
        model = s.about.get("model") or "description unreadable"
        tell(f"{s.id}  {s.responses:>9,} responses  {size(s.bytes):>9}  last used {used}  {model} ({scored})")
    tokens = list_tokens()
    if tokens:
        tell(f"{tokens_folder()}: {len(tokens)} tokenised, {size(sum(t.bytes for t in tokens))}")
    for t in tokens:
        used = t.last_used.astimezone().strftime("%Y-%m-%d %H:%M")
        file = t.about.get("file") or "description unreadable"
        tell(f"{t.id}  {t.groups:>9,} groups  {size(t.bytes):>9}  last used {used}  {file}")
    samples = sample_entries()
    if samples:
        tell(f"{samples_folder()}: {len(samples)} sets of samples, {size(sum(map(size_of, samples)))}")
    for folder in samples:
        used = datetime.fromtimestamp(last_used(folder)).strftime("%Y-%m-%d %H:%M")
        tell(f"{folder.name}  {size(size_of(folder)):>9}  last used {used}  {model_of(folder)}")
    return 0


def verify_cache(config: CacheVerifyConfig) -> int:
    from prefopt.data.token_cache import verify_tokens
    from prefopt.generate.sample_file import verify_samples
    from prefopt.reference.blocks import verify

    problems = verify(repair=config.repair)
    problems += [*verify_tokens(repair=config.repair), *verify_samples(repair=config.repair)]
    for file, what in problems:
        tell(f"{file}: {what}{'; taken out of use' if config.repair else ''}")
    if not problems:
        tell("every file is what was written")
    elif not config.repair:
        tell(f"{len(problems)} damaged; prefopt cache verify --repair takes them out of use")
    return 1 if problems and not config.repair else 0


def clear_cache(config: CacheClearConfig) -> int:
    freed = clear(ids=config.space, older_than_days=config.older_than)
    tell(f"{size(freed)} freed")
    return 0


def merge_model(config: MergeConfig) -> int:
    from prefopt.model.merge import merge_adapter
    from prefopt.model.precision import DTYPES, resolve_device

    done = merge_adapter(
        config.adapter,
        config.output,
        model=config.model,
        dtype=DTYPES[config.dtype],
        device=resolve_device(config.device),
    )
    tell_lines(done.in_words())
    return 0


def push_model(config: PushConfig) -> int:
    from prefopt.model.push import confirmed, plan_upload, push

    planned = plan_upload(config.folder, run=config.with_run, checkpoints=config.with_checkpoints)
    tell_lines(planned.in_words(config.repo, config.private))  # input() flushes it
    if not confirmed(config.yes):
        tell("nothing was sent")
        return 0
    tell(f"sent: {push(planned, config.repo, private=config.private)}")
    return 0


def show_environment(config: EnvConfig) -> int:
    from prefopt.model.environment import environment, in_words

    found = environment()
    if config.json:
        tell_json(found)
    else:
        tell_lines(in_words(found))
    return 0


def list_runs(config: RunsConfig) -> int:
    from prefopt.runs.table import show_runs

    tell_lines(show_runs(config.folder or ["."], as_json=config.json))
    return 0


def draw_runs(config: PlotConfig) -> int:
    from prefopt.runs.plot import plot_runs  # listing runs needs neither torch nor matplotlib
    from prefopt.runs.table import runs_of

    runs = [run for folder in config.run for run in runs_of(folder)]
    plot_runs(runs, config.output, metrics=config.metrics, x=config.x)
    tell(f"{config.output}: {len(runs)} run{'s' * (len(runs) != 1)}")
    return 0


def report_runs(config: ReportConfig) -> int:
    """Draws with matplotlib, as the figures of ``prefopt plot``."""
    from prefopt.reports.page import write_report

    if not config.run and not config.comparisons:
        raise ConfigError("there is nothing to report: name output folders, or --comparisons")
    tell(f"written: {write_report(config)}")
    return 0


def show_frontier(config: FrontierConfig) -> None:
    from prefopt.runs.plot import require_matplotlib
    from prefopt.sweeps.frontier import run
    from prefopt.sweeps.show import lines, plot_frontier

    require_matplotlib()
    folder = Path(config.output)
    sweep = run(config)
    plot_frontier(sweep, folder / "frontier.png", folder / "frontier.svg")
    tell_lines(lines(sweep))
    tell(f"\nwritten: {folder / 'frontier.json'}, {folder / 'frontier.png'}, {folder / 'frontier.svg'}")


def show_methods(config: MethodsConfig) -> None:
    from prefopt.sweeps.methods import run
    from prefopt.sweeps.methods_table import markdown

    tell_lines(markdown(run(config)))
    folder = Path(config.output)
    tell(f"\nwritten: {folder / 'methods.json'}, {folder / 'methods.md'}")


def sample_to_file(config: SampleConfig) -> int:
    """A program has nowhere else to put samples; the Python function gives them back."""
    from prefopt.methods.sample import run

    if config.output is None:
        raise ConfigError("--output is missing: file to write, JSON lines")
    run(config)
    return 0


def score_file(config: ScoreConfig) -> int:
    from prefopt.evaluate.score import run

    if config.model is not None:
        from prefopt.reference.identity import adapter_line  # a rule needs no torch

        if line := adapter_line(config.model):
            tell(line)
    tell_lines(run(config).lines())
    return 0


def show_layouts(config: DataLayoutsConfig) -> int:
    from prefopt.data.layouts import describe_layout, list_layouts, named_layout

    tell(list_layouts() if config.name is None else describe_layout(named_layout(config.name)))
    return 0


def check_data(config: DataCheckConfig) -> int:
    from prefopt.data.check.report import run_check

    if config.model is None:  # seconds faster, for torch is not imported
        return run_check(config)
    from prefopt.model.load import context_of
    from prefopt.reference.identity import adapter_line

    if not config.json and (line := adapter_line(config.model)):
        tell(line)
    return run_check(config, context_of(config.model))


def compare_models(config: CompareConfig) -> None:
    from prefopt.evaluate.compare import run

    result = run(config)
    if config.json:
        tell_json(result.to_dict())
    else:
        tell_lines(result.lines())


def show_losses(config: LossesConfig) -> int:
    from prefopt.losses.parse import describe_loss, list_losses

    tell(list_losses() if config.name is None else describe_loss(config.name))
    return 0


def show_demo(config: DemoConfig) -> int:
    """The demonstration prints as it goes."""
    from prefopt.demo.run import run_demo

    run_demo(config.output, config.seed)
    return 0
