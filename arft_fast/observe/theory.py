"""Floating-point operations that a step takes at least: products and attention, counted from shapes.

    forward = 2 W tokens + 4 w L pairs + 2 D V rows + vision tower

with W the weights of the body's matrices (embeddings are looked up, norms and activations are below one percent), w the
width of attention, L layers, D hidden size, V vocabulary. A multiplication and an addition are two operations. Nothing
is said about memory traffic: that a kernel runs at a share of this is its own business.

A backward pass takes a product for the inputs and one for the weights of each matrix, and five products for the two of
attention (scores are computed again: FlashAttention, arXiv 2205.14135 section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int, int]
"""Patches of an image in time, height and width."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass looks at; works of passes add up."""

    tokens: int = 0
    """Tokens that go through the language model: rows of a tree, or padded tokens of a batch."""
    pairs: int = 0
    """(query, key) pairs of tokens that one layer computes."""
    rows: int = 0
    """Tokens that meet the vocabulary head."""
    patches: int = 0
    """Patches that go through the vision tower."""
    patch_pairs: int = 0
    """(query, key) pairs of patches, summed over the layers of the vision tower: some look at windows only."""

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            pairs=self.pairs + other.pairs,
            rows=self.rows + other.rows,
            patches=self.patches + other.patches,
            patch_pairs=self.patch_pairs + other.patch_pairs,
        )


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One transformer layer."""

    weights: int
    """Weights of its matrices."""
    last: int
    """Those of the last matrix, whose product gradient checkpointing does not repeat: its result is not kept."""
    width: int
    """Query heads times their width."""


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A vision tower of the Qwen-VL family."""

    layer: LayerShape
    depth: int
    full_layers: int
    """Layers in which a patch looks at its whole frame; in the others at its window."""
    window: int
    """Merged patches along the side of a window; 0 where there are no windows."""
    merge: int
    """Patches along the side of the square that becomes one token."""
    embedding: int
    """Weights that turn the pixels of a patch into its hidden state."""
    merger: int
    """Weights a patch in all mergers together."""

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """From the vision configuration of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

        Raises:
            ValueError: another family.
        """
        if hasattr(config, "fullatt_block_indexes"):  # Qwen2.5-VL: gated, windows (arXiv 2502.13923 section 2.1.1)
            width, inner, out, matrices = config.hidden_size, config.intermediate_size, config.out_hidden_size, 3
        elif hasattr(config, "deepstack_visual_indexes"):  # Qwen3-VL: more mergers (DeepStack, arXiv 2406.04334)
            width, inner, out, matrices = config.hidden_size, config.intermediate_size, config.out_hidden_size, 2
        elif hasattr(config, "mlp_ratio") and hasattr(config, "embed_dim"):  # Qwen2-VL (arXiv 2409.12191)
            width, inner, out, matrices = config.embed_dim, config.embed_dim * config.mlp_ratio, config.hidden_size, 2
        else:
            raise ValueError(
                f"config: {getattr(config, 'model_type', 'this')!r} is no vision tower of the Qwen-VL family; "
                "give a VisionShape made by hand"
            )
        full = getattr(config, "fullatt_block_indexes", None)
        merge = config.spatial_merge_size
        mergers = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
        return cls(
            layer=LayerShape(weights=4 * width**2 + matrices * width * inner, last=inner * width, width=width),
            depth=config.depth,
            full_layers=config.depth if full is None else len(set(full) & set(range(config.depth))),
            window=0 if full is None else config.window_size // merge // config.patch_size,
            merge=merge,
            embedding=config.in_channels * config.temporal_patch_size * config.patch_size**2 * width,
            merger=mergers * (width**2 * merge**2 + width * out),
        )

    def look(self, grids: Iterable[Grid]) -> Work:
        """Patches and pairs of images; frames and images do not look at each other."""
        patches = pairs = 0
        for frames, height, width in grids:
            patches += frames * height * width
            whole = (height * width) ** 2
            parts = self._squares(height) * self._squares(width) if self.window else 0
            pairs += frames * (self.full_layers * whole + (self.depth - self.full_layers) * parts)
        return Work(patches=patches, patch_pairs=pairs)

    def _squares(self, side: int) -> int:
        """Sum of squares of the lengths into which windows cut a side, in patches."""
        length = self.window * self.merge
        return side // length * length**2 + (side % length) ** 2

    def forward(self, work: Work) -> int:
        weights = self.embedding + self.depth * self.layer.weights + self.merger
        return 2 * weights * work.patches + 4 * self.layer.width * work.patch_pairs

    def backward(self, work: Work) -> int:
        """The pixels need no gradient."""
        weights = self.embedding + 2 * (self.depth * self.layer.weights + self.merger)
        return 2 * weights * work.patches + 10 * self.layer.width * work.patch_pairs

    def repeated(self, work: Work) -> int:
        """What gradient checkpointing computes a second time."""
        weights = self.depth * (self.layer.weights - self.layer.last)
        return 2 * weights * work.patches + 4 * self.layer.width * work.patch_pairs


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the formula needs to know of a model."""

    layer: LayerShape
    layers: int
    hidden: int
    vocabulary: int
    vision: VisionShape | None

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From a Hugging Face configuration of a Qwen2, Qwen2-VL, Qwen2.5-VL, Qwen3 or Qwen3-VL style model.

        Raises:
            ValueError: a mixture of experts, layers without attention, or a vision tower of another family.
        """
        text = getattr(config, "text_config", None) or config
        name = getattr(text, "model_type", "this model")
        if getattr(text, "num_experts", None):
            raise ValueError(f"config: {name!r} is a mixture of experts; give a ModelShape made by hand")
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(f"config: {name!r} has layers of type {sorted(kinds)}; give a ModelShape made by hand")
        heads, hidden, inner = text.num_attention_heads, text.hidden_size, text.intermediate_size
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        key_value = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
        vision = getattr(config, "vision_config", None)
        return cls(
            layer=LayerShape(
                weights=2 * hidden * (heads * head_dim + key_value) + 3 * hidden * inner,
                last=inner * hidden,
                width=heads * head_dim,
            ),
            layers=text.num_hidden_layers,
            hidden=hidden,
            vocabulary=text.vocab_size,
            vision=None if vision is None else VisionShape.of(vision),
        )

    @property
    def body_weights(self) -> int:
        """Weights of the language model's matrices, without embeddings and head."""
        return self.layers * self.layer.weights

    def look(self, grids: Iterable[Grid]) -> Work:
        """Patches and their pairs of images that go through the vision tower.

        Raises:
            ValueError: images for a model that reads text only.
        """
        images = list(grids)
        if not images:
            return Work()
        if self.vision is None:
            raise ValueError(f"grids: {len(images)} images for a model without a vision tower; leave them out")
        return self.vision.look(images)


def causal_pairs(length: int) -> int:
    """(query, key) pairs of a sequence of ``length`` tokens in which a token sees itself and what stands before it."""
    return length * (length + 1) // 2


def forward_flops(shape: ModelShape, work: Work) -> int:
    """Operations of one forward pass, the vocabulary head included."""
    body = 2 * shape.body_weights * work.tokens + 4 * shape.layer.width * shape.layers * work.pairs
    head = 2 * shape.hidden * shape.vocabulary * work.rows
    return body + head + (shape.vision.forward(work) if shape.vision is not None else 0)


def backward_flops(
    shape: ModelShape, work: Work, *, frozen_vision: bool = False, gradient_checkpointing: bool = False
) -> int:
    """Operations of the gradients of all weights.

    Args:
        frozen_vision: the vision tower is not trained; nothing flows back into it.
        gradient_checkpointing: layers are computed a second time, up to the input of their last matrix, where torch
            stops (``torch.utils.checkpoint``, early stop); mergers, patch embedding and head are not.
    """
    body = 4 * shape.body_weights * work.tokens + 10 * shape.layer.width * shape.layers * work.pairs
    if gradient_checkpointing:
        again = shape.layers * (shape.layer.weights - shape.layer.last)
        body += 2 * again * work.tokens + 4 * shape.layer.width * shape.layers * work.pairs
    head = 4 * shape.hidden * shape.vocabulary * work.rows
    if shape.vision is None or frozen_vision:
        return body + head
    repeated = shape.vision.repeated(work) if gradient_checkpointing else 0
    return body + head + shape.vision.backward(work) + repeated


def train_flops(
    shape: ModelShape, work: Work, *, frozen_vision: bool = False, gradient_checkpointing: bool = False
) -> int:
    """Operations of a forward and a backward pass; see ``backward_flops``."""
    return forward_flops(shape, work) + backward_flops(
        shape, work, frozen_vision=frozen_vision, gradient_checkpointing=gradient_checkpointing
    )
