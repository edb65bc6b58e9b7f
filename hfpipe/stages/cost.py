"""The cost of training: time, devices, tokens, FLOPs, and energy by codecarbon where it is installed.

Every attempt at a stage leaves one record in the stage's cost.json, rewritten at each log line and checkpoint, so that
an attempt which is killed counts as far as it was logged, and the sum over the attempts is what the stage really cost.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import ranks
from hfpipe.core.errors import Stopped
from hfpipe.core.files import load_json, write_json
from hfpipe.data.dataloader import BatchLoader
from hfpipe.model.memory import Memory, PeakMeter
from hfpipe.model.shards import give_back_memory
from hfpipe.recipe import Energy

SUMMED = ("steps", "tokens", "flops", "seconds", "training_seconds", "waited_seconds", "device_hours")
# Teraflops of products of matrices in bfloat16 (float16 where there is none), summed in float32, without sparsity, by
# the data sheets of NVIDIA and AMD; of a form that has others, the name with its form stands first.
PEAKS = {
    **{"B300": 2250, "B200": 2250, "GB200": 2500, "H200": 989, "GH200": 989, "H20": 148, "H100 PCIe": 756},
    **{"H100 NVL": 835, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125},
    **{"L40S": 362, "L40": 181, "L4": 121, "T4": 65, "V100": 125, "RTX 6000 Ada": 364, "RTX A6000": 155},
    **{"RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080": 60},
    **{"MI355X": 2517, "MI350X": 2310, "MI325X": 1307, "MI300X": 1307, "MI300A": 981, "MI250X": 191, "MI210": 181},
}
OTHER_FORMS = r"(?!.*(?:MIG|Laptop|Max-Q))(?!-?\s?(?:Ti|SUPER|D)\b)"  # what has less than the name says


class EnergyMeter:
    """The energy that this machine draws, by codecarbon: offline, silent, without a file.

    Args:
        country: Three letters of the country that the electricity comes from; None when it is not known.
    """

    def __init__(self, country: str | None) -> None:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output_methods.base_output import BaseOutput

        class Reading(BaseOutput):
            total: Any = None

            def out(self, total: Any, delta: Any) -> None:
                self.total = total

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self._reading, self._country = Reading(), country
        # Everything that could reach a network or leave a file is said here, so that no variable and no
        # .codecarbon.config of the user's can turn it on.
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            region=None,
            cloud_provider=None,
            cloud_region=None,
            country_2letter_iso_code=None,
            electricitymaps_api_token="",
            emissions_endpoint=None,
            output_methods=[],
            output_handlers=[self._reading],
            output_dir=".",
            api_call_interval=-1,
            tracking_mode="machine",
            allow_multiple_runs=True,  # else a lock, which takes over SIGTERM
            log_level="critical",
        )
        self._start = threading.Thread(target=self._tracker.start, daemon=True)  # it watches the CPU for a second first
        self._start.start()

    def read(self) -> dict[str, float]:
        """`kwh` since the start, and `kg_co2` where the country is known; nothing while nothing is known."""
        if not self._start.is_alive():
            self._tracker.flush()
        total = self._reading.total
        if total is None:
            return {}
        return {"kwh": total.energy_consumed, **({"kg_co2": total.emissions} if self._country else {})}

    def stop(self) -> None:
        """Takes the last reading, which `read` keeps."""
        self._start.join()
        self._tracker.stop()


class CostMeter(TrainerCallback):
    """Measures one attempt at a stage, from loading the model to saving it; `with` it around the stage.

    Args:
        folder: `stages/<stage>`; cost.json is written there, by the main process.
        stage_hash: Records of another version of the stage are not counted.
        energy: The recipe's `energy`.
        predict: Predicts the peak memory, of the tokens of the longest row and target, and of the bytes that the
            process holds before the model is loaded; it returns None where it cannot.
    """

    def __init__(
        self,
        folder: Path,
        stage_hash: str,
        energy: Energy | bool,
        predict: Callable[[tuple[int, int], int], Memory | None] | None = None,
    ) -> None:
        self.path, self.stage_hash, self._predict = folder / "cost.json", stage_hash, predict
        self._loader: BatchLoader | None = None
        self._tokens_per_step: float | None = None
        self._flops_per_token = 0
        gc.collect()  # an earlier stage may hang in cycles, and the C library keeps what was freed for the next one
        give_back_memory()
        self._peak = PeakMeter()
        self._most, self._trained = 0, False  # the highest peak of all ranks, which is that of the training
        self._begin = time.perf_counter()
        self._training = 0.0  # the clock at the first step of this attempt
        self._from = 0  # step of the checkpoint that is continued from
        self._elsewhere: dict[str, float] = {}  # what the other machines of the run drew
        self._meter, how = None, "energy is off in the recipe"
        if energy is not False:
            how = "codecarbon is not installed"
            if importlib.util.find_spec("codecarbon"):
                from codecarbon import __version__

                how = f"codecarbon {__version__}"
                if ranks.state().is_local_main_process:  # it measures a machine, not a process
                    self._meter = EnergyMeter(energy.country_iso_code if isinstance(energy, Energy) else None)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        peak = peak_flops(device)
        self.record: dict[str, Any] = {
            "device": device,
            "devices": ranks.ranks(),
            "peak_flops": peak and peak * ranks.ranks(),
            "energy_by": how,
            "country": energy.country_iso_code if isinstance(energy, Energy) else None,
            **dict.fromkeys(SUMMED, 0),
        }
        known = load_json(self.path) if ranks.is_main() and self.path.exists() else {}
        self._earlier = known["attempts"] if known.get("stage") == stage_hash else []

    def __enter__(self) -> CostMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._meter is not None:
            self._meter.stop()
        if kind is None or issubclass(kind, Stopped):  # an error may be this rank's alone, and the others not here
            self._gather()
        self._write()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training, self._from = time.perf_counter(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        steps = state.global_step - self._from
        self.record["steps"] = steps
        self.record["tokens"] = round(steps * self._tokens_per_step) if self._tokens_per_step else None
        self.record["flops"] = self.record["tokens"] and self.record["tokens"] * self._flops_per_token
        self.record["training_seconds"] = round(time.perf_counter() - self._training, 3)
        self.record["waited_seconds"] = round(self._loader.waited_seconds, 3) if self._loader is not None else 0
        self._gather()
        self._write()

    on_save = on_log

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_log(args, state, control)
        self._trained = True

    def watch(self, model: Any, loader: BatchLoader, tokens_per_step: float | None) -> None:
        """Says what is trained, before the first step.

        Args:
            model: The model, with what is trained of it.
            loader: Knows how long steps waited for data.
            tokens_per_step: Tokens of a step over all ranks, without padding; None where that is not known.
        """
        self._loader, self._tokens_per_step, self._flops_per_token = loader, tokens_per_step, flops_per_token(model)

    def mfu(self, tokens_per_second: float) -> float | None:
        """The share of the devices' peak that a speed over all ranks takes; None where the peak is not known."""
        peak = self.record["peak_flops"]
        return tokens_per_second * self._flops_per_token / peak if peak else None

    def predict(self, tokens: int, targets: int) -> None:
        """Records a prediction of the peak memory, beside which the measured one stands.

        Args:
            tokens: Of the longest row of a batch.
            targets: Of the longest target beside it.
        """
        if ranks.is_main() and self._predict is not None:
            with torch.random.fork_rng(devices=[]):  # the training draws the same with and without
                memory = self._predict((tokens, targets), self._peak.before)
            if memory is not None:
                self.record |= {"predicted_memory": memory.parts(), "predicted_tokens": max(tokens, targets)}

    def total(self) -> dict[str, Any]:
        """The sums over all attempts at the stage so far, see `total_of`; on the main process."""
        return total_of([*self._earlier, self.record])

    def _gather(self) -> None:
        """Asks the other ranks for their peak, and the other machines what they drew; on every rank."""
        if ranks.ranks() > 1:
            mine = self._meter.read() if self._meter is not None and not ranks.is_main() else {}
            others = ranks.gather(mine | {"peak": 0 if self._trained else self._peak.read()})
            self._elsewhere = {key: sum(other.get(key, 0.0) for other in others) for key in ("kwh", "kg_co2")}
            self._most = max([self._most, *(other["peak"] for other in others)])

    def _write(self) -> None:
        if not ranks.is_main():
            return
        self.record["seconds"] = round(time.perf_counter() - self._begin, 3)
        self._most = self._most if self._trained else max(self._most, self._peak.read())
        self.record |= {"memory_before": self._peak.before, "peak_memory": self._most}
        self.record["device_hours"] = self.record["seconds"] * self.record["devices"] / 3600
        if self._meter is not None:
            self.record |= {key: value + self._elsewhere.get(key, 0.0) for key, value in self._meter.read().items()}
        attempts = [*self._earlier, self.record]
        write_json(self.path, {"stage": self.stage_hash, "attempts": attempts, "total": total_of(attempts)})


def peak_flops(device: str) -> float | None:
    """Returns the most operations a second that a device can do; None of a device that `PEAKS` does not have.

    Args:
        device: Its name, as `torch.cuda.get_device_name` has it.
    """
    known = (peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b{OTHER_FORMS}", device))
    peak = next(known, None)
    return peak and peak * 1e12


def flops_per_token(model: Any) -> int:
    """Returns the FLOPs of a training step for each of its tokens.

    Each parameter takes part in a multiplication and an addition forward, and in as many backward for the gradient of
    its input: 4 FLOPs. One that is trained takes 2 more for its own gradient. So a full fine-tune takes 6 for each
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and an adapter hardly more than 4. Embeddings are looked up,
    which is no multiplication; the head that says the next token counts, tied to them or not. Attention over earlier
    tokens is left out, and of a mixture all experts count.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    looked_up -= {id(head.weight)} if head is not None else set()
    # Of 4 bits, two to a byte: the layer knows the shape, and a weight that is spread does not.
    stored = {id(module.weight): module.quant_state for module in model.modules() if hasattr(module, "quant_state")}
    total = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up or ".original_module." in name:  # PEFT keeps the first weights of what it copies
            continue
        whole = stored.get(id(parameter))
        size = math.prod(whole.shape) if whole is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += (6 if parameter.requires_grad else 4) * size
    return total


def total_of(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over the attempts at a stage; what no attempt knows is None.

    Args:
        attempts: Records of cost.json, the last one last.

    Returns:
        The sums, over the training loop `tokens_per_second`, `mfu` (the share of the devices' peak, of tokens that are
        no padding; None where that is not known) and `data_wait` (the share of the time), `attempts`, `measured`
        (attempts whose energy was measured), and of the last attempt `device`, `devices`, `energy_by` and `country`.
    """
    sums: dict[str, Any] = {}
    for key in (*SUMMED, "kwh", "kg_co2"):
        known = [record[key] for record in attempts if record.get(key) is not None]
        sums[key] = sum(known) if known else None
    seconds = sums["training_seconds"] or 0
    possible = sum(
        (record.get("peak_flops") or math.nan) * (record.get("training_seconds") or 0) for record in attempts
    )
    return {
        **sums,
        "tokens_per_second": sums["tokens"] / seconds if sums["tokens"] and seconds else None,
        "mfu": sums["flops"] / possible if sums["flops"] and possible > 0 else None,
        "data_wait": sums["waited_seconds"] / seconds if sums["waited_seconds"] is not None and seconds else None,
        "attempts": len(attempts),
        "measured": sum("kwh" in record for record in attempts),
        "peak_memory": max((record.get("peak_memory", 0) for record in attempts), default=0) or None,
        "predicted_memory": attempts[-1].get("predicted_memory", {}).get("total"),
        **{key: attempts[-1][key] for key in ("device", "devices", "energy_by", "country")},
    }
