"""The report of an evaluation: one page that opens offline."""

from __future__ import annotations

from detection.report.page import Figure, Run, Section, write_report
from detection.report.routing import routing_sections

__all__ = ["Figure", "Run", "Section", "routing_sections", "write_report"]
