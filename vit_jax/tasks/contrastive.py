"""Contrastive learning: an image tower and a text tower learn one space of vectors.

An example has an `image` and `tokens`, int32 `[length]` (see the preprocessing op `tokenize`). In
evaluation an image may have several texts, `[texts, length]`, or a `label` and no text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.data.tokenizer import NO_TEXT, Tokenizer, open_tokenizer
from vit_jax.errors import UserError
from vit_jax.models import TowerOutputs
from vit_jax.report import Section
from vit_jax.tasks import _classes, _contrast, _retrieval
from vit_jax.tasks._base import BaseTask
from vit_jax.tasks._checks import check_data
from vit_jax.tasks._class_metrics import top_classes
from vit_jax.tracking.metrics import COUNT, SCORE, Metric
from vit_jax.types import Array, ArraySpec, Batch, DataInfo, Numbers, Params

LOSSES = {"softmax": _contrast.softmax_loss, "sigmoid": _contrast.sigmoid_loss}
CLASSES = "class_vectors"
"""The name of the vectors of the class names among the parameters."""

SHOWN = 8
"""The number of images that the report shows."""

_TEXTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Task(BaseTask):
    """Contrastive learning of images and texts (CLIP, LiT, SigLIP).

    Attributes:
      text: `name` and fields of the text tower, as `config.model` has those of the image tower.
      vocab: the vocabulary (see `vit_jax.data.tokenizer`) that gives the text tower its size,
        encodes class names and decodes captions. "" takes the one that `config.data.pp` tokenizes
        with; it must be named here for a source whose examples have tokens already.
      text_length: the number of tokens of a text, for a model that is evaluated on images without
        texts. 0 takes the data's, which training needs.
      dim: the length of the vectors.
      project_image: False takes the image tower's own vector (LiT).
      loss: "softmax" (CLIP) or "sigmoid" (SigLIP). All pairs of a batch are compared. With
        `accum_steps` the towers see one micro-batch at a time, at the price of one more forward
        pass.
      scale, bias: initial values of the learned scale of the logits, and of the bias that the
        sigmoid loss adds. 10 and -10 are SigLIP's (section 3.2); CLIP starts at a scale of
        1 / 0.07.
      chunk: the number of texts whose logits a device holds at once.
      classes: class names for zero-shot classification; empty takes the data's if there are
        `prompts`.
      prompts: sentences in which {} stands for the name of a class; the vectors of all sentences
        are averaged (CLIP, section 3.1.4).
      candidates: the number of texts among which the right one is to be found; see
        `_retrieval.right_among`.
      affine, elastic, randaug, erasing: see `augment.spec.Augmentation`.
    """

    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocab: str = ""
    text_length: int = 0
    dim: int = 512
    project_image: bool = True
    loss: str = "softmax"
    scale: float = 10.0
    bias: float = -10.0
    chunk: int = 1024
    classes: Sequence[str] = ()
    prompts: Sequence[str] = ()
    candidates: int = 50
    affine: Mapping[str, float] = dataclasses.field(default_factory=dict)
    elastic: Mapping[str, float] = dataclasses.field(default_factory=dict)
    randaug: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    erasing: float = 0.0

    headline = "image_to_text_recall1"
    of_evaluation: ClassVar[tuple[str, ...]] = ("classes", "prompts", "candidates")
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "image_to_text_recall*": SCORE,
        "text_to_image_recall*": SCORE,
        "caption_among_*": SCORE,
        "accuracy": SCORE,
        "top5_accuracy": SCORE,
        "num_examples": COUNT,
    }
    num_shown = 64
    needs_whole_batch = True

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the image tower of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no images with tokens.
        """
        task = cls(models.build(**model), info, **fields)._with_text_length()
        info = task.info
        wanted = {
            "image": "uint8 or float32 [height, width, channels]",
            "tokens": "int32 [length], made by the op tokenize",
        }
        image, tokens = (info.spec.get(name) for name in wanted)
        fits = (
            image is not None
            and tokens is not None
            and len(image.shape) == 3
            and len(tokens.shape) == 1
        )
        check_data("contrastive", wanted, info, fits)
        assert tokens is not None
        task.check_images()
        task = task._with_vocab(tokens.vocab)
        task._check_fields()
        towers = models.TwoTowers(
            task.model,
            task._text_tower(),
            task.dim,
            tokens.shape[0],
            project_image=task.project_image,
            scale_init=task.scale,
            bias_init=task.bias if task.loss == "sigmoid" else None,
        )
        task = dataclasses.replace(task, model=towers)
        task._check_width()
        return task

    def _with_text_length(self) -> "Task":
        """Returns the task with texts of `text_length` tokens, if it is given and data has none."""
        if self.text_length <= 0 or "tokens" in self.info.spec:
            return self
        tokens = ArraySpec((self.text_length,), np.dtype(np.int32))
        return dataclasses.replace(
            self, info=self.info._replace(spec={**self.info.spec, "tokens": tokens})
        )

    def _with_vocab(self, told: str) -> "Task":
        """Returns the task with the vocabulary of the tokens, if the data names it."""
        if told and self.vocab not in ("", told):
            raise UserError(
                f"config.task.vocab={self.vocab!r}, but config.data.pp tokenizes with {told!r};"
                " write the right one there, and leave config.task.vocab out"
            )
        return dataclasses.replace(self, vocab=told or self.vocab)

    def _check_fields(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"config.task.loss={self.loss!r}: write {' or '.join(LOSSES)}")
        if self.scale <= 0 or self.chunk < 1 or self.candidates < 2:
            raise UserError("config.task: scale must be positive, chunk 1 and candidates 2 or more")
        if self._names() and not self.vocab:
            raise UserError("config.task.classes and prompts are texts: set config.task.vocab too")
        unused = [prompt for prompt in self.prompts if "{}" not in prompt]
        if unused:
            raise UserError(f"config.task.prompts: {unused[0]!r} has no {{}} for the class's name")
        if not all(self._texts()):
            raise UserError("an empty text: write words in each --text, or in config.task.classes")

    def _text_tower(self) -> nn.Module:
        fields = {"name": "text", **self.text}
        if "vocab_size" not in models.field_names(fields["name"]):
            raise UserError(f"config.task.text.name={fields['name']!r} reads no texts; write text")
        if self.vocab and "vocab_size" not in fields:
            fields["vocab_size"] = self._tokenizer().vocab_size
        return models.build(**fields)

    def _check_width(self) -> None:
        """Raises a `UserError` if an image tower's own vectors do not have `dim` numbers."""
        key, images = jax.random.key(0), self._example()
        found, _ = jax.eval_shape(lambda x: self.model.init_with_output(key, x), images)
        if found.image.shape[-1] != self.dim:
            raise UserError(
                f"config.task.dim={self.dim}, but without project_image the image tower's vectors"
                f" have {found.image.shape[-1]} numbers; write that"
            )

    def _example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.info.spec["image"].shape), jnp.float32)

    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.vocab, self.info.spec["tokens"].shape[0])

    def _names(self) -> Sequence[str]:
        """Returns the class names for zero-shot classification; () without any."""
        return tuple(self.classes) or ((self.info.class_names or ()) if self.prompts else ())

    def _texts(self) -> list[str]:
        """Returns the sentences for all classes, those for one class after the other."""
        prompts = self.prompts or ("{}",)
        return [prompt.replace("{}", name) for name in self._names() for prompt in prompts]

    def with_texts(self, texts: Sequence[str]) -> "Task":
        """Returns this task with `texts` in the place of its classes.

        Raises:
          UserError: the task has no vocabulary.
        """
        task = dataclasses.replace(self, classes=tuple(texts), prompts=())
        task._check_fields()
        return task

    def init(self, key: Array) -> Params:
        """Returns fresh parameters, boxed with their logical axis names."""
        return self.model.init(key, jnp.zeros(self._example().shape))["params"]

    def targets(self, batch: Batch) -> dict[str, Array]:
        """Returns `tokens`, int32 `[b, length]`."""
        return {"tokens": jnp.maximum(batch["tokens"], 0)}

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the losses of the pairs, their number) of a batch."""
        return self._loss(self._outputs(params, batch, key))

    def loss_fn_of_parts(self, params: Params, parts: Batch, key: Array) -> tuple[Array, Array]:
        """Returns `loss_fn` of a batch in micro-batches, arrays `[parts, b / parts, ...]`.

        Every image is compared with every text of the batch. Only their vectors are kept; the
        backward pass computes the activations of one micro-batch after the other once more (Gao
        et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").
        """

        def outputs(part: tuple[Batch, Array]) -> TowerOutputs:
            batch, number = part
            return self._outputs(params, batch, jax.random.fold_in(key, number))

        numbers = jnp.arange(len(parts["tokens"]))
        found = jax.lax.map(jax.checkpoint(outputs, prevent_cse=False), (parts, numbers))
        # Row r of the batch is row r // parts of micro-batch r % parts.
        image, text = (x.swapaxes(0, 1).reshape(-1, self.dim) for x in (found.image, found.text))
        return self._loss(TowerOutputs(image, text, found.scale[0], found.bias[0]))

    def _outputs(self, params: Params, batch: Batch, key: Array) -> TowerOutputs:
        return models.outputs_of(
            self.model, params, batch["image"], batch["tokens"], train=True, rngs={"dropout": key}
        )

    def _loss(self, outputs: TowerOutputs) -> tuple[Array, Array]:
        assert outputs.image is not None
        return LOSSES[self.loss](outputs, self.chunk), jnp.float32(len(outputs.image))

    def precompute(self, params: Params) -> Params:
        """Returns the vectors of the classes, `[classes, dim]`, if there are any."""
        texts = self._texts()
        if not texts:
            return {}
        tokens = jnp.asarray(self._tokenizer().encode(texts))

        def embed(row: Array) -> Array:
            return models.outputs_of(self.model, params, tokens=row[None]).text[0]

        vectors = jax.lax.map(embed, tokens, batch_size=min(_TEXTS_AT_ONCE, len(texts)))
        mean = vectors.reshape(len(self._names()), -1, vectors.shape[-1]).mean(1)
        return {CLASSES: mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)}

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the vectors of a batch, and the probabilities of the classes if there are any.

        They are `image_vector` `[b, dim]`, `text_vector` `[b, texts, dim]` where the batch has
        tokens, and `probability` `[b, classes]`, by softmax or sigmoid as in training.
        """
        params, classes = _split(params)
        outputs = models.outputs_of(self.model, params, self.inputs(batch))
        found = {"image_vector": outputs.image}
        if "tokens" in batch:
            tokens = _rows(batch["tokens"])
            flat = jnp.maximum(tokens, 0).reshape(-1, tokens.shape[-1])
            texts = models.outputs_of(self.model, params, tokens=flat).text
            found["text_vector"] = texts.reshape(*tokens.shape[:2], -1)
        if classes is not None:
            logits = outputs.logits(outputs.image, classes)
            squash = jax.nn.softmax if self.loss == "softmax" else jax.nn.sigmoid
            found["probability"] = squash(logits)
        return found

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the number of real rows, and of top-1 and top-5 hits where they have labels."""
        real = batch["mask"] > 0
        sums = {"examples": real.sum(dtype=jnp.int32)}
        if "label" in batch and CLASSES in params:
            params, classes = _split(params)
            assert classes is not None
            outputs = models.outputs_of(self.model, params, self.inputs(batch))
            logits = outputs.logits(outputs.image, classes)
            top = top_classes(logits, min(5, len(classes)))
            hits = (top == batch["label"][:, None]) & (top >= 0) & real[:, None]
            sums |= {"top1": hits[:, 0].sum(), "top5": hits.any(1).sum()}
        return sums

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns vectors and tokens where images have texts."""
        if "tokens" not in batch:
            return {}
        found = self.predict({k: x for k, x in params.items() if k != CLASSES}, batch)
        return {**found, "tokens": _rows(batch["tokens"])}

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics that the data allow, and the number of images, `num_examples`.

        They are recalls of retrieval in both directions and `caption_among_N` (see `_retrieval`),
        and `accuracy` and, with more than five classes, `top5_accuracy` of zero-shot
        classification.

        Raises:
          UserError: a split has neither texts nor labels of the classes.
        """
        examples = int(found["examples"])
        metrics: dict[str, float] = {}
        if "tokens" in found:
            vectors = (found["image_vector"], found["text_vector"], found["tokens"])
            split = _retrieval.Split.of(*vectors)
            metrics |= _retrieval.recalls(split)
            among = _retrieval.right_among(split, self.candidates)
            metrics |= {} if among is None else {f"caption_among_{self.candidates}": among}
        if "top1" in found:
            metrics["accuracy"] = int(found["top1"]) / max(1, examples)
            if len(self._names()) > 5:
                metrics["top5_accuracy"] = int(found["top5"]) / max(1, examples)
        if not metrics:
            raise UserError(
                "config.eval.sets: a split for task contrastive needs tokens (op tokenize), or"
                " labels and config.task.classes or prompts"
            )
        return {**metrics, "num_examples": examples}

    def summaries(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the best class of each image, or the best of the texts of all images."""
        if "probability" in examples:
            return _classes.best(examples["probability"], self._names())
        if "tokens" not in examples or not self.vocab:
            return [""] * len(examples["image_vector"])
        tokens = _rows(examples["tokens"])
        tokens = tokens.reshape(-1, tokens.shape[-1])
        vectors = examples["text_vector"].reshape(len(tokens), -1)
        scores = examples["image_vector"] @ vectors.T
        scores[:, tokens[:, 0] == NO_TEXT] = -np.inf
        return [self._tokenizer().decode(tokens[i]) for i in scores.argmax(1)]

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns the `top` most probable classes of each image, most probable first.

        Raises:
          UserError: the task has neither classes nor texts to choose from.
        """
        if "probability" not in examples:
            raise UserError(
                "this model tells which text fits an image: write --text=TEXT once for each"
            )
        return _classes.ranking(examples["probability"], self._names(), top)

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Returns a section of images with the text that fits best, and their own."""
        from vit_jax.report import figures  # matplotlib, which training can do without

        if "tokens" not in examples or not self.vocab:
            return []
        tokenizer, tokens = self._tokenizer(), _rows(examples["tokens"])
        best = self.summaries({k: x for k, x in examples.items() if k != "probability"})[:SHOWN]
        own = [tokenizer.decode(row[0]) for row in tokens[:SHOWN]]
        figure = figures.image_grid(list(examples["image"][:SHOWN]), best, own)
        text = f"Under each image the best of {len(tokens)} images' captions, then its own."
        alt = "Images, each above the caption that fits it best and its own caption."
        return [Section("Captions beside the truth", text, figure, alt=alt)]


def _split(params: Params) -> tuple[Params, Array | None]:
    """Returns the model's parameters, and the vectors of the classes or None."""
    return {k: x for k, x in params.items() if k != CLASSES}, params.get(CLASSES)


def _rows(tokens: Numbers) -> Numbers:
    """Returns tokens `[b, length]` or `[b, texts, length]` as the latter."""
    return tokens[:, None] if tokens.ndim == 2 else tokens
