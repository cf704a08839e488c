"""The change of a prompt, as the hosted service documents it: the pack and the workspace that it is filed under."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.contract.errors import InvalidRequest, words
from trainer.contract.fields import parse_request
from trainer.contract.prompts import Prompt, PromptChange
from trainer.studio.prompts import get_prompt
from trainer.studio.rows import Services

WORKSPACE = "workspace_id"
NO_FILING = "a pack is made of all prompts of a tune, with POST /tunes/ID/pack"
NO_WORKSPACES = "there are no workspaces here"


def change_prompt(
    services: Services, prompt_id: int, data: Mapping[str, object], place_id: int | None = None
) -> Prompt:
    """The prompt, with a warning for each parameter: all are accepted, and none has an effect.

    place_id: a tune or base that it must be listed under. Raises NotFound; InvalidRequest for other parameters.
    """
    prompt = get_prompt(services, prompt_id, place_id)
    parse_request(PromptChange, data)
    if not data:
        raise InvalidRequest({"prompt": [f"must have at least one of {words(PromptChange.model_fields)}"]})
    why = {name: NO_WORKSPACES if name == WORKSPACE else NO_FILING for name in data}
    prompt.warnings += [f"{name} is accepted and has no effect: {reason}" for name, reason in why.items()]
    return prompt
