"""Writes the descriptions of losses in docs/methods.md and their plots: python docs/make_methods.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from prefopt.core.options import Option
from prefopt.losses.common import WEIGHTINGS, Weighting
from prefopt.losses.declare import DERIVED, INPUTS, Loss
from prefopt.losses.parse import condition, details, families, needs

PAGE = Path(__file__).with_name("methods.md")
MARKS = re.compile(r"(<!-- (losses|weightings|inputs) -->\n).*?(<!-- end -->)", re.S)
DIVERGENCE = ("divergence", "divergence_alpha")
TITLE = "{name}: the loss on the left, its gradient on the right"


def written(page: str) -> str:
    """The page with what stands between its marks as the declarations are now."""
    weightings = "\n".join(_section(w) for w in WEIGHTINGS.values())
    parts = {"losses": _losses(), "weightings": weightings, "inputs": _inputs()}
    return MARKS.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", page)


def _losses() -> str:
    parts = []
    for title, losses in families().items():
        parts.append(f"### {title}\n\n{_table(losses)}")
        parts += [_section(loss) for loss in losses]
    return "\n".join(parts)


def _inputs() -> str:
    rows = ["| kind | tensor | |", "| --- | --- | --- |"]
    columns = {**INPUTS, "pairs, derived": DERIVED}
    rows += [f"| {kind} | `{name}` | {_cell(what)} |" for kind, many in columns.items() for name, what in many.items()]
    return "\n".join(rows) + "\n"


def _table(losses: list[Loss]) -> str:
    rows = ["| loss | | when |", "| --- | --- | --- |"]
    for loss in losses:
        anchor = f"[`{loss.name}`](#{loss.name})"
        rows.append(f"| {anchor} | `{_cell(loss.formula)}` | {_cell(loss.when)} |")
    return "\n".join(rows) + "\n"


def _section(found: Loss | Weighting) -> str:
    lines = [f"#### {found.name}\n", f"```text\n{found.formula}\n```\n"]
    if isinstance(found, Loss):
        lines.append(f"![{TITLE.format(name=found.name)}](plots/{found.name}.svg)\n")
    lines += [prose + "\n"] if (prose := _prose(found)) else []
    facts = [f"- **Source**: {found.paper}.", f"- **When**: {found.when}"]
    if isinstance(found, Loss):
        facts.append(f"- **Needs**: {', '.join(needs(found)) or 'nothing beyond the policy'}.")
        if "label_P" in found.optional_inputs:
            facts.append("- **Soft labels**: taken where the data have them.")
        if found.on_difference:
            facts.append("- **Divergences**: [any](#divergences), by `divergence` and `divergence_alpha`.")
        if found.notes:
            facts.append(f"- **Mind**: {found.notes}")
    lines.append("\n".join(facts) + "\n")
    if options := [o for o in found.options if o.name not in DIVERGENCE]:
        lines.append(_options(options))
    return "\n".join(lines)


def _options(options: list[Option]) -> str:
    rows = ["| option | value | default | |", "| --- | --- | --- | --- |"]
    for o in options:
        only = f"; only with `{condition(o)}`" if o.only else ""
        rows.append(f"| `{o.name}` | {o.expects} | {o.default_text} | {_cell(o.help)}{only} |")
    return "\n".join(rows) + "\n"


def _prose(found: Loss | Weighting) -> str:
    """The docstring without its first line, as Markdown: formulas between dollars, names in backquotes."""
    text = re.sub(r":math:`([^`]*)`", lambda m: "$" + " ".join(m[1].split()) + "$", details(found))
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
    runpy.run_path(str(Path(__file__).with_name("plot_losses.py")), run_name="__main__")
