"""`steerfm evaluate`: distances to the data, agreement with what was asked, diversity and consistency of a flow map."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steerfm import config as configs
from steerfm import emoji, encoders, results, rewards, zoo
from steerfm.commands import _model, _progress, _rows, _stem, _table, can_judge_words, console, read_prompts
from steerfm.cost import Ledger
from steerfm.flowmap import Condition, FlowMap, move_condition, take_rows
from steerfm.metrics import feature_statistics, frechet_distance, pairwise_diversity
from steerfm.sampling import Diffuse
from steerfm.sampling import sample as draw
from steerfm.training import consistency_errors

POOL = 100
"""Prompts among which the right one is looked for."""


@dataclass
class Examiner:
    """What the samples of a model are held against.

    Attributes:
        features: pictures to features (b, d). reference: mean and covariance of the data's features.
        kernel: features of data for the kernel distance, or None. floor: distance between two parts of the data.
        cond: n rows. agreement: pictures, their features and their row numbers to what agrees (b,), by name.
        names: of the rows, for pictures.
    """

    features: Callable[[Tensor], Tensor]
    reference: tuple[Tensor, Tensor]
    kernel: Tensor | None
    floor: float
    cond: Condition
    agreement: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    names: list[str]


def evaluate(config: configs.EvaluateConfig, command: str = "") -> None:
    """Measure a flow map at several numbers of jumps against many Euler steps; a killed run continues."""
    flow_map = _model(config.model, config.device)
    text = getattr(flow_map, "text", None)
    examiner = _by_class(flow_map, config.n) if text is None else _by_prompt(flow_map, config)
    folder = results.RunFolder(config.out or f"runs/evaluate/{_stem(config.model)}", configs.dump(config))
    plans = [(f"{steps} jumps" if steps > 1 else "1 jump", steps, False) for steps in config.steps]
    plans.append((f"{config.euler} Euler steps", config.euler, True))
    batches = [slice(b, min(b + config.batch_size, config.n)) for b in range(0, config.n, config.batch_size)]
    rows: dict[str, dict[str, float]] = {}
    drawn = []
    with _progress("evaluating", len(plans) * len(batches)) as tick:
        for done, (name, steps, euler) in enumerate(plans):
            kept = folder.load_part(done, prefix="plan")
            if kept is None:
                kept = _plan(
                    flow_map, examiner, batches, steps, euler, config.seeds,
                    lambda i, done=done: tick(done * len(batches) + i, len(plans) * len(batches)),
                )  # fmt: skip
                folder.save_part(done, kept, prefix="plan")
            drawn.append((name, kept.pop("pictures")))
            rows[name] = {key: float(value) for key, value in kept.items()}
            folder.log(sampler=name, **rows[name])
    many = rows[plans[-1][0]]
    agrees = [key for key in many if key not in ("frechet", "kernel", "diversity", "seconds")]
    kernel = ["kernel"] if examiner.kernel is not None else []
    table = [
        (
            name, f"{row['frechet']:.3f}", f"{row['frechet'] / many['frechet']:.2f}", *(f"{row[key]:.5f}" for key in kernel),
            *(f"{row[key]:.4f}" for key in agrees), f"{row['diversity']:.3f}", f"{1e3 * row['seconds'] / config.n:.2f}",
        )
        for name, row in rows.items()
    ]  # fmt: skip
    n = min(500, config.n)
    consistency = consistency_errors(flow_map, n, take_rows(examiner.cond, slice(0, n)))
    header = [
        "sampler",
        "Fréchet distance",
        "relative",
        *(["kernel distance"] if kernel else []),
        *agrees,
        "diversity",
        "ms per sample",
    ]
    show = _table(*header, title=f"{config.model}: {config.n} samples; train-test distance {examiner.floor:.4f}")
    for line in table:
        show.add_row(*line)
    console.print(show)
    console.print(", ".join(f"{name} {value:.5f}" for name, value in consistency.items()))
    grids = []
    for index, (name, pictures) in enumerate(drawn):
        shown, captions = _rows(pictures, examiner.names[: len(pictures)])
        path = results.picture_grid(shown, folder.path / f"samples-{index}.png", captions=captions, title=name)
        grids.append((name, path))
    folder.save_result({"command": command, "train_test": examiner.floor, "samplers": rows, **consistency})
    facts = {"command": command, **consistency}
    results.report(folder, f"Evaluation of {config.model}", facts, [("samplers", header, table)], grids)
    folder.clear_parts()


def _plan(
    flow_map: FlowMap, examiner: Examiner, batches: list[slice], steps: int, euler: bool, seed: int, tick: Callable[[int], None]
) -> dict[str, Tensor]:  # fmt: skip
    """Metrics of one sampler over all batches, and its first pictures."""
    from steerfm.distances import FrechetDistance, KernelDistance  # seconds, which benchmarks need not wait

    distance = FrechetDistance(nn.Identity(), examiner.reference)  # features are computed once, for all of them
    kernel = None if examiner.kernel is None else KernelDistance(nn.Identity(), examiner.kernel)
    total: dict[str, float] = {}
    seconds, features, first = 0.0, [], []
    with torch.inference_mode():
        for i, rows in enumerate(batches):
            cond = move_condition(take_rows(examiner.cond, rows), flow_map.device)
            with Ledger() as ledger:
                x = draw(flow_map, rows.stop - rows.start, steps, seed + rows.start, cond, Diffuse(0.0) if euler else None)
            seconds += ledger.cost.seconds
            pictures = flow_map.decode(x)
            found = examiner.features(pictures)
            distance.update(found)
            if kernel is not None:
                kernel.update(found)
            for name, values in examiner.agreement(pictures, found, torch.arange(rows.start, rows.stop)).items():
                total[name] = total.get(name, 0.0) + float(values.sum())
            if i < 2:
                features.append(found)
                first.append(pictures[: max(0, 32 - sum(map(len, first)))].float().cpu())
            tick(i + 1)
    n = batches[-1].stop
    values = {"frechet": float(distance.compute())} | ({} if kernel is None else {"kernel": float(kernel.compute())})
    values |= {name: value / n for name, value in total.items()}
    values |= {"diversity": pairwise_diversity(torch.cat(features)), "seconds": seconds}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()} | {"pictures": torch.cat(first)}


def _by_class(flow_map: FlowMap, n: int) -> Examiner:
    """Maps of Fashion-MNIST: shipped statistics of the test split, and the judge's accuracy."""
    classifier, names, _ = zoo.load_classifier("fashion-classifier")
    judge = zoo.load_classifier("fashion-judge")[0].to(flow_map.device)
    classifier = classifier.to(flow_map.device)
    reference = zoo.statistics()
    labels = torch.arange(n) % len(names)  # as balanced as the test split
    floor = frechet_distance(reference["train_mean"], reference["train_cov"], reference["test_mean"], reference["test_cov"])

    def agreement(pictures: Tensor, found: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"accuracy": judge(pictures).argmax(1).cpu() == labels[rows]}

    said = [names[label] for label in labels[:32].tolist()]
    return Examiner(classifier.features, (reference["test_mean"], reference["test_cov"]), None, floor, labels, agreement, said)  # type: ignore[arg-type]


def words_judge(device: torch.device | str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Any]:
    """(pictures to features, features to embeddings, texts to embeddings) of the judge of words; where its packages are not
    installed, of the shipped open_clip model."""
    if can_judge_words():
        network = rewards.reward("emoji_judge").network(device)  # type: ignore[operator]
        return network.features, network.encode_image, network.encode_text
    network = encoders.open_clip("emoji-clip", device=device)
    return network.encode_image, nn.Identity(), network.encode_text


def known_features(features: Callable[[Tensor], Tensor], device: torch.device | str) -> Tensor:
    """Features (m, d) of the training data, by those of `words_judge`: one picture of each concept and style. They are kept
    beside the data.

    Raises:
        FileNotFoundError: the data are not prepared.
    """
    data = emoji.load()
    rows = torch.stack([group[0] for group in data.groups(held_out=False)])
    file = emoji.data_folder() / f"features-{'judge' if can_judge_words() else 'clip'}-{len(rows)}.safetensors"
    if not file.is_file():
        with torch.inference_mode(), _progress("features of the data", len(rows)) as tick:
            parts = []
            for part in rows.split(256):
                parts.append(features((data.pictures[part].float() / 255).to(device)).cpu())
                tick(sum(map(len, parts)), len(rows))
        unfinished = file.with_suffix(f".{os.getpid()}")  # several processes may be at it
        save_file({"features": torch.cat(parts).clone()}, unfinished)
        unfinished.replace(file)
    return load_file(file)["features"]


def _by_prompt(flow_map: Any, config: configs.EvaluateConfig) -> Examiner:
    """Maps of captioned emoji: the data's features in the judge's trunk, likeness to the prompts, retrieval among 100."""
    data = emoji.load()
    rows = torch.stack([group[0] for group in data.groups(config.held_out)])
    prompts = read_prompts(config.prompt) or list(dict.fromkeys(data.caption(int(row)) for row in rows))
    asked = [prompts[i % len(prompts)] for i in range(config.n)]
    clip = rewards.reward("clip")
    features, embedded, encode_text = words_judge(flow_map.device)
    known = known_features(features, flow_map.device)
    with torch.inference_mode():
        texts = torch.cat([encode_text(prompts[i : i + 256]).cpu() for i in range(0, len(prompts), 256)])
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    halves = [feature_statistics(known[part]) for part in order.chunk(2)]
    generator = torch.Generator().manual_seed(1)
    others = min(POOL, len(prompts)) - 1
    pools = torch.stack([torch.randperm(max(1, len(prompts) - 1), generator=generator)[:others] for _ in range(config.n)])
    own = torch.arange(config.n) % len(prompts)
    pools = (pools + 1 + own[:, None]) % len(prompts)  # never the prompt itself

    def agreement(pictures: Tensor, found: Tensor, rows: Tensor) -> dict[str, Tensor]:
        image = embedded(found).cpu()
        right = (image * texts[own[rows]]).sum(1)
        wrong = torch.einsum("bd,bkd->bk", image, texts[pools[rows]])
        rank = (wrong >= right[:, None]).sum(1)
        scores = {"clip": clip(pictures, prompts=[asked[row] for row in rows.tolist()]).cpu()}
        if can_judge_words():
            scores["judge"] = right
        return scores | {f"R@1 of {others + 1}": rank < 1, f"R@10 of {others + 1}": rank < 10}

    return Examiner(
        features, feature_statistics(known), known, frechet_distance(*halves[0], *halves[1]),
        flow_map.condition(asked, config.n), agreement, asked[:32],
    )  # fmt: skip
