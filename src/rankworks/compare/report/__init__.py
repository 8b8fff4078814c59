"""`report.html` of a comparison: one page that opens anywhere, offline."""

from rankworks.compare.report.page import render, write_report

__all__ = ["render", "write_report"]
