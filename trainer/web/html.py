"""The HTML of the page's live parts: pure functions of tunes. Everything a user wrote is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from typing import Any
from urllib.parse import urlsplit

from trainer.contract.photos import Check, Photo
from trainer.contract.prompts import Prompt
from trainer.contract.states import ENDED, Callback
from trainer.contract.tunes import Tune
from trainer.studio.pack_file import ANY


def cards(packs: Sequence[Mapping[str, Any]]) -> str:
    """The packs as HTML: `describe` of each, or `slug` and `error` of one that cannot be read."""
    if not packs:
        return (
            '<div class="tb-empty"><b>No packs yet</b><span>A pack keeps the settings and prompts of a tune that went'
            " well. Save one from a tune below.</span></div>"
        )
    return f'<div class="tb-packs">{"".join(map(card, packs))}</div>'


def card(pack: Mapping[str, Any]) -> str:
    """One pack: what it is for, and how many prompts it has."""
    if "error" in pack:
        return (
            f'<article class="tb-card" data-pack="{escape(pack["slug"])}"><header><h3>{escape(pack["slug"])}</h3>'
            f'</header><p class="tb-problem">{escape(pack["error"])}</p></article>'
        )
    kinds = "".join(f'<b class="tb-badge">{escape("anything" if one == ANY else one)}</b>' for one in pack["classes"])
    numbers = sorted({len(prompts) for prompts in pack["prompts"].values()})
    told = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return (
        f'<article class="tb-card" data-pack="{escape(pack["slug"])}"><header><h3>{escape(pack["title"])}</h3>'
        f'<span class="tb-pill">{escape(pack["branch"])}</span></header><p>{escape(pack["description"])}</p>'
        f'<p class="tb-dim">{kinds}{told} prompt{"" if numbers == [1] else "s"}</p></article>'
    )


CURVE_WIDTH, CURVE_HEIGHT = 600, 120  # of the drawing; it scales with the page
SMOOTHING = 0.8
Lines = Sequence[dict[str, Any]]  # as `Jobs.readings`, `Jobs.moments` and `Jobs.seen` give them


def relative(url: str) -> str:
    """A link of ours without its host, so that it works under whatever name the page was opened."""
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def current(tune: Tune | None, readings: Lines, moments: Lines, waiting: int, waits: str = "") -> str:
    """The tune that runs, or the one that ran last, with the readings and the previews of its run."""
    if tune is None:
        return (
            '<div class="tb-empty"><b>Nothing here yet</b>'
            "<span>Drop a few photos, name what they show, press the button. The tune appears here and keeps going"
            " when you close the page.</span></div>"
        )
    queue = f'<span class="tb-dim">{waiting} more in the queue</span>' if waiting else ""
    return (
        f'<article class="tb-card" data-tune="{tune.id}" data-status="{tune.status}">'
        f"<header><h3>{escape(tune.title)}</h3>{pill(tune.status)}{queue}{actions(tune)}</header>"
        f"{progress(tune, readings)}{loss_curve(readings, tune.progress.steps)}{previews(tune, moments)}{problem(tune)}"
        f"{prompts(tune, waits)}</article>"
    )


def trained_pictures(seen: Lines) -> str:
    """The pictures of the tune above as they are trained, each with its caption."""
    if not seen:
        return ""
    figures = "".join(
        f"<figure>{picture(one['url'], one['caption'])}<figcaption><span>{escape(one['caption'])}</span>"
        f'<span class="tb-dim">{escape(one["name"])}, {one["width"]} x {one["height"]}{masked(one)}</span></figcaption>'
        "</figure>"
        for one in seen
    )
    return (
        f'<details class="tb-card" id="seen"><summary><span><b>As it is trained</b><span class="tb-dim">{len(seen)}'
        f' pictures with their captions</span></span></summary><div class="tb-seen">{figures}</div></details>'
    )


def masked(one: dict[str, Any]) -> str:
    return f", only the {one['mask']} counts" if one["mask"] else ""


def previews(tune: Tune, moments: Lines) -> str:
    """What the first prompt looked like at each quarter of the run, and the models that were kept."""
    if not moments:
        return ""
    figures = "".join(
        f"<figure>{picture(one['url'], 'preview')}<figcaption>step {one['step']}{model_link(one['model'])}</figcaption>"
        "</figure>"
        for one in moments
    )
    return f'<div class="tb-moments{small(tune)}">{figures}</div>'


def model_link(url: str | None) -> str:
    return f' <a href="{escape(relative(url))}" download>model</a>' if url else ""


@dataclass(frozen=True)
class Beside:
    """What the page shows of a tune beside the tune itself: see the verbs of these names in `jobs.py`."""

    callbacks: Sequence[Callback] = ()
    chain: Sequence[str] = ()
    formats: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)


def earlier(tunes: Sequence[Tune], beside: Mapping[int, Beside], waits: str = "") -> str:
    """All tunes, newest first, each to be unfolded. beside: what is known besides of each, by its id. waits: what
    prompts in the queue wait for."""
    known = {tune.id: beside.get(tune.id, Beside()) for tune in tunes}
    return "".join(
        f'<details class="tb-card" data-tune="{tune.id}" data-status="{tune.status}"><summary>'
        f"{thumbnail(tune)}<span><b>{escape(tune.title)}</b>"
        f'<span class="tb-dim">{escape(tune.name)} · {tune.branch} · {when(tune.created_at)}</span></span>'
        f"{pill(tune.status)}</summary>"
        f"{problem(tune)}{actions(tune)}{prompts(tune, waits)}"
        f"{formats(tune, known[tune.id].formats)}"
        f"<h4>Photos</h4>{verdict_cards(tune.photos)}{callbacks(tune, known[tune.id].callbacks)}"
        f"{settings(tune, known[tune.id].chain)}</details>"
        for tune in tunes
    )


def pill(status: str) -> str:
    return f'<span class="tb-pill tb-{status}">{status}</span>'


def progress(tune: Tune, readings: Lines = ()) -> str:
    """The bar with stage, step, ETA, pace, loss, learning rate and memory."""
    p = tune.progress
    if tune.status == "queued":
        return '<p class="tb-dim">Waiting for its turn.</p>'
    rendering = [prompt for prompt in tune.prompts if prompt.status in ("queued", "rendering")]
    share = p.step / p.steps if p.steps else 0.0
    facts = []
    if p.steps:
        facts.append(f"step <b>{p.step}</b> of {p.steps}")
    if tune.status == "training" and p.seconds_per_step:
        facts.append(f"{duration(p.seconds_per_step * (p.steps - p.step))} left")
    if p.seconds_per_step:
        pace = p.seconds_per_step
        facts.append(f"{pace:.2f} s a step" if pace >= 0.5 else f"{1 / pace:.1f} steps a second")
    if p.loss is not None:
        facts.append(f"loss <b>{p.loss:.4f}</b>")
    last = readings[-1] if readings else {}
    if last.get("lr") is not None:
        facts.append(f"lr {last['lr']:.2g}")
    if last.get("peak_gib"):
        facts.append(f"peak memory {last['peak_gib']:.1f} GiB")
    ended = {"trained": "rendering prompts" if rendering else "done", "failed": "failed", "canceled": "stopped"}
    stage = ended.get(tune.status, p.stage)
    moving = " tb-moving" if tune.status not in ENDED or rendering else ""
    return (
        f'<div class="tb-bar{moving}" role="progressbar" aria-valuemin="0" aria-valuemax="{p.steps}"'
        f' aria-valuenow="{p.step}"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="tb-facts"><span class="tb-stage">{stage}</span>'
        f"{''.join(f'<span>{fact}</span>' for fact in facts)}</p>"
    )


def loss_curve(readings: Lines, steps: int) -> str:
    """Loss over steps as SVG: the raw values faint, an exponential mean over them."""
    if len(readings) < 2:
        return ""
    losses = [reading["loss"] for reading in readings]
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    mean, means = losses[0], []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean)

    def line(values: Sequence[float], name: str) -> str:
        points = " ".join(
            f"{CURVE_WIDTH * reading['step'] / max(steps, 1):.1f},{4 + (CURVE_HEIGHT - 8) * (high - value) / span:.1f}"
            for reading, value in zip(readings, values, strict=True)
        )
        return f'<polyline class="{name}" points="{points}"/>'

    return (
        f'<figure class="tb-curve"><svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" preserveAspectRatio="none">'
        f"{line(losses, 'raw')}{line(means, 'smooth')}</svg>"
        f"<figcaption><span>loss {high:.3f}</span><span>{low:.3f}</span></figcaption></figure>"
    )


def prompts(tune: Tune, waits: str = "") -> str:
    """Its prompts with their pictures. waits: what those in the queue wait for."""
    return "".join(prompt_block(prompt, small(tune), waits) for prompt in tune.prompts)


def small(tune: Tune) -> str:
    """The class of pictures that are shown enlarged, without blur."""
    return " tb-small" if tune.branch == "fast" else ""


def prompt_block(prompt: Prompt, kind: str, waits: str = "") -> str:
    """A prompt with its pictures, or with what it is waiting for."""
    shown = zip(prompt.images, prompt.thumbnails, strict=True)
    pictures = "".join(picture(url, prompt.text, thumb) for url, thumb in shown)
    if not pictures and prompt.status in ("queued", "rendering"):
        first = picture(prompt.preview, "so far") if prompt.preview else '<span class="tb-blank"></span>'
        pictures = first + '<span class="tb-blank"></span>' * (prompt.num_images - 1)
    error = f'<p class="tb-problem">{escape(prompt.error)}</p>' if prompt.error and prompt.status == "failed" else ""
    warnings = "".join(f'<p class="tb-warning">{escape(warning)}</p>' for warning in prompt.warnings)
    status = "" if prompt.status == "rendered" else pill(prompt.status)
    where = ""
    if prompt.status == "rendering" and prompt.progress.steps:
        where = f"{prompt.progress.stage}: step {prompt.progress.step} of {prompt.progress.steps}"
    elif prompt.status == "queued" and waits:
        where = waits
    told = f'<span class="tb-dim">{escape(where)}</span>' if where else ""
    sheet = (
        f'<p class="tb-dim"><a href="{escape(relative(prompt.contact_sheet))}" target="_blank">contact sheet</a></p>'
        if prompt.contact_sheet
        else ""
    )
    return (
        f'<section class="tb-prompt" data-prompt="{prompt.id}" data-status="{prompt.status}">'
        f'<p>{escape(prompt.text)} {status} {told}</p><div class="tb-pictures{kind}">{pictures}</div>{sheet}'
        f"{warnings}{error}</section>"
    )


def picture(url: str, text: str, thumb: str | None = None) -> str:
    """A picture, or its thumbnail, that opens in full; one without an address of its own (a data URL) only shows."""
    if url.startswith("data:"):
        return f'<img src="{escape(url)}" alt="{escape(text)}">'
    link, shown = escape(relative(url)), escape(relative(thumb or url))
    return f'<a href="{link}" target="_blank"><img src="{shown}" alt="{escape(text)}" loading="lazy"></a>'


def verdicts(check: Check) -> str:
    """What a check saw in each photo, with the pictures as the trainer would see them."""
    warnings = "".join(f'<p class="tb-warning">{escape(warning)}</p>' for warning in check.warnings)
    return f'<div class="tb-card" id="verdicts">{warnings}{verdict_cards(check.photos)}</div>'


def verdict_cards(photos: Sequence[Photo]) -> str:
    return f'<div class="tb-seen">{"".join(verdict(photo) for photo in photos)}</div>'


def verdict(photo: Photo) -> str:
    """One photo: what it looks like, badges for what was seen and done, and the rest in words."""
    shown = [picture(url, photo.name) for url in (photo.seen or photo.url, photo.closeup) if url]
    told = "".join(f'<span class="tb-dim">{escape(note)}</span>' for note in [photo.dropped, *photo.notes] if note)
    marks = "".join(f'<b class="tb-badge tb-{kind}">{escape(text)}</b>' for kind, text in badges(photo))
    return (
        f'<figure data-photo="{escape(photo.name)}"><div class="tb-pair">{"".join(shown)}</div><figcaption>'
        f"<span>{escape(photo.name)}</span><span>{marks}</span>{told}</figcaption></figure>"
    )


def badges(photo: Photo) -> list[tuple[str, str]]:
    """(good, plain, doubt or bad; its text) of everything that a verdict says."""
    found = [("bad", "dropped")] if photo.dropped else []
    found.append(("doubt" if photo.too_small else "plain", f"{photo.width} x {photo.height}"))
    if photo.blurred:
        found.append(("doubt", f"blurred, {photo.sharpness:.0f}"))
    if photo.duplicate_of and not photo.dropped:
        found.append(("doubt", "near-duplicate"))  # of which one, the notes say
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


def thumbnail(tune: Tune) -> str:
    """The first rendered picture, else the first photo."""
    urls = [url for prompt in tune.prompts for url in prompt.thumbnails] or tune.orig_images
    return f'<img src="{escape(relative(urls[0]))}" alt="" loading="lazy">' if urls else ""


def problem(tune: Tune) -> str:
    error = f'<p class="tb-problem">{escape(tune.error)}</p>' if tune.error else ""
    return error + "".join(f'<p class="tb-warning">{escape(warning)}</p>' for warning in tune.warnings)


def formats(tune: Tune, known: Mapping[str, tuple[str | None, str]]) -> str:
    """The model in each format: to be downloaded, or to be made."""
    if len(known) < 2:
        return ""
    parts = []
    for name, (link, state) in known.items():
        if link:
            parts.append(f'<a class="tb-button" href="{escape(relative(link))}" download>{name}</a>')
        elif state in ("queued", "exporting"):
            parts.append(f'<span class="tb-dim">{name} is being made</span>')
        else:
            parts.append(button(tune, f"Make {name}", f"/tunes/{tune.id}/model?format={name}", "GET"))
    return f'<h4>Model as</h4><div class="tb-actions tb-formats">{"".join(parts)}</div>'


def settings(tune: Tune, chain: Sequence[str] = ()) -> str:
    """What the tune was asked for and what was made of it. chain: the earlier tunes that it stands on."""
    rows = {
        "class name": tune.name,
        "token": tune.token,
        "branch": tune.branch,
        "model type": tune.model_type,
        "preset": tune.preset,
        "base tune": tune.base_tune_id,
        "stands on": ", on ".join(chain),
        "characteristics": ", ".join(f"{key}: {value}" for key, value in tune.characteristics.items()),
        "args": tune.args,
        "trained": when(tune.trained_at) if tune.trained_at else None,
    }
    told = "".join(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in rows.items() if value)
    return f"<h4>Settings</h4><dl>{told}</dl>"


def callbacks(tune: Tune, called: Sequence[Callback]) -> str:
    """What was posted to whom, and what came of it."""
    if not called:
        return ""
    rows = "".join(
        f"<dt>{one.kind}{f' {one.prompt_id}' if one.prompt_id else ''}</dt><dd>{escape(one.url)}: {outcome(one)}</dd>"
        for one in called
    )
    again = button(tune, "Send again", f"/tunes/{tune.id}/callbacks")
    return f'<h4>Callbacks</h4><dl class="tb-callbacks">{rows}</dl><div class="tb-actions">{again}</div>'


def outcome(one: Callback) -> str:
    if one.arrived_at:
        return f"arrived {when(one.arrived_at)}"
    tried = f"tried {one.attempts} times, {escape(one.answer)}" if one.answer else "not sent yet"
    return f"{tried}; next {when(one.due_at)}" if one.due_at else f"{tried}; given up"


def actions(tune: Tune) -> str:
    """What can be done with a tune in its state: each is the REST call of that name."""
    buttons = []
    if tune.ckpt_url:
        link = escape(relative(tune.ckpt_url))
        buttons.append(f'<a class="tb-button tb-primary" href="{link}" download>Download model</a>')
    if tune.status not in ENDED:
        buttons.append(button(tune, "Cancel", f"/tunes/{tune.id}/cancel"))
    if tune.status == "trained" and tune.prompts:
        buttons.append(button(tune, "Save as pack", f"/tunes/{tune.id}/pack"))
    if tune.status in ("failed", "canceled"):
        buttons.append(button(tune, "Resume", f"/tunes/{tune.id}/resume"))
    if tune.status in ENDED:
        buttons.append(
            button(tune, "Delete", f"/tunes/{tune.id}", "DELETE", "Delete this tune, its photos and pictures?")
        )
    return f'<div class="tb-actions">{"".join(buttons)}</div>'


def button(tune: Tune, label: str, path: str, method: str = "POST", question: str = "") -> str:
    ask = f"confirm('{question}')&&" if question else ""
    return (
        f'<button class="tb-button" onclick="event.preventDefault();{ask}'
        f"(this.disabled=true,fetch('{path}',{{method:'{method}'}}))\">{label}</button>"
    )


def when(moment: str) -> str:
    return datetime.fromisoformat(moment).strftime("%d %b %Y, %H:%M UTC")


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


CSS = """
.gradio-container{width:100%;max-width:1280px!important;margin:auto}
.tb-field{gap:0!important}.html-container{padding:0!important}
.tb-head{display:flex;align-items:baseline;gap:.8rem;padding:.6rem 0}
.tb-head h1{font-size:1.6rem;font-weight:700;margin:0;letter-spacing:-.02em}
.tb-head h1 i{display:inline-block;width:.62em;height:.62em;border-radius:50%;margin-right:.35em;
 background:conic-gradient(#e8590c,#fcc419,#e8590c)}
.tb-dim,.tb-head span{color:var(--body-text-color-subdued)}
.tb-card{border:1px solid var(--border-color-primary);border-radius:12px;padding:1rem 1.1rem;margin-bottom:.8rem;
 background:var(--background-fill-primary)}
.tb-card header{display:flex;align-items:center;gap:.6rem;flex-wrap:wrap}
.tb-card h3{margin:0;font-size:1.1rem;font-weight:650}.tb-card h4{margin:1rem 0 .4rem;font-weight:600}
.tb-card summary{display:flex;align-items:center;gap:.8rem;cursor:pointer;list-style:none}
.tb-card summary::-webkit-details-marker{display:none}
.tb-card summary>span:nth-of-type(1){flex:1;display:flex;flex-direction:column}
.tb-card summary img{width:44px;height:44px;object-fit:cover;border-radius:8px}
.tb-pill{font-size:.75rem;font-weight:600;padding:.1rem .6rem;border-radius:99px;background:#8882;white-space:nowrap}
.tb-training,.tb-rendering{background:#fd7e1433;color:#d9480f}.tb-trained,.tb-rendered{background:#40c05733;color:#2b8a3e}
.tb-failed{background:#fa525233;color:#c92a2a}.dark .tb-training,.dark .tb-rendering{color:#ffa94d}
.dark .tb-trained{color:#8ce99a}.dark .tb-failed{color:#ffa8a8}
.tb-bar{height:10px;border-radius:5px;background:#8883;overflow:hidden;margin:.9rem 0 .4rem}
.tb-bar i{display:block;height:100%;border-radius:5px;background:linear-gradient(90deg,#e8590c,#fcc419);
 transition:width .8s linear}
.tb-facts{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:0;font-variant-numeric:tabular-nums}
.tb-stage{font-weight:600}.tb-actions{margin-left:auto;display:flex;gap:.4rem}details .tb-actions{margin:.8rem 0 0}
.tb-button{font-size:.82rem;padding:.25rem .7rem;border-radius:7px;border:1px solid var(--border-color-primary);
 background:transparent;cursor:pointer;color:inherit!important;text-decoration:none!important}.tb-button:disabled{opacity:.4}
.tb-primary{background:#e8590c;border-color:#e8590c;color:#fff!important}
.tb-curve{margin:.8rem 0 0;position:relative}.tb-curve svg{width:100%;height:120px;display:block;
 border-bottom:1px solid var(--border-color-primary)}
.tb-curve polyline{fill:none;stroke:#e8590c;vector-effect:non-scaling-stroke}
.tb-curve .raw{opacity:.3;stroke-width:1}.tb-curve .smooth{stroke-width:2}
.tb-curve figcaption{position:absolute;inset:0;display:flex;flex-direction:column;justify-content:space-between;
 align-items:flex-end;font-size:.72rem;color:var(--body-text-color-subdued);pointer-events:none}
.tb-prompt p{margin:.9rem 0 .4rem}.tb-pictures,.tb-photos{display:grid;gap:.5rem;
 grid-template-columns:repeat(auto-fill,minmax(110px,1fr))}
.tb-pictures img,.tb-blank{width:100%;aspect-ratio:1;object-fit:cover;border-radius:8px;display:block}
.tb-packs{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(260px,1fr))}.tb-packs .tb-card{margin:0}
.tb-small img{image-rendering:pixelated}
.tb-card img,.tb-card :is(.tb-pictures,.tb-photos) a{margin:0!important;padding:0!important}
.tb-photos{grid-template-columns:repeat(auto-fill,72px)}
.tb-photos img{width:72px;height:72px;object-fit:cover;border-radius:8px}
.tb-moments{display:grid;gap:.5rem;grid-template-columns:repeat(4,minmax(0,1fr));margin-top:.8rem}
.tb-moments img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:8px}
.tb-seen{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));margin-top:.8rem}
.tb-seen img{width:100%;border-radius:8px}.tb-seen figcaption span{display:block}
:is(.tb-moments,.tb-seen) figure{margin:0}
:is(.tb-moments,.tb-seen) figcaption{font-size:.78rem;overflow-wrap:anywhere}
.tb-pair{display:flex;gap:.3rem;align-items:flex-start}.tb-pair>*{flex:1;min-width:0}
.tb-pair img{max-height:150px;object-fit:contain;object-position:left top}
.tb-badge{display:inline-block;font-size:.7rem;font-weight:600;padding:0 .45rem;margin:0 .25rem .2rem 0;
 border-radius:99px;background:#8882}.tb-good{background:#40c05733}.tb-doubt{background:#fcc41955}.tb-bad{background:#fa525244}
.tb-blank{background:linear-gradient(100deg,#8882 40%,#8884 50%,#8882 60%) 0/200%;
 animation:tb-shine 1.4s infinite linear}
@keyframes tb-shine{from{background-position:120% 0}to{background-position:-80% 0}}
.tb-problem,.tb-note{color:#e03131;margin:.5rem 0 0;font-size:.88rem}.dark .tb-problem,.dark .tb-note{color:#ff8787}
.tb-warning{color:var(--body-text-color-subdued);margin:.5rem 0 0;font-size:.85rem}.tb-warning::before{content:"⚠ "}
.tb-card dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0;font-size:.88rem}
.tb-card dt{color:var(--body-text-color-subdued)}.tb-card dd{margin:0;overflow-wrap:anywhere}
.tb-empty{border:1px dashed var(--border-color-primary);border-radius:12px;padding:2.2rem;text-align:center;
 display:flex;flex-direction:column;gap:.4rem;color:var(--body-text-color-subdued)}
"""
