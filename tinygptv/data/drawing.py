"""Draw the boxes of an answer on its image: one colour per phrase, the phrase beside its box."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from tinygptv.data.boxes import COLOURS, Box, ordered, parse_boxes, to_pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_boxes(image: Image.Image, answer: str) -> Image.Image:
    """Draw every box that an answer names.

    Args:
        image: the image, upright.
        answer: generated text, e.g. ``<p>a dog</p> {<1><2><3><4>}``.

    Returns:
        A copy in RGB with boxes and labels; line width and letters grow with the image.
    """
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    scale = max(canvas.size) / 500
    font = ImageFont.load_default(max(10, round(13 * scale)))
    taken: list[Box] = []
    for grounded in parse_boxes(answer):
        colour = COLOURS[grounded.entity % len(COLOURS)]
        box = ordered(to_pixels(grounded.box, *canvas.size))
        draw.rectangle(box, outline=colour, width=max(2, round(2 * scale)))
        if grounded.phrase:
            label = _place_label(draw, grounded.phrase, font, box, taken)
            taken.append(label)
            draw.rectangle(label, fill=colour)
            draw.text((label[0] + 2, label[1] + 1), grounded.phrase, font=font, fill=_readable_on(colour))
    return canvas


def _place_label(draw: ImageDraw.ImageDraw, text: str, font: Font, box: Box, taken: list[Box]) -> Box:
    """A rectangle for the label: above the box where there is room, else inside, and clear of other labels."""
    left, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom + 3
    x = max(0.0, min(box[0], draw.im.size[0] - width))
    y = box[1] - height if box[1] >= height else box[1]
    while any(_overlap((x, y, x + width, y + height), other) for other in taken) and y + 2 * height <= draw.im.size[1]:
        y += height
    return (x, y, x + width, y + height)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"
