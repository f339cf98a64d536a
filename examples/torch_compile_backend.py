"""fxseek as a backend of torch.compile, with the loss outside the compiled function.

Works for any module whose input has a token dimension: here a small encoder that tags tokens,
written in plain torch. Its outputs keep their full size; gradients come from selected tokens only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxseek


class Tagger(nn.Module):
    """Embedding, one block of attention and feed-forward, a tag for each token."""

    def __init__(self, words: int = 500, width: int = 64, heads: int = 4, tags: int = 7) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(words, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm, self.tag = nn.LayerNorm(width), nn.Linear(width, tags)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [batch, tokens, tags] of words [batch, tokens]."""
        x = self.embed(words)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.tag(x + self.feed(x))


torch.manual_seed(0)
model = Tagger()
# The context score reads attention alone; a score with the gradient would need the loss inside.
options = {"ratio": 0.25, "score": "context"}
compiled = torch.compile(model, backend="fxseek", dynamic=True, fullgraph=True, options=options)

words, tags = torch.randint(500, (3, 90)), torch.randint(7, (3, 90))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(5):
    loss = F.cross_entropy(compiled(words).flatten(0, 1), tags.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    report = fxseek.report()
    print(
        f"step {step}: loss {loss.item():.3f}, kept {report.selected.shape[1]} of {report.tokens}"
    )
