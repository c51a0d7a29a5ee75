"""Network calls of every preset: the fewest that its definition allows, counted by the ledger."""

import pytest

from steerfm.cli.listing import calls_a_step
from steerfm.steering import METHODS

FEWEST = {
    # one call: the transition goes on from the look-ahead's own endpoint
    "best_of_n": "1", "feynman_kac": "1", "funnel": "1", "steering": "1", "multi_round": "1", "beam": "1",
    "noise_tilt": "1",  # X_{s,1}
    "fk_steering": "1", "mpgd": "1", "svdd": "1", "code": "1",  # the denoiser
    "tds": "1 + 1 back", "das": "1 + 1 back",  # the same, with the gradient through it
    "drafts": "1", "seed_pruning": "2.5",  # jumps of those that go on; more steps are more of them for more seeds
    # two: the look-ahead is X_{s,1} or the denoiser, the step is X_{s,t} or the velocity
    "fmrg_e": "2", "fmrg_j": "2 + 1 back", "dps": "1 + 1 back", "lgd_mc": "2 + 1 back",
    "fmtt": "2 + 1 back", "fmtt_search": "2 + 1 back",
    "freedom": "2 + 2 back",  # every step is taken twice, with one guided call each; noising back needs none
    # several endpoints: k of them by an inner ODE of n midpoint steps are 2 k n calls, and one for the step
    "diamond_smc": "8",  # k = 1, n = 4; the transition goes through the endpoint
    "mfm_g": "17 + 16 back",  # k = 4, n = 2
    "mfm_gf": "33",  # k = 8, n = 2
    "weighted_diamond": "2 + 1 back",  # a jump from where it was noised back to, and one for the step
    # searches over noise, by iterations
    "reno": "1 + 1 back", "d_flow": "4 + 4 back",  # through one jump; through four
    "random_search": "4", "zero_order": "4",  # four candidates in one jump
    "parallel_tempering": "4",  # four chains in one jump, a sweep
    "waltz": "8",  # a draw of one posterior, n = 4, a sweep
    "rbf": "as budgeted", "tree_search": "1 per particle",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_no_call_is_made_twice(name):
    assert calls_a_step(METHODS[name]()) == FEWEST[name]
