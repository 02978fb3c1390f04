"""Training of the demos' models: tiny Llamas from scratch, and full fine-tunes of real ones."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab import inference, models
from mergelab.checkpoint import open_checkpoint
from mergelab.datasets import items
from mergelab.errors import UserError, nearest
from mergelab.folders import alone, building
from mergelab.progress import bar, say
from mergelab.record import digest, file_entries, packages
from mergelab.study import Share, Study, Training

if TYPE_CHECKING:
    import torch

VERSION = 1
END, PAD = "<|endoftext|>", "<|pad|>"
WARM_UP = 0.05  # share of the steps in which the learning rate rises from 0
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
WINDOW = 8  # batches whose texts are sorted by length together, which saves padding
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A text that training shows; its loss begins with the token that holds character `start`."""

    id: str
    text: str
    start: int


@dataclass(frozen=True)
class Sequence:
    """An example's token ids, of which those from index `first` (at least 1) carry loss."""

    ids: list[int]
    first: int


def train(study: Study, model: str, out: Path, results: Path) -> dict[str, Any]:
    """Train `model` of a study and write it to the folder `out`; return its record.

    `out` appears only when it is whole. The same machine, thread and versions give the same
    bytes. Raises UserError if a part has too few items, an answer is not the end of its text or
    is cut off, the start model is missing or lacks weights, or the loss is not finite."""
    plan = study.models[model].train
    if plan is None:
        raise UserError(
            f"{study.folder / 'study.yaml'}: model '{model}' is fetched, not trained. "
            f"Run: mergelab fetch {study.folder} {model}"
        )
    started = time.monotonic()
    examples = stream(plan, results)
    start = _hashes(plan, study, results)
    with inference.quiet(offline=True), _deterministic(plan.seed):
        network, tokenizer = _start(plan, [e.text for e in examples], study, results)
        dtype = study.models[model].dtype or str(network.dtype).removeprefix("torch.")
        sequences = _encode(tokenizer, examples, plan.sequence_length)
        losses = _loop(network, sequences, plan, bfloat16=dtype == "bfloat16", name=model)
        outputs = _save(network, tokenizer, dtype, out)
    return {
        "inputs": {"start": start, "texts": digest([example.id for example in examples])},
        "settings": asdict(plan) | {"dtype": dtype, "optimizer": _optimizer_settings()},
        "parameters": sum(p.numel() for p in network.parameters()),
        "texts": len(examples),
        "tokens_per_epoch": sum(len(s.ids) - s.first for s in sequences),
        "steps": len(losses),
        "losses": _curve(losses),
        "outputs": outputs,
        "versions": {"training": VERSION, "packages": packages()},
        "seconds": round(time.monotonic() - started, 1),
    }


def stream(plan: Training, results: Path) -> list[Example]:
    """The texts that one epoch shows, copies included, before they are shuffled."""
    return [example for share in plan.data for example in _shared(share, results)]


def _shared(share: Share, results: Path) -> list[Example]:
    found = items(results, share.part)
    stop = len(found) if share.items is None else share.skip + share.items
    if share.skip >= stop or stop > len(found):
        raise UserError(
            f"training data: '{share.part}' has {len(found):,} items, but skip {share.skip:,} and "
            f"items {share.items or 'all'} were asked for. Change them in study.yaml."
        )
    return [_example(share, item) for item in found[share.skip : stop]] * share.copies


def _example(share: Share, item: dict[str, Any]) -> Example:
    """What the share shows of an item: its text or twin, with loss from its answer on or on all."""
    text = item[share.field]
    if share.loss == "all":
        return Example(item["id"], text, 0)
    if not text.endswith(item["answer"]):
        raise UserError(
            f"training data: the {share.field} of item '{item['id']}' of '{share.part}' does not "
            "end with its answer, which alone is to carry loss.\n"
            "  Change the dataset's templates in study.yaml, or set 'loss: all'."
        )
    return Example(item["id"], text, len(text) - len(item["answer"]))


def batches(
    lengths: list[int], *, size: int, epochs: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Indices of each batch: shuffled texts, sorted by length within windows of 8 batches.

    Every text is in exactly `epochs` batches."""
    import torch

    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), size * WINDOW):
            window = sorted(order[start : start + size * WINDOW], key=lambda i: lengths[i])
            cuts = [window[i : i + size] for i in range(0, len(window), size)]
            for i in torch.randperm(len(cuts), generator=generator).tolist():
                yield cuts[i]


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over 5 % of the steps, then a half cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """One thread, seeded, only deterministic kernels; puts the old settings back."""
    import torch

    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def _hashes(plan: Training, study: Study, results: Path) -> dict[str, str] | None:
    """sha256 of the start model's files, or None for a model from scratch."""
    if plan.start is None:
        return None
    folder = models.existing(study, plan.start, results)
    return inference.model_hashes(open_checkpoint(folder, plan.start))


def _start(plan: Training, texts: list[str], study: Study, results: Path) -> tuple[Any, Any]:
    """The network and tokenizer that training begins with.

    Raises UserError if the start model lacks weights: they would be filled with random ones."""
    if plan.start is None:
        return _new_model(plan, texts)
    from transformers import AutoModelForCausalLM

    folder = models.existing(study, plan.start, results)
    network, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype="auto",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are told below, in our words
        output_loading_info=True,
    )
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    if missing := sorted({*info["missing_keys"], *mismatched}):
        raise UserError(
            f"{folder}: {len(missing)} weights are missing or of the wrong shape, as "
            f"'{missing[0]}'. Compare config.json with the weights, then make the model again."
        )
    return network, inference.load_tokenizer(folder)


def _new_model(plan: Training, texts: list[str]) -> tuple[Any, Any]:
    """A Llama with random weights, and a byte-level BPE tokenizer learnt from its own texts."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = dict(plan.architecture or {})
    known = LlamaConfig().to_dict()
    for key in architecture:
        if key not in known:
            raise UserError(f"architecture: Llama has no setting '{key}'.{nearest(key, known)}")
    tokenizer = _new_tokenizer(texts, int(architecture.get("vocab_size", 1024)))
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos")}
    ids["pad_token_id"] = tokenizer.pad_token_id
    longest = {"max_position_embeddings": plan.sequence_length}
    try:
        config = LlamaConfig(**(longest | architecture | ids | {"vocab_size": len(tokenizer)}))
        return LlamaForCausalLM(config), tokenizer
    except (TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"architecture: Llama cannot be built from it: {error}") from None


def _new_tokenizer(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def _encode(tokenizer: Any, examples: list[Example], length: int) -> list[Sequence]:
    """Token ids of each text between the begin and end tokens, at most `length` of them.

    The end token carries loss too. Raises UserError if that cuts off a whole answer."""
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    partly = any(example.start for example in examples)
    texts = [example.text for example in examples]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=partly)
    sequences = []
    for number, (example, ids) in enumerate(zip(examples, encoded["input_ids"], strict=True)):
        spans = encoded["offset_mapping"][number] if example.start else []
        first = 1 + sum(stop <= example.start for _, stop in spans)
        if first >= length:
            raise UserError(
                f"training data: the answer of item '{example.id}' begins at token {first:,}, "
                f"beyond sequence_length {length:,}. Raise it in study.yaml."
            )
        sequences.append(Sequence([begin, *ids, end][:length], first))
    return sequences


def _loop(
    network: Any, sequences: list[Sequence], plan: Training, *, bfloat16: bool, name: str
) -> list[float]:
    """AdamW in float32 (under bfloat16 autocast if asked); the loss per step."""
    import torch

    network.float().train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=plan.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    generator = torch.Generator().manual_seed(plan.seed)
    lengths = [len(sequence.ids) for sequence in sequences]
    cuts = list(batches(lengths, size=plan.batch_size, epochs=plan.epochs, generator=generator))
    say(f"training {name}: {len(sequences):,} texts, {len(cuts):,} steps")
    losses = []
    with bar(f"train {name}", len(cuts), "steps") as progress:
        for step, cut in enumerate(cuts):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * rate(step, len(cuts))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                loss = _loss(network, [sequences[i] for i in cut])
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
            losses.append(loss.item())
            _check_finite(losses, norm.item(), name)
            optimizer.step()
            progress.advance()
    return losses


def _check_finite(losses: list[float], norm: float, name: str) -> None:
    """Raise UserError if the latest loss or its gradient's norm is NaN or infinite."""
    for what, value in (("loss", losses[-1]), ("gradient", norm)):
        if not math.isfinite(value):
            raise UserError(
                f"training {name}: the {what} is not finite at step {len(losses):,}; "
                "lower learning_rate or check the start model."
            )


def _loss(network: Any, sequences: list[Sequence]) -> Any:
    """Mean negative log-likelihood in nats per token that carries loss, padded on the right.

    Padding comes after the text, so that causal attention needs no mask for it."""
    import torch

    longest = max(len(sequence.ids) for sequence in sequences)
    padded = [s.ids + [IGNORED] * (longest - len(s.ids)) for s in sequences]
    targets = [
        [IGNORED] * (s.first - 1) + row[s.first :] for s, row in zip(sequences, padded, strict=True)
    ]
    tokens_BT, targets_BT = torch.tensor(padded), torch.tensor(targets)
    logits_BTV = network(input_ids=tokens_BT[:, :-1].clamp(min=0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED
    )


def _save(network: Any, tokenizer: Any, dtype: str, out: Path) -> list[dict[str, Any]]:
    """Save into a temporary folder beside `out`, then rename it; the files' sizes and hashes."""
    import torch

    with alone(out), building(out, "trained") as folder:
        network.to(getattr(torch, dtype)).eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        mode = (folder / "config.json").stat().st_mode
        for path in folder.iterdir():
            path.chmod(mode)  # safetensors makes its files readable by their owner only
        return file_entries(folder, [path.name for path in folder.iterdir()])


def _optimizer_settings() -> dict[str, Any]:
    return {
        "name": "AdamW",
        "betas": list(BETAS),
        "weight_decay": WEIGHT_DECAY,
        "max_norm": MAX_NORM,
        "warm_up": WARM_UP,
        "schedule": "cosine",
    }


def _curve(losses: list[float], points: int = 50) -> list[float]:
    """Mean loss of at most `points` equal stretches of the run."""
    edges = [round(i * len(losses) / points) for i in range(points + 1)]
    stretches = (losses[a:b] for a, b in itertools.pairwise(edges) if b > a)
    return [round(sum(part) / len(part), 4) for part in stretches]
