"""Rendering time by phase: with LoRAs, fused, compiled, in batches; swapping LoRAs, previews.

Every figure comes from `renderer.Renderer` itself, with the family's own Branch and LoRAs saved by `methods.lora` (the
branch's default configuration, random weights). Models:

    --branch fast       the trained base of the package (the default)
    --random-weights    another branch's full-size model from its published CONFIG, with random weights on the device
    --tiny              another branch's model with the same blocks, few channels (tests/helpers/tiny.py), from a folder

Further options:

    --images N          pictures of a prompt, 4 by default; drawn at once where there is room
    --batches N ...     pictures at once in the rows on batches, 1 2 4 8 by default
    --runs N            each figure is the median of so many runs, 5 by default, after one warm-up run
    --steps N           of sampling; by default the branch's
    --size N            side of the pictures in pixels; by default the branch's
    --compile WORD ...  `whole`: the denoiser; `blocks`: only its repeated blocks; `lora`: the denoiser with an unfused
                        LoRA; `none`. By default the first three
    --device WORD       cuda or cpu; by default the GPU, where there is one
    --note TEXT         a sentence on the machine, for example on other load
    --out FILE          write the Markdown to this file, not to the standard output

Each run has a different text, so that each one is encoded. Compilers' caches are off: compile times are those of a
first run on a machine. A compiled denoiser pays off from N* = T_compile / (t_eager - t_compiled) pictures on.
Run: `uv run python -m benchmarks.render_speed`
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import peft
import torch
import transformers

from benchmarks.train_speed import synchronize
from tests.helpers import tiny
from trainer.branches import flux1, loading, sd15, sdxl1
from trainer.branches.flux1 import Flux1
from trainer.branches.protocol import Branch, load_branch
from trainer.config import branch_file, resolve
from trainer.contract.rows import PromptToRender
from trainer.device import leave_a_core_free, peak_gib
from trainer.library import bases
from trainer.library.bases import Base
from trainer.methods import lora
from trainer.names import DEMO_BRANCH
from trainer.photos.analysis import PhotoAnalyzer
from trainer.rendering import renderer
from trainer.rendering.job import Lora, Models
from trainer.rendering.plan import make_plan
from trainer.rendering.preview import Preview
from trainer.rendering.renderer import Renderer
from trainer.settings import Settings, read_settings

FAMILIES: dict[str, Any] = {
    "sd15": (sd15.CONFIG, sd15.SD15, tiny.make_tiny_sd15),
    "sdxl1": (sdxl1.CONFIG, sdxl1.SDXL1, tiny.make_tiny_sdxl1),
    "flux1": (flux1.CONFIG, Flux1, tiny.make_tiny_flux1),
}
PHASES = ("loading", "text", "denoising", "decoding", "saving")
STAGES = {"loading": "loading", "rendering": "denoising", "saving": "saving"}  # stage of the Renderer -> phase
TEXT = "a red dog on a sofa"
UP_DEVIATION = 0.01  # of the LoRAs' random weights: small enough that the result is still a picture
RECOMPILED = 1  # pictures of a prompt whose shape is new to the compiled denoiser
ALWAYS = 1e9  # share of the time for previews: one preview in each step


class Clock:
    """Measures seconds of a run by phase. It is also the Renderer's report, and waits for the device at each change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()

    def begin(self) -> None:
        synchronize(self._device)
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._inside, self._since = "loading", False, time.perf_counter()

    def change(self, phase: str) -> str:
        """Start this phase; returns the one before."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """A phase within another; phases inside it count as this one."""
        if self._inside:
            yield
            return
        before, self._inside = self.change(phase), True
        try:
            yield
        finally:
            self._inside = False
            self.change(before)

    def timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timing(*args: Any, **named: Any) -> Any:
            with self.inside(phase):
                return call(*args, **named)

        return timing

    def stage(self, stage: str) -> None:
        if stage in STAGES:
            self.change(STAGES[stage])

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        return True

    def saved(self, step: int) -> None: ...

    def resumed(self, step: int) -> None: ...

    def warn(self, message: str) -> None:
        raise RuntimeError(message)


@dataclass(frozen=True)
class Figure:
    """Measurements of one way to render: seconds of each run by phase, without the warm-up run."""

    images: int
    steps: int
    first: float  # seconds of the warm-up run
    runs: list[dict[str, float]]

    @property
    def totals(self) -> list[float]:
        return [sum(run.values()) for run in self.runs]

    @property
    def seconds(self) -> float:
        return statistics.median(self.totals)

    def of(self, phase: str) -> float:
        return statistics.median(run.get(phase, 0.0) for run in self.runs)

    def row(self, label: str) -> str:
        shares = " | ".join(f"{100 * self.of(phase) / self.seconds:.1f}" for phase in PHASES)
        step = 1000 * self.of("denoising") / self.steps
        return (
            f"| {label} | {self.images} | {self.seconds:.3f} | {min(self.totals):.3f} | "
            f"{self.seconds / self.images:.3f} | {step:.1f} | {shares} |"
        )


class JobRunner:
    """A Renderer and its clock."""

    def __init__(self, options: argparse.Namespace, device: torch.device, folder: Path) -> None:
        self.name: str = options.branch
        self.device = device
        self.clock = Clock(device)
        self.settings: Settings = read_settings(outputs=folder / "outputs", models=folder / "models")
        self.defaults = branch_file.render_config(self.settings.presets, self.name)
        self.steps: int = options.steps or self.defaults.steps
        self.branch: Branch | None = None  # loaded by the Renderer
        self._side: int | None = options.size
        self._runs: int = options.runs
        self._prompts = 0
        self._random: bool = options.random_weights
        (self.settings.outputs / "tunes" / "1").mkdir(parents=True)
        self._base = bases.resolve(self.settings, None, DEMO_BRANCH)
        if self.name != DEMO_BRANCH:
            path = None if self._random else FAMILIES[self.name][2](folder / "model")
            self._base = Base(1, f"{self.name}, {'full size' if self._random else 'tiny'}", self.name, path=path)
        self._tokenizers = folder / "tokenizers"
        self._renderer = Renderer(self.settings, device, PhotoAnalyzer(self.settings))

    def load(self, base: Base, device: torch.device, cache: Path) -> Branch:
        """Replaces the Renderer's `load_branch`; may use random weights, and adds the clock."""
        self.branch = None  # the GPU may have no room for two
        branch = self._make() if self._random else load_branch(base, device, cache)
        self.branch = branch
        for owner, call, phase in (
            (branch, "say", "text"),
            (branch.vae, "decode", "decoding"),
            (branch.pipeline.image_processor, "postprocess", "decoding"),
        ):
            setattr(owner, call, self.clock.timed(getattr(owner, call), phase))
        return branch

    def reset(self) -> None:
        """Unload everything, including changes such as fused LoRAs."""
        self._renderer.release()
        self.branch = None
        torch.compiler.reset()

    def render(self, images: int, loras: Sequence[Lora] = ()) -> dict[str, float]:
        """Render one prompt; seconds by phase."""
        self._prompts += 1
        prompt: PromptToRender = {
            "text": f"{TEXT} {self._prompts}", "negative_prompt": None, "num_images": images,
            "seed": self._prompts, "steps": self.steps, "cfg_scale": None, "w": self._side, "h": self._side,
            "callback": None, "attributes": {}, "parsed": None,
        }  # fmt: skip
        self.clock.begin()
        models = Models("benchmark", self._base, loras, None, False)
        folder = self.settings.outputs / "tunes" / "1"
        plan = make_plan(prompt, {}, self.name, folder / "inputs", self.settings.presets)
        files, warnings = self._renderer.render_prompt(self._prompts, plan, models, folder, self.clock)
        self.clock.change("")
        if len(files) != images or any("fixed" not in one and "renders" not in one for one in warnings):
            raise RuntimeError(f"{len(files)} of {images} pictures; {warnings}")
        return dict(self.clock.seconds)

    def figure(self, images: int, loras: Sequence[Lora] = ()) -> Figure:
        """Measure one way to render."""
        first = sum(self.render(images, loras).values())
        return Figure(images, self.steps, first, [self.render(images, loras) for _ in range(self._runs)])

    def make_loras(self, folder: Path, count: int) -> list[Lora]:
        """LoRAs of the branch's default configuration with random weights, saved as a tune's are."""
        config = resolve.resolve(
            self.settings.presets, branch=self.name, model_type="lora", preset=None, name="dog", photos=4, steps=None,
            args="",
        )  # fmt: skip
        made = []
        self.render(1)
        branch = self.branch
        assert branch is not None, "it was rendered with just now"
        for number in range(count):
            model = folder / f"lora{number}"
            model.mkdir()
            torch.manual_seed(number)
            for group in lora.attach(branch, config):
                for name, weight in zip(group["names"], group["params"], strict=True):
                    if ".lora_B." in name:
                        torch.nn.init.normal_(weight, std=UP_DEVIATION)
            lora.save(branch, model, config, {})
            lora.remove(branch.pipeline)
            made.append(Lora(model, 1.0, model.name))
        return made

    def _make(self) -> Branch:
        """The family's own Branch with full-size modules from its CONFIG, with random weights, on the device.

        Tokenizers are those of the tiny model: encoded texts have the same length.
        """
        configs, kind, make_tiny = FAMILIES[self.name]
        dtype = loading.compute_dtype(self.device)
        if not self._tokenizers.exists():
            make_tiny(self._tokenizers)
        parts: dict[str, Any] = {}
        denoiser = "transformer" if self.name == "flux1" else "unet"
        for name, (library, class_name) in (
            (name, entry) for name, entry in configs["model_index.json"].items() if isinstance(entry, list)
        ):
            if name.startswith("tokenizer"):
                tokenizer = self._tokenizers / name
                parts[name] = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            elif name == "scheduler":
                made = getattr(diffusers, class_name)
                parts[name] = made.from_config(configs["scheduler/scheduler_config.json"])
            else:
                made = getattr(diffusers if library == "diffusers" else transformers, class_name)
                parts[name] = self._module(made, configs[f"{name}/config.json"], dtype if name != "vae" else None)
        pipeline_class = getattr(diffusers, configs["model_index.json"]["_class_name"])
        if self.name == "sd15":
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        elif self.name == "sdxl1":
            parts["add_watermarker"] = False
        if self.name == "flux1":
            transformer = parts.pop(denoiser)
            pipeline = pipeline_class(transformer=None, **parts)
            branch: Branch = kind(pipeline, lambda: transformer, self.device, dtype)
        else:
            pipeline = pipeline_class(**parts)
            branch = kind(pipeline, self.device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return branch

    def _module(self, kind: Any, config: dict[str, Any], dtype: torch.dtype | None) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or torch.float32)
        try:
            with torch.random.fork_rng(), self.device:
                torch.manual_seed(0)
                made = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
        finally:
            torch.set_default_dtype(before)
        return made.requires_grad_(False).eval()

    def tiny_decoder(self, _repository: str, device: torch.device) -> Any:
        """The preview decoder with random weights; diffusers' defaults are the published configuration (TAESD)."""
        assert self.branch is not None, "it is loaded after the base"
        vae: Any = self.branch.vae
        decoder = diffusers.AutoencoderTiny(latent_channels=vae.config.latent_channels)
        return decoder.eval().requires_grad_(False).to(device)


def measure_compiled(bench: JobRunner, word: str, images: int, loras: Sequence[Lora]) -> tuple[str, str]:
    """The table's row of a compiled denoiser, and a note on compiling it."""
    bench.reset()
    used = list(loras[:1]) if word == "lora" else []
    eager = bench.figure(images, used)  # once more: a machine's speed changes with time
    assert bench.branch is not None, "it was rendered with just now"
    denoiser: Any = bench.branch.denoiser
    label = {"whole": "compiled", "blocks": "compiled blocks", "lora": "compiled, one unfused LoRA"}[word]
    if word == "blocks":
        denoiser.compile_repeated_blocks()
    else:
        denoiser.compile()
    figure = bench.figure(images, used)
    took = figure.first - figure.seconds
    gain = (eager.seconds - figure.seconds) / images
    pays = f"pays off from N* = {math.ceil(took / gain)} pictures on" if gain > 0 else "never pays off"
    first = sum(bench.render(RECOMPILED, used).values())
    again = first - sum(bench.render(RECOMPILED, used).values())
    note = (
        f"- {label}: compiling took {took:.1f} s; {eager.seconds / images:.3f} s a picture became "
        f"{figure.seconds / images:.3f} s ({eager.seconds / figure.seconds:.2f} times as fast), which {pays}. "
        f"Another number of pictures ({RECOMPILED}) takes {again:.1f} s more the first time."
    )
    return figure.row(label), note


def measure_swap(bench: JobRunner, loras: Sequence[Lora], runs: int) -> str:
    """Cost of changing the LoRA between two prompts of one picture each."""
    bench.reset()
    for one in loras:
        bench.render(1, [one])
    stays = [bench.render(1, loras[-1:]) for _ in range(runs)]
    swapped = [bench.render(1, [loras[number % 2]]) for number in range(runs)]
    load, kept = (statistics.median(run["loading"] for run in group) for group in (swapped, stays))
    whole = statistics.median(sum(run.values()) for run in swapped)
    return (
        f"- swapping a LoRA between two prompts: {1000 * load:.0f} ms before the text is encoded, {1000 * kept:.0f} ms "
        f"where it stays; {100 * (load - kept) / whole:.1f} % of a prompt of one picture."
    )


def measure_preview(bench: JobRunner, images: int) -> str:
    """Cost of previews, with their time limit and with one in each step."""
    if not bench.defaults.preview:
        return f"- previews: {bench.name} has none."
    bench.reset()
    show = bench.clock.timed(Preview.show, "preview")
    with (
        mock.patch.object(renderer, "load_tiny_decoder", bench.tiny_decoder),
        mock.patch.object(Preview, "show", show),
    ):
        limited = bench.figure(images)
        with mock.patch.object(Preview, "SHARE", ALWAYS):
            always = bench.figure(images)
    cost = always.of("preview") / bench.steps
    return (
        f"- previews ({bench.defaults.preview}, random weights): {1000 * cost:.1f} ms each, which is "
        f"{100 * cost / (always.of('denoising') / bench.steps):.0f} % of a step; with their time limit, "
        f"{100 * limited.of('preview') / limited.seconds:.2f} % of the time (at most {100 * Preview.SHARE:g} %)."
    )


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> str:
    """Everything, as Markdown."""
    bench = JobRunner(options, device, folder)
    images: int = options.images
    rows: list[str] = []
    notes: list[str] = []

    def add(row: str) -> None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)  # a run takes minutes

    with (
        mock.patch.object(renderer, "load_branch", bench.load),
        mock.patch.object(renderer, "load_tiny_decoder", lambda *_: None),
    ):
        loras = bench.make_loras(folder, 2)
        bench.reset()
        add(bench.figure(images).row("no LoRA"))
        add(bench.figure(images, loras).row("two unfused LoRAs"))
        add(bench.figure(images, loras[:1]).row("one unfused LoRA"))
        assert bench.branch is not None, "it was rendered with just now"
        lora.merge(bench.branch.pipeline)
        add(bench.figure(images).row("the one LoRA fused"))
        bench.reset()
        for batch in options.batches:
            add(bench.figure(batch).row(f"batch {batch}"))
        notes.append(measure_swap(bench, loras, options.runs))
        notes.append(measure_preview(bench, images))
        peak = peak_gib(device)
        for word in options.compile:
            if word != "none":
                row, note = measure_compiled(bench, word, images, loras)
                add(row)
                notes.append(note)
        bench.reset()
    return summary(options, bench, device, peak, rows, notes)


def machine(device: torch.device) -> str:
    """Description of the machine."""
    cores = f"{os.cpu_count()} cores"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cpu = f"{model or platform.processor() or platform.machine()}, {cores}"
    card = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else "no GPU, "
    return f"{card}{cpu}, {torch.get_num_threads()} thread(s) of torch; {platform.system()}"


def summary(
    options: argparse.Namespace,
    bench: JobRunner,
    device: torch.device,
    peak: float,
    rows: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The report as Markdown."""
    model = "the base of the package" if bench.name == "fast" else "full size" if options.random_weights else "tiny"
    side = options.size or f"{bench.defaults.w} x {bench.defaults.h}"
    versions = ", ".join(f"{one.__name__} {one.__version__}" for one in (torch, diffusers, transformers, peft))
    dtype = str(loading.compute_dtype(device)).removeprefix("torch.")
    head = [
        f"# Rendering, {bench.name} ({model})",
        "",
        f"`python -m benchmarks.render_speed --branch {bench.name}`, {datetime.now(UTC):%Y-%m-%d}. {machine(device)},",
        f"Python {platform.python_version()}, {versions}; {dtype}. {options.note}".rstrip(),
        "",
        f"{side} px, {bench.steps} steps; medians of {options.runs} runs after one warm-up run. Memory before"
        f" anything was compiled: {peak:.2f} GiB at most.",
        "",
        "| | pictures | s | least s | s a picture | ms a step | loading, % | text, % | denoising, % | decoding, % |"
        " saving, % |",
        "|---|" + "---:|" * 10,
    ]
    return "\n".join([*head, *rows, "", *notes, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--branch", choices=["fast", *FAMILIES], default="fast")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--random-weights", action="store_true", help="the full-size model")
    model.add_argument("--tiny", action="store_true", help="a model with the same blocks and few channels")
    parser.add_argument("--images", type=int, default=4, help="pictures of a prompt, 1 to 8")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, help="pixels of a side")
    choices = ["whole", "blocks", "lora", "none"]
    parser.add_argument("--compile", nargs="+", choices=choices, default=choices[:-1])
    parser.add_argument("--device", help="cuda or cpu; by default the GPU, where there is one")
    parser.add_argument("--note", default="", help="a sentence on the machine")
    parser.add_argument("--out", type=Path, help="write the Markdown to this file")
    options = parser.parse_args(arguments)
    if (options.branch == "fast") == (options.random_weights or options.tiny):
        parser.error("say --random-weights or --tiny for sd15, sdxl1 and flux1, and neither for fast")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    leave_a_core_free()
    for library in (diffusers.utils.logging, transformers.utils.logging):  # as the worker does
        library.disable_progress_bar()
        library.set_verbosity_error()
    torch.compiler.config.force_disable_caches = True
    with tempfile.TemporaryDirectory() as folder:
        markdown = measure(options, device, Path(folder))
    if options.out:
        options.out.write_text(markdown)
    else:
        sys.stdout.write(markdown)


if __name__ == "__main__":
    main()
