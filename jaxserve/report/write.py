"""Writes a report in the forms that were asked for. Knows no flags."""

from collections.abc import Callable, Iterable
from pathlib import Path

from jaxserve.errors import ConfigError
from jaxserve.report.config import OutputConfig
from jaxserve.report.console import show
from jaxserve.report.export import chrome_trace, clients_csv, rows_csv
from jaxserve.report.html import report_page
from jaxserve.report.report import Report, to_json


def write_report(report: Report, output: OutputConfig, progress: Callable[[str], None]) -> None:
    """Print the report's tables and write its files; `progress` hears of each file in one line.

    Raises ConfigError for a file that cannot be written, when the tables are printed; `check_files`
    says so before a run.
    """
    show(report)
    forms: dict[str, Callable[[], str]] = {
        "json": lambda: to_json(report, rows=output.json_rows),
        "html": lambda: report_page(report),
        "csv": lambda: rows_csv(report),
        "csv_clients": lambda: clients_csv(report),
        "chrome_trace": lambda: chrome_trace(report),
    }
    for form, path in output.files.items():
        if path:
            write_text(path, forms[form](), field=form, progress=progress)


def check_files(output: OutputConfig) -> None:
    """Raises ConfigError if a file cannot be written, while nothing was run yet."""
    check_directories(output.files.items())


def check_directories(files: Iterable[tuple[str, str]]) -> None:
    """Of the field and the path of each file. Raises ConfigError if its directory is missing."""
    for field, path in files:
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise ConfigError(f"{field}: got {path!r}; allowed: a file in a directory that exists")


def write_text(path: str, text: str, *, field: str, progress: Callable[[str], None]) -> None:
    """Raises ConfigError if it cannot be written."""
    try:
        size = Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror}") from None
    progress(f"wrote {path} ({size / 1e3:,.0f} kB)")
