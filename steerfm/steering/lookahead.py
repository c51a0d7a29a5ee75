"""Look-aheads: where will x_t end? One signature, any number of endpoints, evaluated as one batch.

endpoints(flow_map, x, t, cond) -> Endpoints(z: (b, k, *shape), log_w: (b, k))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from steerfm import sampling
from steerfm.flowmap import Condition, FlowMap


@dataclass
class Endpoints:
    """Candidate data for every row.

    Attributes:
        z: (b, k, *shape) endpoints in model space.
        log_w: (b, k) their log-weights, up to a constant per row; None for equal weights.
    """

    z: Tensor
    log_w: Tensor | None = None


class Lookahead(Protocol):
    """Any object with this method is a look-ahead."""

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition) -> Endpoints:
        """Endpoints of x (b, *shape) at time t."""
        ...


@dataclass(frozen=True)
class Denoise:
    """z = E[x_1 | x_t = x], one endpoint, one call: blurry and off the data early on, exact at t = 1.

    What DPS (2209.14687), FK steering (2501.06848) and DAS (2501.05803) look at.
    """

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition) -> Endpoints:
        return Endpoints(flow_map.denoise(x, t, cond).unsqueeze(1))


@dataclass(frozen=True)
class Jump(sampling.Jump):
    """z = X_{t,1}(x), the sample that is going to come out (FMTT 2511.22688, FMRG 2604.27147). Also the transition.

    Args:
        hops: equal jumps from t to 1; each costs one call.
    """

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition) -> Endpoints:
        return Endpoints(flow_map.lookahead(x, t, cond, self.hops).unsqueeze(1))


def log_mean_exp(log_w: Tensor | None, values: Tensor) -> Tensor:
    """log of the weighted mean of exp(values) over the last axis: (b, k) -> (b,)."""
    if values.shape[-1] == 1:
        return values.squeeze(-1)
    if log_w is None:
        log_w = torch.zeros_like(values)
    return torch.logsumexp(log_w + values, -1) - torch.logsumexp(log_w, -1)


LOOKAHEADS: dict[str, type] = {"denoise": Denoise, "jump": Jump}
"""Look-aheads by the name that configurations use."""
