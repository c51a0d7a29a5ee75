"""Contract tests for user code: rewards, models, methods and data.

>>> from steerfm.testing import check_reward
>>> def test_my_reward():                        # in pytest; in a notebook, only the next line
...     check_reward(my_reward)

A check returns silently if the contract holds. Otherwise it raises a `ContractError`, an AssertionError with the violation and
its fix in one sentence.
"""

from steerfm.testing.contract import ContractError
from steerfm.testing.data import check_data
from steerfm.testing.methods import check_method
from steerfm.testing.models import check_model
from steerfm.testing.rewards import check_reward

__all__ = ["ContractError", "check_data", "check_method", "check_model", "check_reward"]
