"""The process that runs trials: loads a model once, then quantizes, evaluates and restores, trial after trial.

It is a child of a worker (`quantsweep.running.worker`, which holds it by `quantsweep.running.child_process`) so that whatever
a trial does to its process costs that trial alone.  They speak JSON over one private pipe:

    worker → child    {"planned": …, "settings": …}                       one trial
    child → worker    loaded, quantized, task (one a task), done | failed   what happened, as it happens, and by which code

The child writes no results; it owns the model, the worker owns the files.  When the worker is gone
(the pipe ends), the child ends at once, also in the middle of an evaluation.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantsweep.checkpoints.headers import KNOWN_ARCHITECTURES
from quantsweep.errors import EvaluationError, ModelError
from quantsweep.evaluation.share import Share
from quantsweep.failures import classes
from quantsweep.running.environment import RunningCode
from quantsweep.signs import while_bytes_move
from quantsweep.trial.specs import CalibrationSpec, ModelSpec, PlannedTrial, RunSettings, TaskSpec
from quantsweep.words import count

if TYPE_CHECKING:
    from quantsweep.calibration.data import CalibrationTokens
    from quantsweep.calibration.statistics import StatisticsStore
    from quantsweep.evaluation.evaluator import Evaluator
    from quantsweep.models.loading import LoadedModel
    from quantsweep.models.session import Session
    from quantsweep.pipeline.interface import Help
    from quantsweep.pipeline.run import Outcome

Send = Callable[[Mapping[str, Any]], None]
UNQUANTIZED_BITS = 16
GIVEN_GPUS = "QUANTSWEEP_GIVEN_GPUS"
"""How many GPUs the worker's job has for this process; not set where none were asked for."""
PROGRESS_SECONDS = 5.0


class TrialRunner:
    """Holds one loaded model, and its evaluator, between trials."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._spec: ModelSpec | None = None
        self._loaded: LoadedModel | None = None
        self._evaluator: Evaluator | None = None
        self._statistics: StatisticsStore | None = None
        self._text: CalibrationTokens | None = None
        self._overlaps: dict[tuple[str, ...], float] = {}
        self._refused: tuple[ModelSpec, ModelError, TracebackType | None] | None = None
        self._said = 0.0
        self._share = Share()

    @property
    def holds_a_model(self) -> bool:
        """False until a model is loaded, and after one could not be."""
        return self._loaded is not None

    def run(self, planned: PlannedTrial, settings: RunSettings) -> None:
        """Run one trial and report each step; the weights are the original ones again afterwards."""
        from quantsweep.models.session import Session

        loaded, evaluator = self._load(planned.trial.model, settings)
        session = Session(loaded, self._progress)
        meter = _Meter(loaded)
        self._share.begin([task.task_key for task in planned.tasks])
        try:
            state = self._quantize(session, planned)
            failed = [error for task in planned.tasks if (error := self._evaluate(session, evaluator, task, state)) is not None]
        except ModelError:
            raise  # this process ends with it, and the model with the process
        except BaseException:
            self._restore(session)
            raise
        seconds = self._restore(session)
        if failed:
            raise _all_of(failed)
        overlap = self._overlap(loaded, evaluator, planned)
        self._send({"event": "done", "restore_seconds": seconds, "calibration_overlap": overlap, **meter.read()})

    def _restore(self, session: Session) -> float:
        started = time.perf_counter()
        self._share.end_task()
        with while_bytes_move(self._progress):
            session.restore()
        return time.perf_counter() - started

    def _evaluate(self, session: Session, evaluator: Evaluator, task: TaskSpec, state: Mapping[str, str]) -> Exception | None:
        """Report one task's result; what is wrong with that task alone is returned: the trial's other tasks have theirs."""
        self._share.begin_task(task.task_key)
        try:
            with while_bytes_move(self._progress):
                evaluator.prepare(task)
            result = evaluator.evaluate(task)
        except (EvaluationError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            return error
        with while_bytes_move(self._progress):
            session.check_state(state)  # before it becomes a row
        self._send({"event": "task", "task_key": task.task_key, "result": asdict(result)})
        return None

    def _load(self, spec: ModelSpec, settings: RunSettings) -> tuple[LoadedModel, Evaluator]:
        started = time.perf_counter()
        with while_bytes_move(self._progress):
            loaded, evaluator = self._loaded_model(spec, settings)
        self._send({"event": "loaded", "load_seconds": time.perf_counter() - started, **_device_facts(loaded.device)})
        return loaded, evaluator

    def _loaded_model(self, spec: ModelSpec, settings: RunSettings) -> tuple[LoadedModel, Evaluator]:
        from quantsweep.evaluation.evaluator import Evaluator
        from quantsweep.models.blocks import decoder_blocks
        from quantsweep.models.loading import load_model

        if self._refused is not None and self._refused[0] == spec:
            raise self._refused[1].with_traceback(self._refused[2])  # a model that cannot be loaded fails all its trials, and is read once
        if self._loaded is None or self._evaluator is None or self._spec != spec:
            self._overlaps.clear()
            self._loaded = self._evaluator = self._statistics = None  # free the old model before the new one comes
            try:
                self._loaded = load_model(spec, _device(settings.device))
            except ModelError as error:
                if not isinstance(error.__cause__, OSError):  # a file system may have better days
                    traceback.clear_frames(error.__traceback__)  # they hold what was loaded of it
                    self._refused = (spec, error, error.__traceback__ and error.__traceback__.tb_next)
                raise
            task_path = None if settings.task_path is None else Path(settings.task_path)
            self._evaluator = Evaluator(
                self._loaded,
                batch_size=settings.batch_size,
                task_path=task_path,
                as_planned=True,
                data_revisions=dict(settings.data_revisions),
                on_progress=self._progress,
            )
            for block in decoder_blocks(self._loaded.model)[1]:  # a batch of a large model takes long
                block.register_forward_hook(lambda *_: self._progress())
            self._spec = spec
        return self._loaded, self._evaluator

    def _progress(self) -> None:
        """Told by whatever takes long: a slow trial is heard of, a hung one is not."""
        now = time.monotonic()
        if now - self._said > PROGRESS_SECONDS:
            self._said = now
            scored = 0.0 if self._evaluator is None else self._evaluator.scored
            self._send({"event": "progress", "share": self._share.read(scored)})

    def _quantize(self, session: Session, planned: PlannedTrial) -> Mapping[str, str]:
        """Report what was quantized, and return the state that is to be scored."""
        from quantsweep.pipeline.run import quantize

        started = time.perf_counter()
        text = self._calibration(session.loaded, planned.trial.calibration)
        outcome = quantize(session, planned.trial.quantization, self._help(planned.trial.seed, text))
        seconds = time.perf_counter() - started
        with while_bytes_move(self._progress):
            state = session.written_state()
        sizes = model_sizes(session.loaded, outcome) | {"calibration_hash": None if text is None else text.hash}
        layers = [layer.row() for layer in outcome.layers]
        self._send({"event": "quantized", "quantize_seconds": seconds, "sizes": sizes, "layers": layers})
        return state

    def _calibration(self, loaded: LoadedModel, spec: CalibrationSpec | None) -> CalibrationTokens | None:
        from quantsweep.calibration.data import load_tokens

        self._text = None
        if spec is not None:
            limits = {"max_length": loaded.max_length, "num_embeddings": loaded.num_embeddings}
            self._text = load_tokens(spec, loaded.tokenizer, **limits, on_progress=self._progress)
        return self._text

    def _overlap(self, loaded: LoadedModel, evaluator: Evaluator, planned: PlannedTrial) -> float | None:
        """The share of calibration sequences that have words in a row with what the trial's tasks score; None without calibration."""
        from quantsweep.tasks.progress import reporting
        from quantsweep.texts.ngrams import shared_windows

        if self._text is None:
            return None
        asked = (self._text.hash, *(task.task_key for task in planned.tasks))
        if asked not in self._overlaps:  # the same for all trials of a shard that look at this text
            scored = (text for task in planned.tasks for text in evaluator.texts(task))
            sequences = loaded.tokenizer.batch_decode(self._text.tokens_NT)
            self._overlaps[asked] = shared_windows(sequences, reporting(scored, self._progress))
        return self._overlaps[asked]

    def _help(self, seed: int | None, text: CalibrationTokens | None) -> Help:
        import torch

        from quantsweep.calibration.statistics import StatisticsStore
        from quantsweep.pipeline.interface import Help

        if self._statistics is None:
            self._statistics = StatisticsStore()
        return Help(
            tokens_NT=None if text is None else text.tokens_NT,
            generator=torch.Generator().manual_seed(seed or 0),
            progress=self._progress,
            statistics=self._statistics,
        )


def model_sizes(loaded: LoadedModel, outcome: Outcome) -> dict[str, Any]:
    """Counted, not assumed: stored bits of the quantized layers and of rewritings, 16 for each other parameter; with the architecture."""
    architecture = str(loaded.model.config.model_type)
    quantized = sum(layer.out_features * layer.in_features for layer in outcome.layers)
    stored = sum(layer.bits for layer in outcome.layers) + sum(record.bits for record in outcome.transforms)
    total = stored + UNQUANTIZED_BITS * (loaded.num_parameters - quantized)
    return {
        "num_parameters": loaded.num_parameters,
        "num_embedding_parameters": loaded.num_embedding_parameters,
        "num_quantized": quantized,
        "num_fallbacks": outcome.num_fallbacks,
        "bits_per_weight": stored / quantized if quantized else float(UNQUANTIZED_BITS),
        "total_model_bits": float(total),
        "total_model_bits_without_embeddings": float(total - UNQUANTIZED_BITS * loaded.num_embedding_parameters),
        "architecture": architecture,
        "architecture_known": architecture in KNOWN_ARCHITECTURES,
    }


def _device(wanted: str) -> str:
    import torch

    given, seen = int(os.environ.get(GIVEN_GPUS, "0")), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted != "cpu" and seen < given:  # a failure of the machine (`failures`): on the CPU it would take hours, at a GPU's price
        raise ModelError(
            f"this job was given {count(given, 'GPU')}, and torch sees {seen} here: no CUDA-capable device for what was planned"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "device=cuda was asked for, and torch sees no GPU here. Use device=auto or device=cpu, or ask the cluster for a GPU"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@cache
def _device_facts(device: str) -> dict[str, str | None]:
    if device == "cpu":
        return {"device": _processor(), "driver": None}
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        driver = None  # a GPU that is not NVIDIA's, or a container without its library
    return {"device": torch.cuda.get_device_name(), "driver": driver}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


class _Meter:
    """Peak memory and energy of one trial, of the GPUs that its model lies on."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._gpus = sorted({weight.device.index for weight in loaded.model.parameters() if weight.device.type == "cuda"})
        if self._gpus:
            import torch

            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
        self._start = self._joules()

    def read(self) -> dict[str, float | None]:
        """Since the meter was made; energy only where the GPU counts it."""
        if not self._gpus:
            scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
            return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "energy_joules": None}
        import torch

        now = self._joules()
        energy = None if now is None or self._start is None else now - self._start
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus)
        return {"peak_memory_bytes": peak, "energy_joules": energy}

    def _joules(self) -> float | None:
        if not self._gpus:
            return None
        import pynvml
        import torch

        try:
            pynvml.nvmlInit()
            uuids = [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in self._gpus]
            handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1000
        except pynvml.NVMLError:
            return None  # older GPUs and shared ones (MIG) do not count energy


def main(file_descriptor: int) -> None:
    """Serve trials from the pipe until it ends."""
    connection = Connection(file_descriptor)
    code = RunningCode()
    sending = threading.Lock()  # signs of life come from a thread of their own

    def send(message: Mapping[str, Any]) -> None:
        with sending:
            connection.send_bytes(json.dumps({**message, "code": code.digest()}).encode())

    runner = TrialRunner(send)
    requests = _listen(connection)
    while True:
        request = requests.get()
        settings = RunSettings.from_dict(request["settings"])
        try:
            runner.run(PlannedTrial.from_json(request["planned"]), settings)
        except Exception as error:  # noqa: BLE001 - the one place where an exception becomes a row
            # `last`: the worker ends this process before it goes on, so that no other trial meets it dying.
            is_lost = runner.holds_a_model and not _survives(error)
            send({"event": "failed", "last": is_lost, **asdict(classes.from_exception(error))})


def _all_of(failed: list[Exception]) -> Exception:
    """The failures of several tasks as one; a bug among them comes first, since its traceback is wanted."""
    bugs = [error for error in failed if not isinstance(error, EvaluationError)]
    return bugs[0] if bugs else failed[0] if len(failed) == 1 else EvaluationError("; ".join(map(str, failed)))


def _survives(error: Exception) -> bool:
    """After a device-side assert the CUDA context is lost, and after a failed restore the weights of the model that is held are."""
    return not isinstance(error, ModelError) and "CUDA error" not in str(error)


def _listen(connection: Connection) -> queue.SimpleQueue[dict[str, Any]]:
    """Receive in a thread, so that the end of the pipe is noticed while a trial runs."""
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def receive() -> None:
        while True:
            try:
                requests.put(json.loads(connection.recv_bytes()))
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    return requests


if __name__ == "__main__":
    main(int(sys.argv[1]))
