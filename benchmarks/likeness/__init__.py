"""Likeness of tunes on branch fast, and what they keep of the base, as a table over the ten subjects.

    uv run python -m benchmarks.likeness                     # all ten, about ten minutes on two cores
    uv run python -m benchmarks.likeness dog teapot --args "lr=2e-3"

Likeness: each of eight pictures of `TOKEN CLASS` votes for the subject of its nearest photo, by root colour histograms
of the whole and of its centre (the L2 distance of roots is Hellinger's). The photos themselves, left out one at a time,
give the upper limit. Rest: 20 captions that are not in any training data, without the token, drawn with and without the
tune; the score is the share of right colours and right places (benchmarks/fast_base/measure.py). Class: 20 pictures of
the class name only; the share that is not classified as the subject.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from benchmarks import photos
from benchmarks.fast_base import measure
from trainer.branches.protocol import load_branch
from trainer.config import branch_file
from trainer.contract.photos import Upload
from trainer.files import read_json_lines
from trainer.library import bases
from trainer.names import DEMO_BRANCH, FORMATS
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.decoder import Decoder
from trainer.settings import read_settings
from trainer.studio import tunes
from trainer.studio.rows import Services, tune_folder
from trainer.studio.store import Store
from trainer.work.job_runner import JobRunner

TOKEN = "ohwx"
PICTURES = 8
REST = 20
NEAR = 0.1  # of the base's score: largest loss of the rest by a tune
SEED = 1
BINS = 6  # for each of red, green and blue

Pixels = NDArray[np.uint8]


def features(picture: Pixels) -> NDArray[np.float64]:
    """Root histograms of the colours of a picture (64, 64, 3) and of its centre (32, 32, 3), concatenated."""
    return np.concatenate([root_histogram(picture), root_histogram(picture[16:48, 16:48])])


def root_histogram(pixels: Pixels) -> NDArray[np.float64]:
    bins = pixels.reshape(-1, 3).astype(int) * BINS // 256
    counts = np.bincount(bins @ [BINS * BINS, BINS, 1], minlength=BINS**3)
    roots: NDArray[np.float64] = np.sqrt(counts / counts.sum())
    return roots


def vote(picture: Pixels, of_photos: Iterable[tuple[str, NDArray[np.float64]]]) -> str:
    """The subject of the nearest photo."""
    mine = features(picture)
    return min(of_photos, key=lambda photo: float(np.linalg.norm(photo[1] - mine)))[0]


def described(shown: dict[str, list[Pixels]]) -> list[tuple[str, NDArray[np.float64]]]:
    return [(subject, features(photo)) for subject, pictures in shown.items() for photo in pictures]


def left_one_out(shown: dict[str, list[Pixels]]) -> dict[str, Counter[str]]:
    """The votes of the photos themselves, each without itself: the upper limit of the measure."""
    everything, votes = described(shown), {subject: Counter[str]() for subject in shown}
    pixels = [photo for pictures in shown.values() for photo in pictures]
    for number, (subject, _) in enumerate(everything):
        votes[subject][vote(pixels[number], everything[:number] + everything[number + 1 :])] += 1
    return votes


class Studio:
    """The app without its page: tunes use the app's services and worker."""

    def __init__(self, outputs: Path) -> None:
        self.settings = read_settings(outputs=outputs, models=outputs / "models", device="cpu")
        self.store = Store(outputs)
        self.decoder = Decoder(self.settings)
        self.analyzer = PhotoAnalyzer(self.settings)
        self.services = Services(self.settings, self.store, self.decoder, self.analyzer)

    def close(self) -> None:
        self.analyzer.close()
        self.decoder.close()
        self.store.close()

    def tune(self, subject: str, args: str = "", model_type: str = "lora") -> tuple[Path, float]:
        """Train a subject. Returns the folder of its model, and the seconds from the first step to the last."""
        uploads = [Upload(file.name, file) for file in photos.files(subject)]
        request = {
            "title": f"{subject} {model_type} {args}",
            "name": photos.CLASSES[subject],
            "branch": "fast",
            "token": TOKEN,
            "args": args,
        }
        request["model_type"] = model_type
        tune = tunes.create_tune(self.services, request, uploads)[0]
        job = self.store.claim()
        assert job is not None and job.tune_id == tune.id
        JobRunner(self.settings, self.store, self.analyzer, torch.device("cpu"), threading.Event()).run(job)
        done = tunes.get_tune(self.services, tune.id)
        assert done.status == "trained", done.error
        folder = tune_folder(self.services, tune.id)
        lines = [line for line in read_json_lines(folder / "log.jsonl") if "loss" in line]
        return folder / "model", lines[-1]["seconds"] - lines[0]["seconds"]


def load_base() -> Any:
    """The base in a stock pipeline, as a user of a downloaded tune loads it."""
    folder = bases.PROGRAM / "fast_base"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_tune(model: Path) -> Any:
    """The base with a tune: stock calls, except for checkpoints of this base, which only the branch can load."""
    if (model / FORMATS["checkpoint"]).exists():
        base = replace(bases.resolve(read_settings(), None, DEMO_BRANCH), path=model / FORMATS["checkpoint"])
        return load_branch(base, torch.device("cpu"), model.parent / "cache").pipeline
    pipeline = load_base()
    pipeline.load_lora_weights(model, weight_name=FORMATS["kohya"])
    if (model / FORMATS["embeddings"]).exists():
        pipeline.load_textual_inversion(load_file(model / FORMATS["embeddings"])["clip_l"], token=TOKEN)
    return pipeline


def render(pipeline: Any, prompts: Sequence[str], seed: int) -> list[Pixels]:
    """A picture of each prompt, (64, 64, 3), with the preset's [render]."""
    defaults = branch_file.render_config(Path(__file__).parents[2] / "presets", "fast")
    return measure.render(pipeline, prompts, defaults.steps, defaults.cfg_scale, seed)


def pictures_of(pipeline: Any, subject: str) -> list[Pixels]:
    return render(pipeline, [f"{TOKEN} {photos.CLASSES[subject]}"] * PICTURES, SEED)


def kept(pipeline: Any, pairs: Sequence[tuple[str, Any]]) -> float:
    """The share of right colours and right places over captions without the token."""
    marks = measure.score(render(pipeline, [caption for caption, _ in pairs], SEED), [scene for _, scene in pairs])
    return (marks["colour"] + marks["place"]) / 2


def class_kept(pipeline: Any, subject: str, of_photos: Sequence[tuple[str, NDArray[np.float64]]]) -> float:
    """The share of pictures of the class, without the token, that are not classified as the subject."""
    drawn = render(pipeline, [f"a photo of {photos.CLASSES[subject]}"] * REST, SEED)
    return sum(vote(picture, of_photos) != subject for picture in drawn) / len(drawn)


def is_right(votes: Counter[str], subject: str) -> bool:
    """Whether the subject has more votes than any other."""
    others = [count for other, count in votes.items() if other != subject]
    return votes[subject] > max(others, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=list(photos.CLASSES), help="names of folders; default: all ten")
    parser.add_argument("--args", default="", help="of every tune, as the API's `args`")
    parser.add_argument("--model-type", default="lora", choices=["lora", "pti", "checkpoint"])
    parser.add_argument("--sheets", type=Path, help="folder for a picture of the eight renders of each subject")
    options = parser.parse_args()
    shown = photos.read_photos()
    of_photos, ceiling, pairs = described(shown), left_one_out(shown), measure.held_back(REST, SEED)
    base = kept(load_base(), pairs)
    print(f"votes for the subject; rest: the base's score is {base:.0%}\n")
    print(f"{'':20}{'photos':>8}{'base':>8}{'tune':>8}{'rest':>8}{'class':>8}{'seconds':>9}")
    right, rests = Counter[str](), []
    with tempfile.TemporaryDirectory() as folder, closing(Studio(Path(folder))) as studio:
        for subject in options.subjects:
            model, seconds = studio.tune(subject, options.args, options.model_type)
            row, untuned = f"{subject:20}", pictures_of(load_base(), subject)
            pipeline = load_tune(model)
            tuned = pictures_of(pipeline, subject)
            rests.append(kept(pipeline, pairs))
            of_class = class_kept(pipeline, subject, of_photos)
            votes = {
                "photos": ceiling[subject],
                "base": Counter(vote(picture, of_photos) for picture in untuned),
                "tune": Counter(vote(picture, of_photos) for picture in tuned),
            }
            for name, counted in votes.items():
                right[name] += is_right(counted, subject)
                row += f"{counted[subject]:>5}/{counted.total()}{'+' if is_right(counted, subject) else ' '}"
            print(f"{row}{rests[-1]:>8.0%}{of_class:>8.0%}{seconds:>9.1f}", flush=True)
            if options.sheets:
                write_sheet([shown[subject], untuned, tuned], options.sheets / f"{subject}.png")
    count = len(options.subjects)
    print(f"{'right':20}" + "".join(f"{right[name]:>5}/{count} " for name in ("photos", "base", "tune")), end="")
    near = sum(rest >= base - NEAR for rest in rests)
    print(f"{np.mean(rests):>8.0%}, {near}/{count} within {NEAR:.0%} of the base's")


def write_sheet(rows: Sequence[Sequence[Pixels]], file: Path) -> None:
    """A row each: photos, the base's pictures, the tune's pictures."""
    sheet = np.zeros((64 * len(rows), 64 * PICTURES, 3), np.uint8)
    for top, row in enumerate(rows):
        for left, picture in enumerate(row[:PICTURES]):
            sheet[64 * top : 64 * top + 64, 64 * left : 64 * left + 64] = picture
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(file)
