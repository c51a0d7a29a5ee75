"""`steerfm models`, `rewards` and `methods`: list what is installed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from rich.text import Text

from steerfm import registry, rewards, trust, zoo
from steerfm.capabilities import KINDS, WORDS, Choosy
from steerfm.cli.console import console, make_table, print_table
from steerfm.closed_form import GaussianMixture
from steerfm.flowmap import FlowMap
from steerfm.report.formats import short
from steerfm.steering import METHOD, METHODS, MapGradient, Method, NoiseGradient, Sampler, steer
from steerfm.steering.correction import Parts
from steerfm.steering.noise_search import NoiseAscent
from steerfm.values import ConfigError


def list_models(name: str | None = None, markdown: bool = False) -> None:
    """List the shipped models, or show the card of one.

    Args:
        name: the model to show; None for the list.
        markdown: print the table of docs/models.md instead: which methods fit which maps.

    Raises:
        ConfigError: there is no such model.
    """
    if markdown:
        print(fits_markdown())
        return
    models = zoo.models()
    if name is not None:
        if name not in models:
            raise ConfigError(f"unknown model {name!r}{trust.nearest(name, models)}; models: {', '.join(models)}")
        head = models[name]
        card = head.get("card", {})
        console.print(Text.assemble((name, "bold"), f"  ({zoo.find(name)})\n"))
        facts = {"kind": head["kind"], "network": head.get("network", {}).get("name", head["kind"])}
        facts |= {key: card[key] for key in ("data", "licence", "command") if card.get(key)}
        print_table(("", ""), [(key, short(value)) for key, value in facts.items()])
        print_table(("metric", "value"), [(key, short(value)) for key, value in flat(card.get("metrics", {})).items()])
        return
    table = make_table("model", "kind", "network", "parameters", "data")
    for key, head in models.items():
        card = head.get("card", {})
        file = zoo.find(key)
        files = [file, file.with_suffix("") / "open_clip_model.safetensors"]
        size = sum(file.stat().st_size for file in files if file.is_file())
        network = head.get("network", {}).get("name", head["kind"])
        table.add_row(key, head["kind"], network, f"{size / 2e6:.2f} M", card.get("data", ""))
    console.print(table)
    console.print("show a card: steerfm models NAME; use a model: steerfm sample model=NAME")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a dictionary of dictionaries, with the names joined by spaces."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flat(item, f"{prefix}{key} ") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return out


def list_rewards(name: str | None = None) -> None:
    """List the installed rewards, or explain one."""
    import inspect

    if name is not None:
        target = rewards.find(name)
        parameters = inspect.signature(target).parameters
        console.print(Text.assemble((name, "bold"), f"  ({inspect.getsourcefile(target)})\n"))
        console.print(inspect.getdoc(target) or "no description")
        if isinstance(target, type):
            low, high = target.range
            gradient = "yes" if target.differentiable else "no, a black box"
            console.print(f"\nunit: {target.unit}; range: {low:.3g} to {high:.3g}; gradient: {gradient}")
        for key, parameter in parameters.items():
            if key not in ("images", "prompts", "labels"):
                default = "" if parameter.default is parameter.empty else f" (default {parameter.default!r})"
                console.print(f"  reward.{key}{default}")
        return
    table = make_table("reward", "unit", "range", "gradient", "what")
    for key in rewards.available():
        try:
            target = rewards.find(key)
        except rewards.RewardError as error:
            table.add_row(key, "", "", "", f"broken: {error}")
            continue
        low, high = getattr(target, "range", (float("-inf"), float("inf")))
        what = re.split(r"[:.]", " ".join((inspect.getdoc(target) or "").split()))[0]
        gradient = "yes" if getattr(target, "differentiable", True) else "black box"
        table.add_row(key, getattr(target, "unit", ""), f"{low:.3g} to {high:.3g}", gradient, what)
    console.print(table)
    console.print("explain a reward: steerfm rewards NAME; use your own: reward=path/to/file.py:name")


def list_methods(name: str | None = None, markdown: bool = False) -> None:
    """List the methods, or explain one with its arguments and defaults.

    Args:
        name: the method to explain; None for the list.
        markdown: print the table of docs/methods.md instead.
    """
    import inspect

    tuning = finetuning_methods()
    if markdown:
        print(methods_markdown())
        return
    if name is None:
        table = make_table("method", "samples", "gradient", "what")
        for key, method in METHODS.items():
            table.add_row(key, method.samples, method_gradient(method()), method_title(method))
        console.print(table)
        console.print("explain a method: steerfm methods NAME; use it: steerfm steer method=NAME method.particles=64\n")
        table = make_table("fine-tuning", "gradient", "what")
        for key, method in tuning.items():
            table.add_row(key, "reward" if method.differentiates else "none", method_title(method))
        console.print(table)
        console.print("use a method: steerfm finetune --config NAME")
        return
    kind = registry.find(name, replace(METHOD, table=METHODS | dict(tuning)))
    method: Any = kind()
    console.print(Text.assemble((name, "bold"), f"  ({inspect.getsourcefile(kind)})\n"))
    console.print(inspect.getdoc(kind) or "")
    if paper := getattr(kind, "paper", ""):
        console.print(f"\npaper: arXiv {paper}" if paper[:1].isdigit() else f"\npaper: {paper}")
    console.print("\narguments and defaults:")
    for key in (key for key in fields(method) if key.init):
        console.print(f"  method.{key.name} = {describe_part(getattr(method, key.name))}")


def methods_markdown() -> str:
    """Return a table with a row per method: what it samples, the evaluations of one step of one particle, and its parts."""
    columns = [column.name for column in fields(Parts)]
    rows = [["method", "class", "samples", "gradient of", "calls per step", *columns], ["---"] * 11]
    for name, method in METHODS.items():
        instance = method()
        mine = instance.parts if isinstance(instance, Sampler) else None
        parts = ["its own" if mine is None else describe_part(getattr(mine, column)) for column in columns]
        facts = [method.samples, method_gradient(instance), calls_a_step(instance)]
        rows.append([f"`{name}`", f"`{method.__name__}`", *facts, *parts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fits_markdown() -> str:
    """Return a table with a row per method and a column per kind of map: "yes" if the method fits, the setting that makes it
    fit, or "no"."""
    kinds = ("endpoint", "velocity", "generator")
    rows = [["method", *(f"`{kind}`: {WORDS[kind]}" for kind in kinds)], ["---"] * 4]
    for name, method in {**METHODS, **finetuning_methods()}.items():
        instance = method()
        why = [instance.lacks(_able(kind), None) if isinstance(instance, Choosy) else "" for kind in kinds]
        rows.append([f"`{name}`", *(_in_its_place(name, each, (*METHODS, *finetuning_methods())) for each in why)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _in_its_place(name: str, why: str, methods: Collection[str]) -> str:
    """Shorten the advice of an error message to a setting of the method ``name``.

    Returns:
        The setting; "no" if the advice is another method, "yes" if there is no error.
    """
    own = re.search(rf"take {name} with ([^,;]*)", why)
    if own:
        return f"`{own[1]}`"
    take = [words.partition(", which")[0] for words in re.findall(r"take ([^;]*)", why)]
    if any(words.split(",")[0].split()[0] in methods for words in take):
        return "no"
    return "; ".join(f"`{words}`" if words.count("=") == 1 and " " not in words else words for words in take) or "yes"


def finetuning_methods() -> Mapping[str, Any]:
    """Return the fine-tuning methods by name. Their import is deferred to the first use."""
    from steerfm import finetuning

    return finetuning.METHODS


def _able(kind: str) -> FlowMap:
    """Return a map with the capabilities of this kind only."""
    flow_map = FlowMap((1,))
    flow_map.capabilities, flow_map.steps = KINDS[kind], 1 if kind == "generator" else 4
    return flow_map


def method_title(method: type) -> str:
    """Return the first phrase of a method's docstring."""
    return re.split(r"[:(;]|\. ", " ".join((method.__doc__ or "").split()))[0].strip(" .,")


def calls_a_step(method: Any) -> str:
    """Count the network calls, and any backward passes, of one more step (or iteration) of one particle.

    For a method with a budget, return "as budgeted".
    """
    sizes = {f.name for f in fields(method)} & {"steps", "iterations", "budget"}
    if "budget" in sizes:
        return "as budgeted"
    toy = GaussianMixture([[-1.0], [1.0]], [[0.1], [0.1]]).flow_map(steps=1)
    size = "iterations" if "iterations" in sizes else "steps"
    few, many = (steer(toy, lambda x: x[:, 0], replace(method, **{size: n})).cost for n in (4, 8))
    counts = ((b - a) / 4 / method.particles for a, b in ((few.forwards, many.forwards), (few.backwards, many.backwards)))
    if few.forwards == many.forwards:  # the cost of a tree depends on its nodes, not on its depth
        return f"{few.forwards / method.particles:g} per particle"
    return " + ".join(f"{count:g} back" if which else f"{count:g}" for which, count in enumerate(counts) if count or not which)


def method_gradient(method: Method) -> str:
    """Return what a method differentiates: "network", "reward" (only that), or "none"."""
    if isinstance(method, NoiseAscent):
        return "network"
    guidance = getattr(method, "guidance", None)
    if guidance is None or not guidance.differentiates:
        return "none"
    network = guidance.through if isinstance(guidance, NoiseGradient) else type(guidance) is MapGradient
    return "network" if network else "reward"


def describe_part(value: Any) -> str:
    """Format a part or a number as code, with only the arguments that differ from the defaults."""
    if value is None:
        return "none"
    if not is_dataclass(value):
        return str(getattr(value, "__name__", value))
    arguments = {f.name: getattr(value, f.name) for f in fields(value) if f.init and getattr(value, f.name) != f.default}
    return f"{type(value).__name__}({', '.join(f'{key}={describe_part(part)}' for key, part in arguments.items())})"
