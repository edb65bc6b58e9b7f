"""A run from the Hub to the Hub: base model and streamed FineWeb by their names, the adapter pushed with its card."""

import json
from pathlib import Path

import tiny
from datasets import Dataset, disable_progress_bars
from hub_server import HubServer
from huggingface_hub import ModelCard

from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.recipe import load_recipe

CARD = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"


def fineweb(folder: Path) -> dict[str, bytes]:
    """Three shards with the nine columns of FineWeb."""
    disable_progress_bars()
    rows = [json.loads(line) for line in (folder / "prose.jsonl").read_text().splitlines()]
    files = {"README.md": CARD.encode()}
    for number in range(3):
        shard = [
            {
                "text": row["text"],
                "id": f"<urn:uuid:{row['id']}>",
                "dump": "CC-MAIN-2024-10",
                "url": "http://example.com",
                "date": "2024-02-21T00:00:00Z",
                "file_path": "s3://none",
                "language": "en",
                "language_score": 0.9,
                "token_count": len(row["text"].split()),
            }
            for row in rows[number::3]
        ]
        Dataset.from_list(shard).to_parquet(folder / "shard.parquet", batch_size=20)
        files[f"sample/10BT/00{number}_00000.parquet"] = (folder / "shard.parquet").read_bytes()
    return files


def base_model(folder: Path) -> dict[str, bytes]:
    texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(tiny.recipe(folder)["model"]["architecture"], tokenizer, 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {path.name: path.read_bytes() for path in (folder / "base").iterdir()}


def test_from_the_hub_to_the_hub(hub: HubServer, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    hub.add_repo("model", "someone/base", base_model(tmp_path))
    hub.add_repo("dataset", "HuggingFaceFW/fineweb", fineweb(tmp_path))
    content = tiny.recipe(tmp_path, model={"id": "someone/base"}, merge=False)
    content["stages"][0]["data"] = [{"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "streaming": True}]
    content["stages"][0]["lora"] = {"r": 4, "target_modules": "all-linear"}
    del content["stages"][1]
    content["push"] = {"repo_id": "me/adapter", "what": "adapter"}
    path = tiny.write(tmp_path, content)
    environment = {**hub.env(tmp_path / "home", token=hub.token), "HF_HUB_OFFLINE": "0"}
    process = tiny.start("run", str(path), **environment)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    commit = hub.commits("someone/base")[-1].oid
    assert load_recipe(tmp_path / "run" / "recipe.yaml").model.revision == commit
    files = hub.files("me/adapter")
    adapter = json.loads(files["adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("someone/base", commit)
    assert "adapter_model.safetensors" in files
    card = ModelCard(files["README.md"].decode())
    shown = {result.metric_value for result in card.data.eval_results}
    assert round(tiny.scores(tmp_path / "run")["prose", "general", "bits_per_byte"], 6) in shown
    for left in [path for path in (tmp_path / "run").rglob("*") if path.is_file()]:
        assert hub.token.encode() not in left.read_bytes(), f"{left} holds the token"
    assert hub.token not in output
    stream = json.loads((tmp_path / "run" / "stages" / "prose" / "done.json").read_text())["data"]
    assert stream["tokens"] == 6 * 4 * 64
