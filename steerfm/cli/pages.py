"""The page of `steerfm play`: the form, the steps of a run, and its result."""

from __future__ import annotations

import base64
import html
import io
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.themes import Base
from gradio.themes.utils.sizes import Size
from PIL import Image

from steerfm.cli.playground import Form, Halt, Playground, Progress, Result, Step, Term
from steerfm.cost import Cost
from steerfm.report.formats import short
from steerfm.steering.weights import LOW

TERMS = 3
"""Number of rewards in the form."""
BUDGETS = {"as the method is": None} | {f"{calls} network evaluations per output": calls for calls in (32, 64, 128, 256, 512)}
USUAL, NONE = "the usual one", "none"
COLUMNS = 4
"""Number of outputs side by side."""
SIDE = 128
"""Largest side of a picture, in pixels."""
WARNING = "⚠"
INTRO = """# steerfm playground
A reward says what you want. Press **Steer**: the model draws candidates, looks ahead to where each will end, and goes on with
those that the reward likes best."""
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that do not wait for a turn."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss: data: blob:"
"""Content policy: the browser loads nothing from other servers."""
CSS = """
.gradio-container { max-width: 1200px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container > main { box-sizing: border-box; }
p.line { margin: .3rem 0; } p.quiet { color: var(--body-text-color-subdued); margin: .3rem 0; }
p.warning, p.error { border-left: 4px solid #c29200; background: #fff8e1; color: #3d2f00; padding: .5rem .75rem;
  margin: .5rem 0; }
p.error { border-color: #b00020; background: #fdecea; color: #5f0010; overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; } figcaption { color: var(--body-text-color-subdued); margin-bottom: .4rem; }
.sf-row { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 6px; margin-bottom: 10px; max-width: 640px; }
.sf-one img { width: 100%; image-rendering: pixelated; display: block; } .sf-one.pale img { opacity: .35; }
.sf-one b { display: block; height: 6px; background: var(--border-color-primary); margin-top: 2px; }
.sf-one i, .bar i { display: block; height: 100%; background: #0072b2; }
.tables table, .tables tbody, .tables tr { border: 0 !important; }
.tables table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
.tables table :is(th, td) { border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  text-align: left; padding: .3rem 1rem .3rem 0 !important; }
.tables td.bar { width: 10rem; } .tables td.bar i { height: 10px; } .tables td.bar i.low { background: #cc4400; }
.sf-pair { display: grid; grid-template-columns: 4.5rem repeat(4, minmax(0, 8rem)); gap: 8px; align-items: center; }
.sf-pair img { width: 100%; image-rendering: pixelated; display: block; } .sf-pair span { display: block; text-align: center; }
.sf-pair + .sf-pair { margin-bottom: 1rem; }
.narrow { display: none; } .plot { overflow-x: auto; }
.plot img { width: 100%; min-width: 500px; max-width: 640px; background: #fff; }
@media (max-width: 640px) {
  .sf-row { grid-template-columns: repeat(4, minmax(0, 1fr)); } .sf-one:nth-child(n + 5) { display: none; }
  .narrow { display: block; }
  .sf-pair { grid-template-columns: repeat(4, minmax(0, 1fr)); } .sf-pair b { grid-column: 1 / -1; }
  .tables td.bar { width: 5rem; } .gradio-container > main { padding: 12px !important; }
}
"""


# --- pieces in HTML ----------------------------------------------------------------------------------------------------
def say(text: str, kind: str = "line") -> str:
    """One line of text; ``kind`` is line, quiet, warning or error."""
    return f'<p class="{kind}" role="{"alert" if kind == "error" else "status"}">{html.escape(text)}</p>'


def figure(step: Step) -> str:
    """The candidates of a step: a row for each output, with weights as bars below."""
    if step.pictures is None:
        return ""
    what = "Where the candidates will end, by one jump" if step.ahead else "The candidates as they are"
    rows = []
    for output, row in enumerate(step.pictures):
        cells = [_candidate(step, output, place, picture) for place, picture in enumerate(row)]
        rows.append(f'<div class="sf-row">{"".join(cells)}</div>')
    few = f"those of the largest weight among {step.k}, a row for each picture"
    caption = f"{what}: {few}. The bar is a candidate's weight; those that are pale do not go on."
    return f'<figure class="step"><figcaption>{caption}</figcaption>{"".join(rows)}</figure>'


def _candidate(step: Step, output: int, place: int, picture: np.ndarray) -> str:
    weight, reward = step.weights[output, place], step.reward[output, place]
    words = f"weight {weight:.0%}" + ("" if np.isnan(reward) else f", reward {short(float(reward))}")
    pale = "" if step.copies[output, place] else " pale"
    bar = f'<i style="width:{weight / max(step.weights[output].max(), 1e-9):.0%}"></i>'
    image = f'<img src="{_source(picture)}" alt="candidate {place + 1} of output {output + 1}: {words}">'
    return f'<div class="sf-one{pale}" title="{words}">{image}<b>{bar}</b></div>'


def _source(picture: np.ndarray) -> str:
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def walk(steps: list[Step]) -> str:
    """A table with a row for each step: time, ESS with a bar, outputs that were resampled."""
    head = "<tr><th>time</th><th>ESS</th><th></th><th>resampled</th></tr>"
    rows = "".join(
        f'<tr><td>{step.t:.2f}</td><td>{step.ess:.0%}</td><td class="bar"><i class="{"low" if step.ess < LOW else ""}" '
        f'style="width:{step.ess:.0%}"></i></td><td>{step.resampled} of {step.n}</td></tr>'
        for step in steps
    )
    about = "Time 0 is noise, 1 is the picture. ESS: the share of the candidates that carries the weight."
    return f'<figure><figcaption>{about}</figcaption><table class="walk">{head}{rows}</table></figure>' if steps else ""


def comparison(result: Result) -> str:
    """Base above steered, a few outputs at a time, with the reward of each."""
    rows, prompts = [], result.numbers["prompts"]
    number = len(next(iter(result.pictures.values()), ()))
    for start in range(0, number, COLUMNS):
        if prompts and start % result.task.config.n == 0:
            rows.append(f"<h4>{html.escape(prompts[start // result.task.config.n]['prompt'])}</h4>")
        for name, pictures in result.pictures.items():
            tiles = "".join(
                f'<div><img src="{_source(pictures[i])}" alt="{name}, output {i + 1}">'
                f"<span>{short(result.rewards[name][i])}</span></div>"
                for i in range(start, min(start + COLUMNS, number))
            )
            rows.append(f'<div class="sf-pair"><b>{name}</b>{tiles}</div>')
    about = f"The same seeds without and with steering; {html.escape(result.numbers['reward'])} below."
    return f"<figure><figcaption>{about}</figcaption>{''.join(rows)}</figure>" if rows else ""


def plot(file: Path) -> str:
    """The plot of a run; it scrolls on narrow screens."""
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="value, ESS and guidance over time, and the final rewards">'
    return f'<p class="quiet narrow">Scroll it to the side.</p>{image}'


def summary(result: Result) -> str:
    """The results, in numbers and words."""
    numbers = result.numbers
    judge = numbers["held_out"]
    rows = [("reward: " + str(numbers["reward"]), numbers["reward_base"], numbers["reward_best"])]
    rows += [(f"held-out judge: {judge['name']}", judge["base"], judge["steered"])] if judge else []
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{short(a)}</td><td>{short(b)}</td></tr>" for name, a, b in rows)
    table = f"<table><tr><th></th><th>base</th><th>steered</th></tr>{cells}</table>"
    words = result.diagnosis.in_words()
    wrong = result.diagnosis.too_large or result.diagnosis.too_small
    lines = [say(f"{WARNING} the strength is {words.pop('the strength')}", "warning")] if wrong else []
    if not wrong and "low ESS" in words:
        lines.append(say(f"{WARNING} low ESS: {words.pop('low ESS')}", "warning"))
    lines += [] if judge else [say("No held-out judge: the model's card names none that knows what is asked for here.")]
    lines += [say(f"{name}: {text}") for name, text in words.items()]
    return table + "".join(lines) + say(f"cost: {Cost(**numbers['cost'])}")


# --- the page ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fields:
    """The input fields, as in `Form`; three for each reward: name, weight and settings."""

    model: gr.Dropdown
    words: gr.Textbox
    label: gr.Dropdown
    terms: list[tuple[gr.Dropdown, gr.Slider, gr.Textbox]]
    strength: gr.Slider
    auto: gr.Checkbox
    method: gr.Dropdown
    budget: gr.Dropdown
    settings: gr.Textbox
    n: gr.Slider
    seed: gr.Number
    guidance: gr.Number

    @classmethod
    def of(cls, playground: Playground) -> Fields:
        """Make the fields with the starting values."""
        form = playground.initial()
        facts = playground.facts(form.model)
        model = gr.Dropdown(playground.models(), value=form.model, label="Model")
        words = gr.Textbox(form.words, label="Words", info=_words(facts.reads), lines=1, max_lines=4)
        label = gr.Dropdown(**_classes(facts.classes, form.label), label="Class")
        terms = [_term(playground, form, 0)]
        with gr.Accordion("More rewards", open=len(form.terms) > 1):
            terms += [_term(playground, form, place) for place in range(1, TERMS)]
        auto = gr.Checkbox(form.strength == "auto", label="Choose the strength for me")
        strength = gr.Slider(
            0, max(100, _number(form.strength)), _number(form.strength), step=0.5, label="Strength",
            info="How hard the reward pulls. 0 is the model itself; too much gives what the reward likes and nobody wants.",
            interactive=form.strength != "auto",
        )  # fmt: skip
        n = gr.Slider(1, 16, form.n, step=1, label="Pictures", info="Of each line of words.")
        with gr.Accordion("Method, budget and seed", open=False):
            method = gr.Dropdown([USUAL, *playground.methods()], value=form.method or USUAL, label="Method")
            budget = gr.Dropdown([*BUDGETS], value=next(iter(BUDGETS)), label="Budget")
            settings = gr.Textbox(form.settings, label="Settings of the method", placeholder="particles=8 steps=4")
            seed = gr.Number(form.seed, precision=0, minimum=0, label="Seed", info="The same seed gives the same pictures.")
            guidance = gr.Number(form.guidance, label="Classifier-free guidance", info="1 for none.")
        return cls(model, words, label, terms, strength, auto, method, budget, settings, n, seed, guidance)

    def all(self) -> set[Any]:
        """All fields."""
        return {part for value in vars(self).values() for part in (sum(value, ()) if isinstance(value, list) else (value,))}

    def form(self, data: Mapping[Any, Any]) -> Form:
        """The form with the current values."""
        chosen = [tuple(data[part] for part in term) for term in self.terms]
        terms = tuple(Term(name, weight, typed) for name, weight, typed in chosen if name != NONE and weight)
        return Form(
            model=data[self.model], terms=terms, strength="auto" if data[self.auto] else float(data[self.strength]),
            words=data[self.words], label="" if data[self.label] in (None, NONE) else data[self.label],
            method="" if data[self.method] == USUAL else data[self.method], settings=data[self.settings],
            budget=BUDGETS[data[self.budget]], n=int(data[self.n]), seed=int(data[self.seed] or 0),
            guidance=float(1 if data[self.guidance] is None else data[self.guidance]),
        )  # fmt: skip


def _number(strength: float | str) -> float:
    return 5.0 if isinstance(strength, str) else strength


def _words(reads: bool) -> str:
    return "What to draw; a line each for several." if reads else "Only for rewards that read words: this model does not."


def _classes(classes: tuple[str, ...], label: str) -> dict[str, Any]:
    """Arguments of the field of classes; it is hidden if there are none."""
    return {"choices": [NONE, *classes], "value": label or NONE, "visible": bool(classes)}


def _placeholder(playground: Playground, reward: str) -> str:
    return (playground.reward_settings(reward) if reward != NONE else "") or "none to set"


def _term(playground: Playground, form: Form, place: int) -> tuple[gr.Dropdown, gr.Slider, gr.Textbox]:
    """Make the fields of a reward."""
    term = form.terms[place] if place < len(form.terms) else Term(NONE)
    names = playground.rewards() if not place else [NONE, *playground.rewards()]
    with gr.Group():
        name = gr.Dropdown(names, value=term.name, label=f"Reward {place + 1}" if place else "Reward")
        weight = gr.Slider(-5, 5, term.weight, step=0.1, label="Its weight")
        settings = gr.Textbox(term.settings, label="Its settings", placeholder=_placeholder(playground, term.name))
    # Not input, which leaving the list fires, too. The browser empties the settings at once: an answer of the server could come
    # when the next ones are typed.
    name.select(None, None, settings, js="() => ''", **QUICK)
    name.select(lambda value: gr.Textbox(placeholder=_placeholder(playground, value)), name, settings, **QUICK)
    return name, weight, settings


@dataclass(frozen=True)
class Panels:
    """The parts of the page that a run fills."""

    status: gr.HTML
    tabs: gr.Tabs
    step: gr.HTML
    walk: gr.HTML
    numbers: gr.HTML
    pictures: gr.HTML
    trace: gr.HTML
    command: gr.Code
    python: gr.Code
    picture_file: gr.DownloadButton
    folder_file: gr.DownloadButton
    steer: gr.Button
    stop: gr.Button

    @classmethod
    def of(cls, steer: gr.Button, stop: gr.Button) -> Panels:
        """Make them, empty."""
        status = gr.HTML(say("Nothing steered yet.", "quiet"), elem_id="status")
        with gr.Tabs(selected="watch") as tabs:
            with gr.Tab("Watch", id="watch"):
                step, walk = gr.HTML(), gr.HTML(elem_classes="tables")
            with gr.Tab("Result", id="result"):
                pictures, numbers = gr.HTML(), gr.HTML(elem_classes="tables")
                with gr.Row():
                    picture_file = gr.DownloadButton("Download the picture", interactive=False, size="sm")
                    folder_file = gr.DownloadButton("Download the run folder", interactive=False, size="sm")
            with gr.Tab("Plots", id="plots"):
                trace = gr.HTML(elem_classes="plot")
            with gr.Tab("Code", id="code"):
                command = gr.Code(language="shell", label="In a terminal", lines=2, interactive=False, wrap_lines=True)
                python = gr.Code(language="python", label="In Python", interactive=False, wrap_lines=True)
        return cls(status, tabs, step, walk, numbers, pictures, trace, command, python, picture_file, folder_file, steer, stop)

    def clear(self) -> dict[Any, Any]:
        """The updates that empty all parts while a run waits for its turn."""
        empty = (self.step, self.walk, self.numbers, self.pictures, self.trace, self.command, self.python)
        no = {part: gr.DownloadButton(value=None, interactive=False) for part in (self.picture_file, self.folder_file)}
        buttons = {self.steer: gr.Button(interactive=False), self.stop: gr.Button(interactive=True)}
        waits = {self.status: say("Waiting for its turn: one run at a time."), self.tabs: gr.Tabs(selected="watch")}
        return {part: "" for part in empty} | no | buttons | waits

    def end(self, text: str, kind: str = "line") -> dict[Any, Any]:
        """The updates at the end of a run."""
        buttons = {self.steer: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}
        return buttons | {self.status: say(text, kind)}

    def show_step(self, steps: list[Step]) -> dict[Any, Any]:
        return {self.step: figure(steps[-1]), self.walk: walk(steps)}

    def show_result(self, result: Result, python: str) -> dict[Any, Any]:
        """The updates that show the result of a run."""
        files = {self.folder_file: gr.DownloadButton(value=str(result.archive), interactive=True)}
        if result.picture is not None:
            files[self.picture_file] = gr.DownloadButton(value=str(result.picture), interactive=True)
        panels = {self.numbers: summary(result), self.pictures: comparison(result), self.python: python}
        panels[self.trace] = plot(result.folder / "trace.png")
        return (
            self.end(f"Done in {result.numbers['cost']['seconds']:.1f} s.")
            | panels
            | files
            | {self.tabs: gr.Tabs(selected="result")}
        )


class Visits:
    """The open pages, and the event that stops the run of each."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}

    def begin(self, request: gr.Request) -> None:
        self._stops[str(request.session_hash)] = threading.Event()

    def of(self, request: gr.Request) -> threading.Event:
        return self._stops.setdefault(str(request.session_hash), threading.Event())

    def stop(self, request: gr.Request) -> None:
        self.of(request).set()

    def leave(self, request: gr.Request) -> None:
        """Stop the run of a page that was closed."""
        if stop := self._stops.pop(str(request.session_hash), None):
            stop.set()

    def end(self) -> None:
        for stop in self._stops.values():
            stop.set()


def run(
    playground: Playground, fields: Fields, panels: Panels, stop: threading.Event, data: Mapping[Any, Any]
) -> Iterator[dict[Any, Any]]:
    """Run, and yield the updates of the page after each step."""
    steps: list[Step] = []
    progress = Progress(0, 0)
    try:
        form = fields.form(data)
        task = playground.task(form)
        yield {panels.status: say("Loading."), panels.command: task.command}
        for event in playground.steer(task, stop):
            if isinstance(event, Progress):
                progress = event
                yield {panels.status: say(f"Step {event.done} of {event.steps}.")}
            elif isinstance(event, Step):
                steps.append(event)
                yield panels.show_step(steps)
            else:
                yield panels.show_result(event, event.python(playground.facts(form.model)))
    except Halt:
        yield panels.end(f"Stopped after step {progress.done} of {progress.steps}." if progress.steps else "Stopped.")
    except (ValueError, OSError, ImportError) as error:  # as the command line
        yield panels.end(" ".join(str(error).split()), "error")
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield panels.end(f"{type(error).__name__}: {' '.join(str(error).split())} (the terminal says where)", "error")


def page(playground: Playground, visits: Visits) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="steerfm playground", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                fields = Fields.of(playground)
                with gr.Row():
                    steer = gr.Button("Steer", variant="primary", elem_id="steer", min_width=100)
                    stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
            with gr.Column(scale=3, min_width=300):
                panels = Panels.of(steer, stop)
        _listen(playground, visits, fields, panels)
        demo.unload(visits.leave)
    return demo


def _listen(playground: Playground, visits: Visits, fields: Fields, panels: Panels) -> None:
    """Connect the buttons and fields."""

    def begin(request: gr.Request) -> dict[Any, Any]:
        visits.begin(request)
        return panels.clear()

    def go(data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from run(playground, fields, panels, visits.of(request), data)

    def halt(request: gr.Request) -> dict[Any, Any]:
        visits.stop(request)
        return {panels.status: say("Stopping after this step."), panels.stop: gr.Button(interactive=False)}

    def choose(name: str) -> dict[Any, Any]:
        form, facts = playground.example(name), playground.facts(name)
        first, *others = fields.terms
        fill = dict(zip(first, vars(form.terms[0]).values())) | {term[0]: NONE for term in others}
        fill |= {fields.words: gr.Textbox(form.words, info=_words(facts.reads))}
        fill |= {fields.label: gr.Dropdown(**_classes(facts.classes, form.label))}
        auto = form.strength == "auto"
        return fill | {fields.auto: auto, fields.strength: gr.Slider(value=_number(form.strength), interactive=not auto)}

    outputs = list(vars(panels).values())
    click = panels.steer.click(begin, None, outputs, **QUICK)
    click.then(
        go, fields.all(), outputs, concurrency_limit=1, show_progress="hidden", api_visibility="private", scroll_to_output=False
    )
    panels.stop.click(halt, None, [panels.status, panels.stop], **QUICK)
    fields.auto.input(lambda on: gr.Slider(interactive=not on), fields.auto, fields.strength, **QUICK)
    fields.model.select(choose, fields.model, list(fields.all() - {fields.model}), **QUICK)


# --- the server --------------------------------------------------------------------------------------------------------
class Policy:
    """Middleware that forbids the browser to load from other servers: the page works without a network."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[..., Any]) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sent)


def theme() -> Base:
    """System fonts, at least 12 px."""
    sizes = Size("12px", "12px", "13px", "15px", "16px", "20px", "26px", name="text")
    base = Base(
        primary_hue="indigo", neutral_hue="slate", text_size=sizes, font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    grey = {name: "*neutral_600" for name in ("body_text_color_subdued", "block_info_text_color", "block_label_text_color")}
    return base.set(**grey, **{f"{name}_dark": "*neutral_300" for name in grey})


def serve(demo: gr.Blocks, playground: Playground, port: int) -> tuple[str, str | None]:
    """Serve the page in background threads; return its address, and the public link if there is one."""
    from starlette.middleware import Middleware

    start = playground.start
    demo.queue(default_concurrency_limit=1)
    _, address, link = demo.launch(
        server_name=start.host, server_port=port, share=start.share, inbrowser=start.browser, quiet=True, ssr_mode=False,
        prevent_thread_lock=True, footer_links=[], theme=theme(), css=CSS, show_error=True, enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Policy)]}, mcp_server=False, pwa=False,
    )  # fmt: skip
    return address, link
