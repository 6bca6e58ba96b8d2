"""How texts become batches of a model: through its own tokenizer, padded, with labels if any."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fastplastic.errors import FileError, InputError
from fastplastic.sources.data import DataSource
from fastplastic.sources.folders import FolderTask
from fastplastic.sources.images import balanced
from fastplastic.sources.share import WHOLE, Share
from fastplastic.sources.texts import TextLine, no_texts, read_texts

MAX_LENGTH = 128
_IMAGES = ("sample", "noise")


@dataclass(frozen=True, eq=False)
class TextTask:
    """What a model of texts is given, and for what.

    Attributes:
        name: The model as it was asked for.
        task: "texts" for classes, "causal" for the next token, "encoder" for features alone.
        tokenizer: Of the model's folder.
        labels: {name of a class: number}, in order.
        named: Whether these names are those of the classes; those of a fresh head stand for none.
        longest: Tokens of a text that the model takes at most.
    """

    name: str
    task: FolderTask
    tokenizer: Any
    labels: Mapping[str, int]
    named: bool
    longest: int

    def example(self) -> dict[str, Tensor]:
        """Return two short texts, to trace the model with."""
        return self.encode(["one text", "another text, which is longer"], self.longest)

    def encode(self, texts: Sequence[str], length: int) -> dict[str, Tensor]:
        """Return the model's arguments [texts, tokens], padded to the longest of the texts."""
        found = self.tokenizer(
            list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        return {key: found[key] for key in self.tokenizer.model_input_names if key in found}

    def numbers_of(self, lines: Sequence[TextLine]) -> list[int]:
        """Return the number of each text's class; FileError where the model has none such.

        The outputs of a fresh head are given to the names that are found, in alphabetical order.
        """
        names = sorted({line.label for line in lines if isinstance(line.label, str)})
        own = self.labels
        if not self.named and 0 < len(names) <= len(own):
            own = {name: number for number, name in enumerate(names)}
        return [self._number_of(line, own) for line in lines]

    def _number_of(self, line: TextLine, own: Mapping[str, int]) -> int:
        known = own.get(line.label) if isinstance(line.label, str) else line.label
        if known is None or not 0 <= known < len(self.labels):
            names = ", ".join(list(self.labels)[:5]) + ", ..." * (len(self.labels) > 5)
            raise FileError(
                f"{line.place}: label {line.label!r}, expected 0 to {len(self.labels) - 1} or one "
                f"of {names}, the classes of {self.name}: correct it, or give the model a head "
                "for others with --num-classes"
            )
        return known


def text_batches(
    spec: str,
    *,
    model: nn.Module,
    texts: TextTask,
    batch_size: int = 16,
    max_batches: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> DataSource:
    """Return batches of the texts in a file.

    For classes, texts are drawn by the seed with as many of each class as possible, and padded to
    the longest of their batch. For causal language models they are joined in the file's order and
    cut into blocks of `max_length` tokens, and every token but the first is to be predicted. For
    an encoder, labels are compared with a fresh head on the mean of the tokens.

    Args:
        spec: A text file with one text a line, or a .jsonl file with the fields text and label.
        model: The model.
        texts: How it takes texts.
        batch_size: Texts in a batch.
        max_batches: Stop after so many; None takes all.
        max_length: Tokens of a text at most; by default 128, or what the model takes.
        seed: Of the selection, and of a head that is lent.

    Raises:
        InputError: `spec` names images, or the length is more than the model takes.
        FileError: The file cannot be read, or a label is not one of the model's classes.
    """
    if spec in _IMAGES and not Path(spec).exists():
        raise no_texts(texts.name, spec)
    length = min(MAX_LENGTH, texts.longest) if max_length is None else max_length
    if not 2 <= length <= texts.longest:
        raise InputError(
            f"max length {length}: expected 2 to {texts.longest}, the tokens that {texts.name} "
            "takes: correct it"
        )
    limit = None if max_batches is None else max_batches * batch_size
    job = _TextJob(spec, texts, batch_size, limit, length, seed)
    lines = read_texts(spec)
    if texts.task == "causal":
        return job.blocks(lines)
    if texts.task == "encoder":
        return job.features(lines, model)
    return job.classes(lines)


@dataclass(frozen=True, eq=False)
class _TextJob:
    """What was asked for."""

    spec: str
    texts: TextTask
    batch_size: int
    limit: int | None
    length: int
    seed: int

    def classes(self, lines: list[TextLine]) -> DataSource:
        """Return the source for a classifier."""
        labelled, classes = lines[0].label is not None, len(self.texts.labels)
        numbers = self.texts.numbers_of(lines) if labelled else None
        chosen = self._chosen(lines, numbers)

        def make(share: Share = WHOLE) -> Iterator[Any]:
            for batch in share.batches(chosen, self.batch_size):
                encoded = self._encoded([lines[i] for i in batch])
                if numbers is not None:
                    encoded["labels"] = torch.tensor([numbers[i] for i in batch])
                yield encoded

        return self._source(len(chosen), classes, labelled=labelled, make=make)

    def features(self, lines: list[TextLine], model: nn.Module) -> DataSource:
        """Return the source for an encoder, to which a head is lent in the loss."""
        found = {line.label for line in lines}
        names = sorted(found, key=lambda label: (str(type(label)), label))
        labelled = names != [None]
        if labelled and len(names) < 2:
            raise FileError(
                f"{self.spec}: all labels are {names[0]!r}, expected two classes or more: add texts"
            )
        numbers = [names.index(line.label) for line in lines]
        chosen = self._chosen(lines, numbers if labelled else None)
        head = _MeanHead(int(_config(model).hidden_size), len(names), self.seed)

        def make(share: Share = WHOLE) -> Iterator[Any]:
            for batch in share.batches(chosen, self.batch_size):
                encoded = self._encoded([lines[i] for i in batch])
                targets = torch.tensor([numbers[i] for i in batch])
                yield encoded, (encoded["attention_mask"], targets)

        said = (
            f"the model has none: a fresh head of {len(names)} classes on the mean of its tokens "
            "was used for the loss only, so gradients say little until a head is fitted"
        )
        return self._source(
            len(chosen), len(names) if labelled else 0, labelled=labelled, make=make,
            head=said if labelled else "", loss_fn=head,
        )  # fmt: skip

    def blocks(self, lines: list[TextLine]) -> DataSource:
        """Return the source for a causal language model."""
        wanted = None if self.limit is None else self.limit * self.length
        tokens: list[int] = []
        end = self.texts.tokenizer.eos_token_id
        for line in lines:
            # Not verbose: it would warn that a text is long, and blocks are not.
            own = self.texts.tokenizer(line.text, verbose=False)["input_ids"]
            tokens += own if end is None or own[-1:] == [end] else [*own, end]
            if wanted is not None and len(tokens) >= wanted:
                break
        length = min(self.length, len(tokens))
        if length < 2:
            raise FileError(f"{self.spec}: holds 1 token, expected 2 or more: add texts")
        number = min(len(tokens) // length, self.limit or len(tokens))
        ids = torch.tensor(tokens[: number * length]).view(number, length)

        def make(share: Share = WHOLE) -> Iterator[Any]:
            blocks = torch.split(ids, self.batch_size)
            for block in [blocks[number] for number in share.numbers(len(blocks))]:
                mask = torch.ones_like(block)
                yield {"input_ids": block, "attention_mask": mask, "labels": block}

        says = f"{number} block{'s' * (number > 1)} of {length} tokens, from its beginning"
        return self._source(number, 0, labelled=True, make=make, says=says)

    def _chosen(self, lines: list[TextLine], numbers: list[int] | None) -> list[int]:
        count = len(lines) if self.limit is None else min(self.limit, len(lines))
        return balanced(numbers, len(lines), count, self.seed)

    def _encoded(self, lines: list[TextLine]) -> dict[str, Tensor]:
        return self.texts.encode([line.text for line in lines], self.length)

    def _source(
        self,
        samples: int,
        classes: int,
        *,
        labelled: bool,
        make: Callable[..., Iterator[Any]],
        says: str = "",
        head: str = "",
        loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
    ) -> DataSource:
        if not says:
            kind = f"{classes} classes" if labelled else "without labels"
            says = f"{kind}, at most {self.length} tokens of a text"
        return DataSource(
            self.spec, classes, None, samples, self.batch_size, make, labelled, head, loss_fn, says
        )


@dataclass(frozen=True, eq=False)
class _MeanHead:
    """A fresh linear head on the mean of a text's tokens, which is no part of the model."""

    features: int
    classes: int
    seed: int

    def __call__(self, output: Any, targets: tuple[Tensor, Tensor]) -> Tensor:
        mask, labels = targets
        hidden = output.last_hidden_state.float()
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
        return cross_entropy(linear(mean, self._weights.to(mean.device)), labels)

    @cached_property
    def _weights(self) -> Tensor:
        """[classes, features], drawn as PyTorch draws those of a Linear."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = 1 / sqrt(self.features)
        drawn = torch.empty(self.classes, self.features)
        return drawn.uniform_(-bound, bound, generator=generator)


def _config(model: nn.Module) -> Any:
    return model.config
