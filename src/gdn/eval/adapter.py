"""Our model as a model of lm-evaluation-harness: text to ids exactly as its HFLM makes them, scores and texts by `Scorer`.

The one class here inherits from the harness's, because that is what its evaluator accepts.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gdn.errors import ConfigError
from gdn.eval.requests import Likelihood, Request
from gdn.model.config import ModelConfig

Rolling = Literal["one_bos", "harness", "stream"]
Progress = Callable[[int, int], None]
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature"}
T = TypeVar("T")


class Scoring(Protocol):
    """What answers requests: a `Scorer`, or what asks one in another process (`gdn.eval.workers`)."""

    config: ModelConfig
    tokens_computed: int
    tokens_asked: int

    def likelihoods(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Likelihood]: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: Collection[int],
        stop: Callable[[list[int]], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]: ...


class HarnessModel(TemplateLM):
    """A Scorer and a transformers tokenizer behind the harness's three kinds of request.

    max_length: tokens of context and continuation but the last; what is longer loses its beginning, as in HFLM.
    rolling: how whole texts are read. "harness": ids as HFLM makes them, where a tokenizer that adds a BOS of its own has two;
    "one_bos": one; both in windows of max_length, each from an empty state. "stream": one BOS, the state carried through.
    Under torch.distributed every process gets all requests, computes its share, and returns all results.
    """

    tokenizer: Any

    def __init__(
        self,
        scorer: Scoring,
        tokenizer: Any,
        *,
        max_length: int,
        rolling: Rolling = "one_bos",
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        size = len(tokenizer)
        if size > scorer.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {size} ids, the model embeddings for {scorer.config.vocab_size}: not its tokenizer"
            )
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_gen_toks = 256  # HFLM's
        self.rolling: Rolling = rolling
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has nothing in front: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encode([string], add_special_tokens)[0]

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Ids of each text. None: special tokens as the tokenizer adds them, but none to a text that begins with the BOS."""
        if not texts:
            return []
        if add_special_tokens is not None:
            return self._ids(texts, add_special_tokens=add_special_tokens)
        bos = self.tokenizer.decode(self.prefix_token_id)
        begins = [has_bos_prefix(text, bos) for text in texts]
        # Not add_special_tokens=True: what a tokenizer does by itself is for it to say.
        with_special = iter(self._ids([text for text, begun in zip(texts, begins) if not begun]))
        without = iter(self._ids([text for text, begun in zip(texts, begins) if begun], add_special_tokens=False))
        return [next(without if begun else with_special) for begun in begins]

    def _ids(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, **options)
        return [list(ids) for ids in found["input_ids"]]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [_move_spaces(*request.args) for request in requests]
        # Contexts repeat, one for each choice; one call encodes them all, on all cores.
        texts = list(dict.fromkeys(text for context, rest in pairs if context for text in (context, context + rest)))
        ids = dict(zip(texts, self.encode(texts)))
        bare = list(dict.fromkeys(rest for context, rest in pairs if not context))
        bare_ids = dict(zip(bare, self.encode(bare, add_special_tokens=False)))
        encoded = []
        for context, rest in pairs:
            if context:
                front = ids[context]
                encoded.append(Request(front, ids[context + rest][len(front) :]))
            elif bare_ids[rest][:1] == [self.prefix_token_id]:
                encoded.append(Request(bare_ids[rest][:1], bare_ids[rest][1:]))
            else:
                encoded.append(Request([self.prefix_token_id], bare_ids[rest]))
        return [(score.total, score.greedy) for score in self._score(encoded)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([Request(context, continuation) for _, context, continuation in requests])
        return [(score.total, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        prefix = self.prefix_token_id
        for i, ids in enumerate(self.encode([request.args[0] for request in requests])):
            ids = ids[1:] if self.rolling != "harness" and ids[:1] == [prefix] else ids
            if self.rolling == "stream":
                parts = [([prefix], ids)] if ids else []
            else:
                parts = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, prefix, self.max_length, 1)]
            windows += [Request(context, continuation) for context, continuation in parts]
            owners += [i] * len(parts)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self._score(windows, cut=self.rolling != "stream")):
            totals[i] += score.total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = self.encode([request.args[0] for request in requests])
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            for i, text in zip(members, self._generate([prompts[i] for i in members], requests[members[0]].args[1])):
                texts[i] = text
        return texts

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        unknown = sorted(options.keys() - _GENERATION_KEYS)
        if options.get("do_sample") or unknown:
            raise ConfigError(
                f"generation settings {settings}: only greedy generation is computed, not {unknown or 'sampling'}"
            )
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options["until"], eos=eos)
        new, room = options["max_gen_toks"], self.max_length - options["max_gen_toks"]
        if room < 1:
            raise ConfigError(f"max_gen_toks = {new}; expected less than the maximum length, {self.max_length}")
        prompts = [prompt[-room:] for prompt in prompts]
        terms = [term for term in until if term and term != eos]
        stop = partial(_holds, self.tokenizer, terms) if terms else None  # of a function that can go to another process

        def work(mine: list[list[int]]) -> list[list[int]]:
            progress = self._progress(len(mine))
            return self.scorer.generate(mine, new, {self.eot_token_id}, stop, progress)

        ids = self._spread(prompts, [tuple(prompt) for prompt in prompts], work)
        texts = (self.tokenizer.decode(text, skip_special_tokens=True) for text in ids)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _score(self, requests: list[Request], cut: bool = True) -> list[Likelihood]:
        kept = [self._cut(request) for request in requests] if cut else requests

        def work(mine: list[Request]) -> list[Likelihood]:
            return self.scorer.likelihoods(mine, self._progress(len(mine)))

        return self._spread(kept, [tuple(request.context) for request in kept], work)

    def _cut(self, request: Request) -> Request:
        context, continuation = request
        if len(continuation) > self.max_length:
            raise ConfigError(f"a continuation of {len(continuation)} tokens; expected at most {self.max_length}, the model's")
        surplus = len(context) + len(continuation) - (self.max_length + 1)
        return request if surplus <= 0 else Request(context[surplus:], continuation)

    def _progress(self, total: int) -> Callable[[int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done: progress(done, total)

    def _spread(self, items: list[T], keys: list[Hashable], work: Callable[[list[T]], list[Any]]) -> list[Any]:
        """work(items), shared among the processes of torch.distributed; items of one key stay together."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return work(items)
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        mine = [i for i, key in enumerate(keys) if number[key] % size == rank]
        parts: list[Any] = [None] * size
        torch.distributed.all_gather_object(parts, list(zip(mine, work([items[i] for i in mine]))))
        results: list[Any] = [None] * len(items)
        for part in parts:
            for i, result in part:
                results[i] = result
        return results


def _holds(tokenizer: Any, terms: list[str], ids: list[int]) -> bool:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return any(term in text for term in terms)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces that end a context belong to the continuation, where tokenizers expect them."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
