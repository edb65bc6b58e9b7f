"""The files of a checkpoint are hashed by all ranks, each its own, and every one is looked at once."""

import random
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.stages.checkpoints import MANIFEST, fault_of, shared_out, write_manifest

OF_RANKS = {
    **{f"{part}/__{rank}_0.distcp": 100 for part in ("pytorch_model_fsdp_0", "optimizer_0") for rank in range(4)},
    **{f"rng_state_{rank}.pth": 1 for rank in range(4)},
    **{f"global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": 50 for rank in range(4)},
}


def test_a_rank_hashes_what_it_wrote_and_the_others_files_are_shared() -> None:
    whole = {"model-00001-of-00002.safetensors": 90, "optimizer.pt": 200, "trainer_state.json": 3, "scheduler.pt": 2}
    shares = shared_out(OF_RANKS | whole, 4)
    assert all(OF_RANKS[name] == shares[rank][name] for name in OF_RANKS for rank in range(4) if f"_{rank}_" in name)
    assert sum(map(len, shares)) == len(OF_RANKS | whole)
    assert {name for share in shares for name in share} == {*OF_RANKS, *whole}
    fewer = shared_out(OF_RANKS, 2)  # a resume on fewer ranks
    assert {name for share in fewer for name in share} == {*OF_RANKS}
    assert abs(sum(fewer[0].values()) - sum(fewer[1].values())) <= 100
    sizes = {f"{number}.safetensors": random.Random(number).randint(1, 50) for number in range(60)}
    loads = [sum(share.values()) for share in shared_out(sizes, 7)]
    assert max(loads) - min(loads) <= 50


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_file_is_found_whoever_hashes_it(tmp_path: Path, damage: str) -> None:
    for name in OF_RANKS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, "hash")
    assert fault_of(tmp_path, {"hash"}) is None
    assert fault_of(tmp_path, {"other"}) == "it belongs to another version of this stage"
    name = next(iter(OF_RANKS))
    if damage == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(name[:-1] + ("" if damage == "cut" else "!"))
    assert name in (fault_of(tmp_path, {"hash"}) or "")
    (tmp_path / MANIFEST).write_text("{}")
    assert fault_of(tmp_path, {"hash"}) == "its manifest cannot be read"


@pytest.mark.slow
def test_a_checkpoint_of_deepspeed_is_continued_by_as_many_ranks_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed itself ends in an assertion where their number differs. See also test_deepspeed.py."""
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, shift=False, energy=False)
    content["stages"] = content["stages"][:1]
    words = {"save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    content["stages"][0]["training"] |= words
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    content["stages"][0]["training"]["max_steps"] = 4
    place = tmp_path / "run/stages/prose/checkpoint-2/global_step2"
    place.mkdir()
    for rank in range(2):
        (place / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"")
    capsys.readouterr()
    assert main(["run", str(tiny.write(tmp_path, content))]) == 4
    said = capsys.readouterr().err
    assert "checkpoint-2 was saved by a launch with DeepSpeed on 2 rank(s), and this one has no DeepSpeed on 1" in said
