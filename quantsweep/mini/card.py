"""Measure everything that the card says, write `card.json`, and render `CARD.md` from it.

    python -m quantsweep.mini.card             # measures: about 25 minutes on two cores
    python -m quantsweep.mini.card --render    # only renders CARD.md from card.json
    python -m quantsweep.mini.card --models mini-neox-0.3m    # measures some models anew, keeps the rest

`card.json` is the source of every number in `CARD.md`; a test renders it again and compares.
"""

# ruff: noqa: E501 - the long lines are the sentences and tables of the card

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from safetensors import safe_open

from quantsweep.mini import MODEL_NAMES, NEOX_MODELS, OPT_MODELS, ROOT, TASK_NAMES, model_path
from quantsweep.mini.baselines import chance, most_frequent_word, task_texts, trigram_bits_per_byte
from quantsweep.mini.corpus import (
    SOURCES,
    SPLIT_SEED,
    Section,
    Split,
    ngrams,
    overlap_share,
    sha256,
    split_corpus,
    split_raw,
)
from quantsweep.mini.evaluate import run_lm_eval, summarise
from quantsweep.mini.family import recipe
from quantsweep.mini.train import BATCH_WINDOWS, LOG_PATH, WARMUP_STEPS, WEIGHT_DECAY, encode, training_tokens
from quantsweep.mini.vocabulary import CONTEXT_LENGTH, END_OF_TEXT, VOCABULARY_SIZE
from quantsweep.texts.ngrams import OVERLAP_WORDS

CARD_JSON = ROOT / "card.json"
CARD_MD = ROOT / "CARD.md"
REFERENCE_LIMIT = 20
GATE_ERRORS = 5

Card = dict[str, Any]


# ------------------------------------------------------------------------------------------------ measuring


def measure_data() -> Card:
    """Sources, splits, overlap and token counts."""
    raw, splits = split_raw(), split_corpus()
    train13, train8 = ngrams(splits["train"], OVERLAP_WORDS), ngrams(splits["train"], 8)

    def overlap(sections: Mapping[Split, Sequence[Section]], split: Split) -> dict[str, float]:
        return {
            "13gram": overlap_share(sections[split], train13, OVERLAP_WORDS),
            "8gram": overlap_share(sections[split], train8, 8),
        }

    sources = [
        {
            "name": s.name, "title": s.title, "origin": s.origin, "licence": s.licence, "unit": s.unit,
            "file": f"corpus/{s.path.name}", "sha256": sha256(s.path), "file_bytes": s.path.stat().st_size,
            "bytes": {split: sum(len(x.text.encode()) for x in sections if x.source == s.name) for split, sections in splits.items()},
        }
        for s in SOURCES
    ]  # fmt: skip
    inaugural = [x for sections in raw.values() for x in sections if x.source == "nltk_inaugural"]
    sotu = ngrams([x for sections in raw.values() for x in sections if x.source == "sotu"], OVERLAP_WORDS)
    return {
        "seed": SPLIT_SEED,
        "sources": sources,
        "splits": {
            split: {
                "sections": len(sections),
                "bytes": sum(len(x.text.encode()) for x in sections),
                "tokens": len(encode([x.text for x in sections])),
            }
            for split, sections in splits.items()
        },
        "overlap_with_training": {
            "evaluation_before": overlap(raw, "evaluation"),
            "evaluation_after": overlap(splits, "evaluation"),
            "calibration_before": overlap(raw, "calibration"),
            "calibration_after": overlap(splits, "calibration"),
        },
        "inaugural_13grams_in_sotu": overlap_share(inaugural, sotu, OVERLAP_WORDS),
    }


def measure_tasks() -> Card:
    """Sizes of the tasks and the files' hashes."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in ("cloze", "continuation", "ppl"):
        with (ROOT / "tasks" / "data" / f"{name}.jsonl").open(encoding="utf-8") as lines:
            rows[name] = [json.loads(line) for line in lines]
    ranks = ranks_in_length(rows["continuation"])
    return {
        "examples": {name: len(found) for name, found in rows.items()},
        "by_source": {name: {s.name: sum(row["source"] == s.name for row in found) for s in SOURCES} for name, found in rows.items()},
        "cloze_repeated_share": sum(row["repeated"] for row in rows["cloze"]) / len(rows["cloze"]),
        "continuation_ranks_in_characters": ranks,
        "continuation_ranks_in_words": ranks_in_length(rows["continuation"], lambda text: len(text.split())),
        "continuation_second_shortest_acc": ranks[1] / sum(ranks),
        "ppl_longer_than_context": sum(len(encode([row["text"]])) > CONTEXT_LENGTH for row in rows["ppl"]),
        "sha256": {name: sha256(ROOT / "tasks" / "data" / f"{name}.jsonl") for name in rows},
    }


def ranks_in_length(items: Sequence[Mapping[str, Any]], length: Callable[[str], int] = len) -> list[float]:
    """How often the true ending is the shortest, second, third, longest by `length`; ties are split evenly."""
    counts = [0.0] * 4
    for item in items:
        lengths = [length(choice) for choice in item["choices"]]
        true = lengths[item["label"]]
        shorter, equal = sum(n < true for n in lengths), lengths.count(true)
        for rank in range(shorter, shorter + equal):
            counts[rank] += 1 / equal
    return [round(count, 6) for count in counts]


def measure_baselines() -> Card:
    """Trigram, most frequent word, chance."""
    word, frequent = most_frequent_word(task_texts("cloze"))
    num_continuation = sum(1 for _ in (ROOT / "tasks" / "data" / "continuation.jsonl").open(encoding="utf-8"))
    return {
        "trigram_bits_per_byte": asdict(trigram_bits_per_byte(training_tokens(), task_texts("ppl"))),
        "most_frequent_last_word": word,
        "most_frequent_last_word_acc": asdict(frequent),
        "continuation_chance": asdict(chance(4, num_continuation)),
    }


def count_parameters(name: str) -> dict[str, int]:
    """All parameters, and those outside the embeddings (tokens, and OPT's positions)."""
    sizes: dict[str, int] = {}
    with safe_open(model_path(name) / "model.safetensors", framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a mapping
            sizes[key] = math.prod(tensors.get_slice(key).get_shape())
    embeddings = sum(n for key, n in sizes.items() if "embed" in key)
    return {"all": sum(sizes.values()), "non_embedding": sum(sizes.values()) - embeddings}


def measure_model(name: str) -> Card:
    """Recipe, size, hash, loss curve and lm-eval results of one model."""
    with LOG_PATH.open(encoding="utf-8", newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["model"] == name]
    reference = summarise(run_lm_eval(name, limit=REFERENCE_LIMIT))["bits_per_byte"]
    return {
        "recipe": asdict(recipe(name)),
        "parameters": count_parameters(name),
        "sha256": sha256(model_path(name) / "model.safetensors"),
        "steps": int(curve[-1]["step"]),
        "tokens": int(curve[-1]["tokens"]),
        "final_validation_loss": float(curve[-1]["validation_loss"]),
        "results": {metric: asdict(value) for metric, value in summarise(run_lm_eval(name)).items()},
        f"bits_per_byte_first_{REFERENCE_LIMIT}": reference.value,
    }


def saved_with() -> str:
    """The transformers version in the models' config.json; one for all."""
    texts = [(model_path(name) / "config.json").read_text(encoding="utf-8") for name in MODEL_NAMES]
    (version,) = {str(json.loads(text)["transformers_version"]) for text in texts}
    return version


def judge(card: Card) -> dict[str, bool]:
    """The gates that the family was to pass."""

    def values(family: Sequence[str], metric: str) -> list[float]:
        return [card["models"][name]["results"][metric]["value"] for name in family]

    def clears(name: str, metric: str, bar: float) -> bool:
        result = card["models"][name]["results"][metric]
        return bool(result["value"] - GATE_ERRORS * result["standard_error"] > bar)

    baselines = card["baselines"]
    gates: dict[str, bool] = {}
    for label, family in (("gpt-neox", NEOX_MODELS), ("opt", OPT_MODELS)):
        bits = values(family, "bits_per_byte")
        gates[f"{label}: bits per byte fall strictly with size"] = all(a > b for a, b in pairwise(bits))
        gates[f"{label}: the largest beats the trigram in bits per byte"] = bits[-1] < baselines["trigram_bits_per_byte"]["value"]
        for metric, bar in (
            ("continuation_acc", baselines["continuation_chance"]["value"]),
            ("cloze_acc", baselines["most_frequent_last_word_acc"]["value"]),
        ):
            found = values(family, metric)
            gates[f"{label}: {metric} rises with size"] = all(a < b for a, b in pairwise(found))
            gates[f"{label}: {metric} of the largest exceeds its baseline by {GATE_ERRORS} standard errors"] = clears(
                family[-1], metric, bar
            )
    return gates


# ------------------------------------------------------------------------------------------------ rendering


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def pm(estimate: Mapping[str, float], digits: int, scale: float = 1.0) -> str:
    """`value ± standard error`."""
    return f"{estimate['value'] * scale:.{digits}f} ± {estimate['standard_error'] * scale:.{digits}f}"


def render(card: Card) -> str:
    """The text of CARD.md."""
    return "\n\n".join([_head(card), _results(card), _data(card), _tasks(card), _recipe(card), _curves(card), _limits(card)]) + "\n"


def _head(card: Card) -> str:
    models = card["models"]
    total = sum(model["parameters"]["all"] for model in models.values())
    return f"""# The bundled miniature models

Seven language models of 0.3 to 6 million parameters in two architectures, trained from scratch on {card["data"]["splits"]["train"]["tokens"]:,}
tokens of public-domain English and WordNet's glosses, with one tokenizer ({VOCABULARY_SIZE:,} entries) and three lm-eval tasks. They exist
so that a sweep runs from a clone without a network, and so that tests meet weights that were trained. Together {total:,} parameters.

This page is rendered from [card.json](card.json) by `python -m quantsweep.mini.card --render`; do not edit it. Licences:
[LICENSES.md](LICENSES.md)."""


def _results(card: Card) -> str:
    rows = []
    for name, model in card["models"].items():
        r, p = model["results"], model["parameters"]
        rows.append([
            f"`{name}`", f"{p['all']:,}", f"{p['non_embedding']:,}", pm(r["bits_per_byte"], 3), pm(r["cloze_acc"], 1, 100),
            pm(r["continuation_acc"], 1, 100), pm(r["continuation_acc_norm"], 1, 100),
        ])  # fmt: skip
    base = card["baselines"]
    rows += [
        ["trigram", "", "", pm(base["trigram_bits_per_byte"], 3), "", "", ""],
        [f"always “{base['most_frequent_last_word']}”", "", "", "", pm(base["most_frequent_last_word_acc"], 1, 100), "", ""],
        ["chance", "", "", "", "", pm(base["continuation_chance"], 1, 100), "25.0"],
    ]
    n = card["tasks"]["examples"]
    head = ["model", "parameters", "without embeddings", "bits per byte", "cloze, % right", "continuation, % right", "the same, by length"]
    gates = "\n".join(f"- [{'x' if passed else ' '}] {gate}" for gate, passed in card["gates"].items())
    repeated = table(
        ["cloze, % right", *(f"`{name}`" for name in card["models"])],
        [
            [label, *(pm(model["results"][key], 1, 100) for model in card["models"].values())]
            for label, key in (("word stands earlier", "cloze_acc_repeated"), ("it does not", "cloze_acc_fresh"))
        ],
    )
    return f"""## Results

lm-eval {card["versions"]["lm_eval"]}, full data, fp32 on CPU from the fp16 weights; ± is one standard error over examples.
`mini_ppl` n = {n["ppl"]:,} documents, `mini_cloze` n = {n["cloze"]:,}, `mini_continuation` n = {n["continuation"]:,}.

{table(head, rows)}

The trigram is interpolated Kneser-Ney over the same tokens and the same training text (`baselines.py`). The most frequent word is that of
the examples themselves. "By length" is lm-eval's `acc_norm`.

{repeated}

Gates:

{gates}

To reproduce a row: `lm_eval --model hf --model_args pretrained=quantsweep/mini/models/NAME,dtype=float32 --include_path quantsweep/mini/tasks
--tasks {",".join(TASK_NAMES)} --device cpu --batch_size 32`, with `HF_HUB_OFFLINE=1`; all rows: `python -m quantsweep.mini.card`."""


def _data(card: Card) -> str:
    data = card["data"]
    sources = table(
        ["source", "licence", "held out by", "train", "evaluation", "calibration", "SHA-256 of the file"],
        [
            [
                f"{s['title']}; {s['origin']}", s["licence"], s["unit"],
                *(f"{s['bytes'][split]:,}" for split in ("train", "evaluation", "calibration")), f"`{s['file']}` `{s['sha256']}`",
            ]
            for s in data["sources"]
        ],
    )  # fmt: skip
    splits = table(
        ["split", "sections", "bytes", "tokens"],
        [[name, f"{s['sections']:,}", f"{s['bytes']:,}", f"{s['tokens']:,}"] for name, s in data["splits"].items()],
    )
    o = data["overlap_with_training"]
    overlap = table(
        ["share of distinct n-grams that are in the training text", "13 words", "8 words"],
        [[key.replace("_", ", ") + " removal", f"{100 * v['13gram']:.3f} %", f"{100 * v['8gram']:.3f} %"] for key, v in o.items()],
    )
    return f"""## Data

Bytes are UTF-8 after cleaning (`corpus.py`); the files in `corpus/` are as they were found, compressed.

{sources}

{splits}

Whole chapters, scenes, speeches, or runs of neighbouring paragraphs, verses and entries were held out (seed {data["seed"]}). Then each held-out
passage that shares {OVERLAP_WORDS} words in a row with the training text was removed, from the calibration text also what it shares with the
evaluation text; what remains shares none:

{overlap}

Common runs of 8 words are mostly formulas of address. Between sources: of the 13-grams of the inaugural addresses
{100 * data["inaugural_13grams_in_sotu"]:.3f} % occur in the State of the Union addresses; the two collections hold different speeches.

`text/evaluation.txt` and `text/calibration.txt` are the two held-out splits, sections two blank lines apart. The tasks are made from the
evaluation split alone; the calibration split is for calibrating quantization methods, and was the validation text of training."""


def _tasks(card: Card) -> str:
    tasks = card["tasks"]
    n = tasks["examples"]
    ranks = "/".join(f"{count:.0f}" for count in tasks["continuation_ranks_in_characters"])
    words = "/".join(f"{count:.0f}" for count in tasks["continuation_ranks_in_words"])
    smallest, measured = next(iter(card["models"].items()))
    first, full = measured[f"bits_per_byte_first_{REFERENCE_LIMIT}"], measured["results"]["bits_per_byte"]
    sources = table(
        ["examples by source", *n],
        [[s["name"], *(tasks["by_source"][name][s["name"]] for name in n)] for s in card["data"]["sources"]],
    )
    return f"""## Tasks

- `mini_cloze` ({n["cloze"]:,}): the last word of a passage of two to six sentences and at most 120 tokens; a lower-case content word of three or
  more letters. In {100 * tasks["cloze_repeated_share"]:.1f} % of the examples the word stands earlier in the passage. No person checked that the words can be guessed.
- `mini_continuation` ({n["continuation"]:,}): the next sentence among four; the wrong ones follow other passages of the same source,
  are near in length in characters. Length still tells a little: the true one is the shortest, second, third and longest in
  {ranks} of the items (characters, ties split evenly), so “pick the second shortest” is right in {100 * tasks["continuation_second_shortest_acc"]:.1f} %; chance is 25 %.
  Measured in words the ranks are nearly even ({words}).
- `mini_ppl` ({n["ppl"]:,}): documents of 200 to 400 tokens; {tasks["ppl_longer_than_context"]} are longer than the context of {CONTEXT_LENGTH} and take two windows.

The order is stratified by source: shuffled with a fixed seed, then merged so that among the first N examples, for every N, each source
has its share to within one. A small N is still a small sample: on the first {REFERENCE_LIMIT} documents `{smallest}` has {first:.3f} bits per byte, on all
{full["n"]} {pm(full, 3)}. Full-data results do not depend on the order.

{sources}"""


def _recipe(card: Card) -> str:
    rows = [
        [
            f"`{name}`", m["recipe"]["width"], m["recipe"]["num_layers"], m["recipe"]["num_heads"], f"{m['recipe']['learning_rate']:g}",
            m["recipe"]["epochs"], f"{m['steps']:,}", f"{m['tokens']:,}", m["recipe"]["seed"], f"`{m['sha256'][:16]}…`",
        ]
        for name, m in card["models"].items()
    ]  # fmt: skip
    head = ["model", "width", "layers", "heads", "peak learning rate", "epochs", "steps", "tokens seen", "seed", "weights SHA-256"]
    return f"""## Recipe

{table(head, rows)}

Byte-level BPE with {VOCABULARY_SIZE:,} entries, `{END_OF_TEXT}` is bos, eos, unk and pad; context {CONTEXT_LENGTH}; embeddings tied; no dropout. Batches of {BATCH_WINDOWS} windows of
{CONTEXT_LENGTH} tokens, AdamW (0.9, 0.95), weight decay {WEIGHT_DECAY} on matrices, gradient norm clipped at 1, {WARMUP_STEPS} steps of warm-up, cosine decay to 5 % of
the peak, bf16 autocast over fp32 weights, the last step kept, saved as fp16. Peak learning rates were set beforehand for GPT-NeoX; for OPT two or three
were tried a size (0.4m: 0.002, **0.0035**, 0.006; 1.1m: 0.0025, **0.004**; 3.8m: 0.0015, 0.002, **0.003**) and the lowest loss on the
calibration split decided. The evaluation split decided nothing.

Reproduce: `python -m quantsweep.mini.prepare`, `python -m quantsweep.mini.train`, `python -m quantsweep.mini.card`. Trained on {card["versions"]["training"]}, up to
seven processes side by side, in two and a half minutes beside compilation; `mini-opt-0.4m` and `mini-opt-3.8m` in a second run, with the better rates.
The files were saved again with transformers {card["versions"]["saved_with_transformers"]}, which is what each `config.json` says."""


def _curves(card: Card) -> str:
    with LOG_PATH.open(encoding="utf-8", newline="") as file:
        log = list(csv.DictReader(file))
    curves = {name: [row for row in log if row["model"] == name] for name in card["models"]}
    points = len(next(iter(curves.values())))
    rows = [[f"{i + 1}/{points}", *(f"{float(curve[i]['validation_loss']):.3f}" for curve in curves.values())] for i in range(points)]
    rows.append(["training, last", *(f"{float(curve[-1]['train_loss']):.3f}" for curve in curves.values())])
    return f"""## Loss curves

Nats a token on the calibration split, at twelfths of each model's steps; all columns are in [training_log.csv](training_log.csv).

{table(["of the steps", *(f"`{name}`" for name in curves)], rows)}"""


def _limits(card: Card) -> str:
    return """## What not to expect

- The text is old, and a third of it is dictionary glosses. The models write grammatical nonsense; they know nothing.
- Sizes differ in depth, width and number of tokens seen, as the table of the recipe says: this is a family for trying out a study of scaling, not evidence
  about scaling. The larger models are past the point where more epochs of this text help much.
- Outlier features, which decide how well large models quantize, are not to be expected in models this small.
- The cloze words were chosen by rule and the continuation's wrong endings at random; neither was checked by a person.
- The Austen file holds a 70-word note of a modern edition ("A NOTE ON THE TEXT"), and the State of the Union texts hold "(Applause.)" and a
  few errors of scanning. Both were left as found."""


# ------------------------------------------------------------------------------------------------- programs


def measure(card: Card, names: Sequence[str]) -> Card:
    """The card with `names` measured anew and, where it lacks them, data, tasks and baselines."""
    import lm_eval  # seconds to import
    import torch
    import transformers

    models = {**card.get("models", {}), **{name: measure_model(name) for name in names}}
    fresh: Card = {
        "versions": {
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "training": "one NVIDIA H200 (torch 2.11.0, transformers 5.17.0)",
            "saved_with_transformers": saved_with(),
        },
        "data": card.get("data") or measure_data(),
        "tasks": card.get("tasks") or measure_tasks(),
        "baselines": card.get("baselines") or measure_baselines(),
        "models": {name: models[name] for name in MODEL_NAMES if name in models},
    }
    if set(MODEL_NAMES) <= set(models):
        fresh["gates"] = judge(fresh)
    return fresh


def main() -> None:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Measure the bundled models and write their card.")
    parser.add_argument("--render", action="store_true", help="only write CARD.md from card.json")
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, help="measure these, keep the rest of card.json")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    card: Card = json.loads(CARD_JSON.read_text(encoding="utf-8")) if arguments.render or arguments.models else {}
    if not arguments.render:
        card = measure(card, arguments.models or MODEL_NAMES)
        CARD_JSON.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if "gates" in card:
        CARD_MD.write_text(render(card), encoding="utf-8")


if __name__ == "__main__":
    main()
