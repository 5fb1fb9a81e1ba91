"""``prefopt methods``: SFT and DPO against SFT, reward model and PPO, over seeds and learning rates. The result of each
policy is kept in ``outcome.json`` of its folder, so that a stopped sweep continues where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.methods import MethodConfig
from prefopt.config.sweeps import STAGES, MethodsConfig
from prefopt.core.files import output_errors, read_json, replace_file, typed, write_json
from prefopt.core.shown import ShownLines
from prefopt.core.terminal import Reporter, duration, size
from prefopt.errors import Diverged
from prefopt.evaluate.samples import perplexity
from prefopt.generate.model_io import SampledModel
from prefopt.methods.rlhf import started_again, status_of
from prefopt.model.costs import combine_costs
from prefopt.model.precision import scoring_dtype
from prefopt.runs.history import read_record
from prefopt.sweeps.data import Measure, prepare_data, true_reward
from prefopt.sweeps.points import parse_result
from prefopt.sweeps.train import model_of, take_folder, train_alone, train_once

MAY_GROW = {"seeds", "rate_factors", "progress", "output", "threads"}
"""Options that may change when a sweep is continued: they add policies, or change no result."""
VERSION = 1
FILE = "methods.json"
NAMES = {"dpo": "SFT, DPO", "ppo": "SFT, reward model, PPO"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy: the stages of ``method``, trained with ``seed`` at ``factor`` times the learning rate.

    ``costs`` are those of all its stages (:class:`prefopt.model.costs.Costs`, ``seconds``, ``peak_memory_bytes``).
    Results are as in :class:`Measurement`, with ``kl`` to the fine-tuned start, and ``perplexity`` of the reference
    text; a diverged training has none. ``isolated``: each stage ran in its own process, which had this peak memory.
    """

    method: str
    seed: int
    factor: float
    costs: dict[str, float] = field(default_factory=dict)
    reward: float | None = None
    interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_se: float | None = None
    length: float | None = None
    perplexity: float | None = None
    diverged: str | None = None
    folder: str = ""
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """A model that methods start from: the one given, and its fine-tuned version for each seed."""

    name: str
    reward: float
    perplexity: float | None


@dataclass(frozen=True, slots=True, repr=False)
class MethodsTable(ShownLines):
    """All results of ``prefopt methods``."""

    model: str
    reward: str
    prompts: int
    samples: int
    responses: int
    made: str
    finished: bool
    starts: tuple[Start, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def lines(self) -> Iterator[str]:
        """The table of ``methods.md``."""
        yield f"{len(self.outcomes)} policies of {self.model}" + ("" if self.finished else ", and more are to come")
        yield from markdown(self)

    def write(self, folder: Path) -> Path:
        """Write ``methods.json`` in ``folder``. Raises :class:`prefopt.errors.RunError`."""
        write_json(folder / FILE, {"version": VERSION, **asdict(self)})
        return folder / FILE


def read_table(path: Path) -> MethodsTable:
    """Read what :meth:`MethodsTable.write` wrote. Raises :class:`RunError` if absent or of another version."""
    return read_json(path / FILE if path.is_dir() else path, _table, "run prefopt methods again")


def _table(found: dict[str, Any]) -> MethodsTable:
    if (version := found.pop("version")) != VERSION:
        raise ValueError(f"it is of version {version}, and this prefopt reads version {VERSION}")
    starts = tuple(typed(Start, s) for s in found.pop("starts"))
    isolated = found.pop("isolated", False)  # of all policies, in files of first versions
    outcomes = tuple(parse_result(Outcome, {"isolated": isolated, **o}) for o in found.pop("outcomes"))
    return typed(MethodsTable, {**found, "starts": starts, "outcomes": outcomes})


def run(config: MethodsConfig) -> MethodsTable:
    """Train and measure all policies that are not done yet; ``methods.json`` is written after each. Raises
    :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop; the same command continues.
    A diverged training is recorded as such."""
    with started_again():
        return _MethodsSweep(config).run()


class _MethodsSweep:
    def __init__(self, config: MethodsConfig) -> None:
        self.config, self.reporter = config, Reporter(config.progress)
        self.folder = Path(config.output)
        self.starts: list[Start] = []
        self.outcomes: list[Outcome] = []

    def run(self) -> MethodsTable:
        config = self.config
        take_folder(config, MAY_GROW)
        reference = SampledModel(config.model, device=config.device, dtype=scoring_dtype(config.dtype))
        self.data = prepare_data(config, reference, self.reporter)
        self.reward = true_reward(config)
        self.starts.append(self._start("as given", config.model, reference, self.folder / "start"))
        reference.release()
        for seed in range(config.seed, config.seed + config.seeds):
            self._seed(seed)
        return self._write(finished=True)

    def _seed(self, seed: int) -> None:
        """Fine-tune once for both methods, then train each at every learning rate."""
        config = self.config
        self._train("sft", seed, 1.0)
        tuned = str(config.folder("sft", seed))
        reference = SampledModel(tuned, device=config.device, dtype=scoring_dtype(config.dtype))
        self.starts.append(self._start(f"fine-tuned, seed {seed}", tuned, reference, Path(tuned)))
        measure = Measure(config, self.data.held_out, reference, self.reward)
        for method in STAGES:
            for factor in config.factors:
                file = config.folder(method, seed, factor) / "outcome.json"
                if not file.exists():
                    write_json(file, asdict(self._outcome(method, seed, factor, measure)))
                outcome = read_json(file, lambda found: parse_result(Outcome, found), "remove it to measure again")
                self.outcomes.append(outcome)
                self._write(finished=False)
        reference.release()

    # -- one policy --------------------------------------------------------------------------------------------

    def _outcome(self, method: str, seed: int, factor: float, measure: Measure) -> Outcome:
        config = self.config
        folder = config.folder(method, seed, factor)
        found = Outcome(method, seed, factor, folder=str(folder.relative_to(self.folder)), isolated=config.isolate)
        try:
            configs = [self._train(stage, seed, factor) for stage in STAGES[method]]
        except Diverged as error:
            self.reporter.say(f"{method}, seed {seed}, {factor:g} times the rate, diverged: {error.reason}")
            return replace(found, diverged=error.reason)
        policy = model_of(configs[-1])
        measured = measure(file=folder / "samples.jsonl", **policy)
        remedy = f"remove {folder} to train again"
        costs = [read_record(Path(stage.output), remedy).get("costs", {}) for stage in configs]
        return replace(
            found,
            costs=combine_costs(costs),
            **measured.means(),
            perplexity=self._perplexity(policy["name"], policy["adapter"]),
        )

    def _train(self, stage: str, seed: int, factor: float) -> MethodConfig:
        """Train a stage, unless it is finished."""
        names: dict[str, Any] = {"data": [str(self.data.preferences)], "prompts": str(self.data.train)}
        config = self.config.stage(stage, seed, factor, **names, each=self.data.each)
        folder = Path(config.output)
        status = status_of(folder)
        if status != "finished":
            rate = f", {factor:g} times the rate" if stage in STAGES else ""
            self.reporter.say(f"{stage}, seed {seed}{rate}: {'continues' if status else 'starts'}")
            if self.config.isolate:
                train_alone(config, self.folder / "trainings" / f"{'-'.join(folder.parts[-2:])}.json")
            else:
                train_once(config)
        return config

    def _start(self, name: str, model: str, reference: SampledModel, folder: Path) -> Start:
        """Measure a model that methods start from, once."""
        file = folder / "start.json"
        if not file.exists():
            measure = Measure(self.config, self.data.held_out, reference, self.reward)
            found = measure(model, folder / "samples.jsonl")
            write_json(file, asdict(Start(name, found.reward, self._perplexity(model, None))))
        return read_json(file, lambda found: typed(Start, found), "remove it to measure again")

    def _perplexity(self, name: str, adapter: str | None) -> float | None:
        """Perplexity of the reference text; None without one."""
        config = self.config
        if config.perplexity is None:
            return None
        model = SampledModel(name, adapter=adapter, device=config.device, dtype=scoring_dtype(config.dtype))
        value, cut, _ = perplexity(model, config.perplexity)  # bad rows are refused
        if cut:
            self.reporter.say(f"perplexity: {cut} rows were truncated to the model's context")
        model.release()
        return value

    def _write(self, *, finished: bool) -> MethodsTable:
        config = self.config
        sizes = (config.held_out, config.num, config.responses)
        results = (tuple(self.starts), tuple(self.outcomes))
        found = MethodsTable(config.model, config.reward, *sizes, self.data.made, finished, *results)
        found.write(self.folder)
        path = self.folder / "methods.md"
        with output_errors(path):
            replace_file(path, ("\n".join(markdown(found)) + "\n").encode())
        return found


# -- the table -------------------------------------------------------------------------------------------------


def markdown(table: MethodsTable) -> Iterator[str]:
    """The results as a Markdown table with a column for each method."""
    methods = [method for method in NAMES if any(o.method == method for o in table.outcomes)]
    yield f"| | {' | '.join(NAMES[method] for method in methods)} |"
    yield f"| --- |{' --- |' * len(methods)}"
    columns = [_column(table, [o for o in table.outcomes if o.method == method]) for method in methods]
    for name in columns[0] if columns else ():
        yield f"| {name} | {' | '.join(column[name] for column in columns)} |"
    yield ""
    yield (
        f"True reward `{table.reward}` on {table.prompts} held-out prompts, {table.samples} samples each; KL in nats"
        f" per response to the fine-tuned model; preferences: {table.made}; {table.responses} responses per stage."
        " Costs are averages over policies, all stages together; memory is the largest of any."
    )
    for o in table.outcomes:
        if o.diverged is not None:
            yield f"- {NAMES[o.method]}, seed {o.seed}, {o.factor:g} times the rate, diverged: {o.diverged}"


def _column(table: MethodsTable, outcomes: Sequence[Outcome]) -> dict[str, str]:
    good = [o for o in outcomes if o.diverged is None]
    rewards = np.array([o.reward for o in good], np.float64)

    def mean(name: str) -> float:
        return float(np.mean([o.costs.get(name, 0.0) for o in good])) if good else float("nan")

    def most(name: str) -> float:
        return max((o.costs.get(name, 0.0) for o in good), default=float("nan"))

    apart = all(o.isolated for o in good)
    peak = size(most("peak_memory_bytes")) if apart else "not measured: all trainings in one process"
    cells = {
        "stages": str(len(STAGES[outcomes[0].method])),
        "models in memory at once": f"{most('models'):.0f}, {size(most('model_bytes'))} of weights",
        "forward passes": f"{mean('forward_passes'):,.0f}",
        "tokens trained on": f"{mean('trained_tokens'):,.0f}",
        "tokens scored": f"{mean('scored_tokens'):,.0f}",
        "tokens decoded": f"{mean('decoded_tokens'):,.0f}",
        "tokens generated": f"{mean('generated_tokens'):,.0f}",
        "wall time": duration(mean("seconds")) if good else "",
        "peak memory": peak if good else "",
        "policies": f"{len(outcomes)}, {len(outcomes) - len(good)} diverged",
    }
    if not good:
        return cells | dict.fromkeys(("reward", "spread of rewards", "KL", "perplexity"), "")
    return cells | {
        "reward": f"{rewards.mean():+.3f}, best {rewards.max():+.3f}",
        "spread of rewards": spread(rewards),
        "KL": f"{np.mean([o.kl for o in good]):.2f}",
        "perplexity": _perplexity(table, good),
    }


def spread(rewards: Sequence[float] | np.ndarray) -> str:
    """Standard deviation and interquartile range over trainings.

    >>> spread([0.0, 1.0, 2.0, 3.0])
    'deviation 1.291, quartiles +0.750 to +2.250'
    """
    x = np.asarray(rewards, np.float64)
    if len(x) < 2:
        return "one training shows none"
    low, high = np.quantile(x, [0.25, 0.75])
    return f"deviation {x.std(ddof=1):.3f}, quartiles {low:+.3f} to {high:+.3f}"


def _perplexity(table: MethodsTable, good: Sequence[Outcome]) -> str:
    before, *tuned = [s.perplexity for s in table.starts]
    after = [o.perplexity for o in good if o.perplexity is not None]
    if before is None or not after:
        return "not measured"
    middle = [p for p in tuned if p is not None]
    return f"{before:.2f} before, {np.mean(middle):.2f} fine-tuned, {np.mean(after):.2f} after"
