"""The command line: ``steerfm COMMAND [--config FILE_OR_RECIPE] key.sub=value ...``. Errors are printed on one line."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import warnings
from importlib import import_module

from steerfm import __version__
from steerfm.cli import config as schemas
from steerfm.cli import loading
from steerfm.signals import Stopped, raised, stop_message

EXAMPLES = {
    "train": """examples:
  steerfm train --config fashion-velocity                         the first stage of the shipped flow map (hours on a CPU)
  steerfm train --config fashion-velocity optimizer.steps=20000   longer; the same command continues a killed run""",
    "sample": """examples:
  steerfm sample model=fashion label=Bag n=16 steps=4
  steerfm sample model=fashion label="Ankle boot" guidance=1.5 out=runs/boots
  steerfm sample model=runs/train/mine/mine.safetensors prompt=prompts.txt n=8""",
    "steer": """examples:
  steerfm steer reward=classifier reward.target=Bag
  steerfm steer --config emoji prompt="a red heart" reward=clip
  steerfm steer --config emoji prompt=prompts.txt n=4 reward=clip reward.model=ViT-B-32 reward.pretrained=laion2b_s34b_b79k
  steerfm steer label=Dress reward=brightness strength=40 method=best_of_n method.particles=64
  steerfm steer reward=examples/my_reward.py:striped method=fmrg_j n=8
  steerfm steer 'reward=[{name: classifier, target: Bag}, {name: symmetry, weight: 20}]' strength=5""",
    "play": """examples:
  steerfm play                                           a page at http://127.0.0.1:7860, with prompts
  steerfm play model=fashion                             with classes
  steerfm play reward=my_reward.py:mine strength=5       with a reward of yours
  steerfm play out=runs/play port=8000                   run folders are kept, a port of your choice""",
    "finetune": """examples:
  steerfm finetune reward=classifier reward.target=Bag                   three minutes on two idle cores
  steerfm finetune --config weighted reward=compressibility label=Dress  a black-box reward
  steerfm finetune --config direct label=all control=0.3 lora.rank=4""",
    "data": """examples:
  steerfm data emoji             fetch four npm packages, prepare 9,516 captioned pictures of 32 x 32
  steerfm data emoji --size 64
  steerfm data fashion           find Fashion-MNIST, or download it
  steerfm data folder --root pictures/ --size 32""",
    "evaluate": """examples:
  steerfm evaluate model=fashion                         10,000 samples: half an hour on a CPU
  steerfm evaluate model=fashion n=2000 steps=[1,4] euler=32
  steerfm evaluate model=emoji n=1000 steps=[1,2,4] euler=64 held_out=true""",
    "models": "examples:\n  steerfm models\n  steerfm models fashion",
    "rewards": """examples:
  steerfm rewards
  steerfm rewards classifier
  steerfm rewards my_reward.py:mine --check                   check that it meets the contract, and how to fix it if not
  steerfm rewards target_image --check reward.target=a.png model=emoji   with arguments, on pictures of a model's shape""",
    "methods": "examples:\n  steerfm methods\n  steerfm methods das",
    "bench": """examples:
  steerfm bench                                       list the benchmarks
  steerfm bench quick                                 methods at equal cost on Fashion-MNIST: two minutes
  steerfm bench quick methods.mine=my_method.py:Mine  and one of your own
  steerfm bench quick --workers 4                     with four processes; or run the same command on several machines
  steerfm bench exact --help""",
}
TEXTS = """texts (prompts, labels, names, paths) are used literally: prompt=12:30, prompt="a dog #1"
  prompt='[a dog, "cat, asleep"]'   a list; write the text [red] as '["[red]"]'
  prompt=FILE                       a file with one prompt per line, csv, JSON or JSON lines, whatever its ending
  label=null                        no label; in a prompt, null is a word

"""
HELP = {
    "train": "train a flow map or a classifier from a recipe",
    "sample": "draw unsteered samples",
    "steer": "steer samples towards a reward",
    "play": "steer from a page in the browser (pip install 'steerfm[play]')",
    "finetune": "fine-tune a flow map on a reward",
    "data": "prepare and check training data",
    "evaluate": "measure a flow map: distances, accuracy, consistency",
    "models": "list the shipped models, or show the card of one",
    "rewards": "list the installed rewards, or explain one",
    "methods": "list the steering methods, or show the parts of one",
    "bench": "list the benchmarks, or run one with its own options",
}
SCHEMAS = {
    "train": schemas.TrainConfig,
    "sample": schemas.SampleConfig,
    "steer": schemas.SteerConfig,
    "play": schemas.PlayConfig,
    "finetune": schemas.FinetuneConfig,
    "evaluate": schemas.EvaluateConfig,
}


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    root = argparse.ArgumentParser(prog="steerfm", description="Steer and fine-tune flow maps with rewards.")
    root.add_argument("--version", action="version", version=f"steerfm {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in HELP.items():
        keys = ""
        if name in SCHEMAS:
            keys = f"keys, with their defaults, meaning and values:\n{_indent(loading.explain(SCHEMAS[name]))}\n\n"
            recipes = ", ".join(loading.recipes(name))
            keys += f"recipes: {recipes}\n\n" if recipes else ""
            keys += TEXTS if name != "train" else ""
        sub = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=keys + EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        if name in SCHEMAS:
            sub.add_argument("--config", metavar="FILE_OR_RECIPE", help="a yaml file, or the name of a shipped recipe")
            sub.add_argument("--show", action="store_true", help="print the complete configuration and exit")
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
        elif name in ("rewards", "methods", "models"):
            sub.add_argument("name", nargs="?", help="the one to explain")
            if name == "rewards":
                sub.add_argument("--check", action="store_true", help="check that it meets the contract (steerfm.testing)")
                sub.add_argument(
                    "settings", nargs="*", metavar="key=value", help="for --check: reward.KEY=, model=, prompt= or label="
                )
            if name in ("methods", "models"):
                sub.add_argument("--markdown", action="store_true", help="print the table of the documentation")
        elif name == "data":
            sub.add_argument("name", help="emoji, fashion, or folder for your own pictures in --root")
            sub.add_argument("--size", type=int, default=32, help="side of the pictures in pixels; 8 to 64 for emoji")
            sub.add_argument("--root", help="data folder; default $STEERFM_DATA or ~/.cache/steerfm")
        elif name == "bench":
            sub.add_argument("name", nargs="?", help="the benchmark to run")
            sub.add_argument("arguments", nargs=argparse.REMAINDER, help="its options; --help lists them")
    return root


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments of the command line, without the program name; by default those of the process.

    Returns:
        Exit code: 0; 1 if a training learnt nothing; 2 for bad input or a file that cannot be written; 130 after Ctrl-C; 143
        after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    options, extra = parser().parse_known_args(argv)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics)(\.|$)")
    try:
        with raised():
            return _main(options, extra, argv)
    except (Stopped, KeyboardInterrupt) as stop:
        where = stop.where if isinstance(stop, Stopped) else ""
        if not where and (files := sys.modules.get("steerfm.files")) and (folders := files.claimed_folders()):
            where = f"what is done is in {folders[0]}"
        print(stop_message(where), file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        if options.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    finally:
        if files := sys.modules.get("steerfm.files"):  # --help does not import it, because it imports torch
            files.release()


def _main(options: argparse.Namespace, extra: list[str], argv: list[str]) -> int:
    config = None
    if hasattr(options, "overrides"):  # overrides may come before and after --config
        config = loading.load(SCHEMAS[options.command], options.config, [*options.overrides, *extra])
        if options.show:
            print(loading.dump(config), end="")
            return 0
    elif options.command == "bench":
        options.arguments += extra
    elif options.command == "rewards":  # settings may come before and after --check
        options.settings += extra
        if options.settings and not options.check:
            raise ValueError(f"{options.settings[0]}: settings need --check: steerfm rewards {options.name} --check")
    elif extra:
        parser().error(f"unrecognized arguments: {' '.join(extra)}")
    return _run(options, argv, config)


def _run(options: argparse.Namespace, argv: list[str], config: object) -> int:
    command = shlex.join(["steerfm", *argv])  # can be pasted into a shell
    match options.command:  # torch takes seconds to import, so --help and configuration errors do without it
        case "models":
            from steerfm.cli.listing import list_models

            list_models(options.name, options.markdown)
        case "rewards" if options.check:
            from steerfm.cli.check import check_reward

            check_reward(options.name, options.settings)
        case "rewards":
            from steerfm.cli.listing import list_rewards

            list_rewards(options.name)
        case "methods":
            from steerfm.cli.listing import list_methods

            list_methods(options.name, options.markdown)
        case "data":
            from steerfm.cli.data import prepare_data

            prepare_data(options.name, options.size, options.root)
        case "bench":
            from steerfm.cli.bench import bench

            bench(options.name, options.arguments, command)
        case "sample" | "steer" | "play" | "evaluate" | "train" | "finetune":
            if options.command in ("train", "finetune"):
                from steerfm.cli.console import quiet_lightning

                quiet_lightning()
            module = import_module(f"steerfm.cli.{options.command}")
            getattr(module, options.command)(config, command)
    return 0


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


if __name__ == "__main__":
    sys.exit(main())
