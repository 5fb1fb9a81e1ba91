"""``prefopt completion SHELL``: a script that completes commands, options and their choices without starting Python."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.cli.verbs import VERBS, options_of, verbs_below
from prefopt.config.tools import CompletionConfig
from prefopt.core.terminal import tell

HELP = "--help"

BASH = """\
# bash: prefopt completion bash > ~/.local/share/bash-completion/completions/prefopt
_prefopt() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local verb="${{COMP_WORDS[1]}}" place=1 found=""
    case "$verb" in
        {groups}) verb="$verb ${{COMP_WORDS[2]}}"; place=2 ;;
    esac
    if [[ $COMP_CWORD -le $place ]]; then
        case "$COMP_CWORD/${{COMP_WORDS[1]}}" in
            1/*) found="{first}" ;;
{inner}
        esac
        COMPREPLY=($(compgen -W "$found" -- "$current"))
        return
    fi
    case "$verb/$previous" in
{choices}
    esac
    if [[ -n "$found" && "$current" != -* ]]; then
        COMPREPLY=($(compgen -W "$found" -- "$current"))
    elif [[ "$current" == -* ]]; then
        case "$verb" in
{flags}
        esac
        COMPREPLY=($(compgen -W "$found" -- "$current"))
    else
        COMPREPLY=()  # files
    fi
}}
complete -o bashdefault -o default -F _prefopt prefopt
"""

ZSH = """\
# zsh, in ~/.zshrc after compinit: source <(prefopt completion zsh)
autoload -U +X bashcompinit && bashcompinit
"""


def completion(config: CompletionConfig) -> int:
    """Print the script for ``config.shell``."""
    if config.shell == "fish":
        tell("\n".join(fish()))
    else:
        tell((ZSH if config.shell == "zsh" else "") + bash(), end="")
    return 0


def bash() -> str:
    """The script for bash; zsh runs it too."""
    deep, prefixes = " " * 12, [*groups(), "help"]
    inner = [f'{deep}2/{group}) found="{" ".join(_inner(group))}" ;;' for group in prefixes]
    choices = [f'        "{verb}/{before}") found="{words}" ;;' for verb, before, words in _choices()]
    flags = [f'{deep}"{verb}") found="{" ".join([*options_of(verb), HELP])}" ;;' for verb in VERBS]
    return BASH.format(
        groups="|".join(prefixes),
        first=" ".join(first_words()),
        inner="\n".join(inner),
        choices="\n".join(choices),
        flags="\n".join(flags),
    )


def fish() -> Iterator[str]:
    """The lines of the script for fish, with the help of each option."""
    yield "# fish: prefopt completion fish > ~/.config/fish/completions/prefopt.fish"
    for word in first_words():
        about = VERBS[word].help if word in VERBS else ", ".join(_inner(word))
        yield f"complete -c prefopt -n __fish_use_subcommand -f -a {word} -d {_quoted(about)}"
    for verb in VERBS:
        group, _, name = verb.rpartition(" ")
        seen = "; and ".join(map(_seen, verb.split()))
        if group:
            alone = f"{_seen(group)}; and not {_seen(' '.join(_inner(group)))}"
            yield f"complete -c prefopt -n {_quoted(alone)} -f -a {name} -d {_quoted(VERBS[verb].help)}"
        for o in options_of(verb).values():
            words = " ".join(o.choices)
            if words and o.positional:
                yield f"complete -c prefopt -n {_quoted(seen)} -f -a {_quoted(words)}"
            values = f" -x -a {_quoted(words)}" if words else "" if bool in o.kinds else " -r"
            yield f"complete -c prefopt -n {_quoted(seen)} -l {o.flag[2:]}{values} -d {_quoted(o.help)}"


def _seen(words: str) -> str:
    """Fish's condition that one of the words is on the line."""
    return f"__fish_seen_subcommand_from {words}"


def groups() -> list[str]:
    """The first words of commands of two words."""
    return list(dict.fromkeys(verb.split()[0] for verb in VERBS if " " in verb))


def first_words() -> list[str]:
    return [*dict.fromkeys(verb.split()[0] for verb in VERBS), "help"]


def _inner(group: str) -> list[str]:
    """The words that may follow a first word."""
    if group == "help":
        return list(dict.fromkeys(verb.split()[0] for verb in VERBS))
    return [verb.split()[1] for verb in verbs_below(group)]


def _choices() -> Iterator[tuple[str, str, str]]:
    """The words behind which a value from a list follows: a command and an option, or a command alone."""
    for verb in VERBS:
        for o in options_of(verb).values():
            if o.choices:
                yield verb, o.flag, " ".join(o.choices)
                if o.positional:
                    yield verb, verb.split()[-1], " ".join(o.choices)


def _quoted(text: str) -> str:
    """Text for fish, in single quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
