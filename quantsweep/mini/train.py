"""Train the family: seven models side by side on one GPU, in about five minutes on an H200.

    python -m quantsweep.mini.train                      # all, each in a process of its own
    python -m quantsweep.mini.train mini-neox-0.3m       # one
    python -m quantsweep.mini.train --steps 20 --device cpu --out /tmp/x mini-neox-0.3m    # a smoke test

One step: 64 windows of 256 tokens, AdamW (beta 0.9 / 0.95, weight decay 0.1 on matrices), gradient norm
clipped at 1, learning rate

    lr(t) = peak * min(1, t / warmup) * (0.05 + 0.95 * (1 + cos(pi * t / T)) / 2),   warmup = 300 steps

The forward pass runs in bf16 autocast over fp32 weights; the weights of the last step are saved as fp16.
An epoch shifts the grid of windows by a random offset, then visits all windows in random order, so that
no window border is the same twice.

Models this small leave a GPU waiting for Python. On CUDA a whole step (gather, forward, backward, clip,
update) is therefore one CUDA graph, replayed with the next indices and learning rate written into place.

The calibration split serves as the validation text of the loss curve. No hyperparameter was chosen on
the evaluation split, and no checkpoint: the last one is kept.

Results on another machine or library version differ in the third digit; GPU reductions are not
bit-reproducible.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from quantsweep.mini import CALIBRATION_TEXT, MODEL_NAMES, MODELS_DIR, ROOT
from quantsweep.mini.corpus import split_raw
from quantsweep.mini.family import MiniLM, Recipe, build, recipe
from quantsweep.mini.prepare import SECTION_BREAK
from quantsweep.mini.vocabulary import CONTEXT_LENGTH, END_OF_TEXT_ID, VOCABULARY_SIZE, load_tokenizer

BATCH_WINDOWS = 64
WARMUP_STEPS = 300
FINAL_LR_SHARE = 0.05
WEIGHT_DECAY = 0.1
NUM_LOG_POINTS = 12
LOG_PATH = ROOT / "training_log.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRow:
    """One point of a loss curve. Losses are nats a token; seconds exclude compilation."""

    model: str
    step: int
    tokens: int
    train_loss: float
    validation_loss: float
    learning_rate: float
    seconds: float


# ----------------------------------------------------------------------------------------------------- data


def encode(texts: list[str]) -> npt.NDArray[np.uint16]:
    """The texts as one stream of token ids, each text opened by the end-of-text token: shape (tokens,)."""
    tokenizer = load_tokenizer(MODELS_DIR / MODEL_NAMES[0])
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream.append(END_OF_TEXT_ID)
        stream.extend(encoding.ids)
    return np.array(stream, dtype=np.uint16)


def training_tokens() -> npt.NDArray[np.uint16]:
    """The training split. It does not depend on the overlap check, which only takes from held-out text."""
    return encode([section.text for section in split_raw()["train"]])


def validation_tokens() -> npt.NDArray[np.uint16]:
    """The calibration split."""
    return encode(CALIBRATION_TEXT.read_text(encoding="utf-8").rstrip("\n").split(SECTION_BREAK))


def window_starts(num_tokens: int, num_steps: int, seed: int) -> npt.NDArray[np.int64]:
    """First token of each window of each step: shape (num_steps, BATCH_WINDOWS)."""
    rng = np.random.default_rng(seed)
    epochs: list[npt.NDArray[np.int64]] = []
    have = 0
    while have < num_steps * BATCH_WINDOWS:
        grid = np.arange(rng.integers(CONTEXT_LENGTH), num_tokens - CONTEXT_LENGTH - 1, CONTEXT_LENGTH)
        epochs.append(rng.permutation(grid))
        have += len(grid)
    return np.concatenate(epochs)[: num_steps * BATCH_WINDOWS].reshape(num_steps, BATCH_WINDOWS)


def learning_rate(peak: float, step: int, num_steps: int) -> float:
    """Linear warm-up times cosine decay to `FINAL_LR_SHARE` of the peak."""
    cosine = (1 + math.cos(math.pi * step / num_steps)) / 2
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


# ---------------------------------------------------------------------------------------------------- model


def _causal_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention without a mask tensor; (batch, heads, length, size) -> (batch, length, heads, size).

    Windows are never padded. transformers' own path builds a mask under `torch.compile` and reads it back
    to the host, which a CUDA graph cannot do.
    """
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("mini_causal", _causal_attention)


def next_token_loss(model: MiniLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of (batch, CONTEXT_LENGTH + 1) token ids."""
    positions = torch.arange(CONTEXT_LENGTH, device=windows.device).unsqueeze(0)
    with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=windows.is_cuda):
        logits = model(input_ids=windows[:, :-1], position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.float().reshape(-1, VOCABULARY_SIZE), windows[:, 1:].reshape(-1))


def make_optimizer(model: MiniLM, device: torch.device) -> torch.optim.AdamW:
    """AdamW whose learning rate is a tensor on the device, so that a captured step can be given a new one."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=torch.zeros((), device=device),
        betas=(0.9, 0.95),
        fused=True,
        capturable=device.type == "cuda",
    )


class Trainer:
    """A model, its optimizer, and one step that can be captured: everything the step reads stays in place."""

    def __init__(self, model: MiniLM, tokens: torch.Tensor) -> None:
        """Take a model and the training stream (tokens,), which lie on the same device."""
        self.model = model
        self.tokens = tokens  # (tokens,) int64, on the device
        self.device = tokens.device
        self.optimizer = make_optimizer(model, self.device)
        self.rate = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.starts = torch.zeros(BATCH_WINDOWS, dtype=torch.int64, device=self.device)
        self.offsets = torch.arange(CONTEXT_LENGTH + 1, device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self._loss: Callable[[MiniLM, torch.Tensor], torch.Tensor] = next_token_loss
        self._replay: Callable[[], None] = self._step

    def _step(self) -> None:
        windows = self.tokens[self.starts.unsqueeze(1) + self.offsets]  # (BATCH_WINDOWS, CONTEXT_LENGTH + 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.model, windows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss_sum += loss.detach()

    def capture(self) -> None:
        """Compile the loss and record a step as a CUDA graph. Weights and optimizer are as before."""
        self._loss = torch.compile(next_token_loss)
        # The rate is zero while warming up, so weights stay; the moments are cleared below.
        for _ in range(3):
            self._step()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._step()
        for state in self.optimizer.state.values():
            for moment in state.values():
                moment.zero_()
        self.loss_sum.zero_()
        self._replay = graph.replay

    def step(self, starts: torch.Tensor, rate: float) -> None:
        """One update on the windows that begin at `starts` (BATCH_WINDOWS,)."""
        self.starts.copy_(starts)
        self.rate.fill_(rate)
        self._replay()

    def take_train_loss(self, steps: int) -> float:
        """Mean loss of the last `steps` steps; starts a new mean."""
        mean = self.loss_sum.item() / steps
        self.loss_sum.zero_()
        return mean


@torch.no_grad()
def validation_loss(model: MiniLM, tokens: torch.Tensor) -> float:
    """Mean nats a token over all whole windows of (tokens,)."""
    count = (len(tokens) - 1) // CONTEXT_LENGTH
    starts = torch.arange(count, device=tokens.device) * CONTEXT_LENGTH
    offsets = torch.arange(CONTEXT_LENGTH + 1, device=tokens.device)
    total = 0.0
    for first in range(0, count, BATCH_WINDOWS):
        chunk = starts[first : first + BATCH_WINDOWS]
        total += next_token_loss(model, tokens[chunk.unsqueeze(1) + offsets]).item() * len(chunk)
    return total / count


def train(recipe: Recipe, train_ids: torch.Tensor, validation_ids: torch.Tensor, num_steps: int) -> Iterator[LogRow | MiniLM]:
    """Rows of the loss curve as they come, at last the model (fp32)."""
    device = train_ids.device
    model = build(recipe)
    torch.nn.Module.to(model, device)
    model.set_attn_implementation("mini_causal")
    trainer = Trainer(model, train_ids)
    if device.type == "cuda":
        trainer.capture()
    starts = torch.from_numpy(window_starts(len(train_ids), num_steps, recipe.seed)).to(device)
    log_at = {num_steps * (i + 1) // NUM_LOG_POINTS for i in range(NUM_LOG_POINTS)}
    begin, last = time.perf_counter(), 0
    for step in range(num_steps):
        rate = learning_rate(recipe.learning_rate, step, num_steps)
        trainer.step(starts[step], rate)
        if step + 1 in log_at:
            yield LogRow(
                model=recipe.name,
                step=step + 1,
                tokens=(step + 1) * BATCH_WINDOWS * CONTEXT_LENGTH,
                train_loss=round(trainer.take_train_loss(step + 1 - last), 4),
                validation_loss=round(validation_loss(model, validation_ids), 4),
                learning_rate=float(f"{rate:.3g}"),
                seconds=round(time.perf_counter() - begin, 1),
            )
            last = step + 1
    yield model


# ------------------------------------------------------------------------------------------------- programs


def save(model: MiniLM, folder: Path) -> None:
    """Write config.json and fp16 model.safetensors; tied weights are written once."""
    folder.mkdir(parents=True, exist_ok=True)
    model.set_attn_implementation("sdpa")
    torch.nn.Module.to(model, torch.float16)
    model.save_pretrained(folder)
    # Derived from config.json, and warned about by some readers; the config alone says the same.
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)


def append_log(path: Path, row: LogRow) -> None:
    """Add a row to the CSV; a row is one write, so that processes may share the file."""
    names = [field.name for field in fields(LogRow)]
    line = ",".join(str(getattr(row, name)) for name in names) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def start_log(path: Path) -> None:
    """An empty log with its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([field.name for field in fields(LogRow)])


def train_one(name: str, arguments: argparse.Namespace) -> None:
    """Train one model in this process, with the token files that the parent wrote."""
    spec = recipe(name)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        # A graph cannot be captured on the default stream, and gradients stay on the stream of their birth.
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    train_ids, validation_ids = (
        torch.from_numpy(np.load(Path(arguments.tokens) / f"{split}.npy").astype(np.int64)).to(device) for split in ("train", "validation")
    )
    num_steps = arguments.steps or spec.epochs * len(train_ids) // (BATCH_WINDOWS * CONTEXT_LENGTH)
    for event in train(spec, train_ids, validation_ids, num_steps):
        if isinstance(event, LogRow):
            append_log(arguments.log, event)
            print(event, flush=True)
        else:
            save(event, arguments.out / name)


def train_all(names: list[str], arguments: argparse.Namespace) -> int:
    """Tokenize once, then one process a model, all at the same time; the number of failures."""
    start_log(arguments.log)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "train.npy", training_tokens())
        np.save(Path(folder) / "validation.npy", validation_tokens())
        common = ["--tokens", folder, "--device", arguments.device, "--out", str(arguments.out)]
        common += ["--log", str(arguments.log), "--steps", str(arguments.steps)]
        # Largest first: it compiles and runs the longest.
        children = [
            subprocess.Popen([sys.executable, "-m", "quantsweep.mini.train", *common, name])
            for name in sorted(names, key=lambda n: -recipe(n).width)
        ]
        return sum(child.wait() != 0 for child in children)


def main() -> int:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Train the bundled miniature models.")
    parser.add_argument("names", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=MODELS_DIR, help="folder of the model folders")
    parser.add_argument("--log", type=Path, default=LOG_PATH, help="CSV of the loss curves")
    parser.add_argument("--steps", type=int, default=0, help="instead of the recipe's epochs")
    parser.add_argument("--tokens", default="", help=argparse.SUPPRESS)  # set for child processes
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if arguments.tokens:
        train_one(arguments.names[0], arguments)
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return train_all(arguments.names or list(MODEL_NAMES), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
