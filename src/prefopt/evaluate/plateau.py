"""Whether a training had stopped raising a reward: prefopt's own test, by what its last steps still gave.

>>> around = np.linspace(-0.1, 0.1, 40)
>>> plateau(0.6 + 0 * around, 0.6 + around, start=0.2, steps=20, share=0.2).told
'plateau'
>>> plateau(0.4 + 0 * around, 0.6 + around, start=0.2, steps=20, share=0.2).told
'still rising'
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prefopt.evaluate.frontier import Plateau
from prefopt.interval import mean_interval


def plateau(before_P: npt.ArrayLike, after_P: npt.ArrayLike, *, start: float, steps: int, share: float) -> Plateau:
    """From the mean reward of each prompt [prompts] ``steps`` before the end of a training, and at its end.

    A test of equivalence: the reward has reached a plateau where even the upper bound of its rise over these steps (95
    % interval of the mean difference, prompts resampled) is below ``share`` of the climb, from ``start`` where the
    training began to its end, and it does not surely fall by as much. That no rise can be seen in the noise is not
    enough. Prompts are those that were not trained on, the same ones twice, so that what differs between them is not
    in the way. Raises ``ValueError`` for fewer than two.
    """
    before, after = np.asarray(before_P, np.float64), np.asarray(after_P, np.float64)
    rise = mean_interval(after - before)
    climb = float(after.mean()) - start
    small = share * climb
    reached = rise.high < small and (rise.high >= 0 or rise.low > -small)
    return Plateau(rise.mean, rise.low, rise.high, climb, steps, bool(reached), share)
