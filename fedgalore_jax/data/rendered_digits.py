"""Digits rendered from the fonts that matplotlib ships, shaped like the UCI handwritten ones.

UCI's digits are 32 x 32 bitmaps that fill the frame from top to bottom, their ink counted in blocks
of 4 x 4 (Kaynak, 1995): 8 x 8 values in 0..16, here over 16. These are made likewise, from each
glyph's signed distance field: warped at random (affine, then elastic), cropped to its ink,
stretched to the frame, and cut at the level that leaves a random share of ink.
"""

import functools
from collections.abc import Callable
from importlib import metadata

import numpy as np

HELD_OUT_FONTS = (
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneralItalic.ttf",
    "cmb10.ttf",
)
TRAIN_FONTS = (
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "DejaVuSerif.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralBolIta.ttf",
    "cmmi10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
    *3 * ("pen-a", "pen-b"),  # three times, to make up for there being only two
)

PEN = {
    "pen-a": """.4 0 .1 .2 0 .6 .2 .95 .45 1 .7 .75 .75 .3 .6 .05 .4 0
        .5 0 .5 1
        .05 .25 .2 .03 .5 0 .75 .2 .6 .5 .05 1 .9 1
        .05 .08 .5 0 .8 .2 .35 .47 .8 .7 .5 1 .05 .92
        .1 0 .05 .5 .8 .5 .75 .05 .65 1
        .85 0 .2 0 .12 .42 .55 .38 .85 .65 .6 .97 .05 .95
        .7 0 .25 .35 .05 .75 .3 1 .7 .9 .7 .6 .4 .5 .1 .7
        .05 0 .9 0 .55 .5 .2 .5 .85 .5 .55 .5 .35 1
        .7 .1 .3 .02 .15 .25 .75 .65 .7 .92 .4 1 .1 .85 .3 .55 .8 .25 .7 .1
        .8 .15 .4 0 .1 .2 .3 .45 .75 .35 .8 .1 .75 1""",
    "pen-b": """.5 .05 .2 .1 .05 .5 .15 .9 .4 1 .65 .8 .7 .4 .55 .1 .3 0
        .2 .3 .6 0 .6 1
        .1 .2 .4 0 .7 .15 .6 .5 .2 .9 .05 .95 .1 .8 .4 .85 .9 1
        .05 0 .8 0 .4 .4 .8 .65 .6 .95 .05 1
        .5 0 0 .6 .9 .6 .55 .6 .65 .35 .4 1
        .9 .05 .25 0 .15 .45 .6 .4 .8 .7 .5 1 .05 .9
        .45 0 .1 .6 .15 .95 .5 1 .75 .8 .5 .6 .12 .75
        .05 .15 .05 0 .9 0 .35 1
        .5 .45 .15 .3 .3 0 .7 .05 .7 .3 .3 .6 .1 .85 .4 1 .75 .85 .65 .6 .5 .45
        .75 .2 .5 0 .1 .15 .15 .4 .5 .45 .8 .1 .65 .6 .4 1""",
}
"""Digits as pens draw them, which no font has (a footless 1, a crossed 7, an open 4, a straight 9):
one stroke each, corners as x y in a unit square, y down."""

GLYPH, FRAME, BLOCK = 64, 32, 4  # sides of a glyph's field, of the bitmap, and of a block of ink


def render(fonts: tuple[str, ...], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders digits in random fonts with strong augmentation.

    Args:
      fonts: names from `TRAIN_FONTS` or `HELD_OUT_FONTS`; one that is there twice is drawn twice as often.
      count: how many images, n.
      seed: decides everything.

    Returns:
      `(images [n, 8, 8, 1] float32 in [0, 1], labels [n] int32)`.
    """
    fields = np.stack([_fields(font) for font in fonts])
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.int32)
    styles = rng.integers(0, len(fonts), count)
    chunks = np.array_split(np.arange(count), -(-count // 1000))
    images = [_shape(fields[styles[rows], labels[rows]], rng) for rows in chunks]
    return np.concatenate(images), labels


@functools.cache
def _fields(font: str) -> np.ndarray:
    """Signed distances to the outline, positive inside, of the ten digits `[10, GLYPH, GLYPH]`.

    Every glyph is scaled to the same height of ink, half of the field's, around the middle.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
        from scipy import ndimage

        fonts = metadata.distribution("matplotlib")
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise ImportError("digits are rendered from fonts: pip install matplotlib pillow scipy") from error
    fields = []
    for digit in range(10):
        canvas = Image.new("L", (8 * GLYPH, 8 * GLYPH))
        draw = ImageDraw.Draw(canvas)
        if font in PEN:
            corners = np.array(PEN[font].splitlines()[digit].split(), float) * 4 * GLYPH
            draw.line((corners + 2 * GLYPH).tolist(), fill=255, width=GLYPH // 2, joint="curve")
        else:
            path = fonts.locate_file(f"matplotlib/mpl-data/fonts/ttf/{font}")
            face = ImageFont.truetype(str(path), 4 * GLYPH)
            draw.text((2 * GLYPH, 2 * GLYPH), str(digit), font=face, fill=255)
        ink = canvas.crop(canvas.getbbox())
        height = GLYPH // 2
        ink = ink.resize((max(1, round(ink.width * height / ink.height)), height), Image.Resampling.BILINEAR)
        field = Image.new("L", (GLYPH, GLYPH))
        field.paste(ink, ((GLYPH - ink.width) // 2, (GLYPH - height) // 2))
        inside = np.asarray(field) > 127
        distance: Callable[[np.ndarray], np.ndarray] = ndimage.distance_transform_edt  # type: ignore
        fields.append(distance(inside) - distance(~inside))
    return np.stack(fields).astype(np.float32)


def _shape(fields: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Warps, crops, stretches, cuts and counts: `[n, GLYPH, GLYPH]` to `[n, 8, 8, 1]`."""
    n = len(fields)

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1))

    # The warp, as where each pixel of the result comes from; y down, x right, middle at 0.
    y, x = np.meshgrid(*2 * [np.arange(GLYPH) - GLYPH / 2 + 0.5], indexing="ij")
    turn, shear, wide = uniform(-0.2, 0.2), uniform(-0.3, 0.12), uniform(0.75, 1.35)
    source_x = (np.cos(turn) * x - np.sin(turn) * y) / wide + shear * y
    source_y = np.sin(turn) * x + np.cos(turn) * y
    source_x, source_y = source_x + _bend(n, rng), source_y + _bend(n, rng)
    warped = _sample(fields, source_y + GLYPH / 2 - 0.5, source_x + GLYPH / 2 - 0.5)

    # The frame: filled by the ink from top to bottom, and in width nearly as the glyph's proportion.
    share, level, cuts = uniform(0.24, 0.36), np.zeros((n, 1, 1)), _cuts(n, rng)
    narrow, shift, tall = uniform(0.7, 1.0), uniform(-0.1, 0.1), uniform(1.0, 1.06)
    grid = (np.arange(FRAME) + 0.5) / FRAME * 2 - 1
    for _ in range(2):  # twice, because the box of the ink depends on the level, and it on the box
        middle, half = _extent(np.any(warped > level, 2), cuts[:2])
        centre, reach = _extent(np.any(warped > level, 1), cuts[2:])
        aspect = np.clip(reach / half * narrow, 0.2, 0.65)
        rows = middle + half * grid[None, :, None] * tall
        columns = centre + reach * (grid[None, None, :] / aspect + shift)
        framed = _sample(warped, *np.broadcast_arrays(rows, columns))
        ranked = np.sort(framed.reshape(n, -1))[:, ::-1]
        level = np.take_along_axis(ranked, (share[:, 0] * FRAME**2).astype(int), 1)[:, None]
    bitmap = framed > level
    blocks = bitmap.reshape(n, FRAME // BLOCK, BLOCK, FRAME // BLOCK, BLOCK)
    return blocks.mean((2, 4), dtype=np.float32)[..., None]


def _cuts(n: int, rng: np.random.Generator) -> np.ndarray:
    """What is cut off each side of the box `[4, n]`: a foot or a flag, as hands leave them out."""
    return rng.uniform(0, 0.12, (4, n)) * (rng.random((4, n)) < 0.3)


def _extent(hit: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half the length `[n, 1, 1]` of the stretch from the first hit to the last."""
    first = hit.argmax(1)
    last = hit.shape[1] - 1 - hit[:, ::-1].argmax(1)
    first, last = first + cuts[0] * (last - first), last - cuts[1] * (last - first)
    return (first + last)[:, None, None] / 2, (last - first + 1)[:, None, None] / 2


def _bend(n: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random displacement `[n, GLYPH, GLYPH]` from a coarse grid of 5 x 5."""
    from scipy import ndimage  # `_fields` came first and would have said what to install

    coarse = rng.normal(0, 1.8, (n, 5, 5))
    smooth = np.asarray(ndimage.zoom(np.eye(5), (GLYPH / 5, 1), order=3, mode="nearest"))
    return smooth @ coarse @ smooth.T


def _sample(fields: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values of `fields [n, h, w]` at `y, x [n, ...]`; outside, the nearest edge's."""
    y = np.clip(y, 0, fields.shape[1] - 1.001)
    x = np.clip(x, 0, fields.shape[2] - 1.001)
    i, j = y.astype(int), x.astype(int)
    y, x = y - i, x - j
    which = np.arange(len(fields))[:, None, None]
    above = fields[which, i, j] * (1 - x) + fields[which, i, j + 1] * x
    below = fields[which, i + 1, j] * (1 - x) + fields[which, i + 1, j + 1] * x
    return above * (1 - y) + below * y
