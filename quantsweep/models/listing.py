"""Which layers of a model would be quantized, told from its config.json alone: the model is built without memory for weights.

    python -m quantsweep.models.listing ASKED ANSWERED      two JSON files: [[folder, unquantized patterns], …] and its answers

Planning imports no torch, so it asks this process (`quantsweep.checkpoints.planned_layers`); the layers are found by the very code that
finds them in a loaded model.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantsweep.errors import ModelError
from quantsweep.models.blocks import quantizable_linears
from quantsweep.storage.files import write_text


def layers_of(folder: str, unquantized: list[str]) -> dict[str, int]:
    """How many layers there are of each name, numbers in it written as `*`; raises ModelError as loading would."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # a configuration is data of users
        raise ModelError(f"no model can be built of {folder}/config.json: {type(error).__name__}: {error}") from error
    names = quantizable_linears(model, tuple(unquantized))
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def main(asked: str, answered: str) -> int:
    """Answer each question: its layers, or why there are none."""
    answers: list[dict[str, Any]] = []
    for folder, unquantized in json.loads(Path(asked).read_text()):
        try:
            answers.append({"layers": layers_of(folder, unquantized)})
        except ModelError as error:
            answers.append({"refused": str(error)})
    write_text(Path(answered), json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
