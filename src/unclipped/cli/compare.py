"""`unclipped compare`: evaluations that answered the same items, compared in pairs."""

from __future__ import annotations

from pathlib import Path

import typer

HELP = """Compare evaluations that answered the same items: scores and paired differences with intervals.

RUN is a folder that `unclipped eval` or `unclipped train` wrote, one of a baseline in it, or a folder of predictions;
NAME=FOLDER names it. The first run is the reference. Every task that all runs have is compared, over all items and in
each category, from the predictions that were kept: no model is loaded. OUTPUT gets results.json and report.html.

Examples:

  unclipped compare runs/short-eval runs/long-eval

  unclipped compare base=runs/a long=runs/b larger=runs/c --reference long --output runs/compared

  unclipped compare runs/mine runs/mine/baselines/blind --output runs/against-blind

  unclipped compare sighted=runs/eval blind=runs/eval/predictions-blind --task charts

  unclipped compare runs/first-500 runs/first-1000 --common
"""


def register(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("compare", help=HELP)(compare)


def compare(
    runs: list[str] = typer.Argument(..., metavar="RUN", help="Folders of runs, two or more: FOLDER or NAME=FOLDER."),
    reference: str = typer.Option(None, help="Name of the run to compare with (the first)."),
    task: list[str] = typer.Option(None, help="Only this task; may be given again."),
    common: bool = typer.Option(False, "--common", help="Where items differ, take those that all runs have."),
    output: Path = typer.Option(None, help="Folder for results.json and report.html."),
) -> None:
    """Compare runs (see HELP)."""
    from contextlib import nullcontext

    from unclipped.cli.record import record_run, run_folder
    from unclipped.evaluation.kept import named_runs
    from unclipped.evaluation.paired import PairedConfig, compare_runs
    from unclipped.evaluation.runner import RESULTS_FILE, default_console
    from unclipped.studies.paired_report import print_comparison, write_comparison_of_runs

    named = named_runs(runs)
    config = PairedConfig(runs=named, reference=reference or next(iter(named)), tasks=tuple(task or ()), common=common)
    console = default_console()
    with nullcontext() if output is None else run_folder(output, can_resume=False):
        result = compare_runs(config, console=console)
        print_comparison(console, result)
        if output is None:
            return
        from unclipped.core.files import write_json
        from unclipped.studies.environment import environment

        record_run(config, output, resume=False, accelerators=False)
        write_json(output / RESULTS_FILE, result.to_dict())
        page = write_comparison_of_runs(output / "report.html", result, environment(accelerators=False))
    typer.echo(f"\nreport: {page}")
