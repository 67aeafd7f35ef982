"""The encoder-decoder Transformer: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.errors import UsageError
from genai_fast.fusion.chains import untouched
from genai_fast.layers import LayerNorm
from genai_fast.models.common import checks, latents, sequences
from genai_fast.models.common.protocol import Request
from genai_fast.models.common.submodules import first_rows, linear_gelu, norm_of_sum


class Seq2SeqLosses(NamedTuple):
    """0-d float32 tensors."""

    loss: torch.Tensor  # nats a token, over all of the batch's tokens
    nats: torch.Tensor  # nats a target sequence
    tokens: torch.Tensor  # tokens a target sequence, `end` included


class Memory(NamedTuple):
    """Encoded sources, as the decoder reads them."""

    states: torch.Tensor  # [B, S, width]
    lengths: torch.Tensor  # [B], int64: the states after them are padding and are not read


class _Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.act_dropout(x, self.p, True, "none") if self.training and self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """x [B, T, C]. Causal without `starts`; with those of `_spans` each sequence sees its own tokens."""
        share = self.dropout if self.training else 0.0
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # [B, T, H, D] each
        if starts is None:
            y = ops.causal_attention(*(part.transpose(1, 2) for part in parts), dropout=share)
        else:
            packed = {"cu_seqlens_q": starts, "max_seqlen_q": x.size(1), "max_seqlen_k": x.size(1)}
            y = ops.causal_attention(*map(_rows, parts), causal=False, dropout=share, **packed)
        return self.project(y.transpose(1, 2).reshape(x.shape))


class _CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)

    def keys(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of states [B, S, C], each [B, S, H, D]."""
        return self.key_value(memory).unflatten(2, (2, self.heads, -1)).unbind(2)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, queries: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """x [B, T, C] over the states [B, S, C]; where the sequences of both begin, as `_spans` says."""
        k, v = self.keys(memory)
        y = ops.causal_attention(
            _rows(self.query(x).unflatten(2, (self.heads, -1))), _rows(k), _rows(v), causal=False,
            dropout=self.dropout if self.training else 0.0, cu_seqlens_q=queries, cu_seqlens_k=starts,
            max_seqlen_q=x.size(1), max_seqlen_k=memory.size(1),
        )  # fmt: skip
        return self.project(y.transpose(1, 2).reshape(x.shape))


class _Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(linear_gelu(self.up, x))


class _Block(nn.Module):
    """A pre-norm block of the encoder, or of the decoder: that has `cross`.

    The last branch's sum with the stream is made in the next norm's pass, so blocks hand both on.
    """

    def __init__(self, width: int, heads: int, dropout: float, decodes: bool) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(width)
        self.attention = _SelfAttention(width, heads, dropout)
        if decodes:
            self.norm_cross = LayerNorm(width)
            self.cross = _CrossAttention(width, heads, dropout)
        self.norm_2 = LayerNorm(width)
        self.feed = _Feed(width)
        self.dropout = _Dropout(dropout)

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None, starts: torch.Tensor | None, *cross: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, branch to be added to it) -> the same behind this block, each [B, T, C]."""
        y, x = (self.norm_1(x), x) if branch is None else norm_of_sum(self.norm_1, branch, x)
        branch = self.dropout(self.attention(y, starts))
        if cross:
            y, x = norm_of_sum(self.norm_cross, branch, x)
            branch = self.dropout(self.cross(y, *cross))
        y, x = norm_of_sum(self.norm_2, branch, x)
        return x, self.dropout(self.feed(y))


class Seq2Seq(nn.Module):
    """The encoder-decoder Transformer: pre-norm, learned positions, one embedding for source, target and output.

    The encoder sees each source's own tokens in both directions, the decoder the target's tokens so far and all of the
    encoded source. Padding reaches nothing: a batch [B, S] is attended over as one row of 2 B packed sequences, each
    source and what lies behind it, so that no shape depends on lengths and no mask is made. On a CPU that takes less
    time than PyTorch's attention under a mask, the less the shorter the sources are beside the longest.

    Args:
        vocabulary: V; token ids are in [0, V).
        end: the id that ends each source and target, and that the decoder is given first.
        block: most tokens of a source or a target.
        layers: blocks of the encoder, and of the decoder.
        heads: of each attention; divides width.
        width: C, channels of the stream.
        dropout: share dropped of embeddings, of attention's probabilities and of each branch, in training.

    Raises: ValueError on sizes that do not fit, and on ids and lengths that do not (values are read on the CPU alone).
    Source: Vaswani et al. 2017, arXiv:1706.03762; pre-norm: Xiong et al. 2020, arXiv:2002.04745; tied embeddings:
        Press & Wolf 2017, arXiv:1608.05859.
    """

    continues: ClassVar[bool] = False  # the prompt is answered

    def __init__(
        self, vocabulary: int, end: int, block: int = 256, layers: int = 4, heads: int = 4, width: int = 256, *,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("Seq2Seq", vocabulary=vocabulary, block=block, layers=layers, heads=heads, width=width)
        sequences.check_end("Seq2Seq", end, vocabulary)
        if width % heads:
            raise ValueError(f"Seq2Seq: heads: expected a divisor of width {width}, got {heads}; change one of them")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"Seq2Seq: dropout: expected a share in [0, 1), got {dropout}")
        self.vocabulary, self.end, self.block, self.heads = vocabulary, end, block, heads
        self.embed = nn.Embedding(vocabulary, width)
        self.source_positions = nn.Embedding(block, width)
        self.target_positions = nn.Embedding(block, width)
        self.dropout = _Dropout(dropout)
        self.encoder_blocks = nn.ModuleList(_Block(width, heads, dropout, False) for _ in range(layers))
        self.encoder_norm = LayerNorm(width)
        self.decoder_blocks = nn.ModuleList(_Block(width, heads, dropout, True) for _ in range(layers))
        self.decoder_norm = LayerNorm(width)
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 0.02) as GPT-2; what is added to a stream is smaller the more is added."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                blocks = len(self.encoder_blocks) * (3 if name.startswith("decoder") else 2)
                branch = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 * (blocks**-0.5 if branch else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def encode(self, source: torch.Tensor, lengths: torch.Tensor) -> Memory:
        """Sources [B, S] of which the first lengths [B] tokens count, int64 -> what the decoder reads."""
        self._check("source", source, lengths)
        starts = _spans(lengths, source.size(1))
        x, branch = self._embed(source, self.source_positions), None
        for block in self.encoder_blocks:
            x, branch = block(x, branch, starts)
        return Memory(norm_of_sum(self.encoder_norm, branch, x)[0], lengths)

    def forward(self, source: torch.Tensor, source_lengths: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Sources [B, S], their lengths [B], and the decoder's tokens ids [B, T], the first of them `end` -> logits
        [B, T, V] of the tokens after each."""
        return self._decoded(self.encode(source, source_lengths), ids)

    def _decoded(self, memory: Memory, ids: torch.Tensor) -> torch.Tensor:
        self._check("ids", ids, None)
        queries = _spans(torch.full_like(memory.lengths, ids.size(1)), ids.size(1))
        cross = (memory.states, queries, _spans(memory.lengths, memory.states.size(1)))
        x, branch = self._embed(ids, self.target_positions), None
        for block in self.decoder_blocks:
            x, branch = block(x, branch, None, *cross)
        return F.linear(norm_of_sum(self.decoder_norm, branch, x)[0], self.embed.weight)

    def training_step(
        self, source: torch.Tensor, source_lengths: torch.Tensor, target: torch.Tensor, target_lengths: torch.Tensor
    ) -> Seq2SeqLosses:
        """The teacher-forced cross-entropy of targets [B, T], each with its `end`, given sources [B, S].

        All are int64; lengths [B] count the tokens with `end`; what is behind them is not looked at.
        """
        self._check("target", target, target_lengths)
        logits = self(source, source_lengths, sequences.delayed(target, self.end))
        labels = sequences.targets(target, target_lengths)
        nats = ops.cross_entropy(logits, labels, reduction="sum", inplace=True).float()
        tokens = target_lengths.sum().float()
        return Seq2SeqLosses(nats / tokens, nats / len(target), tokens / len(target))

    def decoder(self, memory: Memory) -> Seq2SeqDecoder:
        """A state that writes a target for each of the encoded sources, step by step; no gradient, no dropout."""
        return Seq2SeqDecoder(self, memory)

    def generate_ids(
        self, prompt: torch.Tensor, choose: sequences.Choose | None = None, *, longest: int | None = None
    ) -> Iterator[int]:
        """The target's token ids for one source, one at a time as they are made, until `end`, which is left out.

        Args:
            prompt: the source's token ids [S], with its `end` if it was trained with one.
            choose: logits [1, V] -> token [1], such as a `generation.Sampler`; None: the likeliest.
            longest: most tokens; None: `block`.
        """
        ids = sequences.prompt_ids("Seq2Seq", prompt, self.vocabulary, next(self.parameters()).device)
        with latents.evaluating(self), torch.no_grad():
            memory = self.encode(ids, torch.tensor([ids.size(1)], device=ids.device))
        longest = self.block if longest is None else min(longest, self.block)
        first = ids.new_full((1,), self.end)
        return sequences.streamed(self.decoder(memory), first, choose, longest, self.end)

    def write_ids(self, request: Request) -> Iterator[int]:
        """See `protocol.Writes`."""
        prompt, end, sampler, longest, *_ = request
        if len(prompt) >= self.block:
            raise UsageError(
                f"the prompt has {len(prompt) + 1} tokens, the model reads {self.block}; remedy: a shorter one"
            )
        return self.generate_ids(torch.tensor([*prompt, end]), sampler, longest=longest)

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, end={self.end}, block={self.block}, heads={self.heads}"

    def _embed(self, ids: torch.Tensor, positions: nn.Embedding) -> torch.Tensor:
        return self.dropout(self.embed(ids) + first_rows(positions, ids.size(1), ids.device))

    def _check(self, name: str, ids: torch.Tensor, lengths: torch.Tensor | None) -> None:
        sequences.check_ids("Seq2Seq", name, ids, self.vocabulary, lengths)
        if ids.size(1) > self.block:
            raise ValueError(
                f"Seq2Seq: {name}: expected at most block = {self.block} tokens, got {ids.size(1)}; shorten them, or"
                f" make the model with block={ids.size(1)}"
            )


class Seq2SeqDecoder:
    """What `Seq2Seq.decoder` gives: keys and values of the sources, and of the targets as far as they are written.

    At one query a head PyTorch's attention over a view of the cache takes a third of ops.decode_attention's time on a
    CPU, and half of it for 16 targets at a time, so that one serves here. If a block or an attention of the decoder was
    changed (hooks, wrappers), all tokens so far go through the modules at each step.
    """

    @torch.no_grad()
    def __init__(self, model: Seq2Seq, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.ids: torch.Tensor | None = None  # all tokens so far, if the modules are called
        self.count = 0  # tokens so far, the same for all targets
        if not all(map(_as_made, model.decoder_blocks)):
            self.ids = memory.lengths.new_empty(len(memory.lengths), 0)
            return
        places = torch.arange(memory.states.size(1), device=memory.lengths.device)
        self.seen = (places < memory.lengths[:, None])[:, None, None]  # [B, 1, 1, S]
        self.positions = first_rows(model.target_positions, model.block, places.device)
        pairs = (block.cross.keys(memory.states) for block in model.decoder_blocks)
        self.cross = [[x.transpose(1, 2).contiguous() for x in pair] for pair in pairs]
        shape = (len(memory.lengths), model.heads, model.block, self.cross[0][0].size(3))
        self.caches = [[x.new_zeros(shape) for x in pair] for pair in self.cross]

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next token ids [B] of all targets, `end` the first time -> logits [B, V] of those after them.

        Raises: ValueError after `block` tokens.
        """
        model, heads = self.model, (self.model.heads, -1)
        if self.count >= model.block:
            raise ValueError(f"Seq2Seq: step: expected at most block = {model.block} tokens; stop there")
        if self.ids is not None:
            self.ids = torch.cat([self.ids, ids[:, None]], 1)
            self.count += 1
            with latents.evaluating(model):
                return model._decoded(self.memory, self.ids)[:, -1]
        x = model.embed(ids)[:, None] + self.positions[self.count]
        now = self.count
        for block, (k_source, v_source), cache in zip(model.decoder_blocks, self.cross, self.caches, strict=True):
            y = block.norm_1(x)
            q, k, v = block.attention.qkv(y).unflatten(2, (3, *heads)).transpose(1, 3).unbind(2)
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, now] = new[:, :, 0]
            y = F.scaled_dot_product_attention(q, *(kept[:, :, : now + 1] for kept in cache))
            y, x = norm_of_sum(block.norm_cross, block.attention.project(y.transpose(1, 2).flatten(2)), x)
            q = block.cross.query(y).unflatten(2, heads).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k_source, v_source, attn_mask=self.seen)
            y, x = norm_of_sum(block.norm_2, block.cross.project(y.transpose(1, 2).flatten(2)), x)
            x = x + block.feed(y)
        self.count += 1
        return F.linear(model.decoder_norm(x), model.embed.weight)[:, 0]


def _as_made(block: nn.Module) -> bool:
    """Whether calling a block of the decoder and its attentions does nothing besides what they are made for."""
    if not untouched(block, _Block):
        return False
    return untouched(block.attention, _SelfAttention) and untouched(block.cross, _CrossAttention)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D] -> [1, H, B T, D] as it lies: for packed sequences."""
    return x.flatten(0, 1).transpose(0, 1)[None]


def _spans(lengths: torch.Tensor, room: int) -> torch.Tensor:
    """Where 2 B packed sequences begin in B rows of `room` tokens: each row's first `lengths` tokens, and the rest."""
    begin = torch.arange(len(lengths), device=lengths.device) * room
    starts = torch.stack([begin, begin + lengths.clamp(0, room)], 1).flatten()  # clamped: a kernel reads by them
    return F.pad(starts, (0, 1), value=len(lengths) * room).int()
