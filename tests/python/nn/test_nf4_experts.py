"""NF4Experts against the dense experts of transformers that it stands for."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from qlora_native import ops
from qlora_native.nn import NF4Experts, count_parameters
from qlora_native.nn.nf4_experts import is_experts
from support import assert_near, same_bits, state_bits

E, HIDDEN, INNER, TOP_K = 4, 64, 48, 2


def dense_experts(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER}
    if kind == "mixtral":  # gate and up, one after the other
        config = transformers.MixtralConfig(**sizes, num_local_experts=E)
        experts = MixtralExperts(config)
    elif kind == "gpt_oss":  # transposed, interleaved, with biases and limits
        config = transformers.GptOssConfig(**sizes, num_local_experts=E)
        experts = GptOssExperts(config)
    else:  # no gate
        sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER}
        config = transformers.NemotronHConfig(**sizes, n_routed_experts=E)
        experts = NemotronHExperts(config)
    config._experts_implementation = "eager"
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


KINDS = ["mixtral", "gpt_oss", "nemotron"]


def routed(m: int = 9, dtype: torch.dtype = torch.float32):
    """Tokens, two different experts for each, and their weights; expert 3 gets no token."""
    x = torch.randn(m, HIDDEN, dtype=dtype)
    index = torch.rand(m, E - 1).argsort(dim=1)[:, :TOP_K]
    return x, index, torch.rand(m, TOP_K, dtype=dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_its_dense_form_does(kind, double_quant):
    experts = NF4Experts.from_experts(dense_experts(kind), double_quant=double_quant)
    dense = experts.to_dense(torch.float32)
    results = []
    x, index, weights = routed()
    for module in (experts, dense):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weights)]
        y = module(leaves[0], index, leaves[1])
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_transformers_gives_the_same(implementation):
    experts = NF4Experts.from_experts(dense_experts("mixtral"))
    dense = experts.to_dense(torch.float32)
    dense.config._experts_implementation = implementation
    arguments = routed()
    assert_near(experts(*arguments), dense(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    experts = NF4Experts.from_experts(dense_experts("gpt_oss", dtype))
    x, index, weights = routed(dtype=dtype)
    y = experts(x, index, weights)
    assert y.dtype == dtype
    exact = experts.to_dense(torch.float32)(x.float(), index, weights.float())
    assert_near(y.float(), exact, relative=0.05)
    in_fp32 = experts(x.float(), index, weights.float())
    experts.compute_dtype = dtype
    assert experts(x.float(), index, weights.float()).dtype == torch.float32
    experts.compute_dtype = None
    with torch.autocast("cpu", dtype):
        assert_near(experts(x.float(), index, weights.float()), in_fp32, relative=0.05)


def test_no_tokens_and_one():
    experts = NF4Experts.from_experts(dense_experts("mixtral"))
    x, index, weights = routed(0)
    assert experts(x, index, weights).shape == (0, HIDDEN)
    x, index, weights = routed(1)
    assert_near(experts(x, index, weights), experts.to_dense(torch.float32)(x, index, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_quantised_by_itself(kind):
    dense = dense_experts(kind)
    up, down = (getattr(dense, name).detach().clone() for name in NF4Experts(dense).weight_names)
    experts = NF4Experts.from_experts(dense, block_size=32)
    for name, weight in zip(experts.weight_names, (up, down), strict=True):
        for e, one in enumerate(weight):
            one = (one.T if experts.is_transposed else one).contiguous()
            expected = ops.quantize(one, 32, True)
            for part, other in zip(experts.tensors(name, e)[:4], expected[:4], strict=True):
                assert same_bits(part.data, other)
        assert experts.dequantize(name).shape == weight.shape
    assert count_parameters(experts) == (0, count_parameters(dense)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_form_is_the_module_that_it_was(kind):
    dense = dense_experts(kind).eval()
    expected = {n: (p.shape, p.dtype) for n, p in dense.named_parameters()}
    again = NF4Experts.from_experts(copy.deepcopy(dense)).to_dense(torch.float32)
    assert type(again) is type(dense)
    assert {n: (p.shape, p.dtype) for n, p in again.named_parameters()} == expected
    assert vars(again).keys() == vars(dense).keys()
    assert not again.training
    for name, bias in dense.named_parameters():
        if name.endswith("bias"):
            assert same_bits(again.get_parameter(name).data, bias.data)


def test_state_is_strict():
    experts = NF4Experts.from_experts(dense_experts("mixtral"))
    other = NF4Experts(dense_experts("mixtral"))
    assert other(*routed()).abs().max() == 0
    other.load_state_dict(experts.state_dict())
    assert state_bits(other) == state_bits(experts)
    with pytest.raises(RuntimeError, match=r'"down_proj" is torch.float32 .*, want uint8'):
        other.load_state_dict(
            {**experts.state_dict(), "down_proj": experts.dequantize("down_proj")}
        )


def test_what_is_not_experts_is_refused():
    assert not is_experts(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="NF4Experts: experts is Linear, want a module of experts"):
        NF4Experts(nn.Linear(4, 4))
    experts = NF4Experts.from_experts(dense_experts("mixtral"))
    assert not is_experts(experts)
    with pytest.raises(ValueError, match="experts is NF4Experts"):
        NF4Experts(experts)
    with pytest.raises(ValueError, match="block_size is 7"):
        NF4Experts(dense_experts("mixtral"), block_size=7)
    experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="expert parallelism"):
        experts(*routed())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:3], "down_proj has 3 experts, want 4"),
        (lambda w: torch.cat([w, w[:1]]), r"down_proj\[4\] is \[64, 48\], want .* of 4 experts"),
        (lambda w: w.mT, r"down_proj\[0\] is \[48, 64\], want \[64, 48\]"),
        (lambda w: w.double(), r"down_proj\[0\]: nf4_quantize: w is torch.float64"),
        (lambda w: w.index_fill(0, torch.tensor([2]), torch.nan), r"down_proj\[2\]: .*NaN"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(change, message):
    dense = dense_experts("mixtral")
    experts = NF4Experts(dense)
    with pytest.raises(ValueError, match=message):
        experts.quantize(change(dense.down_proj.detach()), "down_proj")
