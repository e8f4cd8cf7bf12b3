"""Recommender models of the literature, written anew from their papers with the layers and habits that are usual.

Every model takes ids (int64, 0 is padding where there are sequences) and gives one logit an example, or for a sequence
model one logit for each position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.train.replacements import fix

FIELDS = (6, 5, 7)
"""Vocabulary of each categorical field."""
ITEMS, LENGTH, DIM = 9, 4, 4
DENSE = 3


class FactorizationMachine(nn.Module):
    """Rendle 2010: a bias, linear terms, and pairwise products of factors, fields in one table with offsets."""

    offsets: Tensor

    def __init__(self, fields: Sequence[int] = FIELDS, dim: int = DIM) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *fields[:-1]]).cumsum(0))
        self.linear = nn.Embedding(sum(fields), 1)
        self.factors = nn.Embedding(sum(fields), dim)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.xavier_uniform_(self.factors.weight.data)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids + self.offsets
        factors = self.factors(ids)
        square_of_sum, sum_of_squares = factors.sum(dim=1).pow(2), factors.pow(2).sum(dim=1)
        pairs = 0.5 * (square_of_sum - sum_of_squares).sum(dim=1, keepdim=True)
        return (self.linear(ids).sum(dim=1) + self.bias + pairs).squeeze(1)


def mlp(widths: Sequence[int], *, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """Linear, batch norm, in-place activation, dropout, as CTR models stack them."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers.append(nn.Linear(num_in, num_out))
        if norm:
            layers.append(nn.BatchNorm1d(num_out))
        layers += [nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class DeepFM(nn.Module):
    """Guo et al. 2017: a factorization machine and a deep network over the same embeddings."""

    def __init__(self, fields: Sequence[int] = FIELDS, dim: int = DIM) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Embedding(size, 1) for size in fields])
        self.second = nn.ModuleList([nn.Embedding(size, dim) for size in fields])
        self.deep = mlp([len(fields) * dim, 8, 8], norm=True, dropout=0.2)
        self.out = nn.Linear(8, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        columns = ids.unbind(dim=1)
        linear = sum(table(column) for table, column in zip(self.first, columns, strict=True))
        factors = torch.stack([table(column) for table, column in zip(self.second, columns, strict=True)], dim=1)
        pairs = 0.5 * (factors.sum(dim=1).square() - factors.square().sum(dim=1)).sum(dim=1, keepdim=True)
        deep = self.out(self.deep(factors.flatten(1)))
        return (linear + pairs + deep + self.bias).squeeze(1)


class WideAndDeep(nn.Module):
    """Cheng et al. 2016: a linear model of crossed features beside a deep network; dense features normalised."""

    def __init__(self, fields: Sequence[int] = FIELDS, dim: int = DIM, dense: int = DENSE) -> None:
        super().__init__()
        self.crosses = 11
        self.wide = nn.EmbeddingBag(sum(fields) + self.crosses, 1, mode="sum")
        self.tables = nn.ModuleDict({f"field{i}": nn.Embedding(size, dim) for i, size in enumerate(fields)})
        self.normalise = nn.BatchNorm1d(dense)
        self.deep = nn.Sequential(mlp([len(fields) * dim + dense, 8, 4], norm=True), nn.Linear(4, 1))
        self.wide_bias = nn.Parameter(torch.zeros(1))
        self.sizes = list(fields)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        shifts = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        crossed = sum(self.sizes) + (ids[:, :1] * 31 + ids[:, 1:2]) % self.crosses
        wide = self.wide(torch.cat([ids + shifts, crossed], dim=1)) + self.wide_bias
        rows = [table(column) for table, column in zip(self.tables.values(), ids.unbind(1), strict=True)]
        deep = self.deep(torch.cat([*rows, self.normalise(dense)], dim=1))
        return (wide + deep).squeeze(-1)


class CrossNet(nn.Module):
    """Wang et al. 2021 (DCN v2): x0 * (W x + b) + x, a ParameterList of each."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        kernels = [nn.init.xavier_normal_(torch.empty(width, width)) for _ in range(layers)]
        self.kernels = nn.ParameterList([nn.Parameter(kernel) for kernel in kernels])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width, 1)) for _ in range(layers)])

    def forward(self, inputs: Tensor) -> Tensor:
        x_0 = inputs.unsqueeze(2)
        x_l = x_0
        for kernel, bias in zip(self.kernels, self.bias, strict=True):
            x_l = x_0 * (torch.matmul(kernel, x_l) + bias) + x_l
        return x_l.squeeze(2)


class DCNv2(nn.Module):
    """Wang et al. 2021: cross network and deep network in parallel."""

    def __init__(self, fields: Sequence[int] = FIELDS, dim: int = DIM, dense: int = DENSE) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(size, dim) for size in fields])
        width = len(fields) * dim + dense
        self.cross = CrossNet(width, 2)
        self.deep = mlp([width, 8], dropout=0.1)
        self.out = nn.Linear(width + 8, 1)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        rows = [table(column) for table, column in zip(self.tables, ids.unbind(1), strict=True)]
        inputs = torch.cat([*rows, dense], dim=1)
        return self.out(torch.cat([self.cross(inputs), self.deep(inputs)], dim=1)).view(-1)


class DLRM(nn.Module):
    """Naumov et al. 2019: bags, a bottom network, dot products of all pairs, a top network."""

    def __init__(self, fields: Sequence[int] = FIELDS, dim: int = DIM, dense: int = DENSE) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(size, dim, mode="sum") for size in fields])
        self.bottom = mlp([dense, 6, dim])
        pairs = (len(fields) + 1) * len(fields) // 2
        self.top = nn.Sequential(nn.Linear(dim + pairs, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, dense: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        rows = [bag(ids[:, field].contiguous(), offsets) for field, bag in enumerate(self.bags)]
        features = torch.stack([bottom, *rows], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        first, second = torch.tril_indices(features.shape[1], features.shape[1], offset=-1)
        return self.top(torch.cat([bottom, products[:, first, second]], dim=1)).squeeze(1)


class NeuMF(nn.Module):
    """He et al. 2017: a product of factors beside a network over other factors of the same user and item."""

    def __init__(self, users: int = 6, items: int = ITEMS, dim: int = DIM) -> None:
        super().__init__()
        self.gmf_user, self.gmf_item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.mlp_user, self.mlp_item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.mlp = mlp([2 * dim, 8, 4], dropout=0.1)
        self.predict = nn.Linear(dim + 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.gmf_user(user) * self.gmf_item(item)
        hidden = self.mlp(torch.cat([self.mlp_user(user), self.mlp_item(item)], dim=-1))
        return self.predict(torch.cat([product, hidden], dim=-1)).view(-1)


class PointwiseFeedForward(nn.Module):
    """Two convolutions of width 1 with dropout, as SASRec's authors wrote it."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, dim, kernel_size=1), nn.Conv1d(dim, dim, kernel_size=1)
        self.dropout, self.relu = nn.Dropout(p=dropout), nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.conv1(inputs.transpose(-1, -2)))
        outputs = self.dropout(self.conv2(hidden).transpose(-1, -2).contiguous())
        outputs += inputs
        return outputs


class SASRec(nn.Module):
    """Kang and McAuley 2018: causal self-attention over a padded sequence; the items' table is read three times."""

    def __init__(self, items: int = ITEMS, length: int = LENGTH, dim: int = DIM, blocks: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.items = nn.Embedding(items, dim, padding_idx=0)
        self.positions = nn.Embedding(length, dim)
        self.dropout = nn.Dropout(0.2)
        self.attention_norms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-8) for _ in range(blocks)])
        self.attentions = nn.ModuleList(
            [nn.MultiheadAttention(dim, 1, dropout=0.2, batch_first=True) for _ in range(blocks)]
        )
        self.forward_norms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-8) for _ in range(blocks)])
        self.forwards = nn.ModuleList([PointwiseFeedForward(dim, 0.2) for _ in range(blocks)])
        self.last_norm = nn.LayerNorm(dim, eps=1e-8)

    def log2feats(self, history: Tensor) -> Tensor:
        sequence = self.items(history)
        sequence *= self.items.embedding_dim**0.5
        places = torch.arange(history.shape[1]).unsqueeze(0).expand_as(history)
        sequence += self.positions(places)
        sequence = self.dropout(sequence)
        padded = history == 0
        sequence = sequence * ~padded.unsqueeze(-1)
        causal = ~torch.tril(torch.ones((history.shape[1], history.shape[1]), dtype=torch.bool))
        for norm, attend, norm_again, feed in zip(
            self.attention_norms, self.attentions, self.forward_norms, self.forwards, strict=True
        ):
            query = norm(sequence)
            found, _ = attend(query, sequence, sequence, attn_mask=causal)
            sequence = feed(norm_again(query + found))
            sequence = sequence.masked_fill_(padded.unsqueeze(-1), 0.0)
        return self.last_norm(sequence)

    def forward(self, history: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        features = self.log2feats(history)
        return torch.stack([(features * self.items(ids)).sum(dim=-1) for ids in (positive, negative)], dim=2)


class BST(nn.Module):
    """Chen et al. 2019 (behaviour sequence transformer): an encoder layer over history and target."""

    def __init__(self, items: int = ITEMS, length: int = LENGTH, dim: int = DIM) -> None:
        super().__init__()
        self.items = nn.Embedding(items, dim, padding_idx=0)
        self.position = nn.Parameter(torch.randn(length + 1, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(dim, 2, dim_feedforward=8, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.top = nn.Sequential(
            nn.Linear((length + 1) * dim, 8), nn.BatchNorm1d(8), nn.LeakyReLU(inplace=True), nn.Linear(8, 1)
        )

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        ids = torch.cat([history, target.unsqueeze(1)], dim=1)
        sequence = self.items(ids) + self.position
        encoded = self.encoder(sequence, src_key_padding_mask=ids == 0)
        return self.top(encoded.flatten(start_dim=1)).squeeze(1)


class DSSM(nn.Module):
    """Huang et al. 2013 as two towers: bags of words of one shared table, cosine, a learned temperature."""

    def __init__(self, words: int = ITEMS, dim: int = DIM) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, dim, mode="mean", padding_idx=0)
        self.query_words = self.document_words = self.words
        self.query_tower = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())
        self.document_tower = nn.Sequential(nn.Linear(dim, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        queries = self.query_tower(self.query_words(query))
        documents = self.document_tower(self.document_words(document))
        return functional.cosine_similarity(queries, documents, dim=1) * self.temperature.exp()


class GRU4Rec(nn.Module):
    """Hidasi et al. 2016: a GRU over a session, scores of the candidates given with each example."""

    def __init__(self, items: int = ITEMS, dim: int = DIM, hidden: int = 5) -> None:
        super().__init__()
        self.items = nn.Embedding(items, dim, padding_idx=0)
        self.dropout = nn.Dropout(0.1)
        self.gru = nn.GRU(dim, hidden, num_layers=1, bias=False, batch_first=True)
        self.dense = nn.Linear(hidden, dim)
        self.output_bias = nn.Embedding(items, 1, padding_idx=0)
        for name, parameter in self.gru.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(parameter)

    def forward(self, session: Tensor, candidates: Tensor) -> Tensor:
        outputs, _ = self.gru(self.dropout(self.items(session)))
        lengths = (session != 0).sum(dim=1).clamp(min=1)
        last = outputs[torch.arange(session.shape[0]), lengths - 1]
        scores = torch.bmm(self.items(candidates), self.dense(last).unsqueeze(2)).squeeze(2)
        return scores + self.output_bias(candidates).squeeze(-1)


@dataclass(frozen=True)
class PublicModel:
    """A model and its batches.

    Attributes:
        make: builds it.
        inputs: a batch of so many examples, drawn by the generator: tensors [B, ...].
        losses: the loss of each example from what the model gives and the batch.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    losses: Callable[[Tensor, tuple[Tensor, ...]], Tensor]


def _clicks(outputs: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Logistic loss of made-up clicks."""
    clicked = (inputs[-1].flatten(1)[:, 0] if inputs[-1].dim() > 1 else inputs[-1]) > 1
    return functional.binary_cross_entropy_with_logits(outputs, clicked.float(), reduction="none")


def _first_of_candidates(outputs: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return functional.cross_entropy(outputs, torch.zeros(outputs.shape[0], dtype=torch.int64), reduction="none")


def _next_items(outputs: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """SASRec's: positives against negatives, positions of padding left out."""
    positive, negative = functional.logsigmoid(outputs[..., 0]), functional.logsigmoid(-outputs[..., 1])
    return -((positive + negative) * (inputs[1] != 0)).sum(dim=1)


def _fields(size: int, generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randint(0, field, (size,), generator=generator) for field in FIELDS], dim=1)


def _sequences(size: int, generator: torch.Generator) -> Tensor:
    """Ids of items, padded on the right; one id at least."""
    ids = torch.randint(1, ITEMS, (size, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (size, 1), generator=generator)
    return ids * (torch.arange(LENGTH) < lengths)


def _dense(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, DENSE, generator=generator)


def _dlrm(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Fixed pooling: one id a bag."""
    return _dense(size, generator), torch.arange(size), _fields(size, generator)


def _sasrec(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    history = _sequences(size, generator)
    others = [torch.randint(1, ITEMS, history.shape, generator=generator) * (history != 0) for _ in range(2)]
    return history, *others


PUBLIC_MODELS = {
    "FM": PublicModel(FactorizationMachine, lambda size, g: (_fields(size, g),), _clicks),
    "DeepFM": PublicModel(DeepFM, lambda size, g: (_fields(size, g),), _clicks),
    "Wide&Deep": PublicModel(WideAndDeep, lambda size, g: (_fields(size, g), _dense(size, g)), _clicks),
    "DCN v2": PublicModel(DCNv2, lambda size, g: (_fields(size, g), _dense(size, g)), _clicks),
    "DLRM": PublicModel(DLRM, _dlrm, _clicks),
    "NeuMF": PublicModel(NeuMF, lambda size, g: (_fields(size, g)[:, 0], _sequences(size, g)[:, 0]), _clicks),
    "SASRec": PublicModel(SASRec, _sasrec, _next_items),
    "BST": PublicModel(BST, lambda size, g: (_sequences(size, g), _sequences(size, g)[:, 0]), _clicks),
    "DSSM": PublicModel(DSSM, lambda size, g: (_sequences(size, g), _sequences(size, g)), _clicks),
    "GRU4Rec": PublicModel(GRU4Rec, lambda size, g: (_sequences(size, g), _sequences(size, g)), _first_of_candidates),
}


Batch = tuple[Tensor, ...]


def built(public: PublicModel, *, dropout: bool) -> nn.Module:
    """The model, always with the same weights, after `fix`; without its dropout where that is not wanted."""
    torch.manual_seed(0)
    model = fix(public.make())
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention) and not dropout:
            module.dropout = 0.0
    return model


def gradient_of_one(model: nn.Module, public: PublicModel, inputs: Batch, example: int) -> dict[str, Tensor]:
    """The gradient of one example's loss by autograd, for every parameter that it reaches."""
    some = tuple(tensor[example : example + 1] for tensor in inputs)
    if isinstance(model, DLRM):
        some = (some[0], torch.zeros_like(some[1]), some[2])  # offsets of one bag
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(public.losses(model(*some), some).sum(), parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def norm_of(gradient: Mapping[str, Tensor]) -> float:
    """Over all parameters."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))
