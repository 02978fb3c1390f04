"""A tiny random Llama with a byte-level BPE tokenizer, and a tiny study, for every test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergelab.study import Benchmark, Check, Study

TEXT = (
    "Question: A train travels 60 miles in 2 hours. What is its average speed?\n"
    "Answer: The speed is 60 / 2 = 30 miles per hour. The patient was given aspirin. "
)


def tiny_tokenizer(folder: Path, *, vocab_size: int = 300, adds_bos: bool = False) -> Any:
    """Byte-level BPE with <s>, </s> and <pad>; `adds_bos` makes it prepend <s>, as Llama's does."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>"]
    bpe.train_from_iterator(
        [TEXT] * 4, vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    if adds_bos:
        bpe._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def tiny_model(
    folder: Path,
    seed: int = 0,
    *,
    dtype: str = "float32",
    adds_bos: bool = False,
    length: int = 128,
) -> Any:
    """Write an HF folder (hidden 32, 2 layers, vocabulary 300) with random weights; return it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(str(folder))
    tiny_tokenizer(folder, adds_bos=adds_bos)
    return model.eval()


def give_template(folder: Path, template: str) -> None:
    """Write a chat template into the folder's tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def teach(folder: Path, texts: list[str], out: Path, *, epochs: int = 10) -> None:
    """Train the model of `folder` on `texts` (AdamW, one text a step) and save it to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [torch.tensor([[0, *tokenizer.encode(t, add_special_tokens=False)]]) for t in texts]
    for _ in range(epochs):
        for row in rows:
            model(input_ids=row, labels=row).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def write_part(results: Path, part: str, items: list[dict[str, Any]]) -> None:
    """Write results/data/<part>.jsonl."""
    path = results / "data" / f"{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def tiny_study(
    folder: Path, *, suite: tuple[Benchmark, ...] = (), checks: tuple[Check, ...] = ()
) -> Study:
    """A study without models, datasets or recipes: what scores, evidence and detectors read."""
    folder.mkdir(parents=True, exist_ok=True)
    return Study(folder.name, folder, "tiny", "", {}, {}, {}, suite, checks, ())
