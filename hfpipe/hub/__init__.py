"""The Hub: what a run made goes there whole, private, once, and with a card.

- access.py: asked before training, whether it could
- bundle.py: the folder that is uploaded
- push.py: the push, in a process of its own that is ended past a deadline
- upload.py: that process, which sends only what is missing
- client.py: its client, and the Hub's errors in words
"""

from hfpipe.hub.bundle import prepare_artifact
from hfpipe.hub.push import check_access, push

__all__ = ["check_access", "prepare_artifact", "push"]
