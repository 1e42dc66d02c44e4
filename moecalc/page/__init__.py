"""Pages of results: one HTML file with its pictures inside, in which nothing is loaded from elsewhere."""

from moecalc.page.pictures import COLORS, Picture, drawing
from moecalc.page.render import NotComputed, Section, render_page, significant

__all__ = ["COLORS", "NotComputed", "Picture", "Section", "drawing", "render_page", "significant"]
