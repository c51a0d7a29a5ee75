"""A reward in three lines: how blue a picture is.

steerfm steer model=emoji prompt="a heart" reward=examples/blue.py:blue strength=5 n=6
"""


def blue(pictures):
    """Blueness of pictures (b, 3, h, w) in [0, 1], as (b,)."""
    r, g, b = pictures.mean((2, 3)).unbind(1)
    return 10 * b - 5 * r - 5 * g
