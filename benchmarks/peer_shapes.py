"""The shapes of shapes.h, for the programs that measure others on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool

    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each weight matrix of a step."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
            "lm_head": (self.vocab, self.hidden),
        }

    def streamed_bytes(self) -> int:
        """Bytes of 16-bit weights that a plain step reads."""
        products = self.products()
        n, k = products.pop("lm_head")
        return 2 * (self.layers * sum(a * b for a, b in products.values()) + n * k)

    def kv_bytes(self) -> int:
        """Bytes of 16-bit cache of one token."""
        return 4 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    "tiny": Shape(4, 256, 4, 2, 64, 768, 1024, True),
    "llama-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-2-7b": Shape(32, 4096, 32, 32, 128, 11008, 32000, False),
    "llama-3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, False),
}
