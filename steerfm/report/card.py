"""README.md of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from steerfm.report.formats import short


def model_card(name: str, card: Mapping[str, Any]) -> str:
    """Return the README.md of a trained model, with the front matter that model hubs read.

    Args:
        name: name of the model.
        card: sections by name, such as description, command (how to train it again), usage (code), data, licence, recipe
            and metrics. A section is a text, or a dictionary of names and values, which becomes a table.
    """
    card = dict(card)
    licence = str(card.get("licence", ""))
    identifier = (licence.split() or [""])[0].lower()
    front: dict[str, Any] = {"library_name": "steerfm", "tags": ["flow-map", "image-generation"]}
    if identifier:
        front["license"] = identifier if identifier in LICENCES else "other"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    if description := card.pop("description", ""):
        lines += [str(description).strip(), ""]
    order = ("usage", "data", "licence", "recipe", "command", "metrics")
    for key in [*(key for key in order if key in card), *(key for key in card if key not in order)]:
        lines += [f"## {str(key).replace('_', ' ').capitalize()}", ""]
        value = card[key]
        if isinstance(value, Mapping):
            cells = [[short(cell).replace("|", "\\|").replace("\n", " ") for cell in item] for item in value.items()]
            lines += ["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in cells), ""]
        elif key in ("usage", "command"):
            lines += [f"```{'python' if key == 'usage' else 'bash'}", str(value).strip(), "```", ""]
        else:
            lines += [short(value).strip(), ""]
    return "\n".join(lines)


LICENCES = {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"}
