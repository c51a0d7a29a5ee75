"""The logic behind the page of `steerfm play`: from a form to keys of `steerfm steer`, and a run observed step by step."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import threading
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch

from steerfm import files, registry, rewards, zoo
from steerfm.cli.config import PlayConfig, SteerConfig
from steerfm.cli.loading import load, recipes, sequence
from steerfm.cli.parts import build_judge, build_method, build_reward, load_model, pick_device
from steerfm.cli.steer import Steered, Watch, work
from steerfm.cost import Ledger, aside
from steerfm.report.pictures import levels
from steerfm.steering import METHODS
from steerfm.steering.diagnosis import Diagnosis
from steerfm.steering.state import State
from steerfm.steering.steer import usual
from steerfm.steering.weights import normalise
from steerfm.values import ConfigError, line

OUTPUTS, PARTICLES = 4, 8
"""Outputs of a step to show, and particles of each: those with the largest weights."""
HIDDEN = ("judge", "device")
"""Keys of every run that the page does not show."""


# --- the form -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Term:
    """A reward of the form: its name, its weight in the sum, and its settings as typed: ``target=Bag``."""

    name: str
    weight: float = 1.0
    settings: str = ""

    @classmethod
    def of(cls, value: Any) -> Term:
        """Make a term of a reward in a configuration."""
        name, arguments = registry.split_spec(value, "reward")
        weight = float(arguments.pop("weight", 1.0))
        return cls(name, weight, settings(arguments))

    def overrides(self) -> list[str]:
        """The overrides of a command with this reward alone."""
        weight = [] if self.weight == 1 else [f"reward.weight={self.weight:g}"]
        return [f"reward={self.name}", *weight, *_settings_overrides("reward", self.settings)]


def settings(arguments: Mapping[str, Any]) -> str:
    """Format arguments as one types them into a field: ``target=Bag quality=75``."""
    return shlex.join(f"{key}={line(value)}" for key, value in arguments.items())


def _settings_overrides(key: str, typed: str) -> list[str]:
    """Turn ``a=1 b=2`` into overrides of a key.

    Raises:
        ConfigError: a quotation mark that is not closed, or no ``key=value``.
    """
    try:
        words = shlex.split(typed)
    except ValueError:
        raise ConfigError(f"settings of the {key}, {typed!r}: a quotation mark is not closed") from None
    for word in words:
        if "=" not in word:
            raise ConfigError(f"settings of the {key}: {word!r} is no key=value")
    return [f"{key}.{word}" for word in words]


@dataclass(frozen=True)
class Facts:
    """Facts about a model that the form needs.

    Attributes:
        reads: whether it takes prompts.
        classes: names of its classes; empty if it has none.
        usual: its usual method, as configurations have it.
    """

    reads: bool
    classes: tuple[str, ...]
    usual: Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """The values of the form.

    Attributes:
        model: its name.
        terms: of the reward.
        strength: or "auto".
        words: prompts, one per line.
        label: name of a class; "" for none.
        method: its name; "" for the usual one of the model.
        settings: settings of the method, as typed.
        budget: network evaluations per output to fit the method into; None: its own size.
        n, seed, guidance: see `SteerConfig`.
    """

    model: str
    terms: tuple[Term, ...]
    strength: float | Literal["auto"] = "auto"
    words: str = ""
    label: str = ""
    method: str = ""
    settings: str = ""
    budget: int | None = None
    n: int = 4
    seed: int = 0
    guidance: float = 1.0

    def prompts(self) -> list[str]:
        return [text.strip() for text in self.words.splitlines() if text.strip()]


@dataclass(frozen=True)
class Task:
    """A run to do: its configuration, and the command that does the same."""

    config: SteerConfig
    command: str


class Playground:
    """The state that all pages of a server share.

    Args:
        start: starting values of the form.
        root: parent of the run folders.

    Attributes:
        shared: whether other machines can reach the page.
    """

    def __init__(self, start: PlayConfig, root: Path) -> None:
        self.start, self.root = start, root
        self.shared = start.share or start.host not in ("127.0.0.1", "localhost", "::1")
        self._facts: dict[str, Facts] = {}
        self._numbers = threading.Lock()

    # --- the form ------------------------------------------------------------------------------------------------------
    def initial(self) -> Form:
        """The form when the page opens.

        Raises:
            ConfigError: an unknown model.
        """
        start = self.start
        form = self.example(registry.split_spec(start.model, "model")[0])
        form = replace(form, n=start.n, seed=start.seeds, guidance=start.guidance)
        if start.reward is not None:
            form = replace(form, terms=tuple(map(Term.of, sequence(start.reward))))
        if start.strength is not None:
            form = replace(form, strength=start.strength)
        if start.label is not None:
            form = replace(form, label=start.label)
        if start.prompt is not None:
            form = replace(form, words="\n".join(sequence(start.prompt)))
        if start.method is not None:
            method, arguments = registry.split_spec(start.method, "method")
            form = replace(form, method=method, settings=settings(arguments))
        return form

    def example(self, model: str) -> Form:
        """A form that shows a model well: that of configs/play, or brightness as the reward."""
        known = recipes("play")
        shows = load(PlayConfig, str(known[model])) if model in known else PlayConfig(model, {"name": "brightness"})
        return Form(
            model, tuple(map(Term.of, sequence(shows.reward))), "auto" if shows.strength is None else shows.strength,
            "\n".join(sequence(shows.prompt or [])), shows.label or "",
        )  # fmt: skip

    def facts(self, model: str) -> Facts:
        """The facts about a model; it is loaded once for them."""
        if model not in self._facts:
            flow_map = load_model(self._model(model), self.start.device)
            self._facts[model] = Facts(isinstance(flow_map.null, Mapping), flow_map.class_names, usual(flow_map))
        return self._facts[model]

    def models(self) -> list[str]:
        """Names of the shipped flow maps and of the starting model."""
        ours = [name for name, head in zoo.models().items() if head["kind"] == "flow_map"]
        return list(dict.fromkeys([registry.split_spec(self.start.model, "model")[0], *ours]))

    def rewards(self) -> list[str]:
        """Names of the installed rewards, of those in the examples, and of the starting ones."""
        examples = [term.name for form in (self.initial(), *map(self.example, self.models())) for term in form.terms]
        return list(dict.fromkeys([*examples, *rewards.available()]))

    def reward_settings(self, reward: str) -> str:
        """The settings that a reward takes, as typed; "" if it takes none or cannot be loaded."""
        try:
            parameters = inspect.signature(rewards.find(reward)).parameters.values()
        except (ValueError, ImportError):
            return ""
        own = [p for p in parameters if p.name not in ("images", "prompts", "labels", "pictures")]
        return " ".join(f"{p.name}={'...' if p.default in (p.empty, None) else line(p.default)}" for p in own)

    def methods(self) -> list[str]:
        """Names of the methods, the starting one first."""
        return list(dict.fromkeys([*filter(None, [self.initial().method]), *METHODS]))

    def task(self, form: Form) -> Task:
        """Make the run of a form.

        Raises:
            ConfigError, RewardError: the message of `steerfm steer`, in one line.
        """
        overrides = self._overrides(form)
        config = load(SteerConfig, None, overrides)
        if self.shared:
            self._check_shared(config)
        if form.budget is not None:
            overrides += self._budget_overrides(config, form)
            config = load(SteerConfig, None, overrides)
        return Task(config, shlex.join(["steerfm", "steer", *overrides]))

    def _overrides(self, form: Form) -> list[str]:
        """The keys of a form as typed after ``steerfm steer``, except those of the budget."""
        overrides = _spec_overrides("model", self._model(form.model))
        facts, texts = self.facts(form.model), form.prompts()
        overrides += [f"prompt={line(texts)}"] if texts else []
        overrides += [f"label={form.label}"] if form.label and not facts.reads else []
        overrides += self._reward(form.terms)
        overrides += [f"method={form.method}"] if form.method else []
        overrides += _settings_overrides("method", form.settings)
        strength = form.strength if isinstance(form.strength, str) else f"{form.strength:g}"
        overrides += [f"strength={strength}", f"n={form.n}", f"seeds={form.seed}"]
        overrides += [] if form.guidance == 1 else [f"guidance={form.guidance:g}"]
        for key in HIDDEN:
            value = getattr(self.start, key)
            overrides += [] if value == getattr(SteerConfig(), key) else _spec_overrides(key, value)
        return overrides

    def _model(self, name: str) -> Any:
        """The model of a name, with its arguments if it is the starting model."""
        return self.start.model if registry.split_spec(self.start.model, "model")[0] == name else name

    def _reward(self, terms: Sequence[Term]) -> list[str]:
        if not terms:
            raise ConfigError("no reward: choose one, and a weight other than 0")
        if len(terms) == 1:
            return terms[0].overrides()
        return [f"reward={line([load(SteerConfig, None, term.overrides()).reward for term in terms])}"]

    def _budget_overrides(self, config: SteerConfig, form: Form) -> list[str]:
        """The overrides that make the method spend the budget of a form.

        Raises:
            ConfigError: the method cannot be that cheap, or has no ``within``.
        """
        spec, facts = config.method, self.facts(form.model)
        if not form.method:
            spec = {**facts.usual, **{key: value for key, value in spec.items() if key != "name"}}
        method = build_method(spec)
        if not hasattr(method, "within"):
            raise ConfigError(
                f"method {spec['name']!r} does not fit itself into a budget: leave that as it is, and set its size"
            )
        try:
            sized = method.within(form.budget)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        name = [] if form.method else _spec_overrides("method", facts.usual)
        return name + [f"method.{key}={line(value)}" for key, value in _differences(sized, method).items()]

    def _check_shared(self, config: SteerConfig) -> None:
        """Refuse code, files and addresses if other machines can reach the page.

        Raises:
            ConfigError: naming it.
        """
        own = set(_texts([self.start.model, self.start.reward, self.start.method, self.start.judge]))
        own |= {term.name for model in self.models() for term in self.example(model).terms}
        for text in _texts([config.reward, config.method]):
            far = registry.is_code(text) or os.path.exists(text) or set(text) & {"/", "\\"}
            if far and text not in own:
                raise ConfigError(f"{text}: this page is shared: it takes no code, files or addresses but those it began with")

    def warm(self) -> None:
        """Build the starting run, so that its errors come now and slow imports are done.

        Raises:
            ConfigError, RewardError: as on the command line.
        """
        from steerfm.report import style  # noqa: F401  matplotlib

        config = self.task(self.initial()).config
        reward, method = build_reward(config.reward), build_method(config.method)
        method.check(reward)
        build_judge(config, load_model(config.model, config.device), reward)

    # --- runs ----------------------------------------------------------------------------------------------------------
    def steer(self, task: Task, stop: threading.Event) -> Generator[Progress | Step | Result, None, None]:
        """Steer in a new run folder. Closing the iterator ends the run.

        Args:
            task: the run.
            stop: set it to end the run after the current step.

        Yields:
            The progress, the steps and at last the result.

        Raises:
            Halt: ``stop`` was set. Any error of a run. The folder is deleted then.
        """
        folder, events = self._folder(), SimpleQueue()

        def tell(event: Progress | Step) -> None:
            if stop.is_set():
                raise Halt
            events.put(event)

        watch = Watch(
            step=lambda state: tell(Step.of(state)),
            tick=lambda done, steps: tell(Progress(done, steps)),
            end=lambda run: events.put(Result.of(run, folder, task)),
        )
        worker = threading.Thread(target=_worker, args=(task, watch, folder, events.put), daemon=True)
        worker.start()
        done = False
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                done = done or isinstance(event, Result)
                yield event
        finally:
            stop.set()
            worker.join()
            if not done:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self) -> Path:
        """Make a new folder, named by the next free number."""
        with self._numbers:
            numbers = [int(path.stem) for path in self.root.glob("*") if path.stem.isdigit()]
            folder = self.root / f"{max(numbers, default=0) + 1:03}"
            folder.mkdir(parents=True)
        return folder


def _worker(task: Task, watch: Watch, folder: Path, say: Callable[[Any], None]) -> None:
    """Run a task in this thread, and at the end say its exception, or None."""
    end = None
    try:
        work(task.config, task.command, watch, str(folder))
    except BaseException as error:  # the thread that waits raises it
        end = error
    files.release()
    say(end)


def _spec_overrides(key: str, value: Any) -> list[str]:
    """Turn a name and its arguments into overrides."""
    if not isinstance(value, Mapping):
        return [f"{key}={value if isinstance(value, str) else line(value)}"]
    name, arguments = registry.split_spec(value, key)
    return [f"{key}={name}", *(f"{key}.{argument}={line(item)}" for argument, item in arguments.items())]


def _differences(new: Any, old: Any) -> dict[str, Any]:
    """Arguments in which ``new`` differs from ``old``, also inside its parts."""
    changed = {f.name: getattr(new, f.name) for f in fields(new) if f.init and getattr(new, f.name) != getattr(old, f.name)}
    return {
        key: _differences(value, getattr(old, key)) if is_dataclass(value) else value for key, value in changed.items()
    }  # fmt: skip


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


# --- events of a run ------------------------------------------------------------------------------------------------------
class Halt(BaseException):
    """A run was stopped from the page. Not an Exception, so that no handler on the way catches it."""


@dataclass(frozen=True)
class Progress:
    """Steps done, and steps in all."""

    done: int
    steps: int


@dataclass(frozen=True)
class Step:
    """The first outputs after a step, before the selection.

    Attributes:
        t: the time.
        ess: mean ESS of all outputs, as a share of the particles.
        resampled: number of outputs that were resampled.
        n, k: outputs, and particles of each.
        pictures: (n', k', h, w, c) bytes, by weight; None if samples are no pictures.
        ahead: whether these are look-aheads; otherwise they are the particles themselves.
        weights: (n', k'). reward: (n', k'), NaN without a look-ahead. copies: (n', k') how many copies of each go on.
    """

    t: float
    ess: float
    resampled: int
    n: int
    k: int
    pictures: np.ndarray | None
    ahead: bool
    weights: np.ndarray
    reward: np.ndarray
    copies: np.ndarray

    @classmethod
    def of(cls, state: State) -> Step:
        """Make a step of a state; its pictures do not count as cost."""
        before, problem = state.parents, state.problem
        weights = normalise(before.log_w).exp()
        n, k = weights.shape
        top = weights[:OUTPUTS].argsort(dim=1, descending=True, stable=True)[:, :PARTICLES]
        rows = (torch.arange(len(top), device=top.device).unsqueeze(1) * k + top).flatten()
        ahead = before.now.endpoint is not None
        z = before.x if before.now.endpoint is None else before.now.endpoint
        with torch.no_grad(), aside(Ledger()):
            pictures = problem.flow_map.decode(z[rows])
        shown = levels(pictures) if pictures.ndim == 4 else None
        scores = before.now.scores
        reward = torch.full((n * k,), torch.nan) if scores is None else scores.total.float().cpu()
        ones = torch.ones(state.selected.ancestors.shape, device=top.device)
        copies = torch.zeros(n, k, device=top.device).scatter_add(1, state.selected.ancestors, ones)
        return cls(
            t=state.t, ess=float(state.ess.mean()), resampled=int(state.selected.resampled.sum()), n=n, k=k,
            pictures=None if shown is None else shown.reshape(*top.shape, *shown.shape[1:]),
            ahead=ahead, weights=weights[:OUTPUTS].gather(1, top).cpu().numpy(),
            reward=reward.view(n, k)[:OUTPUTS].gather(1, top.cpu()).numpy(),
            copies=copies[:OUTPUTS].gather(1, top).cpu().numpy(),
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished run, as its folder has it.

    Attributes:
        folder: of the run.
        task: the run.
        numbers: contents of result.json.
        diagnosis: diagnosis of the strength.
        pictures: {"base", "steered"} bytes (n, h, w, c) of the same seeds; empty if samples are no pictures.
        rewards: {"base", "steered"} reward of each picture.
    """

    folder: Path
    task: Task
    numbers: Mapping[str, Any]
    diagnosis: Diagnosis
    pictures: Mapping[str, np.ndarray]
    rewards: Mapping[str, list[float]]

    @classmethod
    def of(cls, run: Steered, folder: Path, task: Task) -> Result:
        numbers = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        pictures = {name: levels(x) for name, x in run.pictures.items() if x.ndim == 4}
        return cls(folder, task, numbers, run.diagnosis, pictures, {name: x.tolist() for name, x in run.scores.items()})

    @property
    def config(self) -> SteerConfig:
        """The configuration that ran, with the method that replaced one that does not fit the model."""
        return load(SteerConfig, str(self.folder / "config.yaml"))

    @property
    def picture(self) -> Path | None:
        """The file with base and steered pictures of the first prompt; None if samples are no pictures."""
        return next((file for file in map(self.folder.joinpath, ("grid.png", "grid-0.png")) if file.is_file()), None)

    @cached_property
    def archive(self) -> Path:
        """The folder as a zip file, beside it."""
        file = self.folder.with_suffix(".zip")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    archive.write(path, Path(f"steerfm-{self.folder.name}") / path.relative_to(self.folder))
        return file

    def python(self, facts: Facts) -> str:
        """Python code that draws the same samples."""
        config = self.config
        device = pick_device(config.device)
        texts, each = sequence(config.prompt or []), config.n
        total = each * max(1, len(texts))
        keywords: dict[str, Any] = {"n": total, "seeds": _seeds(config.seeds, each, total), "strength": config.strength}
        asked = [text for text in texts for _ in range(each)]
        label = config.label
        if label is None and facts.classes and not facts.reads and "labels" in build_reward(config.reward).needs:
            label = [facts.classes[i % len(facts.classes)] for i in range(total)]
        keywords |= {"label": label} if label is not None else {}
        keywords |= {"cond" if facts.reads else "prompts": texts[0] if len(texts) == 1 else asked} if texts else {}
        name, arguments = registry.split_spec(config.model, "model")
        where = [f"device={_code(device)}"] if device != "cpu" else []
        load_arguments = ", ".join([_code(name), *where, *(f"{key}={_code(value)}" for key, value in arguments.items())])
        lines = ["import steerfm", "", f"flow_map = steerfm.load({load_arguments})"]
        lines += [f"flow_map = steerfm.Guided(flow_map, {config.guidance!r})"] if config.guidance != 1 else []
        what = [f"    {_code(_short(part))}," for part in (config.reward, config.method)]
        what += [f"    {key}={_code(value)}," for key, value in keywords.items()]
        lines += ["result = steerfm.steer(", "    flow_map,", *what, ")", "print(result)", 'result.grid("steered.png")']
        return "\n".join(lines) + "\n"


def _seeds(seeds: int | list[int], each: int, total: int) -> int | list[int]:
    """The seeds of `steerfm steer`: each prompt has the same."""
    first = list(range(seeds, seeds + each)) if isinstance(seeds, int) else seeds
    return seeds if total == each else first * (total // len(first))


def _short(value: Any) -> Any:
    """The name alone if there are no arguments."""
    return value["name"] if isinstance(value, Mapping) and value.keys() == {"name"} else value


def _code(value: Any) -> str:
    """Write a value in Python, texts in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_code(key)}: {_code(item)}' for key, item in value.items())}}}"
    return f"[{', '.join(map(_code, value))}]" if isinstance(value, list | tuple) else repr(value)
