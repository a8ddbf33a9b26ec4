"""Boxes and their names over a picture, as parts of an SVG."""

from html import escape

from pipeline.evaluation.labels import Label, Rectangle


def frame_attributes(frame: Rectangle) -> str:
    """Place and size of a rect element."""
    left, top, right, bottom = frame
    return f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'


def dark_edge(frame: Rectangle, width: float) -> str:
    """What makes a line that is drawn on it show on any ground."""
    return f'<rect class="under" {frame_attributes(frame)} style="stroke-width:{width:.2f}"/>'


def titled_frame(classes: str, frame: Rectangle, style: str, words: str) -> str:
    """A frame whose `words` show on hover."""
    return (
        f'<rect class="{classes}" {frame_attributes(frame)} style="{style}">'
        f"<title>{escape(words)}</title></rect>"
    )


def name_plate(label: Label, *, rare: bool) -> str:
    """The text is told its width, because the browser's letters are not those measured with."""
    left, top, right, bottom = label.plate
    middle = (top + bottom) / 2 + 0.35 * label.text_size
    return (
        f'<g class="{"name rare" if rare else "name"}"><rect {frame_attributes(label.plate)} '
        f'rx="2"/><text x="{(left + right - label.width) / 2:.1f}" y="{middle:.1f}" '
        f'textLength="{label.width:.1f}" lengthAdjust="spacingAndGlyphs" '
        f'style="font-size:{label.text_size}px">{escape(label.text)}</text></g>'
    )
