"""One look a name: the colour, marker and line of a method in every plot, whatever is drawn beside it and in what order."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

COLOURS = (
    "#0072b2", "#cc4400", "#117733", "#aa3377", "#4ea5d9",
    "#c29200", "#332288", "#cc6677", "#00a087", "#6b2d0f",
)  # fmt: skip
"""Ten that differ in lightness as well as in hue, for readers who see no red or no green."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "d", "8")
LINES = ("-", "--", "-.", ":")
OWN_MARKERS = ("*", "H", (3, 1, 0), (4, 1, 0), (6, 1, 0), (8, 1, 0), (3, 1, 180), (4, 1, 45))
"""Of names that are not below, so that none of them is taken for a method."""
NAMES = (
    "funnel", "feynman_kac", "fmrg_j", "fmrg_e", "das", "multi_round", "rbf", "reno", "tds", "svdd",
    "fk_steering", "fmtt", "diamond_smc", "dps", "lgd_mc", "freedom", "mpgd", "mfm_g", "mfm_gf", "weighted_diamond",
    "beam", "fmtt_search", "code", "tree_search", "d_flow", "random_search", "zero_order", "steering",
    "direct", "weighted", "policy", "adjoint", "noise", "tuned", "as learnt", "distil",
    "draft", "draft_k", "draft_lv", "alignprop", "refl", "drtune", "orw_cfm", "flow_grpo", "ddpo", "nft",
    "steered", "value", "data", "parallel_tempering", "noise_tilt", "seed_pruning", "drafts",
)  # fmt: skip
"""Steering methods, fine-tuning methods and what else is drawn. New names go to the end: a look is a place in this list."""


@dataclass(frozen=True)
class Look:
    """How a line or point is drawn: names of matplotlib."""

    colour: str
    marker: str | tuple[int, int, int]
    line: str


FIXED = {"base": Look("#6b7785", "o", ":"), "best_of_n": Look("#000000", "o", "-")}
"""What everything is held against: grey and black are nobody else's."""
ALIASES = {"unsteered": "base", "unsteered, 4 jumps": "base", "best of n": "best_of_n", "tuning": "tuned", "tune": "tuned"}


def look(label: str) -> Look:
    """The look of a label.

    A method has that of its name. What is said of it changes the marker and the line and leaves the colour: ``tuned, 4 jumps``
    has that of ``tuned``, ``tuned (direct), 4 jumps`` of ``direct``, ``base, best of 16`` of ``best_of_n``. Another label has
    a look that its letters alone decide.
    """
    name = subject(label)
    number, colour = divmod(zlib.crc32(label.encode()), len(COLOURS))
    number, marker = divmod(number, len(OWN_MARKERS))
    own = Look(COLOURS[colour], OWN_MARKERS[marker], LINES[number % len(LINES)])
    if name in FIXED:
        known = FIXED[name]
    elif name in NAMES:
        place = NAMES.index(name)
        colour, turn = place % len(COLOURS), place // len(COLOURS)
        known = Look(COLOURS[colour], MARKERS[(colour + 4 * turn) % len(MARKERS)], LINES[turn % len(LINES)])
    else:
        return own
    return known if ALIASES.get(label, label) == name else replace(own, colour=known.colour)


def subject(label: str) -> str:
    """The name in `NAMES` or `FIXED` of which a label speaks, or the label itself."""
    if re.search(r"\bbest[ _]of[ _](\d+|n)\b", label):
        return "best_of_n"
    inside = re.search(r"\((\w+)\)", label)
    parts = label, inside[1] if inside else label, re.split(r"[,:(]", label)[0].strip()
    names = [ALIASES.get(part, part) for part in parts]
    return next((name for name in names if name in FIXED or name in NAMES), label)
