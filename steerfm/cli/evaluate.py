"""`steerfm evaluate`: distance to the data, texture, agreement with the condition, diversity and consistency of a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
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
from steerfm.metrics import PosteriorErrors, consistency_errors, pairwise_diversity, posterior_errors, texture
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
"""Number of prompts in a retrieval test, the right one included."""
PAIRS = 500
"""Most samples for diversity, consistency and the distance to the reference sampler's outputs from the same noise."""
DRAWN_SAMPLES = 32
"""Samples of each sampler in a picture."""

Agreement = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
"""A function of features by space and of row numbers (b,) that returns scores (b,) by name: agreement with the condition."""


@dataclass
class Examiner:
    """What the samples of a model are measured against.

    Attributes:
        cond: condition of the n samples.
        names: prompts or classes of the first samples, for pictures.
        spaces: feature spaces by the name of their network. Diversity uses the first one.
        references: statistics of the data, in those spaces that have them.
        texture: mean texture of the data, if known.
        agreement: scores the agreement of samples with their condition.
        gaps: what cannot be measured and why, one line each.
    """

    cond: Condition
    names: list[str]
    spaces: Mapping[str, Space]
    references: Mapping[str, Reference]
    texture: float | None = None
    agreement: Agreement = lambda features, rows: {}
    gaps: list[str] = field(default_factory=list)

    @property
    def main_reference(self) -> Reference | None:
        """Statistics of the data in the first space that has them."""
        return next(iter(self.references.values()), None)


def evaluate(config: EvaluateConfig, command: str = "") -> None:
    """Measure a flow map at several numbers of jumps against many Euler steps. The same command continues a killed run."""
    flow_map = load_model(config.model, config.device)
    plans = samplers(flow_map, config)
    examiner = examine(flow_map, config)
    folder = run_folder(config, f"runs/evaluate/{stem(config.model)}")
    if folder.load_result() is not None:
        console.print(FINISHED.format(folder.path), markup=False)
        return
    rows, samples = measure(flow_map, examiner, config, folder, plans)
    n, (many, *_) = min(PAIRS, config.n), plans[0]
    jumpy = can(flow_map, "two_time")  # other maps were not trained to jump between any two times
    consistency = consistency_errors(flow_map, n, take_rows(examiner.cond, slice(0, n))) if jumpy else {}
    floors = {name: reference.floor(config.n) for name, reference in examiner.references.items()}
    tables = _tables(rows, floors, many, config.n)
    posteriors = _posterior_errors(flow_map, examiner, config.posteriors)
    tables += _posterior_tables(posteriors)
    _print(config, tables, consistency, examiner.gaps)
    pictures = _plot(rows, floors, plans, step_of(flow_map), folder.path / "jumps.png")
    pictures += _draw_samples({name: samples[name] for name in rows}, examiner.names, folder.path)
    facts = {"command": command, **consistency, **({"not measured": "; ".join(examiner.gaps)} if examiner.gaps else {})}
    report(folder, f"Evaluation of {stem(config.model)}", facts, tables, pictures)
    apart = examiner.main_reference.apart if examiner.main_reference else None
    summary: dict[str, Any] = {
        "command": command, "n": config.n, "samplers": {name: _by_space(row) for name, row in rows.items()}, "data": floors,
        "posteriors": asdict(posteriors), "texture_of_data": examiner.texture, "train_test": apart, "gaps": examiner.gaps,
        **consistency,
    }  # fmt: skip
    folder.save_result(summary)  # last: it marks the run as finished
    folder.clear_parts()


Plan = tuple[str, int, Transition | None]
"""A sampler: name, number of steps, and transition (None for the map's own)."""


def samplers(flow_map: FlowMap, config: EvaluateConfig) -> list[Plan]:
    """Return the samplers to measure. The first one is the reference of the others.

    The reference is many Euler steps or, for a map without a velocity, the most jumps.

    Raises:
        ConfigError: the map can make none of the numbers of steps.
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
    """Measure all samplers; results of a killed run are read from its folder.

    Returns:
        The metrics of each sampler by name, those of the reference sampler last, and the first samples of each sampler.
    """
    batches = [slice(b, min(b + config.batch_size, config.n)) for b in range(0, config.n, config.batch_size)]
    rows: dict[str, dict[str, float]] = {}
    samples, ends = {}, None
    with progress("evaluating", len(plans) * len(batches)) as tick:
        for index, (name, steps, transition) in enumerate(plans):
            part = folder.load_part(index, prefix="plan")
            if part is None:
                part = _plan(
                    flow_map, examiner, batches, (steps, transition), ends, config.seeds,
                    lambda i, index=index: tick(index * len(batches) + i, len(plans) * len(batches)),
                )  # fmt: skip
                folder.save_part(index, part, prefix="plan")
            samples[name], last = part.pop("pictures"), part.pop("ends")
            ends = last if index == 0 else ends
            if not can(flow_map, "velocity"):
                part.pop("to_euler")
            rows[name] = in_order(part, examiner.references)
            folder.log(sampler=name, **rows[name], once=("sampler",))
    many = plans[0][0]
    rows[many] = rows.pop(many)
    return rows, samples


def in_order(numbers: Mapping[str, Tensor], spaces: Iterable[str]) -> dict[str, float]:
    """Order metrics: distances by space, then the others by name. Metrics read from a file have lost their order."""
    first = [f"{name}/{kind}" for name in spaces for kind in ("frechet", "kernel")]
    return {key: float(numbers[key]) for key in [*first, *sorted(numbers.keys() - set(first))]}


def _plan(
    flow_map: FlowMap, examiner: Examiner, batches: list[slice], walk: tuple[int, Transition | None], ends: Tensor | None,
    seed: int, tick: Callable[[int], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Measure one sampler over all batches.

    Args:
        walk: number of steps, and transition.
        ends: first samples of the reference sampler; None for the reference sampler itself.
        tick: called with the number of finished batches.

    Returns:
        Metrics by name, the first pictures, and ``ends`` if this is the reference sampler.
    """
    from steerfm.metrics import FrechetDistance, KernelDistance  # slow to import, and benchmarks do not need it

    metrics = {  # both metrics share the features
        name: (FrechetDistance(nn.Identity(), (reference.mean, reference.cov)), KernelDistance(nn.Identity(), reference.rows))
        for name, reference in examiner.references.items()
    }
    steps, transition = walk
    few = min(PAIRS, max(DRAWN_SAMPLES, 2**22 // math.prod(flow_map.shape)))  # fewer large pictures, to save memory
    total: dict[str, float] = {}
    seconds, first, features = 0.0, [], []
    with torch.inference_mode():
        for i, rows in enumerate(batches):
            cond = move_condition(take_rows(examiner.cond, rows), flow_map.device)
            with Ledger() as ledger:
                x = draw(flow_map, rows.stop - rows.start, steps, seed + rows.start, cond, transition)
            seconds += ledger.cost.seconds
            pictures = flow_map.decode(x)
            batch = {name: space.features(pictures) for name, space in examiner.spaces.items()}
            for name, pair in metrics.items():
                for metric in pair:
                    metric.update(batch[name])
            values = examiner.agreement(batch, torch.arange(rows.start, rows.stop))
            if pictures.ndim == 4 and min(pictures.shape[2:]) >= 3:
                values["texture"] = texture(pictures) / (examiner.texture or 1.0)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + float(value.sum())
            if rows.start < PAIRS:
                sample_features = next(iter(batch.values())) if batch else pixels().features(pictures)
                features.append(sample_features[: PAIRS - rows.start])
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
    return numbers | {"pictures": own[:DRAWN_SAMPLES].clone(), "ends": own if ends is None else own[:0].clone()}


def _posterior_errors(flow_map: FlowMap, examiner: Examiner, n: int) -> PosteriorErrors:
    """Measure draws at ``n`` states, without a condition where a classifier can say which class each is of."""
    if not n or not can(flow_map, "posterior"):
        return PosteriorErrors()
    pairs = ((space.features, space.logits) for space in examiner.spaces.values() if space.logits is not None)
    features, logits = next(pairs, (None, None))
    if features is None or logits is None:
        return posterior_errors(flow_map, n, examiner.cond, progress=progress)
    return posterior_errors(flow_map, n, classify=lambda pictures: logits(features(pictures)), progress=progress)


def _posterior_tables(errors: PosteriorErrors) -> Tables:
    """What `posterior_errors` measures; nothing for a map without posteriors."""
    titles = {
        "distance": "sliced W2 to draws in 24 calls of the velocity",
        "value": "error of the log-probability of a class, from four draws",
        "frequency": "frequencies of classes, off by so many standard errors; 1 is chance",
    }
    tables = []
    for measure, rows in asdict(errors).items():
        lines = [[name, *(f"{value:.4f}" for value in row.values())] for name, row in rows.items()]
        header = ["draws", *(f"t = {t:g}" for t in next(iter(rows.values()), ()))]
        tables += [(f"draws of p(x_1 | x_t): {titles[measure]}", header, lines)] if lines else []
    return tables


TITLES = {"to_euler": "off Euler"}


# --- results -----------------------------------------------------------------------------------------------------------
Rows = Mapping[str, Mapping[str, float]]
"""Metrics by sampler."""
Tables = list[tuple[str, list[str], list[list[str]]]]
"""Title, header and lines of each table."""


def _distance(key: str) -> tuple[str, str]:
    """Return the space and the kind of a distance; empty texts for other metrics. Names of spaces may be paths."""
    name, _, kind = key.rpartition("/")
    return (name, kind) if kind in ("frechet", "kernel") else ("", "")


def _by_space(row: Mapping[str, float]) -> dict[str, Any]:
    """Nest the metrics of a sampler for result.json: distances by space, with those of the first space also at the top."""
    spaces: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        name, kind = _distance(key)
        if name:
            spaces.setdefault(name, {})[kind] = value
    own = {key: value for key, value in row.items() if not _distance(key)[0]}
    return next(iter(spaces.values()), {}) | own | {"spaces": spaces}


def _tables(rows: Rows, floors: Rows, many: str, n: int) -> Tables:
    """Return the tables of the report: distances in each space, agreement, and metrics of the samples themselves."""
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
    header = ["sampler", *(TITLES.get(key, key) for key in own), "ms per sample"]
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
    """Draw the first samples of each sampler as samples-0.png, ..., if they are pictures."""
    figures = []
    for index, (name, some) in enumerate(pictures.items()):
        if some.ndim == 4 and some.shape[1] in (1, 3):
            grid, captions = grid_rows(some, names[: len(some)])
            figures.append((name, picture_grid(grid, folder / f"samples-{index}.png", captions=captions, title=name)))
    return figures


def _plot(rows: Rows, floors: Rows, plans: list[Plan], step: str, path: Path) -> list[tuple[str, Path]]:
    """Plot every metric against the number of jumps; nothing if there is only one sampler."""
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


# --- references --------------------------------------------------------------------------------------------------------
def examine(flow_map: FlowMap, config: EvaluateConfig) -> Examiner:
    """Collect the references that the model's card names. Without any, only metrics of the samples themselves remain."""
    evaluator = Evaluator(flow_map, progress=progress)
    by_space = {name: evaluator.reference(space) for name, space in evaluator.spaces.items()}
    references = {name: reference for name, reference in by_space.items() if reference is not None}
    cond, names, agreement = _conditions(evaluator, config, bool(references))
    gaps, main = list(evaluator.gaps), next(iter(references.values()), None)
    own = main.texture if main else _texture(evaluator, gaps)
    if not references and not any(gap.startswith("no distances") for gap in gaps):
        also = "" if own else ", texture is not relative to theirs"
        why = f"no distances to the data{also}: there is no feature network for {split_spec(config.model, 'model')[0]}'s data"
        gaps.append(
            f"{why} (card.data is {flow_map.data!r}, classes {len(flow_map.class_names)}; card.features names networks)"
        )
    return Examiner(cond, names, evaluator.spaces, references, own, agreement, [*gaps, *_tuned_on(evaluator)])


def _tuned_on(evaluator: Evaluator) -> list[str]:
    """Return a line for each network that is not held out because the model was tuned on it.

    Code of a reward file is not run for this check.
    """
    recipe = evaluator.flow_map.card.get("recipe")
    spec = recipe.get("reward") if isinstance(recipe, Mapping) else None
    try:
        terms = [split_spec(term, "reward")[0] for term in (spec if isinstance(spec, list) else [spec] if spec else [])]
        reward = rewards.build(spec) if terms and all(term in rewards.available() for term in terms) else None
    except ValueError:  # the reward is not installed here
        reward = None
    if reward is None:
        return []
    same = [name for name, space in evaluator.spaces.items() if share_weights(reward, space)]
    return [f"{name} is not held out: the model was tuned on {reward.name!r}, the same network" for name in same]


def _texture(evaluator: Evaluator, gaps: list[str]) -> float | None:
    """Return the mean texture of the data's pictures, for data without a feature network."""
    try:
        pictures = evaluator.pictures
    except FileNotFoundError as error:
        gaps.append(f"texture is not relative to the data's: {error}")
        return None
    return None if pictures is None or min(pictures.shape[2:]) < 3 else float(texture(pictures).mean())


def _conditions(evaluator: Evaluator, config: EvaluateConfig, with_data: bool) -> tuple[Condition, list[str], Agreement]:
    """Return the condition of n rows, the names of the first ones, and the function that scores agreement with them."""
    flow_map, n = evaluator.flow_map, config.n
    if flow_map.class_names:
        return _classes(evaluator, n, config.seeds, with_data)
    if isinstance(flow_map.null, Mapping):  # text-conditional
        prompts = read_prompts(config.prompt) or (evaluator.data.prompts(config.held_out) if evaluator.data else [])
        if prompts:
            texts = [prompts[i % len(prompts)] for i in range(n)]
            return flow_map.condition(texts, n), texts[:DRAWN_SAMPLES], _retrieval(evaluator, prompts, n)
    return None, [""] * min(DRAWN_SAMPLES, n), lambda features, rows: {}


def _classes(evaluator: Evaluator, n: int, seed: int, with_data: bool) -> tuple[Condition, list[str], Agreement]:
    """Draw random classes if samples are compared with the data, else take all classes in turn.

    Distance estimates assume independent samples, and classes in turn would bias them downwards. Accuracy is that of the
    judge's network, or else of the last network that knows the classes.
    """
    names = evaluator.flow_map.class_names
    labels = torch.randint(len(names), (n,), generator=stream(seed, "labels")) if with_data else torch.arange(n) % len(names)
    knowing = (
        space for space in (evaluator.judged, *reversed(evaluator.spaces.values())) if space is not None and space.logits
    )
    judge = next(knowing, None)

    def agreement(features: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        if judge is None or judge.logits is None:
            return {}
        return {"accuracy": judge.logits(features[judge.name]).argmax(1).cpu() == labels[rows]}

    classes = [names[label] for label in labels.tolist()]
    return evaluator.flow_map.condition(classes, n), classes[:DRAWN_SAMPLES], agreement


def _retrieval(evaluator: Evaluator, prompts: list[str], n: int) -> Agreement:
    """Score similarity to the prompt in every image-text space, and retrieval in the first of them.

    Retrieval is recall at 1 and 10: whether the right prompt is among the 1 or 10 most similar of up to 100.
    """
    readers = {name: space for name, space in evaluator.spaces.items() if space.image and space.text}
    judge = evaluator.judged
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

    def agreement(features: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for number, (name, space) in enumerate(readers.items()):
            assert space.image is not None
            image = space.image(features[name]).cpu()
            right = (image * texts[name][own[rows]]).sum(1)
            scores["judge" if space is judge else name] = right
            if number == 0:
                rank = (torch.einsum("bd,bkd->bk", image, texts[name][pools[rows]]) >= right[:, None]).sum(1)
                scores |= {f"R@{k} of {others + 1}": rank < k for k in (1, 10)}
        return scores

    return agreement
