"""Theorem 1, built by hand: a relational head computes R(x, Select(x, y)), within the bound of the paper's proof."""
import math

import pytest
import torch

from extras import theorem1
from extras.theorem1 import GAP, Construction, bound, sample, utility, worst_error

X, Y, _ = sample(GAP, 300)


def test_hidden_units_interpolate_linearly_between_knots():
    """phi_k is 1 at its own knot, 0 at all others; phi is never negative and sums to 1."""
    phi = Construction(9, 1.0).phi
    knots, t = torch.linspace(-1, 1, 9).double(), torch.linspace(-1, 1, 101).double()
    torch.testing.assert_close(phi(knots[:, None]), torch.eye(9).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(phi(t[:, None]).sum(-1), torch.ones(101).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(phi(t[:, None]) @ knots, t, atol=1e-12, rtol=0)
    assert phi(t[:, None]).min() > -1e-12


def test_head_has_no_symbols_and_its_relations_pass_unchanged():
    """W_s = 0, W_r = I: the output is the sum of alpha_ij r_ij, and symbols, here the features, do not reach it."""
    model = Construction(17, 50.0)
    features = model.phi(torch.cat([X[:, None], Y], 1)[..., None])
    out, alpha, r = model.head(features, torch.randn_like(features), need_weights=True)
    torch.testing.assert_close(out[..., :2], torch.einsum("bij,blij->bil", alpha[:, 0], r), atol=1e-12, rtol=0)
    assert not out[..., 2:].any()                                      # of 17 columns two are used


@pytest.mark.parametrize("width, beta", [(9, 100), (33, 100), (33, 400), (65, 200), (65, 400)])
def test_error_is_within_the_bound(width, beta):
    assert worst_error(Construction(width, beta), X, Y) <= bound(width, beta)


def test_error_falls_exponentially_in_the_sharpness_at_the_rate_of_the_gap():
    errors = [worst_error(Construction(129, beta), X, Y) for beta in (40, 60, 80)]
    for blunt, sharp in zip(errors, errors[1:]):
        assert math.exp(-1.5 * GAP * 20) < sharp / blunt < 1.1 * math.exp(-GAP * 20)


def test_error_falls_as_the_square_of_the_distance_between_knots():
    errors = [worst_error(Construction(width, 1000), X, Y) for width in (17, 33, 65, 129)]
    assert [wide / narrow for narrow, wide in zip(errors, errors[1:])] == pytest.approx([1 / 4] * 3, rel=0.1)


def zero_W_r(head):
    head.W_r.data.zero_()


def exchanged_relations(head):
    head.W_r.data[0, :2] = head.W_r.data[0, [1, 0]]


def doubled_W_r(head):
    head.W_r.data *= 2


def no_selection(head):
    head.W_q.weight.data.zero_()


def worst_object_selected(head):
    head.W_q.weight.data.neg_()


def query_and_key_exchanged(head):
    head.W_k.weight.data = head.W_k.weight.data.mT.clone()


def symbols_that_pass(head):
    head.W_s.weight.data = torch.eye(65).double()


@pytest.mark.parametrize("fault", [zero_W_r, exchanged_relations, doubled_W_r, no_selection, worst_object_selected,
                                   query_and_key_exchanged, symbols_that_pass])
def test_no_other_weights_do_it(fault):
    model = Construction(65, 400.0)
    fault(model.head)
    assert worst_error(model, X, Y) > 100 * bound(65, 400)


def test_the_preorder_counts_and_not_the_utility_that_expresses_it():
    """A strictly increasing function of u orders objects as u does, so the same object is selected."""
    def other(x, y):
        return torch.exp(2 * utility(x, y))
    assert worst_error(Construction(129, 2000, other), X, Y) < 1e-3


def test_another_criterion_and_relation_that_are_only_continuous():
    """The nearest to x^2 is selected; relations with kinks."""
    def nearest(x, y):
        return -(y - x ** 2).abs()

    relations = [lambda x, y: (x - y).abs(), lambda x, y: torch.maximum(x, y), lambda x, y: x * y.abs().sqrt()]
    best = nearest(X[:, None], Y).topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.1
    errors = [worst_error(Construction(width, beta, nearest, relations), X[clear], Y[clear], nearest, relations)
              for width, beta in ((9, 10), (33, 100), (257, 200))]
    assert errors[0] > 4 * errors[1] > 8 * errors[2] and errors[2] < 0.1


def test_objects_that_tie_share_the_attention_however_sharp_it_is():
    """So the theorem needs a gap: here neither -1/2 nor 1/2 comes out, but their mean."""
    tie = Construction(9, 1e4, lambda x, y: 0 * x - y.abs(), [lambda x, y: 0 * x + y])
    a = tie(torch.tensor([0.3]).double(), torch.tensor([[-0.5, 0.5, 1.0]]).double())
    assert a.item() == pytest.approx(0, abs=1e-9)


def test_script_prints_the_slopes_and_draws_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theorem1, "sample", lambda gap: sample(gap, 20))
    monkeypatch.setattr(theorem1, "WIDTHS", (5, 7, 9, 11, 13, 15, 17))
    monkeypatch.setattr(theorem1, "BETAS", range(0, 70, 10))
    theorem1.main([f"--out_dir={tmp_path / 'new'}"])
    assert capsys.readouterr().out.count("slope") == 2 and (tmp_path / "new" / "theorem1.png").exists()
