"""The inspection of one photo: the request and the answer of POST /images/inspect."""

from __future__ import annotations

from pydantic import BaseModel, Field

from trainer.contract.fields import ClassName, OptionalUrl, Request
from trainer.contract.photos import Face


class InspectRequest(Request):
    """One photo, as a file or as an address, and the class name that it should show."""

    name: ClassName
    file: object = Field(None, exclude=True)
    file_url: OptionalUrl = None

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return ("authenticity_token",)  # of the form in the hosted service's sample


class Inspection(BaseModel):
    """What is seen in the photo: the hosted service's keys, then ours. What is not known is left out.

    Its clients take each text for a characteristic of the subject and each true for a flaw, so ours are neither.
    """

    name: str = Field(description="the class name; empty: it is of people, and no face was found")
    blurry: bool
    low_resolution: bool
    includes_multiple_people: bool | None = None
    width: int
    height: int
    faces: list[Face] | None = Field(None, description="left out: no face was looked for")
    warnings: list[str]
