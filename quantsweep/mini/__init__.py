"""A family of very small language models that ships with quantsweep.

Seven models in two architectures (GPT-NeoX as in Pythia, OPT), 0.3 to 6 million parameters, trained
from scratch on public-domain English and the glosses of WordNet, and three lm-eval tasks made from
held-out text of the same sources. A study over them needs no network, no hub account and no GPU.

They are good for: a quickstart that ends in minutes, tests against weights that were *trained* (the
outliers and the sensitivity of random weights are those of noise), and scaling curves in miniature.
They are not good for a claim about large models. `CARD.md` beside this file holds sources, licences,
recipe and measured numbers; `card.json` holds the numbers for programs.

Importing this package loads nothing heavy: it knows names and paths only.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODELS_DIR = ROOT / "models"
TASKS_DIR = ROOT / "tasks"
CALIBRATION_TEXT = ROOT / "text" / "calibration.txt"
EVALUATION_TEXT = ROOT / "text" / "evaluation.txt"

# Within a family from small to large; the order is the order of every table in the card.
NEOX_MODELS = ("mini-neox-0.3m", "mini-neox-0.9m", "mini-neox-2.2m", "mini-neox-6.0m")
OPT_MODELS = ("mini-opt-0.4m", "mini-opt-1.1m", "mini-opt-3.8m")
MODEL_NAMES = NEOX_MODELS + OPT_MODELS
TASK_NAMES = ("mini_cloze", "mini_continuation", "mini_ppl")


def model_path(name: str) -> Path:
    """Folder of the bundled model `name`, to hand to `from_pretrained`.

    Raises ValueError naming the choices when there is no such model.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"there is no bundled model {name!r}; the bundled models are {', '.join(MODEL_NAMES)}")
    return MODELS_DIR / name
