"""The report's Markdown as one HTML file: pictures inside, no script, nothing fetched; it opens from a laptop's disk.

markdown-it-py turns Markdown into HTML; markup in the text itself stays text (`html: False`). Added here: folded
sections and changed answers, pictures inside the file, and the mark on the first token that differs.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, MutableMapping, Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

from fast_dllm.report.markdown import FLIP_LEVEL, MARK_CLOSE, MARK_OPEN, SECTION_LEVEL, Section

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #55606e; --line: #d5dae1; --ground: #ffffff; --card: #f5f7fa;
  --alarm: #8a1c12; --alarm-ground: #fdeeec; --mark: #ffe08a; --mark-ink: #1a1a1a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3adba; --line: #3a424d; --ground: #14171b;
  --card: #1e232a; --alarm: #ffb3a8; --alarm-ground: #3a1a17; --mark: #7a5d00; --mark-ink: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 16px 20px 60px; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin-bottom: .4rem; font-size: 1.05rem; overflow-wrap: anywhere; }
p, li { max-width: 78ch; overflow-wrap: anywhere; } li { margin: .3rem 0; }
h2 + ul, #alarms + ul { padding: .7rem 1rem .7rem 2rem; background: var(--card); border-left: 4px solid var(--soft); }
#alarms + ul { background: var(--alarm-ground); border-left-color: var(--alarm); }
#alarms ~ h3 ~ ul, .count { color: var(--soft); }
.section { border-bottom: 1px solid var(--line); padding: .5rem 0; }
.section > summary { cursor: pointer; }
.section > summary h2 { display: inline; border: 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
a { color: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; min-width: 4rem; }
td:first-child { font-weight: 600; min-width: 8rem; } td[style*="right"] { white-space: nowrap; }
td { max-width: 60ch; overflow-wrap: break-word; }
td:last-child:not(:nth-child(2)):not([style*="right"]) { min-width: 9rem; }
figure { display: inline-block; margin: .6rem .8rem .6rem 0; padding: .5rem; background: #ffffff; max-width: 100%;
  border: 1px solid var(--line); border-radius: 6px; vertical-align: top; }
figure img { display: block; width: 540px; max-width: 100%; height: auto; }
figcaption { max-width: 540px; padding: .3rem .2rem 0; color: #55606e; font-size: .8rem; }
pre { overflow-x: auto; padding: .6rem .8rem; background: var(--card); border-radius: 6px; font-size: .84rem; }
.flip { margin: .8rem 0; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px; }
.flip summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: 1fr 1fr; column-gap: .8rem; }
.sides > * { grid-column: 1 / -1; min-width: 0; } .sides p { margin: .3rem 0; }
.sides pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.sides p:nth-of-type(2), .sides p:nth-of-type(3) { grid-row: 3; font-weight: 600; }
.sides pre:nth-of-type(2), .sides pre:nth-of-type(3) { grid-row: 4; }
.sides :is(p, pre):nth-of-type(2) { grid-column: 1; } .sides :is(p, pre):nth-of-type(3) { grid-column: 2; }
mark { background: var(--mark); color: var(--mark-ink); border-bottom: 2px solid currentColor; }
@media (max-width: 700px) { .sides { display: block; } body { padding: 10px 12px 40px; } }
"""

# whatever an answer holds, the page loads and runs nothing
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Environment = MutableMapping[str, Any]  # `images`: file name -> PNG
FOLD_ENDS = {SECTION_LEVEL: "</details>\n", FLIP_LEVEL: "</div></details>\n"}
MARKED = re.compile(f"{MARK_OPEN}(.*?){MARK_CLOSE}", re.DOTALL)


class _Renderer(RendererHTML):
    """Each method writes the HTML of the token type that it is named after; all other types as markdown-it does."""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        token = tokens[idx]
        data = base64.b64encode(env["images"][token.attrs["src"]]).decode()
        text = escape(self.renderInlineAsText(token.children, options, env))
        return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        text = escape(tokens[idx].content.removesuffix("\n"))
        marked = MARKED.sub(r"<mark>\1</mark>", text, count=1)
        return f"<pre>{marked}</pre>\n"

    def paragraph_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        return "" if _is_picture(tokens[idx + 1]) else self.renderToken(tokens, idx, options, env)

    def paragraph_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        return "" if _is_picture(tokens[idx - 1]) else self.renderToken(tokens, idx, options, env)

    def bullet_list_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        return '<nav aria-label="Contents"><ul>' if tokens[idx].markup == "*" else "<ul>"

    def bullet_list_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        return "</ul></nav>\n" if tokens[idx].markup == "*" else "</ul>\n"

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        return '<div class="scroll"><table>'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Environment) -> str:
        return "</table></div>\n"


def _is_picture(inline: Token) -> bool:
    return [child.type for child in inline.children or ()] == ["image"]


def _html(text: str) -> Token:
    return Token("html_block", "", 0, content=text)


def _fold_html(level: int, section: Section | None) -> tuple[str, str] | None:
    """The HTML before and after the text of a heading that folds what follows it; None for other headings."""
    if level == FLIP_LEVEL:
        return '<details class="flip" open><summary>', '</summary><div class="sides">\n'
    if section is None or level != SECTION_LEVEL:
        return None
    note = f' <span class="count">{escape(section.note)}</span>' if section.note else ""
    # the anchor is inside, so that a browser unfolds the section when a link leads to it
    return (
        f'<details class="section"{" open" * section.is_open}><summary><h2>',
        f'</h2>{note}</summary><a id="{section.anchor}"></a>\n',
    )


def _folded(tokens: Sequence[Token], sections: Sequence[Section]) -> list[Token]:
    """The tokens, with <details> around each of the sections and around each changed answer."""
    of_title = {section.title: section for section in sections}
    result: list[Token] = []
    open_levels: list[int] = []  # of the headings whose <details> is not closed yet
    fold = None
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            level = int(token.tag[1:])
            while open_levels and open_levels[-1] >= level:
                result.append(_html(FOLD_ENDS[open_levels.pop()]))
            fold = _fold_html(level, of_title.get(tokens[index + 1].content))
            if fold:
                open_levels.append(level)
            result.append(_html(fold[0]) if fold else token)
        elif token.type == "heading_close":
            result.append(_html(fold[1]) if fold else token)
        else:
            result.append(token)
    return [*result, *(_html(FOLD_ENDS[level]) for level in reversed(open_levels))]


def page(title: str, text: str, images: Mapping[str, bytes], sections: Sequence[Section]) -> str:
    """The HTML file of a Markdown text. images: file name -> PNG; sections: those that are folded."""
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    tokens = _folded(parser.parse(text), sections)
    body = parser.renderer.render(tokens, parser.options, {"images": images})
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
