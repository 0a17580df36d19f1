"""The numbers around a budget of divergence: what counts as kept, and what training and merging aim at.

All are multiples of the budget; docs/decisions/0015 says why.
"""

KEPT_UP_TO = 1.1  # the final divergence is at most this
USED_UP_FROM = 0.8  # and at least this, or the budget was not needed in full
STEERED_TO = 1.1  # lambda aims here: merging takes back what is over, but nothing brings back what was not used
MERGED_TO = 0.95  # merging aims at the middle between USED_UP_FROM and KEPT_UP_TO
