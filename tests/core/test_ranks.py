"""Errors that ranks tell each other survive the way."""

import pickle

from hfpipe.core.errors import LostRank, Unreachable


def test_what_ranks_tell_each_other_survives_the_way() -> None:
    error = pickle.loads(pickle.dumps(Unreachable("no answer", "503")))
    assert (str(error), error.why) == ("no answer", "503")
    lost = pickle.loads(pickle.dumps(LostRank("rank 1 is gone", 75)))
    assert (str(lost), lost.exit_code) == ("rank 1 is gone", 75)
