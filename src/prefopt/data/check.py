"""``prefopt data check``: from its options to a report on the screen."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from rich.text import Text

from prefopt.config.data_verbs import DataCheckConfig
from prefopt.data.audit import Audit, How, audit, compare_prompts
from prefopt.data.render import Renderer
from prefopt.data.rendering import Rendering
from prefopt.data.report import Line, to_dict, to_lines
from prefopt.data.show import show, show_words
from prefopt.data.tokenizer import load_tokenizer
from prefopt.data.truncate import sequence_limit
from prefopt.progress import Bar, Reporter
from prefopt.records import Comparison
from prefopt.screen import Screen, tell_json, visible

STYLES = {"title": "bold", "error": "bold red", "warning": "yellow", "good": "green", "dim": "dim", "": ""}
WIDEST = 100
# Fewer rows are done before anybody wonders.
BAR_ROWS = 5000
EXAMPLE_CHARACTERS = 1500


def run_check(config: DataCheckConfig, context: int | None = None) -> int:
    """Print the report; 0, or 1 where a run would refuse a row. ``context``: positions of the model, if it says so.

    Raises what :func:`prefopt.data.audit.audit` does.
    """
    tokenizer = rendering = limit = None
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        limit = sequence_limit(config.max_length, context)
        rendering = Rendering.from_options(config, limit)
    with ExitStack() as stack:
        how = How(
            tokenizer=tokenizer,
            rendering=rendering,
            want=config.want,
            format=config.format,
            columns=config.column_words,
            show=config.show,
            progress=None if config.json else _Bars(stack),
        )
        train = audit(config.data, how)
        held_out = audit(config.eval_data, how) if config.eval_data else None
    if held_out is not None:
        compare_prompts(train, held_out)
    shown = _examples(train, how)
    audits = [train, *([held_out] if held_out else [])]
    if config.json:
        document = to_dict(train, held_out, limit) | {"examples": shown}
        tell_json(document, indent=1)
    else:
        _print(train, held_out, limit, shown)
    return 1 if any(a.ledger.entries("error") for a in audits) else 0


def _examples(found: Audit, how: How) -> list[dict[str, object]]:
    """Rows as a model sees them; with a tokenizer the trained tokens stand in marks."""
    return [{"file": c.file, "row": c.row, "text": _shown(c, how)} for c in found.examples]


def _shown(c: Comparison, how: How) -> str:
    if how.tokenizer is None or not c.responses:
        return show_words(c, most=EXAMPLE_CHARACTERS)
    group = Renderer(how.tokenizer, how.rendering).render(c).group
    return show(group, how.tokenizer, most=EXAMPLE_CHARACTERS)


def _print(train: Audit, held_out: Audit | None, limit: int | None, shown: list[dict[str, object]]) -> None:
    console = Screen()
    unicode = (console.encoding or "").lower().startswith("utf")
    width = min(console.width, WIDEST) if console.is_terminal else 80
    lines: list[Line] = list(to_lines(train, held_out, limit, width, "█" if unicode else "#"))
    for example in shown:
        lines += [("", ""), (f"{example['file']}, row {example['row']}", "title"), (str(example["text"]), "")]
    for text, style in lines:
        console.print(Text(visible(text), STYLES[style]))


class _Bars:
    """A bar for each long file, on a terminal only."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._reporter = stack, Reporter("rich" if sys.stdout.isatty() else "none")
        self._bars: dict[str, Bar] = {}

    def __call__(self, file: str, done: int, total: int) -> None:
        if total < BAR_ROWS:
            return
        if file not in self._bars:
            self._stack.close()  # the bar of the file before it
            self._bars[file] = self._stack.enter_context(self._reporter.bar(file, total, "rows"))
        self._bars[file].update(done)
