"""`sdsat doctor`."""

from __future__ import annotations


def doctor() -> None:
    """Say in ten lines what this machine gives, and what would mend it where something is missing;
    exit code 1 where nothing works without that.
    """  # noqa: D205 (`--help` shows it as one paragraph)
    from sdsat.interfaces.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    if any(finding.needed for finding in findings):
        raise SystemExit(1)
