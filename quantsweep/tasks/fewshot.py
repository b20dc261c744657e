"""Few-shot examples: none of them is the document that is asked about.

lm-eval leaves a document out of its own prompt only where `fewshot_split` names the split that is scored.  Where a task has a
test split and no other (LAMBADA, the bundled tasks), its examples come from there all the same, and one in so many prompts
holds the answer that is asked for.  Here such an example, and only such a one, gives way to another: all other prompts are
lm-eval's own, drawn in the same order.  Of built-in tasks this is done where the task's key says so (`+others`), and nowhere
else: one whose training split repeats a document of its test split has lm-eval's prompts, under the key that they have always had.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED

from quantsweep.errors import EvaluationError


def leave_out_own_answers(task: Task) -> None:
    """Have a task replace an example that is the document itself, or asks the same with the same answer (`_asked_and_answered`).

    Rendering raises EvaluationError where there are too few others.
    """
    if not hasattr(task, "sampler"):
        return  # an older task in Python alone, which leaves the document out by itself
    sampler, render = task.sampler, task.fewshot_context
    draw: Callable[..., Sequence[Any]] = sampler.sample
    generator = random.Random(DEFAULT_OTHER_SEED)
    asked: list[Any] = []

    def context(document: Any, *arguments: Any, **options: Any) -> Any:
        asked[:] = [document]
        return render(document, *arguments, **options)

    def sample(n: int, eval_doc: Any = None, **options: Any) -> list[Any]:
        (document,) = asked
        own = _asked_and_answered(task, document)
        drawn = list(draw(n, eval_doc=eval_doc, **options))
        kept = [example for example in drawn if not _is_same(task, example, document, own)]
        if len(kept) == n:
            return kept
        others = [e for e in sampler.fewshot_docs() if e not in kept and not _is_same(task, e, document, own)]
        missing = n - len(kept)
        if len(others) < missing:
            raise EvaluationError(
                f"task {task.task_name}: {n} few-shot examples were asked for, and it has {len(kept) + len(others)} beside the document "
                "itself; give a smaller num_fewshot, or the task a training_split"
            )
        return kept + (others[:missing] if isinstance(sampler, FirstNSampler) else generator.sample(others, missing))

    task.fewshot_context, sampler.sample = context, sample


def _is_same(task: Task, example: Any, document: Any, own: Any) -> bool:
    return bool(example == document) or (own is not None and _asked_and_answered(task, example) == own)


def _asked_and_answered(task: Task, document: Any) -> tuple[Any, frozenset[Any], Any] | None:
    """What a document asks, its choices and its answer, in whatever order the choices stand and however wide the blanks are.

    None for an example of other columns than the task's documents.
    """
    try:
        choices = task.doc_to_choice(document) if task.get_config("doc_to_choice") is not None else []
        question, answer = (_plain(value, choices) for value in (task.doc_to_text(document), task.doc_to_target(document)))
        return question, frozenset(_plain(choice, ()) for choice in choices), answer
    except Exception:  # noqa: BLE001 - templates and functions of a task raise what they like
        return None


def _plain(value: Any, choices: Sequence[Any]) -> Any:
    """A text with single blanks, the number of a choice as that choice, several answers as their set."""
    if isinstance(value, list):
        return frozenset(_plain(each, choices) for each in value)
    if isinstance(value, int) and 0 <= value < len(choices):
        value = choices[value]
    return " ".join(value.split()) if isinstance(value, str) else value
