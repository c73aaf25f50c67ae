"""Page: one HTML file with texts, pictures and the code that they come from.

    from figures.page import Code, Picture, Section, page
    from sinkhorn import sinkhorn
    shown = Code(sinkhorn, first="problems =", last="return codes")
    section = Section("Codes", "<p>What the picture shows.</p>", Picture("plan", light, dark, alt),
                      [shown])
    html = page("A tour", "<p>In short.</p>", [section])

light, dark: PNG files' bytes. Nothing is loaded from elsewhere: pictures are inlined, and there is
no script. Code is read from the project's file when the page is made, so that it cannot go stale.
"""
import ast
import base64
import html
import inspect
import keyword
import re
import textwrap
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

STYLE = Path(__file__).with_name("page.css")
TOKENS = re.compile(
    r"(?P<comment>\#.*)|(?P<string>[fr]?\"(?:[^\"\\\n]|\\.)*\"|[fr]?'(?:[^'\\\n]|\\.)*')|"
    rf"(?P<keyword>\b(?:{'|'.join(keyword.kwlist)})\b)|(?P<number>\b\d[\d_.e]*\b)")


class Code(NamedTuple):
    """Lines of a function, a method or a class. first, last: how the first and the last of the
    lines begin, where they are not all of it."""
    thing: Any
    first: str = ""
    last: str = ""

    @property
    def name(self) -> str:
        """File and name, as in sinkhorn.py: sinkhorn."""
        path = Path(inspect.getsourcefile(inspect.unwrap(self.thing))).resolve()
        root = Path(__file__).resolve().parents[1]
        shown = path.relative_to(root) if path.is_relative_to(root) else path.name
        return f"{shown}: {self.thing.__qualname__}"

    def text(self) -> str:
        """The source without its docstring. Raises ValueError where a named line is not there."""
        lines = undocumented(textwrap.dedent(inspect.getsource(self.thing)))
        begin = line_at(lines, self.first, 0, self.name)
        end = line_at(lines, self.last, begin, self.name) if self.last else len(lines) - 1
        return textwrap.dedent("\n".join(lines[begin:end + 1]))


class Picture(NamedTuple):
    name: str                   # of its file
    light: bytes                # PNG
    dark: bytes
    alt: str                    # what it shows, for who does not see it


class Section(NamedTuple):
    title: str
    text: str                   # HTML
    picture: Picture
    codes: Sequence[Code]
    below: str = ""             # HTML, under the picture


class Album:
    """A folder of pictures, each drawn on white and on black.

    light, dark: matplotlib's settings for both."""

    def __init__(self, folder: Path, light: dict, dark: dict):
        self.folder, self.settings = folder, {"": light, "-dark": dark}

    def picture(self, name: str, alt: str, height: float, draw: Callable, *given) -> Picture:
        """draw(figure, *given) draws on a matplotlib Figure.  height: in inches; 7 are the width.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        files = []
        for suffix, settings in self.settings.items():
            path = self.folder / f"{name}{suffix}.png"
            with rc_context(settings):
                figure = Figure(figsize=(7, height), layout="constrained")
                draw(figure, *given)
                figure.savefig(path)
            files.append(path.read_bytes())
        return Picture(name, *files, alt)


def undocumented(source: str) -> list[str]:
    """Lines of a function or class, without its docstring."""
    lines, body = source.rstrip().splitlines(), ast.parse(source).body[0].body
    if ast.get_docstring(ast.parse(source).body[0]) is not None:
        del lines[body[0].lineno - 1:body[0].end_lineno]
    return lines


def line_at(lines: Sequence[str], start: str, begin: int, name: str) -> int:
    """Of the first line from `begin` on that begins with `start`, whatever its indentation."""
    for i in range(begin, len(lines)):
        if lines[i].lstrip().startswith(start):
            return i
    raise ValueError(f"{name} has no line that begins with {start!r}: the tour shows it")


def highlight(code: str) -> str:
    """Python as HTML, with classes for comments, strings, keywords and numbers."""
    parts, at = [], 0
    for match in TOKENS.finditer(code):
        parts += [html.escape(code[at:match.start()]),
                  f'<span class="{match.lastgroup}">{html.escape(match[0])}</span>']
        at = match.end()
    return "".join(parts) + html.escape(code[at:])


def code_html(code: Code) -> str:
    return (f'<figure class="code"><figcaption>{html.escape(code.name)}</figcaption>'
            f'<pre tabindex="0"><code>{highlight(code.text())}</code></pre></figure>')


def picture_html(picture: Picture) -> str:
    """The dark one where the reader's system is dark."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}"
                   for png in (picture.light, picture.dark))
    return (f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{html.escape(picture.alt)}"></picture>')


def section_html(number: int, section: Section) -> str:
    codes = "\n".join(map(code_html, section.codes))
    return (f'<section id="{section.picture.name}"><h2><span>{number}</span> '
            f'{html.escape(section.title)}</h2>\n<div class="text">{section.text}</div>\n'
            f'<div class="pair"><div class="shown">{picture_html(section.picture)}'
            f'{section.below}</div>\n<div class="codes">{codes}</div></div></section>')


def page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The whole file. intro: HTML, before the list of sections."""
    links = "".join(f'<li><a href="#{section.picture.name}">{html.escape(section.title)}</a></li>'
                    for section in sections)
    body = "\n".join(section_html(i, section) for i, section in enumerate(sections, 1))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title>\n'
            f'<style>{STYLE.read_text()}</style></head>\n<body><header><h1>{html.escape(title)}'
            f'</h1>{intro}<nav aria-label="Sections"><ol>{links}</ol></nav></header>\n'
            f'<main>{body}</main></body></html>\n')
