"""Captioned scenes: thing, colour, material, place, ground, light and style.

A scene is first decided (`decide`), then described (`caption`) and drawn (`render`), so captions match pictures.
"""

from __future__ import annotations

import string
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from benchmarks.fast_base.textures import SUPERSAMPLING, Floats, Pixels, Textures, dead_leaves, pattern

# Common names of colours -> red, green, blue in [0, 1].
COLOURS = {
    "red": (0.80, 0.10, 0.10),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.83, 0.12),
    "green": (0.15, 0.60, 0.20),
    "blue": (0.13, 0.32, 0.80),
    "purple": (0.48, 0.18, 0.65),
    "pink": (0.97, 0.58, 0.75),
    "brown": (0.42, 0.25, 0.12),
    "black": (0.06, 0.06, 0.07),
    "grey": (0.50, 0.50, 0.51),
    "white": (0.94, 0.94, 0.93),
}

# Centre of the main thing, as shares of width and height.
PLACES = {
    "on the left": (0.25, 0.52),
    "on the right": (0.75, 0.52),
    "in the centre": (0.50, 0.50),
    "at the top": (0.50, 0.26),
    "at the bottom": (0.50, 0.74),
    "in the top left corner": (0.25, 0.25),
    "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75),
    "in the bottom right corner": (0.75, 0.75),
}

SKIN = ((0.96, 0.80, 0.69), (0.87, 0.66, 0.52), (0.68, 0.46, 0.33), (0.42, 0.27, 0.18))
HAIR = ((0.10, 0.08, 0.07), (0.33, 0.20, 0.10), (0.62, 0.42, 0.18), (0.85, 0.72, 0.45), (0.55, 0.54, 0.53))

THINGS = tomllib.loads((Path(__file__).parent / "things.toml").read_text())["thing"]
NOUNS = {thing["names"][0]: tuple(thing["names"]) for thing in THINGS}  # usual name -> all names
WAYS = {thing["names"][0]: tuple(thing["ways"]) for thing in THINGS}
PEOPLE = ("man", "woman", "boy", "girl", "person")

MATERIALS = ("metal", "wooden", "plastic", "fluffy", "stone", "shiny", "woollen", "leather")
SIZES = {
    "small": (0.17, 0.20),
    "": (0.19, 0.27),
    "big": (0.26, 0.33),
}  # half of the longer side, as a share of the picture
CLOSE_UP = (0.36, 0.50)
LIGHTS = ("", "", "", "in bright sunlight", "in warm light", "in cold light", "in the dark", "with light from the left",
          "with light from the right")  # fmt: skip
FRAMES = ("", "", "a photo of", "a photo of", "a picture of", "a snapshot of")
STYLES = ("a pencil sketch of", "a watercolour of", "pixel art of", "a blurred photo of", "a black and white photo of")

# Grounds, as in captions -> colours that the main thing must not have there.
GROUNDS: dict[str, tuple[str, ...]] = {
    "in front of a {} wall": (),
    "on a {} background": (),
    "on a {} carpet": (),
    "on a wooden table": ("brown", "orange"),
    "on a wooden floor": ("brown", "orange"),
    "on grass": ("green",),
    "in a meadow under a blue sky": ("green", "blue", "white"),
    "on a beach": ("yellow", "blue", "white", "orange", "brown"),
    "in the snow": ("white", "grey"),
    "on a street": ("grey", "black"),
    "in a forest": ("green", "brown", "black"),
    "in front of a brick wall": ("red", "brown", "orange"),
    "on a tiled floor": ("white", "grey", "black"),
    "in a room": ("white", "grey", "brown"),
    "at night": ("black", "blue", "purple", "brown", "grey"),
    "on the water": ("blue", "green", "grey"),
    "among leaves": ("green", "brown", "orange", "yellow"),
    "in front of many things": ("grey", "white", "black", "brown"),
}


@dataclass(frozen=True)
class Scene:
    """The content of a picture. An empty text is not in captions, and is drawn at random."""

    noun: str  # a key of NOUNS
    colour: str
    place: str
    ground: str
    ground_colour: str
    material: str = ""
    size: str = ""
    close: bool = False
    light: str = ""
    style: str = ""
    other: tuple[str, str, str] | None = None  # a second, smaller thing: noun, colour, place


def held_back(noun: str, colour: str, place: str) -> bool:
    """Whether a combination is kept out of training, for measuring: one in twenty."""
    return zlib.crc32(f"{noun}/{colour}/{place}".encode()) % 20 == 0


def decide(rng: np.random.Generator, for_measure: bool = False) -> Scene:
    """A scene with a combination for measuring, or for training."""
    while True:
        ground = choose(rng, tuple(GROUNDS))
        ground_colour = choose(rng, tuple(COLOURS)) if "{}" in ground else ""
        free = [name for name in COLOURS if name not in (*GROUNDS[ground], ground_colour)]
        noun, colour = choose(rng, tuple(NOUNS)), choose(rng, tuple(free))
        close = not for_measure and rng.random() < 0.25
        place = "in the centre" if close else choose(rng, tuple(PLACES))
        if held_back(noun, colour, place) is for_measure:
            break
    other = None
    if not close and rng.random() < 0.2:
        far = [where for where in PLACES if np.hypot(*np.subtract(PLACES[where], PLACES[place])) > 0.45]
        rest = [name for name in free if name != colour]
        if far and rest:
            other = (choose(rng, tuple(NOUNS)), choose(rng, tuple(rest)), choose(rng, tuple(far)))
    return Scene(
        noun,
        colour,
        place,
        ground,
        ground_colour,
        material=choose(rng, MATERIALS) if noun not in PEOPLE and rng.random() < 0.25 else "",
        size=choose(rng, tuple(SIZES)),
        close=close,
        light=choose(rng, LIGHTS),
        style=choose(rng, STYLES) if not for_measure and rng.random() < 0.08 else "",
        other=other,
    )


def choose(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def made_up(rng: np.random.Generator, chance: float) -> str:
    """A made-up name such as the token of a tune, or usually none."""
    if rng.random() >= chance:
        return ""
    return "".join(rng.choice(list(string.ascii_lowercase), size=rng.integers(3, 6)))


def caption(rng: np.random.Generator, scene: Scene, everything: bool = False, name: str = "") -> str:
    """A caption of the scene: complete, or, one time in three, with parts left out, as people do.

    everything: leave nothing out. name: of the main thing; it is before the noun.
    """
    full = rng.random() < 2 / 3

    def include(chance: float) -> bool:
        return everything or full or rng.random() < chance

    noun = scene.noun if everything else choose(rng, NOUNS[scene.noun])
    noun = f"{name} {noun}".strip()
    colour = scene.colour if include(0.85) else ""
    if scene.noun in PEOPLE:
        worn = choose(rng, ("in {}", "in a {} shirt", "wearing {}")).format(colour) if colour else ""
        thing = f"{scene.size if include(0.5) else ''} {noun} {worn}"
    else:
        thing = f"{scene.size if include(0.7) else ''} {colour} {scene.material if include(0.8) else ''} {noun}"
    frame = "a close-up of" if scene.close and include(0.7) else scene.style or choose(rng, FRAMES)
    where = scene.place if include(0.1 if scene.close else 0.75) else ""
    ground = scene.ground.format(scene.ground_colour) if include(0.7) else ""
    other = ""
    if scene.other and include(0.6):
        other_noun, other_colour, other_place = scene.other
        other = f"and {article(f'{other_colour} {other_noun}')} {other_place}"
    light = scene.light if include(0.6) else ""
    middle = article(thing) if include(0.8) else thing
    parts = [where, ground] if rng.random() < 0.6 else [ground, where]
    joint = ", " if rng.random() < 0.3 else " "
    return " ".join(f"{frame} {joint.join([f'{middle}', *(part for part in parts if part)])} {other} {light}".split())


def article(thing: str) -> str:
    words = " ".join(thing.split())
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


def render(rng: np.random.Generator, scene: Scene, textures: Textures, side: int) -> Pixels:
    """The scene's picture, (side, side, 3)."""
    big = side * SUPERSAMPLING
    picture = draw_ground(rng, scene, textures, big)
    things = [(scene.noun, scene.colour, scene.place, CLOSE_UP if scene.close else SIZES[scene.size], scene.material)]
    if scene.other:
        things.insert(0, (*scene.other, SIZES["small"], ""))
    for noun, colour, place, (least, most), material in things:
        half = rng.uniform(least, most)
        x, y = np.array(PLACES[place]) + rng.normal(scale=0.025, size=2)
        draw_thing(rng, textures, picture, noun, paint(rng, colour), material, (x * big, y * big, half * big))
    picture *= lit(rng, scene.light, big)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    if scene.style:
        image = stylise(rng, scene.style, image)
    noisy = np.asarray(image, np.float32) + rng.normal(scale=2.0 * rng.beta(1, 3), size=(side, side, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def paint(rng: np.random.Generator, name: str) -> Floats:
    """A random shade of a named colour."""
    colour = np.array(COLOURS[name]) * rng.uniform(0.88, 1.1) + rng.normal(scale=0.025, size=3)
    return np.clip(colour, 0.02, 0.98).astype(np.float32)


PAINTS = "xmdlashkw"


def draw_thing(
    rng: np.random.Generator,
    textures: Textures,
    picture: Floats,
    noun: str,
    colour: Floats,
    material: str,
    box: tuple[float, float, float],
) -> None:
    """Draw a thing over `picture` (H, W, 3), in place. box: centre x, y and half of its longer side, in pixels."""
    big = len(picture)
    x, y, half = box
    # Nearly upright, nearly in proportion, possibly mirrored.
    angle, mirror, stretch = rng.normal(scale=0.12), rng.choice([-1, 1]), rng.uniform(0.88, 1.12, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(
        [mirror * stretch[0], stretch[1]]
    )
    parts = Image.new("L", (big, big))
    draw = ImageDraw.Draw(parts)
    for part in choose(rng, WAYS[noun]).split(";"):
        kind, *numbers, role = part.split()
        draw_part(draw, kind, [float(n) for n in numbers], PAINTS.index(role), turn, x, y, half)
    roles = np.asarray(parts)
    table = np.zeros((len(PAINTS), 3), np.float32)
    accent = np.array(COLOURS[choose(rng, tuple(COLOURS))], np.float32)
    skin, hair = SKIN[rng.integers(len(SKIN))], HAIR[rng.integers(len(HAIR))]
    table[1:] = np.stack(
        [
            colour,
            colour * 0.7,
            colour + (1 - colour) * 0.25,
            accent,
            np.array(skin),
            np.array(hair),
            np.full(3, 0.07),
            np.full(3, 0.93),
        ]
    )

    cover = parts.point(lambda role: 255 if role else 0)
    soft = np.asarray(cover.filter(ImageFilter.GaussianBlur(0.22 * half)), np.float32) / 255
    shadow = ImageChops.offset(cover, int(rng.normal() * 0.1 * half), int(0.15 * half))
    shade = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.15 * half)), np.float32)[..., None] / 255
    picture *= 1 - rng.uniform(0, 0.45) * shade
    # Round things are lighter towards the light, and darker at the rim.
    gy, gx = np.gradient(soft)
    towards = rng.normal(size=2) - np.array([0.0, 1.0])
    relief = 1 + 1.2 * half / 8 * (gx * towards[0] + gy * towards[1]) * rng.uniform(0.1, 0.9)
    surface = table[roles] * (relief * (0.8 + 0.25 * soft))[..., None]
    surface *= (1 + grain(rng, textures, material, big))[..., None]
    if material in ("metal", "shiny", "plastic"):
        cx, cy = x + rng.normal() * 0.2 * half, y - 0.35 * half
        yy, xx = np.mgrid[0:big, 0:big].astype(np.float32)
        spot = np.exp(-((xx - cx) ** 2 + 2 * (yy - cy) ** 2) / (0.25 * half) ** 2)
        surface += 0.7 * spot[..., None]
    solid = np.asarray(cover, np.float32)[..., None] / 255
    picture += solid * (np.clip(surface, 0, 1) - picture)


def draw_part(
    draw: ImageDraw.ImageDraw, kind: str, n: list[float], role: int, turn: Floats, x: float, y: float, half: float
) -> None:
    """Draw one part of a thing into the map of paints. See things.toml."""

    def placed(points: Floats) -> list[tuple[float, float]]:
        return [(x + px, y + py) for px, py in (points @ turn.T) * half]

    if kind == "e":
        t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        draw.polygon(placed(np.stack([n[0] + n[2] * np.cos(t), n[1] + n[3] * np.sin(t)], axis=1)), role)
    elif kind == "r":
        x0, y0, x1, y1, radius = n
        t = np.linspace(0, np.pi / 2, 4)
        corners = [
            (px + radius * np.cos(t + a), py + radius * np.sin(t + a))
            for px, py, a in (
                (x1 - radius, y1 - radius, 0),
                (x0 + radius, y1 - radius, np.pi / 2),
                (x0 + radius, y0 + radius, np.pi),
                (x1 - radius, y0 + radius, 1.5 * np.pi),
            )
        ]
        draw.polygon(placed(np.concatenate([np.stack(corner, axis=1) for corner in corners])), role)
    elif kind == "p":
        draw.polygon(placed(np.reshape(n, (-1, 2))), role)
    else:
        points, width = placed(np.reshape(n[:-1], (-1, 2))), max(1, round(n[-1] * half))
        draw.line(points, role, width, joint="curve")


def grain(rng: np.random.Generator, textures: Textures, material: str, big: int) -> Floats:
    """How a material's surface varies in brightness, (big, big) around 0."""
    if material in ("fluffy", "woollen", "stone", "leather"):
        return 0.16 * textures.cut(rng, big, big)
    if material == "wooden":
        x = np.mgrid[0:big, 0:big][int(rng.integers(2))] / rng.uniform(3, 8)
        return (0.16 * np.sin(x + 1.5 * textures.cut(rng, big, big))).astype(np.float32)
    if material == "metal":
        return (0.2 * np.sin(np.mgrid[0:big, 0:big][1] / rng.uniform(6, 16) + rng.uniform(0, 6))).astype(np.float32)
    return rng.uniform(0, 0.12) * textures.cut(rng, big, big)


def draw_ground(rng: np.random.Generator, scene: Scene, textures: Textures, big: int) -> Floats:
    """The background, (big, big, 3)."""
    ground, horizon = scene.ground, int(big * rng.uniform(0.3, 0.7))

    def area(colour: tuple[float, float, float] | Floats, roughness: float) -> Floats:
        return textures.surface(rng, big, big, np.asarray(colour, np.float32), roughness)

    def above(upper: Floats, lower: Floats) -> Floats:
        lower[:horizon] = upper[:horizon]
        return lower

    if scene.ground_colour:
        base = paint(rng, scene.ground_colour)
        if "carpet" in ground:
            return area(base, 0.12) * (1 + 0.15 * pattern(rng, big, big))[..., None]
        return area(base, rng.uniform(0, 0.08))
    wood = textures.surface(rng, big, big, np.array((0.60, 0.40, 0.23), np.float32) * rng.uniform(0.6, 1.2), 0.08)
    sky = area((0.55, 0.74, 0.95), 0.02) + 0.08 * textures.cut(rng, big, big)[..., None].clip(0)
    grass = area(np.array((0.26, 0.46, 0.16)) * rng.uniform(0.7, 1.3), 0.22)
    wall = area(np.array((0.82, 0.80, 0.76)) * rng.uniform(0.6, 1.15), 0.03)
    if "wooden" in ground:
        planks = 1 + 0.08 * np.sign(np.sin(np.mgrid[0:big, 0:big][int(rng.integers(2))] / rng.uniform(3, 9)))
        wood *= planks.astype(np.float32)[..., None]
        return wood if "floor" in ground or rng.random() < 0.4 else above(wall, wood)
    if ground == "on grass":
        return grass
    if "meadow" in ground:
        return above(sky, grass)
    if "beach" in ground:
        sea = area((0.20, 0.48, 0.66), 0.06)
        sea[: horizon // 2] = sky[: horizon // 2]
        return above(sea, area((0.86, 0.76, 0.56), 0.05))
    if "snow" in ground:
        return above(area((0.72, 0.80, 0.88), 0.02), area((0.93, 0.94, 0.97), 0.03))
    if "street" in ground:
        return above(
            area((0.62, 0.60, 0.58), 0.1) * (1 + 0.3 * pattern(rng, big, big))[..., None], area((0.36,) * 3, 0.06)
        )
    if "forest" in ground:
        trunks = 1 - 0.5 * (np.sin(np.mgrid[0:big, 0:big][1] / rng.uniform(3, 9) + textures.cut(rng, big, big)) > 0.6)
        return above(
            area((0.22, 0.36, 0.16), 0.3) * trunks.astype(np.float32)[..., None], area((0.27, 0.25, 0.13), 0.2)
        )
    if "brick" in ground:
        yy, xx = np.mgrid[0:big, 0:big]
        h = int(rng.uniform(8, 14))
        joints = (yy % h < 1.5) | ((xx + (yy // h % 2) * h) % (2 * h) < 1.5)
        bricks = area((0.60, 0.26, 0.18), 0.12)
        bricks[joints] = (0.75, 0.72, 0.68)
        return bricks
    if "tiled" in ground:
        return area((0.72, 0.73, 0.74), 0.03) * (1 + 0.22 * checks(rng, big))[..., None]
    if "room" in ground:
        room = above(wall, wood)
        left = int(rng.uniform(0, 0.7) * big)
        room[: horizon // 2, left : left + big // 4] = (0.75, 0.86, 0.95)  # a window
        return room
    if ground == "at night":
        lights = (textures.cut(rng, big, big) > 2.4)[..., None] * np.array((0.9, 0.8, 0.4), np.float32)
        return area((0.05, 0.06, 0.13), 0.2) + lights
    if "water" in ground:
        return area((0.16, 0.36, 0.46), 0.14)
    if "leaves" in ground:
        leaves = dead_leaves(rng, textures, big // SUPERSAMPLING)
        colours = np.array((0.45, 0.50, 0.20)) * rng.uniform(0.6, 1.4, size=3)
        big_leaves = np.asarray(Image.fromarray(leaves).convert("L").resize((big, big)), np.float32) / 255
        return (big_leaves[..., None] * colours * 1.3).astype(np.float32)
    blurred = Image.fromarray(dead_leaves(rng, textures, big // SUPERSAMPLING)).resize((big, big))
    blurred = blurred.filter(ImageFilter.GaussianBlur(rng.uniform(0, 4)))
    return np.asarray(blurred, np.float32) / 255 * 0.8 + 0.1


def checks(rng: np.random.Generator, big: int) -> Floats:
    tile = int(rng.uniform(10, 24))
    yy, xx = np.mgrid[0:big, 0:big]
    return np.where((yy // tile + xx // tile) % 2, 1, -1).astype(np.float32)


def lit(rng: np.random.Generator, phrase: str, big: int) -> Floats:
    """Brightness and tint of the light, (big, big, 3) around 1."""
    ramp = np.linspace(-1, 1, big, dtype=np.float32)
    light = np.ones((big, big, 3), np.float32) * rng.uniform(0.88, 1.08)
    if phrase == "in the dark":
        return light * 0.7
    if phrase == "in warm light":
        return light * np.array((1.06, 0.97, 0.82), np.float32)
    if phrase == "in cold light":
        return light * np.array((0.86, 0.96, 1.06), np.float32)
    if phrase == "in bright sunlight":
        return light * 1.15
    if "from the" in phrase:
        return light * (1 + (-0.35 if "left" in phrase else 0.35) * ramp)[None, :, None]
    return light * (1 + rng.normal(scale=0.08) * ramp)[:, None, None]


def stylise(rng: np.random.Generator, style: str, image: Image.Image) -> Image.Image:
    side = image.width
    if "sketch" in style:
        edges = ImageChops.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).point(
            lambda v: max(0, 2 * v - 255)
        )
        return edges.convert("RGB")
    if "watercolour" in style:
        washed = image.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(0.7))
        return Image.blend(washed, Image.new("RGB", image.size, (250, 247, 238)), 0.3)
    if "pixel" in style:
        return (
            image.resize((side // 4, side // 4), Image.Resampling.BOX).quantize(12).convert("RGB").resize(image.size, 0)
        )
    if "blurred" in style:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.5)))
    return image.convert("L").convert("RGB")
