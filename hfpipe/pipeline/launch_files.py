"""`hfpipe launch`: the file that starts a recipe on a cluster, and the line that submits it.

The plan (plain data parallelism, or FSDP2) follows from the predicted memory of the recipe's stages. Nothing is started
here: torchrun, SLURM, Kubernetes and SkyPilot do that, and start the job again where the run ended with exit code 75.
torchrun itself ends with 1 then, so the code is read from `RUN/exit_code`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from hfpipe.core.errors import MachineError
from hfpipe.core.files import GIB
from hfpipe.model.create import architecture_of
from hfpipe.model.load import ModelRef, config_of
from hfpipe.recipe import Recipe
from hfpipe.stages.memory import CACHED, DEFAULT_LENGTH, predicted, setting_of
from hfpipe.stages.sharding import require_plan

GRACE = 240  # seconds that the ranks have to save a checkpoint once they are told to stop
PORT = 29500
USABLE = 0.92 / (1 + CACHED)  # of a GPU's memory: the rest is the driver's and the allocator's
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}


@dataclass(frozen=True)
class Job:
    """A run to be started.

    Args:
        name: Of the recipe.
        recipe: Path of its file.
        folder: Path of its run folder.
        nodes: Machines.
        gpus: GPUs of each; a rank has one.
        environment: Variables by which accelerate reads the plan.
    """

    name: str
    recipe: str
    folder: str
    nodes: int
    gpus: int
    environment: dict[str, str]

    @property
    def command(self) -> str:
        return f"-m hfpipe run {shlex.quote(self.recipe)}"

    @property
    def told(self) -> str:
        """The run's own exit code, in a shell, after the launcher has ended."""
        return f'"$(cat {shlex.quote(self.folder + "/exit_code")} 2>/dev/null || echo 1)"'


def launch(recipe: Recipe, path: str, nodes: int, gpus: int, gibibytes: float, on: str) -> str:
    """Returns the file, and how it is submitted.

    Args:
        recipe: The recipe.
        path: Of its file.
        nodes: Machines.
        gpus: GPUs of each.
        gibibytes: Memory of a GPU.
        on: A key of `CLUSTERS`.

    Raises:
        MachineError: A stage does not fit on so many GPUs, however it is spread.
        RecipeError: A stage fits by FSDP2 alone, and asks for what cannot be combined with it.
    """
    sharded, lines = _plan(recipe, nodes * gpus, gibibytes)
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"} | (FSDP if sharded else {})
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE)
    job = Job(recipe.name, path, str(recipe.run_folder), nodes, gpus, environment)
    return CLUSTERS[on](job, lines)


def _plan(recipe: Recipe, ranks: int, gibibytes: float) -> tuple[bool, list[str]]:
    """Returns whether the weights have to be spread, and the prediction of each stage in a line."""
    config = _config(recipe)
    room = gibibytes * USABLE
    for sharding in ("none", "fsdp") if ranks > 1 else ("none",):
        sizes: dict[str, float | None] = {}
        for stage in recipe.stages:
            require_plan(recipe, stage, sharding)
            tokens = stage.training.get("max_length") or DEFAULT_LENGTH
            here = setting_of(recipe, stage, tokens=tokens, targets=tokens if stage.kind == "translation" else 0)
            checkpointing = {} if here.checkpointing is None else here.checkpointing
            halved = stage.adapter is not None and recipe.model.dtype == "auto"  # as on a GPU that computes in bfloat16
            dtype = torch.bfloat16 if halved else here.dtype
            there = replace(here, device="cuda", dtype=dtype, autocast=torch.bfloat16, checkpointing=checkpointing)
            memory, _ = predicted(config, replace(there, ranks=ranks, sharding=sharding), held=0)
            sizes[stage.name] = None if memory is None else memory.total / GIB
        if all(size is None or size <= room for size in sizes.values()):
            how = "spread over the ranks by FSDP2" if sharding == "fsdp" else "whole on every rank"
            told = [f"{name} {'not predicted' if size is None else f'{size:.1f} GiB'}" for name, size in sizes.items()]
            return sharding == "fsdp", [
                f"Weights {how}. Peak memory of a rank, predicted: {', '.join(told)}, of {room:.0f} GiB."
            ]
    worst = max((size, name) for name, size in sizes.items() if size is not None)
    raise MachineError(
        f"stage {worst[1]} has a predicted peak memory of {worst[0]:.1f} GiB on each of {ranks} GPUs, spread over "
        f"them, and {room:.0f} GiB of each may be used. Take more GPUs (--nodes, --gpus), larger ones (--memory), an "
        "adapter (lora:), or fewer rows at once (per_device_train_batch_size)."
    )


def _config(recipe: Recipe) -> Any:
    options = recipe.model
    if options.id is not None:
        return config_of(ModelRef(options.id, options, revision=options.revision))
    fields = architecture_of(options)
    if options.tokenizer is not None and options.tokenizer.train is not None:
        fields.setdefault("vocab_size", options.tokenizer.train.vocab_size)
    return AutoConfig.for_model(**fields)


def _comments(lines: list[str], submit: str) -> str:
    return "\n".join(f"# {line}" for line in (*lines, f"Start: {submit}"))


def _exports(job: Job) -> str:
    return "\n".join(f"export {name}={value}" for name, value in job.environment.items())


def _torchrun(job: Job, lines: list[str]) -> str:
    """One script for each machine; torchrun's agents meet at the first one and start again when one is lost."""
    meeting = f'--rdzv-backend c10d --rdzv-endpoint "$1:{PORT}" --rdzv-id {job.name}'
    start = f"--nnodes {job.nodes} {meeting}" if job.nodes > 1 else "--standalone"
    usage = "bash launch.sh ADDRESS-OF-THE-FIRST-MACHINE, on each machine" if job.nodes > 1 else "bash launch.sh"
    return f"""#!/bin/bash
{_comments(lines, usage)}
{_exports(job)}
code=75
while [ "$code" = 75 ]; do   # stopped with a checkpoint, or a machine was lost: go on
  torchrun {start} --nproc-per-node {job.gpus} {job.command} & run=$!
  trap 'kill -TERM $run; stopped=yes' TERM INT
  wait $run; launched=$?
  [ -z "$stopped" ] || {{ wait $run; launched=$?; }}
  code=0
  [ "$launched" = 0 ] || code={job.told}
  [ -z "$stopped" ] || break
done
exit "$code"
"""


def _slurm(job: Job, lines: list[str]) -> str:
    """One task a node, which is torchrun; SLURM tells it to stop before the time is over, and puts the job back."""
    return f"""#!/bin/bash
{_comments(lines, "sbatch launch.sbatch")}
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.gpus}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@{GRACE + 60}
#SBATCH --open-mode=append
#SBATCH --output={job.name}-%j.log
{_exports(job)}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes {job.nodes} --nproc-per-node {job.gpus} \\
  --rdzv-backend c10d --rdzv-endpoint "$first:{PORT}" --rdzv-id "$SLURM_JOB_ID" {job.command} & run=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"; stopped=yes' TERM
wait $run; launched=$?
[ -z "$stopped" ] || {{ wait $run; launched=$?; }}
code=0
[ "$launched" = 0 ] || code={job.told}
[ "$code" != 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""


def _script(job: Job, start: str) -> str:
    return f"torchrun {start} --nproc-per-node {job.gpus} {job.command} || exit {job.told}"


def _k8s(job: Job, lines: list[str]) -> str:
    """A TrainJob of Kubeflow Trainer, whose runtime gives torchrun its place by PET_ variables."""
    name = job.name.lower().replace("_", "-").replace(".", "-")
    environment = [{"name": key, "value": value} for key, value in job.environment.items()]
    gpus = {"nvidia.com/gpu": job.gpus}
    trainer = {
        "image": "IMAGE-WITH-HFPIPE",
        "numNodes": job.nodes,
        "numProcPerNode": job.gpus,
        "resourcesPerNode": {"requests": gpus, "limits": dict(gpus)},
        "env": environment,
        "command": ["bash", "-c", f"torchrun {job.command} || exit {job.told}"],
    }
    content = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer},
    }
    more = [
        "The runtime has to mount one disk on all pods, at the place of the run folder, and to restart its JobSet",
        f"(failurePolicy: maxRestarts) and leave pods {GRACE + 60} s to end (terminationGracePeriodSeconds).",
    ]
    return f"{_comments([*lines, *more], 'kubectl create -f launch.yaml')}\n{_yaml(content)}"


def _sky(job: Job, lines: list[str]) -> str:
    """A managed job of SkyPilot, which starts it again elsewhere when machines are taken away."""
    recovery = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    content = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"GPU-NAME:{job.gpus}", "job_recovery": recovery},
        "envs": job.environment,
        "file_mounts": {"/runs": {"name": "BUCKET", "mode": "MOUNT_CACHED"}},
        "setup": "pip install hfpipe",
        "run": _script(
            job,
            "--nnodes $SKYPILOT_NUM_NODES --node-rank $SKYPILOT_NODE_RANK "
            f'--master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port {PORT}',
        ),
    }
    return f"{_comments(lines, 'sky jobs launch launch.yaml')}\n{_yaml(content)}"


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=1000)


CLUSTERS = {"torchrun": _torchrun, "slurm": _slurm, "k8s": _k8s, "sky": _sky}
