"""Policy gradients on groups of responses: RLOO, GRPO with its corrections, DAPO and GSPO, as one objective."""

from __future__ import annotations

import torch

from prefopt.config.online import OnlineConfig
from prefopt.losses.rl import averaged_tokens, averaging_weight, k3, owners, per_response, policy_loss
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, Scorer, response_sums
from prefopt.rl.critic import look
from prefopt.rl.objective import counted, ratio_metrics, without_squares
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, LossResult
from prefopt.train.columns import Values
from prefopt.train.objective import Normaliser, Objective


class PolicyGradient(Objective):
    """The clipped loss of responses or tokens and, if configured, beta times k3 of every token.

    Columns: ``old_logp_M``, ``advantage_N`` and, for k3, ``ref_logp_M``; ``importance_M`` multiplies the advantages of
    tokens, where other weights drew them. The ratio is that of a whole response for RLOO
    (Ahmadian et al. 2024, arXiv 2402.14740), its root by the number of tokens for GSPO (Zheng et al. 2025, arXiv
    2507.18071, equation 7), else that of each token, with the advantage of its response.
    """

    def __init__(self, config: OnlineConfig, *, device: torch.device) -> None:
        super().__init__(device)
        self.config = config
        assert config.clip is not None and config.beta is not None
        self._clip, self._beta = config.clip, config.beta if config.kl == "loss" else 0.0

    def normaliser(self, batch: Batch) -> Normaliser:
        """The number of responses, or of tokens, that the loss is a mean over."""
        return (averaging_weight(torch.from_numpy(batch.length_N), self.config.average or "rows"),)

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """Log-probabilities ``logp_M`` at the temperature; where ratios are of responses also their sums ``logp_N``."""
        assert isinstance(scorer, Scorer)
        logp_M, _ = look(scorer, None, self.config.temperature, packed)
        if self.config.average is not None:
            return {"logp_M": logp_M}
        old_M = batch.on_device(logp_M.device)["old_logp_M"].to(logp_M.dtype)
        sums = {"logp_N": response_sums(logp_M, packed), "old_logp_N": response_sums(old_M, packed)}
        return {"logp_M": logp_M, **sums}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        config, logp_M, weight = self.config, values["logp_M"], float(normaliser[0])
        columns = batch.on_device(logp_M.device)
        old_M, length_N = columns["old_logp_M"].to(logp_M.dtype), columns["length_N"]
        if config.average is None:
            many_N = length_N.double() if config.loss == "gspo" else torch.ones_like(length_N).double()
            new_N, old_N = (values[name] / many_N.to(values[name].dtype) for name in ("logp_N", "old_logp_N"))
            policy = policy_loss(new_N, old_N, columns["advantage_N"].to(new_N.dtype), self._clip, config.clip_high)
            loss = policy.numerator.sum() / weight
        else:
            advantage_M = columns["advantage_N"].to(logp_M.dtype)[owners(length_N)]
            if "importance_M" in columns:
                advantage_M = advantage_M * columns["importance_M"].to(logp_M.dtype)
            policy = policy_loss(logp_M, old_M, advantage_M, self._clip, config.clip_high)
            loss = self._mean(policy.numerator, length_N) / weight
        shares, total = {"loss/policy_avg": loss}, loss
        metrics = {"policy/clipfrac_avg": counted(policy.clipped)}
        if self._beta:
            kl_M = k3(logp_M - columns["ref_logp_M"].to(logp_M.dtype))
            shares["loss/kl_avg"] = self._mean(kl_M, length_N) / weight
            total = loss + self._beta * shares["loss/kl_avg"]
        with torch.no_grad():
            metrics |= ratio_metrics(logp_M, old_M)
        return LossResult(total, {"loss": total, **shares}, metrics)

    def _mean(self, loss_M: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
        """Losses of tokens, summed as the policy's are: RLOO's over each response, GSPO's as means over its tokens."""
        if self.config.loss == "rloo":
            return per_response(loss_M, length_N).sum()
        return averaged_tokens(loss_M, length_N, self.config.average or "rows", self.config.max_new_tokens).sum()

    def derived(self, record: Record) -> Record:
        """With the variance of the ratio in place of averages of squares."""
        return without_squares(record)
