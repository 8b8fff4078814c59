"""What a comparison leaves to look at: `report.html`, a page that opens anywhere, offline, and `result.svg`."""

from rankworks.compare.report.page import render, write_report
from rankworks.compare.report.picture import picture, write_picture

__all__ = ["picture", "render", "write_picture", "write_report"]
