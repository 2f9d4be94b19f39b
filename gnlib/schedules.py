"""Learning rate over inner steps, as a share of its peak (arXiv 2510.09378, section 3.3).

With T outer steps of N inner steps, c(s) = final + (1 - final) (1 + cos(pi s)) / 2 for s in [0, 1]:

    constant               1
    global_cosine          c over all T N inner steps
    global_inner_cosine    c over the outer steps, times a cosine inside each outer step
    constant_inner_cosine  a cosine inside each outer step, the same in all

A baseline is the case N = 1, where global_cosine is the usual cosine over steps.
"""

from __future__ import annotations

import math

from gnlib.config import InnerConfig

WITHOUT_LENGTH = ("constant", "constant_inner_cosine")
"""Those that do not depend on the number of outer steps."""


def learning_rate_factor(inner: InnerConfig, outer_step: int, inner_step: int, outer_steps: int) -> float:
    """Factor on the peak learning rate for the inner step about to be taken; steps count from 0.

    The first step after warm-up is at the peak, and the step after the last would be at `final`.
    """
    done = outer_step * inner.steps + inner_step
    warming = min(1.0, (done + 1) / (inner.warmup + 1))
    total = outer_steps * inner.steps
    if inner.schedule == "constant":
        return warming
    if inner.schedule == "global_cosine":
        cooling = _cosine(max(0, done - inner.warmup) / max(1, total - inner.warmup), inner.final)
    elif inner.schedule == "global_inner_cosine":
        cooling = _cosine(outer_step / outer_steps, inner.final) * _cosine(inner_step / inner.steps, inner.final)
    else:
        cooling = _cosine(inner_step / inner.steps, inner.final)
    return warming * cooling


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
