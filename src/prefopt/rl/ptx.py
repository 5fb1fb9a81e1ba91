"""The pre-training term of reinforcement learning: some likelihood of given texts beside the reward (PPO-ptx)."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.ppo import PpoConfig
from prefopt.core.terminal import Reporter
from prefopt.data.chat.render_options import Rendering, parse_variables
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable
from prefopt.data.tokenizer import Tokenizer
from prefopt.model.load import vocabulary_size
from prefopt.model.packed_model import causal_model
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.reference import check_vocabulary


@dataclass(frozen=True, slots=True)
class PtxTerm:
    """``coefficient`` times the negative log-likelihood of the rows of an update, added to the actor's loss.

    The second term of equation 2 of Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155): it keeps what the model could
    do before, which the reward does not ask for. The mean is over the trained tokens of all rows of an update, as the
    clipped loss of PPO is a mean over the tokens of a minibatch; log-probabilities are those at temperature 1. Which
    rows an update takes is a function of the seed and of the update's number.
    """

    groups: GroupTable
    order: BatchSampler
    coefficient: float
    objective: LikelihoodObjective

    @property
    def largest(self) -> Group:
        """The row that takes most memory."""
        return self.groups[int(self.groups.tokens_G.argmax())]

    def batch(self, update: int) -> Batch:
        """The rows of an update, which counts optimiser steps from 0."""
        return Batch([self.groups[i] for i in self.order.batch(update).tolist()])


def read_ptx(
    config: PpoConfig,
    tokenizer: Tokenizer,
    context: int | None,
    scorer: Scorer,
    reporter: Reporter,
) -> PtxTerm | None:
    """The term of ``config.ptx_data``, read as ``prefopt sft`` reads its data; none where there is no such option.

    Texts without a prompt are cut into windows of the model's context, or of 1024 tokens where that is longer; other
    rows are truncated to as much. Raises :class:`prefopt.errors.DataError` as :func:`load_groups`, and
    :class:`prefopt.errors.ModelError` where the tokenizer has tokens that the model has not.
    """
    if config.ptx_data is None:
        return None
    assert config.ptx_coefficient is not None and config.ptx_batch_size is not None
    variables = parse_variables(config.template_variables or ())
    ends = tokenizer.eos_token_id is not None
    rendering = Rendering(sequence_limit(None, context), ends, variables=variables, windows=True)
    source = load_groups(
        config.ptx_data,
        tokenizer,
        rendering,
        kind="demonstrations",
        on_bad_row=config.on_bad_row,
        workers=config.threads,
        reporter=reporter,
    )
    for line in source.summary():
        reporter.say(f"ptx data: {line}")
    groups, model = source.groups, scorer.model
    check_vocabulary(groups, vocabulary_size(causal_model(model)), config.model)
    order = BatchSampler(len(groups), config.ptx_batch_size, seed=config.seed, shuffle=config.shuffle)
    objective = LikelihoodObjective("tokens", device=next(model.parameters()).device)
    return PtxTerm(groups, order, config.ptx_coefficient, objective)
