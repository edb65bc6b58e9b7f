"""A small Hub: enough of the protocol for the unmodified clients, in memory, with faults on demand.

It serves huggingface_hub, transformers, PEFT, datasets (streaming too) and evaluate when `HF_ENDPOINT` points at it:

    with HubServer() as hub:
        hub.add_repo("dataset", "team/corpus", {"README.md": b"...", "data/0.parquet": Path("0.parquet")})
        subprocess.run([...], env=os.environ | hub.env(home=tmp_path))

Clients read `HF_ENDPOINT` and `HF_HUB_DISABLE_XET` when they are imported, hence the subprocess.

- server.py: `HubServer`, its repositories, tokens and planted faults
- answers.py: reads as a specification; `ROUTES` lists every request, each answered by the method of that name
- metadata.py: what must hold of a model card's metadata
- faults.py: what goes wrong
- repos.py: repositories, commits, files
- xet.py: the storage behind the newer of the two upload pipelines; the other, Git LFS, is in answers.py
"""

from hub_server.server import HubServer

__all__ = ["HubServer"]
