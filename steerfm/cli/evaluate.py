"""`steerfm evaluate`: distances to the data, texture, agreement with what was asked, diversity and consistency of a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfm import rewards
from steerfm.capabilities import can, in_steps, in_words, step_of
from steerfm.cli.config import EvaluateConfig
from steerfm.cli.console import console, print_table, progress
from steerfm.cli.parts import load_model
from steerfm.cli.prompts import read_prompts
from steerfm.cli.runs import FINISHED, grid_rows, run_folder, stem
from steerfm.cost import Ledger
from steerfm.flowmap import FlowMap
from steerfm.held_out import share_weights
from steerfm.metrics import consistency_errors, pairwise_diversity, texture
from steerfm.metrics.evaluator import Evaluator
from steerfm.metrics.spaces import Reference, Space, pixels
from steerfm.randomness import stream
from steerfm.registry import split_spec
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.report.plots import jumps_plot
from steerfm.report.run_folder import RunFolder
from steerfm.rows import Condition, move_condition, take_rows
from steerfm.sampling import sample as draw
from steerfm.transitions import Diffuse, Transition
from steerfm.values import ConfigError

POOL = 100
"""Prompts among which the right one is looked for."""
PAIRS = 500
"""Samples, at most, that diversity and consistency are measured on, and the way off the Euler steps of the same noise."""
SHOWN = 32
"""Samples of each sampler that are drawn."""

Agreement = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
"""Features by space and row numbers to what agrees with what was asked, (b,), by name."""


@dataclass
class Examiner:
    """What the samples of a model are held against.

    Attributes:
        cond: n rows.
        names: of the rows, for pictures.
        spaces: by the name of their network; the first is that of diversity.
        references: of the data, in some of them.
        texture: mean of the data's, where they are known.
        agreement: with what was asked for.
        gaps: what cannot be measured, and why: a line each.
    """

    cond: Condition
    names: list[str]
    spaces: Mapping[str, Space]
    references: Mapping[str, Reference]
    texture: float | None = None
    agreement: Agreement = lambda found, rows: {}
    gaps: list[str] = field(default_factory=list)

    @property
    def known(self) -> Reference | None:
        """The data in the space that counts."""
        return next(iter(self.references.values()), None)


def evaluate(config: EvaluateConfig, command: str = "") -> None:
    """Measure a flow map at several numbers of jumps against many Euler steps; a killed run continues."""
    flow_map = load_model(config.model, config.device)
    plans = samplers(flow_map, config)
    examiner = examine(flow_map, config)
    folder = run_folder(config, f"runs/evaluate/{stem(config.model)}")
    if folder.load_result() is not None:
        console.print(FINISHED.format(folder.path), markup=False)
        return
    rows, drawn = measure(flow_map, examiner, config, folder, plans)
    n, (many, *_) = min(PAIRS, config.n), plans[0]
    jumpy = can(flow_map, "two_time")  # of others jumps between any two times were never trained
    consistency = consistency_errors(flow_map, n, take_rows(examiner.cond, slice(0, n))) if jumpy else {}
    floors = {name: known.floor(config.n) for name, known in examiner.references.items()}
    tables = _tables(rows, floors, many, config.n)
    _print(config, tables, consistency, examiner.gaps)
    pictures = _plot(rows, floors, plans, step_of(flow_map), folder.path / "jumps.png")
    pictures += _draw_samples({name: drawn[name] for name in rows}, examiner.names, folder.path)
    facts = {"command": command, **consistency, **({"not measured": "; ".join(examiner.gaps)} if examiner.gaps else {})}
    report(folder, f"Evaluation of {stem(config.model)}", facts, tables, pictures)
    apart = examiner.known.apart if examiner.known else None
    summary: dict[str, Any] = {
        "command": command, "n": config.n, "samplers": {name: _nested(row) for name, row in rows.items()}, "data": floors,
        "texture_of_data": examiner.texture, "train_test": apart, "gaps": examiner.gaps, **consistency,
    }  # fmt: skip
    folder.save_result(summary)  # last: its presence says that the run is finished
    folder.clear_parts()


Plan = tuple[str, int, Transition | None]
"""A sampler: its name, its number of steps, and its transition; None for the map's own."""


def samplers(flow_map: FlowMap, config: EvaluateConfig) -> list[Plan]:
    """What is measured, the first of which the others are held against: many Euler steps of a velocity, the most jumps of a map
    that has none.

    Raises:
        ConfigError: steps that the map cannot make.
    """
    counts = config.steps if can(flow_map, "velocity") or can(flow_map, "endpoint") else [n for n in config.steps if n == 1]
    if not counts:
        raise ConfigError(f"steps={config.steps}: this model has only {in_words(flow_map)}: steps=[1]")
    plans: list[Plan] = [(in_steps(flow_map, steps), steps, None) for steps in counts]
    if can(flow_map, "velocity"):
        return [(f"{config.euler} Euler steps", config.euler, Diffuse(0.0)), *plans]
    most = max(plans, key=lambda plan: plan[1])
    return [most, *(plan for plan in plans if plan != most)]


def measure(
    flow_map: FlowMap, examiner: Examiner, config: EvaluateConfig, folder: RunFolder, plans: list[Plan]
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """The numbers of each sampler by its name, the first plan's last, and its first pictures; those that a killed run left are
    read."""
    batches = [slice(b, min(b + config.batch_size, config.n)) for b in range(0, config.n, config.batch_size)]
    rows: dict[str, dict[str, float]] = {}
    drawn, ends = {}, None
    with progress("evaluating", len(plans) * len(batches)) as tick:
        for done, (name, steps, transition) in enumerate(plans):
            part = folder.load_part(done, prefix="plan")
            if part is None:
                part = _plan(
                    flow_map, examiner, batches, (steps, transition), ends, config.seeds,
                    lambda i, done=done: tick(done * len(batches) + i, len(plans) * len(batches)),
                )  # fmt: skip
                folder.save_part(done, part, prefix="plan")
            drawn[name], last = part.pop("pictures"), part.pop("ends")
            ends = last if done == 0 else ends
            if not can(flow_map, "velocity"):
                part.pop("to_euler")
            rows[name] = in_order(part, examiner.references)
            folder.log(sampler=name, **rows[name], once=("sampler",))
    many = plans[0][0]
    rows[many] = rows.pop(many)
    return rows, drawn


def in_order(numbers: Mapping[str, Tensor], spaces: Iterable[str]) -> dict[str, float]:
    """Distances by space, the first of which counts, then the others by name: a part that is read again has lost its order."""
    first = [f"{name}/{kind}" for name in spaces for kind in ("frechet", "kernel")]
    return {key: float(numbers[key]) for key in [*first, *sorted(numbers.keys() - set(first))]}


def _plan(
    flow_map: FlowMap, examiner: Examiner, batches: list[slice], walk: tuple[int, Transition | None], ends: Tensor | None,
    seed: int, tick: Callable[[int], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Metrics of one sampler over all batches, its first pictures and ``ends``, its own where none are given."""
    from steerfm.metrics import FrechetDistance, KernelDistance  # seconds, which benchmarks need not wait

    metrics = {  # features are computed once, for both
        name: (FrechetDistance(nn.Identity(), (known.mean, known.cov)), KernelDistance(nn.Identity(), known.rows))
        for name, known in examiner.references.items()
    }
    steps, transition = walk
    few = min(PAIRS, max(SHOWN, 2**22 // math.prod(flow_map.shape)))  # large pictures fill the memory
    total: dict[str, float] = {}
    seconds, first, features = 0.0, [], []
    with torch.inference_mode():
        for i, rows in enumerate(batches):
            cond = move_condition(take_rows(examiner.cond, rows), flow_map.device)
            with Ledger() as ledger:
                x = draw(flow_map, rows.stop - rows.start, steps, seed + rows.start, cond, transition)
            seconds += ledger.cost.seconds
            pictures = flow_map.decode(x)
            found = {name: space.features(pictures) for name, space in examiner.spaces.items()}
            for name, pair in metrics.items():
                for metric in pair:
                    metric.update(found[name])
            values = examiner.agreement(found, torch.arange(rows.start, rows.stop))
            if pictures.ndim == 4 and min(pictures.shape[2:]) >= 3:
                values["texture"] = texture(pictures) / (examiner.texture or 1.0)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + float(value.sum())
            if rows.start < PAIRS:
                looked = next(iter(found.values())) if found else pixels().features(pictures)
                features.append(looked[: PAIRS - rows.start])
            if rows.start < few:
                first.append(pictures[: few - rows.start].float().cpu())
            tick(i + 1)
    n = batches[-1].stop
    own = torch.cat(first)
    out = {f"{name}/{kind}": float(m.compute()) for name, ms in metrics.items() for kind, m in zip(("frechet", "kernel"), ms)}
    out |= {name: value / n for name, value in total.items()}
    out |= {"to_euler": 0.0 if ends is None else (own - ends).square().mean().sqrt().item()}
    out |= {"diversity": pairwise_diversity(torch.cat(features)), "seconds": seconds}
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in out.items()}
    return numbers | {"pictures": own[:SHOWN].clone(), "ends": own if ends is None else own[:0].clone()}


TITLES = {"to_euler": "off Euler"}


# --- what comes out ----------------------------------------------------------------------------------------------------
Rows = Mapping[str, Mapping[str, float]]
"""Numbers by sampler."""
Tables = list[tuple[str, list[str], list[list[str]]]]
"""Title, header and lines of each."""


def _distance(key: str) -> tuple[str, str]:
    """The space and the kind of a distance; no space for other numbers. Names of spaces may be paths."""
    name, _, kind = key.rpartition("/")
    return (name, kind) if kind in ("frechet", "kernel") else ("", "")


def _nested(row: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a sampler for result.json: distances by space, and those of the first space once more by themselves."""
    spaces: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        name, kind = _distance(key)
        if name:
            spaces.setdefault(name, {})[kind] = value
    own = {key: value for key, value in row.items() if not _distance(key)[0]}
    return next(iter(spaces.values()), {}) | own | {"spaces": spaces}


def _tables(rows: Rows, floors: Rows, many: str, n: int) -> Tables:
    """(title, header, lines): the distances in each space, the agreement, and what is measured on the samples themselves."""
    tables = []
    for space, floor in floors.items():
        distances = {name: (row[f"{space}/frechet"], row[f"{space}/kernel"]) for name, row in rows.items()}
        distances[f"data, {floor['n']}"] = floor["frechet"], floor["kernel"]
        lines = [
            [name, f"{frechet:.4g}", f"{frechet / distances[many][0]:.2f}", f"{kernel:.3g}"]
            for name, (frechet, kernel) in distances.items()
        ]
        header = ["sampler", "Fréchet distance", f"relative to {many}", "kernel distance"]
        tables.append((f"{n} samples against the data in the features of {space}", header, lines))
    other = ("texture", "to_euler", "diversity", "seconds")
    agrees = [key for key in rows[many] if not _distance(key)[0] and key not in other]
    if agrees:
        lines = [[name, *(f"{row[key]:.4f}" for key in agrees)] for name, row in rows.items()]
        tables.append((f"agreement of {n} samples with what was asked", ["sampler", *agrees], lines))
    own = {key: form for key, form in {"texture": ".3g", "to_euler": ".4f", "diversity": ".3f"}.items() if key in rows[many]}
    header = ["sampler", *(TITLES.get(key, key) for key in own), "ms a sample"]
    lines = [
        [name, *(f"{row[key]:{form}}" for key, form in own.items()), f"{1e3 * row['seconds'] / n:.2f}"]
        for name, row in rows.items()
    ]
    return [*tables, (f"{n} samples", header, lines)]


def _print(config: EvaluateConfig, tables: Tables, consistency: Mapping[str, float], gaps: list[str]) -> None:
    for title, header, lines in tables:
        print_table(header, lines, f"{stem(config.model)}: {title}")
    for line in [", ".join(f"{name} {value:.5f}" for name, value in consistency.items()), *gaps]:
        if line:
            console.print(line)


def _draw_samples(pictures: Mapping[str, Tensor], names: list[str], folder: Path) -> list[tuple[str, Path]]:
    """samples-0.png, ...: the first samples of each sampler, where they are pictures."""
    drawn = []
    for index, (name, some) in enumerate(pictures.items()):
        if some.ndim == 4 and some.shape[1] in (1, 3):
            shown, captions = grid_rows(some, names[: len(some)])
            drawn.append((name, picture_grid(shown, folder / f"samples-{index}.png", captions=captions, title=name)))
    return drawn


def _plot(rows: Rows, floors: Rows, plans: list[Plan], step: str, path: Path) -> list[tuple[str, Path]]:
    """Every measure against the number of jumps; nothing where there is one sampler."""
    (many, *_), *others = plans
    lines = {}
    for key in rows[many] if others else ():
        if key not in ("diversity", "seconds"):
            name, kind = _distance(key)
            titles = {"frechet": f"Fréchet distance, {name}", "kernel": f"kernel distance, {name}", "": TITLES.get(key, key)}
            data = floors[name][kind] if kind else 1.0 if key == "texture" and floors else None
            lines[titles[kind]] = [rows[name][key] for name, *_ in others], rows[many][key], data
    if not lines:
        return []
    return [(f"by the number of {step}s", jumps_plot([steps for _, steps, _ in others], lines, path, many, step))]


# --- what models are held against --------------------------------------------------------------------------------------
def examine(flow_map: FlowMap, config: EvaluateConfig) -> Examiner:
    """What the model's card names decides; where it names nothing, the samples speak for themselves."""
    evaluator = Evaluator(flow_map, progress=progress)
    found = {name: evaluator.reference(space) for name, space in evaluator.spaces.items()}
    references = {name: reference for name, reference in found.items() if reference is not None}
    cond, names, agreement = _asked(evaluator, config, bool(references))
    gaps, known = list(evaluator.gaps), next(iter(references.values()), None)
    own = known.texture if known else _texture(evaluator, gaps)
    if not references and not any(gap.startswith("no distances") for gap in gaps):
        also = "" if own else ", texture is not relative to theirs"
        why = f"no distances to the data{also}: no network is known of {split_spec(config.model, 'model')[0]}'s data"
        gaps.append(
            f"{why} (card.data is {flow_map.data!r}, classes {len(flow_map.class_names)}; card.features names networks)"
        )
    return Examiner(cond, names, evaluator.spaces, references, own, agreement, [*gaps, *_tuned_on(evaluator)])


def _tuned_on(evaluator: Evaluator) -> list[str]:
    """A line for each network that is not held out: it is in the reward that the model was tuned on. A reward of somebody's
    file is not run for that."""
    recipe = evaluator.flow_map.card.get("recipe")
    spec = recipe.get("reward") if isinstance(recipe, Mapping) else None
    try:
        terms = [split_spec(term, "reward")[0] for term in (spec if isinstance(spec, list) else [spec] if spec else [])]
        reward = rewards.build(spec) if terms and all(term in rewards.available() for term in terms) else None
    except ValueError:  # it was tuned elsewhere
        reward = None
    if reward is None:
        return []
    same = [name for name, space in evaluator.spaces.items() if share_weights(reward, space)]
    return [f"{name} is not held out: the model was tuned on {reward.name!r}, the same network" for name in same]


def _texture(evaluator: Evaluator, gaps: list[str]) -> float | None:
    """Mean of that of the data's own pictures, where no network is known of them."""
    try:
        pictures = evaluator.pictures
    except FileNotFoundError as error:
        gaps.append(f"texture is not relative to the data's: {error}")
        return None
    return None if pictures is None or min(pictures.shape[2:]) < 3 else float(texture(pictures).mean())


def _asked(evaluator: Evaluator, config: EvaluateConfig, compared: bool) -> tuple[Condition, list[str], Agreement]:
    """The condition of n rows, the names of the first, and how agreement with them is measured."""
    flow_map, n = evaluator.flow_map, config.n
    if flow_map.class_names:
        return _classes(evaluator, n, config.seeds, compared)
    if isinstance(flow_map.null, Mapping):  # it is asked in words
        prompts = read_prompts(config.prompt) or (evaluator.data.prompts(config.held_out) if evaluator.data else [])
        if prompts:
            texts = [prompts[i % len(prompts)] for i in range(n)]
            return flow_map.condition(texts, n), texts[:SHOWN], _retrieval(evaluator, prompts, n)
    return None, [""] * min(SHOWN, n), lambda found, rows: {}


def _classes(evaluator: Evaluator, n: int, seed: int, compared: bool) -> tuple[Condition, list[str], Agreement]:
    """Classes drawn like the data's where samples are held against them: estimates that take samples for independent are too
    low for classes in turn. The accuracy is that of the judge's network, or of the last that knows classes."""
    names = evaluator.flow_map.class_names
    labels = torch.randint(len(names), (n,), generator=stream(seed, "labels")) if compared else torch.arange(n) % len(names)
    knowing = (
        space for space in (evaluator.judged, *reversed(evaluator.spaces.values())) if space is not None and space.logits
    )
    judge = next(knowing, None)

    def agreement(found: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        if judge is None or judge.logits is None:
            return {}
        return {"accuracy": judge.logits(found[judge.name]).argmax(1).cpu() == labels[rows]}

    asked = [names[label] for label in labels.tolist()]
    return evaluator.flow_map.condition(asked, n), asked[:SHOWN], agreement


def _retrieval(evaluator: Evaluator, prompts: list[str], n: int) -> Agreement:
    """Likeness to the prompt in every space of words, and in the first of them whether the right one of up to 100 prompts is
    the likest, or of the ten likest."""
    readers = {name: space for name, space in evaluator.spaces.items() if space.image and space.text}
    judged = evaluator.judged
    texts: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, space in readers.items():
            assert space.text is not None
            texts[name] = torch.cat([space.text(prompts[i : i + 256]).cpu() for i in range(0, len(prompts), 256)])
    generator = stream(0, "pools")
    others = min(POOL, len(prompts)) - 1
    pools = torch.stack([torch.randperm(max(1, len(prompts) - 1), generator=generator)[:others] for _ in range(n)])
    own = torch.arange(n) % len(prompts)
    pools = (pools + 1 + own[:, None]) % len(prompts)  # never the prompt itself

    def agreement(found: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for number, (name, space) in enumerate(readers.items()):
            assert space.image is not None
            image = space.image(found[name]).cpu()
            right = (image * texts[name][own[rows]]).sum(1)
            scores["judge" if space is judged else name] = right
            if number == 0:
                rank = (torch.einsum("bd,bkd->bk", image, texts[name][pools[rows]]) >= right[:, None]).sum(1)
                scores |= {f"R@{k} of {others + 1}": rank < k for k in (1, 10)}
        return scores

    return agreement
