"""What quantizing a model costs beside evaluating it, and beside bitsandbytes' own kernels.

    python -m tests.benchmarks.quantization_cost [--model mini|410m|6.9b] [--limit 100] [--repeats 3] [--output FILE]
                                                 [--tasks lambada_openai,piqa,winogrande,hellaswag --task-path FOLDER]

mini: the largest bundled model, on whatever torch finds.  410m, 6.9b: GPT-NeoX of Pythia's shapes with random weights in
float16 (numbers do not matter for time), for a GPU.  The evaluation is the bundled suite, or `--tasks`, through the product's
own evaluator: real requests, real scoring, `--limit` examples a task (0: all); the tokens it took are printed, so that the
share can be scaled to other suites (a share is inversely proportional to the tokens).  Texts are tokenized with the bundled
vocabulary, which is small: the same text has more tokens than a Pythia would see.

Printed for each data type at 4 bits (8 where it has no 4), block 64 or the type's own: seconds to quantize all layers, to
put the originals back, the share of both in a trial, and the peak memory above the model itself.  The floor is a pass
over memory: each weight is read and written once.

One H200, torch 2.11, LAMBADA, PIQA, Winogrande and HellaSwag in full (5.8 million tokens of that vocabulary), quantizing as
share of a trial: 410m int 0.36 %, quantile 1.60 %, all others between; 6.9b int 0.32 %, quantile 0.93 %.  Putting 6.9b back
takes 1.5 s more, the copy from the host's memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.models.loading import LoadedModel, load_model, wrap_model
from quantsweep.models.session import Session
from quantsweep.pipeline.run import quantize
from quantsweep.planning.schema import build_model, build_quantization, build_task
from quantsweep.storage.paths import product_root
from quantsweep.trial.specs import ModelSpec, QuantizationSpec, TaskSpec
from tests.benchmarks.measure import output_parser, say
from tests.contract.rounding_cases import help_for_tests

SHAPES = {
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 50_304},
    "6.9b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 16_384, "vocab_size": 50_432},
}
"""Pythia's (Biderman et al. 2023, arXiv:2304.01373), as their config.json have them."""
LARGEST_MINI = "mini-neox-6.0m"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds and bytes of one data type on one model."""

    quantize: float
    restore: float
    extra_bytes: int | None


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = output_parser(__doc__)
    parser.add_argument("--model", choices=["mini", *SHAPES], default="mini")
    parser.add_argument("--limit", type=int, default=100, help="examples of each task of the suite; 0 for all")
    parser.add_argument("--tasks", help="names of conf/task, separated by commas (default: the bundled suite)")
    parser.add_argument("--task-path", help="a folder of lm-eval YAMLs for them, as task_path= of a launch")
    parser.add_argument("--repeats", type=int, default=3, help="each time is the median of so many (default: 3)")
    arguments = parser.parse_args(argv)
    names = arguments.tasks.split(",") if arguments.tasks else _yaml("task", "mini")["suite"]
    limits = {} if arguments.limit == 0 else {"limit": arguments.limit}
    tasks = [build_task(_yaml("task", name), limits, arguments.task_path) for name in names]
    task_path = None if arguments.task_path is None else Path(arguments.task_path)
    say("\n".join(run(arguments.model, tasks, task_path, arguments.repeats)), arguments.output)
    return 0


def run(name: str, tasks: Sequence[TaskSpec], task_path: Path | None, repeats: int) -> list[str]:
    """The table, line by line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = _bundled(device) if name == "mini" else _random(name, device)
    seconds, tokens = _evaluation(loaded, tasks, task_path)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"{name}: {loaded.num_parameters:,} parameters, {loaded.num_quantizable:,} of them in quantizable layers, on {where}",
        f"evaluation: {seconds:.2f} s, {tokens:,} tokens, {tokens / seconds:,.0f} tokens a second",
        f"{'data type':<22}{'quantize s':>11}{'restore s':>11}{'share %':>9}{'quantize %':>12}{'GB/s':>8}{'extra MB':>10}",
    ]
    for label, spec in _specs():
        cost = _cost(loaded, spec, repeats)
        trial = seconds + cost.quantize + cost.restore
        moved = 2 * loaded.num_quantizable * next(iter(loaded.layers.values())).dtype.itemsize
        lines.append(
            f"{label:<22}{cost.quantize:>11.4f}{cost.restore:>11.4f}{100 * (cost.quantize + cost.restore) / trial:>9.2f}"
            f"{100 * cost.quantize / trial:>12.2f}{moved / cost.quantize / 1e9:>8.1f}"
            f"{'' if cost.extra_bytes is None else f'{cost.extra_bytes / 1e6:.0f}':>10}"
        )
    return [*lines, *_beside_bitsandbytes(loaded, repeats)]


def _bundled(device: str) -> LoadedModel:
    return load_model(build_model(_yaml("model", LARGEST_MINI)), device)


def _random(name: str, device: str) -> LoadedModel:
    """Random weights, made where they are used; the bundled tokenizer's ids are all below the vocabulary's size."""
    config = GPTNeoXConfig(**SHAPES[name], max_position_embeddings=2048)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            model = GPTNeoXForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(product_root() / "quantsweep" / "mini" / "models" / LARGEST_MINI, local_files_only=True)
    return wrap_model(model, tokenizer, ModelSpec(name=name, family="random", path="/none"), None)


def _specs() -> list[tuple[str, QuantizationSpec]]:
    specs = []
    for path in sorted((product_root() / "conf" / "data_type").glob("*.yaml")):
        data_type = _yaml("data_type", path.stem)
        widths = data_type["capabilities"]["bit_widths"]
        bits = 4 if 4 in widths else max(widths)
        scalars = {**dict.fromkeys(("block_axis", "symmetric")), **_base("block_size", "scale_dtype"), "bit_width": bits}
        spec, reason = build_quantization(_yaml("method", "round_to_nearest"), data_type, scalars, _yaml("method", "none"))
        assert reason is None, reason
        specs.append((f"{path.stem} {bits}-bit", spec))
    return specs


def _base(*keys: str) -> dict[str, Any]:
    config = yaml.safe_load((product_root() / "conf" / "config.yaml").read_text())
    return {key: config[key] for key in keys}


def _yaml(group: str, name: str) -> Any:
    return yaml.safe_load((product_root() / "conf" / group / f"{name}.yaml").read_text())


def _evaluation(loaded: LoadedModel, tasks: Sequence[TaskSpec], task_path: Path | None) -> tuple[float, int]:
    evaluator = Evaluator(loaded, task_path=task_path)
    for task in tasks:
        evaluator.prepare(task)  # data and tokens are prepared once a shard
    evaluator.evaluate(tasks[0])  # kernels are chosen
    _wait(loaded)
    started = time.perf_counter()
    tokens = sum(evaluator.evaluate(task).num_input_tokens for task in tasks)
    _wait(loaded)
    return time.perf_counter() - started, tokens


def _cost(loaded: LoadedModel, spec: QuantizationSpec, repeats: int) -> Cost:
    session, alone = Session(loaded), help_for_tests()
    quantize(session, spec, alone)
    session.restore()
    on_gpu = loaded.model.device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    rounding, restoring = [], []
    for _ in range(repeats):
        rounding.append(_timed(loaded, lambda: quantize(session, spec, alone)))
        restoring.append(_timed(loaded, session.restore))
    extra = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return Cost(quantize=statistics.median(rounding), restore=statistics.median(restoring), extra_bytes=extra)


def _timed(loaded: LoadedModel, work: Callable[[], object]) -> float:
    _wait(loaded)
    started = time.perf_counter()
    work()
    _wait(loaded)
    return time.perf_counter() - started


def _wait(loaded: LoadedModel) -> None:
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize()


def _beside_bitsandbytes(loaded: LoadedModel, repeats: int) -> list[str]:
    """For information: its kernels quantize and dequantize the same weights (NF4 in blocks of 64)."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return ["bitsandbytes is not installed here: no comparison"]

    def both() -> None:
        for layer in loaded.layers.values():
            module: nn.Module = layer.module
            packed, state = functional.quantize_4bit(module.get_parameter("weight"), blocksize=64, quant_type="nf4")
            functional.dequantize_4bit(packed, state)

    both()
    seconds = statistics.median(_timed(loaded, both) for _ in range(repeats))
    return [f"{'bitsandbytes nf4':<22}{seconds:>11.4f}   (quantize and dequantize only: no errors measured, nothing recorded)"]


if __name__ == "__main__":
    sys.exit(main())
