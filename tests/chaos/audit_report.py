"""The outcome of an audit: one check per promise, what it looked at, and what it found wrong."""
from collections import defaultdict

from rich.console import Console
from rich.table import Table

CHECKS = {
    'C1': 'loss', 'C2': 'phantom', 'C3': 'duplicates', 'C4': 'order', 'C5': 'state', 'C6': 'offsets',
    'C7': 'conservation', 'C8': 'liveness', 'C9': 'decisions', 'C10': 'validity', 'C11': 'bounds'}
FINDINGS_KEPT = 20


class Check:
    """The result of one check: how much was checked, how often it was wrong, and the first findings in words."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.looked_at: dict[str, int] = defaultdict(int)
        self.remarks: list[str] = []
        self.wrong = 0
        self.findings: list[str] = []

    @property
    def ok(self) -> bool:
        return self.wrong == 0


class AuditReport:
    """All checks of one audit."""

    def __init__(self) -> None:
        self.checks = {code: Check(code) for code in CHECKS}

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks.values())

    @property
    def failed(self) -> set[str]:
        """Codes of the checks that found something."""
        return {code for code, check in self.checks.items() if not check.ok}

    def wrong(self, code: str, what: str) -> None:
        """Count a finding, and keep the text of the first ones."""
        check = self.checks[code]
        check.wrong += 1
        if len(check.findings) < FINDINGS_KEPT:
            check.findings.append(what)

    def saw(self, code: str, what: str, count: int = 1) -> None:
        """Count something that was checked."""
        self.checks[code].looked_at[what] += count

    def remark(self, code: str, what: str) -> None:
        """Add a measurement to the report."""
        self.checks[code].remarks.append(what)

    def table(self, title: str = 'audit') -> Table:
        """A table with one row per check."""
        table = Table(title=title, title_justify='left')
        for column in ('check', '', 'looked at', 'wrong', 'first finding'):
            table.add_column(column, justify='right' if column == 'wrong' else 'left', overflow='fold')
        for code, check in self.checks.items():
            looked = ', '.join([f'{count:,} {what}' for what, count in check.looked_at.items()] + check.remarks)
            table.add_row(f'{code} {CHECKS[code]}', '[green]ok[/]' if check.ok else '[bold red]WRONG[/]', looked or '-',
                          f'{check.wrong:,}', check.findings[0] if check.findings else '')
        return table

    def print(self, console: Console, title: str = 'audit') -> None:
        """Print the table, and below it all findings that were kept."""
        console.print(self.table(title))
        for check in self.checks.values():
            for finding in check.findings:
                console.print(f'{check.code}: {finding}', markup=False, highlight=False, soft_wrap=True)
