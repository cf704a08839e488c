"""Captioned scenes: what is drawn, in which colour and material, where, on what, in which light and style.

A scene is first decided (`decide`), then told (`tell`) and drawn (`render`), so that the words are true of the picture.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from benchmarks.fast_base.textures import SUPERSAMPLING, Floats, Pixels, Textures, dead_leaves, pattern

# Names that people use, and their colours: red, green, blue in [0, 1].
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

# Middle of the main object, as shares of width and height.
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

# Things, drawn from simple parts in a box from -1 to 1, y downwards: `e` ellipse (middle, radii), `r` rectangle with
# rounded corners (two corners, radius), `p` polygon, `l` line (points, width last). The letter at the end is its paint:
# m the main colour, d and l the same but darker and lighter, a another colour, s skin, h hair, k black, w white.
FACE = "e 0 -.45 .36 .42 s; e -.14 -.5 .05 .05 k; e .14 -.5 .05 .05 k; l -.1 -.26 .1 -.26 .05 d"
BODY = "r -.75 .02 .75 1.1 .3 m; r -.13 -.1 .13 .1 .05 s"
EYES = "e -.2 -.45 .07 .07 k; e .2 -.45 .07 .07 k"
THINGS: dict[str, tuple[str, ...]] = {  # nouns (the first is the usual one) -> ways to draw it
    "man|guy|male": (
        f"{BODY}; e 0 -.55 .4 .42 h; {FACE}",
        "r -.3 -.35 .3 .35 .1 m; r -.28 .3 -.03 1 .05 d; r .03 .3 .28 1 .05 d; r -.5 -.3 -.3 .3 .08 l; r .3 -.3 .5 .3 .08"
        " l; e 0 -.68 .2 .24 s; e 0 -.8 .21 .14 h",
    ),
    "woman|lady|female": (
        f"e 0 -.3 .55 .7 h; {BODY}; {FACE}; e 0 -.8 .4 .16 h",
        "p 0 -.5 .55 .6 -.55 .6 m; r -.2 .5 -.05 1 .05 s; r .05 .5 .2 1 .05 s; e 0 -.65 .28 .32 h; e 0 -.66 .18 .22 s",
    ),
    "boy": (f"{BODY}; e 0 -.6 .42 .36 h; {FACE}; e 0 -.82 .42 .14 a",),
    "girl": (f"{BODY}; e -.45 -.35 .2 .4 h; e .45 -.35 .2 .4 h; e 0 -.6 .42 .36 h; {FACE}; e 0 -.85 .35 .12 h",),
    "person|child|baby": (f"{BODY}; e 0 -.5 .4 .46 h; e 0 -.42 .37 .42 s; {EYES}; l -.1 -.22 .1 -.22 .06 d",),
    "dog|puppy": (
        "e -.1 .2 .62 .34 m; r -.6 .3 -.42 .95 .08 d; r .2 .3 .38 .95 .08 d; r -.35 .3 -.18 .95 .08 m; r .42 .3 .6 .95 .08"
        " m; l -.65 .1 -.95 -.4 .14 m; e .55 -.3 .36 .32 m; e .85 -.18 .2 .14 l; e .95 -.22 .08 .07 k; e .6 -.38 .06 .06"
        " k; e .35 -.3 .14 .3 d",
        "e 0 0 .7 .75 m; e -.7 -.1 .25 .6 d; e .7 -.1 .25 .6 d; e 0 .35 .36 .32 l; e 0 .2 .15 .11 k; e -.28 -.15 .1 .1 k;"
        " e .28 -.15 .1 .1 k; l -.12 .5 .12 .5 .05 k",
        "e 0 .5 .5 .55 m; e 0 -.35 .48 .45 m; e -.48 -.4 .16 .36 d; e .48 -.4 .16 .36 d; e 0 -.15 .22 .2 l; e 0 -.24 .09"
        f" .07 k; {EYES}; e -.25 .95 .2 .1 l; e .25 .95 .2 .1 l",
    ),
    "cat|kitten": (
        "e 0 .1 .72 .68 m; p -.7 -.2 -.65 -.95 -.15 -.5 m; p .7 -.2 .65 -.95 .15 -.5 m; p -.6 -.3 -.58 -.75 -.3 -.5 a; p .6"
        " -.3 .58 -.75 .3 -.5 a; e -.28 0 .15 .13 w; e .28 0 .15 .13 w; e -.28 0 .06 .12 k; e .28 0 .06 .12 k; p -.08 .22"
        " .08 .22 0 .32 k; l -.9 .3 -.3 .34 .03 w; l .9 .3 .3 .34 .03 w",
        "e 0 .45 .45 .55 m; l .4 .8 .8 .6 .85 0 .14 d; e 0 -.3 .42 .38 m; p -.4 -.4 -.38 -.95 -.08 -.6 m; p .4 -.4 .38"
        f" -.95 .08 -.6 m; e -.16 -.35 .07 .07 k; e .16 -.35 .07 .07 k; e 0 -.18 .06 .05 a; e 0 .5 .22 .3 l",
    ),
    "bird|parrot": (
        "e 0 .1 .5 .4 m; e .4 -.4 .28 .26 m; p .62 -.45 .98 -.35 .62 -.25 a; e .45 -.45 .06 .06 k; p -.35 .1 -1 .45 -.4 .4"
        " d; e -.1 .1 .35 .22 d; l 0 .45 0 .95 .05 a; l .2 .45 .2 .95 .05 a",
    ),
    "horse|pony": (
        "e -.1 .05 .6 .3 m; r -.6 .1 -.46 1 .05 d; r .25 .1 .39 1 .05 d; r -.4 .1 -.27 1 .05 m; r .4 .1 .53 1 .05 m; p .2 0"
        " .55 -.75 .8 -.6 .55 .2 m; e .72 -.62 .26 .15 m; l .3 -.2 .55 -.85 .14 h; l -.65 0 -.85 .6 .12 h",
    ),
    "rabbit|bunny": (
        f"e -.22 -.6 .13 .4 m; e .22 -.6 .13 .4 m; e 0 .5 .5 .5 m; e 0 -.1 .4 .38 m; e -.16 -.15 .06 .07 k; e .16 -.15 .06"
        " .07 k; e 0 .02 .07 .05 a; e 0 .55 .25 .3 l",
    ),
    "fish": ("e .1 0 .6 .42 m; p -.4 0 -.95 -.45 -.95 .45 d; e .45 -.1 .1 .1 w; e .47 -.1 .05 .05 k; p 0 -.4 .35 -.4 .1 -.7 d",),
    "stuffed animal|teddy bear|plush toy|plushie": (
        "e -.45 -.75 .22 .22 m; e .45 -.75 .22 .22 m; e 0 .5 .5 .48 m; e -.55 .3 .2 .34 d; e .55 .3 .2 .34 d; e -.4 .88 .24"
        " .16 l; e .4 .88 .24 .16 l; e 0 -.35 .52 .46 m; e 0 -.2 .22 .17 l; e 0 -.27 .08 .06 k; e -.2 -.45 .06 .06 k; e .2"
        " -.45 .06 .06 k; e 0 .52 .27 .28 l",
        "e 0 .15 .68 .75 m; e -.75 .25 .2 .3 d; e .75 .25 .2 .3 d; e -.3 -.1 .2 .22 w; e .3 -.1 .2 .22 w; e -.28 -.08 .09"
        " .1 k; e .28 -.08 .09 .1 k; l -.3 .4 0 .5 .3 .4 .08 k; l -.3 -.5 -.4 -.95 .1 d; l .3 -.5 .4 -.95 .1 d",
    ),
    "toy robot|robot|toy": (
        "r -.6 -.1 .6 .6 .08 m; r -.4 .05 .4 .4 .05 d; e -.2 .2 .08 .08 a; e .2 .2 .08 .08 w; r -.5 -.85 .5 -.2 .1 m; e -.22"
        " -.55 .13 .13 w; e .22 -.55 .13 .13 w; e -.22 -.55 .06 .06 k; e .22 -.55 .06 .06 k; r -.4 .6 -.1 1 .05 d; r .1 .6"
        " .4 1 .05 d; r -.85 -.05 -.65 .5 .08 l; r .65 -.05 .85 .5 .08 l; l 0 -.85 0 -1 .06 a",
    ),
    "toy monster|monster|toy": (
        "e 0 .1 .7 .75 m; e 0 -.2 .3 .3 w; e 0 -.2 .13 .13 k; r -.4 .35 .4 .55 .08 k; p -.3 .35 -.15 .35 -.22 .48 w; p .3"
        " .35 .15 .35 .22 .48 w; p -.5 -.4 -.7 -1 -.25 -.6 a; p .5 -.4 .7 -1 .25 -.6 a; e -.35 .9 .22 .12 d; e .35 .9 .22"
        " .12 d",
    ),
    "car|toy car|toy": (
        "p -.6 0 -.4 -.45 .35 -.45 .6 0 d; p -.48 -.03 -.34 -.36 -.05 -.36 -.05 -.03 w; p .05 -.03 .05 -.36 .3 -.36 .47 -.03"
        " w; r -.98 -.05 .98 .4 .15 m; e -.55 .42 .24 .24 k; e .55 .42 .24 .24 k; e -.55 .42 .1 .1 w; e .55 .42 .1 .1 w; e"
        " .9 .1 .07 .09 a",
        "r -.75 -.3 .75 .3 .2 m; r -.85 -.6 -.45 -.1 .1 k; r .45 -.6 .85 -.1 .1 k; r -.85 .2 -.45 .7 .1 k; r .45 .2 .85 .7 .1"
        " k; e 0 -.1 .35 .28 d; l -.75 -.45 .75 -.45 .12 a",
    ),
    "truck|bus": (
        "r -.95 -.5 .35 .4 .05 m; r .38 -.2 .95 .4 .1 d; r .5 -.12 .85 .12 .04 w; e -.6 .45 .2 .2 k; e .6 .45 .2 .2 k; r -.8"
        " -.35 -.5 -.05 .03 w; r -.35 -.35 -.05 -.05 .03 w",
    ),
    "bicycle|bike": (
        "l -.55 .3 -.2 -.25 .35 -.25 -.05 .3 -.55 .3 .12 m; l -.05 .3 -.25 -.4 .1 m; l .55 .3 .3 -.45 .12 m; l .15 -.45 .4"
        " -.5 .1 k; e -.25 -.45 .16 .07 k; e -.55 .35 .4 .4 k; e -.55 .35 .31 .31 l; e .55 .35 .4 .4 k; e .55 .35 .31 .31 l",
    ),
    "boat|ship": ("p -.95 .3 .95 .3 .6 .85 -.6 .85 m; l 0 .3 0 -.95 .08 d; p .06 -.9 .06 .2 .7 .2 w; p -.06 -.7 -.06 .2 -.5 .2 a",),
    "backpack|bag": (
        "r -.6 -.75 .6 .9 .35 m; r -.42 .2 .42 .75 .12 d; l -.15 -.75 -.15 -.95 .15 -.95 .15 -.75 .08 k; l -.5 -.15 .5 -.15"
        " .06 a; r -.75 -.1 -.6 .7 .06 d; r .6 -.1 .75 .7 .06 d",
        "r -.6 -.6 .6 .9 .3 m; e -.4 -.65 .2 .2 d; e .4 -.65 .2 .2 d; e -.22 -.25 .12 .12 w; e .22 -.25 .12 .12 w; e -.22"
        " -.25 .05 .05 k; e .22 -.25 .05 .05 k; e 0 0 .1 .07 k; r -.4 .3 .4 .75 .1 l",
    ),
    "handbag|suitcase|bag": ("r -.85 -.25 .85 .8 .12 m; l -.4 -.25 -.3 -.8 .3 -.8 .4 -.25 .12 d; r -.15 -.3 .15 .05 .03 a; l -.85 .2 .85 .2 .05 d",),
    "sneaker|shoe": (
        "p -.9 .4 -.85 -.45 -.4 -.5 -.2 -.2 .5 .05 .9 .15 .95 .42 m; r -.95 .36 .98 .58 .08 w; p -.9 .4 -.87 -.2 -.5 -.2"
        " -.45 .4 d; l -.2 -.15 .05 .12 .06 w; l 0 -.08 .22 .16 .06 w; l .2 0 .4 .2 .06 w; e .75 .28 .2 .12 a",
    ),
    "boot": ("p -.5 -.9 .1 -.9 .15 .2 .8 .4 .85 .75 -.5 .75 m; r -.55 .7 .9 .92 .05 k; r -.52 -.95 .14 -.7 .05 d",),
    "teapot|kettle": (
        "e -.05 .15 .6 .55 m; p .4 .1 .98 -.4 .98 -.2 .5 .45 m; l -.55 -.2 -.95 -.2 -.95 .4 -.5 .45 .12 d; e -.05 -.38 .36 .1"
        " d; e -.05 -.55 .1 .1 a; r -.4 .62 .3 .75 .05 d",
        "e 0 .25 .75 .45 m; p .55 .1 .98 -.15 .95 .1 .65 .4 m; l -.5 -.1 -.45 -.8 .45 -.8 .5 -.1 .1 k; e 0 -.12 .4 .12 d; e 0"
        " -.25 .1 .08 k",
    ),
    "cup|mug": ("r -.6 -.55 .45 .75 .15 m; e -.08 -.55 .52 .14 d; l .45 -.25 .85 -.25 .85 .35 .45 .35 .13 m",),
    "bowl": ("p -.9 -.2 .9 -.2 .5 .65 -.5 .65 m; e 0 -.2 .9 .2 d; r -.4 .6 .4 .75 .04 l",),
    "bottle": ("r -.35 -.2 .35 .95 .12 m; p -.35 -.1 -.12 -.5 .12 -.5 .35 -.1 m; r -.12 -.95 .12 -.45 .04 d; r -.3 .2 .3 .6 .02 w",),
    "vase": (
        "e 0 .35 .5 .6 m; r -.2 -.7 .2 0 .05 m; e 0 -.7 .3 .1 d; l -.48 .3 .48 .3 .1 a",
        "p -.4 -.6 .4 -.6 .55 0 .3 .9 -.3 .9 -.55 0 m; e 0 -.6 .4 .1 d; l 0 -.6 -.2 -1 .05 a; l 0 -.6 .2 -.95 .05 a",
    ),
    "clock|alarm clock|watch": (
        "e 0 0 .85 .85 m; e 0 0 .55 .55 w; l 0 0 0 -.5 .08 k; l 0 0 .35 .15 .08 k; e 0 0 .08 .08 k",
        "r -.85 -.7 .85 .7 .2 m; r -.55 -.4 .55 .4 .1 w; l 0 0 -.1 -.4 .08 k; l 0 0 .35 -.1 .07 k; e 0 0 .07 .07 a",
        "r -.4 .6 -.2 .95 .05 k; r .2 .6 .4 .95 .05 k; e -.5 -.65 .28 .28 d; e .5 -.65 .28 .28 d; e 0 .1 .78 .78 m; e 0 .1 .48"
        " .48 w; l 0 .1 0 -.3 .08 k; l 0 .1 .28 .1 .08 k",
    ),
    "lamp": ("p -.4 -.9 .4 -.9 .7 -.1 -.7 -.1 m; r -.08 -.1 .08 .75 .02 d; e 0 .8 .45 .14 d",),
    "chair": ("r -.5 -.95 .5 .1 .1 m; r -.6 .05 .6 .3 .06 d; r -.55 .25 -.4 1 .03 d; r .4 .25 .55 1 .03 d; r -.35 -.75 .35 -.1 .06 l",),
    "table": ("p -.9 -.3 .9 -.3 .98 -.05 -.98 -.05 m; r -.85 -.08 -.68 .85 .03 d; r .68 -.08 .85 .85 .03 d; r -.98 -.08 .98 .08 .02 d",),
    "sofa|couch": ("r -.75 -.55 .75 .2 .15 m; r -.95 -.15 -.65 .6 .12 d; r .65 -.15 .95 .6 .12 d; r -.65 .1 .65 .5 .08 l",),
    "house": ("r -.65 -.15 .65 .85 .01 m; p -.85 -.12 0 -.9 .85 -.12 a; r -.15 .3 .15 .85 .02 d; r -.5 .1 -.25 .4 .01 w; r .25 .1 .5 .4 .01 w",),
    "tree": ("r -.14 .2 .14 1 .03 h; e 0 -.3 .6 .62 m; e -.35 0 .36 .35 d; e .35 -.05 .36 .35 m",),
    "flower": (
        "l 0 .2 .05 1 .09 d; e 0 -.55 .25 .3 m; e -.38 -.2 .3 .25 m; e .38 -.2 .3 .25 m; e -.22 .15 .25 .28 m; e .22 .15 .25"
        " .28 m; e 0 -.18 .2 .2 a",
    ),
    "apple|fruit": ("e -.2 .1 .52 .6 m; e .2 .1 .52 .6 m; l 0 -.4 .08 -.8 .08 h; p .05 -.6 .5 -.85 .3 -.5 d",),
    "cake": ("r -.75 -.05 .75 .7 .08 m; r -.75 -.2 .75 .15 .12 w; e 0 -.35 .13 .13 a; e -.4 -.28 .1 .1 a; e .4 -.28 .1 .1 a; r -.9 .68 .9 .8 .03 d",),
    "book": ("p -.75 -.65 .6 -.75 .75 .65 -.6 .75 m; p .6 -.75 .72 -.65 .85 .7 .75 .65 w; l -.4 -.3 .35 -.36 .1 l; l -.35 0 .4 -.05 .1 l",),
    "phone|camera": ("r -.85 -.5 .85 .6 .12 m; e .1 .05 .4 .4 k; e .1 .05 .25 .25 d; r -.7 -.65 -.3 -.45 .04 d; e -.6 -.2 .1 .1 w",),
    "guitar": ("e -.4 .45 .5 .42 m; e -.05 .1 .36 .33 m; e -.25 .3 .14 .14 k; l 0 .1 .7 -.7 .13 d; l .62 -.62 .9 -.92 .22 k",),
    "hat|cap": ("e 0 .3 .95 .24 m; r -.5 -.6 .5 .35 .25 m; r -.5 .05 .5 .25 .02 a",),
    "shirt|dress": ("p -.35 -.75 .35 -.75 .95 -.25 .7 .1 .48 -.1 .5 .85 -.5 .85 -.48 -.1 -.7 .1 -.95 -.25 m; e 0 -.75 .2 .14 d",),
    "umbrella": ("e 0 0 .9 .7 m; p -.35 -.05 0 -.7 .35 -.05 l; r -1 .02 1 .75 .01 -; l 0 0 0 .9 .07 d",),
    "balloon": ("e 0 -.25 .6 .68 m; p -.1 .4 .1 .4 0 .55 d; l 0 .5 .08 1 .04 k; e -.22 -.5 .13 .18 l",),
    "ball": ("e 0 0 .85 .85 m", "e 0 0 .85 .85 m; e 0 0 .3 .85 l; l -.85 0 .85 0 .08 d"),
    "box|cube": ("r -.75 -.75 .75 .75 .02 m", "p -.8 -.3 .3 -.3 .3 .8 -.8 .8 m; p -.8 -.3 -.35 -.75 .75 -.75 .3 -.3 l; p .3 -.3 .75 -.75 .75 .35 .3 .8 d"),
    "circle|disc": ("e 0 0 .85 .85 m",),
    "square": ("r -.75 -.75 .75 .75 0 m",),
    "triangle|pyramid": ("p 0 -.85 .9 .75 -.9 .75 m",),
    "star": ("p 0 -.95 .25 -.3 .95 -.3 .4 .12 .6 .85 0 .4 -.6 .85 -.4 .12 -.95 -.3 -.25 -.3 m",),
    "heart": ("e -.42 -.3 .45 .45 m; e .42 -.3 .45 .45 m; p -.84 -.12 .84 -.12 0 .9 m",),
    "cross": ("r -.25 -.85 .25 .85 0 m; r -.85 -.25 .85 .25 0 m",),
    "bear": (
        "e 0 .3 .7 .6 m; e -.4 -.7 .18 .18 d; e .4 -.7 .18 .18 d; e 0 -.3 .5 .46 m; e 0 -.15 .25 .2 l; e 0 -.25 .1 .08 k;"
        f" {EYES}; r -.6 .6 -.3 1 .1 d; r .3 .6 .6 1 .1 d",
    ),
}  # fmt: skip
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

# Grounds, as they are told, and the colours that the main thing must not have there.
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
    """What a picture shows. Empty words: nothing is said, and chance decides."""

    noun: str  # a key of THINGS, up to its first |
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


NOUNS = {names.split("|")[0]: names.split("|") for names in THINGS}
WAYS = {names.split("|")[0]: ways for names, ways in THINGS.items()}


def held_back(noun: str, colour: str, place: str) -> bool:
    """Whether a combination is kept out of training, to measure by: one in twenty."""
    return zlib.crc32(f"{noun}/{colour}/{place}".encode()) % 20 == 0


def decide(rng: np.random.Generator, for_measure: bool = False) -> Scene:
    """A scene: of a combination that is held back for measuring, or of one that is not."""
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


def tell(rng: np.random.Generator, scene: Scene, everything: bool = False, names: bool = True) -> str:
    """A caption of the scene. It leaves things out, as people do, unless it must tell `everything`.

    names: whether a thing may have a made-up name in front, as the token of a tune.
    """

    def said(chance: float) -> bool:
        return everything or rng.random() < chance

    noun = scene.noun if everything else choose(rng, tuple(NOUNS[scene.noun]))
    if names and not everything and rng.random() < 0.15:
        letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(3, 6)))
        noun = f"{letters} {noun}"
    colour = scene.colour if said(0.85) else ""
    if scene.noun in PEOPLE:
        worn = choose(rng, ("in {}", "in a {} shirt", "wearing {}")).format(colour) if colour else ""
        thing = f"{scene.size if said(0.5) else ''} {noun} {worn}"
    else:
        thing = f"{scene.size if said(0.7) else ''} {colour} {scene.material if said(0.8) else ''} {noun}"
    frame = "a close-up of" if scene.close and said(0.7) else scene.style or choose(rng, FRAMES)
    where = scene.place if said(0.1 if scene.close else 0.75) else ""
    ground = scene.ground.format(scene.ground_colour) if said(0.7) else ""
    other = ""
    if scene.other and said(0.6):
        other_noun, other_colour, other_place = scene.other
        other = f"and {article(f'{other_colour} {other_noun}')} {other_place}"
    light = scene.light if said(0.6) else ""
    middle = article(thing) if said(0.8) else thing
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
    """A shade of a colour that still has its name."""
    colour = np.array(COLOURS[name]) * rng.uniform(0.88, 1.1) + rng.normal(scale=0.025, size=3)
    return np.clip(colour, 0.02, 0.98).astype(np.float32)


PAINTS = "mdlashkw"


def draw_thing(
    rng: np.random.Generator,
    textures: Textures,
    picture: Floats,
    noun: str,
    colour: Floats,
    material: str,
    box: tuple[float, float, float],
) -> None:
    """Draw a thing over `picture` (H, W, 3), in place. box: middle x, y and half of its longer side, in pixels."""
    big = len(picture)
    x, y, half = box
    # Nearly upright, nearly in proportion, either way round.
    angle, mirror, stretch = rng.normal(scale=0.12), rng.choice([-1, 1]), rng.uniform(0.88, 1.12, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(
        [mirror * stretch[0], stretch[1]]
    )
    parts = Image.new("L", (big, big))
    draw = ImageDraw.Draw(parts)
    for part in choose(rng, WAYS[noun]).split(";"):
        kind, *numbers, role = part.split()
        draw_part(draw, kind, [float(n) for n in numbers], PAINTS.find(role) + 1, turn, x, y, half)
    roles = np.asarray(parts)
    table = np.zeros((len(PAINTS) + 1, 3), np.float32)
    accent = np.array(COLOURS[choose(rng, tuple(COLOURS))], np.float32)
    skin, hair = SKIN[rng.integers(len(SKIN))], HAIR[rng.integers(len(HAIR))]
    table[1:] = [colour, colour * 0.7, colour + (1 - colour) * 0.25, accent, skin, hair, (0.07,) * 3, (0.93,) * 3]

    cover = parts.point(lambda role: 255 if role else 0)
    soft = np.asarray(cover.filter(ImageFilter.GaussianBlur(0.22 * half)), np.float32) / 255
    shadow = ImageChops.offset(cover, int(rng.normal() * 0.1 * half), int(0.15 * half))
    shade = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.15 * half)), np.float32)[..., None] / 255
    picture *= 1 - rng.uniform(0, 0.45) * shade
    # Round things are lighter towards the light, and darker at the rim.
    gy, gx = np.gradient(soft)
    towards = rng.normal(size=2) + (0, -1.0)
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
    """One part of a thing into the map of paints. See THINGS."""

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
    """What lies behind the things, (big, big, 3)."""
    told, horizon = scene.ground, int(big * rng.uniform(0.3, 0.7))

    def area(colour: tuple[float, float, float] | Floats, roughness: float) -> Floats:
        return textures.surface(rng, big, big, np.asarray(colour, np.float32), roughness)

    def above(upper: Floats, lower: Floats) -> Floats:
        lower[:horizon] = upper[:horizon]
        return lower

    if scene.ground_colour:
        base = paint(rng, scene.ground_colour)
        if "carpet" in told:
            return area(base, 0.12) * (1 + 0.15 * pattern(rng, big, big))[..., None]
        return area(base, rng.uniform(0, 0.08))
    wood = textures.surface(rng, big, big, np.array((0.60, 0.40, 0.23), np.float32) * rng.uniform(0.6, 1.2), 0.08)
    sky = area((0.55, 0.74, 0.95), 0.02) + 0.08 * textures.cut(rng, big, big)[..., None].clip(0)
    grass = area(np.array((0.26, 0.46, 0.16)) * rng.uniform(0.7, 1.3), 0.22)
    wall = area(np.array((0.82, 0.80, 0.76)) * rng.uniform(0.6, 1.15), 0.03)
    if "wooden" in told:
        planks = 1 + 0.08 * np.sign(np.sin(np.mgrid[0:big, 0:big][int(rng.integers(2))] / rng.uniform(3, 9)))
        wood *= planks.astype(np.float32)[..., None]
        return wood if "floor" in told or rng.random() < 0.4 else above(wall, wood)
    if told == "on grass":
        return grass
    if "meadow" in told:
        return above(sky, grass)
    if "beach" in told:
        sea = area((0.20, 0.48, 0.66), 0.06)
        sea[: horizon // 2] = sky[: horizon // 2]
        return above(sea, area((0.86, 0.76, 0.56), 0.05))
    if "snow" in told:
        return above(area((0.72, 0.80, 0.88), 0.02), area((0.93, 0.94, 0.97), 0.03))
    if "street" in told:
        return above(
            area((0.62, 0.60, 0.58), 0.1) * (1 + 0.3 * pattern(rng, big, big))[..., None], area((0.36,) * 3, 0.06)
        )
    if "forest" in told:
        trunks = 1 - 0.5 * (np.sin(np.mgrid[0:big, 0:big][1] / rng.uniform(3, 9) + textures.cut(rng, big, big)) > 0.6)
        return above(
            area((0.22, 0.36, 0.16), 0.3) * trunks.astype(np.float32)[..., None], area((0.27, 0.25, 0.13), 0.2)
        )
    if "brick" in told:
        yy, xx = np.mgrid[0:big, 0:big]
        h = int(rng.uniform(8, 14))
        joints = (yy % h < 1.5) | ((xx + (yy // h % 2) * h) % (2 * h) < 1.5)
        bricks = area((0.60, 0.26, 0.18), 0.12)
        bricks[joints] = (0.75, 0.72, 0.68)
        return bricks
    if "tiled" in told:
        return area((0.72, 0.73, 0.74), 0.03) * (1 + 0.22 * checks(rng, big))[..., None]
    if "room" in told:
        room = above(wall, wood)
        left = int(rng.uniform(0, 0.7) * big)
        room[: horizon // 2, left : left + big // 4] = (0.75, 0.86, 0.95)  # a window
        return room
    if told == "at night":
        lights = (textures.cut(rng, big, big) > 2.4)[..., None] * np.array((0.9, 0.8, 0.4), np.float32)
        return area((0.05, 0.06, 0.13), 0.2) + lights
    if "water" in told:
        return area((0.16, 0.36, 0.46), 0.14)
    if "leaves" in told:
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


def lit(rng: np.random.Generator, told: str, big: int) -> Floats:
    """Brightness and tint of the light, (big, big, 3) around 1."""
    ramp = np.linspace(-1, 1, big, dtype=np.float32)
    light = np.ones((big, big, 3), np.float32) * rng.uniform(0.88, 1.08)
    if told == "in the dark":
        return light * 0.7
    if told == "in warm light":
        return light * np.array((1.06, 0.97, 0.82), np.float32)
    if told == "in cold light":
        return light * np.array((0.86, 0.96, 1.06), np.float32)
    if told == "in bright sunlight":
        return light * 1.15
    if "from the" in told:
        return light * (1 + (-0.35 if "left" in told else 0.35) * ramp)[None, :, None]
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
