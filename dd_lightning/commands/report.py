"""dd-report: runs beside the paper, as tables, figures and one page."""

import logging
import os
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dd_lightning.commands.launch import command
from dd_lightning.report import field, figures, tables
from dd_lightning.report.page import page
from dd_lightning.report.runs import find_runs
from dd_lightning.system.atomic import write_bytes

log = logging.getLogger(__name__)

PAPER = Path(tables.__file__).with_name("paper.yaml")


def report(cfg: DictConfig) -> int:
    """Writes Tables 1 and 2, Figures 2 to 6, sets against architectures, and `report.html`.

    Returns:
        How many numbers of the tables are missing.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    paper = yaml.safe_load(PAPER.read_text())
    runs = find_runs(Path(one) for one in cfg.folders)
    made = [tables.make_table(key, entry, runs) for key, entry in paper["tables"].items()]
    for table in made:
        for suffix, form in (("md", tables.markdown), ("tex", tables.latex), ("csv", tables.comma_separated)):
            write_bytes(folder / f"{table.key}.{suffix}", form(table).encode())
    matrix = field.matrix_of(runs)
    write_bytes(folder / "architectures.csv", field.comma_separated(matrix).encode())
    drawn = [*figures.make_figures(paper, runs), field.heat_map(matrix), field.budget(runs)]
    for figure in drawn:
        if figure.drawing is not None:
            for suffix in ("png", "pdf"):
                figures.save(figure.drawing, folder / f"{figure.key}.{suffix}")
    write_bytes(
        folder / "report.html", page(made, drawn, field.field_tables(paper["field"], runs), matrix, len(runs)).encode()
    )
    missing = [cell for table in made for cell in table.missing]
    for cell in missing:
        log.info(f"missing: {cell.command}")
    log.info(f"{len(runs)} runs; {os.path.relpath(folder / 'report.html')}, tables and figures beside it")
    return len(missing)


main = command("report", report)

if __name__ == "__main__":
    main()
