"""How a detector routes a split among its experts, as sections of the report."""

from __future__ import annotations

from io import BytesIO

from detection.report.page import Figure, Section
from detection.visualization.routing import Routing, draw_routing, find_collapse


def routing_sections(routing: Routing) -> list[Section]:
    """The plots and the table of `draw_routing`; what it warns of stands in the first section."""
    sections = []
    for part in draw_routing(routing):
        figures = []
        for name, drawing in part.figures.items():
            buffer = BytesIO()
            drawing.savefig(buffer, format="png", dpi=110)
            figures.append(Figure(name, buffer.getvalue()))
        sections.append(Section(part.title, [part.text], figures, part.header, part.rows))
    sections[0] = sections[0]._replace(warnings=find_collapse(routing))
    return sections
