"""What README and docs say exists, and what exists is said there."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import prefopt
from prefopt import cli
from prefopt.config.compare import CompareConfig
from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import RlhfConfig
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.sft import SftConfig
from prefopt.core.options import options

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "online": OnlineConfig,
    "sample": SampleConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "rlhf": RlhfConfig,
    "compare": CompareConfig,
}  # functions of prefopt, and what their keywords fill
SHELL = {"bash", "sh", "shell", "console"}
UNCHECKED = {"text", "json", "jsonl", "html", "mermaid", "makefile", "toml"}
FLAGS = {"--help", "-h"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text."""

    place: str
    language: str
    text: str


def pages(root: Path) -> list[Path]:
    translated = sorted(root.glob("README.*.md"))
    return [root / "README.md", *sorted((root / "docs").rglob("*.md")), *translated]


def blocks(path: Path) -> list[Block]:
    found = []
    opening: tuple[int, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line)
        if opening is None and fence:
            opening, body = (number, fence[1], fence[2].lower()), []
        elif opening is not None and fence and fence[1].startswith(opening[1]) and not fence[2]:
            found.append(Block(f"{path.name}:{opening[0]}", opening[2], "\n".join(body)))
            opening = None
        else:
            body.append(line)
    assert opening is None, f"{path.name}:{opening[0]}: the block is never closed"
    return found


def flags_of(verb: str) -> set[str]:
    named = {o.flag for o in options(cli.VERBS[verb].config)}
    return named | FLAGS | ({"--config", "--print-config"} if cli.VERBS[verb].yaml else set())


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, word by word: continued lines joined, pipes and lists taken apart."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(re.sub(r"^\s*\$ ", "", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;()"):
                yield command
                command = []
            else:
                command.append(word)
        yield command


def shell_problems(block: Block, targets: set[str]) -> Iterator[str]:
    for words in commands(block.text):
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words[:3] in (["python", "-m", "prefopt"], ["python3", "-m", "prefopt"]):
            words = ["prefopt", *words[3:]]
        if not words:
            continue
        if Path(words[0]).name == "prefopt":
            yield from command_problems(block.place, words[1:])
        elif words[0] == "make":
            wanted = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
            yield from (f"{block.place}: make has no target {w}" for w in wanted if w not in targets)
        elif Path(words[0]).name in ("python", "python3") and words[1:] and words[1].endswith(".py"):
            yield from (f"{block.place}: there is no {script}" for script in words[1:2] if not (ROOT / script).exists())


def command_problems(place: str, words: list[str]) -> Iterator[str]:
    if words in (["--version"], ["--help"], ["-h"]):
        return
    verb = next((v for n in (2, 1) if (v := " ".join(words[:n])) in cli.VERBS), None)
    if verb is None:
        yield f"{place}: prefopt has no command {' '.join(words[:2])!r}"
        return
    if verb == "launch" and "--" in words:  # what is behind it is a command of its own
        cut = words.index("--")
        yield from command_problems(place, words[cut + 1 :])
        words = words[:cut]
    for word in words[len(verb.split()) :]:
        flag = word.partition("=")[0]
        if flag.startswith("-") and not re.match(r"-[\d.]", flag) and flag not in flags_of(verb):
            yield f"{place}: prefopt {verb} has no option {flag}"


def python_problems(block: Block) -> Iterator[str]:
    source = block.text
    if ">>> " in source:
        source = "\n".join(e.source for e in doctest.DocTestParser().get_examples(source))
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"{block.place}: {error.msg} at its line {error.lineno}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prefopt":
            module = importlib.import_module(str(node.module))
            names = [a.name for a in node.names if not hasattr(module, a.name)]
            yield from (f"{block.place}: {node.module} has no {name}" for name in names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "prefopt":
            if not hasattr(prefopt, node.attr):
                yield f"{block.place}: prefopt has no {node.attr}"
            continue
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).removeprefix("prefopt.") in CONFIGS:
            name = name.removeprefix("prefopt.")
            known = {f.name for f in dataclasses.fields(CONFIGS[name])}
            known |= set(inspect.signature(getattr(prefopt, name)).parameters)
            given = [k.arg for k in node.keywords if k.arg is not None]
            yield from (f"{block.place}: prefopt.{name} has no {key}" for key in given if key not in known)


def yaml_problems(block: Block) -> Iterator[str]:
    """Files of options: every name in them is one."""
    known = {o.name for verb in cli.VERBS.values() if verb.yaml for o in options(verb.config)}
    values = yaml.safe_load(block.text)
    names = list(values) if isinstance(values, dict) else []
    if not names:
        yield f"{block.place}: no options in this YAML"
    yield from (f"{block.place}: no command has an option {n}" for n in names if str(n).replace("-", "_") not in known)


def link_problems(path: Path, root: Path) -> Iterator[str]:
    text = re.sub(r"^\s*(```|~~~).*?^\s*\1\s*$", "", path.read_text("utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)[^)]*\)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.M)
    for target in targets:
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or not file.is_relative_to(root.resolve()):
            yield f"{path.name}: the link {target} leads nowhere"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{path.name}: {target}: that page has no such heading"


def file_problems(path: Path) -> Iterator[str]:
    """Python files named with their folder are in the repository or in the package."""
    for name in re.findall(r"`((?:[\w-]+/)+\w+\.py)`", path.read_text("utf-8")):
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "src/prefopt")):
            yield f"{path.name}: there is no {name}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", path.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def unsaid(root: Path) -> Iterator[str]:
    """Commands and options that the docs do not mention."""
    text = "\n".join(page.read_text("utf-8") for page in pages(root) if not page.name.startswith("README"))
    for verb in cli.VERBS:
        if not re.search(rf"\bprefopt {verb}\b", text):
            yield f"docs do not mention prefopt {verb}"
        for flag in sorted(flags_of(verb) - FLAGS):
            if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text):
                yield f"docs do not mention {flag} of prefopt {verb}"


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.M))


def problems(root: Path) -> Iterator[str]:
    """All that is wrong with README and docs."""
    targets = make_targets((ROOT / "Makefile").read_text("utf-8"))
    checks: dict[str, Callable[[Block], Iterator[str]]] = {
        **dict.fromkeys(SHELL, lambda block: shell_problems(block, targets)),
        **dict.fromkeys(("python", "pycon"), python_problems),
        "yaml": yaml_problems,
    }
    for page in pages(root):
        if not page.exists():
            yield f"there is no {page.name}"
            continue
        yield from link_problems(page, root)
        yield from file_problems(page)
        for block in blocks(page):
            if block.language in checks:
                yield from checks[block.language](block)
            elif block.language not in UNCHECKED:
                yield f"{block.place}: no check knows a block in {block.language!r}; text is for what is no code"


def test_what_is_written_exists() -> None:
    found = list(problems(ROOT))
    assert not found, "\n".join(found)


def test_what_exists_is_written() -> None:
    found = list(unsaid(ROOT))
    assert not found, "\n".join(found)


def test_every_decision_has_a_number_of_its_own_and_is_listed() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert len({p.name[:4] for p in pages}) == len(pages)
    assert all(p.read_text("utf-8").startswith(f"# {p.name[:4]}: ") for p in pages)
    listed = (ROOT / "docs/architecture.md").read_text("utf-8")
    assert all(f"](decisions/{p.name})" in listed for p in pages)


def test_readme_reaches_a_working_command_within_a_screen() -> None:
    screen = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:40])
    assert re.search(r"```bash\n(?:.*\n)*?.*\bmake demo\b", screen)


def test_chinese_pages_say_the_same() -> None:
    """Blocks, links, headings, names, formulas and numbers; sentences are a translator's."""
    translations = [*ROOT.glob("*.zh-CN.md"), *(ROOT / "docs").rglob("*.zh-CN.md")]
    assert len(translations) == 3
    for two in translations:
        one = two.with_name(two.name.replace(".zh-CN", ""))
        assert [(b.language, b.text) for b in blocks(one)] == [(b.language, b.text) for b in blocks(two)]
        for mine, translated in zip(skeleton(one), skeleton(two), strict=True):
            assert mine == translated, two.name


def skeleton(path: Path) -> Iterator[list[Any]]:
    """What a translation keeps: links, levels of headings, code, formulas, and numbers of two digits and more."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    # A page that is there in Chinese too is linked in Chinese.
    links = [target.replace(".zh-CN.md", ".md") for target in re.findall(r"\]\(([^)]+)\)", text)]
    yield sorted(target for target in links if target != path.name.replace(".zh-CN", ""))
    yield [len(heading) for heading in re.findall(r"^(#+) ", text, flags=re.M)]
    yield sorted(set(re.findall(r"`([^`]+)`", text)))
    formulas = re.findall(r"\$\$(.*?)\$\$", text, flags=re.S)
    yield [re.sub(r"\\ \\text\{.*?\}|[.,]$", "", formula) for formula in formulas]
    yield sorted(set(re.findall(r"\d[\d.]*\d", text)))


PLANTED = {
    "unknown command": "```bash\nprefopt dpoo --model m\n```",
    "unknown option": "```bash\nprefopt dpo --model m \\\n  --betta 1\n```",
    "option of another command": "```bash\n.venv/bin/prefopt cache list --repair\n```",
    "option of a launched command": "```bash\nprefopt launch --gpus 2 -- dpo --betta 1\n```",
    "option behind a pipe": "```bash\necho x | PREFOPT_CACHE=c prefopt demo --beta 1\n```",
    "in a console block": "```console\n$ prefopt dpo --lerning-rate 1\n```",
    "make target": "```bash\nmake tests\n```",
    "script": "```bash\npython examples/none.py\n```",
    "python syntax": "```python\nprefopt.dpo(\n```",
    "keyword": "```python\nimport prefopt\nprefopt.dpo(model='m', data='d', output='o', betta=1)\n```",
    "keyword after a prompt": "```python\n>>> import prefopt\n>>> prefopt.dpo('m', 'd', output='o', betta=1)\n```",
    "function": "```python\nimport prefopt\nprefopt.dqo()\n```",
    "import": "```python\nfrom prefopt.errors import NoError\n```",
    "yaml key": "```yaml\nmodel: m\nbetta: 1\n```",
    "language": "```pyton\nx = 1\n```",
    "link": "see [this](docs/none.md)",
    "link by reference": "see [this]\n\n[this]: docs/none.md",
    "anchor": "see [this](#none)",
    "file": "see `train/none.py`",
}


def test_a_planted_mistake_is_found(tmp_path: Path) -> None:
    for mistake, text in PLANTED.items():
        (tmp_path / "README.md").write_text(f"# Title\n\n{text}\n", "utf-8")
        assert len(list(problems(tmp_path))) == 1, mistake


def test_what_is_right_passes(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# The page: one\n", "utf-8")
    (tmp_path / "README.md").write_text(
        "# Title\n\n[a](docs/a.md#the-page-one) [b](https://example.org) [c](#title)\n\n"
        "```bash\nmake demo && make test PYTHON=python3.12   # both\nprefopt dpo --model m --data a b \\\n"
        "  --learning-rate=1e-6 --config c.yaml\nprefopt cache clear --older-than 30\nprefopt --version\n```\n\n"
        "```python\nimport prefopt\nprefopt.dpo(model='m', tokenizer=None, data=[], output='o', beta=1)\n```\n\n"
        "```yaml\nmax-length: 3\nbeta: 1\n```\n",
        "utf-8",
    )
    assert list(problems(tmp_path)) == []


def test_an_option_that_docs_leave_out_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("--beta", "utf-8")
    every = [f"prefopt {verb} {flag}\n" for verb in cli.VERBS for flag in flags_of(verb) - {"--beta"}]
    (tmp_path / "docs" / "a.md").write_text("".join(every) + "--beta2 --adam-beta", "utf-8")
    those = [verb for verb in cli.VERBS if "--beta" in flags_of(verb)]
    assert list(unsaid(tmp_path)) == [f"docs do not mention --beta of prefopt {verb}" for verb in those]
