"""The colour, marker and line of each method, the same in every plot."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

COLOURS = (
    "#0072b2", "#cc4400", "#117733", "#aa3377", "#4ea5d9",
    "#c29200", "#332288", "#cc6677", "#00a087", "#6b2d0f",
)  # fmt: skip
"""Ten colours that differ in lightness as well as in hue, for colour-blind readers."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "d", "8")
LINES = ("-", "--", "-.", ":")
OWN_MARKERS = ("*", "H", (3, 1, 0), (4, 1, 0), (6, 1, 0), (8, 1, 0), (3, 1, 180), (4, 1, 45))
"""Markers of names that are not in `NAMES`, so that they cannot be mistaken for a method."""
NAMES = (
    "funnel", "feynman_kac", "fmrg_j", "fmrg_e", "das", "multi_round", "rbf", "reno", "tds", "svdd",
    "fk_steering", "fmtt", "diamond_smc", "dps", "lgd_mc", "freedom", "mpgd", "mfm_g", "mfm_gf", "weighted_diamond",
    "beam", "fmtt_search", "code", "tree_search", "d_flow", "random_search", "zero_order", "steering",
    "direct", "weighted", "policy", "adjoint", "noise", "tuned", "as learnt", "distil",
    "draft", "draft_k", "draft_lv", "alignprop", "refl", "drtune", "orw_cfm", "flow_grpo", "ddpo", "nft",
    "steered", "value", "data", "parallel_tempering", "noise_tilt", "seed_pruning", "drafts",
    "waltz", "posterior", "posterior_free", "forward", "meanflow_nft", "awm",
)  # fmt: skip
"""Methods and other names in plots. Append new names: the look of a name depends on its position in this list."""


@dataclass(frozen=True)
class Look:
    """How a line or point is drawn, in matplotlib's terms."""

    colour: str
    marker: str | tuple[int, int, int]
    line: str


FIXED = {"base": Look("#6b7785", "o", ":"), "best_of_n": Look("#000000", "o", "-")}
"""Looks of the references. Nothing else is grey or black."""
ALIASES = {"unsteered": "base", "unsteered, 4 jumps": "base", "best of n": "best_of_n", "tuning": "tuned", "tune": "tuned"}


def look(label: str) -> Look:
    """Return the look of a label.

    A name in `NAMES` or `FIXED` has a fixed look. A label that contains such a name keeps its colour, with another marker and
    line: ``tuned, 4 jumps`` has the colour of ``tuned``, ``tuned (direct), 4 jumps`` of ``direct``, and ``base, best of 16`` of
    ``best_of_n``. The look of any other label is derived from a hash of its text.
    """
    name = subject(label)
    number, colour = divmod(zlib.crc32(label.encode()), len(COLOURS))
    number, marker = divmod(number, len(OWN_MARKERS))
    own = Look(COLOURS[colour], OWN_MARKERS[marker], LINES[number % len(LINES)])
    if name in FIXED:
        base = FIXED[name]
    elif name in NAMES:
        place = NAMES.index(name)
        colour, turn = place % len(COLOURS), place // len(COLOURS)
        base = Look(COLOURS[colour], MARKERS[(colour + 4 * turn) % len(MARKERS)], LINES[turn % len(LINES)])
    else:
        return own
    return base if ALIASES.get(label, label) == name else replace(own, colour=base.colour)


def subject(label: str) -> str:
    """Return the name in `NAMES` or `FIXED` that a label contains, or the label itself."""
    if re.search(r"\bbest[ _]of[ _](\d+|n)\b", label):
        return "best_of_n"
    inside = re.search(r"\((\w+)\)", label)
    parts = label, inside[1] if inside else label, re.split(r"[,:(]", label)[0].strip()
    names = [ALIASES.get(part, part) for part in parts]
    return next((name for name in names if name in FIXED or name in NAMES), label)
