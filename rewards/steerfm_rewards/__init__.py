"""First-party rewards. They enter `steerfm` by entry points (group ``steerfm.rewards``), as anyone's do.

>>> steerfm.reward("classifier", target="Bag")
>>> 1.0 * steerfm.reward("brightness") + 0.2 * steerfm.reward("sharpness")
"""
