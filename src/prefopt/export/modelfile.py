"""Ollama's Modelfile: the chat template in Go's template language, where it can be written in it, and end tokens.

A Jinja template is a program. What most of them compute is a frame around every turn, by role, so the frames are read
off conversations that the template renders; then other conversations are put together from the frames, and only where
they come out the same is a Go template written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefopt.data.chat.spans import common_end
from prefopt.data.chat.template import ChatTemplate, Rendering, Unrenderable
from prefopt.data.tokenizer import Tokenizer, leading_ids
from prefopt.records import Message

Frame = tuple[str, str]
"""The text before a turn's content, and behind it."""
MOST_CONTEXT = 8192
"""Positions that a Modelfile asks for where the model has more: keys and values of all of them are allocated."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Frames:
    """What a chat template puts around turns.

    ``start``: before the first turn of a conversation without a system turn, such as a system turn of the template's
    own. ``gap``: between two turns, and before an answer that is asked for. ``system``: None where the template takes
    none; ``inside``: the system turn is inside the first user turn, behind that turn's beginning. ``generation``: what
    an answer is asked for with.
    """

    start: str
    user: Frame
    assistant: Frame
    generation: str
    gap: str = ""
    system: Frame | None = None
    inside: bool = False

    def text(self, turns: Sequence[Message]) -> str:
        """A conversation in these frames, with the generation prompt."""
        told = [turn.content for turn in turns if turn.role == "system"]
        parts = [] if told else [self.start]
        for i, turn in enumerate(turns):
            parts += [self.gap] * (i > 0)
            if turn.role == "system":
                parts += [] if self.inside or self.system is None else [self.system[0], turn.content, self.system[1]]
                continue
            before, behind = self.user if turn.role == "user" else self.assistant
            parts.append(before)
            if self.inside and self.system is not None and told and i == 1:
                parts += [self.system[0], told[0], self.system[1]]
            parts += [turn.content, behind]
        return "".join(parts) + self.gap + self.generation

    def go_template(self) -> str | None:
        """The frames in Go's template language, as Ollama executes it; None where a frame has signs of its own, or the
        last one ends in a quotation mark, as a Modelfile's text does."""
        signs = ("{{", "}}", '"""')
        frames = [self.start, self.gap, *self.user, *self.assistant, self.generation, *(self.system or ())]
        if any(sign in frame for sign in signs for frame in frames):
            return None
        user, inner, system = self.user[0], "", ""
        if self.system is not None and self.inside:
            inner = (
                f"{{{{ if and $.System (eq $i 1) }}}}{self.system[0]}{{{{ $.System }}}}{self.system[1]}{{{{ end }}}}"
            )
        elif self.system is not None:
            system = (
                f'{{{{ if eq $m.Role "system" }}}}{self.system[0]}{{{{ $m.Content }}}}{self.system[1]}{{{{ end }}}}'
            )
        start = f"{{{{ if not .System }}}}{self.start}{{{{ end }}}}" if self.start else ""
        gap = f"{{{{ if $i }}}}{self.gap}{{{{ end }}}}" if self.gap else ""
        before, behind = self.assistant
        found = (
            f"{start}{{{{ range $i, $m := .Messages }}}}{gap}{system}"
            f'{{{{ if eq $m.Role "user" }}}}{user}{inner}{{{{ $m.Content }}}}{self.user[1]}{{{{ end }}}}'
            f'{{{{ if eq $m.Role "assistant" }}}}{before}{{{{ $m.Content }}}}{behind}{{{{ end }}}}'
            f"{{{{ end }}}}{self.gap}{self.generation}"
        )
        return None if '"""' in found or found.endswith('"') else found


def frames_of(tokenizer: Tokenizer) -> Frames | None:
    """The frames of a tokenizer's chat template, without a BOS that the tokenizer adds by itself; None where it has no
    template, or one that is more than frames. ``system`` is None where conversations with a system turn are."""
    if not tokenizer.chat_template:
        return None
    template = ChatTemplate(tokenizer, Rendering())
    lead = "".join(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer)))

    def text(*turns: Message, generation: bool = False) -> str:
        return template.apply(tuple(turns), generation=generation).removeprefix(lead)

    try:
        plain = _plain_frames(text)
        if plain is None or not _same(plain, text, with_system=False):
            return None
    except Unrenderable:
        return None
    for found in (_system_apart(plain, text), _system_inside(plain, text)):
        if found is not None and _same(found, text, with_system=True):
            return found
    return plain


_ASKED, _SAID = Message("user", "prefoptasked"), Message("assistant", "prefoptsaid")
_AGAIN, _TOLD = Message("user", "prefoptagain"), Message("system", "prefopttold")


def _plain_frames(text: Any) -> Frames | None:
    one, asked = text(_ASKED), text(_ASKED, generation=True)
    two, three = text(_ASKED, _SAID), text(_ASKED, _SAID, _AGAIN)
    if not asked.startswith(one) or any(m.content not in three for m in (_ASKED, _SAID, _AGAIN)):
        return None
    generation = asked[len(one) :]
    head, rest = three.split(_ASKED.content, 1)
    middle, rest = rest.split(_SAID.content, 1)
    between, behind = rest.split(_AGAIN.content, 1)
    closing = two.split(_SAID.content, 1)[1]
    if not middle.startswith(behind) or not between.startswith(closing):
        return None
    before, answered = between[len(closing) :], middle[len(behind) :]
    user = common_end(head, before)
    gap = before[: len(before) - len(user)]
    if not answered.startswith(gap) or not generation.startswith(gap):
        return None
    start = head[: len(head) - len(user)]
    return Frames(start, (user, behind), (answered[len(gap) :], closing), generation[len(gap) :], gap)


def _system_apart(plain: Frames, text: Any) -> Frames | None:
    """Frames with a system turn of its own."""
    found, follows = _around_system(text), plain.gap + plain.user[0]
    if found is None or not found[1].endswith(follows):
        return None
    before, behind = found
    return replace(plain, system=(before, behind[: len(behind) - len(follows)]))


def _system_inside(plain: Frames, text: Any) -> Frames | None:
    """Frames with the system turn inside the first user turn."""
    found = _around_system(text)
    if found is None or plain.gap or not found[0].startswith(plain.user[0]):
        return None
    return replace(plain, system=(found[0][len(plain.user[0]) :], found[1]), inside=True)


def _around_system(text: Any) -> Frame | None:
    try:
        whole = text(_TOLD, _ASKED)
    except Unrenderable:
        return None
    before, told, rest = whole.partition(_TOLD.content)
    behind, asked, _ = rest.partition(_ASKED.content)
    return (before, behind) if told and asked else None


def _same(frames: Frames, text: Any, *, with_system: bool) -> bool:
    """Whether conversations from the frames are those of the template."""
    turns = (_ASKED, _SAID, _AGAIN, Message("assistant", "One.\n\nTwo: {x}"), Message("user", "Why?\n- 1"))
    lead = (_TOLD,) if with_system else ()
    try:
        return all(frames.text((*lead, *turns[:n])) == text(*lead, *turns[:n], generation=True) for n in (1, 3, 5))
    except Unrenderable:
        return False


def modelfile(weights: str, frames: Frames | None, stops: Sequence[str], context: int | None, sampling: Any) -> str:
    """The text of a Modelfile for the GGUF file ``weights`` beside it. ``stops``: texts that end answers,
    each on one line; ``sampling``: the model's generation config or None."""
    lines = [f"FROM ./{weights}"]
    if frames is not None and (template := frames.go_template()) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    if context:
        lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    if getattr(sampling, "do_sample", False):
        given = {name: getattr(sampling, name, None) for name in _SAMPLING}
        lines += [f"PARAMETER {name} {value:g}" for name, value in given.items() if value is not None]
    elif getattr(sampling, "do_sample", None) is False:  # greedy, and Ollama draws by default
        lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
