"""`jaxserve report`: shows a run again, or several side by side. Knows no flags."""

import sys
from typing import Protocol, TypeVar, runtime_checkable

from jaxserve.report.compare import compare, show_comparison
from jaxserve.report.config import ReportConfig
from jaxserve.report.console import show
from jaxserve.report.html import comparison_page, report_page
from jaxserve.report.report import read_report
from jaxserve.report.write import check_directories, write_text

_Record = TypeVar("_Record")


@runtime_checkable
class Settings(Protocol):
    """What a command line came to: `jaxserve.flags.Settings`, which stands on a floor above."""

    def record(self, kind: type[_Record]) -> _Record: ...


def main(settings: Settings) -> int:
    """Print the comparison and write its page; returns the exit code. Raises ConfigError."""
    config = settings.record(ReportConfig)
    check_directories([("html", config.html)])
    reports = [read_report(path) for path in config.compare]
    if len(reports) == 1:
        show(reports[0])
        page = report_page(reports[0])
    else:
        comparison = compare(
            reports, paths=config.compare, different_workloads=config.different_workloads
        )
        show_comparison(comparison)
        page = comparison_page(comparison)
    if config.html:
        write_text(config.html, page, field="html", progress=_tell)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
