"""Quantized embeddings and heads: rows split over ranks, padding, tying."""

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tests.serving.vllm_layers import BY_ROW, FORMATS, assert_close, load, quant_config, random_layer
from vllm_requant.serving.embedding import TieableHeadMethod

HIDDEN = 128
formats = pytest.mark.parametrize("fmt", BY_ROW.values(), ids=BY_ROW)
# 512: no padding; 500: the last rank is padded; 20: at TP 4 two ranks are nothing but padding
sizes = pytest.mark.parametrize(("vocabulary", "tp"), [(512, 1), (512, 2), (500, 1), (500, 4), (20, 4)])


def embedding(config, vocabulary: int, prefix: str = "model.embed_tokens") -> VocabParallelEmbedding:
    return VocabParallelEmbedding(vocabulary, HIDDEN, quant_config=config, prefix=prefix)


def head(config, vocabulary: int, **kwargs) -> ParallelLMHead:
    return ParallelLMHead(vocabulary, HIDDEN, quant_config=config, prefix="lm_head", **kwargs)


def ids(vocabulary: int) -> torch.Tensor:
    return torch.tensor([0, 1, vocabulary // 2, vocabulary - 1, 3])


def hidden() -> torch.Tensor:
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))


@formats
@sizes
def test_embedding(as_rank, fmt, vocabulary, tp):
    layer = random_layer(vocabulary, HIDDEN, **fmt)
    total = 0
    for rank in range(tp):
        as_rank(rank, tp)
        total = total + load(embedding(quant_config({"model.embed_tokens": layer}), vocabulary), {None: layer})(
            ids(vocabulary)
        )
    assert_close(total, layer.weight()[ids(vocabulary)])


@formats
@sizes
def test_head_with_weights_of_its_own(as_rank, fmt, vocabulary, tp):
    layer, logits = random_layer(vocabulary, HIDDEN, **fmt), []
    for rank in range(tp):
        as_rank(rank, tp)
        module = load(head(quant_config({"lm_head": layer}), vocabulary), {None: layer})
        logits.append(module.quant_method.apply(module, hidden()))
        assert logits[-1].shape[1] == module.num_embeddings_per_partition
    gathered = torch.cat(logits, dim=1)
    assert_close(gathered[:, :vocabulary], hidden() @ layer.weight().T)
    assert (gathered[:, vocabulary:] == 0).all()


@formats
@sizes
def test_head_tied_to_a_quantized_embedding(as_rank, fmt, vocabulary, tp):
    layer, logits = random_layer(vocabulary, HIDDEN, **fmt), []
    for rank in range(tp):
        as_rank(rank, tp)
        config = quant_config({"model.embed_tokens": layer})
        source = embedding(config, vocabulary)
        tied = head(config, vocabulary).tie_weights(source)
        # it neither waits for tensors nor counts the embedding as its own
        assert isinstance(tied, ParallelLMHead) and not list(tied.parameters()) and not list(tied.children())
        tied.quant_method.process_weights_after_loading(tied)
        load(source, {None: layer})
        logits.append(tied.quant_method.apply(tied, hidden()))
    assert_close(torch.cat(logits, dim=1)[:, :vocabulary], hidden() @ layer.weight().T)


def test_tied_head_keeps_its_bias(as_rank):
    as_rank(0, 1)
    layer = random_layer(64, HIDDEN, **FORMATS["lut3"])
    config = quant_config({"model.embed_tokens": layer})
    source = embedding(config, 64)
    tied = head(config, 64, bias=True).tie_weights(source)
    load(source, {None: layer})
    tied.bias.data = torch.randn(64)
    logits = tied.quant_method.apply(tied, hidden(), bias=tied.bias)
    assert_close(logits, hidden() @ layer.weight().T + tied.bias)


def test_head_tied_to_an_ordinary_embedding(as_rank):
    as_rank(0, 1)
    config = quant_config({"other": random_layer(64, HIDDEN, **FORMATS["lut3"])})
    source = embedding(config, 64)
    tied = head(config, 64).tie_weights(source)
    assert isinstance(tied.quant_method, TieableHeadMethod) and tied.weight is source.weight


def test_head_with_weights_of_its_own_refuses_to_be_tied(as_rank):
    as_rank(0, 1)
    layer = random_layer(64, HIDDEN, **FORMATS["lut3"])
    config = quant_config({"lm_head": layer, "model.embed_tokens": layer})
    with pytest.raises(ValueError, match=r"lm_head is quantized on its own.*must not name the head"):
        head(config, 64).tie_weights(embedding(config, 64))


def test_embedding_that_vllm_builds_without_a_name(as_rank):
    """Llama's embedding has no prefix; its checkpoint name is found by its kind of name and shape."""
    as_rank(0, 1)
    layer = random_layer(64, HIDDEN, **FORMATS["lut3"])
    linear = random_layer(32, HIDDEN, **FORMATS["lut3"])
    config = quant_config({"lm_head": layer, "model.embed_tokens": layer, "model.wte": linear})
    assert embedding(config, 64, prefix="").quant_method.name == "model.embed_tokens"
    both = quant_config({"decoder.embed_tokens": layer, "encoder.embed_tokens": layer})
    with pytest.raises(ValueError, match=r"decoder.embed_tokens, encoder.embed_tokens would all fit"):
        embedding(both, 64, prefix="")


def test_vocabulary_that_differs_from_the_model(as_rank):
    as_rank(0, 1)
    layer = random_layer(64, HIDDEN, **FORMATS["lut3"])
    with pytest.raises(ValueError, match=r"model.embed_tokens is \[64, 128\].*\[96, 128\]"):
        embedding(quant_config({"model.embed_tokens": layer}), 96)


def test_trellis_embedding_is_refused_before_loading(as_rank):
    layer = random_layer(512, 64, **FORMATS["trellis2-sparse"])
    as_rank(0, 1)
    with pytest.raises(ValueError, match=r"e: an embedding or a head cannot be of the trellis kind"):
        VocabParallelEmbedding(512, 64, quant_config=quant_config({"e": layer}), prefix="e")
