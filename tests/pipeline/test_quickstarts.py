"""The small recipe of each task runs to a real score, by the command line; a part of its steps is enough for that."""

from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main


def scores(folder: Path, name: str, **changes: object) -> dict:
    changes |= {"output_dir": folder / "run", "shift": "false"}
    options = [word for key, value in changes.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    assert main(["run", f"recipes/{name}.yaml", *options]) == 0
    return tiny.scores(folder / "run") if (folder / "run" / "scorecard.json").exists() else {}


@pytest.mark.slow
@pytest.mark.long
def test_an_encoder_decoder_model_translates(tmp_path: Path) -> None:
    found = scores(tmp_path, "seq2seq-quickstart", stages__numbers__training__max_steps=120)
    for suite in ("german", "chinese"):
        assert found["base", suite, "chrf"] < 15
    assert found["numbers", "german", "chrf"] > 55
    assert found["numbers", "chinese", "bleu"] > 25  # of its characters, which is how Chinese is counted


@pytest.mark.slow
@pytest.mark.long
def test_a_decoder_translates_as_a_chat_and_learns_the_assistants_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scores(tmp_path, "chat-quickstart", stages__numbers__training__max_steps=130)
    for suite in ("german", "chinese"):
        assert found["base", suite, "exact_match"] == 0
        assert found["numbers", suite, "exact_match"] > 0.4
    assert main(["preview", "recipes/chat-quickstart.yaml", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "<|assistant|>[[fünfhundertneunzehn<|endoftext|>]]" in shown


@pytest.mark.slow
@pytest.mark.long
def test_one_of_two_answers_is_preferred(tmp_path: Path) -> None:
    changes = {"stages__numbers__training__max_steps": 150, "stages__german__training__learning_rate": 2e-3}
    found = scores(tmp_path, "preference-quickstart", **changes)
    assert found["numbers", "german", "exact_match"] < 0.7  # in either language, as it comes
    assert found["german", "preferred", "preference_accuracy"] > 0.9
    gained = found["german", "preferred", "preference_margin"] - found["numbers", "preferred", "preference_margin"]
    assert gained > 0.5  # nats
    assert found["german", "chinese", "exact_match"] < 0.1


@pytest.mark.slow
@pytest.mark.long
def test_one_class_several_and_a_number(tmp_path: Path) -> None:
    changes = {"stages__package__training__max_steps": 30, "evaluate__package__data__take": 80}
    changes["stages__magnitude__training__max_steps"] = 80
    found = scores(tmp_path, "classification-quickstart", **changes)
    assert found["package", "package", "accuracy"] > 0.2  # of seven
    assert found["digits", "digits", "f1"] > 0.9  # 0 at the start
    assert found["magnitude", "magnitude", "pearsonr"] > 0.9
    assert {stage for stage, suite, _ in found if suite == "digits"} == {"digits"}


@pytest.mark.slow
@pytest.mark.long
def test_folds_with_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores(tmp_path, "small-data-quickstart", stages__digits__training__num_train_epochs=8)
    said = capsys.readouterr().out
    assert "held_out f1" in said
    for fold in ("fold-1", "fold-2", "fold-3"):
        assert tiny.scores(tmp_path / "run" / fold)["digits", "held_out", "f1"] > 0.4  # 0 at the start
