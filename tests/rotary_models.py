"""Attention with rotary embeddings as people write it, and near misses."""

import torch
from torch import nn


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def by_chunks(queries, keys, cos, sin):
    cos, sin = torch.unsqueeze(cos, 1), torch.unsqueeze(sin, dim=1)
    a, b = queries.chunk(2, dim=-1)
    c, d = torch.chunk(keys, 2, dim=-1)
    turned = torch.cat([-b, a], -1) * sin + queries * cos
    return turned, keys * cos + torch.cat([-d, c], -1) * sin


def partial(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
    k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
    return q_embed, k_embed


def one(x, cos, sin):
    return (x * cos.unsqueeze(1)) + (rotate_half(x) * sin.unsqueeze(1))


def old(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


SPELLINGS = (apply_rotary_pos_emb, by_chunks, partial, one, old)


def other_sign(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - rotate_half(q) * sin, k * cos - rotate_half(k) * sin


def halves_swapped(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((b, a), -1) * sin, k * cos + rotate_half(k) * sin


def neighbours(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
    return q * cos + turned * sin, k * cos + rotate_half(k) * sin


def other_tables(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * sin + rotate_half(k) * cos


NEAR_MISSES = (other_sign, halves_swapped, neighbours, other_tables)
turn = apply_rotary_pos_emb  # what the method below calls, by this name


class Attention(nn.Module):
    def __init__(self, heads=4, keys=2, columns=16):
        super().__init__()
        self.columns = columns
        self.q_proj = nn.Linear(64, heads * columns)
        self.k_proj = nn.Linear(64, keys * columns)

    def forward(self, x, cos, sin):
        shape = (*x.shape[:2], -1, self.columns)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        q, k = turn(q, k, cos, sin)
        return q, k
