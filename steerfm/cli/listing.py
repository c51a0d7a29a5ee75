"""`steerfm models`, `rewards` and `methods`: what there is."""

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
    """The shipped models, or the card of one of them; ``markdown`` is the table of docs/models.md: what fits which map."""
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
    console.print("the card of one: steerfm models NAME; use one: steerfm sample model=NAME")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dictionary of dictionaries as one, names joined by spaces."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flat(item, f"{prefix}{key} ") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return out


def list_rewards(name: str | None = None) -> None:
    """The installed rewards, or one of them explained."""
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
    console.print("explain one: steerfm rewards NAME; your own: reward=path/to/file.py:name")


def list_methods(name: str | None = None, markdown: bool = False) -> None:
    """The steering methods, or one of them with its four parts and defaults; ``markdown`` is the table of docs/methods.md."""
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
        console.print("explain one: steerfm methods NAME; use one: steerfm steer method=NAME method.particles=64\n")
        table = make_table("fine-tuning", "gradient", "what")
        for key, method in tuning.items():
            table.add_row(key, "reward" if method.differentiates else "none", method_title(method))
        console.print(table)
        console.print("use one: steerfm finetune --config NAME")
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
    """One row a method: what it samples, network calls (and backward passes) of a step of one particle, and its parts."""
    columns = [column.name for column in fields(Parts)]
    rows = [["method", "class", "samples", "gradient of", "calls a step", *columns], ["---"] * 11]
    for name, method in METHODS.items():
        made = method()
        mine = made.parts if isinstance(made, Sampler) else None
        parts = ["its own" if mine is None else describe_part(getattr(mine, column)) for column in columns]
        facts = [method.samples, method_gradient(made), calls_a_step(made)]
        rows.append([f"`{name}`", f"`{method.__name__}`", *facts, *parts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fits_markdown() -> str:
    """One row a method: whether it fits a map that can do only so much, or what to take in it to make it fit; "no" for one that
    does not."""
    kinds = ("endpoint", "velocity", "generator")
    rows = [["method", *(f"`{kind}`: {WORDS[kind]}" for kind in kinds)], ["---"] * 4]
    for name, method in {**METHODS, **finetuning_methods()}.items():
        made = method()
        why = [made.lacks(_able(kind), None) if isinstance(made, Choosy) else "" for kind in kinds]
        rows.append([f"`{name}`", *(_in_its_place(each, (*METHODS, *finetuning_methods())) for each in why)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _in_its_place(why: str, methods: Collection[str]) -> str:
    """What to take, in short, where that is not another method."""
    take = [words.partition(", which")[0] for words in re.findall(r"take ([^;]*)", why)]
    if any(words.split(",")[0].split()[0] in methods for words in take):
        return "no"
    return "; ".join(f"`{words}`" if words.count("=") == 1 and " " not in words else words for words in take) or "yes"


def finetuning_methods() -> Mapping[str, Any]:
    """Methods of tuning by name; they import on first use."""
    from steerfm import finetuning

    return finetuning.METHODS


def _able(kind: str) -> FlowMap:
    """A map that can do so much and no more."""
    flow_map = FlowMap((1,))
    flow_map.capabilities, flow_map.steps = KINDS[kind], 1 if kind == "generator" else 4
    return flow_map


def method_title(method: type) -> str:
    """The first words of a method's docstring."""
    return re.split(r"[:(;]|\. ", " ".join((method.__doc__ or "").split()))[0].strip(" .,")


def calls_a_step(method: Any) -> str:
    """Network calls, and backward passes where there are any, of one more step (or iteration) of one particle, counted by the
    ledger; for a method that spends a budget, the word."""
    sizes = {f.name for f in fields(method)} & {"steps", "iterations", "budget"}
    if "budget" in sizes:
        return "as budgeted"
    toy = GaussianMixture([[-1.0], [1.0]], [[0.1], [0.1]]).flow_map(steps=1)
    size = "iterations" if "iterations" in sizes else "steps"
    few, many = (steer(toy, lambda x: x[:, 0], replace(method, **{size: n})).cost for n in (4, 8))
    counts = ((b - a) / 4 / method.particles for a, b in ((few.forwards, many.forwards), (few.backwards, many.backwards)))
    if few.forwards == many.forwards:  # a tree: its nodes are bought, not its depth
        return f"{few.forwards / method.particles:g} a particle"
    return " + ".join(f"{count:g} back" if which else f"{count:g}" for which, count in enumerate(counts) if count or not which)


def method_gradient(method: Method) -> str:
    """What it differentiates: the network, the reward only, or nothing."""
    if isinstance(method, NoiseAscent):
        return "network"
    guidance = getattr(method, "guidance", None)
    if guidance is None or not guidance.differentiates:
        return "none"
    network = guidance.through if isinstance(guidance, NoiseGradient) else type(guidance) is MapGradient
    return "network" if network else "reward"


def describe_part(value: Any) -> str:
    """A part or number as it would be written down: what differs from its class's defaults."""
    if value is None:
        return "none"
    if not is_dataclass(value):
        return str(getattr(value, "__name__", value))
    told = {f.name: getattr(value, f.name) for f in fields(value) if f.init and getattr(value, f.name) != f.default}
    return f"{type(value).__name__}({', '.join(f'{key}={describe_part(part)}' for key, part in told.items())})"
