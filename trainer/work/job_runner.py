"""Runs one job: training, rendering or export; and records how it ended."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch

from trainer.clock import now, stamp
from trainer.config import branch_file, resolve, train_config
from trainer.config.train_config import TrainConfig
from trainer.contract.disk import problem_of
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest, JobRefused, ModelChanged
from trainer.contract.rows import ExportRow, PromptRow, TuneRow
from trainer.device import forget_peak, free_gib
from trainer.files import Unreadable, discard
from trainer.library import bases
from trainer.library.bases import Base
from trainer.library.weights import Unavailable
from trainer.methods.protocol import get_method
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.subprocess_worker import Closed
from trainer.rendering.job import Stopped
from trainer.rendering.plan import make_plan, plain
from trainer.rendering.renderer import Renderer
from trainer.settings import Settings
from trainer.studio import checksums
from trainer.studio.crashes import attempts_here
from trainer.studio.expiry import expiry
from trainer.studio.rows import prompt_home
from trainer.studio.store import Job, Store
from trainer.training.train import train_tune
from trainer.work.device_errors import DeviceLost, device_error
from trainer.work.errors import OF_PICTURES, OF_TRAINING, explain
from trainer.work.export import export_tune
from trainer.work.preparation import JobInterrupted, prepare_photos
from trainer.work.prompt_files import check_files
from trainer.work.prompt_models import find_models
from trainer.work.reporter import Reporter
from trainer.work.run_files import asked_args, has_begun

log = logging.getLogger("tunebooth.worker")
R = TypeVar("R", TuneRow, PromptRow, ExportRow)
REFUSALS = (InvalidRequest, AnalysisUnavailable, Unavailable, ModelChanged, Unreadable, JobRefused)
MAX_ATTEMPTS = 3  # a job that crashes the process so often without progress is not tried again
MAX_DEVICE_ERRORS = 2  # the same for fatal errors of the device


class JobRunner:
    """Runs jobs; keeps loaded models between two jobs."""

    def __init__(
        self, settings: Settings, store: Store, analyzer: PhotoAnalyzer, device: torch.device, stopping: threading.Event
    ) -> None:
        self._settings = settings
        self._store = store
        self._analyzer = analyzer
        self._device = device
        self._stopping = stopping
        self._renderer = Renderer(settings, device, analyzer)

    def run(self, job: Job) -> None:
        """Run a job, and record its result.

        Raises DiskProblem, then the job must wait; DeviceLost after a fatal error of the device.
        """
        try:
            reporter = Reporter(self._settings, self._store, job, self._stopping, self._device)
            if job.attempts >= MAX_ATTEMPTS:
                raise JobRefused(f"the app ended {job.attempts} times at this point; it is not tried again")
            if job.export_id is not None:
                self._export(job, job.export_id)
            elif job.prompt_id is None:
                self._train(job, reporter)
            else:
                self._render(job, job.prompt_id, reporter)
        except (JobInterrupted, Closed):
            self._requeue(job, reporter)
        except Exception as error:  # the edge of a job: it must end, also after an error of a library
            if fatal := device_error(error):
                log.exception("job %s: fatal error of the device; the app restarts", job)
                self._record_device_error(job, reporter, fatal)
                raise DeviceLost(str(self._device)) from error
            if problem := problem_of(error, self._settings.outputs):
                raise problem from error
            message = str(error)
            if not isinstance(error, REFUSALS):
                log.exception("job %s failed", job)
                message = explain(error, OF_PICTURES if job.prompt_id else OF_TRAINING)
            self._store.finish(job, "failed", error=message)

    def _record_device_error(self, job: Job, reporter: Reporter, fatal: str) -> None:
        """Warn, or let the job fail after its second crash without progress. fatal: the error, as a message.

        `claim` counts each attempt before it begins, so a job cannot restart the app for ever.
        """
        attempts = attempts_here(self._store, job)
        if attempts >= MAX_DEVICE_ERRORS:
            message = (
                f"{fatal} -- the app ended {attempts} times at this point, so the job is not tried again. If other"
                " jobs fail like this too, check the graphics card and its driver, or restart the computer"
            )
            self._store.finish(job, "failed", error=message)
        elif job.export_id is None:
            reporter.warn(f"{fatal} -- the app restarted and resumed the job")

    def _train(self, job: Job, reporter: Reporter) -> None:
        forget_peak(self._device)
        tune = self._must(self._tune_row(job.target[1]))
        self._renderer.release()
        config = self._fitted(tune)
        folder = self._settings.outputs / "tunes" / str(tune["id"])
        tune = prepare_photos(folder, self._store, self._analyzer, tune, config, reporter)
        base = self._base(tune)
        self._verify(*files_of(base))
        files = train_tune(tune, base, config, self._settings, self._device, reporter, self._preview(tune))
        if files is not None:
            reporter.stage("trained")
            end = datetime.now(UTC)
            ends = {"trained_at": stamp(end), "eta": stamp(end), "expires_at": expiry(self._settings, end)}
            made = checksums.of_folder(self._settings.outputs / "tunes" / str(tune["id"]), "model")
            with self._store.transaction():
                self._store.finish(job, "trained", files=files, progress=reporter.progress, **ends)
                checksums.note(self._store, tune["id"], made)
            if get_method(tune["method"]).LARGE:  # its states are several times the model, and no longer needed
                discard(self._settings.outputs / "tunes" / str(tune["id"]) / "state")
        else:
            self._requeue(job, reporter)

    def _requeue(self, job: Job, reporter: Reporter) -> None:
        """Requeue a stopped job if the app ends; otherwise it was canceled."""
        if self._stopping.is_set() and not self._store.cancel_wanted(*job.target):
            self._store.put_back(job)
            log.info("%s %s is paused; it resumes at the next start", job.target[0][:-1], job.target[1])
        else:
            self._store.finish(job, "canceled", eta=None, progress=reporter.progress)

    def _fitted(self, tune: TuneRow) -> TrainConfig:
        """The configuration, fitted to the card at the tune's first start. Raises JobRefused if none fits."""
        config = TrainConfig(**train_config.parse_args(tune["args"]))
        folder = self._settings.outputs / "tunes" / str(tune["id"])
        if has_begun(folder) and config.micro_batch:  # 0: it was never fitted
            return config  # a resumed run keeps its configuration
        free, branch, method = free_gib(self._device), tune["branch"], tune["method"]
        least = branch_file.least_gib(self._settings.presets, branch, method)
        if free < least:
            raise JobRefused(
                f"{branch} needs a card with {least:g} GiB of free memory; there are {free:.1f} GiB. Close what else"
                " uses the card, or train a smaller branch"
            )
        asked = asked_args(folder / "request.json")
        config = resolve.fit(
            self._settings.presets, config, branch=branch, model_type=method, asked=asked, free_gib=free
        )
        self._store.update("tunes", tune["id"], args=train_config.as_args(config))
        return config

    def _preview(self, tune: TuneRow) -> str:
        """The prompt of a run's previews: its first prompt, else the subject alone."""
        first = self._store.find("prompts", tune_id=tune["id"], oldest_first=True, limit=1)
        return plain(first[0], tune["characteristics"]) if first else f"{tune['token']} {tune['name']}"

    def _render(self, job: Job, prompt_id: int, reporter: Reporter) -> None:
        prompt = self._must(self._store.get("prompts", prompt_id))
        tune_id = prompt["tune_id"] or prompt["lora_id"]
        tune = self._tune_row(tune_id) if tune_id else None  # None: a prompt on a base that names no tune
        try:
            models = find_models(self._settings, self._store, prompt, tune, reporter)
            faces = [models.face.folder] if models.face else []
            self._verify(*files_of(models.base), *(one.model for one in models.loras), *faces)
            folder = self._settings.outputs / prompt_home(prompt)
            folder.mkdir(parents=True, exist_ok=True)
            characteristics = tune["characteristics"] if tune else {}
            inputs = folder / "inputs" / str(prompt_id)
            changed = check_files(prompt, inputs, self._settings.presets)
            plan = make_plan(prompt, characteristics, models.base.branch, inputs, self._settings.presets)
            files, warnings = self._renderer.render_prompt(prompt_id, plan, models, folder, reporter)
        except Stopped:
            if self._store.cancel_wanted("prompts", prompt_id):
                self._store.finish(job, "canceled")
            else:
                self._store.put_back(job)
            return
        message = self._must(self._store.get("prompts", prompt_id))["warnings"]
        warnings = [*message, *(warning for warning in [*changed, *warnings] if warning not in message)]
        reporter.progress["stage"] = "rendered"
        ended = {"progress": reporter.progress, "trained_at": now()}
        self._store.finish(job, "rendered", files=files, warnings=warnings, **ended)

    def _export(self, job: Job, export_id: int) -> None:
        export = self._must(self._store.get("exports", export_id))
        assert job.tune_id is not None, "an export has a tune"
        tune = self._must(self._tune_row(job.tune_id))
        base = bases.of_tune(self._settings, tune, self._tune_row)
        self._renderer.release()
        folder = self._settings.outputs / "tunes" / str(tune["id"])
        self._verify(*files_of(base), folder / "model")
        file = export_tune(tune, base, export["format"], self._settings)
        made = checksums.of_folder(folder, f"exports/{export['format']}")
        with self._store.transaction():
            self._store.finish(job, "exported", files=[file])
            checksums.note(self._store, tune["id"], made)

    def _verify(self, *used: Path | None) -> None:
        """Check the files of tunes that are about to be read. Raises ModelChanged."""
        checksums.verify(self._store, self._settings.outputs, *used)

    def _tune_row(self, tune_id: int) -> TuneRow | None:
        return self._store.get("tunes", tune_id)

    def _base(self, tune: TuneRow) -> Base:
        """The base that a tune is trained on."""
        return bases.resolve(self._settings, tune["base_id"], tune["branch"], self._tune_row)

    @staticmethod
    def _must(row: R | None) -> R:
        assert row is not None, "a job is deleted together with its rows"
        if columns := row.get("broken"):
            raise Unreadable(f"the database is damaged: {' and '.join(columns)} cannot be read. Send the request again")
        return row


def files_of(base: Base) -> list[Path | None]:
    """What is read of a base: its weights, the LoRA on it, and what has the parts that its file lacks."""
    return [base.path, base.model, *(files_of(base.rest) if base.rest else [])]
