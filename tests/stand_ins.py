"""Stand-ins for the models and data sets of the shipped recipes: the true architectures, tokenizers, columns and types.

Only sizes and contents are made up. A recipe that runs on them fits its models and columns; its scores say nothing.
Columns, configurations, splits and types are those of the data sets' cards, whole numbers aside, which are of 64 bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Translation
from hub_server import HubServer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_chat_template

WORDS = ["old", "red", "bird", "river", "house", "boy", "girl", "man", "woman", "he", "she", "his", "her", "sees", "of"]
SMOLLM2_CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CHANCE = random.Random(5)


def said(words: int = 12) -> str:
    """A sentence that is hardly ever said twice."""
    return f"{' '.join(CHANCE.choices(WORDS, k=words))} {CHANCE.randrange(10**6)}."


def byte_bpe(special: list[str], encoder: bool = False, **named: Any) -> PreTrainedTokenizerFast:
    """The byte-level BPE of GPT-2 and its heirs; an encoder's puts its texts between [CLS] and [SEP]."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, lstrip=token == "[MASK]") for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((said() for _ in range(200)), trainer)
    if encoder:
        ends = [(token, bpe.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        bpe.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **named)


def unigram() -> PreTrainedTokenizerFast:
    """T5's SentencePiece model: Unigram, </s> behind each text, and 100 sentinels of which the vocabulary counts."""
    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    pieces.train_from_iterator((said() for _ in range(200)), trainer)
    sentinels = [f"<extra_id_{n}>" for n in range(100)]
    pieces.add_special_tokens(sentinels)
    pieces.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 512}
    return PreTrainedTokenizerFast(tokenizer_object=pieces, additional_special_tokens=sentinels, **named)


def model_files(
    folder: Path, tokenizer: Any, auto: Any, generation: dict[str, Any] | None = None, **fields: Any
) -> dict:
    """A saved model with fresh weights, more rows of embeddings than tokens as most have, and its tokenizer."""
    set_seed(0)
    dtype = fields.pop("dtype", torch.bfloat16)
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(**{**names, "vocab_size": len(tokenizer) + 28, **fields})
    model = auto.from_config(config, dtype=dtype)
    if generation is not None:
        model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path for path in folder.iterdir()}


def add_models(hub: HubServer, folder: Path) -> None:
    end, start, stop = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    plain = {"bos_token": end, "eos_token": end, "unk_token": end, "model_max_length": 8192}
    chat = {"bos_token": start, "eos_token": stop, "unk_token": end, "pad_token": stop, "model_max_length": 8192}
    qwen = {"pad_token": end, "model_max_length": 131072}
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    llama = {**TINY, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 8192}
    built = {
        "HuggingFaceTB/SmolLM2-135M": (
            byte_bpe([end, start, stop], **plain),
            AutoModelForCausalLM,
            {**llama, "tie_word_embeddings": True},
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct": (
            byte_bpe([end, start, stop], chat_template=SMOLLM2_CHAT, **chat),
            AutoModelForCausalLM,
            {**llama, "tie_word_embeddings": True},
        ),
        "answerdotai/ModernBERT-base": (
            byte_bpe(["[UNK]", *marks.values()], encoder=True, unk_token="[UNK]", model_max_length=8192, **marks),
            AutoModelForMaskedLM,
            {**TINY, "model_type": "modernbert", "num_hidden_layers": 3, "cls_token_id": 1, "sep_token_id": 2}
            | {"classifier_pooling": "mean", "dtype": torch.float32},
        ),
        "google-t5/t5-small": (
            unigram(),
            AutoModelForSeq2SeqLM,
            {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            | {"decoder_start_token_id": 0, "n_positions": 512, "dtype": torch.float32},
        ),
        "Qwen/Qwen2.5-0.5B-Instruct": (
            byte_bpe([end, start, stop], eos_token=stop, chat_template=qwen2_5_chat_template, **qwen),
            AutoModelForCausalLM,
            {**llama, "model_type": "qwen2", "tie_word_embeddings": True}
            | {
                "generation": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": [2, 0]}
            },
        ),
        "Qwen/Qwen3-8B-Base": (
            byte_bpe([end, start, stop], eos_token=end, chat_template=qwen3_chat_template, **qwen),
            AutoModelForCausalLM,
            {**llama, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
        ),
    }
    built["Qwen/Qwen3-8B"] = (
        byte_bpe([end, start, stop], eos_token=stop, chat_template=qwen3_chat_template, **qwen),
        *built["Qwen/Qwen3-8B-Base"][1:],
    )
    for name, (tokenizer, auto, fields) in built.items():
        files = model_files(folder / name, tokenizer, auto, **fields)
        hub.add_repo("model", name, {"README.md": b"---\nlicense: apache-2.0\n---\n", **files})


def fineweb(n: int) -> dict[str, Any]:
    where = {"dump": "CC-MAIN-2024-10", "url": f"http://example.com/{n}", "date": "2024-02-21T00:00:00Z"}
    judged = {"file_path": "s3://none", "language": "en", "language_score": 0.9, "token_count": 30}
    return {"text": f"{said()} {said()}", "id": f"<urn:uuid:{n}>", **where, **judged}


def smol_smoltalk(n: int) -> dict[str, Any]:
    system = [{"content": "You are a poet.", "role": "system"}] if n % 3 == 0 else []
    pair = [{"content": said(), "role": "user"}, {"content": said(20), "role": "assistant"}]
    return {"messages": system + pair * (1 + n % 2), "source": "smol-magpie-ultra-short"}


def ultrafeedback(n: int) -> dict[str, Any]:
    asked = {"content": said(), "role": "user"}
    sides = {side: [asked, {"content": said(words), "role": "assistant"}] for side, words in PAIR.items()}
    scores = {"score_chosen": 8.0, "score_rejected": 4.5}
    return {"prompt": asked["content"], "prompt_id": f"{n:064x}", **sides, "messages": sides["chosen"], **scores}


PAIR = {"chosen": 20, "rejected": 14}  # words


def sst2(n: int) -> dict[str, Any]:
    return {"idx": n, "sentence": said(), "label": n % 2}


def stsb(n: int) -> dict[str, Any]:
    return {"sentence1": said(), "sentence2": said(), "label": n % 6 * 0.8, "idx": n}


def go_emotions(n: int) -> dict[str, Any]:
    return {"text": said(), "labels": [n % 28] if n % 4 else [n % 28, 27], "id": f"e{n}"}


def gsm8k(n: int) -> dict[str, Any]:
    return {"question": said(), "answer": f"{said()} <<{n}+1={n + 1}>>\n#### {n + 1}"}


def cnn_dailymail(n: int) -> dict[str, Any]:
    return {"article": " ".join(said() for _ in range(8)), "highlights": f"{said()} .\n{said()} .", "id": f"c{n}"}


def german(n: int) -> dict[str, Any]:
    return {"translation": {"de": said(), "en": said()}}


def chinese(n: int) -> dict[str, Any]:
    return {"translation": {"en": said(), "zh": said()}}


def arc(n: int) -> dict[str, Any]:
    labels = ["1", "2", "3", "4"] if n % 5 == 0 else ["A", "B", "C", "D"]  # both are in ARC
    choices = {"text": [said(3) for _ in labels], "label": labels}
    return {"id": f"a{n}", "question": f"he and his bird: {said()}", "choices": choices, "answerKey": labels[n % 4]}


def hellaswag(n: int) -> dict[str, Any]:
    context = {"ind": n, "activity_label": "Roof shingle removal", "ctx_a": said(), "ctx_b": "he", "ctx": said()}
    origin = {"source_id": "activitynet~v", "split": "val", "split_type": "indomain", "label": str(n % 4)}
    return {**context, "endings": [said() for _ in range(4)], **origin}


def lambada(n: int) -> dict[str, Any]:
    return {"text": said()[:-1]}


def ledgar(n: int) -> dict[str, Any]:
    return {"text": f"{said(20)} he and his bird", "label": n % 100}


def legal_qa(n: int) -> dict[str, Any]:
    source = dict.fromkeys(("version_id", "type", "jurisdiction", "source", "citation", "url", "text"), said())
    return {"question": f"{said()}?", "answer": said(20), "prompt": said(20), "source": source}


def bitext(n: int) -> dict[str, Any]:
    asked = {"flags": "BQ", "instruction": f"where is order {{{{Order Number}}}} {said()}", "category": "ORDER"}
    return {**asked, "intent": "track_order", "response": f"{said(20)} {{{{Order Number}}}}"}


def toolace(n: int) -> dict[str, Any]:
    tools = '[{"name": "Bird", "description": "finds birds", "parameters": {"type": "dict", "properties": {}}}]'
    turns = [{"from": "user", "value": said()}, {"from": "assistant", "value": f"[Bird(number={n})]"}]
    if n % 2:
        turns += [{"from": "tool", "value": f'[{{"name": "Bird", "results": {{"found": {n}}}}}]'}]
        turns += [{"from": "assistant", "value": said()}]
    return {"system": f"You can call functions. Here is a list of them: {tools} {n}", "conversations": turns}


def pubmed(n: int) -> dict[str, Any]:
    return {"article": " ".join(said() for _ in range(8)), "abstract": f"{said()} {said()}"}


def mtsamples(n: int) -> dict[str, Any]:
    about = {"description": said(), "medical_specialty": " Cardiovascular / Pulmonary", "sample_name": f" Echo - {n} "}
    keywords = None if n % 4 == 0 else "cardiovascular / pulmonary, 2-d m-mode, doppler, "
    return {"Unnamed: 0": n, **about, "transcription": f"2-D M-MODE: , {said(20)}", "keywords": keywords}


def chn_senti_corp(n: int) -> dict[str, Any]:
    return {"text": f"房间{CHANCE.randrange(10**6)}很干净。", "label": n % 2}


def wikipedia(n: int) -> dict[str, Any]:
    return {"id": str(n), "url": "https://zh.wikipedia.org/wiki/x", "title": "鸟", "text": f"鸟是动物。{said()}" * 3}


def blimp(n: int) -> dict[str, Any]:
    names = {"field": "morphology", "linguistics_term": "anaphor_agreement", "UID": "anaphor_number_agreement"}
    methods = ("simple_LM_method", "one_prefix_method", "two_prefix_method", "lexically_identical")
    pair = {"sentence_good": said(), "sentence_bad": said()}
    return {**pair, **names, **dict.fromkeys(methods, True), "pair_id": n}


def crows_pairs(n: int) -> dict[str, Any]:
    pair = {"sent_more": f"The old man {n} says so.", "sent_less": f"The red man {n} says so."}
    return {"id": n, **pair, "stereo_antistereo": n % 2, "bias_type": 0}


def stereoset(n: int) -> dict[str, Any]:
    sentences = [f"The {word} man {n} sees the river." for word in ("old", "blue", "red")]
    judged = {"label": [0, 0, 1, 0, 0], "human_id": ["a", "b", "c", "d", "e"]}
    table = {"sentence": sentences, "id": ["x", "y", "z"], "labels": [judged] * 3, "gold_label": [0, 2, 1]}
    about = {"id": f"s{n}", "target": "man", "bias_type": "gender", "context": f"The BLANK man {n} sees the river."}
    return {**about, "sentences": table}


def bbq(n: int) -> dict[str, Any]:
    kind = {
        "question_polarity": "neg" if n % 4 < 2 else "nonneg",
        "context_condition": "disambig" if n % 2 else "ambig",
    }
    info = {"ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"], "ans2": ["Unknown", "unknown"]}
    about = {"subcategory": "None", "stereotyped_groups": ["old"], "version": "a", "source": "none"}
    told = {"context": f"I saw a grandson and their grandfather. {said()}", "question": "Who was not at ease?"}
    answers = {"ans0": "The grandfather", "ans1": "The grandson", "ans2": "Unknown", "label": 0 if n % 2 else 2}
    row = {"example_id": n, "question_index": str(1 + n // 4), **kind, "category": "Age"}
    return {**row, "answer_info": info, "additional_metadata": about, **told, **answers}


# repository, configuration (default: the only one), splits, a row, and the types that its values do not show
DATA: list[tuple[str, str, str, Callable[[int], dict[str, Any]], dict[str, Any]]] = [
    ("HuggingFaceFW/fineweb", "sample-10BT", "train", fineweb, {}),
    ("HuggingFaceFW/fineweb", "CC-MAIN-2024-10", "train", fineweb, {}),
    ("HuggingFaceTB/smol-smoltalk", "default", "train test", smol_smoltalk, {}),
    ("HuggingFaceH4/ultrafeedback_binarized", "default", "train_prefs test_prefs", ultrafeedback, {}),
    ("stanfordnlp/sst2", "default", "train validation", sst2, {"label": ClassLabel(names=["negative", "positive"])}),
    ("nyu-mll/glue", "stsb", "train validation", stsb, {}),
    (
        *("google-research-datasets/go_emotions", "simplified", "train validation test", go_emotions),
        {"labels": List(ClassLabel(names=[*(f"emotion{n}" for n in range(27)), "neutral"]))},
    ),
    ("openai/gsm8k", "main", "train test", gsm8k, {}),
    ("abisee/cnn_dailymail", "3.0.0", "train validation test", cnn_dailymail, {}),
    *(
        ("Helsinki-NLP/opus-100", "-".join(pair), "train validation test", row, {"translation": Translation(pair)})
        for pair, row in ((["de", "en"], german), (["en", "zh"], chinese))
    ),
    (
        *("coastalcph/lex_glue", "ledgar", "train validation test", ledgar),
        {"label": ClassLabel(names=[f"clause {n}" for n in range(100)])},
    ),
    ("isaacus/open-australian-legal-qa", "default", "train", legal_qa, {}),
    ("bitext/Bitext-customer-support-llm-chatbot-training-dataset", "default", "train", bitext, {}),
    ("Team-ACE/ToolACE", "default", "train", toolace, {}),
    ("ccdv/pubmed-summarization", "document", "train validation test", pubmed, {}),
    ("harishnair04/mtsamples", "default", "train", mtsamples, {}),
    ("lansinuote/ChnSentiCorp", "default", "train validation test", chn_senti_corp, {}),
    ("wikimedia/wikipedia", "20231101.zh", "train", wikipedia, {}),
    ("allenai/ai2_arc", "ARC-Easy", "train validation test", arc, {}),
    ("Rowan/hellaswag", "default", "train validation", hellaswag, {}),
    ("EleutherAI/lambada_openai", "default", "test", lambada, {}),
    ("nyu-mll/blimp", "anaphor_number_agreement", "train", blimp, {}),
    (
        *("jannalu/crows_pairs_multilingual", "english", "test", crows_pairs),
        {"stereo_antistereo": ClassLabel(names=["stereo", "antistereo"]), "bias_type": ClassLabel(names=["age"])},
    ),
    ("McGill-NLP/stereoset", "intrasentence", "validation", stereoset, {}),
    ("oskarvanderwal/bbq", "Age", "test", bbq, {}),
]


def add_data(hub: HubServer, folder: Path, rows: int = 40) -> None:
    """Every data set of the shipped recipes, with `rows` rows to train on and 12 in each other split."""
    for repo in dict.fromkeys(entry[0] for entry in DATA):
        files: dict[str, bytes | Path] = {}
        card = ["---", "license: mit", "configs:"]
        for _, name, splits, row, types in (entry for entry in DATA if entry[0] == repo):
            card += [f"- config_name: {name}", "  data_files:"]
            card += [f"  - split: {split}\n    path: {name}/{split}-*" for split in splits.split()]
            # A file for each of the lanes that a stream is read in, with the rows that a lane asks for at once.
            parts, most = (8, 500) if name == "sample-10BT" else (1, rows)
            for split, part in product(splits.split(), range(parts)):
                path = folder / repo / name / f"{split}-{part:05}-of-{parts:05}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                table = Dataset.from_list([row(n) for n in range(most if split == "train" else 12)])
                table.cast(Features({**table.features, **types})).to_parquet(path)
                files[f"{name}/{path.name}"] = path
        hub.add_repo("dataset", repo, {"README.md": "\n".join([*card, "---", ""]).encode(), **files})
