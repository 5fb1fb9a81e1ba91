"""Writes the descriptions of losses and the defaults in docs/methods.md, and plots: python docs/make_methods.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from prefopt.config.methods import METHODS
from prefopt.core.options import Option, flag
from prefopt.core.options import options as options_of
from prefopt.losses.common import WEIGHTINGS, Weighting
from prefopt.losses.declare import DERIVED, INPUTS, Loss
from prefopt.losses.parse import condition, details, families, needs
from prefopt.losses.published import published

PAGE = Path(__file__).with_name("methods.md")
MARKS = re.compile(r"(<!-- (losses|weightings|inputs|training) -->\n).*?(<!-- end -->)", re.S)
DIVERGENCE = ("divergence", "divergence_alpha")
# Method, option, default of the papers that the page names above the table, and of TRL 1.16.
TRAINING = (
    ("sft", "learning_rate", "-", "2e-5"),
    ("sft", "epochs", "-", "3"),
    ("dpo", "learning_rate", "1e-6", "1e-6"),
    ("dpo", "batch_size", "64", "8 a device"),
    ("dpo", "epochs", "-", "3"),
    ("dpo", "schedule", "constant", "linear"),
    ("dpo", "warmup", "150 steps", "0"),
    ("dpo", "max_grad_norm", "10 (its code)", "1"),
    ("dpo", "max_length", "512 (its code)", "1024"),
    ("reward", "learning_rate", "9e-6", "1e-4"),
    ("reward", "epochs", "1", "3"),
    ("reward", "centre", "0.01", "none"),
    ("ppo", "beta", "0.05", "0.05"),
    ("ppo", "learning_rate", "3e-6", "3e-6"),
    ("ppo", "adam_epsilon", "1e-5", "-"),
    ("ppo", "batch_size", "512", "-"),
    ("ppo", "ppo_epochs", "4", "4; RLOO 1"),
    ("ppo", "minibatches", "1", "1"),
    ("ppo", "clip", "0.2", "0.2"),
    ("ppo", "value_clip", "0.2", "0.2"),
    ("ppo", "value_coefficient", "0.1", "0.1"),
    ("ppo", "gamma", "1", "1"),
    ("ppo", "gae_lambda", "0.95", "0.95"),
    ("ppo", "whiten_advantages", "true", "true; RLOO false"),
    ("ppo", "temperature", "0.7", "0.7; RLOO 1"),
    ("ppo", "missing_eos_score", "-1", "none"),
)
TITLE = "{name}: the loss on the left, its gradient on the right"


def written(page: str) -> str:
    """The page with the text between its marks made from the declarations."""
    weightings = "\n".join(_section(w) for w in WEIGHTINGS.values())
    parts = {"losses": _losses(), "weightings": weightings, "inputs": _inputs(), "training": _training()}
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


def _training() -> str:
    rows = ["| method | option | default | paper | TRL |", "| --- | --- | --- | --- | --- |"]
    known = {name: {o.name: o for o in options_of(method.config)} for name, method in METHODS.items()}
    for method, option, paper, trl in TRAINING:
        rows.append(f"| {method} | `{flag(option)}` | {known[method][option].default_text} | {paper} | {trl} |")
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
        lines.append(_options(found.name, options))
    return "\n".join(lines)


def _options(name: str, options: list[Option]) -> str:
    rows = ["| option | value | default | paper | TRL | |", "| --- | --- | --- | --- | --- | --- |"]
    for o in options:
        only = f"; only with `{condition(o)}`" if o.only else ""
        elsewhere = " | ".join(_cell(text or "-") for text in published(name, o.name))
        rows.append(f"| `{o.name}` | {o.expects} | {o.default_text} | {elsewhere} | {_cell(o.help)}{only} |")
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
