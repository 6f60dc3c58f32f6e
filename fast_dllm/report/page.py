"""Blocks as one HTML file: pictures inside, no script, nothing fetched; it opens from a laptop's disk."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from fast_dllm.report.document import Block, Change, Code, Contents, Grid, Heading, Items, Paragraph, Picture, Section
from fast_dllm.report.flips import Flip, Side
from fast_dllm.report.markdown import flip_title, shortened

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
.verdict, .alarm { padding: .7rem 1rem .7rem 2rem; background: var(--card); border-left: 4px solid var(--soft); }
.alarm { background: var(--alarm-ground); border-left-color: var(--alarm); }
.note, .count { color: var(--soft); }
.section { border-bottom: 1px solid var(--line); padding: .5rem 0; }
.section > summary { cursor: pointer; }
.section > summary h2 { display: inline; border: 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
a { color: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; min-width: 4rem; }
td:first-child { font-weight: 600; min-width: 8rem; } .number { text-align: right; } td.number { white-space: nowrap; }
td { max-width: 60ch; overflow-wrap: break-word; }
td:last-child:not(:nth-child(2)):not(.number) { min-width: 9rem; }
figure { display: inline-block; margin: .6rem .8rem .6rem 0; padding: .5rem; background: #ffffff; max-width: 100%;
  border: 1px solid var(--line); border-radius: 6px; vertical-align: top; }
figure img { display: block; width: 540px; max-width: 100%; height: auto; }
figcaption { max-width: 540px; padding: .3rem .2rem 0; color: #55606e; font-size: .8rem; }
pre { overflow-x: auto; padding: .6rem .8rem; background: var(--card); border-radius: 6px; font-size: .84rem; }
.flip { margin: .8rem 0; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px; }
.flip summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.sides pre, .prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
mark { background: var(--mark); color: var(--mark-ink); border-bottom: 2px solid currentColor; }
@media (max-width: 700px) { .sides { grid-template-columns: 1fr; } body { padding: 10px 12px 40px; } }
"""

# whatever an answer holds, the page loads and runs nothing
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _side(name: str, side: Side) -> str:
    token = escape(side.token) or "(ends here)"
    text = f"{escape(side.same)}<mark>{token}</mark>{escape(shortened(side.rest))}"
    return f"<div><b>{escape(name)}</b><pre>{text}</pre></div>"


def _flip(flip: Flip) -> str:
    title = escape(flip_title(flip))
    if flip.before is None or flip.after is None:
        return f'<p class="flip">{title}. The texts are not on this machine (they are kept under results/ only).</p>'
    return (
        f'<details class="flip" open><summary>{title}</summary>'
        f'<pre class="prompt">{escape(shortened(flip.prompt))}</pre><p>Target: {escape(shortened(flip.target))}</p>'
        f'<div class="sides">{_side(flip.baseline, flip.before)}{_side(flip.config, flip.after)}</div></details>'
    )


def _grid(grid: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{' class=number' if i in grid.numbers else ''}>{escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(row(cells, "td") for cells in grid.rows)
    return f'<div class="scroll"><table><thead>{row(grid.head, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def _block(block: Block, images: Mapping[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Section():
            raise TypeError("a section is rendered with all its blocks")
        case Contents(sections):
            links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
            return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Items(kind, items):
            inside = "".join(f"<li>{escape(item)}</li>" for item in items)
            return f'<ul class="{escape(kind)}">{inside}</ul>'
        case Grid():
            return _grid(block)
        case Picture(name, text):
            data = base64.b64encode(images[name]).decode()
            alt = escape(text)
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"><figcaption>{alt}</figcaption></figure>'
            )
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Change(flip):
            return _flip(flip)


def _body(blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """The blocks; those of a section are folded under its title."""
    parts: list[str] = []
    inside = False
    for block in blocks:
        if isinstance(block, Section):
            parts.append("</details>" * inside)
            note = f' <span class="count">{escape(block.note)}</span>' if block.note else ""
            # the anchor is inside, so that a browser unfolds the section when a link leads to it
            parts.append(
                f'<details class="section"{" open" * block.is_open}><summary><h2>{escape(block.title)}</h2>{note}'
                f'</summary><a id="{block.anchor}"></a>'
            )
            inside = True
        else:
            parts.append(_block(block, images))
    parts.append("</details>" * inside)
    return "\n".join(filter(None, parts))


def page(title: str, blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """images: picture name -> PNG."""
    body = _body(blocks, images)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
