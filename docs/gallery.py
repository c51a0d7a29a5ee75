"""The gallery: `python docs/gallery.py [NAME ...]` runs the commands of the page, draws their pictures and writes the page.

A quarter of an hour on two cores for all; with ``--page`` it runs nothing. Every command is of one of a few problems, which fit
the kind of the method. A picture has the best particle of each output, or what the tuned model makes of the same seeds.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import steerfm
from steerfm import finetuning
from steerfm.cli import main
from steerfm.cli.listing import method_gradient, method_title
from steerfm.report.pictures import enlarged
from steerfm.steering import METHODS

HERE = Path(__file__).parent
PICTURES = HERE / "gallery"
OUTPUTS, SIZE, GAP = 4, 96, 6
HEART = 'model=emoji prompt="a heart" reward=examples/blue.py:blue'


@dataclass(frozen=True)
class Problem:
    """What a kind of method is shown on.

    Attributes:
        name: of its picture: what the model makes by itself.
        title: of its section.
        text: what it asks for.
        keys: of the command.
        seen: what its pictures show, for those who do not see them.
        model: that makes the pictures; ask: what it is asked for.
    """

    name: str
    title: str
    text: str
    keys: str
    seen: str
    model: str
    ask: str | None


SAMPLERS = Problem(
    "plain-dresses", "Samplers",
    "They draw from the tilted density and give weights. The task: dresses, where brighter ones are more likely.",
    "label=Dress reward=brightness strength=10 n=4", "four bright dresses", "fashion", "Dress",
)  # fmt: skip
GUIDED = Problem(
    "plain-hearts", "Ascents and guidance",
    "They follow the gradient of the reward. The task: a heart, as blue as can be. All have\n"
    "strength 5: what is too little for one is too much for another.",
    f"{HEART} strength=5 n=4", "four hearts, from red to blue", "emoji", "a heart",
)  # fmt: skip
SEARCHES = Problem(
    "plain-clothes", "Searches",
    "They need no gradient: they try, look ahead and choose. The task: a bag,\nfrom a model that makes clothes of any kind.",
    "reward=classifier reward.target=Bag strength=10 n=4", "four bags, or what comes near to one", "fashion", None,
)  # fmt: skip
PROBLEMS = (SAMPLERS, GUIDED, SEARCHES)
TUNING = {
    "direct": "optimizer.steps=40",
    "weighted": "method.samples=512 method.rounds=2 optimizer.steps=120",
    "policy": "optimizer.steps=40 optimizer.lr=1e-3",
    "forward": "optimizer.steps=40 optimizer.lr=1e-3",
    "adjoint": "optimizer.steps=40",
    "posterior": "optimizer.steps=40",
    "noise": "optimizer.steps=40",
}
"""Families of fine-tuning, and what their commands set beside the recipe."""


def problem_of(name: str) -> Problem:
    """The problem that fits a steering method."""
    method = METHODS[name]
    if not method.samples.startswith("no"):
        return SAMPLERS
    return SEARCHES if method_gradient(method()) == "none" else GUIDED


def commands() -> dict[str, str]:
    """The command of every steering method, by its name."""
    return {name: f"steerfm steer --config {name} {problem_of(name).keys}" for name in METHODS if name != "steering"}


def tunings() -> dict[str, str]:
    """The command of every family of fine-tuning, by its name."""
    few = "distil.steps=0 watch.n=24 watch.base=60 watch.every=20 watch.patience=0"
    return {name: f"steerfm finetune --config {name} reward.target=Bag {keys} {few}" for name, keys in TUNING.items()}


def family(name: str) -> str:
    """The family of a fine-tuning method."""
    kinds = finetuning.METHODS
    return next(each for each in TUNING if kinds[name].__module__ == kinds[each].__module__)


def strip(pictures: Tensor, path: Path) -> None:
    """Draw pictures (b, c, h, w) side by side, without a text, on nothing: they stand on light and on dark pages."""
    cells = enlarged(pictures.unsqueeze(0), SIZE)[0]
    height, width = cells.shape[1:3]
    image = Image.new("RGBA", (len(cells) * (width + GAP) - GAP, height))
    for i, cell in enumerate(cells):
        image.paste(Image.fromarray(cell), (i * (width + GAP), 0))
    path.parent.mkdir(exist_ok=True)
    image.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_plain(problem: Problem) -> None:
    fm = steerfm.load(problem.model)
    strip(fm.decode(steerfm.sample(fm, n=OUTPUTS, cond=problem.ask)), PICTURES / f"{problem.name}.png")


def draw_steered(name: str, folder: Path) -> None:
    assert main([*shlex.split(commands()[name])[1:], f"out={folder}"]) == 0
    result = steerfm.SteeringResult.load(folder, steerfm.load(problem_of(name).model))
    assert result.flow_map is not None
    strip(result.flow_map.decode(result.best()), PICTURES / f"{name}.png")
    print(name, f"{result.cost.evaluations / len(result):.0f} evaluations per output, {result.cost.seconds:.0f} s")


def draw_tuned(name: str, folder: Path) -> None:
    assert main([*shlex.split(tunings()[name])[1:], f"out={folder}"]) == 0
    fm = steerfm.load(next(folder.glob("*-tuned.safetensors")))
    strip(fm.decode(steerfm.sample(fm, n=OUTPUTS)), PICTURES / f"tuned-{name}.png")


def page() -> str:
    """The text of docs/gallery.md."""
    steering, tuning = commands(), tunings()
    text = [
        "# Gallery",
        "Every method in one picture, with the command that made it. All pictures of a section have the same four seeds.\n"
        "Run the commands in a checkout, where `examples/` is. Methods have their default sizes here, and differ in cost.\n"
        "[The measurements](results/methods.md) compare them. Which one to take: [how to choose](choose.md).",
    ]
    for problem in PROBLEMS:
        text += [f"## {problem.title}", f"{problem.text} Without a reward the model makes these:"]
        text.append(f"![what the model makes without a reward](gallery/{problem.name}.png)")
        for name in (name for name in steering if problem_of(name) is problem):
            text += [f"### {name}", f"{sentence(METHODS[name])}"]
            text += [f"![{name}: {problem.seen}](gallery/{name}.png)", f"```bash\n{steering[name]}\n```"]
    text.append("## Fine-tuning")
    text.append(
        "The model itself learns. The task is that of the bags, and no reward takes part when these pictures are made.\n"
        "These are trials of a minute or two: real runs are longer, and stop by a judge ([how to fine-tune](finetuning.md)).\n"
        "`policy`, which does without the gradient, has hardly begun by then.\n"
        "Before:"
    )
    text.append(f"![what the model makes without a reward](gallery/{SEARCHES.name}.png)")
    for name in TUNING:
        others = [f"`{other}`" for other in finetuning.METHODS if other != name and family(other) == name]
        kin = f" Of the same family: {', '.join(others)}." if others else ""
        text += [f"### {name}, fine-tuning", sentence(finetuning.METHODS[name]) + kin]
        text += [
            f"![{name}: bags, or what comes near to one, of the tuned model](gallery/tuned-{name}.png)",
            f"```bash\n{tuning[name]}\n```",
        ]
    return "\n\n".join(text) + "\n"


def sentence(method: Any) -> str:
    """What a method is, and where it was published."""
    paper = getattr(method, "paper", "")
    where = f" (arXiv {paper})" if paper[:1].isdigit() else f" ({paper})" if paper else ""
    return f"{method_title(method)}{where}."


def draw(names: list[str]) -> None:
    """Run the commands and draw their pictures; of all, where no name is given."""
    for problem in PROBLEMS:
        if not names or problem.name in names:
            draw_plain(problem)
    for draw_one, known in ((draw_steered, commands()), (draw_tuned, tunings())):
        for name in known:
            if not names or name in names:
                with tempfile.TemporaryDirectory() as folder:
                    draw_one(name, Path(folder) / "run")


if __name__ == "__main__":
    if sys.argv[1:] != ["--page"]:
        torch.set_num_threads(1)
        draw(sys.argv[1:])
    (HERE / "gallery.md").write_text(page())
