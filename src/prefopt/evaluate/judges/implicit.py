"""The reward that a preference-trained model implies: how much likelier a response is to it than to its reference."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.data.group import Group
from prefopt.errors import ModelError
from prefopt.evaluate.judges.judge import Question, by_score
from prefopt.evaluate.samples import log_probabilities
from prefopt.generate.loaded import SampledModel, renderer_for
from prefopt.studies.votes import Vote


class ImplicitJudge:
    """Prefers what ``policy`` makes likelier against ``reference``; beta scales both sides and decides nothing."""

    def __init__(self, policy: str, reference: str, *, device: str | None, dtype: str) -> None:
        """Raises :class:`ModelError` where a model cannot be loaded, or the two do not share their tokens."""
        self._models = [SampledModel(name, device=device, dtype=dtype) for name in (policy, reference)]
        self.name = f"implicit:{policy},{reference}"
        first, second = (model.tokenizer.get_vocab() for model in self._models)
        if first != second:
            raise ModelError(f"--judge {self.name}: the two have other tokens; an implied reward compares one text")

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`prefopt.evaluate.judges.judge.Judge`. Raises :class:`DataError` where one cannot be rendered."""
        groups = self._groups(questions)
        policy, reference = (log_probabilities(model, groups) for model in self._models)
        ratio = policy - reference
        return [by_score(float(a), float(b)) for a, b in zip(ratio[::2], ratio[1::2], strict=True)]

    def _groups(self, questions: Sequence[Question]) -> list[Group]:
        """Responses rendered as the policy was trained: its tokenizer and chat template."""
        renderer = renderer_for(self._models[0].tokenizer)
        return [renderer.render(q.pair).group for q in questions]
