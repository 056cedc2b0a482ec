"""Decoder-only transformers: torch against JAX and against transformers' GPT-2, causality, heads, readouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ntkbench
from ntkbench import problems
from ntkbench.errors import BadInput, Unavailable
from ntkbench.measure import apart, facts
from ntkbench.networks import language
from ntkbench.networks.initialisation import seeded
from ntkbench.problems.base import reference

SIZE = language.Size(vocabulary=7, positions=6, width=8, layers=2, heads=2)
TOKENS = torch.randint(SIZE.vocabulary, (3, 5), generator=torch.Generator().manual_seed(0))
readouts = pytest.mark.parametrize("read", ["logits", "last", "states"])


def drawn(head="tied", read="logits", size=SIZE):
    """A network with no parameter left at 0 or 1, in float64."""
    network = seeded(lambda: language.Transformer(size, head, read), 0).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in network.parameters():
            w += 0.2 * torch.randn(w.shape, generator=random, dtype=w.dtype)
    return network


@pytest.mark.parametrize(
    ("head", "read"),
    [("tied", "logits"), ("untied", "logits"), ("untied", "last"), ("tied", "states")],  # states are without a head
)
def test_values_and_gradients_are_the_same_in_jax(head, read):
    import jax
    import jax.numpy as jnp

    network, forward = drawn(head, read), language.jax_forward(SIZE, read)
    outputs = network(TOKENS)
    v = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=outputs.dtype)
    theta = dict(network.named_parameters())
    gradients = torch.autograd.grad((v * outputs).sum(), list(theta.values()))
    with jax.enable_x64(True):
        weights = {name: jnp.asarray(w.detach().numpy()) for name, w in theta.items()}

        def projected(w):
            outputs = forward(w, jnp.asarray(TOKENS.numpy()))
            return (jnp.asarray(v.numpy()) * outputs).sum(), outputs

        (_, found), pulled = jax.jit(jax.value_and_grad(projected, has_aux=True))(weights)
    np.testing.assert_allclose(found, outputs.detach(), rtol=0, atol=1e-12)
    for name, gradient in zip(theta, gradients, strict=True):
        np.testing.assert_allclose(pulled[name], gradient, rtol=0, atol=1e-11 * float(gradient.abs().max() + 1))


@readouts
def test_readouts_have_the_expected_shapes(read):
    shapes = {"logits": (3, 5, 7), "last": (3, 7), "states": (3, 2, 5, 8)}
    assert drawn(read=read)(TOKENS).shape == shapes[read]


def test_readouts_of_one_network_agree():
    whole = drawn("untied")
    logits = whole(TOKENS)
    torch.testing.assert_close(language.part(whole, SIZE, "untied", "last").double()(TOKENS), logits[:, -1])
    states = language.part(whole, SIZE, "untied", "states").double()(TOKENS)
    torch.testing.assert_close(whole.head(whole.norm(states[:, -1])), logits)


@pytest.mark.parametrize("read", ["logits", "states"])
def test_later_tokens_do_not_change_earlier_outputs(read):
    network = drawn(read=read)
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % SIZE.vocabulary
    axis = 2 if read == "states" else 1
    one, other = network(TOKENS).unbind(axis), network(changed).unbind(axis)
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True, True, True, False, False]


def test_a_tied_head_shares_the_embedding():
    tied, untied = drawn("tied"), drawn("untied")
    names = set(dict(untied.named_parameters()))
    assert names - set(dict(tied.named_parameters())) == {"head.weight"}
    absent = next(token for token in range(SIZE.vocabulary) if token not in TOKENS[:1])
    for network, moves in ((tied, True), (untied, False)):
        outputs = network(TOKENS[:1])[..., absent].sum()
        gradient = torch.autograd.grad(outputs, network.embedding.weight)[0][absent]
        assert bool(gradient.any()) == moves, "the embedding of a token that is not there acts as its readout"


def test_a_tied_head_counts_once_in_the_kernel():
    network = drawn("tied").float()
    theta = list(network.double().parameters())
    rows = [torch.autograd.grad(f, theta, retain_graph=True) for f in network(TOKENS).reshape(-1)]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(ntkbench.ntk(network, TOKENS, dtype="float64"), J @ J.T)


def test_the_network_is_that_of_gpt2():
    transformers = pytest.importorskip("transformers")
    try:
        model = transformers.GPT2LMHeadModel
    except ImportError as broken:  # it asks for a torchvision that goes with torch
        pytest.skip(f"transformers has no GPT-2 here: {broken}")
    own = drawn()
    sizes = {"vocab_size": 7, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    theirs = model(config).double().eval()
    w = own.state_dict()
    values = {"transformer.wte.weight": w["embedding.weight"], "transformer.wpe.weight": w["position.weight"]}
    for name in ("weight", "bias"):
        values[f"transformer.ln_f.{name}"] = w[f"norm.{name}"]
        for i in range(2):
            block, there = f"blocks.{i}", f"transformer.h.{i}"
            one = {"mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj", "attention.out": "attn.c_proj"}
            for mine, others in one.items():
                values[f"{there}.{others}.{name}"] = w[f"{block}.{mine}.{name}"].t()
            three = [w[f"{block}.attention.{part}.{name}"] for part in ("query", "key", "value")]
            values[f"{there}.attn.c_attn.{name}"] = torch.cat(three).t()
            for mine, others in {"norm1": "ln_1", "norm2": "ln_2"}.items():
                values[f"{there}.{others}.{name}"] = w[f"{block}.{mine}.{name}"]
    missing, unexpected = theirs.load_state_dict(values, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    torch.testing.assert_close(own(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-12)


def test_initial_weights_are_those_of_gpt2():
    network = seeded(lambda: language.Transformer(language.Size(50, 40, 64, 8, 4)), 0)
    for name, w in network.named_parameters():
        residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
        if name.endswith("bias"):
            assert not w.any()
        elif "norm" in name:
            assert (w == 1).all()
        else:
            assert float(w.std()) == pytest.approx(0.02 / (4 if residual else 1), rel=0.1), name


@pytest.mark.parametrize(
    ("size", "head", "parameters"),
    [
        (language.Size(50_257, 1024, 768, 12, 12), "tied", 124_439_808),
        (language.Size(50_257, 1024, 1024, 24, 16), "untied", 406_286_336),
    ],
)
def test_large_networks_have_the_expected_number_of_parameters(size, head, parameters):
    with torch.device("meta"):
        network = language.Transformer(size, head)
        assert network(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 50_257)
    assert sum(w.numel() for w in network.parameters()) == parameters


def test_a_width_that_is_no_multiple_of_the_heads_is_refused():
    with pytest.raises(BadInput, match="d=6 is not a multiple of 4"):
        language.Size(7, 6, 6, 2, 4)


@pytest.mark.parametrize(
    ("label", "says"), [("gpt2_small[T=1025]", "T can be at most 1024"), ("gpt2_small[d=100]", None)]
)
def test_sizes_of_gpt2_are_checked(label, says):
    if says is None:
        assert problems.check(label) == label
        return
    with pytest.raises(BadInput, match=says):
        problems.define(label)


def test_an_untrained_network_has_no_alignment():
    problem = problems.load("gpt2_small[T=3,V=9,d=64,L=1]")
    assert problem.theta_f is None and problem.recipe == ""
    exact = reference.exact(problem)
    J = ntkbench.testing.explicit_jacobian(problem)
    assert exact["trace"] == pytest.approx((J**2).sum(), rel=1e-9) and "alignment" not in exact


def test_infeasible_exact_values_are_refused_before_anything_is_computed(tmp_path, monkeypatch):
    problem = problems.load("gpt2_small[T=3,V=9,d=64,L=1]")
    monkeypatch.setattr(reference, "OPERATIONS", 2 * problem.n**2 * problem.P)
    reference.exact(problem)
    monkeypatch.setattr(reference, "OPERATIONS", 2 * problem.n**2 * problem.P - 1)
    monkeypatch.setattr(type(problem), "digest", lambda self: pytest.fail("it is computed"))
    with pytest.raises(Unavailable, match=r"exact values of gpt2_small\[.*would take .* operations, more than the"):
        reference.exact(problem)
    part = tmp_path / "part"
    monkeypatch.setattr("ntkbench.measure.watchdog.end_with_parent", lambda: None)
    apart._find(facts._find, (problem.name,), 1, part)
    found = json.loads(part.read_text())
    assert found["status"] == "skipped" and "more than the limit" in found["reason"]
