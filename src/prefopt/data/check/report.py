"""The report of `prefopt data check`: lines for a terminal, or one JSON document (docs/formats.md lists its keys)."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from contextlib import ExitStack
from itertools import zip_longest

from rich.text import Text

from prefopt.config.tools import DataCheckConfig
from prefopt.core.terminal import Bar, Reporter, Screen, tell_json, visible
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.check.audit import CONTRADICTION, SEVERITIES, Audit, AuditOptions, Issue, audit, compare_prompts
from prefopt.data.check.statistics import Lengths
from prefopt.data.group import show, show_words
from prefopt.data.tokenizer import load_tokenizer
from prefopt.data.validate import NAMED_ROWS
from prefopt.records import Comparison

VERSION = 1
LIMITS = (512, 1024, 2048, 4096, 8192)
STYLES = {"title": "bold", "error": "bold red", "warning": "yellow", "good": "green", "dim": "dim", "": ""}
WIDEST = 100
BAR_ROWS = 5000  # smaller files need no progress bar
EXAMPLE_CHARACTERS = 1500


def run_check(config: DataCheckConfig, context: int | None = None) -> int:
    """Print the report; the exit status, 1 where a run would refuse a row. ``context``: positions of the model.

    Raises the same errors as :func:`prefopt.data.check.audit.audit`.
    """
    tokenizer = rendering = limit = None
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        limit = sequence_limit(config.max_length, context)
        rendering = Rendering.from_options(config, limit)
    bars: dict[str, Bar] = {}
    reporter = Reporter("rich" if sys.stdout.isatty() and not config.json else "none")
    with ExitStack() as stack:

        def progress(file: str, done: int, total: int) -> None:
            if file not in bars and total >= BAR_ROWS:
                stack.close()  # the bar of the file before it
                bars[file] = stack.enter_context(reporter.bar(file, total, "rows"))
            if file in bars:
                bars[file].update(done)

        options = AuditOptions(
            tokenizer=tokenizer,
            rendering=rendering,
            want=config.want,
            format=config.format,
            columns=config.column_words,
            show=config.show,
            progress=progress,
        )
        train = audit(config.data, options)
        held_out = audit(config.eval_data, options) if config.eval_data else None
    if held_out is not None:
        compare_prompts(train, held_out)
    examples = [{"file": c.file, "row": c.row, "text": _show(c, options)} for c in train.examples]
    if config.json:
        tell_json(to_dict(train, held_out, limit) | {"examples": examples}, indent=1)
    else:
        report = _Report(Screen())
        report.all(train, held_out, limit)
        for example in examples:
            report.title(f"{example['file']}, row {example['row']}")
            report.lines.append((f"{example['text']}", ""))
        report.print()
    return 1 if any(a.issues("error") for a in (train, held_out) if a) else 0


def _show(c: Comparison, options: AuditOptions) -> str:
    """A row as text; with a tokenizer as the model sees it, the trained tokens marked."""
    if options.tokenizer is None or not c.responses:
        return show_words(c, most=EXAMPLE_CHARACTERS)
    group = Renderer(options.tokenizer, options.rendering).render(c).group
    return show(group, options.tokenizer, most=EXAMPLE_CHARACTERS)


def to_dict(train: Audit, held_out: Audit | None, limit: int | None) -> dict[str, object]:
    """Everything as plain values, with all rows of every issue."""
    audits = [train, *([held_out] if held_out else [])]
    # A file that cannot be read counts as a row.
    counts = {
        f"{severity}s": sum(a.rows_with(severity) + sum(not i.rows for i in a.issues(severity)) for a in audits)
        for severity in SEVERITIES
    }
    found: dict[str, object] = {"version": VERSION, **counts, "max_length": limit, **_values(train)}
    return found | {"eval": None if held_out is None else _values(held_out)}


def _values(a: Audit) -> dict[str, object]:
    lengths = a.lengths.to_dict()
    if a.lengths.unit == "tokens":
        over = {str(limit): n for limit, n in a.lengths.longer_than(LIMITS).items()}
        lengths |= {"truncated_rows": a.lengths.truncated, "longer_than": over}
        lengths["shared_prefix"] = {"tokens_shared": a.lengths.encoded, "tokens_separate": a.lengths.separate}
    issues = [issue.to_dict() for severity in SEVERITIES for issue in a.issues(severity)]
    files = [f.to_dict() for f in a.files]
    counts = {"rows": a.rows, "usable": sum(f.usable for f in a.files), "prompts": a.prompts}
    return {**counts, "files": files, "lengths": lengths, "problems": issues, "notes": a.notes}


class _Report:
    """The report as lines (text, style) for a screen."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.lines = screen, list[tuple[str, str]]()
        self.width = min(screen.width, WIDEST) if screen.is_terminal else 80

    def print(self) -> None:
        for text, style in self.lines:
            self.screen.print(Text(visible(text), STYLES[style]))

    def add(self, text: str, indent: int = 0, hang: int | None = None, style: str = "") -> None:
        """Add text in lines of whole words, the first indented, the others by ``hang``."""
        indent += len(text) - len(text.lstrip())
        first, later = " " * indent, " " * (indent + 2 if hang is None else hang)
        wrapper = textwrap.TextWrapper(self.width, first, later, break_long_words=False, break_on_hyphens=False)
        self.lines += [(line, style) for line in wrapper.wrap(text.lstrip())]

    def title(self, text: str) -> None:
        """Add a title, after an empty line unless it is the first."""
        self.lines += [("", "")] * bool(self.lines) + [(text, "title")]

    def all(self, train: Audit, held_out: Audit | None, limit: int | None) -> None:
        """Add everything. ``limit`` is ``--max-length`` or its default."""
        self.data(train, "data" if held_out is None else "data to train on", limit)
        if held_out is not None:
            self.data(held_out, "data to evaluate on", limit)
        self.lines.append(("", ""))
        self.issues([train, *([held_out] if held_out else [])])

    def data(self, a: Audit, title: str, limit: int | None) -> None:
        """Add the files, counts of their rows, their lengths and notes."""
        self.title(title)
        for f in a.files:
            refused = f", {f.refused:,} with errors" if f.refused else ""
            tied = f", {f.left_out:,} left out (all responses tied)" if f.left_out else ""
            rows = f"{f.rows:,} row{'s' * (f.rows != 1)} of layout {f.layout}, {f.usable:,} usable{refused}{tied}"
            self.add(f"{f.file}: {rows if f.layout else 'cannot be read'}", 2)
        if any(f.usable for f in a.files):
            self.title("rows")
            self.rows(a)
            self.lengths(a.lengths, limit)
        for note in dict.fromkeys(a.notes):
            self.add(f"note: {note}", 0, 6, "dim")

    def rows(self, a: Audit) -> None:
        """Add counts of the rows; those that are 0 are left out."""
        total, stated, responses = Counter[str](), Counter[str](), Counter[int]()
        for f in a.files:
            total.update(f.counts)
            stated.update(f.stated)
            responses.update(f.responses)
        found = {
            "purpose": ", ".join(f"{kind} {n:,}" for kind, n in stated.most_common()),
            "responses": ", ".join(f"{k} in {n:,} rows" for k, n in sorted(responses.items())),
            "prompts": f"{a.prompts:,} different in {stated.total():,} rows",
            "counts": ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in total.items() if n),
        }
        for name, value in found.items():
            if value:
                self.add(f"{name:<14}{value}", 2, 16)

    def lengths(self, x: Lengths, limit: int | None) -> None:
        """Add quantiles of lengths, what truncation and shared prefixes change, and the length bias."""
        self.title(f"lengths in {x.unit}")
        table = x.quantiles()
        if len(x.chosen) + len(x.rejected) == len(x.response):
            table.pop("response", None)  # the same ones as the two rows below it
        names = {"chosen": "desirable", "rejected": "undesirable"} if x.of_labels else {}
        columns = list(next(iter(table.values()), {}))
        self.lines.append((" " * 14 + "".join(f"{c:>8}" for c in columns), "dim"))
        for name, values in table.items():
            self.add(f"  {names.get(name, name):<12}" + "".join(f"{round(values[c]):>8,}" for c in columns))
        bias = x.bias()
        if bias is not None or x.unit == "tokens":
            self.lines.append(("", ""))
        if x.unit == "tokens":
            rows, over = len(x.prompt), [f"{n:,}: {many:,}" for n, many in x.longer_than(LIMITS).items()]
            share = x.truncated / max(rows, 1)
            self.add(f"truncated at {limit:,} tokens: {x.truncated:,} of {rows:,} rows ({share:.1%})", 2)
            self.add(f"of {len(x.whole) or rows:,} sequences are longer than {'; '.join(over)}", 2)
            if len(x.whole) > len(x.prompt) and x.encoded:
                saved = f"{1 - x.encoded / x.separate:.0%} saved, {x.separate / x.encoded:.2f} times fewer"
                tokens = f"{x.encoded:,} tokens instead of {x.separate:,} ({saved})"
                self.add(f"shared prefixes: encoded once per row, {tokens}", 2)
        if bias is not None:
            self.add(f"length bias: {bias.describe(x.unit)}", 2, 4, "warning" if bias.large else "")

    def issues(self, audits: list[Audit]) -> None:
        """Add errors, then warnings."""
        several = len({f.file for a in audits for f in a.files}) > 1
        consequence = {
            "error": "a run refuses them, or leaves them out with --on-bad-row skip",
            "warning": "a run goes on, look at them first",
        }
        for severity in SEVERITIES:
            issues = [issue for a in audits for issue in a.issues(severity)]
            if not issues:
                self.lines.append((f"no {severity}s", "good"))
                continue
            count = sum(a.rows_with(severity) for a in audits)
            rows = f"{count:,} row{'s' * (count != 1)}; {consequence[severity]}" if count else "of a file as a whole"
            self.lines.append((f"{severity}s: {rows}", severity))
            digits = len(f"{max(len(issue.rows) for issue in issues):,}") if count else 0
            file = None
            for issue in issues:
                if several and issue.file != file:
                    file = issue.file
                    self.add(file or "all files", 2, style="dim")
                self.issue(issue, digits)

    def issue(self, e: Issue, digits: int) -> None:
        """Add one kind of issue: how many rows, what it is, the first rows, an example."""
        what = f", such as row {e.rows[0]}: {e.what}" if e.varies else f": {e.what}" * (e.what != e.kind)
        count = f"{len(e.rows):>{digits},}  " if e.rows else " " * (digits + 2) * bool(digits)
        self.add(f"{count}{e.kind}{what}", 2, digits + 4)
        if e.rows:
            word = "against" if e.kind == CONTRADICTION else "as"
            others = [f" ({word} {f'{file}:' if file != e.file else ''}{row})" for file, row in e.others[:NAMED_ROWS]]
            first = [f"{row}{other}" for row, other in zip_longest(e.rows[:NAMED_ROWS], others, fillvalue="")]
            more = ", ..." if len(e.rows) > NAMED_ROWS else ""
            self.add(f"row{'s' * (len(e.rows) > 1)} {', '.join(first)}{more}", digits + 4, None, "dim")
        if e.example:
            self.lines.append((f"{' ' * (digits + 4)}{e.example}  (row {e.rows[0]})", "dim"))
