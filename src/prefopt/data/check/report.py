"""The report of `prefopt data check`: lines for a terminal, or one JSON document (docs/formats.md lists its keys)."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from contextlib import ExitStack

from rich.text import Text

from prefopt.config.tools import DataCheckConfig
from prefopt.core.terminal import Bar, Reporter, Screen, tell_json, visible
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.check.audit import (
    CONTRADICTION,
    SEVERITIES,
    Audit,
    AuditOptions,
    Issue,
    Severity,
    audit,
    compare_prompts,
)
from prefopt.data.check.statistics import LengthBias, Lengths
from prefopt.data.problems import NAMED_ROWS
from prefopt.data.show import show, show_words
from prefopt.data.tokenizer import load_tokenizer
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
    with ExitStack() as stack:
        options = AuditOptions(
            tokenizer=tokenizer,
            rendering=rendering,
            want=config.want,
            format=config.format,
            columns=config.column_words,
            show=config.show,
            progress=None if config.json else _ProgressBars(stack),
        )
        train = audit(config.data, options)
        held_out = audit(config.eval_data, options) if config.eval_data else None
    if held_out is not None:
        compare_prompts(train, held_out)
    examples: list[dict[str, object]] = [
        {"file": c.file, "row": c.row, "text": _show(c, options)} for c in train.examples
    ]
    if config.json:
        tell_json(to_dict(train, held_out, limit) | {"examples": examples}, indent=1)
    else:
        report = _Report(Screen())
        report.all(train, held_out, limit)
        for example in examples:
            report.title(f"{example['file']}, row {example['row']}")
            report.lines.append((str(example["text"]), ""))
        report.print()
    return 1 if any(a.issues("error") for a in (train, held_out) if a) else 0


def _show(c: Comparison, options: AuditOptions) -> str:
    """A row as text; with a tokenizer as the model sees it, the trained tokens marked."""
    if options.tokenizer is None or not c.responses:
        return show_words(c, most=EXAMPLE_CHARACTERS)
    group = Renderer(options.tokenizer, options.rendering).render(c).group
    return show(group, options.tokenizer, most=EXAMPLE_CHARACTERS)


class _ProgressBars:
    """A progress bar for each long file, on a terminal only."""

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
            self.data(held_out, "data to evaluate on", limit, bars=False)
        self.lines.append(("", ""))
        self.issues([train, *([held_out] if held_out else [])])

    def data(self, a: Audit, title: str, limit: int | None, *, bars: bool = True) -> None:
        """Add what the files hold."""
        self.title(title)
        for f in a.files:
            refused = f", {f.refused:,} with errors" if f.refused else ""
            tied = f", {f.left_out:,} left out (all responses tied)" if f.left_out else ""
            rows = f"{f.rows:,} row{'s' * (f.rows != 1)} of layout {f.layout}, {f.usable:,} usable{refused}{tied}"
            self.add(f"{f.file}: {rows if f.layout else 'cannot be read'}", 2)
        if any(f.usable for f in a.files):
            self.title("rows")
            self.rows(a)
            self.lengths(a.lengths, limit, bars)
        for note in dict.fromkeys(a.notes):
            self.add(f"note: {note}", 0, 6, "dim")

    def rows(self, a: Audit) -> None:
        """Add counts of the rows; those that are 0 are left out."""
        total, stated, responses = Counter[str](), Counter[str](), Counter[int]()
        for f in a.files:
            total.update(f.counts)
            stated.update(f.stated)
            responses.update(f.responses)
        read = stated.total()
        found = {"purpose": ", ".join(f"{kind} {n:,}" for kind, n in stated.most_common())}
        found["responses"] = ", ".join(f"{k} in {n:,} rows" for k, n in sorted(responses.items()))
        if total["pairs"]:
            ties = f"ties in {total['ties']:,} rows" if total["ties"] else "no ties"
            found["pairs"] = f"{total['pairs']:,}; {ties}"
        good, bad = total["desirable"], total["undesirable"]
        if good or bad:
            found["labels"] = f"{good:,} desirable, {bad:,} undesirable of {good + bad:,}"
        found["prompts"] = f"{a.prompts:,} different in {read:,} rows"
        names = {"multi_turn": "multi-turn", "multi_turn_responses": "several turns in a response"}
        names |= {"system": "system turn", "tools": "tools", "reasoning": "reasoning"}
        names |= {"scored": "scores", "text": "plain text"}
        has = [f"{name} {total[k]:,} ({_percent(total[k], read)})" for k, name in names.items() if total[k]]
        if has:
            found["with"] = ", ".join(has)
        for name, value in found.items():
            self.add(f"{name:<14}{value}", 2, 16)

    def lengths(self, x: Lengths, limit: int | None, bars: bool) -> None:
        """Add quantiles and a histogram of lengths, what truncation and shared prefixes change, and the length bias."""
        self.title(f"lengths in {x.unit}")
        table = x.quantiles()
        if len(x.chosen) + len(x.rejected) == len(x.response):
            table.pop("response", None)  # the same ones as the two rows below it
        names = {"chosen": "desirable", "rejected": "undesirable"} if x.of_labels else {}
        columns = list(next(iter(table.values()), {}))
        self.lines.append((" " * 14 + "".join(f"{c:>8}" for c in columns), "dim"))
        for name, values in table.items():
            self.add(f"  {names.get(name, name):<12}" + "".join(f"{round(values[c]):>8,}" for c in columns))
        if bars:
            what = f"whole sequences (prompt and response), {x.unit} and how many" if x.whole else "prompts"
            self.lines += [("", ""), (f"  {what}", "dim"), *((f"  {line}", "") for line in self.bars(x))]
        bias = x.bias()
        if bias is not None or x.unit == "tokens":
            self.lines.append(("", ""))
        if x.unit == "tokens":
            rows, over = len(x.prompt), [f"{n:,}: {many:,}" for n, many in x.longer_than(LIMITS).items()]
            share = _percent(x.truncated, rows)
            self.add(f"truncated at {limit:,} tokens: {x.truncated:,} of {rows:,} rows ({share})", 2)
            self.add(f"of {len(x.whole) or rows:,} sequences are longer than {'; '.join(over)}", 2)
            if len(x.whole) > len(x.prompt) and x.encoded:
                saved = f"{1 - x.encoded / x.separate:.0%} saved, {x.separate / x.encoded:.2f} times fewer"
                tokens = f"{x.encoded:,} tokens instead of {x.separate:,} ({saved})"
                self.add(f"shared prefixes: encoded once per row, {tokens}", 2)
        if bias is not None:
            self.add(_bias(bias, x), 2, 4, "warning" if bias.large else "")

    def bars(self, x: Lengths) -> list[str]:
        """The histogram of lengths."""
        histogram = x.histogram()
        names = [f"{a:,}-{b:,}" if b is not None else f"{a:,} and more" for a, b, _ in histogram]
        most = max((n for *_, n in histogram), default=0)
        left, right = max(map(len, names), default=0), len(f"{most:,}")
        bar = "█" if (self.screen.encoding or "").lower().startswith("utf") else "#"
        room = max(10, min(40, self.width - left - right - 6))
        pairs = zip(names, histogram, strict=True)
        return [f"{name:>{left}}  {n:>{right},}  {bar * -(-n * room // most)}".rstrip() for name, (*_, n) in pairs]

    def issues(self, audits: list[Audit]) -> None:
        """Add errors, then warnings."""
        several = len({f.file for a in audits for f in a.files}) > 1
        consequence: dict[Severity, str] = {
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
            others += [""] * (NAMED_ROWS - len(others))
            first = [f"{row}{other}" for row, other in zip(e.rows[:NAMED_ROWS], others, strict=False)]
            more = ", ..." if len(e.rows) > NAMED_ROWS else ""
            self.add(f"row{'s' * (len(e.rows) > 1)} {', '.join(first)}{more}", digits + 4, None, "dim")
        if e.example:
            self.lines.append((f"{' ' * (digits + 4)}{e.example}  (row {e.rows[0]})", "dim"))


def _bias(b: LengthBias, x: Lengths) -> str:
    interval = f"95 % interval {b.low:.1%} to {b.high:.1%}"
    means = f"{abs(b.difference):,.1f} {x.unit} {'longer' if b.difference >= 0 else 'shorter'} on average"
    if x.of_labels:
        what = f"a desirable response is longer than an undesirable one {b.share:.1%} of the time"
        return f"length bias: {what} ({interval}), {means}"
    what = f"chosen is longer in {b.share:.1%} of the rows where lengths differ"
    return f"length bias: {what} ({interval}), {means} ({b.ratio:.2f} times the length)"


def _percent(n: int, of: int) -> str:
    share = n / of if of else 0.0
    return f"{share:.0%}" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{share:.1%}"
