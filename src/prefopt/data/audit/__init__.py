"""The report of `prefopt data check`: lines for a terminal, or one JSON document (docs/formats.md lists its keys)."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from rich.text import Text

from prefopt.config.tools import DataCheckConfig
from prefopt.core.terminal import Reporter, Screen, tell_json, visible
from prefopt.data.audit.rows import CONTRADICTION, SEVERITIES, Audit, AuditOptions, Issue, audit, compare_prompts
from prefopt.data.audit.statistics import Lengths
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.group import parts, parts_of_words, show, show_words
from prefopt.data.tokenizer import load_tokenizer
from prefopt.data.validate import NAMED_ROWS
from prefopt.records import Comparison

VERSION = 1
TITLES = ("data to train on", "data to evaluate on")
LIMITS = (512, 1024, 2048, 4096, 8192)
STYLES = {"title": "bold", "error": "bold red", "warning": "yellow", "good": "green", "dim": "dim", "": ""}
WIDEST = 100
EXAMPLE_CHARACTERS = 1500


@dataclass(frozen=True, slots=True, repr=False)
class DataReport:
    """The audit of the training data and, where some were named, of the evaluation data; ``limit`` is the most tokens
    of a sequence, ``examples`` are rows as text. It prints as the report of ``prefopt data check``."""

    audits: Sequence[Audit]
    limit: int | None
    examples: Sequence[Mapping[str, object]]

    @property
    def ok(self) -> bool:
        """Whether a run would refuse no row."""
        return not any(a.issues("error") for a in self.audits)

    def to_dict(self) -> dict[str, object]:
        """The document of ``prefopt data check --json``."""
        return _values(self.audits, self.limit) | {"examples": list(self.examples)}

    def lines(self, screen: Screen) -> list[tuple[str, str]]:
        """Lines with the names of their styles."""
        report = _Report(screen)
        for a, title in zip(self.audits, TITLES if len(self.audits) == 2 else ["data"], strict=True):
            report.data(a, title, self.limit)
        report.lines.append(("", ""))
        report.issues(list(self.audits))
        for example in self.examples:
            report.title(f"{example['file']}, row {example['row']}")
            report.lines.append((f"{example['text']}", ""))
        return report.lines

    def __repr__(self) -> str:
        return "\n".join(visible(text) for text, _ in self.lines(Screen()))


def run_check(config: DataCheckConfig, context: int | None = None) -> int:
    """Print the report; the exit status, 1 where a run would refuse a row. Otherwise as :func:`checked`."""
    found = checked(config, context, show_progress=sys.stdout.isatty() and not config.json)
    if config.json:
        tell_json(found.to_dict(), indent=1)
    else:
        screen = Screen()
        for text, style in found.lines(screen):
            screen.print(Text(visible(text), STYLES[style]))
    return 0 if found.ok else 1


def checked(config: DataCheckConfig, context: int | None = None, *, show_progress: bool = False) -> DataReport:
    """Audit the data of ``config``. ``context``: positions of the model.

    Raises the same errors as :func:`prefopt.data.audit.rows.audit`.
    """
    tokenizer = rendering = limit = None
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        limit = sequence_limit(config.max_length, context)
        rendering = Rendering.from_options(config, limit)
    options = AuditOptions(
        tokenizer=tokenizer,
        rendering=rendering,
        want=config.want,
        format=config.format,
        columns=config.column_words,
        show=config.show,
        reporter=Reporter("rich" if show_progress else "none"),
    )
    audits = [audit(names, options) for names in (config.data, config.eval_data) if names]
    if len(audits) == 2:
        compare_prompts(*audits)
    examples = [
        {"file": c.file, "row": c.row, "text": _show(c, options), "parts": _parts(c, options)}
        for c in audits[0].examples
    ]
    return DataReport(audits, limit, examples)


def _show(c: Comparison, options: AuditOptions) -> str:
    """A row as text; with a tokenizer as the model sees it, the trained tokens marked."""
    if options.tokenizer is None or not c.responses:
        return show_words(c, most=EXAMPLE_CHARACTERS)
    group = Renderer(options.tokenizer, options.rendering).render(c).group
    return show(group, options.tokenizer, most=EXAMPLE_CHARACTERS)


def _parts(c: Comparison, options: AuditOptions) -> list[dict[str, object]]:
    """The same for programs, whole: the name of each part, and its spans, each with its text and whether it is
    trained."""
    if options.tokenizer is None or not c.responses:
        found = parts_of_words(c)
    else:
        found = parts(Renderer(options.tokenizer, options.rendering).render(c).group, options.tokenizer)
    return [{"name": name, "spans": [[text, trained] for text, trained in spans]} for name, spans in found]


def _values(audits: Sequence[Audit], limit: int | None) -> dict[str, object]:
    # A file that cannot be read counts as a row.
    counts = {
        f"{severity}s": sum(a.rows_with(severity) + sum(not i.rows for i in a.issues(severity)) for a in audits)
        for severity in SEVERITIES
    }
    train, held_out = [*map(_values_of, audits), None][:2]
    return {"version": VERSION, **counts, "max_length": limit, **(train or {}), "eval": held_out}


def _values_of(a: Audit) -> dict[str, object]:
    lengths = a.lengths.to_dict()
    if a.lengths.unit == "tokens":
        over = {str(limit): n for limit, n in a.lengths.longer_than(LIMITS).items()}
        lengths |= {"truncated_rows": a.lengths.truncated, "longer_than": over}
        lengths["shared_prefix"] = {"tokens_shared": a.lengths.encoded, "tokens_separate": a.lengths.separate}
    issues = [issue.to_dict() for severity in SEVERITIES for issue in a.issues(severity)]
    counts = {"rows": sum(f.rows for f in a.files), "usable": sum(f.usable for f in a.files), "prompts": a.prompts}
    files = [f.to_dict() for f in a.files]
    pictures = a.pictures.to_dict() if a.pictures else None
    return {**counts, "files": files, "lengths": lengths, "pictures": pictures, "problems": issues, "notes": a.notes}


class _Report:
    """The report as lines (text, style) for a screen."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.lines = screen, list[tuple[str, str]]()
        self.width = min(screen.width, WIDEST) if screen.is_terminal else 80

    def add(self, text: str, indent: int = 0, hang: int | None = None, style: str = "") -> None:
        indent += len(text) - len(text.lstrip())
        first, later = " " * indent, " " * (indent + 2 if hang is None else hang)
        wrapper = textwrap.TextWrapper(self.width, first, later, break_long_words=False, break_on_hyphens=False)
        self.lines += [(line, style) for line in wrapper.wrap(text.lstrip())]

    def title(self, text: str) -> None:
        self.lines += [("", "")] * bool(self.lines) + [(text, "title")]

    def data(self, a: Audit, title: str, limit: int | None) -> None:
        """Add files, counts of rows, lengths and notes. ``limit`` is ``--max-length`` or its default."""
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
        if a.pictures:
            self.title("pictures")
            for line in a.pictures.lines():
                self.add(line, 2)
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
        self.lines.append((" " * 14 + "".join(f"{c:>8}" for c in next(iter(table.values()), {})), "dim"))
        for name, values in table.items():
            self.add(f"  {names.get(name, name):<12}" + "".join(f"{round(n):>8,}" for n in values.values()))
        bias = x.bias()
        if bias is not None or x.unit == "tokens":
            self.lines.append(("", ""))
        if x.unit == "tokens":
            rows, over = len(x.prompt), [f"{n:,}: {many:,}" for n, many in x.longer_than(LIMITS).items()]
            share = x.truncated / max(rows, 1)
            self.add(f"truncated at {limit:,} tokens: {x.truncated:,} of {rows:,} rows ({share:.1%})", 2)
            self.add(f"of {len(x.whole) or rows:,} sequences are longer than {'; '.join(over)}", 2)
            if len(x.whole) > len(x.prompt) and x.encoded:
                tokens = f"{x.encoded:,} tokens instead of {x.separate:,} ({1 - x.encoded / x.separate:.0%} saved)"
                self.add(f"shared prefixes: encoded once per row, {tokens}", 2)
        if bias is not None:
            self.add(f"length bias: {bias.describe(x.unit)}", 2, 4, "warning" if bias.large else "")

    def issues(self, audits: list[Audit]) -> None:
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
            for file, of_file in groupby(issues, key=lambda issue: issue.file):
                if several:
                    self.add(file or "all files", 2, style="dim")
                for issue in of_file:
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
