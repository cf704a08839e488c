"""The HTML of the page's live parts, made from templates by pure functions. Jinja2 escapes all values by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.contract.photos import Check, Photo
from trainer.contract.prompts import Prompt
from trainer.contract.states import ENDED, Callback
from trainer.contract.tunes import Tune
from trainer.names import DEMO_BRANCH
from trainer.studio.pack_file import ANY
from trainer.web.templating import ENVIRONMENT, render

CSS = (Path(__file__).parent / "style.css").read_text("utf-8")
CURVE_WIDTH, CURVE_HEIGHT = 600, 120  # in SVG units
SMOOTHING = 0.8
# What trainer/studio/answers.py returns: `readings`, `saved_snapshots`, `trained_pictures`.
Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TuneDetails:
    """What the page shows in addition to a tune: its callbacks, its lineage, its model formats and their readers."""

    callbacks: Sequence[Callback] = ()
    chain: Sequence[str] = ()
    formats: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bar:
    """The progress bar. percent: 0 to 100. facts: (name, value, unit) of each number below it."""

    moving: bool
    step: int
    steps: int
    percent: float
    stage: str
    facts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Curve:
    """Loss over steps. lines: (class, SVG points) of the raw values and of their exponential mean."""

    low: float
    high: float
    lines: Sequence[tuple[str, str]]
    width: int = CURVE_WIDTH
    height: int = CURVE_HEIGHT


def cards(packs: Sequence[Mapping[str, object]]) -> str:
    """Cards of the packs. packs: `describe` of each, or `slug` and `error` of an unreadable one."""
    return render("packs.html", packs=packs)


def current(
    tune: Tune | None,
    readings: Lines,
    snapshots: Lines,
    waiting: int,
    waits: str = "",
    alerts: Sequence[str] = (),
) -> str:
    """The running tune, or the last one, with the readings and the previews of its run.

    alerts: why the queue waits, why the models folder cannot be read.
    """
    bar = tune and progress_bar(tune, readings)
    curve = tune and loss_curve(readings, tune.progress.steps)
    values = {"snapshots": snapshots, "waiting": waiting, "waits": waits, "bar": bar, "curve": curve}
    return render("current.html", tune=tune, alerts=alerts, **values)


def trained_pictures(seen: Lines) -> str:
    """The pictures of the current tune as they are trained, each with its caption."""
    return render("trained_pictures.html", seen=seen) if seen else ""


def earlier(tunes: Sequence[Tune], details: Mapping[int, TuneDetails], waits: str = "") -> str:
    """All tunes, newest first. details: by the ids of tunes. waits: what queued prompts wait for."""
    return render("earlier.html", tunes=[(tune, details.get(tune.id, TuneDetails())) for tune in tunes], waits=waits)


def verdicts(check: Check) -> str:
    """The verdict on each photo of a check, with the pictures as they would be trained."""
    return render("verdicts.html", check=check)


def note(messages: Sequence[str]) -> str:
    """The errors of a field of the form."""
    return render("note.html", messages=messages).strip()


def thumbnails(paths: Sequence[str] | None, notes: Sequence[str] = (), prefix: str = "") -> str:
    """Thumbnails of the chosen photos, in the order of the list.

    notes: about zips, and what is left out. prefix: of the public address.
    """
    pictures = [(path, Path(path).name) for path in paths or [] if not path.lower().endswith(".txt")]
    return render("thumbnails.html", pictures=pictures, notes=notes, prefix=prefix).strip()


def progress_bar(tune: Tune, readings: Lines = ()) -> Bar:
    """The progress bar with stage, step, ETA, pace, loss, learning rate and memory of a run."""
    p = tune.progress
    rendering = [prompt for prompt in tune.prompts if prompt.status in ("queued", "rendering")]
    facts = []
    if p.steps:
        facts.append(("step", str(p.step), f" of {p.steps}"))
    if tune.status == "training" and p.seconds_per_step:
        facts.append(("", "", f"{duration(p.seconds_per_step * (p.steps - p.step))} left"))
    if p.seconds_per_step:
        pace = p.seconds_per_step
        facts.append(("", "", f"{pace:.2f} s a step" if pace >= 0.5 else f"{1 / pace:.1f} steps a second"))
    if p.loss is not None:
        facts.append(("loss", f"{p.loss:.4f}", ""))
    last = readings[-1] if readings else {}
    if last.get("lr") is not None:
        facts.append(("", "", f"lr {last['lr']:.2g}"))
    if last.get("peak_gib"):
        facts.append(("", "", f"peak memory {last['peak_gib']:.1f} GiB"))
    ended = {"trained": "rendering prompts" if rendering else "done", "failed": "failed", "canceled": "stopped"}
    moving = tune.status not in ENDED or bool(rendering)
    percent = 100 * p.step / p.steps if p.steps else 0.0
    return Bar(moving, p.step, p.steps, percent, ended.get(tune.status, p.stage), facts)


def loss_curve(readings: Lines, steps: int) -> Curve | None:
    """Loss over steps: the raw values and their exponential mean; None for fewer than two readings."""
    if len(readings) < 2:
        return None
    losses = [reading["loss"] for reading in readings]
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    mean, means = losses[0], []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean)

    def points(values: Sequence[float]) -> str:
        return " ".join(
            f"{CURVE_WIDTH * reading['step'] / max(steps, 1):.1f},{4 + (CURVE_HEIGHT - 8) * (high - value) / span:.1f}"
            for reading, value in zip(readings, values, strict=True)
        )

    return Curve(low, high, [("raw", points(losses)), ("smooth", points(means))])


# Functions that the templates call (filters in Jinja2)


def where(prompt: Prompt, waits: str) -> str:
    """The progress of a prompt, or what it waits for."""
    if prompt.status == "rendering" and prompt.progress.steps:
        return f"{prompt.progress.stage}: step {prompt.progress.step} of {prompt.progress.steps}"
    return waits if prompt.status == "queued" else ""


def first_picture(tune: Tune) -> str | None:
    """The first rendered picture, else the first photo."""
    urls = [url for prompt in tune.prompts for url in prompt.thumbnails] or tune.orig_images
    return urls[0] if urls else None


def prompt_counts(pack: Mapping[str, Mapping[str, Sequence[object]]]) -> list[int]:
    """The smallest and the largest number of prompts for a class of the pack; one number if they are equal."""
    counts = {len(prompts) for prompts in pack["prompts"].values()}
    return sorted({min(counts), max(counts)})


def setting_rows(tune: Tune, more: TuneDetails) -> list[tuple[str, object]]:
    """The settings of a tune: (label, value)."""
    return [
        ("class name", tune.name),
        ("token", tune.token),
        ("branch", tune.branch),
        ("model type", tune.model_type),
        ("preset", tune.preset),
        ("base tune", tune.base_tune_id),
        ("derived from", ", from ".join(more.chain)),
        ("characteristics", ", ".join(f"{key}: {value}" for key, value in tune.characteristics.items())),
        ("args", tune.args),
        ("trained", when(tune.trained_at) if tune.trained_at else None),
    ]


def relative(url: str) -> str:
    """A link of ours without its host, so that it works under each name of the host."""
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def path(tune: Tune) -> str:
    """The path of a tune's calls, with the prefix of the public address."""
    return urlsplit(tune.url).path.removesuffix(".json")


def likes_path(prompt: Prompt) -> str:
    """The path of the call for likes, with the prefix of the public address."""
    return f"{urlsplit(prompt.url).path.rpartition('/tunes/')[0]}/prompts/{prompt.id}/likes"


def small(tune: Tune) -> str:
    """The CSS class of small pictures, which are enlarged without blur."""
    return " tb-small" if tune.branch == DEMO_BRANCH else ""


def badges(photo: Photo) -> list[tuple[str, str]]:
    """The badges of a verdict: (good, plain, doubt or bad; text)."""
    found = [("bad", "dropped")] if photo.dropped else []
    found.append(("doubt" if photo.too_small else "plain", f"{photo.width} x {photo.height}"))
    if photo.blurred:
        found.append(("doubt", f"blurred, {photo.sharpness:.0f}"))
    if photo.duplicate_of and not photo.dropped:
        found.append(("doubt", "near-duplicate"))  # the notes name the other photo
    if photo.rotated:
        found.append(("plain", "turned upright"))
    if photo.converted:
        found.append(("plain", f"from {photo.converted}"))
    if photo.faces is not None:
        count = len(photo.faces)
        found.append(("good" if count else "doubt", f"{count or 'no'} face{'' if count == 1 else 's'}"))
    if photo.same_person is False:
        found.append(("doubt", "another person"))
    done = {"closeup": photo.cropped, "restored": photo.restored}
    found += [("good", text) for text, is_done in done.items() if is_done]
    return found + [("good", f"{kind} mask") for kind in photo.masks]


def outcome(one: Callback) -> str:
    if one.arrived_at:
        return f"arrived {when(one.arrived_at)}"
    tried = f"tried {one.attempts} times, {one.answer}" if one.answer else "not sent yet"
    return f"{tried}; next {when(one.due_at)}" if one.due_at else f"{tried}; given up"


def when(stamp: str) -> str:
    return datetime.fromisoformat(stamp).strftime("%d %b %Y, %H:%M UTC")


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


ENVIRONMENT.globals |= {"ENDED": ENDED, "ANY": ANY}
ENVIRONMENT.filters |= {
    "relative": relative, "path": path, "likes_path": likes_path, "small": small, "badges": badges,
    "outcome": outcome, "when": when, "where": where, "first_picture": first_picture, "prompt_counts": prompt_counts,
    "setting_rows": setting_rows,
}  # fmt: skip
