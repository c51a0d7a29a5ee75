"""Figures of the README and of docs/: `python docs/figures.py` draws them anew, in two minutes on two cores.

hearts.png: one seed a column, by the strength of a reward. flow-map.png: a path, the jumps from it, and the best of the
particles that they steer. tuned-hearts.png: a fine-tuned model at several strengths of its adapter. tilt.png: weights.
draws.png: a state, the jump from it, and sixteen draws of what it may become.
"""

from __future__ import annotations

from pathlib import Path

import torch

import steerfm
from steerfm.cli import main
from steerfm.report.palette import look
from steerfm.report.pictures import picture_grid
from steerfm.report.style import add_key, mark, name_axes, new_figure, prepare, save_figure
from steerfm.steering.state import State
from steerfm.training.flow_map import posterior_pictures

HERE = Path(__file__).parent
PROMPT = "a heart"
BLUE = f"{HERE.parent / 'examples' / 'blue.py'}:blue"


def hearts(n: int = 6) -> None:
    fm = steerfm.load("emoji")
    rows, labels = [fm.decode(steerfm.sample(fm, n=n, seeds=0, cond=PROMPT))], ["not steered"]
    for strength in (5, 15, 30):
        result = steerfm.steer(fm, BLUE, n=n, seeds=0, cond=PROMPT, strength=strength)
        rows.append(fm.decode(result.best()))
        labels.append(f"strength {strength}")
    picture_grid(torch.stack(rows), HERE / "hearts.png", row_labels=labels)


def flow_map(strength: float = 8.0, steps: int = 6, seed: int = 5) -> None:
    fm = steerfm.load("emoji")
    cond = fm.condition(PROMPT, 1)
    times = [i / steps for i in range(steps + 1)]
    x = steerfm.sampling.Noise([seed]).start(fm)
    states, jumps = [], []
    for s, t in zip(times, [*times[1:], None]):
        states.append(fm.decode(x))
        jumps.append(fm.decode(x if s == 1 else fm.jump(x, s, 1.0, cond)))
        x = x if t is None else fm.jump(x, s, t, cond)
    steered, ahead = [states[0]], [jumps[0]]

    def show(state: State) -> None:
        best = int(state.log_w[0].argmax())
        steered.append(state.images()[:, best])
        ahead.append(state.lookahead_images()[:, best])

    method = steerfm.Funnel(particles=16, steps=steps)
    steerfm.steer(fm, BLUE, method, seeds=seed, cond=PROMPT, strength=strength, callback=show)
    rows = torch.stack([torch.cat(row) for row in (states, jumps, steered, ahead)])
    labels, columns = ["path", "preview", "steered", "preview"], ["t = 0", *(f"{t:.2g}" for t in times[1:])]
    picture_grid(rows, HERE / "flow-map.png", row_labels=labels, headings={2: ""}, columns=columns, text=11)


def tuned(n: int = 6) -> None:
    folder = HERE.parent / "runs" / "hearts"
    main(["finetune", "--config", "hearts", f"reward={BLUE}", f"out={folder}"])
    adapted = steerfm.load(folder / "adapter.safetensors")
    rows, labels = [], []
    for strength, label in ((0.0, "the base"), (0.25, "a quarter"), (0.5, "half"), (1.0, "all of what was learnt")):
        fm = adapted.with_strength(strength)
        rows.append(fm.decode(steerfm.sample(fm, n=n, seeds=0, cond=PROMPT, steps=2)))
        labels.append(label)
    picture_grid(torch.stack(rows), HERE / "tuned-hearts.png", row_labels=labels)


def draws(t: float = 0.2, seed: int = 11, across: int = 6) -> None:
    fm = steerfm.load("fashion")
    x = fm.interpolant.interpolate(steerfm.sampling.Noise([seed]).start(fm), steerfm.sample(fm, n=1, seeds=seed), t)
    pictures, names = posterior_pictures(fm, x, t, None, draws=16, seed=seed)
    rows = [names[i : i + across] for i in range(0, len(names), across)]
    picture_grid(pictures[:, 0].unflatten(0, (-1, across)), HERE / "draws.png", captions=rows, text=11)


def tilt(k: int = 24) -> None:
    """Twenty-four samples of two modes, weighted for a reward that grows to the right, at two strengths."""
    gm = steerfm.GaussianMixture(means=[[-1.5], [1.2]], covs=[[0.3], [0.4]], weights=[0.65, 0.35])
    x = torch.linspace(-4, 5, 400, dtype=torch.float64)[:, None]
    particles = gm.sample(k, torch.Generator().manual_seed(1))
    fig = new_figure(4.4)
    base, tilted, sticks = look("best_of_n"), look("funnel"), look("fmrg_j")
    axes = fig.subplots(2, 1, sharex=True)
    for ax, strength in zip(axes, (1.0, 4.0)):
        target, _ = gm.tilt(linear=[strength])
        weights = (strength * particles[:, 0]).softmax(0)
        ess = float(1 / weights.square().sum() / k)
        prepare(ax, f"strength {strength:g}: ESS {100 * ess:.0f}% of {k} particles")
        ax.plot(x[:, 0], gm.log_prob(x).exp(), color=base.colour, linewidth=1.4)
        ax.plot(x[:, 0], target.log_prob(x).exp(), color=tilted.colour, linewidth=1.8)
        ax.vlines(particles[:, 0], 0, weights, color=sticks.colour, linewidth=2)
        ax.set_ylim(0, 0.7)
        name_axes(ax, y="density; weight")
    name_axes(axes[-1], "x; the reward is x itself")
    marks = [
        mark(base, "the model's own density", marker=""), mark(tilted, "the tilted density", marker=""),
        mark(sticks, "particles: samples of the model, as high as their weights", marker=""),
    ]  # fmt: skip
    add_key(fig, marks, columns=1)
    save_figure(fig, HERE / "tilt.png")


if __name__ == "__main__":
    hearts()
    flow_map()
    tuned()
    tilt()
    draws()
