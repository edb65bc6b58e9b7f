"""Likelihood of text: rolling windows as lm-eval's, and bits over the bytes and words of the same text."""

import json
import math
import re
from pathlib import Path

import plain
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

METRICS = ["bits_per_byte", "perplexity", "word_perplexity"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "{{ m.content", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content"
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain.make_model(tmp_path_factory.mktemp("model"), llama=request.param == "llama")


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    folder = plain.make_model(tmp_path / "chat", llama=False, context=256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    network.save_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def likelihoods(folder: Path, model: Path, rows: list[dict]) -> list[dict]:
    return [record["likelihood"] for record in plain.records(folder, model, rows, {"metrics": METRICS})]


def texts() -> list[str]:
    told = [f"The {animal} said {sound} by the river. " for animal, sound in tiny.SOUNDS.items()]
    return ["".join(told), " \n " + told[0] * 12 + "\n", "The", told[1]]


@pytest.mark.parametrize("max_length", [None, 16])
def test_texts_are_scored_as_lm_evals_rolling_windows(model: Path, tmp_path: Path, max_length: int | None) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    suite: dict = {"metrics": METRICS, **({"max_length": max_length} if max_length else {})}
    found = plain.scored(tmp_path, model, [{"text": text} for text in texts()], suite)
    # Where the tokenizer puts BOS itself, lm-eval puts another one before it, unless it is told not to.
    judge = lm_eval.HFLM(
        pretrained=str(model), device="cpu", max_length=max_length or plain.CONTEXT, add_bos_token=False
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts())]
    spent = -sum(judge.loglikelihood_rolling(requests, disable_tqdm=True))
    tokens = [len(judge.tok_encode(text)) for text in texts()]
    assert max(tokens) > plain.CONTEXT
    assert found["bits_per_byte"] == pytest.approx(spent / math.log(2) / len("".join(texts()).encode()), rel=1e-5)
    assert math.log(found["perplexity"]) == pytest.approx(spent / sum(tokens), rel=1e-5)
    words = sum(len(re.split(r"\s+", text)) for text in texts())
    assert math.log(found["word_perplexity"]) == pytest.approx(spent / words, rel=1e-5)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_is_scored_whole(model: Path, tmp_path: Path) -> None:
    judge = plain.Plain(model)
    prompt, completion = texts()[1].strip(), " The cat said mew."
    rows = [{"prompt": prompt, "completion": completion}]
    scores, _ = plain.scores_and_records(tmp_path, model, rows, {"metrics": METRICS})
    found = {score.metric: score.value for score in scores}
    nats = -judge(prompt, completion)[0]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(completion), rel=1e-5)
    assert math.log(found["word_perplexity"]) == pytest.approx(nats / len(completion.split()), rel=1e-5)
    [long] = likelihoods(tmp_path, model, [{"prompt": "The", "completion": " cat" + texts()[1]}])
    tokens = len(judge.tokenizer("The cat" + texts()[1])["input_ids"]) - len(judge.tokenizer("The")["input_ids"])
    assert long["tokens"] == tokens > plain.CONTEXT
    assert long["bytes"] == len((" cat" + texts()[1]).encode())


def talk(answer: dict) -> dict:
    return {"messages": [{"role": "user", "content": "The cat?"}, {"role": "assistant", **answer}]}


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_marks_of_a_chat_template_count_nothing(chat_model: Path, tmp_path: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chat_model)
    answer = "The cat said mew.\n\nThe river."
    row = talk({"content": answer})
    prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    opening = whole[len(prompt) : whole.index(answer)]
    [found] = likelihoods(tmp_path, chat_model, [row])
    assert found["bytes"] == len(answer)
    assert found["words"] == len(answer.split())
    judge = plain.Plain(chat_model)
    given, ids = (judge.tokenizer(text)["input_ids"] for text in (prompt + opening, prompt + opening + answer))
    labels = [-100] * len(given) + ids[len(given) :]
    with torch.no_grad():
        loss = judge.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert found["tokens"] == len(ids) - len(given)
    assert found["bits"] == pytest.approx(float(loss) * found["tokens"] / math.log(2), rel=1e-5)
    # The same row as the lists of TRL, and written out by hand with its marks.
    lists = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    assert likelihoods(tmp_path, chat_model, [lists])[0]["bytes"] == len(answer)
    by_hand = {"prompt": prompt + opening, "completion": answer + "<|im_end|>"}
    assert likelihoods(tmp_path, chat_model, [by_hand]) == [{**found, "bits": pytest.approx(found["bits"], rel=1e-5)}]


def test_an_answer_that_calls_a_tool_is_scored_by_what_the_template_writes(chat_model: Path, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "river", "arguments": {"animal": "cat"}}}
    rows = [talk({"content": "mew", "tool_calls": None}), talk({"content": None, "tool_calls": [call]})]
    found = likelihoods(tmp_path, chat_model, rows)
    assert [row["bytes"] for row in found] == [len("mew"), len("<call>river</call>")]


def test_bits_do_not_depend_on_offsets_that_leave_out_white_space(chat_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "The cat:", "completion": "  \n\n said   mew. "}, {"prompt": "a b", "completion": " c"}]
    before = likelihoods(tmp_path, chat_model, rows)
    state = json.loads((chat_model / "tokenizer.json").read_text())
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (chat_model / "tokenizer.json").write_text(json.dumps({**state, "post_processor": trimming}))
    assert likelihoods(tmp_path, chat_model, rows) == before
