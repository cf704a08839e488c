"""The thread that works: claims a job, runs it, records how it ended. The one broad handler lives here."""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import bases, presets, references, weights
from trainer.child import Closed
from trainer.expiry import expiry
from trainer.files import discard, read_json_lines, write_whole
from trainer.looking import Looker, begin_anew
from trainer.loops import Loop
from trainer.methods import FORMATS, get_method
from trainer.schema import CannotLook, InvalidRequest, Photo
from trainer.settings import Settings
from trainer.store import Job, Row, Store, now, stamp

if TYPE_CHECKING:
    import torch

    from trainer.render import FaceID, Lora

log = logging.getLogger("tunebooth.worker")

TELL_EVERY_SECONDS = 0.5  # progress in the store: each write waits for the disk
POLL_SECONDS = 2.0
STORE_RETRY_SECONDS = 10.0
MAX_ATTEMPTS = 3  # a job that takes the process down this often without headway is not tried again
PACE_MEMORY = 0.9  # of the moving average of seconds per step


class Aside(Exception):
    """The job is to stop, before it has begun to train."""


class Worker:
    """One thread, one job at a time, oldest first."""

    def __init__(self, settings: Settings, store: Store, looker: Looker) -> None:
        self._settings = settings
        self._store = store
        self._looker = looker
        self._bench: Bench | None = None
        self._unable = ""
        self._loop = Loop("worker", POLL_SECONDS, self._work, wake=store.changed, retry_seconds=STORE_RETRY_SECONDS)

    def start(self) -> None:
        self._store.recover()
        self._loop.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Finish the current step, save its state and end; the job goes on at the next start."""
        self._loop.close(timeout_s)

    def _work(self) -> None:
        """Run the jobs that are there. What it raises comes from the store: a full disk, for one; the job is kept."""
        if self._bench is None and not self._unable:
            self._set_up()
        while not self._loop.stopping.is_set() and (job := self._store.claim()):
            if self._bench is None:
                self._store.finish(job, "failed", error=self._unable)
            else:
                self._bench.run(job)

    def _set_up(self) -> None:
        """The slow imports, before anybody waits for them."""
        try:
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            from trainer import render  # noqa: F401
            from trainer.train import leave_a_core_free, pick_device

            for library in (diffusers_logging, transformers_logging):  # the page has a progress bar of its own
                library.disable_progress_bar()
                library.set_verbosity_error()

            leave_a_core_free()
            device = pick_device(self._settings.device)
            self._bench = Bench(self._settings, self._store, self._looker, device, self._loop.stopping)
        except Exception as error:
            log.exception("nothing can be trained here")
            self._unable = f"nothing can be trained here: {explain(error)}"


class Bench:
    """Runs jobs; keeps what is worth keeping between two of them."""

    def __init__(
        self, settings: Settings, store: Store, looker: Looker, device: torch.device, stopping: threading.Event
    ) -> None:
        from trainer.render import Renderer

        self._settings = settings
        self._store = store
        self._looker = looker
        self._device = device
        self._stopping = stopping
        self._renderer = Renderer(settings, device, looker)

    def run(self, job: Job) -> None:
        """Do a job, whatever becomes of it."""
        reporter = Reporter(self._settings, self._store, job, self._stopping, self._device)
        try:
            if job.attempts >= MAX_ATTEMPTS:
                raise RuntimeError(f"the app ended {job.attempts} times at this point; it is not tried again")
            if job.export_id is not None:
                self._export(job, job.export_id)
            elif job.prompt_id is None:
                self._train(job, reporter)
            else:
                self._render(job, job.prompt_id, reporter)
        except (InvalidRequest, CannotLook, weights.Unavailable) as problem:
            self._store.finish(job, "failed", error=str(problem))
        except (Aside, Closed):
            self._put_aside(job, reporter)
        except Exception as error:
            log.exception("job %s failed", job)
            self._store.finish(job, "failed", error=explain(error, OF_PICTURES if job.prompt_id else OF_TRAINING))

    def _train(self, job: Job, reporter: Reporter) -> None:
        from trainer.memory import forget_peak
        from trainer.train import train_tune

        forget_peak(self._device)
        tune = self._must(self._store.get("tunes", job.tune_id))
        self._renderer.release()
        config = self._fitted(tune)
        tune = self._prepared(tune, config, reporter)
        files = train_tune(tune, self._base(tune), config, self._settings, self._device, reporter, self._preview(tune))
        if files is not None:
            reporter.stage("trained")
            moment = datetime.now(UTC)
            ends = {"trained_at": stamp(moment), "eta": stamp(moment), "expires_at": expiry(self._settings, moment)}
            self._store.finish(job, "trained", files=files, progress=reporter.progress, **ends)
            if get_method(tune["method"]).LARGE:  # nothing goes on from its states, which are several times the model
                discard(self._settings.outputs / "tunes" / str(tune["id"]) / "state")
        else:
            self._put_aside(job, reporter)

    def _put_aside(self, job: Job, reporter: Reporter) -> None:
        """End a tune that was stopped: for good where that was asked for, else until the next start."""
        if self._stopping.is_set() and not self._store.cancel_wanted("tunes", job.tune_id):
            self._store.put_back(job)
            log.info("tune %s is put aside; it goes on at the next start", job.tune_id)
        else:
            self._store.finish(job, "canceled", eta=None, progress=reporter.progress)

    def _prepared(self, tune: Row, config: presets.TrainConfig, reporter: Reporter) -> Row:
        """The tune with the verdicts on its photos, and with what is made of them in `dataset/`; once for a tune."""
        folder = self._settings.outputs / "tunes" / str(tune["id"])
        done = folder / "dataset" / "prepared.json"
        if done.exists():
            self._store.update("tunes", tune["id"], photos=json.loads(done.read_text("utf-8")))
            return self._must(self._store.get("tunes", tune["id"]))
        begin_anew(done.parent)

        def tell(what: str, number: int, of: int) -> None:
            reporter.stage(f"{what}: {number} of {of}")
            if not reporter.going_on():
                raise Aside

        photos, warnings = self._looker.prepare(
            folder,
            [Photo(**photo) for photo in tune["photos"]],
            config,
            tune["name"],
            bool(tune["training_face_correct"]),
            tell,
        )
        before, left = (sum(not one["dropped"] for one in told) for told in (tune["photos"], verdicts(photos)))
        if left < before:
            warnings.append(f"{left} of {before} photos are left; steps and batch are those for {before}")
        for warning in warnings:
            reporter.warn(warning)
        write_whole(done, json.dumps(verdicts(photos)))  # before the store: a crash in between must not judge again
        self._store.update("tunes", tune["id"], photos=verdicts(photos))
        return self._must(self._store.get("tunes", tune["id"]))

    def _fitted(self, tune: Row) -> presets.TrainConfig:
        """The configuration, made to fit the card when the tune is first begun. Raises RuntimeError where none fits."""
        from trainer.memory import free_gib

        config = presets.TrainConfig(**presets.parse_args(tune["args"]))
        folder = self._settings.outputs / "tunes" / str(tune["id"])
        if (folder / "config.json").exists():
            return config  # begun before; a run ends as it began
        free, branch, method = free_gib(self._device), tune["branch"], tune["method"]
        least = presets.least_gib(self._settings.presets, branch, method)
        if free < least:
            raise RuntimeError(
                f"{branch} needs a card with {least:g} GiB of free memory; there are {free:.1f} GiB. Close what else"
                " uses the card, or train a smaller branch"
            )
        asked = json.loads((folder / "request.json").read_text("utf-8"))["args"]
        config = presets.fit(
            self._settings.presets, config, branch=branch, model_type=method, asked=asked, free_gib=free
        )
        self._store.update("tunes", tune["id"], args=presets.as_args(config))
        return config

    def _preview(self, tune: Row) -> str:
        """What the previews of a run show: its first prompt, else the subject alone."""
        from trainer.plan import plain

        first = self._store.find("prompts", tune_id=tune["id"], oldest_first=True, limit=1)
        return plain(first[0]["text"], tune["characteristics"]) if first else f"{tune['token']} {tune['name']}"

    def _render(self, job: Job, prompt_id: int, reporter: Reporter) -> None:
        from trainer.render import Stopped

        prompt, tune = (
            self._must(self._store.get("prompts", prompt_id)),
            self._must(self._store.get("tunes", job.tune_id)),
        )
        try:
            base, loras, face, people = self._to_render(prompt, tune, reporter)
            files, warnings = self._renderer.render_prompt(prompt, tune, base, loras, face, people, reporter)
        except Stopped:
            if self._store.cancel_wanted("prompts", prompt_id):
                self._store.finish(job, "canceled")
            else:
                self._store.put_back(job)
            return
        told = self._must(self._store.get("prompts", prompt_id))["warnings"]
        warnings = [*told, *(warning for warning in warnings if warning not in told)]
        reporter.progress["stage"] = "rendered"
        ended = {"progress": reporter.progress, "trained_at": now()}
        self._store.finish(job, "rendered", files=files, warnings=warnings, **ended)

    def _to_render(
        self, prompt: Row, tune: Row, reporter: Reporter
    ) -> tuple[bases.Base, list[Lora], FaceID | None, bool]:
        """What a prompt is rendered with: the base, the LoRAs on it, the face, and whether one of them is of people."""
        from trainer.render import Lora

        named = references.of_row(self._settings, self._store, prompt, tune, tune["branch"])
        weights_of = {(one.kind, one.id): one.weight for one in named}
        own_model = self._settings.outputs / "tunes" / str(tune["id"]) / "model"
        if tune["method"] == "faceid" or prompt["base_id"]:
            base = bases.resolve(self._settings, prompt["base_id"] or tune["base_id"], tune["branch"], self._tune_row)
        else:
            base = bases.of_tune(self._settings, tune, self._tune_row)
        loras = [Lora(base.model, 1.0, base.title)] if base.model and base.model != own_model else []
        own_scale = weights_of.pop(("lora", tune["id"]), prompt["attributes"].get("lora_scale", 1.0))
        if tune["method"] in references.ADAPTERS:
            loras.append(Lora(own_model, own_scale, tune["title"]))
        elif tune["method"] == "checkpoint" and own_scale != 1.0:
            reporter.warn(f"{tune['title']} is a whole model, which has one strength: {own_scale:g} is not used")
        people = [tune["name"]]
        for one in named:
            if one.kind == "lora" and one.id != tune["id"]:
                model, title = self._lora(one.id)
                loras.append(Lora(model, one.weight, title))
            people += [row["name"]] if (row := self._tune_row(one.id)) else []
        face = next((one for one in named if one.kind == "faceid"), None)
        if face is None and tune["method"] == "faceid":
            face = references.Named("faceid", tune["id"], 1.0)
        is_person = any(presets.kind_of(name) == "person" for name in people)
        return base, loras, self._face(face, base, reporter) if face else None, is_person

    def _lora(self, lora_id: int) -> tuple[Path, str]:
        """The LoRA of this number, a tune's or a file of the models folder, and what it is called."""
        if tune := self._tune_row(lora_id):
            if tune["status"] != "trained":
                raise RuntimeError(f"<lora:{lora_id}>: tune {lora_id} is {tune['status']}; it has no model")
            return self._settings.outputs / "tunes" / str(lora_id) / "model", tune["title"]
        file = next((base for base in bases.list_bases(self._settings) if base.id == lora_id and base.model), None)
        if file is None or file.model is None:
            raise RuntimeError(f"<lora:{lora_id}>: that tune, or file of the models folder, is gone")
        return file.model, file.title

    def _face(self, named: references.Named, base: bases.Base, reporter: Reporter) -> FaceID:
        """The face of this number, and the adapter that puts it into pictures of this base."""
        from trainer.render import FaceID

        folder = self._settings.outputs / "tunes" / str(named.id) / "model"
        if not (folder / FORMATS["faceid"]).exists():
            raise RuntimeError(f"<faceid:{named.id}>: that tune is gone, and its face with it")
        adapter = weights.obtain(
            self._settings, weights.FACEID[base.branch], tell=lambda what, *_: reporter.stage(what)
        )
        return FaceID(folder, adapter, named.weight)

    def _export(self, job: Job, export_id: int) -> None:
        from trainer.export import export_tune

        export = self._must(self._store.get("exports", export_id))
        tune = self._must(self._tune_row(job.tune_id))
        base = bases.of_tune(self._settings, tune, self._tune_row)
        self._renderer.release()
        file = export_tune(tune, base, export["format"], self._settings)
        self._store.finish(job, "exported", files=[file])

    def _tune_row(self, tune_id: int) -> Row | None:
        return self._store.get("tunes", tune_id)

    def _base(self, tune: Row) -> bases.Base:
        """What a tune is trained on."""
        return bases.resolve(self._settings, tune["base_id"], tune["branch"], self._tune_row)

    @staticmethod
    def _must(row: Row | None) -> Row:
        assert row is not None, "a job's rows go with it"
        return row


class Reporter:
    """What a running job tells: progress to the store, lines to the tune's log; and whether it is to go on."""

    def __init__(
        self, settings: Settings, store: Store, job: Job, stopping: threading.Event, device: torch.device
    ) -> None:
        self._store = store
        self._device = device
        self._job = job
        self._stopping = stopping
        self._table, self._row = job.target
        folder = settings.outputs / "tunes" / str(job.tune_id)
        self._log = folder / "log.jsonl"
        self._board = tensorboard(folder / "tensorboard") if settings.tensorboard and self._table == "tunes" else None
        self._began = time.monotonic()
        self._told = self._stepped = 0.0
        self.progress: dict[str, Any] = {
            "stage": "queued",
            "step": 0,
            "steps": 0,
            "loss": None,
            "seconds_per_step": None,
        }

    def stage(self, stage: str) -> None:
        self.progress["stage"] = stage
        self._tell()

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        """See `loop.Report`."""
        from trainer.memory import peak_gib

        moment = time.monotonic()
        if self._stepped and step:
            pace, took = self.progress["seconds_per_step"], moment - self._stepped
            self.progress["seconds_per_step"] = took if pace is None else PACE_MEMORY * pace + (1 - PACE_MEMORY) * took
        self._stepped = moment
        self.progress |= {"step": step, "steps": steps}
        if loss is not None:
            self.progress["loss"] = loss
            peak = peak_gib(self._device)
            line = {"step": step, "loss": round(loss, 6), "lr": lr, "peak_gib": round(peak, 3)}
            self._write(line | {"seconds": round(moment - self._began, 3)})
            if self._board:
                for name, value in {"loss": loss, "lr": lr, "peak_gib": peak}.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()
        if moment - self._told > TELL_EVERY_SECONDS or step == steps:
            self._tell()
        return self.going_on()

    def going_on(self) -> bool:
        """Whether nobody wants this job to stop."""
        return not (self._stopping.is_set() or self._store.cancel_wanted(self._table, self._row))

    def saved(self, step: int) -> None:
        self._store.made_headway(self._job)
        self._stepped = time.monotonic()  # saving is not part of the pace of a step

    def warn(self, message: str) -> None:
        """Add to the warnings of the tune or prompt, once."""
        row = self._store.get(self._table, self._row)
        if row is not None and message not in row["warnings"]:
            self._store.update(self._table, self._row, warnings=[*row["warnings"], message])

    def resumed(self, step: int) -> None:
        """Log where the run goes on, and drop the lines of steps that are now done again."""
        if self._log.exists():
            kept = [line for line in read_json_lines(self._log) if line["step"] <= step]
            self._log.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._write({"step": step, "event": "resumed" if step else "started", "at": now()})

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._table == "tunes":
            self._store.update("tunes", self._row, progress=self.progress, eta=self._eta())
        elif self._table == "prompts":
            self._store.update("prompts", self._row, progress=self.progress)

    def _eta(self) -> str | None:
        pace = self.progress["seconds_per_step"]
        if pace is None:
            return None
        return stamp(datetime.now(UTC) + timedelta(seconds=pace * (self.progress["steps"] - self.progress["step"])))

    def _write(self, line: dict[str, Any]) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard files. Raises RuntimeError in words where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RuntimeError(
            "the setting tensorboard needs the package of that name: `uv pip install tensorboard`"
        ) from None
    return SummaryWriter(str(folder))


OF_TRAINING = "try args micro_batch=1 gradient_checkpointing=true, a lower resolution or a lower rank"
OF_PICTURES = "try a smaller w and h, no super_resolution or hires_fix, or no controlnet"


def explain(error: Exception, remedy: str = OF_TRAINING) -> str:
    """An unexpected error in words that name a remedy where one is known. remedy: for a card that is full."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} -- the card's memory is full: {remedy}; or close what else uses the card"
    return text


def verdicts(photos: list[Photo]) -> list[Row]:
    """As the store keeps them."""
    return [photo.model_dump() for photo in photos]
