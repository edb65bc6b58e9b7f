"""The files of `hfpipe launch`, run with stand-ins for torchrun and SLURM: 75 is started again, and nothing else is.

And the files that ship for `accelerate launch`, read by accelerate.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml
from fsdp_on_cpu import SHIPPED, environment_of

from hfpipe.cli import main
from hfpipe.recipe import load_recipe
from hfpipe.stages.sharding import plan_of_launch

pytestmark = pytest.mark.slow

STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> calls
[ "$(basename "$0")" != srun ] || exec "${@:2}"
[ "$(basename "$0")" != scontrol ] || { [ "$1" != show ] || echo node7; exit 0; }
times=$(grep -c ^torchrun calls)
code=$(echo CODES | cut -d' ' -f"$times")
mkdir -p run
echo "$code" > run/exit_code
[ "$code" = 0 ] || exit 1
"""


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, large: bool = False) -> str:
    content = tiny.recipe(folder, output_dir="run")
    if large:
        content["model"]["architecture"] |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        content["stages"] = content["stages"][:1]
        content["merge"] = False
    path = tiny.write(folder, content)
    capsys.readouterr()
    assert main(["launch", str(path), *options]) == 0
    return capsys.readouterr().out


def started(folder: Path, script: str, codes: str, *words: str) -> tuple[int, list[str]]:
    """Runs a script where torchrun ends with these codes in turn; its own code, and what it called."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("torchrun", "srun", "scontrol"):
        (tools / name).write_text(STAND_IN.replace("CODES", codes))
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7-8]"}
    ended = subprocess.run(
        ["bash", "-c", script, "launch", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert not ended.stderr, ended.stderr
    return ended.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("codes", "code", "times"), [("75 75 0", 0, 3), ("75 5", 5, 2), ("3", 3, 1), ("0", 0, 1)])
def test_torchrun_starts_again_what_can_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: str, code: int, times: int
) -> None:
    script = printed(tmp_path, capsys, "--nodes", "2", "--gpus", "4")
    ended, calls = started(tmp_path, script, codes, "10.0.0.1")
    assert (ended, len(calls)) == (code, times)
    assert calls[0].startswith("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id tiny")
    assert calls[0].endswith(f"--nproc-per-node 4 -m hfpipe run {tmp_path / 'tiny.yaml'}")


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (5, False)])
def test_slurm_puts_back_what_can_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, requeued: bool
) -> None:
    script = printed(tmp_path, capsys, "--nodes", "2", "--on", "slurm")
    ended, calls = started(tmp_path, script, str(code))
    assert ended == code
    assert ("scontrol requeue 12" in calls) == requeued
    assert any(call.startswith("torchrun --nnodes 2 --nproc-per-node 8") and "node7:29500" in call for call in calls)
    assert {"#SBATCH --requeue", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8"} <= set(script.splitlines())


def test_kubernetes_and_skypilot_are_told_nodes_devices_and_what_to_start_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = yaml.safe_load(printed(tmp_path, capsys, "--nodes", "4", "--gpus", "2", "--on", "k8s"))
    trainer = job["spec"]["trainer"]
    assert (job["kind"], trainer["numNodes"], trainer["numProcPerNode"]) == ("TrainJob", 4, 2)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 2}
    assert started(tmp_path, trainer["command"][2], "75")[0] == 75
    task = yaml.safe_load(printed(tmp_path, capsys, "--nodes", "4", "--gpus", "2", "--on", "sky"))
    assert task["num_nodes"] == 4
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert subprocess.run(["bash", "-n", "-c", task["run"]], check=False).returncode == 0


def test_the_plan_follows_from_the_predicted_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = printed(tmp_path, capsys, "--on", "slurm")
    assert "Weights whole on every rank." in small
    assert "FSDP" not in small
    large = printed(tmp_path, capsys, "--on", "slurm", "--memory", "80GB", large=True)
    assert "spread over the ranks by FSDP2" in large
    assert "export FSDP_VERSION=2" in large
    assert main(["launch", str(tmp_path / "tiny.yaml"), "--gpus", "2", "--memory", "24"]) == 4
    assert "Take more GPUs (--nodes, --gpus)" in capsys.readouterr().err


def test_the_base_of_an_adapter_is_predicted_in_half_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, output_dir="run", merge=False)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4}
    content["model"]["architecture"] |= sizes
    content["stages"] = content["stages"][1:]
    assert main(["launch", str(tiny.write(tmp_path, content)), "--on", "slurm"]) == 0
    found = re.search(r"sounds ([\d.]+) GiB", capsys.readouterr().out)
    assert found is not None
    weights = 4 * (2 * 4096**2 + 2 * 4096 * 2048 + 3 * 4096 * 14336)
    assert 2 * weights <= float(found[1]) * 2**30 <= 3 * weights


def test_a_stage_that_fits_by_a_plan_which_it_cannot_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, output_dir="run", merge=False)
    content["model"]["architecture"] |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    content["stages"] = [content["stages"][1] | {"quantization": "nf4"}]
    path = tiny.write(tmp_path, content)
    assert main(["launch", str(path), "--gpus", "4", "--memory", "24GB"]) == 0
    assert "Weights whole on every rank." in capsys.readouterr().out
    assert main(["launch", str(path), "--gpus", "4", "--memory", "5GB"]) == 2
    assert "bnb_4bit_quant_storage: bfloat16" in capsys.readouterr().err


# Of each file: the plan that hfpipe sees, and what else of it accelerate tells the ranks.
PLANS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu.yaml": ("none", {"ACCELERATE_MIXED_PRECISION": "no"}),
    "multi_node.yaml": ("none", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "fsdp2.yaml": ("fsdp", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}),
    "fsdp2_nodes.yaml": ("fsdp", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}),
    "fsdp2_offload.yaml": ("fsdp", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}),
    "fsdp2_hybrid.yaml": (
        "fsdp",
        {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8", "FSDP_VERSION": "2"}
        | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    ),
    "deepspeed_zero2.yaml": ("zero2", {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}),
    "deepspeed_zero3.yaml": ("zero3", {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}),
}


def test_every_file_of_accelerate_is_named() -> None:
    assert PLANS.keys() == {path.name for path in SHIPPED.iterdir()}


@pytest.mark.parametrize("file", PLANS)
def test_a_file_of_accelerate_asks_for_the_plan_that_it_names(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = PLANS[file]
    environment = environment_of(file, "--num_processes", "16")
    assert environment.items() >= told.items()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(tiny.write(tmp_path, tiny.recipe(tmp_path)))
    assert {plan_of_launch(stage) for stage in recipe.stages} == {asked}
    head = (SHIPPED / file).read_text().split("compute_environment")[0]
    assert f"--config_file recipes/accelerate/{file}" in head
    pages = Path(__file__).parents[2] / "docs"
    assert f"(../recipes/accelerate/{file})" in (pages / "launch.md").read_text()
