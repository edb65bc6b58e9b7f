"""Two and three hosts: equal to one; a host that is lost in mid-step ends all soon, and the same command continues."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import tiny
from networks import PORT, Network, address, exit_code, network, reason_against, wait_for

from hfpipe.cli import main

REASON = reason_against()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
    pytest.mark.long,
]
CONFIG = Path(__file__).parents[2] / "recipes" / "accelerate" / "multi_node.yaml"
LOST_AFTER = 10
STEPS = 150


def recipe(folder: Path, steps: int, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, lost_rank_seconds=LOST_AFTER, energy=False, shift=False, **changes)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["global_batch_size"] = 12
    content["stages"][0]["lanes"] = 24
    content["stages"][0]["training"] |= {"max_steps": steps, "logging_steps": 1, "save_steps": 10}
    content["evaluate"] = {"general": content["evaluate"]["general"]}
    return tiny.write(folder, content)


def by_accelerate(net: Network, hosts: int, path: Path, *more: str) -> list[subprocess.Popen]:
    """The lines of recipes/accelerate/multi_node.yaml, with CPUs in place of GPUs."""
    config = path.with_name("hosts.yaml")
    config.write_text(CONFIG.read_text().replace("mixed_precision: bf16", "mixed_precision: 'no'\nuse_cpu: true"))
    line = ("accelerate.commands.launch", "--config_file", str(config))
    size = ("--num_machines", str(hosts), "--num_processes", str(hosts))
    place = ("--main_process_ip", address(0), "--main_process_port", str(PORT))
    return [
        net.start(host, *line, *size, "--machine_rank", str(host), *place, "-m", "hfpipe", "run", str(path), *more)
        for host in range(hosts)
    ]


def by_torchrun(net: Network, hosts: int, path: Path) -> list[subprocess.Popen]:
    line = ("torch.distributed.run", "--nnodes", str(hosts), "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    meeting = ("--rdzv-endpoint", f"{address(0)}:{PORT}", "--rdzv-id", "tiny")
    return [
        net.start(
            host,
            *(*line, *meeting, "--rdzv-conf", f"is_host={host == 0}", "--local-addr", address(host)),
            *("-m", "hfpipe", "run", str(path)),
            ACCELERATE_USE_CPU="true",
        )
        for host in range(hosts)
    ]


LINES = {"accelerate": by_accelerate, "torchrun": by_torchrun}


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "run/stages/prose/log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that was never stopped."""
    folder = tmp_path_factory.mktemp("one")
    assert main(["run", str(recipe(folder, STEPS))]) == 0
    return folder


def assert_equal(folder: Path, one: Path) -> None:
    assert steps_of(folder) == list(range(1, STEPS + 1))
    assert tiny.scores(folder / "run") == pytest.approx(tiny.scores(one / "run"), abs=2e-3)


@pytest.mark.parametrize(("line", "hosts"), [("accelerate", 2), ("torchrun", 3)])
def test_hosts_are_one_host(one: Path, tmp_path: Path, line: str, hosts: int) -> None:
    path = recipe(tmp_path, STEPS)
    with network(hosts) as net:
        for process in LINES[line](net, hosts, path):
            said = process.communicate(timeout=300)[0]
            assert process.returncode == 0, said
    assert exit_code(tmp_path / "run") == 0
    assert_equal(tmp_path, one)


@pytest.mark.parametrize(
    ("line", "hosts", "lost", "how"),
    [("accelerate", 2, 1, "cut"), ("accelerate", 3, 2, "kill")],
)
def test_a_lost_host_ends_all_soon_and_the_same_command_continues(
    one: Path, tmp_path: Path, line: str, hosts: int, lost: int, how: str
) -> None:
    path = recipe(tmp_path, STEPS)
    with network(hosts) as net:
        processes = LINES[line](net, hosts, path)
        wait_for(lambda: list((tmp_path / "run").glob("stages/prose/checkpoint-*/manifest.json")), processes[0])
        getattr(net, how)(lost)
        begun = time.monotonic()
        left = [process for host, process in enumerate(processes) if how == "cut" or host != lost]
        said = [process.communicate(timeout=60)[0] for process in left]
        took = time.monotonic() - begun
        print(*said, sep="\n----\n")
        assert took < 3 * LOST_AFTER  # the ranks end within LOST_AFTER, and their launchers after them
        assert all(process.returncode != 0 for process in left)
        for host, text in enumerate(said):
            assert f"rank {lost} is gone" in text or host == lost, text
            assert "fault of hfpipe" not in text
        assert exit_code(tmp_path / "run") == 75
        assert steps_of(tmp_path)[-1] < STEPS
        if how == "cut":
            net.join(lost)
            for process in LINES[line](net, hosts, path):
                told = process.communicate(timeout=300)[0]
                assert process.returncode == 0, told
    if how == "kill":  # fewer hosts do too
        assert main(["run", str(path)]) == 0
    assert_equal(tmp_path, one)
