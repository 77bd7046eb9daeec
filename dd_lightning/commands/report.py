"""dd-report: runs beside the paper, as tables, figures and one page."""

import logging
import os
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dd_lightning.commands.launch import command
from dd_lightning.report import along, architectures, budgets, field, figures, searches, tables
from dd_lightning.report.page import page
from dd_lightning.report.runs import TRIAL, Run, find_runs
from dd_lightning.system.atomic import write_bytes
from dd_lightning.system.words import counted

log = logging.getLogger(__name__)

PAPER = Path(tables.__file__).with_name("paper.yaml")


def report(cfg: DictConfig) -> int:
    """Writes Tables 1 to 3, Figures 2 to 6, what stands beside the paper, and `report.html`.

    Returns:
        How many numbers of the tables are missing.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    found = find_runs(Path(one) for one in cfg.folders)
    runs = [run for run in found if not run.is_trial]
    made = [tables.make_table(key, entry, runs) for key, entry in paper["tables"].items()]
    for table in made:
        for suffix, form in (("md", tables.markdown), ("tex", tables.latex), ("csv", tables.comma_separated)):
            write_bytes(folder / f"{table.key}.{suffix}", form(table).encode())
    matrix = architectures.matrix_of(runs)
    write_bytes(folder / "architectures.csv", architectures.comma_separated(matrix).encode())
    drawn = [*figures.make_figures(paper, runs), architectures.heat_map(matrix)]
    drawn += [budgets.budget(runs), budgets.growth(runs), along.training(runs)]
    drawn += searches.searches(Path(one) for one in cfg.folders)
    for figure in drawn:
        if figure.drawing is not None:
            for suffix in ("png", "pdf"):
                figures.save(figure.drawing, folder / f"{figure.key}.{suffix}")
    methods = field.field_tables(paper["field"], runs)
    write_bytes(folder / "field.csv", field.comma_separated(methods).encode())
    own = own_runs(runs, made, drawn)
    trials = len(found) - len(runs)
    write_bytes(folder / "report.html", page(made, drawn, methods, matrix, own, len(runs), trials).encode())
    missing = [cell for table in made for cell in table.missing]
    for run in own:
        log.info(f"{run.name}, {run.dataset}: {tables.number(*run.mean_and_std)} % ({os.path.relpath(run.folder)})")
    if trials:
        log.info(f"{counted(trials, 'run')} with debug or fewer than {TRIAL} outer steps left out")
    where = os.path.relpath(folder / "report.html")
    if missing:
        log.info(f"{len(missing)} of the paper's numbers have no run; {where} has the commands that make them")
    log.info(f"{counted(len(runs), 'run')}; {where}, tables and figures beside it")
    return len(missing)


def own_runs(runs: list[Run], made: list[tables.Table], drawn: list[figures.Figure]) -> list[Run]:
    """The runs that no table and no figure of the paper is about."""
    shown = {run.folder for table in made for cell in table.cells.values() if cell.ours for run in cell.ours.runs}
    shown |= {run.folder for figure in drawn for run in figure.runs}
    names = {run.name for run in runs if run.folder in shown}
    return [run for run in runs if run.folder not in shown and run.name not in names]


main = command("report")

if __name__ == "__main__":
    main()
