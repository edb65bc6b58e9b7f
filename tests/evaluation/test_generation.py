"""Generated answers: what plain `generate` gives, and right answers as the chat template writes them."""

import json
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hfpipe.cli import main
from hfpipe.core.errors import RecipeError
from hfpipe.evaluation.generation import require_generation
from hfpipe.model.create import train_tokenizer
from hfpipe.recipe import Suite

PROMPTS = ["The cat said", "The owl by the river said", "Question: The hen"]
MARKS = ["<|im_start|>", "<|im_end|>", "<sep>"]
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning or '' }}\n</think>\n\n{% endif %}"
CALLS = "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
TEMPLATES = {
    "plain": HEAD + "{{ m.content }}" + TAIL,
    "think block": HEAD + THINKS + "{{ m.content }}" + TAIL,
    "calls a tool": HEAD + "{{ m.content or '' }}" + CALLS + TAIL,
    "opened by the prompt": HEAD + THINKS + "{{ m.content }}" + TAIL.replace("assistant\n", "assistant\n<think>\n"),
}


def run_plainly(folder: Path, prompt: str, **options: Any) -> str:
    """The answer that a person gets from the saved model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answers(folder: Path, model: Path, prompts: list[str], **suite: Any) -> list[str]:
    rows = [{"prompt": prompt, "completion": " mew"} for prompt in prompts]
    found = plain.records(folder, model, rows, {"metrics": ["exact_match"], **suite})
    return [record["generation"]["prediction"] for record in found]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return plain.make_model(tmp_path / "model", llama=request.param == "llama")


def test_every_stop_token_of_the_saved_model_ends_an_answer(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    endless = run_plainly(model, PROMPTS[0], max_new_tokens=8)
    path = model / "generation_config.json"
    config = json.loads(path.read_text())
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    said = AutoModelForCausalLM.from_pretrained(model).generate(ids, do_sample=False, max_new_tokens=8)[
        0, ids.shape[1] :
    ]
    path.write_text(json.dumps({**config, "eos_token_id": [tokenizer.eos_token_id, int(said[3])]}))
    right = [run_plainly(model, prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert len(right[0]) < len(endless)
    found = answers(tmp_path, model, PROMPTS, generation={"max_new_tokens": 8})
    assert found[0] == tokenizer.decode(said[: said.tolist().index(int(said[3]))])
    for text, wanted in zip(found[1:], right[1:], strict=True):
        assert wanted.startswith(text)  # plain decoding writes a stop token that is no special one
    assert answers(tmp_path, model, PROMPTS[:1], generation={"max_new_tokens": 8, "eos_token_id": 1}) == [endless]


def test_max_length_counts_the_prompt_and_max_new_tokens_wins(model: Path, tmp_path: Path) -> None:
    for length in (12, 30):
        right = [run_plainly(model, prompt, max_length=length) for prompt in PROMPTS]
        assert answers(tmp_path, model, PROMPTS, generation={"max_length": length}) == right
    right = [run_plainly(model, prompt, max_new_tokens=3) for prompt in PROMPTS]
    assert answers(tmp_path, model, PROMPTS, generation={"max_length": 30, "max_new_tokens": 3}) == right


def test_a_prompt_longer_than_the_context_loses_its_beginning_and_the_score_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    long = " ".join(PROMPTS * 5)
    rows = [{"prompt": prompt, "completion": " mew"} for prompt in (PROMPTS[0], long)]
    suite: dict = {"metrics": ["exact_match"], "generation": {"max_new_tokens": 8}}
    [score], records = plain.scores_and_records(tmp_path, model, rows, suite)
    ids = tokenizer(long)["input_ids"]
    kept = torch.tensor([ids[-(plain.CONTEXT - 8) :]])
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    output = network.generate(kept, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(kept))
    assert records[1]["generation"]["prediction"] == tokenizer.decode(output[0, kept.shape[1] :])
    assert f"1 of 2 prompts lost their beginning ({len(ids) - kept.shape[1]} tokens" in score.signature
    suite["generation"]["max_new_tokens"] = plain.CONTEXT
    path = plain.recipe_of(tmp_path, rows, suite)
    assert main(["evaluate", str(model), str(path)]) == 2
    assert f"Write less than {plain.CONTEXT}" in capsys.readouterr().err


def speaker(folder: Path, template: str | None, said: Any) -> Path:
    """A model that says a text by heart, token by token, wherever it is asked to go on.

    Args:
        folder: Where it is saved.
        template: The tokenizer's chat template.
        said: Gives the text, of the tokenizer.
    """
    tokenizer = train_tokenizer(["The cat said mew and red and blue. Question: Answer:"] * 20, 320, 256)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    ids = [*tokenizer(said(tokenizer))["input_ids"], tokenizer.eos_token_id]
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=256, n_layer=1, n_head=1, n_positions=256)
    config.tie_word_embeddings, config.eos_token_id, config.bos_token_id = False, tokenizer.eos_token_id, None
    network = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in network.transformer.parameters():
            parameter.zero_()
        network.transformer.wpe.weight.copy_(torch.eye(256))
        network.transformer.ln_f.weight.fill_(1)
        network.lm_head.weight.zero_()
        for place, token in enumerate(ids[1:]):
            network.lm_head.weight[token, place] = 1
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talk(**answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Red?"}, {"role": "assistant", **answer}]}


CALL = {"type": "function", "function": {"name": "river", "arguments": {"animal": "cat"}}}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_model_that_says_what_the_template_teaches_is_right(tmp_path: Path, template: str) -> None:
    row = talk(content=None, tool_calls=[CALL]) if template == "calls a tool" else talk(content="red <sep> blue")
    model = speaker(
        tmp_path / "model",
        TEMPLATES[template],
        lambda tokenizer: tokenizer.apply_chat_template(row["messages"], tokenize=False).strip(),
    )
    scores, [record] = plain.scores_and_records(tmp_path, model, [row], {"metrics": ["exact_match", "rougeL"]})
    assert [score.value for score in scores] == [1, 1], record
    answer = record["generation"]["prediction"]
    assert "<|im_end|>" not in answer
    assert ("<call>" in answer) == (template == "calls a tool")
    assert ("</think>" in answer) == (template in ("think block", "opened by the prompt"))
    if template != "calls a tool":
        assert answer.endswith("red <sep> blue")


@pytest.mark.parametrize("template", ["think block", "opened by the prompt"])
def test_reasoning_is_taken_off_both_sides(tmp_path: Path, template: str) -> None:
    taught, said = talk(content="red"), talk(content="red", reasoning="The cat said blue.")
    model = speaker(
        tmp_path / "model",
        TEMPLATES[template],
        lambda tokenizer: tokenizer.apply_chat_template(said["messages"], tokenize=False).strip(),
    )
    suite: dict = {"metrics": ["exact_match"], "generation": {"max_new_tokens": 64}}
    [kept], _ = plain.scores_and_records(tmp_path, model, [taught], suite)
    [stripped], [record] = plain.scores_and_records(tmp_path, model, [taught], {**suite, "reasoning": "strip"})
    assert (kept.value, stripped.value) == (0, 1)
    assert record["generation"] == {"prediction": "red", "reference": "red"}


def test_special_tokens_of_an_answer_count_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"prompt": "The cat:", "completion": completion} for completion in (" <sep> red  <sep> don't", " red don't")
    ]
    model = speaker(tmp_path / "model", None, lambda _: rows[0]["prompt"] + rows[0]["completion"])
    found = plain.records(tmp_path, model, rows, {"metrics": ["exact_match"]})
    assert [record["values"]["exact_match"] for record in found] == [1, 0]
    assert {record["generation"]["prediction"] for record in found} == {rows[0]["completion"]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"num_beams": 0}, "num_beams: found 0"),
        ({"max_new_tokens": -3}, "max_new_tokens: found -3"),
        ({"max_new_tokens": 4, "repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"max_new_tokens": 4, "do_sample": True, "temperature": 1e-300}, "temperature: found 1e-300"),
        ({"max_new_tokens": 4, "watermarking_config": {"bias": "x"}}, "watermarking_config: found {'bias': 'x'}"),
        ({"eos_token_id": [2, 99999]}, "eos_token_id: found 99999; allowed are ids of tokens, 0 to"),
        ({"max_length": 1}, "max_length: found 1; it counts the prompt's tokens too"),
    ],
)
def test_a_word_of_generation_that_cannot_be_is_named_before_anything_is_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: dict[str, Any], told: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "The cat said", "completion": " mew"}) + "\n")
    suite = {"data": {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}}
    suite |= {"metrics": ["exact_match"], "generation": words}
    (tmp_path / "suites.yaml").write_text(json.dumps({"evaluate": {"asked": suite}}))
    assert main(["evaluate", str(model), str(tmp_path / "suites.yaml")]) == 2
    assert f"evaluate.asked.generation.{told}" in capsys.readouterr().err


def test_generation_without_a_metric_that_looks_at_it_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "The cat said", "completion": " mew"}) + "\n")
    suite = {"data": {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}}
    suite |= {"metrics": ["bits_per_byte"], "generation": {"max_new_tokens": 4}}
    (tmp_path / "suites.yaml").write_text(json.dumps({"evaluate": {"asked": suite}}))
    assert main(["evaluate", str(model), str(tmp_path / "suites.yaml")]) == 2
    assert "`generation` has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("reads_pairs", [False, True])
def test_words_are_tried_on_a_model_of_the_same_kind(reads_pairs: bool) -> None:
    tokenizer = train_tokenizer(["the cat said mew"] * 50, 300, 64)
    data = {"path": "json", "data_files": "rows.jsonl"}
    suite = Suite(data=data, metrics=["exact_match"], generation={"num_beams": 2, "max_new_tokens": 5})
    require_generation(suite, "asked", 300, tokenizer, reads_pairs=reads_pairs)
    suite.generation["num_return_sequences"] = 3
    with pytest.raises(RecipeError, match="num_return_sequences: found 3"):
        require_generation(suite, "asked", 300, tokenizer, reads_pairs=reads_pairs)
