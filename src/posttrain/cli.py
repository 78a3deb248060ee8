"""The command `posttrain`. Imports nothing heavy: `posttrain --help` and a configuration error answer at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import run_main

DEMO_CHAIN = "recipes/configs/smollm2-135m/chain.yaml"
FULL_DEMO_CHAIN = "recipes/configs/smollm2-135m/chain-full.yaml"
NER_CHAIN = "recipes/configs/minilm/chain.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `posttrain`; exits with 2 and one message for a user's mistake."""
    arguments = _parser().parse_args(argv)
    run_main(lambda: arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="posttrain",
        description="SFT, reward models, DPO, PPO and taggers with PEFT adapters, chained on Hugging Face TRL.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="run a chain: finished stages are skipped, interrupted ones resumed")
    command.add_argument("chain", type=Path, help="the chain's YAML file")
    command.add_argument("--dry-run", action="store_true", help="print what would run and why")
    command.add_argument("--only", metavar="STAGE", help="run this stage alone")
    command.add_argument("--plain", action="store_true", help="print plain lines, also on a terminal")
    command.set_defaults(command=_run)

    command = commands.add_parser("submit", help="submit a chain as Slurm jobs: one per stage, each after its inputs")
    command.add_argument("chain", type=Path, help="the chain's YAML file, with launch.slurm")
    command.add_argument("--after", nargs="+", default=[], metavar="JOB", help="the first stages wait for these jobs")
    command.add_argument("--dry-run", action="store_true", help="write the scripts, print the graph, submit nothing")
    command.set_defaults(command=_submit)

    command = commands.add_parser("status", help="show a submitted chain: states, steps, losses, why jobs wait")
    command.add_argument("chain", type=Path)
    command.set_defaults(command=_status)

    command = commands.add_parser("cancel", help="cancel a submitted chain's jobs")
    command.add_argument("chain", type=Path)
    command.set_defaults(command=_cancel)

    command = commands.add_parser(
        "demo", help="post-train a real 135M model on this machine, nothing downloaded from a hub"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="with more rows and steps: 15 to 30 minutes on two cores")
    which.add_argument(
        "--ner", action="store_true", help="train a named-entity tagger instead: MiniLM on synthetic sentences"
    )
    command.add_argument("--dry-run", action="store_true", help="print what would run and why")
    command.add_argument("--plain", action="store_true", help="print plain lines, also on a terminal")
    command.set_defaults(command=_demo)

    command = commands.add_parser("tag", help="tag the entities in a text or a file")
    command.add_argument("model", type=Path, help="the run directory of the recipe ner, or a plain model's folder")
    command.add_argument("text", help="a text, or a file with one text per line")
    command.add_argument("--json", action="store_true", help="print one JSON object per text")
    command.set_defaults(command=_tag)

    command = commands.add_parser("lineage", help="show what a run was made from")
    command.add_argument("directory", type=Path)
    command.set_defaults(command=_lineage)

    command = commands.add_parser("report", help="write one HTML page about a chain: results, curves, answers, lineage")
    command.add_argument("chain", type=Path, help="the chain's YAML file")
    command.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the chain's directory")
    command.set_defaults(command=_report)

    command = commands.add_parser(
        "dashboard", help="serve a chain's page on this machine, or save its workspace on W&B"
    )
    command.add_argument("path", type=Path, help="a chain's YAML file, its output directory, or a run directory")
    command.add_argument("--push", action="store_true", help="save the chain's workspace on W&B instead")
    command.add_argument("--port", type=int, help="the page's port; default: the first free one from 7860 on")
    command.add_argument("--no-browser", action="store_true", help="print the page's address and open no browser")
    command.set_defaults(command=_dashboard)

    command = commands.add_parser("merge", help="merge a run's adapter into its base and write a plain model")
    command.add_argument("directory", type=Path, help="a training stage's run directory")
    command.add_argument("output", type=Path, help="a new folder for the model")
    command.set_defaults(command=_merge)

    command = commands.add_parser("keys", help="list the keys of a recipe's configuration, with their types")
    command.add_argument("recipe")
    command.set_defaults(command=_keys)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .chain.run import run
    from .report.terminal import choose_view

    chain = read_chain(arguments.chain)
    run(chain, only=arguments.only, dry_run=arguments.dry_run, view=choose_view(chain.name, plain=arguments.plain))


def _submit(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .chain.slurm_jobs import submit

    submit(read_chain(arguments.chain), after=arguments.after, dry_run=arguments.dry_run)


def _status(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .chain.status import status

    print(status(read_chain(arguments.chain)))


def _cancel(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .chain.slurm_jobs import cancel

    cancel(read_chain(arguments.chain))


def _demo(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .chain.run import run
    from .demo import spelling as demo
    from .launch import ROOT
    from .report.terminal import choose_view

    demo.prepare(ner=arguments.ner)
    chain = read_chain(ROOT / (NER_CHAIN if arguments.ner else FULL_DEMO_CHAIN if arguments.full else DEMO_CHAIN))
    run(chain, dry_run=arguments.dry_run, view=choose_view(chain.name, plain=arguments.plain))


def _tag(arguments: argparse.Namespace) -> None:
    from .training.tag import tag

    tag(arguments.model, arguments.text, as_json=arguments.json)


def _lineage(arguments: argparse.Namespace) -> None:
    from .runs.tree import tree

    print("\n".join(tree(arguments.directory)))


def _report(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .report.page import write_report

    path = write_report(read_chain(arguments.chain), arguments.output)
    print(f"{path}  {path.stat().st_size / 1000:,.0f} kB")


def _dashboard(arguments: argparse.Namespace) -> None:
    from .chain.graph import read_chain
    from .report import dashboard

    if arguments.push:
        print(dashboard.push(read_chain(arguments.path)))
    else:
        dashboard.show(arguments.path, port=arguments.port, open_browser=not arguments.no_browser)


def _merge(arguments: argparse.Namespace) -> None:
    from .training.merge import merge

    merge(arguments.directory, arguments.output)


def _keys(arguments: argparse.Namespace) -> None:
    from .config.schema import describe
    from .config.stage_config import known_keys

    for key, type_ in known_keys(arguments.recipe).items():
        print(f"{key}: {describe(type_)}")


if __name__ == "__main__":
    main(sys.argv[1:])
