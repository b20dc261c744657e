"""Parts of a checkpoint that are none of the language model that is scored, and are left out of it by design.

    model.layers.46.…   of a GLM-4.5 with 46 layers: guesses the token after the next (`num_nextn_predict_layers`: 1), from the
                        last hidden state and an embedding, which its `eh_proj` joins
    mtp.…               the same under a name of its own
    model.visual.…      sees, in a checkpoint of which the language model alone is built

transformers passes over names by lists of its own, whatever lies there.  Here a layer is such a part only where the configuration
says how many there are, and each has what makes it one; planning says so.  Everything else that would be dropped is refused when
the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NEXT_TOKENS = re.compile(r"^(model\.)?mtp\w*\.")
_OTHER_SENSES = re.compile(r"^(model\.)?(visual|vision\w*|audio\w*|talker|token2wav|code2wav)\.")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the part that decodes text."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def guesses_next_tokens(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Those of some tensors' names that belong to layers behind the last, which guess tokens beyond the next."""
    names, text = list(names), text_part(config)
    depth, wanted = text.get("num_hidden_layers"), text.get("num_nextn_predict_layers")
    behind = {name: int(found[1]) for name in names if (found := _LAYER.search(name)) and isinstance(depth, int) and int(found[1]) >= depth}
    joining = {number for name, number in behind.items() if ".eh_proj." in name}
    are_said = isinstance(depth, int) and isinstance(wanted, int) and set(behind.values()) == joining == set(range(depth, depth + wanted))
    return {name for name in names if (are_said and name in behind) or _NEXT_TOKENS.match(name)}


def is_of_another_sense(name: str) -> bool:
    """True for a tensor of a part that sees, hears or speaks."""
    return _OTHER_SENSES.match(name) is not None
