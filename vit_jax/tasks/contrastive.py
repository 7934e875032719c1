"""Images and texts brought together: two towers, one space of vectors.

The batch has `image` and `tokens`, int32 `[length]` (see the preprocessing op `tokenize`). In
evaluation an image may have several texts, `[texts, length]`, or a `label` in the place of any.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment.images import check_data, check_geometry, check_statistics, normalise
from vit_jax.data.tokenizer import NO_TEXT, Tokenizer, open_tokenizer
from vit_jax.errors import UserError
from vit_jax.report import Section
from vit_jax.tasks import _classes, _contrast, _retrieval
from vit_jax.tracking.metrics import COUNT, SCORE, Metric
from vit_jax.types import Array, Batch, DataInfo, Params

LOSSES = {"softmax": _contrast.softmax_loss, "sigmoid": _contrast.sigmoid_loss}
CLASSES = "class_vectors"
"""Where, beside the parameters, the vectors of the class names are."""

SHOWN = 8
"""Images that the report shows."""

_TEXTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Task:
    """Contrastive learning of images and texts (CLIP, LiT, SigLIP).

    text: `name` and fields of the text tower, as `config.model` has those of the image tower.
    vocab: of `vit_jax.data.tokenizer`: its size is the text tower's, class names are read by it,
      and captions shown. "" takes the one that `config.data.pp` tokenizes with; of a source that
      has tokens already, it is to be named here.
    dim: of the vectors. project_image: False takes the image tower's vector as it is (LiT).
    loss: "softmax" (CLIP) or "sigmoid" (SigLIP). With `accum_steps`, pairs are compared within each
      micro-batch alone.
    scale, bias: by what products of vectors are multiplied, and what is added for the sigmoid, at
      first; learned. 10 and -10 are SigLIP's (section 3.2); CLIP starts at a scale of 1 / 0.07.
    chunk: texts whose logits a device holds at once.
    classes: names for zero-shot classification; empty takes the data's, where there are `prompts`.
    prompts: what is said of a class, {} being its name; vectors of all are averaged (CLIP, 3.1.4).
    candidates: texts among which the right one is to be found; see `_retrieval.right_among`.
    mean, std: of uint8 images, in 0..255, one value or one a channel; the defaults give [-1, 1].
    crop_to_patches: accept images whose last rows and columns fill no patch.
    """

    model: nn.Module
    info: DataInfo
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocab: str = ""
    dim: int = 512
    project_image: bool = True
    loss: str = "softmax"
    scale: float = 10.0
    bias: float = -10.0
    chunk: int = 1024
    classes: Sequence[str] = ()
    prompts: Sequence[str] = ()
    candidates: int = 50
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    crop_to_patches: bool = False

    headline = "image_to_text_recall1"
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "image_to_text_recall*": SCORE,
        "text_to_image_recall*": SCORE,
        "caption_among_*": SCORE,
        "accuracy": SCORE,
        "top5_accuracy": SCORE,
        "num_examples": COUNT,
    }
    pictured = 64

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """The task around the image tower of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no images with tokens.
        """
        task = cls(models.build(**model), info, **fields)
        wanted = {
            "image": "uint8 or float32 [height, width, channels]",
            "tokens": "int32 [length], made by the op tokenize",
        }
        image, tokens = (info.spec.get(name) for name in wanted)
        fits = image is not None and tokens is not None and len(image.shape) == 3
        check_data("contrastive", wanted, info, fits and len(tokens.shape) == 1)
        check_geometry(task.model, image.shape, task.crop_to_patches)
        check_statistics(task.mean, task.std, image.shape[-1])
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

    def _with_vocab(self, told: str) -> "Task":
        """The task with the vocabulary of the tokens, if the data told it."""
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

    def _text_tower(self) -> nn.Module:
        fields = {"name": "text", **self.text}
        if "vocab_size" not in models.field_names(fields["name"]):
            raise UserError(f"config.task.text.name={fields['name']!r} reads no texts; write text")
        if self.vocab and "vocab_size" not in fields:
            fields["vocab_size"] = self._tokenizer().vocab_size
        return models.build(**fields)

    def _check_width(self) -> None:
        """Raises a `UserError` where an image tower's own vectors are not of `dim` numbers."""
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
        """Class names that images are told apart by; () without zero-shot classification."""
        return tuple(self.classes) or ((self.info.class_names or ()) if self.prompts else ())

    def answering(self, texts: Sequence[str]) -> "Task":
        """This task with `texts` in the place of its classes. Raises `UserError` without vocab."""
        task = dataclasses.replace(self, classes=tuple(texts), prompts=())
        task._check_fields()
        return task

    def init(self, key: Array) -> Params:
        """Fresh parameters, boxed with their logical axis names."""
        return self.model.init(key, jnp.zeros(self._example().shape))["params"]

    def perturb(self, batch: Batch, key: Array) -> Batch:
        """Normalised images and tokens; nothing is random here."""
        del key
        return {"image": self.inputs(batch), "tokens": jnp.maximum(batch["tokens"], 0)}

    def objective(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """(sum of the losses of the pairs, their number) of a perturbed micro-batch."""
        pairs = self.model.apply(
            {"params": params}, batch["image"], batch["tokens"], train=True, rngs={"dropout": key}
        )
        return LOSSES[self.loss](pairs, self.chunk), jnp.float32(len(batch["tokens"]))

    def inputs(self, batch: Batch) -> Array:
        """The images of a batch from the pipeline, as the model takes them."""
        return normalise(jnp.asarray(batch["image"]), self.mean, self.std)

    def precompute(self, params: Params) -> Params:
        """Vectors of the classes, `[classes, dim]`: once an evaluation, not once a batch."""
        names = self._names()
        if not names:
            return {}
        prompts = self.prompts or ("{}",)
        texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
        tokens = jnp.asarray(self._tokenizer().encode(texts))

        def embed(row: Array) -> Array:
            return self.model.apply({"params": params}, tokens=row[None]).text[0]

        vectors = jax.lax.map(embed, tokens, batch_size=min(_TEXTS_AT_ONCE, len(texts)))
        mean = vectors.reshape(len(names), len(prompts), -1).mean(1)
        return {CLASSES: mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)}

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """`image_vector` `[b, dim]`, with tokens `text_vector` `[b, texts, dim]`, and `probability`
        `[b, classes]` where there are classes: softmax or sigmoid, as it was trained."""
        params, classes = _split(params)
        seen = self.model.apply({"params": params}, self.inputs(batch))
        found = {"image_vector": seen.image}
        if "tokens" in batch:
            tokens = _rows(batch["tokens"])
            flat = jnp.maximum(tokens, 0).reshape(-1, tokens.shape[-1])
            texts = self.model.apply({"params": params}, tokens=flat).text
            found["text_vector"] = texts.reshape(*tokens.shape[:2], -1)
        if classes is not None:
            logits = seen.logits(seen.image, classes)
            squash = jax.nn.softmax if self.loss == "softmax" else jax.nn.sigmoid
            found["probability"] = squash(logits)
        return found

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Real rows, and where they have labels how often the first, or one of five, is right."""
        real = batch["mask"] > 0
        sums = {"examples": real.sum(dtype=jnp.int32)}
        if "label" in batch and CLASSES in params:
            params, classes = _split(params)
            seen = self.model.apply({"params": params}, self.inputs(batch))
            logits = seen.logits(seen.image, classes)
            top = jax.lax.top_k(logits, min(5, len(classes)))[1]
            hits = (top == batch["label"][:, None]) & real[:, None]
            sums |= {"top1": hits[:, 0].sum(), "top5": hits.any(1).sum()}
        return sums

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Vectors and tokens, where images have texts."""
        if "tokens" not in batch:
            return {}
        found = self.predict({k: x for k, x in params.items() if k != CLASSES}, batch)
        return {**found, "tokens": _rows(batch["tokens"])}

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Retrieval in both directions, `caption_among_N`, zero-shot `accuracy`: what data allow.

        See `_retrieval`. `num_examples` is of images.

        Raises:
          UserError: a split with neither texts nor labels of the classes.
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
            metrics |= {
                "accuracy": int(found["top1"]) / max(1, examples),
                "top5_accuracy": int(found["top5"]) / max(1, examples),
            }
        if not metrics:
            raise UserError(
                "config.eval.sets: a split for task contrastive needs tokens (op tokenize), or"
                " labels and config.task.classes or prompts"
            )
        return {**metrics, "num_examples": examples}

    def captions(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """One line for each image: its best class, or the best of the texts of all of them."""
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

    def lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """The `top` most probable classes of each image, most probable first.

        Raises:
          UserError: nothing to choose from.
        """
        if "probability" not in examples:
            raise UserError(
                "this model tells which text fits an image: write --text=TEXT once for each"
            )
        return _classes.ranking(examples["probability"], self._names(), top)

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The images as they are: a text has no place in them."""
        return list(examples["image"])

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Images with the text that fits best, and their own."""
        from vit_jax.report import figures  # matplotlib, which training can do without

        if "tokens" not in examples or not self.vocab:
            return []
        tokenizer, tokens = self._tokenizer(), _rows(examples["tokens"])
        said = self.captions({k: x for k, x in examples.items() if k != "probability"})[:SHOWN]
        own = [tokenizer.decode(row[0]) for row in tokens[:SHOWN]]
        figure = figures.image_grid(list(examples["image"][:SHOWN]), said, own)
        text = f"Under each image the best of {len(tokens)} images' captions, then its own."
        return [Section("Captions beside the truth", text, figure)]


def _split(params: Params) -> tuple[Params, Array | None]:
    """The model's parameters, and the vectors of the classes if they are there."""
    return {k: x for k, x in params.items() if k != CLASSES}, params.get(CLASSES)


def _rows(tokens: Array) -> Array:
    """`[b, length]` or `[b, texts, length]` to the latter."""
    return tokens[:, None] if tokens.ndim == 2 else tokens
