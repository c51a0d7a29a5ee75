"""`steerfm evaluate`: distances to the data, texture, agreement with what was asked, diversity and consistency of a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from steerfm import emoji, encoders, files, rewards, zoo
from steerfm.cli.config import EvaluateConfig
from steerfm.cli.console import console, print_table, progress
from steerfm.cli.parts import can_judge_words, load_model
from steerfm.cli.prompts import read_prompts
from steerfm.cli.runs import FINISHED, grid_rows, run_folder, stem
from steerfm.cost import Ledger
from steerfm.flowmap import Condition, FlowMap, move_condition, take_rows
from steerfm.metrics import (
    consistency_errors,
    cubic,
    discrepancy,
    feature_statistics,
    frechet_distance,
    pairwise_diversity,
    split_statistics,
    texture,
)  # fmt: skip
from steerfm.randomness import stream
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.report.plots import jumps_plot
from steerfm.report.run_folder import RunFolder
from steerfm.sampling import sample as draw
from steerfm.transitions import Diffuse

POOL = 100
"""Prompts among which the right one is looked for."""
PAIRS = 500
"""Samples, at most, that diversity and consistency are measured on, and the way off the Euler steps of the same noise."""
SHOWN = 32
"""Samples of each sampler that are drawn."""

Features = Callable[[Tensor], Tensor]


@dataclass
class Space:
    """A network's features, in which samples are held against the data.

    Attributes:
        features: pictures to (b, d). mean, cov: (d,) and (d, d) of the data. count: of the data that they are of.
        rows: (m, d) of some of the data, in random order.
    """

    features: Features
    mean: Tensor
    cov: Tensor
    count: int
    rows: Tensor

    @classmethod
    def of(cls, features: Features, known: Tensor) -> Space:
        """Of all the data's features (m, d)."""
        order = torch.randperm(len(known), generator=stream(0, "real pictures"))
        return cls(features, *feature_statistics(known), len(known), known[order])

    def floor(self, n: int) -> dict[str, float]:
        """What data would get: ``n`` of them (or as many as there are rows, or half of the data) against all the others, and
        one half of the rows against the other half; an unbiased distance needs no equal numbers."""
        part, half = self.rows[: min(n, self.count // 2)], len(self.rows) // 2
        rest = split_statistics(self.mean, self.cov, self.count, part)
        return {
            "n": len(part),
            "frechet": frechet_distance(*feature_statistics(part), *rest),
            "kernel": discrepancy(self.rows[:half].double(), self.rows[half:].double(), cubic),
        }


@dataclass
class Examiner:
    """What the samples of a model are held against.

    Attributes:
        cond: n rows. names: of the rows, for pictures.
        spaces: by the name of their network; the first is that of diversity. Empty where no network knows the data.
        texture: mean of the data's, or None. apart: distance between two large parts of the data in the first space, or None.
        agreement: features by space, pictures and row numbers to what agrees (b,), by name.
        gaps: what cannot be measured, and why: a line each.
    """

    cond: Condition
    names: list[str]
    spaces: Mapping[str, Space] = field(default_factory=dict)
    texture: float | None = None
    apart: float | None = None
    agreement: Callable[[dict[str, Tensor], Tensor, Tensor], dict[str, Tensor]] = lambda found, pictures, rows: {}
    gaps: list[str] = field(default_factory=list)


def evaluate(config: EvaluateConfig, command: str = "") -> None:
    """Measure a flow map at several numbers of jumps against many Euler steps; a killed run continues."""
    flow_map = load_model(config.model, config.device)
    examiner = examine(flow_map, config)
    folder = run_folder(config, f"runs/evaluate/{stem(config.model)}")
    if folder.load_result() is not None:
        console.print(FINISHED.format(folder.path), markup=False)
        return
    many = f"{config.euler} Euler steps"
    rows, drawn = measure(flow_map, examiner, config, folder, many)
    n = min(PAIRS, config.n)
    consistency = consistency_errors(flow_map, n, take_rows(examiner.cond, slice(0, n)))
    floors = {name: space.floor(config.n) for name, space in examiner.spaces.items()}
    tables = _tables(rows, floors, many, config.n)
    _print(config, tables, consistency, examiner.gaps)
    pictures = [("by the number of jumps", _plot(rows, floors, many, config.steps, folder.path / "jumps.png"))]
    pictures += _draw_samples({name: drawn[name] for name in rows}, examiner.names, folder.path)
    facts = {"command": command, **consistency, **({"not measured": "; ".join(examiner.gaps)} if examiner.gaps else {})}
    report(folder, f"Evaluation of {config.model}", facts, tables, pictures)
    summary: dict[str, Any] = {
        "command": command, "n": config.n, "samplers": {name: _nested(row) for name, row in rows.items()}, "data": floors,
        "texture_of_data": examiner.texture, "train_test": examiner.apart, "gaps": examiner.gaps, **consistency,
    }  # fmt: skip
    folder.save_result(summary)  # last: its presence says that the run is finished
    folder.clear_parts()


def measure(
    flow_map: FlowMap, examiner: Examiner, config: EvaluateConfig, folder: RunFolder, many: str
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """The numbers of each sampler by its name, the Euler steps' last, and its first pictures; those that a killed run left are
    read."""
    plans = [(many, config.euler, True)]  # first: the others are held against it
    plans += [(f"{steps} jumps" if steps > 1 else "1 jump", steps, False) for steps in config.steps]
    batches = [slice(b, min(b + config.batch_size, config.n)) for b in range(0, config.n, config.batch_size)]
    rows: dict[str, dict[str, float]] = {}
    drawn, ends = {}, None
    with progress("evaluating", len(plans) * len(batches)) as tick:
        for done, (name, steps, euler) in enumerate(plans):
            part = folder.load_part(done, prefix="plan")
            if part is None:
                part = _plan(
                    flow_map, examiner, batches, steps, ends, config.seeds,
                    lambda i, done=done: tick(done * len(batches) + i, len(plans) * len(batches)),
                )  # fmt: skip
                folder.save_part(done, part, prefix="plan")
            drawn[name], last = part.pop("pictures"), part.pop("ends")
            ends = last if euler else ends
            rows[name] = in_order(part, examiner.spaces)
            folder.log(sampler=name, **rows[name], once=("sampler",))
    rows[many] = rows.pop(many)
    return rows, drawn


def in_order(numbers: Mapping[str, Tensor], spaces: Mapping[str, Space]) -> dict[str, float]:
    """Distances by space, the first of which counts, then the others by name: a part that is read again has lost its order."""
    first = [f"{name}/{kind}" for name in spaces for kind in ("frechet", "kernel")]
    return {key: float(numbers[key]) for key in [*first, *sorted(numbers.keys() - set(first))]}


def _plan(
    flow_map: FlowMap, examiner: Examiner, batches: list[slice], steps: int, ends: Tensor | None, seed: int,
    tick: Callable[[int], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Metrics of one sampler over all batches, its first pictures and ``ends``; those of the Euler steps where there are none
    to compare with."""
    from steerfm.metrics import FrechetDistance, KernelDistance  # seconds, which benchmarks need not wait

    metrics = {  # features are computed once, for both
        name: (FrechetDistance(nn.Identity(), (space.mean, space.cov)), KernelDistance(nn.Identity(), space.rows))
        for name, space in examiner.spaces.items()
    }
    transition = Diffuse(0.0) if ends is None else None
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
            values = examiner.agreement(found, pictures, torch.arange(rows.start, rows.stop))
            if pictures.ndim == 4 and min(pictures.shape[2:]) >= 3:
                values["texture"] = texture(pictures) / (examiner.texture or 1.0)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + float(value.sum())
            if rows.start < PAIRS:
                features.append(next(iter(found.values()), pictures.flatten(1))[: PAIRS - rows.start])
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


def _nested(row: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a sampler for result.json: distances by space, and those of the first space once more by themselves."""
    spaces: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        if "/" in key:
            name, kind = key.split("/")
            spaces.setdefault(name, {})[kind] = value
    own = {key: value for key, value in row.items() if "/" not in key}
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
    agrees = [key for key in rows[many] if "/" not in key and key not in ("texture", "to_euler", "diversity", "seconds")]
    if agrees:
        lines = [[name, *(f"{row[key]:.4f}" for key in agrees)] for name, row in rows.items()]
        tables.append((f"agreement of {n} samples with what was asked", ["sampler", *agrees], lines))
    textured = ["texture"] if "texture" in rows[many] else []
    header = ["sampler", *textured, TITLES["to_euler"], "diversity", "ms a sample"]
    lines = [
        [
            name, *(f"{row[key]:.3g}" for key in textured), f"{row['to_euler']:.4f}", f"{row['diversity']:.3f}",
            f"{1e3 * row['seconds'] / n:.2f}",
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    return [*tables, (f"{n} samples", header, lines)]


def _print(config: EvaluateConfig, tables: Tables, consistency: Mapping[str, float], gaps: list[str]) -> None:
    for title, header, lines in tables:
        print_table(header, lines, f"{config.model}: {title}")
    for line in [", ".join(f"{name} {value:.5f}" for name, value in consistency.items()), *gaps]:
        console.print(line)


def _draw_samples(pictures: Mapping[str, Tensor], names: list[str], folder: Path) -> list[tuple[str, Path]]:
    """samples-0.png, ...: the first samples of each sampler, where they are pictures."""
    drawn = []
    for index, (name, some) in enumerate(pictures.items()):
        if some.ndim == 4 and some.shape[1] in (1, 3):
            shown, captions = grid_rows(some, names[: len(some)])
            drawn.append((name, picture_grid(shown, folder / f"samples-{index}.png", captions=captions, title=name)))
    return drawn


def _plot(rows: Rows, floors: Rows, many: str, steps: list[int], path: Path) -> Path:
    """Every measure against the number of jumps."""
    jumps = [row for name, row in rows.items() if name != many]
    lines = {}
    for key in rows[many]:
        if key not in ("diversity", "seconds"):
            name, _, kind = key.partition("/")
            titles = {"frechet": f"Fréchet distance, {name}", "kernel": f"kernel distance, {name}", "": TITLES.get(name, name)}
            data = floors[name][kind] if kind else 1.0 if key == "texture" and floors else None
            lines[titles[kind]] = [row[key] for row in jumps], rows[many][key], data
    return jumps_plot(steps, lines, path, many)


# --- what models are held against --------------------------------------------------------------------------------------
def examine(flow_map: FlowMap, config: EvaluateConfig) -> Examiner:
    """What ships for the data of this model's card decides; where nothing does, the samples speak for themselves."""
    if (names := zoo.classifiers(flow_map)) and flow_map.class_names in ((), zoo.load_classifier(names[-1])[1]):
        return _by_class(flow_map, names, config)
    if zoo.scorers(flow_map) and getattr(flow_map, "text", None) is not None:
        return _by_prompt(flow_map, config)
    return _by_itself(flow_map, config)


def _by_itself(flow_map: FlowMap, config: EvaluateConfig) -> Examiner:
    """Maps of data that no shipped network knows: all classes in turn, or the prompts that are given."""
    prompts = read_prompts(config.prompt)
    why = f"no distances to the data, texture is not relative to theirs: no shipped network knows {config.model}'s data"
    why += f" (card.data is {flow_map.data!r}, classes {len(flow_map.class_names)})"
    if prompts and getattr(flow_map, "text", None) is not None:
        each = [prompts[i % len(prompts)] for i in range(config.n)]
        return Examiner(flow_map.condition(each, config.n), each[:SHOWN], gaps=[why])
    if not flow_map.class_names:
        return Examiner(None, [""] * min(SHOWN, config.n), gaps=[why])
    names = [flow_map.class_names[i % len(flow_map.class_names)] for i in range(config.n)]
    return Examiner(flow_map.condition(names, config.n), names[:SHOWN], gaps=[why])


def _by_class(flow_map: FlowMap, classifiers: tuple[str, ...], config: EvaluateConfig) -> Examiner:
    """Maps of data that classifiers ship for: shipped statistics of the test split, and the accuracy of the held-out one."""
    networks: dict[str, Any] = {name: zoo.load_classifier(name)[0].to(flow_map.device) for name in classifiers}
    statistics = {name: zoo.statistics(name) for name in classifiers}
    spaces = {
        name: Space(networks[name].features, s["test_mean"], s["test_cov"], int(s["test_count"]), s["test_rows"])
        for name, s in statistics.items()
    }
    first, judge = statistics[classifiers[0]], networks[classifiers[-1]]
    apart = frechet_distance(first["train_mean"], first["train_cov"], first["test_mean"], first["test_cov"])
    energy = float(first["test_texture"])
    names = flow_map.class_names
    if not names:
        return Examiner(None, [""] * min(SHOWN, config.n), spaces, energy, apart)
    # drawn like the data's: estimates that take samples for independent are too low for classes in turn
    labels = torch.randint(len(names), (config.n,), generator=stream(config.seeds, "labels"))

    def agreement(found: dict[str, Tensor], pictures: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"accuracy": judge.head(found[classifiers[-1]]).argmax(1).cpu() == labels[rows]}

    return Examiner(labels, [names[label] for label in labels[:SHOWN].tolist()], spaces, energy, apart, agreement)


def word_spaces(device: torch.device | str) -> dict[str, tuple[Features, Features, Any]]:
    """Scorers of the shipped words by name: pictures to features, features to embeddings, texts to embeddings. The judge's
    comes first, where its packages are installed."""
    clip = encoders.open_clip("emoji-clip", device=device)
    spaces: dict[str, tuple[Features, Features, Any]] = {"emoji-clip": (clip.encode_image, nn.Identity(), clip.encode_text)}
    if can_judge_words():
        scorer: Any = rewards.reward("emoji_judge")
        judge = scorer.network(device)
        spaces = {"emoji-judge": (judge.features, judge.encode_image, judge.encode_text)} | spaces
    return spaces


def known_features(name: str, features: Features, device: torch.device | str) -> Tensor:
    """Features (m, d) of the training data in a space of `word_spaces`: one picture of each concept and style. They are kept
    beside the data.

    Raises:
        FileNotFoundError: the data are not prepared.
    """
    pictures = _one_of_each(emoji.load())
    file = emoji.data_folder() / f"features-{name}-{len(pictures)}.safetensors"
    if not file.is_file():
        with torch.inference_mode(), progress("features of the data", len(pictures)) as tick:
            parts = []
            for part in pictures.split(256):
                parts.append(features(part.to(device)).cpu())
                tick(sum(map(len, parts)), len(pictures))
        files.write_tensors(file, {"features": torch.cat(parts).clone()})
    return load_file(file)["features"]


def _one_of_each(data: emoji.Emoji) -> Tensor:
    """Pictures (m, 3, h, w) in [0, 1] of the training data, one of each concept and style."""
    return data.pictures[torch.stack([group[0] for group in data.groups(held_out=False)])].float() / 255


def _by_prompt(flow_map: Any, config: EvaluateConfig) -> Examiner:
    """Maps of captioned emoji: the data's features by the judge and the clip, likeness to the prompts, retrieval among 100."""
    data = emoji.load()
    rows = torch.stack([group[0] for group in data.groups(config.held_out)])
    prompts = read_prompts(config.prompt) or list(dict.fromkeys(data.caption(int(row)) for row in rows))
    each = [prompts[i % len(prompts)] for i in range(config.n)]
    clip = rewards.reward("clip")
    scorers = word_spaces(flow_map.device)
    spaces = {name: Space.of(f[0], known_features(name, f[0], flow_map.device)) for name, f in scorers.items()}
    first, (_, embedded, encode_text) = next(iter(scorers.items()))
    with torch.inference_mode():
        texts = torch.cat([encode_text(prompts[i : i + 256]).cpu() for i in range(0, len(prompts), 256)])
    generator = stream(0, "pools")
    others = min(POOL, len(prompts)) - 1
    pools = torch.stack([torch.randperm(max(1, len(prompts) - 1), generator=generator)[:others] for _ in range(config.n)])
    own = torch.arange(config.n) % len(prompts)
    pools = (pools + 1 + own[:, None]) % len(prompts)  # never the prompt itself

    def agreement(found: dict[str, Tensor], pictures: Tensor, rows: Tensor) -> dict[str, Tensor]:
        image = embedded(found[first]).cpu()
        right = (image * texts[own[rows]]).sum(1)
        wrong = torch.einsum("bd,bkd->bk", image, texts[pools[rows]])
        rank = (wrong >= right[:, None]).sum(1)
        scores = {"clip": clip(pictures, prompts=[each[row] for row in rows.tolist()]).cpu()}
        if can_judge_words():
            scores["judge"] = right
        return scores | {f"R@1 of {others + 1}": rank < 1, f"R@10 of {others + 1}": rank < 10}

    gaps = ["retrieval by the clip, nothing by the judge: its packages are missing, see steerfm rewards emoji_judge"]
    return Examiner(
        flow_map.condition(each, config.n), each[:SHOWN], spaces, float(texture(_one_of_each(data)).mean()),
        spaces[first].floor(10**9)["frechet"], agreement, [] if can_judge_words() else gaps,
    )  # fmt: skip
