"""Contract tests for what others write: rewards, models, methods and data.

>>> from steerfm.testing import check_reward
>>> def test_my_reward():                        # in pytest; in a notebook, the line alone
...     check_reward(my_reward)

Each check is silent where the contract holds. Where it does not, it raises a `ContractError`, an AssertionError whose message
says in one sentence what is wrong and how to mend it.
"""

from steerfm.testing.contract import ContractError
from steerfm.testing.data import check_data
from steerfm.testing.methods import check_method
from steerfm.testing.models import check_model
from steerfm.testing.rewards import check_reward

__all__ = ["ContractError", "check_data", "check_method", "check_model", "check_reward"]
