"""What a model answered, kept on disk: nothing is asked of the same model twice.

An answer belongs to a request (prompt and continuation, whole text, or prompt and stop rules), so
it serves every benchmark, limit and variant with the same weights. Each file of the folder is
written whole; a kill loses the answers of the last seconds."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelab import inference
from mergelab.bounded import bounded
from mergelab.errors import UserError
from mergelab.progress import Bar
from mergelab.record import canonical, digest, write_bytes

PROMPT_TOKENS = 256  # assumed per prompt when the batch size is chosen
EVERY = 30.0  # seconds between two files
SECONDS, MEMORY, LONGEST = 10.0, 2**28, 10**7  # of one chat; bytes; characters of it


class NotFinite(Exception):
    """The model's logits are NaN or infinite."""


class Answers:
    """Answers by request, of one model in one number format; `fresh` ones are not on disk yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Any] = {}
        self.fresh: dict[str, Any] = {}
        self.saved = time.monotonic()
        self.read()

    def read(self) -> list[Path]:
        """Take in what is on disk; returns its files."""
        found = sorted(self.folder.glob("*.jsonl"))
        for path in found:
            with suppress(FileNotFoundError):  # another process has just joined it to its own
                self.known |= dict(_entries(path))
        return found

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, unless it is no finite number; write a file every 30 s."""
        if not isinstance(answer, str) and not math.isfinite(_number(answer)):
            return
        self.known[key] = self.fresh[key] = answer
        if time.monotonic() - self.saved > EVERY:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet, as one file named by its contents."""
        if self.fresh:
            self.write(self.fresh)
        self.fresh, self.saved = {}, time.monotonic()

    def join(self) -> None:
        """Make one file of all, so that what is kept does not depend on how long it took."""
        self.save()
        old = self.read()
        if len(old) > 1:
            whole = self.write(self.known)
            for path in old:
                if path != whole:
                    path.unlink(missing_ok=True)

    def write(self, answers: Mapping[str, Any]) -> Path:
        """One file of answers, named by its contents."""
        lines = "".join(canonical(entry) + "\n" for entry in sorted(answers.items()))
        path = self.folder / f"{digest(lines)[:16]}.jsonl"
        write_bytes(path, lines.encode())
        return path


def request_key(kind: str, arguments: Sequence[Any]) -> str:
    """32 hexadecimal digits that stand for a request; "" for one whose answer is random."""
    if kind == "generate_until" and arguments[1].get("do_sample"):
        return ""
    return digest([kind, *arguments])[:32]


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The answers of one file; a damaged line is as good as none: it is asked again."""
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        match entry:
            case [str(key), str() | int() | float() | [int() | float(), _] as answer]:
                yield key, answer


def _number(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def remembering(
    load: Callable[[], inference.Loaded], tokenizer: Any, answers: Answers, progress: Bar
) -> Any:
    """An lm-eval model that knows `answers` and asks the real one, loaded when first needed, for
    the rest. What one call asks is batched together, as lm-eval itself does. Chats are written by
    the `tokenizer` alone, as lm-eval's own model writes them."""
    from lm_eval.api.model import LM

    class Remembering(LM):  # type: ignore[misc]
        model: Any = None
        tokenizer_name = ""  # lm-eval's own cache of requests would ask for it
        chat_template_args: Mapping[str, Any] = {}  # HFLM.apply_chat_template reads it

        @property
        def tokenizer(self) -> Any:
            return tokenizer

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            from lm_eval.models.huggingface import HFLM

            try:
                with bounded(SECONDS, MEMORY):
                    text = str(HFLM.apply_chat_template(self, chat_history, add_generation_prompt))
                if len(text) > LONGEST:
                    raise ValueError(f"it writes {len(text):,} characters")
            except Exception as error:  # a template is a stranger's program: any error is its own
                why = str(error) or "it takes too much memory"
                raise UserError(
                    f"{tokenizer.name_or_path}: its chat template fails: {why}\n  Mend it, or "
                    "leave chat_template out of the benchmark."
                ) from None
            return text

        def loglikelihood(self, requests: Any) -> Any:
            return [(value, bool(greedy)) for value, greedy in self.ask("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return self.ask("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any) -> Any:
            return self.ask("generate_until", requests)

        def ask(self, kind: str, requests: Any) -> list[Any]:
            keys = [request_key(kind, request.args) for request in requests]
            known = {key: answers.known[key] for key in keys if key in answers.known}
            missing = [r for r, key in zip(requests, keys, strict=True) if key not in known]
            progress.advance(len(requests) - len(missing))
            given: Iterator[Any] = iter(())
            if missing:
                self.model = self.model or _language_model(load(), answers, progress)
                given = iter(getattr(self.model, kind)(missing))
            return [known[key] if key in known else next(given) for key in keys]

    return Remembering()


def _language_model(loaded: inference.Loaded, answers: Answers, progress: Bar) -> Any:
    """lm-eval's HFLM around a loaded model, with our bar, softmax in float32 and two mends: whole
    texts get one beginning-of-sequence token, even if the tokenizer adds its own; a tokenizer
    without any token to pad with uses its first, which the attention mask hides."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> Any:
            eos = self.tokenizer.eos_token_id
            return self.tokenizer.bos_token_id if eos is None else eos

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            this: Any = self
            before, this.add_bos_token = this.add_bos_token, False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                this.add_bos_token = before

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            _check_generation(self, loaded, requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None
        ) -> Any:
            return super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )

    tokenizer = loaded.tokenizer
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has neither a bos nor an eos token, so no "
            "text can start. Name one in tokenizer_config.json (bos_token)."
        )
    if not (tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    chatter = logging.getLogger("lm_eval.models.huggingface")  # it warns of models as objects
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        model = LanguageModel(
            pretrained=loaded.model,
            tokenizer=tokenizer,
            softmax_dtype="float32",
            max_length=loaded.length,
            batch_size=inference.batch_size(loaded.model.config.vocab_size, PROMPT_TOKENS),
        )
    finally:
        chatter.setLevel(level)
    model.cache_hook = _Hook(answers, progress)
    return model


class _Hook:
    """What lm-eval tells each answer to as soon as it is there."""

    def __init__(self, answers: Answers, progress: Bar) -> None:
        self.answers, self.progress = answers, progress

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        if key := request_key(kind, arguments):
            self.answers.add(key, answer)
        self.progress.advance()


def _check_generation(model: Any, loaded: inference.Loaded, requests: Any) -> None:
    """Raise UserError if the model has no room for the answers; NotFinite if its logits are no
    numbers: it would write its first token for ever."""
    import torch

    for request in requests:
        wanted = int(request.args[1].get("max_gen_toks", model.max_gen_toks))
        if wanted >= loaded.length:
            raise UserError(
                f"the task '{request.task_name}' asks for {wanted} new tokens, and the model takes "
                f"{loaded.length} in all. Leave the task out, or write one of your own with a "
                "smaller max_gen_toks."
            )
    start = model.tok_encode(requests[0].args[0])[-loaded.length :] or [model.prefix_token_id]
    logits = model._model_call(torch.tensor([start], device=model.device))
    if not bool(torch.isfinite(logits).all()):
        raise NotFinite
