"""What the HTML reports share: one page that opens from disk, no scripts, no outside files, the same bytes each time.

    page.html.j2    the frame and the style sheet; a report's template extends it
    Draw            matplotlib figures as inline SVG
"""
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from io import StringIO
from itertools import count
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure

WIDE, NARROW = 900, 360       # px
INK, FAINT, SCORE = '#222222', '#d9d9d9', '#5b8db8'
# 'none' keeps text as text, so that the page's font draws it and it can be searched.
_STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'stream', 'text.parse_math': False, 'font.size': 13.0,
    'text.color': INK, 'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK, 'axes.edgecolor': '#888888',
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'axes.grid.axis': 'y',
    'axes.axisbelow': True, 'grid.color': FAINT, 'grid.linewidth': 0.8, 'xtick.labelsize': 12.0,
    'ytick.labelsize': 12.0, 'ytick.major.size': 0.0, 'figure.facecolor': 'none', 'axes.facecolor': 'none',
}
_NO_METADATA = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))


def render(package: str, template: str, filters: dict[str, Callable[..., str]],
           values: Callable[['Draw'], dict[str, Any]]) -> str:
    """A page as text.

    package, template  where the template is; it may extend page.html.j2
    filters            of the template, by name
    values             is given what draws the page's figures, and gives what the template says
    """
    folders = [str(files(name)) for name in (package, 'stream')]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= filters
    with style.context(['default', _STYLE]):
        return environment.get_template(template).render(values(Draw()))


class Draw:
    """Figures as inline SVG. Ids are numbered by figure: matplotlib uses the same ones in each, a page may not."""

    def __init__(self) -> None:
        self._prefixes: Iterator[int] = count(1)

    def once(self, fill: Callable[[Figure], None], width: int, height: int, label: str, css_class: str = '') -> Markup:
        """One figure of that many px; `label` is what a screen reader says."""
        figure = Figure((width / 72, height / 72), layout='constrained')     # SVG of matplotlib has 72 units an inch
        fill(figure)
        out = StringIO()
        figure.savefig(out, format='svg', metadata=_NO_METADATA)
        return self._inline(out.getvalue(), width, height, label, css_class)

    def twice(self, fill: Callable[[Figure], None], height: int, label: str) -> Markup:
        """The figure for a desk and the one for a phone."""
        return (self.once(fill, WIDE, height, label, 'wide') + Markup('\n')
                + self.once(fill, NARROW, height, label, 'narrow'))

    def _inline(self, svg: str, width: int, height: int, label: str, css_class: str) -> Markup:
        body = svg[svg.index('>', svg.index('<svg')) + 1:].strip()
        prefix = f'f{next(self._prefixes)}-'
        body = re.sub(r' d="[^"]*"', _rounded, body)
        body = re.sub(r'\bid="', f'id="{prefix}', body)
        body = re.sub(r'href="#', f'href="#{prefix}', body)
        body = re.sub(r'url\(#', f'url(#{prefix}', body)
        head = Markup('<svg class="plot {}" viewBox="0 0 {} {}" role="img" aria-label="{}" '
                      'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">')
        return head.format(css_class, width, height, label) + Markup(body)


def _rounded(path: re.Match[str]) -> str:
    """A path to a hundredth of a px: half the bytes of the page."""
    return re.sub(r'\d+\.\d{3,}', lambda number: f'{float(number[0]):.2f}', path[0])
