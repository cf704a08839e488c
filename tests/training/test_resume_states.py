"""Where a run begins, and what its user is told, when its states or what they were trained with have changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.training import config_of
from trainer.config.train_config import TrainConfig
from trainer.files import Unreadable
from trainer.training import states
from trainer.training.run_inputs import RunInputs, TrainedPicture
from trainer.training.state_check import sha256

PHOTOS = {
    f"photo 00{number}": TrainedPicture(name=name, sha256=name, caption="a dog")
    for number, name in enumerate(("rex.jpg", "lying.jpg", "running.jpg", "far.jpg", "near.jpg"))
}
INPUTS = RunInputs(
    tune=1, base="the base", earlier="", pictures=PHOTOS, class_pictures="", software="torch 3", device="cpu in float32"
)
SETTINGS = config_of(steps=9)
ANEW = "training begins again at step 0 of 9, because no saved state can be used"
OLDER = "training goes on at step 3 of 9, because a later saved state cannot be used"
PYTHON = (
    "Error",
    "Exception",
    "Traceback",
    "None",
    "[Errno",
    "tensor a",
    "KeyError",
    "EOF",
    "pydantic",
    "Input should",
)


class TrainedWeight:
    """One weight with its optimizer, and the states of a run of it at steps 3 and 6."""

    def __init__(self, states: Path, shape: tuple[int, ...] = (2, 2), name: str = "w") -> None:
        self.states, self.name = states, name
        self.weight = torch.nn.Parameter(torch.zeros(shape))
        self.optimizer = torch.optim.AdamW([self.weight])

    @property
    def params(self) -> dict[str, torch.Tensor]:
        return {self.name: self.weight}

    def save(self, step: int, inputs: RunInputs = INPUTS, settings: TrainConfig = SETTINGS) -> None:
        self.weight.grad = torch.ones_like(self.weight)
        self.optimizer.step()
        states.save(self.states, step, self.optimizer, self.params, settings, inputs=inputs)

    def begin(self, inputs: RunInputs = INPUTS, settings: TrainConfig = SETTINGS, lost: bool = False) -> states.Begun:
        return states.begin(self.states, self.optimizer, self.params, settings, inputs, lost)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = TrainedWeight(tmp_path / "state")
    run.save(3)
    run.save(6)
    return tmp_path / "state"


def both(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil_both(states: Path) -> None:
        for step in (3, 6):
            spoil(states / f"step-{step:06d}")

    return spoil_both


def newest(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda states: spoil(states / "step-000006")


def nothing(_: Path) -> None:
    """The states stay as they are."""


def cut(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).write_bytes((state / name).read_bytes()[:-9])


def delete(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).unlink()


def folder_instead(state: Path) -> None:
    (state / "state.safetensors").unlink()
    (state / "state.safetensors").mkdir()


def manifest(**changes: Any) -> Callable[[Path], None]:
    def spoil(state: Path) -> None:
        file = state / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Other tensors in a state, with the right digest in its manifest."""

    def spoil(state: Path) -> None:
        file = state / "state.safetensors"
        save_file(change(load_file(file)), file)
        manifest(sha256=sha256(file))(state)

    return spoil


def not_tensors(state: Path) -> None:
    (state / "state.safetensors").write_bytes(b"not tensors")
    manifest(sha256=sha256(state / "state.safetensors"))(state)


def without(*keys: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda found: {key: value for key, value in found.items() if key not in keys}


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (cut("state.safetensors"), "state.safetensors is damaged"),
    (delete("state.safetensors"), "state.safetensors is missing"),
    (folder_instead, "state.safetensors is missing"),
    (not_tensors, "state.safetensors is damaged"),
    (cut("manifest.json"), "manifest.json is damaged"),
    (delete("manifest.json"), "manifest.json is missing"),
    (manifest(schema=99), "another version of Tunebooth has written it"),
    (manifest(step=5), "it says that it is of step 5"),
    (manifest(inputs=INPUTS.model_dump() | {"tune": 7}), "it is of tune 7"),
    (manifest(inputs=INPUTS.model_dump() | {"base": "another"}), "the base has other weights than then"),
    (manifest(inputs=INPUTS.model_dump() | {"earlier": "a"}), "the LoRA that the run starts from is another one"),
    (tensors(lambda found: found | {"weight/w": torch.zeros(3, 2)}), "its weights have other shapes"),
    (tensors(lambda found: {key.replace("/w", "/v"): value for key, value in found.items()}), "of other layers"),
    (tensors(lambda found: found | {"weight/v": torch.zeros(2, 2)}), "of other layers"),
    (tensors(without("exp_avg/w")), "its optimizer part does not fit"),
    (tensors(lambda found: found | {"exp_avg/w": torch.zeros(3)}), "its optimizer part does not fit"),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_state_that_is_not_used_gives_way_to_the_one_before_or_to_step_0_and_the_user_is_told_why(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    for at, spoiled, step, begins in ((folder, newest, 3, OLDER), (tmp_path / "other", both, 0, ANEW)):
        spoiled(spoil)(at)
        begun = TrainedWeight(at).begin()
        (message,) = begun.messages
        assert begun.step == step
        assert message.startswith(begins) and words in message and "step 6" in message
        assert not any(word in message for word in PYTHON)


def changed(**values: object) -> RunInputs:
    return INPUTS.model_copy(update=values)


def pictures(**values: Any) -> RunInputs:
    """The inputs with values of rex.jpg changed."""
    rex = PHOTOS["photo 000"].model_copy(update=values)
    return changed(pictures=PHOTOS | {"photo 000": rex})


LESS = {key: photo for key, photo in PHOTOS.items() if photo.name != "rex.jpg"}
NEW = PHOTOS | {"photo 009": TrainedPicture(name="new.jpg", sha256="new", caption="a dog")}
BUCKETS = {key: photo.model_copy(update={"sha256": f"other {photo.sha256}"}) for key, photo in PHOTOS.items()}
GOES_ON: list[tuple[RunInputs, TrainConfig, str]] = [
    (changed(pictures=LESS), SETTINGS, "rex.jpg is no longer trained"),
    (changed(pictures=NEW), SETTINGS, "new.jpg is new"),
    (pictures(sha256="other"), SETTINGS, "rex.jpg was changed"),
    (changed(pictures=BUCKETS), SETTINGS, "rex.jpg, lying.jpg, running.jpg and 2 more were changed"),
    (pictures(caption="a cat"), SETTINGS, "the caption of rex.jpg was changed"),
    (pictures(masks={"face": "m"}), SETTINGS, "the mask of rex.jpg was changed"),
    (changed(class_pictures="others"), SETTINGS, "the class pictures were changed"),
    (changed(software="torch 4"), SETTINGS, "torch 3 then, torch 4 now"),
    (changed(device="cpu in bfloat16"), SETTINGS, "cpu in float32 then, cpu in bfloat16 now"),
    (INPUTS, config_of(steps=9, micro_batch=1), "micro_batch was 2 and is 1"),
]


@pytest.mark.parametrize(("inputs", "settings", "words"), GOES_ON, ids=[words for *_, words in GOES_ON])
def test_a_run_with_other_data_or_software_goes_on_and_the_user_is_told_what_changed(
    folder: Path, inputs: RunInputs, settings: TrainConfig, words: str
) -> None:
    run = TrainedWeight(folder)
    begun = run.begin(inputs, settings)
    assert begun.step == 6 and run.weight.abs().min() > 0
    assert begun.messages == [
        f"training goes on at step 6 of 9, with changes ({words}): the model will differ from that of an uninterrupted"
        " run"
    ]
    run.save(7, inputs, settings)
    assert TrainedWeight(folder).begin(inputs, settings) == states.Begun(7, 0)  # it is told once


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (config_of(steps=9, rank=4), "rank was 2 and is 4"),
        (config_of(steps=12), "steps was 9 and is 12"),
        (config_of(steps=9, targets="cross_attention"), "targets was all and is cross_attention"),
        (config_of(steps=9, optimizer="adafactor"), "optimizer was adamw and is adafactor"),
        (config_of(steps=9, trained_dtype="bfloat16", optimizer="adafactor"), "trained_dtype was float32"),
    ],
)
def test_a_run_with_other_settings_begins_again(folder: Path, settings: TrainConfig, words: str) -> None:
    begun = TrainedWeight(folder).begin(settings=settings)
    (message,) = begun.messages
    assert begun.step == 0 and words in message
    assert message.startswith(f"training begins again at step 0 of {settings.steps}, because no saved state can be")


def test_a_run_whose_states_are_gone_begins_again_and_says_so(folder: Path) -> None:
    shutil.rmtree(folder)
    assert TrainedWeight(folder).begin(lost=True).messages == [
        "training begins again at step 0 of 9, because its saved states are missing"
    ]


def test_nothing_is_told_where_nothing_changed_and_at_the_first_start(folder: Path, tmp_path: Path) -> None:
    assert TrainedWeight(folder).begin() == states.Begun(6, 0)
    assert TrainedWeight(tmp_path / "new").begin() == states.Begun(0, 0)


def test_a_state_of_an_older_version_is_used_and_only_what_is_known_is_compared(folder: Path) -> None:
    for known, expected in ({"torch": "3"}, 0), ({"torch": "2"}, 1), ({"torch": None}, 0):
        both(manifest(inputs=None, **known))(folder)
        begun = TrainedWeight(folder).begin()
        assert (begun.step, len(begun.messages)) == (6, expected)


def test_a_state_that_may_not_be_read_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def forbid(self: Path, *args: Any, **more: Any) -> Any:
        if self.name == forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **more)

    monkeypatch.setattr(Path, "open", forbid)
    for forbidden in ("manifest.json", "state.safetensors"):
        words = rf"{forbidden} cannot be read: Permission denied \(in state/step-000006\). Allow Tunebooth to read it"
        with pytest.raises(Unreadable, match=words):
            TrainedWeight(folder).begin()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000006"]


def test_a_file_where_the_states_belong_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"mine")
    with pytest.raises(Unreadable, match="state in the tune's folder is a file, where a folder should be"):
        TrainedWeight(tmp_path / "state").begin()
    assert (tmp_path / "state").read_bytes() == b"mine"


def test_a_run_that_cannot_go_back_fails_in_words(folder: Path) -> None:
    both(cut("state.safetensors"))(folder)
    run = TrainedWeight(folder)
    with pytest.raises(Unreadable, match=r"cannot go back to a saved state \(state.safetensors is damaged.*Resume"):
        states.go_back(folder, run.optimizer, run.params, SETTINGS, INPUTS)
