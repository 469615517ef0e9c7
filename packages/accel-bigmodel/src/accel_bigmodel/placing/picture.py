"""What lies where, drawn: SVG, and a page that holds it with the table. Both stand alone."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape as escape_html
from typing import Protocol

from accel_bigmodel.placing.cost import PlaceUse
from accel_bigmodel.placing.memory import UNLIMITED, shown_place
from accel_bigmodel.placing.plan import Plan
from accel_bigmodel.placing.shown import layers_text, printable
from accel_bigmodel.sizes import format_bytes

__all__ = ["html", "svg"]

_WIDTH, _MARGIN, _LABEL = 960, 24, 92
_BAR = _WIDTH - 2 * _MARGIN - _LABEL
_STRIP_TOP, _STRIP_HEIGHT = 92, 30
_ROW_TOP, _ROW_HEIGHT, _BAR_HEIGHT = 168, 66, 28
_DEVICES = ("#2f6db3", "#c2571a", "#2e8b57", "#8e4fa8", "#b8860b", "#1f8a8a", "#b03a5b", "#5a6acf")
"""Of accelerators, in turn."""
_STORES = {"cpu": "#6b7280", "disk": "#a8875f"}
_PARTS = {"KV cache": "#f2b134", "activations": "#e4717a", "staging": "#8fbc5a"}
_LONGEST = 90
"""Characters of layers' names in a line."""
_CHARACTER = 6.4
"""Width of a character of the small text, about."""

_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1000px;padding:0 1rem;color:#1b1f24;background:#fff}
svg{width:100%;height:auto;border:1px solid #d5d9de;border-radius:8px}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:1.5rem 0}
th,td{padding:.35rem .7rem;border-bottom:1px solid #d5d9de;text-align:right;white-space:nowrap}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
td:nth-child(2){white-space:normal;overflow-wrap:anywhere;min-width:12rem}"""


def escape(text: str) -> str:
    """As XML and HTML take it, with characters that these forbid made visible."""
    return escape_html("\n".join(printable(line) for line in text.split("\n")))


class Shown(Protocol):
    """What is drawn; `Explanation` is it."""

    @property
    def plan(self) -> Plan: ...
    @property
    def title(self) -> str: ...
    def shown_uses(self) -> list[PlaceUse]: ...
    def statements(self) -> list[str]: ...
    def rows(self) -> list[tuple[str, ...]]: ...


def svg(explanation: Shown) -> str:
    """The picture as one SVG element."""
    uses = explanation.shown_uses()
    height = _ROW_TOP + _ROW_HEIGHT * len(uses) + 56
    said = explanation.statements()
    label = escape(f"Device map of {explanation.title}")
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
            f'height="{height}" role="img" aria-label="{label}" font-family="system-ui,sans-serif">'
        ),
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        _text(_MARGIN, 34, explanation.title, size=18, weight="600"),
        _text(_MARGIN, 56, said[0], fill="#4b5563"),
        _text(_MARGIN, 74, said[1], fill="#4b5563"),
        *_strip(explanation),
    ]
    scale = max(max(use.used_bytes, _limit(use) or 0) for use in uses) or 1
    for number, use in enumerate(uses):
        lines += _row(explanation, use, _ROW_TOP + number * _ROW_HEIGHT, scale)
    lines += _legend(height - 26)
    return "\n".join([*lines, "</svg>"])


def html(explanation: Shown) -> str:
    """A whole page."""
    heads, *rows = explanation.rows()
    title = escape(f"Device map of {explanation.title}")
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for row in rows)
    said = "\n".join(f"<p>{escape(each)}</p>" for each in explanation.statements())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title>
<style>
{_STYLE}
</style>
</head>
<body>
{svg(explanation)}
<div class="table"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{said}
</body>
</html>
"""


def _strip(explanation: Shown) -> Iterator[str]:
    """The model in order, as wide as its bytes, in the colours of the places."""
    plan = explanation.plan
    yield _text(_MARGIN, _STRIP_TOP + 20, "in order", fill="#4b5563")
    total = sum(layer.total_bytes for layer in plan.chain.layers) or 1
    x = float(_MARGIN + _LABEL)
    runs: list[tuple[int | str, list[int]]] = []
    for layer in range(len(plan.chain.layers)):
        place = plan.place_of(layer)
        if runs and runs[-1][0] == place:
            runs[-1][1].append(layer)
        else:
            runs.append((place, [layer]))
    for place, layers in runs:
        size = sum(plan.chain.layers[layer].total_bytes for layer in layers)
        width = _BAR * size / total
        first, last = plan.chain.layers[layers[0]].name, plan.chain.layers[layers[-1]].name
        names = first if first == last else f"{first} to {last}"
        told = f"{names}: {format_bytes(size)}"
        yield from _box(x, _STRIP_TOP, width, _STRIP_HEIGHT, _colour(place), str(place), told)
        x += width


def _row(explanation: Shown, use: PlaceUse, top: int, scale: int) -> Iterator[str]:
    """One place: its name, how full it is, and what is in it."""
    limit = _limit(use)
    share = f" of {format_bytes(limit)} ({use.share:.1%})" if limit is not None else ", no limit"
    over = limit is not None and use.used_bytes > limit
    yield _text(_MARGIN, top + 36, shown_place(use.place), weight="600")
    held = layers_text(explanation.plan, use)
    told = f"{format_bytes(use.used_bytes)}{share}{', does not fit' if over else ''}: {_cut(held)}"
    yield _text(_MARGIN + _LABEL, top + 12, told, fill="#b42318" if over else "#4b5563")
    x, y = float(_MARGIN + _LABEL), top + 18
    if limit:
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{max(_BAR * limit / scale, 1):.1f}" height="{_BAR_HEIGHT}" '
            f'fill="#f3f4f6" stroke="{"#b42318" if over else "#9ca3af"}"/>'
        )
    parts = [
        ("weights", use.weight_bytes, _colour(use.place), f": {held}"),
        ("KV cache", use.kv_bytes, _PARTS["KV cache"], ""),
        ("activations", use.activation_bytes, _PARTS["activations"], ""),
        ("staging", use.staging_bytes, _PARTS["staging"], ", room for layers that are streamed"),
    ]
    for name, size, colour, more in parts:
        if size:
            width = _BAR * size / scale
            yield from _box(x, y, width, _BAR_HEIGHT, colour, format_bytes(size), f"{name}, {format_bytes(size)}{more}")
            x += width


def _legend(top: int) -> Iterator[str]:
    x = _MARGIN + _LABEL
    for name, colour in {"weights (colour of the place)": _DEVICES[0], **_PARTS, "free": "#f3f4f6"}.items():
        yield f'<rect x="{x}" y="{top - 10}" width="12" height="12" fill="{colour}" stroke="#9ca3af"/>'
        yield _text(x + 18, top, name, fill="#4b5563", size=11)
        x += 40 + int(len(name) * _CHARACTER)


def _box(x: float, y: float, width: float, height: int, colour: str, label: str, title: str) -> Iterator[str]:
    """A filled box that tells more when pointed at, with a label where there is room for it."""
    yield (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{height}" fill="{colour}" stroke="#fff" '
        f'stroke-width="0.5"><title>{escape(title)}</title></rect>'
    )
    if width > (len(label) + 2) * _CHARACTER:
        light = colour in (_PARTS["KV cache"], _PARTS["staging"], _PARTS["activations"])
        fill = "#1b1f24" if light else "#fff"
        yield _text(x + width / 2, y + height / 2 + 4, label, fill=fill, size=11, anchor="middle")


def _text(
    x: float, y: float, text: str, *, size: int = 12, fill: str = "#1b1f24", weight: str = "400", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _cut(text: str) -> str:
    """As much as a line has room for; pointing at the bar tells all."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _colour(place: int | str) -> str:
    if isinstance(place, int):
        return _DEVICES[place % len(_DEVICES)]
    return _STORES.get(place, _DEVICES[0])


def _limit(use: PlaceUse) -> int | None:
    return use.budget_bytes if use.budget_bytes < UNLIMITED else None
