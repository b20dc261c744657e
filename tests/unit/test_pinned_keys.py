"""Twenty trial ids and the bundled tasks' keys, as first published: committed results are found by them.

A key changes only where the number changes, and then CHANGELOG.md lists it.
"""

from __future__ import annotations

import pytest

from quantsweep.composing.composition import compose_base, search_folders
from quantsweep.composing.prepare import prepare
from quantsweep.composing.shorthand import expand_shorthand
from quantsweep.trial.specs import PlannedTrial

TRIALS = [
    ("a4eb04489c7a2ece", "model=mini-neox-0.3m method=none"),
    ("2991ddea94b42096", "model=mini-neox-0.3m method=none model.dtype=bfloat16"),
    ("43988c6cc51d8c47", "model=mini-opt-1.1m data_type=int bit_width=4 block_size=64"),
    ("6efb6e77a4c14ff5", "model=mini-neox-0.3m data_type=fp bit_width=4 block_size=64"),
    ("353ec9b2e95b0bbd", "model=mini-neox-6.0m data_type=quantile bit_width=3 block_size=1024"),
    ("a14804bb96df2b80", "model=mini-neox-6.0m data_type=dynamic bit_width=8 block_size=64"),
    ("32cd82551b549639", "model=mini-neox-0.3m data_type=int bit_width=3 block_size=tensor"),
    ("91a15a007b81b814", "model=mini-neox-0.3m data_type=int bit_width=4 block_size=null block_axis=input"),
    ("9e4e800a4666e9b7", "model=mini-neox-0.3m data_type=int bit_width=4 block_size=128 symmetric=false data_type.options.convention=gptq"),
    (
        "b30d1753904006b7",
        "model=mini-neox-0.3m data_type=fp bit_width=5 block_size=64 data_type.options.exponent_bits=3 data_type.options.subnormal=ieee",
    ),
    ("20310f5431e6d9e0", "model=mini-neox-0.3m data_type=nf bit_width=4 block_size=64"),
    ("7ef3936d0e8d5fd9", "model=mini-neox-0.3m data_type=af4 bit_width=4 block_size=64"),
    ("8d6343b8cf982905", "model=mini-neox-0.3m data_type=fp8 bit_width=8 block_size=auto"),
    ("4c2f25fd6089cb94", "model=mini-neox-0.3m data_type=mxfp bit_width=4"),
    ("aefcd07e9c99c827", "model=mini-neox-0.3m data_type=nvfp4 bit_width=4"),
    ("f43336723111a114", "model=mini-neox-0.3m data_type=int bit_width=4 block_size=64 scale_dtype=float32"),
    ("6d2039ac9f3794ce", "model=mini-opt-0.4m method=centering data_type=int bit_width=4 block_size=64"),
    (
        "7a6e8cf4465a3f7a",
        "model=mini-opt-0.4m method=outlier_dependent data_type=int bit_width=4 block_size=64 method.options.fraction=0.05",
    ),
    (
        "051bda64a95ea965",
        "model=mini-opt-3.8m data_type=int bit_width=4 block_size=64 model.plant_outliers.channels=4 model.plant_outliers.scale=16",
    ),
    ("f73b957d8fa0b324", "model=mini-opt-3.8m data_type=int bit_width=4 block_size=64 model.dtype=float16"),
]
TASK_KEYS = [
    ("", ["mini_cloze@1.0", "mini_continuation@1.0", "mini_ppl@1.0"]),
    ("limit=30", ["mini_cloze@1.0+limit30", "mini_continuation@1.0+limit30", "mini_ppl@1.0+limit30"]),
    ("task=mini_continuation num_fewshot=0", ["mini_continuation@1.0+0shot"]),
    ("task=mini_cloze num_fewshot=2 limit=5", ["mini_cloze@1.0+2shot+limit5"]),
    # The prompt of document 23 held its own answer: from there on the number is another, and so is the key.
    ("task=mini_cloze num_fewshot=2 limit=23", ["mini_cloze@1.0+2shot+limit23"]),
    ("task=mini_cloze num_fewshot=2 limit=24", ["mini_cloze@1.0+2shot+others+limit24"]),
    ("task=mini_continuation num_fewshot=5", ["mini_continuation@1.0+5shot+others"]),
    ("task=mini_continuation num_fewshot=1", ["mini_continuation@1.0+1shot"]),
    ("task=mini_cloze num_fewshot=2 task.protocol=lm_eval", ["mini_cloze@1.0+2shot+lm_eval"]),
]


def planned(words: str) -> PlannedTrial:
    """The one trial that these words plan."""
    arguments = expand_shorthand([*words.split(), "sweep=pinned_keys"])
    cfg = compose_base(arguments)
    (shard,) = prepare(cfg, search_folders(cfg.hydra), arguments).plan.shards
    (trial,) = shard.trials
    return trial


@pytest.mark.parametrize(("trial_id", "words"), TRIALS, ids=[words for _, words in TRIALS])
def test_a_trial_keeps_its_id(trial_id: str, words: str) -> None:
    assert planned(words).trial.trial_id == trial_id


@pytest.mark.parametrize(("words", "keys"), TASK_KEYS)
def test_a_bundled_task_keeps_its_key(words: str, keys: list[str]) -> None:
    assert [task.task_key for task in planned(words).tasks] == keys
