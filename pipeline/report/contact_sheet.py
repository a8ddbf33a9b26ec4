"""Samples of prepared shards as pictures, with their boxes and names."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from io import BytesIO

from PIL import Image

from pipeline.data.images import decode_image
from pipeline.data.sample import UNLABELLED, Sample
from pipeline.data.vocabulary.categories import Frequency, Vocabulary, clean_name
from pipeline.evaluation.labels import Label, canvas_size, frame_on, overlap, place_label
from pipeline.report.examples import caption_of
from pipeline.report.picture_boxes import dark_edge, name_plate, titled_frame
from pipeline.report.stored import Example, ExampleBox

MAX_SIDE = 560
_ROW_HEIGHT = 240
_LABELLED = 12
"""So many boxes carry their names, where there is room; all names show on hover."""
_TEXT_SHARE = 24


def contact_sheet(
    samples: Iterable[tuple[str, Sample]],
    vocabulary: Vocabulary,
    groups: Mapping[int, Frequency],
    named: str | None = None,
) -> str:
    """A grid of (place in the shards, sample); boxes of the category `named` are named first.

    `groups` has the frequency group of category ids; rare ones are drawn in red.
    """
    pictures = "".join(
        _picture(place, sample, _example(sample, vocabulary, groups), named)
        for place, sample in samples
    )
    return f'<div class="pictures">{pictures}</div>'


def _picture(place: str, sample: Sample, example: Example, named: str | None) -> str:
    size = example.width, example.height
    canvas = canvas_size(size)
    unit = canvas[1] / 68
    frames = [frame_on(canvas, box.bbox, size) for box in example.ground_truth]
    boxes = list(zip(example.ground_truth, frames, strict=True))
    # The largest first, so that those inside them lie on top and can be pointed at.
    boxes.sort(key=lambda pair: -pair[0].bbox[2] * pair[0].bbox[3])
    drawn = "".join(
        dark_edge(frame, 0.8 * unit)
        + titled_frame(
            "found rare" if box.is_rare else "found",
            frame,
            f"stroke-width:{0.5 * unit:.2f}",
            clean_name(box.name),
        )
        for box, frame in boxes
    )
    labels: list[tuple[ExampleBox, Label]] = []
    for box, frame in sorted(boxes, key=lambda pair: (pair[0].name != named, not pair[0].is_rare)):
        text_size = round(canvas[1] / _TEXT_SHARE)
        taken = [label.plate for _, label in labels]
        label = place_label(box.name, None, text_size, frame=frame, canvas=canvas, taken=taken)
        if len(labels) < _LABELLED and not any(overlap(label.plate, other) for other in taken):
            labels.append((box, label))
    plates = "".join(name_plate(label, rare=box.is_rare) for box, label in labels)
    ratio = size[0] / size[1]
    return (
        f'<figure style="flex:{ratio:.3f} 1 {ratio * _ROW_HEIGHT:.0f}px">'
        f'<svg viewBox="0 0 {canvas[0]} {canvas[1]}" role="img" '
        f'aria-label="sample {escape(sample.key)} with boxes">'
        f'<image href="{example.url}" width="{canvas[0]}" height="{canvas[1]}" '
        f'preserveAspectRatio="none"/>{drawn}{plates}</svg>'
        f"<figcaption>{_words(place, sample, example)}</figcaption></figure>"
    )


def _words(place: str, sample: Sample, example: Example) -> str:
    parts = [caption_of(example)]
    if sample.coarse:
        parts.append("coarse")
    if sample.negative_category_ids:
        parts.append(f"{len(sample.negative_category_ids)} negative categories")
    text = f'{"; ".join(parts)} <span class="detail">{escape(place)}</span>'
    return f"{escape(sample.caption)}<br>{text}" if sample.caption else text


def _example(sample: Sample, vocabulary: Vocabulary, groups: Mapping[int, Frequency]) -> Example:
    """The sample with a smaller picture; boxes without a label are named so."""
    photograph = decode_image(sample.image)
    scale = min(1.0, MAX_SIDE / max(photograph.size))
    width, height = (max(1, round(side * scale)) for side in photograph.size)
    buffer = BytesIO()
    photograph.resize((width, height), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=82, optimize=True
    )
    boxes = []
    for number, (x0, y0, x1, y1) in zip(
        sample.category_ids.tolist(), (sample.boxes * scale).tolist(), strict=True
    ):
        name, frequency = "no label", None
        if number != UNLABELLED:
            name = vocabulary.names[vocabulary.column_of(number)]
            frequency = groups.get(number)
        boxes.append(ExampleBox(name, frequency, 1.0, (x0, y0, x1 - x0, y1 - y0)))
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Example(sample.image_id, url, width, height, boxes, [])
