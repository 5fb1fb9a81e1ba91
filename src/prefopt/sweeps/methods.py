"""``prefopt methods``: fine-tuning and DPO against fine-tuning, reward model and PPO, over seeds and learning rates.

Every policy's outcome stands in ``outcome.json`` of its folder, so that a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from prefopt.config.sweeps import STAGES, AnyConfig, MethodsConfig
from prefopt.core.files import output_errors, read_json, replace_file, typed, write_json
from prefopt.core.terminal import Reporter
from prefopt.errors import Diverged
from prefopt.evaluate.sample_stats import perplexity
from prefopt.generate.model_io import SampledModel
from prefopt.methods.rlhf import started_again, status_of
from prefopt.model.costs import combine_costs
from prefopt.runs.history import read_record
from prefopt.sweeps.methods_table import MethodsTable, Outcome, Start, markdown, outcome_of
from prefopt.sweeps.shared import Measure, lay
from prefopt.sweeps.train import model_of, take_folder, train_alone, train_once

MAY_GROW = {"seeds", "rate_factors", "isolate", "progress", "output", "threads"}
"""Options that may differ when it is started again: they add policies, or change none."""


def run(config: MethodsConfig) -> MethodsTable:
    """Train and measure every policy, or those that are still to come; ``methods.json`` is there from the first one on.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: started again, it
    goes on. A training that diverges is counted as such.
    """
    with started_again():
        return _Sweep(config).run()


class _Sweep:
    def __init__(self, config: MethodsConfig) -> None:
        self.config, self.reporter = config, Reporter(config.progress)
        self.folder = Path(config.output)
        self.starts: list[Start] = []
        self.outcomes: list[Outcome] = []

    def run(self) -> MethodsTable:
        config = self.config
        take_folder(config, MAY_GROW)
        reference = SampledModel(config.model, device=config.device, dtype=config.dtype)
        self.ground = lay(config, reference, self.reporter)
        self.starts.append(self._start("as given", config.model, reference, self.folder / "start"))
        reference.release()
        for seed in range(config.seed, config.seed + config.seeds):
            self._seed(seed)
        return self._write(finished=True)

    def _seed(self, seed: int) -> None:
        """The stages that both roads share, then every rate of each."""
        config = self.config
        self._train("sft", seed, 1.0)
        tuned = str(config.folder("sft", seed))
        reference = SampledModel(tuned, device=config.device, dtype=config.dtype)
        self.starts.append(self._start(f"fine-tuned, seed {seed}", tuned, reference, Path(tuned)))
        measure = Measure(config, self.ground, reference)
        for road in STAGES:
            for factor in config.factors:
                file = config.folder(road, seed, factor) / "outcome.json"
                if file.exists():
                    kept = {"isolated": self._isolated(road, seed, factor)}  # (earlier versions did not keep it)
                    told = read_json(file, lambda found: outcome_of(kept | found), "remove it to measure again")  # noqa: B023
                    self.outcomes.append(told)
                else:
                    self.outcomes.append(self._outcome(road, seed, factor, measure))
                    write_json(file, asdict(self.outcomes[-1]))
                self._write(finished=False)
        reference.release()

    # -- one policy --------------------------------------------------------------------------------------------

    def _outcome(self, road: str, seed: int, factor: float, measure: Measure) -> Outcome:
        folder = self.config.folder(road, seed, factor)
        found = Outcome(road, seed, factor, folder=str(folder.relative_to(self.folder)))
        try:
            configs = [self._train(stage, seed, factor) for stage in STAGES[road]]
        except Diverged as error:
            self.reporter.say(f"{road}, seed {seed}, {factor:g} times the rate, diverged: {error.reason}")
            return replace(found, diverged=error.reason)
        costs = combine_costs([_costs(Path(c.output)) for c in configs])
        where = model_of(configs[-1])
        told = measure(file=folder / "samples.jsonl", **where)
        return replace(
            found,
            costs=costs,
            isolated=self._isolated(road, seed, factor),
            reward=told.reward.mean,
            interval=(told.reward.low, told.reward.high),
            kl=told.kl,
            kl_se=told.kl_error,
            length=told.length,
            perplexity=self._perplexity(where["name"], where["adapter"]),
        )

    def _train(self, stage: str, seed: int, factor: float) -> AnyConfig:
        """Train a stage, unless it is there already."""
        ground = self.ground
        config = self.config.stage(
            stage, seed, factor, data=[str(ground.data)], prompts=str(ground.train), each=ground.each
        )
        status = status_of(Path(config.output))
        if status == "finished":
            return config
        rate = f", {factor:g} times the rate" if stage in STAGES else ""
        self.reporter.say(f"{stage}, seed {seed}{rate}: {'goes on' if status else 'begins'}")
        file = self._file(Path(config.output))
        if self.config.isolate:
            train_alone(config, file)
        else:
            write_json(_shared(file), {"output": config.output})
            train_once(config)
        return config

    def _file(self, folder: Path) -> Path:
        """Where a training that has a process of its own finds its options."""
        return self.folder / "trainings" / f"{'-'.join(folder.parts[-2:])}.json"

    def _isolated(self, road: str, seed: int, factor: float) -> bool:
        """Whether every start of every stage of a policy had a process of its own."""
        folders = [self.config.folder(s, seed, factor if s in STAGES else None) for s in STAGES[road]]
        return all(f.exists() and not _shared(f).exists() for f in map(self._file, folders))

    def _start(self, name: str, model: str, reference: SampledModel, folder: Path) -> Start:
        """Where roads begin; kept in its folder."""
        file = folder / "start.json"
        if not file.exists():
            told = Measure(self.config, self.ground, reference)(model, folder / "samples.jsonl")
            write_json(file, asdict(Start(name, told.reward.mean, self._perplexity(model, None))))
        return read_json(file, lambda found: typed(Start, found), "remove it to measure again")

    def _perplexity(self, name: str, adapter: str | None) -> float | None:
        """Of the reference text; none where none was given."""
        config = self.config
        if config.perplexity is None:
            return None
        model = SampledModel(name, adapter=adapter, device=config.device, dtype=config.dtype)
        value, cut, _ = perplexity(model, config.perplexity)  # bad rows are refused
        if cut:
            self.reporter.say(f"perplexity: {cut} rows were truncated to the model's context")
        model.release()
        return value

    def _write(self, *, finished: bool) -> MethodsTable:
        config = self.config
        sizes = (config.held_out, config.num, config.responses)
        found = MethodsTable(
            config.model,
            config.reward,
            *sizes,
            self.ground.made,
            finished,
            tuple(self.starts),
            tuple(self.outcomes),
        )
        found.write(self.folder)
        path = self.folder / "methods.md"
        with output_errors(path):
            replace_file(path, ("\n".join(markdown(found)) + "\n").encode())
        return found


def _shared(file: Path) -> Path:
    """Is there where a training was, for a time at least, in the process of the whole sweep."""
    return file.with_suffix(".shared.json")


def _costs(folder: Path) -> dict[str, float]:
    """What the run in a folder has spent."""
    found: dict[str, float] = read_record(folder, f"remove {folder} to train again").get("costs", {})
    return found
