"""The log Z of the weights along the path, from methods that do not give it."""

from __future__ import annotations

import copy

from steerfm.steering import Steering


def weighed(method: Steering) -> Steering:
    """The same method; its log_z is what the path's weights say: unbiased in theory, which these tests see on mild targets."""
    kind = type(method)
    method = copy.copy(method)
    object.__setattr__(method, "__class__", type(kind.__name__, (kind,), {"_log_z": lambda self, first, chain: chain}))
    return method
