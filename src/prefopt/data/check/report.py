"""What an audit found, for a person (lines of at most so many columns) and for a program (plain values)."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from rich.text import Text

from prefopt.config.tools import DataCheckConfig
from prefopt.core.terminal import Bar, Reporter, Screen, tell_json, visible
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.check.audit import CONTRADICTION, Audit, How, audit, compare_prompts
from prefopt.data.check.issues import SEVERITIES, Entry, Severity, Tally
from prefopt.data.check.lengths import Lengths, bias_words
from prefopt.data.group import show, show_words
from prefopt.data.tokenizer import load_tokenizer
from prefopt.data.validate import NAMED_ROWS
from prefopt.records import Comparison

Line = tuple[str, str]
"""Text, and its style: nothing, ``title``, ``error``, ``warning``, ``good`` or ``dim``."""
VERSION = 1
LIMITS = (512, 1024, 2048, 4096, 8192)


def to_dict(train: Audit, held_out: Audit | None, limit: int | None) -> dict[str, object]:
    """Everything, with all rows of every problem; docs/formats.md says what the keys are."""
    found: dict[str, object] = {"version": VERSION, "errors": _count(train, held_out, "error")}
    found |= {"warnings": _count(train, held_out, "warning"), "max_length": limit, **_values(train)}
    return found | {"eval": None if held_out is None else _values(held_out)}


def _values(a: Audit) -> dict[str, object]:
    lengths = a.lengths.to_dict()
    if a.lengths.unit == "tokens":
        over = {str(limit): n for limit, n in a.lengths.longer_than(LIMITS).items()}
        lengths |= {"truncated_rows": a.lengths.truncated, "longer_than": over}
        lengths["shared_prefix"] = {"tokens_shared": a.lengths.encoded, "tokens_separate": a.lengths.separate}
    problems = [e.to_dict() for severity in SEVERITIES for e in a.ledger.entries(severity)]
    files = [t.to_dict() for t in a.files]
    counts = {"rows": a.rows, "usable": sum(t.usable for t in a.files), "prompts": a.prompts}
    return {**counts, "files": files, "lengths": lengths, "problems": problems, "notes": a.notes}


def _count(train: Audit, held_out: Audit | None, severity: Severity) -> int:
    """Rows with problems; a file that cannot be read counts as one."""
    audits = [train, *([held_out] if held_out else [])]
    files = sum(not e.rows for a in audits for e in a.ledger.entries(severity))
    return files + sum(a.ledger.concerned(severity) for a in audits)


def to_lines(train: Audit, held_out: Audit | None, limit: int | None, width: int, bar: str) -> Iterator[Line]:
    """The report. ``limit`` is ``--max-length`` or what stands for it; ``bar`` is what bars are made of, if any."""
    yield from _part(train, "data" if held_out is None else "data to train on", limit, width, bar)
    if held_out is not None:
        yield "", ""
        yield from _part(held_out, "data to evaluate on", limit, width, "")
    yield "", ""
    yield from _problems(train, held_out, width)


def _part(a: Audit, title: str, limit: int | None, width: int, bar: str) -> Iterator[Line]:
    yield title, "title"
    for tally in a.files:
        yield from _wrapped(f"{tally.file}: {_file(tally)}", width, 2)
    if sum(t.usable for t in a.files):
        yield "", ""
        yield "rows", "title"
        for name, value in _facts(a):
            yield from _wrapped(f"{name:<14}{value}", width, 2, 16)
        yield "", ""
        yield from _lengths(a.lengths, limit, width, bar)
    for note in dict.fromkeys(a.notes):
        yield from _wrapped(f"note: {note}", width, 0, 6, "dim")


def _file(t: Tally) -> str:
    if not t.layout:
        return "cannot be read"
    refused = f", {t.refused:,} with errors" if t.refused else ""
    tied = f", {t.left_out:,} left out (all responses tied)" if t.left_out else ""
    return f"{t.rows:,} row{'s' * (t.rows != 1)} of layout {t.layout}, {t.usable:,} usable{refused}{tied}"


def _facts(a: Audit) -> Iterator[tuple[str, str]]:
    """What the rows are, in words; what there is none of is left out."""

    def total(name: str) -> int:
        return sum(getattr(t, name) for t in a.files)

    stated = {kind: sum(t.stated[kind] for t in a.files) for t in a.files for kind in t.stated}
    read = sum(stated.values())
    yield "purpose", ", ".join(f"{kind} {n:,}" for kind, n in sorted(stated.items(), key=lambda x: -x[1]))
    many = {k: sum(t.responses[k] for t in a.files) for k in sorted({k for t in a.files for k in t.responses})}
    yield "responses", ", ".join(f"{k} in {n:,} rows" for k, n in many.items())
    if pairs := total("pairs"):
        yield "pairs", f"{pairs:,}" + (f"; ties in {ties:,} rows" if (ties := total("ties")) else "; no ties")
    if labels := total("desirable") + total("undesirable"):
        yield "labels", f"{total('desirable'):,} desirable, {total('undesirable'):,} undesirable of {labels:,}"
    yield "prompts", f"{a.prompts:,} different in {read:,} rows"
    names = {
        "multi-turn": "multi_turn",
        "several turns in a response": "multi_turn_responses",
        "system turn": "system",
        "tools": "tools",
        "reasoning": "reasoning",
        "scores": "scored",
        "plain text": "text",
    }
    has = [f"{name} {n:,} ({_percent(n, read)})" for name, key in names.items() if (n := total(key))]
    if has:
        yield "with", ", ".join(has)


def _lengths(x: Lengths, limit: int | None, width: int, bar: str) -> Iterator[Line]:
    yield f"lengths in {x.unit}", "title"
    table = x.quantiles()
    if len(x.chosen) + len(x.rejected) == len(x.response):
        table.pop("response", None)  # the same ones as the two rows below it
    names = {"chosen": "desirable", "rejected": "undesirable"} if x.labelled and not len(x.signs) else {}
    columns = list(next(iter(table.values()), {}))
    yield "  " + " " * 12 + "".join(f"{c:>8}" for c in columns), "dim"
    for name, values in table.items():
        yield f"  {names.get(name, name):<12}" + "".join(f"{round(values[c]):>8,}" for c in columns), ""
    if bar:
        yield "", ""
        yield f"  whole sequences (prompt and response), {x.unit} and how many" if len(x.whole) else "  prompts", "dim"
        yield from ((f"  {line}", "") for line in _bars(x.histogram(), width - 2, bar))
    bias = x.bias()
    if bias is not None or x.unit == "tokens":
        yield "", ""
    if x.unit == "tokens":
        yield from _tokens(x, limit, width)
    if bias is not None:
        yield from _wrapped(bias_words(bias, x), width, 2, 4, "warning" if bias.large else "")


def _tokens(x: Lengths, limit: int | None, width: int) -> Iterator[Line]:
    rows = len(x.prompt)
    said = f"truncated at {limit:,} tokens: {x.truncated:,} of {rows:,} rows ({_percent(x.truncated, rows)})"
    over = [f"{n:,}: {many:,}" for n, many in x.longer_than(LIMITS).items()]
    yield from _wrapped(said, width, 2)
    yield from _wrapped(f"of {len(x.whole) or rows:,} sequences are longer than {'; '.join(over)}", width, 2)
    if len(x.whole) > len(x.prompt) and x.encoded:
        saved = 1 - x.encoded / x.separate
        yield from _wrapped(
            f"shared prefixes: encoded once per row, {x.encoded:,} tokens instead of {x.separate:,}"
            f" ({saved:.0%} saved, {x.separate / x.encoded:.2f} times fewer)",
            width,
            2,
        )


def _bars(histogram: Sequence[tuple[int, int | None, int]], width: int, bar: str) -> Iterator[str]:
    most = max((n for *_, n in histogram), default=0)
    names = [f"{a:,}-{b:,}" if b is not None else f"{a:,} and more" for a, b, _ in histogram]
    left, right = max(map(len, names), default=0), len(f"{most:,}")
    room = max(10, min(40, width - left - right - 4))
    for name, (*_, n) in zip(names, histogram, strict=True):
        yield f"{name:>{left}}  {n:>{right},}  {bar * -(-n * room // most)}".rstrip()


def _problems(train: Audit, held_out: Audit | None, width: int) -> Iterator[Line]:
    audits = [train, *([held_out] if held_out else [])]
    files = {t.file for a in audits for t in a.files}
    words: dict[Severity, str] = {
        "error": "a run refuses them, or leaves them out with --on-bad-row skip",
        "warning": "a run goes on, look at them first",
    }
    for severity in SEVERITIES:
        entries = [e for a in audits for e in a.ledger.entries(severity)]
        if not entries:
            yield f"no {severity}s", "good"
            continue
        count = sum(a.ledger.concerned(severity) for a in audits)
        rows = f"{count:,} row{'s' * (count != 1)}; {words[severity]}" if count else "of a file as a whole"
        yield f"{severity}s: {rows}", severity
        file = None
        for entry in entries:
            if len(files) > 1 and entry.file != file:
                file = entry.file
                yield from _wrapped(file or "all files", width, 2, style="dim")
            yield from _entry(entry, len(f"{max(len(e.rows) for e in entries):,}") if count else 0, width)


def _entry(e: Entry, digits: int, width: int) -> Iterator[Line]:
    count = f"{len(e.rows):>{digits},}" if e.rows else " " * digits
    what = "" if e.kind == e.what else f": {e.what}"
    if e.varies:
        what = f", such as row {e.rows[0]}: {e.what}"
    yield from _wrapped(f"{count}  {e.kind}{what}" if digits else f"{e.kind}{what}", width, 2, digits + 4)
    if e.rows:
        others = [""] * NAMED_ROWS
        if e.others:
            word = "against" if e.kind == CONTRADICTION else "as"
            others = [f" ({word} {f'{file}:' if file != e.file else ''}{row})" for file, row in e.others[:NAMED_ROWS]]
        first = [f"{row}{other}" for row, other in zip(e.rows[:NAMED_ROWS], others, strict=False)]
        more = ", ..." if len(e.rows) > NAMED_ROWS else ""
        yield from _wrapped(f"row{'s' * (len(e.rows) > 1)} {', '.join(first)}{more}", width, digits + 4, None, "dim")
    if e.example:
        yield f"{' ' * (digits + 4)}{e.example}  (row {e.rows[0]})", "dim"


def _percent(n: int, of: int) -> str:
    share = n / of if of else 0.0
    return f"{share:.0%}" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{share:.1%}"


def _wrapped(text: str, width: int, indent: int, hang: int | None = None, style: str = "") -> Iterator[Line]:
    """Lines of whole words, the first indented, the others by ``hang``."""
    indent = len(text) - len(text.lstrip()) + indent
    lines = textwrap.wrap(
        text.lstrip(),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2 if hang is None else hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield from ((line, style) for line in lines)


STYLES = {"title": "bold", "error": "bold red", "warning": "yellow", "good": "green", "dim": "dim", "": ""}
WIDEST = 100
# Fewer rows are done before anybody wonders.
BAR_ROWS = 5000
EXAMPLE_CHARACTERS = 1500


def run_check(config: DataCheckConfig, context: int | None = None) -> int:
    """Print the report; 0, or 1 where a run would refuse a row. ``context``: positions of the model, if it says so.

    Raises what :func:`prefopt.data.check.audit.audit` does.
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
            kind=config.want,
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
